"""No answer and no table grows beyond its budget, however large the payloads are and however many: lists leave large
payloads out and say so, the run detail says where to read on, batches answer briefly, and an event's payload is stored
once.

A budget is 16 MiB of payloads, but 4 MiB in most of these tests, which is cheaper; each attack below is several times
as large. What is small enough comes as ever.
"""

from __future__ import annotations

import json
import random
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Answer, Api, Psql, refused

MIB = 1 << 20
WHOLE_BUDGET = 16 * MIB
BUDGET = WHOLE_BUDGET // 4
LARGE = "x" * (BUDGET * 3 // 16)
HUGE = "x" * (3 * MIB)  # where the budget is another one, which stays
BATCH = {"inputHash": "h", "leaseOwner": "a"}


def set_budget(migrated: Psql, size: int) -> None:
    assert migrated("select tidebase._budget()") in ([(WHOLE_BUDGET,)], [(BUDGET,)])
    migrated("create or replace function tidebase._budget () returns integer language sql immutable as"
             f" $$ select {size} $$")


@pytest.fixture(autouse=True, scope="module")
def small_budget(migrated: Psql) -> Iterator[None]:
    set_budget(migrated, BUDGET)
    yield
    set_budget(migrated, WHOLE_BUDGET)


@pytest.fixture
def whole_budget(migrated: Psql) -> Iterator[None]:
    """The budget of a server in use."""
    set_budget(migrated, WHOLE_BUDGET)
    yield
    set_budget(migrated, BUDGET)


def get(api: Api, path: str, most: int = BUDGET) -> Any:
    """The JSON at a path, after asserting how large it is at most, but for 1 MiB of what is no payload."""
    answer = api.get(path)
    assert answer.status == 200, answer
    assert len(answer.text) <= most + MIB
    return answer.json


def versions(api: Api, run: str, count: int, value: Any) -> None:
    for number in range(count):
        api.put(f"/runs/{run}/state", {"value": value, "label": f"v{number}"})["state"]


# --- lists


def test_a_list_of_runs_leaves_payloads_of_more_than_64_kib_out_and_the_detail_has_them(api: Api) -> None:
    exact = "y" * (65_536 - 2)
    large = [api.enqueue(input=LARGE, metadata={"text": LARGE}) for _ in range(3)]
    edge, beyond = api.create(input=exact), api.create(input=exact + "y")
    small = api.create(input={"a": [1.50]}, metadata={"k": "v"})
    for path in ("/runs", "/runs?status=queued&queue=default&sort=oldest"):
        listed = {run["id"]: run for run in get(api, path, most=3 * MIB)["runs"]}
        assert [listed[run]["payloadOmitted"] for run in large] == [True] * 3
        assert {(run["input"], run["metadata"]) for run in listed.values() if run["id"] in large} == {(None, None)}
    shown = {run["id"]: run for run in get(api, "/runs")["runs"]}
    assert shown[edge]["input"] == exact
    assert "payloadOmitted" not in shown[edge]
    assert (shown[beyond]["input"], shown[beyond]["payloadOmitted"]) == (None, True)
    assert shown[small] | {"why": None, "whyDetail": None} == api.get(f"/runs/{small}?include=run")["run"] | {
        "why": None, "whyDetail": None}
    assert api.run(large[0])["input"] == LARGE


def test_results_and_errors_are_left_out_likewise(api: Api) -> None:
    done, broken = api.create(), api.create()
    api.complete(done, result=LARGE)["run"]
    api.fail(broken, error={"message": LARGE})["run"]
    listed = get(api, "/runs", most=MIB)["runs"]
    assert [(run["result"], run["error"], run["payloadOmitted"]) for run in listed] == [(None, None, True)] * 2


@pytest.mark.usefixtures("whole_budget")
def test_a_list_of_very_many_runs_has_a_budget_in_all_and_every_run_all_the_same(api: Api) -> None:
    text = "z" * 60_000
    runs = [run["id"] for _ in range(2) for run in api.post("/queues/q/enqueue", {
        "runs": [{"workflowName": "w", "input": text} for _ in range(200)]})["runs"]]
    listed = get(api, "/runs?limit=1000", most=WHOLE_BUDGET)["runs"]
    assert [run["id"] for run in listed] == runs[::-1]
    whole = [run["input"] == text for run in listed]
    assert whole == sorted(whole, reverse=True)
    assert sum(whole) == WHOLE_BUDGET // 60_000
    assert [run.get("payloadOmitted", False) for run in listed] == [not one for one in whole]


def test_lists_of_versions_and_snapshots_leave_large_payloads_out(api: Api) -> None:
    run = api.create()
    versions(api, run, 3, LARGE)
    api.put(f"/runs/{run}/state", {"value": {"a": 1}, "label": "small"})["state"]
    for path, key in ((f"/runs/{run}/state/versions", "stateVersions"), (f"/runs/{run}/snapshots", "snapshots")):
        listed = get(api, path, most=MIB)[key]
        assert [version["label"] for version in listed if version.get("payloadOmitted")] == [
            f"v{n}" for n in (range(3) if key == "stateVersions" else range(2, -1, -1))]
        [small] = [version for version in listed if version["label"] == "small"]
        assert small["value"] == {"a": 1}
        large = next(version for version in listed if version["label"] == "v0")
        assert large["value"] is None
        whole = api.get(f"/runs/{run}/payload?of=state&id={large['id']}")
        assert whole.text == json.dumps(LARGE)


def test_versions_come_in_pages(api: Api) -> None:
    run = api.create()
    versions(api, run, 5, 1)
    first = api.get(f"/runs/{run}/state/versions?limit=3")
    rest = api.get(f"/runs/{run}/state/versions?limit=3&after={first['nextCursor']}")
    assert [v["version"] for v in first["stateVersions"] + rest["stateVersions"]] == [1, 2, 3, 4, 5]
    assert rest["nextCursor"] is None


def test_the_list_of_schedules_leaves_large_inputs_out(api: Api) -> None:
    for number in range(7):
        schedule = {"cron": "0 0 1 1 *", "workflowName": "w", "input": LARGE if number else {"a": 1}}
        assert api.put(f"/schedules/s{number}", schedule).status == 200
    listed = get(api, "/schedules", most=MIB)["schedules"]
    assert [(s["name"], s["input"], s.get("payloadOmitted", False)) for s in listed] == [
        ("s0", {"a": 1}, False), *[(f"s{n}", None, True) for n in range(1, 7)]]


def test_approvals_leave_large_data_and_capabilities_out(api: Api) -> None:
    run = api.create()
    for number in range(2):
        api.post(f"/runs/{run}/gates/begin", {"name": f"g{number}", "prompt": "p" * 60_000, "data": LARGE,
                                              "capability": LARGE})["gate"]
    items = get(api, "/approvals", most=MIB)["items"]
    assert [(item["gate"]["data"], item["gate"]["dataOmitted"], item["gate"]["capability"]) for item in items] == [
        (None, True, None)] * 2


def test_steps_with_large_promises_are_listed_without_them(api: Api) -> None:
    run = api.create()
    for number in range(5):
        api.do_step(run, f"s{number}", "a", options={"credentials": ["c" * MIB], "replay": "auto"})
    listed = get(api, f"/runs/{run}/steps", most=0)["steps"]
    assert [(step["resumeContract"]["replay"], step["resumeContract"]["credentials"]) for step in listed] == [
        ("auto", [])] * 5


# --- the run detail


def test_a_detail_beyond_its_budget_says_where_to_read_on_and_everything_can_be_read(api: Api) -> None:
    run = api.create()
    for number in range(8):
        api.do_step(run, f"step {number}", "a", LARGE)
    versions(api, run, 3, LARGE)
    for number in range(3):
        api.post(f"/runs/{run}/children", {"name": f"c{number}", "workflowName": "sub", "input": LARGE})["run"]
    detail = get(api, f"/runs/{run}", most=BUDGET + len(LARGE))  # and its state
    assert detail["state"]["value"] == LARGE
    cut = detail["truncated"]
    assert [step["name"] for step in detail["steps"]] == [f"step {n}" for n in range(len(detail["steps"]))]
    assert len(detail["steps"]) == 3
    rest = api.get(f"/runs/{run}/steps?after={cut['steps']['after']}")["steps"]
    assert [step["name"] for step in rest] == [f"step {n}" for n in range(len(detail["steps"]), 8)]
    assert detail["stateVersions"] == detail["stateStreams"] == []
    assert cut["stateVersions"] == {"after": None}
    seen = [event["seq"] for event in detail["events"]]
    assert seen == list(range(1, cut["events"]["after"] + 1))
    after, accept = cut["events"]["after"], {"accept": "application/json"}
    while after is not None:
        answer = api.get(f"/runs/{run}/events?after={after}", headers=accept)
        assert len(answer.text) <= BUDGET + MIB
        seen += [event["seq"] for event in answer.json]
        after = answer.headers.get("x-tidebase-next")
    assert seen == list(range(1, api.get(f"/runs/{run}/summary")["counts"]["events"] + 1))
    assert {(child["input"], child["payloadOmitted"]) for child in detail["childRuns"]} == {(None, True)}


def test_a_detail_within_its_budget_is_whole_and_says_nothing_of_a_cut(api: Api) -> None:
    run = api.create()
    for number in range(3):
        api.do_step(run, f"step {number}", "a", LARGE)
    detail = api.detail(run)
    assert "truncated" not in detail
    assert [step["output"] for step in detail["steps"]] == [LARGE] * 3
    assert len(detail["events"]) == 7


def test_the_first_step_comes_in_any_case(api: Api) -> None:
    run = api.create()
    for name in ("one", "two"):
        api.do_step(run, name, "a", LARGE * 3, input=LARGE * 3)
    detail = get(api, f"/runs/{run}?include=steps", most=2 * BUDGET)
    assert [step["name"] for step in detail["steps"]] == ["one"]
    assert set(detail["truncated"]) == {"steps"}


def test_a_detail_with_large_gates_deliveries_and_children_is_bounded(api: Api) -> None:
    hooks = [{"type": "webhook", "url": "http://127.0.0.1:9/"} for _ in range(8)]
    run = api.create(channels=hooks)
    for number in range(2):
        api.post(f"/runs/{run}/gates/begin", {"name": f"g{number}", "prompt": "?", "data": LARGE})["gate"]
    detail = get(api, f"/runs/{run}?include=gates,channelDeliveries")
    assert len(detail["gates"]) == 2
    assert 0 < len(detail["channelDeliveries"]) < 16
    before = detail["truncated"]["channelDeliveries"]["before"]
    rest = api.get(f"/runs/{run}/deliveries?before={before}")["deliveries"]
    assert len(detail["channelDeliveries"]) + len(rest) == 16


# --- events


def test_a_list_of_events_is_bounded_and_a_stream_tells_all_of_them(api: Api, sql: Callable[..., Any]) -> None:
    run = api.create()
    for number in range(8):
        api.post(f"/runs/{run}/signals", {"name": "s", "payload": number})["signal"]
    sql("update tidebase.events set payload = to_json(repeat('x', %s)) where type = 'signal.received'", len(LARGE))
    api.complete(run)["run"]
    answer = api.get(f"/runs/{run}/events", headers={"accept": "application/json"})
    assert len(answer.text) <= BUDGET
    assert [event["seq"] for event in answer.json] == [1, 2, 3, 4, 5, 6]
    assert answer.headers["x-tidebase-next"] == "6"
    rest = api.get(f"/runs/{run}/events?after=6", headers={"accept": "application/json"})
    assert [event["seq"] for event in rest.json] == [7, 8, 9, 10]
    assert "x-tidebase-next" not in rest.headers
    stream = api.get(f"/runs/{run}/events?follow=false")
    assert [int(line[4:]) for line in stream.text.split("\n") if line.startswith("id: ")] == list(range(1, 11))


# --- claims


@pytest.mark.parametrize("claim", ["first", "repeated"])
def test_a_claim_with_checkpoints_is_bounded_also_when_it_is_repeated(api: Api, claim: str) -> None:
    runs = [api.enqueue() for _ in range(6)]
    if claim == "repeated":
        assert len(api.claim(owner="w", id="claim-1", limit=10, checkpoints=True)) == 6
    for run in runs:
        api.do_step(run, "s", "w", HUGE)
    answer = api.post("/queues/claim", {"queues": ["default"], "leaseOwner": "w", "id": "claim-1", "limit": 10,
                                        "checkpoints": True})
    assert len(answer.text) <= 8 * MIB + MIB
    taken = answer["runs"]
    if claim == "first":
        assert [run["id"] for run in taken] == runs[:2]
    else:  # all are held by this worker, which asks for the other checkpoints step by step
        assert [run["id"] for run in taken] == runs
        assert [run["checkpointsTruncated"] for run in taken] == [False] * 2 + [True] * 4
        assert [len(run["checkpoints"]) for run in taken] == [1] * 2 + [0] * 4


def test_the_checkpoints_of_a_run_are_bounded_whatever_stands_behind_them(api: Api) -> None:
    run = api.create()
    for name in ("one", "two", "three"):
        api.do_step(run, name, "a", random.Random(1).randbytes(MIB).hex())  # stored as large as it is
    answer = api.begin(run, "a", checkpoints=True)
    assert len(answer.text) <= 5 * MIB
    assert [c["name"] for c in answer["checkpoints"]] == ["one"]
    assert answer["checkpointsTruncated"] is True


# --- the outbox


def test_the_payload_of_an_event_is_stored_once_for_all_channels(
        api: Api, sql: Callable[..., Any], receiver: Any) -> None:
    hooks = [{"type": "webhook", "url": f"{receiver.url}/{n}"} for n in range(32)]
    run = api.create(channels=hooks)
    value = random.Random(2).randbytes(MIB // 4).hex()  # half a MiB that does not compress
    before = sql("select pg_total_relation_size('tidebase.outbox')")[0][0]
    api.put(f"/runs/{run}/state", {"value": value})["state"]
    assert sql("select count(*), sum(pg_column_size(payload)) < 1000000 from tidebase.outbox") == [(32, True)]
    assert sql("select pg_total_relation_size('tidebase.outbox')")[0][0] - before < 2 * MIB
    bodies = receiver.wait_for(32)
    assert {body["payload"]["state"]["value"] for body in bodies} == {value}
    assert sorted(path.rsplit("/", 1)[1] for path, _, _ in receiver.requests) == sorted(map(str, range(32)))
    deliveries = api.get(f"/runs/{run}?include=channelDeliveries")["channelDeliveries"]
    assert {d["payload"]["state"]["value"] for d in deliveries} == {value}
    for delivery in deliveries[:2]:
        assert value in api.get(f"/runs/{run}/payload?of=delivery&id={delivery['id']}").text
    light = api.get(f"/runs/{run}/deliveries")["deliveries"]
    assert len({d["payloadBytes"] for d in light}) == 1
    assert light[0]["payloadBytes"] > len(value)


def test_a_gates_own_channels_and_the_runs_share_a_payload_too(api: Api, sql: Callable[..., Any]) -> None:
    hook = {"type": "webhook", "url": "http://127.0.0.1:9/"}
    run = api.create(channels=[hook] * 4)
    api.post(f"/runs/{run}/gates/begin", {"name": "g", "prompt": "?", "data": LARGE, "channels": [hook] * 8})["gate"]
    assert sql("select count(*), count(payload) from tidebase.outbox") == [(12, 1)]


def test_webhooks_with_large_payloads_are_claimed_a_budget_at_a_time(api: Api, sql: Callable[..., Any]) -> None:
    assert api.server
    api.server.let_send(False)
    run = api.create()
    sql("insert into tidebase.outbox (id, kind, run_id, event_type, url, host, payload, next_attempt_at)"
        " select 'del_' || n, 'channel', %s, 'e', format('http://h%%s.example/', n), 'h' || n,"
        " to_json(repeat('x', %s)), tidebase.now() - interval '1 s' from generate_series(1, 5) n", run, 2 * len(LARGE))
    claimed = [[webhook["id"] for webhook in sql(
        "select tidebase.claim_webhooks(8, 60000, 2, '{}', '')")[0][0]["webhooks"]] for _ in range(4)]
    assert claimed == [["del_1", "del_2"], ["del_3", "del_4"], ["del_5"], []]


# --- batches


def outcomes(answer: Answer) -> list[Any]:
    assert len(answer.text) <= WHOLE_BUDGET + MIB
    return answer["results"]


def test_a_batch_of_begins_answers_within_its_budget_and_names_those_to_be_sent_alone(api: Api) -> None:
    run = api.create()
    for number in range(5):
        api.do_step(run, f"s{number}", "a", HUGE)
    begins = [{"do": "begin_step", "runId": run, "name": f"s{n}", "inputHash": "h"} for n in range(5)]
    results = outcomes(api.post("/writes", {"writes": begins}))
    assert [result.get("action") for result in results] == ["return", "return", None, None, None]
    assert {(result["code"], result["status"]) for result in results[2:]} == {("batch_too_large", 413)}
    assert api.begin_step(run, "s4", "a")["output"] == HUGE


def test_a_batch_of_records_that_were_there_answers_the_last_ones_briefly(api: Api) -> None:
    run = api.create()
    api.begin(run, "a")["run"]
    for number in range(8):
        api.post(f"/runs/{run}/steps", {**BATCH, "name": f"s{number}", "output": HUGE + "\0"})["step"]
    again = [{**BATCH, "runId": run, "name": f"s{n}", "output": 1} for n in range(8)]
    results = outcomes(api.post("/steps", {"records": again}))
    assert [result["step"]["status"] for result in results] == ["completed"] * 8
    assert [result["step"].get("payloadOmitted", False) for result in results] == [False] * 5 + [True] * 3
    assert results[7]["step"]["name"] == "s7"


def test_refusals_of_a_batch_leave_their_objects_out_when_there_is_no_room(api: Api) -> None:
    run = api.create(input=HUGE)
    api.begin(run, "b")["run"]
    writes = [{**BATCH, "do": "record_step", "runId": run, "name": f"s{n}", "output": 1} for n in range(12)]
    results = outcomes(api.post("/writes", {"writes": writes}))
    assert [result["code"] for result in results] == ["lease_lost"] * 12
    assert results[0]["run"]["input"] == HUGE
    assert results[11]["payloadOmitted"] is True


def test_enqueue_many_that_are_there_already_answers_within_its_budget(api: Api) -> None:
    jobs = [{"workflowName": "w", "dedupeKey": f"k{n}"} for n in range(8)]
    for job in jobs:
        api.post("/queues/q/enqueue", {**job, "input": LARGE})["run"]
    answer = api.post("/queues/q/enqueue", {"runs": jobs})
    assert len(answer.text) <= BUDGET + MIB + len(LARGE)
    assert [run["deduplicated"] for run in answer["runs"]] == [True] * 8
    assert [run["input"] == LARGE for run in answer["runs"]] == [True] * 5 + [False] * 3
    assert [run.get("payloadOmitted", False) for run in answer["runs"]] == [False] * 5 + [True] * 3


def test_heartbeats_are_answered_without_payloads(api: Api) -> None:
    runs = [api.enqueue(input=LARGE) for _ in range(3)]
    for _ in runs:
        api.claim(owner="a")
    answer = api.post("/heartbeats", {"runs": [{"id": run, "leaseOwner": "a"} for run in runs]})
    assert len(answer.text) < 2000
    assert len(answer["results"]) == 3


# --- what is too large is said to be too large


def too_large(answer: Answer, field: str) -> None:
    issues = refused(answer, 400, "invalid_request")["issues"]
    assert [(issue["path"], issue["message"].split()[0:2]) for issue in issues] == [
        (field, issues[0]["message"].split()[0:2])]
    assert "too large" in issues[0]["message"] or "Longer than" in issues[0]["message"]


def test_names_that_are_too_long_for_an_index_together_are_named(api: Api) -> None:
    letters = "".join(map(chr, random.Random(3).sample(range(0x4E00, 0x9FFF), 512)))
    queue = urllib.parse.quote(letters, safe="")
    too_large(api.post(f"/queues/{queue}/enqueue", {"workflowName": "w", "dedupeKey": letters[::-1]}), "dedupeKey")
    too_large(api.post(f"/queues/{queue}/enqueue", {"workflowName": letters[::-1]}), "workflowName")


def test_numbers_that_are_short_to_send_and_long_to_store_are_refused(api: Api) -> None:
    run = api.create()
    bomb = b"[" + b",".join([b"1e300"] * 115_000) + b"]"  # 690 KB, 35 MB in the database's words
    too_large(api.put(f"/runs/{run}/state", raw=b'{"value":%s}' % bomb), "value")
    too_large(api.post("/runs/report", raw=b'{"metadata":{"a":%s}}' % bomb), "metadata")
    assert [one["id"] for one in api.get("/runs")["runs"]] == [run]
    texts = ["1e300"] * 115_000  # the same as texts is what it is
    assert api.put(f"/runs/{run}/state", {"value": texts}).status == 200


def test_a_state_does_not_grow_without_end_by_merging(api: Api, sql: Callable[..., Any]) -> None:
    run = api.create()
    api.put(f"/runs/{run}/state", {"value": {}})["state"]
    sql("update tidebase.states set value = jsonb_build_object('a', repeat('x', %s))", 31 * MIB)
    too_large(api.send("PATCH", f"/runs/{run}/state", {"value": {"b": "x" * MIB}}), "value")
    assert api.get(f"/runs/{run}/summary")["state"]["version"] == 1


@pytest.mark.parametrize(("body", "field"), [
    ({"reason": "r" * 8193}, "reason"), ({"actor": "a" * 8193}, "actor")])
def test_texts_that_lists_show_have_a_limit(api: Api, body: dict[str, str], field: str) -> None:
    run = api.create()
    too_large(api.post(f"/runs/{run}/cancel", body), field)
    assert api.post(f"/runs/{run}/cancel", {field: body[field][1:]})["run"]["status"] == "cancelled"
