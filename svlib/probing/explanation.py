r"""Read a table of :func:`svlib.probe`: what theory expects of this network, and a diagnosis in words.

Theory follows three numbers through the calls that the probe recorded, in the limit of infinite
width: the mean square q of a signal, its mean product r for two different inputs, and its squared
mean u over units. Of preactivations :math:`q=\sigma^2`, :math:`r=m^2`, u = 0.

- Weights of fan-in n and mean square s, random and independent of the data, and biases of mean
  square b take (q, r) to (n s q + b, n s r + b), and u to the squared mean of the biases.
- Positions of a transposed convolution of stride s see one of s x s parts of the kernel: where
  positions count as samples, r is divided by the number of parts.
- (Leaky) ReLU of slope a, on a Gaussian signal, takes q to :math:`\frac{1+a^2}2q` and r/q to
  C(r/q), the correlation map.
- BatchNorm in training mode, on a large batch, gives (1, 0); LayerNorm (1, (r - u)/(q - u)), before
  their scale and shift.
- A sum of independent signals has (q + q', r + r'). Signals are independent if random weights lie
  between them and what they have in common.

One pair of numbers stands for all pairs of inputs and of positions. That is exact for white noise
and an approximation for data whose pairs differ. Where a call is beyond this (pooling, attention,
other activations), theory starts again from the measured values of the next linear or convolutional
layer.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd

from svlib.probing.calls import MOVES, NORMS, WEIGHTED, Call
from svlib.theory import maps

COLLAPSED = 0.1
"""v^2/sigma^2 below which a layer counts as collapsed."""
SCALE = 100.0
"""Factor of sigma^2, between rows with no normalization between them, beyond which the scale counts as lost or exploding."""
CENTRED = 0.05
"""m^2/sigma^2, in the median of rows, below which sample means count as removed."""
BIAS = 0.5
"""Part of a collapsed first row's m^2 that its bias accounts for, beyond which the bias is named."""
DEAD = 0.25
"""Fraction of dead units before a ReLU that is worth a word."""
GRADIENTS = 100.0
"""Growth of squared gradients, from output to input, that is worth a word."""
DEVIATION = 0.1
"""Difference in v^2/sigma^2 between theory and measurement that is worth a word."""

_COLUMNS = ("name", "type", "m2", "v2", "sigma2", "v2_fraction", "ratio", "dead", "inputs")
_UNFOLDED = 12  # rows that a notebook shows without a click
_GAUSSIAN = 0.01  # squared mean over units, as a part of q, that theory neglects


class Signal(NamedTuple):
    """Mean square, mean product for two inputs, squared mean over units."""

    q: float
    r: float
    u: float


class Finding(NamedTuple):
    """One sentence of a diagnosis: its kind, what was found, what to do about it (may be empty)."""

    kind: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}{' ' + self.advice if self.advice else ''}"


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """A table with its theory and its diagnosis; in a notebook it shows all three.

    Attributes:
        table: The table of :func:`svlib.probe`.
        theory: For each of its rows ``name``, ``m2``, ``v2``, ``sigma2`` and ``v2_fraction``
            expected (NaN where theory is silent), and ``start``: empty, or why theory starts from
            the measured values at this row.
        findings: The diagnosis.
    """

    table: pd.DataFrame
    theory: pd.DataFrame
    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        return "\n".join(map(str, self.findings))

    def layers(self) -> pd.DataFrame:
        """What the table and, where it does not start there, the theory say of each layer, in the columns that matter."""
        shown = self.table[["name", "type", "m2", "v2", "sigma2", "v2_fraction", "ratio", "dead"]]
        shown = shown.assign(theory=self.theory.v2_fraction.where(self.theory.start == ""))
        return shown.rename(columns={"theory": "v2_fraction, theory"})

    def _repr_html_(self) -> str:
        return self.to_html(unfolded=len(self.table) <= _UNFOLDED)

    def to_html(self, *, unfolded: bool) -> str:
        """The diagnosis as a list, and behind it :meth:`layers` as a table that folds."""
        escaped = ([html.escape(part) for part in finding] for finding in self.findings)
        items = "".join(
            f"<li><b>{kind}</b>: {text} <i>{advice}</i></li>" for kind, text, advice in escaped
        )
        table = self.layers().to_html(
            index=False, border=0, float_format="{:.3g}".format, na_rep=""
        )
        head = f"<details{' open' if unfolded else ''}><summary>{len(self.table)} rows</summary>"
        return f'<ul>{items}</ul>\n{head}<div style="overflow-x: auto">{table}</div></details>'


def explain(table: pd.DataFrame) -> Explanation:
    """Say what theory expects of a probed network and what the measurement shows, with the numbers in it.

    Thresholds are the constants of :mod:`svlib.probing.explanation`.

    Args:
        table: A table of :func:`svlib.probe`, whole: its ``attrs`` hold what theory follows.
            Without them (read from a file, for example) there is a diagnosis without theory.

    Raises:
        TypeError: If ``table`` is not a DataFrame.
        ValueError: If it lacks columns of :func:`svlib.probe` or rows.

    Examples:
        >>> import svlib as sv
        >>> model = sv.networks.mlp(256, width=256, depth=30, outputs=256, seed=0)
        >>> explanation = explain(sv.probe(model, sv.data.gaussian(200, 256, seed=1)))
        >>> print([finding.kind for finding in explanation.findings])
        ['collapse', 'dead units', 'theory']
        >>> print(explanation.theory.v2_fraction.round(2).iloc[[0, 1, 29]].tolist())
        [1.0, 0.68, 0.03]
    """
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"table must be a DataFrame of svlib.probe, got {type(table).__name__}")
    if missing := [c for c in _COLUMNS if c not in table]:
        raise ValueError(f"table must have the columns of svlib.probe, got none named {missing}")
    if table.empty:
        raise ValueError("table must have rows, got none")
    if "step" in table and table.step.nunique() > 1:
        raise ValueError(
            f"table must be of one step, got {table.step.nunique()}: choose those rows of sv.Probe's table"
        )
    table = table.reset_index(drop=True)
    names, units = set(table.name), table.attrs.get("positions") == "units"
    calls = [_here(call, names, units) for call in table.attrs.get("calls", [])]
    theory, silent = _theory(table, calls)
    some = table[table.sigma2 > 0].reset_index(drop=True)
    wrong = [
        *_zero(table),
        *(found for part in (_scale, _collapse, _dead) if len(some) for found in part(some, calls)),
    ]
    if len(some) and not wrong:
        lowest = int(some.v2_fraction.to_numpy().argmin())
        text = f"v²/σ² is nowhere below {some.v2_fraction[lowest]:.3g} ({some.name[lowest]!r}), "
        text += f"and σ² changes less than {SCALE:g} times{' between normalizations' if _normalized(calls) else ''}."
        wrong = [Finding("sound", text)]
    rest = [
        found
        for part in (_dropout, _batchnorm, _gradients)
        if len(some)
        for found in part(some, calls)
    ]
    return Explanation(table, theory, (*wrong, *rest, *_agreement(table, theory, calls, silent)))


def _here(call: Call, names: set[str], units: bool) -> Call:
    """A call as it stands to a table: its row may have been left out, its positions may count as units."""
    if call.row not in names:
        call = replace(call, row=None)
    if not units:
        return (
            replace(call, function=f"{call.function} of a pattern over positions")
            if "pattern" in call.options
            else call
        )
    if "positions" in call.options:
        return replace(call, function="batch_norm over positions")
    return replace(
        call, options=call.options | {"phases": 1.0}
    )  # no two parts of a transposed convolution's kernel meet


def follow(call: Call, before: list[Signal | None]) -> Signal | None:
    """What theory expects of a call's output, given its parents'; ``None`` where it is silent."""
    o = call.options
    if call.function == "measured":
        return Signal(o["sigma2"], o["m2"], o["mean2"])
    if not before or any(signal is None for signal in before):
        return None
    (q, r, u), *others = [signal for signal in before if signal is not None]
    if call.function in WEIGHTED:
        return Signal(
            o["gain"] * q + o["bias2"],
            o["gain"] * r / o.get("phases", 1.0) + o["bias2"],
            o["bias_mean2"],
        )
    if call.function in MOVES:
        return Signal(q, r, u)
    if call.function in ("relu", "leaky_relu"):
        if q <= 0 or u > _GAUSSIAN * q:
            return None
        a = o.get("slope", 0.0)
        rho = maps.correlation(
            min(1.0, max(-1.0, r / q)), activation="leaky_relu", negative_slope=a
        )
        half = q * (1 + a**2) / 2
        return Signal(half, half * rho, q * (1 - a) ** 2 / (2 * math.pi))
    if call.function == "dropout":
        return Signal(q / o["keep"], r, u) if o["keep"] > 0 else None
    if call.function == "batch_norm" and "scale2" in o:  # by constants, not by the batch
        return _affine(Signal(q, r, u), o["scale2"], o["shift2"], o["shift_mean2"])
    if call.function in NORMS:
        removed = {"batch_norm": r, "layer_norm": u, "rms_norm": 0.0}[call.function]
        left = q - removed + o["eps"]
        normal = (
            Signal((q - removed) / left, (r - removed) / left, max(0.0, u - removed) / left)
            if left > 0
            else None
        )
        return normal and _affine(normal, o["gamma2"], o["beta2"], o["beta_mean2"])
    if call.function == "add" and len(call.parents) == 2:
        ((q2, r2, u2),) = others
        return Signal(q + q2, r + r2, u + u2) if math.sqrt(u * u2) <= _GAUSSIAN * (q + q2) else None
    if call.function == "add" and "constant2" in o:
        return _affine(Signal(q, r, u), 1.0, o["constant2"], o["constant_mean2"])
    if call.function == "mul" and "constant2" in o:
        return _affine(Signal(q, r, u), o["constant2"], 0.0, 0.0)
    return None


def _affine(signal: Signal, scale2: float, shift2: float, shift_mean2: float) -> Signal | None:
    """Units multiplied by constants and added to; silent where both the units and what is added have a mean."""
    q, r, u = (scale2 * part for part in signal)
    meet = math.sqrt(u * shift_mean2) > _GAUSSIAN * (q + shift2)
    return None if meet else Signal(q + shift2, r + shift2, u + shift_mean2)


def has_batchnorm(calls: list[Call]) -> bool:
    """Whether BatchNorm normalizes by the batch anywhere, as it does in training mode."""
    return any(
        call.function.startswith("batch_norm") and "gamma2" in call.options for call in calls
    )


def gradient_growth(calls: list[Call], *, batchnorm: bool = False) -> float:
    r"""Growth of squared gradients, input against output, of a network in which every unit has sample mean 0 and variance 1.

    A factor :math:`\pi/(\pi-1)` per ReLU and weighted layer behind it, which makes up for what the
    ReLU takes (for a slope, :func:`svlib.theory.maps.batchnorm_slope` at 1), multiplied along the
    way from input to output where it is least: skip connections without weights do not count.

    Args:
        calls: Of a table of :func:`svlib.probe`.
        batchnorm: Count a layer only if BatchNorm in training mode follows it.
    """
    ways: list[
        tuple[float, float, float]
    ] = []  # growth; the factor of a ReLU no weights have followed; of one no norm has
    for call in calls:
        growth, behind_relu, behind_weights = min(
            (ways[parent] for parent in call.parents), default=(1.0, 1.0, 1.0)
        )
        if call.function in ("relu", "leaky_relu"):
            slope = call.options.get("slope", 0.0)
            behind_relu = maps.batchnorm_slope(1.0, activation="leaky_relu", negative_slope=slope)
        elif call.function in WEIGHTED:
            behind_relu, behind_weights = 1.0, behind_relu
        if behind_weights > 1 and (not batchnorm or has_batchnorm([call])):
            growth, behind_weights = growth * behind_weights, 1.0
        ways.append((growth, behind_relu, behind_weights))
    outputs = [way for way, call in zip(ways, calls, strict=True) if call.is_output] or ways[-1:]
    return outputs[0][0] if outputs else 1.0


def _normalized(calls: list[Call]) -> bool:
    return any(call.function in NORMS or call.function.startswith("batch_norm") for call in calls)


def _theory(table: pd.DataFrame, calls: list[Call]) -> tuple[pd.DataFrame, Counter[str]]:
    """The theory's table, and which calls made theory silent how often."""
    sigma2, m2 = (
        {name: float(x) for name, x in zip(table.name, table[kind], strict=True)}
        for kind in ("sigma2", "m2")
    )
    signals: list[Signal | None] = []
    causes: list[str] = []
    expected: dict[str, tuple[Signal, str]] = {}
    for call in calls:
        before = [signals[parent] for parent in call.parents]
        found = follow(call, before)
        own = (
            f"{call.function} of what is not Gaussian"
            if call.function in ("relu", "leaky_relu")
            else call.function
        )
        cause = next((causes[parent] for parent in call.parents if signals[parent] is None), own)
        if found is None and call.row is not None and (weighted := _weighted(call, calls)):
            found = Signal(sigma2[call.row], m2[call.row], weighted.options.get("bias_mean2", 0.0))
            expected[call.row] = found, cause
        elif found is not None and call.row is not None:
            expected[call.row] = found, ""
        signals.append(found)
        causes.append(cause)
    rows = []
    for name in table.name:
        signal, start = expected.get(name, (Signal(*[math.nan] * 3), "no theory"))
        v2 = signal.q - signal.r
        fraction = v2 / signal.q if signal.q else math.nan
        rows.append((name, signal.r, v2, signal.q, fraction, start))
    frame = pd.DataFrame(rows, columns=["name", "m2", "v2", "sigma2", "v2_fraction", "start"])
    return frame, Counter(cause for _, cause in expected.values() if cause not in ("", "input"))


def _weighted(call: Call, calls: list[Call]) -> Call | None:
    """The call of a weighted layer that this is, or whose output it moves."""
    while call.function in MOVES:
        call = calls[call.parents[0]]
    return (
        call if call.function.split(" ")[0] in WEIGHTED else None
    )  # "linear over positions", for example


def _zero(table: pd.DataFrame) -> list[Finding]:
    names = table.name[~(table.sigma2 > 0)].tolist()
    if not names:
        return []
    text = f"σ² is 0 at {names[0]!r}{f' and {len(names) - 1} other rows' if names[1:] else ''}."
    return [
        Finding(
            "no signal",
            text,
            "Last layers set to 0 on purpose are no fault; others pass nothing on.",
        )
    ]


def _scale(table: pd.DataFrame, calls: list[Call]) -> list[Finding]:
    """Rows are compared with the first of those that have as many normalizations before them."""
    norms: list[int] = []
    for call in calls:
        before = max((norms[parent] for parent in call.parents), default=0)
        norms.append(before + _normalized([call]))
    passed = {call.row: count for call, count in zip(calls, norms, strict=True)}
    sigma2 = table.sigma2.to_numpy()
    start: dict[int, int] = {}
    first = [start.setdefault(passed.get(name, 0), row) for row, name in enumerate(table.name)]
    factors = sigma2 / sigma2[first]
    found = []
    for kind, row, factor in (
        ("explosion", int(factors.argmax()), factors.max()),
        ("loss of scale", int(factors.argmin()), 1 / factors.min()),
    ):
        if factor > SCALE:
            begin = first[row]
            text = f"σ² goes from {sigma2[begin]:.2g} at {table.name[begin]!r} to {sigma2[row]:.2g} at {table.name[row]!r}"
            text += f"{', with no normalization between' if _normalized(calls) else ''}."
            found.append(Finding(kind, text, "sv.init.total_ sets σ² to 1 in every layer."))
    return found


def _collapse(table: pd.DataFrame, calls: list[Call]) -> list[Finding]:
    names, fractions = table.name.tolist(), table.v2_fraction.to_numpy()
    row = next((row for row, fraction in enumerate(fractions) if fraction < COLLAPSED), None)
    if row is None:
        return []
    if row == 0:
        text = f"at the first layer v²/σ² is {fractions[0]:.2g}"
        bias2 = next(
            (call.options.get("bias2", 0.0) for call in calls if call.row == names[0]), 0.0
        )
        if bias2 > BIAS * table.m2[0]:
            return [
                Finding(
                    "collapse",
                    f"{text}: its bias is larger than what the inputs make of it.",
                    "Start with biases of 0.",
                )
            ]
        text += ": the inputs are nearly alike, or have a large mean."
        return [
            Finding(
                "collapse",
                text,
                "Subtract the mean of the inputs over the data before anything else.",
            )
        ]
    where = f"to {fractions[row]:.2g} at {names[row]!r} (row {row + 1} of {len(names)})"
    text = f"v²/σ² falls from {fractions[0]:.2g} at {names[0]!r} {where}"
    lowest = int(fractions.argmin())
    text += f", lowest {fractions[lowest]:.2g} at {names[lowest]!r}. " if lowest != row else ". "
    if fractions[-1] < COLLAPSED:
        ratio = table.ratio.iloc[-1]
        text += f"The last row has {fractions[-1]:.2g}, m/v = {ratio:.2g}: the sample mean takes over, inputs look alike."
    else:
        text += f"In all {int((fractions < COLLAPSED).sum())} rows are below {COLLAPSED}; the last is not ({fractions[-1]:.2g})."
    advice = "sv.init.sample_ removes the means; so does BatchNorm. Rescaling alone (sv.init.total_) does not undo what ReLU does; "
    advice += "it helps where biases or tokens outweigh a signal that has faded."
    return [Finding("collapse", text, advice)]


def _dead(table: pd.DataFrame, calls: list[Call]) -> list[Finding]:
    feeds = set()
    for call in calls:
        if call.function == "relu":
            source = calls[call.parents[0]]
            while source.row is None and (
                source.function in MOVES | {"dropout"} or source.function.startswith("max_pool")
            ):
                source = calls[source.parents[0]]
            feeds.add(source.row)
    dead = {
        name: float(fraction)
        for name, fraction in zip(table.name, table.dead, strict=True)
        if name in feeds
    }
    many = [name for name, fraction in dead.items() if fraction > DEAD]
    if not many:
        return []
    worst = max(many, key=dead.__getitem__)
    text = f"{dead[worst]:.0%} of the units of {worst!r}, before a ReLU, are positive for no input"
    text += f" ({len(many)} of {len(table)} layers above {DEAD:.0%})."
    advice = "They pass nothing on. With sv.init.sample_ every unit of a layer with a bias has inputs on either side of 0."
    return [Finding("dead units", text, advice)]


def _dropout(table: pd.DataFrame, calls: list[Call]) -> list[Finding]:
    if not any(call.function == "dropout" and call.options["keep"] < 1 for call in calls):
        return []
    return [
        Finding(
            "dropout",
            "is active, and its noise counts as variance over inputs.",
            "Measure in evaluation mode as well.",
        )
    ]


def _batchnorm(table: pd.DataFrame, calls: list[Call]) -> list[Finding]:
    if not has_batchnorm(calls) or len(table) < 2:
        return []
    median = table.ratio.iloc[1:].median()
    stops = "it stops the decay: " if (table.v2_fraction >= COLLAPSED).all() else ""
    text = f"in training mode, {stops}m/v is {median:.2g} in the median of rows; behind BatchNorm and ReLU theory has "
    return [Finding("BatchNorm", f"{text}{math.sqrt(1 / (math.pi - 1)):.3f}.")]


def _gradients(table: pd.DataFrame, calls: list[Call]) -> list[Finding]:
    centred = table.m2.iloc[1:].abs().median() < CENTRED * table.sigma2.iloc[1:].median()
    growth = gradient_growth(calls, batchnorm=not centred)
    if growth < GRADIENTS:
        return []
    means = "sample means of 0" if centred else "BatchNorm"
    text = f"with {means} squared gradients grow backwards from ReLU layer to ReLU layer, here some {growth:.0e} times in all."
    return [
        Finding(
            "gradients",
            text,
            "Residual connections or smaller learning rates help; see sv.probe_gradients.",
        )
    ]


def _agreement(
    table: pd.DataFrame, theory: pd.DataFrame, calls: list[Call], silent: Counter[str]
) -> list[Finding]:
    if not calls:
        return [
            Finding(
                "theory",
                "none, for the table has no record of the network's calls, as one read from a file or of sv.Probe.",
            )
        ]
    predicted = [
        row for row, start in enumerate(theory.start) if start == "" and table.sigma2[row] > 0
    ]
    causes = ", ".join(f"{cause} ({count})" for cause, count in silent.most_common(4))
    if not predicted:
        return [Finding("theory", f"follows no row; it stops at {causes or 'the first'}.")]
    names, expected, found = (
        table.name.tolist(),
        theory.v2_fraction.to_numpy(),
        table.v2_fraction.to_numpy(),
    )
    last, worst = (
        predicted[-1],
        max(predicted, key=lambda row: abs(float(expected[row] - found[row]))),
    )
    text = f"follows {len(predicted)} of {len(table)} rows{f'; it starts anew behind {causes}' if causes else ''}. "
    text += (
        f"At {names[last]!r} it expects v²/σ² = {expected[last]:.2g}, measured {found[last]:.2g}."
    )
    if abs(expected[worst] - found[worst]) <= DEVIATION:
        return [Finding("theory", text)]
    text += f" They differ most at {names[worst]!r}: expected {expected[worst]:.2g}, measured {found[worst]:.2g}."
    reasons = "Theory knows wide layers, random weights and one correlation for all pairs of inputs and positions; "
    reasons += "narrow layers, trained or calibrated weights and structured data depart from it."
    return [Finding("theory", text, reasons)]
