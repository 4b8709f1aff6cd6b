"""svlib: what a network does to the variance over its inputs, what theory says, and the repair.

The total variance of preactivations is sigma^2 = m^2 + v^2: squared sample mean and sample
variance. He initialization preserves sigma^2, and v^2 decays with depth (Luther & Seung,
arXiv:1902.04942). Names are imported on first use, so that ``import svlib`` costs little.
"""

from importlib import import_module as _import
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names once more, for editors and type checkers
    from svlib import plot as plot
    from svlib import sweep as sweep
    from svlib import theory as theory
    from svlib.ensemble import Ensemble as Ensemble
    from svlib.experiments import comparison as comparison
    from svlib.experiments import data as data
    from svlib.experiments import networks as networks
    from svlib.experiments import training as training
    from svlib.moments import Decomposition as Decomposition
    from svlib.moments import Moments as Moments
    from svlib.moments import decompose as decompose
    from svlib.pairs import simulate_angles as simulate_angles
    from svlib.probing import explanation as explanation
    from svlib.probing import init as init
    from svlib.probing import report as report
    from svlib.probing.explanation import Explanation as Explanation
    from svlib.probing.explanation import assert_healthy as assert_healthy
    from svlib.probing.explanation import explain as explain
    from svlib.probing.probe import probe as probe
    from svlib.probing.probe import probe_gradients as probe_gradients
    from svlib.probing.watch import Probe as Probe
    from svlib.simulation import sample_preactivations as sample_preactivations
    from svlib.simulation import simulate as simulate
    from svlib.simulation import summarize as summarize

    __version__: str

_MODULES = {  # room: modules that are reached by their own name
    "svlib": ["plot", "sweep", "theory"],
    "svlib.experiments": ["comparison", "data", "networks", "training"],
    "svlib.probing": ["explanation", "init", "report"],
}
_NAMES = {  # module: its names that svlib has too
    "svlib.ensemble": ["Ensemble"],
    "svlib.moments": ["Decomposition", "Moments", "decompose"],
    "svlib.pairs": ["simulate_angles"],
    "svlib.simulation": ["sample_preactivations", "simulate", "summarize"],
    "svlib.probing.probe": ["probe", "probe_gradients"],
    "svlib.probing.watch": ["Probe"],
    "svlib.probing.explanation": ["Explanation", "assert_healthy", "explain"],
}
_WHERE = {name: (room, "") for room, names in _MODULES.items() for name in names}
_WHERE |= {name: (room, name) for room, names in _NAMES.items() for name in names}
_EXTRAS = {"matplotlib": "plot", "PIL": "train", "sklearn": "train", "pooch": "train"}
_EXTRAS |= {"distributed": "cluster", "dask_jobqueue": "cluster", "transformers": "models"}
__all__ = sorted([*_WHERE, "__version__"])


def _missing(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error of a package that is not installed, with the extra that brings it."""
    extra = _EXTRAS.get(str(error.name).split(".")[0])
    if extra is None:
        return error
    words = f"{error.name} is not installed: pip install 'svlib[{extra}]', or '.[{extra}]' in the"
    return ModuleNotFoundError(f"{words} project's folder", name=error.name)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # only here: it takes as long as all the rest

        return version("svlib")
    if name not in _WHERE:
        raise AttributeError(f"module 'svlib' has no attribute {name!r}")
    room, within = _WHERE[name]
    try:
        return getattr(_import(room), within) if within else _import(f"{room}.{name}")
    except ModuleNotFoundError as error:
        raise _missing(error) from None


def __dir__() -> list[str]:
    return __all__
