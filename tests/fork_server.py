"""Starts processes for the tests by fork, from one that has imported Tidebase: the import costs ten times the rest.

Run as `fork_server.py` with one end of a Unix socket as its standard input. Each message on it orders one process:
JSON {"argv": [...], "environment": {...}, "cwd": ..., "files": how many it may have open or null}, together with four
descriptors: a socket, and the process's standard input, output and error. The socket first tells the process's id, then
its exit status as subprocess has it. argv is that of `python`: tidebase.py, another file, or -c and code.

A process that is started here differs from one of `python ARGV` in nothing that a test may look at: it has its own
environment, signals, limits and descriptors, and no thread but its first. When the socket is closed, all are killed.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
import tidebase  # noqa: E402
import tidebase_server.embedded  # noqa: E402

tidebase_server.embedded.wheel()  # imported when it is needed, which tests of the embedded PostgreSQL need


def serve() -> tuple[dict[str, Any], list[int]] | None:
    """Fork a process for each order.  :returns: in that process, its order and its standard descriptors; else None."""
    orders = socket.socket(fileno=os.dup(0))
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not orders:  # a process has ended
                    _, status = os.waitpid(key.data, 0)
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    with running.pop(key.data) as answers:
                        tell(answers, os.waitstatus_to_exitcode(status))
                    continue
                message, descriptors, *_ = socket.recv_fds(orders, 1 << 20, 4)
                if not message:
                    for pid in running:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    return None
                if not (pid := os.fork()):
                    return json.loads(message), descriptors[1:]
                running[pid] = socket.socket(fileno=descriptors[0])
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                tell(running[pid], pid)


def tell(answers: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody wants to know any more
        answers.send(str(number).encode())


def become(order: dict[str, Any], standard: list[int]) -> None:
    """Do in this process what `python ARGV` does."""
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if order["files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["files"], order["files"]))
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    program, *sys.argv[1:] = order["argv"]
    sys.argv[0] = program
    if program == "-c":
        del sys.argv[1]
        exec(compile(order["argv"][1], "<string>", "exec"), {"__name__": "__main__"})
    elif Path(program) == ROOT / "tidebase.py":
        tidebase.main()
    else:
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    gc.freeze()  # else a collection in each process copies all of this one's memory
    if started := serve():
        become(*started)
