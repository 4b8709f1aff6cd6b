"""Measure, simulate, train and repair networks; thin commands over svlib's functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import xarray as xr

import svlib
from svlib import simulation, sweep
from svlib._command import DEVICE, Target, with_options
from svlib._files import write_whole
from svlib.experiments import data, training
from svlib.experiments.task import Task
from svlib.probing import command

_OUTPUT = [click.option("--output", type=Target(), required=True, help="netCDF file to write.")]
_RUN = [
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
_ENSEMBLE = [
    click.option(
        "--depth", type=int, default=49, show_default=True, help="Weight matrices after layer 0."
    ),
    click.option(
        "--samples", type=int, default=256, show_default=True, help="Inputs to each network."
    ),
    click.option("--seed", type=int, default=0, show_default=True),
    DEVICE,
    click.option(
        "--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True
    ),
    click.option(
        "--method", type=click.Choice(simulation.METHODS), default="auto", show_default=True
    ),
    click.option(
        "--memory", type=float, default=2**27, show_default=True, help="Bytes simulated at a time."
    ),
    click.option("--activation", default="relu", show_default=True),
    click.option("--negative-slope", type=float, default=0.0, show_default=True),
    click.option("--weight-variance", type=float, help="Times 1/N.  [default: He's]"),
    click.option("--bias-variance", type=float, default=0.0, show_default=True),
    click.option("--weights", type=click.Choice(["gaussian", "orthogonal"]), default="gaussian"),
    click.option("--normalization", type=click.Choice(["batch", "layer", "rms"])),
    click.option("--residual", type=float, help="beta in y + sqrt(beta) W phi(y)."),
    click.option(
        "--block",
        type=click.IntRange(1),
        default=20,
        show_default=True,
        help="Networks in one point.",
    ),
    *_RUN,
    *_OUTPUT,
]


@click.group(help=__doc__)
@click.version_option(svlib.__version__, prog_name="svlib", message="%(prog)s %(version)s")
def main() -> None:
    # a redirected stream may have no sigma: one question mark is better than no output
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="replace")


main.add_command(command.probe)
main.add_command(command.check)
main.add_command(command.init)


@main.command()
@click.argument("width", type=int)
@click.option("--networks", type=click.IntRange(1), default=100, show_default=True)
@with_options(*_ENSEMBLE)
def simulate(width: int, networks: int, output: Path, **options: Any) -> None:
    """Simulate networks of one width.

    The record that is written holds every network and layer.
    """
    (record,) = _simulated({width: networks}, output=output, **options)
    _write(record, output)


@main.command(name="sweep")
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
    _write(joined.assign_coords(width=list(counts)).assign_attrs(wall_time=seconds), output)


@main.command()
@click.argument("dataset", metavar="DATA", type=click.Choice(training.DATA))
@click.option(
    "--init",
    "initializations",
    type=click.Choice(training.INITIALIZATIONS + training.VARIANTS),
    multiple=True,
    help="Repeatable.  [default: total, sample, batchnorm]",
)
@click.option(
    "--scale", type=click.Choice(list(training.SCALES)), default="quick", show_default=True
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--width", type=click.IntRange(1), help="Channels of the first layer.  [default: the scale's]"
)
@click.option("--iterations", type=click.IntRange(1), help="Steps of SGD.  [default: the scale's]")
@click.option(
    "--rate",
    "learning_rates",
    type=float,
    multiple=True,
    help="Learning rate, repeatable.  [default: a grid of five]",
)
@click.option("--mixed-precision", is_flag=True, help="bfloat16 by autocast, CUDA only.")
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    help=f"Folder of the data.  [default: ${data.FOLDER_VARIABLE}]",
)
@click.option(
    "--download",
    is_flag=True,
    help="Put CIFAR-10's archive (170 MB, checked) into the folder first.",
)
@DEVICE
@click.option("--output", type=Target(), help="netCDF file to write.  [default: DATA-SCALE.nc]")
@with_options(*_RUN)
def train(
    dataset: str,
    scale: str,
    folder: Path | None,
    download: bool,
    device: str,
    output: Path | None,
    store: Path | None,
    workers: int,
    resume: bool,
    **grid: Any,
) -> None:
    """Train with each initialization and rate.

    The record holds losses, gradients and layers by initialization, learning rate and seed.

    DATA is digits or membranes (embedded), cifar10 or micrographs (from --data). A run that is
    killed goes on, with --resume, from its last checkpoint in the store.
    """
    output = output or Path(f"{dataset}-{scale}.nc")
    store = store or output.with_name(output.name + ".store")
    # an option that is not given is the scale's
    chosen = {name: value for name, value in grid.items() if value not in (None, ())}
    try:
        if download:
            if dataset != "cifar10" or folder is None:
                raise ValueError("--download must come with cifar10 and --data, its folder")
            data.fetch_cifar10(folder)
        points = training.grid(dataset, scale, **chosen)
        # before the sweep, which would report missing data point by point; in the points, because
        # runs on other data or another device are other runs
        sha256 = Task.load(points[0]["experiment"], folder, device).split.sha256
    except (TypeError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    points = [point | {"device": device, "sha256": sha256} for point in points]
    common = {
        "folder": None if folder is None else str(folder),
        "checkpoints": str(store / "checkpoints"),
    }
    records = _swept(training.run, points, output, store, resume, workers, common)
    try:
        _write(training.collect(records), output)
    except ValueError as error:
        raise click.ClickException(f"{error}; they are in {store}") from None


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
    parts = _swept(simulation.simulate, points, output, store, resume, workers)
    records = []
    for width, count in counts.items():
        mine = [part for part in parts if part.attrs["width"] == width]
        joined = xr.concat(mine, "network", combine_attrs="drop_conflicts")
        seconds = sum(part.attrs["wall_time"] for part in mine)
        records.append(joined.assign_attrs(networks=count, wall_time=seconds))
    return records


def _swept(
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


def _write(record: xr.Dataset, output: Path) -> None:
    try:
        write_whole(output, bytes(record.to_netcdf(engine="scipy")))
    except OSError as error:
        raise click.ClickException(
            f"{error}; finished points are in the store, --resume writes them"
        ) from None
    click.echo(f"{output}: {dict(record.sizes)}, {record.attrs['wall_time']:.0f} s of computing")


if __name__ == "__main__":
    main(prog_name="python -m svlib")
