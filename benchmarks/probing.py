"""What probing costs: ``python benchmarks/probing.py [overhead] [watch] [memory]``.

Needs the extra ``models`` (transformers). overhead: time of ``probe`` over that of a bare forward
pass, alternating in one run. watch: time of training steps under ``Probe`` over that of bare ones.
memory: high-water marks, each case in a process of its own.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import svlib as sv

os.environ["HF_HUB_OFFLINE"] = "1"


def resnet50() -> tuple[nn.Module, Callable[[int, int], Any]]:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig()), lambda inputs, seed: images(inputs, 224, seed)


def gpt2() -> tuple[nn.Module, Callable[[int, int], Any]]:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config()), lambda inputs, seed: {
        "input_ids": tokens(inputs, 256, 50257, seed)
    }


MODELS = {"ResNet-50, 3 x 224 x 224": resnet50, "GPT-2 small, 256 tokens": gpt2}


def images(count: int, side: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, length: int, vocabulary: int, seed: int) -> torch.Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def run(case: str, model: nn.Module, batches: list[Any]) -> float:
    """Seconds of one case."""
    started = time.perf_counter()
    if case == "forward":
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)
    else:
        sv.probe(model, batches, layers="all" if case == "all layers" else None)
    return time.perf_counter() - started


def overhead() -> None:
    """Batches of few and of many inputs, and ten batches, of which explain records the first."""
    for name, make in MODELS.items():
        model, batch_of = make()
        model.eval()
        for inputs, count in ((4, 1), (4, 10), (32, 1)):
            batches = [batch_of(inputs, seed) for seed in range(count)]
            cases = ["forward", "probe", *["all layers"] * (count == 1)]
            seconds = np.array([[run(case, model, batches) for case in cases] for _ in range(7)])
            ratios = seconds[:, 1:] / seconds[:, :1]
            told = zip(cases[1:], np.median(ratios, 0), ratios.min(0), ratios.max(0), strict=True)
            text = ", ".join(
                f"{case} {median:.2f} ({low:.2f} to {high:.2f})" for case, median, low, high in told
            )
            what = f"{name}, {count} x {inputs} inputs, forward {np.median(seconds[:, 0]):.2f} s"
            print(f"{what}; times over it: {text}", flush=True)


def watch() -> None:
    """ALL-CNN-C, 100 steps of 64 images, alternating."""
    model = sv.networks.all_cnn_c(24, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batch = images(64, 32, 0)

    def train() -> float:
        started = time.perf_counter()
        for _ in range(100):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        return time.perf_counter() - started

    seconds = []
    for _ in range(5):
        row = [train()]
        for every in (1, 10, 100):
            with sv.Probe(model, every=every):
                row.append(train())
        seconds.append(row)
    ratios = np.array(seconds)[:, 1:] / np.array(seconds)[:, :1]
    for every, found in zip((1, 10, 100), ratios.T, strict=True):
        told = f"{np.median(found):.3f} ({found.min():.3f} to {found.max():.3f})"
        print(f"Probe every {every} steps: {told} of the bare time")


def memory(case: str = "") -> None:
    if not case:
        for name in MODELS:
            for what in ("forward 1", "forward 10", "probe 1", "probe 10", "probe 100"):
                subprocess.run([sys.executable, __file__, "memory", f"{name}|{what}"], check=True)
        return
    name, what = case.split("|")
    kind, count = what.split()
    model, batch_of = MODELS[name]()
    model.eval()
    inputs = 8 if "ResNet" in name else 4
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def batches() -> Iterator[Any]:
        for seed in range(int(count)):
            yield batch_of(inputs, seed)

    if kind == "forward":
        for batch in batches():
            run(kind, model, [batch])
    else:
        sv.probe(model, batches())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    above = f"{after / 1024:.0f} MiB, {(after - before) / 1024:.0f} above the model"
    print(f"{name}, {kind}, {count} batches of {inputs}: {above}")


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["overhead", "watch", "memory"]
    if chosen[0] == "memory":
        memory(*chosen[1:])
    else:
        for name in chosen:
            {"overhead": overhead, "watch": watch, "memory": memory}[name]()
