"""Whatever is killed, every run completes, no completed step runs again, and who was silent too long is refused.

Workers and servers here are processes, killed for real. Each execution of a step writes a line into a journal before it
does anything else, so that what ran can be held against what the record says.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import (
    ROOT,
    Api,
    Forked,
    ServerProcess,
    an_embedded_postgres,
    eventually,
    fork_server,
    free_port,
)

import tidebase


class Workers:
    """Worker processes of one journal."""

    def __init__(self, url: str, journal: Path) -> None:
        self.environment = {**os.environ, "TIDEBASE_URL": url}
        self.journal = journal
        self.processes: list[Forked] = []

    def start(self, concurrency: int = 1) -> Forked:
        with self.journal.with_suffix(".log").open("ab") as log:
            self.processes.append(fork_server.start(
                str(ROOT / "tests/storm_worker.py"), str(self.journal), str(concurrency),
                environment=self.environment, output=log.fileno()))
        return self.processes[-1]

    def executions(self) -> list[dict[str, Any]]:
        whole = self.journal.read_text().rpartition("\n")[0] if self.journal.exists() else ""  # one may be half written
        return [json.loads(line) for line in whole.splitlines()]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Callable[[str], Workers]]:
    crews: list[Workers] = []

    def make(url: str) -> Workers:
        crews.append(Workers(url, tmp_path / "journal"))
        return crews[-1]

    yield make
    for workers in crews:
        workers.close()


def ended(api: Api, runs: list[str]) -> bool:
    try:
        return all(api.run(run)["status"] in ("completed", "failed", "cancelled") for run in runs)
    except (OSError, AssertionError):  # the server is just down, or says 503
        return False


def assert_all_is_well(api: Api, runs: list[str], steps: int, workers: Workers) -> None:
    """Every run completed with its result, every step completed once, and none was executed after that."""
    for run in runs:
        detail = api.detail(run)
        assert detail["run"]["status"] == "completed", detail["run"]["error"]
        assert detail["run"]["result"] == list(range(steps))
        assert [step["status"] for step in detail["steps"]] == ["completed"] * steps
        completed = [e["payload"]["name"] for e in api.events(run) if e["type"] == "step.completed"]
        assert sorted(completed) == sorted(step["name"] for step in detail["steps"])
        done_at = {step["name"]: step["completedAt"] for step in detail["steps"]}
        for execution in (e for e in workers.executions() if e["run"] == run):
            done = datetime.fromisoformat(done_at[execution["step"]]).timestamp()
            assert execution["at"] <= done + 0.001, f"{execution} after it was completed"  # shown to the millisecond


def test_of_thirty_runs_whose_workers_are_killed_at_random_all_complete_and_nothing_repeats(spawn_server, crew):
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = spawn_server(TIDEBASE_LEASE_MS=1000)
    api, workers = Api(server.url), crew(server.url)
    runs = [api.enqueue("storm", "storm", input={"steps": 8, "seconds": 0.03}, maxAttempts=100) for _ in range(30)]
    for _ in range(3):
        workers.start()
    kills = 0
    while not ended(api, runs):
        before = len(workers.executions())
        eventually(lambda before=before: len(workers.executions()) > before + 5 or ended(api, runs), 30)
        if kills < 12:
            victim = chance.choice([p for p in workers.processes if p.poll() is None])
            victim.send_signal(signal.SIGKILL)
            kills += 1
            workers.start()
    assert kills == 12, "the storm was over before it began"
    assert_all_is_well(api, runs, 8, workers)
    executed = [(execution["run"], execution["step"]) for execution in workers.executions()]
    assert len(executed) > len(set(executed)), "no kill hit a step"  # one that dies young leaves no other trace


def test_a_run_enqueued_with_default_arguments_survives_the_death_of_its_worker(spawn_server, crew, tmp_path):
    server = spawn_server(TIDEBASE_LEASE_MS=1000)
    api, workers = Api(server.url), crew(server.url)
    run = api.enqueue("storm", "storm", input={"steps": 3, "until": str(tmp_path / "go")})
    first = workers.start()
    eventually(workers.executions)
    first.kill()
    first.wait()
    (tmp_path / "go").touch()
    workers.start()
    eventually(lambda: ended(api, [run]))
    assert_all_is_well(api, [run], 3, workers)
    assert api.run(run)["attempt"] == 2
    assert "run.requeued" in api.event_types(run)


def test_a_step_three_times_longer_than_the_lease_runs_once_while_another_worker_is_idle(spawn_server, crew):
    server = spawn_server(TIDEBASE_LEASE_MS=600)
    api, workers = Api(server.url), crew(server.url)
    workers.start()
    workers.start()
    run = api.enqueue("storm", "storm", input={"steps": 1, "seconds": 1.8})
    eventually(lambda: ended(api, [run]))
    assert_all_is_well(api, [run], 1, workers)
    assert len(workers.executions()) == 1
    assert api.run(run)["attempt"] == 1
    assert api.detail(run)["steps"][0]["attempt"] == 1


def test_a_stopped_worker_that_goes_on_after_its_run_was_taken_over_changes_nothing(spawn_server, crew, tmp_path):
    server = spawn_server(TIDEBASE_LEASE_MS=600)
    api, workers = Api(server.url), crew(server.url)
    run = api.enqueue("storm", "storm", input={"steps": 2, "until": str(tmp_path / "go")})
    first = workers.start()
    eventually(workers.executions)
    first.send_signal(signal.SIGSTOP)
    workers.start()
    eventually(lambda: len(workers.executions()) == 2)
    second = workers.processes[1].pid
    holder = api.run(run)["leaseOwner"]
    first.send_signal(signal.SIGCONT)
    (tmp_path / "go").touch()
    eventually(lambda: ended(api, [run]))
    # The first worker is alive and well: what it did late is told by its next run, which it takes when it is through.
    workers.processes[1].terminate()
    workers.processes[1].wait()
    next_run = api.enqueue("storm", "storm", input={"steps": 1})
    eventually(lambda: ended(api, [next_run]))
    assert workers.executions()[-1]["pid"] == first.pid
    detail = api.detail(run)
    assert detail["run"]["status"] == "completed"
    assert {step["output"]["pid"] for step in detail["steps"]} == {second}
    after = [e for e in detail["events"] if e["type"] == "run.claimed" and e["payload"]["leaseOwner"] == holder]
    assert len(after) == 1
    assert [e["type"] for e in detail["events"] if e["seq"] > after[0]["seq"]] == [
        "step.started", "step.completed", "step.started", "step.completed", "run.completed"]


def test_no_run_fails_and_nothing_completed_repeats_while_the_server_is_killed_and_restarted(spawn_server, crew):
    server = spawn_server(TIDEBASE_LEASE_MS=10_000)  # longer than a restart takes on a busy machine
    api, workers = Api(server.url), crew(server.url)
    runs = [api.enqueue("storm", "storm", input={"steps": 8, "seconds": 0.05}) for _ in range(12)]
    workers.start(2)
    workers.start(2)
    for goal in (10, 30, 50):
        eventually(lambda goal=goal: len(workers.executions()) >= goal)
        server.end(signal.SIGKILL)
        server.start()
    eventually(lambda: ended(api, runs), 30)
    assert_all_is_well(api, runs, 8, workers)
    assert {api.run(run)["attempt"] for run in runs} == {1}
    assert len(workers.executions()) == 12 * 8, "a step that was under way was executed twice"


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_no_run_fails_and_nothing_completed_repeats_while_postgres_is_restarted(mode, crew, tmp_path):
    with an_embedded_postgres() as (embedded, conninfo), ExitStack() as ending:
        server = ServerProcess({"DATABASE_URL": conninfo, "PORT": str(free_port()), "TIDEBASE_LEASE_MS": "10000",
                                "TIDEBASE_RECONCILE_MS": "100"}, tmp_path / "server.log")
        ending.callback(server.end, signal.SIGTERM)
        server.start()
        api, workers = Api(server.url), crew(server.url)
        runs = [api.enqueue("storm", "storm", input={"steps": 8, "seconds": 0.05}) for _ in range(12)]
        workers.start(2)
        workers.start(2)
        eventually(lambda: len(workers.executions()) >= 20)
        pid = server.process.pid
        restart(embedded, mode)
        eventually(lambda: ended(api, runs), 30)
        assert_all_is_well(api, runs, 8, workers)
        assert {api.run(run)["attempt"] for run in runs} == {1}
        assert server.process.pid == pid
        assert server.process.poll() is None


# --- webhooks in flight


def channel(url: str) -> dict[str, Any]:
    return {"type": "webhook", "url": url}


def test_what_a_killed_server_had_in_flight_is_sent_by_another_within_ten_seconds(spawn_server, receiver):
    receiver.answering.clear()
    first, second = spawn_server(), spawn_server()
    api = Api(first.url)
    run = api.create(channels=[channel(receiver.url)])
    api.complete(run)
    first_id = receiver.wait_for(1)[0]["deliveryId"]
    holder = first if is_connected(first, receiver.port) else second
    holder.end(signal.SIGKILL)
    receiver.answering.set()
    assert receiver.wait_for(2, 10)[1]["deliveryId"] == first_id
    other = Api((second if holder is first else first).url)
    eventually(lambda: other.detail(run)["channelDeliveries"][0]["status"] == "delivered")
    assert other.detail(run)["channelDeliveries"][0]["attempts"] == 2


def is_connected(server: ServerProcess, port: int) -> bool:
    """Whether a server has a connection to a port of this machine, as Linux tells."""
    mine = {os.readlink(entry) for entry in Path(f"/proc/{server.process.pid}/fd").iterdir() if entry.is_symlink()}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].split(":")[1], 16) == port and f"socket:[{fields[9]}]" in mine:
            return True
    return False


def test_a_server_that_is_told_to_stop_does_not_wait_for_receivers_that_drip(spawn_server, sql):
    requests: list[bytes] = []
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            requests.append(connection.recv(65536))
            while not stop.wait(0.1):
                connection.sendall(b"H")

    with ExitStack() as ending:
        threads: list[threading.Thread] = []
        hooks = []
        for _ in range(tidebase.SEND_SLOTS):
            listener = ending.enter_context(socket.create_server(("127.0.0.1", 0)))
            hooks.append(channel(f"http://127.0.0.1:{listener.getsockname()[1]}/"))

            def accept(listener: socket.socket = listener) -> None:
                with suppress(OSError):
                    while True:
                        threads.append(threading.Thread(target=drip, args=(listener.accept()[0],)))
                        threads[-1].start()

            threading.Thread(target=accept, daemon=True).start()
            ending.callback(listener.shutdown, socket.SHUT_RDWR)
        server = spawn_server()
        api = Api(server.url)
        api.complete(api.create(channels=hooks))
        eventually(lambda: len(requests) == len(hooks))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(tidebase.DRAIN_SECONDS) == 0
        assert sql("select distinct status, attempts from tidebase.outbox") == [("pending", 0)]  # no try was over
        server.start()
        eventually(lambda: len(requests) == 2 * len(hooks))
        ids = [re.search(rb"webhook-id: (.*?)\r\n", request, re.I)[1] for request in requests]
        assert sorted(ids[:len(hooks)]) == sorted(ids[len(hooks):])
        server.end(signal.SIGKILL)
        stop.set()
        for thread in threads:
            thread.join()


def test_a_server_that_is_told_to_stop_does_not_wait_for_a_table_that_somebody_locked(spawn_server, database):
    server = spawn_server()
    with psycopg.connect(database) as other, psycopg.connect(database, autocommit=True) as onlooker:
        other.execute("lock table tidebase.outbox, tidebase.runs")
        eventually(lambda: onlooker.execute(
            "select count(*) from pg_stat_activity where datname = current_database()"
            " and cardinality(pg_blocking_pids(pid)) > 0").fetchone()[0] >= 2)  # the sender and the reconciler
        assert server.end(signal.SIGTERM) == 0
    assert "thread_left" in server.log.read_text()


def restart(embedded: tidebase.EmbeddedPostgres, mode: str) -> None:
    embedded.halt(mode)
    embedded.revive()


def test_a_second_signal_while_the_first_is_handled_ends_the_server_all_the_same(
        start_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches each of several server processes, and so does the SIGTERM of their parent, at the same time."""
    server = start_server()
    notify_all = server.stopping._cond.notify_all

    def interrupted() -> None:
        server.stop()  # as the handler of the second signal, on the same thread
        notify_all()

    monkeypatch.setattr(server.stopping._cond, "notify_all", interrupted)
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    stopping.join(10)
    hangs = stopping.is_alive()
    if hangs:
        server.stopping._cond.release()  # so that this test can end
    assert not hangs
