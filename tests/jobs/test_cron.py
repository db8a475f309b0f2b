"""Cron expressions: when they fire, by the clocks of their zone."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from rabatch.errors import ConfigError
from rabatch.jobs.cron import Cron

DAILY = Cron("0 2 * * *")


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def fires(expression: str, timezone: str, after: str, n: int) -> list[str]:
    cron = Cron(expression, timezone)
    return [cron.local(fire) for fire, _ in zip(cron.after(at(after)), range(n), strict=False)]


def test_fires_follow_the_clocks_of_the_zone():
    assert fires("0 2 * * *", "Asia/Kolkata", "2026-11-24T20:29:59", 2) == [
        "2026-11-25T02:00:00+05:30",
        "2026-11-26T02:00:00+05:30",
    ]
    assert fires("30 9 * * 1-5", "UTC", "2026-11-27T09:30:00", 1) == ["2026-11-30T09:30:00+00:00"]


def test_a_time_that_the_clock_leaps_over_comes_when_the_leap_is_over():
    assert fires("30 2 * * *", "Europe/Berlin", "2027-03-27T12:00:00", 2) == [
        "2027-03-28T03:00:00+02:00",
        "2027-03-29T02:30:00+02:00",
    ]


def test_a_time_that_the_clock_shows_twice_comes_once():
    assert fires("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00", 2) == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-26T02:30:00+01:00",
    ]
    once = Cron("30 2 * * *", "Europe/Berlin")
    assert once.due(at("2026-10-25T00:30:00"), at("2026-10-25T01:30:00")) is None


def test_what_comes_all_the_time_goes_by_the_time_that_passes():
    assert fires("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:00:00", 4) == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-25T02:00:00+01:00",
        "2026-10-25T02:30:00+01:00",
        "2026-10-25T03:00:00+01:00",
    ]


def test_due_is_the_latest_fire_and_counts_the_others():
    assert DAILY.due(at("2026-11-20T02:00:00"), at("2026-11-20T02:00:00")) is None
    assert DAILY.due(at("2026-11-20T02:00:00"), at("2026-11-21T01:59:59")) is None
    assert DAILY.due(at("2026-11-20T02:00:00"), at("2026-11-21T02:00:00")) == (at("2026-11-21T02:00:00"), 0)
    assert DAILY.due(at("2026-11-20T02:00:00"), at("2026-11-24T12:00:00")) == (at("2026-11-24T02:00:00"), 3)
    assert Cron("* * * * *").due(at("2026-01-01T00:00:00"), at("2026-02-01T00:00:30")) == (
        at("2026-02-01T00:00:00"),
        10_000,
    )


@pytest.mark.parametrize(
    ("expression", "timezone", "message"),
    [
        ("0 2 * *", "UTC", "must have five fields"),
        ("0 25 * * *", "UTC", "is no cron expression"),
        ("0 2 30 2 *", "UTC", "never comes|is no cron expression"),
        ("0 2 * * *", "Mars/Olympus", "is no IANA time zone"),
        ("0 2 * * *", "../etc/passwd", "is no IANA time zone"),
    ],
)
def test_what_is_no_schedule_is_refused(expression, timezone, message):
    with pytest.raises(ConfigError, match=message):
        Cron(expression, timezone)
