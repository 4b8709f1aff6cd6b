"""Measure a model inside a training loop, on the batches that it trains on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from torch import nn

from svlib import _check
from svlib.probing.models import tensors, weighted_layers
from svlib.probing.rows import Layers, Pass, Rows


class Probe:
    """Probe a model inside a training loop, every few steps, on the batches that it trains on.

    A step is a call of the model with gradients on; calls under ``no_grad`` (evaluation) are not
    counted. Between the steps that are measured the model runs as if nothing were there. A batch of
    one input is not measured, and outputs that are not finite have no row and a warning: a run that
    diverges goes on.

    Args:
        model: Any module, neither compiled nor called through a compiled wrapper.
        every: Measure steps 0, ``every``, 2 ``every``...
        layers: As in :func:`probe`.
        positions: As in :func:`probe`.

    Raises:
        TypeError: If ``model`` is compiled.
        ValueError: If ``layers`` is None and there is no weighted layer.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(8, 4)
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
    ) -> None:
        self._every = _check.integer("every", every)
        listed = isinstance(layers, Iterable) and not isinstance(layers, str)
        self._layers = list(layers) if listed and layers is not None else layers
        self._positions = positions
        Rows(self._layers, positions)  # raises now if an argument is wrong
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if self._layers is None:
            weighted_layers(model)
        for module in model.modules():
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                reason = "or hooks inside do not run"
                raise TypeError(f"model must not be compiled, {reason}, got {type(model).__name__}")
        self._model, self._steps = model, 0
        self._frames: list[pd.DataFrame] = []
        self._hooks, self._measuring = ExitStack(), ExitStack()

    def __enter__(self) -> Probe:
        hook = self._model.register_forward_pre_hook(self._before, with_kwargs=True)
        self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._measuring.close()  # open still where the forward pass was interrupted
        self._hooks.close()

    @property
    def table(self) -> pd.DataFrame:
        """The rows of :func:`probe` for every step that was measured, with its number in front as
        ``step``."""
        return pd.concat(self._frames, ignore_index=True) if self._frames else pd.DataFrame()

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        step, self._steps = self._steps, self._steps + 1
        samples = next((len(x) for _, x in tensors((args, kwargs)) if x.ndim), 0)
        if step % self._every or samples < 2:
            return
        rows = Rows(self._layers, self._positions)
        watching = Pass(model, rows, samples).watching((args, kwargs), self._layers, record=False)

        def keep(model: nn.Module, args: Any, output: Any) -> None:
            frame = rows.frame()
            if len(frame):
                frame.insert(0, "step", step)
                self._frames.append(frame)
            rows.warn(stacklevel=3)

        def close(model: nn.Module, args: Any, output: Any) -> None:
            self._measuring.close()

        self._measuring.close()
        self._measuring.enter_context(watching)
        # the last hooks of the model; the second runs also where the model raises
        self._measuring.callback(model.register_forward_hook(keep).remove)
        self._measuring.callback(model.register_forward_hook(close, always_call=True).remove)
