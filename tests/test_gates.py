"""A gate is asked once, decided once by whoever has its token, and its reader is told at once, however the wait ends.

Also whom a gate is told of: the run's channels and its own, with what resolves it, and never after it was decided.
"""

from __future__ import annotations

import re
import threading
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from conftest import Answer, Api, eventually, refused, together

KEYS = {"id", "runId", "name", "prompt", "data", "status", "decision", "actor", "decisionPayload", "capability",
        "channels", "resolveToken", "reviewUrl", "createdAt", "updatedAt", "resolvedAt", "expiresAt"}
PUBLIC_KEYS = {"id", "runId", "name", "prompt", "data", "status", "decision", "actor", "capability", "resolveUrl",
               "resolveToken", "expiresAt"}
KEY = "a key of more than sixteen characters"


def ask(api: Api, run: str, name: Any = "ok", **body: Any) -> Answer:
    return api.post(f"/runs/{run}/gates/begin", {"name": name, "prompt": "Send it?", **body})


def look(api: Api, gate: Any, query: str = "") -> Answer:
    return api.get(f"/runs/{gate['runId']}/gates/{gate['id']}{query}")


def resolve(api: Api, gate: Any, decision: str = "approved", **body: Any) -> Answer:
    fields = {"token": gate["resolveToken"], "decision": decision, **body}
    return api.post(f"/runs/{gate['runId']}/gates/{gate['id']}/resolve", fields)


class Reader(threading.Thread):
    """Somebody who waits for a gate, in a thread."""

    def __init__(self, api: Api, gate: Any) -> None:
        super().__init__()
        self.api, self.gate = api, gate
        before = len(api.server.watcher.long_polls)
        self.start()
        eventually(lambda: len(api.server.watcher.long_polls) > before)

    def run(self) -> None:
        self.answer = look(self.api, self.gate, "?waitMs=25000")

    def told(self) -> Answer:
        self.join(15)
        assert not self.is_alive()
        return self.answer


# --- asked and decided


def test_a_gate_shows_all_of_itself_and_waits(api):
    run = api.create()
    answer = ask(api, run, data={"to": "ada"}, capability={"kind": "mail"}, timeoutMs=90_000)
    gate = answer["gate"]
    assert answer["action"] == "wait"
    assert gate.keys() == KEYS
    assert re.fullmatch(r"gate_[0-9a-f]{32}", gate["id"])
    assert len(gate["resolveToken"]) >= 32
    made_up = {"id", "resolveToken", "reviewUrl", "createdAt", "updatedAt", "expiresAt"}
    assert {key: gate[key] for key in KEYS - made_up} == {
        "runId": run, "name": "ok", "prompt": "Send it?", "data": {"to": "ada"}, "status": "pending", "decision": None,
        "actor": None, "decisionPayload": None, "capability": {"kind": "mail"}, "channels": [], "resolvedAt": None}
    lasts = datetime.fromisoformat(gate["expiresAt"]) - datetime.fromisoformat(gate["createdAt"])
    assert lasts == timedelta(seconds=90)
    assert look(api, gate).json == {"gate": gate, "runStatus": "pending"}
    assert api.detail(run)["gates"] == [gate]
    created = api.events(run)[-1]
    assert created["type"] == "gate.created"
    assert created["payload"]["gate"].keys() == PUBLIC_KEYS
    assert created["payload"]["gate"]["resolveToken"] is None


@pytest.mark.parametrize("decision", ["approved", "rejected", "canceled"])
def test_whoever_asks_again_after_the_decision_gets_it(api, decision):
    run = api.create()
    gate = ask(api, run)["gate"]
    decided = resolve(api, gate, decision, actor="ann", payload={"note": 1})["gate"]
    assert (decided["status"], decided["decision"], decided["actor"], decided["decisionPayload"]) == (
        decision, decision, "ann", {"note": 1})
    assert decided["resolvedAt"] == decided["updatedAt"]
    again = ask(api, run, prompt="Send it now?", data={"other": True})
    assert again.json == {"action": "return", "gate": decided}
    assert look(api, gate, "?waitMs=25000").json == {"gate": decided, "runStatus": "pending"}
    assert api.event_types(run) == ["run.created", "gate.created", "gate.resolved"]


def test_a_gate_asked_again_while_it_waits_is_the_same_gate_and_is_told_of_once(api):
    run = api.create()
    first = ask(api, run)
    assert ask(api, run, prompt="Really?").json == first.json
    assert ask(api, run, "other")["gate"]["id"] != first["gate"]["id"]
    assert api.event_types(run).count("gate.created") == 2


def test_a_name_may_be_any_text_and_belongs_to_its_run(api):
    run, other = api.create(), api.create()
    name = "review/größe 50% \U0001f600"
    gate = ask(api, run, name)["gate"]
    assert gate["name"] == name
    assert ask(api, other, name)["gate"]["id"] != gate["id"]


def test_data_and_payload_come_back_to_the_letter(api):
    run = api.create()
    texts = ['{"b": 1.0, "a": [1e2, -0.0], "n": "\\u0000"}', "0", "false", '""', "[]", '"x"']
    for number, text in enumerate(texts):
        raw = f'{{"name": "g{number}", "prompt": "?", "data": {text}, "capability": {text}}}'.encode()
        begun = api.post(f"/runs/{run}/gates/begin", raw=raw)
        gate = begun["gate"]
        raw = f'{{"token": "{gate["resolveToken"]}", "decision": "approved", "payload": {text}}}'.encode()
        resolved = api.post(f"/runs/{run}/gates/{gate['id']}/resolve", raw=raw)
        for key, answer in (("data", begun), ("capability", begun), ("decisionPayload", resolved)):
            assert f'"{key}" : {text}' in answer.text


def test_null_data_is_the_empty_object_and_null_elsewhere_is_null(api):
    run = api.create()
    gate = ask(api, run, data=None, capability=None)["gate"]
    assert (gate["data"], gate["capability"]) == ({}, None)
    assert resolve(api, gate, payload=None)["gate"]["decisionPayload"] == {}


def test_a_decision_that_brought_no_payload_shows_an_empty_one(api, clock):
    run = api.create()
    by_hand = ask(api, run, "a")["gate"]
    ask(api, run, "b", timeoutMs=1000)["gate"]
    ask(api, run, "c")["gate"]
    assert [gate["decisionPayload"] for gate in api.detail(run)["gates"]] == [None, None, None]
    resolve(api, by_hand)["gate"]
    clock.advance(ms=1000)
    api.reconcile()
    assert [gate["decisionPayload"] for gate in api.detail(run)["gates"]] == [{}, {}, None]


# --- the reader who waits


def test_without_waitms_a_gate_is_shown_as_it_is(api):
    gate = ask(api, api.create())["gate"]
    for query in ("", "?waitMs=0", "?waitMs=1"):
        assert look(api, gate, query)["gate"]["status"] == "pending"


def test_a_held_reader_gets_the_decision(api):
    gate = ask(api, api.create())["gate"]
    reader = Reader(api, gate)
    decided = resolve(api, gate, "rejected")["gate"]
    assert reader.told()["gate"] == decided


def test_a_held_reader_gets_the_decision_made_through_another_server_process(api, spawn_server):
    other = Api(spawn_server(TIDEBASE_RECONCILE_MS=3_600_000).url)
    gate = ask(api, api.create())["gate"]
    reader = Reader(api, gate)
    decided = resolve(other, gate)["gate"]
    assert reader.told()["gate"] == decided


def test_what_else_happens_to_the_run_does_not_end_the_wait(api, server):
    run = api.create()
    gate = ask(api, run)["gate"]
    other = ask(api, run, "other")["gate"]
    reader = Reader(api, gate)
    resolve(api, other)["gate"]
    seen = len(api.events(run))
    eventually(lambda: server.watcher.long_polls[0].seq == seen)
    assert reader.is_alive()
    resolve(api, gate)["gate"]
    assert reader.told()["gate"]["status"] == "approved"


@pytest.mark.parametrize(("ending", "status"), [("cancel", "cancelled"), ("complete", "completed"), ("fail", "failed")])
def test_the_end_of_the_run_unwinds_a_held_reader(api, ending, status):
    run = api.create()
    gate = ask(api, run)["gate"]
    reader = Reader(api, gate)
    api.post(f"/runs/{run}/{ending}", {"error": "boom"})["run"]
    told = reader.told()
    assert (told["gate"]["status"], told["runStatus"]) == ("pending", status)


def test_more_readers_than_places_are_answered_at_once_and_told_to_come_again(start_server):
    server = start_server(TIDEBASE_MAX_WAITING=2)
    api = Api(server.url, server)
    gate = ask(api, api.create())["gate"]
    readers = [Reader(api, gate) for _ in range(2)]
    third = look(api, gate, "?waitMs=25000")
    assert third["gate"]["status"] == "pending"
    assert third.headers["retry-after"] == "1"
    resolve(api, gate)["gate"]
    assert [reader.told()["gate"]["status"] for reader in readers] == ["approved", "approved"]


def test_a_wait_that_is_no_number_up_to_25_seconds_is_refused(api):
    gate = ask(api, api.create())["gate"]
    for wait in ("25001", "-1", "x", "1.5", "", "99999999999999999999", "%D9%A3"):
        body = refused(look(api, gate, f"?waitMs={wait}"), 400, "invalid_request")
        assert body["issues"][0]["path"] == "waitMs"


# --- the token


def test_the_token_alone_resolves_a_gate_where_all_else_needs_the_api_key(start_server):
    server = start_server(TIDEBASE_API_KEY="k")
    api, reviewer = Api(server.url, key="k"), Api(server.url)
    run = api.create()
    gate = ask(api, run)["gate"]
    refused(look(reviewer, gate), 401, "unauthorized")
    refused(ask(reviewer, run), 401, "unauthorized")
    refused(resolve(reviewer, {**gate, "resolveToken": "guess"}), 409, "gate_token_wrong")
    assert resolve(Api(server.url, key="another"), gate)["gate"]["status"] == "approved"
    second = ask(api, run, "second")["gate"]
    assert resolve(reviewer, second, "rejected")["gate"]["status"] == "rejected"


@pytest.mark.parametrize("changed", [
    {"resolveToken": "guess"}, {"resolveToken": ""}, {"id": "gate_0"}, {"runId": "run_0"}, "other gate's token",
    "other run"])
def test_a_wrong_token_and_an_unknown_gate_look_alike_and_change_nothing(api, changed):
    run, elsewhere = api.create(), api.create()
    gate, other = ask(api, run)["gate"], ask(api, elsewhere)["gate"]
    if changed == "other gate's token":
        changed = {"resolveToken": other["resolveToken"]}
    elif changed == "other run":
        changed = {"runId": elsewhere}
    body = refused(resolve(api, {**gate, **changed}), 409, "gate_token_wrong")
    assert body.keys() == {"error", "code"}
    assert look(api, gate)["gate"] == gate
    assert api.event_types(run) == ["run.created", "gate.created"]


def test_the_first_decision_stands(api):
    gate = ask(api, api.create())["gate"]
    decided = resolve(api, gate, "rejected", actor="ann")["gate"]
    for decision in ("rejected", "approved"):
        assert refused(resolve(api, gate, decision, actor="bob"), 409, "gate_resolved")["gate"] == decided
    guess = refused(resolve(api, {**gate, "resolveToken": "guess"}), 409, "gate_token_wrong")
    assert "gate" not in guess  # who has no token learns nothing of the decision
    assert look(api, gate)["gate"] == decided


# --- time and cancellation


def test_a_gate_is_cancelled_by_the_reconciler_when_its_time_is_up(api, clock):
    run = api.create()
    gate, other = ask(api, run, timeoutMs=60_000)["gate"], ask(api, run, "patient")["gate"]
    assert other["expiresAt"] is None
    clock.advance(ms=30_000)
    assert api.reconcile() == 0
    reader = Reader(api, gate)
    clock.advance(ms=30_000)
    assert api.reconcile() == 1
    timed_out = reader.told()["gate"]
    assert (timed_out["status"], timed_out["decision"], timed_out["actor"]) == ("canceled", "canceled", "timeout")
    assert ask(api, run).json == {"action": "return", "gate": timed_out}
    refused(resolve(api, gate), 409, "gate_resolved")
    clock.advance(ms=365 * 86_400_000)
    assert api.reconcile() == 0
    assert look(api, other)["gate"] == other
    assert api.event_types(run).count("gate.resolved") == 1


def test_a_gate_decided_in_time_does_not_time_out(api, clock):
    gate = ask(api, api.create(), timeoutMs=60_000)["gate"]
    decided = resolve(api, gate)["gate"]
    clock.advance(ms=60_000)
    assert api.reconcile() == 0
    assert look(api, gate)["gate"] == decided


def test_a_gate_whose_run_is_busy_times_out_with_the_next_tick(api, clock, database):
    busy, idle = api.create(), api.create()
    gates = [ask(api, run, timeoutMs=1000)["gate"] for run in (busy, idle)]
    clock.advance(ms=1000)
    with psycopg.connect(database) as connection:
        connection.execute("select from tidebase.runs where id = %s for no key update", (busy,))
        assert api.reconcile() == 1
    assert [look(api, gate)["gate"]["status"] for gate in gates] == ["pending", "canceled"]
    assert api.reconcile() == 1
    assert look(api, gates[0])["gate"]["status"] == "canceled"


@pytest.mark.parametrize(("ending", "status"), [("cancel", "cancelled"), ("complete", "completed"), ("fail", "failed")])
def test_a_gate_of_an_ended_run_is_not_decided_any_more(api, ending, status):
    run = api.create()
    gate = ask(api, run)["gate"]
    api.post(f"/runs/{run}/{ending}")["run"]
    refusal = refused(resolve(api, gate), 409, "run_ended")
    assert refusal["runStatus"] == status
    assert "run" not in refusal, "whoever has the token alone may see no more than the gate"
    refused(resolve(api, {**gate, "resolveToken": "guess"}), 409, "gate_token_wrong")
    assert look(api, gate)["gate"] == gate
    if status != "completed":  # put back, the run asks again
        api.post(f"/runs/{run}/retry")["run"]
        assert resolve(api, gate)["gate"]["status"] == "approved"


def test_a_cancelled_run_asks_nothing_more(api):
    run = api.create()
    ask(api, run)["gate"]
    api.post(f"/runs/{run}/cancel")["run"]
    for name in ("ok", "another"):
        assert refused(ask(api, run, name), 409, "run_cancelled")["run"]["id"] == run
    assert len(api.detail(run)["gates"]) == 1


def test_unknown_runs_and_gates_are_not_found(api):
    run = api.create()
    gate = ask(api, run)["gate"]
    refused(ask(api, "run_0"), 404, "not_found")
    refused(look(api, {**gate, "id": "gate_0"}), 404, "not_found")
    refused(look(api, {**gate, "runId": api.create()}, "?waitMs=25000"), 404, "not_found")


# --- whom it is told to


@pytest.mark.parametrize(("settings", "base"), [
    ({"TIDEBASE_PUBLIC_URL": "https://tide.example/base"}, "https://tide.example/base"),
    ({"TIDEBASE_PUBLIC_URL": "https://tide.example/base/", "HOST": "0.0.0.0"}, "https://tide.example/base"),
    ({}, None), ({"HOST": "0.0.0.0"}, "")], ids=["public", "exposed and public", "loopback", "exposed"])
def test_the_resolve_url_never_comes_from_a_request_s_host(start_server, settings, base):
    """Whoever may begin a gate could have the reviewer's decision, and the token with it, sent to an address of his."""
    server = start_server(TIDEBASE_API_KEY=KEY, **settings)
    api = Api(f"http://127.0.0.1:{server.listener.getsockname()[1]}", key=KEY)
    run = api.create()
    for name, headers in (("a", {}), ("b", {"host": "evil.example", "x-forwarded-host": "evil.example"})):
        channels = [{"type": "webhook", "url": "http://127.0.0.1:9/"}]
        answer = api.post(f"/runs/{run}/gates/begin", {"name": name, "prompt": "?", "channels": channels},
                          headers=headers)
        url = api.events(run)[-1]["payload"]["gate"]["resolveUrl"]
        assert url == f"{server.url if base is None else base}/runs/{run}/gates/{answer['gate']['id']}/resolve"
        sent = api.get(f"/runs/{run}/deliveries")["deliveries"]
        webhooks = [api.get(f"/runs/{run}/payload?of=delivery&id={delivery['id']}").text for delivery in sent]
        assert len([text for text in webhooks if url in text]) == 1
        assert "evil" not in "".join([answer.text, *webhooks])


def test_a_server_that_others_reach_and_that_does_not_know_its_address_says_so_at_its_start(spawn_server):
    exposed = {"HOST": "0.0.0.0", "TIDEBASE_API_KEY": KEY}
    silent, told = spawn_server(**exposed), spawn_server(**exposed, TIDEBASE_PUBLIC_URL="https://tide.example")
    assert "TIDEBASE_PUBLIC_URL is not set" in silent.log.read_text()
    assert "TIDEBASE_PUBLIC_URL" not in told.log.read_text()


def test_the_run_s_channels_hear_of_every_gate_and_a_gate_s_own_of_it_alone(api, receiver):
    url = receiver.url.removesuffix("/hook")
    run = api.create(channels=[{"type": "webhook", "url": f"{url}/run"},
                               {"type": "webhook", "url": f"{url}/decisions", "events": ["gate.resolved"]}])
    first = ask(api, run, "first", channels=[{"type": "webhook", "url": f"{url}/own", "secret": "hush"}])["gate"]
    assert first["channels"] == [{"type": "webhook", "url": f"{url}/own", "events": []}]
    second = ask(api, run, "second")["gate"]
    resolve(api, first)["gate"]
    resolve(api, second, "rejected")["gate"]
    api.put(f"/runs/{run}/state", {"value": 1})["state"]
    receiver.wait_for(9)
    heard: dict[str, list[tuple[str, str, str]]] = {}
    for (path, _, _), body in zip(list(receiver.requests), receiver.bodies(), strict=True):
        heard.setdefault(path, []).append(
            (body["type"], body["gateId"], body["payload"].get("gate", {}).get("status")))
        if body["type"] != "state.updated":
            gate = body["payload"]["gate"]
            assert body["payload"].keys() == {"gate"}
            assert gate.keys() == PUBLIC_KEYS | ({"reviewUrl"} if body["type"] == "gate.created" else set())
            assert (gate["resolveToken"] is not None) == (body["type"] == "gate.created")
    one, two = first["id"], second["id"]
    assert heard == {
        "/own": [("gate.created", one, "pending"), ("gate.resolved", one, "approved")],
        "/decisions": [("gate.resolved", one, "approved"), ("gate.resolved", two, "rejected")],
        "/run": [("gate.created", one, "pending"), ("gate.created", two, "pending"),
                 ("gate.resolved", one, "approved"), ("gate.resolved", two, "rejected"),
                 ("state.updated", None, None)]}
    assert len(api.detail(run)["channelDeliveries"]) == 9
    assert "hush" not in api.get(f"/runs/{run}").text


def test_channels_are_shown_in_the_order_they_were_given_in(api):
    channels = [{"type": "webhook", "url": f"http://127.0.0.1:1/{n}"} for n in (3, 1, 4, 0, 5, 9, 2, 6)]
    run = api.create(channels=channels)
    gate = ask(api, run, channels=channels)["gate"]
    job = api.enqueue(channels=channels)
    for shown in (api.detail(run)["channels"], api.detail(job)["channels"]):
        assert [channel["config"]["url"] for channel in shown] == [channel["url"] for channel in channels]
    assert [channel["url"] for channel in gate["channels"]] == [channel["url"] for channel in channels]


def test_the_token_stands_in_the_channel_s_webhook_and_in_the_detail_but_in_no_event(api, receiver):
    """An app that hands its events on to a browser must not hand over the approval."""
    run = api.create(channels=[{"type": "webhook", "url": receiver.url}])
    token = ask(api, run, channels=[{"type": "webhook", "url": receiver.url}])["gate"]["resolveToken"]
    for body in receiver.wait_for(2):
        assert body["payload"]["gate"]["resolveToken"] == token
    assert api.detail(run)["gates"][0]["resolveToken"] == token
    assert token in api.get(f"/runs/{run}?include=gates").text
    assert api.event_types(run) == ["run.created", "gate.created"]
    for answer in (api.get(f"/runs/{run}/events", headers={"accept": "application/json"}),
                   api.get(f"/runs/{run}?include=events")):
        assert "gate.created" in answer.text
        assert token not in answer.text
    api.post(f"/runs/{run}/cancel")["run"]
    stream = api.get(f"/runs/{run}/events?follow=false").text
    assert "gate.created" in stream
    assert token not in stream


def test_what_was_decided_is_told_without_the_token(api, clock):
    run = api.create(channels=[{"type": "webhook", "url": "http://127.0.0.1:1/"}])
    by_hand, by_time = ask(api, run)["gate"], ask(api, run, "late", timeoutMs=1000)["gate"]
    resolve(api, by_hand)["gate"]
    clock.advance(ms=1000)
    eventually(api.reconcile)  # a sweep leaves a run for the next tick that the sender has locked
    detail = api.detail(run)
    told = [event["payload"]["gate"] for event in detail["events"] if event["type"] == "gate.resolved"]
    told += [sent["payload"]["gate"] for sent in detail["channelDeliveries"] if sent["eventType"] == "gate.resolved"]
    assert [gate["id"] for gate in told] == [by_hand["id"], by_time["id"], by_time["id"], by_hand["id"]]
    assert [gate["resolveToken"] for gate in told] == [None] * 4


# --- refusals of shape


WRONG_QUESTIONS = [
    ({"name": None}, "name"), ({"name": ""}, "name"), ({"name": "a\0"}, "name"), ({"name": 5}, "name"),
    ({"name": "a" * 513}, "name"), ({"prompt": None}, "prompt"), ({"prompt": 5}, "prompt"),
    ({"prompt": "\0"}, "prompt"),
    ({"timeoutMs": 0}, "timeoutMs"), ({"timeoutMs": "5"}, "timeoutMs"), ({"timeoutMs": True}, "timeoutMs"),
    ({"timeoutMs": 1.5}, "timeoutMs"), ({"timeoutMs": None}, "timeoutMs"), ({"channels": {}}, "channels"),
    ({"channels": [{"type": "webhook"}]}, "channels.0.url"),
    ({"channels": [{"type": "webhook", "url": "ftp://a/"}]}, "channels.0.url"),
    ({"channels": [{"type": "mail", "url": "http://a/"}]}, "channels.0.type"),
]
WRONG_DECISIONS = [
    ({"token": None}, "token"), ({"token": 5}, "token"), ({"token": "\0"}, "token"),
    ({"decision": "maybe"}, "decision"), ({"decision": "cancelled"}, "decision"), ({"decision": None}, "decision"),
    ({"actor": None}, "actor"), ({"actor": 7}, "actor"),
]


def test_a_question_or_decision_of_the_wrong_shape_is_refused_and_names_the_field(api):
    run = api.create()
    for change, path in WRONG_QUESTIONS:
        issues = refused(ask(api, run, **{"name": "g", **change}), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == [path], change
    for body, paths in (({}, ["name", "prompt"]), ({"name": "g"}, ["prompt"])):
        issues = refused(api.post(f"/runs/{run}/gates/begin", body), 400, "invalid_request")["issues"]
        assert sorted(issue["path"] for issue in issues) == paths
    gate = ask(api, run)["gate"]
    for change, path in WRONG_DECISIONS:
        issues = refused(resolve(api, gate, **change), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == [path], change
    assert look(api, gate)["gate"] == gate
    assert api.event_types(run) == ["run.created", "gate.created"]


def test_a_run_has_at_most_32_channels_and_a_gate_8(api):
    channels = [{"type": "webhook", "url": f"http://127.0.0.1:9/{n}"} for n in range(33)]
    run = api.create(channels=channels[:32])
    assert len(api.detail(run)["channels"]) == 32
    assert len(ask(api, run, channels=channels[:8])["gate"]["channels"]) == 8
    child = {"name": "c", "workflowName": "w"}
    for answer in (api.post("/runs/w", {"channels": channels}), ask(api, run, "b", channels=channels[:9]),
                   api.post(f"/runs/{run}/children", {**child, "channels": channels}),
                   api.post("/queues/q/enqueue", {"workflowName": "w", "channels": channels})):
        assert [issue["path"] for issue in refused(answer, 400, "invalid_request")["issues"]] == ["channels"]


# --- races


def test_a_wrong_token_waits_for_nobody_who_works_on_the_run(api, database, blocked):
    """The token is looked at before any lock is taken: a stranger can neither wait nor keep others waiting."""
    gate = ask(api, api.create())["gate"]
    with psycopg.connect(database) as connection:
        connection.execute("select from tidebase.runs where id = %s for no key update", (gate["runId"],))
        for wrong in ({"resolveToken": "guess"}, {"id": "gate_0"}):
            refused(resolve(api, {**gate, **wrong}), 409, "gate_token_wrong")
        refused(api.post(f"/runs/{gate['runId']}/gates/{gate['id']}/look", {"token": "guess"}), 409, "gate_token_wrong")
        with together(lambda: resolve(api, gate), lambda: (blocked(1), connection.rollback())) as answers:
            assert answers[0]["gate"]["status"] == "approved"


def test_of_eight_first_begins_of_a_gate_one_asks(api):
    run = api.create()
    with together(*[lambda: ask(api, run)] * 8) as answers:
        assert {answer["action"] for answer in answers} == {"wait"}
        assert len({answer["gate"]["id"] for answer in answers}) == 1
    assert api.event_types(run) == ["run.created", "gate.created"]


def test_of_nine_decisions_at_once_one_stands(api):
    run = api.create()
    gate = ask(api, run)["gate"]
    with together(*[lambda d=d: resolve(api, gate, d) for d in ["approved", "rejected", "canceled"] * 3]) as answers:
        won = [answer for answer in answers if answer.status == 200]
        assert len(won) == 1
        for answer in answers:
            if answer is not won[0]:
                assert refused(answer, 409, "gate_resolved")["gate"] == won[0]["gate"]
    assert api.event_types(run) == ["run.created", "gate.created", "gate.resolved"]


def test_a_decision_and_the_end_of_its_time_at_once_are_one_decision(api, server, clock, start_server):
    other = start_server()
    run = api.create()
    gates = [ask(api, run, f"g{n}", timeoutMs=1000)["gate"] for n in range(6)]
    clock.advance(ms=1000)
    with together(server.reconciler.tick, other.reconciler.tick, *[lambda g=g: resolve(api, g) for g in gates]):
        pass
    assert api.reconcile() >= 0
    assert api.event_types(run).count("gate.resolved") == 6
    assert "pending" not in {look(api, gate)["gate"]["status"] for gate in gates}
