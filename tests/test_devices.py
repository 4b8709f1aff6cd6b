"""Kernels on a device that every machine has and that refuses to mix with the processor: "meta".

Its tensors have shapes and no entries. (Fake CUDA tensors cannot be indexed where torch is built
without CUDA.) What depends on entries is replaced here.
"""

from typing import Any

import pytest
import torch

from svlib import ensemble as ensembles
from svlib import gram, layers, pairs
from svlib._sums import _last_elsewhere, _split_elsewhere

META = torch.device("meta")


class Placed:
    """Normal numbers of a device without generators."""

    def __init__(self, *_: Any) -> None: ...

    def fill(self, out: torch.Tensor) -> torch.Tensor:
        return out.normal_()


@pytest.fixture(autouse=True)
def _no_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensembles, "Normals", Placed)


def propagated(depth: int = 3, **options: Any) -> list[Any]:
    """Layers of an ensemble that is put on a device without one."""
    made = ensembles.Ensemble(12, samples=5, seed=0, method="weights", **options)
    object.__setattr__(made, "device", META)
    return [(y, scale) for y, scale in ensembles.propagate(made, depth, range(4))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "leaky_relu", "negative_slope": 0.3, "residual": 0.1},
        {"activation": "tanh", "bias_variance": 0.1},
        {"activation": "gelu", "normalization": "rms"},
        {"normalization": "batch"},
        {"normalization": "layer"},
        {"weights": "orthogonal"},
    ],
    ids=str,
)
def test_networks_stay_on_their_device(options: dict[str, Any]) -> None:
    for y, log_scale in propagated(**options):
        assert y.device.type == log_scale.device.type == "meta"
        assert y.shape == (4, 5, 12)


def test_a_tensor_made_elsewhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.activated
    monkeypatch.setattr(layers, "activated", lambda y, *rest: right(y, *rest) + torch.zeros(12))
    with pytest.raises(RuntimeError, match=r"device cpu is not on the expected device meta"):
        propagated()


def test_statistics_and_factors_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.randn(4, 5, 12, device=META)
    means, squares, largest = _last_elsewhere(y)
    assert means.device.type == squares.device.type == largest.device.type == "meta"
    assert gram._triangular(y).device.type == "meta"
    linear = gram.Linear("gram", Placed(), like=y)  # type: ignore[arg-type]
    monkeypatch.setattr(gram, "factor", lambda a: torch.zeros(4, 5, 5, device=a.device))
    assert linear(y, 2.0, torch.empty_like(y)).device.type == "meta"


def test_the_split_along_the_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []

    def cpu(self: torch.Tensor) -> torch.Tensor:
        moved.append(self.device.type)
        return self

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: self)
    squares = _split_elsewhere(torch.randn(4, 5, 12, device=META))
    assert moved == ["meta"] * 3
    assert [x.shape for x in squares] == [(4,)] * 3


def test_pairs_stay_on_their_device() -> None:
    pair = pairs._Pair(Placed(), torch.empty(4, 2, 12, device=META), 0.5, 0.0)  # type: ignore[arg-type]
    pair.advance()
    assert pair.cosine.device.type == pair.log_ratio.device.type == "meta"
