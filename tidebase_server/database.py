"""Database: the schema, one pool, and one call: a function of schema.sql, one transaction."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import psycopg_pool
from msgspec import Raw

logger = logging.getLogger("tidebase.server")
SCHEMA = Path(__file__).resolve().parent.parent / "schema.sql"
SCHEMA_VERSION = 5  # what schema.sql records at its end; both are raised with every change of that file
CONNECT_SECONDS = 5
AWAY_SECONDS = 1  # while PostgreSQL is away a request waits no longer for a connection: others wait for its thread
LOCK_SECONDS = 10  # migrate waits so long for each table: whoever uses a table meanwhile waits behind it


class JsonArray(list[Raw | None]):
    """JSON texts for an argument of type json[]."""


class JsonArrayDumper(psycopg.adapt.Dumper):
    """Writes a JsonArray as PostgreSQL reads it, several times as fast as psycopg writes a list of anything."""

    oid = psycopg.adapters.types["json"].array_oid

    def dump(self, obj: JsonArray) -> bytes:
        return b"{" + b",".join(
            b"null" if text is None else b'"' + bytes(text).replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
            for text in obj) + b"}"


class RawDumper(psycopg.adapt.Dumper):
    """Writes JSON text as it is. The function that is called decides whether it is json or jsonb."""

    def dump(self, obj: Raw) -> bytes:
        return bytes(obj)


class SchemaBehind(Exception):
    """The database's schema is older than this server's, and it may not bring it up to date."""

    def __init__(self) -> None:
        super().__init__("the database's schema is older than this server's: run `python tidebase.py migrate`")


class SchemaAhead(Exception):
    """The database's schema is newer than this build's, and is left alone."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the database's schema has version {version}, newer than {SCHEMA_VERSION}, which this build "
                         "has: it is left alone; migrate with the newer build")


def is_away(error: psycopg.Error) -> bool:
    """Whether the connection was lost or the server ends, so that it is not known whether the transaction committed."""
    return isinstance(error, psycopg.OperationalError) and (
        error.sqlstate is None or error.sqlstate.startswith(("08", "57P")))


def cannot_write(error: psycopg.Error) -> bool:
    """Whether the database takes no writes now: it is away, or a standby (25006), as after a failover."""
    return is_away(error) or error.sqlstate == "25006"


def prepare_nothing_behind_a_pooler(connection: psycopg.Connection[Any]) -> None:
    """psycopg prepares a statement that a connection has executed several times, in the session. A transaction pooler
    gives each transaction any session, where the statement is missing, or another one has its name. A pooler shows
    itself: PostgreSQL says at the login which process serves the session, and a pooler cannot say that truly."""
    [(pid,)] = connection.execute("select pg_backend_pid()").fetchall()
    if pid != connection.info.backend_pid:
        connection.prepare_threshold = None


@functools.cache
def statement(function: str, names: tuple[str, ...]) -> LiteralString:
    """The SQL of a call: each argument goes to the parameter of its name, which begins with p_."""
    arguments = ", ".join(f"p_{name} => %s" for name in names)
    return f"select * from tidebase.{function}({arguments})"  # noqa: S608


class Database:
    """One pool of connections. A function of schema.sql is called by name, with named arguments, in a transaction of
    its own: by `call` or, where it answers many rows, by `rows`; what a GET asks for, within a limit of time, by `read`
    and `select`."""

    def __init__(self, conninfo: str, size: int, read_ms: int = 10_000) -> None:
        """
        :param size: connections at most.
        :param read_ms: what PostgreSQL may take for a `read` or a `select`.
        """
        # Functions answer JSON text, which is passed on: it must not be parsed.
        adapters = psycopg.adapt.AdaptersMap(psycopg.adapters)
        adapters.register_loader("json", psycopg.types.string.TextLoader)
        adapters.register_dumper(JsonArray, JsonArrayDumper)
        adapters.register_dumper(Raw, RawDumper)
        self.conninfo = conninfo
        self.read_ms = read_ms
        self.was_lost = False  # the connection that was used last
        self.pool = psycopg_pool.ConnectionPool(
            conninfo, min_size=1, max_size=size, open=False, name="tidebase",
            reconnect_timeout=CONNECT_SECONDS,  # then the next request tries anew
            max_idle=60, max_lifetime=3600, configure=prepare_nothing_behind_a_pooler,
            kwargs={
                "autocommit": True,          # a call is one statement, so one transaction in one round trip
                "context": adapters,
                "connect_timeout": CONNECT_SECONDS,
                "tcp_user_timeout": 10_000,  # a peer that vanished is noticed
                "application_name": "tidebase",
                "client_encoding": "utf8",   # whatever PGCLIENTENCODING says: JSON is passed on as the bytes that came
            },
        )
        logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)  # the reconciler logs an outage, once

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection from the pool.

        :raises psycopg.OperationalError: Postgres is away. The others in the pool are then checked, too.
        """
        try:
            with self.pool.connection(AWAY_SECONDS if self.was_lost else CONNECT_SECONDS) as connection:
                yield connection
                self.was_lost = False
        except psycopg.OperationalError as error:
            if is_away(error):
                if not isinstance(error, psycopg_pool.PoolTimeout):  # which may mean that all connections are in use
                    self.was_lost = True
                with suppress(RuntimeError):  # the machine gives no more threads: the next failure is another chance
                    threading.Thread(target=self._check_pool, name="tidebase-pool-check", daemon=True).start()
            raise

    def _check_pool(self) -> None:
        try:
            self.pool.check()
        except psycopg.Error as error:  # still away: the next request fails likewise
            logger.debug("pool check: %s", type(error).__name__, extra={"event": "pool_check_failed"})

    def reason_of(self, error: psycopg.Error) -> str:
        """Why the database cannot be used, as `error` says it, in a line. An error of the pool says only that there was
        no connection in time: then what PostgreSQL says to a new one."""
        if isinstance(error, psycopg_pool.PoolTimeout):
            try:
                psycopg.connect(self.conninfo, connect_timeout=CONNECT_SECONDS).close()
            except psycopg.Error as answer:
                error = answer
        return str(error).split("\n")[0]

    def call(self, function: str, **arguments: Any) -> tuple[str | None, int]:
        """Call a function of schema.sql, in a transaction of its own.

        :returns: the JSON text of the answer, None for SQL's null, and the HTTP status (200 unless the function gives
            another).
        :raises psycopg.Error: as raised; SQLSTATE TBnnn is a refusal.
        """
        [row] = self.rows(function, **arguments)
        return row[0], row[1] if len(row) > 1 else 200

    def rows(self, function: str, **arguments: Any) -> list[tuple[Any, ...]]:
        """Call a function of schema.sql that answers rows, likewise."""
        with self.connection() as connection:
            return connection.execute(statement(function, tuple(arguments)), tuple(arguments.values())).fetchall()

    def count(self, function: str, **arguments: Any) -> int:
        """Call a function that answers how much it did."""
        return int(self.call(function, **arguments)[0] or 0)

    def read(self, function: str, **arguments: Any) -> tuple[str | None, int]:
        """Call a function that only reads, for at most `read_ms`.

        :raises psycopg.errors.QueryCanceled: it took longer.
        """
        [row] = self.select(statement(function, tuple(arguments)), tuple(arguments.values()))
        return row[0], row[1] if len(row) > 1 else 200

    def select(self, query: LiteralString | psycopg.sql.Composed, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The rows of a query, likewise."""
        with self.connection() as connection:
            text = query if isinstance(query, str) else query.as_string(connection)
            # Both statements in one message, which is one transaction: the limit ends with it, and holds for the second
            # one, since PostgreSQL counts the time of each statement by itself. Only a ClientCursor can send two.
            cursor = psycopg.ClientCursor(connection)
            cursor.execute(f"select set_config('statement_timeout', '{self.read_ms}', true); {text}", values)
            cursor.nextset()
            return cursor.fetchall()

    def migrate(self, allowed: bool = True, by_hand: bool = False) -> bool:
        """Bring an older schema to this build's version. One of this version that another build applied is left alone,
        unless it is asked for `by_hand`: two builds side by side must not replace each other's functions in turns.

        :returns: whether anything was applied.
        :raises SchemaBehind: it is older, and `allowed` is false.
        :raises SchemaAhead: it is newer, and was asked for by hand; a server works on a newer one as it is.
        :raises psycopg.errors.LockNotAvailable: another transaction kept a table for `LOCK_SECONDS`; nothing changed.
        :raises psycopg.errors.InsufficientPrivilege: the user of `conninfo` may not change the schema.
        :raises psycopg.errors.FeatureNotSupported: the encoding of the database, or its PostgreSQL, cannot be used.
        """
        script = SCHEMA.read_text()
        digest = hashlib.sha256(script.encode()).hexdigest()

        def is_to_be_applied(connection: psycopg.Connection[Any]) -> bool:
            # to_regclass, since to select from a table that is not there would be an error.
            known = connection.execute("select to_regclass('tidebase.meta')").fetchone()
            row = known and known[0] and connection.execute("select version, digest from tidebase.meta").fetchone()
            if not row or row[0] < SCHEMA_VERSION:
                return True
            if by_hand and row[0] > SCHEMA_VERSION:
                raise SchemaAhead(row[0])
            if by_hand:
                return bool(row[1] != digest)
            if row[0] > SCHEMA_VERSION:
                logger.warning("the database's schema has version %d, newer than this server's %d: it is left alone",
                               row[0], SCHEMA_VERSION, extra={"event": "schema_newer"})
            elif row[1] not in (None, digest):  # None: psql applied it
                logger.warning("the database's schema has version %d, as this server's, but is of another build: it is "
                               "left alone; `python tidebase.py migrate` applies this one", SCHEMA_VERSION,
                               extra={"event": "schema_differs"})
            return False

        with psycopg.connect(self.conninfo, autocommit=True, connect_timeout=CONNECT_SECONDS,
                             client_encoding="utf8") as connection:
            encoding = connection.info.parameter_status("server_encoding")
            if encoding != "UTF8":
                raise psycopg.errors.FeatureNotSupported(
                    f"the database's encoding is {encoding}, which cannot hold all texts: make one with "
                    "create database NAME encoding 'UTF8' template template0")
            if not is_to_be_applied(connection):
                return False
            if not allowed:
                raise SchemaBehind
            with connection.transaction():
                connection.execute("select pg_advisory_xact_lock(hashtextextended('tidebase.schema', 0))")
                if not is_to_be_applied(connection):  # another server was faster
                    return False
                connection.execute("select set_config('lock_timeout', %s, true)", (f"{LOCK_SECONDS * 1000:.0f}",))
                try:
                    connection.execute(script.encode())
                except psycopg.errors.LockNotAvailable as error:
                    raise psycopg.errors.LockNotAvailable(
                        f"the schema was not brought up to date: another transaction keeps a table of it locked for "
                        f"more than {LOCK_SECONDS} s; see pg_stat_activity for the one that is open longest, end it, "
                        "and try again") from error
                except psycopg.errors.InsufficientPrivilege as error:
                    raise psycopg.errors.InsufficientPrivilege(
                        f"the schema was not brought up to date: {error.diag.message_primary}; run `python tidebase.py "
                        "migrate` as its owner or, the first time, as a user who may create schemas in the database"
                    ) from error
                connection.execute("update tidebase.meta set digest = %s", (digest,))
        return True
