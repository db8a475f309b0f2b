"""Streaming heads, from prefill to answers: they keep the static set only, and attend it and the tail, in every recipe.

The reference is plain transformers with a mask of its own for each head.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from rabatch.attention import overlay
from rabatch.attention.context import QuestionAttention
from rabatch.attention.sets import Found
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.errors import ConfigError
from rabatch.executor import Executor
from rabatch.fingerprint import index_fields
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import bytes_of
from rabatch.prefill import encode, prefill_units, run
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from tests.rabatch.engine import new_store, store_document, tail_logits
from tests.rabatch.models import save_tiny_model

TOLERANCE = 1e-5
FULL = 1 << 20
STEPS = 3
SINK, WINDOW = 8, 32
BUILD = BuildConfig(
    sink_tokens=SINK, window_tokens=WINDOW, kv_dtype="float32", prefill_chunk_tokens=128, query_top_k=16
)
QUESTIONS = ["What is the gate code?", "Who manages the old mill near the river, and why?", "When?"]
RECIPES: list[dict[str, Any]] = [
    {"method": "dense"},
    *({"method": method, "top_k": FULL, "question_attention": "exact"} for method in ("flat", "graph", "scan")),
    *({"method": method, "top_k": FULL, "question_attention": "index"} for method in ("flat", "graph", "scan")),
    {"method": "graph", "top_k": FULL, "question_attention": "index", "budget": "fixed", "estimate": False},
]
# One with GQA (four query heads, two KV heads), one with sliding layers between, and the demo model.
MODELS = ["qwen3", "gemma2", "demo"]
one_model = pytest.mark.parametrize("setting", ["qwen3"], indirect=True, scope="module")
"""Of its three layers one keeps all heads, one some and one none."""
tiny_models = pytest.mark.parametrize("setting", ["qwen3", "gemma2"], indirect=True, scope="module")


class Setting(NamedTuple):
    loaded: LoadedModel
    pattern: list[list[int]]
    store: IndexStore
    manifest: Manifest


def pattern_for(loaded: LoadedModel) -> list[list[int]]:
    """The first layer keeps all, the last none, those between alternate; also where a layer slides by nature."""
    n_layers, n_heads = loaded.geometry.n_layers, loaded.geometry.n_kv_heads
    rows = [[(layer + head) % 2 for head in range(n_heads)] for layer in range(n_layers)]
    rows[0], rows[-1] = [1] * n_heads, [0] * n_heads
    return rows


@pytest.fixture(scope="module", params=MODELS)
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp(request.param)
    name = "demo" if request.param == "demo" else str(save_tiny_model(request.param, folder / "model"))
    loaded = load_model(ModelConfig(name=name, device="cpu", dtype="float32"))
    document, _ = generate_document(document_id="d", tokens=300, n_questions=2, seed=5)
    store, pattern = new_store(folder), pattern_for(loaded)
    build = dataclasses.replace(BUILD, head_pattern=pattern)
    return Setting(loaded, pattern, store, store_document(loaded, store, document["text"], build))


def tails(loaded: LoadedModel) -> list[list[int]]:
    return [loaded.template.encode_question(loaded.tokenizer, question) for question in QUESTIONS]


def reference_logits(setting: Setting, tail: list[int]) -> Tensor:
    """Of a sequence without a cache: [STEPS, vocab]. Context tokens see what the model lets them, tail tokens of a
    streaming head only first and last tokens of the context, and the tail."""
    loaded, pattern, store, manifest = setting
    n = manifest.context_tokens
    middle = torch.zeros(n, dtype=torch.bool)
    middle[SINK : n - WINDOW] = True

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple:
        group = query.shape[1] // key.shape[1]
        window = kwargs.get("sliding_window") or 0
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * kwargs["scaling"]
        if kwargs.get("softcap"):
            scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
        tokens = torch.arange(key.shape[2])
        age = tokens[:, None] - tokens
        hidden = (age < 0) | (age >= (window or len(tokens)))
        hidden = hidden.expand(query.shape[1], -1, -1).clone()
        for head in range(key.shape[1]):
            if not pattern[module.layer_idx][head] and not window:  # type: ignore[index]
                hidden[head * group : (head + 1) * group, n:, :n] |= middle
        out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(group, 1)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_by_head", attend)
    model = AutoModelForCausalLM.from_pretrained(
        loaded.model.name_or_path, dtype=torch.float32, attn_implementation="masked_by_head"
    ).eval()
    ids, found = store.read_tokens(manifest).token_ids.tolist() + tail, []
    for _ in range(STEPS):
        with torch.inference_mode():
            found.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids = [*ids, int(found[-1].argmax())]
    return torch.stack(found)


@pytest.fixture(scope="module")
def expected(setting: Setting) -> list[Tensor]:
    return [reference_logits(setting, tail) for tail in tails(setting.loaded)]


def found_logits(setting: Setting, **recipe: Any) -> Tensor:
    made = Recipe(**recipe)
    context = open_context(setting.store, setting.manifest, setting.loaded, made)
    return tail_logits(context, tails(setting.loaded), made, STEPS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(map(str, r.values())))
def test_full_budget_equals_a_mask_per_head(setting: Setting, expected: list[Tensor], recipe: dict[str, Any]) -> None:
    found = found_logits(setting, **recipe)
    for row, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(row, wanted, atol=TOLERANCE * float(wanted.abs().max()), rtol=TOLERANCE)


@one_model
def test_tails_past_their_limit_are_found_for_either_kind_of_heads(
    setting: Setting, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full budget a private index of the older tail gives back all of it, to each head its own keys."""
    monkeypatch.setattr(overlay, "BLOCK_TOKENS", 1)
    searched = []
    join = overlay.Overlays.join

    def counting(self: overlay.Overlays, layer: int, *args: Any, group: int = 0, **options: Any) -> Found:
        found = join(self, layer, *args, group=group, **options)
        searched.extend([(layer, group)] if bool((found.ids >= options["n_keys"]).any()) else [])
        return found

    monkeypatch.setattr(overlay.Overlays, "join", counting)
    found = found_logits(setting, method="flat", top_k=FULL, tail_tokens=3)
    assert {(0, 0), (1, 0), (1, 1), (2, 0)} == set(searched)
    for row, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(row, wanted, atol=TOLERANCE * float(wanted.abs().max()), rtol=TOLERANCE)


@tiny_models
def test_more_than_the_static_set_would_be_seen(setting: Setting, expected: list[Tensor]) -> None:
    """The comparison above can fail: the model's own attention, in which no head streams, is another."""
    everything = [[1] * len(row) for row in setting.pattern]
    unmasked = [reference_logits(setting._replace(pattern=everything), tail) for tail in tails(setting.loaded)]
    differ = [float((a - b).abs().max()) for a, b in zip(expected, unmasked, strict=True)]
    assert min(differ) > 100 * TOLERANCE


@tiny_models
def test_units_hold_nothing_beyond_the_static_set(setting: Setting) -> None:
    """And no lists; where a whole layer streams, none are made."""
    loaded, pattern, _, manifest = setting
    document, _ = generate_document(document_id="d", tokens=300, n_questions=2, seed=5)
    build = dataclasses.replace(BUILD, head_pattern=pattern)
    context = encode(loaded, "d", document["text"])
    cache, capture = run(loaded, [context], build)
    shape, windows = loaded.geometry, manifest.geometry.sliding_windows
    static = [*range(SINK), *range(len(context) - WINDOW, len(context))]
    units = [unit for _, unit in prefill_units(loaded, [context], build)][1:]
    heads = {(unit["layer"], head) for unit in units for head in range(unit["head_start"], unit["head_stop"])}
    assert heads == {(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_kv_heads)}
    for unit in units:
        layer, some = unit["layer"], slice(unit["head_start"], unit["head_stop"])
        streams = [not kept for kept in pattern[layer][some]]
        if windows[layer]:
            continue
        assert len(set(streams)) == 1  # a unit's heads are of one kind
        assert (unit["lists"] == b"") == (unit["queries"] == b"") == streams[0]
        for name, states in zip(("keys", "values"), cache.states(layer), strict=True):
            wanted = states[some][:, static] if streams[0] else states[some]
            assert unit[name] == wanted.contiguous().view(torch.uint8).numpy().tobytes()
    sampled = {layer for layer in range(shape.n_layers) if capture.contexts[0].of_heads(layer, 0, 1)[0].shape[1]}
    assert sampled == {layer for layer, kept in enumerate(pattern) if any(kept) and not windows[layer]}


@tiny_models
def test_keys_of_later_layers_are_those_of_the_model(setting: Setting, tmp_path: Path) -> None:
    """Prefill attends exactly, whatever is kept."""
    loaded, pattern, store, manifest = setting
    document, _ = generate_document(document_id="d", tokens=300, n_questions=2, seed=5)
    whole_store = new_store(tmp_path)
    whole = store_document(loaded, whole_store, document["text"], BUILD)
    assert whole.fingerprint != manifest.fingerprint
    for layer, row in enumerate(pattern):
        theirs = whole_store.read_layer(whole, layer)
        for streaming in (False, True):
            block = store.read_heads(manifest, layer, streaming=streaming)
            if block is None:
                continue
            heads = manifest.geometry.heads(layer, streaming=streaming)
            if not manifest.geometry.sliding_windows[layer]:
                assert heads == [head for head, kept in enumerate(row) if kept != streaming]
            rows = np.searchsorted(theirs.positions, block.positions)
            torch.testing.assert_close(block.keys, theirs.keys[heads][:, rows], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(block.values, theirs.values[heads][:, rows], atol=1e-4, rtol=1e-4)


@one_model
@pytest.mark.parametrize("method", ["dense", "streaming", "graph"])
def test_memory_holds_no_bulk_rows_of_streaming_heads(setting: Setting, method: str) -> None:
    loaded, _, store, manifest = setting
    context = open_context(store, manifest, loaded, Recipe(method=method, top_k=20))
    rows = min(SINK + WINDOW, manifest.context_tokens)
    for number, layer in enumerate(context.layers):
        streaming = manifest.geometry.heads(number, streaming=True)
        groups = [group for group in layer.groups if group.left_out]
        assert [len(group.keys) for group in groups] == ([len(streaming)] if streaming else [])
        for group in groups:
            assert tuple(group.keys.shape[1:]) == (rows, loaded.geometry.head_dim)
            assert not group.indexes
            assert bytes_of(group) < 12 * group.keys.nbytes + 8192  # copies that kernels read among them
        assert layer.n_kv_heads == loaded.geometry.n_kv_heads
        assert layer.context_tokens == manifest.context_tokens


@tiny_models
@pytest.mark.parametrize("method", ["dense", "streaming", "graph", "flat"])
def test_shares_count_what_is_attended(setting: Setting, method: str) -> None:
    """Of a streaming head, the static set of all context tokens; and of the mass, all that it keeps."""
    loaded, _, store, manifest = setting
    n, k = manifest.context_tokens, 20
    recipe = Recipe(method=method, top_k=k, budget="fixed", question_attention="index")
    context = open_context(store, manifest, loaded, recipe)
    static = SINK + WINDOW
    attends = {"dense": n, "streaming": static, "graph": static + k, "flat": static + k}[method]
    full = [number for number, window in enumerate(manifest.geometry.sliding_windows) if not window]
    heads = len(full) * loaded.geometry.n_kv_heads
    streaming = sum(map(len, manifest.geometry.streaming_heads))
    wanted = (streaming * static + (heads - streaming) * attends) / (heads * n)

    def look(executor: Executor) -> None:
        for slot in range(len(QUESTIONS)):
            seen = executor.attention.seen(slot)
            assert seen.attended_share == pytest.approx(wanted, rel=1e-6)
            assert (seen.mass_share is None) == (method == "streaming" and heads > streaming)
            assert seen.mass_share is None or 0 < seen.mass_share <= 1 + 1e-6
            if method == "dense":
                assert seen.mass_share == pytest.approx(1.0)

    tail_logits(context, tails(loaded), recipe, STEPS, then=look)


@one_model
@pytest.mark.parametrize("method", ["dense", "graph"])
def test_evidence_of_streaming_heads_lies_in_the_static_set(setting: Setting, method: str, tmp_path: Path) -> None:
    loaded, pattern, _, _ = setting
    document, _ = generate_document(document_id="d", tokens=300, n_questions=2, seed=5)
    store = new_store(tmp_path)
    build = dataclasses.replace(BUILD, head_pattern=[[0] * len(row) for row in pattern])
    manifest = store_document(loaded, store, document["text"], build)
    recipe = Recipe(method=method, top_k=20)

    def look(executor: Executor) -> None:
        mass = executor.attention.seen(0).mass
        assert mass[:SINK].sum() > 0
        assert mass[-WINDOW:].sum() > 0
        assert mass[SINK:-WINDOW].sum() == 0

    tail_logits(open_context(store, manifest, loaded, recipe), tails(loaded), recipe, STEPS, then=look)


@one_model
@pytest.mark.parametrize("method", ["dense", "streaming", "graph"])
@pytest.mark.parametrize("question_attention", ["exact", "index"])
def test_torch_attends_as_the_compiled_kernels_do(
    setting: Setting, method: str, question_attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _, store, manifest = setting
    recipe = Recipe(method=method, top_k=20, question_attention=question_attention)
    context = open_context(store, manifest, loaded, recipe)
    begin, seen, found = QuestionAttention.begin, [], []

    def on_card(self: QuestionAttention, *args: Any, **options: Any) -> Tensor:
        self.compiled = False
        return begin(self, *args, **options)

    for patched in (begin, on_card):
        monkeypatch.setattr(QuestionAttention, "begin", patched)
        look = lambda executor: seen.append([executor.attention.seen(i) for i in range(len(QUESTIONS))])  # noqa: E731
        found.append(tail_logits(context, tails(loaded), recipe, STEPS, then=look))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(*seen, strict=True):
        assert mine.attended_share == pytest.approx(theirs.attended_share)
        assert mine.mass_share == (None if theirs.mass_share is None else pytest.approx(theirs.mass_share, rel=1e-4))
        if question_attention == "index" and method != "dense":  # exact attention names its best keys only
            np.testing.assert_allclose(mine.mass, theirs.mass, atol=1e-4)


def answers(rows: list[dict]) -> dict[str, tuple]:
    return {row["question_id"]: (row["answer"], round(row["attended_share"], 6)) for row in rows}


@one_model
@pytest.mark.parametrize("method", ["dense", "graph"])
def test_order_batch_and_long_tails_do_not_change_answers(setting: Setting, method: str) -> None:
    """Nor does a tail that outgrows its limit and is searched, for either kind of heads."""
    loaded, _, store, manifest = setting
    recipe = Recipe(method=method, top_k=20, tail_tokens=16)
    context = open_context(store, manifest, loaded, recipe)
    long = "Why " + "and why " * 200 + "?"  # more than `tail_tokens` and a block of an overlay
    questions = [{"question_id": str(i), "question": q} for i, q in enumerate([*QUESTIONS, long])]
    greedy = GenerationSettings(max_new_tokens=6, do_sample=False)
    together = answers(answer_batch(context, questions, recipe, greedy))
    assert all(answer for answer, _ in together.values())
    assert answers(answer_batch(context, questions[::-1], recipe, greedy, slots=2)) == together
    for question in questions:
        alone = answers(answer_batch(context, [question], recipe, greedy))
        assert alone == {question["question_id"]: together[question["question_id"]]}


@one_model
def test_a_document_shorter_than_the_static_set(setting: Setting, tmp_path: Path) -> None:
    """All of it is kept, by every head."""
    loaded, pattern, _, _ = setting
    store, wide = new_store(tmp_path), dataclasses.replace(BUILD, window_tokens=4096)
    text = "The gate code is 5081. Gina Ekman works at the Quill school."
    found = []
    for number, build in enumerate((dataclasses.replace(wide, head_pattern=pattern), wide)):
        manifest = store_document(loaded, store, text, build, document_id=str(number))
        for method in ("dense", "graph"):
            recipe = Recipe(method=method)
            found.append(tail_logits(open_context(store, manifest, loaded, recipe), tails(loaded), recipe, STEPS))
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], atol=1e-4, rtol=1e-4)


@one_model
def test_recipe_auto_takes_its_times_of_mixed_layers(setting: Setting) -> None:
    loaded, _, store, manifest = setting
    recipe = Recipe(method="auto", top_k=20, question_attention="auto")
    context = open_context(store, manifest, loaded, recipe)
    rows = answer_batch(context, [{"question_id": "q", "question": QUESTIONS[0]}], recipe, GenerationSettings())
    assert [row["status"] for row in rows] == ["ok"], rows[0]["reason"]


@one_model
def test_a_pattern_of_another_model_is_refused(setting: Setting) -> None:
    loaded, pattern, _, _ = setting
    build = dataclasses.replace(BUILD, head_pattern=[*pattern, pattern[0]])
    message = f"the pattern has {len(pattern) + 1} layers of .*, the model {len(pattern)} layers of "
    for call in (
        lambda: index_fields(loaded.config, build),
        lambda: list(prefill_units(loaded, [encode(loaded, "d", "text")], build)),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
