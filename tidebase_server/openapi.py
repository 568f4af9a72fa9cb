"""Builds the document of /openapi.json from the server's own code.

Paths and methods come from the Flask app, bodies from the marshmallow schemas that the routes parse. The rest comes
from the routes' docstrings. Each says what its route does, then lists query parameters (?) and headers (@) and, from
200 on, the answers: each a status with the shape of its JSON, or with its error codes.

    What it does.  ?waitMs:0..25000=0 (explained) @a-header  200 {run, created}, 404, 409 run_cancelled, lease_lost.

How a shape is written, there and in OBJECTS below:

    {a, b}       an object with these keys        a?         a key, or a type, that may be null
    [a]          a list                           ~a         a key that may be absent
    a or b       one of these shapes              ...run     all keys of that object
    a:int        a key with the type after the colon: a name, low..high, or words as x|y|z
    a=word       a key that holds this word

The type of a key without a colon goes by its name: see kind_of.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import flask
import marshmallow
import msgspec
from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin

from . import bodies
from .bodies import camel

Schema = dict[str, Any]

# ------------------------------------------------------------------------------
# Shapes: the objects in answers, and the types in them. Every key is always there, but for those marked ~.
# ------------------------------------------------------------------------------
OBJECTS = {
    "run": """{id, workflowName, input, metadata, status:runState, result, error, recoveryWebhook?, leaseOwner?,
        leaseExpiresAt?, attempt, queue?, dedupeKey?, priority, runAt?, maxAttempts, deadlineAt?, cancelRequestedAt?,
        cancelledAt?, cancelReason?, cancelActor?, failureClass?, createdAt, updatedAt, completedAt?,
        waitingFor:object?, stalled:bool}""",
    "step": """{id, runId, name, inputHash, input, options, resumeContract, status:stepState, output, error,
        leaseOwner?, leaseExpiresAt?, attempt, startedAt?, completedAt?, createdAt, updatedAt}""",
    "resumeContract": """{sideEffects:[any], idempotencyKey?, replay:auto|manual|never, checkpointInvariant:any,
        verifiedBy:any, credentials:[any]}""",
    "lightContract": "{...resumeContract, ~payloadOmitted:bool}",
    "checkpoint": "{name, inputHash, output, copied, completedAt}",
    "heldRun": "{id, status:runState, leaseOwner?, leaseExpiresAt?, updatedAt}",
    "briefRun": "{id, status:completed|failed|cancelled, ~payloadOmitted:bool}",
    "briefStep": "{id, name, status:completed|failed_retryable|manual_review|failed, attempt, ~payloadOmitted:bool}",
    "claimedRun": "{...run, ~checkpoints, ~checkpointsTruncated}",
    "enqueuedRun": "{...run, deduplicated, ~metadata:object?, ~payloadOmitted:bool}",
    "event": "{id:int, runId, seq, type, payload, createdAt}",
    "gate": """{id, runId, name, prompt, data, status:gateState, decision:gateDecision?, actor?, decisionPayload,
        capability, channels:[sentChannel], resolveToken?, reviewUrl?, expiresAt?, createdAt, updatedAt,
        resolvedAt?}""",
    "publicGate": """{id, runId, name, prompt, data, status:gateState, decision:gateDecision?, actor?, capability,
        expiresAt?, resolveUrl, resolveToken?, ~reviewUrl?}""",
    "signal": "{id, runId, name, n:int, payload, timedOut, createdAt}",
    "state": "{runId, value, version, updatedAt}",
    "stateStream": """{id, runId, name, targetType, targetId, currentVersion, currentValue, metadata, createdAt,
        updatedAt}""",
    "stateVersion": """{id, streamId, runId, stepId?, version, value, patch, label?, reason?,
        importance:versionImportance, metadata, createdBy?, createdAt}""",
    "usage": """{id, runId, stepId?, kind, provider?, model?, label?, quantity?, unit?, inputTokens?, outputTokens?,
        totalTokens?, costUsd?, metadata, createdAt}""",
    "usageGroup": "{~model?, ~workflow, ~day, entries, runs:int, inputTokens, outputTokens, totalTokens, costUsd}",
    "runEdge": "{id, parentRunId, childRunId, name, edgeType, metadata, createdAt}",
    "recoveryAttempt": """{id, runId, reason, webhookUrl, status:deliveryState, httpStatus?, responseBody?, errorText?,
        createdAt, completedAt?, attempts, nextAttemptAt?}""",
    "sentChannel": "{type, url, events:[string]}",
    "channel": "{id, runId, type, config:{url, secret:null}, events:[string], createdAt}",
    "channelDelivery": """{id, runId, channelId, gateId?, eventType, payload, status:deliveryState, httpStatus?,
        responseBody?, errorText?, createdAt, completedAt?, attempts, nextAttemptAt?}""",
    "queueConfig": "{name, concurrency?, ratePerMinute?, invokeUrl?, paused}",
    "queueCounts": "{name, queued, running, waiting, failed, completed, cancelled, oldestReadyMs?, config:queueConfig}",
    "schedule": """{name, cron, timezone, workflowName, input, queue, maxAttempts, enabled, nextRunAt?, lastEnqueuedAt?,
        createdAt, updatedAt}""",
    "runDetail": """{~run:shownRun, ~steps, ~state?, ~stateStreams, ~stateVersions, ~runEdges, ~childRuns:[childRun],
        ~recoveryAttempts, ~channels, ~channelDeliveries:[channelDelivery], ~gates, ~usage:[usage], ~events,
        ~truncated}""",
    "truncated": """{~steps:cutAfter, ~stateVersions:cutAfterId, ~events:cutAfter, ~channelDeliveries:cutBefore,
        ~recoveryAttempts:cutBefore, ~childRuns:cutAfterId, ~gates:cutAfterId, ~usage:cutAfterId, ~channels:cutAfterId,
        ~stateStreams:cutAfterId, ~runEdges:cutAfterId}""",
    "cutAfter": "{after:int?}",
    "cutBefore": "{before:int?}",
    "cutAfterId": "{after:string?}",
    "shownRun": "{...run, ~why?, ~whyDetail?}",
    "listedRun": "{...shownRun, ~metadata:object?, ~payloadOmitted:bool}",
    "childRun": "{...run, ~metadata:object?, ~payloadOmitted:bool}",
    "listedStateVersion": "{...stateVersion, ~metadata:object?, ~payloadOmitted:bool}",
    "listedSchedule": "{...schedule, ~payloadOmitted:bool}",
    "lightRun": """{id, workflowName, status:runState, queue?, priority, attempt, maxAttempts, dedupeKey?, createdAt,
        updatedAt, completedAt?, runAt?, deadlineAt?, leaseOwner?, leaseExpiresAt?, failureClass?, stalled:bool,
        cancelReason?, cancelActor?, parentRunId?, metadata:object?, metadataOmitted:bool, error:briefError?,
        durationMs:int?, eventSeq:int, why?, whyDetail?, version:string}""",
    "briefError": "{name?, message?}",
    "whyDetail": """{kind:whyKind, line, ~since:time?, ~until:time?, ~worker:string?, ~heartbeatAt, ~step:string?,
        ~stepSince:time?, ~queue?, ~concurrency,
        ~runs:[string], ~holders:int, ~ratePerMinute, ~attempt, ~maxAttempts, ~error:string?, ~gateId, ~gate:string,
        ~prompt, ~signal:string, ~n:int, ~live:int, ~total:int, ~lastAskedAt?, ~running:int, ~workflowName}""",
    "count": "{count:int, more}",
    "bulkResult": "{id, ok, status?, code?, error:string?}",
    "rerunPlan": """{runId, runStatus, safe:bool?, verdict, counts:{replays:int, runs:int, runs_again:int,
        stops_for_review:int, never:int}, blocking:[string], steps:[plannedStep], stepsTruncated:bool,
        actions:[retry|recover|review|fork|cancel]}""",
    "plannedStep": """{id, name, position:int, status:stepState, attempt,
        plan:replays|runs|runs_again|stops_for_review|never, reason}""",
    "lightStep": """{id, name, position:int, status:stepState, attempt, startedAt?, completedAt?, createdAt, updatedAt,
        leaseOwner?, leaseExpiresAt?, inputHash, resumeContract:lightContract, reviewed?, copied, error:briefError?,
        inputBytes:int?, outputBytes:int?, errorBytes:int?, optionsBytes:int?}""",
    "lightEvent": """{id:int, runId, seq, type, createdAt, payload, payloadBytes:int, payloadOmitted:bool, stepId?,
        name?, attempt:int?}""",
    "lightStateVersion": """{id, streamId, streamName, runId, stepId?, version, label?, reason?,
        importance:versionImportance, createdBy?, createdAt, bytes:int, patchBytes:int?}""",
    "lightDelivery": """{id, runId, kind:recovery|push|channel, eventType, reason?, url, gateId?, channelId?,
        status:deliveryState, attempts, nextAttemptAt?, httpStatus?, errorText?, createdAt, completedAt?,
        payloadBytes:int?, responseBytes:int?}""",
    "lightSignal": "{id, runId, name, n:int, timedOut, createdAt, payload, payloadBytes:int?, payloadOmitted:bool}",
    "lightUsage": """{id, runId, stepId?, stepName?, kind, provider?, model?, label?, quantity?, unit?, inputTokens?,
        outputTokens?, totalTokens?, costUsd?, createdAt}""",
    "treeRun": """{id, parentRunId?, name?, edgeType?, depth:int, workflowName, status, createdAt, startedAt?,
        completedAt?, failureClass?, why?}""",
    "summedCost": "{costUsd, inputTokens, outputTokens, totalTokens, entries}",
    "runHead": "{id, workflowName, status, queue?, attempt, createdAt}",
    "runSummary": """{run:summaryRun, counts:{steps:int, stepsByStatus:object, events:int, gates:int, gatesPending:int,
        children:int, childrenLive:int, signals:int, deliveries:int, stateVersions:int, usage:int},
        cost:{own:summedCost, subtree:{...summedCost, runs:int, truncated:bool}}, durationMs:int, state:{version,
        bytes:int, updatedAt}?, parent:{id, name}?}""",
    "summaryRun": """{...lightRun, hasRecoveryWebhook:bool, inputBytes:int, resultBytes:int?, errorBytes:int?,
        metadataBytes:int, cancelRequestedAt?, cancelledAt?, startedAt?, forkedFrom?, schedule:string?}""",
    "approval": """{kind:gate|review, since:time, run:runHead, gate:askedGate?, step:lightStep?, context:{steps:[{name,
        status, startedAt?, completedAt?}], stepsCompleted:int, state:any, stateOmitted:bool, stateVersion:int?,
        costUsd, totalTokens}}""",
    "askedGate": """{id, runId, name, prompt, data, dataOmitted:bool, status:gateState, decision:gateDecision?, actor?,
        decisionPayload, capability, channels:[sentChannel], resolveToken?, reviewUrl?, expiresAt?, createdAt,
        updatedAt, resolvedAt?}""",
    "seenGate": """{id, runId, name, prompt, data, status:gateState, decision:gateDecision?, actor?, decisionPayload,
        capability, expiresAt?, createdAt, resolvedAt?, workflowName, runStatus}""",
    "worker": """{id?, queues:[string]?, workflows:[string]?, since:time, lastAskedAt?, lastHeardAt, running:int,
        runs:[{id, workflowName, queue?, heartbeatAt}]}""",
    "error": """{error:string, code, ~issues:[{path, message}], ~run, ~step, ~gate, ~state?, ~leaseOwner,
        ~expectedInputHash, ~actualInputHash, ~runId, ~workflowName, ~runStatus, ~count:int, ~more,
        ~payloadOmitted:bool}""",
    "refusal": "{...error, status:int}",
    "heldRefusal": "{error:string, code, ~run:heldRun, status:int}",
}

ENUMS = {
    "runState": "pending|queued|running|waiting|completed|failed|cancelled",
    "stepState": "running|completed|failed_retryable|manual_review|failed",
    "gateState": "pending|approved|rejected|canceled",
    "gateDecision": "approved|rejected|canceled",
    "deliveryState": "pending|delivered|failed",
    "versionImportance": "transient|normal|checkpoint|milestone",
    "whyKind": "running|queue_capped|rate_limited|paused|retry|scheduled|offered|gate|signal|sleep|children"
               "|lease_expired|nobody_asks|workflow_unknown|ready|pending",
    "payloadKind": "input|result|error|metadata|step.input|step.output|step.error|step.options|event|gate.data"
                   "|gate.capability|gate.decisionPayload|state|state.patch|signal|delivery|delivery.response"
                   "|usage.metadata|edge.metadata",
}
# All other types, among them the keys whose name says what they hold.
BY_NAME: dict[str, Schema] = {
    key: schema for keys, schema in (
        ("input result error output data payload decisionPayload capability value patch currentValue any", {}),
        ("metadata options object", {"type": "object"}),
        ("attempt attempts maxAttempts priority seq version currentVersion httpStatus concurrency ratePerMinute queued"
         " running waiting failed completed cancelled oldestReadyMs inputTokens outputTokens totalTokens entries int",
         {"type": "integer"}),
        ("quantity costUsd number", {"type": "number"}),
        ("created deduplicated requeued enabled checkpointsTruncated copied ok ready timedOut paused more bool",
         {"type": "boolean"}),
        ("time", {"type": "string", "format": "date-time"}),
        ("null", {"type": "null"}),
    ) for key in keys.split()
} | {name: {"type": "string", "enum": words.split("|")} for name, words in ENUMS.items()}
TOKEN = re.compile(r"\.\.\.|[][{}:=?~]|[\w.|-]+")


def kind_of(name: str) -> Schema:
    """The schema of a type or, for a key without one, of the type that its name says: one of BY_NAME or OBJECTS, a list
    of one of OBJECTS for its plural, a time for a name that ends with At; else a string."""
    if name in BY_NAME:
        return dict(BY_NAME[name])
    if name in OBJECTS:
        return {"$ref": f"#/components/schemas/{name}"}
    if name.removesuffix("s") in OBJECTS:
        return {"type": "array", "items": kind_of(name.removesuffix("s"))}
    if between := re.fullmatch(r"([0-9]+)\.\.([0-9]+)", name):
        return {"type": "integer", "minimum": int(between[1]), "maximum": int(between[2])}
    if "|" in name:
        return {"type": "string", "enum": name.split("|")}
    return dict(BY_NAME["time"]) if name.endswith("At") else {"type": "string"}


def or_null(schema: Schema) -> Schema:
    """The schema that allows null beside what this one allows."""
    if "enum" in schema:
        return schema | {"type": [schema["type"], "null"], "enum": [*schema["enum"], None]}
    if "type" in schema:
        return schema | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]} if schema else schema


def shape(text: str) -> Schema:
    """The JSON schema of a shape; the head of this file says how one is written."""
    tokens = TOKEN.findall(text)

    def take(token: str) -> bool:
        if tokens and tokens[0] == token:
            tokens.pop(0)
            return True
        return False

    def alternatives() -> Schema:
        found = [one()]
        while take("or"):
            found.append(one())
        schema = found[0] if len(found) == 1 else {"anyOf": found}
        return or_null(schema) if take("?") else schema

    def one() -> Schema:
        if take("["):
            schema: Schema = {"type": "array", "items": alternatives()}
            assert take("]"), text
            return schema
        return members() if take("{") else kind_of(tokens.pop(0))

    def members() -> Schema:
        properties: dict[str, Schema] = {}
        required: list[str] = []
        while not take("}"):
            if take("..."):
                included = shape(OBJECTS[tokens.pop(0)])
                properties |= included["properties"]
                required += included.get("required", [])
                continue
            may_be_absent, key = take("~"), tokens.pop(0)
            may_be_null = take("?")
            schema = {"const": tokens.pop(0)} if take("=") else alternatives() if take(":") else kind_of(key)
            properties[key] = or_null(schema) if may_be_null else schema
            required += [] if may_be_absent else [key]
        return {"type": "object", "properties": properties} | ({"required": required} if required else {})

    schema = alternatives()
    assert not tokens, text
    return schema


# ------------------------------------------------------------------------------
# The document: the app's routes, their docstrings and the schemas that they parse, turned into OpenAPI.
# ------------------------------------------------------------------------------
GROUPS = {  # a route belongs to the last group whose pattern its path has, and to Server if there is none
    "Runs": ("/runs|/heartbeats", "One execution of a workflow each: created, leased, ended."),
    "Steps": ("/steps|/writes", "Named pieces of a run: begun under a lease, recorded once, replayed from then on."),
    "Gates": ("/gates", "Questions to a person, each decided once by whoever holds its token."),
    "State and snapshots": ("/state|/snapshots", "What a run shows of itself while it works, version by version."),
    "Usage": ("/usage", "The ledger of what runs cost."),
    "Events": ("/events", "What happened to a run, numbered without gap."),
    "Waiting": ("/wait|/signals", "A run that waits for something holds no worker."),
    "Queues": ("/queues", "A job is a run: put in once per dedupe key, claimed by one worker."),
    "Studio": ("/counts|/changes|/bulk|/rerun|/summary|/payload|/tree|/deliveries|/approvals|/look|/minutes|/workers"
               "|/session", "What the page at /studio asks: lists, counts and runs in pieces."),
    "Schedules": ("/schedules", "Runs that the clock enqueues."),
    "Server": ("$.", "About this server itself."),
}
INTRODUCTION = (
    "JSON over HTTP. Times are ISO-8601 in UTC. A key that a body does not know is ignored, and so should you ignore a "
    "key that you do not know. Optional is not nullable: null is refused where the type has none. Path parts are "
    "percent-encoded, / included. Every write may be sent again when its answer was lost.")
RUN_TOKEN = (
    "Opens the events of one run, to read, until it expires. The client makes it, without a request (`runs.token`): "
    "EXPIRY in whole seconds since 1970; MAC the HMAC-SHA256 of `tidebase-run-token.v1.EXPIRY.RUN_ID`, keyed with the "
    "API key or the read key, as base64url without padding.")
REFUSED = {  # what routes may answer beside what their docstrings list
    "400": ("invalid_request", "A value has the wrong form: issues says which, in the body, the path or the query."),
    "401": ("unauthorized", "The API key is missing or wrong."),
    "403": ("foreign_origin", "A web page asks that is not this server's own; or, without a key, the Host is not."),
    "413": ("body_too_large", "The body is larger than TIDEBASE_MAX_BODY allows."),
    "415": ("unsupported_media_type", "The body is not application/json, or has a Content-Encoding."),
    "503": ("database_unavailable", "PostgreSQL is away or busy: send this again, after Retry-After seconds."),
}
MEDIA = {"stream": "text/event-stream", "page": "text/html", "text": "text/plain", "csv": "text/csv"}
PARAMETER = re.compile(r" ([?@])([\w.-]+)(?::([\w.|]+))?(?:=([\w.-]+))?(?: \(([^)]*)\))?(?= |$)")
RULE_PART = re.compile(r"<part:(\w+)>")
PART: Schema = {"type": "string", "minLength": 1, "maxLength": 512, "pattern": "^[^\\u0000]*$"}


def as_given(schema: Schema, text: str) -> Any:
    """The default of a parameter, from the text in a docstring."""
    return int(text) if schema["type"] == "integer" else text


def path_of(rule: Any) -> tuple[str, list[str]]:
    """A route's path as OpenAPI writes it, and the names of its parts. Routes whose paths differ only in such names are
    one path, whose part then has all of the names."""
    alike = [RULE_PART.findall(other.rule) for other in rule.map.iter_rules()
             if RULE_PART.sub("", other.rule) == RULE_PART.sub("", rule.rule)]
    names = [camel("_or_".join(dict.fromkeys(at))) for at in zip(*alike, strict=True)]
    return RULE_PART.sub("{{{}}}", rule.rule).format(*names), names


def parameters_of(rule: Any, head: str) -> list[Schema]:
    """The parts of a route's path, and the parameters and headers that its docstring lists."""
    found = [{"in": "path", "name": name, "required": True, "schema": PART}
             | ({} if name == camel(own) else {"description": camel(own)})
             for name, own in zip(path_of(rule)[1], RULE_PART.findall(rule.rule), strict=True)]
    for mark, name, kind, default, description in PARAMETER.findall(head):
        schema = kind_of(kind or "string")
        if default:
            schema["default"] = as_given(schema, default)
        found.append({"in": "query" if mark == "?" else "header", "name": name, "schema": schema}
                     | ({"description": description} if description else {}))
    return found


def refusal(codes: list[str], words: str) -> Schema:
    """The response that is an error with one of these codes."""
    one_code = {"type": "object", "properties": {"code": {"enum": codes}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/error"}, one_code]}
    return {"description": words, "content": {"application/json": {"schema": schema}}}


def answers_of(tail: str) -> dict[str, Schema]:
    """The responses that the end of a docstring lists: `200 {run}, 404, 409 lease_lost, run_cancelled.`"""
    answers: dict[str, Schema] = {}
    for status, text in re.findall(r"(\d{3})\b(.*?)(?=, \d{3}\b|$)", tail.rstrip(".")):
        text = text.strip()
        if status == "200" or text.startswith("{"):
            answers[status] = {"description": text or "the answer", "content": {}}
            kinds = re.split(r" or (?=[{[a-z])", text)
            for media in [kind for kind in kinds if kind in MEDIA]:
                # Tools disagree on what the schema of a stream describes, so there is none.
                answers[status]["content"][MEDIA[media]] = {"schema": {} if media == "stream" else {"type": "string"}}
            if shapes := [kind for kind in kinds if kind not in MEDIA]:
                answers[status]["content"]["application/json"] = {"schema": shape(" or ".join(shapes))}
        else:
            codes = [piece.split()[0] for piece in text.split(",") if piece] or ["not_found"]
            answers[status] = refusal(codes, text or "not_found")
            if status in REFUSED:
                answers[status] = refusal([REFUSED[status][0], *codes], f"{REFUSED[status][0]}, {text}")
    return answers


def bodies_of(view: Callable[..., Any]) -> list[type[marshmallow.Schema]]:
    """The schemas of the bodies that a route parses: those that its code names. A schema that others inherit from does
    not count beside them."""
    code: Any = inspect.unwrap(view)
    named = [code.__globals__.get(name, getattr(bodies, name, None)) for name in code.__code__.co_names]
    kinds = [kind for kind in named if isinstance(kind, type) and issubclass(kind, marshmallow.Schema)
             and kind._declared_fields]
    return [kind for kind in kinds if not any(other is not kind and issubclass(kind, other) for other in kinds)]


def property_of(converter: Any, field: Any, ret: Schema) -> Schema:
    """What apispec does not find out about a field: the `json_schema` of its class, and defaults that are JSON text."""
    known: Schema = {bound: int(ret[bound]) for bound in ("minimum", "maximum") if bound in ret}  # Decimals among them
    known |= getattr(field, "json_schema", {})
    if "pattern" in ret:
        known["pattern"] = "^" + ret["pattern"].removesuffix(r"\Z") + "$"
    if nested := getattr(field, "shape", None):
        known = {"anyOf": [converter.resolve_nested_schema(nested), {"type": "null"}]}
        ret.pop("type", None)
    if kinds := getattr(field, "kinds", None):
        known = {"anyOf": [converter.resolve_nested_schema(kind) for kind in kinds.values()]}
        ret.pop("$ref", None)
    default = None if field.load_default is marshmallow.missing else field.load_default
    if default is None:
        ret.pop("default", None)  # the field may be absent, which does not mean that it may be null
        return known
    if callable(default):
        default = default()
        known["default"] = default
    if isinstance(default, msgspec.Raw):
        known["default"] = json.loads(bytes(default))
    return known


def document(app: flask.Flask, version: str, without_key: set[str], pages: set[str], limits: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the app.

    :param without_key: the endpoints that answer without the API key.
    :param pages: the endpoints that are left out, since they are pages for people.
    :param limits: a text on what holds for the bodies and queries of all routes.
    """
    marshmallows = MarshmallowPlugin(schema_name_resolver=lambda schema: (
        schema if isinstance(schema, type) else type(schema)).__name__)
    spec = APISpec("Tidebase", version, "3.1.0", plugins=[marshmallows],
                   info={"description": f"{INTRODUCTION} {limits}"},
                   tags=[{"name": group, "description": text} for group, (_, text) in GROUPS.items()])
    assert marshmallows.converter
    marshmallows.converter.add_attribute_function(property_of)  # type: ignore[no-untyped-call]
    for name, text in OBJECTS.items():
        spec.components.schema(name, shape(text))
    for code, words in REFUSED.values():
        spec.components.response(code, refusal([code], words))
    spec.components.security_scheme("key", {"type": "http", "scheme": "bearer",
                                            "description": "The API key; for reading, the read key, too."})
    spec.components.security_scheme("runToken", {
        "type": "http", "scheme": "bearer", "bearerFormat": "v1.EXPIRY.MAC", "description": RUN_TOKEN})
    spec.components.security_scheme("token", {
        "type": "apiKey", "in": "query", "name": "token",
        "description": "A run token, or a key, for browsers' streams, which send no headers."})
    for rule in app.url_map.iter_rules():
        if rule.endpoint in pages:
            continue
        view = app.view_functions[rule.endpoint]
        head, _, tail = " ".join((view.__doc__ or "").split()).partition(" 200")
        first = PARAMETER.search(head)
        answers, bodies = answers_of("200" + tail), bodies_of(view)
        parameters = parameters_of(rule, head)
        path, _ = path_of(rule)
        operation: dict[str, Any] = {
            "operationId": rule.endpoint.rpartition(".")[2],
            "summary": (head[:first.start()] if first else head).strip(),
            "tags": [*(group for group, (pattern, _) in GROUPS.items() if re.search(pattern, path)), "Server"][-2:][:1],
            "parameters": parameters,
        }
        also = [("400", bool(parameters or bodies)), ("401", rule.endpoint not in without_key), ("403", True),
                ("413", bool(bodies)), ("415", bool(bodies)),
                ("503", rule.endpoint not in without_key or bool(bodies))]
        operation["responses"] = dict(sorted((answers | {
            status: REFUSED[status][0] for status, applies in also if applies and status not in answers}).items()))
        if bodies:
            required = all(any(field.required for field in kind().fields.values()) for kind in bodies)
            content = {"schema": bodies[0] if len(bodies) == 1 else {"anyOf": bodies}}
            operation["requestBody"] = {"required": required, "content": {"application/json": content}}
        streams = MEDIA["stream"] in operation["responses"]["200"]["content"]
        operation["security"] = [] if rule.endpoint in without_key else [
            {"key": []}, *([{"runToken": []}, {"token": []}] if streams else [])]
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            spec.path(path, operations={method.lower(): operation})
    return spec.to_dict()
