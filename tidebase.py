"""Tidebase: the checkpoint layer for AI agents, as one small server in front of your own Postgres.

A run is one execution of a workflow, a step one named piece of it. A worker (your code, in your process) takes a lease
on a run, by claim from a queue or by begin, and records each step; what is recorded as completed is a checkpoint, and
whoever takes the run over when the worker dies replays it instead of executing it again. Tidebase never runs user code:
it keeps the record, decides when code should run (again), and says so by claim or by signed webhook.

The rules of that life stand in schema.sql, as SQL functions: a request is checked here for its shape, becomes one call
of one function in one transaction, and the JSON text which that answers is passed on as it is. The wire protocol is
what the routes below say; errors are {"error": words, "code": snake_case}.

The rooms of this file, each using only those above it:

    Configuration         every tunable: its environment name, unit, default and reason
    Answers and errors    how JSON text and refusals become responses
    Reading JSON          bodies to values, while payloads stay the text that came
    Schemas               what a body may hold
    Database              the schema, one pool, one call
    Waiting               one watcher asks Postgres for all who wait
    Webhook sender        webhooks out of the outbox
    Reconciler            what time alone brings about
    Request plumbing      what a route may take for granted
    Routes                check, call, answer
    Wiring                the rooms above, built and served; the command line

Beside it stand openapi.py, which describes the routes, and tidebase_server/: the HTTP server, who may ask, the embedded
PostgreSQL, how a webhook gets to where it may go, and what Studio reads.

Run it with `python tidebase.py`; without DATABASE_URL it brings its own PostgreSQL. Importing this file opens no
socket, thread or connection. It hands on the names of the client, tidebase_sdk.py, so that `from tidebase import
Tidebase` works here as it does in an app that has the client copied in as tidebase.py.
"""

from __future__ import annotations

import base64
import difflib
import functools
import hashlib
import hmac
import http
import importlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, LiteralString, NamedTuple, NoReturn, TypeVar, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import click
import flask
import marshmallow
import psycopg
import psycopg_pool
import requests
from cronsim import CronSim, CronSimError
from marshmallow import fields, validate
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import BaseConverter

import openapi
import tidebase_sdk
from tidebase_sdk import *  # noqa: F403 - the client's names, for `from tidebase import Tidebase`
from tidebase_server.access import LOOPBACK, Access
from tidebase_server.database import EmbeddedError, EmbeddedPostgres
from tidebase_server.exchange import Cut, Exchange, TargetRefused
from tidebase_server.serving import Gatekeeper, Head, HttpServer, Refused
from tidebase_server.targets import WebhookTargets

__version__ = "0.1.0"
__all__ = [*tidebase_sdk.__all__, "Config", "Server"]
sys.modules.setdefault("tidebase", sys.modules[__name__])  # run as a program, it has another name
sys.modules.setdefault("tidebase.aio", tidebase_sdk.aio)
aio = tidebase_sdk.aio

HERE = Path(__file__).resolve().parent
logger = logging.getLogger("tidebase.server")
T = TypeVar("T")
Reply = tuple[str, int, dict[str, str]]  # body, status and headers, as a Flask view may return them


# ------------------------------------------------------------------------------
# Configuration: every tunable, read once at the start and refused if out of range.
# ------------------------------------------------------------------------------
class Setting(NamedTuple):
    """One environment variable: its name, default, kind, and what it does (the README's table is this one)."""

    name: str
    default: str
    kind: type
    help: str


SETTINGS = (
    Setting("HOST", "127.0.0.1", str, "address to listen on; beyond loopback TIDEBASE_API_KEY must be set"),
    Setting("PORT", "7373", int, "port to listen on"),
    Setting("DATABASE_URL", "", str, "the PostgreSQL (15 or newer) to use; without it an embedded one is started"),
    Setting("TIDEBASE_DATA_DIR", ".tidebase", str, "where the embedded PostgreSQL keeps its data"),
    Setting("TIDEBASE_AUTO_MIGRATE", "1", bool, "0: refuse to start on an older schema instead of updating it"),
    Setting("TIDEBASE_API_KEY", "", str, "the key that clients must send; without it whoever can connect may do all"),
    Setting("TIDEBASE_READ_KEY", "", str, "a second key: it may read all but the tokens of gates, and write nothing"),
    Setting("TIDEBASE_INSECURE", "0", bool, "1: listen beyond loopback without a key all the same"),
    Setting("TIDEBASE_WEBHOOK_SECRET", "", str, "signs recovery and push webhooks; without it they go out unsigned"),
    Setting("TIDEBASE_WEBHOOK_ALLOW", "", str,
            "private hosts and networks that webhooks may reach while HOST is beyond loopback: app,10.1.0.0/16"),
    Setting("TIDEBASE_PUBLIC_URL", "", str, "this server's address for reviewers (resolveUrl); needed beyond loopback"),
    Setting("TIDEBASE_CORS_ORIGIN", "", str, "an origin, or *, whose pages may call this server; else none may"),
    Setting("TIDEBASE_LEASE_MS", "60000", int, "how long a worker may be silent: three heartbeats of the client"),
    Setting("TIDEBASE_RECONCILE_MS", "5000", int, "how often expired leases, deadlines and the like are looked for"),
    Setting("TIDEBASE_RETENTION_DAYS", "0", int, "ended runs are deleted after so many days; 0 keeps them for ever"),
    Setting("TIDEBASE_MAX_BODY", str(16 * 1024 * 1024), int, "the largest request body in bytes; larger ones get 413"),
    Setting("TIDEBASE_THREADS", "64", int, "threads per process for requests that are worked on"),
    # An idle worker that waits costs next to nothing, one that is turned away comes again every second or two: with 32
    # places, 200 idle workers cost a quarter of a core.
    Setting("TIDEBASE_PLACES", "500", int, "claims, gates and streams per process that may wait, each in a thread"),
    Setting("TIDEBASE_POOL", "16", int, "connections to PostgreSQL per process"),
    Setting("TIDEBASE_READ_TIMEOUT_MS", "10000", int, "how long PostgreSQL may take to read what a GET asks for"),
    Setting("WEB_CONCURRENCY", "1", int, "server processes that share the port"),
)
# Set for the client, the examples or by the platform; not ours to warn about.
FOREIGN_SETTINGS = {"TIDEBASE_URL", "TIDEBASE_REPORTS_DIR"}
SHORTEST_KEY = 16  # characters, once others can connect, and try
MAKE_KEY = 'this makes one: python -c "import secrets; print(secrets.token_urlsafe(32))"'


class ConfigError(Exception):
    """A setting that cannot be served with; the message says which one and what to do."""


@dataclass(frozen=True)
class Config:
    """The settings as values; see SETTINGS for what each does. Times are in milliseconds, sizes in bytes."""

    host: str
    port: int
    database_url: str
    data_dir: str
    auto_migrate: bool
    api_key: str
    read_key: str
    insecure: bool
    webhook_secret: str
    webhook_allow: str
    public_url: str
    cors_origin: str
    lease_ms: int
    reconcile_ms: int
    retention_days: int
    max_body: int
    threads: int
    places: int
    pool: int
    read_timeout_ms: int
    web_concurrency: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Config:
        """Read and check the settings.

        :raises ConfigError: a value is not of its kind, out of range, or unsafe to serve with.
        """
        values: dict[str, Any] = {}
        for setting in SETTINGS:
            text = environment.get(setting.name, "") or setting.default
            field = setting.name.removeprefix("TIDEBASE_").lower()
            if setting.kind is bool:
                if text not in ("0", "1"):
                    raise ConfigError(f"{setting.name} is {text!r}; it takes 0 or 1")
                values[field] = text == "1"
            elif setting.kind is int:
                if not re.fullmatch(r"[0-9]{1,18}", text):
                    raise ConfigError(f"{setting.name} is {text!r}; it takes a whole number")
                values[field] = int(text)
            else:
                if not text.isprintable():  # among it what is not UTF-8
                    raise ConfigError(f"{setting.name} holds characters that cannot be sent")
                values[field] = text
        for name in environment:
            if name.startswith("TIDEBASE_") and name not in FOREIGN_SETTINGS | {s.name for s in SETTINGS}:
                near = difflib.get_close_matches(name, [s.name for s in SETTINGS], 1)
                hint = f", did you mean {near[0]}?" if near else ""
                logger.warning("%s is not a setting of this server%s", name, hint, extra={"event": "unknown_setting"})
        config = cls(**values)
        config.check()
        return config

    def check(self) -> None:
        """Refuse what cannot work, or is not safe.  :raises ConfigError: with the setting and the way out."""
        limits = {"port": (0, 65535), "lease_ms": (100, 86_400_000), "reconcile_ms": (10, 3_600_000),
                  "retention_days": (0, 36_500), "max_body": (1024, 1 << 30), "threads": (4, 1024), "places": (1, 5000),
                  "pool": (2, 1024), "read_timeout_ms": (10, 3_600_000), "web_concurrency": (1, 64)}
        for field, (low, high) in limits.items():
            if not low <= getattr(self, field) <= high:
                name = next(s.name for s in SETTINGS if s.name.removeprefix("TIDEBASE_").lower() == field)
                raise ConfigError(f"{name} is {getattr(self, field)}; it takes {low} to {high}")
        try:
            psycopg.conninfo.conninfo_to_dict(self.database_url)
        except psycopg.ProgrammingError:  # its words repeat the password
            raise ConfigError("DATABASE_URL is no address of a PostgreSQL, such as "
                              "postgresql://user:password@host:5432/database") from None
        if self.read_key and self.api_key in ("", self.read_key):
            raise ConfigError("TIDEBASE_READ_KEY is for those who may only read: set TIDEBASE_API_KEY, to another key, "
                              "for the others")
        try:
            self.webhook_targets()
        except ValueError as error:
            raise ConfigError(f"TIDEBASE_WEBHOOK_ALLOW: {error}; it takes hosts and networks with commas between them"
                              ) from None
        if self.host not in LOOPBACK and not self.api_key and not self.insecure:
            raise ConfigError(f"HOST is {self.host}, so others can connect: set TIDEBASE_API_KEY to the key they must "
                              f"send (or TIDEBASE_INSECURE=1 to let anyone in); {MAKE_KEY}")
        for name, key in (("TIDEBASE_API_KEY", self.api_key), ("TIDEBASE_READ_KEY", self.read_key)):
            if self.host not in LOOPBACK and 0 < len(key) < SHORTEST_KEY:
                raise ConfigError(f"HOST is {self.host}, so others can connect and try keys: {name} must have at least "
                                  f"{SHORTEST_KEY} characters; {MAKE_KEY}")

    def webhook_targets(self) -> WebhookTargets:
        return WebhookTargets(self.webhook_allow, on_loopback=self.host in LOOPBACK)


# ------------------------------------------------------------------------------
# Answers and errors: how JSON text and refusals become responses; schema.sql decides status, code and words.
# ------------------------------------------------------------------------------
class Refusal(HTTPException):
    """A request that is refused here, before any database function saw it."""

    def __init__(self, status: int, code: str, words: str, **extras: Any) -> None:
        super().__init__(words)
        self.code = status
        self.body = {"error": words, "code": code, **extras}


def invalid(path: str, message: str) -> Refusal:
    """The 400 for one wrong value; `path` says where it stands, dotted, and is empty for the body as a whole."""
    return Refusal(400, "invalid_request", "invalid request body", issues=[{"path": path, "message": message}])


# On every answer: what browsers must not guess at, nor they or proxies keep.
SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def reply(text: str, status: int = 200) -> Reply:
    return text, status, {"Content-Type": "application/json", **SAFE_HEADERS}


def answer_to(error: Exception) -> Reply:
    """The answer to a request that raised.  What is a defect is told in full to the log, and in one word to the
    client."""
    if isinstance(error, HTTPException):
        return refused(error)
    known = None
    if isinstance(error, psycopg.Error):
        try:
            known = database_refused(error)
        except psycopg.Error as later:  # the database went away before the objects of a refusal were read
            known = database_refused(later)
    if known is None:
        logger.error("request failed", exc_info=error, extra={
            "event": "request_failed", "path": flask.request.path})
    return known or reply('{"error": "internal error", "code": "internal_error"}', 500)


def refused(error: HTTPException) -> Reply:
    """Answer a refusal of this file, or of Flask (no such route, wrong method)."""
    status = error.code or 500
    body = getattr(error, "body", None) or (invalid("", error.description or "malformed").body if status == 400 else {
        "error": error.description, "code": {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(
            status, "http_error")})
    text, status, headers = reply(json.dumps(body), status)
    if isinstance(error, MethodNotAllowed) and error.valid_methods:
        headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return text, status, headers


def database_refused(error: psycopg.Error) -> Reply | None:
    """Answer an error of Postgres: a refusal of schema.sql (SQLSTATE TBnnn: status nnn, DETAIL the JSON with the code),
    a value that Postgres cannot take (400), or a database that is away or busy (503, to be sent again)."""
    state = error.sqlstate or ""
    if is_refusal(error):
        return reply(*refusal_of(error, core().database))
    words = error.diag.message_primary or ""
    if state == "54000" and error.diag.constraint_name:  # an index, whose rows take about 2,700 bytes
        field = INDEXED.get(error.diag.constraint_name, "name")
        return refused(invalid(field, "too large: together with what else an index has of it, at most 2,700 bytes"))
    if state == "54000" or "invalid memory alloc request size" in words:
        return refused(Refusal(413, "body_too_large", f"this is too large for PostgreSQL: {words}"))
    # 22: a value out of range or not JSON for Postgres; 54: nested too deeply.
    if state.startswith(("22", "54")):
        return refused(invalid("", (error.diag.message_primary or "a value was refused").split("\n")[0]))
    if isinstance(error, psycopg.errors.QueryCanceled):
        return busy(reply('{"error": "the database took too long to answer this: ask for less, or send it again later",'
                          ' "code": "query_timeout"}', 503))
    # A function is not there, or was replaced as it was called: the schema is being, or has been, brought to another
    # build's version, whose servers can answer this.
    if state == "42883" or (state == "XX000" and "cache lookup failed" in (error.diag.message_primary or "")):
        logger.error("the database's schema is another build's: %s", error.diag.message_primary,
                     extra={"event": "schema_differs", "path": flask.request.path})
        return busy(reply('{"error": "the database\'s schema is another build\'s: send this again", '
                          '"code": "database_unavailable"}', 503))
    # 25006: a standby after a failover. The rest of these classes are connections, locks, resources, shutdown.
    if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)) or state == "25006":
        return busy(reply('{"error": "the database is away: send this again", "code": "database_unavailable"}', 503))
    return None


# The body's member that makes a row of an index too long, where that is not its name.
INDEXED = {"runs_dedupe_key": "dedupeKey", "runs_ready_workflow_idx": "workflowName", "runs_running_idx": "leaseOwner",
           "runs_of_workflow_idx": "workflowName", "runs_of_queue_idx": "queue", "runs_ready_idx": "queue",
           "runs_failure_idx": "failureClass", "runs_metadata_idx": "metadata"}
REFERENCES = {"run", "step", "gate", "state"}  # members of a refusal's detail that name an object


def is_refusal(error: psycopg.Error) -> bool:
    return (error.sqlstate or "").startswith("TB")


def refusal_of(error: psycopg.Error, database: Database) -> tuple[str, int]:
    """The body and the status of a refusal of schema.sql; the objects that its detail names are read now.

    :raises psycopg.Error: they cannot be.
    """
    words, detail = json.dumps(error.diag.message_primary), error.diag.message_detail or ""
    if not REFERENCES.isdisjoint(json.loads(detail)):
        detail = database.call("refusal_body", detail)[0] or ""
    return '{"error": ' + words + ", " + detail[1:], int((error.sqlstate or "")[2:])


LOGGED_CHARACTERS = 120  # of what somebody else wrote: a line of the log is no place for a payload


def one_line(text: str) -> str:
    """The first words of somebody's text, for a line of the log."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * LOGGED_CHARACTERS]).split())
    return words if len(words) <= LOGGED_CHARACTERS else words[:LOGGED_CHARACTERS] + "…"


def place_of(run: dict[str, Any]) -> str:
    """Its workflow and queue, for a line of the log."""
    queue = "no queue" if run["queue"] is None else f"queue {one_line(run['queue'])}"
    return f"workflow {one_line(run['workflowName'])}, {queue}"


def busy(answer: Reply) -> Reply:
    """Ask for the request again, in a second."""
    answer[2]["Retry-After"] = "1"
    return answer


# ------------------------------------------------------------------------------
# Reading JSON: a body becomes Python values to check, while its payloads stay the text that came.
# ------------------------------------------------------------------------------
MAX_NUMBER = 1000  # characters; a longer number is no number that anybody means, and costs quadratic time


class Json(NamedTuple):
    """A member that is passed on as it came: its value, to check, and its text."""

    value: Any
    text: str


class RawText(str):
    """JSON text that is put into larger JSON as it is (see compose)."""


def compose(value: dict[str, Any]) -> str:
    """The JSON of a dict, its RawText members unparsed."""
    members = [f"{json.dumps(k)}: {v}" for k, v in value.items() if isinstance(v, RawText)]
    rest = json.dumps({k: v for k, v in value.items() if not isinstance(v, RawText)})
    return "{" + ", ".join([rest[1:-1], *members] if len(rest) > 2 else members) + "}"


def _number(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(digits: str) -> Any:
        if len(digits) > MAX_NUMBER:
            raise ValueError(f"a number of {len(digits)} characters")
        return convert(digits)

    return parse


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")  # Python's parser takes NaN and Infinity


_decoder = json.JSONDecoder(parse_int=_number(int), parse_float=_number(float), parse_constant=_no_constant)
# The two halves of the standard decoder that say where a value ends; its stubs leave them out.
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once  # type: ignore[attr-defined]
_scan_string: Callable[[str, int], tuple[str, int]] = json.decoder.scanstring  # type: ignore[attr-defined]
_space = re.compile(r"[ \t\n\r]*").match
_key = re.compile(r'"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*').match  # one without escapes
_comma = re.compile(r"[ \t\n\r]*,[ \t\n\r]*").match


def _skip(text: str, at: int) -> int:
    return _space(text, at).end()  # type: ignore[union-attr]  # it matches always


def _expect(text: str, at: int, allowed: str) -> str:
    if text[at : at + 1] not in tuple(allowed):
        raise ValueError(f"expected {' or '.join(allowed)} at character {at}")
    return text[at]


def _read_key(text: str, at: int) -> tuple[str, int]:
    """The key at `at`, and where its value begins."""
    if usual := _key(text, at):
        return usual[1], usual.end()
    _expect(text, at, '"')
    key, at = _scan_string(text, at + 1)
    at = _skip(text, at)
    _expect(text, at, ":")
    return key, _skip(text, at + 1)


def _read_object(text: str, at: int, schema: Body) -> tuple[dict[str, Any], int]:
    """The object that begins at `at`, and where it ends. Members that the schema keeps as text become Json; lists of
    objects that have a schema of their own are read with it; the last of two equal keys counts, as everywhere."""
    members: dict[str, Any] = {}
    _expect(text, at, "{")
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}" or members:
        key, begin = _read_key(text, at)
        if key in schema.lists and text[begin : begin + 1] == "[":
            members[key], at = _read_list(text, begin, schema.lists[key])
        else:
            value, at = _scan(text, begin)
            members[key] = Json(value, text[begin:at]) if key in schema.texts else value
        comma = _comma(text, at)
        if comma is None:
            at = _skip(text, at)
            _expect(text, at, ",}")
            break
        at = comma.end()
    return members, at + 1


def _read_list(text: str, at: int, schema: Body) -> tuple[list[Any], int]:
    items: list[Any] = []
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]" or items:
        item, at = _read_object(text, at, schema) if text[at : at + 1] == "{" else _scan(text, at)
        items.append(item)
        at = _skip(text, at)
        if _expect(text, at, ",]") == "]":
            break
        at = _skip(text, at + 1)
    return items, at + 1


def read_body(raw: bytes, schema: Body) -> dict[str, Any]:
    """The members of a body; nothing at all counts as {}.

    :raises Refusal: 400, when it is not a JSON object. Lone surrogates are refused too: they are no text.
    """
    try:
        text = raw.decode("utf-8")
        at = _skip(text, 0)
        if at == len(text):
            return {}
        if text[at] != "{":
            _scan(text, at)
            raise invalid("", "must be a JSON object")
        members, at = _read_object(text, at, schema)
        if _skip(text, at) != len(text):
            raise ValueError(f"more after the end, at character {at}")
        if "\\u" in text:
            json.dumps(_scan(text, _skip(text, 0))[0], ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise invalid("", "nested too deeply") from None
    except StopIteration as error:
        raise invalid("", f"malformed JSON at character {error.value}") from None
    except ValueError as error:  # among them UnicodeError and json.JSONDecodeError
        raise invalid("", f"malformed JSON: {str(error)[:200]}") from None
    return members


# ------------------------------------------------------------------------------
# Schemas: what a body may hold. Optional is not nullable: null is refused where the type has none.
# ------------------------------------------------------------------------------
MAX_NAME = 512  # characters: names stand in indexes, whose rows Postgres limits to about 2,700 bytes
MAX_TEXT = 8192  # characters, of a reason, an actor and the like: lists show them
MAX_PROMPT = 65_536
MAX_SPELLED = 32 * 1024 * 1024  # bytes of a value that Postgres looks into, as it writes it: 1e300 has 301 digits
MAX_MS = 36_525 * 86_400_000  # a hundred years: longer is a mistake of units
MAX_WAIT_MS = 25_000  # proxies close what is silent for 30 s
MAX_ATTEMPTS = 1_000_000
MAX_PRIORITY = 2**31 - 1
MAX_CLAIM_QUEUES = 1000
MAX_FILTERS = 16  # metadata filters of a list
MAX_RUN_CHANNELS = 32
MAX_GATE_CHANNELS = 8
MAX_BATCH = 10_000
MAX_SIGNALS = 1_000_000  # of one name and run
MAX_AMOUNT = 10**15
MAX_WORKFLOWS = 1000  # of a claim: each is looked for by itself
MAX_ANSWERS = 16 * 1024 * 1024  # characters of the answers to a batch, as _budget() of schema.sql
MAX_WRITES = 1000  # of a batch whose writes are made one by one, in one transaction
# As parts of a URL . and .. are the folder and the one above it.
ID = validate.Regexp(r"(?!\.\.?$)[A-Za-z0-9_.:-]{1,128}\Z",
                     error="must be 1 to 128 of A-Z a-z 0-9 _ . : -, and not . or ..")
LIMITS = (
    f"Names are at most {MAX_NAME} characters long, priorities integers of 32 bits, maxAttempts 1 to {MAX_ATTEMPTS:,}. "
    f"Delays and timeouts reach 100 years ahead, waitMs {MAX_WAIT_MS // 1000} seconds. A claim names at most "
    f"{MAX_CLAIM_QUEUES:,} queues, a list of runs {MAX_FILTERS} metadata filters; a run has at most {MAX_RUN_CHANNELS} "
    f"channels, a gate {MAX_GATE_CHANNELS}, a batch {MAX_BATCH:,} runs or {MAX_WRITES:,} writes, a reason, an actor or "
    f"another text that is no payload {MAX_TEXT:,} characters, a gate's prompt {MAX_PROMPT:,}, a number "
    f"{MAX_NUMBER:,} characters, a body TIDEBASE_MAX_BODY bytes (16 MiB unless set otherwise).")


def _no_nul(value: str) -> None:
    if "\x00" in value:
        raise marshmallow.ValidationError("must not contain NUL")


class Text(fields.String):
    """A string as Postgres can hold it."""

    # For /openapi.json, here and below: what the validators cannot tell.
    json_schema: ClassVar[dict[str, Any]] = {"pattern": "^[^\\u0000]*$"}

    def __init__(self, *validators: Callable[[Any], Any], **options: Any) -> None:
        if not any(isinstance(validator, validate.Length) for validator in validators):
            validators = (validate.Length(max=MAX_TEXT), *validators)
        super().__init__(validate=[_no_nul, *validators], **options)


class Name(Text):
    def __init__(self, *validators: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(validate.Length(1, MAX_NAME), *validators, **options)


class Whole(fields.Integer):
    """A strict integer: "5", 1.5 and true are refused."""

    def __init__(self, low: int, high: int, **options: Any) -> None:
        super().__init__(strict=True, validate=validate.Range(low, high), **options)

    def _validated(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)


class Flag(fields.Boolean):
    """true or false, and none of the words that marshmallow would take for them."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Url(Text):
    """An http or https address, for a webhook."""

    json_schema: ClassVar[dict[str, Any]] = {"pattern": "^[Hh][Tt][Tt][Pp][Ss]?://."}

    def __init__(self, **options: Any) -> None:
        super().__init__(validate.Length(1, 8192), _http_url, **options)


def _http_url(value: str) -> None:
    try:
        parts = urllib.parse.urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise marshmallow.ValidationError("must be an http or https URL")


class JsonText(fields.Field[RawText | None]):
    """A member that goes to Postgres as the text it came as; null, or none at all, is `empty`."""

    def __init__(self, empty: str | None = None, **options: Any) -> None:
        self.empty = None if empty is None else RawText(empty)
        if not options.get("required"):
            options["load_default"] = self.empty
        super().__init__(allow_none=True, **options)

    def _deserialize(self, value: Json, attr: str | None, data: Any, **kwargs: Any) -> RawText | None:
        if value.value is None:
            return self.empty
        self.inspect(value)
        return RawText(value.text)

    def inspect(self, value: Json) -> None:
        """Nothing to object to: a payload is the user's."""


class Amount(JsonText):
    """A number from 0 on. It goes to Postgres as it is spelled, so that no digit is lost; null, true and "5" are
    none."""

    json_schema: ClassVar[dict[str, Any]] = {"type": "number", "minimum": 0, "maximum": MAX_AMOUNT}

    def _deserialize(self, value: Json, attr: str | None, data: Any, **kwargs: Any) -> RawText:
        if type(value.value) not in (int, float):
            raise marshmallow.ValidationError("must be a number")
        amount = Decimal(value.text)
        if not 0 <= amount <= MAX_AMOUNT:
            raise marshmallow.ValidationError(f"must be 0 to {MAX_AMOUNT}")
        if cast(int, amount.as_tuple().exponent) < -MAX_NUMBER:
            raise marshmallow.ValidationError(f"must have at most {MAX_NUMBER} decimals")
        return RawText(value.text)


class JsonValue(JsonText):
    """A value that Postgres looks into, so that NUL, which its text cannot hold, is refused."""

    def __init__(self, **options: Any) -> None:
        super().__init__(empty="{}", **options)

    def inspect(self, value: Json) -> None:
        if re.search(r"(?<!\\)(\\\\)*\\u0000", value.text):
            raise marshmallow.ValidationError("must not contain NUL")
        try:
            json.dumps(value.value, allow_nan=False)
        except ValueError:  # jsonb would write 1e99999 out, in so many digits that clients cannot read it
            raise marshmallow.ValidationError("must not contain a number beyond a double") from None
        except RecursionError:
            raise marshmallow.ValidationError("nested too deeply") from None
        if (size := spelled_bytes(value.text)) > MAX_SPELLED:
            raise marshmallow.ValidationError(
                f"too large: with its numbers written out it has {size:,} bytes; at most {MAX_SPELLED:,}")


def spelled_bytes(text: str) -> int:
    """About how many bytes Postgres needs for a JSON text: it writes numbers out, 1e300 as 301 digits."""
    if not EXPONENT.search(text):
        return len(text)
    numbers = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    return len(text) + sum(min(int(exponent), 400) for exponent in EXPONENT.findall(numbers))


EXPONENT = re.compile(r"[0-9][eE][+-]?0*([0-9]{1,9})")


class JsonObject(JsonValue):
    """Likewise, and an object."""

    json_schema: ClassVar[dict[str, Any]] = {"type": ["object", "null"]}

    def __init__(self, schema: type[Body] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.shape = schema

    def inspect(self, value: Json) -> None:
        if not isinstance(value.value, dict):
            raise marshmallow.ValidationError("must be an object")
        super().inspect(value)
        if self.shape and value.value:
            schema_of(self.shape).load(value.value, partial=True)


class OneOrMany(fields.Field[Any]):
    """A list, or a string that stands for a list of one."""

    json_schema: ClassVar[dict[str, Any]] = {"type": ["array", "string", "null"]}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, (list, str)):
            return value
        raise marshmallow.ValidationError("must be a list, or a string")


class Names(fields.Field[Any]):
    """A list of names, or true for all."""

    json_schema: ClassVar[dict[str, Any]] = {"anyOf": [
        {"const": True},
        {"type": "array", "maxItems": MAX_BATCH, "items": {"type": "string", "minLength": 1, "maxLength": MAX_NAME}}]}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if value is True or (isinstance(value, list) and len(value) <= MAX_BATCH
                             and all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in value)):
            return value
        raise marshmallow.ValidationError("must be a list of names, or true")


class Body(marshmallow.Schema):
    """The base of all bodies: a key that it does not know is ignored, since existing clients send some."""

    class Meta:
        unknown = marshmallow.EXCLUDE

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        if field_obj.load_default is None and not isinstance(field_obj, JsonText):
            field_obj.allow_none = False  # else marshmallow takes such a default for "may be null"

    @functools.cached_property
    def by_key(self) -> dict[str, fields.Field[Any]]:
        return {field.data_key or name: field for name, field in self.fields.items()}

    @functools.cached_property
    def texts(self) -> set[str]:
        """The members that stay the text they came as."""
        return {key for key, field in self.by_key.items() if isinstance(field, JsonText)}

    @functools.cached_property
    def lists(self) -> dict[str, Body]:
        """The members that are lists of objects, and what those may hold."""
        return {key: cast(Body, field.inner.schema) for key, field in self.by_key.items()
                if isinstance(field, fields.List) and isinstance(field.inner, fields.Nested)}


@functools.cache
def schema_of(kind: type[Body]) -> Body:
    return kind()


class Verb(fields.String):
    """The member `do` of a write: which of its kinds it is."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.json_schema = {"const": verb}
        super().__init__(required=True, validate=validate.Equal(verb))


class OneOf(fields.Nested):
    """One of several bodies, told apart by their Verb; `read` has the members of all."""

    def __init__(self, read: type[Body], *kinds: type[Body]) -> None:
        self.kinds = {cast(Verb, kind._declared_fields["do"]).verb: kind for kind in kinds}
        super().__init__(read)

    def _deserialize(self, value: Any, attr: str | None, data: Any, partial: Any = None, **kwargs: Any) -> Any:
        if not isinstance(value, dict):
            raise self.make_error("type", input=value, type=type(value).__name__)
        verb = value.get("do")
        if not isinstance(verb, str) or verb not in self.kinds:
            raise marshmallow.ValidationError({"do": [f"must be one of {', '.join(self.kinds)}"]})
        return schema_of(self.kinds[verb]).load(value)


class ChannelBody(Body):
    type = fields.Str(required=True, validate=validate.OneOf(["webhook"]))
    url = Url(required=True)
    secret = Text(validate.Length(1, 1024))
    events = fields.List(Name())


def channels_up_to(count: int) -> fields.List[Any]:
    """Where to send the events of a run, or of a gate: each event is written once for each of them."""
    return fields.List(fields.Nested(ChannelBody), load_default=list, validate=validate.Length(max=count))


class RunFields(Body):
    """What every way to make a run takes."""

    id = Text(ID, load_default=None)
    input = JsonText(empty="{}")
    metadata = JsonObject()
    recovery_webhook = Url(data_key="recoveryWebhook", load_default=None)
    recovery_secret = Text(validate.Length(1, 1024), data_key="recoverySecret", load_default=None)
    channels = channels_up_to(MAX_RUN_CHANNELS)
    deadline_ms = Whole(1, MAX_MS, data_key="deadlineMs", load_default=None)


class CreateRunBody(RunFields):
    """POST /runs/:workflowName"""


class EnqueueBody(RunFields):
    """POST /queues/:queue/enqueue"""

    workflow_name = Name(data_key="workflowName", required=True)
    dedupe_key = Name(data_key="dedupeKey", load_default=None)
    delay_ms = Whole(0, MAX_MS, data_key="delayMs", load_default=None)
    run_at = fields.AwareDateTime(format="iso", data_key="runAt", load_default=None, default_timezone=UTC)
    max_attempts = Whole(1, MAX_ATTEMPTS, data_key="maxAttempts", load_default=3)  # so that a dead worker's run goes on
    priority = Whole(-MAX_PRIORITY - 1, MAX_PRIORITY, load_default=0)


class EnqueueManyBody(Body):
    runs = fields.List(fields.Nested(EnqueueBody), required=True, validate=validate.Length(1, MAX_BATCH))


class EnqueueAnyBody(EnqueueBody, EnqueueManyBody):
    """Either of the two, to read it before it is known which."""


class BeginRunBody(Body):
    checkpoints = Flag(load_default=False)


class HeartbeatBody(Body):
    lease_owner = Name(data_key="leaseOwner", required=True)


class OwnerFields(Body):
    """Who writes: a worker that lost its run is refused; one that names no owner is not looked at."""

    lease_owner = Name(data_key="leaseOwner", load_default=None)


class BeatBody(HeartbeatBody):
    id = Name(required=True)


class HeartbeatsBody(Body):
    runs = fields.List(fields.Nested(BeatBody), required=True, validate=validate.Length(1, MAX_BATCH))


class CompleteRunBody(OwnerFields):
    result = JsonText()
    brief = Flag(load_default=False)


class FailRunBody(OwnerFields):
    error = JsonText()
    failure_class = Name(data_key="failureClass", load_default=None)
    retryable = Flag(load_default=True)


class CancelBody(Body):
    reason = Text(load_default=None)
    actor = Text(load_default=None)


class RecoverBody(Body):
    reason = Name(load_default="manual")


class StepOptions(Body):
    """What a step's options promise of it; they may hold more. Here null counts as absent."""

    side_effects = OneOrMany(data_key="sideEffects", allow_none=True)
    idempotency_key = Text(data_key="idempotencyKey", allow_none=True)
    replay = fields.Str(allow_none=True, validate=validate.OneOf(["auto", "manual", "never"]))
    # The older spelling of sideEffects and, below, of replay.
    side_effect = Text(data_key="sideEffect", allow_none=True)
    on_ambiguous_failure = fields.Str(data_key="onAmbiguousFailure", allow_none=True, validate=validate.OneOf(
        ["retry", "review", "fail"]))
    checkpoint_invariant = fields.Raw(data_key="checkpointInvariant", allow_none=True)
    verified_by = fields.Raw(data_key="verifiedBy", allow_none=True)
    credentials = fields.Raw(allow_none=True)


class StepFields(Body):
    name = Name(required=True)
    input_hash = Name(data_key="inputHash", required=True)
    input = JsonText(empty="{}")
    options = JsonObject(StepOptions)


class BeginStepBody(StepFields, OwnerFields):
    """POST /runs/:id/steps/begin"""


class CompleteStepBody(Body):
    lease_owner = Name(data_key="leaseOwner", required=True)
    output = JsonText()


class StepFailure(Body):
    """How a failure is judged: whether, and how, the step may run again."""

    retryable = Flag(load_default=False)
    resume_decision = fields.Str(data_key="resumeDecision", load_default=None, validate=validate.OneOf(
        ["auto_retry", "safe_replay", "manual_review", "fail_hard"]))


class FailStepBody(StepFailure):
    lease_owner = Name(data_key="leaseOwner", required=True)
    error = JsonText(required=True)


class RecordStepBody(StepFields, StepFailure):
    """POST /runs/:id/steps: a step that already ran."""

    lease_owner = Name(data_key="leaseOwner", required=True)
    output = JsonText()
    error = JsonText()
    started_at = fields.AwareDateTime(format="iso", data_key="startedAt", load_default=None, default_timezone=UTC)
    duration_ms = Whole(0, MAX_MS, data_key="durationMs", load_default=None)
    brief = Flag(load_default=False)


class RecordOfRun(RecordStepBody):
    run_id = Name(data_key="runId", required=True)


class RecordStepsBody(Body):
    records = fields.List(fields.Nested(RecordOfRun), required=True, validate=validate.Length(1, MAX_WRITES))


class ReviewBody(Body):
    decision = fields.Str(required=True, validate=validate.OneOf(["retry", "complete", "fail"]))
    output = JsonText()
    actor = Text(load_default=None)


class ChildBody(RunFields, OwnerFields):
    """POST /runs/:id/children"""

    name = Name(required=True)
    workflow_name = Name(data_key="workflowName", required=True)
    edge_type = Name(data_key="edgeType", load_default="child")
    edge_metadata = JsonObject(data_key="edgeMetadata")
    queue = Name(load_default=None)
    max_attempts = Whole(1, MAX_ATTEMPTS, data_key="maxAttempts", load_default=3)
    priority = Whole(-MAX_PRIORITY - 1, MAX_PRIORITY, load_default=0)


class WaitFor(Body):
    """What a run waits for: one of these."""

    gate_id = Name(data_key="gateId")
    event = Name()
    until = fields.AwareDateTime(format="iso", default_timezone=UTC)
    children = Names()
    n = Whole(1, MAX_SIGNALS)  # of an event: which of its signals
    step_id = Name(data_key="stepId")  # the step that records the wait, and ends with it

    @marshmallow.validates_schema
    def _one_of_them(self, data: dict[str, Any], **_: Any) -> None:
        if len(data.keys() - {"n", "step_id"}) != 1:
            raise marshmallow.ValidationError("must be one of gateId, event, until and children")
        if "n" in data and "event" not in data:
            raise marshmallow.ValidationError("is the number of an event", "n")


class WaitBody(HeartbeatBody):
    wait_for = fields.Nested(WaitFor, data_key="for", required=True)
    timeout_ms = Whole(1, MAX_MS, data_key="timeoutMs", load_default=None)


class ExpireSignalBody(HeartbeatBody):
    """POST /runs/:id/signals/:name/expire"""

    n = Whole(1, MAX_SIGNALS, load_default=1)


class SignalBody(OwnerFields):
    id = Text(ID, load_default=None)
    name = Name(required=True)
    payload = JsonText()


class ForkBody(Body):
    id = Text(ID, load_default=None)
    from_step = Name(data_key="fromStep", load_default=None)
    input = JsonText()
    queue = Name(load_default=None)


class BeginGateBody(OwnerFields):
    """POST /runs/:id/gates/begin"""

    name = Name(required=True)
    prompt = Text(validate.Length(max=MAX_PROMPT), required=True)
    data = JsonText(empty="{}")
    channels = channels_up_to(MAX_GATE_CHANNELS)
    capability = JsonText()
    timeout_ms = Whole(1, MAX_MS, data_key="timeoutMs", load_default=None)


class ResolveGateBody(Body):
    token = Text(required=True)
    decision = fields.Str(required=True, validate=validate.OneOf(["approved", "rejected", "canceled"]))
    actor = Text(load_default=None)
    payload = JsonText(empty="{}")


class About(Body):
    """What may be said of a version of the state."""

    id = Text(ID)
    label = Name()
    reason = Text()
    importance = fields.Str(validate=validate.OneOf(["transient", "normal", "checkpoint", "milestone"]))
    metadata = JsonObject()
    created_by = Text(data_key="createdBy")
    step_id = Text(data_key="stepId")


class PutStateBody(About, OwnerFields):
    value = JsonValue()
    stream = Name(load_default="run")
    if_version = Whole(0, 2**31 - 1, data_key="ifVersion", load_default=None)


class PatchStateBody(PutStateBody):
    value = JsonObject()


class SaveStateBody(About, OwnerFields):
    label = Name(required=True)
    stream = Name(load_default="run")


class SnapshotTarget(Body):
    type = Name(required=True)
    id = Name(required=True)


class SnapshotBody(About, OwnerFields):
    label = Name(required=True)
    state = JsonValue()
    target = fields.Nested(SnapshotTarget, load_default=None)


class UsageBody(OwnerFields):
    """POST /runs/:id/usage"""

    id = Text(ID, load_default=None)
    step_id = Text(data_key="stepId")
    kind = Name(load_default="custom")
    provider = Text()
    model = Text()
    label = Text()
    quantity = Amount()
    unit = Text()
    input_tokens = Whole(0, 2**53, data_key="inputTokens")
    output_tokens = Whole(0, 2**53, data_key="outputTokens")
    total_tokens = Whole(0, 2**53, data_key="totalTokens")
    cost_usd = Amount(data_key="costUsd")
    metadata = JsonObject()


class ScheduleBody(Body):
    """PUT /schedules/:name"""

    cron = Text(required=True)
    timezone = Text(load_default="UTC")
    workflow_name = Name(data_key="workflowName", required=True)
    input = JsonText(empty="{}")
    queue = Name(load_default="default")
    max_attempts = Whole(1, MAX_ATTEMPTS, data_key="maxAttempts", load_default=3)
    enabled = Flag(load_default=True)


class ClaimBody(Body):
    """POST /queues/claim"""

    queues = fields.List(Name(), required=True, validate=validate.Length(1, MAX_CLAIM_QUEUES))
    id = Text(ID, load_default=None)
    lease_owner = Name(data_key="leaseOwner", load_default=None)
    limit = Whole(1, 100, load_default=1)
    workflows = fields.List(Name(), load_default=None, validate=validate.Length(0, MAX_WORKFLOWS))
    wait_ms = Whole(0, MAX_WAIT_MS, data_key="waitMs", load_default=0)
    checkpoints = Flag(load_default=False)


class RecordWrite(RecordOfRun):
    do = Verb("record_step")


class BeginStepWrite(BeginStepBody):
    do = Verb("begin_step")
    run_id = Name(data_key="runId", required=True)


class CompleteStepWrite(CompleteStepBody):
    do = Verb("complete_step")
    run_id = Name(data_key="runId", required=True)
    step_id = Name(data_key="stepId", required=True)


class CompleteRunWrite(CompleteRunBody):
    do = Verb("complete_run")
    run_id = Name(data_key="runId", required=True)


class EnqueueWrite(EnqueueBody):
    do = Verb("enqueue_run")
    queue = Name(required=True)


class ChildWrite(ChildBody):
    do = Verb("create_child")
    run_id = Name(data_key="runId", required=True)


class AnyWrite(RecordWrite, BeginStepWrite, CompleteStepWrite, CompleteRunWrite, EnqueueWrite, ChildWrite):
    """Any of them, to read it before it is known which."""


class WritesBody(Body):
    """POST /writes"""

    writes = fields.List(
        OneOf(AnyWrite, RecordWrite, BeginStepWrite, CompleteStepWrite, CompleteRunWrite, EnqueueWrite, ChildWrite),
        required=True, validate=validate.Length(1, MAX_WRITES))


class QueueConfigBody(Body):
    concurrency = Whole(1, 1_000_000, allow_none=True)
    rate_per_minute = Whole(1, 100_000_000, data_key="ratePerMinute", allow_none=True)
    invoke_url = Url(data_key="invokeUrl", allow_none=True)
    paused = Flag()


# ------------------------------------------------------------------------------
# Database: the schema, one pool, and one call: a function of schema.sql, one transaction.
# ------------------------------------------------------------------------------
SCHEMA_VERSION = 3  # what schema.sql records at its end; both are raised with every change of that file
CONNECT_SECONDS = 5


class JsonArray(list[str | None]):
    """JSON texts for an argument of type json[]."""


class JsonArrayDumper(psycopg.adapt.Dumper):
    """Writes one as PostgreSQL reads it, several times as fast as psycopg writes a list of anything."""

    oid = psycopg.adapters.types["json"].array_oid

    def dump(self, obj: JsonArray) -> bytes:
        return ("{" + ",".join(
            "null" if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' for text in obj
        ) + "}").encode()


class SchemaBehind(Exception):
    """The database's schema is older than this server's, and it may not bring it up to date."""

    def __init__(self) -> None:
        super().__init__("the database's schema is older than this server's: run `python tidebase.py migrate`")


class SchemaAhead(Exception):
    """The database's schema is newer than this build's, and is left alone."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the database's schema has version {version}, newer than {SCHEMA_VERSION}, which this build "
                         "has: it is left alone; migrate with the newer build")


def is_away(error: psycopg.Error) -> bool:
    """Whether it tells of a lost connection or of a server that ends: nobody knows whether the transaction stands."""
    return isinstance(error, psycopg.OperationalError) and (
        error.sqlstate is None or error.sqlstate.startswith(("08", "57P")))


def cannot_write(error: psycopg.Error) -> bool:
    """Whether nobody can write now: the database is away, or it is a standby (25006), as after a failover."""
    return is_away(error) or error.sqlstate == "25006"


class Database:
    """One pool; `call` and, where there are many answers, `rows` are the only ways from here to the rules. What a GET
    asks for is read by `read` and `select`, within a limit of time."""

    def __init__(self, conninfo: str, size: int, read_ms: int = 10_000) -> None:
        # Functions answer JSON text, which is passed on: it must not be parsed.
        adapters = psycopg.adapt.AdaptersMap(psycopg.adapters)
        adapters.register_loader("json", psycopg.types.string.TextLoader)
        adapters.register_dumper(JsonArray, JsonArrayDumper)
        self.conninfo = conninfo
        self.read_ms = read_ms
        self.pool = psycopg_pool.ConnectionPool(
            conninfo, min_size=1, max_size=size, open=False, name="tidebase",
            timeout=CONNECT_SECONDS, reconnect_timeout=CONNECT_SECONDS,  # then the next request tries anew
            max_idle=60, max_lifetime=3600,
            kwargs={
                "autocommit": True,          # a call is one statement, so one transaction in one round trip
                "prepare_threshold": None,   # named statements would not survive a transaction pooler
                "context": adapters,
                "connect_timeout": CONNECT_SECONDS,
                "tcp_user_timeout": 10_000,  # a peer that vanished is noticed
                "application_name": "tidebase",
            },
        )
        logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)  # an outage is told once, by the reconciler

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection from the pool.

        :raises psycopg.OperationalError: Postgres is away. The others in the pool are then looked at, too.
        """
        try:
            with self.pool.connection() as connection:
                yield connection
        except psycopg.OperationalError as error:
            if is_away(error):
                with suppress(RuntimeError):  # the machine gives no more threads: the next failure is another chance
                    threading.Thread(target=self._look_at_pool, name="tidebase-pool-check", daemon=True).start()
            raise

    def _look_at_pool(self) -> None:
        try:
            self.pool.check()
        except psycopg.Error as error:  # still away: the next request will say so
            logger.debug("pool check: %s", type(error).__name__, extra={"event": "pool_check_failed"})

    def call(self, function: str, *arguments: Any) -> tuple[str | None, int]:
        """Call a function of schema.sql, in a transaction of its own.

        :returns: the JSON text of the answer, None for SQL's null, and the HTTP status (200 unless it says another).
        :raises psycopg.Error: as raised; SQLSTATE TBnnn is a refusal.
        """
        [row] = self.rows(function, *arguments)
        return row[0], row[1] if len(row) > 1 else 200

    def rows(self, function: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Call a function of schema.sql that answers rows, likewise."""
        marks = ", ".join(["%s"] * len(arguments))
        with self.connection() as connection:
            return connection.execute(f"select * from tidebase.{function}({marks})", arguments).fetchall()  # noqa: S608

    def read(self, function: str, *arguments: Any) -> tuple[str | None, int]:
        """Call a function that only reads, likewise, for at most `read_ms`.

        :raises psycopg.errors.QueryCanceled: it took longer.
        """
        marks = ", ".join(["%s"] * len(arguments))
        [row] = self.select(f"select * from tidebase.{function}({marks})", arguments)  # noqa: S608
        return row[0], row[1] if len(row) > 1 else 200

    def select(self, query: LiteralString | psycopg.sql.Composed, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The rows of a query, likewise."""
        with self.connection() as connection:
            text = query if isinstance(query, str) else query.as_string(connection)
            # Both statements in one message, which is one transaction: the limit ends with it, and holds for the second
            # one, since PostgreSQL counts the time of each statement by itself. Only a ClientCursor can send two.
            cursor = psycopg.ClientCursor(connection)
            cursor.execute(f"select set_config('statement_timeout', '{self.read_ms}', true); {text}", values)
            cursor.nextset()
            return cursor.fetchall()

    def count(self, function: str, *arguments: Any) -> int:
        """Call a function that answers how much it did."""
        return int(self.call(function, *arguments)[0] or 0)

    def migrate(self, allowed: bool = True, by_hand: bool = False) -> bool:
        """Bring an older schema to this build's version. One of this version that another build applied is left alone,
        unless somebody asks for it by hand: two builds side by side must not replace each other's functions in turns.

        :returns: whether anything was applied.
        :raises SchemaBehind: it is older, and `allowed` is false.
        :raises SchemaAhead: it is newer, and was asked for by hand; a server works on a newer one as it is.
        """
        script = (HERE / "schema.sql").read_text()
        digest = hashlib.sha256(script.encode()).hexdigest()

        def is_to_be_applied(connection: psycopg.Connection[Any]) -> bool:
            # to_regclass, since to select from a table that is not there would be an error.
            known = connection.execute("select to_regclass('tidebase.meta')").fetchone()
            row = known and known[0] and connection.execute("select version, digest from tidebase.meta").fetchone()
            if not row or row[0] < SCHEMA_VERSION:
                return True
            if by_hand and row[0] > SCHEMA_VERSION:
                raise SchemaAhead(row[0])
            if by_hand:
                return bool(row[1] != digest)
            if row[0] > SCHEMA_VERSION:
                logger.warning("the database's schema has version %d, newer than this server's %d: it is left alone",
                               row[0], SCHEMA_VERSION, extra={"event": "schema_newer"})
            elif row[1] not in (None, digest):  # None: psql applied it
                logger.warning("the database's schema has version %d, as this server's, but is of another build: it is "
                               "left alone; `python tidebase.py migrate` applies this one", SCHEMA_VERSION,
                               extra={"event": "schema_differs"})
            return False

        with psycopg.connect(self.conninfo, autocommit=True, connect_timeout=CONNECT_SECONDS) as connection:
            if not is_to_be_applied(connection):
                return False
            if not allowed:
                raise SchemaBehind
            with connection.transaction():
                connection.execute("select pg_advisory_xact_lock(hashtextextended('tidebase.schema', 0))")
                if not is_to_be_applied(connection):  # another server was faster
                    return False
                connection.execute(script.encode())
                connection.execute("update tidebase.meta set digest = %s", (digest,))
        return True


# ------------------------------------------------------------------------------
# Waiting: one watcher asks Postgres for all who wait; each of them holds a thread, so their number is bounded.
# ------------------------------------------------------------------------------
WATCH_SECONDS = 0.05   # how late a write of another process may be noticed
WATCH_GAP_SECONDS = 0.005  # the least time between two questions, however many writes this process makes
LOOK_SECONDS = 1.0     # how late it is noticed that a client hung up while there is nothing for it


class Waiter:
    """Somebody who waits: for runs of some queues (`workflows`: of these alone), or for an event of a run after number
    `seq`."""

    def __init__(self, queues: Iterable[str] = (), run_id: str | None = None, seq: int = 0,
                 is_gone: Callable[[], bool] = lambda: False, workflows: Iterable[str] | None = None) -> None:
        only = None if workflows is None else tuple(workflows)
        self.claims = [(queue, only) for queue in queues]
        self.run_id = run_id
        self.seq = seq
        self.is_gone = is_gone
        self.woken = threading.Event()


class Busy(Exception):
    """All places for long waits are taken."""


class Watcher:
    """While somebody here waits, asks Postgres every 50 ms what changed for all of them, and at once after a write of
    this process (`notify`). Idle, it asks nothing."""

    def __init__(self, database: Database, places: int) -> None:
        self.database = database
        self.places = places
        self.make_room: Callable[[int], None] = lambda waiting: None  # see to threads beside so many that wait
        self.waiters: list[Waiter] = []
        self.lock = threading.Lock()
        self.notified = threading.Event()
        self.look_at = 0.0  # the time to see again who is gone
        self.stopping = False

    def notify(self) -> None:
        """Something was written here."""
        if self.waiters:
            self.notified.set()

    def stop(self) -> None:
        """Wake all; they answer what they have."""
        self.stopping = True
        with self.lock:
            for waiter in self.waiters:
                waiter.woken.set()
        self.notified.set()

    def hold(self, waiter: Waiter, ask: Callable[[], T | None], seconds: float) -> T | None:
        """The first answer of `ask` that is not None; it is asked now, and whenever there is news for `waiter`.

        :param seconds: how long to wait at most; then None.
        :raises Busy: there is no answer yet and no place to wait in.
        """
        answer = ask()
        if answer is not None or seconds <= 0 or self.stopping:
            return answer
        deadline = time.monotonic() + seconds
        with self.waiting(waiter):
            while not self.stopping and waiter.woken.wait(max(0.0, deadline - time.monotonic())):
                waiter.woken.clear()
                if waiter.is_gone():  # what is taken for a client that hung up would be lost until its lease ends
                    return None
                answer = ask()
                if answer is not None:
                    return answer
        return None

    @contextmanager
    def waiting(self, waiter: Waiter) -> Iterator[None]:
        """Set waiter.woken whenever there is news for it, while this lasts.  :raises Busy: no place is free."""
        with self.lock:
            if len(self.waiters) >= self.places:
                raise Busy
            try:
                self.make_room(len(self.waiters) + 1)
            except RuntimeError:  # the machine gives no more threads: those that there are must not all wait
                self.places = len(self.waiters)
                logger.warning("no thread to be had: %d may wait at once", self.places, extra={"event": "no_thread"})
                raise Busy from None
            self.waiters.append(waiter)
        self.notified.set()
        try:
            yield
        finally:
            with self.lock:
                self.waiters.remove(waiter)
                if not self.waiters:
                    self.notified.set()  # for a last tick, which lets threads go

    def tick(self) -> int:
        """Ask once, and wake those there is news for: as many per queue as runs could start.  :returns: 0, to sleep."""
        with self.lock:
            waiters = list(self.waiters)
            self.make_room(len(waiters))  # threads that waited are not needed any more
        if waiters:
            claims = list(dict.fromkeys(claim for waiter in waiters for claim in waiter.claims))
            runs = sorted({waiter.run_id for waiter in waiters if waiter.run_id is not None})
            news = json.loads(self.database.call(
                "watch", [queue for queue, _ in claims], json.dumps([workflows for _, workflows in claims]),
                len(waiters), runs)[0] or "{}")
            ready = dict(zip(claims, news["claims"], strict=True))
            looks = time.monotonic() >= self.look_at
            if looks:
                self.look_at = time.monotonic() + LOOK_SECONDS
            for waiter in waiters:
                claim = next((claim for claim in waiter.claims if ready[claim] > 0), None)
                # A run that is not there any more is news, too.
                is_told = claim is not None or (waiter.run_id and news["runs"].get(waiter.run_id, 2**31) > waiter.seq)
                is_gone = (looks or is_told) and waiter.is_gone()
                if is_told or is_gone:
                    waiter.woken.set()
                if claim is not None and not is_gone:
                    ready[claim] -= 1
        return 0


def keep_ticking(job: str, tick: Callable[[], int], sleep: Callable[[], None], stop: threading.Event,
                 failed: Callable[[Exception], None]) -> None:
    """Repeat tick until `stop` is set, sleeping only when it found no work or failed."""
    while not stop.is_set():
        try:
            done = tick()
        except Exception as error:
            if not isinstance(error, SchemaBehind) and not (isinstance(error, psycopg.Error) and cannot_write(error)):
                logger.exception("tick failed", extra={"event": "tick_failed", "job": job})
            failed(error)
            done = 0
        if not done:
            sleep()


# ------------------------------------------------------------------------------
# Webhook sender: claims due webhooks from the outbox, signs and sends them, and records what became of each.
# ------------------------------------------------------------------------------
SEND_SECONDS = 10        # for a whole exchange, from the resolver to the last byte of the answer
SEND_SLOTS = 8           # webhooks in flight at once that are not slow
SEND_SLOW_SECONDS = 0.2  # in flight for longer, a webhook gives its slot to another: its thread only waits
SEND_THREADS = 128       # webhooks in flight at once, the slow ones among them
SEND_PER_HOST = 2        # of these to one host and port, so that one that hangs leaves the slots to the others
SEND_HOLD_MS = 6000      # a claim lasts so long, and is renewed while its sender lives: then another one claims it
SEND_RENEW_SECONDS = 2.0
SEND_SLEEP_SECONDS = 1.0  # between looks for what became due, or was written by another process
SEND_GAP_SECONDS = 0.02
DEADLINE_SECONDS = 0.1   # how late a deadline may be kept
SEND_DRAIN_SECONDS = 3.0  # for what is in flight when the server is told to stop


def sign(body: bytes, secret: str, delivery_id: str, timestamp: int) -> dict[str, str]:
    """The signature headers: ours, HMAC-SHA256 over the body, and those of the Standard Webhooks specification, over
    id, timestamp and body; a secret that begins with whsec_ is base64 there, as that specification has it."""
    key = secret.encode()
    standard_key = key
    if secret.startswith("whsec_"):
        with suppress(ValueError):
            standard_key = base64.b64decode(secret.removeprefix("whsec_"), validate=True) or key
    signed = b"%s.%d.%s" % (delivery_id.encode(), timestamp, body)
    standard = base64.b64encode(hmac.digest(standard_key, signed, "sha256")).decode()
    return {"x-tidebase-signature": "sha256=" + hmac.digest(key, body, "sha256").hex(),
            "webhook-signature": f"v1,{standard}"}


class Outcome(NamedTuple):
    """What became of one try to deliver a webhook, as settle_webhook takes it."""

    delivered: bool
    retryable: bool
    http_status: int | None = None
    response: str | None = None
    error: str | None = None


class InFlight(NamedTuple):
    webhook: dict[str, Any]  # as claimed
    exchange: Exchange


class Sender:
    """Sends what is due, each webhook in a thread of its own; those of a channel one after the other, since only the
    first is ever due. What is in flight stands in `in_flight` and nowhere else, so no failure can lose a slot."""

    def __init__(self, database: Database, secret: str, targets: WebhookTargets) -> None:
        self.database = database
        self.secret = secret
        self.targets = targets
        self.in_flight: dict[str, InFlight] = {}
        self.changed = threading.Condition()  # guards it; notified when it shrinks
        self.notified = threading.Event()     # there may be something to send
        self.started = threading.Event()      # there is a deadline to keep
        self.renew_at = 0.0
        self.after = ""                       # hosts take turns: the next claim begins after this one
        self.stop_by: float | None = None     # the end of what is in flight, once the server stops

    def notify(self) -> None:
        """There may be something to send."""
        self.notified.set()

    def tick(self) -> int:
        """Renew what is in flight, then claim what is due and start to send it.  :returns: how many were started."""
        self.notified.clear()
        flying = list(self.in_flight.values())
        self._renew(flying)
        now = time.monotonic()
        quick = sum(one.exchange.is_over or now - one.exchange.started < SEND_SLOW_SECONDS for one in flying)
        room = min(SEND_SLOTS - quick, SEND_THREADS - len(flying))
        if room <= 0 or self.stop_by is not None:
            return 0
        per_host = SEND_PER_HOST if len(flying) < SEND_THREADS // 2 else 1  # the last threads are for other hosts
        claim = json.loads(str(self.database.call("claim_webhooks", room, SEND_HOLD_MS, per_host,
                                                  [one.webhook["id"] for one in flying], self.after)[0]))
        self.after = claim["after"]
        for webhook in claim["webhooks"]:
            self._start(webhook)
        return len(claim["webhooks"])

    def idle_seconds(self) -> float:
        """How long the sender may sleep: less while a slow webhook may give up its slot."""
        return SEND_SLOW_SECONDS if self.in_flight else SEND_SLEEP_SECONDS

    def keep_deadlines(self) -> int:
        """End what is in flight for too long.  Needs a thread that waits for nothing else.  :returns: 0, to sleep."""
        now = time.monotonic()
        for _, exchange in list(self.in_flight.values()):
            if now >= min(exchange.deadline, self.stop_by or exchange.deadline):
                exchange.cut()
        return 0

    def stop(self) -> None:
        """Claim no more, and give what is in flight SEND_DRAIN_SECONDS."""
        self.stop_by = time.monotonic() + SEND_DRAIN_SECONDS
        self.started.set()

    def drain(self) -> None:
        """Wait until nothing is in flight; what could not be recorded by then is sent again by another server."""
        end = (self.stop_by or 0.0) + CONNECT_SECONDS
        with self.changed:
            self.changed.wait_for(lambda: not self.in_flight, max(0.0, end - time.monotonic()))

    def _renew(self, flying: list[InFlight]) -> None:
        now = time.monotonic()
        if flying and now >= self.renew_at:
            self.database.call("renew_webhooks", [one.webhook["id"] for one in flying],
                               [one.webhook["attempt"] for one in flying], SEND_HOLD_MS)
            self.renew_at = now + SEND_RENEW_SECONDS

    def _start(self, webhook: dict[str, Any]) -> None:
        one = InFlight(webhook, Exchange(self.targets, SEND_SECONDS))
        with self.changed:
            self.in_flight[webhook["id"]] = one
        try:
            threading.Thread(target=self._deliver, args=one, name="tidebase-sender-webhook", daemon=True).start()
        except Exception as error:  # the machine gives no more threads
            logger.warning("a webhook waits for a thread: %s", error,
                           extra={"event": "no_thread", "delivery_id": webhook["id"]})
            self._finish(webhook, None)
        self.started.set()

    def _deliver(self, webhook: dict[str, Any], exchange: Exchange) -> None:
        outcome: Outcome | None = None
        try:
            outcome = self._send(webhook, exchange)
        except Exception as error:  # a defect here must not make it due for ever: it counts as a failed try
            logger.exception("a webhook could not be sent",
                             extra={"event": "send_failed", "delivery_id": webhook["id"]})
            outcome = Outcome(False, True, error=type(error).__name__)
        finally:
            self._finish(webhook, outcome)

    def _finish(self, webhook: dict[str, Any], outcome: Outcome | None) -> None:
        """Record the outcome of a try; None gives the webhook back, as if it had not been claimed."""
        try:
            if outcome:
                self.database.call("settle_webhook", webhook["id"], webhook["attempt"], *outcome)
            else:
                self.database.call("release_webhook", webhook["id"], webhook["attempt"], int(SEND_SLEEP_SECONDS * 1000))
        except psycopg.Error as error:  # claimed by another when the hold is over, under the same id
            logger.warning("a webhook's outcome could not be recorded: %s", type(error).__name__,
                           extra={"event": "settle_failed", "delivery_id": webhook["id"]})
        finally:
            with self.changed:
                self.in_flight.pop(webhook["id"], None)
                self.changed.notify_all()
            self.notify()

    def _send(self, webhook: dict[str, Any], exchange: Exchange) -> Outcome | None:
        """Post it.  :returns: None when the server stops: the try was cut short and does not count."""
        body = webhook["body"].encode()
        now = int(time.time())
        headers = {"content-type": "application/json", "user-agent": f"tidebase/{__version__}",
                   "webhook-id": webhook["id"], "webhook-timestamp": str(now)}
        secret = webhook["secret"] or (self.secret if webhook["kind"] != "channel" else "")
        if secret:
            headers |= sign(body, secret, webhook["id"], now)
        try:
            status, text = exchange.post(webhook["url"], body, headers)
        except TargetRefused as refusal:
            return Outcome(False, False, error=str(refusal))
        except Cut:
            return None if self.stop_by else Outcome(False, True, error=f"no complete answer within {SEND_SECONDS} s")
        except ValueError as error:  # an address that nobody can have
            return Outcome(False, False, error=type(error).__name__)
        except requests.RequestException as error:
            return Outcome(False, True, error=type(error).__name__)
        delivered = 200 <= status < 300
        return Outcome(delivered, status in (408, 429) or status >= 500, status, text,
                       None if delivered else f"HTTP {status}")


# ------------------------------------------------------------------------------
# Reconciler: what time alone brings about. A tick does a bounded amount of work and may run anywhere at once.
# ------------------------------------------------------------------------------
SWEEP_LIMIT = 100
REVIVE_SECONDS = 10.0  # an embedded PostgreSQL that is away longer than a restart takes is started again


def next_fire(cron: str, timezone: str, after: datetime) -> datetime | None:
    """When a cron expression next fires, in its time zone; None for a date that never comes, as 30 February.

    :raises ValueError: the expression is none of five fields, or the zone is unknown; the message says which.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{timezone[:100]!r} is not a time zone") from None
    try:
        if len(cron.split()) != 5:
            raise CronSimError
        # In the hour that autumn repeats, cronsim counts from the first of the two: its answer may be past.
        return next((at for at in CronSim(cron, after.astimezone(zone)) if at > after), None)
    except CronSimError:
        raise ValueError(f"{cron[:100]!r} is not a cron expression of five fields") from None


class Reconciler:
    """One tick every TIDEBASE_RECONCILE_MS. Its sweeps are apart: one that fails keeps no other from running."""

    def __init__(self, database: Database, lease_ms: int, retention_days: int,
                 revive: Callable[[], None] | None) -> None:
        self.database = database
        self.lease_seconds = lease_ms / 1000
        self.retention_days = retention_days
        self.revive = revive
        self.away_since: float | None = None
        self.patient_until = time.monotonic() + self.lease_seconds
        self.failing: dict[str, str] = {}  # what fails now, by name, and its error: logged once

    def tick(self) -> int:
        """Sweep once.  :returns: how much was done.

        While the server, or the database, was away, workers could not renew their leases: for one lease after that,
        expired ones are left alone.

        :raises psycopg.Error: the database is away; all other failures are logged, each with the name of its sweep.
        """
        done = sum(self._attempt(sweep, self.database.count, sweep, SWEEP_LIMIT) for sweep in (
            "expire_gates", "wake_due", "offer_runs", "fold_tallies"))
        if self.away_since is None and time.monotonic() >= self.patient_until:
            done += self._attempt("expire_leases", self._expire_leases)
        done += self._attempt("cancel_overdue", self._cancel_overdue)
        done += self._attempt("due_schedules", self._fire_schedules)
        if self.retention_days:
            done += self._attempt("purge_runs", self.database.count, "purge_runs", self.retention_days, SWEEP_LIMIT)
        if self.away_since is not None:
            logger.warning("the database is back", extra={"event": "database_back"})
            self.away_since = None
            self.patient_until = time.monotonic() + self.lease_seconds  # from now on workers can renew their leases
        return done

    def _attempt(self, name: str, sweep: Callable[..., int], *arguments: Any) -> int:
        """Do one part of a tick; when it fails, log that and go on.  :raises psycopg.Error: the database is away."""
        try:
            done = sweep(*arguments)
        except Exception as error:
            if isinstance(error, psycopg.Error) and cannot_write(error):
                raise
            if self.failing.get(name) != str(error):
                self.failing[name] = str(error)
                logger.error("%s failed, and is tried again at every tick", name, exc_info=error,
                             extra={"event": "sweep_failed", "job": name})
            return 0
        self.failing.pop(name, None)
        return done

    def _expire_leases(self) -> int:
        expired, runs = self.database.rows("expire_leases", SWEEP_LIMIT)[0]
        for run in json.loads(runs):
            self._log_expired(run)
        return int(expired)

    @staticmethod
    def _log_expired(run: dict[str, Any]) -> None:
        outcome = ("it is stalled until somebody begins it" if run["queue"] is None
                   else "it is queued again" if run["attempt"] < run["maxAttempts"] else "it failed")
        logger.warning("the lease of run %s (%s) expired in attempt %d of %d, held by %s; %s", run["runId"],
                       place_of(run), run["attempt"], run["maxAttempts"], one_line(run["leaseOwner"]), outcome,
                       extra={"event": "lease_expired", "run_id": run["runId"]})

    def _cancel_overdue(self) -> int:
        # One run a transaction: a cancellation locks the run's children too, and two that did many could meet.
        return sum(itertools.takewhile(bool, (self.database.count("cancel_overdue", 1) for _ in range(SWEEP_LIMIT))))

    def _fire_schedules(self) -> int:
        due = json.loads(self.database.call("due_schedules")[0] or "{}")
        return sum(self._attempt(f"schedule {schedule['name']!r}", self._fire, schedule, due["now"])
                   for schedule in due["schedules"])

    def _fire(self, schedule: dict[str, Any], now: str) -> int:
        # From now on, not from the time it was due at: after downtime it fires once.
        coming = next_fire(schedule["cron"], schedule["timezone"], datetime.fromisoformat(now))
        return self.database.count("fire_schedule", schedule["name"], schedule["nextRunAt"], coming)

    def failed(self, error: Exception) -> None:
        """The database is away: leases get their grace, and the outage is logged once."""
        self.patient_until = time.monotonic() + self.lease_seconds
        if self.away_since is None:
            self.away_since = time.monotonic()
            logger.warning("the database is away (%s); requests get 503 until it is back", str(error).split("\n")[0],
                           extra={"event": "database_away"})
        elif self.revive and time.monotonic() - self.away_since > REVIVE_SECONDS:
            try:
                self.revive()
            except Exception:
                logger.exception("the embedded PostgreSQL cannot be started", extra={"event": "revive_failed"})


# ------------------------------------------------------------------------------
# Request plumbing: what a route may take for granted: a raw path, the key checked, a body within its limit.
# ------------------------------------------------------------------------------
class Admission(Gatekeeper):
    """What is decided about a request as soon as its head is there: no body is taken from who may not send one."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def admit(self, head: Head) -> Refused | None:
        """Requests without a body, and those whose key is right, go on to Flask, which checks them once more."""
        if head.body_bytes == 0:
            return None
        path, access = path_of(head.target), self.server.access
        environ = {f"HTTP_{name}": value for name, value in head.headers.items()} | {
            "REQUEST_METHOD": head.method, "REQUEST_URI": head.target, "PATH_INFO": path,
            "CONTENT_TYPE": head.headers.get("CONTENT_TYPE", ""), "CONTENT_LENGTH": str(head.body_bytes or 1)}
        if denial := access.denial(environ):
            return self._answer(refused(Refusal(*denial)))
        key = access.key_in(environ.get("HTTP_AUTHORIZATION", ""))
        if not access.api_key or access.is_key(key) or access.is_read_key(key):
            return None
        if not takes_no_key(head.method, path):
            return self._answer(refused(no_key(key)))
        if head.body_bytes is None or head.body_bytes > KEYLESS_BYTES:
            return self.refuse(413, "")
        return None

    def refuse(self, status: int, words: str) -> Refused:
        code = {413: "body_too_large", 431: "headers_too_large", 501: "not_implemented"}.get(status, "internal_error")
        return self._answer(refused(invalid("", words) if status == 400 else Refusal(
            status, code, http.HTTPStatus(status).phrase.lower())))

    def _answer(self, reply: Reply) -> Refused:
        text, status, headers = reply
        headers = {**SAFE_HEADERS, **headers, **self.server.cors_headers}
        return Refused(status, http.HTTPStatus(status).phrase, list(headers.items()), text.encode())


def takes_no_key(method: str, path: str) -> bool:
    """Whether a route is its own credential, or holds no secret."""
    try:
        return app.url_map.bind("").match(path, method)[0] in WITHOUT_KEY
    except HTTPException:
        return False


def path_of(target: str) -> str:
    """The path of a request's target, as it was sent."""
    if not target.startswith("/"):
        target = urllib.parse.urlsplit(target).path
    return target.split("?")[0]


def part_of(value: str) -> str:
    """A path part as the client meant it: percent-decoded after the path was split, so that team%2Fa is one part."""
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
        return part_of(value)


def core() -> Server:
    """The server that this request came to."""
    return cast(Server, flask.request.environ["tidebase.server"])


def received() -> bytes:
    """The request's body, which is within TIDEBASE_MAX_BODY."""
    return cast(bytes, flask.request.environ["wsgi.input"].read())


def parse(kind: type[Body]) -> dict[str, Any]:
    """The request's body, checked.  :raises Refusal: 400 with the fields named."""
    return check(kind, read_body(received(), schema_of(kind)))


def check(kind: type[Body], members: dict[str, Any]) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], schema_of(kind).load(members))
    except marshmallow.ValidationError as error:
        raise Refusal(400, "invalid_request", "invalid request body", issues=list(issues(error.messages))) from None


def issues(messages: Any, path: str = "") -> Iterator[dict[str, str]]:
    """marshmallow's tree of messages as a list of {path, message}."""
    if isinstance(messages, dict):
        for key, below in messages.items():
            yield from issues(below, path if key == "_schema" else f"{path}.{key}" if path else str(key))
    else:
        for message in messages:
            yield {"path": path, "message": str(message).rstrip(".")}


def call(function: str, *arguments: Any) -> Reply:
    """Call one function of schema.sql, pass its answer on, and tell those who may wait for what it wrote."""
    text, status = core().database.call(function, *arguments)
    core().wrote()
    return reply(text or "null", status)


class Write(NamedTuple):
    """One write as write_each takes it: its fields, as JSON, and its payloads."""

    fields: str
    input: str | None
    output: str | None
    error: str | None


# The fields of a write, but for its payloads.
WRITE_FIELDS = frozenset({
    "id", "run_id", "step_id", "lease_owner", "name", "input_hash", "options", "retryable", "resume_decision",
    "started_at", "duration_ms", "brief", "queue", "workflow_name", "metadata", "recovery_webhook", "recovery_secret",
    "channels", "dedupe_key", "delay_ms", "run_at", "max_attempts", "priority", "deadline_ms", "edge_type",
    "edge_metadata"})


def encode_fields(body: dict[str, Any], **extras: Any) -> str:
    """The JSON of a checked body's fields, but for its payloads."""
    fields = {member: value.isoformat() if isinstance(value, datetime) else value
              for member, value in body.items() if member in WRITE_FIELDS and value is not None}
    return compose(fields | extras)


def write_of(verb: str, body: dict[str, Any], **parts: str) -> Write:
    """The write that a checked body, and parts of the path, ask for."""
    body |= parts
    extras: dict[str, Any] = {"do": verb}
    if verb == "begin_step":
        extras |= {"lease_ms": core().config.lease_ms, "lease_owner": body["lease_owner"] or new_owner()}
    return Write(encode_fields(body, **extras), body.get("input"),
                 body.get("result" if verb == "complete_run" else "output"), body.get("error"))


def write(verb: str, body: dict[str, Any], **parts: str) -> Reply:
    """Make one write, in a transaction of its own."""
    [row] = core().database.rows("_write_one", *write_of(verb, body, **parts))
    core().wrote()
    return reply(*row)


def write_all(writes: list[Write]) -> Reply:
    """Make many writes, in one transaction unless many are refused; each is answered as if it had come alone."""
    answers: dict[int, tuple[str, int]] = {}
    while rest := [n for n in range(len(writes)) if n not in answers]:  # where many are refused, some are not reached
        some = [writes[n] for n in rest]
        rows = core().database.rows(
            "write_each", "[" + ", ".join(write.fields for write in some) + "]",
            JsonArray(write.input for write in some), JsonArray(write.output for write in some),
            JsonArray(write.error for write in some), MAX_ANSWERS - sum(len(body) for body, _ in answers.values()))
        answers |= {n: (body, status) for n, (body, status) in zip(rest, rows, strict=True) if body is not None}
    core().wrote()
    return results(map(answers.__getitem__, range(len(writes))))


def results(rows: Iterable[Any]) -> Reply:
    """The answer to many requests in one: rows of a body and a status."""
    return reply('{"results": [' + ", ".join(
        body if status == 200 else f'{body[:-1]}, "status": {status}}}' for body, status in rows) + "]}")


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
    said = [error.get("name"), error.get("message")] if isinstance(error, dict) else [error]
    words = one_line(": ".join(text for text in said if text and isinstance(text, str)))
    logger.warning("run %s (%s) failed in attempt %d of %d%s; %s", run_id, place_of(run), run["attempt"],
                   run["maxAttempts"], words and f": {words}",
                   f"it is queued again for {run['runAt']}" if answer["requeued"] else "it is not queued again",
                   extra={"event": "run_requeued" if answer["requeued"] else "run_failed", "run_id": run_id})


def found(text: str | None, run_id: str) -> Reply:
    if text is None:
        raise Refusal(404, "not_found", f"run {run_id} does not exist")
    return reply(text)


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


def whole_of(name: str, text: str, high: int, low: int = 0) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or not low <= int(text) <= high:
        raise invalid(name, f"must be a whole number from {low} to {high}")
    return int(text)


def held(run_id: str, wait_ms: str, is_over: LiteralString, function: LiteralString,
         *arguments: str | int) -> Reply:
    """What a function of schema.sql answers, held back for `wait_ms`, as the query string has it, until it is over.

    :param is_over: the condition for that, in SQL, of its `body`.
    :param function: answers `body` and `seq`, the run's event number; it is asked again when events follow.
    """
    waiter, latest = Waiter(run_id=run_id), ""

    def ask() -> str | None:
        nonlocal latest
        [(latest, waiter.seq, over)] = core().database.select(
            f"select body, seq, {is_over} from tidebase.{function}({marks})", arguments)  # noqa: S608
        return latest if over or not seconds else None

    seconds, marks = whole_of("waitMs", wait_ms, MAX_WAIT_MS) / 1000, ", ".join(["%s"] * len(arguments))
    try:
        core().watcher.hold(waiter, ask, seconds)
    except Busy:
        return busy(reply(latest))
    return reply(latest)


def new_owner() -> str:
    return f"owner_{secrets.token_hex(16)}"


# The first three hold no secret; a gate's token is the credential that resolves it.
WITHOUT_KEY = {"routes.health", "routes.openapi_json", "routes.docs", "routes.resolve_gate", "studio.look_at_gate",
               "studio.front", "studio.page"}
PAGE_VIEWS = {"studio.front", "studio.page"}  # for people, and no part of the interface that /openapi.json describes
# Their bodies are questions: they write nothing.
READS = {"studio.list_changes", "studio.preview_schedule"}


# For people, who may follow a link to them from anywhere.
PAGES = frozenset({"/docs", "/", "/studio"})


PREPARE_SECONDS = 1  # what a process that has only just started is given to look at the schema before it refuses


def check_sender() -> None:
    """:raises Refusal: 403 for a web page's request that is not this server's own, 415 for a body that is not JSON."""
    if denial := core().access.denial(flask.request.environ):
        raise Refusal(*denial)


def check_key(given: str | None = None) -> bool:
    """Whether `given` or, without it, the Authorization header is the key that may write, and not the one that only
    reads.  :raises Refusal: 401, when it is neither."""
    access = core().access
    if not access.api_key:
        return True
    key = access.key_in(flask.request.environ.get("HTTP_AUTHORIZATION", "")) if given is None else given.encode()
    if access.is_key(key):
        return True
    if not access.is_read_key(key):
        raise no_key(key)
    return False


def no_key(sent: bytes) -> Refusal:
    return Refusal(401, "unauthorized", "the API key that was sent is not this server's" if sent else
                   "send the API key: Authorization: Bearer KEY")


def run_token_expiry(given: str | None) -> int | None:
    """When the run token expires that a request for a run's events brings as `given` or, without it, as the
    Authorization header; None when it brings none.  :raises Refusal: 401, when the token has expired."""
    access, request = core().access, flask.request
    sent = access.key_in(request.headers.get("Authorization", "")) if given is None else given.encode()
    expires_at = access.run_token_expiry(sent, (request.view_args or {})["run_id"])
    if expires_at is not None and expires_at <= access.clock():
        raise Refusal(401, "unauthorized", "this run token has expired: get another one")
    return expires_at


def read_only() -> Refusal:
    return Refusal(403, "read_only", "this key may only read")


def check_prepared() -> None:
    """:raises psycopg.OperationalError: the database has not been prepared yet."""
    if not core().prepared.wait(PREPARE_SECONDS):
        raise psycopg.OperationalError("the schema has not been looked at yet")


def authorize() -> flask.Response | None:
    """Before every request: preflights are answered, sender, key and database checked."""
    check_sender()
    request, flask.g.may_write, flask.g.expires_at = flask.request, True, math.inf
    if request.method == "OPTIONS" and core().config.cors_origin:
        return flask.Response(status=204)
    if request.path in ("/health", "/openapi.json", "/docs") or request.endpoint in PAGE_VIEWS:
        return None
    if request.endpoint not in WITHOUT_KEY:
        is_stream = request.endpoint == "routes.stream_events"
        given = request.args.get("token") if is_stream else None  # browsers' streams send no headers
        expires_at = run_token_expiry(given) if is_stream else None
        if expires_at is not None:
            flask.g.may_write, flask.g.expires_at = False, expires_at
        else:
            flask.g.may_write = check_key(given)
        if not flask.g.may_write and request.method not in ("GET", "HEAD") and request.endpoint not in READS:
            raise read_only()
    check_prepared()
    return None


def add_headers(response: flask.Response) -> flask.Response:
    """After every request: what all answers carry, and what TIDEBASE_CORS_ORIGIN allows."""
    for name, value in SAFE_HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.update(core().cors_headers)
    return response


# ------------------------------------------------------------------------------
# Routes: each checks, calls one function, answers; its docstring lists its statuses, but for 400, 401, 403, 413, 415
# and 503.
# ------------------------------------------------------------------------------
routes = flask.Blueprint("routes", __name__)
ENDED = ("completed", "failed", "cancelled")


@routes.get("/health")
def health() -> Reply:
    """Whether this server can do its work.  200 {ok, database, version:string}, 503 {ok, database,
    version:string}."""
    try:
        if not core().prepared.is_set():
            raise psycopg.OperationalError
        with core().database.connection() as connection:
            connection.execute("select 1")
    except psycopg.OperationalError:
        return reply(json.dumps({"ok": False, "database": "away", "version": __version__}), 503)
    return reply(json.dumps({"ok": True, "database": "ok", "version": __version__}))


@functools.cache
def described() -> dict[str, Any]:
    return openapi.document(app, __version__, WITHOUT_KEY, PAGE_VIEWS, LIMITS)


@routes.get("/openapi.json")
def openapi_json() -> Reply:
    """These routes as OpenAPI 3.1; it holds no secret, so that tools may read it without the key.  200 object."""
    return reply(json.dumps(described()))


@routes.get("/docs")
def docs() -> Reply:
    """The same as a page for people.  200 page."""
    return openapi.page(described()), 200, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


# --- runs


def channels_of(body: dict[str, Any]) -> str:
    return json.dumps(body["channels"])


@routes.post("/runs/<part:workflow_name>")
def create_run(workflow_name: str) -> Reply:
    """Create a run without a queue, or get the one with this id.  200 {run, created}, 409 run_id_conflict."""
    if not workflow_name:
        raise invalid("workflowName", "must not be empty")
    body = parse(CreateRunBody)
    return call("create_run", body["id"], workflow_name, body["input"], body["metadata"], body["recovery_webhook"],
                channels_of(body), body["deadline_ms"], body["recovery_secret"])


STATUSES = ("pending", "queued", "running", "waiting", "completed", "failed", "cancelled")
NOT_ONLY_TEXT = re.compile(r"-?(0|[1-9][0-9]{,99})(\.[0-9]{1,99})?|true|false|null")


@routes.get("/runs")
def list_runs() -> Reply:
    """Runs, newest first, or as sort says; a search looks at so many runs at a time, and its cursor goes on. Payloads
    of more than 64 KiB, and all that come after 16 MiB, are null: then payloadOmitted is true, and the detail has them.
    ?status (several by comma) ?workflow ?queue ?failureClass ?metadata.KEY (at most 16 of these) ?since:time
    ?until:time ?text (an id, or what an error holds) ?errors:true|false (true: failed, or queued again after it)
    ?parent
    ?sort:newest|oldest|ended=newest ?view:light|full=full (light: without payloads) ?limit:1..1000=100
    ?before (a nextCursor)  200 {runs:[listedRun] or [lightRun], nextCursor?}."""
    asked = query(*studio.LIST_PARAMETERS, *studio.FILTERS, prefix="metadata.")
    runs, _, cursor = studio.list_runs(asked)
    return reply(f'{{"runs": {runs}, "nextCursor": {json.dumps(cursor)}}}')


DETAILS = ("run", "steps", "state", "stateStreams", "stateVersions", "runEdges", "childRuns", "recoveryAttempts",
           "channels", "channelDeliveries", "gates", "usage", "events")


@routes.get("/runs/<part:run_id>")
def get_run(run_id: str) -> Reply:
    """All that is known of a run, or parts of it; with waitMs the run alone, as soon as it ended. The run and its state
    come whole, the lists share 16 MiB, and children come without payloads of more than 64 KiB (payloadOmitted). Where
    there is more, truncated names the list and the after or before to read on with, null from the beginning: events at
    GET /runs/:id/events, steps at /runs/:id/steps, stateVersions at /runs/:id/state/versions, channelDeliveries and
    recoveryAttempts at /runs/:id/deliveries; childRuns are at /runs with the parameter parent, gates at
    /runs/:id/gates/:gateId, usage at /runs/:id/usage, and a payload alone at /runs/:id/payload.
    ?include (run,state,gates and so on) ?waitMs:0..25000=0  200 runDetail, 404."""
    asked = query("include", "waitMs")
    if "waitMs" in asked:
        return held(run_id, asked["waitMs"], f"body->'run'->>'status' in {ENDED}", "get_run", run_id)
    include = asked["include"].split(",") if asked.get("include") else None
    for part in include or ():
        choice_of("include", part, DETAILS, "")
    return found(core().database.read("run_detail", run_id, include, core().traces.queues(), flask.g.may_write)[0],
                 run_id)


@routes.post("/runs/<part:run_id>/begin")
def begin_run(run_id: str) -> Reply:
    """Take the lease.  @x-tidebase-worker (the owner; else a new one)  200 {run, leaseOwner?, ~checkpoints,
    ~checkpointsTruncated}, 404, 409 run_leased, run_cancelled, dedupe_conflict."""
    owner = flask.request.headers.get("x-tidebase-worker") or new_owner()
    if len(owner) > MAX_NAME:
        raise invalid("x-tidebase-worker", f"must be at most {MAX_NAME} characters")
    return call("begin_run", run_id, owner, core().config.lease_ms, parse(BeginRunBody)["checkpoints"])


@routes.post("/runs/<part:run_id>/heartbeat")
def heartbeat(run_id: str) -> Reply:
    """Extend the lease.  200 {run}, 404, 409 lease_lost, run_cancelled."""
    [row] = core().database.rows("heartbeat_runs", [run_id], [parse(HeartbeatBody)["lease_owner"]], False)
    return reply(*row)


@routes.post("/heartbeats")
def heartbeats() -> Reply:
    """Extend many leases.  200 {results: [{run:heldRun} or heldRefusal]}."""
    beats = parse(HeartbeatsBody)["runs"]
    return results(core().database.rows("heartbeat_runs", [beat["id"] for beat in beats],
                                        [beat["lease_owner"] for beat in beats]))


@routes.post("/runs/<part:run_id>/complete")
def complete_run(run_id: str) -> Reply:
    """End it well.  200 {run} or {run:briefRun}, 404, 409 lease_lost."""
    return write("complete_run", parse(CompleteRunBody), run_id=run_id)


@routes.post("/runs/<part:run_id>/fail")
def fail_run(run_id: str) -> Reply:
    """Report a failed attempt.  200 {run, requeued}, 404, 409 lease_lost."""
    body = parse(FailRunBody)
    answer = call("fail_run", run_id, body["lease_owner"], body["error"], body["failure_class"], body["retryable"])
    log_failure(run_id, answer[0])
    return answer


@routes.post("/runs/<part:run_id>/cancel")
def cancel_run(run_id: str) -> Reply:
    """End it at once.  200 {run}, 404, 409 run_completed."""
    body = parse(CancelBody)
    return call("cancel_run", run_id, body["reason"], body["actor"])


@routes.post("/runs/<part:run_id>/release")
def release_run(run_id: str) -> Reply:
    """Give it back, no attempt spent.  200 {run}, 404, 409 lease_lost, run_cancelled."""
    return call("release_run", run_id, parse(HeartbeatBody)["lease_owner"])


@routes.post("/runs/<part:run_id>/retry")
def retry_run(run_id: str) -> Reply:
    """Put a failed or cancelled run back.  200 {run}, 404, 409 run_completed, dedupe_conflict."""
    parse(Body)
    return call("retry_run", run_id)


@routes.post("/runs/<part:run_id>/recover")
def recover_run(run_id: str) -> Reply:
    """Post its recovery webhook.  200 {recoveryAttempt}, 404, 422 no_recovery_webhook."""
    return call("recover_run", run_id, parse(RecoverBody)["reason"])


@routes.post("/runs/<part:run_id>/fork")
def fork_run(run_id: str) -> Reply:
    """A new run that starts with copies of its checkpoints.  200 {run, created}, 404, 409 run_id_conflict."""
    body = parse(ForkBody)
    return call("fork_run", run_id, body["id"], body["from_step"], body["input"], body["queue"])


@routes.post("/runs/<part:run_id>/children")
def create_child(run_id: str) -> Reply:
    """A run for a part of its work, one per name.  200 {run, edge:runEdge, created}, 404, 409 run_cancelled,
    lease_lost, edge_conflict, run_id_conflict."""
    return write("create_child", parse(ChildBody), run_id=run_id)


# --- steps


@routes.post("/runs/<part:run_id>/steps/begin")
def begin_step(run_id: str) -> Reply:
    """Ask what to do about a step.  200 {action=execute, step, leaseOwner} or {action=return, step, output}
    or {action=locked, step?} or {action=input_mismatch, step, expectedInputHash, actualInputHash}
    or {action=cancelled, run}, 404, 409 manual_review, step_failed, lease_lost."""
    return write("begin_step", parse(BeginStepBody), run_id=run_id)


@routes.post("/runs/<part:run_id>/steps/<part:step_id>/complete")
def complete_step(run_id: str, step_id: str) -> Reply:
    """Record a step's output, once.  200 {step}, 404, 409 lease_lost."""
    return write("complete_step", parse(CompleteStepBody), run_id=run_id, step_id=step_id)


@routes.post("/runs/<part:run_id>/steps/<part:step_id>/fail")
def fail_step(run_id: str, step_id: str) -> Reply:
    """Record a step's failure.  200 {step}, 404, 409 lease_lost."""
    body = parse(FailStepBody)
    return call("fail_step", run_id, step_id, body["lease_owner"], body["error"], body["retryable"],
                body["resume_decision"])


@routes.post("/runs/<part:run_id>/steps/<part:step_id>/review")
def review_step(run_id: str, step_id: str) -> Reply:
    """A person's decision on an ambiguous step; the run goes on.  200 {step}, 404, 409 not_in_review,
    dedupe_conflict."""
    body = parse(ReviewBody)
    return call("review_step", run_id, step_id, body["decision"], body["output"], body["actor"])


@routes.post("/runs/<part:run_id>/steps")
def record_step(run_id: str) -> Reply:
    """Record a step that already ran.  200 {step} or {step:briefStep}, 404, 409 lease_lost, run_cancelled,
    input_mismatch, manual_review, step_failed."""
    return write("record_step", parse(RecordStepBody), run_id=run_id)


@routes.post("/steps")
def record_steps() -> Reply:
    """Record many, of any runs.  200 {results: [{step} or {step:briefStep} or refusal]}."""
    return write_all([write_of("record_step", record) for record in parse(RecordStepsBody)["records"]])


# --- gates


@routes.post("/runs/<part:run_id>/gates/begin")
def begin_gate(run_id: str) -> Reply:
    """Ask a person, once per name.  200 {action:wait|return, gate}, 404, 409 run_cancelled, lease_lost."""
    body = parse(BeginGateBody)
    return call("begin_gate", run_id, body["name"], body["prompt"], body["data"], channels_of(body),
                body["capability"], body["timeout_ms"], core().public_url, body["lease_owner"])


@routes.get("/runs/<part:run_id>/gates/<part:gate_id>")
def get_gate(run_id: str, gate_id: str) -> Reply:
    """A gate, at once or as soon as it is decided.  ?waitMs:0..25000=0 (how long to wait for it)
    200 {gate, runStatus}, 404."""
    return held(run_id, query("waitMs").get("waitMs", "0"),
                f"body->'gate'->>'status' <> 'pending' or body->>'runStatus' in {ENDED}", "get_gate", run_id, gate_id,
                flask.g.may_write)


@routes.post("/runs/<part:run_id>/gates/<part:gate_id>/resolve")
def resolve_gate(run_id: str, gate_id: str) -> Reply:
    """Decide it, by its token alone.  200 {gate}, 409 gate_token_wrong, gate_resolved, run_ended."""
    body = parse(ResolveGateBody)
    return call("resolve_gate", run_id, gate_id, body["token"], body["decision"], body["actor"], body["payload"])


# --- waiting and signals


@routes.post("/runs/<part:run_id>/wait")
def wait_run(run_id: str) -> Reply:
    """Give the lease up until something is there.  200 {run, ready}, 404, 409 lease_lost, run_cancelled, no_queue."""
    body = parse(WaitBody)
    keys = {"gate_id": "gateId", "step_id": "stepId"}
    waiting_for = {keys.get(name, name): value.isoformat() if name == "until" else value
                   for name, value in body["wait_for"].items()}
    return call("wait_run", run_id, body["lease_owner"], json.dumps(waiting_for), body["timeout_ms"])


@routes.post("/runs/<part:run_id>/signals")
def send_signal(run_id: str) -> Reply:
    """Send it a signal, the next of its name.  200 {signal}, 404, 409 lease_lost, run_cancelled, signal_id_conflict."""
    body = parse(SignalBody)
    return call("send_signal", run_id, body["id"], body["name"], body["payload"], body["lease_owner"])


@routes.get("/runs/<part:run_id>/signals/<part:name>")
def get_signal(run_id: str, name: str) -> Reply:
    """The n-th signal of a name, null while there is none; at once or as soon as it is sent.
    ?n:1..1000000=1 ?waitMs:0..25000=0 (how long to wait for it)  200 {signal?, runStatus}, 404."""
    asked = query("n", "waitMs")
    return held(run_id, asked.get("waitMs", "0"), f"body->>'signal' is not null or body->>'runStatus' in {ENDED}",
                "get_signal", run_id, name, whole_of("n", asked.get("n", "1"), MAX_SIGNALS, low=1))


@routes.post("/runs/<part:run_id>/signals/<part:name>/expire")
def expire_signal(run_id: str, name: str) -> Reply:
    """Decide that the n-th signal of a name did not come in time, unless it did; the answer is what counts.
    200 {signal}, 404, 409 lease_lost, run_cancelled."""
    body = parse(ExpireSignalBody)
    return call("expire_signal", run_id, name, body["n"], body["lease_owner"])


# --- state, snapshots, usage


def about(body: dict[str, Any]) -> str:
    """The JSON of what a body says of a version of the state."""
    names = ("id", "label", "reason", "importance", "metadata", "created_by", "step_id")
    return compose({name: body[name] for name in names if name in body})


@routes.put("/runs/<part:run_id>/state")
def put_state(run_id: str) -> Reply:
    """Replace the live value.  200 {state}, 404, 409 lease_lost, run_cancelled, version_conflict,
    version_id_conflict."""
    body = parse(PutStateBody)
    return call("write_state", run_id, body["stream"], body["value"], False, body["if_version"], about(body),
                body["lease_owner"])


@routes.patch("/runs/<part:run_id>/state")
def patch_state(run_id: str) -> Reply:
    """Merge into its top level.  200 {state}, 404, 409 lease_lost, run_cancelled, version_conflict,
    version_id_conflict, state_not_object."""
    body = parse(PatchStateBody)
    return call("write_state", run_id, body["stream"], body["value"], True, body["if_version"], about(body),
                body["lease_owner"])


@routes.post("/runs/<part:run_id>/state/save")
def save_state(run_id: str) -> Reply:
    """Label the live value, whichever stream wrote it last.  200 {stateVersion}, 404, 409 lease_lost, run_cancelled,
    version_id_conflict."""
    body = parse(SaveStateBody)
    return call("save_state", run_id, body["stream"], about(body), body["lease_owner"])


@routes.get("/runs/<part:run_id>/state/versions")
def list_versions(run_id: str) -> Reply:
    """By stream and version.  ?stream ?labeled:true|false=false (true: only those with a label)
    ?view:light|full=full (light: without their values; full: without payloads of more than 64 KiB: then payloadOmitted
    is true, and GET /runs/:id/payload has them)
    ?limit:1..10000 (200 of the light, 10,000 of the full) ?after (a nextCursor)
    200 {stateVersions:[listedStateVersion], nextCursor?:string} or {stateVersions:[lightStateVersion],
    nextCursor?:string}, 404."""
    asked = query("stream", "labeled", "view", "limit", "after")
    stream = asked.get("stream")
    labeled = choice_of("labeled", asked.get("labeled"), ("true", "false"), "false") == "true"
    light = choice_of("view", asked.get("view"), ("light", "full"), "full") == "light"
    limit = whole_of("limit", asked.get("limit", "200" if light else "10000"), 1000 if light else 10_000, 1)
    return found(core().database.read("list_versions", run_id, stream, labeled, asked.get("after"), limit, light)[0],
                 run_id)


@routes.post("/runs/<part:run_id>/snapshots")
def create_snapshot(run_id: str) -> Reply:
    """Keep a labelled picture of something.  200 {snapshot:stateVersion}, 404, 409 lease_lost, run_cancelled,
    version_id_conflict."""
    body = parse(SnapshotBody)
    target = body["target"] or {"type": None, "id": None}
    return call("create_snapshot", run_id, target["type"], target["id"], body["state"], about(body),
                body["lease_owner"])


@routes.get("/runs/<part:run_id>/snapshots")
def list_snapshots(run_id: str) -> Reply:
    """Labelled versions, newest first, at most ten thousand; payloads of more than 64 KiB are null: then payloadOmitted
    is true, and GET /runs/:id/payload has them.  200 {snapshots:[listedStateVersion]}, 404."""
    query()
    return found(core().database.read("list_snapshots", run_id)[0], run_id)


@routes.post("/runs/<part:run_id>/usage")
def record_usage(run_id: str) -> Reply:
    """Write into the cost ledger.  200 {usage}, 404, 409 lease_lost, run_cancelled, usage_id_conflict."""
    body = parse(UsageBody)
    return call("record_usage", run_id, body["id"], compose(body), body["lease_owner"])


@routes.get("/usage")
def usage() -> Reply:
    """The ledger summed up.  ?by:model|workflow|day=model ?since:time ?until:time ?format:json|csv=json
    200 {groups: [usageGroup]} or csv."""
    asked = query("by", "since", "until", "format")
    by = choice_of("by", asked.get("by"), ("model", "workflow", "day"), "model")
    since, until = (time_of(name, asked.get(name)) for name in ("since", "until"))
    text = core().database.read("usage_groups", by, since, until)[0] or ""
    if choice_of("format", asked.get("format"), ("json", "csv"), "json") == "csv":
        return studio.as_csv(json.loads(text, parse_float=Decimal)["groups"])
    return reply(text)


# --- events


EVENTS_AT_ONCE = 500
BEAT_SECONDS = 15  # a stream without news says something: proxies keep it open, and a reader that is gone is noticed


def time_of(name: str, text: str | None) -> datetime | None:
    """A time in the query string, ISO-8601; without a zone it is UTC.  :raises Refusal: 400."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text.replace(" ", "+"))  # a + that was not escaped
        return at if at.tzinfo else at.replace(tzinfo=UTC)
    except ValueError:
        raise invalid(name, "must be a time, as 2026-06-12T10:31:00.000Z") from None


@routes.get("/runs/<part:run_id>/events")
def stream_events(run_id: str) -> Reply | flask.Response:
    """A run's events after a number, as a stream that goes on; as a list for Accept: application/json. A stream that a
    run token opened ends when the token expires. A list has at most 16 MiB, or one event; where there may be more the
    header x-tidebase-next has the number to go on after.
    ?after:0..2147483647=0 ?follow:true|false=true (false: end with the run) @Last-Event-ID (counts before after)
    ?view:light|full=full (light: without long payloads) ?types (by comma; one that ends with a dot is a beginning)
    ?limit:1..1000 (of the list)
    200 stream or [event] or [lightEvent], 404, 503 busy when all places for streams are taken."""
    request, server, expires_at = flask.request, core(), flask.g.expires_at
    asked = query("after", "follow", "token", "view", "types", "limit")
    after = whole_of("after", request.headers.get("Last-Event-ID") or asked.get("after", "0"), 2**31 - 1)
    follow = choice_of("follow", asked.get("follow"), ("true", "false"), "true") == "true"
    light = choice_of("view", asked.get("view"), ("light", "full"), "full") == "light"
    types = asked["types"].split(",") if asked.get("types") else None
    most = whole_of("limit", asked["limit"], 1000, 1) if "limit" in asked else 2**31 - 1

    def events(after: int, limit: int) -> list[tuple[Any, ...]]:
        return server.database.select("select * from tidebase.list_events(%s, %s, %s, %s, %s)",
                                      (run_id, after, limit, light, types))

    def last() -> tuple[str, int] | None:
        return next(iter(server.database.select(
            "select status, event_seq from tidebase.runs where id = %s", (run_id,))), None)

    known = last()
    if known is None:
        raise Refusal(404, "not_found", f"run {run_id} does not exist")
    if request.accept_mimetypes.best_match(["text/event-stream", "application/json"]) == "application/json":
        some = events(after, most)
        answer = reply("[" + ", ".join(text for _, text in some) + "]")
        if some and some[-1][0] < known[1]:
            answer[2]["x-tidebase-next"] = str(some[-1][0])
        return answer

    waiter = Waiter(run_id=run_id, seq=after)
    place = ExitStack()
    try:
        place.enter_context(server.watcher.waiting(waiter))
    except Busy:
        return busy(refused(Refusal(503, "busy", "too many streams are open here: try again")))

    def stream() -> Iterator[str]:
        yield ": tidebase\n\n"
        while not server.watcher.stopping and (seconds_left := expires_at - server.access.clock()) > 0:
            waiter.woken.clear()
            try:
                some = events(waiter.seq, EVENTS_AT_ONCE)
                ended = not some and ((run := last()) is None or (
                    not follow and run[0] in ENDED and run[1] <= waiter.seq))
            except psycopg.OperationalError:
                some, ended = [], False  # the stream outlives an outage of the database
            for seq, text in some:
                waiter.seq = seq
                # A line break can only be white space between JSON's tokens, and would end the data line.
                yield f"id: {seq}\ndata: {text.translate(LINE_BREAKS)}\n\n"
            if ended:
                return
            if not some and not waiter.woken.wait(min(BEAT_SECONDS, seconds_left)):
                yield ": beat\n\n"

    response = flask.Response(stream(), mimetype="text/event-stream")
    response.headers["X-Accel-Buffering"] = "no"
    response.call_on_close(place.close)
    return response


LINE_BREAKS = {ord("\n"): " ", ord("\r"): " "}


# --- queues and schedules


@routes.post("/queues/<part:queue>/enqueue")
def enqueue(queue: str) -> Reply:
    """Put a run on a queue, or many.  200 {run, deduplicated} or {runs: [enqueuedRun]}, 409 run_id_conflict,
    dedupe_conflict."""
    if not queue:
        raise invalid("queue", "must not be empty")
    members = read_body(received(), schema_of(EnqueueAnyBody))
    if "runs" in members:
        jobs = check(EnqueueManyBody, members)["runs"]
        return call("enqueue_runs", queue, "[" + ", ".join(map(encode_fields, jobs)) + "]",
                    JsonArray(job["input"] for job in jobs))
    return write("enqueue_run", check(EnqueueBody, members), queue=queue)


@routes.post("/writes")
def write_batch() -> Reply:
    """Many writes in one commit: finished steps, begins and outputs of others, results, new runs, children. Each is
    answered as if it had come alone, and none touches another.
    200 {results: [{action, ~step, ~output, ~leaseOwner, ~run, ~expectedInputHash, ~actualInputHash} or {step}
    or {step:briefStep} or {run, ~deduplicated} or {run, edge:runEdge, created} or {run:briefRun} or refusal]}."""
    return write_all([write_of(body.pop("do"), body) for body in parse(WritesBody)["writes"]])


@routes.post("/queues/claim")
def claim() -> Reply:
    """Take ready runs, of these workflows or of all, waiting up to waitMs for one; with Retry-After when it may not
    wait.  200 {runs: [claimedRun], leaseOwner}."""
    body = parse(ClaimBody)
    server, owner = core(), body["lease_owner"] or new_owner()
    workflows = None if body["workflows"] is None else sorted(set(body["workflows"]))

    def ask() -> str | None:
        return server.database.call("claim_runs", body["queues"], owner, body["id"], body["limit"],
                                    server.config.lease_ms, body["checkpoints"], workflows)[0]

    server.traces.asked(body["lease_owner"] or "", body["queues"], body.get("workflows"))
    nothing = json.dumps({"runs": [], "leaseOwner": owner})
    try:
        is_gone = flask.request.environ["waitress.client_disconnected"]
        waiter = Waiter(body["queues"], is_gone=is_gone, workflows=workflows)
        text = server.watcher.hold(waiter, ask, body["wait_ms"] / 1000)
    except Busy:
        return busy(reply(nothing))
    if text is not None:
        server.wrote()
    return reply(text or nothing)


@routes.get("/queues")
def list_queues() -> Reply:
    """Every queue with its counts and caps.  200 {queues: [queueCounts]}."""
    query()
    return reply(core().database.read("list_queues")[0] or "")


@routes.put("/queues/<part:queue>/config")
def configure_queue(queue: str) -> Reply:
    """Set its caps and where to push; a key left out keeps its value, null clears it.  200 {config: queueConfig}."""
    body = parse(QueueConfigBody)
    return call("configure_queue", queue, json.dumps(body))


@routes.put("/schedules/<part:name>")
def set_schedule(name: str) -> Reply:
    """Enqueue a run whenever a cron expression says.  200 {schedule}."""
    if not name:
        raise invalid("name", "must not be empty")
    body = parse(ScheduleBody)
    if len((name + body["queue"]).encode()) > 4 * MAX_NAME:  # together they make the key of each run: see _enqueue
        raise invalid("name", f"together with queue, must be at most {4 * MAX_NAME} bytes")
    now = datetime.fromisoformat(json.loads(core().database.call("due_schedules")[0] or "{}")["now"])
    try:
        coming = next_fire(body["cron"], body["timezone"], now)
    except ValueError as error:
        raise invalid("timezone" if "time zone" in str(error) else "cron", str(error)) from None
    return call("set_schedule", name, body["cron"], body["timezone"], body["workflow_name"], body["input"],
                body["queue"], body["max_attempts"], body["enabled"], coming)


@routes.get("/schedules")
def list_schedules() -> Reply:
    """By name; inputs of more than 64 KiB are null: then payloadOmitted is true.  200 {schedules:[listedSchedule]}."""
    query()
    return reply(core().database.read("list_schedules")[0] or "")


@routes.delete("/schedules/<part:name>")
def delete_schedule(name: str) -> Reply:
    """Forget it; runs that it enqueued stay.  200 {deleted}, 404."""
    return call("delete_schedule", name)


# ------------------------------------------------------------------------------
# Wiring: builds the rooms above in order and serves them.
# ------------------------------------------------------------------------------
OTHER_FILES = 256   # beside connections and the pool: webhooks under way, large bodies, what Python opens
DRAIN_SECONDS = 10  # for requests under way when the server is told to stop
KEYLESS_BYTES = 65_536  # of a body that comes without a key, for the routes that need none: a gate's decision


from tidebase_server import studio  # noqa: E402 - it takes names of this file


def create_app() -> flask.Flask:
    """The routes, for any server of this process: what a request needs of its server, the request brings along."""
    app = flask.Flask("tidebase", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.converters["part"] = Part
    app.url_map.merge_slashes = False
    app.before_request(authorize)
    app.after_request(add_headers)
    app.register_error_handler(Exception, answer_to)
    app.register_blueprint(routes)
    app.register_blueprint(studio.routes)
    return app


app = create_app()


class Server:
    """All of it on one socket. `serve` blocks until `stop` is called, from a signal handler or another thread."""

    def __init__(self, config: Config, conninfo: str, listener: socket.socket | None = None,
                 revive: Callable[[], None] | None = None) -> None:
        self.config = config
        self.access = Access(host=config.host, api_key=config.api_key, read_key=config.read_key,
                             public_url=config.public_url, cors_origin=config.cors_origin, pages=PAGES)
        self.database = Database(conninfo, config.pool, config.read_timeout_ms)
        self.watcher = Watcher(self.database, config.places)
        self.traces = studio.Traces()
        self.sender = Sender(self.database, config.webhook_secret, config.webhook_targets())
        self.reconciler = Reconciler(self.database, config.lease_ms, config.retention_days, revive)
        self.prepared = threading.Event()
        self.stopping = threading.Event()
        self.failure: Exception | None = None
        self.listener = listener or listen(config)
        self._http: HttpServer | None = None
        self.cors_headers = cors_headers(config.cors_origin)

    @property
    def url(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def public_url(self) -> str:
        """What resolveUrl begins with: never the Host of a request, which whoever sends it chooses. Empty, so that it
        is a path, when others can connect and nobody told the server its address."""
        return (self.config.public_url or (self.url if self.config.host in LOOPBACK else "")).rstrip("/")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The WSGI application: each request brings along its server, and its path as it was sent, since WSGI servers
        hand it over decoded, where %2F and / are the same."""
        environ["PATH_INFO"] = path_of(environ.get("REQUEST_URI", environ["PATH_INFO"]))
        environ["tidebase.server"] = self
        return app(environ, start_response)

    def wrote(self) -> None:
        """Something was written: wake the watcher and the sender."""
        self.watcher.notify()
        self.sender.notify()

    def prepare(self) -> None:
        """Bring the schema up to date and open the pool, once.

        :raises psycopg.OperationalError: Postgres is away; to be tried again.
        :raises SchemaBehind: the schema may not be brought up to date; the server then ends.
        """
        if not self.prepared.is_set():
            if self.database.migrate(self.config.auto_migrate):
                logger.info("schema applied", extra={"event": "schema_applied"})
            self.database.pool.open()
            self.prepared.set()

    def serve(self) -> None:
        """Answer requests until `stop`; then finish those under way, within DRAIN_SECONDS.

        :raises SchemaBehind: see prepare.
        """
        self._http = HttpServer(self, Admission(self), self.listener, threads=self.config.threads,
                                max_body=self.config.max_body, other_files=OTHER_FILES + self.config.pool)
        self.watcher.make_room = self._http.make_room
        loops = [
            ("watcher", self._when_prepared(self.watcher.tick), self._sleep(
                lambda: WATCH_SECONDS if self.watcher.waiters else None, WATCH_GAP_SECONDS, self.watcher.notified)),
            ("sender", self._when_prepared(self.sender.tick), self._sleep(
                self.sender.idle_seconds, SEND_GAP_SECONDS, self.sender.notified)),
            ("reconciler", self._reconcile, lambda: self.stopping.wait(self.config.reconcile_ms / 1000)),
        ]
        threads = [threading.Thread(target=keep_ticking, name=f"tidebase-{job}", args=(
            job, tick, sleep, self.stopping, self._tick_failed)) for job, tick, sleep in loops]
        sent = threading.Event()  # nothing is in flight any more
        deadlines = threading.Thread(target=keep_ticking, name="tidebase-sender-deadlines", args=(
            "deadlines", self.sender.keep_deadlines, self._sleep(
                lambda: DEADLINE_SECONDS if self.sender.in_flight else None, DEADLINE_SECONDS, self.sender.started),
            sent, self._tick_failed))
        for thread in (*threads, deadlines):
            thread.start()
        try:
            self._http.serve(self.stopping)
        finally:
            self.stop()
            self.sender.stop()
            self._http.drain()
            self.watcher.stop()
            self.sender.notify()
            self._http.close(DRAIN_SECONDS)
            for thread in threads:
                thread.join()
            self.sender.drain()
            sent.set()
            self.sender.started.set()
            deadlines.join()
            self.database.pool.close()
        if self.failure:
            raise self.failure

    def stop(self) -> None:
        """Make `serve` return soon. Safe in a signal handler."""
        self.stopping.set()
        self.watcher.stopping = True
        if self._http:
            self._http.wake()

    def _when_prepared(self, tick: Callable[[], int]) -> Callable[[], int]:
        return lambda: tick() if self.prepared.is_set() else 0

    def _sleep(self, seconds: Callable[[], float | None], gap: float, notified: threading.Event) -> Callable[[], None]:
        """Sleep until notified, at most `seconds` (None: as long as it takes), but for `gap` in any case."""

        def sleep() -> None:
            self.stopping.wait(gap)
            limit = seconds()
            notified.wait(limit if limit is not None else 3600)
            notified.clear()

        return sleep

    def _reconcile(self) -> int:
        self.prepare()
        done = self.reconciler.tick()
        self.traces.note(self.database)
        if done:
            self.wrote()
        return done

    def _tick_failed(self, error: Exception) -> None:
        if isinstance(error, SchemaBehind):
            self.failure = error
            self.stop()
        elif (isinstance(error, psycopg.Error) and cannot_write(error)
              and threading.current_thread().name.endswith("reconciler")):
            self.reconciler.failed(error)


def cors_headers(origin: str) -> dict[str, str]:
    """What tells browsers that pages of this origin may call the server; nothing when none may."""
    if not origin:
        return {}
    headers = {"Access-Control-Allow-Origin": origin,
               "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE, OPTIONS",
               "Access-Control-Allow-Headers": "authorization, content-type, x-tidebase-worker, last-event-id",
               "Access-Control-Max-Age": "600"}
    return headers if origin == "*" else {**headers, "Vary": "Origin"}


def listen(config: Config) -> socket.socket:
    """The listening socket.  :raises ConfigError: the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        where = f"{config.host}:{config.port}"
        raise ConfigError(f"cannot listen on {where}: {error.strerror}; set HOST and PORT") from None
    listener.listen(1024)
    return listener


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


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
BEHIND_STATUS = 3  # of a server process that found SchemaBehind


def on_stop(heed: Callable[..., Any]) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, heed)


def serve_one(config: Config, conninfo: str, listener: socket.socket, revive: Callable[[], None] | None,
              signals: list[int]) -> None:
    """Serve in this process until SIGTERM or SIGINT, also one that came before and stands in `signals`."""
    server = Server(config, conninfo, listener, revive)
    on_stop(lambda *_: server.stop())
    if not signals:
        server.serve()


class Processes:
    """Server processes that share one socket. This one starts them, and another for each that ends by itself; told to
    stop, it ends them all."""

    def __init__(self, serve: Callable[[], None], signals: list[int]) -> None:
        self.serve = serve  # in a process of its own
        self.signals = signals
        self.parent = os.getpid()
        self.children: set[int] = set()

    def run(self, count: int) -> None:
        """Until the last has ended.  :raises SchemaBehind: the reason why they did."""
        on_stop(self.stop)
        is_behind = False
        for _ in range(count):
            self.start()
        while self.children:
            child, status = os.wait()
            if child not in self.children:  # the first process of a container gets to know of others' children, too
                continue
            self.children.discard(child)
            if os.waitstatus_to_exitcode(status) == BEHIND_STATUS:
                is_behind = True
                self.stop()
            elif not self.signals:
                logger.error("a server process ended; starting another", extra={"event": "process_ended"})
                time.sleep(1)  # a process that cannot start must not be started as fast as it fails
                if not self.signals:
                    self.start()
        if is_behind:
            raise SchemaBehind

    def stop(self, number: int = signal.SIGTERM, _: Any = None) -> None:
        self.signals.append(number)
        for child in list(self.children):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    def start(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until it is known whose a signal is
        child = os.fork()
        if not child:
            self._live()
        self.children.add(child)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if self.signals:
            self.stop()

    def _live(self) -> NoReturn:
        """A child's life."""
        on_stop(lambda *_: os._exit(0))  # nothing is served yet
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        status = 1
        try:
            threading.Thread(target=end_with, args=(self.parent,), name="tidebase-parent", daemon=True).start()
            self.serve()
            status = 0
        except SchemaBehind:
            status = BEHIND_STATUS
        except Exception:
            logger.exception("server process failed", extra={"event": "process_failed"})
        finally:
            os._exit(status)  # what the parent has to clean up at its exit is the parent's


def end_with(parent: int) -> None:
    """End this server process when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def database_of(config: Config) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """The database to work on: DATABASE_URL, or an embedded one for as long as this lasts; and how to revive it."""
    if config.database_url:
        yield config.database_url, None
        return
    embedded = EmbeddedPostgres(config.data_dir)
    conninfo = embedded.start()
    try:
        click.echo(f"The embedded PostgreSQL runs; its data lies in {embedded.folder}")
        yield conninfo, embedded.revive
    finally:
        embedded.stop()


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Tidebase: the checkpoint layer for AI agents. Without a command it serves."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormat("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        context.obj = Config.from_environment(os.environ)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    if context.invoked_subcommand is None:
        context.invoke(serve)


@main.command()
@click.pass_obj
def serve(config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        listener = listen(config)
        if config.host not in LOOPBACK and not config.api_key:
            logger.warning("ANYONE WHO CAN REACH %s MAY READ AND CHANGE EVERY RUN: TIDEBASE_INSECURE=1 and no "
                           "TIDEBASE_API_KEY", config.host, extra={"event": "insecure"})
        if config.host not in LOOPBACK and not config.public_url:
            logger.warning("TIDEBASE_PUBLIC_URL is not set, so the resolveUrl of gates is a path without an address",
                           extra={"event": "no_public_url"})
        signals: list[int] = []
        on_stop(lambda number, _: signals.append(number))  # heeded when the database is up, and can be stopped again
        with database_of(config) as (conninfo, revive), listener:
            host, port = listener.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            click.echo(f"Tidebase {__version__} listens on {url}")
            click.echo(f"Studio, its page, is at {url}/studio")
            one = functools.partial(serve_one, config, conninfo, listener, revive, signals)
            if config.web_concurrency == 1:
                one()
            else:
                Processes(one, signals).run(config.web_concurrency)
    except (ConfigError, SchemaBehind, EmbeddedError) as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.pass_obj
def migrate(config: Config) -> None:
    """Bring the database's schema to this build's; a newer one is left alone."""
    try:
        with database_of(config) as (conninfo, _):
            applied = Database(conninfo, 2).migrate(by_hand=True)
    except (psycopg.OperationalError, SchemaAhead) as error:
        raise click.ClickException(str(error).split("\n")[0]) from None
    except EmbeddedError as error:
        raise click.ClickException(str(error)) from None
    click.echo("The schema was brought up to date." if applied else "The schema is up to date.")


@main.command()
@click.argument("run_id")
def explain(run_id: str) -> None:
    """Say what a resume of a run would do, step by step, and whether it is safe; asks the server at TIDEBASE_URL."""
    try:
        with tidebase_sdk.Tidebase() as tide:
            plan, url = tide.runs.rerun_plan(run_id), tide._server.url
    except (tidebase_sdk.TidebaseError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{plan['runId']} is {plan['runStatus']}. {plan['verdict']}\n")
    rows = [("step", "what a resume does", "why")] + [
        (step["name"], step["plan"].replace("_", " "), step["reason"]) for step in plan["steps"]]
    widths = [min(40, max(len(row[column]) for row in rows)) for column in (0, 1)]
    for name, does, reason in rows if plan["steps"] else ():
        click.echo(f"{name:<{widths[0]}}  {does:<{widths[1]}}  {reason}")
    click.echo(f"\nMore: {url}/studio/runs/{urllib.parse.quote(run_id, safe='')}")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1)
def demo(arguments: tuple[str, ...]) -> None:
    """Watch a worker die in the middle of a run, and another finish it."""
    sys.path.insert(0, str(HERE / "examples"))
    sys.exit(importlib.import_module("demo").main(list(arguments)))


if __name__ == "__main__":
    main()
