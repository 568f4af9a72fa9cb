"""Runs PostgreSQL for as long as anybody uses it: a process of its own, started by database.py.

Each server that uses the data holds a shared lock on one file, which the system takes back however the server ends,
also by SIGKILL. This process waits for the exclusive lock: when it gets it, nobody uses the data any more, and it stops
PostgreSQL. A server that starts meanwhile waits for its shared lock until that is over.

Run as  python keeper.py LOCK ALIVE DATA UID GID postgres ...  where LOCK is the file's descriptor, ALIVE a pipe that is
closed when this process ends, DATA the descriptor of the folder that PostgreSQL is to find open, or -1, and UID and GID
are whom it runs as, or -1 for this process's own.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

STOP_SECONDS = 20  # for a fast shutdown, which writes a checkpoint; then PostgreSQL is stopped as by a crash


def stop_when_unused(lock: int, postgres: int) -> None:
    """Wait until no server holds the lock, then stop PostgreSQL."""
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.kill(postgres, signal.SIGINT)
    time.sleep(STOP_SECONDS)
    os.kill(postgres, signal.SIGQUIT)


def main(lock: int, data: int, uid: int, gid: int, command: list[str]) -> None:
    """Run PostgreSQL in a process of its own; see above for the arguments."""
    if os.fork():
        os._exit(0)  # whoever started this goes on, and has no child to look after
    # A signal to all processes of a service ends its server, which needs PostgreSQL until then. Handlers, since what is
    # ignored would be ignored by PostgreSQL, too.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    postgres = subprocess.Popen(command, cwd="/", umask=0o077, pass_fds=[data] if data >= 0 else [],
                                **({"user": uid, "group": gid, "extra_groups": []} if uid >= 0 else {}))  # type: ignore[call-overload]
    threading.Thread(target=stop_when_unused, args=(lock, postgres.pid), daemon=True).start()
    status = postgres.wait()
    os._exit(1 if status else 0)  # the locks go with this process, so only after PostgreSQL


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6:])
