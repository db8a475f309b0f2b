"""Exact top-k: every implementation agrees with the reference, compared by scores because ties may fall either way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.errors import ConfigError
from rabatch.index.topk import KNN, knn, topk

FAST = [name for name in KNN if name != "naive"]


def vectors(n_heads, n_kv, n_queries, n_keys, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n_heads, n_queries, dim, generator=generator).to(dtype)
    keys = torch.randn(n_kv, n_keys, dim, generator=generator).to(dtype)
    return queries, keys


def assert_same(found, expected, queries, keys, scaling=1.0):
    """Equal scores; ids distinct, visible in number, and each worth its score."""
    ids, scores = found
    assert ids.dtype == torch.int32
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected[1], rtol=1e-4, atol=1e-5)
    assert torch.equal((ids >= 0).sum(-1), (expected[0] >= 0).sum(-1))
    group = len(queries) // len(keys)
    all_scores = scaling * queries.float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2)
    if all_scores.shape[-1]:
        of_ids = all_scores.gather(2, ids.clamp(min=0).long())
        real = ids >= 0
        torch.testing.assert_close(of_ids[real], scores[real], rtol=1e-4, atol=1e-5)
    for row in ids.flatten(0, 1):
        row = row[row >= 0]
        assert len(row.unique()) == len(row)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("n_heads", "n_kv", "n_queries", "n_keys", "k"),
    [
        pytest.param(4, 2, 17, 333, 7, id="gqa-odd"),
        pytest.param(3, 3, 5, 4, 9, id="fewer-keys-than-k"),
        pytest.param(8, 1, 33, 2049, 32, id="mqa-folded"),
        pytest.param(2, 1, 3, 9001, 100, id="two-key-blocks"),
        pytest.param(1, 1, 1, 1, 1, id="one"),
        pytest.param(2, 1, 0, 10, 3, id="no-queries"),
        pytest.param(2, 1, 4, 0, 3, id="no-keys"),
    ],
)
def test_agrees_with_naive(impl, dtype, n_heads, n_kv, n_queries, n_keys, k):
    queries, keys = vectors(n_heads, n_kv, n_queries, n_keys, dtype=dtype)
    positions = torch.linspace(0, max(n_keys - 1, 0), n_queries).long()
    args = {"k": k, "scaling": 0.25}
    found, expected = (topk(queries, keys, positions, impl=i, **args) for i in (impl, "naive"))
    assert found[0].shape == (n_heads, n_queries, k)
    assert_same(found, expected, queries, keys, scaling=0.25)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_do_not_matter(data):
    n_kv, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    n_queries, n_keys = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 3000))
    k = data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, n_keys))
    end = data.draw(st.integers(first, n_keys))
    queries, keys = vectors(n_kv * group, n_kv, n_queries, n_keys, dim=4, seed=data.draw(st.integers(0, 9)))
    if data.draw(st.booleans()):
        queries, keys = queries.round(), keys.round()  # many ties
    positions = torch.tensor(data.draw(st.lists(st.integers(0, n_keys), min_size=n_queries, max_size=n_queries)))
    found = knn.topk(
        queries, keys, positions, k=k, scaling=1.0, first_key=first, end_key=end,
        rows_per_block=data.draw(st.integers(1, 64)), keys_per_block=data.draw(st.integers(1, 4000)),
    )  # fmt: skip
    expected = topk(queries, keys, positions, k=k, key_range=(first, end), impl="naive")
    assert_same(found, expected, queries, keys)


@pytest.mark.parametrize("impl", KNN)
def test_causal_and_range(impl):
    queries, keys = vectors(2, 1, 4, 10)
    ids, scores = topk(queries, keys, torch.tensor([0, 3, 5, 9]), k=10, key_range=(2, 8), impl=impl)
    for query, visible in enumerate([set(), {2, 3}, {2, 3, 4, 5}, {2, 3, 4, 5, 6, 7}]):
        for head in range(2):
            assert set(ids[head, query].tolist()) - {-1} == visible
            assert (scores[head, query].isinf() == (ids[head, query] == -1)).all()


def test_naive_gives_ties_to_the_lower_id():
    ids, _ = topk(torch.ones(1, 1, 2), torch.ones(1, 6, 2), torch.tensor([9]), k=3, impl="naive")
    assert ids.tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"impl": "magic"}, "impl"),
        ({"k": 0}, "k"),
        ({"key_range": (3, 99)}, "key_range"),
        ({"key_range": (5, 3)}, "key_range"),
        ({"scaling": -1.0}, "scaling"),
    ],
)
def test_errors_name_the_field(change, field):
    queries, keys = vectors(2, 1, 4, 10)
    with pytest.raises(ConfigError) as error:
        topk(queries, keys, torch.arange(4), **{"k": 3, **change})
    assert error.value.field == field


def test_heads_must_divide():
    queries, keys = vectors(3, 2, 4, 10)
    with pytest.raises(ConfigError, match="multiple"):
        topk(queries, keys, torch.arange(4), k=3)
