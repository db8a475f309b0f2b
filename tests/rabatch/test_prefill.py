"""Prefill: top-k lists of sampled queries against a naive reference, units, limits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from rabatch import prefill
from rabatch.attention.capture import PrefillCapture
from rabatch.attention.seam import AttentionCall, attending
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.decode import answer_batch, open_context
from rabatch.demo.corpus import generate_document
from rabatch.errors import DocumentError
from rabatch.index.graph import unreachable
from rabatch.indexing import layer_block
from rabatch.loading import LoadedModel, load_model
from rabatch.prefill import prefill_units, run
from rabatch.storage.verify import verify
from rabatch.units import index_range, unit_array, unit_tensor
from tests.rabatch.engine import new_store, store_document

BUILD = BuildConfig(sink_tokens=8, window_tokens=40, query_top_k=8, query_share=0.3, prefill_chunk_tokens=97)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelConfig(device="cpu"))


@pytest.fixture(scope="module")
def text() -> str:
    return str(generate_document(document_id="d", tokens=500, n_questions=1, seed=3)[0]["text"])


def test_lists_are_the_top_keys_of_the_sampled_queries(loaded: LoadedModel, text: str) -> None:
    """Every list is compared, by score, with the ranking that the queries of one unchunked pass give."""
    context = prefill.encode(loaded, "d", text)
    _cache, capture = run(loaded, context, BUILD)
    calls: dict[int, AttentionCall] = {}

    class Recorder(PrefillCapture):
        def attend(self, call: AttentionCall) -> torch.Tensor:
            calls[call.layer] = call
            return super().attend(call)

    start, stop = index_range(len(context), BUILD)
    recorder = Recorder(context_tokens=len(context), index_range=(0, 0), window_tokens=0, query_share=0.1, top_k=1)
    with torch.inference_mode(), attending(recorder):
        loaded.model(torch.from_numpy(context.token_ids).long()[None])
    sampled = capture.sampled
    assert len(sampled) == pytest.approx(0.3 * (len(context) - start - BUILD.window_tokens), abs=2)
    for layer, call in calls.items():
        n_kv = call.key.shape[1]
        group = call.query.shape[1] // n_kv
        lists = capture.lists(layer, 0, n_kv)
        found_all = lists.reshape(n_kv, -1, BUILD.query_top_k)
        # chunks are concatenated: within a chunk the rows are (group, query)
        rows = []
        for first in range(0, len(context), BUILD.prefill_chunk_tokens):
            chosen = sampled[(sampled >= first) & (sampled < first + BUILD.prefill_chunk_tokens)]
            rows += [(g, int(p)) for g in range(group) for p in chosen]
        assert len(rows) == found_all.shape[1]
        for head in range(n_kv):
            for (g, position), found in zip(rows, found_all[head], strict=True):
                visible = call.key[0, head, start : min(stop, position - BUILD.window_tokens + 1)]
                scores = visible @ call.query[0, head * group + g, position]
                best = scores.sort(descending=True).values[: BUILD.query_top_k]
                mine = scores[found[found >= 0].long()]
                torch.testing.assert_close(mine, best, atol=1e-3, rtol=1e-4)
                assert len(set(found[found >= 0].tolist())) == int((found >= 0).sum()) == len(best)


def test_units_carry_everything_once(loaded: LoadedModel, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split into single heads or whole layers: the same keys, values and lists."""
    whole = list(prefill_units(loaded, "d", text, BUILD))
    monkeypatch.setattr(prefill, "MAX_UNIT_BYTES", 1)
    single = list(prefill_units(loaded, "d", text, BUILD))
    shape = loaded.geometry
    assert len(whole) == whole[0]["n_units"] == 1 + shape.n_layers
    assert len(single) == single[0]["n_units"] == 1 + shape.n_layers * shape.n_kv_heads
    assert {tuple(sorted(unit)) for unit in whole + single} == {tuple(sorted(whole[0]))}
    for unit in whole[1:]:
        parts = [u for u in single if u["layer"] == unit["layer"]]
        for name in ("keys", "values"):
            together = torch.cat([unit_tensor(p[name], "bfloat16", 1, shape.head_dim) for p in parts])
            assert torch.equal(together, unit_tensor(unit[name], "bfloat16", shape.n_kv_heads, shape.head_dim))
        lists = np.concatenate([unit_array(p["lists"], np.int32) for p in parts])
        np.testing.assert_array_equal(lists, unit_array(unit["lists"], np.int32))


def test_blocks_are_ready_to_search(loaded: LoadedModel, text: str) -> None:
    for unit in list(prefill_units(loaded, "d", text, BUILD))[1:]:
        block = layer_block(unit, BUILD)
        start, stop = index_range(unit["context_tokens"], BUILD)
        assert block.neighbors is not None
        assert block.entries is not None
        assert block.neighbors.shape == (loaded.geometry.n_kv_heads, stop - start, BUILD.graph.degree)
        for head in range(loaded.geometry.n_kv_heads):
            assert not len(unreachable(block.neighbors[head], block.entries[head]))


@pytest.mark.parametrize("n_words", [1, 3, 60])
def test_documents_shorter_than_the_static_set(loaded: LoadedModel, tmp_path: Path, n_words: int) -> None:
    """They have an empty key index and are answered from the static set."""
    store = new_store(tmp_path)
    manifest = store_document(loaded, store, "mill " * n_words, BuildConfig())
    assert verify(store) == []
    for recipe in (Recipe(), Recipe(method="flat"), Recipe(method="dense")):
        context = open_context(store, manifest, loaded, recipe)
        row = answer_batch(
            context, [{"question_id": "q", "question": "What?"}], recipe, GenerationSettings(max_new_tokens=4)
        )[0]
        assert (row["status"], row["attended_share"]) == ("ok", 1.0), row["reason"]


def test_a_layer_split_by_heads_is_read_whole(
    loaded: LoadedModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads in parts of their own, with entry points of their own number: the same layer comes back."""
    whole = store_document(loaded, store_a := new_store(tmp_path / "a"), text, BUILD)
    monkeypatch.setattr(prefill, "MAX_UNIT_BYTES", 1)
    split = store_document(loaded, store_b := new_store(tmp_path / "b"), text, BUILD)
    assert len(split.parts) > len(whole.parts)
    for layer in range(loaded.geometry.n_layers):
        one, other = store_a.read_layer(whole, layer), store_b.read_layer(split, layer)
        assert torch.equal(one.keys, other.keys)
        assert one.neighbors is not None
        assert other.neighbors is not None
        np.testing.assert_array_equal(one.neighbors, other.neighbors)
        assert one.entries is not None
        assert other.entries is not None
        assert [set(e) for e in one.entries] == [set(e) for e in other.entries]


def test_over_the_models_context(loaded: LoadedModel) -> None:
    short = dataclasses.replace(loaded, max_context_tokens=512)
    with pytest.raises(DocumentError, match="split the document"):
        list(prefill_units(short, "long", "The mill is old. " * 200, BUILD))


def test_memory_of_lists_does_not_depend_on_the_chunk(loaded: LoadedModel, text: str) -> None:
    context = prefill.encode(loaded, "d", text)
    _, small = run(loaded, context, BUILD)
    _, large = run(loaded, context, dataclasses.replace(BUILD, prefill_chunk_tokens=4096))
    for layer in range(loaded.geometry.n_layers):
        assert small.lists(layer, 0, 1).shape == large.lists(layer, 0, 1).shape
