"""Server processes that share one socket."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from .database import SchemaBehind

logger = logging.getLogger("tidebase.server")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
BEHIND_STATUS = 3  # of a server process that found SchemaBehind


def on_stop(heed: Callable[..., Any]) -> None:
    """Call `heed`, as a signal handler, on SIGTERM and SIGINT."""
    for number in STOP_SIGNALS:
        signal.signal(number, heed)


class Processes:
    """Server processes that share one socket. The parent starts them, replaces each that ends by itself, and ends all
    of them on SIGTERM or SIGINT."""

    def __init__(self, serve: Callable[[], None], signals: list[int]) -> None:
        self.serve = serve  # in a process of its own
        self.signals = signals
        self.parent = os.getpid()
        self.children: set[int] = set()

    def run(self, count: int) -> None:
        """Start so many, and wait until the last has ended.  :raises SchemaBehind: the schema is too old to serve."""
        on_stop(self.stop)
        is_behind = False
        for _ in range(count):
            self.start()
        while self.children:
            child, status = os.wait()
            if child not in self.children:  # as the first process of a container it also reaps the children of others
                continue
            self.children.discard(child)
            if os.waitstatus_to_exitcode(status) == BEHIND_STATUS:
                is_behind = True
                self.stop()
            elif not self.signals:
                logger.error("a server process ended; starting another", extra={"event": "process_ended"})
                time.sleep(1)  # a process that cannot start must not be started as fast as it fails
                if not self.signals:
                    self.start()
        if is_behind:
            raise SchemaBehind

    def stop(self, number: int = signal.SIGTERM, _: Any = None) -> None:
        """End all; safe in a signal handler."""
        self.signals.append(number)
        for child in list(self.children):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    def start(self) -> None:
        """Start one process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # none between fork and the handlers of the child
        child = os.fork()
        if not child:
            self._live()
        self.children.add(child)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if self.signals:
            self.stop()

    def _live(self) -> NoReturn:
        """Serve, in the child, and exit."""
        on_stop(lambda *_: os._exit(0))  # nothing is served yet
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        status = 1
        try:
            threading.Thread(target=end_with, args=(self.parent,), name="tidebase-parent", daemon=True).start()
            self.serve()
            status = 0
        except SchemaBehind:
            status = BEHIND_STATUS
        except Exception:
            logger.exception("server process failed", extra={"event": "process_failed"})
        finally:
            os._exit(status)  # without the clean-up of the parent, such as stopping the embedded PostgreSQL


def end_with(parent: int) -> None:
    """End this server process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
