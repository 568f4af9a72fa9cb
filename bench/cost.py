#!/usr/bin/env python3
"""What each hot function costs the database: CPU of the backend, bytes of WAL, updated and dead rows.

One connection calls them as the server does, by name. CPU time, not time that passed, so a busy machine hardly matters:
a second of it, divided by the microseconds, is how often a core can do this.

    cost.py                        this tree's schema.sql
    cost.py --schema PATH          another version, with the same names of parameters
    cost.py -n 50                  fewer runs: a first look

First, single calls: per verb, and how many of the updates were heap-only (HOT), which leave no index entry behind, and
the dead rows that vacuum has to take away, per run of STEPS steps. Then batches: what a step costs in one call of
write_each with one step of each of several runs, as a client sends them by default; and the batch case, what 32 runs of
STEPS steps cost in the calls that a client with write-behind makes: enqueue 32, claim 32, record all steps of 16.
"""
import argparse
import json
import time
from pathlib import Path

from common import ROOT, database, median, postgres

TEXT = '{"text": "' + "x" * 200 + '"}'
JOB = {"workflow_name": "bench", "metadata": {}, "channels": [], "max_attempts": 3, "priority": 0}
BATCHES = (1, 2, 3, 4, 8, 16)
BATCH_CASE = (32, 16)  # runs at a time, and in one call: the client has two requests under way
CALLS = {
    "enqueue_run": "select tidebase.enqueue_run(p_queue => 'cost', p_job => %(job)s, p_input => %(text)s)",
    "claim_runs": "select tidebase.claim_runs(p_queues => %(queues)s, p_lease_owner => 'me', p_id => null, "
                  "p_limit => %(limit)s, p_lease_ms => 60000, p_checkpoints => true)",
    "record_step": "select tidebase.record_step(p_run_id => %(run)s, p_lease_owner => 'me', p_name => %(name)s, "
                   "p_input_hash => 'h', p_input => %(text)s, p_options => '{}', p_output => %(text)s, p_error => null,"
                   " p_retryable => false, p_resume_decision => null, p_started_at => now(), p_duration_ms => 5)",
    "begin_step": "select body from tidebase.begin_step(p_run_id => %(run)s, p_name => %(name)s, p_input_hash => 'h', "
                  "p_input => %(text)s, p_options => '{}', p_lease_owner => 'me', p_lease_ms => 60000)",
    "complete_step": "select tidebase.complete_step(p_run_id => %(run)s, p_step_id => %(step)s, p_lease_owner => 'me', "
                     "p_output => %(text)s)",
    "heartbeat": "select body from tidebase.heartbeat_runs(p_run_ids => array[%(run)s], p_lease_owners => array['me'])",
    "complete_run": "select tidebase.complete_run(p_run_id => %(run)s, p_lease_owner => 'me', p_result => %(text)s)",
    "write_each": "select status from tidebase.write_each(p_writes => %(writes)s, p_inputs => %(texts)s::json[], "
                  "p_outputs => %(texts)s::json[], p_errors => %(nothing)s::json[])",
    "select 1": "select 1",
}


class Meter:
    """Calls on one connection, and what they cost its backend."""

    def __init__(self, connection):
        self.connection, self.costs = connection, {}  # nanoseconds by label
        self.schedstat = Path(f"/proc/{connection.info.backend_pid}/schedstat")

    def cpu(self):
        return int(self.schedstat.read_text().split()[0])  # nanoseconds

    def call(self, function, label=None, **arguments):
        """Call it, its cost noted under `label`, by default its name.  Returns the first column of its rows."""
        arguments = {"job": json.dumps(JOB), "text": TEXT, "queues": ["cost"], "limit": 1, **arguments}
        before = self.cpu()
        rows = self.connection.execute(CALLS[function], arguments).fetchall()
        self.costs.setdefault(label or function, []).append(self.cpu() - before)
        return [row[0] for row in rows]

    def claim(self, limit=1, label=None):
        """The ids of the runs that were claimed.  Raises SystemExit if they are fewer than the limit."""
        runs = [run["id"] for run in self.call("claim_runs", label, limit=limit)[0]["runs"]]
        if len(runs) < limit:
            raise SystemExit(f"claimed {len(runs)} runs of {limit}")
        return runs

    def write_each(self, writes, label=None):
        """One call with these writes.  Raises SystemExit if one of them is refused."""
        statuses = self.call("write_each", label, writes=json.dumps(writes), texts=[TEXT] * len(writes),
                             nothing=[None] * len(writes))
        if set(statuses) != {200}:
            raise SystemExit(f"write_each answered {statuses}")

    def take(self, label):
        """The median microseconds of the calls of this label, which are forgotten."""
        return median(self.costs.pop(label)) / 1e3

    def wal(self):
        """Bytes of WAL, since ever."""
        return int(self.connection.execute("select pg_current_wal_insert_lsn() - '0/0'").fetchone()[0])


def one_run(meter, steps, begin):
    """The life of a run, in single calls."""
    meter.call("enqueue_run")
    run = meter.claim()[0]
    for number in range(steps):
        if begin:
            step = meter.call("begin_step", run=run, name=f"s{number}")[0]["step"]["id"]
            meter.call("complete_step", run=run, step=step)
        else:
            meter.call("record_step", run=run, name=f"s{number}")
    meter.call("heartbeat", run=run)
    meter.call("select 1")
    meter.call("complete_run", run=run)


def record(run, number, **fields):
    return {"do": "record_step", "run_id": run, "lease_owner": "me", "name": f"s{number}", "input_hash": "h",
            "options": {}, "retryable": False, "duration_ms": 5, "brief": True, **fields}


def completion(run):
    return {"do": "complete_run", "run_id": run, "lease_owner": "me", "brief": True, "chained": True}


def batches(meter, steps):
    """The CPU of write_each per step, by the number of runs of which it has one step each."""
    costs = {}
    for size in BATCHES:
        for _ in range(size):
            meter.call("enqueue_run")
        runs = [meter.claim()[0] for _ in range(size)]
        for number in range(steps):
            meter.write_each([record(run, number) for run in runs], "batch")
        meter.write_each([completion(run) for run in runs])
        costs[size] = meter.take("batch") / size
    return costs


def batch_case(meter, steps, rounds):
    """What the batch case costs: {what: microseconds per run}."""
    at_a_time, in_a_call = BATCH_CASE

    def parts_of(runs):
        return [runs[first:first + in_a_call] for first in range(0, at_a_time, in_a_call)]

    for number in range(2 * rounds):
        meter.write_each([{"do": "enqueue_run", "queue": "cost", **JOB}] * at_a_time, "enqueue")
        for runs in parts_of(meter.claim(at_a_time, "claim")):
            lives = [[*(record(run, step, chained=True) for step in range(steps)), completion(run)] for run in runs]
            if number % 2:  # by turns: each verb in calls of its own, and together, as the client sends them
                meter.write_each([write for life in lives for write in life[:-1]], "record")
                meter.write_each([life[-1] for life in lives], "complete")
            else:
                meter.write_each([write for life in lives for write in life], "together")
    return {"enqueue": meter.take("enqueue") / at_a_time, "claim": meter.take("claim") / at_a_time,
            **{name: meter.take(name) / in_a_call for name in ("record", "complete", "together")}}


def rows(connection, runs):
    """Per run: what pg_stat_user_tables counted, of the tables that were written."""
    time.sleep(1.5)  # a backend tells its counts once a second
    connection.execute("select 1")
    return connection.execute(
        "select relname, n_tup_ins / %(n)s, n_tup_upd / %(n)s, 100 * n_tup_hot_upd / nullif(n_tup_upd, 0), "
        "n_dead_tup / %(n)s from pg_stat_user_tables where n_tup_ins > 0 and schemaname = 'tidebase' order by 1",
        {"n": float(runs)}).fetchall()


def print_single_calls(meter, args, begin):
    for _ in range(20):  # functions are planned, pages there
        one_run(meter, args.steps, begin)
    meter.connection.execute("checkpoint")
    meter.costs.clear()
    before = meter.wal()
    for _ in range(args.runs):
        one_run(meter, args.steps, begin)
    wal = (meter.wal() - before) / args.runs / args.steps
    print(f"\n{'two writes' if begin else 'one write'} a step: {wal:,.0f} bytes of WAL a step")
    for name in list(meter.costs):
        print(f"  {name:14s} {meter.take(name):7.0f} us CPU (median)")
    print("  per run             inserted   updated   of them HOT   dead")
    for table, inserted, updated, hot, dead in rows(meter.connection, args.runs + 20):
        print(f"    {table:16s} {inserted:9.1f} {updated:9.1f} {hot or 0:11.0f} % {dead:7.1f}")


def print_batches(meter, args):
    print("\nbatches, us CPU (medians)")
    for size, cost in batches(meter, 200).items():
        print(f"  write_each of one step of {size:2d} runs: {cost:5.0f} per step")
    batch_case(meter, args.steps, 3)
    costs = batch_case(meter, args.steps, max(args.runs // 10, 3))
    print(f"  {BATCH_CASE[0]} runs of {args.steps} steps, {BATCH_CASE[1]} in a call of write_each; per run:")
    for name, cost in costs.items():
        words = "record and complete in the same calls" if name == "together" else name
        print(f"    {words:38s} {cost:7.0f}" + (f", {cost / args.steps:.0f} per step" if name == "record" else ""))
    whole = costs["enqueue"] + costs["claim"] + costs["together"]
    print(f"  in all: {whole / args.steps:.0f} us per step, as the client sends them")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--runs", type=int, default=200)
    parser.add_argument("-s", "--steps", type=int, default=10)
    parser.add_argument("--schema", type=Path, default=ROOT / "schema.sql")
    args = parser.parse_args()
    import psycopg
    with postgres() as server_url:
        for begin in (False, True):
            with database(server_url) as url, \
                    psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
                connection.execute(args.schema.read_bytes())
                connection.execute("alter system set autovacuum = off")  # it would take the dead rows away
                connection.execute("select pg_reload_conf()")
                meter = Meter(connection)
                print_single_calls(meter, args, begin)
                if not begin:
                    print_batches(meter, args)


if __name__ == "__main__":
    main()
