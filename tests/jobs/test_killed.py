"""What dies while a job runs: actors, drivers, machines, memory. Nothing is lost, nothing done or stored twice.

Builds whose prefill actors or driver are killed: tests/jobs/test_build.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from rabatch.config import GenerationSettings, Resources
from rabatch.demo.corpus import write_corpus
from rabatch.index.links import unreachable
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
from rabatch.jobs.cluster import OOM_RETRIES
from rabatch.storage.answers import AnswerStore
from rabatch.storage.store import IndexStore
from rabatch.storage.verify import verify
from tests.jobs.processes import command, environment, killer, script

pytestmark = pytest.mark.slow
SHORT = GenerationSettings(max_new_tokens=24)
ONE_EACH = Resources(questions_per_batch=1, answer_actors=1)


def answers_of(rows):
    return {(row["question_id"], row["document_id"]): (row["status"], row["answer"]) for row in rows}


def stored_pairs(path):
    """How often each question and document is stored in an answers store."""
    store = AnswerStore(str(path))
    tables = [store.read(part) for run in store.runs() for part in run.parts]
    return Counter((row["question_id"], row["document_id"]) for table in tables for row in table.to_pylist())


def commits(store):
    """Time and content of every manifest."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(store).glob("manifests/*/*.json")}


def sound(store):
    return verify(IndexStore(str(store)), check_graph=lambda n, e: len(unreachable(n, e))) == []


@pytest.fixture(scope="module")
def undisturbed(demo_store):
    return answers_of(answer(demo_store.questions, store=demo_store.store, generation=SHORT, progress=False).rows)


def test_a_graph_actor_is_killed(local_ray, tmp_path):
    corpus = write_corpus(str(tmp_path / "corpus"), n_documents=3, tokens=4000, n_questions=1)
    with killer("GraphActor", limit=2) as killed:
        result = build(corpus["paths"]["documents"], store=tmp_path / "index", progress=False)
    assert len(killed) == 2
    assert (result.built, result.failed) == (3, 0)
    assert sound(tmp_path / "index")


def test_an_answer_actor_is_killed(demo_store, undisturbed, tmp_path):
    pending = tmp_path / "answers" / "pending"
    asked = {"store": demo_store.store, "generation": SHORT, "output": tmp_path / "answers", "resources": ONE_EACH}
    with killer("AnswerActor", limit=2, when=lambda: any(pending.glob("*"))) as killed:
        result = answer(demo_store.questions, **asked, progress=False)
    assert len(killed) == 2
    assert answers_of(result.rows) == undisturbed
    assert stored_pairs(tmp_path / "answers") == dict.fromkeys(undisturbed, 1)


def test_a_question_that_always_kills_its_actor_fails_and_the_others_do_not(demo_store, tmp_path):
    asked = {"store": demo_store.store, "generation": SHORT, "output": tmp_path / "answers", "resources": ONE_EACH}
    some = demo_store.questions[:4]  # of one document
    with killer("AnswerActor", limit=100) as killed:
        result = answer(some, **asked, progress=False)
    assert len(killed) >= 4
    assert result.failed > 0
    assert all("its worker died 4 times" in row["reason"] for row in result.rows if row["status"] == "failed")
    again = answer(some, **asked, progress=False)
    assert (again.reused, again.failed) == (result.answered, 0)


def test_the_driver_of_answering_is_killed(demo_store, undisturbed, tmp_path):
    questions, output = tmp_path / "questions.jsonl", tmp_path / "answers"
    questions.write_text("".join(json.dumps(question) + "\n" for question in demo_store.questions))
    flags = ("--store", demo_store.store, "--output", output, "--max-new-tokens", 24)
    run = command("answer", questions, *flags, "--questions-per-batch", 1, "--answer-actors", 1, "--json")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(run, cwd=tmp_path, env=environment(), **quiet)
    pending, deadline = output / "pending", time.monotonic() + 200
    while len(list(pending.glob("*.parquet"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)  # its workers notice, and end
    finished = {path: path.stat().st_mtime_ns for path in pending.glob("*.parquet")}
    assert 3 <= len(finished) < len(undisturbed)
    assert AnswerStore(str(output)).runs() == []
    # The rerun is killed too, once it is past what is there: what the first one has finished is not done again.
    process = subprocess.Popen(run, cwd=tmp_path, env=environment(), **quiet)
    deadline = time.monotonic() + 200
    while len(list(pending.glob("*.parquet"))) <= len(finished) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["reused"] > len(finished)
    assert answers_of(result["rows"]) == undisturbed
    assert stored_pairs(output) == dict.fromkeys(undisturbed, 1)


_OUT_OF_MEMORY = """
import json, sys
from rabatch.jobs.build import build
result = build(sys.argv[1], store="index", progress=False)
print(json.dumps([result.built, result.skipped, [row["reason"] for row in result.rows if row["status"] == "failed"]]))
"""


def test_the_memory_monitor_kills_whatever_runs(tmp_path):
    """Ray kills workers while more of the memory is used than it is told to allow; here that is always so."""
    corpus = write_corpus(str(tmp_path / "corpus"), n_documents=2, tokens=2000, n_questions=1)
    documents = corpus["paths"]["documents"]
    tight = {"RAY_memory_usage_threshold": "0.0001", "RAY_memory_monitor_refresh_ms": "50", "RAY_task_oom_retries": "1"}
    built, skipped, reasons = script(_OUT_OF_MEMORY, tmp_path, documents, **tight)
    assert (built, skipped) == (0, 0)
    assert [reason.split(";")[0] for reason in reasons] == ["cannot be read: its reader died, perhaps out of memory"]
    assert script(_OUT_OF_MEMORY, tmp_path, documents) == [2, 0, []]
    assert sound(tmp_path / "index")


def test_a_task_without_memory_is_not_tried_for_ever(local_ray):
    assert int(os.environ["RAY_task_oom_retries"]) == OOM_RETRIES  # noqa: SIM112 (Ray's own spelling)


_NODE_LOST = """
import json, os, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from tests.jobs.processes import workers

small = {"object_store_memory": 300 << 20, "include_dashboard": False, "temp_dir": sys.argv[3]}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 5, **small})
second, third = (cluster.add_node(num_cpus=3, **small) for _ in range(2))
ray.init(address=cluster.address, log_to_driver=False)

from rabatch.config import GenerationSettings, Resources
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build

lost = {}

def lose(node, name, actors, done):
    while not done():
        time.sleep(0.05)
    (pid,) = [info.process.pid for info in node.all_processes["raylet"]]
    lost[name] = sum(len(workers(pid, actor)) for actor in actors)
    cluster.remove_node(node, allow_graceful=False)

def committed():
    return sorted(str(path) for path in Path("index/manifests").glob("*/*.json"))

watch = threading.Thread(target=lose, args=(second, "build", ("PrefillActor", "GraphActor"), committed))
watch.start()
resources = Resources(prefill_actors=2, graph_actors=2, answer_actors=3, questions_per_batch=1)
built = build(sys.argv[1], store="index", progress=False, resources=resources)
watch.join()
pending = lambda: list(Path("answers/pending").glob("*.parquet"))
watch = threading.Thread(target=lose, args=(third, "answer", ("AnswerActor",), pending))
watch.start()
short = GenerationSettings(max_new_tokens=24)
asked = {"store": "index", "generation": short, "resources": resources, "progress": False}
answered = answer(sys.argv[2], output="answers", **asked)
watch.join()
again = answer(sys.argv[2], output="answers", **asked)
alone = answer(sys.argv[2], **asked)
pairs = lambda rows: [[row["question_id"], row["answer"]] for row in rows]
told = json.dumps({
    "lost": lost, "built": built.built, "failed": built.failed, "answered": answered.answered,
    "reused": again.reused, "same": pairs(answered.rows) == pairs(alone.rows), "nodes": len(ray.nodes()),
    "alive": sum(node["Alive"] for node in ray.nodes()),
})
ray.shutdown()
cluster.shutdown()
print(told, flush=True)
os._exit(0)  # Ray's own exit complains of the machines that are gone
"""


@pytest.mark.timeout(600)
def test_a_machine_is_lost(tmp_path):
    corpus = write_corpus(str(tmp_path / "corpus"), n_documents=5, tokens=3000, n_questions=6)
    paths = corpus["paths"]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # sockets in it need a short path
        told = script(_NODE_LOST, tmp_path, paths["documents"], paths["questions"], folder, timeout_s=560)
    assert (told["nodes"], told["alive"]) == (3, 1)
    assert min(told["lost"].values()) > 0, "the machine that was lost had actors"
    assert (told["built"], told["failed"]) == (5, 0)
    assert (told["answered"], told["reused"], told["same"]) == (30, 30, True)
    assert sound(tmp_path / "index")
    assert set(stored_pairs(tmp_path / "answers").values()) == {1}


_STORE_FULL = """
import json, re, sys
import numpy as np
import ray
from ray._private.internal_api import memory_summary

ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
held = [ray.put(np.zeros(16 << 20, np.uint8)) for _ in range(int(sys.argv[3]))]

from rabatch.config import GenerationSettings
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build

built = build(sys.argv[1], store="index", progress=False)
answered = answer(sys.argv[2], store="index", output="answers", progress=False,
                  generation=GenerationSettings(max_new_tokens=8))
spilled = re.search(r"Spilled (\\d+) MiB", memory_summary(ray.get_runtime_context().gcs_address, stats_only=True))
print(json.dumps([built.built, answered.answered, int(spilled[1]) if spilled else 0]))
"""


def test_the_object_store_is_full(tmp_path):
    corpus = write_corpus(str(tmp_path / "corpus"), n_documents=2, tokens=6000, n_questions=2)
    paths = corpus["paths"]
    built, answered, spilled_mib = script(_STORE_FULL, tmp_path, paths["documents"], paths["questions"], 5)
    assert spilled_mib > 0
    assert (built, answered) == (2, 4)
    assert sound(tmp_path / "index")
