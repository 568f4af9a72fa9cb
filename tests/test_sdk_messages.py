"""What a user reads when something goes wrong: a traceback of their own code, and log lines that say where and what.

Logs are read as a default formatter writes them, which shows no extras.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_sdk
from conftest import ROOT, Api, eventually, free_port
from test_names import replayed
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
    with Tidebase({url!r}, timeout_s={timeout_s}) as tide:
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
    async with AsyncTidebase({url!r}, timeout_s={timeout_s}) as tide:
        {call}

asyncio.run(main())
"""


def last_words(
    folder: Path, program: str, url: str, call: str, step: str = "pass", timeout_s: float = 30.0
) -> str:
    """What a program prints that ends with an exception, the frames of asyncio.run aside."""
    (folder / "tidebase.py").write_text((ROOT / "tidebase_sdk.py").read_text())
    if program is AWAITED:
        call, step = (re.sub(r"^((?:return )?)(?=tide|run)", r"\1await ", text) for text in (call, step))
    source = textwrap.dedent(program).format(url=url, call=call, step=step, timeout_s=timeout_s)
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
    printed = last_words(tmp_path, program, url, "tide.enqueue('flow')", timeout_s=0.2)
    assert functions(printed) == ["<module>", "main"], printed
    assert f"no answer from {url} to POST /writes (enqueue_run)" in printed
    assert "TIDEBASE_URL" in printed


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


MISSPELT = {
    "Tidebase.enqueue() takes no quue=, but queue=": lambda client: client.enqueue("flow", quue="mail"),
    "Tidebase.enqueue() takes no colour=, but workflow_name=, queue=, input=, ": (
        lambda client: client.enqueue("flow", colour="red")),
    "Runs.cancel() takes no why=, but run_id=, reason=, actor=": lambda client: client.runs.cancel("r", why="?"),
}


@pytest.mark.parametrize("words", MISSPELT)
def test_a_misspelt_argument_is_named_with_those_that_there_are(tide: Any, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        tide(MISSPELT[words])


def test_a_workflow_that_is_no_function_is_refused_before_there_is_a_run(tide: Any, api: Api) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.child("child", 5)

    for call in (lambda client: client.run("flow", 5), lambda client: client.workflow("flow", 5)):
        with pytest.raises(TypeError, match=r"^a workflow is a function, .*, not 5$"):
            tide(call)
    assert api.get("/runs?workflow=flow")["runs"] == []
    with pytest.raises(TypeError, match=r"^a workflow is a function, .*, not 5$"):
        tide(lambda client: client.run("flow", tide.workflow(flow)))


def test_another_input_for_a_live_dedupe_key_is_not_used_and_the_log_says_so(
    tide: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for given in ({"n": 1}, {"n": 1}, None, {"n": 2}):
        answer = tide(lambda client: client.enqueue("flow", input=given, dedupe_key="nightly"))  # noqa: B023
    assert answer["deduplicated"]
    [message] = warnings_of(caplog, "differs_from_record")
    assert answer["run"]["id"] in message
    assert "'nightly'" in message


@pytest.mark.parametrize(("output", "words"), [
    ({"scores": [1.0, float("nan")]}, r"the value at \.scores\[1\] of the output of .* has NaN or an infinite"),
    (float("-inf"), "the output of step 'step' has NaN or an infinite number"),
    (["\ud83d"], r"the value at \[0\] of the output of step 'step' has a text with half of a surrogate pair"),
    ({"rows": [{1: "a", "1": "b"}]}, "the output of step 'step' has the keys 1 and '1' in one dict"),
    (({None: 1, "null": 2},), "the output of step 'step' has the keys None and 'null'"),
])
def test_an_output_that_json_cannot_say_is_refused_with_advice_that_fits(tide: Any, output: Any, words: str) -> None:
    async def flow(run: Any, input: Any) -> None:
        await run.step("step", lambda: output)

    with pytest.raises(TypeError, match=f"^{words}") as refusal:
        tide(lambda client: client.run("flow", tide.workflow(flow)))
    assert "model_dump" not in str(refusal.value)


def test_keys_that_json_makes_one_are_refused_in_an_input_and_others_become_texts(tide: Any) -> None:
    with pytest.raises(TypeError, match=r"^input= has the keys 1 and '1' in one dict"):
        tide(lambda client: client.enqueue("flow", input={1: "a", "1": "b"}))
    run = tide(lambda client: client.enqueue("flow", input={1: ("a",), "b": {2.5: None}}))["run"]
    assert run["input"] == {"1": ["a"], "b": {"2.5": None}}


def test_a_function_that_is_given_up_and_runs_on_in_its_thread_is_named_in_the_log(
    tide: Any, caplog: pytest.LogCaptureFixture
) -> None:
    go = threading.Event()

    async def flow(run: Any, input: Any) -> None:
        await run.step("slow", lambda: go.wait(20), timeout_s=0.01)

    with pytest.raises(tidebase_sdk.StepTimeout):
        tide(lambda client: client.run("flow", tide.workflow(flow)))
    go.set()
    [message] = warnings_of(caplog, "thread_runs_on")
    assert "step 'slow'" in message


def test_a_blocking_step_that_is_cancelled_is_recorded_as_failed_and_the_log_says_that_it_runs_on(
    server: Any, api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    go, returned = threading.Event(), threading.Event()

    async def flow(run: Any) -> str:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(run.step("slow", lambda: go.wait(20) and returned.set()), 0.05)
        return "went on"

    async def main() -> None:
        async with tidebase_sdk.AsyncTidebase(server.url) as tide:
            assert await tide.run("flow", flow, run_id="run_thread_runs_on") == "went on"

    asyncio.run(main())
    go.set()
    assert returned.wait(20)  # as documented
    [message] = warnings_of(caplog, "thread_runs_on")
    assert "step 'slow'" in message
    assert [step["status"] for step in api.detail("run_thread_runs_on")["steps"]] == ["failed"]


def test_a_stop_names_the_runs_that_are_under_way(
    tide: Any, api: Api, working: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    begun, go = threading.Event(), threading.Event()
    caplog.set_level(logging.INFO, "tidebase")

    async def flow(run: Any, input: Any) -> None:
        await run.step("slow", lambda: begun.set() or (go.wait(20) and None))

    api.enqueue(workflow="flow")
    tide.client.workflow("flow", tide.workflow(flow))
    outcome = in_background(lambda: tide(lambda client: client.work(stop=begun.is_set)))
    [message] = eventually(lambda: warnings_of(caplog, "worker_stops"))
    go.set()
    outcome()
    assert "1 run is under way" in message
    assert "again" in message


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
    assert "another input" in message


def test_a_webhook_without_a_secret_to_verify_it_by_is_refused_and_the_log_says_why_once(
    tide: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert tide(lambda client: client.handle_webhook(b"{}", "sha256=00"))[0] == 401
    [message] = warnings_of(caplog, "no_webhook_secret")
    assert "TIDEBASE_WEBHOOK_SECRET" in message
    assert tide(lambda client: client.handle_webhook(b"{}", "sha256=00", secret="s"))[0] == 401
    assert len(warnings_of(caplog, "no_webhook_secret")) == 1


def test_a_replay_that_goes_another_way_than_the_record_since_its_loop_counts_the_tries_is_told_in_the_log(
    tide: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def ask(attempt: int) -> str:
        asked.append(attempt)
        if len(asked) == 1:
            raise ConnectionError
        return f"answer {attempt}"

    async def flow(run: Any) -> Any:
        for attempt in range(3):
            with contextlib.suppress(ConnectionError):
                return await run.step("ask", lambda: ask(attempt))  # noqa: B023

    assert replayed(tide, flow) == ["answer 1", "answer 0"]
    [message] = warnings_of(caplog, "steps_skipped")
    assert "'ask#2'" in message


@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 1, 2}, {1, 2}])
@pytest.mark.parametrize("heals", [False, True])
def test_a_loop_over_items_whose_failures_are_caught_goes_the_same_way_in_a_replay_and_nothing_is_told(
    tide: Any, caplog: pytest.LogCaptureFixture, failing: set[int], heals: bool
) -> None:
    executed: list[int] = []

    def fetch(item: int) -> int:
        executed.append(item)
        if item in failing and not (heals and executed.count(item) > 1):
            raise ConnectionError
        return item

    async def flow(run: Any) -> Any:
        found: list[int | None] = []
        for item in range(3):
            try:
                found.append(await run.step("fetch", lambda: fetch(item)))  # noqa: B023
            except ConnectionError:
                found.append(None)
        while len(found) < 5:  # and one that tries the same call again
            with contextlib.suppress(ConnectionError):
                found.append(await run.step("last", lambda: fetch(len(found))))
        return found

    replayed(tide, flow, times=3)
    assert warnings_of(caplog, "steps_skipped") == []


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
