"""One POST to a receiver that is not trusted: one deadline for the whole exchange, a checked address, a bounded answer.

requests and urllib3 do the HTTP and the TLS. Each of their time-outs limits one read, or the connection to one address,
so a receiver that sends a byte now and then could hold a thread for ever. The deadline is kept by another thread, which
shuts the connection down (`cut`).
"""

from __future__ import annotations

import functools
import http.client
import io
import os
import queue
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import requests
import requests.adapters
import urllib3
import urllib3.connection

from .targets import WebhookTargets

CONNECT_SECONDS = 5.0       # for one address of several
ANSWER_CHARACTERS = 8000    # of the answer's body are kept
ANSWER_BYTES = 256 * 1024   # of a whole answer, with its interim answers and headers; a longer one is cut off


class TargetRefused(Exception):
    """No webhook may be sent to the receiver's address; the message is for whoever configured it."""


class Cut(Exception):
    """The exchange was ended by `cut` before there was a status."""


class Exchange:
    """One POST and its answer. `post` blocks its thread; `cut`, called by another thread, ends it."""

    def __init__(self, targets: WebhookTargets, seconds: float) -> None:
        self.targets = targets
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.is_cut = False
        self.is_over = False  # `post` returned, or raised
        self.has_connected = False  # to the receiver, which may have got the request
        self._lock = threading.Lock()  # guards is_cut and _connection
        self._connection: socket.socket | None = None  # a duplicate, since requests may close its own at any time

    def post(self, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        """Send it.

        :returns: the status, and the first characters of the answer's body. A body that breaks off, or is cut, is kept
            as far as it came: the status alone decides.
        :raises TargetRefused: the address may not be sent to.
        :raises ValueError: the URL is no address, or (`has_connected`) the head of the answer is malformed.
        :raises Cut, requests.RequestException: there is no answer; another try may do better.
        """
        headers = {**headers, "Accept-Encoding": "identity"}
        try:
            with _Session(self) as session, session.post(
                    url, data=body, headers=headers, timeout=self._left(), stream=True,
                    allow_redirects=False) as response:
                if self.is_cut:  # maybe in the head: http.client takes one that breaks off for a complete one
                    raise Cut
                return response.status_code, _beginning(response)
        except requests.RequestException as error:
            if self.is_cut or self._left() <= 0.001:
                raise Cut from error
            raise
        finally:
            self.is_over = True
            with self._lock:
                if self._connection:
                    self._connection.close()
                    self._connection = None

    def cut(self) -> None:
        """End it: a read from the connection, or a write to it, fails at once."""
        with self._lock:
            self.is_cut = True
            if self._connection:
                with suppress(OSError):  # the receiver has closed it already
                    self._connection.shutdown(socket.SHUT_RDWR)

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to the first address of the host that may be sent to and accepts the connection.

        :raises TargetRefused: no address of the host may be sent to.
        :raises OSError: none of those that may be sent to accepts in time, or the host has no address.
        """
        refusal: str | None = None
        failure: OSError | None = None
        for family, kind, protocol, _, address in _addresses(host, port, self._left()):
            reason = self.targets.refusal(host, str(address[0]))
            if reason:
                refusal = refusal or reason
                continue
            try:
                return self._connect(socket.socket(family, kind, protocol), address)
            except OSError as error:
                failure = error
        if refusal and not failure:
            raise TargetRefused(refusal)
        raise failure or OSError(f"{host} has no address")

    def _connect(self, connection: socket.socket, address: Any) -> socket.socket:
        try:
            connection.settimeout(min(CONNECT_SECONDS, self._left()))
            connection.connect(address)
            connection.settimeout(self._left())  # also the limit of the TLS handshake, as a whole
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self.is_cut:
                    raise TimeoutError
                self._connection = connection.dup()
            self.has_connected = True
        except OSError:
            connection.close()
            raise
        return connection

    def _left(self) -> float:
        return max(0.001, self.deadline - time.monotonic())


def _addresses(host: str, port: int, seconds: float) -> list[Any]:
    """What getaddrinfo answers for a host.

    :param seconds: how long the resolver may take. It cannot be stopped, so a slower one goes on in a thread of its own
        and its answer is not used.
    :raises OSError: the name is unknown, or was not resolved in time.
    :raises UnicodeError: it cannot be a name.
    """
    with suppress(socket.gaierror):  # then it is a name; an address, in whatever spelling, needs no resolver
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=resolve, name="tidebase-resolver", daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"{host} could not be resolved in time") from None
    if isinstance(answer, Exception):
        raise answer
    return list(answer)


# ------------------------------------------------------------------------------
# Under requests: connections made by the exchange, and answers of a bounded size.
#
# This is the one place that relies on what the libraries do not document. urllib3 has no hook for making a connection
# but HTTPConnection._new_conn, which returns the socket, before TLS; the Host header and the name that the certificate
# must have are still those of the URL. http.client makes its answers from response_class and reads them from fp.
# tests/test_webhooks.py tests that each of these has its effect; requirements.txt pins the versions.
# ------------------------------------------------------------------------------
class _Bounded(io.RawIOBase):
    """The bytes of an answer; beyond ANSWER_BYTES reading fails."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.left = ANSWER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self.raw.readinto(buffer)
        self.left -= count or 0
        if self.left < 0:
            raise OSError(f"an answer of more than {ANSWER_BYTES} bytes")
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer of bounded size."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach()))


class _Connecting:
    """What connections with and without TLS have in common: the exchange makes the socket."""

    response_class: Any = _Response
    _dns_host: str
    port: int

    def __init__(self, *arguments: Any, exchange: Exchange, **options: Any) -> None:
        self.exchange = exchange
        super().__init__(*arguments, **options)

    def _new_conn(self) -> socket.socket:
        return self.exchange.connect(self._dns_host, self.port)


class _Connection(_Connecting, urllib3.connection.HTTPConnection):
    pass


class _SecureConnection(_Connecting, urllib3.connection.HTTPSConnection):
    pass


class _Adapter(requests.adapters.HTTPAdapter):
    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        super().__init__()

    def get_connection_with_tls_context(self, *arguments: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*arguments, **options)
        kind = _SecureConnection if pool.scheme == "https" else _Connection
        pool.ConnectionCls = functools.partial(kind, exchange=self.exchange)
        return pool


class _Session(requests.Session):
    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.trust_env = False  # no proxy, and no password from the .netrc of the user who started the server
        self.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(exchange))

    def get_redirect_target(self, resp: requests.Response) -> None:
        """No redirect is followed. requests asks even without allow_redirects, and would then read the whole body."""
        return None


def _beginning(response: requests.Response) -> str:
    """The first characters of an answer's body, with NUL and lone surrogates replaced, which PostgreSQL does not store.
    The body is not decompressed."""
    taken = b""
    with suppress(urllib3.exceptions.HTTPError):
        while len(taken) < 4 * ANSWER_CHARACTERS and (chunk := response.raw.read1(4096, decode_content=False)):
            taken += chunk
    try:
        text = taken.decode(response.encoding or "utf-8", "replace")
    except (LookupError, ValueError):  # the receiver named an encoding that does not exist
        text = taken.decode("utf-8", "replace")
    text = text.encode("utf-8", "replace").decode()
    return text[:ANSWER_CHARACTERS].replace("\x00", "\N{REPLACEMENT CHARACTER}")
