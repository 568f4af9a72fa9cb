"""Take the pictures of Studio for docs/ and the README:  python docs/screenshots.py

A server with a database of its own, a month of runs told to it (story.py), and each page in light and dark. Needs
playwright and Chromium (see requirements-dev.txt).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright
from story import Story

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import tidebase

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tidebase-pictures-") as folder:
        embedded = tidebase.EmbeddedPostgres(folder)
        try:
            take(embedded.start())
        finally:
            embedded.stop()


def take(conninfo: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url, settings = f"http://127.0.0.1:{port}", {"DATABASE_URL": conninfo, "PORT": port, "TIDEBASE_LEASE_MS": "60000"}
    server = subprocess.Popen([sys.executable, str(ROOT / "tidebase.py")], env={**os.environ, **settings})
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.1)
        story = Story(url, conninfo)
        ids = story.tell()
        gate = story.send("GET", "/approvals?limit=1")["items"][0]["gate"]
        pages = [
            ("runs", "/studio/runs", WIDE, ".runs tbody tr"),
            ("crash", f"/studio/runs/{ids['crash']}", WIDE, ".bar.is-cut"),
            ("rerun", f"/studio/runs/{ids['review']}", WIDE, ".verdict form"),
            ("approvals", "/studio/approvals", WIDE, ".prompt"),
            ("costs", "/studio/costs", WIDE, ".chart rect"),
            ("phone", f"/studio/review#{gate['runId']}/{gate['id']}/{gate['resolveToken']}", PHONE, ".prompt"),
        ]
        with sync_playwright() as driver:
            browser = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            for scheme in ("light", "dark"):
                for name, path, viewport, shown in pages:
                    scale = 2 if viewport is PHONE else 1
                    context = browser.new_context(
                        viewport=viewport, color_scheme=scheme, device_scale_factor=scale, timezone_id="UTC"
                    )
                    page = context.new_page()
                    page.goto(url + path)
                    page.wait_for_selector(shown)
                    if name == "crash":
                        page.get_by_role("button", name="draft: completed").click()
                    page.wait_for_timeout(1200)  # what comes a moment later: counts, charts, the mark
                    page.screenshot(path=DOCS / f"studio-{name}-{scheme}.png")
                    context.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
