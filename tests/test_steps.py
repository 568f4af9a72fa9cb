"""A step is executed by one owner at a time, recorded once, and from then on returned, never executed again.

The ladder of answers to a begin, in its order; contracts and what they decide; reviews; records in one write.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from conftest import LEASE_MS, Answer, Api, Clock, refused, together

STEP_KEYS = {
    "id", "runId", "name", "inputHash", "input", "options", "resumeContract", "status", "output", "error", "leaseOwner",
    "leaseExpiresAt", "attempt", "startedAt", "completedAt", "createdAt", "updatedAt"}
CONTRACT = {"sideEffects": [], "idempotencyKey": None, "replay": "auto", "checkpointInvariant": None,
            "verifiedBy": None, "credentials": []}
HOOK = "http://127.0.0.1:9/hook"  # nobody listens there: what is posted stays in the outbox


@pytest.fixture
def run(api: Api) -> str:
    """A plain run that `a` holds."""
    run = api.create()
    api.begin(run, "a")["run"]
    return run


def begin(api: Api, run: str, name: str = "s", owner: str = "a", **body: Any) -> str:
    """Begin a step that is to be executed.  :returns: its id."""
    answer = api.begin_step(run, name, owner, **body)
    assert answer["action"] == "execute"
    return answer["step"]["id"]


def take_over(api: Api, clock: Clock, run: str, owner: str = "b") -> None:
    """The holder of the run falls silent, and `owner` begins it."""
    clock.advance(ms=LEASE_MS)
    api.begin(run, owner)["run"]


def leave_ambiguous(api: Api, clock: Clock, run: str, replay: str = "manual") -> str:
    """`a` begins a step that nobody may repeat unasked, and falls silent; `b` takes the run.  :returns: the step."""
    step = begin(api, run, options={"replay": replay})
    take_over(api, clock, run)
    return step


def record(api: Api, run: str, name: str = "s", owner: str = "a", **body: Any) -> Answer:
    return api.post(f"/runs/{run}/steps", {"name": name, "inputHash": "h", "leaseOwner": owner, **body})


def review(api: Api, run: str, step: str, decision: str, **body: Any) -> Answer:
    return api.post(f"/runs/{run}/steps/{step}/review", {"decision": decision, **body})


def only_steps(api: Api, run: str) -> Any:
    return api.get(f"/runs/{run}?include=steps")["steps"]


def only_step(api: Api, run: str) -> Any:
    step, = only_steps(api, run)
    return step


# ------------------------------------------------------------------------------
# The plain story
# ------------------------------------------------------------------------------
def test_a_completed_step_is_returned_and_never_executed_again(api: Api, run: str) -> None:
    begun = api.begin_step(run, "fetch", "a", input={"url": "x"})
    step = begun["step"]
    assert (begun["action"], begun["leaseOwner"]) == ("execute", "a")
    assert set(step) >= STEP_KEYS
    assert (step["runId"], step["name"], step["inputHash"], step["input"]) == (run, "fetch", "h", {"url": "x"})
    assert (step["status"], step["attempt"], step["leaseOwner"], step["output"]) == ("running", 1, "a", None)

    done = api.complete_step(run, step["id"], "a", {"pages": 2})["step"]
    assert (done["status"], done["output"], done["leaseOwner"], done["leaseExpiresAt"]) == (
        "completed", {"pages": 2}, None, None)
    for owner in ("a", "b"):
        answer = api.begin_step(run, "fetch", owner)
        assert answer.json == {"action": "return", "step": done, "output": {"pages": 2}}
    assert api.event_types(run)[2:] == ["step.started", "step.completed"]


def test_the_events_of_a_step_say_which_and_what_was_promised(api: Api, run: str) -> None:
    options = {"checkpointInvariant": "file exists", "verifiedBy": "stat"}
    step = begin(api, run, options=options)
    api.complete_step(run, step, "a")["step"]
    failing = begin(api, run, "t")
    api.fail_step(run, failing, "a", {"message": "boom"})["step"]
    started, completed, _, failed = api.events(run)[2:]
    assert started["payload"] == {"stepId": step, "name": "s", "attempt": 1, "resumeContract": {**CONTRACT, **options}}
    assert completed["payload"] == {"stepId": step, "name": "s", **options}
    assert failed["payload"] == {"stepId": failing, "name": "t", "retryable": False, "resumeDecision": "safe_replay",
                                 "resumeContract": CONTRACT, "error": {"message": "boom"}}


def test_a_begin_without_an_owner_makes_one_that_completes_the_step(api: Api) -> None:
    run = api.create()
    begun = api.begin_step(run, "s")
    assert begun["leaseOwner"] == begun["step"]["leaseOwner"] is not None
    assert api.complete_step(run, begun["step"]["id"], begun["leaseOwner"], 1)["step"]["output"] == 1


def test_a_step_without_an_input_shows_the_empty_object(api: Api, run: str) -> None:
    assert api.begin_step(run, "none", "a")["step"]["input"] == {}
    assert api.begin_step(run, "null", "a", input=None)["step"]["input"] == {}
    assert record(api, run, "recorded")["step"]["input"] == {}
    for name, value in {"zero": 0, "false": False, "empty": "", "list": []}.items():
        assert api.begin_step(run, name, "a", input=value)["step"]["input"] == value


@pytest.mark.parametrize("state", ["pending", "queued", "completed", "failed"])
def test_a_step_may_be_begun_in_a_run_that_nobody_holds(api: Api, state: str) -> None:
    run = api.enqueue() if state == "queued" else api.create()
    if state == "completed":
        api.complete(run)
    elif state == "failed":
        api.fail(run)
    assert api.do_step(run, "s", "a")
    assert api.run(run)["status"] == state


def test_a_step_of_another_run_is_not_found(api: Api, run: str) -> None:
    step = begin(api, run)
    other = api.create()
    refused(api.complete_step(other, step, "a"), 404, "not_found")
    refused(api.fail_step(other, step, "a"), 404, "not_found")
    refused(review(api, other, step, "retry"), 404, "not_found")
    assert only_step(api, run)["status"] == "running"


# ------------------------------------------------------------------------------
# The ladder of answers: cancelled, input_mismatch, return, locked, ambiguous, execute
# ------------------------------------------------------------------------------
def test_cancelled_comes_before_everything(api: Api, run: str) -> None:
    api.do_step(run, "done", "a")
    api.post(f"/runs/{run}/cancel")
    for name, hash in (("done", "h"), ("done", "other"), ("new", "h")):
        answer = api.begin_step(run, name, "a", hash=hash)
        assert (answer["action"], answer["run"]["status"]) == ("cancelled", "cancelled")
    refused(record(api, run, "new"), 409, "run_cancelled")
    assert api.event_types(run)[-1] == "run.cancelled"


@pytest.mark.parametrize("state", ["running", "completed", "failed", "manual_review"])
def test_another_input_is_a_mismatch_whatever_became_of_the_step(api: Api, run: str, state: str) -> None:
    step = begin(api, run)
    if state == "completed":
        api.complete_step(run, step, "a")
    elif state != "running":
        api.fail_step(run, step, "a", resumeDecision={"failed": "fail_hard"}.get(state, state))
    before = api.detail(run)
    for owner in ("a", "b"):
        answer = api.begin_step(run, "s", owner, hash="other")
        assert answer.json == {"action": "input_mismatch", "step": before["steps"][0], "expectedInputHash": "h",
                               "actualInputHash": "other"}
    body = refused(api.post(f"/runs/{run}/steps", {"name": "s", "inputHash": "other", "leaseOwner": "a"}),
                   409, "input_mismatch")
    assert (body["expectedInputHash"], body["actualInputHash"]) == ("h", "other")
    assert api.detail(run) == before


def test_return_comes_before_locked(api: Api, run: str) -> None:
    api.do_step(run, "s", "a", output=1)
    assert api.begin_step(run, "s", "b")["action"] == "return"


def test_locked_comes_before_ambiguous(api: Api, run: str) -> None:
    begin(api, run, options={"replay": "manual"})
    assert api.begin_step(run, "s", "b")["action"] == "locked"
    assert only_step(api, run)["status"] == "running"


def test_of_a_step_that_may_have_run_a_person_decides(api: Api, run: str, clock: Clock) -> None:
    step = leave_ambiguous(api, clock, run)
    body = refused(api.begin_step(run, "s", "b"), 409, "manual_review")
    assert (body["step"]["id"], body["step"]["status"], body["step"]["leaseOwner"]) == (step, "manual_review", None)
    assert refused(api.begin_step(run, "s", "b"), 409, "manual_review") == body
    event = api.events(run)[-1]
    assert (event["type"], event["payload"]["stepId"]) == ("step.manual_review", step)
    refused(record(api, run, owner="b"), 409, "manual_review")
    refused(api.complete_step(run, step, "a"), 409, "lease_lost")


def test_a_step_without_effects_is_executed_again_by_the_next_owner(api: Api, run: str, clock: Clock) -> None:
    begin(api, run)
    take_over(api, clock, run)
    answer = api.begin_step(run, "s", "b", input=2, options={"verifiedBy": "b"})
    assert (answer["action"], answer["step"]["attempt"]) == ("execute", 2)
    assert (answer["step"]["input"], answer["step"]["resumeContract"]["verifiedBy"]) == (2, "b")


@pytest.mark.parametrize("body", [{"retryable": True}, {}, {"resumeDecision": "auto_retry"},
                                  {"resumeDecision": "fail_hard"}])
def test_a_failed_step_is_executed_again(api: Api, run: str, body: Any) -> None:
    api.fail_step(run, begin(api, run), "a", "boom", **body)["step"]
    again = api.begin_step(run, "s", "a")
    assert (again["action"], again["step"]["attempt"]) == ("execute", 2)
    assert (again["step"]["error"], again["step"]["completedAt"]) == (None, None)


def test_a_step_that_failed_for_good_runs_again_only_after_a_review(api: Api, run: str) -> None:
    step = begin(api, run, options={"replay": "never"})
    assert api.fail_step(run, step, "a")["step"]["status"] == "failed"
    refused(api.begin_step(run, "s", "a"), 409, "manual_review")
    assert review(api, run, step, "retry")["step"]["status"] == "failed_retryable"
    assert api.begin_step(run, "s", "a")["action"] == "execute"


# ------------------------------------------------------------------------------
# Contracts, and what a failure means for the next attempt
# ------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "contract"), [
    ({}, {}),
    ({"sideEffects": []}, {}),
    ({"sideEffects": ["read"]}, {"sideEffects": ["read"]}),
    ({"sideEffects": ["read", "read"]}, {"sideEffects": ["read", "read"]}),
    ({"sideEffects": ["email"]}, {"sideEffects": ["email"], "replay": "manual"}),
    ({"sideEffects": ["read", "email"]}, {"sideEffects": ["read", "email"], "replay": "manual"}),
    ({"sideEffects": ["email"], "idempotencyKey": "k"}, {"sideEffects": ["email"], "idempotencyKey": "k"}),
    ({"sideEffects": ["email"], "replay": "auto"}, {"sideEffects": ["email"]}),
    ({"replay": "never"}, {"replay": "never"}),
    ({"replay": "manual", "idempotencyKey": "k"}, {"idempotencyKey": "k", "replay": "manual"}),
    ({"sideEffect": "email"}, {"sideEffects": ["email"], "replay": "manual"}),
    ({"sideEffect": "read"}, {"sideEffects": ["read"]}),
    ({"sideEffect": "none"}, {}),
    ({"onAmbiguousFailure": "retry", "sideEffect": "email"}, {"sideEffects": ["email"]}),
    ({"onAmbiguousFailure": "review"}, {"replay": "manual"}),
    ({"onAmbiguousFailure": "fail"}, {"replay": "never"}),
    ({"onAmbiguousFailure": "fail", "replay": "auto"}, {}),
    ({"sideEffect": "email", "sideEffects": ["read"]}, {"sideEffects": ["read"]}),
    ({"checkpointInvariant": "i", "verifiedBy": "v", "credentials": ["c"]},
     {"checkpointInvariant": "i", "verifiedBy": "v", "credentials": ["c"]}),
    ({"unknown": {"kept": 1}, "input": 1, "retries": 2, "timeoutMs": None}, {}),
    # One may stand without its list, and empty ones are dropped.
    ({"sideEffects": "email"}, {"sideEffects": ["email"], "replay": "manual"}),
    ({"sideEffects": "read"}, {"sideEffects": ["read"]}),
    ({"sideEffects": ["", "email", None]}, {"sideEffects": ["email"], "replay": "manual"}),
    ({"sideEffects": [""]}, {}), ({"sideEffects": ""}, {}), ({"sideEffect": ""}, {}),
    ({"credentials": "c"}, {"credentials": ["c"]}), ({"credentials": {"vault": 1}}, {"credentials": [{"vault": 1}]}),
    ({"credentials": ["", 5, "c"]}, {"credentials": [5, "c"]}),
    # These are any JSON.
    ({"checkpointInvariant": {"rows": [1.0, None]}, "verifiedBy": 0, "credentials": False},
     {"checkpointInvariant": {"rows": [1.0, None]}, "verifiedBy": 0, "credentials": [False]}),
    ({"checkpointInvariant": [], "verifiedBy": ""}, {"checkpointInvariant": [], "verifiedBy": ""}),
    # Null counts as absent.
    (dict.fromkeys(("sideEffects", "sideEffect", "idempotencyKey", "replay", "onAmbiguousFailure",
                    "checkpointInvariant", "verifiedBy", "credentials")), {}),
    ({"sideEffects": None, "sideEffect": "email", "replay": None, "onAmbiguousFailure": "fail"},
     {"sideEffects": ["email"], "replay": "never"}),
])
def test_the_contract_follows_from_the_options(api: Api, run: str, options: Any, contract: Any) -> None:
    begun = api.begin_step(run, "begun", "a", options=options)["step"]
    recorded = record(api, run, "recorded", options=options)["step"]
    for step in (begun, recorded):
        assert step["resumeContract"] == {**CONTRACT, **contract}
        assert step["options"] == options


@pytest.mark.parametrize("options", [
    {"replay": "sometimes"}, {"replay": ["auto"]}, {"idempotencyKey": 5}, {"sideEffects": 5}, {"sideEffects": {}},
    {"sideEffects": True}, {"sideEffect": 1}, {"onAmbiguousFailure": "maybe"}, [], "x", 5, {"a": "\0"},
    {"verifiedBy": {"a": "\0"}}])
def test_options_that_promise_nonsense_are_refused(api: Api, run: str, options: Any) -> None:
    body = refused(api.begin_step(run, "s", "a", options=options), 400, "invalid_request")
    assert body["issues"][0]["path"].startswith("options")
    refused(record(api, run, options=options), 400, "invalid_request")
    assert api.get(f"/runs/{run}?include=steps")["steps"] == []


def test_what_the_contract_says_of_a_checkpoint_stands_in_its_event(api: Api, run: str) -> None:
    options = {"checkpointInvariant": {"rows": 3}, "verifiedBy": ["ann", "bob"]}
    api.do_step(run, "begun", "a", options=options)
    record(api, run, "recorded", options=options)["step"]
    completed = [event["payload"] for event in api.events(run) if event["type"] == "step.completed"]
    assert [{key: payload[key] for key in options} for payload in completed] == [options, options]


@pytest.mark.parametrize(("replay", "body", "status", "decision"), [
    ("auto", {}, "failed", "safe_replay"),
    ("manual", {}, "manual_review", "manual_review"),
    ("never", {}, "failed", "fail_hard"),
    ("auto", {"retryable": True}, "failed_retryable", "auto_retry"),
    ("manual", {"retryable": True}, "failed_retryable", "auto_retry"),
    ("never", {"retryable": True}, "failed_retryable", "auto_retry"),
    ("manual", {"resumeDecision": "auto_retry"}, "failed_retryable", "auto_retry"),
    ("manual", {"resumeDecision": "safe_replay"}, "failed", "safe_replay"),
    ("auto", {"resumeDecision": "manual_review"}, "manual_review", "manual_review"),
    ("auto", {"retryable": True, "resumeDecision": "manual_review"}, "failed_retryable", "manual_review"),
    ("auto", {"resumeDecision": "fail_hard"}, "failed", "fail_hard"),
    ("auto", {"retryable": True, "resumeDecision": "fail_hard"}, "failed_retryable", "fail_hard"),
])
def test_a_failure_is_judged_by_what_is_sent_and_else_by_the_contract(
        api: Api, run: str, replay: str, body: Any, status: str, decision: str) -> None:
    begun = begin(api, run, "begun", options={"replay": replay})
    api.fail_step(run, begun, "a", {"message": "boom"}, **body)["step"]
    record(api, run, "recorded", options={"replay": replay}, error={"message": "boom"}, **body)["step"]
    for step in api.detail(run)["steps"]:
        assert (step["status"], step["error"], step["leaseOwner"]) == (status, {"message": "boom"}, None)
    events = [event for event in api.events(run) if event["type"] == "step.failed"]
    assert [event["payload"]["resumeDecision"] for event in events] == [decision] * 2
    assert [event["payload"]["retryable"] for event in events] == [body.get("retryable", False)] * 2


def test_a_failure_tells_the_channels_what_was_decided(api: Api) -> None:
    run = api.create(channels=[{"type": "webhook", "url": HOOK, "events": ["step.failed"]}])
    step = begin(api, run, options={"sideEffects": ["email"]})
    failed = api.fail_step(run, step, "a")["step"]
    delivery, = api.detail(run)["channelDeliveries"]
    assert delivery["payload"] == {"step": failed, "retryable": False, "resumeDecision": "manual_review",
                                   "error": "boom"}


# ------------------------------------------------------------------------------
# Outcomes: by the owner alone, once
# ------------------------------------------------------------------------------
def test_an_outcome_by_another_than_the_steps_owner_is_refused(api: Api, run: str) -> None:
    step = begin(api, run)
    for answer in (api.complete_step(run, step, "b"), api.fail_step(run, step, "b")):
        assert refused(answer, 409, "lease_lost")["step"]["leaseOwner"] == "a"
    api.complete_step(run, step, "a", 1)["step"]
    refused(api.complete_step(run, step, "b", 2), 409, "lease_lost")
    refused(api.fail_step(run, step, "b"), 409, "lease_lost")
    assert only_step(api, run)["output"] == 1


def test_a_repeated_outcome_by_its_owner_changes_nothing(api: Api, run: str, clock: Clock) -> None:
    done, failed = begin(api, run, "done"), begin(api, run, "failed")
    first = api.complete_step(run, done, "a", 1)["step"], api.fail_step(run, failed, "a", 1)["step"]
    before = api.detail(run)
    clock.advance(ms=1_000)
    assert (api.complete_step(run, done, "a", 2)["step"], api.fail_step(run, failed, "a", 2)["step"]) == first
    assert api.detail(run) == before


def test_the_first_of_two_different_outcomes_stands(api: Api, run: str) -> None:
    done, failed = begin(api, run, "done"), begin(api, run, "failed")
    api.complete_step(run, done, "a")
    api.fail_step(run, failed, "a")
    before = api.detail(run)
    refused(api.fail_step(run, done, "a"), 409, "lease_lost")
    refused(api.complete_step(run, failed, "a"), 409, "lease_lost")
    assert api.detail(run) == before


def test_a_step_that_outlived_its_lease_is_completed_as_long_as_nobody_took_it(
        api: Api, run: str, clock: Clock) -> None:
    step = begin(api, run)
    clock.advance(ms=3 * LEASE_MS)
    assert api.complete_step(run, step, "a", 1)["step"]["attempt"] == 1
    assert api.heartbeat(run, "a").status == 200


def test_what_was_done_is_kept_when_the_run_was_cancelled_meanwhile(api: Api, run: str) -> None:
    step = begin(api, run)
    api.post(f"/runs/{run}/cancel")
    assert api.complete_step(run, step, "a", "paid")["step"]["output"] == "paid"
    api.post(f"/runs/{run}/retry")
    api.begin(run, "b")
    assert api.begin_step(run, "s", "b")["output"] == "paid"


# ------------------------------------------------------------------------------
# Reviews
# ------------------------------------------------------------------------------
@pytest.mark.parametrize("replay", ["manual", "never"])
@pytest.mark.parametrize(("decision", "status", "action"), [
    ("retry", "failed_retryable", "execute"), ("complete", "completed", "return")])
def test_after_a_review_the_step_runs_or_is_returned(
        api: Api, run: str, clock: Clock, replay: str, decision: str, status: str, action: str) -> None:
    step = leave_ambiguous(api, clock, run, replay)
    refused(api.begin_step(run, "s", "b"), 409, "manual_review")
    reviewed = review(api, run, step, decision, output={"sent": True}, actor="ada")["step"]
    assert reviewed["status"] == status
    assert reviewed["output"] == ({"sent": True} if decision == "complete" else None)
    event = next(event for event in api.events(run) if event["type"] == "step.reviewed")
    assert event["payload"] == {"stepId": step, "name": "s", "decision": decision, "actor": "ada"}
    answer = api.begin_step(run, "s", "b", options={"replay": replay})
    assert answer["action"] == action
    if action == "execute":
        assert answer["step"]["attempt"] == 2
        assert api.complete_step(run, step, "b", 1)["step"]["status"] == "completed"


@pytest.mark.parametrize("replay", ["auto", "manual", "never"])
def test_a_step_reviewed_as_failed_has_failed_for_good(api: Api, run: str, replay: str) -> None:
    step = begin(api, run, options={"replay": replay})
    api.fail_step(run, step, "a", "boom", resumeDecision="manual_review")["step"]
    assert review(api, run, step, "fail")["step"]["status"] == "failed"
    for refusal in (api.begin_step(run, "s", "a"), api.begin_step(run, "s", "a", options={"idempotencyKey": "k"}),
                    record(api, run), record(api, run, options={"idempotencyKey": "k"})):
        told = refused(refusal, 409, "step_failed")["step"]
        assert (told["id"], told["status"], told["error"]) == (step, "failed", "boom")
    assert only_step(api, run)["attempt"] == 1


def test_a_step_that_failed_into_review_may_run_with_an_idempotency_key(api: Api, run: str, clock: Clock) -> None:
    effects = {"sideEffects": ["email"]}
    for again in (lambda: api.begin_step(run, "s", "a", options={**effects, "idempotencyKey": "k"}),
                  lambda: record(api, run, "r", output=1, options={**effects, "idempotencyKey": "k"})):
        name = "r" if only_steps(api, run) else "s"
        step = begin(api, run, name, options=effects)
        assert api.fail_step(run, step, "a", None)["step"]["status"] == "manual_review"
        refused(api.begin_step(run, name, "a", options=effects), 409, "manual_review")
        refused(record(api, run, name, options=effects), 409, "manual_review")
        answer = again()
        assert (answer["step"]["attempt"], answer["step"]["id"]) == (2, step)
    other = api.create()
    api.begin(other, "a")["run"]
    leave_ambiguous(api, clock, other)  # it may have had its effect without the key
    for _ in range(2):
        refused(api.begin_step(other, "s", "b", options={**effects, "idempotencyKey": "k"}), 409, "manual_review")


def test_a_failure_put_up_for_review_waits_for_it(api: Api, run: str) -> None:
    step = begin(api, run)
    api.fail_step(run, step, "a", resumeDecision="manual_review")
    refused(api.begin_step(run, "s", "a"), 409, "manual_review")
    assert api.event_types(run).count("step.manual_review") == 0  # step.failed said so already
    review(api, run, step, "retry")["step"]
    assert api.begin_step(run, "s", "a")["step"]["attempt"] == 2


def test_the_same_word_again_is_a_repeat_and_another_one_is_refused(api: Api, run: str) -> None:
    step = begin(api, run)
    refused(review(api, run, step, "retry"), 409, "not_in_review")
    api.fail_step(run, step, "a", resumeDecision="manual_review")
    first = review(api, run, step, "retry")
    assert review(api, run, step, "retry").json == first.json
    assert refused(review(api, run, step, "fail"), 409, "not_in_review")["step"]["status"] == "failed_retryable"
    assert api.event_types(run).count("step.reviewed") == 1


def in_review(api: Api, run: str, owner: str = "a") -> str:
    """A step that failed into review.  :returns: its id."""
    step = begin(api, run, "doubtful", owner)
    api.fail_step(run, step, owner, resumeDecision="manual_review")["step"]
    return step


def test_a_run_that_fails_while_a_step_waits_for_review_says_so(api: Api, clock: Clock) -> None:
    plain, named, queued, lost, retried = api.create(), api.create(), *(api.enqueue(maxAttempts=n) for n in (1, 2, 2))
    for run in (plain, named):
        api.begin(run, "a")["run"]
    assert {claimed["id"] for claimed in api.claim(owner="a", limit=9)} == {queued, lost, retried}
    for run in (plain, named, queued, lost, retried):
        in_review(api, run)
    assert api.fail(plain, leaseOwner="a")["run"]["failureClass"] == "manual_review"
    assert api.fail(named, leaseOwner="a", failureClass="mine")["run"]["failureClass"] == "mine"
    assert api.fail(queued, leaseOwner="a")["run"]["failureClass"] == "manual_review"
    assert api.events(queued)[-1]["payload"]["failureClass"] == "manual_review"
    assert api.fail(retried, leaseOwner="a")["requeued"] is True
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    assert {claimed["id"] for claimed in api.claim(owner="b", limit=9)} == {lost, retried}
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    for run in (lost, retried):
        assert (api.run(run)["status"], api.run(run)["failureClass"]) == ("failed", "manual_review")
    review(api, lost, only_step(api, lost)["id"], "complete")["step"]
    api.claim(owner="c")
    assert api.fail(lost, leaseOwner="c", retryable=False)["run"]["failureClass"] is None


@pytest.mark.parametrize("decision", ["retry", "complete", "fail"])
def test_a_review_queues_a_failed_run_again_with_all_its_attempts(api: Api, decision: str) -> None:
    run = api.enqueue(maxAttempts=1)
    api.claim(owner="a")
    step = in_review(api, run)
    assert api.fail(run, leaseOwner="a")["requeued"] is False
    first = review(api, run, step, decision)
    back = api.run(run)
    assert (back["status"], back["attempt"], back["error"], back["failureClass"]) == ("queued", 0, None, None)
    assert api.event_types(run)[-1] == "run.retried"
    assert [claimed["attempt"] for claimed in api.claim(owner="b")] == [1]
    assert review(api, run, step, decision).json == first.json
    assert api.event_types(run).count("run.retried") == 1
    assert (api.queue("default")["failed"], api.queue("default")["running"]) == (0, 1)


def test_a_review_does_not_queue_a_run_whose_dedupe_key_another_has_by_now(api: Api) -> None:
    run = api.enqueue(maxAttempts=1, dedupeKey="k")
    api.claim(owner="a")
    step = in_review(api, run)
    api.fail(run, leaseOwner="a")["run"]
    other = api.enqueue(dedupeKey="k")
    refused(review(api, run, step, "retry"), 409, "dedupe_conflict")
    assert only_step(api, run)["status"] == "manual_review"
    api.post(f"/runs/{other}/cancel")["run"]
    assert review(api, run, step, "retry")["step"]["status"] == "failed_retryable"
    assert api.run(run)["status"] == "queued"


def test_a_review_has_a_run_without_a_queue_resumed_by_its_recovery_webhook(api: Api, clock: Clock) -> None:
    failed, stalled, pending = (api.create(recoveryWebhook=HOOK) for _ in range(3))
    without = api.create()
    steps = {}
    for run in (failed, stalled, pending, without):
        api.begin(run, "a")["run"]
        steps[run] = in_review(api, run)
    for run in (failed, pending, without):
        api.fail(run, leaseOwner="a")["run"]
    api.post(f"/runs/{pending}/retry")["run"]
    clock.advance(ms=LEASE_MS)
    for run in (failed, stalled, pending, without) * 2:
        review(api, run, steps[run], "complete")["step"]
    reasons = {run: [attempt["reason"] for attempt in api.detail(run)["recoveryAttempts"]] for run in steps}
    assert {run: each.count("manual") for run, each in reasons.items()} == {
        failed: 1, stalled: 1, pending: 1, without: 0}
    assert [api.run(run)["status"] for run in steps] == ["failed", "running", "pending", "failed"]


@pytest.mark.parametrize("state", ["running", "running by its app", "queued", "waiting", "completed", "cancelled"])
def test_a_review_leaves_a_run_that_is_live_or_ended_otherwise_as_it_is(api: Api, state: str) -> None:
    run = api.create(recoveryWebhook=HOOK) if "app" in state else api.enqueue(recoveryWebhook=HOOK)
    api.begin(run, "a")["run"]
    step = in_review(api, run)
    owner = {"leaseOwner": "a"}
    {"queued": lambda: api.fail(run, **owner), "completed": lambda: api.complete(run),
     "waiting": lambda: api.post(f"/runs/{run}/wait", {**owner, "for": {"event": "e"}}),
     "cancelled": lambda: api.post(f"/runs/{run}/cancel")}.get(state, lambda: None)()
    before = api.run(run)
    assert before["status"] == state.split()[0]
    review(api, run, step, "retry")["step"]
    assert api.run(run) == {**before, "updatedAt": api.run(run)["updatedAt"]}
    assert api.event_types(run)[-1] == "step.reviewed"


def test_a_step_comes_up_for_review_as_often_as_it_is_lost(api: Api, run: str, clock: Clock) -> None:
    step = leave_ambiguous(api, clock, run)
    for holder, next_one in (("b", "c"), ("c", "d")):
        refused(api.begin_step(run, "s", holder), 409, "manual_review")
        review(api, run, step, "retry")["step"]
        assert api.begin_step(run, "s", holder, options={"replay": "manual"})["action"] == "execute"
        take_over(api, clock, run, next_one)
    refused(api.begin_step(run, "s", "d"), 409, "manual_review")
    assert api.event_types(run).count("step.reviewed") == 2


# ------------------------------------------------------------------------------
# Steps recorded in one write
# ------------------------------------------------------------------------------
def test_a_record_is_a_whole_step_with_the_same_events(api: Api, run: str) -> None:
    step = record(api, run, input=1, output={"n": 1}, startedAt="2026-06-12T10:31:00.250Z", durationMs=5)["step"]
    assert set(step) >= STEP_KEYS
    assert (step["status"], step["attempt"], step["input"], step["output"]) == ("completed", 1, 1, {"n": 1})
    assert step["startedAt"] == "2026-06-12T10:31:00.250Z"
    failed = record(api, run, "t", error="boom")["step"]
    assert (failed["status"], failed["error"]) == ("failed", "boom")
    assert api.event_types(run)[2:] == ["step.started", "step.completed", "step.started", "step.failed"]
    started, completed = api.events(run)[2:4]
    assert started["payload"] == {"stepId": step["id"], "name": "s", "attempt": 1, "resumeContract": CONTRACT}
    assert completed["payload"] == {"stepId": step["id"], "name": "s", "checkpointInvariant": None, "verifiedBy": None}


def test_a_record_without_a_start_began_its_duration_ago(api: Api, run: str) -> None:
    step = record(api, run, durationMs=1_500)["step"]
    span = datetime.fromisoformat(step["completedAt"]) - datetime.fromisoformat(step["startedAt"])
    assert span.total_seconds() * 1000 >= 1_500


@pytest.mark.parametrize("start", ["tomorrow", 5, "2026-13-01T00:00:00Z", ""])
def test_a_record_that_began_at_no_time_is_refused(api: Api, run: str, start: Any) -> None:
    refused(record(api, run, startedAt=start), 400, "invalid_request")


def test_a_record_is_fenced_by_the_lease_of_the_run(api: Api, run: str, clock: Clock) -> None:
    refused(record(api, run, owner="b"), 409, "lease_lost")
    for idle in (api.create(), api.enqueue()):
        refused(record(api, idle), 409, "lease_lost")
    take_over(api, clock, run)
    assert refused(record(api, run), 409, "lease_lost")["run"]["leaseOwner"] == "b"
    assert api.get(f"/runs/{run}?include=steps")["steps"] == []


def test_a_record_of_a_completed_step_answers_the_first_output(api: Api, run: str, clock: Clock) -> None:
    first = record(api, run, output=1)
    before = api.detail(run)
    clock.advance(ms=1_000)
    assert record(api, run, output=2).json == first.json
    assert api.detail(run) == before
    take_over(api, clock, run)
    assert record(api, run, owner="b", output=3)["step"]["output"] == 1
    api.complete(run, leaseOwner="b")
    assert record(api, run, output=4)["step"]["output"] == 1


def test_a_record_of_a_failed_step_is_its_next_attempt(api: Api, run: str) -> None:
    record(api, run, error="boom", retryable=True)
    step = record(api, run, input=2, options={"verifiedBy": "v"}, output=1)["step"]
    assert (step["status"], step["attempt"], step["error"]) == ("completed", 2, None)
    assert (step["input"], step["resumeContract"]["verifiedBy"]) == (2, "v")
    assert api.event_types(run)[2:] == ["step.started", "step.failed", "step.started", "step.completed"]


def test_a_record_ends_the_step_that_its_owner_began(api: Api, run: str) -> None:
    begin(api, run)
    assert record(api, run, output=1)["step"]["attempt"] == 1
    assert api.event_types(run)[2:] == ["step.started", "step.completed"]


def test_a_batch_records_each_in_its_order_and_a_refused_one_touches_no_other(api: Api, run: str) -> None:
    other, foreign, cancelled = api.create(), api.create(), api.create()
    for taken, owner in ((other, "a"), (foreign, "b"), (cancelled, "a")):
        api.begin(taken, owner)
    api.post(f"/runs/{cancelled}/cancel")
    api.do_step(run, "done", "a", output="first")
    begin(api, run, "review", options={"replay": "manual"})
    api.fail_step(run, api.detail(run)["steps"][1]["id"], "a")

    def entry(of: str, name: str, **body: Any) -> Any:
        return {"runId": of, "name": name, "inputHash": "h", "leaseOwner": "a", **body}

    results = api.post("/steps", {"records": [
        entry(other, "one", output=1), entry(foreign, "x", output=1), entry(run, "two", output=[2], durationMs=5),
        entry("run_nowhere", "x"), entry(run, "done", output="second"), entry(cancelled, "x"),
        entry(run, "done", inputHash="other"), entry(run, "review"), entry(other, "three", error="boom"),
        entry(other, "one", output="again")]})["results"]
    assert [(result.get("status"), result.get("code")) for result in results] == [
        (None, None), (409, "lease_lost"), (None, None), (404, "not_found"), (None, None), (409, "run_cancelled"),
        (409, "input_mismatch"), (409, "manual_review"), (None, None), (None, None)]
    assert all(result["error"] for result in results if "code" in result)
    assert [result["step"]["output"] for result in results if "code" not in result] == [1, [2], "first", None, 1]
    assert results[8]["step"]["status"] == "failed"
    assert [step["name"] for step in api.detail(other)["steps"]] == ["one", "three"]
    for of in (run, other, foreign, cancelled):
        api.events(of)
    assert [api.detail(of)["steps"] for of in (foreign, cancelled)] == [[], []]


@pytest.mark.parametrize("records", [[], {}, None, [5], [{}], "x", [{"runId": "r"}]])
def test_a_batch_that_is_none_is_refused_as_a_whole(api: Api, records: Any) -> None:
    refused(api.post("/steps", {"records": records}), 400, "invalid_request")


# ------------------------------------------------------------------------------
# Races
# ------------------------------------------------------------------------------
def test_of_eight_first_begins_of_a_step_exactly_one_executes(api: Api) -> None:
    run = api.create()
    with together(*[lambda owner=owner: api.begin_step(run, "s", owner)["action"] for owner in "abcdefgh"]) as actions:
        assert sorted(actions) == ["execute"] + ["locked"] * 7
    assert only_step(api, run)["attempt"] == 1


def test_of_eight_takeovers_of_an_expired_step_exactly_one_executes(api: Api, clock: Clock) -> None:
    run = api.create()
    begin(api, run, owner="gone")
    clock.advance(ms=LEASE_MS)
    with together(*[lambda owner=owner: api.begin_step(run, "s", owner)["action"] for owner in "abcdefgh"]) as actions:
        assert sorted(actions) == ["execute"] + ["locked"] * 7
    assert only_step(api, run)["attempt"] == 2


def test_a_late_completion_and_a_takeover_at_once_leave_one_output(api: Api, clock: Clock) -> None:
    run = api.create()
    for number in range(3):
        name = f"s{number}"
        step = begin(api, run, name, owner="helper")
        clock.advance(ms=LEASE_MS)

        def complete(step: str = step) -> int:
            return api.complete_step(run, step, "helper", "late").status

        def take(name: str = name) -> str:
            return str(api.begin_step(run, name, "a")["action"])

        with together(complete, take) as outcome:
            assert tuple(outcome) in ((200, "return"), (409, "execute"))


def test_a_review_twice_at_once_is_one_review(api: Api, run: str) -> None:
    step = begin(api, run)
    api.fail_step(run, step, "a", resumeDecision="manual_review")
    words: list[Callable[[], int]] = [lambda word=word: review(api, run, step, word).status  # type: ignore[misc]
                                      for word in ("retry", "fail", "complete")]
    with together(*words) as statuses:
        assert sorted(statuses) == [200, 409, 409]
    assert api.event_types(run).count("step.reviewed") == 1


def test_what_happens_at_once_has_one_time(api, sql):
    sql("create sequence if not exists public.ticks")  # stays: the server asks the clock until it is put back
    sql("create or replace function tidebase.now() returns timestamptz language sql volatile as $$ select"
        " date_trunc('milliseconds', clock_timestamp()) + nextval('public.ticks') * interval '1 millisecond' $$")
    run = api.create()
    api.begin(run, "owner")["run"]
    done, failed, reviewed = (api.begin_step(run, name, "owner")["step"]["id"] for name in "abc")
    api.complete_step(run, done, "owner")["step"]
    api.fail_step(run, failed, "owner")["step"]
    api.fail_step(run, reviewed, "owner", resumeDecision="manual_review")["step"]
    api.post(f"/runs/{run}/steps/{reviewed}/review", {"decision": "complete"})["step"]
    gate = api.post(f"/runs/{run}/gates/begin", {"name": "ok", "prompt": "Ship?"})["gate"]
    decision = {"token": gate["resolveToken"], "decision": "approved"}
    gate = api.post(f"/runs/{run}/gates/{gate['id']}/resolve", decision)["gate"]
    assert gate["resolvedAt"] == gate["updatedAt"]
    for step in api.detail(run)["steps"]:
        assert step["completedAt"] == step["updatedAt"], step["name"]
