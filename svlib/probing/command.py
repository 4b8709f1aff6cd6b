"""``svlib probe``, ``svlib check`` and ``svlib init``: any torch model on the command line."""

from __future__ import annotations

import importlib
import io
import json
import math
import shlex
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from svlib._command import DEVICE, Target, one_line, with_options
from svlib._files import provenance, write_whole
from svlib.experiments import data
from svlib.probing import init as repair
from svlib.probing.explanation import Explanation, explain

_MODEL = [
    click.argument("model", metavar="MODEL"),
    click.option(
        "--input", "given", required=True,
        help="Shape of one input, for Gaussian noise (3,32,32); digits; FILE.npy; or FILE.npz, "
        "arguments by name.",
    ),
    click.option("--samples", type=click.IntRange(2), default=256, show_default=True,
                 help="Inputs, at most those of the file."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                 help="Of the weights and of the noise."),
    DEVICE,
    click.option("--tokens", type=click.IntRange(1), metavar="VOCABULARY",
                 help="Random integers below VOCABULARY in the shape of --input."),
    click.option("--eval", "evaluating", is_flag=True,
                 help="Evaluation mode.  [default: the mode MODEL comes in]"),
]  # fmt: skip


@click.command()
@with_options(*_MODEL)
@click.option("--html", "page", type=Target(), help="Report to write.")
def probe(page: Path | None, **options: Any) -> None:
    """Measure a model and say what is wrong with it.

    One row a layer, and findings: place, number, cause by removal, cure by trial.

    MODEL is package.module:NAME or path/to/file.py:NAME, where NAME is a torch module or makes one.
    Files may hold float64, which is cast to the model's type; integers stay what they are.
    """
    started = time.perf_counter()
    with one_line():
        explanation, model, inputs = _explained(**options)
        columns = ["name", "type", "fraction", "m2", "v2", "sigma2", "ratio", "dead"]
        table = explanation.table[columns]
        click.echo(table.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
        click.echo(f"\n{explanation}")
        if page is not None:
            from svlib.probing import report  # only here: matplotlib need not be there

            made: dict[str, object] = {
                "command": shlex.join(["python", "-m", "svlib", *sys.argv[1:]])
            }
            shapes = {name: tuple(x.shape) for name, x in inputs.items()}
            made |= {"inputs": shapes.get("", shapes)}
            made |= {"mode": "training" if model.training else "evaluation"}
            made |= provenance(torch.device(options["device"]), started)
            text = report.page(explanation, title=options["model"], provenance=made)
            write_whole(page, text.encode())
            click.echo(f"{page}: written")


@click.command()
@with_options(*_MODEL)
@click.option("--fail-on", default="", metavar="KIND,...",
              help="Kinds of findings that fail.  [default: all but notes]")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(fail_on: str, as_json: bool, **options: Any) -> None:
    """Exit with 1 if a model has findings, for continuous integration.

    MODEL as in probe. Exit code 2: it could not be measured.
    """
    try:
        with one_line():
            explanation, _, _ = _explained(**options)
    except click.ClickException as error:
        error.show()
        raise SystemExit(2) from None
    kinds = {kind.strip() for kind in fail_on.split(",") if kind.strip()}
    found = [x for x in explanation.findings if not x.note and x.kind != "nothing found"]
    bad = [x for x in found if not kinds or x.kind in kinds]
    if as_json:
        click.echo(json.dumps([_plain(x) for x in explanation.findings], indent=1))
    else:
        click.echo("\n".join(map(str, bad)) or f"{explanation}")
    raise SystemExit(1 if bad else 0)


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
        table = initializer(model, inputs.get("", inputs), gradients=gradients)
        click.echo(table.to_string(index=False, float_format="{:.3g}".format))
        content = io.BytesIO()
        torch.save(model.state_dict(), content)
        write_whole(output, content.getvalue())
        click.echo(f"{output}: written")


def _plain(finding: Any) -> dict[str, Any]:
    """A finding as JSON holds it, which knows no infinity."""
    names = ("kind", "place", "text", "value", "decades", "note", "cause", "removed", "cure")
    held = {name: getattr(finding, name) for name in names}
    numbers = {name: x for name, x in held.items() if isinstance(x, float)}
    return held | {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def _explained(**options: Any) -> tuple[Explanation, torch.nn.Module, dict[str, torch.Tensor]]:
    model, inputs = _model(**options)
    return explain(model, inputs.get("", inputs)), model, inputs


def _model(
    model: str,
    given: str,
    samples: int,
    seed: int,
    device: str,
    evaluating: bool,
    tokens: int | None,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model on its device, and its inputs by name; a single one has an empty name."""
    torch.manual_seed(seed)  # for the weights: this process is the command's own
    where, _, name = model.partition(":")
    if not name:
        raise ValueError(f"MODEL must be package.module:NAME or file.py:NAME, got {model!r}")
    found = getattr(_module(where), name)
    net = found if isinstance(found, torch.nn.Module) or not callable(found) else found()
    if not isinstance(net, torch.nn.Module):
        raise TypeError(f"MODEL must be a torch.nn.Module or make one, got {type(net).__name__}")
    if evaluating:
        net.eval()
    dtype = next((x.dtype for x in net.parameters() if x.is_floating_point()), torch.float32)
    inputs = _inputs(given, samples, seed, tokens)
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return net.to(device), cast


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        sys.path.insert(0, "")  # a console script does not look in the current folder
        return importlib.import_module(where)
    path = Path(where).resolve()
    # a name of its own: a file random.py must not replace the standard library's
    spec = spec_from_file_location(f"_svlib_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.append(str(path.parent))  # for what it imports
    spec.loader.exec_module(module)
    return module


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
    arrays = {"": read}
    if given.endswith(".npz"):
        with read:
            arrays = dict(read)
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
