#!/usr/bin/env python3
"""What each hot function costs the database: CPU of the backend, bytes of WAL, updated and dead rows per call.

One connection calls them as the server does. CPU time, not time that passed, so a busy machine hardly matters: a second
of it, divided by the microseconds, is how often a core can do this. In the second table: how many of the updates
were heap-only (HOT), which leave no index entry behind, and the dead rows that vacuum has to take away, per run of
STEPS steps.
"""
import argparse
import json
import time
from pathlib import Path

from common import ROOT, database, postgres

TEXT = '{"text": "' + "x" * 200 + '"}'
JOB = '{"workflowName": "bench", "metadata": {}, "channels": [], "maxAttempts": 3, "priority": 0}'
BATCHES = (1, 4, 16)  # steps, each of a run of its own, in one call of write_each
CALLS = {
    "enqueue_run": "select tidebase.enqueue_run('cost', %(job)s, %(text)s)",
    "claim_runs": "select tidebase.claim_runs(%(queues)s, 'me', null, 1, 60000, %(checkpoints)s)#>>'{runs,0,id}'",
    "record_step": "select tidebase.record_step(%(run)s, 'me', %(name)s, 'h', %(text)s, '{}', %(text)s, null, false, "
                   "null, now(), 5)",
    "begin_step": "select (body->'step')->>'id' from tidebase.begin_step(%(run)s, %(name)s, 'h', %(text)s, '{}', 'me', "
                  "60000)",
    "complete_step": "select tidebase.complete_step(%(run)s, %(step)s, 'me', %(text)s)",
    "heartbeat": "select tidebase.heartbeat(%(run)s, 'me')",
    "complete_run": "select tidebase.complete_run(%(run)s, 'me', %(text)s)",
    "write_each": "select tidebase.write_each(%(writes)s, %(texts)s::json[], %(texts)s::json[], "
                  "%(nothing)s::json[])",
    "select 1": "select 1",
}


class Meter:
    """Calls on one connection, and what they cost its backend."""

    def __init__(self, connection):
        self.connection, self.costs = connection, {}
        self.schedstat = Path(f"/proc/{connection.info.backend_pid}/schedstat")

    def cpu(self):
        return int(self.schedstat.read_text().split()[0])  # nanoseconds

    def call(self, function, **arguments):
        arguments = {"job": JOB, "text": TEXT, "queues": ["cost"], "checkpoints": True, **arguments}
        before = self.cpu()
        answer = self.connection.execute(CALLS[function], arguments).fetchone()[0]
        self.costs.setdefault(function, []).append(self.cpu() - before)
        return answer

    def wal(self):
        """Bytes of WAL, since ever."""
        return int(self.connection.execute("select pg_current_wal_insert_lsn() - '0/0'").fetchone()[0])


def one_run(meter, steps, begin):
    meter.call("enqueue_run")
    run = meter.call("claim_runs")
    for number in range(steps):
        if begin:
            step = meter.call("begin_step", run=run, name=f"s{number}")
            meter.call("complete_step", run=run, step=step)
        else:
            meter.call("record_step", run=run, name=f"s{number}")
    meter.call("heartbeat", run=run)
    meter.call("select 1")
    meter.call("complete_run", run=run)


def batches(meter, steps):
    """The CPU of write_each per step, by the size of its batch."""
    costs = {}
    for size in BATCHES:
        for _ in range(size):
            meter.call("enqueue_run")
        runs = [meter.call("claim_runs") for _ in range(size)]
        meter.costs.pop("write_each", None)
        for number in range(steps):
            meter.call("write_each", texts=[TEXT] * size, nothing=[None] * size, writes=json.dumps([
                {"do": "record_step", "runId": run, "leaseOwner": "me", "name": f"s{number}", "inputHash": "h",
                 "options": {}, "retryable": False, "durationMs": 5, "brief": True} for run in runs]))
        spent = sorted(meter.costs.pop("write_each"))
        costs[size] = spent[len(spent) // 2] / 1e3 / size
    return costs


def rows(connection, runs):
    """Per run: what pg_stat_user_tables counted, of the tables that were written."""
    time.sleep(1.5)  # a backend tells its counts once a second
    connection.execute("select 1")
    return connection.execute(
        "select relname, n_tup_ins / %(n)s, n_tup_upd / %(n)s, 100 * n_tup_hot_upd / nullif(n_tup_upd, 0), "
        "n_dead_tup / %(n)s from pg_stat_user_tables where n_tup_ins > 0 and schemaname = 'tidebase' order by 1",
        {"n": float(runs)}).fetchall()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--runs", type=int, default=200)
    parser.add_argument("-s", "--steps", type=int, default=10)
    parser.add_argument("--schema", type=Path, default=ROOT / "schema.sql", help="another version, to compare")
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
                for _ in range(20):  # functions are planned, pages there
                    one_run(meter, args.steps, begin)
                connection.execute("checkpoint")
                meter.costs.clear()
                before = meter.wal()
                for _ in range(args.runs):
                    one_run(meter, args.steps, begin)
                wal = (meter.wal() - before) / args.runs / args.steps
                print(f"\n{'two writes' if begin else 'one write'} a step: {wal:,.0f} bytes of WAL a step")
                for name, costs in meter.costs.items():
                    costs.sort()
                    print(f"  {name:14s} {costs[len(costs) // 2] / 1e3:7.0f} us CPU (median)")
                print("  per run             inserted   updated   of them HOT   dead")
                for table, inserted, updated, hot, dead in rows(connection, args.runs + 20):
                    print(f"    {table:16s} {inserted:9.1f} {updated:9.1f} {hot or 0:11.0f} % {dead:7.1f}")
                for size, cost in batches(meter, 200).items() if not begin else ():
                    print(f"  write_each of {size:2d}: {cost:5.0f} us CPU per step (median)")


if __name__ == "__main__":
    main()
