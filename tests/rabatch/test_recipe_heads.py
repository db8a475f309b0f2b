"""Streaming heads of a recipe: over an index that holds all heads, answers are those of one built with the pattern."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rabatch import traits
from rabatch.cli_arguments import Parser, add_answer, answer_settings
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.errors import ConfigError
from rabatch.executor import Executor
from rabatch.head_pattern import Pattern, write_gates
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import bytes_of
from rabatch.pipeline import Pipeline
from rabatch.retention import narrowed
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from tests.rabatch.engine import new_store, store_document, tail_logits
from tests.rabatch.models import save_tiny_model

BUILD = BuildConfig(
    sink_tokens=8,
    window_tokens=32,
    kv_dtype="float32",
    prefill_chunk_tokens=128,
    query_top_k=16,
    key_mass=True,
    query_vectors=True,
)
CODED = dataclasses.replace(BUILD, key_codec="int8", value_codec="kivi2")
QUESTIONS = ["What is the gate code?", "Who manages the old mill near the river, and why?", "When?"]
METHODS = [m for m in traits.METHODS if m != "auto"]
STEPS = 3


class Setting(NamedTuple):
    loaded: LoadedModel
    store: IndexStore
    text: str
    pattern: Pattern
    whole: dict[bool, Manifest]
    """All heads keep the context; by whether keys and values are encoded."""
    built: dict[bool, Manifest]
    """Built with the pattern."""


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """With GQA; and with sliding layers between."""
    folder = tmp_path_factory.mktemp(request.param)
    loaded = load_model(
        ModelConfig(name=str(save_tiny_model(request.param, folder / "model")), device="cpu", dtype="float32")
    )
    document, _ = generate_document(document_id="d", tokens=300, n_questions=2, seed=5)
    store = new_store(folder)
    pattern, made = mixed(loaded), []
    for heads in (None, pattern):
        builds = {coded: dataclasses.replace(CODED if coded else BUILD, head_pattern=heads) for coded in (False, True)}
        made.append({coded: store_document(loaded, store, document["text"], b) for coded, b in builds.items()})
    return Setting(loaded, store, document["text"], pattern, *made)


one_model = pytest.mark.parametrize("setting", ["qwen3"], indirect=True, scope="module")


def mixed(loaded: LoadedModel) -> Pattern:
    """All, some and none of the heads of a layer keep the context; of a sliding layer, that says nothing."""
    shape = loaded.geometry
    rows = [[(layer + head) % 2 == 1 for head in range(shape.n_kv_heads)] for layer in range(shape.n_layers)]
    rows[0], rows[-1] = [True] * shape.n_kv_heads, [False] * shape.n_kv_heads
    return tuple(map(tuple, rows))


def tails(loaded: LoadedModel) -> list[list[int]]:
    return [loaded.template.encode_question(loaded.tokenizer, question) for question in QUESTIONS]


def seen_of(setting: Setting, manifest: Manifest, recipe: Recipe) -> tuple[torch.Tensor, list[Any], int]:
    """Logits, what was seen, and bytes in memory."""
    context = open_context(setting.store, manifest, setting.loaded, recipe)
    seen: list[Any] = []

    def look(executor: Executor) -> None:
        seen.extend(executor.attention.seen(slot) for slot in range(len(QUESTIONS)))

    logits = tail_logits(context, tails(setting.loaded), recipe, STEPS, then=look)
    return logits, seen, bytes_of(list(context.layers))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
def test_a_recipes_pattern_is_as_a_builds(setting: Setting, method: str, coded: bool) -> None:
    """Logits, shares, and bytes in memory: nothing of the middle stays there."""
    whole, built, pattern = setting.whole[coded], setting.built[coded], setting.pattern
    plain = Recipe(method=method, top_k=20)  # type: ignore[arg-type]
    wanted, theirs, memory = seen_of(setting, built, plain)
    found, mine, held = seen_of(setting, whole, dataclasses.replace(plain, head_pattern=pattern))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert [seen.attended_share for seen in mine] == pytest.approx([seen.attended_share for seen in theirs])
    assert [seen.mass_share for seen in mine] == pytest.approx([seen.mass_share for seen in theirs], abs=1e-6)
    assert held == pytest.approx(memory, rel=0.02)
    if method != "streaming":  # the comparison can fail
        everything, all_seen, more = seen_of(setting, whole, plain)
        assert float((everything - wanted).abs().max()) > 1e-3
        assert all_seen[0].attended_share > mine[0].attended_share
        assert more > held


@one_model
def test_index_and_recipe_stream_together(setting: Setting) -> None:
    """A head keeps the context if both say so: what the index streams cannot be had back."""
    pattern, built = setting.pattern, setting.built[False]
    other = tuple(tuple(layer != 1 for _ in row) for layer, row in enumerate(pattern))
    both = tuple(tuple(a and b for a, b in zip(*rows, strict=True)) for rows in zip(pattern, other, strict=True))
    build = dataclasses.replace(BUILD, head_pattern=both)
    wanted = store_document(setting.loaded, setting.store, setting.text, build)
    for method in ("dense", "graph"):
        plain = Recipe(method=method, top_k=20)  # type: ignore[arg-type]
        found = seen_of(setting, built, dataclasses.replace(plain, head_pattern=other))
        expected = seen_of(setting, wanted, plain)
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
        assert found[1][0].attended_share == pytest.approx(expected[1][0].attended_share)


def test_without_a_streaming_head_nothing_changes(setting: Setting) -> None:
    every = [[1] * setting.loaded.geometry.n_kv_heads] * setting.loaded.geometry.n_layers
    assert narrowed(setting.whole[False], Recipe(head_pattern=every)) is setting.whole[False]
    assert narrowed(setting.whole[False], Recipe()) is setting.whole[False]


@one_model
@pytest.mark.parametrize("method", ["auto", "graph"])
def test_answers_and_their_order(setting: Setting, method: str) -> None:
    """Batch and order change no answer of a recipe with a pattern either; recipe auto takes its times of it."""
    recipe = Recipe(method=method, top_k=20, head_pattern=setting.pattern, question_attention="auto")  # type: ignore[arg-type]
    if method == "graph":
        recipe = dataclasses.replace(recipe, question_attention="index")
    context = open_context(setting.store, setting.whole[False], setting.loaded, recipe)
    questions = [{"question_id": str(i), "question": q} for i, q in enumerate(QUESTIONS)]
    greedy = GenerationSettings(max_new_tokens=4, do_sample=False)

    def told(rows: list[dict[str, Any]]) -> dict[str, str]:
        assert [row["status"] for row in rows] == ["ok"] * len(rows), rows[0]["reason"]
        return {row["question_id"]: row["answer"] for row in rows}

    together = told(answer_batch(context, questions, recipe, greedy))
    if method == "graph":
        assert told(answer_batch(context, questions[::-1], recipe, greedy, slots=2)) == together


@one_model
def test_a_pattern_of_another_model_is_refused(setting: Setting) -> None:
    recipe = Recipe(head_pattern=[[1, 0]])
    with pytest.raises(ConfigError, match="the pattern has 1 layers of 2 KV heads, the model 3 layers of 2"):
        open_context(setting.store, setting.whole[False], setting.loaded, recipe)


def test_answers_go_by_what_streams_and_not_by_the_file(tmp_path: Path) -> None:
    """Answers of before stay: without a pattern the settings of an answer are what they were."""
    gates = [[0.1, 0.9], [0.8, 0.2]]
    write_gates(tmp_path, gates, sink_tokens=1, window_tokens=1)
    plain, by_file = Recipe(), Recipe(head_pattern=tmp_path, head_threshold=0.5)
    rows = Recipe(head_pattern=[[0, 1], [1, 0]])
    assert by_file == rows
    assert not [name for name in plain.deciding_fields() if "head" in name]
    assert Recipe(head_pattern=[[1, 1], [1, 1]]).deciding_fields() == plain.deciding_fields()
    assert by_file.deciding_fields() == rows.deciding_fields() != plain.deciding_fields()
    assert json.loads(json.dumps(rows.deciding_fields()))["head_pattern"] == [[False, True], [True, False]]


@pytest.mark.parametrize("part", ["build", "recipe"])
def test_a_pipeline_carries_patterns(part: str, tmp_path: Path) -> None:
    """As a path, as rows, and resolved, as a job of a cluster is given it."""
    write_gates(tmp_path / "heads", [[0.1, 0.9], [0.8, 0.2]], sink_tokens=1, window_tokens=1)
    places = {"documents": "d", "questions": "q", "store": "s", "answers": "a"}
    by_path = {"head_pattern": str(tmp_path / "heads"), "head_sparsity": 0.5}
    made = Pipeline.from_dict({**places, part: by_path})
    assert Pipeline.from_dict({**places, part: {"head_pattern": [[0, 1], [True, False]]}}) == made
    assert Pipeline.from_yaml(made.to_yaml()) == made
    with pytest.raises(ConfigError, match=rf"{part}\.head_pattern .*must be a string"):
        Pipeline.from_dict({**places, part: {"head_pattern": [["x"]]}})


def test_the_command_takes_a_pattern(tmp_path: Path) -> None:
    write_gates(tmp_path, [[0.1, 0.9], [0.8, 0.2]], sink_tokens=1, window_tokens=1)
    parser = Parser()
    add_answer(parser)
    options = ["questions", "--store", "s", "--recipe", "graph", "--head-pattern", str(tmp_path), "--sparsity", "0.5"]
    recipe = answer_settings(parser.parse_args(options))["recipe"]
    assert recipe == Recipe(method="graph", head_pattern=[[0, 1], [1, 0]])
    with pytest.raises(SystemExit):
        parser.parse_args([*options, "--threshold", "0.5"])
