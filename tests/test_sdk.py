"""What the Python client promises, through a real server: each test told once and run blocking and awaited.

A workflow is written as `async def` here. The blocking client runs it over a context whose awaitables are done already,
so that both clients are held to the same story.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import hmac
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Api, eventually, free_port

import tidebase_sdk
from tidebase_sdk import (
    AsyncTidebase,
    BodyTooLarge,
    FanoutFailed,
    LeaseLost,
    RunCancelled,
    RunCompleted,
    StepFailed,
    StepInputMismatch,
    StepNeedsReview,
    StepTimeout,
    Tidebase,
    TidebaseError,
    Unreachable,
    canonical_json,
    input_hash,
    new_run_id,
    verify_webhook_signature,
)
from tidebase_server.delivery import sign

ROOT = Path(__file__).resolve().parent.parent
SHORT = {"TIDEBASE_LEASE_MS": 1500, "TIDEBASE_RECONCILE_MS": 100}  # leases that end within a test


class Done:
    """An awaitable that is done: what a blocking call returned."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Iterator[Any]:
        yield from ()
        return self.value


class DoneRun:
    """A blocking run context as the workflows of these tests use it."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._run, name)
        if isinstance(value, tidebase_sdk.Surface):  # run.state and the like
            return DoneRun(value)
        return (lambda *args, **kwargs: Done(value(*args, **kwargs))) if callable(value) else value


class BlockingActor:
    """A Tidebase whose workflows are the `async def` of these tests."""

    def __init__(self, url: str, **options: Any) -> None:
        self.client: Any = Tidebase(url, **options)

    def __call__(self, operation: Callable[[Any], Any]) -> Any:
        return operation(self.client)

    def workflow(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def blocking(run: Any, input: Any) -> Any:
            story = fn(DoneRun(run), input)
            try:
                story.send(None)
            except StopIteration as end:
                return end.value
            raise AssertionError("a blocking workflow awaited something that was not done")

        return blocking

    def close(self) -> None:
        self.client.close()


class AwaitedActor:
    """An AsyncTidebase on an event loop in a thread of its own."""

    def __init__(self, url: str, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="event-loop")
        self.thread.start()
        self.client: Any = AsyncTidebase(url, **options)

    def __call__(self, operation: Callable[[Any], Any]) -> Any:
        async def awaited() -> Any:
            return await operation(self.client)

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(60)

    def workflow(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    def close(self) -> None:
        self(lambda tide: tide.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture(params=[BlockingActor, AwaitedActor], ids=["blocking", "awaited"])
def actor(request: pytest.FixtureRequest, start_server: object) -> Iterator[Callable[..., Any]]:
    """Makes actors: actor(url, timeout_s=…). They are closed before the servers are, whence `start_server`."""
    actors: list[Any] = []

    def make(url: str, **options: Any) -> Any:
        actors.append(request.param(url, **options))
        return actors[-1]

    yield make
    for made in actors:
        made.close()


@pytest.fixture
def tide(actor: Callable[..., Any], server: Any) -> Any:
    return actor(server.url)


def on_requests(tide: Any, before: Callable[[Any], Any]) -> None:
    """Have before(effect) called ahead of each request of a client; what it returns, unless None, is sent instead."""
    for driver in {tide.client._driver, tide.client._threads}:
        exchange = driver._exchange
        driver._exchange = lambda effect, exchange=exchange: exchange(before(effect) or effect)


@pytest.fixture
def working() -> Iterator[Callable[..., None]]:
    """Starts workers that stop at the end of the test: working(tide, {"name": workflow}, queues=[…], …)."""
    over = threading.Event()
    threads: list[threading.Thread] = []

    def start(tide: Any, workflows: dict[str, Callable[..., Any]], queues: tuple[str, ...] = ("default",),
              **options: Any) -> None:
        for name, fn in workflows.items():
            tide.client.workflow(name, tide.workflow(fn))
        options = {"poll_s": 0.2, "stop": over.is_set, **options}
        threads.append(threading.Thread(target=tide, args=(lambda client: client.work(queues, **options),)))
        threads[-1].start()

    yield start
    over.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


# ------------------------------------------------------------------------------
# Runs and steps: what completed is not executed again.
# ------------------------------------------------------------------------------


def test_a_resumed_run_executes_only_what_did_not_complete(tide: Any, api: Api) -> None:
    calls: list[str] = []

    async def report(run: Any, input: Any) -> Any:
        plan = await run.step("plan", lambda: calls.append("plan") or {"of": input["topic"]}, input=input)
        if len(calls) < 3:
            await run.step("write", lambda: calls.append("write") or 1 / 0)
        return await run.step("send", lambda: calls.append("send") or [plan, run.attempt])

    run_id = new_run_id()
    calls.append("first")
    with pytest.raises(ZeroDivisionError):
        tide(lambda client: client.run("report", tide.workflow(report), run_id=run_id, input={"topic": "ü\0"}))
    failed = api.run(run_id)
    assert failed["status"] == "failed"
    assert failed["error"]["name"] == "ZeroDivisionError"
    assert failed["error"]["step"] == "write"
    assert "tidebase_sdk.py" not in failed["error"]["stack"]
    assert tide(lambda client: client.run("report", tide.workflow(report), run_id=run_id)) == [{"of": "ü\0"}, 2]
    assert calls == ["first", "plan", "write", "send"]
    assert tide(lambda client: client.run("report", tide.workflow(report), run_id=run_id)) == [{"of": "ü\0"}, 2]
    assert calls == ["first", "plan", "write", "send"]
    assert api.run(run_id)["attempt"] == 2


def test_a_step_returns_the_first_time_what_a_replay_returns(tide: Any) -> None:
    seen: list[Any] = []

    async def flow(run: Any, input: Any) -> None:
        seen.append(await run.step("step", lambda: {"pair": (1, 2.0), 3: None, "text": "\0é\U0001f600"}))
        if len(seen) == 1:
            seen[0]["pair"].append("mine to change")
            raise RuntimeError

    run_id = new_run_id()
    with pytest.raises(RuntimeError):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert seen[1] == {"pair": [1, 2.0], "3": None, "text": "\0é\U0001f600"}
    assert seen[0] == {**seen[1], "pair": [1, 2.0, "mine to change"]}


def test_a_replay_of_all_steps_sends_no_request_for_any(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> int:
        for number in range(20):
            await run.step(f"step {number}", lambda: number)  # noqa: B023
        if run.attempt == 1:
            raise RuntimeError
        return 20

    run_id = new_run_id()
    with pytest.raises(RuntimeError):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    before = len(api.events(run_id))
    paths: list[str] = []
    perform = type(tide.client._driver)._exchange
    tide.client._driver._exchange = lambda effect: paths.append(effect.path) or perform(tide.client._driver, effect)
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)) == 20
    assert [path for path in paths if "/steps" in path] == []
    assert [event["type"] for event in api.events(run_id)[before:]] == ["run.started", "run.completed"]


@pytest.mark.parametrize("output", [{1, 2}, object(), b"bytes", {(1, 2): 3}])
def test_an_output_json_cannot_say_fails_the_step_and_names_it_and_the_type(tide: Any, api: Api, output: Any) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.step("odd one", lambda: output)

    run_id = new_run_id()
    with pytest.raises(TypeError, match=f"'odd one' is of type {type(output).__name__}"):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert api.detail(run_id)["steps"][0]["status"] == "failed"


@pytest.mark.parametrize("options", [{}, {"side_effects": ["email"]}])
def test_a_completed_step_with_another_input_is_refused_with_both_inputs_and_two_ways_out(
    tide: Any, options: Any
) -> None:
    page = "x" * 5000

    async def flow(run: Any, input: Any) -> None:
        await run.step("fetch", lambda: 1, input={"page": f"{page}{run.attempt}"}, **options)
        raise KeyError

    run_id = new_run_id()
    with pytest.raises(KeyError):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    with pytest.raises(StepInputMismatch) as refused:
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert isinstance(refused.value, ValueError)
    words = str(refused.value)
    assert 'xxx1"}' in words
    assert 'xxx2"}' in words
    assert "a name of its own" in words
    assert f"tide.runs.fork({run_id!r}, from_step='fetch')" in words
    assert len(words) < 1000
    assert refused.value.body["expectedInputHash"] == input_hash({"page": page + "1"})


def test_retries_try_again_and_record_every_failure(tide: Any, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidebase_sdk, "STEP_BACKOFF_S", (0.01, 0.01))
    tries: list[int] = []

    def flaky() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("away")
        return len(tries)

    async def flow(run: Any, input: Any) -> Any:
        return await run.step("flaky", flaky, retries=2)

    run_id = new_run_id()
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)) == 3
    assert api.event_types(run_id).count("step.failed") == 2
    assert api.detail(run_id)["steps"][0]["attempt"] == 3


def test_an_error_marked_as_not_retryable_ends_all_attempts(tide: Any, api: Api, working: Callable[..., None]) -> None:
    class BadTopic(ValueError):
        retryable = False

    tries: list[int] = []

    def check() -> None:
        tries.append(1)
        raise BadTopic

    async def flow(run: Any, input: Any) -> None:
        await run.step("check", check, retries=5)

    run_id = tide(lambda client: client.enqueue("flow"))["run"]["id"]
    working(tide, {"flow": flow})
    eventually(lambda: api.run(run_id)["status"] == "failed")
    assert tries == [1]


def test_retries_of_a_step_that_must_not_replay_are_a_mistake(tide: Any) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.step("mail", lambda: 1, retries=1, side_effects=["email"])

    with pytest.raises(ValueError, match="retries need replay='auto'"):
        tide(lambda client: client.run("flow", tide.workflow(flow)))


@pytest.mark.parametrize(
    ("options", "decision"),
    [
        ({}, "safe_replay"),
        ({"side_effects": "read"}, "safe_replay"),
        ({"side_effects": ["email"]}, "manual_review"),
        ({"side_effects": ["email"], "idempotency_key": "k"}, "safe_replay"),
        ({"replay": "never"}, "fail_hard"),
    ],
)
def test_a_failure_is_recorded_with_the_decision_of_its_contract(
    tide: Any, api: Api, options: Any, decision: str
) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.step("step", lambda: 1 / 0, **options)

    run_id = new_run_id()
    with pytest.raises(ZeroDivisionError):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert next(e for e in api.events(run_id) if e["type"] == "step.failed")["payload"]["resumeDecision"] == decision


def test_an_ambiguous_step_waits_for_a_person(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> Any:
        return await run.step("mail", lambda: "sent", side_effects=["email"])

    run_id = tide(lambda client: client.runs.create("flow"))["id"]
    owner = api.begin(run_id)["leaseOwner"]
    begun = api.begin_step(run_id, "mail", owner, hash=input_hash(None), options={"sideEffects": ["email"]})
    step_id = begun["step"]["id"]
    api.post(f"/runs/{run_id}/release", {"leaseOwner": owner})
    with pytest.raises(StepNeedsReview):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    tide(lambda client: client.runs.review_step(run_id, step_id, "complete", output="seen in the outbox", actor="ada"))
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)) == "seen in the outbox"


def test_a_step_that_a_person_declared_failed_raises_and_is_not_executed_again(tide: Any, api: Api) -> None:
    executed = []

    async def flow(run: Any, input: Any) -> Any:
        try:
            return await run.step("mail", lambda: executed.append(run.attempt) or 1 / 0, side_effects=["email"])
        except StepFailed as failed:
            return failed.retryable, failed.body["step"]["error"]["name"]

    run_id = new_run_id()
    with pytest.raises(ZeroDivisionError):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    [step] = api.detail(run_id)["steps"]
    assert api.run(run_id)["failureClass"] == "manual_review"
    tide(lambda client: client.runs.review_step(run_id, step["id"], "fail"))
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)) == [False, "ZeroDivisionError"]
    assert executed == [1]


def test_a_step_that_takes_too_long_raises_step_timeout(tide: Any) -> None:
    release = threading.Event()

    async def flow(run: Any, input: Any) -> None:
        await run.step("slow", lambda: release.wait(20), timeout_s=0.05)

    try:
        with pytest.raises(StepTimeout):
            tide(lambda client: client.run("flow", tide.workflow(flow)))
    finally:
        release.set()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "tidebase-step"])


def test_a_step_gets_its_input_when_it_requires_one_argument(tide: Any) -> None:
    async def flow(run: Any, input: Any) -> Any:
        asks = await run.step("asks", lambda page: page["n"], input={"n": 1})
        bound = await run.step("bound", lambda page=7: page, input={"n": 1})
        return [asks, bound]

    assert tide(lambda client: client.run("flow", tide.workflow(flow))) == [1, 7]


def test_another_live_owner_is_told_as_it_came(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> None: ...

    run_id = tide(lambda client: client.runs.create("flow"))["id"]
    api.begin(run_id, "somebody")
    with pytest.raises(TidebaseError) as refused:
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert (refused.value.status, refused.value.body["leaseOwner"]) == (409, "somebody")


def test_a_cancelled_run_cannot_be_held_up_by_except_exception(tide: Any, api: Api) -> None:
    run_id = new_run_id()
    seen: list[type] = []

    async def stubborn(run: Any, input: Any) -> str:
        for name in ("first", "second", "third"):
            try:
                await run.step(name, lambda: api.post(f"/runs/{run_id}/cancel", {"reason": "enough"})["run"] and None)
            except Exception as error:
                seen.append(type(error))
        return "done all the same"

    with pytest.raises(RunCancelled):
        tide(lambda client: client.run("stubborn", tide.workflow(stubborn), run_id=run_id))
    assert seen == [RunCancelled] * 3
    assert api.run(run_id)["status"] == "cancelled"
    assert api.detail(run_id)["steps"] == []  # nothing is recorded for a cancelled run


def test_what_a_run_left_behind_cannot_write_after_its_end(server: Any) -> None:
    kept: list[Any] = []
    tide = Tidebase(server.url)
    tide.run("flow", lambda run: kept.append(run))
    with pytest.raises(LeaseLost):
        kept[0].step("late", lambda: 1)
    tide.close()


def test_steps_of_several_threads_of_one_workflow_all_complete(server: Any, api: Api) -> None:
    tide = Tidebase(server.url)

    def flow(run: Any) -> None:
        threads = [threading.Thread(target=run.step, args=(f"step {n}", lambda: 1)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run_id = new_run_id()
    tide.run("flow", flow, run_id=run_id)
    assert [step["status"] for step in api.detail(run_id)["steps"]] == ["completed"] * 8
    tide.close()


# ------------------------------------------------------------------------------
# Workers: claim, execute, stop cleanly, outlive everything.
# ------------------------------------------------------------------------------


def test_a_worker_executes_what_is_enqueued_and_survives_failures(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    told: list[Any] = []

    async def good(run: Any, input: Any) -> Any:
        return await run.step("double", lambda: input["n"] * 2)

    async def bad(run: Any, input: Any) -> None:
        raise RuntimeError("boom")

    broken = tide(lambda client: client.enqueue("bad", queue="team/a", max_attempts=1))["run"]["id"]
    runs = [tide(lambda client: client.enqueue("good", queue="team/a", input={"n": n}))["run"]["id"] for n in range(5)]  # noqa: B023
    working(tide, {"good": good, "bad": bad}, queues=("team/a",), concurrency=3,
            on_error=lambda error, run: told.append((str(error), run["id"])))
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in runs))
    eventually(lambda: told == [("boom", broken)])
    assert [api.run(run)["result"] for run in runs] == [0, 2, 4, 6, 8]


def test_a_worker_never_holds_more_runs_than_it_has_places(tide: Any, api: Api, working: Callable[..., None]) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def count() -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1

    async def flow(run: Any, input: Any) -> None:
        await run.step("count", count)

    runs = [tide(lambda client: client.enqueue("flow"))["run"]["id"] for _ in range(12)]
    working(tide, {"flow": flow}, concurrency=3, limit=10)
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in runs))
    assert most == [3]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, asyncio.CancelledError])
def test_a_workflow_that_ends_as_nobody_asked_of_it_failed_and_does_not_hold_up_its_queue(
    tide: Any, api: Api, working: Callable[..., None], ending: type[BaseException]
) -> None:
    """Its run was given back, and claimed again at once: a thousand times in ten seconds, and nothing else ran."""
    calls: list[str] = []

    async def ends(run: Any, input: Any) -> None:
        calls.append(run.run_id)
        if ending is asyncio.CancelledError and isinstance(tide, AwaitedActor):
            task = asyncio.ensure_future(asyncio.sleep(60))
            task.cancel()
            await task
        raise ending

    async def fine(run: Any, input: Any) -> str:
        return "done"

    bad = tide(lambda client: client.enqueue("ends", max_attempts=1, priority=5))["run"]["id"]
    good = tide(lambda client: client.enqueue("fine"))["run"]["id"]
    working(tide, {"ends": ends, "fine": fine})
    eventually(lambda: api.run(good)["status"] == "completed")
    assert api.run(bad)["status"] == "failed"
    assert ending.__name__ in api.run(bad)["error"]["message"]
    assert calls == [bad]


def test_a_run_whose_task_is_cancelled_with_its_event_loop_did_not_fail(api: Api, server: Any) -> None:
    started = threading.Event()

    async def flow(run: Any, input: Any) -> None:
        started.set()
        await asyncio.sleep(60)

    async def app() -> None:
        tide = AsyncTidebase(server.url)
        tide.workflow("flow", flow)
        worker = asyncio.ensure_future(tide.work("default", poll_s=0.2))
        await asyncio.to_thread(started.wait, 30)
        others = asyncio.all_tasks() - {asyncio.current_task(), worker}
        for task in others:  # as asyncio.run does with all that is left, in no order
            task.cancel()
        worker.cancel()
        await asyncio.gather(worker, *others, return_exceptions=True)
        await tide.close()

    run_id = api.enqueue("default", "flow")
    asyncio.run(app())
    run = api.run(run_id)
    assert run["status"] in ("queued", "running")  # given back, or as after a crash where that was cancelled, too
    assert run["error"] is None


@pytest.mark.parametrize(("options", "status"), [({}, "failed"), ({"side_effects": "email"}, "manual_review")])
def test_a_step_whose_call_is_cancelled_is_recorded_as_failed_before_its_run_ends(
    server: Any, api: Api, options: dict[str, Any], status: str
) -> None:
    run_id = new_run_id()

    async def flow(run: Any, input: Any) -> str:
        begun = asyncio.Event()

        async def slow() -> None:
            begun.set()
            await asyncio.sleep(60)

        step = asyncio.ensure_future(run.step("slow", slow, **options))
        await begun.wait()
        await asyncio.to_thread(eventually, lambda: [each["status"] for each in api.detail(run_id)["steps"]])
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        return await run.step("after", lambda: "went on")

    async def main() -> None:
        async with AsyncTidebase(server.url) as tide:
            assert await tide.run("flow", flow, run_id=run_id) == "went on"

    asyncio.run(main())
    steps = {step["name"]: step for step in api.detail(run_id)["steps"]}
    assert {name: step["status"] for name, step in steps.items()} == {"slow": status, "after": "completed"}
    assert steps["slow"]["error"]["name"] == "CancelledError"


def test_a_step_that_ends_its_thread_is_recorded_as_failed_before_its_run(server: Any, api: Api) -> None:
    run_id = new_run_id()

    def flow(run: Any, input: Any) -> None:
        def leave() -> None:
            eventually(lambda: [each["status"] for each in api.detail(run_id)["steps"]])  # it is seen as running
            raise SystemExit("enough")

        run.step("slow", leave)

    with Tidebase(server.url) as tide, pytest.raises(SystemExit):
        tide.run("flow", flow, run_id=run_id)
    detail = api.detail(run_id)
    assert detail["run"]["status"] == "failed"
    assert [(step["status"], step["error"]["name"]) for step in detail["steps"]] == [("failed", "SystemExit")]


def interrupted_in_its_step(before: Callable[[], Any]) -> Callable[[Any, Any], str]:
    """A workflow whose step calls `before` and is interrupted, as by Ctrl-C, which the workflow catches."""

    def flow(run: Any, input: Any) -> str:
        def leave() -> None:
            before()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.step("slow", leave)
        return "went on"

    return flow


def test_a_step_that_is_interrupted_is_recorded_as_failed_before_its_run_ends(server: Any, api: Api) -> None:
    run_id = new_run_id()
    flow = interrupted_in_its_step(lambda: eventually(lambda: api.detail(run_id)["steps"]))  # it is seen as running
    with Tidebase(server.url) as tide:
        assert tide.run("flow", flow, run_id=run_id) == "went on"
    detail = api.detail(run_id)
    assert detail["run"]["status"] == "completed"
    assert [(step["status"], step["error"]["name"]) for step in detail["steps"]] == [("failed", "KeyboardInterrupt")]


@pytest.mark.parametrize("options", [{}, {"side_effects": "email"}], ids=["plain", "effect"])
def test_a_step_that_a_thread_still_executes_when_its_run_ends_is_recorded_as_failed_and_named_in_the_log(
    server: Any, api: Api, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run_id, go = new_run_id(), threading.Event()
    steps: list[concurrent.futures.Future[Any]] = []

    def flow(run: Any, input: Any) -> str:
        steps.append(pool.submit(run.step, "slow", lambda: go.wait(30), **options))
        eventually(lambda: [each["status"] for each in api.detail(run_id)["steps"]])  # it is seen as running
        with pytest.raises(concurrent.futures.TimeoutError):
            steps[0].result(timeout=0.01)
        return "went on"

    with concurrent.futures.ThreadPoolExecutor(1) as pool, Tidebase(server.url) as tide:
        assert tide.run("flow", flow, run_id=run_id) == "went on"
        go.set()
        with pytest.raises(LeaseLost, match="ended before its step 'slow' did"):
            steps[0].result(30)
    detail = api.detail(run_id)
    assert detail["run"]["status"] == "completed"
    [step] = detail["steps"]
    assert step["status"] == ("manual_review" if options else "failed")
    assert "under way in another thread or task" in step["error"]["message"]
    assert [record.levelname for record in caplog.records if record.event == "step_left_behind"] == ["WARNING"]


@pytest.mark.parametrize(("name", "wait"), [
    ("sleep:nap", lambda run: run.sleep(3600, name="nap")), ("signal:paid", lambda run: run.wait_for_signal("paid")),
], ids=["sleep", "signal"])
def test_a_wait_that_is_cancelled_after_it_was_begun_does_not_stay_running_in_a_completed_run(
    server: Any, api: Api, name: str, wait: Callable[[Any], Any]
) -> None:
    run_id = new_run_id()

    async def flow(run: Any) -> str:
        waiting = asyncio.ensure_future(wait(run))
        await asyncio.to_thread(eventually, lambda: "running" in [
            each["status"] for each in api.detail(run_id)["steps"]])
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        if run.attempt == 1:
            raise ConnectionError
        return str(await run.step("after", lambda: "went on"))

    async def main() -> None:
        async with AsyncTidebase(server.url) as tide:
            with pytest.raises(ConnectionError):
                await tide.run("flow", flow, run_id=run_id)
            assert [step["status"] for step in api.detail(run_id)["steps"]] == ["failed"]
            assert await tide.run("flow", flow, run_id=run_id) == "went on"

    asyncio.run(main())
    steps = {step["name"]: (step["status"], (step["error"] or {}).get("name")) for step in api.detail(run_id)["steps"]}
    assert steps == {name: ("failed", "CancelledError"), "after": ("completed", None)}


def test_a_cancelled_step_that_cannot_be_recorded_any_more_is_told_in_the_log(
    server: Any, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = new_run_id()

    def fail_for_review() -> None:
        step = eventually(lambda: api.detail(run_id)["steps"])[0]
        assert api.fail_step(run_id, step["id"], api.run(run_id)["leaseOwner"], resumeDecision="manual_review")

    with Tidebase(server.url) as tide:
        assert tide.run("flow", interrupted_in_its_step(fail_for_review), run_id=run_id) == "went on"
    assert [record.getMessage().partition(": ")[0] for record in caplog.records if record.event == "end_refused"] == [
        f"step 'slow' of run {run_id} did not end, which could not be recorded"]
    assert api.detail(run_id)["steps"][0]["status"] == "manual_review"


def test_what_a_step_is_called_with_is_looked_at_before_its_function_is_called(tide: Any, api: Api) -> None:
    calls: list[str] = []

    async def flow(run: Any, input: Any) -> Any:
        async def told(**options: Any) -> str:
            given = {"name": "x", "fn": lambda: calls.append("called"), **options}
            try:
                await run.step(given.pop("name"), given.pop("fn"), **given)
            except (TypeError, ValueError) as error:
                return f"{type(error).__name__}: {error}"
            return ""

        return [await told(name="x" * 513), await told(name=""), await told(name=None), await told(name=3),
                await told(fn=None), await told(idempotency_key=5)]

    long, empty, none, number, nothing, key = tide(lambda client: client.run("flow", tide.workflow(flow)))
    assert calls == []
    assert long.startswith("ValueError: the name of a step has at most 512 characters in the record, not 513")
    assert empty.startswith("ValueError: the name of a step")
    assert none.startswith("TypeError: the name of a step")
    assert number.startswith("TypeError: the name of a step")
    assert nothing == "TypeError: step 'x' takes a function, not None: pass `lambda: f()`, not `f()`"
    assert key == "TypeError: idempotency_key= takes a text, not 5"


def test_a_time_or_a_number_of_retries_below_zero_is_refused(tide: Any, api: Api) -> None:
    calls: list[str] = []

    async def flow(run: Any, input: Any) -> None:
        with pytest.raises(ValueError, match="retries= takes a whole number of at least 0, not -1"):
            await run.step("x", lambda: calls.append("called"), retries=-1)
        for seconds in (-1, -0.5, math.nan):
            with pytest.raises(ValueError, match=f"seconds= takes a number of at least 0, not {seconds}"):
                await run.sleep(seconds)

    run_id = new_run_id()
    tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert calls == api.detail(run_id)["steps"] == []
    with pytest.raises(ValueError, match="delay_s= takes a number of at least 0"):
        tide(lambda client: client.enqueue("flow", delay_s=-1))


def test_a_usage_of_nothing_is_refused(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> None:
        with pytest.raises(ValueError, match=r"usage\.record\(\) needs"):
            await run.usage.record()
        await run.usage.record(quantity=0)

    run_id = new_run_id()
    tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert [entry["quantity"] for entry in api.detail(run_id)["usage"]] == [0]


def test_a_name_is_looked_at_as_it_would_be_recorded(server: Any) -> None:
    calls: list[str] = []

    def flow(run: Any) -> None:
        run.step("x" * 511, lambda: calls.append("first"))
        with pytest.raises(ValueError, match="512 characters"):
            run.step("x" * 511, lambda: calls.append("second, with #2"))
        with pytest.raises(TypeError, match="the name of a step"):
            run.step("outer", lambda: run.step(None, lambda: calls.append("inner")))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="512 characters"):
            run.step("outer2", lambda: run.step("x" * 510, lambda: calls.append("inner, with outer2/")))

    with Tidebase(server.url) as tide:
        tide.run("flow", flow)
    assert calls == ["first"]


def test_a_result_that_json_cannot_say_ends_the_run_at_once(tide: Any, api: Api, working: Callable[..., None]) -> None:
    async def flow(run: Any, input: Any) -> Any:
        return object()

    run_id = tide(lambda client: client.enqueue("flow", max_attempts=3))["run"]["id"]
    working(tide, {"flow": flow})
    eventually(lambda: api.run(run_id)["status"] == "failed")
    assert api.run(run_id)["attempt"] == 1


def test_an_output_that_json_cannot_say_is_not_paid_for_again(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    calls: list[int] = []

    async def flow(run: Any, input: Any) -> None:
        await run.step("llm", lambda: calls.append(1) or object(), retries=3)

    run_id = tide(lambda client: client.enqueue("flow", max_attempts=3))["run"]["id"]
    working(tide, {"flow": flow})
    eventually(lambda: api.run(run_id)["status"] == "failed")
    assert calls == [1]
    assert "'llm' is of type object, which JSON cannot say" in api.run(run_id)["error"]["message"]


@pytest.mark.parametrize(("output", "words"), [
    ({"scores": [1, 2, 3, math.nan]}, "the value at .scores[3] of the output of step 'x' has NaN"),
    ([{"two words": object()}], "the value at [0]['two words'] of the output of step 'x' is of type object"),
    ({"texts": ("ok", "\ud800")}, "the value at .texts[1] of the output of step 'x' has a text with half of"),
    ({"keys": {(1, 2): 3}}, "the value at .keys of the output of step 'x' is of type dict"),
])
def test_the_error_names_the_part_of_an_output_that_json_cannot_say(server: Any, output: Any, words: str) -> None:
    with Tidebase(server.url) as tide, pytest.raises(TypeError, match=re.escape(words)):
        tide.run("flow", lambda run: run.step("x", lambda: output))


def test_an_output_that_holds_itself_is_refused(server: Any) -> None:
    output: dict[str, Any] = {}
    output["self"] = output
    with Tidebase(server.url) as tide, pytest.raises(TypeError, match="the output of step 'x' is of type dict"):
        tide.run("flow", lambda run: run.step("x", lambda: output))


@pytest.mark.parametrize("ask", [lambda client: client.enqueue("flow"), lambda client: client.queues.list()])
def test_a_url_that_is_not_the_servers_is_named_as_the_likely_cause(
    actor: Callable[..., Any], server: Any, ask: Callable[..., Any]
) -> None:
    with pytest.raises(TidebaseError, match=r"the client's URL is likely wrong.*TIDEBASE_URL"):
        actor(server.url + "/studio")(ask)


def test_a_server_that_does_not_answer_is_named_in_the_log_long_before_the_call_fails(
    actor: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unreachable):
        actor(url, timeout_s=3)(lambda client: client.runs.get("x"))
    [record] = [each for each in caplog.records if getattr(each, "event", "") == "no_answer"]
    assert url in record.getMessage()
    assert "TIDEBASE_URL" in record.getMessage()


def test_the_client_started_as_the_server_says_that_it_is_the_client() -> None:
    done = subprocess.run([sys.executable, tidebase_sdk.__file__, "explain", "run_x"], capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "client" in done.stderr


def test_a_claim_asks_for_the_workflows_that_are_registered_at_that_moment(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    asked: list[Any] = []

    async def flow(run: Any, input: Any) -> None: ...

    on_requests(tide, lambda effect: asked.append(json.loads(effect.body)["workflows"])
                if effect.path == "/queues/claim" else None)
    working(tide, {"one": flow})
    eventually(lambda: asked)
    tide.client.workflow("another", tide.workflow(flow))
    eventually(lambda: asked[-1] == ["another", "one"])
    assert asked[0] == ["one"]


def test_a_worker_of_an_older_server_gives_a_run_of_an_unknown_workflow_back_at_once_and_rests(
    tide: Any, api: Api, working: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tidebase_sdk, "UNKNOWN_PAUSE_S", 0.5)
    claims: list[float] = []

    def as_an_older_server(effect: Any) -> Any:
        """What the server would do that does not know the key `workflows`."""
        if effect.path != "/queues/claim":
            return None
        claims.append(time.monotonic())
        body = json.loads(effect.body)
        del body["workflows"]
        return effect._replace(body=json.dumps(body).encode())

    async def known(run: Any, input: Any) -> str:
        return "done"

    on_requests(tide, as_an_older_server)
    unknown_id = tide(lambda client: client.enqueue("unknown", priority=5))["run"]["id"]
    known_id = tide(lambda client: client.enqueue("known"))["run"]["id"]
    working(tide, {"known": known}, concurrency=2)
    eventually(lambda: api.run(known_id)["status"] == "completed")
    eventually(lambda: "run.released" in api.event_types(unknown_id))
    assert api.run(unknown_id)["attempt"] <= 1
    eventually(lambda: len(claims) > 1)
    assert claims[1] - claims[0] >= 0.5
    [record] = [each for each in caplog.records if getattr(each, "event", "") == "workflow_unknown"][:1]
    assert record.levelname == "ERROR"
    for word in (unknown_id, "unknown", tide.client.url):
        assert word in record.getMessage()


def test_on_error_gets_the_run_as_json_and_hears_of_cancelled_runs(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    told: list[Any] = []
    begun = threading.Event()

    async def flow(run: Any, input: Any) -> None:
        for number in itertools.count():
            await run.step(f"step {number}", lambda: begun.set() or time.sleep(0.02))

    run_id = tide(lambda client: client.enqueue("flow", input={"n": 1}))["run"]["id"]
    working(tide, {"flow": flow}, on_error=lambda error, run: told.append((error, run)))
    assert begun.wait(15)
    tide(lambda client: client.cancel(run_id, "enough"))
    [(error, run)] = eventually(lambda: told)
    assert isinstance(error, RunCancelled)
    assert error.run_id == run_id
    assert (run["id"], run["workflowName"], run["input"]) == (run_id, "flow", {"n": 1})


def test_a_stopping_worker_unwinds_its_runs_at_the_next_boundary_and_gives_them_back(tide: Any, api: Api) -> None:
    stop, begun, cleaned = threading.Event(), threading.Event(), threading.Event()

    async def flow(run: Any, input: Any) -> None:
        try:
            await run.step("first", lambda: begun.set() or (stop.wait(20) and None))
            await run.step("pause", lambda: time.sleep(0.3))
            for number in range(1000):
                try:
                    await run.step(f"step {number}", lambda: time.sleep(0.05))
                except Exception:
                    raise AssertionError("an `except Exception` saw the unwinding") from None
        finally:
            cleaned.set()

    run_id = tide(lambda client: client.enqueue("flow"))["run"]["id"]
    tide.client.workflow("flow", tide.workflow(flow))
    threading.Thread(target=lambda: begun.wait(20) and stop.set()).start()
    tide(lambda client: client.work(poll_s=0.1, stop=stop.is_set))
    assert cleaned.is_set()
    run = api.run(run_id)
    assert (run["status"], run["attempt"], run["leaseOwner"]) == ("queued", 0, None)
    steps = {step["name"]: step["status"] for step in api.detail(run_id)["steps"]}
    assert steps["first"] == "completed"
    assert len(steps) < 100


def test_a_step_three_times_longer_than_the_lease_is_executed_once(
    actor: Callable[..., Any], start_server: Callable[..., Any], working: Callable[..., None]
) -> None:
    server = start_server(**SHORT)
    api, tide, idle = Api(server.url), actor(server.url), actor(server.url)
    calls: list[int] = []

    async def flow(run: Any, input: Any) -> None:
        await run.step("long", lambda: calls.append(1) or time.sleep(4.5))

    run_id = tide(lambda client: client.enqueue("flow"))["run"]["id"]
    working(tide, {"flow": flow})
    working(idle, {"flow": flow})
    eventually(lambda: api.run(run_id)["status"] == "completed")
    assert calls == [1]
    assert api.run(run_id)["attempt"] == 1
    assert api.detail(run_id)["steps"][0]["attempt"] == 1


def test_a_lost_lease_ends_the_run_before_another_step_and_writes_nothing(
    actor: Callable[..., Any], server: Any, api: Api, clock: Any
) -> None:
    tide = actor(server.url)
    taken: list[str] = []

    def lose() -> None:
        clock.advance(ms=61_000)
        taken.append(api.begin(run_id, "the new owner")["leaseOwner"])

    async def flow(run: Any, input: Any) -> None:
        await run.step("freeze", lose)
        await run.step("next", lambda: pytest.fail("executed without the lease"))

    run_id = new_run_id()
    with pytest.raises(LeaseLost):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    run = api.run(run_id)
    assert (run["leaseOwner"], run["status"], run["attempt"]) == ("the new owner", "running", 2)
    assert api.detail(run_id)["steps"] == []


def test_200_async_runs_of_one_process_hold_their_leases_while_a_step_blocks_the_event_loop(
    start_server: Callable[..., Any],
) -> None:
    server = start_server(TIDEBASE_LEASE_MS=2500, TIDEBASE_RECONCILE_MS=100)
    api = Api(server.url)

    async def main() -> list[Any]:
        async with AsyncTidebase(server.url) as tide:
            async def flow(run: Any, input: Any) -> None:
                async def wait() -> None:
                    await asyncio.sleep(3)
                    if input["n"] == 0:
                        time.sleep(3)  # blocks the loop for longer than the lease, as user code does

                await run.step("wait", wait)

            tide.workflow("flow", flow)
            await asyncio.gather(*(tide.enqueue("flow", input={"n": n}) for n in range(200)))
            await tide.work(concurrency=200, limit=50, poll_s=0.2,
                            stop=lambda: api.queue("default")["completed"] == 200)
            pages = [await tide.runs.list(queue="default")]
            pages.append(await tide.runs.list(queue="default", before=pages[0].next_cursor))
            return [run for page in pages for run in page]

    runs = asyncio.run(main())
    assert Counter((run["status"], run["attempt"]) for run in runs) == {("completed", 1): 200}


def test_cancelling_the_task_of_an_async_run_gives_the_run_back(server: Any, api: Api) -> None:
    async def main() -> str:
        async with AsyncTidebase(server.url) as tide:
            begun = asyncio.Event()

            async def forever() -> None:
                begun.set()
                await asyncio.sleep(3600)

            async def flow(run: Any) -> None:
                await run.step("forever", forever)

            tide.workflow("flow", flow)
            run_id = (await tide.enqueue("flow"))["run"]["id"]
            task = asyncio.ensure_future(tide.work())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return str(run_id)

    run = api.run(asyncio.run(main()))
    assert (run["status"], run["attempt"]) == ("queued", 0)


def test_every_write_of_a_run_names_its_owner(tide: Any) -> None:
    bodies: dict[str, Any] = {}

    def note(effect: Any) -> None:
        if effect.path == "/writes":
            bodies.update((write["do"], write) for write in json.loads(effect.body)["writes"])
        elif effect.method != "GET" and "/heartbeat" not in effect.path:
            bodies[f"{effect.method} {effect.path}"] = json.loads(effect.body)

    async def flow(run: Any, input: Any) -> None:
        bodies.clear()  # of what came before the run had an owner
        await run.step("step", lambda: 1)
        await run.step("mail", lambda: 1, side_effects="email")
        await run.state.set({"a": 1})
        await run.state.patch({"b": 1})
        await run.state.save("seen")
        await run.snapshots.create("draft", 1)
        await run.usage.record(quantity=1)
        await run.gates.begin("approve", "Sure?")
        bodies["the run"] = {"leaseOwner": getattr(run, "_run", run)._lease.owner}

    on_requests(tide, note)
    tide(lambda client: client.run("flow", tide.workflow(flow)))
    assert len(bodies) == 11
    [owner] = {body.get("leaseOwner") for body in bodies.values()}
    assert owner


def test_a_lease_that_ended_by_this_processs_clock_is_lost_before_anything_more_is_written(
    actor: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    server = start_server(TIDEBASE_LEASE_MS=1000)
    api, tide = Api(server.url), actor(server.url)
    lost: list[Any] = []
    sent: list[str] = []
    session = tide(lambda client: client.attach("flow", heartbeat_s=None, on_lease_lost=lost.append))
    tide(lambda client: session.state.set({"n": 1}))
    ended = session._lease.ends_at
    eventually(lambda: time.monotonic() > ended)
    on_requests(tide, lambda effect: sent.append(effect.path))
    for write in (lambda: session.state.set({"n": 2}), lambda: session.step("step", lambda: pytest.fail("executed")),
                  lambda: session.usage.record(quantity=1), lambda: session.heartbeat(), lambda: session.complete(1)):
        with pytest.raises(LeaseLost, match="was not renewed within 1 s"):
            tide(lambda client: write())  # noqa: B023
    assert sent == []
    assert [type(error) for error in lost] == [LeaseLost]
    assert len(api.detail(session.run_id)["stateVersions"]) == 1


def test_writes_of_a_session_without_heartbeats_keep_its_lease(
    actor: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    tide = actor(start_server(TIDEBASE_LEASE_MS=1000).url)
    session = tide(lambda client: client.attach("flow", heartbeat_s=0))
    began = time.monotonic()
    for number in itertools.count():
        tide(lambda client: session.step(f"step {number}", lambda: time.sleep(0.2)))  # noqa: B023
        if time.monotonic() - began > 1.5:
            break
    assert tide(lambda client: session.complete(1))["run"]["status"] == "completed"


def test_a_run_whose_wait_or_end_was_refused_is_held_as_before(tide: Any) -> None:
    """A heartbeat that is refused means that the run's end arrived, but only while its end is under way."""
    async def flow(run: Any, input: Any) -> str:
        held = getattr(run, "_run", run)._lease
        with pytest.raises(TidebaseError), held.ending():
            raise TidebaseError("refused")
        return "settling" if held.state == "ending" else "held"

    assert tide(lambda client: client.run("flow", tide.workflow(flow))) == "held"


WORKER = """
import sys, time, os
from tidebase_sdk import Tidebase
tide = Tidebase()
def flow(run, input):
    for number in range(input["steps"]):
        def act():
            time.sleep(input["s"])
            return os.getpid()
        run.step(f"step {number}", act)
tide.workflow("flow", flow)
tide.work(poll_s=0.2)
print("ended cleanly")
"""


@pytest.fixture
def spawn_worker(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a worker process: spawn_worker(url)."""
    workers: list[subprocess.Popen[str]] = []

    def spawn(url: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "TIDEBASE_URL": url, "PYTHONPATH": str(ROOT)}
        workers.append(subprocess.Popen([sys.executable, "-c", WORKER], env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return workers[-1]

    yield spawn
    for worker in workers:
        worker.kill()
        worker.communicate()


def completed_twice(api: Api, run_id: str) -> list[str]:
    """Names of steps that were started or completed again after they had completed."""
    done: set[str] = set()
    again: list[str] = []
    for event in api.events(run_id):
        if event["type"] in ("step.started", "step.completed"):
            name = event["payload"]["name"]
            again += [name] if name in done else []
            done |= {name} if event["type"] == "step.completed" else set()
    return again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_told_to_stop_says_so_and_gives_its_run_back(
    server: Any, api: Api, spawn_worker: Any, number: signal.Signals
) -> None:
    worker = spawn_worker(server.url)
    run_id = api.enqueue(workflow="flow", input={"steps": 100, "s": 0.1})
    eventually(lambda: len(api.detail(run_id)["steps"]) > 1)
    worker.send_signal(number)
    printed, log = worker.communicate(timeout=20)
    assert printed == "ended cleanly\n"
    assert "the worker stops: 1 run is under way" in log  # though no logging is set up
    assert worker.returncode == 0
    assert (api.run(run_id)["status"], api.run(run_id)["attempt"]) == ("queued", 0)


def test_a_run_whose_worker_is_killed_completes_on_another_under_default_arguments(
    start_server: Callable[..., Any], spawn_worker: Any
) -> None:
    server = start_server(**SHORT)
    api, tide = Api(server.url), Tidebase(server.url)
    worker = spawn_worker(server.url)
    run_id = tide.enqueue("flow", input={"steps": 6, "s": 0.3})["run"]["id"]
    eventually(lambda: len(api.detail(run_id)["steps"]) == 3)
    worker.kill()
    spawn_worker(server.url)
    eventually(lambda: api.run(run_id)["status"] == "completed", 30)
    assert api.run(run_id)["attempt"] == 2
    assert completed_twice(api, run_id) == []
    tide.close()


def test_all_late_writes_of_a_worker_that_was_frozen_are_refused(
    start_server: Callable[..., Any], spawn_worker: Any
) -> None:
    server = start_server(**SHORT)
    api = Api(server.url)
    frozen = spawn_worker(server.url)
    run_id = api.enqueue(workflow="flow", input={"steps": 6, "s": 0.3})
    eventually(lambda: len(api.detail(run_id)["steps"]) == 2)
    frozen.send_signal(signal.SIGSTOP)
    other = spawn_worker(server.url)
    eventually(lambda: api.run(run_id)["attempt"] == 2, 30)
    by_frozen = [step["name"] for step in api.detail(run_id)["steps"] if step["output"] == frozen.pid]
    frozen.send_signal(signal.SIGCONT)
    eventually(lambda: api.run(run_id)["status"] == "completed", 30)
    outputs = {step["name"]: step["output"] for step in api.detail(run_id)["steps"]}
    assert outputs == {f"step {number}": other.pid for number in range(6)} | dict.fromkeys(by_frozen, frozen.pid)
    assert len(by_frozen) < 6
    assert completed_twice(api, run_id) == []
    frozen.terminate()
    assert "ended cleanly" in frozen.communicate(timeout=20)[0]


FROZEN = """
import os, signal, time
from tidebase_sdk import Tidebase
def flow(run, input):
    if run.attempt == 1:
        frozen_at = time.monotonic()
        os.kill(os.getpid(), signal.SIGSTOP)
        while time.monotonic() < frozen_at + 1.5:  # a lease; this thread may run on for a moment
            time.sleep(0.01)
        for write in (lambda: run.state.set({"by": "the former owner"}), lambda: run.usage.record(quantity=1),
                      lambda: run.snapshots.create("late", 1), lambda: run.gates.begin("late", "Sure?")):
            try:
                write()
            except Exception as error:
                print(type(error).__name__, flush=True)
    run.state.set({"by": os.getpid(), "attempt": run.attempt})
    return run.attempt
tide = Tidebase()
tide.workflow("flow", flow)
tide.work(poll_s=0.2)
"""


def test_a_frozen_workers_state_usage_snapshots_and_gates_are_refused_after_a_takeover(
    start_server: Callable[..., Any]
) -> None:
    server = start_server(**SHORT)
    api = Api(server.url)
    environment = {**os.environ, "TIDEBASE_URL": server.url, "PYTHONPATH": str(ROOT)}
    workers = [subprocess.Popen([sys.executable, "-c", FROZEN], env=environment, text=True, stdout=subprocess.PIPE)]
    try:
        run_id = api.enqueue(workflow="flow")
        eventually(lambda: Path(f"/proc/{workers[0].pid}/stat").read_text().split(")")[1].split()[0] == "T")
        workers.append(subprocess.Popen([sys.executable, "-c", FROZEN], env=environment, text=True))
        eventually(lambda: api.run(run_id)["status"] == "completed", 30)
        workers[0].send_signal(signal.SIGCONT)
        assert [workers[0].stdout.readline() for _ in range(4)] == ["LeaseLost\n"] * 4
        detail = api.detail(run_id)
        assert detail["state"]["value"] == {"by": workers[1].pid, "attempt": 2}
        assert (len(detail["stateVersions"]), detail["usage"], detail["gates"]) == (1, [], [])
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_a_killed_and_restarted_server_fails_no_run_and_repeats_no_completed_step(
    spawn_server: Callable[..., Any], actor: Callable[..., Any], working: Callable[..., None]
) -> None:
    server = spawn_server(TIDEBASE_LEASE_MS=10_000)
    api, tide = Api(server.url), actor(server.url)

    async def flow(run: Any, input: Any) -> None:
        for number in range(10):
            await run.step(f"step {number}", lambda: time.sleep(0.1))

    runs = [tide(lambda client: client.enqueue("flow"))["run"]["id"] for _ in range(6)]
    working(tide, {"flow": flow}, concurrency=6)
    eventually(lambda: len(api.detail(runs[0])["steps"]) > 2)
    server.end(signal.SIGKILL)
    server.start()
    eventually(lambda: all(api.run(run)["status"] == "completed" for run in runs), 30)
    assert {api.run(run)["attempt"] for run in runs} == {1}
    assert [completed_twice(api, run) for run in runs] == [[]] * 6


# ------------------------------------------------------------------------------
# Requests: repeated while that can help, and told plainly when it cannot.
# ------------------------------------------------------------------------------


def test_enqueue_says_all_that_the_protocol_can_say(tide: Any, api: Api) -> None:
    at = datetime.now(UTC) + timedelta(hours=1)
    made = tide(lambda client: client.enqueue("flow", queue="q", input={"a": 1}, metadata={"m": "x"}, dedupe_key="k",
                                              run_at=at, max_attempts=7, priority=3, deadline_s=7200.5))
    again = tide(lambda client: client.enqueue("flow", queue="q", dedupe_key="k"))
    assert (made["deduplicated"], again["deduplicated"]) == (False, True)
    assert again["run"]["id"] == made["run"]["id"]
    run = api.run(made["run"]["id"])
    assert {key: run[key] for key in ("queue", "input", "metadata", "dedupeKey", "maxAttempts", "priority")} == {
        "queue": "q", "input": {"a": 1}, "metadata": {"m": "x"}, "dedupeKey": "k", "maxAttempts": 7, "priority": 3}
    assert datetime.fromisoformat(run["runAt"].replace("Z", "+00:00")) - at < timedelta(milliseconds=1)
    assert run["deadlineAt"]
    late = tide(lambda client: client.enqueue("flow", delay_s=60))["run"]
    assert late["runAt"] > late["createdAt"]


def test_runs_can_be_listed_cancelled_and_retried(tide: Any) -> None:
    run_id = tide(lambda client: client.runs.create("flow", metadata={"team": "a"}))["id"]
    tide(lambda client: client.runs.create("flow"))
    found = tide(lambda client: client.runs.list(workflow="flow", metadata={"team": "a"}))
    assert [run["id"] for run in found] == [run_id]
    assert tide(lambda client: client.cancel(run_id, "why", "ada"))["cancelReason"] == "why"
    assert tide(lambda client: client.runs.retry(run_id))["status"] == "pending"
    with pytest.raises(TidebaseError) as missing:
        tide(lambda client: client.runs.get("run_of/nobody"))
    assert (missing.value.status, missing.value.code, missing.value.path) == (404, "not_found", "/runs/run_of%2Fnobody")


def test_a_queue_keeps_what_configure_leaves_out_or_gives_as_none_and_clears_what_it_names(tide: Any) -> None:
    def config(**settings: Any) -> tuple[Any, Any]:
        told = tide(lambda client: client.queues.configure("q", **settings))["config"]
        [queue] = tide(lambda client: client.queues.list())
        assert queue["config"] == told
        return told["concurrency"], told["ratePerMinute"]

    assert config(concurrency=2, rate_per_minute=60) == (2, 60)
    assert config(concurrency=None) == (2, 60)
    assert config(rate_per_minute=30, clear="concurrency") == (None, 30)
    assert config(clear=["rate_per_minute"]) == (None, None)
    for wrong in ("ratePerMinute", "concurrency"):
        with pytest.raises(ValueError, match=wrong):
            config(concurrency=1, clear=[wrong])


def test_a_wrong_body_is_told_field_by_field_in_the_errors_words(tide: Any) -> None:
    with pytest.raises(TidebaseError) as refused:
        tide(lambda client: client.enqueue("flow", max_attempts=0))
    assert (refused.value.status, refused.value.code) == (400, "invalid_request")
    [issue] = refused.value.body["issues"]
    assert f"{issue['path']}: {issue['message']}" in str(refused.value)
    with pytest.raises(TidebaseError, match=re.escape("cron: '0 25 * * *' is not a cron expression of five fields")):
        tide(lambda client: client.schedules.set("nightly", cron="0 25 * * *", workflow_name="flow"))


@pytest.mark.parametrize("options", [{}, {"side_effects": ["email"], "idempotency_key": "k"}])
def test_an_output_that_the_server_does_not_take_names_step_size_and_setting_and_is_not_tried_again(
    actor: Callable[..., Any], start_server: Callable[..., Any], options: Any
) -> None:
    server = start_server(TIDEBASE_MAX_BODY=20_000)
    api, tide = Api(server.url), actor(server.url)
    tries: list[int] = []

    async def flow(run: Any, input: Any) -> None:
        await run.step("render", lambda: tries.append(1) or "x" * 30_000, retries=3, **options)

    run_id = new_run_id()
    with pytest.raises(BodyTooLarge, match=r"'render'.* 30,002 bytes.*TIDEBASE_MAX_BODY"):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id))
    assert tries == [1]
    [step] = api.detail(run_id)["steps"]
    assert (step["status"], step["error"]["name"]) == ("failed", "BodyTooLarge")
    run = api.run(run_id)
    assert (run["status"], run["error"]["step"]) == ("failed", "render")


def test_an_input_and_a_result_that_the_server_does_not_take_say_so(
    actor: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    tide = actor(start_server(TIDEBASE_MAX_BODY=20_000).url)

    async def big_input(run: Any, input: Any) -> None:
        await run.step("render", lambda page: 1, input="x" * 30_000)

    async def big_result(run: Any, input: Any) -> str:
        return "x" * 30_000

    with pytest.raises(BodyTooLarge, match=r"'render'.*its input 30,002"):
        tide(lambda client: client.run("flow", tide.workflow(big_input)))
    with pytest.raises(BodyTooLarge, match=r"the result of run run_.* of workflow 'flow' has 30,002 bytes"):
        tide(lambda client: client.run("flow", tide.workflow(big_result)))
    with pytest.raises(BodyTooLarge, match=r"30,.* bytes are more than the server takes.*TIDEBASE_MAX_BODY"):
        tide(lambda client: client.enqueue("flow", input="x" * 30_000))


def test_a_server_that_is_away_is_unreachable_after_timeout_s(actor: Callable[..., Any]) -> None:
    tide = actor(f"http://127.0.0.1:{free_port()}", timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(Unreachable):
        tide(lambda client: client.enqueue("flow"))
    assert time.monotonic() - began < 5


def test_a_request_reaches_a_server_that_comes_up_meanwhile(
    actor: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    port = free_port()
    tide = actor(f"http://127.0.0.1:{port}", timeout_s=20)
    coming = threading.Timer(0.5, start_server, kwargs={"PORT": port})
    coming.start()
    assert tide(lambda client: client.enqueue("flow"))["run"]["status"] == "queued"
    coming.join()


def test_the_key_is_sent_and_shown_nowhere(
    actor: Callable[..., Any], start_server: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(TIDEBASE_API_KEY="s3cret")
    assert tide_id(actor(server.url, api_key="s3cret\n"))
    wrong = actor(server.url, api_key="wr0ng")
    with pytest.raises(TidebaseError) as refused:
        tide_id(wrong)
    assert refused.value.status == 401
    assert "api_key= or TIDEBASE_API_KEY" in str(refused.value)
    shown = caplog.text + repr(wrong.client) + repr(refused.value) + str(vars(refused.value))
    assert "wr0ng" not in shown
    with pytest.raises(ValueError, match="characters") as bad:
        Tidebase(server.url, api_key="wr0ng\nX-Evil: 1")
    assert "wr0ng" not in str(bad.value)


def tide_id(tide: Any) -> Any:
    return tide(lambda client: client.enqueue("flow"))["run"]["id"]


def test_two_executions_in_one_process_do_not_pass_for_one_owner(tide: Any) -> None:
    run_id = new_run_id()

    async def flow(run: Any, input: Any) -> str:
        async def inner(run: Any, input: Any) -> None: ...

        other = type(tide)(tide.client._server.url)
        try:
            with pytest.raises(TidebaseError) as refused:
                other(lambda client: client.run("flow", other.workflow(inner), run_id=run_id))
        finally:
            other.close()
        return str(refused.value.code)

    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)) == "run_leased"


def test_a_session_completes_fails_or_gives_back(server: Any, api: Api) -> None:
    with Tidebase(server.url) as tide:
        with tide.runs.attach("flow", input={"n": 1}) as session:
            assert session.step("add", lambda: session.input["n"] + 1) == 2
            assert session.run["status"] == "running"
            assert session.heartbeat()["run"]["leaseOwner"] == session.run["leaseOwner"]
            assert session.complete({"sum": 2})["run"] == session.run == api.run(session.run_id)
        assert api.run(session.run_id)["result"] == {"sum": 2}
        with pytest.raises(RunCompleted) as completed:
            tide.attach("flow", run_id=session.run_id)
        assert (completed.value.run_id, completed.value.result) == (session.run_id, {"sum": 2})
        with tide.runs.attach("flow") as left:
            pass
        assert api.run(left.run_id)["status"] == "pending"
        with pytest.raises(ZeroDivisionError), tide.runs.attach("flow") as failing:
            failing.step("divide", lambda: 1 / 0)
        assert api.run(failing.run_id)["error"]["step"] == "divide"
        failed = tide.runs.attach("flow").fail("no such page")
        assert (failed["requeued"], failed["run"]["error"]) == (False, {"message": "no such page"})


def test_a_webhook_is_verified_and_runs_the_registered_workflow(
    actor: Callable[..., Any], server: Any, api: Api
) -> None:
    tide = actor(server.url, webhook_secret="shared")

    async def flow(run: Any, input: Any) -> str:
        return "recovered"

    tide.client.workflow("flow", tide.workflow(flow))
    run_id = api.create("flow")

    def deliver(body: Any, secret: bytes = b"shared") -> int:
        raw = json.dumps(body).encode()
        header = "sha256=" + hmac.new(secret, raw, hashlib.sha256).hexdigest()
        return int(tide(lambda client: client.handle_webhook(raw, header))[0])

    told = {"type": "run.resume", "runId": run_id, "workflowName": "flow", "reason": "manual", "attempt": 1}
    assert deliver(told, secret=b"forged") == 401
    assert deliver({**told, "workflowName": "unknown"}) == 404
    assert deliver({**told, "type": "run.completed"}) == 400
    assert api.run(run_id)["status"] == "pending"
    assert deliver(told) == 200
    assert api.run(run_id)["result"] == "recovered"
    assert deliver(told) == 200  # again: at least once is the promise


def test_a_webhook_is_verified_by_all_its_headers_and_the_runs_own_secret(
    actor: Callable[..., Any], server: Any, api: Api
) -> None:
    tide = actor(server.url, webhook_secret="shared")

    async def flow(run: Any, input: Any) -> str:
        return "recovered"

    tide.client.workflow("flow", tide.workflow(flow))
    run_id = api.create("flow")
    raw = json.dumps({"type": "run.resume", "runId": run_id, "workflowName": "flow"}).encode()

    def headers(secret: str, sent_at: int) -> dict[str, str]:
        return {"Webhook-Id": "rec_1", "Webhook-Timestamp": str(sent_at),
                **sign(raw, secret, "rec_1", sent_at)}

    def deliver(given: dict[str, str], **options: Any) -> int:
        return int(tide(lambda client: client.handle_webhook(raw, headers=given, **options))[0])

    now = int(time.time())
    assert deliver(headers("shared", now - 400)) == 401  # intercepted, and sent again later
    assert deliver(headers("own", now)) == 401
    assert deliver(headers("shared", now), secret="own") == 401
    assert deliver({}) == 401
    assert deliver({"x-tidebase-signature": headers("shared", now)["x-tidebase-signature"]}) == 401  # has no time
    assert api.run(run_id)["status"] == "pending"
    assert deliver(headers("shared", now)) == 200
    assert deliver(headers("own", now), secret="own") == 200
    assert api.run(run_id)["result"] == "recovered"


def test_every_way_to_make_a_run_takes_its_recovery_secret(
    actor: Callable[..., Any], server: Any, sql: Callable[..., Any]
) -> None:
    tide = actor(server.url)
    asks = {"recovery_webhook": "http://127.0.0.1:9/", "recovery_secret": "own"}

    async def flow(run: Any, input: Any) -> str:
        return "done"

    async def parent(run: Any, input: Any) -> None:
        await run.child("child", tide.workflow(flow), **asks)

    tide(lambda client: client.runs.create("created", **asks))
    tide(lambda client: client.enqueue("enqueued", **asks))
    tide(lambda client: client.run("executed", tide.workflow(flow), **asks))
    tide(lambda client: client.run("parent", tide.workflow(parent)))
    tide(lambda client: client.runs.attach("attached", **asks))
    assert sql("select workflow_name, recovery_secret from tidebase.runs order by workflow_name") == [
        ("attached", "own"), ("child", "own"), ("created", "own"), ("enqueued", "own"), ("executed", "own"),
        ("parent", None)]


# ------------------------------------------------------------------------------
# Gates, state, children, events: what a run does besides steps.
# ------------------------------------------------------------------------------


def pending_gate(api: Api, run_id: str) -> Any:
    """The run's gate, once it is open."""
    return eventually(lambda: next(iter(api.detail(run_id)["gates"]), None))


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start work() in a thread; call what this returns for its outcome."""
    outcome: list[Any] = []

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=body)
    thread.start()

    def join() -> Any:
        thread.join(30)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    return join


def test_a_gate_waits_for_its_decision_and_a_replay_gets_the_same(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> Any:
        gate = await run.gate("approve-send", "Send this?", data={"to": "ada"}, timeout_s=3600)
        if run.attempt == 1:
            raise RuntimeError
        return [gate.approved, gate.status, gate.actor, gate.payload]

    run_id = api.create("flow")
    outcome = in_background(lambda: tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)))
    gate = pending_gate(api, run_id)
    assert (gate["prompt"], gate["data"], gate["status"]) == ("Send this?", {"to": "ada"}, "pending")
    tide(lambda client: client.gates.resolve(run_id, gate["id"], token=gate["resolveToken"], decision="approved",
                                             actor="bob", payload={"note": "fine"}))
    with pytest.raises(RuntimeError):
        outcome()
    replayed = tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert replayed == [True, "approved", "bob", {"note": "fine"}]
    with pytest.raises(TidebaseError) as refused:
        tide(lambda client: client.gates.resolve(run_id, gate["id"], token="guess", decision="rejected"))
    assert refused.value.status == 409


def test_cancelling_a_run_unwinds_the_worker_that_waits_at_its_gate(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.gate("approve", "Sure?", poll_s=1)

    run_id = api.create("flow")
    outcome = in_background(lambda: tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)))
    pending_gate(api, run_id)
    api.post(f"/runs/{run_id}/cancel")
    with pytest.raises(RunCancelled):
        outcome()


def test_state_snapshots_and_usage_are_recorded(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> Any:
        await run.state.set({"progress": 1, "of": 3})
        version = (await run.state_patch({"progress": 2}, label="half"))["state"]["version"]
        with pytest.raises(TidebaseError) as moved:
            await run.state.patch({"progress": 9}, if_version=version - 1)
        await run.state.save("checked")
        await run.snapshots.create("draft", {"text": "a"}, target={"type": "document", "id": "d1"})
        await run.usage.record(model="m", input_tokens=10, output_tokens=5, cost_usd=0.25)
        await run.usage_record(model="m", input_tokens=1)
        labels = [version["label"] for version in await run.state.versions(None, True)]
        return [moved.value.code, labels, len(await run.snapshots.list())]

    run_id = new_run_id()
    code, labels, _ = tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert code == "version_conflict"
    assert {"half", "checked"} <= set(labels)
    detail = api.detail(run_id)
    assert "draft" in [version["label"] for version in detail["stateVersions"]]
    assert [usage["totalTokens"] for usage in detail["usage"]] == [15, 1]
    group = tide(lambda client: client.usage(by="model"))["groups"][0]
    assert group["costUsd"] == 0.25


def test_a_state_may_be_null(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.state.set(None)

    run_id = new_run_id()
    tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert len(api.detail(run_id)["stateVersions"]) == 1


def test_a_fanout_runs_children_once_and_joins_them_in_a_step(tide: Any, api: Api) -> None:
    calls: list[int] = []

    async def child(run: Any, input: Any) -> int:
        await run.step("work", lambda: calls.append(input["n"]))
        return int(input["n"]) * 2

    async def parent(run: Any, input: Any) -> Any:
        first = await run.child("doubled", tide.workflow(child), name="first", input={"n": 100})
        rest = await run.fanout("all", [{"name": f"n{n}", "workflow": tide.workflow(child), "input": {"n": n},
                                         "workflow_name": "doubled"} for n in range(20)])
        if run.attempt == 1:
            raise RuntimeError
        return [first, rest]

    run_id = new_run_id()
    with pytest.raises(RuntimeError):
        tide(lambda client: client.run("parent", tide.workflow(parent), run_id=run_id))
    result = tide(lambda client: client.run("parent", tide.workflow(parent), run_id=run_id))
    assert result == [200, [n * 2 for n in range(20)]]
    assert sorted(calls) == [*range(20), 100]
    detail = api.detail(run_id)
    assert [step["name"] for step in detail["steps"]] == ["join:all"]
    assert {run["workflowName"] for run in detail["childRuns"]} == {"doubled"}


def test_a_fanout_lets_all_children_end_and_names_those_that_failed(tide: Any, api: Api) -> None:
    async def child(run: Any, input: Any) -> Any:
        return await run.step("divide", lambda: 1 / input["by"])

    async def parent(run: Any, input: Any) -> Any:
        return await run.fanout("all", [{"name": f"by {by}", "workflow": tide.workflow(child), "input": {"by": by}}
                                        for by in (1, 0, 2)])

    run_id = new_run_id()
    with pytest.raises(FanoutFailed, match="by 0: ZeroDivisionError") as failed:
        tide(lambda client: client.run("parent", tide.workflow(parent), run_id=run_id))
    assert list(failed.value.errors) == ["by 0"], failed.value.errors
    assert Counter(run["status"] for run in api.detail(run_id)["childRuns"]) == {"completed": 2, "failed": 1}


def test_a_fork_starts_with_the_checkpoints_before_the_step(tide: Any) -> None:
    async def flow(run: Any, input: Any) -> Any:
        return [await run.step("one", lambda: run.run_id), await run.step("two", lambda: run.run_id)]

    first = new_run_id()
    tide(lambda client: client.run("flow", tide.workflow(flow), run_id=first))
    forked = tide(lambda client: client.runs.fork(first, from_step="two"))["id"]
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=forked)) == [first, forked]


def test_a_fork_runs_changed_code_on_the_checkpoints_that_it_copied(tide: Any, api: Api) -> None:
    """The README's example: the fork has another input, which the copied step is called with, too."""
    async def campaign(run: Any, input: Any) -> Any:
        draft = await run.step("draft", lambda: f"draft for {input['to']}", input=input, retries=3)
        return await run.step("send", lambda: f"{draft}, sent to {input['to']}", side_effects=["email"],
                              idempotency_key=run.run_id)

    first = new_run_id()
    tide(lambda client: client.run("campaign", tide.workflow(campaign), run_id=first, input={"to": "Ada"}))
    for queue in (None, "mail"):
        forked = tide(lambda client: client.runs.fork(
            first, from_step="send", input={"to": "someone else"}, queue=queue))  # noqa: B023
        assert (forked["queue"], forked["status"]) == (queue, "queued" if queue else "pending")
        assert tide(lambda client: client.run("campaign", tide.workflow(campaign), run_id=forked["id"])) == (  # noqa: B023
            "draft for Ada, sent to someone else")


@pytest.mark.parametrize("after", [0, 1, 2, 100])
def test_a_subscription_to_a_run_that_has_ended_ends_wherever_it_begins(tide: Any, api: Api, after: int) -> None:
    run_id = api.create()
    api.post(f"/runs/{run_id}/cancel")["run"]

    async def read(client: Any) -> Any:
        events = client.runs.subscribe(run_id, after)
        if isinstance(client, AsyncTidebase):
            return [event["seq"] async for event in events]
        return [event["seq"] for event in events]

    seqs = asyncio.run(_read_awaited(api, read)) if isinstance(tide, AwaitedActor) else asyncio.run(read(tide.client))
    assert seqs == [1, 2][after:]


async def _read_awaited(api: Api, read: Any) -> Any:
    async with AsyncTidebase(f"http://{api.address}") as client:
        return await read(client)


def test_schedules_are_set_listed_and_deleted(tide: Any) -> None:
    made = tide(lambda client: client.schedules.set("nightly", cron="0 3 * * *", workflow_name="report",
                                                    input={"a": 1}, timezone="Europe/Berlin"))
    assert (made["cron"], made["timezone"], made["queue"]) == ("0 3 * * *", "Europe/Berlin", "default")
    assert [schedule["name"] for schedule in tide(lambda client: client.schedules.list())] == ["nightly"]
    assert tide(lambda client: client.schedules.delete("nightly")) == {"deleted": "nightly"}
    with pytest.raises(TidebaseError) as missing:
        tide(lambda client: client.schedules.delete("nightly"))
    assert missing.value.status == 404


def test_a_subscription_survives_a_killed_server_and_loses_and_repeats_nothing(
    spawn_server: Callable[..., Any], actor: Callable[..., Any]
) -> None:
    server = spawn_server()
    api, tide = Api(server.url), actor(server.url)
    run_id = api.create("flow")
    seen: list[Any] = []

    def follow() -> None:
        if isinstance(tide, BlockingActor):
            seen.extend(tide.client.runs.subscribe(run_id))
        else:
            async def collect(client: Any) -> None:
                async for event in client.runs.subscribe(run_id):
                    seen.append(event)

            tide(collect)

    def feed(names: range) -> None:
        for number in names:
            api.post(f"/runs/{run_id}/usage", {"label": str(number)})

    outcome = in_background(follow)
    feed(range(5))
    eventually(lambda: len(seen) == 6)
    server.end(signal.SIGKILL)
    server.start()
    feed(range(5, 10))
    api.complete(run_id)
    outcome()
    assert [event["seq"] for event in seen] == list(range(1, 13))
    assert seen[-1]["type"] == "run.completed"


# ------------------------------------------------------------------------------
# Pure parts, and the file itself.
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"), (-0.0, "0"), (1e21, "1e+21"), (1e20, "100000000000000000000"), (1e-6, "0.000001"), (1e-7, "1e-7"),
        (5e-324, "5e-324"), (1.7976931348623157e308, "1.7976931348623157e+308"), (2**53 + 1, "9007199254740992"),
        (123456789012345678901, "123456789012345680000"), (333333333.33333329, "333333333.3333333"), (-1.5, "-1.5"),
        (True, "true"), (None, "null"), ("€$\x0f\nA'B\"\\/\x7f", '"€$\\u000f\\nA\'B\\"\\\\/\x7f"'), ([], "[]"),
        ({"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\x80": 6, "\u00f6": 7},
         '{"\\r":2,"1":4,"\x80":6,"ö":7,"€":1,"\U0001f600":5,"\ufb33":3}'),
    ],
)
def test_canonical_json_is_rfc_8785(value: Any, text: str) -> None:
    assert canonical_json(value) == text


def test_canonical_numbers_are_those_of_ecmascript() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine to compare with")
    bits = (int.from_bytes(os.urandom(8), "big") for _ in range(5000))
    numbers = [number for number in (struct.unpack("d", struct.pack("Q", b))[0] for b in bits) if math.isfinite(number)]
    script = "process.stdout.write(JSON.parse(require('fs').readFileSync(0)).map(String).join('\\n'))"
    told = subprocess.run([node, "-e", script], input=json.dumps(numbers), capture_output=True, text=True, check=True)
    assert [canonical_json(number) for number in numbers] == told.stdout.split("\n")


@pytest.mark.parametrize("value", [math.nan, -math.inf, "\ud800", {"\udc00": 1}, 10**400, object()])
def test_canonical_json_refuses_what_json_cannot_say(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical_json(value)


def test_a_signature_holds_for_exactly_these_bytes_and_junk_never_raises() -> None:
    header = "sha256=" + hmac.new(b"secret", b'{"a": 1}', hashlib.sha256).hexdigest()
    assert verify_webhook_signature(b'{"a": 1}', header, "secret")
    assert not verify_webhook_signature(b'{"a":1}', header, "secret")
    for junk in (None, "", "sha256=", "sha256=é", "\udc00", header[:-1], header.upper(), 5):
        assert not verify_webhook_signature(b'{"a": 1}', junk, "secret")  # type: ignore[arg-type]
    assert not verify_webhook_signature(b"", "sha256=" + hmac.new(b"", b"", hashlib.sha256).hexdigest(), "")


def test_run_ids_are_ordered_by_time() -> None:
    first = new_run_id()
    time.sleep(0.002)
    assert first < new_run_id()
    assert len(first) == 36


def test_the_blocking_and_the_awaited_client_have_one_surface() -> None:
    def surface(cls: type) -> dict[str, str]:
        public = [name for name in dir(cls) if not name.startswith("_")]
        return {name: str(inspect.signature(getattr(cls, name))) for name in public if callable(getattr(cls, name))}

    assert surface(Tidebase) == surface(AsyncTidebase)
    assert {"run", "enqueue", "work", "workflow", "handle_webhook", "usage", "close"} <= set(surface(Tidebase))
    assert inspect.iscoroutinefunction(AsyncTidebase("http://localhost:1").run)
    assert not inspect.iscoroutinefunction(Tidebase("http://localhost:1").run)


def interpreter(version: str) -> str:
    """A Python of that version that runs: a version manager's shim may stand for one that is not in use."""
    on_path = shutil.which(f"python{version}")
    managed = map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in [*managed, *([on_path] if on_path else [])]:
        told = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
        if told.returncode == 0 and told.stdout.startswith(f"Python {version}."):
            return python
    pytest.skip(f"CPython {version} is not on this machine")


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_the_file_copied_as_tidebase_py_imports_on_an_interpreter_with_nothing_installed(
    version: str, tmp_path: Path
) -> None:
    python = interpreter(version)
    shutil.copy(ROOT / "tidebase_sdk.py", tmp_path / "tidebase.py")
    code = ("import tidebase; tidebase.aio.AsyncTidebase; from tidebase.aio import AsyncTidebase, LeaseLost; "
            "from tidebase import Tidebase, verify_webhook, verify_webhook_signature; import asyncio; "
            "Tidebase().close(); asyncio.run(AsyncTidebase().close()); print(tidebase.new_run_id())")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"
    done = subprocess.run([python, "-I", "-S", "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run_")
