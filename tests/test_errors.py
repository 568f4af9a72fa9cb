"""Whatever a client sends is answered: what makes sense to the letter, all else with a 4xx that says what is wrong.

Every route that takes a body is in BODIES; a test fails when one is missing there.
"""

from __future__ import annotations

import functools
import http.client
import json
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import psycopg
import pytest
from conftest import Answer, Api, LocalServer, an_embedded_postgres, config, eventually, refused, together, tune

import tidebase


class Sent(NamedTuple):
    """A route with a body: the smallest one that it takes, what it may hold, and what to put it into."""

    method: str
    path: str
    least: dict[str, Any]
    kinds: dict[str, str]
    wrap: Callable[[Any], Any] = lambda body: body

    def to(self, api: Api, body: Any) -> Answer:
        return api.send(self.method, self.path, self.wrap(body))

    @property
    def rule(self) -> tuple[str, str]:
        """Method and path, the parts that vary as *."""
        return self.method, "/".join("*" if part == "x" else part for part in self.path.split("/"))


RUN = {"id": "name", "metadata": "object", "recoveryWebhook": "url", "channels": "channels", "deadlineMs": "whole"}
CHILD = {**RUN, "leaseOwner": "name", "name": "name", "workflowName": "name", "edgeType": "name",
         "edgeMetadata": "object", "queue": "name", "maxAttempts": "whole", "priority": "whole"}
JOB = {**RUN, "workflowName": "name", "dedupeKey": "name", "delayMs": "whole", "runAt": "time", "maxAttempts": "whole",
       "priority": "whole"}
STEP = {"name": "name", "inputHash": "name", "options": "object", "leaseOwner": "name"}
FAILURE = {"retryable": "flag", "resumeDecision": "choice"}
RECORD = {**STEP, **FAILURE, "startedAt": "time", "durationMs": "whole", "brief": "flag"}
ABOUT = {"id": "name", "leaseOwner": "name", "label": "name", "reason": "text", "importance": "choice",
         "metadata": "object", "createdBy": "text", "stepId": "text"}
OWNER = {"leaseOwner": "a"}
A_STEP = {"name": "s", "inputHash": "h"}
BODIES = {
    "create": Sent("POST", "/runs/x", {}, RUN),
    "begin": Sent("POST", "/runs/x/begin", {}, {"checkpoints": "flag"}),
    "heartbeat": Sent("POST", "/runs/x/heartbeat", OWNER, {"leaseOwner": "name"}),
    "heartbeats": Sent("POST", "/heartbeats", {"id": "r", **OWNER}, {"id": "name", "leaseOwner": "name"},
                       lambda body: {"runs": [body]}),
    "complete": Sent("POST", "/runs/x/complete", {}, {"leaseOwner": "name", "brief": "flag"}),
    "fail": Sent("POST", "/runs/x/fail", {},
                 {"leaseOwner": "name", "failureClass": "name", "retryable": "flag"}),
    "cancel": Sent("POST", "/runs/x/cancel", {}, {"reason": "text", "actor": "text"}),
    "release": Sent("POST", "/runs/x/release", OWNER, {"leaseOwner": "name"}),
    "retry": Sent("POST", "/runs/x/retry", {}, {}),
    "recover": Sent("POST", "/runs/x/recover", {}, {"reason": "name"}),
    "fork": Sent("POST", "/runs/x/fork", {}, {"id": "name", "fromStep": "name", "queue": "name"}),
    "children": Sent("POST", "/runs/x/children", {"name": "c", "workflowName": "w"}, CHILD),
    "step begin": Sent("POST", "/runs/x/steps/begin", A_STEP, STEP),
    "step complete": Sent("POST", "/runs/x/steps/x/complete", OWNER, {"leaseOwner": "name"}),
    "step fail": Sent("POST", "/runs/x/steps/x/fail", {"error": 1, **OWNER}, {"leaseOwner": "name", **FAILURE}),
    "step review": Sent("POST", "/runs/x/steps/x/review", {"decision": "retry"},
                        {"decision": "choice", "actor": "text"}),
    "record": Sent("POST", "/runs/x/steps", {**A_STEP, **OWNER}, RECORD),
    "records": Sent("POST", "/steps", {"runId": "r", **A_STEP, **OWNER}, {**RECORD, "runId": "name"},
                    lambda body: {"records": [body]}),
    "write a step": Sent("POST", "/writes", {"do": "record_step", "runId": "r", **A_STEP, **OWNER},
                         {**RECORD, "do": "choice", "runId": "name"}, lambda body: {"writes": [body]}),
    "write a begin": Sent("POST", "/writes", {"do": "begin_step", "runId": "r", **A_STEP},
                          {**STEP, "do": "choice", "runId": "name"}, lambda body: {"writes": [body]}),
    "write an output": Sent("POST", "/writes", {"do": "complete_step", "runId": "r", "stepId": "s", **OWNER},
                            {"do": "choice", "runId": "name", "stepId": "name", "leaseOwner": "name"},
                            lambda body: {"writes": [body]}),
    "write a step's failure": Sent(
        "POST", "/writes", {"do": "fail_step", "runId": "r", "stepId": "s", "error": 1, **OWNER},
        {"do": "choice", "runId": "name", "stepId": "name", "leaseOwner": "name", **FAILURE, "chained": "flag"},
        lambda body: {"writes": [body]}),
    "write a failure": Sent(
        "POST", "/writes", {"do": "fail_run", "runId": "r"},
        {"do": "choice", "runId": "name", "leaseOwner": "name", "failureClass": "name", "retryable": "flag",
         "chained": "flag"}, lambda body: {"writes": [body]}),
    "write a result": Sent("POST", "/writes", {"do": "complete_run", "runId": "r"},
                           {"do": "choice", "runId": "name", "leaseOwner": "name", "brief": "flag"},
                           lambda body: {"writes": [body]}),
    "write a job": Sent("POST", "/writes", {"do": "enqueue_run", "queue": "q", "workflowName": "w"},
                        {**JOB, "do": "choice", "queue": "name"}, lambda body: {"writes": [body]}),
    "write a child": Sent("POST", "/writes", {"do": "create_child", "runId": "r", "name": "c", "workflowName": "w"},
                          {**CHILD, "do": "choice", "runId": "name"}, lambda body: {"writes": [body]}),
    "gate begin": Sent("POST", "/runs/x/gates/begin", {"name": "g", "prompt": "?"},
                       {"name": "name", "prompt": "text", "channels": "channels", "timeoutMs": "whole",
                        "leaseOwner": "name"}),
    "gate resolve": Sent("POST", "/runs/x/gates/x/resolve", {"token": "t", "decision": "approved"},
                         {"token": "text", "decision": "choice", "actor": "text"}),
    "wait": Sent("POST", "/runs/x/wait", {**OWNER, "for": {"event": "e"}},
                 {"leaseOwner": "name", "for": "object", "timeoutMs": "whole"}),
    "signal": Sent("POST", "/runs/x/signals", {"name": "s"}, {"id": "name", "name": "name", "leaseOwner": "name"}),
    "signal expire": Sent("POST", "/runs/x/signals/x/expire", OWNER, {"leaseOwner": "name", "n": "whole"}),
    "state put": Sent("PUT", "/runs/x/state", {}, {**ABOUT, "stream": "name", "ifVersion": "whole"}),
    "state patch": Sent("PATCH", "/runs/x/state", {},
                        {**ABOUT, "stream": "name", "ifVersion": "whole", "value": "object"}),
    "state save": Sent("POST", "/runs/x/state/save", {"label": "l"}, {**ABOUT, "stream": "name"}),
    "snapshot": Sent("POST", "/runs/x/snapshots", {"label": "l"}, {**ABOUT, "target": "object"}),
    "usage": Sent("POST", "/runs/x/usage", {}, {
        **dict.fromkeys(("id", "kind", "leaseOwner"), "name"), "metadata": "object", "quantity": "amount",
        "costUsd": "amount", **dict.fromkeys(("stepId", "provider", "model", "label", "unit"), "text"),
        **dict.fromkeys(("inputTokens", "outputTokens", "totalTokens"), "whole")}),
    "enqueue": Sent("POST", "/queues/x/enqueue", {"workflowName": "w"}, JOB),
    "enqueue many": Sent("POST", "/queues/x/enqueue", {"workflowName": "w"}, JOB, lambda body: {"runs": [body]}),
    "claim": Sent("POST", "/queues/claim", {"queues": ["q"]},
                  {"queues": "names", "id": "name", "leaseOwner": "name", "limit": "whole", "waitMs": "whole",
                   "checkpoints": "flag", "workflows": "workflows"}),
    "queue config": Sent("PUT", "/queues/x/config", {},
                         {"concurrency": "cap", "ratePerMinute": "cap", "invokeUrl": "no url"}),
    "schedule": Sent("PUT", "/schedules/x", {"cron": "* * * * *", "workflowName": "w"},
                     {"cron": "text", "timezone": "text", "workflowName": "name", "queue": "name",
                      "maxAttempts": "whole", "enabled": "flag"}),
    "schedule preview": Sent("POST", "/schedules/preview", {"cron": "* * * * *"}, {"cron": "text", "timezone": "text"}),
    "schedule run": Sent("POST", "/schedules/x/run", {}, {"id": "name"}),
    "changes": Sent("POST", "/changes", {}, {"query": "text", "known": "object"}),
    "bulk": Sent("POST", "/bulk", {"action": "cancel", "ids": ["r"]},
                 {"action": "choice", "ids": "names", "filter": "text", "dryRun": "flag", "expected": "whole",
                  "cursor": "text", "limit": "whole", "reason": "text", "actor": "text"}),
    "gate look": Sent("POST", "/runs/x/gates/x/look", {"token": "t"}, {"token": "text"}),
    "resend": Sent("POST", "/runs/x/deliveries/x/resend", {}, {}),
}
TEXT = [5, 1.5, True, None, [], {}, "a\0b"]
NAME = [*TEXT, "", "x" * 513]
URL = [5, True, [], "", "x", "ftp://h/", "http://", "http://[", "http://h:99999/", "http://h/\0"]
CAP = ["5", 1.5, True, [], {}, 10**30, 0, -1]
WRONG: dict[str, list[Any]] = {
    "text": TEXT, "name": NAME, "no url": URL, "url": [*URL, None], "cap": CAP,
    "whole": ["5", "", 1.5, True, None, [], {}, 10**30, -(10**30)],
    "amount": ["5", True, None, [], {}, -1],
    "flag": ["true", "", 1, 0, None, []], "choice": ["nonsense", "", 5, None, [], {}],
    "time": [5, True, None, "", "tomorrow", "2026-13-01T00:00:00Z", [], {}],
    "object": [5, "a", [], True, {"a\0b": "\0"}],
    "names": [5, "q", None, {}, [], [5], [None], [""], ["a\0b"], ["x" * 513], ["q"] * 1001],
    "workflows": [5, "w", None, {}, [5], [None], [""], ["a\0b"], ["x" * 513], ["w"] * 1001],
    "channels": [5, "a", {}, None, [5], [{}], [{"type": "pigeon", "url": "http://h/"}],
                 [{"type": "webhook", "url": "h"}],
                 [{"type": "webhook", "url": "http://h/", "secret": None}],
                 [{"type": "webhook", "url": "http://h/", "events": "all"}]],
}


def raw(api: Api, head: bytes, body: bytes = b"") -> Answer:
    """Send bytes as they are, which no client would."""
    host, port = api.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.replace(b"\n", b"\r\n") + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                           + body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return Answer(response.status, response.headers, response.read())


def nested(depth: int, kind: str) -> bytes:
    return b"[" * depth + b"]" * depth if kind == "list" else b'{"a":' * depth + b"1" + b"}" * depth


# ------------------------------------------------------------------------------
# Bodies: field by field
# ------------------------------------------------------------------------------
def test_every_route_that_takes_a_body_is_looked_at() -> None:
    rules = {(method, "/".join("*" if part.startswith("<") else part for part in rule.rule.split("/")))
             for rule in tidebase.app.url_map.iter_rules()
             for method in (rule.methods or set()) & {"POST", "PUT", "PATCH"}}
    assert rules == {sent.rule for sent in BODIES.values()}


@pytest.mark.parametrize("what", BODIES)
def test_a_value_of_the_wrong_type_is_named(api: Api, what: str) -> None:
    sent = BODIES[what]
    for key, kind in sent.kinds.items():
        for wrong in WRONG[kind]:
            answer = sent.to(api, {**sent.least, key: wrong})
            body = refused(answer, 400, "invalid_request")
            assert any(key in issue["path"].split(".") for issue in body["issues"]), (key, wrong, body)
    for key in sent.least:
        body = refused(sent.to(api, {k: v for k, v in sent.least.items() if k != key}), 400, "invalid_request")
        assert any(key in issue["path"].split(".") for issue in body["issues"]), (key, body)
    assert api.get("/runs")["runs"] == []


def test_all_wrong_values_of_a_body_are_named_at_once(api: Api) -> None:
    body = refused(api.post("/runs/report", {"id": 5, "deadlineMs": "x", "channels": [
        {"type": "webhook", "url": "http://h/"}, {"type": "webhook", "url": 5}]}), 400, "invalid_request")
    assert sorted(issue["path"] for issue in body["issues"]) == ["channels.1.url", "deadlineMs", "id"]


def test_keys_that_a_body_does_not_know_are_ignored(api: Api) -> None:
    for what, sent in BODIES.items():
        answer = sent.to(api, {**sent.least, "unheard_of": [1, {"a": None}], "lease_owner": 5, "": 0})
        assert answer.status in (200, 404, 409), (what, answer)


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "nonsense"])
def test_no_body_counts_as_an_empty_one_whatever_the_content_type_says(api: Api, content_type: str) -> None:
    run = api.post("/runs/report", headers={"content-type": content_type})["run"]["id"]
    for verb in ("begin", "cancel", "retry"):
        assert api.post(f"/runs/{run}/{verb}", headers={"content-type": content_type}).status == 200
    assert api.post("/runs/report", raw=b" \r\n\t").status == 200
    refused(api.post("/runs/report", {"input": 1}, headers={"content-type": content_type}), 415,
            "unsupported_media_type")


# ------------------------------------------------------------------------------
# Bodies: not JSON
# ------------------------------------------------------------------------------
@pytest.mark.parametrize("body", [
    b"{", b"}", b"[]", b"5", b'"x"', b"null", b"true", b"{}x", b"{} {}", b"{'a':1}", b'{"a":1,}', b'{,}', b'{"a" 1}',
    b'{"a":}', b'{"a"}', b"{a:1}", b'{"a":01}', b'{"a":+1}', b'{"a":.5}', b'{"a":1.}', b'{"a":0x1}', b'{"a":NaN}',
    b'{"a":Infinity}', b'{"a":[-Infinity]}', b'{"input":NaN}', b'{"metadata":{"a":NaN}}', b'{"a":"\x01"}',
    b'{"a":"\\x"}', b'{"a":"\\u12"}', b'{"a":"x}', b"\xff", b'{"a":"\xff"}', b'{"a":"\xc0\xaf"}',
    b'{"input":"\xed\xa0\x80"}', b'{"input":"\\ud800"}', b'{"\\udfff":1}', b'{"input":{"\\ud800x":1}}',
    b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
    b'{"runs":[{]}', b'{"runs":[{},]}', b'{"records":[', b'{"channels":[}', b'{"a":1}\x00', b"\x00", b"// {}"])
def test_a_body_that_is_no_json_object_is_refused_by_every_route(api: Api, body: bytes) -> None:
    for sent in BODIES.values():
        refused(api.send(sent.method, sent.path, raw=body), 400, "invalid_request")


BIG = {
    **{f"{kind} 10,000 deep": nested(10_000, kind) for kind in ("list", "object")},
    "list 10,000 deep and open": b"[" * 10_000,
    "a number of 2 MB": b"1" * 2_000_000,
    "a fraction of 2 MB": b"0." + b"1" * 2_000_000,
    "an exponent of 2 MB": b"1e" + b"1" * 2_000_000,
}


@pytest.mark.parametrize("what", BIG)
def test_what_is_too_deep_or_too_long_to_read_is_refused_wherever_it_stands(api: Api, what: str) -> None:
    for frame in (b"%s", b'{"unknown":%s}', b'{"input":%s}', b'{"deadlineMs":%s}', b'{"metadata":{"a":%s}}',
                  b'{"channels":[%s]}', b'{"channels":[{"url":%s}]}'):
        refused(api.post("/runs/report", raw=frame % BIG[what]), 400, "invalid_request")
    for frame in (b'{"records":[{"output":%s}]}', b'{"runs":[%s]}'):
        refused(api.post("/steps", raw=frame % BIG[what]), 400, "invalid_request")
    assert api.get("/runs")["runs"] == []


@pytest.mark.parametrize("before", [0, 1, 500, 989, 990, 5000])
def test_a_number_has_a_thousand_characters_wherever_it_stands_and_a_string_any_digits(api: Api, before: int) -> None:
    frame = b'{"unknown":"%s","input":%%s}' % (b"7" * before)
    for number in (b"1" * 1001, b"-" + b"1" * 1000, b"0." + b"1" * 999, b"1e" + b"0" * 998 + b"1"):
        refused(api.post("/runs/report", raw=frame % number), 400, "invalid_request")
    for value in (b"1" * 1000, b'"%s"' % (b"1" * 5000), b'["%s\\"", 5]' % (b"1" * 2000)):
        assert value.decode() in api.post("/runs/report", raw=frame % value).text


@pytest.mark.parametrize("kind", ["list", "object"])
@pytest.mark.parametrize("key", ["input", "metadata"])
def test_at_no_depth_does_the_server_break(api: Api, kind: str, key: str) -> None:
    taken = 0
    for depth in (100, 400, 700, 850, 900, 930, 950, 970, 980, 990, 1000, 1500, 3000):
        run = f"r{depth}"
        value = b'{"x":%s}' % nested(depth, kind)
        answer = api.post("/runs/report", raw=b'{"id":"%s","%s":%s}' % (run.encode(), key.encode(), value))
        assert answer.status in (200, 400), answer
        if answer.status == 200:
            taken = depth
            assert answer.text.replace(" ", "").count(value.decode()) == 1
            assert api.get(f"/runs/{run}").status == 200
            assert api.post("/runs/report", {"id": run}).status == 200
    assert taken >= 400


def test_nul_is_refused_where_postgres_must_hold_text_and_kept_in_payloads(api: Api) -> None:
    run = api.create(input="\0", metadata={"looks like": r"\u0000"})
    assert api.run(run)["input"] == "\0"
    assert api.run(run)["metadata"] == {"looks like": r"\u0000"}
    for metadata in ({"a": "\0"}, {"\0": 1}, {"a": ["\\\0"]}):
        refused(api.post("/runs/report", {"metadata": metadata}), 400, "invalid_request")


# ------------------------------------------------------------------------------
# Payloads: back to the letter
# ------------------------------------------------------------------------------
LETTER = (r'{"z" : 1.0, "a":1e5,"b":[1E+2, -0,-0.0,0.10, 12345678901234567890.5],  "n":"\u0000\u00e9", "a":2,'
          r'"e":"\ud83d\ude00é\/\u2028", "": {},"big":1e999,"t":[true,false,null,"",[]]}')


def test_payloads_come_back_to_the_letter(api: Api) -> None:
    def letters(path: str, head: str, method: str = "POST", tail: str = "}") -> Answer:
        answer = api.send(method, path, raw=f"{head}{LETTER}{tail}".encode())
        assert answer.status == 200, answer
        assert LETTER in answer.text
        return answer

    letters("/runs/report", '{"id":"r","input":')
    api.begin("r", "a")
    begun = letters("/runs/r/steps/begin", '{"name":"one","inputHash":"h","leaseOwner":"a","input":')
    assert api.begin("r", "a", checkpoints=True)["checkpoints"] == []
    letters(f"/runs/r/steps/{begun['step']['id']}/complete", '{"leaseOwner":"a","output":')
    assert api.begin_step("r", "one", "a").text.count(LETTER) == 3  # the step's input and output, and the output
    two = letters("/runs/r/steps", '{"name":"two","inputHash":"h","leaseOwner":"a","retryable":true,"error":')
    letters("/steps", '{"records":[{"runId":"r","name":"three","inputHash":"h","leaseOwner":"a","output":',
            tail="}]}")
    letters("/steps", '{"records":[{"runId":"r","name":"four","inputHash":"h","leaseOwner":"a","input":', tail="}]}")
    four = api.begin_step("r", "five", "a", options={"replay": "manual"})["step"]["id"]
    letters(f"/runs/r/steps/{four}/fail", '{"leaseOwner":"a","error":')
    letters(f"/runs/r/steps/{four}/review", '{"decision":"complete","output":')
    assert two["step"]["status"] == "failed_retryable"
    assert api.begin("r", "a", checkpoints=True).text.count(LETTER) == 4  # the run's input, three outputs
    letters("/runs/r/complete", '{"leaseOwner":"a","result":')
    detail = api.get("/runs/r")
    assert detail.text.count(LETTER) == 12, "8 in the rows, 4 in the events"
    assert detail.json["run"]["result"] == json.loads(LETTER)

    letters("/queues/q/enqueue", '{"id":"q1","workflowName":"w","input":')
    letters("/queues/q/enqueue", '{"runs":[{"id":"q2","workflowName":"w","input":', tail="}]}")
    assert api.post("/queues/claim", {"queues": ["q"], "limit": 2}).text.count(LETTER) == 2
    letters("/runs/q1/fail", '{"error":')
    assert refused(api.heartbeat("q1", "x"), 409, "lease_lost")["run"]["error"] == json.loads(LETTER)
    assert api.heartbeat("q1", "x").text.count(LETTER) == 2
    assert api.get("/runs").text.count(LETTER) == 5


def test_null_stands_for_the_default_of_a_payload_and_empty_values_are_values(api: Api) -> None:
    assert api.post("/runs/report", {"input": None, "metadata": None})["run"]["input"] == {}
    for value in (0, False, "", []):
        run = api.create(input=value)
        assert api.run(run)["input"] == value
        assert api.begin_step(run, "s", "a", input=value)["step"]["input"] == value
        assert api.complete(run, result=value)["run"]["result"] == value
    run = api.create()
    step = api.do_step(run, "s", "a", output=None)
    assert api.detail(run)["steps"][0]["output"] is None
    assert step
    assert api.fail(run, None)["run"]["error"] is None


def test_of_two_equal_keys_the_last_counts(api: Api) -> None:
    answer = api.post("/runs/report", raw=b'{"id":5,"input":1,"input":2,"id":"r","channels":5,"channels":[]}')
    assert (answer["run"]["id"], answer["run"]["input"]) == ("r", 2)
    refused(api.post("/runs/report", raw=b'{"id":"r","id":null}'), 400, "invalid_request")


# ------------------------------------------------------------------------------
# What PostgreSQL's log gets
# ------------------------------------------------------------------------------
class Log:
    """What PostgreSQL logs about a database from now on."""

    def __init__(self, path: Path, conninfo: str) -> None:
        self.path, self.start = path, path.stat().st_size
        name = psycopg.conninfo.conninfo_to_dict(conninfo)["dbname"]
        self.entries = re.compile(rf"^{name} .*\n(?:\t.*\n)*", re.MULTILINE)  # see conftest.tune

    def grown(self) -> str:
        return "".join(self.entries.findall(self.path.read_bytes()[self.start:].decode()))


@pytest.fixture
def logged(request: pytest.FixtureRequest, embedded: Any) -> Iterator[tuple[Api, Log]]:
    """A server, and what PostgreSQL logs about its database."""
    with ExitStack() as stack:
        if embedded:
            (own, _), conninfo = embedded, request.getfixturevalue("database")
            server = request.getfixturevalue("server")
        else:  # whose log nobody gives us
            own, conninfo = stack.enter_context(an_embedded_postgres())
            tune(own, conninfo)
            server = LocalServer(config(), conninfo).start()
            stack.callback(server.close)
        yield Api(server.url, server), Log(own.log, conninfo)


SECRET = "of-a-patient"
LARGE = SECRET + "x" * 200_000


def refuse_a_run(api: Api) -> list[Callable[[], Any]]:
    run, done = api.create(input=LARGE), api.create(input=LARGE)
    api.begin(run, "a")["run"]
    api.post(f"/runs/{run}/cancel")["run"]
    api.complete(done)["run"]
    beat = {"runId": run, "leaseOwner": "a", **A_STEP}
    return [lambda: refused(api.heartbeat(run, "a"), 409, "run_cancelled")["run"],
            lambda: refused(api.heartbeat(done, "a"), 409, "lease_lost")["run"],
            lambda: refused(api.post(f"/runs/{done}/cancel"), 409, "run_completed")["run"],
            lambda: api.post("/writes", {"writes": [{"do": "record_step", **beat}] * 2})["results"][1]["run"]]


def refuse_a_step(api: Api) -> list[Callable[[], Any]]:
    run = api.create()
    api.begin(run, "a")["run"]
    step = api.do_step(run, "s", "a", LARGE, input=LARGE)
    return [lambda: refused(api.fail_step(run, step, "b"), 409, "lease_lost")["step"],
            lambda: refused(api.post(f"/runs/{run}/steps", {**A_STEP, **OWNER, "inputHash": "other"}),
                            409, "input_mismatch")["step"],
            lambda: refused(api.post(f"/runs/{run}/steps/{step}/review", {"decision": "retry"}),
                            409, "not_in_review")["step"]]


def refuse_a_gate(api: Api) -> list[Callable[[], Any]]:
    run = api.create()
    gate = api.post(f"/runs/{run}/gates/begin", {"name": "g", "prompt": "?", "data": LARGE})["gate"]
    decision = {"token": gate["resolveToken"], "decision": "approved", "payload": SECRET}
    resolve = f"/runs/{run}/gates/{gate['id']}/resolve"
    api.post(resolve, decision)["gate"]
    return [lambda: refused(api.post(resolve, decision), 409, "gate_resolved")["gate"]]


def refuse_a_state(api: Api) -> list[Callable[[], Any]]:
    run = api.create()
    api.put(f"/runs/{run}/state", {"value": LARGE})["state"]
    return [lambda: refused(api.put(f"/runs/{run}/state", {"value": 1, "ifVersion": 5}), 409, "version_conflict")
            ["state"]]


@pytest.mark.parametrize("refuse", [refuse_a_run, refuse_a_step, refuse_a_gate, refuse_a_state])
def test_a_refusal_carries_a_large_object_to_the_client_and_nothing_of_it_into_the_log_of_postgres(
        logged: tuple[Api, Log], refuse: Callable[[Api], list[Callable[[], Any]]]) -> None:
    api, log = logged
    requests = refuse(api)
    for number in range(20):
        assert LARGE in requests[number % len(requests)]().values()
    assert len(log.grown()) < 64_000
    assert SECRET not in log.grown()


def test_errors_of_postgres_itself_put_no_payloads_into_its_log(logged: tuple[Api, Log]) -> None:
    api, log = logged
    random = "".join(map(chr, Random(1).sample(range(0x4E00, 0x9FFF), 512)))  # together too long for an index's row
    body = {"workflowName": "w", "input": LARGE, "metadata": {"a": LARGE}, "dedupeKey": random}
    refused(api.post("/writes", {"writes": [{"do": "enqueue_run", "queue": random, **body}]}), 400, "invalid_request")
    create = functools.partial(api.server.database.call, "create_run", id="r", workflow_name="w", input="{}",
                               recovery_webhook=None, channels="[]", deadline_ms=None)
    create(metadata="{}")
    for wrong in ('["' + LARGE + '", nonsense]', '["' + LARGE + '\\u0000"]', "[" * 100_000 + LARGE):
        with pytest.raises(psycopg.Error):  # such never gets past the routes
            create(metadata=wrong)
    with pytest.raises(psycopg.IntegrityError), api.server.database.connection() as connection:
        connection.execute("insert into tidebase.runs (id, workflow_name, status, input)"
                           " values ('r', 'w', 'queued', %s)", [json.dumps(LARGE)])
    assert "runs_queued_whole" in log.grown()
    assert len(log.grown()) < 64_000
    assert LARGE[:200] not in log.grown()


# ------------------------------------------------------------------------------
# Size
# ------------------------------------------------------------------------------
@pytest.fixture
def small(start_server: Callable[..., LocalServer]) -> Api:
    """A server that takes bodies of 2,048 bytes."""
    return Api(start_server(TIDEBASE_MAX_BODY=2048).url)


@pytest.mark.parametrize(("chunked", "size"), [
    (False, 2049), (False, 8192), (False, 20_000), (False, 200_000), (True, 2049), (True, 8192)])
def test_a_body_past_the_limit_is_refused_and_the_server_goes_on(small: Api, chunked: bool, size: int) -> None:
    body = b'{"input":"' + b"x" * (size - 12) + b'"}'

    def chunks() -> Iterable[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    data: Any = chunks() if chunked else body
    refused(small.post("/runs/report", raw=data), 413, "body_too_large")
    for sent in (b'{"input":"' + b"x" * (2048 - 12) + b'"}', b"{}"):
        data = iter([sent]) if chunked else sent
        assert small.post("/runs/report", raw=data).status == 200
    assert len(small.get("/runs")["runs"]) == 2


def test_a_body_without_an_end_is_cut_off_and_the_server_goes_on(small: Api) -> None:
    sent = 0

    def endless() -> Iterable[bytes]:
        nonlocal sent
        while sent < 100_000_000:
            sent += 1000
            yield b"x" * 1000

    with suppress(ConnectionError):  # it may hang up while we go on sending
        refused(small.post("/runs/report", raw=endless()), 413, "body_too_large")  # type: ignore[arg-type]
    assert sent < 100_000_000
    assert small.post("/runs/report").status == 200


# ------------------------------------------------------------------------------
# Routes, methods, paths
# ------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [
    "/nothing", "/runs/", "/runs//begin", "/runs/a/b/c", "/health/", "/runs/a/b%2Fbegin", "/runs/a%2Fbegin/x",
    "/RUNS", "/runs/a/begin/"])
def test_a_route_that_there_is_not_is_not_found(api: Api, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        refused(api.send(method, path), 404, "not_found")


@pytest.mark.parametrize(("method", "path"), [
    ("DELETE", "/runs"), ("PUT", "/runs/x"), ("GET", "/runs/x/begin"), ("DELETE", "/runs/x/begin"), ("PATCH", "/steps"),
    ("POST", "/health"), ("OPTIONS", "/runs"), ("TRACE", "/runs"), ("NONSENSE", "/runs"), ("GET", "/queues/claim")])
def test_a_method_that_a_route_does_not_take_is_refused(api: Api, method: str, path: str) -> None:
    refused(api.send(method, path), 405, "method_not_allowed")


def test_a_slash_in_a_name_is_percent_encoded_and_stays_one_part(api: Api) -> None:
    run = api.post("/runs/team%2Fa%20b%3F%23%25")["run"]
    assert run["workflowName"] == "team/a b?#%"
    queued = api.enqueue("team%2Fa")
    assert api.run(queued)["queue"] == "team/a"
    assert [taken["id"] for taken in api.claim("team/a")] == [queued]
    assert api.put("/queues/team%2Fa/config", {"concurrency": 1})["config"]["name"] == "team/a"
    refused(api.post("/queues/team/a/enqueue", {"workflowName": "w"}), 404, "not_found")
    assert api.post("/runs/%C3%BC%e2%82%ac")["run"]["workflowName"] == "ü€"


@pytest.mark.parametrize("part", ["%ff", "%C3", "%ED%A0%80", "a%00b", "%00", "x" * 513])
def test_a_path_part_that_is_no_name_is_refused(api: Api, part: str) -> None:
    for method, path in (("POST", f"/runs/{part}"), ("GET", f"/runs/{part}"), ("POST", f"/runs/{part}/begin"),
                         ("POST", f"/runs/r/steps/{part}/complete"), ("POST", f"/queues/{part}/enqueue"),
                         ("PUT", f"/queues/{part}/config")):
        refused(api.send(method, path), 400, "invalid_request")


@pytest.mark.parametrize("part", ["%", "%2", "%zz", "100%", "%2G"])
def test_a_percent_sign_that_escapes_nothing_stands_for_itself(api: Api, part: str) -> None:
    assert api.post(f"/runs/{part}")["run"]["workflowName"] == part


@pytest.mark.parametrize(("head", "status"), [
    (b"GET http://localhost/health HTTP/1.1", 200),
    (b"GET /health?x=%zz&&=#f HTTP/1.1", 200),
    (b"GET /runs/\xff\xfe HTTP/1.1", 400),
    (b"GET /runs/%ff HTTP/1.1", 400),
    (b"GET /runs/a b HTTP/1.1", 400),
    (b"NONSENSE", 400),
    (b"GET /health HTTP/1.1\nContent-Length: x", 400),
    (b"GET /health HTTP/1.1\nContent-Length: -5", 400),
    (b"POST /runs/w HTTP/1.1\nContent-Length: 2\nContent-Length: 3", 400),
    (b"POST /runs/w HTTP/1.1\nTransfer-Encoding: nonsense", 501),
    (b"GET /health HTTP/1.1\nBad Header: x", 400),
    (b"GET /health HTTP/1.1\nX: " + b"x" * 300_000, 431),
], ids=lambda value: str(value)[:40])
def test_what_is_hardly_http_gets_an_answer_in_our_shape(api: Api, head: bytes, status: int) -> None:
    answer = raw(api, head)
    assert answer.status == status, answer
    if status != 200:
        refused(answer, status, {431: "headers_too_large", 501: "not_implemented"}.get(status, "invalid_request"))
    assert api.get("/health").status == 200


@pytest.mark.parametrize("owner", [b"a\0b", b"\xff\xfe", "ü€".encode(), b"x" * 512, b"x" * 513, b"\x7f", b" "])
def test_an_owner_in_the_header_is_taken_or_refused(api: Api, owner: bytes) -> None:
    run = api.create()
    answer = raw(api, b"POST /runs/%s/begin HTTP/1.1\nX-Tidebase-Worker: %s" % (run.encode(), owner))
    if b"\0" in owner or b"\x7f" in owner or len(owner) > 512:
        refused(answer, 400, "invalid_request")
        assert api.run(run)["status"] == "pending"
    else:
        assert api.heartbeat(run, answer["leaseOwner"])["run"]["leaseOwner"] == answer["leaseOwner"]


def test_dots_alone_are_no_id(api: Api) -> None:
    """As a part of a URL, . is the folder and .. the one above it: /runs/../begin is another route."""
    for dots in (".", ".."):
        for answer in (api.post("/runs/w", {"id": dots}), api.post("/queues/claim", {"queues": ["q"], "id": dots}),
                       api.post("/queues/q/enqueue", {"workflowName": "w", "id": dots})):
            assert [issue["path"] for issue in refused(answer, 400, "invalid_request")["issues"]] == ["id"]
    assert {api.create(id=id) for id in ("...", ".a", "a..")} == {"...", ".a", "a.."}


def test_digits_are_those_of_ascii(api: Api) -> None:
    run = api.create()
    for query in ("/runs?limit=%D9%A5", "/runs?before=%D9%A5_a", f"/runs/{run}?waitMs=%D9%A5",
                  f"/runs/{run}/events?after=%D9%A5", "/usage?since=%D9%A2%D9%A0%D9%A2%D9%A6-01-01"):
        refused(api.get(query), 400, "invalid_request")
    for cron in ("\u0665 * * * *", "*/\uff15 * * * *"):
        refused(api.put("/schedules/s", {"cron": cron, "workflowName": "w"}), 400, "invalid_request")
    job = {"workflowName": "w", "runAt": "\uff12\uff10\uff12\uff16-01-01T00:00:00Z"}
    refused(api.post("/queues/q/enqueue", job), 400, "invalid_request")


def test_every_answer_forbids_to_guess_its_type_and_to_keep_it(
        api: Api, start_server: Callable[..., LocalServer]) -> None:
    run = api.create()
    api.complete(run)
    other = Api(start_server(TIDEBASE_API_KEY="key", TIDEBASE_CORS_ORIGIN="*", TIDEBASE_MAX_BODY=1024).url)
    answers = {
        200: [api.get("/health"), api.get("/openapi.json"), api.get("/runs"),
              api.begin_step(run, "s"), api.get(f"/runs/{run}/events?follow=false"),
              api.post("/queues/claim", {"queues": ["q"]}), other.send("OPTIONS", "/runs")],
        400: [raw(api, b"NONSENSE"), api.post("/steps", {})],
        401: [other.get("/runs"), other.post("/steps", {})], 404: [api.get("/nothing")], 405: [api.get("/steps")],
        413: [other.post("/steps", raw=b"x" * 2000, headers={"authorization": "Bearer key"})],
        431: [raw(api, b"GET / HTTP/1.1\nX: " + b"x" * 300_000)]}
    for status, some in answers.items():
        for answer in some:
            assert answer.status == status, answer
            assert answer.headers["x-content-type-options"] == "nosniff", answer
            assert answer.headers["cache-control"] == "no-store", answer


# ------------------------------------------------------------------------------
# Reads that take too long
# ------------------------------------------------------------------------------
def test_a_read_that_takes_too_long_is_ended_and_others_are_served(
        start_server: Callable[..., LocalServer], sql: Callable[..., Any]) -> None:
    """16 lists that took 55 s each held all connections, and nobody was served for 88 s."""
    api = Api(start_server(TIDEBASE_READ_TIMEOUT_MS=50, TIDEBASE_POOL=2).url)
    run = api.create()
    gate = api.post(f"/runs/{run}/gates/begin", {"name": "g", "prompt": "?"})["gate"]["id"]
    paths = ["/runs", "/runs?metadata.a=1", f"/runs/{run}", f"/runs/{run}?waitMs=5000", f"/runs/{run}/gates/{gate}",
             f"/runs/{run}/gates/{gate}?waitMs=5000", f"/runs/{run}/signals/s", f"/runs/{run}/state/versions",
             f"/runs/{run}/snapshots", f"/runs/{run}/events", "/usage", "/queues"]
    sql("begin")
    sql("lock table tidebase.runs in access exclusive mode")
    try:
        with together(*[lambda path=path: api.get(path) for path in paths]) as answers:
            for answer in answers:
                body = refused(answer, 503, "query_timeout")
                assert "took too long" in body["error"]
                assert "away" not in body["error"]
                assert answer.headers["retry-after"] == "1"
        eventually(lambda: api.get("/schedules").status == 200)  # on a busy machine even this may pass the 50 ms
        assert api.get("/health").status == 200
    finally:
        sql("rollback")
    for path in paths[:-3]:
        eventually(lambda path=path: api.get(path.replace("waitMs=5000", "waitMs=1")).status == 200)


def test_the_time_limit_of_a_read_is_no_limit_of_the_next_write(
        start_server: Callable[..., LocalServer], database: str, blocked: Callable[[int], None]) -> None:
    """It holds for its own transaction: connections are shared, and a pooler may stand in between."""
    api = Api(start_server(TIDEBASE_READ_TIMEOUT_MS=50, TIDEBASE_POOL=2).url)
    run, other = api.create(), api.create()

    def release() -> None:
        blocked(1)
        assert api.get(f"/runs/{other}?waitMs=200")["run"]["status"] == "pending"  # four times what a read may take
        connection.commit()

    with psycopg.connect(database) as connection:
        for _ in range(4):
            eventually(lambda: api.get("/runs").status == 200)  # on a busy machine it may take too long
        connection.execute("select from tidebase.runs where id = %s for update", (run,))
        with together(lambda: api.begin(run, "a"), release) as answers:
            assert answers[0]["run"]["status"] == "running"


# ------------------------------------------------------------------------------
# Who may ask: the key, other origins, health
# ------------------------------------------------------------------------------
@pytest.mark.parametrize("header", [
    None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer keyy", "Bearer ke", "Basic key", "key",
    b"Bearer \xff\xfe", "Bearer ü", "Bearer k\xc3y"])
def test_without_the_key_nothing_is_told(start_server: Callable[..., LocalServer], header: Any) -> None:
    api = Api(start_server(TIDEBASE_API_KEY="key").url)
    headers = {} if header is None else {"authorization": header}
    for method, path in (("GET", "/runs"), ("POST", "/runs/w"), ("GET", "/runs/r"), ("GET", "/nothing"),
                         ("PUT", "/runs"), ("GET", "/runs?token=key"), ("GET", "/runs/%ff"), ("OPTIONS", "/runs")):
        expected = refused(api.send(method, path, headers=headers), 401, "unauthorized")
        assert "key" not in expected["error"].replace("API key", "")
    assert api.get("/health", headers=headers).json["ok"] is True
    owner = Api(f"http://{api.address}", key="key")
    assert owner.get("/runs")["runs"] == []


@pytest.mark.parametrize("key", ["schlüssel", "k€y", "a b"])
def test_a_key_of_any_letters_is_compared_as_its_bytes(start_server: Callable[..., LocalServer], key: str) -> None:
    api = Api(start_server(TIDEBASE_API_KEY=key).url)
    sent: Any = {"authorization": f"Bearer {key}".encode()}
    assert api.get("/runs", headers=sent).status == 200


def test_other_origins_are_not_let_in_unless_named(api: Api) -> None:
    for answer in (api.get("/health"), api.send("OPTIONS", "/runs", headers={"origin": "https://x.example"})):
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


@pytest.mark.parametrize("origin", ["*", "https://app.example"])
def test_an_origin_that_is_named_may_ask_and_preflights_need_no_key(
        start_server: Callable[..., LocalServer], origin: str) -> None:
    api = Api(start_server(TIDEBASE_CORS_ORIGIN=origin, TIDEBASE_API_KEY="key").url)
    for path in ("/runs", "/runs/r/begin", "/nothing"):
        preflight = api.send("OPTIONS", path, headers={
            "origin": "https://app.example", "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-tidebase-worker"})
        assert preflight.status == 200, preflight
        assert "connection" not in preflight.headers  # the browser goes on to use it
        assert preflight.headers["access-control-allow-origin"] == origin
        assert {"GET", "POST", "PUT", "PATCH", "DELETE"} <= set(
            preflight.headers["access-control-allow-methods"].split(", "))
        allowed = preflight.headers["access-control-allow-headers"].split(", ")
        assert {"authorization", "content-type", "x-tidebase-worker", "last-event-id"} <= set(allowed)
    for answer in (api.get("/health"), api.get("/runs"), api.get("/nothing", headers={"authorization": "Bearer key"})):
        assert answer.headers["access-control-allow-origin"] == origin


def test_health_tells_of_the_database_and_the_version(api: Api) -> None:
    answer = api.get("/health")
    assert answer.status == 200
    assert answer.json["ok"] is True
    assert isinstance(answer.json["database"], str)
    assert isinstance(answer.json["version"], str)


def test_a_request_that_comes_before_the_schema_was_looked_at_waits_for_that(api: Api, server: LocalServer) -> None:
    server.prepared.clear()
    looked_at = threading.Timer(0.2, server.prepared.set)
    looked_at.start()
    assert api.get("/runs").status == 200
    looked_at.join()


def test_until_the_database_was_looked_at_all_but_health_is_to_be_sent_again(api: Api, server: LocalServer) -> None:
    server.prepared.clear()
    for answer in (api.get("/runs"), api.post("/runs/w"), api.post("/queues/claim", {"queues": ["q"]})):
        refused(answer, 503, "database_unavailable")
        assert answer.headers["retry-after"] == "1"
    health = api.get("/health")
    assert (health.status, health.json["ok"]) == (503, False)
    server.prepared.set()
    assert api.get("/runs").status == 200
