"""Many points, one function, any executor; finished points are kept on disk and not run again.

A record is one file in the store, written whole or not at all. Its name holds two hashes: one of
the function, its arguments and svlib's version, by which it is found, and one of its own bytes,
which shows damage.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from tqdm import tqdm

from svlib import _check
from svlib._files import CODE, write_whole

Function = Callable[..., xr.Dataset]
_POINT, _LARGE = "sweep_point", "sweep_large_integers"  # attributes of a file


def run(
    function: Function,
    points: Iterable[Mapping[str, Any]],
    store: str | os.PathLike[str],
    executor: Executor | None = None,
    *,
    common: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> list[xr.Dataset]:
    """Call ``function(**point)`` for every point that has no record in ``store``.

    Each record is written by this process as soon as its point is finished. A killed or interrupted
    run loses only the points in flight; call again to go on. If a point fails, the others still
    run. Records of another version of svlib, or of changed sources, count as other points; a
    function that is not svlib's own is known by its name alone.

    Args:
        function: A function of a module (executors send it by name) that returns a Dataset.
        points: Keyword arguments, of the types that JSON has, and ranges.
        store: Folder of the records, made if missing.
        executor: ``None`` to run here, or any ``concurrent.futures.Executor``, also Dask's.
        common: Keyword arguments of every call that do not change its result, such as folders.
        progress: Show a progress bar; ``None`` shows it on a terminal only.

    Returns:
        The records in the order of the points, as read from the store; integers have 32 bits.

    Raises:
        RuntimeError: If points failed: how many, the first, and its error.

    Warns:
        UserWarning: If a record is damaged; it is set aside and its point runs again.

    Examples:
        >>> import tempfile
        >>> from svlib import simulate
        >>> common = {"width": 16, "depth": 5, "networks": 4, "samples": 8}
        >>> points = [common | {"seed": seed} for seed in range(3)]
        >>> with tempfile.TemporaryDirectory() as store:
        ...     records = run(simulate, points, store)
        ...     again = run(simulate, points, store)  # read, not run
        >>> [a.identical(b) for a, b in zip(records, again)]
        [True, True, True]
    """
    folder = Path(store)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = _described(function, points)
    records = {text: record for text in wanted if (record := _load(folder, text)) is not None}
    missing = {text: point for text, point in wanted.items() if text not in records}
    failures: dict[str, Exception] = {}
    hidden = None if progress is None else not progress
    with tqdm(total=len(wanted), initial=len(records), disable=hidden, unit="point") as bar:
        for text, call in _calls(partial(function, **common or {}), missing, executor):
            try:
                _write(folder, text, _checked(call()))
            except Exception as error:
                failures[text] = error
            bar.update()
    _refuse(failures, len(wanted), folder)
    return [records[text] if text in records else _read(folder, text) for text in wanted]


def _refuse(failures: Mapping[str, Exception], points: int, folder: Path) -> None:
    if failures:
        text, first = next(iter(failures.items()))
        count = f"{len(failures)} of {points} points failed, the others are in {folder}"
        raise RuntimeError(f"{count}; first {text}: {type(first).__name__}: {first}") from first


def processes(workers: int) -> ProcessPoolExecutor:
    """A pool that divides the cores and dies with its parent, even on SIGKILL.

    Examples:
        >>> with processes(2) as executor:
        ...     executor.submit(abs, -1).result()
        1
    """
    threads = max(1, (os.cpu_count() or 1) // _check.integer("workers", workers))
    return ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(threads,),
    )


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # not sys.exit: the main thread may be at work, and would then wait for ever

    threading.Thread(target=end_with_parent, daemon=True).start()


def _calls(
    function: Function, points: dict[str, dict[str, Any]], executor: Executor | None
) -> Iterable[tuple[str, Callable[[], Any]]]:
    """Each point's text with a call that returns or raises its result, as they finish."""
    if executor is None:
        for text, point in points.items():
            yield text, partial(function, **point)
        return
    futures: dict[Future[Any], str] = {}
    try:
        for text, point in points.items():
            try:  # one argument, because Dask's submit has options of its own
                futures[executor.submit(partial(function, **point))] = text
            except RuntimeError as error:  # broken or closed: what already runs may still finish
                yield text, partial(_fail, error)
        for future in as_completed(list(futures)):
            yield futures.pop(future), future.result
    finally:
        for future in futures:
            future.cancel()


def _fail(error: Exception) -> None:
    raise error


def _described(
    function: Function, points: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The points by the text that names each."""
    listed = list(points)
    if isinstance(points, Mapping) or not all(isinstance(point, Mapping) for point in listed):
        raise TypeError(
            f"points must be an iterable of mappings from argument to value, got {points!r}"
        )
    found: dict[str, dict[str, Any]] = {}
    for point in listed:
        text = _describe(function, dict(point))
        if text in found:
            raise ValueError(f"points must differ, got {text} twice")
        found[text] = dict(point)
    return found


def _describe(function: Function, point: dict[str, Any]) -> str:
    """One text for svlib's version, a function and its arguments, the same in every process."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "<none>")
    if "<" in name:  # two of them could have one name
        raise TypeError(f"function must be a function of a module, got {function!r}")

    def plain(value: Any) -> Any:
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        raise TypeError(f"points must hold numbers, strings, None, lists or ranges, got {value!r}")

    return json.dumps([f"{module}.{name}", point, CODE], default=plain, sort_keys=True)


def _checked(result: Any) -> xr.Dataset:
    """The result, if it is a record and, where it says so, of this version of svlib."""
    if not isinstance(result, xr.Dataset):
        raise TypeError(f"function must return an xarray.Dataset, got {type(result).__name__}")
    if (code := result.attrs.get("svlib", CODE)) != CODE:  # a worker with another installation
        raise RuntimeError(f"workers must have svlib {CODE}, got a record of {code}")
    return result


def _key(content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:32]


def _write(folder: Path, text: str, record: xr.Dataset) -> None:
    # netCDF 3 has no integers beyond 32 bits
    large = {k: x for k, x in record.attrs.items() if isinstance(x, int) and abs(x) >= 2**31}
    made = {_POINT: text, _LARGE: json.dumps(large)}
    held = record.copy(deep=False)
    held.attrs = {k: x for k, x in record.attrs.items() if k not in large} | made
    content = bytes(held.to_netcdf(engine="scipy"))
    write_whole(folder / f"{_key(text)}-{_key(content)}.nc", content)


def _load(folder: Path, text: str) -> xr.Dataset | None:
    """The record of a point; ``None`` if there is none that is undamaged and its own."""
    for path in sorted(folder.glob(f"{_key(text)}-*.nc")):
        content = path.read_bytes()
        reason = "damaged"
        if path.stem == f"{_key(text)}-{_key(content)}":
            try:
                record = xr.load_dataset(content, engine="scipy")
            except (TypeError, ValueError, OSError):
                record = xr.Dataset()
            if record.attrs.pop(_POINT, None) == text:
                return record.assign_attrs(json.loads(record.attrs.pop(_LARGE)))
            reason = "not the record of this point"
        path.rename(path.with_suffix(".rejected"))
        warnings.warn(
            f"{path} is {reason}; set aside as {path.stem}.rejected, the point runs again",
            stacklevel=3,
        )
    return None


def _read(folder: Path, text: str) -> xr.Dataset:
    record = _load(folder, text)
    if record is None:
        raise RuntimeError(f"the record of {text} has vanished from {folder}")
    return record
