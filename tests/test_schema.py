"""schema.sql brings any database to one shape, however often and by however many, and its indexes serve its queries.

What it leaves stands in the schema `tidebase` alone; a server refuses to work on an older one that it may not change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import conftest
import psycopg
import pytest
from conftest import ROOT, Api, LocalServer, config, fork_server, together
from psycopg.types.json import Jsonb

import tidebase
from tidebase_server import database as database_module
from tidebase_server import filters
from tidebase_server.database import SCHEMA_VERSION, Database

SCHEMA = (ROOT / "schema.sql").read_text()
PINNED = (5, "d32af55c1e5cbeab369bd8710431e69ad3dcb787a201a8286b49731731f67c2c")


def apply(conninfo: str) -> None:
    """As `psql -1 -f schema.sql` does."""
    with psycopg.connect(conninfo) as connection:
        connection.execute(SCHEMA.encode())


def query(conninfo: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        return connection.execute(statement.encode()).fetchall()


def shape(conninfo: str) -> list[tuple[Any, ...]]:
    """All that schema.sql defines, as the catalog tells it."""
    return [*query(conninfo, """
        select 'column', table_name, column_name, ordinal_position, data_type, is_nullable, column_default,
               identity_generation
          from information_schema.columns where table_schema = 'tidebase' order by 2, 4"""), *query(conninfo, """
        select 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
          from pg_constraint where connamespace = 'tidebase'::regnamespace order by 2, 3"""), *query(conninfo, """
        select 'index', tablename, indexname, indexdef from pg_indexes where schemaname = 'tidebase' order by 2, 3
        """), *query(conninfo, """
        select 'function', oid::regprocedure::text, pg_get_functiondef(oid)
          from pg_proc where pronamespace = 'tidebase'::regnamespace order by 2"""), *query(conninfo, """
        select 'table', relname, relkind::text, reloptions
          from pg_class where relnamespace = 'tidebase'::regnamespace and relkind in ('r', 'S', 'v') order by 2""")]


def names(conninfo: str) -> set[tuple[str, str]]:
    """Everything that has a name in the database, and where."""
    return set(query(conninfo, """
        select coalesce(n.nspname, ''), o.name from (
          select relnamespace as space, 'relation ' || relname as name from pg_class
          union all select pronamespace, 'function ' || proname from pg_proc
          union all select typnamespace, 'type ' || typname from pg_type
          union all select oprnamespace, 'operator ' || oprname from pg_operator
          union all select collnamespace, 'collation ' || collname from pg_collation
          union all select null, 'schema ' || nspname from pg_namespace
          union all select null, 'extension ' || extname from pg_extension
          union all select null, 'cast ' || oid from pg_cast
          union all select null, 'event trigger ' || evtname from pg_event_trigger) o
          left join pg_namespace n on n.oid = o.space"""))


def command(conninfo: str, *words: str, **settings: str) -> tuple[int, str]:
    """`python tidebase.py …` on that database, to its end.  :returns: its exit status and what it printed."""
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": conninfo, "PORT": "0", **settings}
    return fork_server.run(str(ROOT / "tidebase.py"), *words, environment=environment)


@contextmanager
def serving(conninfo: str, **settings: Any) -> Iterator[Api]:
    server = LocalServer(config(**settings), conninfo).start()
    try:
        yield Api(server.url, server)
    finally:
        server.close()


# --- one shape


def test_applied_twice_it_changes_nothing(empty_database):
    apply(empty_database)
    once = shape(empty_database)
    assert len(once) > 200
    apply(empty_database)
    assert shape(empty_database) == once


def test_applied_to_a_database_in_use_it_keeps_the_rows(empty_database):
    with serving(empty_database) as api:
        run = api.enqueue(input={"z": 1, "a": "\x00"})
        before = api.get(f"/runs/{run}").text
        apply(empty_database)
        assert api.get(f"/runs/{run}").text == before
        assert api.claim()[0]["id"] == run


def test_four_connections_at_once_leave_the_same_shape(empty_database, database):
    with together(*[lambda: apply(empty_database)] * 4):
        pass
    assert shape(empty_database) == shape(database)


def test_four_servers_that_start_at_once_on_an_empty_database_all_serve(empty_database):
    servers = [LocalServer(config(), empty_database) for _ in range(4)]
    try:
        with together(*[server.start for server in servers]):
            pass
        for server in servers:
            assert Api(server.url).get("/health")["ok"] is True
    finally:
        for server in servers:
            server.close()


def test_no_name_is_left_outside_the_schema_tidebase(empty_database):
    before = names(empty_database)
    apply(empty_database)
    new = names(empty_database) - before
    assert {space for space, _ in new} <= {"tidebase", "", "pg_toast"}
    assert {name for space, name in new if space == ""} == {"schema tidebase"}


def test_it_lives_beside_tables_of_the_same_names_and_needs_no_search_path(empty_database):
    with psycopg.connect(empty_database, autocommit=True) as connection:
        for table in ("runs", "steps", "events", "outbox", "meta", "queues"):
            connection.execute(f"create table public.{table} (mine integer)")
        connection.execute("create function public.now() returns text language sql as $$ select 'mine' $$")
        name, = connection.execute("select current_database()").fetchone()
        connection.execute(f"alter database {name} set search_path = ''")
    with serving(empty_database) as api:
        run = api.enqueue(channels=[{"type": "webhook", "url": "http://127.0.0.1:1/"}], dedupeKey="k")
        api.claim(owner="a", checkpoints=True, id="c")
        api.do_step(run, "one", "a")
        api.post("/steps", {"records": [{"runId": run, "leaseOwner": "a", "name": "r", "inputHash": "h"}]})["results"]
        api.put("/queues/default/config", {"concurrency": 1})["config"]
        api.reconcile()
        api.complete(run)["run"]
        assert api.queue("default")["completed"] == 1
        assert len(api.events(run)) == 7
        assert api.get("/runs?workflow=report")["runs"][0]["id"] == run
    assert query(empty_database, "select count(*) from public.runs") == [(0,)]


def test_no_function_keeps_state_in_the_session(empty_database):
    apply(empty_database)
    kept = query(empty_database, r"""
        select proname from pg_proc where pronamespace = 'tidebase'::regnamespace
           and (prosrc ~* '\m(set\s+(session|local)|listen|notify|pg_advisory_lock|temp\s+table)\M'
                or prosrc ~* '\mset_config\([^,]*,[^,]*,(?!\s*true\))')  -- true: until the transaction ends""")
    assert kept == []


# --- versions


def test_a_server_that_may_not_migrate_refuses_an_empty_or_older_database_and_says_what_to_do(empty_database):
    status, printed = command(empty_database, TIDEBASE_AUTO_MIGRATE="0")
    assert status == 1
    assert "python tidebase.py migrate" in printed
    assert "Traceback" not in printed
    assert query(empty_database, "select to_regclass('tidebase.meta')") == [(None,)]
    assert command(empty_database, "migrate", TIDEBASE_AUTO_MIGRATE="0") == (
        0, "The schema was brought up to date.\n")
    with serving(empty_database, TIDEBASE_AUTO_MIGRATE=0) as api:
        api.create()
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("update tidebase.meta set version = 0")
    server = LocalServer(config(TIDEBASE_AUTO_MIGRATE=0), empty_database)
    with pytest.raises(tidebase.SchemaBehind):
        server.serve()


def test_several_processes_that_may_not_migrate_end_together(empty_database):
    status, printed = command(empty_database, TIDEBASE_AUTO_MIGRATE="0", WEB_CONCURRENCY="2")
    assert status == 1
    assert "python tidebase.py migrate" in printed


def test_every_change_of_the_schema_raises_its_version() -> None:
    """A server applies schema.sql only to a database whose version is lower."""
    assert (SCHEMA_VERSION, hashlib.sha256(SCHEMA.encode()).hexdigest()) == PINNED, (
        "schema.sql has changed: raise the version by one in both places, v_version at its end and SCHEMA_VERSION in "
        "tidebase_server/database.py; then write into tests/test_schema.py\n"
        f'PINNED = ({SCHEMA_VERSION}, "{hashlib.sha256(SCHEMA.encode()).hexdigest()}")')


def test_what_schema_sql_records_is_the_version_that_servers_look_for(empty_database):
    apply(empty_database)
    assert query(empty_database, "select version, digest from tidebase.meta") == [(SCHEMA_VERSION, None)]


def test_functions_of_an_older_build_are_gone_after_an_upgrade(empty_database, database):
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
        connection.execute("""
            update tidebase.meta set version = version - 1;
            create function tidebase.heartbeat (p_run_id text, p_owner text, p_older boolean) returns json
              language sql as 'select null::json';
            create function tidebase.heartbeat (p_run_id text) returns text language sql as 'select $1';
            create procedure tidebase.once_there () language sql as '';
            drop function tidebase.get_run (text);
            create function tidebase.get_run (p_id text) returns text language sql as 'select $1'""")
    assert shape(empty_database) != shape(database)
    assert tidebase.Database(empty_database, 2).migrate() is True
    assert shape(empty_database) == shape(database)


GENERATED = """
    alter table tidebase.steps add column review_at timestamptz
      generated always as (case when status = 'manual_review' then updated_at end) stored;
    alter table tidebase.outbox add column host text generated always as
      (coalesce(lower(substring(url from '^[^:]+://(?:[^/?#]*@)?([^/?#]*)')), '')) stored"""


@pytest.mark.parametrize("columns", ["", GENERATED], ids=["without", "generated"])
def test_an_older_database_gets_the_columns_it_lacks_and_no_table_is_rewritten(empty_database, columns):
    with serving(empty_database) as api:
        api.server.let_send(False)
        run = api.create(recoveryWebhook="http://user:secret@Example.com:80/x")
        step = api.begin_step(run, "s", "a", options={"replay": "manual"})["step"]["id"]
        api.fail_step(run, step, "a", resumeDecision="manual_review")
        api.post(f"/runs/{run}/recover", {"reason": "manual"})
    shown = ("select review_at is not null, (select host from tidebase.outbox) from tidebase.steps",
             "select array[pg_relation_filenode('tidebase.steps'), pg_relation_filenode('tidebase.outbox')]")
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("alter table tidebase.steps drop column review_at;"
                           f"alter table tidebase.outbox drop column host; {columns}".encode())
    [files] = query(empty_database, shown[1])
    apply(empty_database)
    assert query(empty_database, shown[0]) == [(True, "example.com:80")]
    assert query(empty_database, shown[1]) == [files]
    with serving(empty_database) as api:
        api.post(f"/runs/{run}/steps/{step}/review", {"decision": "complete", "output": 1, "actor": "me"})
    assert query(empty_database, shown[0]) == [(False, "example.com:80")]


def test_a_schema_of_the_same_version_from_another_build_is_left_alone_but_for_migrate_by_hand(empty_database, caplog):
    command(empty_database, "migrate")
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("update tidebase.meta set digest = 'of another build'")
    for settings in ({}, {"TIDEBASE_AUTO_MIGRATE": 0}):
        caplog.clear()
        with serving(empty_database, **settings) as api:
            api.create()
        [warning] = [record for record in caplog.records if getattr(record, "event", None) == "schema_differs"]
        assert "python tidebase.py migrate" in warning.getMessage()
        assert query(empty_database, "select digest from tidebase.meta") == [("of another build",)]
    assert "brought up to date" in command(empty_database, "migrate")[1]
    caplog.clear()
    with serving(empty_database) as api:
        api.create()
    assert not [record for record in caplog.records if getattr(record, "event", "").startswith("schema_")]


def test_migrate_says_whether_there_was_something_to_do(empty_database):
    assert "brought up to date" in command(empty_database, "migrate")[1]
    assert "is up to date" in command(empty_database, "migrate")[1]
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("update tidebase.meta set digest = 'of another build'")
    assert "brought up to date" in command(empty_database, "migrate")[1]


def test_a_postgresql_that_is_too_old_is_refused_in_words_and_nothing_is_made(empty_database):
    assert SCHEMA.count("< 150000") == 1
    with psycopg.connect(empty_database) as connection, pytest.raises(
            psycopg.errors.FeatureNotSupported, match="needs PostgreSQL 15 or newer; this server is 1"):
        connection.execute(SCHEMA.replace("< 150000", "< 990000").encode())
    assert query(empty_database, "select to_regnamespace('tidebase')") == [(None,)]


def test_migrate_gives_up_with_a_reason_where_a_long_transaction_keeps_a_table(empty_database, monkeypatch):
    apply(empty_database)
    monkeypatch.setattr(database_module, "LOCK_SECONDS", 0.1)
    with psycopg.connect(empty_database) as reader:
        reader.execute("update tidebase.meta set version = 0")
        reader.commit()
        reader.execute("select from tidebase.runs")
        with pytest.raises(psycopg.errors.LockNotAvailable, match="keeps a table of it locked for more than"):
            Database(empty_database, 1).migrate()
    assert query(empty_database, "select version from tidebase.meta") == [(0,)]
    assert Database(empty_database, 1).migrate()


def test_a_database_that_cannot_hold_all_texts_is_refused_in_words(postgres):
    name = f"tidebase_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"create database {name} encoding 'LATIN1' locale 'C' template template0")
        try:
            status, printed = command(psycopg.conninfo.make_conninfo(postgres, dbname=name), "migrate")
        finally:
            connection.execute(f"drop database {name} with (force)")
    assert status == 1
    assert "encoding is LATIN1" in printed
    assert len(printed.splitlines()) == 1


def test_what_PGCLIENTENCODING_says_changes_no_text(empty_database, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    with serving(empty_database) as api:
        run = api.create(input={"text": "\u00e9\u6f22"}, metadata={"text": "\u00e9\u6f22"})
        assert api.run(run)["input"] == api.run(run)["metadata"] == {"text": "\u00e9\u6f22"}


def test_migrate_on_a_database_that_is_away_says_so_and_fails():
    status, printed = command("postgresql://nobody:hushhush@127.0.0.1:1/none", "migrate")
    assert status == 1
    assert "Traceback" not in printed
    assert "refused" in printed
    assert "hushhush" not in printed


@pytest.fixture
def poor(empty_database: str) -> Iterator[str]:
    """The address of a database for a user who may create nothing in it."""
    name = f"tidebase_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(f"create role {name} login password '{name}'")
        yield psycopg.conninfo.make_conninfo(empty_database, user=name, password=name)
        connection.execute(f"drop role {name}")


def test_a_user_who_may_not_create_the_schema_is_told_so_in_one_line_and_once(poor, caplog):
    status, printed = command(poor, "migrate")
    assert status == 1
    assert "permission denied for database" in printed
    assert len(printed.splitlines()) == 1
    server = LocalServer(config(TIDEBASE_RECONCILE_MS=10), poor)
    ticks: list[int] = []
    server._reconcile = lambda: ticks.append(1) or tidebase.Server._reconcile(server)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        conftest.eventually(lambda: len(ticks) > 3)
        conftest.refused(Api(server.url).get("/runs"), 503, "database_unavailable")
    finally:
        server.stop()
        thread.join(30)
    [told] = [record for record in caplog.records if getattr(record, "event", "") in ("tick_failed", "database_away")]
    assert "permission denied for database" in told.getMessage()
    assert told.exc_info is None


def test_the_right_that_the_documentation_names_is_all_that_a_user_needs(empty_database, poor):
    [grant] = re.findall(r"^```sql\n(grant .*?)^```", (ROOT / "docs/operating.md").read_text(), re.M | re.S)
    [database, user] = [psycopg.conninfo.conninfo_to_dict(poor)[key] for key in ("dbname", "user")]
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute(grant.replace(" shop ", f" {database} ").replace(" tidebase;", f" {user};"))
    try:
        assert "brought up to date" in command(poor, "migrate")[1]
        with serving(poor) as api:
            assert api.run(api.create())["status"] == "pending"
    finally:
        with psycopg.connect(empty_database, autocommit=True) as connection:
            connection.execute(f"drop owned by {user}")


def test_a_newer_schema_is_served_and_never_turned_back(empty_database):
    apply(empty_database)
    with psycopg.connect(empty_database, autocommit=True) as connection:
        connection.execute("update tidebase.meta set version = 999, digest = 'of a later one'")
        connection.execute("alter table tidebase.runs add column later text")
    with serving(empty_database, TIDEBASE_AUTO_MIGRATE=0) as api:
        assert api.run(api.enqueue())["status"] == "queued"
        assert api.claim()[0]["attempt"] == 1
        before = shape(empty_database)
    status, printed = command(empty_database, "migrate")
    assert status == 1
    assert "999" in printed
    assert "Traceback" not in printed
    with pytest.raises(psycopg.errors.RaiseException, match="newer"):
        apply(empty_database)
    assert shape(empty_database) == before
    assert query(empty_database, "select version, digest from tidebase.meta") == [(999, "of a later one")]


def test_a_function_that_a_newer_schema_no_longer_has_is_a_503_and_not_a_defect(empty_database):
    with serving(empty_database) as api:
        run = api.create()
        with psycopg.connect(empty_database, autocommit=True) as connection:
            connection.execute("drop function tidebase.retry_run")
        answer = api.post(f"/runs/{run}/retry")
        assert conftest.refused(answer, 503, "database_unavailable")
        assert answer.headers["retry-after"] == "1"


# --- many runs

RUNS = 60_000
CHILDREN = 5_000  # of one of them, which waits for all
SEARCHED = 4_000  # runs that one request checks where no index serves, in place of filters.SEARCHED
MAY_READ = 3_000  # rows and index entries, with those of undone versions: of a hundred runs, never of all


@pytest.fixture(scope="module")
def large(postgres: str) -> Iterator[str]:
    """A database with many runs: most ended, a quarter queued (half of them for later), a few running; every tenth has
    an event, a step and a webhook. One waits for its children, of which all but two ended."""
    for conninfo in conftest._database(postgres):
        apply(conninfo)
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("set session_replication_role = replica")  # foreign keys need no check here
            indexes = connection.execute(
                "select indexname from pg_indexes where schemaname = 'tidebase' and right(indexname, 4) = '_idx'"
            ).fetchall()
            for index, in indexes:
                connection.execute(f"drop index tidebase.{index}")
            connection.execute("""
                insert into tidebase.runs (id, workflow_name, status, queue, dedupe_key, priority, run_at, deadline_at,
                                           lease_owner, lease_expires_at, created_at, completed_at, metadata, event_seq)
                select 'run_' || lpad(n::text, 32, '0'), 'workflow' || n %% 5, status,
                       case when n %% 10 < 9 then 'queue' || n %% 3 end,
                       case when n %% 7 = 0 then 'key' || n end, n %% 3,
                       case when status = 'queued' and n %% 8 = 0 then now() + interval '1 day' else at end,
                       case when n %% 4 = 0 then at + interval '30 days' end,
                       case when status = 'running' then 'owner' || n end,
                       case when status = 'running' then now() + interval '1 hour' end,
                       at, case when status in ('completed', 'failed', 'cancelled') then at end,
                       case when n %% 1000 = 0 then jsonb_build_object('user', n) else '{}' end, 1
                  from (select n, now() - n * interval '4 seconds' as at,
                               case when n %% 10000 = 17 then 'running' when n %% 4 = 0 and n %% 10 < 9 then 'queued'
                                    when n %% 50 = 1 then 'failed' when n %% 50 = 2 then 'cancelled'
                                    else 'completed' end as status
                          from generate_series(1, %s) n) drawn""", (RUNS,))
            connection.execute("insert into tidebase.events (run_id, seq, type, payload)"
                               " select id, 1, 'run.enqueued', '{}' from tidebase.runs where id like '%5'")
            connection.execute("""
                insert into tidebase.steps (id, run_id, name, position, input_hash, contract, status)
                select 'step_' || id, id, 'one', 1, 'h', '{}', 'completed' from tidebase.runs where id like '%5'""")
            connection.execute("""
                insert into tidebase.outbox (id, kind, run_id, event_type, url, status, next_attempt_at)
                select 'rec_' || id, 'recovery', id, 'run.resume', 'http://127.0.0.1:1/',
                       case when id like '%005' then 'pending' else 'delivered' end,
                       case when id like '%005' then now() + interval '1 hour' end
                  from tidebase.runs where id like '%5'""")
            connection.execute("update tidebase.runs set parent_run_id = %s where id = any (%s)", (PARENT, FAMILY))
            connection.execute("""
                insert into tidebase.run_edges (id, parent_run_id, child_run_id, name, edge_type)
                select 'edge_' || id, %s, id, id, 'child' from unnest(%s::text[]) id""", (PARENT, FAMILY))
            connection.execute("""
                update tidebase.runs set status = 'waiting', waiting_for = %s, lease_owner = null,
                       lease_expires_at = null where id = %s""", (Jsonb({"children": FAMILY}), PARENT))
            connection.execute(SCHEMA.encode())
            connection.execute("analyze")
        yield conninfo


class Bill:
    """What a request reads: the rows it was given by sequential scans, and the entries by indexes."""

    def __init__(self, api: Api, connection: psycopg.Connection[Any]) -> None:
        self.api, self.connection = api, connection
        connection.execute("set max_parallel_workers_per_gather = 0")  # the counts are those of this one process
        self.relations = dict(connection.execute(
            "select oid, relname from pg_class where relnamespace = 'tidebase'::regnamespace and relkind in ('r', 'i')"
        ).fetchall())
        self.tables = {name for name, in connection.execute(
            "select relname from pg_class where relnamespace = 'tidebase'::regnamespace and relkind = 'r'"
            "   and reltuples > 4000").fetchall()}
        connection.commit()

    def read(self) -> dict[str, tuple[int, int]]:
        return {self.relations[oid]: (scans, rows) for oid, scans, rows in self.connection.execute(
            "select oid, pg_stat_get_xact_numscans(oid), pg_stat_get_xact_tuples_returned(oid) from pg_class"
            " where oid = any (%s)", (list(self.relations),)).fetchall()}

    def of(self, action: Callable[[], Any]) -> tuple[dict[str, int], int, Any]:
        """What an action costs when its statements are planned for good; it is undone.

        :returns: the scans of whole tables that are large, how many rows and index entries were read in all, and what
                  the action answered.
        """
        for _ in range(7):  # the sixth time a cached plan may be one for all values
            before = self.read()
            answer = action()
            after = self.read()
            self.connection.rollback()
        scans = {name: after[name][0] - before[name][0] for name in self.tables}
        return ({name: count for name, count in scans.items() if count},
                sum(after[name][1] - before[name][1] for name in after), answer)

    def later(self, days: int, verb: str, /, **arguments: Any) -> Any:
        """What a verb of the server's own loops answers so many days on; undone with the rest, the clock goes back."""
        self.connection.execute(f"""create or replace function tidebase.now() returns timestamptz language sql volatile
                                    as $$ select clock_timestamp() + interval '{days} days' $$""".encode())
        return json.loads(str(self.api.server.database.call(verb, **arguments)[0]))


@pytest.fixture(scope="module")
def bill(large: str) -> Iterator[Bill]:
    """A bill for a server on the large database whose requests all run in one transaction, never committed."""
    server = LocalServer(config(), large).start()
    with psycopg.connect(large, context=server.database.pool.kwargs["context"]) as connection:
        pooled = server.database.connection

        @contextmanager
        def observed() -> Iterator[psycopg.Connection[Any]]:
            if threading.current_thread().name.startswith("tidebase-"):
                with pooled() as other:
                    yield other
            else:
                yield connection

        server.database.connection = observed  # type: ignore[method-assign]
        yield Bill(Api(server.url, server), connection)
    server.close()


def numbered(number: int) -> str:
    return f"run_{number:032}"


QUEUED, DONE, FAILED, RUNNING = numbered(4 * 1001), numbered(55), numbered(51), numbered(17)
PARENT, LIVE = numbered(10_017), [numbered(4 * 12_001), numbered(4 * 12_002)]
FAMILY = [numbered(4 * number + 7) for number in range(CHILDREN)] + LIVE
REQUESTS: dict[str, tuple[int | None, Callable[[Bill, Api], Any]]] = {
    # what it does: (how many runs or webhooks it finds, how it is done)
    "a claim": (1, lambda bill, api: api.claim("queue1")),
    "a claim of a hundred": (100, lambda bill, api: api.claim("queue1", "queue0", limit=100, checkpoints=True)),
    "a claim of an empty queue": (0, lambda bill, api: api.claim("nowhere")),
    "a claim for some workflows": (3, lambda bill, api: api.claim(
        "queue1", limit=3, workflows=["workflow3", "workflow1", "nothing"])),
    "a claim for workflows that have no run": (0, lambda bill, api: api.claim("queue1", workflows=["nothing", "none"])),
    "a repeated claim": (1, lambda bill, api: [api.claim("queue1", owner="a", id="c") for _ in range(2)][1]),
    "a claim within caps": (1, lambda bill, api: (
        api.put("/queues/queue1/config", {"concurrency": 500, "ratePerMinute": 500})["config"],
        api.claim("queue1"))[1]),
    "a claim at a cap": (0, lambda bill, api: (
        api.put("/queues/queue1/config", {"concurrency": 1})["config"], api.claim("queue1"))[1]),
    "an enqueue with a dedupe key": (None, lambda bill, api: api.enqueue("queue1", dedupeKey="key7")),
    "the detail of a run": (None, lambda bill, api: api.detail(DONE)),
    "a part of it": (None, lambda bill, api: api.get(f"/runs/{DONE}?include=run")["run"]),
    "a begin, a step and the end": (None, lambda bill, api: (
        api.begin(QUEUED, "a")["run"], api.do_step(QUEUED, "two", "a"), api.complete(QUEUED, leaseOwner="a")["run"])),
    "a failure": (None, lambda bill, api: api.fail(RUNNING, retryable=False)["run"]),
    "a cancellation": (None, lambda bill, api: api.post(f"/runs/{QUEUED}/cancel")["run"]),
    "a retry": (None, lambda bill, api: api.post(f"/runs/{FAILED}/retry")["run"]),
    "a heartbeat of many": (1, lambda bill, api: api.post("/heartbeats", {"runs": [
        {"id": RUNNING, "leaseOwner": "owner17"}]})["results"]),
    "a record of many": (1, lambda bill, api: api.post("/steps", {"records": [
        {"runId": RUNNING, "leaseOwner": "owner17", "name": "r", "inputHash": "h"}]})["results"]),
    "writes of all kinds": (5, lambda bill, api: api.post("/writes", {"writes": [
        {"do": "record_step", "runId": RUNNING, "leaseOwner": "owner17", "name": "r", "inputHash": "h"},
        {"do": "record_step", "runId": RUNNING, "leaseOwner": "owner17", "name": "s", "inputHash": "h"},
        {"do": "create_child", "runId": RUNNING, "name": "c", "workflowName": "w", "queue": "queue1"},
        {"do": "complete_run", "runId": RUNNING, "leaseOwner": "owner17"},
        {"do": "enqueue_run", "queue": "queue1", "workflowName": "w", "dedupeKey": "key7"}]})["results"]),
    "a look for those who wait": (None, lambda bill, api: bill.later(
        0, "watch", queues=["queue1", "queue2", "queue1"], workflows='[null, null, ["workflow3", "nothing"]]', limit=9,
        run_ids=[RUNNING])),
    "the end of one of many children": (None, lambda bill, api: (
        api.begin(LIVE[0], "a")["run"], api.complete(LIVE[0], leaseOwner="a")["run"])),
    "the newest runs": (100, lambda bill, api: api.get("/runs")["runs"]),
    "the next page of them": (100, lambda bill, api: api.get(
        "/runs?before=" + api.get("/runs?limit=50")["nextCursor"])["runs"]),
    "the runs of a workflow": (100, lambda bill, api: api.get("/runs?workflow=workflow3")["runs"]),
    "the runs of no workflow": (0, lambda bill, api: api.get("/runs?workflow=nothing")["runs"]),
    "the runs of a queue": (100, lambda bill, api: api.get("/runs?queue=queue2")["runs"]),
    "the runs of a status": (100, lambda bill, api: api.get("/runs?status=failed")["runs"]),
    "the runs of a rare status": (5, lambda bill, api: api.get("/runs?status=running")["runs"]),
    "the runs that completed": (100, lambda bill, api: api.get("/runs?status=completed")["runs"]),
    "the runs of some metadata": (1, lambda bill, api: api.get("/runs?metadata.user=5000")["runs"]),
    "the runs of no metadata": (0, lambda bill, api: api.get("/runs?metadata.nothing=1")["runs"]),
    "the runs of two statuses": (100, lambda bill, api: api.get("/runs?status=failed,cancelled&view=light")["runs"]),
    "the runs of a workflow and a status": (100, lambda bill, api: api.get("/runs?workflow=workflow1&status=failed")[
        "runs"]),
    "the live runs of a queue": (100, lambda bill, api: api.get("/runs?queue=queue1&status=running,queued")["runs"]),
    "the runs that completed of a workflow": (100, lambda bill, api: api.get(
        "/runs?workflow=workflow3&status=completed")["runs"]),
    "the runs that ended last": (100, lambda bill, api: api.get("/runs?sort=ended&view=light")["runs"]),
    "the oldest runs": (100, lambda bill, api: api.get("/runs?sort=oldest")["runs"]),
    "a run by its id": (1, lambda bill, api: api.get(f"/runs?text={DONE}&view=light")["runs"]),
    "children": (100, lambda bill, api: api.get(f"/runs?parent={LIVE[0]}&limit=100")["runs"] + [None] * 100),
    "what changed on a page": (100, lambda bill, api: api.post("/changes", {"query": "status=queued"})["ids"]),
    "approvals": (0, lambda bill, api: api.get("/approvals")["items"]),
    "workers": (None, lambda bill, api: api.get("/workers")["workers"]),
    "the summary of a run": (None, lambda bill, api: api.get(f"/runs/{DONE}/summary")["run"]),
    "its steps": (1, lambda bill, api: api.get(f"/runs/{DONE}/steps")["steps"]),
    "its events": (1, lambda bill, api: api.get(
        f"/runs/{DONE}/events?view=light&limit=100", headers={"accept": "application/json"}).json),
    "its deliveries": (1, lambda bill, api: api.get(f"/runs/{DONE}/deliveries")["deliveries"]),
    "its tree": (1, lambda bill, api: api.get(f"/runs/{DONE}/tree")["runs"]),
    "its usage": (0, lambda bill, api: api.get(f"/runs/{DONE}/usage?subtree=true")["usage"]),
    "its state's versions": (0, lambda bill, api: api.get(f"/runs/{DONE}/state/versions?view=light")["stateVersions"]),
    "its rerun plan": (1, lambda bill, api: api.get(f"/runs/{DONE}/rerun")["steps"]),
    "a payload": (None, lambda bill, api: api.get(f"/runs/{DONE}/payload?of=input").text),
    "the minutes of a queue": (60, lambda bill, api: api.get("/queues/queue1/minutes")["minutes"]),
    "expired leases": (5, lambda bill, api: bill.later(1, "expire_leases", limit=100)),
    "passed deadlines": (100, lambda bill, api: bill.later(29, "cancel_overdue", limit=100)),
    "what is forgotten": (100, lambda bill, api: bill.later(40, "purge_runs", days=30, limit=100)),
    "the runs of a failure class": (0, lambda bill, api: api.get("/runs?failureClass=nothing")["runs"]),
    "the runs of sixteen metadata": (0, lambda bill, api: api.get(
        "/runs?" + "&".join(f"metadata.k{n}={n}" for n in range(16)))["runs"]),
    "offers of push queues": (100, lambda bill, api: (
        api.put("/queues/queue1/config", {"invokeUrl": "http://127.0.0.1:1/", "concurrency": 200})["config"],
        bill.later(0, "offer_runs", limit=100))[1]),
    "deliveries": (8, lambda bill, api: bill.later(
        1, "claim_webhooks", limit=8, hold_ms=1000, per_host=8, in_flight=[], after="")["webhooks"]),
    "deliveries beside a host whose slots are taken": (0, lambda bill, api: bill.later(
        1, "claim_webhooks", limit=8, hold_ms=1000, per_host=2, after="",
        in_flight=["rec_" + numbered(1005), "rec_" + numbered(2005)])["webhooks"]),
    "the settling of a delivery": (None, lambda bill, api: bill.later(
        0, "settle_webhook", id="rec_" + numbered(1005), attempt=0, delivered=True, retryable=False, http_status=200,
        response="", error=None)),
}


BOUNDED: dict[str, Callable[[Api], Any]] = {
    "counts": lambda api: api.get("/counts"),
    "counts of a workflow": lambda api: api.get("/counts?workflow=workflow1"),
    "counts of a queue and a workflow": lambda api: api.get("/counts?workflow=workflow1&queue=queue1"),
    "a search for what no error holds": lambda api: api.get("/runs?text=nowhere"),
    "errors of a workflow in a queue": lambda api: api.get("/runs?workflow=workflow1&queue=queue2&errors=true"),
}


def test_with_many_runs_no_request_scans_a_table(bill, monkeypatch):
    """One test, because the large database takes longer to make than all requests together."""
    monkeypatch.setattr(filters, "SEARCHED", SEARCHED)
    faults: dict[str, Any] = {}
    for name, (count, request) in REQUESTS.items():
        scans, read, found = bill.of(lambda request=request: request(bill, bill.api))
        expected = count is None or count == (found if isinstance(found, int) else len(found))
        if not expected or scans or read >= MAY_READ:
            faults[name] = scans, read, found
    for name, ask in BOUNDED.items():
        scans, read, answer = bill.of(lambda ask=ask: ask(bill.api))
        # An entry and its row; where the search ended is looked up once more.
        if answer.status != 200 or scans or read >= 3 * 7 * SEARCHED:
            faults[name] = scans, read, answer.status
    assert faults == {}
    statement = "select count(*) from tidebase.runs where result is not null"
    scans, read, _ = bill.of(lambda: bill.connection.execute(statement))
    assert scans["runs"] >= 1, "the bill does not see a scan"
    assert read >= RUNS


def test_a_tree_is_read_by_keys_however_small_the_tables_were_when_it_was_planned(database):
    add = ("with made as (insert into tidebase.runs (id, workflow_name, status, queue, run_at)"
           " select 'run_' || n, 'w', 'queued', 'q', now() from generate_series({}, {}) n returning id)"
           " insert into tidebase.run_edges (id, parent_run_id, child_run_id, name, edge_type)"
           " select 'edge_' || id, 'run_{}', id, id, 'child' from made")
    read = ("select sum(pg_stat_get_xact_tuples_returned(oid)) from pg_class"
            " where relnamespace = 'tidebase'::regnamespace")
    with psycopg.connect(database) as connection:
        connection.execute("insert into tidebase.runs (id, workflow_name, status) values ('run_0', 'w', 'pending'),"
                           " ('run_x', 'w', 'pending')")
        connection.execute(add.format(1, 20, "0").encode())
        connection.execute(add.format(21, 300, "x").encode())
        for _ in range(7):  # from the sixth call on, its plan is kept
            [(tree,)] = connection.execute("select tidebase.run_tree('run_0', 100, '{}')").fetchall()
        connection.execute(add.format(301, 5000, "x").encode())
        [(before,)] = connection.execute(read).fetchall()
        connection.execute("select tidebase.run_tree('run_0', 100, '{}')")
        [(after,)] = connection.execute(read).fetchall()
    assert len(tree["runs"]) == 21
    assert after - before < 1000
