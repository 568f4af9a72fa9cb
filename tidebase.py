"""Tidebase: the checkpoint layer for AI agents, as one small server in front of your own Postgres.

A run is one execution of a workflow, a step one named piece of it. A worker (your code, in your process) takes a lease
on a run, by claim from a queue or by begin, and records each step. A step that is recorded as completed is a
checkpoint: when the worker dies, the worker that takes the run over replays it instead of executing it again. Tidebase
never runs user code. It keeps the record, decides when code should run (again), and says so by claim or by signed
webhook.

The rules of that life stand in schema.sql, as SQL functions. A request takes one way: its route, here; its body
checked, by a schema of tidebase_server/bodies.py; one call of one SQL function with named arguments, which is one
transaction; and the JSON text that the function answers is passed on as it is. Errors are {"error": words, "code":
snake_case}.

The rooms of this file, each using only those above it:

    Settings              every tunable: its environment name, unit, default and reason
    Webhook sender        sends the webhooks of the outbox
    Reconciler            does what becomes due as time passes: expired leases, deadlines, schedules
    Requests              what happens to each request before and after its route
    Routes                check, call, answer; in the order of the protocol
    Server                the rooms above, built and run
    Command line          serve, migrate, explain, demo

What is not needed to understand that stands in tidebase_server/: the bodies, the pool of connections, the embedded
PostgreSQL, the HTTP server, requests that wait and streams, who may ask, where webhooks may go and how one is posted,
what Studio reads, /openapi.json.

Run it with `python tidebase.py`; without DATABASE_URL it brings its own PostgreSQL. Importing this file opens no
socket, thread or connection. It hands on the names of the client, tidebase_sdk.py, so that `from tidebase import
Tidebase` works here as it does in an app that has the client copied in as tidebase.py.
"""

from __future__ import annotations

import difflib
import functools
import gc
import importlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, LiteralString, NamedTuple, cast

import click
import flask
import psycopg
from werkzeug.exceptions import HTTPException

import tidebase_sdk
from tidebase_sdk import *  # noqa: F403 - the client's names, for `from tidebase import Tidebase`
from tidebase_server import bodies, filters, openapi, request, studio
from tidebase_server.access import LOOPBACK, Access, is_origin, origin_of
from tidebase_server.admission import Admission, check_key, check_sender, cors_headers, run_token_expiry
from tidebase_server.answers import SAFE_HEADERS, Refusal, Reply, busy, database_refused, invalid, refused, reply
from tidebase_server.bodies import MAX_NAME, MAX_WAIT_MS, check, encode_fields, read_members, take, to_json
from tidebase_server.cron import BadSchedule, next_fire
from tidebase_server.database import CONNECT_SECONDS, Database, JsonArray, SchemaAhead, SchemaBehind, cannot_write
from tidebase_server.delivery import Outcome, deliver
from tidebase_server.embedded import EmbeddedPostgres
from tidebase_server.events import EventLog, frames
from tidebase_server.exchange import Cut, Exchange
from tidebase_server.filters import ENDED, FILTERS, LIST_PARAMETERS
from tidebase_server.logs import LogFormat, log_expired, log_failure, printable
from tidebase_server.processes import Processes, on_stop
from tidebase_server.programs import EmbeddedError
from tidebase_server.recent_claims import RecentClaims
from tidebase_server.request import call, choice_of, flag_of, found, parse, query, reads_only, wakes_nobody, whole_of
from tidebase_server.serving import HttpServer
from tidebase_server.targets import WebhookTargets
from tidebase_server.watcher import WATCH_GAP_SECONDS, LongPoll, TooManyWaiting, Watcher

__version__ = "0.1.0"
__all__ = [*tidebase_sdk.__all__, "Config", "Server"]
sys.modules.setdefault("tidebase", sys.modules[__name__])  # run as a program, it has another name
sys.modules.setdefault("tidebase.aio", tidebase_sdk.aio)
aio = tidebase_sdk.aio

HERE = Path(__file__).resolve().parent
logger = logging.getLogger("tidebase.server")


# ------------------------------------------------------------------------------
# Settings: every tunable, read once at the start and refused if out of range.
# ------------------------------------------------------------------------------
class Setting(NamedTuple):
    """One environment variable (the README's table is made of these)."""

    name: str
    default: str
    kind: type
    help: str
    low: int = 0   # the range of an int
    high: int = 0

    @property
    def field(self) -> str:
        """The field of Config that has its value."""
        return self.name.removeprefix("TIDEBASE_").lower()


SETTINGS = (
    Setting("HOST", "127.0.0.1", str, "address to listen on; beyond loopback TIDEBASE_API_KEY must be set"),
    Setting("PORT", "7373", int, "port to listen on", 0, 65_535),
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
    Setting("TIDEBASE_LEASE_MS", "60000", int,
            "how long a worker may be silent: three heartbeats of the client", 100, 86_400_000),
    Setting("TIDEBASE_RECONCILE_MS", "5000", int,
            "how often expired leases, deadlines and the like are looked for", 10, 3_600_000),
    Setting("TIDEBASE_RETENTION_DAYS", "0", int,
            "ended runs are deleted after so many days; 0 keeps them for ever", 0, 36_500),
    Setting("TIDEBASE_MAX_BODY", str(16 * 1024 * 1024), int,
            "the largest request body in bytes; larger ones get 413", 1024, 1 << 30),
    # An idle worker that waits costs next to nothing; one that may not wait asks again every second or two. With a
    # maximum of 32, 200 idle workers cost a quarter of a core.
    Setting("TIDEBASE_MAX_WAITING", "500", int, "requests per process that may wait, each in a thread", 1, 5000),
    # A thread for each connection, since more would only wait for one. Requests go round through all threads: with 64,
    # each request found the memory of its thread cold, and cost a tenth more.
    Setting("TIDEBASE_POOL", "16", int,
            "connections to PostgreSQL per process, and requests that are worked on at the same time", 2, 1024),
    Setting("TIDEBASE_READ_TIMEOUT_MS", "10000", int,
            "how long PostgreSQL may take to read what a GET asks for", 10, 3_600_000),
    Setting("WEB_CONCURRENCY", "1", int, "server processes that share the port", 1, 64),
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
    max_waiting: int
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
            if setting.kind is bool:
                if text not in ("0", "1"):
                    raise ConfigError(f"{setting.name} is {text!r}; it takes 0 or 1")
                values[setting.field] = text == "1"
            elif setting.kind is int:
                if not re.fullmatch(r"[0-9]{1,18}", text):
                    raise ConfigError(f"{setting.name} is {text!r}; it takes a whole number")
                if not setting.low <= int(text) <= setting.high:
                    raise ConfigError(f"{setting.name} is {text}; it takes {setting.low} to {setting.high}")
                values[setting.field] = int(text)
            else:
                if not text.isprintable():  # among it what is not UTF-8
                    raise ConfigError(f"{setting.name} holds characters that cannot be sent")
                values[setting.field] = text
        for name in environment:
            if name.startswith("TIDEBASE_") and name not in FOREIGN_SETTINGS | {s.name for s in SETTINGS}:
                near = difflib.get_close_matches(name, [s.name for s in SETTINGS], 1)
                hint = f", did you mean {near[0]}?" if near else ""
                logger.warning("%s is not a setting of this server%s", name, hint, extra={"event": "unknown_setting"})
        config = cls(**values)
        config.check()
        return config

    def check(self) -> None:
        """Refuse settings that cannot work, or are not safe, together.

        :raises ConfigError: with the setting and the way out.
        """
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
            if key != key.strip():
                raise ConfigError(f"{name} must have no space before or after it, which no client can send")
            if self.host not in LOOPBACK and 0 < len(key) < SHORTEST_KEY:
                raise ConfigError(f"HOST is {self.host}, so others can connect and try keys: {name} must have at least "
                                  f"{SHORTEST_KEY} characters; {MAKE_KEY}")
        if self.public_url and not origin_of(self.public_url):
            raise ConfigError(f"TIDEBASE_PUBLIC_URL is {self.public_url!r}; it takes an address such as "
                              "https://tide.example")
        if self.cors_origin not in ("", "*") and not is_origin(self.cors_origin):
            raise ConfigError(f"TIDEBASE_CORS_ORIGIN is {self.cors_origin!r}; it takes * or an origin as browsers send "
                              "it, in lower case and without a path, such as https://app.example")

    def webhook_targets(self) -> WebhookTargets:
        """Where webhooks may go.  :raises ValueError: TIDEBASE_WEBHOOK_ALLOW is malformed."""
        return WebhookTargets(self.webhook_allow, on_loopback=self.host in LOOPBACK)


# ------------------------------------------------------------------------------
# Webhook sender: claims due webhooks from the outbox, delivers each in a thread, and records the outcome.
# ------------------------------------------------------------------------------
SEND_SECONDS = 10        # for a whole exchange, from resolving the name to the last byte of the answer
SEND_SLOTS = 8           # webhooks in flight at once that are not slow
SEND_SLOW_SECONDS = 0.2  # a webhook in flight for longer is slow: its thread does nothing but wait for the receiver
SEND_THREADS = 128       # webhooks in flight at once, the slow ones among them
SEND_PER_HOST = 2        # webhooks in flight to one host and port, so that a host that hangs cannot take all slots
SEND_HOLD_MS = 6000      # how long a claim lasts unless it is renewed; then another sender may claim the webhook
SEND_RENEW_SECONDS = 2.0
SEND_SLEEP_SECONDS = 1.0  # between two claims, when this process writes no webhook
SEND_GAP_SECONDS = 0.02  # between two claims, at least
DEADLINE_SECONDS = 0.1   # how late a deadline may be kept
SEND_DRAIN_SECONDS = 3.0  # for webhooks in flight when the server is told to stop


class InFlight(NamedTuple):
    """A webhook that is being delivered."""

    webhook: dict[str, Any]  # as claim_webhooks answered it
    exchange: Exchange


class Sender:
    """Delivers the webhooks that are due, each in a thread of its own. The webhooks of one channel go out in order,
    since only the first that is not settled is due. Free slots are counted from `in_flight`, so none can be lost."""

    def __init__(self, database: Database, secret: str, targets: WebhookTargets) -> None:
        self.database = database
        self.secret = secret
        self.targets = targets
        self.in_flight: dict[str, InFlight] = {}  # by the webhook's id
        self.changed = threading.Condition()  # guards in_flight; notified when a webhook leaves it
        self.wake_event = threading.Event()      # there may be a webhook to send
        self.deadline_event = threading.Event()  # there is a deadline to keep
        self.renew_at = 0.0
        self.after = ""                       # the host after which the next claim begins, so that hosts take turns
        self.stop_by: float | None = None     # once the server stops: when the webhooks in flight are cut off

    def notify(self) -> None:
        """Have the next tick come at once: there may be a webhook to send."""
        self.wake_event.set()

    def tick(self) -> int:
        """Renew the claims of what is in flight, then claim what is due and start to deliver it.

        :returns: how many webhooks were started.
        """
        self.wake_event.clear()
        in_flight = list(self.in_flight.values())
        self._renew(in_flight)
        now = time.monotonic()
        slow = sum(not one.exchange.is_over and now - one.exchange.started >= SEND_SLOW_SECONDS for one in in_flight)
        free = min(SEND_SLOTS - (len(in_flight) - slow), SEND_THREADS - len(in_flight))
        if free <= 0 or self.stop_by is not None:
            return 0
        per_host = SEND_PER_HOST if len(in_flight) < SEND_THREADS // 2 else 1  # the last threads are for other hosts
        claim = json.loads(str(self.database.call(
            "claim_webhooks", limit=free, hold_ms=SEND_HOLD_MS, per_host=per_host,
            in_flight=[one.webhook["id"] for one in in_flight], after=self.after)[0]))
        self.after = claim["after"]
        for webhook in claim["webhooks"]:
            self._start(webhook)
        return len(claim["webhooks"])

    def idle_seconds(self) -> float:
        """How long the sender may sleep: less while a webhook in flight may become slow and so free a slot."""
        return SEND_SLOW_SECONDS if self.in_flight else SEND_SLEEP_SECONDS

    def keep_deadlines(self) -> int:
        """Cut off each exchange whose deadline is over. It has a thread of its own, which waits for nothing else.

        :returns: 0, so that the caller sleeps.
        """
        now = time.monotonic()
        for _, exchange in list(self.in_flight.values()):
            if now >= min(exchange.deadline, self.stop_by or exchange.deadline):
                exchange.cut()
        return 0

    def stop(self) -> None:
        """Claim no more webhooks, and cut off in SEND_DRAIN_SECONDS those that are still in flight then."""
        self.stop_by = time.monotonic() + SEND_DRAIN_SECONDS
        self.deadline_event.set()

    def drain(self) -> None:
        """Wait, for a bounded time, until nothing is in flight. A webhook whose outcome is not recorded by then is sent
        again by another server, when its claim ends."""
        end = (self.stop_by or 0.0) + CONNECT_SECONDS
        with self.changed:
            self.changed.wait_for(lambda: not self.in_flight, max(0.0, end - time.monotonic()))

    def _renew(self, in_flight: list[InFlight]) -> None:
        now = time.monotonic()
        if in_flight and now >= self.renew_at:
            self.database.call("renew_webhooks", ids=[one.webhook["id"] for one in in_flight],
                               attempts=[one.webhook["attempt"] for one in in_flight], hold_ms=SEND_HOLD_MS)
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
        self.deadline_event.set()

    def _deliver(self, webhook: dict[str, Any], exchange: Exchange) -> None:
        outcome: Outcome | None = None
        try:
            outcome = deliver(webhook, exchange, self.secret, __version__)
        except Cut:
            if self.stop_by is None:  # else the server stops, and the try does not count
                outcome = Outcome(False, True, error=f"no complete answer within {SEND_SECONDS} s")
        except Exception as error:  # a defect here: it counts as a failed try, or the webhook would be due for ever
            logger.exception("a webhook could not be sent",
                             extra={"event": "send_failed", "delivery_id": webhook["id"]})
            outcome = Outcome(False, True, error=type(error).__name__)
        finally:
            self._finish(webhook, outcome)

    def _finish(self, webhook: dict[str, Any], outcome: Outcome | None) -> None:
        """Record the outcome of a try. None: give the webhook back, as if it had not been claimed."""
        try:
            if outcome:
                self.database.call("settle_webhook", id=webhook["id"], attempt=webhook["attempt"],
                                   **outcome._asdict())
            else:
                self.database.call("release_webhook", id=webhook["id"], attempt=webhook["attempt"],
                                   delay_ms=int(SEND_SLEEP_SECONDS * 1000))
        except psycopg.Error as error:  # it is claimed again when the claim ends, and sent under the same id
            logger.warning("a webhook's outcome could not be recorded: %s", type(error).__name__,
                           extra={"event": "settle_failed", "delivery_id": webhook["id"]})
        finally:
            with self.changed:
                self.in_flight.pop(webhook["id"], None)
                self.changed.notify_all()
            self.notify()


# ------------------------------------------------------------------------------
# Reconciler: does what becomes due as time passes. A tick does a bounded amount of work, and several servers may tick
# at once.
# ------------------------------------------------------------------------------
SWEEP_LIMIT = 100
REVIVE_SECONDS = 10.0  # an embedded PostgreSQL that is away for longer than a restart takes is started again


class Reconciler:
    """One tick every TIDEBASE_RECONCILE_MS: a few sweeps, each on its own, so that one that fails holds up no other."""

    def __init__(self, database: Database, lease_ms: int, retention_days: int,
                 revive: Callable[[], None] | None) -> None:
        """:param revive: starts an embedded PostgreSQL that died; None when it is not ours."""
        self.database = database
        self.lease_seconds = lease_ms / 1000
        self.retention_days = retention_days
        self.revive = revive
        self.away_since: float | None = None  # the database cannot be used
        self.reasons = set[str]()             # why not; each is logged once in an outage
        self.patient_until = 0.0  # of time.monotonic: until then expired leases are left alone
        self.leave_leases_alone()
        self.failing: dict[str, str] = {}  # sweeps and schedules that fail, and why: logged once

    def leave_leases_alone(self) -> None:
        """Let no lease expire for as long as one lasts: while this server did not run, or its database could not be
        used, workers could not renew theirs, and now they can."""
        self.patient_until = time.monotonic() + self.lease_seconds

    def tick(self) -> int:
        """Do each sweep once.

        :returns: how much was done.
        :raises psycopg.Error: the database cannot be used. Other failures are logged, with the name of the sweep.
        """
        done = sum(self._attempt(sweep, self.database.count, sweep, limit=SWEEP_LIMIT) for sweep in (
            "expire_gates", "wake_due", "offer_runs"))
        done += self._attempt("fold_tallies", self.database.count, "fold_tallies", rows=SWEEP_LIMIT)
        if self.away_since is None and time.monotonic() >= self.patient_until:
            done += self._attempt("expire_leases", self._expire_leases)
        done += self._attempt("cancel_overdue", self._cancel_overdue)
        done += self._attempt("due_schedules", self._fire_schedules)
        if self.retention_days:
            done += self._attempt("purge_runs", self.database.count, "purge_runs", days=self.retention_days,
                                  limit=SWEEP_LIMIT)
        if self.away_since is not None:
            logger.warning("the database can be used again", extra={"event": "database_back"})
            self.away_since = None
            self.reasons.clear()
            self.leave_leases_alone()
        return done

    def _attempt(self, name: str, sweep: Callable[..., int], *arguments: Any, **named: Any) -> int:
        """Call one sweep; when it fails, log that and answer 0.  :raises psycopg.Error: the database cannot be used."""
        try:
            done = sweep(*arguments, **named)
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
        expired, runs = self.database.rows("expire_leases", limit=SWEEP_LIMIT)[0]
        for run in json.loads(runs):
            log_expired(run)
        return int(expired)

    def _cancel_overdue(self) -> int:
        # One run a transaction: a cancellation also locks the run's children, so two transactions that each cancelled
        # many runs could deadlock.
        return sum(itertools.takewhile(bool, (
            self.database.count("cancel_overdue", limit=1) for _ in range(SWEEP_LIMIT))))

    def _fire_schedules(self) -> int:
        due = json.loads(self.database.call("due_schedules")[0] or "{}")
        return sum(self._attempt(f"schedule {schedule['name']!r}", self._fire, schedule, due["now"])
                   for schedule in due["schedules"])

    def _fire(self, schedule: dict[str, Any], now: str) -> int:
        # The next time after now, not after the time that was due: after downtime a schedule fires once.
        coming = next_fire(schedule["cron"], schedule["timezone"], datetime.fromisoformat(now))
        return self.database.count("fire_schedule", name=schedule["name"], fire_at=schedule["nextRunAt"],
                                   next_run_at=coming)

    def failed(self, error: psycopg.Error) -> None:
        """A tick found that the database cannot be used: log each reason once, leave leases alone, and revive an
        embedded PostgreSQL."""
        self.leave_leases_alone()
        reason = self.database.reason_of(error)
        if reason not in self.reasons:
            self.reasons.add(reason)
            logger.warning("the database cannot be used (%s); requests get 503 until it can", reason,
                           extra={"event": "database_away"})
        if self.away_since is None:
            self.away_since = time.monotonic()
        elif self.revive and time.monotonic() - self.away_since > REVIVE_SECONDS:
            try:
                self.revive()
            except Exception as failure:
                if (kind := type(failure).__name__) not in self.reasons:  # its words are others each time
                    self.reasons.add(kind)
                    logger.error("the embedded PostgreSQL cannot be started, which is tried again: %s", failure,
                                 extra={"event": "revive_failed"})


# ------------------------------------------------------------------------------
# Requests: what happens to each request before and after its route. Its body was not read before its head was judged
# by Admission (tidebase_server/admission.py).
# ------------------------------------------------------------------------------
# The first two hold no secret; a gate's token is the credential that resolves it.
WITHOUT_KEY = {"routes.health", "routes.openapi_json", "routes.resolve_gate", "studio.look_at_gate", "studio.front",
               "studio.page"}
WITHOUT_DATABASE = {"routes.health", "routes.openapi_json", "studio.front", "studio.page"}
PAGE_VIEWS = {"studio.front", "studio.page"}  # for people, and no part of the interface that /openapi.json describes
PAGES = frozenset({"/", "/studio"})  # for people, who may follow a link to them from anywhere
READS = {"studio.list_changes", "routes.preview_schedule"}  # their bodies are questions: they write nothing
PREPARE_SECONDS = 1  # what a process that has only just started is given to look at the schema before it refuses


def core() -> Server:
    """The server that this request came to."""
    return cast("Server", request.core())


def authorize() -> flask.Response | None:
    """Before a route: answer preflights; check the sender, the key, and that the database was prepared.

    :raises Refusal: 401, 403 or 415.
    :raises psycopg.OperationalError: the database has not been prepared yet.
    """
    check_sender()
    server, asked = core(), flask.request
    flask.g.may_write = True
    flask.g.expires_at = math.inf  # seconds since 1970; of a run token, when it ends
    if asked.method == "OPTIONS" and server.config.cors_origin:
        return flask.Response()  # 200, since a 204 has no Content-Length, and waitress then ends the connection
    if asked.endpoint not in WITHOUT_KEY:
        is_stream = asked.endpoint == "routes.stream_events"
        given = asked.args.get("token") if is_stream else None  # browsers' streams send no headers
        expires_at = run_token_expiry(given) if is_stream else None
        if expires_at is not None:
            flask.g.may_write, flask.g.expires_at = False, expires_at
        else:
            flask.g.may_write = check_key(given)
        if not flask.g.may_write and asked.method not in ("GET", "HEAD") and asked.endpoint not in READS:
            raise Refusal(403, "read_only", "this key may only read")
    if asked.endpoint not in WITHOUT_DATABASE and not server.prepared.wait(PREPARE_SECONDS):
        raise psycopg.OperationalError("the schema has not been looked at yet")
    return None


def add_headers(response: flask.Response) -> flask.Response:
    """After a route: add what all answers carry, and what TIDEBASE_CORS_ORIGIN allows."""
    if "Cache-Control" not in response.headers:  # it is no reply()
        for name, value in SAFE_HEADERS.items():
            response.headers.setdefault(name, value)
    response.headers.update(core().cors_headers)
    return response


def answer_to(error: Exception) -> Reply:
    """The answer to a request that raised. A defect is logged in full, and the client gets a 500."""
    if isinstance(error, HTTPException):
        return refused(error)
    answer = None
    if isinstance(error, psycopg.Error):
        try:
            answer = database_refused(error, core().database)
        except psycopg.Error as later:  # the database went away before the objects of a refusal were read
            answer = database_refused(later, core().database)
    if answer is None:
        logger.error("request failed", exc_info=error, extra={
            "event": "request_failed", "path": flask.request.path})
    return answer or reply('{"error": "internal error", "code": "internal_error"}', 500)


def new_owner() -> str:
    """The name of a worker that gave itself none."""
    return f"owner_{secrets.token_hex(16)}"


def long_poll(run_id: str, wait_ms: str, is_over: LiteralString, function: LiteralString,
              *arguments: str | int) -> Reply:
    """Answer a GET that may wait: call `function` again after each new event of the run until `is_over` holds, for at
    most `wait_ms`, and pass on the latest answer.

    :param wait_ms: as the query string has it.
    :param is_over: a condition in SQL on `body`: there is nothing more to wait for.
    :param function: of schema.sql; answers `body` and `seq`, the number of the run's last event.
    """
    seconds, marks = whole_of("waitMs", wait_ms, MAX_WAIT_MS) / 1000, ", ".join(["%s"] * len(arguments))
    poll, latest = LongPoll(run_id=run_id), ""

    def ask() -> str | None:
        nonlocal latest
        [(latest, poll.seq, over)] = core().database.select(
            f"select body, seq, {is_over} from tidebase.{function}({marks})", arguments)  # noqa: S608
        return latest if over or not seconds else None

    try:
        core().watcher.wait(poll, ask, seconds)
    except TooManyWaiting:
        return busy(reply(latest))
    return reply(latest)


# --- many writes at once


MAX_ANSWERS = 16 * 1024 * 1024  # characters of the answers to a batch, as _budget() of schema.sql


class Payloads(NamedTuple):
    """What a write carries beside its fields, which are jsonb and so would not keep a payload's text."""

    input: Any
    output: Any  # of a step, or the result of a run
    error: Any


def results(rows: list[tuple[Any, ...]]) -> Reply:
    """The answer to many requests in one, of rows of an answer and its status."""
    return reply('{"results": [' + ", ".join(
        body if status == 200 else f'{body[:-1]}, "status": {status}}}' for body, status in rows) + "]}")


def lease_of(step: dict[str, Any]) -> dict[str, Any]:
    """Who begins a step, and for how long."""
    return {"lease_owner": step["lease_owner"] or new_owner(), "lease_ms": core().config.lease_ms}


def write_all(writes: list[dict[str, Any]]) -> Reply:
    """Make many writes, in one transaction unless many are refused; each is answered as if it had come alone.

    :param writes: checked fields, and `do`, the SQL function that makes the write.
    """
    for write in writes:
        if write["do"] == "begin_step":
            write |= lease_of(write)
    payloads = [Payloads(write.pop("input", None), write.pop("output", None) or write.pop("result", None),
                         write.pop("error", None)) for write in writes]
    fields = [encode_fields(write) for write in writes]
    answers: dict[int, tuple[str, int]] = {}
    # write_each stops after many refusals: what it did not reach goes into the next call.
    while unanswered := [n for n in range(len(writes)) if n not in answers]:
        inputs, outputs, errors = map(JsonArray, zip(*(payloads[n] for n in unanswered), strict=True))
        rows = core().database.rows(
            "write_each", writes=to_json([fields[n] for n in unanswered]), inputs=inputs, outputs=outputs,
            errors=errors, room=MAX_ANSWERS - sum(len(body) for body, _ in answers.values()))
        answers |= {n: (body, status) for n, (body, status) in zip(unanswered, rows, strict=True) if body is not None}
    if not all(wakes_nobody(write["do"], given.error) for write, given in zip(writes, payloads, strict=True)):
        core().notify()  # who follows one of the runs learns of the others within WATCH_SECONDS
    for n, write in enumerate(writes):
        if write["do"] == "fail_run" and answers[n][1] == 200:
            log_failure(write["run_id"], answers[n][0])
    return results([answers[n] for n in range(len(writes))])


# ------------------------------------------------------------------------------
# Routes: each checks, calls one function, answers; its docstring lists its statuses, but for 400, 401, 403, 413, 415
# and 503. tidebase_server/openapi.py reads these docstrings and says how they are written.
# ------------------------------------------------------------------------------
routes = flask.Blueprint("routes", __name__)


# --- about this server


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
def described() -> str:
    """The text of /openapi.json."""
    return json.dumps(openapi.document(flask.current_app, __version__, WITHOUT_KEY, PAGE_VIEWS, bodies.LIMITS))


@routes.get("/openapi.json")
def openapi_json() -> Reply:
    """These routes as OpenAPI 3.1; it holds no secret, so that tools may read it without the key.  200 object."""
    return reply(described())


@routes.get("/session")
def session() -> Reply:
    """What the key that was sent may do, and what the page needs to know of this server.
    200 {access:full|read, keyRequired:bool, version:string, now:time, leaseMs:int, reconcileMs:int, publicUrl?}."""
    query()
    config = core().config
    [(now,)] = core().database.select("select tidebase._iso(tidebase.now())", ())
    return reply(json.dumps({
        "access": "read" if reads_only() else "full", "keyRequired": bool(config.api_key), "version": __version__,
        "now": now, "leaseMs": config.lease_ms, "reconcileMs": config.reconcile_ms,
        "publicUrl": config.public_url or None}))


# --- runs


@routes.post("/runs/<part:workflow_name>")
def create_run(workflow_name: str) -> Reply:
    """Create a run without a queue, or get the one with this id.  200 {run, created}, 409 run_id_conflict."""
    if not workflow_name:
        raise invalid("workflowName", "must not be empty")
    return call("create_run", workflow_name=workflow_name, **parse(bodies.CreateRunBody))


@routes.get("/runs")
def list_runs() -> Reply:
    """Runs, newest first, or as sort says; a search looks at so many runs at a time, and its cursor goes on. Payloads
    of more than 64 KiB, and all that come after 16 MiB, are null: then payloadOmitted is true, and the detail has them.
    ?status (several by comma) ?workflow ?queue ?failureClass ?metadata.KEY (at most 16 of these) ?since:time
    ?until:time ?text (an id, or what an error holds) ?errors:true|false (true: failed, or queued again after it)
    ?parent
    ?sort:newest|oldest|ended=newest ?view:light|full=full (light: without payloads) ?limit:1..1000=100
    ?before (a nextCursor)  200 {runs:[listedRun] or [lightRun], nextCursor?}."""
    asked = query(*LIST_PARAMETERS, *FILTERS, prefix="metadata.")
    runs, _, cursor = filters.list_runs(asked)
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
        return long_poll(run_id, asked["waitMs"], f"body->'run'->>'status' in {ENDED}", "get_run", run_id)
    include = asked["include"].split(",") if asked.get("include") else None
    for part in include or ():
        choice_of("include", part, DETAILS, "")
    return found(core().database.read("run_detail", run_id=run_id, include=include, asked=core().recent_claims.queues(),
                                      tokens=not reads_only())[0], run_id)


@routes.post("/runs/<part:run_id>/begin")
def begin_run(run_id: str) -> Reply:
    """Take the lease.  @x-tidebase-worker (the owner; else a new one)  200 {run, leaseOwner?, ~checkpoints,
    ~checkpointsTruncated}, 404, 409 run_leased, run_cancelled, dedupe_conflict."""
    owner = flask.request.headers.get("x-tidebase-worker") or new_owner()
    if len(owner) > MAX_NAME:
        raise invalid("x-tidebase-worker", f"must be at most {MAX_NAME} characters")
    return call("begin_run", run_id=run_id, lease_owner=owner, lease_ms=core().config.lease_ms,
                **parse(bodies.BeginRunBody))


@routes.post("/runs/<part:run_id>/heartbeat")
def heartbeat(run_id: str) -> Reply:
    """Extend the lease.  200 {run}, 404, 409 lease_lost, run_cancelled."""
    owner = parse(bodies.HeartbeatBody)["lease_owner"]
    [row] = core().database.rows("heartbeat_runs", run_ids=[run_id], lease_owners=[owner], brief=False)
    return reply(*row)


@routes.post("/heartbeats")
def heartbeats() -> Reply:
    """Extend many leases.  200 {results: [{run:heldRun} or heldRefusal]}."""
    runs = parse(bodies.HeartbeatsBody)["runs"]
    return results(core().database.rows("heartbeat_runs", run_ids=[run["id"] for run in runs],
                                        lease_owners=[run["lease_owner"] for run in runs]))


@routes.post("/runs/<part:run_id>/complete")
def complete_run(run_id: str) -> Reply:
    """End it well.  200 {run} or {run:briefRun}, 404, 409 lease_lost."""
    return call("complete_run", run_id=run_id, **parse(bodies.CompleteRunBody))


@routes.post("/runs/<part:run_id>/fail")
def fail_run(run_id: str) -> Reply:
    """Report a failed attempt.  200 {run, requeued}, 404, 409 lease_lost."""
    answer = call("fail_run", run_id=run_id, **parse(bodies.FailRunBody))
    log_failure(run_id, answer[0])
    return answer


@routes.post("/runs/<part:run_id>/cancel")
def cancel_run(run_id: str) -> Reply:
    """End it at once.  200 {run}, 404, 409 run_completed."""
    return call("cancel_run", run_id=run_id, **parse(bodies.CancelBody))


@routes.post("/runs/<part:run_id>/release")
def release_run(run_id: str) -> Reply:
    """Give it back, no attempt spent.  200 {run}, 404, 409 lease_lost, run_cancelled."""
    return call("release_run", run_id=run_id, **parse(bodies.HeartbeatBody))


@routes.post("/runs/<part:run_id>/retry")
def retry_run(run_id: str) -> Reply:
    """Put a failed or cancelled run back.  200 {run}, 404, 409 run_completed, dedupe_conflict."""
    return call("retry_run", run_id=run_id, **parse(bodies.Body))


@routes.post("/runs/<part:run_id>/recover")
def recover_run(run_id: str) -> Reply:
    """Post its recovery webhook.  200 {recoveryAttempt}, 404, 422 no_recovery_webhook."""
    return call("recover_run", run_id=run_id, **parse(bodies.RecoverBody))


@routes.post("/runs/<part:run_id>/fork")
def fork_run(run_id: str) -> Reply:
    """A new run that starts with copies of its checkpoints.  200 {run, created}, 404, 409 run_id_conflict."""
    return call("fork_run", run_id=run_id, **parse(bodies.ForkBody))


@routes.post("/runs/<part:run_id>/children")
def create_child(run_id: str) -> Reply:
    """A run for a part of its work, one per name.  200 {run, edge:runEdge, created}, 404, 409 run_cancelled,
    lease_lost, edge_conflict, run_id_conflict."""
    child = parse(bodies.ChildBody)
    return call("create_child", run_id=run_id, input=child.pop("input"), child=encode_fields(child))


# --- steps


@routes.post("/runs/<part:run_id>/steps/begin")
def begin_step(run_id: str) -> Reply:
    """Ask what to do about a step.  200 {action=execute, step, leaseOwner} or {action=return, step, output}
    or {action=locked, step?} or {action=input_mismatch, step, expectedInputHash, actualInputHash}
    or {action=cancelled, run}, 404, 409 manual_review, step_failed, lease_lost."""
    step = parse(bodies.BeginStepBody)
    return call("begin_step", run_id=run_id, **step | lease_of(step))


@routes.post("/runs/<part:run_id>/steps/<part:step_id>/complete")
def complete_step(run_id: str, step_id: str) -> Reply:
    """Record a step's output, once.  200 {step}, 404, 409 lease_lost."""
    return call("complete_step", run_id=run_id, step_id=step_id, **parse(bodies.CompleteStepBody))


@routes.post("/runs/<part:run_id>/steps/<part:step_id>/fail")
def fail_step(run_id: str, step_id: str) -> Reply:
    """Record a step's failure.  200 {step}, 404, 409 lease_lost."""
    return call("fail_step", run_id=run_id, step_id=step_id, **parse(bodies.FailStepBody))


@routes.post("/runs/<part:run_id>/steps/<part:step_id>/review")
def review_step(run_id: str, step_id: str) -> Reply:
    """A person's decision on an ambiguous step; the run goes on.  200 {step}, 404, 409 not_in_review,
    dedupe_conflict."""
    return call("review_step", run_id=run_id, step_id=step_id, **parse(bodies.ReviewBody))


@routes.post("/runs/<part:run_id>/steps")
def record_step(run_id: str) -> Reply:
    """Record a step that already ran.  200 {step} or {step:briefStep}, 404, 409 lease_lost, run_cancelled,
    input_mismatch, manual_review, step_failed."""
    return call("record_step", run_id=run_id, **parse(bodies.RecordStepBody))


@routes.post("/steps")
def record_steps() -> Reply:
    """Record many, of any runs.  200 {results: [{step} or {step:briefStep} or refusal]}."""
    return write_all([{"do": "record_step", **step} for step in parse(bodies.RecordStepsBody)["records"]])


@routes.post("/writes")
def write_batch() -> Reply:
    """Many writes in one commit: finished and failed steps, begins and outputs of others, ends of runs, new runs,
    children. Each is answered as if it had come alone, and none touches another, but for one that is chained: it is
    refused after an earlier one of its run was (prior_refused).
    200 {results: [{action, ~step, ~output, ~leaseOwner, ~run, ~expectedInputHash, ~actualInputHash} or {step}
    or {step:briefStep} or {run, ~deduplicated, ~requeued} or {run, edge:runEdge, created} or {run:briefRun}
    or refusal]}."""
    return write_all(parse(bodies.WritesBody)["writes"])


# --- gates


@routes.post("/runs/<part:run_id>/gates/begin")
def begin_gate(run_id: str) -> Reply:
    """Ask a person, once per name.  200 {action:wait|return, gate}, 404, 409 run_cancelled, lease_lost."""
    return call("begin_gate", run_id=run_id, public_url=core().public_url, **parse(bodies.BeginGateBody))


@routes.get("/runs/<part:run_id>/gates/<part:gate_id>")
def get_gate(run_id: str, gate_id: str) -> Reply:
    """A gate, at once or as soon as it is decided.  ?waitMs:0..25000=0 (how long to wait for it)
    200 {gate, runStatus}, 404."""
    return long_poll(run_id, query("waitMs").get("waitMs", "0"),
                     f"body->'gate'->>'status' <> 'pending' or body->>'runStatus' in {ENDED}", "get_gate", run_id,
                     gate_id, not reads_only())


@routes.post("/runs/<part:run_id>/gates/<part:gate_id>/resolve")
def resolve_gate(run_id: str, gate_id: str) -> Reply:
    """Decide it, by its token alone.  200 {gate}, 409 gate_token_wrong, gate_resolved, run_ended."""
    return call("resolve_gate", run_id=run_id, gate_id=gate_id, **parse(bodies.ResolveGateBody))


# --- waiting and signals


@routes.post("/runs/<part:run_id>/wait")
def wait_run(run_id: str) -> Reply:
    """Give the lease up until something is there.  200 {run, ready}, 404, 409 lease_lost, run_cancelled, no_queue."""
    return call("wait_run", run_id=run_id, **parse(bodies.WaitBody))


@routes.post("/runs/<part:run_id>/signals")
def send_signal(run_id: str) -> Reply:
    """Send it a signal, the next of its name.  200 {signal}, 404, 409 lease_lost, run_cancelled, run_completed,
    signal_id_conflict."""
    return call("send_signal", run_id=run_id, **parse(bodies.SignalBody))


@routes.get("/runs/<part:run_id>/signals/<part:name>")
def get_signal(run_id: str, name: str) -> Reply:
    """The n-th signal of a name, null while there is none; at once or as soon as it is sent.
    ?n:1..1000000=1 ?waitMs:0..25000=0 (how long to wait for it)  200 {signal?, runStatus}, 404."""
    asked = query("n", "waitMs")
    return long_poll(run_id, asked.get("waitMs", "0"), f"body->>'signal' is not null or body->>'runStatus' in {ENDED}",
                     "get_signal", run_id, name, whole_of("n", asked.get("n", "1"), bodies.MAX_SIGNALS, low=1))


@routes.post("/runs/<part:run_id>/signals/<part:name>/expire")
def expire_signal(run_id: str, name: str) -> Reply:
    """Decide that the n-th signal of a name did not come in time, unless it did; the answer is what counts.
    200 {signal}, 404, 409 lease_lost, run_cancelled."""
    return call("expire_signal", run_id=run_id, name=name, **parse(bodies.ExpireSignalBody))


# --- state, snapshots, usage


@routes.put("/runs/<part:run_id>/state")
def put_state(run_id: str) -> Reply:
    """Replace the live value.  200 {state}, 404, 409 lease_lost, run_cancelled, version_conflict,
    version_id_conflict."""
    body = parse(bodies.PutStateBody)
    return call("write_state", run_id=run_id, merge=False, version=take(bodies.VersionMetadata, body), **body)


@routes.patch("/runs/<part:run_id>/state")
def patch_state(run_id: str) -> Reply:
    """Merge into its top level.  200 {state}, 404, 409 lease_lost, run_cancelled, version_conflict,
    version_id_conflict, state_not_object."""
    body = parse(bodies.PatchStateBody)
    return call("write_state", run_id=run_id, merge=True, version=take(bodies.VersionMetadata, body), **body)


@routes.post("/runs/<part:run_id>/state/save")
def save_state(run_id: str) -> Reply:
    """Label the live value, whichever stream wrote it last.  200 {stateVersion}, 404, 409 lease_lost, run_cancelled,
    version_id_conflict."""
    body = parse(bodies.SaveStateBody)
    return call("save_state", run_id=run_id, version=take(bodies.VersionMetadata, body), **body)


@routes.get("/runs/<part:run_id>/state/versions")
def list_versions(run_id: str) -> Reply:
    """By stream and version.  ?stream ?labeled:true|false=false (true: only those with a label)
    ?view:light|full=full (light: without their values; full: without payloads of more than 64 KiB: then payloadOmitted
    is true, and GET /runs/:id/payload has them)
    ?limit:1..10000 (200, and at most 1000, of the light; 10,000 of the full) ?after (a nextCursor)
    200 {stateVersions:[listedStateVersion], nextCursor?:string} or {stateVersions:[lightStateVersion],
    nextCursor?:string}, 404."""
    asked = query("stream", "labeled", "view", "limit", "after")
    light = choice_of("view", asked.get("view"), ("light", "full"), "full") == "light"
    limit = whole_of("limit", asked.get("limit", "200" if light else "10000"), 1000 if light else 10_000, 1)
    return found(core().database.read(
        "list_versions", run_id=run_id, stream=asked.get("stream"), labeled=flag_of("labeled", asked.get("labeled")),
        after=asked.get("after"), limit=limit, light=light)[0], run_id)


@routes.post("/runs/<part:run_id>/snapshots")
def create_snapshot(run_id: str) -> Reply:
    """Keep a labelled picture of something.  200 {snapshot:stateVersion}, 404, 409 lease_lost, run_cancelled,
    version_id_conflict."""
    body = parse(bodies.SnapshotBody)
    target = body.pop("target") or {"type": None, "id": None}
    return call("create_snapshot", run_id=run_id, target_type=target["type"], target_id=target["id"],
                version=take(bodies.VersionMetadata, body), **body)


@routes.get("/runs/<part:run_id>/snapshots")
def list_snapshots(run_id: str) -> Reply:
    """Labelled versions, newest first, at most ten thousand; payloads of more than 64 KiB are null: then payloadOmitted
    is true, and GET /runs/:id/payload has them.  200 {snapshots:[listedStateVersion]}, 404."""
    query()
    return found(core().database.read("list_snapshots", run_id=run_id)[0], run_id)


@routes.post("/runs/<part:run_id>/usage")
def record_usage(run_id: str) -> Reply:
    """Write into the cost ledger.  200 {usage}, 404, 409 lease_lost, run_cancelled, usage_id_conflict."""
    entry = parse(bodies.UsageBody)
    return call("record_usage", run_id=run_id, id=entry.pop("id"), lease_owner=entry.pop("lease_owner"),
                entry=encode_fields(entry))


@routes.get("/usage")
def usage() -> Reply:
    """The ledger summed up.  ?by:model|workflow|day=model ?since:time ?until:time ?format:json|csv=json
    200 {groups: [usageGroup]} or csv."""
    asked = query("by", "since", "until", "format")
    by = choice_of("by", asked.get("by"), ("model", "workflow", "day"), "model")
    since, until = (request.time_of(name, asked.get(name)) for name in ("since", "until"))
    text = core().database.read("usage_groups", by=by, since=since, until=until)[0] or ""
    if choice_of("format", asked.get("format"), ("json", "csv"), "json") == "csv":
        return studio.as_csv(json.loads(text, parse_float=Decimal)["groups"])
    return reply(text)


# --- events


def event_list(found: list[tuple[int, str]], last_seq: int) -> Reply:
    """These events as a list; `last_seq` is the number of the run's last event when they were read."""
    answer = reply("[" + ", ".join(text for _, text in found) + "]")
    if found and found[-1][0] < last_seq:
        answer[2]["x-tidebase-next"] = str(found[-1][0])
    return answer


def event_stream(events: EventLog, after: int, follow: bool) -> Reply | flask.Response:
    """Open a stream, which counts as a request that waits until it is closed; 503 when no more requests may wait."""
    if flask.request.method == "HEAD":
        return flask.Response(mimetype="text/event-stream")
    server, expires_at = core(), flask.g.expires_at
    poll, watching = LongPoll(run_id=events.run_id, seq=after), ExitStack()
    try:
        watching.enter_context(server.watcher.watching(poll))
    except TooManyWaiting:
        return busy(refused(Refusal(503, "busy", "too many streams are open here: try again")))
    response = flask.Response(
        frames(events, server.watcher, poll, follow, lambda: expires_at - server.access.clock()),
        mimetype="text/event-stream")
    response.headers["X-Accel-Buffering"] = "no"  # has nginx pass on each event at once
    response.call_on_close(watching.close)
    return response


@routes.get("/runs/<part:run_id>/events")
def stream_events(run_id: str) -> Reply | flask.Response:
    """A run's events after a number, as a stream that goes on; as a list for Accept: application/json. A stream that a
    run token opened ends when the token expires. A list has at most 16 MiB, or one event; where there may be more the
    header x-tidebase-next has the number to go on after.
    ?after:0..2147483647=0 ?follow:true|false=true (false: end with the run) @Last-Event-ID (counts before after)
    ?view:light|full=full (light: without long payloads) ?types (by comma; one that ends with a dot is a beginning)
    ?limit:1..1000 (of the list)
    200 stream or [event] or [lightEvent], 404, 503 busy when as many requests wait as may."""
    asked = query("after", "follow", "token", "view", "types", "limit")
    after = whole_of("after", flask.request.headers.get("Last-Event-ID") or asked.get("after", "0"), 2**31 - 1)
    follow = flag_of("follow", asked.get("follow"), default=True)
    limit = whole_of("limit", asked["limit"], 1000, 1) if "limit" in asked else 2**31 - 1
    events = EventLog(core().database, run_id,
                      light=choice_of("view", asked.get("view"), ("light", "full"), "full") == "light",
                      types=asked["types"].split(",") if asked.get("types") else None)
    run = events.run()
    if run is None:
        raise Refusal(404, "not_found", f"run {run_id} does not exist")
    if flask.request.accept_mimetypes.best_match(["text/event-stream", "application/json"]) == "application/json":
        return event_list(events.after(after, limit), last_seq=run[1])
    return event_stream(events, after, follow)


# --- queues and schedules


@routes.post("/queues/<part:queue>/enqueue")
def enqueue(queue: str) -> Reply:
    """Put a run on a queue, or many.  200 {run, deduplicated} or {runs: [enqueuedRun]}, 409 run_id_conflict,
    dedupe_conflict."""
    if not queue:
        raise invalid("queue", "must not be empty")
    members = read_members(request.received())
    if "runs" in members:
        jobs = check(bodies.EnqueueManyBody, members)["runs"]
        inputs = JsonArray(job.pop("input") for job in jobs)
        return call("enqueue_runs", queue=queue, jobs=to_json([encode_fields(job) for job in jobs]), inputs=inputs)
    job = check(bodies.EnqueueBody, members)
    return call("enqueue_run", queue=queue, input=job.pop("input"), job=encode_fields(job))


@routes.post("/queues/claim")
def claim() -> Reply:
    """Take ready runs, of these workflows or of all, waiting up to waitMs for one; with Retry-After when it may not
    wait.  200 {runs: [claimedRun], leaseOwner}."""
    body, server = parse(bodies.ClaimBody), core()
    queues, seconds = body["queues"], body.pop("wait_ms") / 1000
    server.recent_claims.remember(body["lease_owner"] or "", queues, body["workflows"])
    owner = body["lease_owner"] = body["lease_owner"] or new_owner()
    if body["workflows"] is not None:
        body["workflows"] = sorted(set(body["workflows"]))

    def ask() -> str | None:
        return server.database.call("claim_runs", lease_ms=server.config.lease_ms, **body)[0]

    nothing = json.dumps({"runs": [], "leaseOwner": owner})
    try:
        text = server.watcher.wait(LongPoll(
            queues, is_disconnected=flask.request.environ["waitress.client_disconnected"], workflows=body["workflows"],
        ), ask, seconds)
    except TooManyWaiting:
        return busy(reply(nothing))
    if text is not None:
        server.watcher.notify()
    return reply(text or nothing)


@routes.get("/queues")
def list_queues() -> Reply:
    """Every queue with its counts and caps.  200 {queues: [queueCounts]}."""
    query()
    return reply(core().database.read("list_queues")[0] or "")


@routes.put("/queues/<part:queue>/config")
def configure_queue(queue: str) -> Reply:
    """Set its caps and where to push; a key left out keeps its value, null clears it.  200 {config: queueConfig}."""
    return call("configure_queue", queue=queue, config=to_json(parse(bodies.QueueConfigBody)))


def fires(cron: str, timezone: str, count: int) -> list[datetime]:
    """When a cron expression fires next: so many times, fewer when it fires no more.

    :raises Refusal: 400, when the expression or the time zone is none.
    """
    times = list[datetime]()
    [(at,)] = core().database.select("select tidebase.now()", ())
    try:
        while len(times) < count and (at := next_fire(cron, timezone, at)) is not None:
            times.append(at)
    except BadSchedule as error:
        raise invalid(error.field, str(error)) from None
    return times


@routes.put("/schedules/<part:name>")
def set_schedule(name: str) -> Reply:
    """Enqueue a run whenever a cron expression says.  200 {schedule}."""
    if not name:
        raise invalid("name", "must not be empty")
    schedule = parse(bodies.ScheduleBody)
    if len((name + schedule["queue"]).encode()) > 4 * MAX_NAME:  # together they make the key of each run: see _enqueue
        raise invalid("name", f"together with queue, must be at most {4 * MAX_NAME} bytes")
    coming = fires(schedule["cron"], schedule["timezone"], 1)
    return call("set_schedule", name=name, next_run_at=next(iter(coming), None), **schedule)


@routes.post("/schedules/preview")
def preview_schedule() -> Reply:
    """When a cron expression fires next: five times, fewer when it fires no more.  200 {next:[time]}."""
    body = parse(bodies.PreviewBody)
    times = [at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
             for at in fires(body["cron"], body["timezone"], 5)]
    return reply(json.dumps({"next": times}))


@routes.get("/schedules")
def list_schedules() -> Reply:
    """By name; inputs of more than 64 KiB are null: then payloadOmitted is true.  200 {schedules:[listedSchedule]}."""
    query()
    return reply(core().database.read("list_schedules")[0] or "")


@routes.delete("/schedules/<part:name>")
def delete_schedule(name: str) -> Reply:
    """Forget it; runs that it enqueued stay.  200 {deleted}, 404."""
    return call("delete_schedule", name=name)


# ------------------------------------------------------------------------------
# Server: builds the rooms above in order, and runs them until it is told to stop.
# ------------------------------------------------------------------------------
OTHER_FILES = 256   # beside connections and the pool: webhooks under way, large bodies, what Python opens
DRAIN_SECONDS = 10  # for requests under way when the server is told to stop
TICK_SECONDS = 5    # then, for ticks under way


def is_outage(error: Exception) -> bool:
    """Whether it tells that the database is away, which the reconciler logs for all."""
    return isinstance(error, psycopg.Error) and cannot_write(error)


def keep_ticking(job: str, tick: Callable[[], int], sleep: Callable[[], None], stop: threading.Event,
                 is_handled: Callable[[Exception], bool] = is_outage) -> None:
    """Repeat tick until `stop` is set; sleep when it found no work or failed.

    :param is_handled: is called with each failure. One that it does not handle is logged here; when it repeats, once.
    """
    failure = ""
    while not stop.is_set():
        try:
            done = tick()
            failure = ""
        except Exception as error:
            if not is_handled(error) and str(error) != failure:
                logger.exception("a tick of the %s failed; the next one tries again", job,
                                 extra={"event": "tick_failed", "job": job})
            failure = str(error)
            done = 0
        if not done:
            sleep()


def create_app() -> flask.Flask:
    """The routes, for any server of this process: what a request needs of its server, the request brings along."""
    app = flask.Flask("tidebase", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    app.url_map.converters["part"] = request.Part
    app.url_map.merge_slashes = False
    app.before_request(authorize)
    app.after_request(add_headers)
    app.register_error_handler(Exception, answer_to)
    app.register_blueprint(routes)
    app.register_blueprint(studio.routes)
    return app


app = create_app()


def takes_no_key(method: str, path: str) -> bool:
    """Whether a route is its own credential, or holds no secret."""
    try:
        return app.url_map.bind("").match(path, method)[0] in WITHOUT_KEY
    except HTTPException:
        return False


def listen(config: Config) -> socket.socket:
    """The listening socket.  :raises ConfigError: the address cannot be listened on."""
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


def url_of(listener: socket.socket) -> str:
    """The address of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server:
    """All of it on one socket. `serve` blocks until `stop` is called, from a signal handler or another thread."""

    def __init__(self, config: Config, conninfo: str, listener: socket.socket | None = None,
                 revive: Callable[[], None] | None = None) -> None:
        self.config = config
        self.access = Access(host=config.host, api_key=config.api_key, read_key=config.read_key,
                             public_url=config.public_url, cors_origin=config.cors_origin, pages=PAGES)
        self.database = Database(conninfo, config.pool, config.read_timeout_ms)
        self.watcher = Watcher(self.database, config.max_waiting)
        self.recent_claims = RecentClaims()
        self.sender = Sender(self.database, config.webhook_secret, config.webhook_targets())
        self.reconciler = Reconciler(self.database, config.lease_ms, config.retention_days, revive)
        self.prepared = threading.Event()
        self.stopping = threading.Event()
        self.is_told_to_stop = False
        self.failure: Exception | None = None
        self.listener = listener or listen(config)
        self._http: HttpServer | None = None
        self.cors_headers = cors_headers(config.cors_origin)
        self.clock = time.time  # it goes on while the machine sleeps, as the database's does

    @property
    def url(self) -> str:
        """The address that this server listens on."""
        return url_of(self.listener)

    @property
    def public_url(self) -> str:
        """What resolveUrl begins with: never the Host of a request, which its sender chooses. Empty, so that resolveUrl
        is a path, when the server listens beyond loopback and TIDEBASE_PUBLIC_URL is not set."""
        return (self.config.public_url or (self.url if self.config.host in LOOPBACK else "")).rstrip("/")

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The WSGI application: each request brings along its server, and its path as it was sent, since WSGI servers
        hand it over decoded, where %2F and / are the same."""
        environ["PATH_INFO"] = request.path_of(environ.get("REQUEST_URI", environ["PATH_INFO"]))
        environ["tidebase.server"] = self
        return app(environ, start_response)

    def notify(self, only_run: str | None = None) -> None:
        """Something was written: wake the watcher and the sender; `only_run`: nothing but events of this run that no
        channel takes."""
        self.watcher.notify(only_run)
        if only_run is None:
            self.sender.notify()

    def prepare(self) -> None:
        """Bring the schema up to date and open the pool, once.

        :raises psycopg.Error: the database cannot be used; to be tried again.
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
        self._http = HttpServer(
            self, Admission(self.access, takes_no_key, self.cors_headers), self.listener, threads=self.config.pool,
            max_body=self.config.max_body, other_files=OTHER_FILES + self.config.pool)
        self.watcher.provide_threads = self._http.provide_threads

        def started(job: str, *loop: Any) -> threading.Thread:
            thread = threading.Thread(target=keep_ticking, name=f"tidebase-{job}", args=(job, *loop), daemon=True)
            thread.start()
            return thread

        threads = [
            started("watcher", self._when_prepared(self.watcher.tick), self._sleep(
                self.watcher.idle_seconds, WATCH_GAP_SECONDS, self.watcher.wake_event), self.stopping),
            started("sender", self._when_prepared(self.sender.tick), self._sleep(
                self.sender.idle_seconds, SEND_GAP_SECONDS, self.sender.wake_event), self.stopping),
            started("reconciler", self._reconcile, self._sleep_between_reconciles, self.stopping, self._handle_outage)]
        sent = threading.Event()  # nothing is in flight any more
        deadlines = started("sender-deadlines", self.sender.keep_deadlines, self._sleep(
            lambda: DEADLINE_SECONDS if self.sender.in_flight else None, DEADLINE_SECONDS, self.sender.deadline_event),
            sent)
        try:
            self._http.serve(self.stopping)
        finally:
            self.stop()
            self.sender.stop()
            self._http.drain()
            self.watcher.stop()
            self.sender.notify()
            self._http.close(DRAIN_SECONDS)
            end = time.monotonic() + TICK_SECONDS
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
                if thread.is_alive():  # it waits for PostgreSQL, maybe for a lock; each statement is all or nothing
                    logger.warning("%s is still at work, and is ended with the process", thread.name,
                                   extra={"event": "thread_left"})
            self.sender.drain()
            sent.set()
            self.sender.deadline_event.set()
            deadlines.join()
            self.database.pool.close()
        if self.failure:
            raise self.failure

    def stop(self) -> None:
        """Make `serve` return soon. Safe in a signal handler, also of a second signal that comes while the first is
        handled: Event.set holds a lock, for which the thread that holds it would wait for ever."""
        if self.is_told_to_stop:
            return
        self.is_told_to_stop = True
        self.stopping.set()
        self.watcher.stopping = True
        if self._http:
            self._http.wake()

    def _when_prepared(self, tick: Callable[[], int]) -> Callable[[], int]:
        return lambda: tick() if self.prepared.is_set() else 0

    def _sleep(self, seconds: Callable[[], float | None], gap: float,
               wake_event: threading.Event) -> Callable[[], None]:
        """Sleep until the event is set, at most `seconds` (None: as long as it takes), but for `gap` in any case."""

        def sleep() -> None:
            self.stopping.wait(gap)
            limit = seconds()
            wake_event.wait(limit if limit is not None else 3600)
            wake_event.clear()

        return sleep

    def _sleep_between_reconciles(self) -> None:
        """Sleep until the next tick of the reconciler is due. When much more time passed by the clock, this server did
        not run meanwhile: a laptop slept, the process was stopped. Or the clock was set, maybe the database's, too."""
        seconds, began = self.config.reconcile_ms / 1000, self.clock()
        self.stopping.wait(seconds)
        missed_seconds = self.clock() - began - seconds
        if missed_seconds > self.reconciler.lease_seconds / 3:  # a worker renews its lease so often
            logger.warning("this server did not run for %.0f s, or the clock was set: no lease expires for as long as "
                           "one lasts", missed_seconds, extra={"event": "time_missed"})
            self.reconciler.leave_leases_alone()

    def _reconcile(self) -> int:
        self.prepare()
        done = self.reconciler.tick()
        self.recent_claims.save(self.database)
        if done:
            self.notify()
        return done

    def _handle_outage(self, error: Exception) -> bool:
        """Handle a failure of `_reconcile` that tells that the database cannot be used.  :returns: whether it does."""
        if isinstance(error, SchemaBehind):
            self.failure = error
            self.stop()
        elif isinstance(error, psycopg.Error) and (cannot_write(error) or not self.prepared.is_set()):
            self.reconciler.failed(error)
        else:
            return False
        return True


# ------------------------------------------------------------------------------
# Command line: serve, migrate, explain, demo.
# ------------------------------------------------------------------------------
def serve_one(config: Config, conninfo: str, listener: socket.socket, revive: Callable[[], None] | None,
              signals: list[int]) -> None:
    """Serve in this process until SIGTERM or SIGINT; not at all when `signals` holds one that came before."""
    server = Server(config, conninfo, listener, revive)
    on_stop(lambda *_: server.stop())
    gc.freeze()  # what was imported lives as long as the process: the collector need not look at it again and again
    if not signals:
        server.serve()


@contextmanager
def database_of(config: Config) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """The address of the database: DATABASE_URL or, while this context lasts, that of an embedded PostgreSQL. With it
    comes the function that starts the embedded one again should it die."""
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
        on_stop(lambda number, _: signals.append(number))  # an embedded PostgreSQL that is starting must not be left so
        with database_of(config) as (conninfo, revive), listener:
            click.echo(f"Tidebase {__version__} listens on {url_of(listener)}")
            click.echo(f"Studio, its page, is at {url_of(listener)}/studio")
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
    except (psycopg.Error, SchemaAhead) as error:
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
    click.echo(printable(f"{plan['runId']} is {plan['runStatus']}. {plan['verdict']}"))
    if plan["steps"]:
        rows = [("step", "what a resume does", "why")] + [
            (printable(step["name"]), step["plan"].replace("_", " "), printable(step["reason"]))
            for step in plan["steps"]]
        widths = [min(40, max(len(row[column]) for row in rows)) for column in (0, 1)]
        click.echo()
        for name, does, reason in rows:
            click.echo(f"{name:<{widths[0]}}  {does:<{widths[1]}}  {reason}")
        if plan["stepsTruncated"]:
            click.echo("Further steps are not shown here; Studio has them.")
    for step in plan["steps"]:
        if step["plan"] == "stops_for_review" and "review" in plan["actions"]:  # not while a worker holds the run
            click.echo(f"\nDecide {printable(step['name'])}, in Studio or by tide.runs.review_step({run_id!r}, "
                       f"{step['id']!r}, DECISION): 'retry', 'complete' (with its output=) or 'fail'")
    click.echo(f"\nMore: {url}/studio/runs/{urllib.parse.quote(run_id, safe='')}")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1)
def demo(arguments: tuple[str, ...]) -> None:
    """Watch a worker die in the middle of a run, and another finish it."""
    sys.path.insert(0, str(HERE / "examples"))
    sys.exit(importlib.import_module("demo").main(list(arguments)))


if __name__ == "__main__":
    main()
