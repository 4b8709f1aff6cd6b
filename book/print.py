"""The whole book as one PDF: ``python book/print.py`` prints Sphinx's single page.

Chromium is found on the path, or named by the environment variable CHROMIUM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "_build" / "pdf" / "sample-variance-decay.pdf"
STYLE = """
@page { size: A4; margin: 18mm 16mm; }
.bd-header, .bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article,
.prev-next-footer, .bd-footer, .copybtn, .headerlink, .explorer .controls,
.explorer .bar, .explorer .open, noscript,
.toggle-details__summary,
details.above-input { display: none !important; }
body, article { font-size: 10.5pt; }
body, .bd-container, .bd-container__inner, .bd-main, .bd-content,
.bd-article-container, article {
  display: block !important; width: 174mm !important; max-width: 174mm !important;
  min-width: 0 !important; margin: 0 !important; padding: 0 !important; }
pre { white-space: pre-wrap !important; overflow-wrap: anywhere;
  overflow: visible !important; }
table { font-size: 8pt; }
td, th { white-space: normal !important; overflow-wrap: anywhere; }
div, table { overflow: visible !important; }
.pst-scrollable-table-container, table { display: table; width: 100% !important; }
mjx-container { font-size: 95% !important; max-width: 100%; }
figure, img, tr, .admonition, .explorer { break-inside: avoid; }
h1 { break-before: page; } h1, h2, h3 { break-after: avoid; }
"""
FOOT = """<div style="font-size: 8px; width: 100%; text-align: center;">
<span class="pageNumber"></span></div>"""


def main() -> None:
    """Build the single page and print it."""
    command = Path(sys.executable).with_name("jupyter-book")
    single = ["build", str(ROOT), "--builder", "singlehtml"]
    subprocess.run([str(command), *single], check=True)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    built = ROOT / "_build" / "singlehtml"
    # its links are relative to the folder above
    page_at = Path(
        shutil.copy(built / "book" / "index.html", built / "whole.html")
    )
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        page = browser.new_page(color_scheme="light")
        page.goto(page_at.as_uri(), wait_until="load")
        page.wait_for_function("window.MathJax?.startup?.promise")
        page.evaluate("MathJax.startup.promise")
        page.evaluate(
            "document.querySelectorAll('details').forEach(x => x.open = true);"
            "document.querySelectorAll('img').forEach(x => x.loading = 'eager');"
            "document.querySelectorAll('.explorer [name=layer]').forEach(x =>"
            " { x.value = 20; x.dispatchEvent(new Event('input')); });"
        )
        page.add_style_tag(content=STYLE)
        page.wait_for_timeout(1000)
        page.pdf(
            path=str(TARGET),
            prefer_css_page_size=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOT,
            outline=True,
            tagged=True,
        )
        browser.close()
    sys.stdout.write(
        f"{TARGET}: {TARGET.stat().st_size / 1e6:.1f} MB\n"
    )


if __name__ == "__main__":
    main()
