"""A schedule enqueues a run each time its cron expression says, once, in its own time zone, whoever ticks.

The database's clock is set to days of the past, whose daylight saving no law can change any more.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import urllib.parse
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from conftest import ROOT, Answer, Api, refused, together

KEYS = {"name", "cron", "workflowName", "input", "queue", "maxAttempts", "enabled", "nextRunAt", "lastEnqueuedAt",
        "createdAt", "updatedAt", "timezone"}
NEW_YORK, BERLIN = "America/New_York", "Europe/Berlin"


def schedule(api: Api, name: str = "s", cron: Any = "0 * * * *", **body: Any) -> Answer:
    return api.put(f"/schedules/{urllib.parse.quote(name, safe='')}", {"cron": cron, "workflowName": "report", **body})


def shown(api: Api, name: str = "s") -> Any:
    return next(one for one in api.get("/schedules")["schedules"] if one["name"] == name)


def runs(api: Api) -> list[Any]:
    """The runs there are, oldest first."""
    return api.get("/runs")["runs"][::-1]


def fire_times(api: Api) -> list[str]:
    return [run["metadata"]["fireTime"] for run in runs(api) if "fireTime" in run["metadata"]]


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def wire(text: str) -> str:
    """A time as the protocol writes it."""
    return utc(text).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@pytest.fixture
def set_time(clock, sql):
    """Sets the database's clock; from there it goes on."""
    def set_to(text: str) -> None:
        behind = utc(text) - sql("select tidebase.now()")[0][0]
        clock.advance(ms=round(behind.total_seconds() * 1000))

    return set_to


# --- set, listed, deleted


def test_a_schedule_shows_all_of_itself_and_when_it_fires_next(api, set_time):
    set_time("2024-05-15T10:31:00Z")
    answer = schedule(api, "team/daily", "0 8 * * 1-5", input={"b": 1, "a": 2}, queue="mail", maxAttempts=5,
                      timezone=BERLIN)["schedule"]
    assert answer.keys() == KEYS
    assert {key: answer[key] for key in KEYS - {"createdAt", "updatedAt"}} == {
        "name": "team/daily", "cron": "0 8 * * 1-5", "workflowName": "report", "input": {"b": 1, "a": 2},
        "queue": "mail", "maxAttempts": 5, "enabled": True, "timezone": BERLIN,
        "nextRunAt": "2024-05-16T06:00:00.000Z", "lastEnqueuedAt": None}
    second = schedule(api, "a")["schedule"]
    assert (second["queue"], second["timezone"], second["input"], second["maxAttempts"], second["enabled"]) == (
        "default", "UTC", {}, 3, True)
    assert api.get("/schedules").json == {"schedules": [second, answer]}


def test_the_input_comes_back_to_the_letter(api, set_time):
    text = '{"z": 1.0, "a": [1e2, "\\u0000"], "n": -0.0}'
    raw = f'{{"cron": "* * * * *", "workflowName": "w", "input": {text}}}'.encode()
    set_time("2024-05-15T10:31:30Z")
    assert f'"input" : {text}' in api.put("/schedules/s", raw=raw).text
    set_time("2024-05-15T10:32:00Z")
    assert api.reconcile() == 1
    assert f'"input" : {text}' in api.get(f"/runs/{runs(api)[0]['id']}").text


def test_a_deleted_schedule_fires_no_more_and_its_runs_stay(api, clock):
    schedule(api, "team/daily")["schedule"]
    clock.advance(ms=3_600_000)
    assert api.reconcile() == 1
    assert api.send("DELETE", "/schedules/team%2Fdaily").json == {"deleted": "team/daily"}
    refused(api.send("DELETE", "/schedules/team%2Fdaily"), 404, "not_found")
    assert api.get("/schedules")["schedules"] == []
    clock.advance(ms=3_600_000)
    assert api.reconcile() == 0
    assert len(runs(api)) == 1


# --- a fire


def test_a_fire_enqueues_a_run_that_tells_its_schedule_and_time(api, set_time):
    set_time("2024-05-15T10:59:00Z")
    schedule(api, "hourly", input={"x": 1}, queue="mail", maxAttempts=5)["schedule"]
    assert api.reconcile() == 0
    set_time("2024-05-15T11:00:00Z")
    assert api.reconcile() == 1
    run, = runs(api)
    fired = "2024-05-15T11:00:00.000Z"
    assert (run["workflowName"], run["status"], run["queue"], run["input"], run["maxAttempts"], run["priority"],
            run["metadata"], run["dedupeKey"]) == (
        "report", "queued", "mail", {"x": 1}, 5, 0, {"schedule": "hourly", "fireTime": fired},
        f"sched:hourly:{fired}")
    assert api.event_types(run["id"]) == ["run.enqueued"]
    after = shown(api, "hourly")
    assert after["nextRunAt"] == "2024-05-15T12:00:00.000Z"
    assert fired <= after["lastEnqueuedAt"] <= run["createdAt"]
    assert api.reconcile() == 0
    assert [taken["id"] for taken in api.claim("mail", owner="a")] == [run["id"]]


def test_a_fire_wakes_a_worker_who_waits(api, clock):
    schedule(api)["schedule"]
    clock.advance(ms=3_600_000)
    with together(lambda: api.claim(owner="a", waitMs=25_000), api.reconcile) as answers:
        assert len(answers[0]) == 1


def test_after_downtime_a_schedule_fires_once(api, set_time):
    set_time("2024-05-15T10:31:00Z")
    schedule(api, cron="*/5 * * * *")["schedule"]
    set_time("2024-05-18T03:33:00Z")
    assert api.reconcile() == 1
    assert api.reconcile() == 0
    assert fire_times(api) == ["2024-05-15T10:35:00.000Z"]  # the first time it missed, and none of the others
    assert shown(api)["nextRunAt"] == "2024-05-18T03:35:00.000Z"
    set_time("2024-05-18T03:35:00Z")
    assert api.reconcile() == 1


def test_a_run_that_still_works_does_not_keep_the_next_from_starting(api, set_time):
    set_time("2024-05-15T10:31:00Z")
    schedule(api)["schedule"]
    for hour in (11, 12):
        set_time(f"2024-05-15T{hour}:00:00Z")
        assert api.reconcile() == 1
    assert [run["status"] for run in runs(api)] == ["queued", "queued"]


def test_a_fire_whose_key_a_run_of_another_workflow_has_does_not_hold_the_schedule_up(api, set_time):
    set_time("2024-05-15T10:31:00Z")
    schedule(api, queue="q")["schedule"]
    squatter = api.enqueue("q", "other", dedupeKey="sched:s:2024-05-15T11:00:00.000Z")
    set_time("2024-05-15T11:00:00Z")
    assert api.reconcile() == 0
    assert shown(api)["nextRunAt"] == "2024-05-15T12:00:00.000Z"
    set_time("2024-05-15T12:00:00Z")
    assert api.reconcile() == 1
    assert [run["workflowName"] for run in runs(api)] == ["other", "report"]
    assert api.run(squatter)["status"] == "queued"


# --- changed


def test_set_again_as_it_was_a_schedule_skips_and_repeats_nothing(api, set_time):
    set_time("2024-05-15T10:31:00Z")
    first = schedule(api)["schedule"]
    set_time("2024-05-15T11:10:00Z")  # due since 11:00, not fired yet
    again = schedule(api, workflowName="other", input={"x": 1}, queue="mail", maxAttempts=1)["schedule"]
    assert (again["nextRunAt"], again["createdAt"]) == (first["nextRunAt"], first["createdAt"])
    assert again["updatedAt"] > first["updatedAt"]
    assert api.reconcile() == 1
    run, = runs(api)
    assert (run["workflowName"], run["queue"], run["input"], run["maxAttempts"]) == ("other", "mail", {"x": 1}, 1)


def test_another_cron_or_time_zone_counts_from_now(api, set_time):
    set_time("2024-05-15T10:31:00Z")
    schedule(api, cron="0 11 * * *")["schedule"]
    set_time("2024-05-15T11:10:00Z")
    assert schedule(api, cron="30 11 * * *")["schedule"]["nextRunAt"] == "2024-05-15T11:30:00.000Z"
    assert api.reconcile() == 0
    changed = schedule(api, cron="30 11 * * *", timezone=BERLIN)["schedule"]
    assert changed["nextRunAt"] == "2024-05-16T09:30:00.000Z"


def test_a_disabled_schedule_does_not_fire_and_enabled_again_it_counts_from_then(api, set_time):
    set_time("2024-05-15T10:31:00Z")
    schedule(api)["schedule"]
    disabled = schedule(api, enabled=False)["schedule"]
    assert (disabled["enabled"], disabled["nextRunAt"]) == (False, "2024-05-15T11:00:00.000Z")
    set_time("2024-05-15T13:10:00Z")
    assert api.reconcile() == 0
    assert (shown(api)["nextRunAt"], shown(api)["lastEnqueuedAt"]) == ("2024-05-15T14:00:00.000Z", None)
    set_time("2024-05-15T13:59:59Z")
    assert schedule(api, enabled=False)["schedule"]["nextRunAt"] == "2024-05-15T14:00:00.000Z"
    assert schedule(api)["schedule"]["nextRunAt"] == "2024-05-15T14:00:00.000Z"
    assert api.reconcile() == 0
    assert runs(api) == []


# --- what cron means


@pytest.mark.parametrize(("cron", "then"), [
    ("* * * * *", ["2024-05-15T10:32", "2024-05-15T10:33"]),
    ("*/20 * * * *", ["2024-05-15T10:40", "2024-05-15T11:00"]),
    ("20/10 * * * *", ["2024-05-15T10:40", "2024-05-15T10:50", "2024-05-15T11:20", "2024-05-15T11:30"]),
    ("5,10-12 8 * * *", ["2024-05-16T08:05", "2024-05-16T08:10", "2024-05-16T08:11", "2024-05-16T08:12",
                         "2024-05-17T08:05"]),
    ("10-30/10 8 * * *", ["2024-05-16T08:10", "2024-05-16T08:20", "2024-05-16T08:30", "2024-05-17T08:10"]),
    ("0 0 * * 0", ["2024-05-19T00:00", "2024-05-26T00:00"]),          # the 19th of May 2024 was a Sunday
    ("0 0 * * 7", ["2024-05-19T00:00", "2024-05-26T00:00"]),
    ("0 0 * * sun", ["2024-05-19T00:00", "2024-05-26T00:00"]),
    ("0 0 * * 5-7", ["2024-05-17T00:00", "2024-05-18T00:00", "2024-05-19T00:00", "2024-05-24T00:00"]),
    ("0 0 20 * 5", ["2024-05-17T00:00", "2024-05-20T00:00", "2024-05-24T00:00"]),  # the 20th, or a Friday
    ("0 0 20 * *", ["2024-05-20T00:00", "2024-06-20T00:00"]),
    ("0 0 31 * *", ["2024-05-31T00:00", "2024-07-31T00:00"]),
    ("0 12 29 2 *", ["2028-02-29T12:00", "2032-02-29T12:00"]),
    ("0 0 1 JAN,jul *", ["2024-07-01T00:00", "2025-01-01T00:00"]),
    ("  0   0  1 1  * ", ["2025-01-01T00:00"]),
])
def test_a_cron_expression_means_what_cron_means(api, set_time, cron, then):
    set_time("2024-05-15T10:31:30Z")
    schedule(api, cron=cron)["schedule"]
    for fires in then:
        assert shown(api)["nextRunAt"] == f"{fires}:00.000Z"
        set_time(f"{fires}:00Z")
        assert api.reconcile() == 1
    assert fire_times(api) == [f"{fires}:00.000Z" for fires in then]


@pytest.mark.parametrize(("cron", "zone", "start", "then"), [
    # Spring: half past two does not exist on that day. What is due in the gap fires when the gap ends.
    ("30 2 * * *", NEW_YORK, "2024-03-09T12:00:00-05:00",
     ["2024-03-10T03:00:00-04:00", "2024-03-11T02:30:00-04:00"]),
    ("30 2 * * *", BERLIN, "2024-03-30T12:00:00+01:00",
     ["2024-03-31T03:00:00+02:00", "2024-04-01T02:30:00+02:00"]),
    # Autumn: half past one comes twice. A time of the day fires the first time only.
    ("30 1 * * *", NEW_YORK, "2024-11-02T12:00:00-04:00",
     ["2024-11-03T01:30:00-04:00", "2024-11-04T01:30:00-05:00"]),
    ("30 2 * * *", BERLIN, "2024-10-26T12:00:00+02:00",
     ["2024-10-27T02:30:00+02:00", "2024-10-28T02:30:00+01:00"]),
    # What goes by the hour or the minute keeps its pace: each hour that passes, and none that does not.
    ("30 * * * *", NEW_YORK, "2024-03-10T01:15:00-05:00",
     ["2024-03-10T01:30:00-05:00", "2024-03-10T03:30:00-04:00"]),
    ("30 * * * *", NEW_YORK, "2024-11-03T01:15:00-04:00",
     ["2024-11-03T01:30:00-04:00", "2024-11-03T01:30:00-05:00", "2024-11-03T02:30:00-05:00"]),
    ("*/30 * * * *", BERLIN, "2024-10-27T02:15:00+02:00",
     ["2024-10-27T02:30:00+02:00", "2024-10-27T02:00:00+01:00", "2024-10-27T02:30:00+01:00",
      "2024-10-27T03:00:00+01:00"]),
    ("*/30 * * * *", BERLIN, "2024-03-31T01:15:00+01:00",
     ["2024-03-31T01:30:00+01:00", "2024-03-31T03:00:00+02:00", "2024-03-31T03:30:00+02:00"]),
    # The rest of the year a time of the day stays that time on the wall, whatever UTC makes of it.
    ("0 9 * * *", NEW_YORK, "2024-03-09T08:00:00-05:00",
     ["2024-03-09T09:00:00-05:00", "2024-03-10T09:00:00-04:00", "2024-03-11T09:00:00-04:00"]),
    ("0 0 * * *", "Asia/Kathmandu", "2024-05-15T12:00:00Z", ["2024-05-16T00:00:00+05:45"]),
])
def test_a_schedule_keeps_to_the_clocks_of_its_time_zone(api, set_time, cron, zone, start, then):
    set_time(start)
    schedule(api, cron=cron, timezone=zone)["schedule"]
    for fires in then:
        assert shown(api)["nextRunAt"] == wire(fires)
        set_time(fires)
        assert api.reconcile() == 1
        assert api.reconcile() == 0
    assert fire_times(api) == [wire(fires) for fires in then]


def test_in_the_hour_that_autumn_repeats_nothing_fires_again(api, set_time):
    # Issue: asked in the second of the two hours, cronsim answered with a time of the first, which was past, so that
    # the schedule fired at every tick.
    set_time("2024-11-03T01:10:00-05:00")
    fresh = schedule(api, "fresh", "30 1 * * *", timezone=NEW_YORK)["schedule"]
    assert fresh["nextRunAt"] == wire("2024-11-04T01:30:00-05:00")
    set_time("2024-11-02T12:00:00-04:00")
    schedule(api, "late", "30 1 * * *", timezone=NEW_YORK)["schedule"]
    set_time("2024-11-03T01:10:00-05:00")  # the server was down at half past one, the first of the two
    assert api.reconcile() == 1
    assert shown(api, "late")["nextRunAt"] == wire("2024-11-04T01:30:00-05:00")
    for run in runs(api):
        api.claim(owner="a")
        api.complete(run["id"])["run"]
    assert api.reconcile() == 0


def test_a_machine_without_time_zones_has_them_all_the_same():
    # Issue: where the system brings no zone database, as in small containers, not even UTC was a time zone.
    script = "from datetime import *; import tidebase; print(tidebase.next_fire('0 9 * * *', 'Europe/Berlin', {}))"
    script = script.format("datetime(2024, 5, 15, 12, tzinfo=UTC)")
    environment = {**os.environ, "PYTHONTZPATH": "", "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "2024-05-16 09:00:00+02:00"


# --- what fails apart


def failed_sweeps(caplog) -> list[str]:
    return [record.job for record in caplog.records if getattr(record, "event", "") == "sweep_failed"]


def test_a_schedule_whose_time_zone_this_host_lacks_holds_up_nothing_else(api, clock, sql, caplog):
    for name in ("after", "before", "there"):
        schedule(api, name)["schedule"]
    sql("update tidebase.schedules set timezone = 'Mars/Olympus' where name = 'before'")
    sql("update tidebase.schedules set next_run_at = next_run_at - interval '1 hour' where name = 'before'")
    run = api.enqueue()
    api.claim(owner="a")
    clock.advance(ms=3_600_000)
    assert api.reconcile() == 3
    assert sorted(run["metadata"].get("schedule", "") for run in runs(api)) == ["", "after", "there"]
    assert api.run(run)["status"] == "queued"
    assert failed_sweeps(caplog) == ["schedule 'before'"]
    assert "Mars/Olympus" in caplog.text
    assert api.reconcile() == 0
    assert failed_sweeps(caplog) == ["schedule 'before'"]  # logged once, not at every tick
    sql("update tidebase.schedules set timezone = 'UTC' where name = 'before'")
    assert api.reconcile() == 1


@pytest.fixture
def hasty(sql, start_server):
    """A server whose statements are cancelled after a second."""
    [(name,)] = sql("select current_database()")
    sql(f"alter database {name} set statement_timeout = '1s'")
    try:
        yield start_server()
    finally:
        sql(f"alter database {name} reset statement_timeout")


@pytest.mark.parametrize(("locked", "sweep"), [
    ("lock table tidebase.gates", "expire_gates"),
    ("select from tidebase.queue_tallies for update", "fold_tallies"),
    ("select pg_advisory_xact_lock(hashtextextended('tidebase.queue.pushed', 0))", "offer_runs"),
    ("select from tidebase.schedules where name = 'locked' for update", "schedule 'locked'"),
])
def test_a_sweep_that_the_database_cancels_keeps_no_other_from_running(hasty, database, clock, caplog, locked, sweep):
    api = Api(hasty.url, hasty)
    for name in ("before", "locked", "then"):
        schedule(api, name)["schedule"]
    api.put("/queues/pushed/config", {"invokeUrl": "http://127.0.0.1:1/", "concurrency": 1})["config"]
    api.enqueue("pushed")
    run, overdue = api.enqueue(), api.create(deadlineMs=1000)
    api.claim(owner="a")
    clock.advance(ms=3_600_000)
    patient_until = hasty.reconciler.patient_until
    with psycopg.connect(database) as other:
        if sweep == "fold_tallies":
            other.execute("insert into tidebase.queue_tallies select 'q', 'failed', 1 from generate_series(1, 101)")
            other.commit()
        other.execute(locked)
        hasty.reconciler.tick()
        assert failed_sweeps(caplog) == [sweep]
        assert "canceling statement due to statement timeout" in caplog.text
        assert api.run(run)["status"] == "queued"
        assert api.run(overdue)["status"] == "cancelled"
        fired = {run["metadata"].get("schedule") for run in runs(api)}
        assert fired >= {"before", "then"}
    assert "database_away" not in {getattr(record, "event", "") for record in caplog.records}
    assert hasty.reconciler.patient_until == patient_until  # no outage, so leases need no grace
    hasty.reconciler.tick()
    assert failed_sweeps(caplog) == [sweep]


def test_an_overdue_run_that_somebody_has_locked_holds_up_nothing_else(api, database, clock):
    first, second = (api.create(deadlineMs=1000 + n) for n in range(2))
    schedule(api)["schedule"]
    clock.advance(ms=3_600_000)
    with psycopg.connect(database) as other:
        other.execute("select from tidebase.runs where id = %s for update", (first,))
        assert api.reconcile() == 2
        assert [api.run(run)["status"] for run in (first, second)] == ["pending", "cancelled"]
        assert len(fire_times(api)) == 1
    assert api.reconcile() == 1
    assert api.run(first)["status"] == "cancelled"


# --- refusals


def test_a_bad_cron_or_time_zone_is_refused_and_named_and_changes_nothing(api):
    kept = schedule(api)["schedule"]
    crons = ["", "* * * *", "* * * * * *", "@daily", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *",
             "* * * 13 *", "* * * * 8", "5-1 * * * *", "*/0 * * * *", "1,,2 * * * *", "-1 * * * *", "a * * * *",
             "1.5 * * * *", "L * * * *", "\u0663 * * * *", "0 0 30 2 *", "9" * 5000 + " * * * *", "*\0* * * *", 5, None,
             ["* * * * *"]]
    for cron in crons:
        issues = refused(schedule(api, cron=cron), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == ["cron"], cron
    [issue] = refused(schedule(api, cron="0 0 30 2 *"), 400, "invalid_request")["issues"]
    assert "that fires on some day" in issue["message"]  # five fields, and no February has a 30th
    zones = ["", "Mars/Olympus", "../../etc/passwd", "/etc/localtime", "UTC\0", "a" * 100_000, "Europe", "zone.tab", 5,
             None, "\ud83d\ude00"]
    for zone in zones:
        issues = refused(schedule(api, timezone=zone), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == ["timezone"], zone
    assert api.get("/schedules")["schedules"] == [kept]


def test_other_wrong_shapes_are_refused_by_name(api):
    cases = [({"workflowName": None}, "workflowName"), ({"workflowName": ""}, "workflowName"),
             ({"queue": ""}, "queue"), ({"queue": None}, "queue"), ({"queue": "\0"}, "queue"),
             ({"maxAttempts": 0}, "maxAttempts"), ({"maxAttempts": "3"}, "maxAttempts"),
             ({"maxAttempts": True}, "maxAttempts"), ({"enabled": "yes"}, "enabled"), ({"enabled": 1}, "enabled"),
             ({"enabled": None}, "enabled")]
    for change, path in cases:
        issues = refused(schedule(api, **change), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == [path], change
    for body, paths in (({}, ["cron", "workflowName"]), ({"cron": "* * * * *"}, ["workflowName"])):
        issues = refused(api.put("/schedules/s", body), 400, "invalid_request")["issues"]
        assert sorted(issue["path"] for issue in issues) == paths
    assert api.get("/schedules")["schedules"] == []


def test_names_too_long_to_enqueue_by_are_refused_when_they_are_set(api, clock):
    # Issue: the runs of such a schedule could not be enqueued, and with it no other of the reconciler's work was done.
    choose = random.Random(7).choices
    name, queue = ("".join(choose([chr(c) for c in range(0x4E00, 0x9FFF)], k=512)) for _ in range(2))
    issues = refused(schedule(api, name, queue=queue), 400, "invalid_request")["issues"]
    assert [issue["path"] for issue in issues] == ["name"]
    schedule(api, name)["schedule"]
    schedule(api, "short", queue=queue)["schedule"]
    clock.advance(ms=3_600_000)
    assert api.reconcile() == 2


# --- races


def test_a_schedule_that_is_due_fires_once_however_many_servers_tick(api, server, start_server, clock):
    servers = [server, *[start_server() for _ in range(2)]]
    for name in ("a", "b", "c"):
        schedule(api, name)["schedule"]
    for hour in range(1, 4):
        clock.advance(ms=3_600_000)
        with together(*[one.reconciler.tick for one in servers * 2]) as fired:
            assert sum(fired) == 3
        assert len(runs(api)) == 3 * hour
    assert len({run["dedupeKey"] for run in runs(api)}) == 9


def test_a_schedule_that_is_deleted_or_disabled_while_it_fires_fires_once_or_not_at_all(api, server, clock):
    for name in "abcdef":
        schedule(api, name)["schedule"]
    clock.advance(ms=3_600_000)
    with together(server.reconciler.tick, *[lambda n=n: schedule(api, n, enabled=False) for n in "abc"],
                  *[lambda n=n: api.send("DELETE", f"/schedules/{n}") for n in "def"]) as answers:
        assert {answer.status for answer in answers[1:]} == {200}
        assert len(runs(api)) == answers[0]
    clock.advance(ms=3_600_000)
    assert api.reconcile() == 0
