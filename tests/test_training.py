"""Training runs: repeatable, paired over initializations, and honest about divergence."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import svlib as sv
from svlib._random import stream
from svlib.training import Experiment, initialized, run

SMALL = Experiment("digits", "sample", width=4, iterations=4, batch_size=16, calibration=32)


@pytest.mark.parametrize("initialization", ["total", "sample", "batchnorm"])
@pytest.mark.parametrize("data", ["digits", "membranes"])
def test_record(data: str, initialization: str) -> None:
    experiment = replace(SMALL, data=data, initialization=initialization)
    record = run(experiment, seed=1)
    assert record.loss.dims == ("iteration",)
    assert np.isfinite(record.loss).all()
    assert 0 <= float(record.held_out_error) <= 1
    assert record.m2.dims == ("layer",)
    assert record.sizes["layer"] == (9 if data == "digits" else 13)
    assert {"svlib", "seed", "learning_rate", "initialization", "device", "wall_time"} <= set(record.attrs)
    fraction = record.v2 / (record.m2 + record.v2)
    assert initialization != "sample" or fraction.min() > 0.7


def test_repeatable() -> None:
    np.testing.assert_array_equal(run(SMALL, 3).loss, run(SMALL, 3).loss)
    assert not np.array_equal(run(SMALL, 3).loss, run(SMALL, 4).loss)


def test_runs_of_one_seed_are_paired() -> None:
    total, sample, batchnorm = (
        initialized(replace(SMALL, initialization=kind), seed=2) for kind in ("total", "sample", "batchnorm")
    )
    weights = [next(iter(sv.probing.weighted_layers(model).values())).weight.detach() for model in (total, sample, batchnorm)]
    assert float((weights[0] / weights[2]).std()) < 1e-5  # the same He weights up to one number
    per_channel = (weights[1] / weights[2]).flatten(1)
    assert float(per_channel.std(1).max()) < 1e-4


def test_loss_falls() -> None:
    record = run(replace(SMALL, iterations=60, width=8, learning_rate=0.003), seed=0)
    assert record.loss[-10:].mean() < 0.7 * record.loss[:3].mean()
    assert record.held_out_error < 0.7  # 0.9 by chance


def test_loss_of_the_first_step_is_by_hand() -> None:
    record = run(SMALL, seed=5)
    model, split = initialized(SMALL, seed=5), sv.data.digits()
    rows = torch.randperm(len(split.images), generator=stream(5, "order"))[:16]
    scores = torch.log_softmax(model(split.images[rows]).double(), 1)
    assert float(record.loss[0]) == pytest.approx(-float(scores[range(16), split.labels[rows]].mean().detach()), rel=1e-5)


def test_divergence_ends_the_run_and_is_recorded() -> None:
    record = run(replace(SMALL, learning_rate=1e6, iterations=30), seed=0)
    at = record.attrs["diverged"]
    assert 0 < at < 30
    assert np.isfinite(record.loss[:at]).all()
    assert np.isnan(record.loss[at:]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": "imagenet"}, ValueError, "data must be one of .* got 'imagenet'"),
        ({"initialization": "he"}, ValueError, "initialization must be one of"),
        ({"width": 0}, ValueError, "width must be at least 1"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1"),
        ({"batch_size": 1}, ValueError, "batch_size must be at least 2"),
        ({"calibration": 1}, ValueError, "calibration must be at least 2"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be"),
        ({"momentum": 1.5}, ValueError, "momentum must be"),
        ({"momentum": "0"}, TypeError, "momentum must be a real number"),
    ],
)
def test_bad_experiment(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_bad_run() -> None:
    with pytest.raises(TypeError, match="experiment must be an Experiment, got str"):
        run("digits", 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be an integer"):
        run(SMALL, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at most the 1437 training images"):
        run(replace(SMALL, batch_size=2000), 0)
