"""The examples do what their docstrings say, run as they say: a worker process, and the app under uvicorn."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Api, Forked, eventually, fork_server, free_port


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
    """A GET, or a POST of `data`, as a browser sends it: redirects are followed."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Example:
    """One example's processes, started from the repository as its docstring says, against a server of the test's."""

    def __init__(self, name: str, server: Any, folder: Path) -> None:
        self.name, self.api, self.log = name, Api(server.url), folder / "log"
        self.environment = {**os.environ, "TIDEBASE_URL": server.url, "PAYMENTS_SECRET": "s", "DRIP_DAY_S": "0.5"}
        self.processes: list[Forked] = []

    def start(self, *arguments: str) -> Forked:
        with self.log.open("ab") as log:
            self.processes.append(fork_server.start("-m", *arguments, environment=self.environment,
                                                    output=log.fileno(), cwd=ROOT))
        return self.processes[-1]

    def work(self) -> None:
        self.start(f"examples.{self.name}", "work")

    def serve(self) -> str:
        """Start the app.  :returns: its address."""
        port = free_port()
        self.start("uvicorn", f"examples.{self.name}:app", "--port", str(port))
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert self.processes[-1].poll() is None, self.log.read_text()
            try:
                return ask(url + "/docs")[0] == 200
            except OSError:
                return False

        eventually(answers, 30)
        return url

    def ended(self, run_id: str) -> Any:
        """The run, once it has ended."""
        def run() -> Any:
            told = self.api.run(run_id)
            return told if told["status"] in ("completed", "failed", "cancelled") else None

        return eventually(run, 30)


@pytest.fixture
def example(spawn_server: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[[str], Example]]:
    made: list[Example] = []

    def make(name: str) -> Example:
        made.append(Example(name, spawn_server(), tmp_path))
        return made[-1]

    yield make
    for one in made:
        for process in one.processes:
            process.kill()
            process.wait(10)


def test_approvals_shows_the_pending_gate_and_sends_what_was_approved(example: Callable[[str], Example]) -> None:
    approvals = example("approvals")
    url = approvals.serve()
    approvals.work()
    assert ask(url + "/letters", urllib.parse.urlencode({"to": "Ada <3"}).encode())[0] == 200
    [run] = approvals.api.get("/runs")["runs"]
    letter = f"{url}/letters/{run['id']}"
    eventually(lambda: "Send it" in ask(letter)[1], 30)
    page = ask(letter)[1]
    assert "Send this to Ada &lt;3?" in page
    assert "resolveToken" not in page
    assert approvals.api.detail(run["id"])["gates"][0]["resolveToken"] not in page
    assert ask(letter, b"decision=approved")[0] == 200
    assert approvals.ended(run["id"])["result"] == {"sent": True, "by": "ada"}
    assert "completed" in ask(letter)[1]
    assert "sent to Ada" in approvals.log.read_text()
    assert ask(f"{url}/letters/run_none")[0] == 404


def test_drip_sends_each_message_once_though_its_worker_is_replaced(example: Callable[[str], Example]) -> None:
    drip = example("drip")
    for _ in range(2):
        assert drip.start("examples.drip", "ada@example.org").wait(30) == 0
    [run] = drip.api.get("/runs")["runs"]
    drip.work()
    eventually(lambda: drip.api.run(run["id"])["status"] == "waiting", 30)
    drip.processes[-1].kill()
    drip.work()
    messages = ["Welcome", "Three things to try", "How is it going?"]
    assert drip.ended(run["id"])["result"] == messages
    assert [line for line in drip.log.read_text().splitlines() if line.startswith("to ")] == [
        f"to ada@example.org: {message}" for message in messages]


def test_webhook_signal_delivers_when_the_signed_payment_came(example: Callable[[str], Example]) -> None:
    shop = example("webhook_signal")
    url = shop.serve()
    shop.work()
    run_id = json.loads(ask(url + "/orders", b'{"item": "tea"}')[1])["runId"]
    payment = json.dumps({"reference": run_id, "cents": 500}).encode()
    assert ask(url + "/payments", payment)[0] == 401
    signature = hmac.new(b"s", payment, hashlib.sha256).hexdigest()
    assert [ask(url + "/payments", payment, **{"x-signature": signature})[0] for _ in range(2)] == [200, 200]
    assert shop.ended(run_id)["result"] == {"status": "delivered", "item": "tea"}
    assert json.loads(ask(f"{url}/orders/{run_id}")[1])["status"] == "completed"
