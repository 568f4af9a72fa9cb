"""Whoever comes at once: one wins, the others are told so, nothing is counted twice, and nobody waits for ever.

Each verb takes a run's row before anything that hangs on it, many runs in the order of their ids, and the queues' locks
before all; the last tests here cross every pair of verbs on the same rows.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from conftest import LEASE_MS, Answer, Api, eventually, refused, together


def at_once(*actions: Any) -> list[Any]:
    with together(*actions) as results:
        return results


# --- one of many


def test_of_six_first_begins_of_a_step_exactly_one_executes(api):
    run = api.create()
    for step in ("one", "two", "three"):
        answers = at_once(*[lambda owner=f"w{n}", name=step: api.begin_step(run, name, owner) for n in range(6)])
        assert sorted(answer["action"] for answer in answers) == ["execute"] + ["locked"] * 5
        owner = next(answer["leaseOwner"] for answer in answers if answer["action"] == "execute")
        assert {answer["step"]["leaseOwner"] for answer in answers} == {owner}
    assert api.event_types(run) == ["run.created"] + ["step.started"] * 3


def test_of_six_takeovers_of_an_expired_step_exactly_one_executes(api, clock):
    run = api.create()
    api.begin_step(run, "one", "gone")
    clock.advance(ms=LEASE_MS)
    answers = at_once(*[lambda owner=f"w{n}": api.begin_step(run, "one", owner) for n in range(6)])
    assert sorted(answer["action"] for answer in answers) == ["execute"] + ["locked"] * 5
    assert api.event_types(run) == ["run.created"] + ["step.started"] * 2


def test_of_six_first_begins_of_a_run_exactly_one_gets_the_lease(api):
    run = api.create()
    answers = at_once(*[lambda owner=f"w{n}": api.begin(run, owner) for n in range(6)])
    winner, = [answer["leaseOwner"] for answer in answers if answer.status == 200]
    for answer in answers:
        if answer.status != 200:
            assert refused(answer, 409, "run_leased")["leaseOwner"] == winner
    assert api.run(run)["attempt"] == 1


def test_of_sixteen_creations_with_one_id_exactly_one_creates(api):
    answers = at_once(*[lambda: api.post("/runs/report", {"id": "run_same"})] * 16)
    assert sorted(answer["created"] for answer in answers) == [False] * 15 + [True]
    assert api.event_types("run_same") == ["run.created"]


@pytest.mark.parametrize("ending", ["complete", "fail", "cancel"])
def test_of_eight_equal_endings_one_event_is_written(api, ending):
    run = api.create()
    api.begin(run, "a")
    body = {"error": "x"} if ending == "fail" else {}
    answers = at_once(*[lambda: api.post(f"/runs/{run}/{ending}", body)] * 8)
    assert len({answer["run"]["updatedAt"] for answer in answers}) == 1
    assert len(api.event_types(run)) == 3


def test_of_complete_cancel_and_fail_at_once_one_outcome_stands(api):
    for _ in range(5):
        run = api.create(recoveryWebhook="http://127.0.0.1:1/")
        api.begin(run, "a")
        completed, cancelled, failed = at_once(
            lambda run=run: api.complete(run, leaseOwner="a", result=1),
            lambda run=run: api.post(f"/runs/{run}/cancel"),
            lambda run=run: api.fail(run, leaseOwner="a"))
        status = api.run(run)["status"]
        endings = [kind for kind in api.event_types(run) if kind in ("run.completed", "run.cancelled", "run.failed")]
        assert endings[-1] == f"run.{status}"
        assert endings in (["run.completed"], ["run.cancelled"], ["run.failed", "run.cancelled"])
        if status == "completed":
            refused(cancelled, 409, "run_completed")
            assert failed["run"]["status"] == "completed"
        else:
            assert cancelled["run"]["status"] == "cancelled"
            assert completed["run"]["status"] in ("failed", "cancelled")


def test_of_two_reconcilers_one_requeues(api, start_server, clock):
    other = start_server()
    runs = [api.enqueue() for _ in range(30)]
    api.claim(owner="a", limit=30)
    clock.advance(ms=LEASE_MS)
    done = at_once(api.server.reconciler.tick, other.reconciler.tick)
    assert sum(done) == 30
    for run in runs:
        assert api.event_types(run) == ["run.enqueued", "run.claimed", "run.requeued"]


# --- claims


def test_twelve_claimers_at_two_servers_never_exceed_a_cap_of_three_and_get_all_done(api, start_server, sql):
    apis = [api, Api(start_server().url)]
    api.put("/queues/default/config", {"concurrency": 3})["config"]
    runs = {run["id"] for run in api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 60})["runs"]}
    done: list[str] = []
    most: list[int] = []

    def work(number: int) -> None:
        mine = apis[number % 2]
        while len(done) < len(runs):
            for run in mine.claim(owner=f"w{number}", limit=2, waitMs=200):
                most.append(mine.queue("default")["running"])
                mine.complete(run["id"], leaseOwner=f"w{number}")["run"]
                done.append(run["id"])

    at_once(*[lambda number=n: work(number) for n in range(12)])
    assert sorted(done) == sorted(runs)
    assert max(most) <= 3
    # The record tells the same: how many ran after each claim and each completion.
    running = sql("""select max(running) from (
        select sum(case type when 'run.claimed' then 1 when 'run.completed' then -1 else 0 end)
                 over (order by id) as running from tidebase.events) counted""")
    assert running[0][0] <= 3


def test_a_rate_is_never_exceeded_by_claimers_at_two_servers(api, start_server):
    apis = [api, Api(start_server().url)]
    api.put("/queues/default/config", {"ratePerMinute": 7})["config"]
    api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 30})["runs"]
    taken = at_once(*[lambda number=n: apis[number % 2].claim(limit=3) for n in range(12)])
    assert sum(map(len, taken)) == 7


def test_claims_never_overlap_and_leave_nothing(api, start_server):
    apis = [api, Api(start_server().url)]
    runs = [run["id"] for run in api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 120})["runs"]]

    def work(number: int) -> list[str]:
        mine: list[str] = []
        while taken := apis[number % 2].claim(owner=f"w{number}", limit=1 + number % 7):
            mine += [run["id"] for run in taken]
        return mine

    taken = at_once(*[lambda number=n: work(number) for n in range(8)])
    assert sorted(itertools.chain(*taken)) == sorted(runs)


def test_claimers_that_name_capped_queues_in_different_orders_do_not_wait_for_each_other(api):
    for queue in "ab":
        api.put(f"/queues/{queue}/config", {"concurrency": 50})["config"]
        api.post(f"/queues/{queue}/enqueue", {"runs": [{"workflowName": "w"}] * 40})["runs"]
    taken = at_once(*[lambda order=order: [api.claim(*order) for _ in range(10)] for order in ["ab", "ba"] * 4])
    assert len({run["id"] for claims in taken for claim in claims for run in claim}) == 80


# --- batches


def claimed(api: Api, count: int, owner: str = "a") -> list[str]:
    api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * count})["runs"]
    return [run["id"] for run in api.claim(owner=owner, limit=count)]


def test_batches_of_records_and_heartbeats_that_cross_each_other_all_get_through(api):
    runs = claimed(api, 12)

    def record(number: int, order: list[str]) -> Answer:
        return api.post("/steps", {"records": [
            {"runId": run, "leaseOwner": "a", "name": f"step{number}", "inputHash": "h", "output": number}
            for run in order]})

    def beat(order: list[str]) -> Answer:
        return api.post("/heartbeats", {"runs": [{"id": run, "leaseOwner": "a"} for run in order]})

    back = runs[::-1]
    answers = at_once(*[lambda n=n: record(n, runs if n % 2 else back) for n in range(8)],
                      *[lambda n=n: beat(runs if n % 2 else back) for n in range(8)])
    for answer in answers:
        assert all("error" not in result for result in answer["results"]), answer
    for run in runs:
        assert len(api.events(run)) == 2 + 16


def test_batches_of_enqueues_that_name_the_same_keys_in_different_orders_all_get_through(api):
    keys = [f"k{number}" for number in range(300)]

    def enqueue(order: list[str]) -> Answer:
        return api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w", "dedupeKey": key} for key in order]})

    answers = at_once(*[lambda n=n: enqueue(keys if n % 2 else keys[::-1]) for n in range(8)])
    found = [{run["dedupeKey"]: run["id"] for run in answer["runs"]} for answer in answers]
    assert all(each == found[0] for each in found)
    assert api.queue("default")["queued"] == 300


def test_batches_of_enqueues_that_repeat_ids_in_different_orders_all_get_through(api):
    ids = [run["id"] for run in api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 40})["runs"]]

    def enqueue(order: list[str]) -> Answer:
        return api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w", "id": run} for run in order]})

    answers = at_once(*[lambda n=n: enqueue(ids if n % 2 else ids[::-1]) for n in range(8)])
    assert all({run["id"] for run in answer["runs"]} == set(ids) for answer in answers)


# --- the record


def test_the_events_of_a_run_are_gap_free_under_writers_of_every_kind(api, start_server):
    apis = [api, Api(start_server().url)]
    run = api.create(channels=[{"type": "webhook", "url": "http://127.0.0.1:1/"}], recoveryWebhook="http://127.0.0.1:1/")
    api.begin(run, "a")

    def repeat(action: Any) -> None:
        for number in range(8):
            answer = action(apis[number % 2], number)
            assert answer.status in (200, 409), answer

    def step(mine: Api, number: int) -> Answer:
        begun = mine.begin_step(run, f"step{threading.get_ident()}.{number}", "a")
        return mine.complete_step(run, begun["step"]["id"], "a")

    at_once(*[lambda action=action: repeat(action) for action in [
        step, step,
        lambda mine, number: mine.post(f"/runs/{run}/steps", {
            "leaseOwner": "a", "name": f"record{number}", "inputHash": "h", "output": 1}),
        lambda mine, number: mine.heartbeat(run, "a"),
        lambda mine, number: mine.begin(run, "a"),
        lambda mine, number: mine.post(f"/runs/{run}/recover", {"reason": f"r{number}"}),
        lambda mine, number: mine.put(f"/runs/{run}/state", {"value": {"n": number}}),
        lambda mine, number: mine.send("PATCH", f"/runs/{run}/state", {"value": {"m": number}}),
        lambda mine, number: mine.post(f"/runs/{run}/snapshots", {"label": "l", "state": number}),
        lambda mine, number: mine.post(f"/runs/{run}/usage", {"quantity": number}),
        lambda mine, number: mine.post(f"/runs/{run}/gates/begin", {"name": f"g{number}", "prompt": "?"}),
        lambda mine, number: mine.post(f"/runs/{run}/children", {"name": f"c{number}", "workflowName": "w"}),
    ]])
    api.complete(run, leaseOwner="a")["run"]
    assert len(api.events(run)) > 80
    assert api.events(run)[-1]["type"] == "run.completed" or "recovery" in api.events(run)[-1]["type"]


# --- crossing locks: every pair of verbs on the same rows, in both orders, gets through without a deadlock


def verbs(api: Api, runs: list[str], step: str, gate: Any) -> dict[str, Any]:
    """A call of each verb on the first run, which `a` holds, or on all of them."""
    run = runs[0]
    owned = {"leaseOwner": "a"}
    return {
        "begin": lambda: api.begin(run, "a"),
        "heartbeats": lambda: api.post("/heartbeats", {"runs": [{"id": each, **owned} for each in runs]}),
        "records": lambda: api.post("/steps", {"records": [
            {"runId": each, "name": "r", "inputHash": "h", **owned} for each in reversed(runs)]}),
        "writes": lambda: api.post("/writes", {"writes": [
            *({"do": "record_step", "runId": each, "name": "w", "inputHash": "h", **owned} for each in reversed(runs)),
            *({"do": "complete_run", "runId": each, **owned} for each in reversed(runs))]}),
        "begin_step": lambda: api.begin_step(run, "one", "a"),
        "complete_step": lambda: api.complete_step(run, step, "a"),
        "fail_step": lambda: api.fail_step(run, step, "a", retryable=True),
        "complete": lambda: api.complete(run, **owned),
        "fail": lambda: api.fail(run, **owned),
        "cancel": lambda: api.post(f"/runs/{run}/cancel"),
        "cancel_child": lambda: api.post(f"/runs/{runs[1]}/cancel"),
        "release": lambda: api.post(f"/runs/{run}/release", owned),
        "retry": lambda: api.post(f"/runs/{run}/retry"),
        "recover": lambda: api.post(f"/runs/{run}/recover"),
        "state": lambda: api.put(f"/runs/{run}/state", {"value": 1}),
        "resolve_gate": lambda: api.post(f"/runs/{run}/gates/{gate['id']}/resolve", {
            "token": gate["resolveToken"], "decision": "approved"}),
        "child": lambda: api.post(f"/runs/{run}/children", {"name": "child", "workflowName": "w"}),
        "claim": lambda: api.post("/queues/claim", {"queues": ["default", "other"], "limit": 9}),
        "claim_back": lambda: api.post("/queues/claim", {"queues": ["other", "default"], "limit": 9}),
        "enqueue": lambda: api.post("/queues/default/enqueue", {"workflowName": "w", "dedupeKey": "k"}),
        "config": lambda: api.put("/queues/default/config", {"concurrency": 5}),
        "stats": lambda: api.get("/queues"),
        "tick": api.server.reconciler.tick,
        "send": api.server.sender.tick,
    }


NAMES = ["begin", "heartbeats", "records", "writes", "begin_step", "complete_step", "fail_step", "complete", "fail",
         "cancel", "cancel_child", "release", "retry", "recover", "state", "resolve_gate", "child", "claim",
         "claim_back", "enqueue", "config", "stats", "tick", "send"]


@pytest.mark.parametrize("first", NAMES)
def test_a_verb_and_any_other_on_the_same_rows_both_get_through(api, sql, first):
    for queue in ("default", "other"):
        api.put(f"/queues/{queue}/config", {"concurrency": 1000})["config"]
    for second in NAMES[NAMES.index(first):]:
        hook = "http://127.0.0.1:1/"
        api.enqueue(dedupeKey="k", channels=[{"type": "webhook", "url": hook}], recoveryWebhook=hook, maxAttempts=2)
        run = api.claim(owner="a", limit=1)[0]["id"]
        child = api.post(f"/runs/{run}/children", {"name": "child", "workflowName": "w"})["run"]["id"]
        api.begin(child, "a")
        step = api.begin_step(run, "one", "a")["step"]["id"]
        gate = api.post(f"/runs/{run}/gates/begin", {"name": "g", "prompt": "?"})["gate"]
        calls = verbs(api, [run, child], step, gate)
        answers = at_once(calls[first], calls[second], calls[first], calls[second])
        for answer in answers:
            assert isinstance(answer, int) or answer.status in (200, 409), (first, second, answer)
        [(numbers,)] = sql("select array_agg(seq order by id) from tidebase.events where run_id = %s", run)
        assert numbers == list(range(1, len(numbers) + 1))
        sql("update tidebase.runs set dedupe_key = null, status = 'cancelled', lease_owner = null,"
            " lease_expires_at = null where status in ('pending', 'queued', 'running')")


def test_who_waits_for_a_run_waits_for_its_row_alone_and_goes_on_when_it_is_free(api, database, blocked):
    run = api.create()
    api.begin(run, "a")
    other = api.create()
    with psycopg.connect(database) as holder, ThreadPoolExecutor(3) as threads:
        holder.execute("select from tidebase.runs where id = %s for no key update", (run,))
        waiting = [threads.submit(api.complete, run, leaseOwner="a"), threads.submit(api.heartbeat, run, "a"),
                   threads.submit(api.begin_step, run, "one", "a")]
        blocked(3)
        assert api.complete(other)["run"]["status"] == "completed"  # others are not held up
        assert api.run(run)["status"] == "running"  # nor are readers
        holder.rollback()
        answers = [each.result(15) for each in waiting]
    assert {answer.status for answer in answers} <= {200, 409}
    eventually(lambda: api.run(run)["status"] == "completed")
    assert [kind for kind in api.event_types(run) if kind == "run.completed"] == ["run.completed"]
