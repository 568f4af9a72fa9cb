"""The HTTP server: requests however their bytes come, and what a client may send before it has shown its key.

The attacks are sent as raw bytes to a real server.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import waitress.buffers
from conftest import Answer, Api, LocalServer, eventually, refused

import tidebase_sdk
from tidebase_server import events as event_streams
from tidebase_server import serving


def held_run(api: Api, owner: str = "a") -> str:
    run = api.create()
    api.begin(run, owner)["run"]
    return run


def record(api: Api, run: str, name: str = "s", owner: str = "a", **body: Any) -> Answer:
    return api.post(f"/runs/{run}/steps", {"name": name, "inputHash": "h", "leaseOwner": owner, **body})


# ------------------------------------------------------------------------------
# However the bytes come
# ------------------------------------------------------------------------------
def request(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n").encode() + data


def answers_on(connection: socket.socket, count: int) -> list[tuple[int, Any]]:
    stream, answers = connection.makefile("rb"), []
    for _ in range(count):
        status = int(stream.readline().split()[1])
        fields = dict(line.decode().lower().strip().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
        answers.append((status, json.loads(stream.read(int(fields["content-length"])))))
    return answers


def connected(api: Api) -> socket.socket:
    host, port = api.address.split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def test_requests_sent_at_once_on_one_connection_are_answered_in_their_order(api: Api) -> None:
    run = held_run(api)
    body = {"inputHash": "h", "leaseOwner": "a"}
    paths = [(f"/runs/{run}/steps", {**body, "name": f"s{n}", "output": n}) if n % 3 else (f"/runs/{run}/cancelled", {})
             for n in range(9)]
    with connected(api) as connection:
        for _ in range(5):  # repeats are answered unchanged
            connection.sendall(b"".join(itertools.starmap(request, paths)))
            answers = answers_on(connection, len(paths))
            assert [status for status, _ in answers] == [404, 200, 200] * 3
            assert [answer["step"]["output"] for status, answer in answers if status == 200] == [1, 2, 4, 5, 7, 8]
    assert len(api.detail(run)["steps"]) == 6


@pytest.mark.parametrize("size", [1, 7, 50])
def test_a_request_that_comes_in_pieces_is_one_request(api: Api, size: int) -> None:
    run = held_run(api)
    with connected(api) as connection:
        for number in range(3):
            raw = request(f"/runs/{run}/steps", {"inputHash": "h", "leaseOwner": "a", "name": f"s{number}"})
            for at in range(0, len(raw), size):
                connection.sendall(raw[at : at + size])
            [(status, answer)] = answers_on(connection, 1)
            assert (status, answer["step"]["name"]) == (200, f"s{number}")
    assert api.event_types(run)[2:] == ["step.started", "step.completed"] * 3


def test_a_client_that_is_slow_to_read_is_answered_in_full_and_goes_on(api: Api, server: LocalServer) -> None:
    run, channels = held_run(api), server._http.waitress.active_channels
    record(api, run, output="x" * 3_000_000)["step"]
    again = request(f"/runs/{run}/steps/begin", {"inputHash": "h", "leaseOwner": "a", "name": "s"})
    with connected(api) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)  # else it may grow to hold all of it
        for count in (4, 1, 4):  # what its buffers do not hold, waitress' main loop sends
            connection.sendall(again * count)
            if count > 1:
                eventually(lambda: any(channel.total_outbufs_len for channel in channels.values()))
            assert [(status, len(answer["output"])) for status, answer in answers_on(connection, count)] == [
                (200, 3_000_000)] * count


def test_a_slow_answer_is_not_cut_off_because_the_next_request_has_begun(api: Api, server: LocalServer) -> None:
    run, channels = held_run(api), server._http.waitress.active_channels
    record(api, run, output="x" * 8_000_000)["step"]
    again = request(f"/runs/{run}/steps/begin", {"inputHash": "h", "leaseOwner": "a", "name": "s"})
    following = head("/health", method="GET")
    with connected(api) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        connection.sendall(again + following[:20])
        eventually(lambda: any(channel.total_outbufs_len and not channel.requests for channel in channels.values()))
        [channel] = [channel for channel in channels.values() if channel.total_outbufs_len]
        channel.request.began -= serving.RECEIVE_SECONDS + 5  # as if the reader had taken that long until now
        server._http.waitress.next_channel_cleanup = 0
        server._http.wake()
        eventually(lambda: server._http.waitress.next_channel_cleanup)
        assert len(answers_on(connection, 1)[0][1]["output"]) == 8_000_000
        connection.sendall(following[20:])
        assert answers_on(connection, 1)[0][1]["ok"]


def test_an_answer_that_no_disk_takes_ends_its_connection(
        api: Api, server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stayed open, was sent the middle of the answer, and took all of a core."""
    run = held_run(api)
    record(api, run, output="x" * 8_000_000)["step"]  # more than the system takes for a reader
    new = waitress.buffers.TempfileBasedBuffer.newfile

    def full(buffer: Any) -> Any:
        file = new(buffer)

        class Full:
            written = 0

            def write(self, data: bytes) -> int:
                self.written += len(data)
                if self.written > 500_000:
                    file.close()
                    raise OSError(28, "No space left on device")
                return file.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return Full()

    again = request(f"/runs/{run}/steps/begin", {"inputHash": "h", "leaseOwner": "a", "name": "s"})
    with connected(api) as connection, monkeypatch.context() as broken:
        broken.setattr(waitress.buffers.TempfileBasedBuffer, "newfile", full)
        connection.sendall(again)
        connection.settimeout(10)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert body == b""  # so that the client, which was promised 8 MB, does not take it for the answer
    with connected(api) as connection:
        connection.sendall(again)
        assert len(answers_on(connection, 1)[0][1]["output"]) == 8_000_000


def test_a_client_that_hangs_up_in_the_middle_leaves_nothing_behind(api: Api, server: LocalServer) -> None:
    run = held_run(api)
    before = len(server._http.waitress.active_channels)
    for cut in (10, 60, 120):
        with connected(api) as connection:
            connection.sendall(request(f"/runs/{run}/steps", {
                "inputHash": "h", "leaseOwner": "a", "name": "s", "output": "x" * 200})[:cut])
    eventually(lambda: len(server._http.waitress.active_channels) <= before)
    assert api.detail(run)["steps"] == []


@pytest.mark.parametrize(("sent", "told"), [
    (b"HTTP/1.1\r\nConnection: close", b"connection: close"), (b"HTTP/1.0", b"connection: close"),
    (b"HTTP/1.0\r\nConnection: keep-alive", b"connection: keep-alive")])
def test_the_answer_says_what_becomes_of_the_connection(api: Api, sent: bytes, told: bytes) -> None:
    with connected(api) as connection:
        connection.sendall(request("/runs/none/complete", {}).replace(b"HTTP/1.1", sent))
        stream = connection.makefile("rb")
        assert told in [line.strip().lower() for line in iter(stream.readline, b"\r\n")]


def test_a_target_that_is_no_address_is_refused_and_the_others_are_answered(api: Api) -> None:
    with connected(api) as connection:
        connection.sendall(b"POST http://[ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        [(status, _)] = answers_on(connection, 1)
        assert status == 400
    assert record(api, held_run(api)).status == 200


# ------------------------------------------------------------------------------
# Before the key
# ------------------------------------------------------------------------------
KEY = "a-key-of-more-than-16-letters"


@pytest.fixture
def closed(start_server: Callable[..., LocalServer]) -> Api:
    """A server that wants a key, asked without it."""
    server = start_server(TIDEBASE_API_KEY=KEY, TIDEBASE_MAX_BODY=1_000_000)
    return Api(server.url, server)


def head(path: str = "/runs/report", *fields: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def answer_to(api: Api, sent: bytes, more: bytes = b"", seconds: float = 20) -> tuple[int, Any]:
    """The answer to raw bytes, and to as many of `more` as the server takes."""
    with connected(api) as connection:
        connection.settimeout(seconds)
        with suppress(ConnectionError):
            connection.sendall(sent)
            connection.sendall(more)
        return answers_on(connection, 1)[0]


def open_files(server: LocalServer) -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes of its body each request had brought, whenever its parser took something."""
    taken: list[int] = []
    received = serving.Parser.received

    def count(parser: serving.Parser, data: bytes) -> int:
        consumed = received(parser, data)
        taken.append(parser.body_bytes_on_wire)
        return consumed

    monkeypatch.setattr(serving.Parser, "received", count)
    return taken


def test_no_body_is_taken_from_who_has_no_key(closed: Api, taken: list[int]) -> None:
    """Thirty uploads without a key put 1.8 GB into the temporary folder."""
    for fields in (["Content-Length: 900000"], ["Transfer-Encoding: chunked"],
                   ["Content-Length: 5", "Expect: 100-continue"]):
        status, body = answer_to(closed, head("/runs/report", *fields), b"x" * 900_000)
        assert (status, body["code"]) == (401, "unauthorized")
    assert max(taken) == 0
    run = closed.send("POST", "/runs/report", {}, headers={"authorization": f"Bearer {KEY}"})["run"]["id"]
    status, body = answer_to(closed, head(f"/runs/{run}/gates/g/resolve", "Content-Length: 900000"), b"x" * 900_000)
    assert (status, body["code"]) == (413, "body_too_large")  # a decision needs no key, and is short
    answer = closed.post(f"/runs/{run}/gates/g/resolve", {"token": "t", "decision": "approved"})
    refused(answer, 409, "gate_token_wrong")


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_no_body_is_taken_from_a_page_of_another_origin(closed: Api, taken: list[int], origin: str) -> None:
    status, body = answer_to(closed, head("/runs/report", f"Authorization: Bearer {KEY}", f"Origin: {origin}",
                                          "Content-Length: 900000"), b"x" * 900_000)
    assert (status, body["code"]) == (403, "foreign_origin")
    assert max(taken) == 0


@pytest.mark.parametrize(("sent", "more"), [
    pytest.param(b"", b"\r\n" * 1_000_000, id="blank lines"),
    pytest.param(head("/runs/report", f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked"),
                 b"5;" + b"a" * 5_000_000, id="an extension"),
    pytest.param(head("/runs/report", f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked"),
                 b"1;a=b\r\nx\r\n" * 500_000, id="many small chunks"),
    pytest.param(head("/runs/report", f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked"),
                 b"0\r\n" + b"a: b\r\n" * 1_000_000, id="trailers")])
def test_what_is_not_content_ends_a_request_after_16_kilobytes(closed: Api, sent: bytes, more: bytes) -> None:
    """60 MB of it cost 30 to 50 s of CPU, since waitress scans again what it has gathered."""
    before = time.process_time()  # the server is in this process
    status, body = answer_to(closed, sent, more)
    assert (status, body["code"]) == (400, "invalid_request")
    assert time.process_time() - before < 5  # seconds; it was ten times that, and grew with the square
    assert closed.get("/health").status == 200


@pytest.mark.parametrize("client", [tidebase_sdk.Tidebase, tidebase_sdk.AsyncTidebase])
def test_the_client_sends_no_body_that_the_server_refuses_by_its_size(closed: Api, client: Any,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    received, taken = serving.Parser.received, [0]

    def count(parser: serving.Parser, data: bytes) -> int:
        taken[0] += len(data)
        return received(parser, data)

    monkeypatch.setattr(serving.Parser, "received", count)

    async def create(size: int) -> Any:
        tide = client(f"http://{closed.address}", KEY)
        try:
            made = tide.runs.create("report", "x" * size)
            return await made if inspect.isawaitable(made) else made
        finally:
            closing = tide.close()
            await closing if inspect.isawaitable(closing) else None

    with pytest.raises(tidebase_sdk.TidebaseError, match="TIDEBASE_MAX_BODY"):
        asyncio.run(create(40_000_000))
    assert taken[0] < 10_000
    assert len(asyncio.run(create(900_000))["input"]) == 900_000


def test_a_large_body_that_the_server_takes_is_sent_after_its_word(start_server: Callable[..., LocalServer]) -> None:
    tide = tidebase_sdk.Tidebase(start_server().url)
    assert len(tide.runs.create("report", "x" * 5_000_000)["input"]) == 5_000_000
    tide.close()


def test_chunks_of_an_ordinary_size_are_taken(closed: Api) -> None:
    payload = json.dumps({"input": "x" * 500_000}).encode()
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (
        payload[at : at + 512] for at in range(0, len(payload), 512)))
    status, body = answer_to(closed, head("/runs/report", f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked"),
                             chunks + b"0\r\n\r\n")
    assert (status, len(body["run"]["input"])) == (200, 500_000)


def test_a_head_has_16_kilobytes(closed: Api) -> None:
    status, body = answer_to(closed, head("/health", "X: " + "a" * 17_000, method="GET"))
    assert (status, body["code"]) == (431, "headers_too_large")
    assert answer_to(closed, head("/health", "X: " + "a" * 15_000, method="GET"))[0] == 200


def test_a_body_has_what_the_setting_says_and_no_slack(closed: Api) -> None:
    fields = [f"Authorization: Bearer {KEY}"]
    status, body = answer_to(closed, head("/runs/report", *fields, "Content-Length: 1000001"), b"x" * 1_000_001)
    assert (status, body["code"]) == (413, "body_too_large")
    padded = b'{"input": 1' + b" " * (1_000_000 - 12) + b"}"
    assert answer_to(closed, head("/runs/report", *fields, "Content-Length: 1000000"), padded)[0] == 200


@pytest.mark.parametrize("sent", [b"POST /runs/report HT", head("/runs/report", f"Authorization: Bearer {KEY}",
                                                               "Content-Length: 900000") + b"{"])
@pytest.mark.parametrize("drips", [False, True])
def test_a_request_that_does_not_come_to_an_end_is_ended_however_it_drips(
        start_server: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch, sent: bytes, drips: bool) -> None:
    """10,300 half heads kept everybody out."""
    monkeypatch.setattr(serving, "RECEIVE_SECONDS", 1)
    monkeypatch.setattr(serving, "CLEANUP_SECONDS", 0.2)
    server = start_server(TIDEBASE_API_KEY=KEY)
    with connected(Api(server.url, server)) as connection:
        connection.sendall(sent)
        connection.settimeout(0.1)
        answer = b""

        def has_ended() -> bool:
            nonlocal answer
            try:
                if drips:
                    connection.sendall(b" ")
                more = connection.recv(1000)
                answer += more
                return more == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        eventually(has_ended, 10)
    # waitress ends a connection that is idle; the parser refuses what comes too late on one that is not.
    assert (b" 408 " in answer) == drips


def test_requests_that_wait_for_a_thread_leave_nothing_in_the_log(
        start_server: Callable[..., LocalServer], caplog: pytest.LogCaptureFixture) -> None:
    server = start_server(TIDEBASE_POOL=2)
    connections = [connected(Api(server.url, server)) for _ in range(20)]
    for connection in connections:
        connection.sendall(b"".join(request("/runs/w", {}) for _ in range(5)))
    for connection in connections:
        assert [status for status, _ in answers_on(connection, 5)] == [200] * 5
        connection.close()
    assert not [record for record in caplog.records if record.name.startswith("waitress")]


def test_threads_that_waiting_requests_needed_go_again(
        start_server: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(TIDEBASE_POOL=4)
    threads = server._http.waitress.task_dispatcher.threads
    connections = [connected(Api(server.url, server)) for _ in range(20)]
    for number, connection in enumerate(connections):
        connection.sendall(request("/queues/claim", {"queues": [f"q{number}"], "waitMs": 25_000}))
    eventually(lambda: len(server.watcher.long_polls) == 20)
    assert len(threads) == 24
    for connection in connections:
        connection.close()
    eventually(lambda: not server.watcher.long_polls)
    eventually(lambda: len(threads) == 4)


def test_nothing_is_read_from_the_database_for_a_stream_that_nobody_reads(
        api: Api, server: LocalServer, sql: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each such stream held 4 MB and more."""
    monkeypatch.setattr(event_streams, "EVENTS_AT_ONCE", 4)
    run = api.create()
    sql("insert into tidebase.events (run_id, seq, type, payload)"
        " select %s, n, 'state.updated', to_json(repeat('x', 100000)) from generate_series(2, 241) n", run)
    sql("update tidebase.runs set event_seq = 241 where id = %s", run)  # 24 MB, more than the system takes for a reader
    waiting: list[int] = []  # bytes that wait to be sent, at each read of events
    select = server.database.select

    def watched(query: Any, values: Any) -> list[tuple[Any, ...]]:
        if "list_events" in str(query):
            waiting.append(max(channel.total_outbufs_len for channel in server._http.waitress.active_channels.values()))
        return select(query, values)

    def is_held() -> bool:
        """Whether a thread waits in waitress until output was taken."""
        return any(frame.f_code.co_name == "wait" and frame.f_back.f_back and
                   frame.f_back.f_code.co_name == "_flush_outbufs_below_high_watermark"
                   for frame in sys._current_frames().values() if frame.f_back)

    monkeypatch.setattr(server.database, "select", watched)
    with connected(api) as connection:
        connection.sendall(head(f"/runs/{run}/events", method="GET"))
        eventually(lambda: is_held() or len(waiting) > 60)
        assert len(waiting) < 60
        assert max(waiting) < 1_000_000
    eventually(lambda: not server.watcher.long_polls)
