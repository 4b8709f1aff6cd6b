"""The first use of a term on a page leads to the glossary and shows its definition.

A Sphinx extension: the terms are those of the page "Notation", and stand in the
text as they are. The definition is the link's title, which a browser shows on hover.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes

PAGE = "book/notation"
TEXT = (nodes.paragraph, nodes.list_item, nodes.strong, nodes.emphasis)
# which mean something else as well: the width of a histogram
AMBIGUOUS = ("width", "depth", "record")
SIGNS = ((r"\sigma", "\N{GREEK SMALL LETTER SIGMA}"), ("^2", "²"))


def terms(doctree: Any) -> dict[str, tuple[str, str]]:
    """Anchor and definition by term, in small letters."""
    found = {}
    for item in doctree.findall(nodes.definition_list_item):
        definition = item[-1].astext()
        for sign, letter in SIGNS:
            definition = definition.replace(sign, letter)
        for term in item.findall(nodes.term):
            if term["ids"]:
                for name in term.astext().lower().split(", "):
                    if name not in AMBIGUOUS:
                        found[name] = term["ids"][0], definition
                        short = re.sub(r" \(.*?\)", "", name)
                        found[short] = found[name]
    return found


def linked(
    text: str, known: dict[str, tuple[str, str]], page: str
) -> Iterator[nodes.Node]:
    """The parts of a text; at its first use a term is taken out of ``known``."""
    while known:
        names = "|".join(sorted(map(re.escape, known), key=len)[::-1])
        pattern = rf"(?<![\w-])({names})(?:s|es)?(?![\w-])"
        use = re.search(pattern, text, re.IGNORECASE)
        if use is None:
            break
        anchor, definition = known[use[1].lower()]
        for name in [x for x in known if known[x][0] == anchor]:
            del known[name]  # its other names too
        yield nodes.Text(text[: use.start()])
        yield nodes.reference(
            "",
            use[0],
            refuri=f"{page}#{anchor}",
            internal=True,
            reftitle=definition,
            classes=["glossary"],
        )
        text = text[use.end() :]
    yield nodes.Text(text)


def link(app: Any, doctree: nodes.document, docname: str) -> None:
    """Link the first use of every term in the running text of a page."""
    if app.builder.name != "html" or docname == PAGE:
        return
    known = terms(app.env.get_doctree(PAGE))
    page = app.builder.get_relative_uri(docname, PAGE)
    for paragraph in list(doctree.findall(nodes.paragraph)):
        around, at = [], paragraph
        while at.parent is not None:
            at = at.parent
            around.append(at)
        if any(
            isinstance(x, nodes.table | nodes.figure | nodes.caption)
            or "cell" in x.get("classes", ())
            for x in around
        ):
            continue
        for text in list(paragraph.findall(nodes.Text)):
            if isinstance(text.parent, TEXT):
                parts = list(linked(str(text), known, page))
                text.parent.replace(text, parts)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
