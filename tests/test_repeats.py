"""Every mutating request may arrive twice, its first answer lost: the second one changes nothing and is answered alike.

The clock stands still in these tests, so that "alike" is to the letter. A test fails when a route is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
from conftest import Answer, Api, LocalServer, refused

import tidebase

HOOK = "http://127.0.0.1:9/hook"
Request = tuple[str, str, Any]


@pytest.fixture
def api(api: Api, server: LocalServer, sql: Callable[..., Any]) -> Iterator[Api]:
    """The verbs, at one instant, and with no webhook under way."""
    server.let_send(False)
    sql("create or replace function tidebase.now() returns timestamptz language sql volatile as"
        " $$ select timestamptz '2026-06-12 10:31:00Z' $$")
    yield api
    server.let_send(True)


def send(api: Api, request: Request) -> Answer:
    method, path, body = request
    owner = {"x-tidebase-worker": "a"} if path.endswith("/begin") else {}
    return api.send(method, path, body, headers=owner)


def begun(api: Api, **body: Any) -> str:
    api.create(id="r", recoveryWebhook=HOOK, **body)
    api.begin("r", "a")["run"]
    return "/runs/r"


def claimed(api: Api, **body: Any) -> str:
    api.enqueue(id="r", **body)
    api.claim(owner="a")
    return "/runs/r"


def step_of(api: Api, at: str, **body: Any) -> str:
    return f"{at}/steps/{api.begin_step('r', 's', 'a', **body)['step']['id']}"


def ended(api: Api) -> str:
    at = begun(api)
    api.fail("r", leaseOwner="a")["run"]
    return at


def gate(api: Api) -> Any:
    return api.post(f"{begun(api)}/gates/begin", {"name": "g", "prompt": "?"})["gate"]


def in_review(api: Api) -> str:
    step = step_of(api, begun(api))
    api.post(f"{step}/fail", {"leaseOwner": "a", "error": 1, "resumeDecision": "manual_review"})["step"]
    return step


def resolved(api: Api) -> Request:
    asked = gate(api)
    return "POST", f"/runs/r/gates/{asked['id']}/resolve", {"token": asked["resolveToken"], "decision": "approved"}


def saved(api: Api) -> Request:
    api.put(f"{begun(api)}/state", {"value": 1})["state"]
    return "POST", "/runs/r/state/save", {"id": VERSION, "label": "l"}


def scheduled(api: Api) -> Request:
    api.put("/schedules/nightly", SCHEDULE)["schedule"]
    return "DELETE", "/schedules/nightly", None


def deleted(api: Api) -> Request:
    return "DELETE", ended(api), None


def looked(api: Api) -> Request:
    asked = gate(api)
    return "POST", f"/runs/r/gates/{asked['id']}/look", {"token": asked["resolveToken"]}


def delivery(api: Api) -> str:
    api.post(f"/runs/{api.create(id='r', channels=[{'type': 'webhook', 'url': HOOK}])}/cancel")["run"]
    return f"/runs/r/deliveries/{api.get('/runs/r/deliveries')['deliveries'][0]['id']}"


VERSION = f"ver_{0:032x}"
RECORD = {"name": "s", "inputHash": "h", "leaseOwner": "a", "output": 1}
STARTED = "2026-06-12T10:30:59.123456Z"
FAILURE = {"leaseOwner": "a", "error": {"message": "boom"}}
SCHEDULE = {"cron": "0 3 * * *", "workflowName": "w"}
REQUESTS: dict[str, Callable[[Api], Request]] = {
    "create with an id": lambda api: ("POST", "/runs/w", {"id": "r", "input": 1, "channels": [
        {"type": "webhook", "url": HOOK}]}),
    "begin a run": lambda api: ("POST", f"/runs/{api.create(id='r')}/begin", {"checkpoints": True}),
    "begin a queued run": lambda api: ("POST", f"/runs/{api.enqueue(id='r')}/begin", None),
    "heartbeat": lambda api: ("POST", f"{begun(api)}/heartbeat", {"leaseOwner": "a"}),
    "heartbeats": lambda api: (
        "POST", "/heartbeats", {"runs": [{"id": begun(api)[6:], "leaseOwner": owner} for owner in "a"]}),
    "complete": lambda api: ("POST", f"{begun(api)}/complete", {"leaseOwner": "a", "result": 1}),
    "complete without an owner": lambda api: ("POST", f"{begun(api)}/complete", {"result": 1}),
    "fail": lambda api: ("POST", f"{begun(api)}/fail", FAILURE),
    "fail without an owner": lambda api: ("POST", f"{claimed(api)}/fail", {"error": 1}),
    "fail and be requeued": lambda api: ("POST", f"{claimed(api)}/fail", FAILURE),
    "fail for the last time": lambda api: ("POST", f"{claimed(api, maxAttempts=1)}/fail", FAILURE),
    "cancel": lambda api: ("POST", f"{begun(api)}/cancel", {"reason": "why"}),
    "release": lambda api: ("POST", f"{claimed(api)}/release", {"leaseOwner": "a"}),
    "release a plain run": lambda api: ("POST", f"{begun(api)}/release", {"leaseOwner": "a"}),
    "retry": lambda api: ("POST", f"{ended(api)}/retry", {}),
    "recover": lambda api: ("POST", f"{begun(api)}/recover", {}),
    "fork": lambda api: ("POST", f"{begun(api)}/fork", {"id": "f"}),
    "make a child": lambda api: ("POST", f"{begun(api)}/children", {"name": "c", "workflowName": "w"}),
    "begin a step": lambda api: (
        "POST", f"{begun(api)}/steps/begin", {"name": "s", "inputHash": "h", "leaseOwner": "a", "input": 1}),
    "begin a step that is done": lambda api: (
        "POST", f"/runs/{(begun(api), api.do_step('r', 's', 'a'))[0][6:]}/steps/begin",
        {"name": "s", "inputHash": "h", "leaseOwner": "a"}),
    "complete a step": lambda api: (
        "POST", f"{step_of(api, begun(api))}/complete", {"leaseOwner": "a", "output": {"n": 1}}),
    "fail a step": lambda api: ("POST", f"{step_of(api, begun(api))}/fail", FAILURE),
    "fail a step to be retried": lambda api: (
        "POST", f"{step_of(api, begun(api))}/fail", {**FAILURE, "retryable": True}),
    "put a step up for review": lambda api: (
        "POST", f"{step_of(api, begun(api), options={'replay': 'manual'})}/fail", FAILURE),
    "review: retry": lambda api: ("POST", f"{in_review(api)}/review", {"decision": "retry"}),
    "review: complete": lambda api: ("POST", f"{in_review(api)}/review", {"decision": "complete", "output": 1}),
    "review: fail": lambda api: ("POST", f"{in_review(api)}/review", {"decision": "fail"}),
    "record a step": lambda api: ("POST", f"{begun(api)}/steps", RECORD),
    "record a failed step": lambda api: (
        "POST", f"{begun(api)}/steps", {**RECORD, "error": "boom", "startedAt": STARTED, "durationMs": 5}),
    "record a failed step to be retried": lambda api: (
        "POST", f"{begun(api)}/steps", {**RECORD, "error": "boom", "startedAt": STARTED, "retryable": True}),
    "record many failed steps": lambda api: (
        "POST", "/steps", {"records": [
            {"runId": begun(api)[6:], **RECORD, "error": {"n": 1.0}, "startedAt": STARTED}]}),
    "record many": lambda api: (
        "POST", "/steps", {"records": [{"runId": begun(api)[6:], **RECORD}, {"runId": "r", **RECORD, "name": "t"}]}),
    "write many": lambda api: (
        "POST", "/writes", {"writes": [
            {"do": "record_step", "runId": begun(api)[6:], **RECORD},
            {"do": "begin_step", "runId": begun(api)[6:], **RECORD},
            {"do": "complete_run", "runId": begun(api)[6:], "leaseOwner": "a", "result": {"n": 1.0}},
            {"do": "enqueue_run", "queue": "q", "workflowName": "w", "id": "r"},
            {"do": "create_child", "runId": begun(api)[6:], "name": "c", "workflowName": "w", "queue": "q"},
            {"do": "complete_run", "runId": "nowhere"}]}),
    "ask a person": lambda api: ("POST", f"{begun(api)}/gates/begin", {"name": "g", "prompt": "?"}),
    "wait": lambda api: ("POST", f"{claimed(api)}/wait", {"leaseOwner": "a", "for": {"event": "e"}}),
    "begin to wait": lambda api: ("POST", f"{begun(api)}/steps/begin", {
        "name": "sleep:1", "inputHash": "h", "leaseOwner": "a", "input": {"seconds": 5}, "options": {"wait": True}}),
    "signal": lambda api: ("POST", f"{begun(api)}/signals", {"name": "s", "payload": 1, "id": "sig"}),
    "expire a signal": lambda api: ("POST", f"{begun(api)}/signals/s/expire", {"leaseOwner": "a"}),
    "set the state": lambda api: ("PUT", f"{begun(api)}/state", {"id": VERSION, "value": {"n": 1}}),
    "merge into the state": lambda api: ("PATCH", f"{begun(api)}/state", {"id": VERSION, "value": {"n": 1}}),
    "save the state": saved,
    "take a snapshot": lambda api: ("POST", f"{begun(api)}/snapshots", {"id": VERSION, "label": "l", "state": 1}),
    "record usage": lambda api: ("POST", f"{begun(api)}/usage", {"id": f"use_{0:032x}", "costUsd": 0.5}),
    "enqueue with an id": lambda api: ("POST", "/queues/q/enqueue", {"id": "r", "workflowName": "w"}),
    "enqueue many with ids": lambda api: (
        "POST", "/queues/q/enqueue", {"runs": [{"id": name, "workflowName": "w"} for name in ("r", "s", "t")]}),
    "enqueue with a dedupe key": lambda api: ("POST", "/queues/q/enqueue", {"workflowName": "w", "dedupeKey": "k"}),
    "claim with an id": lambda api: (
        "POST", "/queues/claim", {"queues": [(api.enqueue("q", id="r"), api.enqueue("q"), "q")[2]], "leaseOwner": "a",
                                  "id": "claim1", "checkpoints": True}),
    "configure a queue": lambda api: ("PUT", "/queues/q/config", {"concurrency": 1, "invokeUrl": None}),
    "schedule": lambda api: ("PUT", "/schedules/nightly", SCHEDULE),
    "run a schedule": lambda api: (
        "POST", "/schedules/nightly/run", {"id": (api.put("/schedules/nightly", SCHEDULE), "r")[1]}),
    "preview a schedule": lambda api: ("POST", "/schedules/preview", {"cron": "0 3 * * *"}),
    "cancel many": lambda api: ("POST", "/bulk", {"action": "cancel", "ids": [begun(api)[6:], "nowhere"]}),
    "retry many": lambda api: ("POST", "/bulk", {"action": "retry", "ids": [ended(api)[6:]]}),
    "ask what changed": lambda api: ("POST", "/changes", {"query": "workflow=none"}),
    "look at a gate": looked,
    "send a webhook again": lambda api: ("POST", f"{delivery(api)}/resend", None),
}
SAYS_SO = {"created": (True, False), "deduplicated": (False, True)}  # by which a repeat may be told


def world(api: Api) -> Any:
    """All that a repeat could have changed."""
    listed = api.get("/runs")["runs"]
    return [api.detail(run["id"]) for run in listed], api.get("/queues").json, api.get("/schedules").json


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_that_arrives_twice_counts_once(api: Api, what: str) -> None:
    request = REQUESTS[what](api)
    first = send(api, request)
    assert first.status == 200, first
    before = world(api)
    for _ in range(2):
        second = send(api, request)
        assert world(api) == before
        assert second.status == 200, second
        answer, repeated = json.loads(first.text), json.loads(second.text)
        for key, (at_first, then) in SAYS_SO.items():
            if key in answer and not (what == "enqueue with an id" and key == "deduplicated"):
                assert (answer.pop(key), repeated.pop(key)) == (at_first, then)
        for part, again in zip(answer.get("results", ()), repeated.get("results", ()), strict=True):
            if "created" in part:
                assert (part.pop("created"), again.pop("created")) == SAYS_SO["created"]
        assert repeated == answer


def test_a_gate_that_was_decided_is_not_decided_again(api: Api) -> None:
    request = resolved(api)
    assert send(api, request).status == 200
    before = world(api)
    refused(send(api, request), 409, "gate_resolved")  # protocol.md: already resolved is a 409
    assert world(api) == before


def test_what_was_deleted_is_not_there_to_delete(api: Api) -> None:
    for make in (scheduled, deleted):
        request = make(api)
        assert send(api, request).status == 200
        refused(send(api, request), 404, "not_found")


def test_every_mutating_route_is_sent_twice() -> None:
    urls = tidebase.app.url_map.bind("here")
    requests = [make(MagicMock()) for make in (*REQUESTS.values(), resolved, scheduled, deleted)]
    sent = {(method, urls.match(path, method)[0]) for method, path, _ in requests}
    assert sent == {(method, rule.endpoint) for rule in tidebase.app.url_map.iter_rules()
                    for method in (rule.methods or set()) & {"POST", "PUT", "PATCH", "DELETE"}}
