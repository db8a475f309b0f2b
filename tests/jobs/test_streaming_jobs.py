"""Streaming heads through the jobs: the pattern is read once, by the driver, and the store says what streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rabatch.cli import main
from rabatch.config import BuildConfig, Recipe
from rabatch.errors import ConfigError
from rabatch.head_pattern import write_gates
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
from rabatch.storage.store import IndexStore
from rabatch.storage.verify import verify

WORDS = "The keeper of the north tower counted lamps and wrote their numbers into a green book. "
GATES = [[0.9, 0.1], [0.2, 0.3], [1.0, 1.0], [0.4, 0.8]]


def test_a_build_with_a_head_pattern(local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gates(tmp_path / "pattern", GATES, sink_tokens=16, window_tokens=64)
    documents = [{"document_id": str(i), "text": f"Document {i}. " + 40 * WORDS} for i in range(2)]
    store = tmp_path / "index"
    kept = {"sink_tokens": 16, "window_tokens": 64}
    config = BuildConfig(**kept, head_pattern=tmp_path / "pattern", head_sparsity=0.5)
    (tmp_path / "pattern" / "full_attention_heads.tsv").unlink()  # actors have what the driver read
    built = build(documents, store=store, config=config, progress=False)
    assert (built.built, built.failed) == (2, 0), built.rows
    again = BuildConfig(**kept, head_pattern=[[1, 0], [0, 0], [1, 1], [0, 1]])  # the same heads, told otherwise
    assert build(documents, store=store, config=again, progress=False).skipped == 2
    plain = build(documents[:1], store=store, config=BuildConfig(**kept), progress=False)
    assert (plain.built, plain.fingerprint != built.fingerprint) == (1, True)
    opened = IndexStore(store)
    assert verify(opened) == []
    for manifest in opened.manifests():
        streaming = ((1,), (0, 1), (), (0,)) if manifest.fingerprint == built.fingerprint else ()
        assert manifest.geometry.streaming_heads == streaming
    assert built.rows[0]["stored_bytes"] < 0.75 * plain.rows[0]["stored_bytes"]
    questions = [{"question_id": "q", "document_id": "0", "question": "What did the keeper count?"}]
    where = {"store": store, "output": tmp_path / "answers", "progress": False}
    found = answer(questions, recipe=Recipe(top_k=16), fingerprint=built.fingerprint, **where)
    assert [row["status"] for row in found.rows] == ["ok"], found.rows
    assert 0 < found.rows[0]["attended_share"] < 0.5
    recipe = Recipe(top_k=16, head_pattern=again.head_pattern)  # of the index that holds all heads
    same = answer(questions, recipe=recipe, fingerprint=plain.fingerprint, **where)
    for name in ("status", "answer", "attended_share"):
        assert same.rows[0][name] == pytest.approx(found.rows[0][name])
    assert answer(questions, recipe=recipe, fingerprint=plain.fingerprint, **where).reused == 1
    with pytest.raises(ConfigError, match="the pattern has 1 layers"):
        answer(questions, recipe=Recipe(head_pattern=[[1, 0]]), **where)
    assert main(["inspect", "--store", str(store), "--document", "0", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["documents"]
    assert sorted((row["streaming_heads"], row["heads"]) for row in rows) == [(0, 8), (4, 8)]
    assert main(["inspect", "--store", str(store)]) == 0
    assert capsys.readouterr().out.count(" 4 of 8 ") == 2
