"""What the commands share: groups of options, files to write, one line for what goes wrong."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from svlib import _check


def with_options(*options: Callable[..., Any]) -> Callable[..., Any]:
    """One decorator for several, in the order in which ``--help`` lists them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        _check.device(value)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    return value


DEVICE = click.option("--device", default="cpu", show_default=True, callback=_device)


class Target(click.Path):
    """A file to write, in a folder that may be missing; refused before anything is computed."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        path = Path(str(super().convert(value, param, ctx)))
        place = next(folder for folder in path.absolute().parents if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            self.fail(f"{str(value)!r} cannot be written: {place} is no folder to write to.")
        return path


@contextmanager
def one_line() -> Iterator[None]:
    """Turn exceptions, the model's too, and warnings into one line each."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = lambda message, *_, **__: click.echo(
                f"Warning: {message}", err=True
            )
            yield
    except click.ClickException:
        raise
    except Exception as error:
        raise click.ClickException(" ".join(f"{type(error).__name__}: {error}".split())) from error
