"""Along which dimension of a tensor the inputs of a batch lie, followed from function to function.

Sizes alone do not tell where a sequence is as long as the batch. Where they do not, a function is
asked: it runs on tensors without entries, of one input more, and the dimension that grows is the
one. A reshape keeps the number of entries behind the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from svlib.probing.models import Dimensions, dimensions, mapped, named_modules
from svlib.probing.operations import RESHAPES

# of outputs with the shape of their input, those of these have other dimensions
_TURNS = frozenset({"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t"})
_TURNS |= {"adjoint", "get", "einsum", "matmul", "rmatmul", "mm", "bmm", "baddbmm", "tensordot"}
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


class _Place(NamedTuple):
    """The inputs lie in this dimension, merged with others unless ``inner`` is 1: so many entries
    follow each other that belong to one input."""

    dim: int
    inner: int = 1


_FIRST, _LOST = _Place(0), _Place(-1)
# of tensors of indices, which may mix what belongs to different inputs
_PICKS = frozenset({"get", "getitem", "index_select", "gather", "take_along_dim"})


class Placed(NamedTuple):
    """An output with its inputs in a dimension of their own, its dimensions as
    :func:`svlib.decompose` takes them, and its unit dimension before."""

    y: torch.Tensor
    dims: Dimensions
    unit: int


class Axes(TorchFunctionMode):
    """Follow the inputs of a batch through a forward pass, while active as a context manager."""

    def __init__(self, inputs: Iterable[torch.Tensor], samples: int) -> None:
        super().__init__()
        self._samples = samples
        self._places: Any = WeakTensorKeyDictionary()
        for x in inputs:
            if x.layout is torch.strided and not x.is_nested and samples > 1:
                only = x.ndim > 2 and x.shape.count(samples) == 1  # (time, batch, features)
                if x.ndim and (len(x) == samples or only):
                    self._places[x] = _Place(x.shape.index(samples))

    def of(self, y: torch.Tensor) -> int | None:
        """The dimension of the inputs: the first, unless it is known to be another; ``None`` if
        it cannot be told."""
        place = self._places.get(y, _FIRST)
        if place != _LOST and place.inner == 1 and y.shape[place.dim] == self._samples:
            return int(place.dim)
        elsewhere = place != _LOST and place.dim > 0
        doubtful = y.shape.count(self._samples) > 1 or elsewhere
        return None if doubtful and y.shape[:1] == (self._samples,) else 0

    def is_first(self, y: torch.Tensor) -> bool:
        """Whether inputs were followed to the first dimension of this tensor."""
        return y in self._places and self.of(y) == 0

    def merges(self, y: torch.Tensor) -> bool:
        """Whether the inputs lie in one dimension with others, in a known order."""
        place = self._places.get(y, _LOST)
        size = 0 if place == _LOST else y.shape[place.dim]
        return self._samples < size and size % (place.inner * self._samples) == 0

    def apart(self, name: str, module: nn.Module | None, y: torch.Tensor, unit: Any) -> Placed:
        """An output as it can be decomposed; arguments and errors as those of
        :func:`svlib.probing.models.dimensions`."""
        if not self.merges(y):
            dims = dimensions(name, module, y, self._samples, unit, self.of(y))
            return Placed(y, dims, dims[1])
        place = self._places[y]
        size = y.shape[place.dim]
        axis, unit, positions = dimensions(name, module, y, size, unit, place.dim)
        outer = size // (place.inner * self._samples)
        sizes = [x for x in (outer, self._samples, place.inner) if x > 1]
        here = axis + (outer > 1)
        added = [dim for dim in range(axis, axis + len(sizes)) if dim != here]
        later = [dim + (len(sizes) - 1) * (dim > axis) for dim in (unit, *positions)]
        dims = here, later[0], (*added, *later[1:])
        return Placed(y.reshape(*y.shape[:axis], *sizes, *y.shape[axis + 1 :]), dims, unit)

    def replace(self, y: torch.Tensor, new: torch.Tensor) -> None:
        """Say that a tensor takes the place of another."""
        if y in self._places:
            self._places[new] = self._places[y]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            made = [output]
        elif isinstance(output, tuple | list):
            made = [y for y in output if isinstance(y, torch.Tensor)]
        else:
            return output
        if made:
            with torch._C.DisableTorchFunction():  # other modes must not see what follows
                given = [x for x in _given(args, kwargs) if x in self._places]
                places = self._after(function, args, kwargs, given, made) if given else ()
                self._places.update(zip(made, places, strict=False))
        return output

    def _after(
        self,
        function: Any,
        args: Any,
        kwargs: Any,
        given: list[torch.Tensor],
        made: list[torch.Tensor],
    ) -> list[_Place]:
        """Places of what a function made from what is followed."""
        followed = [x for x in given if self._places[x] != _LOST]
        if not followed:
            return [_LOST] * len(made)
        if all(self._is_plain(x) and self._places[x] == _FIRST for x in followed) and all(
            map(self._is_plain, made)
        ):
            return [_FIRST] * len(made)
        name = getattr(function, "__name__", "").strip("_")
        x = followed[0]
        place = self._places[x]
        if name in _PICKS and self.merges(x) and any(map(_is_index, (*args, *kwargs.values()))):
            return [_LOST] * len(made)
        if name in RESHAPES and made[0].numel() == x.numel():
            return [_reshaped(x, place, made[0], self._samples)]
        alike = next((x for x in followed if x.shape == made[0].shape), None)
        if len(made) == 1 and alike is not None and name not in _TURNS:
            return [self._places[alike]]
        if name in _RECURRENT:  # the states are (layers, batch, features) whatever the sequence is
            return [place, *[_Place(1) if x.ndim == 3 else _LOST] * (len(made) - 1)]
        grown = _of_one_more(function, args, kwargs, self._places, self._samples)
        if grown is None or len(grown) != len(made):
            return [_likely(x, place, y, self._samples) for y in made]
        pairs = zip(made, grown, strict=True)
        return [_grown(x, place, y, shape, self._samples) for y, shape in pairs]

    def _is_plain(self, x: torch.Tensor) -> bool:
        """Whether sizes alone tell that the inputs are first."""
        return x.shape[:1] == (self._samples,) and x.shape.count(self._samples) == 1


def _of_one_more(
    function: Any, args: Any, kwargs: Any, places: Any, samples: int
) -> list[torch.Size] | None:
    """Shapes of a function's outputs for one input more, if they can be had."""

    def enlarged(x: torch.Tensor) -> torch.Tensor:
        place, shape = places.get(x, _LOST), list(x.shape)
        if place != _LOST:
            shape[place.dim] += shape[place.dim] // samples
        return torch.empty(shape, dtype=x.dtype, device="meta")

    try:
        with torch.no_grad():
            output = function(*mapped(enlarged, tuple(args)), **mapped(enlarged, kwargs))
    except Exception:  # sizes written out, entries looked at: then what is likely has to do
        return None
    outputs = [output] if isinstance(output, torch.Tensor) else output
    return [y.shape for y in outputs if isinstance(y, torch.Tensor)]


def _is_index(value: Any) -> bool:
    items = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(x, torch.Tensor) and not x.is_floating_point() for x in items)


def _reshaped(x: torch.Tensor, place: _Place, y: torch.Tensor, samples: int) -> _Place:
    behind = place.inner * math.prod(x.shape[place.dim + 1 :])
    tail = 1  # entries behind a dimension of y
    for dim in reversed(range(y.ndim)):
        size = y.shape[dim]
        if tail <= behind < tail * size:
            inner, rest = divmod(behind, tail)
            whole = rest == 0 and size % (inner * samples) == 0
            return _Place(dim, inner) if whole else _LOST
        tail *= size
    return _LOST


def _grown(
    x: torch.Tensor, place: _Place, y: torch.Tensor, shape: torch.Size, samples: int
) -> _Place:
    """Where the inputs are in y, which has this shape with one more."""
    if len(shape) != y.ndim:
        return _LOST
    dims = [dim for dim in range(y.ndim) if shape[dim] != y.shape[dim]]
    if not dims or (len(dims) > 1 and place.dim not in dims):
        return _LOST
    dim = dims[0] if len(dims) == 1 else place.dim
    if y.shape[dim] == samples:
        return _Place(dim)
    return _Place(dim, place.inner) if y.shape[dim] == x.shape[place.dim] else _LOST


def _likely(x: torch.Tensor, place: _Place, y: torch.Tensor, samples: int) -> _Place:
    if y.ndim == x.ndim and y.shape[place.dim] == x.shape[place.dim]:
        return place
    return _FIRST if place == _FIRST and y.shape[:1] == (samples,) else _LOST


def _given(args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments and in lists among them."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple | list):
            yield from (item for item in x if isinstance(item, torch.Tensor))


@contextmanager
def watching_sequences(model: nn.Module, axes: Axes, found: dict[str, None]) -> Iterator[None]:
    """Collect names of recurrent and attention modules that run over the inputs of the batch."""

    def before(name: str, module: Any, given: Any) -> None:
        x = given[0] if given else None
        with torch._C.DisableTorchFunction():
            if isinstance(x, torch.Tensor) and (x.ndim == 2 or not module.batch_first):
                found.update({name: None} if axes.is_first(x) else {})

    with ExitStack() as stack:
        for name, module in named_modules(model):
            if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
                hook = module.register_forward_pre_hook(partial(before, name))
                stack.callback(hook.remove)
        yield
