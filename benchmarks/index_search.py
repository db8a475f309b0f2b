"""The key indexes side by side: recall, softmax mass, keys scanned, time per query, bytes, build seconds.

    python benchmarks/index_search.py [--quick] [--threads 1] [--only graph,hnsw] [--plot FILE] [--cache DIR]

Vectors: every layer and head of the demo model at 8K and at the longest context it handles (queries of decoding,
never of prefill), and synthetic heads of 128K keys of 128 dimensions, from diffuse to concentrated; each as they are
and under the stress that keeps every ordering (see rabatch/index/synthetic.py). All queries of a layer are one call.
Prints a table (means over heads; the worst head's 10th percentile of mass) and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from common.heads import TOP_K, Head, real_heads, synthetic_heads
from common.measures import best_seconds, check, machine, quality, table

from rabatch.index.auto import AutoIndex
from rabatch.index.base import KeyIndex
from rabatch.index.baselines.hnsw import HnswIndex
from rabatch.index.baselines.ivf import IvfIndex, IvfPqIndex
from rabatch.index.baselines.nsg import NsgIndex
from rabatch.index.baselines.vamana import VamanaIndex
from rabatch.index.codes import encode
from rabatch.index.flat import FlatIndex
from rabatch.index.graph import GraphIndex
from rabatch.index.mass import beta_for
from rabatch.index.scan import ScanIndex

# name: (class, options of the build, efforts, largest index it is built for)
INDEXES: dict[str, tuple[type[KeyIndex], dict[str, Any], tuple[int, ...], int]] = {
    "flat": (FlatIndex, {}, (0,), 1 << 20),
    "graph": (GraphIndex, {}, (100, 150, 200, 300, 500), 1 << 20),
    "graph int8": (GraphIndex, {"dtype": "int8"}, (100, 150, 200, 300, 500), 1 << 20),
    "scan": (ScanIndex, {}, (250, 400, 800), 1 << 20),
    "auto": (AutoIndex, {}, (0,), 1 << 20),
    "hnsw plain": (
        HnswIndex,
        {"m": 16, "ef_construction": 100, "lifted": False},
        (100, 200, 400, 800, 1600),
        1 << 20,
    ),
    "hnsw": (HnswIndex, {}, (100, 200, 400, 800, 1600, 3200), 1 << 20),
    "ivf": (IvfIndex, {}, (8, 16, 32, 48, 64, 96, 128, 256), 1 << 20),
    "ivfpq": (IvfPqIndex, {}, (200, 400, 800), 1 << 20),
    "vamana": (VamanaIndex, {}, (100, 200, 400, 800, 1600), 1 << 20),
    "nsg": (NsgIndex, {}, (100, 200, 400, 800), 1 << 14),  # its exact key-key neighbours grow with the square
}
RIVALS = ("hnsw", "ivf", "vamana")


def layers(arguments: argparse.Namespace) -> Iterator[tuple[str, list[Head]]]:
    """Sets of heads of equal size, by name."""
    n_queries = 96 if arguments.quick else 256
    if arguments.quick:
        sets = [("real 2K", list(real_heads(2048, n_queries, arguments.cache)))]
        sets.append(("synthetic 16K", list(synthetic_heads(16384, n_queries, sharpness=(1.0, 3.0)))))
        for name, heads in sets:
            yield name, heads
            yield f"{name} stressed", [head.stressed() for head in heads]
        return
    for tokens in arguments.real:
        heads = list(real_heads(tokens, n_queries, arguments.cache))
        yield f"real {round(tokens / 1024)}K", heads
        yield f"real {round(tokens / 1024)}K stressed", [head.stressed() for head in heads]
    if arguments.synthetic:
        heads = list(synthetic_heads(arguments.synthetic, n_queries, cache=arguments.cache))
        name = f"synthetic {arguments.synthetic // 1024}K"
        yield name, heads
        yield f"{name} stressed", [head.stressed() for head in heads]


def measure(name: str, heads: list[Head], only: list[str], threads: int, repeats: int) -> list[dict[str, Any]]:
    """One row per index and effort, means over the heads."""
    keys = np.stack([head.keys for head in heads])
    queries = np.stack([head.queries for head in heads])
    samples = [head.sample for head in heads]
    n_heads, n_keys, _ = keys.shape
    rows: list[dict[str, Any]] = []
    for label in only:
        kind, options, efforts, largest = INDEXES[label]
        if n_keys > largest:
            continue
        start = time.perf_counter()
        index = kind.build(keys, samples, threads=threads, **options)
        build_s = time.perf_counter() - start
        for effort in efforts:
            if effort >= n_keys:
                continue

            def search(effort: int = effort, index: KeyIndex = index) -> Any:
                return index.search(queries, k=TOP_K, effort=effort)

            found, seconds = best_seconds(search, repeats)
            for number, head in enumerate(heads):
                # Codes of 8 bits answer for themselves; their scores are those of the codes.
                check(found.ids[number], found.scores[number], head, 5e-3 if options.get("dtype") == "int8" else 1e-5)
            each = [quality(found.ids[number], head) for number, head in enumerate(heads)]
            rows.append(
                {
                    "vectors": name,
                    "index": label,
                    "effort": effort,
                    "recall": round(float(np.mean([q["recall"] for q in each])), 4),
                    "recall_worst": min(q["recall"] for q in each),
                    "mass": round(float(np.mean([q["mass"] for q in each])), 4),
                    "mass_worst": min(q["mass"] for q in each),
                    "mass_p10_worst": min(q["mass_p10"] for q in each),
                    "visited_share": round(float(found.visited.mean()) / n_keys, 5),
                    "distances": round(float(found.distances.mean())),
                    "us_per_query": round(1e6 * seconds / found.visited.size, 1),
                    "bytes_per_key": round(index.bytes_per_key),
                    "build_s_per_head": round(build_s / n_heads, 2),
                    "heads": each,
                }
            )
            if isinstance(index, AutoIndex):
                rows[-1]["choices"] = [f"{choice.kind} {choice.effort}" for choice in index.choices]
            print(f"  {name}: {label} {effort}: {rows[-1]['recall']} in {rows[-1]['us_per_query']} us", flush=True)
    # The flat index as a decoding loop without batches would call it: one query at a time.
    flat = FlatIndex(keys[:1])
    single = [best_seconds(lambda i=i: flat.search(queries[:1, i : i + 1], k=TOP_K), 3)[1] for i in range(5)]
    fast = [best_seconds(lambda i=i: _faiss_flat(queries[0, i : i + 1], keys[0]), 3)[1] for i in range(5)]
    rows.append(
        {"vectors": name, "index": "flat, one query", "us_per_query": round(1e6 * min(min(single), min(fast)), 1)}
    )
    return rows


def _faiss_flat(queries: np.ndarray, keys: np.ndarray) -> Any:
    return faiss.knn(queries, keys, TOP_K, metric=faiss.METRIC_INNER_PRODUCT)


def faiss_on_our_graph(head: Head, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Our graph searched by faiss and by our kernel, in one thread: which of the two is kept is decided here."""
    graph = GraphIndex.build(head.keys[None], [head.sample], threads=threads)
    graph.threads = 1
    n_keys, dim = head.keys.shape
    degree = graph.neighbors.shape[2]
    native = faiss.IndexHNSWFlat(dim, degree // 2, faiss.METRIC_INNER_PRODUCT)
    native.storage.add(head.keys)
    native.ntotal = n_keys
    native.hnsw.entry_point, native.hnsw.max_level = int(graph.entries[0, 0]), 0
    faiss.copy_array_to_vector(np.ones(n_keys, np.int32), native.hnsw.levels)
    faiss.copy_array_to_vector(np.arange(n_keys + 1, dtype=np.uint64) * degree, native.hnsw.offsets)
    faiss.copy_array_to_vector(np.ascontiguousarray(graph.neighbors[0]).ravel(), native.hnsw.neighbors)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    rows = []
    for effort in (100, 200, 400):
        native.hnsw.efSearch = effort
        ours, seconds = best_seconds(lambda e=effort: graph.search(head.queries[None], k=TOP_K, effort=e), repeats)
        theirs, faiss_seconds = best_seconds(lambda: native.search(head.queries, TOP_K), repeats)
        check(theirs[1], theirs[0], head, 1e-5)
        n = len(head.queries)
        rows.append(
            {
                "effort": effort,
                "kernel_recall": quality(ours.ids[0], head)["recall"],
                "faiss_recall": quality(theirs[1], head)["recall"],
                "kernel_us": round(1e6 * seconds / n, 1),
                "faiss_us": round(1e6 * faiss_seconds / n, 1),
                "faiss_over_kernel": round(faiss_seconds / seconds, 2),
            }
        )
    faiss.omp_set_num_threads(before)
    return rows


def mass_stopping(head: Head, threads: int) -> list[dict[str, Any]]:
    """`beta` from a share of the mass: how many keys it keeps and visits on this head, and what they hold."""
    assert head.sample.queries is not None
    index = GraphIndex.build(head.keys[None], [head.sample], threads=threads)
    scaling = head.keys.shape[1] ** -0.5
    sampled = FlatIndex(head.keys[None]).search(head.sample.queries[None, :128], k=min(4096, len(head.keys)))
    rows = []
    for share in (0.8, 0.9, 0.95, 0.99):
        beta = np.array([beta_for(sampled.scores[0], share, scaling=scaling)], np.float32)
        cap = min(2048, len(head.keys))
        found = index.search(head.queries[None], k=cap, beta=beta)
        scores = torch.from_numpy(head.queries) @ torch.from_numpy(head.keys).T * scaling
        whole = torch.logsumexp(scores, 1).numpy()
        held = torch.logsumexp(torch.from_numpy(found.scores[0]) * scaling, 1).numpy()
        kept = (found.ids[0] >= 0).sum(axis=1)
        rows.append(
            {
                "vectors": head.name,
                "share_wanted": share,
                "beta_scaled": round(float(beta[0]) * scaling, 2),
                "keys_kept": round(float(kept.mean())),
                "kept_p90": round(float(np.quantile(kept, 0.9))),
                "share_held": round(float(np.exp(held - whole).mean()), 4),
                "visited": round(float(found.visited.mean())),
            }
        )
    return rows


def first_reaching(rows: list[dict[str, Any]], index: str, field: str, value: float) -> dict[str, Any] | None:
    """The cheapest row of an index whose `field` reaches `value`."""
    fitting = [row for row in rows if row["index"] == index and row.get(field, 0) >= value]
    return min(fitting, key=lambda row: row["us_per_query"], default=None)


def targets(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """What the benchmark is to show, for one set of vectors."""
    rows = [row for row in rows if row["vectors"] == name]
    out: list[dict[str, Any]] = []

    def add(what: str, value: float | None, target: float, holds: bool) -> None:
        shown = None if value is None else round(value, 4)
        out.append({"name": f"{name}: {what}", "value": shown, "target": target, "holds": bool(holds)})

    def curve(index: str, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        points = sorted((row[x], row[y]) for row in rows if row["index"] == index)
        return np.array([p[0] for p in points]), np.array([p[1] for p in points])

    graph = first_reaching(rows, "graph", "recall", 0.95)
    add("share visited by graph at recall 0.95", graph and graph["visited_share"], 0.02,
        graph is not None and graph["visited_share"] <= 0.02)  # fmt: skip
    for hnsw in ("hnsw plain", "hnsw"):
        if graph is not None and any(row["index"] == hnsw for row in rows):
            at_share = float(np.interp(graph["visited_share"], *curve(hnsw, "visited_share", "recall")))
            add(f"recall of {hnsw} at that share", at_share, 0.7, at_share < 0.7)
    auto = next((row for row in rows if row["index"] == "auto"), None)
    if auto is not None:
        add("auto: mass, mean of the worst head", auto["mass_worst"], 0.98, auto["mass_worst"] >= 0.98)
        add(
            "auto: mass, 10th percentile of the worst head",
            auto["mass_p10_worst"],
            0.95,
            auto["mass_p10_worst"] >= 0.95,
        )
        single = next(row for row in rows if row["index"] == "flat, one query")["us_per_query"]
        ratio = single / auto["us_per_query"]
        add("flat, one query at a time / auto, time", ratio, 10, ratio >= 10)
        for rival in RIVALS:
            if any(row["index"] == rival for row in rows):
                masses, microseconds = curve(rival, "mass", "us_per_query")
                # None: it does not reach the mass with the largest effort tried.
                equal = (
                    None if masses[-1] < auto["mass"] else np.exp(np.interp(auto["mass"], masses, np.log(microseconds)))
                )
                times = None if equal is None else float(equal) / auto["us_per_query"]
                add(f"{rival} / auto, time at equal mass", times, 3, times is None or times >= 3)
    int8 = [row for row in rows if row["index"] == "graph int8"]
    lost = [
        full["recall"] - row["recall"]
        for row in int8
        for full in rows
        if full["index"] == "graph" and full["effort"] == row["effort"]
    ]
    if lost:
        add("graph int8: recall lost, most", max(lost), 0.01, max(lost) <= 0.01)
    return out


def int8_bytes(head: Head) -> dict[str, Any]:
    """Bytes of int8 keys over those of 16-bit keys."""
    sizes = {dtype: encode(head.keys[None], dtype).bytes_per_key for dtype in ("bfloat16", "int8")}  # type: ignore[arg-type]
    ratio = sizes["int8"] / sizes["bfloat16"]
    return {"name": "int8 / bfloat16, bytes", "value": round(ratio, 4), "target": 0.55, "holds": ratio <= 0.55}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2K and 16K keys, fewer queries")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default=",".join(INDEXES), help="indexes, separated by commas")
    parser.add_argument("--real", type=int, nargs="*", default=[8192, 40640], help="context tokens of the demo model")
    parser.add_argument("--synthetic", type=int, default=131072, help="keys; 0: none")
    parser.add_argument("--plot", type=Path, help="write FILE.png and FILE.svg")
    parser.add_argument("--cache", type=Path, help="folder for vectors and exact top-k, which take minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    only = arguments.only.split(",")
    repeats = 2 if arguments.quick else 3
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    stopping: list[dict[str, Any]] = []
    for name, heads in layers(arguments):
        if not rows:  # compile before anything is timed
            for kind, options, _, _ in (INDEXES[label] for label in only):
                small = Head("", heads[0].keys[:1500], heads[0].sample, heads[0].queries, heads[0].truth)
                clipped = type(heads[0].sample)(
                    np.where(small.sample.topk < 1500, small.sample.topk, -1), small.sample.queries
                )
                kind.build(small.keys[None], [clipped], **options).search(small.queries[None, :2], k=10)
        rows += measure(name, heads, only, arguments.threads, repeats)
        results += targets(rows, name)
        if "stressed" not in name:
            kernels += [{"vectors": name, **row} for row in faiss_on_our_graph(heads[-1], arguments.threads, repeats)]
            stopping += [row for head in heads for row in mass_stopping(head, arguments.threads)]
            results.append({**int8_bytes(heads[0]), "name": f"{name}: int8 / bfloat16, bytes"})
    print(f"\n{machine(arguments.threads)}; top-{TOP_K}; held-out queries; means over heads, worst head where named\n")
    columns = ["vectors", "index", "effort", "recall", "recall_worst", "mass", "mass_worst", "mass_p10_worst"]
    columns += ["visited_share", "distances", "us_per_query", "bytes_per_key", "build_s_per_head"]
    print(table(rows, columns))
    for row in rows:
        if "choices" in row:
            print(f"auto, {row['vectors']}: {', '.join(row['choices'])}")
    print("\nThe same graph, searched by our kernel and by faiss, one thread\n")
    print(table(kernels, list(kernels[0])))
    print("\nMass stopping: beta from 128 sampled queries per head\n")
    print(table(stopping, list(stopping[0])))
    print()
    print(table(results, ["name", "value", "target", "holds"]))
    if arguments.plot:
        from common.plot import recall_plot

        recall_plot([row for row in rows if "recall" in row], arguments.plot)
    for row in rows:
        row.pop("heads", None)
    print(json.dumps({"benchmark": "index_search", "rows": rows, "kernels": kernels, "targets": results}))


if __name__ == "__main__":
    main()
