#!/usr/bin/env python3
"""Take up a run with 1,000 completed steps, and print what it takes to get to its first new step.

Milliseconds of the client, from sending the claim to the first line of step 1,001, and the requests sent in that time.
Some rounds before do not count: the peers' processes and connections, too, have executed the 1,000 steps before.
Compare with `peers/*_flow.py --resume`.
"""
import argparse
import asyncio
import os
import socket
import threading
import time

from common import Connection, client_module, median, show, tidebase_of_our_own

WARM_UP_ROUNDS = 5  # the server takes another of its connections to PostgreSQL each time


async def prepare(url, queue, steps, payload, input_hash):
    """A run on the queue whose first worker died after so many steps."""
    connection = Connection(url)
    text = {"text": "x" * payload}
    await connection.call("POST", f"/queues/{queue}/enqueue", {"workflowName": "long", "input": text})
    claim = await connection.call("POST", "/queues/claim", {"queues": [queue]})
    owner, run_id = claim["leaseOwner"], claim["runs"][0]["id"]
    writes = [{"do": "record_step", "runId": run_id, "leaseOwner": owner, "name": f"step {number}",
               "inputHash": input_hash, "output": text} for number in range(steps)]
    answer = await connection.call("POST", "/writes", {"writes": writes})
    if refused := [result for result in answer["results"] if "step" not in result]:
        raise SystemExit(f"a step was refused: {refused[0]}")
    await connection.call("POST", f"/runs/{run_id}/release", {"leaseOwner": owner})


def measure(url, steps, payload):
    """Returns milliseconds and requests."""
    module = client_module()
    queue, requests, reached, over = f"resume-{os.urandom(4).hex()}", [], [], threading.Event()
    asyncio.run(prepare(url, queue, steps, payload, module.input_hash(None)))
    send = socket.socket.sendall

    def noting(connection, data):
        if bytes(data[:5]) in (b"POST ", b"GET /"):
            requests.append((time.perf_counter(), bytes(data[:20])))
        send(connection, data)

    def long(run, input):
        for number in range(steps):
            run.step(f"step {number}", lambda: None)
        run.step("new", lambda: reached.append(time.perf_counter()))
        over.set()

    socket.socket.sendall = noting
    try:
        with module.Tidebase(url) as tide:
            tide.workflow("long", long)
            tide.work([queue], stop=over.is_set)
    finally:
        socket.socket.sendall = send
    began = next(at for at, head in requests if head.startswith(b"POST /queues/claim"))
    return (reached[0] - began) * 1e3, sum(began <= at < reached[0] for at, _ in requests)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="default: a server of its own")
    parser.add_argument("-s", "--steps", type=int, default=1000)
    parser.add_argument("--payload", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tidebase_of_our_own(url=args.url) as server:
        for _ in range(WARM_UP_ROUNDS):
            measure(server.url, args.steps, args.payload)
        rounds = [measure(server.url, args.steps, args.payload) for _ in range(args.rounds)]
    show({"steps": args.steps, "resumeMilliseconds": round(median(ms for ms, _ in rounds), 1),
          "slowest": round(max(ms for ms, _ in rounds), 1), "requests": max(requests for _, requests in rounds)},
         args.json, "{steps} steps replayed: {resumeMilliseconds} ms (slowest {slowest}), {requests} request(s)")


if __name__ == "__main__":
    main()
