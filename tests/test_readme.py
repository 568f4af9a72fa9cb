"""The README's programs run as printed: each block is saved under the name in its first line, beside the client that is
copied in as tidebase.py, and started as a reader would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PROGRAMS: dict[str, str] = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", README, re.M | re.S))


class Folder:
    """A reader's folder with the README's programs, and what was started in it."""

    def __init__(self, path: Path, server_url: str) -> None:
        self.path, self.environment = path, {**os.environ, "TIDEBASE_URL": server_url}
        self.workers: list[subprocess.Popen[bytes]] = []
        shutil.copy(ROOT / "tidebase_sdk.py", path / "tidebase.py")
        for name, text in PROGRAMS.items():
            (path / name).write_text(text)

    def work(self, name: str) -> None:
        """Start a program that goes on until it is stopped."""
        with (self.path / f"{name}.log").open("wb") as log:
            self.workers.append(subprocess.Popen([sys.executable, name], cwd=self.path, env=self.environment,
                                                 stdout=log, stderr=log))

    def run(self, name: str) -> list[str]:
        """Run a program to its end.  :returns: the lines that it printed."""
        done = subprocess.run([sys.executable, name], cwd=self.path, env=self.environment, capture_output=True,
                              text=True, timeout=60)
        logs = "".join(log.read_text() for log in self.path.glob("*.log"))
        assert done.returncode == 0, done.stdout + done.stderr + logs
        return done.stdout.splitlines()


@pytest.fixture
def folder(spawn_server: Callable[..., Any], tmp_path: Path) -> Iterator[Folder]:
    made = Folder(tmp_path, spawn_server().url)
    yield made
    for worker in made.workers:
        worker.kill()
        worker.wait(10)


def test_every_python_block_has_a_name_and_is_run_here():
    assert len(PROGRAMS) == README.count("```python")
    assert set(PROGRAMS) == {"greet.py", "order_worker.py", "order.py", "campaign_worker.py", "campaign.py"}


def test_greet_answers_twice_the_same(folder: Folder):
    assert [folder.run("greet.py") for _ in range(2)] == [["Hello, Ada!"]] * 2


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
