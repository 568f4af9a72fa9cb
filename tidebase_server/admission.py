"""Who may ask, request by request: what is decided before a body is read, and what is checked of each request.

access.py has the rules; here they meet HTTP and Flask.
"""

from __future__ import annotations

import http
from collections.abc import Callable, Mapping

import flask

from .access import Access
from .answers import SAFE_HEADERS, Refusal, Reply, invalid, refused
from .request import core, path_of
from .serving import EarlyAnswer, Head

KEYLESS_BYTES = 65_536  # of a body that comes without a key, for the routes that need none: a gate's decision


class Admission:
    """The gatekeeper of the HTTP server. It decides about a request as soon as its head is there, so that no body is
    taken from who may not send one."""

    def __init__(self, access: Access, takes_no_key: Callable[[str, str], bool], headers: Mapping[str, str]) -> None:
        """
        :param takes_no_key: whether a route, by method and path, answers without a key.
        :param headers: what all answers carry, beside SAFE_HEADERS.
        """
        self.access = access
        self.takes_no_key = takes_no_key
        self.headers = {**SAFE_HEADERS, **headers}

    def admit(self, head: Head) -> EarlyAnswer | None:
        """Let a request without a body, or with the right key, go on to Flask, which checks it once more."""
        if head.body_bytes == 0:
            return None
        path = path_of(head.target)
        environ = {f"HTTP_{name}": value for name, value in head.headers.items()} | {
            "REQUEST_METHOD": head.method, "REQUEST_URI": head.target, "PATH_INFO": path,
            "CONTENT_TYPE": head.headers.get("CONTENT_TYPE", ""), "CONTENT_LENGTH": str(head.body_bytes or 1)}
        if denial := self.access.denial(environ):
            return self._answer(refused(Refusal(*denial)))
        key = self.access.key_in(environ.get("HTTP_AUTHORIZATION", ""))
        if not self.access.api_key or self.access.is_key(key) or self.access.is_read_key(key):
            return None
        if not self.takes_no_key(head.method, path):
            return self._answer(refused(wrong_key(key)))
        if head.body_bytes is None or head.body_bytes > KEYLESS_BYTES:
            return self.refuse(413, "")
        return None

    def refuse(self, status: int, words: str) -> EarlyAnswer:
        """The answer to what cannot be read as a request.

        :param status: 400, 408, 413, 431, 500 or 501.
        :param words: what is wrong, for a 400; a 413 and the like say it by their code.
        """
        code = {408: "request_timeout", 413: "body_too_large", 431: "headers_too_large", 501: "not_implemented"}.get(
            status, "internal_error")
        return self._answer(refused(invalid("", words) if status == 400 else Refusal(
            status, code, http.HTTPStatus(status).phrase.lower())))

    def _answer(self, reply: Reply) -> EarlyAnswer:
        text, status, headers = reply
        headers = self.headers | headers
        return EarlyAnswer(status, http.HTTPStatus(status).phrase, list(headers.items()), text.encode())


def check_sender() -> None:
    """:raises Refusal: 403 for a web page's request that is not this server's own, 415 for a body that is not JSON."""
    if denial := core().access.denial(flask.request.environ):
        raise Refusal(*denial)


def check_key(given: str | None = None) -> bool:
    """Whether `given` or, without it, the Authorization header is the key that may write, and not the one that only
    reads.  :raises Refusal: 401, when it is neither."""
    rules = core().access
    if not rules.api_key:
        return True
    key = rules.key_in(flask.request.environ.get("HTTP_AUTHORIZATION", "")) if given is None else given.encode()
    if rules.is_key(key):
        return True
    if not rules.is_read_key(key):
        raise wrong_key(key)
    return False


def wrong_key(sent: bytes) -> Refusal:
    """The 401 for a key that is not this server's, or is not there."""
    return Refusal(401, "unauthorized", "the API key that was sent is not this server's" if sent else
                   "send the API key: Authorization: Bearer KEY")


def run_token_expiry(given: str | None) -> int | None:
    """When the run token expires that a request for a run's events brings as `given` or, without it, as the
    Authorization header; None when it brings none.  :raises Refusal: 401, when the token has expired."""
    rules, request = core().access, flask.request
    sent = rules.key_in(request.headers.get("Authorization", "")) if given is None else given.encode()
    expires_at = rules.run_token_expiry(sent, (request.view_args or {})["run_id"])
    if expires_at is not None and expires_at <= rules.clock():
        raise Refusal(401, "unauthorized", "this run token has expired: get another one")
    return expires_at


def cors_headers(origin: str) -> dict[str, str]:
    """The headers by which browsers let pages of this origin call the server; none without an origin."""
    if not origin:
        return {}
    headers = {"Access-Control-Allow-Origin": origin,
               "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE, OPTIONS",
               "Access-Control-Allow-Headers": "authorization, content-type, x-tidebase-worker, last-event-id",
               "Access-Control-Max-Age": "600"}
    return headers if origin == "*" else {**headers, "Vary": "Origin"}
