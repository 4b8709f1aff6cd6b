"""One forward pass, watched: every output of modules and, on request, of torch functions.

An output has a key that is the same in another pass: (module, number of its call, what of it), for
a function (module, number, function, how often there). :mod:`svlib.probing.places` compares
passes of different batches by these keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from svlib.probing.models import mapped, named_modules, storage, tensors

Key = tuple[str | int, ...]


class Output(NamedTuple):
    """One tensor that a module or a function returned.

    Attributes:
        key: The same in other passes.
        name: Name of its row: that of the module, or of the module and the function called in it.
        module: The module, ``None`` if it is a function's.
        function: Name of the function or of the module's class.
        y: The tensor.
        given: Tensors among the arguments.
        call: The arguments of a function (args, kwargs); of a module those it was called with.
        computed: Whether it has entries of its own: not a view, nor an argument returned.
    """

    key: Key
    name: str
    module: nn.Module | None
    function: str
    y: torch.Tensor
    given: tuple[torch.Tensor, ...]
    call: tuple[Any, Any]
    computed: bool = True


OnOutput = Callable[[Output], torch.Tensor | None]


class _Frame:
    """A module that is being called."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number, self.functions = name, number, Counter[str]()


class Watch(TorchFunctionMode):
    """Calls ``on_output`` with every output of a forward pass, while active and not ``paused``.

    Args:
        model: The model that is called; hooks go to its modules.
        on_output: A tensor that it returns for a module's output takes the place of that.
        modules: Watch these modules alone, and no function.
        replace: Called with (key, function, name, args, kwargs), may return what takes the place of
            a function's output; ``NotImplemented`` lets the function run.
    """

    def __init__(
        self,
        model: nn.Module,
        on_output: OnOutput,
        modules: Mapping[str, nn.Module] | None = None,
        replace: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self._model, self._on_output, self._modules = model, on_output, modules
        self._replace = replace
        self.paused = False
        self._stack = [_Frame("", 1)]
        self._counts: Counter[str] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model's next call."""
        with ExitStack() as stack:
            named = dict(named_modules(self._model)) if self._modules is None else self._modules
            for name, module in named.items():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                    continue
                before, after = partial(self._before, name), partial(self._after, name)
                stack.callback(module.register_forward_pre_hook(before).remove)
                hook = module.register_forward_hook(after, with_kwargs=True, always_call=True)
                stack.callback(hook.remove)
            if self._modules is None:
                stack.enter_context(self)
            yield

    def _before(self, name: str, module: nn.Module, given: Any) -> None:
        if self.paused:
            return
        self._counts[name] += 1
        self._stack.append(_Frame(name, self._counts[name]))

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.paused:
            return None
        frame = self._stack.pop() if len(self._stack) > 1 else self._stack[0]
        if output is None:  # where it raised, for example
            return None
        with torch._C.DisableTorchFunction():  # the model did not call what follows
            changed: dict[int, torch.Tensor] = {}
            given = tuple(x for _, x in tensors((args, kwargs)))
            for where, y in tensors(output):
                key = (name, frame.number, where)
                made = Output(
                    key, name + where, module, type(module).__name__, y, given, (args, kwargs)
                )
                new = self._on_output(made)
                if new is not None:
                    changed[id(y)] = new
        if not changed:
            return None
        return mapped(lambda x: changed.get(id(x), x), output)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", type(function).__name__).strip("_")
        output = NotImplemented
        if self._replace is not None:
            frame = self._stack[-1]
            key = (frame.name, frame.number, name, frame.functions[name] + 1)
            output = self._replace(key, function, name, args, kwargs)
        if output is NotImplemented:
            output = function(*args, **kwargs)
        if name == "setitem":
            made = [("", args[0])]
        elif isinstance(output, torch.Tensor):
            made = [("", output)]
        elif isinstance(output, tuple | list):
            made = list(tensors(output))
        else:
            return output
        if made:
            with torch._C.DisableTorchFunction():
                self._note(function, name, args, kwargs, made)
        return output

    def _note(
        self, function: Any, name: str, args: Any, kwargs: Any, made: list[tuple[str, torch.Tensor]]
    ) -> None:
        frame = self._stack[-1]
        frame.functions[name] += 1
        given = tuple(x for _, x in tensors((args, kwargs)))
        inplace = getattr(function, "__name__", "").endswith("_") or bool(kwargs.get("inplace"))
        for where, y in made:
            key = (frame.name, frame.number, name, frame.functions[name], where)
            computed = inplace or all(storage(y) != storage(x) for x in given)
            row = f"{frame.name}/{name}".lstrip("/")
            self._on_output(Output(key, row, None, name, y, given, (args, kwargs), computed))
