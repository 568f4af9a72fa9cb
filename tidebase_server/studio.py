"""The server's part of Studio, the web page: its files, and the routes that only the page uses.

Most routes read: lists, counts and parts of runs, without payloads unless one is requested. The few writes call
functions of schema.sql, which decide. filters.py has the filters of lists.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import flask
import psycopg

from . import bodies, openapi
from .answers import Refusal, Reply, database_refused, invalid, is_refusal, reply
from .filters import ENDED, FILTERS, LIST_PARAMETERS, STATUSES, Found, cursor_from, list_runs
from .request import call, choice_of, core, flag_of, found, parse, query, reads_only, time_of, whole_of

FOLDER = Path(__file__).resolve().parent.parent / "studio"
MEDIA = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
         ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                                "img-src 'self'; frame-ancestors 'none'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser may keep a file, and asks each time whether its ETag is still the same
}


# ------------------------------------------------------------------------------
# Files: the page itself. They need no key; the routes that the page calls do.
# ------------------------------------------------------------------------------
routes = flask.Blueprint("studio", __name__)


class File(NamedTuple):
    """A file of the page; changed: its modification time in ns; tag: its ETag."""

    changed: int
    content: bytes
    tag: str


_files: dict[Path, File] = {}  # the files that were requested; a file is read again when it has changed


def read_file(name: str) -> File | None:
    """The file of this name in FOLDER; None when there is none, or when the name is not a plain file name."""
    if not re.fullmatch(r"[a-z]+\.[a-z]+", name) or Path(name).suffix not in MEDIA:
        return None
    path = FOLDER / name
    try:
        changed = path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    if path not in _files or _files[path].changed != changed:
        content = path.read_bytes()
        _files[path] = File(changed, content, hashlib.sha256(content).hexdigest())
    return _files[path]


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
    is_file = "/" not in name and Path(name).suffix in MEDIA
    file = read_file(name if is_file else "index.html")
    if file is None:
        raise Refusal(404, "not_found", "there is no such file" if is_file else
                      "the folder studio/ is missing beside tidebase.py")
    content, tag = file.content, file.tag
    if name == "icon.svg" and (number := whole_of("n", flask.request.args.get("n", "0"), 100_000)):
        content = content.replace(b"</svg>", badge(number).encode() + b"</svg>")
        tag = f"{tag}-{number}"
    response = flask.Response(content, headers=HEADERS, content_type=MEDIA[Path(name).suffix if is_file else ".html"])
    response.set_etag(tag)
    return response.make_conditional(flask.request)


def badge(number: int) -> str:
    """SVG of a number in the corner of an icon of 32 by 32."""
    text = str(number) if number < 100 else "99+"
    return (f'<rect x="{30 - 7 * len(text)}" y="15" width="{2 + 7 * len(text)}" height="17" rx="5" fill="#d0342c"/>'
            f'<text x="{31 - 3.5 * len(text)}" y="28" font-family="sans-serif" font-size="12" font-weight="700"'
            f' text-anchor="middle" fill="#fff">{text}</text>')


# ------------------------------------------------------------------------------
# Runs: lists, counts, what changed, and one action for many.
# ------------------------------------------------------------------------------
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


@routes.post("/changes")
def list_changes() -> Reply:
    """What is not as it was on a page of GET /runs; query: that page's query string, known: the version of each run
    that is on it.  200 {ids:[string], runs:[lightRun], nextCursor?:string}."""
    body = parse(bodies.ChangesBody)
    asked = query(*LIST_PARAMETERS, *FILTERS, prefix="metadata.", text=body["query"])
    runs, ids, cursor = list_runs({**asked, "view": "light"}, body["known"])
    return reply(f'{{"ids": {json.dumps(ids)}, "runs": {runs}, "nextCursor": {json.dumps(cursor)}}}')


FITS = {"cancel": ("pending", "queued", "running", "waiting"), "retry": ("failed", "cancelled"), "delete": ENDED}


@routes.post("/bulk")
def act_on_many() -> Reply:
    """Cancel, retry or delete many runs: by id, or all that a query string of GET /runs finds and that the action fits,
    the newest first. With dryRun it says how many, and from where on; without, it acts on one batch, and cursor is what
    to send for the next.  200 {action, count:int, more, cursor?:string, sample:[lightRun]}
    or {action, results:[bulkResult], cursor?:string}, 409 count_changed."""
    body = parse(bodies.BulkBody)
    if body["ids"] is not None:
        at = whole_of("cursor", body["cursor"] or "0", bodies.MAX_BULK)
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
    sample, _ = core().database.read("_list_runs", ids=ids[:5], light=True, asked=core().recent_claims.queues())
    return reply(f'{{"action": {json.dumps(body["action"])}, "count": {number}, "more": {json.dumps(more)}, '
                 f'"cursor": {json.dumps(cursor)}, "sample": {sample}}}')


def _check_expected(body: dict[str, Any], number: int, more: bool) -> None:
    if body["expected"] not in (None, number):
        raise Refusal(409, "count_changed", f"{number} runs fit by now, not {body['expected']}", count=number,
                      more=more)


def _act(body: dict[str, Any], ids: list[str], cursor: str | None) -> Reply:
    """Act on each run in a transaction of its own: a refusal leaves the other runs' results as they are."""
    results = []
    for run_id in ids:
        arguments = {name: body[name] for name in ("reason", "actor")} if body["action"] == "cancel" else {}
        try:
            text, _ = core().database.call(f"{body['action']}_run", run_id=run_id, **arguments)
            run = json.loads(text or "{}").get("run") or {}
            results.append({"id": run_id, "ok": True, "status": run.get("status"), "code": None, "error": None})
        except psycopg.Error as error:
            answer = database_refused(error, core().database) if is_refusal(error) else None
            if answer is None:
                raise
            refused = json.loads(answer[0])
            results.append({"id": run_id, "ok": False, "status": None, "code": refused["code"],
                            "error": refused["error"]})
    core().notify()
    return reply(json.dumps({"action": body["action"], "results": results, "cursor": cursor}))


@routes.delete("/runs/<part:run_id>")
def delete_run(run_id: str) -> Reply:
    """Delete a run that ended, with all that belongs to it.  200 {deleted}, 404, 409 run_not_ended."""
    return call("delete_run", run_id=run_id)


# ------------------------------------------------------------------------------
# A run in pieces.
# ------------------------------------------------------------------------------
@routes.get("/runs/<part:run_id>/rerun")
def rerun_plan(run_id: str) -> Reply:
    """What a resume would do now, step by step, and whether that is safe.  200 rerunPlan, 404."""
    query()
    return reply(core().database.read("rerun_plan", run_id=run_id)[0] or "")


@routes.get("/runs/<part:run_id>/summary")
def summary(run_id: str) -> Reply:
    """Its head: without payloads, with what it cost, its children included.  200 runSummary, 404."""
    query()
    return found(core().database.read("run_summary", run_id=run_id, asked=core().recent_claims.queues())[0], run_id)


@routes.get("/runs/<part:run_id>/steps")
def list_steps(run_id: str) -> Reply:
    """Its steps by position, without payloads.  ?after:int (a nextCursor) ?limit:1..1000=200 ?status (several by comma)
    ?text (of a name) ?errors:true|false  200 {steps:[lightStep], nextCursor?:int}, 404."""
    asked = query("after", "limit", "status", "text", "errors")
    after = asked.get("after", "-2147483648")  # a fork's copies stand before 0
    if not re.fullmatch(r"-?\d{1,10}", after, re.ASCII) or abs(int(after)) > 2**31:
        raise invalid("after", "must be a nextCursor")
    statuses = asked["status"].split(",") if asked.get("status") else None
    errors = flag_of("errors", asked.get("errors"))
    limit = whole_of("limit", asked.get("limit", "200"), 1000, 1)
    return found(core().database.read("list_steps", run_id=run_id, after=int(after), limit=limit, statuses=statuses,
                                      text=asked.get("text"), errors=errors)[0], run_id)


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
    return found(core().database.read(
        "run_tree", run_id=run_id, limit=limit, asked=core().recent_claims.queues())[0], run_id)


@routes.get("/runs/<part:run_id>/deliveries")
def list_deliveries(run_id: str) -> Reply:
    """Its webhooks, newest first.  ?before:int (a nextCursor) ?limit:1..1000=100
    200 {deliveries:[lightDelivery], nextCursor?:int}, 404."""
    asked = query("before", "limit")
    before = asked.get("before", str(2**62))
    if not re.fullmatch(r"\d{1,19}", before, re.ASCII) or int(before) > 2**62:
        raise invalid("before", "must be a nextCursor")
    limit = whole_of("limit", asked.get("limit", "100"), 1000, 1)
    return found(core().database.read("list_deliveries", run_id=run_id, before=int(before), limit=limit)[0], run_id)


@routes.post("/runs/<part:run_id>/deliveries/<part:delivery_id>/resend")
def resend_delivery(run_id: str, delivery_id: str) -> Reply:
    """Send a webhook once more, under the same id; one that is still being tried stays as it is.
    200 {delivery:lightDelivery}, 404."""
    parse(bodies.Body)
    return call("resend_delivery", run_id=run_id, delivery_id=delivery_id)


@routes.get("/runs/<part:run_id>/signals")
def list_signals(run_id: str) -> Reply:
    """Its signals, the last ones last, long payloads left out.  200 {signals:[lightSignal]}, 404."""
    query()
    return found(core().database.read("list_signals", run_id=run_id)[0], run_id)


@routes.get("/runs/<part:run_id>/usage")
def run_usage(run_id: str) -> Reply:
    """What it cost: its newest entries, and sums by model.  ?subtree:true|false=false (with all that descends from it)
    ?limit:1..1000=200  200 {usage:[lightUsage], byModel:[usageGroup], truncated:bool}, 404."""
    asked = query("subtree", "limit")
    subtree = flag_of("subtree", asked.get("subtree"))
    limit = whole_of("limit", asked.get("limit", "200"), 1000, 1)
    return found(core().database.read("run_usage", run_id=run_id, subtree=subtree, limit=limit)[0], run_id)


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
    text, _ = core().database.read("list_approvals", decided=decided, limit=limit, after_at=at, after_id=whose,
                                      tokens=not reads_only())
    return reply(text or "")


@routes.post("/runs/<part:run_id>/gates/<part:gate_id>/look")
def look_at_gate(run_id: str, gate_id: str) -> Reply:
    """A gate and how its run is, for who has its token alone.  200 {gate:seenGate}, 409 gate_token_wrong."""
    text, _ = core().database.read("look_at_gate", run_id=run_id, gate_id=gate_id, **parse(bodies.LookBody))
    return reply(text or "")


# ------------------------------------------------------------------------------
# Queues, workers, schedules, costs.
# ------------------------------------------------------------------------------
@routes.get("/queues/<part:queue>/minutes")
def list_minutes(queue: str) -> Reply:
    """Claims and failures of the last hour, minute by minute.
    200 {queue:string, now:time, minutes:[{at:time, claims:int, failures:int}]}."""
    query()
    return reply(core().database.read("list_minutes", queue=queue)[0] or "")


@routes.get("/workers")
def list_workers() -> Reply:
    """Who asks for work or holds runs, the last heard first.  200 {workers:[worker], now:time}."""
    query()
    return reply(core().database.read("list_workers", workers=core().recent_claims.workers())[0] or "")


@routes.post("/schedules/<part:name>/run")
def run_schedule(name: str) -> Reply:
    """Enqueue its run now, beside the times it fires at.  200 {run}, 404, 409 run_id_conflict."""
    return call("run_schedule", name=name, **parse(bodies.RunScheduleBody))


def as_csv(groups: list[dict[str, Any]]) -> Reply:
    """The ledger's groups as CSV, with the numbers as they are stored."""
    out = io.StringIO()
    writer = csv.writer(out)
    if groups:
        writer.writerow(groups[0])
        for group in groups:
            # A spreadsheet would run a name that begins so as a formula.
            writer.writerow(["'" + value if isinstance(value, str) and re.match("[=+@\t\r-]", value) else value
                             for value in group.values()])
    return out.getvalue(), 200, {"Content-Type": "text/csv; charset=utf-8", "X-Content-Type-Options": "nosniff",
                                 "Content-Disposition": 'attachment; filename="costs.csv"'}
