"""A server's HTTP connections: waitress, made to do a few things otherwise.

waitress brings what HTTP asks of a server: the parser, chunked bodies, what a slow client is still to be sent, the
threads. Three things are done otherwise here:

    - What waitress itself would refuse is refused in the protocol's words.
    - Not its main loop reads from the connections, but two threads that go on to answer what they have read: a request
      is answered without a change of threads.
    - Small writes that come at the same time are handed to the app together, for one commit.

Tidebase's own part of it, which requests those are and what becomes of them, is an `App`. This file knows nothing of
runs or of PostgreSQL, and leans on parts of waitress that it does not promise to keep, so its version is pinned.
"""

from __future__ import annotations

import http
import logging
import resource
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import waitress.channel
import waitress.parser
import waitress.server
import waitress.task

logger = logging.getLogger("tidebase.server")

Reply = tuple[str, int, dict[str, str]]  # body, status and headers, as a Flask view may return them
Later = Callable[[], Reply]              # never raises
Small = Any                              # a small write, as `offer` makes it and `write` takes it

READ_BYTES = 65_536  # at once
ONE_SHOT = 1 << 30   # Linux's EPOLLONESHOT
MOST_FILES = 10_240  # more, macOS may refuse


class App(Protocol):
    """What answers the requests."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """A request by way of WSGI, in a thread that has nothing else to do."""

    def offer(self, request: Any, is_gone: Callable[[], bool]) -> tuple[Later, Small | None] | None:
        """A request that was just read, in a thread that others wait for.

        :returns: what answers it; and, of a small write, what may be written together with others instead. None when
            the request is for WSGI.
        """

    def write(self, small: list[Small]) -> Sequence[Reply | None]:
        """Write these together; never raises.

        :returns: their answers; None for those that are to be answered alone, later.
        """

    def refuse(self, status: int, words: str) -> Reply:
        """What waitress refuses before anything else sees it."""


# ------------------------------------------------------------------------------
# A request and its answer.
# ------------------------------------------------------------------------------
class Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]  # waitress brings no types
    """Refuses what waitress' own would stumble over."""

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of a target such as http://[: it would go unanswered
            raise waitress.parser.ParsingError(str(error)) from None
        # Two lengths of one body: whoever is in front may believe the other, and take the rest for another request.
        if (self.chunked and "CONTENT_LENGTH" in self.headers) or "TRANSFER_ENCODING" in self.headers:
            raise waitress.parser.ParsingError("Transfer-Encoding with Content-Length, or in HTTP/1.0")


class RefusalTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """A request that waitress refuses."""

    def execute(self) -> None:
        self.response_headers.append(("Connection", "close"))
        self.close_on_finish = True
        send(self, self.channel.http.app.refuse(self.request.error.code, self.request.error.body))


class ReadyTask(waitress.task.Task):  # type: ignore[misc]
    """A request past WSGI."""

    complete = True

    def execute(self) -> None:
        send(self, self.channel.ready())


def send(task: waitress.task.Task, answer: Reply) -> None:
    """Send an answer at once: head and body apart would wake the client twice."""
    text, status, headers = answer
    data = text.encode()
    task.status = f"{status} {http.HTTPStatus(status).phrase}"
    task.response_headers.extend(headers.items())
    task.content_length = len(data)
    head = task.build_response_header()
    task.wrote_header = True
    task.channel.write_soon(head + data)


# ------------------------------------------------------------------------------
# A connection.
# ------------------------------------------------------------------------------
class Quiet:
    """What a Channel sees of waitress' server: the Door looks for itself which requests are there, and the main loop is
    woken only for what could not be sent at once, and to close."""

    def __init__(self, server: Any, channel: Channel) -> None:
        self.server = server
        self.channel = weakref.ref(channel)  # which has this one: what it received is to go as soon as it goes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)

    def add_task(self, channel: Channel) -> None:
        """Nothing: see Channel.read and Channel.service."""

    def pull_trigger(self) -> None:
        channel = self.channel()
        if channel and channel.writable():
            self.server.http.wake()


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """A connection. The Door reads from it; what its client is slow to take, waitress' main loop sends."""

    error_task_class = RefusalTask
    parser_class = Parser
    request: Parser | None  # that came in part

    def __init__(self, server: Any, *arguments: Any, **options: Any) -> None:
        self.http: HttpServer = server.http
        self.ready: Later | None = None  # what answers the request that was read; none: WSGI does
        self.is_left = False  # no thread has it, and the Door does not watch it yet
        super().__init__(Quiet(server, self), *arguments, **options)
        self.http.door.watch(self)

    @property
    def task_class(self) -> type[waitress.task.Task]:
        return ReadyTask if self.ready else waitress.task.WSGITask

    def readable(self) -> bool:
        return False

    def check_client_disconnected(self) -> bool:
        connection = self.socket  # which another thread may take away
        if not self.connected or connection is None:
            return True
        try:
            return len(connection.recv(1, socket.MSG_PEEK)) == 0
        except BlockingIOError:
            return False
        except OSError:
            return True

    def read(self) -> bool:
        """Read what has come.  :returns: whether there is a whole request now; else the Door goes on watching."""
        connection = self.socket
        if self.http.draining or self.writable() or connection is None:
            self._leave()
            return False
        try:
            data = connection.recv(READ_BYTES)
        except BlockingIOError:
            self._leave()
            return False
        except OSError:
            data = b""
        if not data:
            self.end()
            self._leave()
            return False
        self.last_activity = time.time()
        self.received(data)
        if self.requests:
            return True
        self._leave()
        return False

    def offer(self) -> Small | None:
        """Take the first request past WSGI, if the app wants that.  :returns: it, if it is a small write."""
        request = self.requests[0]
        taken = None if request.error else self.http.app.offer(request, self.check_client_disconnected)
        self.ready, small = taken or (None, None)
        return small

    def end(self) -> None:
        """Have the main loop close it."""
        self.will_close = True
        self.http.wake()

    def fail(self) -> None:
        """End it, for the error at hand: a defect costs one client its connection, not the others their answers."""
        logger.exception("request failed", extra={"event": "request_failed"})
        self.end()
        self._leave()

    def answer(self, known: Reply) -> None:
        """Answer the first request; as a task, if more wait behind it: the client may have to read some first."""
        self.ready = lambda: known
        if len(self.requests) > 1:
            self.http.add_task(self)
        else:
            self.service()

    def service(self) -> None:
        """Answer the first request that was read."""
        super().service()
        self.ready = None
        if self.requests:
            self.http.add_task(self)
        else:
            self._leave()

    def handle_write(self) -> None:
        super().handle_write()
        self._be_watched()

    def _leave(self) -> None:
        self.is_left = True
        self._be_watched()

    def _be_watched(self) -> None:
        """Have the Door watch for more, unless something must be sent first: then the main loop comes here again."""
        with self.outbuf_lock:  # it must not be closed meanwhile, and its number be another's
            if self.is_left and not self.connected:
                self._discard()
            elif self.is_left and not self.writable() and not self.http.draining:
                self.is_left = False
                self.http.door.watch(self)

    def _discard(self) -> None:
        """Of a request that came in part, what is large is in a file."""
        if self.request:
            self.request.close()
            self.request = None

    def handle_close(self) -> None:
        """Close it. Only the main loop does: it may be going through the list of all, and others must not be at it."""
        if threading.get_ident() != self.http.keeper:
            self.end()
            return
        with self.outbuf_lock:
            if self.http.door.forget(self) or self.is_left:
                self._discard()  # else a thread is working on it, and discards it when it leaves
            super().handle_close()


# ------------------------------------------------------------------------------
# All connections: who watches them, and what goes together.
# ------------------------------------------------------------------------------
class Poll:
    """What the Door needs of Linux's epoll, for platforms that have none."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.lock = threading.Lock()
        self.bell = socket.socketpair()  # rung when the numbers change
        for end in self.bell:
            end.setblocking(False)

    def register(self, number: int, events: int) -> None:
        with self.lock:
            self.numbers[number] = events
        with suppress(BlockingIOError):  # it rings already
            self.bell[1].send(b".")

    modify = register

    def poll(self) -> list[tuple[int, int]]:
        while True:
            poll = select.poll()
            poll.register(self.bell[0], select.POLLIN)
            for number in list(self.numbers):
                poll.register(number, select.POLLIN)
            events = dict(poll.poll())
            if events.pop(self.bell[0].fileno(), None):
                with suppress(BlockingIOError):  # another thread was faster
                    self.bell[0].recv(READ_BYTES)
            with self.lock:
                ready = [(number, event) for number, event in events.items() if number in self.numbers]
                for number, _ in ready:
                    if self.numbers[number] & ONE_SHOT:
                        del self.numbers[number]
            if ready:
                return ready

    def close(self) -> None:
        for end in self.bell:
            end.close()


class Door:
    """Where requests come in.

    Two threads watch the connections. One that sees something goes to work on it, and the other stays; then it comes
    back, or goes to the threads that wait for tasks if two are here already. So a single client is answered without a
    change of threads, and many without the main loop.

    Small writes that come while others are being committed go together in the next transaction. With 32 clients
    PostgreSQL spends less than half on each, and this process, which has one core, a third less.
    """

    WATCHERS = 2
    LANES = 2  # transactions of small writes under way at once: with one, 8 clients are a tenth slower, and 32 as fast
    PATIENCE_SECONDS = 0.005  # for a lane, then without one: where commits take long, more of them at once are faster

    def __init__(self, http: HttpServer) -> None:
        self.http = http
        self.poll = select.epoll() if hasattr(select, "epoll") else Poll()
        self.end = socket.socketpair()
        self.poll.register(self.end[0].fileno(), select.POLLIN)
        self.watched: dict[int, Channel] = {}  # by file number: who takes a channel out of here may work on it
        self.watching = 0  # threads
        self.lanes = threading.Semaphore(self.LANES)
        self.waiting: list[tuple[Channel, Small]] = []  # for a lane
        self.is_next = False  # a thread waits for a lane, and will take them all
        self.lock = threading.Lock()

    def watch(self, channel: Channel) -> None:
        """See to the next request of a connection."""
        number = channel.socket.fileno()
        self.watched[number] = channel
        try:
            self.poll.modify(number, select.POLLIN | ONE_SHOT)
        except FileNotFoundError:
            self.poll.register(number, select.POLLIN | ONE_SHOT)

    def forget(self, channel: Channel) -> bool:
        """A connection is about to be closed.  :returns: whether it was watched, so that no thread has it."""
        if not channel.connected or self.watched.get(number := channel.socket.fileno()) is not channel:
            return False
        return self.watched.pop(number, None) is channel

    def send_away(self) -> None:
        """Have the threads leave: nothing is read any more."""
        self.end[1].send(b".")  # and stays: all threads are to see it

    def free(self) -> None:
        """After the last thread has left."""
        self.poll.close()
        for end in self.end:
            end.close()

    def service(self) -> None:
        """A thread's time here."""
        while not self.http.draining:
            with self.lock:
                if self.watching == self.WATCHERS:
                    return
                self.watching += 1
            events = self.poll.poll()
            with self.lock:
                self.watching -= 1
                if not self.watching and not self.http.draining:
                    self.http.add_task(self)
            # Not by way of a name, which would keep the last one alive while this polls.
            self._work(list(filter(None, [self.watched.pop(number, None) for number, _ in events])))

    def cancel(self) -> None:
        """Asked of every task that is left when the threads have ended."""

    def _work(self, channels: list[Channel]) -> None:
        writes: list[tuple[Channel, Small]] = []
        others: list[Channel] = []
        for channel in channels:
            try:
                if not channel.read():
                    continue
                small = channel.offer()
            except Exception:
                channel.fail()
                continue
            if small:
                writes.append((channel, small))
            else:
                others.append(channel)
        mine = others.pop() if others and not writes else None
        for channel in others:
            self.http.add_task(channel)
        if writes:
            self._write(writes)
        elif mine:
            mine.service()

    def _write(self, writes: list[tuple[Channel, Small]]) -> None:
        """Write these, and what others bring until there is a lane, and answer them."""
        with self.lock:
            self.waiting += writes
            if self.is_next:
                return
            self.is_next = True
        has_lane = self.lanes.acquire(timeout=self.PATIENCE_SECONDS)
        try:
            with self.lock:
                writes, self.waiting, self.is_next = self.waiting, [], False
            answers = self.http.app.write([small for _, small in writes])
        finally:
            if has_lane:
                self.lanes.release()
        for (channel, _), answer in zip(writes, answers, strict=True):
            try:
                if answer:
                    channel.answer(answer)
                else:
                    self.http.add_task(channel)
            except Exception:
                channel.fail()


# ------------------------------------------------------------------------------
# The server: listens, and keeps the main loop and the threads.
# ------------------------------------------------------------------------------
class HttpServer:
    """An app on a listening socket. It belongs to the thread that makes it, which alone may call what is not said to be
    for others."""

    def __init__(self, app: App, listener: socket.socket, threads: int, max_body: int, other_files: int) -> None:
        """
        :param threads: for requests that are worked on.
        :param max_body: bytes; above, the connection is closed while the client may still be sending.
        :param other_files: how many files this process may have open beside its connections.
        """
        self.app = app
        self.listener = listener
        self.threads = threads + Door.WATCHERS
        self.keeper = threading.get_ident()
        self.draining = False  # nothing is read any more
        self.lock = threading.RLock()  # reentrant: a signal may call wake while close holds it
        self.closed = False
        self.door = Door(self)
        self.waitress = waitress.server.create_server(
            app, sockets=[listener], threads=self.threads, ident=None,
            connection_limit=make_room_for_connections(other_files), max_request_body_size=max_body,
            channel_timeout=120, asyncore_use_poll=True, clear_untrusted_proxy_headers=True)
        self.waitress.channel_class = Channel
        self.waitress.http = self

    def serve(self, stopping: threading.Event) -> None:
        """Answer requests until it is set, and `wake` called."""
        self.add_task(self.door)
        while not stopping.is_set():
            self._loop(1)

    def drain(self) -> None:
        """Take no more connections nor requests."""
        self.draining = True
        self.door.send_away()
        self.waitress.del_channel()  # out of the loop first: it takes a closed listener for the end of everything
        self.listener.close()

    def close(self, seconds: float) -> None:
        """Let what is under way finish and be sent, at most that long, then end."""
        deadline = time.monotonic() + seconds
        channels = self.waitress.active_channels
        while time.monotonic() < deadline and any(c.requests or c.total_outbufs_len for c in list(channels.values())):
            self._loop(0.1)
        self.waitress.task_dispatcher.shutdown(timeout=1)
        for channel in list(channels.values()):  # idle ones, whose clients keep them open
            channel.handle_close()
        with self.lock:
            self.closed = True  # a later wake must not write to a closed trigger
        self.waitress.close()
        self.door.free()

    def _loop(self, seconds: float) -> None:
        self.waitress.asyncore.loop(timeout=seconds, use_poll=True, map=self.waitress._map, count=1)

    def wake(self) -> None:
        """Have the main loop look again, from any thread or a signal handler."""
        with self.lock:
            if not self.closed:
                self.waitress.pull_trigger()

    def add_task(self, task: Channel | Door) -> None:
        """Have one of the threads do it, from any thread."""
        self.waitress.add_task(task)

    def make_room(self, waiting: int) -> None:
        """See that so many requests may wait beside those that are worked on, from any thread.  :raises RuntimeError:
        the machine gives no more threads."""
        dispatcher = self.waitress.task_dispatcher
        # Threads that were started for those that wait stay: the next wait comes soon.
        dispatcher.set_thread_count(max(self.threads + waiting, len(dispatcher.threads)))


def make_room_for_connections(others: int) -> int:
    """Raise the limit on this process's open files to what it may be.  :returns: how many connections it then has room
    for beside `others`; further clients wait until one leaves. To take in a client beyond the limit would fail, again
    and again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MOST_FILES:
        wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
        with suppress(ValueError, OSError):  # the system allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    files = MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, MOST_FILES)
    return max(files - others, files // 2)
