"""Computes results ahead of time in threads, and yields them in order. Uses bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 16


def num_threads() -> int:
    """Number of threads that prepare images: one for each CPU core that this process may use, at most 16."""
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def map_in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    threads: int,
    ahead: int = 0,
    stop: Event | None = None,
) -> Generator[Result, None, None]:
    """Yields `function(item)` for each item, in the order of the items. The calls run in `threads` threads.

    At most `ahead` results (default: two for each thread) exist at a time, whatever the number of items. An exception
    in `function(item)` is raised in place of the item's result. If the caller stops early, no more calls are started,
    and `stop` is set, so that a long call can test it and end early. Then the running calls are waited for.
    """
    ahead = ahead or 2 * threads
    pool = ThreadPoolExecutor(max_workers=threads)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        if stop is not None:
            stop.set()
        pool.shutdown(cancel_futures=True)
