"""What all tests stand on: one real PostgreSQL, a fresh database per test, real servers, and the actors of a story.

The PostgreSQL is an embedded one, or that of DATABASE_URL. A test gets a database with the schema and no rows; what it
leaves there, and what it did to the clock, is undone.
"""

from __future__ import annotations

import fcntl
import http.client
import http.server
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psycopg
import pytest

import tidebase

ROOT = Path(__file__).resolve().parent.parent
LEASE_MS = 60_000
FOREVER_MS = 3_600_000  # a reconciler that ticks only when a test says so
# Else all processes, those of pytest among them, would compile the same modules, in every run.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Files live in memory where there is plenty: PostgreSQL makes and deletes thousands, which is dear on a disk.
MEMORY = "/dev/shm"
if ("TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 8 << 30
        and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC):  # some tests start programs that they have copied
    os.environ["TMPDIR"] = tempfile.tempdir = MEMORY


def eventually(question: Callable[[], Any], seconds: float = 15) -> Any:
    """Wait until question() is truthy, and return its answer; fail with its last answer when it does not become so."""
    deadline, rest = time.monotonic() + seconds, 0.01
    while not (answer := question()):
        if time.monotonic() > deadline:
            pytest.fail(f"not so within {seconds} s: {question}; last answer {answer!r}")
        time.sleep(rest)
        rest = min(rest * 1.3, 0.1)  # to ask costs the other tests their time
    return answer


# ------------------------------------------------------------------------------
# Database: one real Postgres; the schema applied once to a template; a fresh clone per test.
# ------------------------------------------------------------------------------
@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> Iterator[None]:
    """Settings of the machine must not reach the servers under test; DATABASE_URL is read before."""
    kept = {name: os.environ.pop(name) for name in list(os.environ)
            if name.startswith("TIDEBASE_") or name in ("HOST", "PORT", "WEB_CONCURRENCY")}
    yield
    os.environ.update(kept)


SHARED = pytest.StashKey[str]()  # a folder of all processes that run the tests


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.stash[SHARED] = config.workerinput["shared"]
    else:  # the process that starts the others, or the only one
        folder = tempfile.TemporaryDirectory(prefix="tidebase-test-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        config.stash[SHARED] = folder.name
        config.add_cleanup(start_fork_server(folder.name))
    fork_server.path = f"{config.stash[SHARED]}/{FORK_SERVER}"


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_configure_node(node: Any) -> None:
    node.workerinput["shared"] = node.config.stash[SHARED]


@pytest.fixture(scope="session")
def embedded(request: pytest.FixtureRequest) -> Iterator[tuple[tidebase.EmbeddedPostgres, str] | None]:
    """The PostgreSQL that these tests started, and its address; None where DATABASE_URL names another.

    Each process that runs tests is one of its users: the first starts it, the last stops it.
    """
    if os.environ.get("DATABASE_URL"):
        yield None
        return
    shared = Path(request.config.stash[SHARED])
    embedded = tidebase.EmbeddedPostgres(shared)
    with (shared / "tuned").open("a") as tuned:
        fcntl.flock(tuned, fcntl.LOCK_EX)
        conninfo = embedded.start()
        if not os.fstat(tuned.fileno()).st_size:
            tune(embedded, conninfo)
            tuned.write("yes")
    try:
        yield embedded, conninfo
    finally:
        embedded.stop()


@pytest.fixture(scope="session")
def postgres(embedded: tuple[tidebase.EmbeddedPostgres, str] | None) -> str:
    """The address of the PostgreSQL's maintenance database."""
    return embedded[1] if embedded else os.environ["DATABASE_URL"]


@contextmanager
def an_embedded_postgres() -> Iterator[tuple[tidebase.EmbeddedPostgres, str]]:
    """A PostgreSQL of the test's own, and its address."""
    with tempfile.TemporaryDirectory(prefix="tidebase-test-", ignore_cleanup_errors=True) as folder:
        embedded = tidebase.EmbeddedPostgres(folder)
        try:
            yield embedded, embedded.start()
        finally:
            embedded.stop()


def tune(embedded: tidebase.EmbeddedPostgres, conninfo: str) -> None:
    """Make it cheap, and start it anew."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        # Flushing to disk matters when a machine loses power, which no test does; processes may still be killed.
        connection.execute("alter system set fsync = off")
        connection.execute("alter system set full_page_writes = off")
        connection.execute("alter system set max_wal_size = '256MB'")  # its files may live in memory
        connection.execute("alter system set max_connections = 400")
        connection.execute("alter system set shared_buffers = '16MB'")  # each connection maps and unmaps them
        connection.execute("alter system set autovacuum_naptime = '5s'")
        connection.execute("alter system set log_line_prefix = '%d '")  # whose tests it was
        if connection.info.server_version >= 160_000:
            # The password is still asked for, but its hash is cheap: else it costs half the CPU time of a connection.
            connection.execute("set scram_iterations = 1")
            connection.execute(psycopg.sql.SQL("alter role current_user password {}").format(connection.info.password))
    embedded.halt()
    embedded.revive()


class Psql:
    """A connection that lasts for all tests of this process: a new one costs more than a small test's statements."""

    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        self.connection: psycopg.Connection[Any] | None = None

    def __call__(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement, or several when there are no values.  :returns: the rows."""
        if self.connection is None or self.connection.closed:  # a test may have restarted PostgreSQL
            self.connection = psycopg.connect(self.conninfo, autocommit=True, prepare_threshold=None)
            self.connection.execute(TO_EMPTY.encode())
        cursor = self.connection.execute(statement.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def to_empty(self) -> str:
        """Empty the database.  :returns: the definition of its clock."""
        return str(self("select pg_temp.to_empty()")[0][0])

    def close(self) -> None:
        if self.connection:
            self.connection.close()


def in_database(conninfo: str, name: str) -> str:
    return psycopg.conninfo.make_conninfo(conninfo, dbname=name)


@pytest.fixture(scope="session")
def migrated(postgres: str) -> Iterator[Psql]:
    """A database with the schema."""
    for conninfo in _database(postgres):
        tidebase.Database(conninfo, 2).migrate()
        psql = Psql(conninfo)
        yield psql
        psql.close()


@pytest.fixture
def empty_database(postgres: str) -> Iterator[str]:
    """The address of a database with nothing in it."""
    yield from _database(postgres)


CLOCK = "select pg_get_functiondef('tidebase.now'::regproc)"
TABLES = ("runs", "queues", "queue_tallies", "queue_claims", "queue_minutes", "workers",
          "schedules")  # the rest goes with its run
# A function of the session, whose plans are made once, in one request: every second test would pay for more.
# To delete looks each row's own up, by a plan made when there were few: many go by truncate.
TO_EMPTY = f"""
create function pg_temp.to_empty () returns text language plpgsql as $$
begin
  perform pg_terminate_backend(pid) from pg_stat_activity  -- not a server's, which the next test may go on with
    where datname = current_database() and pid <> pg_backend_pid() and application_name <> 'tidebase';
  if (select count(*) = 500 from (select from tidebase.runs limit 500) counted) then
    truncate {", ".join(f"tidebase.{table}" for table in TABLES)} cascade;
  end if;
  {" ".join(f"delete from tidebase.{table};" for table in TABLES)}
  return pg_get_functiondef('tidebase.now'::regproc);
end $$"""  # noqa: S608


@pytest.fixture
def database(migrated: Psql, clock_as_made: str) -> Iterator[str]:
    """The address of a database with the schema and no rows.

    One after the other, tests have the same: to empty it takes milliseconds, where a new one takes up to half a second.
    """
    yield migrated.conninfo
    if migrated.to_empty() != clock_as_made:  # to replace a function has all connections plan their statements anew
        migrated(clock_as_made)


@pytest.fixture(scope="session")
def clock_as_made(migrated: Psql) -> str:
    """The definition of the database's clock, before a test moves it on."""
    [(clock,)] = migrated(CLOCK)
    return str(clock)


def _database(postgres: str) -> Iterator[str]:
    name = f"tidebase_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"create database {name}")
    yield in_database(postgres, name)
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)")


@pytest.fixture
def sql(database: str, migrated: Psql) -> Psql:
    """Runs a statement in the test's database: sql("select …", value, …) -> rows."""
    return migrated


class Clock:
    """The database's clock, which is the only one that decides: tests move it on."""

    def __init__(self, psql: Psql) -> None:
        self.psql = psql
        self.ahead_ms = 0

    def advance(self, *, ms: int) -> None:
        self.ahead_ms += ms
        self.psql("create or replace function tidebase.now() returns timestamptz language sql volatile as $$ select "
                  f"date_trunc('milliseconds', clock_timestamp()) + interval '{self.ahead_ms} milliseconds' $$")


@pytest.fixture
def clock(sql: Psql) -> Clock:
    return Clock(sql)


@pytest.fixture
def blocked(sql: Psql) -> Callable[[int], None]:
    """Waits until that many connections to the test's database wait for a lock."""
    def wait(count: int) -> None:
        eventually(lambda: sql(
            "select count(*) from pg_stat_activity where datname = current_database()"
            " and cardinality(pg_blocking_pids(pid)) > 0")[0][0] >= count)

    return wait


# ------------------------------------------------------------------------------
# Servers: in this process, where a test may look inside and `responses` may stage a receiver; or as a process, to kill.
# ------------------------------------------------------------------------------
def config(**settings: Any) -> tidebase.Config:
    environment = {"PORT": "0", "TIDEBASE_LEASE_MS": str(LEASE_MS), "TIDEBASE_RECONCILE_MS": str(FOREVER_MS)}
    environment |= {name: str(value) for name, value in settings.items()}
    return tidebase.Config.from_environment(environment)


class LocalServer(tidebase.Server):
    """A server on threads of this process."""

    def __init__(self, config: tidebase.Config, conninfo: str) -> None:
        super().__init__(config, conninfo)
        self.sends, self.ticking, self.send = True, threading.Lock(), self.sender.tick
        self.sender.tick = self._send  # type: ignore[method-assign]

    def _send(self) -> int:
        with self.ticking:
            return self.send() if self.sends else 0

    def let_send(self, sends: bool) -> None:
        with self.ticking:
            self.sends = sends

    def start(self) -> LocalServer:
        self.ticked = threading.Event()
        self.thread = threading.Thread(target=self.serve, name="server-under-test")
        self.thread.start()
        assert self.prepared.wait(15)
        assert self.ticked.wait(15)  # the tick of the start is over: it must not do what the test's own tick is to do
        self.reconciler.patient_until = 0.0  # its grace after a start is a promise with a test of its own
        return self

    def _reconcile(self) -> int:
        done = super()._reconcile()
        self.ticked.set()
        return done

    def close(self) -> None:
        self.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


# The server's own and its pool's; a client's step that was given up on may still be at work in its thread.
SERVER_THREADS = ("tidebase-watcher", "tidebase-sender", "tidebase-reconciler", "tidebase-scheduler",
                  "tidebase-worker-")


def server_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(SERVER_THREADS)}


@pytest.fixture
def start_server(lasting_server: LocalServer, database: str) -> Iterator[Callable[..., LocalServer]]:
    """Starts a server of this process on the test's database: start_server(TIDEBASE_LEASE_MS=1000, …)."""
    servers: list[LocalServer] = []
    before = server_threads()

    def start(**settings: Any) -> LocalServer:
        server = LocalServer(config(**settings), database)
        servers.append(server)  # before it answers: the test may be over as soon as it does
        return server.start()

    yield start
    for server in servers:
        server.close()
    eventually(lambda: server_threads() <= before)


@contextmanager
def lasting(conninfo: str, **settings: Any) -> Iterator[LocalServer]:
    """A server for many tests, which does nothing by itself but within in_use: others share its database."""
    server = LocalServer(config(**settings), conninfo)
    server.let_send(False)
    try:
        yield server.start()
    finally:
        server.close()


@contextmanager
def in_use(server: LocalServer) -> Iterator[LocalServer]:
    """A lasting server as if it had just started; afterwards it is at rest."""
    server.reconciler.patient_until = 0.0
    server.recent_claims.by_owner.clear()  # who asked another test's queues
    server.let_send(True)
    yield server
    server.let_send(False)
    eventually(lambda: not server.watcher.long_polls and not server.sender.in_flight)


@pytest.fixture(scope="session")
def lasting_server(migrated: Psql) -> Iterator[LocalServer]:
    with lasting(migrated.conninfo) as server:
        yield server


@pytest.fixture
def server(lasting_server: LocalServer, database: str) -> Iterator[LocalServer]:
    """A server whose reconciler ticks only at api.reconcile(). Test after test has the same."""
    with in_use(lasting_server) as server:
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


FORK_SERVER = "fork-server"


def start_fork_server(folder: str) -> Callable[[], None]:
    """Start the fork server of all processes that run the tests. It imports nothing before its first order.

    :returns: what ends it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{folder}/{FORK_SERVER}")
        listener.listen()
        first = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        first.connect(listener.getsockname())
        process = subprocess.Popen([sys.executable, str(ROOT / "tests/fork_server.py")], stdin=listener)

    def end() -> None:
        first.close()
        process.wait()

    return end


class ForkServer:
    """Starts processes by fork, from one that has imported what they need: see fork_server.py."""

    path: str

    def __init__(self) -> None:
        self.orders: socket.socket | None = None

    def start(self, *arguments: str, environment: Mapping[str, str], output: int, cwd: Path | None = None,
              files: int | None = None) -> Forked:
        """Start `python ARGUMENTS`.

        :param output: a descriptor, of its standard output and error.
        :param files: how many it may have open, when it is not as many as here.
        """
        if not self.orders:
            self.orders = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.orders.connect(self.path)
        order = {"argv": arguments, "environment": dict(environment), "cwd": str(cwd or Path.cwd()),
                 "files": files}
        answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(os.devnull) as nothing:
            descriptors = [theirs.fileno(), nothing.fileno(), output, output]
            socket.send_fds(self.orders, [json.dumps(order).encode()], descriptors)
        return Forked(arguments, answers)

    def run(self, *arguments: str, environment: Mapping[str, str], cwd: Path | None = None) -> tuple[int, str]:
        """Run `python ARGUMENTS` to its end.  :returns: its exit status and all that it printed."""
        with tempfile.TemporaryFile("w+") as printed:
            status = self.start(*arguments, environment=environment, output=printed.fileno(), cwd=cwd).wait(60)
            printed.seek(0)
            return status, printed.read()

    def close(self) -> None:
        if self.orders:
            self.orders.close()


class Forked:
    """A process that a fork server started, with what is needed here of subprocess.Popen."""

    def __init__(self, arguments: Sequence[str], answers: socket.socket) -> None:
        self.arguments, self.answers = arguments, answers
        self.pid = int(answers.recv(100))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """:returns: its exit status, None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.  :returns: its exit status."""
        if self.returncode is None:
            if not select.select([self.answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
            with self.answers:
                self.returncode = int(self.answers.recv(100))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


fork_server = ForkServer()


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> Iterator[None]:
    yield
    fork_server.close()


class ServerProcess:
    """`python tidebase.py`, to be killed and started again on the same port."""

    def __init__(self, environment: dict[str, str], log: Path, files: int | None = None) -> None:
        self.files = files  # how many it may have open, when it is not as many as here
        self.environment = {**os.environ, **environment}
        self.port = int(environment["PORT"])
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.process: Forked | None = None

    def start(self, wait: bool = True) -> ServerProcess:
        with self.log.open("ab") as log:
            self.process = fork_server.start(str(ROOT / "tidebase.py"), environment=self.environment,
                                             output=log.fileno(), files=self.files)
        if wait:
            eventually(self.is_healthy, 30)
        return self

    def is_healthy(self) -> bool:
        assert self.process and self.process.poll() is None, self.log.read_text()
        try:
            return Api(self.url).get("/health").status == 200
        except OSError:
            return False

    def end(self, number: int) -> int:
        """Send a signal and wait for the end.  :returns: the exit status."""
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def spawn_server(database: str, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server process on the test's database; settings as environment variables, PORT= to choose one, files= to
    limit how many it may have open."""
    servers: list[ServerProcess] = []

    def spawn(files: int | None = None, **settings: Any) -> ServerProcess:
        environment = {"DATABASE_URL": database, "PORT": str(settings.pop("PORT", None) or free_port()),
                       "TIDEBASE_LEASE_MS": "2000", "TIDEBASE_RECONCILE_MS": "100"}
        environment |= {name: str(value) for name, value in settings.items()}
        servers.append(ServerProcess(environment, tmp_path / f"server-{len(servers)}.log", files).start())
        return servers[-1]

    yield spawn
    for server in servers:
        server.end(9)


# ------------------------------------------------------------------------------
# Actors: a client of thin verbs, which checks nothing by itself, and a receiver of webhooks.
# ------------------------------------------------------------------------------
class Answer:
    """A response: status, headers, text, and the JSON in it."""

    def __init__(self, status: int, headers: Any, raw: bytes) -> None:
        self.status, self.headers, self.text = status, headers, raw.decode()

    @cached_property  # some are of many megabytes
    def json(self) -> Any:
        return json.loads(self.text)

    def __getitem__(self, key: str) -> Any:
        assert self.status == 200, f"{self.status} {self.text[:1000]}"
        return self.json[key]

    def __repr__(self) -> str:
        return f"<{self.status} {self.text[:300]}>"


def refused(answer: Answer, status: int, code: str) -> Any:
    """Assert the one shape of refusals, and return its body."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    body = answer.json
    assert isinstance(body["error"], str)
    assert body["error"]
    assert body["code"] == code, answer
    if code == "invalid_request":
        assert body["error"] == "invalid request body"
        assert body["issues"]
        assert all(isinstance(i["path"], str) and i["message"] for i in body["issues"])
    return body


class Api:
    """Tidebase's verbs over HTTP, a connection each call so that any number of threads may share one."""

    def __init__(self, url: str, server: LocalServer | None = None, key: str | None = None) -> None:
        self.address = urllib.parse.urlsplit(url).netloc
        self.server = server
        self.headers = {"authorization": f"Bearer {key}"} if key else {}

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None,
             raw: bytes | None = None) -> Answer:
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.address, timeout=60)
        try:
            fields = {"content-type": "application/json", **self.headers, **(headers or {})}
            connection.connect()
            with suppress(ConnectionError):  # a server that refuses a body hangs up while it is sent, after its answer
                connection.request(method, path, data, fields)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Answer:
        return self.send("GET", path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return self.send("POST", path, body, **options)

    def put(self, path: str, body: Any = None, **options: Any) -> Answer:
        return self.send("PUT", path, body, **options)

    # runs
    def create(self, workflow: str = "report", **body: Any) -> str:
        return self.post(f"/runs/{workflow}", body)["run"]["id"]

    def detail(self, run: str) -> Any:
        answer = self.get(f"/runs/{run}")
        assert answer.status == 200, answer
        detail = answer.json
        del detail["run"]["why"], detail["run"]["whyDetail"]  # which tell of times: test_studio_api has them
        return detail

    def run(self, run: str) -> Any:
        """The run as verbs answer it: lists and the detail say beside why it waits."""
        shown = self.get(f"/runs/{run}?include=run")["run"]
        return {key: value for key, value in shown.items() if key not in ("why", "whyDetail")}

    def events(self, run: str) -> list[Any]:
        """The run's events, after asserting that they are numbered without gap or repeat."""
        events = self.detail(run)["events"]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        return events

    def event_types(self, run: str) -> list[str]:
        return [event["type"] for event in self.events(run)]

    def begin(self, run: str, owner: str | None = None, **body: Any) -> Answer:
        return self.post(f"/runs/{run}/begin", body or None, headers={"x-tidebase-worker": owner} if owner else {})

    def heartbeat(self, run: str, owner: str) -> Answer:
        return self.post(f"/runs/{run}/heartbeat", {"leaseOwner": owner})

    def complete(self, run: str, **body: Any) -> Answer:
        return self.post(f"/runs/{run}/complete", body)

    def fail(self, run: str, error: Any = "boom", **body: Any) -> Answer:
        return self.post(f"/runs/{run}/fail", {"error": error, **body})

    # steps
    def begin_step(self, run: str, name: str, owner: str | None = None, hash: str = "h", **body: Any) -> Answer:
        fields = {"name": name, "inputHash": hash, **({"leaseOwner": owner} if owner else {}), **body}
        return self.post(f"/runs/{run}/steps/begin", fields)

    def complete_step(self, run: str, step: str, owner: str, output: Any = None) -> Answer:
        return self.post(f"/runs/{run}/steps/{step}/complete", {"leaseOwner": owner, "output": output})

    def fail_step(self, run: str, step: str, owner: str, error: Any = "boom", **body: Any) -> Answer:
        return self.post(f"/runs/{run}/steps/{step}/fail", {"leaseOwner": owner, "error": error, **body})

    def do_step(self, run: str, name: str, owner: str, output: Any = None, **body: Any) -> str:
        """Begin and complete a step.  :returns: its id."""
        step = self.begin_step(run, name, owner, **body)["step"]["id"]
        self.complete_step(run, step, owner, output)["step"]
        return step

    # queues
    def enqueue(self, queue: str = "default", workflow: str = "report", **body: Any) -> str:
        return self.post(f"/queues/{queue}/enqueue", {"workflowName": workflow, **body})["run"]["id"]

    def claim(self, *queues: str, owner: str | None = None, **body: Any) -> list[Any]:
        fields = {"queues": list(queues) or ["default"], **({"leaseOwner": owner} if owner else {}), **body}
        return self.post("/queues/claim", fields)["runs"]

    def queue(self, name: str) -> Any:
        return next(queue for queue in self.get("/queues")["queues"] if queue["name"] == name)

    # what time brings
    def reconcile(self) -> int:
        """One tick of the server's reconciler."""
        assert self.server
        done = self.server.reconciler.tick()
        self.server.notify()
        return done


@pytest.fixture
def api(server: LocalServer) -> Api:
    return Api(server.url, server)


class Receiver:
    """A real receiver of webhooks; `answers` are the statuses it gives, the last one for good."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[int] = [200]
        self.location: str | None = None
        self.answering = threading.Event()  # cleared, it takes requests and leaves them without an answer
        self.answering.set()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status = receiver.answers.pop(0) if len(receiver.answers) > 1 else receiver.answers[0]
                receiver.requests.append((self.path, headers, body))
                receiver.answering.wait()
                self.send_response(status)
                if receiver.location:
                    self.send_header("location", receiver.location)
                self.send_header("content-length", "6")
                self.end_headers()
                self.wfile.write(b"thanks")

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), name="receiver")
        self.thread.start()

    def bodies(self) -> list[Any]:
        return [json.loads(body) for _, _, body in list(self.requests)]

    def wait_for(self, count: int, seconds: float = 15) -> list[Any]:
        eventually(lambda: len(self.requests) >= count, seconds)
        return self.bodies()

    def close(self) -> None:
        self.answering.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@contextmanager
def together(*actions: Callable[[], Any]) -> Iterator[list[Any]]:
    """Do all of these at once, from a barrier; yields their results, in order, when all are through."""
    barrier = threading.Barrier(len(actions))
    results: list[Any] = [None] * len(actions)

    def act(number: int, action: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results[number] = action()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=act, args=pair) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    yield results
