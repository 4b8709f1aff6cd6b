"""The project's own promises: rooms, sizes, versions, the wheel, notebooks, claims."""

import ast
import csv
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml

from svlib.experiments import training

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book"))
import claims  # noqa: E402

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))

PACKAGE = ROOT / "svlib"
GROUND = {
    "_activations",
    "_check",
    "_files",
    "_kernels",
    "_random",
    "_sums",
    "_threads",
}  # every room but theory's may import them
ROOMS = {  # room: what else of svlib it may import, as docstrings and CONTRIBUTING describe
    "_activations": "",
    "_check": "",
    "_kernels": "",
    "_sums": "",
    "_random": "",
    "_threads": "",
    "_files": "",
    "_command": "",
    # the main house
    "moments": "",
    "gram": "",
    "layers": "",
    "ensemble": "gram layers",
    "simulation": "ensemble gram moments",
    "pairs": "",
    "plot": "simulation",
    "theory.activations": "",
    "theory.maps": "theory.activations",
    "theory.depth": "theory.activations",
    "theory.edge": "theory.activations",
    "theory.batchnorm": "theory.maps",
    "theory.limits": "theory.activations theory.depth theory.maps",
    "theory.width": "theory.activations theory.angles theory.batchnorm theory.maps theory.depth",
    "theory.angles": "theory.depth",
    "theory.fluctuations": "theory.activations theory.depth theory.maps theory.width",
    "theory": "theory.batchnorm theory.limits theory.maps theory.depth theory.edge theory.width "
    "theory.angles theory.fluctuations",
    # the wing for models
    "probing": "",
    "probing.findings": "",
    "probing.models": "",
    "probing.batches": "probing.models",
    "probing.passes": "probing.models",
    "probing.report": "plot probing.findings",
    "probing.scales": "probing.models",
    "probing.places": "probing.batches probing.models probing.passes",
    "probing.rows": "moments probing.batches probing.models",
    "probing.forward": "probing.models probing.passes probing.places probing.rows",
    "probing.operations": "probing.places",
    "probing.extras": "probing.operations probing.passes probing.rows",
    "probing.functions": "probing.operations",
    "probing.setter": "moments probing.batches probing.forward probing.models "
    "probing.passes probing.rows probing.scales",
    "probing.graph": "probing.functions probing.operations probing.passes probing.rows",
    "probing.along": "probing.graph probing.operations probing.rows theory.activations",
    "probing.replacing": "probing.functions probing.graph probing.models "
    "probing.operations probing.passes",
    "probing.scaling": "probing.findings probing.functions probing.graph probing.operations",
    "probing.trace": "probing.extras probing.forward probing.functions "
    "probing.graph probing.models probing.operations "
    "probing.passes probing.places probing.rows",
    "probing.detectors": "probing.findings probing.functions probing.graph probing.operations "
    "probing.places probing.scaling",
    "probing.probe": "probing.batches probing.forward probing.models "
    "probing.places probing.rows probing.trace",
    "probing.removal": "probing.batches probing.extras probing.forward probing.functions "
    "probing.graph probing.models probing.operations "
    "probing.passes probing.places probing.replacing probing.rows",
    "probing.watch": "probing.batches probing.forward probing.models "
    "probing.passes probing.places probing.rows probing.trace",
    "probing.causes": "probing.detectors probing.findings probing.functions probing.graph "
    "probing.passes probing.removal probing.replacing "
    "probing.rows",
    "probing.init": "probing.batches probing.forward probing.models "
    "probing.passes probing.places probing.probe probing.rows "
    "probing.setter",
    "probing.cures": "probing.batches probing.detectors probing.findings probing.functions "
    "probing.graph probing.init probing.models probing.operations "
    "probing.places probing.probe probing.removal probing.scales "
    "probing.trace",
    "probing.explanation": "probing.along probing.batches probing.causes probing.cures "
    "probing.places "
    "probing.detectors probing.findings probing.models "
    "probing.probe probing.removal probing.report probing.rows "
    "probing.trace",
    "probing.command": "_command experiments.data probing.explanation probing.init probing.report",
    # the wing for training
    "experiments": "",
    "experiments.command": "_command commands experiments.data experiments.task "
    "experiments.training",
    "experiments.networks": "",
    "experiments.data": "",
    "experiments.experiment": "",
    "experiments.state": "experiments.experiment",
    "experiments.task": "experiments.experiment experiments.data experiments.networks "
    "probing.probe probing.init",
    "experiments.comparison": "experiments.experiment",
    "experiments.training": "experiments.experiment experiments.state experiments.task "
    "experiments.comparison experiments.data experiments.networks probing.probe probing.init",
    # logistics
    "sweep": "",
    "__main__": "",
    "commands": "_command ensemble simulation sweep",
}
MAIN_HOUSE = ("moments", "gram", "layers", "ensemble", "simulation", "pairs", "plot", "theory")


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {room(path): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES.pop("")  # it knows every room


@cache
def imports(name: str) -> set[str]:
    """The rooms that a room imports, but for the version in svlib itself."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative name"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {text.removeprefix("svlib.") for text in found if text.startswith("svlib.")}
    rooms = inside & set(FILES)
    # from svlib.probing import calls names two rooms, of which the package is only on the way
    return {text for text in rooms if not any(other.startswith(f"{text}.") for other in rooms)}


@cache
def reached(name: str) -> set[str]:
    """The rooms that a room imports, directly or through others."""
    found, open_ = set(), {name}
    while open_:
        found |= open_
        open_ = set().union(*map(imports, open_)) - found
    return found - {name}


def test_table_of_rooms_is_complete() -> None:
    assert sorted(set(FILES) - set(ROOMS)) == [], "add new rooms to ROOMS: what may they import?"
    assert sorted(set(ROOMS) - set(FILES)) == [], "take rooms that are gone out of ROOMS"


@pytest.mark.parametrize("name", sorted(set(FILES) & set(ROOMS)))
def test_rooms_import_only_what_they_may(name: str) -> None:
    ground = {"_activations", "_check"} if name.startswith("theory") else GROUND
    wrong = sorted(imports(name) - set(ROOMS[name].split()) - ground - {name})
    assert wrong == [], f"{name} must not import {', '.join(wrong)}"


def test_observation_and_theory_do_not_know_each_other() -> None:
    theory = {name for name in FILES if name.split(".")[0] == "theory"}
    for name in ("moments", "simulation", "pairs", "probing.graph", "probing.probe"):
        assert reached(name) & theory == set(), f"{name} observes"
    for name in theory:
        assert reached(name) <= theory | {"_activations", "_check"}


def test_main_house_and_sweep_know_no_wing() -> None:
    wings = {name for name in FILES if name.split(".")[0] in ("probing", "experiments")}
    for name in FILES:
        if name.split(".")[0] in MAIN_HOUSE:
            assert reached(name) & wings == set(), f"{name} is in the main house"
    assert reached("sweep") <= GROUND


def test_imports_go_round_in_no_circle() -> None:
    assert [name for name in FILES if name in set().union(*map(reached, imports(name)))] == []


def lines(node: ast.FunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_in_one_sitting(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, "a file has at most 400 lines: split it"
    long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
    assert long == [], "a line has at most 100 columns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert lines(node) <= 60, f"{node.name}: a function has at most 60 lines"
        elif isinstance(node, ast.ClassDef):
            assert lines(node) <= 120, f"{node.name}: a class has at most 120 lines"


def test_tables_have_no_hidden_attributes() -> None:
    """Records, which are Datasets, have attributes; tables, which pandas copies, have none."""
    for name, path in FILES.items():
        if name.split(".")[0] == "probing":
            assert ".attrs" not in path.read_text(encoding="utf-8"), f"{name} makes tables"


def requirement(text: str) -> str:
    return re.split(r"[<>=!~\[; ]", text, maxsplit=1)[0].lower().replace("_", "-")


def pins(name: str = "constraints.txt") -> dict[str, str]:
    texts = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [text.split("==") for text in texts if text and not text.startswith("#")]
    return {requirement(package): version.strip() for package, version in pairs}


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"plot", "train", "book", "test", "cluster", "models"}
    named = [*project["dependencies"], *(text for texts in extras.values() for text in texts)]
    named = [text for text in named if requirement(text) != "svlib"]  # an extra with others in it
    assert [text for text in named if requirement(text) not in pins()] == []
    for text in named:
        if "==" in text:
            assert pins()[requirement(text)] == text.split("==")[1]
    for text in (*project["dependencies"], *extras["plot"], *extras["train"]):  # 8.1 is 8.1.0
        lowest = pins("constraints-lowest.txt").get(requirement(text), "")
        assert re.fullmatch(rf"{text.split('>=')[1]}(\.0)*", lowest), text
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installed = re.search(r"^EXTRAS \?= (.*)$", makefile, re.MULTILINE)
    assert installed is not None
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["--constraint constraints.txt", f"--editable .[{installed[1]}]"]
    assert f"python{project['requires-python']}" in environment["dependencies"]


@pytest.mark.skipif("PINNED" not in os.environ, reason="other versions than the pinned may serve")
def test_installed_versions_are_the_pinned_ones() -> None:
    pinned = pins()
    installed = {
        requirement(package.name): package.version.split("+")[0] for package in distributions()
    }
    differ = {name for name in installed.keys() & pinned if installed[name] != pinned[name]}
    assert differ == set()


PROBED = """
from torch import nn
model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
"""


@pytest.mark.slow
def test_wheel_works_in_an_empty_folder(tmp_path: Path) -> None:
    """Built from a copy of what git tracks, installed apart, run where nothing else lies."""

    def run(*words: str | Path, **options: Any) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    source, target, empty = tmp_path / "source", tmp_path / "target", tmp_path / "empty"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(PACKAGE, source / "svlib", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet")
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "wheel", *options, "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("svlib-*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel)
    assert {
        room(PACKAGE / path.relative_to(target / "svlib")) for path in target.rglob("*.py")
    } == {
        "",
        *FILES,
    }
    assert (target / "svlib" / "py.typed").is_file()

    empty.mkdir()
    (empty / "model.py").write_text(PROBED, encoding="utf-8")
    clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(target), "HOME": str(empty)}
    here = {"cwd": empty, "env": clean}
    version = run(sys.executable, "-c", "import svlib; print(svlib.__file__)", **here)
    assert version.strip() == str(target / "svlib" / "__init__.py")
    svlib = target / "bin" / "svlib"
    words = "simulate 32 --networks 2 --depth 3 --samples 8 --output x.nc"
    assert run(svlib, *words.split(), **here).startswith("x.nc: ")
    assert xr.load_dataset(empty / "x.nc").sizes == {"network": 2, "layer": 4}
    words = "probe model.py:model --input 6 --html page.html"
    assert "Linear" in run(svlib, *words.split(), **here)
    assert (empty / "page.html").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_executed_and_readable(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert max(len(cell.source.splitlines()) for cell in cells) <= 25
    for cell in cells:
        if any("image/svg+xml" in output.get("data", {}) for output in cell.outputs):
            figure = cell.metadata["mystnb"]
            assert figure["figure"]["caption"]
            assert figure["figure"]["name"]
            assert figure["image"]["alt"]
    text = path.read_text(encoding="utf-8")
    assert str(ROOT) not in text
    assert "/home/" not in text


SCALED = ("claim", "verdict", "ours", "expected", "scale")


@pytest.mark.parametrize("chapter", claims.CHAPTERS)
def test_stored_claims_are_those_of_the_chapter(chapter: str) -> None:
    cells = [
        cell
        for path in (ROOT / "book").glob("*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
    ]
    call = f'claims.report("{chapter}"'
    (reporting,) = (x for x in cells if call in x.source.replace("(\n    ", "("))
    shown = reporting.outputs[-1].data["text/markdown"]
    stored = claims.stored(chapter)
    assert shown == claims.shown(stored).data
    stated = claims.stated()[chapter]
    assert {row["key"]: row["claim"] for row in stored} == {
        key: claim["text"] for key, claim in stated.items()
    }


def test_index_and_readme_show_the_stored_claims() -> None:
    def shown(name: str) -> list[str]:
        notebook = nbformat.read(ROOT / "book" / f"{name}.ipynb", as_version=4)
        outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
        texts = (output.get("data", {}).get("text/markdown") for output in outputs)
        return [text for text in texts if text]

    assert shown("index") == [claims.six().data]
    page = shown("claims")
    order = ("6a", "6b", "5", "4", "3", "2", "1")
    assert page[:7] == [claims.shown(claims.of(n), *[SCALED] * (n[0] == "6")).data for n in order]
    assert page[7] == claims.shown(claims.of("0")).data
    everything = [row for chapter in claims.CHAPTERS for row in claims.stored(chapter)]
    assert len(everything) == sum(len(claims.of(n)) for n in ("0", *claims.PAPER))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = readme.split(claims.BEGIN)[1].split(claims.END)[0]
    assert lines == claims.six("book/{chapter}.ipynb", coloured=False).data
    picture = (ROOT / "book" / "results" / "collapse.svg").read_text(encoding="utf-8")
    assert picture == claims.figure("index", "fig-index")


def test_failures_come_first_and_a_scale_is_said() -> None:
    claim = {"text": "a", "paper": 1, "relation": ">", "digits": 1, "source": "b"}
    small = claims._row("key", claim | {"scale": "half"}, 1.5, 0.1)
    assert small["verdict"] == "same order"
    assert small["deviation"] == "+5.0 errors"
    rows = [small, small | {"verdict": "differs"}, small | {"verdict": "open"}]
    text = str(claims.shown(rows).data)
    assert text.index("differs") < text.index("open") < text.index("same order")
    assert claims.overall(rows) == "differs"


def test_tolerances_of_the_figure_notice_a_shift_by_one_layer() -> None:
    record = xr.load_dataset(ROOT / "book" / "results" / "finite-width.nc")
    for shift in (-1, 1):
        verdicts = set()
        for key, claim in claims.stated()["03-finite-width"].items():
            if match := re.fullmatch(r"(width|early)(\d+)", key):
                layer = {"width": 49, "early": 10}[match[1]] + shift
                found = record.ratio.sel(width=int(match[2]))
                at = claims.value(found, layer=min(layer, 49))
                verdicts.add(claims.verdict("=", claim["paper"], *at, claim["tolerance"]))
        assert "differs" in verdicts


@pytest.mark.parametrize(
    ("relation", "paper", "ours", "error", "tolerance", "verdict"),
    [
        ("=", 1.0, 1.05, 0.0, 0.1, "reproduced"),
        ("=", 1.0, 1.15, 0.0, 0.1, "differs"),
        ("=", 1.0, 1.0, 0.2, 0.1, "open"),
        (">", 1.0, 1.3, 0.1, 0.0, "reproduced"),
        (">", 1.0, 1.1, 0.1, 0.0, "open"),
        (">", 1.0, 0.7, 0.1, 0.0, "differs"),
        ("<", 1.0, 0.7, 0.1, 0.0, "reproduced"),
        ("<", 1.0, 1.3, 0.1, 0.0, "differs"),
    ],
)
def test_verdicts(
    relation: str, paper: float, ours: float, error: float, tolerance: float, verdict: str
) -> None:
    assert claims.verdict(relation, paper, ours, error, tolerance) == verdict


def test_claims_are_complete(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found must have the claims"):
        claims.report("03-finite-width", {"width30": (1.0, 0.1)})


def test_paper_figure_has_the_points_that_were_read_off() -> None:
    with (ROOT / "book" / "results" / "paper-figure.csv").open(encoding="utf-8") as file:
        rows = {
            (int(row["width"]), int(row["layer"])): float(row["ratio"])
            for row in csv.DictReader(file)
        }
    assert len(rows) == 16
    assert rows[30, 49] == 1.87
    assert rows[3000, 49] == 8.05


IMPORTS = """
import contextlib, io, sys

def loaded(*names):
    return sorted(name for name in names if sys.modules.get(name))

def fails(function):
    try:
        function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

from click.testing import CliRunner
import svlib as sv
from svlib.__main__ import main

HEAVY = "numpy", "pandas", "scipy", "torch", "xarray"
EXTRAS = "matplotlib", "sympy", "sklearn", "PIL", "pooch", "numba", "transformers", "distributed"
assert "simulate" in CliRunner().invoke(main, ["--help"]).output
print(loaded(*HEAVY, *EXTRAS))
import torch
net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
y = torch.randn(50, 4)
sv.decompose(y), sv.probe(net, y), sv.explain(net, y), sv.init.sample_(net, y)
sv.theory.finite_width(9, 3), sv.simulate, sv.summarize, sv.simulate_angles
sys.modules.pop("sympy", None)  # a part of torch imports it
print(loaded(*EXTRAS))
for name in EXTRAS:
    sys.modules[name] = None  # as if it were not installed
print(fails(lambda: sv.plot), fails(lambda: sv.data), sep="\\n")
print(CliRunner().invoke(main, ["train", "--help"]).output.strip())
for name in EXTRAS:
    del sys.modules[name]
with contextlib.redirect_stdout(io.StringIO()) as printed:
    exec(sys.argv[1])
print(printed.getvalue(), end="")
"""


def test_imports_and_the_readme_s_example() -> None:
    """In one process: what is imported when, what is said of packages that are missing, and what
    the README shows."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, printed = (
        re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "text")
    )
    assert code is not None
    assert printed is not None
    words = [sys.executable, "-W", "ignore", "-c", IMPORTS, code[1]]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    missing = "{} is not installed: pip install 'svlib[{}]', or '.[{}]' in the project's folder"
    plot, train = missing.format("matplotlib", *["plot"] * 2), missing.format("PIL", *["train"] * 2)
    assert done.stdout == (
        f"[]\n[]\nModuleNotFoundError: {plot}\nModuleNotFoundError: {train}\nError: {train}\n"
        + printed[1]
    )


@pytest.mark.parametrize(("data", "seeds"), [("cifar10", 6), ("micrographs", 6)])
def test_stored_training_is_what_the_chapter_s_command_makes(data: str, seeds: int) -> None:
    chapter = (ROOT / "book" / "appendix-runs.ipynb").read_text(encoding="utf-8")
    assert f"python -m svlib train {data} --scale laptop --seeds {seeds} " in chapter
    record = xr.load_dataset(ROOT / "book" / "results" / f"training-{data}.nc")
    points = training.grid(data, "laptop", seeds=seeds)
    assert record.diverged.size == len(points)
    for point in points:
        experiment = training.Experiment(**point["experiment"])
        run = record.sel(
            initialization=experiment.initialization,
            learning_rate=experiment.learning_rate,
            seed=point["seed"],
        )
        done = experiment.iterations if run.diverged < 0 else int(run.diverged)
        assert np.isfinite(run.loss[:done]).all()
        assert np.isnan(run.loss[done:]).all()
        assert run.probed.values.tolist() == [0, *experiment.probed, experiment.iterations]
        for name in (
            "data",
            "width",
            "iterations",
            "batch_size",
            "momentum",
            "calibration",
            "channels_last",
        ):
            assert record.attrs[name] == getattr(experiment, name)
    assert sum(path.stat().st_size for path in (ROOT / "book" / "results").rglob("*.*")) < 5e6


def test_stored_architectures_are_the_whole_grid() -> None:
    pytest.importorskip("transformers")
    import architectures

    table = pd.read_csv(ROOT / "book" / "results" / "architectures.csv")
    points = pd.DataFrame(architectures.points())
    pd.testing.assert_frame_equal(table[list(points)], points, check_dtype=False)
    assert table.loss.notna().mean() > 0.9
    run = architectures.train("ViT", "as it comes", 1e-3, seed=0, steps=2)
    assert np.isfinite(run.loss).all()
    best = architectures.best(architectures.losses())
    assert len(best) == len(architectures.ARCHITECTURES) * len(architectures.REPAIRS)
    assert not best.at_edge.any()


def test_every_situation_of_the_reference_has_its_test() -> None:
    rows = re.findall(
        r"^\| .* \| .+ \| `(.+)` \|$", (ROOT / "book" / "api.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) > 30
    for row in rows:
        module, function = row.split(".")
        assert f"def {function}(" in (ROOT / "tests" / f"{module}.py").read_text("utf-8"), row
