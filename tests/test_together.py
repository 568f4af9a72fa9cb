"""Small writes of different clients go together in one transaction, and none of them feels the others.

A write that comes while others are being committed waits, and then goes with all that wait. To see it, a test holds the
lanes that they wait for.
"""

from __future__ import annotations

import gc
import itertools
import json
import select
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest
from conftest import Answer, Api, LocalServer, eventually, refused, together

import connections
import tidebase


def gathered(server: LocalServer, *requests: Callable[[], Answer]) -> list[Answer]:
    """The answers to requests that go in one transaction, in the order given."""
    door = server._http.door
    answers: dict[int, Answer] = {}
    threads = [threading.Thread(target=lambda number=number, ask=ask: answers.update({number: ask()}))
               for number, ask in enumerate(requests)]
    with ExitStack() as lanes, pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "PATIENCE_SECONDS", 60.0)
        for _ in range(door.LANES):
            lanes.enter_context(door.lanes)
        for number, thread in enumerate(threads, 1):
            thread.start()
            eventually(lambda number=number: len(door.waiting) == number)
    for thread in threads:
        thread.join(30)
    return [answers[number] for number in range(len(requests))]


def held(api: Api, owner: str = "a") -> str:
    run = api.create()
    api.begin(run, owner)["run"]
    return run


def record(api: Api, run: str, name: str = "s", owner: str = "a", **body: Any) -> Answer:
    return api.post(f"/runs/{run}/steps", {"name": name, "inputHash": "h", "leaseOwner": owner, **body})


def transactions(sql: Callable[..., list[Any]], runs: list[str]) -> int:
    return len(sql("select distinct xmin::text from tidebase.steps where run_id = any (%s)", runs))


@pytest.fixture
def on_insert(database: str) -> Iterator[Callable[[str], None]]:
    """Has the database do something else with each new step: on_insert("… return new;")."""
    with psycopg.connect(database, autocommit=True) as connection:
        def do(body: str) -> None:
            connection.execute(f"""
                create function public.meddle() returns trigger language plpgsql as $$ begin {body} end $$;
                create trigger meddle before insert on tidebase.steps for each row execute function public.meddle()""")

        yield do
        connection.execute("drop function public.meddle cascade")


# ------------------------------------------------------------------------------
# In one transaction, and each as if it had come alone
# ------------------------------------------------------------------------------
def test_writes_that_wait_go_in_one_transaction_and_each_client_gets_its_own_answer(
        api: Api, server: LocalServer, sql: Callable[..., list[Any]]) -> None:
    runs = [held(api) for _ in range(8)]
    answers = gathered(
        server, *[lambda n=n, run=run: record(api, run, f"s{n}", output=n) for n, run in enumerate(runs)])
    for number, (run, answer) in enumerate(zip(runs, answers, strict=True)):
        step = answer["step"]
        assert (step["runId"], step["name"], step["output"]) == (run, f"s{number}", number)
        assert api.detail(run)["steps"] == [step]
        assert api.event_types(run)[2:] == ["step.started", "step.completed"]
    assert transactions(sql, runs) == 1


def test_every_verb_and_every_refusal_has_its_own_status_among_the_others(api: Api, server: LocalServer) -> None:
    first, second, third, ended, cancelled = (held(api) for _ in range(5))
    step = api.begin_step(second, "open", "a")["step"]["id"]
    api.post(f"/runs/{cancelled}/cancel")["run"]
    body = {"leaseOwner": "a", "name": "s", "inputHash": "h"}
    answers = gathered(
        server, lambda: record(api, first), lambda: record(api, first, "t", owner="b"),
        lambda: api.complete_step(second, step, "a", {"b": 1.0, "a": "\0"}), lambda: api.begin_step(third, "s", "a"),
        lambda: api.complete(ended, leaseOwner="a", result=[1]), lambda: record(api, cancelled),
        lambda: api.complete("nowhere"), lambda: api.post("/queues/q/enqueue", {"workflowName": "w", "id": "r"}),
        lambda: api.post("/steps", {"records": [{**body, "runId": third, "name": "t"}, {**body, "runId": "none"}]}))
    assert [answer.status for answer in answers] == [200, 409, 200, 200, 200, 409, 404, 200, 200]
    refused(answers[1], 409, "lease_lost")
    refused(answers[5], 409, "run_cancelled")
    refused(answers[6], 404, "not_found")
    assert answers[2]["step"]["output"] == {"b": 1.0, "a": "\0"}
    assert answers[3]["action"] == "execute"
    assert answers[4]["run"] == api.run(ended)
    assert answers[7].json == {"run": api.run("r"), "deduplicated": False}
    recorded, missing = answers[8]["results"]
    assert recorded["step"]["name"] == "t"
    assert (missing["code"], missing["status"]) == ("not_found", 404)
    assert [step["name"] for step in api.detail(first)["steps"]] == ["s"]


def test_a_write_that_the_database_does_not_take_costs_only_its_own_client(
        api: Api, server: LocalServer, on_insert: Callable[[str], None]) -> None:
    runs = [held(api) for _ in range(4)]
    on_insert("if new.name = 'poison' then raise numeric_value_out_of_range; end if; return new;")
    answers = gathered(
        server, *[lambda n=n, run=run: record(api, run, "poison" if n == 1 else "s") for n, run in enumerate(runs)])
    refused(answers[1], 400, "invalid_request")
    assert [answer.status for answer in answers] == [200, 400, 200, 200]
    assert [len(api.detail(run)["steps"]) for run in runs] == [1, 0, 1, 1]


def test_one_batch_writes_each_run_in_the_order_given(api: Api) -> None:
    run = held(api)
    body = {"runId": run, "leaseOwner": "a", "inputHash": "h"}
    begun, recorded = api.post("/writes", {"writes": [
        {"do": "begin_step", **body, "name": "first"}, {"do": "record_step", **body, "name": "second"}]})["results"]
    assert (begun["action"], recorded["step"]["status"]) == ("execute", "completed")
    assert [step["name"] for step in api.detail(run)["steps"]] == ["first", "second"]
    begun, recorded = api.post("/writes", {"writes": [
        {"do": "begin_step", **body, "name": "same"}, {"do": "record_step", **body, "name": "same"}]})["results"]
    assert (begun["action"], recorded["step"]["status"]) == ("execute", "completed")


def test_under_load_all_writes_stand_and_many_share_a_transaction(
        api: Api, sql: Callable[..., list[Any]]) -> None:
    runs = [held(api) for _ in range(24)]

    def work(run: str) -> list[int]:
        return [record(api, run, f"s{number}", output=number)["step"]["output"] for number in range(15)]

    with together(*[lambda run=run: work(run) for run in runs]) as outputs:
        pass
    assert outputs == [list(range(15))] * len(runs)
    for run in runs:
        assert [step["output"] for step in api.detail(run)["steps"]] == list(range(15))
        assert len(api.events(run)) == 2 + 2 * 15
    assert transactions(sql, runs) < len(runs) * 15


# ------------------------------------------------------------------------------
# None waits for another's lock, none is lost with another's connection
# ------------------------------------------------------------------------------
def test_a_run_that_somebody_keeps_locked_holds_up_nobody_else(
        api: Api, server: LocalServer, database: str, blocked: Callable[[int], None]) -> None:
    locked, *others = [held(api) for _ in range(4)]
    answered: list[str] = []
    with psycopg.connect(database) as somebody:
        somebody.execute("select from tidebase.runs where id = %s for update", (locked,))

        def noted(run: str) -> Answer:
            answer = record(api, run)
            answered.append(run)
            if len(answered) == len(others):
                blocked(1)  # the write of the locked run waits, and has nobody wait for it
                for number in range(3):
                    assert record(api, run, f"t{number}").status == 200
                somebody.rollback()
            return answer

        answers = gathered(server, *[lambda run=run: noted(run) for run in (others[0], locked, *others[1:])])
    assert answered[-1] == locked
    assert {answer.status for answer in answers} == {200}


def test_when_the_connection_is_lost_all_are_told_to_send_again_and_nothing_is_written_twice(
        api: Api, server: LocalServer, on_insert: Callable[[str], None]) -> None:
    runs = [held(api) for _ in range(4)]
    on_insert("if new.name = 'last' then perform pg_terminate_backend(pg_backend_pid()); end if; return new;")
    answers = gathered(
        server, *[lambda run=run: record(api, run, "last" if run == runs[2] else "s") for run in runs])
    for answer in answers:
        refused(answer, 503, "database_unavailable")
        assert answer.headers["retry-after"] == "1"
    for run in runs:
        assert record(api, run)["step"]["attempt"] == 1
        assert api.event_types(run)[2:] == ["step.started", "step.completed"]


def test_when_no_thread_can_be_had_to_look_at_the_pool_nothing_is_sent_twice_all_the_same(
        api: Api, server: LocalServer, on_insert: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    run = held(api)
    on_insert("perform pg_terminate_backend(pg_backend_pid()); return new;")
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "tidebase-pool-check":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    refused(record(api, run), 503, "database_unavailable")


def test_transactions_that_hang_hold_up_nobody_else(api: Api, server: LocalServer) -> None:
    door = server._http.door
    runs = [held(api) for _ in range(6)]
    with ExitStack() as lanes:
        for _ in range(door.LANES):
            lanes.enter_context(door.lanes)
        with together(*[lambda run=run: record(api, run)["step"]["name"] for run in runs]) as names:
            pass
    assert names == ["s"] * len(runs)


def test_who_does_not_read_a_large_answer_holds_up_nobody_in_the_same_transaction(
        api: Api, server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy, *runs = [held(api) for _ in range(4)]
    record(api, greedy, output="x" * 3_000_000)["step"]
    door = server._http.door
    monkeypatch.setattr(server._http.waitress.adj, "outbuf_high_watermark", 1000)
    with connected(api) as connection:
        again = request(f"/runs/{greedy}/steps/begin", {"inputHash": "h", "leaseOwner": "a", "name": "s"})

        def ask_twice() -> Answer:
            connection.sendall(again * 2)
            eventually(lambda: not door.waiting)
            return api.get("/health")

        answers = gathered(server, ask_twice, *[lambda run=run: record(api, run) for run in runs])
        assert [answer.status for answer in answers] == [200] * 4
        assert [status for status, _ in answers_on(connection, 2)] == [200, 200]


def test_one_that_cannot_be_answered_costs_the_others_nothing(
        api: Api, server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, answer, unlucky = [held(api) for _ in range(4)], connections.Channel.answer, []

    def fail(channel: connections.Channel, known: Any) -> None:
        if not unlucky:
            unlucky.append(channel)
            raise AttributeError("its socket is closed")
        answer(channel, known)

    monkeypatch.setattr(connections.Channel, "answer", fail)

    def ask(run: str) -> Answer | None:
        try:
            return record(api, run)
        except ConnectionError:  # api's, too, when it is asked to send again: the step is recorded
            return None

    answers = gathered(server, *[lambda run=run: ask(run) for run in runs])
    assert [answer.status for answer in answers[1:]] == [200] * 3
    assert [len(api.detail(run)["steps"]) for run in runs] == [1] * 4


def test_requests_that_come_before_the_database_is_prepared_hold_up_no_other(
        start_server: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidebase, "PREPARE_SECONDS", 30)
    server = start_server()
    api = Api(server.url, server)
    run, door = held(api), server._http.door
    server.prepared.clear()
    with ExitStack() as stack:
        early, late = ([stack.enter_context(connected(api)) for _ in range(4)] for _ in range(2))
        with door.lock:  # those who watch have the first, and see all the others at once
            for connection in early:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for number, connection in enumerate(late):
                connection.sendall(request(f"/runs/{run}/steps", {
                    "inputHash": "h", "leaseOwner": "a", "name": f"s{number}"}))
        for connection in early:
            connection.settimeout(10)
            answers_on(connection, 1)
        server.prepared.set()
        assert [answers_on(connection, 1)[0][0] for connection in late] == [200] * 4


def test_a_stop_does_not_wait_for_a_lock_that_the_first_request_waits_for(
        start_server: Callable[..., LocalServer], database: str, blocked: Callable[[int], None],
        api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidebase, "DRAIN_SECONDS", 0.2)
    run = held(api)
    with psycopg.connect(database) as somebody:
        somebody.execute("select from tidebase.runs where id = %s for update", (run,))
        server = start_server()
        with connected(Api(server.url, server)) as connection:
            connection.sendall(request(f"/runs/{run}/heartbeat", {"leaseOwner": "a"}))
            blocked(1)
            server.stop()
            server.thread.join(20)
            assert not server.thread.is_alive()


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
    run = held(api)
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
    run = held(api)
    with connected(api) as connection:
        for number in range(3):
            raw = request(f"/runs/{run}/steps", {"inputHash": "h", "leaseOwner": "a", "name": f"s{number}"})
            for at in range(0, len(raw), size):
                connection.sendall(raw[at : at + size])
            [(status, answer)] = answers_on(connection, 1)
            assert (status, answer["step"]["name"]) == (200, f"s{number}")
    assert api.event_types(run)[2:] == ["step.started", "step.completed"] * 3


def test_a_client_that_is_slow_to_read_is_answered_in_full_and_goes_on(api: Api, server: LocalServer) -> None:
    run, channels = held(api), server._http.waitress.active_channels
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


def test_a_client_that_hangs_up_in_the_middle_leaves_nothing_behind(api: Api, server: LocalServer) -> None:
    run = held(api)
    before = len(server._http.waitress.active_channels)
    for cut in (10, 60, 120):
        with connected(api) as connection:
            connection.sendall(request(f"/runs/{run}/steps", {
                "inputHash": "h", "leaseOwner": "a", "name": "s", "output": "x" * 200})[:cut])
    eventually(lambda: len(server._http.waitress.active_channels) <= before)
    assert api.detail(run)["steps"] == []


def test_a_connection_that_ends_leaves_nothing_behind_for_the_collector(
        api: Api, start_server: Callable[..., LocalServer]) -> None:
    server = start_server()
    other = Api(server.url, server)
    half = request("/runs/x/steps", {"output": "x" * 1_000_000})[:600_000]
    gc.disable()
    try:
        with connected(other) as connection:
            connection.sendall(half)
            eventually(lambda: server._http.waitress.active_channels)
            [gone] = map(weakref.ref, server._http.waitress.active_channels.values())
        eventually(lambda: gone() is None)

        with connected(other) as connection:
            connection.sendall(half)
            eventually(lambda: server._http.waitress.active_channels)
            [idle] = map(weakref.ref, server._http.waitress.active_channels.values())
            server._http.waitress.adj.channel_timeout, server._http.waitress.next_channel_cleanup = -1, 0
            server._http.wake()
            eventually(lambda: idle() is None)
        assert not server._http.door.watched
    finally:
        gc.enable()


def half_a_request(server: LocalServer) -> socket.socket:
    """A connection on which the second half of a large body has not come yet."""
    connection = connected(Api(server.url, server))
    connection.sendall(request("/runs/x/steps", {"output": "x" * 1_000_000})[:300_000])
    return connection


@pytest.mark.parametrize("when", ["before it reads", "as it takes in what it read"])
def test_a_connection_may_be_closed_while_a_thread_reads_from_it(
        start_server: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
        when: str) -> None:
    server = start_server()
    received, writable, closed = connections.Parser.received, connections.Channel.writable, []

    def close() -> None:
        [channel] = server._http.waitress.active_channels.values()
        closed.append(channel)
        server._http.waitress.adj.channel_timeout, server._http.waitress.next_channel_cleanup = -1, 0
        server._http.wake()
        eventually(lambda: not channel.connected)

    def take_in(parser: connections.Parser, data: bytes) -> int:
        if not closed and parser.body_rcv and len(parser.body_rcv):  # the second part of a body
            close()
        return int(received(parser, data))

    def look(channel: connections.Channel) -> bool:
        is_writable = bool(writable(channel))
        if not closed and channel.request and sys._getframe(1).f_code.co_name == "read":  # others have it locked
            close()
        return is_writable

    if when == "before it reads":
        monkeypatch.setattr(connections.Channel, "writable", look)
    else:
        monkeypatch.setattr(connections.Parser, "received", take_in)
    with half_a_request(server) as connection:
        eventually(lambda: server._http.waitress.active_channels or closed)
        with suppress(OSError):
            connection.sendall(b"x" * 200_000)
        eventually(lambda: closed and not closed[0].request)
    assert [record for record in caplog.records if record.name == "tidebase.server"] == []


def test_what_came_of_a_request_is_discarded_with_a_connection_that_is_about_to_be_closed(
        start_server: Callable[..., LocalServer]) -> None:
    server = start_server()
    with half_a_request(server) as connection:
        [channel] = eventually(lambda: list(server._http.waitress.active_channels.values()))
        eventually(lambda: channel.request and server._http.door.watched)
        channel.will_close = True  # the main loop has not come to it
        connection.sendall(b"x")
        eventually(lambda: not server._http.waitress.active_channels)
        eventually(lambda: not channel.request)


def test_only_the_main_loop_closes_connections(
        start_server: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a number could be another connection's before it is taken out of all lists."""
    server = start_server()
    closed, received, forget = [], connections.Channel.received, connections.Channel.del_channel

    def wait(channel: connections.Channel, data: bytes) -> bool:
        eventually(channel.check_client_disconnected)
        return bool(received(channel, data))

    def note(channel: connections.Channel, *arguments: Any) -> None:
        closed.append(threading.current_thread())
        forget(channel, *arguments)

    monkeypatch.setattr(connections.Channel, "received", wait)
    monkeypatch.setattr(connections.Channel, "del_channel", note)
    with connected(Api(server.url, server)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it ends with a reset
        connection.sendall(b"POST /steps HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                           b"Content-Length: 50\r\n\r\n")
    eventually(lambda: closed)
    eventually(lambda: not server._http.waitress.active_channels)
    assert set(closed) == {server.thread}


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
    assert record(api, held(api)).status == 200


def test_a_platform_without_epoll_serves_the_same(
        api: Api, start_server: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll")
    server = start_server()
    other = Api(server.url, server)
    runs = [held(api) for _ in range(8)]

    def work(run: str) -> list[int]:
        with connected(other) as connection:
            for number in range(10):
                connection.sendall(request(f"/runs/{run}/steps", {
                    "inputHash": "h", "leaseOwner": "a", "name": f"s{number}", "output": number}))
                assert answers_on(connection, 1)[0][0] == 200
        return [step["output"] for step in other.detail(run)["steps"]]

    with together(*[lambda run=run: work(run) for run in runs]) as outputs:
        pass
    assert outputs == [list(range(10))] * len(runs)
    eventually(lambda: not server._http.waitress.active_channels)
