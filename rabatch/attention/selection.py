"""Which keys beyond the static set a query attends: what methods differ in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabatch.attention.layer import ContextLayer
from rabatch.attention.seam import AttentionCall
from rabatch.attention.sets import Found


class Asked(NamedTuple):
    """Queries that keys are to be chosen for: those of one group of a layer's KV heads in a pass.

    Attributes:
        group: Its number among `ContextLayer.groups`.
        rows: [n_kv, n_rows, head_dim], float32, on the CPU, without padding.
        real: bool [all rows of the call], on the CPU: those that are no padding, and are in `rows`.
        first_slot: Of the first question; the others follow.
    """

    call: AttentionCall
    layer: ContextLayer
    group: int
    rows: NDArray[np.float32]
    real: Tensor
    first_slot: int

    @property
    def questions(self) -> NDArray[np.int64]:
        """Number of the question that each row is of, int64 [n_rows]: they are in order."""
        of_all = np.arange(len(self.real)) // (len(self.real) // len(self.call.query))
        return of_all[self.real.numpy()]


class Observed(NamedTuple):
    """Exact attention of questions' own tokens, one group of a layer's KV heads in a pass.

    Attributes:
        group: As of `Asked`.
        queries: [n_kv, batch, group, q_tokens, head_dim], on the model's device.
        lse: [n_kv, batch, group, q_tokens]: log of the sum of exp(logit) over context and tail.
        counts: Tokens of each question; what follows is padding.
        first_slot: Of the first question; the others follow.
    """

    call: AttentionCall
    layer: ContextLayer
    group: int
    queries: Tensor
    lse: Tensor
    counts: list[int]
    first_slot: int


class Selection:
    """Keys are found by the layer's key index, query by query. Methods that go by more than a query derive from it.

    Args:
        method: Which of `ContextLayer.indexes`.
    """

    def __init__(self, method: str) -> None:
        self.method = method

    def find(self, asked: Asked) -> Found:
        """The keys that these rows attend beside static set and tail, on the CPU, as rows of the layer."""
        return asked.layer.find(asked.rows, self.method)

    def observe(self, observed: Observed) -> None:
        """Look at questions while they attend exactly."""

    def clear(self, slot: int) -> None:
        """Forget what a slot held."""

    def move(self, source: int, target: int) -> None:
        """Give what one slot holds to another."""

    def passing(self) -> AbstractContextManager[None]:
        """Around each pass of the model."""
        return nullcontext()


def rows_of(states: Tensor, n_kv: int, heads: Tensor | None) -> Tensor:
    """Queries of a call, [batch, n_query_heads, q_tokens, head_dim], as the rows of some of its `n_kv` KV heads:
    [heads, batch * group * q_tokens, head_dim]."""
    batch, n_heads, q_tokens, dim = states.shape
    grouped = states.reshape(batch, n_kv, n_heads // n_kv, q_tokens, dim).transpose(0, 1)
    grouped = grouped if heads is None else grouped[heads]
    return grouped.reshape(len(grouped), -1, dim)


def spread_out(found: Found, real: Tensor) -> Found:
    """What was found for the rows that are `real`, and nothing for the others."""
    if bool(real.all()):
        return found
    shape = (len(found.ids), len(real), found.ids.shape[2])
    whole = Found(torch.full(shape, -torch.inf), torch.full(shape, -1, dtype=torch.int64))
    whole.scores[:, real], whole.ids[:, real] = found
    return whole
