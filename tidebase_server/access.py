"""Who may ask: what the head of a request must say before its body is looked at.

Run tokens, for browsers' streams, are `v1.EXPIRY.MAC`. EXPIRY is when it ends, in whole seconds since 1970, as decimal
digits. MAC is the HMAC-SHA256 of `tidebase-run-token.v1.EXPIRY.RUN_ID`, keyed with the API key or the read key, all in
UTF-8, as base64url without padding. The run's id is part of what is signed and not of the token: the path has it.

A server without a key trusts whoever can connect, and so must keep out the web pages that a browser on this machine
shows. A browser sends their requests to any address, and says in `Origin` and `Sec-Fetch-Site` whose they are. For a
page that lets its own name point to this server, the two are of the same origin; but `Host` has that name.
"""

from __future__ import annotations

import base64
import functools
import hmac
import ipaddress
import re
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
DEFAULT_PORTS = {"http": 80, "https": 443}
RUN_TOKEN = re.compile(rb"v1\.([0-9]{1,12})\.([A-Za-z0-9_-]{43})")
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@,\s]+)(?::([0-9]{1,5}))?", re.I)


class Denial(NamedTuple):
    """Why a request is refused."""

    status: int
    code: str
    words: str


class Authority(NamedTuple):
    """A name or address, in one spelling, and a port."""

    host: str
    port: int | None


class Access:
    """The rules of one server.

    :param host: the address that it listens on.
    :param public_url: the address that it is known by, or "".
    :param cors_origin: the origin whose pages may ask, "*" for all, "" for none but its own.
    :param read_key: the key that only reads, or "".
    :param pages: the paths of pages for people, which other sites may link to.
    """

    def __init__(self, *, host: str, api_key: str, public_url: str, cors_origin: str, pages: frozenset[str],
                 read_key: str = "") -> None:
        self.api_key = api_key
        self.read_key = read_key
        self.cors_origin = cors_origin
        self.pages = pages
        self.clock = time.time  # by which run tokens expire
        self.public = origin_of(public_url)
        own = one_spelling(host)
        self.names = LOOPBACK | {own} | ({self.public.host} if self.public else set())
        # A page cannot have its own name point here and send an address as Host.
        self.any_address = is_address(own) and ipaddress.ip_address(own).is_unspecified

    def denial(self, environ: Mapping[str, Any]) -> Denial | None:
        """What is wrong with a request, by its WSGI environment; None if it may go on to the check of its key.

        403 foreign_origin, 415 unsupported_media_type.
        """
        return self._of_host(environ) or self._of_origin(environ) or of_body(environ)

    def _of_host(self, environ: Mapping[str, Any]) -> Denial | None:
        """Without a key, a Host that is not this server's own: that of a rebound name, for example. Only the name is
        compared, since ports may be forwarded. A target such as http://name/path counts before the header."""
        if self.api_key:
            return None
        is_own = self._is_own(authority_of(environ.get("HTTP_HOST", "")))  # of several, joined by commas, it is not
        if not (target := environ.get("REQUEST_URI", "/")).startswith("/"):
            is_own = is_own and self._is_own(authority_of(urllib.parse.urlsplit(target).netloc))
        if is_own:
            return None
        return Denial(403, "foreign_origin", "without TIDEBASE_API_KEY this server takes requests to localhost and to "
                                             "the address it listens on alone; TIDEBASE_PUBLIC_URL names another")

    def _is_own(self, authority: Authority | None) -> bool:
        return authority is not None and (
            authority.host in self.names or (self.any_address and is_address(authority.host)))

    def _of_origin(self, environ: Mapping[str, Any]) -> Denial | None:
        origin, site = environ.get("HTTP_ORIGIN"), environ.get("HTTP_SEC_FETCH_SITE", "").lower()
        if self.cors_origin and self.cors_origin in ("*", origin):
            return None
        if origin is None:
            is_foreign = "cross-site" in site and not self._is_followed_link(environ)
        else:
            is_foreign = "cross-site" in site or not self._is_own_origin(origin, environ.get("HTTP_HOST", ""))
        return Denial(403, "foreign_origin", "pages of other origins may not call this server; TIDEBASE_CORS_ORIGIN "
                                             "lets one of them in") if is_foreign else None

    def _is_own_origin(self, origin: str, host: str) -> bool:
        known = origin_of(origin)
        scheme = origin.partition(":")[0].lower()
        return known is not None and known in (self.public, authority_of(host, DEFAULT_PORTS.get(scheme)))

    def _is_followed_link(self, environ: Mapping[str, Any]) -> bool:
        """Whether somebody follows a link to a page: it is shown to that person, not to the page that has the link."""
        return (environ.get("REQUEST_METHOD") == "GET" and environ.get("HTTP_SEC_FETCH_MODE") == "navigate"
                and environ.get("HTTP_SEC_FETCH_DEST") == "document" and (
                    environ.get("PATH_INFO") in self.pages or environ.get("PATH_INFO", "").startswith("/studio/")))

    @staticmethod
    def key_in(authorization: str) -> bytes:
        """The key that an Authorization header, as WSGI has it, holds; empty when it holds none."""
        scheme, _, sent = authorization.partition(" ")
        return sent.strip(" ").encode("latin-1", "replace") if scheme.lower() == "bearer" else b""

    def is_key(self, sent: bytes) -> bool:
        """Whether this is the key that may do all."""
        return hmac.compare_digest(sent, self.api_key.encode())

    def is_read_key(self, sent: bytes) -> bool:
        """Whether this is the key that only reads."""
        return bool(self.read_key) and hmac.compare_digest(sent, self.read_key.encode())

    def run_token_expiry(self, sent: bytes, run_id: str) -> int | None:
        """When this run token expires, or has expired, in seconds since 1970; None when it is no token of this run."""
        found = RUN_TOKEN.fullmatch(sent)
        if not found:
            return None
        text = b"tidebase-run-token.v1." + found[1] + b"." + run_id.encode()
        macs = [base64.urlsafe_b64encode(hmac.digest(key.encode(), text, "sha256")).rstrip(b"=")
                for key in (self.api_key, self.read_key) if key]
        matches = [hmac.compare_digest(found[2], mac) for mac in macs]
        return int(found[1]) if any(matches) else None


def of_body(environ: Mapping[str, Any]) -> Denial | None:
    """A page can send text, a form or a file to any server; to send JSON it must have been let in."""
    if environ.get("HTTP_CONTENT_ENCODING"):
        return Denial(415, "unsupported_media_type", "send the body as it is, without Content-Encoding")
    if int(environ.get("CONTENT_LENGTH") or 0) and media_type(environ.get("CONTENT_TYPE")) != "application/json":
        return Denial(415, "unsupported_media_type", "send the body with Content-Type: application/json")
    return None


def media_type(content_type: str | None) -> str:
    """A Content-Type without its parameters."""
    return (content_type or "").split(";")[0].strip(" \t").lower()


@functools.lru_cache(1024)  # each client sends the same Host with all its requests
def authority_of(text: str, default_port: int | None = None) -> Authority | None:
    """`name`, `name:port`, `[address]:port`; None for anything else."""
    found = AUTHORITY.fullmatch(text)
    return Authority(one_spelling(found[1]), int(found[2]) if found[2] else default_port) if found else None


def origin_of(url: str) -> Authority | None:
    """Of an origin or a URL, the name and port; None for `null` and the like."""
    scheme, found, rest = url.partition("://")
    port = DEFAULT_PORTS.get(scheme.lower())
    return authority_of(rest.partition("/")[0], port) if found and port else None


def is_origin(text: str) -> bool:
    """Whether it is an origin as browsers send it: a scheme and a name, maybe a port, in lower case, without a path."""
    return origin_of(text) is not None and text == text.lower() and "/" not in text.partition("://")[2]


def one_spelling(host: str) -> str:
    """A name in lower case, an address in its shortest form."""
    host = host.strip("[]").lower()
    return ipaddress.ip_address(host).compressed if is_address(host) else host


def is_address(host: str) -> bool:
    """Whether it is an IP address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
