"""What a route may take for granted about its request, and how it asks schema.sql.

A write goes one way: its body is checked (`parse`), goes as named arguments to one SQL function (`call`), and the JSON
text of the answer is passed on.
"""

from __future__ import annotations

import difflib
import re
import urllib.parse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, cast

import flask
from werkzeug.routing import BaseConverter

from .access import Access
from .answers import Refusal, Reply, invalid, reply
from .bodies import MAX_NAME, Body, check, read_members
from .database import Database
from .recent_claims import RecentClaims


class Core(Protocol):
    """What a route uses of the server that its request came to."""

    access: Access
    database: Database
    recent_claims: RecentClaims

    def notify(self, only_run: str | None = None) -> None:
        """Wake the long polls and the sender after a write; `only_run`: only this run's events changed."""


def core() -> Core:
    """The server that this request came to."""
    return cast(Core, flask.request.environ["tidebase.server"])


def reads_only() -> bool:
    """Whether this request came with the key that only reads, or with a run token."""
    return not flask.g.may_write


# ------------------------------------------------------------------------------
# Paths: a part is decoded after the path was split, so that team%2Fa is one part.
# ------------------------------------------------------------------------------
def path_of(target: str) -> str:
    """The path of a request's target, as it was sent."""
    if not target.startswith("/"):
        target = urllib.parse.urlsplit(target).path
    return target.split("?")[0]


def part_of(value: str) -> str:
    """A path part as the client meant it.  :raises Refusal: 400, when it is no text that Postgres can hold."""
    try:
        part = urllib.parse.unquote(value, errors="strict")
    except UnicodeDecodeError:
        raise invalid("path", "is not UTF-8") from None
    if "\x00" in part or len(part) > MAX_NAME:
        raise invalid("path", f"a part must not contain NUL nor be longer than {MAX_NAME} characters")
    return part


class Part(BaseConverter):
    """A part_of the path, in a route's rule."""

    def to_python(self, value: str) -> str:
        """As werkzeug asks it of a converter."""
        return part_of(value)


# ------------------------------------------------------------------------------
# Bodies and calls.
# ------------------------------------------------------------------------------
def received() -> bytes:
    """The request's body, which is within TIDEBASE_MAX_BODY."""
    return cast(bytes, flask.request.environ["wsgi.input"].read())


def parse(kind: type[Body]) -> dict[str, Any]:
    """The fields of the request's body, checked.  :raises Refusal: 400, every wrong member named."""
    return check(kind, read_members(received()))


def call(function: str, **arguments: Any) -> Reply:
    """Call one function of schema.sql, pass its answer on, and wake those who may wait for what it wrote."""
    text, status = core().database.call(function, **arguments)
    core().notify(arguments["run_id"] if wakes_nobody(function, arguments.get("error")) else None)
    return reply(text or "null", status)


def wakes_nobody(function: str, error: Any) -> bool:
    """Whether a write makes no run claimable and no webhook due, so that only those who follow its run wait for it."""
    return function in ("record_step", "begin_step", "complete_step") and error is None


def found(text: str | None, run_id: str) -> Reply:
    """An answer about a run.  :raises Refusal: 404, when there is none."""
    if text is None:
        raise Refusal(404, "not_found", f"run {run_id} does not exist")
    return reply(text)


# ------------------------------------------------------------------------------
# Query strings: a parameter that a route does not take is a mistake, and refused.
# ------------------------------------------------------------------------------
def query(*names: str, prefix: str | None = None, text: str | None = None) -> dict[str, str]:
    """The query string of a route that takes these parameters, and any that begin with `prefix`; or `text` instead.

    :raises Refusal: 400, with what it does not take, or is there twice, named.
    """
    given = flask.request.args.items(multi=True) if text is None else urllib.parse.parse_qsl(
        text.removeprefix("?"), keep_blank_values=True)
    asked: dict[str, str] = {}
    for name, value in given:
        if "\x00" in name or "\x00" in value:
            raise invalid(name[:100].replace("\x00", ""), "must not contain NUL")
        if name not in names and not (prefix and name.startswith(prefix)):
            near = difflib.get_close_matches(name, names, 1)
            raise invalid(name[:100], "is not a parameter of this route"
                                      + (f"; did you mean {near[0]}?" if near else ""))
        if name in asked:
            raise invalid(name[:100], "is there twice")
        asked[name] = value
    return asked


def choice_of(name: str, text: str | None, choices: Sequence[str], default: str) -> str:
    """A word of the query string.  :raises Refusal: 400, when it is none of the choices."""
    if text is not None and text not in choices:
        raise invalid(name, f"must be one of {', '.join(choices)}")
    return default if text is None else text


def flag_of(name: str, text: str | None, default: bool = False) -> bool:
    """true or false.  :raises Refusal: 400, for any other word."""
    return choice_of(name, text, ("true", "false"), str(default).lower()) == "true"


def whole_of(name: str, text: str, high: int, low: int = 0) -> int:
    """A whole number of ASCII digits.  :raises Refusal: 400, when it is none, or out of range."""
    if not re.fullmatch("[0-9]{1,10}", text) or not low <= int(text) <= high:
        raise invalid(name, f"must be a whole number from {low} to {high}")
    return int(text)


def time_of(name: str, text: str | None) -> datetime | None:
    """A time, ISO-8601; without a zone it is UTC.  :raises Refusal: 400, when it is none."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text.replace(" ", "+"))  # a + that was not escaped
        return at if at.tzinfo else at.replace(tzinfo=UTC)
    except ValueError:
        raise invalid(name, "must be a time, as 2026-06-12T10:31:00.000Z") from None
