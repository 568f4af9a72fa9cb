"""Starts processes for the tests by fork, from one that has imported what they need, which costs ten times the rest.

Run as `fork_server.py` with a listening Unix socket as its standard input; its first client is the process that started
it. Each message of a client orders one process: JSON {"argv": [...], "environment": {...}, "cwd": ..., "files": how
many it may have open or null}, together with four descriptors: a socket, and the process's standard input, output and
error. The socket first tells the process's id, then its exit status as subprocess has it. argv is that of `python`:
tidebase.py, another file, -m and a module, or -c and code.

A process that is started here differs from one of `python ARGV` in nothing that a test may look at: it has its own
environment, signals, limits and descriptors, no module of ours that it does not import by itself, and no thread but its
first. When a client closes its socket, all that it ordered are killed; when the first one does, all ends.
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
OURS = ("tidebase", "tidebase_server", "tidebase_sdk")
sys.path[0] = str(ROOT)


def load() -> None:
    """Import what the processes need."""
    import fastapi  # noqa: F401
    import uvicorn.lifespan.on
    import uvicorn.loops.auto
    import uvicorn.main
    import uvicorn.protocols.http.auto
    import uvicorn.protocols.websockets.auto  # noqa: F401

    import tidebase  # noqa: F401
    import tidebase_server.embedded

    tidebase_server.embedded.wheel()  # imported when it is needed, which tests of the embedded PostgreSQL need
    gc.freeze()  # else a collection in each process copies all of this one's memory


class Client:
    """A process that orders others, and those that it ordered which still run: the sockets that tell of their end."""

    def __init__(self, orders: socket.socket) -> None:
        self.orders = orders
        self.running: dict[int, socket.socket] = {}

    def close(self) -> None:
        self.orders.close()
        for pid in self.running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.running.clear()


def serve() -> tuple[dict[str, Any], list[int]] | None:
    """Fork a process for each order.  :returns: in that process, its order and its standard descriptors; else None."""
    listener = socket.socket(fileno=os.dup(0))
    clients: list[Client] = []
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ, (None, None))
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    clients.append(Client(listener.accept()[0]))
                    selector.register(clients[-1].orders, selectors.EVENT_READ, (clients[-1], None))
                    continue
                client, pid = key.data
                if pid:  # it has ended
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    if pid in client.running:
                        with client.running.pop(pid) as answers:
                            tell(answers, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                    continue
                message, descriptors, *_ = socket.recv_fds(client.orders, 1 << 20, 4)
                if not message:
                    if client is clients[0]:
                        for each in clients:
                            each.close()
                        return None
                    selector.unregister(client.orders)
                    client.close()
                    continue
                if "tidebase" not in sys.modules:
                    load()
                if not (pid := os.fork()):
                    return json.loads(message), descriptors[1:]
                client.running[pid] = socket.socket(fileno=descriptors[0])
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (client, pid))
                tell(client.running[pid], pid)


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
    if Path(program) == ROOT / "tidebase.py":
        import tidebase

        return tidebase.main()
    for name in list(sys.modules):
        if name.split(".")[0] in OURS:  # programs may have other modules of these names beside them
            del sys.modules[name]
    folder = str(Path(program).resolve().parent) if program not in ("-c", "-m") else order["cwd"]
    sys.path[0:1] = [folder, *filter(None, order["environment"].get("PYTHONPATH", "").split(os.pathsep))]
    if program == "-c":
        exec(compile(sys.argv.pop(1), "<string>", "exec"), {"__name__": "__main__"})
    elif program == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    if started := serve():
        become(*started)
