"""Traces: which workers claimed lately at this process, kept in memory and written to the database once a minute.

From them Studio says that no worker asks for a queue.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from .database import Database

NOTE_SECONDS = 60.0    # between two notes
MAX_TRACES = 10_000    # workers in memory; beyond these the oldest is forgotten
ASKED_SECONDS = 300.0  # a queue counts as asked for so long after the last claim
MAX_NAMES = 1000       # queues, and workflows, that a trace names


class Trace(NamedTuple):
    """What a worker has claimed since the last note, since when, and when last; times of the monotonic clock, in
    seconds."""

    queues: tuple[str, ...]
    since: float
    at: float
    workflows: tuple[str, ...] | None


def joined(known: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """These names, each once; beyond MAX_NAMES those that were named last."""
    return tuple(dict.fromkeys([*known, *more]))[-MAX_NAMES:]


class Traces:
    """The claims since the last note. A note is one statement, however many workers there are; `due` is the time of the
    next one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.due = time.monotonic() + NOTE_SECONDS
        self.traces: dict[str, Trace] = {}

    def note_claim(self, owner: str, queues: Sequence[str], workflows: Sequence[str] | None) -> None:
        """Remember a claim of an owner ("": one without a name) for these queues and workflows (None: any)."""
        now = time.monotonic()
        with self.lock:
            before = self.traces.pop(owner, Trace((), now, now, ()))
            if len(self.traces) >= MAX_TRACES:
                del self.traces[next(iter(self.traces))]
            # A worker may ask for its queues in turn, and for each of them with other workflows.
            any_workflow = workflows is None or before.workflows is None
            self.traces[owner] = Trace(joined(before.queues, queues), before.since, now,
                                       None if any_workflow else joined(before.workflows or (), workflows or ()))

    def note(self, database: Database) -> None:
        """Write the traces to the database, if a note is due."""
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
        """The JSON of the traces not written yet, as note_workers takes it."""
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
