"""The embedded PostgreSQL: started without a setting, shared by the servers of one data directory, and closed to all
other users of the machine.

The data directory holds

    postgres/           PostgreSQL's own folder, 0700, with its Unix socket; there is no TCP port
    postgres.password   the password of its superuser, 0600; every connection needs it
    postgres.log        PostgreSQL's log
    postgres.users      a lock: each server that uses the data holds it shared, see keeper.py
    postgres.start      a lock: held by the one server that is starting or stopping PostgreSQL

All of these belong to the user who started the server, but for postgres/ when that is root: see programs.py. The modes
of folders that were there before are not changed.

Where the path of postgres/ is too long for a socket's address, each server has a link to it, /tmp/tidebase-*/postgres.
The server holds a lock on the folder of its link, so that the next one can tell, and remove, what a killed one left.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg

from .keeper import STOP_SECONDS
from .programs import (
    POLL_SECONDS,
    EmbeddedError,
    Identity,
    copied,
    environment,
    is_root,
    own,
    running_as,
    sync,
    system_user,
    wheel,
    write,
)

logger = logging.getLogger("tidebase.server")

KEEPER = Path(__file__).with_name("keeper.py")
PORT = "5432"  # part of the socket's name, and nothing else
LONGEST_HOST = 80  # bytes: a socket's path may have 104 or 108, by the system, and the name in it takes 14 of them
START_SECONDS = 5  # of trying to start; recovery from a crash may then take as long as it takes
ACCESS = """\
# Written by Tidebase at each start. Every connection needs the password; see postgres.password beside this folder.
local all all scram-sha-256
local replication all scram-sha-256
host all all all scram-sha-256
host replication all all scram-sha-256
"""


class EmbeddedPostgres:
    """A PostgreSQL of our own in a folder, shared by all servers that use the folder. The last of them to end stops it.
    When that one is killed, the keeper stops PostgreSQL at once."""

    def __init__(self, data_dir: str | Path) -> None:
        self.data_dir = Path(data_dir).resolve()
        self.folder = self.data_dir / "postgres"
        self.log = self.data_dir / "postgres.log"
        self._password = self.data_dir / "postgres.password"
        self._users: int | None = None  # the descriptor of postgres.users, from start to stop
        self._link: Path | None = None  # to the folder, when the folder's own path is too long for a socket
        self._link_lock: int | None = None  # the descriptor of the link's folder, which is locked

    def start(self) -> str:
        """Start it, or join the one that runs.  When this returns, it takes connections.

        :returns: the address to connect to, a URI with the password in it.
        :raises EmbeddedError: it cannot be started, or belongs to another user.
        """
        try:
            self.data_dir.mkdir(mode=0o711 if is_root() else 0o700, parents=True, exist_ok=True)
            with self._starting():
                self._users = self._open("postgres.users")
                if self._is_only_user(self._users):
                    self._stop_leftover()
                fcntl.flock(self._users, fcntl.LOCK_SH)  # waits while a keeper stops PostgreSQL after its last user
                self._ensure_running()
                conninfo = self._conninfo()
            psycopg.connect(conninfo, connect_timeout=10).close()
        except psycopg.OperationalError as error:
            self._leave()
            raise EmbeddedError(f"the PostgreSQL in {self.folder} refuses our connection: {error}. If its password is "
                                f"lost, stop it, delete {self._password}, and start again: a new one is made") from None
        except OSError as error:
            self._leave()
            raise EmbeddedError(f"TIDEBASE_DATA_DIR is {self.data_dir}, which this user cannot use: {error}") from error
        except BaseException:
            self._leave()
            raise
        return conninfo

    def revive(self) -> None:
        """Start it again if it died; do nothing if it runs.  :raises EmbeddedError: it cannot be started."""
        with self._starting():
            self._ensure_running()

    def stop(self) -> None:
        """Leave it, and stop it unless other servers use it. No data is lost either way."""
        if self._users is None:
            return
        try:
            with self._starting():
                if self._is_only_user(self._users):
                    self.halt()
                else:
                    fcntl.flock(self._users, fcntl.LOCK_SH)  # waits if it is the keeper that stops PostgreSQL just now
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
        """The number of PostgreSQL's process, None when there is none. It may be out of date after a crash."""
        try:
            return int((self.folder / "postmaster.pid").read_text().split("\n")[0])
        except (FileNotFoundError, ValueError):
            return None

    # --- who uses it

    @contextmanager
    def _starting(self) -> Iterator[None]:
        """Hold the lock of the one server that starts or stops PostgreSQL."""
        lock = self._open("postgres.start")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @staticmethod
    def _is_only_user(users: int) -> bool:
        """Whether no other server uses the data and no keeper is stopping PostgreSQL. If so, this server now holds the
        lock exclusively; else it may have lost its shared lock, which Linux releases before it tries."""
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _leave(self) -> None:
        if self._users is not None:
            os.close(self._users)
            self._users = None
        if self._link:
            shutil.rmtree(self._link.parent, ignore_errors=True)
            self._link = None
        if self._link_lock is not None:
            os.close(self._link_lock)
            self._link_lock = None

    # --- starting

    def _stop_leftover(self) -> None:
        """Stop a PostgreSQL that runs though nobody uses the data. Its server was killed together with its keeper; or
        it is of an earlier build, whose socket may be elsewhere and need no password."""
        if self._answers():
            logger.warning("stopping process %s, a PostgreSQL that was left behind in %s", self.pid(), self.folder,
                           extra={"event": "postgres_left_behind"})
            self.halt()

    def _ensure_running(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while (state := self._ping()) != psycopg.pq.Ping.OK:
            if state == psycopg.pq.Ping.REJECT:  # it recovers from a crash, however long that takes
                time.sleep(POLL_SECONDS)
                continue
            try:
                self._prepare()
                self._launch()
            except EmbeddedError:  # the processes of one that was killed may need a moment to end
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)

    def _prepare(self) -> None:
        """Make the data if there is none, and see to it that every connection needs the password."""
        if not (self.folder / "PG_VERSION").exists():
            self._password.unlink(missing_ok=True)
            self._make()
        elif is_root() and self.folder.stat().st_uid == 0:  # root copied it here
            own(self.folder, system_user())
        write(self.folder / "pg_hba.conf", ACCESS, self.folder.stat())
        if not self._password.exists():
            password = secrets.token_urlsafe(32)
            # In single-user mode, since a PostgreSQL that runs would have to let somebody in without a password.
            self._run("postgres", "--single", "-c", "exit_on_error=on", "-c", "log_min_error_statement=panic",
                      "-c", "password_encryption=scram-sha-256", last=["postgres"],
                      stdin=f"alter role postgres password '{password}'\n")
            write(self._password, password, self.data_dir.stat())
        sync(self.data_dir)

    def _make(self) -> None:
        """Make the data in full, or not at all."""
        new = self.data_dir / "postgres.new"
        shutil.rmtree(new, ignore_errors=True)  # of a start that was cut off
        new.mkdir(mode=0o700)
        if is_root():
            own(new, system_user())
        # No connection is allowed before there is a password; and texts are sorted alike on all machines.
        self._run("initdb", "--auth=reject", "--encoding=utf8", "--no-locale", "--no-instructions", "-U", "postgres",
                  folder=new)
        if self.folder.exists():  # of a start of an earlier build that was cut off
            shutil.rmtree(self.folder)
        new.rename(self.folder)

    def _launch(self) -> None:
        """Start a keeper, which starts PostgreSQL, and wait until it takes connections.

        :raises EmbeddedError: PostgreSQL ended before that; the message has the end of its log.
        """
        with ExitStack() as opened:
            def closing(descriptor: int) -> int:
                opened.callback(os.close, descriptor)
                return descriptor

            users, log = closing(self._open("postgres.users")), closing(self._open("postgres.log", os.O_APPEND))
            log_bytes = os.fstat(log).st_size
            keeper_end, keeper_alive = os.pipe()  # the keeper has the other end, which closes when the keeper ends
            closing(keeper_end)
            identity, (place, descriptors) = self._identity(), opened.enter_context(self._as_seen(self.folder))
            command = [
                str(self._programs(identity) / "postgres"), "-D", place, "-p", PORT, "-c", "listen_addresses=",
                # Relative to its folder, so that the length of the folder's path does not matter.
                "-c", "unix_socket_directories=.", "-c", "unix_socket_permissions=0700",
                "-c", "password_encryption=scram-sha-256"]
            data, (uid, gid) = (descriptors or [-1])[0], identity or (-1, -1)
            try:
                subprocess.run(
                    [sys.executable, "-I", "-S", str(KEEPER), *map(str, (users, keeper_alive, data, uid, gid)),
                     *command],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=environment(), check=False,
                    start_new_session=True, pass_fds=[users, keeper_alive, *descriptors])
            except OSError as error:
                raise EmbeddedError(f"the python that starts the embedded PostgreSQL cannot be executed: {error}"
                                    ) from error
            finally:
                os.close(keeper_alive)
            ended = select.poll()
            ended.register(keeper_end)
            while self._ping() != psycopg.pq.Ping.OK:
                if ended.poll(POLL_SECONDS * 1000) and self._ping() == psycopg.pq.Ping.NO_RESPONSE:
                    end = self.log.read_bytes()[log_bytes:][-2000:].decode(errors="replace")
                    raise EmbeddedError(f"the embedded PostgreSQL does not start; the end of {self.log}:\n{end}")

    # --- whether it runs, and where

    def _ping(self, host: str | None = None) -> psycopg.pq.Ping:
        return psycopg.pq.Ping(psycopg.pq.PGconn.ping(psycopg.conninfo.make_conninfo(
            host=host or self._host(), port=PORT, user="postgres", dbname="postgres", connect_timeout=10).encode()))

    def _answers(self) -> bool:
        """Whether it runs; also one of an earlier build, whose socket is where postmaster.pid says."""
        try:
            elsewhere = (self.folder / "postmaster.pid").read_text().split("\n")[4]
        except (FileNotFoundError, IndexError):
            elsewhere = ""
        hosts = {None, elsewhere if elsewhere.startswith("/") else None}
        return any(self._ping(host) != psycopg.pq.Ping.NO_RESPONSE for host in hosts)

    def _host(self) -> str:
        """The folder of the socket, for clients. When its path is too long, it is a link in a folder of our own."""
        if len(os.fsencode(self.folder)) <= LONGEST_HOST:
            return str(self.folder)
        if self._link is None:
            self._remove_dead_links()
            self._link = Path(tempfile.mkdtemp(prefix="tidebase-", dir="/tmp")) / "postgres"
        if not self._link.is_symlink():  # it is new, or a clean-up of /tmp took it
            self._make_link(self._link)
        return str(self._link)

    def _make_link(self, link: Path) -> None:
        link.parent.mkdir(mode=0o700, exist_ok=True)
        folder = os.open(link.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if self._link_lock is not None:
            os.close(self._link_lock)
        self._link_lock = folder
        owner = os.fstat(folder)
        if owner.st_uid != os.geteuid() or owner.st_mode & 0o077:
            raise EmbeddedError(f"{link.parent} is not ours any more: start again")
        fcntl.flock(folder, fcntl.LOCK_EX)
        link.symlink_to(self.folder)

    def _remove_dead_links(self) -> None:
        """Remove the links to our folder that killed servers left: nobody holds the lock of such a link."""
        for link in Path("/tmp").glob("tidebase-*/postgres"):
            # It may be another user's, a living server's, or gone by now.
            with suppress(PermissionError, BlockingIOError, FileNotFoundError):
                folder = os.open(link.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if os.fstat(folder).st_uid == os.geteuid() and link.is_symlink() and link.readlink() == self.folder:
                        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(link.parent)
                finally:
                    os.close(folder)

    def _conninfo(self) -> str:
        return (f"postgresql://postgres:{self._password.read_text()}@/postgres"
                f"?host={urllib.parse.quote(self._host())}&port={PORT}")

    # --- running PostgreSQL's programs

    def _identity(self) -> Identity | None:
        """The user that PostgreSQL runs as; None: this process's own."""
        if not is_root():
            return None
        folder = self.folder.stat() if self.folder.exists() else None
        return Identity(folder.st_uid, folder.st_gid) if folder and folder.st_uid else system_user()

    def _programs(self, identity: Identity | None) -> Path:
        """The folder of the programs, where this user can run them.

        :raises EmbeddedError: the data is of a version that the wheel does not have.
        """
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
             stdin: str = "") -> None:
        """Run a program on the data, to its end.  :raises EmbeddedError: it failed; the message has its output."""
        identity = self._identity()
        with self._as_seen(folder or self.folder) as (place, descriptors):
            done = subprocess.run(
                [self._programs(identity) / program, *arguments, "-D", place, *(last or [])], input=stdin, text=True,
                capture_output=True, check=False, pass_fds=descriptors, **running_as(identity))
        if done.returncode:
            raise EmbeddedError(f"{program} failed in {self.folder}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")

    @contextmanager
    def _as_seen(self, folder: Path) -> Iterator[tuple[str, list[int]]]:
        """The path by which PostgreSQL's user reaches one of its folders, and the descriptors that a program must
        inherit for it. That user may be kept out of the folders above, but can use what root has opened for it."""
        if not is_root():
            yield str(folder), []
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            yield f"/proc/self/fd/{descriptor}", [descriptor]
        finally:
            os.close(descriptor)

    def _open(self, name: str, flags: int = 0) -> int:
        """Open one of our files in the data directory; it is made if it is not there."""
        descriptor = os.open(self.data_dir / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o600)
        if is_root():  # the directory may be another user's
            owner = self.data_dir.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor
