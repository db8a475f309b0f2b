"""The attention of questions over one stored context: static set, retrieved keys and tail, merged exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.merge import Partial, dense_partial, gathered_partial, logits, merge
from rabatch.attention.seam import AttentionCall
from rabatch.attention.shared import attend_all
from rabatch.attention.step import StaticSet, attend_sets
from rabatch.attention.tails import Tails
from rabatch.config import Recipe
from rabatch.index.base import KeyIndex

_OBSERVED = 32
"""Keys per row that evidence is drawn from where attention is exact and names its best keys only."""


@dataclass(frozen=True)
class ContextLayer:
    """What one layer keeps of a context, on the model's device.

    Attributes:
        keys, values: [n_kv_heads, n_rows, head_dim] in the stored dtype.
        first_position: Position of row 0; greater than 0 only where a native window dropped older tokens.
        index_start, index_stop: Rows the key index holds; the others are the static set.
        index: The key index of all KV heads, or None (recipes dense and streaming, sliding layers).
    """

    keys: Tensor
    values: Tensor
    first_position: int
    index_start: int
    index_stop: int
    index: KeyIndex | None

    @cached_property
    def static_rows(self) -> Tensor:
        n_rows = self.keys.shape[1]
        device = self.keys.device
        return torch.cat(
            [torch.arange(0, self.index_start, device=device), torch.arange(self.index_stop, n_rows, device=device)]
        )

    @cached_property
    def static_set(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the static set in one piece and in float32: every step of every question reads them."""
        return self.keys[:, self.static_rows].float(), self.values[:, self.static_rows].float()

    @cached_property
    def static_panels(self) -> StaticSet:
        """The static set as the compiled pass reads it."""
        return StaticSet.of(*self.static_set, self.static_rows)


class QuestionAttention:
    """Attention of questions over one context, each in a slot; counts and observes what it attends.

    Args:
        layers: One per layer of the model.
        context_tokens: Length of the context.
        slots: Questions under way at the same time, at most.
        recipe: What generated and question tokens attend.

    Attributes:
        compiled: Whether compiled kernels attend: on the CPU. Elsewhere torch does, with the same output; where
            attention is exact, evidence is then drawn from all keys and not from the best of each row alone.
    """

    def __init__(self, layers: Sequence[ContextLayer], *, context_tokens: int, slots: int, recipe: Recipe) -> None:
        self.layers = layers
        self.context_tokens = context_tokens
        self.recipe = recipe
        self.compiled = layers[0].keys.device.type == "cpu"
        self.tails = Tails(len(layers), slots, layers[0].keys.device)
        self._attended = np.zeros(slots)
        self._queries = np.zeros(slots)
        self._mass = np.zeros((slots, context_tokens), dtype=np.float32)
        self._slots = slice(0, 0)
        self._question = False

    def begin(self, first: int, counts: list[int], *, question: bool) -> Tensor:
        """Begin a pass over the slots from `first` on, each with `counts` new tokens; see `Tails.begin`.

        Args:
            question: Whether the tokens are a question's.
        """
        self._slots = slice(first, first + len(counts))
        self._question = question
        return self.tails.begin(first, counts)

    def finish(self) -> None:
        """End the pass."""
        self.tails.finish()

    def clear(self, slot: int) -> None:
        """Make a slot ready for another question."""
        self.tails.clear(slot)
        self._attended[slot] = self._queries[slot] = self._mass[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Put the question of one slot into another."""
        self.tails.move(source, target)
        for kept in (self._attended, self._queries, self._mass):
            kept[target] = kept[source]

    def seen(self, slot: int) -> tuple[np.ndarray, float]:
        """Where the attention of a slot's answering tokens went, [context_tokens], and the share of keys attended:
        context keys attended / context keys, mean over queries, query heads and full-attention layers."""
        share = self._attended[slot] / max(self._queries[slot], 1) / max(self.context_tokens, 1)
        return self._mass[slot].copy(), float(share)

    def attend(self, call: AttentionCall) -> Tensor:
        batch, heads, q_tokens, dim = call.query.shape
        n_kv = call.key.shape[1]
        grouped = call.query.reshape(batch, n_kv, heads // n_kv, q_tokens, dim)
        rows = grouped.transpose(0, 1).reshape(n_kv, -1, dim)  # [n_kv, batch * group * q_tokens, dim]
        layer = self.layers[call.layer]
        states = self.tails.append(call.layer, call.key, call.value)
        if self.compiled and not call.sliding_window and not self._exact:
            return self._compiled(call, layer, grouped, rows, states).to(call.query.dtype)
        tail = self._tail(call, grouped, states)
        if call.sliding_window:
            parts = [self._sliding(call, layer, rows)]
        else:
            parts = self._context(call, layer, rows, q_tokens, tail)
        out = merge([tail, *parts]).out
        out = out.reshape(n_kv, batch, -1, q_tokens, dim).transpose(0, 1).reshape(batch, heads, q_tokens, dim)
        return out.transpose(1, 2).to(call.query.dtype)

    @property
    def _exact(self) -> bool:
        """Whether the tokens of this pass attend every key of the context."""
        method = self.recipe.method
        return method == "dense" or (
            method != "streaming" and self._question and self.recipe.question_attention == "exact"
        )

    def _compiled(
        self, call: AttentionCall, layer: ContextLayer, grouped: Tensor, rows: Tensor, tail: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Static set, found keys and tail in one pass. Padding is not searched for."""
        counts, (_, batch, group, q_tokens, _) = self.tails.counts, grouped.transpose(0, 1).shape
        real = (torch.arange(q_tokens) < counts[:, None])[:, None].expand(batch, group, q_tokens).reshape(-1)
        k = min(self.recipe.top_k, layer.index.n_keys) if layer.index is not None else 0
        found = (
            torch.full((*rows.shape[:2], k), -torch.inf),
            torch.full((*rows.shape[:2], k), -1, dtype=torch.int64),
        )
        searched = self._search(layer, rows[:, real])
        if searched is not None:
            found[0][:, real], found[1][:, real] = searched
        static = layer.static_panels
        self._count(rows.shape[1], call.query.shape[2], len(static.positions), found[1])
        return attend_sets(
            grouped.transpose(0, 1),
            static,
            found,
            layer.values,
            tail,
            self.tails.places,
            self.tails.counts,
            scaling=call.scaling,
            softcap=call.softcap,
            mass=self._mass[self._slots],
        )

    def _search(self, layer: ContextLayer, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Raw products and rows of the layer of the keys that its index finds, [n_kv, n_rows, k]; -1: none."""
        if layer.index is None or not layer.index.n_keys:
            return None
        found = layer.index.search(
            np.ascontiguousarray(rows.float().cpu().numpy()), k=min(self.recipe.top_k, layer.index.n_keys)
        )
        ids = torch.from_numpy(found.ids).to(rows.device, torch.int64)
        return torch.from_numpy(found.scores).to(rows.device), torch.where(ids >= 0, ids + layer.index_start, ids)

    def _tail(self, call: AttentionCall, grouped: Tensor, states: tuple[Tensor, Tensor]) -> Partial:
        """Question and generated tokens among themselves: [n_kv, batch * group * q_tokens, ...]."""
        batch, n_kv, group, q_tokens, dim = grouped.shape
        keys, values = states
        places = self.tails.places[:, :, None]  # [batch, q_tokens, 1]
        others = torch.arange(keys.shape[2], device=keys.device)
        mask = others <= places
        if call.sliding_window:
            mask &= others > places - call.sliding_window
        partial = dense_partial(
            grouped.reshape(batch, n_kv, group * q_tokens, dim),
            keys,
            values,
            scaling=call.scaling,
            softcap=call.softcap,
            mask=mask.repeat(1, group, 1)[:, None],
        )
        return Partial(
            partial.out.transpose(0, 1).reshape(n_kv, -1, partial.out.shape[-1]),
            partial.lse.transpose(0, 1).reshape(n_kv, -1),
        )

    def _sliding(self, call: AttentionCall, layer: ContextLayer, rows: Tensor) -> Partial:
        """A natively sliding layer: the context keys within the window of each query, by true positions."""
        group = call.query.shape[1] // call.key.shape[1]
        positions = (self.context_tokens + self.tails.places)[:, None].expand(-1, group, -1).reshape(-1)
        n_rows = layer.keys.shape[1]
        key_positions = layer.first_position + torch.arange(n_rows, device=layer.keys.device)
        mask = key_positions[None, None, :] > positions[None, :, None] - call.sliding_window
        return dense_partial(rows, layer.keys, layer.values, scaling=call.scaling, softcap=call.softcap, mask=mask)

    def _context(
        self, call: AttentionCall, layer: ContextLayer, rows: Tensor, q_tokens: int, tail: Partial
    ) -> list[Partial]:
        exact = self._exact
        kept = None if exact else layer.static_rows
        keys, values = (layer.keys, layer.values) if kept is None else layer.static_set
        ids: Tensor | None
        scores: Tensor | None
        if exact and self.compiled and keys.shape[1]:
            partial, ids, scores = attend_all(
                rows, keys, values, top_k=_OBSERVED, scaling=call.scaling, softcap=call.softcap
            )
            self._count(rows.shape[1], q_tokens, keys.shape[1], None)
            lse = merge([tail, partial]).lse
            self._observe(call, rows, q_tokens, keys[:, :0], layer.static_rows[:0], ids, scores, lse)
            return [partial]
        parts = [dense_partial(rows, keys, values, scaling=call.scaling, softcap=call.softcap)]
        ids = scores = None
        found = None if exact else self._search(layer, rows)
        if found is not None:
            scores, ids = found
            parts.append(gathered_partial(scores, ids, layer.values, scaling=call.scaling, softcap=call.softcap))
        self._count(rows.shape[1], q_tokens, keys.shape[1], ids)
        self._observe(call, rows, q_tokens, keys, kept, ids, scores, merge([tail, *parts]).lse)
        return parts

    def _count(self, n_rows: int, q_tokens: int, n_static: int, ids: Tensor | None) -> None:
        """Adds the attended keys of every query that is not padding, averaged over the query heads."""
        counts = self.tails.counts.cpu().numpy()
        attended = torch.full((1, n_rows), float(n_static))
        if ids is not None:
            attended = n_static + (ids >= 0).sum(-1).float().cpu()
        per_query = attended.reshape(attended.shape[0], len(counts), -1, q_tokens).mean(dim=(0, 2)).numpy()
        real = np.arange(q_tokens)[None, :] < counts[:, None]
        self._attended[self._slots] += (per_query * real).sum(1)
        self._queries[self._slots] += counts

    def _observe(
        self,
        call: AttentionCall,
        rows: Tensor,
        q_tokens: int,
        keys: Tensor,
        kept: Tensor | None,
        ids: Tensor | None,
        scores: Tensor | None,
        lse: Tensor,
    ) -> None:
        """Adds where the attention of each question's last token went: it is the one that answers."""
        counts = self.tails.counts
        batch, n_kv = len(counts), rows.shape[0]
        of_batch = torch.arange(batch, device=rows.device)

        def last(x: Tensor) -> Tensor:
            apart = x.reshape(n_kv, batch, -1, q_tokens, *x.shape[2:])
            return apart[:, of_batch, :, counts - 1].movedim(0, 1)  # [n_kv, batch, group, ...]

        own = last(rows).float()
        own_lse = last(lse).unsqueeze(-1)
        weights = torch.einsum("hbgd,hnd->hbgn", own, keys.float())
        weights = torch.exp(logits(weights, call.scaling, call.softcap) - own_lse).sum(dim=(0, 2))  # [batch, n]
        mass = torch.zeros((batch, self.context_tokens), device=rows.device)
        if kept is None:
            mass += weights
        else:
            mass[:, kept] += weights
        if ids is not None and scores is not None:
            picked, raw = last(ids), last(scores)
            found = torch.exp(logits(raw, call.scaling, call.softcap) - own_lse).masked_fill(picked < 0, 0.0)
            flat_ids = picked.clamp_min(0).permute(1, 0, 2, 3).reshape(batch, -1)
            mass.scatter_add_(1, flat_ids, found.permute(1, 0, 2, 3).reshape(batch, -1))
        self._mass[self._slots] += mass.cpu().numpy()
