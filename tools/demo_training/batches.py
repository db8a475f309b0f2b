"""Training batches: documents with questions and answers, and random-token copying. A batch is a function of a seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from demo_training.task_sequences import task_sequence
from rabatch.demo.corpus import ANSWER_TEMPLATE, KINDS, QUESTION_TEMPLATE, compose_document

ANSWER_WEIGHT = 1.0
TOKENS_PER_QUESTION = 26
"""Of a question with its answer, on average over the kinds."""


@dataclass(frozen=True, slots=True)
class Batch:
    """`token_ids`, `positions`, `loss_weights`: [batch, length]. The weight at t is that of predicting token t + 1."""

    token_ids: Tensor
    positions: Tensor
    loss_weights: Tensor


@dataclass(frozen=True, slots=True)
class QuestionMix:
    """How the sequences of a stage are made up.

    Attributes:
        kind_weights: relative frequency of the asked kinds, in the order of `KINDS`.
        question_share: share of a sequence's tokens that are questions and answers.
        fact_share: range (low, high) of the share of document tokens that state facts.
        max_position: RoPE positions reach up to this by jumps inside a sequence.
        language_share, language_weight: share of the other positions that count in the loss, and their weight.
        task_share: share of the sequences that are of the evaluation's tasks.
    """

    kind_weights: tuple[float, ...] = (0.25, 0.15, 0.35, 0.25)
    question_share: float = 0.4
    fact_share: tuple[float, float] = (0.1, 0.6)
    max_position: int = 16384
    language_share: float = 0.04
    language_weight: float = 0.1
    task_share: float = 0.0


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _special(tokenizer: Tokenizer, token: str) -> int:
    token_id: int | None = tokenizer.token_to_id(token)
    if token_id is None:
        raise ValueError(f"the tokenizer has no {token}")
    return token_id


def question_sequence(
    rng: Random, tokenizer: Tokenizer, length: int, mix: QuestionMix
) -> tuple[list[int], list[bool], int]:
    """One document and questions with answers: at most `length` ids, which of them are answers, the document's end."""
    n_questions = max(2, int(length * mix.question_share / TOKENS_PER_QUESTION))
    kinds = rng.choices(KINDS, weights=mix.kind_weights, k=n_questions)
    low, high = mix.fact_share
    text, placed = compose_document(
        rng,
        tokens=length - n_questions * TOKENS_PER_QUESTION - 16,
        question_kinds=kinds,
        fact_share=math.exp(rng.uniform(math.log(low), math.log(high))),
        similarity=rng.uniform(0.0, 0.6),
    )
    begin = [_special(tokenizer, "<|begin|>")] if rng.random() < 0.4 else []
    ids = (begin + _encode(tokenizer, text))[:length]
    document_end = len(ids)
    is_answer = [False] * document_end
    for item in rng.sample(placed, len(placed)):
        question = _encode(tokenizer, QUESTION_TEMPLATE.format(question=item.fact.question))
        answer = _encode(tokenizer, ANSWER_TEMPLATE.format(expected=item.fact.expected))
        if len(ids) + len(question) + len(answer) > length:
            break
        ids += question + answer
        is_answer += [False] * len(question) + [True] * len(answer)
    return ids, is_answer, document_end


def jumping_positions(rng: Random, length: int, document_end: int, max_position: int) -> Tensor:
    """Positions [length] with jumps at random cuts, the last one where the document ends (as in PoSE, 2309.10400)."""
    positions = torch.arange(length)
    if max_position <= length or rng.random() < 0.3:
        return positions
    n_jumps = rng.choice((1, 1, 2, 4))
    total = (max_position - length) * rng.random() ** 1.5
    cuts = [*sorted(rng.randint(1, document_end) for _ in range(n_jumps - 1)), document_end]
    borders = [0.0, *sorted(rng.random() for _ in range(n_jumps - 1)), 1.0]
    for cut, (start, end) in zip(cuts, pairwise(borders), strict=True):
        positions[cut:] += int(total * (end - start))
    return positions


def question_batch(rng: Random, tokenizer: Tokenizer, *, batch: int, length: int, mix: QuestionMix) -> Batch:
    """`batch` sequences of documents with questions; the loss is on answers plus a little language modelling."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    token_ids = torch.full((batch, length), _special(tokenizer, "<|pad|>"))
    weights = torch.zeros(batch, length)
    positions = torch.empty(batch, length, dtype=torch.long)
    for row in range(batch):
        if rng.random() < mix.task_share:
            ids, is_answer, document_end = task_sequence(rng, tokenizer, length)
        else:
            ids, is_answer, document_end = question_sequence(rng, tokenizer, length, mix)
        n = len(ids)
        token_ids[row, :n] = torch.tensor(ids)
        language = torch.rand(n - 1, generator=generator) < mix.language_share
        weights[row, : n - 1] = language * mix.language_weight
        weights[row, : n - 1][torch.tensor(is_answer[1:])] = ANSWER_WEIGHT
        positions[row] = jumping_positions(rng, length, document_end, mix.max_position)
    return Batch(token_ids, positions, weights)


def copy_batch(rng: Random, tokenizer: Tokenizer, *, batch: int, length: int, max_position: int) -> Batch:
    """Random tokens, then the same in chunks in another order: the bare skill of finding and copying."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    n_tokens = _special(tokenizer, "<|begin|>")
    half = length // 2
    token_ids = torch.empty(batch, 2 * half, dtype=torch.long)
    weights = torch.zeros(batch, 2 * half)
    weights[:, half:-1] = ANSWER_WEIGHT
    positions = torch.arange(2 * half).repeat(batch, 1)
    for row in range(batch):
        n_distinct: int = rng.choice((half // 4, half, n_tokens))
        pool = torch.randint(n_tokens, (n_distinct,), generator=generator)
        first = pool[torch.randint(n_distinct, (half,), generator=generator)]
        chunks: Sequence[Tensor] = list(first.split(rng.choice((3, 4, 6, 8, 12, 24))))
        token_ids[row] = torch.cat([first, *rng.sample(chunks, len(chunks))])
        if max_position > 2 * half and rng.random() < 0.5:
            positions[row, half:] += int((max_position - 2 * half) * rng.random() ** 2)
    return Batch(token_ids, positions, weights)
