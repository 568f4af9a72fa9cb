"""What a type checker says of programs that use the client as their users write them: mypy and pyright agree.

A single file `tidebase.py` cannot have a submodule that checkers see. So that `from tidebase.aio import ...` resolves
for them, the client is copied as a package: the file as `tidebase/__init__.py`, and one line as `tidebase/aio.py`. At
run time either way works.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PROGRAM = '''
from __future__ import annotations

from tidebase import RunContext, RunSession, Tidebase
from tidebase.aio import AsyncRunContext, AsyncRunSession, AsyncTidebase

tide, atide = Tidebase(), AsyncTidebase()


def count(page: dict[str, int]) -> int:
    return len(page)


async def fetch(url: str = "") -> str:
    return url


@tide.workflow("report")
def report(run: RunContext, input: dict[str, int]) -> float:
    number: int = run.step("count", count, input=input)
    wrong: str = run.step("count", count, input=input)  # wrong: an int
    run.step("count", count, inptu=input)  # wrong: no such argument
    run.step(name="count", fn=count, input=number, retries=2)
    return run.step("half", lambda: 0.5)


@atide.workflow("report")
async def areport(run: AsyncRunContext) -> str:
    number: int = await run.step("count", lambda: 1)
    wrong: int = await run.step("fetch", fetch)  # wrong: a str
    return await run.step("fetch", lambda: fetch(str(number)), timeout_s=2)


def look() -> None:
    tide.enqueue("report", queu="mail")  # wrong: no such argument
    tide.run("report", report, "run_1", {"a": 1})
    page = tide.runs.list(limit=2)
    cursor: str | None = page.next_cursor
    first: str = page[0]["id"]
    session: RunSession = tide.attach("report")
    if isinstance(session, RunContext):
        session.complete(first)["run"]
    for event in tide.runs.subscribe("run_1", kinds=["step"]):
        print(event["type"], cursor)


async def alook() -> None:
    session: AsyncRunSession = await atide.attach("report")
    await session.gates.begin("approve", "Sure?")
    cancelled: str = (await atide.cancel("run_1", "enough"))["id"]
    print(cancelled, [event async for event in atide.runs.subscribe("run_1")])
'''


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client, the examples and a program of a user's."""
    folder = tmp_path_factory.mktemp("app")
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, folder)
    (folder / "tidebase").mkdir()
    shutil.copy(ROOT / "tidebase_sdk.py", folder / "tidebase" / "__init__.py")
    (folder / "tidebase" / "aio.py").write_text("from tidebase import *\n")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "tidebase_sdk.py").write_text("from tidebase import *\n")  # as the repository has it, for the demo
    # What FastAPI brings takes longer to read than all of ours, and nothing here is said of its types.
    (folder / "mypy.ini").write_text("[mypy]\n[mypy-fastapi.*]\nfollow_imports = skip\n")
    return folder


def wrong_lines(printed: str) -> set[str]:
    """The lines of the program that a checker complains of; no other file may have any."""
    lines = PROGRAM.splitlines()
    found = re.findall(r"(\S+\.pyi?):(\d+)\S* (?:- )?(?:error|warning)", printed)
    assert {Path(file).name for file, _ in found} <= {"program.py"}, printed
    return {lines[int(number) - 1].strip() for _, number in found}


WRONG = {line.strip() for line in PROGRAM.splitlines() if "# wrong" in line}


def test_mypy_knows_what_a_step_returns_and_finds_no_fault_in_the_examples(app: Path) -> None:
    files = sorted(path.name for path in app.glob("*.py"))
    cache = ROOT / ".mypy_cache" / "programs"
    command = [sys.executable, "-m", "mypy", "--check-untyped-defs", "--cache-dir", str(cache), *files]
    done = subprocess.run(command, cwd=app, capture_output=True, text=True)
    assert wrong_lines(done.stdout) == WRONG, done.stdout + done.stderr


def test_pyright_does_too_and_finds_none_in_the_client(app: Path) -> None:
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    if shutil.which("node") is None:
        pytest.skip("pyright needs node, which is not on this machine")
    (app / "pyrightconfig.json").write_text('{"typeCheckingMode": "basic"}')
    done = subprocess.run([sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "program.py", "tidebase"],
                          cwd=app, capture_output=True, text=True)
    assert wrong_lines(done.stdout) == WRONG, done.stdout + done.stderr


def test_both_layouts_give_the_same_classes_at_run_time(app: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "tidebase_sdk.py", tmp_path / "tidebase.py")
    code = "import tidebase, tidebase.aio; print(tidebase.aio.AsyncTidebase is tidebase.AsyncTidebase)"
    for folder in (app, tmp_path):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr
