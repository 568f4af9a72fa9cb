#!/usr/bin/env python3
"""Enqueue single runs to an idle worker, and print how long each takes to reach the first line of its workflow.

The worker holds a claim (work() of the client); each run is enqueued over a new connection, so that with two server
processes, which share the port, about half of the runs come in through the process that the claim does not wait in.
Milliseconds, from before the request to enqueue is sent.
"""
import argparse
import asyncio
import os
import random
import threading
import time

from common import Connection, client_module, show, spread, tidebase_of_our_own


async def enqueue_each(url, queue, count, arrivals):
    times = []
    for _ in range(count):
        await asyncio.sleep(random.uniform(0.05, 0.15))  # long enough for the claim to be held again
        connection = Connection(url)
        started = time.perf_counter()
        await connection.call("POST", f"/queues/{queue}/enqueue", {"workflowName": "pickup", "input": None})
        times.append(await asyncio.to_thread(arrivals.get, timeout=30) - started)
        connection.close()
    return times


def measure(url, count):
    import queue as queues
    module, queue, arrivals, over = client_module(), f"pickup-{os.urandom(4).hex()}", queues.Queue(), threading.Event()
    tide = module.Tidebase(url)
    tide.workflow("pickup", lambda run: arrivals.put(time.perf_counter()))
    worker = threading.Thread(target=lambda: tide.work([queue], stop=over.is_set))
    worker.start()
    time.sleep(1)
    try:
        return asyncio.run(enqueue_each(url, queue, count, arrivals))
    finally:
        over.set()
        worker.join()
        tide.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="default: servers of its own, with one process and with two")
    parser.add_argument("-n", "--count", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for processes in (1,) if args.url else (1, 2):
        with tidebase_of_our_own(processes, args.url) as server:
            times = measure(server.url, args.count)
        show({"serverProcesses": processes, "runs": args.count, **spread(times)}, args.json,
             "{serverProcesses} server process(es): p50 {p50:.1f} ms, p99 {p99:.1f} ms to the first line")


if __name__ == "__main__":
    main()
