"""Many writes in one request: each is answered as if it had come alone, and none touches another.

What a worker that holds many runs has ready goes in one transaction: finished steps, results, new runs.
"""

from __future__ import annotations

import json
import logging
import random
import re
from typing import Any

import psycopg
import pytest
from conftest import Answer, Api, Clock, Receiver, refused, together
from psycopg.sql import SQL, Identifier

STARTED = "2026-06-12T10:31:00.250Z"
# What is never the same twice.
GIVEN = ("id", "runId", "createdAt", "updatedAt", "startedAt", "completedAt", "leaseExpiresAt", "stepId")


def writes(api: Api, *of_them: Any) -> list[Any]:
    return api.post("/writes", {"writes": list(of_them)})["results"]


def step(run: str, name: str = "s", owner: str = "a", **body: Any) -> Any:
    return {"do": "record_step", "runId": run, "leaseOwner": owner, "name": name, "inputHash": "h", **body}


def begin(run: str, name: str = "s", owner: str = "a", **body: Any) -> Any:
    return {"do": "begin_step", "runId": run, "leaseOwner": owner, "name": name, "inputHash": "h", **body}


def output(run: str, step: str, owner: str = "a", **body: Any) -> Any:
    return {"do": "complete_step", "runId": run, "stepId": step, "leaseOwner": owner, **body}


def completion(run: str, **body: Any) -> Any:
    return {"do": "complete_run", "runId": run, **body}


def job(queue: str = "q", **body: Any) -> Any:
    return {"do": "enqueue_run", "queue": queue, "workflowName": "w", **body}


def child(run: str, name: str = "c", workflow: str = "w", **body: Any) -> Any:
    return {"do": "create_child", "runId": run, "name": name, "workflowName": workflow, **body}


def held_run(api: Api, owner: str = "a") -> str:
    run = api.create()
    api.begin(run, owner)["run"]
    return run


def codes(results: list[Any]) -> list[Any]:
    return [result.get("code") for result in results]


def same(value: Any) -> Any:
    """Without what is given anew each time."""
    if isinstance(value, dict):
        return {key: same(member) for key, member in value.items() if key not in GIVEN}
    return [same(member) for member in value] if isinstance(value, list) else value


# ------------------------------------------------------------------------------
# One by one
# ------------------------------------------------------------------------------
def test_each_is_answered_in_its_place_as_if_it_had_come_alone(api: Api) -> None:
    first, second, third, cancelled = (held_run(api) for _ in range(4))
    api.post(f"/runs/{cancelled}/cancel")["run"]
    results = writes(
        api, completion(first, leaseOwner="a", result={"b": 1.0, "a": "\0"}), step(second, output=[1]),
        job(id="r", priority=3, input={"n": 1}), step(second, "t", owner="b"), completion(third, leaseOwner="b"),
        completion("nowhere"), step(cancelled), job(id="r"), job("p", dedupeKey="k"), job("p", dedupeKey="k"),
        completion(cancelled))
    assert codes(results) == [None, None, None, "lease_lost", "lease_lost", "not_found", "run_cancelled", None, None,
                              None, None]
    assert [result.get("status") for result in results[3:7]] == [409, 409, 404, 409]
    assert results[0]["run"] == api.run(first)
    assert api.run(first)["result"] == {"b": 1.0, "a": "\0"}
    assert results[1]["step"] == api.detail(second)["steps"][0]
    assert results[2] == {"run": api.run("r"), "deduplicated": False}
    assert results[7]["run"]["id"] == "r"
    assert [result["deduplicated"] for result in results[8:10]] == [False, True]
    assert results[8]["run"]["id"] == results[9]["run"]["id"]
    assert results[10]["run"]["status"] == "cancelled"
    assert [api.run(run)["status"] for run in (first, second, third)] == ["completed", "running", "running"]


def test_children_are_made_as_if_each_had_come_alone(api: Api, receiver: Receiver) -> None:
    alone, among, cancelled = held_run(api), held_run(api), held_run(api)
    api.post(f"/runs/{cancelled}/cancel")["run"]
    body = {"input": {"b": 1.0, "a": "\0"}, "metadata": {"m": 1}, "queue": "q", "maxAttempts": 2, "priority": 5,
            "edgeType": "part", "edgeMetadata": {"e": [1]}, "recoveryWebhook": "http://127.0.0.1:9/",
            "channels": [{"type": "webhook", "url": receiver.url, "secret": "s", "events": ["run.completed"]}]}
    answer = api.post(f"/runs/{alone}/children", {"name": "c", "workflowName": "w", **body}).json
    results = writes(api, child(among, **body), child(cancelled), child(among, "d", id="r"), child("nowhere"),
                     child(among), child(among, workflow="other"), child(among, "e", id="r"), job(id="j"))
    assert codes(results) == [None, "run_cancelled", None, "not_found", None, "edge_conflict", "run_id_conflict", None]
    assert [result.get("created") for result in results[:5:2]] == [True, True, False]
    assert results[4]["run"]["id"] == results[0]["run"]["id"]
    for told in (answer, results[0]):
        assert told["run"]["metadata"].pop("parentRunId") == told["edge"].pop("parentRunId")
        assert told["edge"].pop("childRunId") == told["run"]["id"]
        told["run"].pop("runAt")
    assert same(results[0]) == same(answer)
    assert [run["id"] for run in api.detail(among)["childRuns"]] == [results[0]["run"]["id"], "r"]
    assert api.event_types(among)[2:] == ["run.child.created"] * 2
    assert api.event_types(results[0]["run"]["id"]) == ["run.created", "run.enqueued"]
    [claimed] = api.claim("q", owner="b")
    assert claimed["input"] == {"b": 1.0, "a": "\0"}
    api.complete(claimed["id"], leaseOwner="b")["run"]
    assert receiver.wait_for(1)[0]["type"] == "run.completed"


@pytest.mark.parametrize("body", [
    {"output": {"b": 1.0, "a": "\0"}},
    {"input": [1.50], "output": None, "startedAt": STARTED},
    {"output": 0, "durationMs": 5000},
    {"output": 1, "options": {"sideEffects": ["read"], "verifiedBy": "me", "checkpointInvariant": "it is", "x": 1}},
    {"error": "boom", "retryable": True}, {"error": {"n": 1.0}, "resumeDecision": "manual_review"},
])
def test_a_step_leaves_the_same_whether_it_came_alone_or_with_others(api: Api, body: Any) -> None:
    alone, among = held_run(api), held_run(api)
    answer = api.post(f"/runs/{alone}/steps", {**step(alone), **body})
    result = writes(api, step(held_run(api)), {**step(among), **body}, job())[1]
    assert same(result) == same(answer.json)
    one, other = api.detail(alone), api.detail(among)
    assert same(other) == same(one)
    assert [event["type"] for event in api.events(among)] == api.event_types(alone)
    if "startedAt" in body:
        assert other["steps"][0]["startedAt"] == STARTED
    if "durationMs" in body:
        assert other["steps"][0]["startedAt"] < other["steps"][0]["completedAt"]


def test_a_brief_answer_leaves_out_what_was_sent_and_a_repeat_does_too(api: Api) -> None:
    run, other = held_run(api), held_run(api)
    told = {"step": {"name": "s", "status": "completed", "attempt": 1}}
    for repeat in range(2):
        alone = api.post(f"/runs/{run}/steps", {**step(run), "output": {"a": 1.0}, "brief": True}).json
        among = writes(api, step(other, output={"a": 1.0}, brief=True), job(id=f"r{repeat}"))[0]
        assert same(alone) == same(among) == told
        assert alone["step"]["id"] == api.detail(run)["steps"][0]["id"]
    assert writes(api, step(other, output="another", brief=True))[0]["step"]["output"] == {"a": 1.0}
    failed = api.post(f"/runs/{run}/steps", {**step(run, "t"), "error": "boom", "brief": True})["step"]
    assert (failed["status"], "error" in failed) == ("failed", False)
    done = {"run": {"id": run, "status": "completed"}}
    assert api.complete(run, leaseOwner="a", brief=True).json == done
    assert writes(api, completion(run, brief=True)) == [done]


def test_of_one_run_many_steps_are_recorded_in_the_order_given(api: Api) -> None:
    run = held_run(api)
    results = writes(api, *(step(run, f"s{number}", output=number) for number in range(5)), step(run, "s0", output="x"),
                     step(run, "s1", inputHash="other"))
    assert codes(results) == [None] * 6 + ["input_mismatch"]
    assert [result["step"]["output"] for result in results[:6]] == [0, 1, 2, 3, 4, 0]
    assert [named["name"] for named in api.detail(run)["steps"]] == [f"s{number}" for number in range(5)]
    assert api.event_types(run)[2:] == ["step.started", "step.completed"] * 5


def test_a_step_extends_the_lease_of_its_run_and_of_no_other(api: Api, clock: Clock) -> None:
    run, other = held_run(api), held_run(api)
    before, others = (api.run(each)["leaseExpiresAt"] for each in (run, other))
    clock.advance(ms=500)
    writes(api, step(run), job())
    assert api.run(run)["leaseExpiresAt"] > before
    assert api.run(other)["leaseExpiresAt"] == others


def test_a_step_that_another_owner_began_is_decided_as_if_it_had_come_alone(api: Api) -> None:
    run, review = held_run(api), api.create()
    api.begin_step(run, "s", "a")["step"]
    api.begin_step(review, "s", "b", options={"replay": "manual"})["step"]
    api.begin(review, "a")["run"]
    results = writes(api, step(run, output=1), step(review, output=1))
    assert codes(results) == [None, "manual_review"]
    assert api.event_types(run)[2:] == ["step.started", "step.completed"]
    assert api.detail(run)["steps"][0]["attempt"] == 1


def test_begins_are_answered_in_batches_as_if_they_had_come_alone(api: Api) -> None:
    fresh, done, locked, review, cancelled = (held_run(api) for _ in range(5))
    api.do_step(done, "s", "a", output="first")
    api.begin_step(locked, "s", "b")["step"]
    lost = api.begin_step(review, "s", "a", options={"replay": "manual"})["step"]["id"]
    api.fail_step(review, lost, "a", resumeDecision="manual_review")["step"]
    api.post(f"/runs/{cancelled}/cancel")["run"]
    results = writes(api, begin(fresh, input=[1.0]), begin(done), begin(done, inputHash="other"), begin(review),
                     begin(cancelled), begin("nowhere"), begin(locked, owner="c"), begin(fresh))
    assert [result.get("action", result.get("code")) for result in results] == [
        "execute", "return", "input_mismatch", "manual_review", "cancelled", "not_found", "locked", "execute"]
    assert results[0]["step"]["input"] == [1]
    assert results[0]["leaseOwner"] == "a"
    assert results[1]["output"] == "first"
    assert (results[3]["status"], results[3]["step"]["status"]) == (409, "manual_review")
    assert results[7]["step"]["attempt"] == 1
    assert api.event_types(fresh)[2:] == ["step.started"]


def test_outputs_are_recorded_in_batches_as_if_they_had_come_alone(api: Api) -> None:
    run, other = held_run(api), held_run(api)
    mine, theirs = (api.begin_step(of, "s", "a")["step"]["id"] for of in (run, other))
    results = writes(api, output(run, mine, output={"a": 1.0}), output(other, theirs, owner="b"), output(run, "none"),
                     output(run, mine, output="again"))
    assert codes(results) == [None, "lease_lost", "not_found", None]
    assert [result["step"]["output"] for result in (results[0], results[3])] == [{"a": 1.0}] * 2
    assert api.event_types(run)[2:] == ["step.started", "step.completed"]
    assert api.event_types(other)[2:] == ["step.started"]


def test_failures_come_in_batches_as_if_each_had_come_alone(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    run, queued = held_run(api), api.enqueue("q")
    api.claim("q", owner="a")
    begun = api.begin_step(run, "s", "a")["step"]["id"]
    with caplog.at_level(logging.WARNING, "tidebase.server"):
        results = writes(
            api, {"do": "fail_step", "runId": run, "stepId": begun, "leaseOwner": "a", "error": {"n": 1.0}},
            {"do": "fail_run", "runId": run, "leaseOwner": "b"}, {"do": "fail_run", "runId": "nowhere"},
            {"do": "fail_run", "runId": run, "leaseOwner": "a", "error": "first words", "failureClass": "mine"},
            {"do": "fail_run", "runId": queued, "leaseOwner": "a", "error": {"message": "again"}})
    assert codes(results) == [None, "lease_lost", "not_found", None, None]
    assert results[0]["step"] == api.detail(run)["steps"][0]
    assert results[3] == {"run": api.run(run), "requeued": False}
    assert (results[4]["run"]["status"], results[4]["requeued"]) == ("queued", True)
    assert api.event_types(run)[2:] == ["step.started", "step.failed", "run.failed"]
    assert [record.event for record in caplog.records] == ["run_failed", "run_requeued"]
    assert "first words" in caplog.text


def test_a_chained_write_is_refused_after_an_earlier_one_of_its_run_was(api: Api) -> None:
    run, other = held_run(api), held_run(api)
    results = writes(api, step(run, "one", chained=True), step(run, "one", inputHash="x", chained=True),
                     step(other, chained=True), step(run, "two", chained=True), completion(run, chained=True))
    assert codes(results) == [None, "input_mismatch", None, "prior_refused", "prior_refused"]
    assert api.run(run)["status"] == "running"
    refused(api.post("/writes", {"writes": [job(), {**step(run), "chained": 1}]}), 400, "invalid_request")


def test_a_result_among_others_wakes_the_parent_that_waits_for_it(api: Api) -> None:
    api.enqueue("q")
    parent = api.claim("q", owner="a")[0]["id"]
    child = api.post(f"/runs/{parent}/children", {"name": "c", "workflowName": "w"})["run"]["id"]
    api.begin(child, "b")["run"]
    api.post(f"/runs/{parent}/wait", {"leaseOwner": "a", "for": {"children": ["c"]}})["run"]
    writes(api, step(held_run(api)), completion(child, leaseOwner="b", result=1))
    assert api.run(parent)["status"] == "queued"


def test_a_refusal_in_between_changes_nothing_of_those_around_it(api: Api) -> None:
    run, other = held_run(api), held_run(api)
    api.do_step(other, "s", "a")
    results = writes(
        api, step(run, "one", output=1), begin(run, "two"), child(run, "c"), step(other, "s", inputHash="x"),
        job(dedupeKey="k"), step(run, "two", output=2), step(other, "s", owner="b"), completion("nowhere"),
        job(dedupeKey="k"), begin(run, "three"), completion(run, leaseOwner="a"))
    assert codes(results) == [None] * 3 + ["input_mismatch", None, None, "lease_lost", "not_found"] + [None] * 3
    assert results[3]["step"] == api.detail(other)["steps"][0]
    assert results[8]["run"]["id"] == results[4]["run"]["id"]
    assert api.event_types(run)[2:] == ["step.started", "step.completed", "step.started", "run.child.created",
                                        "step.completed", "step.started", "run.completed"]
    assert [named["attempt"] for named in api.detail(run)["steps"]] == [1, 1, 1]
    assert api.queue("q")["queued"] == 1


def test_a_large_batch_takes_few_subtransactions(api: Api, database: str) -> None:
    """PostgreSQL keeps 64 of a transaction at hand; beyond those, every snapshot of others gets dearer."""
    run, many = held_run(api), 300
    batch = [{"do": "enqueue_run", "queue": "q", "workflow_name": "w", "id": f"r{n}", "metadata": {}, "channels": [],
              "max_attempts": 1, "priority": 0} if n % 2 else
             {"do": "begin_step", "run_id": run, "lease_owner": "a", "name": f"s{n}", "input_hash": "h", "options": {},
              "lease_ms": 1000} for n in range(many)]
    batch[100] = {"do": "complete_run", "run_id": "nowhere", "brief": True}
    with psycopg.connect(database) as connection:
        def call(those: list[Any]) -> tuple[list[int], int]:
            payloads = ["{}"] * len(those)
            rows = connection.execute("select case when body is not null then status end from tidebase.write_each("
                                      " %s, %s::json[], %s::json[], %s::json[])",
                                      [json.dumps(those), payloads, payloads, [None] * len(those)]).fetchall()
            taken = connection.execute("select distinct xmin::text from tidebase.events").fetchall()
            connection.rollback()
            return [status for status, in rows], len(taken)

        statuses, taken = call(batch)
        assert statuses == [200] * 100 + [404] + [200] * 199
        assert taken < 64
        # What is not reached after 60 is for another call.
        statuses, taken = call([each for pair in zip(batch[102::2], [batch[100]] * 99, strict=True) for each in pair])
        assert statuses == [200, 404] * 60 + [None] * 78
        assert taken < 64


def test_plain_writes_take_no_subtransaction_and_what_follows_in_their_run_keeps_its_order(api: Api, database: str):
    plain, mixed = held_run(api), held_run(api)
    batch = [*(record(plain, f"s{n}") for n in range(10)), finish(plain),
             record(mixed, "one"), begin_field(mixed, "two"), record(mixed, "three"), finish(mixed)]
    with psycopg.connect(database) as connection:
        payloads = ["1"] * len(batch)
        statuses = connection.execute(
            "select status from tidebase.write_each(%s, %s::json[], %s::json[], %s::json[])",
            [json.dumps(batch), payloads, payloads, [None] * len(batch)]).fetchall()
        alone = dict(connection.execute("select run_id, count(*) from tidebase.events"
                                        " where xmin = pg_current_xact_id()::xid group by run_id").fetchall())
    assert statuses == [(200,)] * len(batch)
    assert alone == {plain: 21, mixed: 2}
    for run, names in ((plain, [f"s{n}" for n in range(10)]), (mixed, ["one", "two", "three"])):
        assert [each["name"] for each in api.detail(run)["steps"]] == names
        assert [event["seq"] for event in api.events(run)] == list(range(1, len(api.events(run)) + 1))
        assert api.event_types(run)[-1] == "run.completed"


def test_a_batch_of_which_every_other_is_refused_is_answered_whole(api: Api) -> None:
    run = held_run(api)
    results = writes(api, *(each for n in range(150) for each in (begin(run, f"s{n}"), completion("nowhere"))))
    assert codes(results) == [None, "not_found"] * 150
    assert [result["step"]["name"] for result in results[::2]] == [f"s{n}" for n in range(150)]
    assert api.event_types(run)[2:] == ["step.started"] * 150


# ------------------------------------------------------------------------------
# One after the other
# ------------------------------------------------------------------------------
def record(run: str, name: str, **fields: Any) -> Any:
    """A write as schema.sql takes it, its fields in snake_case."""
    return {"do": "record_step", "run_id": run, "lease_owner": "a", "name": name, "input_hash": "h", "options": {},
            "retryable": False, "brief": True, **fields}


def begin_field(run: str, name: str, **fields: Any) -> Any:
    return {"do": "begin_step", "run_id": run, "lease_owner": "a", "name": name, "input_hash": "h", "options": {},
            "lease_ms": 60000, **fields}


def finish(run: str, **fields: Any) -> Any:
    return {"do": "complete_run", "run_id": run, "lease_owner": "a", "brief": True, **fields}


def write_each(database: str, *given: Any) -> list[Any]:
    """The answers of one call: what each write was refused with, True where it was done, None where not reached."""
    with psycopg.connect(database) as connection:
        payloads = [each.get("payload", "1") for each in given]
        rows = connection.execute(
            "select body, status from tidebase.write_each(%s, %s::json[], %s::json[], %s::json[])", [
                json.dumps(given), payloads, payloads,
                [payload if each["do"].startswith("fail") else None
                 for each, payload in zip(given, payloads, strict=True)]]).fetchall()
    return [body if body is None else body.get("code", True) if status == 409 else status == 200 or status
            for body, status in rows]


def test_a_chained_write_is_refused_after_one_of_its_run_was_and_those_of_other_runs_are_not(api: Api, database: str):
    run, other = held_run(api), held_run(api)
    assert write_each(
        database, record(run, "one", chained=True), record(run, "one", input_hash="x", chained=True),
        record(other, "one", chained=True), record(run, "two", chained=True), record(run, "free"),
        finish(run, chained=True), finish(other, chained=True)) == [
            True, "input_mismatch", True, "prior_refused", True, "prior_refused", True]
    assert [one["name"] for one in api.detail(run)["steps"]] == ["one", "free"]
    assert [api.run(each)["status"] for each in (run, other)] == ["running", "completed"]


def test_chained_writes_of_a_worker_that_lost_its_run_leave_nothing(api: Api, database: str):
    run = held_run(api, "b")
    chain = [record(run, f"s{n}", chained=True) for n in range(5)]
    assert write_each(database, *chain, finish(run, chained=True)) == ["lease_lost"] + ["prior_refused"] * 5
    assert api.detail(run)["steps"] == []


def test_a_begin_that_needs_a_review_counts_as_refused_for_those_chained_to_it(api: Api, database: str):
    run = held_run(api)
    api.fail_step(run, api.begin_step(run, "s", "a", options={"replay": "manual"})["step"]["id"], "a",
                  resumeDecision="manual_review")["step"]
    assert write_each(database, begin_field(run, "s"), record(run, "t", chained=True),
                      finish(run, chained=True)) == ["manual_review", "prior_refused", "prior_refused"]


def test_however_many_are_refused_no_chained_write_overtakes(api: Api, database: str):
    """Where a call does not reach all of them, those chained to a refused one are answered all the same."""
    run, busy = held_run(api), held_run(api)
    noise = [each for n in range(100) for each in (begin_field(busy, f"s{n}"), finish("nowhere"))]
    answers = write_each(database, record(run, "one", lease_owner="b"), *noise, record(run, "two", chained=True),
                         record(busy, "last", chained=True))
    assert answers[0] == "lease_lost"
    assert answers[-2:] == ["prior_refused", None]
    assert 404 in answers
    assert None in answers[1:-2]
    assert api.detail(run)["steps"] == []


def test_failures_of_steps_and_runs_come_in_batches_too(api: Api, database: str):
    run = held_run(api)
    step_id = api.begin_step(run, "s", "a")["step"]["id"]
    fail_step = {"do": "fail_step", "run_id": run, "step_id": step_id, "lease_owner": "a", "retryable": False,
                 "payload": '{"message": "boom"}'}
    fail_run = {"do": "fail_run", "run_id": run, "lease_owner": "a", "retryable": False, "failure_class": "mine",
                "payload": '"no"'}
    assert write_each(database, fail_step, {**fail_run, "lease_owner": "b"}, fail_run) == [True, "lease_lost", True]
    assert api.detail(run)["steps"][0]["error"] == {"message": "boom"}
    assert {key: api.run(run)[key] for key in ("status", "error", "failureClass")} == {
        "status": "failed", "error": "no", "failureClass": "mine"}
    assert api.event_types(run)[2:] == ["step.started", "step.failed", "run.failed"]


# ------------------------------------------------------------------------------
# The same as the verbs
# ------------------------------------------------------------------------------
PAYLOADS = {"record_step": {"p_input": "input", "p_output": "output", "p_error": "error"},
            "begin_step": {"p_input": "input"}, "complete_step": {"p_output": "output"},
            "fail_step": {"p_error": "error"}, "complete_run": {"p_result": "output"}, "fail_run": {"p_error": "error"}}
ARGUMENTS = {"record_step": {"p_resume_decision": None, "p_started_at": None, "p_duration_ms": None},
             "fail_step": {"p_resume_decision": None}, "complete_run": {"p_brief": False},
             "fail_run": {"p_failure_class": None}}


def call_verb(connection: psycopg.Connection[Any], write: dict[str, Any]) -> tuple[Any, int]:
    """Make one write by its verb alone.  :returns: the answer and its status, as write_each gives them."""
    verb, fields = write["do"], {key: value for key, value in write.items()
                                 if key not in ("do", "chained", "input", "output", "error")}
    if verb == "enqueue_run":
        arguments = {"p_queue": write["queue"], "p_job": json.dumps(fields), "p_input": write["input"]}
    elif verb == "create_child":
        arguments = {"p_run_id": write["run_id"], "p_child": json.dumps(fields), "p_input": write["input"]}
    else:
        arguments = ARGUMENTS.get(verb, {}) | {f"p_{key}": json.dumps(value) if key == "options" else value
                                               for key, value in fields.items()}
        arguments |= {name: write.get(key) for name, key in PAYLOADS[verb].items()}
    named = SQL(", ").join(SQL("{} => %s").format(Identifier(name)) for name in arguments)
    try:
        with connection.transaction():
            [row] = connection.execute(SQL("select * from tidebase.{}({})").format(Identifier(verb), named),
                                       list(arguments.values())).fetchall()
        return (row[0], row[1] if len(row) > 1 else 200)
    except psycopg.Error as error:
        if not str(error.sqlstate).startswith("TB"):
            raise
        return json.loads(error.diag.message_detail), int(error.sqlstate[2:])


def by_verbs(connection: psycopg.Connection[Any], batch: list[Any]) -> list[tuple[Any, int]]:
    answers, refused_runs = [], set()
    for write in batch:
        answer = ({"code": "prior_refused"}, 409) if write.get("chained") and write.get("run_id") in refused_runs else (
            call_verb(connection, write))
        if answer[1] != 200:
            refused_runs.add(write.get("run_id"))
        answers.append(answer)
    return answers


def by_batch(connection: psycopg.Connection[Any], batch: list[Any]) -> list[tuple[Any, int]]:
    payloads = [[write.get(key) for write in batch] for key in ("input", "output", "error")]
    fields = [{key: value for key, value in write.items() if key not in ("input", "output", "error")}
              for write in batch]
    with connection.transaction():
        return connection.execute("select body, status from tidebase.write_each("
                                  "%s, %s::json[], %s::json[], %s::json[])", [json.dumps(fields), *payloads]).fetchall()


def world(connection: psycopg.Connection[Any], name: str) -> dict[str, str]:
    """Runs in all states that matter, their ids beginning with this name; and the ids of two steps begun."""
    def job(run: str, **more: Any) -> None:
        fields = {"id": f"{name}{run}", "workflow_name": "w", "metadata": {}, "channels": [], "max_attempts": 2,
                  "priority": 0, **more}
        connection.execute("select tidebase.enqueue_run(%s, %s, '1')", (f"{name}q", json.dumps(fields)))

    def claim(owner: str) -> None:
        connection.execute("select tidebase.claim_runs(array[%s], %s, null, 10, 60000, false)", (f"{name}q", owner))

    def begin(run: str, step: str) -> str:
        [(step_id,)] = connection.execute("select body #>> '{step,id}' from tidebase.begin_step("
                                          "%s, %s, 'h', null, '{}', 'a', 60000)", (f"{name}{run}", step)).fetchall()
        return str(step_id)

    for run in ("mine", "also", "again"):
        job(run)
    job("keyed", dedupe_key="k")
    job("told", channels=[{"type": "webhook", "url": "http://127.0.0.1:9/"}])
    job("parent")
    claim("a")
    for child in ("child", "other"):
        connection.execute("select tidebase.create_child(%s, %s, '1')", (f"{name}parent", json.dumps({
            "id": f"{name}{child}", "name": child, "workflow_name": "w", "metadata": {}, "channels": [],
            "max_attempts": 1, "priority": 0, "edge_type": "child", "edge_metadata": {}, "queue": f"{name}q"})))
    claim("a")
    connection.execute("select tidebase.wait_run(%s, 'a', '{\"children\": true}', null)", (f"{name}parent",))
    job("theirs")
    claim("b")
    job("queued")
    steps = {"begun": begin("mine", "begun"), "again": begin("again", "begun")}
    connection.execute("select tidebase.fail_run(%s, 'a', '\"e\"', null, true)", (f"{name}again",))
    connection.execute("update tidebase.runs set run_at = tidebase.now() where id = %s", (f"{name}again",))
    return steps


RUNS = ("mine", "mine", "mine", "also", "again", "keyed", "told", "parent", "child", "other", "theirs", "queued",
        "nowhere", "new1")
OPTIONS = ({}, {}, {"sideEffects": ["read"]}, {"idempotencyKey": "k"}, {"replay": "never", "verifiedBy": "me"},
           {"credentials": "c", "checkpointInvariant": [1]})


def draw(random: random.Random, name: str, steps: dict[str, str]) -> dict[str, Any]:
    """A write that may be plain, may be refused, may depend on those before it."""
    run, owner = name + random.choice(RUNS), random.choice("aaaaab")
    held_by = {"run_id": run, "lease_owner": owner, "chained": random.random() < 0.3}
    step = {"name": random.choice("stuvwxyz"), "input_hash": random.choice("hhhhhhhx"),
            "options": random.choice(OPTIONS)}
    job = {"workflow_name": random.choice("wwwv"), "metadata": {"n": random.random()}, "max_attempts": 3, "priority": 1,
           "input": "[1]", "channels": random.choice([[], [], [{"type": "webhook", "url": "http://127.0.0.1:9/"}]])}
    match random.choices(["record", "failed", "begin", "end", "fail_step", "complete", "fail", "enqueue", "child"],
                         [12, 1, 2, 1, 1, 4, 1, 4, 1])[0]:
        case "record" | "failed" as kind:
            return {"do": "record_step", **held_by, **step, "retryable": False, "brief": random.random() < 0.9,
                    "input": random.choice([None, '{"a": 1.0}']), "output": random.choice(["1", None, '"\\u0000"']),
                    "error": '"e"' if kind == "failed" else None,
                    **random.choice([{}, {"duration_ms": 5}, {"started_at": STARTED}])}
        case "begin":
            return {"do": "begin_step", **held_by, **step, "lease_ms": 60000, "input": "1"}
        case "end":
            return {"do": "complete_step", **held_by, "step_id": steps["begun"], "output": "2"}
        case "fail_step":
            return {"do": "fail_step", **held_by, "step_id": steps["begun"], "retryable": True, "error": '"e"'}
        case "complete":
            return {"do": "complete_run", **held_by, "brief": random.random() < 0.9, "output": '{"b": 1.0}'}
        case "fail":
            return {"do": "fail_run", **held_by, "retryable": random.random() < 0.5, "error": '{"name": "E"}'}
        case "enqueue":
            return {"do": "enqueue_run", "queue": name + "q", **job, **random.choice([
                {}, {"id": f"{name}new{random.randint(1, 4)}"}, {"id": name + "mine"}, {"dedupe_key": "k"},
                {"dedupe_key": "j"}])}
    return {"do": "create_child", **held_by, **job, "name": random.choice("cd"), "edge_type": "e", "edge_metadata": {},
            **random.choice([{}, {"queue": name + "q"}, {"id": f"{name}new1"}])}


def told(value: Any, names: dict[str, str]) -> Any:
    """A row or an answer without times and with the names of what has a generated id."""
    if isinstance(value, dict):
        return {key: told(member, names) for key, member in value.items() if not key.endswith(("At", "_at"))}
    if isinstance(value, (list, tuple)):
        return [told(member, names) for member in value]
    return re.sub(r"^[xy]\d+", "", names.get(value, value)) if isinstance(value, str) else value


def left(connection: psycopg.Connection[Any], name: str) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """All rows that the database has of one world, and what its generated ids stand for."""
    ids = [run for run, in connection.execute(
        "select id from tidebase.runs where queue = %s or id like %s or parent_run_id like %s",
        (name + "q", name + "%", name + "%"))]
    rows = {table: [row for row, in connection.execute(
        SQL("select to_json(t) from tidebase.{} t where {} = any (%s)").format(Identifier(table), Identifier(of)),
        (ids,))] for table, of in {"runs": "id", "steps": "run_id", "events": "run_id", "channels": "run_id",
                                   "run_edges": "parent_run_id"}.items()}
    rows["tallies"] = connection.execute("select status, sum(runs)::integer from tidebase.queue_tallies"
                                         " where queue = %s group by status", (name + "q",)).fetchall()
    names = {step["id"]: f"step {step['name']}" for step in rows["steps"]}
    names |= {run["id"]: f"run {run['metadata']['n']}" for run in rows["runs"] if run["id"].startswith("run_")}
    names |= {edge["id"]: f"edge {edge['name']}" for edge in rows["run_edges"]}
    names |= {channel["id"]: "channel" for channel in rows["channels"]}
    for event in rows["events"]:
        del event["id"]
    return rows, names


@pytest.mark.parametrize("seed", range(12))
def test_random_batches_leave_and_answer_what_the_verbs_do_one_by_one(database: str, seed: int) -> None:
    answers: dict[str, list[Any]] = {}
    rows: dict[str, dict[str, set[str]]] = {}
    with psycopg.connect(database, autocommit=True) as connection:
        for side, make in (("x", by_verbs), ("y", by_batch)):
            name = f"{side}{seed}"
            steps, drawn = world(connection, name), random.Random(seed)
            given = [make(connection, [draw(drawn, name, steps) for _ in range(size)]) for size in (12, 40, 3)]
            found, names = left(connection, name)
            answers[side] = [(told(body.get("code", body), names), status) for some in given for body, status in some]
            rows[side] = {table: sorted(json.dumps(told(row, names), sort_keys=True) for row in some)
                          for table, some in found.items()}
    assert answers["y"] == answers["x"]
    for table, left_by_verbs in rows["x"].items():
        assert rows["y"][table] == left_by_verbs


# ------------------------------------------------------------------------------
# None at all
# ------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [
    [], {}, None, "x", [5], [{}], [None], [{"do": 5}], [{"do": "cancel_run", "runId": "r"}], [{"runId": "r"}]])
def test_what_is_no_list_of_writes_is_refused(api: Api, wrong: Any) -> None:
    refused(api.post("/writes", {"writes": wrong}), 400, "invalid_request")


def test_a_malformed_one_is_named_and_nothing_is_written(api: Api) -> None:
    run = held_run(api)
    body = refused(api.post("/writes", {"writes": [step(run), job(priority="high"), step(run, name=5)]}),
                   400, "invalid_request")
    assert sorted(issue["path"] for issue in body["issues"]) == ["writes.1.priority", "writes.2.name"]
    body = refused(api.post("/writes", {"writes": [step(run), {**job(), "do": "enqueue"}]}), 400, "invalid_request")
    assert [issue["path"] for issue in body["issues"]] == ["writes.1.do"]
    assert api.detail(run)["steps"] == []
    assert api.get("/queues")["queues"] == []


# ------------------------------------------------------------------------------
# Crossing
# ------------------------------------------------------------------------------
def test_batches_that_cross_each_other_all_get_through(api: Api) -> None:
    runs = [held_run(api) for _ in range(12)]
    keys = [f"k{number}" for number in range(12)]

    def batch(number: int) -> Answer:
        order = slice(None, None, 1 if number % 2 else -1)
        return api.post("/writes", {"writes": [
            *(job(dedupeKey=key) for key in keys[order]),
            *(step(run, f"s{number}", output=number) for run in runs[order]),
            *(completion(run, leaseOwner="b") for run in runs[order])]})

    def enqueue(number: int) -> Answer:
        return api.post("/queues/q/enqueue", {"runs": [
            {"workflowName": "w", "dedupeKey": key} for key in keys[:: 1 if number % 2 else -1]]})

    with together(*[lambda n=n: batch(n) for n in range(8)], *[lambda n=n: enqueue(n) for n in range(4)]) as answers:
        pass
    for answer in answers[:8]:
        assert codes(answer["results"]) == [None] * 24 + ["lease_lost"] * 12, answer
    assert all(answer.status == 200 for answer in answers)
    assert api.queue("q")["queued"] == 12
    for run in runs:
        assert len(api.events(run)) == 2 + 16
