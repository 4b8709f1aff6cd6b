"""The project's own promises: rooms, versions, notebooks, claims."""

import ast
import csv
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml

from svlib.experiments import training

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book"))
import architectures  # noqa: E402
import claims  # noqa: E402

NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))

ROOMS = {  # module: what it may import of svlib, beside the private helpers
    "moments": set(),
    "theory": {"theory"},
    "simulation": {"moments"},
    "angles": set(),
    "sweep": set(),
    "__main__": {
        "data",
        "explanation",
        "init",
        "probing",
        "report",
        "simulation",
        "sweep",
        "training",
    },
    "calls": set(),
    "probing": {"calls", "moments"},
    "explanation": {"calls", "theory"},
    "init": {"calls", "explanation", "moments", "probing"},
    "networks": set(),
    "data": set(),
    "training": {"data", "init", "networks", "probing"},
    "plot": set(),
    "report": {"explanation", "plot"},
}


def imports(path: Path) -> set[str]:
    """Names of the library's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "svlib"
        ):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = (
        (ROOT / "svlib").glob("theory/*.py")
        if room == "theory"
        else [ROOT / "svlib" / f"{room}.py"]
    )
    assert set().union(*map(imports, files)) <= ROOMS[room]


def test_derivations_and_numbers_do_not_know_each_other() -> None:
    for name in ("maps", "trajectory", "finite_width", "angles"):
        assert "symbolic" not in (ROOT / "svlib" / "theory" / f"{name}.py").read_text(
            encoding="utf-8"
        )
    assert imports(ROOT / "svlib" / "theory" / "symbolic.py") == set()


def requirement(text: str) -> str:
    return re.split(r"[<>=!~\[; ]", text, maxsplit=1)[0].lower().replace("_", "-")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        requirement(line): line.split("==")[1].strip()
        for line in lines
        if line and not line.startswith("#")
    }


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"book", "test", "cluster", "models"}
    named = [*project["dependencies"], *(text for texts in extras.values() for text in texts)]
    assert [text for text in named if requirement(text) not in pins()] == []
    for text in named:
        if "==" in text:
            assert pins()[requirement(text)] == text.split("==")[1]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["--constraint constraints.txt", f"--editable .[{','.join(extras)}]"]
    assert f"python{project['requires-python']}" in environment["dependencies"]
    assert pins()["torch"] == "2.13.0"


def test_installed_versions_are_the_pinned_ones() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=freeze"],
        capture_output=True,
        text=True,
        check=True,
    )
    installed = dict(line.split("==") for line in listed.stdout.splitlines() if "==" in line)
    installed = {requirement(name): version.split("+")[0] for name, version in installed.items()}
    assert {
        name: version
        for name, version in installed.items()
        if name in pins() and pins()[name] != version
    } == {}


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


@pytest.mark.parametrize("chapter", claims.CHAPTERS)
def test_stored_claims_are_those_of_the_chapter(chapter: str) -> None:
    notebook = nbformat.read(ROOT / "book" / f"{chapter}.ipynb", as_version=4)
    shown = (
        [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
        .outputs[-1]
        .data["text/markdown"]
    )
    assert shown == claims.table(claims.stored(chapter), claims.COLUMNS).data
    stated = tomllib.loads((ROOT / "book" / "claims.toml").read_text(encoding="utf-8"))[chapter]
    assert [row[0] for row in claims.stored(chapter)] == [
        claim["text"] for claim in stated.values()
    ]


def test_index_and_readme_show_the_stored_claims() -> None:
    index = nbformat.read(ROOT / "book" / "index.ipynb", as_version=4)
    shown = [
        output.data["text/markdown"]
        for cell in index.cells
        for output in cell.get("outputs", [])
        if "data" in output and "text/markdown" in output.data
    ]
    assert shown == [claims.overview().data]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        readme.split(claims.BEGIN)[1].split(claims.END)[0]
        == claims.overview("[{number}](book/{chapter}.ipynb)").data
    )
    assert (ROOT / "book" / "results" / "finite-width.svg").read_text(
        encoding="utf-8"
    ) == claims.figure("03-finite-width", "fig-finite-width")


@pytest.mark.parametrize(
    ("relation", "paper", "ours", "error", "tolerance", "verdict"),
    [
        ("=", 1.0, 1.05, 0.0, 0.1, "reproduced"),
        ("=", 1.0, 1.15, 0.0, 0.1, "**differs**"),
        ("=", 1.0, 1.0, 0.2, 0.1, "unresolved"),
        (">", 1.0, 1.3, 0.1, 0.0, "reproduced"),
        (">", 1.0, 1.1, 0.1, 0.0, "unresolved"),
        (">", 1.0, 0.7, 0.1, 0.0, "**differs**"),
        ("<", 1.0, 0.7, 0.1, 0.0, "reproduced"),
        ("<", 1.0, 1.3, 0.1, 0.0, "**differs**"),
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


def test_readme_example_runs() -> None:
    block = next(
        re.finditer(
            r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
        )
    ).group(1)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "hidden" in done.stdout or "v2" in done.stdout


@pytest.mark.parametrize(("data", "seeds"), [("cifar10", 6), ("micrographs", 6)])
def test_stored_training_is_what_the_chapter_s_command_makes(data: str, seeds: int) -> None:
    chapter = (ROOT / "book" / "05-training.ipynb").read_text(encoding="utf-8")
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
    table = pd.read_csv(ROOT / "book" / "results" / "architectures.csv")
    points = pd.DataFrame(architectures.points())
    pd.testing.assert_frame_equal(table[list(points)], points, check_dtype=False)
    assert table.loss.notna().mean() > 0.9
    run = architectures.train("ViT", "as it comes", 1e-3, seed=0, steps=2)
    assert np.isfinite(run.loss).all()
    best = architectures.best(table)
    assert len(best) == len(architectures.ARCHITECTURES) * len(architectures.REPAIRS)
    assert not best.at_edge.any()
