"""A webhook is written with what it tells of, sent after it, signed, at least once, in order per channel, never inline.

Recovery webhooks ask the app to resume a run, channels tell of what happened to it; push is told in test_queues.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import responses
from conftest import LEASE_MS, Api, Receiver, eventually, free_port, refused

SECRET = "shh-channel-secret"
APP_SECRET = "shh-app-secret"
HOOK = "http://receiver.test/hook"


@pytest.fixture
def api(start_server: Callable[..., Any]) -> Api:
    server = start_server(TIDEBASE_WEBHOOK_SECRET=APP_SECRET)
    return Api(server.url, server)


def channel(url: str, *events: str, secret: str | None = SECRET) -> dict[str, Any]:
    return {"type": "webhook", "url": url, "events": list(events)} | ({"secret": secret} if secret else {})


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

    eventually(done)
    eventually(lambda: api.server.sender.free == 8)
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
    api.server.sender.free = 0  # it sends nothing
    first = api.post(f"/runs/{run}/recover")["recoveryAttempt"]
    assert first["status"] == "pending"
    assert api.post(f"/runs/{run}/recover")["recoveryAttempt"] == first
    api.server.sender.free = 8
    api.server.wrote()
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
            clock.advance(ms=delay * 1000 - 900)
            assert json.loads(api.server.database.call("take_deliveries", 8, 1000)[0]) == []
            clock.advance(ms=900)
            api.server.wrote()
        eventually(lambda: deliveries(api, run)[0]["attempts"] == 8)
        row, = settled(api, run, tries=8)
        assert (row["status"], row["attempts"], row["nextAttemptAt"]) == ("failed", 8, None)
        assert row["completedAt"] is not None
        clock.advance(ms=86_400_000)
        assert json.loads(api.server.database.call("take_deliveries", 8, 1000)[0]) == []
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
        api.server.wrote()
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
    api.server.wrote()
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
    """A receiver that answers bytes of the test's choice, then holds the connection open."""

    def __init__(self, answer: bytes, then_close: bool = False) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        self.answer, self.then_close = answer, then_close
        self.taken: list[socket.socket] = []
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.taken.append(connection)
            connection.recv(65536)
            connection.sendall(self.answer)
            if self.then_close:
                connection.close()

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join()
        for connection in self.taken:
            connection.close()


@pytest.fixture
def raw() -> Iterator[Callable[..., Raw]]:
    receivers: list[Raw] = []

    def start(*arguments: Any) -> Raw:
        receivers.append(Raw(*arguments))
        return receivers[-1]

    yield start
    for receiver in receivers:
        receiver.close()


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nshort",
    b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n",
])
def test_a_2xx_is_delivered_though_its_body_cannot_be_read(api, raw, answer):
    run = api.create(channels=[channel(raw(answer, True).url)])
    api.complete(run)
    row, = settled(api, run)
    assert (row["status"], row["httpStatus"], row["attempts"]) == ("delivered", 200, 1)


def test_an_endless_answer_is_cut_off(api, monkeypatch):
    import tidebase

    monkeypatch.setattr(tidebase, "SEND_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                try:
                    while True:
                        connection.sendall(b"x")
                        time.sleep(0.01)  # the receiver's pace, not the test's
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        run = api.create(channels=[channel(f"http://127.0.0.1:{listener.getsockname()[1]}/")])
        api.complete(run)
        row, = settled(api, run)
        assert (row["status"], row["responseBody"][:3]) == ("delivered", "xxx")
        thread.join(10)
        assert not thread.is_alive()


def test_an_answer_that_is_not_http_is_tried_again(api, raw):
    run = api.create(channels=[channel(raw(b"SSH-2.0-OpenSSH\r\n", True).url)])
    api.complete(run)
    assert settled(api, run)[0]["errorText"] == "ConnectionError"


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
    api.server.sender.free = 0  # this server sends nothing yet
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    taken, = json.loads(api.server.database.call("take_deliveries", 8, 30_000)[0])
    api.server.sender.free = 8
    api.server.wrote()
    assert json.loads(api.server.database.call("take_deliveries", 8, 30_000)[0]) == []
    clock.advance(ms=30_000)
    api.server.wrote()
    assert receiver.wait_for(1)[0]["deliveryId"] == taken["id"]
    row, = settled(api, run, tries=2)
    assert (row["status"], row["attempts"]) == ("delivered", 2)


def test_a_slow_delivery_counts_though_another_sender_took_it_over_meanwhile(api, clock):
    api.server.sender.free = 0
    run = api.create(channels=[channel(HOOK)])
    api.complete(run)
    call = api.server.database.call
    first, = json.loads(call("take_deliveries", 8, 30_000)[0])
    clock.advance(ms=30_000)
    second, = json.loads(call("take_deliveries", 8, 30_000)[0])
    assert (first["attempt"], second["attempt"]) == (1, 2)
    call("settle_delivery", first["id"], 1, False, False, 400, "", "HTTP 400")  # a failure that is out of date does not
    assert deliveries(api, run)[0]["status"] == "pending"
    call("settle_delivery", first["id"], 1, True, False, 200, "ok", None)
    assert deliveries(api, run)[0]["status"] == "delivered"
    call("settle_delivery", second["id"], 2, False, True, 503, "", "HTTP 503")
    assert deliveries(api, run)[0]["status"] == "delivered"
    api.server.sender.free = 8


def test_a_rolled_back_change_tells_nobody(api, sql):
    run = api.create(channels=[channel(HOOK)])
    api.begin(run, "a")
    refused(api.complete(run, leaseOwner="b"), 409, "lease_lost")
    assert sql("select count(*) from tidebase.outbox") == [(0,)]
