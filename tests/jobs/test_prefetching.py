"""The answer actor: two calls at a time, one decodes while the index of the other is fetched, within the budget."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import torch

from rabatch.config import GenerationSettings, ModelConfig, Recipe, Resources
from rabatch.executor import Executor
from rabatch.jobs.answer import answer
from rabatch.jobs.answering import AnswerActor, AnswerSettings
from rabatch.jobs.catalog import read_entries
from rabatch.jobs.turns import Turns
from rabatch.storage.answers import decode
from rabatch.storage.store import IndexStore

SHORT = GenerationSettings(max_new_tokens=24)
LIMIT_S = 120
LAYERS = 4  # of the demo model


class Watched:
    """An actor over a store, and what it reads and computes when."""

    def __init__(self, monkeypatch, store, questions, memory_bytes):
        self.settings = AnswerSettings(
            model=ModelConfig(name="demo", device="cpu"),
            store_url=str(store),
            storage_options={},
            recipes=(Recipe(),),
            generation=SHORT,
            answers_urls=(None,),
            threads=torch.get_num_threads(),
            slots=16,
            memory_bytes=memory_bytes,
            sharing=1,
            sharing_card=1,
        )
        self.actor = AnswerActor(self.settings)
        self.pool = self.actor._pool
        self.manifests = {m.document_id: m for m in IndexStore(str(store)).manifests()}
        self.stored = {s.document_id: s for s in read_entries(IndexStore(str(store)))}
        self.questions = questions
        self.events = []
        self.before_pass = lambda document_id: None
        read_heads, forward = IndexStore.read_heads, Executor.forward

        def reading(store, manifest, layer, **options):
            if not options["streaming"]:
                self.events.append(("read", manifest.document_id))
            return read_heads(store, manifest, layer, **options)

        def passing(executor, *arguments, **options):
            self.before_pass(executor.context.manifest.document_id)
            self.events.append(("pass", executor.context.manifest.document_id))
            return forward(executor, *arguments, **options)

        monkeypatch.setattr(IndexStore, "read_heads", reading)
        monkeypatch.setattr(Executor, "forward", passing)

    def ask(self, document_id):
        """The answers to the questions about a document, through one call as Ray makes it."""
        names = ("question_id", "question", "expected")
        asked = [{name: q[name] for name in names} for q in self.questions if q["document_id"] == document_id]
        row = {
            "recipe": 0,
            "index": json.dumps(self.stored[document_id]),
            "batches": json.dumps(
                [{"name": document_id, "questions": asked, "keys": [q["question_id"] for q in asked]}]
            ),
        }
        tables = list(self.actor(pa.Table.from_pylist([row])))
        found = [table.to_pylist()[0]["answers"] for table in tables]
        return [answer for data in found for answer in decode(data, name=document_id).to_pylist()]

    def reads(self):
        return Counter(document for event, document in self.events if event == "read")

    def waiting_calls(self):
        return len(self.actor._turns._queue) - 1


def wait_until(condition):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def texts(rows):
    return {row["question_id"]: (row["status"], row["answer"]) for row in rows}


@pytest.fixture(scope="module")
def want(answered, demo_store):
    """The answers to the corpus, by actors that hold all of a document in memory."""
    rows = answered[0].rows[: len(demo_store.questions)]
    assert {row["status"] for row in rows} == {"ok"}
    return texts(rows)


@pytest.fixture
def watched(demo_store, monkeypatch):
    return lambda memory_bytes, store=demo_store.store: Watched(monkeypatch, store, demo_store.questions, memory_bytes)


@pytest.fixture(scope="module")
def sizes(demo_store):
    """Bytes of a document's largest layer in memory, and of its largest part; of all documents the most."""
    from rabatch.contexts import open_context
    from rabatch.loading import load_model
    from rabatch.memory import bytes_of

    loaded, store = load_model(ModelConfig(device="cpu")), IndexStore(demo_store.store)
    manifests = list(store.manifests())
    layers = [bytes_of(layer) for m in manifests for layer in open_context(store, m, loaded, Recipe()).layers]
    return max(layers), max(part.bytes for m in manifests for part in m.parts)


FIRST, SECOND, THIRD = "doc-00000", "doc-00001", "doc-00002"


def test_the_next_index_is_fetched_while_one_is_decoded(watched, want):
    """The first pass of one waits until the other has been read: were that later, this would wait in vain."""
    actor = watched(1 << 40)
    actor.before_pass = lambda document: document != FIRST or wait_until(lambda: actor.reads()[SECOND] == LAYERS)
    with ThreadPoolExecutor(2) as calls:
        one = calls.submit(actor.ask, FIRST)
        wait_until(lambda: actor.reads()[FIRST] == LAYERS)
        other = calls.submit(actor.ask, SECOND)
        answers = texts(one.result(LIMIT_S)) | texts(other.result(LIMIT_S))
    assert answers == {key: want[key] for key in answers}
    assert len(answers) == 8
    assert actor.reads() == Counter({FIRST: LAYERS, SECOND: LAYERS})
    order = [document for event, document in actor.events if event == "pass"]
    assert order == sorted(order)  # one after the other


def test_what_is_fetched_ahead_never_costs_what_is_in_use(watched, want, sizes):
    """Room for one document and two layers of the next: these are read, and the rest when its turn has come."""
    layer, part = sizes
    actor = watched(int(1.02 * (LAYERS + 2) * layer) + part)
    seen = []

    def look(document):
        if document == FIRST:
            wait_until(lambda: actor.reads()[SECOND] == 2)
        seen.append((document, actor.reads()[SECOND]))

    actor.before_pass = look
    with ThreadPoolExecutor(2) as calls:
        one = calls.submit(actor.ask, FIRST)
        wait_until(lambda: actor.reads()[FIRST] == LAYERS)
        other = calls.submit(actor.ask, SECOND)
        answers = texts(one.result(LIMIT_S)) | texts(other.result(LIMIT_S))
    assert answers == {key: want[key] for key in answers}
    assert {count for document, count in seen if document == FIRST} == {2}
    assert actor.reads() == Counter({FIRST: LAYERS, SECOND: LAYERS})
    assert actor.pool.peak_bytes <= actor.pool.budget_bytes


def test_beside_a_document_larger_than_the_budget_nothing_is_fetched(watched, want, sizes):
    layer, part = sizes
    actor = watched(int(1.02 * 2 * layer) + part)

    def look(document):
        if document == FIRST:
            wait_until(lambda: actor.waiting_calls() == 1)
            assert SECOND not in actor.reads()

    actor.before_pass = look
    with ThreadPoolExecutor(2) as calls:
        asked = [calls.submit(actor.ask, FIRST)]
        wait_until(lambda: actor.reads()[FIRST] >= 1)
        asked.append(calls.submit(actor.ask, SECOND))
        answers = {key: row for future in asked for key, row in texts(future.result(LIMIT_S)).items()}
    assert answers == {key: want[key] for key in answers}
    assert min(actor.reads().values()) > LAYERS
    assert actor.pool.peak_bytes <= actor.pool.budget_bytes


def test_one_document_alone_is_read_once_and_stays(watched, want):
    actor = watched(1 << 40)
    assert texts(actor.ask(FIRST)).items() <= want.items()
    assert actor.reads() == Counter({FIRST: LAYERS})
    assert texts(actor.ask(FIRST)).items() <= want.items()
    assert actor.reads() == Counter({FIRST: LAYERS})


def test_a_broken_index_fails_its_own_call_while_another_decodes(watched, want, demo_store, tmp_path):
    shutil.copytree(demo_store.store, tmp_path / "index")
    actor = watched(1 << 40, tmp_path / "index")
    part = next(part for part in actor.manifests[SECOND].parts if part.layer == 2)
    (tmp_path / "index" / part.path).unlink()
    failed = threading.Event()
    actor.before_pass = lambda document: document != FIRST or wait_until(failed.is_set)
    with ThreadPoolExecutor(3) as calls:
        one = calls.submit(actor.ask, FIRST)
        wait_until(lambda: actor.reads()[FIRST] == LAYERS)
        other = calls.submit(actor.ask, SECOND)
        rows = other.result(LIMIT_S)  # it does not wait for its turn
        third = calls.submit(actor.ask, THIRD)
        failed.set()
        answers = texts(one.result(LIMIT_S)) | texts(third.result(LIMIT_S))
    assert answers == {key: want[key] for key in answers}
    assert len(answers) == 8
    assert len(rows) == 4
    for row in rows:
        assert row["status"] == "failed"
        for named in (repr(SECOND), part.path, "is missing", "--remove-damaged"):
            assert named in row["reason"]


@pytest.mark.parametrize("memory_bytes", [1, pytest.param(3_000_000, marks=pytest.mark.slow)])
def test_a_job_with_little_memory_gives_the_same_answers(demo_store, want, memory_bytes):
    resources = Resources(answer_actors=1, memory_bytes=memory_bytes, questions_per_batch=2)
    result = answer(demo_store.questions, store=demo_store.store, generation=SHORT, resources=resources, progress=False)
    assert texts(result.rows) == want


@pytest.mark.parametrize(("calls", "seconds"), [(2, 60), (1, 0.2)])
def test_ray_makes_as_many_calls_at_once_as_it_is_told(local_ray, calls, seconds):
    import ray.data

    from rabatch.jobs import cluster

    class Meeting:
        """Rows in; each comes back with how many calls of the actor were under way at most while it was there."""

        def __init__(self, seconds):
            self._here, self._most, self._seconds = 0, 0, seconds
            self._changed = threading.Condition()

        def __call__(self, table):
            with self._changed:
                self._here += 1
                self._most = max(self._most, self._here)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._most > 1, timeout=self._seconds)
            yield pa.table({"most": [self._most]})
            with self._changed:
                self._here -= 1

    with cluster.dataset_context(row_blocks=True):
        rows = ray.data.from_items([{"n": n} for n in range(4)], override_num_blocks=4).map_batches(
            Meeting,
            fn_constructor_args=(seconds,),
            **cluster.actor_options(cluster.Pool(1, 1), cpus=1, gpus=0, calls=calls),
        )
        most = [row["most"] for row in cluster.rows_of(rows)]
    assert most == [calls] * 4


def test_turns_come_in_the_order_of_arrival():
    turns, order = Turns(), []
    arrived = [threading.Event() for _ in range(4)]
    go_on = threading.Event()

    def call(number):
        with turns.queue() as turn:
            arrived[number].set()
            turn.wait_to_prepare()
            order.append(("prepares", number))
            turn.wait()
            order.append(("works", number))
            if number == 0:
                assert go_on.wait(LIMIT_S)
            turn.settle()

    with ThreadPoolExecutor(4) as calls:
        futures = []
        for number in range(4):
            futures.append(calls.submit(call, number))
            assert arrived[number].wait(LIMIT_S)
        assert order == [("prepares", 0), ("works", 0)]  # nobody prepares beside one that has not what it needs
        go_on.set()
        for future in futures:
            future.result(LIMIT_S)
    assert [number for step, number in order if step == "works"] == [0, 1, 2, 3]
    assert [number for step, number in order if step == "prepares"] == [0, 1, 2, 3]


def test_a_turn_that_ends_early_lets_the_others_pass():
    turns = Turns()
    with turns.queue():
        with turns.queue() as second:
            pass
        with turns.queue() as third:
            assert third is not second
    with turns.queue() as alone:
        alone.wait_to_prepare()
        alone.wait()
