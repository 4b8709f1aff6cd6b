"""The project as an archive beside the built site, made by every build.

A Sphinx extension. What git tracks is packed or, without git, everything but what
builds and environments leave behind. Times are fixed: equal files give equal archives.
If ``make pdf`` has printed the book, the site has that too, among each page's downloads.
"""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

NAME = "sample-variance-decay"
LEFT_OUT = {"_build", "build", "dist", "__pycache__", "node_modules"}


def files(root: Path) -> list[Path]:
    """The project's files, relative to its folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=root,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = listed.stdout.decode("utf-8").split("\0")
        found = [Path(name) for name in names if name]
        return sorted(path for path in found if (root / path).is_file())
    paths = (
        path.relative_to(root)
        for path in root.rglob("*")
        if path.is_file()
    )
    return sorted(
        path
        for path in paths
        if not any(
            part in LEFT_OUT
            or part.startswith(".")
            or part.endswith(".egg-info")
            for part in path.parts
        )
    )


def pack(root: Path, target: Path) -> None:
    """Write the archive; every file lies in one folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files(root):
            entry = zipfile.ZipInfo(f"{NAME}/{path.as_posix()}")
            entry.external_attr = (root / path).stat().st_mode << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, (root / path).read_bytes())


def _printed(app: Any) -> Path:
    """The book as a PDF, where ``make pdf`` puts it."""
    return Path(app.srcdir) / "_build" / "pdf" / f"{NAME}.pdf"


def _look(app: Any, config: Any) -> None:
    config.is_printed = _printed(app).exists()


def _offer(
    app: Any,
    page: str,
    template: str,
    context: dict[str, Any],
    tree: Any,
) -> None:
    for menu in context.get("header_buttons", []):
        if (
            menu["label"] == "download-buttons"
            and app.config.is_printed
        ):
            button = {
                "type": "link",
                "url": context["pathto"](f"{NAME}.pdf", 1),
                "text": ".pdf of the whole book",
                "tooltip": "Download the whole book",
                "icon": "fas fa-file-pdf",
                "label": "download-book-button",
            }
            menu["buttons"].append(button)


def _finished(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.name == "html":
        pack(Path(app.srcdir), Path(app.outdir) / f"{NAME}.zip")
        if app.config.is_printed:
            shutil.copy(_printed(app), app.outdir)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    # "html": pages are made anew when it changes
    app.add_config_value("is_printed", False, "html")
    app.connect("config-inited", _look)
    app.connect("html-page-context", _offer, priority=900)
    app.connect("build-finished", _finished)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
