"""A run that waits holds no worker, as a workflow sees it: gates, sleeps, signals and children, on both clients.

The actors, which hold the blocking and the awaited client to one story, are those of test_sdk.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import hmac
import json
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import test_sdk
from conftest import Api, eventually, together
from test_sdk import AwaitedActor, in_background, pending_gate

import tidebase_sdk
from tidebase_sdk import FanoutFailed, RunCancelled, RunFailed, SignalTimeout, TidebaseError, WaitTimeout

actor, tide, working = test_sdk.actor, test_sdk.tide, test_sdk.working  # fixtures
awaited_only = pytest.mark.parametrize("actor", [AwaitedActor], indirect=True, ids=["awaited"])


def enqueue(tide: Any, workflow: str, **options: Any) -> str:
    return str(tide(lambda client: client.enqueue(workflow, **options))["run"]["id"])


def is_waiting(api: Api, run_id: str) -> Any:
    return eventually(lambda: api.run(run_id)["status"] == "waiting")


def result(tide: Any, run_id: str) -> Any:
    return tide(lambda client: client.runs.wait(run_id, timeout_s=30))


def decide(api: Api, run_id: str, decision: str = "approved", actor: str = "ada") -> None:
    gate = pending_gate(api, run_id)
    body = {"token": gate["resolveToken"], "decision": decision, "actor": actor}
    assert api.post(f"/runs/{run_id}/gates/{gate['id']}/resolve", body).status == 200


def attempts_of_steps(api: Api, run_id: str) -> Counter[str]:
    return Counter(event["payload"]["name"] for event in api.events(run_id) if event["type"] == "step.started")


# ------------------------------------------------------------------------------
# Gates.
# ------------------------------------------------------------------------------


def test_one_place_serves_100_runs_that_wait_for_a_person_and_whatever_else_comes(
    tide: Any, api: Api, sql: Any, working: Callable[..., None]
) -> None:
    count = 100
    executed: list[str] = []

    async def approval(run: Any, input: Any) -> Any:
        await run.step("draft", lambda: executed.append(f"draft {run.run_id}"))
        decision = await run.gate("approve", "Send it?", hold_s=0)
        await run.step("send", lambda: executed.append(f"send {run.run_id}"))
        return decision.actor

    async def ordinary(run: Any, input: Any) -> str:
        return "served"

    working(tide, {"approval": approval, "ordinary": ordinary}, concurrency=1)
    answer = api.post("/queues/default/enqueue", {"runs": [{"workflowName": "approval"}] * count})
    run_ids = [run["id"] for run in answer["runs"]]
    eventually(lambda: api.queue("default")["waiting"] == count, 60)
    assert result(tide, enqueue(tide, "ordinary")) == "served"
    assert api.queue("default")["waiting"] == count

    gates = sql("select run_id, id, resolve_token from tidebase.gates")

    def approve(some: list[Any]) -> None:
        for run_id, gate_id, token in some:
            body = {"token": token, "decision": "approved", "actor": run_id}
            assert api.post(f"/runs/{run_id}/gates/{gate_id}/resolve", body).status == 200

    with together(*[lambda n=n: approve(gates[n::4]) for n in range(4)]):
        eventually(lambda: api.queue("default")["completed"] == count + 1, 60)
    assert sql("select count(*) from tidebase.runs where workflow_name = 'approval' and status = 'completed'"
               " and attempt = 1 and result #>> '{}' = id") == [(count,)]
    assert Counter(executed) == Counter([f"{step} {run_id}" for run_id in run_ids for step in ("draft", "send")])


def test_a_gate_decided_three_leases_later_completes_as_attempt_one(
    tide: Any, api: Api, clock: Any, working: Callable[..., None]
) -> None:
    async def approval(run: Any, input: Any) -> Any:
        return [(await run.gate("approve", "Send it?", hold_s=0)).approved, run.attempt]

    run_id = enqueue(tide, "approval")
    working(tide, {"approval": approval})
    for _ in range(3):
        is_waiting(api, run_id)
        clock.advance(ms=60_001)
        api.reconcile()
    decide(api, run_id)
    assert result(tide, run_id) == [True, 1]


def test_a_gate_decided_while_the_worker_holds_on_costs_no_replay(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    async def approval(run: Any, input: Any) -> Any:
        return (await run.gate("approve", "Send it?", hold_s=20)).status

    run_id = enqueue(tide, "approval")
    working(tide, {"approval": approval})
    decide(api, run_id, "rejected")
    assert result(tide, run_id) == "rejected"
    assert "run.waiting" not in api.event_types(run_id)


def test_a_run_that_is_executed_by_tide_run_waits_in_place(tide: Any, api: Api) -> None:
    entered: list[int] = []

    async def approval(run: Any, input: Any) -> Any:
        entered.append(1)
        await run.sleep(0.05, hold_s=0)
        approved = (await run.gate("approve", "Send it?", hold_s=0, poll_s=20)).approved
        return [approved, await run.wait_for_signal("paid", hold_s=0)]

    for run_id in (api.create("approval"), api.enqueue(workflow="approval")):  # with a queue it is the caller's as well
        outcome = in_background(lambda: tide(
            lambda client: client.run("approval", tide.workflow(approval), run_id=run_id)))  # noqa: B023
        decide(api, run_id)
        tide(lambda client: client.runs.signal(run_id, "paid", {"cents": 5}))  # noqa: B023
        assert outcome() == [True, {"cents": 5}]
        assert "run.waiting" not in api.event_types(run_id)
    assert len(entered) == 2


# ------------------------------------------------------------------------------
# The unwinding.
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["except Exception", "bare except", "another exception", "finally"])
def test_however_a_workflow_is_unwound_it_neither_fails_nor_completes_before_it_is_woken(
    tide: Any, api: Api, working: Callable[..., None], way: str
) -> None:
    seen: list[str] = []

    async def flow(run: Any, input: Any) -> str:
        try:
            await run.gate("approve", "Sure?", hold_s=0)
        except Exception:
            seen.append("swallowed")
        except BaseException as unwinding:
            seen.append(type(unwinding).__name__)
            if way == "bare except":
                return "done without an answer"
            if way == "another exception":
                raise ValueError("hides it") from unwinding
            raise
        finally:
            seen.append("finally")
        return "decided"

    failures: list[Any] = []
    run_id = enqueue(tide, "flow")
    working(tide, {"flow": flow}, on_error=failures.append)
    is_waiting(api, run_id)
    decide(api, run_id)
    assert result(tide, run_id) == "decided"
    assert seen == ["RunSuspended", "finally", "finally"]
    assert failures == []
    assert api.run(run_id)["attempt"] == 1


def test_a_run_does_not_leave_its_worker_while_a_step_is_under_way_beside_the_wait(
    tide: Any, api: Api, working: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "GATE_POLL_S", 0.05)
    go, executed = threading.Event(), []

    def slow() -> str:
        executed.append(1)
        go.wait(20)
        return "worked"

    async def flow(run: Any, input: Any) -> Any:
        if isinstance(tide, AwaitedActor):
            other = asyncio.ensure_future(run.step("slow", slow))
            while not executed:
                await asyncio.sleep(0)
            decision = await run.gate("approve", "Sure?", hold_s=0, poll_s=0.05)
            return [decision.approved, await other]
        blocking = run._run
        other = in_background(lambda: blocking.step("slow", slow))
        eventually(lambda: executed)
        decision = blocking.gate("approve", "Sure?", hold_s=0, poll_s=0.05)
        return [decision.approved, other()]

    run_id = enqueue(tide, "flow")
    working(tide, {"flow": flow})
    pending_gate(api, run_id)
    with pytest.raises(WaitTimeout):
        tide(lambda client: client.runs.wait(run_id, timeout_s=0.5))
    assert api.run(run_id)["status"] == "running"
    go.set()
    is_waiting(api, run_id)  # nothing else is under way any more
    decide(api, run_id)
    assert result(tide, run_id) == [True, "worked"]
    assert executed == [1]


@awaited_only
def test_a_task_group_that_wraps_the_unwinding_does_not_fail_the_run(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    async def flow(run: Any, input: Any) -> Any:
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(run.gate(name, "Sure?", hold_s=0)) for name in ("first", "second")]
        return [wait.result().actor for wait in waits]

    run_id = enqueue(tide, "flow")
    working(tide, {"flow": flow})
    eventually(lambda: len(api.detail(run_id)["gates"]) == 2)
    is_waiting(api, run_id)
    for gate in api.detail(run_id)["gates"]:
        body = {"token": gate["resolveToken"], "decision": "approved", "actor": gate["name"]}
        assert api.post(f"/runs/{run_id}/gates/{gate['id']}/resolve", body).status == 200
    assert result(tide, run_id) == ["first", "second"]
    assert api.run(run_id)["attempt"] == 1


# ------------------------------------------------------------------------------
# Sleeps.
# ------------------------------------------------------------------------------


def test_a_sleep_of_two_hours_ends_by_the_databases_clock_and_is_not_slept_again(
    tide: Any, api: Api, clock: Any, working: Callable[..., None]
) -> None:
    calls: list[int] = []

    async def drip(run: Any, input: Any) -> int:
        calls.append(run.attempt)
        await run.sleep(7200 if len(calls) == 1 else 1e6)  # other seconds in a replay do not move it
        if run.attempt == 1:
            raise RuntimeError
        return run.attempt

    run_id = enqueue(tide, "drip")
    working(tide, {"drip": drip})
    is_waiting(api, run_id)
    clock.advance(ms=7_190_000)
    api.reconcile()
    assert api.run(run_id)["status"] == "waiting"
    clock.advance(ms=10_000)
    api.reconcile()
    eventually(lambda: api.run(run_id)["status"] == "queued" and calls == [1, 1])  # it slept, and failed
    clock.advance(ms=10_000)
    assert result(tide, run_id) == 2
    assert calls == [1, 1, 2]
    assert api.event_types(run_id).count("run.resumed") == 1
    assert attempts_of_steps(api, run_id) == {"sleep:1": 1}


def test_a_sleep_may_end_at_a_time_and_have_a_name(tide: Any, api: Api, working: Callable[..., None]) -> None:
    async def flow(run: Any, input: Any) -> None:
        now = datetime.now(UTC)
        await run.sleep(until=now - timedelta(days=1), name="over")
        await run.sleep(until=now + timedelta(days=1), name="tomorrow")

    run_id = enqueue(tide, "flow")
    working(tide, {"flow": flow})
    is_waiting(api, run_id)
    assert attempts_of_steps(api, run_id) == {"sleep:over": 1, "sleep:tomorrow": 1}
    with pytest.raises(ValueError, match="either seconds or until"):
        tide(lambda client: client.run("bad", tide.workflow(lambda run, input: run.sleep())))


def test_a_short_sleep_keeps_the_worker(tide: Any, api: Api, working: Callable[..., None]) -> None:
    async def flow(run: Any, input: Any) -> str:
        await run.sleep(0.1)
        return "awake"

    run_id = enqueue(tide, "flow")
    working(tide, {"flow": flow})
    assert result(tide, run_id) == "awake"
    assert "run.waiting" not in api.event_types(run_id)


def test_100_runs_that_sleep_wake_though_the_server_is_killed_meanwhile(
    spawn_server: Callable[..., Any], actor: Callable[..., Any], sql: Any, clock: Any, working: Callable[..., None]
) -> None:
    server = spawn_server()
    api, tide = Api(server.url), actor(server.url)
    slept: list[str] = []

    async def flow(run: Any, input: Any) -> None:
        await run.step("before", lambda: slept.append(f"before {run.run_id}"))
        await run.sleep(3600)
        await run.step("after", lambda: slept.append(f"after {run.run_id}"))

    answer = api.post("/queues/default/enqueue", {"runs": [{"workflowName": "flow"}] * 100})
    run_ids = [run["id"] for run in answer["runs"]]
    working(tide, {"flow": flow}, concurrency=8, limit=8)
    eventually(lambda: sql("select count(*) from tidebase.runs where status = 'waiting'") == [(100,)], 30)
    server.end(9)
    clock.advance(ms=3_600_000)  # while it is down
    server.start()
    eventually(lambda: sql("select count(*) from tidebase.runs where status = 'completed'") == [(100,)], 30)
    assert sql("select attempt, count(*) from tidebase.runs group by attempt") == [(1, 100)]
    assert Counter(slept) == Counter([f"{when} {run_id}" for run_id in run_ids for when in ("before", "after")])


# ------------------------------------------------------------------------------
# Signals.
# ------------------------------------------------------------------------------


def test_a_signal_wakes_its_run_once_and_one_sent_early_is_kept(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    async def order(run: Any, input: Any) -> Any:
        first = await run.wait_for_signal("early", hold_s=0)
        return [first, await run.wait_for_signal("paid", timeout_s=3600, hold_s=0), run.attempt]

    run_id = enqueue(tide, "order")
    tide(lambda client: client.runs.signal(run_id, "early", 1))
    working(tide, {"order": order})
    is_waiting(api, run_id)
    tide(lambda client: client.runs.signal(run_id, "paid", {"cents": 500}))
    assert result(tide, run_id) == [1, {"cents": 500}, 1]
    assert api.event_types(run_id).count("run.resumed") == 1


def test_a_signal_that_does_not_come_in_time_is_timed_out_for_every_replay(
    tide: Any, api: Api, clock: Any, working: Callable[..., None]
) -> None:
    async def order(run: Any, input: Any) -> Any:
        try:
            await run.wait_for_signal("paid", timeout_s=3600, hold_s=0)
        except SignalTimeout:
            return [await run.wait_for_signal("go", hold_s=0), "unpaid"]

    run_id = enqueue(tide, "order")
    working(tide, {"order": order})
    is_waiting(api, run_id)
    clock.advance(ms=3_600_000)
    api.reconcile()
    eventually(lambda: (api.run(run_id)["waitingFor"] or {}).get("event") == "go")
    late = tide(lambda client: client.runs.signal(run_id, "paid", 1))
    assert (late["n"], late["timedOut"]) == (2, False)  # for the next wait, where there is one
    tide(lambda client: client.runs.signal(run_id, "go", "on"))
    assert result(tide, run_id) == ["on", "unpaid"]


def test_a_signal_awaited_in_place_is_timed_out_for_every_replay(tide: Any, api: Api, clock: Any) -> None:
    seen: list[str] = []

    async def order(run: Any, input: Any) -> None:
        for name, timeout_s in (("early", 60), ("late", 0.05)):
            try:
                seen.append(await run.wait_for_signal(name, timeout_s=timeout_s))
            except SignalTimeout:
                seen.append("too late")
        raise RuntimeError

    run_id = api.create("order")
    api.post(f"/runs/{run_id}/signals", {"name": "early", "payload": "in time"})
    for _ in range(2):
        with pytest.raises(RuntimeError):
            tide(lambda client: client.run("order", tide.workflow(order), run_id=run_id))
        api.post(f"/runs/{run_id}/signals", {"name": "late", "payload": "ignored"})
        clock.advance(ms=120_000)  # also what came in time stays so, however late it is asked for again
    assert seen == ["in time", "too late"] * 2


# ------------------------------------------------------------------------------
# Children on queues, and the end of a run.
# ------------------------------------------------------------------------------


def test_a_parent_waits_for_children_of_other_workers_without_one(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    entered: list[int] = []

    async def double(run: Any, input: Any) -> int:
        return int(input["n"]) * 2

    async def parent(run: Any, input: Any) -> Any:
        entered.append(run.attempt)
        one = await run.child("double", name="one", input={"n": 21}, queue="default", priority=5)
        some = [{"name": f"n{n}", "workflow": "double", "input": {"n": n}} for n in range(10)]
        return [one, await run.fanout("some", some, queue="default")]

    run_id = enqueue(tide, "parent")
    working(tide, {"parent": parent, "double": double}, concurrency=1)  # one place: the parent must not keep it
    assert result(tide, run_id) == [42, [n * 2 for n in range(10)]]
    assert entered == [1, 1, 1]
    detail = api.detail(run_id)
    assert [step["name"] for step in detail["steps"]] == ["join:some"]
    assert {run["attempt"] for run in detail["childRuns"]} == {1}
    assert len(detail["childRuns"]) == 11


@awaited_only
def test_1000_children_are_joined_and_a_replay_asks_for_them_in_one_request(
    tide: Any, api: Api, sql: Any, working: Callable[..., None]
) -> None:
    paths: list[str] = []

    def note(effect: Any) -> None:
        verbs = {write["do"] for write in json.loads(effect.body)["writes"]} if effect.path == "/writes" else ""
        paths.append(f"{effect.method} {effect.path} {' '.join(verbs)}")

    test_sdk.on_requests(tide, note)

    async def square(run: Any, input: Any) -> int:
        return int(input) ** 2

    async def parent(run: Any, input: Any) -> int:
        paths.append("entered")
        children = [{"name": f"n{n}", "workflow": "square", "input": n} for n in range(1000)]
        return sum(await run.fanout("squares", children, queue="default"))

    run_id = enqueue(tide, "parent", queue="parents")
    working(tide, {"parent": parent}, queues=("parents",))
    is_waiting(api, run_id)
    before = len(paths)
    working(tide, {"square": square}, concurrency=100, limit=100)
    assert tide(lambda client: client.runs.wait(run_id, timeout_s=60)) == sum(n * n for n in range(1000))
    replay = paths[paths.index("entered", before):]
    assert len([path for path in replay if f"/runs/{run_id}" in path and "GET" in path]) == 1
    assert [path for path in replay if "create_child" in path] == []
    assert [path for path in paths[:before] if "create_child" in path] == 10 * ["POST /writes create_child"]
    assert sql("select status, attempt, count(*) from tidebase.runs group by 1, 2") == [("completed", 1, 1001)]


@pytest.mark.parametrize("count", [1, 3])
def test_a_parent_that_was_cancelled_is_told_by_its_fanout_and_executes_no_further_step(
    tide: Any, api: Api, count: int
) -> None:
    executed: list[str] = []

    async def parent(run: Any, input: Any) -> None:
        api.post(f"/runs/{run.run_id}/cancel")["run"]
        children = [{"name": f"c{n}", "workflow": "elsewhere"} for n in range(count)]
        with contextlib.suppress(RunCancelled):
            await run.fanout("all", children, queue="default")
        await run.step("after", lambda: executed.append("after"))

    with pytest.raises(RunCancelled):
        tide(lambda client: client.run("parent", tide.workflow(parent)))
    assert executed == []


def test_children_that_are_too_large_for_one_request_go_in_several(
    actor: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    server = start_server(TIDEBASE_MAX_BODY=100_000)
    tide, api = actor(server.url), Api(server.url, server)

    async def parent(run: Any, input: Any) -> Any:
        children = [{"name": f"c{n}", "workflow": "elsewhere", "input": "x" * 10_000} for n in range(30)]
        children[20]["max_attempts"] = 0
        return await run.fanout("all", children, queue="default")

    with pytest.raises(TidebaseError) as refused:
        tide(lambda client: client.run("parent", tide.workflow(parent), run_id="p"))
    assert [issue["path"] for issue in refused.value.body["issues"]] == ["maxAttempts"]
    assert len(api.detail("p")["childRuns"]) == 29


def test_results_of_children_that_lists_leave_out_arrive_whole(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    async def child(run: Any, input: Any) -> str:
        return "x" * (100_000 + int(input))

    async def parent(run: Any, input: Any) -> list[int]:
        children = [{"name": f"c{n}", "workflow": "child", "input": n} for n in range(3)]
        return [len(result) for result in await run.fanout("all", children, queue="default")]

    run_id = enqueue(tide, "parent")
    working(tide, {"parent": parent, "child": child}, concurrency=2)
    assert result(tide, run_id) == [100_000, 100_001, 100_002]


def test_a_replay_finds_its_children_though_their_results_are_too_large_for_one_answer(tide: Any, api: Api) -> None:
    async def parent(run: Any, input: Any) -> list[int]:
        children = [{"name": f"c{n}", "workflow": "elsewhere"} for n in range(7)]
        return [len(result) for result in await run.fanout("all", children, queue="default", checkpoint=False)]

    run_id = api.create("parent")
    for n in range(7):
        child = api.post(f"/runs/{run_id}/children", {"name": f"c{n}", "workflowName": "elsewhere", "queue": "default"})
        api.complete(child["run"]["id"], result="x" * (3_000_000 + n))["run"]
    done = tide(lambda client: client.run("parent", tide.workflow(parent), run_id=run_id))
    assert done == [3_000_000 + n for n in range(7)]


@pytest.mark.parametrize("queue", [None, "default"], ids=["here", "on a queue"])
def test_failed_children_surface_as_one_error_or_stand_in_the_list(
    tide: Any, api: Api, working: Callable[..., None], queue: str | None
) -> None:
    seen: list[Any] = []

    async def divide(run: Any, input: Any) -> float:
        return float(1 / input)

    async def parent(run: Any, input: Any) -> Any:
        workflow = tide.workflow(divide)
        some = [{"name": f"by {by}", "workflow": workflow, "input": by, "workflow_name": "divide", "max_attempts": 1}
                for by in (1, 0, 2)]
        joined = await run.fanout("some", some, queue=queue, return_errors=True)
        seen.append([value if isinstance(value, float) else (type(value), value.error["name"]) for value in joined])
        if len(seen) == 1:
            raise RuntimeError  # what the step has recorded is what a replay is told
        try:
            await run.fanout("some", some, queue=queue, checkpoint=False)
        except FanoutFailed as failed:
            return [list(failed.errors), "ZeroDivisionError" in str(failed), failed.retryable]

    run_id = api.create("parent")
    working(tide, {"divide": divide}, concurrency=3)

    def execute() -> Any:
        return tide(lambda client: client.run("parent", tide.workflow(parent), run_id=run_id))

    with pytest.raises(RuntimeError):
        execute()
    assert execute() == [["by 0#2"], True, queue is None]  # on a queue it had its attempts
    assert seen == [[1.0, (RunFailed, "ZeroDivisionError"), 0.5]] * 2


def test_a_child_that_failed_for_good_fails_its_parent_at_once(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    async def broken(run: Any, input: Any) -> None:
        raise LookupError("nothing there")

    async def parent(run: Any, input: Any) -> Any:
        await run.child("broken", queue="default", max_attempts=1)

    run_id = enqueue(tide, "parent")
    working(tide, {"parent": parent, "broken": broken})
    with pytest.raises(RunFailed, match=r"RunFailed: run run_\w+ failed: LookupError: nothing there") as failed:
        result(tide, run_id)
    assert (failed.value.run_id, failed.value.error["name"]) == (run_id, "RunFailed")
    assert api.run(run_id)["attempt"] == 1


def test_the_end_of_a_run_is_waited_for_without_polling(tide: Any, api: Api) -> None:
    run_id = api.enqueue()
    paths: list[str] = []
    perform = type(tide.client._driver)._exchange
    tide.client._driver._exchange = lambda effect: paths.append(effect.path) or perform(tide.client._driver, effect)
    outcome = in_background(lambda: tide(lambda client: client.runs.wait(run_id)))
    eventually(lambda: paths)
    api.complete(run_id, result={"pages": 3})
    assert outcome() == {"pages": 3}
    assert len(paths) == 1


def test_the_end_of_a_run_is_told_as_it_was(tide: Any, api: Api) -> None:
    run_id = api.enqueue(maxAttempts=1)
    with pytest.raises(TimeoutError):
        tide(lambda client: client.runs.wait(run_id, timeout_s=0.05))
    api.claim()
    api.fail(run_id, error={"name": "ValueError", "message": "no such topic"}, failureClass="bad_topic")
    with pytest.raises(RunFailed, match="ValueError: no such topic") as failed:
        result(tide, run_id)
    assert (failed.value.failure_class, failed.value.error["message"]) == ("bad_topic", "no such topic")
    cancelled = api.enqueue()
    api.post(f"/runs/{cancelled}/cancel", {"reason": "enough"})
    with pytest.raises(RunCancelled, match="enough"):
        result(tide, cancelled)


# ------------------------------------------------------------------------------
# Push mode.
# ------------------------------------------------------------------------------


def test_a_pushed_run_that_begins_to_wait_is_answered_at_once_and_its_wake_up_is_another_webhook(
    actor: Callable[..., Any], server: Any, api: Api, receiver: Any
) -> None:
    tide = actor(server.url, webhook_secret="shared")
    executed: list[str] = []

    async def flow(run: Any, input: Any) -> Any:
        await run.step("draft", lambda: executed.append("draft"))
        return (await run.gate("approve", "Send it?", hold_s=0)).actor

    tide.client.workflow("flow", tide.workflow(flow))
    api.put("/queues/default/config", {"invokeUrl": receiver.url})["config"]

    def deliver(count: int) -> Any:
        """Hand the app the webhook that the server sends now."""
        api.reconcile()
        raw = json.dumps(receiver.wait_for(count)[-1]).encode()
        header = "sha256=" + hmac.new(b"shared", raw, hashlib.sha256).hexdigest()
        return tide(lambda client: client.handle_webhook(raw, header))

    run_id = api.enqueue(workflow="flow")
    assert deliver(1) == (200, {"runId": run_id, "status": "waiting"})
    assert api.run(run_id)["status"] == "waiting"
    decide(api, run_id)
    assert deliver(2) == (200, {"runId": run_id, "status": "completed"})
    assert [body["type"] for body in receiver.bodies()] == ["run.invoke", "run.invoke"]
    assert api.run(run_id)["result"] == "ada"
    assert executed == ["draft"]


@awaited_only
def test_two_waits_in_one_task_group_leave_the_worker_without_noise(
    tide: Any, api: Api, working: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def flow(run: Any, input: Any) -> list[Any]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run.gate(f"gate {n}", "Sure?", hold_s=0)) for n in range(2)]
        return [task.result().actor for task in tasks]

    run_id = enqueue(tide, "flow")
    working(tide, {"flow": flow})
    is_waiting(api, run_id)
    for gate in api.detail(run_id)["gates"]:
        body = {"token": gate["resolveToken"], "decision": "approved", "actor": "ada"}
        assert api.post(f"/runs/{run_id}/gates/{gate['id']}/resolve", body).status == 200
    assert result(tide, run_id) == ["ada", "ada"]
    gc.collect()  # what nobody retrieved is told of when it is collected
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def wait_twice(run: Any) -> list[Any]:
    """A gate and a signal, waited for side by side."""
    async with asyncio.TaskGroup() as group:
        gate = group.create_task(run.gate("gate", "Sure?", poll_s=0.5))
        paid = group.create_task(run.wait_for_signal("paid"))
    return [gate.result().actor, paid.result()]


@awaited_only
@pytest.mark.parametrize("way", ["run", "attach"])
def test_two_waits_in_one_task_group_wait_in_place_in_a_run_that_no_worker_holds(
    tide: Any, api: Api, way: str
) -> None:
    run_id = api.create("flow")

    async def session(client: Any) -> Any:
        async with await client.attach("flow", run_id=run_id) as run:
            return (await run.complete(await wait_twice(run)))["run"]["result"]

    outcome = in_background(lambda: tide(
        session if way == "attach" else lambda client: client.run("flow", wait_twice, run_id=run_id)))
    eventually(lambda: len(api.detail(run_id)["steps"]) == len(api.detail(run_id)["gates"]) == 1)
    [gate] = api.detail(run_id)["gates"]
    api.post(f"/runs/{run_id}/signals", {"name": "paid", "payload": 5})["signal"]
    body = {"token": gate["resolveToken"], "decision": "approved", "actor": "ada"}
    api.post(f"/runs/{run_id}/gates/{gate['id']}/resolve", body)["gate"]
    assert outcome() == ["ada", 5]
    assert (api.run(run_id)["status"], api.run(run_id)["attempt"]) == ("completed", 1)
    assert "run.waiting" not in api.event_types(run_id)


@awaited_only
@pytest.mark.parametrize("way", ["run", "attach"])
def test_a_run_that_is_cancelled_unwinds_both_waits_of_its_task_group(tide: Any, api: Api, way: str) -> None:
    run_id = api.create("flow")

    async def session(client: Any) -> None:
        try:
            async with await client.attach("flow", run_id=run_id) as run:
                await wait_twice(run)
        except* RunCancelled as group:
            errors.extend(group.exceptions)

    async def whole_run(client: Any) -> None:
        try:
            await client.run("flow", wait_twice, run_id=run_id)
        except RunCancelled as error:
            errors.append(error)

    errors: list[Any] = []
    outcome = in_background(lambda: tide(session if way == "attach" else whole_run))
    eventually(lambda: len(api.detail(run_id)["steps"]) == len(api.detail(run_id)["gates"]) == 1)
    api.post(f"/runs/{run_id}/cancel")["run"]
    outcome()
    assert {error.run_id for error in errors} == {run_id}
