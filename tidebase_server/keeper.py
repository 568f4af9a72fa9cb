"""Runs PostgreSQL for as long as a server uses it: a process of its own, started by embedded.py.

Each server that uses the data holds a shared lock on one file. The system releases it however the server ends, also by
SIGKILL. This process waits for the exclusive lock: once it has it, no server uses the data, and it stops PostgreSQL. A
server that starts meanwhile waits for its shared lock until PostgreSQL has ended.

Run as  python keeper.py USERS ALIVE DATA UID GID postgres ...

    USERS      the descriptor of the file to lock
    ALIVE      a descriptor that this process keeps open until it ends, which its starter can see
    DATA       the descriptor of the folder that PostgreSQL is to inherit, or -1
    UID GID    the user and group that PostgreSQL runs as, or -1 for those of this process
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

STOP_SECONDS = 20  # for a fast shutdown, which writes a checkpoint; then PostgreSQL is stopped as if it crashed


def stop_when_unused(users: int, postgres: int) -> None:
    """Wait until no server holds the lock, then stop PostgreSQL."""
    fcntl.flock(users, fcntl.LOCK_EX)
    os.kill(postgres, signal.SIGINT)
    time.sleep(STOP_SECONDS)
    os.kill(postgres, signal.SIGQUIT)


def main(users: int, data: int, uid: int, gid: int, command: list[str]) -> None:
    """Run PostgreSQL to its end, in a process of its own; see above for the arguments."""
    if os.fork():
        os._exit(0)  # the starter goes on, and has no child to wait for
    # A service manager signals all processes of a service. The server ends then, and needs PostgreSQL until it has, so
    # the keeper does nothing. It sets handlers, since PostgreSQL would inherit signals that are ignored.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    postgres = subprocess.Popen(command, cwd="/", umask=0o077, pass_fds=[data] if data >= 0 else [],
                                **({"user": uid, "group": gid, "extra_groups": []} if uid >= 0 else {}))  # type: ignore[call-overload]
    threading.Thread(target=stop_when_unused, args=(users, postgres.pid), daemon=True).start()
    status = postgres.wait()
    os._exit(1 if status else 0)  # which releases the lock, now that PostgreSQL has ended


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6:])
