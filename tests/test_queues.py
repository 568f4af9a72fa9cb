"""A job is a run: put on a queue once per dedupe key, taken by one worker, in order, within the queue's caps.

Also held claims, which wait for work without polling, and push queues, which offer their runs to the app.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from conftest import LEASE_MS, Answer, Api, eventually, refused

from tidebase_server import watcher

ENDINGS = ["complete", "fail", "cancel", "lease"]
CENTURY_MS = 36_525 * 86_400_000


def end(api: Api, clock: Any, run: str, ending: str) -> None:
    """Bring a queued run of one attempt to its end."""
    if ending == "cancel":
        api.post(f"/runs/{run}/cancel")["run"]
        return
    assert [taken["id"] for taken in api.claim(owner="ender")] == [run]
    if ending == "complete":
        api.complete(run)["run"]
    elif ending == "fail":
        assert api.fail(run)["run"]["status"] == "failed"
    else:
        clock.advance(ms=LEASE_MS)
        assert api.reconcile() == 1
        assert api.run(run)["status"] == "failed"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


# --- enqueue


def test_an_enqueued_run_shows_what_was_asked_for_and_defaults_to_three_attempts(api):
    answer = api.post("/queues/mail/enqueue", {
        "workflowName": "send", "input": {"to": "ada"}, "metadata": {"user": 7}, "priority": -3, "deadlineMs": 90_000,
        "dedupeKey": "k", "recoveryWebhook": "http://127.0.0.1:1/", "unknown": "ignored"})
    run = answer["run"]
    assert answer["deduplicated"] is False
    assert re.fullmatch(r"run_[0-9a-f]{32}", run["id"])
    assert (run["status"], run["queue"], run["workflowName"], run["input"], run["metadata"], run["priority"],
            run["dedupeKey"], run["recoveryWebhook"], run["attempt"], run["maxAttempts"], run["leaseOwner"]) == (
        "queued", "mail", "send", {"to": "ada"}, {"user": 7}, -3, "k", "http://127.0.0.1:1/", 0, 3, None)
    assert at(run["deadlineAt"]) - at(run["createdAt"]) == timedelta(seconds=90)
    assert run["runAt"] == run["createdAt"]
    event, = api.events(run["id"])
    assert (event["type"], event["payload"]) == ("run.enqueued", {"queue": "mail", "runAt": run["runAt"]})


def test_a_queue_whose_name_holds_a_slash_is_one_queue(api):
    run = api.enqueue("team%2Fa")
    assert api.run(run)["queue"] == "team/a"
    assert [taken["id"] for taken in api.claim("team/a")] == [run]
    assert api.put("/queues/team%2Fa/config", {"concurrency": 1})["config"]["name"] == "team/a"


def test_a_second_enqueue_with_a_live_dedupe_key_answers_the_first_run(api):
    run = api.enqueue(dedupeKey="k", input={"n": 1})
    again = api.post("/queues/default/enqueue", {"workflowName": "report", "dedupeKey": "k", "input": {"n": 2}})
    assert again["deduplicated"] is True
    assert (again["run"]["id"], again["run"]["input"]) == (run, {"n": 1})
    api.claim(owner="a")
    assert api.enqueue(dedupeKey="k") == run  # while it runs, too
    api.fail(run, leaseOwner="a")
    assert api.enqueue(dedupeKey="k") == run  # and while it waits for its next attempt
    assert api.event_types(run) == ["run.enqueued", "run.claimed", "run.requeued"]
    assert api.enqueue("other", dedupeKey="k") != run
    assert api.queue("default")["queued"] == 1


def test_a_dedupe_key_that_a_run_of_another_workflow_holds_is_refused_and_says_whose_it_is(api):
    """Answered with the other workflow's run, the caller would wait for work that nobody does."""
    run = api.enqueue(workflow="mail", dedupeKey="k")
    job = {"workflowName": "report", "dedupeKey": "k"}
    for answer in (api.post("/queues/default/enqueue", job),
                   api.post("/queues/default/enqueue", {"runs": [{"workflowName": "ok"}, job]})):
        body = refused(answer, 409, "dedupe_conflict")
        assert (body["runId"], body["workflowName"]) == (run, "mail")
        for name in (run, "workflow mail", "workflow report", "dedupe key k"):
            assert name in body["error"]
    writes = [{"do": "enqueue_run", "queue": "default", **one} for one in (job, {**job, "dedupeKey": "other"})]
    results = api.post("/writes", {"writes": writes})["results"]
    assert [result.get("code") for result in results] == ["dedupe_conflict", None]
    assert [one["id"] for one in api.get("/runs")["runs"]] == [results[1]["run"]["id"], run]
    api.complete(run)["run"]
    assert api.post("/queues/default/enqueue", job)["deduplicated"] is False


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_frees_the_dedupe_key(api, clock, ending):
    run = api.enqueue(dedupeKey="k", maxAttempts=1)
    end(api, clock, run, ending)
    second = api.post("/queues/default/enqueue", {"workflowName": "report", "dedupeKey": "k"})
    assert second["deduplicated"] is False
    assert second["run"]["id"] != run


@pytest.mark.parametrize(("ending", "verb"), [("fail", "retry"), ("fail", "begin"), ("cancel", "retry")])
def test_a_run_put_back_takes_its_dedupe_key_again_unless_another_has_it(api, clock, ending, verb):
    run = api.enqueue(dedupeKey="k", maxAttempts=1)
    end(api, clock, run, ending)
    other = api.enqueue(dedupeKey="k")
    before = api.detail(run)
    refused(api.post(f"/runs/{run}/{verb}"), 409, "dedupe_conflict")
    assert api.detail(run) == before
    assert api.queue("default")[{"fail": "failed", "cancel": "cancelled"}[ending]] == 1
    api.post(f"/runs/{other}/cancel")["run"]
    api.post(f"/runs/{run}/{verb}")["run"]
    assert api.enqueue(dedupeKey="k") == run


def test_an_id_makes_enqueue_create_or_get(api):
    body = {"workflowName": "report", "id": "run_mine", "input": {"n": 1}}
    first = api.post("/queues/default/enqueue", body)
    assert first["run"]["id"] == "run_mine"
    again = api.post("/queues/default/enqueue", {**body, "input": {"n": 2}})
    assert (again["run"], again["deduplicated"]) == (first["run"], False)
    assert api.event_types("run_mine") == ["run.enqueued"]
    refused(api.post("/queues/default/enqueue", {"workflowName": "other", "id": "run_mine"}), 409, "run_id_conflict")


def test_a_repeated_enqueue_with_id_and_dedupe_key_gets_its_own_run_also_when_that_ended(api):
    body = {"workflowName": "report", "id": "run_mine", "dedupeKey": "k"}
    assert api.post("/queues/default/enqueue", body)["deduplicated"] is False
    assert api.post("/queues/default/enqueue", body)["deduplicated"] is False
    api.claim()
    api.complete("run_mine")
    again = api.post("/queues/default/enqueue", body)
    assert (again["run"]["id"], again["run"]["status"]) == ("run_mine", "completed")


def test_a_delayed_run_is_taken_not_before_its_time(api, clock):
    run = api.enqueue(delayMs=5000)
    shown = api.run(run)
    assert at(shown["runAt"]) - at(shown["createdAt"]) == timedelta(seconds=5)
    clock.advance(ms=3000)
    assert api.claim() == []
    clock.advance(ms=2000)
    assert [taken["id"] for taken in api.claim()] == [run]


@pytest.mark.parametrize("zone", ["+00:00", "Z", "", "+05:30"])
def test_run_at_is_an_instant_in_any_time_zone(api, zone):
    when = datetime(2099, 5, 4, 3, 2, 1, 987_000, tzinfo=UTC)
    local = when + (timedelta(hours=5.5) if zone == "+05:30" else timedelta())
    run = api.enqueue(runAt=local.strftime("%Y-%m-%dT%H:%M:%S.987") + zone)
    assert api.run(run)["runAt"] == "2099-05-04T03:02:01.987Z"


def test_a_run_at_in_the_past_is_ready_at_once_and_ahead_of_younger_ones(api):
    younger = api.enqueue()
    older = api.enqueue(runAt="2001-01-01T00:00:00.000Z")
    assert [run["id"] for run in api.claim(limit=2)] == [older, younger]


def test_many_are_enqueued_at_once_in_the_order_given_each_as_it_would_be_alone(api):
    taken = api.enqueue(workflow="b", dedupeKey="taken")
    answer = api.post("/queues/default/enqueue", {"runs": [
        {"workflowName": "a", "input": {"z": 1, "a": 1.0}},
        {"workflowName": "b", "dedupeKey": "taken"},
        {"workflowName": "c", "dedupeKey": "twin"},
        {"workflowName": "c", "dedupeKey": "twin"},
        {"workflowName": "e", "id": "run_e", "maxAttempts": 9,
         "channels": [{"type": "webhook", "url": "http://127.0.0.1:1/", "secret": "shh"}]}]})
    runs = answer["runs"]
    assert [run["workflowName"] for run in runs] == ["a", "b", "c", "c", "e"]
    assert [run["deduplicated"] for run in runs] == [False, True, False, True, False]
    assert (runs[1]["id"], runs[2]["id"], runs[4]["id"]) == (taken, runs[3]["id"], "run_e")
    assert [run["maxAttempts"] for run in runs] == [3, 3, 3, 3, 9]
    assert '{"z": 1, "a": 1.0}' in answer.text
    assert len(api.detail("run_e")["channels"]) == 1
    assert api.event_types(runs[0]["id"]) == ["run.enqueued"]


def test_ten_thousand_runs_are_enqueued_in_one_call(api):
    runs = api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 10_000})["runs"]
    assert len({run["id"] for run in runs}) == 10_000
    assert api.queue("default")["queued"] == 10_000


@pytest.mark.parametrize(("runs", "status", "code"), [
    ([{"workflowName": "report", "id": "run_taken"}, {"workflowName": "ok"}], 409, "run_id_conflict"),
    ([{"workflowName": "ok"}, {"workflowName": 5}], 400, "invalid_request"),
    ([{"workflowName": "ok"}, {"workflowName": "ok", "maxAttempts": 0}], 400, "invalid_request"),
    ([], 400, "invalid_request"),
    ([{"workflowName": "ok"}] * 10_001, 400, "invalid_request"),
    ([None], 400, "invalid_request"),
    ("ok", 400, "invalid_request"),
    (None, 400, "invalid_request"),
])
def test_of_many_none_is_enqueued_when_one_is_refused(api, runs, status, code):
    api.create("other", id="run_taken")
    refused(api.post("/queues/default/enqueue", {"runs": runs}), status, code)
    assert [queue["name"] for queue in api.get("/queues")["queues"]] == []


@pytest.mark.parametrize("body", [
    {}, {"workflowName": ""}, {"workflowName": "w", "maxAttempts": 0}, {"workflowName": "w", "maxAttempts": "3"},
    {"workflowName": "w", "delayMs": -1}, {"workflowName": "w", "delayMs": 1.5}, {"workflowName": "w", "delayMs": None},
    {"workflowName": "w", "runAt": "tomorrow"}, {"workflowName": "w", "runAt": 5},
    {"workflowName": "w", "priority": True}, {"workflowName": "w", "dedupeKey": ""},
    {"workflowName": "w", "dedupeKey": None}, {"workflowName": "w", "id": "a b"},
    {"workflowName": "w", "deadlineMs": 0}, {"workflowName": "w", "metadata": []},
    {"workflowName": "w", "channels": [{"type": "webhook"}]}, {"workflowName": "w", "maxAttempts": 1_000_001},
    {"workflowName": "w", "priority": 2**31}, {"workflowName": "w", "priority": -2**31 - 1},
    {"workflowName": "w", "delayMs": CENTURY_MS + 1}, {"workflowName": "w", "deadlineMs": CENTURY_MS + 1},
])
def test_a_job_that_cannot_be_is_refused(api, body):
    refused(api.post("/queues/default/enqueue", body), 400, "invalid_request")
    assert api.get("/queues")["queues"] == []


def test_the_limits_themselves_are_taken(api):
    name = "\U0001f600" * 512
    low = api.enqueue("q", name, priority=-2**31, maxAttempts=1_000_000, dedupeKey=name)
    high = api.enqueue("q", priority=2**31 - 1, deadlineMs=CENTURY_MS)
    late = api.enqueue("q", delayMs=CENTURY_MS)
    claimed = api.claim(*[f"q{n}" for n in range(999)], "q", owner=name, limit=100)
    assert [run["id"] for run in claimed] == [high, low]
    assert api.run(low)["workflowName"] == name
    assert api.run(late)["runAt"] > "2120"


def test_sixteen_enqueues_with_one_dedupe_key_at_once_make_one_run(api):
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(
            lambda _: api.post("/queues/default/enqueue", {"workflowName": "w", "dedupeKey": "k"}), range(16)))
    assert len({answer["run"]["id"] for answer in answers}) == 1
    assert sorted(answer["deduplicated"] for answer in answers) == [False] + [True] * 15


# --- claim


def test_a_claim_starts_the_run_and_says_who_holds_it_until_when(api):
    run = api.enqueue()
    answer = api.post("/queues/claim", {"queues": ["default"]})
    taken, = answer["runs"]
    assert re.fullmatch(r"owner_[0-9a-f]{32}", answer["leaseOwner"])
    assert (taken["id"], taken["status"], taken["leaseOwner"], taken["attempt"]) == (
        run, "running", answer["leaseOwner"], 1)
    assert at(taken["leaseExpiresAt"]) - at(taken["updatedAt"]) == timedelta(milliseconds=LEASE_MS)
    assert api.run(run) == taken
    event = api.events(run)[-1]
    assert event["type"] == "run.claimed"
    assert event["payload"].items() >= {"leaseOwner": answer["leaseOwner"], "queue": "default"}.items()
    api.complete(run, leaseOwner=answer["leaseOwner"])["run"]


def test_nothing_ready_is_an_empty_answer_with_an_owner(api):
    answer = api.post("/queues/claim", {"queues": ["nowhere"], "leaseOwner": "me"})
    assert (answer["runs"], answer["leaseOwner"]) == ([], "me")
    assert "retry-after" not in answer.headers


def test_ready_runs_are_served_by_queue_then_priority_then_time(api):
    order = {}
    for queue, priority, minute in [("b", 9, 1), ("a", 0, 3), ("a", 5, 2), ("a", 0, 1), ("a", -1, 0), ("b", 9, 0),
                                    ("c", 99, 0)]:
        order[queue, priority, minute] = api.enqueue(queue, priority=priority, runAt=f"2001-01-01T00:0{minute}:00Z")
    expected = [order[key] for key in [("a", 5, 2), ("a", 0, 1), ("a", 0, 3), ("a", -1, 0), ("b", 9, 0), ("b", 9, 1)]]
    assert [run["id"] for run in api.claim("a", "b", limit=4)] == expected[:4]
    assert [run["id"] for run in api.claim("b", "a", limit=9)] == expected[4:]


def test_a_limit_is_never_exceeded_over_several_queues(api):
    for queue in "aabbc":
        api.enqueue(queue)
    assert len(api.claim("a", "b", "c", limit=3)) == 3
    assert len(api.claim("a", "b", "c")) == 1
    assert len(api.claim("a", "a", "b", "c", limit=100)) == 1


def test_delayed_runs_of_a_higher_priority_do_not_hide_ready_ones(api):
    for _ in range(3):
        api.enqueue(priority=9, delayMs=60_000)
    ready = api.enqueue()
    assert [run["id"] for run in api.claim(limit=2)] == [ready]


def test_a_repeated_claim_with_the_same_id_answers_what_the_first_one_took(api, clock):
    runs = [api.enqueue(runAt=f"2001-01-01T00:00:0{n}Z") for n in range(4)]
    first = api.claim(owner="a", id="c1", limit=3)
    assert [run["id"] for run in first] == runs[:3]
    assert {run["id"]: run for run in api.claim(owner="a", id="c1", limit=3)} == {run["id"]: run for run in first}
    api.complete(runs[0], leaseOwner="a")
    assert {run["id"] for run in api.claim(owner="a", id="c1", limit=3)} == set(runs[1:3])
    assert api.event_types(runs[1]) == ["run.enqueued", "run.claimed"]
    assert [run["id"] for run in api.claim(owner="b", id="c1", limit=3)] == runs[3:]  # another worker's id is its own
    assert api.claim(owner="a", id="c2") == []


def test_a_repeated_claim_does_not_answer_a_run_that_was_lost_meanwhile(api, clock):
    run = api.enqueue()
    api.claim(owner="a", id="c1")
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    assert api.claim(owner="b", id="c1")[0]["id"] == run
    assert api.claim(owner="a", id="c1") == []


def test_a_repeated_claim_brings_the_runs_in_the_same_order(api):
    for number in range(30):
        api.enqueue(runAt=f"2001-01-01T00:00:{number:02}Z", priority=number % 3)
    first = [run["id"] for run in api.claim(owner="a", id="c1", limit=30)]
    for run in reversed(first):
        api.heartbeat(run, "a")["run"]
    assert [run["id"] for run in api.claim(owner="a", id="c1", limit=30)] == first


def test_a_claim_with_checkpoints_brings_what_is_completed(api):
    run = api.enqueue(input="a\0b")
    api.claim(owner="a")
    api.do_step(run, "one", "a", {"z": "\0", "a": [1.0]})
    api.do_step(run, "two", "a", None, hash="h2")
    api.begin_step(run, "three", "a")
    api.post(f"/runs/{run}/release", {"leaseOwner": "a"})["run"]
    taken, = api.claim(owner="b", checkpoints=True)
    assert [(done["name"], done["inputHash"], done["output"]) for done in taken["checkpoints"]] == [
        ("one", "h", {"z": "\0", "a": [1.0]}), ("two", "h2", None)]
    assert (taken["input"], taken["checkpointsTruncated"]) == ("a\0b", False)
    assert "checkpoints" not in api.run(run)


def test_a_claim_for_some_workflows_is_given_no_others_runs(api):
    order = [(workflow, priority) for priority in (0, 5) for workflow in "abcab"]
    runs = [api.enqueue(workflow=workflow, priority=priority) for workflow, priority in order]
    api.enqueue(workflow="a", priority=9, delayMs=60_000)
    expected = [runs[n] for n in (5, 6, 8, 9, 0, 1, 3, 4)]  # the higher priority first, then the older
    assert api.claim(workflows=[], limit=100) == []
    assert api.claim(workflows=["unheard of"], limit=100) == []
    assert [run["id"] for run in api.claim(workflows=["b"])] == [runs[6]]
    expected.remove(runs[6])
    taken = api.claim("nowhere", "default", workflows=["b", "unheard of", "a", "b"], limit=4, owner="o", id="c1")
    assert [run["id"] for run in taken] == expected[:4]
    again = api.claim("nowhere", "default", workflows=["b", "a"], limit=4, owner="o", id="c1")
    assert [run["id"] for run in again] == expected[:4]
    assert [run["id"] for run in api.claim(workflows=["a", "b"], limit=100)] == expected[4:]
    assert [run["id"] for run in api.claim(limit=100)] == [runs[7], runs[2]]


def test_claims_for_some_workflows_stay_within_the_caps(api):
    api.put("/queues/default/config", {"concurrency": 3, "ratePerMinute": 4})["config"]
    for workflow in "abab":
        api.enqueue(workflow=workflow)
    assert [run["workflowName"] for run in api.claim(workflows=["b"], limit=9)] == ["b", "b"]
    taken = api.claim(workflows=["a", "b"], limit=9)
    assert [run["workflowName"] for run in taken] == ["a"]
    api.complete(taken[0]["id"])["run"]
    assert len(api.claim(workflows=["a"], limit=9)) == 1
    assert api.queue("default")["queued"] == 0
    api.enqueue(workflow="a")
    assert api.claim(workflows=["a"]) == []


def test_what_others_are_just_taking_keeps_no_run_behind_it_from_a_claim(api, database):
    runs = [api.enqueue(workflow="a") for _ in range(30)]
    with psycopg.connect(database) as other:
        other.execute("select from tidebase.runs where id = any (%s) for no key update", [runs[:25]])
        assert [run["id"] for run in api.claim(workflows=["a"], limit=3)] == runs[25:28]
        assert [run["id"] for run in api.claim(limit=1)] == runs[28:29]
        other.rollback()
    assert [run["id"] for run in api.claim(workflows=["a"], limit=100)] == [*runs[:25], runs[29]]


@pytest.mark.parametrize("large", ["input", "checkpoints"])
def test_a_claim_stops_where_its_answer_would_grow_too_large_and_gives_one_run_in_any_case(api, large):
    text = "x" * 3_000_000
    runs = [api.enqueue("first" if n < 2 else "second", input=text if large == "input" else 1) for n in range(5)]
    if large == "checkpoints":
        for run in runs:
            api.do_step(run, "s", "a", text)
    sizes = []
    while taken := api.claim("first", "second", limit=100, checkpoints=large == "checkpoints"):
        assert [run["id"] for run in taken] == runs[:len(taken)]
        sizes.append(len(taken))
        del runs[:len(taken)]
    assert sizes == [2, 2, 1]
    huge = api.enqueue("first", input=text * 4)
    assert [run["id"] for run in api.claim("first", limit=100)] == [huge]


@pytest.mark.parametrize("body", [
    {}, {"queues": []}, {"queues": "default"}, {"queues": [""]}, {"queues": [5]}, {"queues": ["a"] * 1001},
    {"queues": ["a"], "limit": 0}, {"queues": ["a"], "limit": 101}, {"queues": ["a"], "limit": "1"},
    {"queues": ["a"], "waitMs": 25_001}, {"queues": ["a"], "waitMs": -1}, {"queues": ["a"], "waitMs": 1.0},
    {"queues": ["a"], "leaseOwner": ""}, {"queues": ["a"], "leaseOwner": None}, {"queues": ["a"], "checkpoints": 1},
    {"queues": ["a\x00"]}, {"queues": ["a"], "id": "no spaces"},
])
def test_a_claim_that_cannot_be_is_refused(api, body):
    refused(api.post("/queues/claim", body), 400, "invalid_request")


# --- held claims


def hold(api: Api, *queues: str, **body: Any) -> tuple[threading.Thread, list[Answer]]:
    """A claim that waits, in a thread; its answer arrives in the list."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(
        api.post("/queues/claim", {"queues": list(queues) or ["default"], "waitMs": 25_000, **body})))
    thread.start()
    return thread, answers


def waiting(api: Api, count: int) -> None:
    eventually(lambda: len(api.server.watcher.long_polls) == count)


def test_a_held_claim_gets_a_run_enqueued_here(api):
    thread, answers = hold(api, "other", "default")
    waiting(api, 1)
    run = api.enqueue()
    thread.join(10)
    assert [taken["id"] for taken in answers[0]["runs"]] == [run]
    waiting(api, 0)


def test_a_held_claim_gets_a_run_enqueued_by_another_server(api, spawn_server):
    other = Api(spawn_server(TIDEBASE_RECONCILE_MS=3_600_000).url)
    thread, answers = hold(api)
    waiting(api, 1)
    run = other.enqueue()
    thread.join(10)
    assert [taken["id"] for taken in answers[0]["runs"]] == [run]


def test_a_held_claim_gets_a_run_whose_time_comes_and_one_that_is_requeued(api, clock):
    run = api.enqueue(delayMs=60_000)
    thread, answers = hold(api, leaseOwner="a")
    waiting(api, 1)
    clock.advance(ms=60_000)
    thread.join(10)
    assert [taken["id"] for taken in answers[0]["runs"]] == [run]
    thread, answers = hold(api)
    waiting(api, 1)
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    thread.join(10)
    assert [taken["id"] for taken in answers[0]["runs"]] == [run]


def test_a_held_claim_starts_as_soon_as_a_cap_has_room(api):
    api.put("/queues/default/config", {"concurrency": 1})
    first, second = api.enqueue(), api.enqueue()
    api.claim(owner="a")
    thread, answers = hold(api)
    waiting(api, 1)
    api.complete(first, leaseOwner="a")
    thread.join(10)
    assert [taken["id"] for taken in answers[0]["runs"]] == [second]


def test_each_of_several_held_claims_gets_a_run_of_its_own(api):
    held = [hold(api) for _ in range(5)]
    waiting(api, 5)
    runs = [run["id"] for run in api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 5})["runs"]]
    for thread, _ in held:
        thread.join(10)
    assert sorted(answers[0]["runs"][0]["id"] for _, answers in held) == sorted(runs)


def test_a_held_claim_ends_empty_after_its_time(api):
    answer = api.post("/queues/claim", {"queues": ["default"], "waitMs": 30})
    assert answer["runs"] == []
    assert "retry-after" not in answer.headers


def test_a_held_claim_is_answered_when_the_server_stops(start_server):
    server = start_server()
    api = Api(server.url, server)
    thread, answers = hold(api)
    waiting(api, 1)
    server.stop()
    thread.join(10)
    assert answers[0]["runs"] == []


def test_requests_are_answered_while_more_wait_than_there_are_threads(start_server):
    server = start_server(TIDEBASE_POOL=4)
    api = Api(server.url, server)
    held = [hold(api) for _ in range(20)]
    waiting(api, 20)
    assert api.run(api.create())["status"] == "pending"
    api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 20})
    for thread, answers in held:
        thread.join(10)
        assert len(answers[0]["runs"]) == 1


def test_where_the_machine_gives_no_more_threads_fewer_wait_and_requests_are_answered(start_server):
    server = start_server(TIDEBASE_POOL=4)
    api = Api(server.url, server)
    held = [hold(api) for _ in range(3)]
    waiting(api, 3)

    def none_left(*arguments):
        raise RuntimeError("can't start new thread")

    server._http.waitress.task_dispatcher.start_new_thread = none_left
    for _ in range(8):  # as many as would take all the threads that there are
        answer = api.post("/queues/claim", {"queues": ["default"], "waitMs": 25_000})
        assert (answer["runs"], answer.headers["retry-after"]) == ([], "1")
    waiting(api, 3)
    assert api.run(api.create())["status"] == "pending"
    api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 3})
    for thread, answers in held:
        thread.join(10)
        assert len(answers[0]["runs"]) == 1


def test_without_a_place_to_wait_in_the_answer_comes_at_once_and_says_when_to_ask_again(start_server):
    server = start_server(TIDEBASE_MAX_WAITING=2)
    api = Api(server.url, server)
    held = [hold(api) for _ in range(2)]
    waiting(api, 2)
    answer = api.post("/queues/claim", {"queues": ["default"], "waitMs": 25_000, "leaseOwner": "me"})
    assert (answer["runs"], answer["leaseOwner"], answer.headers["retry-after"]) == ([], "me", "1")
    run = api.enqueue("elsewhere")
    answer = api.post("/queues/claim", {"queues": ["elsewhere"], "waitMs": 25_000})
    assert [taken["id"] for taken in answer["runs"]] == [run]  # what is ready needs no place
    api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 2})
    for thread, _ in held:
        thread.join(10)
    thread, answers = hold(api)
    waiting(api, 1)  # the room is free again
    api.enqueue()
    thread.join(10)
    assert len(answers[0]["runs"]) == 1


def test_a_claimer_that_hung_up_while_it_waited_is_given_nothing(api):
    connection = http.client.HTTPConnection(api.address)
    connection.request("POST", "/queues/claim", json.dumps({"queues": ["default"], "waitMs": 25_000}),
                       {"content-type": "application/json"})
    waiting(api, 1)
    connection.close()
    waiting(api, 0)
    run = api.enqueue()
    assert [taken["attempt"] for taken in api.claim()] == [1]
    assert api.event_types(run) == ["run.enqueued", "run.claimed"]


def test_claimers_that_hung_up_keep_no_run_from_those_who_wait(start_server, monkeypatch):
    monkeypatch.setattr(watcher, "DISCONNECT_SECONDS", 3600.0)
    monkeypatch.setattr(watcher, "WATCH_SECONDS", 3600.0)  # no second look for those the first one passed over
    server = start_server()
    api = Api(server.url, server)
    dead = [http.client.HTTPConnection(api.address) for _ in range(3)]
    for number, connection in enumerate(dead, 1):
        connection.request("POST", "/queues/claim", json.dumps({"queues": ["default"], "waitMs": 25_000}),
                           {"content-type": "application/json"})
        waiting(api, number)
    thread, answers = hold(api)
    waiting(api, 4)
    eventually(lambda: not server.watcher.wake_event.is_set())  # it has seen them wait
    for connection in dead:
        connection.close()
    run = api.enqueue()
    thread.join(15)
    assert [taken["id"] for taken in answers[0]["runs"]] == [run]


def test_claims_that_wait_are_woken_by_runs_of_their_workflows_alone(api, server, monkeypatch):
    asked = Counter()
    call = server.database.call

    def counted(function: str, **arguments: Any) -> Any:
        asked[function] += 1
        return call(function, **arguments)

    for workflow in ("foreign", "foreign", "wanted elsewhere"):
        api.enqueue(workflow=workflow)
    monkeypatch.setattr(server.database, "call", counted)
    held = [hold(api, workflows=["mine"]), hold(api, workflows=["mine", "other"]), hold(api, workflows=[], waitMs=900)]
    waiting(api, 3)
    looks = asked["watch"] + 10
    eventually(lambda: asked["watch"] >= looks)
    assert asked["claim_runs"] == 3  # each once, before it waited
    run = api.enqueue(workflow="other")
    held[1][0].join(10)
    assert [taken["id"] for taken in held[1][1][0]["runs"]] == [run]
    run = api.enqueue(workflow="mine")
    held[0][0].join(10)
    assert [taken["id"] for taken in held[0][1][0]["runs"]] == [run]
    assert asked["claim_runs"] == 5
    held[2][0].join(10)
    assert held[2][1][0]["runs"] == []


# --- caps and rates


def test_a_concurrency_cap_holds_until_a_run_ends_or_goes_back(api):
    assert api.put("/queues/default/config", {"concurrency": 2})["config"] == {
        "name": "default", "concurrency": 2, "ratePerMinute": None, "invokeUrl": None, "paused": False}
    runs = [api.enqueue() for _ in range(6)]
    taken = [run["id"] for run in api.claim(owner="a", limit=5)]
    assert taken == runs[:2]
    assert api.claim() == []
    api.complete(runs[0], leaseOwner="a")
    assert len(api.claim(owner="a", limit=5)) == 1
    api.fail(runs[1], leaseOwner="a")
    assert len(api.claim(owner="a", limit=5)) == 1
    api.post(f"/runs/{runs[2]}/cancel")
    assert len(api.claim(owner="a", limit=5)) == 1
    api.post(f"/runs/{runs[3]}/release", {"leaseOwner": "a"})["run"]
    assert len(api.claim(owner="a", limit=5)) == 1


def test_a_cap_of_one_queue_leaves_room_in_the_next(api):
    api.put("/queues/a/config", {"concurrency": 1})
    for queue in "aab":
        api.enqueue(queue)
    assert [run["queue"] for run in api.claim("a", "b", limit=9)] == ["a", "b"]


def test_a_rate_counts_the_claims_of_the_last_sixty_seconds_ended_runs_too(api, clock):
    api.put("/queues/default/config", {"ratePerMinute": 3})
    for _ in range(9):
        api.enqueue()
    for run in api.claim(owner="a", limit=2):
        api.complete(run["id"], leaseOwner="a")
    clock.advance(ms=30_000)
    assert len(api.claim(limit=9)) == 1
    assert api.claim(limit=9) == []
    clock.advance(ms=29_000)
    assert api.claim(limit=9) == []
    clock.advance(ms=1_000)
    assert len(api.claim(limit=9)) == 2
    assert api.claim(limit=9) == []


def test_a_changed_configuration_counts_from_the_next_claim_and_null_clears(api):
    for _ in range(9):
        api.enqueue()
    configure = lambda **caps: api.put("/queues/default/config", caps)["config"]  # noqa: E731
    configure(concurrency=1, ratePerMinute=3)
    assert len(api.claim(limit=9)) == 1
    assert configure(concurrency=2)["ratePerMinute"] == 3
    assert len(api.claim(limit=9)) == 1
    assert configure(concurrency=None) == {
        "name": "default", "concurrency": None, "ratePerMinute": 3, "invokeUrl": None,
        "paused": False}
    assert len(api.claim(limit=9)) == 1
    assert configure(ratePerMinute=None)["ratePerMinute"] is None
    assert len(api.claim(limit=2)) == 2
    configure(concurrency=1)  # less than are running: nothing starts, nothing ends
    assert api.claim(limit=9) == []
    assert configure() == {"name": "default", "concurrency": 1, "ratePerMinute": None, "invokeUrl": None,
                           "paused": False}
    assert api.queue("default")["running"] == 5


@pytest.mark.parametrize("body", [
    {"concurrency": 0}, {"concurrency": -1}, {"concurrency": "1"}, {"concurrency": 1.0}, {"concurrency": True},
    {"ratePerMinute": 0}, {"ratePerMinute": [1]}, {"invokeUrl": "ftp://x/"}, {"invokeUrl": "nowhere"},
    {"invokeUrl": ""}, {"invokeUrl": 5}, [],
])
def test_a_configuration_that_cannot_be_is_refused_and_changes_nothing(api, body):
    before = api.put("/queues/default/config", {"concurrency": 7})["config"]
    refused(api.put("/queues/default/config", body), 400, "invalid_request")
    assert api.queue("default")["config"] == before


# --- stats


def test_the_counts_follow_every_turn_of_a_runs_life(api, clock):
    def counts(queue: str = "default") -> dict[str, int]:
        shown = api.queue(queue)
        return {name: shown[name] for name in ("queued", "running", "waiting", "failed", "completed", "cancelled")
                if shown[name]}

    runs = [api.enqueue(maxAttempts=1) for _ in range(5)]
    assert counts() == {"queued": 5}
    api.claim(owner="a", limit=4)
    assert counts() == {"queued": 1, "running": 4}
    api.complete(runs[0])
    api.fail(runs[1])
    api.post(f"/runs/{runs[2]}/cancel")
    assert counts() == {"queued": 1, "running": 1, "completed": 1, "failed": 1, "cancelled": 1}
    api.post(f"/runs/{runs[1]}/cancel")  # failed, then cancelled
    assert counts() == {"queued": 1, "running": 1, "completed": 1, "cancelled": 2}
    api.post(f"/runs/{runs[1]}/retry")
    api.post(f"/runs/{runs[2]}/retry")
    assert counts() == {"queued": 3, "running": 1, "completed": 1}
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    assert counts() == {"queued": 3, "failed": 1, "completed": 1}
    api.begin(runs[3], "b")
    assert counts() == {"queued": 3, "running": 1, "completed": 1}
    api.server.database.count("fold_tallies", rows=0)
    assert counts() == {"queued": 3, "running": 1, "completed": 1}
    api.create("plain")
    assert [queue["name"] for queue in api.get("/queues")["queues"]] == ["default"]


def test_the_oldest_ready_run_is_told_by_its_age(api, clock):
    api.put("/queues/empty/config", {})
    api.enqueue(runAt="2999-01-01T00:00:00Z")
    assert [api.queue(name)["oldestReadyMs"] for name in ("empty", "default")] == [None, None]
    run = api.enqueue(delayMs=1)
    clock.advance(ms=60_001)
    assert 60_000 <= api.queue("default")["oldestReadyMs"] < 120_000
    api.post(f"/runs/{run}/cancel")
    assert api.queue("default")["oldestReadyMs"] is None


# --- push queues


def push_queue(api: Api, receiver: Any, **caps: int) -> None:
    api.put("/queues/default/config", {"invokeUrl": receiver.url, **caps})["config"]


def test_a_ready_run_of_a_push_queue_is_offered_once_and_again_after_sixty_seconds(api, clock, receiver):
    push_queue(api, receiver)
    run, later = api.enqueue(), api.enqueue(delayMs=61_000)
    assert api.reconcile() == 1
    body, = receiver.wait_for(1)
    assert body.items() >= {"type": "run.invoke", "runId": run, "workflowName": "report", "reason": "queue_dispatch",
                            "attempt": 0}.items()
    assert api.run(run)["status"] == "queued"
    clock.advance(ms=58_000)
    assert api.reconcile() == 0
    clock.advance(ms=2_000)
    assert api.reconcile() == 1
    assert [body["runId"] for body in receiver.wait_for(2)] == [run, run]
    assert api.begin(run, "app")["run"]["status"] == "running"
    clock.advance(ms=2_000)
    assert api.reconcile() == 1
    assert receiver.wait_for(3)[-1]["runId"] == later


def attempts(api: Api, run: str) -> list[tuple[str, str, int | None]]:
    return [(attempt["reason"], attempt["status"], attempt["httpStatus"])
            for attempt in api.detail(run)["recoveryAttempts"]]


def test_an_offer_stands_among_the_recovery_attempts_newest_first_with_its_events(api, clock, receiver):
    push_queue(api, receiver)
    run = api.enqueue(recoveryWebhook=receiver.url)
    api.reconcile()
    eventually(lambda: attempts(api, run) == [("queue_dispatch", "delivered", 200)])
    receiver.answers = [503]
    clock.advance(ms=60_000)
    api.reconcile()
    eventually(lambda: attempts(api, run)[0] == ("queue_dispatch", "pending", 503))
    api.server.let_send(False)  # else the next try of this one may be faster than the next offer
    clock.advance(ms=60_000)
    api.reconcile()
    receiver.answers = [200]
    api.server.let_send(True)
    delivered = ("queue_dispatch", "delivered", 200)
    eventually(lambda: attempts(api, run) == [delivered, ("queue_dispatch", "failed", 503), delivered])
    api.post(f"/runs/{run}/recover")["recoveryAttempt"]
    eventually(lambda: attempts(api, run)[0] == ("manual", "delivered", 200))
    newest_first = api.detail(run)["recoveryAttempts"]
    assert {attempt["webhookUrl"] for attempt in newest_first} == {receiver.url}
    assert all(attempt["id"].startswith("rec_") for attempt in newest_first)
    fourth, third, second, first = (attempt["id"] for attempt in newest_first)
    told = [(event["type"], event["payload"]["recoveryAttemptId"], event["payload"]["reason"])
            for event in api.events(run) if event["type"].startswith("recovery.")]
    assert told == [
        ("recovery.started", first, "queue_dispatch"), ("recovery.delivered", first, "queue_dispatch"),
        ("recovery.started", second, "queue_dispatch"), ("recovery.failed", second, "queue_dispatch"),
        ("recovery.started", third, "queue_dispatch"), ("recovery.delivered", third, "queue_dispatch"),
        ("recovery.started", fourth, "manual"), ("recovery.delivered", fourth, "manual")]


def test_an_offered_run_is_not_claimed_by_a_worker_meanwhile(api, clock, receiver):
    push_queue(api, receiver)
    run = api.enqueue()
    api.reconcile()
    assert api.claim() == []
    clock.advance(ms=60_000)
    [taken] = eventually(api.claim)  # while its webhook is being settled, it is passed over
    assert taken["id"] == run


def test_a_pushed_run_that_is_begun_and_given_back_is_ready_at_once(api, receiver):
    push_queue(api, receiver, concurrency=1)
    run = api.enqueue()
    api.reconcile()
    receiver.wait_for(1)  # what is offered and begun before it is sent need not be sent
    api.begin(run, "app")["run"]
    api.post(f"/runs/{run}/release", {"leaseOwner": "app"})["run"]
    assert api.reconcile() == 1
    assert [body["runId"] for body in receiver.wait_for(2)] == [run, run]


def test_offers_count_against_concurrency_until_the_run_ends_or_the_offer_lapses(api, clock, receiver):
    push_queue(api, receiver, concurrency=2)
    runs = [api.enqueue(runAt=f"2001-01-01T00:00:0{n}Z") for n in range(6)]
    assert [api.reconcile(), api.reconcile()] == [2, 0]
    assert {body["runId"] for body in receiver.wait_for(2)} == set(runs[:2])
    api.begin(runs[0], "app")["run"]
    assert api.reconcile() == 0  # one offered, one running
    api.complete(runs[0])
    assert api.reconcile() == 1
    assert receiver.wait_for(3)[-1]["runId"] == runs[2]
    api.begin(runs[2], "app")
    assert api.fail(runs[2], leaseOwner="app")["requeued"] is True
    assert api.reconcile() == 1  # what waits for its next attempt is neither offered nor running
    assert receiver.wait_for(4)[-1]["runId"] == runs[3]
    clock.advance(ms=60_000)
    assert api.reconcile() == 2


def test_offers_count_against_the_rate(api, clock, receiver):
    push_queue(api, receiver, ratePerMinute=2)
    for _ in range(4):
        api.enqueue()
    assert [api.reconcile(), api.reconcile()] == [2, 0]
    clock.advance(ms=60_000)
    assert [api.reconcile(), api.reconcile()] == [2, 0]


def test_two_servers_offer_a_run_once(api, start_server, receiver):
    other = start_server()
    push_queue(api, receiver)
    api.post("/queues/default/enqueue", {"runs": [{"workflowName": "w"}] * 40})
    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(lambda server: server.reconciler.tick(), [api.server, other]))
    assert sum(done) == 40
    bodies = receiver.wait_for(40)
    assert len({body["runId"] for body in bodies}) == 40


def test_offers_to_an_app_that_is_down_do_not_pile_up(api, clock, receiver, sql):
    receiver.answers = [503]
    push_queue(api, receiver)
    api.enqueue()
    for offer in range(1, 5):
        assert api.reconcile() == 1
        receiver.wait_for(offer)
        eventually(lambda: sql("select http_status from tidebase.outbox order by seq desc limit 1") == [(503,)])
        clock.advance(ms=60_000)
    assert sql("select count(*) from tidebase.outbox where status = 'pending'") == [(1,)]


def test_a_queue_that_no_longer_pushes_leaves_its_runs_to_claimers(api, clock, receiver):
    push_queue(api, receiver)
    run = api.enqueue()
    api.put("/queues/default/config", {"invokeUrl": None})
    assert api.reconcile() == 0
    assert [taken["id"] for taken in api.claim()] == [run]
    assert receiver.requests == []
