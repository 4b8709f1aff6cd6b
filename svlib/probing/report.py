"""An explanation as a picture, and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from svlib import plot
from svlib.probing import findings

_NAMED = 30  # layers that have their name on the axis; of more, every second, third...
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1, dd, li {{ overflow-wrap: anywhere; }} figure {{ margin: 0; }}
svg {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ border: 0; border-bottom: 1px solid #8080804d; padding: .2rem .7rem; text-align: left; }}
</style>
</head>
<body>
<h1>{title}</h1>
<figure role="img" aria-label="v²/σ² and σ² of every layer; findings are marked at their places.">
{picture}
<figcaption>v&sup2;/&sigma;&sup2; and &sigma;&sup2; along the way from inputs to outputs. Circles:
findings. Arrows: the number with suspects taken away.</figcaption>
</figure>
<h2>Findings</h2>
{reading}
<p>{summary} fraction is v&sup2;/&sigma;&sup2;, ratio is m/v; dead is the fraction of units that are
positive for no input.</p>
{cures}
<h2>How this was made</h2>
<dl>
{provenance}
</dl>
</body>
</html>
"""


def figure(explanation: Any) -> Figure:
    """v^2/sigma^2 and sigma^2 along the way, findings at their places, removals as arrows."""
    trace = explanation.trace
    shown = trace[(trace.judged | trace.place.isin(explanation.table.name)) & trace.sigma2.notna()]
    shown = shown.drop_duplicates("place").reset_index(drop=True)
    at = {place: index for index, place in enumerate(shown.place)}
    with mpl.rc_context(plot.STYLE):
        made, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(7.2, 5.2))
        upper.plot(shown.fraction.clip(lower=1e-6), **plot.look(0), markevery=1)
        lower.plot(shown.sigma2.clip(lower=1e-30), **plot.look(1), markevery=1)
        upper.axhline(findings.COLLAPSED, color=plot.GREY, linewidth=0.8, linestyle=":")
        for index, finding in enumerate(explanation.findings):
            if finding.place in at and not finding.note:
                x = at[finding.place]
                axes, column = (
                    (lower, "sigma2")
                    if finding.kind in ("explosion", "loss of scale")
                    else (upper, "fraction")
                )
                y = max(float(shown[column][x]), 1e-6)
                axes.plot(x, y, "o", markersize=13, fillstyle="none", color=plot.GREY)
                axes.annotate(f"{index + 1} {finding.kind}", (x, y), (6, 10),
                              textcoords="offset points", fontsize="small")  # fmt: skip
                if finding.kind == "collapse":
                    for value in finding.removed.values():
                        axes.annotate("", (x, value), (x, y), arrowprops={"arrowstyle": "->"})
                        y = value
        step = math.ceil(len(shown) / _NAMED)
        lower.set_xticks(range(0, len(shown), step), shown.place[::step], rotation=90,
                         fontsize="x-small")  # fmt: skip
        upper.set(ylabel="v²/σ²", ylim=(None, 1.15))
        upper.set_yscale("log" if shown.fraction.min() < 0.02 else "linear")
        lower.set(ylabel="σ²", yscale="log")
    return made


def page(explanation: Any, *, title: str, provenance: Mapping[str, object]) -> str:
    """A self-contained HTML page.

    Args:
        explanation: Of :func:`svlib.explain`.
        title: Heading.
        provenance: More about the run: names and values, in this order.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(8, width=16, depth=4, outputs=2, seed=0)
        >>> explanation = sv.explain(model, sv.data.gaussian(50, 8, seed=1))
        >>> text = page(explanation, title="MLP", provenance={"inputs": 50})
        >>> "<svg" in text, "<dt>inputs</dt><dd>50</dd>" in text
        (True, True)
    """
    for name, value, kind in (("title", title, str), ("provenance", provenance, Mapping)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    file = io.StringIO()
    made = figure(explanation)
    made.savefig(file, format="svg", metadata={"Date": None})
    plt.close(made)
    items = ((html.escape(str(name)), html.escape(str(x))) for name, x in provenance.items())
    cures = ""
    if len(explanation.cures):
        numbers = explanation.cures.drop(columns="code")
        cures = "<h2>What was tried</h2>\n" + numbers.to_html(
            border=0, float_format="{:.3g}".format
        )
    table = explanation.table
    return _PAGE.format(
        title=html.escape(title),
        summary=f"{len(table)} outputs over {table.samples.max()} inputs.",
        picture=file.getvalue()[file.getvalue().index("<svg") :],
        reading=explanation.to_html(unfolded=True),
        cures=cures,
        provenance="\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in items),
    )
