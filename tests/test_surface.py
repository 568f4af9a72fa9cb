"""The client's surface is the one that its users know: names, argument order and shapes, on both clients.

The table says what a method takes and gives, for whoever changes one. Each row's arguments are compared with those of
the method, and the method is called once against a real server.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
import test_sdk
from conftest import ROOT, Api

import tidebase_sdk
from tidebase_sdk import (
    AsyncRunContext,
    AsyncRunSession,
    AsyncTidebase,
    RunCancelled,
    RunCompleted,
    RunContext,
    RunIdConflict,
    RunPage,
    RunSession,
    StepInputMismatch,
    Tidebase,
    TidebaseError,
    new_run_id,
    verify_webhook_signature,
)

actor, tide = test_sdk.actor, test_sdk.tide  # fixtures

Shape = Callable[[Any], object]


class Row(NamedTuple):
    """A method, what it takes (after `*` by keyword alone; a default where it matters), a call, and what that gives."""

    name: str
    takes: str
    call: Callable[..., Any]
    shape: Shape


def keys(*names: str) -> Shape:
    return lambda answer: set(answer) == set(names)


def is_run(answer: Any) -> bool:
    return {"id", "workflowName", "status", "result", "leaseOwner"} <= set(answer)


def lists(kind: type = list) -> Shape:
    return lambda answer: type(answer) is kind and len(answer) == 1


CRON = {"cron": "0 9 * * 1", "workflow_name": "report"}
CHANNELS = [{"type": "webhook", "url": "http://127.0.0.1:1/events"}]

# Called as call(client, api). Every row starts with the run `r` of the workflow `report`, which has not begun.
CLIENT = [
    Row("tide.request", "method, path, body",
        lambda tide, api: tide.request("GET", "/runs/r?include=run"), keys("run")),
    Row("tide.run", "workflow_name, workflow, run_id, input, metadata, recovery_webhook, channels, *, deadline_s,"
                    " recovery_secret, write_behind=False",
        lambda tide, api: tide.run("report", lambda run, input: input["a"], "r2", {"a": 1}, {"m": "x"}, "http://x:1",
                                   CHANNELS, deadline_s=60), lambda answer: answer == 1),
    Row("tide.enqueue", "workflow_name, *, queue='default', input, metadata, dedupe_key, delay_s, run_at, max_attempts,"
                        " priority, deadline_s, recovery_webhook, channels, recovery_secret",
        lambda tide, api: tide.enqueue("report", run_at=datetime.now(UTC), channels=CHANNELS),
        keys("run", "deduplicated")),
    Row("tide.work", "queues, *, lease_owner, poll_s, limit, stop, on_error, concurrency, shutdown_s,"
                     " write_behind=False",
        lambda tide, api: tide.work(stop=lambda: True), lambda answer: answer is None),
    Row("tide.runs.create", "workflow_name, input, metadata, recovery_webhook, channels, *, run_id, deadline_s,"
                            " recovery_secret",
        lambda tide, api: tide.runs.create("report", {"a": 1}, {"m": "x"}, "http://x:1", CHANNELS), is_run),
    Row("tide.runs.list", "*, status, workflow, queue, metadata, before, limit",
        lambda tide, api: tide.runs.list(limit=1), lambda answer: lists(RunPage)(answer) and is_run(answer[0])),
    Row("tide.runs.get", "run_id, *, include", lambda tide, api: tide.runs.get("r"),
        lambda answer: {"run", "steps", "state", "gates", "usage", "events"} <= set(answer)),
    Row("tide.runs.cancel", "run_id, reason, actor", lambda tide, api: tide.runs.cancel("r", "enough", "ada"),
        lambda run: (run["id"], run["status"], run["cancelReason"]) == ("r", "cancelled", "enough")),
    Row("tide.cancel", "run_id, reason, actor", lambda tide, api: tide.cancel("r", "enough", "ada"),
        lambda run: run["cancelActor"] == "ada"),
    Row("tide.runs.recover", "run_id, reason='manual'",
        lambda tide, api: tide.runs.recover(api.create(recoveryWebhook="http://127.0.0.1:1/")),
        lambda answer: answer["recoveryAttempt"]["reason"] == "manual"),
    Row("tide.runs.retry", "run_id", lambda tide, api: api.post("/runs/r/cancel")["run"] and tide.runs.retry("r"),
        lambda run: (run["id"], run["status"]) == ("r", "pending")),
    Row("tide.runs.fork", "run_id, *, from_step, input, queue", lambda tide, api: tide.runs.fork("r", input=2), is_run),
    Row("tide.runs.signal", "run_id, name, payload", lambda tide, api: tide.runs.signal("r", "paid", 5),
        lambda signal: (signal["name"], signal["payload"]) == ("paid", 5)),
    Row("tide.runs.review_step", "run_id, step_id, decision, *, output, actor",
        lambda tide, api: tide.runs.review_step("r", ambiguous_step(api, "r"), "complete", output=1),
        lambda step: (step["name"], step["status"]) == ("mail", "completed")),
    Row("tide.runs.subscribe", "run_id, after=0, *, kinds", lambda tide, api: after_its_end(tide, api).next(),
        lambda event: event["type"] == "run.cancelled"),
    Row("tide.runs.token", "run_id, *, ttl_s=900.0",  # awaited on neither client: nothing is sent
        lambda tide, api: type(tide)(tide.url, "a-key").runs.token("r", ttl_s=60),
        lambda token: re.fullmatch(r"v1\.[0-9]{10}\.[\w-]{43}", token)),
    Row("tide.runs.attach", "workflow_name, *, run_id, input, metadata, recovery_webhook, channels, heartbeat_s=20.0,"
                            " on_lease_lost, recovery_secret, write_behind=False",
        lambda tide, api: tide.runs.attach("report"), lambda session: is_run(session.run)),
    Row("tide.attach", "workflow_name, *, run_id, input, metadata, recovery_webhook, channels, heartbeat_s=20.0,"
                       " on_lease_lost, recovery_secret, write_behind=False",
        lambda tide, api: tide.attach("report", heartbeat_s=0), lambda session: is_run(session.run)),
    Row("tide.queues.configure", "name, *, concurrency, rate_per_minute, invoke_url, clear",
        lambda tide, api: tide.queues.configure("q", concurrency=2), keys("config")),
    Row("tide.queues.list", "", lambda tide, api: api.enqueue() and tide.queues.list(), lists()),
    Row("tide.schedules.set", "name, *, cron, workflow_name, input, queue='default', max_attempts, enabled=True,"
                              " timezone",
        lambda tide, api: tide.schedules.set("weekly", **CRON),
        lambda schedule: (schedule["name"], schedule["queue"], schedule["enabled"]) == ("weekly", "default", True)),
    Row("tide.schedules.list", "", lambda tide, api: api.put("/schedules/s", SCHEDULE)["schedule"]
        and tide.schedules.list(), lists()),
    Row("tide.schedules.delete", "name", lambda tide, api: api.put("/schedules/s", SCHEDULE)["schedule"]
        and tide.schedules.delete("s"), lambda answer: answer == {"deleted": "s"}),
]
SCHEDULE = {"cron": CRON["cron"], "workflowName": "report"}

# Called as call(run) inside a workflow, of the context that it is given.
STATE = "stream, label, reason, importance, metadata, created_by"
RUN = [
    Row("run.step", "name, fn, *, input, input_hash, retries, timeout_s, side_effects, idempotency_key, replay,"
                    " checkpoint_invariant, verified_by, credentials",
        lambda run: run.step("add", lambda: (1, 2)), lambda output: output == [1, 2]),
    Row("run.state.set", f"value, *, {STATE}, if_version", lambda run: run.state.set({"a": 1}), keys("state")),
    Row("run.state.patch", f"value, *, {STATE}, if_version", lambda run: run.state.patch({"a": 1}), keys("state")),
    Row("run.state.save", "label, *, stream, reason, importance, metadata, created_by",
        lambda run: run.state.save("seen"), keys("stateVersion")),
    Row("run.state.versions", "stream, labeled", lambda run: run.state.versions(None, True),
        lambda versions: isinstance(versions, list) and versions[0]["label"] == "seen"),
    Row("run.snapshots.create", "label, state, *, target, reason, metadata, created_by",
        lambda run: run.snapshots.create("draft", {"text": "a"}), keys("snapshot")),
    Row("run.snapshots.list", "", lambda run: run.snapshots.list(),
        lambda snapshots: isinstance(snapshots, list) and "draft" in {each["label"] for each in snapshots}),
    Row("run.usage.record", "*, kind, provider, model, label, quantity, unit, input_tokens, output_tokens,"
                            " total_tokens, cost_usd, metadata, step_id",
        lambda run: run.usage.record(model="m", input_tokens=1), keys("usage")),
    Row("run.gate", "name, prompt, *, data, channels, capability, timeout_s, poll_s, hold_s",
        lambda run: run.gate("approve", "Sure?"),
        lambda gate: (gate.name, gate.status, gate.decision, gate.actor, gate.payload, gate.approved)
        == ("approve", "approved", "approved", None, {}, True) and gate.gate_id.startswith("gate_")),
    Row("run.gates.begin", "name, prompt, *, data, channels, capability, timeout_s",
        lambda run: run.gates.begin("approve", "Sure?"),
        keys("gateId", "name", "status", "decision", "actor", "payload", "gate")),
    Row("run.gates.get", "gate_id", lambda run: run.gates.get(GATES[run.run_id]),
        keys("gateId", "name", "status", "decision", "actor", "payload", "gate")),
    Row("run.child", "workflow_name, workflow, *, name, input, metadata, recovery_webhook, channels, edge_type,"
                     " edge_metadata, queue, max_attempts, priority, recovery_secret",
        lambda run: run.child("double", name="one", input=21), lambda result: result == 42),
    Row("run.fanout", "name, children, *, checkpoint, queue, return_errors",
        lambda run: run.fanout("all", [{"name": "two", "workflow_name": "double", "input": 1}], checkpoint="both"),
        lambda results: results == [2]),
    Row("run.flush", "", lambda run: run.flush(), lambda answer: answer is None),
]
GATES: dict[str, str] = {}  # a run's gate

SESSION = [
    Row("session.heartbeat", "", lambda session: session.heartbeat(), keys("run")),
    Row("session.complete", "result", lambda session: session.complete({"sum": 2}),
        lambda answer: answer["run"]["result"] == {"sum": 2}),
    Row("session.fail", "error", lambda session: session.fail("x"),
        lambda answer: (answer["run"]["error"], answer["requeued"]) == ({"message": "x"}, False)),
    Row("session.gates_begin", "name, prompt, *, data, channels, capability, timeout_s",
        lambda session: session.gates_begin("approve", "Sure?"), lambda answer: "gate" in answer),
]


def ambiguous_step(api: Api, run_id: str) -> str:
    """A step that may have had its effect without leaving a record."""
    owner = api.begin(run_id)["leaseOwner"]
    step = api.begin_step(run_id, "mail", owner, options={"sideEffects": ["email"]})["step"]["id"]
    api.post(f"/runs/{run_id}/release", {"leaseOwner": owner})
    owner = api.begin(run_id)["leaseOwner"]
    assert api.begin_step(run_id, "mail", owner, options={"sideEffects": ["email"]}).status == 409
    return str(step)


def after_its_end(tide: Any, api: Api) -> Any:
    """Events of a run that has ended, from its last but one on."""
    api.post("/runs/r/cancel")["run"]
    return tide.runs.subscribe("r", 1)


def takes(method: Any) -> tuple[list[str], set[str]]:
    """The names of a method's arguments, by position or by keyword alone, each with its default where that says more
    than that it may be left out."""
    def told(each: inspect.Parameter) -> str:
        return each.name if each.default in (inspect.Parameter.empty, None) else f"{each.name}={each.default!r}"

    parameters = inspect.signature(method).parameters.values()
    assert all(each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) for each in parameters)
    return ([told(each) for each in parameters if each.kind == each.POSITIONAL_OR_KEYWORD],
            {told(each) for each in parameters if each.kind == each.KEYWORD_ONLY})


def assert_takes(row: Row, method: Any) -> None:
    by_position, _, by_keyword = row.takes.partition("*")
    expected = [[name.strip() for name in part.split(",") if name.strip()] for part in (by_position, by_keyword)]
    named = {name.partition("=")[0]: name for part in expected for name in part}

    def known(told: str) -> str:  # a default that the table does not mention is free
        name = told.partition("=")[0]
        return told if "=" in named.get(name, "") else name

    positional, keyword = takes(method)
    assert [known(told) for told in positional] == expected[0]
    assert {known(told) for told in keyword} == set(expected[1])


def attribute(root: Any, name: str) -> Any:
    for part in name.split(".")[1:]:
        root = getattr(root, part)
    return root


def named(rows: list[Row]) -> list[Any]:
    return [pytest.param(row, id=row.name) for row in rows]


@pytest.mark.parametrize("row", named(CLIENT))
def test_a_method_of_the_client_takes_and_gives_what_its_users_know(tide: Any, api: Api, row: Row) -> None:
    assert_takes(row, attribute(tide.client, row.name))
    api.create("report", id="r")

    async def called(client: Any) -> Any:
        answer = row.call(client, api)
        return await answer if inspect.isawaitable(answer) else answer

    awaited = isinstance(tide, test_sdk.AwaitedActor)
    answer = tide(called) if awaited else row.call(tide.client, api)
    assert row.shape(answer), answer
    if isinstance(answer, tidebase_sdk.Session):
        assert isinstance(answer, AsyncRunSession if awaited else RunSession)
        assert isinstance(answer, AsyncRunContext if awaited else RunContext)
        tide(lambda client: answer.close())


@pytest.mark.parametrize("row", named(RUN))
def test_a_method_of_a_run_takes_and_gives_what_its_users_know(tide: Any, api: Api, row: Row) -> None:
    if row.name.startswith(("run.state", "run.snapshots")):
        async def before(run: Any) -> None:
            await run.state.set({"a": 0})
            await run.state.save("seen")
            await run.snapshots.create("draft", 1)
    else:
        async def before(run: Any) -> None:
            gate = api.post(f"/runs/{run.run_id}/gates/begin", {"name": "approve", "prompt": "Sure?"})["gate"]
            GATES[run.run_id] = gate["id"]
            if row.name == "run.gate":
                api.post(f"/runs/{run.run_id}/gates/{gate['id']}/resolve",
                         {"token": gate["resolveToken"], "decision": "approved"})["gate"]

    async def double(run: Any, input: Any) -> int:
        return int(input) * 2

    async def flow(run: Any, input: Any) -> Any:
        context = getattr(run, "_run", run)  # the blocking client's, as these tests wrap it
        assert isinstance(context, AsyncRunContext if context is run else RunContext)
        assert_takes(row, attribute(context, row.name))
        await before(run)
        answer = await row.call(run)
        assert row.shape(answer), answer
        return "as told"

    tide.client.workflow("double", tide.workflow(double))
    assert tide(lambda client: client.run("flow", tide.workflow(flow))) == "as told"


@pytest.mark.parametrize("row", named(SESSION))
def test_a_method_of_a_session_takes_and_gives_what_its_users_know(tide: Any, row: Row) -> None:
    session = tide(lambda client: client.attach("flow"))
    assert_takes(row, attribute(session, row.name))
    answer = tide(lambda client: row.call(session))
    assert row.shape(answer), answer
    if "run" in answer:
        assert session.run == answer["run"]
    tide(lambda client: session.close())


def test_the_table_covers_all_that_the_agreed_one_names() -> None:
    """The agreed table lies beside the repository, where that is so; its first column names methods."""
    agreed = ROOT.parent / "shared" / "sdk-surface.md"
    if not agreed.exists():
        pytest.skip("the agreed table is not on this machine")
    cells = [line.split("|")[1] for line in agreed.read_text().splitlines() if line.startswith("| ")][1:]
    quoted = [name for cell in cells for name in re.findall("`(.+?)`", cell)]
    methods = {re.match(r"\.?([\w.]+)", name)[1].rpartition(".")[2] for name in quoted}
    covered = {row.name.rpartition(".")[2] for row in CLIENT + RUN + SESSION}
    others = {"Tidebase", "TidebaseError", "RunCancelled", "verify_webhook_signature", "RunContext", "RunSession",
              "AsyncRunContext", "AsyncRunSession", "run", "get"}  # see below
    assert len(methods) > 30
    assert methods <= covered | others, methods - covered - others


# ------------------------------------------------------------------------------
# What is no method.
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [Tidebase, AsyncTidebase])
def test_a_client_shows_its_address_and_keeps_its_secrets(client: Any) -> None:
    assert takes(client)[0] == ["url", "api_key", "webhook_secret"]
    made = client("http://localhost:7373/base/", "s3cret", "wh1sper")
    assert (made.url, made.api_key, made.webhook_secret) == ("http://localhost:7373/base", "s3cret", "wh1sper")
    assert not re.search("s3cret|wh1sper", repr(made) + repr(made.runs) + str(made))
    bare = client()
    assert (bare.url, bare.api_key, bare.webhook_secret) == ("http://localhost:7373", None, None)


def test_a_workflow_that_is_registered_may_be_left_out(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> Any:
        return input

    tide.client.workflow("known", tide.workflow(flow))
    assert tide(lambda client: client.run("known", input=3)) == 3
    with pytest.raises(ValueError, match=r"'unknown' is not registered, but \['known'\] are"):
        tide(lambda client: client.run("unknown"))
    assert api.get("/runs?workflow=unknown")["runs"] == []


def test_a_run_id_of_another_workflow_and_a_completed_run_are_errors_that_callers_know(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> int:
        return 1

    run_id = new_run_id()
    assert tide(lambda client: client.run("flow", tide.workflow(flow), run_id)) == 1
    with pytest.raises(ValueError, match=run_id) as conflict:
        tide(lambda client: client.run("other", tide.workflow(flow), run_id))
    assert isinstance(conflict.value, RunIdConflict)
    assert (conflict.value.status, conflict.value.code) == (409, "run_id_conflict")
    with pytest.raises(RuntimeError, match="completed") as completed:
        tide(lambda client: client.attach("flow", run_id=run_id))
    assert isinstance(completed.value, RunCompleted)
    assert completed.value.result == 1


def test_the_errors_are_of_the_kinds_that_callers_catch() -> None:
    assert issubclass(TidebaseError, RuntimeError)
    assert issubclass(StepInputMismatch, ValueError)
    assert issubclass(RunCancelled, TidebaseError)
    assert all(issubclass(kind, TidebaseError) for kind in vars(tidebase_sdk).values()
               if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == "tidebase_sdk")
    bare = TidebaseError("away")
    assert (bare.status, bare.path, bare.body, bare.code) == (None, None, None, None)


def test_an_error_holds_the_answer_parsed_or_as_the_text_that_it_was(tide: Any, api: Api) -> None:
    with pytest.raises(TidebaseError) as missing:
        tide(lambda client: client.request("GET", "/runs/nobody"))
    assert (missing.value.status, missing.value.path, missing.value.code) == (404, "/runs/nobody", "not_found")
    assert missing.value.body["code"] == "not_found"
    page = tidebase_sdk.Reply(502, "", b"<h1>Bad gateway</h1>")
    with pytest.raises(TidebaseError) as proxy:
        tidebase_sdk._accepted(page, "/runs", 0, None, None)
    assert proxy.value.body == "<h1>Bad gateway</h1>"


@pytest.mark.parametrize("path", ["runs/r", "/runs/r r", "/runs/\u00e9", "/x HTTP/1.1\r\nEvil: 1"])
def test_a_path_that_is_not_percent_encoded_is_not_sent(tide: Any, path: str) -> None:
    with pytest.raises(ValueError, match="percent-encoded"):
        tide(lambda client: client.request("GET", path))


def test_a_cancelled_run_is_named_by_the_error(tide: Any, api: Api) -> None:
    run_id = api.create("flow")

    async def flow(run: Any, input: Any) -> None:
        api.post(f"/runs/{run_id}/cancel")
        for number in range(3):
            await run.step(f"step {number}", lambda: 1)

    for _ in range(2):  # noticed while it ran, and when it was to begin again
        with pytest.raises(RunCancelled) as cancelled:
            tide(lambda client: client.run("flow", tide.workflow(flow), run_id))
        assert cancelled.value.run_id == run_id
    with pytest.raises(RunCancelled) as waited:
        tide(lambda client: client.runs.wait(run_id))
    assert waited.value.run_id == run_id


@pytest.mark.parametrize("queues", ["mail", ["mail"], ("mail",)])
def test_one_queue_may_be_given_by_its_name(tide: Any, api: Api, queues: Any) -> None:
    done = threading.Event()

    async def flow(run: Any, input: Any) -> None:
        done.set()

    run_id = api.enqueue("mail")
    tide.client.workflow(api.run(run_id)["workflowName"], tide.workflow(flow))
    tide(lambda client: client.work(queues, stop=lambda: api.run(run_id)["status"] == "completed"))
    assert done.is_set()


def test_a_worker_without_queues_serves_the_default_one(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> None: ...

    run_id = api.enqueue("default")
    tide.client.workflow(api.run(run_id)["workflowName"], tide.workflow(flow))
    tide(lambda client: client.work(None, stop=lambda: api.run(run_id)["status"] == "completed"))
    assert api.run(run_id)["status"] == "completed"


def test_a_steps_record_holds_what_it_was_called_with_and_how_it_ended(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.step("note", lambda: 1, retries=2, timeout_s=1.5, verified_by={"test": ["a", 1]},
                       checkpoint_invariant=["one row", None], credentials="mailbox")
        await run.step("fail", lambda: 1 / 0)

    run_id = new_run_id()
    with pytest.raises(ZeroDivisionError):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id))
    note, failed = api.detail(run_id)["steps"]
    assert note["options"] == {"retries": 2, "timeoutMs": 1500, "verifiedBy": {"test": ["a", 1]},
                               "checkpointInvariant": ["one row", None], "credentials": ["mailbox"]}
    assert (failed["status"], failed["options"]) == ("failed", {})
    event = next(event["payload"] for event in api.events(run_id) if event["type"] == "step.failed")
    assert (event["resumeDecision"], event["retryable"]) == ("safe_replay", False)


def test_next_reads_one_event_after_the_other_and_ends_with_the_run(server: Any, api: Api) -> None:
    with Tidebase(server.url) as tide:
        run_id = api.create("flow")
        with tide.runs.subscribe(run_id) as events:
            assert next(events)["type"] == "run.created"
            api.begin(run_id)
            assert next(events)["type"] == "run.started"
            api.complete(run_id)
            assert [event["type"] for event in events] == ["run.completed"]
            assert next(events, None) is None
        assert [event["seq"] for event in tide.runs.subscribe(run_id, 1)] == [2, 3]
        assert [event["seq"] for event in tide.runs.subscribe(run_id, kinds="run.started")] == [2]
        assert [event["seq"] for event in tide.runs.subscribe(run_id, kinds=["run"])] == [1, 2, 3]
        assert list(tide.runs.subscribe(run_id, kinds=["step"])) == []


def test_anext_reads_one_event_after_the_other(server: Any, api: Api) -> None:
    run_id = api.create("flow")
    api.post(f"/runs/{run_id}/cancel")

    async def main() -> list[str]:
        async with AsyncTidebase(server.url) as tide, tide.runs.subscribe(run_id) as events:
            return [(await anext(events))["type"], (await anext(events))["type"], await anext(events, "ended")]

    assert asyncio.run(main()) == ["run.created", "run.cancelled", "ended"]


def test_the_runs_come_in_pages(tide: Any, api: Api) -> None:
    made = [api.create("flow") for _ in range(3)]
    first = tide(lambda client: client.runs.list(limit=2))
    rest = tide(lambda client: client.runs.list(limit=2, before=first.next_cursor))
    assert [run["id"] for run in [*first, *rest]] == made[::-1]
    assert json.loads(json.dumps(rest)) == rest


@pytest.mark.parametrize("heartbeat_s", [None, 0])
def test_a_session_without_heartbeats_sends_none(tide: Any, heartbeat_s: Any) -> None:
    session = tide(lambda client: client.attach("flow", heartbeat_s=heartbeat_s))
    assert tide.client._heartbeater._leases == {}
    tide(lambda client: session.complete())


def test_a_signature_is_taken_with_and_without_its_prefix() -> None:
    assert takes(verify_webhook_signature)[0] == ["body", "signature_header", "secret"]
    signed = "5031fe3d989c6d1537a013fa6e739da23463fdaec3b70137d828e36ace221bd0"  # openssl dgst -sha256 -hmac key
    for header in (signed, "sha256=" + signed, f" {signed} "):
        assert verify_webhook_signature(b"data", header, "key") is True
        assert verify_webhook_signature(b"date", header, "key") is False
    for wrong in ("sha256:" + signed, "sha256=sha256=" + signed, signed.upper(), "", None, 5):
        assert verify_webhook_signature(b"data", wrong, "key") is False  # type: ignore[arg-type]
    assert verify_webhook_signature(b"data", signed, None) is False  # type: ignore[arg-type]
