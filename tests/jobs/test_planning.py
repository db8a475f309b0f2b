"""What the driver decides: doubles, pool sizes, which index answers which question."""

from __future__ import annotations

import pytest

from rabatch.config import Recipe, Resources
from rabatch.errors import ConfigError
from rabatch.jobs.catalog import Catalog, Stored, batches_of, chunks, join
from rabatch.jobs.cluster import Cluster, Memory, actor_memory, answer_pool, build_pools, worker_url
from rabatch.jobs.plan import plan_documents
from rabatch.jobs.rows import Record, question_of
from rabatch.jobs.sources import list_units
from rabatch.storage.answers import AnswerKeys


def stored(document_id, *, content="a", created=1, kind="graph", model="m", fingerprint="f"):
    return Stored(document_id, content * 64, fingerprint + kind, model, kind, 100, 1000, created)


def question(number, document_id=None, text="Who?", **more):
    values = {"question_id": f"q{number}", "question": text, "document_id": document_id, **more}
    return question_of(Record(number, f"q.jsonl:{number + 1}", values))


def joined(questions, indexes, recipe="graph", **options):
    catalog = Catalog(indexes, "m", Recipe(method=recipe), **options)
    return join(questions, catalog, AnswerKeys({"recipe": recipe}))


def test_questions_meet_documents_in_batches():
    pairs, refused = joined(
        [question(0, "a"), question(1), question(2, "a"), question(3, "b")], [stored("b"), stored("a")]
    )
    assert refused == []
    assert [(p.order, p.stored.document_id) for p in pairs] == [(0, "a"), (1, "a"), (1, "b"), (2, "a"), (3, "b")]
    batches = batches_of(pairs, range(5), questions_per_batch=2)
    got = [(b.stored.document_id, [pairs[n].order for n in b.pairs]) for b in batches]
    assert got == [("a", [0, 1]), ("a", [2]), ("b", [1, 3])]
    assert len({b.name for b in batches}) == 3
    assert [b.pairs for b in batches_of(pairs, [3, 4], questions_per_batch=2)] == [(3,), (4,)]


def test_the_newest_text_answers_and_an_older_index_of_it_if_that_has_the_graph():
    old, new = stored("a", created=1), stored("a", content="b", created=2)
    plain = stored("a", content="b", created=3, kind="none")
    assert joined([question(0, "a")], [old, new])[0][0].stored is new
    assert joined([question(0, "a")], [plain, new, old])[0][0].stored is new
    assert joined([question(0, "a")], [plain, new, old], recipe="flat")[0][0].stored is plain
    assert joined([question(0, "a")], [new, old], fingerprint=new.fingerprint)[0][0].stored is new


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
    pairs, (refused,) = joined([asked], [stored("a"), stored("foreign", model="other"), stored("plain", kind="none")])
    assert pairs == []
    assert reason in refused.reason


def test_documents_that_may_not_be_asked():
    only = {"a": None, "b": "its text is empty"}
    asked = [question(0), question(1, "b"), question(2, "c")]
    pairs, refused = joined(asked, [stored("a"), stored("b"), stored("c")], only=only)
    assert [(p.order, p.stored.document_id) for p in pairs] == [(0, "a")]
    assert [r.reason for r in refused] == [
        "its text is empty",
        "is none of the pipeline's documents; correct the document_id",
    ]


def test_an_empty_store_and_damaged_manifests():
    assert "the store holds no document of this model" in joined([question(0)], [])[1][0].reason
    reason = joined([question(0, "a")], [], damaged=["m.json"])[1][0].reason
    assert "1 manifests are damaged, see rabatch verify" in reason


def test_the_same_question_id_twice_of_one_document():
    pairs, refused = joined([question(0), question(0, "a"), question(0, "b")], [stored("a")])
    assert [pair.order for pair in pairs] == [0]
    assert "is the same as that of q.jsonl:1" in refused[0].reason
    assert "not in the store" in refused[1].reason


def test_the_key_of_an_answer_changes_with_all_that_it_depends_on():
    asked = [question(0, "a")]
    keys = {
        joined(asked, [stored("a")])[0][0].key,
        joined(asked, [stored("a", content="b")])[0][0].key,
        joined(asked, [stored("a", fingerprint="g")])[0][0].key,
        joined(asked, [stored("a")], recipe="dense")[0][0].key,
        joined([question(1, "a")], [stored("a")])[0][0].key,
        joined([question(0, "a", text="Where?")], [stored("a")])[0][0].key,
    }
    assert len(keys) == 6
    assert joined([question(0, "a", expected="x")], [stored("a", created=9)])[0][0].key in keys


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
    assert build_pools(Resources(), TWO_CORES, n_documents=8, gpus=0) == ((2, 2), (1, 1))
    assert build_pools(Resources(), Cluster(16, 0, 16), n_documents=99, gpus=0) == ((11, 11), (4, 4))
    assert build_pools(Resources(), Cluster(16, 0, 16), n_documents=1, gpus=0) == ((1, 1), (14, 14))
    assert build_pools(Resources(), GPUS, n_documents=100, gpus=1) == ((4, 4), (27, 27))
    one_each = Resources(prefill_actors=2, graph_actors=1)
    assert build_pools(one_each, TWO_CORES, n_documents=8, gpus=0) == ((2, 2), (1, 1))
    assert answer_pool(Resources(), TWO_CORES, n_rows=8, gpus=0) == (2, 2)
    assert answer_pool(Resources(), GPUS, n_rows=3, gpus=1) == (3, 3)
    assert answer_pool(Resources(answer_actors=1), GPUS, n_rows=3, gpus=1) == (1, 1)


def test_pools_may_grow_past_what_the_cluster_has_now():
    scaled = Resources(prefill_actors=(1, 40), graph_actors=(1, 8), answer_actors=(2, 64))
    assert build_pools(scaled, TWO_CORES, n_documents=8, gpus=0) == ((1, 40), (1, 8))
    assert answer_pool(scaled, TWO_CORES, n_rows=1, gpus=0) == (2, 64)


def test_memory_bounds_the_pools():
    machines = Cluster(16, 0, 16, machines=2, memory=(6 << 30, 4 << 30))
    memory = actor_memory(Resources(), 2 << 30)
    assert memory == (4 << 30, 0)
    assert answer_pool(Resources(), machines, n_rows=99, gpus=0, memory=memory) == (2, 2)
    assert build_pools(Resources(), machines, n_documents=99, gpus=0, memory=memory)[0] == (2, 2)
    assert answer_pool(Resources(), machines, n_rows=99, gpus=0, memory=Memory(99 << 30)) == (1, 1)
    assert answer_pool(Resources(answer_actors=5), machines, n_rows=99, gpus=0, memory=memory) == (5, 5)
    reserved = actor_memory(Resources(actor_memory_bytes=3 << 30), 2 << 30)
    assert answer_pool(Resources(answer_actors=3), machines, n_rows=99, gpus=0, memory=reserved) == (3, 3)
    with pytest.raises(ConfigError, match=r"actor_memory_bytes = 3221225472: .* room for 3 of 4 actors"):
        answer_pool(Resources(answer_actors=4), machines, n_rows=99, gpus=0, memory=reserved)


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
