"""The answers store: whole runs only, one after the other, and nothing damaged is served."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from rabatch.errors import FormatVersionError, IntegrityError, StoreError
from rabatch.records import ANSWERS, EXPORTED_ANSWERS, STORED_ANSWERS
from rabatch.storage.answers import AnswerKeys, AnswerStore, Run, encode, exported
from rabatch.storage.answers_garbage import collect_answers
from rabatch.storage.manifest import utc_now
from rabatch.storage.store import IndexStore


def rows(*names, text="yes", status="ok"):
    """Answer rows of the pairs `names`, each ``question/document``."""
    made = []
    for name in names:
        question_id, document_id = name.split("/")
        values = dict.fromkeys(STORED_ANSWERS.names)
        values |= {"question_id": question_id, "document_id": document_id, "status": status, "answer": text}
        values |= {"evidence": [{"start": 0, "end": 3, "score": 0.5}], "answer_key": f"{name}={text}"}
        made.append(values)
    return pa.Table.from_pylist(made, STORED_ANSWERS)


def commit(store, *tables, number=None):
    attempt = store.new_attempt()
    parts = tuple(store.put(table, attempt=attempt, number=i) for i, table in enumerate(tables))
    number = len(store.runs()) + 1 if number is None else number
    run = Run(number=number, created_at=utc_now(), attempt=attempt, definition_sha256="d", parts=parts)
    return run, store.commit(run)


def answers(store, **which):
    return [
        (row["question_id"], row["document_id"], row["answer"], row.get("superseded"))
        for table in exported(store, **which)
        for row in table.to_pylist()
    ]


@pytest.fixture
def store(tmp_path):
    return AnswerStore(tmp_path / "answers", create=True)


def test_a_run_is_seen_as_a_whole_or_not_at_all(store):
    attempt = store.new_attempt()
    parts = tuple(store.put(rows(f"q/{d}"), attempt=attempt, number=i) for i, d in enumerate("ab"))
    store.put_pending("x", rows("q/c"))
    assert (store.runs(), answers(store)) == ([], [])  # killed here: parts without a manifest are nothing
    run = Run(number=1, created_at=utc_now(), attempt=attempt, definition_sha256="d", parts=parts)
    assert store.commit(run)
    assert store.runs() == [run]
    assert answers(AnswerStore(store.url)) == [("q", "a", "yes", None), ("q", "b", "yes", None)]
    (table, _) = exported(store)
    assert table.schema.equals(EXPORTED_ANSWERS)
    assert table.select(ANSWERS.names).to_pylist() == rows("q/a").select(ANSWERS.names).to_pylist()
    assert store.read_pending("x").equals(rows("q/c"))


def test_the_latest_row_of_a_pair_counts(store):
    commit(store, rows("q/a", "q/b"), rows("r/a"))
    commit(store, rows("q/a", text="new"))
    commit(store, rows("q/b", text="", status="failed"))
    assert answers(store) == [("r", "a", "yes", None), ("q", "a", "new", None), ("q", "b", "", None)]
    assert answers(store, every=True, question_id="q", document_id="a") == [
        ("q", "a", "yes", True), ("q", "a", "new", False)
    ]  # fmt: skip
    assert answers(store, document_id="a", question_id="r") == [("r", "a", "yes", None)]


def test_of_two_runs_with_one_number_one_commits(store):
    def race(name):
        return commit(store, rows(name), number=1)

    with ThreadPoolExecutor(8) as pool:
        raced = list(pool.map(race, [f"q/{n}" for n in range(8)]))
    (winner,) = [run for run, won in raced if won]
    assert store.runs() == [winner]
    assert len(answers(store)) == 1


def test_what_is_not_there_is_not_committed(store):
    attempt = store.new_attempt()
    part = store.put(rows("q/a"), attempt=attempt, number=0)
    store.discard((part,))
    run = Run(number=1, created_at=utc_now(), attempt=attempt, definition_sha256="d", parts=(part,))
    with pytest.raises(IntegrityError, match=part.path):
        store.commit(run)
    assert store.runs() == []


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize("damage", [flip, lambda data: data[:-9], lambda data: None, lambda data: encode(rows("x/y"))])
@pytest.mark.parametrize("what", ["part", "run"])
def test_damage_is_refused_by_name(store, damage, what):
    run, _ = commit(store, rows("q/a"))
    commit(store, rows("q/b"))
    path = run.parts[0].path if what == "part" else run.path
    data = damage(store.folder.read(path))
    if data is None:
        store.folder.delete(path)
    else:
        store.folder.write(path, data)
    with pytest.raises(IntegrityError, match=path):
        answers(store)


def test_every_field_of_a_run_is_covered_by_its_digest(store):
    run, _ = commit(store, rows("q/a"))
    values = json.loads(run.to_json())
    for name, value in {"seconds": 1.5, "counts": {"answered": 7}, "definition_sha256": "e"}.items():
        with pytest.raises(IntegrityError, match="run_sha256"):
            Run.from_json(json.dumps({**values, name: value}).encode(), name=run.path)
    with pytest.raises(IntegrityError, match=r"belongs at runs/00000001\.json"):
        Run.from_json(run.to_json().encode(), name="runs/00000002.json")
    with pytest.raises(FormatVersionError, match="reads format 1"):
        Run.from_json(json.dumps({**values, "format_version": 2}).encode(), name=run.path)
    for text in (b"[]", b"{", b"{}", json.dumps({**values, "parts": [{"path": "/etc/x"}]}).encode()):
        with pytest.raises(IntegrityError, match="is not the manifest of a run"):
            Run.from_json(text, name=run.path)


def test_damaged_pending_rows_are_refused(store):
    store.put_pending("x", rows(*(f"q/{n}" for n in range(50))))
    path = "pending/x.parquet"
    data = bytearray(store.folder.read(path))
    data[len(data) // 3] ^= 1
    store.folder.write(path, bytes(data))
    with pytest.raises(IntegrityError, match=path):
        store.read_pending("x")


def test_only_answers_are_opened(tmp_path):
    IndexStore(str(tmp_path / "index"), create=True)
    with pytest.raises(StoreError, match="holds an index store"):
        AnswerStore(tmp_path / "index", create=True)
    with pytest.raises(StoreError, match=r"answers = .*holds no answers"):
        AnswerStore(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/rabatch-answers.json").write_text('{"format": "rabatch-answers", "format_version": 2}')
    with pytest.raises(FormatVersionError, match="reads format 1"):
        AnswerStore(tmp_path / "other")


def test_keys_are_stable():
    """Of a store written by this version they must be the same for ever, or everything is asked again."""
    keys = AnswerKeys({"recipe": {"method": "graph"}})
    key = keys.answer("q", "Who?", document_id="d", content_sha256="c", fingerprint="f")
    assert key == "ccf00cc64cf47947d5051709083590f4"
    assert keys.failure("q", None, "why") != keys.failure("q", "d", "why")
    about = {"document_id": "d", "content_sha256": "c", "fingerprint": "f"}
    own = [{"answer_prefix": " It is"}, {"max_new_tokens": 8}, {"answer_prefix": " It is", "max_new_tokens": 8}]
    assert len({key, *(keys.answer("q", "Who?", **about, **some) for some in own)}) == 4
    assert keys.answer("q", "Who?", **about, answer_prefix=None, max_new_tokens=None) == key


def test_garbage_is_what_no_run_lists_and_older_than_the_grace_period(tmp_path):
    store = AnswerStore(tmp_path, create=True)
    commit(store, rows("q1/d1"), rows("q2/d1"))
    lost = store.put(rows("q3/d1"), attempt=store.new_attempt(), number=0)  # its run was killed before its manifest
    store.put_pending("batch", rows("q4/d1"))
    (tmp_path / "parts" / "notes.txt").write_text("mine")
    kept = answers(store)

    young = collect_answers(store, grace_s=3600)
    assert (young.attempts, young.others, young.waiting) == ([], [], 1)
    later = time.time() + 7200
    dry = collect_answers(store, grace_s=3600, now_s=later, dry_run=True)
    assert [one.path for one in dry.attempts] == [lost.path.rsplit("/", 1)[0]]
    assert dry.others == ["pending/batch.parquet"]
    assert store.pending() == ["batch"]
    found = collect_answers(store, grace_s=3600, now_s=later)
    assert found == dry
    assert found.bytes == lost.bytes
    assert found.unknown == ["parts/notes.txt"]
    assert (tmp_path / "parts" / "notes.txt").exists()
    assert not (tmp_path / lost.path).parent.exists()
    assert store.pending() == []
    assert answers(store) == kept
    assert not collect_answers(store, grace_s=0, now_s=later).attempts


def test_no_garbage_is_collected_beside_a_damaged_run(tmp_path):
    store = AnswerStore(tmp_path, create=True)
    run, _ = commit(store, rows("q1/d1"))
    lost = store.put(rows("q3/d1"), attempt=store.new_attempt(), number=0)
    (tmp_path / run.path).write_text("{}")
    with pytest.raises(IntegrityError, match="runs/"):
        collect_answers(store, now_s=time.time() + 1e6)
    assert (tmp_path / lost.path).exists()
    with pytest.raises(StoreError, match="grace_s"):
        collect_answers(store, grace_s=-1)
