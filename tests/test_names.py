"""Each call of a workflow is its own: a name used twice is numbered in the order of calls, and a replay finds each.

Also what is written between two calls, usage, state and snapshots, which a replay writes once; and what stays as it was
recorded first. The actors, which hold the blocking and the awaited client to one story, are those of test_sdk.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_sdk
from conftest import Api, eventually
from test_sdk import AwaitedActor, BlockingActor, in_background

import tidebase_sdk
from tidebase_sdk import FanoutFailed, RunFailed, SignalTimeout, Tidebase, TidebaseError, new_run_id

actor, tide, working = test_sdk.actor, test_sdk.tide, test_sdk.working  # fixtures


class Crashed(Exception):
    """Ends an execution, which is then made once more."""


def replayed(tide: Any, flow: Callable[..., Any], run_id: str | None = None, times: int = 2) -> list[Any]:
    """What flow(run) returned in each of its executions. All but the last end with a failure, so that it is resumed."""
    run_id = run_id or new_run_id()
    results: list[Any] = []

    async def crashing(run: Any, input: Any) -> Any:
        results.append(await flow(run))
        if len(results) < times:
            raise Crashed

    for _ in range(times):
        try:
            tide(lambda client: client.run("flow", tide.workflow(crashing), run_id=run_id))
        except Crashed:
            continue
    assert len(results) == times
    return results


def step_names(api: Api, run_id: str) -> list[str]:
    return [step["name"] for step in api.detail(run_id)["steps"]]


def decide(api: Api, run_id: str, name: str, decision: str = "approved", **body: Any) -> Any:
    def asked() -> Any:
        return next((gate for gate in api.detail(run_id)["gates"] if gate["name"] == name), None)

    gate = eventually(asked)
    body = {"token": gate["resolveToken"], "decision": decision, **body}
    assert api.post(f"/runs/{run_id}/gates/{gate['id']}/resolve", body).status == 200
    return gate


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records
            if record.name == "tidebase" and record.levelno == logging.WARNING]


# ------------------------------------------------------------------------------
# Steps.
# ------------------------------------------------------------------------------


def test_a_step_in_a_loop_is_executed_for_each_item_and_a_replay_returns_each_its_own(tide: Any, api: Api) -> None:
    executed: list[str] = []

    async def flow(run: Any) -> Any:
        return [await run.step("page", lambda: executed.append(url) or url.upper()) for url in "abc"]  # noqa: B023

    run_id = new_run_id()
    assert replayed(tide, flow, run_id, times=3) == [["A", "B", "C"]] * 3
    assert executed == ["a", "b", "c"]
    assert step_names(api, run_id) == ["page", "page#2", "page#3"]


def test_a_loop_that_was_cut_off_goes_on_with_the_item_that_is_missing(tide: Any) -> None:
    executed: list[int] = []

    async def flow(run: Any, input: Any) -> list[int]:
        outputs = []
        for n in range(4):
            outputs.append(await run.step("page", lambda: executed.append(n) or n * 10, input={"n": n}))  # noqa: B023
            if len(outputs) == 2 and run.attempt == 1:
                raise Crashed
        return outputs

    run_id = new_run_id()
    with pytest.raises(Crashed):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)) == [0, 10, 20, 30]
    assert executed == [0, 1, 2, 3]


def test_a_name_of_ones_own_that_looks_numbered_stays_and_the_next_free_number_is_given(tide: Any, api: Api) -> None:
    async def flow(run: Any) -> Any:
        return [await run.step(name, lambda: f"{position} {name}")  # noqa: B023
                for position, name in enumerate(["page", "page#2", "page", "page", "page#3", "page#2"])]

    run_id = new_run_id()
    first, again = replayed(tide, flow, run_id)
    assert first == again == ["0 page", "1 page#2", "2 page", "3 page", "4 page#3", "5 page#2"]
    assert step_names(api, run_id) == ["page", "page#2", "page#3", "page#4", "page#3#2", "page#2#2"]


def test_one_name_twice_at_the_same_time_is_refused_and_says_what_to_do(tide: Any, api: Api) -> None:
    begun, go = threading.Event(), threading.Event()

    async def flow(run: Any, input: Any) -> Any:
        def slow() -> str:
            begun.set()
            go.wait(20)
            return "worked"

        blocking = isinstance(tide, BlockingActor)
        first = in_background(lambda: run._run.step("page", slow)) if blocking else (
            asyncio.ensure_future(run.step("page", slow)))
        while not begun.is_set():
            await (test_sdk.Done(None) if blocking else asyncio.sleep(0.005))
        try:
            with pytest.raises(ValueError, match=r"step 'page' is under way.* name of its own.*f'page-\{i\}'"):
                await run.step("page", lambda: "never")
            await run.step("another", lambda: "not in the way")
        finally:
            go.set()
        return first() if blocking else await first

    run_id = new_run_id()
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)) == "worked"
    assert sorted(step_names(api, run_id)) == ["another", "page"]


def test_of_gathered_calls_of_one_name_all_but_the_first_are_refused(server: Any) -> None:
    async def flow(run: Any) -> list[str]:
        calls = [run.step("page", lambda: asyncio.sleep(0.01)), run.step("page", lambda: 1), run.gate("ok", "?"),
                 run.gate("ok", "?"), run.child("part", lambda: 1), run.child("part", lambda: 1),
                 run.wait_for_signal("s", timeout_s=0.01), run.wait_for_signal("s"), run.sleep(0.01, name="n"),
                 run.sleep(0.01, name="n"), run.sleep(0.01), run.sleep(0.01),
                 run.fanout("all", [{"name": "a", "workflow": lambda: 1}]),
                 run.fanout("all", [{"name": "b", "workflow": lambda: 1}]),
                 run.fanout("others", [{"name": "a", "workflow": lambda: 1}])]
        tasks = [asyncio.ensure_future(call) for call in calls]
        done, waiting = await asyncio.wait(tasks, timeout=0.5)
        assert waiting == {tasks[2]}  # the gate
        waiting.pop().cancel()
        return [type(task.exception()).__name__ if task in done else "waits" for task in tasks]

    actor = AwaitedActor(server.url)
    try:
        outcomes = actor(lambda client: client.run("flow", flow))
    finally:
        actor.close()
    assert outcomes == ["NoneType", "ValueError", "waits", "ValueError", "NoneType", "ValueError", "SignalTimeout",
                        "ValueError", "NoneType", "ValueError", "NoneType", "NoneType", "NoneType", "ValueError",
                        "ValueError"]


@pytest.mark.parametrize("call", ["no input", "one input", "partial", "method"])
def test_a_step_tried_again_by_hand_is_the_same_step_and_its_replay_is_not_tried_at_all(
    tide: Any, api: Api, call: str
) -> None:
    executed: list[str] = []

    class Fetcher:
        def fetch(self, url: str = "") -> str:
            executed.append(url)
            if executed.count(url) < 3 and url != "a":
                raise ConnectionError(url)
            return f"{url} at try {executed.count(url)}"

    fetcher = Fetcher()

    async def one(run: Any, url: str, number: int) -> Any:
        if call == "no input":
            return await run.step("page", lambda: fetcher.fetch(url))
        if call == "one input":  # it says what the output depends on; the function may differ from try to try
            return await run.step("page", lambda: number >= 0 and fetcher.fetch(url), input=url)
        if call == "partial":
            return await run.step("page", functools.partial(fetcher.fetch, url=url))
        return await run.step("page", fetcher.fetch)

    async def flow(run: Any) -> list[Any]:
        pages = []
        for url in ("",) if call == "method" else ("a", "b", "c"):
            for number in range(3):
                try:
                    pages.append(await one(run, url, number))
                    break
                except ConnectionError:
                    pass
        return pages

    run_id = new_run_id()
    first, again = replayed(tide, flow, run_id)
    expected = [" at try 3"] if call == "method" else ["a at try 1", "b at try 3", "c at try 3"]
    assert first == again == expected
    assert executed == ([""] * 3 if call == "method" else ["a", *"bbb", *"ccc"])
    assert step_names(api, run_id) == ["page", "page#2", "page#3"][:len(expected)]


@pytest.mark.parametrize("says_its_input", [False, True])
def test_a_loop_that_goes_on_after_a_failure_keeps_what_belongs_to_each_item(
    tide: Any, api: Api, says_its_input: bool
) -> None:
    executed: list[str] = []
    broken = {"b"}

    def fetch(url: str) -> str:
        executed.append(url)
        if url in broken:
            raise ConnectionError(url)
        return url.upper()

    async def flow(run: Any) -> list[Any]:
        pages = []
        for url in "abc":
            try:
                options = {"input": url} if says_its_input else {}
                pages.append(await run.step("page", lambda: fetch(url), **options))  # noqa: B023
            except ConnectionError:
                pages.append(None)
        broken.clear()
        return pages

    run_id = new_run_id()
    assert replayed(tide, flow, run_id) == [["A", None, "C"], ["A", "B", "C"]]  # a failure is no checkpoint
    assert executed == ["a", "b", "c", "b"]
    assert step_names(api, run_id) == ["page", "page#2", "page#3"]


def test_failures_that_are_made_up_for_at_the_end_are_found_by_the_replay(tide: Any) -> None:
    executed: list[str] = []

    def fetch(url: str) -> str:
        executed.append(url)
        if executed.count(url) == 1 and url in "bd":
            raise ConnectionError(url)
        return url.upper()

    async def flow(run: Any) -> dict[str, str]:
        pages, left = {}, list("abcd")
        while left:
            failed = []
            for url in left:
                try:
                    pages[url] = await run.step("page", functools.partial(fetch, url))
                except ConnectionError:
                    failed.append(url)
            left = failed
        return pages

    first, again = replayed(tide, flow)
    assert first == again == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert executed == ["a", "b", "c", "d", "b", "d"]


def test_a_call_within_a_step_does_not_take_the_name_of_one_that_the_replay_makes(tide: Any, api: Api) -> None:
    async def flow(run: Any) -> Any:
        plain = getattr(run, "_run", run)

        def inside_blocking() -> list[str]:
            return [plain.step("page", lambda n=n: f"inside {n}") for n in range(2)]

        async def inside() -> list[str]:
            return [await run.step("page", lambda n=n: f"inside {n}") for n in range(2)]

        outer = await run.step("all", inside if plain is run else inside_blocking)
        await run.usage.record(input_tokens=1)
        return [*outer, await run.step("page", lambda: "outside")]

    run_id = new_run_id()
    assert replayed(tide, flow, run_id) == [["inside 0", "inside 1", "outside"]] * 2
    assert sorted(step_names(api, run_id)) == ["all", "all/page", "all/page#2", "page"]
    assert len(api.detail(run_id)["usage"]) == 1


# ------------------------------------------------------------------------------
# Gates.
# ------------------------------------------------------------------------------


def test_one_approval_of_a_gate_in_a_loop_counts_for_one(tide: Any, api: Api) -> None:
    async def flow(run: Any) -> Any:
        return [[(gate := await run.gate("approve", f"Send to {who}?", data={"who": who}, poll_s=20)).status,
                 gate.name, gate.payload] for who in ("ada", "bob", "eve")]

    run_id = api.create("flow")
    outcome = in_background(lambda: replayed(tide, flow, run_id))
    assert decide(api, run_id, "approve", payload={"note": 1})["prompt"] == "Send to ada?"
    assert decide(api, run_id, "approve#2", "rejected")["prompt"] == "Send to bob?"
    assert decide(api, run_id, "approve#3", payload=None)["data"] == {"who": "eve"}
    first, again = outcome()
    assert first == again == [["approved", "approve", {"note": 1}], ["rejected", "approve#2", {}],
                              ["approved", "approve#3", {}]]


def test_a_gate_asked_again_with_another_prompt_keeps_the_first_and_says_so_in_the_log(
    tide: Any, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    count: list[int] = []

    async def flow(run: Any) -> bool:
        count.append(1)
        return (await run.gate("approve", f"Send? It is {len(count)} o'clock", data={"at": len(count)})).approved

    run_id = api.create("flow")
    outcome = in_background(lambda: replayed(tide, flow, run_id))
    gate = decide(api, run_id, "approve")
    assert outcome() == [True, True]
    assert (gate["prompt"], gate["data"]) == ("Send? It is 1 o'clock", {"at": 1})
    [told] = warnings(caplog)
    assert run_id in told
    assert "gate 'approve' was recorded with another prompt and data" in told


def test_the_two_halves_of_a_gate_find_it_by_its_name_however_often_they_are_called(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> Any:
        begun = [await run.gates.begin("approve", "Sure?", data={"n": 1}) for _ in range(3)]
        assert len({gate["gateId"] for gate in begun}) == 1
        decide(api, run.run_id, "approve", actor="ada", payload={"note": "fine"})
        gate = await run.gates.get(begun[0]["gateId"])
        waited = await run.gate("approve", "Sure?", data={"n": 1})  # the first wait takes the gate that stands open
        assert waited.gate_id == gate["gateId"]
        return [begun[0], gate]

    run_id = new_run_id()
    begun, gate = tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert list(begun) == list(gate) == ["gateId", "name", "status", "decision", "actor", "payload", "gate"]
    assert (begun["name"], begun["status"], begun["decision"], begun["actor"], begun["payload"]) == (
        "approve", "pending", None, None, {})
    assert (gate["status"], gate["decision"], gate["actor"], gate["payload"]) == (
        "approved", "approved", "ada", {"note": "fine"})
    assert gate["gate"]["id"] == gate["gateId"]


def test_the_gate_of_a_cancelled_run_is_not_asked_any_more(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> None:
        gate = await run.gates.begin("approve", "Sure?")
        api.post(f"/runs/{run.run_id}/cancel", {"reason": "enough"})["run"]
        await run.gates.get(gate["gateId"])

    with pytest.raises(tidebase_sdk.RunCancelled):
        tide(lambda client: client.run("flow", tide.workflow(flow)))


# ------------------------------------------------------------------------------
# Children and fanouts.
# ------------------------------------------------------------------------------


def test_a_child_in_a_loop_is_a_child_for_each_item(tide: Any, api: Api) -> None:
    executed: list[Any] = []

    async def research(run: Any, input: Any) -> Any:
        executed.append(input)
        return input["topic"].upper()

    async def flow(run: Any) -> Any:
        found = [await run.child("research", tide.workflow(research), input={"topic": topic}) for topic in "abc"]
        return [*found, await run.child("research", tide.workflow(research), name="last", input={"topic": "d"})]

    run_id = new_run_id()
    first, again = replayed(tide, flow, run_id)
    assert first == again == ["A", "B", "C", "D"]
    assert [topic["topic"] for topic in executed] == ["a", "b", "c", "d"]
    detail = api.detail(run_id)
    assert [edge["name"] for edge in detail["runEdges"]] == ["research", "research#2", "research#3", "last"]
    assert {run["workflowName"] for run in detail["childRuns"]} == {"research"}


def test_a_child_keeps_the_input_it_was_made_with_and_the_log_says_so(
    tide: Any, api: Api, working: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    count: list[int] = []

    async def echo(run: Any, input: Any) -> Any:
        return input

    async def flow(run: Any) -> Any:
        count.append(1)
        now = {"at": len(count)}
        children = [{"name": f"c{n}", "workflow": "echo", "input": {"n": n, **now}} for n in range(2)]
        return [await run.child("echo", tide.workflow(echo), input=now),
                await run.fanout("all", children, queue="default", checkpoint=False),
                await run.fanout("here", [{"name": "c0", "workflow": tide.workflow(echo), "input": now}],
                                 checkpoint=False)]

    working(tide, {"echo": echo})
    run_id = new_run_id()
    first, again = replayed(tide, flow, run_id)
    assert first == again == [{"at": 1}, [{"n": 0, "at": 1}, {"n": 1, "at": 1}], [{"at": 1}]]
    assert [text.split(": ", 1)[1].split(" was ")[0] for text in warnings(caplog)] == [
        "child 'echo'", "child 'c0'", "child 'c1'", "child 'c0#2'"]
    assert all(run_id in text and "another input" in text for text in warnings(caplog))


@pytest.mark.parametrize("queue", [None, "default"], ids=["here", "on a queue"])
def test_a_fanout_called_twice_is_two_fanouts(
    tide: Any, api: Api, working: Callable[..., None], queue: str | None
) -> None:
    executed: list[Any] = []

    async def part(run: Any, input: Any) -> Any:
        executed.append(input)
        return input * 10

    async def flow(run: Any) -> Any:
        rounds = []
        for number in (1, 2):
            children = [{"name": name, "workflow": tide.workflow(part), "workflow_name": "part",
                         "input": number * 10 + at} for at, name in enumerate(["a", "b", "b"])]
            rounds.append(await run.fanout("parts", children, queue=queue))
        return [*rounds, await run.child("part", tide.workflow(part), name="a", input=5, queue=queue)]

    working(tide, {"part": part})
    run_id = new_run_id()
    first, again = replayed(tide, flow, run_id)
    assert first == again == [[100, 110, 120], [200, 210, 220], 50]
    assert sorted(executed) == [5, 10, 11, 12, 20, 21, 22]
    detail = api.detail(run_id)
    assert {edge["name"] for edge in detail["runEdges"]} == {"a", "b", "b#2", "a#2", "b#3", "b#4", "a#3"}
    steps = {step["name"]: step["input"] for step in detail["steps"]}
    assert steps == {"join:parts": {"fanout": "parts", "join": "all", "children": ["a", "b", "b#2"]},
                     "join:parts#2": {"fanout": "parts#2", "join": "all", "children": ["a#2", "b#3", "b#4"]}}
    edges = {edge["name"]: (edge["edgeType"], edge["metadata"]) for edge in detail["runEdges"]}
    assert edges["b#2"] == ("fanout", {"fanout": "parts"})
    assert edges["b#4"] == ("fanout", {"fanout": "parts#2"})
    assert edges["a#3"] == ("child", {})


def test_a_fanout_joins_in_the_step_that_it_is_told_or_in_none(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> Any:
        one = [{"name": "one", "workflow": lambda: 1, "edge_type": "mine", "edge_metadata": {"k": 2}}]
        two = [{"name": "two", "workflow": lambda: 2, "workflow_name": "second"}]
        return [await run.fanout("ones", one, checkpoint="v2"), await run.fanout("twos", two, checkpoint=False)]

    run_id = new_run_id()
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id)) == [[1], [2]]
    detail = api.detail(run_id)
    assert [(step["name"], step["input"]["fanout"]) for step in detail["steps"]] == [("join:v2", "ones")]
    assert [(edge["edgeType"], edge["metadata"]) for edge in detail["runEdges"]] == [
        ("mine", {"fanout": "ones", "k": 2}), ("fanout", {"fanout": "twos"})]
    assert [run["workflowName"] for run in detail["childRuns"]] == ["one", "second"]


def test_a_fanout_and_a_child_tried_again_by_hand_execute_what_failed(tide: Any, api: Api) -> None:
    executed: list[str] = []

    async def part(run: Any, input: Any) -> str:
        executed.append(input)
        if executed.count(input) == 1 and input in "bd":
            raise ConnectionError(input)
        return input.upper()

    async def flow(run: Any) -> Any:
        children = [{"name": name, "workflow": tide.workflow(part), "input": name} for name in "abc"]
        try:
            joined = await run.fanout("parts", children)
        except FanoutFailed:
            joined = await run.fanout("parts", children)
        try:
            return [joined, await run.child("d", tide.workflow(part), input="d")]
        except ConnectionError:
            return [joined, await run.child("d", tide.workflow(part), input="d")]

    run_id = new_run_id()
    first, again = replayed(tide, flow, run_id)
    assert first == again == [["A", "B", "C"], "D"]
    assert sorted(executed) == ["a", "b", "b", "c", "d", "d"]
    assert len(api.detail(run_id)["runEdges"]) == 4


def test_a_child_that_failed_for_good_on_a_queue_is_another_child_when_it_is_called_again(
    tide: Any, api: Api, working: Callable[..., None]
) -> None:
    executed: list[int] = []

    async def part(run: Any, input: Any) -> int:
        executed.append(input)
        if len(executed) == 1:
            raise ConnectionError
        return len(executed)

    async def flow(run: Any) -> Any:
        try:
            return await run.child("part", queue="default", input=1, max_attempts=1)
        except RunFailed:
            return await run.child("part", queue="default", input=1, max_attempts=1)

    working(tide, {"part": part})
    run_id = new_run_id()
    assert replayed(tide, flow, run_id) == [2, 2]
    assert [edge["name"] for edge in api.detail(run_id)["runEdges"]] == ["part", "part#2"]


def test_a_child_is_found_by_its_workflow_name_and_a_call_that_no_worker_could_run_is_refused(tide: Any) -> None:
    tide.client.workflow("double", lambda run, input: input * 2)

    async def flow(run: Any, input: Any) -> Any:
        with pytest.raises(ValueError, match="'missing' is not registered"):
            await run.child("missing")
        with pytest.raises(ValueError, match="workflow_name='one'"):
            await run.child("one", "double", queue="default")
        return [await run.child("double", input=4), await run.child("anything", "double", input=5)]

    assert tide(lambda client: client.run("flow", tide.workflow(flow))) == [8, 10]


@pytest.mark.parametrize("other_child", [False, True], ids=["alone", "beside another child"])
def test_a_fanout_of_more_children_than_can_be_named_waits_without_a_worker(
    tide: Any, api: Api, working: Callable[..., None], monkeypatch: pytest.MonkeyPatch, other_child: bool
) -> None:
    monkeypatch.setattr("tidebase_server.bodies.MAX_BATCH", 5)  # as the server has it at 10,000
    monkeypatch.setattr(tidebase_sdk, "CHILDREN_NAMED", 5)

    async def part(run: Any, input: Any) -> int:
        return int(input) * 2

    async def parent(run: Any, input: Any) -> Any:
        return await run.fanout("all", [{"name": f"c{n}", "workflow": "part", "input": n} for n in range(12)],
                                queue="parts")

    run_id = tide(lambda client: client.enqueue("parent", queue="parents"))["run"]["id"]
    if other_child:  # it never ends, and is nothing to wait for
        api.post(f"/runs/{run_id}/children", {"name": "beside", "workflowName": "elsewhere"})["run"]
    working(tide, {"parent": parent}, queues=("parents",))
    eventually(lambda: api.run(run_id)["status"] == "waiting")
    working(tide, {"part": part}, queues=("parts",), concurrency=4)
    assert tide(lambda client: client.runs.wait(run_id, timeout_s=30)) == [n * 2 for n in range(12)]
    waited = [event["payload"]["for"]["children"] for event in api.events(run_id) if event["type"] == "run.waiting"]
    assert all(names is not True and len(names) <= 5 for names in waited) if other_child else waited == [True]
    assert api.run(run_id)["attempt"] == 1


# ------------------------------------------------------------------------------
# Sleeps and signals.
# ------------------------------------------------------------------------------


def test_sleeps_and_waits_of_one_name_are_steps_of_their_own_that_complete_when_they_are_over(
    tide: Any, api: Api
) -> None:
    async def flow(run: Any) -> Any:
        seen = []
        for number in (1, 2):
            await run.sleep(0.02, name="rest")
            await run.sleep(0.01)
            seen.append(await run.wait_for_signal("paid"))
            await run.step(f"after {number}", lambda: None)
        return seen

    run_id = api.create("flow")
    tide(lambda client: client.runs.signal(run_id, "paid", "before"))
    outcome = in_background(lambda: replayed(tide, flow, run_id))
    eventually(lambda: "signal:paid#2" in step_names(api, run_id))
    waiting = api.detail(run_id)["steps"][-1]
    assert (waiting["name"], waiting["status"]) == ("signal:paid#2", "running")
    tide(lambda client: client.runs.signal(run_id, "paid", "after"))
    first, again = outcome()
    assert first == again == ["before", "after"]
    assert step_names(api, run_id) == [
        "sleep:rest", "sleep:1", "signal:paid", "after 1", "sleep:rest#2", "sleep:2", "signal:paid#2", "after 2"]
    assert {step["attempt"] for step in api.detail(run_id)["steps"]} == {1}
    told = [(event["type"], event["payload"]["name"]) for event in api.events(run_id) if "step." in event["type"]]
    assert told[0::2] == [("step.started", name) for name in step_names(api, run_id)]
    assert told[1::2] == [("step.completed", name) for name in step_names(api, run_id)]


@pytest.mark.parametrize("leaves", [False, True], ids=["in place", "without a worker"])
def test_the_nth_wait_takes_the_nth_signal_and_one_that_timed_out_stays_so(
    tide: Any, api: Api, clock: Any, working: Callable[..., None], leaves: bool
) -> None:
    async def flow(run: Any, input: Any) -> Any:
        seen: list[Any] = []
        for _ in range(3):
            try:
                seen.append(await run.wait_for_signal("paid", timeout_s=3600 if leaves else 0.1, hold_s=0))
            except SignalTimeout:
                seen.append("too late")
                sent = {"id": "after", "name": "paid", "payload": "for the third"}  # with the id, it is sent once
                api.post(f"/runs/{run.run_id}/signals", sent)["signal"]
        if run.attempt == 1:
            raise Crashed
        return seen

    run_id = api.enqueue(workflow="flow") if leaves else api.create("flow")
    tide(lambda client: client.runs.signal(run_id, "paid", {"n": 1.0}))
    if leaves:
        working(tide, {"flow": flow})
        eventually(lambda: (api.run(run_id)["waitingFor"] or {}).get("n") == 2)
        clock.advance(ms=3_601_000)  # a second more: what is left of the hour is the client's estimate when it leaves
        api.reconcile()
        eventually(lambda: api.run(run_id)["attempt"] == 1 and api.run(run_id)["status"] == "queued")
        clock.advance(ms=10_000)
    else:
        with pytest.raises(Crashed):
            tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert tide(lambda client: client.runs.wait(run_id, timeout_s=30)) == [{"n": 1}, "too late", "for the third"]
    outputs = {step["name"]: (step["output"]["n"], step["output"]["timedOut"]) for step in api.detail(run_id)["steps"]}
    assert outputs == {"signal:paid": (1, False), "signal:paid#2": (2, True), "signal:paid#3": (3, False)}
    types = [event["type"] for event in api.events(run_id)]
    assert types.count("signal.timed_out") == 1
    assert types.count("step.started") == types.count("step.completed") == 3


def test_the_end_of_a_sleep_is_moved_neither_by_a_takeover_nor_by_other_seconds(
    tide: Any, api: Api, clock: Any, working: Callable[..., None]
) -> None:
    """A worker that begins to sleep and dies is taken over in the middle of the sleep."""
    run_id = api.enqueue(workflow="flow")
    api.claim(owner="dead")
    begun = api.begin_step(run_id, "sleep:1", "dead", tidebase_sdk.input_hash(None),
                           input={"seconds": 7200, "until": None}, options={"wait": True})["step"]
    clock.advance(ms=3_600_000)
    api.reconcile()  # its lease is over, and it is queued again, in 5 s
    clock.advance(ms=10_000)

    async def flow(run: Any, input: Any) -> str:
        await run.sleep(9, hold_s=0)
        return "awake"

    working(tide, {"flow": flow})
    eventually(lambda: api.run(run_id)["status"] == "waiting")
    until = tidebase_sdk._moment(api.run(run_id)["waitingFor"]["until"])
    assert (until - tidebase_sdk._moment(begun["createdAt"])).total_seconds() == 7200
    clock.advance(ms=3_590_000)
    api.reconcile()
    assert tide(lambda client: client.runs.wait(run_id, timeout_s=30)) == "awake"
    [step] = api.detail(run_id)["steps"]
    assert (step["status"], step["attempt"], step["input"]["seconds"]) == ("completed", 1, 7200)
    types = [event["type"] for event in api.events(run_id)]
    assert types.count("step.started") == 1
    assert types.index("run.waiting") < types.index("step.completed") < types.index("run.resumed")
    assert "step.failed" not in types


@pytest.mark.parametrize("died", ["as it began", "as it came", "as it was given up", "as it was over"])
def test_a_wait_whose_worker_died_is_gone_on_with_by_the_next_wherever_that_was(
    tide: Any, api: Api, clock: Any, working: Callable[..., None], died: str
) -> None:
    run_id = api.enqueue(workflow="flow")
    api.claim(owner="dead")
    begun = api.begin_step(run_id, "signal:paid", "dead", tidebase_sdk.input_hash(None),
                           input={"timeoutS": 3600}, options={"wait": True})["step"]
    if died == "as it came":
        tide(lambda client: client.runs.signal(run_id, "paid", "in time"))
    elif died != "as it began":
        late = api.post(f"/runs/{run_id}/signals/paid/expire", {"leaseOwner": "dead"})["signal"]
        if died == "as it was over":
            api.complete_step(run_id, begun["id"], "dead", late)["step"]
    clock.advance(ms=60_001)
    api.reconcile()
    clock.advance(ms=10_000)

    async def flow(run: Any, input: Any) -> Any:
        try:
            return await run.wait_for_signal("paid", timeout_s=1, hold_s=0)
        except SignalTimeout:
            return "too late"

    working(tide, {"flow": flow})
    if died == "as it began":
        eventually(lambda: api.run(run_id)["status"] == "waiting")
        clock.advance(ms=3_600_000)
        api.reconcile()
    assert tide(lambda client: client.runs.wait(run_id, timeout_s=30)) == (
        "in time" if died == "as it came" else "too late")
    [step] = api.detail(run_id)["steps"]
    assert (step["status"], step["attempt"], step["output"]["n"]) == ("completed", 1, 1)
    types = api.event_types(run_id)
    assert (types.count("step.started"), types.count("step.completed"), types.count("signal.timed_out")) == (
        1, 1, died != "as it came")


def test_a_fork_does_not_wait_again_for_what_came_before_it(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> Any:
        await run.sleep(0.01)
        payload = await run.wait_for_signal("paid")
        return await run.step("use", lambda: [payload, run.run_id])

    run_id = api.create("flow")
    tide(lambda client: client.runs.signal(run_id, "paid", {"cents": 5}))
    tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    forked = api.post(f"/runs/{run_id}/fork", {"fromStep": "use"})["run"]["id"]
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id=forked)) == [{"cents": 5}, forked]


# ------------------------------------------------------------------------------
# What is written between steps.
# ------------------------------------------------------------------------------


def test_what_is_written_between_steps_is_written_once_however_often_the_run_is_resumed(tide: Any, api: Api) -> None:
    async def flow(run: Any) -> Any:
        await run.state.set({"phase": "begun"})
        for n in range(3):
            await run.step("page", lambda: n)  # noqa: B023
            await run.state.set({"done": n + 1}, label=f"page {n}")
            await run.usage.record(model="m", input_tokens=10, cost_usd=0.1)
            await run.usage.record(model="m", input_tokens=10, cost_usd=0.1)  # another one, not a repeat
        await run.state.patch({"phase": "checked"})
        saved = await run.state.save("all pages")
        await run.snapshots.create("draft", {"text": "a"})
        return saved

    run_id = new_run_id()
    first, *others = replayed(tide, flow, run_id, times=3)
    assert others == [first] * 2
    detail = api.detail(run_id)
    assert detail["state"]["value"] == {"done": 3, "phase": "checked"}
    assert [version["label"] for version in detail["stateVersions"]] == [
        None, "page 0", "page 1", "page 2", None, "all pages", "draft"]
    assert len(detail["usage"]) == 6
    types = [event["type"] for event in detail["events"]]
    assert [types.count(f"{what}") for what in ("state.updated", "usage.recorded", "state.saved")] == [5, 6, 1]


def test_progress_does_not_fall_back_while_a_resumed_run_replays(tide: Any, api: Api) -> None:
    seen: list[Any] = []

    async def flow(run: Any, input: Any) -> None:
        for n in range(3):
            answer = await run.state.set({"done": n})
            seen.append((answer["state"]["value"], api.detail(run.run_id)["state"]["value"]))
            await run.step("page", lambda: n)  # noqa: B023
        if run.attempt == 1:
            raise Crashed

    run_id = new_run_id()
    with pytest.raises(Crashed):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    assert seen[:3] == [({"done": n}, {"done": n}) for n in range(3)]
    assert seen[3:] == [({"done": n}, {"done": 2}) for n in range(3)]


def test_what_is_written_inside_of_a_step_counts_with_each_execution_of_it(tide: Any, api: Api) -> None:
    async def flow(run: Any) -> None:
        plain = getattr(run, "_run", run)

        async def spend() -> None:
            await run.usage.record(model="m", input_tokens=1)
            if run.attempt == 1:
                raise ConnectionError

        def spend_blocking() -> None:
            plain.usage.record(model="m", input_tokens=1)
            if run.attempt == 1:
                raise ConnectionError

        with contextlib.suppress(ConnectionError):
            await run.step("call", spend_blocking if plain is not run else spend)
        await run.step("more", lambda: 1)

    run_id = new_run_id()
    replayed(tide, flow, run_id, times=3)
    assert len(api.detail(run_id)["usage"]) == 2  # of two tries; the third execution found the output


def test_what_a_failed_try_has_used_and_what_the_next_has_are_two_entries(tide: Any, api: Api) -> None:
    tries: list[int] = []

    def call() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError
        return len(tries)

    async def flow(run: Any) -> Any:
        while True:
            try:
                result = await run.step("call", call)
                break
            except ConnectionError:
                await run.usage.record(label="failed", input_tokens=len(tries))
        await run.usage.record(label="well", input_tokens=result)
        return result

    run_id = new_run_id()
    assert replayed(tide, flow, run_id) == [3, 3]
    assert [(entry["label"], entry["inputTokens"]) for entry in api.detail(run_id)["usage"]] == [
        ("failed", 1), ("failed", 2), ("well", 3)]


def test_an_entry_that_is_repeated_with_other_figures_stays_and_the_log_says_so(
    tide: Any, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    executions: list[int] = []

    async def flow(run: Any) -> None:
        executions.append(1)
        await run.step("one", lambda: 1)
        await run.usage.record(model="m", input_tokens=len(executions), metadata={"at": len(executions)})
        await run.state.set({"at": len(executions)})
        await run.snapshots.create("draft", {"at": len(executions)})

    run_id = new_run_id()
    replayed(tide, flow, run_id)
    detail = api.detail(run_id)
    assert [entry["inputTokens"] for entry in detail["usage"]] == [1]
    assert [version["value"] for version in detail["stateVersions"]] == [{"at": 1}, {"at": 1}]
    usage, state, snapshot = (line for line in warnings(caplog) if f"run {run_id}: " in line)
    assert "usage" in usage
    assert "another inputTokens" in usage
    assert "the state that is written after 'step one'" in state
    assert "snapshot 'draft'" in snapshot


def test_a_write_at_a_version_is_repeated_by_a_replay_without_a_conflict(tide: Any, api: Api) -> None:
    async def flow(run: Any) -> Any:
        first = (await run.state.set({"n": 1}, if_version=0))["state"]
        await run.step("one", lambda: 1)
        second = (await run.state.patch({"m": 2}, if_version=first["version"]))["state"]
        with pytest.raises(TidebaseError, match="version") as moved:
            await run.state.set({"late": True}, if_version=first["version"])
        return [first, second, moved.value.code]

    run_id = new_run_id()
    first, again = replayed(tide, flow, run_id)
    assert first == again
    assert first[1]["value"] == {"n": 1, "m": 2}
    assert api.detail(run_id)["state"] == first[1]


def test_what_is_written_after_steps_side_by_side_have_ended_is_written_once(server: Any, api: Api) -> None:
    """Also when another one of them ended last: what counts is the order in which they began."""
    async def flow(run: Any) -> None:
        rests = [0.05, 0.0] if run.attempt == 1 else [0.0, 0.05]

        async def work(rest: float) -> None:
            await asyncio.sleep(rest)
            await run.usage.record(label="inside", input_tokens=1)

        await asyncio.gather(run.step("a", lambda: work(rests[0])), run.step("b", lambda: work(rests[1])))
        await run.usage.record(label="after", input_tokens=1)
        await run.state.set({"gathered": True})
        await run.step("next", lambda: 1)
        await run.state.set({"next": True})

    actor, run_id = AwaitedActor(server.url), new_run_id()
    try:
        replayed(actor, flow, run_id)
    finally:
        actor.close()
    detail = api.detail(run_id)
    assert sorted(entry["label"] for entry in detail["usage"]) == ["after", "inside", "inside"]
    assert detail["state"]["value"] == {"next": True}
    assert len(detail["stateVersions"]) == 2


def test_what_is_written_beside_a_step_counts_each_time(server: Any, api: Api) -> None:
    async def flow(run: Any) -> None:
        begun = asyncio.Event()

        async def slow() -> None:
            begun.set()
            await asyncio.sleep(0.05)
            if run.attempt == 1:
                raise Crashed

        step = asyncio.ensure_future(run.step("slow", slow))
        await begun.wait()
        await run.usage.record(label="beside", input_tokens=1)
        await step

    actor, run_id = AwaitedActor(server.url), new_run_id()
    try:
        with pytest.raises(Crashed):
            actor(lambda client: client.run("flow", flow, run_id=run_id))
        actor(lambda client: client.run("flow", flow, run_id=run_id))
    finally:
        actor.close()
    assert len(api.detail(run_id)["usage"]) == 2


def test_a_session_numbers_and_counts_as_a_workflow_does(server: Any, api: Api) -> None:
    tide, run_id = Tidebase(server.url), new_run_id()
    for _ in range(2):
        session = tide.runs.attach("flow", run_id=run_id)
        assert [session.step("page", lambda n=n: n) for n in range(2)] == [0, 1]
        session.usage.record(input_tokens=5)
        session.state.set({"pages": 2})
        session.fail("crashed")
    tide.close()
    detail = api.detail(run_id)
    assert step_names(api, run_id) == ["page", "page#2"]
    assert len(detail["usage"]) == len(detail["stateVersions"]) == 1


KILLED = """
import os, signal, sys
from tidebase import Tidebase

tide = Tidebase(sys.argv[1])

@tide.workflow("crawl")
def crawl(run, input):
    pages = []
    for n in range(4):
        pages.append(run.step("page", lambda: n * 10))
        run.usage.record(model="m", input_tokens=1)
        run.state.set({"pages": len(pages)})
        if n == 2 and run.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return pages

tide.work(poll_s=0.2)
"""


def test_a_run_whose_worker_is_killed_in_its_loop_counts_once_what_it_wrote_between_steps(
    spawn_server: Callable[..., Any], tmp_path: Path
) -> None:
    server = spawn_server(TIDEBASE_LEASE_MS=1000)
    api = Api(server.url)
    (tmp_path / "tidebase.py").write_bytes((test_sdk.ROOT / "tidebase_sdk.py").read_bytes())
    (tmp_path / "worker.py").write_text(KILLED)
    run_id = api.enqueue(workflow="crawl")
    workers = [subprocess.Popen([sys.executable, "worker.py", server.url], cwd=tmp_path)]
    try:
        assert workers[0].wait(30) == -signal.SIGKILL
        assert (len(api.detail(run_id)["usage"]), api.detail(run_id)["state"]["value"]) == (3, {"pages": 3})
        workers.append(subprocess.Popen([sys.executable, "worker.py", server.url], cwd=tmp_path))
        eventually(lambda: api.run(run_id)["status"] == "completed", 30)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    detail = api.detail(run_id)
    assert detail["run"]["result"] == [0, 10, 20, 30]
    assert [version["value"]["pages"] for version in detail["stateVersions"]] == [1, 2, 3, 4]
    assert len(detail["usage"]) == 4


# ------------------------------------------------------------------------------
# Programs that a new user wrote, each of which went silently wrong.
# ------------------------------------------------------------------------------


class Crawler:
    """An object that changes between the calls of its method."""

    def __init__(self) -> None:
        self.url = ""
        self.fails = {"bad"}

    def fetch(self) -> str:
        if self.url in self.fails:
            raise OSError
        return f"page of {self.url}"


def test_after_a_caught_failure_a_method_of_an_object_that_changed_is_another_call(tide: Any, api: Api) -> None:
    crawler = Crawler()

    async def flow(run: Any) -> Any:
        pages: dict[str, Any] = {}
        for crawler.url in ("bad", "good", "fine"):
            try:
                pages[crawler.url] = await run.step("fetch", crawler.fetch)
            except OSError:
                pages[crawler.url] = None
        crawler.fails.clear()
        return pages

    first, second = replayed(tide, flow)
    assert first == {"bad": None, "good": "page of good", "fine": "page of fine"}
    assert second == {**first, "bad": "page of bad"}  # a failed step is executed again


def test_writes_of_tasks_side_by_side_do_not_take_each_others_place(api: Api, server: Any) -> None:
    fails = [True]

    async def branch(run: Any, name: str, other: asyncio.Event, mine: asyncio.Event) -> None:
        await run.step(name, functools.partial(asyncio.sleep, 0))
        if name == "b" and fails:
            await other.wait()
            fails.clear()
            raise Crashed
        await run.state.set({"of": name}, stream=name)
        await run.usage.record(provider="p", model=name, cost_usd=1)
        mine.set()

    async def flow(run: Any, input: Any) -> None:
        a, b = asyncio.Event(), asyncio.Event()
        await asyncio.gather(branch(run, "a", b, a), branch(run, "b", a, b))

    async def twice() -> str:
        run_id = new_run_id()
        async with tidebase_sdk.AsyncTidebase(server.url) as client:
            with pytest.raises(Crashed):
                await client.run("flow", flow, run_id=run_id)
            await client.run("flow", flow, run_id=run_id)
        return run_id

    detail = api.detail(asyncio.run(twice()))
    assert {stream["name"] for stream in detail["stateStreams"]} == {"a", "b"}
    assert sorted(entry["model"] for entry in detail["usage"]) == ["a", "b"]


def test_a_state_that_a_resume_would_write_otherwise_stays_and_the_log_says_so(
        tide: Any, caplog: pytest.LogCaptureFixture) -> None:
    executions: list[int] = []

    async def flow(run: Any) -> Any:
        executions.append(1)
        return (await run.state.set({"execution": len(executions)}))["state"]["value"]

    assert replayed(tide, flow) == [{"execution": 1}] * 2
    assert any("the state that is written after" in line and "another value" in line for line in warnings(caplog))


def test_a_gate_that_was_not_approved_is_false() -> None:
    decision = tidebase_sdk.GateDecision("gate_1", "deploy", "rejected", "rejected", "ada", {})
    assert not decision
    assert decision._replace(status="approved")


def test_a_failure_that_cannot_be_shown_is_recorded_all_the_same(tide: Any, api: Api) -> None:
    class Unshowable(Exception):
        def __str__(self) -> str:
            raise AttributeError("response")

    def fail() -> None:
        raise Unshowable

    async def flow(run: Any, input: Any) -> None:
        await run.step("ask", fail)

    run_id = new_run_id()
    with pytest.raises(Unshowable):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    detail = api.detail(run_id)
    assert (detail["run"]["status"], detail["run"]["error"]["name"]) == ("failed", "Unshowable")
    assert detail["steps"][0]["error"]["message"] == "<Unshowable cannot be shown: AttributeError>"
