"""Batches: which arguments a model gets, how many inputs they hold, and the call itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from svlib import _check
from svlib.probing.models import DEPTH, mapped, tensors

Caller = Callable[[Any, Any], Any]


class Reading(NamedTuple):
    """How batches are to be read, where they do not say it themselves: the number of inputs in
    each, and a function of model and batch that calls the model."""

    inputs: int | None = None
    call: Caller | None = None

    def checked(self) -> Reading:
        call: object = self.call
        if call is not None and not callable(call):
            wanted = "a function of model and batch that returns the output"
            raise TypeError(f"call must be {wanted}, got {type(call).__name__}")
        if self.inputs is not None:
            _check.integer("inputs", self.inputs)
        return self


class Batch(NamedTuple):
    """The arguments of one call of a model, and the number of inputs in them.

    With ``call``, the batch as it came is the only argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int
    call: Caller | None = None

    def tensors(self) -> list[torch.Tensor]:
        return [x for _, x in self._named()]

    def names(self) -> list[str]:
        """Places of the tensors."""
        return [name for name, _ in self._named()]

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        return tensors((self.args, self.kwargs), objects=DEPTH)

    def replaced(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """A copy in which other tensors take the place of these."""
        if self.call is None:
            args, kwargs = mapped(function, (self.args, self.kwargs))
            return self._replace(args=args, kwargs=kwargs)
        # whatever else the batch may be, it is copied with these in place of its tensors
        return self._replace(
            args=copy.deepcopy(self.args, {id(x): function(x) for x in self.tensors()})
        )

    def copied(self, model: nn.Module) -> Batch:
        """A copy on the model's device, because a model may change its arguments."""
        device, _ = _place(model)
        return self.replaced(lambda x: x.detach().to(device, copy=True))

    def run(self, model: nn.Module) -> Any:
        """The model's output.

        Raises:
            TypeError: If torch cannot compute with the types of batch and model.
        """
        try:
            if self.call is not None:
                return self.call(model, *self.args)
            return model(*self.args, **self.kwargs)
        except RuntimeError as error:
            _, dtype = _place(model)
            types = [x.dtype for x in self.tensors() if x.is_floating_point() and x.dtype != dtype]
            if dtype is None or not types or "type" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            got = f"got {types[0]}, and it does not cast them ({reason})"
            raise TypeError(f"batches must be of the model's {dtype}, {got}") from error


def as_batches(model: nn.Module, batches: Any, reading: Reading | None = None) -> Iterator[Batch]:
    """Yield the arguments of each call. See :func:`svlib.probe` for what is accepted.

    Raises:
        TypeError: If ``batches`` is something else, or sparse or nested.
        ValueError: If no tensor has a dimension, the first one of real numbers is not finite, or a
            tuple may as well be several batches.
    """
    reading = (reading or Reading()).checked()
    _place(model)
    if isinstance(batches, torch.Tensor | Mapping | tuple):
        if isinstance(batches, tuple) and reading.call is None:
            _refuse_chunks(model, batches)
        batches = (batches,)
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        if reading.call is None or isinstance(batches, str | bytes):
            wanted = "a tensor or an iterable of tensors, tuples or dicts"
            raise TypeError(f"batches must be {wanted}, got {type(batches).__name__}")
        batches = (batches,)
    for batch in batches:
        yield batch if isinstance(batch, Batch) else _read(model, batch, reading)


def _read(model: nn.Module, batch: Any, reading: Reading) -> Batch:
    if reading.call is not None:
        read = Batch((batch,), {}, 0, reading.call)
    else:
        if reading.inputs is not None and isinstance(batch, list):
            _refuse_chunks(model, batch)
        read = _arguments(model, batch, reading)
    found = read.tensors()
    if reading == Reading():
        _refuse_sparse(found)
    samples = reading.inputs or next((x.size(0) for x in found if x.ndim), 0)
    if not samples and not any(x.ndim for x in found):
        if not found:
            got = f"got {type(batch).__name__} without a tensor"
            raise TypeError(f"inputs must say how many there are in a batch, {got}")
        where = "along their first dimension, got a tensor without dimensions"
        raise ValueError(f"batches must have the inputs {where}")
    plain = (x for x in found if x.is_floating_point() and not x.is_nested)
    if (numbers := next((x for x in plain if x.layout is torch.strided), None)) is not None:
        _check.floating("batches", numbers)  # others may be masks with infinities
    return read._replace(samples=samples)


def _arguments(model: nn.Module, batch: Any, reading: Reading) -> Batch:
    """What of a batch a model takes by position and by name."""
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Mapping):
        batch = batch[0]  # the rest are labels
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    listed: list[Any] = [] if isinstance(batch, Mapping) else [batch]
    if isinstance(batch, tuple | list):
        listed = list(batch)
    read = Batch(tuple(listed[: _positional(model)]), kwargs, 0)
    known = reading.inputs is not None  # then the first argument need not tell
    begins = not read.args or known or isinstance(read.args[0], torch.Tensor)
    if not read.tensors() or not begins:
        wanted = "tensors, tuples that start with one, or dicts of them"
        way = "a function call= of model and batch takes any"
        raise TypeError(f"batches must hold {wanted}, got {type(batch).__name__}: {way}")
    return read


def _refuse_sparse(found: list[torch.Tensor]) -> None:
    """Raise for nested tensors, and for sparse ones where the inputs are counted."""
    for x in found:
        if x.is_nested or (x is found[0] and x.layout is not torch.strided):
            kind = "a nested one" if x.is_nested else f"one of {x.layout}"
            way = "make them dense, by to_dense() or to_padded_tensor(0.0), or in a function call="
            raise TypeError(f"batches must hold dense tensors, got {kind}: {way}")


def _refuse_chunks(model: nn.Module, batch: tuple[Any, ...] | list[Any]) -> None:
    """Raise if items that the model does not take may be further batches."""
    first, surplus = batch[:1], batch[_positional(model) or len(batch) :]
    for x in surplus:
        if not isinstance(x, torch.Tensor) or not isinstance(first[0], torch.Tensor):
            continue
        if (
            x.is_floating_point()
            and x.dtype == first[0].dtype
            and x.shape[1:] == first[0].shape[1:]
        ):
            kind = type(batch).__name__
            text = f"batches must say what a {kind} of {len(batch)} tensors alike is, "
            text += "of which the model takes fewer: give list(batches) for several batches, "
            text += "[batch] for one with labels, [(items,)] for one list as the argument"
            raise ValueError(text)


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Device of a model and floating type of its weights, ``None`` if it has none."""
    everything = [*model.parameters(), *model.buffers()]
    if any(map(nn.parameter.is_lazy, everything)):
        got = "got lazy ones: run a batch through it first"
        raise ValueError(f"model must have all its parameters, {got}")
    if any(x.is_meta for x in everything):
        raise ValueError("model must hold numbers, got parameters or buffers on the meta device")
    held = [x for x in everything if x.is_floating_point()]
    return (held[0].device, held[0].dtype) if held else (torch.device("cpu"), None)


def _positional(model: nn.Module) -> int | None:
    """How many arguments ``forward`` requires by position, at least 1: the rest of a tuple are
    labels. ``None``, all of them, if it takes any number."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, sum(p.default is p.empty for p in positional))
