"""A lease is the right to write: it ends by time alone, goes to one owner, and who lost it is refused for good.

The clock of the database is moved on by the tests; the reconciler ticks when they say so.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from conftest import LEASE_MS, Answer, Api, Clock, LocalServer, eventually, refused, together

import tidebase

HOOK = "http://127.0.0.1:9/hook"  # nobody listens there: what is posted stays in the outbox
MARGIN_MS = 10_000  # so long may a test take from one turn of the clock to the next look at it


def lease_ms(run: Any) -> float:
    """How long the lease of a run, as the last write left it, lasts."""
    span = datetime.fromisoformat(run["leaseExpiresAt"]) - datetime.fromisoformat(run["updatedAt"])
    return span.total_seconds() * 1000


def claimed(api: Api, owner: str = "a", **body: Any) -> str:
    """A run of the queue `default` that `owner` holds."""
    run = api.enqueue(**body)
    assert [taken["id"] for taken in api.claim(owner=owner)] == [run]
    return run


def begun(api: Api, owner: str = "a", **body: Any) -> str:
    """A plain run that `owner` holds."""
    run = api.create(**body)
    api.begin(run, owner)["run"]
    return run


def recoveries(api: Api, run: str) -> list[str]:
    return [attempt["reason"] for attempt in api.detail(run)["recoveryAttempts"]]


def sweep_until_recoveries(api: Api, run: str, count: int) -> None:
    """Ticks until there are that many: a run whose webhook is just being posted is busy, and left to the next tick."""
    def swept() -> bool:
        api.reconcile()
        return recoveries(api, run) == ["lease_expired"] * count

    eventually(swept)


# ------------------------------------------------------------------------------
# The lease of a run
# ------------------------------------------------------------------------------
def test_a_lease_lasts_as_long_as_the_server_says(api: Api, start_server: Callable[..., LocalServer]) -> None:
    assert lease_ms(api.run(begun(api))) == LEASE_MS
    assert lease_ms(api.run(claimed(api))) == LEASE_MS
    other = Api(start_server(TIDEBASE_LEASE_MS=7_000).url)
    assert lease_ms(other.run(begun(other))) == 7_000


def test_a_run_goes_to_another_owner_only_when_its_lease_ends(api: Api, clock: Clock) -> None:
    run = begun(api)
    clock.advance(ms=LEASE_MS - MARGIN_MS)
    refused(api.begin(run, "b"), 409, "run_leased")
    clock.advance(ms=MARGIN_MS)
    taken = api.begin(run, "b")["run"]
    assert (taken["leaseOwner"], taken["attempt"]) == ("b", 2)


def test_a_heartbeat_extends_the_lease_and_nothing_else(api: Api, clock: Clock) -> None:
    run = begun(api)
    for _ in range(3):
        clock.advance(ms=LEASE_MS - MARGIN_MS)
        beaten = api.heartbeat(run, "a")["run"]
        assert lease_ms(beaten) == LEASE_MS
    refused(api.begin(run, "b"), 409, "run_leased")
    assert beaten["attempt"] == 1
    assert api.event_types(run) == ["run.created", "run.started"]


def test_a_late_heartbeat_revives_a_lease_that_nobody_has_taken(api: Api, clock: Clock) -> None:
    run = begun(api)
    clock.advance(ms=2 * LEASE_MS)
    api.reconcile()
    assert api.heartbeat(run, "a")["run"]["leaseOwner"] == "a"
    refused(api.begin(run, "b"), 409, "run_leased")


def test_a_heartbeat_of_another_than_the_holder_is_refused(api: Api) -> None:
    run = begun(api)
    assert refused(api.heartbeat(run, "b"), 409, "lease_lost")["run"]["leaseOwner"] == "a"
    for idle in (api.create(), api.enqueue()):
        refused(api.heartbeat(idle, "a"), 409, "lease_lost")
    api.complete(run, leaseOwner="a")
    assert refused(api.heartbeat(run, "a"), 409, "lease_lost")["run"]["status"] == "completed"


# What a worker writes beside its steps.
BESIDE_STEPS = {
    "state": ("PUT", "state", {"value": {"x": 1}}), "patch": ("PATCH", "state", {"value": {}}),
    "save": ("POST", "state/save", {"label": "l"}), "snapshot": ("POST", "snapshots", {"label": "l", "state": 1}),
    "usage": ("POST", "usage", {"kind": "k"}), "gate": ("POST", "gates/begin", {"name": "g", "prompt": "?"}),
    "child": ("POST", "children", {"name": "c", "workflowName": "w"}), "signal": ("POST", "signals", {"name": "s"})}


@pytest.mark.parametrize("write", ["begin_step", "begin_step_again", "complete_step", "fail_step", "record", "batch",
                                   *BESIDE_STEPS])
def test_every_write_of_the_owner_extends_the_runs_lease(api: Api, clock: Clock, write: str) -> None:
    run = begun(api)
    step = api.begin_step(run, "held", "a")["step"]["id"]
    api.put(f"/runs/{run}/state", {"value": {}})["state"]
    record = {"name": "x", "inputHash": "h", "leaseOwner": "a", "output": 1}
    clock.advance(ms=LEASE_MS // 2)
    {"begin_step": lambda: api.begin_step(run, "x", "a"),
     "begin_step_again": lambda: api.begin_step(run, "held", "a"),
     "complete_step": lambda: api.complete_step(run, step, "a"),
     "fail_step": lambda: api.fail_step(run, step, "a"),
     "record": lambda: api.post(f"/runs/{run}/steps", record),
     "batch": lambda: api.post("/steps", {"records": [{"runId": run, **record}]}),
     **{what: lambda call=call: api.send(call[0], f"/runs/{run}/{call[1]}", {**call[2], "leaseOwner": "a"})
        for what, call in BESIDE_STEPS.items()}}[write]()
    clock.advance(ms=LEASE_MS - MARGIN_MS)
    refused(api.begin(run, "b"), 409, "run_leased")
    assert lease_ms(api.run(run)) == LEASE_MS


def test_a_write_of_somebody_else_does_not_extend_the_lease(api: Api, clock: Clock) -> None:
    run = begun(api, recoveryWebhook=HOOK)
    before = api.run(run)["leaseExpiresAt"]
    clock.advance(ms=1_000)
    api.post(f"/runs/{run}/recover")
    for method, path, body in BESIDE_STEPS.values():
        assert api.send(method, f"/runs/{run}/{path}", body).status == 200
    assert api.run(run)["leaseExpiresAt"] == before


def test_a_batch_of_heartbeats_answers_each_in_its_order(api: Api, clock: Clock) -> None:
    mine, other, cancelled, done = begun(api), begun(api, "b"), begun(api), begun(api)
    api.post(f"/runs/{cancelled}/cancel")
    api.complete(done)
    clock.advance(ms=LEASE_MS // 2)
    beats = [(other, "a"), (mine, "a"), ("run_nowhere", "a"), (cancelled, "a"), (done, "a"), (other, "b"), (mine, "a")]
    results = api.post("/heartbeats", {"runs": [{"id": run, "leaseOwner": owner} for run, owner in beats]})["results"]
    assert [result.get("code") for result in results] == [
        "lease_lost", None, "not_found", "run_cancelled", "lease_lost", None, None]
    assert [result.get("status") for result in results] == [409, None, 404, 409, 409, None, None]
    assert [result["run"]["id"] for result in results if "run" in result] == [
        run for run, _ in beats if run != "run_nowhere"]
    assert all(result["error"] for result in results if "code" in result)
    for run in (mine, other):
        assert lease_ms(api.run(run)) == LEASE_MS
    told = ("id", "status", "leaseOwner", "leaseExpiresAt", "updatedAt")  # not what a run carries
    for number, run in ((0, other), (1, mine), (3, cancelled)):
        assert results[number]["run"] == {key: api.run(run)[key] for key in told}


# ------------------------------------------------------------------------------
# Who lost it
# ------------------------------------------------------------------------------
def lose_by_expiry(api: Api, clock: Clock) -> str:
    run = claimed(api)
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    return run


def lose_by_begin(api: Api, clock: Clock) -> str:
    run = claimed(api)
    clock.advance(ms=LEASE_MS)
    api.begin(run, "b")["run"]
    return run


def lose_by_cancel_and_retry(api: Api, clock: Clock) -> str:
    run = claimed(api)
    api.post(f"/runs/{run}/cancel")
    api.post(f"/runs/{run}/retry")
    return run


def lose_by_a_failure_reported_by_somebody(api: Api, clock: Clock) -> str:
    run = claimed(api)
    assert api.fail(run)["requeued"] is True
    clock.advance(ms=5_000)
    return run


def lose_by_release(api: Api, clock: Clock) -> str:
    run = claimed(api)
    api.post(f"/runs/{run}/release", {"leaseOwner": "a"})["run"]
    return run


LOSSES = [lose_by_expiry, lose_by_begin, lose_by_cancel_and_retry, lose_by_a_failure_reported_by_somebody,
          lose_by_release]


@pytest.mark.parametrize("lose", LOSSES)
def test_every_late_write_of_a_former_owner_is_refused_once_another_holds_the_run(
        api: Api, clock: Clock, lose: Callable[[Api, Clock], str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: dict[str, str] = {}
    claim = api.claim

    def claim_and_begin(*queues: str, **options: Any) -> list[Any]:  # the former owner is in the middle of two steps
        runs = claim(*queues, **options)
        if options["owner"] == "a":
            steps["open"] = api.begin_step(runs[0]["id"], "open", "a")["step"]["id"]
            steps["taken"] = api.begin_step(runs[0]["id"], "taken", "a")["step"]["id"]
        return runs

    monkeypatch.setattr(api, "claim", claim_and_begin)
    run = lose(api, clock)
    if api.run(run)["leaseOwner"] is None:
        assert [taken["id"] for taken in api.claim(owner="b")] == [run]
    assert api.begin_step(run, "taken", "b")["action"] == "execute"
    before = api.detail(run)

    record = {"name": "open", "inputHash": "h", "leaseOwner": "a", "output": 1}
    for late in (
            lambda: api.heartbeat(run, "a"), lambda: api.complete(run, leaseOwner="a", result=1),
            lambda: api.fail(run, leaseOwner="a"), lambda: api.post(f"/runs/{run}/release", {"leaseOwner": "a"}),
            lambda: api.begin_step(run, "new", "a"), lambda: api.begin_step(run, "open", "a"),
            lambda: api.complete_step(run, steps["open"], "a", 1), lambda: api.fail_step(run, steps["open"], "a"),
            lambda: api.complete_step(run, steps["taken"], "a", 1), lambda: api.fail_step(run, steps["taken"], "a"),
            lambda: api.post(f"/runs/{run}/steps", record),
            *(lambda call=call: api.send(call[0], f"/runs/{run}/{call[1]}", {**call[2], "leaseOwner": "a"})
              for call in BESIDE_STEPS.values())):
        assert refused(late(), 409, "lease_lost")
    refused(api.begin(run, "a"), 409, "run_leased")
    results = (api.post("/heartbeats", {"runs": [{"id": run, "leaseOwner": "a"}]})["results"]
               + api.post("/steps", {"records": [{"runId": run, **record}]})["results"]
               + api.post("/writes", {"writes": [{"do": "create_child", "runId": run, "name": "c", "workflowName": "w",
                                                  "leaseOwner": "a"}] * 2})["results"])
    assert [result["code"] for result in results] == ["lease_lost"] * 4
    assert api.detail(run) == before

    assert api.complete(run, leaseOwner="b", result="b's")["run"]["result"] == "b's"
    refused(api.complete(run, leaseOwner="a", result="a's"), 409, "lease_lost")
    assert api.run(run)["result"] == "b's"


@pytest.mark.parametrize("lose", LOSSES)
def test_a_former_owner_may_take_the_run_again_and_then_writes(
        api: Api, clock: Clock, lose: Callable[[Api, Clock], str]) -> None:
    run = lose(api, clock)
    if api.run(run)["leaseOwner"] is None:
        assert [taken["id"] for taken in api.claim(owner="b")] == [run]
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    assert [taken["id"] for taken in api.claim(owner="a")] == [run]
    api.do_step(run, "s", "a", output=1)
    refused(api.begin_step(run, "t", "b"), 409, "lease_lost")
    assert api.complete(run, leaseOwner="a")["run"]["status"] == "completed"


def test_the_late_answer_of_a_stopped_worker_does_not_count_even_before_the_next_one_is_there(
        api: Api, clock: Clock) -> None:
    run = claimed(api)
    step = api.begin_step(run, "s", "a")["step"]["id"]
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    assert api.run(run)["status"] == "queued"
    refused(api.complete_step(run, step, "a"), 409, "lease_lost")
    refused(api.complete(run, leaseOwner="a"), 409, "lease_lost")
    assert api.run(run)["status"] == "queued"


@pytest.mark.parametrize("what", BESIDE_STEPS)
def test_an_owner_that_is_named_must_hold_the_run(api: Api, what: str) -> None:
    method, path, body = BESIDE_STEPS[what]
    idle, run, ended, cancelled = api.create(), begun(api), begun(api), begun(api)
    for each in (idle, run, ended, cancelled):
        api.put(f"/runs/{each}/state", {"value": {}})["state"]
    api.complete(ended, leaseOwner="a")["run"]
    api.post(f"/runs/{cancelled}/cancel")["run"]
    for each, owner, code in ((idle, "a", "lease_lost"), (run, "forged", "lease_lost"), (ended, "a", "lease_lost"),
                              (cancelled, "a", "run_cancelled")):
        before = api.detail(each)
        told = refused(api.send(method, f"/runs/{each}/{path}", {**body, "leaseOwner": owner}), 409, code)
        assert told["run"]["id"] == each
        assert api.detail(each) == before
    for owner in ({"leaseOwner": "a"}, {}):  # one that names none is not a worker
        assert api.send(method, f"/runs/{run}/{path}", {**body, **owner}).status == 200


@pytest.mark.parametrize("owner", ["forged", None])
def test_a_step_of_a_run_that_somebody_holds_is_locked_for_all_others(
        api: Api, clock: Clock, owner: str | None) -> None:
    run = begun(api)
    assert api.begin_step(run, "new", owner).json == {"action": "locked", "step": None}
    mine = api.begin_step(run, "mine", "a")["step"]
    assert api.begin_step(run, "mine", owner).json == {"action": "locked", "step": mine}
    failed = api.begin_step(run, "failed", "a")["step"]["id"]
    failed = api.fail_step(run, failed, "a", retryable=True)["step"]
    assert api.begin_step(run, "failed", owner).json == {"action": "locked", "step": failed}
    assert [step["name"] for step in api.detail(run)["steps"]] == ["mine", "failed"]
    clock.advance(ms=LEASE_MS)  # from now on nobody holds it
    assert api.begin_step(run, "new", owner)["action"] == "execute"


# ------------------------------------------------------------------------------
# The lease of a step
# ------------------------------------------------------------------------------
def test_a_running_step_goes_to_another_owner_only_when_its_lease_ends(api: Api, clock: Clock) -> None:
    run = api.create()
    assert api.begin_step(run, "fetch", "a")["step"]["attempt"] == 1
    clock.advance(ms=LEASE_MS - MARGIN_MS)
    locked = api.begin_step(run, "fetch", "b")
    assert (locked["action"], locked["step"]["leaseOwner"]) == ("locked", "a")
    clock.advance(ms=MARGIN_MS)
    taken = api.begin_step(run, "fetch", "b")
    assert (taken["action"], taken["leaseOwner"], taken["step"]["attempt"]) == ("execute", "b", 2)
    refused(api.complete_step(run, taken["step"]["id"], "a", "late"), 409, "lease_lost")
    api.complete_step(run, taken["step"]["id"], "b", "b's")
    assert api.begin_step(run, "fetch", "a")["output"] == "b's"


def test_heartbeats_of_the_run_keep_the_step_of_its_owner(api: Api, clock: Clock) -> None:
    run = begun(api)
    api.begin_step(run, "long", "a")
    for _ in range(4):
        clock.advance(ms=LEASE_MS - MARGIN_MS)
        api.heartbeat(run, "a")["run"]
    assert api.begin_step(run, "long", "b")["action"] == "locked"
    assert api.begin_step(run, "long", "a")["step"]["attempt"] == 1


def test_the_new_holder_of_the_run_takes_a_step_over_at_once(api: Api, clock: Clock) -> None:
    run = claimed(api)
    clock.advance(ms=LEASE_MS - MARGIN_MS)
    api.begin_step(run, "s", "a")
    api.fail(run)  # requeued, while the step's lease still has a minute
    clock.advance(ms=5_000)
    api.claim(owner="b")
    assert api.begin_step(run, "s", "other")["action"] == "locked"
    taken = api.begin_step(run, "s", "b")
    assert (taken["action"], taken["step"]["attempt"]) == ("execute", 2)


def test_a_step_begun_by_its_owner_again_is_the_same_attempt(api: Api, clock: Clock) -> None:
    run = begun(api)
    first = api.begin_step(run, "s", "a")
    clock.advance(ms=1_000)
    again = api.begin_step(run, "s", "a")
    assert (again["action"], again["step"]["attempt"]) == ("execute", 1)
    assert again["step"]["startedAt"] == first["step"]["startedAt"]
    assert again["step"]["leaseExpiresAt"] > first["step"]["leaseExpiresAt"]
    assert api.event_types(run).count("step.started") == 1


# ------------------------------------------------------------------------------
# What the reconciler does about expired leases
# ------------------------------------------------------------------------------
def test_a_silent_workers_queue_run_is_queued_again_at_once_while_attempts_last(api: Api, clock: Clock) -> None:
    run = claimed(api, maxAttempts=2)
    clock.advance(ms=LEASE_MS - MARGIN_MS)
    assert api.reconcile() == 0
    clock.advance(ms=MARGIN_MS)
    assert api.reconcile() == 1
    assert api.reconcile() == 0
    event = api.events(run)[-1]
    assert (event["type"], event["payload"]["attempt"], event["payload"]["reason"]) == (
        "run.requeued", 1, "lease_expired")
    assert [taken["attempt"] for taken in api.claim(owner="b")] == [2]

    clock.advance(ms=LEASE_MS)
    assert api.reconcile() == 1
    ended = api.run(run)
    assert (ended["status"], ended["failureClass"], ended["leaseOwner"]) == ("failed", "max_retries", None)
    assert ended["error"]["name"] == "LeaseExpired"
    event = api.events(run)[-1]
    assert (event["type"], event["payload"]["reason"]) == ("run.failed", "lease_expired")


def test_a_failure_that_a_worker_reported_has_no_such_reason(api: Api, clock: Clock) -> None:
    run = claimed(api, maxAttempts=2)
    api.fail(run, leaseOwner="a")["run"]
    clock.advance(ms=5_000)
    api.claim(owner="b")
    api.fail(run, leaseOwner="b")["run"]
    payloads = {event["type"]: event["payload"] for event in api.events(run)}
    assert payloads["run.requeued"].keys() == {"error", "attempt", "maxAttempts", "nextRunAt"}
    assert payloads["run.failed"].keys() == {"error", "failureClass"}


def test_the_log_tells_of_each_lease_that_expired_and_what_became_of_the_run(
        api: Api, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    again, last = claimed(api, "worker-1", maxAttempts=2), claimed(api, "worker-1", maxAttempts=1, input="s3cret")
    plain = begun(api, "worker-2")
    clock.advance(ms=LEASE_MS)
    with caplog.at_level(logging.INFO, "tidebase.server"):
        assert api.reconcile() == 3
    lines = {record.run_id: record.getMessage() for record in caplog.records if record.event == "lease_expired"}
    head = "the lease of run {} (workflow report, {}) expired in attempt 1 of {}, held by {}; "
    assert lines == {
        again: head.format(again, "queue default", 2, "worker-1") + "it is queued again",
        last: head.format(last, "queue default", 1, "worker-1") + "it failed",
        plain: head.format(plain, "no queue", 1, "worker-2") + "it is stalled until somebody begins it"}
    assert "s3cret" not in caplog.text


def test_a_queue_run_that_ran_out_of_attempts_asks_its_webhook(api: Api, clock: Clock) -> None:
    run = claimed(api, maxAttempts=1, recoveryWebhook=HOOK)
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    assert api.run(run)["status"] == "failed"
    assert recoveries(api, run) == ["run_failed"]


def test_a_plain_run_is_left_for_a_manual_resume(api: Api, clock: Clock) -> None:
    run = begun(api)
    before = api.run(run)
    assert before["stalled"] is False
    clock.advance(ms=LEASE_MS)
    assert api.reconcile() == 1
    assert api.reconcile() == 0
    stalled = api.run(run)
    assert stalled == {**before, "stalled": True, "updatedAt": stalled["updatedAt"]}
    assert [shown["stalled"] for shown in api.get("/runs")["runs"]] == [True]
    event = api.events(run)[-1]
    assert (event["type"], event["payload"]) == ("run.stalled", {"leaseOwner": "a", "attempt": 1})
    resumed = api.begin(run, "b")["run"]
    assert (resumed["attempt"], resumed["stalled"]) == (2, False)
    assert api.complete(run, leaseOwner="b")["run"]["stalled"] is False


def test_plain_runs_that_stalled_never_starve_the_others(
        api: Api, clock: Clock, sql: Callable[..., Any]) -> None:
    many = 3 * tidebase.SWEEP_LIMIT
    begun(api)
    sql("insert into tidebase.runs (id, workflow_name, status, lease_owner, lease_expires_at)"
        " select 'stalled_' || n, 'report', 'running', 'gone', tidebase.now() from generate_series(1, %s) n", many)
    run = claimed(api)
    clock.advance(ms=LEASE_MS)
    eventually(lambda: api.reconcile() == 0)
    assert api.run(run)["status"] == "queued"
    assert sql("select count(*) from tidebase.runs where status = 'running'") == [(many + 1,)]


def test_a_silent_plain_run_asks_its_webhook_once_per_lease(api: Api, clock: Clock) -> None:
    run = begun(api, recoveryWebhook=HOOK)
    for _ in range(3):
        clock.advance(ms=LEASE_MS)
        sweep_until_recoveries(api, run, 1)
    assert api.run(run)["status"] == "running"
    api.begin(run, "b")
    clock.advance(ms=LEASE_MS)
    sweep_until_recoveries(api, run, 2)
    assert api.event_types(run).count("run.stalled") == 2


@pytest.mark.parametrize("sign", ["heartbeat", "batch", "step", "begin"])
def test_a_worker_that_came_back_and_fell_silent_again_is_noticed_again(api: Api, clock: Clock, sign: str) -> None:
    run = begun(api, recoveryWebhook=HOOK)
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    {"heartbeat": lambda: api.heartbeat(run, "a"),
     "batch": lambda: api.post("/heartbeats", {"runs": [{"id": run, "leaseOwner": "a"}]}),
     "step": lambda: api.do_step(run, "s", "a"), "begin": lambda: api.begin(run, "a")}[sign]()
    assert lease_ms(api.run(run)) == LEASE_MS
    assert api.reconcile() == 0
    clock.advance(ms=LEASE_MS)
    sweep_until_recoveries(api, run, 2)


def test_a_server_that_has_just_started_leaves_expired_leases_alone_for_one_lease(
        api: Api, server: LocalServer, clock: Clock) -> None:
    run = claimed(api)
    clock.advance(ms=LEASE_MS)
    new = tidebase.Reconciler(server.database, LEASE_MS, 0, None)
    assert new.tick() == 0
    assert api.run(run)["status"] == "running"
    assert api.heartbeat(run, "a").status == 200
    clock.advance(ms=LEASE_MS)
    brief = tidebase.Reconciler(server.database, 100, 0, None)
    eventually(brief.tick)
    assert api.run(run)["status"] == "queued"


def test_after_an_outage_of_the_database_expired_leases_are_left_alone_for_one_lease(
        api: Api, server: LocalServer, clock: Clock) -> None:
    run = claimed(api)
    clock.advance(ms=LEASE_MS)
    server.reconciler.failed(tidebase.psycopg.OperationalError())
    server.reconciler.patient_until = 0.0  # the outage was longer than a lease
    assert api.reconcile() == 0
    assert api.reconcile() == 0
    assert api.heartbeat(run, "a").status == 200


def test_after_the_machine_slept_or_its_clock_was_set_expired_leases_are_left_alone_for_one_lease(
        start_server: Callable[..., LocalServer], clock: Clock) -> None:
    server = start_server(TIDEBASE_RECONCILE_MS=10)
    api = Api(server.url, server)
    run, overdue = claimed(api), api.create(deadlineMs=LEASE_MS)
    server.clock = itertools.count(0, LEASE_MS / 1000).__next__  # each sleep seems to take as long as a lease
    eventually(lambda: server.reconciler.patient_until)
    clock.advance(ms=LEASE_MS)
    eventually(lambda: api.run(overdue)["status"] == "cancelled")  # which a tick looks for after it did for leases
    assert api.heartbeat(run, "a").status == 200


def test_a_run_past_its_deadline_is_cancelled_whatever_it_does(api: Api, clock: Clock) -> None:
    runs = {"pending": api.create(deadlineMs=30_000), "running": begun(api, deadlineMs=30_000),
            "queued": api.enqueue("other", deadlineMs=30_000)}
    in_time, ended = api.create(deadlineMs=90_000), api.create(deadlineMs=30_000)
    api.complete(ended)
    clock.advance(ms=30_000 - MARGIN_MS)
    assert api.reconcile() == 0
    clock.advance(ms=MARGIN_MS)
    assert api.reconcile() == 3
    for run in runs.values():
        shown = api.run(run)
        assert (shown["status"], shown["cancelReason"], shown["cancelActor"]) == ("cancelled", "deadline", "reconciler")
    assert (api.run(in_time)["status"], api.run(ended)["status"]) == ("pending", "completed")
    refused(api.heartbeat(runs["running"], "a"), 409, "run_cancelled")
    assert api.begin_step(runs["running"], "s", "a")["action"] == "cancelled"


def test_a_retry_after_the_deadline_is_not_cancelled_again(api: Api, clock: Clock) -> None:
    run = api.create(deadlineMs=5_000)
    clock.advance(ms=5_000)
    api.reconcile()
    assert api.post(f"/runs/{run}/retry")["run"]["deadlineAt"] is None
    assert api.reconcile() == 0
    assert api.run(run)["status"] == "pending"


# ------------------------------------------------------------------------------
# Races
# ------------------------------------------------------------------------------
def test_of_two_reconcilers_at_once_one_expires_each_lease(
        api: Api, clock: Clock, start_server: Callable[..., LocalServer]) -> None:
    runs = [claimed(api) for _ in range(10)]
    clock.advance(ms=LEASE_MS)
    others = [start_server() for _ in range(3)]
    with together(*[server.reconciler.tick for server in others]) as counts:
        assert sum(counts) == 10
    for run in runs:
        assert api.event_types(run) == ["run.enqueued", "run.claimed", "run.requeued"]


def test_a_heartbeat_and_the_reconciler_at_once_leave_one_story(api: Api, clock: Clock) -> None:
    for _ in range(3):
        run = claimed(api)
        clock.advance(ms=LEASE_MS)

        def beat(run: str = run) -> Answer:
            return api.heartbeat(run, "a")

        with together(beat, api.reconcile) as (answer, expired):
            assert (answer.status, expired) in ((200, 0), (409, 1))
            assert api.run(run)["status"] == ("running" if answer.status == 200 else "queued")
        api.post(f"/runs/{run}/cancel")


def test_of_a_late_completion_and_a_new_begin_at_once_one_wins(api: Api, clock: Clock) -> None:
    for _ in range(3):
        run = begun(api)
        clock.advance(ms=LEASE_MS)
        with together(lambda: api.complete(run, leaseOwner="a").status,  # noqa: B023
                      lambda: api.begin(run, "b")["leaseOwner"]) as (completed, owner):  # noqa: B023
            assert (completed, owner) in ((200, None), (409, "b"))
