"""What is asked, and the commit of what is new: without Ray, with the driver stopped wherever it may be killed."""

from __future__ import annotations

import pyarrow as pa
import pytest

from rabatch.config import ModelConfig, Recipe
from rabatch.errors import FailedRowsError, StoreError
from rabatch.jobs.asking import Asked
from rabatch.jobs.catalog import Catalog, Stored, batches_of, failed_row, join
from rabatch.jobs.results import Failures, Tally
from rabatch.jobs.rows import Record, question_of
from rabatch.records import STORED_ANSWERS
from rabatch.storage.answers import AnswerKeys, AnswerStore, encode, exported

RECIPE, MODEL = Recipe(), ModelConfig(device="cpu", dtype="float32")
QUESTIONS = [("q0", "a"), ("q1", "a"), ("q0", "b"), ("q1", "b"), ("everyone", None)]
TEXTS = {"a": "1", "b": "1"}


@pytest.fixture
def url(tmp_path):
    return str(tmp_path / "answers")


class Run:
    """A run into the answers store at `url`; `texts` is of every document the content it has now."""

    def __init__(self, url, texts=TEXTS, questions=QUESTIONS, *, recipe="graph", limit=None, memory=False):
        store = None if memory else AnswerStore(url, create=True)
        asked = [
            question_of(Record(n, f"q:{n}", {"question_id": q, "question": f"{q}?", "document_id": d, "expected": "1"}))
            for n, (q, d) in enumerate(questions)
        ]
        stored = [Stored(d, text * 64, "f" * 64, "m", "graph", 10, 10, 1) for d, text in texts.items()]
        keys = AnswerKeys({"recipe": recipe})
        pairs, refused = join(asked, Catalog(stored, "m", RECIPE), keys)
        about = {"keys": keys, "recipe": RECIPE, "model": MODEL, "failures": Failures("questions", limit)}
        self.store = store
        self.job = Asked(asked, pairs, refused, store=store, **about)
        self.reused = self.job.find_answered()
        self.batches = batches_of(pairs, self.job.open_pairs(), questions_per_batch=2)
        self.n_asked = sum(len(batch.pairs) for batch in self.batches)

    def ask(self, batches=None, *, failing=(), mark=""):
        """What an actor does: answer batches, keep them, tell the driver."""
        for batch in self.batches if batches is None else batches:
            asks = self.job.asks(batch)
            rows = []
            for question, key in zip(asks["questions"], asks["keys"], strict=True):
                document = batch.stored.document_id
                row = failed_row(question, document_id=document, reason="bad", recipe=RECIPE, model=MODEL)
                if (question["question_id"], document) not in failing:
                    text = batch.stored.content_sha256[0] + mark
                    row |= {"status": "ok", "reason": None, "answer": text, "attended_share": 0.5}
                rows.append({**row, "content_sha256": batch.stored.content_sha256, "answer_key": key})
            table = pa.Table.from_pylist(rows, STORED_ANSWERS)
            failed = [(place, "bad") for place, row in enumerate(rows) if row["status"] == "failed"]
            if self.store is not None:
                self.store.put_pending(batch.name, table)
            data = b"" if self.store is not None else encode(table)
            self.job.take(batch, failed=failed, tally=Tally.of(rows), data=data)
        return self

    def commit(self):
        return self.job.commit(definition_sha256="d", settings={}, seconds=0.0)

    def rows(self):
        return [row for window in self.job.windows() for row in window]


def shown(url, **which):
    """(question, document): answer of every row that an export gives."""
    found = [row for table in exported(AnswerStore(url), **which) for row in table.to_pylist()]
    made = {(row["question_id"], row["document_id"]): row["answer"] for row in found}
    assert which or len(made) == len(found), "a pair stands twice"
    return made


def kill(*_):
    raise KeyboardInterrupt


ALL = {(q, d): "1" for q in ("q0", "q1", "everyone") for d in "ab"}


def test_a_second_run_asks_nothing(url):
    first = Run(url).ask()
    assert (first.n_asked, first.commit(), shown(url)) == (6, 1, ALL)
    assert first.store.pending() == []
    again = Run(url)
    assert (again.reused, again.n_asked, again.commit()) == (6, 0, None)
    assert again.rows() == first.rows()
    assert (again.job.tally.answered, again.job.tally.judged, again.job.tally.share_sum) == (6, 6, 3.0)
    assert [(row["question_id"], row["document_id"]) for row in again.rows()][-2:] == [
        ("everyone", "a"), ("everyone", "b")
    ]  # fmt: skip


def test_a_changed_document_is_asked_again_and_nothing_else(url):
    Run(url).ask().commit()
    changed = Run(url, {"a": "1", "b": "2"}).ask()
    assert (changed.reused, changed.n_asked, changed.commit(), changed.job.superseded) == (3, 3, 2, 3)
    assert shown(url) == {pair: "2" if pair[1] == "b" else "1" for pair in ALL}
    everything = [row for table in exported(AnswerStore(url), every=True) for row in table.to_pylist()]
    assert sorted((r["answer"], r["superseded"]) for r in everything if r["document_id"] == "b") == [
        *[("1", True)] * 3, *[("2", False)] * 3
    ]  # fmt: skip
    back = Run(url, TEXTS)
    assert (back.n_asked, back.commit(), shown(url)) == (0, 3, ALL)  # its first answers stand again, unasked
    assert Run(url, TEXTS).commit() is None
    without = Run(url, {"a": "1"})
    assert (without.commit(), shown(url)[("q0", "b")]) == (4, None)  # nobody can be asked: that is the latest now
    assert (Run(url, TEXTS).commit(), shown(url)) == (5, ALL)


def test_other_settings_and_new_questions_are_asked(url):
    Run(url).ask().commit()
    more = Run(url, questions=[*QUESTIONS, ("q9", "a")]).ask()
    assert (more.n_asked, more.commit()) == (1, 2)
    other = Run(url, recipe="dense").ask(mark="d")
    assert (other.n_asked, other.commit(), other.job.superseded) == (6, 3, 6)


def test_the_prefix_and_the_limit_are_told_and_make_another_question():
    asked = [
        question_of(Record(0, "q:1", {"question_id": "q", "question": "Who?", "document_id": "a", **own}))
        for own in ({}, {"answer_prefix": " It is", "max_new_tokens": 8})
    ]
    stored = [Stored("a", "1" * 64, "f" * 64, "m", "graph", 10, 10, 1)]
    keys = AnswerKeys({})
    made = [join([question], Catalog(stored, "m", RECIPE), keys)[0] for question in asked]
    assert made[0][0].key != made[1][0].key
    about = {"keys": keys, "recipe": RECIPE, "model": MODEL, "failures": Failures("questions")}
    job = Asked(asked[1:], made[1], [], store=None, **about)
    (told,) = job.asks(batches_of(made[1], [0], questions_per_batch=2)[0])["questions"]
    assert (told["answer_prefix"], told["max_new_tokens"]) == (" It is", 8)


def test_what_an_interrupted_run_has_finished_is_kept(url):
    killed = Run(url)
    killed.ask(killed.batches[:2])
    assert shown(url) == {}
    after = Run(url)
    assert (after.reused, after.n_asked) == (3, 3)
    after.ask(mark="x")
    assert after.commit() == 1
    assert after.store.pending() == []
    assert sorted(shown(url).values()) == ["1"] * after.reused + ["1x"] * after.n_asked


def test_killed_between_parts_and_manifest(url, monkeypatch):
    killed = Run(url).ask()
    monkeypatch.setattr(AnswerStore, "commit", kill)
    with pytest.raises(KeyboardInterrupt):
        killed.commit()
    monkeypatch.undo()
    assert shown(url) == {}
    after = Run(url)
    assert (after.n_asked, after.commit(), shown(url)) == (0, 1, ALL)


def test_killed_between_manifest_and_clearing(url, monkeypatch):
    killed = Run(url).ask()
    monkeypatch.setattr(AnswerStore, "drop_pending", kill)
    with pytest.raises(KeyboardInterrupt):
        killed.commit()
    monkeypatch.undo()
    assert (shown(url), len(killed.store.pending())) == (ALL, 4)
    after = Run(url)
    assert (after.n_asked, after.commit(), shown(url), after.store.pending()) == (0, None, ALL, [])


@pytest.mark.parametrize("asks_first", [True, False])
def test_two_runs_at_once(url, asks_first):
    one, two = Run(url), Run(url)
    one.ask(mark="one")
    if asks_first:
        two.ask(mark="two")
    assert one.commit() == 1
    if not asks_first:
        two.ask(mark="two")
    assert two.commit() is None
    assert set(shown(url).values()) == {"1two" if asks_first else "1one"}  # two's batches have replaced one's
    assert two.store.pending() == []
    assert {row["answer"] for row in two.rows()} == set(shown(url).values())
    assert len(two.store.folder.list("parts")) == 1


def test_two_runs_at_once_that_share_some_questions(url):
    one, two = Run(url), Run(url, questions=[*QUESTIONS, ("q9", "a"), ("q9", "b")])
    one.ask()
    two.ask(mark="two")
    assert (one.commit(), two.commit()) == (1, 2)
    assert set(shown(url)) == {*ALL, ("q9", "a"), ("q9", "b")}
    assert sum(part.rows for run in two.store.runs() for part in run.parts) == 8


def test_what_failed_here_and_was_answered_elsewhere_is_answered(url):
    one, two = Run(url), Run(url, questions=[*QUESTIONS, ("q9", "a")])
    two.ask(failing=[("q0", "b")])
    one.ask()
    assert (one.commit(), two.commit()) == (1, 2)
    assert (two.job.tally.answered, two.job.failures.count, shown(url)[("q0", "b")]) == (7, 0, "1")
    assert [row["status"] for row in two.rows()] == ["ok"] * 7


def test_failed_questions_are_rows_and_are_asked_again(url):
    asked = [*QUESTIONS, ("q0", "nowhere"), ("q0", "a"), ("q1", "nowhere"), ("q1", "nowhere")]
    first = Run(url, questions=asked).ask(failing=[("q1", "b")])
    assert (first.commit(), first.job.failures.count) == (1, 5)
    rows = first.rows()
    assert sum(row["status"] == "failed" for row in rows) == 5
    stored = shown(url)
    assert len(stored) == 8  # a second row of a pair is reported, not stored
    assert [stored[pair] for pair in (("q1", "b"), ("q0", "nowhere"), ("q1", "nowhere"))] == [None] * 3
    again = Run(url, questions=asked)
    assert again.n_asked == 1
    again.ask(failing=[("q1", "b")])
    assert (again.commit(), again.rows()) == (None, rows)  # the same failure is not stored again
    mended = Run(url, questions=asked).ask()
    assert (mended.n_asked, mended.commit(), shown(url)[("q1", "b")]) == (1, 2, "1")


def test_a_damaged_batch_is_asked_again(url):
    killed = Run(url)
    killed.ask()
    name = killed.store.pending()[0]
    killed.store.folder.write(f"pending/{name}.parquet", b"PAR1")
    after = Run(url)
    assert after.n_asked in (1, 2)
    after.ask()
    assert (after.commit(), shown(url), after.store.pending()) == (1, ALL, [])


def test_a_lost_batch_ends_the_commit(url):
    run = Run(url).ask()
    run.store.drop_pending(run.batches[0].name)
    with pytest.raises(StoreError, match="no such file"):
        run.commit()
    assert shown(url) == {}


def test_a_batch_that_comes_twice_counts_once(url):
    run = Run(url)
    run.ask()
    run.ask(mark="again")
    assert (run.job.tally.answered, run.commit(), len(shown(url))) == (6, 1, 6)


def test_without_a_store_answers_are_in_memory(url):
    run = Run(url, memory=True).ask(failing=[("q0", "a")])
    assert run.commit() is None
    assert [row["answer"] for row in run.rows()] == [None, "1", "1", "1", "1", "1"]


def test_too_many_failures_end_the_run(url):
    with pytest.raises(FailedRowsError, match=r"max_failed_rows = 1: 2 questions failed.*'q0' on 'b': bad; 'q1'"):
        Run(url, limit=1).ask(failing=[("q0", "b"), ("q1", "b")])
    with pytest.raises(FailedRowsError, match=r"max_failed_rows = 0: 1 questions failed.*document is not in the store"):
        Run(url, questions=[("q0", "nowhere")], limit=0)
    after = Run(url, limit=2).ask()
    assert (after.reused, after.commit(), shown(url)) == (3, 1, ALL)
