"""The attention of a prefill: exact and causal over one or several contexts; and sampled queries' best keys."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from rabatch.attention.key_mass import key_mass
from rabatch.attention.outbox import Outbox
from rabatch.attention.sampling import ContextSample
from rabatch.attention.seam import AttentionCall
from rabatch.index.topk import Sample, Span, attention_topk


class PrefillCapture:
    """Computes the attention of a chunked prefill and gives each context what its sampled queries rank highest.

    Args:
        contexts: In the order in which their tokens follow each other; each attends itself only.
        outbox: Brings results to the host.
        unsampled: Layers of which no best keys are wanted, as no head of theirs gets an index. Of a layer in which some
            heads do, the lists of all are made, as one pass over the scores makes them.
        key_mass: Whether the attention of the sampled queries is also summed by key.

    Attributes:
        chunk_start: Where the chunk of the next call starts in the row of all contexts' tokens.
        windows: Native sliding window by layer, 0 for full attention; known after the first chunk.
        logits: By layer, as `windows`: the factor on q . k, and the bound of the result, 0 for none.
    """

    def __init__(
        self,
        contexts: Sequence[ContextSample],
        outbox: Outbox,
        *,
        unsampled: Set[int] = frozenset(),
        key_mass: bool = False,
    ) -> None:
        self.contexts = list(contexts)
        self.unsampled = unsampled
        self.key_mass = key_mass
        self.chunk_start = 0
        self.windows: dict[int, int] = {}
        self.logits: dict[int, tuple[float, float]] = {}
        self._outbox = outbox

    def attend(self, call: AttentionCall) -> Tensor:
        self.windows[call.layer] = call.sliding_window
        self.logits[call.layer] = float(call.scaling), float(call.softcap or 0)
        stretches = self._stretches(call.query.shape[2])
        sampling = not call.sliding_window and call.layer not in self.unsampled
        found = attention_topk(
            call.query[0],
            call.key[0],
            call.value[0],
            scaling=call.scaling,
            spans=[span for span, _, _ in stretches],
            sample=self._sample(stretches) if sampling else None,
            softcap=call.softcap,
            sliding_window=call.sliding_window,
        )
        if sampling:
            self._keep(call, stretches, found.ids)
            if self.key_mass:
                self._add_mass(call, stretches, found.lse)
        return found.out.transpose(0, 1)[None]

    def _stretches(self, n_rows: int) -> list[tuple[Span, ContextSample, Tensor]]:
        """The contexts that have tokens in the chunk: where, and which of their sampled positions lie there."""
        stretches = []
        first_key = 0
        for context in self.contexts:
            start = max(self.chunk_start, first_key)
            stop = min(self.chunk_start + n_rows, first_key + context.context_tokens)
            if start < stop:
                span = Span(start - self.chunk_start, stop - self.chunk_start, first_key, start)
                stretches.append((span, context, context.between(start - first_key, stop - first_key)))
            first_key += context.context_tokens
        return stretches

    def _sample(self, stretches: list[tuple[Span, ContextSample, Tensor]]) -> Sample | None:
        """Positions within contexts as rows of the chunk and keys of the cache."""
        rows, low, high = (
            torch.cat(parts)
            for parts in zip(
                *(
                    (
                        context.positions[chosen] + span.first_key - self.chunk_start,
                        context.low[chosen] + span.first_key,
                        context.high[chosen] + span.first_key,
                    )
                    for span, context, chosen in stretches
                ),
                strict=True,
            )
        )
        return Sample(rows, low, high, stretches[0][1].top_k) if len(rows) else None

    def _keep(self, call: AttentionCall, stretches: list[tuple[Span, ContextSample, Tensor]], ids: Tensor) -> None:
        n_kv = call.key.shape[1]
        group = call.query.shape[1] // n_kv
        done = 0
        for span, context, chosen in stretches:
            count = int(chosen.sum())
            if not count:
                continue
            lists = ids[:, done : done + count]
            with_vector = context.positions[chosen & context.has_vector(group)] + span.first_key - self.chunk_start
            vectors = call.query[0].index_select(1, with_vector.to(call.query.device))
            context.add(
                call.layer,
                self._outbox.send(torch.where(lists < 0, lists, lists - span.first_key).unflatten(0, (n_kv, group))),
                self._outbox.send(vectors.unflatten(0, (n_kv, group))),
            )
            done += count

    def _add_mass(self, call: AttentionCall, stretches: list[tuple[Span, ContextSample, Tensor]], lse: Tensor) -> None:
        """How much the sampled queries of the chunk attend each key."""
        for span, context, chosen in stretches:
            positions = context.positions[chosen].to(call.query.device)
            if not len(positions):
                continue
            rows = positions + span.first_key - self.chunk_start
            mass = key_mass(
                call.query[0].index_select(1, rows),
                lse.index_select(1, rows),
                call.key[0][:, span.first_key : span.at + span.row_stop - span.row_start],
                positions,
                index_range=context.index_range,
                scaling=call.scaling,
                softcap=call.softcap,
            )
            context.add_mass(call.layer, mass)
