"""The state of a schedule as JSON objects below ``schedules/NAME`` of a folder, shared by all of its schedulers.

    begun.json                when the schedule was first seen
    runs/000007.json          run 7: the fire it is for
    runs/000007/lease-0001.json   who carries it out; 0002 is who took over, and so on
    runs/000007/beat-0001.json    until when the holder of that lease counts as alive, written again and again
    runs/000007/done.json     how it ended

All but beats are created if absent and never changed. A run has the number after the last one, and is appended only
when that one is done: so of several schedulers one creates it, no two runs overlap, and no fire is run twice. A holder
that died lets its beat expire; then of several others one creates the next lease, and finishes the run.

Schedulers compare the time of a beat with their own clock. A clock that is ahead by more than a lease takes over from a
holder that lives: the work is then done twice at the same time, which build and answer bear, and entered once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage.failures import MissingFileError
from rabatch.storage.filesystem import Folder
from rabatch.storage.marker import create_marker

_log = logging.getLogger(__name__)
_DIGITS = 6
_KEPT = 500  # runs; older ones are removed as new ones end
_MAX_BYTES = 1 << 20
_MARKER = "schedules/rabatch-schedules.json"
_BEATS_PER_LEASE = 4
_ENTRY = re.compile(r"runs/(\d{6})(?:\.json|/(done)\.json|/lease-(\d{4,})\.json)$")


@dataclass(frozen=True)
class Run:
    """One run of a schedule.

    Args:
        number: From 1, without gaps.
        fire: The time it is for, UTC.
        missed: Fires before it that it catches up.
        lease: Number of the last lease; 0 for none.
        done: What `Lease.finish` was given; None while it is not done.
    """

    number: int
    fire: datetime
    missed: int
    lease: int = 0
    done: dict[str, Any] | None = None


class Ledger:
    """The books of one schedule.

    Args:
        folder: Where ``schedules/`` lies.
        name: Of the schedule: letters, digits, ``.``, ``_`` and ``-``.
        now: The present time, UTC.
        lease_s: For how long a holder counts as alive after its last beat.
    """

    def __init__(self, folder: Folder, name: str, *, now: Callable[[], datetime], lease_s: float) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise StoreError("name", name, "must be letters, digits, '.', '_' and '-', and begin with one of the first")
        self._folder, self._now, self.lease_s = folder, now, lease_s
        self.root = f"schedules/{name}"

    def begin(self) -> datetime:
        """When the schedule began: now, if nobody was here before. Fires of the minute that it began in count.

        Raises:
            StoreError: The folder cannot be written to, or its server ignores the condition that leases rest on.
        """
        create_marker(self._folder, _MARKER, "rabatch-schedules", 1)
        path = f"{self.root}/begun.json"
        minute = self._now().replace(second=0, microsecond=0)
        self._create(path, {"at": _text(minute - timedelta(microseconds=1))})
        return _time(self._read(path)["at"])

    def runs(self, last: int | None = None) -> list[Run]:
        """Runs by number, with what is known of them; only the `last` so many if given."""
        leases: dict[int, int] = {}
        done: set[int] = set()
        for path in self._folder.list(f"{self.root}/runs"):
            if found := _ENTRY.search(path):
                number = int(found[1])
                leases[number] = max(leases.get(number, 0), int(found[3] or 0))
                if found[2]:
                    done.add(number)
        return [self._run(n, leases[n], n in done) for n in sorted(leases)[-last if last else 0 :]]

    def last(self) -> Run | None:
        """The run with the highest number."""
        runs = self.runs(last=1)
        return runs[0] if runs else None

    def append(self, after: Run | None, fire: datetime, missed: int) -> bool:
        """Add the run that follows `after`, which must be done; whether nobody else did."""
        assert after is None or after.done is not None
        number = 1 if after is None else after.number + 1
        return self._create(f"{self._path(number)}.json", {"fire": _text(fire), "missed": missed})

    def expires(self, run: Run) -> datetime | None:
        """Until when the holder of a run counts as alive; None if there is none."""
        if run.lease == 0:
            return None
        beat = f"{self._path(run.number)}/beat-{run.lease:04d}.json"
        try:
            return _time(self._read(beat)["expires_at"])
        except MissingFileError:  # the lease was taken a moment ago
            return _time(self._read(self._lease_path(run.number, run.lease))["expires_at"])

    def take(self, run: Run) -> Lease | None:
        """The right to carry out a run that has no living holder; None if another was faster."""
        lease = Lease(self, run.number, run.lease + 1)
        holder = {"host": socket.gethostname(), "process": os.getpid(), "taken_at": _text(self._now())}
        expires = {"expires_at": _text(self._now() + timedelta(seconds=self.lease_s))}
        return lease if self._create(self._lease_path(run.number, lease.number), holder | expires) else None

    def beat(self, run: int, lease: int, *, alive_s: float) -> bool:
        """Write that the holder of a lease is alive; whether it still is the last lease of its run."""
        expires = {"expires_at": _text(self._now() + timedelta(seconds=alive_s))}
        self._folder.write(f"{self._path(run)}/beat-{lease:04d}.json", json.dumps(expires).encode())
        return not self._folder.exists(self._lease_path(run, lease + 1))

    def finish(self, run: int, lease: int, outcome: dict[str, Any]) -> bool:
        """Enter how a run ended, unless another has taken it over: it is theirs to end. Old runs are removed."""
        if self._folder.exists(self._lease_path(run, lease + 1)):
            return False
        entered = self._create(f"{self._path(run)}/done.json", {**outcome, "ended_at": _text(self._now())})
        for path in self._folder.list(f"{self.root}/runs"):
            if int(path.split("/runs/")[1][:_DIGITS]) <= run - _KEPT:
                self._folder.delete(path)
        return entered

    def holder(self, run: Run) -> str:
        """Who has the last lease of a run, for people."""
        if run.lease == 0:
            return "nobody"
        lease = self._read(self._lease_path(run.number, run.lease))
        return f"{lease.get('host')}, process {lease.get('process')}"

    def _run(self, number: int, lease: int, done: bool) -> Run:
        entry = self._read(f"{self._path(number)}.json")
        ended = self._read(f"{self._path(number)}/done.json") if done else None
        return Run(number, _time(entry["fire"]), int(entry["missed"]), lease, ended)

    def _path(self, number: int) -> str:
        return f"{self.root}/runs/{number:0{_DIGITS}d}"

    def _lease_path(self, run: int, lease: int) -> str:
        return f"{self._path(run)}/lease-{lease:04d}.json"

    def _create(self, path: str, values: dict[str, Any]) -> bool:
        # A put whose answer was lost meets its own object, so no two may be equal.
        return self._folder.create(path, json.dumps({**values, "writer": secrets.token_hex(8)}).encode())

    def _read(self, path: str) -> dict[str, Any]:
        text = self._folder.read(path, max_bytes=_MAX_BYTES)
        try:
            values = json.loads(text)
        except ValueError as error:
            raise IntegrityError(path, text[:40], "is not JSON; remove it") from error
        if not isinstance(values, dict):
            raise IntegrityError(path, text[:40], "must be a JSON object; remove it")
        return values


class Lease:
    """The right to carry out a run. It counts for as long as beats are written.

    Attributes:
        lost: Whether another has taken over, because beats were late; the run is theirs to end.
    """

    def __init__(self, ledger: Ledger, run: int, number: int) -> None:
        self._ledger, self.run, self.number = ledger, run, number
        self.lost = False

    def beat(self) -> None:
        """Say that the holder is alive. A store that cannot be written to for a while costs the lease, not the run."""
        try:
            still_ours = self._ledger.beat(self.run, self.number, alive_s=self._ledger.lease_s)
        except StoreError as error:
            _log.warning("schedule: run %d: %s; the lease expires if this lasts", self.run, error)
            return
        if not still_ours and not self.lost:
            self.lost = True
            _log.warning("schedule: run %d was taken over by another scheduler: beats were late", self.run)

    def release(self) -> None:
        """Let others take over at once."""
        self._ledger.beat(self.run, self.number, alive_s=0)

    def finish(self, outcome: dict[str, Any]) -> bool:
        """Enter how the run ended; False if another has taken it over."""
        return self._ledger.finish(self.run, self.number, outcome)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beats from a thread of their own, as long as the block takes."""
        stop = threading.Event()

        def beats() -> None:
            while not stop.wait(self._ledger.lease_s / _BEATS_PER_LEASE):
                self.beat()

        self.beat()
        thread = threading.Thread(target=beats, name="schedule-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
