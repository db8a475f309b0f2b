"""Processes of jobs, and killing them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def workers(pid: int, name: str) -> list[int]:
    """Processes of Ray workers whose title holds `name` that descend from `pid`."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        try:
            stat, line = (entry / "stat").read_text(), (entry / "cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if entry.name.isdigit():
            parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
            if name in line and "__init__" not in line:
                found.append(int(entry.name))

    def descends(child: int) -> bool:
        while child > 1 and child != pid:
            child = parents.get(child, 0)
        return child == pid

    return [worker for worker in found if descends(worker)]


@contextlib.contextmanager
def killer(actor: str, limit: int, *, when: Callable[[], bool] = lambda: True) -> Iterator[list[int]]:
    """Kills workers of an actor class at work, `limit` of them, from when on `when()` holds; yields the killed."""
    killed: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while len(killed) < limit and not stop.is_set():
            for pid in workers(os.getpid(), f"MapWorker(MapBatches({actor})).submit"):
                if pid not in killed and len(killed) < limit and when():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports this checkout."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def command(*arguments: object) -> list[str]:
    """A `rabatch` command."""
    return [sys.executable, "-m", "rabatch.cli", *map(str, arguments)]


def script(text: str, cwd: Path, *arguments: object, timeout_s: int = 280, **more: str) -> Any:
    """What a Python script printed in its last line, as JSON. It has a Ray of its own."""
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
