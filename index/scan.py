"""Scan of 4-bit codes of all keys, with exact scores for the best few hundred.

No navigation that could fail: every key is scored by its code (product quantisation, Jegou et al. 2011; scanned from
registers as in Andre et al. 2015: `rabatch.index.lookup`), then the best are scored exactly. Keys and queries are
aligned first (`rabatch.index.alignment`): the stress of `rabatch.index.synthetic` costs plain codes up to 0.1 of the
recall.

A code book of 16 words cannot say that a key is far larger than the others, and such keys are the ones many queries
want. So the keys whose codes are worst, `EXCEPTIONS` of them, are scored exactly for every query.

Measured with faiss's scan of such codes, 128K keys of 128 dimensions, one core of x86_64, re-ranking 512, share of the
ideal top-100 mass / 10th percentile: 2 dimensions a code .992 / .984 in 0.27 ms, with exceptions .998 / .993 in 0.31
ms; 4 dimensions a code with exceptions .950 / .827 in 0.28 ms; RaBitQ (faiss, FastScan) .980 / .945 in 1.0 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rabatch.errors import ConfigError, IntegrityError
from rabatch.index.alignment import Alignment, align
from rabatch.index.arrow import from_table, to_table
from rabatch.index.base import (
    QuerySample,
    SearchResult,
    apply_beta,
    check_keys,
    check_queries,
    check_samples,
    check_saved_keys,
    empty_result,
)
from rabatch.index.codes import Dtype, KeyCodes, encode
from rabatch.index.compiled import read_only, run_ranges
from rabatch.index.flat import FlatIndex
from rabatch.index.lookup import blocked, unblocked
from rabatch.index.native import one_faiss_thread
from rabatch.index.product import DIMS_PER_CODE, code_errors, coded, even, trained
from rabatch.index.scan_search import scan_range

EXCEPTIONS = 128
MIN_KEYS = 1024  # below, a scan is no sooner done than exact scores, and 16 words of a code book are learnt from little


class ScanIndex:
    """The codes of one layer's keys.

    Args:
        keys: Whose scores count.
        codes: [n_kv_heads, n_keys, head_dim / 4 rounded up], uint8: two codes of 4 bits a byte, lower half first.
        books: [n_kv_heads, n_codes, 16, 2], float32, aligned.
        exceptions: [n_kv_heads, n_exceptions], int32, ids of keys scored exactly for every query; -1 for none. None
            at all: the index was built of too few keys to learn codes from, and every search is exact.
        alignments: One per KV head.
        efforts: Default of `effort`, one per KV head; none, or 0: 4 x k.
        grows: Whether the alignments are whole; else the index can neither be inserted into nor saved.
        threads: Threads of one search.
    """

    kind = "scan"

    def __init__(
        self,
        keys: KeyCodes,
        codes: NDArray[np.uint8],
        books: NDArray[np.float32],
        exceptions: NDArray[np.int32],
        alignments: Sequence[Alignment],
        *,
        efforts: Sequence[int] = (),
        grows: bool = True,
        threads: int = 1,
    ) -> None:
        n_heads, n_keys, dim = keys.shape
        n_codes = -(-dim // DIMS_PER_CODE)
        if codes.shape != (n_heads, n_keys, -(-n_codes // 2)) or codes.dtype != np.uint8:
            raise ConfigError("codes", (codes.shape, str(codes.dtype)), "must be uint8 of two codes, one row per key")
        if books.shape != (n_heads, n_codes, 16, DIMS_PER_CODE) or books.dtype != np.float32:
            raise ConfigError(
                "books", (books.shape, str(books.dtype)), f"must be float32 [{n_heads}, {n_codes}, 16, 2]"
            )
        if exceptions.size and not -1 <= int(exceptions.min()) <= int(exceptions.max()) < n_keys:
            raise ConfigError("exceptions", (int(exceptions.min()), int(exceptions.max())), f"ids: -1 .. {n_keys - 1}")
        self.keys, self.books, self.exceptions = keys, books, exceptions
        self.alignments, self.grows, self.threads = tuple(alignments), grows, threads
        self._efforts = list(efforts) or [0] * n_heads
        if len(self._efforts) != n_heads or min(self._efforts, default=0) < 0:
            raise ConfigError("efforts", efforts, f"must be {n_heads} numbers >= 0")
        self._flat: FlatIndex | None = None  # of searches with the full budget
        self._approximate = bool((exceptions >= 0).any())
        self._is_exception = np.zeros((n_heads, n_keys), np.bool_)
        for head, ids in enumerate(exceptions):
            self._is_exception[head, ids[ids >= 0]] = True
        self._arrange(codes)
        if not self._approximate or max(self._efforts, default=0) >= n_keys:
            self._flat = FlatIndex(self.keys.decode())

    def _arrange(self, codes: NDArray[np.uint8]) -> None:
        """Lay out what searches read."""
        blocks = np.stack([blocked(of_head) for of_head in codes])
        arrays = (blocks, self.books, self.to_query, self.exceptions, self._is_exception, self.keys.codes)
        self._read = [read_only(array) for array in arrays]

    @property
    def codes(self) -> NDArray[np.uint8]:
        """As given to the constructor; a copy, for they are held as searches read them."""
        n_bytes = -(-self.books.shape[1] // 2)
        return np.stack([unblocked(blocks, self.n_keys, n_bytes) for blocks in self._read[0]])

    @classmethod
    def stored(
        cls,
        keys: KeyCodes,
        codes: NDArray[np.uint8],
        books: NDArray[np.float32],
        exceptions: NDArray[np.int32],
        to_query: NDArray[np.float32],
        **options: Any,
    ) -> Self:
        """The index of stored arrays, for searches.

        Args:
            to_query: [n_kv_heads, head_dim, head_dim], float32, of the alignments.
            options: Of the constructor.
        """
        dim = keys.shape[2]
        alignments = [Alignment(np.zeros(dim, np.float32), np.eye(dim, dtype=np.float32), a) for a in to_query]
        return cls(keys, codes, books, exceptions, alignments, grows=False, **options)

    @property
    def to_query(self) -> NDArray[np.float32]:
        """[n_kv_heads, head_dim, head_dim], float32: what aligns queries."""
        return np.stack([alignment.to_query for alignment in self.alignments]).astype(np.float32, copy=False)

    @property
    def n_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def n_keys(self) -> int:
        return self.keys.shape[1]

    @property
    def bytes_per_key(self) -> float:
        shared = self.books.nbytes + self.exceptions.nbytes + sum(2 * a.to_query.nbytes for a in self.alignments)
        per_key = -(-self.books.shape[1] // 2) + self._is_exception.itemsize
        return self.keys.bytes_per_key + per_key + shared / max(self.n_heads * self.n_keys, 1)

    @classmethod
    def build(
        cls,
        keys: NDArray[np.float32],
        samples: Sequence[QuerySample],
        *,
        seed: int = 0,
        threads: int = 1,
        dtype: Dtype = "float32",
        **options: Any,
    ) -> Self:
        """See `KeyIndex.build`.

        Args:
            dtype: What is re-ranked by.
            options: Of the constructor.
        """
        check_keys(keys)
        check_samples(samples, *keys.shape)
        n_heads, n_keys, dim = keys.shape
        n_codes = -(-dim // DIMS_PER_CODE)
        codes = np.zeros((n_heads, n_keys, -(-n_codes // 2)), np.uint8)
        books = np.zeros((n_heads, n_codes, 16, DIMS_PER_CODE), np.float32)
        exceptions = np.full((n_heads, min(EXCEPTIONS, n_keys)), -1, np.int32)
        alignments: list[Alignment | None] = [None] * n_heads

        @one_faiss_thread()
        def build(start: int, stop: int) -> None:
            for head in range(start, stop):
                alignments[head] = alignment = align(keys[head], samples[head].queries)
                if n_keys >= MIN_KEYS:
                    aligned = even(alignment.keys(keys[head]))
                    books[head] = trained(aligned, seed)
                    codes[head] = coded(aligned, books[head])
                    exceptions[head] = np.argsort(-code_errors(aligned, codes[head], books[head]), kind="stable")[
                        :EXCEPTIONS
                    ]

        run_ranges(build, n_heads, threads=threads)
        known = [alignment for alignment in alignments if alignment is not None]
        return cls(encode(keys, dtype), codes, books, exceptions, known, threads=threads, **options)

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """See `KeyIndex.search`. `effort`: keys scored exactly beside the exceptions; by default 4 x k."""
        check_queries(queries, self.n_heads, self.keys.shape[2], k=k, effort=effort, beta=beta)
        efforts = [max(effort or own or 4 * k, k) for own in self._efforts]
        if max(efforts, default=0) >= self.n_keys or not self._approximate:
            self._flat = self._flat or FlatIndex(self.keys.decode())
            return self._flat.search(queries, k=k, beta=beta)
        n_queries = queries.shape[1]
        found = empty_result(self.n_heads, n_queries, k)
        prepared, offset = self.keys.prepare(queries)
        inputs = [*self._read, read_only(queries), read_only(prepared)]
        half, limits = self.keys.dtype == "float16", read_only(np.array(efforts, np.int64))

        def scan(start: int, stop: int) -> None:
            scan_range(*inputs, half, limits, start, stop, found.scores, found.ids)

        run_ranges(scan, self.n_heads * n_queries, threads=self.threads)
        np.add(found.scores, offset[:, :, None], out=found.scores)
        found.visited[:] = self.n_keys
        found.distances[:] = self.n_keys + limits[:, None] + (self.exceptions >= 0).sum(axis=1)[:, None]
        return apply_beta(found, beta)

    def select(self, heads: list[int], efforts: Sequence[int]) -> Self:
        """The index of some of its KV heads, with default efforts of their own."""
        return type(self)(
            self.keys.select(heads),
            self.codes[heads],
            self.books[heads],
            self.exceptions[heads],
            [self.alignments[head] for head in heads],
            efforts=efforts,
            grows=self.grows,
            threads=self.threads,
        )

    def insert(self, keys: NDArray[np.float32]) -> None:
        """See `KeyIndex.insert`: new keys get words of the books there are; those they fit worst become exceptions.

        An index built of fewer than `MIN_KEYS` keys stays exact, however it grows.

        Raises:
            ConfigError: The index does not grow (`grows`).
        """
        self._check_grows()
        check_keys(keys, n_heads=self.n_heads, head_dim=self.keys.shape[2])
        first, n_new = self.n_keys, keys.shape[1]
        appended = self.keys.append(keys)  # first: it may refuse, and then nothing has changed
        known = self.codes
        codes = np.zeros((self.n_heads, n_new, known.shape[2]), np.uint8)
        exceptions = [np.empty(0, np.int64) for _ in range(self.n_heads)]
        for head in range(self.n_heads if self._approximate else 0):
            old = self.exceptions[head][self.exceptions[head] >= 0]
            vectors = even(self.alignments[head].keys(self.keys.rows(head, old)))
            limit = code_errors(vectors, known[head][old], self.books[head]).min()
            aligned = even(self.alignments[head].keys(keys[head]))
            codes[head] = coded(aligned, self.books[head])
            exceptions[head] = first + np.flatnonzero(code_errors(aligned, codes[head], self.books[head]) > limit)
        self.keys, self._flat = appended, None
        more = np.full((self.n_heads, max((len(ids) for ids in exceptions), default=0)), -1, np.int32)
        is_exception = np.zeros((self.n_heads, n_new), np.bool_)
        for head, ids in enumerate(exceptions):
            more[head, : len(ids)] = ids
            is_exception[head, ids - first] = True
        self.exceptions = np.concatenate([self.exceptions, more], axis=1)
        self._is_exception = np.concatenate([self._is_exception, is_exception], axis=1)
        self._arrange(np.concatenate([known, codes], axis=1))

    def _check_grows(self) -> None:
        if not self.grows:
            raise ConfigError(
                "grows", self.grows, "a stored index is for searches; build one in memory to insert or save"
            )

    def to_arrow(self) -> pa.Table:
        """Codes as a column; books, exceptions and alignments beside them. ConfigError as of `insert`."""
        self._check_grows()
        settings = {
            "kind": self.kind,
            "n_heads": self.n_heads,
            "n_keys": self.n_keys,
            "dtype": self.keys.dtype,
            "efforts": self._efforts,
        }
        stacks = {
            name: np.stack([getattr(a, name) for a in self.alignments]) for name in ("center", "to_key", "to_query")
        }
        return to_table(settings, {"code": self.codes}, {"books": self.books, "exceptions": self.exceptions, **stacks})

    @classmethod
    def from_arrow(cls, table: pa.Table, keys: NDArray[np.float32], *, threads: int = 1) -> Self:
        """See `KeyIndex.from_arrow`."""
        settings, columns, arrays = from_table(table, cls.kind)
        check_saved_keys(keys, settings["n_heads"], settings["n_keys"])
        try:
            alignments = [
                Alignment(*a) for a in zip(arrays["center"], arrays["to_key"], arrays["to_query"], strict=True)
            ]
            codes = encode(keys, settings["dtype"])
            small = (arrays["books"], arrays["exceptions"], alignments)
            return cls(codes, columns["code"], *small, efforts=settings["efforts"], threads=threads)
        except KeyError as error:
            raise IntegrityError("index table", str(error), "is missing; build the index again") from error
