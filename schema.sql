-- Tidebase: the record of agent runs, and every rule about them.
--
-- NOUNS
--   run        one execution of a workflow. A run that has a queue is a job.
--   step       one named piece of a run; completed, its output is a checkpoint that is replayed, never executed again.
--   lease      the right to work on a run or a step, held by an owner until an instant, and extended by its writes.
--   fence      a number on the run that grows each time another owner takes the lease.
--   event      what happened to a run, numbered 1, 2, 3 … without gap or repeat.
--   gate       a question to a person; a channel is where to tell of it; the outbox holds webhooks until they are sent.
--
-- THE LIFE OF A RUN
--   pending ──begin──► running ──complete──► completed
--   queued ──claim──►  running ──fail──────► failed (or queued again, while attempts last)
--   running ──lease expires──► queued again, or failed; without a queue it stays until somebody begins it
--   waiting ──what it waits for──► queued
--   anything but completed ──cancel──► cancelled;  failed, cancelled ──retry──► queued or pending
--
-- CONTENTS
--   Preamble                    the oldest PostgreSQL that will do; one lock for all who apply this file
--   Clock                       the only source of time
--   Tables                      states with a named check, invariants as constraints, each index with its query
--   On the wire                 each row as protocol.md shows it, and how lists bound their bytes
--   Helpers                     locks, refusals, checks, events, webhooks: the same for every verb
--   Runs                        _transition and _insert_runs; created, begun, kept alive, ended, put back
--   Steps                       begun under a lease, ended once by _end_step, replayed ever after
--   Children and forks          runs that come from runs
--   Gates                       a question to a person, decided once
--   State and usage             what a run shows of itself, and what it costs
--   Waiting                     a queued run that waits for something holds no worker
--   Queues                      enqueue and claim, within the queue's caps
--   Many writes                 a batch in one transaction: plain writes set-based, the others one by one
--   Schedules                   a time that comes fires once
--   The run detail              all of a run, at one instant
--   The reconciler's verbs      what time alone brings about
--   The sender's verbs          webhooks claimed, renewed, settled
--   Studio                      lists, counts and reasons for the web page
--   Version                     what this file leaves behind
--
-- HOW TO READ IT
--   A verb (begin_step, claim_runs) is one transition. It locks, decides, writes the rows, the event and the webhooks, all
--   or nothing, and answers the JSON of the HTTP response. Above it stands its contract: Needs (else which refusal),
--   Leaves, Returns; and Locks, where these are more than its run.
--   Names: p_ arguments, v_ locals, _private helpers. A verb's parameter is p_ and the wire's key in snake_case; so are the
--   keys of its jsonb arguments (p_job, p_child, p_version, p_entry, p_config, p_writes). What a user sent, and what a run
--   waits for, keeps its keys.
--   Lock order: a parent's run, then its child's, then steps, gates, state and outbox. A run is locked for no key update,
--   so that foreign keys do not wait. A queue with a cap has an advisory lock, taken before any run; several are taken in
--   the order of their names.
--   A verb that changes a run counts the run's event in the same update (event_seq + 1), and _append_event writes it.
--   A refusal is raised with SQLSTATE TBnnn, nnn being the HTTP status. Its message is for a person; its detail is JSON
--   with the code.
--   What a user sends is json, kept to the letter. jsonb is where Tidebase looks inside.
--   A helper is `language sql` where Postgres inlines it. Other SQL functions are planned at every call before Postgres
--   18, so they are plpgsql.
--   There is no session state (SET, LISTEN, session locks): a transaction pooler may sit in between.
--
-- HOW IT EVOLVES
--   Apply it with `python tidebase.py migrate` or `psql -1 -f schema.sql`: one transaction, any number of times, to an
--   empty or an older database. "create table" shows today's shape. Before the tables stands what those of an older build
--   lack ("add column if not exists"), and what nothing reads any more. All functions are dropped and made anew.
--   Every change raises the version at the end: a server applies this file only to a database whose version is lower.

-- ------------------------------------------------------------------------------
-- Preamble: the oldest PostgreSQL that will do; and one lock for all who apply this file, else concurrent "if not exists"
-- collide on the catalog.
-- ------------------------------------------------------------------------------
do $$
begin
  if current_setting('server_version_num')::integer < 150000 then
    raise exception 'Tidebase needs PostgreSQL 15 or newer; this server is %', current_setting('server_version')
      using errcode = 'feature_not_supported';
  end if;
end $$;
select pg_advisory_xact_lock(hashtextextended('tidebase.schema', 0));
create schema if not exists tidebase;

-- ------------------------------------------------------------------------------
-- Clock: the only source of time. In milliseconds, as on the wire, so that what is compared is what is shown.
-- ------------------------------------------------------------------------------
create or replace function tidebase.now() returns timestamptz language sql volatile as
$$ select date_trunc('milliseconds', clock_timestamp()) $$;

-- All functions of an older build are dropped, whatever their signatures, so that no overload of one is left. now() stays,
-- since column defaults need it.
do $$
declare
  v_function regprocedure;
begin
  for v_function in select oid from pg_proc where pronamespace = 'tidebase'::regnamespace
                       and oid <> 'tidebase.now()'::regprocedure
  loop
    execute format('drop routine %s', v_function);
  end loop;
end $$;

create or replace function tidebase._ms (p_ms bigint) returns interval language sql immutable as
$$ select p_ms * interval '1 millisecond' $$;

-- Time-ordered ids (UUID version 7, RFC 9562, as hex): neighbours in time are neighbours in every index. The 12 bits
-- after the version go on where the milliseconds end, so that what one transaction makes sorts as it was made.
create or replace function tidebase._new_id (p_prefix text) returns text language plpgsql volatile as $$
declare
  v_us bigint := extract(epoch from clock_timestamp()) * 1000000;
begin
  return p_prefix || '_' || lpad(to_hex(v_us / 1000), 12, '0') || '7' || lpad(to_hex(v_us % 1000 * 4), 3, '0')
         || substr(replace(gen_random_uuid()::text, '-', ''), 17);
end $$;

-- ------------------------------------------------------------------------------
-- Tables: states are text with a named check, invariants are constraints, each index names the query it serves.
-- ------------------------------------------------------------------------------
-- What tables that an earlier build made lack. It stands before them, because their indexes need the columns.
alter table if exists tidebase.runs add column if not exists recovery_secret text;
alter table if exists tidebase.steps add column if not exists copied boolean not null default false;
alter table if exists tidebase.state_versions add column if not exists live_version integer;
alter table if exists tidebase.signals add column if not exists n integer not null default 1;
alter table if exists tidebase.signals drop constraint if exists signals_name_key;  -- one of a name; now one of a number
alter table if exists tidebase.outbox drop constraint if exists outbox_channel_id_fkey;
alter table if exists tidebase.outbox add column if not exists payload_seq bigint;
alter table if exists tidebase.outbox add column if not exists claimed boolean not null default false;
alter table if exists tidebase.queues add column if not exists paused boolean not null default false;
-- And what nothing reads any more, since it said what other columns say.
alter table if exists tidebase.runs drop column if exists cancel_requested_at;
alter table if exists tidebase.gates drop column if exists decision, drop column if exists updated_at;
alter table if exists tidebase.state_streams drop column if exists current_value, drop column if exists metadata;
drop index if exists tidebase.runs_workflow_idx, tidebase.runs_queue_idx, tidebase.outbox_due_idx;

-- The host, and port, of an address.
create or replace function tidebase._host (p_url text) returns text language sql immutable as
$$ select coalesce(lower(substring(p_url from '^[^:]+://(?:[^/?#]*@)?([^/?#]*)')), '') $$;

-- Two columns that some builds generated. To add such a column would rewrite the table under a lock, so they are filled in
-- once, where they matter: for steps in review and for webhooks that are due.
do $$
begin
  if to_regclass('tidebase.steps') is null then
    return;  -- an empty database
  end if;
  if not exists (select from pg_attribute where attrelid = to_regclass('tidebase.steps') and attname = 'review_at') then
    alter table tidebase.steps add column review_at timestamptz;
    update tidebase.steps set review_at = updated_at where status = 'manual_review';
  end if;
  if not exists (select from pg_attribute where attrelid = to_regclass('tidebase.outbox') and attname = 'host') then
    alter table tidebase.outbox add column host text not null default '';
    update tidebase.outbox set host = tidebase._host(url) where status = 'pending';
  end if;
  alter table tidebase.steps alter column review_at drop expression if exists;
  alter table tidebase.outbox alter column host drop expression if exists, alter column host set default '';
end $$;

create table if not exists tidebase.meta (
  only_row    boolean     primary key default true check (only_row),
  version     integer     not null,
  digest      text,                                     -- of the file that was applied, set by `tidebase.py migrate`
  applied_at  timestamptz not null default tidebase.now()
);

-- Every step updates its run's row (event_seq, the lease). That stays a heap-only update as long as there is room on the
-- page (fillfactor) and no index on event_seq, updated_at or lease_expires_at.
-- autovacuum_analyze_threshold: statistics of a tiny table would give plans that scan it, and each connection would keep
-- those plans while the table grows.
create table if not exists tidebase.runs (
  id                  text        primary key,
  workflow_name       text        not null,
  input               json        not null default '{}',
  metadata            jsonb       not null default '{}',
  status              text        not null constraint runs_status_known check (status in
                      ('pending', 'queued', 'running', 'waiting', 'completed', 'failed', 'cancelled')),
  result              json,
  error               json,
  failure_class       text,
  recovery_webhook    text,
  recovery_secret     text,                                -- signs it; never leaves the database but to the sender
  queue               text,
  dedupe_key          text,
  priority            integer     not null default 0,
  run_at              timestamptz,
  max_attempts        integer     not null default 1,
  attempt             integer     not null default 0,
  deadline_at         timestamptz,
  lease_owner         text,
  lease_expires_at    timestamptz,
  lease_ms            integer     not null default 60000,  -- what one write of the owner extends the lease by
  fence               integer     not null default 0,      -- + 1 each time another owner takes the lease
  former_owners       text[]      not null default '{}',   -- lost or gave up the lease: their late writes are refused
  settled_by          text,                                -- whose complete, fail or release came last: tells a repeat
  failed_attempt      integer,                             -- the attempt whose failure was recorded last: likewise
  claim_id            text,                                -- of the claim that took it: likewise
  stalled             boolean     not null default false,  -- lease expired, noticed, and left for a manual resume
  offered_at          timestamptz,                         -- when a push queue last offered it
  waiting_for         jsonb,                               -- of a waiting run: see wait_run
  wake_at             timestamptz,                         -- when it need wait no longer
  parent_run_id       text,                                -- of a child
  event_seq           integer     not null default 0,
  has_channels        boolean     not null default false,
  cancelled_at        timestamptz,
  cancel_reason       text,
  cancel_actor        text,
  created_at          timestamptz not null default tidebase.now(),
  updated_at          timestamptz not null default tidebase.now(),
  completed_at        timestamptz,
  constraint runs_lease_whole check ((lease_owner is null) = (lease_expires_at is null)),
  constraint runs_queued_whole check (status <> 'queued' or (queue is not null and run_at is not null)),
  constraint runs_waiting_whole check ((status = 'waiting') = (waiting_for is not null))
) with (fillfactor = 70, autovacuum_vacuum_threshold = 2000, autovacuum_analyze_threshold = 2000);
-- At most one live run per queue and dedupe key; enqueue_runs reads the live one by it.
create unique index if not exists runs_dedupe_key on tidebase.runs (queue, dedupe_key)
  where dedupe_key is not null and status in ('queued', 'running', 'waiting');
-- Serves claim_runs: the ready runs of a queue and priority, by run_at; and the priorities in use.
create index if not exists runs_ready_idx on tidebase.runs (queue, priority desc, run_at) where status = 'queued';
-- Serves claims for some workflows, however many runs of others stand before theirs.
create index if not exists runs_ready_workflow_idx on tidebase.runs (queue, workflow_name, priority desc, run_at)
  where status = 'queued';
-- Serves expire_leases (all of it: as many rows as there are workers), the concurrency cap (by queue) and the repeat
-- of a claim (by queue and owner).
create index if not exists runs_running_idx on tidebase.runs (queue, lease_owner)
  where status = 'running' and not stalled;
-- Serves the concurrency cap of push queues.
create index if not exists runs_offered_idx on tidebase.runs (queue, offered_at)
  where status = 'queued' and offered_at is not null;
-- Serves cancel_overdue.
create index if not exists runs_deadline_idx on tidebase.runs (deadline_at)
  where deadline_at is not null and status in ('pending', 'queued', 'running', 'waiting');
-- Serves wake_due.
create index if not exists runs_wake_idx on tidebase.runs (wake_at) where wake_at is not null and status = 'waiting';
-- Serves _is_wait_over: the children of a run that have not ended.
create index if not exists runs_live_children_idx on tidebase.runs (parent_run_id, id)
  where parent_run_id is not null and status in ('pending', 'queued', 'running', 'waiting');
-- Serve the list of runs, newest first: all, of a workflow and of a queue (a status at a time), of a status (few are
-- anything but completed), of a failure class, and by metadata.
create index if not exists runs_newest_idx on tidebase.runs (created_at desc, id desc);
create index if not exists runs_of_workflow_idx on tidebase.runs (workflow_name, status, created_at desc, id desc);
create index if not exists runs_of_queue_idx on tidebase.runs (queue, status, created_at desc, id desc)
  where queue is not null;
create index if not exists runs_status_idx on tidebase.runs (status, created_at desc, id desc)
  where status <> 'completed';
create index if not exists runs_failure_idx on tidebase.runs (failure_class, created_at desc, id desc)
  where failure_class is not null;
create index if not exists runs_metadata_idx on tidebase.runs using gin (metadata jsonb_path_ops)
  where metadata <> '{}';
-- Serves purge_runs.
create index if not exists runs_ended_idx on tidebase.runs (completed_at) where completed_at is not null;

create table if not exists tidebase.steps (
  id               text        primary key,
  run_id           text        not null references tidebase.runs on delete cascade,
  name             text        not null,
  position         integer     not null,                   -- the run's event number at its first begin: their order
  input_hash       text        not null,
  input            json,
  options          json        not null default '{}',
  contract         json        not null,
  status           text        not null constraint steps_status_known check (status in
                   ('running', 'completed', 'failed_retryable', 'manual_review', 'failed')),
  output           json,
  error            json,
  lease_owner      text,
  lease_expires_at timestamptz,
  fence            integer     not null default 0,         -- the run's fence when it was begun
  settled_by       text,                                   -- whose complete or fail came last: a repeat is known by it
  reviewed         text,                                   -- the last review's decision: likewise
  copied           boolean     not null default false,     -- from the run that this one is a fork of
  attempt          integer     not null default 1,
  started_at       timestamptz,
  completed_at     timestamptz,
  created_at       timestamptz not null default tidebase.now(),
  updated_at       timestamptz not null default tidebase.now(),
  review_at        timestamptz,                            -- since when it waits for a person; an index on status instead
                                                           -- would make each end of a step cost more
  constraint steps_name_key unique (run_id, name)           -- also serves the run detail and every begin
) with (fillfactor = 70, autovacuum_vacuum_threshold = 2000, autovacuum_analyze_threshold = 2000);
-- Serves list_approvals.
create index if not exists steps_review_idx on tidebase.steps (review_at, id) where review_at is not null;

create table if not exists tidebase.events (
  id         bigint      generated always as identity,
  run_id     text        not null references tidebase.runs on delete cascade,
  seq        integer     not null,
  type       text        not null,
  payload    json        not null,
  created_at timestamptz not null default tidebase.now(),
  constraint events_pkey primary key (run_id, seq)          -- serves the run detail and the streams
) with (autovacuum_vacuum_threshold = 2000, autovacuum_analyze_threshold = 2000);

create table if not exists tidebase.channels (
  id         text        primary key,
  run_id     text        not null references tidebase.runs on delete cascade,
  gate_id    text,                                          -- set: of this gate's events alone
  type       text        not null,
  url        text        not null,
  secret     text,                                          -- signs; never leaves the database but to the sender
  events     jsonb       not null default '[]',             -- empty: all
  created_at timestamptz not null default tidebase.now()
);
-- Serves _notify and the run detail.
create index if not exists channels_run_idx on tidebase.channels (run_id);

create table if not exists tidebase.gates (
  id               text        primary key,
  run_id           text        not null references tidebase.runs on delete cascade,
  name             text        not null,
  prompt           text        not null,
  data             json        not null default '{}',
  status           text        not null default 'pending' constraint gates_status_known
                   check (status in ('pending', 'approved', 'rejected', 'canceled')),
  actor            text,
  decision_payload json,
  capability       json,
  channels         json        not null default '[]',       -- its own, as they are shown
  resolve_token    text        not null,                    -- who has it may decide
  resolve_url      text        not null,
  expires_at       timestamptz,
  created_at       timestamptz not null default tidebase.now(),
  resolved_at      timestamptz,
  constraint gates_name_key unique (run_id, name)
);
-- Serves expire_gates.
create index if not exists gates_expiry_idx on tidebase.gates (expires_at)
  where status = 'pending' and expires_at is not null;
-- Serve list_approvals.
create index if not exists gates_pending_idx on tidebase.gates (created_at, id) where status = 'pending';
create index if not exists gates_resolved_idx on tidebase.gates (resolved_at, id) where resolved_at is not null;

-- A run's live state: one value and one version, whichever stream was written last.
create table if not exists tidebase.states (
  run_id     text        primary key references tidebase.runs on delete cascade,
  value      jsonb       not null,
  version    integer     not null,
  updated_at timestamptz not null default tidebase.now()
);

create table if not exists tidebase.state_streams (
  id              text        primary key,
  run_id          text        not null references tidebase.runs on delete cascade,
  name            text        not null,
  target_type     text        not null,
  target_id       text        not null,
  current_version integer     not null,
  created_at      timestamptz not null default tidebase.now(),
  updated_at      timestamptz not null default tidebase.now(),
  constraint state_streams_name_key unique (run_id, name)
);

create table if not exists tidebase.state_versions (
  id         text        primary key,
  stream_id  text        not null references tidebase.state_streams on delete cascade,
  run_id     text        not null references tidebase.runs on delete cascade,
  step_id    text,
  version    integer     not null,
  value      jsonb       not null,
  patch      jsonb,
  label      text,
  reason     text,
  importance text        not null constraint state_versions_importance_known
             check (importance in ('transient', 'normal', 'checkpoint', 'milestone')),
  metadata   jsonb       not null default '{}',
  created_by text,
  created_at timestamptz not null default tidebase.now(),
  live_version integer,                                     -- of a write of the live state: the run's version after it
  constraint state_versions_version_key unique (stream_id, version)
);
-- Serves the run detail, the versions and the snapshots.
create index if not exists state_versions_run_idx on tidebase.state_versions (run_id, stream_id, version);

create table if not exists tidebase.usage (
  id            text        primary key,
  run_id        text        not null references tidebase.runs on delete cascade,
  step_id       text,
  kind          text        not null,
  provider      text,
  model         text,
  label         text,
  quantity      numeric     constraint usage_quantity_whole check (quantity >= 0),
  unit          text,
  input_tokens  bigint      constraint usage_input_whole check (input_tokens >= 0),
  output_tokens bigint      constraint usage_output_whole check (output_tokens >= 0),
  total_tokens  bigint      constraint usage_total_whole check (total_tokens >= 0),
  cost_usd      numeric     constraint usage_cost_whole check (cost_usd >= 0),
  metadata      jsonb       not null default '{}',
  created_at    timestamptz not null default tidebase.now()
);
-- Serves the run detail; and usage_groups.
create index if not exists usage_run_idx on tidebase.usage (run_id, created_at);
create index if not exists usage_time_idx on tidebase.usage (created_at);

create table if not exists tidebase.run_edges (
  id            text        primary key,
  parent_run_id text        not null references tidebase.runs on delete cascade,
  child_run_id  text        not null references tidebase.runs on delete cascade,
  name          text        not null,
  edge_type     text        not null,
  metadata      jsonb       not null default '{}',
  created_at    timestamptz not null default tidebase.now(),
  constraint run_edges_name_key unique (parent_run_id, name)   -- also serves the run detail and the cascade of a cancel
);
-- Serves the deletion of a child.
create index if not exists run_edges_child_idx on tidebase.run_edges (child_run_id);

create table if not exists tidebase.signals (
  id         text        primary key,
  run_id     text        not null references tidebase.runs on delete cascade,
  name       text        not null,
  payload    json,
  timed_out  boolean     not null default false,            -- nobody sent it in time: that is decided, too
  created_at timestamptz not null default tidebase.now(),
  n          integer     not null default 1                 -- 1, 2, 3 … of a name: the n-th wait takes the n-th signal
);
-- One signal of a number; serves the next number, and those who wait for one.
create unique index if not exists signals_number_key on tidebase.signals (run_id, name, n);

create table if not exists tidebase.schedules (
  name             text        primary key,
  cron             text        not null,
  workflow_name    text        not null,
  input            json        not null default '{}',
  queue            text        not null,
  max_attempts     integer     not null,
  enabled          boolean     not null,
  timezone         text        not null,
  next_run_at      timestamptz,                             -- also while it is disabled; null: that time never comes
  last_enqueued_at timestamptz,
  created_at       timestamptz not null default tidebase.now(),
  updated_at       timestamptz not null default tidebase.now()
);

-- The outbox: a webhook is a row, inserted in the transaction of what it reports, and sent afterwards. The webhooks of a
-- channel are sent one after the other: of those pending only the first has a next_attempt_at.
create table if not exists tidebase.outbox (
  seq             bigint      generated always as identity primary key,
  id              text        not null unique,              -- rec_… or del_…, the same at every try
  kind            text        not null constraint outbox_kind_known check (kind in ('recovery', 'push', 'channel')),
  run_id          text        not null references tidebase.runs on delete cascade,
  channel_id      text,                                     -- both are deleted with the run: no foreign key
  gate_id         text,
  event_type      text        not null,                     -- run.resume, run.invoke, or the event's
  reason          text,
  url             text        not null,
  host            text        not null default '',          -- and port: each has its share of the sender's slots
  payload         json,
  payload_seq     bigint,                                   -- the row with the payload: an event's is stored once
  status          text        not null default 'pending'
                  constraint outbox_status_known check (status in ('pending', 'delivered', 'failed')),
  attempts        integer     not null default 0,
  next_attempt_at timestamptz,
  claimed         boolean     not null default false,       -- a sender has it until next_attempt_at
  http_status     integer,
  response_body   text,
  error_text      text,
  created_at      timestamptz not null default tidebase.now(),
  completed_at    timestamptz
);
-- Serve claim_webhooks. The first: whether any is due; its condition differs from the second's, so that the planner does
-- not take it for the webhooks of one host. The second: which hosts there are, and what is due for each.
create index if not exists outbox_any_due_idx on tidebase.outbox (next_attempt_at) where completed_at is null;
create index if not exists outbox_host_idx on tidebase.outbox (host, next_attempt_at)
  where status = 'pending' and next_attempt_at is not null;
-- Serves the order of a channel.
create index if not exists outbox_channel_idx on tidebase.outbox (channel_id, seq) where status = 'pending';
-- Serves the run detail.
create index if not exists outbox_run_idx on tidebase.outbox (run_id, seq);

create table if not exists tidebase.queues (
  name            text    primary key,
  concurrency     integer,
  rate_per_minute integer,
  invoke_url      text,
  paused          boolean not null default false            -- gives out no runs
);

-- The claims of queues that have a rate; older than a minute, they are deleted by the next claim.
create table if not exists tidebase.queue_claims (
  queue      text        not null,
  claimed_at timestamptz not null,
  claimed    integer     not null
);
-- Serves _queue_room.
create index if not exists queue_claims_idx on tidebase.queue_claims (queue, claimed_at);

-- How many runs of a queue ended in which status. Rows are only added, so that no transaction waits for another;
-- fold_tallies sums them up.
create table if not exists tidebase.queue_tallies (
  queue  text   not null,
  status text   not null,
  runs   bigint not null
);

-- The workers that claim runs. Each server writes once a minute which asked it; rows older than a day are deleted.
create table if not exists tidebase.workers (
  owner         text        primary key,                    -- empty: of workers without a name
  queues        text[]      not null,
  workflows     text[],                                     -- null: any
  since         timestamptz not null,
  last_asked_at timestamptz not null
);
-- Serves list_workers and _queue_facts.
create index if not exists workers_asked_idx on tidebase.workers (last_asked_at);

-- Claims and failures of the last hour. Rows are only added; note_workers sums them up.
create table if not exists tidebase.queue_minutes (
  queue    text        not null,
  minute   timestamptz not null,
  claims   integer     not null,
  failures integer     not null
);
-- Serves list_minutes.
create index if not exists queue_minutes_idx on tidebase.queue_minutes (queue, minute);

-- ------------------------------------------------------------------------------
-- On the wire: each table's row as protocol.md shows it, every key always there.
-- ------------------------------------------------------------------------------
create or replace function tidebase._iso (p_at timestamptz) returns text language sql stable as
$$ select to_char(p_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') $$;

-- An address without its credentials, which are for the receiver alone.
create or replace function tidebase._shown_url (p_url text) returns text language sql immutable as
$$ select regexp_replace(p_url, '^([^:]+://)[^/?#]*@', '\1***@') $$;

-- The most bytes of payloads in one answer that has a list. A function, so that all of them have the same.
create or replace function tidebase._budget () returns integer language sql immutable as
$$ select 16 * 1024 * 1024 $$;

-- The bytes of a payload's text, 0 for null. The text is not read where the stored form tells enough: where it is not
-- compressed, or too large for a list even compressed. Of jsonb it is an estimate: the text may have a quarter of these
-- bytes or, where it is full of numbers, 26 times as many.
create or replace function tidebase._bytes (p_value json) returns integer language sql stable as $$
  select coalesce(case when pg_column_size(p_value) > 65540 or pg_column_compression(p_value) is null
                       then pg_column_size(p_value) else octet_length(p_value::text) end, 0)
$$;

create or replace function tidebase._bytes (p_value jsonb) returns integer language sql stable as $$
  select coalesce(case when pg_column_size(p_value) > 262148
                         or (pg_column_size(p_value) <= 2400 and pg_column_compression(p_value) is null)
                       then pg_column_size(p_value) else octet_length(p_value::text) end, 0)
$$;

-- The bytes of a payload's text, 0 for null; what is stored uncompressed is not read.
create or replace function tidebase._text_bytes (p_value json) returns bigint language sql stable as $$
  select coalesce(case when pg_column_compression(p_value) is null then pg_column_size(p_value)
                       else octet_length(p_value::text) end, 0)
$$;

-- The bytes of a payload (json or jsonb) in a list, which leaves out one of more than 64 KiB.
create or replace function tidebase._bytes_in_list (p_value anyelement) returns integer language sql stable as
$$ select case when tidebase._bytes(p_value) <= 65536 then tidebase._bytes(p_value) else 0 end $$;

-- A payload in a list: null if p_room is false or it is left out.
create or replace function tidebase._in_list (p_value anyelement, p_room boolean) returns anyelement
  language sql stable as
$$ select case when p_room and tidebase._bytes(p_value) <= 65536 then p_value end $$;

create or replace function tidebase._mark_omitted (p_object json) returns json language sql immutable as
$$ select (left(p_object::text, -1) || ', "payloadOmitted": true}')::json $$;

-- p_input, … are r's own, or null where a list leaves them out.
create or replace function tidebase._run_shown (r tidebase.runs, p_input json, p_metadata jsonb, p_result json,
                                                p_error json, p_waiting_for jsonb)
  returns json language sql stable as $$
  select json_build_object(
    'id', r.id, 'workflowName', r.workflow_name, 'input', p_input, 'metadata', p_metadata, 'status', r.status,
    'result', p_result, 'error', p_error, 'recoveryWebhook', tidebase._shown_url(r.recovery_webhook),
    'leaseOwner', r.lease_owner, 'leaseExpiresAt', tidebase._iso(r.lease_expires_at), 'attempt', r.attempt,
    'queue', r.queue, 'dedupeKey', r.dedupe_key, 'priority', r.priority, 'runAt', tidebase._iso(r.run_at),
    'maxAttempts', r.max_attempts, 'deadlineAt', tidebase._iso(r.deadline_at),
    'cancelRequestedAt', tidebase._iso(r.cancelled_at), 'cancelledAt', tidebase._iso(r.cancelled_at),
    'cancelReason', r.cancel_reason, 'cancelActor', r.cancel_actor, 'failureClass', r.failure_class,
    'createdAt', tidebase._iso(r.created_at), 'updatedAt', tidebase._iso(r.updated_at),
    'completedAt', tidebase._iso(r.completed_at), 'waitingFor', p_waiting_for, 'stalled', r.stalled)
$$;

create or replace function tidebase._run_json (r tidebase.runs) returns json language sql stable as
$$ select tidebase._run_shown(r, r.input, r.metadata, r.result, r.error, r.waiting_for) $$;

-- The bytes of a run's payloads in a list.
create or replace function tidebase._run_bytes (r tidebase.runs) returns integer language sql stable as $$
  select tidebase._bytes_in_list(r.input) + tidebase._bytes_in_list(r.metadata) + tidebase._bytes_in_list(r.result)
       + tidebase._bytes_in_list(r.error) + tidebase._bytes_in_list(r.waiting_for)
$$;

-- A run of a list: without its payloads of more than 64 KiB; without p_room, without any.
create or replace function tidebase._run_listed (r tidebase.runs, p_room boolean) returns json language sql stable as $$
  select case when p_room and greatest(tidebase._bytes(r.input), tidebase._bytes(r.metadata), tidebase._bytes(r.result),
                                       tidebase._bytes(r.error), tidebase._bytes(r.waiting_for)) <= 65536
              then tidebase._run_json(r)
    else tidebase._mark_omitted(tidebase._run_shown(
           r, tidebase._in_list(r.input, p_room), tidebase._in_list(r.metadata, p_room),
           tidebase._in_list(r.result, p_room), tidebase._in_list(r.error, p_room),
           tidebase._in_list(r.waiting_for, p_room))) end
$$;

create or replace function tidebase._step_json (s tidebase.steps) returns json language sql stable as $$
  select json_build_object(
    'id', s.id, 'runId', s.run_id, 'name', s.name, 'inputHash', s.input_hash, 'input', s.input, 'options', s.options,
    'resumeContract', s.contract, 'status', s.status, 'output', s.output, 'error', s.error,
    'leaseOwner', s.lease_owner, 'leaseExpiresAt', tidebase._iso(s.lease_expires_at), 'attempt', s.attempt,
    'startedAt', tidebase._iso(s.started_at), 'completedAt', tidebase._iso(s.completed_at),
    'createdAt', tidebase._iso(s.created_at), 'updatedAt', tidebase._iso(s.updated_at))
$$;

-- Brief answers, for a client that needs no copy of what it sent.
create or replace function tidebase._brief_step (p_id text, p_name text, p_status text, p_attempt integer)
  returns json language sql stable as
$$ select json_build_object('id', p_id, 'name', p_name, 'status', p_status, 'attempt', p_attempt) $$;

create or replace function tidebase._brief_run (p_id text, p_status text) returns json language sql stable as
$$ select json_build_object('id', p_id, 'status', p_status) $$;

-- p_output: what was sent; where another output stands, the step is shown whole.
create or replace function tidebase._step_response (s tidebase.steps, p_brief boolean, p_output json)
  returns json language sql stable as $$
  select json_build_object('step', case when p_brief and s.output::text is not distinct from p_output::text
    then tidebase._brief_step(s.id, s.name, s.status, s.attempt) else tidebase._step_json(s) end)
$$;

create or replace function tidebase._event_json (e tidebase.events) returns json language sql stable as $$
  select json_build_object('id', e.id, 'runId', e.run_id, 'seq', e.seq, 'type', e.type, 'payload', e.payload,
                           'createdAt', tidebase._iso(e.created_at))
$$;

create or replace function tidebase._channel_json (c tidebase.channels) returns json language sql stable as $$
  select json_build_object('id', c.id, 'runId', c.run_id, 'type', c.type,
                           'config', json_build_object('url', tidebase._shown_url(c.url), 'secret', null),
                           'events', c.events, 'createdAt', tidebase._iso(c.created_at))
$$;

create or replace function tidebase._recovery_json (o tidebase.outbox) returns json language sql stable as $$
  select json_build_object(
    'id', o.id, 'runId', o.run_id, 'reason', o.reason, 'webhookUrl', tidebase._shown_url(o.url), 'status', o.status,
    'httpStatus', o.http_status, 'responseBody', o.response_body, 'errorText', o.error_text,
    'createdAt', tidebase._iso(o.created_at), 'completedAt', tidebase._iso(o.completed_at),
    'attempts', o.attempts, 'nextAttemptAt', tidebase._iso(o.next_attempt_at))
$$;

create or replace function tidebase._webhook_payload (o tidebase.outbox) returns json language sql stable as
$$ select p.payload from tidebase.outbox p where p.seq = coalesce(o.payload_seq, o.seq) $$;

-- Without p_tokens the payload is left out that may hold a gate's.
create or replace function tidebase._delivery_json (o tidebase.outbox, p_tokens boolean default true)
  returns json language sql stable as $$
  select json_build_object(
    'id', o.id, 'runId', o.run_id, 'channelId', o.channel_id, 'gateId', o.gate_id, 'eventType', o.event_type,
    'payload', case when p_tokens or o.gate_id is null then tidebase._webhook_payload(o) end, 'status', o.status,
    'httpStatus', o.http_status, 'responseBody', o.response_body,
    'errorText', o.error_text, 'createdAt', tidebase._iso(o.created_at), 'completedAt', tidebase._iso(o.completed_at),
    'attempts', o.attempts, 'nextAttemptAt', tidebase._iso(o.next_attempt_at))
$$;

-- The page on which a gate is decided: its token stands in the fragment, which reaches no server and no log.
create or replace function tidebase._review_url (g tidebase.gates) returns text language sql immutable as $$
  select case when g.status = 'pending' then
           left(g.resolve_url, -length(format('/runs/%s/gates/%s/resolve', g.run_id, g.id)))
           || format('/studio/review#%s/%s/%s', g.run_id, g.id, g.resolve_token) end
$$;

-- p_prompt, … are g's own, or as far as a list shows them.
create or replace function tidebase._gate_shown (g tidebase.gates, p_tokens boolean, p_prompt text, p_data json,
                                                 p_decision_payload json, p_capability json)
  returns json language sql stable as $$
  select json_build_object(
    'id', g.id, 'runId', g.run_id, 'name', g.name, 'prompt', p_prompt, 'data', p_data, 'status', g.status,
    'decision', nullif(g.status, 'pending'), 'actor', g.actor, 'decisionPayload', p_decision_payload,
    'capability', p_capability, 'channels', g.channels, 'resolveToken', case when p_tokens then g.resolve_token end,
    'reviewUrl', case when p_tokens then tidebase._review_url(g) end, 'expiresAt', tidebase._iso(g.expires_at),
    'createdAt', tidebase._iso(g.created_at), 'updatedAt', tidebase._iso(coalesce(g.resolved_at, g.created_at)),
    'resolvedAt', tidebase._iso(g.resolved_at))
$$;

create or replace function tidebase._gate_json (g tidebase.gates, p_tokens boolean default true)
  returns json language sql stable as
$$ select tidebase._gate_shown(g, p_tokens, g.prompt, g.data, g.decision_payload, g.capability) $$;

-- As events and webhooks show a gate. p_with_token: with the token that resolves it, while it is pending; for webhooks
-- alone, since events are handed on to browsers.
create or replace function tidebase._public_gate (g tidebase.gates, p_with_token boolean)
  returns json language sql stable as $$
  select json_build_object(
    'id', g.id, 'runId', g.run_id, 'name', g.name, 'prompt', g.prompt, 'data', g.data, 'status', g.status,
    'decision', nullif(g.status, 'pending'), 'actor', g.actor, 'capability', g.capability, 'expiresAt', tidebase._iso(g.expires_at),
    'resolveUrl', g.resolve_url,
    'resolveToken', case when p_with_token and g.status = 'pending' then g.resolve_token end)
$$;

create or replace function tidebase._state_json (s tidebase.states) returns json language sql stable as $$
  select json_build_object('runId', s.run_id, 'value', s.value, 'version', s.version,
                           'updatedAt', tidebase._iso(s.updated_at))
$$;

create or replace function tidebase._stream_json (s tidebase.state_streams) returns json language sql stable as $$
  select json_build_object(
    'id', s.id, 'runId', s.run_id, 'name', s.name, 'targetType', s.target_type, 'targetId', s.target_id,
    'currentVersion', s.current_version, 'metadata', '{}'::json, 'currentValue', (
      select v.value from tidebase.state_versions v where v.stream_id = s.id and v.version = s.current_version),
    'createdAt', tidebase._iso(s.created_at), 'updatedAt', tidebase._iso(s.updated_at))
$$;

create or replace function tidebase._version_shown (v tidebase.state_versions, p_value jsonb, p_patch jsonb,
                                                    p_metadata jsonb) returns json language sql stable as $$
  select json_build_object(
    'id', v.id, 'streamId', v.stream_id, 'runId', v.run_id, 'stepId', v.step_id, 'version', v.version,
    'value', p_value, 'patch', p_patch, 'label', v.label, 'reason', v.reason, 'importance', v.importance,
    'metadata', p_metadata, 'createdBy', v.created_by, 'createdAt', tidebase._iso(v.created_at))
$$;

create or replace function tidebase._version_json (v tidebase.state_versions) returns json language sql stable as
$$ select tidebase._version_shown(v, v.value, v.patch, v.metadata) $$;

create or replace function tidebase._version_light (v tidebase.state_versions, p_stream text)
  returns json language sql stable as $$
  select json_build_object(
    'id', v.id, 'streamId', v.stream_id, 'streamName', p_stream, 'runId', v.run_id, 'stepId', v.step_id,
    'version', v.version, 'label', v.label, 'reason', v.reason, 'importance', v.importance,
    'createdBy', v.created_by, 'createdAt', tidebase._iso(v.created_at),
    'bytes', octet_length(v.value::text), 'patchBytes', octet_length(v.patch::text))
$$;

-- As events show a version: what and why, not the value.
create or replace function tidebase._version_event (v tidebase.state_versions) returns json language sql stable as $$
  select json_build_object('id', v.id, 'streamId', v.stream_id, 'runId', v.run_id, 'version', v.version,
                           'label', v.label, 'reason', v.reason, 'importance', v.importance,
                           'createdAt', tidebase._iso(v.created_at))
$$;

create or replace function tidebase._usage_json (u tidebase.usage) returns json language sql stable as $$
  select json_build_object(
    'id', u.id, 'runId', u.run_id, 'stepId', u.step_id, 'kind', u.kind, 'provider', u.provider, 'model', u.model,
    'label', u.label, 'quantity', u.quantity, 'unit', u.unit, 'inputTokens', u.input_tokens,
    'outputTokens', u.output_tokens, 'totalTokens', u.total_tokens, 'costUsd', u.cost_usd, 'metadata', u.metadata,
    'createdAt', tidebase._iso(u.created_at))
$$;

create or replace function tidebase._edge_json (e tidebase.run_edges) returns json language sql stable as $$
  select json_build_object('id', e.id, 'parentRunId', e.parent_run_id, 'childRunId', e.child_run_id, 'name', e.name,
                           'edgeType', e.edge_type, 'metadata', e.metadata, 'createdAt', tidebase._iso(e.created_at))
$$;

create or replace function tidebase._signal_json (s tidebase.signals) returns json language sql stable as $$
  select json_build_object('id', s.id, 'runId', s.run_id, 'name', s.name, 'n', s.n, 'payload', s.payload,
                           'timedOut', s.timed_out, 'createdAt', tidebase._iso(s.created_at))
$$;

create or replace function tidebase._schedule_shown (s tidebase.schedules, p_input json)
  returns json language sql stable as $$
  select json_build_object(
    'name', s.name, 'cron', s.cron, 'timezone', s.timezone, 'workflowName', s.workflow_name, 'input', p_input,
    'queue', s.queue, 'maxAttempts', s.max_attempts, 'enabled', s.enabled, 'nextRunAt', tidebase._iso(s.next_run_at),
    'lastEnqueuedAt', tidebase._iso(s.last_enqueued_at), 'createdAt', tidebase._iso(s.created_at),
    'updatedAt', tidebase._iso(s.updated_at))
$$;

create or replace function tidebase._schedule_json (s tidebase.schedules) returns json language sql stable as
$$ select tidebase._schedule_shown(s, s.input) $$;

create or replace function tidebase._queue_json (q tidebase.queues) returns json language sql stable as $$
  select json_build_object('name', q.name, 'concurrency', q.concurrency, 'ratePerMinute', q.rate_per_minute,
                           'invokeUrl', tidebase._shown_url(q.invoke_url), 'paused', q.paused)
$$;

-- The completed steps of a run, for a worker that replays them. Past 4 MiB of output the answer is truncated: the worker
-- asks for the rest step by step.
create or replace function tidebase._checkpoints (p_run_id text, out checkpoints json, out truncated boolean)
  language plpgsql stable as $$
declare
  v_step  record;
  v_bytes bigint := 0;
  v_last  integer;  -- the position of the last that is answered
begin
  truncated := false;
  for v_step in select position, tidebase._text_bytes(output) as bytes from tidebase.steps
                 where run_id = p_run_id and status = 'completed' order by position
  loop  -- not a running sum over all of them: what does not fit is not read
    v_bytes := v_bytes + v_step.bytes;
    truncated := v_bytes > 4 * 1024 * 1024;
    exit when truncated;
    v_last := v_step.position;
  end loop;
  select coalesce(json_agg(done), '[]') into checkpoints  -- of rows: a json_build_object for each takes longer
    from (select name, input_hash as "inputHash", output, copied, tidebase._iso(completed_at) as "completedAt"
            from tidebase.steps where run_id = p_run_id and status = 'completed' and position <= v_last
           order by position) as done;
end $$;

-- The keys of two objects in one; as text, so that payloads stay as they came.
create or replace function tidebase._joined (p_first json, p_second json) returns json language plpgsql immutable as $$
begin
  return case when p_second::text = '{}' then p_first
              else (left(p_first::text, -1) || ', ' || substr(p_second::text, 2))::json end;
end $$;

-- JSON whose members can be read as text. A payload may contain \u0000, which Postgres' text cannot hold.
create or replace function tidebase._readable (p_value json) returns json language sql immutable as $$
  select case when strpos(p_value::text, '\u0000') > 0 then replace(p_value::text, '\u0000', '\ufffd')::json
              else p_value end
$$;

-- ------------------------------------------------------------------------------
-- Helpers: locks, refusals, checks, events, webhooks: the same for every verb.
-- ------------------------------------------------------------------------------

-- Ends the verb with nothing written. The answer has the words and {"code": …} with p_extras.
-- Postgres logs the extras. So they name a run, step, gate or state by its id alone ("run": ID; "state": the run's id),
-- and refusal_body puts the object in its place afterwards.
create or replace function tidebase._refuse (p_status integer, p_code text, p_words text, p_extras json default null)
  returns void language plpgsql as $$
begin
  raise exception using errcode = 'TB' || p_status, message = p_words,
    detail = case when p_extras is null then json_build_object('code', p_code)
                  else tidebase._joined(json_build_object('code', p_code), p_extras) end;
end $$;

-- The rest of a refusal's answer: its detail, with the objects that it names as they are now.
create or replace function tidebase.refusal_body (p_detail json) returns json language sql stable as $$
  select json_object_agg(m.key, case m.key
           when 'run' then (select tidebase._run_json(r) from tidebase.runs r where r.id = m.value #>> '{}')
           when 'step' then (select tidebase._step_json(s) from tidebase.steps s where s.id = m.value #>> '{}')
           when 'gate' then (select tidebase._gate_json(g) from tidebase.gates g where g.id = m.value #>> '{}')
           when 'state' then (select tidebase._state_json(s) from tidebase.states s where s.run_id = m.value #>> '{}')
           else m.value end)
    from json_each(p_detail) as m
$$;

-- Needs  the run (TB404 not_found). Whoever names an owner must hold it, see _check_owner.
create or replace function tidebase._lock_run (p_run_id text, p_lease_owner text default null)
  returns tidebase.runs language plpgsql as $$
declare
  v_run tidebase.runs;
begin
  select * into v_run from tidebase.runs where id = p_run_id for no key update;
  if not found then
    perform tidebase._refuse(404, 'not_found', format('run %s does not exist', p_run_id));
  end if;
  if p_lease_owner is not null then
    perform tidebase._check_owner(v_run, p_lease_owner);
  end if;
  return v_run;
end $$;

-- Locks a run that may end now. Its end may wake its parent, and a parent is locked before its child.
create or replace function tidebase._lock_to_end (p_run_id text) returns tidebase.runs language plpgsql as $$
begin
  perform from tidebase.runs where id = (select parent_run_id from tidebase.runs where id = p_run_id)
     for no key update;
  return tidebase._lock_run(p_run_id);
end $$;

-- The run, locked likewise, without waiting: null where it or its parent is locked by another.
create or replace function tidebase._try_lock_to_end (p_run_id text, p_parent_run_id text)
  returns tidebase.runs language plpgsql as $$
declare
  v_run tidebase.runs;
begin
  perform from tidebase.runs where id = p_parent_run_id for no key update skip locked;
  if found or p_parent_run_id is null then
    select * into v_run from tidebase.runs where id = p_run_id for no key update skip locked;
  end if;
  return v_run;
end $$;

-- Wakes the parent that waits for this run, which just ended, and for no other that is live. Needs _lock_to_end.
create or replace function tidebase._wake_parent (p_run tidebase.runs) returns void language plpgsql as $$
declare
  v_parent tidebase.runs;
begin
  if p_run.parent_run_id is not null then
    select * into v_parent from tidebase.runs
     where id = p_run.parent_run_id and status = 'waiting' and waiting_for ? 'children';
    if found and tidebase._is_wait_over(v_parent.id, v_parent.waiting_for, tidebase.now()) then
      perform tidebase._wake(v_parent);
    end if;
  end if;
end $$;

-- Needs the run locked: every writer of a step locks its run first.
create or replace function tidebase._step (p_run_id text, p_step_id text) returns tidebase.steps language plpgsql as $$
declare
  v_step tidebase.steps;
begin
  select * into v_step from tidebase.steps where id = p_step_id and run_id = p_run_id;
  if not found then
    perform tidebase._refuse(404, 'not_found', format('run %s has no step %s', p_run_id, p_step_id));
  end if;
  return v_step;
end $$;

-- Refuses what a run does not allow as it is (TB409): p_code is lease_lost, run_cancelled or run_completed.
create or replace function tidebase._refuse_run (p_run_id text, p_code text) returns void language plpgsql as $$
begin
  perform tidebase._refuse(409, p_code, format(case p_code when 'lease_lost' then 'the lease of run %s is not yours'
                                               when 'run_cancelled' then 'run %s is cancelled'
                                               else 'run %s is completed' end, p_run_id),
                           json_build_object('run', p_run_id));
end $$;

-- Refuses  an owner that lost or gave up the lease of the run (TB409 lease_lost): a worker whose lease went to another may
--          still be at work.
create or replace function tidebase._check_not_fenced_off (p_run tidebase.runs, p_lease_owner text)
  returns void language plpgsql as $$
begin
  if p_lease_owner = any (p_run.former_owners) and p_run.lease_owner is distinct from p_lease_owner then
    perform tidebase._refuse_run(p_run.id, 'lease_lost');
  end if;
end $$;

-- Refuses  an owner that does not hold the run (TB409 lease_lost, run_cancelled). Without an owner nothing is refused:
--          people, and apps that look after a run, name none.
create or replace function tidebase._check_owner (p_run tidebase.runs, p_lease_owner text)
  returns void language plpgsql as $$
begin
  if p_lease_owner is not null and p_run.lease_owner is distinct from p_lease_owner then
    if p_run.status = 'cancelled' then
      perform tidebase._refuse_run(p_run.id, 'run_cancelled');
    end if;
    perform tidebase._refuse_run(p_run.id, 'lease_lost');
  end if;
end $$;

-- Writes an event that an update of the run has counted.
create or replace function tidebase._append_event (p_run_id text, p_seq integer, p_type text, p_payload json)
  returns void language plpgsql as $$
begin
  insert into tidebase.events (run_id, seq, type, payload) values (p_run_id, p_seq, p_type, p_payload);
end $$;

-- Counts and writes an event of a run that is locked and does not change otherwise. Where p_lease_owner holds the run, its
-- lease is extended.
-- p_started: the payload of an event step.started that goes before it, for a step that is recorded at its end alone.
create or replace function tidebase._append_event_and_renew_lease (
  p_run_id text, p_lease_owner text, p_type text, p_payload json, p_started json default null)
  returns void language plpgsql as $$
declare
  v_now timestamptz := tidebase.now();
begin
  with counted as (
    update tidebase.runs set event_seq = event_seq + case when p_started is null then 1 else 2 end, updated_at = v_now,
           stalled = stalled and lease_owner is distinct from p_lease_owner,
           lease_expires_at = case when lease_owner = p_lease_owner then v_now + tidebase._ms(lease_ms)
                                   else lease_expires_at end
     where id = p_run_id returning event_seq
  )
  insert into tidebase.events (run_id, seq, type, payload, created_at)
  select p_run_id, e.seq, e.type, e.payload, v_now
    from counted, lateral (values (event_seq - 1, 'step.started', p_started), (event_seq, p_type, p_payload))
                          as e (seq, type, payload)
   where e.payload is not null;
end $$;

-- Puts a webhook into the outbox. Needs the run locked, so that a channel's rows stand in the order of its events.
-- p_payload_seq: the row that has the payload already.
create or replace function tidebase._enqueue_webhook (p_kind text, p_run_id text, p_channel_id text, p_gate_id text,
                                                      p_type text, p_reason text, p_url text, p_payload json,
                                                      p_payload_seq bigint default null)
  returns tidebase.outbox language sql as $$
  insert into tidebase.outbox (id, kind, run_id, channel_id, gate_id, event_type, reason, url, host, payload,
                               payload_seq, next_attempt_at)
  values (tidebase._new_id(case p_kind when 'channel' then 'del' else 'rec' end), p_kind, p_run_id, p_channel_id,
          p_gate_id, p_type, p_reason, p_url, tidebase._host(p_url), p_payload, p_payload_seq,
          case when not exists (select from tidebase.outbox o
                                 where o.channel_id = p_channel_id and o.status = 'pending') then tidebase.now() end)
  returning *
$$;

-- Puts an event into the outbox for each channel of the run, and of the gate p_gate_id, that subscribes to its type.
create or replace function tidebase._notify (p_run tidebase.runs, p_type text, p_payload json,
                                             p_gate_id text default null) returns void language plpgsql as $$
declare
  v_channel tidebase.channels;
  v_seq     bigint;  -- of the first webhook, which has the payload for all of them
  v_first   bigint;
begin
  if p_run.has_channels then
    for v_channel in
      select * from tidebase.channels c
       where c.run_id = p_run.id and (c.gate_id is null or c.gate_id = p_gate_id)
         and (c.events = '[]' or c.events ? p_type)
    loop
      select seq into v_seq from tidebase._enqueue_webhook(
        'channel', p_run.id, v_channel.id, p_gate_id, p_type, null, v_channel.url,
        case when v_first is null then p_payload end, v_first);
      v_first := coalesce(v_first, v_seq);
    end loop;
  end if;
end $$;

-- Channels ([{type, url, secret?, events?}]) as they are shown: without their secrets.
create or replace function tidebase._shown_channels (p_channels jsonb) returns json language sql stable as $$
  select coalesce(json_agg(json_build_object('type', c->>'type', 'url', tidebase._shown_url(c->>'url'),
                                             'events', coalesce(c->'events', '[]')) order by n), '[]')
    from jsonb_array_elements(p_channels) with ordinality as given (c, n)
$$;

-- Adds channels, as above, to a run or to a gate of it.
create or replace function tidebase._add_channels (p_run_id text, p_gate_id text, p_channels jsonb)
  returns void language plpgsql as $$
begin
  insert into tidebase.channels (id, run_id, gate_id, type, url, secret, events)
  select tidebase._new_id('chan'), p_run_id, p_gate_id, c->>'type', c->>'url', c->>'secret', coalesce(c->'events', '[]')
    from jsonb_array_elements(p_channels) with ordinality as given (c, n) order by n;
end $$;

-- Asks the app, through the run's recovery webhook, to resume it.
create or replace function tidebase._start_recovery (p_run tidebase.runs, p_reason text)
  returns tidebase.outbox language plpgsql as $$
declare
  v_webhook tidebase.outbox := tidebase._enqueue_webhook('recovery', p_run.id, null, null, 'run.resume', p_reason,
                                                         p_run.recovery_webhook, null);
begin
  perform tidebase._append_event_and_renew_lease(p_run.id, null, 'recovery.started', json_build_object(
            'recoveryAttemptId', v_webhook.id, 'reason', p_reason));
  return v_webhook;
end $$;

create or replace function tidebase._tally (p_queue text, p_status text, p_runs integer)
  returns void language plpgsql as $$
begin
  insert into tidebase.queue_tallies select p_queue, p_status, p_runs where p_queue is not null;
end $$;

-- Moves a run, which must be locked, to another status. All runs go through here, but for those that claim_runs and
-- _write_plain move many at a time.
-- p_run: the row with the columns set that are particular to this transition; its status is the one before. What the new
-- status demands of the other columns stands here and nowhere else.
-- Leaves   p_event with p_payload. A run that ends is tallied, its channels get a webhook, and its parent goes on where
--          it waits for this run alone (needs _lock_to_end).
create or replace function tidebase._transition (p_run tidebase.runs, p_status text, p_event text, p_payload json)
  returns tidebase.runs language plpgsql as $$
declare
  v_now   timestamptz := tidebase.now();
  v_ended constant boolean := p_status in ('completed', 'failed', 'cancelled');
  v_run   tidebase.runs;
begin
  update tidebase.runs
     set status = p_status, attempt = p_run.attempt, failed_attempt = p_run.failed_attempt, run_at = p_run.run_at,
         lease_owner = case p_status when 'running' then p_run.lease_owner end, lease_ms = p_run.lease_ms,
         lease_expires_at = case p_status when 'running' then v_now + tidebase._ms(p_run.lease_ms) end,
         fence = p_run.fence, former_owners = p_run.former_owners, settled_by = p_run.settled_by,
         claim_id = p_run.claim_id, stalled = false, offered_at = null, deadline_at = p_run.deadline_at,
         waiting_for = case p_status when 'waiting' then p_run.waiting_for end,
         wake_at = case p_status when 'waiting' then p_run.wake_at end,
         result = case p_status when 'completed' then p_run.result end,
         error = case when p_status <> 'completed' then p_run.error end,
         failure_class = case when p_status in ('failed', 'cancelled') then p_run.failure_class end,
         cancel_reason = case p_status when 'cancelled' then p_run.cancel_reason end,
         cancel_actor = case p_status when 'cancelled' then p_run.cancel_actor end,
         cancelled_at = case p_status when 'cancelled' then v_now end,
         completed_at = case when v_ended then v_now end, updated_at = v_now, event_seq = event_seq + 1
   where id = p_run.id returning * into v_run;
  perform tidebase._append_event(v_run.id, v_run.event_seq, p_event, p_payload);
  if p_run.status in ('completed', 'failed', 'cancelled') then
    perform tidebase._tally(v_run.queue, p_run.status, -1);
  end if;
  if v_ended then
    perform tidebase._tally(v_run.queue, p_status, 1);
    if v_run.has_channels then
      perform tidebase._notify(v_run, p_event, case p_status
                when 'failed' then json_build_object('run', tidebase._run_json(v_run), 'error', v_run.error)
                else json_build_object('run', tidebase._run_json(v_run)) end);
    end if;
    perform tidebase._wake_parent(v_run);
  end if;
  return v_run;
end $$;

-- Moves a run that had ended to a status in which it lives again, likewise.
-- Needs    its dedupe key free (TB409 dedupe_conflict).
create or replace function tidebase._revive (p_run tidebase.runs, p_status text, p_event text, p_payload json)
  returns tidebase.runs language plpgsql as $$
begin
  return tidebase._transition(p_run, p_status, p_event, p_payload);
exception when unique_violation then
  perform tidebase._refuse(409, 'dedupe_conflict', format('another live run has the dedupe key of run %s', p_run.id));
end $$;

-- ------------------------------------------------------------------------------
-- Runs: created, begun, kept alive, ended, put back.
-- ------------------------------------------------------------------------------

-- Inserts runs, their channels and first events. This is the only insert into runs.
-- p_jobs: [{workflow_name, metadata, channels, id?, queue?, recovery_webhook?, recovery_secret?, dedupe_key?, delay_ms?,
-- run_at?, max_attempts?, priority?, deadline_ms?, parent_run_id?, created?}]; p_inputs: their inputs, in the same order.
-- created: keys to add to the event run.created; a job without it gets no such event. A job with a queue has
-- max_attempts and priority. p_queue: of jobs that name none.
-- Leaves   runs with a queue queued, event run.enqueued; others pending. A job whose id or dedupe key is taken by another
--          run, or by an earlier job, is left out.
-- Returns  the number of each job that was inserted, and its run; in no particular order.
create or replace function tidebase._insert_runs (p_jobs jsonb, p_inputs json[], p_queue text default null)
  returns table (n bigint, run tidebase.runs) language plpgsql as $$
declare
  v_now timestamptz := tidebase.now();
  v_new record;
begin
  for v_new in
    with given as (
      select *, coalesce(j.id, tidebase._new_id('run')) as run_id, coalesce(j.queue, p_queue) as on_queue
        from rows from (
               jsonb_to_recordset(p_jobs) as (
                 id text, workflow_name text, metadata jsonb, channels jsonb, queue text, recovery_webhook text,
                 recovery_secret text, dedupe_key text, delay_ms bigint, run_at timestamptz, max_attempts integer,
                 priority integer, deadline_ms bigint, parent_run_id text, created json),
               unnest(p_inputs)) with ordinality
             as j (id, workflow_name, metadata, channels, queue, recovery_webhook, recovery_secret, dedupe_key, delay_ms,
                   run_at, max_attempts, priority, deadline_ms, parent_run_id, created, input, number)
    ), inserted as (
      insert into tidebase.runs as r (id, workflow_name, input, metadata, status, recovery_webhook, recovery_secret,
                                      queue, dedupe_key, priority, run_at, max_attempts, deadline_at, parent_run_id,
                                      has_channels, event_seq, created_at, updated_at)
      select run_id, workflow_name, input, metadata, case when on_queue is null then 'pending' else 'queued' end,
             recovery_webhook, recovery_secret, on_queue, dedupe_key,
             case when on_queue is not null then priority else 0 end,
             case when on_queue is not null then coalesce(run_at, v_now + tidebase._ms(delay_ms), v_now) end,
             case when on_queue is not null then max_attempts else 1 end, v_now + tidebase._ms(deadline_ms),
             parent_run_id, channels <> '[]', (created is not null)::integer + (on_queue is not null)::integer, v_now, v_now
        from given
      on conflict do nothing
      returning r as run
    ), with_events as (
      insert into tidebase.events (run_id, seq, type, payload, created_at)
      select (i.run).id, (i.run).event_seq, 'run.enqueued', json_build_object(
               'queue', (i.run).queue, 'runAt', tidebase._iso((i.run).run_at)), v_now
        from inserted i where (i.run).queue is not null
    )
    select g.number, g.channels, g.created, i.run
      from inserted i join given g on g.run_id = (i.run).id order by g.run_id, g.number
  loop
    continue when (v_new.run).id = run.id;  -- an earlier job has its id
    n := v_new.number;
    run := v_new.run;
    if run.has_channels then
      perform tidebase._add_channels(run.id, null, v_new.channels);
    end if;
    if v_new.created is not null then
      perform tidebase._append_event(run.id, 1, 'run.created', tidebase._joined(json_build_object(
                'workflowName', run.workflow_name, 'input', run.input,
                'channels', tidebase._shown_channels(v_new.channels)), v_new.created));
    end if;
    return next;
  end loop;
end $$;

-- One run, as above.    Answers  null when its id or dedupe key is taken.
create or replace function tidebase._insert_run (p_job jsonb, p_input json, p_queue text default null)
  returns tidebase.runs language plpgsql as $$
begin
  return (select i.run from tidebase._insert_runs(jsonb_build_array(p_job), array[p_input], p_queue) i);
end $$;

-- Creates a run. The same p_id again answers the run that is there, created false.
-- Needs    p_id not used by another workflow, else TB409 run_id_conflict.
-- Leaves   the run pending, its channels, event run.created.    Returns  {"run", "created"}.
create or replace function tidebase.create_run (p_id text, p_workflow_name text, p_input json, p_metadata jsonb,
                                                p_recovery_webhook text, p_channels jsonb, p_deadline_ms bigint,
                                                p_recovery_secret text default null)
  returns json language plpgsql as $$
declare
  v_run tidebase.runs := tidebase._insert_run(jsonb_build_object(
    'id', p_id, 'workflow_name', p_workflow_name, 'metadata', p_metadata, 'recovery_webhook', p_recovery_webhook,
    'recovery_secret', p_recovery_secret, 'channels', p_channels, 'deadline_ms', p_deadline_ms, 'created', '{}'::json),
    p_input);
  v_new boolean := v_run.id is not null;
begin
  if not v_new then
    v_run := tidebase._same_run(p_id, p_workflow_name);
  end if;
  return json_build_object('run', tidebase._run_json(v_run), 'created', v_new);
end $$;

-- The run that a client's id already names; TB409 run_id_conflict when it is of another workflow.
create or replace function tidebase._same_run (p_id text, p_workflow_name text)
  returns tidebase.runs language plpgsql as $$
declare
  v_run tidebase.runs;
begin
  select * into v_run from tidebase.runs where id = p_id;  -- not locked: batches may name runs in any order
  if v_run.workflow_name <> p_workflow_name then
    perform tidebase._refuse(409, 'run_id_conflict', format('run %s is of workflow %s', p_id, v_run.workflow_name));
  end if;
  return v_run;
end $$;

-- Takes the lease of a run and begins, or resumes, it.
-- Needs    no live lease of another owner (TB409 run_leased, with leaseOwner); not cancelled (TB409 run_cancelled).
-- Leaves   the run running, attempt + 1, event run.started; a repeat by the holder only extends the lease; a
--          completed run is answered as it is, without a lease.
-- Returns  {"run", "leaseOwner"}, with p_checkpoints also "checkpoints" and "checkpointsTruncated".
create or replace function tidebase.begin_run (p_run_id text, p_lease_owner text, p_lease_ms integer,
                                               p_checkpoints boolean) returns json language plpgsql as $$
declare
  v_run   tidebase.runs := tidebase._lock_run(p_run_id);
  v_now   timestamptz := tidebase.now();
  v_event json;
begin
  if v_run.status = 'cancelled' then
    perform tidebase._refuse_run(v_run.id, 'run_cancelled');
  elsif v_run.status = 'completed' then
    return json_build_object('run', tidebase._run_json(v_run), 'leaseOwner', null);
  elsif v_run.status = 'running' and v_run.lease_expires_at > v_now and v_run.lease_owner <> p_lease_owner then
    perform tidebase._refuse(409, 'run_leased', format('run %s is leased by another worker', p_run_id),
                             json_build_object('leaseOwner', v_run.lease_owner));
  elsif v_run.status = 'running' and v_run.lease_expires_at > v_now then
    update tidebase.runs set lease_expires_at = v_now + tidebase._ms(lease_ms), updated_at = v_now
     where id = p_run_id returning * into v_run;
  else
    v_run.former_owners := array_remove(array_remove(
      v_run.former_owners || v_run.lease_owner || v_run.settled_by, p_lease_owner), null);
    v_run.lease_owner := p_lease_owner;
    v_run.lease_ms := p_lease_ms;
    v_run.fence := v_run.fence + 1;
    v_run.claim_id := null;
    v_run.attempt := v_run.attempt + 1;
    v_run.error := null;
    v_event := json_build_object('leaseOwner', p_lease_owner, 'attempt', v_run.attempt);
    if v_run.status = 'failed' then
      v_run := tidebase._revive(v_run, 'running', 'run.started', v_event);
    else
      v_run := tidebase._transition(v_run, 'running', 'run.started', v_event);
    end if;
  end if;
  if not p_checkpoints then
    return json_build_object('run', tidebase._run_json(v_run), 'leaseOwner', p_lease_owner);
  end if;
  return (select json_build_object('run', tidebase._run_json(v_run), 'leaseOwner', p_lease_owner,
                                   'checkpoints', c.checkpoints, 'checkpointsTruncated', c.truncated)
            from tidebase._checkpoints(p_run_id) c);
end $$;

-- Extends the leases of runs that their owners hold: no event, no attempt. One statement, so that a worker that holds
-- hundreds pays for one.
-- Returns  in the order given, {"run"} or {"error", "code", "run"?}, and its HTTP status. The run is shown whole, or, if
--          p_brief, by its status and lease alone.
create or replace function tidebase.heartbeat_runs (p_run_ids text[], p_lease_owners text[],
                                                    p_brief boolean default true)
  returns table (body json, status integer) language plpgsql
  set plan_cache_mode = force_generic_plan  -- both as claim_runs
  set enable_seqscan = off as $$
declare
  v_now timestamptz := tidebase.now();
begin
  perform from tidebase.runs where id = any (p_run_ids) order by id for no key update;
  update tidebase.runs r
     set lease_expires_at = v_now + tidebase._ms(lease_ms), stalled = false, updated_at = v_now
    from unnest(p_run_ids, p_lease_owners) as beat (run_id, owner)
   where r.id = beat.run_id and r.lease_owner = beat.owner and r.status = 'running';
  return query
    select case when r.id is null then
                  json_build_object('error', format('run %s does not exist', beat.run_id), 'code', 'not_found')
                when r.status = 'cancelled' then
                  json_build_object('error', format('run %s is cancelled', r.id), 'code', 'run_cancelled', 'run', shown)
                when r.lease_owner is distinct from beat.owner then
                  json_build_object('error', format('the lease of run %s is not yours', r.id), 'code', 'lease_lost',
                                    'run', shown)
                else json_build_object('run', shown) end,
           case when r.id is null then 404
                when r.status = 'cancelled' or r.lease_owner is distinct from beat.owner then 409 else 200 end
      from unnest(p_run_ids, p_lease_owners) with ordinality as beat (run_id, owner, n)
      left join tidebase.runs r on r.id = beat.run_id
     cross join lateral (
           select case when not p_brief then tidebase._run_json(r) else json_build_object(
                    'id', r.id, 'status', r.status, 'leaseOwner', r.lease_owner, 'leaseExpiresAt',
                    tidebase._iso(r.lease_expires_at), 'updatedAt', tidebase._iso(r.updated_at)) end as shown
           offset 0) as s
     order by n;
end $$;

-- Whether an outcome that p_lease_owner reports changes nothing: the run is cancelled, or ended by a report of the same
-- owner or, where none is given, of anybody.
create or replace function tidebase._is_settled (p_run tidebase.runs, p_lease_owner text)
  returns boolean language sql immutable as $$
  select p_run.status = 'cancelled' or (p_run.status in ('completed', 'failed')
                                        and coalesce(p_lease_owner = p_run.settled_by, p_lease_owner is null))
$$;

-- Completes a run.
-- Needs    p_lease_owner, when given, holds it (TB409 lease_lost).
-- Leaves   it completed, event and channels run.completed; a run that is settled unchanged.
-- Returns  {"run"}; with p_brief its id and status alone.
create or replace function tidebase.complete_run (p_run_id text, p_lease_owner text, p_result json,
                                                  p_brief boolean default false)
  returns json language plpgsql as $$
declare
  v_run tidebase.runs := tidebase._lock_to_end(p_run_id);
begin
  if not tidebase._is_settled(v_run, p_lease_owner) then
    perform tidebase._check_owner(v_run, p_lease_owner);
    v_run.settled_by := v_run.lease_owner;
    v_run.result := p_result;
    v_run := tidebase._transition(v_run, 'completed', 'run.completed', json_build_object('result', p_result));
  end if;
  return json_build_object('run', case when p_brief then tidebase._brief_run(v_run.id, v_run.status)
                                       else tidebase._run_json(v_run) end);
end $$;

-- An event's payload with its reason, when there is one.
create or replace function tidebase._with_reason (p_event json, p_reason text)
  returns json language sql immutable as $$
  select case when p_reason is null then p_event
              else tidebase._joined(p_event, json_build_object('reason', p_reason)) end
$$;

-- Ends an attempt at a run, which must be locked (_lock_to_end). p_by: who reported its failure. p_reason: lease_expired
-- where nobody did, then the event says so.
-- Leaves   a queue run that is p_retryable and has attempts left queued, due at p_run_at, event run.requeued; another
--          failed, event and channels run.failed, and its recovery webhook in the outbox. The class of the failure is
--          p_failure_class; or manual_review where a step waits for one; or max_retries where no attempt is left.
create or replace function tidebase._fail_attempt (p_run tidebase.runs, p_error json, p_retryable boolean,
                                                   p_run_at timestamptz, p_failure_class text, p_by text, p_reason text)
  returns tidebase.runs language plpgsql as $$
begin
  insert into tidebase.queue_minutes  -- for the chart of the last hour
  select p_run.queue, date_trunc('minute', tidebase.now()), 0, 1 where p_run.queue is not null;
  p_run.error := p_error;
  p_run.settled_by := p_by;
  p_run.failed_attempt := p_run.attempt;
  if p_run.queue is not null and p_run.attempt < p_run.max_attempts and p_retryable then
    p_run.run_at := p_run_at;
    return tidebase._transition(p_run, 'queued', 'run.requeued', tidebase._with_reason(json_build_object(
             'error', p_error, 'attempt', p_run.attempt, 'maxAttempts', p_run.max_attempts,
             'nextRunAt', tidebase._iso(p_run_at)), p_reason));
  end if;
  p_run.failure_class := coalesce(p_failure_class, case
    when exists (select from tidebase.steps where run_id = p_run.id and status = 'manual_review') then 'manual_review'
    when p_retryable and (p_run.max_attempts > 1 or p_reason is not null) then 'max_retries' end);
  p_run := tidebase._transition(p_run, 'failed', 'run.failed', tidebase._with_reason(json_build_object(
             'error', p_error, 'failureClass', p_run.failure_class), p_reason));
  if p_run.recovery_webhook is not null then
    perform tidebase._start_recovery(p_run, 'run_failed');
  end if;
  return p_run;
end $$;

-- Reports that an attempt at a run failed.
-- Needs    p_lease_owner, when given, holds it (TB409 lease_lost).
-- Leaves   see _fail_attempt; queued again, the run is due after 5 s · 2^(attempt-1), at most 5 min. A run that already
--          ended, and a repeat, are answered unchanged.    Returns  {"run", "requeued"}.
create or replace function tidebase.fail_run (p_run_id text, p_lease_owner text, p_error json, p_failure_class text,
                                              p_retryable boolean)
  returns json language plpgsql as $$
declare
  v_run   tidebase.runs := tidebase._lock_to_end(p_run_id);
  v_pause interval := least(interval '5 seconds' * 2 ^ least(greatest(v_run.attempt - 1, 0), 6), interval '5 minutes');
begin
  if not tidebase._is_settled(v_run, p_lease_owner)
     and not (v_run.status = 'queued' and v_run.failed_attempt = v_run.attempt
              and coalesce(p_lease_owner = v_run.settled_by, p_lease_owner is null)) then
    perform tidebase._check_owner(v_run, p_lease_owner);
    v_run := tidebase._fail_attempt(v_run, p_error, p_retryable, tidebase.now() + v_pause, p_failure_class,
                                    v_run.lease_owner, null);
  end if;
  return json_build_object('run', tidebase._run_json(v_run), 'requeued', v_run.status = 'queued');
end $$;

-- Cancels a run.   Needs  it locked (_lock_to_end), not completed.   Leaves  event and channels run.cancelled.
create or replace function tidebase._cancel_one (p_run tidebase.runs, p_reason text, p_actor text)
  returns tidebase.runs language plpgsql as $$
begin
  p_run.cancel_reason := p_reason;
  p_run.cancel_actor := p_actor;
  p_run.settled_by := coalesce(p_run.lease_owner, p_run.settled_by);
  return tidebase._transition(p_run, 'cancelled', 'run.cancelled', json_build_object('reason', p_reason,
                                                                                     'actor', p_actor));
end $$;

-- Cancels a run, as above, and its live children and theirs: a generation after the other, since there may be more of
-- them than functions can call each other.
create or replace function tidebase._cancel (p_run tidebase.runs, p_reason text, p_actor text)
  returns tidebase.runs language plpgsql as $$
declare
  v_run     tidebase.runs := tidebase._cancel_one(p_run, p_reason, p_actor);
  v_parents text[] := array[p_run.id];
  v_ids     text[];
  v_child   tidebase.runs;
begin
  while cardinality(v_parents) > 0 loop
    v_ids := '{}';
    -- Locked as they are looked at: a child that completes meanwhile is left out, and refuses nothing.
    for v_child in select c.* from tidebase.run_edges e join tidebase.runs c on c.id = e.child_run_id
                    where e.parent_run_id = any (v_parents)
                      and c.status in ('pending', 'queued', 'running', 'waiting')
                    order by c.id for no key update of c
    loop
      perform tidebase._cancel_one(v_child, p_reason, p_actor);
      v_ids := v_ids || v_child.id;
    end loop;
    v_parents := v_ids;
  end loop;
  return v_run;
end $$;

-- Cancels a run at once, whoever holds it.
-- Needs    not completed (TB409 run_completed, with run).
-- Leaves   it cancelled, event and channels run.cancelled, and its live children likewise; cancelled before, the first
--          reason stands.    Returns  {"run"}.
create or replace function tidebase.cancel_run (p_run_id text, p_reason text, p_actor text)
  returns json language plpgsql as $$
declare
  v_run tidebase.runs := tidebase._lock_to_end(p_run_id);
begin
  if v_run.status = 'completed' then
    perform tidebase._refuse_run(v_run.id, 'run_completed');
  elsif v_run.status <> 'cancelled' then
    v_run := tidebase._cancel(v_run, p_reason, p_actor);
  end if;
  return json_build_object('run', tidebase._run_json(v_run));
end $$;

-- Gives a run up, for another worker to take: its owner shuts down.
-- Needs    p_lease_owner holds it (TB409 lease_lost, run_cancelled).
-- Leaves   it queued, or pending without a queue, no attempt spent, event run.released.    Returns  {"run"}.
create or replace function tidebase.release_run (p_run_id text, p_lease_owner text)
  returns json language plpgsql as $$
declare
  v_run tidebase.runs := tidebase._lock_run(p_run_id);
begin
  if v_run.status = 'cancelled' then
    perform tidebase._refuse_run(v_run.id, 'run_cancelled');
  elsif v_run.lease_owner = p_lease_owner then
    v_run.run_at := least(v_run.run_at, tidebase.now());
    v_run.attempt := v_run.attempt - 1;
    v_run.settled_by := p_lease_owner;
    v_run := tidebase._transition(v_run, case when v_run.queue is null then 'pending' else 'queued' end, 'run.released',
                                  json_build_object('leaseOwner', p_lease_owner));
  elsif v_run.lease_owner is not null or v_run.settled_by is distinct from p_lease_owner then
    perform tidebase._refuse_run(v_run.id, 'lease_lost');
  end if;
  return json_build_object('run', tidebase._run_json(v_run));
end $$;

-- Puts a failed or cancelled run, which must be locked, back: with its checkpoints and all its attempts.
-- Needs    its dedupe key free (TB409 dedupe_conflict).
-- Leaves   it queued, or pending without a queue, event run.retried.
create or replace function tidebase._put_back (p_run tidebase.runs) returns tidebase.runs language plpgsql as $$
declare
  v_now timestamptz := tidebase.now();
begin
  p_run.run_at := v_now;
  p_run.attempt := 0;
  p_run.failed_attempt := null;
  p_run.former_owners := array_remove(p_run.former_owners || p_run.settled_by, null);
  p_run.settled_by := null;
  p_run.error := null;
  p_run.deadline_at := case when p_run.deadline_at > v_now then p_run.deadline_at end;
  return tidebase._revive(p_run, case when p_run.queue is null then 'pending' else 'queued' end, 'run.retried', '{}');
end $$;

-- Retries a failed or cancelled run, see _put_back.
-- Needs    not completed (TB409 run_completed).    Leaves  a live run unchanged.    Returns  {"run"}.
create or replace function tidebase.retry_run (p_run_id text) returns json language plpgsql as $$
declare
  v_run tidebase.runs := tidebase._lock_run(p_run_id);
begin
  if v_run.status = 'completed' then
    perform tidebase._refuse_run(v_run.id, 'run_completed');
  elsif v_run.status in ('failed', 'cancelled') then
    v_run := tidebase._put_back(v_run);
  end if;
  return json_build_object('run', tidebase._run_json(v_run));
end $$;

-- Puts the recovery webhook into the outbox, due now.
-- Needs    the run has one (TB422 no_recovery_webhook).    Leaves  one pending attempt of that reason: a repeat before
--          it is sent adds none.    Returns  {"recoveryAttempt"}.
create or replace function tidebase.recover_run (p_run_id text, p_reason text) returns json language plpgsql as $$
declare
  v_run tidebase.runs := tidebase._lock_run(p_run_id);
begin
  if v_run.recovery_webhook is null then
    perform tidebase._refuse(422, 'no_recovery_webhook', format('run %s has no recoveryWebhook', p_run_id));
  end if;
  return json_build_object('recoveryAttempt', tidebase._recovery_json(tidebase._recover(v_run, p_reason)));
end $$;

-- The recovery webhook of this reason that has not been tried yet, else a new one. Needs the run locked.
create or replace function tidebase._recover (p_run tidebase.runs, p_reason text)
  returns tidebase.outbox language plpgsql as $$
declare
  v_webhook tidebase.outbox;
begin
  select * into v_webhook from tidebase.outbox
   where run_id = p_run.id and kind = 'recovery' and reason = p_reason and status = 'pending' and attempts = 0
   order by seq limit 1;
  if not found then
    v_webhook := tidebase._start_recovery(p_run, p_reason);
  end if;
  return v_webhook;
end $$;

-- ------------------------------------------------------------------------------
-- Steps: begun under a lease, ended once; what was completed is returned, never executed again.
-- ------------------------------------------------------------------------------

-- A list of what may stand without its list; null and empty ones are dropped.
create or replace function tidebase._as_list (p_value json) returns json language plpgsql immutable as $$
begin
  if json_typeof(p_value) = 'array' then
    return (select coalesce(json_agg(item), '[]') from json_array_elements(p_value) as item
             where item::text not in ('null', '""'));
  elsif p_value is null or p_value::text in ('null', '""') then
    return '[]';
  end if;
  return json_build_array(p_value);
end $$;

-- What a step changes outside, in either spelling.
create or replace function tidebase._effects (p_options json) returns json language sql immutable as $$
  select tidebase._as_list(case when p_options->>'sideEffects' is not null then p_options->'sideEffects'
                               when p_options->>'sideEffect' <> 'none' then p_options->'sideEffect' end)
$$;

-- Whether effects are none: what only reads may be done again.
create or replace function tidebase._is_harmless (p_effects json) returns boolean language sql stable as
$$ select p_effects::jsonb <@ '["read"]' $$;

-- What a client promised of a step, from its options, in today's words or the older sideEffect and
-- onAmbiguousFailure: how safe it is to run it again. An option that is null counts as absent.
create or replace function tidebase._contract (p_options json) returns json language sql stable as $$
  select json_build_object(
    'sideEffects', tidebase._effects(p_options), 'idempotencyKey', p_options->>'idempotencyKey',
    'replay', coalesce(p_options->>'replay', case p_options->>'onAmbiguousFailure'
                       when 'retry' then 'auto' when 'review' then 'manual' when 'fail' then 'never' end,
                       case when p_options->>'idempotencyKey' is not null
                                 or tidebase._is_harmless(tidebase._effects(p_options)) then 'auto' else 'manual' end),
    'checkpointInvariant', p_options->'checkpointInvariant', 'verifiedBy', p_options->'verifiedBy',
    'credentials', tidebase._as_list(p_options->'credentials'))
$$;

-- Whether p_lease_owner may not begin a step. While a run is held, only its holder begins its steps. A step that was begun
-- while nobody held the run belongs to its owner until its own lease ends. But the holder of the run may begin a step that
-- was begun before it took the run over, since that owner has lost it.
create or replace function tidebase._is_locked (p_run tidebase.runs, p_step tidebase.steps, p_lease_owner text,
                                                p_now timestamptz) returns boolean language sql immutable as $$
  select coalesce(p_run.lease_owner <> p_lease_owner and p_run.lease_expires_at > p_now, false)
      or coalesce(p_step.status = 'running' and p_step.lease_owner is distinct from p_lease_owner
                  and p_step.lease_expires_at > p_now
                  and not (coalesce(p_run.lease_owner = p_lease_owner, false) and p_step.fence < p_run.fence), false)
$$;

-- Whether only a person can tell if a step may run (again). So it is when an earlier owner began the step and recorded no
-- outcome, and its contract leaves a replay to a person; when it is marked for review; and when it failed and must never
-- run again.
-- p_options: of the try that is to come. A step whose failure was recorded and that was marked for review may run again
-- once it comes with an idempotency key.
create or replace function tidebase._is_ambiguous (p_run tidebase.runs, p_step tidebase.steps, p_lease_owner text,
                                                   p_options json) returns boolean language sql immutable as $$
  select (p_step.status = 'manual_review'
          and not (p_step.completed_at is not null and p_options->>'idempotencyKey' is not null))
      or (p_step.status = 'running' and p_step.contract->>'replay' in ('manual', 'never')
          and (p_step.lease_owner is distinct from p_lease_owner or p_step.fence <> p_run.fence))
      or (p_step.status = 'failed' and p_step.contract->>'replay' = 'never')
$$;

-- A run as it would be if a new owner, named '', took it.
create or replace function tidebase._as_taken_over (p_run tidebase.runs, p_now timestamptz)
  returns tidebase.runs language plpgsql immutable as $$
begin
  p_run.fence := p_run.fence + 1;
  p_run.lease_owner := '';
  p_run.lease_expires_at := p_now + interval '1 minute';
  return p_run;
end $$;

-- Whether a step needs a review: it is marked so, or nobody holds the run and whoever took it would mark the step.
create or replace function tidebase._needs_review (p_run tidebase.runs, p_step tidebase.steps, p_now timestamptz)
  returns boolean language sql stable as $$
  select p_step.status = 'manual_review'
      or (coalesce(p_run.lease_expires_at <= p_now, true)
          and (p_run.status in ('failed', 'cancelled') or not tidebase._is_locked(p_run, p_step, '', p_now))
          and tidebase._is_ambiguous(tidebase._as_taken_over(p_run, p_now), p_step, '', p_step.options))
$$;

-- Ends a step, or marks it for review: from now on nobody holds it. p_step: the row with its output, its error, settled_by
-- and reviewed as they are to be. Needs its run locked.
-- p_ends: a try ends now; else completed_at is as p_step has it.
create or replace function tidebase._end_step (p_step tidebase.steps, p_status text, p_ends boolean default true)
  returns tidebase.steps language plpgsql as $$
declare
  v_now timestamptz := tidebase.now();
begin
  update tidebase.steps
     set status = p_status, output = p_step.output, error = p_step.error, settled_by = p_step.settled_by,
         reviewed = p_step.reviewed, lease_owner = null, lease_expires_at = null,
         review_at = case p_status when 'manual_review' then v_now end,
         completed_at = case when p_ends then v_now else p_step.completed_at end, updated_at = v_now
   where id = p_step.id returning * into p_step;
  return p_step;
end $$;

-- Marks an ambiguous step, so that it can be reviewed.    Leaves  event step.manual_review.
create or replace function tidebase._mark_for_review (p_run tidebase.runs, p_step tidebase.steps, p_lease_owner text)
  returns tidebase.steps language plpgsql as $$
begin
  p_step := tidebase._end_step(p_step, 'manual_review', false);
  perform tidebase._append_event_and_renew_lease(p_run.id, p_lease_owner, 'step.manual_review', json_build_object(
            'stepId', p_step.id, 'name', p_step.name, 'attempt', p_step.attempt, 'resumeContract', p_step.contract));
  return p_step;
end $$;

create or replace function tidebase._refuse_failed (p_step tidebase.steps) returns void language sql as $$
  select tidebase._refuse(409, 'step_failed', format('step %s has failed for good: a person decided so', p_step.name),
                          json_build_object('step', p_step.id))
$$;

-- What events show of a step that was started, and of one that was completed.
create or replace function tidebase._step_started (p_id text, p_name text, p_attempt integer, p_contract json)
  returns json language sql stable as $$
  select json_build_object('stepId', p_id, 'name', p_name, 'attempt', p_attempt, 'resumeContract', p_contract)
$$;

create or replace function tidebase._step_started (s tidebase.steps) returns json language sql stable as
$$ select tidebase._step_started(s.id, s.name, s.attempt, s.contract) $$;

create or replace function tidebase._step_completed (p_id text, p_name text, p_contract json)
  returns json language sql stable as $$
  select json_build_object('stepId', p_id, 'name', p_name, 'checkpointInvariant', p_contract->'checkpointInvariant',
                           'verifiedBy', p_contract->'verifiedBy')
$$;

create or replace function tidebase._step_completed (s tidebase.steps) returns json language sql stable as
$$ select tidebase._step_completed(s.id, s.name, s.contract) $$;

-- Decides what a worker is to do with a step, and begins it where that is to execute it.
-- Answers  the first of these that holds: cancelled, input_mismatch, return, locked, manual_review, execute.
-- Needs    p_lease_owner did not lose the run (TB409 lease_lost); no review decided that the step failed (TB409
--          step_failed).
-- Leaves   on execute: the step running under p_lease_owner's lease, attempt + 1, event step.started. Where its owner
--          begins it again, or it only waits (option wait), the lease alone is extended. On manual_review: the step so
--          marked.
-- Returns  {"action", …}, and the HTTP status: 409 for manual_review, which is a refusal that writes.
create or replace function tidebase.begin_step (p_run_id text, p_name text, p_input_hash text, p_input json,
                                                p_options json, p_lease_owner text, p_lease_ms integer,
                                                out body json, out status integer) language plpgsql as $$
declare
  v_run  tidebase.runs := tidebase._lock_run(p_run_id);
  v_now  timestamptz := tidebase.now();
  v_step tidebase.steps;
begin
  status := 200;
  if v_run.status = 'cancelled' then
    body := json_build_object('action', 'cancelled', 'run', tidebase._run_json(v_run));
    return;
  end if;
  perform tidebase._check_not_fenced_off(v_run, p_lease_owner);
  select * into v_step from tidebase.steps s where s.run_id = p_run_id and s.name = p_name;

  if v_step.input_hash <> p_input_hash and not v_step.copied then
    body := json_build_object('action', 'input_mismatch', 'step', tidebase._step_json(v_step),
                              'expectedInputHash', v_step.input_hash, 'actualInputHash', p_input_hash);
    return;
  elsif v_step.status = 'completed' then
    body := json_build_object('action', 'return', 'step', tidebase._step_json(v_step), 'output', v_step.output);
    return;
  elsif tidebase._is_locked(v_run, v_step, p_lease_owner, v_now) then
    body := json_build_object('action', 'locked', 'step', case when v_step.id is not null
                                                          then tidebase._step_json(v_step) end);
    return;
  elsif v_step.status = 'failed' and v_step.reviewed = 'fail' then
    perform tidebase._refuse_failed(v_step);
  elsif tidebase._is_ambiguous(v_run, v_step, p_lease_owner, p_options) then
    if v_step.status <> 'manual_review' then  -- so that it can be reviewed
      v_step := tidebase._mark_for_review(v_run, v_step, p_lease_owner);
    end if;
    status := 409;
    body := json_build_object('error', format('step %s may have run: a person must review it', p_name),
                              'code', 'manual_review', 'step', tidebase._step_json(v_step));
    return;
  elsif v_step.status = 'running'
        and (v_step.options->>'wait' = 'true'
             or (v_step.lease_owner = p_lease_owner and v_step.fence = v_run.fence)) then
    update tidebase.steps s set lease_owner = p_lease_owner, fence = v_run.fence,
           lease_expires_at = v_now + tidebase._ms(p_lease_ms), updated_at = v_now
     where s.id = v_step.id returning * into v_step;
    update tidebase.runs set lease_expires_at = v_now + tidebase._ms(lease_ms), stalled = false, updated_at = v_now
     where id = p_run_id and lease_owner = p_lease_owner;
  else
    if v_step.id is null then  -- not an upsert, which costs more
      insert into tidebase.steps (id, run_id, name, position, input_hash, input, options, contract, status, lease_owner,
                                  lease_expires_at, fence, started_at, created_at, updated_at)
      values (tidebase._new_id('step'), p_run_id, p_name, v_run.event_seq + 1, p_input_hash, p_input, p_options,
              tidebase._contract(p_options), 'running', p_lease_owner, v_now + tidebase._ms(p_lease_ms), v_run.fence,
              v_now, v_now, v_now)
      returning * into v_step;
    else
      update tidebase.steps s
         set status = 'running', attempt = s.attempt + 1, input = p_input, options = p_options,
             contract = tidebase._contract(p_options), lease_owner = p_lease_owner,
             lease_expires_at = v_now + tidebase._ms(p_lease_ms), fence = v_run.fence, error = null, started_at = v_now,
             completed_at = null, review_at = null, updated_at = v_now
       where s.id = v_step.id returning * into v_step;
    end if;
    perform tidebase._append_event_and_renew_lease(v_run.id, p_lease_owner, 'step.started',
                                                   tidebase._step_started(v_step));
  end if;
  body := json_build_object('action', 'execute', 'step', tidebase._step_json(v_step), 'leaseOwner', p_lease_owner);
end $$;

-- What is decided about a failed step when its owner decided nothing.
create or replace function tidebase._decision (p_resume_decision text, p_retryable boolean, p_contract json)
  returns text language sql immutable as $$
  select coalesce(p_resume_decision, case when p_retryable then 'auto_retry' else
           case p_contract->>'replay' when 'manual' then 'manual_review' when 'never' then 'fail_hard'
                                      else 'safe_replay' end end)
$$;

create or replace function tidebase._failed_status (p_decision text, p_retryable boolean)
  returns text language sql immutable as $$
  select case when p_retryable or p_decision = 'auto_retry' then 'failed_retryable'
              when p_decision = 'manual_review' then 'manual_review' else 'failed' end
$$;

-- Writes the event of a step that just failed, and its channels' webhooks. p_started: see _append_event_and_renew_lease.
create or replace function tidebase._emit_step_failed (p_run tidebase.runs, s tidebase.steps, p_lease_owner text,
                                                  p_retryable boolean, p_decision text, p_started json default null)
  returns void language plpgsql as $$
begin
  perform tidebase._append_event_and_renew_lease(p_run.id, p_lease_owner, 'step.failed', json_build_object(
            'stepId', s.id, 'name', s.name, 'retryable', p_retryable, 'resumeDecision', p_decision,
            'resumeContract', s.contract, 'error', s.error),
            p_started);
  perform tidebase._notify(p_run, 'step.failed', json_build_object('step', tidebase._step_json(s),
            'retryable', p_retryable, 'resumeDecision', p_decision, 'error', s.error));
end $$;

-- Needs  p_lease_owner holds the running step, and did not lose the run: else TB409 lease_lost.
create or replace function tidebase._check_step_held (p_run tidebase.runs, p_step tidebase.steps, p_lease_owner text)
  returns void language plpgsql as $$
begin
  perform tidebase._check_not_fenced_off(p_run, p_lease_owner);
  if p_step.status <> 'running' or p_step.lease_owner <> p_lease_owner then
    perform tidebase._refuse(409, 'lease_lost', format('step %s is not held by you', p_step.name),
                             json_build_object('step', p_step.id));
  end if;
end $$;

-- Records a step's output, once: from here on it is a checkpoint. It is accepted on a run that has ended, too: the work was
-- done, and a retry must not do it again.
-- Needs    p_lease_owner holds the step (TB409 lease_lost).
-- Leaves   the step completed, event step.completed; the owner's repeat unchanged.    Returns  {"step"}.
create or replace function tidebase.complete_step (p_run_id text, p_step_id text, p_lease_owner text, p_output json)
  returns json language plpgsql as $$
declare
  v_run  tidebase.runs := tidebase._lock_run(p_run_id);
  v_step tidebase.steps := tidebase._step(p_run_id, p_step_id);
begin
  if v_step.status <> 'completed' or v_step.settled_by is distinct from p_lease_owner then
    perform tidebase._check_step_held(v_run, v_step, p_lease_owner);
    v_step.output := p_output;
    v_step.error := null;
    v_step.settled_by := p_lease_owner;
    v_step := tidebase._end_step(v_step, 'completed');
    perform tidebase._append_event_and_renew_lease(v_run.id, p_lease_owner, 'step.completed',
                                                   tidebase._step_completed(v_step));
  end if;
  return json_build_object('step', tidebase._step_json(v_step));
end $$;

-- Records a step's failure, and what it means for the next attempt.
-- Needs    p_lease_owner holds the step (TB409 lease_lost).
-- Leaves   failed_retryable, manual_review or failed, event and channels step.failed; the owner's repeat unchanged.
-- Returns  {"step"}.
create or replace function tidebase.fail_step (p_run_id text, p_step_id text, p_lease_owner text, p_error json,
                                               p_retryable boolean, p_resume_decision text)
  returns json language plpgsql as $$
declare
  v_run      tidebase.runs := tidebase._lock_run(p_run_id);
  v_step     tidebase.steps := tidebase._step(p_run_id, p_step_id);
  v_decision text := tidebase._decision(p_resume_decision, p_retryable, v_step.contract);
begin
  if v_step.status not in ('failed', 'failed_retryable', 'manual_review')
     or v_step.settled_by is distinct from p_lease_owner then
    perform tidebase._check_step_held(v_run, v_step, p_lease_owner);
    v_step.error := p_error;
    v_step.settled_by := p_lease_owner;
    v_step := tidebase._end_step(v_step, tidebase._failed_status(v_decision, p_retryable));
    perform tidebase._emit_step_failed(v_run, v_step, p_lease_owner, p_retryable, v_decision);
  end if;
  return json_build_object('step', tidebase._step_json(v_step));
end $$;

-- Records a step that already ran, in one write; for steps without external side effects, since a worker that dies
-- before it leaves no trace.
-- Needs    p_lease_owner holds the run (TB409 lease_lost, run_cancelled); the same input (TB409 input_mismatch); no review
--          pending (TB409 manual_review), and none that decided that it failed (TB409 step_failed).
-- Leaves   the step ended, events step.started (unless p_lease_owner had begun it) and step.completed or step.failed; a
--          completed step, and a failure that began at the same p_started_at, unchanged.
-- Returns  {"step"}; with p_brief without what was sent, unless another output stands.
create or replace function tidebase.record_step (p_run_id text, p_lease_owner text, p_name text, p_input_hash text,
                                                 p_input json, p_options json, p_output json, p_error json,
                                                 p_retryable boolean, p_resume_decision text, p_started_at timestamptz,
                                                 p_duration_ms bigint, p_brief boolean default false)
  returns json language plpgsql as $$
declare
  v_run      tidebase.runs := tidebase._lock_run(p_run_id);
  v_now      timestamptz := tidebase.now();
  v_contract json := tidebase._contract(p_options);
  v_decision text := tidebase._decision(p_resume_decision, p_retryable, v_contract);
  v_status   text := case when p_error is null then 'completed' else tidebase._failed_status(v_decision, p_retryable) end;
  v_step     tidebase.steps;
  v_begun    boolean;
  v_started  json;
begin
  if v_run.status = 'cancelled' then
    perform tidebase._refuse_run(v_run.id, 'run_cancelled');
  end if;
  select * into v_step from tidebase.steps where run_id = p_run_id and name = p_name;
  if v_step.input_hash <> p_input_hash and not v_step.copied then
    perform tidebase._refuse(409, 'input_mismatch', format('step %s was recorded with another input', p_name),
              json_build_object('step', v_step.id, 'expectedInputHash', v_step.input_hash,
                                'actualInputHash', p_input_hash));
  elsif v_step.status = 'completed' and (v_step.settled_by = p_lease_owner or v_run.lease_owner = p_lease_owner) then
    return tidebase._step_response(v_step, p_brief, p_output);
  elsif v_run.lease_owner is distinct from p_lease_owner then
    perform tidebase._refuse_run(v_run.id, 'lease_lost');
  elsif v_step.settled_by = p_lease_owner and v_step.started_at = p_started_at and v_step.status <> 'running' then
    return tidebase._step_response(v_step, p_brief, p_output);
  elsif v_step.status = 'failed' and v_step.reviewed = 'fail' then
    perform tidebase._refuse_failed(v_step);
  elsif tidebase._is_ambiguous(v_run, v_step, p_lease_owner, p_options) then
    perform tidebase._refuse(409, 'manual_review', format('step %s may have run: a person must review it', p_name),
                             json_build_object('step', v_step.id));
  end if;
  v_begun := coalesce(v_step.status = 'running' and v_step.lease_owner = p_lease_owner, false);
  insert into tidebase.steps as s (id, run_id, name, position, input_hash, input, options, contract, status, output,
                                   error, settled_by, fence, review_at, started_at, completed_at, created_at, updated_at)
  values (tidebase._new_id('step'), p_run_id, p_name, v_run.event_seq + 1, p_input_hash, p_input, p_options, v_contract,
          v_status, p_output, p_error, p_lease_owner, v_run.fence, case v_status when 'manual_review' then v_now end,
          coalesce(p_started_at, v_now - tidebase._ms(p_duration_ms), v_step.started_at, v_now), v_now, v_now, v_now)
  on conflict (run_id, name) do update
     set attempt = s.attempt + case when v_begun then 0 else 1 end, input = p_input, options = p_options,
         contract = v_contract, status = excluded.status, output = p_output, error = p_error, settled_by = p_lease_owner,
         lease_owner = null, lease_expires_at = null, fence = v_run.fence, review_at = excluded.review_at,
         started_at = excluded.started_at, completed_at = v_now, updated_at = v_now
  returning * into v_step;
  v_started := case when not v_begun then tidebase._step_started(v_step) end;
  if p_error is null then
    perform tidebase._append_event_and_renew_lease(v_run.id, p_lease_owner, 'step.completed',
                                                   tidebase._step_completed(v_step), v_started);
  else
    perform tidebase._emit_step_failed(v_run, v_step, p_lease_owner, p_retryable, v_decision, v_started);
  end if;
  return tidebase._step_response(v_step, p_brief, p_output);
end $$;

-- A person's decision on a step whose outcome Tidebase cannot know.
-- Needs    the step in manual_review, or such that whoever took the run now would find it so (TB409 not_in_review).
-- Leaves   retry: failed_retryable; complete: completed with p_output; fail: failed for good. Event step.reviewed. The run
--          goes on: a failed one with a queue is put back (TB409 dedupe_conflict), another that nobody holds gets its
--          recovery webhook, if any, with the reason manual. The same decision again is answered unchanged.
-- Returns  {"step"}.
create or replace function tidebase.review_step (p_run_id text, p_step_id text, p_decision text, p_output json,
                                                 p_actor text) returns json language plpgsql as $$
declare
  v_run  tidebase.runs := tidebase._lock_run(p_run_id);
  v_step tidebase.steps := tidebase._step(p_run_id, p_step_id);
  v_now  timestamptz := tidebase.now();
begin
  if tidebase._needs_review(v_run, v_step, v_now) and v_step.status <> 'manual_review' then
    v_step := tidebase._mark_for_review(v_run, v_step, null);
  end if;
  if v_step.status <> 'manual_review' then
    if v_step.reviewed is distinct from p_decision then
      perform tidebase._refuse(409, 'not_in_review', format('step %s is %s', v_step.name, v_step.status),
                               json_build_object('step', v_step.id));
    end if;
    return json_build_object('step', tidebase._step_json(v_step));
  end if;
  perform tidebase._append_event_and_renew_lease(v_run.id, null, 'step.reviewed', json_build_object(
            'stepId', v_step.id, 'name', v_step.name, 'decision', p_decision, 'actor', p_actor));
  v_step.reviewed := p_decision;
  v_step.output := case p_decision when 'complete' then p_output end;
  v_step.error := case when p_decision <> 'complete' then v_step.error end;
  v_step.completed_at := null;
  v_step := tidebase._end_step(v_step, case p_decision when 'retry' then 'failed_retryable' when 'fail' then 'failed'
                                                       else 'completed' end, p_decision <> 'retry');
  if p_decision = 'complete' then
    perform tidebase._append_event_and_renew_lease(v_run.id, null, 'step.completed', tidebase._step_completed(v_step));
  end if;
  if v_run.status = 'failed' and v_run.queue is not null then
    perform tidebase._put_back(v_run);
  elsif v_run.recovery_webhook is not null
        and (v_run.status in ('pending', 'failed')
             or (v_run.status = 'running' and v_run.queue is null and v_run.lease_expires_at <= v_now)) then
    perform tidebase._recover(v_run, 'manual');
  end if;
  return json_build_object('step', tidebase._step_json(v_step));
end $$;

-- ------------------------------------------------------------------------------
-- Children and forks: runs that come from runs.
-- ------------------------------------------------------------------------------

-- Creates a run for a part of another's work: one per parent and name, however often and by however many it is asked.
-- p_child: {name, workflow_name, metadata, channels, edge_type, edge_metadata, max_attempts, priority, id?,
-- recovery_webhook?, recovery_secret?, queue?, lease_owner?}.
-- Needs    the parent (TB404), not cancelled (TB409 run_cancelled), held by the lease_owner given (_check_owner); an
--          existing child of the name of the same workflow
--          (TB409 edge_conflict).
-- Leaves   the child pending, or queued where it has a queue, its metadata with parentRunId and parentEdgeName, events
--          run.created on it and run.child.created on the parent.    Returns  {"run", "edge", "created"}.
create or replace function tidebase.create_child (p_run_id text, p_child jsonb, p_input json)
  returns json language plpgsql as $$
declare
  v_parent tidebase.runs := tidebase._lock_run(p_run_id, p_child->>'lease_owner');
  v_name   text := p_child->>'name';
  v_run    tidebase.runs;
  v_edge   tidebase.run_edges;
begin
  select * into v_edge from tidebase.run_edges where parent_run_id = p_run_id and name = v_name;
  if found then
    select * into v_run from tidebase.runs where id = v_edge.child_run_id;
    if v_run.workflow_name <> p_child->>'workflow_name' then
      perform tidebase._refuse(409, 'edge_conflict', format('child %s is of workflow %s', v_name, v_run.workflow_name));
    end if;
    return json_build_object('run', tidebase._run_json(v_run), 'edge', tidebase._edge_json(v_edge), 'created', false);
  elsif v_parent.status = 'cancelled' then
    perform tidebase._refuse_run(v_parent.id, 'run_cancelled');
  end if;
  v_run := tidebase._insert_run(p_child || jsonb_build_object(
    'metadata', p_child->'metadata' || jsonb_build_object('parentRunId', p_run_id, 'parentEdgeName', v_name),
    'parent_run_id', p_run_id, 'created', jsonb_build_object('parentRunId', p_run_id, 'edgeName', v_name)), p_input);
  if v_run.id is null then
    perform tidebase._refuse(409, 'run_id_conflict', format('run %s exists', p_child->>'id'));
  end if;
  insert into tidebase.run_edges (id, parent_run_id, child_run_id, name, edge_type, metadata)
  values (tidebase._new_id('edge'), p_run_id, v_run.id, v_name, p_child->>'edge_type', p_child->'edge_metadata')
  returning * into v_edge;
  perform tidebase._append_event_and_renew_lease(
            p_run_id, p_child->>'lease_owner', 'run.child.created',
            json_build_object('childRun', tidebase._run_json(v_run), 'edge', tidebase._edge_json(v_edge)));
  return json_build_object('run', tidebase._run_json(v_run), 'edge', tidebase._edge_json(v_edge), 'created', true);
end $$;

-- Makes a new run of the same workflow that starts with copies of the checkpoints of another: of those begun before
-- p_from_step, or of all. They answer whatever input changed code gives them. p_input null: the same input. The same
-- p_id again answers the run that is there.
-- Needs    the step, when named (TB404).
-- Leaves   the new run queued on p_queue, else on the other's queue; without either pending.
-- Returns  {"run", "created"}.
create or replace function tidebase.fork_run (p_run_id text, p_id text, p_from_step text, p_input json, p_queue text)
  returns json language plpgsql as $$
declare
  v_run      tidebase.runs := tidebase._lock_run(p_run_id);
  v_fork     tidebase.runs;
  v_position integer;
begin
  if p_from_step is not null then
    select position into v_position from tidebase.steps where run_id = p_run_id and name = p_from_step;
    if not found then
      perform tidebase._refuse(404, 'not_found', format('run %s has no step %s', p_run_id, p_from_step));
    end if;
  end if;
  v_fork := tidebase._insert_run(jsonb_build_object(
    'id', p_id, 'workflow_name', v_run.workflow_name, 'channels', '[]'::jsonb,
    'metadata', v_run.metadata || jsonb_build_object('forkedFrom', p_run_id, 'forkedFromStep', p_from_step),
    'recovery_webhook', v_run.recovery_webhook, 'recovery_secret', v_run.recovery_secret,
    'queue', coalesce(p_queue, v_run.queue), 'priority', v_run.priority,
    'max_attempts', case when v_run.queue is null then 3 else v_run.max_attempts end,
    'created', jsonb_build_object('forkedFrom', p_run_id, 'forkedFromStep', p_from_step)),
    coalesce(p_input, v_run.input));
  if v_fork.id is null then
    return json_build_object('run', tidebase._run_json(tidebase._same_run(p_id, v_run.workflow_name)),
                             'created', false);
  end if;
  insert into tidebase.steps (id, run_id, name, position, input_hash, input, options, contract, status, output, attempt,
                              copied, started_at, completed_at)
  select tidebase._new_id('step'), v_fork.id, name, position - v_run.event_seq - 1, input_hash, input, options,
         contract, status, output, attempt, true, started_at, completed_at
    from tidebase.steps
   where run_id = p_run_id and status = 'completed' and (v_position is null or position < v_position)
   order by position;
  return json_build_object('run', tidebase._run_json(v_fork), 'created', true);
end $$;

-- ------------------------------------------------------------------------------
-- Gates: a question to a person, one per run and name, decided once by whoever has its token.
-- ------------------------------------------------------------------------------

-- Creates a gate, or returns the one that the run has of this name.
-- Needs    the run not cancelled (TB409 run_cancelled), and p_lease_owner, when given, to hold it (_check_owner).
-- Leaves   the gate pending, with channels of its own; event and channels gate.created.
-- Returns  {"action": "wait" while it is pending, else "return", "gate"}.
create or replace function tidebase.begin_gate (p_run_id text, p_name text, p_prompt text, p_data json,
                                                p_channels jsonb, p_capability json, p_timeout_ms bigint,
                                                p_public_url text, p_lease_owner text default null)
  returns json language plpgsql as $$
declare
  v_run  tidebase.runs := tidebase._lock_run(p_run_id, p_lease_owner);
  v_now  timestamptz := tidebase.now();
  v_id   text := tidebase._new_id('gate');
  v_gate tidebase.gates;
begin
  if v_run.status = 'cancelled' then
    perform tidebase._refuse_run(v_run.id, 'run_cancelled');
  end if;
  select * into v_gate from tidebase.gates where run_id = p_run_id and name = p_name;
  if not found then
    insert into tidebase.gates (id, run_id, name, prompt, data, capability, channels, resolve_token, resolve_url,
                                expires_at, created_at)
    values (v_id, p_run_id, p_name, p_prompt, p_data, p_capability, tidebase._shown_channels(p_channels),
            replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''),
            p_public_url || '/runs/' || p_run_id || '/gates/' || v_id || '/resolve',
            v_now + tidebase._ms(p_timeout_ms), v_now)
    returning * into v_gate;
    if p_channels <> '[]' then
      perform tidebase._add_channels(p_run_id, v_id, p_channels);
      update tidebase.runs set has_channels = true where id = p_run_id returning * into v_run;
    end if;
    perform tidebase._append_event_and_renew_lease(v_run.id, p_lease_owner, 'gate.created',
                             json_build_object('gate', tidebase._public_gate(v_gate, false)));
    perform tidebase._notify(v_run, 'gate.created',
                             json_build_object('gate', tidebase._joined(
                               tidebase._public_gate(v_gate, true),
                               json_build_object('reviewUrl', tidebase._review_url(v_gate)))), v_id);
  end if;
  return json_build_object('action', case v_gate.status when 'pending' then 'wait' else 'return' end,
                           'gate', tidebase._gate_json(v_gate));
end $$;

-- Decides a pending gate of a run, which must be locked.
-- Leaves   event and channels gate.resolved; the run queued where it waits for this gate.
create or replace function tidebase._decide_gate (p_run tidebase.runs, p_gate_id text, p_decision text, p_actor text,
                                                  p_payload json) returns tidebase.gates language plpgsql as $$
declare
  v_gate  tidebase.gates;
  v_event json;
begin
  update tidebase.gates
     set status = p_decision, actor = p_actor, decision_payload = coalesce(p_payload, '{}'), resolved_at = tidebase.now()
   where id = p_gate_id returning * into v_gate;
  v_event := json_build_object('gate', tidebase._public_gate(v_gate, false));
  perform tidebase._append_event_and_renew_lease(p_run.id, null, 'gate.resolved', v_event);
  perform tidebase._notify(p_run, 'gate.resolved', v_event, p_gate_id);
  if p_run.status = 'waiting' and p_run.waiting_for->>'gateId' = p_gate_id then
    perform tidebase._wake(p_run);
  end if;
  return v_gate;
end $$;

-- The gate whose token this is. The token is the credential: an unknown run, an unknown gate and a wrong token look alike
-- (TB409 gate_token_wrong).
create or replace function tidebase._gate_by_token (p_run_id text, p_gate_id text, p_token text)
  returns tidebase.gates language plpgsql stable as $$
declare
  v_gate tidebase.gates;
begin
  select * into v_gate from tidebase.gates where id = p_gate_id and run_id = p_run_id;
  -- Digests are compared, so that the time it takes tells nothing of the token.
  if v_gate.id is null or sha256(convert_to(v_gate.resolve_token, 'UTF8')) <> sha256(convert_to(p_token, 'UTF8')) then
    perform tidebase._refuse(409, 'gate_token_wrong', 'there is no such gate, or the token is not its token');
  end if;
  return v_gate;
end $$;

-- Decides a gate, once.
-- Needs    the token (TB409 gate_token_wrong), checked before anything is locked, so that whoever lacks it can hold up
--          nobody; a pending gate (TB409 gate_resolved, with gate); a run that has not ended (TB409 run_ended).
-- Leaves   the gate decided, event and channels gate.resolved.    Returns  {"gate"}.
create or replace function tidebase.resolve_gate (p_run_id text, p_gate_id text, p_token text, p_decision text,
                                                  p_actor text, p_payload json) returns json language plpgsql as $$
declare
  v_gate tidebase.gates := tidebase._gate_by_token(p_run_id, p_gate_id, p_token);
  v_run  tidebase.runs := tidebase._lock_run(p_run_id);
begin
  select * into v_gate from tidebase.gates where id = p_gate_id;  -- as it is now that nobody else can decide it
  if v_gate.status <> 'pending' then
    perform tidebase._refuse(409, 'gate_resolved', format('gate %s was %s', v_gate.name, v_gate.status),
                             json_build_object('gate', v_gate.id));
  elsif v_run.status in ('completed', 'failed', 'cancelled') then
    perform tidebase._refuse(409, 'run_ended', format('run %s is %s: gate %s can no longer be decided', p_run_id,
                             v_run.status, v_gate.name), json_build_object('runStatus', v_run.status));
  end if;
  v_gate := tidebase._decide_gate(v_run, p_gate_id, p_decision, p_actor, p_payload);
  return json_build_object('gate', tidebase._gate_json(v_gate));
end $$;

-- Returns  {"gate", "runStatus"}, and the run's event number to wait from.    TB404 when there is none.
create or replace function tidebase.get_gate (p_run_id text, p_gate_id text, p_tokens boolean default true,
                                              out body json, out seq integer) language plpgsql stable as $$
begin
  select json_build_object('gate', tidebase._gate_json(g, p_tokens), 'runStatus', r.status), r.event_seq into body, seq
    from tidebase.gates g join tidebase.runs r on r.id = g.run_id where g.id = p_gate_id and g.run_id = p_run_id;
  if not found then
    perform tidebase._refuse(404, 'not_found', format('run %s has no gate %s', p_run_id, p_gate_id));
  end if;
end $$;

-- ------------------------------------------------------------------------------
-- State and usage: what a run shows of itself while it works, and what it cost.
-- ------------------------------------------------------------------------------

-- Appends a version to a stream of a run, which must be locked. p_version: {id?, label?, reason?, importance?, metadata?,
-- created_by?, step_id?}. p_live_version: of a write of the live state, its version.
create or replace function tidebase._add_version (p_run_id text, p_stream text, p_target_type text, p_target_id text,
                                                  p_value jsonb, p_patch jsonb, p_version jsonb,
                                                  p_live_version integer default null)
  returns tidebase.state_versions language plpgsql as $$
declare
  v_now     timestamptz := tidebase.now();
  v_stream  tidebase.state_streams;
  v_version tidebase.state_versions;
begin
  insert into tidebase.state_streams as s (id, run_id, name, target_type, target_id, current_version, created_at,
                                           updated_at)
  values (tidebase._new_id('stream'), p_run_id, p_stream, p_target_type, p_target_id, 1, v_now, v_now)
  on conflict (run_id, name) do update set current_version = s.current_version + 1, updated_at = v_now
  returning * into v_stream;
  insert into tidebase.state_versions (id, stream_id, run_id, step_id, version, value, patch, label, reason, importance,
                                       metadata, created_by, created_at, live_version)
  values (coalesce(p_version->>'id', tidebase._new_id('ver')), v_stream.id, p_run_id, p_version->>'step_id',
          v_stream.current_version, p_value, p_patch, p_version->>'label', p_version->>'reason',
          coalesce(p_version->>'importance', 'normal'), coalesce(p_version->'metadata', '{}'), p_version->>'created_by',
          v_now, p_live_version)
  on conflict (id) do nothing returning * into v_version;
  if not found then  -- another run's, written since the caller looked
    perform tidebase._refuse(409, 'version_id_conflict', format('version %s is of another run', p_version->>'id'));
  end if;
  return v_version;
end $$;

-- The version that a client's id already names, of a repeated request; TB409 version_id_conflict when another run's.
create or replace function tidebase._same_version (p_run_id text, p_version jsonb)
  returns tidebase.state_versions language plpgsql as $$
declare
  v_version tidebase.state_versions;
begin
  select * into v_version from tidebase.state_versions where id = p_version->>'id';
  if v_version.run_id <> p_run_id then
    perform tidebase._refuse(409, 'version_id_conflict', format('version %s is of another run', v_version.id));
  end if;
  return v_version;
end $$;

-- Replaces the run's live value, or merges the top level of p_value into it, and records it as the stream's next
-- version.
-- Needs    p_lease_owner, when given, to hold the run (_check_owner), likewise below; p_if_version, when given, to be the
--          live version, 0 for none (TB409 version_conflict, with state); to merge: an object on both sides (TB409
--          state_not_object), and merged no more than 32 MiB (TB400, issues).
-- Leaves   event and channels state.updated; where the id was written before, everything as it was.
-- Returns  {"state"} as this write, or the one of the same id before, left it.
create or replace function tidebase.write_state (p_run_id text, p_stream text, p_value jsonb, p_merge boolean,
                                                 p_if_version integer, p_version jsonb, p_lease_owner text default null)
  returns json language plpgsql as $$
declare
  v_run     tidebase.runs := tidebase._lock_run(p_run_id, p_lease_owner);
  v_state   tidebase.states;
  v_version tidebase.state_versions := tidebase._same_version(p_run_id, p_version);
  v_event   json;
  v_value   jsonb;
  v_limit   constant integer := 32 * 1024 * 1024;
begin
  select * into v_state from tidebase.states where run_id = p_run_id;
  if v_version.id is not null and v_version.live_version is null then
    perform tidebase._refuse(409, 'version_id_conflict', format('version %s is a snapshot', v_version.id));
  elsif v_version.id is not null then
    v_state := (p_run_id, v_version.value, v_version.live_version, v_version.created_at);
    return json_build_object('state', tidebase._state_json(v_state));
  elsif p_if_version <> coalesce(v_state.version, 0) then
    perform tidebase._refuse(409, 'version_conflict',
              format('the state is at version %s', coalesce(v_state.version, 0)),
              json_build_object('state', v_state.run_id));
  elsif p_merge and jsonb_typeof(v_state.value) <> 'object' then
    perform tidebase._refuse(409, 'state_not_object', 'the state is not an object, so nothing can be merged into it');
  end if;
  v_value := case when p_merge then coalesce(v_state.value || p_value, p_value) else p_value end;
  if p_merge and pg_column_size(v_value) > 1048576 and octet_length(v_value::text) > v_limit then
    perform tidebase._refuse(400, 'invalid_request', 'invalid request body', json_build_object('issues', json_build_array(
              json_build_object('path', 'value', 'message', format(
                'too large: the state would have %s bytes; at most %s', octet_length(v_value::text), v_limit)))));
  end if;
  v_version := tidebase._add_version(
    p_run_id, p_stream, 'run', p_run_id, v_value,
    case when p_merge then p_value end, p_version, p_live_version => coalesce(v_state.version, 0) + 1);
  insert into tidebase.states (run_id, value, version, updated_at)
  values (p_run_id, v_version.value, v_version.live_version, v_version.created_at)
  on conflict (run_id) do update
     set value = excluded.value, version = excluded.version, updated_at = excluded.updated_at
  returning * into v_state;
  v_event := json_build_object('value', v_state.value);
  if p_merge then
    v_event := tidebase._joined(v_event, json_build_object('patch', p_value));
  end if;
  perform tidebase._append_event_and_renew_lease(v_run.id, p_lease_owner, 'state.updated', tidebase._joined(
            v_event, json_build_object('stateVersion', tidebase._version_event(v_version))));
  perform tidebase._notify(v_run, 'state.updated', json_build_object(
            'state', tidebase._state_json(v_state), 'stateVersion', tidebase._version_event(v_version)));
  return json_build_object('state', tidebase._state_json(v_state));
end $$;

-- Labels the live value, whichever stream wrote it last, as the next version of p_stream.
-- Needs    a live value (TB404).    Leaves  event state.saved.    Returns  {"stateVersion"}.
create or replace function tidebase.save_state (p_run_id text, p_stream text, p_version jsonb,
                                                p_lease_owner text default null)
  returns json language plpgsql as $$
declare
  v_run     tidebase.runs := tidebase._lock_run(p_run_id, p_lease_owner);
  v_state   tidebase.states;
  v_version tidebase.state_versions := tidebase._same_version(p_run_id, p_version);
begin
  if v_version.id is null then
    select * into v_state from tidebase.states where run_id = p_run_id;
    if not found then
      perform tidebase._refuse(404, 'not_found', format('run %s has no state yet', p_run_id));
    end if;
    v_version := tidebase._add_version(p_run_id, p_stream, 'run', p_run_id, v_state.value, null,
                                       '{"importance": "milestone"}' || p_version);
    perform tidebase._append_event_and_renew_lease(v_run.id, p_lease_owner, 'state.saved',
                             json_build_object('stateVersion', tidebase._version_event(v_version)));
  end if;
  return json_build_object('stateVersion', tidebase._version_json(v_version));
end $$;

-- Keeps a labelled picture of something, beside the live state: in the stream type:id of what it is of.
-- Leaves   event snapshot.created.    Returns  {"snapshot"}.
create or replace function tidebase.create_snapshot (p_run_id text, p_target_type text, p_target_id text, p_state jsonb,
                                                     p_version jsonb, p_lease_owner text default null)
  returns json language plpgsql as $$
declare
  v_run     tidebase.runs := tidebase._lock_run(p_run_id, p_lease_owner);
  v_version tidebase.state_versions := tidebase._same_version(p_run_id, p_version);
  v_type    text := coalesce(p_target_type, 'run');
  v_target  text := coalesce(p_target_id, p_run_id);
begin
  if v_version.id is null then
    v_version := tidebase._add_version(p_run_id, v_type || ':' || v_target, v_type, v_target, p_state, null,
                                       '{"importance": "milestone"}' || p_version);
    perform tidebase._append_event_and_renew_lease(v_run.id, p_lease_owner, 'snapshot.created',
                             json_build_object('stateVersion', tidebase._version_event(v_version)));
  end if;
  return json_build_object('snapshot', tidebase._version_json(v_version));
end $$;

-- A run's versions by stream and version, after p_after: without payloads of more than 64 KiB, or, if p_light, with the
-- sizes of their payloads alone.
-- Returns  {"stateVersions", "nextCursor"}: null, or what to go on after; null when there is no such run.
create or replace function tidebase.list_versions (p_run_id text, p_stream text, p_labeled boolean, p_after text,
                                                   p_limit integer, p_light boolean default false)
  returns json language plpgsql stable set enable_seqscan = off as $$
declare
  v_ids constant text[] := array(
    select v.id from tidebase.state_versions v join tidebase.state_streams s on s.id = v.stream_id
     where v.run_id = p_run_id and (p_stream is null or s.name = p_stream)
       and (not p_labeled or v.label is not null)
       and (p_after is null or (s.name collate "C", v.version) > (
             select a.name collate "C", p.version from tidebase.state_versions p
               join tidebase.state_streams a on a.id = p.stream_id where p.id = p_after and p.run_id = p_run_id))
     order by s.name collate "C", v.version limit p_limit);
begin
  return (select json_build_object(
    'stateVersions', case when not p_light then tidebase._listed_versions(v_ids) else (
       select coalesce(json_agg(tidebase._version_light(v, s.name) order by given.n), '[]')
         from unnest(v_ids) with ordinality as given (id, n)
         join tidebase.state_versions v on v.id = given.id join tidebase.state_streams s on s.id = v.stream_id) end,
    'nextCursor', case when cardinality(v_ids) = p_limit then v_ids[p_limit] end)
    from tidebase.runs where id = p_run_id);
end $$;

-- These versions, in this order, as a list has them: without payloads of more than 64 KiB and, from where the list has
-- _budget() bytes on, without any.
create or replace function tidebase._listed_versions (p_ids text[]) returns json
  language plpgsql stable set enable_seqscan = off as $$
begin
  return (
    select coalesce(json_agg(
             case when m.room and greatest(tidebase._bytes(v.value), tidebase._bytes(v.patch),
                                           tidebase._bytes(v.metadata)) <= 65536 then tidebase._version_json(v)
                  else tidebase._mark_omitted(tidebase._version_shown(
                         v, tidebase._in_list(v.value, m.room), tidebase._in_list(v.patch, m.room),
                         tidebase._in_list(v.metadata, m.room))) end order by m.n), '[]')
      from (select v.id, given.n,
                   sum(tidebase._bytes_in_list(v.value) + tidebase._bytes_in_list(v.patch)
                       + tidebase._bytes_in_list(v.metadata)) over (order by given.n) <= tidebase._budget() as room
              from unnest(p_ids) with ordinality as given (id, n)
              join tidebase.state_versions v on v.id = given.id) as m
      join tidebase.state_versions v on v.id = m.id);
end $$;

-- A run's labelled versions, the newest 10,000 first, without payloads of more than 64 KiB.
-- Returns  {"snapshots"}, null when there is no such run.
create or replace function tidebase.list_snapshots (p_run_id text) returns json language plpgsql stable as $$
begin
  return (select json_build_object('snapshots', tidebase._listed_versions(array(
            select id from tidebase.state_versions where run_id = p_run_id and label is not null
             order by created_at desc, id desc limit 10000))) from tidebase.runs where id = p_run_id);
end $$;

-- Writes an entry of the cost ledger. The same p_id again answers the entry that is there. p_entry: {kind, metadata,
-- step_id?, provider?, model?, label?, quantity?, unit?, input_tokens?, output_tokens?, total_tokens?, cost_usd?}; without
-- total_tokens these are the sum of the other two.
-- Needs    p_id not another run's (TB409 usage_id_conflict).
-- Leaves   event and channels usage.recorded.    Returns  {"usage"}.
create or replace function tidebase.record_usage (p_run_id text, p_id text, p_entry jsonb,
                                                  p_lease_owner text default null)
  returns json language plpgsql as $$
declare
  v_run   tidebase.runs := tidebase._lock_run(p_run_id, p_lease_owner);
  v_usage tidebase.usage;
  v_event json;
begin
  select * into v_usage from tidebase.usage where id = p_id;
  if v_usage.run_id = p_run_id then
    return json_build_object('usage', tidebase._usage_json(v_usage));
  elsif not found then
    v_usage := jsonb_populate_record(null::tidebase.usage, p_entry);
    v_usage.id := coalesce(p_id, tidebase._new_id('use'));
    v_usage.run_id := p_run_id;
    v_usage.total_tokens := coalesce(v_usage.total_tokens, v_usage.input_tokens + v_usage.output_tokens,
                                     v_usage.input_tokens, v_usage.output_tokens);
    v_usage.created_at := tidebase.now();
    insert into tidebase.usage select v_usage.* on conflict (id) do nothing;
    if found then
      v_event := json_build_object('usage', tidebase._usage_json(v_usage));
      perform tidebase._append_event_and_renew_lease(p_run_id, p_lease_owner, 'usage.recorded', v_event);
      perform tidebase._notify(v_run, 'usage.recorded', v_event);
      return v_event;
    end if;  -- else another run's, written since it was looked for
  end if;
  perform tidebase._refuse(409, 'usage_id_conflict', format('usage %s is of another run', p_id));
end $$;

-- Sums of entries of the ledger, as all answers show them.
create or replace function tidebase._usage_sums (p_input numeric, p_output numeric, p_total numeric, p_cost numeric)
  returns json language sql immutable as $$
  select json_build_object('inputTokens', coalesce(p_input, 0), 'outputTokens', coalesce(p_output, 0),
                           'totalTokens', coalesce(p_total, 0), 'costUsd', coalesce(p_cost, 0))
$$;

-- The ledger summed up by p_by: model, workflow or day (UTC); dearest first. The entries from p_since on and before
-- p_until; null for all. It is summed up per run first, in memory: to count the distinct runs of each group would sort all
-- entries.
-- Returns  {"groups": [{p_by: its value, "entries", "runs": how many of each, and as _usage_sums}]}.
create or replace function tidebase.usage_groups (p_by text, p_since timestamptz, p_until timestamptz)
  returns json language sql stable set work_mem = '64MB' as $$
  with per_run as (
    select case p_by when 'model' then model when 'day' then (created_at at time zone 'UTC')::date::text end as key,
           run_id, count(*) as entries, sum(input_tokens) as input, sum(output_tokens) as output,
           sum(total_tokens) as total, sum(cost_usd) as cost
      from tidebase.usage
     where (p_since is null or created_at >= p_since) and (p_until is null or created_at < p_until)
     group by 1, run_id
  ), grouped as (
    select case p_by when 'workflow' then r.workflow_name else key end as key, sum(entries)::bigint as entries,
           count(*) as runs, coalesce(sum(cost), 0) as cost,
           tidebase._usage_sums(sum(p.input), sum(output), sum(total), sum(cost)) as sums
      from per_run p left join tidebase.runs r on p_by = 'workflow' and r.id = run_id
     group by 1
  )
  select json_build_object('groups', coalesce(json_agg(
           tidebase._joined(json_build_object(p_by, key, 'entries', entries, 'runs', runs), sums)
           order by cost desc, key), '[]'))
    from grouped
$$;

-- ------------------------------------------------------------------------------
-- Waiting: a queued run that waits for a person, a signal, a time or its children holds no worker.
-- ------------------------------------------------------------------------------

-- Which of the signals of a name is waited for.
create or replace function tidebase._signal_number (p_for jsonb) returns integer language sql immutable as
$$ select coalesce((p_for->>'n')::integer, 1) $$;

-- Puts a waiting run, which must be locked, back on its queue, because what it waits for is there. The step of the
-- wait, where it has one, completes with it: its output is the signal, or null.
create or replace function tidebase._wake (p_run tidebase.runs) returns void language plpgsql as $$
declare
  v_for  jsonb := p_run.waiting_for;
  v_step tidebase.steps;
begin
  select * into v_step from tidebase.steps
   where id = v_for->>'stepId' and run_id = p_run.id and status = 'running';
  if found then
    v_step.output := (select tidebase._signal_json(g) from tidebase.signals g
                       where g.run_id = p_run.id and g.name = v_for->>'event' and g.n = tidebase._signal_number(v_for));
    v_step := tidebase._end_step(v_step, 'completed');
    perform tidebase._append_event_and_renew_lease(p_run.id, null, 'step.completed', tidebase._step_completed(v_step));
  end if;
  p_run.run_at := tidebase.now();
  perform tidebase._transition(p_run, 'queued', 'run.resumed', json_build_object('waitedFor', v_for));
end $$;

-- Whether a run need not wait, since what it would wait for is there. Each child that ends asks this of its parent. So the
-- search stops at the first live child; and it goes backwards, since the index has dead entries of those that ended, mostly
-- of the oldest.
create or replace function tidebase._is_wait_over (p_run_id text, p_for jsonb, p_now timestamptz)
  returns boolean language plpgsql stable as $$
declare
  v_children jsonb := p_for->'children';
begin
  if v_children is not null then
    perform from tidebase.runs c
      where c.parent_run_id = p_run_id and c.status in ('pending', 'queued', 'running', 'waiting')
        and (select v_children = 'true' or v_children ? e.name  -- no join, which could begin with all edges
               from tidebase.run_edges e where e.child_run_id = c.id and e.parent_run_id = p_run_id)
      order by c.id desc limit 1;
    return not found;
  elsif p_for ? 'gateId' then
    return not exists (select from tidebase.gates
                        where run_id = p_run_id and id = p_for->>'gateId' and status = 'pending');
  elsif p_for ? 'event' then
    return exists (select from tidebase.signals
                    where run_id = p_run_id and name = p_for->>'event' and n = tidebase._signal_number(p_for));
  end if;
  return (p_for->>'until')::timestamptz <= p_now;
end $$;

-- Gives a run's lease up until what it waits for is there: {"gateId"}, {"event": a signal's name, "n": which of them},
-- {"until": a time}, or {"children": names, or true for all} that ended; and "stepId", the step that records the wait.
-- A signal that is not there after p_timeout_ms is timed out for good.
-- Needs    p_lease_owner holds it (TB409 lease_lost, run_cancelled); it has a queue (TB409 no_queue), and the step (TB404).
-- Leaves   it waiting, no attempt spent, event run.waiting; where it is there already, everything as it was. When the
--          wait is over, the step is completed (see _wake).
-- Returns  {"run", "ready"}: ready when there was nothing to wait for, and the owner may go on.
create or replace function tidebase.wait_run (p_run_id text, p_lease_owner text, p_wait_for jsonb, p_timeout_ms bigint)
  returns json language plpgsql as $$
declare
  v_run tidebase.runs := tidebase._lock_run(p_run_id);
  v_now timestamptz := tidebase.now();
begin
  if p_wait_for ? 'stepId' then
    perform tidebase._step(p_run_id, p_wait_for->>'stepId');
  end if;
  if v_run.status = 'cancelled' then
    perform tidebase._refuse_run(v_run.id, 'run_cancelled');
  elsif v_run.lease_owner is null and v_run.settled_by = p_lease_owner and v_run.status in ('waiting', 'queued') then
    return json_build_object('run', tidebase._run_json(v_run), 'ready', false);  -- its repeat
  elsif v_run.lease_owner is distinct from p_lease_owner then
    perform tidebase._refuse_run(v_run.id, 'lease_lost');
  elsif v_run.queue is null then
    perform tidebase._refuse(409, 'no_queue', format('run %s has no queue to come back to', p_run_id));
  elsif tidebase._is_wait_over(p_run_id, p_wait_for, v_now) then
    return json_build_object('run', tidebase._run_json(v_run), 'ready', true);
  end if;
  v_run.waiting_for := p_wait_for;
  v_run.wake_at := coalesce((p_wait_for->>'until')::timestamptz, v_now + tidebase._ms(p_timeout_ms));
  v_run.attempt := v_run.attempt - 1;
  v_run.settled_by := p_lease_owner;
  v_run := tidebase._transition(v_run, 'waiting', 'run.waiting', json_build_object('for', p_wait_for));
  return json_build_object('run', tidebase._run_json(v_run), 'ready', false);
end $$;

-- Inserts a signal of a run, which must be locked; or, timed out, that it did not come in time.
-- Needs    p_id not another signal's (TB409 signal_id_conflict).
-- Leaves   event signal.received or signal.timed_out, and a run that waits for this one queued.
create or replace function tidebase._add_signal (p_run tidebase.runs, p_id text, p_name text, p_n integer,
                                                 p_payload json, p_timed_out boolean, p_lease_owner text default null)
  returns tidebase.signals language plpgsql as $$
declare
  v_signal tidebase.signals;
begin
  insert into tidebase.signals (id, run_id, name, n, payload, timed_out)
  values (coalesce(p_id, tidebase._new_id('sig')), p_run.id, p_name, p_n, p_payload, p_timed_out)
  on conflict (id) do nothing returning * into v_signal;
  if not found then  -- another run's, written since the caller looked
    perform tidebase._refuse(409, 'signal_id_conflict', format('signal %s is another''s', p_id));
  end if;
  perform tidebase._append_event_and_renew_lease(
            p_run.id, p_lease_owner, case when p_timed_out then 'signal.timed_out' else 'signal.received' end,
            json_build_object('signal', tidebase._signal_json(v_signal)));
  if p_run.status = 'waiting' and p_run.waiting_for->>'event' = p_name
     and tidebase._signal_number(p_run.waiting_for) = p_n then
    perform tidebase._wake(p_run);
  end if;
  return v_signal;
end $$;

-- Sends a signal to a run, kept until asked for: the next of its name.
-- Needs    p_lease_owner, when given, to hold the run (_check_owner); p_id not another signal's (TB409 signal_id_conflict);
--          the run not completed (TB409 run_completed). A failed or cancelled run may be retried and ask for it then.
-- Leaves   as _add_signal; where the same p_id was sent before, everything as it was.    Returns  {"signal"}.
create or replace function tidebase.send_signal (p_run_id text, p_id text, p_name text, p_payload json,
                                                 p_lease_owner text default null)
  returns json language plpgsql as $$
declare
  v_run    tidebase.runs := tidebase._lock_run(p_run_id, p_lease_owner);
  v_signal tidebase.signals;
begin
  select * into v_signal from tidebase.signals where id = p_id;
  if not found then
    if v_run.status = 'completed' then
      perform tidebase._refuse_run(v_run.id, 'run_completed');
    end if;
    v_signal := tidebase._add_signal(
      v_run, p_id, p_name, (select coalesce(max(n), 0) + 1 from tidebase.signals where run_id = p_run_id and name = p_name),
      p_payload, false, p_lease_owner);
  elsif v_signal.run_id <> p_run_id or v_signal.name <> p_name then
    perform tidebase._refuse(409, 'signal_id_conflict', format('signal %s is another''s', p_id));
  end if;
  return json_build_object('signal', tidebase._signal_json(v_signal));
end $$;

-- Decides that the p_n-th signal of a name did not come in time, unless it did.    Returns  {"signal"}, that counts.
-- Needs    p_lease_owner holds the run (TB409 lease_lost, run_cancelled).
create or replace function tidebase.expire_signal (p_run_id text, p_name text, p_n integer, p_lease_owner text)
  returns json language plpgsql as $$
declare
  v_run    tidebase.runs := tidebase._lock_run(p_run_id, p_lease_owner);
  v_signal tidebase.signals;
begin
  select * into v_signal from tidebase.signals where run_id = p_run_id and name = p_name and n = p_n;
  if not found then
    v_signal := tidebase._add_signal(v_run, null, p_name, p_n, null, true, p_lease_owner);
  end if;
  return json_build_object('signal', tidebase._signal_json(v_signal));
end $$;

-- Returns  {"signal", "runStatus"}, signal null while there is none, and the run's event number to wait from.
create or replace function tidebase.get_signal (p_run_id text, p_name text, p_n integer, out body json, out seq integer)
  language plpgsql stable as $$
begin
  select json_build_object('runStatus', r.status, 'signal', (
           select tidebase._signal_json(s) from tidebase.signals s
            where s.run_id = p_run_id and s.name = p_name and s.n = p_n)),
         r.event_seq
    into body, seq from tidebase.runs r where r.id = p_run_id;
  if not found then
    perform tidebase._refuse(404, 'not_found', format('run %s does not exist', p_run_id));
  end if;
end $$;

-- ------------------------------------------------------------------------------
-- Queues: a job is a run. Put in once per dedupe key, claimed by one, within the queue's caps.
-- ------------------------------------------------------------------------------

-- Puts a run on a queue. p_job: {id?, workflow_name, metadata, recovery_webhook?, recovery_secret?, channels, dedupe_key?,
-- delay_ms?, run_at?, max_attempts, priority, deadline_ms?}.
-- Needs    an id given is not another workflow's (TB409 run_id_conflict), nor is the live run that has the dedupe key
--          (TB409 dedupe_conflict).
-- Leaves   the run queued, event run.enqueued; where its dedupe key or its id is taken, nothing new.
-- Answers  the new run; or the one that has the id; or, deduplicated, the live one that has the key.
create or replace function tidebase._enqueue (p_queue text, p_job jsonb, p_input json,
                                              out run tidebase.runs, out deduplicated boolean) language plpgsql as $$
begin
  deduplicated := false;
  loop
    run := tidebase._insert_run(p_job, p_input, p_queue);
    exit when run.id is not null;
    if exists (select from tidebase.runs where id = p_job->>'id') then
      run := tidebase._same_run(p_job->>'id', p_job->>'workflow_name');
      return;
    end if;
    select * into run from tidebase.runs
     where queue = p_queue and dedupe_key = p_job->>'dedupe_key' and status in ('queued', 'running', 'waiting');
    if found and run.workflow_name <> p_job->>'workflow_name' then
      perform tidebase._refuse(409, 'dedupe_conflict', format(
                'dedupe key %s of queue %s is held by run %s of workflow %s: it cannot stand for one of workflow %s',
                run.dedupe_key, p_queue, run.id, run.workflow_name, p_job->>'workflow_name'),
                json_build_object('runId', run.id, 'workflowName', run.workflow_name));
    elsif found then
      deduplicated := true;
      return;
    end if;  -- else the live one ended in between, and its key is free
  end loop;
end $$;

-- One run.    Returns  {"run", "deduplicated"}.
create or replace function tidebase.enqueue_run (p_queue text, p_job jsonb, p_input json)
  returns json language plpgsql as $$
declare
  v_new record := tidebase._enqueue(p_queue, p_job, p_input);
  v_run tidebase.runs := v_new.run;  -- a variable of its own: its columns are read several times as fast
begin
  return json_build_object('run', tidebase._run_json(v_run), 'deduplicated', v_new.deduplicated);
end $$;

create or replace function tidebase._are_keyed (p_jobs jsonb) returns boolean language sql immutable as
$$ select jsonb_path_exists(p_jobs, '$[*].dedupe_key ? (@ != null)') $$;

-- Serialises batches of jobs with dedupe keys, by queue: two batches that name the same keys in different orders would
-- deadlock.
create or replace function tidebase._lock_keys (p_jobs jsonb, p_queue text default null)
  returns void language plpgsql as $$
begin
  if tidebase._are_keyed(p_jobs) then
    perform pg_advisory_xact_lock(hashtextextended('tidebase.enqueue.' || queue, 0))
       from (select distinct coalesce(p_queue, job->>'queue') as queue from jsonb_array_elements(p_jobs) as job
              where job->>'dedupe_key' is not null order by queue) as queues;
  end if;
end $$;

-- Many runs: all or, when one is refused, none.
-- Returns  {"runs"}, in the order given, each with "deduplicated"; past _budget() bytes of payloads without them, with
--          "payloadOmitted".
-- Plans    on a table that was small when it was last looked at, each of thousands of rows would be found by a scan.
create or replace function tidebase.enqueue_runs (p_queue text, p_jobs jsonb, p_inputs json[])
  returns json language plpgsql set enable_seqscan = off as $$
declare
  v_new   record;
  v_run   json;
  v_runs  json[] := '{}';
  v_bytes bigint := 0;
begin
  perform tidebase._lock_keys(p_jobs, p_queue);
  for v_new in
    select n, i.run, false as deduplicated from generate_series(1, cardinality(p_inputs)) as n
      left join tidebase._insert_runs(p_jobs, p_inputs, p_queue) i using (n) order by n
  loop
    if v_new.run is null then  -- its id or its dedupe key is taken
      select v_new.n, e.* into v_new from tidebase._enqueue(p_queue, p_jobs->(v_new.n::integer - 1), p_inputs[v_new.n]) e;
    end if;
    if v_bytes <= tidebase._budget() then
      v_run := tidebase._run_json(v_new.run);
      v_bytes := v_bytes + octet_length(v_run::text);
    end if;
    if v_bytes > tidebase._budget() then
      v_run := tidebase._run_listed(v_new.run, false);
    end if;
    v_runs := v_runs || tidebase._joined(v_run, json_build_object('deduplicated', v_new.deduplicated));
  end loop;
  return json_build_object('runs', array_to_json(v_runs));
end $$;

-- How many runs of a queue may start now, at most p_limit.  Needs  the queue's lock, when it has a cap (_lock_capped).
create or replace function tidebase._queue_room (p_queue text, p_limit integer) returns integer language plpgsql as $$
declare
  v_now   timestamptz := tidebase.now();
  v_queue tidebase.queues;
  v_room  integer := p_limit;
begin
  select * into v_queue from tidebase.queues where name = p_queue;
  if v_queue.paused then
    return 0;
  end if;
  if v_queue.concurrency is not null then
    v_room := least(v_room, v_queue.concurrency
      - (select count(*) from tidebase.runs where queue = p_queue and status = 'running' and not stalled)
      - (select count(*) from tidebase.runs where queue = p_queue and status = 'queued' and run_at > v_now
            and offered_at is not null and offered_at > v_now - interval '60 seconds'));
  end if;
  if v_queue.rate_per_minute is not null then
    delete from tidebase.queue_claims where queue = p_queue and claimed_at <= v_now - interval '60 seconds';
    v_room := least(v_room, v_queue.rate_per_minute
      - (select coalesce(sum(claimed), 0) from tidebase.queue_claims where queue = p_queue));
  end if;
  return greatest(v_room, 0);
end $$;

-- Counts starts for the chart of the last hour, and against the queue's rate, when it has one.
create or replace function tidebase._count_claims (p_queue text, p_claimed integer) returns void language plpgsql as $$
begin
  insert into tidebase.queue_minutes
  select p_queue, date_trunc('minute', tidebase.now()), p_claimed, 0 where p_claimed > 0;
  insert into tidebase.queue_claims select name, tidebase.now(), p_claimed
    from tidebase.queues where name = p_queue and rate_per_minute is not null and p_claimed > 0;
end $$;

-- The priorities of a queue's queued runs, highest first: a probe of the index for each, not a scan.
create or replace function tidebase._priorities (p_queue text) returns setof integer language sql stable as $$
  with recursive levels (priority) as (
    select max(priority) from tidebase.runs where queue = p_queue and status = 'queued'
    union all
    select (select max(r.priority) from tidebase.runs r
             where r.queue = p_queue and r.status = 'queued' and r.priority < levels.priority)
      from levels where levels.priority is not null
  )
  select priority from levels where priority is not null
$$;

-- Likewise of one workflow.
create or replace function tidebase._priorities (p_queue text, p_workflow text)
  returns setof integer language sql stable as $$
  with recursive levels (priority) as (
    select max(priority) from tidebase.runs
     where queue = p_queue and workflow_name = p_workflow and status = 'queued'
    union all
    select (select max(r.priority) from tidebase.runs r where r.queue = p_queue and r.workflow_name = p_workflow
               and r.status = 'queued' and r.priority < levels.priority)
      from levels where levels.priority is not null
  )
  select priority from levels where priority is not null
$$;

-- The first p_limit ready runs of these workflows, by priority, then run_at: the first of each, merged.
create or replace function tidebase._ready_of (p_queue text, p_workflows text[], p_limit integer, p_now timestamptz)
  returns setof text language sql stable as $$
  select ready.id from unnest(p_workflows) as workflow, tidebase._priorities(p_queue, workflow) as level,
         lateral (select id, run_at from tidebase.runs
                   where queue = p_queue and workflow_name = workflow and status = 'queued' and priority = level
                     and run_at <= p_now
                   order by run_at limit p_limit) ready
   order by level desc, ready.run_at limit p_limit
$$;

-- Locks and answers at most p_limit ready runs that nobody else is just taking, by priority, then run_at; of these
-- workflows, or of all. A priority at a time: within one the index is ordered by run_at, so the scan ends at the first
-- run that is not due, however many are delayed.
create or replace function tidebase._take_ready (p_queue text, p_limit integer, p_now timestamptz,
                                                 p_workflows text[] default null)
  returns text[] language plpgsql as $$
declare
  v_look  integer := p_limit + 20;  -- more than are to be taken, since others may be taking the first
  v_ready text[];
  v_ids   text[] := '{}';
begin
  if p_workflows is null then
    return array(
      select ready.id from tidebase._priorities(p_queue) as level,
             lateral (select id from tidebase.runs
                       where queue = p_queue and status = 'queued' and priority = level and run_at <= p_now
                       order by run_at limit p_limit for no key update skip locked) ready
       limit p_limit);
  end if;
  while cardinality(v_ids) < p_limit loop
    v_ready := array(select * from tidebase._ready_of(p_queue, p_workflows, v_look, p_now));
    v_ids := array(select id from tidebase.runs where id = any (v_ready) and status = 'queued' and run_at <= p_now
                    order by priority desc, run_at limit p_limit for no key update skip locked);
    exit when cardinality(v_ready) < v_look;
    v_look := v_look * 4;
  end loop;
  return v_ids;
end $$;

-- The bytes that an answer has up to, and with, each of these runs: their payloads and, if p_checkpoints, the outputs of
-- their completed steps.
create or replace function tidebase._claim_sizes (p_ids text[], p_checkpoints boolean)
  returns table (n bigint, id text, total bigint) language sql stable as $$
  select n, id, sum(bytes) over (order by n)::bigint
    from (select taken.n, taken.id, tidebase._text_bytes(r.input) + tidebase._text_bytes(r.error)
                 + tidebase._bytes(r.metadata) + case when p_checkpoints and r.event_seq > 1 then (  -- else it has no steps
                   select coalesce(sum(tidebase._text_bytes(s.output)), 0) from tidebase.steps s
                    where s.run_id = taken.id and s.status = 'completed') else 0 end as bytes
            from unnest(p_ids) with ordinality as taken (id, n) join tidebase.runs r on r.id = taken.id) as measured
$$;

-- Takes the locks of those queues that have a cap, in the order of their names, so that two claimers that list them
-- differently do not wait for each other.
create or replace function tidebase._lock_capped (p_queues text[]) returns void language plpgsql as $$
declare
  v_name text;
begin
  for v_name in select name from tidebase.queues where name = any (p_queues)
                   and (concurrency is not null or rate_per_minute is not null) order by name
  loop
    perform pg_advisory_xact_lock(hashtextextended('tidebase.queue.' || v_name, 0));
  end loop;
end $$;

-- Gives ready runs to a worker: queues in the order given, then by priority, then by run_at; none to two. Of these
-- workflows, or of all; but of many runs only the first whose payloads come to less than about 8 MiB.
-- A repeat with the same p_id answers what the first call took and the owner still holds; past 8 MiB, which what
-- was recorded since may come to, without more checkpoints, "checkpointsTruncated".
-- Leaves   each run running under p_lease_owner's lease, attempt + 1, event run.claimed.
-- Returns  {"runs", "leaseOwner"}, null when nothing is ready or the caps are reached. With p_checkpoints each run
--          carries its "checkpoints" and "checkpointsTruncated".
create or replace function tidebase.claim_runs (p_queues text[], p_lease_owner text, p_id text, p_limit integer,
                                                p_lease_ms integer, p_checkpoints boolean,
                                                p_workflows text[] default null)
  returns json language plpgsql
  set plan_cache_mode = force_generic_plan  -- else it is planned anew at every claim, for longer than it runs
  set enable_seqscan = off as $$            -- a plan made while the table was tiny is kept while it grows
declare
  v_limit   constant bigint := 8 * 1024 * 1024;
  v_now     timestamptz;
  v_ids     text[] := '{}';
  v_queue   text;
  v_claimed integer;
begin
  if p_id is not null then
    v_ids := array(select id from tidebase.runs where queue = any (p_queues) and lease_owner = p_lease_owner
                      and status = 'running' and not stalled and claim_id = p_id
                    order by array_position(p_queues, queue), priority desc, run_at, id);
    if cardinality(v_ids) > 0 then
      return tidebase._claimed_json(v_ids, p_lease_owner, p_checkpoints);
    end if;
  end if;
  perform tidebase._lock_capped(p_queues);
  v_now := tidebase.now();
  foreach v_queue in array p_queues loop
    exit when cardinality(v_ids) >= p_limit;
    v_ids := v_ids || tidebase._take_ready(v_queue, tidebase._queue_room(v_queue, p_limit - cardinality(v_ids)), v_now,
                                           p_workflows);
  end loop;
  if cardinality(v_ids) = 0 then
    return null;
  elsif cardinality(v_ids) > 1 then
    v_ids := array(select id from tidebase._claim_sizes(v_ids, p_checkpoints) where n = 1 or total <= v_limit order by n);
  end if;
  for v_queue, v_claimed in
    with claimed as (
      update tidebase.runs
         set status = 'running', attempt = attempt + 1, lease_owner = p_lease_owner, lease_ms = p_lease_ms,
             lease_expires_at = v_now + tidebase._ms(p_lease_ms), fence = fence + 1, claim_id = p_id,
             former_owners = array_remove(array_remove(former_owners || settled_by, p_lease_owner), null),
             offered_at = null, event_seq = event_seq + 1, updated_at = v_now
       where id = any (v_ids) returning id, event_seq, queue, attempt
    ), with_events as (
      insert into tidebase.events (run_id, seq, type, payload, created_at)
      select id, event_seq, 'run.claimed', json_build_object('leaseOwner', p_lease_owner, 'queue', queue,
                                                             'attempt', attempt), v_now
        from claimed
    )
    select queue, count(*) from claimed group by queue
  loop
    perform tidebase._count_claims(v_queue, v_claimed);
  end loop;
  return tidebase._claimed_json(v_ids, p_lease_owner, p_checkpoints);
end $$;

-- What claim_runs answers for these runs, in this order.
create or replace function tidebase._claimed_json (p_ids text[], p_lease_owner text, p_checkpoints boolean)
  returns json language plpgsql stable as $$
declare
  v_limit  constant bigint := 4 * 1024 * 1024;  -- with the 4 MiB of one more run's checkpoints, 8 MiB
  v_before constant text[] := case when p_checkpoints then p_ids[:cardinality(p_ids) - 1] else '{}' end;
begin
  return (
    select json_build_object('leaseOwner', p_lease_owner, 'runs', json_agg(
             case when p_checkpoints then tidebase._claimed_run(r, coalesce(before.total, 0) <= v_limit)
                  else tidebase._run_json(r) end order by claimed.n))
      from unnest(p_ids) with ordinality as claimed (id, n)
      join tidebase.runs r on r.id = claimed.id
      left join tidebase._claim_sizes(v_before, true) as before on before.n = claimed.n - 1);
end $$;

-- A claimed run with its checkpoints; without p_room, without them. They and the payloads are members of their own, since
-- to take JSON apart reads all of it, and refuses the \u0000 that a payload may have.
create or replace function tidebase._claimed_run (p_run tidebase.runs, p_room boolean)
  returns json language plpgsql stable as $$
begin
  if not p_room or p_run.event_seq <= 2 then  -- enqueued and claimed: it has no steps
    return tidebase._joined(tidebase._run_json(p_run), json_build_object('checkpoints', '[]'::json,
                                                                         'checkpointsTruncated', not p_room));
  end if;
  return (select json_object_agg(key, case key when 'input' then p_run.input when 'result' then p_run.result
                                               when 'error' then p_run.error else value end) from (
            select * from json_each(tidebase._run_shown(p_run, null, p_run.metadata, null, null, p_run.waiting_for))
            union all
            select more.* from tidebase._checkpoints(p_run.id) c,
                   lateral (values ('checkpoints', c.checkpoints),
                                   ('checkpointsTruncated', to_json(c.truncated))) as more) as members);
end $$;

-- Sets what p_config names of {concurrency, rate_per_minute, invoke_url, paused}; null clears.    Returns  {"config"}.
create or replace function tidebase.configure_queue (p_queue text, p_config jsonb) returns json language plpgsql as $$
declare
  v_queue tidebase.queues;
begin
  insert into tidebase.queues (name) values (p_queue) on conflict do nothing;
  update tidebase.queues q
     set (concurrency, rate_per_minute, invoke_url, paused) = (
           select c.concurrency, c.rate_per_minute, c.invoke_url, c.paused from jsonb_populate_record(q, p_config) as c)
   where name = p_queue returning * into v_queue;
  return json_build_object('config', tidebase._queue_json(v_queue));
end $$;

-- Every queue that has, or had, runs or a configuration. Live runs are counted, ended ones were tallied.
create or replace function tidebase.list_queues () returns json language sql stable as $$
  with live as (
    select queue, count(*) filter (where status = 'queued') as queued,
           count(*) filter (where status = 'running') as running, count(*) filter (where status = 'waiting') as waiting,
           min(run_at) filter (where status = 'queued') as oldest
      from tidebase.runs where queue is not null and status in ('queued', 'running', 'waiting') group by queue
  ), ended as (
    select queue, sum(runs) filter (where status = 'failed') as failed,
           sum(runs) filter (where status = 'completed') as completed,
           sum(runs) filter (where status = 'cancelled') as cancelled
      from tidebase.queue_tallies group by queue
  ), names as (
    select queue as name from live union select queue from ended union select name from tidebase.queues
  )
  select json_build_object('queues', coalesce(json_agg(json_build_object(
           'name', n.name, 'queued', coalesce(live.queued, 0), 'running', coalesce(live.running, 0),
           'waiting', coalesce(live.waiting, 0), 'failed', coalesce(ended.failed, 0),
           'completed', coalesce(ended.completed, 0), 'cancelled', coalesce(ended.cancelled, 0),
           'oldestReadyMs', case when live.oldest <= tidebase.now()
                            then (extract(epoch from tidebase.now() - live.oldest) * 1000)::bigint end,
           'config', case when q.name is not null then tidebase._queue_json(q)
                     else tidebase._queue_json((n.name, null, null, null, false)) end) order by n.name), '[]'))
    from names n left join live on live.queue = n.name left join ended on ended.queue = n.name
    left join tidebase.queues q on q.name = n.name
$$;

-- ------------------------------------------------------------------------------
-- Many writes in one transaction: what workers have ready at the same time, for one commit.
-- ------------------------------------------------------------------------------

-- One write. p_write: {do, …}, where do names the verb, with its arguments by name; but payloads beside it: the input of
-- a step or a new run; a step's output or a run's result; a step's error.
-- Returns  the verb's answer and HTTP status.
create or replace function tidebase._write_one (p_write jsonb, p_input json, p_output json, p_error json,
                                               out body json, out status integer)
  language plpgsql as $$
begin
  status := 200;
  case p_write->>'do'
    when 'record_step' then
      body := tidebase.record_step(
        p_write->>'run_id', p_write->>'lease_owner', p_write->>'name', p_write->>'input_hash', p_input,
        (p_write->'options')::json, p_output, p_error, (p_write->>'retryable')::boolean, p_write->>'resume_decision',
        (p_write->>'started_at')::timestamptz, (p_write->>'duration_ms')::bigint, (p_write->>'brief')::boolean);
    when 'begin_step' then
      select b.body, b.status into body, status
        from tidebase.begin_step(
               p_write->>'run_id', p_write->>'name', p_write->>'input_hash', p_input, (p_write->'options')::json,
               p_write->>'lease_owner', (p_write->>'lease_ms')::integer) b;
    when 'complete_step' then
      body := tidebase.complete_step(p_write->>'run_id', p_write->>'step_id', p_write->>'lease_owner', p_output);
    when 'fail_step' then
      body := tidebase.fail_step(p_write->>'run_id', p_write->>'step_id', p_write->>'lease_owner', p_error,
                                 (p_write->>'retryable')::boolean, p_write->>'resume_decision');
    when 'complete_run' then
      body := tidebase.complete_run(p_write->>'run_id', p_write->>'lease_owner', p_output,
                                    coalesce((p_write->>'brief')::boolean, false));
    when 'fail_run' then
      body := tidebase.fail_run(p_write->>'run_id', p_write->>'lease_owner', p_error, p_write->>'failure_class',
                                (p_write->>'retryable')::boolean);
    when 'enqueue_run' then
      body := tidebase.enqueue_run(p_write->>'queue', p_write, p_input);
    when 'create_child' then
      body := tidebase.create_child(p_write->>'run_id', p_write, p_input);
  end case;
end $$;

-- Many writes, their payloads in the same order: see _write_one. Each stands or falls alone.
-- Chained  a write with "chained": true is refused (TB409 prior_refused) when an earlier write of the same run in this
--          call was refused. So of a run's chained writes those that are durable are a prefix. A begin that is answered
--          with 409 manual_review counts as refused; an answer that was only too large (413) does not.
-- Locks    dedupe keys (_lock_keys), then all runs that may change, in the order of their ids, in which a parent is
--          before its child unless somebody chose the ids: so two batches do not wait for each other. Those that make
--          runs with the same chosen ids in different orders do, and one of them is to be sent again (40P01).
-- Leaves   what each verb leaves; those of one run in the order given.
-- Returns  in the order given, each verb's answer, or {"error", "code", …} where it refuses, and its HTTP status. After
--          60 refusals the rest is not reached: its answers are null, and it is for another call, in the same order. A
--          chained write is answered by the call that refused an earlier write of its run. Past p_room bytes, answers
--          come without payloads, see _brief_answer.
-- The only write of a call is made by itself, see _write_part: the usual case of a client that has one run at a time. Of
-- several, first the plain ones are made, by a statement for each kind: see _write_plain and _enqueue_plain. The others
-- follow one by one.
create or replace function tidebase.write_each (p_writes jsonb, p_inputs json[], p_outputs json[], p_errors json[],
                                                p_room bigint default 16777216)
  returns table (body json, status integer) language plpgsql
  set plan_cache_mode = force_generic_plan
  set enable_seqscan = off as $$
declare
  v_count    constant integer := jsonb_array_length(p_writes);
  v_verbs    text[];
  v_run_ids  text[];
  v_ending   text[];
  v_plain    json[] := array_fill(null::json, array[v_count]);  -- the answers to the plain writes, in their places
  v_made     bigint;            -- how many these are
  v_bodies   json[] := '{}';
  v_statuses integer[] := '{}';
  v_refused  text[] := '{}';    -- the runs of which a write was refused
  v_room     bigint;            -- left of p_room
  v_part     record;
begin
  if v_count = 1 then
    v_part := tidebase._write_part(p_writes, p_inputs, p_outputs, p_errors, '{}', 1, 1, '{}', p_room);
    body := v_part.bodies[1];
    status := v_part.statuses[1];
    return next;
    return;
  end if;
  select array_agg(w->>'do'), array_agg(w->>'run_id'),
         array_agg(w->>'run_id') filter (where w->>'do' in ('complete_run', 'fail_run'))
    into v_verbs, v_run_ids, v_ending from jsonb_array_elements(p_writes) as w;
  if 'enqueue_run' = any (v_verbs) then
    perform tidebase._lock_keys(p_writes);
  end if;
  perform from tidebase.runs
    where id = any (v_run_ids || array(select parent_run_id from tidebase.runs
                                        where id = any (v_ending) and parent_run_id is not null))
    order by id for no key update;
  if v_verbs && array['record_step', 'complete_run'] then
    v_plain := tidebase._write_plain(p_writes, p_inputs, p_outputs, p_errors, v_plain);
  end if;
  if 'enqueue_run' = any (v_verbs) then
    v_plain := tidebase._enqueue_plain(p_writes, p_inputs, v_run_ids, v_plain);
  end if;
  select count(plain), p_room - coalesce(sum(octet_length(plain::text)), 0) into v_made, v_room
    from unnest(v_plain) as plain;
  if v_made = v_count then
    v_bodies := v_plain;
    v_statuses := array_fill(200, array[v_count]);
  end if;
  for part in 1 .. 60 loop
    exit when cardinality(v_bodies) = v_count;
    v_part := tidebase._write_part(p_writes, p_inputs, p_outputs, p_errors, v_plain, cardinality(v_bodies) + 1, v_count,
                                   v_refused, v_room);
    v_bodies := v_bodies || v_part.bodies;
    v_statuses := v_statuses || v_part.statuses;
    v_refused := v_part.refused;
    v_room := v_part.room;
  end loop;
  for n in cardinality(v_bodies) + 1 .. v_count loop  -- not reached
    v_bodies[n] := coalesce(v_plain[n], case when tidebase._is_prior_refused(p_writes->(n - 1), v_refused)
                                        then tidebase._prior_refused(p_writes->(n - 1)) end);
    v_statuses[n] := case when v_plain[n] is null then 409 else 200 end;
  end loop;
  return query select * from unnest(v_bodies, v_statuses);
end $$;

-- Writes one by one, from p_from on, up to the first that is refused; and answers all of them, those in p_plain with that.
-- They are in one subtransaction. Where one is refused, all are undone, and those before it are written once more. So
-- there is one subtransaction for each refusal: PostgreSQL keeps 64 of a transaction in memory, and beyond them all other
-- transactions get slower.
-- p_refused: the runs of which a write was refused. p_room: what the answers may take, in bytes. Both are returned as they
-- are afterwards.
create or replace function tidebase._write_part (p_writes jsonb, p_inputs json[], p_outputs json[], p_errors json[],
                                                 p_plain json[], p_from integer, p_until integer, p_refused text[],
                                                 p_room bigint, out bodies json[], out statuses integer[],
                                                 out refused text[], out room bigint) language plpgsql as $$
declare
  v_at     integer;
  v_write  jsonb;
  v_answer record;
  v_body   json;
  v_words  text;
  v_state  text;
  v_detail text;
begin
  bodies := '{}';
  statuses := '{}';
  refused := p_refused;
  room := p_room;
  begin
    for n in p_from .. p_until loop
      v_at := n;
      v_write := p_writes->(n - 1);
      if p_plain[n] is not null then
        select p_plain[n] as body, 200 as status into v_answer;
      elsif tidebase._is_prior_refused(v_write, refused) then
        select tidebase._prior_refused(v_write) as body, 409 as status into v_answer;
      else
        v_answer := tidebase._write_one(v_write, p_inputs[n], p_outputs[n], p_errors[n]);
        if v_answer.status = 409 then
          refused := refused || (v_write->>'run_id');
        end if;
        if octet_length(v_answer.body::text) > room then
          v_answer := tidebase._brief_answer(v_write->>'do', v_answer.body, v_answer.status);
        end if;
        room := room - octet_length(v_answer.body::text);
      end if;
      bodies := bodies || v_answer.body;
      statuses := statuses || v_answer.status;
    end loop;
    return;
  exception when others then
    get stacked diagnostics v_words = message_text, v_state = returned_sqlstate, v_detail = pg_exception_detail;
    if v_state !~ '^TB' then
      raise;
    end if;
  end;
  select * into bodies, statuses, refused, room
    from tidebase._write_part(p_writes, p_inputs, p_outputs, p_errors, p_plain, p_from, v_at - 1, p_refused, p_room);
  if cardinality(bodies) = v_at - p_from then  -- else an earlier one is refused now, since time went on
    v_body := tidebase._joined(json_build_object('error', v_words), tidebase.refusal_body(v_detail::json));
    if octet_length(v_body::text) > room then
      v_body := json_build_object('error', v_words, 'code', v_detail::json->'code', 'payloadOmitted', true);
    end if;
    bodies := bodies || v_body;
    statuses := statuses || substr(v_state, 3)::integer;
    refused := refused || (v_write->>'run_id');
    room := room - octet_length(v_body::text);
  end if;
end $$;

create or replace function tidebase._is_prior_refused (p_write jsonb, p_refused text[])
  returns boolean language sql immutable as
$$ select p_write->'chained' = 'true' and p_write->>'run_id' = any (p_refused) $$;

create or replace function tidebase._prior_refused (p_write jsonb) returns json language sql immutable as $$
  select json_build_object('error', format('an earlier write of run %s was refused', p_write->>'run_id'),
                           'code', 'prior_refused')
$$;

-- The answer to a write of a batch whose answers have no room for it. Of a step or a run that was ended it is the id and
-- the status. Of other writes it says that the write, which was made, is to be sent again by itself for its answer.
create or replace function tidebase._brief_answer (p_verb text, p_body json, p_status integer, out body json,
                                                   out status integer) language plpgsql as $$
declare
  v_ended json := tidebase._readable(p_body)->case p_verb when 'complete_run' then 'run' else 'step' end;
begin
  status := p_status;
  if p_status = 200 and p_verb in ('record_step', 'complete_step') then
    body := json_build_object('step', tidebase._mark_omitted(tidebase._brief_step(
              v_ended->>'id', v_ended->>'name', v_ended->>'status', (v_ended->>'attempt')::integer)));
  elsif p_status = 200 and p_verb = 'complete_run' then
    body := json_build_object('run', tidebase._mark_omitted(tidebase._brief_run(v_ended->>'id', v_ended->>'status')));
  else
    body := json_build_object('code', 'batch_too_large', 'error',
                              'the answers to this batch are too large together: send this write again by itself');
    status := 413;
  end if;
end $$;

-- The plain writes of a batch: those that leave nothing to decide, so that they can be made set-based. All of these hold:
--   its run is running, and held by the owner that the write names; the write comes with brief
--   it records a step that completed, and that the run does not have yet
--   or it completes a run that has no parent and no channels; it is the last write of its run; and no dedupe key that the
--   run has is enqueued by the batch, which would come too early then
--   all writes of its run before it in the batch are plain
-- Returns  of each its place n in the batch, its columns, and what it needs of its run; and its event numbers: `events` of
--          them, two of a step and one of a run, from seq on.
create or replace function tidebase._plain_writes (p_writes jsonb, p_inputs json[], p_outputs json[], p_errors json[],
                                                   p_keyed boolean)
  returns table (n bigint, verb text, run_id text, lease_owner text, name text, input_hash text, options json,
                 started_at timestamptz, duration_ms bigint, input json, output json, fence integer, queue text,
                 seq integer, events integer) language sql stable as $$
  with given as (
    select *, coalesce(named_id, new_id) as run_id,  -- enqueue_run may ask for a run by its id
           case verb when 'complete_run' then 1 else 2 end as events
      from rows from (
           jsonb_to_recordset(p_writes) as ("do" text, run_id text, id text, lease_owner text, name text,
             input_hash text, options json, brief boolean, started_at timestamptz, duration_ms bigint),
           unnest(p_inputs), unnest(p_outputs), unnest(p_errors)) with ordinality
         as w (verb, named_id, new_id, lease_owner, name, input_hash, options, brief, started_at, duration_ms, input,
               output, error, n)
  ), judged as (
    select g.*, r.fence, r.queue, r.event_seq,
           (r.status = 'running' and r.lease_owner = g.lease_owner and g.brief and case g.verb
              when 'record_step' then
                g.error is null and row_number() over (partition by g.run_id, g.name order by g.n) = 1
                and (select s.id from tidebase.steps s  -- not "not exists", which PostgreSQL may answer by a scan
                      where s.run_id = g.run_id and s.name = g.name) is null
              when 'complete_run' then
                r.parent_run_id is null and not r.has_channels and not (p_keyed and r.dedupe_key is not null)
                and lead(g.n) over (partition by g.run_id order by g.n) is null
              else false end) is true as is_plain
      from given g join tidebase.runs r on r.id = g.run_id
  ), placed as (
    select *, event_seq + (sum(events) over so_far)::integer - events + 1 as seq, bool_and(is_plain) over so_far as is_first
      from judged window so_far as (partition by run_id order by n)
  )
  select n, verb, run_id, lease_owner, name, input_hash, options, started_at, duration_ms, input, output, fence, queue, seq,
         events
    from placed where is_first order by n
$$;

-- Makes the plain writes of a batch in one statement, as record_step and complete_run would.    Needs  the runs locked.
-- Returns  p_answers, with those of the plain writes in their places.
create or replace function tidebase._write_plain (p_writes jsonb, p_inputs json[], p_outputs json[], p_errors json[],
                                                  p_answers json[])
  returns json[] language plpgsql
  set plan_cache_mode = force_generic_plan
  set enable_seqscan = off   -- a plan made while the tables were tiny is kept while they grow: it must find each row by
  set enable_hashjoin = off  -- an index
  set enable_mergejoin = off as $$
declare
  v_now   timestamptz := tidebase.now();
  v_keyed constant boolean := tidebase._are_keyed(p_writes);
  v_made  record;
begin
  for v_made in
    with made as materialized (
      select *, case verb when 'record_step' then tidebase._new_id('step') end as step_id,
             case verb when 'record_step' then tidebase._contract(options) end as contract
        from tidebase._plain_writes(p_writes, p_inputs, p_outputs, p_errors, v_keyed)
    ), with_steps as (
      insert into tidebase.steps (id, run_id, name, position, input_hash, input, options, contract, status, output,
                                  settled_by, fence, started_at, completed_at, created_at, updated_at)
      select step_id, run_id, name, seq, input_hash, input, options, contract, 'completed', output, lease_owner, fence,
             coalesce(started_at, v_now - tidebase._ms(duration_ms), v_now), v_now, v_now, v_now
        from made where verb = 'record_step'
    ), with_events as (
      insert into tidebase.events (run_id, seq, type, payload, created_at)
      select run_id, e.seq, e.type, e.payload, v_now
        from made m cross join lateral (
               select m.seq, 'step.started' as type, tidebase._step_started(step_id, name, 1, contract) as payload
                where verb = 'record_step'
               union all
               select m.seq + 1, 'step.completed', tidebase._step_completed(step_id, name, contract)
                where verb = 'record_step'
               union all
               select m.seq, 'run.completed', json_build_object('result', output) where verb = 'complete_run') as e
    ), with_runs as (
      update tidebase.runs r
         set event_seq = r.event_seq + w.events, updated_at = v_now, stalled = false,
             status = case when w.ends then 'completed' else r.status end,
             result = case when w.ends then w.result end,
             error = case when not w.ends then r.error end,
             settled_by = case when w.ends then r.lease_owner else r.settled_by end,
             lease_owner = case when not w.ends then r.lease_owner end,
             lease_expires_at = case when not w.ends then v_now + tidebase._ms(r.lease_ms) end,
             completed_at = case when w.ends then v_now end
        from (select run_id, sum(events)::integer as events, bool_or(verb = 'complete_run') as ends,
                     (array_agg(output) filter (where verb = 'complete_run'))[1] as result
                from made group by run_id) as w
       where r.id = w.run_id
    ), with_tallies as (
      insert into tidebase.queue_tallies
      select queue, 'completed', count(*) from made where verb = 'complete_run' and queue is not null group by queue
    )
    select n, case verb
             when 'record_step' then json_build_object('step', tidebase._brief_step(step_id, name, 'completed', 1))
             else json_build_object('run', tidebase._brief_run(run_id, 'completed')) end as answer
      from made
  loop
    p_answers[v_made.n] := v_made.answer;
  end loop;
  return p_answers;
end $$;

-- Inserts, in one statement, the new runs of a batch that have no dedupe key and no id that another write of it names,
-- unless their id is taken. It leaves what enqueue_run would.
-- Returns  p_answers, with those of the new runs in their places.
create or replace function tidebase._enqueue_plain (p_writes jsonb, p_inputs json[], p_run_ids text[], p_answers json[])
  returns json[] language plpgsql as $$
declare
  v_jobs   jsonb;
  v_inputs json[];
  v_places integer[];
  v_new    record;
begin
  select jsonb_agg(job order by n), array_agg(input order by n), array_agg(n::integer order by n)
    into v_jobs, v_inputs, v_places
    from (select *, job->>'id' as id, count(*) over (partition by job->>'id') as times
            from rows from (jsonb_array_elements(p_writes), unnest(p_inputs)) with ordinality as w (job, input, n)) as w
   where job->>'do' = 'enqueue_run' and job->>'dedupe_key' is null
     and (id is null or (times = 1 and (id = any (p_run_ids)) is not true));
  for v_new in
    select i.n, json_build_object('run', tidebase._run_json(i.run), 'deduplicated', false) as answer
      from tidebase._insert_runs(v_jobs, v_inputs) i
  loop
    p_answers[v_places[v_new.n]] := v_new.answer;
  end loop;
  return p_answers;
end $$;

-- ------------------------------------------------------------------------------
-- Schedules: Python knows cron, so it brings the next time along; that a time fires once is decided here.
-- ------------------------------------------------------------------------------

-- Sets a schedule. Its next time moves only when when it fires changed, so that setting it again skips nothing; one
-- that is disabled shows when it would fire, and enabled again it fires from then on.
-- Returns  {"schedule"}.
create or replace function tidebase.set_schedule (p_name text, p_cron text, p_timezone text, p_workflow_name text,
                                                  p_input json, p_queue text, p_max_attempts integer,
                                                  p_enabled boolean, p_next_run_at timestamptz)
  returns json language plpgsql as $$
declare
  v_schedule tidebase.schedules;
begin
  insert into tidebase.schedules as s (name, cron, timezone, workflow_name, input, queue, max_attempts, enabled,
                                       next_run_at)
  values (p_name, p_cron, p_timezone, p_workflow_name, p_input, p_queue, p_max_attempts, p_enabled, p_next_run_at)
  on conflict (name) do update
     set cron = p_cron, timezone = p_timezone, workflow_name = p_workflow_name, input = p_input, queue = p_queue,
         max_attempts = p_max_attempts, enabled = p_enabled, updated_at = tidebase.now(),
         next_run_at = case when s.enabled and s.cron = p_cron and s.timezone = p_timezone then s.next_run_at
                            else p_next_run_at end
  returning * into v_schedule;
  return json_build_object('schedule', tidebase._schedule_json(v_schedule));
end $$;

-- By name, without inputs of more than 64 KiB.    Returns  {"schedules"}.
create or replace function tidebase.list_schedules () returns json language sql stable as $$
  select json_build_object('schedules', coalesce(json_agg(
           case when m.is_shown then tidebase._schedule_json(s)
                else tidebase._mark_omitted(tidebase._schedule_shown(s, null)) end order by s.name), '[]'))
    from tidebase.schedules s
    join (select name, tidebase._bytes(input) <= 65536
                       and sum(tidebase._bytes_in_list(input)) over (order by name) <= tidebase._budget() as is_shown
            from tidebase.schedules) as m on m.name = s.name
$$;

-- Returns  {"deleted": name}; TB404 when there is none.
create or replace function tidebase.delete_schedule (p_name text) returns json language plpgsql as $$
begin
  delete from tidebase.schedules where name = p_name;
  if not found then
    perform tidebase._refuse(404, 'not_found', format('schedule %s does not exist', p_name));
  end if;
  return json_build_object('deleted', p_name);
end $$;

-- The database's time, and the schedules, disabled ones among them, whose time has come at it.
-- Returns  {"now", "schedules": [{"name", "cron", "timezone", "nextRunAt"}]}.
create or replace function tidebase.due_schedules () returns json language sql volatile as $$
  select json_build_object('now', tidebase._iso(at), 'schedules', (
           select coalesce(json_agg(tidebase._schedule_shown(s, null) order by s.next_run_at), '[]')
             from tidebase.schedules s where s.next_run_at <= at))
    from tidebase.now() as at
$$;

-- Enqueues a schedule's run, with metadata {"schedule", "fireTime": p_at}. p_keys: {"id"?, "dedupe_key"?} of the job.
create or replace function tidebase._enqueue_scheduled (p_schedule tidebase.schedules, p_at timestamptz, p_keys jsonb)
  returns tidebase.runs language plpgsql as $$
begin
  return (tidebase._enqueue(p_schedule.queue, p_keys || jsonb_build_object(
            'workflow_name', p_schedule.workflow_name, 'channels', '[]'::jsonb, 'priority', 0,
            'metadata', jsonb_build_object('schedule', p_schedule.name, 'fireTime', tidebase._iso(p_at)),
            'max_attempts', p_schedule.max_attempts), p_schedule.input)).run;
end $$;

-- Fires a schedule for the time it was due at, unless another server did or it was changed meanwhile; one that is
-- disabled only moves on.
-- Leaves   a run on its queue, with the dedupe key sched:NAME:TIME; the schedule at its next time. A run of another
--          workflow that somebody gave this very key stands for it.
-- Returns  how many fired: 1 or 0.
create or replace function tidebase.fire_schedule (p_name text, p_fire_at timestamptz, p_next_run_at timestamptz)
  returns integer language plpgsql
  set lock_timeout = '5s' as $$
declare
  v_schedule tidebase.schedules;
begin
  update tidebase.schedules set next_run_at = p_next_run_at,
         last_enqueued_at = case when enabled then tidebase.now() else last_enqueued_at end
   where name = p_name and next_run_at = p_fire_at returning * into v_schedule;
  if not found or not v_schedule.enabled then
    return 0;
  end if;
  perform tidebase._enqueue_scheduled(v_schedule, p_fire_at, jsonb_build_object(
            'dedupe_key', format('sched:%s:%s', p_name, tidebase._iso(p_fire_at))));
  return 1;
exception when sqlstate 'TB409' then  -- the key is taken: else the schedule would stand still for as long as that run
  update tidebase.schedules set next_run_at = p_next_run_at where name = p_name and next_run_at = p_fire_at;
  return 0;
end $$;

-- Enqueues a schedule's run now. Its next fire stays as it is.
-- Needs    the schedule (TB404 not_found); p_id not another workflow's (TB409 run_id_conflict).
-- Leaves   a run on its queue; the same p_id again nothing.    Returns  {"run"}.
create or replace function tidebase.run_schedule (p_name text, p_id text) returns json language plpgsql as $$
declare
  v_now      timestamptz := tidebase.now();
  v_schedule tidebase.schedules;
begin
  select * into v_schedule from tidebase.schedules where name = p_name for update;
  if not found then
    perform tidebase._refuse(404, 'not_found', format('schedule %s does not exist', p_name));
  elsif not exists (select from tidebase.runs where id = p_id) then
    update tidebase.schedules set last_enqueued_at = v_now where name = p_name;
  end if;
  return json_build_object('run', tidebase._run_json(
           tidebase._enqueue_scheduled(v_schedule, v_now, jsonb_build_object('id', p_id))));
end $$;

-- ------------------------------------------------------------------------------
-- The run detail: `stable`, so that all that it reads is of one instant.
-- ------------------------------------------------------------------------------

-- A run with all that belongs to it. The run and its state come whole; the lists share _budget() bytes. Where a list has
-- no more room, "truncated" has its key and in that where to go on: after which item, or, newest first, before which. The
-- first step comes in any case, and the last MiB is for events alone.
-- Returns  the detail with the keys of p_include (null: all); null when there is no such run. p_asked as for _why;
--          without p_tokens what holds a gate's token comes without it.
-- Plans    each list by itself, so that its plan is kept: to plan them all at each call takes longer than to read. Row
--          by row, so that no more is read than there is room for.
create or replace function tidebase.run_detail (p_run_id text, p_include text[], p_asked jsonb default '{}',
                                                p_tokens boolean default true) returns json
  language plpgsql stable set enable_seqscan = off as $$  -- as claim_runs
declare
  v_keys   text[] := array(  -- in the order in which they get their room
    select key from unnest(array['run', 'state', 'gates', 'runEdges', 'recoveryAttempts', 'channels', 'usage', 'steps',
                                 'stateStreams', 'stateVersions', 'childRuns', 'channelDeliveries', 'events']) as key
     where p_include is null or key = any (p_include));
  v_key    text;
  v_part   json;
  v_parts  json[] := '{}';
  v_rows   refcursor;  -- of a list: where a reader goes on who has the item, and the item
  v_list   record;
  v_left   integer := tidebase._budget();
  v_cut    jsonb := '{}';
begin
  if not exists (select from tidebase.runs where id = p_run_id) then
    return null;
  end if;
  foreach v_key in array v_keys loop
    case v_key
      when 'run' then
        v_part := (select tidebase._joined(tidebase._run_json(r), tidebase._why(r.id, tidebase._queue_facts(
                            case when r.status = 'queued' then array[r.queue] else '{}' end, p_asked), tidebase.now()))
                     from tidebase.runs r where r.id = p_run_id);
      when 'state' then
        v_part := (select tidebase._state_json(s) from tidebase.states s where s.run_id = p_run_id);
      when 'gates' then
        open v_rows for select g.id, tidebase._gate_json(g, p_tokens)
          from tidebase.gates g where g.run_id = p_run_id order by g.created_at, g.id;
      when 'stateStreams' then
        open v_rows for select s.id, tidebase._stream_json(s)
          from tidebase.state_streams s where s.run_id = p_run_id order by s.created_at, s.id;
      when 'runEdges' then
        open v_rows for select e.id, tidebase._edge_json(e)
          from tidebase.run_edges e where e.parent_run_id = p_run_id order by e.created_at, e.id;
      when 'recoveryAttempts' then
        open v_rows for select o.seq, tidebase._recovery_json(o)
          from tidebase.outbox o where o.run_id = p_run_id and o.kind in ('recovery', 'push') order by o.seq desc;
      when 'channels' then
        open v_rows for select c.id, tidebase._channel_json(c)
          from tidebase.channels c where c.run_id = p_run_id and c.gate_id is null order by c.id;
      when 'usage' then
        open v_rows for select u.id, tidebase._usage_json(u)
          from tidebase.usage u where u.run_id = p_run_id order by u.created_at, u.id;
      when 'steps' then
        open v_rows for select s.position, tidebase._step_json(s)
          from tidebase.steps s where s.run_id = p_run_id order by s.position;
      when 'stateVersions' then
        open v_rows for select v.id, tidebase._version_json(v)
          from tidebase.state_versions v join tidebase.state_streams s on s.id = v.stream_id
         where v.run_id = p_run_id order by s.name collate "C", v.version;
      when 'childRuns' then
        open v_rows for select c.id, tidebase._run_listed(c, true)
          from tidebase.run_edges e join tidebase.runs c on c.id = e.child_run_id
         where e.parent_run_id = p_run_id order by e.created_at, e.id;
      when 'channelDeliveries' then
        open v_rows for select o.seq, tidebase._delivery_json(o, p_tokens)
          from tidebase.outbox o where o.run_id = p_run_id and o.kind = 'channel' order by o.seq desc;
      when 'events' then
        open v_rows for select e.seq, tidebase._event_json(e)
          from tidebase.events e where e.run_id = p_run_id order by e.seq;
    end case;
    if v_key not in ('run', 'state') then
      v_list := tidebase._fetch_within(v_rows, v_left - case v_key when 'events' then 0 else 1048576 end,
                                       v_key = 'steps');
      close v_rows;
      v_part := array_to_json(v_list.items);
      v_left := v_left - v_list.bytes;
      if v_list.is_cut then
        v_cut := v_cut || jsonb_build_object(v_key, jsonb_build_object(
          case when v_key in ('recoveryAttempts', 'channelDeliveries') then 'before' else 'after' end,
          case when v_key in ('steps', 'events', 'recoveryAttempts', 'channelDeliveries') then to_jsonb(v_list.at::bigint)
               else to_jsonb(v_list.at) end));
      end if;
    end if;
    v_parts := v_parts || v_part;
  end loop;
  if v_cut <> '{}' then
    v_keys := v_keys || 'truncated'::text;
    v_parts := v_parts || v_cut::json;
  end if;
  return (select coalesce(json_object_agg(key, part order by array_position(array[
                   'run', 'steps', 'state', 'stateStreams', 'stateVersions', 'runEdges', 'childRuns', 'recoveryAttempts',
                   'channels', 'channelDeliveries', 'gates', 'usage', 'events'], key)), '{}')
            from unnest(v_keys, v_parts) as parts (key, part));
end $$;

-- The items of a cursor's rows (a place, an item) up to p_room bytes; with p_first, the first in any case. at: the place of
-- the last of them. is_cut: whether there are more.
create or replace function tidebase._fetch_within (p_rows refcursor, p_room integer, p_first boolean, out items json[],
                                                   out bytes integer, out at text, out is_cut boolean)
  language plpgsql stable as $$
declare
  v_at   text;
  v_item json;
begin
  items := '{}';
  bytes := 0;
  loop
    fetch p_rows into v_at, v_item;
    is_cut := found and bytes + octet_length(v_item::text) > p_room and not (p_first and at is null);
    exit when is_cut or not found;
    items := items || v_item;
    bytes := bytes + octet_length(v_item::text);
    at := v_at;
  end loop;
end $$;

-- Returns  {"run"}, and the run's event number to wait from.    TB404 when there is none.
create or replace function tidebase.get_run (p_run_id text, out body json, out seq integer)
  language plpgsql stable as $$
begin
  select json_build_object('run', tidebase._run_json(r)), r.event_seq into body, seq
    from tidebase.runs r where r.id = p_run_id;
  if not found then
    perform tidebase._refuse(404, 'not_found', format('run %s does not exist', p_run_id));
  end if;
end $$;

-- ------------------------------------------------------------------------------
-- The reconciler's verbs: each does a bounded amount of work and returns how much. Any number of servers may call them at
-- once. None waits long for a lock, since those after it would be late.
-- ------------------------------------------------------------------------------

-- Takes expired leases away.
-- Leaves   a run with a queue queued, due at once, while it has attempts left; else failed. A run without a queue keeps its
--          status and is stalled, until somebody begins it: event run.stalled, and its recovery webhook, if any, once.
--          A run that is locked is left to the next call.
-- Returns  how many, and for the log [{"runId", "workflowName", "queue", "leaseOwner", "attempt", "maxAttempts"}].
create or replace function tidebase.expire_leases (p_limit integer, out expired integer, out runs json)
  language plpgsql
  set lock_timeout = '5s' as $$
declare
  v_now   timestamptz := tidebase.now();
  v_due   record;
  v_run   tidebase.runs;
  v_error json := json_build_object('name', 'LeaseExpired', 'message', 'the worker fell silent and its lease expired');
  v_runs  json[] := '{}';
begin
  for v_due in select id, parent_run_id from tidebase.runs
                where status = 'running' and not stalled and lease_expires_at <= v_now
                order by lease_expires_at limit p_limit
  loop
    v_run := tidebase._try_lock_to_end(v_due.id, v_due.parent_run_id);
    continue when (v_run.status = 'running' and not v_run.stalled and v_run.lease_expires_at <= v_now) is not true;
    v_runs := v_runs || json_build_object('runId', v_run.id, 'workflowName', v_run.workflow_name, 'queue', v_run.queue,
                'leaseOwner', v_run.lease_owner, 'attempt', v_run.attempt, 'maxAttempts', v_run.max_attempts);
    v_run.former_owners := v_run.former_owners || v_run.lease_owner;
    if v_run.queue is not null then
      perform tidebase._fail_attempt(v_run, v_error, true, v_now, null, null, 'lease_expired');
    else
      update tidebase.runs set stalled = true, former_owners = v_run.former_owners, event_seq = event_seq + 1,
             updated_at = v_now
       where id = v_run.id returning * into v_run;
      perform tidebase._append_event(v_run.id, v_run.event_seq, 'run.stalled', json_build_object(
                'leaseOwner', v_run.lease_owner, 'attempt', v_run.attempt));
      if v_run.recovery_webhook is not null then
        perform tidebase._start_recovery(v_run, 'lease_expired');
      end if;
    end if;
  end loop;
  expired := cardinality(v_runs);
  runs := array_to_json(v_runs);
end $$;

-- Cancels live runs whose deadline has passed, as cancel_run does. A run that is locked is left to the next call.
-- Returns  how many.
create or replace function tidebase.cancel_overdue (p_limit integer) returns integer language plpgsql
  set lock_timeout = '5s' as $$
declare
  v_now   timestamptz := tidebase.now();
  v_due   record;
  v_run   tidebase.runs;
  v_count integer := 0;
begin
  for v_due in select id, parent_run_id from tidebase.runs where deadline_at is not null and deadline_at <= v_now
                  and status in ('pending', 'queued', 'running', 'waiting') order by deadline_at limit 100 + p_limit
  loop
    v_run := tidebase._try_lock_to_end(v_due.id, v_due.parent_run_id);
    continue when (v_run.status in ('pending', 'queued', 'running', 'waiting')) is not true;
    perform tidebase._cancel(v_run, 'deadline', 'reconciler');
    v_count := v_count + 1;
    exit when v_count >= p_limit;
  end loop;
  return v_count;
end $$;

-- Offers ready runs of push queues (those with an invoke_url) to the app, by a webhook, within the queue's caps.
-- Leaves   each run queued, but due in 60 s: until then it is neither claimed nor offered again. A webhook in the outbox,
--          event recovery.started; an earlier offer of the run that is still pending failed, event recovery.failed.
-- Returns  how many.
create or replace function tidebase.offer_runs (p_limit integer) returns integer language plpgsql
  set lock_timeout = '5s' as $$
declare
  v_now   timestamptz;
  v_queue tidebase.queues;
  v_id    text;
  v_run   tidebase.runs;
  v_old   text;
  v_mine  integer;
  v_count integer := 0;
begin
  for v_queue in select * from tidebase.queues q where invoke_url is not null
                    and exists (select from tidebase.runs where queue = q.name and status = 'queued') order by name
  loop
    perform tidebase._lock_capped(array[v_queue.name]);
    v_now := tidebase.now();
    v_mine := 0;
    foreach v_id in array
      tidebase._take_ready(v_queue.name, tidebase._queue_room(v_queue.name, p_limit), v_now)
    loop
      update tidebase.runs set offered_at = v_now, run_at = v_now + interval '60 seconds'
       where id = v_id returning * into v_run;
      for v_old in update tidebase.outbox set status = 'failed', claimed = false, error_text = 'offered anew',
                          next_attempt_at = null, completed_at = v_now
                    where run_id = v_id and kind = 'push' and status = 'pending' returning id
      loop
        perform tidebase._append_event_and_renew_lease(v_run.id, null, 'recovery.failed', json_build_object(
                  'recoveryAttemptId', v_old, 'reason', 'queue_dispatch', 'httpStatus', null, 'error', 'offered anew'));
      end loop;
      perform tidebase._append_event_and_renew_lease(v_run.id, null, 'recovery.started', json_build_object(
                'recoveryAttemptId', (tidebase._enqueue_webhook('push', v_id, null, null, 'run.invoke',
                                                                'queue_dispatch', v_queue.invoke_url, null)).id,
                'reason', 'queue_dispatch'));
      v_mine := v_mine + 1;
    end loop;
    perform tidebase._count_claims(v_queue.name, v_mine);
    v_count := v_count + v_mine;
  end loop;
  return v_count;
end $$;

-- Cancels pending gates that have expired, event and channels gate.resolved. A gate whose run is locked is left to the next
-- call.    Returns  how many.
create or replace function tidebase.expire_gates (p_limit integer) returns integer language plpgsql
  set lock_timeout = '5s' as $$
declare
  v_now   timestamptz := tidebase.now();
  v_due   record;
  v_run   tidebase.runs;
  v_count integer := 0;
begin
  for v_due in select id, run_id from tidebase.gates
                where status = 'pending' and expires_at is not null and expires_at <= v_now
                order by expires_at limit p_limit
  loop
    select * into v_run from tidebase.runs where id = v_due.run_id for no key update skip locked;
    continue when not found or not exists (select from tidebase.gates where id = v_due.id and status = 'pending');
    perform tidebase._decide_gate(v_run, v_due.id, 'canceled', 'timeout', null);
    v_count := v_count + 1;
  end loop;
  return v_count;
end $$;

-- Ends the waits whose time has come: the runs go back to their queues (_wake); a signal that was waited for is timed out.
-- Returns  how many.
create or replace function tidebase.wake_due (p_limit integer) returns integer language plpgsql
  set lock_timeout = '5s' as $$
declare
  v_now   timestamptz := tidebase.now();
  v_run   tidebase.runs;
  v_count integer := 0;
begin
  for v_run in select * from tidebase.runs where status = 'waiting' and wake_at is not null and wake_at <= v_now
                order by wake_at limit p_limit for no key update skip locked
  loop
    if v_run.waiting_for ? 'event' then
      perform tidebase._add_signal(v_run, null, v_run.waiting_for->>'event',
                                   tidebase._signal_number(v_run.waiting_for), null, true);
    else
      perform tidebase._wake(v_run);
    end if;
    v_count := v_count + 1;
  end loop;
  return v_count;
end $$;

-- Deletes runs that ended more than p_days ago, with all that belongs to them. A child is deleted only after its parent,
-- since a parent that is replayed asks for its children again.    Returns  how many.
create or replace function tidebase.purge_runs (p_days integer, p_limit integer) returns integer language plpgsql as $$
declare
  v_until timestamptz := tidebase.now() - p_days * interval '1 day';
  v_run   record;
  v_count integer := 0;
begin
  for v_run in delete from tidebase.runs where id = any (array(
                 select id from tidebase.runs r where completed_at is not null and completed_at < v_until
                    and (select p.id from tidebase.runs p where p.id = r.parent_run_id) is null  -- no join of all runs
                  order by completed_at limit p_limit for update skip locked)) returning queue, status
  loop
    perform tidebase._tally(v_run.queue, v_run.status, -1);
    v_count := v_count + 1;
  end loop;
  return v_count;
end $$;

-- Sums up the tallies of ended runs when there are more than p_rows, so that list_queues reads few.
-- Returns  0, as one call does all of it.
create or replace function tidebase.fold_tallies (p_rows integer) returns integer language sql as $$
  with folded as (
    delete from tidebase.queue_tallies where (select count(*) from tidebase.queue_tallies) > p_rows returning *
  ), summed as (
    insert into tidebase.queue_tallies select queue, status, sum(runs) from folded group by queue, status
  )
  select 0
$$;

-- What all waiting requests of a server wait for, in one call. For each queue, and the workflows claimed from it (a list,
-- or null for all): how many runs could start now, at most p_limit. For each run: the number of its last event.
-- Returns  {"claims": [n, …], "runs": {ID: seq}}.
create or replace function tidebase.watch (p_queues text[], p_workflows jsonb, p_limit integer, p_run_ids text[])
  returns json language plpgsql volatile
  set plan_cache_mode = force_generic_plan  -- as claim_runs
  set enable_seqscan = off as $$
declare
  v_now    timestamptz := tidebase.now();
  v_claims integer[] := '{}';
  v_room   integer;
  v_queued boolean[] := array(  -- of hundreds of queues most have no run that is queued, which one look says
    select (select r.id from tidebase.runs r where r.queue = q.name and r.status = 'queued' limit 1) is not null
      from unnest(p_queues) with ordinality as q (name, n) order by n);
begin
  for n in 1 .. cardinality(p_queues) loop
    if not v_queued[n] then
      v_claims := v_claims || 0;
      continue;
    end if;
    v_room := tidebase._queue_room(p_queues[n], p_limit);
    if jsonb_typeof(p_workflows->(n - 1)) = 'null' then
      v_claims := v_claims || (
        select count(*)::integer from (
          select from tidebase._priorities(p_queues[n]) as level,
                 lateral (select from tidebase.runs where queue = p_queues[n] and status = 'queued'
                             and priority = level and run_at <= v_now
                           order by run_at limit p_limit) due  -- ordered, else all are gathered first
           limit v_room) ready);
    else
      v_claims := v_claims || (
        select count(*)::integer
          from tidebase._ready_of(p_queues[n], array(select jsonb_array_elements_text(p_workflows->(n - 1))), v_room,
                                  v_now));
    end if;
  end loop;
  return json_build_object(
    'claims', v_claims,
    'runs', coalesce((select json_object_agg(id, event_seq) from tidebase.runs where id = any (p_run_ids)), '{}'));
end $$;

-- ------------------------------------------------------------------------------
-- The sender's verbs: claim the webhooks that are due, renew a claim while its webhook is in flight, settle it. A claim
-- lasts p_hold_ms. When a sender dies, its webhooks are due again after that time, under the same ids.
-- ------------------------------------------------------------------------------

-- Claims webhooks that are due, at most p_limit, and so many that each host has at most p_per_host in flight.
-- p_in_flight: the ids of the webhooks that this sender sends now.
-- Fairness  hosts with fewer webhooks in flight come first; among those the hosts take turns, in the order of their names,
--          from p_after on. So a host with a backlog, or hosts that do not answer, do not delay the others. At most 1,000
--          hosts are looked at.
-- Bounds   the payloads come to at most _budget() bytes, but for a single one that is larger.
-- Returns  {"webhooks": [{id, attempt, kind, url, secret, body}], "after": where the next call begins}; body is the
--          exact text to sign and send.
create or replace function tidebase.claim_webhooks (p_limit integer, p_hold_ms bigint, p_per_host integer,
                                                    p_in_flight text[], p_after text)
  returns json language plpgsql
  set enable_seqscan = off as $$  -- a plan made while the table was tiny is kept while it grows
declare
  v_now   timestamptz := tidebase.now();
  v_ids   bigint[];
  v_after text;
begin
  perform from tidebase.outbox where completed_at is null and next_attempt_at <= v_now limit 1;
  if not found then  -- the usual case
    return json_build_object('webhooks', '[]'::json, 'after', p_after);
  end if;
  with recursive hosts (host, due_at, lap, turn) as (  -- from p_after on, then from the first to p_after: a probe each
    select p_after, null::timestamptz, 0, 0
    union all
    select following.*, h.turn + 1
      from hosts h, lateral (
             (select o.host, o.next_attempt_at, h.lap from tidebase.outbox o
               where o.status = 'pending' and o.next_attempt_at is not null and o.host > h.host
               order by o.host, o.next_attempt_at limit 1)
             union all
             (select o.host, o.next_attempt_at, 1 from tidebase.outbox o
               where o.status = 'pending' and o.next_attempt_at is not null and h.lap = 0
               order by o.host, o.next_attempt_at limit 1)
             order by 3 limit 1) as following (host, due_at, lap)
     where h.turn < 1000 and (following.lap = 0 or following.host <= p_after)
  ), flying as (
    select o.host, count(*) as number from tidebase.outbox o where o.id = any (p_in_flight) group by o.host
  ), free as (
    select host, turn, coalesce(number, 0) as number from hosts left join flying using (host)
     where due_at <= v_now and coalesce(number, 0) < p_per_host
     order by coalesce(number, 0), turn limit p_limit
  ), due as (
    select free.host, free.turn, free.number + row_number() over (partition by free.host) as number, claimable.seq
      from free, lateral (
             select o.seq from tidebase.outbox o
              where o.host = free.host and o.status = 'pending' and o.next_attempt_at <= v_now
                and o.id <> all (p_in_flight)  -- one of these is due if its claim was not renewed in time
              order by o.next_attempt_at limit p_per_host - free.number for update skip locked) as claimable
  ), sized as (
    select due.*, row_number() over in_turn as place,
           sum(coalesce(octet_length(tidebase._webhook_payload(o)::text), 0)) over in_turn as bytes
      from due join tidebase.outbox o on o.seq = due.seq window in_turn as (order by due.number, due.turn)
  ), claimed as (
    select * from sized where place = 1 or bytes <= tidebase._budget() order by number, turn limit p_limit
  )
  select array_agg(seq order by number, turn),
         coalesce((array_agg(host order by number desc, turn desc))[1], (select host from hosts where turn = 1000),
                  p_after)
    into v_ids, v_after from claimed;
  update tidebase.outbox
     set attempts = attempts + 1, claimed = true, next_attempt_at = v_now + tidebase._ms(p_hold_ms)
   where seq = any (v_ids);
  return json_build_object('after', v_after, 'webhooks', (
    select coalesce(json_agg(json_build_object(
             'id', o.id, 'attempt', o.attempts, 'kind', o.kind, 'url', o.url,
             'secret', case o.kind when 'channel' then c.secret when 'recovery' then r.recovery_secret end,
             'body', case o.kind when 'channel' then
               json_build_object('type', o.event_type, 'runId', o.run_id, 'gateId', o.gate_id, 'deliveryId', o.id,
                                 'payload', tidebase._webhook_payload(o))::text
             else
               json_build_object('type', o.event_type, 'runId', o.run_id, 'workflowName', r.workflow_name,
                                 'reason', o.reason, 'attempt', r.attempt, 'deliveryId', o.id)::text
             end) order by array_position(v_ids, o.seq)), '[]')
      from tidebase.outbox o join tidebase.runs r on r.id = o.run_id
      left join tidebase.channels c on c.id = o.channel_id
     where o.seq = any (v_ids)));
end $$;

-- Renews claims for another p_hold_ms. A claim that ended meanwhile, by an outcome or by another sender's claim, stays as
-- it is; and so does one that is just locked, since only what ends it locks it.
create or replace function tidebase.renew_webhooks (p_ids text[], p_attempts integer[], p_hold_ms bigint)
  returns void language plpgsql as $$
begin
  update tidebase.outbox set next_attempt_at = tidebase.now() + tidebase._ms(p_hold_ms)
   where seq in (select o.seq from unnest(p_ids, p_attempts) as claim (id, attempt)
                   join tidebase.outbox o on o.id = claim.id and o.attempts = claim.attempt
                  where o.status = 'pending' and o.claimed for update of o skip locked);
end $$;

-- Gives a claim back: the webhook is due in p_delay_ms, and the attempt does not count.
create or replace function tidebase.release_webhook (p_id text, p_attempt integer, p_delay_ms bigint)
  returns void language plpgsql as $$
begin
  update tidebase.outbox
     set attempts = attempts - 1, claimed = false, next_attempt_at = tidebase.now() + tidebase._ms(p_delay_ms)
   where id = p_id and attempts = p_attempt and status = 'pending';
end $$;

-- Records the outcome of an attempt. There are at most 8 attempts: after 1, 4, 10, 30 s, then 2, 8 and 20 min.
-- Leaves   the webhook delivered, failed, or pending until the next attempt; once it is not pending, the next one of the
--          channel due, or, of another kind, event recovery.delivered or recovery.failed. A failure changes nothing when
--          another sender claimed the webhook meanwhile.    Returns  {"status"}.
create or replace function tidebase.settle_webhook (p_id text, p_attempt integer, p_delivered boolean,
                                                    p_retryable boolean, p_http_status integer, p_response text,
                                                    p_error text) returns json language plpgsql as $$
declare
  v_now     timestamptz := tidebase.now();
  v_delays  constant integer[] := array[1, 4, 10, 30, 120, 480, 1200];
  v_status  constant text := case when p_delivered then 'delivered'
                                  when p_retryable and p_attempt <= cardinality(v_delays) then 'pending' else 'failed' end;
  v_run     tidebase.runs;
  v_webhook tidebase.outbox;
begin
  select r.* into v_run from tidebase.runs r join tidebase.outbox o on o.run_id = r.id where o.id = p_id
     for no key update of r;
  select * into v_webhook from tidebase.outbox where id = p_id;
  if v_webhook.status <> 'pending' or (v_webhook.attempts <> p_attempt and not p_delivered) then
    return json_build_object('status', v_webhook.status);
  end if;
  update tidebase.outbox
     set status = v_status, claimed = false, completed_at = case when v_status <> 'pending' then v_now end,
         next_attempt_at = case v_status when 'pending' then v_now + v_delays[p_attempt] * interval '1 second' end,
         http_status = p_http_status, response_body = p_response, error_text = p_error
   where id = p_id returning * into v_webhook;
  if v_status <> 'pending' then
    update tidebase.outbox set next_attempt_at = v_now
     where seq = (select min(seq) from tidebase.outbox where channel_id = v_webhook.channel_id and status = 'pending');
    if v_webhook.kind <> 'channel' then
      perform tidebase._append_event_and_renew_lease(v_run.id, null, 'recovery.' || v_webhook.status, json_build_object(
                'recoveryAttemptId', p_id, 'reason', v_webhook.reason, 'httpStatus', p_http_status, 'error', p_error));
    end if;
  end if;
  return json_build_object('status', v_webhook.status);
end $$;

-- ------------------------------------------------------------------------------
-- Studio: why a run waits, what a resume would do, lists, and a run in pieces. Most functions only read. They read a
-- payload only when it is asked for. An index serves each list, and each list is bounded.
-- ------------------------------------------------------------------------------

-- An error's name and the first 300 characters of its message. Without a name and a message: of its text.
create or replace function tidebase._error_brief (p_error json) returns json language plpgsql immutable as $$
declare
  v_error json;
begin
  if p_error is null then
    return null;
  elsif octet_length(p_error::text) > 262144 then
    return json_build_object('name', null, 'message', format('an error of %s bytes', octet_length(p_error::text)));
  end if;
  v_error := tidebase._readable(p_error);
  if json_typeof(v_error) <> 'object' then
    return json_build_object('name', null, 'message', left(v_error #>> '{}', 300));
  end if;
  return json_build_object('name', left(v_error->>'name', 100),
                           'message', left(coalesce(v_error->>'message', case when v_error->>'name' is null
                                                                              then v_error::text end), 300));
end $$;

-- A length of time in words: 12 s, 3 min, 2 h, 4 d.
create or replace function tidebase._span (p_span interval) returns text language sql immutable as $$
  select case when s < 100 then s || ' s' when s < 6000 then s / 60 || ' min' when s < 172800 then s / 3600 || ' h'
              else s / 86400 || ' d' end
    from (select greatest(extract(epoch from p_span), 0)::bigint as s) as seconds
$$;

-- An instant in words: the time of day when it is within 12 hours of p_now, else the date, too.
create or replace function tidebase._at (p_at timestamptz, p_now timestamptz) returns text language sql stable as $$
  select to_char(p_at at time zone 'UTC', case when abs(extract(epoch from p_at - p_now)) < 43200 then 'HH24:MI:SS'
                                               else 'YYYY-MM-DD HH24:MI' end) || ' UTC'
$$;

-- What decides whether the queued runs of these queues start. p_asked: requests for work that this server has not written to
-- tidebase.workers yet, {QUEUE: {"ago_ms", "workflows": null for all}}.
-- Returns  {QUEUE: {"paused"; "pushed": its runs are offered to an app; "concurrency" and "rate": its caps, or null;
--          "running": how many of its runs are, counted up to the cap; "holders": ids of three of them; "rateUntil": when
--          the rate allows the next, null for now; "askedAt": when a worker asked last, within an hour; "workflows": those
--          that were asked for, null for all}}.
create or replace function tidebase._queue_facts (p_queues text[], p_asked jsonb)
  returns jsonb language plpgsql stable set enable_seqscan = off as $$
declare
  v_now timestamptz := tidebase.now();
begin
  return (
    select coalesce(jsonb_object_agg(n.name, jsonb_build_object(
             'paused', coalesce(q.paused, false), 'pushed', q.invoke_url is not null, 'concurrency', q.concurrency,
             'rate', q.rate_per_minute, 'running', cardinality(running.ids), 'holders', to_jsonb(running.ids[1:3]),
             'rateUntil', rate.until, 'askedAt', asked.at, 'workflows', asked.workflows)), '{}')
      from unnest(p_queues) as n (name)
      left join tidebase.queues q on q.name = n.name
     cross join lateral (
           select array(select id from (select id from tidebase.runs
                                         where queue = n.name and status = 'running' and not stalled
                                         limit coalesce(q.concurrency, 1000)) as first order by id) as ids) as running
     cross join lateral (  -- the first instant by which enough of its claims are older than a minute
           select min(claimed_at) + interval '60 seconds' as until
             from (select claimed_at, sum(claimed) over () as claims, sum(claimed) over (order by claimed_at) as gone
                     from tidebase.queue_claims
                    where queue = n.name and claimed_at > v_now - interval '60 seconds') as recent
            where claims >= q.rate_per_minute and claims - gone < q.rate_per_minute) as rate
     cross join lateral (
           select max(at) as at, case when bool_and(workflows is not null) then (
                    select jsonb_agg(distinct workflow.name)
                      from unnest(array_agg(workflows)) as list, jsonb_array_elements(list) as workflow (name)) end
             from (select last_asked_at as at, to_jsonb(workflows) as workflows from tidebase.workers
                    where last_asked_at > v_now - interval '1 hour' and n.name = any (queues)
                   union all
                   select v_now - tidebase._ms((p_asked->n.name->>'ago_ms')::bigint),
                          nullif(p_asked->n.name->'workflows', 'null')
                    where p_asked ? n.name) as requests) as asked (at, workflows));
end $$;

-- The line of a detail with its values: {b:worker} and {n:total} are shown as they are, {ids:runs} as a list, {for:since} as
-- a length of time until p_now, {ago:since} as how long ago or in how long, {at:until} as the instant.
create or replace function tidebase._say (p_detail json, p_now timestamptz) returns text language sql stable as $$
  select string_agg(part[1] || case part[2]
           when 'for' then tidebase._span(p_now - (p_detail->>part[3])::timestamptz)
           when 'ago' then case when (p_detail->>part[3])::timestamptz > p_now
                                then 'in ' || tidebase._span((p_detail->>part[3])::timestamptz - p_now)
                                else tidebase._span(p_now - (p_detail->>part[3])::timestamptz) || ' ago' end
           when 'at' then tidebase._at((p_detail->>part[3])::timestamptz, p_now)
           when 'ids' then (select string_agg(id, ', ' order by n)
                              from json_array_elements_text(p_detail->part[3]) with ordinality as i (id, n))
           else coalesce(p_detail->>part[3], '') end, '' order by n)
    from regexp_matches(p_detail->>'line', '([^{]*)(?:\{(\w+):(\w+)\})?', 'g') with ordinality as m (part, n)
$$;

-- Why a run that has not ended does not go on, for people and as data. p_facts: the _queue_facts of its queue, which only
-- a run that is queued and due needs.
-- Returns  {"whyDetail": {"kind", the values that the line names, "line"}; "why": the line with its values}. Both are null
--          for a run that ended. A page fills the line in by itself, since it has another time zone.
create or replace function tidebase._why (p_run_id text, p_facts jsonb, p_now timestamptz)
  returns json language plpgsql stable set enable_seqscan = off as $$
declare
  v_run    record;
  v_detail json;
begin
  select status, created_at into v_run from tidebase.runs where id = p_run_id;
  case v_run.status
    when 'pending' then
      v_detail := json_build_object('kind', 'pending', 'since', tidebase._iso(v_run.created_at),
                                    'line', 'created {ago:since}; nobody has begun it');
    when 'running' then v_detail := tidebase._why_running(p_run_id, p_now);
    when 'waiting' then v_detail := tidebase._why_waiting(p_run_id);
    when 'queued' then v_detail := tidebase._why_queued(p_run_id, p_facts, p_now);
    else null;  -- it ended
  end case;
  return json_build_object('why', tidebase._say(v_detail, p_now), 'whyDetail', v_detail);
end $$;

-- whyDetail of a run that waits for a gate's decision.
create or replace function tidebase._why_gate (g tidebase.gates) returns json language sql stable as $$
  select json_build_object('kind', 'gate', 'gateId', g.id, 'gate', g.name, 'prompt', left(g.prompt, 200),
                           'since', tidebase._iso(g.created_at), 'line', 'waits for a person since {for:since}: {b:prompt}')
$$;

-- whyDetail of a running run. This function and the next two read single columns of runs: its payloads may be large.
create or replace function tidebase._why_running (p_run_id text, p_now timestamptz)
  returns json language plpgsql stable set enable_seqscan = off as $$
declare
  v_run  record;
  v_step record;
  v_gate json;
begin
  select queue, lease_owner, lease_expires_at, fence, event_seq,
         tidebase._iso(lease_expires_at - tidebase._ms(lease_ms)) as heartbeat_at  -- the owner's last write
    into v_run from tidebase.runs where id = p_run_id;
  if v_run.lease_expires_at <= p_now then
    return json_build_object('kind', 'lease_expired', 'since', tidebase._iso(v_run.lease_expires_at),
                             'worker', v_run.lease_owner, 'queue', v_run.queue,
                             'line', 'its lease ran out {ago:since}; nobody has begun it again');
  end if;
  select s.name, s.started_at into v_step
    from tidebase.events e join tidebase.steps s on s.id = tidebase._readable(e.payload)->>'stepId'
   where e.run_id = p_run_id and e.seq > v_run.event_seq - 20 and e.type = 'step.started' and s.run_id = p_run_id
     and s.status = 'running' and s.fence = v_run.fence
   order by e.seq desc limit 1;
  if not found then
    select tidebase._why_gate(g) into v_gate from tidebase.gates g
     where run_id = p_run_id and status = 'pending' order by created_at limit 1;
    if found then
      return tidebase._joined(v_gate, json_build_object('worker', v_run.lease_owner, 'heartbeatAt', v_run.heartbeat_at));
    end if;
  end if;
  return json_build_object(
    'kind', 'running', 'worker', v_run.lease_owner, 'heartbeatAt', v_run.heartbeat_at, 'step', v_step.name,
    'stepSince', tidebase._iso(v_step.started_at),
    'line', case when v_run.queue is null then 'begun' else 'claimed' end || ' by {b:worker}, heartbeat {ago:heartbeatAt}, '
            || case when v_step.name is null then 'between steps' else 'in step {b:step} for {for:stepSince}' end);
end $$;

-- whyDetail of a waiting run, by what wait_run was told to wait for.
create or replace function tidebase._why_waiting (p_run_id text)
  returns json language plpgsql stable set enable_seqscan = off as $$
declare
  v_for   jsonb;
  v_until timestamptz;
  v_live  bigint;
begin
  select waiting_for, wake_at into v_for, v_until from tidebase.runs where id = p_run_id;
  if v_for ? 'gateId' then
    return (select tidebase._why_gate(g) from tidebase.gates g where id = v_for->>'gateId' and run_id = p_run_id);
  elsif v_for ? 'event' then
    return json_build_object(
      'kind', 'signal', 'signal', v_for->>'event', 'n', tidebase._signal_number(v_for), 'until', tidebase._iso(v_until),
      'line', 'waits for signal {b:signal}' || case when tidebase._signal_number(v_for) > 1 then ' (number {n:n})' else '' end
              || case when v_until is not null then ', until {at:until}' else '' end);
  elsif v_for ? 'children' then
    select count(*) into v_live from tidebase.runs c
     where c.parent_run_id = p_run_id and c.status in ('pending', 'queued', 'running', 'waiting')
       and (v_for->'children' = 'true'
            or exists (select from tidebase.run_edges e where e.child_run_id = c.id and e.parent_run_id = p_run_id
                          and v_for->'children' ? e.name));
    return json_build_object(
      'kind', 'children', 'live', v_live, 'total', case when v_for->'children' <> 'true'
      then jsonb_array_length(v_for->'children')
      else (select count(*) from tidebase.run_edges where parent_run_id = p_run_id) end,
      'line', 'waits for {n:live} of {n:total} children');
  end if;
  return json_build_object('kind', 'sleep', 'until', tidebase._iso(v_until), 'line', 'sleeps until {at:until}');
end $$;

-- whyDetail of a queued run: what it waits for itself; then what its queue does not allow; then whether anybody asks for it.
create or replace function tidebase._why_queued (p_run_id text, p_facts jsonb, p_now timestamptz)
  returns json language plpgsql stable set enable_seqscan = off as $$
declare
  v_run     record;
  v_queue   jsonb;
  v_error   text;
  v_running integer;
begin
  select workflow_name, queue, run_at, offered_at, attempt, max_attempts, error is not null as has_failed
    into v_run from tidebase.runs where id = p_run_id;

  if v_run.run_at > p_now and v_run.offered_at is not null then
    return json_build_object('kind', 'offered', 'since', tidebase._iso(v_run.offered_at),
                             'until', tidebase._iso(v_run.run_at),
                             'line', 'offered to the app {ago:since}, again at {at:until}');
  elsif v_run.run_at > p_now and v_run.has_failed then
    select coalesce(brief->>'name', left(brief->>'message', 100)) into v_error
      from (select tidebase._error_brief(error) as brief from tidebase.runs where id = p_run_id) as failure;
    return json_build_object(
      'kind', 'retry', 'until', tidebase._iso(v_run.run_at), 'attempt', v_run.attempt + 1,
      'maxAttempts', v_run.max_attempts, 'error', v_error,
      'line', 'again at {at:until}, attempt {n:attempt}'
              || case when v_run.attempt < v_run.max_attempts then ' of {n:maxAttempts}' else '' end
              || case when v_error is not null then ', after {b:error}' else '' end);
  elsif v_run.run_at > p_now then
    return json_build_object('kind', 'scheduled', 'until', tidebase._iso(v_run.run_at), 'line', 'starts at {at:until}');
  end if;

  v_queue := p_facts->v_run.queue;
  v_running := v_queue->'running';
  if (v_queue->'paused')::boolean then
    return json_build_object('kind', 'paused', 'queue', v_run.queue, 'line', 'queue {b:queue} is paused');
  elsif v_running >= (v_queue->>'concurrency')::integer then
    return json_build_object(
      'kind', 'queue_capped', 'queue', v_run.queue, 'concurrency', v_queue->'concurrency', 'runs', v_queue->'holders',
      'holders', v_running,
      'line', 'queue {b:queue} is at its cap of {n:concurrency}: {ids:runs}'
              || case when v_running > 3 then format(' and %s more hold it', v_running - 3)
                      when v_running = 1 then ' holds it' else ' hold it' end);
  elsif v_queue->>'rateUntil' is not null then
    return json_build_object('kind', 'rate_limited', 'queue', v_run.queue, 'ratePerMinute', v_queue->'rate',
                             'until', tidebase._iso((v_queue->>'rateUntil')::timestamptz),
                             'line', 'rate limit, next place {ago:until}');
  elsif not (v_queue->'pushed')::boolean
        and coalesce((v_queue->>'askedAt')::timestamptz <= p_now - interval '5 min', true) then
    return json_build_object(
      'kind', 'nobody_asks', 'queue', v_run.queue, 'lastAskedAt', tidebase._iso((v_queue->>'askedAt')::timestamptz),
      'running', v_running, 'line', 'nobody has asked queue {b:queue} for work in the last 5 min'
      || case when v_running > 0 then '; {n:running} of its runs are at work' else '' end);
  elsif jsonb_typeof(v_queue->'workflows') = 'array' and not v_queue->'workflows' ? v_run.workflow_name then
    return json_build_object('kind', 'workflow_unknown', 'queue', v_run.queue, 'workflowName', v_run.workflow_name,
                             'line', 'workers ask queue {b:queue}, but none of them for workflow {b:workflowName}');
  end if;
  return json_build_object('kind', 'ready', 'queue', v_run.queue, 'since', tidebase._iso(v_run.run_at),
                           'line', 'ready since {for:since}; queue {b:queue} gives it out when its turn has come');
end $$;

-- Whether a value's text has at most 1,000 bytes. The stored size is compared first, so that a large value is not
-- read.
create or replace function tidebase._is_short (p_value jsonb) returns boolean language sql immutable as
$$ select case when pg_column_size(p_value) > 1000 then false else octet_length(p_value::text) <= 1000 end $$;

-- A run without payloads: metadata of at most 1,000 bytes, and of its error the beginning. p_why: its _why. `version` changes
-- with all that is shown, but not with the lengths of time in `why`.
create or replace function tidebase._run_light (r tidebase.runs, p_why json) returns json language sql stable as $$
  select json_build_object(
    'id', r.id, 'workflowName', r.workflow_name, 'status', r.status, 'queue', r.queue, 'priority', r.priority,
    'attempt', r.attempt, 'maxAttempts', r.max_attempts, 'dedupeKey', r.dedupe_key,
    'createdAt', tidebase._iso(r.created_at), 'updatedAt', tidebase._iso(r.updated_at),
    'completedAt', tidebase._iso(r.completed_at), 'runAt', tidebase._iso(r.run_at),
    'deadlineAt', tidebase._iso(r.deadline_at), 'leaseOwner', r.lease_owner,
    'leaseExpiresAt', tidebase._iso(r.lease_expires_at), 'failureClass', r.failure_class, 'stalled', r.stalled,
    'cancelReason', left(r.cancel_reason, 300), 'cancelActor', left(r.cancel_actor, 300),
    'parentRunId', r.parent_run_id,
    'metadata', case when tidebase._is_short(r.metadata) then r.metadata end,
    'metadataOmitted', not tidebase._is_short(r.metadata), 'error', tidebase._error_brief(r.error),
    'durationMs', (extract(epoch from r.completed_at - r.created_at) * 1000)::bigint, 'eventSeq', r.event_seq,
    'why', p_why->'why', 'whyDetail', p_why->'whyDetail',
    'version', r.event_seq || '-' || left(md5(concat_ws('/', r.updated_at, r.lease_expires_at, r.stalled,
                                                         p_why->'whyDetail')), 8))
$$;

-- These runs, in this order, each with its _why; if p_light, as _run_light. Left out are runs that do not exist, and, if
-- p_light, those of which p_known, {ID: version}, has the version.    Returns  [run, …].
create or replace function tidebase._list_runs (p_ids text[], p_light boolean, p_asked jsonb,
                                                p_known jsonb default '{}')
  returns json language plpgsql stable set enable_seqscan = off as $$
declare
  v_now   timestamptz := tidebase.now();
  v_facts jsonb := tidebase._queue_facts(array(
    select distinct queue from tidebase.runs where id = any (p_ids) and status = 'queued' and run_at <= v_now), p_asked);
begin
  if p_light then
    return (select coalesce(json_agg(listed.run order by listed.n), '[]')
              from (select g.n, r.id, tidebase._run_light(r, w.why) as run
                      from unnest(p_ids) with ordinality as g (id, n) join tidebase.runs r on r.id = g.id
                     cross join lateral (select tidebase._why(r.id, v_facts, v_now) as why offset 0) as w) as listed
             where listed.run->>'version' is distinct from p_known->>listed.id);
  end if;
  return (select coalesce(json_agg(tidebase._joined(tidebase._run_listed(r, m.room),
                                                    tidebase._why(r.id, v_facts, v_now)) order by m.n), '[]')
            from (select g.n, g.id, sum(tidebase._run_bytes(r)) over (order by g.n) <= tidebase._budget() as room
                    from unnest(p_ids) with ordinality as g (id, n) join tidebase.runs r on r.id = g.id) as m
            join tidebase.runs r on r.id = m.id);
end $$;

-- What would become of each step of a run if a new owner took the run now and began the step, by the rules of begin_step.
-- Plans    replays: the step completed, its output is kept. runs: it has had no effect outside, or a person decided that
--          it runs again. runs_again: it may have had its effect, and its idempotency key, its contract or a recorded
--          failure allows another try. stops_for_review: it may have had its effect, and a person must decide. never: a
--          person decided that it failed, or it may have had its effect and is declared never to run twice, or the run
--          completed without it.
-- Returns  {"runId", "runStatus", "safe": whether no step needs a person, null for a run that is completed or held;
--          "verdict": a sentence for people; "counts": {plan: number of steps}; "blocking": the names of the steps that
--          need a person; "steps": the first 1,000, [{"id", "name", "position", "status", "attempt", "plan", "reason"}];
--          "stepsTruncated"; "actions": those of retry, recover, review, fork and cancel that the run allows}.
-- Needs    the run (TB404 not_found).
create or replace function tidebase.rerun_plan (p_run_id text) returns json
  language plpgsql stable set enable_seqscan = off as $$
declare
  v_now     timestamptz := tidebase.now();
  v_run     tidebase.runs;
  v_next    tidebase.runs;
  v_plan    record;
  v_held    boolean;
  v_actions text[];
begin
  select * into v_run from tidebase.runs where id = p_run_id;
  if not found then
    perform tidebase._refuse(404, 'not_found', format('run %s does not exist', p_run_id));
  end if;
  v_held := v_run.status = 'running' and v_run.lease_expires_at > v_now;
  v_next := tidebase._as_taken_over(v_run, v_now);
  with judged as (
    select s.id, s.name, s.position, s.status, s.attempt, case
        when s.status = 'completed' then array['replays', 'completed: its output is kept']
        when v_run.status = 'completed' then
          array['never', case s.status when 'running' then 'it was cut off' when 'manual_review' then 'it waits for a person'
                                       else 'it failed' end || ', and the run completed without it']
        when s.status = 'failed' and s.reviewed = 'fail' then
          array['never', 'a person decided that it failed for good']
        when tidebase._is_ambiguous(v_next, s, '', s.options) then case
          when s.contract->>'replay' = 'never' then
            array['never', 'it may have had its effect, and is declared never to run twice']
          when s.status = 'manual_review' then
            array['stops_for_review', 'it waits for a person to say whether it had its effect']
          else array['stops_for_review', 'it may have had its effect, and has no idempotency key'] end
        when s.status = 'failed_retryable' and s.reviewed = 'retry' then
          array['runs', 'a person decided that it runs again']
        when tidebase._is_harmless(s.contract->'sideEffects') then
          array['runs', case s.status when 'running' then 'it was cut off' else 'it failed' end
                        || '; it has no effects outside']
        when s.contract->>'idempotencyKey' is not null then
          array['runs_again', format('%s; its idempotency key %s makes another try safe', case s.status
                                when 'running' then 'it may have had its effect' else 'it failed' end,
                                left(s.contract->>'idempotencyKey', 100))]
        when s.status = 'running' then
          array['runs_again', 'it may have had its effect, and is declared safe to repeat']
        else array['runs_again', 'it failed: another try may repeat its effect'] end as verdict
      from tidebase.steps s where s.run_id = p_run_id
  ), planned as (
    select *, verdict[1] as plan, verdict[2] as reason,
           v_run.status <> 'completed' and verdict[1] in ('stops_for_review', 'never') as blocks
      from judged
  )
  select count(*) as steps, count(*) filter (where blocks) as blocking,
         count(*) filter (where plan = 'replays') as replays, count(*) filter (where plan = 'runs') as runs,
         count(*) filter (where plan = 'runs_again') as runs_again,
         count(*) filter (where plan = 'stops_for_review') as stops, count(*) filter (where plan = 'never') as never,
         coalesce(json_agg(name order by position) filter (where blocks), '[]') as names,
         string_agg(quote_literal(name), ', ' order by position) filter (where blocks) as quoted,
         (select coalesce(json_agg(json_build_object(
                   'id', id, 'name', name, 'position', position, 'status', status, 'attempt', attempt, 'plan', plan,
                   'reason', reason) order by position), '[]')
            from (select * from planned order by position limit 1000) as first) as shown
    into v_plan from planned;
  v_actions := array_remove(array[
    case when v_plan.blocking > 0 and not v_held then 'review' end,
    case when v_run.status in ('failed', 'cancelled') then 'retry' end,
    case when v_run.recovery_webhook is not null and v_run.status <> 'completed' and not v_held then 'recover' end,
    'fork', case when v_run.status not in ('completed', 'cancelled') then 'cancel' end], null);
  return json_build_object(
    'runId', p_run_id, 'runStatus', v_run.status,
    'safe', case when v_run.status <> 'completed' and not v_held then v_plan.blocking = 0 end,
    'verdict', case
      when v_run.status = 'completed' then 'Nothing to rerun: it is completed. To run it again, fork it.'
      when v_held then format('It is at work: %s holds it.', v_run.lease_owner)
      when v_plan.blocking > 0 then format('Not without you: %s may have had %s effect. Decide below.',
             left(v_plan.quoted, 300), case v_plan.blocking when 1 then 'its' else 'their' end)
      when v_plan.steps = 0 then 'Safe: no step was begun; it starts from the beginning.'
      else format('Safe: %s.', concat_ws(', ',
             case when v_plan.replays > 0 then tidebase._steps_do(v_plan.replays, 'replay') end,
             case when v_plan.runs > 0 then tidebase._steps_do(v_plan.runs, 'run') end,
             case when v_plan.runs_again > 0 then tidebase._steps_do(v_plan.runs_again, 'run') || ' again' end)) end,
    'counts', json_build_object('replays', v_plan.replays, 'runs', v_plan.runs, 'runs_again', v_plan.runs_again,
                                'stops_for_review', v_plan.stops, 'never', v_plan.never),
    'blocking', v_plan.names, 'steps', v_plan.shown, 'stepsTruncated', v_plan.steps > 1000,
    'actions', to_json(v_actions));
end $$;

create or replace function tidebase._steps_do (p_count bigint, p_verb text) returns text language sql immutable as
$$ select format('%s %s', p_count, case when p_count = 1 then 'step ' || p_verb || 's' else 'steps ' || p_verb end) $$;

-- A step without payloads: their sizes, in bytes, and the beginning of its error. A large contract is shown by `replay` alone.
create or replace function tidebase._step_light (s tidebase.steps) returns json language sql stable as $$
  select json_build_object(
    'id', s.id, 'name', s.name, 'position', s.position, 'status', s.status, 'attempt', s.attempt,
    'startedAt', tidebase._iso(s.started_at), 'completedAt', tidebase._iso(s.completed_at),
    'createdAt', tidebase._iso(s.created_at), 'updatedAt', tidebase._iso(s.updated_at), 'leaseOwner', s.lease_owner,
    'leaseExpiresAt', tidebase._iso(s.lease_expires_at), 'inputHash', s.input_hash,
    'resumeContract', case when octet_length(s.contract::text) <= 4000 then s.contract
      else json_build_object('sideEffects', '[]'::json, 'idempotencyKey', null, 'replay', s.contract->'replay',
                             'checkpointInvariant', null, 'verifiedBy', null, 'credentials', '[]'::json,
                             'payloadOmitted', true) end,
    'reviewed', s.reviewed, 'copied', s.copied, 'error', tidebase._error_brief(s.error),
    'inputBytes', octet_length(s.input::text), 'outputBytes', octet_length(s.output::text),
    'errorBytes', octet_length(s.error::text), 'optionsBytes', octet_length(s.options::text))
$$;

-- A page of a run's steps, in the order in which they were first begun: those after position p_after, at most p_limit. Of
-- these statuses, or null; with p_text in their name, in either case, or null; if p_errors, failed or to be reviewed.
-- Returns  {"steps": as _step_light, "nextCursor": p_after of the next page, null if this one is not full}; null when there is
--          no such run.
create or replace function tidebase.list_steps (p_run_id text, p_after integer, p_limit integer, p_statuses text[],
                                                p_text text, p_errors boolean)
  returns json language plpgsql stable set enable_seqscan = off as $$
begin
  return (
    select json_build_object('steps', coalesce(json_agg(tidebase._step_light(s) order by s.position), '[]'),
                             'nextCursor', case when count(*) = p_limit then max(s.position) end)
      from tidebase.steps s
      join (select id from tidebase.steps
             where run_id = p_run_id and position > p_after and (p_statuses is null or status = any (p_statuses))
               and (p_text is null or strpos(lower(name), lower(p_text)) > 0)
               and (not p_errors or status in ('failed', 'failed_retryable', 'manual_review'))
             order by position limit p_limit) as page on page.id = s.id
    having exists (select from tidebase.runs where id = p_run_id));
end $$;

-- An event without its payload if that has more than 1,000 bytes; but with what a page draws of it: the step's id, the
-- attempt, and the name of the step, gate, child or signal that it tells of.
create or replace function tidebase._event_light (e tidebase.events) returns json language sql stable as $$
  select json_build_object(
    'id', e.id, 'runId', e.run_id, 'seq', e.seq, 'type', e.type, 'createdAt', tidebase._iso(e.created_at),
    'payload', case when octet_length(e.payload::text) <= 1000 then e.payload end,
    'payloadBytes', octet_length(e.payload::text), 'payloadOmitted', octet_length(e.payload::text) > 1000,
    'stepId', n.payload->>'stepId', 'name', coalesce(n.payload->>'name', n.payload #>> '{gate,name}',
                                                     n.payload #>> '{edge,name}', n.payload #>> '{signal,name}'),
    'attempt', (n.payload->>'attempt')::integer)
    from (select case when octet_length(e.payload::text) <= 1000000 then tidebase._readable(e.payload) end as payload
          offset 0) as n
$$;

-- A run's events after number p_after, in their order, at most p_limit; if p_light, as _event_light. p_types: whole types,
-- and beginnings that end with a dot; null for all.
-- Returns  a row for each. They end before the event with which they would have more than _budget() bytes, unless it is the
--          first. No row: there is none, or no such run.
create or replace function tidebase.list_events (p_run_id text, p_after integer, p_limit integer, p_light boolean,
                                                 p_types text[])
  returns table (seq integer, event json) language plpgsql stable set enable_seqscan = off as $$
declare
  v_rows  refcursor;
  v_bytes bigint := 0;
begin
  open v_rows for
    select e.seq, case when p_light then tidebase._event_light(e) else tidebase._event_json(e) end
      from tidebase.events e
     where e.run_id = p_run_id and e.seq > p_after
       and (p_types is null or e.type = any (p_types)
            or exists (select from unnest(p_types) as t where t like '%.' and starts_with(e.type, t)))
     order by e.seq limit p_limit;
  loop  -- one by one, so that no row is read beyond the budget
    fetch v_rows into seq, event;
    exit when not found or (v_bytes > 0 and v_bytes + octet_length(event::text) > tidebase._budget());
    v_bytes := v_bytes + octet_length(event::text);
    return next;
  end loop;
  close v_rows;
end $$;

-- A payload as the stored text: of a run or, by p_id, of something that belongs to it. Without p_tokens a webhook
-- about a gate is not shown, because it contains the gate's token.
-- Returns  p_limit characters from p_offset on, and the whole size in bytes and characters. What a run or a step has not
--          yet, or has no longer, is the JSON null that its detail shows; SQL's null says that there is no such thing.
create or replace function tidebase.get_payload (p_run_id text, p_of text, p_id text, p_offset integer, p_limit integer,
                                                 p_tokens boolean, out part text, out bytes bigint,
                                                 out characters bigint)
  language plpgsql stable set enable_seqscan = off as $$
declare
  v_name text := split_part(p_of, '.', 2);
  v_text text;
begin
  v_text := case split_part(p_of, '.', 1)
    when 'step' then (select coalesce(case v_name when 'input' then input::text when 'output' then output::text
                                                  when 'error' then error::text when 'options' then options::text end,
                                      'null')
                        from tidebase.steps where id = p_id and run_id = p_run_id)
    when 'event' then (select payload::text from tidebase.events where run_id = p_run_id and seq = p_id::integer)
    when 'gate' then (select case v_name when 'data' then data::text when 'capability' then capability::text
                                         when 'decisionPayload' then decision_payload::text end
                        from tidebase.gates where id = p_id and run_id = p_run_id)
    when 'state' then (select case v_name when 'patch' then patch::text else value::text end
                         from tidebase.state_versions where id = p_id and run_id = p_run_id)
    when 'signal' then (select payload::text from tidebase.signals where id = p_id and run_id = p_run_id)
    when 'delivery' then (select case when v_name = 'response' then response_body
                                      when p_tokens or gate_id is null then tidebase._webhook_payload(o)::text end
                            from tidebase.outbox o where id = p_id and run_id = p_run_id)
    when 'usage' then (select metadata::text from tidebase.usage where id = p_id and run_id = p_run_id)
    when 'edge' then (select metadata::text from tidebase.run_edges where id = p_id and parent_run_id = p_run_id)
    else (select coalesce(case p_of when 'input' then input::text when 'result' then result::text
                                    when 'error' then error::text when 'metadata' then metadata::text end, 'null')
            from tidebase.runs where id = p_run_id) end;
  part := case when p_limit is null then substr(v_text, p_offset + 1) else substr(v_text, p_offset + 1, p_limit) end;
  bytes := octet_length(v_text);
  characters := length(v_text);
end $$;

-- The ids of a run and its descendants, generation by generation, at most p_limit. depth: 0 of the run itself.
create or replace function tidebase._subtree (p_run_id text, p_limit integer)
  returns table (id text, depth integer) language plpgsql stable set enable_seqscan = off as $$
declare
  v_ids  text[] := array[p_run_id];
  v_next text[] := v_ids;
begin
  depth := 0;
  while cardinality(v_next) > 0 loop
    return query select unnest(v_next), depth;
    v_next := array(select e.child_run_id from unnest(v_next) with ordinality as parent (id, n),
                           lateral (select child_run_id, created_at from tidebase.run_edges
                                     where parent_run_id = parent.id
                                     order by name limit p_limit) e  -- by name, so that the planner takes its index
                     order by parent.n, e.created_at, e.child_run_id limit p_limit - cardinality(v_ids));
    v_ids := v_ids || v_next;
    depth := depth + 1;
  end loop;
end $$;

-- When a run was first claimed or begun; null for never. One of its first ten events says it.
create or replace function tidebase._started_at (p_run_id text) returns timestamptz language sql stable as $$
  select e.created_at from tidebase.events e
   where e.run_id = p_run_id and e.seq <= 10 and e.type in ('run.claimed', 'run.started') order by e.seq limit 1
$$;

-- A run and its descendants, generation by generation, at most p_limit. p_asked: see _queue_facts.
-- Returns  {"root": p_run_id, "runs": [{"id", "parentRunId", "name", "edgeType", "depth", …, "startedAt", "why"}],
--          "truncated": whether there are more}; null when there is no such run.
create or replace function tidebase.run_tree (p_run_id text, p_limit integer, p_asked jsonb) returns json
  language plpgsql stable set enable_seqscan = off as $$
declare
  v_now   constant timestamptz := tidebase.now();
  v_facts constant jsonb := tidebase._queue_facts(array(
    select distinct r.queue
      from tidebase._subtree(p_run_id, p_limit) t
     cross join lateral (select * from tidebase.runs where id = t.id limit 1) r  -- a join could begin with all queued runs
     where r.status = 'queued' and r.run_at <= v_now), p_asked);
  v_runs  json[];
begin
  v_runs := array(
    select json_build_object(
             'id', r.id, 'parentRunId', e.parent_run_id, 'name', e.name, 'edgeType', e.edge_type, 'depth', t.depth,
             'workflowName', r.workflow_name, 'status', r.status, 'createdAt', tidebase._iso(r.created_at),
             'startedAt', tidebase._iso(tidebase._started_at(r.id)), 'completedAt', tidebase._iso(r.completed_at),
             'failureClass', r.failure_class, 'why', tidebase._why(r.id, v_facts, v_now)->'why')
      from tidebase._subtree(p_run_id, p_limit + 1) with ordinality as t (id, depth, n)
     cross join lateral (select * from tidebase.runs where id = t.id limit 1) r  -- likewise
      left join lateral (select * from tidebase.run_edges where child_run_id = r.id and t.depth > 0 limit 1) e on true
     order by t.n limit p_limit + 1);
  return case when cardinality(v_runs) > 0 then json_build_object('root', p_run_id, 'runs', array_to_json(v_runs[1:p_limit]),
                                                         'truncated', cardinality(v_runs) > p_limit) end;
end $$;

-- What these runs cost.    Returns  _usage_sums of their entries in the ledger, and how many "entries".
create or replace function tidebase._cost (p_run_ids text[]) returns json
  language plpgsql stable set enable_seqscan = off as $$
begin
  return (select tidebase._joined(tidebase._usage_sums(sum(input_tokens), sum(output_tokens), sum(total_tokens),
                                                       sum(cost_usd)), json_build_object('entries', count(*)))
            from tidebase.usage where run_id = any (p_run_ids));
end $$;

-- The head of a run's page: what it is, how much of everything it has, and what it cost. p_asked: see _queue_facts.
-- Returns  {"run": as _run_light, the sizes of its payloads, and more; "counts"; "cost": {"own", "subtree": of it and its
--          first 10,000 descendants}; "durationMs": until it ended, or now; "state": {"version", "bytes", "updatedAt"} or
--          null; "parent": {"id", "name"} or null}; null when there is no such run.
create or replace function tidebase.run_summary (p_run_id text, p_asked jsonb) returns json
  language plpgsql stable set enable_seqscan = off as $$
declare
  v_limit constant integer := 10000;  -- descendants
  v_now  timestamptz := tidebase.now();
  v_ids  constant text[] := array(select id from tidebase._subtree(p_run_id, v_limit + 1));
  v_run  json;
begin
  select tidebase._joined(tidebase._list_runs(array[p_run_id], true, p_asked)->0, json_build_object(
           'hasRecoveryWebhook', r.recovery_webhook is not null, 'inputBytes', octet_length(r.input::text),
           'resultBytes', octet_length(r.result::text), 'errorBytes', octet_length(r.error::text),
           'metadataBytes', octet_length(r.metadata::text), 'cancelRequestedAt', tidebase._iso(r.cancelled_at),
           'cancelledAt', tidebase._iso(r.cancelled_at), 'startedAt', tidebase._iso(tidebase._started_at(r.id)),
           'forkedFrom', r.metadata->>'forkedFrom', 'schedule', r.metadata->>'schedule'))
    into v_run from tidebase.runs r where r.id = p_run_id;
  return (
    select json_build_object(
      'run', v_run,
      'counts', json_build_object(
        'steps', (select count(*) from tidebase.steps where run_id = r.id),
        'stepsByStatus', (select coalesce(json_object_agg(status, n), '{}') from (
           select status, count(*) as n from tidebase.steps where run_id = r.id group by status) as by_status),
        'events', r.event_seq, 'gates', (select count(*) from tidebase.gates where run_id = r.id),
        'gatesPending', (select count(*) from tidebase.gates where run_id = r.id and status = 'pending'),
        'children', (select count(*) from tidebase.run_edges where parent_run_id = r.id),
        'childrenLive', (select count(*) from tidebase.runs c where c.parent_run_id = r.id
                            and c.status in ('pending', 'queued', 'running', 'waiting')),
        'signals', (select count(*) from tidebase.signals where run_id = r.id),
        'deliveries', (select count(*) from tidebase.outbox where run_id = r.id),
        'stateVersions', (select count(*) from tidebase.state_versions where run_id = r.id),
        'usage', (select count(*) from tidebase.usage where run_id = r.id)),
      'cost', json_build_object('own', tidebase._cost(array[r.id]), 'subtree', tidebase._joined(
        tidebase._cost(v_ids), json_build_object('runs', least(cardinality(v_ids), v_limit),
                                                 'truncated', cardinality(v_ids) > v_limit))),
      'durationMs', (extract(epoch from coalesce(r.completed_at, v_now) - r.created_at) * 1000)::bigint,
      'state', (select json_build_object('version', s.version, 'bytes', octet_length(s.value::text),
                                         'updatedAt', tidebase._iso(s.updated_at))
                  from tidebase.states s where s.run_id = r.id),
      'parent', (select json_build_object('id', e.parent_run_id, 'name', e.name)
                   from tidebase.run_edges e where e.child_run_id = r.id limit 1))
      from tidebase.runs r where r.id = p_run_id);
end $$;

-- A webhook without its payload and its answer: their sizes, in bytes.
create or replace function tidebase._delivery_light (o tidebase.outbox) returns json language sql stable as $$
  select json_build_object(
    'id', o.id, 'runId', o.run_id, 'kind', o.kind, 'eventType', o.event_type, 'reason', o.reason,
    'url', tidebase._shown_url(o.url), 'gateId', o.gate_id, 'channelId', o.channel_id, 'status', o.status,
    'attempts', o.attempts, 'nextAttemptAt', tidebase._iso(o.next_attempt_at), 'httpStatus', o.http_status,
    'errorText', o.error_text, 'createdAt', tidebase._iso(o.created_at), 'completedAt', tidebase._iso(o.completed_at),
    'payloadBytes', octet_length(tidebase._webhook_payload(o)::text), 'responseBytes', octet_length(o.response_body))
$$;

-- A page of a run's webhooks, newest first: those before number p_before, at most p_limit.
-- Returns  {"deliveries": as _delivery_light, "nextCursor": p_before of the next page, null if this one is not full}; null
--          when there is no such run.
create or replace function tidebase.list_deliveries (p_run_id text, p_before bigint, p_limit integer) returns json
  language plpgsql stable set enable_seqscan = off as $$
begin
  return (
    select json_build_object('deliveries', coalesce(json_agg(tidebase._delivery_light(o) order by o.seq desc), '[]'),
                             'nextCursor', case when count(*) = p_limit then min(o.seq) end)
      from tidebase.outbox o
      join (select seq from tidebase.outbox where run_id = p_run_id and seq < p_before order by seq desc limit p_limit)
           as page on page.seq = o.seq
    having exists (select from tidebase.runs where id = p_run_id));
end $$;

-- Sends a webhook once more, under the same id.
-- Needs    the run, and the webhook of it (TB404 not_found).
-- Leaves   it pending, with a new count of attempts: due now, or after those of its channel that are pending. A pending one
--          stays as it is.
-- Returns  {"delivery"}.    Locks  run, then webhook.
create or replace function tidebase.resend_delivery (p_run_id text, p_delivery_id text)
  returns json language plpgsql as $$
declare
  v_run  tidebase.runs := tidebase._lock_run(p_run_id);
  v_post tidebase.outbox;
begin
  select * into v_post from tidebase.outbox where id = p_delivery_id and run_id = v_run.id for update;
  if not found then
    perform tidebase._refuse(404, 'not_found', format('run %s has no delivery %s', p_run_id, p_delivery_id));
  elsif v_post.status = 'pending' then
    return json_build_object('delivery', tidebase._delivery_light(v_post));
  end if;
  update tidebase.outbox
     set status = 'pending', attempts = 0, claimed = false, completed_at = null, http_status = null,
         response_body = null, error_text = null,
         next_attempt_at = case when not exists (select from tidebase.outbox o where o.status = 'pending'
                                                    and o.channel_id = v_post.channel_id) then tidebase.now() end
   where seq = v_post.seq returning * into v_post;
  return json_build_object('delivery', tidebase._delivery_light(v_post));
end $$;

-- The newest 1,000 signals of a run, oldest first, without payloads of more than 1,000 bytes.
-- Returns  {"signals"}; null when there is no such run.
create or replace function tidebase.list_signals (p_run_id text) returns json
  language plpgsql stable set enable_seqscan = off as $$
begin
  return (select json_build_object('signals', (
            select coalesce(json_agg(json_build_object(
                     'id', s.id, 'runId', s.run_id, 'name', s.name, 'n', s.n, 'timedOut', s.timed_out,
                     'createdAt', tidebase._iso(s.created_at),
                     'payload', case when octet_length(s.payload::text) <= 1000 then s.payload end,
                     'payloadBytes', octet_length(s.payload::text),
                     'payloadOmitted', coalesce(octet_length(s.payload::text) > 1000, false))
                     order by s.created_at, s.id), '[]')
              from (select * from tidebase.signals where run_id = p_run_id
                     order by created_at desc, id desc limit 1000) s))
            from tidebase.runs r where r.id = p_run_id);
end $$;

-- What a run cost or, if p_subtree, what it and its descendants did: at most 10,000 runs.
-- Returns  {"usage": the newest p_limit entries of the ledger, oldest first, each with its step's name; "truncated": whether
--          there are more entries; "byModel": [{"model", "entries", "runs": how many of each, and _usage_sums}] of all
--          entries, dearest first}; null when there is no such run.
create or replace function tidebase.run_usage (p_run_id text, p_subtree boolean, p_limit integer) returns json
  language plpgsql stable set enable_seqscan = off as $$
declare
  v_ids  text[] := array[p_run_id];
  v_rows json[];
begin
  if p_subtree then
    v_ids := array(select id from tidebase._subtree(p_run_id, 10000));
  end if;
  v_rows := array(
    select json_build_object(
             'id', u.id, 'runId', u.run_id, 'stepId', u.step_id, 'stepName', s.name, 'kind', u.kind,
             'provider', u.provider, 'model', u.model, 'label', u.label, 'quantity', u.quantity, 'unit', u.unit,
             'inputTokens', u.input_tokens, 'outputTokens', u.output_tokens, 'totalTokens', u.total_tokens,
             'costUsd', u.cost_usd, 'createdAt', tidebase._iso(u.created_at))
      from tidebase.usage u left join tidebase.steps s on s.id = u.step_id
     where u.run_id = any (v_ids) order by u.created_at desc, u.id desc limit p_limit + 1);
  return (select json_build_object(
    'usage', (select coalesce(json_agg(entry order by n desc), '[]')
                from unnest(v_rows[1:p_limit]) with ordinality as newest (entry, n)),
    'truncated', cardinality(v_rows) > p_limit,
    'byModel', (
      select coalesce(json_agg(tidebase._joined(
               json_build_object('model', model, 'entries', entries, 'runs', runs), sums) order by cost desc, model), '[]')
        from (select model, count(*) as entries, count(distinct run_id) as runs, coalesce(sum(cost_usd), 0) as cost,
                     tidebase._usage_sums(sum(input_tokens), sum(output_tokens), sum(total_tokens), sum(cost_usd)) as sums
                from tidebase.usage where run_id = any (v_ids) group by model) as by_model))
    from tidebase.runs where id = p_run_id);
end $$;

-- What a person sees of a run who decides on a gate or a step of it: its last five steps, its state up to 4,000 bytes, and
-- what it cost.
create or replace function tidebase._decision_context (p_run_id text) returns json
  language plpgsql stable set enable_seqscan = off as $$
begin
  return (select json_build_object(
    'steps', (select coalesce(json_agg(json_build_object(
                       'name', name, 'status', status, 'startedAt', tidebase._iso(started_at),
                       'completedAt', tidebase._iso(completed_at)) order by position), '[]')
                from (select name, status, started_at, completed_at, position from tidebase.steps
                       where run_id = p_run_id order by position desc limit 5) as last),
    'stepsCompleted', (select count(*) from tidebase.steps where run_id = p_run_id and status = 'completed'),
    'state', case when octet_length(s.value::text) <= 4000 then s.value end,
    'stateOmitted', coalesce(octet_length(s.value::text) > 4000, false), 'stateVersion', s.version,
    'costUsd', (c.cost->>'costUsd')::numeric, 'totalTokens', (c.cost->>'totalTokens')::bigint)
    from (select tidebase._cost(array[p_run_id]) as cost) as c
    left join tidebase.states s on s.run_id = p_run_id);
end $$;

-- What waits for a person, oldest first: pending gates of live runs, and steps of other than completed and cancelled runs
-- that wait for a review. Those after the item that waits since p_after_at and has the id p_after_id; null for all.
-- Bounds   at most 2,000 gates and 2,000 steps are looked at.
-- Returns  kind: gate or review; id: the gate's or the step's; at: since when.
create or replace function tidebase._open_approvals (p_after_at timestamptz, p_after_id text, p_limit integer)
  returns table (kind text, id text, at timestamptz, run_id text) language plpgsql stable
  set enable_seqscan = off as $$
begin
  return query
    (select 'gate', g.id, g.created_at, g.run_id
       from (select * from tidebase.gates
              where status = 'pending' and (p_after_id is null or (created_at, gates.id) > (p_after_at, p_after_id))
              order by created_at, gates.id limit 2000) g
       join tidebase.runs r on r.id = g.run_id and r.status in ('pending', 'queued', 'running', 'waiting')
      order by g.created_at, g.id limit p_limit)
    union all
    (select 'review', s.id, s.review_at, s.run_id
       from (select * from tidebase.steps
              where review_at is not null and (p_after_id is null or (review_at, steps.id) > (p_after_at, p_after_id))
              order by review_at, steps.id limit 2000) s
       join tidebase.runs r on r.id = s.run_id and r.status not in ('completed', 'cancelled')
      order by s.review_at, s.id limit p_limit)
    order by 3, 2 limit p_limit;
end $$;

-- What waits for a person, oldest first; or, if p_decided, the gates that were decided, newest first. One page: the items
-- after that of p_after_at and p_after_id, which are the two parts of the nextCursor of the page before; null for the
-- first.
-- Returns  {"items", "count": how many wait, at most 1,000, "more": whether more than these wait, "nextCursor"}. Without
--          p_tokens no gate has a token.
create or replace function tidebase.list_approvals (p_decided boolean, p_limit integer, p_after_at timestamptz,
                                                    p_after_id text, p_tokens boolean)
  returns json language plpgsql stable set enable_seqscan = off as $$
declare
  v_count bigint := (select count(*) from tidebase._open_approvals(null, null, 1001));
  v_items json[];
  v_next  text;
begin
  with page as (
    select *, row_number() over (order by at, id) as n
      from tidebase._open_approvals(p_after_at, p_after_id, p_limit) where not p_decided
    union all
    (select 'gate', id, resolved_at, run_id, row_number() over (order by resolved_at desc, id desc)
       from tidebase.gates
      where resolved_at is not null and p_decided
        and (p_after_id is null or (resolved_at, id) < (p_after_at, p_after_id))
      order by resolved_at desc, id desc limit p_limit)
  ), measured as (
    select page.*, sum(coalesce(octet_length(g.prompt), 0) + tidebase._bytes(g.data) + tidebase._bytes(g.decision_payload)
                       + tidebase._bytes(g.capability)) over (order by n) <= tidebase._budget() as room
      from page left join tidebase.gates g on page.kind = 'gate' and g.id = page.id
  )
  select array_agg(json_build_object(
           'kind', m.kind, 'since', tidebase._iso(m.at),
           'run', json_build_object('id', r.id, 'workflowName', r.workflow_name, 'status', r.status, 'queue', r.queue,
                                    'attempt', r.attempt, 'createdAt', tidebase._iso(r.created_at)),
           'gate', case when g.id is not null then tidebase._gate_asked(g, p_tokens, m.room) end,
           'step', case when s.id is not null then tidebase._step_light(s) end,
           'context', tidebase._decision_context(m.run_id)) order by m.n),
         (array_agg(tidebase._iso(m.at) || '_' || m.id order by m.n))[p_limit]
    into v_items, v_next
    from measured m
    join tidebase.runs r on r.id = m.run_id
    left join tidebase.gates g on m.kind = 'gate' and g.id = m.id
    left join tidebase.steps s on m.kind = 'review' and s.id = m.id;
  return json_build_object('items', coalesce(array_to_json(v_items), '[]'), 'count', least(v_count, 1000),
                           'more', v_count > 1000, 'nextCursor', v_next);
end $$;

-- A gate in a list: without payloads of more than 64 KiB; without p_room, without any, and its prompt cut. Its token comes
-- with p_tokens while it is pending.
create or replace function tidebase._gate_asked (g tidebase.gates, p_tokens boolean, p_room boolean)
  returns json language sql stable as $$
  select tidebase._joined(
           tidebase._gate_shown(g, p_tokens and g.status = 'pending',
                                case when p_room then g.prompt else left(g.prompt, 1000) end,
                                tidebase._in_list(g.data, p_room), tidebase._in_list(g.decision_payload, p_room),
                                tidebase._in_list(g.capability, p_room)),
           json_build_object('dataOmitted', not p_room or tidebase._bytes(g.data) > 65536))
$$;

-- What the token of a gate shows without an API key: the gate without its channels and its token, and the run's name and
-- status.
-- Needs    the token (TB409 gate_token_wrong).    Returns  {"gate": see below}.
create or replace function tidebase.look_at_gate (p_run_id text, p_gate_id text, p_token text) returns json
  language plpgsql stable as $$
declare
  v_gate tidebase.gates := tidebase._gate_by_token(p_run_id, p_gate_id, p_token);
begin
  return (select json_build_object('gate', json_build_object(
            'id', v_gate.id, 'runId', v_gate.run_id, 'name', v_gate.name, 'prompt', v_gate.prompt, 'data', v_gate.data,
            'status', v_gate.status, 'decision', nullif(v_gate.status, 'pending'), 'actor', v_gate.actor,
            'decisionPayload', v_gate.decision_payload, 'capability', v_gate.capability,
            'expiresAt', tidebase._iso(v_gate.expires_at), 'createdAt', tidebase._iso(v_gate.created_at),
            'resolvedAt', tidebase._iso(v_gate.resolved_at), 'workflowName', r.workflow_name, 'runStatus', r.status))
            from tidebase.runs r where r.id = p_run_id);
end $$;

-- Records which workers asked this server for work. p_workers: [{"owner", "queues", "workflows": null for all, "since_ms",
-- "ago_ms": so long ago it asked first, and last}].
-- Leaves   their rows; those of workers that asked nobody for a day deleted; of queue_minutes the last hour, summed up once
--          there are 10,000 rows.
-- Locks    rows of workers, in the order of their owners.
create or replace function tidebase.note_workers (p_workers jsonb) returns void language plpgsql as $$
declare
  v_now timestamptz := tidebase.now();
begin
  insert into tidebase.workers as w (owner, queues, workflows, since, last_asked_at)
  select owner, queues, workflows, v_now - tidebase._ms(since_ms), v_now - tidebase._ms(ago_ms)
    from jsonb_to_recordset(p_workers)
         as given (owner text, queues text[], workflows text[], since_ms bigint, ago_ms bigint)
   order by owner  -- every server locks the rows in this order
  on conflict (owner) do update
     set queues = excluded.queues, workflows = excluded.workflows,
         last_asked_at = greatest(w.last_asked_at, excluded.last_asked_at);
  delete from tidebase.workers where last_asked_at < v_now - interval '1 day';
  with gone as (
    delete from tidebase.queue_minutes where minute < v_now - interval '61 min'
        or (select count(*) from tidebase.queue_minutes) > 10000
    returning *
  )
  insert into tidebase.queue_minutes
  select queue, minute, sum(claims), sum(failures) from gone
   where minute >= v_now - interval '61 min' group by queue, minute;
end $$;

-- The last hour of a queue.
-- Returns  {"queue", "minutes": 60 of {"at", "claims", "failures"}, oldest first, "now"}.
create or replace function tidebase.list_minutes (p_queue text) returns json
  language plpgsql stable as $$
declare
  v_now timestamptz := tidebase.now();
begin
  return (
    select json_build_object('queue', p_queue, 'now', tidebase._iso(v_now), 'minutes', json_agg(json_build_object(
             'at', tidebase._iso(m.at), 'claims', coalesce(c.claims, 0),
             'failures', coalesce(c.failures, 0)) order by m.at))
      from generate_series(date_trunc('minute', v_now) - interval '59 min', date_trunc('minute', v_now),
                           interval '1 minute') as m (at)
      left join (select minute, sum(claims) as claims, sum(failures) as failures from tidebase.queue_minutes
                  where queue = p_queue and minute > v_now - interval '61 min' group by minute) as c
           on c.minute = m.at);
end $$;

-- The workers that asked for work within a day, or hold a run. p_workers: those that this server has not recorded yet, as
-- note_workers takes them.
-- Returns  {"workers": at most 500, the last heard first, "now"}. Of each: "id", null for workers without a name; "queues"
--          and "workflows", for which it asked last; "since", when it was first heard; "lastAskedAt"; "lastHeardAt", when it
--          asked or extended a lease; how many runs it holds, "running", and twenty of these, "runs".
create or replace function tidebase.list_workers (p_workers jsonb) returns json
  language plpgsql stable set enable_seqscan = off as $$
declare
  v_now timestamptz := tidebase.now();
begin
  return (
    with asked as (
      select owner, min(since) as since, max(at) as at, (array_agg(queues order by at desc))[1] as queues,
             (array_agg(workflows order by at desc))[1] as workflows
        from (select owner, since, last_asked_at as at, to_jsonb(queues) as queues, to_jsonb(workflows) as workflows
                from (select * from tidebase.workers order by last_asked_at desc limit 1000) as noted
              union all
              select owner, v_now - tidebase._ms(since_ms), v_now - tidebase._ms(ago_ms), queues,
                     nullif(workflows, 'null')
                from jsonb_to_recordset(p_workers)
                     as given (owner text, queues jsonb, workflows jsonb, since_ms bigint, ago_ms bigint)) as traces
       group by owner
    ), held as (
      select lease_owner as owner, count(*) as running, max(lease_expires_at - tidebase._ms(lease_ms)) as at,
             min(updated_at) as since, json_agg(json_build_object(
               'id', id, 'workflowName', workflow_name, 'queue', queue,
               'heartbeatAt', tidebase._iso(lease_expires_at - tidebase._ms(lease_ms))) order by n)
               filter (where n <= 20) as runs
        from (select id, workflow_name, queue, lease_owner, lease_expires_at, lease_ms, updated_at,
                     row_number() over (partition by lease_owner order by id desc) as n
                from (select id, workflow_name, queue, lease_owner, lease_expires_at, lease_ms, updated_at
                        from tidebase.runs where status = 'running' and not stalled limit 10000) as running) as numbered
       group by lease_owner
    )
    select json_build_object('now', tidebase._iso(v_now),
                             'workers', coalesce(json_agg(worker order by heard desc), '[]'))
      from (select greatest(a.at, h.at) as heard, json_build_object(
                     'id', nullif(coalesce(a.owner, h.owner), ''), 'queues', a.queues, 'workflows', a.workflows,
                     'since', tidebase._iso(coalesce(a.since, h.since)), 'lastAskedAt', tidebase._iso(a.at),
                     'lastHeardAt', tidebase._iso(greatest(a.at, h.at)), 'running', coalesce(h.running, 0),
                     'runs', coalesce(h.runs, '[]')) as worker
              from asked a full join held h on h.owner = a.owner
             order by 1 desc limit 500) as workers);
end $$;

-- Deletes a run with all that belongs to it.
-- Needs    the run (TB404 not_found), ended; and its parent, if any, completed, since a parent that is replayed would create
--          it again (TB409 run_not_ended).
-- Returns  {"deleted": its id}.    Locks  the run.
create or replace function tidebase.delete_run (p_run_id text) returns json language plpgsql as $$
declare
  v_run tidebase.runs := tidebase._lock_run(p_run_id);
begin
  if v_run.status not in ('completed', 'failed', 'cancelled') then
    perform tidebase._refuse(409, 'run_not_ended', format('run %s is %s: cancel it first', p_run_id, v_run.status));
  end if;
  if exists (select from tidebase.runs where id = v_run.parent_run_id and status <> 'completed') then
    perform tidebase._refuse(409, 'run_not_ended', format('run %s has a parent that may be replayed', p_run_id));
  end if;
  delete from tidebase.runs where id = p_run_id;
  perform tidebase._tally(v_run.queue, v_run.status, -1);
  return json_build_object('deleted', p_run_id);
end $$;

-- ------------------------------------------------------------------------------
-- Version: what this file leaves behind. A server refuses to work on an older one; a newer one is never turned back.
-- ------------------------------------------------------------------------------
do $$
declare
  v_version constant integer := 5;  -- SCHEMA_VERSION of tidebase_server/database.py; tests/test_schema.py pins it
begin
  insert into tidebase.meta (version) values (v_version)
  on conflict (only_row) do update set version = v_version, digest = null, applied_at = tidebase.now()
    where tidebase.meta.version <= v_version;
  if not found then
    raise exception 'the database has a newer schema than version %, and it is left alone', v_version;
  end if;
end $$;
