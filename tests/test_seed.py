"""The FastAPI guide, run as it stands: its app under uvicorn, its worker, the client copied in as tidebase.py.

Only workflows.py is the test's own, since the guide leaves it to the reader.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Answer, Api, Forked, eventually, fork_server, free_port

SECRET = "whsec-of-the-test"
KEY = "key-of-the-test"
WORKFLOWS = """
    import os, time
    from pathlib import Path

    HERE = Path(__file__).parent

    def slow(name):
        with open(HERE / "journal", "a") as journal:
            journal.write(f"{name} {os.getpid()}\\n")
        while name == "draft" and not (HERE / "go").exists():
            time.sleep(0.02)
        return name

    def generate_report(run, input):
        run.step("plan", lambda: slow("plan"), input=input)
        run.state.set({"phase": "drafting"})
        run.step("draft", lambda: slow("draft"), input=input)
        if input.get("hook"):
            channels = [{"type": "webhook", "url": input["hook"], "secret": "channel-secret"}]
            decision = run.gate("approve-send", "Send this?", channels=channels)
            return {"topic": input["topic"], "approved": decision.approved, "by": decision.actor}
        return {"topic": input["topic"]}
"""
WORKER = """
    from tidebase import Tidebase
    from workflows import generate_report

    tide = Tidebase()
    tide.workflow("generate-report", generate_report)
    tide.work(queues=["default"])  # blocks; retries/backoff/leases are Tidebase's problem
"""


class App:
    """The guide's files in a folder, its app served by uvicorn, and its workers."""

    def __init__(self, folder: Path, server_url: str) -> None:
        self.folder = folder
        shutil.copy(ROOT / "tidebase_sdk.py", folder / "tidebase.py")
        shutil.copy(ROOT / "examples/fastapi_app.py", folder / "fastapi_app.py")
        (folder / "workflows.py").write_text(textwrap.dedent(WORKFLOWS))
        (folder / "worker.py").write_text(textwrap.dedent(WORKER))
        self.environment = {**os.environ, "TIDEBASE_URL": server_url, "TIDEBASE_API_KEY": KEY,
                            "TIDEBASE_WEBHOOK_SECRET": SECRET, "PYTHONPATH": str(folder)}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.processes: list[Forked] = []
        self.start("-m", "uvicorn", "fastapi_app:app", "--port", str(self.port))
        eventually(self.answers, 30)

    def start(self, *arguments: str) -> Forked:
        with (self.folder / "log").open("ab") as log:
            self.processes.append(fork_server.start(*arguments, environment=self.environment, output=log.fileno(),
                                                    cwd=self.folder))
        return self.processes[-1]

    def answers(self) -> bool:
        assert self.processes[0].poll() is None, (self.folder / "log").read_text()
        try:
            return self.send("GET", "/openapi.json").status == 200
        except OSError:
            return False

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None,
                               {"content-type": "application/json", **headers})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def journal(self) -> list[str]:
        path = self.folder / "journal"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def guide(spawn_server: Callable[..., Any], tmp_path: Path) -> Iterator[tuple[App, Api]]:
    server = spawn_server(TIDEBASE_LEASE_MS=1000, TIDEBASE_API_KEY=KEY, TIDEBASE_WEBHOOK_SECRET=SECRET)
    app = App(tmp_path, server.url)
    yield app, Api(server.url, key=KEY)
    app.close()


def test_the_app_is_the_guides_own_code():
    seed = ROOT.parent / "shared" / "seed-fastapi.txt"
    if not seed.exists():
        pytest.skip("the guide's text is not beside this checkout")
    code = seed.read_text().split("\n\nfrom fastapi import")[1].split("\n\nTidebase is an open-source")[0]
    assert "from fastapi import" + code in (ROOT / "examples/fastapi_app.py").read_text()
    assert textwrap.dedent(WORKER).strip() in seed.read_text()


def test_a_double_submit_makes_one_run_that_survives_the_death_of_its_worker(guide):
    app, _ = guide
    first = app.send("POST", "/reports", {"topic": "tides"})["runId"]
    assert app.send("POST", "/reports", {"topic": "tides"})["runId"] == first
    assert app.send("POST", "/reports", {"topic": "winds"})["runId"] != first
    assert app.send("GET", f"/reports/{first}").json == {"status": "queued", "state": None}
    worker = app.start("worker.py")
    eventually(lambda: "draft" in app.journal())
    status = app.send("GET", f"/reports/{first}").json
    assert status["status"] == "running"
    assert status["state"]["value"] == {"phase": "drafting"}
    worker.kill()
    worker.wait()
    (app.folder / "go").touch()
    app.start("worker.py")
    eventually(lambda: app.send("GET", f"/reports/{first}")["status"] == "completed")
    eventually(lambda: len(app.journal()) == 5)  # tides: plan, draft, draft again; winds: plan, draft
    assert sorted(app.journal()) == ["draft", "draft", "draft", "plan", "plan"]


def test_a_recovery_webhook_is_verified_and_the_run_resumed_and_a_forged_one_gets_401(guide):
    app, api = guide
    (app.folder / "go").touch()
    run = api.create("generate-report", input={"topic": "tides"}, recoveryWebhook=f"{app.url}/tidebase")
    api.begin(run, "a-process-that-dies")
    eventually(lambda: api.run(run)["status"] == "completed", 20)  # its lease expired, and the app was asked to resume
    assert api.run(run)["result"] == {"topic": "tides"}
    eventually(lambda: api.detail(run)["recoveryAttempts"][0]["status"] == "delivered")
    attempt = api.detail(run)["recoveryAttempts"][0]
    assert attempt["reason"] == "lease_expired"
    assert attempt["httpStatus"] == 200
    forged = {"type": "run.resume", "runId": run, "workflowName": "generate-report", "reason": "manual", "attempt": 1}
    assert app.send("POST", "/tidebase", forged).status == 401
    assert app.send("POST", "/tidebase", forged, **{"x-tidebase-signature": "sha256=" + "0" * 64}).status == 401


def test_a_gate_is_shown_by_the_client_and_resolved_with_what_its_webhook_brought(guide, receiver, tmp_path):
    app, api = guide
    (app.folder / "go").touch()
    app.start("worker.py")
    run = api.post("/queues/default/enqueue", {"workflowName": "generate-report",
                                               "input": {"topic": "tides", "hook": receiver.url}})["run"]["id"]
    [webhook] = receiver.wait_for(1)
    # `tide.runs.get` shows it to the product …
    look = f"import json, tidebase; print(json.dumps(tidebase.Tidebase().runs.get({run!r})['gates']))"
    shown = subprocess.run(
        [sys.executable, "-c", look],
        env=app.environment, cwd=app.folder, capture_output=True, text=True, check=True).stdout
    [gate] = json.loads(shown)
    assert (gate["name"], gate["prompt"], gate["status"]) == ("approve-send", "Send this?", "pending")
    # … and whoever has the webhook's resolveUrl and resolveToken decides it, without the API key.
    told = webhook["payload"]["gate"]
    decision = {"token": told["resolveToken"], "decision": "approved", "actor": "ann"}
    answer = urllib.request.urlopen(urllib.request.Request(
        told["resolveUrl"], json.dumps(decision).encode(), {"content-type": "application/json"}))
    assert json.load(answer)["gate"]["status"] == "approved"
    eventually(lambda: api.run(run)["status"] == "completed")
    assert api.run(run)["result"] == {"topic": "tides", "approved": True, "by": "ann"}
