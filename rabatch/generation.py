"""From logits to tokens as transformers does it: its processors, its sampling, its stopping, for one question each."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StopStringCriteria

from rabatch.config import GenerationSettings
from rabatch.loading import LoadedModel


@dataclass
class Course:
    """One question on its way to an answer.

    Attributes:
        tail: Its tokens, to which every generated one is added.
        question_tokens: How many of them are the question's, with the prefix of the answer if it has one.
        max_new_tokens: How many are generated at most.
        done: ``"stop"`` (end token or stop string), ``"length"``, or None while it goes on.
    """

    tail: list[int]
    question_tokens: int
    max_new_tokens: int
    processors: LogitsProcessorList
    random: torch.Generator | None
    done: str | None = None

    @property
    def generated(self) -> list[int]:
        return self.tail[self.question_tokens :]


class Generation:
    """Settings of generation made ready for one model and one context.

    Args:
        context_ids: int64 [context_tokens]: processors that look at what was said (repetition penalties) see it.
    """

    def __init__(self, loaded: LoadedModel, settings: GenerationSettings, context_ids: Tensor) -> None:
        self.loaded = loaded
        self.settings = settings
        self.config = generation_config(loaded, settings)
        eos = self.config.eos_token_id
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
        self._context_ids = context_ids
        stops = list(settings.stop_strings)
        self._strings = StopStringCriteria(loaded.tokenizer, stops) if stops else None

    def begin(self, tail: Sequence[int], question_id: object, *, max_new_tokens: int | None = None) -> Course:
        """A question that has its tokens but no answer yet.

        Args:
            max_new_tokens: Of this question alone. None: as the settings say.
        """
        longest = max_new_tokens or self.settings.max_new_tokens
        random = None
        if self.config.do_sample:
            random = torch.Generator(self.loaded.config.device).manual_seed(seed_of(self.settings.seed, question_id))
        prompt_tokens = len(self._context_ids) + len(tail)
        return Course(list(tail), len(tail), longest, self._processors(prompt_tokens, longest), random)

    def _processors(self, prompt_tokens: int, max_new_tokens: int) -> LogitsProcessorList:
        """What transformers' `generate` would apply to the logits; some depend on the length of the prompt."""
        model = self.loaded.model
        own = copy.deepcopy(self.config)
        own.max_new_tokens = max_new_tokens
        config, _ = model._prepare_generation_config(own)  # fills in transformers' defaults
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=self.loaded.config.device)
        made: LogitsProcessorList = model._get_logits_processor(
            config, input_ids_seq_length=prompt_tokens, device=self.loaded.config.device, model_kwargs={}
        )
        return made

    def advance(self, courses: Sequence[Course], logits: Tensor) -> None:
        """Append the next token of each course, [len(courses), vocabulary] being their logits, and end what ends."""
        scores = logits.float()
        rows = [self._processed(course, row) for course, row in zip(courses, scores, strict=True)]
        if self.config.do_sample:
            drawn = [
                int(torch.multinomial(row.softmax(-1), 1, generator=course.random))
                for course, row in zip(courses, rows, strict=True)
            ]
        else:
            drawn = torch.stack(rows).argmax(-1).tolist() if rows else []
        for course, token in zip(courses, drawn, strict=True):
            course.tail.append(token)
            if token in self.eos_ids or self._at_stop_string(course):
                course.done = "stop"
            elif len(course.generated) >= course.max_new_tokens:
                course.done = "length"

    def _processed(self, course: Course, row: Tensor) -> Tensor:
        if not course.processors:
            return row
        said = torch.cat([self._context_ids, torch.tensor(course.tail)]).to(row.device)
        processed: Tensor = course.processors(said[None], row[None])  # type: ignore[arg-type]
        return processed[0]

    def _at_stop_string(self, course: Course) -> bool:
        if self._strings is None:
            return False
        return bool(self._strings(torch.tensor([course.tail]), None)[0])

    def text(self, course: Course) -> tuple[str, int]:
        """The answer without end token and stop string, and its tokens."""
        ids = course.generated
        kept = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        text: str = self.loaded.tokenizer.decode(kept, skip_special_tokens=True)
        cuts = [at for stop in self.settings.stop_strings if (at := text.find(stop)) >= 0]
        return text[: min(cuts, default=len(text))].strip(), len(kept)


def generation_config(loaded: LoadedModel, settings: GenerationSettings) -> GenerationConfig:
    """The model's own generation config with the given settings on top. Stop strings are `Generation`'s."""
    config: GenerationConfig = copy.deepcopy(loaded.model.generation_config)
    config.max_new_tokens, config.max_length = settings.max_new_tokens, None
    config.num_beams = 1
    for name in ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty"):
        value = getattr(settings, name)
        if value is not None:
            setattr(config, name, value)
    if settings.do_sample is None and settings.temperature is not None:
        config.do_sample = True
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    if config.pad_token_id is None:
        eos = config.eos_token_id
        config.pad_token_id = loaded.tokenizer.pad_token_id or (eos[0] if isinstance(eos, list) else eos) or 0
    return config


def seed_of(seed: int, question_id: object) -> int:
    """The seed of a question's own stream of draws, the same in whatever company it is asked."""
    digest = hashlib.sha256(f"{seed}\0{question_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big")
