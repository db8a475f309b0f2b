"""Sparse attention of questions over one context: static set, estimated zones, found keys and tail, in torch.

It runs on any device and is the reference of the compiled pass that the CPU takes (`rabatch.attention.step`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.coded import CodedRows
from rabatch.attention.merge import logits
from rabatch.index.compiled import read_only
from rabatch.index.topk.lanes import LANES

_BLOCK_BYTES = 1 << 27  # of the values gathered at once


class Found(NamedTuple):
    """The keys that an index found for each row, best first.

    Attributes:
        scores: [n_kv, n_rows, k], float32, raw products q . k; -inf where there is no key.
        ids: Same shape, int64: rows of the layer's values; from their number on, places in the question's tail; -1
            where there is no key, and then none follows.
    """

    scores: Tensor
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Zones:
    """What stands for the keys of an index that are not found (RetroInfer's estimation zone; `rabatch.index.zones`).

    A zone weighs as many keys as it has, each at the mean of the zone's keys, with the mean of its values. A key that
    is found is taken out of its zone: its weight becomes exp(own logit) - exp(logit of its zone's mean), so that keys
    are counted once and with all of them found the zones cancel.

    Attributes:
        of_key: int32 [n_kv, n_index_keys]: the zone of each key of the index.
        counts: [n_kv, n_zones], float32: keys of each zone, at least 1.
        first_row: The row of the layer that is key 0 of the index.
    """

    of_key: Tensor
    counts: Tensor
    first_row: int


@dataclass(frozen=True, eq=False)
class StaticSet:
    """What every query of a layer attends: the static set's keys, and after them the means of the zones.

    Attributes:
        keys, values: [n_kv, n_static + n_zones, head_dim], float32.
        positions: int64 [n_static], in the context.
        zones: None: what is not found counts nothing.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    zones: Zones | None = None

    @cached_property
    def bias(self) -> Tensor:
        """What is added to the logits, [n_kv, n_static + n_zones]: of a zone, the logarithm of its keys' number."""
        bias = self.keys.new_zeros(self.keys.shape[:2])
        if self.zones is not None:
            bias[:, len(self.positions) :] = self.zones.counts.log()
        return bias

    @cached_property
    def panels(self) -> tuple[np.ndarray, ...]:
        """As the compiled pass reads it, on the CPU: keys [n_kv, padded * head_dim], 16 beside each other, number by
        number; values [n_kv, n * wide], rows padded to a multiple of 16; bias [n_kv, padded], -inf past the end;
        positions; zone of each key and keys of each zone (empty without zones)."""
        n_kv, n, dim = self.keys.shape
        padded = torch.nn.functional.pad(self.keys, (0, 0, 0, -n % LANES))
        keys = padded.view(n_kv, -1, LANES, dim).transpose(2, 3).reshape(n_kv, -1)
        values = torch.nn.functional.pad(self.values, (0, -self.values.shape[2] % LANES)).reshape(n_kv, -1)
        bias = torch.nn.functional.pad(self.bias, (0, -n % LANES), value=-torch.inf)
        of_key, counts = torch.empty((n_kv, 0), dtype=torch.int32), self.keys.new_empty((n_kv, 0))
        if self.zones is not None:
            of_key, counts = self.zones.of_key, self.zones.counts
        return tuple(read_only(t.numpy()) for t in (keys, values, bias, self.positions, of_key, counts))


def stored_bits(states: Tensor) -> np.ndarray:
    """A tensor on the CPU as kernels read it: float32, or the bits of 16-bit floats as uint16."""
    states = states.contiguous()
    return states.numpy() if states.dtype == torch.float32 else states.view(torch.int16).numpy().view(np.uint16)


class Attended(NamedTuple):
    """What a pass over the sets gives.

    Attributes:
        out: [batch, q_tokens, n_query_heads, head_dim], float32; 0 for padding.
        keys: [batch], float64: context keys attended, summed over tokens and averaged over query heads.
        share: [batch], float64: likewise, of the softmax mass, what attended keys hold; the mass of the others is that
            of the zones, and without zones 0.
    """

    out: Tensor
    keys: np.ndarray
    share: np.ndarray


def attend_sets(
    queries: Tensor,
    static: StaticSet,
    find: Callable[[], Found],
    values: Tensor | CodedRows,
    tail: tuple[Tensor, Tensor],
    begins: Tensor,
    places: Tensor,
    counts: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    goal: float,
    mass: np.ndarray,
) -> Attended:
    """Attention of every question's new tokens.

    Args:
        queries: [n_kv, batch, group, q_tokens, head_dim].
        find: Called once the device is at work on the static set: the keys found for the rows of `queries`.
        values: [n_kv, n_keys, head_dim], float32, bfloat16 or float16; or those of the index alone, encoded.
        tail: Keys and values [batch, n_kv, tail_tokens, head_dim].
        begins: int64 [batch]: where the part of a tail begins that every token attends; before it, found keys only.
        places: int64 [batch, q_tokens]: where each token stands in its tail; it sees what comes before, and itself.
        counts: int64 [batch]: tokens of each question; what follows is padding, whose output is 0.
        scaling: Factor on q . k.
        softcap: Bound of the logits, or None.
        goal: Share of the softmax mass that is enough: of the keys found, those past it are left to their zones. 1:
            all of them are attended.
        mass: [batch, context_tokens], float32: the attention of each question's last token is added, summed over heads.
    """
    n_kv, batch, group, q_tokens, dim = queries.shape
    n_static, device = len(static.positions), queries.device
    rows = queries.reshape(n_kv, -1, dim).float()
    fixed = logits(rows @ static.keys.transpose(1, 2), scaling, softcap) + static.bias[:, None]
    own = logits(torch.einsum("hbgtd,bhnd->hbgtn", queries.float(), tail[0].float()), scaling, softcap)
    others = torch.arange(tail[0].shape[2], device=device)
    seen = (others <= places[:, :, None]) & (others >= begins[:, None, None])
    own = own.masked_fill(~seen[:, None], -torch.inf).flatten(1, 3)
    scores, ids = find()
    n_keys, there = n_rows_of(values, static), ids >= 0
    in_context = there & (ids < n_keys)
    found = logits(scores, scaling, softcap).masked_fill(~there, -torch.inf)
    of_zone = _zone_logits(static, fixed, torch.where(in_context, ids, -1))
    highest = torch.cat([fixed, own, found], dim=-1).amax(-1, keepdim=True)
    fixed, own, found, of_zone = (torch.exp(part - highest) for part in (fixed, own, found, of_zone))
    certain = fixed[..., :n_static].sum(-1) + own.sum(-1)
    if goal < 1:
        wanted = goal * (fixed.sum(-1) + own.sum(-1) + (found - of_zone).sum(-1))
        before = certain[..., None] + found.cumsum(-1) - found
        left_out = before >= wanted[..., None]
        found, of_zone = found.masked_fill(left_out, 0.0), of_zone.masked_fill(left_out, 0.0)
        in_context = in_context & ~left_out
    total = fixed.sum(-1) + own.sum(-1) + (found - of_zone).sum(-1)
    fixed, own, weights = (part / total[..., None] for part in (fixed, own, found - of_zone))
    out = fixed @ static.values + _weighed(weights, ids, values, n_keys, tail[1])
    out += torch.einsum("hbgtn,bhnd->hbgtd", own.view(*queries.shape[:4], -1), tail[1].float()).reshape(out.shape)
    real = torch.arange(q_tokens, device=device) < counts[:, None]  # [batch, q_tokens]
    out = out.reshape(*queries.shape[:4], -1) * real[None, :, None, :, None]

    def per_question(x: Tensor) -> np.ndarray:
        apart = x.reshape(n_kv, batch, group, q_tokens).double() * real[None, :, None]
        return np.asarray(apart.mean((0, 2)).sum(1).cpu().numpy())

    last = torch.arange(batch, device=device), slice(None), counts - 1
    added = torch.zeros(mass.shape, device=device)
    apart = fixed[..., :n_static].reshape(*queries.shape[:4], -1)
    added[:, static.positions] += torch.stack([head[last] for head in apart]).sum((0, 2))
    shares = torch.where(in_context, found / total[..., None], 0.0)
    for head in range(n_kv):
        picked, weight = (x[head].view(batch, group, q_tokens, -1)[last].flatten(1) for x in (ids, shares))
        added.scatter_add_(1, torch.where(picked < n_keys, picked, -1).clamp_min(0), weight)
    mass += added.cpu().numpy()
    attended = (certain + found.sum(-1)) / total
    out = out.permute(1, 3, 0, 2, 4).flatten(2, 3)
    return Attended(out, per_question(n_static + in_context.sum(-1)), per_question(attended))


def _zone_logits(static: StaticSet, fixed: Tensor, ids: Tensor) -> Tensor:
    """Of each found key the logit of its zone's mean, [n_kv, n_rows, k]; -inf where there is no key or no zone."""
    if static.zones is None or not ids.shape[2]:
        return torch.full(ids.shape, -torch.inf, device=ids.device)
    zones = static.zones
    n_kv, n_rows, k = ids.shape
    in_index = ids - zones.first_row
    there = (ids >= 0) & (in_index >= 0) & (in_index < zones.of_key.shape[1])
    safe = torch.where(there, in_index, 0).reshape(n_kv, -1)
    zone = zones.of_key.long().gather(1, safe).view(n_kv, n_rows, k)
    means = fixed[..., len(static.positions) :] - zones.counts.log()[:, None]
    return means.gather(2, zone).masked_fill(~there, -torch.inf)


def n_rows_of(values: Tensor | CodedRows, static: StaticSet) -> int:
    """Rows of a layer; where only those of the index are encoded, the static set's are the rest."""
    return values.shape[1] + (len(static.positions) if isinstance(values, CodedRows) else 0)


def _weighed(weights: Tensor, ids: Tensor, values: Tensor | CodedRows, n_keys: int, tail_values: Tensor) -> Tensor:
    """Sum of the found keys' values by weight, [n_kv, n_rows, head_dim]."""
    n_kv, n_rows, k = ids.shape
    dim = values.shape[2]
    out = weights.new_zeros((n_kv, n_rows, dim))
    if not k:
        return out
    per_question = n_rows // len(tail_values)
    step = max(1, _BLOCK_BYTES // (4 * k * dim))
    for head in range(n_kv):
        for start in range(0, n_rows, step):
            rows = torch.arange(start, min(start + step, n_rows), device=ids.device)
            picked = ids[head, rows]
            context = (picked >= 0) & (picked < n_keys)
            if n_keys:
                if isinstance(values, CodedRows):
                    theirs = values.numbers(head, torch.where(context, picked, values.first_row))
                else:
                    theirs = values[head][torch.where(context, picked, 0)].float()
                out[head, rows] += torch.einsum("rk,rkd->rd", weights[head, rows] * context, theirs)
            if bool((picked >= n_keys).any()):
                own = tail_values[(rows // per_question)[:, None], head, (picked - n_keys).clamp_min(0)].float()
                out[head, rows] += torch.einsum("rk,rkd->rd", weights[head, rows] * (picked >= n_keys), own)
    return out
