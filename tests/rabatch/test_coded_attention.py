"""Attention over encoded keys and values: that over the numbers that codes stand for, whoever attends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rabatch.attention.coded import CodedRows
from rabatch.attention.context import QuestionAttention
from rabatch.attention.layer import ContextLayer
from rabatch.attention.seam import AttentionCall
from rabatch.attention.shared import SharedKeys, attend_several
from rabatch.compiling import compiled
from rabatch.config import BuildConfig, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.demo.corpus import generate_document
from rabatch.errors import ConfigError
from rabatch.fingerprint import index_fields
from rabatch.index.machine import add_scaled
from rabatch.index.token_codes import numbers, prefetch_row, sizes, widen_rows
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import bytes_of
from rabatch.storage.codecs import encode
from rabatch.storage.joining import decoded
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from rabatch.storage.summaries import summarise
from tests.rabatch.engine import new_store, store_document
from tests.rabatch.models import save_tiny_model

PAIRS = [("int8", "int8"), ("int8", "kivi2"), ("none", "int4"), ("kivi2", "none")]
FULL = 1 << 20
BUILD = BuildConfig(sink_tokens=8, window_tokens=24, query_top_k=16, prefill_chunk_tokens=256)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    return load_model(ModelConfig(name=str(save_tiny_model("llama", folder / "model")), device="cpu", dtype="float32"))


@pytest.fixture(scope="module", params=PAIRS, ids="/".join)
def stored(
    request: pytest.FixtureRequest, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[IndexStore, Manifest]:
    """A document of some hundred tokens under one pair of codecs."""
    keys, values = request.param
    store = new_store(tmp_path_factory.mktemp("store"))
    document, _ = generate_document(document_id="d", tokens=300, n_questions=2, seed=5)
    build = dataclasses.replace(BUILD, key_codec=keys, value_codec=values)
    return store, store_document(loaded, store, document["text"], build)


def opened(stored: tuple[IndexStore, Manifest], loaded: LoadedModel, recipe: Recipe) -> OpenContext:
    return open_context(*stored, loaded, recipe)


def plain(layer: ContextLayer) -> ContextLayer:
    """The layer of what its codes stand for."""
    keys, values = layer.whole()
    return dataclasses.replace(layer, keys=keys, values=values, key_codes=None, value_codes=None)


def attended(
    layer: ContextLayer, loaded: LoadedModel, recipe: Recipe, *, compiled: bool = True, softcap: float | None = None
) -> tuple[torch.Tensor, Any]:
    """Output and what was seen of two questions of three tokens."""
    attention = QuestionAttention([layer], context_tokens=layer.context_tokens, slots=2, recipe=recipe)
    attention.compiled = compiled
    make = torch.Generator().manual_seed(3)
    heads, n_kv, dim = loaded.geometry.n_query_heads, layer.n_kv_heads, layer.shape[2]
    spread = float(layer.whole()[0].std())
    query = 2 / spread / dim**0.5 * torch.randn((2, heads, 3, dim), generator=make)
    own = [torch.randn((2, n_kv, 3, dim), generator=make) * spread for _ in range(2)]
    attention.begin(0, [3, 3], question=True)
    out = attention.attend(AttentionCall(0, query, *own, 1.0, softcap, 0))
    return out, attention.seen(1)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("method", ["dense", "flat", "graph", "scan"])
def test_full_budget_equals_dense_over_what_codes_stand_for(
    stored: tuple, loaded: LoadedModel, method: str, softcap: float | None
) -> None:
    recipe = Recipe(method=method, top_k=FULL)
    layer = opened(stored, loaded, recipe).layers[0]
    found, seen = attended(layer, loaded, recipe, softcap=softcap)
    expected, _ = attended(plain(layer), loaded, Recipe(method="dense"), softcap=softcap, compiled=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert seen.attended_share == pytest.approx(1)


@pytest.mark.parametrize("method", ["streaming", "dense", "flat", "graph", "scan"])
def test_torch_attends_codes_as_the_kernels_do(stored: tuple, loaded: LoadedModel, method: str) -> None:
    recipe = Recipe(method=method, top_k=20)
    layer = opened(stored, loaded, recipe).layers[1]
    found, seen = attended(layer, loaded, recipe)
    expected, by_torch = attended(layer, loaded, recipe, compiled=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert seen.attended_share == pytest.approx(by_torch.attended_share)
    # Zones of codes are those of the numbers.
    again, _ = attended(dataclasses.replace(plain(layer), indexes=layer.indexes), loaded, recipe)
    torch.testing.assert_close(found, again, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["dense", "graph"])
def test_streaming_heads_lie_beside_codes(loaded: LoadedModel, tmp_path: Path, method: str) -> None:
    """They hold the static set alone, which is never encoded."""
    document, _ = generate_document(document_id="d", tokens=300, n_questions=2, seed=5)
    pattern = [[True, False] for _ in range(loaded.geometry.n_layers)]
    build = dataclasses.replace(BUILD, key_codec="int8", value_codec="kivi2", head_pattern=pattern)
    store = new_store(tmp_path)
    manifest = store_document(loaded, store, document["text"], build)
    assert {(part.key_codec, part.value_codec) for part in manifest.parts} == {("none", "none"), ("int8", "kivi2")}
    recipe = Recipe(method=method, top_k=FULL)  # type: ignore[arg-type]
    layer = opened((store, manifest), loaded, recipe).layers[0]
    assert layer.streaming is not None
    assert (layer.streaming.key_codes, layer.key_codes is None) == (None, False)
    found, _ = attended(layer, loaded, recipe)
    expected, _ = attended(plain(layer), loaded, Recipe(method="dense"), compiled=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_codes_are_close_to_what_was_encoded(stored: tuple, loaded: LoadedModel, tmp_path: Path) -> None:
    """With every score off by at most e, weights change by at most a factor of exp(2 e)."""
    document, _ = generate_document(document_id="d", tokens=300, n_questions=2, seed=5)
    store = new_store(tmp_path)
    exact = store_document(loaded, store, document["text"], BUILD)
    recipe = Recipe(method="dense")
    layer, other = opened(stored, loaded, recipe).layers[0], opened((store, exact), loaded, recipe).layers[0]
    (keys, values), (true_keys, true_values) = layer.whole(), (t.float() for t in (other.keys, other.values))
    assert torch.equal(layer.static.keys, other.static.keys)
    make = torch.Generator().manual_seed(4)
    spread = 2 / float(true_keys.std()) / keys.shape[2] ** 0.5
    rows = spread * torch.randn(keys.shape[0], 9, keys.shape[2], generator=make)
    options: dict[str, Any] = {"top_k": 1, "scaling": 1.0, "softcap": None}
    out, _, _ = attend_several(rows, layer.shared, **options)
    expected, _, _ = attend_several(rows, other.shared, **options)
    off = (rows @ (keys - true_keys).transpose(1, 2)).abs().amax(-1, keepdim=True)
    bound = (values - true_values).abs().amax((1, 2))[:, None, None] + torch.expm1(2 * off) * true_values.abs().max()
    assert ((out.out - expected.out).abs() <= bound + 1e-5).all()
    assert (keys - true_keys).abs().max() > 0 or "none" in stored[1].codecs


def test_memory_counts_codes(stored: tuple, loaded: LoadedModel) -> None:
    layer = opened(stored, loaded, Recipe(method="graph")).layers[0]
    whole = plain(layer)
    if layer.value_codes is not None:
        assert bytes_of(layer.value_codes) < bytes_of(layer.value_codes.decoded()) / 3
    held = layer.keys, layer.values, layer.key_codes, layer.value_codes
    smaller = bytes_of(held) < bytes_of((whole.keys, whole.values))
    assert smaller == (layer.key_codes is not None or layer.value_codes is not None)


def test_lists_show_codecs(stored: tuple) -> None:
    _, manifest = stored
    assert summarise(manifest, "")["dtype"] == f"float32 {manifest.codecs}"
    assert manifest.fingerprint_fields["build"].items() >= {"kv_dtype": "float32"}.items()


def test_fingerprints(loaded: LoadedModel) -> None:
    """No codec is what was built before there were codecs; each other choice is another index."""
    config = loaded.config
    fields = index_fields(config, BuildConfig())
    assert not [name for name in fields["build"] if "codec" in name]
    choices = [("key_codec", c) for c in ("int8", "int4", "kivi2")] + [("value_codec", c) for c in ("int8", "kivi2")]
    others = [index_fields(config, BuildConfig(**{name: codec})) for name, codec in choices]
    assert all(other != fields for other in others)
    assert len({str(other) for other in others}) == len(others)
    with pytest.raises(ConfigError, match="value_codec"):
        BuildConfig(value_codec="int2")


@pytest.mark.parametrize("dim", [16, 33, 80, 128])
@pytest.mark.parametrize("codec", ["int8", "int4", "kivi2"])
def test_kernels_read_what_torch_and_the_format_do(codec: str, dim: int) -> None:
    x = np.random.default_rng(dim).standard_normal((2, 37, dim), np.float32)
    coded = encode(x, codec, "value")
    rows = CodedRows.of(coded, 5, "cpu")
    kernel, scale, center = rows.kernel, *(t.numpy() for t in rows.affine)
    expected = rows.decoded().numpy()
    assert np.abs(expected - x).max() < 1.5
    sums, wide = np.zeros(dim, np.float32), np.full(37 * 144, 7, np.float32)
    _both(kernel, kernel.reshape(2, -1) if codec == "int8" else kernel, 1, sums, wide, 144, dim)
    np.testing.assert_allclose(sums * scale[1] + 3 * center[1], expected[1, [4, 36, 36]].sum(0), atol=1e-4)
    written = wide.reshape(37, 144)
    np.testing.assert_allclose(written[:, :dim] * scale[1] + center[1], expected[1], atol=1e-5)
    assert (written[:, dim:] == 7).all()
    if codec != "int8":
        assert sizes(kernel) == (37, dim)
        naive = np.stack([numbers(kernel, 1, key) for key in range(37)])
        np.testing.assert_allclose(naive * scale[1] + center[1], expected[1], atol=1e-5)
        plainly = np.zeros(37 * dim, np.float32)
        widen_rows(plainly, dim, kernel, 1, 0, 37, dim, False)
        np.testing.assert_allclose(plainly.reshape(37, dim), naive)
    np.testing.assert_array_equal(rows.numbers(1, torch.tensor([[9, 41]])).numpy(), expected[1, [[4, 36]]])


@compiled
def _both(values, flat, head, sums, wide, step, dim):  # type: ignore[no-untyped-def]
    prefetch_row(values, head, 4)
    add_scaled(sums, values, head, 4, np.float32(1), False)
    add_scaled(sums, values, head, 36, np.float32(2), False)
    widen_rows(wide, step, flat, head, 0, 37, dim, False)


def test_an_empty_set_is_left_out() -> None:
    keys = torch.randn(2, 9, 16)
    one = SharedKeys.of(keys, keys)
    none = SharedKeys.of(keys[:, :0], keys[:, :0], rows=torch.arange(0))
    options: dict[str, Any] = {"top_k": 3, "scaling": 1.0, "softcap": None}
    rows = torch.randn(2, 4, 16)
    both = attend_several(rows, [none, one], **options)
    alone = attend_several(rows, [one], **options)
    assert torch.equal(both[0].out, alone[0].out)


def test_decoding_a_block_leaves_what_is_not_encoded(stored: tuple) -> None:
    store, manifest = stored
    block = store.read_layer(manifest, 0)
    whole = decoded(block)
    assert whole.codecs == ("none", "none")
    assert whole.rows == whole.keys.shape[1] == manifest.context_tokens
    assert torch.equal(whole.keys[:, : block.index_start], block.keys[:, : block.index_start])
