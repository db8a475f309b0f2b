"""Short documents share forward passes in a build, and no other's fate."""

from __future__ import annotations

import pyarrow as pa
import pytest
import ray.data

from rabatch.config import BuildConfig, ModelConfig
from rabatch.jobs import prefilling
from rabatch.jobs.cluster import dataset_context
from rabatch.jobs.plan import plan_documents, read_documents
from rabatch.jobs.prefilling import PrefillActor
from rabatch.jobs.sources import list_units

BUILD = BuildConfig(sink_tokens=4, window_tokens=16, prefill_chunk_tokens=256)
TEXTS = ["The mill is old. " * 8, "Salt and wool. " * 30, "The harbour closed. " * 5]


def document(number: int, text: str) -> dict[str, object]:
    return {"number": number, "document_id": f"d{number}", "text": text, "metadata": "{}", "error": None}


def as_packs(packs):
    return pa.Table.from_pylist([{"documents": pack} for pack in packs])


def rows_of(tables):
    return [row for table in tables for row in table.to_pylist()]


@pytest.fixture(scope="module")
def actor():
    return PrefillActor(ModelConfig(device="cpu"), BUILD, threads=1)


def test_a_pack_yields_every_document(actor):
    rows = rows_of(actor(as_packs([[document(i, text) for i, text in enumerate(TEXTS)]])))
    for number, text in enumerate(TEXTS):
        mine = [row for row in rows if row["number"] == number]
        assert len(mine) == mine[0]["n_units"]
        assert [row["text_chars"] for row in mine if row["unit_kind"] == "tokens"] == [len(text)]
        assert {row["document_id"] for row in mine} == {f"d{number}"}


def test_a_bad_document_fails_alone(actor):
    documents = [document(i, text) for i, text in enumerate([TEXTS[0], "  ", TEXTS[2]])]
    documents.append({**document(3, ""), "error": "text = '': is empty"})
    rows = rows_of(actor(as_packs([documents])))
    failed = {row["number"]: row["error"] for row in rows if row["error"] is not None}
    assert set(failed) == {1, 3}
    assert "is empty" in failed[1]
    assert {row["number"] for row in rows if row.get("unit_kind") == "layer"} == {0, 2}


def test_a_pack_that_fails_is_tried_one_by_one(actor, monkeypatch):
    real = prefilling.prefill_units

    def fails_on_the_second(loaded, contexts, build):
        if any(len(context) > 100 for context in contexts):
            raise RuntimeError("no room")
        return real(loaded, contexts, build)

    monkeypatch.setattr(prefilling, "prefill_units", fails_on_the_second)
    rows = rows_of(actor(as_packs([[document(i, text) for i, text in enumerate(TEXTS)]])))
    assert [(row["number"], "no room" in row["error"]) for row in rows if row["error"] is not None] == [(1, True)]
    for number in (0, 2):
        assert [row["unit_kind"] for row in rows if row["number"] == number].count("tokens") == 1


@pytest.mark.parametrize("pack_chars", [0, 100, 1000])
def test_packs_hold_every_document_once_and_no_more_than_fits(local_ray, tmp_path, pack_chars):
    """Of text files and of the lines of one; long documents are alone, short ones share as far as they fit."""
    folder = tmp_path / "documents"
    folder.mkdir()
    lengths = [10, 20, 30, 40, 45, 49, 51, 300, 700]
    for number, length in enumerate(lengths):
        (folder / f"{number}.txt").write_text("x" * length)
    (folder / "lines.jsonl").write_text("".join(f'{{"document_id": "l{n}", "text": "{"y" * 25}"}}\n' for n in range(7)))
    units = list_units(str(folder), field="documents")
    planned = plan_documents(units)
    with dataset_context(row_blocks=True):
        dataset: ray.data.Dataset = read_documents(units, planned, list(range(len(planned))), pack_chars=pack_chars)
        packs = [row["documents"] for row in dataset.take_all()]
    numbers = sorted(document["number"] for pack in packs for document in pack)
    assert numbers == list(range(len(planned)))
    for pack in packs:
        chars = [len(document["text"]) for document in pack]
        assert len(pack) == 1 or (sum(chars) <= pack_chars and max(chars) <= pack_chars // 2)
        for found in pack:
            assert found["document_id"] == planned[found["number"]].document_id
    total = sum(chars for chars in lengths + [25] * 7 if chars <= pack_chars // 2)
    alone = sum(chars > pack_chars // 2 for chars in lengths + [25] * 7)
    assert len(packs) <= alone + (2 * total // pack_chars + 1 if pack_chars else 0)
