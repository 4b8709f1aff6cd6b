"""Along which dimension of an output the inputs of a batch lie, by two small passes.

Sizes alone do not tell where a sequence is as long as the batch. So the model runs on 3 and on 2
inputs, in evaluation mode: the dimension of an output that differs is that of the inputs, and a
third of its size says how many positions are merged with them. The values tell in which order, and
whether the output of an input depends on the other inputs of its batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from svlib.probing.batches import Batch, Reading, as_batches
from svlib.probing.models import LostInputsError, has_numbers, named_modules, structural_copy
from svlib.probing.passes import Key, Output, Watch

_MANY, _FEW = (0, 1, 2), (2, 1)  # the inputs; in another order, or what sorts would not show
_ENTRIES = 2**14  # of an output that are compared of one input, by dimension
_TOLERANCE = 0.03  # of rounding, and of what dynamic quantization makes of other inputs
# functions that move entries and compute none
PICKS = frozenset({"get", "getitem", "index_select", "gather", "take_along_dim", "roll", "flip"})
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"})
TURNS = frozenset({"transpose", "swapaxes", "permute", "movedim", "moveaxis", "t"})
MOVES = PICKS | RESHAPES | TURNS | {"contiguous", "clone", "split", "chunk", "unbind", "topk"}
MOVES |= {"cat", "stack", "sort", "index", "masked_select", "expand", "detach", "swapdims"}


class Place(NamedTuple):
    """The inputs lie in this dimension, merged with ``outer`` positions before them (-1: with all
    of the dimension's) and the rest behind them."""

    dim: int
    outer: int = 1


class Guess(NamedTuple):
    """The place of the inputs in an output of this shape, as its sizes suggest."""

    key: Key
    shape: torch.Size
    place: Place | None


class _Digest(NamedTuple):
    """An output's shape, and for each dimension that may hold the inputs a weighted sum over some
    entries along the others and its size, by which two passes are compared without keeping them."""

    shape: torch.Size
    sums: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    tolerance: float
    function: str


def _digest(made: Output, inputs: int) -> _Digest:
    y, sums = made.y.detach(), {}
    if y.is_floating_point() and y.ndim and y.numel() and y.layout is torch.strided:
        for dim, size in enumerate(y.shape):
            if size % inputs == 0:
                z = _some(y, dim, size // inputs).movedim(dim, 0).reshape(size, -1).double()
                z = z.nan_to_num(0.0, 0.0, 0.0)
                weights = _weights(z.shape[1]).to(y.device)
                sums[dim] = z @ weights, (z.square() @ weights.square()).sqrt()
    tolerance = 3 * _TOLERANCE if y.dtype == torch.bfloat16 else _TOLERANCE
    return _Digest(y.shape, sums, tolerance, made.function)


@cache
def _weights(n: int) -> torch.Tensor:
    return torch.arange(1, n + 1).double().cos()


def _some(y: torch.Tensor, dim: int, merged: int) -> torch.Tensor:
    """A view of some entries for each along a dimension, the same of any number of inputs."""
    others = sorted((other for other in range(y.ndim) if other != dim), key=y.size)
    left = max(16.0, _ENTRIES / merged)
    for rest, other in zip(range(len(others), 0, -1), others, strict=True):
        step = math.ceil(y.size(other) / max(2.0, left ** (1 / rest)))
        y = y[(slice(None),) * other + (slice(None, None, step),)]
        left /= y.size(other)
    return y


class Places:
    """Where the inputs lie in the outputs of a model's forward pass.

    Attributes:
        mixing: Name of the module or function whose output for one input is the first that depends
            on the other inputs of the batch; empty if there is none. Evaluation mode: BatchNorm
            does not count.
        shuffled: Whether it moved entries, so that what follows does not keep the inputs apart.
    """

    def __init__(
        self, many: Mapping[Key, _Digest], few: Mapping[Key, _Digest], random: frozenset[Key]
    ) -> None:
        self._places: dict[Key, Place | None] = {}
        mixed = []
        for key in many.keys() & few.keys():
            place, apart = _compared(many[key], few[key])
            self._places[key] = place
            if not apart and key not in random:
                mixed.append(key)
        order = {key: number for number, key in enumerate(many)}
        self._mixed = frozenset(mixed)
        first = min(mixed, key=order.__getitem__, default=None)
        own = [key for key in self._places if key[0] == "" and len(key) == 3]
        ends = any(key in self._mixed for key in own) or not own  # experts come apart again
        self.mixing = _told(first) if first is not None and ends else ""
        self.shuffled = first is not None and many[first].function in MOVES

    @classmethod
    def find(
        cls, model: nn.Module, batch: Batch, modules: Mapping[str, nn.Module] | None
    ) -> Places | None:
        """By passes of 3 and of 2 inputs, ``None`` if a batch cannot be cut so.

        ``modules`` are watched alone; ``None`` watches functions too.
        """
        many = _run(model, batch, _MANY, modules)
        few = None if many is None else _run(model, batch, _FEW, modules)
        if many is None or few is None:
            return None
        found = cls(many, few, frozenset())
        if not found._mixed:
            return found
        if modules is not None:  # where it is mixed, functions tell
            return cls.find(model, batch, None)
        again = _run(model, batch, _MANY, modules, seed=1) or {}
        random = {key for key in many.keys() & again.keys() if not _alike(many[key], again[key])}
        return cls(many, few, frozenset(random))

    def leads(self) -> bool:
        """Whether the inputs lie first in an output of the model."""
        own = [place for key, place in self._places.items() if key[0] == "" and len(key) == 3]
        return any(place is not None and place.dim == 0 for place in own)

    def agree(self, guesses: Iterable[Guess], samples: int) -> bool:
        """Whether all guesses are right."""
        try:
            return all(self.of(x.key, x.shape, samples) == x.place for x in guesses)
        except LostInputsError:
            return False

    def of(self, key: Key, shape: torch.Size, samples: int) -> Place | None:
        """The place of the inputs in an output, ``None`` if its size does not depend on them.

        Raises:
            LostInputsError: If it cannot be told.
        """
        lost = self.shuffled and key in self._mixed
        if key not in self._places and not lost:
            return Place(0) if shape[:1] == (samples,) else None
        place = None if lost else self._places[key]
        if lost or (place is not None and shape[place.dim] % samples):
            text = f"must show which dimension is that of the {samples} inputs, got {tuple(shape)}"
            raise LostInputsError(text)
        return place


def read_batches(model: nn.Module, batches: Any, reading: Reading | None = None) -> Iterator[Batch]:
    """The batches of :func:`as_batches`; where their tensors have different first dimensions, the
    inputs are those along which the model's output has its first."""
    chosen: int | None = None
    told = reading is not None and (reading.inputs or reading.call)
    for batch in as_batches(model, batches, reading):
        plain = [x for x in batch.tensors() if not x.is_nested]
        sizes = [x.size(0) if x.ndim else 0 for x in plain]
        if not told and len({size for size in sizes if size > 1}) > 1:
            if chosen is None:
                chosen = leading(model, batch, sizes)
            if chosen < len(sizes):
                batch = batch._replace(samples=sizes[chosen])
        yield batch


def leading(model: nn.Module, batch: Batch, sizes: list[int]) -> int:
    """Which tensor's first dimension is that of the inputs: the first, if none tells."""
    tried = [size for size in dict.fromkeys(sizes) if size > 1]
    for size in tried:
        found = Places.find(model, batch._replace(samples=size), {"": model})
        if found is not None and found.leads():
            return sizes.index(size)
    return sizes.index(batch.samples) if batch.samples in sizes else 0


def _told(key: Key) -> str:
    return f"{key[0]}/{key[2]}".lstrip("/") if len(key) == 5 else str(key[0])


def _compared(many: _Digest, few: _Digest) -> tuple[Place | None, bool]:
    """The place of the inputs, and whether an input's output is the same in both passes."""
    if len(many.shape) != len(few.shape):
        return None, True
    dims = [dim for dim in range(len(many.shape)) if many.shape[dim] != few.shape[dim]]
    if len(dims) != 1 or many.shape[dims[0]] * 2 != few.shape[dims[0]] * 3:
        return None, True
    (dim,) = dims
    if dim not in many.sums or dim not in few.sums:
        return Place(dim), True
    merged = many.shape[dim] // 3
    (a, size), (b, _) = many.sums[dim], few.sums[dim]
    for outer in (n for n in range(1, merged + 1) if merged % n == 0):
        new, largest = (x.reshape(outer, 3, -1)[:, list(_FEW)] for x in (a, size))
        old = b.reshape(outer, 2, -1)
        if bool(((new - old).abs() <= many.tolerance * largest + 1e-30).all()):
            return Place(dim, -1 if outer == merged > 1 else outer), True
    return Place(dim), False


def _is_torchs(hook: Any) -> bool:
    return str(getattr(hook, "__module__", type(hook).__module__)).startswith("torch.")


def _alike(a: _Digest, b: _Digest) -> bool:
    """Whether two passes of the same inputs agree."""
    if a.shape != b.shape:
        return False
    pairs = ((a.sums[dim], b.sums[dim]) for dim in a.sums)
    return all(
        bool(((x - y).abs() <= 0.1 * a.tolerance * s + 1e-30).all()) for (x, s), (y, _) in pairs
    )


def _run(
    model: nn.Module,
    batch: Batch,
    inputs: tuple[int, ...],
    modules: Mapping[str, nn.Module] | None,
    seed: int | None = None,
) -> dict[Key, _Digest] | None:
    """Digests of all outputs for so many inputs; ``None`` if the batch cannot be cut."""
    digests: dict[Key, _Digest] = {}

    def note(made: Output) -> None:
        if has_numbers(made.y):
            digests[made.key] = _digest(made, len(inputs))

    with warnings.catch_warnings(action="ignore"), structural_copy(model) as copied:
        cut = batch.cut(inputs)
        if cut is None or {*map(id, copied.modules())} & {*map(id, model.modules())}:
            return None
        copied.eval()
        for module in copied.modules():  # of the user, for example to log; torch's make weights
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [k for k, hook in hooks.items() if not _is_torchs(hook)]:
                    del hooks[key]
        if seed is not None:
            torch.manual_seed(seed)
        named: Any = modules
        if modules is not None:
            named = {k: m for k, m in named_modules(copied) if k in modules}
        try:
            with Watch(copied, note, named).watching():
                cut.run(copied)
        except Exception:  # the batch is no set of inputs that may be fewer
            return None
    return digests
