"""The decomposition against arithmetic done by hand, and in chunks of any size."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svlib import Moments, decompose
from svlib._sums import (
    _last_elsewhere,
    _last_on_processor,
    _split_elsewhere,
    _split_on_processor,
    along_last,
)
from svlib.moments import by_definition, split_along_ray

GENERATOR = np.random.default_rng(0)


def by_hand(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """m^2 and v^2 per unit of y (inputs, units, positions), from all pairs of different inputs."""
    means = y.mean(-1)
    pairs = list(permutations(range(len(y)), 2))
    m2 = sum(means[a] * means[b] for a, b in pairs) / len(pairs)
    return np.asarray(m2), (y**2).mean((0, 2)) - m2


@pytest.mark.parametrize("positions", [1, 6])
def test_equals_arithmetic_by_hand(positions: int) -> None:
    y = GENERATOR.normal(1.0, 2.0, (5, 4, positions))
    m2, v2 = by_hand(y)
    found = decompose(y, 0, 1, (2,))
    np.testing.assert_allclose(found.squared_mean, m2, rtol=1e-12)
    np.testing.assert_allclose(found.variance, v2, rtol=1e-12)
    np.testing.assert_allclose(found.sigma2, (y**2).mean(), rtol=1e-14)
    np.testing.assert_array_equal(found.largest, y.max((0, 2)))
    np.testing.assert_allclose(found.ratio, np.sqrt(max(m2.mean(), 0) / v2.mean()), rtol=1e-12)
    np.testing.assert_allclose(found.fraction, v2.mean() / (m2 + v2).mean(), rtol=1e-12)


def test_without_positions_is_the_textbook_estimate() -> None:
    y = GENERATOR.normal(1.0, 2.0, (7, 3))
    found = decompose(y)
    np.testing.assert_allclose(found.variance, y.var(0, ddof=1), rtol=1e-13)
    np.testing.assert_allclose(
        found.squared_mean, y.mean(0) ** 2 - y.var(0, ddof=1) / 7, rtol=1e-13
    )


def test_the_plain_lines_say_the_same() -> None:
    for inputs, units, mean in ((2, 1, 0.0), (7, 3, 1.0), (50, 20, -3.0)):
        y = GENERATOR.normal(mean, 2.0, (inputs, units))
        found = decompose(y)
        assert by_definition(y) == pytest.approx(
            (float(found.m2), float(found.v2)), rel=1e-12, abs=1e-12
        )


def test_unbiased() -> None:
    y = GENERATOR.normal(0.5, 1.0, (20_000, 3, 1))  # networks, inputs, units
    found = decompose(y, sample_dim=1, unit_dim=2)
    for estimate, truth in ((found.m2, 0.25), (found.v2, 1.0)):
        error = estimate.std(ddof=1) / np.sqrt(len(estimate))
        assert abs(estimate.mean() - truth) < 4 * error
    assert (found.m2 < 0).any()  # never clipped


def test_after_batchnorm_m2_is_minus_one_over_inputs_less_one() -> None:
    y = GENERATOR.normal(size=(8, 5))
    y = (y - y.mean(0)) / y.std(0)
    assert decompose(y).m2 == pytest.approx(-1 / 7, rel=1e-12)


@given(
    cuts=st.lists(st.integers(1, 49), max_size=6),
    offset=st.sampled_from([0.0, 1e3, -1e8]),
    positions=st.sampled_from([1, 3]),
    merged=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_chunks_give_the_same(
    cuts: list[int], offset: float, positions: int, merged: bool
) -> None:
    y = np.random.default_rng(1).normal(size=(50, 4, positions)) + offset
    chunks = np.split(y, sorted(set(cuts)))
    whole, parts = decompose(y, 0, 1, (2,)), Moments(0, 1, (2,))
    for chunk in chunks:
        parts = parts.merge(Moments(0, 1, (2,)).update(chunk)) if merged else parts.update(chunk)
    found = parts.result()
    assert found.samples == 50
    np.testing.assert_array_equal(found.largest, whole.largest)
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(found.variance, whole.variance, rtol=1e-12 + 1e-15 * abs(offset))


def test_keeps_accuracy_beside_a_large_mean() -> None:
    y = GENERATOR.normal(size=(1000, 3))
    np.testing.assert_allclose(decompose(y + 2.0**40).variance, decompose(y).variance, rtol=1e-3)
    mean_of_squares = ((y + 2.0**40) ** 2).mean(0) - (y + 2.0**40).mean(0) ** 2
    assert not np.allclose(
        mean_of_squares, y.var(0), rtol=0.5
    )  # the formula that this guards against


def test_blocks_give_the_same_in_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.from_numpy(GENERATOR.normal(3.0, 1.0, (7, 5, 6, 4)))
    whole = decompose(y, 0, 1, (2, 3))
    monkeypatch.setattr("svlib._sums._last_on_processor", _last_elsewhere)
    monkeypatch.setattr("svlib._sums._ENTRIES", {False: 50, True: 50})
    for layout in (y, y.contiguous(memory_format=torch.channels_last)):
        found = decompose(layout, 0, 1, (2, 3))
        for name in ("mean", "squared_mean", "variance", "largest"):
            np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-12)
    flat = y.reshape(-1, 4)
    np.testing.assert_allclose(decompose(flat).variance, flat.var(0), rtol=1e-12)


def test_tensors_arrays_and_dimensions_agree() -> None:
    y = GENERATOR.normal(size=(4, 6, 3, 2)).astype(np.float32)  # units, inputs, networks, positions
    found = decompose(torch.from_numpy(y), 1, 0, (3,))
    assert found.m2.shape == (3,)
    assert found.mean.shape == (3, 4)
    for network in range(3):
        alone = decompose(y[:, :, network].transpose(1, 0, 2), 0, 1, (2,))
        assert found.v2[network] == pytest.approx(float(alone.v2), rel=1e-13)


def test_sums_of_squares_that_underflow_are_not_negative() -> None:
    y = torch.full((1, 2, 10_000), 1e-162, dtype=torch.float64)
    y[..., 0] = 0
    assert (y.sum(-1) ** 2 > 0).all()  # the squares underflow, that of the sum does not
    for layout in (y, y.mT.contiguous().mT):
        assert (along_last(layout)[1] == 0).all()
        assert (_last_elsewhere(layout)[1] == 0).all()
    found = decompose(y[0].T)
    assert (found.variance == 0).all()
    assert found.v == 0


def test_zero_over_zero_is_nan_without_a_warning() -> None:
    found = decompose(np.zeros((3, 2)))
    assert np.isnan(found.ratio)
    assert np.isnan(found.fraction)
    assert found.sigma2 == 0
    assert decompose(np.ones((3, 2))).ratio == np.inf


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (np.ones((1, 3)), ValueError, "at least 2 inputs, got 1"),
        (np.ones((0, 3)), ValueError, "must not be empty"),
        (np.ones((2, 0)), ValueError, "must not be empty"),
        (np.ones(3), ValueError, r"distinct dimensions \(0, -1\)"),
        (
            np.array([[1.0, np.nan], [1, 1]]),
            ValueError,
            "y must be finite, got 1 NaN or infinite of 4",
        ),
        (np.array([[1.0, np.inf], [1, 1]]), ValueError, "must be finite"),
        (np.ones((2, 2), dtype=complex), TypeError, "real numbers"),
        (np.ones((2, 2), dtype=bool), TypeError, "real numbers"),
        ("text", TypeError, "y must be an array or tensor"),
        (None, TypeError, "y must be an array or tensor"),
    ],
)
def test_bad_input(y: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decompose(y)


def test_bad_chunks() -> None:
    moments = Moments().update(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"units of shape \(3,\), got \(4,\)"):
        moments.update(np.ones((2, 4)))
    with pytest.raises(TypeError, match="must be a Moments, got int"):
        moments.merge(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dimensions"):
        moments.merge(Moments(1, 0))
    with pytest.raises(ValueError, match="at least 2 inputs, got 0"):
        Moments().result()


def test_split_along_ray_by_hand() -> None:
    """Projections on the direction of the mean, and what is left of each input, in float64."""
    y = np.random.default_rng(1).normal(size=(3, 6, 4)) + 2.0
    for values, tolerance in ((y, 1e-12), (y.astype(np.float32), 1e-5)):
        found = split_along_ray(values)
        for network in range(3):
            mean = y[network].mean(0)
            ray = mean / np.linalg.norm(mean)
            along = (y[network] - mean) @ ray
            across = y[network] - mean - np.outer(along, ray)
            expected = decompose(y[network])
            np.testing.assert_allclose(
                found.radial[network], (along**2).sum() / 5 / 4, rtol=tolerance
            )
            np.testing.assert_allclose(
                found.angular[network], (across**2).sum() / 5 / 4, rtol=tolerance
            )
            np.testing.assert_allclose(found.m2[network], expected.m2, rtol=tolerance)
            for name in ("v2", "sigma2", "fraction", "ratio"):
                values, right = getattr(found, name)[network], getattr(expected, name)
                np.testing.assert_allclose(values, right, rtol=tolerance)


def test_split_keeps_small_angles() -> None:
    """Inputs on one ray to 1e-9: the angular part is 1e-18 of the radial one, not rounding."""
    ray, side = np.array([3.0, 4.0, 0.0]), np.array([0.0, 0.0, 1.0])
    lengths = np.array([[1.0], [2.0], [4.0], [5.0]])
    found = split_along_ray(lengths * ray + 1e-9 * np.array([[1.0], [-1.0], [1.0], [-1.0]]) * side)
    assert found.angular == pytest.approx(4e-18 / 9, rel=1e-3)
    assert found.radial == pytest.approx(25 * lengths.var(ddof=1) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4, 1000), (2, 3, 5, 7), (1, 6, 1)])
def test_sums_are_one_on_every_device(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    y = (1e3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    for layout in (y, y.transpose(0, 1)):
        for found, other in zip(_last_on_processor(layout), _last_elsewhere(layout), strict=True):
            np.testing.assert_allclose(found, other, rtol=1e-10, atol=1e-6)
        assert torch.equal(_last_on_processor(layout)[2], layout.amax(-1).double())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("side", [1.0, 1e-3, 0.0])
def test_split_is_one_on_every_device(dtype: torch.dtype, rounding: float, side: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ray, noise = (
        torch.randn(3, 1, 500, generator=generator),
        torch.randn(3, 40, 500, generator=generator),
    )
    y = ((1 + torch.rand(3, 40, 1, generator=generator)) * ray + side * noise).to(dtype)
    for part, other in zip(_split_on_processor(y), _split_elsewhere(y), strict=True):
        np.testing.assert_allclose(part, other, rtol=rounding / max(side, 1e-3), atol=1e-8)
    kept = _split_on_processor(y[0])[0]
    assert kept.shape == ()
    assert kept == _split_on_processor(y)[0][0]


def test_split_without_a_mean() -> None:
    found = split_along_ray([[1.0, 2.0], [-1.0, -2.0]])
    assert found.radial == 0
    assert found.angular == pytest.approx(5.0)
    for bad in ([1.0, 2.0], [[1.0, 2.0]], np.empty((2, 0))):
        with pytest.raises(ValueError, match=r"y must have shape \(\.\.\., inputs, units\)"):
            split_along_ray(bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [32, 3000])
@pytest.mark.parametrize("alive", [0, 3, -1])
def test_one_input_alone_has_no_mean(dtype: torch.dtype, samples: int, alive: int) -> None:
    """All inputs but one are 0 always; rounding must not count as a mean."""
    y = torch.zeros(50, samples, 16, dtype=dtype)
    y[:, alive] = torch.randn(50, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = split_along_ray(y)
    assert (found.m2 == 0).all()
    assert (found.v2 > 0).all()
    y[:, 4] = 0.1 * y[:, alive]  # their product is a mean
    assert (split_along_ray(y).m2 > 0).all()


def test_split_of_half_precision() -> None:
    y = torch.tensor([[1.0, 2.0], [3.0, 7.0]])
    found = split_along_ray(y.bfloat16())
    assert found.v2 == pytest.approx(split_along_ray(y).v2, rel=0.02)


def test_split_at_the_ends_of_float32() -> None:
    y = np.array([[1, 2], [3, 7]], dtype=np.float32)
    for scale in (1e-25, 1e25):
        found, expected = split_along_ray(y * np.float32(scale)), split_along_ray(y)
        np.testing.assert_allclose(
            [found.m2, found.v2], np.array([expected.m2, expected.v2]) * scale**2, rtol=1e-5
        )


def test_mask_equals_inputs_without_padding() -> None:
    # (inputs, positions, positions, units)
    y = np.random.default_rng(0).normal(1.0, 1.0, (6, 4, 5, 3))
    mask = np.random.default_rng(1).random((6, 4, 5)) < 0.5
    mask[2] = False  # an input of which nothing counts
    padded = np.where(mask[..., None], y, np.nan)
    found = decompose(padded, 0, 3, (1, 2), mask=mask)
    alone = [y[a][mask[a]] for a in range(6) if mask[a].any()]  # (positions that count, units)
    means = np.array([x.mean(0) for x in alone])
    pairs = [means[a] * means[b] for a in range(5) for b in range(5) if a != b]
    np.testing.assert_allclose(found.m2, np.mean(pairs))
    np.testing.assert_allclose(found.sigma2, np.mean([(x**2).mean() for x in alone]))
    np.testing.assert_allclose(found.largest, np.max([x.max(0) for x in alone], axis=0))
    assert found.samples == 5
    chunks = Moments(0, 3, (1, 2))
    for part in (slice(0, 2), slice(3, 6)):
        chunks.update(padded[part], mask[part])
    np.testing.assert_allclose(chunks.result().v2, found.v2)
    whole = decompose(y, 0, 3, (1, 2), mask=np.ones((6, 4, 5), bool))
    np.testing.assert_allclose(whole.v2, decompose(y, 0, 3, (1, 2)).v2)
    np.testing.assert_allclose(
        decompose(y[:, 1, 2], mask=mask[:, 1, 2]).v2, decompose(y[:, 1, 2][mask[:, 1, 2]]).v2
    )


def test_bad_masks() -> None:
    y = torch.ones(3, 4, 2)
    wanted = r"mask must be boolean of shape \(inputs, \*positions\) \(3, 4\), got "
    for mask, got in ((torch.ones(3, 4), "torch.float32"), (torch.ones(3, 2) > 0, "torch.bool")):
        with pytest.raises(ValueError, match=wanted + got):
            decompose(y, 0, 2, (1,), mask=mask)
    with pytest.raises(ValueError, match="mask must leave an entry, got False everywhere"):
        decompose(y, 0, 2, (1,), mask=torch.zeros(3, 4) > 0)
