"""A queued run that waits for a person, a signal, a time or its children holds no worker, and comes back by itself."""

from __future__ import annotations

import pytest
from conftest import Api, refused, together


def waiting(api, wait_for, owner="w", **body):
    """A run of worker `owner` that was told to wait.  :returns: its id."""
    run = api.enqueue()
    api.claim(owner=owner)
    if "gateId" in wait_for:
        wait_for = {"gateId": api.post(f"/runs/{run}/gates/begin", {"name": "ok", "prompt": "?"})["gate"]["id"]}
    answer = api.post(f"/runs/{run}/wait", {"leaseOwner": owner, "for": wait_for, **body})
    assert answer["ready"] is False
    assert answer["run"]["status"] == "waiting"
    assert answer["run"]["leaseOwner"] is None
    return run


def decide(api, run, decision="approved"):
    gate = api.detail(run)["gates"][0]
    return api.post(f"/runs/{run}/gates/{gate['id']}/resolve", {"token": gate["resolveToken"], "decision": decision})


def came_back(api, run):
    """The run is claimed at once, as attempt 1: no attempt was spent on waiting."""
    [claimed] = api.claim(owner="next")
    assert claimed["id"] == run
    assert claimed["attempt"] == 1
    assert api.event_types(run)[-4:-2] == ["run.waiting", "gate.resolved"] or "run.resumed" in api.event_types(run)
    return claimed


def test_a_run_that_waits_for_a_gate_comes_back_when_it_is_decided(api):
    run = waiting(api, {"gateId": None})
    assert api.claim(owner="other") == []
    decide(api, run)
    came_back(api, run)
    assert api.event_types(run) == ["run.enqueued", "run.claimed", "gate.created", "run.waiting", "gate.resolved",
                                    "run.resumed", "run.claimed"]


def test_a_gate_that_times_out_wakes_its_run(api, clock):
    run = api.enqueue()
    api.claim(owner="w")
    gate = api.post(f"/runs/{run}/gates/begin", {"name": "ok", "prompt": "?", "timeoutMs": 60_000})["gate"]
    api.post(f"/runs/{run}/wait", {"leaseOwner": "w", "for": {"gateId": gate["id"]}})
    clock.advance(ms=60_000)
    api.reconcile()
    came_back(api, run)
    assert api.detail(run)["gates"][0]["actor"] == "timeout"


def test_a_gate_decided_three_leases_later_still_wakes_its_run(api, clock):
    run = waiting(api, {"gateId": None})
    for _ in range(3):
        clock.advance(ms=60_000)
        api.reconcile()
    assert api.run(run)["status"] == "waiting"
    decide(api, run)
    came_back(api, run)


def signal(api, run, name="paid", **body):
    return api.post(f"/runs/{run}/signals", {"name": name, **body})


def test_signals_sent_at_once_are_numbered_and_wake_their_run_once(api):
    run = waiting(api, {"event": "paid"})
    with together(*[lambda n=n: signal(api, run, payload=n) for n in range(8)]) as answers:
        sent = {answer["signal"]["n"]: answer["signal"] for answer in answers}
    assert sorted(sent) == list(range(1, 9))
    assert api.get(f"/runs/{run}/signals/paid")["signal"] == sent[1]
    assert [api.get(f"/runs/{run}/signals/paid?n={n}")["signal"] for n in range(1, 10)] == [
        *(sent[n] for n in range(1, 9)), None]
    assert api.event_types(run).count("run.resumed") == 1
    assert api.event_types(run).count("signal.received") == 8
    came_back(api, run)


def test_a_wait_for_the_second_signal_of_a_name_is_not_over_with_the_first(api):
    run = waiting(api, {"event": "paid", "n": 2})
    signal(api, run)["signal"]
    signal(api, run, "other")["signal"]
    assert api.run(run)["status"] == "waiting"
    signal(api, run, payload="second")["signal"]
    came_back(api, run)
    assert api.get(f"/runs/{run}/signals/paid?n=2&waitMs=20000")["signal"]["payload"] == "second"


def test_a_signal_whose_id_was_sent_before_is_that_signal(api):
    run, other = api.create(), api.create()
    first = signal(api, run, id="s", payload=1)
    assert signal(api, run, id="s", payload=2).json == first.json
    assert signal(api, run, payload=3)["signal"]["n"] == 2
    refused(signal(api, run, "another", id="s"), 409, "signal_id_conflict")
    refused(signal(api, other, id="s"), 409, "signal_id_conflict")


def test_a_completed_run_takes_no_signal_but_answers_the_repeat_of_one(api):
    completed, failed, cancelled = (api.create() for _ in range(3))
    first = signal(api, completed, id="s", payload=1)
    api.complete(completed)
    body = refused(signal(api, completed, payload=2), 409, "run_completed")
    assert body["error"] == f"run {completed} is completed"
    assert body["run"]["status"] == "completed"
    assert signal(api, completed, id="s", payload=1).json == first.json
    assert api.event_types(completed)[-2:] == ["signal.received", "run.completed"]
    api.fail(failed)
    api.post(f"/runs/{cancelled}/cancel")["run"]
    for run in (failed, cancelled):  # a retry may ask for it
        assert signal(api, run)["signal"]["n"] == 1


def test_a_signal_that_is_given_up_uses_its_number_and_one_that_is_there_counts(api):
    run = api.create()
    api.begin(run, "w")["run"]
    expire = f"/runs/{run}/signals/paid/expire"
    given_up = api.post(expire, {"leaseOwner": "w"})["signal"]
    assert (given_up["n"], given_up["timedOut"], given_up["payload"]) == (1, True, None)
    late = signal(api, run, payload=5)["signal"]
    assert (late["n"], late["timedOut"]) == (2, False)
    assert api.post(expire, {"leaseOwner": "w", "n": 2})["signal"] == late
    assert api.get(f"/runs/{run}/signals/paid")["signal"] == given_up
    assert api.event_types(run)[-2:] == ["signal.timed_out", "signal.received"]
    refused(api.post(expire, {"leaseOwner": "v", "n": 3}), 409, "lease_lost")
    api.post(f"/runs/{run}/cancel")["run"]
    refused(api.post(expire, {"leaseOwner": "w", "n": 3}), 409, "run_cancelled")


def test_a_signal_sent_early_is_kept(api):
    run = api.enqueue()
    api.post(f"/runs/{run}/signals", {"name": "paid", "payload": 1})
    api.claim(owner="w")
    answer = api.post(f"/runs/{run}/wait", {"leaseOwner": "w", "for": {"event": "paid"}})
    assert answer["ready"] is True
    assert answer["run"]["leaseOwner"] == "w"


def test_a_signal_that_does_not_come_in_time_is_timed_out_for_good(api, clock):
    run = waiting(api, {"event": "paid"}, timeoutMs=1000)
    clock.advance(ms=1000)
    api.reconcile()
    came_back(api, run)
    late = signal(api, run, payload=1)["signal"]
    assert (late["n"], late["timedOut"]) == (2, False)
    first = api.get(f"/runs/{run}/signals/paid")["signal"]
    assert (first["timedOut"], first["payload"]) == (True, None)


def step_of_a_wait(api, owner="w", **body):
    """A run of that worker, and the step that records what it waits for."""
    run = api.enqueue()
    api.claim(owner=owner)
    return run, api.begin_step(run, "wait", owner, options={"wait": True}, **body)["step"]["id"]


def test_the_step_of_a_wait_completes_as_its_run_is_resumed(api, clock):
    run, step = step_of_a_wait(api)
    wait_for = {"event": "paid", "n": 1, "stepId": step}
    api.post(f"/runs/{run}/wait", {"leaseOwner": "w", "for": wait_for})["run"]
    assert api.run(run)["waitingFor"] == wait_for
    sent = signal(api, run, payload={"cents": 5})["signal"]
    assert api.event_types(run)[2:] == [
        "step.started", "run.waiting", "signal.received", "step.completed", "run.resumed"]
    shown = api.detail(run)["steps"][0]
    assert (shown["status"], shown["output"], shown["attempt"], shown["leaseOwner"]) == ("completed", sent, 1, None)

    came_back(api, run)

    run, step = step_of_a_wait(api, "v")
    until = "2100-01-01T00:00:00Z"
    api.post(f"/runs/{run}/wait", {"leaseOwner": "v", "for": {"until": until, "stepId": step}})["run"]
    clock.advance(ms=75 * 366 * 86_400_000)
    api.reconcile()
    assert api.event_types(run)[2:] == ["step.started", "run.waiting", "step.completed", "run.resumed"]


def test_a_wait_taken_over_is_the_same_wait_and_no_further_attempt(api, clock):
    run, step = step_of_a_wait(api, input={"seconds": 5})
    clock.advance(ms=60_000)
    api.reconcile()
    clock.advance(ms=5000)
    assert [claimed["id"] for claimed in api.claim(owner="next")] == [run]
    begun = api.begin_step(run, "wait", "next", options={"wait": True}, input={"seconds": 9})
    assert begun["action"] == "execute"
    assert (begun["step"]["id"], begun["step"]["attempt"], begun["step"]["input"]) == (step, 1, {"seconds": 5})
    assert api.event_types(run).count("step.started") == 1
    refused(api.complete_step(run, step, "w"), 409, "lease_lost")
    assert api.complete_step(run, step, "next")["step"]["status"] == "completed"


def test_a_run_sleeps_until_its_time_by_the_databases_clock_and_wakes_once(api, clock):
    until = api.run(api.create())["createdAt"].replace("T", " ")  # any time will do: the past is ready at once
    run = api.enqueue()
    api.claim(owner="w")
    assert api.post(f"/runs/{run}/wait", {"leaseOwner": "w", "for": {"until": until}})["ready"] is True
    api.complete(run)
    run = waiting(api, {"until": "2100-01-01T00:00:00Z"})
    assert api.reconcile() == 0
    clock.advance(ms=75 * 366 * 86_400_000)
    assert api.reconcile() == 1
    assert api.reconcile() == 0
    came_back(api, run)
    assert api.event_types(run).count("run.resumed") == 1


@pytest.mark.parametrize("end", ["complete", "fail", "cancel"])
def test_a_parent_wakes_when_the_last_of_its_children_ended(api, end):
    parent = api.enqueue()
    api.claim(owner="w")
    children = [api.post(f"/runs/{parent}/children", {"name": f"c{n}", "workflowName": "sub", "queue": "subs",
                                                      "maxAttempts": 1})["run"]["id"] for n in range(3)]
    api.post(f"/runs/{parent}/wait", {"leaseOwner": "w", "for": {"children": ["c0", "c1", "c2"]}})
    assert {run["id"] for run in api.claim("subs", owner="s", limit=10)} == set(children)
    for number, child in enumerate(children):
        assert api.run(parent)["status"] == "waiting"
        action = end if number == 2 else "complete"
        api.post(f"/runs/{child}/{action}", {"error": "no"} if action == "fail" else {})["run"]
    came_back(api, parent)


def test_children_that_end_at_once_wake_their_parent_once(api):
    parent = api.enqueue()
    api.claim(owner="w")
    children = [api.post(f"/runs/{parent}/children", {"name": f"c{n}", "workflowName": "sub", "queue": "subs"})
                ["run"]["id"] for n in range(12)]
    api.post(f"/runs/{parent}/wait", {"leaseOwner": "w", "for": {"children": True}})
    with together(*[lambda child=child: api.complete(child) for child in children]) as answers:
        assert {answer.status for answer in answers} == {200}
    assert api.event_types(parent).count("run.resumed") == 1
    came_back(api, parent)


def test_a_child_whose_worker_died_for_good_wakes_its_parent(api, clock):
    parent = api.enqueue()
    api.claim(owner="w")
    api.post(f"/runs/{parent}/children", {"name": "c", "workflowName": "sub", "queue": "subs", "maxAttempts": 1})
    api.post(f"/runs/{parent}/wait", {"leaseOwner": "w", "for": {"children": ["c"]}})
    api.claim("subs", owner="s")
    clock.advance(ms=60_001)
    api.reconcile()
    came_back(api, parent)


def test_a_waiting_run_keeps_its_dedupe_key_and_does_not_count_against_the_cap(api):
    api.put("/queues/default/config", {"concurrency": 1})["config"]
    run = api.enqueue(dedupeKey="k")
    api.claim(owner="w")
    api.post(f"/runs/{run}/wait", {"leaseOwner": "w", "for": {"event": "e"}})
    again = api.post("/queues/default/enqueue", {"workflowName": "report", "dedupeKey": "k"})
    assert again["deduplicated"] is True
    assert again["run"]["id"] == run
    other = api.enqueue()
    assert [claimed["id"] for claimed in api.claim(owner="w2")] == [other]
    assert api.queue("default")["waiting"] == 1
    assert api.queue("default")["running"] == 1


def test_a_waiting_run_can_be_cancelled_and_its_deadline_ends_it(api, clock):
    run = waiting(api, {"event": "e"})
    assert api.post(f"/runs/{run}/cancel")["run"]["status"] == "cancelled"
    api.post(f"/runs/{run}/signals", {"name": "e"})
    assert api.run(run)["status"] == "cancelled"
    late = api.enqueue(deadlineMs=5000)
    api.claim(owner="w")
    api.post(f"/runs/{late}/wait", {"leaseOwner": "w", "for": {"event": "e"}})
    clock.advance(ms=5000)
    api.reconcile()
    assert api.run(late)["cancelReason"] == "deadline"


def test_a_repeated_wait_changes_nothing(api):
    run = waiting(api, {"event": "e"})
    again = api.post(f"/runs/{run}/wait", {"leaseOwner": "w", "for": {"event": "e"}})
    assert again["run"]["status"] == "waiting"
    assert api.event_types(run).count("run.waiting") == 1


def test_waiting_needs_the_lease_a_queue_and_one_thing_to_wait_for(api):
    plain = api.create()
    api.begin(plain, "w")
    refused(api.post(f"/runs/{plain}/wait", {"leaseOwner": "w", "for": {"event": "e"}}), 409, "no_queue")
    run = api.enqueue()
    api.claim(owner="w")
    refused(api.post(f"/runs/{run}/wait", {"leaseOwner": "v", "for": {"event": "e"}}), 409, "lease_lost")
    for wrong in ({}, {"event": "e", "gateId": "g"}, {"until": "soon"}, {"children": 3}, None, {"event": 1}, {"n": 1},
                  {"event": "e", "n": 0}, {"event": "e", "n": "1"}, {"children": True, "n": 1}, {"stepId": "s"}):
        body = refused(api.post(f"/runs/{run}/wait", {"leaseOwner": "w", "for": wrong}), 400, "invalid_request")
        assert body["issues"][0]["path"].startswith("for")
    refused(api.post("/runs/run_none/wait", {"leaseOwner": "w", "for": {"event": "e"}}), 404, "not_found")
    refused(api.post(f"/runs/{run}/wait", {"leaseOwner": "w", "for": {"event": "e", "stepId": "s"}}), 404, "not_found")
    refused(api.get(f"/runs/{run}/signals/e?n=0"), 400, "invalid_request")


def test_a_push_queue_offers_a_run_again_when_it_wakes(api, receiver):
    api.put("/queues/default/config", {"invokeUrl": receiver.url})["config"]
    run = api.enqueue()
    api.reconcile()
    receiver.wait_for(1)
    api.begin(run, "app")
    api.post(f"/runs/{run}/wait", {"leaseOwner": "app", "for": {"event": "e"}})
    api.post(f"/runs/{run}/signals", {"name": "e"})
    api.reconcile()
    assert [body["type"] for body in receiver.wait_for(2)] == ["run.invoke", "run.invoke"]


def test_the_end_of_a_run_is_waited_for(api, server):
    run = api.enqueue()
    api.claim(owner="w")
    with together(lambda: api.get(f"/runs/{run}?waitMs=20000")["run"]["status"],
                  lambda: Api(server.url).complete(run, result=1)["run"]["status"]) as statuses:
        assert statuses == ["completed", "completed"]
    assert api.get(f"/runs/{run}?waitMs=0")["run"]["result"] == 1
