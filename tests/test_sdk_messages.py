"""What a user reads when something goes wrong: a traceback of their own code, and log lines that say where and what.

Logs are read as a default formatter writes them, which shows no extras.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_sdk
from conftest import ROOT, Api, eventually, free_port
from test_sdk import in_background

import tidebase_sdk
from tidebase_sdk import RunCancelled, Tidebase, new_run_id

actor, tide, working = test_sdk.actor, test_sdk.tide, test_sdk.working  # fixtures

BLOCKING = """
from tidebase import Tidebase

def fetch(page):
    return page["number"]

def flow(run, input):
    try:
        input["missing"]
    except KeyError:
        pass
    {step}

def main():
    with Tidebase({url!r}, timeout_s=0.2) as tide:
        {call}

main()
"""
AWAITED = """
import asyncio
from tidebase import AsyncTidebase

async def fetch(page):
    return page["number"]

async def flow(run, input):
    try:
        input["missing"]
    except KeyError:
        pass
    {step}

async def main():
    async with AsyncTidebase({url!r}, timeout_s=0.2) as tide:
        {call}

asyncio.run(main())
"""


def last_words(folder: Path, program: str, url: str, call: str, step: str = "pass") -> str:
    """What a program prints that ends with an exception, the frames of asyncio.run aside."""
    (folder / "tidebase.py").write_text((ROOT / "tidebase_sdk.py").read_text())
    if program is AWAITED:
        call, step = (re.sub(r"^((?:return )?)(?=tide|run)", r"\1await ", text) for text in (call, step))
    source = textwrap.dedent(program).format(url=url, call=call, step=step)
    (folder / "app.py").write_text(source)
    done = subprocess.run([sys.executable, "app.py"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    return done.stderr


def functions(printed: str) -> list[str]:
    """The functions of the program that a traceback shows, and the files of all other frames."""
    frames = re.findall(r'File "(.*)", line \d+, in (\S+)', printed)
    return [name if file.endswith("app.py") else file.rpartition("/")[2] for file, name in frames
            if "/asyncio/" not in file]


@pytest.mark.parametrize("program", [BLOCKING, AWAITED], ids=["blocking", "awaited"])
@pytest.mark.parametrize("options", ["", ", timeout_s=5", ", side_effects='email', idempotency_key='k'"])
def test_a_traceback_shows_the_users_frames_alone(server: Any, tmp_path: Path, program: str, options: str) -> None:
    printed = last_words(tmp_path, program, server.url, "tide.run('flow', flow, input={'page': 1})",
                         f"return run.step('fetch', fetch, input={{'page': 1}}{options})")
    assert functions(printed) == ["<module>", "main", "flow", "fetch"], printed
    assert printed.strip().endswith("KeyError: 'number'")
    assert "During handling" not in printed
    assert "direct cause" not in printed


@pytest.mark.parametrize("program", [BLOCKING, AWAITED], ids=["blocking", "awaited"])
@pytest.mark.parametrize(("call", "error"), [
    ("tide.runs.get('nobody')", "TidebaseError"),
    ("tide.run('unknown')", "ValueError"),
    ("tide.enqueue('flow', input={1, 2})", "TypeError"),
    ("tide.schedules.set('s', cron='0 25 * * *', workflow_name='flow')", "TidebaseError"),
])
def test_an_error_of_ours_ends_at_the_line_that_called_us(
    server: Any, tmp_path: Path, program: str, call: str, error: str
) -> None:
    printed = last_words(tmp_path, program, server.url, call)
    assert functions(printed) == ["<module>", "main"], printed
    assert re.search(rf"^(tidebase\.)?{error}: ", printed, re.M)
    assert "During handling" not in printed


@pytest.mark.parametrize("program", [BLOCKING, AWAITED], ids=["blocking", "awaited"])
def test_a_server_that_is_away_is_told_in_a_few_lines(tmp_path: Path, program: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    printed = last_words(tmp_path, program, url, "tide.enqueue('flow')")
    assert functions(printed) == ["<module>", "main"], printed
    assert f"no answer from {url} to POST /writes (enqueue_run)" in printed


def test_a_defect_of_the_client_stays_to_be_seen(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tidebase_sdk, "new_run_id", None)
    with Tidebase(server.url) as tide, pytest.raises(TypeError) as defect:
        tide.enqueue("flow")
    assert any(entry.path.name == "tidebase_sdk.py" for entry in defect.traceback)


def test_a_worker_says_at_its_start_what_it_serves_and_where(
    tide: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tidebase")
    tide.client.workflow("report", print)
    tide(lambda client: client.work(["mail", "default"], concurrency=3, stop=lambda: True))
    [record] = [record for record in caplog.records if record.name == "tidebase"]
    for word in ("report", "mail, default", tide.client.url, "3"):
        assert word in record.getMessage()


def test_a_worker_without_workflows_is_warned_and_claims_nothing(
    tide: Any, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = api.enqueue()
    asked: list[str] = []
    test_sdk.on_requests(tide, lambda effect: asked.append(effect.path))
    tide(lambda client: client.work(stop=lambda: True))
    [record] = [each for each in caplog.records if each.name == "tidebase" and each.levelname == "WARNING"]
    assert "no workflow is registered" in record.getMessage()
    assert tide.client.url in record.getMessage()
    assert asked == []
    assert api.run(run_id)["status"] == "queued"


def test_a_failed_run_is_logged_with_its_run_workflow_and_the_users_frames(
    tide: Any, api: Api, working: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.step("divide", lambda: 1 / 0)

    run_id = tide(lambda client: client.enqueue("flow", max_attempts=1))["run"]["id"]
    working(tide, {"flow": flow})
    eventually(lambda: api.run(run_id)["status"] == "failed")
    [record] = eventually(lambda: [each for each in caplog.records  # the server has a logger of its own
                                   if each.name == "tidebase" and each.event == "run_failed"])
    assert run_id in record.getMessage()
    assert "flow" in record.getMessage()
    assert record.run_id == run_id
    printed = logging.Formatter().format(record)
    assert "tidebase_sdk.py" not in printed
    assert "ZeroDivisionError" in printed


def test_a_run_that_is_lost_is_named_in_the_log_with_the_reason(
    tide: Any, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = new_run_id()

    async def flow(run: Any, input: Any) -> None:
        await run.step("cancel", lambda: api.post(f"/runs/{run_id}/cancel")["run"] and None)

    with pytest.raises(RunCancelled):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id))
    [record] = [each for each in caplog.records if each.name == "tidebase" and each.event == "run_cancelled"]
    assert re.search(f"run {run_id} of workflow flow is no longer held here: .*cancelled", record.getMessage())


def test_a_worker_whose_server_is_away_names_its_address(
    actor: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    tide = actor(url)
    tide.client.workflow("flow", print)

    def away() -> list[str]:
        return [each.getMessage() for each in caplog.records if getattr(each, "event", "") == "server_away"]

    outcome = in_background(lambda: tide(lambda client: client.work(stop=lambda: bool(away()))))
    outcome()
    assert url in away()[0]
