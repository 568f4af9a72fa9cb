"""Worker processes for the tests of write-behind. They are made to be killed, so they start in milliseconds.

Run as `behind_worker.py JOURNAL`: it imports the client once and then forks a worker for each line of its input, JSON
such as {"url": ..., "kind": "blocking" or "awaited", "concurrency": 2}. It answers each with the worker's process id.
{"wait": PID} waits for the end of a worker and answers its exit status. When the input ends, all workers are killed.

Each execution of a step appends a line to the journal before the step returns. What the kernel has taken survives the
process; flushing it to disk would matter when a machine loses power, which no test does.
"""

import asyncio
import http.client
import json
import os
import secrets
import signal
import sys
import time
import traceback
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tidebase_sdk
from tidebase_sdk import AsyncTidebase, Tidebase

JOURNAL = Path(sys.argv[1])
tidebase_sdk.BEHIND_S = 60.0  # a busy machine must not reach this bound where a test counts on another


def note(run, what, **line):
    data = json.dumps({"run": run.run_id, "attempt": run.attempt, "what": what, **line}).encode() + b"\n"
    handle = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, data)  # one write to a file opened to append: lines of several processes do not mix
    os.close(handle)


def recorded(url, run):
    """The outputs of the run's completed steps, in order, as the server has them now; asked again while it is away."""
    while True:
        try:
            with urllib.request.urlopen(f"{url}/runs/{run.run_id}?include=steps", timeout=30) as answer:
                steps = json.load(answer)["steps"]
            break
        except (OSError, http.client.HTTPException):  # a server that is killed is started again by the test
            time.sleep(0.05)
    return [step["output"] for step in steps if step["status"] == "completed"]


def workflows(url):
    """The workflows, for both clients. `storm` pays with the key that the step before it made."""

    def make(run, name, seconds):
        time.sleep(seconds)
        value = secrets.token_hex(8)
        note(run, "step", name=name, value=value)
        return value

    def pay(run, values, dies):
        note(run, "effect", number=len(values), key=values[-1], values=values, recorded=recorded(url, run))
        if dies and run.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"paid with {values[-1]}"

    async def storm(run, input):
        values = []
        for number in range(input["steps"]):
            if number in input.get("effects", ()):
                values.append(await run.step(f"pay {number}", lambda: pay(run, list(values), input.get("dies")),
                                             side_effects=["payment"], idempotency_key=values[-1]))
            else:
                name, seconds = f"make {number}", input.get("seconds", 0)
                values.append(await run.step(name, lambda n=name, s=seconds: make(run, n, s)))
            note(run, "returned", number=number, value=values[-1])
        return values

    return {"storm": storm}


class BlockingRun:
    """A blocking run for workflows that are written as `async def`: its steps are done when they return."""

    def __init__(self, run):
        self.run, self.run_id, self.attempt = run, run.run_id, run.attempt

    async def step(self, *args, **options):
        return self.run.step(*args, **options)


def blocking(flow):
    def workflow(run, input):
        try:
            flow(BlockingRun(run), input).send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("it awaited something that was not done")

    return workflow


def work(url, kind, **options):
    options = {"poll_s": 0.05, "write_behind": True, **options}

    async def awaited():
        async with AsyncTidebase(url) as tide:
            for name, flow in workflows(url).items():
                tide.workflow(name, flow)
            await tide.work(**options)

    if kind == "awaited":
        asyncio.run(awaited())
    else:
        with Tidebase(url) as tide:
            for name, flow in workflows(url).items():
                tide.workflow(name, blocking(flow))
            tide.work(**options)


def main():
    workers = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            workers.discard(order["wait"])
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            try:
                work(**order)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        workers.add(pid)
        print(pid, flush=True)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
