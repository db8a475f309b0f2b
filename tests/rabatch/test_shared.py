"""Rows that share their keys: the same as dense attention of each."""

from __future__ import annotations

import pytest
import torch

from rabatch.attention.merge import dense_partial
from rabatch.attention.shared import attend_all


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n_rows", "n_keys"), [(1, 1), (3, 700), (50, 1030)])
def test_attend_all(n_rows: int, n_keys: int, dtype: torch.dtype, softcap: float | None) -> None:
    make = torch.Generator().manual_seed(0)
    rows = torch.randn(2, n_rows, 24, generator=make)
    keys, values = (torch.randn(2, n_keys, 24, generator=make).to(dtype) for _ in range(2))
    partial, ids, scores = attend_all(rows, keys, values, top_k=9, scaling=0.3, softcap=softcap)
    expected = dense_partial(rows, keys, values, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(partial.out, expected.out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(partial.lse, expected.lse, atol=1e-5, rtol=1e-5)
    products = rows @ keys.float().transpose(1, 2)
    torch.testing.assert_close(scores, products.topk(min(9, n_keys)).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(products.gather(2, ids), scores, atol=1e-4, rtol=1e-4)
