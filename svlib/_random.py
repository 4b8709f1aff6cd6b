"""Streams of random numbers: one for each use of a seed, so that no two uses share numbers."""

from __future__ import annotations

import zlib

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
    state = _sequence(seed, purpose, index).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


def _sequence(seed: int, purpose: str, *index: int) -> np.random.SeedSequence:
    entropy = [_check.integer("seed", seed, 0), zlib.crc32(purpose.encode()), *index]
    return np.random.SeedSequence(entropy)


class Normals:
    """Streams of standard normal numbers, one for each index of (seed, purpose).

    On the CPU the numbers are functions of seed, purpose, index and place (``svlib._kernels``): no
    stream has to be set up, and none can equal another; those of one seed in float32 and in float64
    share words, so that they are neither equal nor independent. Elsewhere they are torch's.
    """

    def __init__(self, seed: int, purpose: str, indices: range, device: torch.device | str) -> None:
        self.indices, self._place, self._generators = indices, 0, list[torch.Generator]()
        if torch.device(device).type == "cpu":
            self._key = tuple(_sequence(seed, purpose).generate_state(4))
        else:
            self._generators = [stream(seed, purpose, index, device) for index in indices]

    def fill(self, out: torch.Tensor) -> torch.Tensor:
        """Fill ``out`` (indices, ...), contiguous, each slot with the next of its stream."""
        if len(out) != len(self.indices):
            raise ValueError(f"out must have {len(self.indices)} slots, got {len(out)}")
        if not self._generators:
            self._compiled(out.view(len(out), -1).numpy())
        else:
            for slot, generator in zip(out, self._generators, strict=True):
                slot.normal_(generator=generator)
        return out

    def _compiled(self, out: np.ndarray) -> None:
        from svlib import _kernels  # takes half a second to import, and seconds where it is new

        count = out.shape[1]
        padded = out if count % 4 == 0 else np.empty((len(out), count + -count % 4), out.dtype)
        single = out.dtype == np.float32
        used = padded.shape[1] // (4 if single else 2)
        if self._place % 2**32 + used > 2**32:  # the counter's lower word must not overflow
            self._place += -self._place % 2**32
        fill = _kernels.fill_single if single else _kernels.fill_double
        fill(padded, self._key, self.indices.start, self._place)
        self._place += used
        if padded is not out:
            out[:] = padded[:, :count]
