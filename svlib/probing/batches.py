"""Batches: which arguments a model gets, how many inputs they hold, and the call itself."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from svlib import _check
from svlib.probing.models import DEPTH, Dimensions, MaskError, mapped, tensors

Caller = Callable[[Any, Any], Any]
Masker = str | Callable[[Any], torch.Tensor]


class Reading(NamedTuple):
    """How batches are to be read, where they do not say it themselves: the number of inputs in
    each, a function of model and batch that calls the model, and what says which positions count
    (a key of the batch or a function of it)."""

    inputs: int | None = None
    call: Caller | None = None
    mask: Masker | None = None

    def checked(self) -> Reading:
        call: object = self.call
        if call is not None and not callable(call):
            wanted = "a function of model and batch that returns the output"
            raise TypeError(f"call must be {wanted}, got {type(call).__name__}")
        if self.inputs is not None:
            _check.integer("inputs", self.inputs)
        mask: object = self.mask
        if not (mask is None or isinstance(mask, str) or callable(mask)):
            wanted = "a key of the batch or a function of it"
            raise TypeError(f"mask must be {wanted}, got {type(mask).__name__}")
        return self

    def mask_of(self, batch: Any, samples: int) -> torch.Tensor | None:
        """Which positions of which inputs of a batch count, (inputs, *positions)."""
        if self.mask is None:
            return None
        if callable(self.mask):
            found = self.mask(batch)
        else:
            batch = batch[0] if isinstance(batch, tuple | list) and batch else batch
            if not isinstance(batch, Mapping) or self.mask not in batch:
                keys = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
                raise ValueError(f"mask must be a key of the batch, got {self.mask!r} for {keys}")
            found = batch[self.mask]
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        if not isinstance(shape, tuple) or shape[:1] != (samples,):
            wanted = f"a tensor (inputs, *positions) of {samples} inputs"
            raise ValueError(f"mask must give {wanted}, got {shape}")
        return found != 0


class Batch(NamedTuple):
    """The arguments of one call of a model, and the number of inputs in them.

    With ``call``, the batch as it came is the only argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    samples: int
    call: Caller | None = None
    mask: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        return [x for _, x in self._named()]

    def names(self) -> list[str]:
        """Places of the tensors."""
        return [name for name, _ in self._named()]

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        return tensors((self.args, self.kwargs), objects=DEPTH)

    def replaced(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """A copy in which other tensors take the place of these; all else is copied too, as far as
        it can be."""
        held = self.tensors()
        memo: dict[int, Any] = {id(x): function(x) for x in held}
        try:
            args, kwargs = copy.deepcopy((self.args, self.kwargs), memo)
        except Exception:
            if self.call is not None:
                raise
            args, kwargs = mapped(lambda x: memo[id(x)], (self.args, self.kwargs))
        return self._replace(args=args, kwargs=kwargs)

    def copied(self, model: nn.Module) -> Batch:
        """A copy on the model's device, because a model may change its arguments."""
        device, _ = _place(model)
        return self.replaced(lambda x: x.detach().to(device, copy=True))

    def cut(self, inputs: int | Sequence[int]) -> Batch | None:
        """So many of the inputs, or those of these numbers, from the beginning again where there
        are fewer; ``None`` if no part of the batch holds one input after another."""
        parts = [0]
        numbers = range(inputs) if isinstance(inputs, int) else inputs
        index = torch.tensor(list(numbers)) % self.samples

        def cut(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                dim = _dim_of_inputs(value, self.samples)
                if dim is None:
                    return value.detach().clone()
                parts[0] += 1
                return value.detach().index_select(dim, index.to(value.device))
            return [value[at] for at in index.tolist()]

        memo = {id(x): cut(x) for x in self.tensors()}
        if not parts[0]:  # of a list of images, for example
            for value in (*self.args, *self.kwargs.values()):
                lists = [value, *(value if isinstance(value, list | tuple) else ())]
                for x in (x for x in lists if isinstance(x, list) and len(x) == self.samples):
                    memo[id(x)] = cut(x)
                    parts[0] += 1
        if not parts[0]:
            return None
        args, kwargs = copy.deepcopy((self.args, self.kwargs), memo)
        mask = None if self.mask is None else self.mask[index.to(self.mask.device)]
        return self._replace(args=args, kwargs=kwargs, samples=len(index), mask=mask)

    def run(self, model: nn.Module) -> Any:
        """The model's output.

        Raises:
            TypeError: If torch cannot compute with the types of batch and model, or the model takes
                other arguments.
        """
        try:
            if self.call is not None:
                return self.call(model, *self.args)
            return model(*self.args, **self.kwargs)
        except TypeError as error:
            words = ("unexpected keyword argument", "positional argument", "required")
            if self.call is not None or not any(x in str(error) for x in words):
                raise
            way = "call=lambda model, batch: ... says how the model is called"
            raise TypeError(f"batches must have the model's arguments, {error}: {way}") from error
        except RuntimeError as error:
            _, dtype = _place(model)
            types = [x.dtype for x in self.tensors() if x.is_floating_point() and x.dtype != dtype]
            if dtype is None or not types or "type" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            got = f"got {types[0]}, and it does not cast them ({reason})"
            raise TypeError(f"batches must be of the model's {dtype}, {got}") from error
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in self.tensors()[:5])
            error.add_note(f"the model was called with tensors of {shapes}; inputs= and call= say "
                           f"how a batch is to be read")  # fmt: skip
            raise


def _dim_of_inputs(x: torch.Tensor, samples: int) -> int | None:
    """Where an argument holds the inputs: first, or in the one dimension of their number."""
    if not x.ndim or x.is_nested or x.layout is not torch.strided:
        return None
    if len(x) == samples:
        return 0
    return x.shape.index(samples) if x.ndim > 2 and x.shape.count(samples) == 1 else None


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
            way = "a function call= of model and batch takes any batch"
            raise TypeError(f"batches must be {wanted}, got {type(batches).__name__}: {way}")
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
    if reading._replace(mask=None) == Reading():
        _refuse_sparse(found)
    samples = reading.inputs or next((x.size(0) for x in found if x.ndim), 0)
    if not samples and not any(x.ndim for x in found):
        if not found:
            got = f"none of its parts is a tensor (got {type(batch).__name__})"
            raise TypeError(f"give inputs=, the number of inputs in a batch: {got}")
        where = "along their first dimension, got a tensor without dimensions"
        raise ValueError(f"batches must have the inputs {where}")
    plain = (x for x in found if x.is_floating_point() and not x.is_nested)
    if (numbers := next((x for x in plain if x.layout is torch.strided), None)) is not None:
        _check.floating("batches", numbers)  # others may be masks with infinities
    return read._replace(samples=samples, mask=reading.mask_of(batch, samples))


def _arguments(model: nn.Module, batch: Any, reading: Reading) -> Batch:
    """What of a batch a model takes by position and by name."""
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Mapping):
        batch = batch[0]  # the rest are labels
    named = isinstance(batch, Mapping) and not _takes_whole(model, batch)
    listed = list(batch) if isinstance(batch, tuple | list) else [] if named else [batch]
    read = Batch(tuple(listed[: _positional(model)]), dict(batch) if named else {}, 0)
    known = reading.inputs is not None  # then the first argument need not tell
    begins = not read.args or known or isinstance(read.args[0], torch.Tensor | Mapping)
    if not read.tensors() or not begins:
        wanted = "tensors, tuples that start with one, or dicts of them"
        way = "inputs= says how many inputs a list holds, and a function call= of model and batch "
        way += "takes any batch"
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


def counted(
    y: torch.Tensor, dims: Dimensions, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An output without the inputs that a mask leaves out, and the mask of its positions, if it has
    any.

    Raises:
        MergedInputsError: If its positions are not those of the mask.
    """
    if mask is None:
        return y, None
    mask = mask.to(y.device)
    held = mask.flatten(1).any(1) if mask.ndim > 1 else mask
    positions = tuple(y.shape[dim] for dim in dims[2])
    if mask.ndim > 1 and positions and positions != mask.shape[1:]:
        got = f"got {positions}"
        raise MaskError(f"mask has positions {tuple(mask.shape[1:])}, an output has others, {got}")
    y = y.index_select(dims[0], held.nonzero()[:, 0])
    return y, mask[held] if mask.ndim > 1 and positions else None


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


def _signature(model: nn.Module) -> inspect.Signature:
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return inspect.signature(model.forward)


def _takes_whole(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a dictionary is the argument, and does not hold the arguments by name."""
    try:
        signature = _signature(model)
    except (TypeError, ValueError):
        return False
    for whole, given in ((False, ((), dict(batch))), (True, ((batch,), {}))):
        try:
            signature.bind(*given[0], **given[1])
        except TypeError:
            continue
        return whole
    return False


def _positional(model: nn.Module) -> int | None:
    """How many arguments ``forward`` requires by position, at least 1: the rest of a tuple are
    labels. ``None``, all of them, if it takes any number."""
    parameters = _signature(model).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, sum(p.default is p.empty for p in positional))
