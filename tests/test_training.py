"""Training runs: repeatable, paired over initializations, resumed bit for bit, honest if lost."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner
from PIL import Image
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from svlib.__main__ import main
from svlib._check import NotFiniteError
from svlib._random import stream
from svlib.experiments import state as states
from svlib.experiments import task as tasks
from svlib.experiments import training
from svlib.experiments.state import State
from svlib.experiments.task import Task
from svlib.experiments.training import Experiment, initialized, run

SMALL = Experiment("digits", "sample", width=4, iterations=4, batch_size=16, calibration=32)


@pytest.mark.parametrize("initialization", ["total", "sample", "batchnorm"])
@pytest.mark.parametrize("data", ["digits", "membranes"])
def test_record(data: str, initialization: str) -> None:
    experiment = replace(SMALL, data=data, initialization=initialization, probed=(2,))
    record = run(experiment, seed=1)
    assert record.loss.dims == ("iteration",)
    assert np.isfinite(record.loss).all()
    assert record.probed.values.tolist() == [0, 2, 4]
    assert ((record.held_out_error >= 0) & (record.held_out_error <= 1)).all()
    assert ("held_out_iou" in record) == (data == "membranes")
    assert record.m2.dims == record.v2.dims == record.gradient2.dims == ("probed", "layer")
    assert record.sizes["layer"] == (9 if data == "digits" else 13)
    about = {"svlib", "seed", "learning_rate", "initialization", "device", "wall_time", "source"}
    assert about | {"sha256"} <= set(record.attrs)
    fraction = (record.v2 / (record.m2 + record.v2)).sel(probed=0)
    assert initialization != "sample" or fraction.min() > 0.7


def test_repeatable() -> None:
    np.testing.assert_array_equal(run(SMALL, 3).loss, run(SMALL, 3).loss)
    assert not np.array_equal(run(SMALL, 3).loss, run(SMALL, 4).loss)


def test_runs_of_one_seed_are_paired() -> None:
    total, sample, batchnorm = (
        initialized(replace(SMALL, initialization=kind), seed=2)
        for kind in ("total", "sample", "batchnorm")
    )
    weights = [next(model.parameters()).detach() for model in (total, sample, batchnorm)]
    assert float((weights[0] / weights[2]).std()) < 1e-5  # the same He weights up to one number
    per_channel = (weights[1] / weights[2]).flatten(1)
    assert float(per_channel.std(1).max()) < 1e-4


def test_loss_falls() -> None:
    record = run(replace(SMALL, iterations=120, width=8, learning_rate=0.003), seed=0)
    assert record.loss[-10:].mean() < 0.5 * record.loss[:3].mean()
    assert record.held_out_error[-1] < 0.5  # 0.9 by chance
    assert record.held_out_error[0] > 0.7


def test_loss_of_the_first_step_is_by_hand() -> None:
    record = run(SMALL, seed=5)
    model, split = initialized(SMALL, seed=5), sv.data.digits()
    rows = torch.randperm(len(split.images), generator=stream(5, "order"))[:16]
    scores = torch.log_softmax(model(split.images[rows]).double(), 1)
    assert float(record.loss[0]) == pytest.approx(
        -float(scores[range(16), split.labels[rows]].mean().detach()), rel=1e-5
    )


def bare_loop(
    experiment: Experiment, seed: int, split: sv.data.Split
) -> tuple[list[float], list[float], torch.nn.Module]:
    """Losses, gradient norms and the trained network, in as few lines as it takes."""
    model = initialized(experiment, seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=experiment.learning_rate, momentum=experiment.momentum
    )
    losses: list[float] = []
    norms: list[float] = []
    for epoch in itertools.count():
        rows = torch.randperm(len(split.images), generator=stream(seed, "order", epoch))
        for first in range(0, len(rows) - experiment.batch_size + 1, experiment.batch_size):
            if len(losses) == experiment.iterations:
                return losses, norms, model
            batch = rows[first : first + experiment.batch_size]
            loss = F.cross_entropy(model(split.images[batch]), split.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            losses.append(float(loss.detach()))
            norms.append(
                sum(
                    float(p.grad.double().square().sum())
                    for p in model.parameters()
                    if p.grad is not None
                )
                ** 0.5
            )
            optimizer.step()
    raise AssertionError


@pytest.mark.parametrize("initialization", ["sample", "batchnorm"])
def test_a_bare_loop_gives_the_same(initialization: str) -> None:
    experiment = replace(
        SMALL, initialization=initialization, iterations=12, batch_size=200, probed=(5,)
    )  # 7 make an epoch
    record, split = run(experiment, seed=4), sv.data.digits()
    losses, norms, model = bare_loop(experiment, 4, split)
    np.testing.assert_array_equal(
        record.loss, np.array(losses, np.float32)
    )  # measuring at 5 changes nothing
    np.testing.assert_allclose(record.gradient_norm, norms, rtol=1e-5)
    layers = sv.probe(model, split.held_out_images)
    np.testing.assert_allclose(record.m2[-1], layers.m2)
    np.testing.assert_allclose(record.v2[-1], layers.v2)
    np.testing.assert_allclose(
        record.gradient2[-1], sv.probe_gradients(model, split.held_out_images, seed=4).gradient2
    )
    scores = model.eval()(split.held_out_images).detach()
    assert float(record.held_out_loss[-1]) == pytest.approx(
        float(F.cross_entropy(scores, split.held_out_labels)), rel=1e-5
    )
    assert float(record.held_out_error[-1]) == float(
        (scores.argmax(1) != split.held_out_labels).double().mean()
    )


def test_overlap_of_masks_by_hand() -> None:
    record = run(replace(SMALL, data="membranes", iterations=1), seed=0)
    model, split = (
        initialized(replace(SMALL, data="membranes"), 0).eval(),
        sv.data.membranes(seed=0),
    )
    guess, truth = model(split.held_out_images) > 0, split.held_out_labels > 0
    assert float(record.held_out_iou[0]) == pytest.approx(
        int((guess & truth).sum()) / int((guess | truth).sum())
    )
    assert float(record.held_out_error[0]) == pytest.approx(float((guess != truth).double().mean()))


@pytest.mark.parametrize(
    ("change", "earliest"),
    [
        ({"learning_rate": 1e6}, 1),
        ({"data": "membranes", "learning_rate": 100.0, "initialization": "sample"}, 1),
    ],
)
def test_divergence_ends_the_run_and_is_recorded(change: dict[str, Any], earliest: int) -> None:
    record = run(replace(SMALL, iterations=30, probed=(0, 25), **change), seed=0)
    at = record.attrs["diverged"]
    assert earliest <= at < 25
    assert np.isfinite(record.loss[:at]).all()
    assert (record.loss[:at] <= 1e4).all()
    for name in ("loss", "gradient_norm"):
        assert np.isnan(record[name][at:]).all()
    for name in ("m2", "gradient2", "held_out_loss", "held_out_error"):
        assert np.isfinite(record[name].sel(probed=0)).all()
        assert np.isnan(record[name].sel(probed=[25, 30])).all()


def test_output_that_is_not_finite_has_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the losses are still finite but a layer is not, when it is measured."""

    def lost(*arguments: Any) -> dict[str, Any]:
        if calls:
            raise error("layer '0': y must be finite")
        calls.append(1)
        return measure(*arguments)

    calls: list[int] = []
    error: type[ValueError] = NotFiniteError
    measure = Task.measure
    monkeypatch.setattr(Task, "measure", lost)
    record = run(replace(SMALL, iterations=6, probed=(3,)), seed=0)
    assert record.attrs["diverged"] == 3
    assert np.isnan(record.v2.sel(probed=[3, 6])).all()
    assert np.isfinite(record.loss[:3]).all()
    assert np.isnan(record.loss[3:]).all()
    error = ValueError
    with pytest.raises(
        ValueError, match="must be finite"
    ):  # what else goes wrong is not taken for divergence
        run(replace(SMALL, iterations=6, probed=(3,)), seed=0)


SECTIONS = 8


@pytest.fixture
def micrographs(tmp_path: Path) -> Path:
    """Sections of 256 x 160 pixels, complements of their labels: a crop shows what its label is."""
    generator = np.random.default_rng(0)
    for kind in ("image", "label"):
        (tmp_path / "em" / kind).mkdir(parents=True)
    for number in range(SECTIONS):
        label = (generator.random((256, 160)) > 0.25).astype(np.uint8) * 255
        Image.fromarray(label).save(tmp_path / "em" / "label" / f"{number}.png")
        Image.fromarray(255 - label).save(tmp_path / "em" / "image" / f"{number}.png")
    return tmp_path / "em"


CROPS = Experiment("micrographs", "sample", width=2, iterations=2, batch_size=3, calibration=4)


@pytest.mark.parametrize("crops", [False, True])
def test_batches_depend_on_seed_and_iteration_alone(crops: bool, micrographs: Path) -> None:
    experiment = CROPS if crops else replace(SMALL, batch_size=600)  # 2 batches make an epoch
    task = Task.load(experiment, micrographs, "cpu")
    listed = list(itertools.islice(task.batches(7, 0), 6))
    for start in range(6):
        images, labels = next(task.batches(7, start))
        assert torch.equal(images, listed[start][0])
        assert torch.equal(labels, listed[start][1])
    assert not torch.equal(next(task.batches(8, 0))[0], listed[0][0])
    assert not torch.equal(listed[0][0], listed[1][0])
    if crops:
        assert listed[0][0].shape == listed[0][1].shape == (3, 1, 128, 128)
        assert torch.equal(
            listed[2][0] > 0, listed[2][1] > 0
        )  # image and label are cut at one place


def test_micrographs_are_held_out_in_tiles(micrographs: Path) -> None:
    record = run(CROPS, 0, folder=micrographs)
    assert record.sizes["layer"] == 23
    split = Task.load(CROPS, micrographs, "cpu").split
    assert (record.attrs["source"], len(split.sha256)) == ("8 micrographs", 64)
    assert record.attrs["sha256"] == split.sha256
    assert (
        split.held_out_images.shape == split.held_out_labels.shape == (5 * 2, 1, 128, 128)
    )  # 256 x 160: two tiles
    whole = sv.data.micrographs(micrographs)
    assert torch.equal(split.held_out_images[3], whole.held_out_images[1, :, 128:, :128])
    assert torch.equal(split.held_out_labels[3], whole.held_out_labels[1, :, 128:, :128])
    with pytest.raises(ValueError, match="micrographs must be at least 128 pixels a side"):
        tasks._tiled(whole._replace(images=whole.images[..., :100]))


def test_channels_last_is_the_same_network() -> None:
    experiment = replace(SMALL, initialization="batchnorm", iterations=3)
    plain, last = run(experiment, 0), run(replace(experiment, channels_last=True), 0)
    np.testing.assert_allclose(plain.loss, last.loss, rtol=1e-4)
    for channels_last in (True, False):
        weight = list(
            initialized(replace(experiment, channels_last=channels_last), 0).parameters()
        )[4]
        assert weight.shape[1] > 1  # with one channel both are one
        assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last


LONGER = {
    kind: replace(
        SMALL, initialization=kind, iterations=24, width=8, probed=(12,), learning_rate=rate
    )
    for kind, rate in (("sample", 0.01), ("batchnorm", 0.1))
}


def train_to_file(kind: str, folder: Path) -> None:
    save = State.save

    def slowly(state: State, path: Path) -> None:
        save(state, path)
        time.sleep(0.02)

    torch.set_num_threads(1)
    training._LOOK = 1  # a checkpoint at every iteration
    State.save = slowly  # type: ignore[assignment,method-assign]  # here alone
    record = run(LONGER[kind], seed=1, checkpoints=folder, every=0.0)
    record.to_netcdf(folder / "record.nc", engine="scipy")


def killed(process: Any, folder: Path, delay: float) -> int:
    """Kill a process some time after its first checkpoint; returns the iteration of the last."""
    until = time.monotonic() + 60
    while not list(folder.glob("*.checkpoint")) and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    (path,) = folder.glob("*.checkpoint")
    return State.load(path, torch.device("cpu")).iteration


@pytest.mark.slow
def test_ten_killed_runs_end_like_undisturbed_ones(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def start(kind: str, name: str) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        process = context.Process(target=train_to_file, args=(kind, tmp_path / name))
        process.start()
        return process

    def end(kind: str, name: str) -> xr.Dataset:
        start(kind, name).join()
        return xr.load_dataset(tmp_path / name / "record.nc", engine="scipy")

    undisturbed = {kind: end(kind, kind) for kind in LONGER}
    generator, reached = random.Random(0), []
    for kill in range(10):
        kind, folder = list(LONGER)[kill % 2], tmp_path / str(kill)
        process = start(kind, folder.name)
        reached.append(killed(process, folder, generator.uniform(0, 0.5)))
        resumed = end(kind, folder.name)
        assert resumed.drop_attrs().identical(undisturbed[kind].drop_attrs())
        assert np.isfinite(resumed.loss).all()
    assert sum(0 < iteration < 24 for iteration in reached) >= 5, reached
    assert len(set(reached)) >= 4, reached


class Killed(BaseException):
    pass


def interrupted(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    experiment: Experiment,
    at: int,
    device: str = "cpu",
) -> Path:
    """Run until a checkpoint of iteration ``at`` is written; returns its path."""
    save = State.save

    def stop(state: Any, path: Path) -> None:
        save(state, path)
        if state.iteration >= at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(State, "save", stop)
        patch.setattr(training, "_LOOK", 3)
        with pytest.raises(Killed):
            run(experiment, 2, checkpoints=folder, every=0.0, device=device)
    (path,) = folder.glob("*.checkpoint")
    return path


@pytest.mark.parametrize("part", ["model", "optimizer", "iteration"])
def test_every_part_of_a_checkpoint_counts(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The equality above means something: without a part the resumed run is another."""
    experiment = replace(LONGER["batchnorm"], iterations=12, probed=())
    path = interrupted(monkeypatch, tmp_path, experiment, 6)
    expected = run(experiment, 2)
    state = State.load(path, torch.device("cpu"))
    assert state.iteration == 6
    fresh = initialized(experiment, 2)
    if part == "model":
        state.model = fresh.state_dict()
    elif part == "optimizer":
        state.optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1, momentum=0.9).state_dict()
    else:
        state.iteration = 5
    state.save(path)
    assert not np.array_equal(run(experiment, 2, checkpoints=tmp_path).loss[6:], expected.loss[6:])


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_damaged_checkpoint_is_named_and_the_run_starts_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = replace(SMALL, iterations=9)
    path = interrupted(monkeypatch, tmp_path, experiment, 3)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(
        {"flipped": bytes(content), "truncated": bytes(content[:-9]), "empty": b""}[damage]
    )
    with pytest.warns(
        UserWarning,
        match=f"{path.name} is damaged; set aside as {path.stem}.rejected, the run starts again",
    ):
        record = run(experiment, 2, checkpoints=tmp_path)
    np.testing.assert_array_equal(record.loss, run(experiment, 2).loss)
    assert path.with_suffix(".rejected").exists()


def test_checkpoint_is_no_way_in_for_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = interrupted(monkeypatch, tmp_path, replace(SMALL, iterations=9), 3)
    state = State(torch.zeros(1), torch.zeros(1), model={"0.weight": Path("anything")})
    state.save(path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        run(replace(SMALL, iterations=9), 2, checkpoints=tmp_path)


def test_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is written to /dev/full, which answers as a full disk does."""
    experiment = replace(SMALL, iterations=9)
    path = interrupted(monkeypatch, tmp_path, experiment, 3)
    before = path.read_bytes()
    monkeypatch.setattr(training, "_LOOK", 3)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    temporary.symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"No space left on device; [0-9,]+ bytes were to be written: .*\.checkpoint"
    ):
        run(experiment, 2, checkpoints=tmp_path, every=0.0)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    temporary.symlink_to("/dev/full")
    with pytest.warns(
        UserWarning,
        match="the run is over, its last checkpoint could not be written: .*No space left",
    ):
        record = run(experiment, 2, checkpoints=tmp_path)  # no checkpoint on the way
    np.testing.assert_array_equal(record.loss, run(experiment, 2).loss)


def test_a_finished_run_is_read_and_another_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(SMALL, 0, checkpoints=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "steps", None)  # no step is made
        assert run(SMALL, 0, checkpoints=tmp_path).drop_attrs().identical(first.drop_attrs())
    assert len(list(tmp_path.iterdir())) == 1
    run(SMALL, 1, checkpoints=tmp_path)
    run(replace(SMALL, learning_rate=0.02), 0, checkpoints=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    with monkeypatch.context() as patch:
        from svlib._files import provenance

        patch.setattr(training, "provenance", lambda *_: provenance(*_) | {"svlib": "another"})
        run(SMALL, 0, checkpoints=tmp_path)
    split = sv.data.digits()._replace(sha256="of another copy")
    monkeypatch.setattr(tasks, "_load", lambda *_: split)
    run(SMALL, 0, checkpoints=tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_another_copy_of_the_data_is_refused(micrographs: Path) -> None:
    with pytest.raises(ValueError, match="sha256 must be the data's, '', got 'another'"):
        run(SMALL, 0, sha256="another")
    with pytest.raises(ValueError, match=r"sha256 must be the data's, '[0-9a-f]{64}', got ''"):
        run(CROPS, 0, folder=micrographs, sha256="")


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(LONGER["batchnorm"], iterations=9, probed=(4,))
    short = replace(long, iterations=4, probed=())
    expected = run(long, 2)
    first = run(short, 2, checkpoints=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Task, "initialized", None)  # it does not start anew
        longer = run(long, 2, checkpoints=tmp_path)
    assert longer.drop_attrs().identical(expected.drop_attrs())
    assert longer.attrs["wall_time"] > first.attrs["wall_time"]
    assert len(list(tmp_path.iterdir())) == 1
    again = run(short, 2, checkpoints=tmp_path)  # read from the longer one's
    assert again.drop_attrs().identical(first.drop_attrs())


def test_a_checkpoint_past_a_moment_to_probe_is_refused(tmp_path: Path) -> None:
    run(SMALL, 0, checkpoints=tmp_path)
    message = r"was probed at \[2\], got one that is past it \(4\): take another folder"
    for experiment in (
        replace(SMALL, iterations=8, probed=(2,)),
        replace(SMALL, iterations=2),
    ):
        with pytest.raises(ValueError, match=message):
            run(experiment, 0, checkpoints=tmp_path)
    run(replace(SMALL, iterations=8, probed=(6,)), 0, checkpoints=tmp_path)


def test_curves_of_a_long_run_are_means_over_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(replace(SMALL, iterations=10), 0)
    monkeypatch.setattr(states, "_CURVE", 4)  # 10 iterations in windows of 3, the last of 1
    windows = run(replace(SMALL, iterations=10), 0)
    assert windows.iteration.values.tolist() == [0, 3, 6, 9]
    for name in ("loss", "gradient_norm"):
        values = plain[name].values.astype(float)
        by_hand = [values[first : first + 3].mean() for first in (0, 3, 6, 9)]
        np.testing.assert_allclose(windows[name], by_hand, rtol=1e-6)
    np.testing.assert_array_equal(windows.v2, plain.v2)
    lost = run(replace(SMALL, iterations=10, learning_rate=1e6), 0)
    at = lost.attrs["diverged"] // 3
    assert np.isfinite(lost.loss[:at]).all()
    assert np.isnan(lost.loss[at:]).all()


@pytest.mark.parametrize(("iterations", "points"), [(2000, 2000), (2001, 1001), (100_000, 2000)])
def test_a_record_keeps_at_most_2000_points_of_a_curve(iterations: int, points: int) -> None:
    curve = torch.arange(float(iterations))
    measured: dict[int, dict[str, Any]] = {at: {"name": []} for at in (0, iterations)}
    state = State(curve, curve, measured, iteration=iterations)
    record = state.record(replace(SMALL, iterations=iterations))
    assert record.sizes["iteration"] == points
    width = -(-iterations // points)
    assert float(record.loss[1]) == width + (width - 1) / 2
    last = range(int(record.iteration[-1]), iterations)
    assert float(record.loss[-1]) == pytest.approx(statistics.fmean(last))


def test_the_layer_variant_has_mean_0_and_mean_square_1() -> None:
    """Over inputs and units of every layer, on the calibration batch, by a plain forward pass."""
    experiment = replace(SMALL, initialization="layer", calibration=200, width=6)
    model, images = initialized(experiment, 3), sv.data.digits().images
    rows = torch.randperm(len(images), generator=stream(3, "calibration"))[:200]
    x, units = images[rows], []
    for module in model.children():
        x = module(x).detach()
        if isinstance(module, torch.nn.Conv2d):
            assert float(x.mean()) == pytest.approx(0, abs=1e-3)
            assert float(x.square().mean()) == pytest.approx(1, abs=1e-3)
            units.append(float(x.mean((0, 2, 3)).abs().max()))
    assert len(units) == 9
    assert max(units) > 0.3  # single units keep their means


def test_a_folder_that_changes_is_read_again(micrographs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(micrographs, folder)
    before = Task.load(CROPS, folder, "cpu").split.sha256
    picture = min(path for path in (folder / "image").iterdir())
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    assert Task.load(CROPS, folder, "cpu").split.sha256 != before


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    numbers: dict[str, Any] = {"width": np.int64(SMALL.width), "learning_rate": np.float32(0.5)}
    experiment = replace(SMALL, iterations=2, **numbers)
    assert run(experiment, 0, checkpoints=tmp_path).attrs["learning_rate"] == 0.5


def test_grid_gives_every_initialization_the_same_budget() -> None:
    points = training.grid("cifar10", "laptop", seeds=4)
    assert len(points) == 4 * 5 * 3
    plain = {json.dumps(point["experiment"] | {"initialization": ""}) for point in points}
    assert len(plain) == 5
    for kind in training.INITIALIZATIONS:
        mine = [point for point in points if point["experiment"]["initialization"] == kind]
        assert len({(point["experiment"]["learning_rate"], point["seed"]) for point in mine}) == 20
    paper = Experiment(**training.grid("cifar10", "paper")[0]["experiment"])
    assert (paper.width, paper.iterations) == (96, 100_000)
    assert Experiment(**training.grid("micrographs", "paper")[0]["experiment"]).iterations == 50_000
    for name in training.DATA:
        assert (
            training.grid(name, "quick", seeds=1, learning_rates=(0.5,))[0]["experiment"][
                "learning_rate"
            ]
            == 0.5
        )
    with pytest.raises(ValueError, match=r"scale must be one of \['quick'\], got 'laptop'"):
        training.grid("digits", "laptop")
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        training.grid("digits", "quick", seeds=0)


def test_collect() -> None:
    wild = replace(SMALL, initialization="batchnorm", learning_rate=1e30)
    records = [run(SMALL, 0), run(SMALL, 1), run(wild, 0)]
    joined = training.collect(records)
    assert dict(joined.sizes) == {
        "initialization": 2, "learning_rate": 2, "seed": 2, "iteration": 4, "probed": 2, "layer": 9,
    }  # fmt: skip
    assert joined.layer.values.tolist() == list(range(9))
    for seed in (0, 1):
        found = joined.sel(initialization="sample", learning_rate=SMALL.learning_rate, seed=seed)
        np.testing.assert_array_equal(found.loss, records[seed].loss)
        np.testing.assert_array_equal(found.v2, records[seed].v2)
        assert found.diverged == -1
    assert (
        joined.diverged.sel(initialization="batchnorm", learning_rate=1e30, seed=0)
        == records[2].attrs["diverged"]
        > 0
    )
    assert np.isnan(joined.diverged.sel(initialization="sample", learning_rate=1e30)).all()
    assert joined.attrs["wall_time"] == pytest.approx(
        sum(record.attrs["wall_time"] for record in records)
    )
    assert joined.attrs["source"] == "scikit-learn's digits"
    assert "learning_rate" not in joined.attrs
    with pytest.raises(ValueError, match=r"records must agree in width, got \['4', '5'\]"):
        training.collect([records[0], run(replace(SMALL, width=5), 0)])
    for name in ("source", "sha256"):
        with pytest.raises(ValueError, match=f"records must agree in {name}"):
            training.collect([records[0], records[1].assign_attrs({name: "elsewhere"})])
    with pytest.raises(ValueError, match="records must hold at least one"):
        training.collect([])


def command(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["train", *arguments])


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {
        "digits": {"width": 4, "iterations": 3, "batch_size": 16},
        "cifar10": {"width": 4, "iterations": 3},
    }
    monkeypatch.setitem(training.SCALES, "quick", quick)
    monkeypatch.chdir(tmp_path)
    options = ["digits", "--init", "sample", "--rate", "0.01", "--rate", "1e30", "--seeds", "2"]
    result = command(*options)
    assert result.exit_code == 0, result.output
    record = xr.load_dataset(tmp_path / "digits-quick.nc")
    assert record.loss.shape == (1, 2, 2, 3)
    assert (record.diverged.sel(learning_rate=1e30) > 0).all()  # and the sweep went on
    expected = run(Experiment("digits", "sample", 4, 3, batch_size=16), 1).loss
    np.testing.assert_array_equal(record.loss.sel(learning_rate=0.01, seed=1).squeeze(), expected)
    for arguments, message in (
        (options, "store must be empty without --resume"),
        (["cifar10", "--store", "new"], "--data, or the environment variable SVLIB_DATA"),
        (["cifar10", "--data", "nowhere"], "nowhere, which is none"),
        (["digits", "--scale", "paper"], "scale must be one of ['quick'], got 'paper'"),
        (["digits", "--download"], "--download must come with cifar10 and --data"),
        (["digits", "--mixed-precision"], "mixed_precision must be False unless device is cuda"),
        (["digits", "--device", "abacus"], "device must be one of"),
        (["digits", "--rate", "-1"], "learning_rate must be"),
    ):
        monkeypatch.delenv("SVLIB_DATA", raising=False)
        failed = command(*arguments)
        assert failed.exit_code == 1
        assert message in failed.output
        assert "Traceback" not in failed.output
    (tmp_path / f"digits-quick.nc.{os.getpid()}.unfinished").symlink_to("/dev/full")
    full = command(*options, "--resume")
    assert full.exit_code == 1
    assert "No space left on device" in full.output
    assert "--resume writes them" in full.output
    assert command(*options, "--resume").exit_code == 0


def test_command_line_takes_iterations_and_width(tmp_path: Path) -> None:
    output = tmp_path / "record.nc"
    options = ("--init", "sample", "--rate", "0.01", "--seeds", "1", "--output", str(output))
    result = command("digits", "--iterations", "2", "--width", "3", *options)
    assert result.exit_code == 0, result.output
    record = xr.load_dataset(output)
    assert (record.sizes["iteration"], int(record.attrs["width"])) == (2, 3)
    expected = run(Experiment("digits", "sample", 3, 2, batch_size=32), 0)
    np.testing.assert_array_equal(record.loss.squeeze(), expected.loss)
    laptop = Experiment(**training.grid("cifar10", "laptop", iterations=50)[0]["experiment"])
    assert (laptop.iterations, laptop.probed) == (50, ())
    for name in ("--iterations", "--width"):
        assert command("digits", name, "0", *options).exit_code == 2


def test_a_store_never_mixes_two_copies_and_keeps_what_is_not_its_own(
    micrographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        training.SCALES,
        "quick",
        {"micrographs": {"width": 2, "iterations": 2, "batch_size": 3, "calibration": 4}},
    )
    other, output = tmp_path / "other", tmp_path / "record.nc"
    shutil.copytree(micrographs, other)
    picture = other / "image" / "0.png"
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    strange = tmp_path / "record.nc.store" / "checkpoints" / "another.checkpoint"
    strange.parent.mkdir(parents=True)
    strange.write_text("of a run that is not finished")
    chosen = ("--init", "sample", "--rate", "0.01", "--seeds", "1")
    options = ("micrographs", *chosen, "--output", str(output), "--resume")
    copies = []
    for folder in (micrographs, other, micrographs):
        assert command(*options, "--data", str(folder)).exit_code == 0
        copies.append(xr.load_dataset(output).attrs["sha256"])
    assert copies[0] == copies[2] != copies[1]
    assert strange.exists()


def hold(place: str) -> None:
    """Say that one is there, and stay."""
    with open(place, "wb", buffering=0) as pipe:
        pipe.write(b"here")
        time.sleep(60)
        pipe.write(b"still")


def pool_of_two(place: str) -> None:
    with sv.sweep.processes(2) as pool:
        list(pool.map(hold, [place] * 2))


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """A named pipe ends when the last process that holds it does."""
    place = tmp_path / "pipe"
    os.mkfifo(place)
    parent = multiprocessing.get_context("spawn").Process(target=pool_of_two, args=(str(place),))
    parent.start()
    with place.open("rb") as pipe:
        assert pipe.read(8) == b"herehere"
        parent.kill()
        parent.join()
        assert pipe.read() == b""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixed", [False, True])
def test_gpu(mixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = replace(
        LONGER["batchnorm"], iterations=12, probed=(), channels_last=True, mixed_precision=mixed
    )
    whole = run(experiment, 2, device="cuda")
    assert np.isfinite(whole.loss).all()
    interrupted(monkeypatch, tmp_path, experiment, 6, device="cuda")
    np.testing.assert_array_equal(
        run(experiment, 2, device="cuda", checkpoints=tmp_path).loss, whole.loss
    )
    if not mixed:
        np.testing.assert_allclose(whole.loss[:3], run(experiment, 2).loss[:3], rtol=1e-2)


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
        ({"probed": 3}, TypeError, "probed must be a tuple of iterations, got 3"),
        ({"probed": (1, 5)}, ValueError, "probed must be at most the 4 iterations, got 5"),
        ({"probed": (-1,)}, ValueError, "probed must be at least 0"),
        ({"channels_last": 1}, TypeError, "channels_last must be True or False, got 1"),
        ({"mixed_precision": "yes"}, TypeError, "mixed_precision must be True or False"),
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
    with pytest.raises(ValueError, match="every must be a finite number"):
        run(SMALL, 0, every=-1.0)
    with pytest.raises(ValueError, match="mixed_precision must be False unless device is cuda"):
        run(replace(SMALL, mixed_precision=True), 0)
    with pytest.raises(ValueError, match="device must be one of"):
        run(SMALL, 0, device="abacus")
