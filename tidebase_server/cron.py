"""When schedules fire."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError


def next_fire(cron: str, timezone: str, after: datetime) -> datetime | None:
    """When a cron expression fires next, in its time zone; None when it never does, as on 30 February.

    :raises ValueError: the expression is not one of five fields, or the time zone is unknown; the message says which.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{timezone[:100]!r} is not a time zone") from None
    try:
        if len(cron.split()) != 5:
            raise CronSimError
        # When clocks are set back, an hour comes twice. Within the second one, cronsim may answer a time of the first.
        return next((at for at in CronSim(cron, after.astimezone(zone)) if at > after), None)
    except CronSimError:
        raise ValueError(f"{cron[:100]!r} is not a cron expression of five fields") from None
