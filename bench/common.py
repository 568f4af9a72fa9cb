"""What the programs of this folder share: a PostgreSQL, servers, a raw HTTP client, and how figures are taken.

Imports nothing but the standard library at the top, so that the peers' own environments can use it; what starts a
PostgreSQL needs requirements.txt.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
ENVIRONMENTS = Path(os.environ.get("BENCH_PEERS", BENCH / ".env"))  # what the peers need is installed here
WARM_UP_S = 1.0  # before figures are taken: connections are opened, functions planned
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}


# --- taking figures


class Window:
    """The time that counts: `seconds` long, from `began` on (default: when the warm-up from now is over)."""

    def __init__(self, seconds, began=None):
        self.seconds = seconds
        self.times = {}
        self.restart(began)

    def restart(self, began=None):
        self.began = time.perf_counter() + WARM_UP_S if began is None else began
        self.end = self.began + self.seconds

    def note(self, name, started):
        """Something called `name`, begun at `started`, ended now."""
        now = time.perf_counter()
        if self.began <= now < self.end:
            self.times.setdefault(name, []).append(now - started)

    def is_over(self):
        return time.perf_counter() >= self.end

    def watch_cpu(self, processes):
        """Take the CPU of this process' tree, the client, and of other ones, when the window begins and when it ends.

        processes: {name: pid}, of this machine; those below this process do not count as the client. Called when it is
        settled when the window begins.
        """
        pids = {"client": os.getpid(), **processes}

        def cpu_at(moment):
            time.sleep(max(0.0, moment - time.perf_counter()))
            return {name: cpu_seconds(pid, set(processes.values()) - {pid}) for name, pid in pids.items()}

        def watch():
            before, after = cpu_at(self.began), cpu_at(self.end)
            self.cpu = {name: after[name] - before[name] for name in pids}

        self.watcher = threading.Thread(target=watch, daemon=True)
        self.watcher.start()

    def cpu_per_step(self):
        """Microseconds of CPU by name, divided by the steps that ended in the window: of what watch_cpu watches."""
        self.watcher.join()
        steps = max(len(self.times.get("step", ())), 1)
        return {name: round(seconds / steps * 1e6) for name, seconds in self.cpu.items()}

    def rate(self, name):
        """How many a second."""
        return round(len(self.times.get(name, ())) / self.seconds, 1)


def spread(times):
    """p50 and p99 in milliseconds, of seconds."""
    times = sorted(times) or [0.0]
    return {name: round(times[int(len(times) * part)] * 1e3, 2) for name, part in (("p50", 0.5), ("p99", 0.99))}


def cpu_seconds(pid, without=()):
    """User and system time of a process and all below it, those that have ended included, but not of `without`."""
    process = Path(f"/proc/{pid}")
    spent = process.joinpath("stat").read_text().rpartition(")")[2].split()[11:15]  # its own, and of ended children
    children = [int(child) for task in process.glob("task/*/children") for child in task.read_text().split()]
    return sum(map(int, spent)) / os.sysconf("SC_CLK_TCK") \
        + sum(cpu_seconds(child, without) for child in children if child not in without)


def median(values):
    """The upper one of the two in the middle, where there are two; None of nothing."""
    values = sorted(value for value in values if value is not None)
    return values[len(values) // 2] if values else None


def parser_of(doc, concurrency=(1, 8, 32), seconds=8.0):
    """An argument parser with what all flows take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--concurrency", type=int, nargs="+", default=list(concurrency))
    parser.add_argument("-d", "--seconds", type=float, default=seconds)
    parser.add_argument("-s", "--steps", type=int, default=10)
    parser.add_argument("--payload", type=int, default=200, help="bytes of text in each input and output")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line, instead of words")
    parser.add_argument("--cpu", metavar="NAME=PID", nargs="+", default=[], type=lambda text: text.split("=", 1),
                        help="processes whose CPU per step is to be printed, beside the client's own")
    return parser


def watched(args):
    """--cpu as {name: pid}."""
    return {name: int(pid) for name, pid in args.cpu}


def show(figures, as_json, words):
    print(json.dumps(figures) if as_json else words.format(**figures), flush=True)


def machine():
    """One line on what this runs on."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else [platform.processor()]
    return f"{os.cpu_count()} cores ({names[0] if names else platform.machine()}), {platform.system()} " \
           f"{platform.release().split('-')[0]}, CPython {platform.python_version()}"


# --- a PostgreSQL and Tidebase servers


@contextlib.contextmanager
def postgres(url=None):
    """The address of a PostgreSQL to make databases in: `url`, or one of our own, from the wheel that the server uses,
    with its default settings and durable commits."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="tidebase-bench-", ignore_cleanup_errors=True) as folder:
        server = embedded().EmbeddedPostgres(folder)
        try:
            yield server.start()
        finally:
            server.stop()


def embedded():
    """The server's module with a PostgreSQL in it."""
    sys.path.insert(0, str(ROOT))
    from tidebase_server import embedded
    return embedded


def binary(name):
    """A program of its PostgreSQL."""
    versions, version = embedded().wheel()
    return str(versions[version] / name)


def sql(url, statement):
    """Run a statement.  Returns its rows, if any."""
    import psycopg
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def database(server_url, name="bench"):
    """The address of a new database, dropped in the end; every commit in it is durable."""
    for setting, value in DURABLE.items():
        if (found := sql(server_url, f"show {setting}")[0][0]) != value:
            raise SystemExit(f"{setting} is {found}: commits must be durable")
    name = f"{name}_{os.urandom(4).hex()}"
    sql(server_url, f"create database {name}")
    try:
        head, mark, query = server_url.partition("?")
        yield f"{head.rsplit('/', 1)[0]}/{name}{mark}{query}"
    finally:
        sql(server_url, f"drop database {name} with (force)")
        sql(server_url, "checkpoint")  # the next one's time is its own


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, process):
    """Until a server answers."""
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url).read()
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"{process.args[0]} does not answer")


@contextlib.contextmanager
def running(command, health, **options):
    """A server process, from its first answer until SIGTERM."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        wait_for(health, process)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def postmaster_of(database_url):
    """The process id of a PostgreSQL on this machine. Takes a superuser's address."""
    return sql(database_url, "select (regexp_split_to_array(pg_read_file('postmaster.pid'), '\\n'))[1]::int")[0][0]


class Tidebase(NamedTuple):
    """A server that runs, and the processes that its steps cost CPU: {name: pid}."""

    url: str
    pids: dict


@contextlib.contextmanager
def tidebase(database_url, processes=1, tree=ROOT, **settings):
    """A Tidebase server, from the source in `tree`, on a free port, in `processes` processes."""
    port = free_port()
    environment = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port), "DATABASE_URL": database_url,
                   "WEB_CONCURRENCY": str(processes), **settings}
    url = f"http://127.0.0.1:{port}"
    with running([sys.executable, str(tree / "tidebase.py")], f"{url}/health", env=environment) as process:
        yield Tidebase(url, {"server": process.pid, "postgres": postmaster_of(database_url)})


@contextlib.contextmanager
def tidebase_of_our_own(processes=1, url=None, **settings):
    """A server with a PostgreSQL of its own; or, when `url` is given, the one that answers there."""
    if url:
        yield Tidebase(url, {})
        return
    with postgres() as server_url, database(server_url) as database_url, \
            tidebase(database_url, processes, **settings) as server:
        yield server


# --- a raw client


class Refused(Exception):
    """An answer of 400 or more."""


class Connection:
    """One keep-alive HTTP connection on asyncio: what a client costs at least."""

    def __init__(self, url, api_key=None):
        self.host, port = url.removeprefix("http://").rstrip("/").rsplit(":", 1)
        self.port = int(port)
        authorization = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self.headers = f"host: {self.host}:{port}\r\n{authorization}content-type: application/json\r\n"
        self.reader = self.writer = None

    async def call(self, method, path, body=None):
        """The answer's JSON.  Raises Refused."""
        return (await self.exchange(method, path, body))[1]

    async def exchange(self, method, path, body=None):
        """The answer's head, in lower case, and its JSON.  Raises Refused."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port, limit=1 << 26)
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\n{self.headers}content-length: {len(data)}\r\n\r\n"
        self.writer.write(head.encode() + data)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        at = head.find(b"content-length:")
        if at >= 0:
            answer = await self.reader.readexactly(int(head[at + 15 : head.index(b"\r\n", at)]))
        else:
            answer = b""
            while size := int(await self.reader.readline(), 16):
                answer += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        if int(head[9:12]) >= 400:
            raise Refused(f"{method} {path}: {head[9:12].decode()} {answer[:300]!r}")
        return head, json.loads(answer)

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.reader = self.writer = None


# --- the client, from its file


def client_module(path=ROOT / "tidebase_sdk.py"):
    sys.path.insert(0, str(Path(path).parent))
    import tidebase_sdk
    return tidebase_sdk


# --- the peers: each in an environment of its own, under bench/.env or the folder that BENCH_PEERS names


def install(peer, packages, npm=()):
    """An environment with these packages.  Returns its folder.  Raises CalledProcessError, with what was said."""
    folder = ENVIRONMENTS / peer
    stamp, wanted = folder / "installed", "\n".join([*packages, *npm])
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        commands = [[sys.executable, "-m", "venv", folder],
                    [folder / "bin" / "python", "-m", "pip", "install", "-q", *packages]]
        if npm:
            commands.append(["npm", "install", "--silent", "--prefix", folder, *npm])
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True)
        stamp.write_text(wanted)
    return folder


def peer_main(doc, name, packages, measure, resume, npm=(), needs_database=True, modes=("",)):
    """The command line of a peer's script.

    measure(args, concurrency) -> Window, whose CPU is watched, and resume(args) -> milliseconds, run in the peer's
    environment, in a process of their own for each concurrency, with args.database the address of a new database.
    """
    parser = parser_of(doc)
    parser.add_argument("--resume", action="store_true", help="measure the replay of 1,000 steps instead")
    parser.add_argument("--mode", choices=modes, default=modes[0], help=argparse.SUPPRESS)
    parser.add_argument("--postgres", help="to make databases in; default: one of our own")
    parser.add_argument("--database", help=argparse.SUPPRESS)  # given: this is the process that measures
    parser.add_argument("--folder", type=Path, default=ENVIRONMENTS / name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.database is not None:
        if args.resume:
            print(json.dumps({"peer": name, "resumeMilliseconds": round(resume(args), 1)}), flush=True)
        else:
            window = measure(args, args.concurrency[0])
            figures = {"peer": name, "concurrency": args.concurrency[0], "stepsPerSecond": window.rate("step"),
                       "runsPerSecond": window.rate("run"), "step": spread(window.times.get("step", ())),
                       "cpu": window.cpu_per_step()}
            print(json.dumps(figures), flush=True)
        os._exit(0)  # some leave threads behind that would go on
    try:
        folder = install(name, packages, npm)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise SystemExit(json.dumps({"peer": name, "error": f"cannot be installed: {' / '.join(why[-3:])}"})) from None
    with postgres(args.postgres) if needs_database else contextlib.nullcontext() as server_url:
        for concurrency in args.concurrency[:1] if args.resume else args.concurrency:
            with database(server_url, name) if needs_database else contextlib.nullcontext("none") as url:
                environment = {**os.environ, "PATH": f"{Path(binary('psql')).parent}:{os.environ['PATH']}"}
                command = [folder / "bin" / "python", sys.argv[0], "--database", url, "-c", str(concurrency),
                           "-d", str(args.seconds), "-s", str(args.steps), "--payload", str(args.payload),
                           "--mode", args.mode]
                if needs_database:
                    command += ["--cpu", f"postgres={postmaster_of(url)}"]
                done = subprocess.run([*map(str, command), *["--resume"] * args.resume], env=environment, text=True,
                                      capture_output=True, timeout=args.seconds + 300, check=False)
                lines = done.stdout.strip().splitlines()
                if done.returncode or not lines:
                    why = " / ".join(done.stderr.strip().splitlines()[-3:])
                    raise SystemExit(json.dumps({"peer": name, "error": f"does not run: {why}"}))
                figures = json.loads(lines[-1])
                show(figures, args.json, "{peer} {resumeMilliseconds} ms to the first new step" if args.resume else
                     "{peer} c={concurrency:<3d} {stepsPerSecond:8.1f} steps/s {runsPerSecond:7.1f} runs/s   "
                     "us CPU a step: {cpu}")
