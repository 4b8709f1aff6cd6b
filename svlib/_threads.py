"""One piece of work per thread, with torch's own threads switched off inside.

On small tensors torch's threads wait for each other; pieces that are independent do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


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
