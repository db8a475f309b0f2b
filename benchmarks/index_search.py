"""Recall, time and share scanned of the key indexes, on queries from another cloud than the keys.

    python benchmarks/index_search.py [--quick] [--threads 1]

The queries asked are held out from those the graph was built with. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch

from rabatch.config import GraphConfig
from rabatch.index.flat import FlatLayerIndex
from rabatch.index.graph import build_graph, unreachable
from rabatch.index.search import GraphLayerIndex
from rabatch.index.stress import stressed_vectors
from rabatch.index.topk import topk

TOP_K = 100
SAMPLED_SHARE = 0.75
LIST_LENGTH = 32


def best_of(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result, and the least seconds of `repeats` calls after one warm-up."""
    result = function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def check(ids: np.ndarray, scores: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> None:
    """A wrong result is not timed: every id once per query, and worth the score that came with it."""
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(), "an id came twice"
    worth = np.einsum("qd,qkd->qk", queries, keys[ids])
    np.testing.assert_allclose(scores, worth, rtol=1e-3, atol=1e-3)


def measure(n_keys: int, n_queries: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    n_sampled = int(SAMPLED_SHARE * n_keys)
    queries, keys = stressed_vectors(n_keys, n_sampled + n_queries)
    positions = torch.full((len(queries),), n_keys)
    start = time.perf_counter()
    exact, _ = topk(torch.from_numpy(queries[None]), torch.from_numpy(keys[None]), positions, k=TOP_K)
    topk_s = time.perf_counter() - start
    lists = np.ascontiguousarray(exact[0, :n_sampled, :LIST_LENGTH].numpy())
    truth = exact[0, n_sampled:].numpy()
    held_out = np.ascontiguousarray(queries[n_sampled:])
    rows: list[dict[str, Any]] = []

    def add(name: str, setting: int, build_s: float, search: Callable[[], tuple[Any, Any, float]]) -> None:
        (ids, scores, visited), seconds = best_of(search, repeats)
        check(ids, scores, held_out, keys)
        hits = [len(np.intersect1d(a, b)) / TOP_K for a, b in zip(ids, truth, strict=True)]
        rows.append(
            {
                "keys": n_keys, "index": name, "ef": setting, "recall_at_100": round(float(np.mean(hits)), 4),
                "recall_p10": round(float(np.quantile(hits, 0.1)), 3),
                "ms_per_query": round(1e3 * seconds / n_queries, 4),
                "share_visited": round(visited / n_keys, 4), "build_s": round(build_s, 2),
            }
        )  # fmt: skip

    flat = FlatLayerIndex(keys[None])

    def search_flat() -> tuple[Any, Any, float]:
        found = flat.search(held_out[None], k=TOP_K)
        return found.ids[0], found.scores[0], n_keys

    add("flat", 0, 0.0, search_flat)

    start = time.perf_counter()
    graph = build_graph(keys, lists, config=GraphConfig(), threads=threads)
    build_s = time.perf_counter() - start
    assert unreachable(graph.neighbors, graph.entries).size == 0
    for search_list in (128, 256, 512):
        index = GraphLayerIndex(
            keys[None], graph.neighbors[None], graph.entries[None], search_list=search_list, threads=threads
        )

        def search_index(index: GraphLayerIndex = index) -> tuple[Any, Any, float]:
            found = index.search(held_out[None], k=TOP_K)
            return found.ids[0], found.scores[0], float(found.visited.mean())

        add("graph", search_list, build_s, search_index)

    start = time.perf_counter()
    hnsw = faiss.IndexHNSWFlat(keys.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    hnsw.add(keys)
    stats: Any = getattr(faiss.cvar, "hnsw_stats")  # noqa: B009 (faiss has no types for it)
    build_s = time.perf_counter() - start
    for search_list in (128, 512):

        def search_hnsw(search_list: int = search_list) -> tuple[Any, Any, float]:
            hnsw.hnsw.efSearch = search_list
            stats.reset()
            scores, ids = hnsw.search(held_out, TOP_K)
            return ids, scores, stats.ndis / n_queries

        add("faiss-hnsw", search_list, build_s, search_hnsw)
    for row in rows:
        row["exact_top_k_s"] = round(topk_s, 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8K keys only, fewer queries")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    # Compile before anything is timed.
    build_graph(np.eye(40, 8, dtype=np.float32), np.zeros((1, 2), np.int32), config=GraphConfig())
    rows = []
    for n_keys in (8192,) if arguments.quick else (8192, 32768):
        rows += measure(n_keys, 128 if arguments.quick else 512, arguments.threads, 2 if arguments.quick else 5)
    columns = ["keys", "index", "ef", "recall_at_100", "recall_p10", "ms_per_query", "share_visited", "build_s"]
    print(
        f"{arguments.threads} thread(s), head_dim 64, top-{TOP_K}, held-out queries; build_s excludes the exact top-k"
    )
    print(" | ".join(f"{column:>13}" for column in columns))
    for row in rows:
        print(" | ".join(f"{row[column]:>13}" for column in columns))
    print(json.dumps({"benchmark": "index_search", "rows": rows, "targets": []}))


if __name__ == "__main__":
    main()
