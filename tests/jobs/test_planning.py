"""What the driver decides: doubles, pool sizes, which index answers which question."""

from __future__ import annotations

import json

import pytest

from rabatch.config import GenerationSettings, ModelConfig, Recipe, Resources
from rabatch.errors import ConfigError
from rabatch.jobs.catalog import Catalog, chunks, join
from rabatch.jobs.cluster import Cluster, answer_pool, build_pools, worker_url
from rabatch.jobs.plan import plan_documents
from rabatch.jobs.rows import Record, question_of
from rabatch.jobs.sources import list_units
from rabatch.storage.manifest import Geometry, Manifest, Part, fingerprint_of

MODEL_FIELDS = {"weights": "w", "rope": {"a": 1}, "ids": [1, 2]}


def manifest(document_id, *, content="a", created=1, index="graph", model=MODEL_FIELDS):
    fields = {"model": model, "build": {"index": index}}
    geometry = Geometry(
        n_layers=1, n_kv_heads=1, n_query_heads=1, head_dim=1, kv_dtype="float32", sink_tokens=0, window_tokens=0,
        index=index, degree=1, sliding_windows=(0,),
    )  # fmt: skip
    return Manifest(
        document_id=document_id, content_sha256=content * 64, fingerprint=fingerprint_of(fields),
        fingerprint_fields=json.loads(json.dumps(fields)), context_tokens=100, text_chars=400,
        created_at=f"2026-01-01T00:00:{created:02d}+00:00", geometry=geometry,
        parts=(Part(kind="tokens", path="parts/a.parquet", bytes=1, sha256="0" * 64, rows=100),),
    )  # fmt: skip


def question(number, document_id=None, text="Who?", **more):
    values = {"question_id": f"q{number}", "question": text, "document_id": document_id, **more}
    return question_of(Record(number, f"q.jsonl:{number + 1}", values))


def joined(questions, manifests, recipe="graph", per_batch=2, **options):
    recipe = Recipe(method=recipe)
    catalog = Catalog(manifests, MODEL_FIELDS, recipe, **options)
    settings = {"recipe": recipe, "generation": GenerationSettings(), "model": ModelConfig()}
    return join(questions, catalog, questions_per_batch=per_batch, **settings)


def test_questions_meet_documents_in_batches():
    batches, refused = joined(
        [question(0, "a"), question(1), question(2, "a"), question(3, "b")], [manifest("b"), manifest("a")]
    )
    assert refused == []
    got = [(b.manifest.document_id, [q["question_id"] for q in b.questions], b.order) for b in batches]
    assert got == [("a", ["q0", "q1"], (0, 1)), ("a", ["q2"], (2,)), ("b", ["q1", "q3"], (1, 3))]
    assert len({b.key for b in batches}) == 3


def test_the_newest_text_answers_and_an_older_index_of_it_if_that_has_the_graph():
    old, new = manifest("a", created=1), manifest("a", content="b", created=2)
    plain = manifest("a", content="b", created=3, index="none")
    assert joined([question(0, "a")], [old, new])[0][0].manifest is new
    assert joined([question(0, "a")], [plain, new, old])[0][0].manifest is new
    assert joined([question(0, "a")], [plain, new, old], recipe="flat")[0][0].manifest is plain
    assert joined([question(0, "a")], [new, old], fingerprint=new.fingerprint)[0][0].manifest is new


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (question(0, "nowhere"), "document is not in the store; build it first"),
        (question(0, "foreign"), "is indexed for another model"),
        (question(0, "plain"), "its index holds no graph; use another recipe"),
        (question(0, "a", text="  "), "question is empty"),
    ],
)
def test_a_question_that_no_index_answers(asked, reason):
    foreign = manifest("foreign", model={**MODEL_FIELDS, "weights": "other"})
    batches, (refused,) = joined([asked], [manifest("a"), foreign, manifest("plain", index="none")])
    assert batches == []
    assert reason in refused.reason


def test_an_empty_store_and_damaged_manifests():
    assert "the store holds no document of this model" in joined([question(0)], [])[1][0].reason
    reason = joined([question(0, "a")], [], damaged=["m.json"])[1][0].reason
    assert "1 manifests are damaged, see rabatch verify" in reason


def test_the_same_question_id_twice_of_one_document():
    batches, refused = joined([question(0), question(0, "a"), question(0, "b")], [manifest("a")])
    assert [b.order for b in batches] == [(0,)]
    assert "is the same as that of q.jsonl:1" in refused[0].reason
    assert "not in the store" in refused[1].reason


def test_the_key_of_a_batch_changes_with_all_that_the_answers_depend_on():
    asked = [question(0, "a")]
    keys = {
        joined(asked, [manifest("a")])[0][0].key,
        joined(asked, [manifest("a", content="b")])[0][0].key,
        joined(asked, [manifest("a")], recipe="dense")[0][0].key,
        joined([question(0, "a", text="Where?")], [manifest("a")])[0][0].key,
    }
    assert len(keys) == 4
    assert joined(asked, [manifest("a", created=9)])[0][0].key in keys


def test_chunks():
    assert [list(c) for c in chunks(range(5), 2)] == [[0, 1], [2, 3], [4]]


def test_the_first_document_of_an_id_that_can_be_built_stands(local_ray):
    rows = [
        {"document_id": "a", "text": ""},
        {"document_id": "a", "text": "first"},
        {"document_id": "b", "text": "b"},
        {"document_id": "a", "text": "second"},
    ]
    planned = plan_documents(list_units(rows, field="documents"))
    assert [row.document_id for row in planned] == ["a", "a", "b", "a"]
    assert [row.error is None for row in planned] == [False, True, True, False]
    assert "same as that of table:2, which is kept" in planned[3].error
    assert [row.chars for row in planned] == [0, 5, 1, 6]
    assert len(plan_documents(list_units(rows, field="documents"), limit=2)) == 2
    assert plan_documents(list_units([], field="documents")) == []


TWO_CORES = Cluster(cpus=4, gpus=0, cores=2)
GPUS = Cluster(cpus=32, gpus=4, cores=32)


def test_pools_fit_the_cluster():
    assert build_pools(Resources(), TWO_CORES, n_documents=8, gpus=0) == (2, 1)
    assert build_pools(Resources(), Cluster(16, 0, 16), n_documents=99, gpus=0) == (11, 4)
    assert build_pools(Resources(), Cluster(16, 0, 16), n_documents=1, gpus=0) == (1, 14)
    assert build_pools(Resources(), GPUS, n_documents=100, gpus=1) == (4, 27)
    assert build_pools(Resources(prefill_actors=2, graph_actors=1), TWO_CORES, n_documents=8, gpus=0) == (2, 1)
    assert answer_pool(Resources(), TWO_CORES, n_rows=8, gpus=0) == 2
    assert answer_pool(Resources(), GPUS, n_rows=3, gpus=1) == 3
    assert answer_pool(Resources(answer_actors=1), GPUS, n_rows=3, gpus=1) == 1


@pytest.mark.parametrize(
    ("resources", "cluster", "gpus", "reason"),
    [
        (Resources(cpus_per_actor=4), TWO_CORES, 0, "the cluster has 4"),
        (Resources(prefill_actors=4), TWO_CORES, 0, "need 5.5 logical CPUs"),
        (Resources(), TWO_CORES, 1, "the cluster has 0; use fewer actors, or device cpu"),
    ],
)
def test_pools_that_do_not_fit_are_refused(resources, cluster, gpus, reason):
    with pytest.raises(ConfigError, match=reason):
        build_pools(resources, cluster, n_documents=8, gpus=gpus)


def test_urls_for_workers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert worker_url("x/y", "store") == str(tmp_path / "x/y")
    assert worker_url(tmp_path / "x", "store") == str(tmp_path / "x")
    assert worker_url("s3://b/x", "store") == "s3://b/x"
    with pytest.raises(ConfigError, match="store = 'memory://x'"):
        worker_url("memory://x", "store")
