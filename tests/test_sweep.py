"""Sweeps that are damaged, killed and resumed give the bytes of an undisturbed run; the command line on top of them."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

import svlib as sv
from svlib import sweep
from svlib.__main__ import main

FORK = multiprocessing.get_context(
    "fork"
)  # these functions use no threads, and need no import of torch again


def walk(seed: int, steps: int = 20, log: str = "", wait: float = 0.0) -> xr.Dataset:
    """A result that depends on the point alone; every call adds a line to ``log``."""
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{seed}\n")
    time.sleep(wait)
    numbers = np.random.default_rng(seed).normal(size=steps).cumsum()
    return xr.Dataset(
        {"walk": ("step", numbers), "up": ("step", numbers > 0)},
        attrs={"seed": seed, "note": "walk"},
    )


def other(seed: int) -> xr.Dataset:
    return walk(seed + 1000)


def contents(store: Path) -> dict[str, bytes]:
    """What is in the store but for files that were being written when a run was killed."""
    return {path.name: path.read_bytes() for path in store.glob("*.nc")}


POINTS = [{"seed": seed} for seed in range(12)]


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    sweep.run(walk, POINTS, tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


def test_finished_points_are_read_not_run(tmp_path: Path) -> None:
    points = [{"seed": seed, "log": str(tmp_path / "log")} for seed in (3, 1, 2)]
    first = sweep.run(walk, points[:2], tmp_path / "store")
    records = sweep.run(walk, points, tmp_path / "store")
    assert [record.attrs["seed"] for record in records] == [3, 1, 2]
    assert (tmp_path / "log").read_text().split() == ["3", "1", "2"]
    for record, seed in zip(records, (3, 1, 2), strict=True):
        expected = walk(seed)
        np.testing.assert_array_equal(record["walk"], expected["walk"])
        assert record.up.dtype == bool
        assert record.attrs == expected.attrs
    assert records[0].identical(first[0])


@pytest.mark.parametrize(
    "executor",
    [None, ThreadPoolExecutor(3), ProcessPoolExecutor(2, FORK)],
    ids=["none", "threads", "processes"],
)
def test_any_executor_writes_the_same_bytes(
    executor: Executor | None, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    sweep.run(walk, POINTS, tmp_path / "store", executor)
    assert contents(tmp_path / "store") == undisturbed
    if executor is not None:
        executor.shutdown()


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_record_is_named_and_redone(
    damage: str, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    store = tmp_path / "undisturbed"
    victim = sorted(store.glob("*.nc"))[4]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(
        {"flip": bytes(content), "truncate": bytes(content[:-100]), "empty": b""}[damage]
    )
    with pytest.warns(UserWarning, match=f"{victim.name} is damaged"):
        sweep.run(walk, POINTS, store)
    assert contents(store) == undisturbed


def test_foreign_record_is_named_and_redone(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    store = tmp_path / "undisturbed"
    mine, its = sorted(store.glob("*.nc"))[:2]
    foreign = (
        store / f"{mine.stem.split('-')[0]}-{its.stem.split('-')[1]}.nc"
    )  # whole, under another's key
    foreign.write_bytes(its.read_bytes())
    mine.unlink()
    with pytest.warns(UserWarning, match=f"{foreign.name} is not the record of this point"):
        sweep.run(walk, POINTS, store)
    assert contents(store) == undisturbed


def test_what_is_no_record_is_redone(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    store = tmp_path / "undisturbed"
    mine = min(store.glob("*.nc"))
    mine.unlink()
    text = store / f"{mine.stem.split('-')[0]}-{sweep._key(b'no netCDF')}.nc"
    text.write_bytes(b"no netCDF")
    with pytest.warns(UserWarning, match=f"{text.name} is not the record of this point"):
        sweep.run(walk, POINTS, store)
    assert contents(store) == undisturbed


def test_common_arguments_reach_every_call_and_name_no_point(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    log = tmp_path / "log"
    sweep.run(walk, POINTS, tmp_path / "store", common={"log": str(log)})
    assert len(log.read_text().split()) == len(POINTS)
    assert contents(tmp_path / "store") == undisturbed
    sweep.run(
        walk, POINTS, tmp_path / "store", common={"log": str(log), "wait": 100.0}
    )  # finished: read, not run
    assert len(log.read_text().split()) == len(POINTS)


class Breaks(ThreadPoolExecutor):
    """An executor that takes three points."""

    taken = 0

    def submit(self, *arguments: Any, **options: Any) -> Any:
        self.taken += 1
        if self.taken > 3:
            raise RuntimeError("broken")
        return super().submit(*arguments, **options)


def test_executor_that_breaks_while_points_are_handed_over(tmp_path: Path) -> None:
    with (
        Breaks(1) as executor,
        pytest.raises(RuntimeError, match=r"9 of 12 points failed.*RuntimeError: broken"),
    ):
        sweep.run(walk, POINTS, tmp_path, executor)
    assert len(contents(tmp_path)) == 3


def test_large_seeds_are_kept(tmp_path: Path) -> None:
    assert sweep.run(walk, [{"seed": 2**40}], tmp_path)[0].attrs["seed"] == 2**40
    assert sweep.run(walk, [{"seed": 2**40}], tmp_path)[0].attrs["seed"] == 2**40  # read


def test_nameless_functions_are_refused(tmp_path: Path) -> None:
    for function in (lambda seed: walk(seed), partial(walk, steps=3)):
        with pytest.raises(TypeError, match="function must be a function of a module"):
            sweep.run(function, POINTS, tmp_path)


def test_functions_do_not_share_records(tmp_path: Path) -> None:
    first = sweep.run(walk, POINTS[:1], tmp_path)[0]
    assert not first.identical(sweep.run(other, POINTS[:1], tmp_path)[0])
    assert len(contents(tmp_path)) == 2


def fails_at_three(seed: int, flag: str) -> xr.Dataset:
    if seed == 3 and not Path(flag).exists():
        raise ArithmeticError("three")
    return walk(seed)


def test_failed_point_leaves_the_others(tmp_path: Path) -> None:
    points = [{"seed": seed, "flag": str(tmp_path / "flag")} for seed in range(6)]
    with pytest.raises(
        RuntimeError,
        match=r"1 of 6 points failed, the others are in .*\"seed\": 3.*ArithmeticError: three",
    ):
        sweep.run(fails_at_three, points, tmp_path / "store")
    assert len(contents(tmp_path / "store")) == 5
    (tmp_path / "flag").touch()
    assert len(sweep.run(fails_at_three, points, tmp_path / "store")) == 6


def dies_at_three(seed: int, flag: str) -> xr.Dataset:
    if seed == 3 and not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return walk(seed)


def test_killed_worker(tmp_path: Path) -> None:
    """The pool is broken then: an error says so, and a second call does the rest."""
    points = [{"seed": seed, "flag": str(tmp_path / "flag")} for seed in range(6)]
    with (
        ProcessPoolExecutor(2, FORK) as executor,
        pytest.raises(RuntimeError, match=r"of 6 points failed.*BrokenProcessPool"),
    ):
        sweep.run(dies_at_three, points, tmp_path / "store", executor)
    with ProcessPoolExecutor(2, FORK) as executor:
        sweep.run(dies_at_three, points, tmp_path / "store", executor)
    sweep.run(dies_at_three, points, tmp_path / "undisturbed")
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_run_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """Each time some points further, at a random moment within the next ones."""
    points = [{"seed": seed, "steps": 20_000, "wait": 0.004} for seed in range(60)]
    sweep.run(walk, points, tmp_path / "undisturbed")
    store = tmp_path / "store"
    moments = random.Random(0)
    kills, cut_short = 0, 0
    while kills < 20:
        run = FORK.Process(target=sweep.run, args=(walk, points, store))
        run.start()
        target = len(contents(store)) + moments.randint(0, 8)
        while run.is_alive() and len(contents(store)) < target:
            time.sleep(0.001)
        run.join(moments.uniform(0, 0.01))
        if run.is_alive():
            run.kill()
            kills += 1
        run.join()
        finished = len(contents(store))
        cut_short += 0 < finished < 60
        if finished == 60:  # begin again
            assert contents(store) == contents(tmp_path / "undisturbed")
            for path in store.iterdir():
                path.unlink()
    assert cut_short > 10
    sweep.run(walk, points, store)
    assert contents(store) == contents(tmp_path / "undisturbed")


def test_dask_cluster_with_a_killed_worker(tmp_path: Path) -> None:
    """Simulations on real worker processes, one of which is killed: the numbers are those of a run in this process."""
    distributed = pytest.importorskip("distributed")
    points = [
        {
            "width": 40,
            "depth": 20,
            "networks": range(start, start + 5),
            "samples": 10,
            "seed": 1,
            "progress": False,
        }
        for start in range(0, 100, 5)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Dask's workers have
    here = sweep.run(sv.simulate, points, tmp_path / "here")
    torch.set_num_threads(threads)
    with (
        distributed.LocalCluster(
            2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        processes = client.run(os.getpid)
        killed = False

        def kill_one(*unused: Any) -> None:
            nonlocal killed
            if not killed:
                killed = True
                os.kill(next(iter(processes.values())), signal.SIGKILL)

        executor = client.get_executor()
        submit = executor.submit

        def submit_and_kill(*arguments: Any, **options: Any) -> Any:
            future = submit(*arguments, **options)
            future.add_done_callback(kill_one)  # when the first point is finished
            return future

        executor.submit = submit_and_kill
        there = sweep.run(sv.simulate, points, tmp_path / "there", executor)
        assert killed
        assert set(client.run(os.getpid).values()) != set(processes.values())
    for a, b in zip(here, there, strict=True):
        assert a.network.values.tobytes() == b.network.values.tobytes()
        for name in a.data_vars:
            assert a[name].values.tobytes() == b[name].values.tobytes()


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        ([{"seed": 1}, {"seed": 1}], ValueError, "points must differ, got .* twice"),
        (
            [{"seed": np.ones(2)}],
            TypeError,
            "points must hold numbers, strings, None, lists or ranges, got array",
        ),
        (
            {"seed": 1},
            TypeError,
            "points must be an iterable of mappings from argument to value, got {'seed': 1}",
        ),
    ],
)
def test_bad_points(points: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        sweep.run(walk, points, tmp_path)


def test_function_must_return_a_record(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"function must return an xarray\.Dataset, got int"):
        sweep.run(int, [{}], tmp_path)  # type: ignore[arg-type]


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


def test_command_line_simulates(tmp_path: Path) -> None:
    output = tmp_path / "record.nc"
    common = [
        "simulate",
        "20",
        "--depth",
        "5",
        "--networks",
        "7",
        "--samples",
        "6",
        "--seed",
        "3",
        "--block",
        "3",
    ]
    code, text = invoke(
        *common, "--output", str(output), "--dtype", "float64", "--activation", "linear"
    )
    assert code == 0, text
    record = xr.load_dataset(output)
    direct = sv.simulate(20, 5, networks=7, samples=6, seed=3, dtype="float64", activation="linear")
    for name in direct.data_vars:
        np.testing.assert_allclose(record[name], direct[name], rtol=1e-10)
    assert list(record.network) == list(range(7))
    assert record.attrs["networks"] == 7

    code, text = invoke(*common, "--output", str(output))
    assert code == 1
    assert text.startswith("Error: store must be empty without --resume")
    assert text.count("\n") == 1
    code, text = invoke(*common, "--output", str(output), "--store", str(tmp_path / "new"))
    assert code == 1
    assert "output must not exist without --resume" in text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "record.nc.store").iterdir()}
    code, text = invoke(
        *common, "--output", str(output), "--dtype", "float64", "--activation", "linear", "--resume"
    )
    assert code == 0
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "record.nc.store").iterdir()
    }


def test_command_line_sweeps(tmp_path: Path) -> None:
    output = tmp_path / "widths.nc"
    code, text = invoke(
        "sweep",
        "20:8",
        "40:4",
        "--depth",
        "5",
        "--samples",
        "6",
        "--block",
        "3",
        "--output",
        str(output),
    )
    assert code == 0, text
    record = xr.load_dataset(output)
    for width, networks in ((20, 8), (40, 4)):
        expected = sv.summarize(sv.simulate(width, 5, networks=networks, samples=6, seed=0))
        np.testing.assert_allclose(record.sel(width=width).ratio, expected.ratio, rtol=1e-4)
        assert int(record.alive.sel(width=width, layer=5)) == networks
    assert {"v2_over_m2", "angular_over_m2", "radial_over_m2"} <= set(record.data_vars)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "0", "--output", "x.nc"], "width must be at least 1, got 0"),
        (["simulate", "4", "--output", "x.nc", "--device", "toaster"], "device must be one of"),
        (
            ["simulate", "4", "--output", "x.nc", "--activation", "gelu"],
            "activation must be one of",
        ),
        (["sweep", "30", "--output", "x.nc"], "must be different widths like 30:400, got 30"),
        (["sweep", "30:0", "--output", "x.nc"], "must be different widths like 30:400, got 30:0"),
        (["sweep", "30:4", "30:5", "--output", "x.nc"], "must be different widths"),
        (["sweep", "--output", "x.nc"], "Missing argument"),
        (["simulate", "4"], "Missing option '--output'"),
    ],
)
def test_command_line_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = invoke(*arguments)
    assert code != 0
    assert message in text
    assert "Traceback" not in text


def test_module_runs(tmp_path: Path) -> None:
    call = [
        sys.executable,
        "-m",
        "svlib",
        "simulate",
        "8",
        "--networks",
        "4",
        "--samples",
        "3",
        "--depth",
        "2",
        "--block",
        "2",
    ]
    output = tmp_path / "two.nc"
    done = subprocess.run(
        [*call, "--workers", "2", "--output", output], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(output))
    np.testing.assert_allclose(
        xr.load_dataset(output).v2, sv.simulate(8, 2, networks=4, samples=3, seed=0).v2, rtol=1e-5
    )
