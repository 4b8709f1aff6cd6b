"""The claim table: what the paper says, what a chapter finds, and whether they agree.

Claims and tolerances stand in ``claims.toml``, fixed before running. A chapter reports
what it found; with ``SVLIB_STORE=1`` in the environment (``make notebooks``) the rows
are stored in ``results/claims/``, where the first page and the README find them.
"""

from __future__ import annotations

import csv
import os
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import nbformat
import xarray as xr
from IPython.display import Markdown

HERE = Path(__file__).parent
RESULTS = HERE / "results"
COLUMNS = (
    "claim",
    "verdict",
    "ours",
    "expected",
    "source",
    "tolerance",
)
CHAPTERS = (
    "01-two-variances",
    "02-infinite-width",
    "03-finite-width",
    "04-batchnorm",
    "05-training",
)
STORING = os.environ.get("SVLIB_STORE") == "1"


def verdict(
    relation: str,
    paper: float,
    ours: float,
    error: float,
    tolerance: float,
) -> str:
    """Judge a finding. ``error`` is its standard error, 0 if exact.

    An equality is reproduced within the tolerance, unresolved if the error exceeds it.
    An inequality wants two standard errors and is contradicted by two on the other side.
    """
    if relation == "=":
        if error > tolerance:
            return "unresolved"
        return (
            "reproduced"
            if abs(ours - paper) <= tolerance
            else "**differs**"
        )
    margin = (ours - paper) * (1 if relation == ">" else -1)
    if abs(margin) <= 2 * error:
        return "unresolved"
    return "reproduced" if margin > 0 else "**differs**"


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
    claim: dict[str, str | float], ours: float, error: float
) -> tuple[str, ...]:
    digits, paper, tolerance = (
        int(claim["digits"]),
        float(claim["paper"]),
        float(claim.get("tolerance", 0)),
    )
    relation = str(claim.get("relation", "="))
    spread = f" ± {error:.{digits}f}" if error else ""
    return (
        str(claim["text"]),
        verdict(relation, paper, ours, error, tolerance),
        f"{ours + 0:.{digits}f}{spread}",
        ("" if relation == "=" else f"{relation} ")
        + f"{paper:.{digits}f}",
        str(claim["source"]),
        f"{tolerance:g}" if relation == "=" else "2 standard errors",
    )


def table(
    rows: Iterable[Sequence[str]], columns: Sequence[str]
) -> Markdown:
    """A Markdown table, in which formulas and links work."""
    lines = [columns, ("---",) * len(columns), *rows]
    return Markdown(
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
    )


def report(
    chapter: str, found: dict[str, tuple[float, float]]
) -> Markdown:
    """Show, and when storing keep, a chapter's claims.

    Args:
        chapter: Name of the notebook without its ending.
        found: Key to (ours, standard error), for all claims of the chapter, no others.
    """
    stated = tomllib.loads(
        (HERE / "claims.toml").read_text(encoding="utf-8")
    )[chapter]
    if set(found) != set(stated):
        raise ValueError(
            f"found must have the claims {sorted(stated)}, got {sorted(found)}"
        )
    rows = [_row(claim, *found[key]) for key, claim in stated.items()]
    if STORING:
        with (RESULTS / "claims" / f"{chapter}.csv").open(
            "w", newline="", encoding="utf-8"
        ) as file:
            csv.writer(file, lineterminator="\n").writerows(
                [COLUMNS, *rows]
            )
    return table(rows, COLUMNS)


def stored(chapter: str) -> list[tuple[str, ...]]:
    """The stored rows of a chapter."""
    with (RESULTS / "claims" / f"{chapter}.csv").open(
        newline="", encoding="utf-8"
    ) as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def overview(link: str = "[{number}]({chapter}.ipynb)") -> Markdown:
    """All stored claims in one table, each with a link to its chapter."""
    rows = [
        (
            *row,
            link.format(
                number=chapter[:2].lstrip("0"), chapter=chapter
            ),
        )
        for chapter in CHAPTERS
        for row in stored(chapter)
    ]
    return table(rows, (*COLUMNS, "chapter"))


def figure(chapter: str, name: str) -> str:
    """The stored SVG of a figure, by the name in its cell's metadata."""
    notebook = nbformat.read(HERE / f"{chapter}.ipynb", as_version=4)
    for cell in notebook.cells:
        if (
            cell.metadata.get("mystnb", {})
            .get("figure", {})
            .get("name")
            == name
        ):
            return str(
                next(
                    out.data["image/svg+xml"]
                    for out in cell.outputs
                    if "data" in out
                )
            )
    raise ValueError(
        f"name must be a figure of {chapter}, got {name!r}"
    )


BEGIN, END = "<!-- claims -->\n", "\n<!-- end of claims -->"


def main() -> None:
    """Rewrite the README's table and picture from what is stored."""
    readme = HERE.parent / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    table = str(overview("[{number}](book/{chapter}.ipynb)").data)
    readme.write_text(
        before + BEGIN + table + END + rest.split(END)[1],
        encoding="utf-8",
    )
    picture = figure("03-finite-width", "fig-finite-width")
    (RESULTS / "finite-width.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
