#!/usr/bin/env bash
# The limit: what pgbench sustains when it calls the SQL functions that the server calls, with nothing in between.
#
#   floor.sh DATABASE_URL [CLIENTS [SECONDS [STEPS]]]      one write a step: record_step
#   TWO_WRITES=1 floor.sh DATABASE_URL ...                 begin_step, complete_step
#
# The database holds a Tidebase schema (`tidebase.py migrate`). Each client is a worker on a queue of its own: enqueue,
# claim, STEPS steps with 200 bytes in and out, complete; each call is a statement, so a transaction, of its own, sent
# as the server sends it (PROTOCOL=extended: no prepared statements; PROTOCOL=prepared shows what those would bring).
# Prints one JSON object: compare its stepsPerSecond with those of flow.py. PGBENCH names the binary, else the one in
# the Python wheel that the server uses, else the system's.
set -euo pipefail
url=$1 clients=${2:-8} seconds=${3:-8} steps=${4:-10}
cd "$(dirname "$0")"

if [ -z "${PGBENCH:-}" ]; then
  PGBENCH=$("${PYTHON:-python3}" -c 'import common; print(common.binary("pgbench"))' 2>/dev/null || command -v pgbench)
fi
script=$(mktemp)
trap 'rm -f "$script"' EXIT
text="{\"text\":\"$(printf 'x%.0s' $(seq 200))\"}"
job='{"workflow_name":"floor","metadata":{},"channels":[],"max_attempts":3,"priority":0}'
run="p_run_id => :run, p_lease_owner => 'floor' || :client_id"
{
  cat <<SQL
select tidebase.enqueue_run(p_queue => 'floor' || :client_id, p_job => '$job', p_input => '$text');
select tidebase.claim_runs(p_queues => array['floor' || :client_id], p_lease_owner => 'floor' || :client_id, p_id => null, p_limit => 1, p_lease_ms => 60000, p_checkpoints => false)#>>'{runs,0,id}' as run \\gset
SQL
  for step in $(seq "$steps"); do
    if [ -n "${TWO_WRITES:-}" ]; then
      cat <<SQL
select (body->'step')->>'id' as step from tidebase.begin_step($run, p_name => 's$step', p_input_hash => 'h', p_input => '$text', p_options => '{}', p_lease_ms => 60000) \\gset
select tidebase.complete_step($run, p_step_id => :step, p_output => '$text');
SQL
    else
      cat <<SQL
select tidebase.record_step($run, p_name => 's$step', p_input_hash => 'h', p_input => '$text', p_options => '{}', p_output => '$text', p_error => null, p_retryable => false, p_resume_decision => null, p_started_at => now(), p_duration_ms => 5);
SQL
    fi
  done
  echo "select tidebase.complete_run($run, p_result => '$text');"
} >"$script"

report=$("$PGBENCH" -n -M "${PROTOCOL:-extended}" -f "$script" -c "$clients" -j "$((clients < 2 ? 1 : 2))" \
  -T "$seconds" -r "$url" 2>&1) || { echo "$report" >&2; exit 1; }
awk -v c="$clients" -v s="$steps" -v w="${TWO_WRITES:+2}" '
  /^tps = / { runs = $3 }
  /select .*record_step|select .*begin_step|select tidebase.complete_step/ { step += $1 }
  END { printf "{\"concurrency\": %d, \"writesPerStep\": %d, \"stepsPerSecond\": %.1f, \"runsPerSecond\": %.1f, " \
               "\"stepMilliseconds\": %.2f}\n", c, w ? w : 1, runs * s, runs, step / s }' <<<"$report"
