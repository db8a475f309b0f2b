"""The whole way on object storage: corpus, index and answers on an S3 server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from rabatch.cli import main
from rabatch.config import BuildConfig, Resources
from rabatch.demo.corpus import write_corpus
from rabatch.demo.run import run_demo
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
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


def test_build_and_answer_on_s3(local_ray, tmp_path, options):
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
    assert {"answers.parquet", "answers.jsonl"} <= there


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
