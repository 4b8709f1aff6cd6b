"""Every local link of the built site leads to a page, and every anchor to an element."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.images_without_text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.update(value for name in ("id", "name") if (value := found.get(name)))
        self.targets += [value for name in ("href", "src") if (value := found.get(name))]
        if tag == "img" and not found.get("alt"):
            self.images_without_text.append(str(found.get("src")))


def broken_links(site: Path) -> list[str]:
    pages = {
        path: _Page(path.read_text(encoding="utf-8"))
        for path in site.glob("**/*.html")
        if "_static" not in path.parts
    }
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            link = urlsplit(target)
            if link.scheme or link.netloc:
                continue
            goal = (path.parent / unquote(link.path)).resolve() if link.path else path
            goal = goal / "index.html" if goal.is_dir() else goal
            settings = "=" in link.fragment  # of the explorer
            if not goal.exists() or (
                goal in pages and not settings and unquote(link.fragment) not in pages[goal].anchors
            ):
                broken.append(f"{path.relative_to(site)} -> {target}")
    return broken


def test_links_and_anchors(site: Path) -> None:
    assert broken_links(site.resolve()) == []


def test_the_check_finds_planted_faults(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="there"><a href="b.html">1</a><a href="a.html#not">2</a><a href="#there">3</a>'
    )
    assert broken_links(tmp_path) == ["a.html -> b.html", "a.html -> a.html#not"]


def test_every_figure_has_a_text(site: Path) -> None:
    missing = {
        path.name: texts
        for path in site.glob("book/*.html")
        if (
            texts := [
                src
                for src in _Page(path.read_text(encoding="utf-8")).images_without_text
                if "_images" in src
            ]
        )
    }
    assert missing == {}
