"""Cells around k-means centroids of lifted keys (IVF), of whole keys or of codes of them (IVF-PQ); lists by faiss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import faiss
import numpy as np
from numpy.typing import NDArray

from rabatch.compiling import compiled
from rabatch.index.base import QuerySample, SearchResult, empty_result
from rabatch.index.baselines.common import Baseline, score_candidates
from rabatch.index.baselines.lift import Reduction, pad_queries
from rabatch.index.compiled import read_only
from rabatch.index.native import native

_TRAINING_ROUNDS = 10


@compiled
def _score_centroids(centroids, queries, scores):  # type: ignore[no-untyped-def]
    for row in range(queries.shape[0]):
        for cell in range(centroids.shape[0]):
            score = np.float32(0.0)
            for t in range(centroids.shape[1]):
                score += centroids[cell, t] * queries[row, t]
            scores[row, cell] = score


class IvfIndex(Baseline):
    """Inverted lists (Sivic and Zisserman, 2003), one `faiss.IndexIVFFlat` per KV head.

    `effort` is the number of cells probed, by default a sixteenth. Option `nlist`: cells, 0 for 4 sqrt(n_keys).
    The cells are probed by our own scores: those of faiss come from BLAS, whose last bits depend on the batch.
    `visited` are the keys in the cells probed; `distances` those and all centroids.
    """

    kind = "ivf"
    defaults: ClassVar[Mapping[str, Any]] = {"nlist": 0}

    @property
    def _width(self) -> int:
        """Columns that lifting appends."""
        return 1

    def _fit(self, samples: Sequence[QuerySample]) -> None:
        self._lifts = [Reduction.of(keys) for keys in self._keys]
        self._lists: list[Any] = [None] * self.n_heads
        n_cells = self._options["nlist"] or int(4 * self.n_keys**0.5)
        n_cells = max(min(n_cells, self.n_keys // 4), 1)

        def build(head: int) -> None:
            lifted = self._lifts[head].lift(self._keys[head], self._width)
            means = faiss.Kmeans(
                lifted.shape[1], n_cells, niter=_TRAINING_ROUNDS, seed=self._seed + 1, min_points_per_centroid=1
            )
            means.train(lifted)
            quantizer = faiss.IndexFlatL2(lifted.shape[1])
            quantizer.add(np.asarray(means.centroids, np.float32))
            self._lists[head] = self._make_lists(quantizer, lifted)
            self._lists[head].add(lifted)

        self._for_heads(build)
        self._read_centroids()

    def _make_lists(self, quantizer: Any, lifted: NDArray[np.float32]) -> Any:
        lists = faiss.IndexIVFFlat(quantizer, quantizer.d, quantizer.ntotal, faiss.METRIC_INNER_PRODUCT)
        lists.is_trained = True
        return lists

    def _read_centroids(self) -> None:
        def centroids(lists: Any) -> NDArray[np.float32]:
            return lists.quantizer.reconstruct_n(0, lists.nlist)

        self._centroids = [read_only(centroids(lists)) for lists in self._lists]
        self._sizes = [np.array([x.invlists.list_size(c) for c in range(x.nlist)], np.int64) for x in self._lists]

    def _search(self, queries: NDArray[np.float32], k: int, effort: int) -> SearchResult:
        return self._probe(queries, k, k, effort or max(len(self._centroids[0]) // 16, 1))

    def _probe(self, queries: NDArray[np.float32], k: int, n_candidates: int, n_cells: int) -> SearchResult:
        """The best `k`, by exact score, of the best `n_candidates` in the `n_cells` cells of the best centroids."""
        n_heads, n_queries, _ = queries.shape
        result = empty_result(n_heads, n_queries, k)
        found = np.full((n_heads, n_queries, n_candidates), -1, np.int64)
        all_cells = len(self._centroids[0])
        n_cells = min(n_cells, all_cells)
        parameters = native.SearchParametersIVF(nprobe=n_cells)

        def search(head: int, rows: slice) -> None:
            padded = pad_queries(queries[head, rows], self._width)
            scores = np.empty((len(padded), all_cells), np.float32)
            _score_centroids(self._centroids[head], read_only(padded), scores)
            scores[:, self._sizes[head] == 0] = -np.inf  # keys that are all alike leave most cells empty
            cells = np.argpartition(-scores, n_cells - 1, axis=1)[:, :n_cells].astype(np.int64)
            of_cells = np.ascontiguousarray(np.take_along_axis(scores, cells, 1))
            approximate = np.empty((len(padded), n_candidates), np.float32)
            ids = np.empty((len(padded), n_candidates), np.int64)
            # The wrapper of `search_preassigned` reads nprobe from the index, which other threads may be searching.
            self._lists[head].search_preassigned_c(
                len(padded),
                *(faiss.swig_ptr(padded), n_candidates, faiss.swig_ptr(np.ascontiguousarray(cells))),
                *(faiss.swig_ptr(of_cells), faiss.swig_ptr(approximate), faiss.swig_ptr(ids)),
                *(False, parameters, None),
            )
            found[head, rows] = ids
            result.visited[head, rows] = self._sizes[head][cells].sum(axis=1)

        self._for_blocks(n_queries, search)
        result.distances[:] = result.visited + all_cells + (found >= 0).sum(axis=2)
        # faiss scores centred keys, in its own order of summation.
        score_candidates(self._keys, queries, found, result, threads=self._threads)
        return result

    def _insert(self, n_old: int) -> None:
        def add(head: int) -> None:
            self._lists[head].add(self._lifts[head].lift(self._keys[head, n_old:], self._width))

        self._for_heads(add)
        self._read_centroids()

    def _bytes(self) -> int:
        """Codes (of IVF: lifted keys), ids and centroids."""
        per_key = [lists.ntotal * (lists.code_size + 8) for lists in getattr(self, "_lists", [])]
        return sum(per_key) + sum(c.nbytes for c in getattr(self, "_centroids", []))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {
            "mean": np.stack([lift.mean for lift in self._lifts]),
            "radius": np.array([lift.radius for lift in self._lifts]),
        }
        return arrays | {f"faiss.{head}": faiss.serialize_index(lists) for head, lists in enumerate(self._lists)}

    def _restore(self, columns: Mapping[str, NDArray[Any]], arrays: Mapping[str, NDArray[Any]]) -> None:
        self._lifts = [Reduction(*pair) for pair in zip(arrays["mean"], arrays["radius"].tolist(), strict=True)]
        self._lists = [faiss.deserialize_index(arrays[f"faiss.{head}"]) for head in range(self.n_heads)]
        self._read_centroids()


class IvfPqIndex(IvfIndex):
    """Inverted lists of product-quantized residuals (Jegou et al., 2011), the best re-ranked by exact scores.

    `effort` is the number of keys re-ranked, by default 4 k. Options: `nlist` as in `IvfIndex`; `nprobe`, cells probed
    by every search, 0 for a sixteenth; `bits` of a code, 4 or 8; a code stands for `bits / 2` dimensions, so that a
    key takes about head_dim / 4 bytes either way.

    Recall of the top 100 on 16K stressed keys of 64 dimensions, of 200 keys re-ranked: 0.995 with 4 bits,
    trained in 0.3 s; 0.994 with 8 bits, trained in 5 s, searched in two thirds of the time. faiss' `FastScan` of the
    same 4-bit codes takes a quarter of the time, but finds 0.56 (0.76 of 400): it rounds its tables to 8 bits, and
    queries whose dimensions differ much in scale do not bear that.
    """

    kind = "ivfpq"
    defaults: ClassVar[Mapping[str, Any]] = {"nlist": 0, "nprobe": 0, "bits": 4}

    @property
    def _width(self) -> int:
        per_code = self._options["bits"] // 2
        return per_code - self._keys.shape[2] % per_code

    def _make_lists(self, quantizer: Any, lifted: NDArray[np.float32]) -> Any:
        bits = self._options["bits"]
        n_codes = quantizer.d // (bits // 2)
        lists = faiss.IndexIVFPQ(quantizer, quantizer.d, quantizer.ntotal, n_codes, bits, faiss.METRIC_INNER_PRODUCT)
        cells = quantizer.search(lifted, 1)[1][:, 0]
        lists.pq.cp.seed = self._seed + 1
        lists.pq.cp.niter = _TRAINING_ROUNDS
        lists.pq.cp.max_points_per_centroid = 64
        lists.pq.cp.min_points_per_centroid = 1
        lists.pq.train(lifted - quantizer.reconstruct_n(0, quantizer.ntotal)[cells])
        lists.is_trained = True
        return lists

    def _search(self, queries: NDArray[np.float32], k: int, effort: int) -> SearchResult:
        n_cells = self._options["nprobe"] or max(len(self._centroids[0]) // 16, 1)
        return self._probe(queries, k, max(effort or 4 * k, k), n_cells)
