"""A step is written once, steps that are ready together go in one request, and a worker's claim is held by the server.

Told on both clients, with the actors of test_sdk.py and a hand on the wire between a client and its server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import test_sdk
from conftest import ROOT, Api, eventually
from test_sdk import completed_twice, in_background

import tidebase_sdk
from tidebase_sdk import (
    AsyncTidebase,
    RunCancelled,
    StepInputMismatch,
    StepNeedsReview,
    TidebaseError,
    input_hash,
    new_run_id,
)

actor, tide, working = test_sdk.actor, test_sdk.tide, test_sdk.working  # fixtures
NULL = input_hash(None)


def verbs(body: Any) -> list[str]:
    """What a request makes durable: the verbs of its writes."""
    return [write["do"] for write in (body or {}).get("writes", ())]


class Wire:
    """What a client sends, and a hand on it.

    before(effect) is called ahead of each request and may block it, after(effect, reply) with its answer; what they
    raise is what the client meets.
    """

    def __init__(self, client: Any) -> None:
        self.sent: list[tuple[str, Any]] = []  # path, body
        self.before: Callable[[Any], None] = lambda effect: None
        self.after: Callable[[Any, Any], None] = lambda effect, reply: None
        for driver in {client._driver, client._threads}:
            self._tap(driver)

    def _tap(self, driver: Any) -> None:
        exchange = driver._exchange

        def blocking(effect: Any) -> Any:
            self._note(effect)
            self.before(effect)
            reply = exchange(effect)
            self.after(effect, reply)
            return reply

        async def awaited(effect: Any) -> Any:
            self._note(effect)
            await asyncio.to_thread(self.before, effect)
            reply = await exchange(effect)
            await asyncio.to_thread(self.after, effect, reply)
            return reply

        driver._exchange = awaited if driver.awaited else blocking

    def _note(self, effect: Any) -> None:
        self.sent.append((effect.path, json.loads(effect.body) if effect.body else None))

    def writes(self, *of: str) -> list[str]:
        """The verbs of all writes sent, or of those among them."""
        return [verb for _, body in list(self.sent) for verb in verbs(body) if not of or verb in of]

    def batches(self) -> list[int]:
        """How many steps each request with finished steps carried."""
        steps = [verbs(body).count("record_step") for _, body in list(self.sent)]
        return [count for count in steps if count]

    def hold(self, verb: str) -> threading.Event:
        """Keep back the next request that has such a write, until the event is set."""
        free = threading.Event()
        taken = self.taken = threading.Lock()  # held once there was such a request

        def before(effect: Any) -> None:
            if effect.path == "/writes" and verb in verbs(json.loads(effect.body)) and taken.acquire(blocking=False):
                assert free.wait(30)

        self.before = before
        return free

    def lose_answers(self, count: int) -> list[str]:
        """Lose the answers to the next requests with writes.  Returns the paths of those it befell."""
        lost: list[str] = []

        def after(effect: Any, reply: Any) -> None:
            if effect.path == "/writes" and len(lost) < count:
                lost.append(effect.path)
                raise ConnectionResetError("the answer is lost")

        self.after = after
        return lost


@pytest.fixture
def wire(tide: Any) -> Wire:
    return Wire(tide.client)


def run(tide: Any, flow: Callable[..., Any], **options: Any) -> Any:
    return tide(lambda client: client.run("flow", tide.workflow(flow), **options))


def enqueue(tide: Any, count: int, **options: Any) -> list[str]:
    return [tide(lambda client: client.enqueue("flow", input=n, **options))["run"]["id"] for n in range(count)]  # noqa: B023


# ------------------------------------------------------------------------------
# One write a step.
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"side_effects": "read"}, {"side_effects": []}, {"retries": 2}])
def test_a_step_without_side_effects_is_one_request_after_it_ran(
    tide: Any, api: Api, wire: Wire, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "SLOW_STEP_S", 60.0)  # on a busy machine a step may be slow
    before: list[int] = []

    async def flow(run: Any, input: Any) -> Any:
        return [await run.step(f"step {n}", lambda: before.append(len(wire.writes())) or n, **options)  # noqa: B023
                for n in range(5)]

    run_id = new_run_id()
    assert run(tide, flow, run_id=run_id) == [0, 1, 2, 3, 4]
    assert before == [0, 1, 2, 3, 4]
    assert wire.batches() == [1] * 5
    assert api.event_types(run_id)[2:-1] == ["step.started", "step.completed"] * 5
    assert {(step["attempt"], step["status"]) for step in api.detail(run_id)["steps"]} == {(1, "completed")}


@pytest.mark.parametrize("options", [{"side_effects": ["email"]}, {"side_effects": ["email"], "idempotency_key": "k"},
                                     {"side_effects": ["email"], "replay": "auto"}, {"replay": "never"}])
def test_a_step_that_must_leave_a_trace_is_begun_before_it_runs(tide: Any, api: Api, wire: Wire, options: Any) -> None:
    async def flow(run: Any, input: Any) -> Any:
        return await run.step("mail", lambda: [step["status"] for step in api.detail(run.run_id)["steps"]], **options)

    assert run(tide, flow) == ["running"]
    assert wire.writes() == ["begin_step", "complete_step", "complete_run"]


def test_short_steps_and_runs_do_not_wake_the_thread_that_looks_after_slow_ones(
    tide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats, woken = tide.client._heartbeater, Counter[str]()
    wake = beats._wake.set

    async def flow(run: Any, input: Any) -> None:
        for number in range(20):
            await run.step(f"step {number}", lambda: number)  # noqa: B023

    monkeypatch.setattr(tidebase_sdk, "SLOW_STEP_S", 60.0)  # as long as the test may take
    monkeypatch.setattr(tidebase_sdk, "FIRST_HEARTBEAT_S", 60.0)
    monkeypatch.setattr(beats._wake, "set", lambda: (woken.update(["set"]), wake()))
    for _ in range(3):
        run(tide, flow)
    assert woken["set"] <= 2  # the first lease, the first step


def test_a_step_that_takes_its_time_is_seen_as_running(tide: Any, api: Api) -> None:
    go = threading.Event()

    async def flow(run: Any, input: Any) -> Any:
        return await run.step("slow", lambda: go.wait(20))

    run_id = new_run_id()
    outcome = in_background(lambda: run(tide, flow, run_id=run_id))
    eventually(lambda: api.get(f"/runs/{run_id}").status == 200)
    step = eventually(lambda: next(iter(api.detail(run_id)["steps"]), None))
    assert (step["status"], step["completedAt"]) == ("running", None)
    go.set()
    assert outcome() is True
    assert api.event_types(run_id)[2:-1] == ["step.started", "step.completed"]
    assert api.detail(run_id)["steps"][0]["attempt"] == 1


def test_a_failure_is_recorded_in_one_request_and_its_repeat_changes_nothing(
    tide: Any, api: Api, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "STEP_BACKOFF_S", (0.01, 0.01))
    wire.lose_answers(1)
    tries: list[int] = []

    async def flow(run: Any, input: Any) -> Any:
        return await run.step("flaky", lambda: tries.append(1) or 1 // (len(tries) - 1), retries=1)

    run_id = new_run_id()
    assert run(tide, flow, run_id=run_id) == 1
    assert (wire.batches(), len(tries)) == ([1, 1, 1], 2)
    assert api.event_types(run_id)[2:-1] == ["step.started", "step.failed", "step.started", "step.completed"]


def owner_of(api: Api, run_id: str) -> str:
    """The owner under whom a client works on a run, and something else writes here, too."""
    return str(api.run(run_id)["leaseOwner"])


def other_begins(api: Api, run_id: str, hash: str = NULL) -> Any:
    return api.begin_step(run_id, "slow", owner_of(api, run_id), hash=hash)["step"]["id"]


def other_fails(api: Api, run_id: str) -> None:
    step, owner = other_begins(api, run_id), owner_of(api, run_id)
    api.fail_step(run_id, step, owner, resumeDecision="manual_review")["step"]


REFUSALS = {
    "cancelled": (lambda api, run_id: api.post(f"/runs/{run_id}/cancel")["run"], RunCancelled),
    "input_mismatch": (lambda api, run_id: other_begins(api, run_id, "another"), StepInputMismatch),
    "manual_review": (other_fails, StepNeedsReview),
}


@pytest.mark.parametrize("announced", [False, True], ids=["fast", "announced"])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_server_would_have_refused_is_refused_at_the_end_of_the_step(
    tide: Any, api: Api, wire: Wire, case: str, announced: bool
) -> None:
    interfere, error = REFUSALS[case]

    def slow() -> None:
        if announced:
            eventually(lambda: wire.writes("begin_step"))

    async def flow(run: Any, input: Any) -> None:
        interfere(api, run_id)  # before the step, which might else be announced first
        await run.step("slow", slow)

    run_id = new_run_id()
    with pytest.raises(error):
        run(tide, flow, run_id=run_id)
    assert "step.completed" not in api.event_types(run_id)


def test_a_step_that_another_owner_is_at_is_waited_for_once_that_is_known(
    tide: Any, api: Api, wire: Wire, sql: Callable[..., Any]
) -> None:
    def slow() -> str:
        eventually(lambda: wire.writes("begin_step"))
        return "ours"

    async def flow(run: Any, input: Any) -> Any:
        begun.append(other_begins(api, run_id))  # before the step, which might else be announced first
        sql("update tidebase.steps set lease_owner = 'somebody else'")  # who began it while the run's lease was over
        return await run.step("slow", slow)

    begun: list[str] = []
    run_id = new_run_id()
    outcome = in_background(lambda: run(tide, flow, run_id=run_id))
    eventually(lambda: len(wire.writes("begin_step")) > 1)
    api.complete_step(run_id, begun[0], "somebody else", "theirs")["step"]
    assert outcome() == "theirs"


def test_what_was_recorded_meanwhile_is_the_truth(tide: Any, api: Api) -> None:
    def record(name: str, output: str) -> str:
        return api.do_step(run_id, name, owner_of(api, run_id), output, hash=NULL)

    async def flow(run: Any, input: Any) -> Any:
        kept = await run.step("raced", lambda: record("raced", "theirs") and "ours")
        failed = await run.step("failing", lambda: record("failing", "well") and 1 / 0)
        return [kept, failed]

    run_id = new_run_id()
    assert run(tide, flow, run_id=run_id) == ["theirs", "well"]
    assert completed_twice(api, run_id) == []


def test_a_step_whose_checkpoint_did_not_come_along_is_asked_for_before_it_runs(tide: Any) -> None:
    calls: list[str] = []

    async def flow(run: Any, input: Any) -> Any:
        sizes = [len(await run.step(f"big {n}", lambda n=n: calls.append(f"big {n}") or "x" * 1_700_000))
                 for n in range(3)]
        if run.attempt == 1:
            raise RuntimeError
        return [*sizes, await run.step("new", lambda: calls.append("new"))]

    run_id = new_run_id()
    with pytest.raises(RuntimeError):
        run(tide, flow, run_id=run_id)
    assert run(tide, flow, run_id=run_id) == [1_700_000] * 3 + [None]
    assert calls == ["big 0", "big 1", "big 2", "new"]


def test_1000_completed_steps_come_with_the_lease_and_are_replayed_without_a_request(
    tide: Any, api: Api, wire: Wire
) -> None:
    run_id = api.create("flow")
    owner = api.begin(run_id)["leaseOwner"]
    records = [{"runId": run_id, "name": f"step {n}", "inputHash": NULL, "output": n, "leaseOwner": owner}
               for n in range(1000)]
    assert all("step" in result for result in api.post("/steps", {"records": records})["results"])
    api.post(f"/runs/{run_id}/release", {"leaseOwner": owner})["run"]

    async def flow(run: Any, input: Any) -> Any:
        total = sum([await run.step(f"step {n}", lambda: pytest.fail("executed again")) for n in range(1000)])
        return await run.step("sum", lambda: total)

    assert run(tide, flow, run_id=run_id) == sum(range(1000))
    assert [path for path, _ in wire.sent] == ["/runs/flow", f"/runs/{run_id}/begin", "/writes", "/writes"]
    assert wire.writes() == ["record_step", "complete_run"]


# ------------------------------------------------------------------------------
# Group commit.
# ------------------------------------------------------------------------------


@pytest.fixture
def together(
    tide: Any, wire: Wire, working: Callable[..., None], api: Api, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Has many runs at a step at once: the first request with a finished step is kept back until the steps of all the
    others wait for their turn. together(count, act, meanwhile=…) -> the ids of the runs."""
    monkeypatch.setattr(tidebase_sdk, "MAX_IN_FLIGHT", 1)

    def start(count: int, act: Callable[[Any], Any] = lambda n: n,
              meanwhile: Callable[[list[str]], None] = lambda ids: None, **options: Any) -> list[str]:
        async def flow(run: Any, input: Any) -> Any:
            name = f"step\0{input}" if input in options.get("nul", ()) else "step"
            return await run.step(name, lambda: act(input))

        ids = enqueue(tide, 1)
        free = wire.hold("record_step")
        working(tide, {"flow": flow}, concurrency=count, on_error=options.get("on_error"))
        eventually(wire.batches)
        ids += [api.enqueue(workflow="flow", input=n) for n in range(1, count)]
        eventually(lambda: len(tide.client._batcher._ready) == count - 1)
        meanwhile(ids)
        free.set()
        return ids

    return start


def test_what_is_ready_while_a_request_is_under_way_goes_with_the_next(
    together: Callable[..., list[str]], api: Api, wire: Wire
) -> None:
    ids = together(12)
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in ids))
    assert [api.run(run)["result"] for run in ids] == list(range(12))
    assert wire.batches() == [1, 11]


def test_results_and_new_runs_go_with_what_else_is_ready(
    tide: Any, wire: Wire, working: Callable[..., None], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "MAX_IN_FLIGHT", 1)

    async def flow(run: Any, input: Any) -> Any:
        if input < 2:
            return await run.step("step", lambda: input)
        if input < 4:
            created = tide.client.enqueue("other", queue="elsewhere", input=input)
            return (created if isinstance(created, dict) else await created)["run"]["id"]
        return input

    free = wire.hold("record_step")
    ids = enqueue(tide, 1)
    working(tide, {"flow": flow}, concurrency=6)
    eventually(wire.batches)
    ids += [api.enqueue(workflow="flow", input=n) for n in range(1, 6)]
    eventually(lambda: len(tide.client._batcher._ready) == 5)
    free.set()
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in ids))
    carried = next(Counter(verbs(body)) for _, body in wire.sent if "enqueue_run" in verbs(body)
                   and "complete_run" in verbs(body))
    assert (carried["record_step"], carried["enqueue_run"]) == (1, 2)
    assert carried["complete_run"] >= 2  # the first run may be that far, too
    results = [api.run(run)["result"] for run in ids]
    assert [results[n] for n in (0, 1, 4, 5)] == [0, 1, 4, 5]
    assert [api.run(results[n])["input"] for n in (2, 3)] == [2, 3]


def test_steps_with_effects_go_together_too_and_each_is_begun_before_it_runs(
    tide: Any, wire: Wire, working: Callable[..., None], api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "MAX_IN_FLIGHT", 1)
    begun: dict[str, str] = {}

    async def flow(run: Any, input: Any) -> Any:
        def act() -> Any:
            begun[run.run_id] = api.detail(run.run_id)["steps"][0]["status"]
            return input

        return await run.step("mail", act, side_effects=["email"])

    free = wire.hold("begin_step")
    ids = enqueue(tide, 1)
    working(tide, {"flow": flow}, concurrency=8)
    eventually(lambda: wire.writes("begin_step"))
    ids += [api.enqueue(workflow="flow", input=n) for n in range(1, 8)]
    eventually(lambda: len(tide.client._batcher._ready) == 7)
    free.set()
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in ids))
    assert [api.run(run)["result"] for run in ids] == list(range(8))
    assert begun == dict.fromkeys(ids, "running")
    assert 7 in [verbs(body).count("begin_step") for _, body in wire.sent]
    for run in ids:
        assert api.event_types(run)[2:-1] == ["step.started", "step.completed"]


def run_two_that_are_answered_together(
    server: Any, monkeypatch: pytest.MonkeyPatch, second: Callable[[tidebase_sdk.Tidebase, threading.Thread], None]
) -> list[int]:
    """Execute two runs of two steps, whose first steps go in one request.  second: called in the second step of the
    later run, with the client and the thread of the other run.  Returns how many steps each request carried."""
    tide = tidebase_sdk.Tidebase(server.url)
    wire = Wire(tide)
    with monkeypatch.context() as patch:
        patch.setattr(tidebase_sdk, "MAX_IN_FLIGHT", 1)
        free = wire.hold("enqueue_run")
        threads = [threading.Thread(target=tide.enqueue, args=["other"], kwargs={"queue": "elsewhere"})]
        threads[0].start()
        eventually(wire.taken.locked)

        def flow(run: Any, is_later: bool) -> None:
            run.step("first", lambda: 1)
            run.step("second", (lambda: second(tide, threads[1])) if is_later else (lambda: None))

        for is_later in (False, True):
            threads.append(threading.Thread(target=tide.run, args=["flow", flow], kwargs={"input": is_later}))
            threads[-1].start()
        eventually(lambda: len(tide._batcher._ready) == 2)
        free.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    tide.close()
    return wire.batches()


def test_runs_that_were_answered_together_send_their_next_steps_together(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "GATHER_S", 30.0)

    def second(tide: tidebase_sdk.Tidebase, _: threading.Thread) -> None:
        eventually(lambda: len(tide._batcher._ready) == 1)  # the other run's step waits for this one

    assert run_two_that_are_answered_together(server, monkeypatch, second) == [2, 2]


def test_a_step_does_not_wait_for_a_run_whose_next_one_takes_longer(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(_: tidebase_sdk.Tidebase, other: threading.Thread) -> None:
        other.join(30)
        assert not other.is_alive()

    assert run_two_that_are_answered_together(server, monkeypatch, second) == [2, 1, 1]


def test_without_a_thread_to_send_in_the_background_the_end_of_the_run_sends_what_is_behind(
    server: Any, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_unless_it_sends(thread: threading.Thread) -> None:
        if thread.name == "tidebase-writes":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(tidebase_sdk, "_thread_cache", tidebase_sdk._ThreadCache())
    monkeypatch.setattr(threading.Thread, "start", start_unless_it_sends)
    with tidebase_sdk.Tidebase(server.url) as tide:
        flow = lambda run: [run.step("n", lambda: n) for n in range(3)]  # noqa: E731, B023
        assert tide.run("flow", flow, run_id="run_threadless", write_behind=True) == [0, 1, 2]
    assert [step["output"] for step in api.detail("run_threadless")["steps"]] == [0, 1, 2]


def test_a_leader_that_ended_without_a_word_is_replaced(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidebase_sdk, "RECHECK_S", 0.05)
    with tidebase_sdk.Tidebase(server.url) as tide:
        with tide._batcher._lock:  # as a task that was cancelled before it began, when its event loop ended
            tide._batcher._set_leader(threading.Event())
        assert tide.enqueue("flow")["run"]["status"] == "queued"


def test_a_write_that_is_withdrawn_before_the_leader_takes_it_leaves_nothing_behind(server: Any) -> None:
    async def main() -> None:
        async with AsyncTidebase(server.url) as tide:
            for _ in range(4):
                lost = asyncio.ensure_future(tide.enqueue("lost"))
                await asyncio.sleep(0)  # it is ready, and not sent yet
                lost.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await lost
            assert (await tide.enqueue("flow"))["run"]["status"] == "queued"

    asyncio.run(main())


def test_who_only_enqueues_does_not_wait_longer_than_the_timeout_for_the_request_that_would_carry_it(
    actor: Callable[..., Any], server: Any, api: Api, working: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "MAX_IN_FLIGHT", 1)
    tide = actor(server.url, timeout_s=1.0)
    wire, told = Wire(tide.client), []

    async def flow(run: Any, input: Any) -> Any:
        if input == 0:
            return await run.step("step", lambda: input)
        try:
            created = tide.client.enqueue("other", queue="elsewhere")
            return created if isinstance(created, dict) else await created
        except tidebase_sdk.Unreachable as error:
            told.append(error)

    free = wire.hold("record_step")
    ids = enqueue(tide, 1)
    working(tide, {"flow": flow}, concurrency=2)
    eventually(wire.batches)
    ids.append(api.enqueue(workflow="flow", input=1))
    eventually(lambda: told)
    free.set()
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in ids))
    assert api.get("/runs?workflow=other")["runs"] == []


def test_who_only_enqueues_and_sends_for_others_hands_them_over_when_its_time_is_up(
    server: Any, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_back = threading.Event()

    def refuse(effect: Any) -> None:
        if effect.path == "/writes" and not is_back.is_set():
            raise ConnectionResetError("away")

    with tidebase_sdk.Tidebase(server.url) as tide, tide.attach(
            "flow", run_id="run_shares_a_batch", write_behind=True) as session:
        Wire(tide).before, tide.timeout_s = refuse, 0.5
        with monkeypatch.context() as patch:
            patch.setattr(tide._batcher, "_start_leader", lambda driver=None: None)
            session.step("step", lambda: 1)  # its record is ready, and nobody sends it
        enqueued = in_background(lambda: tide.enqueue("other", queue="elsewhere"))
        try:
            with pytest.raises(tidebase_sdk.Unreachable):
                enqueued()  # it sends both, and not for as long as the run has its lease
        finally:
            tide.timeout_s = 30.0
            is_back.set()
        session.complete()
    assert [step["output"] for step in api.detail("run_shares_a_batch")["steps"]] == [1]


def test_in_a_batch_each_step_gets_its_own_refusal_and_the_others_are_recorded(
    together: Callable[..., list[str]], api: Api
) -> None:
    told: list[Any] = []

    def interfere(ids: list[str]) -> None:
        api.post(f"/runs/{ids[3]}/cancel")["run"]
        api.begin_step(ids[5], "step", owner_of(api, ids[5]), hash="another")["step"]

    ids = together(8, meanwhile=interfere, on_error=lambda error, run: told.append((type(error), run["id"])))
    eventually(lambda: all(api.run(run)["leaseOwner"] is None for run in ids))
    wanted = {ids[3]: "cancelled", ids[5]: "failed"}
    assert [api.run(run)["status"] for run in ids] == [wanted.get(run, "completed") for run in ids]
    eventually(lambda: len(told) == 2)
    assert {*told} == {(StepInputMismatch, ids[5]), (RunCancelled, ids[3])}


def test_a_batch_whose_answer_is_lost_is_sent_again_and_nothing_is_recorded_twice(
    together: Callable[..., list[str]], api: Api, wire: Wire
) -> None:
    lost = wire.lose_answers(3)
    calls: Counter[int] = Counter()
    ids = together(6, lambda n: calls.update([n]))
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in ids))
    assert len(lost) == 3
    assert calls == dict.fromkeys(range(6), 1)
    for run_id in ids:
        assert api.event_types(run_id)[2:-1] == ["step.started", "step.completed"]
        assert api.detail(run_id)["steps"][0]["attempt"] == 1


def test_a_step_that_makes_a_whole_batch_malformed_fails_alone(
    together: Callable[..., list[str]], api: Api, wire: Wire
) -> None:
    told: list[Any] = []
    ids = together(5, nul=[2, 4], on_error=lambda error, run: told.append((error.status, run["id"])))
    eventually(lambda: len(told) == 2)
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in (ids[0], ids[1], ids[3])))
    assert set(told) == {(400, ids[2]), (400, ids[4])}


def test_a_batch_too_large_for_the_server_goes_in_pieces(
    actor: Callable[..., Any], start_server: Callable[..., Any], working: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "MAX_IN_FLIGHT", 1)
    server = start_server(TIDEBASE_MAX_BODY=20_000)
    api, tide = Api(server.url), actor(server.url)
    wire = Wire(tide.client)

    async def flow(run: Any, input: Any) -> Any:
        return len(await run.step("step", lambda: "x" * (30_000 if input == 3 else 12_000)))

    ids, told = enqueue(tide, 1), []
    free = wire.hold("record_step")
    working(tide, {"flow": flow}, concurrency=6, on_error=lambda error, run: told.append((error.status, run["id"])))
    eventually(wire.batches)
    ids += [api.enqueue(workflow="flow", input=n, maxAttempts=1) for n in range(1, 6)]
    eventually(lambda: len(tide.client._batcher._ready) == 5)
    free.set()
    eventually(lambda: all(api.run(run)["status"] in ("completed", "failed") for run in ids))
    assert [api.run(run)["result"] for run in ids] == [12_000, 12_000, 12_000, None, 12_000, 12_000]
    assert eventually(lambda: told) == [(413, ids[3])]


def test_no_batch_has_more_than_1000_writes_or_4_mib(tide: Any) -> None:
    batcher = tide.client._batcher

    def sizes(*lengths: int) -> list[int]:
        for length in lengths:
            batcher._ready.append(write := tidebase_sdk._Write("enqueue_run", b"", None))
            write.data = b"x" * length
        taken = []
        while batcher._ready:
            taken.append(len(batcher._take()))
        return taken

    assert sizes(*[10] * 2500) == [1000, 1000, 500]
    assert sizes(*[1 << 20] * 9) == [4, 4, 1]
    assert sizes(100, 5 << 20, 100) == [1, 1, 1]


def test_of_steps_that_threads_of_one_run_end_at_once_each_gets_its_own_output(server: Any) -> None:
    tide = tidebase_sdk.Tidebase(server.url)
    outputs: dict[int, Any] = {}

    def flow(run: Any) -> None:
        def one(number: int) -> None:
            outputs[number] = run.step(f"step {number}", lambda: {"n": number})

        threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for _ in range(5):
        outputs.clear()
        tide.run("flow", flow)
        assert outputs == {number: {"n": number} for number in range(40)}
    eventually(lambda: (tide._batcher._leader, len(tide._batcher._ready)) == (None, 0))
    tide.close()


def test_tasks_that_are_ready_at_the_same_time_send_one_request(server: Any) -> None:
    async def story() -> list[int]:
        async def nothing() -> None:
            pass

        async def flow(run: Any) -> None:
            for number in range(3):
                await asyncio.gather(*(run.step(f"step {number} of {task}", nothing) for task in range(8)))

        async with AsyncTidebase(server.url) as tide:
            wire = Wire(tide)
            await tide.run("flow", flow)
            return wire.batches()

    assert asyncio.run(story()) == [8, 8, 8]


def test_cancelling_tasks_whose_steps_are_under_way_does_not_lose_those_of_others(
    server: Any, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "MAX_IN_FLIGHT", 1)

    async def main() -> None:
        async with AsyncTidebase(server.url) as tide:
            wire = Wire(tide)

            async def flow(run: Any, input: Any) -> Any:
                return await run.step("step", lambda: input)

            free = wire.hold("record_step")
            tasks = [asyncio.ensure_future(tide.run("flow", flow, input=0))]
            await wait_until(lambda: wire.batches())
            tasks += [asyncio.ensure_future(tide.run("flow", flow, run_id=f"r{n}", input=n)) for n in range(1, 8)]
            await wait_until(lambda: len(tide._batcher._ready) == 7)
            first, other, *_ = [int(write.lease.run_id[1:]) for write in tide._batcher._ready]
            second = wire.hold("record_step")
            tasks[0].cancel()
            free.set()
            await wait_until(lambda: wire.batches() == [1, 8] and wire.taken.locked())  # it had sent its own itself
            tasks[first].cancel()
            tasks[other].cancel()
            second.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            cancelled = {n for n, result in enumerate(results) if isinstance(result, asyncio.CancelledError)}
            assert cancelled == {0, first, other}
            assert [results[n] for n in range(8) if n not in cancelled] == [n for n in range(8) if n not in cancelled]
            await wait_until(lambda: (tide._batcher._leader, len(tide._batcher._ready)) == (None, 0))

    async def wait_until(question: Callable[[], Any]) -> None:
        await asyncio.to_thread(eventually, question)

    asyncio.run(main())


@pytest.mark.parametrize("when", ["before", "after"])  # the request arrives
def test_cancelling_the_call_that_sends_neither_loses_nor_holds_up_nor_repeats_what_goes_along(
    server: Any, api: Api, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(tidebase_sdk, "SLOW_STEP_S", 60.0)  # on a busy machine a step may be slow
    ids, calls = [new_run_id() for _ in range(3)], Counter[str]()
    sending: list[str] = []  # the run whose call sends the steps of all three
    free = threading.Event()

    def hold(effect: Any, reply: Any = None) -> None:
        writes = json.loads(effect.body)["writes"] if effect.path == "/writes" else []
        if not sending and [write["do"] for write in writes] == ["record_step"] * 3:
            sending.append(writes[0]["runId"])
            assert free.wait(30)

    async def main() -> None:
        go = asyncio.Event()

        async def flow(run: Any) -> str:
            return str(await run.step("step", lambda: act(run.run_id)))

        async def act(run_id: str) -> str:
            calls[run_id] += 1
            await go.wait()
            return run_id

        async with AsyncTidebase(server.url) as tide:
            wire = Wire(tide)
            setattr(wire, when, hold)
            tasks = {run_id: asyncio.ensure_future(tide.run("flow", flow, run_id=run_id)) for run_id in ids}
            await asyncio.to_thread(eventually, lambda: calls.total() == 3)
            go.set()
            await asyncio.to_thread(eventually, lambda: sending)
            cancelled = tasks.pop(sending[0])
            cancelled.cancel()
            assert await asyncio.wait_for(asyncio.gather(*tasks.values()), 20) == [*tasks]  # while that one is held
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            free.set()

    try:
        asyncio.run(main())
    finally:
        free.set()
    assert calls == dict.fromkeys(ids, 1)
    for run_id in ids:
        assert api.run(run_id)["status"] == ("pending" if run_id in sending else "completed")
        assert [event for event in api.event_types(run_id) if event.startswith("step.")] == [
            "step.started", "step.completed"]


@pytest.mark.parametrize("when", ["before", "after"])  # the request arrives
@pytest.mark.parametrize(("name", "begin"), [
    ("mail", lambda run: run.step("mail", lambda: pytest.fail("executed"), side_effects="email")),
    ("mail", lambda run: run.step("mail", lambda: pytest.fail("executed"), side_effects="email", idempotency_key="k")),
    ("signal:paid", lambda run: run.wait_for_signal("paid"))], ids=["effect", "effect with a key", "wait"])
def test_a_step_whose_call_is_cancelled_while_it_is_begun_does_not_stay_running_in_a_completed_run(
    server: Any, api: Api, when: str, name: str, begin: Callable[[Any], Any]
) -> None:
    run_id = new_run_id()
    held, free = threading.Event(), threading.Event()

    def hold(effect: Any, reply: Any = None) -> None:
        if effect.path == "/writes" and "begin_step" in verbs(json.loads(effect.body)) and not held.is_set():
            held.set()
            assert free.wait(30)

    async def flow(run: Any) -> str:
        step = asyncio.ensure_future(begin(run))
        await asyncio.to_thread(eventually, held.is_set)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        free.set()
        return str(await run.step("after", lambda: "went on"))

    async def main() -> None:
        async with AsyncTidebase(server.url) as tide:
            wire = Wire(tide)
            setattr(wire, when, hold)
            assert await tide.run("flow", flow, run_id=run_id) == "went on"

    asyncio.run(main())
    detail = api.detail(run_id)
    steps = {step["name"]: (step["status"], (step["error"] or {}).get("name")) for step in detail["steps"]}
    assert detail["run"]["status"] == "completed"
    assert steps == {name: ("failed", "CancelledError"), "after": ("completed", None)}


def test_a_step_whose_call_is_cancelled_before_it_is_sent_to_be_begun_leaves_no_trace(server: Any, api: Api) -> None:
    run_id = new_run_id()

    async def flow(run: Any, tide: Any, wire: Wire) -> str:
        free = wire.hold("record_step")
        first = asyncio.ensure_future(run.step("first", lambda: 1))
        await asyncio.to_thread(eventually, wire.batches)
        mail = asyncio.ensure_future(run.step("mail", lambda: pytest.fail("executed"), side_effects="email"))
        await asyncio.to_thread(eventually, lambda: len(tide._batcher._ready) == 1)
        mail.cancel()
        with pytest.raises(asyncio.CancelledError):
            await mail
        free.set()
        await first
        return "went on"

    async def main() -> None:
        async with AsyncTidebase(server.url) as tide:
            wire = Wire(tide)
            assert await tide.run("flow", lambda run: flow(run, tide, wire), run_id=run_id) == "went on"

    asyncio.run(main())
    assert [step["name"] for step in api.detail(run_id)["steps"]] == ["first"]


def test_a_step_that_ran_into_a_time_limit_and_is_called_again_in_a_loop_keeps_its_name(server: Any, api: Api) -> None:
    calls: list[int] = []

    async def page(number: int) -> str:
        calls.append(number)
        if number == 1 and calls.count(1) == 1:
            await asyncio.sleep(60)
        return f"page {number}"

    async def flow(run: Any) -> list[str]:
        pages = []
        for number in range(3):
            while len(pages) == number:
                with contextlib.suppress(asyncio.TimeoutError):
                    pages.append(await asyncio.wait_for(run.step("page", lambda: page(number)), 1.0))  # noqa: B023
        if len(calls) < 5:
            raise ConnectionError("dies after the loop")
        return pages

    async def main() -> Any:
        async with AsyncTidebase(server.url) as tide:
            with pytest.raises(ConnectionError):
                await tide.run("flow", flow, run_id="run_in_time")
            calls.append(-1)
            return await tide.run("flow", flow, run_id="run_in_time")

    assert asyncio.run(main()) == ["page 0", "page 1", "page 2"]
    assert calls == [0, 1, 1, 2, -1]  # nothing is executed again
    steps = [(step["name"], step["status"], step["attempt"]) for step in api.detail("run_in_time")["steps"]]
    assert steps == [("page", "completed", 1), ("page#2", "completed", 2), ("page#3", "completed", 1)]


def test_a_lease_that_is_lost_while_its_writes_go_with_those_of_others_costs_them_nothing(
    server: Any, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidebase_sdk, "MAX_IN_FLIGHT", 1)
    monkeypatch.setattr(tidebase_sdk, "BATCH_WRITES", 2)

    async def main() -> None:
        async with AsyncTidebase(server.url) as tide:
            wire = Wire(tide)

            async def flow(run: Any, input: Any) -> Any:
                return await asyncio.gather(*(run.step(f"step {n}", lambda: input) for n in range(input)))

            free = wire.hold("record_step")
            tasks = []
            for name, steps, waiting in (("first", 1, 0), ("second", 1, 1), ("lost", 2, 3), ("last", 1, 4)):
                tasks.append(asyncio.ensure_future(tide.run("flow", flow, run_id=name, input=steps)))
                await asyncio.to_thread(eventually, lambda: len(tide._batcher._ready) == waiting and wire.batches())  # noqa: B023
            api.complete("lost")["run"]  # by somebody else
            free.set()  # now [second, lost] go, and lost has another at the head of [lost, last]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[2], tidebase_sdk.LeaseLost)
            assert [results[n] for n in (0, 1, 3)] == [[1], [1], [1]]
            assert wire.batches()[:2] == [1, 2]

    asyncio.run(main())
    assert [api.run(run)["status"] for run in ("first", "second", "last")] == ["completed"] * 3


def test_batches_under_way_when_the_server_is_killed_are_recorded_once_it_is_back(
    spawn_server: Callable[..., Any], actor: Callable[..., Any], working: Callable[..., None]
) -> None:
    server = spawn_server(TIDEBASE_LEASE_MS=20_000)
    api, tide = Api(server.url), actor(server.url)
    calls: Counter[tuple[int, int]] = Counter()

    async def flow(run: Any, input: Any) -> None:
        for number in range(60):
            await run.step(f"step {number}", lambda: calls.update([(input, number)]))  # noqa: B023

    ids = enqueue(tide, 16)
    working(tide, {"flow": flow}, concurrency=16)
    for goal in (100, 400):
        eventually(lambda: calls.total() > goal)  # noqa: B023
        server.end(signal.SIGKILL)
        server.start()
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in ids), 60)
    assert calls == {(n, number): 1 for n in range(16) for number in range(60)}
    assert [completed_twice(api, run) for run in ids] == [[]] * 16


# ------------------------------------------------------------------------------
# Held claims.
# ------------------------------------------------------------------------------


def test_an_idle_worker_has_one_claim_that_the_server_holds(
    tide: Any, api: Api, wire: Wire, server: Any, working: Callable[..., None]
) -> None:
    async def flow(run: Any, input: Any) -> Any:
        return input

    working(tide, {"flow": flow}, poll_s=tidebase_sdk.CLAIM_WAIT_S)
    eventually(lambda: server.watcher.long_polls)
    ids = enqueue(tide, 1)
    eventually(lambda: api.run(ids[0])["status"] == "completed")
    eventually(lambda: server.watcher.long_polls)
    claims = [body for path, body in wire.sent if path == "/queues/claim"]
    assert [claim["waitMs"] for claim in claims] == [20_000, 20_000]
    assert claims[0]["id"] != claims[1]["id"]


def test_a_run_whose_result_is_on_its_way_has_left_its_place(
    tide: Any, api: Api, wire: Wire, working: Callable[..., None]
) -> None:
    async def flow(run: Any, input: Any) -> Any:
        return input

    first, second = enqueue(tide, 2)
    free = wire.hold("complete_run")
    working(tide, {"flow": flow}, concurrency=1)
    eventually(lambda: api.run(second)["status"] == "completed")
    assert api.run(first)["status"] == "running"
    free.set()
    eventually(lambda: api.run(first)["status"] == "completed")


def test_what_a_claim_took_while_it_was_cut_off_is_given_back(
    tide: Any, api: Api, wire: Wire, server: Any
) -> None:
    stop, taken = threading.Event(), threading.Event()

    def cut_off(effect: Any, reply: Any) -> None:
        if effect.path == "/queues/claim" and not stop.is_set():
            taken.set()
            stop.set()
            assert eventually(lambda: effect.cancel.is_cancelled)
            raise ConnectionResetError("cut off")

    wire.after = cut_off
    tide.client.workflow("flow", lambda run: pytest.fail("executed by a worker that stops"))
    run_id = enqueue(tide, 1)[0]
    tide(lambda client: client.work(stop=stop.is_set))
    assert taken.is_set()
    claims = [body for path, body in wire.sent if path == "/queues/claim"]
    assert [claim["waitMs"] for claim in claims] == [20_000, 0]
    assert claims[0]["id"] == claims[1]["id"]
    assert (api.run(run_id)["status"], api.run(run_id)["attempt"]) == ("queued", 0)
    assert api.event_types(run_id)[-2:] == ["run.claimed", "run.released"]


def test_a_stop_does_not_wait_for_the_claim_that_the_server_holds(tide: Any, server: Any, wire: Wire) -> None:
    stop = threading.Event()
    tide.client.workflow("flow", print)
    outcome = in_background(lambda: tide(lambda client: client.work(stop=stop.is_set)))
    eventually(lambda: server.watcher.long_polls)
    stop.set()
    outcome()
    assert [body["waitMs"] for _, body in wire.sent] == [20_000, 0]
    eventually(lambda: not server.watcher.long_polls)  # the server noticed


def test_sigterm_does_not_wait_for_the_claim_that_the_server_holds(server: Any) -> None:
    code = "from tidebase_sdk import Tidebase as T; t = T(); t.workflow('flow', id); t.work(); print('ended cleanly')"
    environment = {**os.environ, "TIDEBASE_URL": server.url, "PYTHONPATH": str(ROOT)}
    worker = subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE)
    try:
        eventually(lambda: server.watcher.long_polls)
        worker.terminate()
        assert worker.communicate(timeout=15)[0] == "ended cleanly\n"  # the claim was to be held for 20 s
    finally:
        worker.kill()
        worker.wait()


def test_a_worker_that_found_no_place_to_wait_in_rests_as_long_as_it_is_asked_to_and_a_little_more(tide: Any) -> None:
    async def rest(retry_after: str) -> float:
        worker = tidebase_sdk._Worker(tide.client, ["default"], 20.0, None, 1, None, None)
        tide.client._driver._exchange = lambda request: request  # its answer is sent below
        claim = worker._claim_runs(1, 20.0, worker._claim_handle)
        assert next(claim).is_long_poll
        try:
            claim.send(tidebase_sdk.Reply(200, retry_after, b'{"runs": [], "leaseOwner": "me"}'))
        except StopIteration as end:
            return float(end.value)
        raise AssertionError("it asked for more")

    rests = {asyncio.run(rest("3")) for _ in range(20)}
    assert all(3 < seconds <= 4 for seconds in rests)
    assert len(rests) > 1  # jittered, so that a crowd spreads


def test_a_claim_that_is_refused_ends_the_worker_with_the_refusal(
    actor: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    tide = actor(start_server(TIDEBASE_API_KEY="k").url, api_key="wrong")
    tide.client.workflow("flow", print)
    with pytest.raises(TidebaseError) as refused:
        tide(lambda client: client.work())
    assert refused.value.status == 401
