"""What is written about Tidebase is so: the README's settings and routes are the server's, its commands run, and the
code passes the checks that pyproject.toml configures."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

import tidebase

README = (ROOT / "README.md").read_text()
SH_BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)


def test_the_readmes_table_of_settings_is_the_servers():
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`([^`]*)`|none) \| (.*?) \|$", README, re.M)
    server = [(s.name, s.default, s.help) for s in tidebase.SETTINGS]
    assert rows[: len(server)] == server


def test_every_route_is_in_the_readme():
    written = re.sub(r"\s+", " ", README)
    for rule in tidebase.app.url_map.iter_rules():
        if rule.rule == "/":
            continue
        words = [part for part in rule.rule.split("/") if part and not part.startswith("<")]
        assert f"`{words[-1]}`" in written or f"/{words[-1]}" in written, f"{rule.rule} is not in the README's table"


def test_each_of_the_first_two_commands_sets_up_all_that_it_needs():
    run, test = SH_BLOCKS[:2]
    assert "demo" in run
    assert "pytest" in test
    for block in (run, test):
        assert "-m venv" in block
        assert "pip install" in block


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_the_code_passes(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_files_say_nothing_of_the_machine_they_were_written_on():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        text = (ROOT / name).read_text(errors="replace")
        for word in ("TO" + "DO", "FIX" + "ME", "X" + "XX"):
            assert not re.search(rf"\b{word}\b", text), f"{name} holds a {word}"
