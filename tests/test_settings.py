"""Settings of training beside the paper's: a rate that decays, images that are not centred."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from svlib.experiments import training
from svlib.experiments.comparison import collect
from svlib.experiments.state import State
from svlib.experiments.task import Task
from svlib.experiments.training import Experiment, initialized, run

COSINE = Experiment(
    "digits",
    "sample",
    width=4,
    iterations=12,
    batch_size=16,
    calibration=32,
    schedule="cosine",
    centred=False,
)


class Killed(BaseException):
    pass


def test_cosine_is_the_loop_by_hand() -> None:
    record = run(COSINE, 0)
    model, task = initialized(COSINE, 0), Task.load(COSINE, None, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), COSINE.learning_rate, COSINE.momentum)
    losses = []
    for step, (images, labels) in zip(range(12), task.batches(0, 0), strict=False):
        optimizer.param_groups[0]["lr"] = COSINE.learning_rate * math.cos(math.pi * step / 24) ** 2
        value = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    np.testing.assert_allclose(record.loss, losses, rtol=1e-4)
    constant = run(replace(COSINE, schedule="constant"), 0)
    assert float(record.loss[1]) == float(constant.loss[1])  # the first step has the full rate
    assert abs(float(record.loss[-1] / constant.loss[-1]) - 1) > 1e-3


def test_a_killed_run_whose_rate_decays_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = State.save

    def stop(state: State, path: Path) -> None:
        save(state, path)
        if state.iteration >= 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(State, "save", stop)
        patch.setattr(training, "_LOOK", 3)
        with pytest.raises(Killed):
            run(COSINE, 2, checkpoints=tmp_path, every=0.0)
    (path,) = tmp_path.glob("*.checkpoint")
    assert State.load(path, torch.device("cpu")).iteration == 6
    resumed, expected = run(COSINE, 2, checkpoints=tmp_path), run(COSINE, 2)
    assert resumed.drop_attrs().identical(expected.drop_attrs())
    # the length decides every step: a longer run is another
    run(replace(COSINE, iterations=14), 2, checkpoints=tmp_path)
    assert len(list(tmp_path.glob("*.checkpoint"))) == 2


def test_images_that_are_not_centred_fill_the_unit_interval() -> None:
    centred = Task.load(replace(COSINE, centred=True), None, "cpu").split
    split = Task.load(COSINE, None, "cpu").split
    assert (float(split.images.min()), float(split.images.max())) == (0, 1)
    raw = sv.data.digits()
    scale = float(raw.images.max() - raw.images.min())
    for mine, theirs in (
        (split.images, centred.images),
        (split.held_out_images, centred.held_out_images),
    ):
        apart = (mine - (theirs - raw.images.min()) / scale).abs().max()
        assert float(apart) < 1e-6
    assert abs(float(centred.images.mean())) < 1e-3 < 0.2 < float(split.images.mean())


def test_records_say_their_setting_and_older_ones_are_the_default(tmp_path: Path) -> None:
    record = run(replace(COSINE, iterations=2), 0)
    record.to_netcdf(tmp_path / "record.nc", engine="scipy")
    stored = xr.load_dataset(tmp_path / "record.nc", engine="scipy")
    assert (stored.attrs["schedule"], stored.attrs["centred"]) == ("cosine", 0)
    plain = replace(COSINE, iterations=2, schedule="constant", centred=True)
    new, old = run(plain, 0), run(plain, 1)
    del old.attrs["schedule"], old.attrs["centred"]
    assert collect([new, old]).sizes["seed"] == 2
    with pytest.raises(ValueError, match="records must agree in schedule"):
        collect([record, old])
    with pytest.raises(ValueError, match="schedule must be one of"):
        replace(COSINE, schedule="linear")
    with pytest.raises(TypeError, match="centred must be True or False"):
        replace(COSINE, centred=1)  # type: ignore[arg-type]
