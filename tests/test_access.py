"""Who may ask: a web page in a browser on this machine may not, whatever it tries, unless it is named; clients may.

The attacks are sent as a browser sends them, byte by byte, and then by a real Chromium.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Answer, Api, LocalServer, eventually, refused

JSON = {"content-type": "application/json"}
KEY = "a key of more than 16 characters"
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
    assert api.get("/docs", headers=link).status == 200  # somebody follows it; in a frame it would be a page's
    refused(api.get("/docs", headers={**link, "sec-fetch-dest": "iframe"}), 403, "foreign_origin")
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
    page.evaluate("url => { const link = document.createElement('a'); link.href = url; link.textContent = 'docs'; "
                  "document.body.append(link) }", f"http://{api.address}/docs")
    with page.expect_navigation() as followed:
        page.click("a")
    assert followed.value.status == 200
    named = Api(start_server(TIDEBASE_CORS_ORIGIN=f"http://evil.test:{evil_port}").url)
    page.goto(f"http://evil.test:{evil_port}/")
    assert page.evaluate(own, f"http://{named.address}") == 200
