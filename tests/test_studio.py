"""Studio, the web page, in a real browser on a real server: what it shows is so, stays so, and what it does is done.

Needs playwright, and Debian's chromium or the one that `playwright install chromium` brings; without them these tests
are skipped. Every page is watched: an error in its console or a report of its Content-Security-Policy fails the test.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LEASE_MS, Api, Clock, LocalServer, eventually

from tidebase_server import events as event_streams

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: see requirements-dev.txt")
expect = playwright.expect

STUDIO = Path(__file__).resolve().parent.parent / "studio"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-software-rasterizer",
    "--in-process-gpu",
    "--process-per-site",  # a tab on a server that another tab is on needs no new process
]
PATIENCE_MS = 20_000  # for what the page shows a moment later; the machine may be busy
HOUR_MS = 3_600_000


# ------------------------------------------------------------------------------
# A browser for all tests, a context for each.
# ------------------------------------------------------------------------------
@pytest.fixture(scope="module")  # two at once in a process are refused, and other modules have theirs
def browser() -> Iterator[Any]:
    expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            started = driver.chromium.launch(executable_path=path, args=FLAGS)
        except playwright.Error as error:
            pytest.skip(f"no Chromium here (apt-get install chromium): {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def quick_beats() -> Iterator[None]:
    """The server notices that a stream's reader is gone when it writes to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_streams, "BEAT_SECONDS", 0.1)
        yield


class Tab:
    """A tab of Studio, and what its console said."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url, self.said = page, url, list[str]()
        page.set_default_timeout(PATIENCE_MS)
        page.on(
            "console",
            lambda message: (
                self.said.append(f"{message.text} {message.location['url']}")
                if message.type in ("error", "warning")
                else None
            ),
        )
        page.on("pageerror", lambda error: self.said.append(f"{error}\n{error.stack}"))

    def open(self, path: str) -> Any:
        self.page.goto(self.url + path)
        return self.page

    def go(self, path: str) -> None:
        """Show another page in the document, as links do: it takes a fraction of a load. The old one goes at once."""
        show = "(path) => { history.pushState({}, '', path); dispatchEvent(new PopStateEvent('popstate')); }"
        self.page.evaluate(show, path)

    def refusals(self, *statuses: int) -> None:
        """Forget that the console told of these answers of the server, which the test has asked for."""
        told = [re.compile(rf"Failed to load resource: .* status of {status} ") for status in statuses]
        self.said = [line for line in self.said if not any(pattern.match(line) for pattern in told)]


# Nothing moves: axe looks at colours that stand still, and what moves is drawn sixty times a second.
LOOKS = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"}


@pytest.fixture(scope="module")
def desk(browser: Any, lasting_server: LocalServer) -> Iterator[Any]:
    """A context for all tests whose tab is on the lasting server: a new one costs half a second.

    A page that stays open keeps the process of the others, and can empty their storage.
    """
    context = browser.new_context(**LOOKS)
    context.new_page().goto(f"{lasting_server.url}/studio/icon.svg")
    yield context
    context.close()


@pytest.fixture
def make_tab(browser: Any, quick_beats: None, server: LocalServer) -> Iterator[Callable[..., Tab]]:
    """Opens a tab in a context of its own: make_tab(url, viewport=…, …)."""
    tabs: list[Tab] = []

    def make(url: str, **options: Any) -> Tab:
        tabs.append(Tab(browser.new_context(**{**LOOKS, **options}).new_page(), url))
        return tabs[-1]

    yield make
    for tab in tabs:
        tab.page.context.close()
    assert [tab.said for tab in tabs] == [[] for _ in tabs]


@pytest.fixture
def tab(desk: Any, quick_beats: None, server: LocalServer) -> Iterator[Tab]:
    """A tab on the server; its storage is empty."""
    tab = Tab(desk.new_page(), server.url)
    yield tab
    desk.set_offline(False)
    tab.page.close()
    desk.clear_cookies()
    desk.pages[0].evaluate("localStorage.clear()")
    assert tab.said == []


def row_of(page: Any, run: str) -> Any:
    return page.locator(f"tr[data-key='{run}']")


def with_text(page: Any, text: str | re.Pattern[str]) -> None:
    expect(page.get_by_text(text).first).to_be_visible()


def status_of(page: Any, status: str) -> None:
    expect(page.locator("h1 .status")).to_have_text(status)


def holding(api: Api, *steps: str, queue: str = "default", **body: Any) -> str:
    """A run that worker "w1" holds, with these steps completed."""
    run = api.enqueue(queue, **body)
    api.claim(queue, owner="w1")
    for name in steps:
        api.do_step(run, name, "w1", {"did": name})
    return run


# ------------------------------------------------------------------------------
# A run, live.
# ------------------------------------------------------------------------------
def test_a_run_is_seen_from_the_queue_to_its_end_over_the_death_of_a_worker(tab: Tab, api: Api, clock: Clock) -> None:
    run = api.enqueue("reports", maxAttempts=3)
    page = tab.open(f"/studio/runs/{run}")
    status_of(page, "queued")
    page.evaluate("window.untouched = true")  # the page is never loaded again

    api.claim("reports", owner="w1")
    api.do_step(run, "collect", "w1", {"n": 1})
    api.begin_step(run, "draft", "w1")
    status_of(page, "running")
    expect(page.locator("tr", has_text="draft").locator(".bar.is-running")).to_be_visible()

    clock.advance(ms=LEASE_MS + 1000)  # w1 was killed
    assert api.reconcile()
    status_of(page, "queued")
    draft = page.locator("tr", has_text="draft")
    expect(draft.locator(".bar.is-cut")).to_be_visible()

    clock.advance(ms=10_000)
    api.claim("reports", owner="w2")
    step = api.begin_step(run, "draft", "w2")["step"]["id"]
    api.complete_step(run, step, "w2", {"words": 3})
    api.complete(run, result={"done": True}, leaseOwner="w2")
    status_of(page, "completed")
    expect(draft.locator(".bar.is-completed")).to_be_visible()
    expect(draft.locator(".bar.is-gap")).to_be_visible()
    expect(page.locator("tr", has_text="collect").locator(".bar.is-replayed")).to_be_visible()
    attempts = page.get_by_role("complementary", name="Details").locator("tbody tr")  # who did what, in words
    expect(attempts).to_have_text([re.compile("^1cut offw1"), re.compile("^2completedw2")])
    assert page.evaluate("window.untouched")
    expect(page.locator(".mark")).to_have_text("live")


def test_a_reload_in_the_middle_and_a_hidden_tab_lose_nothing(tab: Tab, api: Api) -> None:
    run = holding(api, "one")
    page = tab.open(f"/studio/runs/{run}?tab=events")
    with_text(page, "step.completed")
    page.evaluate("""() => { Object.defineProperty(document, "hidden", {configurable: true, get: () => window.away});
                             window.away = true; document.dispatchEvent(new Event("visibilitychange")); }""")
    expect(page.locator(".mark")).to_have_text("paused")
    api.do_step(run, "two", "w1")
    page.evaluate("() => { window.away = false; document.dispatchEvent(new Event('visibilitychange')); }")
    seqs = [str(event["seq"]) for event in api.events(run)]
    expect(page.locator(".events tbody:not(.pad) .e-seq")).to_have_text(seqs)
    page.reload()
    api.do_step(run, "three", "w1")
    seqs = [str(event["seq"]) for event in api.events(run)]
    expect(page.locator(".events tbody:not(.pad) .e-seq")).to_have_text(seqs)
    expect(page.get_by_role("tab", name="Events")).to_have_attribute("aria-selected", "true")


def test_what_could_not_be_read_is_read_when_the_page_is_live_again(tab: Tab, api: Api) -> None:
    run, _ = waiting_at_gate(api)
    page = tab.page
    page.route("**/runs/*?include=gates", lambda route: route.fulfill(status=503, json={"error": "away"}), times=1)
    with page.expect_response(lambda response: response.status == 503):
        tab.open(f"/studio/runs/{run}")
    expect(page.locator(".mark")).to_have_text("live")
    for away, mark in (("true", "paused"), ("false", "live")):
        page.evaluate(f"""() => {{ Object.defineProperty(document, "hidden", {{configurable: true, value: {away}}});
                          document.dispatchEvent(new Event("visibilitychange")); }}""")
        expect(page.locator(".mark")).to_have_text(mark)
    expect(page.get_by_role("button", name="approve: waiting")).to_be_visible()
    tab.refusals(503)


def test_a_run_to_be_retried_shows_its_next_attempt_and_leads_to_the_step_of_its_error(tab: Tab, api: Api) -> None:
    run = holding(api, "load", maxAttempts=3)
    error = {"name": "TimeoutError", "message": "no answer"}
    step = api.begin_step(run, "fetch", "w1")["step"]["id"]
    page = tab.open(f"/studio/runs/{run}?tab=events")
    with_text(page, "step.started")
    api.fail_step(run, step, "w1", error, retryable=True)
    api.fail(run, error, leaseOwner="w1")
    page.get_by_role("button", name="In step fetch").click()
    expect(page.get_by_role("button", name="fetch: failed retryable")).to_be_focused()
    panel = page.get_by_role("complementary", name="Details")
    expect(panel.get_by_role("heading", name="fetch")).to_be_visible()
    following = page.locator("tr", has=page.get_by_role("button", name="attempt 2: queued"))
    expect(following).to_contain_text(re.compile(r"in \d"))
    expect(page.locator(".axis .is-now")).to_be_visible()
    api.post(f"/runs/{run}/cancel", {})
    expect(following).to_have_count(0)
    expect(page.locator(".axis .is-now")).to_have_count(0)


def test_an_open_step_shows_how_it_went_on(tab: Tab, api: Api) -> None:
    run = holding(api)
    step = api.begin_step(run, "draft", "w1")["step"]["id"]
    page = tab.open(f"/studio/runs/{run}?step={step}")
    panel = page.get_by_role("complementary", name="Details")
    expect(panel.locator(".facts .status")).to_have_text("running")
    expect(panel.get_by_role("row", name=re.compile("^1 running w1"))).to_be_visible()
    api.complete_step(run, step, "w1", {"words": 3})
    expect(panel.get_by_role("region", name="Output")).to_have_text('{"words": 3}')


def test_a_step_that_is_open_and_the_focus_stay_while_events_come(tab: Tab, api: Api) -> None:
    run = holding(api, "first")
    page = tab.open(f"/studio/runs/{run}")
    page.get_by_role("button", name="first: completed").click()
    panel = page.get_by_role("complementary", name="Details")
    expect(panel.get_by_role("region", name="Output")).to_have_text('{"did": "first"}')
    assert "step=step_" in page.url
    filtering = page.get_by_role("searchbox", name="Filter steps by name")
    filtering.focus()
    api.do_step(run, "second", "w1")
    with_text(page, "second")
    expect(filtering).to_be_focused()
    expect(panel.get_by_role("heading", name="first")).to_be_visible()
    with page.expect_response(lambda answer: "third" in answer.text() if "/steps?" in answer.url else False):
        third = api.begin_step(run, "third", "w1")["step"]["id"]
    api.fail_step(run, third, "w1", {"name": "TimeoutError", "message": "no answer"}, retryable=True)
    expect(page.get_by_role("button", name="third: failed retryable")).to_be_visible()
    page.reload()  # the open step stands in the address
    expect(panel.get_by_role("heading", name="first")).to_be_visible()


def test_payloads_are_shown_to_the_letter_and_long_ones_64_kb_first(tab: Tab, api: Api) -> None:
    exact = '{"z":1.10,"a":12345678901234567890,"e":1E3,"u":"\\u0041"}'
    run = api.send("POST", "/runs/exact", raw=f'{{"input":{exact}}}'.encode())["run"]["id"]
    api.begin(run, "w1")
    api.do_step(run, "long", "w1", {"text": "x" * 100_000, "end": 1})
    page = tab.open(f"/studio/runs/{run}")
    shown = page.get_by_role("region", name="Input")
    expect(shown).to_have_text(exact)
    page.get_by_role("button", name="long: completed").click()
    output = page.get_by_role("region", name="Output")
    with_text(page, re.compile("The first 64 KB of 100.0 kB"))
    assert 65_000 < len(output.inner_text()) < 66_000
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download Output").click()
    assert json.loads(Path(saved.value.path()).read_text())["end"] == 1

    # Browsers withhold the clipboard on plain HTTP: copying works all the same.
    page.evaluate("""() => { Object.defineProperty(navigator, "clipboard", {value: undefined});
                     document.addEventListener("copy", () => { window.copied = document.activeElement.value; }); }""")
    page.get_by_role("button", name="Close details").click()
    page.get_by_role("button", name="Copy Input").click()
    assert eventually(lambda: page.evaluate("window.copied")) == exact


def test_the_slider_goes_through_the_versions_of_the_state(tab: Tab, api: Api) -> None:
    run = holding(api)
    for number in range(1, 4):
        api.put(
            f"/runs/{run}/state", {"value": {"n": number, "same": True}, "label": f"label {number}", "leaseOwner": "w1"}
        )["state"]
    page = tab.open(f"/studio/runs/{run}?tab=state")
    value = page.get_by_role("region", name="Value")
    expect(value).to_have_text('{"n": 3, "same": true}')
    page.get_by_role("button", name="Earlier version").click()
    expect(value).to_have_text('{"n": 2, "same": true}')
    with_text(page, "label 2")
    changes = page.locator(".diff tbody tr")
    expect(changes).to_have_count(1)
    expect(changes.first).to_have_text(re.compile("n.*1.*2"))
    page.get_by_label("Compare with").select_option(label="3 label 3")
    expect(changes.first).to_have_text(re.compile("n.*3.*2"))


# ------------------------------------------------------------------------------
# Why, and whether a rerun is safe.
# ------------------------------------------------------------------------------
def test_the_list_says_of_each_run_why_it_does_not_go_on(tab: Tab, api: Api, clock: Clock) -> None:
    lines = {}
    lines[holding(api, queue="lost")] = re.compile(r"its lease ran out .* ago; nobody has begun it again")
    clock.advance(ms=LEASE_MS + 5000)

    api.put("/queues/capped/config", {"concurrency": 1})["config"]
    holding(api, queue="capped")
    lines[api.enqueue("capped")] = re.compile("queue capped is at its cap of 1: .* holds it")
    api.put("/queues/rated/config", {"ratePerMinute": 1})["config"]
    holding(api, queue="rated")
    lines[api.enqueue("rated")] = re.compile("rate limit, next place in")
    running = holding(api, queue="busy")
    api.begin_step(running, "draft", "w1")
    lines[running] = re.compile("claimed by w1, heartbeat .*, in step draft for")
    retried = holding(api, queue="again", maxAttempts=3)
    api.fail(retried, {"name": "TimeoutError", "message": "too slow"}, leaseOwner="w1")["run"]
    lines[retried] = re.compile("again at .*, attempt 2 of 3, after TimeoutError")
    gated = holding(api, queue="gated")
    gate = api.post(f"/runs/{gated}/gates/begin", {"name": "ok", "prompt": "Send this?"})["gate"]
    api.post(f"/runs/{gated}/wait", {"leaseOwner": "w1", "for": {"gateId": gate["id"]}})["run"]
    lines[gated] = re.compile("waits for a person since .*: Send this\\?")
    signalled = holding(api, queue="signalled")
    api.post(f"/runs/{signalled}/wait", {"leaseOwner": "w1", "for": {"event": "paid"}, "timeoutMs": HOUR_MS})["run"]
    lines[signalled] = re.compile("waits for signal paid, until")
    parent = holding(api, queue="parents")
    for name in ("a", "b"):
        api.post(f"/runs/{parent}/children", {"name": name, "workflowName": "part"})["run"]
    api.post(f"/runs/{parent}/wait", {"leaseOwner": "w1", "for": {"children": True}})["run"]
    lines[parent] = re.compile("waits for 2 of 2 children")
    lines[api.enqueue("nobody")] = re.compile("nobody has asked queue nobody for work")

    page = tab.open("/studio/runs")
    for run, line in lines.items():
        expect(row_of(page, run).locator(".c-why")).to_have_text(line)
    page.goto(f"{tab.url}/studio/runs/{gated}")
    expect(page.locator(".why")).to_have_text(lines[gated])


def test_the_page_answers_whether_a_rerun_is_safe(tab: Tab, api: Api, clock: Clock) -> None:
    run = holding(api, "load", maxAttempts=3)
    api.begin_step(run, "plain", "w1")
    api.begin_step(run, "keyed", "w1", options={"sideEffects": ["mail"], "idempotencyKey": "k"})
    api.begin_step(run, "send", "w1", options={"sideEffects": ["mail"]})
    api.begin_step(run, "once", "w1", options={"sideEffects": ["mail"], "onAmbiguousFailure": "fail"})
    clock.advance(ms=LEASE_MS + 1000)
    api.reconcile()
    api.post(f"/runs/{run}/cancel", {"reason": "look first"})["run"]
    page = tab.open(f"/studio/runs/{run}")
    verdict = page.get_by_role("region", name="Safe to rerun?")
    expect(verdict.get_by_role("heading")).to_contain_text("Not without you")
    verdict.get_by_text("step by step").click()
    plan = {step["name"]: step["plan"] for step in api.get(f"/runs/{run}/rerun")["steps"]}
    assert set(plan.values()) == {"replays", "runs", "runs_again", "stops_for_review", "never"}
    words = {
        "replays": "replays",
        "runs": "runs",
        "runs_again": "runs again",
        "stops_for_review": "stops for review",
        "never": "never",
    }
    for name, kind in plan.items():
        expect(verdict.get_by_role("row", name=re.compile(rf"^{name}\b")).locator(".act")).to_have_text(words[kind])
    expect(verdict.get_by_text("Decide once")).to_be_visible()  # each step that the verdict names has its form
    verdict.get_by_role("button", name="It did not happen: run it again").click()
    expect(page.get_by_role("button", name="send: failed retryable")).to_be_visible()
    expect(verdict.get_by_text("Decide send")).to_have_count(0)


def test_a_step_to_be_decided_shows_the_exception_that_it_ended_with(tab: Tab, api: Api) -> None:
    run = holding(api, "load")
    step = api.begin_step(run, "send", "w1", options={"sideEffects": ["mail"]})["step"]["id"]
    api.fail_step(run, step, "w1", {"name": "ConnectionError", "message": "reset after the last byte"})
    api.fail(run, {"name": "StepNeedsReview", "message": "step 'send' waits"}, leaseOwner="w1", retryable=False)
    page = tab.open(f"/studio/runs/{run}")
    verdict = page.get_by_role("region", name="Safe to rerun?")
    expect(verdict.get_by_text("Decide send")).to_be_visible()
    expect(verdict.get_by_text("ConnectionError: reset after the last byte")).to_be_visible()


def test_a_failed_run_shows_no_step_at_work_and_offers_its_recovery_webhook(
    tab: Tab, api: Api, receiver: Any
) -> None:
    run = holding(api, "load", recoveryWebhook=f"{receiver.url}/recover")
    api.begin_step(run, "slow", "w1")
    api.fail(run, {"name": "ValueError", "message": "no"}, leaseOwner="w1", retryable=False)
    page = tab.open(f"/studio/runs/{run}")
    status_of(page, "failed")
    expect(page.get_by_role("button", name="slow: stalled")).to_be_visible()
    page.get_by_role("button", name="Recover").click()
    with_text(page, "Its recovery webhook is on the way.")
    receiver.wait_for(1)


def test_a_long_error_ends_at_a_word_and_stands_whole_beside(tab: Tab, api: Api) -> None:
    run = holding(api, maxAttempts=1)
    message = "connection refused " * 40 + "at the very end"
    api.fail(run, {"name": "OSError", "message": message}, leaseOwner="w1", retryable=False)
    page = tab.open(f"/studio/runs/{run}")
    line = page.locator(".why .error-text")
    expect(line).to_have_text(re.compile("^OSError: (connection refused )+(connection )?…$"))
    expect(page.get_by_role("region", name="Error")).to_contain_text(message)


def test_an_ambiguous_step_is_decided_in_the_page(tab: Tab, api: Api, clock: Clock) -> None:
    run = holding(api, "load", maxAttempts=3)
    api.begin_step(run, "send", "w1", options={"sideEffects": ["mail"]})
    clock.advance(ms=LEASE_MS + 1000)
    api.reconcile()
    api.claim(owner="w2")
    assert api.begin_step(run, "send", "w2").json["code"] == "manual_review"
    api.fail(run, {"name": "ManualReview", "message": "send"}, leaseOwner="w2", retryable=False)["run"]
    page = tab.open("/studio/approvals")
    page.get_by_role("button", name=re.compile("send may have had its effect")).click()
    page.get_by_label("Your name").fill("Mina")
    page.get_by_label("Output, when it happened").fill('{"messageId": 1.10}')
    page.get_by_role("button", name="It happened: keep this output").click()
    with_text(page, "Nothing waits for a person")
    step = next(step for step in api.detail(run)["steps"] if step["name"] == "send")
    assert step["status"] == "completed"
    assert '{"messageId": 1.10}' in api.get(f"/runs/{run}").text
    page.goto(f"{tab.url}/studio/runs/{run}")  # a person decided it: its worker was cut off all the same
    send = page.locator("tr", has=page.get_by_role("button", name="send: completed"))
    expect(send.locator(".bar.is-cut")).to_be_visible()
    expect(send.locator(".bar.is-completed")).to_have_count(0)


# ------------------------------------------------------------------------------
# Approvals.
# ------------------------------------------------------------------------------
def waiting_at_gate(api: Api, prompt: str = "Send this?", **body: Any) -> tuple[str, Any]:
    run = holding(api, "draft")
    gate = api.post(
        f"/runs/{run}/gates/begin", {"name": "approve", "prompt": prompt, "data": {"to": "Ada", "n": 1.5}, **body}
    )["gate"]
    api.post(f"/runs/{run}/wait", {"leaseOwner": "w1", "for": {"gateId": gate["id"]}})["run"]
    return run, gate


def test_a_gate_that_is_approved_in_the_page_resumes_the_run(tab: Tab, api: Api) -> None:
    run, _ = waiting_at_gate(api)
    page = tab.open("/studio/approvals")
    expect(page).to_have_title("(1) Approvals · Tidebase")
    expect(page.locator("link[rel=icon]")).to_have_attribute("href", "/studio/icon.svg?n=1")
    with_text(page, "Ada")
    page.get_by_label("Your name").fill("Mina")
    page.get_by_label(re.compile("^Note")).fill("well done")
    page.get_by_role("button", name="Approve").click()
    with_text(page, "Nothing waits for a person")
    expect(page).to_have_title("Approvals · Tidebase")
    [decided] = api.detail(run)["gates"]
    assert (decided["status"], decided["actor"], decided["decisionPayload"]) == (
        "approved",
        "Mina",
        {"note": "well done"},
    )
    assert api.run(run)["status"] == "queued"
    page.get_by_role("link", name="Decided").click()
    with_text(page, "by Mina")


def test_a_reviewer_with_the_token_alone_decides_on_a_phone(
    start_server: Any, make_tab: Callable[..., Tab], server: LocalServer, api: Api
) -> None:
    locked = start_server(TIDEBASE_API_KEY="secret-key")
    keyed = Api(locked.url, locked, key="secret-key")
    run, gate = waiting_at_gate(keyed, "Really?")
    address = keyed.get(f"/runs/{run}/gates/{gate['id']}")["gate"]["reviewUrl"]
    assert gate["resolveToken"] in address.partition("#")[2]  # and so in no log and no Referer
    tab = make_tab(locked.url, viewport={"width": 360, "height": 740})
    asked: list[Any] = []
    tab.page.on("request", lambda request: asked.append(request))
    page = tab.open("/studio/review#" + address.partition("#")[2])
    with_text(page, "Really?")
    with_text(page, "Ada")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.get_by_label("Your name").fill("Ada")
    page.get_by_role("button", name="Reject").click()
    with_text(page, "Rejected")
    assert keyed.detail(run)["gates"][0]["status"] == "rejected"
    page.reload()  # again, later: it says that it is decided
    with_text(page, "Rejected")
    expect(page.get_by_role("button", name="Approve")).to_have_count(0)
    assert not any(gate["resolveToken"] in request.url for request in asked)
    assert not any("authorization" in request.headers for request in asked)


# ------------------------------------------------------------------------------
# The list, and actions.
# ------------------------------------------------------------------------------
def test_filters_stand_in_the_address_and_the_search_takes_ids_and_keys(tab: Tab, api: Api) -> None:
    ada = api.enqueue("mail", "letter", metadata={"customer": "Ada L"})
    bob = api.enqueue("mail", "letter", metadata={"customer": "Bob"})
    failed = api.create("report")
    api.begin(failed, "w1")
    api.fail(failed, {"name": "ValueError", "message": "no such page"})
    page = tab.open("/studio/runs?queue=mail&metadata.customer=Bob")
    expect(page.locator(".runs tbody tr")).to_have_count(1)
    expect(row_of(page, bob)).to_be_visible()
    page.get_by_role("button", name="Remove filter customer: Bob").click()
    expect(page.locator(".runs tbody tr")).to_have_count(2)
    assert page.url.endswith("?queue=mail")
    page.go_back()
    expect(page.locator(".runs tbody tr")).to_have_count(1)

    page.goto(f"{tab.url}/studio/runs")
    expect(row_of(page, failed)).to_be_visible()
    page.keyboard.press("/")
    page.keyboard.type('customer:"Ada L"')
    page.keyboard.press("Enter")
    expect(page.locator(".runs tbody tr")).to_have_count(1)
    expect(row_of(page, ada)).to_be_visible()
    page.goto(f"{tab.url}/studio/runs")
    page.get_by_role("button", name=re.compile("failed 1")).click()
    expect(page.locator(".runs tbody tr")).to_have_count(1)
    assert "status=failed" in page.url
    page.get_by_role("searchbox", name=re.compile("Search runs")).fill(ada)
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/studio/runs/{ada}")


def test_the_list_is_live_and_keeps_row_and_focus(tab: Tab, api: Api) -> None:
    first = api.enqueue("mail", "letter")
    page = tab.open("/studio/runs")
    expect(row_of(page, first)).to_be_visible()
    page.keyboard.press("j")
    expect(row_of(page, first).get_by_role("link")).to_be_focused()
    page.keyboard.press("x")
    second = api.enqueue("mail", "letter")
    expect(row_of(page, second)).to_be_visible()
    expect(row_of(page, first).get_by_role("link")).to_be_focused()
    expect(row_of(page, first)).to_have_attribute("aria-selected", "true")
    api.claim("mail", owner="w1")
    expect(row_of(page, first).locator(".status")).to_have_text("running")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/studio/runs/{first}")
    status_of(page, "running")
    expect(page.locator("main")).to_be_focused()
    page.keyboard.press("Escape")
    expect(row_of(page, first).get_by_role("link")).to_be_focused()
    page.keyboard.press("g")
    page.keyboard.press("q")
    expect(page.get_by_role("heading", name="Queues")).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()


def test_all_that_match_are_cancelled_after_saying_how_many(tab: Tab, api: Api) -> None:
    runs = [api.enqueue("mail", "letter") for _ in range(60)]
    other = api.enqueue("other", "letter")
    page = tab.open("/studio/runs?queue=mail")
    page.get_by_role("button", name="Next page").click()
    expect(page.locator(".runs tbody tr")).to_have_count(10)
    assert page.evaluate("scrollY") == 0
    page.get_by_role("button", name="First page").click()
    expect(page.locator(".runs tbody tr")).to_have_count(50)
    page.get_by_role("checkbox", name="Select all runs on this page").check()
    with_text(page, "50 runs selected")
    page.get_by_role("button", name="Select all that match").click()
    page.get_by_role("region", name="Selected runs").get_by_role("button", name="Cancel").click()
    ask = page.get_by_role("dialog", name="Cancel 60 runs?")
    expect(ask.get_by_label("Reason")).to_be_focused()
    page.keyboard.type("wrong list")
    ask.get_by_role("button", name="Cancel 60 runs").click()
    report = page.get_by_role("dialog", name="Cancel 60 runs")
    expect(report.get_by_role("status")).to_have_text("60 cancelled.")
    expect(report.get_by_role("row")).to_have_count(60)
    assert {api.run(run)["status"] for run in runs} == {"cancelled"}
    assert api.run(runs[0])["cancelReason"] == "wrong list"
    assert api.run(other)["status"] == "queued"


def test_a_run_is_cancelled_retried_signalled_and_forked(tab: Tab, api: Api) -> None:
    run = holding(api, "one", "two", input={"n": 1})
    page = tab.open(f"/studio/runs/{run}")
    page.get_by_role("button", name="Signal").click()
    page.get_by_role("dialog").get_by_label("Name").fill("paid")
    page.get_by_role("dialog").get_by_label("Payload").fill('{"amount": 1.10}')
    page.get_by_role("button", name="Send").click()
    assert (
        '{"amount": 1.10}'
        in eventually(lambda: (answer := api.get(f"/runs/{run}/signals/paid")).json["signal"] and answer).text
    )
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_label("Reason").fill("not now")
    page.get_by_role("button", name="Cancel the run").click()
    status_of(page, "cancelled")
    with_text(page, "not now")
    page.get_by_role("button", name="Retry").first.click()
    status_of(page, "queued")

    api.enqueue("spare")
    page.get_by_role("button", name="Fork").click()
    ask = page.get_by_role("dialog", name="Fork this run")
    ask.get_by_label("Run again from").select_option("two")
    expect(ask.get_by_role("status")).to_contain_text("Reused: 1 step")
    ask.get_by_label("Input").fill('{"n": 2.50}')
    ask.get_by_label("Queue").select_option("spare")
    ask.get_by_role("button", name="Fork").click()
    expect(page.get_by_role("heading", name="Side by side")).to_be_visible()
    fork = re.search("b=(run_[0-9a-f]+)", page.url)
    assert fork
    assert (api.run(fork[1])["input"], api.run(fork[1])["queue"]) == ({"n": 2.5}, "spare")
    assert [step["name"] for step in api.detail(fork[1])["steps"]] == ["one"]
    expect(page.get_by_role("row", name=re.compile("^one"))).to_contain_text("reused")
    expect(page.get_by_role("row", name=re.compile("^two"))).to_contain_text("only in one")


def test_a_queue_is_paused_and_its_caps_are_set(tab: Tab, api: Api) -> None:
    api.enqueue("mail")
    page = tab.open("/studio/queues")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("row", name=re.compile("^mail"))).to_contain_text("paused")
    assert api.claim("mail") == []
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Runs at once").fill("3")
    page.get_by_label("Push to").fill("http://127.0.0.1:9/invoke")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("row", name=re.compile("^mail"))).to_contain_text("3 at once, push")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Push to").fill("")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("row", name=re.compile("^mail"))).not_to_contain_text("push")
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    assert len(api.claim("mail", owner="w9")) == 1
    page.goto(f"{tab.url}/studio/workers")
    expect(page.get_by_role("row", name=re.compile("w9"))).to_contain_text("mail")


def test_a_schedule_is_made_with_its_next_fires_in_view_run_and_disabled(tab: Tab, api: Api) -> None:
    page = tab.open("/studio/schedules")
    page.get_by_role("button", name="New schedule").click()
    form = page.get_by_role("dialog")
    form.get_by_label("Cron").fill("0 9 * *")
    with_text(page, re.compile("cron: "))
    tab.refusals(400)
    form.get_by_label("Cron").fill("30 2 * * *")
    expect(form.locator(".fires li")).to_have_count(5)
    expect(form.locator(".fires li").first).to_contain_text("02:30")
    form.get_by_label("Name").fill("nightly")
    form.get_by_label("Workflow").fill("sync")
    form.get_by_label("Input").fill('{"rate": 1.10}')
    form.get_by_role("button", name="Save").click()
    row = page.get_by_role("row", name=re.compile("^nightly"))
    expect(row).to_contain_text("30 2 * * *")
    row.get_by_role("button", name="Run now").click()
    eventually(lambda: [run["workflowName"] for run in api.get("/runs")["runs"]] == ["sync"])
    row.get_by_role("button", name="Disable").click()
    expect(row.get_by_role("button", name="Enable")).to_be_visible()
    [schedule] = api.get("/schedules")["schedules"]
    assert schedule["enabled"] is False
    assert '{"rate": 1.10}' in api.get("/schedules").text


def test_a_parent_without_usage_of_its_own_shows_that_of_its_children(tab: Tab, api: Api) -> None:
    parent = holding(api)
    child = api.post(f"/runs/{parent}/children", {"name": "part", "workflowName": "part"})["run"]["id"]
    api.post(f"/runs/{child}/usage", {"model": "opal", "costUsd": 0.25})["usage"]
    page = tab.open(f"/studio/runs/{parent}?tab=usage")
    with_text(page, "$0.25")
    expect(page.get_by_role("row", name=re.compile("opal")).first).to_be_visible()
    with_text(page, "in 1 entry, with those of its children")
    expect(page.get_by_role("row", name=re.compile("child: outside of steps")).first).to_be_visible()


def test_costs_are_drawn_and_saved_as_csv(tab: Tab, api: Api) -> None:
    run = holding(api, "draft")
    api.post(f"/runs/{run}/usage", {"model": "opal", "inputTokens": 100, "outputTokens": 20, "costUsd": 0.25})["usage"]
    page = tab.open("/studio/costs")
    expect(page.locator("svg.chart rect")).to_have_count(1)
    page.get_by_label("By", exact=True).select_option("model")
    expect(page.get_by_role("row", name=re.compile("^opal 1 120"))).to_contain_text("$0.25")
    with page.expect_download() as saved:
        page.get_by_role("button", name="CSV").click()
    assert "opal" in Path(saved.value.path()).read_text()


# ------------------------------------------------------------------------------
# Keys, what users call things, and what everybody can use.
# ------------------------------------------------------------------------------
def test_a_key_is_asked_for_kept_in_the_tab_and_a_read_key_sees_no_buttons(
    start_server: Any, make_tab: Callable[..., Tab], server: LocalServer
) -> None:
    locked = start_server(TIDEBASE_API_KEY="secret-key", TIDEBASE_READ_KEY="look-key")
    keyed = Api(locked.url, locked, key="secret-key")
    run, _ = waiting_at_gate(keyed)
    tab = make_tab(locked.url)
    page = tab.open(f"/studio/runs/{run}")
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    with_text(page, "That key is not the server's.")
    page.get_by_label("API key").fill("secret-key")
    page.get_by_role("button", name="Sign in").click()
    status_of(page, "waiting")
    expect(page.locator(".mark")).to_have_text("live")  # the stream sends the key, too
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    assert page.evaluate("[localStorage.length, sessionStorage.length]")[1] == 1
    assert "secret-key" not in page.evaluate("JSON.stringify(localStorage) + location.href + document.cookie")
    tab.refusals(401)

    reader = make_tab(locked.url)
    page = reader.open("/studio/runs")
    page.get_by_label("API key").fill("look-key")
    page.get_by_role("button", name="Sign in").click()
    expect(row_of(page, run)).to_be_visible()
    expect(page.get_by_role("checkbox")).to_have_count(0)
    with_text(page, "read only")
    page.set_viewport_size({"width": 360, "height": 740})  # a phone has all of it, too
    page.get_by_role("button", name="UTC").click()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("API key").fill("look-key")
    page.get_by_role("button", name="Sign in").click()
    with_text(page, "read only")
    for address in (f"/studio/runs/{run}", "/studio/approvals"):
        page.goto(locked.url + address)
        with_text(page, "Send this?")
        for name in ("Cancel", "Fork", "Signal", "Approve", "Copy review link"):
            expect(page.get_by_role("button", name=name, exact=True)).to_have_count(0)
    reader.refusals(401)


EVIL = (
    """<img src=x onerror="alert(1)"></script><script>alert(2)</script>'"><svg onload=alert(3)>"""
    "{{7*7}}javascript:alert(4)"
)


def test_whatever_users_call_things_stays_text(tab: Tab, api: Api, clock: Clock, receiver: Any) -> None:
    page = tab.page
    page.on("dialog", lambda dialog: tab.said.append(f"a script ran: {dialog.message}"))
    hook = f"{receiver.url}?{EVIL.replace(' ', '%20')}"
    run = api.post(
        "/queues/default/enqueue",
        {
            "workflowName": EVIL,
            "input": {EVIL: EVIL},
            "metadata": {EVIL: EVIL, "budget": EVIL},
            "dedupeKey": EVIL,
            "channels": [{"type": "webhook", "url": hook}],
        },
    )["run"]["id"]
    api.claim(owner=EVIL)
    step = api.begin_step(run, EVIL, EVIL, input={EVIL: EVIL}, options={"sideEffects": [EVIL], "idempotencyKey": EVIL})[
        "step"
    ]["id"]
    api.fail_step(run, step, EVIL, {"name": EVIL, "message": EVIL, "stack": EVIL}, retryable=True)["step"]
    api.put(f"/runs/{run}/state", {"value": {EVIL: EVIL}, "label": EVIL, "reason": EVIL, "createdBy": EVIL})["state"]
    api.post(
        f"/runs/{run}/usage",
        {"provider": EVIL, "model": EVIL, "label": EVIL, "unit": EVIL, "quantity": 1, "costUsd": 1},
    )["usage"]
    api.post(f"/runs/{run}/children", {"name": EVIL, "workflowName": EVIL})["run"]
    gate = api.post(
        f"/runs/{run}/gates/begin", {"name": EVIL, "prompt": EVIL, "data": {EVIL: EVIL}, "capability": EVIL}
    )["gate"]
    api.post(f"/runs/{run}/wait", {"leaseOwner": EVIL, "for": {"gateId": gate["id"]}})["run"]
    api.put(f"/queues/{urllib.parse.quote(EVIL, safe='')}/config", {"concurrency": 1})["config"]
    api.put("/schedules/evil", {"cron": "0 0 * * *", "workflowName": EVIL, "queue": EVIL, "input": {EVIL: EVIL}})[
        "schedule"
    ]
    failed = api.create(urllib.parse.quote(EVIL, safe=""))
    api.begin(failed, "w1")
    api.fail(failed, {"name": EVIL, "message": EVIL}, failureClass="x")["run"]
    cancelled = api.create(urllib.parse.quote(EVIL, safe=""))
    api.post(f"/runs/{cancelled}/cancel", {"reason": EVIL, "actor": EVIL})["run"]
    receiver.wait_for(1)

    def look(address: str) -> None:
        expect(page.locator("h1, .prompt").first).to_be_visible()
        expect(page.locator(".skeleton")).to_have_count(0)
        expect(page.locator("body")).to_contain_text("onerror")
        assert (
            page.evaluate(
                "document.querySelectorAll(`img:not([src^='/studio']), script:not([src^='/studio']), [onerror]`).length"
            )
            == 0
        ), address
        assert page.evaluate("[...document.links].filter((a) => !/^https?:/.test(a.protocol)).length") == 0, address

    tab.open("/studio")
    for address in (
        "/studio/runs",
        *(
            f"/studio/runs/{run}?tab={name}"
            for name in ("", "events", "state", "gates", "usage", "children", "webhooks")
        ),
        f"/studio/runs/{failed}",
        f"/studio/runs/{cancelled}",
        "/studio/approvals",
        "/studio/queues",
        "/studio/schedules",
        "/studio/costs?by=model",
        "/studio/workers",
        f"/studio/compare?a={run}&b={failed}",
    ):
        tab.go(address)
        look(address)
    tab.open(f"/studio/runs/{run}?step={step}")
    expect(page.get_by_role("complementary", name="Details")).to_be_visible()
    look("a step")
    tab.open(f"/studio/review#{run}/{gate['id']}/{gate['resolveToken']}")
    look("the page of a reviewer")
    page.goto(f"{tab.url}/studio/runs/{run}?tab=webhooks")
    sent = len(receiver.requests)
    page.get_by_role("button", name="Resend").first.click()
    with_text(page, "It is sent again.")
    receiver.wait_for(sent + 1)
    assert tab.said == []


def test_names_of_users_neither_turn_the_words_beside_them_round_nor_fill_a_phone(
    make_tab: Callable[..., Tab], server: LocalServer, api: Api
) -> None:
    backwards = "\u202eright to left"
    run = api.enqueue(workflow=backwards)
    api.claim(owner="w" * 100)
    gate = api.post(
        f"/runs/{run}/gates/begin",
        {
            "name": backwards,
            "prompt": "why " * 500,
            "capability": "c",
            "channels": [{"type": "webhook", "url": "https://ada:secret@chat.example.com/hook"}],
        },
    )["gate"]
    other = api.enqueue("mail", "letter")
    api.post(f"/runs/{other}/cancel", {"reason": "because " * 100})
    tab = make_tab(server.url, viewport={"width": 360, "height": 740})
    page = tab.open("/studio/workers")
    row = page.get_by_role("row", name=re.compile("wwww"))
    assert row.get_by_role("link").bounding_box()["x"] < row.get_by_text("heard").bounding_box()["x"]
    copy = row.get_by_role("button", name=re.compile("^Copy")).bounding_box()
    assert copy["x"] + copy["width"] < 360
    tab.open(f"/studio/review#{run}/{gate['id']}/{gate['resolveToken']}")
    asked, name = page.get_by_text("asked"), page.get_by_text("right to left").last
    assert name.bounding_box()["x"] < asked.bounding_box()["x"] < asked.locator("time").bounding_box()["x"]
    tab.open("/studio/approvals")
    assert page.locator(".ask").bounding_box()["height"] < 150
    page.locator(".ask").click()
    expect(page.locator("dl.facts", has_text="Asked")).to_contain_text("chat.example.com")
    expect(page.get_by_text("secret")).to_have_count(0)
    tab.open("/studio/runs")
    assert row_of(page, other).bounding_box()["height"] < 180


def axe_source() -> str | None:
    """axe-core, from whichever package brings it."""
    for package in ("axe_playwright_python", "axe_core_python"):
        if spec := importlib.util.find_spec(package):
            for folder in spec.submodule_search_locations or ():
                for path in Path(folder).rglob("axe*.js"):
                    return path.read_text()
    return None


def test_axe_finds_no_serious_fault_on_any_page(tab: Tab, api: Api, clock: Clock) -> None:
    source = axe_source()
    if source is None:
        pytest.skip("axe-core is not installed: see requirements-dev.txt")
    run, gate = waiting_at_gate(api)
    api.put(f"/runs/{run}/state", {"value": {"n": 1}})
    api.put(f"/runs/{run}/state", {"value": {"n": 2}})
    api.post(f"/runs/{run}/usage", {"model": "opal", "costUsd": 1})
    broken = holding(api, "one", maxAttempts=1, queue="broken")
    api.begin_step(broken, "send", "w1", options={"sideEffects": ["mail"]})
    clock.advance(ms=LEASE_MS + 1000)
    api.reconcile()
    api.put("/schedules/nightly", {"cron": "0 0 * * *", "workflowName": "sync"})
    page = tab.page

    def faults(**options: Any) -> Any:
        """What axe calls serious: its name, and where."""
        return page.evaluate(
            "(options) => axe.run({resultTypes: ['violations'], ...options}).then((r) => r.violations"
            ".filter((v) => ['serious', 'critical'].includes(v.impact)).map((v) => v.id + ': ' + v.nodes.slice(0, 3)"
            ".map((n) => n.html.slice(0, 200) + ' ' + n.any.map((a) => a.message)[0]).join(' | ')))",
            options,
        )

    def look(address: str) -> None:
        expect(page.locator("h1, .prompt").first).to_be_visible()
        expect(page.locator(".skeleton")).to_have_count(0)
        assert faults() == [], address
        page.emulate_media(color_scheme="dark")
        assert faults(runOnly=["color-contrast"]) == [], f"{address} in dark"  # no other rule looks at colours
        page.emulate_media(color_scheme="light")

    tab.open("/studio")
    page.evaluate(source)
    for address in (
        "/studio/runs",
        f"/studio/runs/{broken}",
        *(f"/studio/runs/{run}?tab={name}" for name in ("events", "state", "gates", "usage", "children", "webhooks")),
        "/studio/approvals",
        "/studio/queues",
        "/studio/schedules",
        "/studio/costs",
        "/studio/workers",
    ):
        tab.go(address)
        look(address)
        assert "There is no such page" not in page.inner_text("h1")
    tab.open(f"/studio/review#{run}/{gate['id']}/{gate['resolveToken']}")
    page.evaluate(source)
    look("the page of a reviewer")


def test_the_server_may_go_away_and_come_back(tab: Tab, api: Api) -> None:
    run = holding(api, "one")
    page = tab.open(f"/studio/runs/{run}")
    expect(page.locator(".mark")).to_have_text("live")
    page.context.set_offline(True)
    page.get_by_role("link", name="Queues").click()
    with_text(page, "The server cannot be reached.")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    page.context.set_offline(False)  # what could not be loaded comes without another click
    expect(page.get_by_role("row", name=re.compile("default"))).to_be_visible()
    expect(page.get_by_text("The server cannot be reached.")).to_be_hidden()
    tab.said = [line for line in tab.said if "ERR_INTERNET_DISCONNECTED" not in line]


def test_a_page_that_cannot_be_shown_says_why(tab: Tab, api: Api) -> None:
    api.enqueue("mail", "letter")
    page = tab.open("/studio/runs?since=yesterday")
    with_text(page, "since: must be a time")
    page.get_by_role("button", name="Remove filter from: yesterday").click()
    expect(page.locator(".runs tbody tr")).to_have_count(1)
    tab.refusals(400)

    page.route("**/studio/operations.js", lambda route: route.fulfill(status=404, json={"error": "no file"}), times=2)
    tab.open("/studio/queues")
    expect(page.get_by_role("alert")).to_contain_text("no file")
    expect(page.get_by_text("The server cannot be reached.")).to_be_hidden()
    tab.refusals(404)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("row", name=re.compile("mail"))).to_be_visible()

    broken = "import { nothing } from './dom.js';"  # as after an upgrade, from the browser's cache
    page.route(
        "**/studio/operations.js",
        lambda route: route.fulfill(content_type="text/javascript", body=broken),
        times=1,
    )
    tab.open("/studio/queues")
    expect(page.get_by_role("alert")).to_contain_text("nothing")
    assert len(tab.said) == 1 and "nothing" in tab.said.pop()
    page.get_by_role("button", name="Try again").click()  # loads all of it again
    expect(page.get_by_role("row", name=re.compile("mail"))).to_be_visible()


@pytest.mark.parametrize("missing", ["studio.js", "dom.js"])
def test_without_its_first_files_the_page_is_not_blank(tab: Tab, missing: str) -> None:
    tab.page.route(f"**/studio/{missing}", lambda route: route.fulfill(status=503))
    tab.open("/studio/runs")
    with_text(tab.page, "reload the page")
    tab.refusals(503)


def test_times_are_in_one_zone_that_is_shown_and_switched(
    make_tab: Callable[..., Tab], server: LocalServer, api: Api
) -> None:
    run = api.enqueue("mail", "letter")
    tab = make_tab(server.url, timezone_id="Asia/Tokyo")
    page = tab.open(f"/studio/runs/{run}")
    created = page.locator("dl.facts div", has_text="Created").locator("time")
    here = created.inner_text()
    created.hover()
    assert "(Asia/Tokyo)" in (created.get_attribute("title") or "")
    page.get_by_role("button", name="Asia/Tokyo").click()
    expect(created).not_to_have_text(here)
    created.hover()
    assert "(UTC)" in (created.get_attribute("title") or "")
    page.reload()
    expect(page.get_by_role("button", name="UTC")).to_be_visible()


def test_the_files_are_small_and_make_no_markup_from_text() -> None:
    files = [path for path in STUDIO.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 152_300  # the aim is 150,000
    text = "".join(path.read_text() for path in files)
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "createContextualFragment",
        "DOMParser",
    ):
        assert word not in text
    assert not re.search(r"\sstyle=|<style|https?://(?!www\.w3\.org/2000/svg)", text)
