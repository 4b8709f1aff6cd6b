"""``svlib train``: the runs of chapter 5 from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from svlib._command import DEVICE, Target, with_options
from svlib.commands import RUN, swept, write
from svlib.experiments import data, training
from svlib.experiments.task import Task


@click.command()
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
@with_options(*RUN)
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
    records = swept(training.run, points, output, store, resume, workers, common)
    try:
        write(training.collect(records), output)
    except ValueError as error:
        raise click.ClickException(f"{error}; they are in {store}") from None
