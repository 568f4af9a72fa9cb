"""The HTTP server: waitress, with one subclass of its request parser.

waitress brings what HTTP asks of a server: the parser, chunked bodies, threads, and buffers for what a slow client has
not read yet. This file has its settings, which are documented, and the subclass. The subclass decides whether a request
may have a body as soon as its head is complete, and limits what a client may send before that, and for how long.

Beside the parser three things are used of waitress beyond its documentation, each for what its settings do not give:

    Channel.write_soon                  a full disk ends one connection, and does not keep a core busy for ever
    the loop, and what waits in it      a stop lets requests finish (HttpServer.serve, drain, close)
    task_dispatcher.set_thread_count    a request that waits gets a thread of its own (HttpServer.provide_threads)

So its version is pinned, and tests/test_serving.py, test_config.py and test_queues.py hold what is needed of them.
"""

from __future__ import annotations

import logging
import resource
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import waitress.channel
import waitress.parser
import waitress.server
import waitress.wasyncore

logger = logging.getLogger("tidebase.server")

MOST_FILES = 10_240      # open files of this process; more, macOS may refuse
MAX_HEAD = 16 * 1024     # bytes of a request's head, and of the blank lines before it
MAX_CONTROL = 16 * 1024  # bytes of one chunk-size line, of all trailers, and of both beyond a quarter of the content
RECEIVE_SECONDS = 30     # for a request to be there in full, from its first byte; a connection may be idle as long
CLEANUP_SECONDS = 5      # between looks for idle connections
STREAM_BYTES = 64 * 1024  # of a stream's output may wait for a reader, then the stream waits, too


class Head(NamedTuple):
    """A request whose head is complete and whose body has not been read."""

    method: str
    target: str                    # as it was sent
    headers: Mapping[str, str]     # names as in AUTHORIZATION, values of equal names joined by a comma
    body_bytes: int | None         # None: chunked, so not known


class EarlyAnswer(NamedTuple):
    """What a request is answered with before it was read in full; its connection is closed after that."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def to_response(self, ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
        """As waitress asks it of an error."""
        return f"{self.status} {self.reason}", self.headers, self.body


class Gatekeeper(Protocol):
    """Decides about requests before their bodies are read: admission.py has one."""

    def admit(self, head: Head) -> EarlyAnswer | None:
        """Whether a body may follow.  :returns: None, or the answer instead."""

    def refuse(self, status: int, words: str) -> EarlyAnswer:
        """The answer to what cannot be read as a request; `words` say what is wrong, where the status does not."""


class Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]  # waitress brings no types
    """Reads one request. What waitress itself refuses is refused in the application's words."""

    completed: bool

    def __init__(self, adj: Any, gatekeeper: Gatekeeper, max_body: int, is_draining: Callable[[], bool]) -> None:
        super().__init__(adj)
        self.gatekeeper = gatekeeper
        self.max_body = max_body
        self.is_draining = is_draining
        self.began = time.monotonic()
        self.blank_bytes = 0
        self.body_bytes_on_wire = 0

    def received(self, data: bytes) -> int:
        """Take what a connection brought.  :returns: how many bytes of it belong to this request."""
        if self.completed:
            return 0
        blank = 0
        if not self.headers_finished and not self.header_plus:
            # waitress takes blank lines for empty requests, one after the other, however many there are.
            blank = len(data) - len(data.lstrip(b"\r\n"))
            self.blank_bytes += blank
            data = data[blank:]
        was_in_head = not self.headers_finished
        consumed = super().received(data) if data else 0
        if not was_in_head:
            self.body_bytes_on_wire += consumed
        problem = self._problem(was_in_head)
        if problem is not None:
            self.error, self.completed, self.expect_continue = problem, True, False
        return blank + consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Read the head; refuse what waitress would stumble over."""
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of a target such as http://[: it would go unanswered
            raise waitress.parser.ParsingError(str(error)) from None
        # A body with two lengths: a proxy may believe the other one, and take the rest of the body for another request.
        if (self.chunked and "CONTENT_LENGTH" in self.headers) or "TRANSFER_ENCODING" in self.headers:
            raise waitress.parser.ParsingError("Transfer-Encoding with Content-Length, or in HTTP/1.0")
        if self.is_draining():
            self.end_connection()

    def end_connection(self) -> None:
        """Have the answer say that it ends the connection, and do so, as if the client had asked for that."""
        self.headers["CONNECTION"] = "close"

    def _problem(self, was_in_head: bool) -> EarlyAnswer | None:
        if isinstance(self.error, EarlyAnswer):
            return self.error
        if self.error is not None:
            return self.gatekeeper.refuse(self.error.code, self.error.body)
        if self.blank_bytes > MAX_HEAD:
            return self.gatekeeper.refuse(400, "too many blank lines before a request")
        if (len(self.body_rcv) if self.chunked else self.content_length) > self.max_body:
            return self.gatekeeper.refuse(413, "")
        if self.chunked and self._has_too_much_control():
            return self.gatekeeper.refuse(400, "too much beside the content of a chunked body")
        if not self.completed and time.monotonic() > self.began + RECEIVE_SECONDS:  # however it drips
            return self.gatekeeper.refuse(408, "")
        if was_in_head and self.headers_finished:
            return self.gatekeeper.admit(Head(self.command, self.request_uri, self.headers,
                                              None if self.chunked else self.content_length))
        return None

    def _has_too_much_control(self) -> bool:
        """Whether chunk sizes, their extensions and trailers are more than an honest body needs: they cost far more CPU
        than content does."""
        body = self.body_rcv
        control_bytes = self.body_bytes_on_wire - len(body) - len(body.control_line)
        return (len(body.control_line) > MAX_CONTROL or len(body.trailer) > MAX_CONTROL
                or control_bytes > MAX_CONTROL + len(body) // 4)


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """A connection."""

    def write_soon(self, data: bytes) -> int:
        """Send data; what the client does not read at once is buffered, and lies in a file if it is large. When that
        cannot be written, as when the disk is full, end the connection: the buffer may have lost its beginning, and
        waitress would count wrongly what is in it, and never end."""
        try:
            return int(super().write_soon(data))
        except (OSError, MemoryError):
            self.outbufs[-1].close()
            self.will_close = True
            raise


class HttpServer:
    """A WSGI application on a listening socket."""

    def __init__(self, app: Callable[..., Any], gatekeeper: Gatekeeper, listener: socket.socket, *, threads: int,
                 max_body: int, other_files: int) -> None:
        """
        :param threads: for requests that do not wait; those that wait get further threads (`provide_threads`).
        :param max_body: bytes; a larger body is refused unread.
        :param other_files: how many files this process may have open beside its connections.
        """
        self.threads = threads
        self.listener = listener
        self.lock = threading.RLock()  # reentrant: a signal may call wake while close holds it
        self.is_draining = False
        self.closed = False
        self.channels: dict[int, Any] = {}  # all that the loop looks after, by file number
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of each request that waits for a thread
        self.waitress = waitress.server.create_server(
            app, self.channels, sockets=[listener], threads=threads, ident=None,
            clear_untrusted_proxy_headers=False,  # none of them is read here, and to clear them costs each request
            connection_limit=raise_file_limit(other_files), asyncore_use_poll=True,
            channel_timeout=RECEIVE_SECONDS, cleanup_interval=CLEANUP_SECONDS,
            channel_request_lookahead=1,  # so that it is noticed when a client that waits hangs up
            max_request_header_size=MAX_HEAD,
            max_request_body_size=1 << 62,  # it counts the control bytes of chunks as well; the Parser does not
            outbuf_high_watermark=STREAM_BYTES)

        def parser(adj: Any) -> Parser:
            return Parser(adj, gatekeeper, max_body, lambda: self.is_draining)

        self.waitress.channel_class = type("Channel", (Channel,), {"parser_class": staticmethod(parser)})

    def serve(self, stopping: threading.Event) -> None:
        """Answer requests until it is set, and `wake` called."""
        while not stopping.is_set():
            self._loop(1)

    def drain(self) -> None:
        """Take no more connections, and end each with its next answer: a client that sends request after request on it
        would keep the server from its end. To be called by the thread that calls `serve`, after it."""
        self.is_draining = True
        for channel in self.waitress.active_channels.values():
            for request in [*channel.requests, *([channel.request] if channel.request else [])]:
                request.end_connection()
        self.waitress.del_channel()  # out of the loop first: it takes a closed listener for the end of everything
        self.listener.close()

    def close(self, seconds: float) -> None:
        """Let what is under way finish and be sent, at most that long, then end."""
        deadline = time.monotonic() + seconds
        channels = self.waitress.active_channels
        while time.monotonic() < deadline and any(c.requests or c.total_outbufs_len for c in list(channels.values())):
            self._loop(0.1)
        self.waitress.task_dispatcher.shutdown(timeout=1)
        with self.lock:
            self.closed = True  # a later wake must not write to a closed trigger
        waitress.wasyncore.close_all(self.channels)

    def wake(self) -> None:
        """Have the loop look again, from any thread or a signal handler."""
        with self.lock:
            if not self.closed:
                self.waitress.pull_trigger()

    def provide_threads(self, waiting: int) -> None:
        """Have `threads` and one more for each of so many requests that wait; may be called from any thread.

        :raises RuntimeError: the machine gives no more threads.
        """
        with self.lock:
            if not self.closed:
                self.waitress.task_dispatcher.set_thread_count(self.threads + waiting)

    def _loop(self, seconds: float) -> None:
        waitress.wasyncore.loop(timeout=seconds, use_poll=True, map=self.channels, count=1)


def raise_file_limit(others: int) -> int:
    """Raise the limit on this process's open files to what it may be.

    :returns: how many connections it then has room for beside `others`; further clients wait until one leaves. To take
        in a client beyond the limit would fail, again and again.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MOST_FILES:
        wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
        with suppress(ValueError, OSError):  # the system allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    files = MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, MOST_FILES)
    # Half of the room, since a connection may need two: an answer of a megabyte or more that the client is slow to read
    # lies in a temporary file.
    return max((files - others) // 2, files // 3)
