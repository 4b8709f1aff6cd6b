"""Best rates and paired ratios against arithmetic on small numbers, by plain Python."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
import xarray as xr

import svlib as sv

LOST, MISSING = math.inf, math.nan
STUDENT = {2: 12.706204736432095, 3: 4.302652729911275}  # seeds: 97.5 % quantile of Student's t


def table(
    losses: dict[str, Sequence[Sequence[float]]], rates: Sequence[float] = (0.1, 0.2, 0.3)
) -> xr.DataArray:
    """Losses by initialization, rate and seed."""
    dims = ("initialization", "learning_rate", "seed")
    coordinates = {"initialization": list(losses), "learning_rate": list(rates)}
    return xr.DataArray(np.array(list(losses.values())), coordinates, dims)


def test_best_rate_is_that_of_the_lowest_mean_over_seeds() -> None:
    losses = table(
        {
            "total": [[4.0, 2.0, 3.0], [1.0, 2.0, 6.0], [0.5, 9.0, 9.0]],
            "sample": [[1.0, 1.0, 1.0], [0.9, 0.8, 0.7], [0.1, LOST, 0.1]],
            "batchnorm": [[3.0, 3.0, 3.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]],
        }
    )
    best = sv.comparison.best_rates(losses)
    assert best.learning_rate.to_dict() == {"total": 0.1, "sample": 0.2, "batchnorm": 0.3}
    # total: means 3, 3, 6.2; of equal means the first. sample: at 0.3 a seed diverged.
    assert best.loss.tolist() == pytest.approx([3.0, 0.8, 1.0])
    assert best.error.tolist() == pytest.approx([1 / math.sqrt(3), 0.1 / math.sqrt(3), 0.0])
    assert best.at_edge.tolist() == [True, False, True]
    backwards = sv.comparison.best_rates(losses[:, ::-1]).drop("total")  # whose rates tie
    assert backwards.equals(best.drop("total"))


def test_best_rate_with_runs_missing_or_lost() -> None:
    losses = table(
        {
            "total": [[2.0, 4.0], [3.0, MISSING], [MISSING, MISSING]],
            "sample": [[LOST, LOST], [1.0, LOST], [LOST, MISSING]],
        }
    )
    best = sv.comparison.best_rates(losses)
    total = best.loc["total"]
    assert total.learning_rate == 0.1  # 3 and 3
    assert total.at_edge
    middle = sv.comparison.best_rates(losses.where(losses != 2.0, 3.0)).loc["total"]
    assert (middle.learning_rate, middle.loss) == (0.2, 3.0)
    assert middle.at_edge  # no higher rate was run
    assert np.isnan(middle.to_dict()["error"])  # one seed
    assert best.isna().loc["sample", ["learning_rate", "loss"]].all()
    assert not best.at_edge["sample"]


def by_hand(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float, float]:
    """Ratio, interval and standard error."""
    logs = [math.log(a / b) for a, b in zip(above, below, strict=True)]
    middle, seeds = statistics.fmean(logs), len(logs)
    error = statistics.stdev(logs) / math.sqrt(seeds)
    half = STUDENT[seeds] * error
    ratio = math.exp(middle)
    return ratio, math.exp(middle - half), math.exp(middle + half), ratio * error


def found(ratio: xr.Dataset) -> tuple[float, float, float, float]:
    return tuple(float(ratio[name]) for name in ("ratio", "low", "high", "error"))  # type: ignore[return-value]


def seeds(**losses: Sequence[float]) -> xr.DataArray:
    kinds = xr.DataArray(list(losses), dims="initialization")
    count = len(next(iter(losses.values())))
    return xr.DataArray(
        np.array(list(losses.values())),
        {"initialization": kinds, "seed": range(count)},
        ("initialization", "seed"),
    )


def test_ratio_is_paired_over_seeds() -> None:
    losses = seeds(total=[2.0, 3.0, 5.0], sample=[1.0, 2.0, 4.0])
    ratio = sv.comparison.ratio(losses, "total", "sample")
    assert found(ratio) == pytest.approx(by_hand([2, 3, 5], [1, 2, 4]))
    assert float(ratio.ratio) == pytest.approx((2 * 1.5 * 1.25) ** (1 / 3))
    shuffled = losses.isel(seed=[2, 0, 1])
    assert found(sv.comparison.ratio(shuffled, "total", "sample")) == pytest.approx(found(ratio))
    turned = sv.comparison.ratio(losses, "sample", "total")
    assert float(turned.low) == pytest.approx(1 / float(ratio.high))


def test_ratio_with_unequal_seeds_takes_those_of_both() -> None:
    losses = seeds(total=[2.0, 3.0, 5.0, 7.0], sample=[MISSING, 1.0, 2.0, MISSING])
    ratio = sv.comparison.ratio(losses, "total", "sample")
    assert found(ratio) == pytest.approx(by_hand([3, 5], [1, 2]))
    with pytest.raises(ValueError, match="must have seeds of both total and sample, got none"):
        sv.comparison.ratio(losses[:, [0, 3]], "total", "sample")


@pytest.mark.parametrize("both", [False, True])
def test_ratio_with_a_diverged_seed_is_none(both: bool) -> None:
    losses = seeds(total=[2.0, LOST, 5.0], sample=[1.0, LOST if both else 2.0, 4.0])
    assert all(map(math.isnan, found(sv.comparison.ratio(losses, "total", "sample"))))


def test_ratio_of_one_seed_has_no_interval() -> None:
    ratio = sv.comparison.ratio(seeds(total=[3.0], sample=[2.0]), "total", "sample")
    assert float(ratio.ratio) == pytest.approx(1.5)
    assert all(math.isnan(x) for x in found(ratio)[1:])


def test_ratio_by_iteration() -> None:
    """Seed 2 is missing in one initialization; seed 1 diverges at iteration 3."""
    total = [[8.0, 6.0, 5.0, 4.0], [9.0, 6.0, 4.0, MISSING], [7.0, 7.0, 7.0, 7.0]]
    sample = [[4.0, 3.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [MISSING] * 4]
    losses = xr.DataArray(
        np.array([total, sample], np.float32),
        {"initialization": ["total", "sample"], "seed": [0, 1, 2], "iteration": range(4)},
        ("initialization", "seed", "iteration"),
    )
    ratio = sv.comparison.ratio(losses, "total", "sample")
    assert ratio.ratio.dims == ("iteration",)
    for at in range(3):
        expected = by_hand([total[0][at], total[1][at]], [sample[0][at], sample[1][at]])
        assert found(ratio.isel(iteration=at)) == pytest.approx(expected)
    assert all(map(math.isnan, found(ratio.isel(iteration=3))))


def record(loss: np.ndarray, iteration: Sequence[int], iterations: int) -> xr.Dataset:
    """As of ``collect``: three seeds at one rate; the second diverged, the third is missing."""
    one = ("initialization", "learning_rate", "seed")
    losses = np.stack([loss, np.where(np.arange(len(loss)) < 2, loss, np.nan), loss * np.nan])
    return xr.Dataset(
        {
            "loss": ((*one, "iteration"), losses[None, None]),
            "diverged": (one, np.array([[[-1.0, 2.0, np.nan]]])),
        },
        {"initialization": ["total"], "learning_rate": [0.1], "iteration": list(iteration)},
        {"iterations": iterations},
    )


def test_mean_loss() -> None:
    loss = np.arange(20.0) ** 2
    runs = record(loss, range(20), 20)
    assert sv.comparison.mean_loss(runs).values.ravel().tolist() == pytest.approx(
        [(18**2 + 19**2) / 2, LOST, MISSING], nan_ok=True
    )
    early = sv.comparison.mean_loss(runs, 3, 6)
    assert float(early[0, 0, 0]) == pytest.approx((9 + 16 + 25) / 3)
    assert early.dims == ("initialization", "learning_rate", "seed")
    assert float(sv.comparison.mean_loss(runs, 19)[0, 0, 0]) == 19**2
    # windows of 3 iterations, the last of 2: each counts by its length
    windows = record(np.array([5.0, 4.0, 3.0, 2.0]), [0, 3, 6, 9], 11)
    assert float(sv.comparison.mean_loss(windows, 6)[0, 0, 0]) == pytest.approx((3 * 3 + 2 * 2) / 5)
    assert float(sv.comparison.mean_loss(windows)[0, 0, 0]) == 2.0


def test_each_at_a_rate_of_its_own() -> None:
    losses = table({"total": [[1.0], [2.0], [3.0]], "sample": [[4.0], [5.0], [6.0]]})
    chosen = sv.comparison.at_rates(losses, {"sample": 0.3, "total": 0.2})
    assert chosen.sel(initialization="sample").item() == 6.0
    assert chosen.sel(initialization="total").item() == 2.0
    assert set(chosen.dims) == {"initialization", "seed"}
    with pytest.raises(KeyError):
        sv.comparison.at_rates(losses, {"total": 0.25})
