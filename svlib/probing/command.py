"""``svlib probe`` and ``svlib init``: any torch model on the command line."""

from __future__ import annotations

import ast
import difflib
import importlib
import io
import shlex
import sys
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from svlib._command import DEVICE, Target, one_line, with_options
from svlib._files import provenance, write_whole
from svlib.experiments import data
from svlib.probing import files, report
from svlib.probing import init as repair
from svlib.probing.diagnosis import explain
from svlib.probing.models import named_modules
from svlib.probing.rows import POSITIONS

_MODEL = [
    click.argument("model", metavar="MODEL"),
    click.option(
        "--input",
        "given",
        required=True,
        help="Shape of one input, for Gaussian noise (3,32,32); digits; FILE.npy; or FILE.npz, "
        "arguments by name.",
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
    DEVICE,
    click.option(
        "--checkpoint",
        type=click.Path(path_type=Path, exists=True),
        help="State dictionary of the model, also wrapped (state_dict) or prefixed (module.).",
    ),
    click.option(
        "--tokens",
        type=click.IntRange(1),
        metavar="VOCABULARY",
        help="Random integers below VOCABULARY in the shape of --input, instead of noise.",
    ),
    click.option(
        "--arg",
        "arguments",
        multiple=True,
        metavar="NAME=VALUE",
        help="Argument for what makes the model, repeatable: --arg depth=12 --arg norm=batch.",
    ),
    click.option(
        "--eval",
        "evaluating",
        is_flag=True,
        help="Evaluation mode.  [default: the mode MODEL comes in]",
    ),
]


@click.command()
@with_options(*_MODEL)
@click.option(
    "--batch", type=click.IntRange(1), default=64, show_default=True, help="Inputs at a time."
)
@click.option(
    "--layer", "layers", multiple=True, help="Name of an output, * a wildcard, repeatable; or all."
)
@click.option("--positions", type=click.Choice(POSITIONS), default="samples", show_default=True)
@click.option("--html", "page", type=Target(), help="Report to write.")
@click.option("--table", type=Target(), help=f"Table to write: {', '.join(files.TABLES)}.")
def probe(
    batch: int,
    layers: tuple[str, ...],
    positions: str,
    page: Path | None,
    table: Path | None,
    **options: Any,
) -> None:
    """Measure a model and explain what is wrong.

    One row a layer, with what theory expects, and findings in words.

    MODEL is package.module:NAME or path/to/file.py:NAME, where NAME is a torch module or makes one,
    from the arguments that --arg gives. Files may hold float64, which is cast to the model's type;
    integers stay what they are.
    """
    started = time.perf_counter()
    with one_line():
        files.check_table(table)
        model, inputs = _model(**options)
        _check_layers(model, layers)
        batches = tqdm(list(_batches(inputs, batch)), desc="probe", unit="batch", disable=None)
        chosen = "all" if layers == ("all",) else list(layers) or None
        explanation = explain(model, batches, layers=chosen, positions=positions)
        click.echo(
            explanation.layers().to_string(index=False, float_format="{:.3g}".format, na_rep="")
        )
        click.echo(f"\n{explanation}")
        if table is not None:
            files.write_table(explanation.table, table)
            click.echo(f"{table}: written")
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


@click.command()
@with_options(*_MODEL)
@click.option(
    "--method", type=click.Choice(["total", "sample"]), default="sample", show_default=True
)
@click.option("--gradients", is_flag=True, help="Measure squared gradients before and after, too.")
@click.option("--output", type=Target(), required=True, help="State dictionary to write.")
def init(method: str, gradients: bool, output: Path, **options: Any) -> None:
    """Initialize a model from data.

    Total or sample init; the weights are written.

    MODEL as in probe. Load the weights with torch.load(OUTPUT, weights_only=True).
    """
    with one_line():
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


def _model(
    model: str,
    given: str,
    samples: int,
    seed: int,
    device: str,
    checkpoint: Path | None,
    evaluating: bool,
    tokens: int | None,
    arguments: tuple[str, ...],
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model on its device, and its inputs by name; a single one has an empty name."""
    torch.manual_seed(seed)  # for the weights: this process is the command's own
    where, _, name = model.partition(":")
    if not name:
        raise ValueError(f"MODEL must be package.module:NAME or file.py:NAME, got {model!r}")
    found = getattr(_module(where), name)
    made = isinstance(found, torch.nn.Module) or not callable(found)
    if made and arguments:
        raise ValueError(f"--arg must go with a function or class, got the model {name!r}")
    net = found if made else found(**_arguments(arguments))
    if not isinstance(net, torch.nn.Module):
        raise TypeError(f"MODEL must be a torch.nn.Module or make one, got {type(net).__name__}")
    if checkpoint is not None:
        files.load_checkpoint(net, checkpoint)
    if evaluating:
        net.eval()
    dtype = next((x.dtype for x in net.parameters() if x.is_floating_point()), torch.float32)
    inputs = _inputs(given, samples, seed, tokens)
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return net.to(device), cast


def _arguments(given: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE: a number, True, a tuple and so on, or else a string."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--arg must be NAME=VALUE, got {text!r}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _check_layers(model: torch.nn.Module, layers: tuple[str, ...]) -> None:
    """Raise for the name of a module that the model does not have; functions have other names."""
    names = [name for name, _ in named_modules(model) if name]
    for layer in layers:
        plain = not set("*?[(/") & set(layer) and layer != "all"
        if names and plain and layer not in names:
            near = difflib.get_close_matches(layer, names, 5, 0.4) or names[:5]
            told = f"one of {len(names)} names like {', '.join(near)}"
            raise ValueError(f"--layer must be {told}, got {layer!r}")


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


def _inputs(given: str, samples: int, seed: int, tokens: int | None) -> dict[str, torch.Tensor]:
    if given == "digits":
        return {"": data.digits().images[:samples]}
    if given.endswith((".npy", ".npz")):
        arrays = _arrays(given)
        return {name: torch.from_numpy(array[:samples]) for name, array in arrays.items()}
    try:
        shape = [int(size) for size in given.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise ValueError(
            "--input must be sizes like 3,32,32, digits or a file FILE.npy or FILE.npz, "
            f"got {given!r}"
        )
    if tokens is None:
        return {"": data.gaussian(samples, *shape, seed=seed)}
    generator = torch.Generator().manual_seed(seed)
    return {"": torch.randint(tokens, (samples, *shape), generator=generator)}


def _arrays(given: str) -> dict[str, Any]:
    """The arrays of a file by name, of as many inputs each."""
    read = np.load(given, allow_pickle=False)
    if given.endswith(".npz"):
        with read:
            arrays = dict(read)
    else:
        arrays = {"": read}
    for array in arrays.values():
        if array.ndim < 1 or array.dtype.kind not in "biuf":
            raise ValueError(
                "--input must hold numbers, inputs along the first dimension, "
                f"got {array.dtype} {array.shape}"
            )
    if len({len(array) for array in arrays.values()}) != 1:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"--input must hold arrays of as many inputs each, got {shapes}")
    return arrays
