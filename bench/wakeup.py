"""How long a run that waits for a person takes to go on: from the decision's answer to the first line after the gate.

    python bench/wakeup.py [--runs 200] [--database URL]

A worker process with 8 places serves one queue. All runs wait at their gates, without a worker; then they are decided
one after the other, through another connection, at random moments. Measured with one server, which the worker and the
deciding client share, and with two on one database: there the worker's server has to notice what the other one wrote.
Without --database an embedded PostgreSQL is started, in a folder that is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tidebase  # noqa: E402
from tidebase import Tidebase  # noqa: E402

PLACES = 8


def work(url: str) -> None:
    """The worker process. What it measures is the run's result."""
    tide = Tidebase(url)

    @tide.workflow("wakeup")
    def wakeup(run, input):
        run.gate("go", "May it go on?", hold_s=0)
        return run.step("next", time.time)  # one machine, one clock

    tide.work(["wakeup"], concurrency=PLACES)


def start(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], env={**os.environ, **environment})


def serve(database: str) -> tuple[subprocess.Popen[bytes], Tidebase]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start(str(ROOT / "tidebase.py"), DATABASE_URL=database, PORT=str(port))
    tide = Tidebase(f"http://127.0.0.1:{port}")
    tide.queues.list()  # answers, after repeats, once the server is up
    return process, tide


def measure(database: str, servers: int, runs: int) -> list[float]:
    """Milliseconds from a decision to the next step, of each run, sorted."""
    processes, tides = zip(*(serve(database) for _ in range(servers)), strict=True)
    worker = start(__file__, "--work", tides[-1]._server.url)
    deciding, latencies = tides[0], []
    try:
        ids = [deciding.enqueue("wakeup", queue="wakeup")["run"]["id"] for _ in range(runs)]
        while deciding.queues.list()[0]["waiting"] < runs:
            time.sleep(0.1)
        for run_id in ids:
            gate = deciding.runs.get(run_id, include=["gates"])["gates"][0]
            time.sleep(random.uniform(0.0, 0.05))
            deciding.gates.resolve(run_id, gate["id"], token=gate["resolveToken"], decision="approved")
            decided = time.time()
            latencies.append((deciding.runs.wait(run_id, timeout_s=30) - decided) * 1000)
    finally:
        for process in (worker, *processes):
            process.terminate()
            process.wait(30)
    return sorted(latencies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--database", help="an empty database to use")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--work", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    with tempfile.TemporaryDirectory(prefix="tidebase-bench-", ignore_cleanup_errors=True) as folder:
        embedded = None if options.database else tidebase.EmbeddedPostgres(folder)
        try:
            database = options.database or embedded.start()
            for servers in (1, 2):
                latencies = measure(database, servers, options.runs)
                p50, p99 = statistics.median(latencies), statistics.quantiles(latencies, n=100, method="inclusive")[98]
                figures = {"servers": servers, "runs": len(latencies), "p50_ms": round(p50, 1),
                           "p99_ms": round(p99, 1), "max_ms": round(latencies[-1], 1)}
                words = "{servers} server(s), {runs} runs: p50 {p50_ms} ms, p99 {p99_ms} ms, longest {max_ms} ms"
                print(json.dumps(figures) if options.json else words.format(**figures), flush=True)
        finally:
            if embedded:
                embedded.stop()


if __name__ == "__main__":
    main()
