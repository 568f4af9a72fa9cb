"""What a run shows of itself while it works: its live state, in versions; labelled snapshots; and what it cost.

A version is written once, however often its request arrives and however many write at once; nothing here needs a lease.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from conftest import Answer, Api, refused, together

VERSION_KEYS = {"id", "streamId", "runId", "stepId", "version", "value", "patch", "label", "reason", "importance",
                "metadata", "createdBy", "createdAt"}
EVENT_KEYS = VERSION_KEYS - {"stepId", "value", "patch", "metadata", "createdBy"}
STREAM_KEYS = {"id", "runId", "name", "targetType", "targetId", "currentVersion", "currentValue", "metadata",
               "createdAt", "updatedAt"}
USAGE_KEYS = {"id", "runId", "stepId", "kind", "provider", "model", "label", "quantity", "unit", "inputTokens",
              "outputTokens", "totalTokens", "costUsd", "metadata", "createdAt"}


def put(api: Api, run: str, value: Any, **body: Any) -> Answer:
    return api.put(f"/runs/{run}/state", {"value": value, **body})


def patch(api: Api, run: str, value: Any, **body: Any) -> Answer:
    return api.send("PATCH", f"/runs/{run}/state", {"value": value, **body})


def save(api: Api, run: str, label: str = "here", **body: Any) -> Answer:
    return api.post(f"/runs/{run}/state/save", {"label": label, **body})


def snap(api: Api, run: str, state: Any = 1, **body: Any) -> Answer:
    return api.post(f"/runs/{run}/snapshots", {"label": "here", "state": state, **body})


def use(api: Api, run: str, **body: Any) -> Answer:
    return api.post(f"/runs/{run}/usage", body)


def versions(api: Api, run: str, query: str = "") -> list[Any]:
    return api.get(f"/runs/{run}/state/versions{query}")["stateVersions"]


def version_id(number: int) -> str:
    return f"ver_{number:032x}"


# --- the live state


def test_a_put_replaces_the_state_and_is_told_without_saying_the_value_twice(api):
    run = api.create()
    assert api.detail(run)["state"] is None
    about = {"reason": "begun", "createdBy": "ann", "metadata": {"k": 1}, "stepId": "step_1"}
    first = put(api, run, {"a": 1, "b": 2}, **about)["state"]
    assert first.keys() == {"runId", "value", "version", "updatedAt"}
    assert (first["runId"], first["value"], first["version"]) == (run, {"a": 1, "b": 2}, 1)
    second = put(api, run, {"a": 3})["state"]
    assert (second["value"], second["version"]) == ({"a": 3}, 2)
    detail = api.detail(run)
    assert detail["state"] == second
    assert detail["stateVersions"] == versions(api, run)
    version = detail["stateVersions"][0]
    assert version.keys() == VERSION_KEYS
    assert re.fullmatch(r"ver_[0-9a-f]{32}", version["id"])
    assert {key: version[key] for key in VERSION_KEYS - {"id", "streamId", "createdAt"}} == {
        **about, "runId": run, "version": 1, "value": {"a": 1, "b": 2}, "patch": None, "label": None,
        "importance": "normal"}
    event = api.events(run)[1]
    assert event["type"] == "state.updated"
    assert event["payload"].keys() == {"value", "stateVersion"}
    assert event["payload"]["value"] == {"a": 1, "b": 2}
    assert event["payload"]["stateVersion"] == {key: version[key] for key in EVENT_KEYS}


def test_a_patch_merges_the_top_level_and_is_kept_beside_the_value(api):
    run = api.create()
    assert patch(api, run, {"a": {"x": 1}, "b": 2})["state"]["value"] == {"a": {"x": 1}, "b": 2}
    state = patch(api, run, {"a": {"y": 2}, "c": None})["state"]
    assert (state["value"], state["version"]) == ({"a": {"y": 2}, "b": 2, "c": None}, 2)
    assert versions(api, run)[1]["patch"] == {"a": {"y": 2}, "c": None}
    payload = api.events(run)[2]["payload"]
    assert payload.keys() == {"value", "patch", "stateVersion"}
    assert (payload["value"], payload["patch"]) == (state["value"], {"a": {"y": 2}, "c": None})


def test_only_objects_are_merged(api):
    run = api.create()
    for value in (1, [1], "x", False):
        issues = refused(patch(api, run, value), 400, "invalid_request")["issues"]
        assert issues[0]["path"] == "value"
    put(api, run, [1])["state"]
    refused(patch(api, run, {"a": 1}), 409, "state_not_object")
    assert api.detail(run)["state"]["value"] == [1]
    assert len(versions(api, run)) == 1


def test_null_is_the_empty_object_and_every_other_value_is_itself(api):
    run = api.create()
    for value in (0, False, "", [], 1.5, "text", [None], {"a": None}):
        assert put(api, run, value)["state"]["value"] == value
    assert put(api, run, None)["state"]["value"] == {}
    assert patch(api, run, None)["state"]["value"] == {}


def test_decimals_keep_every_digit(api):
    run = api.create()
    answer = api.put(f"/runs/{run}/state", raw=b'{"value": [0.30000000000000004441, 12345678901234567890, 1.0]}')
    assert "[0.30000000000000004441, 12345678901234567890, 1.0]" in answer.text


def test_streams_count_their_versions_each_and_the_run_has_one_live_value(api):
    run = api.create()
    for number, stream in enumerate(["run", "plan", "run", "plan"], 1):
        assert put(api, run, {"n": number}, stream=stream)["state"]["version"] == number
    assert patch(api, run, {"m": 5}, stream="plan")["state"]["value"] == {"n": 4, "m": 5}
    assert [(v["version"], v["value"]) for v in versions(api, run)] == [
        (1, {"n": 2}), (2, {"n": 4}), (3, {"n": 4, "m": 5}), (1, {"n": 1}), (2, {"n": 3})], "plan, then run"
    assert api.detail(run)["stateVersions"] == versions(api, run)
    assert [v["version"] for v in versions(api, run, "?stream=plan")] == [1, 2, 3]
    assert versions(api, run, "?stream=nothing") == []
    streams = api.detail(run)["stateStreams"]
    assert all(stream.keys() == STREAM_KEYS for stream in streams)
    assert [(s["name"], s["targetType"], s["targetId"], s["currentVersion"], s["currentValue"]) for s in streams] == [
        ("run", "run", run, 2, {"n": 3}), ("plan", "run", run, 3, {"n": 4, "m": 5})]


def test_a_write_at_another_version_than_it_was_meant_for_is_refused_and_shows_the_state(api):
    run = api.create()
    assert refused(put(api, run, 1, ifVersion=1), 409, "version_conflict")["state"] is None
    state = put(api, run, {"a": 1}, ifVersion=0)["state"]
    for answer in (put(api, run, 2, ifVersion=0), patch(api, run, {"b": 2}, ifVersion=2)):
        assert refused(answer, 409, "version_conflict")["state"] == state
    assert patch(api, run, {"b": 2}, ifVersion=1)["state"]["version"] == 2
    assert len(versions(api, run)) == 2


# --- saved, labelled, snapped


def test_a_save_labels_the_current_value_as_a_milestone_and_leaves_the_live_state(api):
    run = api.create()
    refused(save(api, run), 404, "not_found")
    state = put(api, run, {"a": 1})["state"]
    saved = save(api, run, "halfway", reason="lunch", createdBy="ann", metadata={"k": 2})["stateVersion"]
    assert saved.keys() == VERSION_KEYS
    assert (saved["version"], saved["value"], saved["patch"], saved["label"], saved["reason"], saved["importance"],
            saved["createdBy"], saved["metadata"]) == (
        2, {"a": 1}, None, "halfway", "lunch", "milestone", "ann", {"k": 2})
    assert save(api, run, importance="transient")["stateVersion"]["importance"] == "transient"
    assert api.detail(run)["state"] == state
    event = api.events(run)[2]
    assert (event["type"], event["payload"]) == (
        "state.saved", {"stateVersion": {key: saved[key] for key in EVENT_KEYS}})
    assert [v["label"] for v in versions(api, run, "?labeled=true")] == ["halfway", "here"]
    assert len(versions(api, run, "?labeled=false")) == len(versions(api, run)) == 3


def test_a_save_labels_the_live_value_whichever_stream_wrote_it(api):
    run = api.create()
    snap(api, run, {"n": 0}, target={"type": "run", "id": "x"})["snapshot"]
    refused(save(api, run), 404, "not_found")  # a snapshot is no live value
    put(api, run, {"n": 1}, stream="plan")["state"]
    saved = save(api, run)["stateVersion"]
    assert (saved["value"], saved["version"]) == ({"n": 1}, 1)
    put(api, run, {"n": 2})["state"]
    assert save(api, run, stream="plan")["stateVersion"]["value"] == {"n": 2}
    assert [v["value"] for v in versions(api, run, "?stream=plan")] == [{"n": 1}, {"n": 2}]
    assert api.detail(run)["state"]["version"] == 2


def test_a_value_that_is_missing_is_the_empty_object(api):
    run = api.create()
    assert api.put(f"/runs/{run}/state", {})["state"]["value"] == {}
    assert api.put(f"/runs/{run}/state", {"value": {"a": 1}})["state"]["version"] == 2
    assert api.send("PATCH", f"/runs/{run}/state", {"reason": "nothing new"})["state"]["value"] == {"a": 1}
    assert api.post(f"/runs/{run}/snapshots", {"label": "a"})["snapshot"]["value"] == {}


def test_a_snapshot_is_a_labelled_version_in_a_stream_of_its_own(api):
    run = api.create()
    mine = snap(api, run, {"n": 1}, reason="why", createdBy="ann", metadata={"k": 3})["snapshot"]
    other = snap(api, run, [2], label="draft", target={"type": "doc", "id": "a:b"}, importance="normal")["snapshot"]
    again = snap(api, run, [3], label="final", target={"type": "doc", "id": "a:b"})["snapshot"]
    assert mine.keys() == VERSION_KEYS
    assert (mine["value"], mine["label"], mine["reason"], mine["createdBy"], mine["metadata"], mine["version"]) == (
        {"n": 1}, "here", "why", "ann", {"k": 3}, 1)
    assert (mine["importance"], other["importance"], again["version"]) == ("milestone", "normal", 2)
    detail = api.detail(run)
    assert detail["state"] is None
    assert [(s["name"], s["targetType"], s["targetId"]) for s in detail["stateStreams"]] == [
        (f"run:{run}", "run", run), ("doc:a:b", "doc", "a:b")]
    event = api.events(run)[1]
    assert (event["type"], event["payload"]) == (
        "snapshot.created", {"stateVersion": {key: mine[key] for key in EVENT_KEYS}})
    put(api, run, 4)["state"]
    put(api, run, 5, label="labelled by hand")["state"]
    listed = api.get(f"/runs/{run}/snapshots")["snapshots"]
    assert [v["label"] for v in listed] == ["labelled by hand", "final", "draft", "here"]
    assert listed[1:] == [again, other, mine]


def test_unknown_runs_have_no_state(api):
    for answer in (put(api, "run_0", 1), patch(api, "run_0", {}), save(api, "run_0"), snap(api, "run_0"),
                   use(api, "run_0"), api.get("/runs/run_0/state/versions"), api.get("/runs/run_0/snapshots")):
        refused(answer, 404, "not_found")


# --- arriving twice


def test_a_write_that_arrives_twice_is_written_once(api):
    run = api.create()
    writes = [lambda: put(api, run, {"a": 1}, id=version_id(1), ifVersion=0),
              lambda: patch(api, run, {"b": 1}, id=version_id(2), ifVersion=1),
              lambda: save(api, run, id=version_id(3)),
              lambda: snap(api, run, id=version_id(4)),
              lambda: use(api, run, id="use_1", inputTokens=5)]
    for write in writes:
        assert write().json == write().json
    put(api, run, {"c": 1})["state"]
    for write in writes:
        assert write().status == 200
    assert api.event_types(run)[1:] == [
        "state.updated", "state.updated", "state.saved", "snapshot.created", "usage.recorded", "state.updated"]
    detail = api.detail(run)
    assert (detail["state"]["value"], detail["state"]["version"]) == ({"c": 1}, 3)
    assert (len(detail["stateVersions"]), len(detail["usage"])) == (5, 1)


def test_a_repeated_write_is_answered_as_the_first_time_whatever_was_written_since(api):
    run = api.create()
    first = put(api, run, {"a": 1}, id=version_id(1), ifVersion=0)["state"]
    merged = patch(api, run, {"b": 2}, id=version_id(2), stream="plan", ifVersion=1)["state"]
    saved, snapped = save(api, run, id=version_id(3)), snap(api, run, id=version_id(4))
    put(api, run, {"c": 3})["state"]
    before = api.detail(run)
    assert put(api, run, {"another": 1}, id=version_id(1), ifVersion=0)["state"] == first
    assert put(api, run, {"a": 1}, id=version_id(1), ifVersion=7)["state"] == first  # it was written, at its time
    assert patch(api, run, {"another": 1}, id=version_id(2), stream="plan", ifVersion=1)["state"] == merged
    assert (merged["value"], merged["version"]) == ({"a": 1, "b": 2}, 2)
    assert save(api, run, "another", id=version_id(3)).json == saved.json
    assert snap(api, run, "another", id=version_id(4)).json == snapped.json
    assert api.detail(run) == before
    for written in (3, 4):  # these did not write the live state
        refused(put(api, run, {}, id=version_id(written)), 409, "version_id_conflict")


def test_the_id_of_another_run_s_version_or_entry_is_refused(api):
    run, other = api.create(), api.create()
    put(api, run, {}, id=version_id(1))["state"]
    use(api, run, id="use_1")["usage"]
    put(api, other, {})["state"]
    for answer in (put(api, other, {}, id=version_id(1)), patch(api, other, {}, id=version_id(1)),
                   save(api, other, id=version_id(1)), snap(api, other, id=version_id(1))):
        refused(answer, 409, "version_id_conflict")
    refused(use(api, other, id="use_1"), 409, "usage_id_conflict")
    assert len(versions(api, other)) == 1


# --- what it cost


def test_an_entry_of_the_ledger_shows_all_of_itself(api):
    run = api.create()
    entry = {"stepId": "step_1", "kind": "llm", "provider": "p", "model": "m", "label": "draft", "quantity": 1.25,
             "unit": "min", "inputTokens": 10, "outputTokens": 4, "costUsd": 0.1, "metadata": {"k": 1}}
    usage = use(api, run, **entry)["usage"]
    assert usage.keys() == USAGE_KEYS
    assert re.fullmatch(r"use_[0-9a-f]{32}", usage["id"])
    assert {key: usage[key] for key in USAGE_KEYS - {"id", "createdAt"}} == {**entry, "runId": run, "totalTokens": 14}
    event = api.events(run)[1]
    assert (event["type"], event["payload"]) == ("usage.recorded", {"usage": usage})
    assert api.detail(run)["usage"] == [usage]


def test_an_entry_needs_nothing_and_its_total_is_the_sum_unless_it_is_given(api):
    run = api.create()
    usage = use(api, run)["usage"]
    assert {key for key, value in usage.items() if value is not None} == {
        "id", "runId", "kind", "metadata", "createdAt"}
    assert (usage["kind"], usage["metadata"]) == ("custom", {})
    assert use(api, run, outputTokens=3)["usage"]["totalTokens"] == 3
    assert use(api, run, inputTokens=0)["usage"]["totalTokens"] == 0
    assert use(api, run, inputTokens=2, outputTokens=3, totalTokens=9)["usage"]["totalTokens"] == 9
    assert use(api, run, inputTokens=2, totalTokens=0)["usage"]["totalTokens"] == 0


@pytest.mark.parametrize("field", ["quantity", "costUsd", "inputTokens", "outputTokens", "totalTokens"])
def test_a_figure_is_a_number_from_zero_on(api, field):
    run = api.create()
    raw = ["-1", "-0.001", "true", '"5"', "null", "[]", "1e400", "1e16", "1000000000000000.1", "1e-2000", "NaN"]
    if field.endswith("Tokens"):
        raw += ["1.5", "1e3", "9007199254740994"]
    for text in raw:
        issues = refused(api.post(f"/runs/{run}/usage", raw=f'{{"{field}": {text}}}'.encode()),
                         400, "invalid_request")["issues"]
        assert issues[0]["path"] == ("" if text == "NaN" else field), text
    assert api.detail(run)["usage"] == []
    assert use(api, run, **{field: 0})["usage"][field] == 0


@pytest.mark.parametrize(("spelled", "shown"), [
    ("0.1", "0.1"), ("0.10", "0.10"), ("0.1234567890123456789012345678901234567890", None),
    ("999999999999999.000000000000000000001", None), ("90071992547409.93000", None), ("12.5e-3", "0.0125"),
    ("1E+2", "100"), ("0e5", "0"), ("1e-30", "0." + "0" * 29 + "1"), ("0." + "3" * 900, None)])
def test_an_amount_keeps_every_digit(api, spelled, shown):
    run = api.create()
    shown = shown or spelled
    for field in ("quantity", "costUsd"):
        answer = api.post(f"/runs/{run}/usage", raw=f'{{"model": "{field}", "{field}": {spelled}}}'.encode())
        assert answer.status == 200, answer
        assert f'"{field}" : {shown},' in answer.text
    detail = api.get(f"/runs/{run}").text
    assert detail.count(f'"costUsd" : {shown},') == detail.count(f'"quantity" : {shown},') == 2  # the entry, the event
    assert f'"costUsd" : {shown}}}' in api.get("/usage").text


def test_amounts_are_summed_up_exactly(api):
    run = api.create()
    for amount in (*["0.1"] * 10, "0.00000000000000000001"):
        assert api.post(f"/runs/{run}/usage", raw=b'{"costUsd": %s}' % amount.encode()).status == 200
    assert '"costUsd" : 1.00000000000000000001}' in api.get("/usage").text


def test_the_ledger_is_summed_up_by_model_workflow_and_day_dearest_first(api, clock):
    one, two = api.create("write"), api.create("read")
    noon = timedelta(days=1, hours=12) - timedelta(milliseconds=datetime.now().timestamp() * 1000 % 86_400_000)
    clock.advance(ms=int(noon.total_seconds() * 1000))
    use(api, one, model="big", inputTokens=1, outputTokens=2, costUsd=0.1)["usage"]
    first = use(api, two, model="big", inputTokens=10, costUsd=0.2)["usage"]
    clock.advance(ms=86_400_000)
    second = use(api, one, model="small", outputTokens=5)["usage"]
    use(api, one)["usage"]

    def groups(query: str) -> list[tuple[Any, ...]]:
        by = query.split("&")[0].removeprefix("by=")
        return [(g[by], g["entries"], g["runs"], g["inputTokens"], g["outputTokens"], g["totalTokens"], g["costUsd"])
                for g in api.get(f"/usage?{query}")["groups"]]

    big, small, none = ("big", 2, 2, 11, 2, 13, 0.3), ("small", 1, 1, 0, 5, 5, 0), (None, 1, 1, 0, 0, 0, 0)
    assert groups("by=model") == [big, small, none]
    assert api.get("/usage").json == api.get("/usage?by=model").json
    assert groups("by=workflow") == [("read", 1, 1, 10, 0, 10, 0.2), ("write", 3, 1, 1, 7, 8, 0.1)]
    days = [first["createdAt"][:10], second["createdAt"][:10]]
    assert groups("by=day") == [(days[0], 2, 2, 11, 2, 13, 0.3), (days[1], 2, 1, 0, 5, 5, 0)]
    # since is part of the time that is summed up, until is not
    assert groups(f"by=model&since={second['createdAt']}") == [small, none]
    assert groups(f"by=model&until={second['createdAt']}") == [big]
    assert groups(f"by=model&since={days[1]}") == [small, none]
    assert groups(f"by=model&since={days[1]}T00:00:00+12:00&until={days[1]}T00:00:00%2B00:00") == [big]
    assert groups("by=model&until=2001-01-01") == []


def test_a_question_to_the_ledger_that_makes_no_sense_is_refused(api):
    for query, path in (("by=user", "by"), ("by=", "by"), ("since=yesterday", "since"), ("until=", "until"),
                        ("until=2026-13-01", "until"), ("since=%00", "since")):
        issues = refused(api.get(f"/usage?{query}"), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == [path], query


# --- refusals of shape


def test_nul_is_refused_by_name_in_names_texts_and_what_the_database_looks_into(api):
    run = api.create()
    state, saved, snapshots, usage = (f"/runs/{run}/{part}" for part in ("state", "state/save", "snapshots", "usage"))
    cases = [("PUT", state, {"value": value}, "value") for value in ("\0", ["a\0"], {"a": {"\0": 1}}, "\\\\\0")]
    cases += [("PUT", state, {"value": 1, key: "a\0"}, key) for key in (
        "stream", "label", "reason", "createdBy", "stepId")]
    cases += [("PUT", state, {"value": 1, "metadata": {"a": "\0"}}, "metadata"),
              ("PATCH", state, {"value": {"a": "\0"}}, "value"), ("POST", saved, {"label": "\0"}, "label"),
              ("POST", snapshots, {"label": "a", "state": "\0"}, "state"),
              ("POST", snapshots, {"label": "a", "state": 1, "target": {"type": "a", "id": "\0"}}, "target.id")]
    cases += [("POST", usage, {key: "a\0"}, key) for key in ("stepId", "kind", "provider", "model", "label", "unit")]
    for method, path, body, field in cases:
        issues = refused(api.send(method, path, body), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == [field], body
    for query in ("versions?stream=%00", "versions?stream=a%00b"):
        issues = refused(api.get(f"/runs/{run}/state/{query}"), 400, "invalid_request")["issues"]
        assert [issue["path"] for issue in issues] == ["stream"]
    assert api.event_types(run) == ["run.created"]
    # A backslash, a u and four zeros are five characters that anybody may write.
    assert put(api, run, "\\u0000")["state"]["value"] == "\\u0000"


def test_other_wrong_shapes_are_refused_by_name(api):
    run = api.create()
    cases = [
        (put(api, run, 1, importance="high"), "importance"), (put(api, run, 1, importance=None), "importance"),
        (put(api, run, 1, ifVersion="1"), "ifVersion"), (put(api, run, 1, ifVersion=None), "ifVersion"),
        (put(api, run, 1, ifVersion=-1), "ifVersion"), (put(api, run, 1, metadata=[]), "metadata"),
        (put(api, run, 1, stream=""), "stream"), (put(api, run, 1, id="not an id"), "id"),
        (put(api, run, 1, label=""), "label"), (patch(api, run, {}, label=""), "label"), (save(api, run, ""), "label"),
        (api.post(f"/runs/{run}/state/save", {}), "label"), (snap(api, run, label=""), "label"),
        (snap(api, run, label=None), "label"), (put(api, run, 1, id=".."), "id"),
        (snap(api, run, target="doc"), "target"), (snap(api, run, target={"type": "doc"}), "target.id"),
        (snap(api, run, target=None), "target"), (use(api, run, kind=""), "kind"), (use(api, run, model=5), "model"),
        # A number that no double holds would come back as a hundred thousand digits, or not at all.
        (api.put(f"/runs/{run}/state", raw=b'{"value": {"n": [1e99999]}}'), "value"),
        (api.put(f"/runs/{run}/state", raw=b'{"value": 1, "metadata": {"n": -1e400}}'), "metadata"),
    ]
    for answer, path in cases:
        issues = refused(answer, 400, "invalid_request")["issues"]
        assert path in {issue["path"].removesuffix("._schema") for issue in issues}, answer
    assert api.event_types(run) == ["run.created"]


# --- races


def test_of_eight_writers_who_saw_the_same_version_one_writes(api):
    run = api.create()
    put(api, run, 0)["state"]
    with together(*[lambda n=n: put(api, run, n, ifVersion=1) for n in range(1, 9)]) as answers:
        won = [answer for answer in answers if answer.status == 200]
        assert len(won) == 1
        for answer in answers:
            if answer is not won[0]:
                assert refused(answer, 409, "version_conflict")["state"] == won[0]["state"]
    assert len(versions(api, run)) == 2


def test_patches_at_once_are_all_merged_and_numbered_without_gap(api):
    run = api.create()
    with together(*[lambda n=n: patch(api, run, {f"k{n}": n}, stream=f"s{n % 2}") for n in range(12)]) as answers:
        assert sorted(answer["state"]["version"] for answer in answers) == list(range(1, 13))
    assert api.detail(run)["state"]["value"] == {f"k{n}": n for n in range(12)}
    for stream in ("s0", "s1"):
        assert [v["version"] for v in versions(api, run, f"?stream={stream}")] == [1, 2, 3, 4, 5, 6]
    assert len(api.events(run)) == 13


@pytest.mark.parametrize("write", [
    lambda api, run: put(api, run, 1, id=version_id(1)), lambda api, run: snap(api, run, 1, id=version_id(1)),
    lambda api, run: use(api, run, id="use_1")], ids=["state", "snapshot", "usage"])
def test_of_six_arrivals_of_one_write_at_once_one_writes(api, write):
    run = api.create()
    with together(*[lambda: write(api, run)] * 6) as answers:
        assert {answer.status for answer in answers} == {200}
        assert len({answer.text for answer in answers}) == 1
    assert len(api.events(run)) == 2


@pytest.mark.parametrize(("write", "sent", "code"), [
    (f"select tidebase.write_state(%s, 'run', '1', false, null, '{{\"id\": \"{version_id(1)}\"}}')",
     lambda api, run: put(api, run, 1, id=version_id(1)), "version_id_conflict"),
    ("select tidebase.record_usage(%s, 'use_1', '{\"kind\": \"custom\", \"metadata\": {}}')",
     lambda api, run: use(api, run, id="use_1"), "usage_id_conflict")], ids=["state", "usage"])
def test_an_id_that_another_run_is_just_using_is_refused(api, write, sent, code, blocked, database):
    one, other = api.create(), api.create()
    with psycopg.connect(database) as connection:
        connection.execute(write, (one,))
        with together(lambda: sent(api, other), lambda: (blocked(1), connection.commit())) as answers:
            refused(answers[0], 409, code)
    assert api.event_types(other) == ["run.created"]
