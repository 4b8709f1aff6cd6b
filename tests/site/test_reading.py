"""What a reader meets: code in sight, the first picture, boxes, exercises, and accessibility.

``python -m tests.site.test_reading`` prints the measures of every chapter.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.site.conftest import PAGES, SITE
from tests.site.test_browser import CHROMIUM, FLAGS, browser, pytestmark  # noqa: F401

BOOK = Path(__file__).parents[2] / "book"
CHAPTERS = sorted(path.stem for path in BOOK.glob("0*.ipynb"))
HIDDEN = {"remove-cell", "remove-input", "hide-input", "hide-cell"}
STEPS = """async () => {
  const figure = document.querySelector('article img');
  const wide = [...document.querySelectorAll('article div.highlight pre')]
    .filter(x => x.scrollWidth > x.clientWidth + 1 && x.offsetParent !== null);
  return {top: figure ? figure.getBoundingClientRect().top + scrollY : null, wide: wide.length};
}"""


def measures(name: str) -> dict[str, Any]:
    """Visible code and words of a chapter."""
    cells = nbformat.read(BOOK / f"{name}.ipynb", as_version=4).cells
    codes, words, before = [], 0, None
    for cell in cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "markdown":
            words += len(cell.source.split())
        elif "figure" in cell.metadata.get("mystnb", {}) and before is None:
            before = words
        if cell.cell_type == "code" and not tags & HIDDEN:
            codes.append(cell.source)
    lines = [len([x for x in code.splitlines() if x.strip()]) for code in codes]
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return {
        "code lines": sum(lines),
        "longest cell": max(lines, default=0),
        "asserts": sum(len(re.findall(r"^\s*assert ", code, re.MULTILINE)) for code in codes),
        "words": words,
        "words before the picture": before,
        "boxes": text.count("In one minute"),
        "exercises": text.count("## Exercises"),
    }


@pytest.mark.parametrize("name", CHAPTERS)
def test_code_stays_out_of_the_way(name: str) -> None:
    found = measures(name)
    assert found["code lines"] <= 90
    assert found["longest cell"] <= 12
    assert found["asserts"] == 0
    assert found["words before the picture"] <= 600
    assert (found["boxes"], found["exercises"]) == (1, 1)


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_picture_comes_soon_and_code_fits(browser: Browser, address: str, name: str) -> None:  # noqa: F811
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        page.goto(f"{address}book/{name}.html", wait_until="networkidle")
        found = page.evaluate(STEPS)
        assert found["top"] <= 1.5 * 900
        assert found["wide"] == 0
    finally:
        page.close()


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_first_screen(browser: Browser, address: str, size: tuple[int, int]) -> None:  # noqa: F811
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    try:
        page.goto(f"{address}book/index.html", wait_until="networkidle")
        bottoms = page.evaluate(
            "[...document.querySelectorAll('article strong, article img, .doors .sd-card')]"
            ".slice(0, 5).map(x => x.getBoundingClientRect().bottom)"
        )
        assert len(bottoms) == 5  # the sentence, the picture, three doors
        assert max(bottoms) <= size[1]
    finally:
        page.close()


def _rules(name: str, scheme: str, width: int) -> dict[str, Any]:
    """Contrast takes most of the time. The dark scheme changes nothing else on a wide screen, and a
    phone changes everything but the contrast, other than in the bars, which all pages share."""
    if width < 1280:
        return (
            {} if name == "book/index.html" else {"rules": {"color-contrast": {"enabled": False}}}
        )
    return {} if scheme == "light" else {"runOnly": ["color-contrast"]}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_serious_for_axe(browser: Browser, address: str, name: str) -> None:  # noqa: F811
    axe = next(
        Path(pytest.importorskip("axe_playwright_python").__file__).parent.glob("axe.min.js")
    )
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    try:
        page.goto(address + name, wait_until="networkidle")
        page.add_style_tag(content="* { transition: none !important; }")  # colours at once
        page.evaluate(axe.read_text(encoding="utf-8"))
        for scheme, width in (("light", 1280), ("dark", 1280), ("dark", 390)):
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            page.set_viewport_size({"width": width, "height": 844})
            # colours change in steps; tab stops come when widths rest
            page.wait_for_timeout(1000 if width < 1280 else 300)
            result = page.evaluate(
                "options => axe.run(document, {resultTypes: ['violations'], ...options})",
                _rules(name, scheme, width),
            )
            bad = [
                (scheme, width, x["id"], x["nodes"][0]["html"][:200])
                for x in result["violations"]
                if x["impact"] in ("serious", "critical")
            ]
            assert bad == []
    finally:
        page.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_terms_show_their_definition(site: Path, name: str) -> None:
    """The first use of each, once on a page, in the running text."""
    text = (site / "book" / f"{name}.html").read_text(encoding="utf-8")
    links = re.findall(r'<a class="glossary[^>]*#(term-[^"]*)" title="([^"]*)">([^<]*)<', text)
    anchors = [anchor for anchor, _, _ in links]
    assert len(links) >= 2
    assert len(set(anchors)) == len(anchors)
    assert all(len(definition) > 20 and "\\" not in definition for _, definition, _ in links)


def main() -> None:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        for name in CHAPTERS:
            page.goto((SITE / "book" / f"{name}.html").as_uri())
            page.wait_for_timeout(1000)
            found = measures(name) | page.evaluate(STEPS)
            print(name, ", ".join(f"{key}: {value:g}" for key, value in found.items()))
        chromium.close()


if __name__ == "__main__":
    main()
