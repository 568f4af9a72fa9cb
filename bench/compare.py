#!/usr/bin/env python3
"""One command: Tidebase, the limit of its database, and its peers, by turns on this machine.

Every contender gets a database of its own, new in each round, in one PostgreSQL (the wheel's, default settings, durable
commits); they run one after the other, three rounds, and medians count. The flow is the same for all: enqueue, claim,
ten checkpointed steps of 200 bytes, complete. Checkpointed steps a second at 1, 8 and 32 runs at a time, and the CPU
that one step costs the client, the server and PostgreSQL.

    compare.py                            the whole: half an hour, on a machine that does nothing else
    compare.py --short                    the rows that the aims are about, three rounds of 2.5 s: ten minutes
    compare.py --quick                    a smoke run of a few minutes, whose figures mean nothing
    compare.py --old PATH                 ... and beside it the same rows of an older source tree, by turns
    compare.py --only write-behind idle   rows and single figures that have one of these words in their names
    compare.py --write                    ... and bench/RESULTS.md from it

The older tree's server and client are driven by this tree's programs; its single figures (resume, pick-up, idle,
growth) are taken by its own. The peers are installed under bench/.env, or where BENCH_PEERS says. Ratios are to the
best peer of the same run, of the same number of runs at a time.
"""
import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common import BENCH, DURABLE, ENVIRONMENTS, ROOT, database, machine, median, postgres, sql, tidebase

CONCURRENCY = (1, 8, 32)


class Contender(NamedTuple):
    """A row: who runs the flow, and how."""

    name: str
    kind: str  # limit, peer, tidebase
    command: list  # a program of this folder, with its options
    processes: int = 1  # of the server
    short: bool = True  # whether it is a row of --short, too
    tree: Path = ROOT  # where the server's and the client's source are


class Single(NamedTuple):
    """A program that takes figures of its own, once."""

    name: str
    command: list
    figures: dict  # key in a line of its output -> what it is, with other values of that line in it
    short: bool = True


FLOW = ["flow.py", "--processes", "2"]
CONTENDERS = (
    Contender("pgbench, one write", "limit", ["floor.sh"], short=False),
    Contender("pgbench, two writes", "limit", ["floor.sh", "TWO_WRITES=1"], short=False),
    Contender("Tidebase, threads", "tidebase", ["sdk_flow.py"]),
    Contender("Tidebase, threads, 2 server processes", "tidebase", ["sdk_flow.py"], 2, short=False),
    Contender("Tidebase, threads, side effects (two writes)", "tidebase", ["sdk_flow.py", "--begin"], short=False),
    Contender("Tidebase, threads, write-behind", "tidebase", ["sdk_flow.py", "--write-behind"]),
    Contender("Tidebase, asyncio", "tidebase", ["sdk_flow.py", "--awaited"]),
    Contender("Tidebase, asyncio, write-behind", "tidebase", ["sdk_flow.py", "--awaited", "--write-behind"]),
    Contender("Tidebase, separate clients", "tidebase", [*FLOW, "--one-write"]),
    Contender("Tidebase, separate clients, 2 server processes", "tidebase", [*FLOW, "--one-write"], 2, short=False),
    Contender("Tidebase, separate clients, two writes", "tidebase", FLOW, short=False),
    Contender("Tidebase, separate clients, write-behind", "tidebase", [*FLOW, "--write-behind"]),
    Contender("Absurd", "peer", ["peers/absurd_flow.py"]),
    Contender("DBOS, queue", "peer", ["peers/dbos_flow.py"]),
    Contender("DBOS, called in process", "peer", ["peers/dbos_flow.py", "--mode", "direct"], short=False),
    Contender("Restate", "peer", ["peers/restate_flow.py"]),
)
BEFORE = ("Tidebase, threads", "Tidebase, asyncio", "Tidebase, separate clients")  # of which --old adds a row
RESUME = "resume, 1,000 completed steps, ms"
PICK_UP = "pick-up by an idle worker, {serverProcesses} server process(es), {part}, ms"
IDLE = "{workers} idle workers, {part}, % of a core"
GROWTH = "growth, {concurrency} at a time, database with a {database} ÷ an empty one"
SINGLES = (
    Single("resume", ["resume.py", "--rounds", "15"], {"resumeMilliseconds": RESUME}),
    Single("pick-up", ["pickup.py", "-n", "100"], {part: PICK_UP.replace("{part}", part) for part in ("p50", "p99")}),
    Single("idle", ["idle.py", "-d", "15"], {"serverPercent": IDLE.replace("{part}", "the server"),
                                             "postgresPercent": IDLE.replace("{part}", "PostgreSQL")}),
    Single("growth", ["growth.py", "--scale", "0.1", "-c", "8", "-d", "3"], {"ratio": GROWTH}, short=False),
)


def run(command, timeout, **environment):
    """What a program prints: JSON objects, one a line. An error is one, too."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False,
                              cwd=BENCH, env={**os.environ, "PYTHON": sys.executable, **environment})
    except subprocess.TimeoutExpired:
        return [{"error": f"not over after {timeout:.0f} s"}]
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
    if done.returncode and not any("error" in line for line in lines):
        lines.append({"error": "".join(done.stderr.strip().splitlines()[-1:]) or f"status {done.returncode}"})
    return lines


def turn(contender, server_url, seconds):
    """One contender's figures, one line per concurrency."""
    program, *options = contender.command
    command, timeout = [sys.executable, BENCH / program, *options], 120 + 15 * seconds
    command += ["--json", "-d", seconds, "-c", *CONCURRENCY]
    if contender.kind == "peer":
        return run([*command, "--postgres", server_url], timeout)
    with database(server_url) as url:
        if contender.kind == "limit":
            subprocess.run([sys.executable, ROOT / "tidebase.py", "migrate"], env={**os.environ, "DATABASE_URL": url},
                           check=True, capture_output=True)
            environment = dict(option.split("=") for option in options)
            return [line for c in CONCURRENCY
                    for line in run([BENCH / program, url, c, max(1, round(seconds))], timeout, **environment)]
        with tidebase(url, contender.processes, contender.tree) as server:
            if program == "sdk_flow.py":
                command += ["--sdk", contender.tree / "tidebase_sdk.py"]
            watched = [f"{name}={pid}" for name, pid in server.pids.items()]
            return run([*command, "--url", server.url, "--cpu", *watched], timeout)


class Results:
    """What was measured: a list of values each, one per round."""

    def __init__(self):
        self.steps, self.cpu = {}, {}  # by contender's name and concurrency
        self.singles = {}  # by what the figure is and whose it is
        self.errors = {}

    def add(self, contender, lines):
        for line in lines:
            if "error" in line:
                self.errors[contender.name] = line["error"]
            else:
                key = contender.name, line["concurrency"]
                self.steps.setdefault(key, []).append(line["stepsPerSecond"])
                if "cpu" in line:
                    self.cpu.setdefault(key, []).append(line["cpu"])

    def add_single(self, single, whose, lines):
        for line in lines:
            if "error" in line:
                self.errors[f"{whose}, {single.name}"] = line["error"]
            for key, what in single.figures.items():
                if key in line:
                    self.singles.setdefault((what.format_map(line), whose), []).append(line[key])

    def rate(self, name, concurrency):
        """The median of steps a second; None where it was not measured."""
        return median(self.steps.get((name, concurrency), ()))

    def best_peer(self, concurrency):
        rates = [self.rate(contender.name, concurrency) for contender in CONTENDERS if contender.kind == "peer"]
        return max((rate for rate in rates if rate is not None), default=None)

    def cpu_of(self, name, concurrency, part):
        """The median of microseconds a step; None where it was not measured."""
        return median(cpu.get(part) for cpu in self.cpu.get((name, concurrency), ()))

    def single(self, what, whose):
        return median(self.singles.get((what, whose), ()))


def over(first, second):
    return round(first / second, 2) if first and second else None


def before(name):
    """The name of the older tree's row."""
    return name.replace("Tidebase", "before")


def rates_table(results, contenders):
    """The medians, each with its ratio to the best peer."""
    rows = [["steps/s", *(f"{c} at a time" for c in CONCURRENCY), *(f"÷ best peer, {c}" for c in CONCURRENCY)]]
    for name in (contender.name for contender in contenders):
        rates = [results.rate(name, c) for c in CONCURRENCY]
        if any(rates):
            ratios = [over(rate, results.best_peer(c)) for rate, c in zip(rates, CONCURRENCY, strict=True)]
            rows.append([name, *(f"{rate:,.0f}" if rate else "-" for rate in rates),
                         *(f"{ratio:.2f}" if ratio else "-" for ratio in ratios)])
    return rows


def cpu_table(results, contenders):
    """The CPU of a step: client, server and PostgreSQL, for each number of runs at a time."""
    parts = [(c, part) for c in CONCURRENCY for part in ("client", "server", "postgres")]
    rows = [["µs of CPU a step", *(f"{part}, {c}" for c, part in parts)]]
    for name in (contender.name for contender in contenders):
        spent = [results.cpu_of(name, c, part) for c, part in parts]
        if any(spent):
            rows.append([name, *("-" if value is None else value for value in spent)])
    return rows


def singles_table(results):
    """Resume, pick-up, idle, growth: each figure, and whose it is."""
    owners = list(dict.fromkeys(whose for _, whose in results.singles))
    rows = [["", *owners]]
    for what in dict.fromkeys(what for what, whose in results.singles if whose == "Tidebase"):
        values = [results.single(what, whose) for whose in owners]
        rows.append([what, *("-" if value is None else value for value in values)])
    return rows


def aims(results):
    """What was aimed for: (what, least or None, most or None, got), one each; got is None where it was not measured."""
    behind = "Tidebase, threads, write-behind", "Tidebase, asyncio, write-behind"
    for c, least, least_by_default in zip(CONCURRENCY, (1.5, 2.0, 2.5), (0.7, 0.85, 1.7), strict=True):
        best, absurd = results.best_peer(c), results.rate("Absurd", c)
        for name in behind:
            yield f"{name} ÷ best peer, {c}", least, None, over(results.rate(name, c), best)
        yield f"Tidebase, threads ÷ best peer, {c}", least_by_default, None, over(
            results.rate("Tidebase, threads", c), best)
        name = "Tidebase, asyncio"
        yield f"{name} ÷ {before(name)}, {c}", 1.0, None, over(results.rate(name, c), results.rate(before(name), c))
        if c > 1:
            name = "Tidebase, separate clients, write-behind"
            yield f"{name} ÷ Absurd, {c}", 1.0, None, over(results.rate(name, c), absurd)
    for name in behind:
        for part, most in (("postgres", 150), ("server", 60)):
            yield f"{name}, 32: µs of CPU a step, {part}", None, most, results.cpu_of(name, 32, part)
    for what, whose in list(results.singles):
        if whose == "Tidebase":
            ours, theirs = results.single(what, "Tidebase"), results.single(what, "before")
            if what.startswith("growth"):
                yield what, 0.9, None, ours
            elif "p99" not in what:  # a tenth more is noise
                yield f"{what}, ÷ before", None, 1.1, over(ours, theirs)


def markdown(rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def aim_row(what, least, most, got):
    met = got is not None and (least is None or got >= least) and (most is None or got <= most)
    bound = f"at least {least}" if most is None else f"at most {most}"
    return [what, bound, "not measured" if got is None else got, "" if got is None else "yes" if met else "NO"]


def report(results, contenders, versions, args):
    """The results as Markdown lines."""
    lines = ["# Results", "", f"Measured {datetime.date.today()} by `bench/compare.py` on {machine()}.",
             f"{versions}.", f"{args.rounds} round(s) of {args.seconds:g} s by turns; medians. The flow: enqueue, "
             "claim, ten checkpointed steps of 200 bytes, complete.", ""]
    lines += markdown(rates_table(results, contenders))
    if results.cpu:
        lines += ["", "## What a step costs", "", "The CPU of the client's, the server's and PostgreSQL's processes in "
                  "the time that counts, divided by the steps. Restate's server holds its own storage.", ""]
        lines += markdown(cpu_table(results, contenders))
    if results.singles:
        lines += ["", "## Single figures", "", *markdown(singles_table(results))]
    lines += ["", "## What was aimed for", "", *markdown([["what", "aim", "is", ""],
                                                         *(aim_row(*aim) for aim in aims(results))])]
    if results.errors:
        lines += ["", "## What could not be measured", ""]
        lines += [f"- {name}: {why}" for name, why in results.errors.items()]
    return lines


def commit_of(tree):
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=tree,
                          check=False)
    return done.stdout.strip() or tree.name


def versions_of(server_url, old):
    server = sql(server_url, "show server_version")[0][0].split()[0]
    peers = [line for peer in ("absurd", "dbos", "restate") if (stamp := ENVIRONMENTS / peer / "installed").exists()
             for line in stamp.read_text().splitlines() if "absurdctl" not in line and "psycopg" not in line]
    return f"Tidebase {commit_of(ROOT)}{f' (before: {commit_of(old)})' if old else ''}, PostgreSQL {server} (" \
           f"{', '.join(f'{k} {v}' for k, v in DURABLE.items())}), " + ", ".join(peers)


def chosen(args):
    """The contenders and the single figures that these arguments ask for."""
    contenders = []
    for contender in CONTENDERS:
        if contender.short or not args.short:
            contenders.append(contender)
            if args.old and contender.name in BEFORE:
                contenders.append(contender._replace(name=before(contender.name), tree=args.old))
    singles = [single for single in SINGLES if single.short or not args.short]
    return [[row for row in rows if not args.only or any(word in row.name for word in args.only)]
            for rows in (contenders, singles)]


def take_single(single, results, server_url, old):
    """Have Tidebase, the older tree and, for a resume, the peers take their turns."""
    program, *options = single.command
    for whose, tree in (("Tidebase", ROOT), *([("before", old)] if old else [])):
        results.add_single(single, whose, run([sys.executable, tree / "bench" / program, *options, "--json"], 600))
    for whose in ("absurd", "dbos", "restate") if single.name == "resume" else ():
        command = [sys.executable, BENCH / "peers" / f"{whose}_flow.py", "--resume", "--postgres", server_url, "--json"]
        results.add_single(single, whose, run(command, 120))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--seconds", type=float, help="default: 8; with --short 2.5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="the rows that the aims are about")
    parser.add_argument("--quick", action="store_true", help="one round of one second each")
    parser.add_argument("--old", type=lambda path: Path(path).resolve(), help="an older source tree, to compare with")
    parser.add_argument("--only", nargs="+", help="what has one of these words in its name")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS.md")
    parser.add_argument("--postgres", help="to make databases in, of a superuser; default: one of our own")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 1
    args.seconds = args.seconds or (2.5 if args.short else 8)
    contenders, singles = chosen(args)
    results = Results()
    with postgres(args.postgres) as server_url:
        for number in range(1, args.rounds + 1):
            for contender in contenders:
                try:
                    lines = turn(contender, server_url, args.seconds)
                except SystemExit as error:  # its server does not answer; the others are measured all the same
                    lines = [{"error": str(error)}]
                results.add(contender, lines)
                figures = ", ".join(str(line.get("stepsPerSecond", line.get("error"))) for line in lines)
                print(f"round {number}: {contender.name}: {figures}", file=sys.stderr, flush=True)
        for single in singles:
            take_single(single, results, server_url, args.old)
            print(single.name, file=sys.stderr, flush=True)
        lines = report(results, contenders, versions_of(server_url, args.old), args)
    print("\n".join(lines))
    if args.write:
        BENCH.joinpath("RESULTS.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
