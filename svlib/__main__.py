"""Measure, simulate, train and repair networks; thin commands over svlib's functions."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import click

from svlib import _missing

_COMMANDS = {  # with what --help says of each, so that it imports none of them
    "check": (
        "probing.command:check",
        "Exit with 1 if a model has findings, for continuous integration.",
    ),
    "init": ("probing.command:init", "Initialize a model from data."),
    "probe": ("probing.command:probe", "Measure a model and say what is wrong with it."),
    "simulate": ("commands:simulate", "Simulate networks of one width."),
    "sweep": ("commands:sweep_widths", "Average simulations of several widths."),
    "train": ("experiments.command:train", "Train with each initialization and rate."),
}


class _Commands(click.Group):
    """Commands that are imported when they are called: torch alone takes a second."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        room, name = _COMMANDS[cmd_name][0].split(":")
        try:
            command: click.Command = getattr(import_module(f"svlib.{room}"), name)
        except ModuleNotFoundError as error:
            raise click.ClickException(str(_missing(error))) from None
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, help=__doc__)
@click.version_option(package_name="svlib", prog_name="svlib", message="%(prog)s %(version)s")
def main() -> None:
    # a redirected stream may have no sigma: one question mark is better than no output
    reconfigure: Any = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="replace")


if __name__ == "__main__":
    main(prog_name="python -m svlib")
