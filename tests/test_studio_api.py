"""What Studio asks of the server: why a run waits, what a resume would do, lists and pieces of runs without payloads,
what waits for a person, and who may read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import seed_studio
from click.testing import CliRunner
from conftest import LEASE_MS, Api, Receiver, config, eventually, refused

import tidebase
from tidebase_sdk import Tidebase
from tidebase_server import filters, studio

MINUTE_MS = 60_000


def why(api: Api, run: str) -> tuple[str, dict[str, Any]]:
    """The line and its parts, the same in the detail, in the list and in the light list."""
    shown = api.get(f"/runs/{run}?include=run")["run"]
    listed = next(r for r in api.get("/runs?limit=1000")["runs"] if r["id"] == run)
    light = next(r for r in api.get("/runs?limit=1000&view=light")["runs"] if r["id"] == run)
    assert shown["whyDetail"] == listed["whyDetail"] == light["whyDetail"]
    assert (shown["why"] is None) == (shown["whyDetail"] is None) == (shown["status"] in ("completed", "failed",
                                                                                        "cancelled"))
    detail = shown["whyDetail"]
    if detail:  # a page says the same line in its own time zone, with these values
        assert {name for _, name in re.findall(r"{(\w+):(\w+)}", detail["line"])} <= detail.keys()
        assert shown["why"].startswith(detail["line"].partition("{")[0])
    return shown["why"], detail


def line(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, text


# --- why


def test_a_run_at_work_says_whose_it_is_and_in_which_step(api: Api, clock):
    run = api.enqueue("q")
    api.claim("q", owner="worker-3")
    clock.advance(ms=2000)
    line(why(api, run)[0], "claimed by worker-3, heartbeat 2 s ago, between steps")
    api.begin_step(run, "draft", "worker-3")["step"]
    clock.advance(ms=8000)
    api.heartbeat(run, "worker-3")["run"]
    clock.advance(ms=4000)
    text, detail = why(api, run)
    line(text, "claimed by worker-3, heartbeat 4 s ago, in step draft for 12 s")
    assert (detail["kind"], detail["worker"], detail["step"]) == ("running", "worker-3", "draft")
    api.complete(run)["run"]
    assert why(api, run) == (None, None)


def test_a_queue_at_its_cap_names_the_runs_that_hold_it(api: Api):
    api.put("/queues/reports/config", {"concurrency": 2})["config"]
    first, second, third = (api.enqueue("reports", priority=-number) for number in range(3))
    api.claim("reports", limit=3)
    text, detail = why(api, third)
    assert text == f"queue reports is at its cap of 2: {first}, {second} hold it" or text == (
        f"queue reports is at its cap of 2: {second}, {first} hold it")
    assert (detail["kind"], detail["holders"], sorted(detail["runs"])) == ("queue_capped", 2, sorted([first, second]))


def test_a_rate_says_when_the_next_place_is_free(api: Api, clock):
    api.put("/queues/slow/config", {"ratePerMinute": 2})["config"]
    runs = [api.enqueue("slow") for _ in range(3)]
    api.claim("slow")
    clock.advance(ms=20_000)
    api.claim("slow")
    clock.advance(ms=28_000)
    text, detail = why(api, runs[2])
    line(text, "rate limit, next place in 1", " s")  # 12, less what the calls took
    assert (detail["kind"], detail["ratePerMinute"]) == ("rate_limited", 2)
    clock.advance(ms=12_000)
    assert why(api, runs[2])[1]["kind"] == "ready"


def test_a_run_that_is_tried_again_says_when_and_after_what(api: Api, sql):
    run = api.enqueue("q", maxAttempts=3)
    api.claim("q", owner="w")
    nul = json.dumps({"error": {"name": "TimeoutError", "message": "a\x00b"}, "leaseOwner": "w"})
    api.post(f"/runs/{run}/fail", raw=nul.encode())["run"]
    text, detail = why(api, run)
    line(text, "again at ", " UTC, attempt 2 of 3, after TimeoutError")
    assert (detail["kind"], detail["attempt"], detail["error"]) == ("retry", 2, "TimeoutError")
    assert detail["until"] == api.run(run)["runAt"]
    sql("update tidebase.runs set max_attempts = 1 where id = %s", run)  # by hand
    line(why(api, run)[0], "again at ", " UTC, attempt 2, after TimeoutError")


def test_a_run_that_waits_says_for_what(api: Api, clock):
    person, signal, sleeper, parent = (api.enqueue("q") for _ in range(4))
    api.claim("q", owner="w", limit=4)
    gate = api.post(f"/runs/{person}/gates/begin", {"name": "ok", "prompt": "Send this?"})["gate"]
    line(why(api, person)[0], "waits for a person since 0 s: Send this?")  # its worker holds it meanwhile
    assert why(api, person)[1]["worker"] == "w"
    children = [api.post(f"/runs/{parent}/children", {"name": n, "workflowName": "part"})["run"]["id"] for n in "abc"]
    for run, what, extra in ((person, {"gateId": gate["id"]}, {}),
                             (signal, {"event": "paid"}, {"timeoutMs": MINUTE_MS}),
                             (sleeper, {"until": "2040-01-01T00:00:00Z"}, {}), (parent, {"children": ["a", "b"]}, {})):
        assert api.post(f"/runs/{run}/wait", {"leaseOwner": "w", "for": what, **extra})["ready"] is False
    api.complete(children[0])["run"]
    clock.advance(ms=2 * 60 * MINUTE_MS)
    assert why(api, person)[0] == "waits for a person since 2 h: Send this?"
    line(why(api, signal)[0], "waits for signal paid, until ", " UTC")
    assert why(api, sleeper)[0] == "sleeps until 2040-01-01 00:00 UTC"
    assert why(api, parent)[0] == "waits for 1 of 2 children"
    assert [why(api, run)[1]["kind"] for run in (person, signal, sleeper, parent)] == [
        "gate", "signal", "sleep", "children"]


def test_a_lease_that_ran_out_is_told(api: Api, clock):
    plain, queued = api.create(), api.enqueue("q")
    api.begin(plain, "w")["run"]
    api.claim("q", owner="w")
    clock.advance(ms=LEASE_MS + 40_000)
    for run in (plain, queued):
        text, detail = why(api, run)
        assert text == "its lease ran out 40 s ago; nobody has begun it again"
        assert (detail["kind"], detail["worker"]) == ("lease_expired", "w")
    api.reconcile()
    assert why(api, plain)[1]["kind"] == "lease_expired"  # nobody but a person puts it back


def test_a_queue_that_nobody_asks_is_told_and_one_whose_workers_do_not_know_the_workflow(api: Api, sql):
    run = api.enqueue("reports")
    assert why(api, run)[0] == "nobody has asked queue reports for work in the last 5 min"
    api.put("/queues/reports/config", {"paused": True})["config"]
    api.claim("reports", owner="w")
    assert why(api, run)[0] == "queue reports is paused"
    api.put("/queues/reports/config", {"paused": False})["config"]
    assert why(api, run)[1]["kind"] == "ready"  # the claim of a moment ago left a trace
    api.claim("others", owner="w", workflows=["other"])
    assert why(api, run)[1]["kind"] == "ready"  # and the worker, which asks for its queues in turn, is still there
    sql("insert into tidebase.workers (owner, queues, workflows, since, last_asked_at)"
        " values ('other', array['mails'], array['mail'], now(), now())")
    other = api.enqueue("mails")
    assert why(api, other)[0] == "workers ask queue mails, but none of them for workflow report"
    sql("update tidebase.workers set last_asked_at = now() - interval '6 min'")
    text, detail = why(api, other)
    assert text == "nobody has asked queue mails for work in the last 5 min"
    assert detail["lastAskedAt"]


def test_other_reasons_to_wait_are_told_as_well(api: Api, receiver: Receiver):
    assert why(api, api.create())[1]["kind"] == "pending"
    line(why(api, api.enqueue("q", delayMs=MINUTE_MS))[0], "starts at ", " UTC")
    api.put("/queues/pushed/config", {"invokeUrl": receiver.url})["config"]
    pushed = api.enqueue("pushed")
    assert why(api, pushed)[1]["kind"] == "ready"
    api.reconcile()
    line(why(api, pushed)[0], "offered to the app 0 s ago, again at ")


# --- workers and queues


def test_workers_are_seen_by_what_they_ask_and_hold_and_noted_once_a_minute(api: Api, sql):
    runs = [api.enqueue("q") for _ in range(2)]
    api.claim("q", "r", owner="w-1", limit=2)
    api.claim("q")  # without a name
    held = api.create()
    api.begin(held, "cli")["run"]
    seen = {worker["id"]: worker for worker in api.get("/workers")["workers"]}
    assert set(seen) == {"w-1", None, "cli"}
    assert (seen["w-1"]["queues"], seen["w-1"]["workflows"], seen["w-1"]["running"]) == (["q", "r"], None, 2)
    assert sorted(run["id"] for run in seen["w-1"]["runs"]) == sorted(runs)
    assert seen["cli"]["queues"] is None
    assert sql("select count(*) from tidebase.workers") == [(0,)]
    api.server.recent_claims.save_at = 0.0
    api.server.recent_claims.save(api.server.database)
    assert sql("select owner, queues from tidebase.workers order by owner") == [("", ["q"]), ("w-1", ["q", "r"])]
    assert api.server.recent_claims.by_owner == {}
    since = next(worker["since"] for worker in api.get("/workers")["workers"] if worker["id"] == "w-1")
    api.claim("q", owner="w-1")
    assert next(w["since"] for w in api.get("/workers")["workers"] if w["id"] == "w-1") == since


def test_a_paused_queue_gives_out_no_runs_until_it_goes_on(api: Api, receiver: Receiver):
    run = api.enqueue("q")
    assert api.put("/queues/q/config", {"paused": True})["config"]["paused"] is True
    assert api.queue("q")["config"]["paused"] is True
    assert api.claim("q", waitMs=50) == []
    api.put("/queues/q/config", {"invokeUrl": receiver.url})["config"]
    api.reconcile()
    assert api.run(run)["attempt"] == 0
    assert api.detail(run)["recoveryAttempts"] == []
    api.put("/queues/q/config", {"invokeUrl": None, "paused": False})["config"]
    assert [r["id"] for r in api.claim("q")] == [run]


def test_claims_and_failures_of_the_last_hour_stand_by_the_minute(api: Api, clock, sql):
    for _ in range(3):
        api.enqueue("q", maxAttempts=2)
    run = api.claim("q", owner="w", limit=2)[0]["id"]
    api.fail(run, leaseOwner="w")["run"]
    clock.advance(ms=2 * MINUTE_MS)
    api.claim("q")
    minutes = api.get("/queues/q/minutes")["minutes"]
    assert len(minutes) == 60
    assert [(m["claims"], m["failures"]) for m in minutes if m["claims"]] == [(2, 1), (2, 0)] or [
        (m["claims"], m["failures"]) for m in minutes if m["claims"]] == [(2, 1), (1, 0)]
    clock.advance(ms=59 * MINUTE_MS)
    sql("select tidebase.note_workers('[]')")
    assert sum(m["failures"] for m in api.get("/queues/q/minutes")["minutes"]) == 0
    assert sql("select sum(failures) from tidebase.queue_minutes") == [(0,)]


def test_a_schedule_runs_now_and_a_cron_expression_shows_its_next_five_times(api: Api):
    api.put("/schedules/nightly", {"cron": "0 3 * * *", "workflowName": "report", "queue": "q"})["schedule"]
    first = api.post("/schedules/nightly/run", {"id": "now-1"})["run"]
    again = api.post("/schedules/nightly/run", {"id": "now-1"})["run"]
    assert (first["id"], again["id"], first["queue"]) == ("now-1", "now-1", "q")
    assert first["metadata"]["schedule"] == "nightly"
    assert len(api.get("/runs?queue=q")["runs"]) == 1
    refused(api.post("/schedules/none/run"), 404, "not_found")
    times = api.post("/schedules/preview", {"cron": "30 9 * * 1", "timezone": "Europe/Berlin"})["next"]
    assert len(times) == 5 and times == sorted(times) and all(t.endswith(":30:00.000Z") for t in times)
    assert refused(api.post("/schedules/preview", {"cron": "61 * * * *"}), 400, "invalid_request")["issues"][0][
        "path"] == "cron"
    assert refused(api.post("/schedules/preview", {"cron": "0 * * * *", "timezone": "Mars"}), 400,
                   "invalid_request")["issues"][0]["path"] == "timezone"


# --- the rerun plan


def with_all_plans(api: Api) -> str:
    """A run that failed with a step of each plan."""
    run = api.enqueue("plans", maxAttempts=1)
    api.claim("plans", owner="w")
    api.do_step(run, "fetch", "w", {"rows": 3})
    for name, options in (("draft", {}), ("charge", {"sideEffects": ["charge"], "idempotencyKey": "k-1"}),
                          ("send", {"sideEffects": ["mail"]}), ("wipe", {"sideEffects": ["wipe"], "replay": "never"})):
        api.begin_step(run, name, "w", options=options)["step"]
    api.fail(run, leaseOwner="w", retryable=False)["run"]
    return run


def test_the_plan_of_a_rerun_says_of_each_step_what_a_resume_does(api: Api):
    run = with_all_plans(api)
    plan = api.get(f"/runs/{run}/rerun").json
    assert {step["name"]: step["plan"] for step in plan["steps"]} == {
        "fetch": "replays", "draft": "runs", "charge": "runs_again", "send": "stops_for_review", "wipe": "never"}
    assert (plan["safe"], plan["blocking"]) == (False, ["send", "wipe"])
    assert plan["verdict"] == "Not without you: 'send', 'wipe' may have had their effect. Decide below."
    assert {"review", "retry", "fork"} <= set(plan["actions"])
    # And so it is: each is asked for as the plan has it.
    api.post(f"/runs/{run}/retry")["run"]
    api.claim("plans", owner="x")
    begun = {name: api.begin_step(run, name, "x", options=options) for name, options in (
        ("fetch", {}), ("draft", {}), ("charge", {"sideEffects": ["charge"], "idempotencyKey": "k-1"}),
        ("send", {"sideEffects": ["mail"]}), ("wipe", {"sideEffects": ["wipe"], "replay": "never"}))}
    assert {name: answer.json.get("action") or answer.json["code"] for name, answer in begun.items()} == {
        "fetch": "return", "draft": "execute", "charge": "execute", "send": "manual_review", "wipe": "manual_review"}


def test_a_plan_without_doubtful_steps_is_safe_and_a_live_run_needs_none(api: Api):
    run = api.enqueue("q", maxAttempts=1)
    api.claim("q", owner="w")
    assert api.get(f"/runs/{run}/rerun")["verdict"] == "It is at work: w holds it."
    for name in ("a", "b", "c"):
        api.do_step(run, name, "w")
    api.begin_step(run, "d", "w")["step"]
    api.begin_step(run, "pay", "w", options={"sideEffects": ["pay"], "idempotencyKey": "k"})["step"]
    assert api.get(f"/runs/{run}/rerun")["safe"] is None
    api.fail(run, leaseOwner="w", retryable=False)["run"]
    plan = api.get(f"/runs/{run}/rerun").json
    assert (plan["safe"], plan["verdict"]) == (True, "Safe: 3 steps replay, 1 step runs, 1 step runs again.")
    assert plan["actions"] == ["retry", "fork", "cancel"]
    refused(api.get("/runs/none/rerun"), 404, "not_found")


def test_the_plan_of_a_completed_run_reruns_nothing_and_asks_for_no_decision(api: Api):
    run = api.enqueue("q")
    api.claim("q", owner="w")
    api.do_step(run, "fetch", "w")
    options = {"sideEffects": ["mail"]}
    for name, fields in (("try", {"retryable": True}), ("send", {"resumeDecision": "manual_review"})):
        step = api.begin_step(run, name, "w", options=options)["step"]["id"]
        api.post(f"/runs/{run}/steps/{step}/fail", {"leaseOwner": "w", "error": "no", **fields})["step"]
    api.begin_step(run, "note", "w", options=options)["step"]
    assert "Decide" not in explained(api, run)  # its worker holds it: there is nothing to decide yet
    api.complete(run, leaseOwner="w")["run"]
    plan = api.get(f"/runs/{run}/rerun").json
    assert (plan["safe"], plan["blocking"], plan["actions"]) == (None, [], ["fork"])
    assert plan["verdict"] == "Nothing to rerun: it is completed. To run it again, fork it."
    assert {step["name"]: (step["status"], step["plan"]) for step in plan["steps"]} == {
        "fetch": ("completed", "replays"), "try": ("failed_retryable", "never"), "send": ("manual_review", "never"),
        "note": ("running", "never")}
    assert plan["counts"] == {"replays": 1, "runs": 0, "runs_again": 0, "stops_for_review": 0, "never": 3}
    shown = explained(api, run)
    line(shown, "is completed", "fork it")
    line(shown, "send", "never", "the run completed without it")
    assert "Decide" not in shown


def test_a_doubtful_step_of_a_run_that_nobody_holds_is_reviewed_before_anybody_resumes_it(api: Api):
    run = with_all_plans(api)
    steps = {step["name"]: step["id"] for step in api.detail(run)["steps"]}
    refused(api.post(f"/runs/{run}/steps/{steps['charge']}/review", {"decision": "retry"}), 409, "not_in_review")
    reviewed = api.post(f"/runs/{run}/steps/{steps['send']}/review", {"decision": "complete", "output": "sent"})["step"]
    assert (reviewed["status"], reviewed["output"]) == ("completed", "sent")
    assert [t for t in api.event_types(run) if t.startswith("step.")][-3:] == [
        "step.manual_review", "step.reviewed", "step.completed"]
    assert api.get(f"/runs/{run}/rerun")["blocking"] == ["wipe"]


def test_a_step_that_its_worker_still_holds_is_not_reviewed(api: Api):
    run = api.enqueue("q")
    api.claim("q", owner="w")
    step = api.begin_step(run, "send", "w", options={"sideEffects": ["mail"]})["step"]["id"]
    refused(api.post(f"/runs/{run}/steps/{step}/review", {"decision": "retry"}), 409, "not_in_review")


def explained(api: Api, run: str) -> str:
    """What `python tidebase.py explain` prints of a run."""
    asked = CliRunner().invoke(tidebase.main, ["explain", run], env={"TIDEBASE_URL": api.server.url})
    assert asked.exit_code == 0, asked.output
    return asked.output


def test_the_client_and_the_command_line_explain_a_run(api: Api):
    run = with_all_plans(api)
    with Tidebase(api.server.url) as tide:
        assert tide.runs.rerun_plan(run)["blocking"] == ["send", "wipe"]
    shown = explained(api, run)
    line(shown, "Not without you", "send", "stops for review", "idempotency key k-1", f"/studio/runs/{run}")
    line(shown, "Decide send", "tide.runs.review_step", run, "DECISION")
    assert "\n\n\n" not in explained(api, api.create())  # it has no steps
    asked = CliRunner().invoke(tidebase.main, ["explain", "none"], env={"TIDEBASE_URL": api.server.url})
    assert asked.exit_code == 1
    line(asked.output, "run none does not exist")


def test_names_that_would_steer_a_terminal_are_explained_in_plain_characters(api: Api):
    run = api.create()
    api.begin(run, "a")
    api.do_step(run, "\x1b[2Jgone\nforged line", "a")
    shown = explained(api, run)
    line(shown, "[2Jgone forged line", "replays")
    assert "\x1b" not in shown


# --- lists


def ids(answer: Any) -> list[str]:
    return [run["id"] for run in answer["runs"]]


def a_mixture(api: Api) -> dict[str, str]:
    """Runs of several statuses, oldest first."""
    runs = {"plain": api.create("mail", metadata={"user": 7, "name": "x"}), "queued": api.enqueue("q", "report")}
    runs["failed"] = api.enqueue("q", "mail", maxAttempts=1, priority=9)
    api.claim("q", owner="w")
    api.fail(runs["failed"], {"name": "Boom", "message": "50% of it_all"}, leaseOwner="w")["run"]
    runs["retrying"] = api.enqueue("q", "report", maxAttempts=2, priority=9)
    api.claim("q", owner="w")
    api.fail(runs["retrying"], {"name": "Slow", "message": "no answer"}, leaseOwner="w")["run"]
    runs["cancelled"] = api.create("report")
    api.post(f"/runs/{runs['cancelled']}/cancel", {"reason": "no"})["run"]
    runs["done"] = api.create("report", metadata={"user": "7"})
    api.complete(runs["done"])["run"]
    return runs


def test_the_list_is_filtered_by_all_that_a_person_looks_for(api: Api):
    runs = a_mixture(api)
    name_of = {run: name for name, run in runs.items()}
    created = {name: api.run(run)["createdAt"] for name, run in runs.items()}
    for query, names in {
            "status=failed,cancelled": ["cancelled", "failed"], "status=completed,pending": ["done", "plain"],
            "status=queued,failed&workflow=mail": ["failed"], "queue=q&status=failed,queued": [
                "retrying", "failed", "queued"],
            "errors=true": ["retrying", "failed"], "text=NO ANSWER": ["retrying"], "text=50%25 of it_": ["failed"],
            "text=5% of": [], f"text={runs['done']}": ["done"], f"text={runs['done'][:30]}": ["done"],
            "metadata.user=7": ["done", "plain"], "metadata.user=7&metadata.name=x": ["plain"],
            "metadata.user=7&status=pending,failed": ["plain"], "failureClass=max_retries": [],
            f"since={created['done']}": ["done"], f"until={created['failed']}": ["queued", "plain"],
            "sort=oldest&status=failed,completed": ["failed", "done"],
            "sort=ended": ["done", "cancelled", "failed"], "status=failed&metadata.user=7": [],
            "sort=ended&status=failed": ["failed"], f"parent={runs['done']}": []}.items():
        for view in ("", "&view=light"):
            assert [name_of[i] for i in ids(api.get(f"/runs?{query.replace(' ', '%20')}{view}"))] == names, query
    for query, path in {"status=odd": "status", "state=failed": "state", "errors=yes": "errors", "sort=up": "sort",
                        "status=failed&status=queued": "status", "since=now": "since", "limit=0": "limit",
                        "view=all": "view", "before=x": "before", "text=%00": "text"}.items():
        issues = refused(api.get(f"/runs?{query}"), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == [path]


@pytest.mark.parametrize("query", ["", "status=pending,queued,cancelled", "sort=oldest&status=pending,queued",
                                   "sort=ended", "errors=true", "metadata.a=1"])
def test_pages_follow_each_other_without_gap_or_repeat_whatever_the_filter(api: Api, query):
    for number in range(4):
        api.create(metadata={"a": 1})
        api.post(f"/runs/{api.create()}/cancel")["run"]
        run = api.enqueue(f"q{number}", maxAttempts=1 + number % 2)
        api.claim(f"q{number}", owner="w")
        api.fail(run, leaseOwner="w")["run"]
    whole = ids(api.get(f"/runs?{query}&limit=1000".replace("?&", "?")))
    assert len(whole) >= 4
    paged, cursor = [], ""
    while cursor is not None:
        page = api.get(f"/runs?{query}&limit=3{cursor and '&before=' + cursor}".replace("?&", "?"))
        paged += ids(page)
        cursor = page["nextCursor"]
    assert paged == whole


def test_a_search_goes_on_with_its_cursor_where_it_stopped_looking(api: Api, monkeypatch):
    monkeypatch.setattr(filters, "SEARCHED", 4)
    names = ["rare" if number in (0, 5) else "usual" for number in range(11)]
    runs = [api.enqueue(name, "mail") for name in names]
    found, cursor, asked = [], "", 0
    while cursor is not None:
        page = api.get(f"/runs?queue=rare&workflow=mail&status=queued,failed{cursor and '&before=' + cursor}")
        found, cursor, asked = found + ids(page), page["nextCursor"], asked + 1
    assert found == [runs[5], runs[0]]
    assert asked == 3
    assert api.get("/counts?queue=rare&workflow=mail").json["counts"]["queued"] == {"count": 0, "more": True}


def test_runs_are_counted_by_status_with_the_same_filters(api: Api, monkeypatch):
    a_mixture(api)
    counts = api.get("/counts")["counts"]
    assert {status: count["count"] for status, count in counts.items()} == {
        "pending": 1, "queued": 2, "running": 0, "waiting": 0, "completed": 1, "failed": 1, "cancelled": 1}
    assert not any(count["more"] for count in counts.values())
    assert api.get("/counts?workflow=mail&status=failed")["total"] == {"count": 2, "more": False}
    assert api.get("/counts?errors=true")["total"]["count"] == 2
    monkeypatch.setattr(filters, "COUNTED", 1)
    assert api.get("/counts")["counts"]["queued"] == {"count": 1, "more": True}
    refused(api.get("/counts?limit=3"), 400, "invalid_request")


def test_a_light_list_carries_no_payload_and_says_what_it_leaves_out(api: Api):
    big = "x" * 50_000
    run = api.create(input={"a": big}, metadata={"note": "y" * 5000})
    api.begin(run, "w")["run"]
    api.fail(run, {"name": "Boom", "message": big, "stack": big}, leaseOwner="w")["run"]
    other = api.create(metadata={"a": 1})
    text = api.get("/runs?view=light").text
    assert len(text) < 5000
    light = {run["id"]: run for run in json.loads(text)["runs"]}
    assert light[run]["error"] == {"name": "Boom", "message": big[:300]}
    assert (light[run]["metadata"], light[run]["metadataOmitted"]) == (None, True)
    assert (light[other]["metadata"], light[other]["metadataOmitted"]) == ({"a": 1}, False)
    assert not {"input", "result"} & set(light[run])
    for error in ("plain words", None, 7, {"message": "\x00"}, ["a"]):
        run = api.create()
        api.begin(run, "w")["run"]
        api.fail(run, error, leaseOwner="w")["run"]
        assert api.get(f"/runs?text={run}&view=light")["runs"][0]["status"] == "failed"


def test_changes_of_a_page_are_told_and_nothing_else(api: Api):
    runs = a_mixture(api)
    query = "status=queued,pending,running&limit=2"
    first = api.post("/changes", {"query": query}).json
    known = {run["id"]: run["version"] for run in first["runs"]}
    assert first["ids"] == [runs["retrying"], runs["queued"]]
    assert first["nextCursor"]
    same = api.post("/changes", {"query": query, "known": known}).json
    assert (same["ids"], same["runs"]) == (first["ids"], [])
    api.claim("q", owner="w")
    changed = api.post("/changes", {"query": query, "known": known}).json
    assert [(run["id"], run["status"]) for run in changed["runs"]] == [(runs["queued"], "running")]
    api.heartbeat(runs["queued"], "w")["run"]
    known |= {run["id"]: run["version"] for run in changed["runs"]}
    new = api.create()
    assert api.post("/changes", {"query": query, "known": known}).json["ids"] == [new, runs["retrying"]]
    refused(api.post("/changes", {"query": "colour=red"}), 400, "invalid_request")


def test_one_action_for_all_that_match_says_first_how_many_and_then_a_result_per_run(api: Api):
    runs = [api.enqueue("q") for _ in range(5)]
    other = api.enqueue("r")
    dry = api.post("/bulk", {"action": "cancel", "filter": "queue=q", "dryRun": True}).json
    assert (dry["count"], dry["more"], len(dry["sample"])) == (5, False, 5)
    assert api.run(runs[0])["status"] == "queued"
    late = api.enqueue("q")  # after it was counted: left alone
    refused(api.post("/bulk", {"action": "cancel", "filter": "queue=q", "expected": 5}), 409, "count_changed")
    done, cursor = [], dry["cursor"]
    while cursor:
        batch = api.post("/bulk", {"action": "cancel", "filter": "queue=q", "cursor": cursor, "limit": 2,
                                   "reason": "old", "actor": "ann"}).json
        done, cursor = done + batch["results"], batch["cursor"]
    assert [result["id"] for result in done if result["ok"]] == runs[::-1]
    assert (api.run(runs[0])["cancelReason"], api.run(runs[0])["cancelActor"]) == ("old", "ann")
    assert [api.run(run)["status"] for run in (late, other)] == ["queued", "queued"]
    retried = api.post("/bulk", {"action": "retry", "ids": [runs[0], late, "none"]}).json["results"]
    assert [(r["ok"], r["status"], r["code"]) for r in retried] == [
        (True, "queued", None), (True, "queued", None), (False, None, "not_found")]
    deleted = api.post("/bulk", {"action": "delete", "ids": [runs[1], late]}).json["results"]
    assert [(r["ok"], r["code"]) for r in deleted] == [(True, None), (False, "run_not_ended")]
    assert api.get(f"/runs/{runs[1]}").status == 404
    assert api.queue("q")["cancelled"] == 3
    refused(api.post("/bulk", {"action": "cancel", "ids": ["a"], "filter": ""}), 400, "invalid_request")
    refused(api.post("/bulk", {"action": "melt", "ids": ["a"]}), 400, "invalid_request")


def test_a_run_that_ended_is_deleted_but_not_the_child_that_a_replay_needs(api: Api):
    parent = api.create()
    child = api.post(f"/runs/{parent}/children", {"name": "c", "workflowName": "part"})["run"]["id"]
    api.complete(child)["run"]
    refused(api.send("DELETE", f"/runs/{child}"), 409, "run_not_ended")
    api.complete(parent)["run"]
    assert api.send("DELETE", f"/runs/{child}")["deleted"] == child
    refused(api.send("DELETE", f"/runs/{child}"), 404, "not_found")


# --- a run in pieces


def test_the_summary_counts_costs_with_those_of_all_descendants(api: Api):
    run = api.create(input={"n": 12345678901234567890})
    child = api.post(f"/runs/{run}/children", {"name": "c", "workflowName": "part"})["run"]["id"]
    grandchild = api.post(f"/runs/{child}/children", {"name": "g", "workflowName": "part"})["run"]["id"]
    for number, each in enumerate((run, child, grandchild)):
        api.post(f"/runs/{each}/usage", {"model": "m", "inputTokens": 10 ** number, "costUsd": 0.25})["usage"]
    api.begin(run, "w")["run"]
    api.do_step(run, "a", "w")
    api.put(f"/runs/{run}/state", {"value": {"p": 1}})["state"]
    summary = api.get(f"/runs/{run}/summary").json
    assert summary["cost"]["own"]["costUsd"] == 0.25
    assert (summary["cost"]["subtree"]["costUsd"], summary["cost"]["subtree"]["inputTokens"]) == (0.75, 111)
    assert summary["cost"]["subtree"]["runs"] == 3
    assert (summary["counts"]["steps"], summary["counts"]["children"], summary["counts"]["stepsByStatus"]) == (
        1, 1, {"completed": 1})
    assert (summary["run"]["inputBytes"], summary["state"]["version"]) == (len('{"n": 12345678901234567890}'), 1)
    assert summary["run"]["startedAt"]
    assert api.get(f"/runs/{child}/summary")["parent"] == {"id": run, "name": "c"}
    tree = api.get(f"/runs/{run}/tree").json
    assert [(r["id"], r["parentRunId"], r["depth"]) for r in tree["runs"]] == [
        (run, None, 0), (child, run, 1), (grandchild, child, 2)]
    assert api.get(f"/runs/{run}/tree?limit=2")["truncated"] is True
    usage = api.get(f"/runs/{run}/usage?subtree=true").json
    assert (len(usage["usage"]), usage["byModel"][0]["costUsd"]) == (3, 0.75)
    assert len(api.get(f"/runs/{run}/usage")["usage"]) == 1
    for part in ("summary", "steps", "tree", "deliveries", "signals", "usage", "state/versions?view=light"):
        refused(api.get(f"/runs/none/{part}"), 404, "not_found")


def test_a_light_step_leaves_a_large_contract_out_and_the_document_says_so(api: Api):
    run = api.create()
    api.begin_step(api.begin(run, "w")["run"]["id"], "s", "w", options={"credentials": ["x" * 5000], "replay": "never"})
    [step] = api.get(f"/runs/{run}/steps")["steps"]
    assert step["resumeContract"] == {"sideEffects": [], "idempotencyKey": None, "replay": "never", "credentials": [],
                                      "checkpointInvariant": None, "verifiedBy": None, "payloadOmitted": True}
    light = api.get("/openapi.json").json["components"]["schemas"]["lightContract"]
    assert set(light["properties"]) == set(step["resumeContract"])


def test_steps_and_events_come_in_pages_without_payloads(api: Api):
    run = api.create()
    api.begin(run, "w")["run"]
    big = {"text": "x" * 20_000}
    for number in range(5):
        api.do_step(run, f"step{number}", "w", big, input=big)
    step = api.begin_step(run, "bad\\one", "w")["step"]["id"]
    api.fail_step(run, step, "w", {"name": "Boom", "message": "m", "text": "\x00" + "y" * 5000})["step"]
    page = api.get(f"/runs/{run}/steps?limit=4").json
    assert [s["name"] for s in page["steps"]] == ["step0", "step1", "step2", "step3"]
    assert page["steps"][0]["outputBytes"] == len(json.dumps(big))
    assert not {"input", "output", "options"} & set(page["steps"][0])
    rest = api.get(f"/runs/{run}/steps?limit=4&after={page['nextCursor']}").json
    assert [s["name"] for s in rest["steps"]] == ["step4", "bad\\one"]
    assert rest["nextCursor"] is None
    assert rest["steps"][1]["error"] == {"name": "Boom", "message": "m"}
    assert [s["name"] for s in api.get(f"/runs/{run}/steps?errors=true")["steps"]] == ["bad\\one"]
    assert [s["name"] for s in api.get(f"/runs/{run}/steps?text=STEP1")["steps"]] == ["step1"]
    assert len(api.get(f"/runs/{run}/steps?status=completed")["steps"]) == 5

    def events(query):
        return api.get(f"/runs/{run}/events?{query}", headers={"accept": "application/json"}).json

    light = events("view=light")
    assert [e["seq"] for e in light] == list(range(1, len(light) + 1))
    failed = light[-1]
    assert (failed["type"], failed["name"], failed["stepId"], failed["payload"]) == (
        "step.failed", "bad\\one", step, None)
    assert failed["payloadOmitted"] is True and failed["payloadBytes"] > 5000
    assert [e["seq"] for e in events("after=2&limit=3")] == [3, 4, 5]
    assert {e["type"] for e in events("types=step.completed,run.")} == {"run.created", "run.started", "step.completed"}
    api.complete(run, result=big)["run"]
    stream = api.get(f"/runs/{run}/events?view=light&follow=false&after={failed['seq']}").text
    assert '"type" : "run.completed"' in stream
    assert len(stream) < 1000


EXACT = '{"z": 1.0, "a": 12345678901234567890, "u": "\\u0000 \\u00e4 ä 🌊", "a": 1e400}'


def test_a_payload_is_given_to_the_letter_in_parts_or_whole(api: Api):
    run = api.post("/runs/report", raw=b'{"input": ' + EXACT.encode() + b"}")["run"]["id"]
    whole = api.get(f"/runs/{run}/payload")
    assert whole.text == EXACT
    assert whole.headers["content-type"] == "text/plain; charset=utf-8"
    assert whole.headers["x-tidebase-bytes"] == str(len(EXACT.encode()))
    assert whole.headers["content-disposition"].startswith("attachment")
    part = api.get(f"/runs/{run}/payload?of=input&offset=5&limit=50")
    assert part.text == EXACT[5:55]
    assert part.headers["x-tidebase-characters"] == str(len(EXACT))
    assert "content-disposition" not in part.headers
    assert api.get(f"/runs/{run}/payload?of=result").text == "null"  # as in its detail
    refused(api.get("/runs/nowhere/payload"), 404, "not_found")
    refused(api.get(f"/runs/{run}/payload?of=secrets"), 400, "invalid_request")
    refused(api.get(f"/runs/{run}/payload?of=event&id=x"), 400, "invalid_request")
    api.begin(run, "w")["run"]
    step = api.do_step(run, "a", "w", {"out": 1}, input={"in": 1})
    gate = api.post(f"/runs/{run}/gates/begin", {"name": "g", "prompt": "?", "data": {"d": 1}})["gate"]["id"]
    api.put(f"/runs/{run}/state", {"value": {"s": 1}})["state"]
    version = api.get(f"/runs/{run}/state/versions?view=light")["stateVersions"][0]
    assert (version["streamName"], version["bytes"]) == ("run", 8)
    assert "value" not in version
    signal = api.post(f"/runs/{run}/signals", {"name": "paid", "payload": {"p": 1}})["signal"]["id"]
    for of, id, text in (("step.input", step, '{"in": 1}'), ("step.output", step, '{"out": 1}'),
                         ("gate.data", gate, '{"d": 1}'), ("state", version["id"], '{"s": 1}'),
                         ("signal", signal, '{"p": 1}'), ("metadata", "", "{}")):
        assert api.get(f"/runs/{run}/payload?of={of}&id={id}").text == text
    other = api.create()
    refused(api.get(f"/runs/{other}/payload?of=step.input&id={step}"), 404, "not_found")


def test_versions_of_the_state_come_in_pages_by_stream_and_version(api: Api):
    run = api.create()
    for number in range(3):
        for stream in ("b", "a"):
            api.put(f"/runs/{run}/state", {"value": number, "stream": stream})["state"]
    found, after = [], ""
    while after is not None:
        page = api.get(f"/runs/{run}/state/versions?view=light&limit=4{after and '&after=' + after}").json
        found, after = found + [(v["streamName"], v["version"]) for v in page["stateVersions"]], page["nextCursor"]
    assert found == [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]


def test_a_webhook_that_was_given_up_is_sent_once_more_under_the_same_id(api: Api, receiver: Receiver):
    receiver.answers[:] = [404, 200]
    run = api.create(channels=[{"type": "webhook", "url": receiver.url, "events": ["run.cancelled"]}])
    api.post(f"/runs/{run}/cancel")["run"]

    def delivery():
        return api.get(f"/runs/{run}/deliveries")["deliveries"][0]

    eventually(lambda: delivery()["status"] == "failed")
    before = delivery()
    assert (before["kind"], before["httpStatus"], before["eventType"]) == ("channel", 404, "run.cancelled")
    again = api.post(f"/runs/{run}/deliveries/{before['id']}/resend")["delivery"]
    assert (again["status"], again["attempts"]) == ("pending", 0)
    eventually(lambda: delivery()["status"] == "delivered")
    assert [body["deliveryId"] for body in receiver.bodies()] == [before["id"]] * 2
    refused(api.post(f"/runs/{run}/deliveries/none/resend"), 404, "not_found")


def test_signals_are_listed(api: Api):
    run = api.create()
    api.post(f"/runs/{run}/signals", {"name": "a", "payload": "x" * 5000})["signal"]
    api.post(f"/runs/{run}/signals", {"name": "b", "payload": 1})["signal"]
    first, second = api.get(f"/runs/{run}/signals")["signals"]
    assert (first["payload"], first["payloadOmitted"], first["payloadBytes"]) == (None, True, 5002)
    assert (second["name"], second["payload"]) == ("b", 1)


# --- approvals


def test_all_that_waits_for_a_person_stands_in_one_list_oldest_first(api: Api):
    first, second, ended = api.create(), api.enqueue("q", maxAttempts=1), api.create()
    for run, prompt in ((first, "One?"), (ended, "Never?")):
        api.post(f"/runs/{run}/gates/begin", {"name": "ok", "prompt": prompt, "data": {"a": 1}})["gate"]
    api.complete(ended)["run"]
    api.claim("q", owner="w")
    api.do_step(second, "fetch", "w")
    step = api.begin_step(second, "send", "w", options={"sideEffects": ["mail"]})["step"]["id"]
    api.fail_step(second, step, "w", "boom", resumeDecision="manual_review")["step"]
    api.post(f"/runs/{second}/usage", {"costUsd": 0.5})["usage"]
    api.put(f"/runs/{second}/state", {"value": {"p": 1}})["state"]
    api.fail(second, leaseOwner="w")["run"]
    answer = api.get("/approvals").json
    assert (answer["count"], answer["more"]) == (2, False)
    gate, review = answer["items"]
    assert (gate["kind"], gate["run"]["id"], gate["gate"]["prompt"], gate["gate"]["data"]) == (
        "gate", first, "One?", {"a": 1})
    assert (review["kind"], review["run"]["id"], review["step"]["name"]) == ("review", second, "send")
    assert [s["name"] for s in review["context"]["steps"]] == ["fetch", "send"]
    assert (review["context"]["state"], review["context"]["costUsd"]) == ({"p": 1}, 0.5)
    page = api.get("/approvals?limit=1").json
    assert [i["kind"] for i in api.get(f"/approvals?limit=1&after={page['nextCursor']}")["items"]] == ["review"]
    api.post(f"/runs/{first}/gates/{gate['gate']['id']}/resolve", {
        "token": gate["gate"]["resolveToken"], "decision": "approved", "actor": "ann"})["gate"]
    api.post(f"/runs/{second}/steps/{step}/review", {"decision": "retry"})["step"]
    assert api.get("/approvals").json["items"] == []
    given_up = with_all_plans(api)
    marked = next(s["id"] for s in api.detail(given_up)["steps"] if s["name"] == "send")
    api.post(f"/runs/{given_up}/retry")["run"]
    api.claim("plans", owner="x")
    assert api.begin_step(given_up, "send", "x", options={"sideEffects": ["mail"]}).status == 409
    assert [item["step"]["id"] for item in api.get("/approvals")["items"]] == [marked]
    api.post(f"/runs/{given_up}/cancel")["run"]
    assert api.get("/approvals").json["count"] == 0  # nobody needs to know any more
    [decided] = api.get("/approvals?status=decided")["items"]
    assert (decided["gate"]["actor"], decided["gate"]["resolveToken"], decided["gate"]["reviewUrl"]) == (
        "ann", None, None)


def test_a_gate_is_looked_at_with_its_token_alone(start_server, receiver: Receiver):
    server = start_server(TIDEBASE_API_KEY="the key of the test", TIDEBASE_PUBLIC_URL="https://tide.example/base")
    api, stranger = Api(server.url, server, key="the key of the test"), Api(server.url)
    run = api.create("mailing")
    gate = api.post(f"/runs/{run}/gates/begin", {
        "name": "ok", "prompt": "Send?", "data": {"to": "ann"},
        "channels": [{"type": "webhook", "url": receiver.url}]})["gate"]
    token = gate["resolveToken"]
    assert gate["reviewUrl"] == f"https://tide.example/base/studio/review#{run}/{gate['id']}/{token}"
    [told] = receiver.wait_for(1)
    assert told["payload"]["gate"]["reviewUrl"] == gate["reviewUrl"]
    seen = stranger.post(f"/runs/{run}/gates/{gate['id']}/look", {"token": token})["gate"]
    assert (seen["prompt"], seen["data"], seen["workflowName"], seen["status"], seen["runStatus"]) == (
        "Send?", {"to": "ann"}, "mailing", "pending", "pending")
    assert token not in json.dumps(seen)
    refused(stranger.post(f"/runs/{run}/gates/{gate['id']}/look", {"token": "no"}), 409, "gate_token_wrong")
    refused(stranger.post(f"/runs/none/gates/{gate['id']}/look", {"token": token}), 409, "gate_token_wrong")
    refused(stranger.get(f"/runs/{run}"), 401, "unauthorized")
    stranger.post(f"/runs/{run}/gates/{gate['id']}/resolve", {"token": token, "decision": "rejected"})["gate"]
    seen = stranger.post(f"/runs/{run}/gates/{gate['id']}/look", {"token": token})["gate"]
    assert seen["status"] == "rejected"
    assert api.get(f"/runs/{run}/gates/{gate['id']}")["gate"]["reviewUrl"] is None


# --- access and files


def test_the_read_key_reads_everything_but_tokens_and_writes_nothing(start_server, receiver: Receiver):
    server = start_server(TIDEBASE_API_KEY="the key of the test", TIDEBASE_READ_KEY="the key that reads")
    api, reader = Api(server.url, server, key="the key of the test"), Api(server.url, server, key="the key that reads")
    run = api.enqueue("q")
    gate = api.post(f"/runs/{run}/gates/begin", {"name": "ok", "prompt": "?", "channels": [
        {"type": "webhook", "url": receiver.url}]})["gate"]
    token = gate["resolveToken"]
    receiver.wait_for(1)
    delivery = api.get(f"/runs/{run}/deliveries")["deliveries"][0]["id"]
    for path in (f"/runs/{run}?include=gates,channelDeliveries", f"/runs/{run}/gates/{gate['id']}"):
        assert token in api.get(path).text
    for path in (f"/runs/{run}", f"/runs/{run}/gates/{gate['id']}", "/approvals", "/runs", f"/runs/{run}/deliveries",
                 f"/runs/{run}/summary", "/counts", "/workers", "/queues", "/schedules", "/usage"):
        answer = reader.get(path)
        assert answer.status == 200
        assert token not in answer.text, path
    assert token in api.get(f"/runs/{run}/payload?of=delivery&id={delivery}").text
    refused(reader.get(f"/runs/{run}/payload?of=delivery&id={delivery}"), 404, "not_found")
    assert reader.post("/changes", {"query": ""}).status == 200
    assert reader.post("/schedules/preview", {"cron": "0 * * * *"}).status == 200
    assert (reader.get("/session")["access"], api.get("/session")["access"]) == ("read", "full")
    for method, path in (("POST", "/runs/report"), ("POST", f"/runs/{run}/cancel"), ("DELETE", f"/runs/{run}"),
                         ("POST", "/queues/claim"), ("POST", "/queues/q/enqueue"), ("PUT", "/queues/q/config"),
                         ("POST", "/bulk"), ("POST", "/writes"), ("POST", "/steps"), ("POST", "/heartbeats"),
                         ("PUT", f"/runs/{run}/state"), ("DELETE", "/schedules/x"),
                         ("POST", f"/runs/{run}/deliveries/{delivery}/resend")):
        refused(reader.send(method, path, {}), 403, "read_only")
    assert api.run(run)["status"] == "queued"
    refused(Api(server.url, key="the key that guesses").get("/session"), 401, "unauthorized")


@pytest.mark.parametrize("keys", [{"TIDEBASE_READ_KEY": "only this one"},
                                  {"TIDEBASE_READ_KEY": "the same", "TIDEBASE_API_KEY": "the same"}])
def test_a_read_key_that_could_write_is_refused_at_the_start(keys):
    with pytest.raises(tidebase.ConfigError, match="TIDEBASE_READ_KEY"):
        config(**keys)


def test_the_pages_files_need_no_key_and_say_what_they_may_load(start_server, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(studio, "FOLDER", tmp_path)
    server = start_server(TIDEBASE_API_KEY="the key of the test")
    stranger = Api(server.url)
    refused(stranger.get("/studio"), 404, "not_found")
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "studio.js").write_text("export {}")
    (tmp_path / "icon.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"></svg>')
    (tmp_path / "Secret.txt").write_text("no")
    front = stranger.get("/")
    assert (front.status, front.headers["location"]) == (302, "/studio")
    for path in ("/studio", "/studio/", "/studio/runs", "/studio/runs/run.1", "/studio/runs/a%2Fb/steps/x.js",
                 "/studio/Secret.txt"):
        page = stranger.get(path)
        assert (page.status, page.text) == (200, "<!doctype html>"), path
    assert page.headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "frame-ancestors 'none'")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    script = stranger.get("/studio/studio.js")
    assert (script.text, script.headers["content-type"]) == ("export {}", "text/javascript; charset=utf-8")
    again = stranger.get("/studio/studio.js", headers={"if-none-match": script.headers["etag"]})
    assert (again.status, again.text) == (304, "")
    for path in ("/studio/other.js", "/studio/..%2Fschema.css"):
        refused(stranger.get(path), 404, "not_found")
    assert "<text" not in stranger.get("/studio/icon.svg").text
    assert ">12</text></svg>" in stranger.get("/studio/icon.svg?n=12").text
    refused(stranger.get("/session"), 401, "unauthorized")


def test_costs_come_as_a_file_for_spreadsheets_too(api: Api):
    run = api.create()
    for model, cost in (("=cmd()", "0.10"), ("m", "1234.1234567")):
        raw = json.dumps({"model": model, "inputTokens": 5})[:-1] + f', "costUsd": {cost}}}'
        assert api.post(f"/runs/{run}/usage", raw=raw.encode()).status == 200
    lines = api.get("/usage?by=model&format=csv").text.splitlines()
    assert lines[0] == "model,entries,runs,inputTokens,outputTokens,totalTokens,costUsd"
    assert lines[1].startswith("m,1,1,5,") and lines[1].endswith(",1234.1234567")
    assert lines[2].startswith("'=cmd(),1,1,5,")


# --- what Studio is shown with


def test_the_seeded_mixture_has_a_run_for_each_reason_to_wait_and_for_each_plan(api: Api, database):
    made = seed_studio.mixture(api.server.url, database)
    kinds = {run["whyDetail"]["kind"] for run in api.get(
        "/runs?view=light&limit=1000&status=pending,queued,running,waiting")["runs"]}
    assert kinds >= {"running", "queue_capped", "rate_limited", "paused", "retry", "scheduled", "gate", "signal",
                     "sleep", "children", "lease_expired", "nobody_asks", "pending"}
    assert why(api, made["parent"])[0] == "waits for 3 of 40 children"
    line(why(api, made["gates"][0][0])[0], "waits for a person since 26 h: Send this answer to 214 customers?")
    assert {step["plan"] for step in api.get(f"/runs/{made['plans']}/rerun")["steps"]} == {
        "replays", "runs", "runs_again", "stops_for_review", "never"}
    assert [item["kind"] for item in api.get("/approvals")["items"]].count("gate") == 4
    assert made["review"][1] in api.get("/approvals").text
    assert len(api.get("/usage?by=day")["groups"]) >= seed_studio.DAYS - 2
    assert api.get(f"/runs/{made['parent']}/summary")["cost"]["subtree"]["runs"] == 41


def test_many_runs_and_a_long_one_are_seeded_whole(api: Api, database):
    seed_studio.many(database, 3000)
    long = seed_studio.long_run(database, 50, 200)
    counts = api.get("/counts")["counts"]
    assert sum(count["count"] for count in counts.values()) == 3001
    assert len(api.events(long)) == 200
    assert len(api.get(f"/runs/{long}/steps?limit=1000")["steps"]) == 50
