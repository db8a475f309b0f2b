"""The attention of questions over one stored context: exact, or sparse over static set, found keys and tail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.layer import ContextLayer
from rabatch.attention.merge import Partial, dense_partial, logits, merge
from rabatch.attention.overlay import Overlays
from rabatch.attention.recall import RecallSampler
from rabatch.attention.seam import AttentionCall
from rabatch.attention.seen import Seen, SeenBySlot
from rabatch.attention.selection import Asked, Observed, Selection, spread_out
from rabatch.attention.sets import Found, attend_sets
from rabatch.attention.shared import attend_several
from rabatch.attention.step import attend_compiled
from rabatch.attention.tails import Tails
from rabatch.config import Recipe

_OBSERVED = 8
"""Keys per row that evidence is drawn from where attention is exact and names its best keys only."""


class QuestionAttention:
    """Attention of questions over one context, each in a slot; counts and observes what it attends.

    Args:
        layers: One per layer of the model; one is asked for when its turn comes, and not kept.
        context_tokens: Length of the context.
        slots: Questions under way at the same time, at most.
        recipe: What generated and question tokens attend.
        device: Of the model.
        selection: Which keys they attend beyond the static set. None: those that the recipe's index finds.
        recall: Looks at some of the searches.

    Attributes:
        compiled: Whether compiled kernels attend: on the CPU. Elsewhere torch does, with the same output; where
            attention is exact, evidence is then drawn from all keys and not from the best of each row alone.
    """

    def __init__(
        self,
        layers: Sequence[ContextLayer],
        *,
        context_tokens: int,
        slots: int,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        selection: Selection | None = None,
        recall: RecallSampler | None = None,
    ) -> None:
        self.layers = layers
        self.recall = recall
        self.context_tokens = context_tokens
        self.recipe = recipe
        self.selection = selection or Selection(recipe.method)
        device = torch.device(device)
        self.compiled = device.type == "cpu"
        self.tails = Tails(len(layers), slots, device)
        self.overlays = Overlays(self.tails, len(layers), slots, recipe.tail_tokens)
        self._seen = SeenBySlot(slots, context_tokens)
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
        if self.recipe.method != "dense":
            self.overlays.settle()

    def clear(self, slot: int) -> None:
        """Make a slot ready for another question."""
        self.tails.clear(slot)
        for kept in (self.overlays, self.selection, self._seen):
            kept.clear(slot)  # type: ignore[attr-defined]

    def move(self, source: int, target: int) -> None:
        """Put the question of one slot into another."""
        self.tails.move(source, target)
        for kept in (self.overlays, self.selection, self._seen):
            kept.move(source, target)  # type: ignore[attr-defined]

    def seen(self, slot: int) -> Seen:
        """What the question of a slot has seen so far."""
        return self._seen.of(slot)

    def attend(self, call: AttentionCall) -> Tensor:
        batch, heads, q_tokens, dim = call.query.shape
        n_kv = call.key.shape[1]
        grouped = call.query.reshape(batch, n_kv, heads // n_kv, q_tokens, dim)
        layer = self.layers[call.layer]
        states = self.tails.append(call.layer, call.key, call.value)
        if not call.sliding_window:
            self._seen.queries[self._slots] += self.tails.counts.cpu().numpy()
            if not (self._exact or layer.dense):
                return self._sparse(call, layer, grouped, states).to(call.query.dtype)
        rows = grouped.transpose(0, 1).reshape(n_kv, -1, dim)  # [n_kv, batch * group * q_tokens, dim]
        tail = self._tail(call, grouped, states)
        if call.sliding_window:
            out = merge([tail, self._sliding(call, layer, rows)]).out
        else:
            out = self._dense(call, layer, rows, tail)
        out = out.reshape(n_kv, batch, -1, q_tokens, dim).transpose(0, 1).reshape(batch, heads, q_tokens, dim)
        return out.transpose(1, 2).to(call.query.dtype)

    @property
    def _exact(self) -> bool:
        """Whether the tokens of this pass attend every key of the context."""
        recipe = self.recipe
        questions = recipe.question_attention == "exact" and recipe.method != "streaming"
        return recipe.method == "dense" or (self._question and (questions or recipe.traits.observes_questions))

    def _sparse(
        self, call: AttentionCall, layer: ContextLayer, grouped: Tensor, states: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Static set, found keys and tail; `grouped` queries are [batch, n_kv, group, q_tokens, dim]."""
        if layer.streaming is None:
            return self._sparse_group(call, layer, 0, grouped, states)
        self.overlays.groups[call.layer] = tuple(group.heads for group in layer.groups)
        batch, n_kv, _, q_tokens, _ = grouped.shape
        out: Tensor | None = None
        for number, group in enumerate(layer.groups):
            mine = self._sparse_group(
                call, group, number, grouped[:, group.heads], (states[0][:, group.heads], states[1][:, group.heads])
            )
            out = mine.new_empty((batch, q_tokens, n_kv, grouped.shape[2], mine.shape[3])) if out is None else out
            out[:, :, group.heads] = mine.unflatten(2, (-1, grouped.shape[2]))
        assert out is not None
        return out.flatten(2, 3)

    def _sparse_group(
        self, call: AttentionCall, layer: ContextLayer, number: int, grouped: Tensor, tail: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Some KV heads of a layer, its group `number`; queries and tails are theirs."""
        queries = grouped.transpose(0, 1)
        n_kv, batch, group, q_tokens, dim = queries.shape
        counts = self.tails.counts
        host = queries.reshape(n_kv, -1, dim).float().cpu()  # before the device is given the static set
        real = torch.arange(q_tokens) < counts.cpu()[:, None]  # padding is not searched for
        real = real[:, None].expand(batch, group, q_tokens).reshape(-1)

        def find() -> Found:
            rows = host[:, real].numpy()
            some = self.selection.find(Asked(call, layer, number, rows, real, self._slots.start))
            if self.recall is not None:
                self.recall.look(layer, rows, some.ids)
            n_keys, found = layer.shape[1], spread_out(some, real)
            found = self.overlays.join(
                call.layer, self._slots, host, found, k=self.recipe.top_k, n_keys=n_keys, group=number
            )
            return Found(*(t.to(queries.device) for t in found))

        attended = (attend_compiled if self.compiled else attend_sets)(
            queries,
            layer.static,
            find,
            layer.values if layer.value_codes is None else layer.value_codes,
            tail,
            self.overlays.begins[self._slots],
            self.tails.places,
            counts,
            scaling=call.scaling,
            softcap=call.softcap,
            goal=self.recipe.mass if self.recipe.budget_in_use == "mass" else 1.0,
            mass=self._seen.mass[self._slots],
        )
        self._seen.count(self._slots, attended.keys, attended.share, n_kv / call.key.shape[1])
        if layer.zones is None and bool((layer.budget < layer.index_stop - layer.index_start).any()):
            self._seen.known[self._slots] = False
        return attended.out

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
        mask = layer.positions[None, None, :] > positions[None, :, None] - call.sliding_window
        return dense_partial(rows, layer.keys, layer.values, scaling=call.scaling, softcap=call.softcap, mask=mask)

    def _dense(self, call: AttentionCall, layer: ContextLayer, rows: Tensor, tail: Partial) -> Tensor:
        """The tail, and every key of the context that is kept: [n_kv, n_rows, head_dim]."""
        if layer.streaming is None:
            return self._dense_group(call, layer, 0, rows, tail)
        out = torch.empty_like(tail.out)
        for number, group in enumerate(layer.groups):
            own = Partial(tail.out[group.heads], tail.lse[group.heads])
            out[group.heads] = self._dense_group(call, group, number, rows[group.heads], own)
        return out

    def _dense_group(
        self, call: AttentionCall, layer: ContextLayer, number: int, rows: Tensor, tail: Partial
    ) -> Tensor:
        """Some KV heads of a layer, its group `number`."""
        scaling, softcap = call.scaling, call.softcap
        best = None
        n_keys, keys = layer.shape[1], layer.keys
        if self.compiled and n_keys:
            partial, *best = attend_several(rows, layer.shared, top_k=_OBSERVED, scaling=scaling, softcap=softcap)
        else:
            keys, values = layer.whole()
            partial = dense_partial(rows, keys, values, scaling=scaling, softcap=softcap)
        counts = self.tails.counts.cpu().numpy()
        weight = len(rows) / call.key.shape[1]
        self._seen.count(self._slots, counts * n_keys, counts.astype(np.float64), weight)
        merged = merge([tail, partial])
        if self._question:
            shape = (len(rows), len(counts), -1, call.query.shape[2])
            apart = rows.reshape(*shape, rows.shape[2]), merged.lse.reshape(shape)
            self.selection.observe(Observed(call, layer, number, *apart, counts.tolist(), self._slots.start))
        self._observe(call, rows, layer, keys, best, merged.lse)
        return merged.out

    def _observe(
        self,
        call: AttentionCall,
        rows: Tensor,
        layer: ContextLayer,
        keys: Tensor,
        best: list[Tensor] | None,
        lse: Tensor,
    ) -> None:
        """Adds where the exact attention of each question's last token went: it is the one that answers.

        Args:
            keys: All of the layer, if there are no best ones.
            best: Ids and raw products of each row's best keys; None: all keys are looked at.
            lse: [n_kv, n_rows], of context and tail.
        """
        counts, q_tokens = self.tails.counts, call.query.shape[2]
        batch, n_kv = len(counts), rows.shape[0]
        of_batch = torch.arange(batch, device=rows.device)

        def last(x: Tensor) -> Tensor:
            apart = x.reshape(n_kv, batch, -1, q_tokens, *x.shape[2:])
            return apart[:, of_batch, :, counts - 1].movedim(0, 1)  # [n_kv, batch, group, ...]

        if best is None:
            raw = torch.einsum("hbgd,hnd->hbgn", last(rows).float(), keys.float())
        else:
            picked, raw = (last(t) for t in best)
        weights = torch.exp(logits(raw, call.scaling, call.softcap) - last(lse).unsqueeze(-1))
        mass = torch.zeros((batch, self.context_tokens), device=rows.device)
        if best is None:
            mass[:, layer.positions] = weights.sum(dim=(0, 2))
        else:
            weights = weights.masked_fill(picked < 0, 0.0).permute(1, 0, 2, 3).reshape(batch, -1)
            places = layer.positions[picked.clamp_min(0)].permute(1, 0, 2, 3).reshape(batch, -1)
            mass.scatter_add_(1, places, weights)
        self._seen.mass[self._slots] += mass.cpu().numpy()
