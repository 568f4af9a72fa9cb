"""A run's events: read from the database, and sent as a stream that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import psycopg

from .database import Database
from .filters import ENDED
from .watcher import LongPoll, Watcher

EVENTS_AT_ONCE = 500
BEAT_SECONDS = 15  # a stream without news sends a comment: proxies keep it open, and a reader that hung up is noticed
LINE_BREAKS = {ord("\n"): " ", ord("\r"): " "}


class EventLog(NamedTuple):
    """The events of a run that a request asks for."""

    database: Database
    run_id: str
    light: bool              # without long payloads
    types: list[str] | None  # of these types alone; one that ends with a dot stands for all that begin with it

    def after(self, seq: int, limit: int) -> list[tuple[int, str]]:
        """The next ones after this number, each with its number and as JSON text."""
        return cast(list[tuple[int, str]], self.database.select(
            "select * from tidebase.list_events(%s, %s, %s, %s, %s)",
            (self.run_id, seq, limit, self.light, self.types)))

    def run(self) -> tuple[str, int] | None:
        """The run's status and the number of its last event; None when there is no such run."""
        return next(iter(self.database.select(
            "select status, event_seq from tidebase.runs where id = %s", (self.run_id,))), None)


def frames(events: EventLog, watcher: Watcher, poll: LongPoll, follow: bool,
           seconds_left: Callable[[], float]) -> Iterator[str]:
    """What a stream of server-sent events sends, from the event after number `poll.seq` on.

    It ends when the server stops, when no `seconds_left` (of the run token), when the run is deleted and, unless it is
    to `follow`, after the last event of a run that ended. It outlives an outage of the database.

    :param poll: is being watched by `watcher`.
    """
    yield ": tidebase\n\n"
    while True:
        poll.wake_event.clear()  # before reading, so that no wake-up is lost in between
        seconds = seconds_left()
        if watcher.stopping or seconds <= 0:
            return
        try:
            found = events.after(poll.seq, EVENTS_AT_ONCE)
            if not found:
                run = events.run()
                if run is None or (not follow and run[0] in ENDED and run[1] <= poll.seq):
                    return
        except psycopg.OperationalError:
            found = []
        for seq, text in found:
            poll.seq = seq
            # A line break can only be white space between JSON's tokens, and would end the data line.
            yield f"id: {seq}\ndata: {text.translate(LINE_BREAKS)}\n\n"
        if not found and not poll.wake_event.wait(min(BEAT_SECONDS, seconds)):
            yield ": beat\n\n"
