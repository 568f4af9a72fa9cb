"""A webhook is written with what it tells of, sent after it, signed, at least once, in order per channel, never inline.

Recovery webhooks ask the app to resume a run, channels tell of what happened to it; push is told in test_queues.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import json
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import requests
import responses
import werkzeug.datastructures
from conftest import (
    LEASE_MS,
    ROOT,
    Api,
    LocalServer,
    Psql,
    Receiver,
    config,
    eventually,
    free_port,
    in_use,
    lasting,
    refused,
)

import tidebase
from tidebase_server import delivery

SECRET = "shh-channel-secret"
APP_SECRET = "shh-app-secret"
HOOK = "http://receiver.test/hook"
CERTIFICATE = ROOT / "tests/receiver.test.pem"  # of receiver.test, and its key; signed by itself, good for tests only


@pytest.fixture(scope="module")
def signing_server(migrated: Psql) -> Iterator[LocalServer]:
    with lasting(migrated.conninfo, TIDEBASE_WEBHOOK_SECRET=APP_SECRET) as server:
        yield server


@pytest.fixture
def api(signing_server: LocalServer, database: str) -> Iterator[Api]:
    with in_use(signing_server) as server:
        yield Api(server.url, server)


def channel(url: str, *events: str, secret: str | None = SECRET) -> dict[str, Any]:
    return {"type": "webhook", "url": url, "events": list(events)} | ({"secret": secret} if secret else {})


def claimed(api: Api, hold_ms: int = tidebase.SEND_HOLD_MS) -> list[Any]:
    """What another sender would claim now."""
    answer = api.server.database.call(
        "claim_webhooks", limit=8, hold_ms=hold_ms, per_host=tidebase.SEND_PER_HOST, in_flight=[], after="")[0]
    return json.loads(answer)["webhooks"]


def deliveries(api: Api, run: str) -> list[Any]:
    return api.detail(run)["channelDeliveries"]


def recoveries(api: Api, run: str) -> list[Any]:
    return api.detail(run)["recoveryAttempts"]


def settled(api: Api, run: str, kind: Callable[[Api, str], list[Any]] = deliveries, tries: int = 1) -> list[Any]:
    """The run's webhooks of that kind, oldest first, once each is through or was tried so often."""
    def done() -> bool:
        rows = kind(api, run)
        return bool(rows) and all(row["status"] != "pending" or (
            row["attempts"] >= tries and (row["httpStatus"] or row["errorText"])) for row in rows)

    def at_rest() -> bool:
        with api.server.ticking:  # between the claim of a webhook and its note that it is in flight there is a moment
            return not api.server.sender.in_flight

    eventually(done)
    eventually(at_rest)
    return kind(api, run)[::-1]


@contextmanager
def staged(status: int = 200, **options: Any) -> Iterator[responses.RequestsMock]:
    """The receiver at HOOK, with no socket behind it."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        mock.add(responses.POST, HOOK, status=status, **options)
        yield mock


# --- what is told, to whom


def test_a_channel_hears_each_kind_of_event_with_its_payload_in_order(api, receiver):
    run = api.create(channels=[channel(receiver.url)], maxAttempts=1)
    api.begin(run, "a")
    step = api.begin_step(run, "one", "a")["step"]["id"]
    api.fail_step(run, step, "a", {"no": 1.0}, retryable=True, resumeDecision="safe_replay")["step"]
    failed = api.fail(run, {"why": "x"}, leaseOwner="a")["run"]
    api.post(f"/runs/{run}/retry")["run"]
    cancelled = api.post(f"/runs/{run}/cancel", {"reason": "enough"})["run"]
    api.post(f"/runs/{run}/retry")["run"]
    completed = api.complete(run, result=[1.50])["run"]
    bodies = receiver.wait_for(4)
    assert [body["type"] for body in bodies] == ["step.failed", "run.failed", "run.cancelled", "run.completed"]
    assert {(body["runId"], body["gateId"]) for body in bodies} == {(run, None)}
    assert bodies[0]["payload"].keys() == {"step", "retryable", "resumeDecision", "error"}
    assert bodies[0]["payload"]["step"]["status"] == "failed_retryable"
    assert (bodies[0]["payload"]["resumeDecision"], bodies[0]["payload"]["error"]) == ("safe_replay", {"no": 1.0})
    assert bodies[1]["payload"] == {"run": failed, "error": {"why": "x"}}
    assert bodies[2]["payload"] == {"run": cancelled}
    assert bodies[3]["payload"] == {"run": completed}
    assert b"[1.5]" in receiver.requests[3][2]
    rows = settled(api, run)
    assert [row["id"] for row in rows] == [body["deliveryId"] for body in bodies]
    assert deliveries(api, run) == rows[::-1], "newest first"
    row = rows[0]
    assert row.keys() == {"id", "runId", "channelId", "gateId", "eventType", "payload", "status", "httpStatus",
                          "responseBody", "errorText", "createdAt", "completedAt", "attempts", "nextAttemptAt"}
    assert re.fullmatch(r"del_[0-9a-f]{32}", row["id"])
    assert (row["status"], row["httpStatus"], row["responseBody"], row["errorText"], row["attempts"],
            row["nextAttemptAt"], row["payload"]) == ("delivered", 200, "thanks", None, 1, None, bodies[0]["payload"])
    assert row["completedAt"] >= row["createdAt"]
    assert row["channelId"] == api.detail(run)["channels"][0]["id"]


def test_a_channel_hears_only_of_the_events_it_names(api, receiver):
    run = api.create(channels=[channel(receiver.url, "run.failed"), channel(receiver.url, "run.cancelled", "x.y")])
    api.fail(run)
    api.post(f"/runs/{run}/cancel")
    rows = settled(api, run)
    first, second = api.detail(run)["channels"]
    assert [(row["channelId"], row["eventType"]) for row in rows] == [
        (first["id"], "run.failed"), (second["id"], "run.cancelled")]


def test_an_enqueued_run_tells_its_channels_also_of_what_the_reconciler_does(api, clock, receiver):
    overdue = api.enqueue(channels=[channel(receiver.url)], deadlineMs=1000)
    lost = api.enqueue(channels=[channel(receiver.url)], maxAttempts=1)
    api.claim(owner="a", limit=2)
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    assert {(body["type"], body["runId"]) for body in receiver.wait_for(2)} == {
        ("run.cancelled", overdue), ("run.failed", lost)}


def test_a_failed_run_asks_the_app_to_resume_it(api, receiver):
    run = api.create(recoveryWebhook=receiver.url)
    api.begin(run, "a")
    api.fail(run)
    body, = receiver.wait_for(1)
    row, = settled(api, run, recoveries)
    assert body == {"type": "run.resume", "runId": run, "workflowName": "report", "reason": "run_failed", "attempt": 1,
                    "deliveryId": row["id"]}
    assert row.keys() == {"id", "runId", "reason", "webhookUrl", "status", "httpStatus", "responseBody", "errorText",
                          "createdAt", "completedAt", "attempts", "nextAttemptAt"}
    assert re.fullmatch(r"rec_[0-9a-f]{32}", row["id"])
    assert (row["reason"], row["webhookUrl"], row["status"], row["httpStatus"], row["responseBody"]) == (
        "run_failed", receiver.url, "delivered", 200, "thanks")
    assert api.event_types(run)[-3:] == ["run.failed", "recovery.started", "recovery.delivered"]
    assert [event["payload"]["recoveryAttemptId"] for event in api.events(run)[-2:]] == [row["id"]] * 2


def test_a_silent_worker_of_a_plain_run_is_told_once_per_lease(api, clock, receiver):
    run = api.create(recoveryWebhook=receiver.url)
    for lease in (1, 2):
        api.begin(run, f"owner{lease}")["run"]
        clock.advance(ms=LEASE_MS)
        assert [api.reconcile(), api.reconcile()] == [1, 0]
        assert receiver.wait_for(lease)[-1]["reason"] == "lease_expired"
        assert len(recoveries(api, run)) == lease


def test_a_requeued_run_asks_nobody_until_its_last_attempt_failed(api, clock, receiver):
    run = api.enqueue(recoveryWebhook=receiver.url, maxAttempts=2)
    api.claim(owner="a")
    assert api.fail(run, leaseOwner="a")["requeued"] is True
    assert recoveries(api, run) == []
    clock.advance(ms=5000)
    api.claim(owner="a")
    clock.advance(ms=LEASE_MS)
    api.reconcile()
    assert [body["reason"] for body in receiver.wait_for(1)] == ["run_failed"]


def test_a_manual_recovery_is_posted_now_and_a_repeat_before_it_is_sent_adds_none(api, receiver):
    run = api.create(recoveryWebhook=receiver.url)
    api.server.let_send(False)  # it sends nothing
    first = api.post(f"/runs/{run}/recover")["recoveryAttempt"]
    assert first["status"] == "pending"
    assert api.post(f"/runs/{run}/recover")["recoveryAttempt"] == first
    api.server.let_send(True)
    api.server.notify()
    assert [body["reason"] for body in receiver.wait_for(1)] == ["manual"]
    settled(api, run, recoveries)
    second = api.post(f"/runs/{run}/recover", {"reason": "again"})["recoveryAttempt"]
    assert second["id"] != first["id"]
    assert receiver.wait_for(2)[-1]["reason"] == "again"


def test_a_run_without_a_recovery_webhook_cannot_be_recovered(api):
    refused(api.post(f"/runs/{api.create()}/recover"), 422, "no_recovery_webhook")


def test_the_call_is_answered_before_its_webhooks_are_sent(api):
    answering = threading.Event()
    with responses.RequestsMock() as mock:
        mock.add_callback(responses.POST, HOOK, lambda request: answering.wait(15) and (200, {}, ""))
        run = api.create(channels=[channel(HOOK)])
        assert api.complete(run)["run"]["status"] == "completed"
        assert deliveries(api, run)[0]["status"] == "pending"
        answering.set()
        assert settled(api, run)[0]["status"] == "delivered"


# --- signatures


def standard_signature(secret: str, headers: dict[str, str], body: bytes) -> str:
    """As the Standard Webhooks specification defines it."""
    key = base64.b64decode(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else secret.encode()
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


@pytest.mark.parametrize("secret", [
    SECRET, "gehe\N{LATIN SMALL LETTER I WITH DIAERESIS}m", "whsec_" + base64.b64encode(b"\x00\xff" * 16).decode()])
def test_a_channel_signs_in_both_schemes_with_its_own_secret(api, receiver, secret):
    run = api.create("gr%C3%BC%C3%9Fe", channels=[channel(receiver.url, secret=secret)], input="ü\x00")
    api.complete(run)
    receiver.wait_for(1)
    _, headers, body = receiver.requests[0]
    expected = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    assert headers["x-tidebase-signature"] == f"sha256={expected}"
    assert headers["webhook-signature"] == standard_signature(secret, headers, body)
    assert headers["webhook-id"] == json.loads(body)["deliveryId"]
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 300
    assert headers["content-type"] == "application/json"
    assert settled(api, run)[0]["status"] == "delivered"


def test_the_clients_own_check_takes_what_the_server_signs(api, receiver):
    from tidebase import verify_webhook_signature

    run = api.create(recoveryWebhook=receiver.url)
    api.post(f"/runs/{run}/recover")
    receiver.wait_for(1)
    _, headers, body = receiver.requests[0]
    assert verify_webhook_signature(body, headers["x-tidebase-signature"], APP_SECRET)
    assert not verify_webhook_signature(body + b" ", headers["x-tidebase-signature"], APP_SECRET)
    assert headers["webhook-signature"] == standard_signature(APP_SECRET, headers, body)


WHSEC = "whsec_" + base64.b64encode(b"\x00\xff" * 16).decode()


@pytest.mark.parametrize("secret", [APP_SECRET, WHSEC, "whsec_", "whsec_?"])
def test_the_clients_check_of_all_headers_takes_what_the_server_signs_and_nothing_else(start_server, receiver, secret):
    from tidebase import verify_webhook

    server = start_server(TIDEBASE_WEBHOOK_SECRET=secret)
    api = Api(server.url, server)
    api.post(f"/runs/{api.create(recoveryWebhook=receiver.url)}/recover")
    receiver.wait_for(1)
    _, headers, body = receiver.requests[0]
    assert verify_webhook(body, headers, secret)
    assert verify_webhook(body, {name.upper(): value for name, value in headers.items()}, secret)
    assert verify_webhook(body, werkzeug.datastructures.Headers(headers), secret)
    signature, at = headers["webhook-signature"], int(headers["webhook-timestamp"])
    both = {**headers, "webhook-signature": f"v1,{'A' * 43}= v2,x {signature}"}  # a key that is being replaced
    assert verify_webhook(body, both, secret)
    assert verify_webhook(body, headers, secret, tolerance_s=10**6)

    def signed(timestamp: Any) -> dict[str, str]:
        changed = {**headers, "webhook-timestamp": str(timestamp)}
        return {**changed, "webhook-signature": standard_signature(secret, changed, body)}

    if secret in (APP_SECRET, WHSEC):
        assert verify_webhook(body, signed(at - 200), secret)
        assert not verify_webhook(body, signed(at - 400), secret)
        assert not verify_webhook(body, signed(at + 400), secret)
        assert verify_webhook(body, signed(at - 400), secret, tolerance_s=500)
        for junk in ("", "x", "-1", "1e9", " 1", "\u0663", "9" * 400, at + 0.5):
            assert not verify_webhook(body, signed(junk), secret), junk
    for name in ("webhook-id", "webhook-timestamp", "webhook-signature"):
        for junk in ("", " ", "v1", "v1,", "v1,\u2603", "\ud800", "A" * 60_000, "v1a," + signature[3:]):
            assert not verify_webhook(body, {**headers, name: junk}, secret), (name, junk)
        assert not verify_webhook(body, {key: value for key, value in headers.items() if key != name}, secret)
        assert not verify_webhook(body, {**headers, name: None}, secret)
    for wrong in (body + b" ", b"", "text", None):
        assert not verify_webhook(wrong, headers, secret)
    for junk in (None, [], "x", {1: 2}):
        assert not verify_webhook(body, junk, secret)
    assert not verify_webhook(body, headers, "")
    assert not verify_webhook(body, headers, secret + "x")


def test_a_run_may_have_a_secret_of_its_own_for_its_recovery_webhooks(api, receiver, caplog):
    from tidebase import verify_webhook

    caplog.set_level(logging.DEBUG)
    own = {"recoveryWebhook": receiver.url, "recoverySecret": SECRET}
    answers = [api.post("/runs/report", {"id": "created", **own}),
               api.post("/queues/q/enqueue", {"workflowName": "w", "id": "enqueued", **own}),
               api.post("/queues/q/enqueue", {"runs": [{"workflowName": "w", "id": "many", **own}]}),
               api.post("/runs/created/children", {"name": "c", "workflowName": "w", "id": "child", **own}),
               api.post("/writes", {"writes": [
                   {"do": "enqueue_run", "queue": "q", "workflowName": "w", "id": "written", **own},
                   {"do": "create_child", "runId": "created", "name": "d", "workflowName": "w", "id": "born", **own}]}),
               api.post("/runs/created/fork", {"id": "forked"}),
               api.post("/runs/report", {"id": "plain", "recoveryWebhook": receiver.url})]
    runs = ["created", "enqueued", "many", "child", "written", "born", "forked", "plain"]
    for run in runs:
        answers.append(api.post(f"/runs/{run}/recover"))
    receiver.wait_for(len(runs))
    answers += [api.get(f"/runs/{run}") for run in runs]
    answers += [api.get("/runs"), api.post("/queues/claim", {"queues": ["q"], "limit": 9})]
    for _, headers, body in receiver.requests:
        secret, other = (APP_SECRET, SECRET) if json.loads(body)["runId"] == "plain" else (SECRET, APP_SECRET)
        assert verify_webhook(body, headers, secret)
        assert not verify_webhook(body, headers, other)
        assert tidebase.verify_webhook_signature(body, headers["x-tidebase-signature"], secret)
    for answer in answers:
        assert answer.status == 200, answer
        assert SECRET not in answer.text
    assert SECRET not in caplog.text
    for secret in ("", None, 5, "x\0", "x" * 1025):
        body = refused(api.post("/runs/report", {"recoverySecret": secret}), 400, "invalid_request")
        assert [issue["path"] for issue in body["issues"]] == ["recoverySecret"]


def test_push_webhooks_are_signed_by_the_apps_secret_whatever_the_runs_is(api, receiver):
    api.put("/queues/pushed/config", {"invokeUrl": receiver.url})["config"]
    api.enqueue("pushed", recoveryWebhook=receiver.url, recoverySecret=SECRET)
    api.reconcile()
    receiver.wait_for(1)
    _, headers, body = receiver.requests[0]
    assert tidebase.verify_webhook_signature(body, headers["x-tidebase-signature"], APP_SECRET)


def test_without_a_secret_nothing_is_signed(start_server, receiver):
    server = start_server()
    api = Api(server.url, server)
    run = api.create(channels=[channel(receiver.url, secret=None)], recoveryWebhook=receiver.url)
    api.fail(run)
    receiver.wait_for(2)
    for _, headers, _ in receiver.requests:
        assert "x-tidebase-signature" not in headers
        assert "webhook-signature" not in headers
        assert {"webhook-id", "webhook-timestamp"} <= headers.keys()


def test_a_channel_without_a_secret_is_not_signed_with_the_apps(api, receiver):
    api.complete(api.create(channels=[channel(receiver.url, secret=None)]))
    receiver.wait_for(1)
    assert "x-tidebase-signature" not in receiver.requests[0][1]


# --- tries


DELAYS = [1, 4, 10, 30, 120, 480, 1200]


def test_a_webhook_is_tried_eight_times_with_growing_pauses_and_then_given_up(api, clock):
    with staged(503, body="busy") as mock:
        run = api.create(channels=[channel(HOOK)])
        api.complete(run)
        for tries, delay in enumerate(DELAYS, 1):
            row, = settled(api, run, tries=tries)
            assert (row["status"], row["attempts"], row["httpStatus"], row["responseBody"], row["completedAt"]) == (
                "pending", tries, 503, "busy", None)
            assert row["nextAttemptAt"] is not None
            early_ms = max(900, delay * 500)  # time goes on while the test asks; the pause before was shorter than half
            clock.advance(ms=delay * 1000 - early_ms)
            assert claimed(api) == []
            clock.advance(ms=early_ms)
            api.server.notify()
        eventually(lambda: deliveries(api, run)[0]["attempts"] == 8)
        row, = settled(api, run, tries=8)
        assert (row["status"], row["attempts"], row["nextAttemptAt"]) == ("failed", 8, None)
        assert row["completedAt"] is not None
        clock.advance(ms=86_400_000)
        assert claimed(api) == []
        assert len({call.request.headers["webhook-id"] for call in mock.calls}) == 1
        assert len(mock.calls) == 8


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 599])
def test_what_may_pass_is_tried_again(api, clock, status):
    with staged(status):
        run = api.create(channels=[channel(HOOK)])
        api.complete(run)
        row, = settled(api, run)
        assert (row["status"], row["attempts"], row["httpStatus"], row["errorText"]) == (
            "pending", 1, status, f"HTTP {status}")


@pytest.mark.parametrize("status", [300, 301, 302, 304, 307, 308, 400, 401, 403, 404, 409, 410, 422])
def test_what_will_not_pass_is_not_tried_again(api, status):
    with staged(status):
        run = api.create(recoveryWebhook=HOOK)
        api.fail(run)
        row, = settled(api, run, recoveries)
        assert (row["status"], row["attempts"], row["httpStatus"], row["nextAttemptAt"]) == ("failed", 1, status, None)
        assert api.event_types(run)[-1] == "recovery.failed"


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_every_2xx_is_delivered(api, status):
    with staged(status):
        run = api.create(channels=[channel(HOOK)])
        api.complete(run)
        assert settled(api, run)[0]["status"] == "delivered"


@pytest.mark.parametrize("error", [
    requests.exceptions.ConnectTimeout(), requests.exceptions.ReadTimeout(), requests.exceptions.ConnectionError(),
    requests.exceptions.SSLError(), requests.exceptions.ChunkedEncodingError(), requests.exceptions.ProxyError()])
def test_a_connection_that_fails_is_tried_again_and_the_error_told_by_its_name(api, error):
    with staged(body=error):
        run = api.create(channels=[channel(HOOK)])
        api.complete(run)
        row, = settled(api, run)
        assert (row["status"], row["attempts"], row["httpStatus"], row["errorText"]) == (
            "pending", 1, None, type(error).__name__)


def test_a_receiver_that_is_down_gets_it_when_it_is_back(api, clock):
    port = free_port()
    run = api.create(channels=[channel(f"http://127.0.0.1:{port}/hook")])
    api.complete(run)
    row, = settled(api, run)
    assert (row["status"], row["errorText"]) == ("pending", "ConnectionError")
    receiver = Receiver(port)
    try:
        clock.advance(ms=1000)
        api.server.notify()
        assert receiver.wait_for(1)[0]["deliveryId"] == row["id"]
        assert settled(api, run)[0]["attempts"] == 2
    finally:
        receiver.close()


@pytest.mark.parametrize("host", [
    "a..b", "x" * 64 + ".test", ".test", "xn--a", "*.test", "a b", "[::1", "127.0.0.1:99999", "\N{FULLWIDTH FULL STOP}",
    "user:@:1"])
def test_an_address_that_nobody_can_have_does_not_hold_up_the_sender(api, host, caplog):
    answer = api.post("/runs/report", {"recoveryWebhook": f"http://{host}/hook"})
    if answer.status == 400:
        refused(answer, 400, "invalid_request")
        return
    run = answer["run"]["id"]
    api.fail(run)
    row, = settled(api, run, recoveries)
    assert row["errorText"]
    assert not [record for record in caplog.records if record.exc_info]


def test_no_redirect_is_followed(api, receiver):
    other = Receiver()
    try:
        receiver.answers, receiver.location = [307], other.url
        run = api.create(channels=[channel(receiver.url)])
        api.complete(run)
        row, = settled(api, run)
        assert (row["status"], row["httpStatus"], row["errorText"]) == ("failed", 307, "HTTP 307")
        assert other.requests == []
    finally:
        other.close()


@pytest.mark.parametrize("location", ["http://[", "//", "http://\xff", "http://a..b/", "x:y"])
def test_a_malformed_redirect_is_a_failure_like_any_other(api, receiver, location):
    receiver.answers, receiver.location = [302], location
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    row, = settled(api, run)
    assert (row["status"], row["httpStatus"]) == ("failed", 302)


# --- a channel's order


def test_the_next_of_a_channel_waits_until_the_one_before_is_through(api, clock, receiver):
    receiver.answers = [503, 503, 200]
    run = api.create(channels=[channel(receiver.url), channel(f"{receiver.url}/other")])
    api.fail(run)
    api.post(f"/runs/{run}/cancel")
    eventually(lambda: len([row for row in deliveries(api, run) if row["httpStatus"] == 503]) == 2)
    assert {body["type"] for body in receiver.bodies()} == {"run.failed"}
    clock.advance(ms=1000)
    api.server.notify()
    receiver.wait_for(6)
    for path in ("/hook", "/hook/other"):
        kinds = [json.loads(body)["type"] for target, _, body in receiver.requests if target == path]
        assert [kind for kind in kinds if kind == "run.cancelled"] == ["run.cancelled"]
        assert kinds[-1] == "run.cancelled"
    assert {row["status"] for row in settled(api, run)} == {"delivered"}


def test_one_given_up_does_not_stop_those_after_it(api, receiver):
    receiver.answers = [400, 200]
    run = api.create(channels=[channel(receiver.url)])
    api.fail(run)
    api.post(f"/runs/{run}/cancel")
    receiver.wait_for(2)
    assert [row["status"] for row in settled(api, run)] == ["failed", "delivered"]


def test_a_hundred_events_of_a_run_arrive_in_order_with_two_servers_sending(api, start_server, receiver):
    start_server()
    run = api.create(channels=[channel(receiver.url, "step.failed")])
    api.begin(run, "a")
    for number in range(100):
        step = api.begin_step(run, f"s{number}", "a")["step"]["id"]
        api.fail_step(run, step, "a", number)["step"]
    bodies = receiver.wait_for(100, 30)
    assert [body["payload"]["error"] for body in bodies] == list(range(100))


def test_a_slow_receiver_does_not_hold_up_the_others(api, receiver):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for _ in range(3):
            api.complete(api.create(channels=[channel(f"http://127.0.0.1:{silent.getsockname()[1]}/")]))
        api.complete(api.create(channels=[channel(receiver.url)]))
        receiver.wait_for(1)


# --- answers


@pytest.mark.parametrize(("body", "kept"), [
    (b"x" * 9000, "x" * 8000), ("ü".encode() * 9000, "ü" * 8000), (b"a\x00b", "a\N{REPLACEMENT CHARACTER}b"),
    (b"\xff\xfe", None), (b"", ""), ("\N{GRINNING FACE}".encode() * 8001, "\N{GRINNING FACE}" * 8000),
])
def test_the_first_eight_thousand_characters_of_an_answer_are_kept(api, body, kept):
    with staged(200, body=body, content_type="text/plain; charset=utf-8"):
        run = api.create(channels=[channel(HOOK)])
        api.complete(run)
        row, = settled(api, run)
        assert row["status"] == "delivered"
        if kept is not None:
            assert row["responseBody"] == kept


@pytest.mark.parametrize("charset", ["idna", "undefined", "nonsense", "unicode_escape", "utf-7", "base64", "zip",
                                     "a\N{SNOWMAN}", '"'])
def test_an_answer_in_a_strange_encoding_is_an_answer(api, charset):
    with staged(200, body=b"\\ud800 +2AA-", content_type=f"text/plain; charset={charset}"):
        run = api.create(channels=[channel(HOOK)])
        api.complete(run)
        assert settled(api, run)[0]["status"] == "delivered"


class Raw:
    """A receiver of the test's own making: `act` has each connection, after its request came, in a thread."""

    def __init__(self, act: Callable[[socket.socket], None]) -> None:
        self.act = act
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.taken: list[socket.socket] = []
        self.requests: list[bytes] = []
        self.ended = 0  # connections that the sender closed
        self.threads = [threading.Thread(target=self.serve, daemon=True)]
        self.threads[0].start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.taken.append(connection)
            self.threads.append(threading.Thread(target=self.take, args=(connection,), daemon=True))
            self.threads[-1].start()

    def take(self, connection: socket.socket) -> None:
        try:
            self.requests.append(connection.recv(65536))
            self.act(connection)
            while connection.recv(65536):
                pass
        except OSError:
            pass
        finally:
            self.ended += 1
            connection.close()

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.threads[0].join()
        for connection in self.taken:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def raw() -> Iterator[Callable[..., Raw]]:
    receivers: list[Raw] = []

    def start(act: Callable[[socket.socket], None] = lambda connection: None) -> Raw:
        """By default a receiver that hangs: it takes the request and says nothing."""
        receivers.append(Raw(act))
        return receivers[-1]

    yield start
    for receiver in receivers:
        receiver.close()


def answering(answer: bytes) -> Callable[[socket.socket], None]:
    def act(connection: socket.socket) -> None:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)

    return act


def endless(begin: bytes, repeat: bytes, pause: float = 0) -> Callable[[socket.socket], None]:
    """Answers `begin`, then `repeat` for as long as anybody listens."""
    def act(connection: socket.socket) -> None:
        connection.sendall(begin)
        while True:
            connection.sendall(repeat)
            if pause:
                time.sleep(pause)  # the receiver's pace, not the test's

    return act


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nshort",
    b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n",
])
def test_a_2xx_is_delivered_though_its_body_cannot_be_read(api, raw, answer):
    run = api.create(channels=[channel(raw(answering(answer)).url)])
    api.complete(run)
    row, = settled(api, run)
    assert (row["status"], row["httpStatus"], row["attempts"]) == ("delivered", 200, 1)


def test_an_answer_that_is_not_http_is_tried_again(api, raw):
    run = api.create(channels=[channel(raw(answering(b"SSH-2.0-OpenSSH\r\n")).url)])
    api.complete(run)
    assert settled(api, run)[0]["errorText"] == "ConnectionError"


def test_an_answer_of_two_lengths_is_tried_again(api, raw):
    # Issue: what a broken answer raised counted as an address that is none, and the webhook was given up.
    run = api.create(channels=[channel(raw(answering(b"HTTP/1.1 200 OK\r\ncontent-length: 1, 2\r\n\r\n")).url)])
    api.complete(run)
    row, = settled(api, run)
    assert (row["status"], row["errorText"], row["attempts"]) == ("pending", "InvalidHeader", 1)


# --- receivers that hang, drip and flood


OK = b"HTTP/1.1 200 OK\r\n"
GZIPPED = OK + b"content-encoding: gzip\r\n\r\n\x1f\x8b\x08\x08\x00\x00\x00\x00\x00\x03"  # then the file's name
DRIPS = {
    "nothing": (lambda connection: None, None),
    "a status line": (endless(b"HTTP/1.1 200 ", b"O", 0.05), None),
    "100 Continue": (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05), None),
    "a header": (endless(OK + b"x: ", b"x", 0.05), None),
    "a body": (endless(OK + b"\r\n", b"x", 0.05), 200),
    "a body of some length": (endless(OK + b"content-length: 100000\r\n\r\n", b"x", 0.05), 200),
    "a gzip header": (endless(GZIPPED, b"x", 0.05), 200),
    "a chunk's size": (endless(OK + b"transfer-encoding: chunked\r\n\r\n", b"0", 0.05), 200),
    "trailers": (endless(OK + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n", 0.05), 200),
}


@pytest.mark.parametrize("drip", DRIPS)
def test_the_whole_exchange_ends_at_one_deadline_however_it_drips(api, raw, monkeypatch, drip):
    act, status = DRIPS[drip]
    monkeypatch.setattr(tidebase, "SEND_SECONDS", 0.4)
    receiver = raw(act)
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    row, = settled(api, run)
    assert (row["status"], row["attempts"], row["httpStatus"], row["errorText"]) == (
        ("delivered", 1, 200, None) if status else ("pending", 1, None, "no complete answer within 0.4 s"))
    eventually(lambda: receiver.ended == 1)  # the connection is closed, too


def test_a_tls_handshake_that_drips_ends_at_the_deadline(api, raw, monkeypatch):
    monkeypatch.setattr(tidebase, "SEND_SECONDS", 0.4)
    receiver = raw(endless(b"\x16\x03\x03\x3f\xff\x02\x00\x3f\xfb", b"x", 0.05))  # a long ServerHello
    run = api.create(recoveryWebhook=receiver.url.replace("http", "https"))
    api.post(f"/runs/{run}/recover")
    row, = settled(api, run, recoveries)
    assert (row["status"], row["attempts"], row["errorText"]) == ("pending", 1, "no complete answer within 0.4 s")
    eventually(lambda: receiver.ended == 1)


def test_a_request_that_nobody_takes_ends_at_the_deadline(api, sql, monkeypatch):
    monkeypatch.setattr(tidebase, "SEND_SECONDS", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # its buffers take some of the 8 MB
        run = api.create(channels=[channel(f"http://127.0.0.1:{deaf.getsockname()[1]}/")])
        api.complete(run, result="x" * 8_000_000)
        error = eventually(lambda: sql("select error_text from tidebase.outbox where error_text is not null"))
        assert error == [("no complete answer within 0.4 s",)]


def test_a_name_that_is_resolved_for_ever_ends_at_the_deadline(api, receiver, resolved, monkeypatch):
    monkeypatch.setattr(tidebase, "SEND_SECONDS", 0.3)
    resolving = threading.Event()
    resolved["slow.test"] = lambda: resolving.wait() and []
    try:
        run = api.create(channels=[channel("http://slow.test/")])
        api.complete(run)
        assert settled(api, run)[0]["errorText"] == "no complete answer within 0.3 s"
    finally:
        resolving.set()


@pytest.mark.parametrize(("act", "status", "kept"), [
    (endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), None, None),
    (endless(OK, b"x: " + b"x" * 60_000 + b"\r\n"), None, None),
    (endless(OK + b"x: ", b"x" * 10_000), None, None),
    (endless(OK + b"\r\n", b"x" * 10_000), 200, "x" * 8000),
    (endless(GZIPPED, b"x" * 10_000), 200, "x" * 7990),
    (endless(OK + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 1000), 200, ""),
], ids=["100 Continue", "headers", "one header", "body", "gzip", "trailers"])
def test_a_fast_endless_answer_is_cut_long_before_the_deadline(api, raw, act, status, kept):
    run = api.create(channels=[channel(raw(act).url)])
    api.complete(run)
    row, = settled(api, run)
    assert (row["status"], row["httpStatus"], row["attempts"]) == ("delivered" if status else "pending", status, 1)
    assert row["errorText"] == (None if status else "ConnectionError")  # not the deadline
    assert (row["responseBody"] or "").endswith(kept or "")
    assert len(row["responseBody"] or "") <= 8000


def test_no_encoding_is_asked_for_and_none_is_decoded(api, raw):
    body = gzip.compress(b"thanks")
    receiver = raw(answering(OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(body) + body))
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    assert settled(api, run)[0]["responseBody"].startswith("\x1f\N{REPLACEMENT CHARACTER}")
    assert re.search(rb"(?i)accept-encoding: identity\r\n", receiver.requests[0])


def send_to(api: Api, urls: list[str]) -> None:
    """Have a webhook written for each address."""
    for begin in range(0, len(urls), 25):
        api.complete(api.create(channels=[channel(url) for url in urls[begin:begin + 25]]))["run"]


def test_behind_a_hundred_webhooks_that_hang_at_one_receiver_the_others_are_served(api, raw, receiver):
    hanging = raw()
    send_to(api, [hanging.url] * 100)
    eventually(lambda: len(hanging.taken) == tidebase.SEND_PER_HOST)
    for _ in range(20):
        api.complete(api.create(channels=[channel(receiver.url)]))
    receiver.wait_for(20, tidebase.SEND_SECONDS)
    assert len(hanging.taken) == tidebase.SEND_PER_HOST


def test_behind_a_hundred_receivers_that_hang_the_others_are_served(api, receiver):
    # Issue: eight receivers that dripped took all slots, and no webhook was sent any more.
    with ExitStack() as ending:
        hanging = [ending.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(100)]
        send_to(api, [f"http://127.0.0.1:{one.getsockname()[1]}/" for one in hanging] * 2)
        eventually(lambda: len(api.server.sender.in_flight) >= 100)
        run = api.create(channels=[channel(receiver.url)])
        api.complete(run)
        receiver.wait_for(1, tidebase.SEND_SECONDS)
        api.server.let_send(False)
        for one in hanging:
            one.close()  # resets what hangs


def test_with_all_threads_hanging_the_others_wait_for_one_deadline_at_most(api, raw, receiver, monkeypatch):
    monkeypatch.setattr(tidebase, "SEND_THREADS", 8)
    monkeypatch.setattr(tidebase, "SEND_SECONDS", 1.0)
    hanging = [raw() for _ in range(12)]
    send_to(api, [one.url for one in hanging for _ in range(20)])
    eventually(lambda: len(api.server.sender.in_flight) == 8)
    api.complete(api.create(channels=[channel(receiver.url)]))
    receiver.wait_for(1)
    # Hosts take turns: none of those that hang was tried a third time before.
    assert max(len(one.taken) for one in hanging) <= 2 * tidebase.SEND_PER_HOST


def test_what_is_in_flight_is_claimed_by_nobody_else_while_its_sender_lives(
        start_server, receiver, sql, monkeypatch):
    monkeypatch.setattr(tidebase, "SEND_HOLD_MS", 500)
    monkeypatch.setattr(tidebase, "SEND_RENEW_SECONDS", 0.1)
    server, _ = start_server(), start_server()  # each looks every second for what is due
    api = Api(server.url, server)
    receiver.answering.clear()
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    receiver.wait_for(1)
    [(first,)] = sql("select next_attempt_at from tidebase.outbox")
    eventually(lambda: sql("select next_attempt_at > %s + interval '2 s' from tidebase.outbox", first)[0][0])
    assert len(receiver.requests) == 1
    receiver.answering.set()
    row, = settled(api, run)
    assert (row["status"], row["attempts"]) == ("delivered", 1)


@pytest.mark.parametrize("attempt", [1, 6])  # after it comes a pause that is shorter, or longer, than a claim lasts
def test_a_renewal_that_comes_after_the_outcome_leaves_the_next_try_when_it_was(api, sql, attempt):
    """A sender asks for renewals by what was in flight a moment ago."""
    api.server.let_send(False)
    run = api.create(channels=[channel(HOOK)])
    api.complete(run)
    sql("update tidebase.outbox set attempts = %s - 1", attempt)
    [webhook] = claimed(api)
    database = api.server.database
    outcome = {"delivered": False, "retryable": True, "http_status": 503, "response": "busy", "error": "HTTP 503"}
    database.call("settle_webhook", id=webhook["id"], attempt=attempt, **outcome)
    [due] = sql("select next_attempt_at from tidebase.outbox")
    database.call("renew_webhooks", ids=[webhook["id"]], attempts=[attempt], hold_ms=tidebase.SEND_HOLD_MS)
    assert sql("select next_attempt_at from tidebase.outbox") == [due]


def test_hosts_take_turns_and_a_claim_looks_at_a_thousand_at_most(api, sql):
    api.server.let_send(False)
    run = api.create()

    def due(hosts: str, at: str = "now()") -> None:
        sql("insert into tidebase.outbox (id, kind, run_id, event_type, url, host, next_attempt_at)"  # noqa: S608
            f" select 'rec_' || gen_random_uuid(), 'recovery', %s, 'run.resume', {hosts}, tidebase._host({hosts}),"
            f" tidebase.{at}"
            " from generate_series(1, 1500) n", run)

    def claim(after: str, in_flight: tuple[str, ...] = (), limit: int = 3) -> tuple[list[str], str]:
        answer = json.loads(api.server.database.call(
            "claim_webhooks", limit=limit, hold_ms=0, per_host=2, in_flight=list(in_flight), after=after)[0])
        return [webhook["url"][7:] for webhook in answer["webhooks"]], answer["after"]

    due("'http://' || substr('abcd', n %% 4 + 1, 1)")
    assert claim("") == (["a", "b", "c"], "c")
    assert claim("c") == (["d", "a", "b"], "b")
    assert claim("d", limit=8) == (["a", "b", "c", "d"] * 2, "d")  # one for each before a second for any
    [(a1, a2, b1)] = sql("select max(id) filter (where host = 'a'), min(id) filter (where host = 'a'), min(id)"
                         " filter (where host = 'b') from tidebase.outbox")
    assert claim("", (a1, a2, b1), 8) == (["c", "d", "b", "c", "d"], "d")
    due("'http://e' || lpad(n::text, 4, '0')", "now() + interval '1 hour'")
    assert claim("d") == ([], "e1000")
    assert claim("e1000") == (["a", "b", "c"], "c")


# --- no slot is lost


def test_a_webhook_whose_thread_cannot_start_is_sent_later_and_the_try_does_not_count(api, receiver, monkeypatch):
    start, refusals = threading.Thread.start, [2 * tidebase.SEND_SLOTS]

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "tidebase-sender-webhook" and refusals[0]:
            refusals[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    runs = [api.create(channels=[channel(f"{receiver.url}/{n}")]) for n in range(3)]
    for run in runs:
        api.complete(run)
    eventually(lambda: refusals[0] <= 2 * tidebase.SEND_SLOTS - 3)
    refusals[0] = 0
    receiver.wait_for(3)
    for run in runs:
        assert [(row["status"], row["attempts"]) for row in settled(api, run)] == [("delivered", 1)]


def test_what_fails_between_claim_and_start_loses_no_slot(api, clock, receiver, monkeypatch):
    made, failures = tidebase.Exchange, iter(range(2 * tidebase.SEND_SLOTS))

    def fail(*arguments: Any) -> Any:
        if next(failures, None) is not None:
            clock.advance(ms=tidebase.SEND_HOLD_MS)
            api.server.sender.notify()
            raise MemoryError
        return made(*arguments)

    monkeypatch.setattr(tidebase, "Exchange", fail)
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    receiver.wait_for(1, 60)
    assert settled(api, run)[0]["status"] == "delivered"


def test_a_defect_in_sending_counts_as_a_failed_try(api, receiver, monkeypatch, caplog):
    monkeypatch.setattr(delivery, "sign", lambda *arguments: 1 / 0)
    run = api.create(channels=[channel(receiver.url) for _ in range(2 * tidebase.SEND_SLOTS)])
    api.complete(run)
    assert {(row["status"], row["errorText"]) for row in settled(api, run)} == {("pending", "ZeroDivisionError")}
    assert not api.server.sender.in_flight
    caplog.clear()


# --- where webhooks may go


KEY = "k" * 24


@pytest.fixture
def exposed(start_server):
    """Starts a server that listens beyond loopback."""
    def start(**settings: str) -> Api:
        server = start_server(HOST="0.0.0.0", TIDEBASE_API_KEY=KEY, **settings)
        return Api(f"http://127.0.0.1:{server.listener.getsockname()[1]}", server, KEY)

    return start


@pytest.fixture
def resolved(monkeypatch) -> dict[str, Any]:
    """The addresses of names: a list, or what answers one."""
    names: dict[str, Any] = {}
    look_up = socket.getaddrinfo

    def answer(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host not in names:
            return look_up(host, port, *arguments, **options)
        if options.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "a name")
        addresses = names[host]() if callable(names[host]) else names[host]
        return [entry for address in addresses for entry in look_up(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return names


def errors_of(api: Api, urls: list[str]) -> dict[str, str | None]:
    """What became of a recovery webhook to each address, after one try: the error, None when it was delivered."""
    runs = {url: api.create(recoveryWebhook=url) for url in urls}
    for run in runs.values():
        api.post(f"/runs/{run}/recover")["recoveryAttempt"]
    rows = {url: settled(api, run, recoveries)[0] for url, run in runs.items()}
    assert [url for url, row in rows.items() if row["attempts"] != 1 or row["nextAttemptAt"]] == []  # none is retried
    return {url: row["errorText"] for url, row in rows.items()}


def test_beyond_loopback_no_webhook_reaches_this_machine_or_its_networks_in_any_spelling(exposed, receiver, resolved):
    api = exposed()
    port = receiver.port
    resolved |= {"inside.test": ["10.0.0.1"], "mapped.test": ["::ffff:127.0.0.1"], "nat64.test": ["64:ff9b::7f00:1"],
                 "6to4.test": ["2002:7f00:1::"], "teredo.test": ["2001:0:7f00:1::"], "ula.test": ["fd12::1"],
                 "both.test": ["127.0.0.1", "::1"]}
    here = [f"http://{host}:{port}/hook" for host in (
        "127.0.0.1", "127.1", "0x7f.1", "0x7f000001", "2130706433", "017700000001", "127.0.0.53", "localhost",
        "LOCALHOST", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]", "mapped.test", "nat64.test", "6to4.test", "both.test",
        "teredo.test", "user:secret@127.0.0.1")]
    networks = [f"http://{host}/" for host in (
        "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "[fd12::1]", "inside.test", "ula.test",
        "[64:ff9b:1:a9fe:a9:fe00:808:808]", "[5f00::1]")]
    never = [f"http://{host}:{port}/" for host in (
        "0.0.0.0", "0", "[::]", "169.254.169.254", "[::ffff:169.254.169.254]", "[fd00:ec2::254]", "100.100.100.200",
        "[fe80::1]", "224.0.0.1", "255.255.255.255", "[ff02::1]", "0.1.2.3", "[64:ff9b::a9fe:a9fe]")]
    errors = errors_of(api, here + networks + never)
    wrong = {url: error for url, error in errors.items() if error is None or (
        ("this machine: not allowed" if url in here else "in a private network: not allowed" if url in networks
         else "no webhook is sent there") not in error)}
    assert wrong == {}
    assert errors[here[0]] == ("127.0.0.1 is this machine: not allowed while the server listens beyond loopback; "
                               "see TIDEBASE_WEBHOOK_ALLOW")
    assert errors["http://inside.test/"].startswith("inside.test (10.0.0.1) is in a private network")
    assert receiver.requests == []


def test_on_loopback_private_networks_may_be_reached_and_the_rest_still_not(api, receiver, resolved):
    resolved["inside.test"] = ["127.0.0.1"]
    port = receiver.port
    open_to = [f"http://{host}:{port}/hook" for host in ("127.0.0.1", "127.1", "localhost", "inside.test")]
    never = [f"http://{host}:{port}/" for host in (
        "0.0.0.0", "[::]", "169.254.169.254", "[fd00:ec2::254]", "[ff02::1]")]
    errors = errors_of(api, open_to + never)
    assert [errors[url] for url in open_to] == [None] * 4
    assert all("no webhook is sent there" in errors[url] for url in never)
    assert len(receiver.requests) == 4


def test_what_the_setting_names_may_be_reached(exposed, receiver, resolved):
    resolved |= {name: ["127.0.0.1"] for name in ("app.internal", "app.internal.", "other.internal")}
    resolved["meta.internal"] = ["169.254.169.254"]
    port = receiver.port
    api = exposed(TIDEBASE_WEBHOOK_ALLOW=" app.internal, meta.internal ,169.254.0.0/16,10.0.0.0/8")
    errors = errors_of(api, [f"http://{host}:{port}/hook" for host in (
        "App.Internal", "app.internal.", "other.internal", "meta.internal", "127.0.0.1")])
    assert [error and error.split(": ")[0] for error in errors.values()] == [
        None, None, "other.internal (127.0.0.1) is this machine",
        "meta.internal (169.254.169.254) is a link-local address", "127.0.0.1 is this machine"]
    api = exposed(TIDEBASE_WEBHOOK_ALLOW="127.0.0.0/8")
    assert errors_of(api, [f"http://other.internal:{port}/hook"]) == {f"http://other.internal:{port}/hook": None}


@pytest.mark.parametrize("value", ["10.0.0.0/33", "10.1.2.3/8", "http://app", "app:8000", "a b", "*.internal", "-,/"])
def test_a_setting_that_names_no_host_and_no_network_is_refused_at_the_start(value):
    with pytest.raises(tidebase.ConfigError, match=re.escape("TIDEBASE_WEBHOOK_ALLOW: ")):
        config(TIDEBASE_WEBHOOK_ALLOW=value)


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(exposed, receiver, resolved):
    asked = []

    def rebind() -> list[str]:
        asked.append(1)
        return ["192.0.2.1"] if len(asked) == 1 else ["127.0.0.1"]

    resolved["rebinds.test"] = rebind
    api = exposed(TIDEBASE_WEBHOOK_ALLOW="192.0.2.0/24")
    errors = []
    connect = socket.socket.connect
    with pytest.MonkeyPatch.context() as patch:
        def watched(self: socket.socket, address: Any) -> None:
            if address[0] == "192.0.2.1":
                raise ConnectionRefusedError  # nobody is there
            errors.append(address)
            connect(self, address)

        patch.setattr(socket.socket, "connect", watched)
        run = api.create(recoveryWebhook=f"http://rebinds.test:{receiver.port}/hook")
        errors.clear()
        api.post(f"/runs/{run}/recover")
        settled(api, run, recoveries)
    assert len(asked) == 1
    assert not [address for address in errors if address[1] == receiver.port]
    assert receiver.requests == []


def test_the_next_address_of_a_name_is_tried_when_one_takes_no_connection(api, receiver, resolved):
    resolved["two.test"] = ["127.0.0.2", "127.0.0.1"]  # the receiver listens at the second
    run = api.create(channels=[channel(f"http://two.test:{receiver.port}/hook")])
    api.complete(run)
    assert settled(api, run)[0]["status"] == "delivered"
    assert receiver.requests[0][1]["host"] == f"two.test:{receiver.port}"


def test_a_name_is_tried_again_while_one_of_its_addresses_may_be_reached(exposed, resolved):
    # Issue: with another address that is refused, a receiver that was down for a moment lost the webhook for good.
    api = exposed(TIDEBASE_WEBHOOK_ALLOW="127.0.0.1/32")
    resolved["two.test"] = ["127.0.0.1", "10.0.0.1"]  # nobody listens at the first
    run = api.create(channels=[channel(f"http://two.test:{free_port()}/hook")])
    api.complete(run)
    row, = settled(api, run)
    assert (row["status"], row["errorText"]) == ("pending", "ConnectionError")


def test_tls_and_the_host_header_keep_the_name_of_the_url(api, resolved, monkeypatch):
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    context.sni_callback = lambda _, name, __: names.append(name)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(CERTIFICATE))
    resolved |= {"receiver.test": ["127.0.0.1"], "other.test": ["127.0.0.1"]}
    receiver = Receiver()
    receiver.http.socket = context.wrap_socket(receiver.http.socket, server_side=True)
    try:
        runs = [api.create(recoveryWebhook=f"https://{name}:{receiver.port}/hook")
                for name in ("receiver.test", "other.test", "127.0.0.1")]
        for run in runs:
            api.post(f"/runs/{run}/recover")
        rows = [settled(api, run, recoveries)[0] for run in runs]
        assert [(row["status"], row["errorText"]) for row in rows] == [
            ("delivered", None), ("pending", "SSLError"), ("pending", "SSLError")]
        assert {"receiver.test", "other.test"} <= set(names)
        assert [headers["host"] for _, headers, _ in receiver.requests] == [f"receiver.test:{receiver.port}"]
    finally:
        receiver.close()


def test_nothing_of_this_machines_user_goes_along(api, receiver, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login me password netrc-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    assert settled(api, run)[0]["status"] == "delivered"
    assert "authorization" not in receiver.requests[0][1]


def test_credentials_in_an_address_are_used_and_never_shown(api, receiver, caplog):
    caplog.set_level(logging.DEBUG)
    url = receiver.url.replace("http://", "http://user:p%40ss@")
    shown = receiver.url.replace("http://", "http://***@")
    hook = channel(url)
    fields = {"channels": [hook], "recoveryWebhook": url}
    answers = [
        api.post("/runs/report", {"id": "run_a", **fields}),
        api.post("/queues/q/enqueue", {"workflowName": "w", "id": "run_b", **fields}),
        api.post("/runs/run_a/children", {"name": "c", "workflowName": "w", **fields}),
        api.post("/runs/run_a/gates/begin", {"name": "g", "prompt": "?", "channels": [hook]}),
        api.put("/queues/q/config", {"invokeUrl": url}),
        api.fail("run_a"), api.post("/runs/run_a/recover"), api.post("/runs/run_a/fork")]
    receiver.wait_for(3)
    settled(api, "run_a", recoveries)
    answers += [api.get("/runs/run_a"), api.get("/runs/run_b"), api.get("/runs"), api.get("/queues")]
    for answer in answers:
        assert answer.status == 200, answer
        assert "p%40ss" not in answer.text
        assert "p@ss" not in answer.text
    detail = api.detail("run_a")
    assert detail["run"]["recoveryWebhook"] == shown
    assert {row["webhookUrl"] for row in detail["recoveryAttempts"]} == {shown}
    assert detail["channels"][0]["config"]["url"] == shown
    assert api.queue("q")["config"]["invokeUrl"] == shown
    basic = "Basic " + base64.b64encode(b"user:p@ss").decode()
    assert {headers["authorization"] for _, headers, _ in receiver.requests} == {basic}
    assert all(b"p%40ss" not in body for _, _, body in receiver.requests)
    assert "p%40ss" not in caplog.text


# --- secrets


def test_a_secret_is_nowhere_but_in_the_signature(api, receiver, caplog):
    caplog.set_level(logging.DEBUG)
    hook = channel(receiver.url)
    answers = [
        api.post("/runs/report", {"id": "run_a", "channels": [hook], "recoveryWebhook": receiver.url}),
        api.post("/runs/report", {"id": "run_a", "channels": [hook]}),
        api.post("/runs/other", {"id": "run_a", "channels": [hook]}),
        api.post("/queues/q/enqueue", {"workflowName": "w", "id": "run_b", "channels": [hook]}),
        api.post("/queues/q/enqueue", {"runs": [{"workflowName": "w", "id": "run_c", "channels": [hook]}]}),
        api.post("/runs/report", {"channels": [{**hook, "type": SECRET}]}),
        api.post("/runs/report", {"channels": [{**hook, "events": SECRET}]}),
        api.post("/runs/report", {"channels": [{**hook, "secret": SECRET + "\x00"}]}),
        api.post("/runs/report", {"channels": [{**hook, "secret": [SECRET]}]}),
        api.post("/runs/report", raw=json.dumps({"channels": [hook]}).encode()[:-1]),
        api.begin("run_a", "a"), api.fail("run_a"), api.post("/runs/run_a/cancel"), api.complete("run_b"),
    ]
    settled(api, "run_a")
    settled(api, "run_a", recoveries)
    answers += [api.get("/runs/run_a"), api.get("/runs/run_b"), api.get("/runs"), api.get("/queues"),
                api.post("/queues/claim", {"queues": ["q"], "checkpoints": True})]
    for answer in answers:
        for secret in (SECRET, APP_SECRET):
            assert secret not in answer.text
            assert secret not in str(answer.headers)
    for _, headers, body in receiver.requests:
        assert SECRET.encode() not in body
        assert SECRET not in str(headers)
        assert APP_SECRET not in str(headers)
    for secret in (SECRET, APP_SECRET):
        assert secret not in caplog.text
    shown = api.detail("run_a")["channels"][0]
    assert shown["config"] == {"url": receiver.url, "secret": None}
    assert api.events("run_a")[0]["payload"]["channels"] == [{"type": "webhook", "url": receiver.url, "events": []}]


# --- outliving the server


def test_a_webhook_written_by_a_server_that_was_killed_is_sent_by_the_next(spawn_server, receiver, sql):
    server = spawn_server()
    api = Api(server.url)
    receiver.answers = [503, 200]
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    receiver.wait_for(1)
    eventually(lambda: deliveries(api, run)[0]["httpStatus"] == 503)
    server.end(9)
    server.start()
    bodies = receiver.wait_for(2)
    assert len({body["deliveryId"] for body in bodies}) == 1
    eventually(lambda: deliveries(api, run)[0]["status"] == "delivered")


def test_a_webhook_taken_by_a_sender_that_was_killed_is_sent_again_under_the_same_id(api, clock, receiver):
    api.server.let_send(False)  # this server sends nothing yet
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    taken, = claimed(api)
    api.server.let_send(True)
    api.server.notify()
    assert claimed(api) == []
    clock.advance(ms=tidebase.SEND_HOLD_MS)
    api.server.notify()
    assert receiver.wait_for(1)[0]["deliveryId"] == taken["id"]
    row, = settled(api, run, tries=2)
    assert (row["status"], row["attempts"]) == ("delivered", 2)


def test_a_slow_delivery_counts_though_another_sender_took_it_over_meanwhile(api, clock):
    api.server.let_send(False)
    run = api.create(channels=[channel(HOOK)])
    api.complete(run)

    def settle(webhook: Any, *outcome: Any) -> None:
        api.server.database.call("settle_webhook", id=webhook["id"], attempt=webhook["attempt"],
                                 **tidebase.Outcome(*outcome)._asdict())

    first, = claimed(api)
    clock.advance(ms=tidebase.SEND_HOLD_MS)
    second, = claimed(api)
    assert (first["attempt"], second["attempt"]) == (1, 2)
    settle(first, False, False, 400, "", "HTTP 400")  # a failure that is out of date does not
    assert deliveries(api, run)[0]["status"] == "pending"
    settle(first, True, False, 200, "ok")
    assert deliveries(api, run)[0]["status"] == "delivered"
    settle(second, False, True, 503, "", "HTTP 503")
    assert deliveries(api, run)[0]["status"] == "delivered"
    api.server.let_send(True)


def test_a_rolled_back_change_tells_nobody(api, sql):
    run = api.create(channels=[channel(HOOK)])
    api.begin(run, "a")
    refused(api.complete(run, leaseOwner="b"), 409, "lease_lost")
    assert sql("select count(*) from tidebase.outbox") == [(0,)]
