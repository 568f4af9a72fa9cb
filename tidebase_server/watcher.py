"""Long polls and streams: requests that wait until something is written, whichever server process writes it.

A request that waits holds a thread, so their number is bounded. One watcher per process asks PostgreSQL for all of them
together. LISTEN would need a connection of its own, which a transaction pooler does not give.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .bodies import to_json
from .database import Database

WATCH_SECONDS = 0.05   # how late a write of another process may be noticed
WATCH_GAP_SECONDS = 0.005  # the least time between two ticks, however many writes this process makes
DISCONNECT_SECONDS = 1.0   # how late it may be noticed that a client hung up while there is nothing for it

logger = logging.getLogger("tidebase.server")
T = TypeVar("T")


class LongPoll:
    """A request that waits: for runs of some queues (`workflows`: of these alone), or for an event of a run after
    number `seq`. `wake_event` is set when there may be an answer."""

    def __init__(self, queues: Iterable[str] = (), run_id: str | None = None, seq: int = 0,
                 is_disconnected: Callable[[], bool] = lambda: False, workflows: Iterable[str] | None = None) -> None:
        only = None if workflows is None else tuple(workflows)
        self.claims = [(queue, only) for queue in queues]
        self.run_id = run_id
        self.seq = seq
        self.is_disconnected = is_disconnected
        self.wake_event = threading.Event()


class TooManyWaiting(Exception):
    """As many requests wait as may."""


class Watcher:
    """Asks PostgreSQL what changed for the requests that wait: every 50 ms, and at once after a write of this process
    (`notify`). It asks nothing while no request waits."""

    def __init__(self, database: Database, max_waiting: int) -> None:
        self.database = database
        self.max_waiting = max_waiting
        self.provide_threads: Callable[[int], None] = lambda waiting: None  # set by the HTTP server
        self.long_polls: list[LongPoll] = []
        self.lock = threading.Lock()  # guards long_polls
        self.wake_event = threading.Event()
        self.next_disconnect_check = 0.0
        self.stopping = False

    def notify(self, only_run: str | None = None) -> None:
        """Have the next tick come at once: this process wrote something; `only_run`: nothing but events of this run."""
        with self.lock:
            is_waited_for = any(only_run in (None, poll.run_id) for poll in self.long_polls)
        if is_waited_for:
            self.wake_event.set()

    def stop(self) -> None:
        """Wake all long polls; they answer what they have."""
        self.stopping = True
        with self.lock:
            for poll in self.long_polls:
                poll.wake_event.set()
        self.wake_event.set()

    def wait(self, poll: LongPoll, ask: Callable[[], T | None], seconds: float) -> T | None:
        """The first answer of `ask` that is not None. `ask` is called now, and again whenever there is news for `poll`.

        :param seconds: how long to wait at most; then None.
        :raises TooManyWaiting: there is no answer yet, and no more requests may wait.
        """
        answer = ask()
        if answer is not None or seconds <= 0 or self.stopping:
            return answer
        deadline = time.monotonic() + seconds
        with self.watching(poll):
            while not self.stopping and poll.wake_event.wait(max(0.0, deadline - time.monotonic())):
                poll.wake_event.clear()
                if poll.is_disconnected():  # a run claimed for a client that hung up would be lost until its lease ends
                    return None
                answer = ask()
                if answer is not None:
                    return answer
        return None

    @contextmanager
    def watching(self, poll: LongPoll) -> Iterator[None]:
        """Set poll.wake_event whenever there is news for it, while this context lasts.

        :raises TooManyWaiting: no more requests may wait.
        """
        with self.lock:
            if len(self.long_polls) >= self.max_waiting:
                raise TooManyWaiting
            try:
                self.provide_threads(len(self.long_polls) + 1)
            except RuntimeError:  # the machine gives no more threads: some must stay free to answer requests
                self.max_waiting = len(self.long_polls)
                logger.warning("the machine gives no more threads: %d requests may wait at once", self.max_waiting,
                               extra={"event": "no_thread"})
                raise TooManyWaiting from None
            self.long_polls.append(poll)
        self.wake_event.set()
        try:
            yield
        finally:
            with self.lock:
                self.long_polls.remove(poll)
                if not self.long_polls:
                    self.wake_event.set()  # for a last tick, which ends the threads that are not needed any more

    def tick(self) -> int:
        """Ask once, and wake the long polls that have news. Of the polls for a queue, as many wake as runs of it can
        start.  :returns: 0, so that the caller sleeps."""
        with self.lock:
            polls = list(self.long_polls)
            self.provide_threads(len(polls))  # fewer than before may be needed
        if polls:
            claims = list(dict.fromkeys(claim for poll in polls for claim in poll.claims))
            runs = sorted({poll.run_id for poll in polls if poll.run_id is not None})
            news = json.loads(self.database.call(
                "watch", queues=[queue for queue, _ in claims], workflows=to_json([only for _, only in claims]),
                limit=len(polls), run_ids=runs)[0] or "{}")
            ready = dict(zip(claims, news["claims"], strict=True))  # how many runs each claim would get
            checks_connections = time.monotonic() >= self.next_disconnect_check
            if checks_connections:
                self.next_disconnect_check = time.monotonic() + DISCONNECT_SECONDS
            for poll in polls:
                claim = next((claim for claim in poll.claims if ready[claim] > 0), None)
                # A run that does not exist any more is news, too.
                has_news = claim is not None or (poll.run_id and news["runs"].get(poll.run_id, 2**31) > poll.seq)
                is_disconnected = (checks_connections or has_news) and poll.is_disconnected()
                if has_news or is_disconnected:
                    poll.wake_event.set()
                if claim is not None and not is_disconnected:
                    ready[claim] -= 1
        return 0

    def idle_seconds(self) -> float | None:
        """How long the watcher may sleep; None, until something is written, while no request waits."""
        return WATCH_SECONDS if self.long_polls else None
