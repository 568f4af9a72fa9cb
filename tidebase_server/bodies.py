"""Request bodies: how they are read, and what each of them may hold.

A body is read once, by msgspec, into its members as they stand in the text. Payloads (inputs, outputs, results and the
like) stay that text and go on to PostgreSQL as it came; all other members are small, and become Python values that a
marshmallow field checks. Each schema is compiled into a list of checks when it is first used.

Names follow one rule: a member is camelCase on the wire; its attribute here, and the parameter of the SQL function, are
the same name in snake_case. Optional is not nullable: null is refused where the type has none.
"""

from __future__ import annotations

import functools
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, ClassVar, NamedTuple, cast

import marshmallow
import msgspec
from marshmallow import ValidationError, fields, validate
from msgspec import Raw

from .answers import Refusal, invalid

# ------------------------------------------------------------------------------
# Limits: what a body may hold at most. LIMITS lists them in words, for /openapi.json.
# ------------------------------------------------------------------------------
MAX_NUMBER = 1000  # characters; a longer number is no number that anybody means, and costs quadratic time
MAX_NAME = 512  # characters: names stand in indexes, whose rows Postgres limits to about 2,700 bytes
MAX_TEXT = 8192  # characters, of a reason, an actor and the like: lists show them
MAX_PROMPT = 65_536
MAX_EXPANDED = 32 * 1024 * 1024  # bytes of a jsonb value as PostgreSQL writes it: it expands 1e300 to 301 digits
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
MAX_WRITES = 1000  # of a batch, which is one transaction
LIMITS = (
    f"Names are at most {MAX_NAME} characters long, priorities integers of 32 bits, maxAttempts 1 to {MAX_ATTEMPTS:,}. "
    f"Delays and timeouts reach 100 years ahead, waitMs {MAX_WAIT_MS // 1000} seconds. A claim names at most "
    f"{MAX_CLAIM_QUEUES:,} queues, a list of runs {MAX_FILTERS} metadata filters; a run has at most {MAX_RUN_CHANNELS} "
    f"channels, a gate {MAX_GATE_CHANNELS}, a batch {MAX_BATCH:,} runs or {MAX_WRITES:,} writes, a reason, an actor or "
    f"another text that is no payload {MAX_TEXT:,} characters, a gate's prompt {MAX_PROMPT:,}, a number "
    f"{MAX_NUMBER:,} characters, a body TIDEBASE_MAX_BODY bytes (16 MiB unless set otherwise).")

# ------------------------------------------------------------------------------
# Reading JSON: a body becomes its members, each still the text that came.
# ------------------------------------------------------------------------------
NULL = Raw(b"null")
LONG_NUMBER = re.compile(rf"[-+.0-9eE]{{{MAX_NUMBER + 1}}}")
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
members_of = msgspec.json.Decoder(dict[str, Raw]).decode  # of two equal keys the last counts, as everywhere
items_of = msgspec.json.Decoder(list[Raw]).decode
value_of = msgspec.json.Decoder().decode


def read_members(body: bytes) -> dict[str, Raw]:
    """The members of a body; nothing at all counts as {}.

    msgspec refuses all that JSON does not allow, lone surrogates among it. It does not check the encoding of the texts
    that it leaves as they are, nor the length of numbers, so both are checked here.

    :raises Refusal: 400, when the body is not a JSON object.
    """
    try:
        text = body.decode()
        if has_long_number(text):
            raise invalid("", f"malformed JSON: a number of more than {MAX_NUMBER:,} characters")
        return members_of(body) if text.strip(" \t\r\n") else {}
    except RecursionError:
        raise invalid("", "nested too deeply") from None
    except msgspec.ValidationError:
        raise invalid("", "must be a JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid("", f"malformed JSON: {str(error).removeprefix('JSON is malformed: ')[:200]}") from None


def has_long_number(text: str) -> bool:
    """Whether a number in a JSON text has more than MAX_NUMBER characters.

    Such a number covers a position that is a multiple of MAX_NUMBER. So only the text around these positions is looked
    at first, which costs little; the text outside of strings is searched when something was found there.
    """
    return any(
        text[at] in "-+.0123456789eE" and LONG_NUMBER.search(text, at - MAX_NUMBER, at + MAX_NUMBER + 1)
        for at in range(MAX_NUMBER, len(text), MAX_NUMBER)
    ) and LONG_NUMBER.search(STRING.sub('""', text)) is not None


def to_json(value: Any) -> Raw:
    """The JSON of a value; what is Raw in it stays as it is."""
    return Raw(msgspec.json.encode(value))


def encode_fields(fields: Mapping[str, Any]) -> Raw:
    """The JSON of checked fields as an SQL function takes them, in snake_case. Fields that are None are left out."""
    return to_json({name: value for name, value in fields.items() if value is not None})


# ------------------------------------------------------------------------------
# Checking: a schema is compiled into a list of checks, once; each body runs through it.
# ------------------------------------------------------------------------------
def decoded(text: Raw) -> Any:
    """The value of a member.  :raises ValidationError: Python cannot hold it."""
    try:
        return value_of(text)
    except msgspec.ValidationError:  # clients could not read 1e99999 as jsonb writes it, in so many digits
        raise ValidationError("must not contain a number beyond a double") from None
    except RecursionError:
        raise ValidationError("nested too deeply") from None


def camel(name: str) -> str:
    """A name as the wire has it."""
    first, *others = name.split("_")
    return first + "".join(map(str.title, others))


class RawField:
    """The mark of a field whose `deserialize` takes the text of the member, a msgspec.Raw, and not its value."""


class Check(NamedTuple):
    """How one member is checked."""

    key: str                           # on the wire
    attribute: str                     # here and in SQL
    deserialize: Callable[[Any], Any]  # marshmallow's, of the field
    is_raw: bool                       # it takes the text
    default: Any                       # marshmallow.missing: there is none
    missing: str | None                # the words when the member is not there and must be


class Body(marshmallow.Schema):
    """The base of all bodies: a key that it does not know is ignored, since existing clients send some."""

    class Meta:
        unknown = marshmallow.EXCLUDE

    def on_bind_field(self, field_name: str, field_obj: fields.Field[Any]) -> None:
        """Give a field its name on the wire; marshmallow calls this for each."""
        if field_obj.data_key is None:
            field_obj.data_key = camel(field_name)
        if field_obj.load_default is None and not isinstance(field_obj, RawField):
            field_obj.allow_none = False  # else marshmallow takes such a default for "may be null"

    @functools.cached_property
    def checks(self) -> tuple[Check, ...]:
        """The compiled schema."""
        return tuple(
            Check(cast(str, field.data_key), name, field.deserialize, isinstance(field, RawField), field.load_default,
                  str(field.error_messages["required"]) if field.required else None)
            for name, field in self.fields.items())

    def check_whole(self, checked: dict[str, Any]) -> None:
        """Check what members must be together.  :raises ValidationError: they are not; the field may be named."""


@functools.cache
def schema_of(kind: type[Body]) -> Body:
    """The one schema of a kind of body."""
    return kind()


def check_members(schema: Body, members: Mapping[str, Raw]) -> dict[str, Any]:
    """The fields of a body by their attributes, those with a default always among them.

    :raises ValidationError: with the messages by member, as marshmallow has them.
    """
    checked, errors = dict[str, Any](), dict[str, Any]()
    for key, attribute, deserialize, is_raw, default, missing in schema.checks:
        text = members.get(key)
        if text is None:
            if missing is not None:
                errors[key] = [missing]
            elif default is not marshmallow.missing:
                checked[attribute] = default() if callable(default) else default
            continue
        try:
            checked[attribute] = deserialize(text if is_raw else decoded(text))
        except ValidationError as error:
            errors[key] = error.messages
    if not errors:
        try:
            schema.check_whole(checked)
        except ValidationError as error:
            errors = {error.field_name: error.messages}
    if errors:
        raise ValidationError(errors)
    return checked


def check(kind: type[Body], members: Mapping[str, Raw]) -> dict[str, Any]:
    """The fields of a body.  :raises Refusal: 400, every wrong member named in its issues."""
    try:
        return check_members(schema_of(kind), members)
    except ValidationError as error:
        raise Refusal(400, "invalid_request", "invalid request body", issues=list(issues(error.messages))) from None


def issues(messages: Any, path: str = "") -> Iterator[dict[str, str]]:
    """marshmallow's tree of messages as a list of {path, message}."""
    if isinstance(messages, dict):
        for key, below in messages.items():
            yield from issues(below, path if key == "_schema" else f"{path}.{key}" if path else str(key))
    else:
        for message in messages:
            yield {"path": path, "message": str(message).rstrip(".")}


def take(kind: type[Body], checked: dict[str, Any]) -> Raw:
    """Take the fields of `kind` out of a checked body.  :returns: them, as an SQL function takes them."""
    return encode_fields({name: checked.pop(name) for name in schema_of(kind).fields if name in checked})


# ------------------------------------------------------------------------------
# Fields: the types of members. `deserialize` returns an ordinary value at once, and leaves all others to marshmallow.
# ------------------------------------------------------------------------------
# As parts of a URL . and .. are the folder and the one above it.
ID = re.compile(r"(?!\.\.?$)[A-Za-z0-9_.:-]{1,128}\Z")


def check_no_nul(value: str) -> None:
    """:raises ValidationError: Postgres cannot hold NUL in text."""
    if "\x00" in value:
        raise ValidationError("must not contain NUL")


class Text(fields.String):
    """A string as Postgres can hold it, of `least` to `most` characters."""

    # For /openapi.json, here and below: what does not follow from the validators.
    json_schema: ClassVar[dict[str, Any]] = {"pattern": "^[^\\u0000]*$"}

    def __init__(self, least: int = 0, most: int = MAX_TEXT, *validators: Callable[[Any], Any], **options: Any) -> None:
        self.least, self.most, self.has_more_to_check = least, most, bool(validators)
        super().__init__(validate=[check_no_nul, validate.Length(least or None, most), *validators], **options)

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Any:
        if (type(value) is str and self.least <= len(value) <= self.most and "\x00" not in value
                and not self.has_more_to_check):
            return value
        return super().deserialize(value, attr, data, **kwargs)


class Name(Text):
    """What indexes may hold: a name, a key, an owner."""

    def __init__(self, **options: Any) -> None:
        super().__init__(1, MAX_NAME, **options)


class Id(Text):
    """An id that the client chose."""

    def __init__(self, **options: Any) -> None:
        super().__init__(0, MAX_TEXT, validate.Regexp(
            ID, error="must be 1 to 128 of A-Z a-z 0-9 _ . : -, and not . or .."), **options)

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Any:
        if type(value) is str and ID.match(value):
            return value
        return super().deserialize(value, attr, data, **kwargs)


class Choice(fields.String):
    """One of some words."""

    def __init__(self, *words: str, **options: Any) -> None:
        super().__init__(validate=validate.OneOf(words), **options)


class Url(Text):
    """An http or https address, for a webhook."""

    json_schema: ClassVar[dict[str, Any]] = {"pattern": "^[Hh][Tt][Tt][Pp][Ss]?://."}

    def __init__(self, **options: Any) -> None:
        super().__init__(1, MAX_TEXT, check_http_url, **options)


def check_http_url(value: str) -> None:
    """:raises ValidationError: it is no address that a webhook can be sent to."""
    try:
        parts = urllib.parse.urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValidationError("must be an http or https URL")


class Whole(fields.Integer):
    """A strict integer: "5", 1.5 and true are refused."""

    def __init__(self, low: int, high: int, **options: Any) -> None:
        self.low, self.high = low, high
        super().__init__(strict=True, validate=validate.Range(low, high), **options)

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Any:
        if type(value) is int and self.low <= value <= self.high:
            return value
        if value is not None and type(value) is not int:
            raise self.make_error("invalid", input=value)
        return super().deserialize(value, attr, data, **kwargs)


class Flag(fields.Boolean):
    """true or false, and none of the words that marshmallow would take for them."""

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Any:
        if value is not None and not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value if value is not None else super().deserialize(value, attr, data, **kwargs)


class Time(fields.AwareDateTime):
    """A time, ISO-8601; without a zone it is UTC."""

    USUAL = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{3})?Z")

    def __init__(self, **options: Any) -> None:
        super().__init__(format="iso", default_timezone=UTC, **options)

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Any:
        if type(value) is str and self.USUAL.fullmatch(value):
            try:
                return datetime.fromisoformat(value)
            except ValueError:
                raise self.make_error("invalid", input=value, obj_type=self.OBJ_TYPE) from None
        return super().deserialize(value, attr, data, **kwargs)


class OneOrMany(fields.Field[Any]):
    """A list, or a string that stands for a list of one."""

    json_schema: ClassVar[dict[str, Any]] = {"type": ["array", "string", "null"]}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, (list, str)):
            return value
        raise ValidationError("must be a list, or a string")


class Names(fields.Field[Any]):
    """A list of names, or true for all."""

    json_schema: ClassVar[dict[str, Any]] = {"anyOf": [
        {"const": True},
        {"type": "array", "maxItems": MAX_BATCH, "items": {"type": "string", "minLength": 1, "maxLength": MAX_NAME}}]}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if value is True or (isinstance(value, list) and len(value) <= MAX_BATCH
                             and all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in value)):
            return value
        raise ValidationError("must be a list of names, or true")


# --- members that are read by their field, from the text that came


class JsonText(RawField, fields.Field[Raw | None]):
    """A payload: it goes to Postgres as the text it came as; null, or none at all, is `empty`."""

    def __init__(self, empty: str | None = None, **options: Any) -> None:
        self.empty = None if empty is None else Raw(empty.encode())
        if not options.get("required"):
            options["load_default"] = self.empty
        super().__init__(allow_none=True, **options)

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Raw | None:
        if value == NULL:
            return self.empty
        self.inspect(value)
        return cast(Raw, value)

    def inspect(self, text: Raw) -> None:
        """Check more of the text; a payload may be anything.  :raises ValidationError: it may not be stored."""


class Amount(JsonText):
    """A number from 0 on. It goes to Postgres as it is spelled, so that no digit is lost; null, true and "5" are
    none."""

    json_schema: ClassVar[dict[str, Any]] = {"type": "number", "minimum": 0, "maximum": MAX_AMOUNT}

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Raw:
        text = bytes(value).decode()
        if text[0] not in "-0123456789":
            raise ValidationError("must be a number")
        amount = Decimal(text)
        if not 0 <= amount <= MAX_AMOUNT:
            raise ValidationError(f"must be 0 to {MAX_AMOUNT}")
        if cast(int, amount.as_tuple().exponent) < -MAX_NUMBER:
            raise ValidationError(f"must have at most {MAX_NUMBER} decimals")
        return cast(Raw, value)


class JsonValue(JsonText):
    """A value that is stored as jsonb, so that what jsonb cannot hold is refused."""

    def __init__(self, **options: Any) -> None:
        super().__init__(empty="{}", **options)

    def inspect(self, text: Raw) -> None:
        """:raises ValidationError: it holds NUL, a number beyond a double, or more than MAX_EXPANDED bytes."""
        if bytes(text) != b"{}":
            self.inspect_value(bytes(text).decode(), decoded(text))

    def inspect_value(self, text: str, value: Any) -> None:
        """Check a value that is not {}.  :raises ValidationError: likewise."""
        if re.search(r"(?<!\\)(\\\\)*\\u0000", text):
            raise ValidationError("must not contain NUL")
        if (size := expanded_bytes(text)) > MAX_EXPANDED:
            raise ValidationError(
                f"too large: with its numbers written out it has {size:,} bytes; at most {MAX_EXPANDED:,}")


def expanded_bytes(text: str) -> int:
    """About how many bytes a JSON text has as PostgreSQL writes it: it expands 1e300 to 301 digits."""
    if not EXPONENT.search(text):
        return len(text)
    numbers = STRING.sub('""', text)
    return len(text) + sum(min(int(exponent), 400) for exponent in EXPONENT.findall(numbers))


EXPONENT = re.compile(r"[0-9][eE][+-]?0*([0-9]{1,9})")


class JsonObject(JsonValue):
    """An object that is stored as jsonb. With a `shape`, its members are checked by that schema; it may hold others."""

    json_schema: ClassVar[dict[str, Any]] = {"type": ["object", "null"]}

    def __init__(self, shape: type[Body] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.shape = shape

    def inspect_value(self, text: str, value: Any) -> None:
        """:raises ValidationError: likewise, or it is no object, or a member is not what the schema says."""
        if not isinstance(value, dict):
            raise ValidationError("must be an object")
        super().inspect_value(text, value)
        if self.shape:
            check_members(schema_of(self.shape), members_of(text))


class Nested(RawField, fields.Nested):
    """An object with a schema of its own."""

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> dict[str, Any]:
        return self.check(self.schema_for(value), value)

    def schema_for(self, value: Raw) -> Body:
        """The schema that the object is to be checked by."""
        return cast(Body, self.schema)

    def members(self, value: Raw) -> dict[str, Raw]:
        """:raises ValidationError: it is no object."""
        try:
            return members_of(value)
        except msgspec.ValidationError:
            raise ValidationError({"_schema": ["must be an object"]}) from None

    def check(self, schema: Body, value: Raw) -> dict[str, Any]:
        """:raises ValidationError: a member is not what the schema says."""
        return check_members(schema, self.members(value))


class Items(RawField, fields.List[Any]):
    """A list of objects that have a schema of their own."""

    def __init__(self, item: Nested, least: int, most: int, **options: Any) -> None:
        self.least, self.most = least, most
        super().__init__(item, validate=validate.Length(least or None, most), **options)

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> list[Any]:
        try:
            items = items_of(value)
        except msgspec.ValidationError:
            raise self.make_error("invalid") from None
        if not self.least <= len(items) <= self.most:
            validate.Length(self.least or None, self.most)(items)
        checked, errors = [], {}
        for at, item in enumerate(items):
            try:
                checked.append(self.inner.deserialize(item))
            except ValidationError as error:
                errors[at] = error.messages
        if errors:
            raise ValidationError(cast(Any, errors))
        return checked


# ------------------------------------------------------------------------------
# Bodies of runs: the schemas of their routes.
# ------------------------------------------------------------------------------
class ChannelBody(Body):
    """Where to send the events of a run, or of a gate."""

    type = Choice("webhook", required=True)
    url = Url(required=True)
    secret = Text(1, 1024)
    events = fields.List(Name())


class Channels(Items):
    """Channels, as the JSON that SQL functions take; each event is written once for each of them."""

    def __init__(self, most: int) -> None:
        super().__init__(Nested(ChannelBody), 0, most, load_default=functools.partial(Raw, b"[]"))

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Any:
        return to_json(super().deserialize(value))


class OwnerFields(Body):
    """Who writes. A worker that lost its run is refused; a write that names no owner is not fenced."""

    lease_owner = Name(load_default=None)


class HeldFields(Body):
    """Who writes; required."""

    lease_owner = Name(required=True)


class RunFields(Body):
    """What every way to make a run takes."""

    id = Id(load_default=None)
    input = JsonText(empty="{}")
    metadata = JsonObject()
    recovery_webhook = Url(load_default=None)
    recovery_secret = Text(1, 1024, load_default=None)
    channels = Channels(MAX_RUN_CHANNELS)
    deadline_ms = Whole(1, MAX_MS, load_default=None)


class CreateRunBody(RunFields):
    """POST /runs/:workflowName"""


class EnqueueBody(RunFields):
    """POST /queues/:queue/enqueue"""

    workflow_name = Name(required=True)
    dedupe_key = Name(load_default=None)
    delay_ms = Whole(0, MAX_MS, load_default=None)
    run_at = Time(load_default=None)
    max_attempts = Whole(1, MAX_ATTEMPTS, load_default=3)  # so that the run of a worker that died is tried again
    priority = Whole(-MAX_PRIORITY - 1, MAX_PRIORITY, load_default=0)


class EnqueueManyBody(Body):
    """POST /queues/:queue/enqueue, for many runs."""

    runs = Items(Nested(EnqueueBody), 1, MAX_BATCH, required=True)


class ChildBody(RunFields, OwnerFields):
    """POST /runs/:id/children"""

    name = Name(required=True)
    workflow_name = Name(required=True)
    edge_type = Name(load_default="child")
    edge_metadata = JsonObject()
    queue = Name(load_default=None)
    max_attempts = Whole(1, MAX_ATTEMPTS, load_default=3)
    priority = Whole(-MAX_PRIORITY - 1, MAX_PRIORITY, load_default=0)


class BeginRunBody(Body):
    """POST /runs/:id/begin"""

    checkpoints = Flag(load_default=False)


class HeartbeatBody(HeldFields):
    """POST /runs/:id/heartbeat and /runs/:id/release"""


class HeartbeatOfRun(HeldFields):
    """One of many heartbeats."""

    id = Name(required=True)


class HeartbeatsBody(Body):
    """POST /heartbeats"""

    runs = Items(Nested(HeartbeatOfRun), 1, MAX_BATCH, required=True)


class CompleteRunBody(OwnerFields):
    """POST /runs/:id/complete"""

    result = JsonText()
    brief = Flag(load_default=False)


class FailRunBody(OwnerFields):
    """POST /runs/:id/fail"""

    error = JsonText()
    failure_class = Name(load_default=None)
    retryable = Flag(load_default=True)


class CancelBody(Body):
    """POST /runs/:id/cancel"""

    reason = Text(load_default=None)
    actor = Text(load_default=None)


class RecoverBody(Body):
    """POST /runs/:id/recover"""

    reason = Name(load_default="manual")


class ForkBody(Body):
    """POST /runs/:id/fork"""

    id = Id(load_default=None)
    from_step = Name(load_default=None)
    input = JsonText()
    queue = Name(load_default=None)


# ------------------------------------------------------------------------------
# Bodies of steps, and of many writes at once: the schemas of their routes.
# ------------------------------------------------------------------------------
class StepOptions(Body):
    """The options of a step that Tidebase knows; others are kept as they came. Here null counts as absent."""

    side_effects = OneOrMany(allow_none=True)
    idempotency_key = Text(allow_none=True)
    replay = Choice("auto", "manual", "never", allow_none=True)
    # The older spelling of sideEffects and, below, of replay.
    side_effect = Text(allow_none=True)
    on_ambiguous_failure = Choice("retry", "review", "fail", allow_none=True)
    checkpoint_invariant = fields.Raw(allow_none=True)
    verified_by = fields.Raw(allow_none=True)
    credentials = fields.Raw(allow_none=True)


class StepFields(Body):
    """What a step is known by, and what it was given."""

    name = Name(required=True)
    input_hash = Name(required=True)
    input = JsonText(empty="{}")
    options = JsonObject(StepOptions)


class FailureFields(Body):
    """How a failure is judged: whether, and how, the step may run again."""

    retryable = Flag(load_default=False)
    resume_decision = Choice("auto_retry", "safe_replay", "manual_review", "fail_hard", load_default=None)


class BeginStepBody(StepFields, OwnerFields):
    """POST /runs/:id/steps/begin"""


class CompleteStepBody(HeldFields):
    """POST /runs/:id/steps/:stepId/complete"""

    output = JsonText()


class FailStepBody(FailureFields, HeldFields):
    """POST /runs/:id/steps/:stepId/fail"""

    error = JsonText(required=True)


class RecordStepBody(StepFields, FailureFields, HeldFields):
    """POST /runs/:id/steps: a step that already ran."""

    output = JsonText()
    error = JsonText()
    started_at = Time(load_default=None)
    duration_ms = Whole(0, MAX_MS, load_default=None)
    brief = Flag(load_default=False)


class ReviewBody(Body):
    """POST /runs/:id/steps/:stepId/review"""

    decision = Choice("retry", "complete", "fail", required=True)
    output = JsonText()
    actor = Text(load_default=None)


def with_fields(kind: type[Body], name: str, **more: fields.Field[Any]) -> type[Body]:
    """A schema of that name, of what `kind` has and more."""
    return cast(type[Body], kind.from_dict(dict(more), name=name))


def of_run(kind: type[Body], name: str, *parts: str, **more: fields.Field[Any]) -> type[Body]:
    """The body of a route as one of many, with the parts of the route's path in it."""
    return with_fields(kind, name, **{part: Name(required=True) for part in parts}, **more)


RecordOfRun = of_run(RecordStepBody, "RecordOfRun", "run_id")


class RecordStepsBody(Body):
    """POST /steps"""

    records = Items(Nested(RecordOfRun), 1, MAX_WRITES, required=True)


class Verb(fields.String):
    """The member `do` of a write: which SQL function makes it."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.json_schema = {"const": verb}
        super().__init__(required=True, validate=validate.Equal(verb))

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Any:
        return value if value == self.verb else super().deserialize(value, attr, data, **kwargs)


def write_schema(verb: str, kind: type[Body], *parts: str) -> type[Body]:
    """The schema of one of many writes: that of the verb's own route, with the parts of the route's path in it."""
    name = camel(f"_{verb}_write")
    return of_run(kind, name, *parts, do=Verb(verb), **({"chained": Flag()} if "run_id" in parts else {}))


WRITES = {verb: write_schema(verb, kind, *parts) for verb, kind, *parts in (
    ("record_step", RecordStepBody, "run_id"),
    ("begin_step", BeginStepBody, "run_id"),
    ("complete_step", CompleteStepBody, "run_id", "step_id"),
    ("fail_step", FailStepBody, "run_id", "step_id"),
    ("complete_run", CompleteRunBody, "run_id"),
    ("fail_run", FailRunBody, "run_id"),
    ("enqueue_run", EnqueueBody, "queue"),
    ("create_child", ChildBody, "run_id"),
)}


class AnyWrite(Nested):
    """One of WRITES, told apart by its verb."""

    kinds = WRITES

    def __init__(self) -> None:
        super().__init__(Body)

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> dict[str, Any]:
        members = self.members(value)
        verb = decoded(members.get("do", NULL))
        if not isinstance(verb, str) or verb not in WRITES:
            raise ValidationError({"do": [f"must be one of {', '.join(WRITES)}"]})
        return check_members(schema_of(WRITES[verb]), members)


class WritesBody(Body):
    """POST /writes"""

    writes = Items(AnyWrite(), 1, MAX_WRITES, required=True)


# ------------------------------------------------------------------------------
# Bodies of gates, waits and signals: the schemas of their routes.
# ------------------------------------------------------------------------------
class BeginGateBody(OwnerFields):
    """POST /runs/:id/gates/begin"""

    name = Name(required=True)
    prompt = Text(0, MAX_PROMPT, required=True)
    data = JsonText(empty="{}")
    channels = Channels(MAX_GATE_CHANNELS)
    capability = JsonText()
    timeout_ms = Whole(1, MAX_MS, load_default=None)


class ResolveGateBody(Body):
    """POST /runs/:id/gates/:gateId/resolve"""

    token = Text(required=True)
    decision = Choice("approved", "rejected", "canceled", required=True)
    actor = Text(load_default=None)
    payload = JsonText(empty="{}")


class LookBody(Body):
    """POST /runs/:id/gates/:gateId/look"""

    token = Text(required=True)


class WaitFor(Body):
    """What a run waits for: one of these."""

    gate_id = Name()
    event = Name()
    until = Time()
    children = Names()
    n = Whole(1, MAX_SIGNALS)  # of an event: which of its signals
    step_id = Name()  # the step that records the wait, and ends with it

    def check_whole(self, checked: dict[str, Any]) -> None:
        """:raises ValidationError: none of them is there, or more than one."""
        if len(checked.keys() - {"n", "step_id"}) != 1:
            raise ValidationError("must be one of gateId, event, until and children")
        if "n" in checked and "event" not in checked:
            raise ValidationError("is the number of an event", "n")


class Wait(Nested):
    """A WaitFor as the JSON that the run keeps and shows, with the names of the wire."""

    def __init__(self, **options: Any) -> None:
        super().__init__(WaitFor, **options)

    def deserialize(self, value: Any, attr: str | None = None, data: Any = None, **kwargs: Any) -> Any:
        return to_json({camel(name): one for name, one in super().deserialize(value).items()})


class WaitBody(HeldFields):
    """POST /runs/:id/wait"""

    wait_for = Wait(data_key="for", required=True)
    timeout_ms = Whole(1, MAX_MS, load_default=None)


class SignalBody(OwnerFields):
    """POST /runs/:id/signals"""

    id = Id(load_default=None)
    name = Name(required=True)
    payload = JsonText()


class ExpireSignalBody(HeldFields):
    """POST /runs/:id/signals/:name/expire"""

    n = Whole(1, MAX_SIGNALS, load_default=1)


# ------------------------------------------------------------------------------
# Bodies of state, snapshots and usage: the schemas of their routes.
# ------------------------------------------------------------------------------
class VersionMetadata(Body):
    """What describes a version of the state."""

    id = Id()
    label = Name()
    reason = Text()
    importance = Choice("transient", "normal", "checkpoint", "milestone")
    metadata = JsonObject()
    created_by = Text()
    step_id = Text()


class PutStateBody(VersionMetadata, OwnerFields):
    """PUT /runs/:id/state"""

    value = JsonValue()
    stream = Name(load_default="run")
    if_version = Whole(0, 2**31 - 1, load_default=None)


class PatchStateBody(PutStateBody):
    """PATCH /runs/:id/state"""

    value = JsonObject()


class SaveStateBody(VersionMetadata, OwnerFields):
    """POST /runs/:id/state/save"""

    label = Name(required=True)
    stream = Name(load_default="run")


class SnapshotTarget(Body):
    """What a snapshot is a picture of."""

    type = Name(required=True)
    id = Name(required=True)


class SnapshotBody(VersionMetadata, OwnerFields):
    """POST /runs/:id/snapshots"""

    label = Name(required=True)
    state = JsonValue()
    target = Nested(SnapshotTarget, load_default=None)


class UsageBody(OwnerFields):
    """POST /runs/:id/usage"""

    id = Id(load_default=None)
    step_id = Text()
    kind = Name(load_default="custom")
    provider = Text()
    model = Text()
    label = Text()
    quantity = Amount()
    unit = Text()
    input_tokens = Whole(0, 2**53)
    output_tokens = Whole(0, 2**53)
    total_tokens = Whole(0, 2**53)
    cost_usd = Amount()
    metadata = JsonObject()


# ------------------------------------------------------------------------------
# Bodies of queues and schedules: the schemas of their routes.
# ------------------------------------------------------------------------------
class ClaimBody(Body):
    """POST /queues/claim"""

    queues = fields.List(Name(), required=True, validate=validate.Length(1, MAX_CLAIM_QUEUES))
    id = Id(load_default=None)
    lease_owner = Name(load_default=None)
    limit = Whole(1, 100, load_default=1)
    workflows = fields.List(Name(), load_default=None, validate=validate.Length(0, MAX_WORKFLOWS))
    wait_ms = Whole(0, MAX_WAIT_MS, load_default=0)
    checkpoints = Flag(load_default=False)


class QueueConfigBody(Body):
    """PUT /queues/:queue/config"""

    concurrency = Whole(1, 1_000_000, allow_none=True)
    rate_per_minute = Whole(1, 100_000_000, allow_none=True)
    invoke_url = Url(allow_none=True)
    paused = Flag()


class PreviewBody(Body):
    """POST /schedules/preview"""

    cron = Text(required=True)
    timezone = Text(load_default="UTC")


class ScheduleBody(PreviewBody):
    """PUT /schedules/:name"""

    workflow_name = Name(required=True)
    input = JsonText(empty="{}")
    queue = Name(load_default="default")
    max_attempts = Whole(1, MAX_ATTEMPTS, load_default=3)
    enabled = Flag(load_default=True)


class RunScheduleBody(Body):
    """POST /schedules/:name/run"""

    id = Id(load_default=None)


# ------------------------------------------------------------------------------
# Bodies of Studio, the page: the schemas of their routes.
# ------------------------------------------------------------------------------
MAX_QUERY = 16_000  # characters of a query string in a body
MAX_BULK = 1000     # ids of a bulk request
BULK_BATCH = 200    # runs that one bulk request acts on


class ChangesBody(Body):
    """POST /changes"""

    query = Text(0, MAX_QUERY, load_default="")
    known = fields.Dict(Id(), Text(0, 100), load_default=dict, validate=validate.Length(max=1000))


class BulkBody(Body):
    """POST /bulk"""

    action = Choice("cancel", "retry", "delete", required=True)
    ids = fields.List(Id(), validate=validate.Length(1, MAX_BULK), load_default=None)
    filter = Text(0, MAX_QUERY, load_default=None)
    dry_run = Flag(load_default=False)
    expected = Whole(0, 10_000_000, load_default=None)
    cursor = Text(0, 200, load_default=None)
    limit = Whole(1, BULK_BATCH, load_default=100)
    reason = Text(0, MAX_NAME, load_default=None)
    actor = Text(0, MAX_NAME, load_default=None)

    def check_whole(self, checked: dict[str, Any]) -> None:
        """:raises ValidationError: both are there, or neither."""
        if (checked["ids"] is None) == (checked["filter"] is None):
            raise ValidationError("must be there, or else filter", "ids")
