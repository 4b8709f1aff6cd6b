"""Two inputs: against the full simulation, plain arithmetic in float64, and exact laws."""

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma, polygamma
from scipy.stats import binom, ks_2samp

import svlib as sv
from svlib._random import Normals
from svlib.pairs import simulate_angles


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("angle", [0.02, 1.0, 2.5])
def test_equals_plain_arithmetic(slope: float, angle: float) -> None:
    """The same normal numbers, two activation vectors, lengths and angle by their definitions."""
    options = {"activation": "leaky_relu", "negative_slope": slope} if slope else {}
    record = simulate_angles(20, 5, angle=angle, networks=4, seed=3, dtype=torch.float64, **options)  # type: ignore[arg-type]
    for network in range(4):
        normals = Normals(3, "pair", range(network, network + 1), "cpu")
        cosine, ratio = math.cos(angle), 1.0
        for layer in range(1, 6):
            g1, g2 = normals.fill(torch.empty(1, 2, 20, dtype=torch.float64))[0].numpy()
            z = np.stack([g1, cosine * g1 + math.sqrt(1 - cosine**2) * g2])
            first, second = np.where(z > 0, z, slope * z)
            cosine = first @ second / math.sqrt((first @ first) * (second @ second))
            ratio *= math.sqrt((second @ second) / (first @ first))
            found = record.sel(network=network, layer=layer)
            np.testing.assert_allclose(
                found.ln_sin2, math.log(1 - cosine**2), rtol=1e-9, atol=1e-12
            )
            np.testing.assert_allclose(found.cosine, cosine, rtol=1e-12)
            np.testing.assert_allclose(found.log_ratio, math.log(ratio), atol=1e-12)


def test_is_the_gram_method_for_two_inputs() -> None:
    """A two-sample test of the angle between two preactivations one layer on, sampling weights."""
    inputs = np.array([[1.0, 0.0], [math.cos(1.2), math.sin(1.2)]])
    y = sv.sample_preactivations(
        25,
        [4],
        networks=3000,
        inputs=inputs,
        units=25,
        seed=1,
        method="weights",
        dtype=torch.float64,
    )
    first, second = np.maximum(y.values[:, 0], 0).swapaxes(0, 1)
    cosine = (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    record = simulate_angles(25, 5, angle=1.2, networks=3000, seed=2)
    assert ks_2samp(cosine, record.cosine[:, 5]).pvalue > 1e-3
    assert ks_2samp(cosine, record.cosine[:, 4]).pvalue < 1e-6
    ratio = 0.5 * np.log((second**2).sum(-1) / (first**2).sum(-1))
    assert ks_2samp(ratio, record.log_ratio[:, 5]).pvalue > 1e-3


def test_exact_law_of_vanishing_angles() -> None:
    """k ~ Bin(n, 1/2) active units: chi^2_(k-1) over chi^2_k; in float32, to sin = e^-90."""
    record = simulate_angles(32, 2000, angle=1e-6, networks=200, seed=1)
    assert record.ln_sin2[:, -1].max() < -80
    k = np.arange(2, 33)
    share = binom.pmf(k, 32, 0.5)
    mean = share @ (digamma((k - 1) / 2) - digamma(k / 2))
    second = (
        polygamma(1, (k - 1) / 2)
        + polygamma(1, k / 2)
        + (digamma((k - 1) / 2) - digamma(k / 2)) ** 2
    )
    variance = share @ second - mean**2
    steps = np.diff(record.ln_sin2.values, axis=1).ravel()
    error = steps.std() / math.sqrt(steps.size)
    assert abs(steps.mean() - mean) < 4 * error
    fourth = ((steps - steps.mean()) ** 4).mean()
    assert abs(steps.var() - variance) < 4 * math.sqrt((fourth - variance**2) / steps.size)
    np.testing.assert_allclose([mean, variance], [-0.07185, 0.2879], atol=6e-5)


def test_networks_do_not_depend_on_their_neighbours() -> None:
    many = simulate_angles(32, 400, angle=0.5, networks=600, seed=0)
    few = simulate_angles(32, 20, angle=0.5, networks=5, seed=0)
    np.testing.assert_allclose(many.ln_sin2[:5, :21], few.ln_sin2, rtol=1e-5)
    assert len(np.unique(many.ln_sin2[:, 1])) == 600


def test_dead_and_collinear_inputs_are_named() -> None:
    record = simulate_angles(3, 30, angle=1.0, networks=500, seed=0)
    dead = record.dead.values
    assert 0 < dead[:, -1].sum() <= 500
    assert (np.diff(dead.astype(int), axis=1) >= 0).all()
    assert np.isnan(record.ln_sin2.values[dead]).all()
    assert not np.isnan(record.ln_sin2.values[~dead]).any()
    collinear = np.isneginf(record.ln_sin2.values)
    assert collinear.any()  # one active unit
    assert (
        record.ln_sin2.values[~dead & ~collinear] > -60
    ).all()  # and rounding is not taken for an angle
    assert (record.cosine.values[collinear] > 1 - 1e-12).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"angle": 0}, ValueError, r"angle must be a finite number in \(0, 3\.14.*got 0\.0"),
        ({"angle": 4.0}, ValueError, "angle must be a finite number"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .* got 'tanh'"),
        ({"negative_slope": 0.1}, ValueError, "negative_slope must be 0 unless"),
        ({"networks": 0}, ValueError, "networks must be at least 1, got 0"),
        ({"dtype": torch.float16}, ValueError, "dtype must be one of"),
        ({"device": "toaster"}, ValueError, "device must be one of"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"width": 4, "depth": 2, "angle": 0.1, "networks": 2, "seed": 0}
    with pytest.raises(error, match=message):
        simulate_angles(**(good | change))  # type: ignore[arg-type]
