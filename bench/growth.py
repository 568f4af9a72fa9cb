#!/usr/bin/env python3
"""The flow of flow.py on an empty database, and on the same one with a past and with a backlog; prints the ratios.

    past      1,000,000 ended runs with 10,000,000 events and 4,000,000 steps
    backlog   1,000,000 runs queued on the very queue that all workers claim from, half of them not due yet

Filled by SQL, then measured by turns with the empty one, so that a noisy machine slows both. A ratio of 1 is as fast.
"""
from contextlib import ExitStack

import flow
from common import database, median, postgres, show, sql, tidebase

QUEUE = "growth"
TEXT = '{"text": "' + "x" * 200 + '"}'
# Ids as _new_id made them at that time: new ones stand beside each other in every index, behind all of these.
IDS = """
create function id_of(prefix text, at timestamptz, number bigint) returns text language sql as
$$ select prefix || lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || substr(md5(number::text), 13) $$;
"""
# A chunk of ended runs, from number {first} to {last}; of their events the last is left out, so that there are 10. The
# triggers of foreign keys would take most of the time.
PAST = """
set session_replication_role = replica;
create temporary table past as
  select n, at, id_of('run_', at, n) as id
    from generate_series({first}, {last}) n, lateral (select now() + (n - 1000000) * interval '1 second' as at) t;
insert into tidebase.runs (id, workflow_name, input, status, result, queue, run_at, max_attempts, attempt, settled_by,
                           event_seq, created_at, updated_at, completed_at)
select id, 'bench', '{text}', 'completed', '{text}', 'past' || n % 10, at, 3, 1, 'somebody', 10, at, at, at from past;
insert into tidebase.steps (id, run_id, name, position, input_hash, input, contract, status, output, settled_by,
                            started_at, completed_at)
select id_of('step_', at, n * 10 + s), id, 's' || s, s * 2 + 2, 'h', '{text}', '{{}}', 'completed', '{text}',
       'somebody', at, at
  from past, generate_series(0, 3) s;
insert into tidebase.events (run_id, seq, type, payload)
select id, s,
       case s when 1 then 'run.enqueued' when 2 then 'run.claimed' else
         case s % 2 when 1 then 'step.started' else 'step.completed' end end,
       json_build_object('stepId', 'step_' || md5(id || s), 'name', 's' || s, 'attempt', 1)
  from past, generate_series(1, 10) s;
"""
BACKLOG = """
create temporary table backlog as
  select n, at, id_of('run_', at, n) as id
    from generate_series({first}, {last}) n, lateral (select now() + (n - 2000000) * interval '1 ms' as at) t;
insert into tidebase.runs (id, workflow_name, input, status, queue, run_at, max_attempts, event_seq)
select id, 'bench', '{text}', 'queued', '{queue}', at + case n % 2 when 1 then interval '1 day' else '0' end, 3, 1
  from backlog;
insert into tidebase.events (run_id, seq, type, payload) select id, 1, 'run.enqueued', '{{}}' from backlog;
"""
CHUNK = 20_000


def fill(url, script, runs):
    sql(url, IDS)
    for first in range(0, runs, CHUNK):
        sql(url, script.format(text=TEXT, queue=QUEUE, first=first, last=min(first + CHUNK, runs) - 1))
    sql(url, "vacuum (analyze) tidebase.runs, tidebase.steps, tidebase.events")
    sql(url, "checkpoint")


def main():
    parser = flow.parser()
    parser.add_argument("--scale", type=float, default=1.0, help="0.01: a hundredth of the rows, for a short run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(one_write=True, queue=QUEUE, concurrency=[1, 8])
    args = parser.parse_args()
    runs = int(1_000_000 * args.scale)
    rates = {}
    with ExitStack() as stack:
        server_url = stack.enter_context(postgres())
        servers = {}
        for name in ("empty", "past", "backlog"):
            url = stack.enter_context(database(server_url, name))
            servers[name] = stack.enter_context(tidebase(url, args.server_processes))
            if name != "empty":
                fill(url, PAST if name == "past" else BACKLOG, runs)
        for _ in range(args.rounds):
            for concurrency in args.concurrency:
                for name, server in servers.items():
                    figures = flow.measure(args, server.url, concurrency, server.pids)
                    rates.setdefault((concurrency, name), []).append(figures["stepsPerSecond"])
    for (concurrency, name), values in rates.items():
        if name != "empty":
            empty = median(rates[concurrency, "empty"])
            show({"concurrency": concurrency, "database": name, "runs": runs, "stepsPerSecond": median(values),
                  "emptyStepsPerSecond": empty, "ratio": round(median(values) / empty, 2)}, args.json,
                 "c={concurrency:<3d} {database:8s} {runs:>9,} runs {stepsPerSecond:8.1f} steps/s, "
                 "empty {emptyStepsPerSecond:8.1f}   ratio {ratio}")


if __name__ == "__main__":
    main()
