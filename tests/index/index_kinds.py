"""Every kind of key index with small layers to build it of, and what must hold of a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from index_samples import samples_of

from rabatch.config import GraphConfig
from rabatch.index.auto import AutoIndex, Choice, Group
from rabatch.index.base import KeyIndex, QuerySample, check_keys, check_samples
from rabatch.index.flat import FlatIndex
from rabatch.index.graph import GraphIndex
from rabatch.index.scan import ScanIndex

CONFIG = GraphConfig(degree=6, key_neighbors=2, entry_points=3)


@dataclass(frozen=True)
class Kind:
    """An index as it is built here, and the dtype of the scores it returns."""

    type: type[KeyIndex]
    options: dict[str, Any] = field(default_factory=dict)
    scores: str = "float32"

    def build(self, keys, samples, **options):
        return self.type.build(keys, samples, **self.options, **options)


class Mixed(Kind):
    """An auto index with the heads divided among all kinds, the last head first."""

    def build(self, keys, samples, **options):
        check_keys(keys)
        check_samples(samples, *keys.shape)
        groups = []
        for head in reversed(range(len(keys))):
            kind = (GraphIndex, ScanIndex, FlatIndex)[head]
            groups.append(Group([head], kind.build(keys[head : head + 1], samples[head : head + 1], **options)))
        return AutoIndex(groups, [Choice(group.index.kind, 6, 1.0, 1.0, 0.0) for group in reversed(groups)])


KINDS = {
    "flat": Kind(FlatIndex),
    "graph-float32": Kind(GraphIndex, {"config": CONFIG}),
    "graph-bfloat16": Kind(GraphIndex, {"config": CONFIG, "dtype": "bfloat16"}, "bfloat16"),
    "graph-int8": Kind(GraphIndex, {"config": CONFIG, "dtype": "int8"}, "int8"),
    "graph-int8-exact": Kind(GraphIndex, {"config": CONFIG, "dtype": "int8", "exact": "float32"}),
    "scan-float32": Kind(ScanIndex),
    "scan-bfloat16": Kind(ScanIndex, {"dtype": "bfloat16"}, "bfloat16"),
    "auto": Kind(AutoIndex, {"config": CONFIG, "k": 4, "probes": 5, "mass": 0.6, "worst": 0.2}),
    "auto-mixed": Mixed(AutoIndex),
    "auto-strict": Kind(AutoIndex, {"config": CONFIG, "k": 3, "probes": 9}),
}
all_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
quick = settings(max_examples=10, deadline=None)


@dataclass(frozen=True)
class Layer:
    keys: np.ndarray
    samples: list[QuerySample]
    queries: np.ndarray


def make_layer(n_heads=2, n_keys=60, dim=8, n_queries=3, seed=0, integers=False):
    rng = np.random.default_rng(seed)

    def draw(n):
        vectors = rng.standard_normal((n_heads, n, dim)) + 0.5
        return np.round(2 * vectors).astype(np.float32) if integers else vectors.astype(np.float32)

    keys, sampled, queries = draw(n_keys), draw(30), draw(n_queries)
    return Layer(keys, samples_of(sampled, keys, 6), queries)


layers = st.builds(
    make_layer,
    n_heads=st.integers(1, 3),
    n_keys=st.one_of(st.integers(0, 80), st.sampled_from([0, 1, 2, 19, 20, 80])),
    dim=st.sampled_from([2, 4, 6, 10, 16]),
    n_queries=st.integers(1, 4),
    seed=st.integers(0, 999),
    integers=st.booleans(),
)
ks = st.sampled_from([1, 2, 5, 11, 90])
efforts = st.sampled_from([0, 1, 4, 13, 50])


def tolerance(kind, keys, queries):
    """How far a score may be from that of the float32 key, [n_heads, n_queries, 1]."""
    if keys.shape[1] == 0:
        return np.zeros((*queries.shape[:2], 1))
    size = (
        np.linalg.norm(queries.astype(np.float64), axis=2)[:, :, None]
        * np.linalg.norm(keys, axis=2).max(axis=1)[:, None, None]
    )
    bound = 4 * np.finfo(np.float32).eps * size
    if kind.scores == "bfloat16":
        bound += 2.0**-8 * size
    if kind.scores == "int8":
        half_step = np.ptp(keys, axis=1) / 254 / 2 * 1.001
        bound += np.einsum("hqd,hd->hq", np.abs(queries), half_step)[:, :, None] + 4 * np.finfo(np.float32).eps * size
    return bound


def check_result(result, keys, queries, k, bound):
    """Shapes and dtypes; ids are keys and unique; scores fall and are those of their ids; padding comes last."""
    n_heads, n_keys, _ = keys.shape
    shape = (n_heads, queries.shape[1])
    assert result.ids.shape == result.scores.shape == (*shape, k)
    assert result.visited.shape == result.distances.shape == shape
    assert [a.dtype for a in (result.ids, result.scores, result.visited, result.distances)] == ["i4", "f4", "i8", "i8"]
    assert ((result.ids >= -1) & (result.ids < n_keys)).all()
    assert (np.isneginf(result.scores) == (result.ids < 0)).all()
    assert (result.scores[:, :, 1:] <= result.scores[:, :, :-1]).all()
    assert ((result.visited >= 0) & (result.visited <= n_keys)).all()
    assert ((result.ids >= 0).sum(axis=2) <= result.visited).all()
    for ids in result.ids.reshape(-1, k):
        found = ids[ids >= 0]
        assert len(np.unique(found)) == len(found)
    if n_keys:
        exact = np.einsum("hqd,hkd->hqk", queries.astype(np.float64), keys)
        of_ids = np.take_along_axis(exact, np.maximum(result.ids, 0).astype(int), axis=2)
        wrong = np.where(result.ids >= 0, np.abs(np.where(result.ids >= 0, result.scores, 0) - of_ids), 0)
        assert (wrong <= bound).all()


def assert_equal(a, b):
    """The same, but for the last bits of a score: those of a matrix product depend on where in memory the keys lie."""
    np.testing.assert_array_equal(a.visited, b.visited)
    np.testing.assert_array_equal(a.distances, b.distances)
    largest = np.abs(a.scores[np.isfinite(a.scores)]).max(initial=0.0)
    assert_close(a, b, 4e-6 * largest + 1e-30)


def assert_close(a, b, bound):
    """The same scores; ids may be exchanged where scores are as good as equal."""
    assert a.scores.shape == b.scores.shape
    assert (np.isneginf(a.scores) == np.isneginf(b.scores)).all()
    real = np.isfinite(a.scores)
    assert (np.abs(np.where(real, a.scores, 0) - np.where(real, b.scores, 0)) <= bound).all()


def exact_scores(keys, queries, k):
    """The k highest scores [n_heads, n_queries, k] in float64, padded with -inf."""
    padded = np.full((*queries.shape[:2], k), -np.inf)
    best = -np.sort(-np.einsum("hqd,hkd->hqk", queries.astype(np.float64), keys), axis=2)[:, :, :k]
    padded[:, :, : best.shape[2]] = best
    return padded


def stored(table):
    """The table as it comes out of a file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_file(sink.getvalue()).read_all()
