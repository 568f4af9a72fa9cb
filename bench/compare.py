#!/usr/bin/env python3
"""One command: Tidebase, the limit of its database, and its peers, by turns on this machine.

Every contender gets a database of its own, new in each round, in one PostgreSQL (the wheel's, default settings, durable
commits); they run one after the other, three rounds, and medians count. The flow is the same for all: enqueue, claim,
ten checkpointed steps of 200 bytes, complete. Checkpointed steps a second at 1, 8 and 32 runs at a time.

    compare.py              the whole: about half an hour, on a machine that does nothing else
    compare.py --quick      a smoke run of a few minutes, whose figures mean nothing
    compare.py --write      ... and bench/RESULTS.md from it
    compare.py --only sdk   contenders whose name has this in it

Ratios are to the best peer of the same run, of the same number of runs at a time.
"""
import argparse
import datetime
import json
import os
import subprocess
import sys
from contextlib import ExitStack, nullcontext

from common import BENCH, DURABLE, ROOT, database, machine, median, postgres, sql, tidebase

CONCURRENCY = (1, 8, 32)
# The original server (Node) and Absurd, measured by turns on a machine of this kind: its figure here is estimated from
# Absurd's.
ORIGINAL, ABSURD_THEN = (112, 278, 290), (651, 1185, 1130)
FLOW = ["flow.py", "--processes", "2"]
# name, kind, program with its options, server processes
CONTENDERS = (
    ("pgbench, one write", "limit", ["floor.sh"], 0),
    ("pgbench, two writes", "limit", ["floor.sh", "TWO_WRITES=1"], 0),
    ("Tidebase, sdk threads", "tidebase", ["sdk_flow.py"], 1),
    ("Tidebase, sdk threads, 2 processes", "tidebase", ["sdk_flow.py"], 2),
    ("Tidebase, sdk asyncio", "tidebase", ["sdk_flow.py", "--awaited"], 1),
    ("Tidebase, sdk threads, side effects (two writes)", "tidebase", ["sdk_flow.py", "--begin"], 1),
    ("Tidebase, separate clients, one write", "tidebase", [*FLOW, "--one-write"], 1),
    ("Tidebase, separate clients, one write, 2 processes", "tidebase", [*FLOW, "--one-write"], 2),
    ("Tidebase, separate clients, two writes", "tidebase", FLOW, 1),
    ("Tidebase, separate clients, two writes, 2 processes", "tidebase", FLOW, 2),
    ("Absurd", "peer", ["peers/absurd_flow.py"], 0),
    ("DBOS, queue", "peer", ["peers/dbos_flow.py"], 0),
    ("DBOS, called in process", "peer", ["peers/dbos_flow.py", "--mode", "direct"], 0),
    ("Restate", "peer", ["peers/restate_flow.py"], 0),
)
RESUMES = (("Tidebase", "tidebase", ["resume.py", "--rounds", "1"]), ("Absurd", "peer", ["peers/absurd_flow.py"]),
           ("DBOS", "peer", ["peers/dbos_flow.py"]), ("Restate", "peer", ["peers/restate_flow.py"]))


def run(command, timeout, **environment):
    """What a program prints: JSON objects, one a line. An error is one, too."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False,
                          cwd=BENCH, env={**os.environ, "PYTHON": sys.executable, **environment})
    lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
    if done.returncode and not any("error" in line for line in lines):
        lines.append({"error": " / ".join(done.stderr.strip().splitlines()[-2:]) or f"status {done.returncode}"})
    return lines


def turn(contender, server_url, seconds):
    """One contender's figures, one per concurrency."""
    _, kind, (program, *options), processes = contender
    python, timeout = [sys.executable, BENCH / program], 600 + 10 * seconds
    concurrency = [*map(str, CONCURRENCY)]
    if kind == "peer":
        return run([*python, *options, "--json", "--postgres", server_url, "-d", seconds, "-c", *concurrency], timeout)
    with database(server_url) as url:
        if kind == "limit":
            subprocess.run([sys.executable, ROOT / "tidebase.py", "migrate"], env={**os.environ, "DATABASE_URL": url},
                           check=True, capture_output=True)
            environment = dict(option.split("=") for option in options)
            return [line for c in CONCURRENCY
                    for line in run([BENCH / program, url, c, max(1, round(seconds))], timeout, **environment)]
        with tidebase(url, processes) as server:
            return run([*python, *options, "--json", "--url", server.url, "-d", seconds, "-c", *concurrency], timeout)


def resume(contender, server_url):
    """What a contender printed of its resume."""
    _, kind, (program, *options) = contender
    with ExitStack() as stack:
        if kind == "peer":
            options = ["--resume", "--postgres", server_url]
        else:
            url = stack.enter_context(database(server_url))
            options += ["--url", stack.enter_context(tidebase(url)).url]
        lines = run([sys.executable, BENCH / program, *options, "--json"], 600)
    return lines[-1] if lines else {"error": "nothing was printed"}


class Results:
    """What was measured: per contender and concurrency, one value a round."""

    def __init__(self):
        self.steps, self.request, self.resumes, self.errors = {}, {}, {}, {}
        self.processes = None  # how many times as much two server processes do, where PostgreSQL is not asked

    def add(self, name, lines):
        for line in lines:
            if "error" in line:
                self.errors[name] = line["error"]
                continue
            key = (name, line["concurrency"])
            self.steps.setdefault(key, []).append(line["stepsPerSecond"])
            if "request" in line:
                self.request.setdefault(key, []).append(line["request"]["p99"] / max(line["request"]["p50"], 0.001))

    def rate(self, name, concurrency):
        return median(self.steps.get((name, concurrency), ()))

    def best(self, kind, concurrency, part=""):
        rates = [self.rate(name, concurrency) for name, k, *_ in CONTENDERS if k == kind and part in name]
        return max((rate for rate in rates if rate is not None), default=None)


def over(first, second):
    return round(first / second, 2) if first and second else None


def table(results):
    """The medians, each with its ratio to the best peer."""
    rows = [["steps/s", *(f"{c} at a time" for c in CONCURRENCY), *(f"÷ best peer, {c}" for c in CONCURRENCY)]]
    for name, *_ in CONTENDERS:
        rates = [results.rate(name, c) for c in CONCURRENCY]
        if any(rates):
            ratios = [over(rate, results.best("peer", c)) for rate, c in zip(rates, CONCURRENCY, strict=True)]
            rows.append([name, *(f"{rate:,.0f}" if rate else "-" for rate in rates),
                         *(f"{ratio:.2f}" if ratio else "-" for ratio in ratios)])
    return rows


def targets(results):
    """What was aimed for: (what, needed, got), one each; got is None where something was not measured."""
    one, two = "Tidebase, separate clients, one write", "Tidebase, separate clients, two writes"
    for c, then, absurd_then in zip(CONCURRENCY, ORIGINAL, ABSURD_THEN, strict=True):
        clients = max(filter(None, [results.rate(one, c), results.rate(f"{one}, 2 processes", c)]), default=None)
        absurd = results.rate("Absurd", c)
        original = then * absurd / absurd_then if absurd else None
        for kind in ("threads", "asyncio"):
            sdk = results.best("tidebase", c, f"sdk {kind}")
            yield f"SDK, {kind} ÷ best peer, {c} at a time", 1.25, over(sdk, results.best("peer", c))
        yield f"separate clients ÷ Absurd, {c}", 1.0, over(clients, absurd)
        yield f"separate clients ÷ the original, estimated, {c}", 4.0, over(clients, original)
        yield f"separate clients ÷ pgbench, one write, {c}", 0.6, over(clients, results.rate("pgbench, one write", c))
        clients = max(filter(None, [results.rate(two, c), results.rate(f"{two}, 2 processes", c)]), default=None)
        yield f"separate clients ÷ pgbench, two writes, {c}", 0.6, over(clients, results.rate("pgbench, two writes", c))
    yield "two server processes ÷ one, 32", 1.5, over(results.rate(f"{one}, 2 processes", 32), results.rate(one, 32))
    yield "the same where PostgreSQL is not asked", 1.5, results.processes
    spread = median(results.request.get((one, 32), ()))
    yield "p50 ÷ p99 of a request, 32 (a third)", 0.33, over(1, spread)
    ours = median(results.resumes.get("Tidebase", ()))
    others = [median(values) for name, values in results.resumes.items() if name != "Tidebase"]
    yield "100 ms ÷ resume of 1,000 steps", 1.0, over(100, ours)
    yield "fastest peer's resume ÷ ours", 1.0, over(min(others, default=None), ours)


def markdown(rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]]


def report(results, versions, args):
    """The results as Markdown lines."""
    lines = ["# Results", "", f"Measured {datetime.date.today()} by `bench/compare.py` on {machine()}.",
             f"{versions}.", f"{args.rounds} round(s) of {args.seconds:g} s by turns; medians. The flow: enqueue, "
             "claim, ten checkpointed steps of 200 bytes, complete.", ""]
    lines += [*markdown(table(results)), "", "## What was aimed for", ""]
    lines += markdown([["what", "at least", "is", ""], *(
        [what, needed, "not measured" if got is None else got, "" if got is None else "yes" if got >= needed else "NO"]
        for what, needed, got in targets(results))])
    if results.resumes:
        lines += ["", "## From taking up a run with 1,000 completed steps to its first new step", "", *markdown(
            [["", "milliseconds"], *([name, median(values)] for name, values in results.resumes.items())])]
    if results.errors:
        lines += ["", "## What could not be measured", ""]
        lines += [f"- {name}: {why}" for name, why in results.errors.items()]
    return lines


def versions_of(server_url):
    server = sql(server_url, "show server_version")[0][0].split()[0]
    peers = [line for peer in ("absurd", "dbos", "restate") if (stamp := BENCH / ".env" / peer / "installed").exists()
             for line in stamp.read_text().splitlines() if "absurdctl" not in line and "psycopg" not in line]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT,
                            check=False).stdout.strip()
    return f"Tidebase {commit}, PostgreSQL {server} ({', '.join(f'{k} {v}' for k, v in DURABLE.items())}), " \
           + ", ".join(peers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of one second each")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS.md")
    parser.add_argument("--only", help="contenders whose name has this in it")
    parser.add_argument("--postgres", help="to make databases in; default: one of our own")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 1
    results = Results()
    with postgres(args.postgres) as server_url:
        for number in range(args.rounds):
            for contender in CONTENDERS:
                if not args.only or args.only in contender[0]:
                    lines = turn(contender, server_url, args.seconds)
                    results.add(contender[0], lines)
                    told = ", ".join(str(line.get("stepsPerSecond", line.get("error"))) for line in lines)
                    print(f"round {number + 1}: {contender[0]}: {told}", file=sys.stderr, flush=True)
            for contender in RESUMES if not args.only else ():
                line = resume(contender, server_url)
                if "error" in line:
                    results.errors[f"{contender[0]}, resume"] = line["error"]
                else:
                    results.resumes.setdefault(contender[0], []).append(line["resumeMilliseconds"])
        if not args.only:
            told = run([sys.executable, BENCH / "processes.py", "--json", "--postgres", server_url,
                        "-d", args.seconds, "--rounds", args.rounds], 600 + 20 * args.seconds * args.rounds)
            results.processes = next((line["ratio"] for line in told if line.get("request") == "refusals"), None)
        lines = report(results, versions_of(server_url), args)
    print("\n".join(lines))
    with open(BENCH / "RESULTS.md", "w") if args.write else nullcontext() as file:
        if file:
            print("\n".join(lines), file=file)


if __name__ == "__main__":
    main()
