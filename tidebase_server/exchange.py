"""One POST to a receiver that nobody vouches for: one deadline for all of it, a checked address, a bounded answer.

requests and urllib3 do the HTTP and the TLS. Their time-outs are for a single read or an address, so a receiver that
drips could hold a thread for ever: the deadline is kept by shutting the connection down from another thread (`cut`).
"""

from __future__ import annotations

import base64
import functools
import hmac
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
ANSWER_CHARACTERS = 8000    # of a body, that are kept
ANSWER_BYTES = 256 * 1024   # of a whole answer, its interim answers and headers among them; more is no answer


def sign(body: bytes, secret: str, delivery_id: str, timestamp: int) -> dict[str, str]:
    """The signature headers: ours, HMAC-SHA256 over the body, and those of the Standard Webhooks specification, over
    id, timestamp and body; a secret that begins with whsec_ is base64 there, as that specification has it."""
    key = secret.encode()
    standard_key = key
    if secret.startswith("whsec_"):
        with suppress(ValueError):
            standard_key = base64.b64decode(secret.removeprefix("whsec_"), validate=True) or key
    signed = b"%s.%d.%s" % (delivery_id.encode(), timestamp, body)
    standard = base64.b64encode(hmac.digest(standard_key, signed, "sha256")).decode()
    return {"x-tidebase-signature": "sha256=" + hmac.digest(key, body, "sha256").hex(),
            "webhook-signature": f"v1,{standard}"}


class TargetRefused(Exception):
    """The receiver's address is not one to send webhooks to; the message is for who configured it."""


class Cut(Exception):
    """The exchange was ended by `cut` before there was a status."""


class Exchange:
    """One POST and its answer. `post` blocks its thread; `cut` ends that from another one."""

    def __init__(self, targets: WebhookTargets, seconds: float) -> None:
        self.targets = targets
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.is_cut = False
        self.is_over = False  # `post` returned, or raised
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None  # a handle of our own: the other is closed at any time

    def post(self, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        """Send it.  :returns: the status, and the first characters of the answer.

        The status counts: a body that breaks off, or is cut, is kept as far as it came.

        :raises TargetRefused, ValueError: it can never be sent there.
        :raises Cut, requests.RequestException: another try may do better.
        """
        headers = {**headers, "Accept-Encoding": "identity"}
        try:
            with _Session(self) as session, session.post(
                    url, data=body, headers=headers, timeout=self._left(), stream=True,
                    allow_redirects=False) as response:
                if self.is_cut:  # in the head, whose beginning http.client takes for all of it
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
        """End it: whoever reads from the connection, or writes to it, gets an error at once."""
        with self._lock:
            self.is_cut = True
            if self._connection:
                with suppress(OSError):  # the receiver was faster
                    self._connection.shutdown(socket.SHUT_RDWR)

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection to the first address of the host that may be sent to and takes it.

        :raises TargetRefused: none of them may.
        :raises OSError: none of them takes it in time.
        """
        refusals, failure = [], OSError(f"{host} has no address")
        for family, kind, protocol, _, address in _addresses(host, port, self._left()):
            refusal = self.targets.refusal(host, str(address[0]))
            if refusal:
                refusals.append(refusal)
                continue
            try:
                return self._connect(socket.socket(family, kind, protocol), address)
            except OSError as error:
                failure = error
        raise TargetRefused(refusals[0]) if refusals else failure

    def _connect(self, connection: socket.socket, address: Any) -> socket.socket:
        try:
            connection.settimeout(min(CONNECT_SECONDS, self._left()))
            connection.connect(address)
            connection.settimeout(self._left())  # TLS keeps it for its handshake as a whole
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self.is_cut:
                    raise TimeoutError
                self._connection = connection.dup()
        except OSError:
            connection.close()
            raise
        return connection

    def _left(self) -> float:
        return max(0.001, self.deadline - time.monotonic())


def _addresses(host: str, port: int, seconds: float) -> list[Any]:
    """What a host is resolved to. A resolver can be slower than anybody wants to wait, and is then left to itself."""
    with suppress(socket.gaierror):  # it is a name; an address, in whatever spelling, needs no resolver
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
# Beneath requests: connections that the exchange makes, and answers that end.
#
# This is the one place that leans on what the libraries do not document. urllib3 has no hook for how a connection is
# made but HTTPConnection._new_conn, which it calls for a socket, before TLS; the host in the Host header and the name
# in the certificate stay those of the URL. http.client makes its answers from response_class and reads them from fp.
# tests/test_webhooks.py shows that each takes hold; the versions are pinned in requirements.txt.
# ------------------------------------------------------------------------------
class _Bounded(io.RawIOBase):
    """The bytes of an answer, up to ANSWER_BYTES."""

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
    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Bounded(self.fp.detach()))


class _Connecting:
    """How both kinds of connection are made."""

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
        self.trust_env = False  # no proxy and no password of this machine's user; an authority of its own it may have
        self.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(exchange))

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None is followed: else requests would read its body to the end, and its address, even so."""
        return None


def _beginning(response: requests.Response) -> str:
    """The first characters of a body, whatever its encoding is. NUL and lone surrogates are no text for Postgres."""
    taken = b""
    with suppress(urllib3.exceptions.HTTPError):
        while len(taken) < 4 * ANSWER_CHARACTERS and (chunk := response.raw.read1(4096, decode_content=False)):
            taken += chunk
    try:
        text = taken.decode(response.encoding or "utf-8", "replace")
    except (LookupError, ValueError):  # the receiver named an encoding that there is not
        text = taken.decode("utf-8", "replace")
    text = text.encode("utf-8", "replace").decode()
    return text[:ANSWER_CHARACTERS].replace("\x00", "\N{REPLACEMENT CHARACTER}")
