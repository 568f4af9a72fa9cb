"""A run's events as a stream: history, then what happens, without gap or repeat, whichever server process wrote it.

A stream is a guest: it holds a place of its own, never an ordinary request's, and gives it back however it ends.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import Api, LocalServer, eventually, refused

from tidebase import Tidebase, TidebaseError
from tidebase_server import events as event_streams
from tidebase_server import watcher

PATHS_OF_BAD_NUMBERS = ["after=x", "after=-1", "after=1.5", "after=", "after=2147483648", "after=%D9%A3"]


@pytest.fixture
def server(start_server: Callable[..., LocalServer]) -> LocalServer:
    """One for each test: its end is the end of the streams that are left open."""
    return start_server()


class Stream:
    """A reader of a run's events over HTTP."""

    def __init__(self, api: Api, run: str, query: str = "", **headers: str) -> None:
        self.connection = http.client.HTTPConnection(api.address, timeout=20)
        self.connection.request("GET", f"/runs/{run}/events{query}", headers={**api.headers, **headers})
        self.response = self.connection.getresponse()

    def lines(self) -> Iterator[str]:
        while line := self.response.readline():
            assert line.endswith(b"\n")
            yield line.decode().removesuffix("\n")

    def events(self) -> Iterator[Any]:
        """Its events, after asserting that each is framed as an id line, a data line and an empty line."""
        lines = self.lines()
        for line in lines:
            if line.startswith(":"):
                assert next(lines) == ""
                continue
            data = next(lines)
            assert line.startswith("id: ")
            assert data.startswith("data: ")
            assert next(lines) == ""
            event = json.loads(data.removeprefix("data: "))
            assert event["seq"] == int(line.removeprefix("id: "))
            yield event

    def beat(self) -> None:
        """Read on until it says that it is alive."""
        lines = self.lines()
        assert any(line == ": beat" for line in lines)
        assert next(lines) == ""

    def take(self, count: int) -> list[Any]:
        events = self.events()
        return [next(events) for _ in range(count)]

    def until(self, kind: str) -> list[Any]:
        taken = []
        for event in self.events():
            taken.append(event)
            if event["type"] == kind:
                break
        return taken

    def close(self) -> None:
        self.response.close()
        self.connection.close()


@contextmanager
def listening(api: Api, run: str, query: str = "", **headers: str) -> Iterator[Stream]:
    stream = Stream(api, run, query, **headers)
    try:
        assert stream.response.status == 200
        yield stream
    finally:
        stream.close()


def numbers(events: list[Any]) -> list[int]:
    return [event["seq"] for event in events]


def use(api: Api, run: str, count: int) -> None:
    """Write that many events."""
    for number in range(count):
        api.post(f"/runs/{run}/usage", {"quantity": number})["usage"]


@pytest.fixture
def beating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that say something every few milliseconds, as they do every 15 s."""
    monkeypatch.setattr(event_streams, "BEAT_SECONDS", 0.05)


# --- history, then live


def test_a_stream_tells_what_was_and_then_what_happens(api):
    run = api.create(input={"topic": "ast"})
    use(api, run, 2)
    with listening(api, run) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        assert stream.response.headers["cache-control"] == "no-store"
        events = stream.events()
        told = [next(events) for _ in range(3)]
        api.complete(run, result=7)["run"]
        told.append(next(events))
    assert told == api.events(run)
    assert told[0].keys() == {"id", "runId", "seq", "type", "payload", "createdAt"}
    assert [event["type"] for event in told] == ["run.created", "usage.recorded", "usage.recorded", "run.completed"]


def test_readers_who_come_at_any_time_miss_and_repeat_nothing_while_many_write(api):
    run = api.create()
    told: list[list[int]] = [[] for _ in range(6)]

    def read(number: int) -> None:
        eventually(lambda: len(api.events(run)) > 12 * number)  # each comes at another point of the history
        with listening(api, run) as stream:
            told[number] = numbers(stream.until("run.completed"))

    readers = [threading.Thread(target=read, args=(number,)) for number in range(len(told))]
    writers = [threading.Thread(target=use, args=(api, run, 20)) for _ in range(4)]
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    api.complete(run)["run"]
    for thread in readers:
        thread.join()
    assert told == [list(range(1, 83))] * len(told)


def test_a_long_history_is_told_whole(api, sql):
    run = api.create()
    sql("insert into tidebase.events (run_id, seq, type, payload) select %s, n, 'usage.recorded', '{}'"
        " from generate_series(2, 1700) n", run)
    sql("update tidebase.runs set event_seq = 1700 where id = %s", run)
    api.complete(run)["run"]
    with listening(api, run, "?follow=false") as stream:
        assert numbers(list(stream.events())) == list(range(1, 1702))


def test_an_event_written_through_one_server_process_reaches_a_reader_of_another(api, spawn_server):
    other = Api(spawn_server().url)
    run = api.create()
    with listening(other, run) as there, listening(api, run) as here:
        there_events, here_events = there.events(), here.events()
        assert next(there_events)["seq"] == next(here_events)["seq"] == 1
        use(api, run, 1)
        assert next(there_events)["seq"] == next(here_events)["seq"] == 2
        use(other, run, 1)
        assert next(there_events)["seq"] == next(here_events)["seq"] == 3


def test_payloads_with_line_breaks_stay_one_event_and_mean_the_same(api):
    raw = '{"result": {\r\n  "b": "one\\ntwo\\r\u2028\u0085three",\n\r  "a": [1.0,\n\n2]\r}}'
    run = api.create()
    api.post(f"/runs/{run}/complete", raw=raw.encode())["run"]
    with listening(api, run, "?follow=false") as stream:
        told = list(stream.events())
    assert told == api.events(run)
    assert told[1]["payload"]["result"] == {"b": "one\ntwo\r\u2028\u0085three", "a": [1.0, 2]}


# --- where it begins


def test_a_stream_begins_after_the_last_event_that_its_reader_saw(api):
    run = api.create()
    use(api, run, 5)
    for query, headers, first in (("?after=4", {}, 5), ("", {"Last-Event-ID": "3"}, 4), ("?after=0", {}, 1),
                                  ("?after=1", {"Last-Event-ID": "5"}, 6)):  # a browser that reconnects sends both
        with listening(api, run, query, **headers) as stream:
            assert numbers(stream.take(1)) == [first]
    with listening(api, run, "?after=6") as stream:
        use(api, run, 1)
        assert numbers(stream.take(1)) == [7]


def test_a_stream_from_beyond_the_end_waits_for_what_is_after_it(api, monkeypatch):
    monkeypatch.setattr(event_streams, "BEAT_SECONDS", 3 * watcher.WATCH_SECONDS)
    run = api.create()
    with listening(api, run, "?after=5") as stream:
        use(api, run, 2)  # events 2 and 3
        stream.beat()  # so the watcher found no news for it, three times
        use(api, run, 3)
        assert numbers(stream.take(1)) == [6]
    api.complete(run)["run"]
    with listening(api, run, "?after=100&follow=false") as stream:
        assert list(stream.events()) == []


def test_a_number_that_is_none_is_refused(api):
    run = api.create()
    for query in PATHS_OF_BAD_NUMBERS:
        issues = refused(api.get(f"/runs/{run}/events?{query}"), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == ["after"], query
    answer = api.get(f"/runs/{run}/events", headers={"Last-Event-ID": "abc"})
    refused(answer, 400, "invalid_request")


def test_the_events_of_no_run_are_not_found(api):
    for headers in ({}, {"accept": "application/json"}, {"accept": "text/event-stream"}):
        refused(api.get("/runs/run_0/events", headers=headers), 404, "not_found")


# --- where it ends


@pytest.mark.parametrize(("ending", "kind"), [
    ("complete", "run.completed"), ("fail", "run.failed"), ("cancel", "run.cancelled")])
def test_a_stream_that_does_not_follow_ends_with_the_run(api, ending, kind):
    run = api.create()
    with listening(api, run, "?follow=false") as stream:
        events = stream.events()
        assert next(events)["type"] == "run.created"
        api.post(f"/runs/{run}/{ending}", {"error": "boom"})["run"]
        assert [event["type"] for event in events] == [kind]
    with listening(api, run, "?follow=false") as stream:
        assert numbers(list(stream.events())) == [1, 2]


def test_a_stream_that_follows_goes_on_after_the_end_and_says_so(api, beating):
    run = api.create()
    api.fail(run)["run"]
    with listening(api, run) as stream:
        stream.beat()
        api.post(f"/runs/{run}/retry")["run"]
        assert stream.take(1)[0]["type"] == "run.retried"


def test_the_stream_of_a_run_that_is_deleted_ends(api, sql):
    run = api.create()
    with listening(api, run) as stream:
        events = stream.events()
        assert next(events)["seq"] == 1
        sql("delete from tidebase.runs where id = %s", run)
        assert list(events) == []


def test_a_server_that_stops_ends_its_streams(start_server):
    server = start_server()
    api = Api(server.url, server)
    run = api.create()
    with listening(api, run) as one, listening(api, run) as two:
        events = [one.events(), two.events()]
        assert [next(some)["seq"] for some in events] == [1, 1]
        server.close()
        assert [list(some) for some in events] == [[], []]


def test_a_stream_that_is_about_to_wait_when_the_server_stops_ends_at_once(start_server, beating):
    server = start_server()
    api = Api(server.url, server)
    run = api.create()
    began = server.access.clock

    def stop_meanwhile() -> float:
        """Told to stop between two steps of the stream."""
        server.access.clock = began
        server.watcher.stop()
        return began()

    server.access.clock = stop_meanwhile
    with listening(api, run, "?after=1") as stream:
        assert list(stream.lines()) == [": tidebase", ""]


# --- as a list


def test_for_accept_json_the_events_are_a_list(api):
    run = api.create()
    use(api, run, 3)
    answer = api.get(f"/runs/{run}/events", headers={"accept": "application/json"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == api.events(run)
    later = api.get(f"/runs/{run}/events?after=2", headers={"accept": "application/json"})
    assert numbers(later.json) == [3, 4]
    assert api.get(f"/runs/{run}/events?after=4", headers={"accept": "application/json"}).json == []


def test_what_accepts_both_or_anything_gets_the_stream(api):
    run = api.create()
    for accept in ("text/event-stream", "*/*", "text/event-stream, application/json;q=0.5"):
        with listening(api, run, accept=accept) as stream:
            assert numbers(stream.take(1)) == [1]


# --- who may read


def test_the_key_may_stand_in_the_query_of_a_stream_and_nowhere_else(start_server):
    server = start_server(TIDEBASE_API_KEY="kä/y+")
    api, browser = Api(server.url, key=None), Api(server.url)
    api.headers = {"authorization": "Bearer kä/y+".encode().decode("latin-1")}
    run = api.create()
    api.complete(run)["run"]
    token = "k%C3%A4%2Fy%2B"
    with listening(browser, run, f"?follow=false&token={token}") as stream:
        assert numbers(list(stream.events())) == [1, 2]
    with listening(api, run, "?follow=false") as stream:
        assert numbers(list(stream.events())) == [1, 2]
    for query in ("", "?token=", "?token=guess", "?token=k%C3%A4"):
        refused(browser.get(f"/runs/{run}/events{query}"), 401, "unauthorized")
    for path in (f"/runs/{run}", "/runs", "/queues", f"/runs/{run}/snapshots"):
        refused(browser.get(f"{path}?token={token}"), 401, "unauthorized")
    refused(browser.post(f"/runs/{run}/cancel?token={token}"), 401, "unauthorized")


def test_a_stream_opened_with_a_run_token_ends_when_it_expires(start_server, beating):
    server = start_server(TIDEBASE_API_KEY="the-key")
    api = Api(server.url, server, key="the-key")
    run = api.create()
    token = Tidebase(server.url, "the-key").runs.token(run, ttl_s=60)
    page = Api(server.url, server)
    with listening(page, run, f"?token={token}") as stream, listening(api, run) as keyed:
        events = stream.events()
        assert next(events)["seq"] == 1
        server.access.clock = lambda: time.time() + 61
        assert list(events) == []
        use(api, run, 1)
        assert numbers(keyed.take(2)) == [1, 2]
    eventually(lambda: not server.watcher.long_polls)
    refused(page.get(f"/runs/{run}/events?after=1&token={token}"), 401, "unauthorized")


def test_a_stream_ends_at_the_expiry_though_nothing_happens(start_server):
    server = start_server(TIDEBASE_API_KEY="the-key")
    run = Api(server.url, key="the-key").create()
    token = Tidebase(server.url, "the-key").runs.token(run, ttl_s=0.1)  # which is rounded up to whole seconds
    with listening(Api(server.url), run, f"?token={token}") as stream:
        assert numbers(list(stream.events())) == [1]


def test_a_client_that_has_a_run_token_for_its_key_reads_the_stream_of_that_run(start_server):
    server = start_server(TIDEBASE_API_KEY="the-key")
    api = Api(server.url, server, key="the-key")
    run, other = api.create(), api.create()
    api.complete(run)["run"]
    with Tidebase(server.url, Tidebase(server.url, "the-key").runs.token(run)) as reader:
        assert numbers(list(reader.runs.subscribe(run))) == [1, 2]
        for refusal in (lambda: next(reader.runs.subscribe(other)), lambda: reader.runs.get(run)):
            with pytest.raises(TidebaseError) as refused_to:
                refusal()
            assert refused_to.value.status == 401


# --- places


def test_streams_take_places_and_one_too_many_is_told_to_come_again(start_server, beating):
    server = start_server(TIDEBASE_MAX_WAITING=2)
    api = Api(server.url, server)
    run = api.create()
    with listening(api, run) as one, listening(api, run) as two:
        answer = api.get(f"/runs/{run}/events")
        refused(answer, 503, "busy")
        assert answer.headers["retry-after"] == "1"
        use(api, run, 3)
        assert numbers(one.take(4)) == numbers(two.take(4)) == [1, 2, 3, 4]
        # A list needs no place.
        assert len(api.get(f"/runs/{run}/events", headers={"accept": "application/json"}).json) == 4


def test_a_reader_who_vanishes_frees_its_place(start_server, beating):
    server = start_server(TIDEBASE_MAX_WAITING=2)
    api = Api(server.url, server)
    run = api.create()
    for _ in range(3):
        streams = [Stream(api, run) for _ in range(2)]
        assert [stream.response.status for stream in streams] == [200, 200]
        for stream in streams:
            stream.close()
        eventually(lambda: not server.watcher.long_polls)


def test_what_only_asks_for_the_head_of_a_stream_takes_no_place(start_server):
    server = start_server(TIDEBASE_MAX_WAITING=2)
    api = Api(server.url, server)
    run = api.create()
    for _ in range(4):
        assert api.send("HEAD", f"/runs/{run}/events").status == 200
    assert not server.watcher.long_polls


def test_head_of_a_stream_is_answered_with_its_head_and_keeps_the_connection(api):
    connection = http.client.HTTPConnection(api.address, timeout=30)
    connection.request("HEAD", f"/runs/{api.create()}/events")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    answer.read()
    kept = connection.sock
    connection.request("GET", "/health")  # what followed the head would be read as the beginning of this answer
    assert json.loads(connection.getresponse().read())["ok"]
    assert connection.sock is kept
    connection.close()
