"""Sweeps that are damaged, killed and resumed give the bytes of an undisturbed run; commands."""

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

import svlib as sv
from svlib import _files, sweep
from svlib.__main__ import main

# processes that need not import torch each; unlike with fork, their parent has no threads
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def walk(seed: int, steps: int = 20, log: str = "") -> xr.Dataset:
    """A result that depends on the point alone; every call adds a line to ``log``."""
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{seed}\n")
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
ENSEMBLE = {"width": 8, "depth": 2, "networks": 2, "samples": 4, "seed": 0, "progress": False}


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
    "pool",
    [partial(ThreadPoolExecutor, 3), partial(ProcessPoolExecutor, 2, PROCESSES)],
    ids=["threads", "processes"],
)
def test_any_executor_writes_the_same_bytes(
    pool: Callable[[], Executor], tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    with pool() as executor:
        sweep.run(walk, POINTS, tmp_path / "store", executor)
    assert contents(tmp_path / "store") == undisturbed


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
    # whole, under another's key
    foreign = store / f"{mine.stem.split('-')[0]}-{its.stem.split('-')[1]}.nc"
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
    sweep.run(walk, POINTS, tmp_path / "store", common={"log": str(log), "unknown": 1})
    assert len(log.read_text().split()) == len(POINTS)  # finished: read, not run


def test_other_versions_have_records_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [{"seed": 1, "log": str(tmp_path / "log")}]
    for code, calls in (("1.0 (a)", 1), ("1.0 (b)", 2), ("1.1 (a)", 3), ("1.0 (a)", 3)):
        monkeypatch.setattr(sweep, "CODE", code)
        sweep.run(walk, points, tmp_path / "store")
        assert len((tmp_path / "log").read_text().split()) == calls


def test_changed_sources_are_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "svlib"
    shutil.copytree(Path(sv.__file__).parent, room, ignore=shutil.ignore_patterns("*.pyc"))
    monkeypatch.setattr(_files, "__file__", str(room / "_files.py"))
    assert _files._code() == _files.CODE
    assert _files.CODE.startswith(sv.__version__)
    maps = room / "theory" / "maps.py"
    source = maps.read_bytes()
    maps.write_bytes(source.replace(b"\n", b"\r\n"))  # as some checkouts have it
    assert _files._code() == _files.CODE
    maps.write_bytes(source + b"\nx = 1\n")
    changed = _files._code()
    maps.rename(room / "maps.py")
    assert len({_files.CODE, changed, _files._code()}) == 3


def of_another_version(seed: int) -> xr.Dataset:
    return walk(seed).assign_attrs(svlib="0.0 (of a worker)")


def test_workers_of_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"workers must have svlib .*, got a record of 0\.0"):
        sweep.run(of_another_version, POINTS, tmp_path)
    assert contents(tmp_path) == {}
    (record,) = sweep.run(sv.simulate, [ENSEMBLE], tmp_path)
    assert record.attrs["svlib"] == _files.CODE


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


def numbered(seed: int) -> xr.Dataset:
    return walk(seed).assign_attrs(note="0123456789", nothing="-1234567890")


def test_large_seeds_are_kept_and_texts_stay_texts(tmp_path: Path) -> None:
    for _ in ("run", "read"):
        (record,) = sweep.run(numbered, [{"seed": 2**40}], tmp_path)
        assert record.attrs == {"seed": 2**40, "note": "0123456789", "nothing": "-1234567890"}
    words = f"simulate 8 --networks 2 --depth 1 --samples 3 --seed {2**40}".split()
    done = CliRunner().invoke(main, [*words, "--output", str(tmp_path / "x.nc")])
    assert done.exit_code == 0, done.output
    assert xr.load_dataset(tmp_path / "x.nc").attrs["seed"] == str(2**40)


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
        ProcessPoolExecutor(2, PROCESSES) as executor,
        pytest.raises(RuntimeError, match=r"of 6 points failed.*BrokenProcessPool"),
    ):
        sweep.run(dies_at_three, points, tmp_path / "store", executor)
    with ProcessPoolExecutor(2, PROCESSES) as executor:
        sweep.run(dies_at_three, points, tmp_path / "store", executor)
    sweep.run(dies_at_three, points, tmp_path / "undisturbed")
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def run_killed_at(store: Path, call: str, count: int) -> None:
    """A run that gets SIGKILL at the given call of ``os.fsync`` or ``os.replace``."""
    original, counter = getattr(os, call), itertools.count(1)

    def watched(*arguments: Any) -> Any:
        if next(counter) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, call, watched)
    sweep.run(walk, POINTS, store)


def test_killed_runs_go_on(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Killed while it writes a record's content, or before its name; each run goes on."""
    store, finished = tmp_path / "store", 0
    for call, count in (("fsync", 1), ("replace", 1), ("fsync", 4), ("replace", 5)):
        process = PROCESSES.Process(target=run_killed_at, args=(store, call, count))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        finished += count - 1
        assert len(contents(store)) == finished
        assert contents(store).items() <= undisturbed.items()
    sweep.run(walk, POINTS, store)
    assert contents(store) == undisturbed


def simulate_or_die(flag: str, **point: Any) -> xr.Dataset:
    """A simulation, but that the first call ends its process."""
    try:
        Path(flag).touch(exist_ok=False)
    except FileExistsError:
        return sv.simulate(**point)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.slow
def test_dask_cluster_with_a_killed_worker(tmp_path: Path) -> None:
    """Simulations on worker processes, one of which dies: the numbers are those of this one."""
    distributed = pytest.importorskip("distributed")
    points = [ENSEMBLE | {"networks": range(start, start + 5)} for start in range(0, 40, 5)]
    flag = tmp_path / "flag"
    with (
        distributed.LocalCluster(
            2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        before = set(client.run(os.getpid).values())
        executor, common = client.get_executor(), {"flag": str(flag)}
        there = sweep.run(simulate_or_die, points, tmp_path / "there", executor, common=common)
        assert set(client.run(os.getpid).values()) != before
    assert flag.exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Dask's workers have
    here = sweep.run(sv.simulate, points, tmp_path / "here")
    torch.set_num_threads(threads)
    for a, b in zip(here, there, strict=True):
        assert a.drop_attrs().identical(b.drop_attrs())


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


def invoke(words: str, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*words.split(), *more])
    return result.exit_code, result.output


def test_command_line_simulates(tmp_path: Path) -> None:
    output = tmp_path / "new" / "record.nc"
    store = output.with_name("record.nc.store")
    common = "simulate 20 --depth 5 --networks 7 --samples 6 --seed 3 --block 3"
    double = f"{common} --dtype float64 --activation linear"
    code, text = invoke(double, "--output", str(output))
    assert code == 0, text
    record = xr.load_dataset(output)
    direct = sv.simulate(20, 5, networks=7, samples=6, seed=3, dtype="float64", activation="linear")
    for name in direct.data_vars:
        np.testing.assert_allclose(record[name], direct[name], rtol=1e-10)
    assert list(record.network) == list(range(7))
    assert record.attrs["networks"] == 7

    code, text = invoke(common, "--output", str(output))
    assert code == 1
    assert text.startswith("Error: store must be empty without --resume")
    assert text.count("\n") == 1
    code, text = invoke(common, "--output", str(output), "--store", str(tmp_path / "other"))
    assert code == 1
    assert "output must not exist without --resume" in text
    before = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    code, text = invoke(double, "--output", str(output), "--resume")
    assert code == 0
    assert before == {path: path.stat().st_mtime_ns for path in store.iterdir()}


def test_command_line_sweeps(tmp_path: Path) -> None:
    output = tmp_path / "widths.nc"
    code, text = invoke("sweep 20:8 40:4 --depth 5 --samples 6 --block 3 --output", str(output))
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
        ("simulate 0 --output x.nc", "width must be at least 1, got 0"),
        ("simulate 4 --output x.nc --device toaster", "device must be one of"),
        ("simulate 4 --output x.nc --activation geglu", "activation must be one of"),
        ("simulate 4 --output .", "is a directory"),
        ("simulate 4 --output file/x.nc", "is no folder to write to"),
        ("train digits --output .", "is a directory"),
        ("train digits --download", "--download must come with cifar10 and --data"),
        ("sweep 30 --output x.nc", "must be different widths like 30:400, got 30"),
        ("sweep 30:0 --output x.nc", "must be different widths like 30:400, got 30:0"),
        ("sweep 30:4 30:5 --output x.nc", "must be different widths"),
        ("sweep --output x.nc", "Missing argument"),
        ("simulate 4", "Missing option '--output'"),
    ],
)
def test_command_line_errors(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    code, text = invoke(arguments)
    assert code != 0
    assert message in text
    assert "Traceback" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "words", ["simulate 4 --output x.nc", "train digits", "probe torch.nn:Identity --input 3"]
)
def test_a_device_that_is_not_there_is_one_short_line(words: str) -> None:
    code, text = invoke(words, "--device", "cuda")
    assert code == 1
    assert text.startswith("Error: device must be one of ['cpu'] here, got 'cuda'")
    assert len(text) < 150


def test_help_and_version() -> None:
    assert invoke("--version") == (0, f"svlib {sv.__version__}\n")
    _, listed = invoke("--help")
    for name in main.list_commands(click.Context(main)):
        code, text = invoke(name, "--help")
        assert code == 0
        assert "`" not in text
        first = text.split("\n\n")[1].strip()  # what the list says of it, without an import
        assert " ".join(first.split()) in " ".join(listed.split())


@pytest.mark.slow
def test_module_runs(tmp_path: Path) -> None:
    words = "-m svlib simulate 8 --networks 4 --samples 3 --depth 2 --block 2 --workers 2 --output"
    output = tmp_path / "two.nc"
    done = subprocess.run(
        [sys.executable, *words.split(), output], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(output))
    expected = sv.simulate(8, 2, networks=4, samples=3, seed=0)
    np.testing.assert_allclose(xr.load_dataset(output).v2, expected.v2, rtol=1e-5)
