"""The site alone is enough: the archive in it, unpacked elsewhere, holds what a chapter needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book"))
import archive  # noqa: E402


def test_the_archive_holds_the_project_and_a_chapter_runs_from_it(
    site: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(site / f"{archive.NAME}.zip") as packed:
        packed.extractall(tmp_path)
    top = tmp_path / archive.NAME
    for name in ("README.md", "pyproject.toml", "svlib/__init__.py", "_config.yml", "_toc.yml"):
        assert (top / name).read_bytes() == (ROOT / name).read_bytes()
    chapters = {path.name for path in (ROOT / "book").glob("*.ipynb")}
    assert {path.name for path in (top / "book").glob("*.ipynb")} == chapters
    assert not list(top.rglob("_build"))
    notebook = nbformat.read(top / "book" / "appendix-law.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    code = "import matplotlib; matplotlib.use('agg')\n" + "\n".join(cells)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=top / "book",
        env={"PYTHONPATH": str(top), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_equal_files_give_equal_archives(tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        archive.pack(ROOT, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_without_git_what_builds_leave_behind_is_left_out(tmp_path: Path) -> None:
    for name in ("book/a.md", "_build/b", ".venv/c", "svlib.egg-info/d", "svlib/__pycache__/e"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert archive.files(tmp_path) == [Path("book/a.md")]


def test_a_chapter_alone_says_what_it_needs(tmp_path: Path) -> None:
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        first = next(cell.source for cell in cells if cell.cell_type == "code")
        done = subprocess.run(
            [sys.executable, "-I", "-c", first],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("This page needs the files beside it"), path
        assert "Traceback" not in done.stderr
