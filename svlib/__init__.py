"""svlib: what a network does to the variance over its inputs, what theory says, and the repair.

The total variance of preactivations is sigma^2 = m^2 + v^2: squared sample mean and sample variance. He's
initialization keeps sigma^2, and v^2 decays with depth (Luther & Seung, arXiv:1902.04942).
"""

from svlib import data, explanation, init, networks, plot, report, sweep, theory, training
from svlib.angles import simulate_angles
from svlib.explanation import Explanation, explain
from svlib.moments import Decomposition, Moments, decompose
from svlib.probing import Probe, probe, probe_gradients
from svlib.simulation import sample_preactivations, simulate, summarize

__all__ = [
    "Decomposition",
    "Explanation",
    "Moments",
    "Probe",
    "data",
    "decompose",
    "explain",
    "explanation",
    "init",
    "networks",
    "plot",
    "probe",
    "probe_gradients",
    "report",
    "sample_preactivations",
    "simulate",
    "simulate_angles",
    "summarize",
    "sweep",
    "theory",
    "training",
]
