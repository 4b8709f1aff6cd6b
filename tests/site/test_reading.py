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
PAGES_OF_TEXT = sorted([*BOOK.glob("*.ipynb"), BOOK / "related.md", BOOK / "explorer.md"])
FOLDED = {"hide-input", "hide-cell"}
REMOVED = {"remove-cell", "remove-input"}
# svlib by its short name, and the modules and functions that chapters import from it
CALL = re.compile(
    r"\b(?:sv\.|(?:maps|limits|batchnorm|activations)\.|trajectory\(|edge_of_chaos\()"
)
GREEK = re.compile(
    r"\\(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho"
    r"|sigma|tau|phi|chi|psi|omega|Sigma|Delta|Phi)(?![a-zA-Z])"
)
STEPS = """async () => {
  const figure = document.querySelector('article img, article .explorer canvas');
  const wide = [...document.querySelectorAll('article div.highlight pre')]
    .filter(x => x.scrollWidth > x.clientWidth + 1 && x.offsetParent !== null);
  return {top: figure ? figure.getBoundingClientRect().top + scrollY : null, wide: wide.length};
}"""


def letters(text: str) -> set[str]:
    """Latin and Greek letters of the formulas in a Markdown text."""
    formulas = re.findall(r"\$\$(.+?)\$\$|(?<!\$)\$([^$]+)\$", text, re.DOTALL)
    found: set[str] = set()
    for formula in map("".join, formulas):
        words = r"\\(?:mathrm|text|operatorname|mathcal|label)\{[^}]*\}"
        bare = re.sub(words, " ", formula)
        found |= {name.replace("var", "") for name in GREEK.findall(bare)}
        found |= set(
            re.findall(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+", " ", bare))
        )
    return found


def texts(path: Path) -> str:
    """The Markdown of a page."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def measures(name: str) -> dict[str, Any]:
    """Words, visible code and calls of svlib of a chapter."""
    cells = nbformat.read(BOOK / f"{name}.ipynb", as_version=4).cells
    words, before, lines, seen, calls, asserts = 0, None, [0], 0, 0, 0
    sections: list[dict[str, Any]] = [{"title": "", "result": False, "call": False}]
    for cell in cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "markdown":
            text = re.sub(r"```.*?```|:::\{dropdown\}.*?:::", "", cell.source, flags=re.DOTALL)
            if before is None and 'class="explorer"' in text:
                before = words + len(text.split('class="explorer"')[0].split())
            words += len(text.split())
            for part in re.split(r"^## ", cell.source, flags=re.MULTILINE)[1:]:
                sections.append({"result": False, "call": False, "title": part.split("\n")[0]})
            continue
        if before is None and "figure" in cell.metadata.get("mystnb", {}):
            before = words
        here = len(CALL.findall(cell.source))
        calls += here
        if tags & REMOVED:
            continue
        seen += here
        sections[-1]["result"] |= bool(cell.outputs)
        if not tags & FOLDED:
            lines.append(len([x for x in cell.source.splitlines() if x.strip()]))
            sections[-1]["call"] |= here > 0
            asserts += len(re.findall(r"^\s*assert ", cell.source, re.MULTILINE))
    text = texts(BOOK / f"{name}.ipynb")
    mute = [part["title"] for part in sections if part["result"] and not part["call"]]
    return {
        "words": words,
        "words before the picture": before,
        "code lines": sum(lines),
        "longest cell": max(lines),
        "asserts": asserts,
        "share of calls in sight": round(seen / max(calls, 1), 2),
        "sections without a visible call": mute,
        "letters without an entry": sorted(letters(text) - letters(texts(BOOK / "notation.md"))),
        "boxes": text.count("In one minute"),
        "exercises": len(
            re.findall(r"^\d\. .*?\n\n:::\{dropdown\}", text, re.MULTILINE | re.DOTALL)
        ),
    }


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_story_with_svlib_in_sight(name: str) -> None:
    found = measures(name)
    assert found["words"] <= 1300
    assert found["words before the picture"] <= 450
    assert found["code lines"] <= 90
    assert found["longest cell"] <= 10
    assert found["asserts"] == 0
    assert found["share of calls in sight"] >= 0.35
    assert found["sections without a visible call"] == []
    assert (found["boxes"], found["exercises"]) == (1, 3)


@pytest.mark.parametrize("path", PAGES_OF_TEXT, ids=lambda path: path.stem)
def test_every_letter_has_an_entry(path: Path) -> None:
    assert letters(texts(path)) - letters(texts(BOOK / "notation.md")) == set()


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
    """The sentence, Play and its pictures; on a desktop three doors too; their text everywhere."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    try:
        page.goto(f"{address}book/index.html", wait_until="networkidle")
        bottoms = page.evaluate(
            "[...document.querySelectorAll('article strong, .play, .explorer canvas, .sd-card')]"
            ".filter(x => x.offsetParent).slice(0, 7)"
            ".map(x => x.getBoundingClientRect().bottom)"
        )
        doors = page.locator(".doors .sd-card-text")
        assert len(bottoms) == 7
        assert max(bottoms[: 7 if size[0] > 600 else 4]) <= size[1]
        assert [doors.nth(k).is_visible() for k in range(3)] == [True] * 3
    finally:
        page.close()


def test_the_picture_of_today_without_javascript(browser: Browser, address: str) -> None:  # noqa: F811
    page = browser.new_page(java_script_enabled=False)
    page.goto(f"{address}book/index.html")
    assert page.locator("#fig-index").is_visible()
    assert not page.locator(".explorer").is_visible()
    page.close()


# Contrast takes most of the time. The dark scheme changes nothing else on a wide screen, a phone
# everything but the contrast, other than in the bars, which all pages share.
VIEWS = [
    pytest.param("light", 1280, {}, id="light"),
    pytest.param(
        "dark", 1280, {"runOnly": ["color-contrast"]}, id="dark", marks=pytest.mark.slow
    ),
    pytest.param(
        "dark", 390, {"rules": {"color-contrast": {"enabled": False}}},
        id="phone", marks=pytest.mark.slow,
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("scheme", "width", "rules"), VIEWS)
def test_nothing_serious_for_axe(
    browser: Browser,  # noqa: F811
    address: str,
    name: str,
    scheme: Any,
    width: int,
    rules: dict[str, Any],
) -> None:
    axe = next(
        Path(pytest.importorskip("axe_playwright_python").__file__).parent.glob("axe.min.js")
    )
    if name == "book/index.html" and width < 1280:
        rules = {}  # the contrast of the bars, once
    size: Any = {"width": width, "height": 844}
    page = browser.new_page(viewport=size, color_scheme=scheme)
    try:
        page.goto(address + name, wait_until="networkidle")
        page.add_style_tag(content="* { transition: none !important; }")  # colours at once
        page.wait_for_timeout(300)
        page.evaluate(axe.read_text(encoding="utf-8"))
        found = page.evaluate(
            "options => axe.run(document, {resultTypes: ['violations'], ...options})", rules
        )
        bad = [
            (x["id"], x["nodes"][0]["html"][:200])
            for x in found["violations"]
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
            print(name, ", ".join(f"{key}: {value}" for key, value in found.items()))
        chromium.close()


if __name__ == "__main__":
    main()
