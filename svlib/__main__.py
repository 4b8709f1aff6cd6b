"""The command line: ``python -m svlib``, a thin layer over the functions of the same names."""

from __future__ import annotations

import importlib
import io
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from svlib import _check, simulation, sweep
from svlib._files import provenance, write_whole
from svlib.experiments import data, training
from svlib.probing import init as repair
from svlib.probing import probe as probing
from svlib.probing import report
from svlib.probing.explanation import explain

_ENSEMBLE = [
    click.option(
        "--depth", type=int, default=49, show_default=True, help="Weight matrices after layer 0."
    ),
    click.option(
        "--samples", type=int, default=256, show_default=True, help="Inputs to each network."
    ),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--device", default="cpu", show_default=True),
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
    click.option("--normalization", type=click.Choice(["batch", "layer"])),
    click.option("--residual", type=float, help="beta in y + sqrt(beta) W phi(y)."),
]
_BLOCK = [
    click.option(
        "--block",
        type=click.IntRange(1),
        default=20,
        show_default=True,
        help="Networks in one point.",
    )
]
_OUTPUT = [
    click.option(
        "--output", type=click.Path(path_type=Path), required=True, help="netCDF file to write."
    )
]
_RUN = [
    click.option(
        "--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes."
    ),
    click.option(
        "--store",
        type=click.Path(path_type=Path),
        help="Folder of finished points.  [default: OUTPUT.store]",
    ),
    click.option("--resume", is_flag=True, help="Go on with the finished points of the store."),
]


_MODEL = [
    click.argument("model", metavar="MODEL"),
    click.option(
        "--input",
        "given",
        required=True,
        help="Shape of one input, for Gaussian noise (3,32,32); digits; FILE.npy; or FILE.npz, arguments by name.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(2),
        default=256,
        show_default=True,
        help="Inputs, at most those of the file.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Of the weights and of the noise.",
    ),
    click.option("--device", default="cpu", show_default=True),
    click.option(
        "--checkpoint",
        type=click.Path(path_type=Path, exists=True),
        help="State dictionary of the model.",
    ),
    click.option(
        "--eval",
        "evaluating",
        is_flag=True,
        help="Evaluation mode.  [default: the mode MODEL comes in]",
    ),
]


def _with(options: list[Callable[..., Any]]) -> Callable[..., Any]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command(
    help="Simulate an ensemble of random networks and write its record: every network, every layer."
)
@click.argument("width", type=int)
@click.option("--networks", type=click.IntRange(1), default=100, show_default=True)
@_with(_ENSEMBLE + _BLOCK + _RUN + _OUTPUT)
def simulate(width: int, networks: int, output: Path, **options: Any) -> None:
    (record,) = _run({width: networks}, output=output, **options)
    _write(record, output)


@main.command(name="sweep")
@click.argument("widths", nargs=-1, required=True, metavar="WIDTH:NETWORKS...")
@_with(_ENSEMBLE + _BLOCK + _RUN + _OUTPUT)
def sweep_widths(widths: tuple[str, ...], output: Path, **options: Any) -> None:
    """Simulate several widths and write their averages over networks by layer.

    For example 30:400 100:400 3000:100. Every network stays in the store.
    """
    try:
        counts = {int(width): int(count) for width, count in (pair.split(":") for pair in widths)}
    except ValueError:
        counts = {}
    if len(counts) < len(widths) or min(counts.values()) < 1:
        message = f"must be different widths like 30:400, got {' '.join(widths)}"
        raise click.BadParameter(message, param_hint="WIDTH:NETWORKS")
    summaries = [simulation.summarize(record) for record in _run(counts, output=output, **options)]
    joined = xr.concat(summaries, "width", combine_attrs="drop_conflicts").assign_coords(
        width=list(counts)
    )
    _write(
        joined.assign_attrs(wall_time=sum(summary.attrs["wall_time"] for summary in summaries)),
        output,
    )


@main.command()
@click.argument("dataset", metavar="DATA", type=click.Choice(training.DATA))
@click.option(
    "--init",
    "kinds",
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
    "rates",
    type=float,
    multiple=True,
    help="Learning rate, repeatable.  [default: a grid of five]",
)
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
@click.option("--device", default="cpu", show_default=True)
@click.option("--mixed-precision", is_flag=True, help="bfloat16 by autocast, CUDA only.")
@_with(_RUN)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="netCDF file to write.  [default: DATA-SCALE.nc]",
)
def train(
    dataset: str,
    kinds: tuple[str, ...],
    scale: str,
    seeds: int,
    width: int | None,
    iterations: int | None,
    rates: tuple[float, ...],
    folder: Path | None,
    download: bool,
    device: str,
    mixed_precision: bool,
    store: Path | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Train every initialization at every learning rate and seed, and write their losses, gradients and layers.

    DATA is digits or membranes (embedded), cifar10 or micrographs (from --data). A run that is
    killed goes on, with --resume, from its last checkpoint in the store.
    """
    output = output or Path(f"{dataset}-{scale}.nc")
    store = store or output.with_name(output.name + ".store")
    try:
        if download:
            if dataset != "cifar10" or folder is None:
                raise ValueError(
                    "--download must come with cifar10 and --data, the folder to put it"
                )
            data.fetch_cifar10(folder)
        points = training.grid(
            dataset,
            scale,
            seeds=seeds,
            initializations=kinds or training.INITIALIZATIONS,
            learning_rates=rates or None,
            width=width,
            iterations=iterations,
            mixed_precision=mixed_precision,
        )
        # what is missing shows before the sweep; runs on other data or another device are other
        # points of the store
        source = training.source(points[0]["experiment"], folder=folder, device=device)
    except (TypeError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    place = None if folder is None else str(folder)
    points = [point | {"device": device, "source": source} for point in points]
    common = {"folder": place, "checkpoints": str(store / "checkpoints")}
    records = _swept(training.run, points, output=output, store=store, common=common, **options)
    try:
        _write(training.collect(records), output)
    except ValueError as error:  # of two versions of the library, for example
        raise click.ClickException(f"{error}; they are in {store}") from None


@main.command()
@_with(_MODEL)
@click.option(
    "--batch", type=click.IntRange(1), default=64, show_default=True, help="Inputs at a time."
)
@click.option(
    "--layer", "layers", multiple=True, help="Name of an output, * a wildcard, repeatable; or all."
)
@click.option(
    "--positions", type=click.Choice(probing.POSITIONS), default="samples", show_default=True
)
@click.option("--html", "page", type=click.Path(path_type=Path), help="Report to write.")
def probe(
    batch: int, layers: tuple[str, ...], positions: str, page: Path | None, **options: Any
) -> None:
    """Measure a model layer by layer, and say what theory expects and what is wrong.

    MODEL is package.module:NAME or path/to/file.py:NAME, where NAME is a torch module or makes one
    without arguments. Files may hold float64, which is cast to the model's type; integers stay what
    they are.
    """
    started = time.perf_counter()
    with _one_line():
        model, inputs = _model(**options)
        batches = tqdm(list(_batches(inputs, batch)), desc="probe", unit="batch", disable=None)
        chosen = "all" if layers == ("all",) else list(layers) or None
        explanation = explain(probing.probe(model, batches, layers=chosen, positions=positions))
        click.echo(
            explanation.layers().to_string(index=False, float_format="{:.3g}".format, na_rep="")
        )
        click.echo(f"\n{explanation}")
        if page is not None:
            made: dict[str, object] = {
                "command": shlex.join(["python", "-m", "svlib", *sys.argv[1:]])
            }
            shapes = {name: tuple(x.shape) for name, x in inputs.items()}
            made |= {
                "inputs": shapes.get("", shapes),
                "mode": "training" if model.training else "evaluation",
            }
            made |= provenance(torch.device(options["device"]), started)
            write_whole(
                page, report.page(explanation, title=options["model"], provenance=made).encode()
            )
            click.echo(f"{page}: written")


@main.command()
@_with(_MODEL)
@click.option(
    "--method", type=click.Choice(["total", "sample"]), default="sample", show_default=True
)
@click.option("--gradients", is_flag=True, help="Measure squared gradients before and after, too.")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, help="State dictionary to write."
)
def init(method: str, gradients: bool, output: Path, **options: Any) -> None:
    """Initialize a model from data, and write its weights: total init or sample init.

    MODEL as in probe. Load the weights with torch.load(OUTPUT, weights_only=True).
    """
    with _one_line():
        if output.exists():
            raise ValueError(f"output must not exist, got {output}")
        model, inputs = _model(**options)
        initializer = {"total": repair.total_, "sample": repair.sample_}[method]
        table = initializer(model, _batches(inputs, options["samples"]), gradients=gradients)
        click.echo(table.to_string(index=False, float_format="{:.3g}".format))
        content = io.BytesIO()
        torch.save(model.state_dict(), content)
        write_whole(output, content.getvalue())
        click.echo(f"{output}: written")


@contextmanager
def _one_line() -> Iterator[None]:
    """What goes wrong, in a model of the user's too, becomes one line, and so does a warning."""
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


def _model(
    model: str,
    given: str,
    samples: int,
    seed: int,
    device: str,
    checkpoint: Path | None,
    evaluating: bool,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model, on its device, and its inputs by name, that of a single one being empty."""
    torch.manual_seed(seed)  # for the weights: this process is the command's own
    where, _, name = model.partition(":")
    if not name:
        raise ValueError(f"MODEL must be package.module:NAME or file.py:NAME, got {model!r}")
    found = getattr(_module(where), name)
    net = found if isinstance(found, torch.nn.Module) or not callable(found) else found()
    if not isinstance(net, torch.nn.Module):
        raise TypeError(f"MODEL must be a torch.nn.Module or make one, got {type(net).__name__}")
    if checkpoint is not None:
        net.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    if evaluating:
        net.eval()
    dtype = next((x.dtype for x in net.parameters() if x.is_floating_point()), torch.float32)
    inputs = _inputs(given, samples, seed)
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return net.to(_check.device(device)), cast


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    spec = spec_from_file_location(Path(where).stem, where)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.insert(0, str(Path(where).resolve().parent))  # as if it were run
    spec.loader.exec_module(module)
    return module


def _batches(inputs: dict[str, torch.Tensor], size: int) -> Iterator[Any]:
    for first in range(0, len(next(iter(inputs.values()))), size):
        part = {name: x[first : first + size] for name, x in inputs.items()}
        yield part.get("", part)


def _inputs(given: str, samples: int, seed: int) -> dict[str, torch.Tensor]:
    if given == "digits":
        return {"": data.digits().images[:samples]}
    if given.endswith((".npy", ".npz")):
        read = np.load(given, allow_pickle=False)
        if given.endswith(".npz"):
            with read:
                arrays = dict(read)
        else:
            arrays = {"": read}
        for array in arrays.values():
            if array.ndim < 1 or array.dtype.kind not in "biuf":
                raise ValueError(
                    f"--input must hold numbers, inputs along the first dimension, got {array.dtype} {array.shape}"
                )
        if len({len(array) for array in arrays.values()}) != 1:
            raise ValueError(
                f"--input must hold arrays of as many inputs each, got { ({k: x.shape for k, x in arrays.items()}) }"
            )
        return {name: torch.from_numpy(array[:samples]) for name, array in arrays.items()}
    try:
        shape = [int(size) for size in given.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise ValueError(
            f"--input must be sizes like 3,32,32, digits or a file FILE.npy or FILE.npz, got {given!r}"
        )
    return {"": data.gaussian(samples, *shape, seed=seed)}


def _run(
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
    parts = _swept(
        simulation.simulate, points, output=output, store=store, resume=resume, workers=workers
    )
    records = []
    for width in counts:
        mine = [part for part in parts if part.attrs["width"] == width]
        joined = xr.concat(mine, "network", combine_attrs="drop_conflicts")
        seconds = sum(part.attrs["wall_time"] for part in mine)
        records.append(joined.assign_attrs(networks=counts[width], wall_time=seconds))
    return records


def _swept(
    function: Callable[..., xr.Dataset],
    points: list[dict[str, Any]],
    *,
    output: Path,
    store: Path | None,
    resume: bool,
    workers: int,
    common: dict[str, Any] | None = None,
) -> list[xr.Dataset]:
    """The records of a sweep; what goes wrong becomes one line."""
    store = store or output.with_name(output.name + ".store")
    try:
        if not resume and any(store.glob("*.nc")):
            raise ValueError(f"store must be empty without --resume, got {store}")
        if not resume and output.exists():
            raise ValueError(f"output must not exist without --resume, got {output}")
        output.parent.mkdir(parents=True, exist_ok=True)
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
