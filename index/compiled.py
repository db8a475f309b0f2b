"""How compiled kernels are run: on plain Python threads.

Threads are Python's, not numba's `prange`: its default threading layer may not be entered from two threads at once
and has one process-wide count. A Ray actor passes its own `threads`.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from rabatch.errors import ConfigError


@functools.lru_cache(maxsize=4)
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="rabatch-index")


def run_ranges(kernel: Callable[[int, int], Any], n: int, *, threads: int, chunks_per_thread: int = 4) -> None:
    """Call `kernel(start, stop)` over ranges that cover 0 .. n, on `threads` threads; ranges must be independent."""
    if threads <= 1 or n <= 1:
        bounds = [0, n]
    else:
        bounds = np.linspace(0, n, min(threads * chunks_per_thread, n) + 1).astype(int).tolist()
    run_tasks(kernel, list(itertools.pairwise(bounds)), threads=threads)


def run_tasks(work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], *, threads: int) -> None:
    """Call `work(*task)` for every task, begun in their order, on `threads` threads; tasks must be independent.

    The caller is one of the threads, and waits for none that has not begun: waking one takes longer than the work of
    a decode step for a single question.
    """
    if threads < 1:
        raise ConfigError("threads", threads, "must be >= 1")
    numbers = itertools.count()  # its next() is atomic

    def drain() -> None:
        while (number := next(numbers)) < len(tasks):
            work(*tasks[number])

    helpers: list[Future[None]] = []
    if threads > 1 and len(tasks) > 1:
        # A forked child inherits the pool object but not its threads, hence the process id in the key.
        pool = _pool(threads, os.getpid())
        helpers = [pool.submit(drain) for _ in range(min(threads, len(tasks)) - 1)]
    try:
        drain()
    finally:
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()


def read_only(array: np.ndarray) -> np.ndarray:
    """A C-contiguous, read-only view: numba compiles a kernel once for stored (read-only) and fresh arrays alike."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
