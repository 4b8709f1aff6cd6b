"""Measure a model inside a training loop, on the batches that it trains on."""

from __future__ import annotations

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
from svlib.probing.models import DEPTH, tensors, weighted_layers
from svlib.probing.rows import Layers, Pass, Rows

Log = Callable[[int, dict[str, float]], Any]


class _Hook:
    """A hook that copies and saved files of the model do not carry on."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *given: Any) -> None:
        self._function(*given)

    def __reduce__(self) -> Any:
        # of the standard library, so that a saved model does not need svlib: takes anything and
        # does nothing
        return getattr, (nullcontext(), "__exit__")


class Probe:
    """Probe a model inside a training loop, every few steps, on the batches that it trains on.

    A step is a call of the model with gradients on; calls under ``no_grad`` (evaluation) are not
    counted. Between the steps that are measured the model runs as if nothing were there. A step
    goes on whatever happens to its measurement: a batch of one input, a skipped layer, an output
    that is not finite have no row. Copies and saved files of the model do not measure.

    Args:
        model: Any module, neither compiled nor called through a compiled wrapper.
        every: Measure steps 0, ``every``, 2 ``every``...
        layers, positions, maximum: As in :func:`probe`.
        log: Called with the number of a measured step and its values by "fraction/hidden.0" etc.

    Raises:
        TypeError: If ``model`` is compiled or ``log`` cannot be called.
        ValueError: If ``layers`` is None and there is no weighted layer.

    Warns:
        UserWarning: If outputs have no row, ``log`` fails, or (on exit) nothing was measured.

    Examples:
        >>> model = nn.Linear(8, 4)
        >>> with Probe(model, every=10) as probe:
        ...     for step in range(21):
        ...         _ = model(torch.ones(16, 8) * torch.arange(16)[:, None])
        >>> probe.table.step.tolist(), probe.table.samples.tolist()
        ([0, 10, 20], [16, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        layers: Layers = None,
        positions: str = "samples",
        maximum: bool = False,
        log: Log | None = None,
    ) -> None:
        self._every = _check.integer("every", every)
        listed = isinstance(layers, Iterable) and not isinstance(layers, str)
        self._layers = list(layers) if listed and layers is not None else layers
        self._rows = partial(Rows, self._layers, positions, maximum=maximum)
        self._rows()  # raises now if an argument is wrong
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if self._layers is None:
            weighted_layers(model)
        _refuse_compiled(model)
        if not (log is None or callable(log)):
            raise TypeError(f"log must be a function of step and values, got {type(log).__name__}")
        self._model, self._steps, self._log = model, 0, log
        self._frames: list[pd.DataFrame] = []
        self._missed: Counter[str] = Counter()  # why steps were not measured
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
            reason = why or "the model itself was not called: call it as model(...), uncompiled"
            warnings.warn(f"Probe measured nothing: {reason}", stacklevel=2)

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
        if (samples := _inputs(args, kwargs)) < 2:
            got = "one input" if samples else "no tensor with a dimension"
            self._missed[f"steps with {got}"] += 1
            return
        rows = self._rows()
        keep = _Hook(lambda *_: self._keep(step, rows))

        try:
            watching = Pass(model, rows, samples).watching(
                (args, kwargs), self._layers, record=False
            )
            self._measuring.enter_context(watching)
            # the last hooks of the model; the second runs also where the model raises
            self._measuring.callback(model.register_forward_hook(keep).remove)
            close = _Hook(lambda *_: self._measuring.close())
            self._measuring.callback(model.register_forward_hook(close, always_call=True).remove)
        except Exception as error:  # a step goes on
            self._measuring.close()
            self._missed[_failed("measure", step, error)] += 1

    def _keep(self, step: int, rows: Rows) -> None:
        """Store the rows of a step, and log them."""
        frame = rows.frame()
        rows.warn(stacklevel=4)
        if frame.empty:
            self._missed["steps without a row"] += 1
            return
        frame.insert(0, "step", step)
        self._frames.append(frame)
        numbers = frame.set_index("name").select_dtypes("number").drop(columns=["step"])
        values = {f"{x}/{name}": float(y) for x in numbers for name, y in numbers[x].items()}
        try:
            if self._log is not None:
                self._log(step, values)
        except Exception as error:
            _failed("log", step, error)


def _inputs(args: Any, kwargs: Any) -> int:
    found = tensors((args, kwargs), objects=DEPTH)
    return next((len(x) for _, x in found if x.ndim and not x.is_nested), 0)


def _failed(what: str, step: int, error: Exception) -> str:
    text = f"Probe could not {what} step {step}: {type(error).__name__}: {error}"
    warnings.warn(text, stacklevel=3)
    return text


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            reason = "or hooks inside do not run"
            raise TypeError(f"model must not be compiled, {reason}, got {type(model).__name__}")
