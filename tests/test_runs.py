"""A run is begun by one worker, ended once, and whatever its owner says again changes nothing.

The story of a plain run and of a queued one, verb by verb; the list, its filters and its cursor; the detail.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from conftest import LEASE_MS, Answer, Api, Clock, refused, together

RUN_KEYS = {
    "id", "workflowName", "input", "metadata", "status", "result", "error", "recoveryWebhook", "leaseOwner",
    "leaseExpiresAt", "attempt", "queue", "dedupeKey", "priority", "runAt", "maxAttempts", "deadlineAt",
    "cancelRequestedAt", "cancelledAt", "cancelReason", "cancelActor", "failureClass", "createdAt", "updatedAt",
    "completedAt", "stalled"}
DETAIL_KEYS = [
    "run", "steps", "state", "stateStreams", "stateVersions", "runEdges", "childRuns", "recoveryAttempts", "channels",
    "channelDeliveries", "gates", "usage", "events"]
HOOK = "http://127.0.0.1:9/hook"  # nobody listens there: what is posted stays in the outbox


def claimed(api: Api, owner: str = "a", **body: Any) -> str:
    """A run of the queue `default` that `owner` holds."""
    run = api.enqueue(**body)
    assert [taken["id"] for taken in api.claim(owner=owner)] == [run]
    return run


# ------------------------------------------------------------------------------
# The plain story
# ------------------------------------------------------------------------------
def test_a_plain_run_is_created_begun_and_completed(api: Api) -> None:
    run = api.create("report", input={"topic": "ast"}, metadata={"tenant": "x"})
    created = api.run(run)
    assert set(created) >= RUN_KEYS  # keys that are added are nobody's harm
    assert (created["status"], created["attempt"], created["maxAttempts"], created["queue"]) == ("pending", 0, 1, None)
    assert (created["input"], created["metadata"]) == ({"topic": "ast"}, {"tenant": "x"})

    begun = api.begin(run, "a")
    assert begun["leaseOwner"] == "a"
    assert (begun["run"]["status"], begun["run"]["attempt"], begun["run"]["leaseOwner"]) == ("running", 1, "a")

    ended = api.complete(run, result={"pages": 3}, leaseOwner="a")["run"]
    assert (ended["status"], ended["result"], ended["leaseOwner"]) == ("completed", {"pages": 3}, None)
    assert ended["completedAt"]
    assert api.event_types(run) == ["run.created", "run.started", "run.completed"]


def test_what_is_left_out_of_a_new_run_is_an_empty_object(api: Api) -> None:
    run = api.post("/runs/report")["run"]
    assert (run["input"], run["metadata"]) == ({}, {})
    assert run["id"].startswith("run_")
    assert len(run["id"]) == len("run_") + 32
    created = api.events(run["id"])[0]
    assert created["payload"] == {"workflowName": "report", "input": {}, "channels": []}


def test_a_client_chosen_id_creates_once_and_then_answers_the_run_that_is_there(api: Api) -> None:
    first = api.post("/runs/report", {"id": "my.run:1", "input": 1})
    again = api.post("/runs/report", {"id": "my.run:1", "input": 2})
    assert (first["created"], again["created"]) == (True, False)
    assert again["run"] == first["run"]
    assert api.event_types("my.run:1") == ["run.created"]
    refused(api.post("/runs/other", {"id": "my.run:1"}), 409, "run_id_conflict")


@pytest.mark.parametrize("bad", ["", "a b", "a/b", "ü", "x" * 129, "a\n"])
def test_an_id_that_no_path_could_carry_is_refused(api: Api, bad: str) -> None:
    refused(api.post("/runs/report", {"id": bad}), 400, "invalid_request")


def test_of_eight_creations_with_one_id_exactly_one_creates(api: Api) -> None:
    with together(*[lambda: api.post("/runs/report", {"id": "r"})["created"]] * 8) as created:
        assert sorted(created) == [False] * 7 + [True]
    assert api.event_types("r") == ["run.created"]


def test_a_begin_without_an_owner_makes_one(api: Api) -> None:
    run = api.create()
    owner = api.begin(run)["leaseOwner"]
    assert owner
    assert api.run(run)["leaseOwner"] == owner
    assert api.heartbeat(run, owner)["run"]["status"] == "running"


def test_a_begin_by_the_holder_again_spends_no_attempt(api: Api) -> None:
    run = api.create()
    api.begin(run, "a")
    assert api.begin(run, "a")["run"]["attempt"] == 1
    assert api.event_types(run) == ["run.created", "run.started"]


def test_a_live_lease_of_another_owner_is_named_to_who_begins(api: Api) -> None:
    run = api.create()
    api.begin(run, "a")
    body = refused(api.begin(run, "b"), 409, "run_leased")
    assert body["leaseOwner"] == "a"
    assert api.run(run)["leaseOwner"] == "a"


def test_a_completed_run_is_begun_to_read_its_result(api: Api) -> None:
    run = api.create()
    api.complete(run, result=7)
    answer = api.begin(run, "b")
    assert (answer["leaseOwner"], answer["run"]["result"], answer["run"]["status"]) == (None, 7, "completed")
    assert answer["run"]["leaseOwner"] is None
    assert api.event_types(run) == ["run.created", "run.completed"]


def test_a_failed_run_is_resumed_by_beginning_it(api: Api) -> None:
    run = api.create()
    api.begin(run, "a")
    api.fail(run, leaseOwner="a")
    resumed = api.begin(run, "b")["run"]
    assert (resumed["status"], resumed["attempt"], resumed["error"]) == ("running", 2, None)
    assert (resumed["failureClass"], resumed["completedAt"]) == (None, None)
    assert api.complete(run, leaseOwner="b")["run"]["status"] == "completed"


def test_a_queued_run_may_be_begun_without_a_claim(api: Api) -> None:
    run = api.enqueue()
    assert api.begin(run, "a")["run"]["status"] == "running"
    assert api.claim() == []


def test_the_checkpoints_come_with_begin_and_claim(api: Api) -> None:
    run = claimed(api, maxAttempts=3)
    api.do_step(run, "one", "a", output=1)
    api.do_step(run, "two", "a", output=None, hash="h2")
    api.begin_step(run, "three", "a")

    def checkpoints(of: Any) -> list[tuple[Any, ...]]:
        return [(done["name"], done["inputHash"], done["output"]) for done in of["checkpoints"]]

    expected = [("one", "h", 1), ("two", "h2", None)]
    answer = api.begin(run, "a", checkpoints=True)
    assert (checkpoints(answer), answer["checkpointsTruncated"]) == (expected, False)
    assert "checkpoints" not in api.begin(run, "a").json
    api.post(f"/runs/{run}/release", {"leaseOwner": "a"})
    taken, = api.claim(owner="b", checkpoints=True)
    assert (checkpoints(taken), taken["checkpointsTruncated"]) == (expected, False)


def test_checkpoints_past_4_mib_are_left_to_be_asked_for(api: Api) -> None:
    run = api.create()
    for name in ("one", "two", "three"):
        api.do_step(run, name, "a", output="x" * (2 << 20))
    answer = api.begin(run, "a", checkpoints=True)
    assert [checkpoint["name"] for checkpoint in answer["checkpoints"]] == ["one"]
    assert answer["checkpointsTruncated"] is True


# ------------------------------------------------------------------------------
# Ending: complete, fail
# ------------------------------------------------------------------------------
def test_a_run_without_a_lease_may_be_completed_and_failed_by_who_knows_its_id(api: Api) -> None:
    done, broken = api.create(), api.create()
    assert api.complete(done)["run"]["status"] == "completed"
    assert api.fail(broken)["run"]["status"] == "failed"


@pytest.mark.parametrize("verb", ["complete", "fail"])
def test_an_outcome_by_another_than_the_holder_is_refused(api: Api, verb: str) -> None:
    run = api.create()
    api.begin(run, "a")
    end: Callable[..., Answer] = getattr(api, verb)
    assert refused(end(run, leaseOwner="b"), 409, "lease_lost")["run"]["leaseOwner"] == "a"
    assert api.run(run)["status"] == "running"
    assert end(run, leaseOwner="a")["run"]["status"] in ("completed", "failed")
    refused(end(run, leaseOwner="b"), 409, "lease_lost")


@pytest.mark.parametrize("first", ["complete", "fail", "cancel"])
@pytest.mark.parametrize("second", ["complete", "fail"])
@pytest.mark.parametrize("owner", [{}, {"leaseOwner": "a"}], ids=["without an owner", "by the owner"])
def test_a_run_that_ended_is_answered_as_it_ended(api: Api, first: str, second: str, owner: dict[str, str]) -> None:
    run = api.create()
    api.begin(run, "a")
    bodies = {"complete": {"result": 1}, "fail": {"error": "boom"}, "cancel": {}}
    ended = api.post(f"/runs/{run}/{first}", {**bodies[first], **(owner if first != "cancel" else {})})["run"]
    again = api.post(f"/runs/{run}/{second}", {"result": 2, "error": "late", **owner})
    assert again["run"] == ended
    assert api.run(run) == ended
    assert len(api.events(run)) == 3
    if second == "fail":
        assert again["requeued"] is False


def test_a_failed_queue_run_goes_back_with_backoff_while_attempts_last(api: Api, clock: Clock) -> None:
    run = claimed(api, maxAttempts=3)
    answer = api.fail(run, {"message": "boom"}, leaseOwner="a")
    assert answer["requeued"] is True
    back = answer["run"]
    assert (back["status"], back["error"], back["leaseOwner"]) == ("queued", {"message": "boom"}, None)
    assert (back["attempt"], back["failureClass"]) == (1, None)
    event = api.events(run)[-1]
    assert event["type"] == "run.requeued"
    assert event["payload"] == {"error": {"message": "boom"}, "attempt": 1, "maxAttempts": 3,
                                "nextRunAt": back["runAt"]}

    for delay, attempt in ((5_000, 2), (10_000, 3)):
        assert api.claim() == []
        clock.advance(ms=delay)
        assert [taken["attempt"] for taken in api.claim(owner="a")] == [attempt]
        answer = api.fail(run, leaseOwner="a")
    assert answer["requeued"] is False
    assert (answer["run"]["status"], answer["run"]["failureClass"]) == ("failed", "max_retries")


@pytest.mark.parametrize("attempt", [7, 60, 999])
def test_the_backoff_ends_at_five_minutes_however_many_attempts_there_were(
        api: Api, clock: Clock, sql: Callable[..., Any], attempt: int) -> None:
    run = claimed(api, maxAttempts=1000)
    sql("update tidebase.runs set attempt = %s where id = %s", attempt, run)
    assert api.fail(run, leaseOwner="a")["requeued"] is True
    clock.advance(ms=290_000)
    assert api.claim() == []
    clock.advance(ms=10_000)
    assert [taken["id"] for taken in api.claim()] == [run]


def test_a_failure_that_cannot_be_retried_ends_the_run_at_once(api: Api) -> None:
    run = claimed(api)
    answer = api.fail(run, leaseOwner="a", retryable=False, failureClass="bad_input")
    assert answer["requeued"] is False
    assert (answer["run"]["status"], answer["run"]["failureClass"]) == ("failed", "bad_input")
    assert api.event_types(run)[-1] == "run.failed"


def test_a_single_attempt_is_not_called_retries(api: Api) -> None:
    run = claimed(api, maxAttempts=1)
    assert api.fail(run, leaseOwner="a")["run"]["failureClass"] is None


def test_a_failure_reported_twice_is_one_failure(api: Api) -> None:
    run = claimed(api)
    first = api.fail(run, leaseOwner="a")
    again = api.fail(run, leaseOwner="a")
    assert again.json == first.json
    assert api.event_types(run).count("run.requeued") == 1


def test_a_failed_run_asks_its_recovery_webhook_once(api: Api) -> None:
    run = api.create(recoveryWebhook=HOOK)
    api.begin(run, "a")
    api.fail(run, leaseOwner="a")
    api.fail(run, leaseOwner="a")
    attempt, = api.detail(run)["recoveryAttempts"]
    assert (attempt["reason"], attempt["webhookUrl"]) == ("run_failed", HOOK)
    assert api.event_types(run)[-2:] == ["run.failed", "recovery.started"]


# ------------------------------------------------------------------------------
# Cancel, release, retry, recover
# ------------------------------------------------------------------------------
@pytest.mark.parametrize("state", ["pending", "queued", "running", "failed"])
def test_a_run_is_cancelled_at_once_from_any_state_but_completed(api: Api, state: str) -> None:
    run = api.enqueue() if state == "queued" else api.create()
    if state in ("running", "failed"):
        api.begin(run, "a")
    if state == "failed":
        api.fail(run)
    assert api.run(run)["status"] == state
    ended = api.post(f"/runs/{run}/cancel", {"reason": "enough", "actor": "me"})["run"]
    assert (ended["status"], ended["cancelReason"], ended["cancelActor"]) == ("cancelled", "enough", "me")
    assert ended["cancelledAt"] == ended["cancelRequestedAt"] == ended["completedAt"] is not None
    assert (ended["leaseOwner"], ended["leaseExpiresAt"]) == (None, None)
    assert api.events(run)[-1]["payload"] == {"reason": "enough", "actor": "me"}


def test_the_first_reason_of_a_cancellation_stands(api: Api) -> None:
    run = api.create()
    first = api.post(f"/runs/{run}/cancel", {"reason": "first"})
    assert api.post(f"/runs/{run}/cancel", {"reason": "second", "actor": "b"}).json == first.json
    assert api.event_types(run) == ["run.created", "run.cancelled"]


def test_a_completed_run_cannot_be_cancelled_nor_put_back(api: Api) -> None:
    run = api.create()
    api.complete(run)
    for verb in ("cancel", "retry"):
        assert refused(api.post(f"/runs/{run}/{verb}"), 409, "run_completed")["run"]["status"] == "completed"


def test_a_cancelled_run_tells_its_worker_so_at_every_turn(api: Api) -> None:
    run = api.create()
    api.begin(run, "a")
    step = api.begin_step(run, "s", "a")["step"]["id"]
    api.post(f"/runs/{run}/cancel")
    for answer in (api.heartbeat(run, "a"), api.begin(run, "a"), api.post(f"/runs/{run}/release", {"leaseOwner": "a"})):
        assert refused(answer, 409, "run_cancelled")["run"]["status"] == "cancelled"
    result, = api.post("/heartbeats", {"runs": [{"id": run, "leaseOwner": "a"}]})["results"]
    assert (result["status"], result["code"], result["run"]["status"]) == (409, "run_cancelled", "cancelled")
    assert api.begin_step(run, "t", "a")["action"] == "cancelled"
    assert api.complete(run, leaseOwner="a")["run"]["status"] == "cancelled"
    assert api.fail(run, leaseOwner="a").json["requeued"] is False
    assert api.complete_step(run, step, "a")["step"]["status"] == "completed"  # the work was done: a retry replays it


def test_a_released_run_is_taken_by_the_next_at_once_and_no_attempt_is_spent(api: Api) -> None:
    run = claimed(api, maxAttempts=1)
    back = api.post(f"/runs/{run}/release", {"leaseOwner": "a"})["run"]
    assert (back["status"], back["attempt"], back["leaseOwner"]) == ("queued", 0, None)
    assert [taken["attempt"] for taken in api.claim(owner="b")] == [1]
    refused(api.post(f"/runs/{run}/release", {"leaseOwner": "a"}), 409, "lease_lost")


def test_a_plain_run_is_released_to_pending(api: Api) -> None:
    run = api.create()
    api.begin(run, "a")
    assert api.post(f"/runs/{run}/release", {"leaseOwner": "a"})["run"]["status"] == "pending"
    refused(api.post(f"/runs/{run}/release", {"leaseOwner": "b"}), 409, "lease_lost")
    assert api.begin(run, "b")["run"]["attempt"] == 1


@pytest.mark.parametrize("ending", ["fail", "cancel"])
@pytest.mark.parametrize("queue", ["default", None])
def test_a_retried_run_keeps_its_checkpoints_and_gets_all_its_attempts(
        api: Api, ending: str, queue: str | None) -> None:
    run = claimed(api, maxAttempts=2) if queue else api.create()
    if not queue:
        api.begin(run, "a")
    api.do_step(run, "one", "a", output=1)
    api.post(f"/runs/{run}/{ending}", {"error": "boom", "retryable": False})
    back = api.post(f"/runs/{run}/retry")["run"]
    assert (back["status"], back["attempt"]) == ("queued" if queue else "pending", 0)
    for key in ("error", "failureClass", "cancelReason", "cancelActor", "cancelledAt", "cancelRequestedAt",
                "completedAt"):
        assert back[key] is None, key
    assert api.event_types(run)[-1] == "run.retried"
    if queue:
        assert [taken["attempt"] for taken in api.claim(owner="b")] == [1]
    else:
        api.begin(run, "b")
    assert api.begin_step(run, "one", "b")["action"] == "return"


@pytest.mark.parametrize("live", ["pending", "queued", "running"])
def test_a_retry_of_a_live_run_changes_nothing(api: Api, live: str) -> None:
    run = api.create() if live == "pending" else api.enqueue()
    if live == "running":
        api.claim(owner="a")
    before = api.detail(run)
    assert api.post(f"/runs/{run}/retry")["run"] == before["run"]
    assert api.detail(run) == before


@pytest.mark.parametrize("verb", ["retry", "begin"])
def test_a_run_does_not_come_back_over_another_that_has_its_dedupe_key(api: Api, verb: str) -> None:
    run = claimed(api, dedupeKey="k")
    api.fail(run, retryable=False)
    successor = api.enqueue(dedupeKey="k")
    assert successor != run
    refused(api.post(f"/runs/{run}/{verb}"), 409, "dedupe_conflict")
    assert api.run(run)["status"] == "failed"


def test_recover_posts_the_webhook_and_says_which_attempt_it_is(api: Api) -> None:
    run = api.create(recoveryWebhook=HOOK)
    attempt = api.post(f"/runs/{run}/recover")["recoveryAttempt"]
    assert set(attempt) == {"id", "runId", "reason", "webhookUrl", "status", "httpStatus", "responseBody", "errorText",
                            "createdAt", "completedAt", "attempts", "nextAttemptAt"}
    assert (attempt["runId"], attempt["reason"], attempt["status"]) == (run, "manual", "pending")
    assert attempt["id"].startswith("rec_")
    assert api.events(run)[1]["payload"] == {"recoveryAttemptId": attempt["id"], "reason": "manual"}
    assert api.post(f"/runs/{run}/recover", {"reason": "why"})["recoveryAttempt"]["reason"] == "why"


def test_a_run_without_a_webhook_cannot_be_recovered(api: Api) -> None:
    refused(api.post(f"/runs/{api.create()}/recover"), 422, "no_recovery_webhook")


@pytest.mark.parametrize(("verb", "body"), [
    ("begin", {}), ("heartbeat", {"leaseOwner": "a"}), ("complete", {}), ("fail", {"error": 1}), ("cancel", {}),
    ("release", {"leaseOwner": "a"}), ("retry", {}), ("recover", {}),
    ("steps/begin", {"name": "s", "inputHash": "h"}), ("steps/step_1/complete", {"leaseOwner": "a"}),
    ("steps/step_1/fail", {"leaseOwner": "a", "error": 1}), ("steps/step_1/review", {"decision": "retry"}),
    ("steps", {"name": "s", "inputHash": "h", "leaseOwner": "a"})])
def test_every_verb_says_that_there_is_no_such_run(api: Api, verb: str, body: Any) -> None:
    refused(api.post(f"/runs/run_nowhere/{verb}", body), 404, "not_found")


# ------------------------------------------------------------------------------
# The detail and the list
# ------------------------------------------------------------------------------
def test_the_detail_has_every_part_even_of_a_run_that_has_none(api: Api) -> None:
    detail = api.detail(api.create())
    assert set(detail) >= set(DETAIL_KEYS)
    assert detail["state"] is None
    assert all(detail[key] == [] for key in set(DETAIL_KEYS) - {"run", "state", "events"})


def test_include_answers_the_parts_named_alone(api: Api) -> None:
    run = api.create(channels=[{"type": "webhook", "url": HOOK, "secret": "s3cret", "events": ["run.completed"]}])
    api.do_step(run, "one", "a")
    detail = api.detail(run)
    for parts in (["run"], ["steps", "events"], ["state"], ["run", "state", "gates"], sorted(DETAIL_KEYS)):
        answer = api.get(f"/runs/{run}?include={','.join(parts)}").json
        for key in ("why", "whyDetail") if "run" in parts else ():
            del answer["run"][key]
        assert answer == {part: detail[part] for part in parts}
    assert list(detail) == DETAIL_KEYS
    for wrong in ("run,nonsense", "nonsense", "run,", "run, state"):
        issues = refused(api.get(f"/runs/{run}?include={wrong.replace(' ', '%20')}"), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == ["include"]
    refused(api.get("/runs/run_nowhere"), 404, "not_found")
    refused(api.get("/runs/run_nowhere?include=run"), 404, "not_found")


def test_the_steps_of_the_detail_stand_in_the_order_they_were_first_begun(api: Api) -> None:
    run = api.create()
    api.begin(run, "a")
    names = ["m", "z", "a", "k"]
    for name in names:
        api.begin_step(run, name, "a")
    api.fail_step(run, api.detail(run)["steps"][0]["id"], "a", retryable=True)
    api.begin_step(run, "m", "a")
    assert [step["name"] for step in api.detail(run)["steps"]] == names


def test_a_secret_of_a_channel_never_comes_back(api: Api) -> None:
    channels = [{"type": "webhook", "url": HOOK, "secret": "s3cret"},
                {"type": "webhook", "url": HOOK, "secret": "s3cret", "events": ["run.failed"], "more": 1}]
    created = api.post("/runs/report", {"channels": channels})
    assert "s3cret" not in created.text
    answer = api.get(f"/runs/{created['run']['id']}")
    assert "s3cret" not in answer.text
    assert [shown["config"] for shown in answer["channels"]] == [{"url": HOOK, "secret": None}] * 2
    assert [shown["events"] for shown in answer["channels"]] == [[], ["run.failed"]]
    assert answer["events"][0]["payload"]["channels"] == [
        {"type": "webhook", "url": HOOK, "events": []}, {"type": "webhook", "url": HOOK, "events": ["run.failed"]}]


def ids(answer: Answer) -> list[str]:
    return [run["id"] for run in answer["runs"]]


def test_the_list_is_newest_first_and_a_hundred_long(api: Api) -> None:
    runs = [{"workflowName": "report", "id": f"r{number:03}"} for number in range(101)]
    api.post("/queues/default/enqueue", {"runs": runs})
    newest = api.create()
    listed = api.get("/runs")
    assert ids(listed)[0] == newest
    assert len(ids(listed)) == 100
    assert set(listed["runs"][0]) >= RUN_KEYS
    rest = api.get(f"/runs?before={listed['nextCursor']}")
    assert len(ids(rest)) == 2
    assert rest["nextCursor"] is None
    assert set(ids(listed)) | set(ids(rest)) == {newest, *(run["id"] for run in runs)}


def test_the_list_of_nothing_is_empty(api: Api) -> None:
    assert api.get("/runs").json == {"runs": [], "nextCursor": None}


def test_a_cursor_goes_on_where_it_stopped_whatever_was_created_meanwhile(api: Api) -> None:
    runs = [api.create() for _ in range(5)]
    seen, cursor = [], ""
    for _ in range(10):
        page = api.get(f"/runs?limit=2{cursor}")
        seen += ids(page)
        if page["nextCursor"] is None:
            break
        cursor = f"&before={page['nextCursor']}"
        api.create()
    assert seen == runs[::-1]


def test_a_cursor_parts_runs_of_the_same_millisecond(api: Api, sql: Callable[..., Any]) -> None:
    runs = sorted(api.create() for _ in range(4))
    sql("update tidebase.runs set created_at = '2026-06-12T10:31:00.007Z'")
    first = api.get("/runs?limit=2")
    second = api.get(f"/runs?limit=2&before={first['nextCursor']}")
    assert ids(first) + ids(second) == runs[::-1]


def test_the_list_is_filtered_by_status_workflow_queue_and_metadata(api: Api) -> None:
    plain = api.create("a%2Fb", metadata={"tenant": "x", "n": 5, "deep.key": True})
    other = api.create("other", metadata={"tenant": "y", "n": "5", "deep.key": "true"})
    queued = api.enqueue("team%2Fa", "a/b", metadata={"tenant": "x", "n": None})
    api.complete(other)
    for query, expected in {
        "status=pending": [plain], "status=completed": [other], "status=queued": [queued],
        "workflow=a%2Fb": [queued, plain], "queue=team%2Fa": [queued], "queue=other": [],
        "metadata.tenant=x": [queued, plain], "metadata.n=5": [other, plain], "metadata.deep.key=true": [other, plain],
        "metadata.n=null": [queued], "metadata.nothing=x": [], "metadata.tenant=%22x%22": [], "metadata.n=5%D9%A3": [],
        "metadata.tenant=x&workflow=a%2Fb&status=pending": [plain], "metadata.tenant=x&metadata.n=5": [plain],
        "metadata.tenant=x&metadata.n=null": [queued], "metadata.tenant=y&metadata.n=5&metadata.deep.key=true": [other],
        "workflow=%5C%27%3B%20--%20%25s": [], "metadata.%27%5C=%27%5C%22%25": [], "metadata.tenant='": [],
        "workflow=%ff": [], "failureClass=max_retries": [],
    }.items():
        assert ids(api.get(f"/runs?{query}")) == expected, query


@pytest.mark.parametrize("query", [
    "limit=0", "limit=1001", "limit=-1", "limit=x", "limit=", "limit=1.5", "before=x", "before=1_", "before=1_a%20b",
    "before=99999999999999999999_a", "before=%D9%A3_a", "limit=%D9%A3", "status=a%00b", "metadata.a%00=b",
    "metadata.a=%00", "status=nonsense", "status=", "status=Failed", "statu=failed", "metadata=5", "nonsense=1",
    "queue=a&queue=b", "metadata.a=1&metadata.a=2"])
def test_a_query_that_makes_no_sense_is_refused(api: Api, query: str) -> None:
    api.create()
    body = refused(api.get(f"/runs?{query}"), 400, "invalid_request")
    assert [issue["path"] for issue in body["issues"]] == [query.split("=")[0].replace("%00", "")]


def test_a_parameter_that_is_misspelt_is_told_what_it_was_meant_to_be(api: Api) -> None:
    body = refused(api.get("/runs?failureclass=max_retries"), 400, "invalid_request")
    assert "did you mean failureClass?" in body["issues"][0]["message"]


def test_the_list_is_filtered_by_failure_class(api: Api) -> None:
    ids_of = {name: api.create() for name in ("bad_input", "no_money", "")}
    for name, run in ids_of.items():
        api.fail(run, **({"failureClass": name} if name else {}))["run"]
    assert ids(api.get("/runs?failureClass=bad_input")) == [ids_of["bad_input"]]
    assert ids(api.get("/runs?failureClass=no_money&status=failed")) == [ids_of["no_money"]]
    assert ids(api.get("/runs?failureClass=no_money&status=completed")) == []


def test_sixteen_metadata_filters_are_taken_and_five_thousand_are_refused_at_once(
        api: Api, sql: Callable[..., Any]) -> None:
    """5,000 filters kept PostgreSQL busy for 55 s, and 16 such lists kept everybody else away."""
    metadata = {f"k{n}": n if n % 2 else str(n) for n in range(16)}
    run = api.create(metadata=metadata)
    api.create(metadata={**metadata, "k15": 16})
    query = "&".join(f"metadata.{key}={value}" for key, value in metadata.items())
    assert ids(api.get(f"/runs?{query}")) == [run]
    body = refused(api.get(f"/runs?{query}&metadata.more=1"), 400, "invalid_request")
    assert [issue["path"] for issue in body["issues"]] == ["metadata"]
    sql("begin")
    sql("lock table tidebase.runs in access exclusive mode")  # so that to ask PostgreSQL at all would take for ever
    try:
        many = api.get("/runs?" + "&".join(f"metadata.k{n}=5" for n in range(5000)))
        assert many.status in (400, 431)  # too many, or a head that is too long
    finally:
        sql("rollback")


def test_an_include_with_nul_is_refused(api: Api) -> None:
    refused(api.get(f"/runs/{api.create()}?include=a%00"), 400, "invalid_request")


def test_a_run_that_completed_shows_no_error_of_an_attempt_before(api: Api, clock: Clock) -> None:
    queued, plain = claimed(api, maxAttempts=2), api.create()
    api.fail(queued, {"message": "boom"}, leaseOwner="a")["run"]
    clock.advance(ms=5_000)
    assert api.claim(owner="b")[0]["error"] == {"message": "boom"}
    api.begin(plain, "a")["run"]
    api.fail(plain, failureClass="bad_input")["run"]
    api.begin(plain, "b")["run"]
    for run in (queued, plain):
        completed = api.complete(run, leaseOwner="b")["run"]
        assert (completed["error"], completed["failureClass"]) == (None, None)
        assert api.run(run) == completed


def test_a_failure_needs_no_error(api: Api) -> None:
    run = api.create()
    assert api.post(f"/runs/{run}/fail")["run"]["error"] is None
    assert api.events(run)[-1]["payload"] == {"error": None, "failureClass": None}


# ------------------------------------------------------------------------------
# The log
# ------------------------------------------------------------------------------
@pytest.mark.parametrize(("error", "words"), [
    ({"name": "TypeError", "message": "no such\nkey\x1b[31m", "stack": "s3cret"}, ": TypeError: no such key [31m"),
    ({"message": "x" * 200, "input": "s3cret"}, ": " + "x" * 120 + "…"),
    ("boom", ": boom"), ({"detail": "s3cret"}, ""), ({"name": 5, "message": {"a": "s3cret"}}, ""), (["s3cret"], ""),
    (5, ""), (None, "")])
def test_the_log_tells_of_a_failed_run_in_one_line_without_its_payloads(
        api: Api, caplog: pytest.LogCaptureFixture, error: Any, words: str) -> None:
    run, plain = claimed(api, maxAttempts=2, input="s3cret"), api.create("my%0Areport")
    with caplog.at_level(logging.INFO, "tidebase.server"):
        body = api.fail(run, error, leaseOwner="a")["run"]
        api.fail(plain, error)["run"]
    assert [(record.event, record.run_id, record.getMessage()) for record in caplog.records] == [
        ("run_requeued", run, f"run {run} (workflow report, queue default) failed in attempt 1 of 2{words}; "
                              f"it is queued again for {body['runAt']}"),
        ("run_failed", plain, f"run {plain} (workflow my report, no queue) failed in attempt 0 of 1{words}; "
                              "it is not queued again")]


def test_the_log_does_not_tell_of_attempt_2_of_1(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    run = api.create()
    with caplog.at_level(logging.INFO, "tidebase.server"):
        for _ in range(2):
            api.begin(run, "a")["run"]
            body = api.fail(run, "boom", leaseOwner="a")["run"]
    assert (body["attempt"], body["maxAttempts"]) == (2, 1)
    assert [text.partition("no queue) ")[2] for text in caplog.messages] == [
        "failed in attempt 1 of 1: boom; it is not queued again", "failed in attempt 2: boom; it is not queued again"]


def test_whatever_is_taken_can_fail_and_be_waited_for_however_deep_it_is_nested(
        api: Api, caplog: pytest.LogCaptureFixture) -> None:
    depths = range(900, 1000)
    taken = [depth for depth in depths if api.post(
        "/runs/report", raw=b'{"id":"r%d","input":%s%s}' % (depth, b"[" * depth, b"]" * depth)).status == 200]
    assert 900 in taken
    assert 999 not in taken
    for depth in taken[-10:]:
        assert api.get(f"/runs/r{depth}?waitMs=1").status == 200
        assert api.post(f"/runs/r{depth}/fail", {}).status == 200
        assert f"run r{depth}" in caplog.messages[-1]


# ------------------------------------------------------------------------------
# Races
# ------------------------------------------------------------------------------
def test_of_eight_begins_by_different_owners_exactly_one_gets_the_lease(api: Api) -> None:
    run = api.create()
    with together(*[lambda owner=owner: api.begin(run, owner).status for owner in "abcdefgh"]) as statuses:
        assert sorted(statuses) == [200] + [409] * 7
    assert api.event_types(run) == ["run.created", "run.started"]
    assert api.run(run)["attempt"] == 1


def test_of_complete_fail_and_cancel_at_once_one_ends_the_run(api: Api) -> None:
    for _ in range(3):
        run = api.create()
        api.begin(run, "a")
        with together(lambda: api.complete(run), lambda: api.fail(run),  # noqa: B023
                      lambda: api.post(f"/runs/{run}/cancel")):  # noqa: B023
            pass
        types = api.event_types(run)
        assert len(types) == (4 if types[2] == "run.failed" and types[-1] == "run.cancelled" else 3)
        assert types[-1] == f"run.{api.run(run)['status']}"


def test_numbers_of_events_have_no_gap_under_concurrent_writers(api: Api) -> None:
    run = api.create()
    api.begin(run, "a")
    with together(*[lambda number=number: api.do_step(run, f"s{number}", "a") for number in range(8)]):
        pass
    assert len(api.events(run)) == 2 + 2 * 8  # and events() looks at their numbers


def test_times_are_iso_8601_in_utc_with_milliseconds(api: Api) -> None:
    run = api.create(deadlineMs=LEASE_MS)
    shown = api.run(run)
    for key in ("createdAt", "updatedAt", "deadlineAt"):
        assert len(shown[key]) == len("2026-06-12T10:31:00.000Z"), shown[key]
        assert shown[key].endswith("Z")
    assert json.loads(json.dumps(shown)) == shown
