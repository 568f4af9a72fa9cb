"""Who may ask: a web page in a browser on this machine may not, whatever it tries, unless it is named; clients may.

The attacks are sent as a browser sends them, byte by byte, and then by a real Chromium.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import json
import logging
import re
import shutil
import socket
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Answer, Api, LocalServer, ServerProcess, eventually, refused

import tidebase
from tidebase import AsyncTidebase, Tidebase, TidebaseError

JSON = {"content-type": "application/json"}
KEY = "a-key-of-more-than-16-characters"
# By way of Flask, and the routes that workers call all the time.
PLACES = [("GET", "/runs", None), ("POST", "/runs/report", {}), ("POST", "/queues/q/enqueue", {"workflowName": "w"}),
          ("POST", "/runs/none/heartbeat", {"leaseOwner": "a"}), ("POST", "/writes", {"writes": [{
              "do": "complete_run", "runId": "none", "leaseOwner": "a"}]})]


def ask(url: str, method: str, path: str, body: Any = None, headers: tuple[tuple[str, str], ...] = (),
        host: str | None = "") -> Answer:
    """Send exactly these headers; `host` is the server's own address unless it is given, None for no such header."""
    address, port = url.removeprefix("http://").rsplit(":", 1)
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1"]
    if host is not None:
        lines.append(f"Host: {host or f'{address}:{port}'}")
    lines += [f"{name}: {value}" for name, value in headers]
    if data:
        lines.append(f"Content-Length: {len(data)}")
    return answer_to(address, int(port), "\r\n".join([*lines, "Connection: close", "", ""]).encode() + data)


def answer_to(address: str, port: int, request: bytes) -> Answer:
    """What is answered until the connection is closed."""
    with socket.create_connection((address, port), timeout=20) as connection:
        connection.sendall(request)
        head, _, told = b"".join(iter(lambda: connection.recv(65_536), b"")).partition(b"\r\n\r\n")
    fields = dict(line.decode().lower().split(": ", 1) for line in head.split(b"\r\n")[1:])
    return Answer(int(head.split()[1]), fields, told)


def nothing_happened(api: Api) -> None:
    assert Api(f"http://{api.address}", key=KEY).get("/runs")["runs"] == []


# ------------------------------------------------------------------------------
# Host
# ------------------------------------------------------------------------------
@pytest.mark.parametrize("host", [
    "evil.test", "evil.test:{port}", "localhost.evil.test", "127.0.0.1.evil.test", "localhost:{port}@evil.test",
    "evil.test@localhost", "localhost, evil.test", "localhost,localhost", "0.0.0.0", "127.1", "0x7f000001", "10.0.0.1",
    "[::]", "[::1", "::1", "local host", "localhost:", "localhost:x", "localhost.", "[::1].evil.test", None,
    "http://localhost"])
def test_without_a_key_only_names_of_this_machine_are_taken_as_host(api: Api, host: str | None) -> None:
    port = api.address.split(":")[1]
    for method, path, body in PLACES:
        answer = ask(f"http://{api.address}", method, path, body, tuple(JSON.items()), host and host.format(port=port))
        refused(answer, 403, "foreign_origin")
    nothing_happened(api)


def test_two_hosts_are_none(api: Api) -> None:
    for method, path, body in PLACES:
        for second in ("evil.test", api.address):
            refused(ask(f"http://{api.address}", method, path, body, (*JSON.items(), ("Host", second))), 403,
                    "foreign_origin")
    nothing_happened(api)


def test_the_name_in_the_target_counts_too_since_it_takes_precedence(api: Api) -> None:
    for method, path, body in PLACES:
        for target in (f"http://evil.test{path}", f"http://evil.test@localhost{path}"):
            answer = ask(f"http://{api.address}", method, target, body, tuple(JSON.items()), host="localhost")
            refused(answer, 403, "foreign_origin")
    nothing_happened(api)
    assert ask(f"http://{api.address}", "GET", "http://localhost:1/runs").status == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:9999", "[::1]:7373", "[0:0:0:0:0:0:0:1]"])
def test_names_of_this_machine_are_taken_with_any_port_since_ports_are_forwarded(api: Api, host: str) -> None:
    for method, path, body in PLACES:
        assert ask(f"http://{api.address}", method, path, body, tuple(JSON.items()), host).status in (200, 404)


@pytest.mark.parametrize(("settings", "taken", "others"), [
    ({"HOST": "127.0.0.2", "TIDEBASE_INSECURE": 1}, ["127.0.0.2:80", "localhost"], ["127.0.0.3", "evil.test"]),
    ({"TIDEBASE_PUBLIC_URL": "https://tide.example/x"}, ["tide.example", "Tide.example:8443"], ["evil.test"]),
    # All addresses are its own; a page cannot have a name that is one.
    ({"HOST": "0.0.0.0", "TIDEBASE_INSECURE": 1}, ["10.1.2.3:7373", "[fd00::1]"], ["tidebase:7373", "1.2.3"]),
    ({"TIDEBASE_API_KEY": KEY}, ["tide.example", "10.1.2.3", "localhost"], []),
], ids=["an address", "a public one", "all addresses", "a key"])
def test_a_servers_own_address_is_taken_and_with_a_key_any(
        start_server: Callable[..., LocalServer], settings: dict[str, Any], taken: list[str], others: list[str]
        ) -> None:
    url = start_server(**settings).url.replace("0.0.0.0", "127.0.0.1")
    headers = (*JSON.items(), ("Authorization", f"Bearer {KEY}"))
    for method, path, body in PLACES:
        for host in taken:
            assert ask(url, method, path, body, headers, host).status in (200, 404)
        for host in others:
            refused(ask(url, method, path, body, headers, host), 403, "foreign_origin")


# ------------------------------------------------------------------------------
# Origin
# ------------------------------------------------------------------------------
FOREIGN = [
    *[{"origin": origin} for origin in (
        "https://evil.test", "http://localhost", "http://localhost:1", "http://127.0.0.1.evil.test:{port}", "null", "",
        "file://", "http://[::1]:{port}", "chrome-extension://abc", "http://evil.test, http://127.0.0.1:{port}",
        "http://evil.test@127.0.0.1:{port}")],
    {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "Cross-Site"}, {"sec-fetch-site": "none, cross-site"},
    {"origin": "http://127.0.0.1:{port}", "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_origin_is_refused(api: Api, headers: dict[str, str]) -> None:
    port = api.address.split(":")[1]
    sent = {name: value.format(port=port) for name, value in headers.items()}
    others = [("GET", "/health", None), ("OPTIONS", "/runs", None), ("GET", "/nothing", None)]
    for method, path, body in [*PLACES, *others]:
        answer = ask(f"http://{api.address}", method, path, body, (*JSON.items(), *sent.items()))
        refused(answer, 403, "foreign_origin")
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    nothing_happened(api)


@pytest.mark.parametrize("headers", FOREIGN[:2] + FOREIGN[-5:-2], ids=str)
def test_a_key_does_not_let_a_page_of_another_origin_in(start_server: Callable[..., LocalServer],
                                                        headers: dict[str, str]) -> None:
    api = Api(start_server(TIDEBASE_API_KEY=KEY, TIDEBASE_CORS_ORIGIN="https://app.example").url, key=KEY)
    for method, path, body in PLACES:
        refused(api.send(method, path, body, headers=headers), 403, "foreign_origin")
    nothing_happened(api)


def test_pages_of_its_own_and_what_is_no_browser_are_let_in(api: Api, start_server: Callable[..., LocalServer]) -> None:
    port = api.address.split(":")[1]
    own = [{}, {"origin": f"http://127.0.0.1:{port}", "sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"},
           {"origin": f"HTTP://127.0.0.1:{port}"}]
    for method, path, body in PLACES:
        for headers in own:
            assert api.send(method, path, body, headers=headers).status in (200, 404)
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert api.get("/studio", headers=link).status == 200  # somebody follows it; in a frame it would be a page's
    refused(api.get("/studio", headers={**link, "sec-fetch-dest": "iframe"}), 403, "foreign_origin")
    # Behind TLS, whether the host is passed on or not.
    url = start_server(TIDEBASE_API_KEY=KEY, TIDEBASE_PUBLIC_URL="https://tide.example").url
    for host in ("tide.example", "tide.example:443", "127.0.0.1:1"):
        answer = ask(url, "POST", "/runs/report", {}, (
            *JSON.items(), ("Authorization", f"Bearer {KEY}"), ("Origin", "https://tide.example")), host)
        assert answer.status == 200


def test_a_named_origin_is_let_in_and_no_other_and_a_star_lets_in_all(start_server: Callable[..., LocalServer]) -> None:
    def statuses(cors: str, headers: dict[str, str]) -> set[int]:
        return {servers[cors].send(method, path, body, headers=headers).status for method, path, body in PLACES}

    servers = {cors: Api(start_server(TIDEBASE_CORS_ORIGIN=cors).url) for cors in ("https://app.example", "*")}
    app = {"origin": "https://app.example", "sec-fetch-site": "cross-site"}
    for cors in servers:
        assert statuses(cors, app) == {200, 404}
    for headers in ({"origin": "https://app.example.evil.test"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert statuses("https://app.example", headers) == {403}
        assert statuses("*", headers) == {200, 404}


# ------------------------------------------------------------------------------
# Bodies that a page can send without being let in
# ------------------------------------------------------------------------------
@pytest.mark.parametrize("content_type", [
    None, "", "text/plain", "text/plain; application/json", "text/plain, application/json",
    "application/json, text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/jsonx", "application/json+x", "application", "json"])
def test_a_body_is_json_and_says_so(api: Api, content_type: str | None) -> None:
    headers = () if content_type is None else (("Content-Type", content_type),)
    for method, path, body in PLACES[1:]:
        refused(ask(f"http://{api.address}", method, path, body, headers), 415, "unsupported_media_type")
        refused(chunked(api, method, path, body, (*headers, ("Transfer-Encoding", "chunked"))), 415,
                "unsupported_media_type")
    nothing_happened(api)


def chunked(api: Api, method: str, path: str, body: Any, headers: tuple[tuple[str, str], ...]) -> Answer:
    data = json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *(f"{n}: {v}" for n, v in headers)]
    host, port = api.address.split(":")
    return answer_to(host, int(port), "\r\n".join([*lines, "", f"{len(data):x}", ""]).encode() + data
                     + b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON", "application/json; charset=utf-8",
                                          "application/json;charset=utf-8", "application/json ;x=y"])
def test_json_may_be_said_in_any_way(api: Api, content_type: str) -> None:
    for method, path, body in PLACES[1:]:
        assert api.send(method, path, body, headers={"content-type": content_type}).status in (200, 404)
        answer = chunked(api, method, path, body, (("Transfer-Encoding", "chunked"), ("Content-Type", content_type)))
        assert answer.status in (200, 404)


@pytest.mark.parametrize("encoding", ["gzip", "identity", "br, gzip"])
def test_an_encoded_body_is_refused(api: Api, encoding: str) -> None:
    for method, path, body in PLACES[1:]:
        answer = api.send(method, path, body, headers={"content-encoding": encoding})
        assert "Content-Encoding" in refused(answer, 415, "unsupported_media_type")["error"]
    nothing_happened(api)


# ------------------------------------------------------------------------------
# Requests hidden in requests
# ------------------------------------------------------------------------------
@pytest.mark.parametrize(("version", "headers"), [
    ("1.1", "Content-Length: 4\r\nTransfer-Encoding: chunked"),
    ("1.1", "Transfer-Encoding: chunked\r\nContent-Length: 4"),
    ("1.1", "Transfer-Encoding: chunked\r\nContent-Length: x"), ("1.0", "Transfer-Encoding: chunked"),
    ("1.0", "Content-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive")])
def test_a_body_of_two_lengths_ends_the_connection(api: Api, version: str, headers: str) -> None:
    hidden = b"POST /runs/hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for path in ("/runs/report", "/queues/q/enqueue"):
        host, port = api.address.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                               f"{headers}\r\n\r\n".encode() + b"0\r\n\r\n" + hidden)
            told = b"".join(iter(lambda: connection.recv(65_536), b""))  # to its end: it is closed
        assert re.findall(rb"HTTP/1\.\d (\d{3})", told) == [b"400"], told
        assert b"connection: close" in told.lower()
    nothing_happened(api)


# ------------------------------------------------------------------------------
# The key
# ------------------------------------------------------------------------------
def test_bearer_may_be_written_in_any_case(start_server: Callable[..., LocalServer]) -> None:
    api = Api(start_server(TIDEBASE_API_KEY=KEY).url)
    for scheme in ("Bearer", "bearer", "BEARER", "bEARER", "Bearer "):
        for method, path, body in PLACES:
            answer = api.send(method, path, body, headers={"authorization": f"{scheme} {KEY}"})
            assert answer.status in (200, 404), (scheme, answer)
    for header in (KEY, f"Basic {KEY}", f"Bearer{KEY}", f"Bearer\t{KEY}", f"Bearer {KEY} x", f"bearer Bearer {KEY}"):
        for method, path, body in PLACES:
            refused(api.send(method, path, body, headers={"authorization": header}), 401, "unauthorized")


# ------------------------------------------------------------------------------
# Run tokens
# ------------------------------------------------------------------------------
READ_KEY = "a-key-that-reads-of-16-characters"


def run_token(run: str, key: str = KEY, ttl_s: float = 60) -> str:
    return Tidebase("http://localhost", key).runs.token(run, ttl_s=ttl_s)


def signed(run: str, expiry: object, key: str = KEY, prefix: str = "tidebase-run-token.v1.") -> str:
    """A run token as the documentation has it, put together without the client."""
    mac = hmac.new(key.encode(), f"{prefix}{expiry}.{run}".encode(), hashlib.sha256).digest()
    return f"v1.{expiry}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"


def in_query(api: Api, path: str, token: str, method: str = "GET") -> Answer:
    query = urllib.parse.urlencode({"token": token})
    return api.send(method, f"{path}?{query}", headers={"accept": "application/json"})


def in_header(api: Api, path: str, token: str, method: str = "GET") -> Answer:
    headers = {"accept": "application/json", "authorization": f"Bearer {token}"}
    return api.send(method, path, headers=headers)


WAYS = (in_query, in_header)


@pytest.fixture
def locked(start_server: Callable[..., LocalServer]) -> LocalServer:
    """A server with both keys."""
    return start_server(TIDEBASE_API_KEY=KEY, TIDEBASE_READ_KEY=READ_KEY)


def test_a_run_token_is_what_the_documentation_says_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.25)
    # printf %s tidebase-run-token.v1.1800000901.run_1 | openssl dgst -sha256 -hmac "$KEY" -binary | basenc --base64url
    known = "v1.1800000901.AizEUQlLVUcGbTjqKk4tzR3Jcbx3OGP5JNcGbVD1EWs"
    for client in (Tidebase("http://localhost", KEY), AsyncTidebase("http://localhost", KEY)):
        assert client.runs.token("run_1") == known == signed("run_1", 1_800_000_901)  # a quarter of an hour
        assert client.runs.token("run_1", ttl_s=0.5) == signed("run_1", 1_800_000_001)
        for wrong in (0, -1, 86_401, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="ttl_s"):
                client.runs.token("run_1", ttl_s=wrong)
    for bare in (Tidebase("http://localhost"), AsyncTidebase("http://localhost", "")):
        with pytest.raises(TidebaseError, match="has no API key"):
            bare.runs.token("run_1")


@pytest.mark.parametrize("run", ["run_1", "v1.5.x", "1:2", "-", "." * 128])
def test_a_run_token_opens_the_events_of_its_run_whatever_its_id(locked: LocalServer, run: str) -> None:
    api, page = Api(locked.url, key=KEY), Api(locked.url)
    path = f"/runs/{urllib.parse.quote(api.create(id=run), safe='')}/events"
    for way in WAYS:
        for key in (KEY, READ_KEY):  # whoever may read may let a page read
            assert [event["type"] for event in way(page, path, run_token(run, key)).json] == ["run.created"]
        assert way(page, path, READ_KEY).status == way(page, path, KEY).status == 200


def test_a_run_token_opens_nothing_else(locked: LocalServer) -> None:
    api, page = Api(locked.url, key=KEY), Api(locked.url)
    run, other = api.create(), api.create()
    token, tried = run_token(run), 0
    for rule in tidebase.app.url_map.iter_rules():
        if rule.endpoint in tidebase.WITHOUT_KEY | {"routes.stream_events"}:
            continue
        for method in (rule.methods or set()) - {"OPTIONS"}:
            for way in WAYS:
                answer = way(page, re.sub("<[^>]+>", run, rule.rule), token, method)
                assert answer.status == 401, (rule, method, answer)
                tried += 1
    assert tried > 100
    for way in WAYS:
        refused(way(page, f"/runs/{other}/events", token), 401, "unauthorized")
        assert way(page, f"/runs/{run}/events", token, "HEAD").status == 200
        assert way(page, f"/runs/{run}/events", token, "DELETE").status == 401
        refused(way(page, "/runs/run_0/events", run_token("run_0")), 404, "not_found")
    assert len(api.get("/runs")["runs"]) == 2


def test_a_forged_run_token_opens_nothing(locked: LocalServer) -> None:
    api, page = Api(locked.url, key=KEY), Api(locked.url)
    run = api.create()
    token = run_token(run)
    version, expiry, mac = token.split(".")
    later = int(expiry) + 1
    last = mac[-1]
    forged = [
        f"{version}.{later}.{mac}", f"{version}.0{expiry}.{mac}", f"{version}.+{expiry}.{mac}", f"v2.{expiry}.{mac}",
        f"V1.{expiry}.{mac}", f"{expiry}.{mac}", f"{version}..{mac}", f"{version}.{expiry}.", f"{version}.{expiry}",
        f"{token}=", f"{token}.", f".{token}", f"{token}x", token[:-1], token.upper(), token.replace(mac, mac[::-1]),
        f"{version}.{expiry}.{mac[:-1]}{chr(ord(last) + 1)}", token.replace(".", ":"), f"{token} {token}",
        f"{version}.{run}.{expiry}.{mac}", f"{version}.{'9' * 400}.{mac}", "v1.", "..", "v1..",
        # signed by what is not the key, of another run, in another form, or for no number of seconds
        signed(run, later, ""), signed(run, later, "guess"), signed(run, later, KEY.upper()), signed(run + "x", later),
        signed("", later), signed("*", later), signed(run, later, prefix=""), signed(run, later, KEY, "v1."),
        signed(run, later, KEY, "tidebase-run-token.v2."), signed(f"1.{run}", later), signed(run, -later),
        signed(run, f"{later}.0"), signed(run, "9" * 13), signed(run, "\u0669" * 10), signed(run, f" {later}"),
        signed(run, ""), signed(run, "inf"), signed(run, f"1e{later}"),
    ]
    for way in WAYS:
        assert way(page, f"/runs/{run}/events", signed(run, later)).status == 200
        for each in forged:
            if way is in_query or each.isascii():
                refused(way(page, f"/runs/{run}/events", each), 401, "unauthorized")


def test_without_a_read_key_no_run_token_is_signed_by_it(start_server: Callable[..., LocalServer]) -> None:
    """The empty key is everybody's."""
    server = start_server(TIDEBASE_API_KEY=KEY)
    api, page = Api(server.url, key=KEY), Api(server.url)
    run = api.create()
    for way in WAYS:
        refused(way(page, f"/runs/{run}/events", signed(run, 99_999_999_999, "")), 401, "unauthorized")
        assert way(page, f"/runs/{run}/events", run_token(run)).status == 200


def test_a_run_token_counts_until_it_expires_by_the_servers_clock(locked: LocalServer) -> None:
    api, page = Api(locked.url, key=KEY), Api(locked.url)
    run = api.create()
    token = signed(run, 1000)
    for way in WAYS:
        locked.access.clock = lambda: 999.999
        assert way(page, f"/runs/{run}/events", token).status == 200
        locked.access.clock = lambda: 1000.0
        assert "expired" in refused(way(page, f"/runs/{run}/events", token), 401, "unauthorized")["error"]
        assert "expired" not in refused(way(page, f"/runs/{run}/events", signed(run, 900, "x")), 401,
                                        "unauthorized")["error"]


def test_what_a_run_token_reads_has_no_token_of_a_gate(locked: LocalServer) -> None:
    api, page = Api(locked.url, key=KEY), Api(locked.url)
    run = api.create()
    asked = {"name": "ok", "prompt": "?", "channels": [{"type": "webhook", "url": "http://127.0.0.1:9/"}]}
    gate = api.post(f"/runs/{run}/gates/begin", asked)["gate"]
    api.post(f"/runs/{run}/gates/{gate['id']}/resolve", {"token": gate["resolveToken"], "decision": "approved"})["gate"]
    left = api.post(f"/runs/{run}/gates/begin", {**asked, "name": "left"})["gate"]
    api.complete(run)["run"]
    token = run_token(run)
    texts = [in_header(page, f"/runs/{run}/events", token).text]
    for view in ("light", "full"):
        texts.append(page.get(f"/runs/{run}/events?follow=false&view={view}&token={token}").text)
    for text in texts:
        assert "gate.created" in text
        assert "gate.resolved" in text
        assert gate["resolveToken"] not in text
        assert left["resolveToken"] not in text


# ------------------------------------------------------------------------------
# What stands in ?token= is in no log
# ------------------------------------------------------------------------------
def leave(api: Api, path: str) -> Callable[[], None]:
    """Open a stream and read its first bytes.  :returns: what hangs up, with a reset."""
    connection = http.client.HTTPConnection(api.address, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 200
    response.readline()
    raw = connection.sock or response.fp.raw._sock  # http.client lets go of it when the answer ends with it

    def hang_up() -> None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        response.close()
        connection.close()

    return hang_up


LOGGED = "Client disconnected while serving", "Exception while serving"  # by waitress, with a request's path


def use_tokens(api: Api, sql: Callable[..., Any], log: Callable[[], str]) -> list[str]:
    """Send credentials in ?token= in every way that ends in some line of a log.  :returns: the credentials."""
    run, gone = api.create(), api.create()
    page, guess = Api(f"http://{api.address}"), "gu3ss"
    host, port = api.address.split(":")
    secrets = [guess]
    for token in (run_token(run), KEY, READ_KEY):
        query = urllib.parse.urlencode({"token": token})
        secrets += [token, query.partition("=")[2], urllib.parse.quote(token)]
        lines = [log().count(words) for words in LOGGED]
        leave(page, f"/runs/{run}/events?{query}")()  # a reader who goes away, noticed at the next event
        eventually(lambda: api.post(f"/runs/{run}/usage", {"quantity": 1})["usage"]
                   and log().count(LOGGED[0]) > lines[0])  # noqa: B023
        hang_up = leave(page, f"/runs/{run}/events?{query}")
        sql("alter function tidebase.list_events rename to list_events_away")
        try:
            answer = in_query(page, f"/runs/{run}/events", token)
            assert answer.status == 503
            assert token not in answer.text
            api.post(f"/runs/{run}/usage", {"quantity": 1})["usage"]
            eventually(lambda: log().count(LOGGED[1]) > lines[1])  # noqa: B023
        finally:
            sql("alter function tidebase.list_events_away rename to list_events")
        hang_up()
    for path in (f"/runs/{run}/events?token={guess}", f"/runs?token={guess}", f"/nothing?token={guess}",
                 f"/runs/{run}/events%3Ftoken={guess}", f"/runs/{run}/events?token={guess}%00",
                 f"/runs/{run}/events?token={guess}&token={guess}", f"/studio?token={guess}"):
        assert guess not in page.get(path).text
        assert guess not in api.get(path).text
    for target in (f"http://[?token={guess}", f"http://[::1?token={guess}/runs", f"/runs/{gone}/events?token={guess} x",
                   f"/{'x' * 70_000}?token={guess}", f"/runs?token={guess}\x00", f"//?token={guess}"):
        for version in ("HTTP/1.1", "HTTP/9.9", "HTCPCP/1.0"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                try:
                    connection.sendall(f"GET {target} {version}\r\nHost: localhost\r\n"
                                       "Connection: close\r\n\r\n".encode())
                    answer = b"".join(iter(lambda: connection.recv(65_536), b""))
                except ConnectionError:  # closed on what it was still sent
                    continue
            assert guess.encode() not in answer
    return secrets


def test_credentials_in_the_query_are_in_no_log_of_a_server_process(
        spawn_server: Callable[..., ServerProcess], sql: Callable[..., Any]) -> None:
    server = spawn_server(TIDEBASE_API_KEY=KEY, TIDEBASE_READ_KEY=READ_KEY)
    secrets = use_tokens(Api(server.url, key=KEY), sql, server.log.read_text)
    server.end(15)
    log = server.log.read_text()
    assert "schema_differs" in log
    for secret in secrets:
        assert secret not in log


def test_credentials_in_the_query_are_in_no_record_that_is_logged(
        locked: LocalServer, sql: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """Whoever takes the records elsewhere, with a format of their own, gets none either."""
    caplog.set_level(logging.DEBUG)
    secrets = use_tokens(Api(locked.url, key=KEY), sql, lambda: caplog.text)
    assert "schema_differs" in [getattr(record, "event", "") for record in caplog.records]
    logged = caplog.text + "".join(map(repr, (vars(record) for record in caplog.records)))
    for secret in secrets:
        assert secret not in logged


@pytest.mark.parametrize("line", [
    '127.0.0.1 - - "GET /runs/r/events?token={} HTTP/1.1" 200 -', "Client disconnected while serving /a?token={}",
    "/runs/r/events?after=5&token={}&follow=false", "Exception on /runs/r/events%3Ftoken%3D{}%26after%3D5 [GET]",
    "/runs/r/events?Token={}", "('/runs/r/events?token={}',)", "?token={}", 'x "http://h/?a=1;token={}"'])
def test_whatever_line_has_a_query_its_token_is_struck_from_it(line: str) -> None:
    """Also of a library that logs a request as a whole, which none does today: werkzeug's own server would."""
    format = tidebase.LogFormat("%(levelname)s %(message)s")
    for secret in ("s3cret", run_token("r"), "a%2Fb%26c;d'e\"+~f"):
        try:
            raise RuntimeError(line.format(secret))
        except RuntimeError as error:
            raised = (type(error), error, error.__traceback__)
        for record in (logging.LogRecord("werkzeug", logging.INFO, "x.py", 1, "%s", (line.format(secret),), raised),
                       logging.makeLogRecord({"msg": "x", "levelname": "INFO", "path": line.format(secret)})):
            text = format.format(record)
            assert secret not in text
            assert line.partition("{}")[0] + "***" in text
            assert ("follow=false" in text) == ("follow=false" in line), "what follows stays"


# ------------------------------------------------------------------------------
# A real browser
# ------------------------------------------------------------------------------
CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP evil.test 127.0.0.1, EXCLUDE 127.0.0.1, MAP * ~NOTFOUND"]
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs a chromium on PATH and the playwright of requirements-dev.txt")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page()
    yield page
    page.close()


@pytest.fixture(scope="module")
def evil_port() -> Iterator[int]:
    """A site with an empty page."""
    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>evil</title><iframe name=hole></iframe>")

        def log_message(self, *arguments: Any) -> None:
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    site.daemon_threads = True
    thread = threading.Thread(target=site.serve_forever, args=(0.02,), name="evil-site")
    thread.start()
    yield site.server_port
    site.shutdown()
    site.server_close()
    thread.join()


@in_a_browser
@pytest.mark.parametrize("name", ["evil.test", "127.0.0.1"])  # another site, and another program of this machine
def test_in_a_browser_no_page_of_another_origin_makes_the_server_do_anything(
        api: Api, page: Any, evil_port: int, name: str) -> None:
    page.goto(f"http://{name}:{evil_port}/")
    told: dict[str, int] = {}
    page.on("response", lambda response: told.setdefault(response.url.rpartition("/")[2], response.status))
    page.evaluate("""async server => {
        const text = JSON.stringify({input: {x: 1}})
        const post = {method: "POST", mode: "no-cors"}
        await fetch(server + "/runs/fetch", {...post, body: text})
        await fetch(server + "/runs/bare", post)
        await fetch(server + "/runs/blob", {...post, body: new Blob([text], {type: "text/plain"})})
        navigator.sendBeacon(server + "/runs/beacon", text)
        const form = document.createElement("form")
        form.method = "post", form.enctype = "text/plain", form.target = "hole", form.action = server + "/runs/form"
        const field = document.createElement("input")
        field.name = '{"input": {"x": "', field.value = '"}}'
        form.append(field), document.body.append(form), form.submit()
    }""", f"http://{api.address}")
    tried = {"fetch", "bare", "blob", "beacon", "form"}
    eventually(lambda: page.wait_for_timeout(10) or told.keys() >= tried)
    assert told == dict.fromkeys(tried, 403)
    # With what would be let in, the browser asks first.
    json_body = '{method: "POST", headers: {"content-type": "application/json"}, body: "{}"}'
    for how in (json_body, '{method: "DELETE"}', "{}"):
        failed = page.evaluate(f"""async server => await fetch(server + "/runs/asked", {how}).then(
            answer => answer.status, error => error.name)""", f"http://{api.address}")
        assert failed == "TypeError"
    nothing_happened(api)


@in_a_browser
def test_in_a_browser_a_name_that_was_rebound_reads_nothing(api: Api, page: Any) -> None:
    api.create("secret")
    rebound = f"http://evil.test:{api.address.split(':')[1]}"
    answer = page.goto(f"{rebound}/health")
    assert answer.status == 403
    for path in ("/runs", "/openapi.json"):
        told = page.evaluate("async path => { const answer = await fetch(path); return [answer.status, await "
                             "answer.text()] }", path)
        assert told[0] == 403
        assert "secret" not in told[1]
    assert page.evaluate("""async () => (await fetch("/runs/more", {method: "POST", body: "{}", headers: {
        "content-type": "application/json"}})).status""") == 403
    assert [run["workflowName"] for run in api.get("/runs")["runs"]] == ["secret"]


@in_a_browser
def test_in_a_browser_the_servers_own_pages_and_a_named_origin_are_let_in(
        api: Api, start_server: Callable[..., LocalServer], page: Any, evil_port: int) -> None:
    own = """async server => (await fetch(server + "/runs/own", {method: "POST", body: "{}", headers: {
        "content-type": "application/json"}})).status"""
    page.goto(f"http://{api.address}/health")
    assert page.evaluate(own, "") == 200
    page.goto(f"http://evil.test:{evil_port}/")
    page.evaluate("url => { const link = document.createElement('a'); link.href = url; link.textContent = 'Studio'; "
                  "document.body.append(link) }", f"http://{api.address}/studio")
    with page.expect_navigation() as followed:
        page.click("a")
    assert followed.value.status == 200
    named = Api(start_server(TIDEBASE_CORS_ORIGIN=f"http://evil.test:{evil_port}").url)
    page.goto(f"http://evil.test:{evil_port}/")
    assert page.evaluate(own, f"http://{named.address}") == 200


@in_a_browser
def test_in_a_browser_a_run_token_opens_the_live_events_of_one_run_and_nothing_else(
        start_server: Callable[..., LocalServer], page: Any, evil_port: int) -> None:
    origin = f"http://evil.test:{evil_port}"
    server = start_server(TIDEBASE_API_KEY=KEY, TIDEBASE_READ_KEY=READ_KEY, TIDEBASE_CORS_ORIGIN=origin)
    api = Api(server.url, key=KEY)
    run, other = api.create(), api.create()
    token = run_token(run)
    page.goto(origin)
    # EventSource reconnects by itself after whatever ends, but not after a refusal: then it is closed (2).
    page.evaluate("""() => { window.listen = (url, name) => new Promise(done => {
        const source = new EventSource(url), seen = window[name] = []
        source.onmessage = event => { seen.push(JSON.parse(event.data).type); done("open") }
        source.onerror = () => { if (source.readyState === 2) done("refused") } }) }""")
    listen, at = "([url, name]) => listen(url, name)", f"{server.url}/runs/{run}/events?token={token}"
    assert page.evaluate(listen, [at, "seen"]) == "open"
    api.complete(run)["run"]
    eventually(lambda: page.evaluate("seen.length") == 2)
    assert page.evaluate("seen") == ["run.created", "run.completed"]
    assert page.evaluate(listen, [f"{server.url}/runs/{other}/events?token={token}", "none"]) == "refused"
    assert page.evaluate(listen, [f"{server.url}/runs/{other}/events?token={READ_KEY}", "all"]) == "open"
    status = """async ([url, method, headers]) => (await fetch(url, {method, headers, body: method === "POST" ? "{}"
        : undefined})).status"""
    bearer = {"authorization": f"Bearer {token}"}
    for method, path in (("GET", "/runs"), ("GET", f"/runs/{run}"), ("GET", f"/runs/{other}/events"),
                         ("POST", f"/runs/{other}/cancel"), ("POST", "/runs/report"), ("DELETE", f"/runs/{run}")):
        json_type = {"content-type": "application/json"} if method == "POST" else {}
        assert page.evaluate(status, [server.url + path, method, {**bearer, **json_type}]) == 401
        assert page.evaluate(status, [f"{server.url}{path}?token={token}", method, json_type]) == 401
    accept = {"accept": "application/json"}
    assert page.evaluate(status, [at, "GET", accept]) == 200
    server.access.clock = lambda: time.time() + 61
    assert page.evaluate(status, [at, "GET", accept]) == 401
    assert page.evaluate(listen, [at, "late"]) == "refused"
    assert [each["id"] for each in api.get("/runs")["runs"]] == [other, run]
    assert api.run(other)["status"] == "pending"
