"""What probing costs: ``python benchmarks/probing.py [overhead] [memory]``.

Needs the extra ``models`` (transformers). overhead: time of ``probe`` over that of a bare forward pass, alternating in one
run. memory: high-water marks, each case in a process of its own.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import svlib as sv

os.environ["HF_HUB_OFFLINE"] = "1"


def resnet50() -> tuple[nn.Module, Callable[[int, int], Any]]:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig()), lambda inputs, seed: images(inputs, 224, seed)


def gpt2() -> tuple[nn.Module, Callable[[int, int], Any]]:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config()), lambda inputs, seed: {"input_ids": tokens(inputs, 256, 50257, seed)}


MODELS = {"ResNet-50, 3 x 224 x 224": resnet50, "GPT-2 small, 256 tokens": gpt2}


def images(count: int, side: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, length: int, vocabulary: int, seed: int) -> torch.Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def forward(model: nn.Module, batch: Any) -> None:
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)


def overhead() -> None:
    """Over batches of few and of many inputs, and over ten batches, of which only the first is recorded for the theory."""
    for name, make in MODELS.items():
        model, batch_of = make()
        model.eval()
        for inputs, count in ((4, 1), (32, 1), (4, 10)):
            batches = [batch_of(inputs, seed) for seed in range(count)]
            cases: dict[str, Callable[[], object]] = {
                "forward": lambda batches=batches: [forward(model, batch) for batch in batches],  # type: ignore[misc]
                "probe": lambda batches=batches: sv.probe(model, batches),  # type: ignore[misc]
            }
            if count == 1:
                cases["layers='all'"] = lambda batches=batches: sv.probe(model, batches, layers="all")  # type: ignore[misc]
            seconds: dict[str, list[float]] = {case: [] for case in cases}
            for _ in range(7):
                for case, run in cases.items():
                    started = time.perf_counter()
                    run()
                    seconds[case].append(time.perf_counter() - started)
            bare = seconds.pop("forward")
            ratios = {case: sorted(t / b for t, b in zip(found, bare, strict=True)) for case, found in seconds.items()}
            told = ", ".join(f"{case} {found[3]:.2f} ({found[0]:.2f} to {found[-1]:.2f})" for case, found in ratios.items())
            print(f"{name}, {count} x {inputs} inputs: forward {sorted(bare)[3]:.2f} s, times over it: {told}", flush=True)


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
            forward(model, batch)
    else:
        sv.probe(model, batches())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{name}, {kind}, {count} batches of {inputs}: {after / 1024:.0f} MiB, {(after - before) / 1024:.0f} above the model")


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["overhead", "memory"]
    if chosen[0] == "memory":
        memory(*chosen[1:])
    else:
        for name in chosen:
            {"overhead": overhead, "memory": memory}[name]()
