"""Prefill: top-k lists and vectors of sampled queries against a naive reference, units, limits."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rabatch import indexing, prefill
from rabatch.attention.sampling import ContextSample
from rabatch.attention.seam import AttentionCall, attending
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.errors import DocumentError, KeysError
from rabatch.fingerprint import index_fields
from rabatch.index.base import QuerySample
from rabatch.index.graph import build_layer
from rabatch.index.links import unreachable
from rabatch.index.profile import GRID
from rabatch.index.zones import partition
from rabatch.indexing import layer_block
from rabatch.loading import LoadedModel, load_model
from rabatch.prefill import prefill_units, run
from rabatch.prompts import EncodedContext
from rabatch.storage.manifest import fingerprint_of
from rabatch.storage.packed_ids import ascending
from rabatch.storage.verify import verify
from rabatch.units import Unit, index_range, unit_array, unit_tensor
from tests.rabatch.engine import new_store, store_document
from tests.rabatch.models import save_tiny_model

BUILD = BuildConfig(sink_tokens=8, window_tokens=40, query_top_k=8, query_share=0.3, prefill_chunk_tokens=97)
SOME = dataclasses.replace(BUILD, sample_vectors=50)
"""Vectors of a part of the sampled queries; the default of `BUILD` is more than this document has."""


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelConfig(device="cpu"))


@pytest.fixture(scope="module")
def text() -> str:
    return str(generate_document(document_id="d", tokens=500, n_questions=1, seed=3)[0]["text"])


def units_of(loaded: LoadedModel, text: str, build: BuildConfig) -> list[Unit]:
    return [unit for _, unit in prefill_units(loaded, [prefill.encode(loaded, "d", text)], build)]


def dense_calls(loaded: LoadedModel, context: EncodedContext) -> dict[int, AttentionCall]:
    """Queries and keys of every layer, from one unchunked pass."""
    calls: dict[int, AttentionCall] = {}

    class Recorder:
        def attend(self, call: AttentionCall) -> torch.Tensor:
            calls[call.layer] = call
            keys, values = (t.repeat_interleave(call.query.shape[1] // t.shape[1], 1) for t in (call.key, call.value))
            logits = call.query @ keys.transpose(2, 3) * call.scaling
            if call.softcap:
                logits = call.softcap * torch.tanh(logits / call.softcap)
            age = torch.arange(logits.shape[2])[:, None] - torch.arange(logits.shape[3])
            hidden = (age < 0) | (age >= (call.sliding_window or len(age)))
            return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(1, 2)

    with torch.inference_mode(), attending(Recorder()):
        loaded.model(torch.from_numpy(context.token_ids).long()[None])
    return calls


@pytest.mark.parametrize("build", [BUILD, SOME], ids=["all", "some"])
def test_lists_are_the_top_keys_of_the_sampled_queries(loaded: LoadedModel, text: str, build: BuildConfig) -> None:
    """Every list is compared, by score, with the ranking that the queries of one unchunked pass give."""
    context = prefill.encode(loaded, "d", text)
    sample = run(loaded, [context], build)[1].contexts[0]
    start, stop = index_range(len(context), build)
    assert len(sample.positions) == pytest.approx(0.3 * (len(context) - start - build.window_tokens), abs=2)
    for layer, call in dense_calls(loaded, context).items():
        n_kv = call.key.shape[1]
        group = call.query.shape[1] // n_kv
        known = sample.has_vector(group)
        rows = [(g, p) for some in (known, ~known) for g in range(group) for p in sample.positions[some].tolist()]
        lists, _ = sample.of_heads(layer, 0, n_kv)
        assert lists.shape == (n_kv, len(rows), build.query_top_k)
        for head in range(n_kv):
            for (g, position), found in zip(rows, lists[head], strict=True):
                visible = call.key[0, head, start : min(stop, position - build.window_tokens + 1)]
                scores = visible @ call.query[0, head * group + g, position]
                best = scores.sort(descending=True).values[: build.query_top_k]
                mine = scores[found[found >= 0].long()]
                torch.testing.assert_close(mine, best, atol=1e-3, rtol=1e-4)
                assert len(set(found[found >= 0].tolist())) == int((found >= 0).sum()) == len(best)


@pytest.mark.parametrize("build", [BUILD, SOME], ids=["all", "some"])
def test_vectors_are_those_of_the_first_lists(loaded: LoadedModel, text: str, build: BuildConfig) -> None:
    """A vector is that of the unchunked pass at its place."""
    context = prefill.encode(loaded, "d", text)
    sample = run(loaded, [context], build)[1].contexts[0]
    for layer, call in dense_calls(loaded, context).items():
        n_kv = call.key.shape[1]
        group = call.query.shape[1] // n_kv
        positions = sample.positions[sample.has_vector(group)]
        _, queries = sample.of_heads(layer, 0, n_kv)
        n_vectors = min(build.sample_vectors // group, len(sample.positions)) * group
        assert queries.shape == (n_kv, n_vectors, call.query.shape[3])
        for head in range(n_kv):
            of_group = call.query[0, head * group : (head + 1) * group]
            torch.testing.assert_close(queries[head], of_group[:, positions].flatten(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sample_vectors", "group", "expected"), [(50, 2, 25), (51, 2, 25), (1, 2, 0), (0, 1, 0), (10**6, 4, 296)]
)
def test_vectors_are_spread_evenly(sample_vectors: int, group: int, expected: int) -> None:
    sample = ContextSample(
        context_tokens=1000,
        index_range=(4, 990),
        window_tokens=10,
        query_share=0.3,
        top_k=4,
        sample_vectors=sample_vectors,
    )
    rows = sample.has_vector(group).nonzero()[:, 0]
    assert len(rows) == expected
    if expected:
        edges = torch.cat([-rows[:1] - 1, rows, 2 * len(sample.positions) - rows[-1:]])
        assert edges.diff().max() - edges.diff().min() <= 2


@pytest.mark.parametrize("chunk", [1, 33, 4096])
def test_chunk_size_does_not_change_the_sample(loaded: LoadedModel, text: str, chunk: int) -> None:
    """Neither vectors nor lists, in their order; lists by score, as rounding may swap keys that score alike."""
    text = text[:900] if chunk == 1 else text
    context = prefill.encode(loaded, "d", text)
    for build in (BUILD, SOME):
        one = run(loaded, [context], build)[1].contexts[0]
        cache, capture = run(loaded, [context], dataclasses.replace(build, prefill_chunk_tokens=chunk))
        other = capture.contexts[0]
        n_kv = loaded.geometry.n_kv_heads
        for layer in range(loaded.geometry.n_layers):
            (lists, queries), (other_lists, other_queries) = (found.of_heads(layer, 0, n_kv) for found in (one, other))
            assert 0 < queries.shape[1] <= build.sample_vectors
            torch.testing.assert_close(queries, other_queries, atol=1e-4, rtol=1e-4)
            assert torch.equal(lists < 0, other_lists < 0)
            keys = cache.layers[layer].keys[0, :, build.sink_tokens :]
            scores = queries @ keys.transpose(1, 2)
            mine, theirs = (
                scores.gather(2, ids[:, : queries.shape[1]].clamp_min(0).long()) for ids in (lists, other_lists)
            )
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)
            assert (lists == other_lists).double().mean() > 0.99  # also where the vector is not kept


@pytest.mark.parametrize("build", [BUILD, SOME], ids=["all", "some"])
def test_units_carry_everything_once(
    loaded: LoadedModel, text: str, build: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split into single heads or whole layers: the same keys, values, lists and vectors."""
    whole = units_of(loaded, text, build)
    head_bytes = sum(len(whole[1][name]) for name in ("keys", "values", "lists", "queries"))
    monkeypatch.setattr(prefill, "MAX_UNIT_BYTES", 2 * head_bytes // loaded.geometry.n_kv_heads - 1)
    single = units_of(loaded, text, build)
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
        queries = np.concatenate([unit_array(p["queries"], np.float32) for p in parts])
        np.testing.assert_array_equal(queries, unit_array(unit["queries"], np.float32))
        n_vectors = len(queries) // (shape.n_kv_heads * shape.head_dim)
        assert n_vectors <= build.sample_vectors
        for head, part in enumerate(parts):
            assert (part["head_start"], part["head_stop"]) == (head, head + 1)
            assert len(unit_array(part["queries"], np.float32)) == n_vectors * shape.head_dim


def test_blocks_are_ready_to_search(loaded: LoadedModel, text: str) -> None:
    for unit in units_of(loaded, text, BUILD)[1:]:
        block = layer_block(unit, BUILD)
        start, stop = index_range(unit["context_tokens"], BUILD)
        assert block.neighbors is not None
        assert block.entries is not None
        assert block.neighbors.shape == (loaded.geometry.n_kv_heads, stop - start, BUILD.graph.degree)
        for head in range(loaded.geometry.n_kv_heads):
            assert not len(unreachable(block.neighbors[head], block.entries[head]))


def sample_of(unit: Unit, build: BuildConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indexed keys, lists and vectors of a layer, each [heads, ...]."""
    geometry = json.loads(unit["geometry"])
    heads, dim = unit["head_stop"] - unit["head_start"], geometry["head_dim"]
    start, stop = index_range(unit["context_tokens"], build)
    keys = unit_tensor(unit["keys"], geometry["kv_dtype"], heads, dim)[:, start:stop].float().numpy()
    lists = unit_array(unit["lists"], np.int32).reshape(heads, -1, build.query_top_k)
    return np.ascontiguousarray(keys), lists, unit_array(unit["queries"], np.float32).reshape(heads, -1, dim)


def test_graphs_are_made_of_lists_and_vectors_of_the_same_queries(loaded: LoadedModel, text: str) -> None:
    """Also where a query saw no key of the index: its list and its vector go, and no other."""
    unit = units_of(loaded, text, SOME)[1]
    keys, lists, queries = sample_of(unit, SOME)
    assert 8 < len(queries[0]) < len(lists[0]) - 1
    lists, empty = lists.copy(), [1, 7, len(lists[0]) - 1]
    lists[:, empty] = -1
    block = layer_block({**unit, "lists": lists.tobytes()}, SOME)
    samples = [
        QuerySample(np.delete(ranked, empty, axis=0), np.delete(vectors, empty[:2], axis=0))
        for ranked, vectors in zip(lists, queries, strict=True)
    ]
    assert block.neighbors is not None
    for neighbors, graph in zip(block.neighbors, build_layer(keys, samples, config=SOME.graph), strict=True):
        np.testing.assert_array_equal(neighbors, ascending(graph.neighbors))


def test_threads_do_not_change_graphs(loaded: LoadedModel, text: str) -> None:
    unit = units_of(loaded, text, SOME)[1]
    one, two = layer_block(unit, SOME), layer_block(unit, SOME, threads=2)
    assert one.neighbors is not None
    assert two.neighbors is not None
    np.testing.assert_array_equal(one.neighbors, two.neighbors)


def test_threads_do_not_change_zones_and_profiles(loaded: LoadedModel, text: str) -> None:
    unit = units_of(loaded, text, SOME)[1]
    one, two = layer_block(unit, SOME), layer_block(unit, SOME, threads=2)
    assert one.zones is not None
    assert one.equals(two)


@pytest.mark.parametrize("name", ["demo", "gemma2"])
def test_profiles_are_of_the_latest_vectors(
    name: str, loaded: LoadedModel, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the attention weights of an unchunked pass; a model may have its own scaling, and bound its logits."""
    monkeypatch.setattr(indexing, "PROFILE_POSITIONS", 5)
    if name != "demo":
        loaded = load_model(ModelConfig(name=str(save_tiny_model(name, tmp_path)), device="cpu", dtype="float32"))
    build = dataclasses.replace(SOME, kv_dtype="float32")
    context = prefill.encode(loaded, "d", text)
    units = [unit for _, unit in prefill_units(loaded, [context], build) if unit["unit_kind"] == "layer"]
    sample = run(loaded, [context], build)[1].contexts[0]
    start, stop = index_range(len(context), build)
    compared = 0
    for layer, call in dense_calls(loaded, context).items():
        parts = [layer_block(unit, build) for unit in units if unit["layer"] == layer]
        if call.sliding_window:
            assert all(part.zones is None and part.profile is None for part in parts)
            continue
        n_kv = call.key.shape[1]
        group = call.query.shape[1] // n_kv
        latest = sample.positions[sample.has_vector(group)][-5:].tolist()
        made = np.concatenate([part.profile for part in parts if part.profile is not None])
        assert len(made) == n_kv
        for head in range(n_kv):
            held = np.zeros(1 + len(GRID))
            for query_head, position in itertools.product(range(head * group, (head + 1) * group), latest):
                query = call.query[0, query_head, position].double()
                logits = call.key[0, head, : position + 1].double() @ query * call.scaling
                if call.softcap:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                weights = logits.softmax(0)
                others = weights[start : min(stop, position - build.window_tokens + 1)].sort(descending=True).values
                held += [1 - float(others[count:].sum()) for count in (0, *GRID)]
            np.testing.assert_allclose(made[head], held / (5 * group), atol=1e-4)
            compared += 1
    assert compared
    if name == "gemma2":
        assert any(unit["softcap"] > 0 for unit in units)
        assert all(unit["scaling"] == pytest.approx(32**-0.5) for unit in units)


def test_a_stored_document_has_zones_and_profiles(loaded: LoadedModel, text: str, tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for zone_tokens in (64, 7, 0):
        build = dataclasses.replace(SOME, zone_tokens=zone_tokens)
        manifest = store_document(loaded, store, text, build)
        start, stop = index_range(manifest.context_tokens, build)
        for layer in range(loaded.geometry.n_layers):
            block = store.read_layer(manifest, layer)
            assert block.profile is not None
            assert (block.profile[:, -1] == 1).all()  # fewer keys than the last number of the grid
            assert (block.profile[:, 0] < 1).all()
            if not zone_tokens:
                assert block.zones is None
                continue
            assert block.zones is not None
            keys = block.keys[:, start:stop].float().numpy()
            np.testing.assert_array_equal(block.zones, partition(np.ascontiguousarray(keys), zone_tokens=zone_tokens))
            assert block.zones.max() + 1 <= -(-(stop - start) // zone_tokens)
    assert verify(store) == []


def test_without_vectors(loaded: LoadedModel, text: str, tmp_path: Path) -> None:
    """No vector travels, another graph under another fingerprint comes out, and it answers."""
    bare = dataclasses.replace(BUILD, sample_vectors=0)
    units = units_of(loaded, text, bare)
    assert all(unit["queries"] == b"" for unit in units)
    plain, aligned = layer_block(units[1], bare), layer_block(units_of(loaded, text, BUILD)[1], BUILD)
    assert aligned.neighbors is not None
    assert plain.neighbors is not None
    assert (aligned.neighbors != plain.neighbors).any()
    assert plain.profile is None
    assert plain.zones is not None
    fingerprints = {fingerprint_of(index_fields(loaded.config, build)) for build in (BUILD, SOME, bare)}
    assert len(fingerprints) == 3
    store = new_store(tmp_path)
    manifest = store_document(loaded, store, text, bare)
    assert verify(store) == []
    context = open_context(store, manifest, loaded, Recipe())
    questions = [{"question_id": "q", "question": "What?"}]
    row = answer_batch(context, questions, Recipe(), GenerationSettings(max_new_tokens=4))[0]
    assert row["status"] == "ok", row["reason"]


def test_a_prefill_that_overflowed_is_named(loaded: LoadedModel, text: str) -> None:
    unit = units_of(loaded, text, SOME)[1]
    for name, dtype in (("queries", torch.float32), ("keys", torch.bfloat16), ("values", torch.bfloat16)):
        states = torch.frombuffer(bytearray(unit[name]), dtype=dtype).clone()
        states[len(states) // 3] = torch.inf  # not in the static set
        with pytest.raises(KeysError, match="overflowed"):
            layer_block({**unit, name: states.view(torch.uint8).numpy().tobytes()}, SOME)


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
        prefill.encode(short, "long", "The mill is old. " * 200)
