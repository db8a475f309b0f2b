"""Schedules: a pipeline run at the times of a cron expression, once each, by however many schedulers.

What is due is decided by the books below the answers' URL (`rabatch.jobs.ledger`), so a scheduler may be killed,
started again, or stand beside others. A run is for the latest fire that has come; those before it that nobody ran are
caught up by it, once, because a run asks everything that is not answered yet.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, Protocol

from rabatch.errors import RabatchError
from rabatch.jobs.cron import Cron
from rabatch.jobs.ledger import Ledger, Run
from rabatch.storage.filesystem import Folder

_log = logging.getLogger(__name__)
LEASE_S = 120.0
_NAP_S = 60.0  # at most: clocks are set, and machines sleep
_SHOWN = 10

Runner = Callable[[datetime], dict[str, Any]]
"""Carries out the run of a fire; returns at least `exit_code`, and what else is worth keeping, as JSON values."""


class Clock(Protocol):
    """Time as the scheduler sees it."""

    def now(self) -> datetime:
        """UTC."""

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Tick:
    """What a scheduler did.

    Args:
        ran: The run it carried out; None if nothing was due.
        busy: Who carries out a run that is not over, and keeps others from beginning; None if nobody.
        wait_s: Until there may be something to do.
    """

    ran: Run | None
    busy: str | None
    wait_s: float


class Scheduler:
    """Runs what is due.

    Args:
        cron: When.
        folder: The books lie below ``schedules/`` of it.
        name: Of the schedule; several schedulers of one name share its books. The same pipeline under two names is
            run by both, perhaps at the same time.
        run: Carries out one run.
        lease_s: So long after a scheduler has died another takes its run over.
    """

    def __init__(
        self,
        cron: Cron,
        folder: Folder,
        *,
        run: Runner,
        name: str = "default",
        clock: Clock | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        self.cron = cron
        self._run = run
        self._clock = clock or SystemClock()
        self._ledger = Ledger(folder, name, now=self._clock.now, lease_s=lease_s)

    def tick(self) -> Tick:
        """Carry out the run that is due, if there is one and no other is under way."""
        begun = self._ledger.begin()
        while True:
            last, now = self._ledger.last(), self._clock.now()
            if last is not None and last.done is None:
                expires = self._ledger.expires(last)
                if expires is not None and expires > now:
                    return Tick(None, self._ledger.holder(last), self._wait(until=expires))
                if (ran := self._carry_out(last)) is not None:
                    return Tick(ran, None, 0)
                continue  # another was faster
            due = self.cron.due(begun if last is None else last.fire, now)
            if due is None:
                return Tick(None, None, self._wait(until=next(self.cron.after(now))))
            self._ledger.append(last, due.fire, due.missed)  # by us or by another: it is there now

    def watch(self, report: Callable[[Tick], None]) -> NoReturn:
        """Tick without end.

        Args:
            report: Told of every run, and of every time that another's keeps us waiting.
        """
        busy = None
        while True:
            tick = self.tick()
            if tick.ran is not None or tick.busy not in (None, busy):
                report(tick)
            busy = tick.busy
            if tick.wait_s:
                self._clock.sleep(tick.wait_s)

    def now(self) -> datetime:
        """By the scheduler's clock, UTC."""
        return self._clock.now()

    def show(self, next_fires: int = 5) -> dict[str, Any]:
        """Past runs and next fires, as JSON values."""
        now = self._clock.now()
        return {
            "cron": self.cron.expression,
            "timezone": self.cron.timezone,
            "state": self._ledger.root,
            "past": [self.described(run) for run in self._ledger.runs(last=_SHOWN)],
            "next": [self.cron.local(fire) for fire in itertools.islice(self.cron.after(now), next_fires)],
        }

    def described(self, run: Run) -> dict[str, Any]:
        """A run as JSON values: `state` is ``done``, ``running``, or ``open`` where its holder has died."""
        expires = None if run.done is not None else self._ledger.expires(run)
        alive = expires is not None and expires > self._clock.now()
        return {
            "run": run.number,
            "fire": self.cron.local(run.fire),
            "missed": run.missed,
            "state": "done" if run.done is not None else "running" if alive else "open",
            "holder": self._ledger.holder(run),
            **{name: value for name, value in (run.done or {}).items() if name != "writer"},
        }

    def _wait(self, *, until: datetime) -> float:
        return min(_NAP_S, max(0.0, (until - self._clock.now()) / timedelta(seconds=1)))

    def _carry_out(self, run: Run) -> Run | None:
        """The run, done; None if another took it."""
        lease = self._ledger.take(run)
        if lease is None:
            return None
        if run.lease:
            _log.warning("schedule: run %d is taken over: its scheduler died", run.number)
        began = self._clock.now()
        try:
            with lease.beating():
                outcome = self._outcome(run)
        except BaseException:  # we are told to stop: the run is another's
            lease.release()
            raise
        seconds = round((self._clock.now() - began).total_seconds(), 1)
        done = {**outcome, "began_at": began.isoformat(timespec="seconds"), "seconds": seconds}
        if not lease.finish(done):
            done["reason"] = "taken over by another scheduler: beats were late"
        return dataclasses.replace(run, lease=lease.number, done=done)

    def _outcome(self, run: Run) -> dict[str, Any]:
        """What the runner returns; an error is an outcome too, for the next fire is another chance."""
        try:
            return self._run(run.fire)
        except RabatchError as error:
            return {"exit_code": 2, "reason": " ".join(str(error).split())}
        except Exception as error:  # noqa: BLE001 (a scheduler outlives what it runs)
            _log.exception("schedule: run %d ended by an error", run.number)
            return {"exit_code": 2, "reason": f"unexpected {type(error).__name__}: {error}"}
