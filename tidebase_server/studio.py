"""What the web page Studio needs of the server: its files, and routes that the page alone asks.

A file of its own, since none of it decides anything about a run: it reads lists, counts and pieces of runs, without
payloads unless one is asked for, and its few writes are verbs of schema.sql. What a list may be filtered by stands in
`Found`: which condition an index serves, and which are looked at afterwards.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any, LiteralString, NamedTuple

import flask
import marshmallow
import psycopg
from marshmallow import fields, validate
from psycopg.sql import SQL, Composable, Literal

import openapi

# Its names, which it has defined by the time it imports this module.
from tidebase import (
    ENDED,
    HERE,
    ID,
    MAX_FILTERS,
    MAX_NAME,
    NOT_ONLY_TEXT,
    STATUSES,
    Body,
    Database,
    Flag,
    Refusal,
    Reply,
    Text,
    Whole,
    __version__,
    call,
    choice_of,
    core,
    database_refused,
    found,
    invalid,
    is_refusal,
    next_fire,
    parse,
    query,
    reply,
    time_of,
    whole_of,
)

FOLDER = HERE / "studio"
MEDIA = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
         ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                                "img-src 'self'; frame-ancestors 'none'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # it may be kept, but is asked for again by its ETag
}
SEARCHED = 20_000     # runs that one request looks at for conditions that no index serves
COUNTED = 10_000      # runs of a status that are counted, until it is "at least so many"
MAX_BULK = 1000       # ids of a bulk request
BATCH = 200           # runs that one bulk request acts on
NOTE_SECONDS = 60.0   # between two notes of who asked for work
MAX_TRACES = 10_000   # workers that a process keeps in mind until then
ASKED_SECONDS = 300.0


# ------------------------------------------------------------------------------
# Traces: who asked this process for work, until it is noted in the database.
# ------------------------------------------------------------------------------
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

    def asked(self, owner: str, queues: Sequence[str], workflows: Sequence[str] | None) -> None:
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
        database.call("note_workers", text)
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


# ------------------------------------------------------------------------------
# Filters: which runs a list, a count or a bulk action is about, and which index serves it.
# ------------------------------------------------------------------------------
FILTERS = ("status", "workflow", "queue", "failureClass", "since", "until", "text", "errors", "parent")
CURSOR = re.compile(r"(-?\d{1,15})_([A-Za-z0-9_.:-]{1,128})", re.ASCII)
SORTS: dict[str, tuple[LiteralString, LiteralString, LiteralString]] = {  # the order, what pages on, its column
    "newest": ("created_at desc, id desc", "<", "created_at"),
    "oldest": ("created_at, id", ">", "created_at"),
    "ended": ("completed_at desc, id desc", "<", "completed_at"),
}


class Condition(NamedTuple):
    text: Composable
    values: tuple[Any, ...] = ()


def condition(text: LiteralString, *values: Any) -> Condition:
    return Condition(SQL(text), values)


class Found:
    """The runs that a query string names: in branches, each of which reads one index in order, and conditions that are
    looked at run by run, for at most SEARCHED of them."""

    def __init__(self, asked: Mapping[str, str], sort: str = "newest", statuses: Sequence[str] | None = None) -> None:
        """
        :param asked: the filters, by name; other names are left to the caller.
        :param statuses: only these, whatever the filters say.
        :raises Refusal: 400, for a filter's value.
        """
        self.sort = sort
        self.order, self.beyond, self.column = SORTS[sort]
        named = self._statuses(asked.get("status"))
        self.served: list[Condition] = []   # what an index serves, in every branch
        self.by_status = False              # that index has the runs of a status apart
        self.rest: list[Condition] = []     # what is looked at afterwards
        self._read(asked)
        if self.text:
            named = named or ["failed", "cancelled", "queued"]  # those that may have an error
        if asked.get("errors") == "true":
            named = [status for status in named or STATUSES if status in ("failed", "queued")]
            self.rest.append(condition("r.error is not null"))
        if statuses is not None:
            named = [status for status in named or STATUSES if status in statuses]
        self.branches = self._branches(named)

    @staticmethod
    def _statuses(text: str | None) -> list[str] | None:
        if text is None:
            return None
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in STATUSES:
                raise invalid("status", f"must be of {', '.join(STATUSES)}, joined by commas")
        return names

    def _read(self, asked: Mapping[str, str]) -> None:
        metadata = self._metadata(asked)
        by_index: list[Condition] = []  # the first serves, unless metadata does
        if parent := asked.get("parent"):
            by_index.append(condition(
                "r.id = any (array(select child_run_id from tidebase.run_edges where parent_run_id = %s))", parent))
        if failure := asked.get("failureClass"):
            by_index.append(condition("r.failure_class = %s", failure))
        self.by_status = not by_index and not metadata and self.sort != "ended" and any(map(asked.get, (
            "workflow", "queue")))
        if workflow := asked.get("workflow"):
            by_index.append(condition("r.workflow_name = %s", workflow))
        if queue := asked.get("queue"):
            by_index.append(condition("r.queue = %s", queue))
        if asked.get("errors") not in (None, "true", "false"):
            raise invalid("errors", "must be true or false")
        self.text = asked.get("text")
        if self.text:
            self._search(self.text)
        since, until = time_of("since", asked.get("since")), time_of("until", asked.get("until"))
        times = [condition(text, at) for text, at in (("r.created_at >= %s", since), ("r.created_at < %s", until))
                 if at is not None]
        if self.sort == "ended":  # the order is that of another index
            self.served.append(condition("r.completed_at is not null"))
            self.rest += [*by_index, *metadata, *times]
        else:
            self.served += [*metadata, *times]
            if metadata:  # Postgres knows best whether it is rare
                self.served += by_index
            else:
                self.served += by_index[:1]
                self.rest += by_index[1:]

    def _search(self, text: str) -> None:
        """A run's id, or the beginning of one that Tidebase made, which tells its time; else what an error holds."""
        if start := re.fullmatch(r"run_([0-9a-f]{8,31})", text):
            first, last = int(start[1][:12].ljust(12, "0"), 16), int(start[1][:12].ljust(12, "f"), 16)
            slack = 600_000  # ms between the making of an id, by a client, and its run's
            self.served.append(condition(
                "r.created_at between to_timestamp(%s::bigint / 1000.0) and to_timestamp(%s::bigint / 1000.0)",
                first - slack, last + slack))
            self.rest.append(condition("starts_with(r.id, %s)", text))
            self.text = None
        elif re.fullmatch(r"[A-Za-z0-9_.:-]{1,128}", text) and exists(text):
            self.served.append(condition("r.id = %s", text))
            self.text = None
        else:
            words = re.sub(r"([\\%_])", r"\\\1", text)
            self.rest.append(condition("r.error::text ilike %s", f"%{words}%"))

    @staticmethod
    def _metadata(asked: Mapping[str, str]) -> list[Condition]:
        named = {name.removeprefix("metadata."): text for name, text in asked.items() if name.startswith("metadata.")}
        if not named:
            return []
        if len(named) > MAX_FILTERS:
            raise invalid("metadata", f"at most {MAX_FILTERS} filters")
        conditions = [condition("r.metadata <> '{}'")]  # so that runs_metadata_idx serves it
        # A query string has no types: 5 finds both "5" and 5. What can only be text is one containment.
        plain = {}
        for key, text in named.items():
            if NOT_ONLY_TEXT.fullmatch(text):
                conditions.append(condition("(r.metadata @> %s::jsonb or r.metadata @> %s::jsonb)",
                                            json.dumps({key: text}), f"{{{json.dumps(key)}: {text}}}"))
            else:
                plain[key] = text
        if plain:
            conditions.append(condition("r.metadata @> %s::jsonb", json.dumps(plain)))
        return conditions

    def _branches(self, statuses: list[str] | None) -> list[tuple[list[Condition], list[Condition]]]:
        """For each branch what its index serves, and the rest. Runs that completed are most of all, so that only the
        indexes of a workflow and of a queue have them apart: else they are a branch of what else is asked for."""
        if self.by_status:
            statuses = list(STATUSES) if statuses is None else statuses
        elif statuses is None:
            return [(self.served, self.rest)]
        elif self.sort == "ended" or len(statuses) == len(STATUSES):
            return [(self.served, [*self.rest, condition("r.status = any (%s)", statuses)])]
        branches = []
        for status in statuses:
            # Written out, so that Postgres sees that the partial index has them all.
            of_it = Condition(SQL("r.status = {}").format(Literal(status)))
            if status == "completed" and not self.by_status:
                branches.append((self.served, [*self.rest, of_it]))
            else:
                branches.append(([of_it, *self.served], self.rest))
        return branches

    def _scan(self, served: list[Condition], limit: int, after: tuple[int, str] | None) -> tuple[Composable, list[Any]]:
        """The next runs of a branch, in order, before the rest is looked at."""
        conditions = [*served] or [condition("true")]
        if after:
            conditions.append(Condition(SQL("(r.{}, r.id) {} (to_timestamp(%s::bigint / 1000.0), %s)").format(
                SQL(self.column), SQL(self.beyond)), after))
        text = SQL("select r.* from tidebase.runs r where {} order by {} limit {}").format(
            SQL(" and ").join(c.text for c in conditions), SQL(self.order), Literal(limit))
        return text, [value for c in conditions for value in c.values]

    def page(self, limit: int, after: tuple[int, str] | None, then: LiteralString = "ids",
             values: Sequence[Any] = ()) -> tuple[Any, list[str], str | None]:
        """The next runs.

        :param then: SQL of what is to be told of them, in the same statement; `ids` are theirs, in order.
        :returns: what was to be told, the ids, and the cursor to go on with. Where the search ended before the page was
                  full, that is the last run it looked at.
        """
        branches, parameters = list[Composable](), list[Any]()
        for served, rest in self.branches:
            scan, scanned = self._scan(served, SEARCHED if rest else limit, after)
            branches.append(SQL("(select r.id, r.{} as at from ({}) r where {} order by {} limit {})").format(
                SQL(self.column), scan, SQL(" and ").join([SQL("true"), *(c.text for c in rest)]), SQL(self.order),
                Literal(limit)))
            parameters += [*scanned, *(value for c in rest for value in c.values)]
        if not branches:
            branches.append(SQL("(select null::text as id, null::timestamptz as at where false)"))
        direction = SQL("desc" if "desc" in self.order else "asc")
        query = SQL(
            "with page as (select id, at from ({branches}) every order by at {way}, id {way} limit {limit}), listed as"
            " (select array(select id from page order by at {way}, id {way}) as ids,"
            " array(select (extract(epoch from at) * 1000)::bigint from page order by at {way}, id {way}) as ats)"
            " select {then}, ids, ats from listed"
        ).format(branches=SQL(" union all ").join(branches), way=direction, limit=Literal(limit), then=SQL(then))
        [(told, ids, ats)] = core().database.select(query, [*parameters, *values])
        if len(ids) == limit:
            return told, ids, f"{ats[-1]}_{ids[-1]}"
        reached = [end for served, rest in self.branches if rest for end in self._end_of_search(served, after)]
        if not reached:
            return told, ids, None
        # Beyond the first end others may stand between those that were found: they are the next page's.
        end = min(reached) if self.beyond == ">" else max(reached)
        kept = [n for n, at in enumerate(ats) if not ((at, ids[n]) > end if self.beyond == ">" else (at, ids[n]) < end)]
        if len(kept) < len(ids):
            return self.page(len(kept), after, then, values) if kept else ("[]", [], f"{end[0]}_{end[1]}")
        return told, ids, f"{end[0]}_{end[1]}"

    def _end_of_search(self, served: list[Condition], after: tuple[int, str] | None) -> list[tuple[int, str]]:
        """The last run that a branch looked at, when there are more."""
        scan, parameters = self._scan(served, SEARCHED, after)
        rows = core().database.select(SQL(
            "select (extract(epoch from {}) * 1000)::bigint, id from ({}) r offset {}").format(
                SQL(self.column), scan, Literal(SEARCHED - 1)), parameters)
        return [(at, run_id) for at, run_id in rows]

    def count(self) -> tuple[int, bool]:
        """How many there are, and whether there may be more."""
        total, more = 0, False
        for served, rest in self.branches:
            scan, parameters = self._scan(served, (SEARCHED if rest else COUNTED) + 1, None)
            query = SQL("select count(*) filter (where {}), count(*) from ({}) r").format(
                SQL(" and ").join([SQL("true"), *(c.text for c in rest)]), scan)
            values = [value for c in rest for value in c.values]
            [(fits, seen)] = core().database.select(query, [*values, *parameters])
            total += min(fits, COUNTED)
            more = more or fits > COUNTED or seen > (SEARCHED if rest else COUNTED)
        return total, more


def exists(run_id: str) -> bool:
    return bool(core().database.select("select 1 from tidebase.runs where id = %s", (run_id,)))


def cursor_from(name: str, text: str | None) -> tuple[int, str] | None:
    if not text:
        return None
    cursor = CURSOR.fullmatch(text)
    if not cursor:
        raise invalid(name, "must be a nextCursor")
    return int(cursor[1]), cursor[2]


# ------------------------------------------------------------------------------
# Files: the page itself, which needs no key; what it asks for does.
# ------------------------------------------------------------------------------
routes = flask.Blueprint("studio", __name__)


def files() -> dict[str, Path]:
    """What there is to serve, by name: nothing of a request ever becomes a path."""
    return {path.name: path for path in FOLDER.glob("*.*")
            if path.suffix in MEDIA and re.fullmatch(r"[a-z]+\.[a-z]+", path.name)}


@routes.get("/")
def front() -> Reply:
    """The page is at /studio.  302."""
    return "", 302, {"Location": "/studio"}


@routes.get("/studio")
@routes.get("/studio/")
@routes.get("/studio/<path:name>")
def page(name: str = "") -> Any:
    """Studio, the page of this server: its files by name, and itself at any other address.  ?n:0..100000 (of
    icon.svg: a number on it)  200 page, 404."""
    known = files()
    if name not in known and "/" not in name and Path(name).suffix in MEDIA:
        raise Refusal(404, "not_found", "there is no such file")
    path = known.get(name, known.get("index.html"))
    if path is None:
        raise Refusal(404, "not_found", "the folder studio/ is missing beside tidebase.py")
    content = path.read_bytes()
    if name == "icon.svg" and (number := whole_of("n", flask.request.args.get("n", "0"), 100_000)):
        content = content.replace(b"</svg>", badge(number).encode() + b"</svg>")
    response = flask.Response(content, headers=HEADERS, content_type=MEDIA[path.suffix])
    response.set_etag(hashlib.sha256(content).hexdigest())
    return response.make_conditional(flask.request)


def badge(number: int) -> str:
    """The mark that tells how many wait, on an icon of 32 by 32."""
    text = str(number) if number < 100 else "99+"
    return (f'<rect x="{30 - 7 * len(text)}" y="15" width="{2 + 7 * len(text)}" height="17" rx="5" fill="#d0342c"/>'
            f'<text x="{31 - 3.5 * len(text)}" y="28" font-family="sans-serif" font-size="12" font-weight="700"'
            f' text-anchor="middle" fill="#fff">{text}</text>')


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


def reads_only() -> bool:
    """Whether this request came with the key that only reads."""
    return not flask.g.may_write


# ------------------------------------------------------------------------------
# Runs: lists, counts, what changed, and one action for many.
# ------------------------------------------------------------------------------
def list_runs(asked: dict[str, str], known: dict[str, str] | None = None) -> tuple[str, list[str], str | None]:
    """The JSON of a page of runs, their ids, and the cursor of the next; those as `known` are left out."""
    sort = choice_of("sort", asked.get("sort"), tuple(SORTS), "newest")
    light = choice_of("view", asked.get("view"), ("light", "full"), "full") == "light"
    limit = whole_of("limit", asked.get("limit", "100"), 1000, 1)
    runs, ids, cursor = Found(asked, sort).page(
        limit, cursor_from("before", asked.get("before")), "tidebase._list_runs(ids, %s, %s, %s)",
        [light, core().traces.queues(), json.dumps(known or {})])
    return runs, ids, cursor


LIST_PARAMETERS = ("sort", "view", "limit", "before")


@routes.get("/counts")
def count_runs() -> Reply:
    """How many runs of each status there are, up to ten thousand; more: at least so many.  ?workflow ?queue
    ?failureClass ?metadata.KEY ?since:time ?until:time ?text ?errors:true|false ?parent
    200 {counts:{pending:count, queued:count, running:count, waiting:count, completed:count, failed:count,
    cancelled:count}, total:count}."""
    asked = query(*FILTERS, prefix="metadata.")
    asked.pop("status", None)
    counts = {}
    for status in STATUSES:
        number, more = Found(asked, statuses=[status]).count()
        counts[status] = {"count": number, "more": more}
    total = {"count": sum(c["count"] for c in counts.values()), "more": any(c["more"] for c in counts.values())}
    return reply(json.dumps({"counts": counts, "total": total}))


class ChangesBody(Body):
    """POST /changes"""

    query = Text(validate.Length(max=16_000), load_default="")
    known = fields.Dict(Text(ID), Text(validate.Length(max=100)), load_default=dict, validate=validate.Length(max=1000))


@routes.post("/changes")
def list_changes() -> Reply:
    """What is not as it was on a page of GET /runs; query: that page's query string, known: the version of each run
    that is on it.  200 {ids:[string], runs:[lightRun], nextCursor?:string}."""
    body = parse(ChangesBody)
    asked = query(*LIST_PARAMETERS, *FILTERS, prefix="metadata.", text=body["query"])
    runs, ids, cursor = list_runs({**asked, "view": "light"}, body["known"])
    return reply(f'{{"ids": {json.dumps(ids)}, "runs": {runs}, "nextCursor": {json.dumps(cursor)}}}')


FITS = {"cancel": ("pending", "queued", "running", "waiting"), "retry": ("failed", "cancelled"), "delete": ENDED}


class BulkBody(Body):
    """POST /bulk"""

    action = fields.Str(required=True, validate=validate.OneOf(list(FITS)))
    ids = fields.List(Text(ID), validate=validate.Length(1, MAX_BULK), load_default=None)
    filter = Text(validate.Length(max=16_000), load_default=None)
    dry_run = Flag(data_key="dryRun", load_default=False)
    expected = Whole(0, 10_000_000, load_default=None)
    cursor = Text(validate.Length(max=200), load_default=None)
    limit = Whole(1, BATCH, load_default=100)
    reason = Text(validate.Length(max=MAX_NAME), load_default=None)
    actor = Text(validate.Length(max=MAX_NAME), load_default=None)

    @marshmallow.validates_schema
    def _one_of_them(self, data: dict[str, Any], **_: Any) -> None:
        if (data.get("ids") is None) == (data.get("filter") is None):
            raise marshmallow.ValidationError("must be there, or else filter", "ids")


@routes.post("/bulk")
def act_on_many() -> Reply:
    """Cancel, retry or delete many runs: by id, or all that a query string of GET /runs finds and that the action fits,
    the newest first. With dryRun it says how many, and from where on; without, it acts on one batch, and cursor is what
    to send for the next.  200 {action, count:int, more, cursor?:string, sample:[lightRun]}
    or {action, results:[bulkResult], cursor?:string}, 409 count_changed."""
    body = parse(BulkBody)
    if body["ids"] is not None:
        at = whole_of("cursor", body["cursor"] or "0", MAX_BULK)
        if body["dry_run"]:
            return _dry_run(body, len(body["ids"]), False, body["ids"], "0")
        _check_expected(body, len(body["ids"]), False)
        ids = body["ids"][at : at + body["limit"]]
        rest = at + len(ids)
        return _act(body, ids, str(rest) if rest < len(body["ids"]) else None)
    asked = query(*LIST_PARAMETERS, *FILTERS, prefix="metadata.", text=body["filter"])
    runs = Found(asked, statuses=FITS[body["action"]])
    if body["dry_run"]:
        number, more = runs.count()
        _, ids, _ = runs.page(5, None)
        newest = core().database.select("select (extract(epoch from created_at) * 1000)::bigint + 1 from tidebase.runs"
                                        " where id = %s", ids[:1]) if ids else []
        start = f"{newest[0][0]}_0" if newest else None
        return _dry_run(body, number, more, ids, start)
    if body["expected"] is not None:
        _check_expected(body, *runs.count())
    _, ids, cursor = runs.page(body["limit"], cursor_from("cursor", body["cursor"]))
    return _act(body, ids, cursor)


def _dry_run(body: dict[str, Any], number: int, more: bool, ids: list[str], cursor: str | None) -> Reply:
    sample, _ = core().database.read("_list_runs", ids[:5], True, core().traces.queues())
    return reply(f'{{"action": {json.dumps(body["action"])}, "count": {number}, "more": {json.dumps(more)}, '
                 f'"cursor": {json.dumps(cursor)}, "sample": {sample}}}')


def _check_expected(body: dict[str, Any], number: int, more: bool) -> None:
    if body["expected"] not in (None, number):
        raise Refusal(409, "count_changed", f"{number} runs fit by now, not {body['expected']}", count=number,
                      more=more)


def _act(body: dict[str, Any], ids: list[str], cursor: str | None) -> Reply:
    """Each run in a transaction of its own: one that is refused does not touch the others."""
    results = []
    for run_id in ids:
        arguments = (body["reason"], body["actor"]) if body["action"] == "cancel" else ()
        try:
            text, _ = core().database.call(f"{body['action']}_run", run_id, *arguments)
            run = json.loads(text or "{}").get("run") or {}
            results.append({"id": run_id, "ok": True, "status": run.get("status"), "code": None, "error": None})
        except psycopg.Error as error:
            answer = database_refused(error) if is_refusal(error) else None
            if answer is None:
                raise
            refused = json.loads(answer[0])
            results.append({"id": run_id, "ok": False, "status": None, "code": refused["code"],
                            "error": refused["error"]})
    core().wrote()
    return reply(json.dumps({"action": body["action"], "results": results, "cursor": cursor}))


@routes.delete("/runs/<part:run_id>")
def delete_run(run_id: str) -> Reply:
    """Delete a run that ended, with all that belongs to it.  200 {deleted}, 404, 409 run_not_ended."""
    return call("delete_run", run_id)


# ------------------------------------------------------------------------------
# A run in pieces.
# ------------------------------------------------------------------------------
@routes.get("/runs/<part:run_id>/rerun")
def rerun_plan(run_id: str) -> Reply:
    """What a resume would do now, step by step, and whether that is safe.  200 rerunPlan, 404."""
    query()
    return reply(core().database.read("rerun_plan", run_id)[0] or "")


@routes.get("/runs/<part:run_id>/summary")
def summary(run_id: str) -> Reply:
    """Its head: without payloads, with what it cost, its children included.  200 runSummary, 404."""
    query()
    return found(core().database.read("run_summary", run_id, core().traces.queues())[0], run_id)


@routes.get("/runs/<part:run_id>/steps")
def list_steps(run_id: str) -> Reply:
    """Its steps by position, without payloads.  ?after:int (a nextCursor) ?limit:1..1000=200 ?status (several by comma)
    ?text (of a name) ?errors:true|false  200 {steps:[lightStep], nextCursor?:int}, 404."""
    asked = query("after", "limit", "status", "text", "errors")
    after = asked.get("after", "-2147483648")  # a fork's copies stand before 0
    if not re.fullmatch(r"-?\d{1,10}", after, re.ASCII) or abs(int(after)) > 2**31:
        raise invalid("after", "must be a nextCursor")
    statuses = asked["status"].split(",") if asked.get("status") else None
    errors = choice_of("errors", asked.get("errors"), ("true", "false"), "false") == "true"
    limit = whole_of("limit", asked.get("limit", "200"), 1000, 1)
    return found(core().database.read("list_steps", run_id, int(after), limit, statuses, asked.get("text"), errors)[0],
                 run_id)


PAYLOADS: list[str] = openapi.BY_NAME["payloadKind"]["enum"]


@routes.get("/runs/<part:run_id>/payload")
def get_payload(run_id: str) -> Reply:
    """One payload as the text that is stored, to the letter; x-tidebase-bytes and x-tidebase-characters are the size of
    all of it, of which offset and limit take a part, by characters.
    ?of:payloadKind=input
    ?id (of what has it) ?offset:0..2147483647=0 ?limit:1..16777216 (else all, to be saved as a file)  200 text, 404."""
    asked = query("of", "id", "offset", "limit")
    of, whose = choice_of("of", asked.get("of"), PAYLOADS, "input"), asked.get("id", "")
    if of == "event":
        whole_of("id", whose, 2**31 - 1)
    offset = whole_of("offset", asked.get("offset", "0"), 2**31 - 1)
    limit = whole_of("limit", asked["limit"], 1 << 24, 1) if "limit" in asked else None
    [(part, size, characters)] = core().database.select(
        "select * from tidebase.get_payload(%s, %s, %s, %s, %s, %s)",
        (run_id, of, whose, offset, limit, not reads_only()))
    if part is None:
        raise Refusal(404, "not_found", f"run {run_id} has no such payload")
    headers = {"Content-Type": "text/plain; charset=utf-8", "x-tidebase-bytes": str(size),
               "x-tidebase-characters": str(characters), "X-Content-Type-Options": "nosniff"}
    if limit is None:
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{run_id}.{of}{'.' + whose if whose else ''}")
        headers["Content-Disposition"] = f'attachment; filename="{name[:150]}.json"'
    return part, 200, headers


@routes.get("/runs/<part:run_id>/tree")
def tree(run_id: str) -> Reply:
    """The run and all that descends from it, generation by generation.  ?limit:1..1000=200
    200 {root:string, runs:[treeRun], truncated:bool}, 404."""
    limit = whole_of("limit", query("limit").get("limit", "200"), 1000, 1)
    return found(core().database.read("run_tree", run_id, limit, core().traces.queues())[0], run_id)


@routes.get("/runs/<part:run_id>/deliveries")
def list_deliveries(run_id: str) -> Reply:
    """Its webhooks, newest first.  ?before:int (a nextCursor) ?limit:1..1000=100
    200 {deliveries:[lightDelivery], nextCursor?:int}, 404."""
    asked = query("before", "limit")
    before = asked.get("before", str(2**62))
    if not re.fullmatch(r"\d{1,19}", before, re.ASCII) or int(before) > 2**62:
        raise invalid("before", "must be a nextCursor")
    limit = whole_of("limit", asked.get("limit", "100"), 1000, 1)
    return found(core().database.read("list_deliveries", run_id, int(before), limit)[0], run_id)


@routes.post("/runs/<part:run_id>/deliveries/<part:delivery_id>/resend")
def resend_delivery(run_id: str, delivery_id: str) -> Reply:
    """Send a webhook once more, under the same id; one that is still being tried stays as it is.
    200 {delivery:lightDelivery}, 404."""
    parse(Body)
    return call("resend_delivery", run_id, delivery_id)


@routes.get("/runs/<part:run_id>/signals")
def list_signals(run_id: str) -> Reply:
    """Its signals, the last ones last, long payloads left out.  200 {signals:[lightSignal]}, 404."""
    query()
    return found(core().database.read("list_signals", run_id)[0], run_id)


@routes.get("/runs/<part:run_id>/usage")
def run_usage(run_id: str) -> Reply:
    """What it cost: its newest entries, and sums by model.  ?subtree:true|false=false (with all that descends from it)
    ?limit:1..1000=200  200 {usage:[lightUsage], byModel:[usageGroup], truncated:bool}, 404."""
    asked = query("subtree", "limit")
    subtree = choice_of("subtree", asked.get("subtree"), ("true", "false"), "false") == "true"
    limit = whole_of("limit", asked.get("limit", "200"), 1000, 1)
    return found(core().database.read("run_usage", run_id, subtree, limit)[0], run_id)


# ------------------------------------------------------------------------------
# Approvals.
# ------------------------------------------------------------------------------
@routes.get("/approvals")
def list_approvals() -> Reply:
    """What waits for a person, over all runs, oldest first: gates, and steps to be reviewed; or the gates that were
    decided, newest first.  ?status:pending|decided=pending ?limit:1..200=50 ?after (a nextCursor)
    200 {items:[approval], count:int, more, nextCursor?:string}."""
    asked = query("status", "limit", "after")
    decided = choice_of("status", asked.get("status"), ("pending", "decided"), "pending") == "decided"
    at, whose = None, None
    if after := asked.get("after"):
        when, _, whose = after.partition("_")
        if not whose:
            raise invalid("after", "must be a nextCursor")
        at = time_of("after", when)
    limit = whole_of("limit", asked.get("limit", "50"), 200, 1)
    text, _ = core().database.read("list_approvals", decided, limit, at, whose, not reads_only())
    return reply(text or "")


class LookBody(Body):
    """POST /runs/:id/gates/:gateId/look"""

    token = Text(required=True)


@routes.post("/runs/<part:run_id>/gates/<part:gate_id>/look")
def look_at_gate(run_id: str, gate_id: str) -> Reply:
    """A gate and how its run is, for who has its token alone.  200 {gate:seenGate}, 409 gate_token_wrong."""
    text, _ = core().database.read("look_at_gate", run_id, gate_id, parse(LookBody)["token"])
    return reply(text or "")


# ------------------------------------------------------------------------------
# Queues, workers, schedules, costs.
# ------------------------------------------------------------------------------
@routes.get("/queues/<part:queue>/minutes")
def list_minutes(queue: str) -> Reply:
    """Claims and failures of the last hour, minute by minute.
    200 {queue:string, now:time, minutes:[{at:time, claims:int, failures:int}]}."""
    query()
    return reply(core().database.read("list_minutes", queue)[0] or "")


@routes.get("/workers")
def list_workers() -> Reply:
    """Who asks for work or holds runs, the last heard first.  200 {workers:[worker], now:time}."""
    query()
    return reply(core().database.read("list_workers", core().traces.workers())[0] or "")


class PreviewBody(Body):
    """POST /schedules/preview"""

    cron = Text(required=True)
    timezone = Text(load_default="UTC")


@routes.post("/schedules/preview")
def preview_schedule() -> Reply:
    """When a cron expression fires next: five times, fewer when it fires no more.  200 {next:[time]}."""
    body, times = parse(PreviewBody), list[str]()
    [(at,)] = core().database.select("select tidebase.now()", ())
    try:
        while len(times) < 5 and (at := next_fire(body["cron"], body["timezone"], at)) is not None:
            times.append(at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"))
    except ValueError as error:
        raise invalid("timezone" if "time zone" in str(error) else "cron", str(error)) from None
    return reply(json.dumps({"next": times}))


class RunScheduleBody(Body):
    """POST /schedules/:name/run"""

    id = Text(ID, load_default=None)


@routes.post("/schedules/<part:name>/run")
def run_schedule(name: str) -> Reply:
    """Enqueue its run now, beside the times it fires at.  200 {run}, 404, 409 run_id_conflict."""
    return call("run_schedule", name, parse(RunScheduleBody)["id"])


def as_csv(groups: list[dict[str, Any]]) -> Reply:
    """Groups of the ledger as a file for a spreadsheet; numbers as they are stored."""
    out = io.StringIO()
    writer = csv.writer(out)
    if groups:
        writer.writerow(groups[0])
        for group in groups:
            # A spreadsheet would take such a name for a formula.
            writer.writerow(["'" + value if isinstance(value, str) and re.match("[=+@\t\r-]", value) else value
                             for value in group.values()])
    return out.getvalue(), 200, {"Content-Type": "text/csv; charset=utf-8", "X-Content-Type-Options": "nosniff",
                                 "Content-Disposition": 'attachment; filename="costs.csv"'}
