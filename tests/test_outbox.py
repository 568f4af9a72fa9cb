"""Nothing that was recorded is lost: not a webhook while its receiver and the server are down, not an event between
writers, not a character of an output; and what may be forgotten is forgotten, when it was said to be.
"""

from __future__ import annotations

import itertools
import json
import signal
from typing import Any

import pytest
from conftest import Api, Receiver, eventually, free_port, refused, together

import tidebase

DAY_MS = 86_400_000


def gate(api: Api, run: str, name: str) -> Any:
    return api.post(f"/runs/{run}/gates/begin", {"name": name, "prompt": "Send it?"})["gate"]


def resolve(api: Api, asked: Any, decision: str = "approved") -> Any:
    body = {"token": asked["resolveToken"], "decision": decision}
    return api.post(f"/runs/{asked['runId']}/gates/{asked['id']}/resolve", body)["gate"]


# --- webhooks, while everything goes down


def test_a_hundred_events_outlive_a_receiver_that_is_down_and_a_server_that_is_killed(spawn_server, clock, sql):
    port = free_port()
    server = spawn_server(TIDEBASE_LEASE_MS=60_000)
    api = Api(server.url)
    hook = {"type": "webhook", "url": f"http://127.0.0.1:{port}/hook", "secret": "s"}
    runs = [api.create(channels=[hook]) for _ in range(20)]
    for run in runs:  # five events each: two gates asked and decided, and the completion
        asked = [gate(api, run, name) for name in ("draft", "final")]
        for one in asked:
            resolve(api, one)
        api.complete(run, result=run)["run"]
    written = {row[0]: row[1:] for row in sql("select id, run_id, seq, event_type from tidebase.outbox")}
    assert len(written) == 100

    def tried(status: str) -> int:
        return sql("select count(*) from tidebase.outbox where attempts > 0 and status = %s", status)[0][0]

    # The receiver is down: the first webhook of each run fails, and those after it wait.
    eventually(lambda: tried("pending") == 20)
    eventually(lambda: sql("select count(*) from tidebase.outbox where error_text is not null")[0][0] == 20)
    assert tried("delivered") == 0

    # It is back but does not answer, and the server is killed with deliveries under way.
    receiver = Receiver(port)
    receiver.answering.clear()
    clock.advance(ms=60_000)
    eventually(lambda: len(receiver.requests) >= tidebase.SEND_PER_HOST)
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    unanswered = {headers["webhook-id"] for _, headers, _ in receiver.requests}
    assert tried("delivered") == 0
    receiver.answering.set()

    # All is back: what was taken and never settled is due again when its sender is given up.
    server.start()
    clock.advance(ms=tidebase.SEND_HOLD_MS)
    try:
        eventually(lambda: tried("delivered") == 100, 60)
        received = [(headers["webhook-id"], json.loads(body)) for _, headers, body in receiver.requests]
    finally:
        receiver.close()
    assert {delivery for delivery, _ in received} == set(written)
    assert all(delivery == body["deliveryId"] for delivery, body in received)
    twice = {delivery for delivery in unanswered if [d for d, _ in received].count(delivery) >= 2}
    assert twice == unanswered  # at least once: those that were cut off came again, under the same id
    for run in runs:
        first_arrivals = list(dict.fromkeys(delivery for delivery, body in received if body["runId"] == run))
        assert first_arrivals == sorted(first_arrivals, key=lambda delivery: written[delivery][1])
        assert [written[delivery][2] for delivery in first_arrivals] == [
            "gate.created", "gate.created", "gate.resolved", "gate.resolved", "run.completed"]


# --- events, while everybody writes


def test_writers_on_one_run_over_all_endpoints_leave_its_events_without_gap(api, server, start_server):
    other = start_server()
    apis = [api, Api(other.url, other)]
    run = api.post("/queues/default/enqueue", {
        "workflowName": "report", "deadlineMs": DAY_MS,
        "channels": [{"type": "webhook", "url": "http://127.0.0.1:1/"}],
        "recoveryWebhook": "http://127.0.0.1:1/"})["run"]["id"]
    assert api.claim(owner="a")[0]["id"] == run
    rounds = 6
    asked = [gate(api, run, f"asked {n}") for n in range(rounds)]
    record = {"inputHash": "h", "leaseOwner": "a", "output": 1}

    def completed(via: Api, n: int) -> None:
        via.do_step(run, f"done {n}", "a", n)

    def failed(via: Api, n: int) -> None:
        step = via.begin_step(run, f"failed {n}", "a")["step"]["id"]
        via.fail_step(run, step, "a", retryable=n % 2 == 0)["step"]

    def recorded(via: Api, n: int) -> None:
        via.post(f"/runs/{run}/steps", {"name": f"recorded {n}", **record})["step"]
        assert via.post("/steps", {"records": [
            {"runId": run, "name": f"batch {n} {m}", **record} for m in range(2)]})["results"][1]["step"]

    def changed(via: Api, n: int) -> None:
        via.put(f"/runs/{run}/state", {"value": {"n": n}, "stream": f"s{n % 2}"})["state"]
        assert via.send("PATCH", f"/runs/{run}/state", {"value": {"m": n}}).status == 200
        via.post(f"/runs/{run}/state/save", {"label": f"saved {n}", "stream": f"s{n % 2}"})["stateVersion"]
        via.post(f"/runs/{run}/snapshots", {"label": f"snap {n}", "state": n})["snapshot"]

    writers = [
        completed, failed, recorded, changed,
        lambda via, n: via.post(f"/runs/{run}/usage", {"inputTokens": n})["usage"],
        lambda via, n: gate(via, run, f"gate {n}"),
        lambda via, n: resolve(via, asked[n]),
        lambda via, n: via.post(f"/runs/{run}/children", {"name": f"c{n}", "workflowName": "sub"})["run"],
        lambda via, n: via.post(f"/runs/{run}/recover", {"reason": f"manual {n}"})["recoveryAttempt"],
        lambda via, n: via.post(f"/runs/{run}/signals", {"name": f"signal {n}", "payload": n})["signal"],
        lambda via, n: via.heartbeat(run, "a")["run"],
        lambda via, n: via.post("/heartbeats", {"runs": [{"id": run, "leaseOwner": "a"}]})["results"],
        lambda via, n: via.begin(run, "a")["run"],
        lambda via, n: via.post(f"/runs/{run}/fork", {})["run"],
        lambda via, n: server.reconciler.tick() + other.reconciler.tick(),
        lambda via, n: via.detail(run),
    ]

    def work(writer: Any, via: Api) -> None:
        for n in range(rounds):
            writer(via, n)

    with together(*[lambda pair=pair: work(*pair) for pair in zip(writers, itertools.cycle(apis), strict=False)]):
        pass
    assert api.complete(run, leaseOwner="a")["run"]["status"] == "completed"
    types = api.event_types(run)
    assert {kind: types.count(kind) for kind in dict.fromkeys(types) if not kind.startswith("recovery.")} == {
        "run.enqueued": 1, "run.claimed": 1, "gate.created": 2 * rounds, "gate.resolved": rounds,
        "step.started": 5 * rounds, "step.completed": 4 * rounds, "step.failed": rounds, "state.updated": 2 * rounds,
        "state.saved": rounds, "snapshot.created": rounds, "usage.recorded": rounds, "run.child.created": rounds,
        "signal.received": rounds, "run.completed": 1}
    assert types.count("recovery.started") == rounds
    versions = api.get(f"/runs/{run}/state/versions")["stateVersions"]
    for stream in {version["streamId"] for version in versions}:
        numbers = [version["version"] for version in versions if version["streamId"] == stream]
        assert numbers == list(range(1, len(numbers) + 1))


# --- outputs, to the letter


LETTERS = '{"text": "' + "größer \\u0000 \\\" \\ud83d\\ude00 \U0001f600" * 130_000 + '", "zero": 0.0}'


@pytest.mark.parametrize("text", [
    pytest.param(LETTERS, id="5 MB"),
    pytest.param('"a\\u0000b"', id="NUL"),
    pytest.param('{"\\u0000": "\\u0000\\u0000", "\\\\u0000": 1}', id="NUL in names"),
    pytest.param('{"z": 1, "a": {"y": 2, "b": 3}, "m": [{"q": 1, "c": 2}], "z2": null}', id="order"),
    pytest.param('{"a": 1, "b": 2, "a": 3}', id="a name twice"),
    pytest.param('[1.0, 1e2, 1E+2, -0.0, 0.10, 12345678901234567890.000000000000000001, 1e-400]', id="numbers"),
    pytest.param('{ "a" :\t[ 1 ,2 ]\n}', id="white space"),
    pytest.param('" \\/ \\u00e9 é \\t \u2028 \u007f"', id="escapes"),
])
def test_an_output_comes_back_exactly(api, text):
    run = api.create()
    api.begin(run, "a")["run"]
    step = api.begin_step(run, "fetch", "a")["step"]["id"]
    raw = f'{{"leaseOwner": "a", "output": {text}}}'.encode()
    stored = api.post(f"/runs/{run}/steps/{step}/complete", raw=raw)
    replayed = api.begin_step(run, "fetch", "a")
    assert replayed["action"] == "return"
    begun = api.begin(run, "a", checkpoints=True)
    is_long = len(text.encode()) > 4 * 1024 * 1024  # asked for step by step, then
    assert api.post(f"/runs/{run}/complete", raw=f'{{"result": {text}}}'.encode()).status == 200
    forked = api.post(f"/runs/{run}/fork")["run"]["id"]
    # The text is compared, not what it means.
    for answer, times in ((stored, 1), (replayed, 2), (api.get(f"/runs/{run}?include=steps"), 1),
                          (api.get(f"/runs/{run}?include=run"), 1), (api.get(f"/runs/{forked}?include=steps"), 1),
                          (begun, 0 if is_long else 1)):
        assert answer.status == 200
        assert answer.text.count(text) == times
    assert begun["checkpointsTruncated"] is is_long


# --- what is forgotten


def full_runs(api: Api, endings: list[str]) -> list[str]:
    """A run per ending, with all that may belong to a run; ended in that way, or not, for ""."""
    runs = []
    for number, ending in enumerate(endings):
        run = api.enqueue(f"q{number}", channels=[{"type": "webhook", "url": "http://127.0.0.1:1/"}], maxAttempts=1,
                          recoveryWebhook="http://127.0.0.1:1/")
        api.claim(f"q{number}", owner="a")
        api.do_step(run, "plan", "a", 1)
        gate(api, run, "ok")
        api.put(f"/runs/{run}/state", {"value": 1, "label": "x"})["state"]
        api.post(f"/runs/{run}/usage", {})["usage"]
        api.post(f"/runs/{run}/children", {"name": "c", "workflowName": "sub", "id": f"child:{number}"})["run"]
        if ending:
            assert api.post(f"/runs/{run}/{ending}", {"error": "boom"}).status == 200
        runs.append(run)
    return runs


def test_ended_runs_are_deleted_with_all_that_is_theirs_when_their_time_is_over(start_server, clock, sql):
    server = start_server(TIDEBASE_RETENTION_DAYS=30)
    api = Api(server.url, server)
    *ended, live = full_runs(api, ["complete", "fail", "cancel", ""])
    clock.advance(ms=29 * DAY_MS)
    later = api.create()
    api.complete(later)["run"]
    api.reconcile()
    for run in (*ended, live, later):
        assert api.get(f"/runs/{run}").status == 200
    clock.advance(ms=DAY_MS)
    api.reconcile()
    for run in ended:
        refused(api.get(f"/runs/{run}"), 404, "not_found")
    assert api.run(live)["status"] == "failed"  # its lease ended, but only now
    assert api.run(later)["status"] == "completed"
    # A child outlives its parent while it lives; cancelled with it, it goes after it.
    api.reconcile()
    assert [api.get(f"/runs/child:{n}").status for n in range(4)] == [200, 200, 404, 200]
    tables = [row[0] for row in sql(
        "select table_name from information_schema.columns where table_schema = 'tidebase' and column_name = 'run_id'")]
    assert {"steps", "events", "channels", "gates", "states", "state_streams", "state_versions", "usage",
            "outbox"} <= set(tables)
    for table in tables:
        query = f"select count(*) from tidebase.{table} where run_id = any (%s)"  # noqa: S608
        assert sql(query, ended) == [(0,)], table
    for number, ending in enumerate(["completed", "failed", "cancelled"]):
        assert not any(queue["name"] == f"q{number}" and queue[ending] for queue in api.get("/queues")["queues"])


def test_a_completed_child_stays_for_as_long_as_its_parent_whose_replay_would_run_it_again(start_server, clock):
    server = start_server(TIDEBASE_RETENTION_DAYS=30)
    api = Api(server.url, server)
    parent = api.create()
    api.begin(parent, "a")["run"]

    def child(of: str, name: str) -> Any:
        return api.post(f"/runs/{of}/children", {"name": name, "workflowName": "sub", "queue": "q"})

    def work() -> list[str]:
        runs = [run["id"] for run in api.claim("q", owner="w", limit=9)]
        for run in runs:
            api.complete(run, leaseOwner="w", result=1)["run"]
        return runs

    part = child(parent, "part")["run"]["id"]
    assert work() == [part]
    grandchild = child(part, "deeper")["run"]["id"]
    assert work() == [grandchild]
    clock.advance(ms=40 * DAY_MS)
    api.reconcile()
    assert api.begin(parent, "b")["run"]["attempt"] == 2  # the replay
    again = child(parent, "part")
    assert (again["created"], again["run"]["id"], again["run"]["result"]) == (False, part, 1)
    assert child(part, "deeper")["created"] is False
    assert work() == []
    api.fail(parent)["run"]  # a failed one may be put back for as long as it is there
    clock.advance(ms=29 * DAY_MS)
    api.reconcile()
    assert child(parent, "part")["created"] is False
    clock.advance(ms=DAY_MS)
    for gone, stays in ((parent, part), (part, grandchild), (grandchild, None)):  # one generation a tick
        api.reconcile()
        refused(api.get(f"/runs/{gone}"), 404, "not_found")
        assert stays is None or api.run(stays)["status"] == "completed"


def test_without_a_retention_nothing_is_deleted(api, clock):
    run = api.create()
    api.complete(run)["run"]
    clock.advance(ms=100 * 365 * DAY_MS)
    api.reconcile()
    assert api.run(run)["status"] == "completed"


def test_a_run_that_was_put_back_is_not_deleted_for_its_old_end(start_server, clock):
    server = start_server(TIDEBASE_RETENTION_DAYS=1)
    api = Api(server.url, server)
    run = api.create()
    api.fail(run)["run"]
    api.post(f"/runs/{run}/retry")["run"]
    clock.advance(ms=2 * DAY_MS)
    api.reconcile()
    assert api.run(run)["status"] == "pending"


def test_who_gets_the_id_of_a_deleted_run_does_not_get_its_children(start_server, clock):
    server = start_server(TIDEBASE_RETENTION_DAYS=1)
    api = Api(server.url, server)
    api.create(id="mine")
    child = api.post("/runs/mine/children", {"name": "part", "workflowName": "w"})["run"]["id"]
    api.complete("mine")["run"]
    clock.advance(ms=2 * DAY_MS)
    api.reconcile()
    refused(api.get("/runs/mine"), 404, "not_found")
    api.enqueue(id="mine")
    api.claim(owner="a")
    waits = {"leaseOwner": "a", "for": {"children": True}}
    assert api.post("/runs/mine/wait", waits)["ready"] is True
    assert api.run(child)["status"] == "pending"
    api.complete(child)["run"]


def test_two_servers_delete_side_by_side_and_in_portions(start_server, clock, sql):
    servers = [start_server(TIDEBASE_RETENTION_DAYS=1) for _ in range(2)]
    sql("insert into tidebase.runs (id, workflow_name, status, queue, run_at, completed_at)"
        " select 'run_' || n, 'w', 'completed', 'q', tidebase.now(), tidebase.now() from generate_series(1, 250) n")
    sql("insert into tidebase.queue_tallies values ('q', 'completed', 250)")
    clock.advance(ms=2 * DAY_MS)
    with together(*[server.reconciler.tick for server in servers]) as done:
        assert sum(done) == 200
    assert servers[0].reconciler.tick() == 50
    assert sql("select count(*) from tidebase.runs") == [(0,)]
    assert Api(servers[0].url).queue("q")["completed"] == 0


def test_what_belongs_to_a_deleted_run_is_found_by_an_index(sql):
    # Issue: each channel of a deleted run cost a scan of the whole outbox.
    unserved = sql("""
        select conrelid::regclass::text, attname from pg_constraint
          join pg_attribute on attrelid = conrelid and attnum = conkey[1]
         where contype = 'f' and connamespace = 'tidebase'::regnamespace
           and not exists (select from pg_index where indrelid = conrelid and indkey[0] = conkey[1] and indpred is null)
    """)
    assert unserved == []
    assert sql("select count(*) > 10 from pg_constraint where contype = 'f'") == [(True,)]
