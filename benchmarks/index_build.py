"""Building and growing the graph: seconds beside HNSW and RobustVamana, what each kind of link buys, insertion.

    python benchmarks/index_build.py [--quick] [--threads 1] [--keys 131072] [--cache DIR]

Top-k lists of the sampled queries are given: prefill computes them. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from common.heads import LIST_LENGTH, TOP_K, Head, exact_topk, synthetic_heads
from common.measures import machine, quality, table
from real_vectors import demo_vectors

from rabatch.config import BuildConfig, GenerationSettings, GraphConfig, ModelConfig, Recipe
from rabatch.index.alignment import align
from rabatch.index.base import QuerySample
from rabatch.index.baselines.vamana import VamanaIndex
from rabatch.index.codes import encode
from rabatch.index.graph import GraphIndex
from rabatch.index.links import Graph, build_graph, unreachable
from rabatch.index.scan import ScanIndex
from rabatch.index.search import search_graph

EFFORTS = (100, 150, 200, 300, 500)


def seconds_of(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds of one call."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def builds(head: Head, threads: int, *, vamana: bool) -> list[dict[str, Any]]:
    """Seconds to build each index over the keys of one head; each is searched once, so that none is timed broken."""
    keys, samples = head.keys[None], [head.sample]

    def hnsw() -> Any:
        graph = faiss.IndexHNSWFlat(keys.shape[2], 16, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = 100
        graph.add(head.keys)
        return graph

    makers: dict[str, Callable[[], Any]] = {
        "graph": lambda: GraphIndex.build(keys, samples, threads=threads),
        "scan": lambda: ScanIndex.build(keys, samples, threads=threads),
        "faiss hnsw M 16, efConstruction 100": hnsw,
    }
    if vamana:
        makers["robust vamana R 32, L 100"] = lambda: VamanaIndex.build(keys, samples, threads=threads, build_list=100)
    rows = []
    for name, make in makers.items():
        index, seconds = seconds_of(make)
        if name.startswith("faiss"):
            index.hnsw.efSearch = 200
            ids = index.search(head.queries, TOP_K)[1]
        else:
            found = index.search(head.queries[None], k=TOP_K, effort=400 if name == "scan" else 200)
            ids = found.ids[0]
        if name == "graph" and unreachable(index.neighbors[0], index.entries[0]).size:
            raise AssertionError("a key cannot be reached")
        rows.append({"vectors": head.name, "index": name, "seconds": round(seconds, 2), **quality(ids, head)})
    return rows


def judged(name: str, head: Head, graph: Graph, seconds: float) -> dict[str, Any]:
    """Recall at 200 candidates, and the share of keys visited at recall 0.95."""
    points = []
    for effort in EFFORTS:
        found = search_graph(
            encode(head.keys[None]), graph.neighbors[None], graph.entries[None], head.queries[None],
            k=TOP_K, search_list=effort,
        )  # fmt: skip
        points.append((quality(found.ids[0], head), float(found.visited.mean()) / len(head.keys)))
    recalls = [q["recall"] for q, _ in points]
    shares = [share for _, share in points]
    reached = recalls[-1] >= 0.95
    return {
        "vectors": head.name,
        "links": name,
        "build_s": round(seconds, 2),
        "recall@200": points[2][0]["recall"],
        "mass_p10@200": points[2][0]["mass_p10"],
        "share@200": round(shares[2], 4),
        "share at recall 0.95": round(float(np.interp(0.95, recalls, shares)), 4) if reached else f"> {shares[-1]:.3f}",
    }


def links(head: Head, threads: int) -> list[dict[str, Any]]:
    """What each kind of link buys: one change at a time from the graph as it is built."""
    sample, keys = head.sample, head.keys
    aligned = align(keys, sample.queries).keys(keys)
    config = GraphConfig()
    rows = []

    def add(name: str, make: Callable[[], Graph]) -> Graph:
        graph, seconds = seconds_of(make)
        rows.append(judged(name, head, graph, seconds))
        return graph

    def build(vectors: np.ndarray = aligned, lists: np.ndarray = sample.topk, **changed: Any) -> Graph:
        nearest = changed.pop("nearest", None)
        return build_graph(
            vectors, lists, config=GraphConfig(**{**config.to_dict(), **changed}), threads=threads, nearest=nearest
        )

    add("as built: queries' links, near keys, neighbouring tokens, aligned", build)
    add("not aligned, centred only", lambda: build(keys - keys.mean(axis=0)))
    projected = add("no links to near keys (queries and tokens only)", lambda: build(key_neighbors=0))
    add("links to near keys and tokens only, no queries", lambda: build(lists=sample.topk[:0], key_neighbors=30))
    add("one entry point", lambda: build(entry_points=1))
    add("half of the sampled queries", lambda: build(lists=sample.topk[: len(sample.topk) // 2]))
    add("lists of 16", lambda: build(lists=np.ascontiguousarray(sample.topk[:, :16])))
    centred = aligned - aligned.mean(axis=0)

    def exact_near() -> Graph:
        near = faiss.knn(centred, centred, config.key_neighbors + 1)[1][:, 1:].astype(np.int32)
        return build(nearest=np.ascontiguousarray(near))

    add("exact nearest keys instead of near ones", exact_near)

    def connectivity() -> Graph:
        # RoarGraph's third step (section 4.3): every key is searched for in the projected graph, what the search
        # finds are its link candidates. Ours takes the best of them as the links to near keys.
        found = search_graph(
            encode(aligned[None]), projected.neighbors[None], projected.entries[None], aligned[None],
            k=config.key_neighbors + 1, search_list=64, threads=threads,
        ).ids[0]  # fmt: skip
        own = np.arange(len(found))[:, None]
        rest = np.argsort(found == own, axis=1, kind="stable")[:, : config.key_neighbors]
        return build(nearest=np.ascontiguousarray(np.take_along_axis(found, rest, 1)))

    add("connectivity search (RoarGraph) instead of near keys", connectivity)
    return rows


def insertion(base: int, new: int, cache: Path | None, threads: int, step_s: float) -> dict[str, Any]:
    """Insert the keys of the `new` tokens after the first `base`; only queries of those are in the sample.

    The queries asked are those of decoding: none is in the sample, all stand behind every key.
    """
    before, after, old_recalls, new_recalls, rebuilt, seconds = [], [], [], [], [], 0.0
    for layer in demo_vectors(base + new + 2048, cache=cache):
        keys = np.ascontiguousarray(layer.keys[:, : base + new])
        early = layer.positions < base  # of the context, so that their lists hold earlier keys only
        samples = []
        for whole in layer.samples:
            assert whole.queries is not None
            samples.append(QuerySample(whole.topk[early], np.ascontiguousarray(whole.queries[early])))
        index = GraphIndex.build(np.ascontiguousarray(keys[:, :base]), samples, threads=threads)
        queries = np.ascontiguousarray(layer.decode_queries[:, :256])
        before += [r for r, _, _ in recalls(index, keys[:, :base], queries, base)]
        index.insert(np.ascontiguousarray(keys[:, base : base + 1]))  # the first call prepares
        start = time.perf_counter()
        for first in range(base + 1, base + new, 64):
            index.insert(np.ascontiguousarray(keys[:, first : min(first + 64, base + new)]))
        seconds += time.perf_counter() - start
        if unreachable(index.neighbors[0], index.entries[0]).size:
            raise AssertionError("a key cannot be reached")
        for r, old, fresh in recalls(index, keys, queries, base):
            after.append(r)
            old_recalls.append(old)
            new_recalls.append(fresh)
        full = [
            QuerySample(exact_topk(s.queries, keys[h], LIST_LENGTH), s.queries)  # type: ignore[arg-type]
            for h, s in enumerate(samples)
        ]
        rebuilt += [r for r, _, _ in recalls(GraphIndex.build(keys, full, threads=threads), keys, queries, base)]
    per_token = seconds / new
    return {
        "keys": base,
        "inserted": new,
        "recall before": round(float(np.mean(before)), 4),
        "recall after": round(float(np.mean(after)), 4),
        "of old keys": round(float(np.mean(old_recalls)), 4),
        "of new keys": round(float(np.nanmean(new_recalls)), 4),
        "worst head": round(min(after), 4),
        "built anew": round(float(np.mean(rebuilt)), 4),
        "ms per token, all layers": round(1e3 * per_token, 3),
        "decode step ms": round(1e3 * step_s, 2),
        "added share": round(per_token / step_s, 4),
    }


def recalls(index: GraphIndex, keys: np.ndarray, queries: np.ndarray, base: int) -> list[tuple[float, float, float]]:
    """Per head recall@100 at 256 candidates: of all, of keys before `base`, of those after."""
    found = index.search(queries, k=TOP_K, effort=256)
    out = []
    for head in range(len(keys)):
        truth = exact_topk(queries[head], keys[head], TOP_K)
        hit = np.array([np.isin(a, b) for a, b in zip(truth, found.ids[head], strict=True)])
        old = truth < base
        fresh = float(hit[~old].mean()) if (~old).any() else float("nan")
        out.append((float(hit.mean()), float(hit[old].mean()), fresh))
    return out


def decode_step_seconds(tokens: int, threads: int) -> float:
    """Seconds per generated token of one question over a stored context of `tokens`, recipe graph."""
    from rabatch.contexts import open_context
    from rabatch.decode import answer_batch
    from rabatch.demo.run import run_demo
    from rabatch.loading import load_model
    from rabatch.storage.store import IndexStore

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="rabatch-bench-") as folder:
        run_demo(documents=1, tokens=tokens, questions=1, seed=5, keep=folder)
        store = IndexStore(f"{folder}/index")
        loaded = load_model(ModelConfig())
        loaded.model.generation_config.eos_token_id = None  # answers go on to the limit
        manifest = next(iter(store.manifests()))
        context = open_context(store, manifest, loaded, Recipe(), threads=threads)
        question = {
            "question_id": "q",
            "question": "What is the code of the gate?",
            "document_id": manifest.document_id,
        }

        def ask(n: int) -> float:
            generation = GenerationSettings(max_new_tokens=n)
            row, seconds = seconds_of(lambda: answer_batch(context, [question], Recipe(), generation)[0])
            if row["status"] != "ok" or row["answer_tokens"] != n:
                raise AssertionError(f"the answer has {row['answer_tokens']} tokens: {row['reason']}")
            return seconds

        ask(4)
        return min((ask(68) - ask(4)) / 64 for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16K keys, 1K + 500 keys for insertion")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--cache", type=Path, help="folder for vectors and exact top-k, which take minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    n_keys = 16384 if arguments.quick else arguments.keys
    small = next(synthetic_heads(2048, 8, sharpness=(2.0,)))  # compile before anything is timed
    builds(small, arguments.threads, vamana=True)
    heads = [next(synthetic_heads(n_keys, 256, sharpness=(2.0,), cache=arguments.cache))]
    heads.append(heads[0].stressed())
    build_rows = [row for head in heads for row in builds(head, arguments.threads, vamana=True)]
    link_rows = links(heads[0], arguments.threads)
    base, new = (1024, 500) if arguments.quick else (8192, 2000)
    step_s = decode_step_seconds(base + new, arguments.threads)
    grown = insertion(base, new, arguments.cache, arguments.threads, step_s)

    targets = []

    def add(name: str, value: float, target: float, holds: bool) -> None:
        targets.append({"name": name, "value": round(value, 4), "target": target, "holds": holds})

    for head in heads:
        of = {row["index"]: row["seconds"] for row in build_rows if row["vectors"] == head.name}
        hnsw, vamana = (next(s for name, s in of.items() if kind in name) for kind in ("hnsw", "vamana"))
        add(f"{head.name}: build, graph / hnsw", of["graph"] / hnsw, 0.7, of["graph"] <= 0.7 * hnsw)
        add(f"{head.name}: build, graph / vamana", of["graph"] / vamana, 0.2, of["graph"] <= 0.2 * vamana)
    add("insertion: recall@100 after", grown["recall after"], 0.93, grown["recall after"] >= 0.93)
    add("insertion: time added per decode step", grown["added share"], 0.15, grown["added share"] <= 0.15)
    print(
        f"{machine(arguments.threads)}; {n_keys} keys of {heads[0].keys.shape[1]} dimensions; {BuildConfig().graph}\n"
    )
    print(table(build_rows, list(build_rows[0])))
    print("\nWhat the links buy\n")
    print(table(link_rows, list(link_rows[0])))
    print("\nInsertion into the demo model's heads, batches of 64 tokens\n")
    print(table([grown], list(grown)))
    print()
    print(table(targets, ["name", "value", "target", "holds"]))
    result = {"benchmark": "index_build", "builds": build_rows, "links": link_rows, "insertion": grown}
    print(json.dumps({**result, "targets": targets}))


if __name__ == "__main__":
    main()
