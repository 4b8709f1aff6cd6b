"""Once the repository's address is set in ``_config.yml``, chapters get launch buttons."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_launch_buttons_appear_with_a_repository(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    for folder in ("book", "_static"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    kept = ("index", "01-two-variances", "notation")  # the glossary links to the last
    for path in (tmp_path / "book").iterdir():
        if path.suffix in (".ipynb", ".md") and path.stem not in kept:
            path.unlink()
    chapters = [{"file": f"book/{name}"} for name in kept[1:]]
    toc = {"format": "jb-book", "root": f"book/{kept[0]}", "chapters": chapters}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    assert "launch" not in re.sub(r"^#.*$", "", config, flags=re.MULTILINE)
    config, uncommented = re.subn(
        r"^# (repository:|launch_buttons:|  )", r"\1", config, flags=re.MULTILINE
    )
    assert uncommented == 7
    (tmp_path / "_config.yml").write_text(
        config.replace("OWNER/REPOSITORY", "example/example"), encoding="utf-8"
    )
    command = Path(sys.executable).with_name("jupyter-book")
    done = subprocess.run([command, "build", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "_build" / "html" / "book" / "01-two-variances.html").read_text(
        encoding="utf-8"
    )
    for service in (
        "mybinder.org/v2/gh/example/example",
        "colab.research.google.com/github/example/example",
    ):
        assert service in page
