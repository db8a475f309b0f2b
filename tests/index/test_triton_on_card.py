"""The Triton kernels compiled and run on a CUDA card, at sizes that the interpreter would take hours for."""

from __future__ import annotations

import pytest
import torch
from attention_cases import check, sampled, states

from rabatch.index.topk import Span

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
def test_a_chunk(dim: int, dtype: torch.dtype) -> None:
    vectors = states(8, 2, 1000, 5003, dim, dim, dtype)
    check("triton", *vectors, sample=sampled(range(0, 1000, 4), 128, 4500, k=32), slack=1e-2)


@pytest.mark.parametrize(
    "options", [{"softcap": 20.0}, {"sliding_window": 700}, {"softcap": 5.0, "sliding_window": 64}]
)
def test_kinds_of_attention(options: dict[str, float]) -> None:
    vectors = states(8, 2, 1500, 1500, 128, 128, torch.bfloat16)
    check("triton", *vectors, sample=sampled(range(0, 1500, 3), 4, 1200, k=16), slack=1e-2, **options)


def test_packed_documents() -> None:
    spans = [Span(0, 300, 0, 0), Span(300, 301, 300, 300), Span(340, 1000, 340, 340)]
    vectors = states(8, 2, 1000, 1000, 128, 128, torch.bfloat16)
    check("triton", *vectors, sample=sampled(range(0, 1000, 4), 0, 1000, k=32), slack=1e-2, spans=spans)
