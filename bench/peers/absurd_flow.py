#!/usr/bin/env python3
"""The flow of sdk_flow.py on Absurd: its Python SDK, straight to PostgreSQL, one worker process.

C workers, each a thread with a client and so a connection of its own: faster, from 8 on, than one client whose worker
has concurrency C, since the threads of that one share its only connection. Each task spawns its successor, is claimed,
checkpoints S steps and completes.
"""
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Window, peer_main, watched

PACKAGES = ["absurd-sdk==0.5.1", "absurdctl==0.5.1", "psycopg[binary]==3.3.9"]
QUEUE = "bench"
POLL_S = 0.01  # instead of 0.25: never the limit, since a successor is there before its task ends


def prepare(args):
    control = str(args.folder / "bin" / "absurdctl")
    for command in (["init"], ["create-queue", QUEUE]):
        subprocess.run([control, command[0], "-d", args.database, *command[1:]], check=True, stdout=subprocess.DEVNULL)


def measure(args, concurrency):
    from absurd_sdk import Absurd
    prepare(args)
    text = {"text": "x" * args.payload}
    window = Window(args.seconds)
    window.watch_cpu(watched(args))
    clients = [Absurd(args.database, queue_name=QUEUE) for _ in range(concurrency)]

    def register(client):
        @client.register_task(name="flow")
        def flow(params, context):
            began = time.perf_counter()
            client.spawn("flow", params)
            for number in range(args.steps):
                started = time.perf_counter()
                context.step(f"step {number}", lambda: text)
                window.note("step", started)
            window.note("run", began)
            return text

    for client in clients:
        register(client)
    for _ in range(concurrency):
        clients[0].spawn("flow", text)
    for client in clients:
        threading.Thread(target=client.start_worker, kwargs={"poll_interval": POLL_S}, daemon=True).start()
    while not window.is_over():
        time.sleep(0.05)
    return window


def resume(args):
    """From the claim of the second attempt to its first new step, after 1,000 completed ones."""
    from absurd_sdk import Absurd
    prepare(args)
    client = Absurd(args.database, queue_name=QUEUE)
    text, reached = {"text": "x" * args.payload}, []

    @client.register_task(name="long")
    def long(params, context):
        for number in range(1000):
            context.step(f"step {number}", lambda: text)
        if not reached:
            reached.append(None)
            raise RuntimeError("cut off")
        context.step("new", lambda: reached.append(time.perf_counter()))

    client.spawn("long", text, max_attempts=2, retry_strategy={"kind": "none"})
    client.work_batch()
    while len(reached) < 2:
        started = time.perf_counter()
        client.work_batch()
    return (reached[1] - started) * 1e3


if __name__ == "__main__":
    peer_main(__doc__, "absurd", PACKAGES, measure, resume)
