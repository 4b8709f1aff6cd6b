"""Streams of random numbers: one for each use of a seed, so that no two uses share numbers."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from svlib import _check


def stream(
    seed: int, purpose: str, index: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator for (seed, purpose, index), independent of those for other triples.

    Torch's generator on the CPU keeps 32 bits of its seed: of 10,000 streams two are equal with a
    probability of 1 %.
    """
    entropy = [_check.integer("seed", seed, 0), zlib.crc32(purpose.encode()), index]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def fill_normal(out: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
    """Fill ``out`` (generators, ...) with standard normal numbers, each slot by its generator."""

    def fill(part: slice) -> None:
        for slot, generator in zip(out[part], generators[part], strict=True):
            slot.normal_(generator=generator)

    threads = torch.get_num_threads() if out.device.type == "cpu" and out.numel() > 2**18 else 1
    if threads == 1:
        fill(slice(None))
    else:  # torch itself fills a tensor with one thread only
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, [slice(first, None, threads) for first in range(threads)]))
    return out
