"""Plain attributes of modules, such as the membrane of a spiking neuron, restored after a pass.

Values that are, or hold in nested containers, tensors are restored by value; objects of other
classes are put back, not what is changed inside them.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

# what others restore
_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


@contextmanager
def restored_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On exit, even after an error, these modules have the plain attributes of before."""
    seen: set[int] = set()
    with ExitStack() as stack:
        for module in modules:
            plain = {name: x for name, x in vars(module).items() if _is_plain(name)}
            stack.callback(_put_back, module, plain)
            for value in plain.values():
                for restore in _restorers(value, seen):
                    stack.callback(restore)
        yield


def _is_plain(name: str) -> bool:
    return name not in _OWN and "_hooks" not in name


def _put_back(module: nn.Module, plain: dict[str, Any]) -> None:
    held = vars(module)
    for name in [name for name in held if _is_plain(name) and name not in plain]:
        del held[name]
    held.update(plain)


def _restorers(value: Any, seen: set[int]) -> Iterator[Callable[[], None]]:
    """What restores a tensor or a container and all in it; parameters are others' affair."""
    if id(value) in seen or isinstance(value, nn.Parameter):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield partial(_restore_tensor, value, value._version, value.detach().clone())
    elif type(value) in (list, deque, dict, set) or isinstance(value, tuple):
        if not isinstance(value, tuple):
            yield partial(_restore_container, value, copy.copy(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _restorers(item, seen)


def _restore_tensor(x: torch.Tensor, version: int, saved: torch.Tensor) -> None:
    if x._version != version:  # else it was not written to
        with torch.no_grad():
            x.copy_(saved)


def _restore_container(value: Any, saved: Any) -> None:
    value.clear()
    (value.extend if isinstance(value, list | deque) else value.update)(saved)
