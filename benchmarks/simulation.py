"""How fast the simulation is, against a plain torch loop in the same run; how much memory it takes.

``python benchmarks/simulation.py [speed] [factors] [figure] [angles] [memory]``, all by default,
some five minutes on two cores. Times are medians over alternating repetitions; compare the ratios,
the machine's speed varies.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import svlib as sv
from svlib import gram

FIGURE = (30, 100, 300, 1000, 3000)


def plain(width: int, samples: int, depth: int, networks: int) -> None:
    """What one writes first: draw every weight matrix, keep the moments of every layer."""
    for _ in range(networks):
        y = torch.randn(samples, width)
        for _ in range(depth):
            weights = torch.randn(width, width) * math.sqrt(2 / width)
            y = torch.relu(y) @ weights
            y.mean(0).square().mean(), y.var(0).mean()


def seconds(*calls: Callable[[], object], repetitions: int = 5) -> list[float]:
    """Median time of each call, alternating between them, after one that is not counted."""
    times: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions + 1):
        for call, kept in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if repetition > 0:
                kept.append(time.perf_counter() - started)
    return [statistics.median(kept) for kept in times]


def speed() -> None:
    print("milliseconds per layer and network; ratio to the plain loop")
    for width, samples, networks in [
        (3000, 100, 6),
        (3000, 256, 5),
        (1000, 100, 20),
        (1000, 256, 16),
        (300, 100, 100),
        (300, 256, 60),
    ]:
        depth, few = 20, max(1, networks // 6)
        loop, ours = seconds(
            lambda: plain(width, samples, depth, few),  # noqa: B023
            lambda: sv.simulate(width, depth, networks=networks, samples=samples, seed=0),  # noqa: B023
        )
        per = [1e3 * loop / few / depth, 1e3 * ours / networks / depth]
        method = sv.simulate(width, 0, networks=1, samples=samples, seed=0).attrs["method"]
        print(
            f"N = {width:4} S = {samples}: plain {per[0]:7.3f}  {method:7} {per[1]:7.3f}  "
            f"ratio {per[0] / per[1]:5.1f}"
        )


def factors() -> None:
    print("milliseconds per network to factorize the activations")
    for width, samples in [(3000, 100), (3000, 256), (1000, 100), (1000, 256), (300, 100)]:
        a = torch.relu(torch.randn(5, samples, width))
        collinear = a[:, :1] * (1 + torch.rand(5, samples, 1)) + 1e-6 * a
        times = seconds(
            lambda: gram.factor(a),  # noqa: B023
            lambda: gram._triangular(a),  # noqa: B023
            lambda: gram.factor(collinear),  # noqa: B023
        )
        names = ("Cholesky, checked", "QR", "both, where the check fails")
        print(
            f"N = {width:4} S = {samples}:",
            ", ".join(f"{n} {200 * t:.2f}" for n, t in zip(names, times, strict=True)),
        )


def figure() -> None:
    times = {
        w: sv.simulate(w, 49, networks=100, samples=256, seed=0).attrs["wall_time"] for w in FIGURE
    }
    parts = ", ".join(f"{width}: {seconds:.1f}" for width, seconds in times.items())
    print(f"the paper's figure, 100 networks, 256 inputs: {sum(times.values()):.0f} s ({parts})")


def angles() -> None:
    few = 3
    ours, loop = seconds(
        lambda: sv.simulate_angles(256, 32, angle=0.1, networks=5000, seed=0),
        lambda: plain(256, 2, 32, few),
        repetitions=3,
    )
    print(
        f"angles, 256 units, 32 layers, 5000 networks: {ours:.2f} s; "
        f"with weights {loop / few * 5000:.0f} s from {few} networks"
    )


def memory() -> None:
    """In processes of their own; Linux only, for the high-water mark."""
    status = "(line for line in open('/proc/self/status') if line.startswith('VmHWM'))"
    peak = f"print(next({status}).split()[1])"
    for networks in (0, 5, 50, 200):
        call = (
            f"svlib.simulate(3000, 5, networks={networks}, samples=256, seed=0);"
            if networks
            else ""
        )
        done = subprocess.run(
            [sys.executable, "-c", f"import svlib; {call} {peak}"],
            capture_output=True,
            text=True,
            check=True,
        )
        print(
            f"peak resident size, N = 3000, S = 256, {networks:3} networks: "
            f"{int(done.stdout) // 1024} MiB"
        )


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in sys.argv[1:] or ("speed", "factors", "figure", "angles", "memory"):
        {"speed": speed, "factors": factors, "figure": figure, "angles": angles, "memory": memory}[
            name
        ]()
