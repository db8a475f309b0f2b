"""Bytes and requests of an index before it is built: by hand, and against what a build has stored."""

from __future__ import annotations

import pytest

from rabatch.config import BuildConfig
from rabatch.models import ModelGeometry
from rabatch.sizes import index_size
from rabatch.storage.filesystem import PIECE_BYTES

LLAMA_8B = ModelGeometry(n_layers=32, n_kv_heads=8, n_query_heads=32, head_dim=128)
N = 131072


def test_llama_3_8b_by_hand():
    size = index_size(N, LLAMA_8B, (0,) * 32, BuildConfig(), kv_dtype="bfloat16")
    heads = 32 * 8
    assert size.bytes.kv == heads * N * 2 * 128 * 2
    assert size.bytes.graph == heads * (N - 640) * 56  # (32 * (11 low bits + 1) + 63) / 8, rounded up
    assert size.bytes.zones == heads * N * 2  # but fewer zones
    assert size.bytes.codes == pytest.approx(heads * N * 32, rel=0.06)
    assert size.indexed == heads * (N - 640)
    assert size.bytes.parquet < 0.001 * size.bytes.total
    part = size.bytes.total / heads  # a KV head at a time: two would not fit a row between actors
    assert size.requests.put == heads + 2
    assert size.requests.get == pytest.approx(2 + heads * (part // PIECE_BYTES + 1), rel=0.01)


def test_what_is_not_built_takes_nothing():
    plain = index_size(N, LLAMA_8B, (0,) * 32, BuildConfig(index="none"), kv_dtype="bfloat16").bytes
    assert (plain.graph, plain.codes, plain.zones) == (0, 0, 0)
    scan = index_size(N, LLAMA_8B, (0,) * 32, BuildConfig(index="scan", zone_tokens=0), kv_dtype="float32").bytes
    assert (scan.graph, scan.zones) == (0, 0)
    assert scan.kv == pytest.approx(2 * plain.kv, rel=0.01)


def test_a_sliding_layer_stores_its_window():
    size = index_size(N, LLAMA_8B, (4096, 0) * 16, BuildConfig(), kv_dtype="bfloat16")
    assert size.bytes.kv == 16 * 8 * (N + 4096) * 2 * 128 * 2
    assert size.indexed == 16 * 8 * (N - 640)


def test_a_streaming_head_stores_the_static_set():
    pattern = [[1.0, 0.0] * 4] * 16 + [[1.0] * 8] * 16  # every second head of half of the layers streams
    build = BuildConfig(head_pattern=pattern, head_threshold=0.5)
    size = index_size(N, LLAMA_8B, (0,) * 32, build, kv_dtype="bfloat16")
    kept, streams = 16 * 12, 16 * 4
    assert size.bytes.kv == (kept * N + streams * 640) * 2 * 128 * 2
    assert size.bytes.graph == kept * (N - 640) * 56
    assert size.indexed == kept * (N - 640)
    assert size.requests.put == kept + streams + 2


def test_a_build_stores_what_was_reckoned(demo_store):
    from rabatch.storage.store import IndexStore

    build = BuildConfig(**demo_store.static_set)
    for manifest in IndexStore(demo_store.store).manifests():
        shape = manifest.geometry
        model = ModelGeometry(shape.n_layers, shape.n_kv_heads, shape.n_query_heads, shape.head_dim)
        size = index_size(manifest.context_tokens, model, shape.sliding_windows, build, kv_dtype=shape.kv_dtype)
        assert size.bytes.total == pytest.approx(manifest.stored_bytes, rel=0.05)
        tokens = next(part.bytes for part in manifest.parts if part.kind == "tokens")
        assert size.bytes.tokens == pytest.approx(tokens, rel=0.25)
        assert size.requests.put == len(manifest.parts) + 1
