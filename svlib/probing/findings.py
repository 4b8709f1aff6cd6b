"""Findings, and the thresholds beyond which there are any."""

from __future__ import annotations

from dataclasses import dataclass, field

COLLAPSED = 0.1
"""v^2/sigma^2 below which an output counts as collapsed."""
SCALE = 100.0
"""Factor between the sigma^2 of outputs, with no normalization between them, that is reported."""
DEAD = 0.25
"""Fraction of units that a rectifier lets nothing through of, for no input, that is reported."""
SATURATED = 0.5
"""Fraction of an activation's outputs within 1 % of its ends that is reported."""
SHARP = 0.9
"""Mean largest weight of a softmax that is reported."""
FOREIGN = 10.0
"""Mean square of a batch in units of BatchNorm's running statistics, or 1 over it."""
OFF = 3.0
"""Root mean square of the means of an input's columns, over that of their deviations."""
APART = 30.0
"""Deviation of a column of an input, over the median of its columns."""
SIZE = 10.0
"""Size of an input, or 1 over it."""
GROWTH = 1000.0
"""Growth of squared gradients backwards through layers of one size, or 1 over it."""
WORSE = 1.5
"""Loss at the start over that of an output of 0."""
PADDED = 0.2
"""Fraction of padding in an input."""
BEYOND_ALL = 16.0  # decades of what is exactly 0
NOTHING_PASSES = 14.0


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        kind: "collapse", "explosion", "loss of scale", "dead units", "no signal", "saturation",
            "statistics", "inputs", "output scale", "mixing", "gradients", "not finite", or
            "nothing found".
        place: The layer, or the function in a module, where it is.
        text: The observation in words.
        value: The number that is beyond its threshold.
        decades: How far, in powers of ten.
        note: Whether it seldom hurts.
        cause: What removing helped most, in words.
        removed: The number with suspects taken away, one after the other, by words.
        cure: Code that was tried and made it better.
        parts: Change of the logarithm of v^2/sigma^2 (or sigma^2) by place along the way; they add
            up to that of the text.
    """

    kind: str
    place: str
    text: str
    value: float
    decades: float = 0.0
    note: bool = False
    cause: str = ""
    removed: dict[str, float] = field(default_factory=dict)
    cure: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    number: int = -1  # of the node at which causes are looked for
    start: int = -1

    def __str__(self) -> str:
        words = f"{'note, ' * self.note}{self.kind}: {self.text}"
        if self.removed:
            told = [f"{value:.2g} {words}" for words, value in self.removed.items()]
            words += f" {'; then '.join(told)}."
        return f"{words} {self.cure}".strip()
