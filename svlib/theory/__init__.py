"""What is true at infinite width, and to first order in 1/width.

==================================================  ================================================
Luther & Seung, arXiv:1902.04942                    here
==================================================  ================================================
sigma^2 = m^2 + v^2, of one network                 :func:`svlib.moments.by_definition`; fast, and
                                                    for every unit, :func:`svlib.decompose`
rho' = f(rho), rho = m^2/sigma^2: a layer of ReLU   :func:`maps.f`, as printed;
                                                    :func:`maps.correlation` keeps its digits
m and v of every layer, from rho = 0 on             :func:`trajectory`
the decay of v at great depth, 3 pi/(sqrt(2) l)     :func:`limits.intercept`, with what comes next
m/v of finite width, the figure's curves            :func:`svlib.simulate` measures them,
                                                    :func:`finite_width` is first order in 1/N
m^2/sigma^2 = 1/pi before every BatchNorm           :func:`maps.batchnorm_correlation`
==================================================  ================================================

Beyond the paper: any activation, weights and biases (``activations``, ``edge``), two inputs at an
angle (``angles``), the spread over networks (``fluctuations``), the drift under BatchNorm
(``batchnorm``). Derivations in SymPy stand in the book, ``book/derivations.py``.
"""

from svlib.theory import angles, batchnorm, limits, maps
from svlib.theory.depth import Trajectory, trajectory
from svlib.theory.edge import Edge, edge_of_chaos
from svlib.theory.fluctuations import Fluctuations, band_plateau, fluctuations
from svlib.theory.width import FiniteWidth, finite_width, plateau

__all__ = ["Edge", "FiniteWidth", "Fluctuations", "Trajectory", "angles", "band_plateau"]
__all__ += [
    "batchnorm",
    "edge_of_chaos",
    "finite_width",
    "fluctuations",
    "limits",
    "maps",
    "plateau",
    "trajectory",
]
