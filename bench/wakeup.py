#!/usr/bin/env python3
"""How long a run that waits for a person takes to go on: from the decision's answer to the first line after the gate.

    wakeup.py              200 runs, first with one server, then with two
    wakeup.py --runs 50

A worker process executes 8 runs of one queue at a time. All runs wait at their gates, without a worker; then they are
decided one after the other, through another connection, at random moments. Measured with one server, which the worker
and the deciding client share, and with two on one database: there the worker's server has to notice what the other one
wrote.
"""
import argparse
import random
import subprocess
import sys
import time
from contextlib import ExitStack

from common import client_module, database, postgres, show, spread, tidebase

CONCURRENCY = 8


def work(url):
    """The worker process. What it measures is the run's result."""
    tide = client_module().Tidebase(url)

    @tide.workflow("wakeup")
    def wakeup(run, input):
        run.gate("go", "May it go on?", hold_s=0)
        return run.step("next", time.time)  # one machine, one clock

    tide.work(["wakeup"], concurrency=CONCURRENCY)


def measure(urls, runs):
    """Seconds from a decision, given at the first server, to the next step, at a worker of the last, of each run."""
    worker = subprocess.Popen([sys.executable, __file__, "--work", urls[-1]])
    times = []
    try:
        with client_module().Tidebase(urls[0]) as tide:
            ids = [tide.enqueue("wakeup", queue="wakeup")["run"]["id"] for _ in range(runs)]
            while tide.queues.list()[0]["waiting"] < runs:
                time.sleep(0.1)
            for run_id in ids:
                gate = tide.runs.get(run_id, include=["gates"])["gates"][0]
                time.sleep(random.uniform(0.0, 0.05))
                tide.gates.resolve(run_id, gate["id"], token=gate["resolveToken"], decision="approved")
                decided = time.time()
                times.append(tide.runs.wait(run_id, timeout_s=30) - decided)
    finally:
        worker.terminate()
        worker.wait(30)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--work", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    with postgres() as server_url:
        for servers in (1, 2):
            with ExitStack() as stack:
                database_url = stack.enter_context(database(server_url))
                urls = [stack.enter_context(tidebase(database_url)).url for _ in range(servers)]
                times = measure(urls, args.runs)
            show({"servers": servers, "runs": args.runs, **spread(times)}, args.json,
                 "{servers} server(s), {runs} runs: p50 {p50} ms, p99 {p99} ms")


if __name__ == "__main__":
    main()
