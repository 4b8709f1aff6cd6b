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


def resnet50() -> tuple[nn.Module, Callable[[int], Any]]:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig()), lambda seed: images(8, 224, seed)


def gpt2() -> tuple[nn.Module, Callable[[int], Any]]:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config()), lambda seed: {"input_ids": tokens(4, 256, 50257, seed)}


MODELS = {"ResNet-50, 8 x 3 x 224 x 224": resnet50, "GPT-2 small, 4 x 256 tokens": gpt2}


def images(count: int, side: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, length: int, vocabulary: int, seed: int) -> torch.Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))


def forward(model: nn.Module, batch: Any) -> None:
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)


def overhead() -> None:
    """One batch; and ten, where only the first is recorded for the theory."""
    for name, make in MODELS.items():
        model, batch_of = make()
        model.eval()
        for count in (1, 10):
            batches = [batch_of(seed) for seed in range(count)]
            times: dict[str, list[float]] = {"forward": [], "probe": [], "all": []}
            for _ in range(6 if count == 1 else 2):
                for kind, seconds in times.items():
                    if kind == "all" and count > 1:
                        continue
                    started = time.perf_counter()
                    if kind == "forward":
                        for batch in batches:
                            forward(model, batch)
                    else:
                        sv.probe(model, batches, layers=None if kind == "probe" else "all")
                    seconds.append(time.perf_counter() - started)
            bare = min(times["forward"])
            ratios = ", ".join(
                f"{kind} {min(found) / bare:.2f}" for kind, found in times.items() if found and kind != "forward"
            )
            print(f"{name}, {count} batches: forward {bare:.2f} s, over it: {ratios}")


def memory(case: str = "") -> None:
    if not case:
        for name in MODELS:
            for what in ("forward 1", "forward 10", "probe 1", "probe 10", "probe 100" if "GPT" in name else "probe 40"):
                subprocess.run([sys.executable, __file__, "memory", f"{name}|{what}"], check=True)
        return
    name, what = case.split("|")
    kind, count = what.split()
    model, batch_of = MODELS[name]()
    model.eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def batches() -> Iterator[Any]:
        for seed in range(int(count)):
            yield batch_of(seed)

    if kind == "forward":
        for batch in batches():
            forward(model, batch)
    else:
        sv.probe(model, batches())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{name}, {kind}, {count} batches: {after / 1024:.0f} MiB, {(after - before) / 1024:.0f} above the model")


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["overhead", "memory"]
    if chosen[0] == "memory":
        memory(*chosen[1:])
    else:
        for name in chosen:
            {"overhead": overhead, "memory": memory}[name]()
