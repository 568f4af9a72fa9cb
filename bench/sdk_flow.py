#!/usr/bin/env python3
"""Load Tidebase through its Python client, from one worker process, and print what it sustained.

One worker executes C runs at a time. Each run enqueues its successor, is claimed, checkpoints S steps and completes, so
that the work never runs dry and every run pays for all that its life costs; the enqueueing is this process's, too.

    sdk_flow.py                                   1, 8 and 32 runs at a time, on a server of its own with durable commits
    sdk_flow.py --url http://127.0.0.1:7373 -c 8  on a server that runs already
    sdk_flow.py --awaited                         AsyncTidebase, workflows as tasks
    sdk_flow.py --begin                           steps with side effects: two writes each
    sdk_flow.py --sdk OLD/tidebase_sdk.py         another version of the client

The client's CPU is part of the figure. Compare by turns, on one machine; quote ratios and medians of several rounds.
"""
import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_S = 1.0  # connections are opened, the schema's functions planned

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", help="default: a server of its own, with an embedded PostgreSQL")
parser.add_argument("-c", "--concurrency", type=int, nargs="+", default=[1, 8, 32])
parser.add_argument("-d", "--seconds", type=float, default=6)
parser.add_argument("-s", "--steps", type=int, default=10)
parser.add_argument("--payload", type=int, default=200, help="bytes of text in each input and output")
parser.add_argument("--awaited", action="store_true")
parser.add_argument("--begin", action="store_true")
parser.add_argument("--sdk", type=Path, default=ROOT / "tidebase_sdk.py")
parser.add_argument("--json", action="store_true", help="print one JSON object per concurrency instead of words")


@contextlib.contextmanager
def a_server(log=subprocess.DEVNULL):
    """A server of our own on a free port, and its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="tidebase-bench-")
    environment = {**os.environ, "PORT": str(port), "TIDEBASE_DATA_DIR": folder}
    process = subprocess.Popen([sys.executable, str(ROOT / "tidebase.py")], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health").read()
                break
            time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def client_of(path):
    spec = importlib.util.spec_from_file_location("tidebase_under_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measure(args, module, url, concurrency):
    """Run the flow for args.seconds.  Returns the figures."""
    began = time.perf_counter() + WARM_UP_S
    end = began + args.seconds
    queue, text = f"bench-{os.urandom(4).hex()}", {"text": "x" * args.payload}
    steps, runs, cpu = [], [], []
    options = {"side_effects": ["email"]} if args.begin else {}

    def note(started, times):
        now = time.perf_counter()
        if began <= now < end:
            times.append(now - started)
            if not cpu:
                cpu.append(resource.getrusage(resource.RUSAGE_SELF))

    def flow(run, input):
        started = time.perf_counter()
        if started < end:
            tide.enqueue("flow", queue, input=input)
        for number in range(args.steps):
            step = time.perf_counter()
            run.step(f"step {number}", lambda: text, input=input, **options)
            note(step, steps)
        note(started, runs)

    async def flow_awaited(run, input):
        started = time.perf_counter()
        if started < end:
            await tide.enqueue("flow", queue, input=input)
        for number in range(args.steps):
            step = time.perf_counter()
            await run.step(f"step {number}", give, input=input, **options)
            note(step, steps)
        note(started, runs)

    async def give():
        return text

    def over():
        if time.perf_counter() > end and len(cpu) == 1:
            cpu.append(resource.getrusage(resource.RUSAGE_SELF))
        return time.perf_counter() > end

    async def work():
        async with tide:
            await asyncio.gather(*(tide.enqueue("flow", queue, input=text) for _ in range(concurrency)))
            await tide.work([queue], concurrency=concurrency, limit=concurrency, stop=over)

    tide = (module.AsyncTidebase if args.awaited else module.Tidebase)(url)
    tide.workflow("flow", flow_awaited if args.awaited else flow)
    if args.awaited:
        asyncio.run(work())
    else:
        with tide:
            for _ in range(concurrency):
                tide.enqueue("flow", queue, input=text)
            tide.work([queue], concurrency=concurrency, limit=concurrency, stop=over)
    spent = sum(getattr(cpu[1], key) - getattr(cpu[0], key) for key in ("ru_utime", "ru_stime"))
    return {"concurrency": concurrency, "awaited": args.awaited, "writesPerStep": 2 if args.begin else 1,
            "stepsPerSecond": round(len(steps) / args.seconds, 1), "runsPerSecond": round(len(runs) / args.seconds, 1),
            "clientCpuMicrosecondsPerStep": round(spent / max(len(steps), 1) * 1e6),
            "milliseconds": {"step": spread(steps), "run": spread(runs)}}


def spread(times):
    times = sorted(times) or [0.0]
    return {name: round(times[int(len(times) * part)] * 1e3, 2) for name, part in (("p50", 0.5), ("p99", 0.99))}


def main():
    args = parser.parse_args()
    module = client_of(args.sdk)
    with contextlib.nullcontext(args.url) if args.url else a_server() as url:
        for concurrency in args.concurrency:
            figures = measure(args, module, url, concurrency)
            if args.json:
                print(json.dumps(figures), flush=True)
                continue
            ms = figures["milliseconds"]
            print(f"c={concurrency:<3d} {figures['stepsPerSecond']:8.1f} steps/s {figures['runsPerSecond']:7.1f} runs/s"
                  f"   step p50 {ms['step']['p50']:6.2f} ms p99 {ms['step']['p99']:6.2f} ms"
                  f"   client {figures['clientCpuMicrosecondsPerStep']} us CPU a step", flush=True)


if __name__ == "__main__":
    main()
