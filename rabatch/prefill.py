"""Prefill of documents: chunked, exact, and handed on in rows small enough to travel between actors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rabatch.attention.caches import ContextCache
from rabatch.attention.capture import PrefillCapture
from rabatch.attention.outbox import Outbox
from rabatch.attention.sampling import ContextSample
from rabatch.attention.seam import attending
from rabatch.config import BuildConfig
from rabatch.errors import DocumentError, ModelError
from rabatch.fingerprint import check_heads, stored_dtype
from rabatch.loading import LoadedModel
from rabatch.prompts import EncodedContext
from rabatch.storage.manifest import Geometry
from rabatch.units import Unit, context_sample, static_rows

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
def run(
    loaded: LoadedModel, contexts: Sequence[EncodedContext], build: BuildConfig
) -> tuple[ContextCache, PrefillCapture]:
    """Run the model over contexts, one after the other in chunks that cross their borders; each sees only itself.

    Returns:
        Keys and values of all tokens in that order, and the sampled queries of each context, all of it on the host.
    """
    device = torch.device(loaded.config.device)
    outbox = Outbox(device)
    shape = loaded.geometry
    bare = frozenset(n for n in range(shape.n_layers) if len(build.streaming_heads(n)) == shape.n_kv_heads)
    samples = [context_sample(len(context), build) for context in contexts]
    capture = PrefillCapture(samples, outbox, unsampled=bare, key_mass=build.key_mass)
    lengths = [len(context) for context in contexts]
    stored = getattr(torch, stored_dtype(loaded.config, build))
    cache = ContextCache(shape.n_layers, sum(lengths), outbox, stored)
    ids = torch.from_numpy(np.concatenate([context.token_ids for context in contexts])).long()[None].to(device)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    with attending(capture):
        for first in range(0, sum(lengths), build.prefill_chunk_tokens):
            capture.chunk_start = first
            chunk = slice(first, first + build.prefill_chunk_tokens)
            loaded.model(
                input_ids=ids[:, chunk],
                position_ids=positions[:, chunk],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    cache.leave_device()
    return cache, capture


def prefill_units(
    loaded: LoadedModel, contexts: Sequence[EncodedContext], build: BuildConfig
) -> Iterator[tuple[int, Unit]]:
    """Prefill contexts together and yield each as rows: its tokens, then each layer in ranges of KV heads.

    Many short contexts in one call share forward passes; what is stored of one does not depend on the others beyond
    rounding.

    Yields:
        (number of the context, row).

    Raises:
        ConfigError: The head pattern is one for a model of another shape.
        ModelError: Keys and values are not shaped as the model's config says.
    """
    check_heads(build, loaded.geometry)
    began = time.perf_counter()
    cache, capture = run(loaded, contexts, build)
    per_token = (time.perf_counter() - began) / sum(len(context) for context in contexts)
    start = 0
    for number, context in enumerate(contexts):
        tokens = (start, start + len(context))
        for unit in _units_of(loaded, context, build, cache, tokens, capture.contexts[number], capture):
            yield number, {**unit, "prefill_s": per_token * len(context)}
        start += len(context)


def _units_of(
    loaded: LoadedModel,
    context: EncodedContext,
    build: BuildConfig,
    cache: ContextCache,
    tokens: tuple[int, int],
    sample: ContextSample,
    capture: PrefillCapture,
) -> Iterator[Unit]:
    windows = capture.windows
    geometry = _geometry(loaded, windows, build)
    static = torch.from_numpy(static_rows(len(context), build))
    ranges = [
        (layer, heads, streaming)
        for layer in range(geometry.n_layers)
        for run, streaming in geometry.head_runs(layer)
        for heads in _head_ranges(
            cache, sample, layer, _rows(tokens, windows[layer]), run, len(static) if streaming else None
        )
    ]
    shared = {
        "context_tokens": len(context),
        "geometry": json.dumps(geometry.to_dict()),
        "n_units": 1 + len(ranges),
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
        "mass": b"",
        "scaling": 0.0,
        "softcap": 0.0,
    }
    for layer, (head_start, head_stop), streaming in ranges:
        keys, values = cache.states(layer, *_rows(tokens, windows[layer]), heads=slice(head_start, head_stop))
        lists, queries = sample.of_heads(layer, head_start, head_stop)
        mass = sample.mass_of_heads(layer, head_start, head_stop)
        if streaming:  # the middle of the context ends here, and what was sampled for an index of it
            keys, values = keys[:, static], values[:, static]
            lists, queries, mass = lists[:0], queries[:0], mass[:0]
        yield {
            "unit_kind": "layer",
            **shared,
            "token_id": b"",
            "char_start": b"",
            "char_end": b"",
            "layer": layer,
            "head_start": head_start,
            "head_stop": head_stop,
            "keys": _to_bytes(keys),
            "values": _to_bytes(values),
            "lists": lists.numpy().tobytes(),
            "queries": queries.float().numpy().tobytes(),
            "mass": mass.numpy().tobytes(),
            "scaling": capture.logits[layer][0],
            "softcap": capture.logits[layer][1],
        }


def _geometry(loaded: LoadedModel, windows: dict[int, int], build: BuildConfig) -> Geometry:
    shape = loaded.geometry
    # A natively sliding layer keeps its window, whatever the pattern says of it.
    streaming = tuple(() if windows[layer] else build.streaming_heads(layer) for layer in range(shape.n_layers))
    return Geometry(
        n_layers=shape.n_layers,
        n_kv_heads=shape.n_kv_heads,
        n_query_heads=shape.n_query_heads,
        head_dim=shape.head_dim,
        kv_dtype=stored_dtype(loaded.config, build),
        sink_tokens=build.sink_tokens,
        window_tokens=build.window_tokens,
        index=build.index,
        degree=build.graph.degree if build.builds("graph") else 0,
        sliding_windows=tuple(windows[layer] for layer in range(shape.n_layers)),
        streaming_heads=streaming if any(streaming) else (),
    )


def _rows(tokens: tuple[int, int], sliding_window: int) -> tuple[int, int]:
    """What is stored of a layer: every token, or of a natively sliding one the last that any query can see."""
    start, stop = tokens
    return (max(start, stop - sliding_window) if sliding_window else start), stop


def _head_ranges(
    cache: ContextCache, sample: ContextSample, layer: int, rows: tuple[int, int], run: range, static: int | None
) -> list[tuple[int, int]]:
    """A run of heads in ranges of about `MAX_UNIT_BYTES`; `static` rows of each if they stream."""
    keys, values = cache.states(layer, rows[0], rows[0])
    if keys.shape != values.shape:
        raise ModelError("model", layer, "keys and values of this layer differ in shape; rabatch needs them equal")
    head_bytes = (rows[1] - rows[0] if static is None else static) * keys.shape[2] * 2 * keys.itemsize
    if static is None:
        lists, queries = sample.of_heads(layer, 0, 1)
        mass = sample.mass_of_heads(layer, 0, 1)
        head_bytes += lists.nbytes + mass.nbytes + queries.numel() * torch.float32.itemsize
    step = max(1, MAX_UNIT_BYTES // max(1, head_bytes))
    return [(start, min(start + step, run.stop)) for start in range(run.start, run.stop, step)]


def _to_bytes(states: Tensor) -> bytes:
    return states.contiguous().view(torch.uint8).numpy().tobytes()
