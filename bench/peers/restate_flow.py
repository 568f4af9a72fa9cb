#!/usr/bin/env python3
"""The flow of sdk_flow.py on Restate: its server, and one worker process on its Python SDK under Hypercorn.

Restate pushes invocations to the worker, without a limit of concurrency; so C clients, in a process of their own, each
ask its ingress for a run, wait for the result, and ask for the next. In each, S steps are checkpointed one after the
other, by ctx.run_typed. All settings are the server's defaults: its log is synced at every commit.
"""
import asyncio
import json
import os
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Connection, Window, free_port, peer_main, running

PACKAGES = ["restate-sdk[serde]==1.3.0", "hypercorn==0.18.0"]
SERVER = ["@restatedev/restate-server@1.7.12"]


@contextmanager
def restate_server(args, endpoint):
    """A Restate server with this worker registered.  Yields the address of its ingress, and the server's pid."""
    ingress, admin = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="tidebase-bench-") as folder:
        environment = {**os.environ, "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ingress}",
                       "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}", "RESTATE_DISABLE_TELEMETRY": "true",
                       "RESTATE_BIND_ADDRESS": f"127.0.0.1:{free_port()}", "RESTATE_LISTEN_MODE": "tcp"}
        binary = next(args.folder.glob("node_modules/@restatedev/restate-server-*/bin/restate-server"))
        with running([str(binary), "--base-dir", folder, "--no-logo"], f"http://127.0.0.1:{admin}/health",
                     env=environment) as server:
            urllib.request.urlopen(urllib.request.Request(
                f"http://127.0.0.1:{admin}/deployments", json.dumps({"uri": endpoint}).encode(),
                {"content-type": "application/json"})).read()
            yield f"http://127.0.0.1:{ingress}", server.pid


def serve(service, seen=lambda: None):
    """The worker: serves this Restate service in a thread.  Returns its address; `seen` is called per invocation."""
    import hypercorn.asyncio
    import restate
    application, port = restate.app(services=[service]), free_port()
    config = hypercorn.Config()
    config.bind, config.errorlog = [f"127.0.0.1:{port}"], None

    async def noting(scope, receive, send):
        if "/invoke/" in scope.get("path", ""):
            seen()
        await application(scope, receive, send)

    def run():  # its own trigger would be a signal, which only a main thread can take
        asyncio.run(hypercorn.asyncio.serve(noting, config, shutdown_trigger=lambda: asyncio.Event().wait()))

    threading.Thread(target=run, daemon=True).start()
    return f"http://127.0.0.1:{port}"


async def clients(url, concurrency, text, seconds):
    window = Window(seconds)

    async def client():
        connection = Connection(url)
        while not window.is_over():
            await connection.call("POST", "/bench/flow", text)

    await asyncio.gather(*(client() for _ in range(concurrency)))


def measure(args, concurrency):
    import restate
    text = {"text": "x" * args.payload}
    window = Window(args.seconds)
    service = restate.Service("bench")

    async def give():
        return text

    @service.handler()
    async def flow(context: restate.Context, input: dict) -> dict:
        began = time.perf_counter()
        for number in range(args.steps):
            started = time.perf_counter()
            await context.run_typed(f"step {number}", give)
            window.note("step", started)
        window.note("run", began)
        return text

    with restate_server(args, serve(service)) as (ingress, server):
        window.restart()
        window.watch_cpu({"server": server})
        client = os.fork()
        if not client:
            asyncio.run(clients(ingress, concurrency, text, args.seconds))
            os._exit(0)
        os.waitpid(client, 0)
    return window


def resume(args):
    """From the arrival of the second attempt to its first new step, after 1,000 completed ones."""
    import restate
    text, arrived, new = {"text": "x" * args.payload}, [], []
    service = restate.Service("bench", invocation_retry_policy=restate.InvocationRetryPolicy(
        initial_interval=timedelta(seconds=1)))

    async def give():
        return text

    async def give_new():
        new.append(time.perf_counter())

    @service.handler()
    async def flow(context: restate.Context, input: dict) -> dict:
        for number in range(1000):
            await context.run_typed(f"step {number}", give)
        if len(arrived) == 1:
            raise RuntimeError("cut off")
        await context.run_typed("new", give_new)
        return text

    with restate_server(args, serve(service, lambda: arrived.append(time.perf_counter()))) as (ingress, _):
        asyncio.run(Connection(ingress).call("POST", "/bench/flow", text))
    return (new[0] - arrived[1]) * 1e3


if __name__ == "__main__":
    peer_main(__doc__, "restate", PACKAGES, measure, resume, npm=SERVER, needs_database=False)
