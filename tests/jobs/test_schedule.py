"""Schedules: when they fire, once each, whoever dies. A clock of our own; nothing sleeps."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from rabatch.cli import main
from rabatch.errors import IntegrityError, StoreError
from rabatch.jobs.cron import Cron
from rabatch.jobs.runners import on_cluster
from rabatch.jobs.schedule import Scheduler
from rabatch.pipeline import Pipeline
from rabatch.storage.filesystem import Folder

ROOT = Path(__file__).parents[2]
DAILY = Cron("0 2 * * *")
LEASE_S = 100.0


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


class FakeClock:
    def __init__(self, now: str) -> None:
        self.time = at(now)

    def now(self) -> datetime:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


class Killed(BaseException):
    """As SIGKILL does: nothing is cleaned up."""


class World:
    """A store's folder, a clock and schedulers that share them."""

    def __init__(self, path: Path, now: str = "2026-11-20T12:00:00", cron: Cron = DAILY) -> None:
        self.clock, self.path, self.cron = FakeClock(now), path, cron
        self.ran: list[tuple[str, datetime]] = []

    def scheduler(self, who: str = "a", run=None, **options) -> Scheduler:
        def record(fire: datetime) -> dict[str, int]:
            self.ran.append((who, fire))
            return {"exit_code": 0}

        folder = Folder(str(self.path))
        return Scheduler(self.cron, folder, run=run or record, clock=self.clock, lease_s=LEASE_S, **options)

    def go(self, text: str) -> None:
        self.clock.time = at(text)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def killed(fire: datetime) -> dict[str, int]:
    raise Killed


def dies(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler takes the run that is due and is killed in the middle of it."""
    with monkeypatch.context() as patch:
        patch.setattr("rabatch.jobs.ledger.Lease.release", lambda lease: None)
        with pytest.raises(Killed):
            world.scheduler("dead", killed).tick()


def test_a_fire_is_run_once_by_two_schedulers_and_after_a_restart(world):
    assert world.scheduler().tick().ran is None
    world.go("2026-11-21T02:00:00")
    ran = world.scheduler("a").tick().ran
    assert (ran.number, ran.fire, ran.missed, ran.done["exit_code"]) == (1, at("2026-11-21T02:00:00"), 0, 0)
    assert world.scheduler("b").tick().ran is None
    world.go("2026-11-22T02:00:01")
    assert world.scheduler("b").tick().ran.number == 2
    assert world.scheduler("a").tick().ran is None
    assert world.ran == [("a", at("2026-11-21T02:00:00")), ("b", at("2026-11-22T02:00:00"))]


def test_a_schedule_begins_with_the_minute_in_which_it_is_first_seen(world):
    world.go("2026-11-21T02:00:59")
    assert world.scheduler().tick().ran.fire == at("2026-11-21T02:00:00")


def test_fires_before_the_schedule_began_are_not_caught_up(world):
    world.go("2026-11-21T02:01:00")
    assert world.scheduler().tick().ran is None


def test_missed_fires_are_caught_up_once(world):
    world.scheduler().tick()
    world.go("2026-11-24T12:00:00")
    ran = world.scheduler().tick().ran
    assert (ran.fire, ran.missed) == (at("2026-11-24T02:00:00"), 3)
    assert world.scheduler().tick().ran is None
    assert len(world.ran) == 1


def test_runs_do_not_overlap(world):
    world.cron = Cron("* * * * *")
    world.scheduler().tick()
    seen = []

    def long(fire: datetime) -> dict[str, int]:
        world.clock.sleep(60)  # the next fire comes while this one runs
        other = world.scheduler("b").tick()
        seen.append((other.ran, "process" in other.busy, other.wait_s > 0))
        return {"exit_code": 0}

    world.clock.sleep(60)
    assert world.scheduler("a", long).tick().ran.number == 2
    assert seen == [(None, True, True)]
    assert world.ran == [("a", at("2026-11-20T12:00:00"))]
    assert world.scheduler("b").tick().ran.number == 3


def test_the_run_of_a_scheduler_that_died_is_finished_by_another(world, monkeypatch):
    world.scheduler().tick()
    world.go("2026-11-21T02:00:00")
    dies(world, monkeypatch)
    assert world.scheduler("b").tick().busy is not None
    world.clock.sleep(LEASE_S + 1)
    ran = world.scheduler("b").tick().ran
    assert (ran.number, ran.lease, world.ran) == (1, 2, [("b", at("2026-11-21T02:00:00"))])
    assert world.scheduler("c").tick().ran is None


def test_a_scheduler_that_is_told_to_stop_gives_its_run_away_at_once(world):
    world.scheduler().tick()
    world.go("2026-11-21T02:00:00")

    def interrupted(fire: datetime) -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.scheduler("a", interrupted).tick()
    assert world.scheduler("b").tick().ran.lease == 2


def test_a_holder_that_was_given_up_does_not_end_the_run_of_its_successor(world, caplog):
    world.scheduler().tick()
    world.go("2026-11-21T02:00:00")

    def stuck(fire: datetime) -> dict[str, int]:
        world.clock.sleep(LEASE_S + 1)
        (open_run,) = (slow._ledger.last(),)
        assert world.scheduler("b")._ledger.take(open_run).number == 2  # b is at work now
        return {"exit_code": 0}

    slow = world.scheduler("a", stuck)
    assert "taken over" in slow.tick().ran.done["reason"]
    assert slow._ledger.last().done is None


def test_errors_are_outcomes_and_the_next_fire_is_another_chance(world, caplog):
    world.scheduler().tick()
    for day, error in ((21, StoreError("store", "x", "is gone")), (22, ZeroDivisionError("by zero"))):
        world.go(f"2026-11-{day}T02:00:00")

        def fails(fire: datetime, error: Exception = error) -> dict[str, int]:
            raise error

        ran = world.scheduler("a", fails).tick().ran
        assert ran.done["exit_code"] == 2
        assert str(error) in ran.done["reason"]
    world.go("2026-11-23T02:00:00")
    assert world.scheduler().tick().ran.done["exit_code"] == 0


def test_watching_naps_until_the_next_fire(world):
    world.cron = Cron("*/10 * * * *")
    reports = []

    def report(tick) -> None:
        reports.append((tick.ran.fire, world.clock.now()))
        if len(reports) == 3:
            raise Killed

    with pytest.raises(Killed):
        world.scheduler().watch(report)
    assert [fire for fire, _ in reports] == [at(f"2026-11-20T12:{minute}:00") for minute in ("00", "10", "20")]
    assert all(now - fire < timedelta(seconds=1) for fire, now in reports)


def test_show_lists_past_and_next_fires(world, monkeypatch):
    world.cron = Cron("0 2 * * *", "Europe/Berlin")
    world.scheduler().tick()
    world.go("2026-11-22T01:00:00")
    world.scheduler().tick()
    world.go("2026-11-23T01:00:00")
    dies(world, monkeypatch)
    shown = world.scheduler().show(next_fires=2)
    assert [(run["fire"], run["state"], run["missed"]) for run in shown["past"]] == [
        ("2026-11-22T02:00:00+01:00", "done", 1),
        ("2026-11-23T02:00:00+01:00", "running", 0),
    ]
    assert shown["next"] == ["2026-11-24T02:00:00+01:00", "2026-11-25T02:00:00+01:00"]
    world.clock.sleep(LEASE_S + 1)
    assert world.scheduler().show()["past"][1]["state"] == "open"
    assert json.loads(json.dumps(shown)) == shown


def test_schedules_of_other_names_have_books_of_their_own(world):
    for name in ("one", "two"):
        world.scheduler(name=name).tick()
    world.go("2026-11-21T02:00:00")
    assert [world.scheduler(name=name).tick().ran.number for name in ("one", "two")] == [1, 1]
    with pytest.raises(StoreError, match="must be letters"):
        world.scheduler(name="../x")


def test_old_runs_are_removed(world, monkeypatch):
    monkeypatch.setattr("rabatch.jobs.ledger._KEPT", 3)
    world.cron = Cron("* * * * *")
    for _ in range(6):
        world.scheduler().tick()
        world.clock.sleep(60)
    numbers = [run.number for run in world.scheduler()._ledger.runs()]
    assert numbers == [4, 5, 6]


def test_damaged_books_are_named(world):
    world.go("2026-11-21T02:00:00")
    world.scheduler().tick()
    (entry,) = world.path.glob("schedules/default/runs/000001.json")
    entry.write_text("{")
    with pytest.raises(IntegrityError, match=r"runs/000001\.json"):
        world.scheduler().tick()


def test_a_lease_beats_from_a_thread_until_the_run_is_over(world, monkeypatch):
    world.go("2026-11-21T02:00:00")
    beats = threading.Semaphore(0)
    monkeypatch.setattr("rabatch.jobs.ledger.Lease.beat", lambda lease: beats.release())
    monkeypatch.setattr("rabatch.jobs.ledger._BEATS_PER_LEASE", LEASE_S / 0.005)

    def wait_for_beats(fire: datetime) -> dict[str, int]:
        assert all(beats.acquire(timeout=30) for _ in range(3))
        return {"exit_code": 0}

    assert world.scheduler("a", wait_for_beats).tick().ran.done["exit_code"] == 0
    assert "schedule-lease" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def definition(tmp_path):
    pipeline = Pipeline(documents="d", questions="q", store=str(tmp_path / "index"), answers=str(tmp_path / "answers"))
    (tmp_path / "pipeline.yaml").write_text(pipeline.to_yaml())
    return tmp_path / "pipeline.yaml"


def test_the_command_runs_what_is_due_once(definition, monkeypatch, capsys):
    ran = []

    def run(pipeline, *, progress):
        ran.append(pipeline.store)
        return SimpleNamespace(exit_code=1, summary=lambda: ["one row failed"])

    monkeypatch.setattr("rabatch.jobs.run.run", run)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    command = ["schedule", str(definition), "--cron", "* * * * *", "--timezone", "Asia/Tokyo", "--once", "--json"]
    assert main(command) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["ran"]["exit_code"], told["ran"]["summary"], told["busy"]) == (1, "one row failed", None)
    assert told["next"].endswith("+09:00")
    yearly = ["schedule", str(definition), "--cron", "0 0 1 1 *", "--name", "yearly"]
    assert main([*yearly, "--once"]) == 0
    assert capsys.readouterr().out.startswith("nothing is due; next ")
    assert main(["schedule", str(definition), "--cron", "* * * * *", "--show"]) == 0
    out = capsys.readouterr().out
    assert "exit code 1" in out
    assert "one row failed" in out
    assert len(ran) == 1
    assert main([*yearly, "--show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["past"] == []


def test_a_schedule_that_cannot_run_is_one_line(definition, capsys):
    for options, message in (
        (["--cron", "nonsense"], "cron = 'nonsense'"),
        (["--cron", "0 2 * * *", "--timezone", "Mars"], "timezone = 'Mars'"),
        (["--cron", "0 2 * * *", "--name", "a/b", "--show"], "name = 'a/b'"),
    ):
        assert main(["schedule", str(definition), *options]) == 2
        assert message in capsys.readouterr().err


def test_a_run_on_a_cluster_is_named_by_its_fire(definition, monkeypatch):
    """So that whoever finishes the run of a dead scheduler attaches to its job."""
    named = []

    def submit(pipeline, *, address, run_id, env, write):
        named.append((address, run_id, env))
        return SimpleNamespace(exit_code=0, submission_id="job", summary=lambda: ["done"])

    monkeypatch.setattr("rabatch.jobs.runners.submit", submit)
    run = on_cluster(Pipeline.from_yaml(definition), address="http://head", env=("TOKEN",))
    assert run(at("2026-11-21T02:00:00")) == {"exit_code": 0, "submission_id": "job", "summary": "done"}
    assert named == [("http://head", "20261121T020000Z", ("TOKEN",))]


RACER = """
import sys, time
from datetime import UTC, datetime
from pathlib import Path
from rabatch.jobs.cron import Cron
from rabatch.jobs.schedule import Scheduler
from rabatch.storage.filesystem import Folder

class Clock:
    def now(self): return datetime(2026, 11, 21, 2, 0, 30, tzinfo=UTC)
    def sleep(self, seconds): time.sleep(0.01)

def run(fire):
    with open(sys.argv[2], "a") as log:
        log.write("ran\\n")
    return {"exit_code": 0}

scheduler = Scheduler(Cron("0 2 * * *"), Folder(sys.argv[1]), run=run, clock=Clock())
ready = Path(sys.argv[3]); ready.touch()
while len(list(ready.parent.iterdir())) < 2: time.sleep(0.001)
ticks = [scheduler.tick() for _ in range(3)]
print(sum(tick.ran is not None for tick in ticks))
"""


def test_two_processes_race_for_a_fire_and_one_runs_it(tmp_path):
    (tmp_path / "ready").mkdir()
    command = [sys.executable, "-c", RACER, str(tmp_path / "books"), str(tmp_path / "log")]
    racers = [
        subprocess.Popen([*command, str(tmp_path / "ready" / name)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    counts = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sorted(counts) == [0, 1]
    assert (tmp_path / "log").read_text() == "ran\n"
