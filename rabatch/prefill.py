"""Prefill of one document: chunked, exact, and handed on in rows small enough to travel between actors."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from rabatch.attention.caches import ContextCache
from rabatch.attention.capture import PrefillCapture
from rabatch.attention.seam import attending
from rabatch.config import BuildConfig
from rabatch.errors import DocumentError, ModelError
from rabatch.fingerprint import stored_dtype
from rabatch.loading import LoadedModel
from rabatch.prompts import EncodedContext
from rabatch.storage.manifest import Geometry
from rabatch.units import Unit, index_range

MAX_UNIT_BYTES = 96 << 20
"""Aim for the size of one row between actors; Ray Data wants rows below 128 MiB."""
RESERVED_TOKENS = 256
"""Room that a context leaves for question and answer, at most an eighth of what the model takes."""


def encode(loaded: LoadedModel, document_id: str, text: str) -> EncodedContext:
    """The tokens of a document's context.

    Raises:
        DocumentError: The document is empty or longer than the model can take.
    """
    context = loaded.template.encode_context(loaded.tokenizer, text)
    limit = loaded.max_context_tokens - min(RESERVED_TOKENS, loaded.max_context_tokens // 8)
    if len(context) > limit:
        raise DocumentError(
            "text",
            document_id,
            f"has {len(context)} tokens, the model takes {limit} and a question; split the document",
        )
    return context


@torch.inference_mode()
def run(loaded: LoadedModel, context: EncodedContext, build: BuildConfig) -> tuple[ContextCache, PrefillCapture]:
    """Run the model over the context in chunks; keys and values end up in the cache, sampled queries in the capture."""
    n_tokens = len(context)
    start, stop = index_range(n_tokens, build)
    capture = PrefillCapture(
        context_tokens=n_tokens,
        index_range=(start, stop) if build.index == "graph" else (0, 0),
        window_tokens=build.window_tokens,
        query_share=build.query_share,
        top_k=build.query_top_k,
        sample_vectors=build.sample_vectors,
    )
    cache = ContextCache(loaded.geometry.n_layers, n_tokens)
    ids = torch.from_numpy(context.token_ids).long()[None].to(loaded.config.device)
    with attending(capture):
        for first in range(0, n_tokens, build.prefill_chunk_tokens):
            capture.chunk_start = first
            loaded.model(
                input_ids=ids[:, first : first + build.prefill_chunk_tokens],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    return cache, capture


def prefill_units(loaded: LoadedModel, document_id: str, text: str, build: BuildConfig) -> Iterator[Unit]:
    """Prefill a document and yield it as rows: its tokens, then each layer in ranges of KV heads.

    Raises:
        DocumentError: The document is empty or longer than the model can take.
        ModelError: Keys and values are not shaped as the model's config says.
    """
    began = time.perf_counter()
    context = encode(loaded, document_id, text)
    cache, capture = run(loaded, context, build)
    seconds = time.perf_counter() - began
    geometry = _geometry(loaded, capture, build)
    kv_dtype = getattr(torch, geometry.kv_dtype)
    ranges = [
        (layer, heads) for layer in range(geometry.n_layers) for heads in _head_ranges(cache, capture, layer, kv_dtype)
    ]
    shared = {
        "context_tokens": len(context),
        "geometry": json.dumps(dataclasses.asdict(geometry)),
        "n_units": 1 + len(ranges),
        "prefill_s": seconds,
    }
    yield {
        "unit_kind": "tokens",
        **shared,
        "token_id": context.token_ids.tobytes(),
        "char_start": context.char_start.tobytes(),
        "char_end": context.char_end.tobytes(),
        "layer": -1,
        "head_start": 0,
        "head_stop": 0,
        "keys": b"",
        "values": b"",
        "lists": b"",
        "queries": b"",
    }
    for layer, (head_start, head_stop) in ranges:
        first = _first_row(len(context), geometry.sliding_windows[layer])
        keys, values = cache.states(layer)
        lists, queries = capture.sample(layer, head_start, head_stop)
        yield {
            "unit_kind": "layer",
            **shared,
            "token_id": b"",
            "char_start": b"",
            "char_end": b"",
            "layer": layer,
            "head_start": head_start,
            "head_stop": head_stop,
            "keys": _to_bytes(keys[head_start:head_stop, first:].to(kv_dtype)),
            "values": _to_bytes(values[head_start:head_stop, first:].to(kv_dtype)),
            "lists": lists.numpy().tobytes(),
            "queries": queries.float().numpy().tobytes(),
        }


def _geometry(loaded: LoadedModel, capture: PrefillCapture, build: BuildConfig) -> Geometry:
    shape = loaded.geometry
    return Geometry(
        n_layers=shape.n_layers,
        n_kv_heads=shape.n_kv_heads,
        n_query_heads=shape.n_query_heads,
        head_dim=shape.head_dim,
        kv_dtype=stored_dtype(loaded.config, build),
        sink_tokens=build.sink_tokens,
        window_tokens=build.window_tokens,
        index=build.index,
        degree=build.graph.degree if build.index == "graph" else 0,
        sliding_windows=tuple(capture.windows[layer] for layer in range(shape.n_layers)),
    )


def _first_row(n_tokens: int, sliding_window: int) -> int:
    return max(0, n_tokens - sliding_window) if sliding_window else 0


def _head_ranges(
    cache: ContextCache, capture: PrefillCapture, layer: int, kv_dtype: torch.dtype
) -> list[tuple[int, int]]:
    keys, values = cache.states(layer)
    if keys.shape != values.shape:
        raise ModelError("model", layer, "keys and values of this layer differ in shape; rabatch needs them equal")
    n_heads, n_tokens, head_dim = keys.shape
    rows = n_tokens - _first_row(n_tokens, capture.windows[layer])
    lists, queries = capture.sample(layer, 0, 1)
    head_bytes = rows * head_dim * 2 * kv_dtype.itemsize + lists.nbytes + queries.numel() * torch.float32.itemsize
    step = max(1, MAX_UNIT_BYTES // max(1, head_bytes))
    return [(start, min(start + step, n_heads)) for start in range(0, n_heads, step)]


def _to_bytes(states: Tensor) -> bytes:
    return states.contiguous().cpu().view(torch.uint8).numpy().tobytes()
