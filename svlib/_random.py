"""Streams of random numbers: one for every use of a seed, so that no two uses share their numbers."""

from __future__ import annotations

import zlib

import numpy as np
import torch

from svlib import _check


def stream(seed: int, purpose: str, index: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for (seed, purpose, index), independent of those for any other triple."""
    entropy = [_check.integer("seed", seed, 0), zlib.crc32(purpose.encode()), index]
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)
