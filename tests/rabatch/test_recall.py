"""Sampled recall is the share of the exact top-k that a search found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rabatch.attention.coded import CodedRows
from rabatch.attention.layer import ContextLayer
from rabatch.attention.recall import RecallSampler
from rabatch.storage.codecs import decode, encode

HEADS, ROWS, DIM, START, STOP, BUDGET = 3, 5, 8, 10, 110, 20


def a_search(found_of_best, codec="none"):
    """A layer, queries, and ids that hold so many of the best keys of each query and else others."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn((HEADS, 130, DIM), generator=draw)
    queries = torch.randn((HEADS, ROWS, DIM), generator=draw)
    indexed, codes, held = keys[:, START:STOP], None, keys
    if codec != "none":
        coded = encode(indexed.numpy(), codec, "key")
        codes, indexed = CodedRows.of(coded, START, "cpu"), torch.from_numpy(decode(coded))
        held = torch.cat([keys[:, :START], keys[:, STOP:]], dim=1)  # of the static set alone
    scores = torch.einsum("hrd,hnd->hrn", queries, indexed)
    ranked = scores.argsort(dim=-1, descending=True) + START
    others = ranked[..., BUDGET : 2 * BUDGET - found_of_best]
    ids = torch.cat([ranked[..., :found_of_best], others], -1)
    budget = np.array([BUDGET, 0, BUDGET])
    layer = ContextLayer(held, held, 0, START, STOP, budget, key_codes=codes)
    return layer, queries.numpy(), ids


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("found", [0, 7, 20])
def test_a_sample_is_the_share_found(found, codec):
    layer, queries, ids = a_search(found, codec)
    sampler = RecallSampler(1.0)
    for _ in range(30):
        sampler.look(layer, queries, ids)
    assert sampler.shares == pytest.approx([found / BUDGET] * 30)
    assert len(sampler.take()) == 30
    assert sampler.take() == []


def test_so_many_are_sampled_as_asked_for():
    layer, queries, ids = a_search(BUDGET)
    sampler = RecallSampler(0.25, seed=3)
    for _ in range(2000):
        sampler.look(layer, queries, ids)
    assert 400 < len(sampler.shares) < 600


def test_heads_without_a_budget_and_passes_without_queries_are_passed_over():
    layer, queries, ids = a_search(BUDGET)
    sampler = RecallSampler(1.0)
    sampler.look(layer, queries[:, :0], ids[:, :0])
    layer.budget[:] = 0
    sampler.look(layer, queries, ids)
    assert sampler.shares == []
