"""When schedules fire."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError


class BadSchedule(ValueError):
    """A cron expression or a time zone that there is not; `field` says which."""

    def __init__(self, field: str, words: str) -> None:
        super().__init__(words)
        self.field = field


def next_fire(cron: str, timezone: str, after: datetime) -> datetime | None:
    """When a cron expression fires next, in its time zone; None when it does no more.

    :raises BadSchedule: the expression is not one of five fields, names no day of any year, or the time zone is
        unknown.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise BadSchedule("timezone", f"{timezone[:100]!r} is not a time zone") from None
    try:
        if len(cron.split()) != 5:
            raise CronSimError
        # When clocks are set back, an hour comes twice. Within the second one, cronsim may answer a time of the first.
        return next((at for at in CronSim(cron, after.astimezone(zone)) if at > after), None)
    except (CronSimError, ValueError):  # ValueError: of a number with more digits than Python reads
        words = f"{cron[:100]!r} is not a cron expression of five fields that fires on some day"
        raise BadSchedule("cron", words) from None
