"""Fills a database for Studio: for its tests, for screenshots, and to see how it does with a lot.

    python tests/seed_studio.py mixture URL DATABASE_URL     two weeks of runs, and of everything that may wait one
    python tests/seed_studio.py many DATABASE_URL [COUNT]    100,000 runs of all statuses
    python tests/seed_studio.py long DATABASE_URL            one run of 1,000 steps and 5,000 events

The past is written by SQL, since nobody waits two weeks; what is alive is made through the server at URL, as workers
do, and then moved back in time. The same seed gives the same mixture.
"""

from __future__ import annotations

import json
import random
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import psycopg

SEED = 20260612
DAYS = 14
RUNS_A_DAY = 36
DEAD_END = "http://127.0.0.1:9/hook"  # nobody listens there
HELD_MS = 86_400_000  # the lease of what is shown at work: nobody renews it while somebody looks at the page

WORKFLOWS: dict[str, tuple[str, list[tuple[str, float, str | None]]]] = {
    # its queue, and its steps: name, seconds, the model that they ask
    "research-report": ("reports", [
        ("plan", 3.2, "claude-sonnet-4-5"), ("search", 6.5, None), ("read sources", 14.0, "gpt-5-mini"),
        ("draft", 21.0, "claude-sonnet-4-5"), ("review", 8.0, "claude-opus-4-5"), ("publish", 1.1, None)]),
    "invoice-extraction": ("invoices", [
        ("fetch", 0.8, None), ("read pages", 5.5, "gpt-5-mini"), ("check totals", 0.2, None), ("book", 1.4, None)]),
    "support-triage": ("mail", [
        ("classify", 1.2, "claude-haiku-4-5"), ("look up customer", 0.4, None), ("answer", 4.1, "claude-sonnet-4-5"),
        ("send", 0.7, None)]),
    "nightly-digest": ("default", [
        ("collect", 2.5, None), ("summarise", 9.0, "claude-haiku-4-5"), ("mail out", 1.0, None)]),
}
PRICES = {"claude-opus-4-5": (5.0, 25.0), "claude-sonnet-4-5": (3.0, 15.0), "claude-haiku-4-5": (1.0, 5.0),
          "gpt-5-mini": (0.25, 2.0)}  # dollars for a million tokens, in and out
EFFECTS = {"publish": ["publish"], "book": ["booking"], "send": ["mail"], "mail out": ["mail"]}
ERRORS = [
    {"name": "TimeoutError", "message": "the model did not answer within 60 s",
     "stack": 'Traceback (most recent call last):\n  File "agents/report.py", line 88, in draft\nTimeoutError'},
    {"name": "RateLimitError", "message": "429 Too Many Requests: retry after 20 s"},
    {"name": "ValidationError", "message": "totals do not add up: 1,204.50 is not 1,240.50"}]
PEOPLE = ["ann", "bo", "chris", "dana"]


class Server:
    """The server's verbs over HTTP."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url, self.key = url.rstrip("/"), key

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        fields = {"content-type": "application/json", **headers} | (
            {"authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, fields, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.code} {error.read().decode()[:500]}") from None

    def post(self, path: str, **body: Any) -> Any:
        return self.ask("POST", path, body)

    def enqueue(self, queue: str, workflow: str, **body: Any) -> str:
        return str(self.post(f"/queues/{queue}/enqueue", workflowName=workflow, **body)["run"]["id"])

    def claim(self, queue: str, owner: str, limit: int = 1) -> list[str]:
        return [run["id"] for run in self.post("/queues/claim", queues=[queue], leaseOwner=owner, limit=limit)["runs"]]

    def step(self, run: str, name: str, owner: str, output: Any = None, **options: Any) -> str:
        """Begin a step and, unless output is left out by `...`, complete it."""
        begun = self.post(f"/runs/{run}/steps/begin", name=name, inputHash="seed", input={"run": run}, options=options,
                          leaseOwner=owner)["step"]["id"]
        if output is not ...:
            self.post(f"/runs/{run}/steps/{begun}/complete", leaseOwner=owner, output=output)
        return str(begun)

    def gate(self, run: str, name: str, prompt: str, data: Any, **more: Any) -> str:
        return str(self.post(f"/runs/{run}/gates/begin", name=name, prompt=prompt, data=data, **more)["gate"]["id"])

    def wait(self, run: str, owner: str, wait_for: Any, **more: Any) -> None:
        self.ask("POST", f"/runs/{run}/wait", {"leaseOwner": owner, "for": wait_for, **more})


def connect(conninfo: str) -> psycopg.Connection[Any]:
    return psycopg.connect(conninfo, autocommit=True)


def new_id(prefix: str, at: datetime, chance: random.Random) -> str:
    """As Tidebase makes them: in the order of time."""
    return f"{prefix}_{int(at.timestamp() * 1000):012x}7{chance.getrandbits(76):019x}"


def iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ------------------------------------------------------------------------------
# The past.
# ------------------------------------------------------------------------------
class Story:
    """Rows of runs that ended, gathered to be copied."""

    COLUMNS: ClassVar = {
        "runs": "id, workflow_name, input, metadata, status, result, error, failure_class, queue, run_at, max_attempts,"
                " attempt, event_seq, cancelled_at, cancel_reason, cancel_actor, created_at, updated_at, completed_at",
        "steps": "id, run_id, name, position, input_hash, input, options, contract, status, output, error, attempt,"
                 " started_at, completed_at, created_at, updated_at",
        "events": "run_id, seq, type, payload, created_at",
        "usage": "id, run_id, step_id, kind, provider, model, label, input_tokens, output_tokens, total_tokens,"
                 " cost_usd, created_at",
        "queue_tallies": "queue, status, runs"}

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.rows: dict[str, list[tuple[Any, ...]]] = {table: [] for table in self.COLUMNS}

    def copy(self, connection: psycopg.Connection[Any]) -> None:
        for table, columns in self.COLUMNS.items():
            statement = psycopg.sql.SQL("copy tidebase.{} ({}) from stdin").format(
                psycopg.sql.Identifier(table), psycopg.sql.SQL(columns))
            with connection.cursor().copy(statement) as copy:
                for row in self.rows[table]:
                    copy.write_row(row)

    def tell(self, workflow: str, at: datetime, ending: str, crashes: bool = False) -> str:
        """A run that came on its queue at that time, and how it ended: completed, failed or cancelled."""
        chance, (queue, steps) = self.chance, WORKFLOWS[workflow]
        run, created, attempt, seq = new_id("run", at, chance), at, 1, 0
        worker = f"worker-{chance.randint(1, 4)}"

        def event(type: str, payload: Any) -> None:
            nonlocal seq
            seq += 1
            self.rows["events"].append((run, seq, type, json.dumps(payload), at))

        def after(seconds: float) -> None:
            nonlocal at
            at += timedelta(milliseconds=int(seconds * 1000 * chance.uniform(0.6, 1.6)))

        event("run.enqueued", {"queue": queue, "runAt": iso(at)})
        after(1.5)
        event("run.claimed", {"leaseOwner": worker, "queue": queue, "attempt": attempt})
        last = len(steps) if ending == "completed" else chance.randint(1, len(steps))
        crash_at = chance.randint(1, last) - 1 if crashes else -1
        error = chance.choice(ERRORS)
        for number, (name, seconds, model) in enumerate(steps[:last]):
            step, begun, tries = new_id("step", at, chance), at, 1
            contract = {"sideEffects": EFFECTS.get(name, []), "idempotencyKey": run if name in EFFECTS else None,
                        "replay": "auto", "checkpointInvariant": None, "verifiedBy": None, "credentials": []}
            started = {"stepId": step, "name": name, "resumeContract": contract}
            event("step.started", {**started, "attempt": 1})
            position = seq
            if number == crash_at:
                after(60)
                attempt, tries = 2, 2
                event("run.requeued", {"error": {"name": "LeaseExpired", "message": "the worker fell silent"},
                                       "attempt": 1, "maxAttempts": 3, "nextRunAt": iso(at), "reason": "lease_expired"})
                after(1)
                worker = f"worker-{chance.randint(5, 8)}"
                event("run.claimed", {"leaseOwner": worker, "queue": queue, "attempt": 2})
                event("step.started", {**started, "attempt": 2})
            begun = at
            after(seconds)
            fails = ending == "failed" and number == last - 1
            if fails:
                event("step.failed", {"stepId": step, "name": name, "retryable": False, "resumeDecision": "fail_hard",
                                      "resumeContract": contract, "error": error})
            else:
                event("step.completed", {"stepId": step, "name": name, "checkpointInvariant": None, "verifiedBy": None})
            if model:
                into, out = chance.randint(800, 24_000), chance.randint(100, 3_000)
                cost = round((into * PRICES[model][0] + out * PRICES[model][1]) / 1_000_000, 6)
                self.rows["usage"].append((
                    new_id("use", at, chance), run, step, "llm", "anthropic" if "claude" in model else "openai", model,
                    name, into, out, into + out, cost, at))
            self.rows["steps"].append((
                step, run, name, position, "seed", json.dumps({"topic": "seed", "n": number}), "{}",
                json.dumps(contract), "failed" if fails else "completed",
                None if fails else json.dumps({"step": name, "words": chance.randint(20, 4000)}),
                json.dumps(error) if fails else None, tries, begun, at, begun, at))
        after(0.3)
        cancelled = ending == "cancelled"
        event(f"run.{ending}", {"completed": {"result": {"ok": True}}, "failed": {
            "error": error, "failureClass": "max_retries"}, "cancelled": {"reason": "no longer needed",
                                                                          "actor": "ann"}}[ending])
        self.rows["runs"].append((
            run, workflow, json.dumps({"topic": chance.choice(["asyncio", "postgres", "batteries", "tides"])}),
            json.dumps({"customer": f"c-{chance.randint(1, 40)}", "region": chance.choice(["eu", "us"])}), ending,
            json.dumps({"ok": True, "words": chance.randint(200, 4000)}) if ending == "completed" else None,
            json.dumps(error) if ending == "failed" else None, "max_retries" if ending == "failed" else None, queue,
            created, 3, attempt, seq, at if cancelled else None, "no longer needed" if cancelled else None,
            chance.choice(PEOPLE) if cancelled else None, created, at, at))
        self.rows["queue_tallies"].append((queue, ending, 1))
        return run


def past(connection: psycopg.Connection[Any], chance: random.Random) -> None:
    """Two weeks of runs that ended; less at night and at the weekend, with a crash now and then."""
    story, now = Story(chance), datetime.now(UTC)
    for day in range(DAYS, 0, -1):
        start = now - timedelta(days=day)
        busy = 0.35 if start.weekday() >= 5 else 1.0
        for _ in range(int(RUNS_A_DAY * busy * chance.uniform(0.8, 1.2))):
            at = start + timedelta(hours=min(23.0, max(0.0, chance.gauss(13, 4))), seconds=chance.uniform(0, 3000))
            if at < now - timedelta(minutes=10):
                ending = chance.choices(["completed", "failed", "cancelled"], [90, 7, 3])[0]
                story.tell(chance.choice(list(WORKFLOWS)), at, ending, crashes=chance.random() < 0.08)
    story.tell("research-report", now - timedelta(minutes=9), "completed", crashes=True)
    story.copy(connection)
    connection.execute("""
        insert into tidebase.queue_minutes (queue, minute, claims, failures)
        select queue, date_trunc('minute', now()) - n * interval '1 minute', (abs(hashtext(queue || n)) % 9), case
                 when abs(hashtext(n || queue)) % 11 = 0 then 1 else 0 end
          from unnest(array['reports', 'mail', 'invoices']) as queue, generate_series(1, 58) n""")


# ------------------------------------------------------------------------------
# The present.
# ------------------------------------------------------------------------------
def age(connection: psycopg.Connection[Any], run: str, **back: float) -> None:
    """Move a run, with all that belongs to it, back in time."""
    for table, columns in {"runs": "created_at run_at", "events": "created_at", "usage": "created_at",
                           "steps": "created_at started_at completed_at", "gates": "created_at",
                           "state_versions": "created_at", "outbox": "created_at"}.items():
        moved = psycopg.sql.SQL(", ").join(psycopg.sql.SQL("{0} = {0} - {1}::interval").format(
            psycopg.sql.Identifier(column), psycopg.sql.Literal(timedelta(**back))) for column in columns.split())
        connection.execute(psycopg.sql.SQL("update tidebase.{} set {} where {} = %s").format(
            psycopg.sql.Identifier(table), moved,
            psycopg.sql.Identifier("id" if table == "runs" else "run_id")), (run,))


def hold(connection: psycopg.Connection[Any], run: str, silent_s: float = 4) -> None:
    """Let a run's worker, last heard so long ago, keep it for a day."""
    connection.execute(
        "update tidebase.runs set lease_ms = %s, lease_expires_at = now() + %s where id = %s",
        (HELD_MS, timedelta(milliseconds=HELD_MS, seconds=-silent_s), run))


def present(server: Server, connection: psycopg.Connection[Any]) -> dict[str, Any]:
    """Something of everything that is alive.  :returns: the ids, by what they show."""
    ids: dict[str, Any] = {}
    configure = {"reports": {"concurrency": 3}, "mail": {"ratePerMinute": 2}, "imports": {"paused": True}}

    # A queue at its cap: three at work, four behind them.
    ids["running"] = [server.enqueue("reports", "research-report", input={"topic": topic}, metadata={
        "customer": f"c-{number}"}) for number, topic in enumerate(("asyncio", "postgres", "tides"))]
    for number, run in enumerate(ids["running"], 1):
        owner = f"worker-{number}"
        server.claim("reports", owner)
        server.step(run, "plan", owner, {"sections": 5})
        server.step(run, "search", owner, {"hits": 41})
        server.post(f"/runs/{run}/usage", kind="llm", provider="anthropic", model="claude-sonnet-4-5", label="plan",
                    inputTokens=4200, outputTokens=610, costUsd=0.02175)
        for percent in (10, 35, 50, 65, 80)[:number + 2]:
            server.ask("PATCH", f"/runs/{run}/state", {"value": {"progress": percent, "phase": "drafting"}})
        age(connection, run, minutes=2 * number)
        server.step(run, "draft", owner, ...)
        hold(connection, run, 4 * number)
    ids["capped"] = [server.enqueue("reports", "research-report", input={"topic": "queues"}) for _ in range(4)]

    # A rate, used up.
    mails = [server.enqueue("mail", "support-triage", input={"ticket": 900 + number}) for number in range(4)]
    for name, config in configure.items():
        server.ask("PUT", f"/queues/{name}/config", config)
    for run in server.claim("mail", "worker-4", 2):
        server.step(run, "classify", "worker-4", {"kind": "billing"})
        hold(connection, run)
    ids["rate_limited"] = mails[2:]

    ids["paused"] = server.enqueue("imports", "invoice-extraction")
    ids["nobody_asks"] = [server.enqueue("exports", "nightly-digest") for _ in range(3)]
    ids["scheduled"] = server.enqueue("invoices", "invoice-extraction", delayMs=5 * 3_600_000)
    ids["pending"] = server.post("/runs/research-report", input={"topic": "plain"})["run"]["id"]

    def taken(workflow: str, owner: str = "worker-6", **body: Any) -> str:
        """One that a worker has just begun."""
        run = server.enqueue("invoices", workflow, priority=100, **body)
        assert server.claim("invoices", owner) == [run]
        return run

    retrying = taken("invoice-extraction", maxAttempts=3)
    server.step(retrying, "fetch", "worker-6", {"pages": 3})
    server.post(f"/runs/{retrying}/fail", leaseOwner="worker-6", error=ERRORS[0])
    connection.execute("update tidebase.runs set run_at = now() + interval '4 min' where id = %s", (retrying,))
    ids["retry"] = retrying

    # Questions to people, some of them decided.
    ids["gates"] = []
    for number, (prompt, data, hours) in enumerate((
            ("Send this answer to 214 customers?", {"subject": "Your invoice", "recipients": 214, "preview":
             "Dear customer, the amount of your last invoice was wrong. We are sorry …"}, 26),
            ("Book 1,204.50 EUR to supplier 7?", {"supplier": 7, "amount": "1204.50", "currency": "EUR"}, 2),
            ("Publish the report on tides?", {"title": "Tides, explained", "words": 2140}, 0.4),
            ("Delete the test accounts of c-12?", {"accounts": ["t-1", "t-2", "t-3"]}, 0.05))):
        run = taken("support-triage" if number % 2 == 0 else "invoice-extraction", channels=[
            {"type": "webhook", "url": DEAD_END}] if number == 0 else [])
        server.step(run, "classify", "worker-6", {"kind": "mass mail"})
        server.post(f"/runs/{run}/usage", kind="llm", provider="openai", model="gpt-5-mini", inputTokens=2300,
                    outputTokens=400, costUsd=0.001375)
        server.ask("PUT", f"/runs/{run}/state", {"value": {"progress": 60, "draft": 2}})
        gate = server.gate(run, "approve", prompt, data, capability={"kind": "approve", "team": "support"})
        server.wait(run, "worker-6", {"gateId": gate})
        age(connection, run, hours=hours)
        ids["gates"].append((run, gate))
    decided = taken("support-triage")
    gate = server.gate(decided, "approve", "Refund 40 EUR to c-3?", {"amount": 40})
    token = server.ask("GET", f"/runs/{decided}/gates/{gate}")["gate"]["resolveToken"]
    server.post(f"/runs/{decided}/gates/{gate}/resolve", token=token, decision="approved", actor="ann",
                payload={"note": "ok"})
    server.post(f"/runs/{decided}/complete", leaseOwner="worker-6", result={"refunded": True})
    ids["decided"] = decided

    signal, sleeper = taken("invoice-extraction"), taken("nightly-digest")
    server.wait(signal, "worker-6", {"event": "paid"}, timeoutMs=3 * 86_400_000)
    server.wait(sleeper, "worker-6", {"until": iso(datetime.now(UTC) + timedelta(hours=9))})
    ids["signal"], ids["sleep"] = signal, sleeper

    # A parent that waits for the last 3 of its 40 children.
    parent = taken("research-report", input={"topic": "forty sources"})
    children = [server.post(f"/runs/{parent}/children", name=f"source-{n:02}", workflowName="read-source",
                            queue="sources", input={"n": n})["run"]["id"] for n in range(40)]
    for child in server.claim("sources", "worker-7", 37):
        server.step(child, "read", "worker-7", {"words": 800})
        server.post(f"/runs/{child}/usage", kind="llm", model="claude-haiku-4-5", provider="anthropic",
                    inputTokens=9000, outputTokens=300, costUsd=0.0105)
        server.post(f"/runs/{child}/complete", leaseOwner="worker-7", result={"ok": True})
    server.wait(parent, "worker-6", {"children": True})
    age(connection, parent, minutes=14)
    ids["parent"], ids["children"] = parent, children

    # Nobody's: the lease of a run without a queue ran out.
    stalled = server.post("/runs/research-report", input={"topic": "laptop"}, recoveryWebhook=DEAD_END)["run"]["id"]
    server.ask("POST", f"/runs/{stalled}/begin", {}, **{"x-tidebase-worker": "laptop-of-bo"})
    server.step(stalled, "plan", "laptop-of-bo", {"sections": 3})
    server.step(stalled, "draft", "laptop-of-bo", ...)
    age(connection, stalled, minutes=6)
    connection.execute("update tidebase.runs set lease_expires_at = now() - interval '40 s', stalled = true,"
                       " updated_at = now() - interval '40 s' where id = %s", (stalled,))
    ids["stalled"] = stalled

    # Steps of which nobody knows the outcome.
    doubtful = taken("support-triage", maxAttempts=1)
    server.step(doubtful, "classify", "worker-6", {"kind": "refund"})
    sent = server.step(doubtful, "send", "worker-6", ..., sideEffects=["mail"])
    server.post(f"/runs/{doubtful}/steps/{sent}/fail", leaseOwner="worker-6", error=ERRORS[0],
                resumeDecision="manual_review")
    server.post(f"/runs/{doubtful}/fail", leaseOwner="worker-6", error=ERRORS[0], failureClass="manual_review")
    ids["review"] = (doubtful, sent)
    plans = taken("invoice-extraction", maxAttempts=1)
    server.step(plans, "fetch", "worker-6", {"pages": 3})
    server.step(plans, "read pages", "worker-6", ...)
    server.step(plans, "charge", "worker-6", ..., sideEffects=["charge"], idempotencyKey="invoice-900")
    server.step(plans, "send", "worker-6", ..., sideEffects=["mail"])
    server.step(plans, "wipe", "worker-6", ..., sideEffects=["wipe"], replay="never")
    server.post(f"/runs/{plans}/fail", leaseOwner="worker-6", error=ERRORS[2], retryable=False)
    ids["plans"] = plans

    for name, cron, workflow in (("nightly digest", "0 3 * * *", "nightly-digest"),
                                 ("weekly report", "30 8 * * 1", "research-report"),
                                 ("hourly import", "5 * * * *", "invoice-extraction")):
        server.ask("PUT", f"/schedules/{urllib.parse.quote(name)}", {
            "cron": cron, "workflowName": workflow, "queue": WORKFLOWS[workflow][0], "timezone": "Europe/Berlin",
            "enabled": name != "hourly import"})
    return ids


def mixture(url: str, conninfo: str, key: str = "") -> dict[str, Any]:
    """All of it.  :returns: the ids of what is alive, by what they show."""
    with connect(conninfo) as connection:
        past(connection, random.Random(SEED))
        return present(Server(url, key), connection)


# ------------------------------------------------------------------------------
# A lot.
# ------------------------------------------------------------------------------
def many(conninfo: str, count: int = 100_000) -> None:
    """So many runs, a second apart: most completed, with an event each."""
    with connect(conninfo) as connection:
        connection.execute("""
            insert into tidebase.runs (id, workflow_name, status, queue, run_at, max_attempts, attempt, error,
                                       failure_class, created_at, updated_at, completed_at, cancelled_at, metadata,
                                       event_seq)
            select 'run_' || lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7'
                   || substr(md5(n::text), 1, 19),
                   (array['research-report', 'invoice-extraction', 'support-triage', 'nightly-digest'])[1 + n %% 4],
                   status, (array['reports', 'invoices', 'mail', 'default'])[1 + n %% 4],
                   at, 3, case when status = 'queued' then 0 else 1 end,
                   case when status = 'failed' then '{"name": "TimeoutError", "message": "no answer"}'::json end,
                   case when status = 'failed' then 'max_retries' end, at, at + interval '30 s',
                   case when status in ('completed', 'failed', 'cancelled') then at + interval '30 s' end,
                   case when status = 'cancelled' then at + interval '30 s' end,
                   jsonb_build_object('customer', 'c-' || n %% 500), 1
              from (select n, now() - n * interval '1 second' as at,
                           case when n %% 40 = 1 then 'failed' when n %% 97 = 2 then 'cancelled'
                                when n < 2000 and n %% 3 = 0 then 'queued' else 'completed' end as status
                      from generate_series(1, %s) n) as drawn
            on conflict do nothing""", (count,))
        connection.execute("""
            insert into tidebase.events (run_id, seq, type, payload, created_at)
            select id, 1, 'run.enqueued', '{"queue": "default"}', created_at from tidebase.runs r
             where not exists (select from tidebase.events e where e.run_id = r.id)""")
        connection.execute("insert into tidebase.queue_tallies select queue, status, count(*) from tidebase.runs"
                           " where status in ('completed', 'failed', 'cancelled') group by queue, status")
        connection.execute("analyze")


def long_run(conninfo: str, steps: int = 1000, events: int = 5000) -> str:
    """One run at work, with so many completed steps and events.  :returns: its id."""
    run = f"run_long_{uuid.uuid4().hex[:12]}"
    with connect(conninfo) as connection, connection.transaction():
        connection.execute("""
            insert into tidebase.runs (id, workflow_name, status, queue, run_at, attempt, lease_owner, lease_expires_at,
                                       lease_ms, event_seq, created_at)
            values (%s, 'long-crawl', 'running', 'reports', now() - interval '3 h', 1, 'worker-9',
                    now() + interval '1 day', %s, %s, now() - interval '3 h')""", (run, HELD_MS, events))
        connection.execute("""
            insert into tidebase.steps (id, run_id, name, position, input_hash, contract, status, output, started_at,
                                        completed_at, created_at)
            select 'step_' || %s || '_' || n, %s, 'page ' || n, 2 + 2 * n, 'seed',
                   '{"sideEffects": [], "idempotencyKey": null, "replay": "auto", "checkpointInvariant": null,
                     "verifiedBy": null, "credentials": []}', 'completed', json_build_object('page', n),
                   at, at + (1 + n %% 8) * interval '1 s', at
              from (select n, now() - interval '3 h' + n * interval '10 s' as at
                      from generate_series(0, %s - 1) n) as begun""", (run, run, steps))
        connection.execute("""
            insert into tidebase.events (run_id, seq, type, payload, created_at)
            select %s, seq, case when seq = 1 then 'run.enqueued' when seq = 2 then 'run.claimed'
                                 when seq > 1 + 2 * %s then 'state.updated'
                                 when seq %% 2 = 1 then 'step.started' else 'step.completed' end,
                   case when seq = 1 then '{"queue": "reports"}'::json
                        when seq = 2 then '{"leaseOwner": "worker-9", "queue": "reports", "attempt": 1}'
                        when seq > 1 + 2 * %s then json_build_object('value', json_build_object('done', seq))
                        else json_build_object('stepId', 'step_' || %s || '_' || (seq - 3) / 2,
                                               'name', 'page ' || (seq - 3) / 2, 'attempt', 1) end,
                   now() - interval '3 h' + seq * interval '2 s'
              from generate_series(1, %s) as seq""", (run, steps, steps, run, events))
        connection.execute("insert into tidebase.states (run_id, value, version) values (%s, '{\"done\": 1}', 1)",
                           (run,))
    return run


def main(words: list[str]) -> Iterator[str]:
    match words:
        case ["mixture", url, conninfo]:
            for what, found in mixture(url, conninfo).items():
                yield f"{what:<14} {found}"
        case ["many", conninfo, *count]:
            many(conninfo, *map(int, count))
        case ["long", conninfo]:
            yield long_run(conninfo)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    for told in main(sys.argv[1:]):
        print(told)
