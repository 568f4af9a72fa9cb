"""What is written about Tidebase is so: the README's settings and routes are the server's, its commands run, and the
code passes the checks that pyproject.toml configures."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
        assert re.search(r"pip install -q --require-hashes -r requirements(-dev)?\.lock ", block)


def asked_for(name: str) -> list[Requirement]:
    """What a requirements file names, and those that it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    included = [one for line in lines if line.startswith("-r ") for one in asked_for(line.removeprefix("-r "))]
    return included + [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def locked(name: str) -> dict[str, str]:
    """The packages of a lock and their versions, after asserting that each has the hashes of its files."""
    versions = {}
    for entry in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
        if entry.startswith("#"):
            continue
        words, *hashes = entry.split(" --hash=")
        requirement = Requirement(words.strip())
        assert hashes, entry
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", one.strip()) for one in hashes), entry
        versions[canonicalize_name(requirement.name)] = str(requirement.specifier)
    return versions


def all_needed(asked: list[Requirement]) -> set[str]:
    """The packages that these need on this machine, themselves among them, as those installed here say."""
    seen: set[tuple[str, str]] = set()
    left = [(one.name, extra) for one in asked for extra in ("", *one.extras)]
    while left:
        name, extra = left.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for one in map(Requirement, metadata.requires(name) or []):
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                left += [(one.name, of) for of in ("", *one.extras)]
    return {canonicalize_name(name) for name, _ in seen}


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_the_lock_is_of_the_requirements_and_of_all_that_they_need_each_file_with_its_hash(name):
    asked, lock = asked_for(f"{name}.txt"), locked(f"{name}.lock")
    for one in asked:
        assert lock.get(canonicalize_name(one.name)) == str(one.specifier), f"make {name}.lock anew: {one}"
    assert all_needed(asked) <= lock.keys()
    assert all(re.fullmatch("==[^*]+", version) for version in lock.values())
    assert "://" not in (ROOT / f"{name}.lock").read_text()
    assert lock.items() <= locked("requirements-dev.lock").items()


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_the_code_passes(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_files_say_nothing_of_the_machine_they_were_written_on():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        if name.endswith(".png"):
            continue
        text = (ROOT / name).read_text(errors="replace")
        for word in ("TO" + "DO", "FIX" + "ME", "X" + "XX"):
            assert not re.search(rf"\b{word}\b", text), f"{name} holds a {word}"


# ------------------------------------------------------------------------------
# SECURITY.md
# ------------------------------------------------------------------------------
def security_rows() -> list[list[str]]:
    """The rows of the table of attacks, but for its head and the headings in it: attack, what happens, tests."""
    lines = (ROOT / "SECURITY.md").read_text().split("| attack |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]
    assert {len(row) for row in rows} == {3}
    return [row for row in rows if not row[0].startswith("**")]


def test_each_attack_in_security_md_has_a_test_that_exists():
    written = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(
        r"^(?:async )?def (test_\w+)", path.read_text(), re.M)}
    rows = security_rows()
    assert len(rows) > 40
    for attack, answer, tests in rows:
        names = re.findall(r"`(\w+)`", tests)
        assert answer, attack
        assert names, f"no test is named for: {attack}"
        assert set(names) <= written, f"{set(names) - written} is no test"
