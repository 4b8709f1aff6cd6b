"""What is true at infinite width, and to first order in 1/width. Numbers here, derivations in ``svlib.theory.symbolic``."""

from svlib.theory import angles, maps, symbolic
from svlib.theory.finite_width import FiniteWidth, finite_width, plateau
from svlib.theory.trajectory import Trajectory, trajectory

__all__ = ["FiniteWidth", "Trajectory", "angles", "finite_width", "maps", "plateau", "symbolic", "trajectory"]
