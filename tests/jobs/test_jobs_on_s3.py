"""The whole way on object storage: corpus, index and answers on an S3 server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer

import rabatch
from rabatch.cli import main
from rabatch.config import BuildConfig, Resources
from rabatch.demo.corpus import write_corpus
from rabatch.demo.run import run_demo
from rabatch.errors import IntegrityError
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
from rabatch.storage.answers import AnswerStore
from rabatch.storage.answers import exported as exported_rows
from rabatch.storage.store import IndexStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, Any]]:
    """Options of fsspec for a server with the bucket `bucket`. They carry the credentials, so that actors have them."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    made = {
        "endpoint_url": f"http://{host if host != '0.0.0.0' else '127.0.0.1'}:{port}",
        "key": "key",
        "secret": "secret",
        "client_kwargs": {"region_name": "eu-west-1"},
    }
    s3fs.S3FileSystem(**made).mkdir("bucket")
    yield made
    server.stop()


PIPELINE = """
documents: s3://bucket/corpus/documents.jsonl
questions: s3://bucket/corpus/questions.jsonl
store: s3://bucket/index
answers: s3://bucket/answers
build: {sink_tokens: 16, window_tokens: 128}
storage_options:
  endpoint_url: ${S3_ENDPOINT}
  key: ${S3_KEY}
  secret: secret
  client_kwargs: {region_name: eu-west-1}
"""


def test_build_and_answer_on_s3(local_ray, tmp_path, options, monkeypatch):
    corpus = write_corpus(str(tmp_path), n_documents=2, tokens=1200, n_questions=4)
    filesystem = s3fs.S3FileSystem(**options)
    for name in ("documents", "questions"):
        filesystem.put(corpus["paths"][name], f"bucket/corpus/{name}.jsonl")
    shared = {"store": "s3://bucket/index", "storage_options": options, "progress": False}
    config = BuildConfig(sink_tokens=16, window_tokens=128)
    first = build("s3://bucket/corpus/documents.jsonl", config=config, **shared)
    assert (first.built, first.failed) == (2, 0)
    again = build("s3://bucket/corpus/documents.jsonl", config=config, **shared)
    assert (again.built, again.skipped) == (0, 2)
    resources = Resources(cache_dir=str(tmp_path / "cache"))
    answered = answer("s3://bucket/corpus/questions.jsonl", output="s3://bucket/answers", resources=resources, **shared)
    assert (answered.answered, answered.failed) == (8, 0)
    assert answered.exact_match is not None
    assert answered.exact_match >= 0.75
    kept = {tuple(path.name.split("-")) for path in (tmp_path / "cache").iterdir() if path.name != ".lock"}
    manifests = IndexStore(shared["store"], storage_options=options).manifests()
    assert kept == {(part.sha256, str(part.bytes)) for manifest in manifests for part in manifest.parts}
    filesystem.invalidate_cache()
    there = {path.rsplit("/", 1)[-1] for path in filesystem.ls("bucket/answers")}
    assert {"answers.parquet", "answers.jsonl", "rabatch-answers.json", "runs", "parts"} <= there
    assert "pending" not in there
    with filesystem.open("bucket/answers/answers.jsonl") as file:
        assert [json.loads(line)["answer"] for line in file] == [row["answer"] for row in answered.rows]
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    monkeypatch.setenv("S3_KEY", options["key"])
    monkeypatch.setenv("S3_ENDPOINT", options["endpoint_url"])
    ran = rabatch.run(rabatch.Pipeline.from_yaml(tmp_path / "pipeline.yaml"), progress=False)
    assert (ran.build.skipped, ran.answers.reused, ran.answers.run) == (2, 8, None)  # the same definition in parts
    exported = ["answers", "--answers", "s3://bucket/answers", "--storage-options", json.dumps(options), "--out"]
    assert main([*exported, "s3://bucket/exported/x.parquet"]) == 0
    filesystem.invalidate_cache()
    with filesystem.open("bucket/exported/x.parquet") as file:
        assert pq.read_table(file).num_rows == 8
    (part,) = filesystem.find("bucket/answers/parts")
    filesystem.rm_file(part)
    with pytest.raises(IntegrityError, match=part.rsplit("/", 1)[-1]):
        list(exported_rows(AnswerStore("s3://bucket/answers", storage_options=options)))


def test_the_whole_demo_on_s3(local_ray, options, capsys):
    """The store on a server changes no answer and no size; then it is listed, verified and compacted there."""
    sizes = {"documents": 2, "tokens": 1500, "questions": 4, "seed": 3, "progress": False}
    here = run_demo(**sizes)
    there = run_demo(**sizes, store="s3://bucket/demo", storage_options=options)
    assert (there["failed"], there["documents"], there["questions"]) == (0, 2, 8)
    for name in ("exact_match", "tokens", "kv_bytes", "stored_bytes"):
        assert there[name] == here[name], name
    assert there["attended_shares"] == pytest.approx(here["attended_shares"], rel=0.01)

    def cli(command):
        assert main([command, "--store", "s3://bucket/demo", "--storage-options", json.dumps(options), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    for _ in range(2):  # without a catalog, and with one
        assert [row["document_id"] for row in cli("inspect")["documents"]] == ["doc-00000", "doc-00001"]
        compacted = cli("compact")
    assert (compacted["entries"], compacted["read"]) == (2, 0)
    found = cli("verify")
    assert (found["documents"], found["problems"]) == (2, [])
    assert found["bytes"] == there["stored_bytes"]
    assert cli("gc")["attempts"] == []
