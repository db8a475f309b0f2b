"""Spans of a document from the attention its tokens got."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rabatch.attention.evidence import MARGIN_TOKENS, spans

N = 200
STARTS = np.arange(N) * 4
ENDS = STARTS + 4


def mass_at(**at: float) -> np.ndarray:
    mass = np.zeros(N)
    for token, value in at.items():
        mass[int(token[1:])] = value
    return mass


def test_the_heaviest_place_comes_first_and_holds_its_tokens() -> None:
    found = spans(mass_at(t50=0.2, t51=0.1, t120=0.6, t122=0.1), STARTS, ENDS)
    assert [round(span["score"], 6) for span in found] == [0.7, 0.3]
    assert found[0]["start"] <= 120 * 4 < 122 * 4 < found[0]["end"]
    assert found[1]["start"] <= 50 * 4 < 51 * 4 < found[1]["end"]
    assert found[0]["end"] - found[0]["start"] <= (2 * MARGIN_TOKENS + 1) * 4


def test_tokens_of_the_template_are_no_evidence() -> None:
    starts, ends = STARTS.copy(), ENDS.copy()
    starts[:10] = ends[:10] = 0
    found = spans(mass_at(t3=100.0, t60=1.0), starts, ends)
    assert len(found) == 1
    assert found[0]["start"] <= 240 < found[0]["end"]
    assert spans(mass_at(t3=100.0), starts, ends) == []


def test_without_attention_there_is_no_evidence() -> None:
    assert spans(np.zeros(N), STARTS, ENDS) == []
    assert spans(np.full(N, np.nan), STARTS, ENDS) == []


@given(st.lists(st.floats(0, 1), min_size=N, max_size=N), st.integers(1, 5))
def test_spans_are_disjoint_inside_and_sum_to_at_most_one(values: list[float], most: int) -> None:
    found = spans(np.array(values), STARTS, ENDS, most=most)
    assert len(found) <= most
    assert sum(span["score"] for span in found) <= 1 + 1e-9
    for i, span in enumerate(found):
        assert 0 <= span["start"] < span["end"] <= N * 4
        assert all(span["end"] <= other["start"] or span["start"] >= other["end"] for other in found[:i])
