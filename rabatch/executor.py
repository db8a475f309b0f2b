"""Decoding many questions over one context in lockstep; a slot that becomes free takes the next question."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rabatch.attention.context import QuestionAttention
from rabatch.attention.seam import attending
from rabatch.attention.seen import Seen
from rabatch.attention.tails import PassingCache
from rabatch.config import Recipe
from rabatch.contexts import OpenContext
from rabatch.generation import Course, Generation
from rabatch.selectors import selection_of


@dataclass
class Answered:
    """A question whose answer has ended.

    Attributes:
        number: Its place among the questions given.
        seen: What its attention saw.
        seconds: Of each pass, its share among the questions in it.
    """

    number: int
    course: Course
    seen: Seen
    seconds: float


@dataclass
class _Slot:
    number: int
    course: Course
    seconds: float = 0.0


class Executor:
    """Passes of a model over the tails of questions. Every pass loads the context once for all questions in it.

    Args:
        slots: Questions under way at the same time, at most.
    """

    def __init__(self, context: OpenContext, recipe: Recipe, generation: Generation, *, slots: int) -> None:
        self.context = context
        self.generation = generation
        self.slots = slots
        self._least_free = context.least_free_slots(slots)
        self.attention = QuestionAttention(
            context.layers,
            context_tokens=len(context.token_ids),
            slots=slots,
            recipe=recipe,
            device=context.loaded.config.device,
            selection=selection_of(recipe, context.loaded),
            recall=context.recall,
        )
        self._cache = PassingCache(len(context.layers), len(context.token_ids))

    @torch.inference_mode()
    def run(self, courses: Sequence[Course]) -> Iterator[Answered]:
        """Answer all of them, in any order; short questions begin first, so that little is padded."""
        waiting = deque(sorted(enumerate(courses), key=lambda item: item[1].question_tokens))
        active: list[_Slot] = []
        while waiting or active:
            began = time.perf_counter()
            first = 0
            if waiting and self.slots - len(active) >= min(self._least_free, len(waiting)):
                first = len(active)
                while waiting and len(active) < self.slots:
                    self.attention.clear(len(active))
                    active.append(_Slot(*waiting.popleft()))
            passing = active[first:]
            asked = not passing[0].course.generated
            tokens = [slot.course.tail if asked else slot.course.tail[-1:] for slot in passing]
            logits = self.forward(first, tokens, question=asked)
            self.generation.advance([slot.course for slot in passing], logits)
            spent = (time.perf_counter() - began) / len(passing)
            for slot in passing:
                slot.seconds += spent
            yield from self._leave(active)

    def _leave(self, active: list[_Slot]) -> Iterator[Answered]:
        """Hand out what has ended and close the gaps, so that the slots in use stay the first ones."""
        for place in range(len(active) - 1, -1, -1):
            slot = active[place]
            if slot.course.done is None:
                continue
            seen = self.attention.seen(place)
            last = len(active) - 1
            if place != last:
                self.attention.move(last, place)
                active[place] = active[last]
            active.pop()
            yield Answered(slot.number, slot.course, seen, slot.seconds)

    @torch.inference_mode()
    def forward(self, first: int, tokens: Sequence[Sequence[int]], *, question: bool) -> Tensor:
        """One pass over the slots from `first` on: their new tokens in, the logits after the last of each out.

        Args:
            question: Whether these are questions (`Recipe.question_attention` rules) and not generated tokens.

        Returns:
            [len(tokens), vocabulary].
        """
        counts = [len(row) for row in tokens]
        device = self.context.loaded.config.device
        ids = torch.zeros((len(tokens), max(counts)), dtype=torch.long)
        for row, new in enumerate(tokens):
            ids[row, : len(new)] = torch.tensor(new)
        ends, place_of_end = torch.tensor(counts, device=device).sub(1).unique(return_inverse=True)
        places = self.attention.begin(first, counts, question=question)
        with attending(self.attention), self.attention.selection.passing():
            logits: Tensor = self.context.loaded.model(
                input_ids=ids.to(device),
                position_ids=places + len(self.context.token_ids),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=ends,
            ).logits
        self.attention.finish()
        return logits[torch.arange(len(tokens), device=device), place_of_end]
