"""Measure a model inside a training loop, on the batches that it trains on."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from svlib import _check
from svlib.probing.batches import Batch, Reading
from svlib.probing.forward import Pass, watched
from svlib.probing.models import weighted_layers
from svlib.probing.passes import Watch
from svlib.probing.places import Places, leading
from svlib.probing.rows import Layers, Rows
from svlib.probing.trace import Trace

_ONE, _NONE = "steps with one input", "steps with no tensor with a dimension"
_NOT_CALLED = "the model itself was not called: call it as model(...), or give Probe the compiled "
_NOT_CALLED += "one that you call"
Log = Callable[[int, dict[str, float]], Any]


def _is_traced() -> bool:
    traced: bool = torch._C._get_tracing_state() is not None
    return traced or torch.compiler.is_compiling()


class _Hook:
    """A hook that copies and saved files of the model do not carry on, nor compilers trace."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *given: Any) -> None:
        if not _is_traced():
            self._function(*given)

    def __reduce__(self) -> Any:
        # of the standard library, so that a saved model does not need svlib: takes anything and
        # does nothing
        return getattr, (nullcontext(), "__exit__")


class _Watch(Watch):
    """Goes on whatever happens to a measurement."""

    failed: Callable[[Exception], Any]

    def _before(self, *given: Any) -> None:
        if not _is_traced():
            super()._before(*given)

    def _after(self, *given: Any) -> None:
        if not _is_traced():
            try:
                super()._after(*given)
            except Exception as error:
                self.failed(error)


class Probe:
    """Probe a model inside a training loop, every few steps, on the batches that it trains on.

    A step is a call of the model with gradients on; calls under ``no_grad`` (evaluation) are not
    counted. A step that is measured runs uncompiled, and goes on whatever happens to its
    measurement; what has no numbers, under ``torch.func`` or a compiler, has no row.

    Args:
        model: The module that the loop calls, compiled or not.
        every: Measure steps 0, ``every``, 2 ``every``...
        layers, positions, inputs, maximum: As in :func:`probe`.
        log: Called with the number of a measured step and its values by "fraction/hidden.0" etc.

    Raises:
        TypeError: If ``log`` cannot be called.
        ValueError: If ``layers`` is None and there is no weighted layer.

    Warns:
        UserWarning: If outputs have no row, ``log`` fails, or nothing was measured.

    Examples:
        >>> model = nn.Linear(8, 4)
        >>> with Probe(model, every=10) as probe:
        ...     outputs = [model(torch.eye(8)) for _ in range(21)]
        >>> probe.table.step.tolist(), probe.table.samples.tolist()
        ([0, 10, 20], [8, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        layers: Layers = None,
        positions: str = "samples",
        inputs: int | None = None,
        maximum: bool = False,
        log: Log | None = None,
    ) -> None:
        self._every = _check.integer("every", every)
        listed = isinstance(layers, Iterable) and not isinstance(layers, str)
        self._layers = list(layers) if listed and layers is not None else layers
        self._rows = partial(Rows, self._layers, positions, maximum=maximum)
        self._rows()  # raises now if an argument is wrong
        if self._layers is None or not isinstance(model, nn.Module):
            weighted_layers(model)
        self._reading = Reading(inputs).checked()
        if not (log is None or callable(log)):
            raise TypeError(f"log must be a function of step and values, got {type(log).__name__}")
        self._model, self._steps, self._log, self._frames = model, 0, log, list[pd.DataFrame]()
        self._missed: Counter[str] = Counter()  # why steps were not measured
        self._places: Places | None = None
        self._leading: int | None = None
        self._hooks, self._measuring = ExitStack(), ExitStack()

    def __enter__(self) -> Probe:
        before = _Hook(self._before)
        self._hooks.callback(self._model.register_forward_pre_hook(before, with_kwargs=True).remove)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._measuring.close()  # open still where the forward pass was interrupted
        self._hooks.close()
        if kind is None and not self._frames:
            why = ", ".join(f"{reason} ({count})" for reason, count in self._missed.items())
            warnings.warn(f"Probe measured nothing: {why or _NOT_CALLED}", stacklevel=2)

    @property
    def table(self) -> pd.DataFrame:
        """The rows of :func:`probe` for every step that was measured, with its number in front as
        ``step``."""
        return pd.concat(self._frames, ignore_index=True) if self._frames else pd.DataFrame()

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._measuring.close()
        if not torch.is_grad_enabled():
            self._missed["calls under no_grad, which are not steps"] += 1
            return
        step, self._steps = self._steps, self._steps + 1
        if step % self._every:
            return
        try:
            self._watch(model, step, args, kwargs)
        except Exception as error:  # a step goes on
            self._measuring.close()
            self._missed[_failed("measure", step, error)] += 1

    def _watch(self, model: nn.Module, step: int, args: Any, kwargs: Any) -> None:
        batch = Batch(args, kwargs, self._reading.inputs or 0)
        if not batch.samples:
            batch, self._leading = _counted(model, batch, self._leading)
        if batch.samples < 2:
            self._missed[_ONE if batch.samples else _NONE] += 1
            return
        inner = getattr(model, "_orig_mod", model)
        everything = self._layers is not None
        modules = None if everything else watched(inner)
        if not self._frames and self._places is None:
            self._places = Places.find(inner, batch, modules)
        rows, stack = self._rows(), self._measuring
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        trace = Trace(inner, (args, kwargs), batch.samples) if everything else None
        running = Pass(inner, rows, batch.samples, None, self._places, trace)
        watching = _Watch(inner, running.note, modules)
        watching.failed = lambda error: self._missed.update([_failed("measure", step, error)])
        stack.enter_context(watching.watching())
        _at_the_end(model, stack, lambda *_: self._keep(step, rows))

    def _keep(self, step: int, rows: Rows) -> None:
        """Store the rows of a step, and log them."""
        frame = rows.frame()
        rows.warn(stacklevel=4)
        if frame.empty:
            self._missed["steps without a row"] += 1
            return
        frame.insert(0, "step", step)
        self._frames.append(frame)
        if self._log is not None:
            _logged(self._log, step, frame)


def _at_the_end(model: nn.Module, stack: ExitStack, keep: Callable[..., None]) -> None:
    """The last hooks of the model; the second runs also where the model raises."""
    stack.callback(model.register_forward_hook(_Hook(keep)).remove)
    close = _Hook(lambda *_: stack.close())
    stack.callback(model.register_forward_hook(close, always_call=True).remove)


def _counted(model: nn.Module, batch: Batch, first: int | None) -> tuple[Batch, int]:
    """The batch with the number of its inputs, and which tensor tells it: looked at once."""
    sizes = [x.size(0) if x.ndim and not x.is_nested else 0 for x in batch.tensors()]
    if first is None:
        batch = batch._replace(samples=next((size for size in sizes if size), 0))
        several = len({size for size in sizes if size > 1}) > 1
        first = leading(model, batch, sizes) if several else 0
    held = [size for size in sizes[first:] + sizes if size]
    return batch._replace(samples=held[0] if held else 0), first


def _logged(log: Log, step: int, frame: pd.DataFrame) -> None:
    numbers = frame.set_index("name").select_dtypes("number").drop(columns=["step"])
    values = {f"{x}/{name}": float(y) for x in numbers for name, y in numbers[x].items()}
    try:
        log(step, values)
    except Exception as error:
        _failed("log", step, error)


def _failed(what: str, step: int, error: Exception) -> str:
    text = f"Probe could not {what} step {step}: {type(error).__name__}: {error}"
    warnings.warn(text, stacklevel=3)
    return text
