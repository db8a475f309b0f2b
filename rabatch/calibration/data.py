"""Passkeys in a haystack: what gates are learned on. A sample is a function of seed and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rabatch.demo.grammar import filler_sentence
from rabatch.errors import ConfigError
from rabatch.evaluation.tasks import wording
from rabatch.prompts import PromptTemplate

_DIGITS = 6
_DEPTHS = (0.05, 0.95)
_N_DEPTHS = 1000
_SENTENCES = 64  # made and counted together


@dataclass(frozen=True)
class Sample:
    """A document, and questions with their answers after it.

    Attributes:
        token_ids: int64 [1, n_tokens].
        predicting: bool [n_tokens], the tokens whose hidden states an answer's tokens are predicted from.
    """

    token_ids: Tensor
    predicting: Tensor


@dataclass(frozen=True)
class Passkeys:
    """Samples for a model.

    Args:
        tokenizer, template: The model's.
        lengths: In tokens, from which one is drawn for each sample.
        count: Passkeys of a sample: numbers that have a key each. All are asked for, in order, after the document.
        seed: Same seed and step, same sample.
    """

    tokenizer: Any
    template: PromptTemplate
    lengths: Sequence[int]
    count: int
    seed: int

    def sample(self, step: int) -> Sample:
        """At least as long as was drawn, less a sentence.

        Raises:
            ConfigError: The length drawn has no room for document and questions.
        """
        rng = Random(f"rabatch-passkeys/{self.seed}/{step}")
        length = rng.choice(list(self.lengths))
        low, high = 10 ** (_DIGITS - 1), 10**_DIGITS
        keys, values = rng.sample(range(low, high), self.count), rng.sample(range(low, high), self.count)
        tail, is_answer = self._tail(keys, values)
        planted = [wording.states(str(key), str(value)) for key, value in zip(keys, values, strict=True)]
        n_filler = length - len(tail) - sum(self._counted(planted))
        if n_filler < length // 4:
            fix = f"{self.count} passkeys leave no room for a document in {length} tokens; take fewer, or more tokens"
            raise ConfigError("min_tokens", length, fix)
        sentences = self._filler(rng, n_filler)
        depths = np.linspace(*_DEPTHS, _N_DEPTHS)
        places = [int(depths[rng.randrange(_N_DEPTHS)] * len(sentences)) for _ in planted]
        for place, sentence in sorted(zip(places, planted, strict=True), reverse=True):
            sentences.insert(place, sentence)
        context = self.template.encode_context(self.tokenizer, " ".join(sentences)).token_ids.tolist()
        predicting = torch.zeros(len(context) + len(tail), dtype=torch.bool)
        predicting[len(context) - 1 : -1] = torch.tensor(is_answer)
        return Sample(torch.tensor([context + tail]), predicting)

    def _tail(self, keys: list[int], values: list[int]) -> tuple[list[int], list[bool]]:
        """Questions and answers as tokens, and which of them are an answer's, by their characters."""
        ends = self.tokenizer.eos_token if getattr(self.tokenizer, "chat_template", None) else ""
        text, spans = "", []
        for key, value in zip(keys, values, strict=True):
            text += self.template.after_document + wording.asks(str(key)) + self.template.after_question
            text += "" if text[-1:].isspace() else " "
            spans.append((len(text), len(text) + len(str(value))))
            text += f"{value}{ends}"
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        is_answer = [any(s < stop and start < e for s, e in spans) for start, stop in encoded["offset_mapping"]]
        return encoded["input_ids"], is_answer

    def _filler(self, rng: Random, tokens: int) -> list[str]:
        """Sentences of so many tokens together, or a little more."""
        sentences: list[str] = []
        while tokens > 0:
            made = [filler_sentence(rng) for _ in range(_SENTENCES)]
            for sentence, n_tokens in zip(made, self._counted(made), strict=True):
                if tokens > 0:
                    sentences.append(sentence)
                    tokens -= n_tokens
        return sentences

    def _counted(self, sentences: list[str]) -> list[int]:
        """Tokens of each, with the space before it."""
        encoded = self.tokenizer([f" {sentence}" for sentence in sentences], add_special_tokens=False)
        return [len(ids) for ids in encoded["input_ids"]]
