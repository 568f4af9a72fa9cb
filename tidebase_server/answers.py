"""Answers and errors: how JSON text and refusals become responses; schema.sql decides status, code and words."""

from __future__ import annotations

import json
import logging
from typing import Any

import psycopg
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from .database import Database

logger = logging.getLogger("tidebase.server")
Reply = tuple[str, int, dict[str, str]]  # body, status and headers, as a Flask view may return them

# On every answer: what browsers must not guess at, nor they or proxies keep.
SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
JSON_HEADERS = {"Content-Type": "application/json", **SAFE_HEADERS}


def reply(text: str, status: int = 200) -> Reply:
    """The answer with this JSON text."""
    return text, status, JSON_HEADERS.copy()


def busy(answer: Reply) -> Reply:
    """Ask for the request again, in a second."""
    answer[2]["Retry-After"] = "1"
    return answer


# ------------------------------------------------------------------------------
# Refusals of this server.
# ------------------------------------------------------------------------------
class Refusal(HTTPException):
    """A request that is refused before any database function was called."""

    def __init__(self, status: int, code: str, words: str, **extras: Any) -> None:
        super().__init__(words)
        self.code = status
        self.body = {"error": words, "code": code, **extras}


def invalid(path: str, message: str) -> Refusal:
    """The 400 for one wrong value; `path` says where it stands, dotted, and is empty for the body as a whole."""
    return Refusal(400, "invalid_request", "invalid request body", issues=[{"path": path, "message": message}])


def refused(error: HTTPException) -> Reply:
    """The answer to a Refusal, or to one of Flask (no such route, wrong method)."""
    status = error.code or 500
    body = getattr(error, "body", None) or (invalid("", error.description or "malformed").body if status == 400 else {
        "error": error.description, "code": {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(
            status, "http_error")})
    text, status, headers = reply(json.dumps(body), status)
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return text, status, headers


# ------------------------------------------------------------------------------
# Refusals of the database.
# ------------------------------------------------------------------------------
# The member of a body that makes a row of an index too long, where that is not its name.
INDEXED = {"runs_dedupe_key": "dedupeKey", "runs_ready_workflow_idx": "workflowName", "runs_running_idx": "leaseOwner",
           "runs_of_workflow_idx": "workflowName", "runs_of_queue_idx": "queue", "runs_ready_idx": "queue",
           "runs_failure_idx": "failureClass", "runs_metadata_idx": "metadata"}
REFERENCES = {"run", "step", "gate", "state"}  # members of a refusal's detail that name an object


def database_refused(error: psycopg.Error, database: Database) -> Reply | None:
    """The answer to an error of Postgres: a refusal of schema.sql (SQLSTATE TBnnn: status nnn, DETAIL the JSON with the
    code), a value that Postgres cannot take (400), or a database that is away or busy (503, to be sent again). None for
    a defect."""
    state = error.sqlstate or ""
    if is_refusal(error):
        return reply(*refusal_of(error, database))
    words = error.diag.message_primary or ""
    if state == "54000" and error.diag.constraint_name:  # an index, whose rows take about 2,700 bytes
        field = INDEXED.get(error.diag.constraint_name, "name")
        return refused(invalid(field, "too large: together with what else an index has of it, at most 2,700 bytes"))
    if state == "54000" or "invalid memory alloc request size" in words:
        return refused(Refusal(413, "body_too_large", f"this is too large for PostgreSQL: {words}"))
    # 22: a value out of range or not JSON for Postgres; 54: nested too deeply.
    if state.startswith(("22", "54")):
        return refused(invalid("", (words or "a value was refused").split("\n")[0]))
    if isinstance(error, psycopg.errors.QueryCanceled):
        return busy(reply('{"error": "the database took too long to answer this: ask for less, or send it again later",'
                          ' "code": "query_timeout"}', 503))
    # A function is not there, or was replaced as it was called: the schema is being, or has been, brought to another
    # build's version, whose servers can answer this.
    if state == "42883" or (state == "XX000" and "cache lookup failed" in words):
        logger.error("the database's schema is another build's: %s", words, extra={"event": "schema_differs"})
        return busy(reply('{"error": "the database\'s schema is another build\'s: send this again", '
                          '"code": "database_unavailable"}', 503))
    # 25006: a standby after a failover. The rest of these classes are connections, locks, resources, shutdown.
    if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)) or state == "25006":
        return busy(reply('{"error": "the database is away: send this again", "code": "database_unavailable"}', 503))
    return None


def is_refusal(error: psycopg.Error) -> bool:
    """Whether schema.sql raised it."""
    return (error.sqlstate or "").startswith("TB")


def refusal_of(error: psycopg.Error, database: Database) -> tuple[str, int]:
    """The body and the status of a refusal of schema.sql; the objects that its detail names are read now.

    :raises psycopg.Error: they cannot be.
    """
    words, detail = json.dumps(error.diag.message_primary), error.diag.message_detail or ""
    if not REFERENCES.isdisjoint(json.loads(detail)):
        detail = database.call("refusal_body", detail=detail)[0] or ""
    return '{"error": ' + words + ", " + detail[1:], int((error.sqlstate or "")[2:])
