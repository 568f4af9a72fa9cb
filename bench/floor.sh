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
job='{"workflowName":"floor","metadata":{},"channels":[],"maxAttempts":3,"priority":0}'
{
  cat <<SQL
select tidebase.enqueue_run('floor' || :client_id, '$job', '$text');
select tidebase.claim_runs(array['floor' || :client_id], 'floor' || :client_id, null, 1, 60000, false)#>>'{runs,0,id}' as run \\gset
SQL
  for step in $(seq "$steps"); do
    if [ -n "${TWO_WRITES:-}" ]; then
      cat <<SQL
select (body->'step')->>'id' as step from tidebase.begin_step(:run, 's$step', 'h', '$text', '{}', 'floor' || :client_id, 60000) \\gset
select tidebase.complete_step(:run, :step, 'floor' || :client_id, '$text');
SQL
    else
      cat <<SQL
select tidebase.record_step(:run, 'floor' || :client_id, 's$step', 'h', '$text', '{}', '$text', null, false, null, now(), 5);
SQL
    fi
  done
  echo "select tidebase.complete_run(:run, 'floor' || :client_id, '$text');"
} >"$script"

report=$("$PGBENCH" -n -M "${PROTOCOL:-extended}" -f "$script" -c "$clients" -j "$((clients < 2 ? 1 : 2))" \
  -T "$seconds" -r "$url" 2>&1) || { echo "$report" >&2; exit 1; }
awk -v c="$clients" -v s="$steps" -v w="${TWO_WRITES:+2}" '
  /^tps = / { runs = $3 }
  /select .*record_step|select .*begin_step|select tidebase.complete_step/ { step += $1 }
  END { printf "{\"concurrency\": %d, \"writesPerStep\": %d, \"stepsPerSecond\": %.1f, \"runsPerSecond\": %.1f, " \
               "\"stepMilliseconds\": %.2f}\n", c, w ? w : 1, runs * s, runs, step / s }' <<<"$report"
