"""JupyterLab, driven as a reader would: restart the kernel, run all cells, no error."""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.site.test_browser import browser  # noqa: F401
from tests.site.test_browser import pytestmark as needs_chromium

ROOT = Path(__file__).parents[2]
PORT, TOKEN = 8963, "reader"
CHAPTERS = sorted(path.stem for path in (ROOT / "book").glob("*.ipynb"))
pytestmark = [needs_chromium, pytest.mark.lab]
FORGET = """() => window.jupyterapp.shell.currentWidget.content.widgets
  .filter(cell => cell.model.type === 'code')
  .forEach(cell => { cell.model.executionCount = null; })"""
COUNTS = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.widgets
    .filter(cell => cell.model.type === 'code');
  const outputs = cells.flatMap(cell => cell.model.outputs.toJSON());
  return {
    waiting: cells.filter(cell => !cell.model.executionCount).length,
    errors: outputs.filter(output => output.output_type === 'error').map(output => output.ename),
  };
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("lab")
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "book", folder / "book", ignore=ignore)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={PORT}"]
    command += [f"--IdentityProvider.token={TOKEN}", "--expose-app-in-browser", "--allow-root"]
    environment = os.environ | {"HOME": str(folder), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, f"--notebook-dir={folder}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        address = f"http://127.0.0.1:{PORT}/"
        for _ in range(60):
            time.sleep(1)
            try:
                urllib.request.urlopen(f"{address}api?token={TOKEN}", timeout=1)
                break
            except OSError:
                continue
        yield address
        server.terminate()


@pytest.mark.parametrize("name", CHAPTERS)
def test_run_all(browser: Browser, lab: str, name: str) -> None:  # noqa: F811
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        page.goto(f"{lab}lab/tree/book/{name}.ipynb?token={TOKEN}")
        page.wait_for_function(
            "window.jupyterapp?.shell?.currentWidget?.context?.sessionContext?.session?.kernel"
            "?.status === 'idle'",
            timeout=60_000,
        )
        page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        page.evaluate(FORGET)
        page.evaluate("void window.jupyterapp.commands.execute('notebook:restart-run-all')")
        page.locator(".jp-Dialog .jp-mod-accept").click(timeout=20_000)
        for _ in range(180):
            found = page.evaluate(COUNTS)
            if not found["waiting"] or found["errors"]:
                break
            page.wait_for_timeout(1000)
        assert found == {"waiting": 0, "errors": []}
    finally:
        page.close()
