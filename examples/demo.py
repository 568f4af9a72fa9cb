"""Watch a run survive its worker:  python tidebase.py demo [topic]

Enqueues a report, starts a worker, kills it with SIGKILL in the middle of a step, starts another one, and shows step by
step what was executed and what was replayed. Ends with the proof, or with a plain word on what was not so and exit 1.

Two witnesses are compared: the journal, in which the workers note when the body of a step really begins to run, and the
server's record of what was begun and completed, and by whom. Steps are slowed by PACE_S so that a person can follow.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from tidebase_sdk import Tidebase, TidebaseError
from workflows import UnknownTopic, generate_report, load

PACE_S = 0.7  # added to each step
LEASE_MS = 3000  # of the server that the demo starts: how long a dead worker's run stays its own
START_S = 90  # for that server: the very first start creates the database
PATIENCE_S = 60  # without any progress, beyond the lease
COMPLETED_BEFORE_KILL = 3


class DemoFailed(Exception):
    """What was not so, in words for the person watching."""


def main(arguments: list[str]) -> None:
    """Run the demo on the given topic; exits 1 with an explanation if a promise was not kept, 130 on Ctrl-C."""
    topic = arguments[0] if arguments else "asyncio"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # both end the demo in order
    try:
        load(topic)
        with tempfile.TemporaryDirectory(prefix="tidebase-demo-") as folder, Processes(Path(folder)) as processes:
            show(topic, processes, Path(folder) / "journal")
    except UnknownTopic as exc:
        sys.exit(str(exc))
    except (DemoFailed, TidebaseError) as exc:
        sys.exit(f"{paint('This was not as promised:', 31)} {exc}")
    except KeyboardInterrupt:
        print("\nStopped; every process that the demo started has ended.")
        sys.exit(130)


def show(topic: str, processes: Processes, journal: Path) -> None:
    print(f"A report on {topic!r}. One worker is killed half way, another one finishes.")
    print(f"Each step is slowed by {PACE_S} s so that you can watch.\n")
    url = find_or_start_server(processes)
    tide = Tidebase(url)
    queue = f"demo-{os.getpid()}-{time.time():.0f}"  # nobody else's worker takes this run, and ours takes no other
    run_id, begun = tide.enqueue("demo-report", queue=queue, input={"topic": topic})["run"]["id"], time.monotonic()
    say("run", f"{run_id} enqueued")
    say("studio", f"{url}/studio/runs/{run_id}")
    view = View(tide, run_id, journal)
    try:
        first = processes.start_worker("A", queue, journal, url)
        while not (running := view.steps("running")) or len(view.steps("completed")) < COMPLETED_BEFORE_KILL:
            view.refresh()
        first.kill()
        first.wait()
        killed, lease_s = time.monotonic(), view.lease_s()
        print(f"  {running[0]:<12} {paint('cut off ', 31)} by A")
        say("worker A", f"{paint('killed with SIGKILL', 31)}; its lease ends within {lease_s:.1f} s")
        processes.start_worker("B", queue, journal, url)
        while not view.lines("B"):
            view.refresh(lease_s)
        waited = time.monotonic() - killed
        while view.detail["run"]["status"] != "completed":
            view.refresh()
        view.refresh()
    except BaseException:
        with contextlib.suppress(TidebaseError):  # leave no half run on somebody's server
            tide.runs.cancel(run_id, reason="the demo was stopped")
        raise
    prove(view)
    result = view.detail["run"]["result"]
    print(f"  {time.monotonic() - begun:.1f} s in all, {waited:.1f} s of them until worker B was at work\n")
    say("report", f"{result['path']}: {result['words']:,} words on {result['names']} names")


def prove(view: View) -> None:
    """Hold the server's record against the journal; DemoFailed unless every step completed once and never ran after."""
    claimed_by: list[str] = []
    started: dict[str, list[int]] = {}
    completed: dict[str, list[tuple[int, str]]] = {}
    for event in view.detail["events"]:
        step = event["payload"].get("name")
        if event["type"] == "run.claimed":
            claimed_by.append(event["payload"]["leaseOwner"][0])
        elif event["type"] == "step.started":
            started.setdefault(step, []).append(event["seq"])
        elif event["type"] == "step.completed":
            completed.setdefault(step, []).append((event["seq"], claimed_by[-1]))
    print(f"\n  {'the record:':<12} {'started':>8} {'completed':>10} {'by':>4}   the body really ran on")
    repeated = []
    for step in (row["name"] for row in view.detail["steps"]):
        ends, bodies = completed.get(step, []), [line["worker"] for line in view.lines() if line["begins"] == step]
        begins, (end, owner) = started.get(step, []), ends[0] if ends else (0, "-")
        if len(ends) != 1 or any(begin > end for begin in begins) or bodies[-1:] != [owner] or bodies.count(owner) > 1:
            repeated.append(step)
        print(f"  {step:<12} {len(begins):>7}x {len(ends):>9}x {owner:>4}   {', then '.join(bodies)}")
    if repeated:
        raise DemoFailed(f"not completed exactly once, or executed after that: {', '.join(repeated)}")
    if claimed_by != ["A", "B"]:
        raise DemoFailed(f"the run was claimed by {claimed_by}, not by A and then by B")
    path = Path(view.detail["run"]["result"]["path"])
    if not path.is_file() or path.stat().st_size != view.detail["run"]["result"]["bytes"]:
        raise DemoFailed(f"the report {path} is missing or not whole")
    print("\n  " + paint("0 completed steps were executed twice", 32))


class View:
    """The run as it goes on: the server's detail, and the journal, printed line by line as steps come to an end."""

    def __init__(self, tide: Tidebase, run_id: str, journal: Path) -> None:
        self.tide, self.run_id, self.journal, self.shown, self.moved = tide, run_id, journal, 0, time.monotonic()
        self.detail: dict[str, Any] = tide.runs.get(run_id)

    def refresh(self, extra_patience_s: float = 0) -> None:
        """Look again; raises DemoFailed when the run failed or nothing has moved for too long."""
        time.sleep(0.05)
        self.detail = self.tide.runs.get(self.run_id)
        for line in self.lines()[self.shown :]:
            self.shown, self.moved = self.shown + 1, time.monotonic()
            if not line["begins"]:
                what = paint(line["what"], 32 if line["what"] == "executed" else 36)
                print(f"  {line['step']:<12} {what} by {line['worker']} {line['ms']:>8,} ms", flush=True)
        run = self.detail["run"]
        failed = [event["payload"]["error"] for event in self.detail["events"] if event["type"] == "step.failed"]
        if failed or run["status"] in ("failed", "cancelled"):
            error = (failed or [run["error"]])[-1] or {"name": "no error", "message": run["cancelReason"]}
            raise DemoFailed(f"the run is {run['status']}: {error['name']}: {error['message']}")
        if time.monotonic() - self.moved > PATIENCE_S + extra_patience_s:
            logs = "".join(path.read_text(errors="replace")[-2000:] for path in self.journal.parent.glob("worker*.log"))
            raise DemoFailed(f"nothing moves any more. The workers' last words:\n{logs or '(none)'}")

    def lines(self, worker: str | None = None) -> list[dict[str, Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [entry for entry in map(json.loads, lines) if worker in (None, entry["worker"])]

    def steps(self, status: str) -> list[str]:
        return [step["name"] for step in self.detail["steps"] if step["status"] == status]

    def lease_s(self) -> float:
        updated, ends = (datetime.fromisoformat(self.detail["run"][key]) for key in ("updatedAt", "leaseExpiresAt"))
        return (ends - updated).total_seconds()


class Processes:
    """The demo's children. They end with it: workers first, then the server; who does not go is made to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave anything behind
        for child in reversed(self.running):
            child.terminate()
            try:
                child.wait(timeout=30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def start(self, log: str, command: list[str], **settings: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("wb") as output:  # its own session: Ctrl-C comes to the demo alone
            child = subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **settings},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.running.append(child)
        return child

    def start_worker(self, name: str, queue: str, journal: Path, url: str) -> subprocess.Popen[bytes]:
        worker = self.start(f"worker-{name}.log", [__file__, "--worker", name, queue, str(journal)], TIDEBASE_URL=url)
        say(f"worker {name}", f"started, process {worker.pid}")
        return worker


def find_or_start_server(processes: Processes) -> str:
    url = os.environ.get("TIDEBASE_URL") or "http://127.0.0.1:7373"
    if answers(url):
        say("server", f"found at {url}")
        return url
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url, begun = f"http://127.0.0.1:{port}", time.monotonic()
    settings = {"HOST": "127.0.0.1", "PORT": port, "TIDEBASE_LEASE_MS": str(LEASE_MS), "TIDEBASE_RECONCILE_MS": "500"}
    server = processes.start("server.log", [str(ROOT / "tidebase.py")], **settings)
    while not answers(url):
        if server.poll() is not None or time.monotonic() - begun > START_S:
            words = (processes.folder / "server.log").read_text(errors="replace")[-3000:]
            raise DemoFailed(f"the server did not start. Its last words:\n{words}")
        time.sleep(0.1)
    say("server", f"started at {url} in {time.monotonic() - begun:.1f} s")
    return url


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return json.load(answer)["ok"] is True
    except (OSError, ValueError, LookupError, TypeError):  # nobody there, or somebody else
        return False


def say(who: str, what: str) -> None:
    print(f"{paint(f'{who:<9}', 1)} {what}", flush=True)


def paint(text: str, colour: int) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def work(name: str, queue: str, journal: str) -> None:
    """The worker process: an ordinary worker, but for steps that are slowed and noted."""
    file, demo, tide = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), os.getppid(), Tidebase()

    def note(**line: Any) -> None:  # one write, so that a kill leaves no half line
        os.write(file, json.dumps({"worker": name, "begins": None, **line}).encode() + b"\n")

    class Watched:
        def __init__(self, run: Any) -> None:
            self.run_id, self.run = run.run_id, run

        def step(self, step: str, fn: Any, **options: Any) -> Any:
            begun, what = time.monotonic(), "replayed"

            def body() -> Any:
                nonlocal what
                what = "executed"
                note(begins=step)
                time.sleep(PACE_S)
                return fn()

            outcome = self.run.step(step, body, **options)
            note(step=step, what=what, ms=round(1000 * (time.monotonic() - begun)))
            return outcome

    tide.workflow("demo-report", lambda run, input: generate_report(Watched(run), input))  # type: ignore[arg-type]
    tide.work(queues=[queue], poll_s=0.5, lease_owner=f"{name}-{os.getpid()}", stop=lambda: os.getppid() != demo)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main(sys.argv[1:])
