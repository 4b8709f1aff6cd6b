"""What the paper says, what a chapter finds, and whether they agree.

Claims and tolerances stand in ``claims.toml``. A chapter reports what it found; with
``SVLIB_STORE=1`` in the environment (``make notebooks``) the rows are stored in
``results/claims/``, where the claims page, the first page and the README find them.
"""

from __future__ import annotations

import csv
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import xarray as xr
from IPython.display import Markdown
from scipy import special

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SIGNS = {
    "differs": "✗",
    "open": "○",
    "same order": "≈",
    "reproduced": "✓",
}
SHOWN = ("claim", "verdict", "ours", "expected", "deviation", "allowed")
KEPT = ("key", "of", *SHOWN, "source", "scale", "fixed")
CHAPTERS = (
    "01-two-variances",
    "02-infinite-width",
    "03-finite-width",
    "04-batchnorm",
    "05-training",
)
# the abstract says that training can change (6a), the figure by how much (6b)
PAPER = ("1", "2", "3", "4", "5", "6a", "6b")
STORING = os.environ.get("SVLIB_STORE") == "1"


def stated() -> dict[str, Any]:
    """The contents of ``claims.toml``."""
    text = (HERE / "claims.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def verdict(
    relation: str,
    paper: float,
    ours: float,
    error: float,
    tolerance: float,
    errors: float = 2,
) -> str:
    """Judge a finding. ``error`` is its standard error, 0 if exact.

    An equality is reproduced within the tolerance, open if the error exceeds it. An
    inequality wants ``errors`` of them and is contradicted by as many on the other side.
    """
    if relation == "=":
        if error > tolerance:
            return "open"
        close = abs(ours - paper) <= tolerance
        return "reproduced" if close else "differs"
    margin = (ours - paper) * (1 if relation == ">" else -1)
    if abs(margin) <= errors * error:
        return "open"
    return "reproduced" if margin > 0 else "differs"


def value(
    variable: xr.DataArray, **where: object
) -> tuple[float, float]:
    """Mean and standard error of one entry of a summary."""
    chosen = variable.sel(where)
    mean, error = (
        float(chosen.sel(statistic=name)) for name in ("mean", "error")
    )
    return mean, error


def _row(
    key: str,
    claim: Mapping[str, Any],
    ours: float,
    error: float,
    seeds: float = np.inf,
) -> dict[str, str]:
    """A row of the table. Few seeds want the 95 % interval of Student's t."""
    errors = (
        2.0
        if np.isinf(seeds)
        else float(special.stdtrit(seeds - 1, 0.975))
    )
    paper, digits = float(claim["paper"]), int(claim["digits"])
    tolerance = float(claim.get("tolerance", 0))
    relation = str(claim.get("relation", "="))
    word = verdict(relation, paper, ours, error, tolerance, errors)
    if word == "reproduced" and "scale" in claim:
        word = "same order"
    spread = f" ± {error:.{digits}f}" if error else ""
    unit = math.hypot(error, claim.get("reading", 0))
    sign = "" if relation == "=" else f"{relation} "
    values = (
        key,
        str(claim.get("of", 0)),
        claim["text"],
        word,
        f"{ours + 0:.{digits}f}{spread}",
        f"{sign}{paper:.{digits}f}",
        f"{(ours - paper) / unit:+.1f} errors" if unit else "",
        f"{errors:.2g} errors" if sign else f"{tolerance:g}",
        claim["source"],
        claim.get("scale", ""),
        claim.get("fixed", "before running"),
    )
    return dict(zip(KEPT, values, strict=True))


def marked(word: str, text: str = "") -> str:
    """A verdict, or another text, with its sign, in its colour on the site."""
    name = word.split()[0]
    return f'<span class="verdict {name}">{SIGNS[word]} {text or word}</span>'


def table(
    rows: Iterable[Sequence[str]], columns: Sequence[str]
) -> Markdown:
    """A Markdown table, in which formulas and links work."""
    lines = [columns, ("---",) * len(columns), *rows]
    return Markdown(
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
    )


def shown(
    rows: Iterable[Mapping[str, str]], columns: Sequence[str] = SHOWN
) -> Markdown:
    """Rows as a table, those that fail first."""
    order = list(SIGNS)
    ranked = sorted(rows, key=lambda row: order.index(row["verdict"]))
    lines = (
        [
            marked(row[name]) if name == "verdict" else row[name]
            for name in columns
        ]
        for row in ranked
    )
    return table(lines, columns)


def report(
    chapter: str, found: Mapping[str, tuple[float, ...]]
) -> Markdown:
    """Show, and when storing keep, a chapter's claims.

    Args:
        chapter: Name of the notebook without its ending.
        found: Key to (ours, standard error), of few seeds also their number, for all claims
            of the chapter, no others.
    """
    claims = stated()[chapter]
    if set(found) != set(claims):
        raise ValueError(
            f"found must have the claims {sorted(claims)}, got {sorted(found)}"
        )
    rows = [
        _row(key, claim, *found[key]) for key, claim in claims.items()
    ]
    if STORING:
        path = RESULTS / "claims" / f"{chapter}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, KEPT, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return shown(rows)


def stored(chapter: str) -> list[dict[str, str]]:
    """The stored rows of a chapter."""
    path = RESULTS / "claims" / f"{chapter}.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of(number: str) -> list[dict[str, str]]:
    """The stored rows of the paper's claim, or of our own checks ("0")."""
    return [
        row
        for chapter in CHAPTERS
        for row in stored(chapter)
        if row["of"] == number
    ]


def alternatives() -> tuple[list[tuple[str, ...]], list[str]]:
    """Claim, alternative, its value, by how many errors ours excludes it; and checks of tools.

    The error is our standard error.
    """
    found: list[tuple[str, ...]] = []
    tools: list[str] = []
    for chapter in CHAPTERS:
        for row in stored(chapter):
            claim = stated()[chapter][row["key"]]
            if "other" not in claim:
                tools.append(row["claim"])
                continue
            ours, _, error = row["ours"].partition(" ± ")
            unit = float(error or 0)
            apart = abs(float(ours) - claim["other"])
            told = f"{apart / unit:.1f} errors" if unit else "exactly"
            other = f"{claim['other']:g}"
            found.append(
                (row["claim"], claim["alternative"], other, told)
            )
    return found, tools


def overall(rows: Sequence[Mapping[str, str]]) -> str:
    """The worst verdict among rows."""
    order = list(SIGNS)
    return order[min(order.index(row["verdict"]) for row in rows)]


def counted(*numbers: str) -> str:
    """How many rows of these claims have which verdict, in words."""
    rows = [row for number in numbers for row in of(number)]
    found = Counter(row["verdict"] for row in rows)
    order = reversed(SIGNS)
    return ", ".join(f"{found[word]} {word}" for word in order)


def six(
    link: str = "{chapter}.ipynb", *, coloured: bool = True
) -> Markdown:
    """The paper's claims, a line each: verdict, claim, number, link."""
    ours = {
        f"{chapter}.{row['key']}": row["ours"]
        for chapter in CHAPTERS
        for row in stored(chapter)
    }

    def filled(found: re.Match[str]) -> str:
        text = ours[found[1]]
        return f"{float(text):{found[2]}}" if found[2] else text

    lines = []
    for number, claim in zip(PAPER, stated()["paper"], strict=True):
        rows = of(number)
        word = overall(rows)
        mixed = len({row["verdict"] for row in rows}) > 1
        failed = word in ("open", "differs")
        text = f"{word} in part" if failed and mixed else word
        mark = (
            marked(word, text) if coloured else f"{SIGNS[word]} {text}"
        )
        told = re.sub(r"\{([^:}]+):?([^}]*)\}", filled, claim["number"])
        there = link.format(chapter=claim["chapter"])
        start = {"6a": "6. - **6a**", "6b": "   - **6b**"}.get(
            number, f"{number}."
        )
        lines.append(
            f"{start} {mark} · {claim['text']} *{told}* → [{claim['title']}]({there})"
        )
    return Markdown("\n".join(lines))


def figure(chapter: str, name: str) -> str:
    """The stored SVG of a figure, by the name in its cell's metadata."""
    notebook = nbformat.read(HERE / f"{chapter}.ipynb", as_version=4)
    for cell in notebook.cells:
        about = cell.metadata.get("mystnb", {}).get("figure", {})
        if about.get("name") == name:
            outputs = (out.get("data", {}) for out in cell.outputs)
            return str(next(x["image/svg+xml"] for x in outputs if x))
    raise ValueError(
        f"name must be a figure of {chapter}, got {name!r}"
    )


BEGIN, END = "<!-- claims -->\n", "\n<!-- end of claims -->"


def main() -> None:
    """Rewrite the README's claims and picture from what is stored."""
    readme = HERE.parent / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    lines = str(six("book/{chapter}.ipynb", coloured=False).data)
    readme.write_text(
        before + BEGIN + lines + END + rest.split(END)[1],
        encoding="utf-8",
    )
    picture = figure("index", "fig-index")
    (RESULTS / "collapse.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
