#!/usr/bin/env python3
"""200 idle workers, each waiting for work on a queue of its own: what they cost the server.

Prints the CPU of the server's processes, and of PostgreSQL's, in % of one core. The workers are AsyncTidebase clients,
with their own connections and defaults, in this process.
"""
import argparse
import asyncio
import contextlib
import time

from common import client_module, cpu_seconds, database, postgres, show, tidebase

SETTLE_S = 5  # until all of them wait


async def idle(url, workers, seconds, cpu):
    module = client_module()
    clients = [module.AsyncTidebase(url) for _ in range(workers)]
    for client in clients:
        client.workflow("idle", lambda run: None)  # a worker without a workflow claims nothing
    tasks = [asyncio.create_task(client.work([f"idle{n}"])) for n, client in enumerate(clients)]
    await asyncio.sleep(SETTLE_S)
    began, before = time.perf_counter(), cpu()
    await asyncio.sleep(seconds)
    elapsed, after = time.perf_counter() - began, cpu()
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
    return [round((now - then) / elapsed * 100, 1) for then, now in zip(before, after, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--workers", type=int, default=200)
    parser.add_argument("-d", "--seconds", type=float, default=30)
    parser.add_argument("--server-processes", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with postgres() as server_url, database(server_url) as database_url, \
            tidebase(database_url, args.server_processes) as server:
        percent = asyncio.run(idle(server.url, args.workers, args.seconds,
                                   lambda: [cpu_seconds(server.pids[name]) for name in ("server", "postgres")]))
    show({"workers": args.workers, "serverPercent": percent[0], "postgresPercent": percent[1]}, args.json,
         "{workers} idle workers: the server {serverPercent} % of a core, PostgreSQL {postgresPercent} %")


if __name__ == "__main__":
    main()
