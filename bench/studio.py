"""How quick Studio is, measured in a real browser:  python bench/studio.py

The list over 100,000 runs; a run of 1,000 steps and 5,000 events that is scrolled through; and what one live event of
it costs the tab. Needs playwright and Chromium (see requirements-dev.txt). Brings its own database and server.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psycopg
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from story import Story

import tidebase

RUNS = 100_000
STEPS, USAGES = 1_000, 3_000  # with a step.started and a step.completed each: 5,000 events
LIVE_EVENTS = 200
VISITS = 7
SCREEN = {"width": 1280, "height": 800}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tidebase-bench-") as folder:
        embedded = tidebase.EmbeddedPostgres(folder)
        try:
            measure(embedded.start())
        finally:
            embedded.stop()


def measure(conninfo: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {"DATABASE_URL": conninfo, "PORT": str(port), "TIDEBASE_LEASE_MS": "3600000"}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tidebase.py")],
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"{url}/health")
        story = Story(url, conninfo)
        run = long_run(story)
        many_runs(conninfo)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_context(viewport=SCREEN).new_page()
            page.goto(f"{url}/studio/icon.svg")
            page.wait_for_timeout(3000)  # the browser itself has started
            measure_list(browser, url)
            measure_run(page, url, run, story)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


def long_run(story: Story) -> str:
    run = story.enqueue("long", "bench")
    story.claim("bench", "w")
    for first in range(0, STEPS, 100):
        story.post(
            "/steps",
            {
                "records": [
                    {
                        "runId": run,
                        "name": f"step {number}",
                        "inputHash": "h",
                        "leaseOwner": "w",
                        "output": {"n": number},
                        "durationMs": 20,
                    }
                    for number in range(first, first + 100)
                ]
            },
        )
    for number in range(USAGES):
        story.usage(run, None, "opal-4", number, 1, 0.0001)
    return run


def many_runs(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(
            "insert into tidebase.runs (id, workflow_name, input, metadata, status, queue, created_at, updated_at,"
            " completed_at)"
            " select 'run_' || md5(n::text), 'report-' || n %% 20, '{}', '{}',"
            " case when n %% 50 = 0 then 'failed' else 'completed' end,"
            " 'queue-' || n %% 7, now() - n * interval '1 second', now(), now() from generate_series(1, %s) n",
            (RUNS,),
        )
        connection.execute("analyze tidebase.runs")


# When the first row of the list was there, when it was painted, and when the HTML had come, by the browser's clock.
FIRST_ROW = """
new MutationObserver((_, observer) => {
    if (!document.querySelector(".runs tbody tr")) return;
    observer.disconnect();
    requestAnimationFrame(() => {
        window.firstRow = performance.now();
        setTimeout(() => { window.painted = performance.now(); });
    });
}).observe(document, {childList: true, subtree: true});
"""
SINCE_HTML = """() => new Promise((resolve) => setTimeout(() => {
    const [{responseEnd}] = performance.getEntriesByType("navigation");
    resolve([window.firstRow - responseEnd, window.painted - responseEnd]);
}, 200))"""


def measure_list(browser: Any, url: str) -> None:
    """Visits with an empty cache, each in a context of its own, and again when the browser has the files."""
    first, again = list[list[float]](), list[list[float]]()
    for _ in range(VISITS):
        context = browser.new_context(viewport=SCREEN)
        page = context.new_page()
        page.add_init_script(FIRST_ROW)
        for times in (first, again, again):
            page.goto(f"{url}/studio/runs")
            page.wait_for_selector(".runs tbody tr")
            times.append(page.evaluate(SINCE_HTML))
        context.close()
    for visit, times in (("the first visit", first), ("when the browser has the files", again)):
        drawn, painted = zip(*times, strict=True)
        print(
            f"list of {RUNS:,} runs, {visit}: rows drawn {min(drawn):.0f} to {max(drawn):.0f} ms after the HTML,"
            f" median {statistics.median(drawn):.0f} ms, and painted {statistics.median(painted):.0f} ms after it"
        )


METRICS = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration")


def measure_run(page: Any, url: str, run: str, story: Story) -> None:
    page.add_init_script(
        "window.long = []; new PerformanceObserver((list) =>"
        " window.long.push(...list.getEntries().map((entry) => entry.duration))).observe({entryTypes: ['longtask']});"
    )
    begun = time.monotonic()
    page.goto(f"{url}/studio/runs/{run}")
    page.get_by_role("tab", name=re.compile(r"Events\s*5,0")).wait_for()
    page.wait_for_timeout(1500)
    print(
        f"run of {STEPS:,} steps: open after {1000 * (time.monotonic() - begun) - 1500:.0f} ms,"
        f" longest task while it opens {max(page.evaluate('window.long') or [0]):.0f} ms"
    )
    for tab in ("Timeline", "Events"):
        page.get_by_role("tab", name=tab).click()
        page.evaluate("window.long.length = 0")
        page.mouse.move(500, 600)
        for _ in range(60):
            page.mouse.wheel(0, 900)
            page.wait_for_timeout(16)
        long = page.evaluate("window.long")
        print(
            f"  {tab} scrolled by {page.evaluate('scrollY'):,} px:"
            f" {len(long)} tasks of more than 50 ms, the longest {max(long, default=0):.0f} ms"
        )
    page.get_by_role("tab", name="Timeline").click()
    page.evaluate("scrollTo(0, 0)")
    cdp = page.context.new_cdp_session(page)
    cdp.send("Performance.enable")

    def spent() -> float:
        found = {metric["name"]: metric["value"] for metric in cdp.send("Performance.getMetrics")["metrics"]}
        return 1000 * sum(found[name] for name in METRICS)

    page.wait_for_timeout(1000)
    quiet, begun = spent(), time.monotonic()
    page.wait_for_timeout(4000)
    idle = (spent() - quiet) / (time.monotonic() - begun)
    before, begun = spent(), time.monotonic()
    for number in range(LIVE_EVENTS // 2):
        story.post(
            f"/runs/{run}/steps",
            {"name": f"live {number}", "inputHash": "h", "leaseOwner": "w", "output": 1, "durationMs": 5},
        )
        page.wait_for_timeout(20)
    page.wait_for_timeout(1500)
    live = spent() - before - idle * (time.monotonic() - begun)
    print(f"  {LIVE_EVENTS} live events: {live / LIVE_EVENTS:.2f} ms of the tab's main thread each")


if __name__ == "__main__":
    main()
