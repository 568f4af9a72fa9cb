"""Bodies: reading JSON, and the schemas of what each may hold."""

from __future__ import annotations

import functools
import json
import re
import urllib.parse
from collections.abc import Callable
from datetime import UTC
from decimal import Decimal
from typing import Any, ClassVar, NamedTuple, NoReturn, cast

import marshmallow
from marshmallow import fields, validate

from .answers import invalid

# ------------------------------------------------------------------------------
# Reading JSON: a body becomes Python values to check, while its payloads stay the text that came.
# ------------------------------------------------------------------------------
MAX_NUMBER = 1000  # characters; a longer number is no number that anybody means, and costs quadratic time


class Json(NamedTuple):
    """A member that is passed on as it came: its value, to check, and its text."""

    value: Any
    text: str


class RawText(str):
    """JSON text that is put into larger JSON as it is (see compose)."""


def compose(value: dict[str, Any]) -> str:
    """The JSON of a dict, its RawText members unparsed."""
    members = [f"{json.dumps(k)}: {v}" for k, v in value.items() if isinstance(v, RawText)]
    rest = json.dumps({k: v for k, v in value.items() if not isinstance(v, RawText)})
    return "{" + ", ".join([rest[1:-1], *members] if len(rest) > 2 else members) + "}"


def _number(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(digits: str) -> Any:
        if len(digits) > MAX_NUMBER:
            raise ValueError(f"a number of {len(digits)} characters")
        return convert(digits)

    return parse


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")  # Python's parser takes NaN and Infinity


_decoder = json.JSONDecoder(parse_int=_number(int), parse_float=_number(float), parse_constant=_no_constant)
# The two halves of the standard decoder that say where a value ends; its stubs leave them out.
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once  # type: ignore[attr-defined]
_scan_string: Callable[[str, int], tuple[str, int]] = json.decoder.scanstring  # type: ignore[attr-defined]
_space = re.compile(r"[ \t\n\r]*").match
_key = re.compile(r'"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*').match  # one without escapes
_comma = re.compile(r"[ \t\n\r]*,[ \t\n\r]*").match


def _skip(text: str, at: int) -> int:
    return _space(text, at).end()  # type: ignore[union-attr]  # it matches always


def _expect(text: str, at: int, allowed: str) -> str:
    if text[at : at + 1] not in tuple(allowed):
        raise ValueError(f"expected {' or '.join(allowed)} at character {at}")
    return text[at]


def _read_key(text: str, at: int) -> tuple[str, int]:
    """The key at `at`, and where its value begins."""
    if usual := _key(text, at):
        return usual[1], usual.end()
    _expect(text, at, '"')
    key, at = _scan_string(text, at + 1)
    at = _skip(text, at)
    _expect(text, at, ":")
    return key, _skip(text, at + 1)


def _read_object(text: str, at: int, schema: Body) -> tuple[dict[str, Any], int]:
    """The object that begins at `at`, and where it ends. Members that the schema keeps as text become Json; lists of
    objects that have a schema of their own are read with it; the last of two equal keys counts, as everywhere."""
    members: dict[str, Any] = {}
    _expect(text, at, "{")
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}" or members:
        key, begin = _read_key(text, at)
        if key in schema.lists and text[begin : begin + 1] == "[":
            members[key], at = _read_list(text, begin, schema.lists[key])
        else:
            value, at = _scan(text, begin)
            members[key] = Json(value, text[begin:at]) if key in schema.texts else value
        comma = _comma(text, at)
        if comma is None:
            at = _skip(text, at)
            _expect(text, at, ",}")
            break
        at = comma.end()
    return members, at + 1


def _read_list(text: str, at: int, schema: Body) -> tuple[list[Any], int]:
    items: list[Any] = []
    at = _skip(text, at + 1)
    while text[at : at + 1] != "]" or items:
        item, at = _read_object(text, at, schema) if text[at : at + 1] == "{" else _scan(text, at)
        items.append(item)
        at = _skip(text, at)
        if _expect(text, at, ",]") == "]":
            break
        at = _skip(text, at + 1)
    return items, at + 1


def read_body(raw: bytes, schema: Body) -> dict[str, Any]:
    """The members of a body; nothing at all counts as {}.

    :raises Refusal: 400, when it is not a JSON object. Lone surrogates are refused too: they are no text.
    """
    try:
        text = raw.decode("utf-8")
        at = _skip(text, 0)
        if at == len(text):
            return {}
        if text[at] != "{":
            _scan(text, at)
            raise invalid("", "must be a JSON object")
        members, at = _read_object(text, at, schema)
        if _skip(text, at) != len(text):
            raise ValueError(f"more after the end, at character {at}")
        if "\\u" in text:
            json.dumps(_scan(text, _skip(text, 0))[0], ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise invalid("", "nested too deeply") from None
    except StopIteration as error:
        raise invalid("", f"malformed JSON at character {error.value}") from None
    except ValueError as error:  # among them UnicodeError and json.JSONDecodeError
        raise invalid("", f"malformed JSON: {str(error)[:200]}") from None
    return members


# ------------------------------------------------------------------------------
# Schemas: what a body may hold. Optional is not nullable: null is refused where the type has none.
# ------------------------------------------------------------------------------
MAX_NAME = 512  # characters: names stand in indexes, whose rows Postgres limits to about 2,700 bytes
MAX_TEXT = 8192  # characters, of a reason, an actor and the like: lists show them
MAX_PROMPT = 65_536
MAX_SPELLED = 32 * 1024 * 1024  # bytes of a value that Postgres looks into, as it writes it: 1e300 has 301 digits
MAX_MS = 36_525 * 86_400_000  # a hundred years: longer is a mistake of units
MAX_WAIT_MS = 25_000  # proxies close what is silent for 30 s
MAX_ATTEMPTS = 1_000_000
MAX_PRIORITY = 2**31 - 1
MAX_CLAIM_QUEUES = 1000
MAX_FILTERS = 16  # metadata filters of a list
MAX_RUN_CHANNELS = 32
MAX_GATE_CHANNELS = 8
MAX_BATCH = 10_000
MAX_SIGNALS = 1_000_000  # of one name and run
MAX_AMOUNT = 10**15
MAX_WORKFLOWS = 1000  # of a claim: each is looked for by itself
MAX_ANSWERS = 16 * 1024 * 1024  # characters of the answers to a batch, as _budget() of schema.sql
MAX_WRITES = 1000  # of a batch whose writes are made one by one, in one transaction
# As parts of a URL . and .. are the folder and the one above it.
ID = validate.Regexp(r"(?!\.\.?$)[A-Za-z0-9_.:-]{1,128}\Z",
                     error="must be 1 to 128 of A-Z a-z 0-9 _ . : -, and not . or ..")
LIMITS = (
    f"Names are at most {MAX_NAME} characters long, priorities integers of 32 bits, maxAttempts 1 to {MAX_ATTEMPTS:,}. "
    f"Delays and timeouts reach 100 years ahead, waitMs {MAX_WAIT_MS // 1000} seconds. A claim names at most "
    f"{MAX_CLAIM_QUEUES:,} queues, a list of runs {MAX_FILTERS} metadata filters; a run has at most {MAX_RUN_CHANNELS} "
    f"channels, a gate {MAX_GATE_CHANNELS}, a batch {MAX_BATCH:,} runs or {MAX_WRITES:,} writes, a reason, an actor or "
    f"another text that is no payload {MAX_TEXT:,} characters, a gate's prompt {MAX_PROMPT:,}, a number "
    f"{MAX_NUMBER:,} characters, a body TIDEBASE_MAX_BODY bytes (16 MiB unless set otherwise).")


def _no_nul(value: str) -> None:
    if "\x00" in value:
        raise marshmallow.ValidationError("must not contain NUL")


class Text(fields.String):
    """A string as Postgres can hold it."""

    # For /openapi.json, here and below: what the validators cannot tell.
    json_schema: ClassVar[dict[str, Any]] = {"pattern": "^[^\\u0000]*$"}

    def __init__(self, *validators: Callable[[Any], Any], **options: Any) -> None:
        if not any(isinstance(validator, validate.Length) for validator in validators):
            validators = (validate.Length(max=MAX_TEXT), *validators)
        super().__init__(validate=[_no_nul, *validators], **options)


class Name(Text):
    def __init__(self, *validators: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(validate.Length(1, MAX_NAME), *validators, **options)


class Whole(fields.Integer):
    """A strict integer: "5", 1.5 and true are refused."""

    def __init__(self, low: int, high: int, **options: Any) -> None:
        super().__init__(strict=True, validate=validate.Range(low, high), **options)

    def _validated(self, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)


class Flag(fields.Boolean):
    """true or false, and none of the words that marshmallow would take for them."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Url(Text):
    """An http or https address, for a webhook."""

    json_schema: ClassVar[dict[str, Any]] = {"pattern": "^[Hh][Tt][Tt][Pp][Ss]?://."}

    def __init__(self, **options: Any) -> None:
        super().__init__(validate.Length(1, 8192), _http_url, **options)


def _http_url(value: str) -> None:
    try:
        parts = urllib.parse.urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise marshmallow.ValidationError("must be an http or https URL")


class JsonText(fields.Field[RawText | None]):
    """A member that goes to Postgres as the text it came as; null, or none at all, is `empty`."""

    def __init__(self, empty: str | None = None, **options: Any) -> None:
        self.empty = None if empty is None else RawText(empty)
        if not options.get("required"):
            options["load_default"] = self.empty
        super().__init__(allow_none=True, **options)

    def _deserialize(self, value: Json, attr: str | None, data: Any, **kwargs: Any) -> RawText | None:
        if value.value is None:
            return self.empty
        self.inspect(value)
        return RawText(value.text)

    def inspect(self, value: Json) -> None:
        """Nothing to object to: a payload is the user's."""


class Amount(JsonText):
    """A number from 0 on. It goes to Postgres as it is spelled, so that no digit is lost; null, true and "5" are
    none."""

    json_schema: ClassVar[dict[str, Any]] = {"type": "number", "minimum": 0, "maximum": MAX_AMOUNT}

    def _deserialize(self, value: Json, attr: str | None, data: Any, **kwargs: Any) -> RawText:
        if type(value.value) not in (int, float):
            raise marshmallow.ValidationError("must be a number")
        amount = Decimal(value.text)
        if not 0 <= amount <= MAX_AMOUNT:
            raise marshmallow.ValidationError(f"must be 0 to {MAX_AMOUNT}")
        if cast(int, amount.as_tuple().exponent) < -MAX_NUMBER:
            raise marshmallow.ValidationError(f"must have at most {MAX_NUMBER} decimals")
        return RawText(value.text)


class JsonValue(JsonText):
    """A value that Postgres looks into, so that NUL, which its text cannot hold, is refused."""

    def __init__(self, **options: Any) -> None:
        super().__init__(empty="{}", **options)

    def inspect(self, value: Json) -> None:
        if re.search(r"(?<!\\)(\\\\)*\\u0000", value.text):
            raise marshmallow.ValidationError("must not contain NUL")
        try:
            json.dumps(value.value, allow_nan=False)
        except ValueError:  # jsonb would write 1e99999 out, in so many digits that clients cannot read it
            raise marshmallow.ValidationError("must not contain a number beyond a double") from None
        except RecursionError:
            raise marshmallow.ValidationError("nested too deeply") from None
        if (size := spelled_bytes(value.text)) > MAX_SPELLED:
            raise marshmallow.ValidationError(
                f"too large: with its numbers written out it has {size:,} bytes; at most {MAX_SPELLED:,}")


def spelled_bytes(text: str) -> int:
    """About how many bytes Postgres needs for a JSON text: it writes numbers out, 1e300 as 301 digits."""
    if not EXPONENT.search(text):
        return len(text)
    numbers = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    return len(text) + sum(min(int(exponent), 400) for exponent in EXPONENT.findall(numbers))


EXPONENT = re.compile(r"[0-9][eE][+-]?0*([0-9]{1,9})")


class JsonObject(JsonValue):
    """Likewise, and an object."""

    json_schema: ClassVar[dict[str, Any]] = {"type": ["object", "null"]}

    def __init__(self, schema: type[Body] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.shape = schema

    def inspect(self, value: Json) -> None:
        if not isinstance(value.value, dict):
            raise marshmallow.ValidationError("must be an object")
        super().inspect(value)
        if self.shape and value.value:
            schema_of(self.shape).load(value.value, partial=True)


class OneOrMany(fields.Field[Any]):
    """A list, or a string that stands for a list of one."""

    json_schema: ClassVar[dict[str, Any]] = {"type": ["array", "string", "null"]}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, (list, str)):
            return value
        raise marshmallow.ValidationError("must be a list, or a string")


class Names(fields.Field[Any]):
    """A list of names, or true for all."""

    json_schema: ClassVar[dict[str, Any]] = {"anyOf": [
        {"const": True},
        {"type": "array", "maxItems": MAX_BATCH, "items": {"type": "string", "minLength": 1, "maxLength": MAX_NAME}}]}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if value is True or (isinstance(value, list) and len(value) <= MAX_BATCH
                             and all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in value)):
            return value
        raise marshmallow.ValidationError("must be a list of names, or true")


class Body(marshmallow.Schema):
    """The base of all bodies: a key that it does not know is ignored, since existing clients send some."""

    class Meta:
        unknown = marshmallow.EXCLUDE

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        if field_obj.load_default is None and not isinstance(field_obj, JsonText):
            field_obj.allow_none = False  # else marshmallow takes such a default for "may be null"

    @functools.cached_property
    def by_key(self) -> dict[str, fields.Field[Any]]:
        return {field.data_key or name: field for name, field in self.fields.items()}

    @functools.cached_property
    def texts(self) -> set[str]:
        """The members that stay the text they came as."""
        return {key for key, field in self.by_key.items() if isinstance(field, JsonText)}

    @functools.cached_property
    def lists(self) -> dict[str, Body]:
        """The members that are lists of objects, and what those may hold."""
        return {key: cast(Body, field.inner.schema) for key, field in self.by_key.items()
                if isinstance(field, fields.List) and isinstance(field.inner, fields.Nested)}


@functools.cache
def schema_of(kind: type[Body]) -> Body:
    return kind()


class Verb(fields.String):
    """The member `do` of a write: which of its kinds it is."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.json_schema = {"const": verb}
        super().__init__(required=True, validate=validate.Equal(verb))


class OneOf(fields.Nested):
    """One of several bodies, told apart by their Verb; `read` has the members of all."""

    def __init__(self, read: type[Body], *kinds: type[Body]) -> None:
        self.kinds = {cast(Verb, kind._declared_fields["do"]).verb: kind for kind in kinds}
        super().__init__(read)

    def _deserialize(self, value: Any, attr: str | None, data: Any, partial: Any = None, **kwargs: Any) -> Any:
        if not isinstance(value, dict):
            raise self.make_error("type", input=value, type=type(value).__name__)
        verb = value.get("do")
        if not isinstance(verb, str) or verb not in self.kinds:
            raise marshmallow.ValidationError({"do": [f"must be one of {', '.join(self.kinds)}"]})
        return schema_of(self.kinds[verb]).load(value)


class ChannelBody(Body):
    type = fields.Str(required=True, validate=validate.OneOf(["webhook"]))
    url = Url(required=True)
    secret = Text(validate.Length(1, 1024))
    events = fields.List(Name())


def channels_up_to(count: int) -> fields.List[Any]:
    """Where to send the events of a run, or of a gate: each event is written once for each of them."""
    return fields.List(fields.Nested(ChannelBody), load_default=list, validate=validate.Length(max=count))


class RunFields(Body):
    """What every way to make a run takes."""

    id = Text(ID, load_default=None)
    input = JsonText(empty="{}")
    metadata = JsonObject()
    recovery_webhook = Url(data_key="recoveryWebhook", load_default=None)
    recovery_secret = Text(validate.Length(1, 1024), data_key="recoverySecret", load_default=None)
    channels = channels_up_to(MAX_RUN_CHANNELS)
    deadline_ms = Whole(1, MAX_MS, data_key="deadlineMs", load_default=None)


class CreateRunBody(RunFields):
    """POST /runs/:workflowName"""


class EnqueueBody(RunFields):
    """POST /queues/:queue/enqueue"""

    workflow_name = Name(data_key="workflowName", required=True)
    dedupe_key = Name(data_key="dedupeKey", load_default=None)
    delay_ms = Whole(0, MAX_MS, data_key="delayMs", load_default=None)
    run_at = fields.AwareDateTime(format="iso", data_key="runAt", load_default=None, default_timezone=UTC)
    max_attempts = Whole(1, MAX_ATTEMPTS, data_key="maxAttempts", load_default=3)  # so that a dead worker's run goes on
    priority = Whole(-MAX_PRIORITY - 1, MAX_PRIORITY, load_default=0)


class EnqueueManyBody(Body):
    runs = fields.List(fields.Nested(EnqueueBody), required=True, validate=validate.Length(1, MAX_BATCH))


class EnqueueAnyBody(EnqueueBody, EnqueueManyBody):
    """Either of the two, to read it before it is known which."""


class BeginRunBody(Body):
    checkpoints = Flag(load_default=False)


class HeartbeatBody(Body):
    lease_owner = Name(data_key="leaseOwner", required=True)


class OwnerFields(Body):
    """Who writes: a worker that lost its run is refused; one that names no owner is not looked at."""

    lease_owner = Name(data_key="leaseOwner", load_default=None)


class BeatBody(HeartbeatBody):
    id = Name(required=True)


class HeartbeatsBody(Body):
    runs = fields.List(fields.Nested(BeatBody), required=True, validate=validate.Length(1, MAX_BATCH))


class CompleteRunBody(OwnerFields):
    result = JsonText()
    brief = Flag(load_default=False)


class FailRunBody(OwnerFields):
    error = JsonText()
    failure_class = Name(data_key="failureClass", load_default=None)
    retryable = Flag(load_default=True)


class CancelBody(Body):
    reason = Text(load_default=None)
    actor = Text(load_default=None)


class RecoverBody(Body):
    reason = Name(load_default="manual")


class StepOptions(Body):
    """What a step's options promise of it; they may hold more. Here null counts as absent."""

    side_effects = OneOrMany(data_key="sideEffects", allow_none=True)
    idempotency_key = Text(data_key="idempotencyKey", allow_none=True)
    replay = fields.Str(allow_none=True, validate=validate.OneOf(["auto", "manual", "never"]))
    # The older spelling of sideEffects and, below, of replay.
    side_effect = Text(data_key="sideEffect", allow_none=True)
    on_ambiguous_failure = fields.Str(data_key="onAmbiguousFailure", allow_none=True, validate=validate.OneOf(
        ["retry", "review", "fail"]))
    checkpoint_invariant = fields.Raw(data_key="checkpointInvariant", allow_none=True)
    verified_by = fields.Raw(data_key="verifiedBy", allow_none=True)
    credentials = fields.Raw(allow_none=True)


class StepFields(Body):
    name = Name(required=True)
    input_hash = Name(data_key="inputHash", required=True)
    input = JsonText(empty="{}")
    options = JsonObject(StepOptions)


class BeginStepBody(StepFields, OwnerFields):
    """POST /runs/:id/steps/begin"""


class CompleteStepBody(Body):
    lease_owner = Name(data_key="leaseOwner", required=True)
    output = JsonText()


class StepFailure(Body):
    """How a failure is judged: whether, and how, the step may run again."""

    retryable = Flag(load_default=False)
    resume_decision = fields.Str(data_key="resumeDecision", load_default=None, validate=validate.OneOf(
        ["auto_retry", "safe_replay", "manual_review", "fail_hard"]))


class FailStepBody(StepFailure):
    lease_owner = Name(data_key="leaseOwner", required=True)
    error = JsonText(required=True)


class RecordStepBody(StepFields, StepFailure):
    """POST /runs/:id/steps: a step that already ran."""

    lease_owner = Name(data_key="leaseOwner", required=True)
    output = JsonText()
    error = JsonText()
    started_at = fields.AwareDateTime(format="iso", data_key="startedAt", load_default=None, default_timezone=UTC)
    duration_ms = Whole(0, MAX_MS, data_key="durationMs", load_default=None)
    brief = Flag(load_default=False)


class RecordOfRun(RecordStepBody):
    run_id = Name(data_key="runId", required=True)


class RecordStepsBody(Body):
    records = fields.List(fields.Nested(RecordOfRun), required=True, validate=validate.Length(1, MAX_WRITES))


class ReviewBody(Body):
    decision = fields.Str(required=True, validate=validate.OneOf(["retry", "complete", "fail"]))
    output = JsonText()
    actor = Text(load_default=None)


class ChildBody(RunFields, OwnerFields):
    """POST /runs/:id/children"""

    name = Name(required=True)
    workflow_name = Name(data_key="workflowName", required=True)
    edge_type = Name(data_key="edgeType", load_default="child")
    edge_metadata = JsonObject(data_key="edgeMetadata")
    queue = Name(load_default=None)
    max_attempts = Whole(1, MAX_ATTEMPTS, data_key="maxAttempts", load_default=3)
    priority = Whole(-MAX_PRIORITY - 1, MAX_PRIORITY, load_default=0)


class WaitFor(Body):
    """What a run waits for: one of these."""

    gate_id = Name(data_key="gateId")
    event = Name()
    until = fields.AwareDateTime(format="iso", default_timezone=UTC)
    children = Names()
    n = Whole(1, MAX_SIGNALS)  # of an event: which of its signals
    step_id = Name(data_key="stepId")  # the step that records the wait, and ends with it

    @marshmallow.validates_schema
    def _one_of_them(self, data: dict[str, Any], **_: Any) -> None:
        if len(data.keys() - {"n", "step_id"}) != 1:
            raise marshmallow.ValidationError("must be one of gateId, event, until and children")
        if "n" in data and "event" not in data:
            raise marshmallow.ValidationError("is the number of an event", "n")


class WaitBody(HeartbeatBody):
    wait_for = fields.Nested(WaitFor, data_key="for", required=True)
    timeout_ms = Whole(1, MAX_MS, data_key="timeoutMs", load_default=None)


class ExpireSignalBody(HeartbeatBody):
    """POST /runs/:id/signals/:name/expire"""

    n = Whole(1, MAX_SIGNALS, load_default=1)


class SignalBody(OwnerFields):
    id = Text(ID, load_default=None)
    name = Name(required=True)
    payload = JsonText()


class ForkBody(Body):
    id = Text(ID, load_default=None)
    from_step = Name(data_key="fromStep", load_default=None)
    input = JsonText()
    queue = Name(load_default=None)


class BeginGateBody(OwnerFields):
    """POST /runs/:id/gates/begin"""

    name = Name(required=True)
    prompt = Text(validate.Length(max=MAX_PROMPT), required=True)
    data = JsonText(empty="{}")
    channels = channels_up_to(MAX_GATE_CHANNELS)
    capability = JsonText()
    timeout_ms = Whole(1, MAX_MS, data_key="timeoutMs", load_default=None)


class ResolveGateBody(Body):
    token = Text(required=True)
    decision = fields.Str(required=True, validate=validate.OneOf(["approved", "rejected", "canceled"]))
    actor = Text(load_default=None)
    payload = JsonText(empty="{}")


class About(Body):
    """What may be said of a version of the state."""

    id = Text(ID)
    label = Name()
    reason = Text()
    importance = fields.Str(validate=validate.OneOf(["transient", "normal", "checkpoint", "milestone"]))
    metadata = JsonObject()
    created_by = Text(data_key="createdBy")
    step_id = Text(data_key="stepId")


class PutStateBody(About, OwnerFields):
    value = JsonValue()
    stream = Name(load_default="run")
    if_version = Whole(0, 2**31 - 1, data_key="ifVersion", load_default=None)


class PatchStateBody(PutStateBody):
    value = JsonObject()


class SaveStateBody(About, OwnerFields):
    label = Name(required=True)
    stream = Name(load_default="run")


class SnapshotTarget(Body):
    type = Name(required=True)
    id = Name(required=True)


class SnapshotBody(About, OwnerFields):
    label = Name(required=True)
    state = JsonValue()
    target = fields.Nested(SnapshotTarget, load_default=None)


class UsageBody(OwnerFields):
    """POST /runs/:id/usage"""

    id = Text(ID, load_default=None)
    step_id = Text(data_key="stepId")
    kind = Name(load_default="custom")
    provider = Text()
    model = Text()
    label = Text()
    quantity = Amount()
    unit = Text()
    input_tokens = Whole(0, 2**53, data_key="inputTokens")
    output_tokens = Whole(0, 2**53, data_key="outputTokens")
    total_tokens = Whole(0, 2**53, data_key="totalTokens")
    cost_usd = Amount(data_key="costUsd")
    metadata = JsonObject()


class ScheduleBody(Body):
    """PUT /schedules/:name"""

    cron = Text(required=True)
    timezone = Text(load_default="UTC")
    workflow_name = Name(data_key="workflowName", required=True)
    input = JsonText(empty="{}")
    queue = Name(load_default="default")
    max_attempts = Whole(1, MAX_ATTEMPTS, data_key="maxAttempts", load_default=3)
    enabled = Flag(load_default=True)


class PreviewBody(Body):
    """POST /schedules/preview"""

    cron = Text(required=True)
    timezone = Text(load_default="UTC")


class ClaimBody(Body):
    """POST /queues/claim"""

    queues = fields.List(Name(), required=True, validate=validate.Length(1, MAX_CLAIM_QUEUES))
    id = Text(ID, load_default=None)
    lease_owner = Name(data_key="leaseOwner", load_default=None)
    limit = Whole(1, 100, load_default=1)
    workflows = fields.List(Name(), load_default=None, validate=validate.Length(0, MAX_WORKFLOWS))
    wait_ms = Whole(0, MAX_WAIT_MS, data_key="waitMs", load_default=0)
    checkpoints = Flag(load_default=False)


class RecordWrite(RecordOfRun):
    do = Verb("record_step")


class BeginStepWrite(BeginStepBody):
    do = Verb("begin_step")
    run_id = Name(data_key="runId", required=True)


class CompleteStepWrite(CompleteStepBody):
    do = Verb("complete_step")
    run_id = Name(data_key="runId", required=True)
    step_id = Name(data_key="stepId", required=True)


class CompleteRunWrite(CompleteRunBody):
    do = Verb("complete_run")
    run_id = Name(data_key="runId", required=True)


class EnqueueWrite(EnqueueBody):
    do = Verb("enqueue_run")
    queue = Name(required=True)


class ChildWrite(ChildBody):
    do = Verb("create_child")
    run_id = Name(data_key="runId", required=True)


class AnyWrite(RecordWrite, BeginStepWrite, CompleteStepWrite, CompleteRunWrite, EnqueueWrite, ChildWrite):
    """Any of them, to read it before it is known which."""


class WritesBody(Body):
    """POST /writes"""

    writes = fields.List(
        OneOf(AnyWrite, RecordWrite, BeginStepWrite, CompleteStepWrite, CompleteRunWrite, EnqueueWrite, ChildWrite),
        required=True, validate=validate.Length(1, MAX_WRITES))


class QueueConfigBody(Body):
    concurrency = Whole(1, 1_000_000, allow_none=True)
    rate_per_minute = Whole(1, 100_000_000, data_key="ratePerMinute", allow_none=True)
    invoke_url = Url(data_key="invokeUrl", allow_none=True)
    paused = Flag()
