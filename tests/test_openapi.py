"""/openapi.json tells the truth: every route is in it, every answer fits what it says, and bad data is refused.

schemathesis makes the requests, from the document alone, against a real server that has something of everything.
"""

from __future__ import annotations

import datetime
import functools
import http.client
import io
import itertools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
import urllib3
from conftest import FOREVER_MS, LEASE_MS, Api, LocalServer, ServerProcess, eventually, refused

import tidebase
from tidebase_server import openapi

KEY = "the key"
EXAMPLES = 3  # per route and kind of data: what the coverage phase adds to it is the same every time
SEED = 20260612
NOTHING_LEARNED = {"extra-data-sources": {"responses": False}}
WITHOUT_NUL = "^[^\\u0000]*$"


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    return api.get("/openapi.json").json


def test_every_route_is_in_the_document_and_nothing_else(document: dict[str, Any]) -> None:
    routes = {(method, re.sub(r"<part:\w+>", "{}", rule.rule)) for rule in tidebase.app.url_map.iter_rules()
              if rule.endpoint not in tidebase.PAGE_VIEWS for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}}
    told = [(method.upper(), re.sub(r"{\w+}", "{}", path))
            for path, operations in document["paths"].items() for method in operations]
    assert sorted(told) == sorted(routes)


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    import openapi_spec_validator  # here, since only one of the processes that run the tests needs it

    openapi_spec_validator.validate(document)


def test_every_object_is_told_with_all_its_keys(document: dict[str, Any]) -> None:
    """A docstring's typing error would be a string, or a key that is called like an object but is none."""
    for name, schema in document["components"]["schemas"].items():
        assert schema["type"] == "object", name
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert not re.search(r"\d{3}|[?@]\w", operation["summary"]), path
            assert operation["responses"]["200"]["content"], path


def test_it_is_readable_without_the_key_and_without_the_database(start_server: Callable[..., LocalServer]) -> None:
    server = start_server(TIDEBASE_API_KEY=KEY)
    api = Api(server.url)
    refused(api.get("/runs"), 401, "unauthorized")
    server.prepared.clear()
    try:
        assert api.get("/openapi.json").status == 200
    finally:
        server.prepared.set()


def test_a_get_takes_the_parameters_that_it_tells_and_refuses_all_others(api: Api, document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        if "get" in operations:
            url = re.sub(r"{\w+}", "x", path)
            unknown = api.get(f"{url}?nonsense=1")
            if path in ("/health", "/openapi.json"):
                assert unknown.status == 200
            else:
                body = refused(unknown, 400, "invalid_request")
                assert [issue["path"] for issue in body["issues"]] == ["nonsense"], path
            for told in operations["get"]["parameters"]:
                if told["in"] == "query":
                    answer = api.get(f"{url}?{told['name']}=%00")
                    assert "must not contain NUL" in answer.text, "it is looked at"
                    answer = api.get(f"{url}?{told['name']}=1")
                    assert "is not a parameter" not in answer.text, (path, told["name"])


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The method, a path and the fields of each kind of body that a route takes."""
    kinds = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if body := operation.get("requestBody"):
                schema = body["content"]["application/json"]["schema"]
                for one in schema.get("anyOf", [schema]):
                    if "$ref" in one:
                        fields = kinds[one["$ref"].split("/")[-1]]["properties"]
                        yield method.upper(), re.sub(r"{\w+}", "x", path), fields


def test_no_text_field_of_a_body_takes_nul(api: Api, document: dict[str, Any]) -> None:
    for method, path, fields in bodies(document):
        texts = {name for name, field in fields.items() if field.get("pattern") == WITHOUT_NUL}
        if texts:
            issues = refused(api.send(method, path, dict.fromkeys(texts, "\0")), 400, "invalid_request")["issues"]
            assert texts <= {issue["path"] for issue in issues if "NUL" in issue["message"]}, path


def test_every_field_of_a_body_is_checked_on_each_route_that_takes_it(api: Api, document: dict[str, Any]) -> None:
    checked = 0
    for method, path, fields in bodies(document):
        wrong = {name: 5 if field.get("type", "object") in ("object", ["object", "null"]) else {}
                 for name, field in fields.items() if {"type", "$ref", "anyOf"} & field.keys()}
        if wrong:
            issues = refused(api.send(method, path, wrong), 400, "invalid_request")["issues"]
            assert wrong.keys() <= {issue["path"] for issue in issues}, path
        checked += len(wrong)
    assert checked > 100


def test_all_limits_are_told_in_the_schemas_and_in_the_words(document: dict[str, Any]) -> None:
    def of(kind: str, key: str, *limits: str) -> list[Any]:
        schema = document["components"]["schemas"][kind]["properties"][key]
        return [schema.get(limit) for limit in limits]

    century = 36_525 * 86_400_000
    for kind in ("EnqueueBody", "ChildBody"):
        assert of(kind, "priority", "minimum", "maximum") == [-2**31, 2**31 - 1]
        assert of(kind, "maxAttempts", "minimum", "maximum") == [1, 1_000_000]
        assert of(kind, "channels", "maxItems") == [32]
        assert of(kind, "workflowName", "minLength", "maxLength") == [1, 512]
        assert of(kind, "deadlineMs", "maximum") == [century]
    assert of("EnqueueBody", "delayMs", "minimum", "maximum") == [0, century]
    assert of("CreateRunBody", "channels", "maxItems") == [32]
    assert of("BeginGateBody", "channels", "maxItems") == [8]
    assert of("BeginGateBody", "timeoutMs", "maximum") == [century]
    assert of("ClaimBody", "queues", "minItems", "maxItems") == [1, 1000]
    assert of("ScheduleBody", "maxAttempts", "maximum") == [1_000_000]
    words = document["info"]["description"]
    for limit in ("512 characters", "32 bits", "1 to 1,000,000", "100 years", "25 seconds", "1,000 queues",
                  "16 metadata filters", "32 channels", "a gate 8", "10,000 runs", "1,000 writes"):
        assert limit in words, limit


def test_the_routes_tell_what_opens_them_and_run_tokens_are_described(document: dict[str, Any]) -> None:
    schemes = document["components"]["securitySchemes"]
    assert "HMAC-SHA256 of `tidebase-run-token.v1.EXPIRY.RUN_ID`" in schemes["runToken"]["description"]
    assert {path for path, operations in document["paths"].items() for operation in operations.values()
            if operation["security"] not in ([], [{"key": []}])} == {"/runs/{runId}/events"}
    assert document["paths"]["/runs/{runId}/events"]["get"]["security"] == [
        {"key": []}, {"runToken": []}, {"token": []}]
    for operations in document["paths"].values():
        for operation in operations.values():
            assert {name for one in operation["security"] for name in one} <= schemes.keys()


def seed(api: Api) -> dict[str, list[str]]:
    """Something of everything.  :returns: the ids by the path parameters' names."""
    channel = {"type": "webhook", "url": "http://127.0.0.1:9/hook", "secret": "s"}
    busy = api.create("report", channels=[channel], recoveryWebhook="http://127.0.0.1:9/resume", metadata={"a": 1})
    api.begin(busy, "owner")["run"]
    done = api.do_step(busy, "fetch", "owner", {"rows": 3}, options={"sideEffects": ["read"]})
    running = api.begin_step(busy, "write", "owner")["step"]["id"]
    doubtful = api.begin_step(busy, "pay", "owner", options={"replay": "manual"})["step"]["id"]
    api.fail_step(busy, doubtful, "owner", resumeDecision="manual_review")["step"]
    gate = api.post(f"/runs/{busy}/gates/begin", {"name": "ok", "prompt": "Ship?", "channels": [channel]})["gate"]
    decided = api.post(f"/runs/{busy}/gates/begin", {"name": "old", "prompt": "Go?"})["gate"]
    api.post(f"/runs/{busy}/gates/{decided['id']}/resolve", {"token": decided["resolveToken"], "decision": "approved"})
    api.put(f"/runs/{busy}/state", {"value": {"progress": 1}, "label": "start"})["state"]
    api.post(f"/runs/{busy}/snapshots", {"label": "draft", "state": [1]})["snapshot"]
    api.post(f"/runs/{busy}/usage", {"model": "m", "inputTokens": 5, "costUsd": 0.25})["usage"]
    api.post(f"/runs/{busy}/children", {"name": "part", "workflowName": "report"})["run"]
    api.post(f"/runs/{busy}/signals", {"name": "paid", "payload": 1})["signal"]
    api.post(f"/runs/{busy}/recover")["recoveryAttempt"]
    queued, ended, cancelled = api.enqueue("default", dedupeKey="k"), api.create(), api.create()
    api.complete(ended, result={"x": None})["run"]
    api.post(f"/runs/{cancelled}/cancel", {"reason": "no"})["run"]
    api.put("/queues/default/config", {"concurrency": 100, "ratePerMinute": 1000})["config"]
    api.put("/schedules/nightly", {"cron": "0 3 * * *", "workflowName": "report"})["schedule"]
    told = api.create(channels=[{"type": "webhook", "url": f"http://{api.address}/health"}])  # which refuses a POST
    api.post(f"/runs/{told}/cancel")["run"]
    sent = eventually(lambda: [d["id"] for d in api.detail(told)["channelDeliveries"] if d["status"] == "failed"])
    runs = [busy, busy, queued, ended, cancelled]
    return {"runId": runs, "workflowNameOrRunId": runs, "ended": [ended], "stepId": [running, done, doubtful],
            "gateId": [gate["id"], decided["id"]], "queue": ["default"], "name": ["nightly", "paid"],
            "deliveryId": sent, "told": [told]}


def exact(schema: Any) -> Any:
    """The document with nothing allowed beside what it tells: here, a key more is a defect, too."""
    if isinstance(schema, list):
        return [exact(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # A refusal's codes are told beside the error object, not as an object of their own.
    whole = "properties" in schema and list(schema["properties"]) != ["code"]
    return {key: exact(value) for key, value in schema.items()} | ({"additionalProperties": False} if whole else {})


def sent_by(session: requests.Session, connection: http.client.HTTPConnection, method: str, url: str,
            **options: Any) -> requests.Response:
    """requests.Session.request, by one connection and without proxies, redirects and cookies: a third of its cost."""
    wanted = {name: options[name] for name in ("headers", "data", "json", "params") if name in options}
    prepared = requests.Request(method, url, **wanted).prepare()
    started = time.monotonic()
    try:
        connection.request(method, prepared.path_url, prepared.body, dict(prepared.headers))
        answer = connection.getresponse()
    except ConnectionError:  # the server ends a connection after some refusals
        connection.close()
        connection.request(method, prepared.path_url, prepared.body, dict(prepared.headers))
        answer = connection.getresponse()
    response = requests.Response()
    response.raw = urllib3.HTTPResponse(io.BytesIO(answer.read()), answer.getheaders(), answer.status,
                                        answer.version, reason=answer.reason, preload_content=False)
    response.status_code, response.reason, response.url = answer.status, answer.reason, url
    response.headers = requests.structures.CaseInsensitiveDict(response.raw.headers)
    response.encoding = requests.utils.get_encoding_from_headers(response.headers)
    response.request, response.elapsed = prepared, datetime.timedelta(seconds=time.monotonic() - started)
    return response


def test_answers_fit_the_document_and_bad_data_is_refused(
        request: pytest.FixtureRequest, spawn_server: Callable[..., ServerProcess],
        monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported here, since it takes seconds, and only one of the processes that run the tests needs it.
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.config import SchemathesisConfig
    from schemathesis.engine import Status, events, from_schema

    server = spawn_server(TIDEBASE_API_KEY=KEY, TIDEBASE_LEASE_MS=LEASE_MS, TIDEBASE_RECONCILE_MS=FOREVER_MS)
    api = Api(server.url, key=KEY)
    connection = http.client.HTTPConnection(api.address, timeout=20)
    request.addfinalizer(connection.close)
    monkeypatch.setattr(requests.Session, "request", functools.partialmethod(sent_by, connection))
    document, ids = api.get("/openapi.json").json, seed(api)
    kinds = document["components"]["schemas"]
    kinds |= {name: exact(schema) for name, schema in kinds.items() if name in openapi.OBJECTS}
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"] = exact(operation["responses"])
    # Many runs are of the same form as one, which is asked for thoroughly enough. So is each write and each record of a
    # batch, on its own route: of those in a batch, the fields that must be there are enough.
    many = document["paths"]["/queues/{queue}/enqueue"]["post"]["requestBody"]["content"]["application/json"]
    many["schema"] = {"$ref": "#/components/schemas/EnqueueBody"}
    for batch, key in (("WritesBody", "writes"), ("RecordStepsBody", "records")):
        items = kinds[batch]["properties"][key]["items"]
        for item in items.get("anyOf", [items]):
            one = kinds[item["$ref"].split("/")[-1]]
            one["properties"] = {name: one["properties"][name] for name in one["required"]}
    # To draw a long string by a pattern takes seconds; a test above sends NUL in each.
    for body in kinds.values():
        for field in body["properties"].values():
            if field.get("maxLength", 0) > 1000 and field.get("pattern") == WITHOUT_NUL:
                del field["pattern"]

    schema = schemathesis.openapi.from_dict(document, config=SchemathesisConfig.from_dict({
        "seed": SEED, "base-url": server.url, "workers": 1, "request-timeout": 20,
        "headers": {"Authorization": f"Bearer {KEY}"},
        "generation": {"max-examples": EXAMPLES, "database": "none", "no-shrink": True},
        # Not all that is refused can be told in a schema: a cron expression, NUL inside a value, 5.0 for an integer.
        # And a gate may be called begin, so that GET is allowed where POST begins one.
        "checks": {"positive_data_acceptance": {"enabled": False}, "allow_header_conformance": {"enabled": False}},
        # What answers hold is not learned from: ids are given above, and each run sends the same.
        "phases": {"examples": NOTHING_LEARNED, "coverage": {"unexpected-methods": ["TRACE"], **NOTHING_LEARNED},
                   "fuzzing": NOTHING_LEARNED, "stateful": {"enabled": False}},
        "cache": {"enabled": False},
    }))
    turn = itertools.count()

    def held_run() -> str:
        run = api.enqueue("held")
        api.begin(run, "owner")["run"]
        return run

    def before_call(context: Any, case: Any, kwargs: Any) -> None:
        """Every other request is of something that is there; none waits or streams for long."""
        number, body = next(turn), case.body
        query = case.query = {**(case.query or {})}
        for name in (case.path_parameters or {}) if number % 2 else ():
            if name in ids:
                case.path_parameters[name] = ids[name][number // 2 % len(ids[name])]
        if "/deliveries/" in case.path and number % 2:
            case.path_parameters["runId"] = ids["told"][0]
        if case.method == "DELETE" and case.path.startswith("/runs/"):  # those above are needed
            ended = api.create()
            api.complete(ended)["run"]
            case.path_parameters["workflowNameOrRunId"] = [ended, "nobody"][number % 2]
        if case.path == "/bulk" and isinstance(body, dict) and "filter" in body:
            body["dryRun"] = True
        if case.path.endswith("/run") and number % 2:
            api.put("/schedules/nightly", {"cron": "0 3 * * *", "workflowName": "report"})["schedule"]
            case.path_parameters["name"] = "nightly"
            if isinstance(body, dict):
                body.pop("id", None)  # it may be another workflow's by now
        if case.path == "/changes" and isinstance(body, dict) and number % 2:
            body["query"] = "limit=3"
        if case.path.endswith("/events"):
            query["follow"] = "false"
            case.path_parameters["runId"] = [*ids["ended"], "nobody"][number % 2]
            if number % 4 == 0:
                case.headers["Accept"] = "application/json"
        for holder in (query, body):
            if isinstance(holder, dict) and re.fullmatch(r"[0-9]{1,5}", str(holder.get("waitMs"))):
                holder["waitMs"] = min(int(holder["waitMs"]), 20)
        if isinstance(body, dict) and number % 4 == 1 and case.meta.generation.mode == GenerationMode.POSITIVE:
            # Others may have decided the first one meanwhile, or ended its run. Any body may have a key "token".
            if "gateId" in (case.path_parameters or {}) and "token" in body:
                run = case.path_parameters["runId"] = api.create()
                gate = api.post(f"/runs/{run}/gates/begin", {"name": "ok", "prompt": "Ship?"})["gate"]
                case.path_parameters["gateId"], body["token"] = gate["id"], gate["resolveToken"]
            if "leaseOwner" in body:
                body["leaseOwner"] = "owner"
                if "runId" in (case.path_parameters or {}):  # others may have ended the first one meanwhile
                    case.path_parameters["runId"] = held_run()
            if "stepId" in (case.path_parameters or {}):  # likewise
                run = held_run()
                step = api.begin_step(run, "s", "owner")["step"]["id"]
                if case.path.endswith("/review"):
                    api.fail_step(run, step, "owner", resumeDecision="manual_review")["step"]
                case.path_parameters |= {"runId": run, "stepId": step}
            if "for" in body:
                body["for"] = {"event": "later"}
            if "cron" in body:
                body["cron"] = "0 3 * * *"

    @schema.hook
    def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
        """Blank text for a body counts as none, which is {}."""
        return bool((response.request.body or b"-").strip())

    failures: dict[Any, str] = {}
    answered: dict[str, set[int]] = {}
    schemathesis.hook(before_call)
    request.addfinalizer(lambda: schemathesis.hooks.unregister(before_call))
    for event in from_schema(schema).execute():
        if isinstance(event, (events.NonFatalError, events.FatalError)):
            failures[repr(event)] = str(getattr(event, "value", None) or getattr(event, "exception", None))
        if isinstance(event, events.ScenarioFinished):
            seen = [asked.response.status_code for asked in event.recorder.interactions.values() if asked.response]
            answered.setdefault(str(event.label), set()).update(seen)
            for checks in event.recorder.checks.values():
                for check in checks:
                    if check.status == Status.FAILURE and check.failure_info:
                        info = check.failure_info
                        failures.setdefault((event.label, check.name), f"{info.failure}\n{info.code_sample}")
    assert not failures, "\n\n".join(f"{key}\n{text}" for key, text in failures.items())
    hollow = {label: seen for label, seen in answered.items() if 200 not in seen}
    assert not hollow, f"asked only for what is not there: {hollow}"
