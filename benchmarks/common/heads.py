"""Heads to search: keys, the sample an index is built from, held-out queries and their exact top-k."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from real_vectors import demo_vectors

from rabatch.index.base import QuerySample
from rabatch.index.synthetic import attention_vectors, stress

TOP_K = 100
LIST_LENGTH = 32
SAMPLE_VECTORS = 4096  # query vectors that an index is given beside the lists


@dataclass(frozen=True)
class Head:
    """One KV head.

    Args:
        keys: [n_keys, head_dim], float32.
        sample: What an index is built from.
        queries: [n_queries, head_dim], float32, held out.
        truth: [n_queries, TOP_K], int32, their best keys.
        static_lse: [n_queries], the log-sum-exp of what is attended beside the indexed keys; None if unknown.
    """

    name: str
    keys: np.ndarray
    sample: QuerySample
    queries: np.ndarray
    truth: np.ndarray
    static_lse: np.ndarray | None = None

    def stressed(self) -> Head:
        """The same head after the transform that keeps every ordering and pulls the clouds apart."""
        assert self.sample.queries is not None
        both, keys = stress(np.concatenate([self.queries, self.sample.queries]), self.keys)
        sample = QuerySample(self.sample.topk, np.ascontiguousarray(both[len(self.queries) :]))
        queries = np.ascontiguousarray(both[: len(self.queries)])
        return replace(self, name=f"{self.name} stressed", keys=keys, sample=sample, queries=queries)


def exact_topk(queries: np.ndarray, keys: np.ndarray, k: int, block: int = 512) -> np.ndarray:
    """Ids [n_queries, k], int32, by a matrix product."""
    transposed = torch.from_numpy(keys).T
    ids = [
        (torch.from_numpy(queries[start : start + block]) @ transposed).topk(k, dim=1)[1].int()
        for start in range(0, len(queries), block)
    ]
    return torch.cat(ids).numpy()


def synthetic_heads(
    n_keys: int,
    n_queries: int,
    *,
    head_dim: int = 128,
    sharpness: tuple[float, ...] = (1.0, 2.0, 3.0),
    cache: Path | None = None,
) -> Iterator[Head]:
    """Heads from diffuse to concentrated; a quarter as many queries as keys are sampled.

    `cache` is a folder for the exact top-k, which at 128K keys take minutes.
    """
    n_sampled = n_keys // 4
    for sharp in sharpness:
        queries, keys = attention_vectors(n_keys, n_sampled + n_queries, head_dim=head_dim, sharpness=sharp, seed=1)
        held_out = np.ascontiguousarray(queries[n_sampled:])
        path = cache and cache / f"synthetic-{n_keys}-{n_queries}-{head_dim}-{sharp:g}.npz"
        if path and path.exists():
            with np.load(path) as file:
                lists, truth = file["lists"], file["truth"]
        else:
            lists = exact_topk(queries[:n_sampled], keys, LIST_LENGTH)
            truth = exact_topk(held_out, keys, min(TOP_K, n_keys))
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez(path, lists=lists, truth=truth)
        sample = QuerySample(lists, np.ascontiguousarray(queries[: min(n_sampled, SAMPLE_VECTORS)]))
        yield Head(f"synthetic {sharp:g}", keys, sample, held_out, truth)


def real_heads(context_tokens: int, n_queries: int, cache: Path | None) -> Iterator[Head]:
    """Every layer and KV head of the demo model over one document; the queries are those of decoding answers."""
    rng = np.random.default_rng(0)
    for layer in demo_vectors(context_tokens, cache=cache):
        picked = np.sort(rng.permutation(layer.decode_queries.shape[1])[:n_queries])
        for head, keys in enumerate(layer.keys):
            keys = np.ascontiguousarray(keys)
            queries = np.ascontiguousarray(layer.decode_queries[head, picked])
            whole = layer.samples[head]
            assert whole.queries is not None
            order = rng.permutation(len(whole.topk))  # a prefix is then a sample of the whole document
            vectors = np.ascontiguousarray(whole.queries[order[:SAMPLE_VECTORS]])
            sample = QuerySample(np.ascontiguousarray(whole.topk[order]), vectors)
            truth = exact_topk(queries, keys, TOP_K)
            name = f"layer {layer.layer} head {head}"
            yield Head(name, keys, sample, queries, truth, layer.static_lse[head, picked])
