"""A worker for the tests that kill: each execution of a step leaves a line in a journal before it does anything else.

Run as `storm_worker.py JOURNAL [CONCURRENCY]` with TIDEBASE_URL set. The workflow "storm" takes {"steps": how many,
"seconds": how long each takes}, or {"until": a file that a step waits for}.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tidebase_sdk import Tidebase

JOURNAL = Path(sys.argv[1])


def note(run_id, step):
    line = json.dumps({"run": run_id, "step": step, "pid": os.getpid(), "at": time.time()}) + "\n"
    handle = os.open(JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line.encode())  # one write to a file opened to append: lines of several processes do not mix
    os.close(handle)


def storm(run, input):
    def work(number):
        note(run.run_id, f"step-{number}")
        time.sleep(input.get("seconds", 0))
        while "until" in input and not Path(input["until"]).exists():
            time.sleep(0.02)
        return {"number": number, "pid": os.getpid()}

    return [run.step(f"step-{n}", lambda n=n: work(n), input={"n": n})["number"] for n in range(input["steps"])]


tide = Tidebase()
tide.workflow("storm", storm)
tide.work(queues=["storm"], poll_s=0.2, concurrency=int(sys.argv[2]) if len(sys.argv) > 2 else 1)
