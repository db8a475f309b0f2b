"""Rows that share their keys: the same as dense attention of each."""

from __future__ import annotations

import pytest
import torch

from rabatch.attention.merge import dense_partial
from rabatch.attention.shared import SharedKeys, attend_all


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [24, 32])
@pytest.mark.parametrize(("n_rows", "n_keys"), [(1, 1), (3, 700), (50, 1030), (7, 16640)])
def test_attend_all(n_rows: int, n_keys: int, dim: int, dtype: torch.dtype, softcap: float | None) -> None:
    make = torch.Generator().manual_seed(0)
    rows = torch.randn(2, n_rows, dim, generator=make)
    keys, values = (torch.randn(2, n_keys, dim, generator=make).to(dtype) for _ in range(2))
    partial, ids, scores = attend_all(rows, SharedKeys.of(keys, values), top_k=9, scaling=0.3, softcap=softcap)
    expected = dense_partial(rows, keys, values, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(partial.out, expected.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(partial.lse, expected.lse, atol=1e-5, rtol=1e-5)
    products = rows @ keys.float().transpose(1, 2)
    torch.testing.assert_close(scores, products.topk(min(9, n_keys)).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(products.gather(2, ids), scores, atol=1e-4, rtol=1e-4)


def test_neither_rows_nor_threads_change_a_bit() -> None:
    make = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 20, 32, generator=make)
    shared = SharedKeys.of(*(torch.randn(2, 9000, 32, generator=make).bfloat16() for _ in range(2)))
    options = {"top_k": 5, "scaling": 0.2, "softcap": None}
    (together, ids, _), (apart, own, _) = (
        attend_all(*case, threads=threads, **options)  # type: ignore[arg-type]
        for case, threads in (((rows, shared), 3), ((rows[:, 13:15], shared), 1))
    )
    assert torch.equal(together.out[:, 13:15], apart.out)
    assert torch.equal(together.lse[:, 13:15], apart.lse)
    assert torch.equal(ids[:, 13:15], own)


def test_ties_go_to_the_lower_id_across_stretches() -> None:
    keys = torch.ones(1, 20000, 16)
    _, ids, _ = attend_all(torch.ones(1, 1, 16), SharedKeys.of(keys, keys), top_k=4, scaling=0.1, softcap=None)
    assert ids.tolist() == [[[0, 1, 2, 3]]]
