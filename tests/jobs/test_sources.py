"""Reading: what is in a file never raises, and every bad row says what mends it."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rabatch.errors import ConfigError, SourceError
from rabatch.jobs.rows import MAX_ID_BYTES, Place, Record, check_id, document_of, question_of, read_unit
from rabatch.jobs.sources import JSONL, PARQUET, list_units


def documents(source, **options):
    units = list_units(source, field="documents", **options)
    return [document_of(record) for unit in units.units for record in read_unit(units, unit)]


def questions(source):
    units = list_units(source, field="questions", suffixes=JSONL + PARQUET)
    return [question_of(record) for unit in units.units for record in read_unit(units, unit)]


def jsonl(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def test_a_folder_of_text_in_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/2.txt").write_text("two\r\nlines")
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.pdf").write_text("no text")
    (tmp_path / ".hidden.txt").write_text("hidden")
    units = list_units(tmp_path, field="documents")
    assert units.ignored_files == 1
    found = documents(str(tmp_path))
    assert [(d["document_id"], d["text"], d["error"]) for d in found] == [
        ("a.md", "with a mark", None),
        ("a.txt", "one", None),
        ("b/2.txt", "two\r\nlines", None),
    ]
    assert [d["source"] for d in found] == ["a.md", "a.txt", "b/2.txt"]


def test_one_text_file(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    assert [d["document_id"] for d in documents(str(tmp_path / "x.txt"))] == ["x.txt"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"text": "t"}, "column document_id is missing", id="no-id"),
        pytest.param({"document_id": None, "text": "t"}, "column document_id is missing or null", id="null-id"),
        pytest.param({"document_id": " ", "text": "t"}, "document_id is empty", id="empty-id"),
        pytest.param({"document_id": 1.5, "text": "t"}, "document_id is a float", id="float-id"),
        pytest.param({"document_id": "a\u0000b", "text": "t"}, "control character U+0000", id="nul-id"),
        pytest.param({"document_id": "a\nb", "text": "t"}, "control character U+000A", id="newline-id"),
        pytest.param({"document_id": "x" * 4097, "text": "t"}, "longer than 4096 bytes", id="long-id"),
        pytest.param({"document_id": "a"}, "column text is missing", id="no-text"),
        pytest.param({"document_id": "a", "text": None}, "column text is null", id="null-text"),
        pytest.param({"document_id": "a", "text": ""}, "text is empty", id="empty-text"),
        pytest.param({"document_id": "a", "text": " \n\t "}, "text is empty", id="white-text"),
        pytest.param({"document_id": "a", "text": ["t"]}, "text is a list", id="list-text"),
        pytest.param(b'{"document_id": "a", "text": "\\ud800"}', "half of a surrogate pair", id="surrogate"),
        pytest.param(b'{"document_id": "a", "te', "line is not JSON", id="broken-json"),
        pytest.param(b"[" * 100_000, "line is not JSON", id="nested-json"),
        pytest.param(b"[1]", "line is a JSON list", id="json-list"),
        pytest.param(b'{"document_id": "caf\xe9", "text": "t"}', "not UTF-8 at byte 20 (0xe9)", id="latin1"),
    ],
)
def test_a_bad_row_says_why_and_costs_no_other(tmp_path, row, reason):
    good = {"document_id": "good", "text": "fine"}
    found = documents(jsonl(tmp_path / "d.jsonl", good, row, b"  ", {**good, "document_id": "last"}))
    assert [d["error"] is None for d in found] == [True, False, True]
    assert reason in found[1]["error"]
    assert found[1]["source"] == "d.jsonl:2"
    assert found[2]["source"] == "d.jsonl:4"
    pa.Table.from_pylist(found)  # whatever it held, it can travel as Arrow


@pytest.mark.parametrize(
    "document_id",
    ["../../etc/x", "/abs", "a/../b", "..", "名" * 300, "عنوان " * 50, "👩‍👩‍👧" * 20, "a:b|c*?", "C:\\x", 7, "-rf"],
)
def test_ids_are_data(tmp_path, document_id):
    (found,) = documents(jsonl(tmp_path / "d.jsonl", {"document_id": document_id, "text": "t"}))
    assert found["error"] is None
    assert found["document_id"] == str(document_id)


def test_the_longest_id():
    assert check_id("document_id", "x" * MAX_ID_BYTES)[1] is None


def test_text_that_is_not_utf8_names_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (found,) = documents(str(tmp_path))
    assert found["document_id"] == "a.txt"
    assert "not UTF-8 at byte 3 (0xe9)" in found["error"]
    assert "iconv" in found["error"]


def test_extra_columns_become_json_metadata(tmp_path):
    row = {"document_id": "a", "text": "t", "year": 2024, "tags": ["x"], "none": None, "nan": float("nan")}
    (found,) = documents(jsonl(tmp_path / "d.jsonl", row))
    assert json.loads(found["metadata"]) == {"year": 2024, "tags": ["x"], "none": None, "nan": "nan"}


def test_parquet_by_row_group(tmp_path):
    table = pa.table({"document_id": [f"d{i}" for i in range(50)], "text": ["t"] * 49 + [None], "n": range(50)})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=20)
    units = list_units(str(tmp_path / "d.parquet"), field="documents")
    assert [unit.row_group for unit in units.units] == [0, 1, 2]
    found = documents(str(tmp_path / "d.parquet"))
    assert [d["document_id"] for d in found] == [f"d{i}" for i in range(50)]
    assert found[20]["source"] == "d.parquet:21"
    assert json.loads(found[21]["metadata"]) == {"n": 21}
    assert "text is null" in found[49]["error"]
    some = list(read_unit(units, units.units[1], only=[Place(3), Place(19)], columns=("document_id",)))
    assert [record.values for record in some] == [{"document_id": "d23"}, {"document_id": "d39"}]


def test_parquet_without_the_column_and_without_parquet(tmp_path):
    pq.write_table(pa.table({"document_id": ["a"], "body": ["t"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    found = documents(str(tmp_path))
    assert "column text is missing" in found[0]["error"]
    assert "not a readable Parquet file" in found[1]["error"]


def test_jsonl_rows_are_found_again_by_offset(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", *({"document_id": f"ü{i}", "text": "t" * i} for i in range(1, 9)))
    units = list_units(path, field="documents")
    (unit,) = units.units
    records = list(read_unit(units, unit))
    places = [Place(record.row, record.offset, record.length) for record in records[2::3]]
    assert list(read_unit(units, unit, only=places)) == records[2::3]


def test_tables_and_lists_and_datasets(local_ray):
    import ray

    rows = [{"document_id": f"d{i}", "text": f"text {i}"} for i in range(600)]
    sources = (rows, pa.Table.from_pylist(rows), ray.data.from_items(rows, override_num_blocks=3))
    for source in sources:
        found = documents(source)
        assert [(d["document_id"], d["text"], d["error"]) for d in found] == [
            (row["document_id"], row["text"], None) for row in rows
        ]
        assert found[599]["source"].endswith(":600")
    assert "give a dict a row" in documents([{"document_id": "a", "text": "t"}, "t"])[1]["error"]


def test_a_file_that_vanishes_is_a_failed_row(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    units = list_units(str(tmp_path), field="documents")
    (tmp_path / "a.txt").unlink()
    (record,) = read_unit(units, units.units[0])
    assert "cannot be read" in document_of(record)["error"]


@pytest.mark.parametrize(
    ("source", "error", "reason"),
    [
        ("missing", SourceError, "does not exist"),
        ("empty", SourceError, "holds no file of .txt, .md"),
        (7, SourceError, "ray.data.Dataset"),
        ("nosuch://x", SourceError, "cannot be read"),
        ("memory://x", ConfigError, "lives in one process"),
    ],
)
def test_a_source_that_is_none(tmp_path, monkeypatch, source, error, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=reason):
        list_units(source, field="documents")


def test_questions(tmp_path):
    path = jsonl(
        tmp_path / "q.jsonl",
        {"question": "Who?"},
        {"question": "Who?", "document_id": "d", "expected": 12, "kind": "single"},
        {"question_id": "q1", "question": " "},
        {"question_id": "q2"},
        b"{",
    )
    found = questions(path)
    assert found[0]["question_id"].startswith("q-")
    assert found[0]["question_id"] != found[1]["question_id"]
    assert found[0]["question_id"] == questions(path)[0]["question_id"]
    assert (found[1]["document_id"], found[1]["expected"], found[1]["error"]) == ("d", "12", None)
    own = {"answer_prefix", "max_new_tokens"}
    assert set(found[1]) == {"question_id", "document_id", "question", "expected", "source", "error", *own}
    reasons = ("question is empty", "column question is missing", "line is not JSON")
    assert [reason in q["error"] for reason, q in zip(reasons, found[2:], strict=True)] == [True] * 3


def test_a_question_has_a_prefix_and_a_limit_of_its_own(tmp_path):
    asked = {"question": "Who?"}
    path = jsonl(
        tmp_path / "q.jsonl",
        asked,
        {**asked, "answer_prefix": " It is", "max_new_tokens": 8},
        {**asked, "answer_prefix": None, "max_new_tokens": 8.0},
        {**asked, "answer_prefix": "", "max_new_tokens": None},
    )
    found = questions(path)
    own = [(q["answer_prefix"], q["max_new_tokens"], q["error"]) for q in found]
    assert own == [(None, None, None), (" It is", 8, None), (None, 8, None), (None, None, None)]
    ids = [q["question_id"] for q in found]
    assert len(set(ids)) == 3
    assert ids[0] == ids[3]


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"answer_prefix": 7}, "answer_prefix is a int; it must be a string, or left out"),
        ({"answer_prefix": "\ud800"}, "answer_prefix holds half of a surrogate pair at character 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number from 1 on"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens is nan"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens is inf"),
        ({"max_new_tokens": 1 << 40}, "max_new_tokens is 1099511627776"),
    ],
)
def test_a_wrong_prefix_or_limit_fails_its_question(own, reason):
    found = question_of(Record(0, "q:1", {"question": "Who?", **own}))
    assert found["error"].startswith(reason)
    json.dumps(found, allow_nan=False).encode()
