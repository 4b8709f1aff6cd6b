"""What is true in the limit of infinite width. Numbers here, derivations in ``svlib.theory.symbolic``."""

from svlib.theory import maps, symbolic
from svlib.theory.trajectory import Trajectory, trajectory

__all__ = ["Trajectory", "maps", "symbolic", "trajectory"]
