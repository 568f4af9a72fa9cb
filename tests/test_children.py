"""Runs that come from runs: a child is made once per parent and name, and a fork starts where its origin was good.

Also the order of a run's steps, which a fork takes along, and a cancellation, which reaches every live descendant.
"""

from __future__ import annotations

import re
from typing import Any

import psycopg
import pytest
from conftest import Answer, Api, refused, together

EDGE_KEYS = {"id", "parentRunId", "childRunId", "name", "edgeType", "metadata", "createdAt"}


def child(api: Api, parent: str, name: str = "part", workflow: str = "sub", **body: Any) -> Answer:
    return api.post(f"/runs/{parent}/children", {"name": name, "workflowName": workflow, **body})


def child_id(api: Api, parent: str, name: str = "part", **body: Any) -> str:
    return child(api, parent, name, **body)["run"]["id"]


def fork(api: Api, run: str, **body: Any) -> Answer:
    return api.post(f"/runs/{run}/fork", body)


def cancel(api: Api, run: str, **body: Any) -> Answer:
    return api.post(f"/runs/{run}/cancel", body)


def steps(api: Api, run: str) -> list[str]:
    return [step["name"] for step in api.detail(run)["steps"]]


def three_steps(api: Api, **body: Any) -> str:
    """A run that did three steps and began a fourth."""
    run = api.create(**body)
    api.begin(run, "a")["run"]
    for number, name in enumerate(["plan", "gather", "write"]):
        api.do_step(run, name, "a", {"n": number}, input={"i": number}, options={"idempotencyKey": name})
    api.begin_step(run, "send", "a")["step"]
    return run


# --- children


def test_a_child_is_a_run_that_knows_its_parent_and_the_parent_knows_it(api):
    parent = api.create()
    answer = child(api, parent, "part/1", input={"x": 1}, metadata={"k": 2}, edgeType="fanout", edgeMetadata={"e": 3},
                   channels=[{"type": "webhook", "url": "http://127.0.0.1:1/", "secret": "hush"}])
    run, edge = answer["run"], answer["edge"]
    assert answer["created"] is True
    assert (run["workflowName"], run["status"], run["input"], run["queue"]) == ("sub", "pending", {"x": 1}, None)
    assert run["metadata"] == {"k": 2, "parentRunId": parent, "parentEdgeName": "part/1"}
    assert edge.keys() == EDGE_KEYS
    assert re.fullmatch(r"edge_[0-9a-f]{32}", edge["id"])
    assert (edge["parentRunId"], edge["childRunId"], edge["name"], edge["edgeType"], edge["metadata"]) == (
        parent, run["id"], "part/1", "fanout", {"e": 3})
    detail = api.detail(parent)
    assert (detail["runEdges"], detail["childRuns"]) == ([edge], [run])
    created, = api.events(run["id"])
    assert (created["type"], created["payload"]["parentRunId"], created["payload"]["edgeName"]) == (
        "run.created", parent, "part/1")
    assert created["payload"].keys() == {"workflowName", "input", "channels", "parentRunId", "edgeName"}
    told = api.events(parent)[-1]
    assert (told["type"], told["payload"]) == ("run.child.created", {"childRun": run, "edge": edge})
    assert "hush" not in api.get(f"/runs/{parent}").text + api.get(f"/runs/{run['id']}").text


def test_a_child_asked_for_again_is_the_same_child(api):
    parent, other = api.create(), api.create()
    first = child(api, parent, input={"x": 1})
    again = child(api, parent, input={"x": 2}, metadata={"late": True})
    assert again.json == {**first.json, "created": False}
    assert child_id(api, other) != first["run"]["id"]
    assert child_id(api, parent, "another") != first["run"]["id"]
    assert api.event_types(parent).count("run.child.created") == 2
    refused(child(api, parent, workflow="other"), 409, "edge_conflict")


def test_children_stand_in_the_order_they_were_made_in(api):
    parent = api.create()
    ids = [child_id(api, parent, name) for name in "badce"]
    detail = api.detail(parent)
    assert [edge["name"] for edge in detail["runEdges"]] == list("badce")
    assert [run["id"] for run in detail["childRuns"]] == ids


def test_a_child_needs_a_parent_that_is_not_cancelled(api):
    refused(child(api, "run_0"), 404, "not_found")
    parent = api.create()
    first = child(api, parent)
    cancel(api, parent)["run"]
    assert refused(child(api, parent, "late"), 409, "run_cancelled")["run"]["id"] == parent
    assert child(api, parent)["run"]["id"] == first["run"]["id"]  # what was made is still to be found
    assert len(api.detail(parent)["childRuns"]) == 1


def test_a_child_does_not_take_the_id_of_another_run(api):
    parent, taken = api.create(), api.create("sub")
    for run in (taken, parent):
        refused(child(api, parent, id=run), 409, "run_id_conflict")
    assert child(api, parent, id="my:child")["run"]["id"] == "my:child"
    assert child(api, parent, id="another")["run"]["id"] == "my:child"  # the name decides
    assert api.event_types(parent) == ["run.created", "run.child.created"]


def test_a_child_of_the_wrong_shape_is_refused_and_names_the_field(api):
    parent = api.create()
    cases = [({"name": ""}, "name"), ({"name": None}, "name"), ({"name": "\0"}, "name"),
             ({"workflowName": ""}, "workflowName"), ({"workflowName": 5}, "workflowName"),
             ({"edgeType": ""}, "edgeType"), ({"edgeMetadata": []}, "edgeMetadata"), ({"metadata": "x"}, "metadata"),
             ({"channels": [{}]}, "channels.0.type"), ({"recoveryWebhook": "mailto:a@b"}, "recoveryWebhook"),
             ({"id": "a b"}, "id")]
    for change, path in cases:
        body = {"name": "part", "workflowName": "sub", **change}
        issues = refused(api.post(f"/runs/{parent}/children", body), 400, "invalid_request")["issues"]
        assert path in [issue["path"] for issue in issues], change
    assert api.event_types(parent) == ["run.created"]


# --- cancelled with their parent


def test_a_cancelled_parent_cancels_its_live_children_and_theirs_and_nobody_else(api):
    root = api.create()
    pending, running, done, failed = (child_id(api, root, name) for name in ("pending", "running", "done", "failed"))
    grandchild = child_id(api, running, channels=[{"type": "webhook", "url": "http://127.0.0.1:1/"}])
    sibling, stranger = api.create(), child_id(api, api.create())
    for run in (running, grandchild, done, failed):
        api.begin(run, "a")["run"]
    api.complete(done)["run"]
    api.fail(failed)["run"]
    cancel(api, root, reason="enough", actor="ann")["run"]
    for run in (pending, running, grandchild):
        shown = api.run(run)
        assert (shown["status"], shown["cancelReason"], shown["cancelActor"], shown["leaseOwner"]) == (
            "cancelled", "enough", "ann", None)
        assert api.event_types(run).count("run.cancelled") == 1
    assert api.detail(grandchild)["channelDeliveries"][0]["eventType"] == "run.cancelled"
    assert refused(api.heartbeat(grandchild, "a"), 409, "run_cancelled")
    assert [api.run(run)["status"] for run in (done, failed, sibling, stranger)] == [
        "completed", "failed", "pending", "pending"]
    cancel(api, root, reason="again")["run"]
    assert api.run(grandchild)["cancelReason"] == "enough"


def test_a_cancelled_child_leaves_its_parent_alone(api):
    parent = api.create()
    one, two = child_id(api, parent, "one"), child_id(api, parent, "two")
    cancel(api, one)["run"]
    assert [api.run(run)["status"] for run in (parent, two)] == ["pending", "pending"]


def test_a_child_cancelled_before_keeps_its_reason(api):
    parent = api.create()
    one = child_id(api, parent)
    cancel(api, one, reason="first")["run"]
    cancel(api, parent, reason="second")["run"]
    assert api.run(one)["cancelReason"] == "first"
    assert api.event_types(one).count("run.cancelled") == 1


def test_a_deadline_cancels_the_children_too(api, clock):
    parent = api.create(deadlineMs=1000)
    one = child_id(api, parent)
    clock.advance(ms=1000)
    assert api.reconcile() >= 1
    shown = api.run(one)
    assert (shown["status"], shown["cancelReason"], shown["cancelActor"]) == ("cancelled", "deadline", "reconciler")


def test_descendants_of_any_depth_are_cancelled(api, sql):
    depth = 2000
    sql("insert into tidebase.runs (id, workflow_name, status, event_seq) select 'run_' || n, 'w', 'pending', 0"
        " from generate_series(0, %s) n", depth)
    sql("insert into tidebase.run_edges (id, parent_run_id, child_run_id, name, edge_type)"
        " select 'edge_' || n, 'run_' || n - 1, 'run_' || n, 'next', 'child' from generate_series(1, %s) n", depth)
    assert cancel(api, "run_0")["run"]["status"] == "cancelled"
    assert sql("select status, count(*) from tidebase.runs group by status") == [("cancelled", depth + 1)]
    assert api.event_types(f"run_{depth}") == ["run.cancelled"]


# --- forks


def test_a_fork_starts_with_copies_of_all_checkpoints_and_leaves_its_origin_alone(api):
    run = three_steps(api, input={"topic": "ast"}, metadata={"k": 1},
                      channels=[{"type": "webhook", "url": "http://127.0.0.1:1/"}])

    def origin() -> dict[str, Any]:
        told = api.get(f"/runs/{run}").json  # why it waits says for how many seconds already
        return {**told, "run": {key: value for key, value in told["run"].items() if not key.startswith("why")}}

    before = origin()
    answer = fork(api, run)
    made = answer["run"]
    assert answer["created"] is True
    assert (made["workflowName"], made["input"], made["status"], made["attempt"], made["leaseOwner"]) == (
        "report", {"topic": "ast"}, "pending", 0, None)
    assert made["metadata"] == {"k": 1, "forkedFrom": run, "forkedFromStep": None}
    detail = api.detail(made["id"])
    originals = api.detail(run)["steps"]
    assert steps(api, made["id"]) == ["plan", "gather", "write"]
    for copy, original in zip(detail["steps"], originals, strict=False):
        assert copy["id"] != original["id"]
        assert copy["runId"] == made["id"]
        for key in ("name", "inputHash", "input", "options", "resumeContract", "status", "output"):
            assert copy[key] == original[key]
    assert api.event_types(made["id"]) == ["run.created"]
    api.begin(made["id"], "b")["run"]
    for number, name in enumerate(["plan", "gather", "write"]):
        begun = api.begin_step(made["id"], name, "b")
        assert (begun["action"], begun["output"]) == ("return", {"n": number})
    assert api.begin_step(run, "plan", "b", "other")["action"] == "input_mismatch"
    assert api.begin_step(made["id"], "send", "b")["action"] == "execute"
    assert origin() == before


def test_a_copied_checkpoint_answers_whatever_input_changed_code_gives_it(api):
    made = fork(api, fork(api, three_steps(api))["run"]["id"])["run"]["id"]
    told = api.begin(made, "b", checkpoints=True)["checkpoints"]
    assert [(step["name"], step["copied"]) for step in told] == [(name, True) for name in ("plan", "gather", "write")]
    begun = api.begin_step(made, "plan", "b", "other")
    assert (begun["action"], begun["output"]) == ("return", {"n": 0})
    for _ in range(2):
        recorded = api.post(f"/runs/{made}/steps", {"name": "gather", "inputHash": "other", "leaseOwner": "b",
                                                    "output": "another"})["step"]
        assert (recorded["output"], recorded["inputHash"]) == ({"n": 1}, "h")
    api.do_step(made, "its own", "b", 1)
    assert api.begin_step(made, "its own", "b", "other")["action"] == "input_mismatch"
    assert [step["copied"] for step in api.begin(made, "b", checkpoints=True)["checkpoints"]] == [True] * 3 + [False]


@pytest.mark.parametrize(("from_step", "kept"), [
    ("plan", []), ("gather", ["plan"]), ("write", ["plan", "gather"]), ("send", ["plan", "gather", "write"])])
def test_a_fork_from_a_step_keeps_what_was_begun_before_it(api, from_step, kept):
    run = three_steps(api)
    made = fork(api, run, fromStep=from_step)["run"]
    assert steps(api, made["id"]) == kept
    assert made["metadata"] == {"forkedFrom": run, "forkedFromStep": from_step}
    api.begin(made["id"], "b")["run"]
    assert api.begin_step(made["id"], from_step, "b")["action"] == "execute"


def test_a_fork_may_have_another_input(api):
    run = api.create(input={"topic": "ast"})
    for body, text in ((b'{"input": {"b": 1.0, "a": 2}}', '{"b": 1.0, "a": 2}'), (b'{"input": 0}', "0"),
                       (b'{"input": null}', '{"topic": "ast"}'), (b"{}", '{"topic": "ast"}')):
        assert f'"input" : {text}' in api.post(f"/runs/{run}/fork", raw=body).text


def test_only_checkpoints_are_copied(api):
    run = api.create()
    api.begin(run, "a")["run"]
    api.do_step(run, "done", "a", 1)
    failures = {"failed": {}, "again": {"retryable": True}, "review": {"resumeDecision": "manual_review"}}
    for name, failure in failures.items():
        api.fail_step(run, api.begin_step(run, name, "a")["step"]["id"], "a", **failure)["step"]
    api.do_step(run, "last", "a", 2)
    api.fail(run)["run"]
    made = fork(api, run)["run"]["id"]
    assert steps(api, made) == ["done", "last"]
    assert steps(api, fork(api, run, fromStep="review")["run"]["id"]) == ["done"]
    assert api.run(run)["status"] == "failed"


@pytest.mark.parametrize("ending", ["complete", "fail", "cancel"])
def test_a_run_that_ended_can_be_forked(api, ending):
    run = three_steps(api)
    api.post(f"/runs/{run}/{ending}", {"error": "boom", "result": 1})["run"]
    made = fork(api, run)["run"]
    assert (made["status"], made["result"], made["error"], made["cancelReason"]) == ("pending", None, None, None)
    assert len(steps(api, made["id"])) == 3


def test_the_fork_of_a_job_is_a_job(api):
    run = api.enqueue("mail", priority=3, maxAttempts=7, dedupeKey="k")
    api.claim("mail", owner="a")
    api.do_step(run, "plan", "a", 1)
    made = fork(api, run)["run"]
    assert (made["status"], made["queue"], made["priority"], made["maxAttempts"], made["dedupeKey"]) == (
        "queued", "mail", 3, 7, None)
    assert api.event_types(made["id"]) == ["run.created", "run.enqueued"]
    taken, = api.claim("mail", owner="b", checkpoints=True)
    assert taken["id"] == made["id"]
    assert [checkpoint["name"] for checkpoint in taken["checkpoints"]] == ["plan"]


@pytest.mark.parametrize(("of_job", "attempts"), [(True, 7), (False, 3)])
def test_a_fork_may_have_a_queue_of_its_own(api, of_job, attempts):
    run = api.enqueue("mail", maxAttempts=7) if of_job else three_steps(api)
    made = fork(api, run, queue="other")["run"]
    assert (made["status"], made["queue"], made["maxAttempts"]) == ("queued", "other", attempts)
    assert [taken["id"] for taken in api.claim("other")] == [made["id"]]


def test_the_fork_of_a_fork_keeps_the_order_of_the_steps(api):
    run = three_steps(api)
    first = fork(api, run, fromStep="write")["run"]["id"]
    api.begin(first, "b")["run"]
    for name in ("alternative", "a second"):
        api.do_step(first, name, "b", name)
    second = fork(api, first)["run"]["id"]
    assert steps(api, second) == ["plan", "gather", "alternative", "a second"]
    assert steps(api, fork(api, second, fromStep="alternative")["run"]["id"]) == ["plan", "gather"]


def test_a_fork_that_is_asked_for_twice_is_made_once(api):
    run, other = three_steps(api), api.create("another")
    first = fork(api, run, id="my:fork", fromStep="write")
    assert fork(api, run, id="my:fork", fromStep="write").json == {**first.json, "created": False}
    assert api.event_types("my:fork") == ["run.created"]
    refused(fork(api, other, id="my:fork"), 409, "run_id_conflict")


def test_what_is_not_there_cannot_be_forked(api):
    run = three_steps(api)
    refused(fork(api, "run_0"), 404, "not_found")
    refused(fork(api, run, fromStep="nothing"), 404, "not_found")
    for change, path in (({"fromStep": None}, "fromStep"), ({"fromStep": ""}, "fromStep"),
                         ({"fromStep": 1}, "fromStep"), ({"id": "a b"}, "id"), ({"id": None}, "id")):
        issues = refused(fork(api, run, **change), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == [path], change
    assert len(api.get("/runs")["runs"]) == 1


# --- the order of steps


def test_steps_stand_in_the_order_of_their_first_begin(api):
    run = api.create()
    api.begin(run, "a")["run"]
    begun = {name: api.begin_step(run, name, "a")["step"]["id"] for name in ("z", "m", "a")}
    api.complete_step(run, begun["a"], "a")["step"]
    api.fail_step(run, begun["z"], "a", retryable=True)["step"]
    api.complete_step(run, begun["m"], "a")["step"]
    record = {"inputHash": "h", "leaseOwner": "a", "output": 1}
    api.post(f"/runs/{run}/steps", {"name": "recorded", **record})["step"]
    api.post("/steps", {"records": [{"runId": run, "name": name, **record} for name in ("y", "b")]})["results"]
    assert api.begin_step(run, "z", "a")["step"]["attempt"] == 2
    assert steps(api, run) == ["z", "m", "a", "recorded", "y", "b"]


# --- races


def test_of_eight_first_requests_for_a_child_one_makes_it(api):
    parent = api.create()
    with together(*[lambda: child(api, parent)] * 8) as answers:
        assert sorted(answer["created"] for answer in answers) == [False] * 7 + [True]
        assert len({answer["run"]["id"] for answer in answers}) == 1
    assert api.event_types(parent) == ["run.created", "run.child.created"]
    assert len(api.get("/runs")["runs"]) == 2


def test_of_six_forks_with_one_id_one_is_made(api):
    run = three_steps(api)
    with together(*[lambda: fork(api, run, id="my:fork")] * 6) as answers:
        assert sorted(answer["created"] for answer in answers) == [False] * 5 + [True]
    assert steps(api, "my:fork") == ["plan", "gather", "write"]


def test_children_made_while_their_parent_is_cancelled_are_refused_or_cancelled(api):
    parent = api.create()
    makers = [lambda n=n: child(api, parent, f"part {n}") for n in range(8)]
    with together(*makers, lambda: cancel(api, parent)) as answers:
        for answer in answers[:-1]:
            if answer.status == 200:
                assert api.run(answer["run"]["id"])["status"] == "cancelled"
            else:
                refused(answer, 409, "run_cancelled")
    api.events(parent)


def test_a_child_that_completes_while_its_parent_is_cancelled_does_not_keep_the_parent_alive(api, blocked, database):
    parent = api.create()
    done, other = child_id(api, parent, "done"), child_id(api, parent, "other")
    with psycopg.connect(database) as connection:
        connection.execute("select tidebase.complete_run(%s, null, null)", (done,))
        with together(lambda: cancel(api, parent), lambda: (blocked(1), connection.commit())) as answers:
            assert answers[0]["run"]["status"] == "cancelled"
    assert [api.run(run)["status"] for run in (done, other)] == ["completed", "cancelled"]


def test_a_run_that_completes_as_its_deadline_passes_does_not_hold_up_the_reconciler(api, clock, database):
    run, other = api.create(deadlineMs=1000), api.create(deadlineMs=1000)
    clock.advance(ms=1000)
    with psycopg.connect(database) as connection:
        connection.execute("select tidebase.complete_run(%s, null, null)", (run,))
        assert api.reconcile() == 1
    assert api.reconcile() == 0
    assert [api.run(one)["status"] for one in (run, other)] == ["completed", "cancelled"]


def test_a_tree_cancelled_from_several_of_its_runs_at_once_ends_up_cancelled(api):
    root = api.create()
    family = [child_id(api, root, f"c{n}") for n in range(4)]
    family += [child_id(api, parent, f"g{n}") for parent in family for n in range(2)]
    with together(*[lambda run=run: cancel(api, run, actor=run) for run in [root, *family[::3]]]) as answers:
        assert {answer.status for answer in answers} == {200}
    for run in [root, *family]:
        assert api.event_types(run).count("run.cancelled") == 1
