"""Write-behind: steps return before their records are durable, what is durable is a prefix of what was executed, and
whatever leaves the run waits for all of it first.

Told on both clients, with the actors of test_sdk.py, through a relay that sees and holds back what a client sends; and
with worker processes (behind_worker.py) that are killed for real.
"""

from __future__ import annotations

import asyncio
import http.client
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_sdk
from conftest import LEASE_MS, ROOT, Api, Clock, eventually
from test_sdk import AwaitedActor, BlockingActor, DoneRun, completed_twice, in_background

import tidebase_sdk
from tidebase_sdk import (
    BodyTooLarge,
    LeaseLost,
    RunCancelled,
    StepInputMismatch,
    StepNeedsReview,
    Tidebase,
    TidebaseError,
    input_hash,
    new_run_id,
)

actor = test_sdk.actor  # a fixture
BEHIND_S = tidebase_sdk.BEHIND_S


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a second passes while a test holds records back: that bound must not be reached meanwhile."""
    monkeypatch.setattr(tidebase_sdk, "BEHIND_S", 60.0)


# ------------------------------------------------------------------------------
# A relay in front of the server, and a crew of worker processes.
# ------------------------------------------------------------------------------


class Write(NamedTuple):
    """Something that a request would change: the verb or the route, the name in it, and whether the server refuses it
    when it refuses an earlier write of the same run in the same request."""

    verb: str
    name: str | None
    chained: bool = False


class Sent:
    """A request of a client: what it asks, and once the server has answered, the status."""

    def __init__(self, method: str, path: str, data: bytes) -> None:
        self.method, self.path, self.data = method, path, data
        self.body: Any = json.loads(data) if data else None
        self.status: int | None = None
        self.is_over = False  # answered, or given up

    def writes(self) -> list[Write]:
        """What this request would change, in order."""
        if self.path == "/writes":
            return [Write(write["do"], write.get("name"), write.get("chained", False)) for write in self.body["writes"]]
        if self.method == "GET" or "heartbeat" in self.path:
            return []
        return [Write(self.path.rpartition("/")[2], (self.body or {}).get("name"))]

    def records(self) -> list[str]:
        """Names of the steps that this request records as ended."""
        return [str(write.name) for write in self.writes() if write.verb == "record_step"]


class Relay:
    """A real HTTP relay. `before` is called ahead of each request, which it may hold back."""

    def __init__(self, url: str) -> None:
        self.requests: list[Sent] = []
        self.before: Callable[[Sent], object] = lambda sent: None
        self.losing = 0  # so many of the next answers to requests that record steps are lost
        self.held = threading.Event()  # set once a request is held back by hold()
        self.free = threading.Event()
        relay, upstream = self, urllib.parse.urlsplit(url).netloc

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def pass_on(self) -> None:
                sent = Sent(self.command, self.path, self.rfile.read(int(self.headers.get("content-length") or 0)))
                relay.requests.append(sent)
                try:
                    relay.before(sent)
                    self.wfile.write(self.answer(sent))
                finally:
                    sent.is_over = True

            def answer(self, sent: Sent) -> bytes:
                headers = {name: value for name, value in self.headers.items()
                           if name.lower() not in ("host", "connection", "expect", "content-length")}
                connection = http.client.HTTPConnection(upstream, timeout=60)
                try:
                    connection.request(self.command, self.path, sent.data, headers)
                    response = connection.getresponse()
                    data = response.read()
                finally:
                    connection.close()
                if sent.records() and relay.losing:
                    relay.losing -= 1
                    raise ConnectionResetError("the answer is lost")
                sent.status = response.status
                fields = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items()
                                 if name.lower() not in ("connection", "content-length", "transfer-encoding"))
                head = f"HTTP/1.1 {response.status} {response.reason}\r\n{fields}content-length: {len(data)}\r\n\r\n"
                return head.encode("latin-1") + data

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exception(), OSError):  # else one side was killed, or hung up
                    super().handle_error(request, client_address)

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), name="relay")
        self.thread.start()

    def hold(self, lose: bool = False) -> None:
        """Hold back all requests that record steps until `free` is set; then pass them on, or lose them."""
        def before(sent: Sent) -> None:
            if sent.records():
                self.held.set()
                if not self.free.wait(15):
                    self.free.set()  # a client that waits for its records goes on, and the test finds it out
                if lose:
                    raise ConnectionResetError("the request is lost")

        self.before = before

    def records(self) -> list[list[str]]:
        """The names of the recorded steps, by request."""
        return [names for names in (sent.records() for sent in list(self.requests)) if names]

    def close(self) -> None:
        self.free.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def relay(server: Any) -> Iterator[Relay]:
    made = Relay(server.url)
    yield made
    made.close()


@pytest.fixture
def tide(relay: Relay, actor: Callable[..., Any]) -> Any:
    return actor(relay.url)


class Crew:
    """Worker processes, which a process that has imported the client already forks. See behind_worker.py."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        with journal.with_suffix(".log").open("wb") as log:
            self.process = subprocess.Popen([sys.executable, str(ROOT / "tests/behind_worker.py"), str(journal)],
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def _ask(self, **order: Any) -> int:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self.journal.with_suffix(".log").read_text()
        return int(answer)

    def start(self, url: str, kind: str, **options: Any) -> int:
        return self._ask(url=url, kind=kind, **options)

    def wait(self, worker: int) -> int:
        """:returns: the exit status."""
        return self._ask(wait=worker)

    def kill(self, worker: int) -> None:
        os.kill(worker, signal.SIGKILL)
        assert self.wait(worker) == -signal.SIGKILL

    def lines(self, *what: str, run: str | None = None) -> list[Any]:
        """The journal's lines of these kinds, in order, without one that is being written."""
        whole = self.journal.read_text().rpartition("\n")[0] if self.journal.exists() else ""
        lines = map(json.loads, whole.splitlines())
        return [line for line in lines if line["what"] in what and line["run"] == (run or line["run"])]

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    made = Crew(tmp_path / "journal")
    yield made
    made.close()


def run(tide: Any, flow: Callable[..., Any], **options: Any) -> Any:
    return tide(lambda client: client.run("flow", tide.workflow(flow), **{"write_behind": True, **options}))


async def until(tide: Any, question: Callable[[], Any]) -> None:
    """Wait within a workflow; the tasks that share the event loop go on."""
    if isinstance(tide, AwaitedActor):
        await asyncio.to_thread(eventually, question)
    else:
        eventually(question)


def durable(api: Api, run_id: str) -> list[str]:
    """Names of the completed steps, in the order in which they completed."""
    return [event["payload"]["name"] for event in api.events(run_id) if event["type"] == "step.completed"]


def outputs(api: Api, run_id: str) -> dict[str, Any]:
    return {step["name"]: step["output"] for step in api.detail(run_id)["steps"] if step["status"] == "completed"}


# ------------------------------------------------------------------------------
# On and off.
# ------------------------------------------------------------------------------

WAYS = ["run", "work", "attach"]


def perform(tide: Any, api: Api, way: str, flow: Callable[..., Any], **options: Any) -> str:
    """Execute a workflow in one of the ways that there are.  :returns: the run's id."""
    if way == "work":
        run_id, errors = api.enqueue(workflow="flow"), []
        tide.client.workflow("flow", tide.workflow(flow))
        options = {"poll_s": 0.2, "on_error": lambda error, run: errors.append(error), **options}
        tide(lambda client: client.work(stop=lambda: api.run(run_id)["status"] in ("completed", "failed"), **options))
        assert errors == []
        return run_id
    if way == "attach":
        return in_session(tide, flow, **options)
    run_id = new_run_id()
    tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id, **options))
    return run_id


def in_session(tide: Any, flow: Callable[..., Any], complete: bool = True, **options: Any) -> str:
    """Attach to a run, call flow(session, None) and complete the run, unless the flow ends it.  :returns: its id."""
    async def story(client: Any, input: Any) -> str:
        session = await client.runs.attach("flow", **options)
        session = DoneRun(session) if isinstance(tide, BlockingActor) else session
        await flow(session, None)
        if complete:
            await session.complete()
        return session.run_id

    return tide(lambda client: tide.workflow(story)(client, None))


@pytest.mark.parametrize("way", WAYS)
def test_what_a_step_returns_is_durable_when_it_returns_unless_write_behind_is_asked_for(
    tide: Any, api: Api, relay: Relay, way: str
) -> None:
    relay.before = lambda sent: sent.records() and time.sleep(0.02)  # a server that is not next door

    async def flow(run: Any, input: Any) -> None:
        for number in range(3):
            await run.step(f"step {number}", lambda: number)  # noqa: B023
            assert outputs(api, run.run_id) == {f"step {n}": n for n in range(number + 1)}
        await run.flush()  # there is nothing to wait for

    assert api.run(perform(tide, api, way, flow))["status"] == "completed"


@pytest.mark.parametrize("way", WAYS)
def test_with_write_behind_steps_return_while_their_records_are_on_their_way_and_go_together(
    tide: Any, api: Api, relay: Relay, way: str
) -> None:
    relay.hold()

    async def flow(run: Any, input: Any) -> None:
        await run.step("first", lambda: 1)
        await until(tide, relay.held.is_set)  # it is sent at once, not when there is more
        assert [await run.step(f"step {number}", lambda: (number,)) for number in range(10)] == [  # noqa: B023
            [number] for number in range(10)]
        assert outputs(api, run.run_id) == {}
        relay.free.set()
        await run.flush()
        assert outputs(api, run.run_id) == {"first": 1} | {f"step {n}": [n] for n in range(10)}

    run_id = perform(tide, api, way, flow, write_behind=True)
    assert durable(api, run_id) == ["first", *(f"step {number}" for number in range(10))]
    assert [len(names) for names in relay.records()] == [1, 10]
    assert api.run(run_id)["status"] == "completed"


def first_only(before: Callable[[Sent], object], relay: Relay) -> Callable[[Sent], object]:
    return lambda sent: None if relay.held.is_set() else before(sent)


@pytest.mark.parametrize("way", WAYS)
def test_records_that_are_lost_or_whose_answers_are_lost_are_sent_again_and_nothing_is_executed_or_recorded_twice(
    tide: Any, api: Api, relay: Relay, way: str
) -> None:
    relay.losing = 2
    relay.free.set()
    relay.hold(lose=True)  # the first one does not arrive
    relay.before = first_only(relay.before, relay)
    executed: Counter[int] = Counter()

    async def flow(run: Any, input: Any) -> None:
        for number in range(10):
            await run.step(f"step {number}", lambda: executed.update([number]))  # noqa: B023

    run_id = perform(tide, api, way, flow, write_behind=True)
    assert relay.losing == 0
    assert relay.held.is_set()
    assert executed == dict.fromkeys(range(10), 1)
    assert durable(api, run_id) == [f"step {number}" for number in range(10)]
    assert api.run(run_id)["status"] == "completed"


# ------------------------------------------------------------------------------
# Barriers: what leaves the run waits until all before it is durable.
# ------------------------------------------------------------------------------

PLAIN = ["plain 0", "plain 1", "plain 2"]


async def kid(run: Any, input: Any) -> str:
    return "done"


async def send_and_wait_for_signal(run: Any, api: Api) -> None:
    api.post(f"/runs/{run.run_id}/signals", {"name": "paid"})["signal"]
    await run.wait_for_signal("paid")


async def wait_at_gate(run: Any, api: Api) -> None:
    def approve() -> None:
        [gate] = eventually(lambda: api.detail(run.run_id)["gates"])
        answer = {"token": gate["resolveToken"], "decision": "approved"}
        api.post(f"/runs/{run.run_id}/gates/{gate['id']}/resolve", answer)["gate"]

    person = in_background(approve)
    await run.gate("gate", "Well?")
    person()


async def wait_for_queued_child(run: Any, tide: Any, api: Api) -> None:
    def work() -> None:
        [claimed] = eventually(lambda: api.claim("elsewhere", owner="other"))
        api.complete(claimed["id"], leaseOwner="other")["run"]

    worker = in_background(work)
    await run.child("kid", queue="elsewhere")
    worker()


async def divide(run: Any) -> None:
    raise ZeroDivisionError


def fanned(tide: Any) -> list[Any]:
    return [{"name": f"kid {number}", "workflow": tide.workflow(kid)} for number in range(2)]


# What a run does after its plain steps; the ends of a run, and those of a session.
BARRIERS: dict[str, Callable[[Any, Any, Api], Any]] = {
    "gate": lambda run, tide, api: wait_at_gate(run, api),
    "gates.begin": lambda run, tide, api: run.gates.begin("gate", "Well?"),
    "sleep": lambda run, tide, api: run.sleep(0.01),
    "signal": lambda run, tide, api: send_and_wait_for_signal(run, api),
    "child": lambda run, tide, api: run.child("kid", tide.workflow(kid)),
    "queued child": wait_for_queued_child,
    "fanout": lambda run, tide, api: run.fanout("kids", fanned(tide)),
    "state.set": lambda run, tide, api: run.state.set({"phase": 1}),
    "state.patch": lambda run, tide, api: run.state.patch({"phase": 1}),
    "state.save": lambda run, tide, api: run.state.save("begun"),
    "snapshot": lambda run, tide, api: run.snapshots.create("begun", {"files": []}),
    "usage": lambda run, tide, api: run.usage.record(model="m", input_tokens=1),
    "effect with a key": lambda run, tide, api: run.step("pay", int, side_effects=["payment"], idempotency_key="k"),
    "effect without": lambda run, tide, api: run.step("pay", int, side_effects=["payment"]),
    "step that is never replayed": lambda run, tide, api: run.step("pay", int, replay="never"),
}
ENDS: dict[str, Callable[[Any, Any, Api], Any]] = {
    "session.complete": lambda run, tide, api: run.complete(1),
    "session.fail": lambda run, tide, api: run.fail("no such page"),
    "session.close": lambda run, tide, api: run.close(),
}
RUN_ENDS: dict[str, Callable[[Any, Any, Api], Any]] = {
    "complete": lambda run, tide, api: kid(run, None),
    "fail": lambda run, tide, api: divide(run),
}


@pytest.mark.parametrize("barrier", [*BARRIERS, *ENDS, *RUN_ENDS])
def test_when_a_barrier_reaches_the_server_all_that_was_executed_before_it_is_durable(
    tide: Any, api: Api, relay: Relay, barrier: str
) -> None:
    run_id, called, came = new_run_id(), threading.Event(), threading.Event()
    found: list[list[str]] = []  # what was durable when a request came that is not of the plain steps

    def before(sent: Sent) -> None:
        writes = sent.writes()
        own = next((n for n, write in enumerate(writes) if write.name not in PLAIN), None)
        if called.is_set() and own is not None:
            ahead = [str(write.name) for write in writes[:own] if writes[own].chained]  # come along, and decide for it
            found.append(durable(api, run_id) + ahead)
            came.set()
        elif sent.records():
            assert called.wait(15)
            came.wait(0.04)  # a barrier that does not wait comes meanwhile

    async def flow(run: Any, input: Any) -> None:
        await run.state.set({"phase": 0})
        for name in PLAIN:
            await run.step(name, lambda: 1)
        called.set()
        await {**BARRIERS, **ENDS, **RUN_ENDS}[barrier](run, tide, api)

    relay.before = before
    if barrier in RUN_ENDS:
        with suppress(ZeroDivisionError):
            run(tide, flow, run_id=run_id)
    else:
        in_session(tide, flow, complete=barrier not in ENDS, run_id=run_id, write_behind=True)
    assert found[0] == PLAIN


def test_a_child_that_is_executed_here_is_completed_with_all_its_steps_when_the_call_returns(
    tide: Any, api: Api, relay: Relay
) -> None:
    relay.before = lambda sent: sent.records() and time.sleep(0.02)
    children: list[str] = []

    async def steps(run: Any, input: Any) -> int:
        children.append(run.run_id)
        return sum([await run.step(name, lambda: 1) for name in PLAIN])

    async def flow(run: Any, input: Any) -> None:
        await run.step("first", lambda: 1)
        assert await run.child("kid", tide.workflow(steps)) == 3
        assert durable(api, children[0]) == PLAIN
        assert api.run(children[0])["status"] == "completed"

    run(tide, flow)


def test_a_run_whose_task_is_cancelled_is_given_back_with_all_that_was_executed(
    relay: Relay, api: Api
) -> None:
    relay.hold()
    run_id, ahead = new_run_id(), threading.Event()

    async def story() -> None:
        async def flow(run: Any) -> None:
            for name in PLAIN:
                await run.step(name, lambda: 1)
            ahead.set()
            await asyncio.sleep(60)

        async with tidebase_sdk.AsyncTidebase(relay.url) as tide:
            task = asyncio.ensure_future(tide.run("flow", flow, run_id=run_id, write_behind=True))
            await asyncio.to_thread(eventually, lambda: relay.held.is_set() and ahead.is_set())
            task.cancel()
            await asyncio.sleep(0.05)  # a release that does not wait arrives meanwhile
            assert [sent for sent in relay.requests if sent.path.endswith("/release")] == []
            relay.free.set()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(story())
    assert durable(api, run_id) == PLAIN
    assert api.run(run_id)["status"] == "pending"


def test_cancelling_the_tasks_that_send_loses_and_repeats_nothing(relay: Relay, api: Api) -> None:
    """As a supervisor does that cancels all tasks but those which it knows."""
    relay.hold()
    run_id, executed = new_run_id(), Counter[str]()

    async def story() -> None:
        async def flow(run: Any) -> str:
            await asyncio.gather(*(run.step(name, lambda name=name: executed.update([name])) for name in PLAIN))
            return "done"

        async with tidebase_sdk.AsyncTidebase(relay.url) as tide:
            mine = asyncio.ensure_future(tide.run("flow", flow, run_id=run_id, write_behind=True))
            await asyncio.to_thread(eventually, relay.held.is_set)
            senders = asyncio.all_tasks() - {asyncio.current_task(), mine}
            senders = {task for task in senders if "_AsyncDriver.drive" in repr(task)}
            assert senders
            for task in senders:
                task.cancel()
            await asyncio.wait(senders)
            relay.free.set()
            assert await asyncio.wait_for(mine, 20) == "done"

    asyncio.run(story())
    assert sorted(durable(api, run_id)) == PLAIN
    assert executed == dict.fromkeys(PLAIN, 1)
    assert completed_twice(api, run_id) == []


@pytest.mark.parametrize("write_behind", [False, True])
def test_a_task_group_that_is_cancelled_while_its_writes_are_under_way_loses_and_repeats_nothing(
    relay: Relay, api: Api, write_behind: bool
) -> None:
    relay.hold()
    run_id, executed = new_run_id(), Counter[str]()

    async def story() -> str:
        async def flow(run: Any) -> str:
            async def one(name: str) -> None:
                executed[name] += 1

            try:
                async with asyncio.TaskGroup() as group:
                    for name in PLAIN:
                        group.create_task(run.step(name, lambda name=name: one(name)))
                    await asyncio.to_thread(eventually, lambda: relay.held.is_set() and executed.total() == 3)
                    raise KeyError("the group is cancelled")
            except* KeyError:
                relay.free.set()
            return str(await run.step("last", lambda: "done"))

        async with tidebase_sdk.AsyncTidebase(relay.url) as tide:
            return await asyncio.wait_for(tide.run("flow", flow, run_id=run_id, write_behind=write_behind), 20)

    assert asyncio.run(story()) == "done"
    assert sorted(durable(api, run_id)) == ["last", *PLAIN]
    assert executed == dict.fromkeys(PLAIN, 1)
    assert completed_twice(api, run_id) == []


def test_when_the_function_of_an_effect_runs_all_before_it_is_durable_with_the_values_it_was_given(
    tide: Any, api: Api, relay: Relay
) -> None:
    relay.before = lambda sent: sent.records() and time.sleep(0.02)
    seen: list[Any] = []

    async def flow(run: Any, input: Any) -> None:
        given: dict[str, str] = {}
        for number in range(9):
            if number % 3 < 2:
                given[f"key {number}"] = await run.step(f"key {number}", lambda: new_run_id())
            else:
                pay = f"pay {number}"
                given[pay] = await run.step(pay, lambda: seen.append((outputs(api, run.run_id), {**given})) or "paid",
                                            side_effects=["payment"], idempotency_key=given[f"key {number - 1}"])

    run(tide, flow)
    assert len(seen) == 3
    assert all(recorded == given for recorded, given in seen)


# ------------------------------------------------------------------------------
# Refusals: they surface at the next boundary, and nothing after them is recorded.
# ------------------------------------------------------------------------------


def take_over(api: Api, clock: Clock, run_id: str) -> None:
    clock.advance(ms=LEASE_MS + 1)
    api.reconcile()
    api.begin(run_id, "somebody else")["run"]


def cancel(api: Api, clock: Clock, run_id: str) -> None:
    api.post(f"/runs/{run_id}/cancel")["run"]


def begin_with_another_input(api: Api, clock: Clock, run_id: str) -> None:
    owner = api.run(run_id)["leaseOwner"]
    api.begin_step(run_id, "step 2", owner, hash="another")["step"]


def leave_for_review(api: Api, clock: Clock, run_id: str, name: str = "step 2") -> None:
    owner = api.run(run_id)["leaseOwner"]
    step = api.begin_step(run_id, name, owner, hash=input_hash(None))["step"]["id"]
    api.fail_step(run_id, step, owner, resumeDecision="manual_review")["step"]


# What happens while four records are on their way, what the client raises, and which of the four are recorded.
REFUSALS: dict[str, tuple[Callable[..., None], type[TidebaseError], list[str]]] = {
    "lease lost": (take_over, LeaseLost, []),
    "cancelled": (cancel, RunCancelled, []),
    "input mismatch": (begin_with_another_input, StepInputMismatch, ["step 0", "step 1"]),
    "needs review": (leave_for_review, StepNeedsReview, ["step 0", "step 1"]),
}


async def more_steps(run: Any, effects: list[str]) -> None:
    for number in range(200):  # it is refused long before, since so many cannot be behind
        await run.step(f"more {number}", lambda: 1)


async def pay(run: Any, effects: list[str]) -> None:
    await run.step("pay", lambda: effects.append("paid"), side_effects=["payment"], idempotency_key="k")


BOUNDARIES: dict[str, Callable[[Any, list[str]], Any]] = {
    "next steps": more_steps,
    "effect": pay,
    "flush": lambda run, effects: run.flush(),
    "state": lambda run, effects: run.state.set({"phase": 2}),
    "end": kid,
}


@pytest.mark.parametrize(("case", "boundary"), [
    (case, boundary) for case in REFUSALS for boundary in BOUNDARIES
    if case == "input mismatch" or boundary in ("next steps", "end")])
def test_a_refused_record_surfaces_at_the_next_boundary_and_nothing_after_it_is_recorded(
    tide: Any, api: Api, relay: Relay, clock: Clock, case: str, boundary: str
) -> None:
    interfere, error, kept = REFUSALS[case]
    run_id, ahead = new_run_id(), threading.Event()
    effects: list[str] = []
    relay.hold()

    async def flow(run: Any, input: Any) -> str:
        for number in range(4):
            await run.step(f"step {number}", lambda: number)  # noqa: B023
        ahead.set()
        await BOUNDARIES[boundary](run, effects)
        return "done"

    outcome = in_background(lambda: run(tide, flow, run_id=run_id))
    assert ahead.wait(15)
    eventually(relay.held.is_set)
    interfere(api, clock, run_id)
    relay.free.set()
    with pytest.raises(error):
        outcome()
    assert durable(api, run_id) == kept
    assert effects == []
    detail = api.detail(run_id)
    assert detail["run"]["status"] == {"lease lost": "running", "cancelled": "cancelled"}.get(case, "failed")
    assert {step["name"] for step in detail["steps"]} <= {*kept, "step 2"}
    assert detail["state"] is None


def test_a_refusal_that_the_workflow_catches_is_raised_again_at_each_boundary_and_at_the_end(
    tide: Any, api: Api, relay: Relay, clock: Clock
) -> None:
    run_id, ahead = new_run_id(), threading.Event()
    relay.hold()

    async def flow(run: Any, input: Any) -> str:
        for number in range(4):
            await run.step(f"step {number}", lambda: number)  # noqa: B023
        ahead.set()
        for boundary in (run.flush, run.flush, lambda: run.step("later", int), lambda: run.state.set({"phase": 2}),
                         lambda: run.step("pay", int, side_effects=["payment"], idempotency_key="k")):
            with pytest.raises(StepInputMismatch):
                await boundary()
        return "done"

    outcome = in_background(lambda: run(tide, flow, run_id=run_id))
    assert ahead.wait(15)
    begin_with_another_input(api, clock, run_id)
    relay.free.set()
    with pytest.raises(StepInputMismatch):
        outcome()
    assert durable(api, run_id) == ["step 0", "step 1"]
    assert api.run(run_id)["status"] == "failed"
    assert api.run(run_id)["error"]["name"] == "StepInputMismatch"


def test_a_run_whose_record_was_refused_does_not_leave_its_worker_to_wait(
    relay: Relay, api: Api, clock: Clock
) -> None:
    relay.hold()
    run_id = api.enqueue(workflow="flow", maxAttempts=1)

    async def story() -> None:
        async def flow(run: Any) -> None:
            async def step() -> None:
                await asyncio.to_thread(eventually, lambda: api.detail(run_id)["gates"])
                await run.step("step 2", lambda: 1)

            await asyncio.gather(run.gate("gate", "Well?", hold_s=0.2), step())

        def interfere() -> None:
            eventually(relay.held.is_set)
            begin_with_another_input(api, clock, run_id)
            time.sleep(0.3)  # meanwhile the run is about to leave
            relay.free.set()

        over = in_background(interfere)
        async with tidebase_sdk.AsyncTidebase(relay.url) as tide:
            tide.workflow("flow", flow)
            await tide.work(stop=lambda: api.run(run_id)["status"] not in ("queued", "running"), poll_s=0.2,
                            write_behind=True)
        over()

    asyncio.run(story())
    assert api.run(run_id)["status"] == "failed"
    assert api.run(run_id)["error"]["name"] == "StepInputMismatch"


def test_a_refusal_that_a_call_raises_does_not_take_the_records_of_other_tasks_along(
    relay: Relay, api: Api, clock: Clock
) -> None:
    relay.hold()
    run_id = new_run_id()

    async def story() -> None:
        async def flow(run: Any) -> str:
            async def pay() -> None:
                with pytest.raises(StepNeedsReview):
                    await run.step("pay", int, side_effects=["payment"])

            async def other() -> None:
                for name in PLAIN:
                    await run.step(name, lambda: 1)
                await asyncio.sleep(0.05)  # so that they go in one request with the begin that is refused
                relay.free.set()

            leave_for_review(api, clock, run_id, "pay")
            await run.step("first", lambda: 1)
            await asyncio.to_thread(eventually, relay.held.is_set)
            await asyncio.gather(pay(), other())
            return "done"

        async with tidebase_sdk.AsyncTidebase(relay.url) as tide:
            assert await tide.run("flow", flow, run_id=run_id, write_behind=True) == "done"

    asyncio.run(story())
    assert durable(api, run_id) == ["first", *PLAIN]


@pytest.mark.parametrize("bad", ["name", "output"])
def test_a_record_that_makes_its_request_malformed_is_refused_and_only_what_came_before_it_is_recorded(
    actor: Callable[..., Any], start_server: Callable[..., Any], bad: str
) -> None:
    server = start_server(TIDEBASE_MAX_BODY=20_000)
    relay, api, run_id = Relay(server.url), Api(server.url), new_run_id()
    tide = actor(relay.url)
    relay.hold()

    async def flow(run: Any, input: Any) -> None:
        await run.step("first", lambda: 1)
        await until(tide, relay.held.is_set)
        for name in ("second", "third"):
            await run.step(name, lambda: 1)
        await run.step("bad\0" if bad == "name" else "bad", lambda: "x" * (30_000 if bad == "output" else 1))
        for name in ("fifth", "sixth"):
            await run.step(name, lambda: 1)
        relay.free.set()
        await run.flush()

    try:
        with pytest.raises(TidebaseError) as refused:
            run(tide, flow, run_id=run_id)
    finally:
        relay.close()
    assert refused.value.status == (400 if bad == "name" else 413)
    assert isinstance(refused.value, BodyTooLarge) == (bad == "output")
    assert durable(api, run_id) == ["first", "second", "third"]
    assert api.run(run_id)["status"] == "failed"


# ------------------------------------------------------------------------------
# Bounds: so much may be behind, then the next step waits.
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "steps", "most"), [("x", 100, range(64, 65)), ("x" * 300_000, 8, range(3, 5)),
                                                       ("x" * 1_100_000, 3, range(1, 2))],
                         ids=["64 records", "1 MiB", "more at once"])
def test_when_so_much_is_behind_the_next_step_waits_and_then_all_is_durable_in_order(
    tide: Any, api: Api, relay: Relay, output: str, steps: int, most: range
) -> None:
    relay.hold()
    returned: list[str] = []
    behind: list[int] = []

    async def flow(run: Any, input: Any) -> int:
        for number in range(steps):
            await run.step(f"step {number}", lambda: output)
            returned.append(f"step {number}")
            answered = sum(len(sent.records()) for sent in list(relay.requests) if sent.status == 200)
            behind.append(len(returned) - answered)
        return len(returned)

    run_id = new_run_id()
    outcome = in_background(lambda: run(tide, flow, run_id=run_id))
    eventually(lambda: len(returned) >= most[0] and relay.held.is_set())
    time.sleep(0.05)  # one that does not wait returns meanwhile
    assert len(returned) in most
    relay.free.set()
    assert outcome() == steps
    assert max(behind) in most
    assert durable(api, run_id) == returned == [f"step {number}" for number in range(steps)]


@pytest.mark.parametrize(("size", "most"), [(1, 64), (30_000, 34)], ids=["64 records", "1 MiB"])
def test_steps_side_by_side_keep_the_bounds_together(
    tide: Any, api: Api, relay: Relay, monkeypatch: pytest.MonkeyPatch, size: int, most: int
) -> None:
    """Threads or tasks of one run, each of which executes a step while all the others do."""
    monkeypatch.setattr(tidebase_sdk, "SLOW_STEP_S", 60.0)  # a step that is announced waits for the answer to that
    relay.hold()
    run_id, together = new_run_id(), threading.Barrier(100)
    returned: list[int] = []

    def act() -> str:
        together.wait(20)
        return "x" * size

    async def flow(run: Any, input: Any) -> None:
        async def one(number: int) -> None:
            await run.step(f"step {number}", act)
            returned.append(number)

        if isinstance(tide, AwaitedActor):
            await asyncio.gather(*map(one, range(100)))
        else:
            over = [in_background(lambda number=number: one(number).send(None)) for number in range(100)]
            for wait in over:
                with suppress(StopIteration):
                    wait()

    outcome = in_background(lambda: run(tide, flow, run_id=run_id))
    eventually(lambda: len(returned) >= most and relay.held.is_set())
    time.sleep(0.05)  # one that does not wait returns meanwhile
    assert len(returned) == most
    relay.free.set()
    outcome()
    assert len(returned) == len(durable(api, run_id)) == 100


def test_when_a_record_has_been_behind_for_so_long_the_next_step_waits_for_it(
    tide: Any, api: Api, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BEHIND_S == 1.0
    monkeypatch.setattr(tidebase_sdk, "BEHIND_S", 0.05)
    relay.hold()
    late = threading.Event()

    async def flow(run: Any, input: Any) -> None:
        await run.step("first", lambda: 1)
        began = time.monotonic()
        await until(tide, lambda: relay.held.is_set() and time.monotonic() - began > 0.06)
        late.set()
        await run.step("second", lambda: 2)
        assert outputs(api, run.run_id)["first"] == 1

    outcome = in_background(lambda: run(tide, flow))
    assert late.wait(15)
    time.sleep(0.05)  # a step that does not wait returns meanwhile
    relay.free.set()
    outcome()


# ------------------------------------------------------------------------------
# Programs as they are written.
# ------------------------------------------------------------------------------


class Crashed(Exception):
    """Ends the first execution, which is then made once more."""


@pytest.mark.parametrize("write_behind", [False, True])
def test_a_program_with_loops_failures_and_helpers_is_recorded_and_replayed_in_either_mode(
    tide: Any, api: Api, write_behind: bool
) -> None:
    executed: Counter[str] = Counter()

    def does(name: str, value: Any) -> Callable[[], Any]:
        return lambda: executed.update([name]) or value

    def flaky() -> str:
        executed["flaky"] += 1
        if executed["flaky"] == 1:
            raise ValueError("at first")
        return "well"

    def hopeless() -> None:
        executed["hopeless"] += 1
        raise KeyError("never")

    async def flow(run: Any, input: Any) -> Any:
        async def summary(page: Any) -> Any:
            words = await run.step(f"words of {page['n']}", does(f"words of {page['n']}", (page["n"], "w")))
            return await run.step("joined", does("joined", {"words": words}), input=page)

        pages = [await run.step("page", does("page", {"n": number})) for number in range(4)]
        summaries = [await summary(page) for page in pages]
        try:
            kept = await run.step("flaky", flaky)
        except ValueError:
            kept = await run.step("flaky", flaky)  # the same step, tried once more
        try:
            await run.step("hopeless", hopeless)
        except KeyError:
            kept += await run.step("instead", does("instead", "!"))
        await run.state.set({"pages": len(pages)})
        if run.attempt == 1:
            await run.step("last", does("last", 1))
            raise Crashed
        return [pages, summaries, kept, await run.step("last", does("last", 1))]

    run_id = new_run_id()
    with pytest.raises(Crashed):
        run(tide, flow, run_id=run_id, write_behind=write_behind)
    numbers = range(4)
    assert run(tide, flow, run_id=run_id, write_behind=write_behind) == [
        [{"n": n} for n in numbers], [{"words": [n, "w"]} for n in numbers], "well!", 1]
    assert executed == {"page": 4, "joined": 4, **{f"words of {n}": 1 for n in numbers}, "flaky": 2, "hopeless": 2,
                        "instead": 1, "last": 1}
    assert completed_twice(api, run_id) == []
    order = ["page", "page#2", "page#3", "page#4"]
    order += [name for n in numbers for name in (f"words of {n}", f"joined#{n + 1}" if n else "joined")]
    assert durable(api, run_id) == [*order, "flaky", "instead", "last"]
    assert [version["value"] for version in api.detail(run_id)["stateVersions"]] == [{"pages": 4}]


def test_gathered_steps_are_recorded_in_the_order_in_which_they_ended_and_a_nested_one_before_its_step(
    server: Any, api: Api
) -> None:
    run_id = new_run_id()

    async def story() -> None:
        ended: list[str] = []

        async def flow(run: Any) -> Any:
            async def one(number: int) -> str:
                await asyncio.sleep(0.001 * (number % 3))
                inner = await run.step("inner", lambda: number)
                ended.append(f"outer {number}")
                return f"{number}{inner}"

            first = await asyncio.gather(*(run.step(f"outer {n}", lambda n=n: one(n)) for n in range(6)))
            return [*first, await run.step("last", lambda: len(ended))]

        async with tidebase_sdk.AsyncTidebase(server.url) as tide:
            result = await tide.run("flow", flow, run_id=run_id, write_behind=True)
        assert result == ["00", "11", "22", "33", "44", "55", 6]
        names = durable(api, run_id)
        assert [name for name in names if name.startswith("outer") and "/" not in name] == ended
        assert names[-1] == "last"
        for number in range(6):
            assert names.index(f"outer {number}/inner") < names.index(f"outer {number}")

    asyncio.run(story())


def test_steps_of_threads_that_a_workflow_starts_get_each_its_own_output_and_all_are_durable_at_the_end(
    server: Any, api: Api
) -> None:
    outputs_of: dict[int, list[Any]] = {}

    def flow(run: Any) -> None:
        def one(number: int) -> None:
            outputs_of[number] = [run.step(f"step {number}.{n}", lambda n=n: [number, n]) for n in range(10)]

        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run_id = new_run_id()
    with Tidebase(server.url) as tide:
        tide.run("flow", flow, run_id=run_id, write_behind=True)
    assert outputs_of == {number: [[number, n] for n in range(10)] for number in range(8)}
    names = durable(api, run_id)
    assert len(names) == 80
    for number in range(8):
        assert [name for name in names if name.startswith(f"step {number}.")] == [f"step {number}.{n}"
                                                                                 for n in range(10)]


# ------------------------------------------------------------------------------
# Kills: of workers, of the server, and a worker that is told to stop.
# ------------------------------------------------------------------------------

KINDS = ["blocking", "awaited"]


def requeue(api: Api, clock: Clock, relay: Relay) -> None:
    """Have the leases of a worker that is dead end, once all that it has sent has been worked on."""
    eventually(lambda: all(sent.is_over for sent in list(relay.requests)))
    clock.advance(ms=LEASE_MS + 1)
    api.reconcile()


def assert_prefix(api: Api, crew: Crew, run_id: str, names: list[str]) -> int:
    """Assert that what is durable of each attempt are the first of the steps that it executed, with their values, and
    that it executed just what was not durable before.  :returns: how many executions were lost."""
    detail = api.detail(run_id)
    values = {step["name"]: step["output"] for step in detail["steps"] if step["status"] == "completed"}
    recorded: list[list[str]] = []
    for event in detail["events"]:
        if event["type"] == "run.claimed":
            recorded.append([])
        elif event["type"] == "step.completed":
            recorded[-1].append(event["payload"]["name"])
    executed: list[list[tuple[str, str]]] = [[] for _ in recorded]
    for line in crew.lines("step", "effect", run=run_id):
        effect = line["what"] == "effect"
        executed[line["attempt"] - 1].append(
            (f"pay {line['number']}", f"paid with {line['key']}") if effect else (line["name"], line["value"]))
    done = 0
    for kept, all_of_it in zip(recorded, executed, strict=True):
        assert [name for name, _ in all_of_it] == names[done:done + len(all_of_it)]
        assert [(name, values[name]) for name in kept] == all_of_it[:len(kept)]
        done += len(kept)
    return sum(map(len, executed)) - done


def test_under_random_kills_what_is_durable_is_a_prefix_of_what_was_executed_and_no_effect_happens_twice(
    api: Api, relay: Relay, clock: Clock, crew: Crew, sql: Callable[..., Any]
) -> None:
    seed = int(os.environ.get("SEED", random.randrange(10**9)))
    print(f"SEED={seed}")
    chance = random.Random(seed)
    delays = [chance.uniform(0, 0.04) for _ in range(1000)]
    names = [f"{'pay' if number in (4, 8) else 'make'} {number}" for number in range(10)]
    work = {"steps": 10, "effects": [4, 8], "seconds": 0.001}
    runs = [api.enqueue(workflow="storm", input=work, maxAttempts=1000) for _ in range(12)]
    relay.hold(lose=True)  # of the first worker nothing arrives
    goal, kills = 4, 0

    def are_completed() -> bool:
        return sql("select count(*) from tidebase.runs where status = 'completed'") == [(len(runs),)]

    while not are_completed():
        worker = crew.start(relay.url, chance.choice(KINDS), concurrency=chance.choice([1, 2, 4]))
        eventually(lambda goal=goal: len(crew.lines("step", "effect")) >= goal or are_completed())
        held = [run_id for run_id in runs if api.run(run_id)["status"] == "running"]
        crew.kill(worker)
        kills += 1
        relay.free.set()
        requeue(api, clock, relay)
        for run_id in held:
            assert_prefix(api, crew, run_id, names)
        relay.before = lambda sent: sent.records() and time.sleep(delays[len(relay.requests) % len(delays)])
        goal = len(crew.lines("step", "effect")) + chance.randint(1, 25)
    assert kills > 3, "all was over before it began"
    lost = [assert_prefix(api, crew, run_id, names) for run_id in runs]
    assert sum(lost) >= 4, "nothing was behind"
    for run_id in runs:
        assert list(outputs(api, run_id).values()) == api.run(run_id)["result"]
        assert completed_twice(api, run_id) == []
        keys: dict[int, set[str]] = {4: set(), 8: set()}
        for line in crew.lines("effect", run=run_id):
            assert line["recorded"] == line["values"]
            keys[line["number"]].add(line["key"])
        assert [len(of_it) for of_it in keys.values()] == [1, 1]  # paid again with another key it would be paid twice


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_kill_within_an_effect_the_resumed_run_has_the_same_key(
    api: Api, relay: Relay, clock: Clock, crew: Crew, kind: str
) -> None:
    relay.before = lambda sent: sent.records() and time.sleep(0.02)
    run_id = api.enqueue(workflow="storm", input={"steps": 8, "effects": [5], "dies": True})
    assert crew.wait(crew.start(relay.url, kind)) == -signal.SIGKILL
    assert durable(api, run_id) == [f"make {number}" for number in range(5)]
    requeue(api, clock, relay)
    worker = crew.start(relay.url, KINDS[kind == KINDS[0]])
    eventually(lambda: api.run(run_id)["status"] == "completed")
    crew.kill(worker)
    first, second = crew.lines("effect", run=run_id)
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert first["recorded"] == first["values"] == second["values"] == second["recorded"]
    assert first["key"] == second["key"]
    assert Counter(line["name"] for line in crew.lines("step")) == {f"make {n}": 1 for n in (0, 1, 2, 3, 4, 6, 7)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_is_told_to_stop_loses_nothing_and_the_next_one_repeats_nothing(
    api: Api, relay: Relay, crew: Crew, kind: str
) -> None:
    relay.before = lambda sent: sent.records() and time.sleep(0.01)
    runs = [api.enqueue(workflow="storm", input={"steps": 5000, "seconds": 0.001}) for _ in range(2)]
    worker = crew.start(relay.url, kind, concurrency=2)
    eventually(lambda: all(len(crew.lines("returned", run=run_id)) > 20 for run_id in runs))
    os.kill(worker, signal.SIGTERM)
    assert crew.wait(worker) == 0
    for run_id in runs:
        returned = {f"make {line['number']}": line["value"] for line in crew.lines("returned", run=run_id)}
        assert outputs(api, run_id) == returned
        assert (api.run(run_id)["status"], api.run(run_id)["attempt"]) == ("queued", 0)
    before = len(crew.lines("step"))
    worker = crew.start(relay.url, kind, concurrency=2)
    eventually(lambda: len(crew.lines("step")) > before + 20)
    crew.kill(worker)
    assert {*Counter((line["run"], line["name"]) for line in crew.lines("step")).values()} == {1}


def test_while_the_server_is_killed_and_started_again_nothing_is_lost_or_recorded_twice(
    spawn_server: Callable[..., Any], crew: Crew
) -> None:
    server = spawn_server(TIDEBASE_LEASE_MS=60_000)  # longer than a restart takes on a busy machine
    api = Api(server.url)
    runs = [api.enqueue(workflow="storm", input={"steps": 30, "effects": [20], "seconds": 0.002}) for _ in range(8)]
    for kind in KINDS:
        crew.start(server.url, kind, concurrency=4)
    for goal in (40, 140):
        eventually(lambda goal=goal: len(crew.lines("step")) >= goal, 30)
        server.end(signal.SIGKILL)
        server.start()
    eventually(lambda: all(api.run(run_id)["status"] == "completed" for run_id in runs), 60)
    names = [f"{'pay' if number == 20 else 'make'} {number}" for number in range(30)]
    for run_id in runs:
        assert assert_prefix(api, crew, run_id, names) == 0
        assert list(outputs(api, run_id).values()) == api.run(run_id)["result"]
        assert api.run(run_id)["attempt"] == 1
