"""Lines of the log: their form, and how much of a user's text they may hold."""

from __future__ import annotations

import logging
import re
from typing import Any

LOGGED_CHARACTERS = 120  # of a user's text; payloads do not belong into a log


def one_line(text: str) -> str:
    """The first words of a user's text, for a line of the log."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * LOGGED_CHARACTERS]).split())
    return words if len(words) <= LOGGED_CHARACTERS else words[:LOGGED_CHARACTERS] + "…"


def place_of(run: dict[str, Any]) -> str:
    """The workflow and queue of a run, for a line of the log."""
    queue = "no queue" if run["queue"] is None else f"queue {one_line(run['queue'])}"
    return f"workflow {one_line(run['workflowName'])}, {queue}"


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
