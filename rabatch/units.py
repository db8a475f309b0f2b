"""What travels from prefill to graph construction: one row per (layer, range of KV heads), and how to read it.

Imports no model code, so that an actor that only builds graphs starts fast.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabatch.attention.sampling import ContextSample
from rabatch.config import BuildConfig
from rabatch.storage.manifest import Geometry

Unit = dict[str, Any]
"""An Arrow-able row. `unit_kind` "tokens": token_id, char_start, char_end. "layer": keys, values (bytes of
[heads, rows, head_dim] in `kv_dtype`), lists (bytes of int32 [heads, n_lists, top_k]), queries (bytes of float32
[heads, n_vectors, head_dim], the vectors behind the first `n_vectors` lists: float32 holds every compute dtype exactly,
so a reader need not know it, and beside keys and values they are few), mass (bytes of float32 [heads, index rows], the
attention that the sampled queries gave each key; none unless the build keeps it), scaling (factor on q . k) and softcap
(bound of the logits; 0: none). The heads of a layer's row all stream, and then it has the rows of the static set, no
lists, no queries and no mass; or none of them does."""


def index_range(context_tokens: int, build: BuildConfig) -> tuple[int, int]:
    """Rows of the key index: everything but the static set."""
    start = min(build.sink_tokens, context_tokens)
    return start, max(start, context_tokens - build.window_tokens)


def static_rows(context_tokens: int, build: BuildConfig) -> NDArray[np.int64]:
    """Rows of the static set, ascending: all that is kept of a streaming head."""
    start, stop = index_range(context_tokens, build)
    return np.concatenate([np.arange(start), np.arange(stop, context_tokens)])


def context_sample(context_tokens: int, build: BuildConfig) -> ContextSample:
    """Which queries of a context a build samples; without an index, none."""
    return ContextSample(
        context_tokens=context_tokens,
        index_range=index_range(context_tokens, build) if build.index != "none" else (0, 0),
        window_tokens=build.window_tokens,
        query_share=build.query_share,
        top_k=build.query_top_k,
        sample_vectors=build.sample_vectors,
    )


def unit_tensor(data: bytes, kv_dtype: str, heads: int, head_dim: int) -> Tensor:
    """Bytes of a unit's keys or values as [heads, rows, head_dim]."""
    flat = torch.frombuffer(bytearray(data), dtype=getattr(torch, kv_dtype)) if data else torch.empty(0)
    return flat.view(heads, -1, head_dim)


def unit_array(data: bytes, dtype: type) -> np.ndarray:
    """Bytes of a unit's other columns."""
    return np.frombuffer(data, dtype=dtype)


def read_geometry(text: str) -> Geometry:
    """The geometry a unit carries as JSON."""
    return Geometry.from_dict(json.loads(text))
