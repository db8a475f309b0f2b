"""Submission: what is sent, and a job on a real Ray head with its dashboard."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.util import get_node_ip_address

from rabatch.demo.corpus import write_corpus
from rabatch.errors import ConfigError
from rabatch.jobs import submit as submission
from rabatch.jobs.cluster import JobError
from rabatch.jobs.submit import submit
from rabatch.jobs.wheel import code_digest, code_files, write_wheel
from rabatch.pipeline import Pipeline

ROOT = Path(__file__).parents[2]


def make_pipeline(folder: Path, **options) -> Pipeline:
    places = {name: str(folder / name) for name in ("store", "answers")}
    return Pipeline(documents=str(folder / "d.jsonl"), questions=str(folder / "q.jsonl"), **places, **options)


class FakeCluster:
    """The part of Ray's job client that is used; a job runs until the log has been read."""

    def __init__(self, *, log=("one\n", "two\n"), status="SUCCEEDED", exit_code=0, breaks=0) -> None:
        self.jobs: dict[str, str] = {}
        self.sent: list[dict] = []
        self._log, self._ends, self._exit_code, self._breaks = log, status, exit_code, breaks

    def get_address(self) -> str:
        return "http://fake"

    def submit_job(self, **values) -> str:
        if values["submission_id"] in self.jobs:
            raise RuntimeError("400: submission_id already exists")
        self.jobs[values["submission_id"]] = "RUNNING"
        self.sent.append(values)
        return values["submission_id"]

    def get_job_status(self, name: str):
        if name not in self.jobs:
            raise RuntimeError("Request failed with status code 404: does not exist")
        return self.get_job_info(name).status

    def get_job_info(self, name: str):
        value = self.jobs[name]
        over = value not in ("RUNNING", "PENDING")
        status = SimpleNamespace(value=value, is_terminal=lambda: over)
        return SimpleNamespace(status=status, message="told", driver_exit_code=self._exit_code if over else None)

    async def tail_job_logs(self, name: str):
        for text in self._log:
            yield text
            if self._breaks:
                self._breaks -= 1
                raise RuntimeError("WebSocket connection closed unexpectedly")
        self.jobs[name] = self._ends


@pytest.fixture
def cluster(monkeypatch):
    def use(**options) -> FakeCluster:
        made = FakeCluster(**options)
        monkeypatch.setattr(submission, "_connect", lambda address: made)
        monkeypatch.setattr(submission, "_POLL_S", 0)
        return made

    return use


def test_the_id_is_of_definition_code_and_run(cluster, tmp_path):
    fake = cluster()
    pipeline = make_pipeline(tmp_path)
    first = submit(pipeline, address="x", wait=False)
    assert first.submission_id == f"rabatch-{pipeline.digest[:12]}-{code_digest(code_files())[:12]}"
    assert (first.attached, first.status, first.exit_code) == (False, "RUNNING", None)
    assert submit(pipeline, address="x", wait=False).attached
    assert submit(pipeline, address="x", wait=False, run_id="b").submission_id == first.submission_id + "-b"
    submit(make_pipeline(tmp_path, recipe="dense"), address="x", wait=False)
    assert len(fake.jobs) == 3
    env = fake.sent[0]["runtime_env"]
    assert fake.sent[0]["entrypoint"] == "python -m rabatch.jobs.run pipeline.yaml"
    assert code_digest(code_files())[:16] in Path(env["py_modules"][0]).name, "Ray knows a wheel by its name"


def test_the_log_is_followed_once_whatever_breaks(cluster, tmp_path):
    cluster(log=("one\n", "two\n", "three\n"), breaks=4)
    seen: list[str] = []
    done = submit(make_pipeline(tmp_path), address="x", write=seen.append)
    assert "".join(seen) == "one\ntwo\nthree\n"
    assert (done.status, done.exit_code) == ("SUCCEEDED", 0)


def test_a_log_that_cannot_be_followed_is_given_up(cluster, tmp_path):
    cluster(breaks=1000)
    with pytest.raises(JobError, match=r"cannot be followed.*the same command attaches to it"):
        submit(make_pipeline(tmp_path), address="x")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", None, 2), ("FAILED", -9, 2), ("STOPPED", None, 2)],
)
def test_the_exit_code_is_the_jobs(cluster, tmp_path, status, code, expected):
    cluster(status=status, exit_code=code)
    done = submit(make_pipeline(tmp_path), address="x")
    assert (done.status, done.exit_code) == (status, expected)
    again = submit(make_pipeline(tmp_path), address="x")
    assert (again.attached, again.exit_code) == (True, expected)
    assert "--run-id" in again.summary()[-1]


def test_who_is_slower_attaches(cluster, tmp_path, monkeypatch):
    """Between our look and our put another has submitted the job."""
    fake = cluster()
    real = fake.submit_job
    monkeypatch.setattr(fake, "submit_job", lambda **values: (real(**values), real(**values)))
    assert submit(make_pipeline(tmp_path), address="x").attached

    def refuse(**values):
        raise RuntimeError("500: no room")

    monkeypatch.setattr(fake, "submit_job", refuse)
    with pytest.raises(JobError, match=r"refused the job \(500: no room"):
        submit(make_pipeline(tmp_path), address="x", run_id="other")


def test_what_is_sent_does_not_depend_on_where_we_are(cluster, tmp_path, monkeypatch):
    fake = cluster()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BUCKET", "b")
    monkeypatch.setenv("TOKEN", "t")
    sent: list[Pipeline] = []
    real = fake.submit_job

    def read(**values):
        text = (Path(values["runtime_env"]["working_dir"]) / "pipeline.yaml").read_text()
        sent.append(Pipeline.from_yaml(text))
        assert "${BUCKET}" in text
        return real(**values)

    monkeypatch.setattr(fake, "submit_job", read)
    text = "documents: docs\nquestions: s3://${BUCKET}/q.jsonl\nstore: index\nanswers: answers\n"
    submit(Pipeline.from_yaml(text), address="x", env=("TOKEN",))
    assert (sent[0].documents, sent[0].questions) == (str(tmp_path / "docs"), "s3://b/q.jsonl")
    assert fake.sent[0]["runtime_env"]["env_vars"] == {"TOKEN": "t"}


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"storage_options": {"key": "AKIA", "secret": "s"}}, {}, "storage_options = .*write ..NAME"),
        ({}, {"env": ("NOT_SET_ANYWHERE",)}, "env = 'NOT_SET_ANYWHERE': is not set"),
        ({}, {"run_id": "a b"}, "run_id = 'a b'"),
    ],
)
def test_what_cannot_be_sent(cluster, tmp_path, options, more, message):
    fake = cluster()
    with pytest.raises(ConfigError, match=message):
        submit(make_pipeline(tmp_path, **options), address="x", **more)
    assert fake.sent == []


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no Ray dashboard answers there"):
            submit(make_pipeline(tmp_path), address=address)


def test_the_wheel_installs_and_is_the_same_for_the_same_code(tmp_path):
    files = code_files()
    for name in ("rabatch/jobs/submit.py", "rabatch/index/topk/kernel.py", "rabatch/py.typed"):
        assert name in files
    (tmp_path / "a").mkdir()
    first, second = write_wheel(tmp_path, files), write_wheel(tmp_path / "a", files)
    assert first.read_bytes() == second.read_bytes()
    changed = {**files, "rabatch/errors.py": b"x = 1\n"}
    assert write_wheel(tmp_path, changed).name != first.name
    target = tmp_path / "target"
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--target", str(target), str(first)]
    subprocess.run(command, check=True, capture_output=True)
    assert (target / "rabatch/jobs/submit.py").read_bytes() == files["rabatch/jobs/submit.py"]
    with zipfile.ZipFile(first) as archive:
        assert "Requires-Dist" not in archive.read("rabatch-0.1.0.dist-info/METADATA").decode()


# From here on: a real head. It runs in processes of its own, beside the session's embedded Ray.


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[str]:
    """The dashboard's address of a Ray head that has no code of ours."""
    gcs, dashboard, agent, client, metrics, exported, environments = free_ports(7)
    scripts = Path(sys.executable).parent
    folder = tempfile.mkdtemp(prefix="rb", dir="/tmp")  # a short name: sockets lie below it
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"RAY_agent_register_timeout_ms": "300000"}  # a busy machine takes its time
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{scripts}:{os.environ['PATH']}"}  # pip must be found
    command = [
        *(str(scripts / "ray"), "start", "--head", "--block", "--num-cpus", "4", "--disable-usage-stats"),
        *("--port", str(gcs), "--dashboard-port", str(dashboard), "--dashboard-host", "127.0.0.1"),
        *("--dashboard-agent-listen-port", str(agent), "--ray-client-server-port", str(client)),
        # Of ports that are told the raylet need not wait for a file, which it does not do for long.
        *("--dashboard-agent-grpc-port", str(metrics), "--metrics-export-port", str(exported)),
        *("--runtime-env-agent-port", str(environments)),
        *("--min-worker-port", "0", "--max-worker-port", "0", "--temp-dir", folder),
    ]
    process = subprocess.Popen(command, env=environment, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, "the head died"
            try:
                socket.create_connection((get_node_ip_address(), agent), timeout=5).close()
                submission._connect(address).list_jobs()
                break
            except (ConfigError, RuntimeError, OSError):
                assert time.monotonic() < deadline, "the head did not start"
                time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def rabatch(*arguments: str, timeout_s: int = 400, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rabatch.cli", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=timeout_s, stdin=subprocess.DEVNULL, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with a tiny corpus and `pipeline.yaml`."""
    folder = tmp_path_factory.mktemp("submitted")
    corpus = write_corpus(str(folder / "corpus"), n_documents=1, tokens=900, n_questions=2)
    pipeline = Pipeline(
        **{name: corpus["paths"][name] for name in ("documents", "questions")},
        store=str(folder / "index"),
        answers=str(folder / "answers"),
        build={"sink_tokens": 16, "window_tokens": 128},
        generation={"max_new_tokens": 8},
    )
    (folder / "pipeline.yaml").write_text(pipeline.to_yaml())
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_builds_and_answers_on_a_real_head(head, written):
    command = ("submit", str(written / "pipeline.yaml"), "--address", head)
    began = rabatch(*command, "--no-wait", "--json")
    assert began.returncode == 0, began.stderr
    job = json.loads(began.stdout)
    assert job["exit_code"] is None
    done = rabatch(*command, "--json")
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert (ended["submission_id"], ended["attached"], ended["exit_code"]) == (job["submission_id"], True, 0)
    assert "built 1" in done.stderr, "the job's log is followed"
    assert "answered 2" in done.stderr
    assert list((written / "answers/runs").iterdir())
    again = rabatch(*command)
    assert again.returncode == 0
    assert "--run-id" in again.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_exit_code_of_a_failing_job(head, written):
    text = (written / "pipeline.yaml").read_text()
    (written / "missing.yaml").write_text(text.replace("corpus/documents.jsonl", "corpus/missing.jsonl"))
    done = rabatch("submit", str(written / "missing.yaml"), "--address", head)
    assert done.returncode == 2, done.stdout
    assert "does not exist" in done.stdout
    assert "failed, exit code 2" in done.stdout
    (written / "q.jsonl").write_text(json.dumps({"question": "Who?", "document_id": "nowhere"}) + "\n")
    (written / "rows.yaml").write_text(text.replace("corpus/questions.jsonl", "q.jsonl"))
    done = rabatch("submit", str(written / "rows.yaml"), "--address", head)
    assert done.returncode == 1, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupt_stops_following_and_not_the_job(head, written):
    command = ["submit", str(written / "pipeline.yaml"), "--address", head, "--run-id", "interrupted"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rabatch.cli", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline(), "the log begins"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on" in err
    done = rabatch(*command, "--json")
    assert (done.returncode, json.loads(done.stdout)["attached"]) == (0, True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_jobs_are_entry_points_of_plain_ray_jobs(head, written, tmp_path):
    wheel = write_wheel(tmp_path, code_files())
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    documents, questions = (written / "corpus" / f"{name}.jsonl" for name in ("documents", "questions"))
    store, config = str(tmp_path / "index"), ("--sink-tokens", "16", "--window-tokens", "128")
    for entry in (
        ("rabatch.jobs.build", str(documents), "--store", store, *config),
        ("rabatch.jobs.answer", str(questions), "--store", store, "--output", str(tmp_path / "out")),
    ):
        command = [
            *(str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", head),
            *("--runtime-env-json", json.dumps({"py_modules": [str(wheel)]}), "--", "python", "-m", *entry),
        ]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out/answers.jsonl").is_file()
