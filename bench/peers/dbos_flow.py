#!/usr/bin/env python3
"""The flow of sdk_flow.py on DBOS: in process, straight to PostgreSQL.

Two ways, of which the faster is the one to quote. --mode queue: a queue of worker concurrency C, refilled from outside
the workflows, so that one waits whenever a place is free; each is enqueued, claimed, checkpoints S steps and completes.
--mode direct: C threads call the workflow again and again, so that nothing is enqueued or claimed.
"""
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Window, peer_main, watched

PACKAGES = ["dbos==3.4.0"]
QUEUE = "bench"
POLL_S = 0.01  # instead of 1: the queue starts workflows only when it polls


def launch(args, concurrency):
    from dbos import DBOS
    url = args.database.replace("postgresql://", "postgresql+psycopg://")
    DBOS(config={"name": "bench", "system_database_url": url, "sys_db_pool_size": concurrency + 10,
                 "log_level": "ERROR"})
    return DBOS


def measure(args, concurrency):
    DBOS = launch(args, concurrency)
    text = {"text": "x" * args.payload}
    window = Window(args.seconds)
    room = threading.Semaphore(2 * concurrency)

    @DBOS.step()
    def give(number):
        return text

    @DBOS.workflow()
    def flow(input):
        began = time.perf_counter()
        for number in range(args.steps):
            started = time.perf_counter()
            give(number)
            window.note("step", started)
        window.note("run", began)
        room.release()
        return text

    def call_again_and_again():
        while not window.is_over():
            flow(text)

    DBOS.launch()
    window.restart()
    window.watch_cpu(watched(args))
    if args.mode == "direct":
        for _ in range(concurrency):
            threading.Thread(target=call_again_and_again, daemon=True).start()
    else:
        DBOS.register_queue(QUEUE, worker_concurrency=concurrency, polling_interval_sec=POLL_S)
    while not window.is_over():
        if args.mode == "queue" and room.acquire(timeout=0.05):
            DBOS.enqueue_workflow(QUEUE, flow, text)
        else:
            time.sleep(0.01)
    return window


def resume(args):
    """From the first line of the resumed workflow to its first new step, after 1,000 completed ones."""
    DBOS = launch(args, 1)
    text, began, new = {"text": "x" * args.payload}, [], []
    cut_off, at_the_end = threading.Event(), threading.Event()

    @DBOS.step()
    def give(number):
        if number == 1000 and len(began) > 1:
            new.append(time.perf_counter())
        return text

    @DBOS.workflow()
    def long():
        began.append(time.perf_counter())
        for number in range(1000):
            give(number)
        if len(began) == 1:
            at_the_end.set()
            cut_off.wait()
        give(1000)

    DBOS.launch()
    handle = DBOS.start_workflow(long)
    at_the_end.wait()
    DBOS.cancel_workflow(handle.workflow_id)
    cut_off.set()
    time.sleep(1)
    DBOS.resume_workflow(handle.workflow_id)
    while not new:
        time.sleep(0.01)
    return (new[0] - began[1]) * 1e3


if __name__ == "__main__":
    peer_main(__doc__, "dbos", PACKAGES, measure, resume, modes=("queue", "direct"))
