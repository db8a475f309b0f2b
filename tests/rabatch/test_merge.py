"""Partial results merge exactly to attention over the union of their key sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.attention import merge as merge_module
from rabatch.attention.merge import Partial, dense_partial, logits, merge


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, softcap: float | None) -> torch.Tensor:
    """Softmax attention as the textbook writes it: q [n, r, d], k and v [n, m, d]."""
    scores = torch.einsum("nrd,nmd->nrm", q, k) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores, dim=-1) @ v


def random_case(seed: int, rows: int, keys: int, dim: int, heads: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(heads, n, dim, generator=generator) * 2 for n in (rows, keys, keys))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 9),
    keys=st.integers(1, 40),
    dim=st.sampled_from([4, 16, 33]),
    softcap=st.sampled_from([None, 5.0]),
    data=st.data(),
)
def test_any_split_merges_to_the_whole(
    seed: int, rows: int, keys: int, dim: int, softcap: float | None, data: st.DataObject
) -> None:
    q, k, v = random_case(seed, rows, keys, dim)
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=keys, max_size=keys)))
    parts = [
        dense_partial(q, k[:, owner == part], v[:, owner == part], scaling=0.3, softcap=softcap) for part in range(3)
    ]
    torch.testing.assert_close(merge(parts).out, naive(q, k, v, 0.3, softcap), atol=1e-5, rtol=1e-5)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_case(1, 11, 50, 8)
    mask = torch.rand(2, 11, 50, generator=torch.Generator().manual_seed(2)) > 0.3
    whole = dense_partial(q, k, v, scaling=1.0, mask=mask)
    monkeypatch.setattr(merge_module, "MAX_BLOCK_SCORES", 120)
    for mine, other in zip(whole, dense_partial(q, k, v, scaling=1.0, mask=mask), strict=True):
        torch.testing.assert_close(mine, other)


def test_rows_that_see_nothing_are_zero_not_nan() -> None:
    q, k, v = random_case(3, 2, 5, 4)
    nothing = dense_partial(q, k, v, scaling=1.0, mask=torch.zeros(2, 2, 5, dtype=torch.bool))
    empty = dense_partial(q, k[:, :0], v[:, :0], scaling=1.0)
    for partial in (nothing, empty, merge([nothing, empty])):
        assert torch.equal(partial.out, torch.zeros(2, 2, 4))
        assert torch.isneginf(partial.lse).all()
    whole = dense_partial(q, k, v, scaling=1.0)
    torch.testing.assert_close(merge([nothing, whole]).out, whole.out)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = random_case(4, 3, 6, 4)
    parts = [dense_partial(q * 100, k[:, a:b], v[:, a:b], scaling=10.0) for a, b in ((0, 2), (2, 6))]
    torch.testing.assert_close(merge(parts).out, naive(q * 100, k, v, 10.0, None), atol=1e-4, rtol=1e-4)


def test_softcap_keeps_the_order() -> None:
    raw = torch.linspace(-50, 50, 101)
    capped = logits(raw, 0.5, 30.0)
    assert (capped[1:] > capped[:-1]).all()
    assert capped.abs().max() < 30


def test_merge_of_one_is_itself() -> None:
    part = Partial(torch.randn(1, 2, 3), torch.randn(1, 2))
    torch.testing.assert_close(merge([part]).out, part.out)
