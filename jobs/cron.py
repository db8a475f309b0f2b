"""When a schedule fires: a cron expression in a time zone.

Daylight saving follows Debian's cron, as `cronsim` does: a fire at a time that the clock leaps over comes when the
leap is over, one at a time that the clock shows twice comes once, at the first; an expression that begins a field of
minutes or hours with ``*`` goes by the time that passes, and fires in both of the doubled hours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from rabatch.errors import ConfigError

_FIELDS = 5
_COUNTED = 10_000  # missed fires at most: a number for people


class Due(NamedTuple):
    """What a scheduler has to run.

    Attributes:
        fire: The latest time that has come, UTC.
        missed: How many fires before it nobody ran; they are caught up by the same run. Counted to 10,000.
    """

    fire: datetime
    missed: int


@dataclass(frozen=True)
class Cron:
    """The times of a cron expression.

    Args:
        expression: Five fields: minute, hour, day of the month, month, day of the week.
        timezone: IANA name, such as ``Europe/Berlin``.

    Raises:
        ConfigError: Not such an expression, one that never comes, or an unknown time zone.
    """

    expression: str
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            fix = "is no IANA time zone, such as Europe/Berlin, or this machine has no zones: pip install tzdata"
            raise ConfigError("timezone", self.timezone, fix) from error
        example = 'as "0 2 * * *", every day at two'
        if len(self.expression.split()) != _FIELDS:
            fix = f"must have five fields, minute, hour, day, month and weekday, {example}"
            raise ConfigError("cron", self.expression, fix)
        try:
            first = next(self.after(datetime.now(UTC)), None)
        except CronSimError as error:
            fix = f"is no cron expression ({error}); write it {example}"
            raise ConfigError("cron", self.expression, fix) from error
        if first is None:
            raise ConfigError("cron", self.expression, "never comes; check its day and month")

    def after(self, moment: datetime) -> Iterator[datetime]:
        """The fires later than `moment` (aware), UTC, ascending."""
        local = moment.astimezone(ZoneInfo(self.timezone))
        for fire in CronSim(self.expression, local):
            if (utc := fire.astimezone(UTC)) > moment:
                yield utc

    def due(self, after: datetime, now: datetime) -> Due | None:
        """The latest fire in (`after`, `now`], and how many came before it; None if there is none."""
        local = (now + timedelta(minutes=1)).astimezone(ZoneInfo(self.timezone))
        backwards = (fire.astimezone(UTC) for fire in CronSim(self.expression, local, reverse=True))
        latest = next((fire for fire in backwards if fire <= now), None)
        if latest is None or latest <= after:
            return None
        earlier = itertools.takewhile(lambda fire: fire < latest, self.after(after))
        return Due(latest, sum(1 for _ in itertools.islice(earlier, _COUNTED)))

    def local(self, moment: datetime) -> str:
        """`moment` as the zone's clocks show it, with its offset."""
        return moment.astimezone(ZoneInfo(self.timezone)).isoformat(timespec="seconds")
