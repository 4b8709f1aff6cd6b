"""What sets a layer at its first call, in the middle of a forward pass."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import nn

from svlib.moments import Decomposition, decompose
from svlib.probing.batches import counted
from svlib.probing.forward import Pass
from svlib.probing.models import (
    MaskError,
    MergedInputsError,
    first_floating,
    named_modules,
    row_name,
    storage,
    unit_dimension,
    weighted_layers,
)
from svlib.probing.passes import Output, Watch
from svlib.probing.rows import some
from svlib.probing.scales import along, by_unit, carrier, divide_, like, maker

_TOLERANCE = 0.05  # of a model in bfloat16, too
SET, SET_WITHOUT_BIAS = "set", "deviation set; no bias, mean left"
Parts = Callable[[Decomposition], tuple[torch.Tensor, torch.Tensor]]


def total_parts(found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(()), torch.as_tensor(found.sigma2).sqrt()


def layer_parts(found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.as_tensor(found.mean.mean())
    return mean, (torch.as_tensor(found.sigma2) - mean.square()).sqrt()


def sample_parts(found: Decomposition) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(found.mean), torch.from_numpy(found.variance).sqrt()


class Setter:
    """Sets layers at their first call; ``done`` says of each call what was done."""

    watch: Watch

    def __init__(self, model: nn.Module, parts: Parts, mask: torch.Tensor | None) -> None:
        self.layers = weighted_layers(model)
        self._left, self._parts, self._mask = _left(model, self.layers), parts, mask
        self._calls, self._set_as = Counter[str](), dict[int, str]()  # by storage of what was set
        self._unset: dict[str, list[str]] = {}  # reasons that a warning names, and layers
        self.done: dict[str, str] = {}
        for name, layer in self.layers.items():
            if carrier(layer) is None and name not in self._left:
                self._left[name] = self.leave(name, f"weight made by {maker(layer)}")

    def finish(self) -> None:
        """Note layers that were not called; raise if none was set."""
        for name in self.layers:
            if not self._calls[name] and name not in self._left:
                self.leave(name, "not called")
        if not self._set_as and self._unset:
            reason, names = next(iter(self._unset.items()))
            got = f"{some(map(repr, names))}: {reason}"
            raise ValueError(f"model must have a layer to set, got {got}")

    def warn(self, beyond: list[str]) -> None:
        """Say in one warning what was left."""
        reasons = self._unset | ({"attention, recurrent or bilinear": beyond} if beyond else {})
        if reasons:
            parts = [f"{some(map(repr, names))} ({reason})" for reason, names in reasons.items()]
            text = "left as they are: " + "; ".join(parts)
            warnings.warn(f"{text}: freeze them to leave them silently", stacklevel=4)

    def leave(self, name: str, reason: str) -> str:
        """Note a layer that is left, and why; the words for the table."""
        self._unset.setdefault(reason, []).append(name)
        return f"left, {reason}"

    def on_output(self, running: Pass) -> Callable[[Output], torch.Tensor | None]:
        """What to do with an output of a layer."""

        def set_(made: Output) -> torch.Tensor | None:
            layer, name, y = made.module, str(made.key[0]), made.y
            assert layer is not None
            if not y.is_floating_point() or made.key[1] == self._calls[name]:
                return None
            self._calls[name] += 1
            row, bias = row_name(name, self._calls[name]), layer._parameters.get("bias")
            held: list[torch.Tensor] = [x for x in (carrier(layer), bias) if x is not None]
            shared = [self._set_as[at] for part in held if (at := storage(part)) in self._set_as]
            if name in self._left or shared:
                self.done[row] = self._left.get(name) or f"left, set as {shared[0]!r}"
                return None
            try:
                apart, dims = running.apart(made, name)
                counted_y, mask = counted(apart, dims, self._mask)
            except MergedInputsError as error:
                self.done[row] = self.leave(name, _reason(error))
                return None
            new = self._set(row, made, decompose(counted_y, *dims, mask=mask), held)
            if new is not None:
                self._set_as.update({storage(part): name for part in held})
            return new

        return set_

    def _set(
        self, row: str, made: Output, found: Decomposition, held: list[torch.Tensor]
    ) -> torch.Tensor | None:
        """Set one layer and return what its output is then; ``None`` if it is left."""
        layer: Any = made.module
        name, y = str(made.key[0]), made.y
        shift, scale = (x.to(y) for x in self._parts(found))
        if bad := int((~scale.isfinite()).sum()):
            raise ValueError(f"layer {name!r} must have finite scales, got {bad} that are not")
        # what rounding leaves of a unit that does not vary is no variance
        still = scale <= 2 * torch.finfo(y.dtype).eps * shift.abs()
        if still.all():
            silent = not found.sigma2
            reason = "output 0 for every input" if silent else "no variation over inputs"
            self.done[row] = self.leave(name, reason)
            return None
        if scale.ndim and not by_unit(layer, len(scale)):
            self.done[row] = self.leave(name, "one scale for several units")
            return None
        bias = layer._parameters.get("bias")
        done = SET if bias is not None or self._parts is total_parts else SET_WITHOUT_BIAS
        places = [int(place) for place in still.nonzero()[:, 0]] if still.ndim else []
        if places:
            done = f"set but for {len(places)} units without variation"
            scale, shift = torch.where(still, 1, scale), torch.where(still, 0, shift)
        shift = torch.zeros_like(shift) if bias is None else shift
        kept = [part.detach().clone() for part in held]
        unit = unit_dimension(name, layer, y)
        assert unit is not None
        expected = (y.detach() - along(shift, unit, y.ndim)) / along(scale, unit, y.ndim)
        try:
            with torch.no_grad():
                divide_(layer, scale)
                if bias is not None:
                    bias.copy_((bias - like(shift, bias)) / like(scale, bias))
            torch.clear_autocast_cache()  # which holds the weights of before
            self.watch.paused = True
            again = first_floating(layer(*made.call[0], **made.call[1]))
            off = again is None or not _close(again.detach(), expected)
            reason = "its weight is not used as it is and alike every time"
        except (RuntimeError, NotImplementedError) as error:
            off, again, reason = True, None, str(error).splitlines()[0]
        finally:
            self.watch.paused = False
        if off:
            with torch.no_grad():
                for part, value in zip(held, kept, strict=True):
                    part.copy_(value)
            self.done[row] = self.leave(name, reason)
            return None
        if places:
            self.leave(f"{name} units {some(map(str, places))}", "no variation over inputs")
        self.done[row] = done
        return again


def _reason(error: MergedInputsError) -> str:
    masked = isinstance(error, MaskError)
    return "other positions than the mask" if masked else "inputs not apart"


def unlike(after: pd.DataFrame, done: Mapping[str, str], parts: Parts) -> dict[str, str]:
    """Layers whose statistics, in another pass, are not those that were set, and what they are."""
    kinds = [SET] if parts is layer_parts else [SET, SET_WITHOUT_BIAS]
    mine = after[after.name.map(done).isin(kinds)]
    found = mine.v2 if parts is sample_parts else mine.sigma2
    kind = "sample variance" if parts is sample_parts else "mean square"
    off = {n: x for n, x in zip(mine.name, found, strict=True) if not abs(x - 1) < _TOLERANCE}
    return {name: f"set, but {kind} {x:.3g} in another pass" for name, x in off.items()}


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    size = expected.double().square().mean().sqrt()
    off = (found.double() - expected.double()).square().mean().sqrt()
    return bool(off <= _TOLERANCE * size)


def _left(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers that are left because they are frozen or their weight belongs to something else."""
    owners: dict[int, list[str]] = {}
    for name, module in named_modules(model):
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name.split(".parametrizations.")[0])
    left = {}
    for name, layer in layers.items():
        others = [owner for owner in owners.get(id(carrier(layer)), []) if owner not in layers]
        if not all(parameter.requires_grad for parameter in layer.parameters()):
            left[name] = "left, frozen"
        elif others and carrier(layer) is not None:
            left[name] = f"left, tied to {others[0]}"
    return left
