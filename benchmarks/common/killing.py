"""A build and its answering in processes of their own, and killing them and their actors at random times."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from rabatch.storage.answers import AnswerStore

ROOT = Path(__file__).parents[2]
VICTIMS = ("driver", "PrefillActor", "GraphActor", "AnswerActor")


def commands(folder: Path, paths: dict[str, str], name: str) -> list[list[str]]:
    program = [sys.executable, "-m", "rabatch.cli"]
    store, answers = str(folder / f"{name}index"), str(folder / f"{name}answers")
    asked = [
        *program,
        "answer",
        paths["questions"],
        "--store",
        store,
        "--output",
        answers,
        "--questions-per-batch",
        "2",
    ]
    return [[*program, "build", paths["documents"], "--store", store], asked]


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def undisturbed(folder: Path, paths: dict[str, str]) -> dict[tuple[str, str], str]:
    for command in commands(folder, paths, "calm-"):
        if start(command, folder).wait() != 0:
            raise AssertionError(f"{command[3]} failed with nobody killing")
    return answers_in(folder / "calm-answers")


def disturbed(folder: Path, paths: dict[str, str], draw: random.Random, wanted: int) -> tuple[Counter[str], int]:
    """Run both commands to their end, with kills at random times; which there were, and how many starts.

    Each phase takes its half of the kills before it may finish undisturbed; when it is over with kills left, its
    last work is taken away, as if it had not been reached, so that there is something to kill.
    """
    killed: Counter[str] = Counter()
    starts = 0
    build_command, answer_command = commands(folder, paths, "")
    for command, share in ((build_command, wanted // 2), (answer_command, wanted)):
        while True:
            process = start(command, folder)
            starts += 1
            seen = committed(folder)
            while process.poll() is None:
                if sum(killed.values()) < share:
                    disturb(process, command, draw, killed, folder)
                time.sleep(0.05)
            again = committed(folder)
            for path, content in seen.items():
                if again.get(path) != content:
                    raise AssertionError(f"{path} was committed, and has changed")
            if process.returncode == 0:
                if sum(killed.values()) >= share:
                    break
                shorten(folder, command)
    return killed, starts


def disturb(
    process: subprocess.Popen[bytes], command: list[str], draw: random.Random, killed: Counter[str], folder: Path
) -> None:
    """Wait a random time, until there are actors, then kill one of them or the driver."""
    actors = ("PrefillActor", "GraphActor") if command[3] == "build" else ("AnswerActor",)
    victim = draw.choice(("driver", *actors))
    deadline = time.monotonic() + draw.uniform(0, 3)
    found: list[int] = []
    while process.poll() is None and (time.monotonic() < deadline or not found):
        found = actors_of(process.pid, draw.choice(actors) if victim == "driver" else victim)
        time.sleep(0.02)
    if process.poll() is None and found:
        pid = process.pid if victim == "driver" else draw.choice(found)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        killed[victim] += 1
        if victim == "driver":
            process.wait()
            end_session(process.pid)


def actors_of(pid: int, actor: str) -> list[int]:
    """Processes of an actor class, those that are still loading the model among them."""
    found = []
    for child in descendants(pid):
        try:
            line = Path(f"/proc/{child}/cmdline").read_text()
        except OSError:
            continue
        if f"MapBatches({actor})" in line:
            found.append(child)
    return found


def end_session(leader: int) -> None:
    """Wait until what a killed driver has started is gone: Ray's processes notice, and end."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        alive = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                except OSError:
                    continue
                if int(fields[3]) == leader and fields[0] != "Z":
                    alive.append(int(entry.name))
        if not alive:
            return
        time.sleep(0.2)


def shorten(folder: Path, command: list[str]) -> None:
    """Take away the newest index, or all answers."""
    if command[3] == "build":
        newest = max(folder.glob("index/manifests/*/*.json"), key=lambda path: path.stat().st_mtime)
        newest.unlink()
    else:
        shutil.rmtree(folder / "answers")


def committed(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every manifest, of indexes and of runs."""
    paths = [*folder.glob("index/manifests/*/*.json"), *folder.glob("answers/runs/*.json")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def answers_in(path: Path) -> dict[tuple[str, str], str]:
    store = AnswerStore(str(path))
    rows = [row for run in store.runs() for part in run.parts for row in store.read(part).to_pylist()]
    return {(row["question_id"], row["document_id"]): f"{row['status']} {row['answer']}" for row in rows}


def stored_pairs(path: Path) -> Counter[tuple[str, str]]:
    store = AnswerStore(str(path))
    parts = (part for run in store.runs() for part in run.parts)
    tables = (store.read(part, columns=["question_id", "document_id"]) for part in parts)
    return Counter((row["question_id"], row["document_id"]) for made in tables for row in made.to_pylist())


def descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = set(), [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found.update(new)
        waiting += new
    return found
