"""A network of the paper's ensemble that others published, rebuilt from its seed."""

import sys
from pathlib import Path

import numpy as np
import pytest

import svlib as sv

sys.path.insert(0, str(Path(__file__).parents[1] / "book"))
import published


def test_its_weights_are_those_that_were_printed() -> None:
    first = published.weights()[0].ravel()[:5]
    np.testing.assert_allclose(first, published.FIRST_WEIGHTS, rtol=0, atol=5e-9)


def test_its_variance_over_inputs_and_its_means() -> None:
    inputs = 40_000
    layers = published.activations(inputs)
    last = layers[-1]
    variance = last.var(0, ddof=1).mean()
    # theirs is from about 1,000 inputs: a relative error of some 2 %
    assert variance == pytest.approx(published.AVG_VARIANCE, rel=0.05)
    assert variance == pytest.approx(0.2005, abs=0.004)  # of 80,000 inputs, by other code
    found, error = last.mean(0)[:5], last.std(0)[:5]
    off = abs(found - published.LAST_MEANS) / (error * (1 / 1000 + 1 / inputs) ** 0.5)
    assert off.max() < 4
    lengths = np.linalg.norm(published.weights()[0], axis=0)
    exact = lengths / np.sqrt(2 * np.pi)  # the mean of relu of a Gaussian
    spread = layers[0].std(0) / np.sqrt(inputs)
    assert abs((layers[0].mean(0) - exact) / spread).max() < 5  # of 256 units


def test_their_ensembles_follow_the_law_of_finite_width() -> None:
    for (width, depth), row in published.read().items():
        law = sv.theory.finite_width(width, depth, features=width).fraction[-1]
        exact = sv.theory.trajectory(depth).fraction[-1]
        assert abs(row["fraction"] - law) < 4 * row["fraction error"]
        if depth >= 16:
            assert abs(row["fraction"] - exact) > 10 * row["fraction error"]
