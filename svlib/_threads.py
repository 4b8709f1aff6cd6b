"""One piece of work per thread, with torch's own threads switched off inside.

On small tensors torch's threads wait for each other; pieces that are independent do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm


def run(threads: int, items: Iterable[int], work: Callable[[int], None]) -> Iterator[int]:
    """Call ``work`` on every item, and yield the items in their order as they are finished.

    Once an item fails, or the caller is interrupted, no other is begun, and :func:`stopped` is true
    in those that run.
    """
    if threads == 1:
        for item in items:
            work(item)
            yield item
        return
    before, stop = torch.get_num_threads(), threading.Event()

    def one(item: int) -> None:
        _here.stop = stop
        work(item)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            futures = [(item, pool.submit(one, item)) for item in items]
            try:
                for item, future in futures:
                    future.result()
                    yield item
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)


_here = threading.local()


def stopped() -> bool:
    """Whether the piece of work of this thread is to end."""
    stop = getattr(_here, "stop", None)
    return stop is not None and stop.is_set()


def available(device: torch.device) -> int:
    """How many threads there are for a device: one, if it is not the processor."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def blocks(
    threads: int,
    count: int,
    size: int,
    layers: int,
    work: Callable[[slice], Iterator[None]],
    progress: bool | None,
) -> Iterator[int]:
    """Call ``work(rows)`` for blocks of at most ``size`` of ``count`` networks, a block in each
    thread, with a progress bar; it yields after each of its ``layers`` layers. Yield how many of
    the first networks are finished, again and again."""
    lock, hidden = threading.Lock(), None if progress is None else not progress

    def block(start: int) -> None:
        rows = slice(start, min(start + size, count))
        for _ in work(rows):
            with lock:
                bar.update(rows.stop - rows.start)
            if stopped():
                return

    with tqdm(total=count * layers, disable=hidden, unit="layer") as bar:
        for start in run(threads, range(0, count, size), block):
            yield min(start + size, count)
