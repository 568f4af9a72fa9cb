"""docs/nginx.conf, in a real nginx in front of a real server: ordinary use goes through, and what strangers send slowly
or too often does not get there."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import ROOT, Api, LocalServer, config, eventually, free_port, refused

import tidebase
from tidebase_server import events as event_streams

KEY = "a-key-of-more-than-16-characters"
CONFIGURATION = (ROOT / "docs/nginx.conf").read_text()
PROGRAM = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="nginx is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address of this machine on Linux alone"),
]


class Nginx:
    """A running nginx with docs/nginx.conf, changed where a test must: its ports, its files, and shorter times."""

    def __init__(self, folder: Path, upstream: str, **changes: str) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        text = CONFIGURATION
        for old, new in {"listen 80;": f"listen 127.0.0.1:{self.port};", "127.0.0.2:7373": upstream,
                         "/var/log/nginx/tidebase.log": f"{folder}/access.log", **changes}.items():
            assert old in text, f"docs/nginx.conf has no {old!r} any more"
            text = text.replace(old, new)
        (folder / "tidebase.conf").write_text(text)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        (folder / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {folder}/pid; events {{ worker_connections 1024; }}\n"
            f"http {{ {paths} include {folder}/tidebase.conf; }}\n")
        self.log = folder / "error.log"
        self.process = subprocess.Popen([str(PROGRAM), "-p", str(folder), "-c", "nginx.conf", "-e", str(self.log)],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with suppress(ConnectionError), self.connect():
            return True
        return False

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def server(start_server: Callable[..., LocalServer]) -> LocalServer:
    """As docs/operating.md has it behind nginx: on an address of this machine that counts as one others can reach."""
    return start_server(HOST="127.0.0.2", TIDEBASE_API_KEY=KEY, TIDEBASE_PUBLIC_URL="https://tide.example")


@pytest.fixture
def start_nginx(server: LocalServer, tmp_path: Path) -> Iterator[Callable[..., Nginx]]:
    """Starts it in front of the server; `changes` are texts of docs/nginx.conf and what to have instead."""
    started: list[Nginx] = []

    def start(changes: dict[str, str] | None = None) -> Nginx:
        folder = tmp_path / f"nginx-{len(started)}"
        folder.mkdir()
        started.append(Nginx(folder, server.url.removeprefix("http://"), **(changes or {})))
        return started[-1]

    yield start
    for nginx in started:
        nginx.close()


def connections_to(server: LocalServer) -> int:
    """How many connections this machine has to the server, as the system counts them."""
    port = server.listener.getsockname()[1]
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_what_it_says_agrees_with_the_server():
    [most] = re.findall(r"client_max_body_size (\d+);", CONFIGURATION)
    assert int(most) == config().max_body
    [seconds] = re.findall(r"proxy_read_timeout (\d+)s;", CONFIGURATION)
    assert int(seconds) > max(tidebase.MAX_WAIT_MS / 1000, event_streams.BEAT_SECONDS) + 10
    # Listening there, it counts as reachable, so that webhooks do not get into the networks of this machine.
    assert not config(HOST="127.0.0.2", TIDEBASE_API_KEY=KEY).webhook_targets().on_loopback


def test_ordinary_requests_go_through(start_nginx):
    nginx = start_nginx()
    with tidebase.Tidebase(nginx.url, api_key=KEY) as tide:
        tide.workflow("greet", lambda run, input: run.step("greet", lambda: f"Hello, {input}!"))
        assert tide.run("greet", run_id="a", input="ada") == "Hello, ada!"
        tide.enqueue("greet", input="bob", queue="team/a")
        ended: list[bool] = []
        tide.work("team/a", on_error=lambda *_: ended.append(False), poll_s=0.1, stop=lambda: bool(
            ended or tide.runs.list(workflow="greet", status="completed")[1:]))
        assert tide.runs.list(queue="team/a")[0]["result"] == "Hello, bob!"
        assert len(tide.runs.create("report", "x" * 2_000_000)["input"]) == 2_000_000
    api = Api(nginx.url, key=KEY)
    refused(Api(nginx.url).get("/runs"), 401, "unauthorized")
    refused(Api(nginx.url, key="guessed").post("/runs/report"), 401, "unauthorized")
    refused(api.get("/runs/none"), 404, "not_found")
    assert api.get("/health").headers["cache-control"] == "no-store"
    # Its own pages may ask, and no others: Host gets there as it was sent.
    own, other = {"host": "tide.example", "origin": "http://tide.example"}, {"origin": "http://evil.example"}
    assert api.post("/runs/report", headers=own).status == 200
    refused(api.post("/runs/report", headers={**own, **other}), 403, "foreign_origin")
    forwarded = {"x-forwarded-host": "evil.example", "x-forwarded-proto": "http", "forwarded": "host=evil.example"}
    refused(api.post("/runs/report", headers={**forwarded, **other}), 403, "foreign_origin")


def test_a_path_reaches_the_server_as_it_was_sent(start_nginx):
    api = Api(start_nginx().url, key=KEY)
    names = ["team/a", "a//b", "a/../b", "%2F", "a?b#c", "ü x", "+"]
    for name in names:
        assert api.put(f"/queues/{quote(name, safe='')}/config", {"concurrency": 1}).status == 200, name
    assert sorted(queue["name"] for queue in api.get("/queues")["queues"]) == sorted(names)


def test_an_event_stream_is_live(start_nginx):
    api = Api(start_nginx().url, key=KEY)
    run = api.create()
    with tidebase.Tidebase(f"http://{api.address}", api_key=KEY) as tide, tide.runs.subscribe(run) as events:
        assert next(events)["type"] == "run.created"
        for label in "abc":  # each is there before the next is written
            api.put(f"/runs/{run}/state", {"value": label})["state"]
            assert next(events)["payload"]["value"] == label
        api.complete(run)["run"]
        assert [event["type"] for event in events] == ["run.completed"]


def test_a_claim_that_waits_is_answered_when_there_is_work(start_nginx, server):
    api = Api(start_nginx().url, key=KEY)
    with ThreadPoolExecutor(1) as pool:
        claim = pool.submit(api.claim, "q", waitMs=20_000)
        eventually(lambda: server.watcher.long_polls)
        run = api.enqueue("q")
        assert [claimed["id"] for claimed in claim.result(15)] == [run]


def test_half_sent_heads_do_not_reach_the_server_and_end(start_nginx, server):
    nginx = start_nginx({"client_header_timeout 10s": "client_header_timeout 1s"})
    with ExitStack() as opened:
        halves = [opened.enter_context(nginx.connect()) for _ in range(200)]
        for half in halves:
            half.sendall(b"GET /runs HTTP/1.1\r\nHost: tide.example\r\nX-A: ")
        dripping = threading.Event()

        def drip() -> None:
            while not dripping.wait(0.1):
                with suppress(OSError):
                    halves[0].sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert Api(nginx.url, key=KEY).get("/runs").status == 200  # others are served meanwhile
            assert connections_to(server) <= 1  # that one's
            for half in halves:
                with suppress(ConnectionResetError):
                    while half.recv(1000):
                        pass  # the words of a 408
        finally:
            dripping.set()
            thread.join()


def test_of_an_upload_without_a_key_nothing_is_stored(start_nginx, server):
    nginx = start_nginx()
    body = b'{"input": "' + b"x" * 1_000_000 + b'"}'
    with nginx.connect() as stranger:
        stranger.sendall(b"POST /runs/report HTTP/1.1\r\nHost: tide.example\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n" % len(body) + body[:500_000])
        eventually(lambda: connections_to(server) or select.select([stranger], [], [], 0)[0])
        assert os.listdir(nginx.folder / "client_body") == []
        with suppress(ConnectionError):  # it may have been refused by now
            stranger.sendall(body[500_000:])
        # 502 when the server closed the connection, which it may do after its 401, before nginx had sent it all.
        assert stranger.recv(1000).split()[1] in (b"401", b"502")
    assert os.listdir(nginx.folder / "client_body") == []
    assert Api(server.url, key=KEY).get("/runs")["runs"] == []


def test_a_body_that_is_too_large_is_refused_as_the_server_does(start_nginx):
    api = Api(start_nginx({"client_max_body_size 16777216": "client_max_body_size 2000"}).url, key=KEY)
    refused(api.post("/runs/report", {"input": "x" * 2000}), 413, "body_too_large")
    assert api.post("/runs/report", {"input": "x" * 1000}).status == 200


@pytest.mark.parametrize("is_known", [False, True])
def test_an_address_has_its_share_of_requests_unless_it_is_known(start_nginx, is_known):
    known = {"# 203.0.113.7 0;": "127.0.0.1 0;"} if is_known else {}
    api = Api(start_nginx({"rate=50r/s": "rate=1r/m", "burst=100": "burst=5", **known}).url, key=KEY)
    answers = [api.get("/health") for _ in range(8)]
    assert [answer.status for answer in answers] == [200] * 8 if is_known else [200] * 6 + [429] * 2
    if not is_known:
        refused(answers[-1], 429, "too_many_requests")
        assert answers[-1].headers["retry-after"] == "1"


def test_an_address_has_its_share_of_requests_that_wait(start_nginx, server):
    api = Api(start_nginx({"tidebase_connections 50": "tidebase_connections 2"}).url, key=KEY)
    with ThreadPoolExecutor(2) as pool:
        claims = [pool.submit(api.claim, "q", waitMs=20_000) for _ in range(2)]
        eventually(lambda: len(server.watcher.long_polls) == 2)
        refused(api.get("/runs"), 429, "too_many_requests")
        for _ in claims:
            Api(server.url, key=KEY).enqueue("q")
        assert [len(claim.result(15)) for claim in claims] == [1, 1]
    assert api.get("/runs").status == 200


def test_with_the_tls_lines_it_serves_https_and_its_access_log_has_no_token(start_nginx):
    pem, port = ROOT / "tests/receiver.test.pem", free_port()
    nginx = start_nginx({
        "# listen 443 ssl http2;": f"listen 127.0.0.1:{port} ssl http2;",
        "# ssl_certificate /etc/letsencrypt/live/tide.example/fullchain.pem;": f"ssl_certificate {pem};",
        "# ssl_certificate_key /etc/letsencrypt/live/tide.example/privkey.pem;": f"ssl_certificate_key {pem};"})
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=trusting)
    run = Api(nginx.url, key=KEY).create()
    connection.request("GET", f"/runs/{run}/events?token={quote(KEY)}", headers={"accept": "application/json"})
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())[0]["type"]) == (200, "run.created")
    connection.close()
    log = nginx.folder / "access.log"
    eventually(lambda: f"/runs/{run}/events" in log.read_text())
    assert "token" not in log.read_text()
