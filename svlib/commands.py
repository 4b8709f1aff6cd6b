"""``svlib simulate`` and ``svlib sweep``: records from the command line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click
import xarray as xr

from svlib import _check, simulation, sweep
from svlib._command import DEVICE, Target, with_options
from svlib._files import write_whole
from svlib.ensemble import METHODS, WEIGHTS, Ensemble

_OUTPUT = [click.option("--output", type=Target(), required=True, help="netCDF file to write.")]
RUN = [
    click.option(
        "--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes."
    ),
    click.option(
        "--store",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of finished points.  [default: OUTPUT.store]",
    ),
    click.option("--resume", is_flag=True, help="Go on with the finished points of the store."),
]
_CHOICES = {"dtype": ("float32", "float64"), "method": METHODS, "weights": WEIGHTS}
_CHOICES |= {"normalization": tuple(filter(None, _check.NORMALIZATIONS))}
_DEFAULTS = {"samples": 256, "seed": 0, "dtype": "float32"}
_HELP = {
    "samples": "Inputs to each network.",
    "memory": "Bytes simulated at a time.",
    "weight_variance": "Times 1/N.  [default: He's]",
    "residual": "beta in y + sqrt(beta) W phi(y).",
}
_TYPES = {"int": int, "float": float, "float | None": float, "str": str, "Any": int}


def _option(argument: Field[Any]) -> Callable[..., Any]:
    """The option of an argument of :class:`svlib.Ensemble`."""
    name = argument.name
    default = _DEFAULTS.get(name, argument.default)
    kind = click.Choice(_CHOICES[name]) if name in _CHOICES else _TYPES[str(argument.type)]
    shown = default is not None
    return click.option(
        f"--{name.replace('_', '-')}", type=kind, default=default, show_default=shown,
        help=_HELP.get(name),
    )  # fmt: skip


_ENSEMBLE = [
    click.option(
        "--depth", type=int, default=49, show_default=True, help="Weight matrices after layer 0."
    ),
    DEVICE,
    *(
        _option(argument)
        for argument in fields(Ensemble)
        if argument.init and argument.name not in ("width", "inputs", "device")
    ),
    click.option(
        "--block",
        type=click.IntRange(1),
        default=20,
        show_default=True,
        help="Networks in one point.",
    ),
    *RUN,
    *_OUTPUT,
]


@click.command()
@click.argument("width", type=int)
@click.option("--networks", type=click.IntRange(1), default=100, show_default=True)
@with_options(*_ENSEMBLE)
def simulate(width: int, networks: int, output: Path, **options: Any) -> None:
    """Simulate networks of one width.

    The record that is written holds every network and layer.
    """
    (record,) = _simulated({width: networks}, output=output, **options)
    write(record, output)


@click.command(name="sweep")
@click.argument("widths", nargs=-1, required=True, metavar="WIDTH:NETWORKS...")
@with_options(*_ENSEMBLE)
def sweep_widths(widths: tuple[str, ...], output: Path, **options: Any) -> None:
    """Average simulations of several widths.

    For example 30:400 100:400 3000:100. The averages over networks are written by width and layer;
    every network stays in the store.
    """
    try:
        counts = {int(width): int(count) for width, count in (pair.split(":") for pair in widths)}
    except ValueError:
        counts = {}
    if len(counts) < len(widths) or min(counts.values()) < 1:
        message = f"must be different widths like 30:400, got {' '.join(widths)}"
        raise click.BadParameter(message, param_hint="WIDTH:NETWORKS")
    records = _simulated(counts, output=output, **options)
    summaries = [simulation.summarize(record) for record in records]
    joined = xr.concat(summaries, "width", combine_attrs="drop_conflicts")
    seconds = sum(summary.attrs["wall_time"] for summary in summaries)
    write(joined.assign_coords(width=list(counts)).assign_attrs(wall_time=seconds), output)


def _simulated(
    counts: dict[int, int],
    *,
    output: Path,
    store: Path | None,
    resume: bool,
    block: int,
    workers: int,
    **ensemble: Any,
) -> list[xr.Dataset]:
    """One record for each width, from a sweep over blocks of its networks."""
    points = [
        {"width": width, "networks": range(start, min(start + block, count)), "progress": False}
        | ensemble
        for width, count in counts.items()
        for start in range(0, count, block)
    ]
    parts = swept(simulation.simulate, points, output, store, resume, workers)
    records = []
    for width, count in counts.items():
        mine = [part for part in parts if part.attrs["width"] == width]
        joined = xr.concat(mine, "network", combine_attrs="drop_conflicts")
        seconds = sum(part.attrs["wall_time"] for part in mine)
        records.append(joined.assign_attrs(networks=count, wall_time=seconds))
    return records


def swept(
    function: Callable[..., xr.Dataset],
    points: list[dict[str, Any]],
    output: Path,
    store: Path | None,
    resume: bool,
    workers: int,
    common: dict[str, Any] | None = None,
) -> list[xr.Dataset]:
    """The records of a sweep; an error becomes one line."""
    store = store or output.with_name(output.name + ".store")
    try:
        if not resume and any(store.glob("*.nc")):
            raise ValueError(f"store must be empty without --resume, got {store}")
        if not resume and output.exists():
            raise ValueError(f"output must not exist without --resume, got {output}")
        with sweep.processes(workers) if workers > 1 else nullcontext() as executor:
            return sweep.run(function, points, store, executor, common=common)
    except KeyboardInterrupt:
        raise click.ClickException(
            f"interrupted; finished points are in {store}, --resume goes on with them"
        ) from None
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from None


def write(record: xr.Dataset, output: Path) -> None:
    """Write the record of a command, and say so; an error becomes one line."""
    for name, value in record.attrs.items():  # netCDF 3 has no integers beyond 32 bits
        if isinstance(value, int) and abs(value) >= 2**31:
            record = record.assign_attrs({name: str(value)})
    try:
        write_whole(output, bytes(record.to_netcdf(engine="scipy")))
    except OSError as error:
        raise click.ClickException(
            f"{error}; finished points are in the store, --resume writes them"
        ) from None
    click.echo(f"{output}: {dict(record.sizes)}, {record.attrs['wall_time']:.0f} s of computing")
