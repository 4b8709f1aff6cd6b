"""A probed model as one HTML page that needs nothing else: picture, diagnosis, table, versions."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib import pyplot as plt

from svlib import plot
from svlib.probing import diagnosis, faults
from svlib.probing.along import GRADIENTS

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1, dd {{ overflow-wrap: anywhere; }} figure {{ margin: 0; }}
svg {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ border: 0; border-bottom: 1px solid #8080804d; }}
th, td {{ padding: .2rem .7rem; text-align: left; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<figure role="img"
 aria-label="m, v and sigma by layer, in the order of the table below; pale lines are theory.">
{picture}
<figcaption>Sample mean m, sample deviation v and total &sigma; of every layer's output, over
inputs. Broad pale lines: theory, broken where it starts anew from the measured values.</figcaption>
</figure>
<h2>Diagnosis</h2>
{reading}
<p>fraction is v&sup2;/&sigma;&sup2;, ratio is m/v; dead is the fraction of units that are positive
for no input. {thresholds}</p>
<h2>How this was made</h2>
<dl>
{provenance}
</dl>
</body>
</html>
"""


def page(
    explanation: diagnosis.Explanation, *, title: str, provenance: Mapping[str, object]
) -> str:
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
    accepted: dict[str, type] = {
        "explanation": diagnosis.Explanation,
        "title": str,
        "provenance": Mapping,
    }
    for (name, kind), value in zip(accepted.items(), (explanation, title, provenance), strict=True):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    with mpl.rc_context(plot.STYLE):
        figure, axes = plt.subplots()
        plot.decomposition(explanation.table, theory=explanation.theory, axes=axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    thresholds = (
        f"A layer has collapsed where v&sup2;/&sigma;&sup2; is below {faults.COLLAPSED}. "
        f"Reported are also &sigma;&sup2; changing {faults.SCALE:g} times, more than "
        f"{faults.DEAD:.0%} of dead units before a ReLU, squared gradients growing "
        f"{GRADIENTS:g} times, and v&sup2;/&sigma;&sup2; differing from theory by more "
        f"than {diagnosis.DEVIATION}."
    )
    items = ((html.escape(str(name)), html.escape(str(x))) for name, x in provenance.items())
    return _PAGE.format(
        title=html.escape(title),
        summary=f"{len(explanation.table)} outputs over {explanation.table.samples.max()} inputs.",
        picture=file.getvalue()[file.getvalue().index("<svg") :],
        reading=explanation.to_html(unfolded=True),
        thresholds=thresholds,
        provenance="\n".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in items),
    )
