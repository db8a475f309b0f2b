"""faiss as it is used here: one OpenMP thread per Python thread, and without types, which leave out what is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss

native: Any = faiss


@contextmanager
def one_faiss_thread() -> Iterator[None]:
    """OpenMP counts are per thread: the calling one gets 1, then its own again. Threads here are Python's."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
