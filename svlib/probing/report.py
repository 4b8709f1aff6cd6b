"""A probed model as one HTML page that needs nothing else: picture, diagnosis, table, versions."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib import pyplot as plt

from svlib import plot
from svlib.probing import explanation as reading

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
h1, dd {{ overflow-wrap: anywhere; }} figure {{ margin: 0; }} svg {{ max-width: 100%; height: auto;
}} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }} th, td {{ border: 0;
border-bottom: 1px solid #8080804d; padding: .2rem .7rem; text-align: left; }} </style> </head>
<body> <h1>{title}</h1> <p>{summary}</p> <figure role="img" aria-label="m, v and sigma by layer, in
the order of the table below; pale lines show what theory expects."> {picture} <figcaption>Sample
mean m, sample deviation v and total &sigma; of every layer's output, over inputs. Broad pale lines:
theory, broken where it starts anew from the measured values.</figcaption> </figure>
<h2>Diagnosis</h2> {reading} <p>v2_fraction is v&sup2;/&sigma;&sup2;, ratio is m/v; dead is the part
of the units that are positive for no input. {thresholds}</p> <h2>How this was made</h2> <dl>
{provenance} </dl> </body> </html>
"""


def page(explanation: reading.Explanation, *, title: str, provenance: Mapping[str, object]) -> str:
    """A self-contained HTML page.

    Args:
        explanation: Of :func:`svlib.explain`.
        title: Heading.
        provenance: What else to say of the run: names and values, in this order.

    Raises:
        TypeError: If ``explanation`` is not an :class:`svlib.Explanation` ``title`` no string or
            ``provenance`` no mapping.

    Examples:
        >>> import svlib as sv
        >>> table = sv.probe(sv.networks.mlp(8, width=16, depth=4, outputs=2, seed=0), sv.data.gaussian(50, 8, seed=1))
        >>> text = page(sv.explain(table), title="MLP", provenance={"inputs": 50})
        >>> "<svg" in text, "<dt>inputs</dt><dd>50</dd>" in text
        (True, True)
    """
    if not isinstance(explanation, reading.Explanation):
        raise TypeError(
            f"explanation must be an Explanation of svlib.explain, got {type(explanation).__name__}"
        )
    if not isinstance(title, str):
        raise TypeError(f"title must be a string, got {type(title).__name__}")
    if not isinstance(provenance, Mapping):
        raise TypeError(
            f"provenance must be a mapping of names to values, got {type(provenance).__name__}"
        )
    with mpl.rc_context(plot.STYLE):
        figure, axes = plt.subplots()
        plot.decomposition(explanation.table, theory=explanation.theory, axes=axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    thresholds = (
        f"A layer has collapsed where v&sup2;/&sigma;&sup2; is below {reading.COLLAPSED}. Worth a word are also "
        f"&sigma;&sup2; changing {reading.SCALE:g} times, more than {reading.DEAD:.0%} of dead units before a ReLU, squared "
        f"gradients growing {reading.GRADIENTS:g} times, and v&sup2;/&sigma;&sup2; differing from theory by more than "
        f"{reading.DEVIATION}."
    )
    return _PAGE.format(
        title=html.escape(title),
        summary=f"{len(explanation.table)} outputs over {explanation.table.inputs.max()} inputs.",
        picture=file.getvalue()[file.getvalue().index("<svg") :],
        reading=explanation.to_html(unfolded=True),
        thresholds=thresholds,
        provenance="\n".join(
            f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
            for name, value in provenance.items()
        ),
    )
