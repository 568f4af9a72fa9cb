"""Lines of the log: their form, and how much of a user's text they may hold."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

logger = logging.getLogger("tidebase.server")
LOGGED_CHARACTERS = 120  # of a user's text; payloads do not belong into a log


def printable(text: str) -> str:
    """A user's text without line breaks and other characters that a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def one_line(text: str) -> str:
    """The first words of a user's text, for a line of the log."""
    words = " ".join(printable(text[: 4 * LOGGED_CHARACTERS]).split())
    return words if len(words) <= LOGGED_CHARACTERS else words[:LOGGED_CHARACTERS] + "…"


def place_of(run: dict[str, Any]) -> str:
    """The workflow and queue of a run, for a line of the log."""
    queue = "no queue" if run["queue"] is None else f"queue {one_line(run['queue'])}"
    return f"workflow {one_line(run['workflowName'])}, {queue}"


def log_expired(run: dict[str, Any]) -> None:
    """Log a lease that expired: of which run, and what becomes of it."""
    outcome = ("it is stalled until somebody begins it" if run["queue"] is None
               else "it is queued again" if run["attempt"] < run["maxAttempts"] else "it failed")
    logger.warning("the lease of run %s (%s) expired in attempt %d of %d, held by %s; %s", run["runId"],
                   place_of(run), run["attempt"], run["maxAttempts"], one_line(run["leaseOwner"]), outcome,
                   extra={"event": "lease_expired", "run_id": run["runId"]})


def log_failure(run_id: str, text: str) -> None:
    """Log what fail_run answered: which run, and no more of its error than its first words."""
    try:
        answer = json.loads(text)
    except RecursionError:  # a payload may be nested just deeply enough to be taken and not to be read again
        logger.warning("run %s failed; its payloads are nested too deeply to show why", run_id,
                       extra={"event": "run_failed", "run_id": run_id})
        return
    run, error = answer["run"], answer["run"]["error"]
    if run["status"] not in ("failed", "queued"):  # it had ended before
        return
    texts = [error.get("name"), error.get("message")] if isinstance(error, dict) else [error]
    words = one_line(": ".join(text for text in texts if text and isinstance(text, str)))
    is_counted = run["attempt"] <= run["maxAttempts"]  # one that somebody asked for may come after the last
    logger.warning("run %s (%s) failed in attempt %d%s%s; %s", run_id, place_of(run), run["attempt"],
                   f" of {run['maxAttempts']}" if is_counted else "", words and f": {words}",
                   f"it is queued again for {run['runAt']}" if answer["requeued"] else "it is not queued again",
                   extra={"event": "run_requeued" if answer["requeued"] else "run_failed", "run_id": run_id})


class LogFormat(logging.Formatter):
    """A line a person can read, with the event and the ids that the record carries.

    Nothing logs the query of a request, which may hold a credential as `token`. Should a library do so, or a client
    send its ? percent-encoded, and so as part of the path, the credential is replaced by ***.
    """

    EXTRAS = ("event", "delivery_id", "job", "path")
    TOKEN = re.compile(r"((?:[?&;]|%3f|%26)token(?:=|%3d))[^\s&]*", re.I)  # neither stands in a value as it is sent

    def format(self, record: logging.LogRecord) -> str:
        extras = [f"{name}={getattr(record, name)}" for name in self.EXTRAS if hasattr(record, name)]
        return self.TOKEN.sub(r"\1***", " ".join([super().format(record), *extras]))
