"""Answering under a memory budget: the same answers, within it, and what happens to an index that breaks meanwhile."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import STREAMED_SLOTS, OpenContext, open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.errors import IntegrityError
from rabatch.executor import Executor
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import LayerPool, bytes_of
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore
from tests.rabatch.engine import new_store, store_document

GREEDY = GenerationSettings(max_new_tokens=24)
RECIPE = Recipe(top_k=32)
Rows = list[dict[str, Any]]


class Stored(NamedTuple):
    loaded: LoadedModel
    folder: Path
    store: IndexStore
    manifests: dict[str, Manifest]
    questions: dict[str, Rows]
    layer_bytes: int
    """Of the largest layer in memory."""
    part_bytes: int


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Two documents of one length."""
    folder = tmp_path_factory.mktemp("budget")
    loaded, store = load_model(ModelConfig(device="cpu")), new_store(folder)
    manifests, questions = {}, {}
    for number, name in enumerate("ab"):
        document, asked = generate_document(document_id=name, tokens=1000, n_questions=8, seed=20 + number)
        build = BuildConfig(sink_tokens=16, window_tokens=128)
        manifests[name] = store_document(loaded, store, document["text"], build, document_id=name)
        questions[name] = asked
    opened = [open_context(store, manifest, loaded, RECIPE) for manifest in manifests.values()]
    part_bytes = max(part.bytes for manifest in manifests.values() for part in manifest.parts)
    largest = max(bytes_of(layer) for context in opened for layer in context.layers)
    return Stored(loaded, folder, store, manifests, questions, largest, part_bytes)


def opened(stored: Stored, name: str = "a", recipe: Recipe = RECIPE, **options: Any) -> OpenContext:
    return open_context(stored.store, stored.manifests[name], stored.loaded, recipe, **options)


def budget(stored: Stored, layers: float) -> int:
    """For so many layers, and one that is being read."""
    return math.ceil(stored.layer_bytes * layers * 1.01) + stored.part_bytes


def answers(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(row["status"], row["answer"], row["finish_reason"]) for row in rows]


@pytest.mark.parametrize("method", ["dense", "graph", "scan", "flat", "streaming"])
def test_the_budget_changes_no_answer(stored: Stored, method: Any) -> None:
    """All in memory, layer by layer, and in between."""
    recipe = Recipe(method=method, top_k=32)
    whole = opened(stored, recipe=recipe)
    mine = stored._replace(layer_bytes=max(bytes_of(layer) for layer in whole.layers))
    want = answer_batch(whole, stored.questions["a"], recipe, GREEDY, slots=3)
    assert {row["status"] for row in want} == {"ok"}
    for room, share in ((0, 1.0), (2, 1.0), (3, 0.75), (9, 0.0)):
        with opened(stored, recipe=recipe, pool=LayerPool(budget(mine, room))) as context:
            rows = answer_batch(context, stored.questions["a"], recipe, GREEDY, slots=3)
            assert context.layers.streamed_share == pytest.approx(share, abs=0.01)
        for row, expected in zip(rows, want, strict=True):
            for name in ("status", "answer", "finish_reason", "answer_tokens", "question_tokens", "reason"):
                assert row[name] == expected[name]
            assert row["attended_share"] == pytest.approx(expected["attended_share"], rel=1e-3)
            assert row["evidence"][0]["score"] == pytest.approx(expected["evidence"][0]["score"], abs=1e-3)


@pytest.mark.parametrize("room", [0, 3.5, 6.2, 8, None])
def test_two_documents_in_turn_stay_within_the_budget(stored: Stored, room: float | None) -> None:
    """With a budget for two each is read once; with less, what is let go is read again."""
    pool: LayerPool = LayerPool() if room is None else LayerPool(budget(stored, room))
    want = {name: answers(answer_batch(opened(stored, name), stored.questions[name], RECIPE, GREEDY)) for name in "ab"}
    reads: Counter[tuple[str, int]] = Counter()
    read_heads = IndexStore.read_heads

    def counting(self: IndexStore, manifest: Manifest, layer: int, **options: Any) -> Any:
        reads[manifest.document_id, layer] += not options["streaming"]
        return read_heads(self, manifest, layer, **options)

    with mock.patch.object(IndexStore, "read_heads", counting):
        for name in "abab":
            with opened(stored, name, pool=pool) as context:
                rows = answer_batch(context, stored.questions[name], RECIPE, GREEDY, slots=3)
            assert answers(rows) == want[name]
    if room is None or room == 8:
        assert set(reads.values()) == {1}
    elif room >= 4:  # one of them
        assert 8 < sum(reads.values()) <= 16
    if room is not None:
        assert pool.peak_bytes <= max(pool.budget_bytes, 1.01 * stored.layer_bytes + stored.part_bytes)


@pytest.mark.parametrize(
    "recipe",
    [RECIPE, Recipe(method="dense"), Recipe(question_attention="exact"), Recipe(method="auto")],
    ids=["graph", "dense", "exact questions", "auto"],
)
def test_layers_count_all_they_hold_and_answering_adds_nothing(stored: Stored, recipe: Recipe) -> None:
    pool: LayerPool = LayerPool()
    with opened(stored, recipe=recipe, pool=pool) as context:
        before = pool.held_bytes
        for layer in context.layers:
            least = 2 * layer.keys.nbytes
            for index in layer.indexes.values():
                least += round(index.bytes_per_key * index.n_keys * index.n_heads)
            assert bytes_of(layer) >= least
        answer_batch(context, stored.questions["a"], recipe, GREEDY)
        assert sum(bytes_of(layer) for layer in context.layers) == pytest.approx(before, rel=0.01)


def test_indexes_of_one_identity_only_share_layers(stored: Stored) -> None:
    """The same document opened by another recipe, and another document, are read for themselves."""
    pool: LayerPool = LayerPool()
    layers = []
    for name, recipe in (("a", RECIPE), ("a", Recipe(top_k=32)), ("a", Recipe(method="dense")), ("b", RECIPE)):
        with opened(stored, name, recipe, pool=pool) as context:
            layers.append(context.layers[0])
    assert layers[0] is layers[1]
    assert len({id(layer) for layer in layers}) == 3
    assert not layers[2].indexes
    assert not torch.equal(layers[0].keys[:, :900], layers[3].keys[:, :900])


def test_more_questions_are_decoded_together_where_layers_are_read_anew(stored: Stored) -> None:
    """Up to four times as many, and they are let in together: every pass pays for the reading."""
    asked = stored.questions["a"]
    questions = [{**question, "question_id": f"{n}-{i}"} for i in range(3) for n, question in enumerate(asked)]
    passes: dict[str, list[int]] = {"kept": [], "read": []}
    rows = {}
    forward = Executor.forward
    for name, pool in (("kept", LayerPool()), ("read", LayerPool(1))):

        def counting(self: Executor, first: int, tokens: Any, *, question: bool, name: str = name) -> torch.Tensor:
            passes[name].append(len(tokens))
            return forward(self, first, tokens, question=question)

        with mock.patch.object(Executor, "forward", counting), opened(stored, pool=pool) as context:
            rows[name] = answer_batch(context, questions, RECIPE, GREEDY, slots=3)
    assert answers(rows["read"]) == answers(rows["kept"])
    assert (max(passes["kept"]), max(passes["read"])) == (3, 3 * STREAMED_SLOTS)
    assert len(passes["read"]) < len(passes["kept"]) / 3


def test_how_many_more_depends_on_the_share_that_is_read(stored: Stored) -> None:
    slots = {}
    for room in (0, 3, 9):
        with opened(stored, pool=LayerPool(budget(stored, room))) as context:
            slots[room] = [context.slots(n) for n in (0, 1, 16)], context.least_free_slots(16)
    assert slots == {0: ([0, 4, 64], 4), 3: ([0, 4, 52], 4), 9: ([0, 1, 16], 1)}


def copy_of(stored: Stored, folder: Path) -> Stored:
    """The same store elsewhere, to be damaged."""
    shutil.copytree(stored.folder / "store", folder / "store")
    return stored._replace(folder=folder, store=IndexStore(str(folder / "store")))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize(("break_it", "reason"), [(Path.unlink, "is missing"), (flip, "sha256")])
def test_a_part_that_breaks_while_decoding_fails_its_document_once(
    stored: Stored, tmp_path: Path, room: int, break_it: Any, reason: str
) -> None:
    """Those that have their answer keep it; the others become rows with the reason; another document goes on."""
    mine = copy_of(stored, tmp_path)
    pool: LayerPool = LayerPool(budget(stored, room))
    want = {name: answer_batch(opened(stored, name), stored.questions[name], RECIPE, GREEDY) for name in "ab"}
    part = next(part for part in mine.manifests["a"].parts if part.layer == 3)
    passes: list[int] = []
    forward = Executor.forward

    def breaking(self: Executor, first: int, tokens: Any, *, question: bool) -> torch.Tensor:
        passes.append(len(tokens))
        if len(passes) == 8:
            break_it(tmp_path / "store" / part.path)
        return forward(self, first, tokens, question=question)

    with mock.patch.object(Executor, "forward", breaking), opened(mine, "a", pool=pool) as context:
        rows = answer_batch(context, mine.questions["a"], RECIPE, GREEDY, slots=1)
        at_the_end = len(passes)
    done = [row["status"] for row in rows].count("ok")
    assert 0 < done < len(rows)
    for row, expected in zip(rows, want["a"], strict=True):
        if row["status"] == "ok":
            assert row["answer"] == expected["answer"]
        else:
            assert row["answer"] is None
            for named in ("document 'a'", part.path, reason, "--remove-damaged"):
                assert named in row["reason"]
    assert at_the_end <= 10  # at most one pass had its layer already; none is tried again in halves
    with opened(mine, "b", pool=pool) as context:
        assert answers(answer_batch(context, mine.questions["b"], RECIPE, GREEDY)) == answers(want["b"])
    with pytest.raises(IntegrityError, match=reason):  # nothing of the broken index is served from memory
        opened(mine, "a", pool=LayerPool())


def test_an_index_in_memory_outlives_its_files(stored: Stored, tmp_path: Path) -> None:
    """What fits is checked when it is opened, and read no more."""
    mine = copy_of(stored, tmp_path)
    want = answers(answer_batch(opened(stored), stored.questions["a"], RECIPE, GREEDY))
    with opened(mine, pool=LayerPool(budget(stored, 9))) as context:
        for part in mine.manifests["a"].parts:
            (tmp_path / "store" / part.path).unlink()
        assert answers(answer_batch(context, mine.questions["a"], RECIPE, GREEDY)) == want


def test_too_long_a_question_and_too_long_an_answer_among_good_ones(stored: Stored) -> None:
    """The first is a row with a reason, the second ends at the limit, and the others are as without them."""
    good = stored.questions["a"][:4]
    context = opened(stored)
    room = stored.loaded.max_context_tokens - len(context.token_ids) - GREEDY.max_new_tokens
    word = len(stored.loaded.tokenizer.encode(" again", add_special_tokens=False))
    huge = {"question_id": "huge", "question": "What" + " again" * (room // word + 1)}
    want = answers(answer_batch(context, good, RECIPE, GREEDY))
    shortest = min(row["answer_tokens"] for row in answer_batch(context, good, RECIPE, GREEDY))
    for pool in (LayerPool(), LayerPool(1)):
        with opened(stored, pool=pool) as again:
            rows = answer_batch(again, [good[0], huge, *good[1:]], RECIPE, GREEDY, slots=2)
            assert answers([rows[0], *rows[2:]]) == want
            assert rows[1]["status"] == "failed"
            assert f"has room for {room} beside document and answer" in rows[1]["reason"]
            limit = GenerationSettings(max_new_tokens=shortest + 1)
            ended = answer_batch(again, good, RECIPE, limit, slots=2)
            assert {row["finish_reason"] for row in ended} == {"stop", "length"}
            for row, (_, answer, _) in zip(ended, want, strict=True):
                assert row["status"] == "ok"
                assert row["answer_tokens"] <= limit.max_new_tokens
                assert answer.startswith(row["answer"])


def test_what_cannot_be_opened_holds_nothing(stored: Stored, tmp_path: Path) -> None:
    mine = copy_of(stored, tmp_path)
    pool: LayerPool = LayerPool(budget(stored, 9))
    flip(tmp_path / "store" / next(part.path for part in mine.manifests["a"].parts if part.layer == 2))
    with pytest.raises(IntegrityError, match="document 'a'"):
        opened(mine, pool=pool)
    with opened(mine, "b", pool=pool):
        pass
    pool.claim(pool.budget_bytes)  # so nothing is in use any more
    assert pool.held_bytes == pool.budget_bytes
