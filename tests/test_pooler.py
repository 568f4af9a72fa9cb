"""A transaction pooler between the server and PostgreSQL: after a transaction its session is another client's, so that
what one transaction leaves in it, above all a prepared statement, must never be met by the next."""

from __future__ import annotations

import secrets
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from conftest import Api, LocalServer, config, together

from tidebase_server.database import SCHEMA, Database


class Session:
    """One end of PostgreSQL's protocol: messages of a byte for their type, their length in four bytes, and a body."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.stream = connection, connection.makefile("rb")
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a message does not wait for the next

    def receive(self, type_bytes: int = 1) -> tuple[bytes, bytes]:
        """:raises EOFError: the peer has left."""
        head = self.stream.read(type_bytes + 4)
        if len(head) < type_bytes + 4:
            raise EOFError
        return head[:type_bytes], self.stream.read(struct.unpack("!I", head[type_bytes:])[0] - 4)

    def send(self, kind: bytes, body: bytes) -> None:
        self.connection.sendall(kind + struct.pack("!I", len(body) + 4) + body)


class Client(socketserver.BaseRequestHandler):
    """A connection of a client. Its own login makes a session with PostgreSQL, which then is everybody's."""

    server: TransactionPooler
    NEITHER_TLS_NOR_GSS = (80877103, 80877104)  # what a client may ask before it begins

    def handle(self) -> None:
        try:
            client = Session(self.request)
            self.log_in(client)
            while True:
                self.transaction(client)
        except (EOFError, ConnectionError):
            pass

    def log_in(self, client: Session) -> None:
        _, startup = client.receive(type_bytes=0)
        while struct.unpack("!I", startup[:4])[0] in self.NEITHER_TLS_NOR_GSS:
            client.connection.sendall(b"N")
            _, startup = client.receive(type_bytes=0)
        session = Session(self.server.connect())
        session.send(b"", startup)
        kind = b""
        while kind != b"Z":
            kind, body = session.receive()
            if kind == b"K":  # the session's process and secret, which are this client's for one transaction only
                body = secrets.token_bytes(8)
            client.send(kind, body)
            if kind == b"R" and struct.unpack("!I", body[:4])[0] not in (0, 12):  # neither the end nor SASL's last word
                session.send(*client.receive())
        self.server.give_back(session)

    def transaction(self, client: Session) -> None:
        message = client.receive()
        if message[0] == b"X":  # the client leaves; the session stays
            raise EOFError
        session = self.server.take()
        status = b"in a transaction"
        while status != b"I":
            session.send(*message)
            if message[0] in (b"Q", b"S"):  # a query, or the end of several messages: PostgreSQL answers
                kind = b""
                while kind != b"Z":
                    kind, status = session.receive()
                    client.send(kind, status)
            if status != b"I":
                message = client.receive()
        self.server.give_back(session)


class TransactionPooler(socketserver.ThreadingTCPServer):
    """Gives each transaction the session that was free last, so that clients have one after the other the same."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, conninfo: str) -> None:
        super().__init__(("127.0.0.1", 0), Client)
        self.conninfo = psycopg.conninfo.conninfo_to_dict(conninfo)
        self.sessions: list[Session] = []
        self.one_is_free = threading.Condition()

    @property
    def client_conninfo(self) -> str:
        host, port = self.server_address[:2]
        return psycopg.conninfo.make_conninfo(**{**self.conninfo, "host": host, "port": port})

    def connect(self) -> socket.socket:
        host, port = str(self.conninfo["host"]), int(self.conninfo.get("port") or 5432)
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{host}/.s.PGSQL.{port}")
        return connection

    def take(self) -> Session:
        with self.one_is_free:
            self.one_is_free.wait_for(lambda: self.sessions)
            return self.sessions.pop()

    def give_back(self, session: Session) -> None:
        with self.one_is_free:
            self.sessions.append(session)
            self.one_is_free.notify()


@pytest.fixture
def pooler(database: str) -> Iterator[TransactionPooler]:
    with TransactionPooler(database) as pooler:
        thread = threading.Thread(target=pooler.serve_forever)
        thread.start()
        yield pooler
        pooler.shutdown()
        thread.join()
        for session in pooler.sessions:
            session.stream.close()
            session.connection.close()


def test_what_one_transaction_leaves_in_a_session_never_meets_another(pooler: TransactionPooler) -> None:
    server = LocalServer(config(TIDEBASE_POOL=3), pooler.client_conninfo).start()
    api = Api(server.url, server)

    def whole_life(name: str) -> Any:
        run = api.create(name)
        api.begin(run, name)["run"]
        api.do_step(run, f"step of {name}", name, f"output of {name}")
        api.complete(run, leaseOwner=name, result=f"result of {name}")["run"]
        detail = api.detail(run)
        return detail["run"]["result"], [step["output"] for step in detail["steps"]], api.event_types(run)

    events = ["run.created", "run.started", "step.started", "step.completed", "run.completed"]
    names = ["a", "b", "c", "d"]
    try:
        for _ in range(10):
            with together(*[lambda name=name: whole_life(name) for name in names]) as lives:
                assert lives == [(f"result of {name}", [f"output of {name}"], events) for name in names]
        assert len(pooler.sessions) > 1
    finally:
        server.close()


def prepared_statements(conninfo: str) -> int:
    """After a call that is made again and again, on one connection."""
    database = Database(conninfo, 1)
    with database.pool:
        for _ in range(20):
            database.rows("now")
        with database.connection() as connection:
            [(count,)] = connection.execute("select count(*) from pg_prepared_statements").fetchall()
    return int(count)


def test_statements_are_prepared_unless_a_pooler_stands_in_between(database: str, pooler: TransactionPooler) -> None:
    assert prepared_statements(database) == 1
    assert prepared_statements(pooler.client_conninfo) == 0


def test_a_server_at_work_lives_on_when_the_schema_is_applied_anew(database: str) -> None:
    """Its prepared statements name functions that are replaced under it."""
    server = LocalServer(config(TIDEBASE_POOL=2), database).start()
    api = Api(server.url, server)
    try:
        for number in range(20):
            if number in (10, 15):
                with psycopg.connect(database) as connection:
                    connection.execute(SCHEMA.read_bytes())
            run = api.create("w")
            api.begin(run, "owner")["run"]
            api.do_step(run, "s", "owner", number)
            assert api.complete(run, leaseOwner="owner")["run"]["status"] == "completed"
    finally:
        server.close()
