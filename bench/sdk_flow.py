#!/usr/bin/env python3
"""Load Tidebase through its Python client, from one worker process, and print what it sustained.

One worker executes C runs at a time. Each run enqueues its successor, is claimed, checkpoints S steps and completes, so
that the work never runs dry and every run pays for all that its life costs; the enqueueing is this process's, too.

    sdk_flow.py                                   1, 8 and 32 at a time, on a server of its own with durable commits
    sdk_flow.py --url http://127.0.0.1:7373 -c 8  on a server that runs already
    sdk_flow.py --awaited                         AsyncTidebase, workflows as tasks
    sdk_flow.py --begin                           steps with side effects: two writes each
    sdk_flow.py --write-behind                    a step returns before its record is durable; the run's end waits
    sdk_flow.py --sdk OLD/tidebase_sdk.py         another version of the client

Prints the CPU per step of this process, of the server and of PostgreSQL, too. Compare by turns, on one machine; quote
ratios and medians of several rounds.
"""
import asyncio
import os
import time
from pathlib import Path

from common import ROOT, Window, client_module, parser_of, show, spread, tidebase_of_our_own, watched


def measure(args, module, url, concurrency, processes):
    """Run the flow.  Returns the figures, those of CPU of these processes ({name: pid}) and of the client."""
    queue, text = f"bench-{os.urandom(4).hex()}", {"text": "x" * args.payload}
    window = Window(args.seconds)
    window.watch_cpu(processes)
    options = {"side_effects": ["email"]} if args.begin else {}
    working = {"concurrency": concurrency, "stop": window.is_over}
    if args.write_behind:  # older clients do not know it
        working["write_behind"] = True

    def flow(run, input):
        started = time.perf_counter()
        if not window.is_over():
            tide.enqueue("flow", queue=queue, input=input)
        for number in range(args.steps):
            step = time.perf_counter()
            run.step(f"step {number}", lambda: text, input=input, **options)
            window.note("step", step)
        window.note("run", started)

    async def flow_awaited(run, input):
        async def give():
            return text

        started = time.perf_counter()
        if not window.is_over():
            await tide.enqueue("flow", queue=queue, input=input)
        for number in range(args.steps):
            step = time.perf_counter()
            await run.step(f"step {number}", give, input=input, **options)
            window.note("step", step)
        window.note("run", started)

    async def work():
        async with tide:
            await asyncio.gather(*(tide.enqueue("flow", queue=queue, input=text) for _ in range(concurrency)))
            await tide.work([queue], **working)

    tide = (module.AsyncTidebase if args.awaited else module.Tidebase)(url)
    tide.workflow("flow", flow_awaited if args.awaited else flow)
    if args.awaited:
        asyncio.run(work())
    else:
        with tide:
            for _ in range(concurrency):
                tide.enqueue("flow", queue=queue, input=text)
            tide.work([queue], **working)
    return {"concurrency": concurrency, "awaited": args.awaited, "writeBehind": args.write_behind,
            "writesPerStep": 2 if args.begin else 1, "stepsPerSecond": window.rate("step"),
            "runsPerSecond": window.rate("run"), "step": spread(window.times.get("step", ())),
            "run": spread(window.times.get("run", ())), "cpu": window.cpu_per_step()}


def main():
    parser = parser_of(__doc__, seconds=6.0)
    parser.add_argument("--url", help="default: a server of its own, with an embedded PostgreSQL")
    parser.add_argument("--awaited", action="store_true")
    parser.add_argument("--begin", action="store_true")
    parser.add_argument("--write-behind", action="store_true")
    parser.add_argument("--sdk", type=Path, default=ROOT / "tidebase_sdk.py")
    args = parser.parse_args()
    module = client_module(args.sdk)
    with tidebase_of_our_own(url=args.url) as server:
        for concurrency in args.concurrency:
            show(measure(args, module, server.url, concurrency, watched(args) or server.pids), args.json,
                 "c={concurrency:<3d} {stepsPerSecond:8.1f} steps/s {runsPerSecond:7.1f} runs/s   "
                 "step p50 {step[p50]:6.2f} ms p99 {step[p99]:6.2f} ms   us CPU a step: {cpu}")


if __name__ == "__main__":
    main()
