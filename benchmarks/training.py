"""What training costs against a bare torch loop, what initialization costs, and how exact it is.

``python benchmarks/training.py [loop] [cost] [exactness]``, all by default, some minutes on two
cores; no files are needed. Times are medians over alternating repetitions; compare the ratios, the
machine's speed varies.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from svlib.experiments.training import Experiment, initialized, run
from svlib.probing.models import weighted_layers

NETWORKS = {
    "ALL-CNN-C": Experiment(
        "digits", "total", 96, iterations=20, batch_size=64, channels_last=True
    ),
    "ALL-CNN-C, quarter width": Experiment(
        "digits", "total", 24, iterations=80, batch_size=64, channels_last=True
    ),
    "U-Net": Experiment(
        "membranes", "total", 16, iterations=20, batch_size=8, calibration=32, channels_last=True
    ),
}


def bare_loop(experiment: Experiment) -> float:
    """Seconds per iteration of the loop that one writes first."""
    split = sv.data.digits() if experiment.data == "digits" else sv.data.membranes(seed=0)
    loss_of = F.cross_entropy if experiment.data == "digits" else F.binary_cross_entropy_with_logits
    model = initialized(experiment, 0)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=experiment.learning_rate, momentum=experiment.momentum
    )
    started = time.perf_counter()
    for _ in range(experiment.iterations):
        rows = torch.randint(len(split.images), (experiment.batch_size,))
        images = split.images[rows].contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = loss_of(model(images), split.labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return (time.perf_counter() - started) / experiment.iterations


def loop(repetitions: int = 7) -> None:
    print("seconds per iteration: bare loop, svlib's run, ratio of medians; ratios of neighbours")
    for name, experiment in NETWORKS.items():
        bare, ours = [], []
        for repetition in range(repetitions + 1):  # the first is not counted
            bare.append(bare_loop(experiment))
            ours.append(float(run(experiment, repetition).attrs["seconds_per_iteration"]))
        ratio = statistics.median(ours[1:]) / statistics.median(bare[1:])
        pairs = sorted(b / a for a, b in zip(bare[1:], ours[1:], strict=True))
        print(
            f"  {name:26} {statistics.median(bare[1:]):.4f} {statistics.median(ours[1:]):.4f}",
            f"{ratio:.3f}",
            end="  ",
        )
        print(" ".join(f"{pair:.2f}" for pair in pairs))


def cost(repetitions: int = 7) -> None:
    print(
        "one initialization in forward passes of its batch; "
        "one iteration of training in those of total init"
    )
    for name, experiment in NETWORKS.items():
        times: dict[str, list[float]] = {
            kind: [] for kind in ("forward", "total", "sample", "step", "step with BatchNorm")
        }
        batchnorm = replace(experiment, initialization="batchnorm", iterations=10)
        x = (sv.data.digits() if experiment.data == "digits" else sv.data.membranes(seed=0)).images[
            : experiment.calibration
        ]
        x = x.contiguous(memory_format=torch.channels_last)
        for _ in range(repetitions):
            plain = initialized(experiment, 0)
            with torch.no_grad():
                times["forward"].append(seconds(plain, x))
            times["total"].append(seconds(sv.init.total_, plain, x))
            times["sample"].append(seconds(sv.init.sample_, plain, x))
            for kind, configuration in (
                ("step", replace(experiment, iterations=10)),
                ("step with BatchNorm", batchnorm),
            ):
                times[kind].append(float(run(configuration, 0).attrs["seconds_per_iteration"]))
        median = {kind: statistics.median(found) for kind, found in times.items()}
        relative = {
            "total": median["total"] / median["forward"],
            "sample": median["sample"] / median["forward"],
        }
        relative["BatchNorm's iteration"] = median["step with BatchNorm"] / median["step"]
        print(f"  {name:26}", ", ".join(f"{kind} {value:.2f}" for kind, value in relative.items()))


def seconds(call: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def worst(model: nn.Module, x: torch.Tensor) -> tuple[float, float, float]:
    """Largest |sample mean| and |sample variance - 1| of a unit, largest |mean square - 1| of a
    layer."""
    found = []

    def look(layer: nn.Module, _: object, y: torch.Tensor) -> None:
        units = y.double().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        found.append(
            (
                units.mean(1).abs().max(),
                (units.var(1) - 1).abs().max(),
                (units.square().mean() - 1).abs(),
            )
        )

    hooks = [layer.register_forward_hook(look) for layer in weighted_layers(model).values()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    columns = zip(*found, strict=True)
    return tuple(float(torch.stack(x).max()) for x in columns)  # type: ignore[return-value]


def exactness() -> None:
    digits, cells = sv.data.digits(32), sv.data.membranes(seed=0)
    models: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, torch.Tensor]] = {
        "ALL-CNN-C": (
            lambda: sv.networks.all_cnn_c(96, channels=1, seed=0),
            digits.images[:256],
            digits.held_out_images[:256],
        ),
        "U-Net": (
            lambda: sv.networks.UNet(16, levels=4, seed=0),
            cells.images[:64],
            cells.held_out_images,
        ),
        "MLP, 20 layers": (
            lambda: sv.networks.mlp(256, width=256, depth=20, outputs=10, seed=0),
            sv.data.gaussian(1024, 256, seed=0),
            sv.data.gaussian(1024, 256, seed=1),
        ),
    }
    print(
        "after sample_, worst unit: |mean|, |variance - 1| on the calibration batch; on another; ",
        end="",
    )
    print("after total_, worst layer: |mean square - 1|; on a fresh one")
    for name, (make, calibration, fresh) in models.items():
        sample, total = make(), make()
        sv.init.sample_(sample, calibration)
        sv.init.total_(total, calibration)
        own, other = worst(sample, calibration), worst(sample, fresh)
        squares = worst(total, calibration)[2], worst(total, fresh)[2]
        print(
            f"  {name:16} {own[0]:.1e} {own[1]:.1e}; {other[0]:.2f} {other[1]:.2f};",
            f"{squares[0]:.1e}; {squares[1]:.3f}",
        )


PARTS = {"loop": loop, "cost": cost, "exactness": exactness}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
