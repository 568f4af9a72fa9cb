"""Which workers claimed lately at this process: kept in memory, and saved in the database once a minute.

From them Studio says that no worker asks for a queue.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from .database import Database

SAVE_SECONDS = 60.0    # between two saves
MAX_OWNERS = 10_000    # workers in memory; beyond these the oldest is forgotten
ASKED_SECONDS = 300.0  # a queue counts as asked for so long after the last claim
MAX_NAMES = 1000       # queues, and workflows, remembered of a worker


class Claims(NamedTuple):
    """The claims of a worker since the last save: of which queues and workflows (None: any), the first and the last
    one's time. Times are of the monotonic clock, in seconds."""

    queues: tuple[str, ...]
    since: float
    at: float
    workflows: tuple[str, ...] | None


def joined(known: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """These names, each once; beyond MAX_NAMES those that were named last."""
    return tuple(dict.fromkeys([*known, *more]))[-MAX_NAMES:]


class RecentClaims:
    """The claims since the last save, by the worker's name. A save is one statement, however many workers there are."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.save_at = time.monotonic() + SAVE_SECONDS
        self.by_owner: dict[str, Claims] = {}

    def remember(self, owner: str, queues: Sequence[str], workflows: Sequence[str] | None) -> None:
        """Remember a claim of an owner ("": one without a name) for these queues and workflows (None: any)."""
        now = time.monotonic()
        with self.lock:
            before = self.by_owner.pop(owner, Claims((), now, now, ()))
            if len(self.by_owner) >= MAX_OWNERS:
                del self.by_owner[next(iter(self.by_owner))]
            # A worker may ask for its queues in turn, and for each of them with other workflows.
            any_workflow = workflows is None or before.workflows is None
            self.by_owner[owner] = Claims(joined(before.queues, queues), before.since, now,
                                          None if any_workflow else joined(before.workflows or (), workflows or ()))

    def save(self, database: Database) -> None:
        """Write what is not saved yet to the database, if a save is due."""
        if time.monotonic() < self.save_at:
            return
        self.save_at = time.monotonic() + SAVE_SECONDS
        with self.lock:
            saved = dict(self.by_owner)
        database.call("note_workers", workers=self.workers())
        with self.lock:
            for owner, claims in saved.items():
                if self.by_owner.get(owner) is claims:  # else there was another claim since
                    del self.by_owner[owner]

    def workers(self) -> str:
        """The JSON of the claims that are not saved yet, as note_workers takes it."""
        now = time.monotonic()
        with self.lock:
            return json.dumps([
                {"owner": owner, "queues": claims.queues, "workflows": claims.workflows,
                 "since_ms": int((now - claims.since) * 1000), "ago_ms": int((now - claims.at) * 1000)}
                for owner, claims in self.by_owner.items()])

    def queues(self) -> str:
        """The JSON of the queues that were asked for lately, as _queue_facts takes it."""
        now, queues = time.monotonic(), dict[str, dict[str, Any]]()
        with self.lock:
            for claims in self.by_owner.values():
                if now - claims.at > ASKED_SECONDS:
                    continue
                for name in claims.queues:
                    known = queues.setdefault(name, {"ago_ms": 1 << 40, "workflows": []})
                    known["ago_ms"] = min(known["ago_ms"], int((now - claims.at) * 1000))
                    if claims.workflows is None or known["workflows"] is None:
                        known["workflows"] = None
                    else:
                        known["workflows"] = sorted({*known["workflows"], *claims.workflows})
        return json.dumps(queues)
