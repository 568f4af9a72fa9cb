"""What cannot be served with is refused at the start, with the way out; what is started ends cleanly, and comes back.

`python tidebase.py` as a process, with a PostgreSQL of its own; and a server whose database goes away and returns.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import ROOT, Api, ServerProcess, an_embedded_postgres, config, eventually, free_port, refused

import tidebase
from tidebase_server import database

# --- settings


@pytest.mark.parametrize(("settings", "words"), [
    ({"PORT": "http"}, "PORT"), ({"PORT": "-1"}, "PORT"), ({"PORT": "65536"}, "PORT"), ({"PORT": "7373 "}, "PORT"),
    ({"PORT": "٣"}, "PORT"), ({"TIDEBASE_LEASE_MS": "60s"}, "whole number"),
    ({"TIDEBASE_LEASE_MS": "99"}, "100 to 86400000"), ({"TIDEBASE_RECONCILE_MS": "0"}, "TIDEBASE_RECONCILE_MS"),
    ({"TIDEBASE_MAX_BODY": "16MB"}, "TIDEBASE_MAX_BODY"), ({"TIDEBASE_POOL": "1"}, "2 to 1024"),
    ({"TIDEBASE_POOL": "0"}, "TIDEBASE_POOL"), ({"WEB_CONCURRENCY": "0"}, "WEB_CONCURRENCY"),
    ({"WEB_CONCURRENCY": "9" * 5000}, "WEB_CONCURRENCY"), ({"TIDEBASE_AUTO_MIGRATE": "yes"}, "0 or 1"),
    ({"TIDEBASE_INSECURE": "true"}, "0 or 1"), ({"HOST": "0.0.0.0"}, "TIDEBASE_API_KEY"),
    ({"HOST": "::"}, "TIDEBASE_INSECURE=1"), ({"HOST": "example.test"}, "TIDEBASE_API_KEY"),
    ({"HOST": "0.0.0.0", "TIDEBASE_API_KEY": ""}, "TIDEBASE_API_KEY"),
    ({"HOST": "0.0.0.0", "TIDEBASE_API_KEY": "hushhush1234567"}, "secrets.token_urlsafe(32)"),
    ({"HOST": "::", "TIDEBASE_API_KEY": "hushhush", "TIDEBASE_INSECURE": "1"}, "at least 16 characters"),
    ({"DATABASE_URL": "mysql://me:hushhush@db/x"}, "DATABASE_URL"), ({"DATABASE_URL": "hushhush"}, "postgresql://"),
    ({"DATABASE_URL": "postgresql://me:hushhush@db:port:/x?a=b"}, "DATABASE_URL"),
    ({"TIDEBASE_API_KEY": "hushhush\udcff"}, "TIDEBASE_API_KEY"),
    ({"TIDEBASE_WEBHOOK_SECRET": "hushhush\udcff"}, "TIDEBASE_WEBHOOK_SECRET"),
    ({"TIDEBASE_API_KEY": "hushhush "}, "no space"),
    ({"TIDEBASE_API_KEY": "k", "TIDEBASE_READ_KEY": " hushhush"}, "TIDEBASE_READ_KEY must"),
    ({"TIDEBASE_PUBLIC_URL": "tide.example"}, "such as https://tide.example"),
    *(({"TIDEBASE_CORS_ORIGIN": origin}, "such as https://app.example") for origin in (
        "app.example", "https://app.example/", "https://App.example", "https://a.example,https://b.example")),
])
def test_a_setting_that_cannot_be_is_refused_with_its_name_and_the_way_out(settings, words):
    with pytest.raises(tidebase.ConfigError) as refusal:
        tidebase.Config.from_environment(settings)
    assert words in str(refusal.value)
    assert "hushhush" not in str(refusal.value)


@pytest.mark.parametrize("settings", [
    {}, {"HOST": "127.0.0.1"}, {"HOST": "localhost"}, {"HOST": "::1"},
    {"HOST": "0.0.0.0", "TIDEBASE_API_KEY": "k" * 16},
    {"TIDEBASE_API_KEY": "k"}, {"TIDEBASE_API_KEY": "a b"}, {"TIDEBASE_CORS_ORIGIN": "http://app.example:8080"},
    {"TIDEBASE_PUBLIC_URL": "https://tide.example/base/"}, {"TIDEBASE_CORS_ORIGIN": "http://[::1]:3000"},
    {"HOST": "0.0.0.0", "TIDEBASE_INSECURE": "1"}, {"PORT": "", "DATABASE_URL": ""},
    {"DATABASE_URL": "postgres://me:pw@db.test/x?sslmode=require"}, {"DATABASE_URL": "host=/tmp dbname=x"},
])
def test_what_is_safe_is_served_with(settings):
    assert tidebase.Config.from_environment(settings).port == 7373


def test_a_setting_that_is_none_is_told_with_the_one_that_was_meant(caplog):
    tidebase.Config.from_environment({"TIDEBASE_LEASEMS": "1", "TIDEBASE_URL": "http://x", "UNRELATED": "1"})
    record, = caplog.records
    assert (record.levelno, record.event) == (logging.WARNING, "unknown_setting")
    assert "did you mean TIDEBASE_LEASE_MS?" in record.getMessage()


def command(**settings: str) -> subprocess.CompletedProcess[str]:
    """`python tidebase.py`, to its end."""
    return subprocess.run([sys.executable, str(ROOT / "tidebase.py")], capture_output=True, text=True, timeout=60,
                          env={"PATH": os.environ["PATH"], **settings}, check=False)


def test_a_port_in_use_is_told_before_a_database_is_started(tmp_path, server):
    port = str(server.listener.getsockname()[1])
    ended = command(PORT=port, TIDEBASE_DATA_DIR=str(tmp_path / "data"))
    assert ended.returncode == 1
    assert port in ended.stderr
    assert "set HOST and PORT" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "data").exists()


def test_a_refused_setting_ends_the_process_with_one_line(tmp_path):
    ended = command(HOST="0.0.0.0", PORT="0", TIDEBASE_DATA_DIR=str(tmp_path / "data"))
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: HOST is 0.0.0.0")
    assert len(ended.stderr.splitlines()) == 1


def test_beyond_loopback_with_a_key_nothing_is_warned_of_and_without_one_loudly(spawn_server):
    server = spawn_server(HOST="0.0.0.0", TIDEBASE_API_KEY="k" * 16)
    assert "TIDEBASE_INSECURE" not in server.log.read_text()
    refused(Api(server.url).get("/runs"), 401, "unauthorized")
    assert Api(server.url, key="k" * 16).get("/runs")["runs"] == []
    server = spawn_server(HOST="0.0.0.0", TIDEBASE_INSECURE="1")
    assert "ANYONE WHO CAN REACH" in server.log.read_text()
    assert Api(server.url).get("/runs")["runs"] == []


def test_more_clients_than_files_wait_outside_and_are_served_when_others_leave(spawn_server):
    server = spawn_server(files=100)
    with ExitStack() as inside:
        crowd = [inside.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(150)]
        crowd[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert crowd[0].recv(12) == b"HTTP/1.1 200"
        late = inside.enter_context(closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)))
        late.request("POST", "/queues/default/enqueue", '{"workflowName": "report"}',
                     {"content-type": "application/json"})
        eventually(lambda: "connection limit" in server.log.read_text())
        for connection in crowd[1:]:
            connection.close()
        assert late.getresponse().status == 200
    assert "Too many open files" not in server.log.read_text()


# --- a server with a PostgreSQL of its own


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """A data directory, which the first server on it fills."""
    with tempfile.TemporaryDirectory(prefix="tidebase-test-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def own(data_dir: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server process with an embedded PostgreSQL in data_dir."""
    servers: list[ServerProcess] = []

    def start(wait: bool = True, **settings: str) -> ServerProcess:
        servers.append(ServerProcess({
            "PORT": str(free_port()), "DATABASE_URL": "", "TIDEBASE_DATA_DIR": str(data_dir), **settings},
            tmp_path / f"own-{len(servers)}.log"))
        return servers[-1].start(wait)

    yield start
    for server in servers:
        server.end(signal.SIGTERM)
    assert postmaster(data_dir) is None


def address_in(data_dir: Path) -> str:
    """The address of the embedded PostgreSQL."""
    return f"host={data_dir}/postgres user=postgres password={(data_dir / 'postgres.password').read_text()}"


def postmaster(data_dir: Path) -> int | None:
    """The process of the embedded PostgreSQL, while it runs."""
    try:
        pid = int((data_dir / "postgres" / "postmaster.pid").read_text().split("\n")[0])
    except FileNotFoundError:
        return None
    return pid if is_running(pid) else None


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end between the opening and the reading
        return False


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def test_sigterm_and_sigint_end_it_with_status_0_and_its_postgres_too(own, data_dir):
    runs: list[str] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        for processes in ("1", "2"):
            server = own(WEB_CONCURRENCY=processes)
            api = Api(server.url)

            def created(api=api):  # each process prepares itself: until it has, its answer is to ask again
                answer = api.post("/runs/report")
                return answer.status == 200 and answer["run"]["id"]

            runs += [eventually(created) for _ in range(4)]
            log = server.log.read_text()
            assert f"listens on {server.url}\n" in log
            assert f"{server.url}/studio\n" in log
            assert str(data_dir) in log
            assert postmaster(data_dir)
            assert server.end(number) == 0
            assert postmaster(data_dir) is None
            assert "Traceback" not in server.log.read_text()
    api = Api(own().url)
    assert [api.run(run)["status"] for run in runs] == ["pending"] * 16


def test_a_request_that_was_taken_before_the_end_is_answered(own, data_dir):
    server, created = own(), []

    def ask_until_it_ends(method, path, note):
        address = server.url.removeprefix("http://")
        with closing(http.client.HTTPConnection(address, timeout=60)) as connection, \
                suppress(OSError, http.client.HTTPException):
            while True:  # on one connection, as workers do
                connection.request(method, path)
                note(json.loads(connection.getresponse().read()))

    with ThreadPoolExecutor(16) as threads:
        ended = [threads.submit(ask_until_it_ends, *asked) for asked in [
            ("POST", "/runs/steady", lambda answer: created.append(answer["run"]["id"])),
            ("GET", "/health", lambda answer: None)] * 8]
        eventually(lambda: len(created) > 100)
        assert server.end(signal.SIGTERM) == 0
    assert [done.exception() for done in ended] == [None] * 16
    assert "Traceback" not in server.log.read_text()
    own()
    with psycopg.connect(address_in(data_dir)) as connection:
        kept = connection.execute("select id from tidebase.runs where workflow_name = 'steady'").fetchall()
    assert sorted(run for run, in kept) == sorted(created)


def test_a_held_claim_is_answered_before_the_end(own, data_dir):
    server = own()
    api = Api(server.url)
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(api.post, "/queues/claim", {"queues": ["default"], "waitMs": 25_000})
        watching = "select from pg_stat_activity where query like '%tidebase.watch(%' and pid <> pg_backend_pid()"
        with psycopg.connect(address_in(data_dir), autocommit=True) as connection:
            eventually(lambda: connection.execute(watching.encode()).fetchall())
        assert server.end(signal.SIGTERM) == 0
        assert held.result(10)["runs"] == []
        assert held.result().headers["connection"] == "close"  # else a busy client would keep the server from its end


def test_killed_it_loses_nothing_and_the_next_start_just_works(own, data_dir):
    server = own()
    run = Api(server.url).create()
    server.end(signal.SIGKILL)
    eventually(lambda: postmaster(data_dir) is None, 30)  # its keeper stops it
    server.start()
    assert Api(server.url).run(run)["status"] == "pending"
    assert server.end(signal.SIGTERM) == 0
    assert postmaster(data_dir) is None


def test_killed_with_its_postgres_it_loses_nothing_and_the_next_start_just_works(own, data_dir):
    server = own()
    run = Api(server.url).create()
    pid = postmaster(data_dir)
    os.kill(pid, signal.SIGKILL)
    server.end(signal.SIGKILL)
    server.start()
    assert postmaster(data_dir) != pid
    assert Api(server.url).run(run)["status"] == "pending"


def test_of_two_servers_on_one_data_directory_the_first_to_leave_leaves_the_database(own, data_dir):
    first, second = own(wait=False), own(wait=False)
    for server in (first, second):
        eventually(server.is_healthy, 30)
    run = Api(first.url).create()
    assert Api(second.url).run(run)["id"] == run
    assert first.end(signal.SIGTERM) == 0
    assert Api(second.url).create()
    first.start()
    assert second.end(signal.SIGTERM) == 0
    assert Api(first.url).run(run)["id"] == run
    assert first.end(signal.SIGTERM) == 0
    assert postmaster(data_dir) is None


def test_a_server_that_was_killed_does_not_keep_the_database_from_ending_with_the_last(own, data_dir):
    first, second = own(), own()
    first.end(signal.SIGKILL)
    assert Api(second.url).create()
    third = own()
    assert third.end(signal.SIGTERM) == 0
    assert Api(second.url).create()
    assert second.end(signal.SIGTERM) == 0
    assert postmaster(data_dir) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_is_heeded(own, data_dir, number):
    server = own(wait=False)
    eventually(lambda: postmaster(data_dir))
    server.process.send_signal(number)
    assert server.process.wait(30) == 0, server.log.read_text()
    assert postmaster(data_dir) is None
    assert "Traceback" not in server.log.read_text()


# --- several processes on one socket


def test_a_process_that_dies_is_replaced_and_all_end_with_the_parent(spawn_server):
    server = spawn_server(WEB_CONCURRENCY="2")
    parent = server.process.pid
    first = eventually(lambda: len(children(parent)) == 2 and children(parent))
    lost = min(first)
    os.kill(lost, signal.SIGKILL)
    second = eventually(lambda: len(children(parent) - {lost}) == 2 and children(parent))
    run = Api(server.url).create()
    assert Api(server.url).run(run)["status"] == "pending"
    assert server.end(signal.SIGTERM) == 0
    assert not [pid for pid in first | second if is_running(pid)]


def test_processes_whose_parent_was_killed_end(spawn_server):
    server = spawn_server(WEB_CONCURRENCY="2")
    left = eventually(lambda: len(children(server.process.pid)) == 2 and children(server.process.pid))
    server.end(signal.SIGKILL)
    eventually(lambda: not [pid for pid in left if is_running(pid)])
    server.start()


# --- a database that goes away


def end(embedded: tidebase.EmbeddedPostgres, number: int) -> None:
    pid = embedded.pid()
    os.kill(pid, number)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), 30)  # reaped, too: till then it counts as running


def restart(embedded: tidebase.EmbeddedPostgres, number: int) -> None:
    end(embedded, number)
    embedded.revive()


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[tuple[tidebase.EmbeddedPostgres, str]]:
    with an_embedded_postgres() as (embedded, conninfo):
        tidebase.Database(conninfo, 2).migrate()
        yield embedded, conninfo


@pytest.fixture
def restarted(own_postgres: tuple[tidebase.EmbeddedPostgres, str]) -> Iterator[tuple[Any, str]]:
    """A PostgreSQL that a test may stop: (it, its address)."""
    yield own_postgres
    own_postgres[0].revive()
    with psycopg.connect(own_postgres[1], autocommit=True) as connection:
        connection.execute("delete from tidebase.runs")


@contextmanager
def serving(conninfo: str, revive: Callable[[], None] | None = None, **settings: Any) -> Iterator[Api]:
    """A server of this process on a database that need not be there yet."""
    server = tidebase.Server(config(TIDEBASE_RECONCILE_MS=50, **settings), conninfo, revive=revive)
    thread = threading.Thread(target=server.serve, name="server-under-test")
    thread.start()
    try:
        yield Api(server.url, server)
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def healthy(api: Api) -> bool:
    return api.get("/health").status == 200


def test_without_its_database_it_starts_says_so_and_recovers_by_itself(restarted, caplog):
    postgres, conninfo = restarted
    end(postgres, signal.SIGINT)
    with serving(conninfo) as api:
        health = api.get("/health")
        assert (health.status, health.json["ok"], health.json["database"]) == (503, False, "away")
        for answer in (api.get("/runs"), api.post("/runs/report"), api.post("/queues/claim", {"queues": ["q"]})):
            refused(answer, 503, "database_unavailable")
            assert answer.headers["retry-after"] == "1"
        eventually(lambda: [record for record in caplog.records if getattr(record, "event", "") == "database_away"])
        postgres.revive()
        eventually(lambda: healthy(api), 30)
        run = api.create()
        assert api.run(run)["status"] == "pending"
    told = [record for record in caplog.records if getattr(record, "event", "").startswith("database_")]
    assert {record.event for record in told[:-1]} == {"database_away"} and told[-1].event == "database_back"
    assert len({record.getMessage() for record in told}) == len(told)  # each reason once, not at every tick
    assert "No such file" in told[0].getMessage()  # what Postgres' library says of it
    assert not [record for record in caplog.records if record.exc_info]


def test_while_its_database_is_away_no_request_keeps_its_thread_from_others(restarted, monkeypatch, caplog):
    postgres, conninfo = restarted
    monkeypatch.setattr(database, "CONNECT_SECONDS", 600)
    monkeypatch.setattr(database, "AWAY_SECONDS", 0.1)
    with serving(conninfo, TIDEBASE_POOL=2) as api:
        eventually(lambda: healthy(api), 30)
        end(postgres, signal.SIGINT)
        for _ in range(8):
            refused(api.post("/runs/report"), 503, "database_unavailable")
        eventually(lambda: [record for record in caplog.records if getattr(record, "event", "") == "database_away"
                            and "No such file" in record.getMessage()])  # what PostgreSQL's library says, not the pool
        postgres.revive()
        eventually(lambda: healthy(api), 30)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL], ids=["fast", "immediate", "crash"])
def test_a_restart_of_its_database_costs_nothing_but_repeats(restarted, how):
    postgres, conninfo = restarted
    stop = threading.Event()
    written: list[str] = []

    def write(number: int) -> None:
        while not stop.is_set():
            run = f"run_{number}_{len(written)}"
            answer = api.post("/queues/q/enqueue", {"workflowName": "w", "id": run})
            if answer.status == 200:
                written.append(run)
            else:
                refused(answer, 503, "database_unavailable")
                stop.wait(0.01)  # to be sent again, as Retry-After says, but sooner

    def goes_on() -> None:
        count = len(written)
        eventually(lambda: len(written) > count + 5, 30)

    with serving(conninfo) as api, ThreadPoolExecutor(3) as threads:
        eventually(lambda: healthy(api), 30)
        writers = [threads.submit(write, number) for number in range(3)]
        try:
            goes_on()
            for _ in range(2):
                restart(postgres, how)
                goes_on()
        finally:
            stop.set()
        for writer in writers:
            writer.result(30)
        with psycopg.connect(conninfo) as connection:
            kept = {run for run, in connection.execute("select id from tidebase.runs where queue = 'q'").fetchall()}
        assert set(written) <= kept
        assert len(api.claim("q", limit=100)) == min(100, len(kept))


def test_a_held_claim_outlives_a_restart_of_the_database_or_says_to_ask_again(restarted):
    postgres, conninfo = restarted
    with serving(conninfo) as api, ThreadPoolExecutor(1) as threads:
        eventually(lambda: healthy(api), 30)
        held = threads.submit(api.post, "/queues/claim", {"queues": ["held"], "waitMs": 25_000, "leaseOwner": "a"})
        eventually(lambda: api.server.watcher.long_polls)
        restart(postgres, signal.SIGINT)
        run = eventually(lambda: (answer := api.post("/queues/held/enqueue", {"workflowName": "w"})).status == 200
                         and answer["run"]["id"], 30)
        answer = held.result(30)
        if answer.status == 200:
            assert [taken["id"] for taken in answer["runs"]] == [run]
        else:
            refused(answer, 503, "database_unavailable")


def test_webhooks_wait_for_the_database_and_are_sent_when_it_is_back(restarted, receiver, monkeypatch):
    postgres, conninfo = restarted
    with serving(conninfo) as api:
        eventually(lambda: healthy(api), 30)
        run = api.create(channels=[{"type": "webhook", "url": receiver.url}])
        monkeypatch.setattr(tidebase, "SEND_THREADS", 0)
        api.complete(run)["run"]
        restart(postgres, signal.SIGQUIT)
        monkeypatch.undo()
        assert receiver.wait_for(1, 30)[0]["type"] == "run.completed"


def test_leases_have_their_grace_after_an_outage(restarted):
    postgres, conninfo = restarted
    with serving(conninfo, TIDEBASE_LEASE_MS=1000) as api:
        eventually(lambda: healthy(api), 30)
        run = api.enqueue()
        api.claim(owner="a")
        end(postgres, signal.SIGINT)
        eventually(lambda: api.server.reconciler.away_since)
        with psycopg_when_back(postgres, conninfo) as connection:  # longer away than the lease lasts
            connection.execute("update tidebase.runs set lease_expires_at = lease_expires_at - interval '1 minute'")
        eventually(lambda: api.server.reconciler.away_since is None, 30)
        assert api.heartbeat(run, "a")["run"]["leaseOwner"] == "a"


@contextmanager
def psycopg_when_back(postgres: Any, conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    postgres.revive()
    with psycopg.connect(conninfo, autocommit=True) as connection:
        yield connection


def test_an_embedded_postgres_that_died_is_started_again(restarted, monkeypatch):
    postgres, conninfo = restarted
    monkeypatch.setattr(tidebase, "REVIVE_SECONDS", 0.2)
    monkeypatch.setattr(database, "CONNECT_SECONDS", 1)
    with serving(conninfo, postgres.revive) as api:
        eventually(lambda: healthy(api), 30)
        run = api.create()
        end(postgres, signal.SIGKILL)
        eventually(lambda: healthy(api), 30)
        assert api.run(run)["status"] == "pending"


def test_a_failed_start_of_the_embedded_postgres_is_tried_again(restarted, monkeypatch, caplog):
    postgres, conninfo = restarted
    monkeypatch.setattr(tidebase, "REVIVE_SECONDS", 0.0)
    monkeypatch.setattr(database, "CONNECT_SECONDS", 1)  # else each tick that fails waits for 5 s
    tries: list[int] = []

    def revive() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise subprocess.CalledProcessError(1, "pg_ctl")
        postgres.revive()

    with serving(conninfo, revive) as api:
        eventually(lambda: healthy(api), 30)
        end(postgres, signal.SIGKILL)
        eventually(lambda: healthy(api) and len(tries) >= 3, 30)
    assert len([record for record in caplog.records if getattr(record, "event", "") == "revive_failed"]) == 1
