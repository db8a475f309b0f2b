"""Answering questions over one stored context, together in one batch."""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from rabatch.attention.caches import TailCache
from rabatch.attention.context import ContextLayer, QuestionAttention
from rabatch.attention.evidence import spans
from rabatch.attention.seam import attending
from rabatch.config import GenerationSettings, Recipe
from rabatch.errors import FingerprintError, QuestionError, RabatchError
from rabatch.loading import LoadedModel
from rabatch.selectors import open_index
from rabatch.storage.manifest import Manifest
from rabatch.storage.parts import LayerBlock, TokensBlock
from rabatch.storage.store import IndexStore

_log = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True)
class OpenContext:
    """A stored context in memory, ready to be asked.

    Attributes:
        layers: One per layer; answering never changes them.
        token_ids: int64 [context_tokens], on the CPU.
    """

    manifest: Manifest
    loaded: LoadedModel
    layers: tuple[ContextLayer, ...]
    token_ids: Tensor
    tokens: TokensBlock


def open_context(
    store: IndexStore, manifest: Manifest, loaded: LoadedModel, recipe: Recipe, *, threads: int = 1
) -> OpenContext:
    """Read an index and make it ready for `recipe`.

    Raises:
        FingerprintError: The index belongs to another model, dtype or template, or holds no graph and the recipe
            needs one.
        IntegrityError: Stored bytes are not what the manifest says.
    """
    check_identity(manifest, loaded)
    if recipe.method == "graph" and manifest.geometry.index != "graph":
        raise FingerprintError(
            "recipe",
            recipe.method,
            f"the index of {manifest.document_id!r} holds no graph; use flat, or build with --index graph",
        )
    layers = []
    for number in range(manifest.geometry.n_layers):
        block = store.read_layer(manifest, number)
        layers.append(_context_layer(block, manifest, recipe, loaded, threads))
    tokens = store.read_tokens(manifest)
    return OpenContext(manifest, loaded, tuple(layers), torch.from_numpy(tokens.token_ids.astype(np.int64)), tokens)


def check_identity(manifest: Manifest, loaded: LoadedModel) -> None:
    """Raises FingerprintError, naming what differs, unless the index was made by this very model."""
    stored = manifest.fingerprint_fields.get("model")
    if stored == loaded.identity:
        return
    stored = stored if isinstance(stored, dict) else {}
    differing = sorted(k for k in {*stored, *loaded.identity} if stored.get(k) != loaded.identity.get(k))
    raise FingerprintError(
        "model",
        loaded.config.name,
        f"the index of {manifest.document_id!r} was built with another {', '.join(differing)}; build it for this model",
    )


def _context_layer(
    block: LayerBlock, manifest: Manifest, recipe: Recipe, loaded: LoadedModel, threads: int
) -> ContextLayer:
    sliding = manifest.geometry.sliding_windows[block.layer]
    rows = block.keys.shape[1]
    start, stop = (rows, rows) if sliding else (manifest.index_start, manifest.index_stop)
    device = loaded.config.device
    return ContextLayer(
        keys=block.keys.to(device),
        values=block.values.to(device),
        first_position=manifest.context_tokens - rows,
        index_start=start,
        index_stop=stop,
        index=None if sliding else open_index(recipe, block, start, stop, threads=threads),
    )


def answer_batch(
    context: OpenContext, questions: Sequence[Row], recipe: Recipe, generation: GenerationSettings
) -> list[Row]:
    """Answer questions over one context; one row per question, in their order, with the fields of `records.ANSWERS`.

    A question that cannot be answered becomes a row with status "failed" and a reason. If a whole batch fails,
    its questions are asked one by one, so that one of them cannot take the others along.

    Args:
        questions: Rows with question_id, question and, optionally, expected.
    """
    rows: dict[int, Row] = {}
    ready: list[tuple[int, list[int]]] = []
    for number, question in enumerate(questions):
        try:
            ready.append((number, _encode(context, question, generation)))
        except RabatchError as error:
            rows[number] = _failed(context, question, recipe, str(error))
    sampled = _generation_config(context.loaded, generation).do_sample
    batches = [[item] for item in ready] if sampled else [ready] if ready else []
    while batches:
        batch = batches.pop(0)
        try:
            made = _answer_encoded(context, [(questions[n], ids) for n, ids in batch], recipe, generation)
        except Exception as error:  # noqa: BLE001 - one question must not fail the others, whatever it does
            if len(batch) > 1:
                _log.warning("batch of %d questions failed (%s); asking one by one", len(batch), error)
                batches = [[item] for item in batch] + batches
                continue
            _log.exception("question %s failed", questions[batch[0][0]].get("question_id"))
            made = [_failed(context, questions[batch[0][0]], recipe, f"{type(error).__name__}: {error}")]
        rows.update(zip((n for n, _ in batch), made, strict=True))
    return [rows[number] for number in range(len(questions))]


def _encode(context: OpenContext, question: Row, generation: GenerationSettings) -> list[int]:
    text = question.get("question")
    if not isinstance(text, str):
        raise QuestionError("question", text, "is missing; every question needs a text")
    ids = context.loaded.template.encode_question(context.loaded.tokenizer, text)
    room = context.loaded.max_context_tokens - len(context.token_ids) - generation.max_new_tokens
    if len(ids) > room:
        raise QuestionError(
            "question",
            text,
            f"has {len(ids)} tokens, the model has room for {max(room, 0)} beside document and answer; shorten it",
        )
    return ids


class _Finish(StoppingCriteria):
    """Knows which questions are answered; tells the attention, so that what follows is not counted."""

    def __init__(
        self, attention: QuestionAttention, eos_ids: Sequence[int], strings: StopStringCriteria | None
    ) -> None:
        self.attention = attention
        self.eos_ids = torch.tensor(list(eos_ids), dtype=torch.long)
        self.strings = strings

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = torch.isin(input_ids[:, -1].cpu(), self.eos_ids)
        if self.strings is not None:
            done |= self.strings(input_ids, scores).cpu()
        self.attention.alive &= ~done.numpy()
        return torch.from_numpy(~self.attention.alive).to(input_ids.device)


@torch.inference_mode()
def _answer_encoded(
    context: OpenContext, batch: Sequence[tuple[Row, list[int]]], recipe: Recipe, generation: GenerationSettings
) -> list[Row]:
    began = time.perf_counter()
    loaded = context.loaded
    config = _generation_config(loaded, generation)
    if config.do_sample:
        torch.manual_seed(_question_seed(generation.seed, batch[0][0]))
    n, longest = len(context.token_ids), max(len(ids) for _, ids in batch)
    pads = [longest - len(ids) for _, ids in batch]
    tail = torch.tensor([[config.pad_token_id] * pad + ids for pad, (_, ids) in zip(pads, batch, strict=True)])
    input_ids = torch.cat([context.token_ids[None].expand(len(batch), -1), tail], dim=1)
    mask = torch.ones_like(input_ids)
    for row, pad in enumerate(pads):
        mask[row, n : n + pad] = 0
    attention = QuestionAttention(context.layers, context_tokens=n, pads=pads, recipe=recipe)
    strings = StopStringCriteria(loaded.tokenizer, list(generation.stop_strings)) if generation.stop_strings else None
    eos = config.eos_token_id
    finish = _Finish(attention, [eos] if isinstance(eos, int) else eos or [], strings)
    with attending(attention):
        output = loaded.model.generate(
            input_ids.to(loaded.config.device),
            attention_mask=mask.to(loaded.config.device),
            past_key_values=TailCache(len(context.layers), n),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([finish]),
        )
    seconds = (time.perf_counter() - began) / len(batch)
    shares = attention.attended_share
    made = []
    for row, (question, ids) in enumerate(batch):
        answer, n_tokens, finished = _text(
            loaded, output[row, input_ids.shape[1] :].tolist(), finish.eos_ids.tolist(), generation
        )
        made.append(
            _row(context, question, recipe)
            | {
                "status": "ok",
                "answer": answer,
                "finish_reason": "stop" if finished else "length",
                "evidence": spans(attention.mass[row], context.tokens.char_start, context.tokens.char_end),
                "question_tokens": len(ids),
                "answer_tokens": n_tokens,
                "attended_share": float(shares[row]),
                "seconds": seconds,
            }
        )
    return made


def _text(
    loaded: LoadedModel, ids: list[int], eos_ids: list[int], generation: GenerationSettings
) -> tuple[str, int, bool]:
    """Answer without end token and stop string, its tokens, and whether it ended by itself."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    kept = ids if end is None else ids[:end]
    text: str = loaded.tokenizer.decode(kept, skip_special_tokens=True)
    cuts = [at for stop in generation.stop_strings if (at := text.find(stop)) >= 0]
    if cuts:
        return text[: min(cuts)].strip(), len(kept), True
    return text.strip(), len(kept), end is not None


def _generation_config(loaded: LoadedModel, settings: GenerationSettings) -> GenerationConfig:
    """The model's own generation config with the given settings on top. Stop strings are handled by `_Finish`."""
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


def _question_seed(seed: int, question: Row) -> int:
    digest = hashlib.sha256(f"{seed}\0{question.get('question_id')}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big")


def _row(context: OpenContext, question: Row, recipe: Recipe) -> Row:
    return {
        "question_id": question.get("question_id"),
        "document_id": context.manifest.document_id,
        "question": question.get("question"),
        "expected": question.get("expected"),
        "status": "failed",
        "reason": None,
        "answer": None,
        "finish_reason": None,
        "evidence": [],
        "context_tokens": context.manifest.context_tokens,
        "question_tokens": None,
        "answer_tokens": None,
        "attended_share": None,
        "seconds": None,
        "recipe": recipe.method,
        "model": context.loaded.config.name,
        "fingerprint": context.manifest.fingerprint,
    }


def _failed(context: OpenContext, question: Row, recipe: Recipe, reason: str) -> Row:
    return _row(context, question, recipe) | {"reason": reason}
