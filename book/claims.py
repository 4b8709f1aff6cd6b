"""The claim table: what the paper says, what a chapter finds, and whether that agrees.

Claims and tolerances stand in ``claims.toml``, fixed before running. A chapter reports what it found; with
``SVLIB_STORE=1`` in the environment (``make notebooks``) the rows are stored in ``results/claims/``, where the
first page and the README find them.
"""

from __future__ import annotations

import csv
import os
import tomllib
from pathlib import Path

from IPython.display import Markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results"
COLUMNS = ("claim", "paper", "ours", "tolerance", "verdict")
CHAPTERS = ("01-two-variances", "02-infinite-width", "03-finite-width", "04-batchnorm", "05-training")
STORING = os.environ.get("SVLIB_STORE") == "1"


def verdict(relation: str, paper: float, ours: float, error: float, tolerance: float) -> str:
    """Judge a finding. ``error`` is its standard error, 0 if exact.

    An equality is reproduced within the tolerance, unresolved if the error exceeds it. An inequality wants two
    standard errors and is contradicted by two on the other side.
    """
    if relation == "=":
        if error > tolerance:
            return "unresolved"
        return "reproduced" if abs(ours - paper) <= tolerance else "**differs**"
    margin = (ours - paper) * (1 if relation == ">" else -1)
    if abs(margin) <= 2 * error:
        return "unresolved"
    return "reproduced" if margin > 0 else "**differs**"


def _row(claim: dict[str, str | float], ours: float, error: float) -> tuple[str, ...]:
    digits, paper, tolerance = int(claim["digits"]), float(claim["paper"]), float(claim.get("tolerance", 0))
    relation = str(claim.get("relation", "="))
    spread = f" ± {error:.{digits}f}" if error else ""
    return (
        str(claim["text"]),
        ("" if relation == "=" else f"{relation} ") + f"{paper:.{digits}f}",
        f"{ours + 0:.{digits}f}{spread}",
        f"{tolerance:g}" if relation == "=" else "2 standard errors",
        verdict(relation, paper, ours, error, tolerance),
    )


def _markdown(rows: list[tuple[str, ...]], columns: tuple[str, ...]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(chapter: str, found: dict[str, tuple[float, float]]) -> Markdown:
    """Show, and when storing keep, a chapter's claims.

    Args:
        chapter: Name of the notebook without its ending.
        found: Claim's key to (ours, standard error); all claims of the chapter, no others.
    """
    stated = tomllib.loads((HERE / "claims.toml").read_text(encoding="utf-8"))[chapter]
    if set(found) != set(stated):
        raise ValueError(f"found must have the claims {sorted(stated)}, got {sorted(found)}")
    rows = [_row(claim, *found[key]) for key, claim in stated.items()]
    if STORING:
        with (RESULTS / "claims" / f"{chapter}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    return Markdown(_markdown(rows, COLUMNS))


def stored(chapter: str) -> list[tuple[str, ...]]:
    """The stored rows of a chapter."""
    with (RESULTS / "claims" / f"{chapter}.csv").open(newline="", encoding="utf-8") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def overview(link: str = "[{number}]({chapter}.ipynb)") -> Markdown:
    """All stored claims in one table, each with a link to its chapter."""
    rows = [
        (*row, link.format(number=chapter[:2].lstrip("0"), chapter=chapter)) for chapter in CHAPTERS for row in stored(chapter)
    ]
    return Markdown(_markdown(rows, (*COLUMNS, "chapter")))


if __name__ == "__main__":  # rewrite the table of the README
    readme = HERE.parent / "README.md"
    begin, end = "<!-- claims -->\n", "\n<!-- end of claims -->"
    before, rest = readme.read_text(encoding="utf-8").split(begin)
    table = overview("[{number}](book/{chapter}.ipynb)").data
    readme.write_text(before + begin + table + end + rest.split(end)[1], encoding="utf-8")
