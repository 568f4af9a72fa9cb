"""Traces: who asked this process for work, until it is noted in the database."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from .database import Database

NOTE_SECONDS = 60.0   # between two notes of who asked for work
MAX_TRACES = 10_000   # workers that a process keeps in mind until then
ASKED_SECONDS = 300.0


class Trace(NamedTuple):
    """Who asked for what; times are of the monotonic clock, since the database's is the one that counts."""

    queues: tuple[str, ...]
    workflows: tuple[str, ...] | None
    since: float
    at: float


class Traces:
    """Claims leave a trace, so that it can be said that nobody asks for a queue. Noted once a minute, in one statement,
    whatever the number of workers; `due` is the time for the next note."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.due = time.monotonic() + NOTE_SECONDS
        self.traces: dict[str, Trace] = {}

    def note_claim(self, owner: str, queues: Sequence[str], workflows: Sequence[str] | None) -> None:
        """An owner, "" for one without a name, asks for runs of these queues and workflows (None: of any)."""
        now = time.monotonic()
        with self.lock:
            before = self.traces.pop(owner, None)
            if before is None and len(self.traces) >= MAX_TRACES:
                del self.traces[next(iter(self.traces))]
            self.traces[owner] = Trace(tuple(queues), None if workflows is None else tuple(workflows),
                                       before.since if before else now, now)

    def note(self, database: Database) -> None:
        """Write down those of the last minute, if it is over."""
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + NOTE_SECONDS
        text = self.workers()
        with self.lock:
            noted = dict(self.traces)
        database.call("note_workers", workers=text)
        with self.lock:
            for owner, trace in noted.items():
                if self.traces.get(owner) is trace:
                    del self.traces[owner]

    def workers(self) -> str:
        """The JSON of those not noted yet, as note_workers takes it."""
        now = time.monotonic()
        with self.lock:
            return json.dumps([
                {"owner": owner, "queues": trace.queues, "workflows": trace.workflows,
                 "since_ms": int((now - trace.since) * 1000), "ago_ms": int((now - trace.at) * 1000)}
                for owner, trace in self.traces.items()])

    def queues(self) -> str:
        """The JSON of the queues that were asked for lately, as _queue_facts takes it."""
        now, queues = time.monotonic(), dict[str, dict[str, Any]]()
        with self.lock:
            for trace in self.traces.values():
                if now - trace.at > ASKED_SECONDS:
                    continue
                for name in trace.queues:
                    known = queues.setdefault(name, {"ago_ms": 1 << 40, "workflows": []})
                    known["ago_ms"] = min(known["ago_ms"], int((now - trace.at) * 1000))
                    if trace.workflows is None or known["workflows"] is None:
                        known["workflows"] = None
                    else:
                        known["workflows"] = sorted({*known["workflows"], *trace.workflows})
        return json.dumps(queues)
