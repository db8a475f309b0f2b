"""Building: what holds for every graph, whatever the keys and lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_samples import recall

from rabatch.config import GraphConfig
from rabatch.errors import ConfigError
from rabatch.index import nearest
from rabatch.index.links import build_graph, unreachable
from rabatch.index.nearest import nearest_keys
from rabatch.index.synthetic import attention_vectors, stress

SMALL = GraphConfig(degree=6, key_neighbors=2, entry_points=3)


def random_case(n_keys, n_queries, length, dim=8, seed=0):
    """Keys, and the true top lists of random queries, padded when there are few keys."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((n_keys, dim)).astype(np.float32)
    lists = np.full((n_queries, length), -1, np.int32)
    found = min(length, n_keys)
    if found:
        scores = rng.standard_normal((n_queries, dim)) @ keys.T
        lists[:, :found] = np.argsort(-scores, axis=1)[:, :found]
    return keys, lists


def assert_sound(graph, n_keys, config):
    assert graph.neighbors.shape == (n_keys, config.degree)
    assert graph.neighbors.dtype == graph.entries.dtype == np.int32
    assert len(graph.entries) <= config.entry_points
    assert len(set(graph.entries.tolist())) == len(graph.entries)
    assert len(graph.entries) == 0 if n_keys == 0 else len(graph.entries) > 0
    for key, row in enumerate(graph.neighbors):
        links = row[row >= 0]
        assert (row[len(links) :] == -1).all()
        assert len(set(links.tolist())) == len(links)
        assert key not in links
        assert (links < n_keys).all()
        assert {key - 1, key + 1} & set(range(n_keys)) <= set(links.tolist())
    assert unreachable(graph.neighbors, graph.entries).size == 0


@settings(max_examples=80, deadline=None)
@given(
    n_keys=st.integers(0, 60),
    n_queries=st.integers(0, 30),
    length=st.integers(1, 12),
    key_neighbors=st.integers(0, 4),
    degree=st.integers(6, 12),
    seed=st.integers(0, 99),
)
def test_every_graph_is_sound(n_keys, n_queries, length, key_neighbors, degree, seed):
    config = GraphConfig(degree=degree, key_neighbors=key_neighbors, entry_points=4)
    keys, lists = random_case(n_keys, n_queries, length, seed=seed)
    assert_sound(build_graph(keys, lists, config=config), n_keys, config)


def test_identical_keys_and_short_lists():
    lists = np.array([[3, 5, -1], [4, -1, -1], [-1, -1, -1]], np.int32)
    assert_sound(build_graph(np.ones((40, 4), np.float32), lists, config=SMALL), 40, SMALL)


@pytest.mark.parametrize("n_keys", [700, 2500], ids=["exact", "cells"])
def test_threads_do_not_change_the_graph(monkeypatch, n_keys):
    monkeypatch.setattr(nearest, "MAX_EXACT_KEYS", 1000)
    monkeypatch.setattr(nearest, "KEYS_PER_CELL", 256)
    keys, lists = random_case(n_keys, 400, 16, dim=32)
    graphs = [build_graph(keys, lists, config=GraphConfig(), threads=threads) for threads in (1, 2, 5)]
    for graph in graphs[1:]:
        np.testing.assert_array_equal(graph.neighbors, graphs[0].neighbors)
        np.testing.assert_array_equal(graph.entries, graphs[0].entries)


def test_queries_that_share_a_pivot_keep_each_others_links():
    """RoarGraph's code overwrites the pivot's list: only the last query's keys would stay linked to key 0."""
    keys = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    lists = np.array([[0, 10, 20], [0, 30, 40], [0, 50, 60]], np.int32)
    graph = build_graph(keys, lists, config=GraphConfig(degree=16, key_neighbors=0))
    assert {10, 20, 30, 40, 50, 60} <= set(graph.neighbors[0].tolist())
    for key in (10, 20, 30, 40, 50, 60):
        assert 0 in graph.neighbors[key]


def test_links_of_more_lists_come_first():
    keys = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    rare = [[0, key] for key in range(10, 40)]
    frequent = [[0, 50]] * 2
    graph = build_graph(keys, np.array([*rare, *frequent], np.int32), config=GraphConfig(degree=6, key_neighbors=0))
    assert 50 in graph.neighbors[0]


def test_entries_cover_different_lists():
    lists = np.array([[1, 2]] * 10 + [[2, 1]] * 9 + [[30, 31]] * 3, np.int32)
    keys = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    config = GraphConfig(entry_points=2)
    assert build_graph(keys, lists, config=config).entries.tolist() == [1, 30]


@pytest.mark.parametrize("n_keys", [1, 2, 3, 100])
def test_nearest_keys_are_exact(n_keys):
    keys = np.random.default_rng(1).standard_normal((n_keys, 8)).astype(np.float32)
    found = nearest_keys(keys, k=5)
    distances = ((keys[:, None] - keys) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(found, np.argsort(distances, axis=1)[:, : min(5, n_keys - 1)])


@pytest.mark.parametrize(("cells", "share"), [(1, 0.5), (2, 0.6), (8, 0.85)])
def test_nearest_keys_in_cells_are_near(monkeypatch, cells, share):
    _, keys = stress(*attention_vectors(3001, 1, head_dim=64))
    exact = nearest_keys(keys, k=10)
    monkeypatch.setattr(nearest, "MAX_EXACT_KEYS", 1000)
    monkeypatch.setattr(nearest, "KEYS_PER_CELL", 128)
    monkeypatch.setattr(nearest, "CELLS_SEARCHED", cells)
    near = nearest_keys(keys, k=10)
    assert (near != np.arange(3001)[:, None]).all()
    assert recall(near, exact) > share
    assert recall(near, exact) < share + 0.2  # the cells are used at all


def test_few_keys_in_reach_are_padded(monkeypatch):
    monkeypatch.setattr(nearest, "MAX_EXACT_KEYS", 10)
    monkeypatch.setattr(nearest, "KEYS_PER_CELL", 4)
    monkeypatch.setattr(nearest, "CELLS_SEARCHED", 1)
    keys, lists = random_case(301, 20, 5)
    found = nearest_keys(keys, k=14)
    assert found.shape == (301, 14)
    assert (found == -1).any()
    assert ((found >= -1) & (found < 301)).all()
    assert (np.diff((found < 0).astype(int), axis=1) >= 0).all()
    assert_sound(build_graph(keys, lists, config=SMALL), 301, SMALL)


def test_unreachable_finds_the_lost():
    neighbors = np.array([[1, -1], [0, -1], [3, -1], [2, -1]], np.int32)
    assert unreachable(neighbors, np.array([0, -1], np.int32)).tolist() == [2, 3]
    assert unreachable(neighbors, np.array([0, 3], np.int32)).tolist() == []


@pytest.mark.parametrize(
    ("keys", "lists", "field"),
    [
        (np.ones((4, 2)), np.zeros((1, 2), np.int32), "keys"),
        (np.ones((4, 2), np.float32), np.zeros((1, 2)), "query_topk"),
        (np.ones((4, 2), np.float32), np.full((1, 2), 4, np.int32), "query_topk"),
    ],
)
def test_errors_name_the_field(keys, lists, field):
    with pytest.raises(ConfigError) as error:
        build_graph(keys, lists, config=SMALL)
    assert error.value.field == field
