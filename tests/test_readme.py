"""What the README, SECURITY.md and docs/ print runs as printed.

A Python block is saved under the name in its first line, beside the client that is copied in as tidebase.py, and
started as a reader would. A shell block runs in a copy of the repository, whose .venv is the environment that these
tests run in: what the blocks install is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Answer, Api, Forked, eventually, fork_server, free_port
from packaging.requirements import Requirement

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (
    ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
PROGRAMS: dict[str, str] = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", TEXT, re.M | re.S))
SH_BLOCKS = {name: re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) for name, text in PAGES.items()}
DEMO, TESTS, APP = SH_BLOCKS["README.md"]
PSQL, KEY = SH_BLOCKS["docs/operating.md"]
SECRET = "the-secret-of-the-test"


class Folder:
    """A reader's folder with the README's programs, and what was started in it."""

    def __init__(self, path: Path, server_url: str) -> None:
        self.path, self.environment = path, {
            **os.environ, "TIDEBASE_URL": server_url, "TIDEBASE_WEBHOOK_SECRET": SECRET, "PYTHONPATH": str(path)}
        self.workers: list[Forked] = []
        shutil.copy(ROOT / "tidebase_sdk.py", path / "tidebase.py")
        for name, text in PROGRAMS.items():
            (path / name).write_text(text)

    def work(self, name: str, *arguments: str) -> None:
        """Start a program, or a module with arguments, that goes on until it is stopped."""
        with (self.path / f"{name}.log").open("wb") as log:
            self.workers.append(fork_server.start(*(["-m"] if arguments else []), name, *arguments, cwd=self.path,
                                                  environment=self.environment, output=log.fileno()))

    def run(self, name: str) -> list[str]:
        """Run a program to its end.  :returns: the lines that it printed."""
        status, printed = fork_server.run(name, environment=self.environment, cwd=self.path)
        assert status == 0, printed + "".join(log.read_text() for log in self.path.glob("*.log"))
        return printed.splitlines()


@pytest.fixture
def folder(spawn_server: Callable[..., Any], tmp_path: Path) -> Iterator[Folder]:
    made = Folder(tmp_path, spawn_server(TIDEBASE_WEBHOOK_SECRET=SECRET).url)
    yield made
    for worker in made.workers:
        worker.kill()
        worker.wait(10)


class Checkout:
    """A copy of the repository in which its shell blocks run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Blocks must not change the environment that they share with these tests, nor load anything.
        self.environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        shutil.copytree(ROOT, path, ignore=shutil.ignore_patterns(".*", "__pycache__", "reports", "tests", "bench"))
        (path / ".venv").symlink_to(sys.prefix)

    def run(self, block: str, seconds: float = 120, **environment: str) -> str:
        """Run a block; what it started in the background goes on until `end`.  :returns: what was printed."""
        printed = self.path / "printed"
        with printed.open("w") as out:
            process = subprocess.Popen(["bash", "-euo", "pipefail", "-c", block], cwd=self.path, stdout=out, stderr=out,
                                       env={**self.environment, **environment}, start_new_session=True)
        self.session = process.pid
        try:
            assert process.wait(seconds) == 0, printed.read_text()
        except BaseException:
            self.end()
            raise
        return printed.read_text()

    def end(self) -> None:
        """End what the last block left running."""
        with suppress(ProcessLookupError):
            os.killpg(self.session, signal.SIGTERM)
        eventually(lambda: not self.is_at_work())

    def is_at_work(self) -> bool:
        try:
            os.killpg(self.session, 0)
        except ProcessLookupError:
            return (self.path / ".tidebase/postgres/postmaster.pid").exists()
        return True


@pytest.fixture
def checkout() -> Iterator[Checkout]:
    if sys.prefix == sys.base_prefix:
        pytest.skip("these tests do not run in a virtual environment, which the blocks use")
    with tempfile.TemporaryDirectory(prefix="tidebase-") as folder:
        Path(folder).chmod(0o755)  # started by root, PostgreSQL is another user's
        yield Checkout(Path(folder) / "copy")


def is_installed_as_locked() -> bool:
    """Else the block would change the environment that runs these tests."""
    lines = re.findall(r"^[\w.-]+(?:\[.*\])?==[^\\\n]+", (ROOT / "requirements-dev.lock").read_text(), re.M)
    locked = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]
    try:
        return all(metadata.version(one.name) in one.specifier for one in locked)
    except metadata.PackageNotFoundError:
        return False


def test_every_python_block_has_a_name_and_is_run_here():
    assert len(PROGRAMS) == TEXT.count("```python")
    assert set(PROGRAMS) == {"greet.py", "resume.py", "order_worker.py", "order.py", "campaign_worker.py",
                             "campaign.py", "pay.py", "outreach.py"}


def test_every_sh_block_is_run_here_but_that_of_the_tests_which_is_how_they_are_run():
    assert sum(map(len, SH_BLOCKS.values())) == TEXT.count("```sh") == 5
    assert TESTS.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert TESTS.endswith("&& .venv/bin/python -m pytest -q\n")
    assert "block == 2" in (ROOT / ".ci/run").read_text()


def test_links_lead_to_files():
    for name, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert ((ROOT / name).parent / link).exists(), f"{name} links to {link}"


def test_greet_answers_twice_the_same(folder: Folder):
    assert [folder.run("greet.py") for _ in range(2)] == [["Hello, Ada!"]] * 2


def test_pay_charges_under_one_key_however_often_it_is_started(folder: Folder):
    [charged] = folder.run("pay.py")
    assert re.fullmatch(r"600 cents, key [0-9a-f-]{36}", charged)
    assert folder.run("pay.py") == [charged]
    detail = Api(folder.environment["TIDEBASE_URL"]).detail("run_pay")
    assert [step["name"] for step in detail["steps"]] == ["price", "price#2", "key", "charge"]


def test_outreach_is_told_what_is_safe_and_goes_on_when_it_was_decided(folder: Folder):
    assert folder.run("outreach.py") == [
        "Not without you: 'send' may have had its effect. Decide below.", "draft replays", "send stops_for_review",
        "Safe: 2 steps replay.", "sent: Dear Ada"]
    assert folder.run("outreach.py") == []  # it has ended, and is not begun again


def test_resume_runs_what_a_signed_webhook_asks_for(folder: Folder):
    api, port = Api(folder.environment["TIDEBASE_URL"]), free_port()
    folder.work("uvicorn", "resume:app", "--port", str(port))
    app = Api(f"http://127.0.0.1:{port}")

    def forged() -> Answer | None:
        with suppress(ConnectionError):
            return app.post("/tidebase", {"type": "run.resume", "runId": "x", "workflowName": "report"})
        return None

    assert eventually(forged, 30).status == 401
    run = api.create("report", input={"topic": "tides"}, recoveryWebhook=f"http://127.0.0.1:{port}/tidebase")
    api.post(f"/runs/{run}/recover")["recoveryAttempt"]
    assert eventually(lambda: api.run(run)["result"], 30) == "All about tides"


def test_order_waits_for_a_person_a_payment_a_while_and_its_parts(folder: Folder):
    folder.work("order_worker.py")
    assert folder.run("order.py") == ["['cup is made', 'lid is made']"]


def test_campaign_is_followed_forked_and_scheduled(folder: Folder):
    folder.work("campaign_worker.py")
    *events, forked, next_run = folder.run("campaign.py")
    assert events[-1].endswith("run.completed")
    assert [line.split()[0] for line in events] == [str(n) for n in range(1, len(events) + 1)]
    assert forked == "Dear Ada"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT0[78]:00:00\.000Z", next_run)


def test_the_demo_shows_a_worker_that_is_killed_and_another_that_finishes(checkout: Checkout, spawn_server):
    """All but the making of .venv, which .ci/run does as printed: the demo, on a server that there is already."""
    make, install, demo = DEMO.split(" && ")
    assert (make, install) == ("python3 -m venv .venv",
                               ".venv/bin/pip install -q --require-hashes -r requirements.lock")
    printed = checkout.run(demo, TIDEBASE_URL=spawn_server().url)
    assert "0 completed steps were executed twice" in printed
    assert list((checkout.path / "reports").glob("asyncio-*.md"))


def test_the_fastapi_app_its_worker_and_a_server_make_a_report(checkout: Checkout):
    if not is_installed_as_locked():
        pytest.skip("what is installed here is not what requirements-dev.lock has")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    for port in (7373, 8000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port}, which the block uses, is taken")
    try:
        [answer] = re.findall(r'\{"runId":.*?\}', checkout.run(APP))
        run_id = json.loads(answer)["runId"]
        assert eventually(lambda: Api("http://localhost:8000").get(f"/reports/{run_id}")["status"] == "completed", 60)
        assert list((checkout.path / "reports").glob("asyncio-*.md"))
    finally:
        checkout.end()


def test_psql_gets_into_the_embedded_postgresql_with_its_password(embedded: Any):
    if shutil.which("psql") is None:
        pytest.skip("psql is not installed")
    if embedded is None:
        pytest.skip("these tests use the PostgreSQL of DATABASE_URL")
    with tempfile.TemporaryDirectory(prefix="tidebase-") as folder:  # a path that is short enough for a socket
        (Path(folder) / ".tidebase").symlink_to(embedded[0].data_dir)
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", PSQL], cwd=folder, input="select 40 + 2 as answer;",
                              capture_output=True, text=True, timeout=60)
    assert "42" in done.stdout, done.stderr


def test_a_key_is_made(checkout: Checkout):
    assert re.fullmatch(r"[\w-]{43}\n", checkout.run(KEY))
