"""Recipe ``auto``: which way of attending a context is faster here, by times taken on this machine."""

from __future__ import annotations

import dataclasses
import logging
import math
import time

import torch

from rabatch.attention.context import QuestionAttention
from rabatch.attention.layer import ContextLayer
from rabatch.attention.seam import AttentionCall
from rabatch.config import Recipe
from rabatch.contexts import OpenContext
from rabatch.traits import Method

_log = logging.getLogger(__name__)
_FOR_SPEED: tuple[Method, ...] = ("graph", "scan")  # beside dense
_QUESTION_TOKENS = 16  # of the questions by which `question_attention` is chosen
_QUESTIONS = 4  # at most so many of them at once: by then time grows with their number
_REPEATS = 3
_seconds: dict[tuple[object, ...], float] = {}  # one process, one machine


def chosen(context: OpenContext, recipe: Recipe, *, questions: int) -> Recipe:
    """The recipe with every ``auto`` settled that is a matter of speed: `method` and `question_attention`.

    Times are taken of one pass over a layer of each kind, once per process for contexts of about the same length
    (within a factor of 1.4) and the same number of questions.

    Args:
        context: Opened for `recipe`.
        questions: Decoded together.
    """
    if recipe.method == "auto":
        held = [method for method in _FOR_SPEED if context.manifest.geometry.holds(method)]
        options = [dataclasses.replace(recipe, method=method) for method in ("dense", *held)]
        recipe = options[0]
        if held:
            recipe = min(options, key=lambda option: _pass_seconds(context, option, questions, 1))
            _log.info("auto: %s for %d questions of %s", recipe.method, questions, context.manifest.document_id)
    if recipe.question_attention == "auto":
        several = min(questions, _QUESTIONS)
        options = [dataclasses.replace(recipe, question_attention=how) for how in ("exact", "index")]
        if recipe.method not in ("dense", "streaming") and not recipe.traits.observes_questions:
            options.sort(key=lambda option: _pass_seconds(context, option, several, _QUESTION_TOKENS))
        recipe = options[0]
        _log.info("auto: questions of %s attend by %s", context.manifest.document_id, recipe.question_attention)
    return recipe


def _pass_seconds(context: OpenContext, recipe: Recipe, questions: int, q_tokens: int) -> float:
    """Seconds that all full-attention layers of a context take of a pass."""
    total = 0.0
    shape = context.loaded.geometry
    device, settings = context.loaded.config.device, dataclasses.astuple(recipe)
    for number, window in enumerate(context.manifest.geometry.sliding_windows):
        if window:
            continue
        layer = context.layers[number]
        length = round(2 * math.log2(layer.context_tokens))
        kinds = tuple((len(group.keys), group.left_out > 0) for group in layer.groups)
        held = layer.keys.dtype, *(c and c.codec for c in (layer.key_codes, layer.value_codes))
        key = (length, kinds, tuple(layer.indexes), shape, held, settings, questions, q_tokens, device)
        if key not in _seconds:
            _seconds[key] = layer_seconds(
                layer, recipe, n_query_heads=shape.n_query_heads, questions=questions, q_tokens=q_tokens, device=device
            )
        total += _seconds[key]
    return total


def layer_seconds(
    layer: ContextLayer, recipe: Recipe, *, n_query_heads: int, questions: int, q_tokens: int, device: str
) -> float:
    """Seconds of one attention call of questions over a layer, the least of several, with random queries.

    Args:
        q_tokens: New tokens of each question; more than 1: they are the question's.
    """
    n_kv, dim = layer.n_kv_heads, layer.keys.shape[2]
    tokens = layer.context_tokens
    attention = QuestionAttention([layer], context_tokens=tokens, slots=questions, recipe=recipe, device=device)
    make = torch.Generator().manual_seed(0)
    spread = float(layer.keys[:, -256:].float().std())
    query = spread * torch.randn((questions, n_query_heads, q_tokens, dim), generator=make)
    own = torch.randn((questions, n_kv, q_tokens, dim), generator=make).to(device)
    call = AttentionCall(0, query.to(device), own, own, dim**-0.5, None, 0)
    least = math.inf
    for _ in range(_REPEATS):
        attention.begin(0, [q_tokens] * questions, question=q_tokens > 1)
        _wait(device)
        began = time.perf_counter()
        attention.attend(call)
        _wait(device)
        least = min(least, time.perf_counter() - began)
    return least


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
