"""Each selector against what its paper says, computed naively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabatch.attention.capture import PrefillCapture
from rabatch.attention.context import QuestionAttention
from rabatch.attention.layer import ContextLayer
from rabatch.attention.outbox import Outbox
from rabatch.attention.sampling import ContextSample
from rabatch.attention.seam import AttentionCall
from rabatch.attention.selection import Asked
from rabatch.attention.sets import Found
from rabatch.config import BuildConfig, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.demo.corpus import generate_document
from rabatch.errors import ConfigError, FingerprintError, ModelError
from rabatch.index.base import QuerySample
from rabatch.index.baselines.vamana import VamanaIndex
from rabatch.index.codes import KeyCodes, encode
from rabatch.loading import load_model
from rabatch.selectors.infinigen import ALPHA, InfinigenIndex, InfinigenSelection, attention_modules
from rabatch.selectors.listed import ListedKeys
from rabatch.selectors.opening import Opening
from rabatch.selectors.quest import PAGE_KEYS, QuestIndex
from rabatch.selectors.snapkv import KERNEL_KEYS, WINDOW_TOKENS, SnapKvSelection
from rabatch.selectors.vamana import open_vamana
from rabatch.storage.blocks import LayerBlock
from tests.rabatch.engine import new_store, store_document, tail_logits
from tests.rabatch.models import save_tiny_model

BUILD = BuildConfig(sink_tokens=8, window_tokens=32, kv_dtype="float32", query_top_k=16)


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("n_keys", [7, 64, 75])
def test_quest_takes_the_pages_that_could_score_most(n_keys: int, dtype: str) -> None:
    keys = KeyCodes("float32", random(2, n_keys, 6))
    if dtype == "bfloat16":
        keys = KeyCodes("bfloat16", (keys.codes.view(np.uint32) >> 16).astype(np.uint16))
    if dtype == "int8":
        ones = np.ones((2, 6), np.float32)
        keys = KeyCodes("int8", (keys.codes * 40).astype(np.int8), ones / 40, ones * 0.1)
    queries, k = random(2, 9, 6, seed=1), 2 * PAGE_KEYS
    found = QuestIndex(keys).search(queries, k=k)
    for head in range(2):
        pages = [keys.decode()[head, start : start + PAGE_KEYS] for start in range(0, n_keys, PAGE_KEYS)]
        for row, query in enumerate(queries[head]):
            bounds = [(page.min(axis=0), page.max(axis=0)) for page in pages]
            scores = [sum(max(q * a, q * b) for q, a, b in zip(query, low, high, strict=True)) for low, high in bounds]
            best = np.argsort(scores)[::-1][:2]
            wanted = {i for page in best for i in range(page * PAGE_KEYS, min((page + 1) * PAGE_KEYS, n_keys))}
            ids = found.ids[head, row]
            assert set(ids[ids >= 0].tolist()) == wanted
            assert (ids >= 0).sum() == len(wanted)
            exact = keys.decode()[head, ids[ids >= 0]] @ query
            np.testing.assert_allclose(found.scores[head, row, : len(wanted)], exact, atol=1e-5)
            assert (np.diff(exact) <= 1e-6).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_snapkv_keeps_what_the_end_of_the_question_attends(softcap: float | None) -> None:
    """Two questions, one longer than the window; then each attends static set, its own keys and its tail."""
    n_kv, group, dim, tokens, start, stop, k = 2, 3, 8, 90, 6, 80, 7
    keys, values = (torch.from_numpy(random(n_kv, tokens, dim, seed=seed)) for seed in (1, 2))
    index = ListedKeys(KeyCodes("float32", np.ascontiguousarray(keys[:, start:stop].numpy())))
    layer = ContextLayer(keys, values, 0, start, stop, np.full(n_kv, k), {"snapkv": index})
    selection = SnapKvSelection("snapkv")
    recipe = Recipe(method="snapkv", top_k=k)
    attention = QuestionAttention([layer], context_tokens=tokens, slots=2, recipe=recipe, selection=selection)
    counts = [WINDOW_TOKENS + 8, 5]
    asked, own_keys, own_values = (
        torch.from_numpy(random(2, heads, counts[0], dim, seed=seed))
        for heads, seed in ((n_kv * group, 3), (n_kv, 4), (n_kv, 5))
    )
    attention.begin(0, counts, question=True)
    attention.attend(AttentionCall(0, asked, own_keys, own_values, 0.7, softcap, 0))
    attention.finish()

    def logits(query: Tensor, to: Tensor) -> Tensor:
        raw = (to.double() @ query.double()) * 0.7
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    kept: list[list[list[int]]] = []
    for slot, count in enumerate(counts):
        kept.append([])
        for head in range(n_kv):
            mass = torch.zeros(stop - start, dtype=torch.float64)
            for g in range(group):
                for token in range(max(count - WINDOW_TOKENS, 0), count):
                    seen = torch.cat([keys[head], own_keys[slot, head, : token + 1]])
                    mass += logits(asked[slot, head * group + g, token], seen).softmax(0)[start:stop]
            around = KERNEL_KEYS // 2
            means = [mass[max(i - around, 0) : i + around + 1].sum() / KERNEL_KEYS for i in range(stop - start)]
            kept[-1].append(sorted(torch.stack(means).topk(k).indices.tolist()))
            assert sorted(selection._kept[slot][0, 0][head].tolist()) == kept[slot][head]

    step, key, value = (
        torch.from_numpy(random(2, heads, 1, dim, seed=seed))
        for heads, seed in ((n_kv * group, 6), (n_kv, 7), (n_kv, 8))
    )
    attention.begin(0, [1, 1], question=False)
    out = attention.attend(AttentionCall(0, step, key, value, 0.7, softcap, 0))
    for slot, count in enumerate(counts):
        for head in range(n_kv):
            rows = [*range(start), *(start + i for i in kept[slot][head]), *range(stop, tokens)]
            seen, theirs = (
                torch.cat([states[head, rows], own[slot, head, :count], new[slot, head]])
                for states, own, new in ((keys, own_keys, key), (values, own_values, value))
            )
            for g in range(group):
                weights = logits(step[slot, head * group + g, 0], seen).softmax(0)
                expected = (weights @ theirs.double()).float()
                torch.testing.assert_close(out[slot, 0, head * group + g], expected, atol=1e-5, rtol=1e-5)


def test_snapkv_goes_along_when_a_question_changes_its_slot() -> None:
    selection = SnapKvSelection("snapkv")
    first, second = ({(0, 0): np.full((1, 1), i, np.int32)} for i in (0, 1))
    selection._kept = {0: first, 1: second}
    selection.move(1, 0)
    assert selection._kept == {0: second}
    selection.clear(0)
    assert selection._kept == {}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [25, 1000])
def test_h2o_sums_the_attention_of_the_sampled_queries(chunk: int, softcap: float | None) -> None:
    """Two contexts in one row of tokens, whose border a chunk crosses."""
    n_kv, group, dim, lengths = 2, 2, 8, (60, 45)
    ranges = [(4, length - 12) for length in lengths]
    contexts = [
        ContextSample(
            context_tokens=length, index_range=index_range, window_tokens=12, query_share=0.5, top_k=4, sample_vectors=8
        )
        for length, index_range in zip(lengths, ranges, strict=True)
    ]
    capture = PrefillCapture(contexts, Outbox(torch.device("cpu")), key_mass=True)
    total = sum(lengths)
    query = torch.from_numpy(random(1, n_kv * group, total, dim, seed=1))
    key, value = (torch.from_numpy(random(1, n_kv, total, dim, seed=seed)) for seed in (2, 3))
    for first in range(0, total, chunk):
        capture.chunk_start = first
        stop = min(first + chunk, total)
        capture.attend(AttentionCall(0, query[:, :, first:stop], key[:, :, :stop], value[:, :, :stop], 0.6, softcap, 0))
    begin = 0
    for context, (start, stop) in zip(contexts, ranges, strict=True):
        found = context.mass_of_heads(0, 0, n_kv)
        expected = torch.zeros(n_kv, stop - start, dtype=torch.float64)
        for position in context.positions.tolist():
            for head in range(n_kv * group):
                seen = key[0, head // group, begin : begin + position + 1].double()
                raw = seen @ query[0, head, begin + position].double() * 0.6
                raw = raw if softcap is None else softcap * torch.tanh(raw / softcap)
                weights = torch.nn.functional.pad(raw.softmax(0), (0, context.context_tokens - position - 1))
                expected[head // group] += weights[start:stop]
        assert len(context.positions) > 5
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        begin += context.context_tokens


def test_infinigen_with_all_columns_and_the_true_query_finds_the_best() -> None:
    keys, queries, scaling = KeyCodes("float32", 2 * random(2, 300, 12)), 2 * random(2, 9, 12, seed=1), 0.5
    exact = np.einsum("hqd,hkd->hqk", queries, keys.codes)
    found = InfinigenIndex(keys, columns=1.0).choose(queries, queries, k=20, scaling=scaling)
    cut = 0
    for head in range(2):
        for row in range(9):
            order = np.argsort(-exact[head, row])[:20]
            near = order[exact[head, row, order] * scaling >= exact[head, row].max() * scaling - ALPHA]
            cut += len(near) < 20
            ids = found.ids[head, row]
            assert set(ids[ids >= 0].tolist()) == set(near.tolist())
            np.testing.assert_allclose(found.scores[head, row, : len(near)], exact[head, row, near], atol=1e-4)
    assert 0 < cut < 18  # some searches end by the distance from the best, some by the number


def test_infinigen_scores_by_the_columns_in_which_keys_reach_farthest() -> None:
    keys = random(1, 200, 10)
    rotation = np.linalg.qr(random(10, 10, seed=3))[0].astype(np.float32)
    spread = (keys * np.array([9, 7, 5, *[1e-5] * 7], np.float32)) @ rotation
    index = InfinigenIndex(KeyCodes("float32", spread), columns=0.3)
    queries = random(1, 6, 10, seed=4)
    found, exact = index.search(queries, k=5), np.einsum("hqd,hkd->hqk", queries, spread)
    np.testing.assert_array_equal(found.ids, np.argsort(-exact, axis=2)[:, :, :5])  # the other columns hold nothing
    np.testing.assert_allclose(found.scores, np.take_along_axis(exact, found.ids.astype(int), 2), atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "phi3", "gemma2"])
def test_infinigen_foresees_the_query_of_the_input_it_is_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given each layer's own input, what it foresees is that layer's query: projection, norm and rotation."""
    loaded = load_model(ModelConfig(name=str(save_tiny_model(name, tmp_path / "model")), device="cpu", dtype="float32"))
    document, _ = generate_document(document_id="d", tokens=250, n_questions=2, seed=5)
    store = new_store(tmp_path)
    manifest = store_document(loaded, store, document["text"], BUILD)
    enter, find = InfinigenSelection._enter, InfinigenSelection.find
    differences: dict[bool, list[float]] = {True: [], False: []}
    own_input = [True]

    def looking(self: InfinigenSelection, asked: Asked) -> Found:
        assert self._foreseen is not None
        differences[own_input[0]].append(float((self._foreseen[1] - asked.call.query).abs().max()))
        return find(self, asked)

    def given(self: InfinigenSelection, number: int, module: Any, args: Any, kwargs: Any) -> None:
        self._before = kwargs["hidden_states"] if own_input[0] else self._before
        enter(self, number, module, args, kwargs)

    monkeypatch.setattr(InfinigenSelection, "find", looking)
    monkeypatch.setattr(InfinigenSelection, "_enter", given)
    recipe = Recipe(method="infinigen", top_k=20)
    for own_input[0] in (True, False):
        tail_logits(open_context(store, manifest, loaded, recipe), [[7, 8, 9], [3] * 12], recipe, 2)
    assert max(differences[True]) < 1e-5
    assert min(differences[False]) > 1e-3
    assert not any(module._forward_pre_hooks for module in attention_modules(loaded.model, 3))


def test_infinigen_refuses_a_model_whose_attention_it_cannot_tell() -> None:
    with pytest.raises(ModelError, match="self_attn"):
        attention_modules(torch.nn.ModuleList([torch.nn.Linear(2, 2)]), 1)


def test_recipes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dense_layers"):
        Recipe(method="infinigen", dense_layers=0)
    with pytest.raises(ConfigError, match="key_mass"):
        BuildConfig(key_mass=True, index="none")
    for impossible in ({"index": "none"}, {"sample_vectors": 0}):
        with pytest.raises(ConfigError, match="query_vectors"):
            BuildConfig(query_vectors=True, **impossible)  # type: ignore[arg-type]
    loaded = load_model(ModelConfig(name=str(save_tiny_model("llama", tmp_path / "model")), device="cpu"))
    document, _ = generate_document(document_id="d", tokens=250, n_questions=2, seed=5)
    store = new_store(tmp_path)
    manifest = store_document(loaded, store, document["text"], BUILD)
    for method, needed in (("h2o", "--key-mass"), ("vamana", "--query-vectors")):
        with pytest.raises(FingerprintError, match=needed):
            open_context(store, manifest, loaded, Recipe(method=method))  # type: ignore[arg-type]


def test_vamana_is_stitched_through_the_stored_queries() -> None:
    """Few keys lie where queries look, so that what queries know changes the graph: it is that of the index library."""
    rng = np.random.default_rng(0)
    keys, queries = (rng.standard_normal((2, n, 16)).astype(np.float32) for n in (900, 60))
    block = LayerBlock(
        layer=0,
        head_start=0,
        positions=np.arange(900, dtype=np.int32),
        keys=torch.from_numpy(keys),
        values=torch.from_numpy(keys),
        queries=torch.from_numpy(queries),
    )
    opening = Opening(Recipe(method="vamana"), block, np.arange(2), encode(keys), 1)
    samples = [QuerySample(np.empty((60, 0), np.int32), of_head) for of_head in queries]
    asked = rng.standard_normal((2, 20, 16)).astype(np.float32)
    found = open_vamana(opening).search(asked, k=10)
    wanted = VamanaIndex.build(keys, samples).search(asked, k=10, effort=200)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.visited, wanted.visited)
    none = [QuerySample(np.empty((0, 0), np.int32))] * 2
    assert not np.array_equal(found.visited, VamanaIndex.build(keys, none).search(asked, k=10, effort=200).visited)


@pytest.mark.parametrize("name", ["key_mass", "query_vectors"])
def test_what_few_methods_need_is_part_of_the_fingerprint_only_if_it_is_kept(name: str) -> None:
    assert name not in BuildConfig().stored_fields()
    assert BuildConfig(**{name: True}).stored_fields()[name] is True  # type: ignore[arg-type]


def test_dense_layers_are_written_down_only_if_they_are_given() -> None:
    assert "dense_layers" not in Recipe().to_dict()
    given = Recipe(method="quest", dense_layers=0)
    assert Recipe.from_dict(given.to_dict()) == given
