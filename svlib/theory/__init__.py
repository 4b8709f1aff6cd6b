"""What is true at infinite width, and to first order in 1/width.

Numbers stand in ``activations``, ``maps``, ``depth``, ``edge``, ``limits``, ``width``,
``fluctuations``, ``batchnorm`` and ``angles``, derivations in ``symbolic``.
"""

from importlib import import_module as _import
from typing import TYPE_CHECKING, Any

from svlib.theory import angles, batchnorm, limits, maps
from svlib.theory.depth import Trajectory, trajectory
from svlib.theory.edge import Edge, edge_of_chaos
from svlib.theory.fluctuations import Fluctuations, band_plateau, fluctuations
from svlib.theory.width import FiniteWidth, finite_width, plateau

if TYPE_CHECKING:
    from svlib.theory import symbolic

__all__ = ["Edge", "FiniteWidth", "Fluctuations", "Trajectory", "angles", "band_plateau"]
__all__ += [
    "batchnorm",
    "edge_of_chaos",
    "finite_width",
    "fluctuations",
    "limits",
    "maps",
    "plateau",
    "symbolic",
    "trajectory",
]


def __getattr__(name: str) -> Any:
    if name == "symbolic":  # SymPy takes half a second to import, and numbers do not need it
        return _import("svlib.theory.symbolic")
    raise AttributeError(f"module 'svlib.theory' has no attribute {name!r}")
