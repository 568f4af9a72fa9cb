#!/usr/bin/env python3
"""Load one Tidebase server over HTTP and print what it sustained.

Each of C workers is a client of its own, with its own connection: until the time is up, it claims a run, checkpoints S
steps, completes the run and enqueues the next. No client library: raw keep-alive HTTP on asyncio, so that the client's
cost is small and the same for every server measured; --processes spreads the workers, so that one core is not the
limit. Prints the CPU per step of this process and its children, of the server and of PostgreSQL, too.

    flow.py                                        a server and a PostgreSQL of its own, 1, 8 and 32 workers
    flow.py --url http://127.0.0.1:7373 -c 8       a server that runs already: two writes a step, begin and complete
    flow.py --one-write                            one write a step: POST /runs/:id/steps
    flow.py --write-behind                         POST /writes twice a run: the first record; all others, the run's
                                                   completion and the next run
    flow.py --queue shared                         all workers claim from one queue, not each from its own

Compare servers in one run, by turns, on one machine; quote ratios and medians of at least three rounds.
"""
import asyncio
import multiprocessing
import time

from common import WARM_UP_S, Connection, Refused, Window, parser_of, show, spread, tidebase_of_our_own, watched

STARTED_AT = "2026-01-01T00:00:00.000Z"


async def worker(args, url, queue, window):
    connection = Connection(url, args.api_key)
    text = {"text": "x" * args.payload}

    async def call(name, path, body):
        started = time.perf_counter()
        answer = await connection.call("POST", path, body)
        window.note(name, started)
        return answer

    async def enqueue():
        await call("enqueue", f"/queues/{queue}/enqueue", {"workflowName": "bench", "input": text})

    async def step_by_step(run_id, owner):
        path = f"/runs/{run_id}"
        for step in range(args.steps):
            started = time.perf_counter()
            body = {"name": f"s{step}", "inputHash": "h", "input": text, "options": {}, "leaseOwner": owner}
            if args.one_write:
                body.update(output=text, startedAt=STARTED_AT, durationMs=5)
                await call("record", f"{path}/steps", body)
            else:
                begun = await call("begin", f"{path}/steps/begin", body)
                body = {"leaseOwner": begun["leaseOwner"], "output": text}
                await call("complete step", f"{path}/steps/{begun['step']['id']}/complete", body)
            window.note("step", started)
        await call("complete run", f"{path}/complete", {"result": text, "leaseOwner": owner})
        await enqueue()

    async def write_behind(run_id, owner):
        of_run = {"runId": run_id, "leaseOwner": owner, "brief": True, "chained": True}
        records = [{"do": "record_step", **of_run, "name": f"s{step}", "inputHash": "h", "input": text, "options": {},
                    "output": text, "startedAt": STARTED_AT, "durationMs": 5} for step in range(args.steps)]
        end = [{"do": "complete_run", **of_run, "result": text},
               {"do": "enqueue_run", "queue": queue, "workflowName": "bench", "input": text}]
        # The first record is sent at once; when it is answered, all that follows it is ready.
        for sent, others in ((records[:1], []), (records[1:], end)):
            started = time.perf_counter()
            answer = await call("writes", "/writes", {"writes": sent + others})
            if refused := [result for result in answer["results"] if "error" in result]:
                raise Refused(refused[0])
            for _ in sent:
                window.note("step", started)

    await enqueue()
    while not window.is_over():
        began = time.perf_counter()
        claim = await call("claim", "/queues/claim", {"queues": [queue], "limit": 1})
        if not claim["runs"]:  # on a shared queue somebody else may have been faster
            continue
        await (write_behind if args.write_behind else step_by_step)(claim["runs"][0]["id"], claim["leaseOwner"])
        window.note("run", began)
    connection.close()


def workers(args, url, numbers, began, results):
    """One process: these workers, all on one event loop."""

    async def all_of_them():
        await asyncio.gather(*(worker(args, url, args.queue or f"bench{n}", window) for n in numbers))

    window = Window(args.seconds, began)
    asyncio.run(all_of_them())
    results.put(window.times)


def measure(args, url, concurrency, pids):
    """Run the flow.  Returns the figures, those of CPU of these processes ({name: pid}) and of the client."""
    processes = min(args.processes, concurrency)
    results, began = multiprocessing.Queue(), time.perf_counter() + WARM_UP_S  # the clock is one for all processes
    children = [multiprocessing.Process(target=workers, args=(args, url, range(n, concurrency, processes), began,
                                                              results)) for n in range(processes)]
    for child in children:
        child.start()
    window = Window(args.seconds, began)
    window.watch_cpu(pids)
    for _ in children:
        for name, times in results.get(timeout=args.seconds + 60).items():
            window.times.setdefault(name, []).extend(times)
    for child in children:
        child.join()
    requests = [t for name, times in window.times.items() if name not in ("step", "run") for t in times]
    return {"concurrency": concurrency, "writeBehind": args.write_behind,
            "writesPerStep": 1 if args.one_write or args.write_behind else 2,
            "stepsPerSecond": window.rate("step"), "runsPerSecond": window.rate("run"),
            "requestsPerSecond": round(len(requests) / args.seconds, 1), "request": spread(requests),
            "cpu": window.cpu_per_step(),
            "milliseconds": {name: spread(times) for name, times in window.times.items() if name != "run"}}


def parser():
    parser = parser_of(__doc__)
    parser.add_argument("--url", help="default: a server of its own, with an embedded PostgreSQL")
    parser.add_argument("--one-write", action="store_true")
    parser.add_argument("--write-behind", action="store_true")
    parser.add_argument("--processes", type=int, default=1, help="of the load generator")
    parser.add_argument("--server-processes", type=int, default=1, help="WEB_CONCURRENCY of a server of its own")
    parser.add_argument("--queue", help="default: each worker has a queue of its own")
    parser.add_argument("--api-key")
    return parser


def main():
    args = parser().parse_args()
    with tidebase_of_our_own(args.server_processes, args.url) as server:
        for concurrency in args.concurrency:
            figures = measure(args, server.url, concurrency, watched(args) or server.pids)
            show(figures, args.json, "c={concurrency:<3d} {stepsPerSecond:8.1f} steps/s {runsPerSecond:7.1f} runs/s "
                                     "{requestsPerSecond:8.1f} requests/s   us CPU a step: {cpu}")
            for name, ms in () if args.json else figures["milliseconds"].items():
                print(f"  {name:14s} p50 {ms['p50']:7.2f} ms   p99 {ms['p99']:7.2f} ms")


if __name__ == "__main__":
    main()
