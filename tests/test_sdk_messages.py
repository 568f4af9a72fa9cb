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


# ------------------------------------------------------------------------------
# Wrong calls, and what easily goes unnoticed.
# ------------------------------------------------------------------------------


WRONG_CALLS = {
    "input": lambda client: client.enqueue("flow", input={1, 2}),
    "metadata": lambda client: client.enqueue("flow", metadata=["a"]),
    "channels": lambda client: client.runs.create("flow", channels={"type": "webhook"}),
    "max_attempts": lambda client: client.enqueue("flow", max_attempts="3"),
    "priority": lambda client: client.enqueue("flow", priority=1.5),
    "delay_s": lambda client: client.enqueue("flow", delay_s="3"),
    "run_at": lambda client: client.enqueue("flow", run_at=5),
    "timeout_s": lambda client: client.runs.wait("r", timeout_s="5"),
    "limit": lambda client: client.runs.list(limit="5"),
    "concurrency": lambda client: client.work(concurrency="8"),
    "on_error": lambda client: client.work(on_error="log"),
    "output": lambda client: client.runs.review_step("r", "s", "complete", output=object()),
}


@pytest.mark.parametrize("argument", WRONG_CALLS)
def test_an_argument_of_a_wrong_type_is_named_before_anything_is_sent(tide: Any, argument: str) -> None:
    sent: list[str] = []
    test_sdk.on_requests(tide, lambda effect: sent.append(effect.path))
    with pytest.raises(TypeError, match=f"^{argument}= "):
        tide(WRONG_CALLS[argument])
    assert sent == []


WRONG_STEPS = {
    "retries": {"retries": "3"},
    "timeout_s": {"timeout_s": "5"},
    "input": {"input": object()},
    "side_effects": {"side_effects": 5},
    "verified_by": {"verified_by": object()},
}


@pytest.mark.parametrize("argument", WRONG_STEPS)
def test_an_argument_of_a_wrong_type_of_a_step_is_named_before_its_function_is_called(
    tide: Any, argument: str
) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.step("step", lambda: pytest.fail("called"), **WRONG_STEPS[argument])

    with pytest.raises(TypeError, match=f"^{argument}= "):
        tide(lambda client: client.run("flow", tide.workflow(flow)))


def test_a_time_to_begin_is_given_in_one_way(tide: Any) -> None:
    with pytest.raises(ValueError, match="delay_s or run_at"):
        tide(lambda client: client.enqueue("flow", delay_s=5, run_at="2030-01-01T00:00:00Z"))


def warnings_of(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [each.getMessage() for each in caplog.records if getattr(each, "event", "") == event]


def test_another_input_for_a_known_run_is_not_used_and_the_log_says_so(
    tide: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def flow(run: Any, input: Any) -> Any:
        if run.attempt == 1:
            raise RuntimeError
        return input

    run_id = new_run_id()
    for given in ({"n": 1}, None, {"n": 1.0}, {"n": 2}):
        try:
            answer = tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id, input=given))  # noqa: B023
        except RuntimeError:
            answer = None
    assert answer == {"n": 1}
    [message] = warnings_of(caplog, "differs_from_record")
    assert run_id in message
    assert "tide.runs.fork" in message


def test_a_webhook_without_a_secret_to_verify_it_by_is_refused_and_the_log_says_why_once(
    tide: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert tide(lambda client: client.handle_webhook(b"{}", "sha256=00"))[0] == 401
    [message] = warnings_of(caplog, "no_webhook_secret")
    assert "TIDEBASE_WEBHOOK_SECRET" in message
    assert tide(lambda client: client.handle_webhook(b"{}", "sha256=00", secret="s"))[0] == 401
    assert len(warnings_of(caplog, "no_webhook_secret")) == 1


def test_runs_are_found_by_metadata_of_any_kind(tide: Any) -> None:
    for value in (True, False, None, 5, "true", "a b"):
        run_id = tide(lambda client: client.enqueue("flow", metadata={"m": value}))["run"]["id"]  # noqa: B023
        found = tide(lambda client: client.runs.list(metadata={"m": value}))  # noqa: B023
        assert found[0]["id"] == run_id, value


def test_a_step_that_needs_review_says_which_and_how_to_decide(tide: Any, api: Api) -> None:
    run_id = new_run_id()

    async def flow(run: Any, input: Any) -> Any:
        return await run.step("mail", lambda: 1 / 0 if run.attempt == 1 else "sent", side_effects="email")

    with pytest.raises(ZeroDivisionError):
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    with pytest.raises(tidebase_sdk.StepNeedsReview) as ambiguous:
        tide(lambda client: client.run("flow", tide.workflow(flow), run_id=run_id))
    step_id = api.detail(run_id)["steps"][0]["id"]
    assert f"tide.runs.review_step('{run_id}', '{step_id}', DECISION)" in str(ambiguous.value)
    assert f"explain {run_id}" in str(ambiguous.value)
    assert ambiguous.value.body["step"]["id"] == step_id
