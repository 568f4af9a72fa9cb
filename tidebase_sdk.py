"""Tidebase for Python: wrap your steps, and a run that dies goes on from its last completed step.

The promise.  A step that completed is never executed again: its output lies in the server's Postgres and is what every
replay returns.  A run has one owner at a time; a process that lost it, frozen, cut off or killed, can no longer write.
Code between steps runs again whenever a run is resumed, so whatever must happen once belongs into a step.

Copy this one file into your app as `tidebase.py`.  CPython 3.9 to 3.13, standard library only.

    from tidebase import Tidebase

    tide = Tidebase()                              # TIDEBASE_URL, default http://localhost:7373

    @tide.workflow("greet")
    def greet(run, input):
        name = run.step("look up", lambda: {"name": input["user"].title()}, input=input)
        return run.step("greet", lambda: f"Hello {name['name']}", input=name)

    tide.enqueue("greet", input={"user": "ada"})   # durable when this returns
    tide.work()                                    # claims and executes until SIGTERM or Ctrl-C

The same awaited; steps may be sync or async functions:

    from tidebase import AsyncTidebase             # or, as in the package of that name: from tidebase.aio import ...

    async def main():
        async with AsyncTidebase() as tide:
            tide.workflow("fetch", fetch)          # async def fetch(run, input): await run.step("get", get_page)
            await tide.work(concurrency=200)

At run time `from tidebase.aio import ...` works with a single file.  For type checkers, which see no submodule there,
copy this file as `tidebase/__init__.py` and put `from tidebase import *` into `tidebase/aio.py`.

Rooms, in the order of reading: constants; errors; foundations; the public surface, which is the manual; a run's logic
(lease, names, steps, waiting, children); the worker; batching and heartbeats; requests and connections; helpers.
All times in arguments are seconds.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import contextvars
import copy
import difflib
import functools
import hashlib
import hmac
import http.client
import inspect
import itertools
import json
import json.encoder
import logging
import math
import os
import platform
import random
import re
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import types
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from opcode import opname
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Callable, Generic, NamedTuple, Optional, Protocol, TypeVar, cast, overload
from urllib.parse import quote, unquote, urlencode, urlsplit

__version__ = "0.1.0"
__all__ = [  # what `from tidebase import *` and tidebase.aio offer
    "AsyncRunContext", "AsyncRunSession", "AsyncTidebase", "BodyTooLarge", "Events", "FanoutFailed", "GateDecision",
    "LeaseLost", "RunCancelled", "RunCompleted", "RunContext", "RunFailed", "RunIdConflict", "RunPage", "RunSession",
    "RunSuspended", "SignalTimeout", "StepFailed", "StepInputMismatch", "StepNeedsReview", "StepTimeout", "Tidebase",
    "TidebaseError", "Unreachable", "WaitTimeout", "canonical_json", "input_hash", "new_run_id",
    "verify_webhook", "verify_webhook_signature",
]

logger = logging.getLogger("tidebase")  # sentences for a person; for programs the extras `event`, `run_id` and others

# ------------------------------------------------------------------------------
# Constants: times in seconds, and why each.
# ------------------------------------------------------------------------------

DEFAULT_URL = "http://localhost:7373"
TIMEOUT_S = 30.0  # a server restart takes a few seconds; half a minute of silence is worth an exception
BACKOFF_S = (0.05, 2.0)  # first and longest pause between repeats: most failures are dropped connections, few outages
TRIES_BEFORE_WARNING = 5  # of one request: about a second
RETRY_AFTER_CAP_S = 30.0  # however long a server asks to be left alone, ask again after this
LONG_POLL_S = 25.0  # the longest wait that the server grants one request
HEARTBEATS_PER_LEASE = 3  # two heartbeats may get lost before the lease does
FIRST_HEARTBEAT_S = 1.0  # a lease may be older than it looks: when the answer that gave it was a repeat's
LOCKED_POLL_S = (0.1, 2.0)  # first and longest pause before asking again for a step or child that another owner holds
STEP_BACKOFF_S = (0.5, 60.0)  # first and longest pause between the tries of a step with `retries`
GATE_POLL_S = 5.0  # one long poll: also the longest a stopping worker waits for a run at a gate
HOLD_S = 5.0  # a waiting run keeps its worker this long: leaving it costs a claim and a replay
UNKNOWN_PAUSE_S = 10.0  # after an older server gave a run of a workflow that is not registered here
SHUTDOWN_S = 25.0  # platforms send SIGKILL 30 s after SIGTERM
STREAM_SILENCE_S = 45.0  # an event stream sends a comment every 15 s: three missed, and the connection is dead
CONNECTIONS = 32  # requests of one event loop at once, long polls apart: more would only queue in the server
RUN_TOKEN_S = 900.0  # for a page to open its stream; one that stays open gets another token from its own server
RUN_TOKEN_MAX_S = 86_400.0  # a day: more is most likely milliseconds, by mistake
CLAIM_WAIT_S = 20.0  # how long a claim waits for work: below the 30 s after which proxies give up a silent request
CLAIM_S = 10.0  # beyond that for its answer, so that a server that hangs is noticed
CLAIM_PAUSE_S = 1.0  # at most, at random, on top of what the server asks for when too many requests wait there
STOP_CHECK_S = 0.1  # how soon a worker notices that it is to stop
RELEASE_S = 5.0  # for giving a run back; else the end of its lease does
SLOW_STEP_S = 0.25  # a step that takes longer is worth a request that lets it be seen as running
MAX_IN_FLIGHT = 2  # requests to /writes at once: while Postgres commits one, the server reads the other
GATHER_S = 0.001  # how long a request waits for the runs that the last one answered
BATCH_WRITES, BATCH_BYTES = 1_000, 4 << 20  # in one of them: the server takes no more, and 16 MiB
BEHIND_WRITES, BEHIND_BYTES, BEHIND_S = 64, 1 << 20, 1.0  # write-behind: what may be unrecorded; then a step waits
RECHECK_S = 1.0  # a waiting write looks this often whether anybody sends it: an event loop may have ended meanwhile
IDLE_THREAD_S = 10.0  # a thread that has nothing to do ends after this
EXPECT_BYTES, EXPECT_S = 1 << 20, 1.0  # of a larger body the head is sent first; and how long its answer is waited for
HEAD_BYTES, BLOCK_BYTES = 65_536, 65_536  # the longest head of an answer, and what is read at once
FANOUT = 16  # children that run at once in one process
CHILDREN_NAMED = 10_000  # in one request to wait for them: the server takes no more
CHILDREN_AT_ONCE = 100  # are created in one transaction, for whose end all other writes of their parent wait
MAX_NAME = 512  # characters of a step's name, and the like: the server takes no more
STACK_CHARS = 8_000  # of a traceback, its end: what a person reads
MESSAGE_CHARS = 2_000  # of an exception's message
EXCERPT_CHARS = 200  # of an input, where two are compared


# ------------------------------------------------------------------------------
# Errors: one class per refusal a caller can act on; `retryable` tells whether trying again can help.
# ------------------------------------------------------------------------------


class TidebaseError(RuntimeError):
    """The root: the server refused (`status` is set), or an answer never came.

    status: HTTP status or None.  code: the server's word for the case, for instance `not_found`.  path: what was asked
    for.  body: the server's JSON, its text where that is no JSON, None when there was no answer.
    Any exception, yours too, with an attribute `retryable = False` ends a step's retries and a queue's attempts.
    """

    retryable = True

    def __init__(self, message: str, status: int | None = None, body: Any = None, code: str | None = None,
                 path: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body, self.code, self.path = status, body, code, path


class Unreachable(TidebaseError):
    """No answer, repeats included, within the client's `timeout_s`.  The request may have been carried out."""


class LeaseLost(TidebaseError):
    """The run has another owner, or its lease ran out unrenewed: this process can no longer write for it."""


class FinalError(TidebaseError):
    """The root of those where trying again cannot help."""

    retryable = False


class RunCancelled(FinalError):
    """The run was cancelled."""

    @property
    def run_id(self) -> str | None:
        """The run, as the answer or else the path names it."""
        body = self.body if isinstance(self.body, dict) else {}
        run = body["run"] if isinstance(body.get("run"), dict) else body
        named = re.match("/runs/([^/?]+)", self.path or "")
        return run.get("id") or (unquote(named[1]) if named else None)


class RunIdConflict(FinalError, ValueError):
    """The run id belongs to a run of another workflow."""


class RunCompleted(FinalError):
    """`attach` found that the run has completed: there is nothing left to drive.  `result`: what it returned."""

    run_id = property(lambda self: self.body["id"])
    result = property(lambda self: self.body["result"])


class BodyTooLarge(FinalError):
    """A step's output, a result or an input is larger than the server's setting TIDEBASE_MAX_BODY allows."""


class StepInputMismatch(FinalError, ValueError):
    """A step of this name is recorded with another input.  Give each call its own name, or fork the run before it."""


class StepNeedsReview(FinalError):
    """A step may have had its effect without leaving a record.  A person decides: `tide.runs.review_step`.

    `body["step"]`: the step, with its id; the message says how to decide.
    """


class StepFailed(FinalError):
    """A person reviewed a step and decided that it has failed for good.  `body["step"]`: the step, with its error."""


class StepTimeout(TidebaseError):
    """A step's function took longer than its `timeout_s`."""


class RunFailed(FinalError):
    """A run that was waited for, a child for instance, failed for good.  `body`: the run, as far as it was recorded."""

    run_id = property(lambda self: self.body["id"])
    failure_class = property(lambda self: self.body["failureClass"])
    error = property(lambda self: self.body["error"], doc="What it failed with: JSON with name, message and stack.")


class FanoutFailed(TidebaseError):
    """Some children of a fanout failed; `errors` maps their names to what they raised."""

    def __init__(self, message: str, errors: dict[str, BaseException] | None = None) -> None:
        super().__init__(message)
        self.errors = errors or {}
        self.retryable = not errors or any(getattr(error, "retryable", True) for error in errors.values())


class WaitTimeout(TidebaseError, TimeoutError):
    """What was waited for did not come within `timeout_s`."""


class SignalTimeout(FinalError, WaitTimeout):
    """A signal did not come in time.  That is decided for good: every replay raises the same."""


class RunSuspended(BaseException):
    """Unwinds a workflow whose run leaves its worker, to wait or because the worker stops.

    `except Exception` does not see it, `finally` blocks run, and nothing counts as a failure.  Let it pass.
    """


# ------------------------------------------------------------------------------
# Foundations: what the classes below need when they are defined; to be skipped at first reading.
# ------------------------------------------------------------------------------

Json = dict[str, Any]  # the server's JSON as it came; keys that this file does not know are kept
JsonList = list[Json]
_Named = tuple[str, str]  # the kind of a call and its name, such as ("step", "fetch")
_Same = Optional[Callable[[], Optional[tuple[Any, ...]]]]  # tells what a call is called with: see _Calls.call
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Op = Generator[Any, Any, T]  # an operation: `value = yield driver.sleep(...)` waits for what a driver's method returned


class Blocking:
    """Marks surfaces whose operations block: those of Tidebase."""


class Awaited:
    """Marks surfaces whose operations are awaited: those of AsyncTidebase."""


M = TypeVar("M", Blocking, Awaited)

if TYPE_CHECKING:  # typing_extensions comes with type checkers; nothing of it is needed to run
    from typing_extensions import Concatenate, ParamSpec

    P = ParamSpec("P")
else:
    P = TypeVar("P")


class Surface(Generic[M]):
    """What hangs on a client.  Usable in `with` or `async with`, as the client is blocking or awaited."""

    _client: Client[M]

    def _leave(self, error: BaseException | None) -> Op[None]:
        """What leaving a `with` block does."""
        yield from ()

    def __enter__(self: S) -> S:
        if self._client._driver.awaited:
            raise TypeError("use `async with`: this belongs to an AsyncTidebase")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._client._driver.drive(self._leave(error))

    async def __aenter__(self: S) -> S:
        if not self._client._driver.awaited:
            raise TypeError("use `with`: this belongs to a Tidebase")
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self._client._driver.drive(self._leave(error))


S = TypeVar("S", bound=Surface[Any])


class op(Generic[P, T]):
    """A method written once, as a generator: see Op.  It blocks on Tidebase's surfaces, is awaited on AsyncTidebase's.
    Taken from the class it is the generator function: `yield from Runs.create(runs, ...)`."""

    def __init__(self, logic: Callable[Concatenate[Any, P], Op[T]]) -> None:
        @functools.wraps(logic)
        def blocking(surface: Surface[Any], *args: Any, **kwargs: Any) -> T:
            with _own_frames_hidden:
                result: T = surface._client._driver.drive(_call(logic, surface, args, kwargs))
                return result

        @functools.wraps(logic)
        async def awaited(surface: Surface[Any], *args: Any, **kwargs: Any) -> T:
            with _own_frames_hidden:
                result: T = await surface._client._driver.drive(_call(logic, surface, args, kwargs))
                return result

        self._logic, self._blocking, self._awaited = logic, blocking, awaited
        self.__doc__ = logic.__doc__

    @overload
    def __get__(self, surface: None, owner: object = None) -> Callable[Concatenate[Any, P], Op[T]]: ...
    @overload
    def __get__(self, surface: Surface[Blocking], owner: object = None) -> Callable[P, T]: ...
    @overload
    def __get__(self, surface: Surface[Awaited], owner: object = None) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, surface: Any, owner: object = None) -> Any:
        if surface is None:
            return self._logic
        return types.MethodType(self._awaited if surface._client._driver.awaited else self._blocking, surface)


def _call(method: Callable[..., Any], surface: Surface[Any], args: tuple[Any, ...], kwargs: Json) -> Any:
    """Call a method of a surface.  The TypeError for a misspelt argument says which there are."""
    try:
        return method(surface, *args, **kwargs)
    except TypeError:
        taken = list(inspect.signature(method).parameters)[1:]
        unknown = next((name for name in kwargs if name not in taken), None)
        if unknown is None:
            raise
    known = ", ".join(f"{name}=" for name in difflib.get_close_matches(unknown, taken) or taken)
    raise TypeError(f"{type(surface).__name__}.{method.__name__}() takes no {unknown}=, but {known}")


if TYPE_CHECKING:  # two methods whose types depend on more than `op` can say: what fn returns, and which client asks

    class _BlockingStep(Protocol[P]):
        def __call__(self, name: str, fn: Callable[..., T], *args: P.args, **kwargs: P.kwargs) -> T: ...

    class _AwaitedStep(Protocol[P]):
        @overload
        def __call__(self, name: str, fn: Callable[..., Awaitable[T]], *args: P.args,
                     **kwargs: P.kwargs) -> Coroutine[Any, Any, T]: ...
        @overload
        def __call__(self, name: str, fn: Callable[..., T], *args: P.args,
                     **kwargs: P.kwargs) -> Coroutine[Any, Any, T]: ...

    class step_op(Generic[P]):
        def __init__(self, logic: Callable[Concatenate[Any, str, Callable[..., Any], P], Op[Any]]) -> None: ...
        @overload
        def __get__(self, surface: None, owner: object = None) -> (
            Callable[Concatenate[Any, str, Callable[..., Any], P], Op[Any]]): ...
        @overload
        def __get__(self, surface: Surface[Blocking], owner: object = None) -> _BlockingStep[P]: ...
        @overload
        def __get__(self, surface: Surface[Awaited], owner: object = None) -> _AwaitedStep[P]: ...
        def __get__(self, surface: Any, owner: object = None) -> Any: ...

    class session_op(Generic[P]):
        def __init__(self, logic: Callable[Concatenate[Any, P], Op[Any]]) -> None: ...
        @overload
        def __get__(self, surface: None, owner: object = None) -> Callable[Concatenate[Any, P], Op[Any]]: ...
        @overload
        def __get__(self, surface: Surface[Blocking], owner: object = None) -> Callable[P, RunSession]: ...
        @overload
        def __get__(self, surface: Surface[Awaited], owner: object = None) -> (
            Callable[P, Coroutine[Any, Any, AsyncRunSession]]): ...
        def __get__(self, surface: Any, owner: object = None) -> Any: ...
else:
    step_op = session_op = op


class _ClientPart(Surface[M]):
    """A namespace of a client, such as `tide.runs`."""

    def __init__(self, client: Client[M]) -> None:
        self._client = client

    def _request(self, method: str, *parts: str, body: Any = None, member: str | None = None, **query: Any) -> Op[Any]:
        """Send a request to the path of these parts and return the answer, or one member of it."""
        answer = _request(self._client, method, _path(*parts, **query), body)
        return answer if member is None else _member(answer, member)


class _RunPart(Surface[M]):
    """A namespace of a run, such as `run.state`.  Its requests are repeated as long as the run is held."""

    def __init__(self, run: Run[M]) -> None:
        self._client = run._client
        self._run: Run[M] = run
        self._write_id = run._calls.write_id

    def _request(self, method: str, *parts: str, body: Json | None = None, **query: Any) -> Op[Json]:
        """Send a request below the run's path."""
        lease = self._run._lease
        yield from Run.flush(self._run)  # what leaves the run waits for all before it
        path = _path("runs", self._run.run_id, *parts, **query)
        body = body and {**body, "leaseOwner": lease.owner}  # a former owner's write is refused
        return (yield from _request(self._client, method, path, body, lease=lease))


# ------------------------------------------------------------------------------
# The public surface of a run: what a workflow is given.
# ------------------------------------------------------------------------------


class GateDecision(NamedTuple):
    """How a gate was decided.  status: approved, rejected or canceled (also by its timeout, actor `timeout`)."""

    gate_id: str
    name: str
    status: str
    decision: str | None
    actor: Any
    payload: Any

    @property
    def approved(self) -> bool:
        """Whether the answer was yes."""
        return self.status == "approved"

    def __bool__(self) -> bool:
        """Likewise, so that `if run.gate(...)` means what it says."""
        return self.approved


class State(_RunPart[M]):
    """`run.state`: a live value that your product can show.  Each write is a new version.

    Between steps a write is made once, also when the code runs again: a repeated call returns the state of the first
    time.  Within a step's function, and while a call is under way in another thread or task, each execution writes.
    """

    @op
    def set(self, value: Any, *, stream: str | None = None, label: str | None = None,
            reason: str | None = None, importance: str | None = None, metadata: Json | None = None,
            created_by: str | None = None, if_version: int | None = None) -> Op[Json]:
        """Replace the value; durable on return.  {"state": ...}.

        importance: transient, normal, checkpoint or milestone.  if_version: refuse (409 version_conflict) when the live
        version is another one.
        """
        body = {**_body(locals(), id=self._write_id("ver", "set", stream)), "value": value}
        answer = yield from self._request("PUT", "state", body=body)
        after = self._run._calls.last_call()
        _warn_of_differences(self._run.run_id, "the state that is written after", after, answer["state"], value=value)
        return answer

    @op
    def patch(self, value: Json, *, stream: str | None = None, label: str | None = None,
              reason: str | None = None, importance: str | None = None, metadata: Json | None = None,
              created_by: str | None = None, if_version: int | None = None) -> Op[Json]:
        """Merge into the top level of the value; else as `set`."""
        return self._request("PATCH", "state", body=_body(locals(), id=self._write_id("ver", "patch", stream)))

    @op
    def save(self, label: str, *, stream: str | None = None, reason: str | None = None,
             importance: str | None = None, metadata: Json | None = None,
             created_by: str | None = None) -> Op[Json]:
        """Label the current value; durable on return.  {"stateVersion": ...}.

        importance: default milestone.  Raises TidebaseError 404 when there is no value yet.
        """
        body = _body(locals(), id=self._write_id("ver", "save", stream, label))
        return self._request("POST", "state", "save", body=body)

    @op
    def versions(self, stream: str | None = None, labeled: bool | None = None) -> Op[JsonList]:
        """The versions, by stream and number; of one stream, or only those with a label."""
        only = None if labeled is None else str(labeled).lower()
        return _member(self._request("GET", "state", "versions", stream=stream, labeled=only), "stateVersions")


class Snapshots(_RunPart[M]):
    """`run.snapshots`: labeled states of things that the run works on.  Written once between steps, as `run.state`."""

    @op
    def create(self, label: str, state: Any, *, target: Json | None = None, reason: str | None = None,
               metadata: Json | None = None, created_by: str | None = None) -> Op[Json]:
        """Keep `state` under a label; durable on return.  {"snapshot": ...}.

        target: {"type": ..., "id": ...}, default the run itself.
        """
        body = {**_body(locals(), id=self._write_id("ver", "snapshot", label)), "state": state}
        answer = yield from self._request("POST", "snapshots", body=body)
        _warn_of_differences(self._run.run_id, "snapshot", label, answer["snapshot"], value=state)
        return answer

    @op
    def list(self) -> Op[JsonList]:
        """The run's labeled versions, newest first."""
        return _member(self._request("GET", "snapshots"), "snapshots")


class Usage(_RunPart[M]):
    """`run.usage`: the cost ledger.

    Between steps an entry is written once, also when the code runs again; other figures then log a warning, and those
    recorded first stay.  Within a step's function, and while a call is under way in another thread or task, each
    execution counts, since it was spent: record what a step spends within it, or after all side by side have ended.
    """

    @op
    def record(self, *, kind: str | None = None, provider: str | None = None, model: str | None = None,
               label: str | None = None, quantity: float | None = None, unit: str | None = None,
               input_tokens: int | None = None, output_tokens: int | None = None,
               total_tokens: int | None = None, cost_usd: float | None = None, metadata: Json | None = None,
               step_id: str | None = None) -> Op[Json]:
        """Record what was used, once; durable on return.  {"usage": ...}.  total_tokens defaults to the sum.

        ValueError when nothing is given.
        """
        given = _body(locals(), "step_id")
        if not given:
            raise ValueError("usage.record() needs what was used: model=, input_tokens=, cost_usd= or the like")
        body = _body(step_id=step_id, id=self._write_id("use", "usage", kind, provider, model, label)) | given
        answer = yield from self._request("POST", "usage", body=body)
        figures = {key: value for key, value in body.items() if key not in ("metadata", "stepId")}
        _warn_of_differences(self._run.run_id, "usage", answer["usage"]["id"], answer["usage"], **figures)
        return answer


class RunGates(_RunPart[M]):
    """`run.gates`: a gate's two halves, for code that looks again later instead of waiting in `run.gate`.

    Both return {"gateId", "name", "status", "decision", "actor", "payload", "gate"}; gate: the server's JSON.
    """

    @op
    def begin(self, name: str, prompt: str, *, data: Any = None, channels: Sequence[Json] | None = None,
              capability: Any = None, timeout_s: float | None = None) -> Op[Json]:
        """Open the gate of exactly this name, or find it, however often it is called; durable on return.

        The name is not numbered here.  What was asked first stays; a warning is logged when prompt or data differ.
        """
        answer = yield from self._request("POST", "gates", "begin", body=_body(locals()))
        _warn_of_differences(self._run.run_id, "gate", name, answer["gate"], prompt=prompt, data=data)
        return _gate_json(answer["gate"])

    @op
    def get(self, gate_id: str) -> Op[Json]:
        """The gate as it stands.  Raises RunCancelled when the run is cancelled."""
        answer = yield from self._request("GET", "gates", gate_id)
        if answer["runStatus"] == "cancelled":
            self._run._lease.cancelled(answer)
        return _gate_json(answer["gate"])


class Run(Surface[M]):
    """What a workflow is given.  Its methods may be called from several threads or tasks of one workflow.

    Attributes: run_id, name (of the workflow), attempt (1, 2, 3 ...), input and metadata as the server stores them.

    Waiting: `gate`, `sleep`, `wait_for_signal`, and `child` and `fanout` with a `queue`, may take days.  A run from a
    queue then leaves its worker: RunSuspended unwinds the workflow, `finally` blocks run, `except Exception` does not
    see it.  When what it waits for is there, any worker calls the workflow from its first line again, completed steps
    return what they returned, and the wait is over.  So code between steps runs again, more often than once; whatever
    must happen once belongs into a step, and what a `finally` block undoes must be made again on the way back.  Under
    `tide.run` and `attach` a run waits in place, under heartbeats, and so does one that does something else meanwhile.

    Names: each call is its own.  The second `step("page", ...)` of an execution is recorded as `page#2`, the third as
    `page#3`, in the order of calls, and so are gates, children, fanouts, sleeps and waits for signals; a replay makes
    the same calls in the same order and finds each.  Where calls come and go between executions, or run side by side,
    give each a name of its own, such as f"page-{url}": two calls of one name at the same time raise ValueError.  A step
    that failed and is called again, by `except` and a loop, with the same input (without one: the same function with
    the same captured values) is the same step, tried once more; so is a child or fanout that is executed here.  A call
    from within the function of a step is recorded as `STEP/name`.

    A loop of your own that tries a step again must not show it the number of the try: `lambda: ask(attempt)` is another
    call each time, which takes the next number, and a replay, which starts over with the first try, may go another way
    than the record; a warning says so at its end.  Use `retries=`, or a call that is the same each time.

    hold_s, on several methods: a run from a queue waits this long with its worker, then without one.
    """

    def __init__(self, client: Client[M], run: Json, lease: _Lease, begun: Mapping[str, Any],
                 may_leave: bool = False) -> None:
        """begun: the answer that gave the lease, with the checkpoints.  may_leave: to wait without a worker."""
        self._client, self._lease, self._record = client, lease, run
        self._may_leave = may_leave and run.get("queue") is not None  # else nobody would bring it back
        self.run_id: str = run["id"]
        self.name: str = run["workflowName"]
        self.attempt: int = run.get("attempt", 0)
        self.input: Any = run.get("input")
        self.metadata: Any = run.get("metadata")
        self._checkpoints: dict[str, Json] = {step["name"]: step for step in begun.get("checkpoints", ())}
        self._has_all_checkpoints = begun.get("checkpointsTruncated") is False
        self._calls = _Calls(self.run_id)
        self.state: State[M] = State(self)
        self.snapshots: Snapshots[M] = Snapshots(self)
        self.usage: Usage[M] = Usage(self)
        self.gates: RunGates[M] = RunGates(self)
        self._step_failures: list[tuple[BaseException, str]] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.run_id} of {self.name}>"

    # Other spellings of the same: `run.state_set(...)` is `run.state.set(...)`.
    state_set = property(lambda self: self.state.set)
    state_patch = property(lambda self: self.state.patch)
    state_save = property(lambda self: self.state.save)
    usage_record = property(lambda self: self.usage.record)
    gates_begin = property(lambda self: self.gates.begin)
    gates_get = property(lambda self: self.gates.get)

    @step_op
    def step(self, name: str, fn: Callable[..., Any], *, input: Any = None, input_hash: str | None = None,
             retries: int = 0, timeout_s: float | None = None, side_effects: str | Sequence[str] | None = None,
             idempotency_key: str | None = None, replay: str | None = None, checkpoint_invariant: Any = None,
             verified_by: Any = None, credentials: Any = None) -> Op[Any]:
        """Execute fn once and return its output; where the step completed before, return that output instead.

        On return the output is in Postgres (with write-behind: on its way there).  It is what JSON gives back, the
        first time as in every replay: a tuple comes as a list.  fn takes no argument, or the input when there is one
        and fn requires exactly one.  A plain step, one without side effects, is written once, at its end; one with
        side effects also before fn is called, so that no try goes unseen.

        input: what the output depends on, any JSON; a replay with another input is refused.
        input_hash: what to compare instead of the hash of the input.
        retries: further tries after a failure, each recorded, with growing pauses; ValueError unless replay is "auto".
        timeout_s: then StepTimeout, as one try that failed.  A sync function cannot be stopped: it runs on in its
        thread beside what comes next, its result unused, and a warning says so.  So it is when a call on AsyncTidebase
        is cancelled, by asyncio.wait_for say: the step is recorded as failed while its thread runs on.  Use an async
        function there, or declare what the function changes outside.  Nor does a future's result(timeout=) stop a step
        in a thread of yours: the run that ends before it does records it as failed, and logs a warning.
        side_effects: what fn changes outside ("email", "file"; "read" changes nothing).  With some, and neither an
        idempotency_key nor replay="auto", a try whose outcome nobody knows waits for a person (StepNeedsReview).
        replay: "auto", "manual" or "never", when it must not be derived from these.
        checkpoint_invariant, verified_by, credentials: notes for whoever looks at the run, any JSON.

        Raises what fn raised; TypeError for an output JSON cannot say, BodyTooLarge for one that the server does not
        take; StepInputMismatch, a ValueError; StepNeedsReview, StepFailed; LeaseLost and RunCancelled, then again at
        every later boundary, so that `except Exception` around a step holds up nothing.
        """
        self._lease.boundary()
        if not callable(fn):
            raise TypeError(f"step {name!r} takes a function, not {fn!r}: pass `lambda: f()`, not `f()`")
        if retries or timeout_s is not None or side_effects is not None or idempotency_key is not None:
            _check(retries=retries, timeout_s=timeout_s, side_effects=side_effects, idempotency_key=idempotency_key)
        step = _Step(self, name, fn, input, input_hash, retries, timeout_s)
        with self._calls.call(("step", name), same=step.called_with, executes=True) as (step.name,):
            known = step.checkpoint()
            if known is not None:
                return known["output"]  # as it came: a name is used once, so nobody else gets it
            if (side_effects or idempotency_key or replay or retries or timeout_s or checkpoint_invariant
                    or verified_by or credentials):
                step.declare(side_effects, credentials, idempotency_key=idempotency_key, replay=replay,
                             checkpoint_invariant=checkpoint_invariant, verified_by=verified_by)
            return (yield from step.execute())

    @op
    def gate(self, name: str, prompt: str, *, data: Any = None, channels: Sequence[Json] | None = None,
             capability: Any = None, timeout_s: float | None = None, hold_s: float = HOLD_S,
             poll_s: float = GATE_POLL_S) -> Op[GateDecision]:
        """Wait until a person has decided.  The decision is durable: a replay returns it at once.

        What was asked first stays: a replay with another prompt or other data logs a warning.
        timeout_s: then the gate is canceled, actor `timeout`.  poll_s: how long one request of a run that waits in
        place is held (at most 25).  Raises RunCancelled, LeaseLost.
        """
        with self._calls.call(("gate", name)) as (name,):
            with self._calls.executing():  # the run does not leave before it has asked all that it asks at once
                gate = yield from RunGates.begin(
                    self.gates, name, prompt, data=data, channels=channels, capability=capability, timeout_s=timeout_s
                )
            gate_id = gate["gateId"]

            def read(wait_s: float) -> Op[Json | None]:
                answer = yield from _long_poll(self, wait_s, "gates", gate_id)
                return answer["gate"] if answer["gate"]["status"] != "pending" else None

            if gate["status"] == "pending":
                decided = yield from _wait_for(
                    self._client, {"gateId": gate_id}, read, run=self, hold_s=hold_s, poll_s=poll_s)
                gate = _gate_json(cast(Json, decided))
            return GateDecision(gate_id, *(gate[key] for key in ("name", "status", "decision", "actor", "payload")))

    @op
    def sleep(self, seconds: float | None = None, *, until: datetime | None = None, name: str | None = None,
              hold_s: float = HOLD_S) -> Op[None]:
        """Sleep for some seconds, or until a time (a datetime without time zone is local).  A replay does not again.

        When it ends is fixed at the first call, by the database's clock, in the step `sleep:NAME`, which completes when
        the sleep is over; other seconds in a later version of your code do not move it.  name: default 1, 2, 3 ... in
        the order of calls, so name sleeps whose order may change.  hold_s: a run from a queue sleeps with its worker
        when no more than this is left.  Raises RunCancelled, LeaseLost.
        """
        if (seconds is None) == (until is None):
            raise ValueError("sleep() needs either seconds or until")
        _check(seconds=seconds, until=until)
        with self._calls.call(("step", f"sleep:{name or self._calls.count('sleep', '')}")) as (label,):
            wait = _Step(self, label, None, {"seconds": seconds, "until": _iso(until)}, NULL_HASH)
            step = yield from wait.begin_wait()
            if step["status"] == "completed":
                return
            asked = step["input"]
            moment = _moment(asked["until"] or step["createdAt"]) + timedelta(seconds=asked["seconds"] or 0)
            ends = self._lease.monotonic_at(moment)
            hold_s = hold_s if ends - time.monotonic() <= hold_s else 0.0
            condition = {"until": _iso(moment), "stepId": step["id"]}
            yield from _wait_for(self._client, condition, None, ends, run=self, hold_s=hold_s, poll_s=GATE_POLL_S)
            yield from wait.end_wait(None)

    @op
    def wait_for_signal(self, name: str, timeout_s: float | None = None, *, hold_s: float = HOLD_S) -> Op[Any]:
        """Wait for a signal of this name (`tide.runs.signal`) and return its payload, in every replay the same.

        Signals are kept until asked for: the first wait for a name takes the first signal of that name, the second wait
        the second.  timeout_s: then SignalTimeout, for good; a signal sent later is for the next wait.  It counts from
        the first call.  The step `signal:NAME` records the wait and completes when it is over.  Raises RunCancelled,
        LeaseLost.
        """
        _check(timeout_s=timeout_s)
        with self._calls.call(("step", f"signal:{name}")) as (label,):
            number = self._calls.count("signal", name)

            def read(wait_s: float) -> Op[Json | None]:
                return _member(_long_poll(self, wait_s, "signals", name, n=number), "signal")

            wait = _Step(self, label, None, {"timeoutS": timeout_s}, NULL_HASH)
            step = yield from wait.begin_wait()
            signal = step["output"]
            if step["status"] != "completed":
                asked_s = step["input"]["timeoutS"]
                ends = math.inf if asked_s is None else (
                    self._lease.monotonic_at(_moment(step["createdAt"]) + timedelta(seconds=asked_s)))
                condition = {"event": name, "n": number, "stepId": step["id"]}
                signal = yield from _wait_for(
                    self._client, condition, read, ends, run=self, hold_s=hold_s, poll_s=GATE_POLL_S)
                if signal is None:  # the server decides which came first, the signal or the end
                    path = _path("runs", self.run_id, "signals", name, "expire")
                    body = {"n": number, "leaseOwner": self._lease.owner}
                    signal = yield from _member(_request(self._client, "POST", path, body, lease=self._lease), "signal")
                yield from wait.end_wait(signal)
            if signal["timedOut"]:
                raise SignalTimeout(f"signal {name!r} did not come in time", code="signal_timeout")
            return signal["payload"]

    @op
    def child(self, workflow_name: str, workflow: str | Callable[..., Any] | None = None, *, name: str | None = None,
              input: Any = None, metadata: Json | None = None, recovery_webhook: str | None = None,
              channels: Sequence[Json] | None = None, edge_type: str | None = None,
              edge_metadata: Json | None = None, queue: str | None = None, max_attempts: int | None = None,
              priority: int | None = None, recovery_secret: str | None = None) -> Op[Any]:
        """Run a workflow as a child run and return its result.  A child that completed is not run again.

        workflow: a function, or the name of a registered one; default the one registered as workflow_name.
        name: the child's name in the record, default workflow_name.  A child keeps the input it was made with: a replay
        with another one logs a warning.  Without a queue the child runs here and now; this raises what it raises.

        queue: any worker that serves it runs the child, up to max_attempts (3) times; it finds the workflow by
        workflow_name, which need not be known here, and a run from a queue waits without a worker meanwhile.  Raises
        RunFailed when the child failed for good, also in a replay, until `tide.runs.retry` puts it back; RunCancelled.
        """
        given = locals()
        fn, body = _describe_child(self, {**given, "name": name or workflow_name})
        same = None if queue is not None else functools.partial(_child_key, body)
        with self._calls.call(("child", body["name"]), same=same) as (label,):
            return (yield from _run_child(self, fn, {**body, "name": label}))

    @op
    def fanout(self, name: str, children: Sequence[Mapping[str, Any]], *, checkpoint: str | bool | None = None,
               queue: str | None = None, return_errors: bool = False) -> Op[list[Any]]:
        """Run children side by side and return their results, in order.

        children: mappings of {"name", "workflow", "workflow_name", "input", ...}, the arguments of `child`.
        workflow_name: default workflow where that is a name, else the child's name or, with a queue, what the function
        is registered as.  queue: they are run by the workers that serve it, as many at once as there are places, while
        a run from a queue waits without a worker; one child may name another queue.  Without, they run here, 16 at
        once.  A child whose name the run has used is numbered, too, in the order of the list.
        checkpoint: the joined results are recorded in the step `join:CHECKPOINT`, so that a replay asks for no child;
        default the fanout's name; False: they are not.

        All children end before FanoutFailed is raised, which names each that failed; those that completed are not run
        again.  return_errors: instead, RunFailed or RunCancelled stands in the list where a result would.
        """
        self._lease.boundary()
        described = [_describe_child(self, {**child, "queue": child.get("queue") or queue}) for child in children]
        bodies = [body for _, body in described]
        same = None if queue is not None else lambda: tuple(itertools.chain(*map(_child_key, bodies)))
        asked = [("child", body["name"]) for body in bodies]
        with self._calls.call(("fanout", name), *asked, same=same) as (label, *names):
            for body, child in zip(bodies, names):
                body.update(name=child, edgeType=body.get("edgeType", "fanout"),
                            edgeMetadata={"fanout": label, **body.get("edgeMetadata", {})})
            if checkpoint is False:
                return _unpack_results((yield from _join_fanout(self, name, described, return_errors)), names)
            wanted = {"fanout": label, "join": "all", "children": names}
            join_name = f"join:{checkpoint if isinstance(checkpoint, str) else label}"
            with self._calls.call(("step", join_name), same=same) as (join,):
                joined: Any = None
                step = _Step(self, join, lambda: joined, wanted, None)
                known = step.checkpoint()
                if known is not None:
                    return _unpack_results(known["output"], names)
                joined = yield from _join_fanout(self, name, described, return_errors)
                with self._calls.executing():
                    recorded = yield from step.execute()
                return _unpack_results(recorded, names)

    @op
    def flush(self) -> Op[None]:
        """Wait until every step that has returned is in Postgres.  Without write-behind they are, when they return.

        Raises what the first record that was refused was refused with (StepInputMismatch, BodyTooLarge ...), LeaseLost,
        RunCancelled.  Flushing again does nothing more.
        """
        yield from _settle_writes(self)
        self._lease.boundary()


class RunContext(Run[Blocking]):
    """What a workflow of Tidebase is given: see Run."""


class AsyncRunContext(Run[Awaited]):
    """What a workflow of AsyncTidebase is given: see Run.  Its methods are awaited."""


class Session(Run[M]):
    """What RunSession and AsyncRunSession share."""

    @property
    def run(self) -> Json:
        """The run, as the server answered last."""
        return self._record

    @op
    def heartbeat(self) -> Op[Json]:
        """Renew the lease now; a background thread does it anyway, see `heartbeat_s`.  {"run"}.

        Raises LeaseLost, RunCancelled.
        """
        self._lease.fence()
        sent, body = time.monotonic(), {"leaseOwner": self._lease.owner}
        path = _path("runs", self.run_id, "heartbeat")
        answer = yield from _request(self._client, "POST", path, body, lease=self._lease)
        self._lease.renew(sent)
        self._record = answer["run"]
        return answer

    @op
    def complete(self, result: Any = None) -> Op[Json]:
        """End the run well; durable on return, as are all its steps.  {"run"}.

        Raises LeaseLost, RunCancelled, BodyTooLarge.
        """
        _, answer = yield from _complete(self, result, brief=False)
        self._let_go(answer["run"])
        return answer

    @op
    def fail(self, error: BaseException | Json | str) -> Op[Json]:
        """End the run badly, with an exception, words or JSON; durable on return.  {"run", "requeued"}.

        A queue run with attempts left is queued again.  Raises LeaseLost, RunCancelled.
        """
        self._lease.fence()
        answer = yield from _fail(self, error)
        self._let_go(answer["run"])
        return answer

    @op
    def close(self) -> Op[None]:
        """Stop the heartbeats; a run that has not ended is given back.  Closing twice does nothing."""
        if self._lease.gone() is None:
            yield from _give_back(self)
        self._let_go()

    def _let_go(self, run: Json | None = None) -> None:
        self._record = run or self._record
        self._client._heartbeater.remove(self._lease)
        self._lease.become("ended", *_LIVE)

    def _leave(self, error: BaseException | None) -> Op[None]:
        if isinstance(error, Exception) and self._lease.gone() is None:
            with _logged(self, "failure"):
                yield from Session.fail(self, error)
        yield from Session.close(self)


class RunSession(Session[Blocking], RunContext):
    """A run driven by your own code, from `tide.attach`: steps as in a workflow, and you say how it ends.

    In `with`: an exception fails the run, and leaving without `complete` or `fail` gives it back.
    """


class AsyncRunSession(Session[Awaited], AsyncRunContext):
    """The same for `async with`, from `AsyncTidebase.attach`; its methods are awaited."""


# ------------------------------------------------------------------------------
# The public surface of a client: runs, events, gates, queues, schedules, and the two clients themselves.
# ------------------------------------------------------------------------------


class RunPage(JsonList):
    """A list of runs, and `next_cursor`: what to pass as `before` for the runs that follow; None at the end."""

    next_cursor: str | None = None


class Runs(_ClientPart[M]):
    """`tide.runs`: create, look at and steer runs.  All answers are the server's JSON."""

    @op
    def create(self, workflow_name: str, input: Any = None, metadata: Json | None = None,
               recovery_webhook: str | None = None, channels: Sequence[Json] | None = None, *,
               run_id: str | None = None, deadline_s: float | None = None,
               recovery_secret: str | None = None) -> Op[Json]:
        """Create a run without a queue, or get the one of this run_id; durable on return.  Returns the run.

        An existing run keeps its input: a warning is logged when another one is given, which takes another run_id, or
        `fork`.  Raises RunIdConflict, which is a ValueError, too, when run_id is of another workflow.
        """
        given = locals()
        path, body = _path("runs", workflow_name), _body(given, "workflow_name", "run_id", id=run_id or new_run_id())
        answer = yield from _request(self._client, "POST", path, body)
        run: Json = answer["run"]
        if not answer.get("created", True) and input is not None:
            _warn_of_differences(run["id"], "workflow", workflow_name, run, input=input)
        return run

    @op
    def get(self, run_id: str, *, include: Sequence[str] | None = None) -> Op[Json]:
        """Everything about a run: run, steps, state, gates, usage, events ...; include: only these parts."""
        parts = None if include is None else ",".join(include)
        return self._request("GET", "runs", run_id, include=parts)

    @op
    def list(self, *, status: str | None = None, workflow: str | None = None, queue: str | None = None,
             metadata: Mapping[str, Any] | None = None, before: str | None = None,
             limit: int | None = None) -> Op[RunPage]:
        """The runs, newest first, 100 unless limit.  The list's `next_cursor` is the `before` of the runs that follow.

        Only those of a status, workflow or queue, or with these metadata: texts, numbers, True, False or None.
        """
        _check(metadata=metadata, limit=limit)
        marks = {f"metadata.{key}": value if isinstance(value, str) else _encode(value, f"metadata={key!r}").decode()
                 for key, value in (metadata or {}).items()}
        answer = yield from self._request("GET", "runs", status=status, workflow=workflow, queue=queue, before=before,
                                          limit=limit, **marks)
        page = RunPage(answer["runs"])
        page.next_cursor = answer["nextCursor"]
        return page

    @op
    def cancel(self, run_id: str, reason: str | None = None, actor: str | None = None) -> Op[Json]:
        """Cancel at once, from any state but completed (TidebaseError 409).  Returns the run, cancelled.

        Whoever executes it is unwound at its next boundary.
        """
        body = _body(locals(), "run_id")
        return _member(_request(self._client, "POST", _path("runs", run_id, "cancel"), body), "run")

    @op
    def wait(self, run_id: str, timeout_s: float | None = None) -> Op[Any]:
        """Wait until a run has ended and return its result; the server holds the request, nothing is polled.

        Raises RunFailed, with failure_class and error, when it failed for good; RunCancelled; WaitTimeout, which is a
        TimeoutError, after timeout_s (default: never), and the run goes on; TidebaseError 404.
        """
        _check(timeout_s=timeout_s)
        ends = math.inf if timeout_s is None else time.monotonic() + timeout_s

        def read(wait_s: float) -> Op[Json | None]:
            answer = yield from _request(self._client, "GET", _path("runs", run_id, wait_ms=_ms(wait_s)), wait_s=wait_s)
            return answer["run"] if _has_ended(answer["run"]) else None

        run = yield from _wait_for(self._client, None, read, ends)
        if run is None:
            raise WaitTimeout(f"run {run_id} has not ended within {timeout_s:g} s", code="wait_timeout")
        outcome = _outcome(run)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @op
    def signal(self, run_id: str, name: str, payload: Any = None) -> Op[Json]:
        """Send a signal to a run, for its `wait_for_signal`; durable on return.  Returns the signal.

        Its `n` is its number among those of its name: the n-th wait for the name takes it.
        """
        body = _body(name=name, payload=payload, id=_new_id("sig"))
        return self._request("POST", "runs", run_id, "signals", body=body, member="signal")

    @op
    def retry(self, run_id: str) -> Op[Json]:
        """Put a failed or cancelled run back, its checkpoints kept.  Returns the run, queued or pending."""
        return self._request("POST", "runs", run_id, "retry", body={}, member="run")

    @op
    def rerun_plan(self, run_id: str) -> Op[Json]:
        """What a resume of the run would do now, step by step, and whether that is safe.

        {"safe", "verdict", "steps": [{"name", "plan", "reason", ...}], "blocking": names, "actions", ...}; plan is
        "replays", "runs", "runs_again", "stops_for_review" or "never".  TidebaseError 404.
        """
        return self._request("GET", "runs", run_id, "rerun")

    @op
    def recover(self, run_id: str, reason: str = "manual") -> Op[Json]:
        """Have the run's recovery webhook called.  {"recoveryAttempt"}; TidebaseError 422 without one."""
        return self._request("POST", "runs", run_id, "recover", body={"reason": reason})

    @op
    def fork(self, run_id: str, *, from_step: str | None = None, input: Any = None,
             queue: str | None = None) -> Op[Json]:
        """A new run of the same workflow that starts with copies of the checkpoints before from_step.  Returns it.

        They answer whatever input the workflow's steps are called with in the fork.  input: the fork's; None: the same.
        queue: where it waits for a worker; None: the queue of the run it is forked from.  Where that has none either,
        `tide.run(name, workflow, run_id=...)` with its id runs it, or the recovery webhook that it has from that run.
        """
        body = _body(locals(), "run_id", id=new_run_id())
        return self._request("POST", "runs", run_id, "fork", body=body, member="run")

    @op
    def review_step(self, run_id: str, step_id: str, decision: str, *, output: Any = None,
                    actor: str | None = None) -> Op[Json]:
        """Decide an ambiguous step: "retry", "complete" (with its output) or "fail" (it raises StepFailed).

        The run goes on: a failed one from a queue is queued again, another gets its recovery webhook, if it has one.
        Returns the step.
        """
        body = _body(locals(), "run_id", "step_id")
        return self._request("POST", "runs", run_id, "steps", step_id, "review", body=body, member="step")

    def token(self, run_id: str, *, ttl_s: float = RUN_TOKEN_S) -> str:
        """A run token: what you give a browser for its EventSource, instead of the key, which opens everything.

        It opens GET /runs/:id/events of this one run, as `?token=` or `Authorization: Bearer`, and nothing else, until
        it expires by the server's clock; a stream ends then, too.  It is computed here, from the client's key: nothing
        is sent or stored, and only a change of the key takes it back.
        ttl_s: seconds until it expires, rounded up to a whole one, at most a day.  Raises ValueError for another;
        TidebaseError when the client has no key.
        """
        key = self._client.api_key
        if key is None:
            raise TidebaseError("this client has no API key, from which run tokens are made: give it api_key, or set "
                                "TIDEBASE_API_KEY; a server without a key needs no tokens", code="no_api_key")
        if not 0 < ttl_s <= RUN_TOKEN_MAX_S:
            raise ValueError(f"ttl_s is {ttl_s}; it takes seconds, more than 0 and at most {RUN_TOKEN_MAX_S:.0f}")
        expiry = math.ceil(time.time() + ttl_s)
        signed = f"tidebase-run-token.v1.{expiry}.{run_id}".encode()
        mac = base64.urlsafe_b64encode(hmac.new(key.encode(), signed, hashlib.sha256).digest()).decode()
        return f"v1.{expiry}.{mac.rstrip('=')}"

    @session_op
    def attach(self, workflow_name: str, *, run_id: str | None = None, input: Any = None,
               metadata: Json | None = None, recovery_webhook: str | None = None,
               channels: Sequence[Json] | None = None, heartbeat_s: float | None = 20.0,
               on_lease_lost: Callable[..., Any] | None = None, recovery_secret: str | None = None,
               write_behind: bool = False) -> Op[Any]:
        """Create or resume a run that your own code drives, and hold it: a RunSession, or an AsyncRunSession.

        heartbeat_s: at most this long between heartbeats, never longer than a third of the lease; None or 0: none, and
        the lease ends unless your writes and `session.heartbeat()` renew it.
        on_lease_lost: called once, with the error, from the thread that noticed.  write_behind: see `Tidebase.work`.
        Raises RunCompleted, which has the result; RunIdConflict; RunCancelled; TidebaseError 409 run_leased while
        another owner holds the run.
        """
        _check(heartbeat_s=heartbeat_s, on_lease_lost=on_lease_lost)
        run = yield from Runs.create(self, workflow_name, input, metadata, recovery_webhook, channels, run_id=run_id,
                                     recovery_secret=recovery_secret)
        answer = yield from _begin_run(self._client, run["id"])
        run, owner = answer["run"], answer["leaseOwner"]
        if owner is None:
            message = f"run {run['id']} of workflow {workflow_name!r} has completed"
            raise RunCompleted(message, body=run, code="run_completed")
        lease = _Lease(run, owner, self._client._driver.event(), write_behind=write_behind)
        lease.on_lost = on_lease_lost
        if heartbeat_s:
            lease.heartbeat_s = min(lease.heartbeat_s, heartbeat_s)
            self._client._heartbeater.add(lease)
        return self._client._session(self._client, run, lease, answer)

    def subscribe(self, run_id: str, after: int = 0, *, kinds: str | Sequence[str] | None = None) -> Events[M]:
        """The run's events after number `after`: history first, then live, until the run has ended.

        For `for`, `async for` or next().  Reconnects by itself; no event is lost or repeated.
        kinds: only events of these types, "step.failed" say, or "step" for all that begin so.
        Raises TidebaseError 404, and Unreachable when the server is away for longer than timeout_s.
        """
        return Events(self._client, run_id, after, [kinds] if isinstance(kinds, str) else kinds)


class Events(Surface[M]):
    """The events of a run, an iterator; `seq` is the number of the last one read.  In `with`, or with `close()`, the
    connection ends before the run does."""

    def __init__(self, client: Client[M], run_id: str, seq: int, kinds: Sequence[str] | None) -> None:
        self._client = client
        self.run_id, self.seq, self.ended = run_id, seq, False
        self._ended_at: int | None = None  # `seq` when the run was seen to have ended
        self._kinds = None if kinds is None else frozenset(kinds)
        self._connection: Any = None
        self._answer: Any = None  # on it
        self._bytes = b""  # of it: an event that is not complete yet
        self._ready: deque[Json] = deque()

    @op
    def next(self) -> Op[Json | None]:
        """The next event; None when the run has ended and all were seen."""
        tries, last_word = 0, time.monotonic()
        while not self._ready and not self.ended:
            try:
                yield from self._read()
                tries, last_word = 0, time.monotonic()
            except OSError as error:
                self.close()
                if time.monotonic() - last_word > self._client.timeout_s:
                    raise Unreachable(f"the event stream broke: {error}", path=f"/runs/{self.run_id}/events") from error
                tries += 1
                yield self._client._driver.sleep(_backoff(BACKOFF_S, tries))
            except BaseException:
                self.close()
                raise
        return self._ready.popleft() if self._ready else None

    def _read(self) -> Op[None]:
        """Wait for the next bytes; OSError where the stream ends before the run."""
        driver, ends = self._client._driver, time.monotonic() + STREAM_SILENCE_S
        if self._connection is None:
            path = _path("runs", self.run_id, "events", after=self.seq, follow="false")
            request = Request("GET", path, None, {"Accept": "text/event-stream"}, STREAM_SILENCE_S)
            self._connection, self._bytes = (yield driver.connect(ends)), b""
            self._answer = yield from _ask(driver.server, self._connection, request, ends)
            status = self._answer.status
            if status in (429, 502, 503, 504):
                raise ConnectionRefusedError(f"it answered {status}")
            if status != 200:
                raise _refusal(status, _loads((yield from _read_some(self._connection, self._answer, ends))), path)
        data = yield from _read_some(self._connection, self._answer, ends)
        if not data:  # the server has no more, or stops
            if self._ended_at == self.seq:
                self.ended = True
                self.close()
                return
            answer = yield from _request(self._client, "GET", _path("runs", self.run_id, include="run"))
            if _has_ended(answer["run"]):
                self._ended_at = self.seq  # what it wrote until then is asked for once more
            raise ConnectionResetError("the stream ended")
        events, self._bytes = _events_in(self._bytes + data)
        for event in events:
            if event["seq"] > self.seq:
                self.seq = event["seq"]
                if self._kinds is None or self._kinds & {event["type"], event["type"].partition(".")[0]}:
                    self._ready.append(event)
                self.ended = event["type"] in ("run.completed", "run.failed", "run.cancelled")
        if self.ended:
            self.close()

    def close(self) -> None:
        """Close the connection; iterating on opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _leave(self, error: BaseException | None) -> Op[None]:
        self.close()
        yield from ()

    def __next__(self: Events[Blocking]) -> Json:
        event = self.next()
        if event is None:
            raise StopIteration
        return event

    async def __anext__(self: Events[Awaited]) -> Json:
        event = await self.next()
        if event is None:
            raise StopAsyncIteration
        return event

    def __iter__(self: Events[Blocking]) -> Iterator[Json]:  # a loop that is left closes the connection
        try:
            while (event := self.next()) is not None:
                yield event
        finally:
            self.close()

    async def __aiter__(self: Events[Awaited]) -> AsyncIterator[Json]:
        try:
            while (event := await self.next()) is not None:
                yield event
        finally:
            self.close()


class Gates(_ClientPart[M]):
    """`tide.gates`: decide gates."""

    @op
    def resolve(self, run_id: str, gate_id: str, *, token: str, decision: str, actor: str | None = None,
                payload: Any = None) -> Op[Json]:
        """Decide a gate: approved, rejected or canceled; durable on return, exactly one decision counts.  {"gate"}.

        token: the gate's resolveToken.  Raises TidebaseError 409 when it is wrong or the gate was decided before.
        """
        body = _body(locals(), "run_id", "gate_id")
        return self._request("POST", "runs", run_id, "gates", gate_id, "resolve", body=body)


class Queues(_ClientPart[M]):
    """`tide.queues`: limits of queues, and how full they are."""

    @op
    def configure(self, name: str, *, concurrency: int | None = None, rate_per_minute: int | None = None,
                  invoke_url: str | None = None, clear: str | Sequence[str] = ()) -> Op[Json]:
        """Set limits that hold across all workers.  {"config"}.

        What is None stays as it is.  clear: what is to have no limit, or no address, from now on: ["concurrency"].
        """
        body = _body(locals(), "name", "clear")
        for setting in [clear] if isinstance(clear, str) else clear:
            if setting not in ("concurrency", "rate_per_minute", "invoke_url") or _camel(setting) in body:
                raise ValueError(f"clear takes settings that are not given a value here, not {setting!r}")
            body[_camel(setting)] = None
        return self._request("PUT", "queues", name, "config", body=body)

    @op
    def list(self) -> Op[JsonList]:
        """The queues, with their counts and configuration."""
        return self._request("GET", "queues", member="queues")


class Schedules(_ClientPart[M]):
    """`tide.schedules`: runs enqueued by the clock."""

    @op
    def set(self, name: str, *, cron: str, workflow_name: str, input: Any = None, queue: str = "default",
            max_attempts: int | None = None, enabled: bool = True, timezone: str | None = None) -> Op[Json]:
        """Create a schedule, or replace the one of this name.  Returns it.

        cron: five fields, in `timezone` (IANA name, default UTC); TidebaseError 400 names what is wrong with it.
        """
        return self._request("PUT", "schedules", name, body=_body(locals(), "name"), member="schedule")

    @op
    def list(self) -> Op[JsonList]:
        """The schedules."""
        return self._request("GET", "schedules", member="schedules")

    @op
    def delete(self, name: str) -> Op[Json]:
        """{"deleted": name}; TidebaseError 404 when there is none."""
        return self._request("DELETE", "schedules", name)

class Client(Surface[M]):
    """What Tidebase and AsyncTidebase share: everything but the driver.  `close()` it, or use it in `with`.

    url, api_key, webhook_secret: as given, or from the environment; `url` without a slash at its end.

    Of a new run, on several methods: deadline_s: it is cancelled when it has not ended by then.  recovery_webhook: an
    address that is called when it failed or its worker fell silent; recovery_secret signs that, instead of the server's
    TIDEBASE_WEBHOOK_SECRET.  channels: webhooks that are told its events, {"type": "webhook", "url", "secret",
    "events"}.
    """

    _is_awaited = False
    _driver: Any
    _context: Any  # the class of what a workflow is given
    _session: Any  # the class of what `attach` returns

    def __init__(self, url: str | None = None, api_key: str | None = None, webhook_secret: str | None = None,
                 *, timeout_s: float = TIMEOUT_S) -> None:
        """url, api_key, webhook_secret: default the environment's TIDEBASE_URL, TIDEBASE_API_KEY,
        TIDEBASE_WEBHOOK_SECRET.  timeout_s: how long a request is tried, repeats included; a request for a run that is
        held is tried until its lease is gone.  Nothing is sent yet."""
        _check(timeout_s=timeout_s)
        self._client = self
        self._server = _Server(
            url or os.environ.get("TIDEBASE_URL") or DEFAULT_URL,
            (api_key if api_key is not None else os.environ.get("TIDEBASE_API_KEY", "")).strip(),
        )
        self.webhook_secret = webhook_secret or os.environ.get("TIDEBASE_WEBHOOK_SECRET") or None
        self.timeout_s = timeout_s
        self._workflows: dict[str, Callable[..., Any]] = {}
        self._warned_of_secret = False
        self.runs: Runs[M] = Runs(self)
        self.queues: Queues[M] = Queues(self)
        self.schedules: Schedules[M] = Schedules(self)
        self.gates: Gates[M] = Gates(self)
        self._begin()
        _clients.add(self)

    def _begin(self) -> None:
        """Make what belongs to one process: connections, threads and what they have to send."""
        self._threads = _BlockingDriver(self._server)  # the heartbeats' on either client
        self._driver = _AsyncDriver(self._server) if self._is_awaited else self._threads
        self._heartbeater = _Heartbeater(self)
        self._batcher = _WriteBatcher(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._server.url}>"

    @property
    def url(self) -> str:
        """The server's address, without a slash at its end."""
        return self._server.url

    @property
    def api_key(self) -> str | None:
        """The key that is sent, None without one."""
        return self._server.api_key

    @overload
    def workflow(self, name: str) -> Callable[[F], F]: ...
    @overload
    def workflow(self, name: str, fn: F) -> F: ...
    def workflow(self, name: str, fn: Callable[..., Any] | None = None) -> Any:
        """Register workflow(run, input) or workflow(run) under a name: called, or as decorator @tide.workflow(NAME)."""
        if fn is None:
            if callable(name):
                raise TypeError("name= is missing: write @tide.workflow(\"NAME\"), with the workflow's name")
            return functools.partial(self.workflow, name)
        self._workflows[name], _ = self._registered(fn)
        return fn

    @op
    def request(self, method: str, path: str, body: Any = None) -> Op[Json]:
        """Send a request of the protocol that has no method here, and return the answer's JSON.

        path: percent-encoded, with its query.  A POST is sent once, since only you know whether a repeat does no harm;
        others are repeated until there is an answer.  Raises TidebaseError for an answer that is no success;
        Unreachable.
        """
        if not (path.startswith("/") and all("!" <= letter <= "~" for letter in path) and method.isalpha()):
            raise ValueError(f"a method and a percent-encoded path are needed, not {method!r} and {path!r}")
        once_s = self.timeout_s if method.upper() == "POST" else None
        return _request(self, method.upper(), path, body, once_s=once_s)

    @op
    def run(self, workflow_name: str, workflow: Callable[..., Any] | None = None, run_id: str | None = None,
            input: Any = None, metadata: Json | None = None, recovery_webhook: str | None = None,
            channels: Sequence[Json] | None = None, *, deadline_s: float | None = None,
            recovery_secret: str | None = None, write_behind: bool = False) -> Op[Any]:
        """Create a run, or resume the one of this run_id, execute it here under heartbeats and return its result.

        workflow: the function, default the one registered under workflow_name; it is given what the server has stored
        as input.  run_id: as in `runs.create`; a completed run returns its stored result, and nothing is executed.
        write_behind: see `work`; on return all is durable.

        Raises what the workflow raises, recorded before; RunIdConflict; TidebaseError 409 run_leased while another
        owner holds the run; RunCancelled, LeaseLost, Unreachable.
        """
        _check(workflow_name=workflow_name)
        fn, _ = self._registered(workflow_name if workflow is None else workflow)
        run = yield from Runs.create(self.runs, workflow_name, input, metadata, recovery_webhook, channels,
                                     run_id=run_id, deadline_s=deadline_s, recovery_secret=recovery_secret)
        return (yield from _begin_and_execute(self, run, fn, write_behind=write_behind))

    @op
    def enqueue(self, workflow_name: str, *, queue: str = "default", input: Any = None, metadata: Json | None = None,
                dedupe_key: str | None = None, delay_s: float | None = None,
                run_at: datetime | str | None = None, max_attempts: int | None = None,
                priority: int | None = None, deadline_s: float | None = None,
                recovery_webhook: str | None = None, channels: Sequence[Json] | None = None,
                recovery_secret: str | None = None) -> Op[Json]:
        """Put a run on a queue.  When this returns, it is in Postgres and will be offered to workers.

        dedupe_key: at most one live run per queue and key; a second call answers the first run, which keeps its input.
        delay_s or run_at (a
        datetime, without time zone local, or ISO-8601 text): not before then; both are a ValueError.  max_attempts: the
        server's default is 3.  priority: higher first.  Returns {"run", "deduplicated"}.
        Raises TidebaseError 400 with the fields named in its body; Unreachable, then the run may exist.
        """
        if delay_s is not None and run_at is not None:
            raise ValueError("enqueue() takes either delay_s or run_at, not both")
        body = _body(locals(), id=new_run_id())
        answer = yield from self._batcher.write("enqueue_run", _members(body), path=_path("queues", queue, "enqueue"))
        if answer["deduplicated"] and "input" in body and "payloadOmitted" not in answer["run"]:
            _warn_of_differences(answer["run"]["id"], "dedupe key", dedupe_key, answer["run"], input=input)
        return answer

    @op
    def work(self, queues: str | Sequence[str] | None = None, *, poll_s: float = CLAIM_WAIT_S,
             limit: int | None = None, concurrency: int = 1, lease_owner: str | None = None,
             stop: Callable[[], bool] | None = None, on_error: Callable[..., Any] | None = None,
             shutdown_s: float = SHUTDOWN_S, write_behind: bool = False) -> Op[None]:
        """Claim runs of the registered workflows and execute them, each in a thread or task of its own.

        Stops on SIGTERM or SIGINT (called from the main thread; a second signal acts as usual) or when stop(), asked
        ten times a second, is true: runs go on to their next boundary and are given back, no attempt spent; after
        shutdown_s this returns anyway, and what is left is taken over when its lease ends.

        queues: served in this order, or one; default "default".  poll_s: how long the server holds a claim when there
        is no work (at most 25).  limit: runs per claim, default as many as have a place.  concurrency: runs at once; a
        run whose result is on its way to the server has left its place.  lease_owner: default a new name per claim; one
        of your own must be unique among processes.  on_error(exception, run): called for every run that failed or was
        cancelled here, with the run as JSON; failures never end the loop, nor does a server that is away.

        write_behind: a plain step (no side effects but "read", replay auto) returns when its function has returned; its
        record follows, in the order of the run's steps, in the next request.  What is durable is always a prefix of
        what was executed, and everything that leaves the run waits until all of that is durable: a step with side
        effects (before its function is called), gate, sleep, signal, child, fanout, state, snapshot, usage, the run's
        end and `run.flush()`.  At most 64 records, 1 MiB or 1 s may be behind; then the next step waits before it
        returns.  A refused record is raised at the next boundary, and nothing after it is sent for that run.  So a
        crash repeats the plain steps of the last moments, and never one that came before a declared side effect.

        Only runs of workflows registered with this client when it asks are claimed; others stay in their queue for a
        worker that knows them.  Raises TidebaseError when the server refuses the claim itself (401, 400).
        """
        names = [queues] if isinstance(queues, str) else ["default"] if queues is None else list(queues)
        _check(poll_s=poll_s, limit=limit, concurrency=concurrency, shutdown_s=shutdown_s, stop=stop, on_error=on_error)
        worker = _Worker(self, names, min(poll_s, LONG_POLL_S), limit, concurrency, lease_owner, on_error, write_behind)
        return worker.work(stop, shutdown_s)

    @op
    def usage(self, *, by: str | None = None, since: datetime | str | None = None,
              until: datetime | str | None = None) -> Op[Json]:
        """The cost ledger summed up: {"groups": [...]}.  by: model, workflow or day."""
        return _request(self, "GET", _path("usage", by=by, since=_iso(since), until=_iso(until)))

    attach = session_op(Runs.attach)  # the same as `runs.attach`
    cancel = op(Runs.cancel)  # the same as `runs.cancel`

    @op
    def handle_webhook(self, body: bytes, signature: str | None = None, *, headers: Mapping[str, str] | None = None,
                       secret: str | None = None) -> Op[tuple[int, Json]]:
        """Answer a recovery or push webhook: verify it, run the registered workflow here, return (status, JSON).

        body: the exact bytes received.  headers: those of the request, for verify_webhook; better than signature, the
        header x-tidebase-signature alone, which holds for ever.  secret: the run's recovery_secret, if it has one,
        else the client's webhook_secret counts; without either, everything is answered 401, and an error is logged.
        The answer is 200 whenever the outcome is the server's to handle: completed, failed (recorded), cancelled, or
        held by somebody else already; and at once when the run begins to wait (see Run), whose wake-up is another
        webhook.
        """
        secret = secret or self.webhook_secret
        if not secret and not self._warned_of_secret:
            self._warned_of_secret = True
            logger.error("webhooks are answered 401, since this client has no webhook secret to verify them with: set "
                         "TIDEBASE_WEBHOOK_SECRET, to what the server has, or give webhook_secret= or secret=",
                         extra={"event": "no_webhook_secret"})
        if not secret or not (verify_webhook(body, headers, secret) if headers is not None
                              else verify_webhook_signature(body, signature, secret)):
            return 401, {"error": "invalid signature", "code": "unauthorized"}
        webhook = _loads(body)
        if (not isinstance(webhook, dict) or webhook.get("type") not in ("run.resume", "run.invoke")
                or "runId" not in webhook):
            return 400, {"error": "neither run.resume nor run.invoke", "code": "invalid_request"}
        run_id, workflow = str(webhook["runId"]), self._workflows.get(str(webhook.get("workflowName")))
        if workflow is None:
            return 404, {"error": "no such workflow is registered here", "code": "unknown_workflow", "runId": run_id}
        try:
            yield from _begin_and_execute(self, {"id": run_id}, workflow, may_leave=True)
        except RunSuspended:
            return 200, {"runId": run_id, "status": "waiting"}
        except Unreachable:
            return 503, {"error": "the Tidebase server did not answer", "code": "unreachable", "runId": run_id}
        except TidebaseError as error:
            status = "cancelled" if isinstance(error, RunCancelled) else error.code or "failed"
            return (404 if error.status == 404 else 200), {"runId": run_id, "status": status}
        except Exception as error:
            _hide_frames(error)
            logger.exception("run %s of workflow %s failed", run_id, webhook["workflowName"],
                             extra={"event": "run_failed", "run_id": run_id})
            return 200, {"runId": run_id, "status": "failed"}
        return 200, {"runId": run_id, "status": "completed"}

    @op
    def close(self) -> Op[None]:
        """Close idle connections.  The client stays usable and opens new ones when it must."""
        yield from self._leave(None)

    def _leave(self, error: BaseException | None) -> Op[None]:
        self._heartbeater.close()
        self._threads.close()
        self._driver.close()
        yield self._driver.sleep(0)  # lets an event loop finish what it closes

    def _registered(self, workflow: str | Callable[..., Any]) -> tuple[Callable[..., Any], str | None]:
        """A workflow by function or registered name: the function, and that name if it has one."""
        if isinstance(workflow, str):
            if workflow not in self._workflows:
                raise ValueError(f"workflow {workflow!r} is not registered, but {sorted(self._workflows)} are")
            return self._workflows[workflow], workflow
        if not callable(workflow):
            raise TypeError(f"a workflow is a function, workflow(run, input) or workflow(run), not {workflow!r}")
        known = list(self._workflows.items())  # another thread may be registering one
        return workflow, next((name for name, fn in known if fn is workflow), None)


class Tidebase(Client[Blocking]):
    """The client whose methods block.  One object serves a whole process, from any number of threads."""

    _context, _session = RunContext, RunSession


class AsyncTidebase(Client[Awaited]):
    """The client whose methods are awaited; workflows and steps may be `async def`.  One object serves a process.

    So are those of `runs`, `queues`, `schedules` and `gates`, and those of the runs and sessions that it gives; only
    `workflow`, `runs.token` and `runs.subscribe`, for `async for`, are called as they are.
    """

    _is_awaited, _context, _session = True, AsyncRunContext, AsyncRunSession


def _begin_in_child() -> None:
    """In a forked process: threads, connections and what they were about are the parent's."""
    _thread_cache.__init__()  # type: ignore[misc]
    for client in list(_clients):
        client._begin()


_clients: weakref.WeakSet[Client[Any]] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


# ------------------------------------------------------------------------------
# A run's logic: its lease, the names of its calls, its steps, waits, children and its end.
#
# A step goes this way: Run.step → _Calls.call, which gives it its name → _Step.execute → the user's function →
# _WriteBatcher.send, which carries its record to the server with what other runs have ready.  A run goes this way:
# Client.run, or _Worker for one from a queue → _execute → the workflow, which makes calls → _complete or _fail; where
# it waits for long, _wait_for → _leave, and RunSuspended unwinds it.  Each boundary between calls asks the _Lease
# whether the run is still held here.
# ------------------------------------------------------------------------------


_LIVE = ("held", "leaving", "ending")  # states of a lease that is ours


class _Lease:
    """A lease that this process holds, as far as its own clock and the server's last answer tell.

    Its state: held     at first
               leaving  the run asks to wait without us, and nothing may begin meanwhile; then waiting, or held again
               ending   its outcome is under way: a heartbeat refused now means that it arrived; held again if it failed
               waiting  for good: it is queued again when what it waits for is there
               ended    for good: completed, failed or given back; threads left over stop at their next boundary
               lost     for good: cancelled, another's or run out, as `lost` tells
    """

    def __init__(self, run: Json, owner: str, event: Any, parent: _Lease | None = None,
                 write_behind: bool = False) -> None:
        """event: set when the run has to look up: its lease is lost, or its worker stops."""
        self.run_id, self.owner, self.event = cast(str, run["id"]), owner, event
        self.chain: tuple[_Lease, ...] = (self, *parent.chain) if parent else (self,)  # a child ends with its parent
        self.write_behind = write_behind
        self.workflow_name = str(run.get("workflowName"))  # for messages
        self.fields = _members({"runId": self.run_id, "leaseOwner": owner})  # what each of its writes begins with
        self.unsettled = _Unsettled()
        self.on_lost: Callable[..., Any] | None = None
        self.on_returned: Callable[[], None] = lambda: None  # the workflow's function has returned
        self.state = "held"
        self._lock = threading.Lock()  # around its changes
        self.lost: TidebaseError | None = None
        self.refused: Exception | None = None  # what a record was refused with that no call waited for
        self.is_suspended = False  # its worker stops: the next boundary unwinds the run
        now, given_at = time.monotonic(), _moment(run["updatedAt"])
        self._clock = (given_at, now)
        self.duration_s = max((_moment(run["leaseExpiresAt"]) - given_at).total_seconds(), 0.1)
        self.heartbeat_s = self.duration_s / HEARTBEATS_PER_LEASE
        self.renew(now)
        self.heartbeat_at: float = now + min(self.heartbeat_s, FIRST_HEARTBEAT_S)

    def now(self) -> datetime:
        """The database's clock: what it said when it gave the lease, and the time that has passed here since."""
        moment, heard_at = self._clock
        return moment + timedelta(seconds=time.monotonic() - heard_at)

    def monotonic_at(self, moment: datetime) -> float:
        """What time.monotonic() says here when the database's clock says `moment`."""
        return self._clock[1] + (moment - self._clock[0]).total_seconds()

    def renew(self, since: float) -> None:
        """A heartbeat extended the lease at a moment after `since`."""
        self.ends_at = since + self.duration_s
        self.heartbeat_at = since + self.heartbeat_s

    def extend(self, since: float) -> None:
        """A write by the owner extended the lease.  Heartbeats go on: with an older server fewer writes extend it."""
        self.ends_at = max(self.ends_at, since + self.duration_s)

    def become(self, state: str, *before: str) -> bool:
        """Change the state, if it is one of those before; whether it was."""
        with self._lock:
            if self.state not in before:
                return False
            self.state = state
            return True

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Around the request that ends the run, or its stay here."""
        self.become("ending", "held", "leaving")
        try:
            yield
        except BaseException:
            self.become("held", "ending")
            raise

    def lose(self, error: TidebaseError) -> None:
        """The lease is gone, for good: every later boundary raises `error`."""
        with self._lock:
            if self.state not in _LIVE:
                return
            self.lost, self.state = error, "lost"
        logger.warning("run %s of workflow %s is no longer held here: %s", self.run_id, self.workflow_name, error,
                       extra={"event": error.code or "lease_lost", "run_id": self.run_id})
        self.event.set()
        if self.on_lost is not None:
            self.on_lost(*_fit(self.on_lost, error))

    def cancelled(self, answer: Json) -> None:
        """An answer says that the run is cancelled: lose the lease, and raise RunCancelled."""
        path = _path("runs", self.run_id)
        self.lose(RunCancelled(f"run {self.run_id} is cancelled", 200, answer, "run_cancelled", path))
        self.fence()

    def refuse(self, error: Exception) -> None:
        """A record was refused that no call waited for: every later boundary raises `error`."""
        if self.refused is None:
            self.refused = error
            self.event.set()

    def suspend(self) -> None:
        """The worker stops: the next boundary unwinds the run."""
        self.is_suspended = True
        self.event.set()

    def gone(self) -> TidebaseError | None:
        """What ended this lease or, for a child, one above it.  One that this process did not renew in time is
        lost: another worker may hold the run by now, after a freeze of this process, say."""
        now = time.monotonic()
        for lease in self.chain:
            if lease.state in _LIVE:
                if now < lease.ends_at:
                    continue
                message = f"the lease of run {lease.run_id} ran out: it was not renewed within {lease.duration_s:g} s"
                lease.lose(LeaseLost(message, code="lease_lost"))
            if lease.state == "lost":
                return lease.lost
            if lease.state == "ended":
                return LeaseLost(f"run {lease.run_id} has ended here", code="lease_lost")
        return None

    def fence(self) -> None:
        """Before a request: raise what ended the lease.  A copy, since several threads may raise it."""
        if self.state == "waiting":
            raise RunSuspended
        if (gone := self.gone()) is not None:
            raise copy.copy(gone)

    def boundary(self) -> None:
        """Before user code goes on: raise LeaseLost, RunCancelled, RunSuspended, or what a record was refused with."""
        self.fence()
        if self.refused is not None:
            raise copy.copy(self.refused)
        for lease in self.chain:
            if lease.is_suspended or lease.state == "leaving":
                raise RunSuspended


class _Calls:
    """The calls of one execution: their names in the record, which of them are under way, which failed and may be made
    once more, and the ids of what is written between them.  The rule about names that Run tells stands here alone.

    A name in the record is given once, to the call that began with it, and again only to the same call when that
    failed.  From its begin to its end a call is under way, and no other may be called by its name.
    """

    # Of this task or thread, each with the calls that it belongs to, since a step's function may run other runs: the
    # step whose function is called, and the call that began last.
    _step_here: contextvars.ContextVar[tuple[_Calls | None, str]] = contextvars.ContextVar(
        "tidebase_step", default=(None, ""))
    _last_here: contextvars.ContextVar[tuple[_Calls | None, _Named]] = contextvars.ContextVar(
        "tidebase_last", default=(None, ("", "")))

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._lock = threading.RLock()  # the garbage collector may end a call at any time, by closing its generator
        self._numbers: dict[_Named, int] = {}  # of each name, as called or as recorded: the last number given
        self._under_way: set[_Named] = set()  # as called
        # Of calls that may be made once more, by what was asked for: what they were called with, and their names.
        self._failed: dict[tuple[_Named, ...], list[tuple[tuple[Any, ...], list[str]]]] = {}
        self._last: _Named = ("", "")  # the call that began last, in whatever task or thread
        self._executing = 0
        self._writes: Counter[tuple[str, ...]] = Counter()  # ids given, by last call, verb and what is written
        self.open_steps: dict[str, _Step] = {}  # by name: see _Step

    def step_here(self) -> str | None:
        """The step of this run whose function this task or thread executes."""
        calls, step = self._step_here.get()
        return step if calls is self else None

    def last_call(self) -> str:
        """The call that began last in this task or thread or, where it made none, in any."""
        calls, last = self._last_here.get()
        return " ".join(last if calls is self else self._last)

    @contextlib.contextmanager
    def call(self, *asked: _Named, same: _Same = None, executes: bool = False) -> Iterator[list[str]]:
        """Around a call, which is under way within: `with calls.call((kind, name), ...) as names_in_the_record`.

        The first is the name of the call, others are of what it takes along.  Those of a call that the function of a
        step makes are STEP/name.
        same: tells by what the same call is known again, its input say; None where nobody can tell.  Only of a call
        whose failure is not recorded for good: a replay executes it again, and so does the program that catches the
        failure and makes the same call once more.  It keeps its names, so that the replay finds its output.
        executes: it is a step whose function is called within.
        """
        for kind, name in asked:
            if not isinstance(name, str) or not name:
                raise (ValueError if name == "" else TypeError)(
                    f"the name of a {kind} is a text of 1 to {MAX_NAME} characters, not {name!r}")
        before, within = self._step_here.get(), self.step_here()
        if within is not None:
            asked = tuple([(kind, f"{within}/{name}") for kind, name in asked])
        with self._lock:
            for kind, name in asked:
                if (kind, name) in self._under_way:
                    raise ValueError(
                        f"{kind} {name!r} is under way in this run already, and calls side by side have no order to "
                        f"number them by: give each call a name of its own, for instance f'{name}-{{i}}'")
            names = self._names_of_failed(asked, same) or [self._next_name(*each) for each in asked]
            self._under_way.update(asked)
            if within is None:  # else it does not count: a replay does not make it
                self._set_last(asked[0][0], names[0])
            self._executing += executes
        if executes:
            self._step_here.set((self, names[0]))
        try:
            yield names
        except BaseException as error:  # it may have been cancelled
            kind, name = asked[0][0], names[0]
            step = self.open_steps.get(name) if kind == "step" else None
            if step is not None:
                step.left_with = error
            if same is not None:
                called_with = same()
                with self._lock:
                    if called_with is not None:
                        self._failed.setdefault(asked, []).append((called_with, names))
                    if self.last_call() == f"{kind} {name}":
                        self._set_last(kind, f"{name} failed")  # what is written now is for its failure
            raise
        finally:
            with self._lock:
                self._under_way.difference_update(asked)
                self._executing -= executes
            if executes:
                self._step_here.set(before)

    def _set_last(self, *last: str) -> None:
        self._last = cast(_Named, last)
        self._last_here.set((self, self._last))

    def _names_of_failed(self, asked: tuple[_Named, ...], same: _Same) -> list[str]:
        """The names of the same call, if it failed."""
        failed = self._failed.get(asked)
        if failed and same is not None:
            called_with = same()
            for place, (other, names) in enumerate(failed):
                if other == called_with:
                    del failed[place]
                    return names
        return []

    def _next_name(self, kind: str, name: str) -> str:
        """The next free name in the record: NAME, NAME#2, NAME#3 ..."""
        number, recorded = self._numbers.get((kind, name), 0) + 1, name
        while number > 1 and (kind, recorded := f"{name}#{number}") in self._numbers:
            number += 1
        if len(recorded) > MAX_NAME:
            raise ValueError(f"the name of a {kind} has at most {MAX_NAME} characters in the record, not "
                             f"{len(recorded)} as {recorded[:60]!r}...")
        self._numbers[kind, name] = number
        if number > 1:
            self._numbers[kind, recorded] = 1
        return recorded

    def is_skipped(self, kind: str, recorded: str) -> bool:
        """Whether this is the numbered name of a call that was not made, though others of its name were."""
        name, mark, number = recorded.rpartition("#")
        return bool(mark) and number.isdigit() and (kind, recorded) not in self._numbers and (
            kind, name) in self._numbers

    @contextlib.contextmanager
    def executing(self) -> Iterator[None]:
        """Around what is executed here, too, and cannot be left behind: a child say."""
        with self._lock:
            self._executing += 1
        try:
            yield
        finally:
            with self._lock:
                self._executing -= 1

    def is_executing(self) -> bool:
        """Whether a step or a child of the run is executed here."""
        return self._executing > 0

    def count(self, kind: str, name: str) -> int:
        """How often this has been asked for, this time included."""
        with self._lock:
            self._numbers[kind, name] = self._numbers.get((kind, name), 0) + 1
            return self._numbers[kind, name]

    def write_id(self, prefix: str, verb: str, *about: str | None) -> str:
        """The id of a write: between calls the same in every execution, so that a replay writes it once.

        It is made of the run, the call before it in this task or thread, what it is about, and its number among such
        writes since.  While a call is under way it is a fresh one: within a step because what is executed again was
        spent again, beside one because the order of the two is not known.
        """
        with self._lock:
            if self._under_way:
                return _new_id(prefix)
            kind = (self.last_call(), verb, *(part or "" for part in about))
            self._writes[kind] += 1
            place = (self._run_id, *kind, str(self._writes[kind]))
        return f"{prefix}_{hashlib.sha256(_json(place).encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


# --- steps


class _Step:
    """A call of `run.step`, or a wait, which is recorded as a step, too: what the server is told of it, and its life.

    From when the server may hear of it until its outcome is sent it stands among the open steps of the run's calls.  A
    call that is cancelled leaves it there, to be recorded as failed when the step is called again or the run ends; so
    is at the run's end what another thread or task still executes.  A run that is given back executes it again.
    """

    args: tuple[Any, ...] = ()
    options: Json = {}  # noqa: RUF012 - replaced, never changed
    decision = "safe_replay"  # what its last failure is recorded with
    is_plain = True  # it is written once, at its end; else it is begun before fn is called as well
    input = b""
    started_at: datetime  # the try that is under way
    id: str | None = None  # of the step that was begun for it
    announcement: _Write | None = None  # that a plain step takes long: see _Heartbeater
    output_bytes = 0
    left_with: BaseException | None = None  # what its call ended with, though the step is open

    def __init__(self, run: Run[Any], name: str, fn: Any, input: Any, input_hash: str | None,
                 retries: int = 0, timeout_s: float | None = None) -> None:
        """fn: None for a wait."""
        self.run, self.name, self.fn, self.retries, self.timeout_s = run, name, fn, retries, timeout_s
        self.input_hash = input_hash or NULL_HASH
        if input is not None:
            self.input, plain = _to_json(input, "input=")
            self.input_hash = input_hash or hashlib.sha256(_canonical(plain).encode()).hexdigest()
            if not _accepts(fn, 0) and _accepts(fn, 1):
                self.args = (plain,)

    def called_with(self) -> tuple[Any, ...] | None:
        """By what the same call is known again: the input or, without one, the function and what is bound to it."""
        return (self.input_hash,) if self.input else _identity_of(self.fn)

    def declare(self, side_effects: str | Sequence[str] | None, credentials: Any, **declared: Any) -> None:
        """Note what the step declares about itself.  ValueError for what does not go together."""
        effects = [side_effects] if isinstance(side_effects, str) else list(side_effects or ())
        self.options = options = _body(
            side_effects=effects or None, credentials=[credentials] if isinstance(credentials, str) else credentials,
            retries=self.retries or None, timeout_s=self.timeout_s, **declared)
        acts = any(effect != "read" for effect in effects)
        replay = options.get("replay") or ("manual" if acts and "idempotencyKey" not in options else "auto")
        if replay not in ("auto", "manual", "never"):
            raise ValueError(f"replay must be 'auto', 'manual' or 'never', not {replay!r}")
        if self.retries and replay != "auto":
            raise ValueError(f"retries need replay='auto', but this step's is {replay!r}: declare an idempotency_key, "
                             "or replay='auto'")
        self.decision = {"never": "fail_hard", "manual": "manual_review", "auto": "safe_replay"}[replay]
        self.is_plain = replay == "auto" and not acts and "idempotencyKey" not in options

    def checkpoint(self) -> Json | None:
        """Its checkpoint, if one came with the lease.  For one of another input the server is asked."""
        known = self.run._checkpoints.get(self.name)
        if known is not None and (known["inputHash"] == self.input_hash or known.get("copied")):  # of a fork's origin
            return known
        return None

    @functools.cached_property
    def fields(self) -> bytes:
        """The members by which the server knows the step."""
        known = b'"name":%s,"inputHash":"%s"' % (_encode(self.name, "name="), self.input_hash.encode())
        options = b"" if not self.options else b',"options":' + _encode_body(self.options)
        return known + (b',"input":' + self.input if self.input else b"") + options

    def execute(self) -> Op[Any]:
        """Execute a step that no checkpoint here answers, and record it; again while tries are left.

        It is begun first where a try must leave a trace, or where the server may have its output.
        """
        run, lease, client = self.run, self.run._lease, self.run._client
        self.fields  # noqa: B018 - what JSON cannot say is refused before fn is called
        _fail_open_steps(run, [self.name])  # of an earlier call, which was cancelled
        for tries in itertools.count(1):
            lease.boundary()
            self.id, self.started_at = None, lease.now()
            if not self.is_plain or not run._has_all_checkpoints or self.name in run._checkpoints:
                answer = yield from self.begin()
                if answer["action"] == "return":
                    return answer["output"]
                self.id = answer["step"]["id"]
            else:
                self.open()
                client._heartbeater.watch(self)
            output, plain, error = b"null", None, None
            try:
                returned = yield client._driver.invoke(self.fn, self.args, f"step {self.name!r}", self.timeout_s)
                output, plain = _to_json(returned, f"the output of step {self.name!r}")
            except Exception as raised:
                if lease.gone() is not None:
                    raise  # from a boundary inside the function: it cannot be recorded
                error = raised
            finally:
                client._heartbeater.forget(self)
            if self.announcement is not None:  # its answer counts: another owner may be at the step
                yield from client._batcher.settled(self.announcement)
                announced = self.announcement.outcome
                if isinstance(announced, dict) and announced["action"] != "execute":
                    answer = yield from self.begin()
                    if answer["action"] == "return":
                        return answer["output"]
            self.close()
            if error is None and self.id is None and lease.write_behind:
                write = self.outcome(output, is_behind=True, explain=_explain_other_outcome)
                yield from client._batcher.post_behind(write)
                return plain
            again = error is not None and tries <= self.retries and getattr(error, "retryable", True) is not False
            try:
                answer = yield from client._batcher.send(self.outcome(output, error, again))
            except BodyTooLarge as refused:
                if error is not None:
                    raise refused from None  # its input is
                error = refused  # the output will not be shorter the next time
                answer = yield from client._batcher.send(self.outcome(output, error))
            recorded: Json = answer["step"]
            if recorded["status"] == "completed":  # with this output or, recorded meanwhile, with another's
                return recorded.get("output", plain)
            if not again:
                raise cast(Exception, error)
            yield client._driver.sleep(_backoff(STEP_BACKOFF_S, tries), lease.event)
        raise AssertionError("unreachable")

    def begin(self) -> Op[Json]:
        """Ask for the step until the answer is `execute` or `return`; while another owner executes it, wait."""
        lease, client = self.run._lease, self.run._client
        for tries in itertools.count(1):
            lease.boundary()
            self.open()
            begin = _Write("begin_step", self.fields, lease, explain=functools.partial(_explain_refusal, self))
            try:
                answer = yield from client._batcher.send(begin)
            except BaseException as error:
                if isinstance(error, Exception) or client._batcher.withdraw(begin):
                    self.close()  # the server did not begin it
                self.decision = "safe_replay"  # its function was not called
                raise
            action = answer["action"]
            if action == "execute":
                self.check_open()
                return answer
            self.close()
            if action == "return":
                return answer
            if action == "input_mismatch":
                raise _mismatch(self, answer)
            if action == "cancelled":
                lease.cancelled(answer)
            if action != "locked":
                raise TidebaseError(f"the server answered a step with {action!r}", 200, answer)
            yield client._driver.sleep(_backoff(LOCKED_POLL_S, tries), lease.event)
        raise AssertionError("unreachable")

    def begin_wait(self) -> Op[Json]:
        """The step that records a wait: begun, found under way with what was asked first, or completed."""
        self.run._lease.boundary()
        known = self.checkpoint()
        if known is not None:
            return {**known, "status": "completed"}
        self.options, self.started_at = {"wait": True}, self.run._lease.now()
        step: Json = (yield from self.begin())["step"]
        self.id = step["id"]
        return step

    def end_wait(self, output: Any) -> Op[None]:
        """The wait is over, and its run still here.  That of a run which left its worker is ended by the server."""
        self.close()
        yield from self.run._client._batcher.send(self.outcome(_encode(output, "a signal")))

    def open(self) -> None:
        """The server is to hear of it."""
        self.run._calls.open_steps[self.name] = self

    def check_open(self) -> None:
        """Raise LeaseLost when the run has ended meanwhile, and recorded the step as failed."""
        if self.run._calls.open_steps.get(self.name) is not self:
            raise LeaseLost(f"run {self.run.run_id} ended before its step {self.name!r} did", code="lease_lost")

    def close(self) -> None:
        """Its outcome is known, and sent next.  Raises LeaseLost as `check_open`."""
        self.check_open()
        self.run._calls.open_steps.pop(self.name, None)

    def outcome(self, output: bytes, error: BaseException | None = None, again: bool = False, is_behind: bool = False,
                explain: Callable[[_Step, Json | Exception], Json | Exception] | None = None) -> _Write:
        """What records how the step ended: one that was begun, or all of it at once."""
        members = b'"output":' + output
        if error is not None:
            self.run._step_failures.append((error, self.name))
            decision = "auto_retry" if again else self.decision
            members = _members({"resumeDecision": decision, "retryable": again, "error": _error_json(error)})
        verb = "record_step" if self.id is None else "complete_step" if error is None else "fail_step"
        if self.id is None:
            started_at = self.started_at.isoformat().encode()
            members = b'"startedAt":"%s","brief":true,%s,%s' % (started_at, self.fields, members)
        else:
            members = b'"stepId":"%s",%s' % (self.id.encode(), members)
        self.output_bytes = len(output)
        return _Write(verb, members, self.run._lease, is_behind=is_behind,
                      explain=functools.partial(explain or _explain_refusal, self))


def _fail_open_steps(run: Run[Any], names: Sequence[str] | None = None) -> None:
    """Have those of these steps, or of all, recorded as failed that are open: see _Step."""
    writes = []
    for name in list(run._calls.open_steps) if names is None else names:
        step = run._calls.open_steps.pop(name, None)  # whoever takes it out records its outcome
        if step is None:
            continue
        run._client._heartbeater.forget(step)
        error = step.left_with
        if error is None:
            words = (f"run {run.run_id} ended while its step {name!r} was under way in another thread or task, so what "
                     "that returns is not recorded: wait for it before the workflow returns")
            logger.warning(words, extra={"event": "step_left_behind", "run_id": run.run_id})
            error = TidebaseError(words, code="run_ended")
        writes.append(step.outcome(b"", error, explain=_log_refusal))
    if writes:
        run._client._batcher.post(writes)


def _settle_writes(run: Run[Any]) -> Op[None]:
    """Wait until each write that the run has made has an outcome, good or bad."""
    for write in run._lease.unsettled.all():
        yield from run._client._batcher.settled(write)


def _warn_of_differences(run_id: str, what: str, name: str | None, recorded: Json, **given: Any) -> None:
    """Log how a call differs from its record, which stays: a prompt with a time in it must not fail a replay.  None
    stands for {}, as the server has it."""
    differing = [key for key, value in given.items()
                 if recorded.get(key) != ({} if value is None else _plain(value, f"{key}="))]
    if differing:
        logger.warning("run %s: %s %r was recorded with another %s, which stays as recorded first",
                       run_id, what, name, " and ".join(differing),
                       extra={"event": "differs_from_record", "run_id": run_id})


def _warn_of_skipped_steps(run: Run[Any]) -> None:
    """Log numbered steps that completed in an earlier attempt and were not called in this one, which called their name
    less often: a loop that tries a step again with another function each time goes another way when it is replayed."""
    skipped = [name for name, known in run._checkpoints.items()
               if not known.get("copied") and run._calls.is_skipped("step", name)]
    if skipped:
        logger.warning("run %s of workflow %s: an earlier attempt completed %s, which this one did not call: it went "
                       "another way than the record.  A loop that tries a step again must call it the same way each "
                       "time, for instance without the number of the try, or use retries=", run.run_id, run.name,
                       ", ".join(map(repr, skipped[:10])), extra={"event": "steps_skipped", "run_id": run.run_id})


# --- waiting


def _wait_for(client: Client[Any], condition: Json | None, read: Callable[[float], Op[Json | None]] | None,
              ends: float = math.inf, *, run: Run[Any] | None = None, hold_s: float = 0.0,
              poll_s: float = LONG_POLL_S) -> Op[Json | None]:
    """Wait until read() returns what is waited for, and return it; None when `ends` comes first.

    read(wait_s): one request, which the server may hold for so many seconds; None: only time is waited for.
    ends: by time.monotonic().
    condition: what the server is told to resume the run for, when it leaves its worker after hold_s; None: it waits in
    place.  A run that must not leave waits in place, too.
    """
    leaves_at = math.inf if run is None or condition is None else time.monotonic() + hold_s
    event = None if run is None else run._lease.event
    while True:
        asked, is_there = time.monotonic(), False
        if run is not None and condition is not None and leaves_at <= asked < ends:
            is_there = yield from _leave(run, condition, None if read is None or ends == math.inf else ends - asked)
        next_look = asked if is_there else min(ends, leaves_at if asked < leaves_at else math.inf)
        wait_s = max(min(next_look - asked, poll_s, LONG_POLL_S), 0.0)
        found: Json | None = None
        if read is not None:
            found = yield from read(wait_s)
        else:
            yield client._driver.sleep(wait_s, event)
        if run is not None:
            run._lease.boundary()
        now = time.monotonic()
        if found is not None or now >= ends or (is_there and read is None):
            return found
        if read is not None and now - asked < wait_s / 2:  # too many wait there: the server did not hold the request
            yield client._driver.sleep(min(1.0, wait_s), event)


def _long_poll(run: Run[Any], wait_s: float, *path: str, **query: Any) -> Op[Json]:
    """GET something of a run, which the server may hold until there is news."""
    path_and_query = _path("runs", run.run_id, *path, wait_ms=_ms(wait_s), **query)
    answer = yield from _request(run._client, "GET", path_and_query, lease=run._lease, wait_s=wait_s)
    if answer.get("runStatus") == "cancelled":
        run._lease.cancelled(answer)
    return answer


def _leave(run: Run[Any], condition: Json, timeout_s: float | None = None) -> Op[bool]:
    """Give the run up until something is there, and unwind.  True: it is there; False: it must wait in place."""
    lease = run._lease
    if not run._may_leave or run._calls.is_executing() or not lease.become("leaving", "held"):
        return False
    try:
        if run._calls.is_executing():  # again, now that nothing may begin: one of us sees the other
            return False
        yield from _settle_writes(run)
        if lease.refused is not None:
            raise copy.copy(lease.refused)
        body = {**_body(lease_owner=lease.owner, timeout_s=timeout_s), "for": condition}
        answer = yield from _request(run._client, "POST", _path("runs", run.run_id, "wait"), body, lease=lease)
        if answer["ready"]:
            return True
        lease.become("waiting", "leaving")
    finally:
        lease.become("held", "leaving")  # it must stay, unless it waits by now
    run._client._heartbeater.remove(lease)
    raise RunSuspended


# --- children


_CHILD_TAKES = inspect.signature(Run.child).parameters.keys()


def _describe_child(run: Run[Any], given: Mapping[str, Any]) -> tuple[Any, Json]:
    """A child's function, if it is known here, and its fields for the server.  given: the arguments of Run.child."""
    unknown = sorted(given.keys() - _CHILD_TAKES)
    if unknown or "name" not in given:
        raise TypeError(f"a child takes the arguments of run.child, and a name: not {', '.join(unknown) or 'none'}")
    name, workflow, queue = given["name"], given.get("workflow"), given.get("queue")
    workflow_name, fn = given.get("workflow_name"), None
    if callable(workflow):
        fn, registered = run._client._registered(workflow)
        workflow_name = workflow_name or (registered if queue is not None else None) or name
    else:
        known_as = workflow or workflow_name or name
        if queue is None or not isinstance(known_as, str) or known_as in run._client._workflows:
            fn, _ = run._client._registered(known_as)
        if queue is not None and workflow_name not in (None, known_as):
            raise ValueError(f"child {name!r} is run by a worker of queue {queue!r}, which finds its workflow by "
                             f"workflow_name={workflow_name!r}, not by {workflow!r}: leave the latter out")
        workflow_name = workflow_name or known_as
    body = _body(given, "workflow", workflow_name=workflow_name)
    if "input" in body:
        body["input"] = _plain(body["input"], f"input= of child {name!r}")
    return fn, body


def _run_child(run: Run[Any], fn: Any, body: Json) -> Op[Any]:
    """The result of a child, executed here or, where it has a queue, waited for."""
    (child,) = yield from _create_children(run, [body])
    if "queue" not in body:
        with run._calls.executing():
            return (yield from _begin_and_execute(run._client, child, fn, parent=run._lease))
    (outcome,) = yield from _join_children(run, {body["name"]: child})
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _join_fanout(run: Run[Any], name: str, described: list[tuple[Any, Json]], return_errors: bool) -> Op[Any]:
    """What the step that joins a fanout records: the results or, where some failed, these and the errors."""
    outcomes = yield from _run_children(run, described)
    run._lease.boundary()
    failed = {child: error for child, error in outcomes.items() if isinstance(error, Exception)}
    if failed and not return_errors:
        message = "; ".join(f"{child}: {type(error).__name__}: {error}" for child, error in failed.items())
        raise FanoutFailed(f"{len(failed)} of {len(outcomes)} children of {name!r} failed: {message}", {**failed})
    return list(outcomes.values()) if not failed else {
        "results": [None if child in failed else result for child, result in outcomes.items()],
        "errors": {child: _outcome_json(error) for child, error in failed.items()},
    }


def _unpack_results(joined: Any, names: Sequence[str]) -> list[Any]:
    """The results of a fanout from what its step recorded."""
    if isinstance(joined, list):
        return joined
    return [_outcome(joined["errors"][child]) if child in joined["errors"] else result
            for child, result in zip(names, joined["results"])]


def _run_children(run: Run[Any], described: list[tuple[Any, Json]]) -> Op[dict[str, Any]]:
    """Results or exceptions of children, by name: workers run those that have a queue, the others run here."""
    queued = {body["name"]: body for _, body in described if "queue" in body}
    runs, alone = (yield from _queue_children(run, queued)) if queued else ({}, False)
    outcomes = yield from _run_here(run, [child for child in described if "queue" not in child[1]])
    joined = yield from _join_children(run, runs, alone)
    outcomes.update(zip(runs, joined))
    return {body["name"]: outcomes[body["name"]] for _, body in described}


def _run_here(run: Run[Any], described: list[tuple[Any, Json]]) -> Op[dict[str, Any]]:
    """Results or exceptions of children that are executed here, at most FANOUT at once."""
    driver = run._client._driver
    tasks: list[Any] = []
    try:
        for number, (fn, body) in enumerate(described):
            if number >= FANOUT:
                yield driver.join(tasks[number - FANOUT])
            tasks.append(driver.start(_run_child(run, fn, body), f"tidebase-child-{body['name']}"))
        for task in tasks:
            yield driver.join(task)
    except (asyncio.CancelledError, KeyboardInterrupt):
        for task in tasks:
            task.cancel()
        raise
    errors = [task.exception() for task in tasks]
    for error in errors:
        if error is not None and not isinstance(error, Exception):
            raise error  # RunSuspended: the children gave themselves back, so does the parent
    return {body["name"]: task.result() if error is None else error
            for (_, body), task, error in zip(described, tasks, errors)}


def _queue_children(run: Run[Any], bodies: Mapping[str, Json]) -> Op[tuple[dict[str, Json], bool]]:
    """The runs of children that workers run, created or found; and whether no other child of the run lives.

    One request gives a replay all that exist.
    """
    existing, are_all = (yield from _child_runs(run)) if len(bodies) > 1 else ({}, False)
    runs = {name: existing[name] for name, body in bodies.items() if name in existing
            and "payloadOmitted" not in existing[name]
            and existing[name]["workflowName"] == body["workflowName"]}  # else the server says what is wrong
    for name, child in runs.items():
        _warn_of_differences(run.run_id, "child", name, child, input=bodies[name].get("input", {}))
    missing = [body for name, body in bodies.items() if name not in runs]
    made = yield from _create_children(run, missing)
    runs.update((body["name"], child) for body, child in zip(missing, made))
    return runs, are_all and all(name in bodies or _has_ended(child) for name, child in existing.items())


def _create_children(run: Run[Any], bodies: Sequence[Json]) -> Op[list[Json]]:
    """The runs of these children, created or found, CHILDREN_AT_ONCE in one transaction."""
    batcher, runs = run._client._batcher, []
    for start in range(0, len(bodies), CHILDREN_AT_ONCE):
        run._lease.boundary()
        part = bodies[start : start + CHILDREN_AT_ONCE]
        writes = [_Write("create_child", _members(body), run._lease) for body in part]
        batcher.post(writes)
        for body, write in zip(part, writes):
            answer = yield from batcher.wait(write)
            if not answer["created"]:
                _warn_of_differences(run.run_id, "child", body["name"], answer["run"], input=body.get("input", {}))
            runs.append(answer["run"])
    return runs


def _join_children(run: Run[Any], runs: dict[str, Json], alone: bool = False) -> Op[list[Any]]:
    """Wait until all of these have ended; their results or exceptions, in order.

    alone: the run has no other child that lives, so they need not be named.
    """
    while live := [name for name, child in runs.items() if not _has_ended(child)]:

        def look(name: str, wait_s: float = 0.0) -> Op[Json]:
            path = _path("runs", runs[name]["id"], include="run", wait_ms=_ms(wait_s))
            runs[name] = yield from _member(
                _request(run._client, "GET", path, lease=run._lease, wait_s=wait_s), "run")
            return runs[name]

        def read(wait_s: float) -> Op[Json | None]:
            """Wait for the first that lives or, when the server answered that all have ended, look at all of them."""
            if wait_s or len(live) == 1:
                first = yield from look(live[0], wait_s)
                return first if _has_ended(first) else None
            children, _ = yield from _child_runs(run)
            for name in live:
                if name in children and "payloadOmitted" not in children[name]:
                    runs[name] = children[name]
                else:
                    yield from look(name)
            return runs[live[0]]

        condition = {"children": True if alone else live[:CHILDREN_NAMED]}
        yield from _wait_for(run._client, condition, read, run=run, poll_s=GATE_POLL_S)
    return [_outcome(child) for child in runs.values()]


def _child_runs(run: Run[Any]) -> Op[tuple[dict[str, Json], bool]]:
    """The children of this run, by name, and whether these are all.  Large payloads are left out."""
    path = _path("runs", run.run_id, include="childRuns")
    answer = yield from _request(run._client, "GET", path, lease=run._lease)
    named = {child["metadata"]["parentEdgeName"]: child for child in answer["childRuns"]
             if child["metadata"] is not None}
    return named, "truncated" not in answer and len(named) == len(answer["childRuns"])


# --- a run from its begin to its end


def _begin_run(client: Client[Any], run_id: str, parent: _Lease | None = None) -> Op[Json]:
    """Take a run's lease under a name of our own: two executions in one process must not pass for one.

    A child whose lease a dead worker still has is waited for: its parent was taken over only just now.
    """
    headers = {"x-tidebase-worker": _new_id("worker")}
    for tries in itertools.count(1):
        if parent is not None:
            parent.boundary()
        try:
            path = _path("runs", run_id, "begin")
            return (yield from _request(client, "POST", path, {"checkpoints": True}, headers=headers))
        except TidebaseError as error:
            leased = error.status == 409 and isinstance(error.body, dict) and error.body.get("leaseOwner")
            if parent is None or not leased or isinstance(error, (LeaseLost, RunCancelled)):
                raise
        yield client._driver.sleep(_backoff(LOCKED_POLL_S, tries), parent.event)
    raise AssertionError("unreachable")


def _begin_and_execute(client: Client[Any], run: Json, workflow: Callable[..., Any], parent: _Lease | None = None,
                       may_leave: bool = False, write_behind: bool = False) -> Op[Any]:
    """Execute a run unless it completed before; returns its result."""
    if run.get("status") == "completed":
        return run["result"]
    answer = yield from _begin_run(client, run["id"], parent)
    if answer["leaseOwner"] is None:
        return answer["run"]["result"]
    behind = write_behind or (parent is not None and parent.write_behind)
    lease = _Lease(answer["run"], answer["leaseOwner"], client._driver.event(), parent, behind)
    begun: Run[Any] = client._context(client, answer["run"], lease, answer, may_leave)
    return (yield from _execute(begun, workflow))


def _execute(run: Run[Any], workflow: Callable[..., Any], in_worker: bool = False) -> Op[Any]:
    """Execute a run that is held, under heartbeats, to one of its ends: completed, failed, given back or lost.

    In a worker that goes on, a CancelledError or KeyboardInterrupt out of the workflow is its failure: a run that was
    given back would be claimed again at once, and end so again, without end.
    """
    lease, client = run._lease, run._client
    client._heartbeater.add(lease)
    try:
        result = yield client._driver.invoke(workflow, _fit(workflow, run, run.input), f"workflow {run.name!r}")
        lease.fence()  # user code may have swallowed it
        return (yield from _complete(run, result))[0]
    except (Exception, SystemExit) as error:
        if lease.state == "waiting":
            raise RunSuspended from error
        gone = lease.gone()
        if gone is None:
            with _logged(run, "failure"):
                yield from _fail(run, error)
            raise
        if lease.state in _LIVE:  # the parent's lease ended, this one is still ours
            yield from _give_back(run)
        if isinstance(error, type(gone)):
            raise
        raise copy.copy(gone) from error
    except GeneratorExit:
        raise
    except BaseException as error:
        left = lease.state == "waiting" or lease.is_suspended or _is_suspension(error)
        if in_worker and not left and lease.gone() is None and not _is_cancelled_by_others(error):
            ending = RuntimeError(f"the workflow ended with {type(error).__name__}, which nobody asked of it")
            ending.__cause__ = error
            with _logged(run, "failure"):
                yield from _fail(run, ending)
            raise ending  # noqa: B904 - it has its cause, for the record
        yield from _give_back(run)
        if left and not isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
            raise RunSuspended from error  # also out of the group that a TaskGroup makes of it
        raise
    finally:
        client._heartbeater.remove(lease)
        lease.become("ended", *_LIVE)


def _is_suspension(error: BaseException) -> bool:
    """Whether it is RunSuspended, or a group of nothing else: what a TaskGroup raises when several waits unwind."""
    parts = getattr(error, "exceptions", None)
    return all(map(_is_suspension, parts)) if parts else isinstance(error, RunSuspended)


def _is_cancelled_by_others(error: BaseException) -> bool:
    """Whether this task was cancelled, as when the event loop ends, and did not merely await one that was.  Only Python
    3.11 and newer tell the two apart; before, it is taken for the latter."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop: a thread
        task = None
    return isinstance(error, asyncio.CancelledError) and task is not None and getattr(task, "cancelling", int)() > 0


def _complete(run: Run[Any], result: Any, brief: bool = True) -> Op[tuple[Any, Json]]:
    """Record the result.  Returns it as JSON gives it back, and the answer; brief: without all of the run."""
    lease = run._lease
    encoded, plain = _to_json(result, f"the result of workflow {run.name!r}")

    def explain(outcome: Json | Exception) -> Json | Exception:
        if not isinstance(outcome, BodyTooLarge):
            return outcome
        message = (f"the result of run {run.run_id} of workflow {run.name!r} has {len(encoded):,} bytes, more than the "
                   "server takes: see its setting TIDEBASE_MAX_BODY")
        return BodyTooLarge(message, 413, outcome.body, outcome.code, outcome.path)

    _fail_open_steps(run)
    _warn_of_skipped_steps(run)
    with lease.ending():
        lease.on_returned()
        members = b'"brief":%s,"result":%s' % (b"true" if brief else b"false", encoded)
        answer = yield from run._client._batcher.write("complete_run", members, lease, explain=explain)
    if answer["run"]["status"] == "cancelled":
        lease.cancelled(answer)
    return plain, answer


def _fail(run: Run[Any], error: BaseException | Json | str) -> Op[Json]:
    """Record what ended the run, after all that it wrote before.  Returns the answer."""
    failure: Any = _error_json(error) if isinstance(error, BaseException) else error
    failure = {"message": failure} if isinstance(failure, str) else failure
    step = next((name for raised, name in run._step_failures if raised is error), None)
    if step is not None:
        failure["step"] = step
    fields: Json = {"error": failure}
    if getattr(error, "retryable", True) is False:
        fields["retryable"] = False
    _fail_open_steps(run)
    yield from _settle_writes(run)
    with run._lease.ending():
        return (yield from run._client._batcher.write("fail_run", _members(fields), run._lease))


def _give_back(run: Run[Any]) -> Op[None]:
    """Release the run, so that another worker gets it now and no attempt is spent; one that waits is released.

    What it wrote before is made durable first.  Where the server does not answer, the end of the lease does the same.
    """
    if run._lease.state != "waiting":
        with _logged(run, "release"):
            yield from _settle_writes(run)
            body = {"leaseOwner": run._lease.owner}
            with run._lease.ending():
                yield from _request(run._client, "POST", _path("runs", run.run_id, "release"), body,
                                    patience_s=RELEASE_S)


@contextlib.contextmanager
def _logged(run: Run[Any], what: str) -> Iterator[None]:
    """For a run that is over here, whatever the server answers: a refusal is logged, not raised."""
    try:
        yield
    except TidebaseError as refused:
        logger.warning("run %s of workflow %s: its %s could not be recorded: %s", run.run_id, run.name, what,
                       refused, extra={"event": "end_refused", "run_id": run.run_id, "verb": what,
                                       "code": refused.code})


# ------------------------------------------------------------------------------
# The worker: claims while there are free places, and winds down.
# ------------------------------------------------------------------------------


class _Worker:
    """One `work()`."""

    def __init__(self, client: Client[Any], queues: list[str], poll_s: float, limit: int | None, concurrency: int,
                 owner: str | None, on_error: Callable[..., Any] | None, write_behind: bool = False) -> None:
        if not queues or concurrency < 1 or (limit is not None and limit < 1):
            raise ValueError("work() needs a queue, a limit and a concurrency of at least 1")
        self._client, self._queues, self._poll_s, self._limit, self._on_error = client, queues, poll_s, limit, on_error
        self._concurrency, self._owner, self._write_behind = concurrency, owner, write_behind
        self._driver = client._driver
        self._place_freed = self._driver.event()  # set by _stop(), too
        self._stopped = self._driver.event()
        self._stopping = False
        self._claim_handle = CancelHandle()  # of the claim that waits
        self._busy: set[_Lease] = set()  # of the runs that take a place: not of those whose outcome is on its way
        self._tasks: list[Any] = []
        self._claim: Json | None = None  # repeated as it is until it is answered, so that no claimed run is lost
        self._failures = 0

    def work(self, stop: Callable[[], bool] | None, shutdown_s: float) -> Op[None]:
        """Claim and execute until a signal comes or stop() is true; then wind down."""
        workflows, url = sorted(self._client._workflows), self._client.url
        logger.info("worker serves the workflows %s from the queues %s at %s, %s at once",
                    ", ".join(workflows) or "none", ", ".join(self._queues), url, self._concurrency,
                    extra={"event": "worker_started", "workflows": workflows, "queues": self._queues, "url": url})
        if not workflows:
            logger.warning("no workflow is registered, so the worker at %s claims nothing: register one with "
                           "tide.workflow(name, fn), on the same client, before tide.work()", url,
                           extra={"event": "no_workflows", "url": url})
        with _stop_signals() as signalled:
            claiming = self._driver.start(self._claims(), "tidebase-claims")
            try:
                while not (claiming.done() or signalled() or (stop is not None and stop())):
                    yield self._driver.sleep(STOP_CHECK_S)
            except asyncio.CancelledError:  # of the task that awaits us: its runs are given back before it ends
                self._cancel_tasks()
                yield from self._wind_down(claiming, shutdown_s)
                raise
            finally:
                self._stop()
            if self._busy:
                logger.log(logging.WARNING if signalled() else logging.INFO, "the worker stops: %s under way, given "
                           "back when the current step has ended, in %g s at most; press Ctrl-C or send the signal "
                           "again to end at once", f"{len(self._busy)} run{'s are' if len(self._busy) > 1 else ' is'}",
                           shutdown_s, extra={"event": "worker_stops"})
            yield from self._wind_down(claiming, shutdown_s)
            if claiming.done():
                claiming.result()  # a refusal

    def _claims(self) -> Op[None]:
        """Claim runs and start them whenever there are free places, until the worker stops."""
        while not self._stopping:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._place_freed.clear()
            free = self._concurrency - len(self._busy)
            if not self._client._workflows:
                yield self._driver.sleep(CLAIM_PAUSE_S, self._stopped)  # another thread may register one
            elif free > 0:
                pause_s = yield from self._claim_runs(free, self._poll_s, self._claim_handle)
                yield self._driver.sleep(pause_s, self._stopped)
            elif not self._stopping:
                yield self._driver.sleep(None, self._place_freed)
        if self._claim is not None:  # cancelled: asked once more, it answers what it took, which is given back
            yield from self._claim_runs(1, 0.0)

    def _claim_runs(self, free: int, wait_s: float, cancel: CancelHandle | None = None) -> Op[float]:
        """Claim once and start what came.  Returns the seconds to pause before the next claim."""
        client = self._client
        if self._claim is None:
            owner = self._owner or f"{platform.node()}-{os.getpid()}-{_new_id('worker')}"
            self._claim = _body(id=_new_id("claim"), queues=self._queues, lease_owner=owner, checkpoints=True,
                                workflows=sorted(client._workflows), limit=min(self._limit or free, free, 100))
        asked, body = time.monotonic(), {**self._claim, "waitMs": _ms(wait_s)}
        try:
            answer = yield from _request(
                client, "POST", "/queues/claim", body, once_s=CLAIM_S, wait_s=wait_s, cancel=cancel)
        except TidebaseError as error:
            if self._stopping:
                return 0.0
            if error.status is not None and error.status < 500 and error.status != 429:
                raise
            self._failures += 1
            if self._failures == 1:
                logger.warning("the worker goes on asking, but the server is away: %s", error,
                               extra={"event": "server_away", "error": str(error), "url": client.url})
            return _backoff(BACKOFF_S, self._failures)
        if self._failures:
            logger.info("the server at %s is back", client.url, extra={"event": "server_back", "url": client.url})
        self._claim, self._failures = None, 0
        for run in answer["runs"]:
            yield from self._start(run, answer["leaseOwner"])
        if any(run["workflowName"] not in client._workflows for run in answer["runs"]):
            return UNKNOWN_PAUSE_S
        if not answer["runs"] and time.monotonic() - asked < wait_s / 2:  # too many wait there already
            return self._claim_handle.retry_after_s + _backoff((CLAIM_PAUSE_S, CLAIM_PAUSE_S), 1)
        return 0.0

    def _start(self, claimed: Json, owner: str) -> Op[None]:
        lease = _Lease(claimed, owner, self._driver.event(), write_behind=self._write_behind)
        run: Run[Any] = self._client._context(self._client, claimed, lease, claimed, may_leave=True)
        workflow = self._client._workflows.get(run.name)
        if workflow is None:  # an older server does not look at what a claim asks for
            logger.error("run %s is of workflow %s, which is not registered with this worker: it is given back; the "
                         "server at %s is too old to keep it for a worker that knows it", run.run_id, run.name,
                         self._client.url,
                         extra={"event": "workflow_unknown", "run_id": run.run_id, "workflow": run.name})
        if workflow is None or self._stopping:
            yield from _give_back(run)
            return
        lease.on_returned = functools.partial(self._free_place, lease)
        self._busy.add(lease)
        self._tasks.append(self._driver.start(self._execute(run, workflow), f"tidebase-{run.run_id}"))

    def _execute(self, run: Run[Any], workflow: Callable[..., Any]) -> Op[None]:
        """Execute a run; however it ends, the worker goes on."""
        extra = {"event": "run_failed", "run_id": run.run_id, "workflow": run.name}
        try:
            yield from _execute(run, workflow, in_worker=True)
        except RunSuspended:
            waits = run._lease.state == "waiting"
            logger.info("run %s of workflow %s left its worker%s", run.run_id, run.name, " to wait" if waits else "",
                        extra={**extra, "event": "run_waiting" if waits else "run_released"})
        except (Exception, SystemExit) as error:
            lost = run._lease.lost
            if lost is not None and not isinstance(lost, RunCancelled):
                return  # it goes on elsewhere; logged when it was noticed
            _hide_frames(error)
            if lost is None:
                logger.warning("run %s of workflow %s failed, attempt %s", run.run_id, run.name, run.attempt,
                               exc_info=True, extra=extra)
            try:
                if self._on_error is not None:
                    yield self._driver.invoke(self._on_error, _fit(self._on_error, error, run._record), "on_error")
            except Exception as raised:
                _hide_frames(raised)
                logger.exception("on_error itself failed, for run %s of workflow %s", run.run_id, run.name,
                                 extra={**extra, "event": "on_error_failed"})
        finally:
            self._free_place(run._lease)

    def _free_place(self, lease: _Lease) -> None:
        """The next run may be claimed while the outcome of this one is still on its way."""
        self._busy.discard(lease)
        self._place_freed.set()

    def _cancel_tasks(self) -> None:
        """Cancel the tasks (a thread cannot be)."""
        for task in self._tasks:
            task.cancel()

    def _stop(self) -> None:
        """Claim no more; a claim that waits is cancelled."""
        self._stopping = True
        self._place_freed.set()
        self._stopped.set()
        self._claim_handle.cancel()

    def _wind_down(self, claiming: Any, shutdown_s: float) -> Op[None]:
        """Have every run unwound at its next boundary and wait for that, at most shutdown_s."""
        self._stop()
        deadline = time.monotonic() + shutdown_s
        while any(not task.done() for task in [claiming, *self._tasks]) and time.monotonic() < deadline:
            for lease in list(self._busy):
                lease.suspend()
            yield self._driver.sleep(0.05)
        left = [lease.run_id for lease in list(self._busy)]
        if left:
            logger.warning("the worker stopped with runs under way after %g s; they are taken over when their leases "
                           "end: %s", shutdown_s, ", ".join(left),
                           extra={"event": "shutdown_overdue", "run_ids": left})
            self._cancel_tasks()


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGTERM or SIGINT only sets a flag, since a handler may interrupt code that holds any lock;
    the handlers from before are back from then on."""
    before: dict[int, Any] = {}
    seen: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle) or signal.SIG_DFL
    try:
        yield lambda: bool(seen)
    finally:
        restore()


# ------------------------------------------------------------------------------
# Batching and heartbeats: what all runs of a process have to write, in few requests; their leases, in one.
# ------------------------------------------------------------------------------


class _Write:
    """Something to be made durable: a step, a run's result, a new run."""

    __slots__ = ("_give_up_at", "_path", "data", "done", "explain", "is_behind", "is_sent", "lease", "outcome",
                 "since", "verb")

    def __init__(self, verb: str, members: bytes, lease: _Lease | None, *, path: str = "/writes",
                 timeout_s: float = 0.0, is_behind: bool = False,
                 explain: Callable[[Json | Exception], Json | Exception] | None = None) -> None:
        """members: JSON, without the braces.  path: for errors; timeout_s: how long it is tried; both without a lease.
        is_behind: no call waits for it.  explain: makes of an answer or refusal what the caller gets."""
        if lease is not None:
            chained = b',"chained":true,' if lease.write_behind and verb != "fail_run" else b","
            members = lease.fields + chained + members
        self.verb, self.lease, self._path = verb, lease, path
        self.data = b'{"do":"%s",%s}' % (verb.encode(), members)
        self.is_behind, self.explain = is_behind, explain
        self.is_sent = False  # it may have arrived, though there is no answer
        self.since = time.monotonic()
        self._give_up_at = self.since + timeout_s
        self.outcome: Json | Exception | None = None  # the answer, or what is raised for it
        self.done: Any = None  # the event of those who wait for the outcome

    @property
    def path(self) -> str:
        """What it is about, for the error that tells of its refusal."""
        return self._path if self.lease is None else _path("runs", self.lease.run_id)

    @property
    def until(self) -> float:
        """The moment until which it is worth sending: the lease's end or, without one, that of the timeout."""
        return self._give_up_at if self.lease is None else self.lease.ends_at

    def may_be_sent(self) -> bool:
        """Whether no earlier write of its run is in flight."""
        return self.lease is None or not self.lease.unsettled.in_flight

    def settle(self, outcome: Json | Exception) -> None:
        """Note the outcome; `wake` is to follow."""
        if self.outcome is not None:
            return
        lease = self.lease
        if lease is not None and isinstance(outcome, (LeaseLost, RunCancelled)):
            lease.lose(outcome)
        elif self.explain is not None:
            outcome = self.explain(outcome)
        if lease is not None and self.is_behind and isinstance(outcome, Exception):
            lease.refuse(outcome)
        self.outcome = outcome
        if lease is not None:
            lease.unsettled.remove(self)

    def wake(self) -> None:
        """Wake those who wait for the outcome."""
        if self.done is not None and self.outcome is not None:
            self.done.set()


class _Unsettled:
    """The writes of one run that have no outcome yet, in order."""

    def __init__(self) -> None:
        self.in_flight = False  # some of them are: the others wait, so that none is overtaken
        self._writes: deque[_Write] = deque()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, write: _Write) -> None:
        """The run has more to be made durable."""
        with self._lock:
            self._writes.append(write)
            self._bytes += len(write.data)

    def remove(self, write: _Write) -> None:
        """A write has an outcome, or is withdrawn."""
        with self._lock, contextlib.suppress(ValueError):
            self._writes.remove(write)
            self._bytes -= len(write.data)

    def all(self) -> list[_Write]:
        """These writes, now."""
        with self._lock:
            return list(self._writes)

    def in_the_way_of(self, write: _Write) -> _Write | None:
        """The write that must have its outcome before another may be behind: the bounds of write-behind."""
        with self._lock:
            if self._writes and (len(self._writes) >= BEHIND_WRITES or self._bytes + len(write.data) > BEHIND_BYTES
                                 or time.monotonic() - self._writes[0].since >= BEHIND_S):
                return self._writes[0]
        return None


_AWAKE = threading.Event()  # for what wakes a leader that does not sleep


class _WriteBatcher:
    """Sends writes to POST /writes: one request carries what all runs of this process have ready, for one commit.

    A run's writes stand in one request at a time, in order, so that none overtakes another.  At most MAX_IN_FLIGHT
    requests are in flight, and who sends the next one, the leader, is one thread or task: that of the first write that
    is ready, or one in the background.  Runs that got an answer mostly have their next write at once, each in a thread
    or task of its own: the leader waits for as many writes as the last request had, but no longer than GATHER_S after
    its answer, since many small requests cost all sides more.  A run alone never waits, nor one whose steps take long.
    A request is repeated until it has an answer or no write in it is worth sending any more.
    """

    def __init__(self, client: Client[Any]) -> None:
        self._client = client
        self._lock = threading.RLock()  # the garbage collector may close a sender's generator at any time
        self._ready: deque[_Write] = deque()
        self._leader: Any = None  # what wakes the leader, an event; None: there is none
        self._led_until = 0.0  # then a leader is given up that has not looked again: its event loop may have ended
        self._in_flight: list[list[_Write]] = []
        self._expected, self._expected_until = 0, 0.0  # how many writes the next request waits for, and until when
        self._trouble = "it has not answered"  # to the last request that failed

    def write(self, verb: str, members: bytes, lease: _Lease | None = None, **options: Any) -> Op[Json]:
        """Make something durable and return the server's answer: see _Write for the arguments, and `send`."""
        return self.send(_Write(verb, members, lease, timeout_s=self._client.timeout_s, **options))

    def send(self, write: _Write) -> Op[Json]:
        """Make a write durable and return the server's answer.

        Raises what the write was refused with; LeaseLost or, without a lease, Unreachable when no answer came in time.
        """
        if write.lease is not None:
            write.lease.fence()
        with self._lock:
            self._add(write)
            leads = not self._is_led()
            if leads:
                self._set_leader(_AWAKE)
        if leads:
            yield from self._lead(self._client._driver, write.until)
        return (yield from self.wait(write))

    def post(self, writes: Sequence[_Write]) -> None:
        """Have these made durable in the background, in one request as far as they fit, after what their runs have
        written before; each may be waited for."""
        with self._lock:
            for write in writes:
                self._add(write)
        self._start_leader()

    def post_behind(self, write: _Write) -> Op[None]:
        """Likewise, as soon as the bounds of write-behind let another write of its run be behind."""
        lease = cast(_Lease, write.lease)
        while True:
            with self._lock:
                other = lease.unsettled.in_the_way_of(write)
                if other is None:
                    self._add(write)
                    break
            yield from self.settled(other)
            lease.boundary()
        self._start_leader()

    def wait(self, write: _Write) -> Op[Json]:
        """The answer to a write; raises what it was refused with."""
        try:
            yield from self.settled(write)
        except BaseException:
            if write.lease is None:
                self.withdraw(write)
            raise
        if isinstance(write.outcome, Exception):
            raise write.outcome
        return cast(Json, write.outcome)

    def settled(self, write: _Write) -> Op[None]:
        """Wait until a write has an outcome."""
        while write.outcome is None:
            if write.done is None:
                write.done = self._client._driver.event()
            left_s = write.until - time.monotonic()
            if left_s <= 0:
                self.withdraw(write)
                self._give_up(write)
                write.wake()
            elif write.outcome is None:  # again: it may have come before there was the event
                yield self._client._driver.sleep(min(left_s, RECHECK_S), write.done)
                if write.outcome is None:
                    self._start_leader()

    def withdraw(self, write: _Write) -> bool:
        """Take a write back, unless it has been sent."""
        with self._lock:
            if write.is_sent or write not in self._ready:
                return False
            self._ready.remove(write)
            if write.lease is not None:
                write.lease.unsettled.remove(write)
            return True

    def _add(self, write: _Write) -> None:
        """Under the lock: queue a write."""
        self._ready.append(write)
        if write.lease is not None:
            write.lease.unsettled.add(write)
        if self._leader is not None and not self._pause_s():
            self._leader.set()

    def _is_led(self) -> bool:
        """Under the lock: whether there is a leader."""
        return self._leader is not None and time.monotonic() < self._led_until

    def _set_leader(self, event: Any) -> None:
        """Under the lock: there is a leader, which the event wakes, and which looks again within RECHECK_S."""
        self._leader, self._led_until = event, time.monotonic() + 2 * RECHECK_S

    def _pause_s(self) -> float:
        """Under the lock: how long the leader is to wait before it looks again; 0: the next request is to be sent.  A
        second one is in flight only with as many writes as the first."""
        expected, until = self._expected, self._expected_until
        if self._in_flight:
            expected, until = max(map(len, self._in_flight)), math.inf
        left_s = until - time.monotonic()
        wanted = max(expected, 1) if left_s > 0 else 1
        found = sum(1 for _ in itertools.islice(filter(_Write.may_be_sent, self._ready), wanted))
        if found == wanted and len(self._in_flight) < MAX_IN_FLIGHT:
            return 0.0
        return min(left_s, RECHECK_S) if left_s > 0 else RECHECK_S

    def _take(self) -> list[_Write]:
        """Under the lock: what the next request carries.  Writes of runs that have others in flight stay."""
        batch: list[_Write] = []
        stay: list[_Write] = []
        size = 0
        while self._ready and len(batch) < BATCH_WRITES:
            write = self._ready[0]
            if not write.may_be_sent():
                stay.append(self._ready.popleft())
                continue
            size += len(write.data)
            if batch and size > BATCH_BYTES:
                break
            batch.append(self._ready.popleft())
        self._ready.extendleft(reversed(stay))
        for write in batch:
            write.is_sent = True
            if write.lease is not None:
                write.lease.unsettled.in_flight = True
        self._in_flight.append(batch)
        return batch

    def _start_leader(self, driver: Any = None) -> None:
        """Have what is ready sent in the background, unless there is a leader.  driver: default the client's."""
        with self._lock:
            if not self._ready or self._is_led():
                return
            self._set_leader(_AWAKE)
        driver = driver or self._client._driver
        if driver.awaited:
            try:
                asyncio.get_running_loop()
            except RuntimeError:  # a thread beside the event loop: the one that sends heartbeats
                driver = self._client._threads
        try:
            driver.start(self._lead(driver), "tidebase-writes")
        except RuntimeError:  # the machine gives no more threads: the next write tries again, and who waits for one
            logger.warning("no thread to send writes with", exc_info=True, extra={"event": "no_thread"})
            self._leader = None

    def _lead(self, driver: Any, until: float = math.inf) -> Op[None]:
        """As the leader: send the next request when it is time; another leader sends the one after it.  until: when who
        leads has to stop."""
        try:
            batch = yield from self._gather(driver, until)
            if batch:
                yield from self._send_batch(batch, driver, until)
        except GeneratorExit:  # whoever waits finds that nobody leads
            raise
        except BaseException:  # a thread goes on where a task was cancelled, as the event loop may be ending
            self._start_leader(self._client._threads)
            raise
        self._start_leader(driver)

    def _gather(self, driver: Any, until: float) -> Op[list[_Write]]:
        """What the next request carries, once it is time to send it.  From then on there is no leader."""
        try:
            if driver.awaited:
                yield driver.sleep(0)  # first all tasks that are as far: what they have goes along
            while True:
                with self._lock:
                    self._leader = None
                    pause_s, left_s = self._pause_s(), until - time.monotonic()
                    if not pause_s:
                        return self._take()
                    if left_s <= 0 or not self._ready:  # all may have been withdrawn
                        return []
                    self._set_leader(event := driver.event())
                yield driver.sleep(min(pause_s, left_s), event)
        except BaseException:
            self._leader = None
            raise

    def _send_batch(self, batch: list[_Write], driver: Any, until: float) -> Op[None]:
        """Send these until each has an outcome.  Where that is broken off, those without one are queued again."""
        try:
            yield from self._send(batch, driver, until)
        except Exception as error:  # a defect: those who wait get it as their exception
            for write in batch:
                write.settle(error)
        finally:
            with self._lock:
                self._in_flight = [each for each in self._in_flight if each is not batch]
                self._expected = sum([not write.is_behind for write in batch])
                self._expected_until = time.monotonic() + GATHER_S
                for write in reversed(batch):
                    if write.lease is not None:
                        write.lease.unsettled.in_flight = False
                    if write.outcome is None:
                        self._ready.appendleft(write)
                if self._leader is not None:
                    self._leader.set()
            for write in batch:
                write.wake()

    def _send(self, batch: list[_Write], driver: Any, until: float) -> Op[None]:
        """Send a batch until there is an answer, and settle each write with its part of it; or until the time is up."""
        for tries in itertools.count(1):
            batch = [write for write in batch if self._is_worth_sending(write)]
            sent = time.monotonic()
            ends = min(until, max([write.until for write in batch], default=sent))
            if sent >= ends:
                return
            timeout_s = min(self._client.timeout_s, ends - sent)
            data = b'{"writes":[%s]}' % b",".join([write.data for write in batch])
            try:
                reply = yield from _attempt(driver, Request("POST", "/writes", data, {}, timeout_s))
                break
            except _NoAnswer as failure:
                _warn_of_silence(self._client, tries, failure)
                self._trouble, pause_s = str(failure), failure.pause_s + _backoff(BACKOFF_S, tries)
            yield driver.sleep(max(min(pause_s, ends - time.monotonic()), 0.0))
        answer = _loads(reply.data)
        if 200 <= reply.status < 300 and isinstance(answer, dict):
            for write in self._settle_each(batch, answer["results"], sent):
                yield from self._send([write], driver, until)
        elif len(batch) > 1 and reply.status in (400, 413):  # one is at fault, and must not take the others along
            half = len(batch) // 2
            yield from self._send(batch[:half], driver, until)
            yield from self._send(batch[half:], driver, until)
        else:
            body = reply.data.decode("utf-8", "replace") if answer is None else answer
            for issue in body.get("issues") or () if isinstance(body, dict) else ():
                issue["path"] = issue["path"].replace("writes.0.", "", 1)  # it is the only one
            for write in batch:
                write.settle(_refusal(reply.status, body, write.path, len(write.data)))

    def _settle_each(self, batch: list[_Write], results: list[Json], sent: float) -> list[_Write]:
        """Settle each write with its result.  Returns those to be sent again, alone: those whose answers had no room
        beside the others', and those behind a refused write of their run whose caller got the exception, since the run
        goes on without that write."""
        again: list[_Write] = []
        for write, result in zip(batch, results):
            lease, code = write.lease, result.get("code")
            if "error" not in result:
                if lease is not None:
                    lease.extend(sent)
                write.settle(result)
            elif code == "prior_refused" and lease is not None and lease.refused is not None:
                write.settle(copy.copy(lease.refused))
            elif code == "prior_refused" or (code == "batch_too_large" and len(batch) > 1):
                again.append(write)
            else:
                write.settle(_refusal(result["status"], result, write.path, len(write.data)))
        return again

    def _is_worth_sending(self, write: _Write) -> bool:
        """Whether a write has no outcome yet.  It gets one here where the lease or the time is over."""
        lease = write.lease
        if write.outcome is None and lease is not None:
            over = lease.gone() or (None if write.verb == "fail_run" else lease.refused)
            if over is not None:
                write.settle(copy.copy(over))
        if write.outcome is None and time.monotonic() >= write.until:
            self._give_up(write)
        return write.outcome is None

    def _give_up(self, write: _Write) -> None:
        """There is no answer in time: the lease is gone or, without one, the server is unreachable."""
        message = f"no answer from {self._client.url} to POST /writes ({write.verb}): {self._trouble}{_WHERE}"
        if write.lease is None:
            write.settle(Unreachable(message, path=write.path))
        else:
            message = f"the lease of run {write.lease.run_id} ran out: {message}"
            write.settle(LeaseLost(message, code="lease_lost", path=write.path))


class _Heartbeater:
    """One thread that renews the leases of all runs a client holds; it starts with the first and ends with the last.

    It has plain steps that take longer than SLOW_STEP_S begun in the record, too, so that they are seen as running.
    The async client has it as well: a step that blocks the event loop must not cost the leases of all its runs.
    """

    def __init__(self, client: Client[Any]) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._leases: dict[str, _Lease] = {}
        self._closed = False
        self._thread: threading.Thread | None = None
        self._sleeps_until = 0.0
        self._steps: dict[_Step, float] = {}  # plain steps under way, and when to announce each: the next one first

    def watch(self, step: _Step) -> None:
        """Announce a step that begins now, unless it is forgotten in time."""
        due = time.monotonic() + SLOW_STEP_S
        with self._lock:
            self._steps[step] = due
            self._wake_by(due)

    def forget(self, step: _Step) -> None:
        """The step has ended: announce it no more.  Where that is under way already, `step.announcement` is set."""
        with self._lock:
            self._steps.pop(step, None)

    def add(self, lease: _Lease) -> None:
        """Keep a lease alive from now on."""
        with self._lock:
            before = self._leases.get(lease.run_id)
            self._leases[lease.run_id] = lease
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tidebase-heartbeats", daemon=True)
                self._thread.start()
            self._wake_by(lease.heartbeat_at)
        if before is not None:  # taken again by the same worker: what is left of the first execution must not write
            before.lose(LeaseLost(f"run {lease.run_id} was taken again", code="lease_lost"))

    def remove(self, lease: _Lease) -> None:
        """Let a lease go.  The thread notices when it is up the next time: waking it costs more than its sleep."""
        with self._lock:
            if self._leases.get(lease.run_id) is lease:
                del self._leases[lease.run_id]

    def close(self) -> None:
        """Let the thread end now, if no lease is held, and later without leaving a connection."""
        self._closed = True
        self._wake.set()

    def _wake_by(self, moment: float) -> None:
        """Have the thread look again at that time at the latest.  It is woken only where it would sleep longer: not by
        each of many short steps and runs."""
        if self._sleeps_until > moment:
            self._sleeps_until = moment
            self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.clear()
            with self._lock:
                self._leases = {run_id: lease for run_id, lease in self._leases.items() if lease.state != "lost"}
                if not self._leases:
                    self._thread = None
                    if self._closed:  # what this thread opened since
                        self._client._threads.close()
                    return
                leases, now = list(self._leases.values()), time.monotonic()
                self._announce(now)
                moments = [*itertools.islice(self._steps.values(), 1), *(lease.heartbeat_at for lease in leases)]
                if self._sleeps_until > now:
                    moments.append(self._sleeps_until)  # of a step that is over: woken for it anew, it would cost more
                self._sleeps_until = min(moments)
            is_due = min(lease.heartbeat_at for lease in leases) <= now
            try:
                if is_due:
                    self._send(leases)
            except Exception:  # a callback's, or a defect: the other runs must not pay for it
                logger.exception("a heartbeat to %s failed", self._client.url, extra={"event": "heartbeat_failed"})
            if not is_due:
                self._wake.wait(max(self._sleeps_until - now, 0.0))

    def _announce(self, now: float) -> None:
        """Under the lock, so that who forgets a step then sees its announcement: have slow steps begun."""
        for step in list(itertools.takewhile(lambda step: self._steps[step] <= now, self._steps)):
            del self._steps[step]
            step.announcement = _Write("begin_step", step.fields, step.run._lease)
            self._client._batcher.post([step.announcement])

    def _send(self, leases: list[_Lease]) -> None:
        """One request for all.  Where it fails, they are due again soon: a restarted server waits for exactly this."""
        sent, shortest = time.monotonic(), min(lease.duration_s for lease in leases)
        for lease in leases:
            lease.heartbeat_at = sent + min(1.0, lease.duration_s / 10)
        body = {"runs": [{"id": lease.run_id, "leaseOwner": lease.owner} for lease in leases]}
        path, once_s, threads = "/heartbeats", max(shortest / HEARTBEATS_PER_LEASE, 0.5), self._client._threads
        try:
            answer = threads.drive(_request(self._client, "POST", path, body, once_s=once_s, driver=threads))
        except TidebaseError as error:
            names = ", ".join(lease.run_id for lease in leases)
            logger.info("a heartbeat for the runs %s was not answered: %s", names, error,
                        extra={"event": "heartbeat_unanswered", "error": str(error)})
            return
        for lease, result in zip(leases, answer["results"]):
            if "error" not in result:
                lease.renew(sent)
            elif result.get("code") in ("lease_lost", "run_cancelled", "not_found") and (
                    lease.state not in ("leaving", "ending")):
                refusal = _refusal(409, result, path)
                lease.lose(refusal if isinstance(refusal, RunCancelled)
                           else LeaseLost(str(refusal), 409, result, "lease_lost"))


# ------------------------------------------------------------------------------
# Requests and connections: an HTTP exchange, written once, and the two drivers that perform it, blocking and asyncio.
# ------------------------------------------------------------------------------


class CancelHandle:
    """A handle on a long poll, to end it from another thread or task."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self.retry_after_s = 0.0  # what its answer asked for
        self._end: Callable[[], None] | None = None

    def attach(self, end: Callable[[], None] | None) -> None:
        """The request is about to be sent, on a connection that `end` ends; None: its answer is there."""
        self._end = end
        if end is not None and self.is_cancelled:
            end()

    def cancel(self) -> None:
        """Wait for no answer any more: the request ends with a ConnectionError, unless it has its answer already."""
        self.is_cancelled, end = True, self._end
        if end is not None:
            end()


class Request(NamedTuple):
    """What is sent, once, within timeout_s from the connection to the last byte of the answer."""
    method: str
    path: str
    body: bytes | None
    headers: Mapping[str, str]
    timeout_s: float
    is_long_poll: bool = False  # it does not count among CONNECTIONS
    cancel: CancelHandle | None = None


class Reply(NamedTuple):
    """An HTTP answer, read to its end."""
    status: int
    retry_after: str
    data: bytes


_WHERE = "; url= or TIDEBASE_URL says where the server is"  # what the errors of requests without an answer end with


class _NoAnswer(TidebaseError):
    """There was no answer, or one that asks for a repeat after pause_s.  Never raised to a user."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


def _request(client: Client[Any], method: str, path: str, body: Any = None, *, lease: _Lease | None = None,
             headers: Mapping[str, str] | None = None, patience_s: float | None = None, once_s: float | None = None,
             wait_s: float = 0.0, cancel: CancelHandle | None = None, driver: Any = None) -> Op[Json]:
    """Send until an answer comes: until the lease is gone, or without one for patience_s (default timeout_s).

    once_s: no repeat, and this long for the answer.  wait_s: on top, how long the server may hold the request.
    cancel: to end it by.  driver: default the client's.  Every request may arrive twice: the protocol has it so.
    Raises the refusal; LeaseLost or Unreachable when no answer came in time.
    """
    driver, data = driver or client._driver, None if body is None else _encode_body(body)
    patience_s = 0.0 if once_s is not None else client.timeout_s if patience_s is None else patience_s
    started = time.monotonic()
    for tries in itertools.count(1):
        if lease is not None:
            lease.fence()
        sent = time.monotonic()
        give_up_at = started + patience_s if lease is None else lease.ends_at
        timeout_s = wait_s + (once_s or min(client.timeout_s, give_up_at - sent))
        try:
            reply = yield from _attempt(driver, Request(
                method, path, data, headers or {}, timeout_s, wait_s > 0, cancel))
            return _accepted(reply, path, len(data or b""), None if method == "GET" else sent, lease)
        except _NoAnswer as failure:
            _warn_of_silence(client, tries, failure)
            pause_s = failure.pause_s + _backoff(BACKOFF_S, tries)
            if time.monotonic() + pause_s > (give_up_at if lease is None else lease.ends_at):
                message = f"no answer from {client.url} to {method} {path}, tried {tries} times: {failure}{_WHERE}"
                if lease is None:
                    cause = failure.__cause__
                    raise Unreachable(message, path=path) from cause and cause.with_traceback(None)
                message = f"the lease of run {lease.run_id} ran out: {message}"
                lease.lose(LeaseLost(message, code="lease_lost", path=path))
        if lease is not None:
            lease.fence()
        yield driver.sleep(pause_s)
    raise AssertionError("unreachable")


def _accepted(reply: Reply, path: str, size: int, written: float | None, lease: _Lease | None) -> Json:
    """The JSON of a success; else raise the refusal.  written: when the request was sent, if its success extends the
    lease."""
    answer = _loads(reply.data)
    if 200 <= reply.status < 300 and isinstance(answer, dict):
        if lease is not None and written is not None:
            lease.extend(written)
        return answer
    error = _refusal(reply.status, reply.data.decode("utf-8", "replace") if answer is None else answer, path, size)
    if lease is not None and isinstance(error, (LeaseLost, RunCancelled)):
        lease.lose(error)
    raise error


def _warn_of_silence(client: Client[Any], tries: int, failure: Exception) -> None:
    """Log that a request is being repeated, once, and only when that is no short break."""
    if tries == TRIES_BEFORE_WARNING:
        logger.warning("no answer from %s so far: trying again (%s%s)", client.url, failure, _WHERE,
                       extra={"event": "no_answer"})


def _attempt(driver: Any, request: Request) -> Op[Reply]:
    """Send a request once.  Raises _NoAnswer where a repeat may help."""
    try:
        reply: Reply = yield driver._exchange(request)
    except OSError as error:
        raise _NoAnswer(f"{type(error).__name__}: {error}") from error
    asked_s = min(float(reply.retry_after), RETRY_AFTER_CAP_S) if reply.retry_after.isdigit() else 0.0
    if request.cancel is not None:
        request.cancel.retry_after_s = asked_s
    if reply.status in (429, 502, 503, 504):
        raise _NoAnswer(f"it answered {reply.status}", asked_s)
    return reply


def _exchange(driver: Any, request: Request) -> Op[Reply]:
    """Send a request and read its answer, on an idle connection where there is one.  Raises OSError."""
    ends = time.monotonic() + request.timeout_s
    cancel = request.cancel
    while True:
        idle = driver.take_idle()
        connection = idle or (yield driver.connect(ends))
        try:
            if cancel is not None:
                cancel.attach(connection.cut)
            answer = yield from _ask(driver.server, connection, request, ends)
            while not answer.ended:
                answer.feed((yield connection.read(ends)))
            if cancel is not None:
                cancel.attach(None)
        except BaseException as error:
            connection.close()
            if idle and isinstance(error, ConnectionError) and not (cancel and cancel.is_cancelled):
                continue  # the server had closed this idle connection; the next may be the same, the last is new
            raise
        if answer.keeps_alive():
            driver.keep(connection)
        else:
            connection.close()
        return Reply(answer.status, answer.retry_after, answer.take())


def _ask(server: _Server, connection: Any, request: Request, ends: float) -> Op[_Answer]:
    """Send a request and read the head of its answer, which may come instead of reading a large body."""
    head, body, answer = server.head_of(request), request.body or b"", _Answer()
    if len(body) > EXPECT_BYTES:
        connection.write(head, ends)
        expected_by = min(ends, time.monotonic() + EXPECT_S)
        with contextlib.suppress(TimeoutError, socket.timeout):  # some never say that they want it
            while not (answer.status or answer.continues):
                answer.feed((yield connection.read(expected_by)))
        if answer.status:
            return answer
        head = b""
    connection.write(head + body, ends)
    while not answer.status:
        answer.feed((yield connection.read(ends)))
    return answer


def _read_some(connection: Any, answer: _Answer, ends: float) -> Op[bytes]:
    """The next bytes of an answer's body, b"" at its end."""
    while not (data := answer.take()) and not answer.ended:
        answer.feed((yield connection.read(ends)))
    return data


class _Server:
    """Where requests go and what each carries.  The key is in no repr and no message."""

    def __init__(self, url: str, api_key: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise ValueError("the Tidebase URL must look like http://host:7373 or https://host/prefix")
        if not all(" " < letter < "\x7f" for letter in api_key):
            raise ValueError("the Tidebase API key has characters that no header can carry")
        self.url, self.api_key = url.rstrip("/"), api_key or None
        self.host, self._prefix = parts.hostname, parts.path.rstrip("/")
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._fields = f"Host: {parts.netloc}\r\nUser-Agent: tidebase-python/{__version__}\r\n"
        if api_key:
            self._fields += f"Authorization: Bearer {api_key}\r\n"

    def head_of(self, request: Request) -> bytes:
        """The head of a request."""
        fields = "".join([f"{key}: {value}\r\n" for key, value in request.headers.items()])
        size = len(request.body or b"")
        if request.body is not None:
            fields += "Content-Type: application/json\r\n"
        if request.body is not None or request.method != "GET":
            fields += f"Content-Length: {size}\r\n"
        if size > EXPECT_BYTES:
            fields += "Expect: 100-continue\r\n"
        line = f"{request.method} {self._prefix}{request.path} HTTP/1.1\r\n"
        return f"{line}{self._fields}{fields}\r\n".encode("ascii")


class _Answer:
    """An HTTP/1.1 answer (RFC 9112), put together from bytes as they come, from whatever connection.

    http.client knows more of HTTP, but reading heads with its parser for e-mail costs more than all else in a request.
    """

    _FIELDS = re.compile(
        rb"\r\n(content-length|transfer-encoding|connection|retry-after):[ \t]*([^\r\n]*?)[ \t]*(?=\r|$)")

    def __init__(self) -> None:
        self.status = 0  # 0: its head is not there yet
        self.retry_after = ""
        self.continues = False  # the server wants to have the body (RFC 9110, 10.1.1)
        self.ended = False
        self._raw = b""
        self._body: list[bytes] = []
        self._left: int | None = None  # bytes of the body still to come; None: until the connection ends
        self._chunked = self._closes = False

    def feed(self, data: bytes) -> None:
        """Take what a connection brought, b"" at its end.  Raises ConnectionError where that makes no answer."""
        self._raw += data
        try:
            while not self.status and b"\r\n\r\n" in self._raw:
                self._read_head()
            if self.status:
                (self._read_chunks if self._chunked else self._read_rest)(at_end=not data)
        except ValueError as error:
            raise ConnectionResetError(f"broken answer: {error}") from error
        if not self.ended and (not data or (not self.status and len(self._raw) > HEAD_BYTES)):
            raise ConnectionResetError("the answer broke off")

    def take(self) -> bytes:
        """What there is of the body since this was called last."""
        body, self._body = b"".join(self._body), []
        return body

    def keeps_alive(self) -> bool:
        """Whether another request may be sent on its connection."""
        return self.ended and not (self._raw or self._closes) and (self._chunked or self._left is not None)

    def _read_head(self) -> None:
        head, _, self._raw = self._raw.partition(b"\r\n\r\n")
        status = int(head[9:12]) if head.startswith(b"HTTP/1.") else 0
        if not 100 <= status <= 599:
            raise ValueError("no HTTP/1.1")
        if status == 100:
            self.continues = True
        elif status >= 200:  # other 1xx are not the answer yet
            fields = dict(self._FIELDS.findall(head.lower()))
            self.status, self.retry_after = status, fields.get(b"retry-after", b"").decode("latin-1")
            self._chunked = fields.get(b"transfer-encoding") == b"chunked"
            self._closes = fields.get(b"connection") == b"close"
            length = b"0" if status in (204, 304) else fields.get(b"content-length")
            self._left = None if length is None else int(length)

    def _read_rest(self, at_end: bool) -> None:
        taken = self._raw if self._left is None else self._raw[: self._left]
        self._body.append(taken)
        self._raw = self._raw[len(taken) :]
        if self._left is not None:
            self._left -= len(taken)
        self.ended = at_end if self._left is None else self._left == 0

    def _read_chunks(self, at_end: bool) -> None:
        while not self.ended:
            line, mark, rest = self._raw.partition(b"\r\n")
            if not mark or len(rest) < (size := int(line.split(b";")[0], 16)) + 2:
                return  # the chunk is not all there
            self._body.append(rest[:size])
            self._raw = rest[size + 2 :]
            self.ended = size == 0


class _ThreadCache:
    """Daemon threads, kept for a while when their work is done: starting one costs more than a short step.

    There is no limit to run into, and nothing that keeps a process from exiting.
    """

    def __init__(self) -> None:
        self._idle: deque[SimpleQueue[Any]] = deque()  # what each idle thread takes its next work from

    def call(self, name: str, fn: Callable[..., Any], *args: Any) -> concurrent.futures.Future[Any]:
        """Call fn in a thread of this name, in a copy of the caller's context."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        try:
            work = self._idle.pop()
        except IndexError:
            work = SimpleQueue()
            threading.Thread(target=self._run, args=(work,), name=name, daemon=True).start()
        work.put((name, future, functools.partial(contextvars.copy_context().run, fn, *args)))
        return future

    def _run(self, work: SimpleQueue[Any]) -> None:
        while True:
            try:
                name, future, call = work.get(timeout=IDLE_THREAD_S)
            except Empty:
                try:
                    self._idle.remove(work)
                except ValueError:
                    continue  # there is work since just now
                return
            threading.current_thread().name = name
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
                del error
            else:
                future.set_result(result)
                del result
            del future, call  # what it held is not kept until the next work
            threading.current_thread().name = "tidebase-idle"
            self._idle.append(work)


_thread_cache = _ThreadCache()


class _BlockingConnection:
    """A connection.  Its methods take the moment until which they wait, by time.monotonic(), and raise OSError."""

    def __init__(self, server: _Server, ends: float, generation: int) -> None:
        self.generation = generation
        self._socket = socket.create_connection((server.host, server.port), _left(ends))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if server.tls is not None:
                self._socket = server.tls.wrap_socket(self._socket, server_hostname=server.host)
        except BaseException:
            self._socket.close()
            raise

    def write(self, data: bytes, ends: float) -> None:
        """Send all of it."""
        self._socket.settimeout(_left(ends))
        self._socket.sendall(data)

    def read(self, ends: float) -> bytes:
        """The next bytes, b"" when the other side has closed it."""
        self._socket.settimeout(_left(ends))
        return self._socket.recv(BLOCK_BYTES)

    def is_open(self) -> bool:
        """Whether a request may be sent on it: it shows when one is sent."""
        return True

    def cut(self) -> None:
        """Have the thread that reads wait no more."""
        with contextlib.suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it; nobody waits on it."""
        self._socket.close()


class _Driver:
    """What both drivers share: the idle connections, kept for whoever asks next."""

    awaited: bool
    event: Any  # the class of events that `sleep` can be ended by
    MOST_IDLE: int

    def __init__(self, server: _Server) -> None:
        self.server = server
        self._closed = 0  # how often: a connection that was in use meanwhile is not kept

    def _idle(self) -> deque[Any]:
        raise NotImplementedError

    def take_idle(self) -> Any:
        """An idle connection that is still open, as far as is known here; None where there is none."""
        with contextlib.suppress(IndexError):  # not `while idle`: other threads take from it, too
            while True:
                connection = self._idle().pop()
                if connection.is_open():
                    return connection
                connection.close()
        return None

    def keep(self, connection: Any) -> None:
        """The connection is idle."""
        idle = self._idle()
        if connection.generation == self._closed and len(idle) < self.MOST_IDLE:
            idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close the idle connections, and those in use as soon as they are not."""
        self._closed += 1
        while (connection := self.take_idle()) is not None:
            connection.close()


class _BlockingDriver(_Driver):
    """Performs operations in the calling thread: what its methods return is what was waited for."""

    awaited = False
    event = threading.Event
    MOST_IDLE = sys.maxsize  # there are never more than threads that asked at once

    def __init__(self, server: _Server) -> None:
        super().__init__(server)
        self._connections: deque[_BlockingConnection] = deque()

    def _idle(self) -> deque[Any]:
        return self._connections

    def drive(self, op: Op[T]) -> T:
        """Perform an operation."""
        value: Any = None
        try:
            while True:
                value = op.send(value)
        except StopIteration as end:
            result: T = end.value
            return result

    def start(self, op: Op[T], name: str) -> concurrent.futures.Future[T]:
        """Perform an operation beside the caller, in a thread of this name."""
        return _thread_cache.call(name, self.drive, op)

    def join(self, task: concurrent.futures.Future[Any]) -> None:
        """Wait until a started operation has ended, well or not."""
        concurrent.futures.wait([task])

    def sleep(self, seconds: float | None, event: threading.Event | None = None) -> None:
        """Sleep, at most until the event is set; None: until then."""
        if event is None:
            time.sleep(seconds or 0.0)
        else:
            event.wait(seconds)

    def invoke(self, fn: Callable[..., Any], args: tuple[Any, ...], what: str, timeout_s: float | None = None) -> Any:
        """Call the user's function; what: how the log calls it.  Raises StepTimeout after timeout_s."""
        if timeout_s is None:
            result = fn(*args)
        else:
            future = _thread_cache.call("tidebase-step", fn, *args)
            if not concurrent.futures.wait([future], timeout_s).done:
                _warn_of_thread(what)
                raise StepTimeout(f"no result within {timeout_s:g} s")
            result = future.result()
        if inspect.iscoroutine(result):
            result.close()
            raise TypeError(f"{fn!r} is async: an AsyncTidebase awaits it, a Tidebase cannot")
        return result

    def _exchange(self, request: Request) -> Reply:
        return self.drive(_exchange(self, request))

    def connect(self, ends: float) -> _BlockingConnection:
        """A new connection."""
        return _BlockingConnection(self.server, ends, self._closed)


def _warn_of_thread(what: str) -> None:
    """Log that a function is not waited for any more, and goes on."""
    logger.warning("%s is given up, but its function runs on in its thread, which cannot be stopped: what it returns "
                   "is not used", what, extra={"event": "thread_runs_on"})


class _AsyncEvent:
    """An asyncio.Event that any thread may set, and that can be waited for for a while without a task of its own."""

    def __init__(self) -> None:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self._is_set = False
        self._waiting: set[asyncio.Future[None]] = set()

    def set(self) -> None:
        """Wake those who wait, and let nobody wait until it is cleared; from any thread."""
        self._is_set = True
        if threading.get_ident() == self._thread:
            self._wake()
            return
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.debug("event for a closed loop", extra={"event": "loop_closed"})

    def clear(self) -> None:
        """Let them wait again."""
        self._is_set = False

    async def wait(self, seconds: float | None) -> None:
        """Return when it is set, or after so many seconds."""
        if self._is_set:
            return
        future = self._loop.create_future()
        self._waiting.add(future)
        timer = None if seconds is None else self._loop.call_later(seconds, self._end, future)
        try:
            await future
        finally:
            self._waiting.discard(future)
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        for future in self._waiting:
            self._end(future)

    @staticmethod
    def _end(future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)


class _AsyncConnection(asyncio.Protocol):
    """A connection on an event loop, as _BlockingConnection.  asyncio calls its methods without a docstring."""

    _transport: Any

    def __init__(self, generation: int) -> None:
        self.generation = generation  # of the driver: see _Driver.keep
        self._data = b""
        self._is_over = False  # there will be no more data
        self._error: Exception | None = None
        self._news = _AsyncEvent()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > BLOCK_BYTES:
            self._transport.pause_reading()
        self._news.set()

    def eof_received(self) -> None:
        self._is_over = True
        self._news.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._is_over, self._error = True, self._error or error
        self._news.set()

    def write(self, data: bytes, ends: float) -> None:
        """Send it; what the other side does not take yet is kept here."""
        self._transport.write(data)

    async def read(self, ends: float) -> bytes:
        """The next bytes, b"" when the other side has closed it."""
        while not (self._data or self._is_over):
            left_s = ends - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("timed out")
            self._news.clear()
            await self._news.wait(left_s)
        if self._error is not None and not self._data:
            raise ConnectionResetError(f"the connection broke: {self._error}") from self._error
        data, self._data = self._data, b""
        if not self._is_over:
            self._transport.resume_reading()
        return data

    def is_open(self) -> bool:
        """Whether a request may be sent on it, as far as is known here."""
        return not (self._data or self._is_over or self._transport.is_closing())

    def cut(self) -> None:
        """Have the task that reads wait no more."""
        self._transport.abort()

    close = cut


class _LoopState:
    """What belongs to one event loop: idle connections, and a count of requests that may be sent."""

    def __init__(self) -> None:
        self.idle: deque[_AsyncConnection] = deque()
        self.free = asyncio.Semaphore(CONNECTIONS)


class _AsyncDriver(_Driver):
    """Performs operations on the running event loop: what its methods return is awaited.  As _BlockingDriver, but that
    sync functions of the user are called in threads."""

    awaited = True
    event = _AsyncEvent
    MOST_IDLE = CONNECTIONS

    def __init__(self, server: _Server) -> None:
        super().__init__(server)
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = weakref.WeakKeyDictionary()
        self._tasks: set[asyncio.Future[Any]] = set()

    async def drive(self, op: Op[T]) -> T:
        """Perform an operation, which may still await after a cancellation."""
        resume: Callable[[Any], Awaitable[Any]] = op.send
        value: Any = None
        while True:
            try:
                waited_for = resume(value)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                value, resume = await waited_for, op.send
            except GeneratorExit:  # the event loop is gone: nothing can be awaited any more
                op.close()
                raise
            except BaseException as error:
                value, resume = error, op.throw

    def start(self, op: Op[T], name: str) -> asyncio.Future[T]:
        """Perform an operation beside the caller, in a task."""
        task = asyncio.ensure_future(self.drive(op))
        self._tasks.add(task)  # an event loop keeps no reference
        task.add_done_callback(self._tasks.discard)
        return task

    async def join(self, task: asyncio.Future[Any]) -> None:
        """As _BlockingDriver's."""
        await asyncio.wait({task})

    def sleep(self, seconds: float | None, event: _AsyncEvent | None = None) -> Awaitable[None]:
        """As _BlockingDriver's."""
        return asyncio.sleep(seconds or 0.0) if event is None else event.wait(seconds)

    async def invoke(self, fn: Callable[..., Any], args: tuple[Any, ...], what: str,
                     timeout_s: float | None = None) -> Any:
        """As _BlockingDriver's; what fn returns is awaited, if it can be."""
        if timeout_s is None:
            return await self._call(fn, args, what)
        task = asyncio.ensure_future(self._call(fn, args, what))
        try:
            done, _ = await asyncio.wait({task}, timeout=timeout_s)
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})  # a task that is left pending when its event loop is closed is reported
            raise
        if not done:
            task.cancel()
            await asyncio.wait({task})
            raise StepTimeout(f"no result within {timeout_s:g} s")
        return task.result()

    async def _call(self, fn: Callable[..., Any], args: tuple[Any, ...], what: str) -> Any:
        if inspect.iscoroutinefunction(fn):
            return await fn(*args)
        future = _thread_cache.call("tidebase-step", fn, *args)
        try:
            result = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.done():
                _warn_of_thread(what)
            raise
        return await result if inspect.isawaitable(result) else result  # lambda: fetch(url)

    async def _exchange(self, request: Request) -> Reply:
        if request.is_long_poll:
            return await self.drive(_exchange(self, request))
        async with self._state().free:
            return await self.drive(_exchange(self, request))

    async def connect(self, ends: float) -> _AsyncConnection:
        """A new connection; asyncio sets TCP_NODELAY by itself."""
        server, loop = self.server, asyncio.get_running_loop()
        made = functools.partial(_AsyncConnection, self._closed)
        opening = loop.create_connection(made, server.host, server.port, ssl=server.tls)
        try:
            return (await asyncio.wait_for(opening, _left(ends)))[1]
        except asyncio.TimeoutError:
            raise TimeoutError("timed out") from None

    def _idle(self) -> deque[Any]:
        return self._state().idle

    def _state(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops[loop] = _LoopState()
        return self._loops[loop]


def _left(ends: float) -> float:
    """Seconds until a moment of time.monotonic(), as a socket's timeout: 0 would mean not to wait at all."""
    return max(ends - time.monotonic(), 0.001)


# ------------------------------------------------------------------------------
# Helpers without I/O: ids, signatures, JSON and its canonical form, request bodies, errors; each names its standard.
# ------------------------------------------------------------------------------


def new_run_id() -> str:
    """A fresh run id, `run_` and 32 hex digits, ordered by time: RFC 9562 UUIDv7, microseconds in its rand_a."""
    return _new_id("run")


def _new_id(prefix: str) -> str:
    millis, nanos = divmod(time.time_ns(), 1_000_000)
    fraction = nanos * 4096 // 1_000_000
    number = millis << 80 | 7 << 76 | fraction << 64 | 2 << 62 | secrets.randbits(62)
    return f"{prefix}_{number:032x}"


def verify_webhook_signature(body: bytes, signature_header: str | None, secret: str) -> bool:
    """Whether the header x-tidebase-signature (sha256=HEX, or HEX alone) is the HMAC-SHA256 of exactly these bytes.

    Constant time; False for anything malformed, missing, or an empty secret.  Never raises on what a stranger sent.
    """
    if not (secret and isinstance(secret, str) and isinstance(signature_header, str)
            and isinstance(body, (bytes, bytearray, memoryview))):
        return False
    expected = hmac.new(secret.encode("utf-8", "surrogatepass"), body, hashlib.sha256).hexdigest()
    given = signature_header.strip()
    given = given[len("sha256="):] if given.startswith("sha256=") else given
    return hmac.compare_digest(expected.encode(), given.encode("utf-8", "surrogatepass"))


def verify_webhook(body: bytes, headers: Mapping[str, str], secret: str, tolerance_s: float = 300) -> bool:
    """Whether the headers of a request sign exactly these bytes, now: the Standard Webhooks specification.

    headers: a mapping, as the web frameworks have it, with webhook-id, webhook-timestamp and webhook-signature in any
    case; of several signatures one must hold.
    secret: one that begins with whsec_ is base64.  tolerance_s: how old, or how far ahead, the timestamp may be: what
    was intercepted cannot be sent again later, which verify_webhook_signature does not notice.
    Constant time; False for anything malformed or missing, or an empty secret.  Never raises on what a stranger sent.
    """
    if not secret or not isinstance(body, (bytes, bytearray, memoryview)) or not hasattr(headers, "items"):
        return False
    given = {name.lower(): value for name, value in headers.items() if isinstance(name, str) and isinstance(value, str)}
    sent_at, signatures = given.get("webhook-timestamp", ""), given.get("webhook-signature", "")
    if not given.get("webhook-id") or not re.fullmatch("[0-9]{1,12}", sent_at):
        return False
    key = secret.encode("utf-8", "surrogatepass")
    if secret.startswith("whsec_"):
        with contextlib.suppress(ValueError):  # no base64: the server takes it as it is, too
            key = base64.b64decode(secret[len("whsec_"):], validate=True) or key
    signed = f"{given['webhook-id']}.{sent_at}.".encode("utf-8", "surrogatepass") + bytes(body)
    expected = b"v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest())
    matches = [hmac.compare_digest(expected, one.encode("utf-8", "surrogatepass")) for one in signatures.split()]
    return any(matches) and abs(time.time() - int(sent_at)) <= tolerance_s


def canonical_json(value: Any) -> str:
    """RFC 8785 (JCS): sorted keys, no spaces, the fewest escapes, numbers as ECMAScript prints them.

    Raises TypeError or ValueError for what JSON cannot say: objects, NaN, Infinity, lone surrogates.
    """
    return _canonical(_plain(value, "a value"))


def input_hash(value: Any) -> str:
    """The hash a step's input is known by: SHA-256, in hex, of its canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _canonical(value: Any) -> str:
    """canonical_json of what a JSON parser returned."""
    kind = type(value)
    if _prints_alike(value):
        return _json_sorted(value)
    if kind in (int, float):
        return _ecmascript_number(value)
    if kind is list:
        return "[" + ",".join(map(_canonical, value)) + "]"
    keys = sorted(value, key=lambda key: cast(str, key).encode("utf-16-be"))  # by UTF-16 code units
    return "{" + ",".join(f"{_json(key)}:{_canonical(value[key])}" for key in keys) + "}"


def _prints_alike(value: Any) -> bool:
    """Whether json prints a value as RFC 8785 has it, which it does but for some numbers and keys."""
    kind = type(value)
    if kind is dict:
        return all(key.isascii() and _prints_alike(member) for key, member in value.items())
    if kind is list:
        return all(map(_prints_alike, value))
    return abs(value) < 2**53 if kind is int else kind is not float


def _ecmascript_number(value: float) -> str:
    """ECMA-262 Number::toString.  An integer beyond 2**53 prints as the double nearest to it."""
    try:
        double = float(value)
    except OverflowError:
        raise ValueError("a number is too large for canonical JSON") from None
    if not double:
        return "0"  # -0 too
    text = repr(double)  # the shortest digits that read back the same, as ECMA-262 has them, but for the exponent
    digits, mark, exponent = text.partition("e")
    if not mark:
        return text[:-2] if text.endswith(".0") else text
    return format(Decimal(text), "f") if -7 < int(exponent) < 21 else f"{digits}e{int(exponent):+d}"


NULL_HASH = hashlib.sha256(b"null").hexdigest()  # of a step without input


def _json_encoder(sort_keys: bool) -> Callable[[Any], str]:
    """JSONEncoder.encode, which makes a C encoder for each value, with one that is made once."""
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys)
    make = json.encoder.c_make_encoder  # type: ignore[attr-defined]
    encode = make(None, encoder.default, json.encoder.encode_basestring, None, ":", ",", sort_keys, False, False)
    return lambda value: "".join(encode(value, 0))


_json, _json_sorted, _decoder = _json_encoder(sort_keys=False), _json_encoder(sort_keys=True), json.JSONDecoder()


def _encode(value: Any, what: str) -> bytes:
    """JSON text.  TypeError names `what`, its type and the part of it that JSON cannot say; it is not retryable, since
    whatever made the value would only be called, and paid for, once more."""
    try:  # a lone surrogate has no UTF-8
        return _json(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        place, part = ("", value) if isinstance(error, RecursionError) else _fault_in(value)
        words = f"the value at {place} of {what}" if place else what
        if isinstance(error, UnicodeEncodeError):
            words += (" has a text with half of a surrogate pair, which is no character: where it came from, decode "
                      "with errors='replace', or here .encode('utf-8', 'replace').decode()")
        elif isinstance(error, ValueError):
            words += " has NaN or an infinite number, which JSON does not know: None or a text may stand for it"
        else:
            words += (f" is of type {type(part).__name__}, which JSON cannot say: {error}; make it of dicts, lists, "
                      "texts and numbers, for instance by .model_dump(), .isoformat() or dataclasses.asdict()")
        raise _unsayable(words) from None


def _unsayable(words: str) -> TypeError:
    refusal = TypeError(words)
    refusal.retryable = False  # type: ignore[attr-defined]
    return refusal


def _to_json(value: Any, what: str) -> tuple[bytes, Any]:
    """JSON text, and the value as JSON gives it back.  TypeError as `_encode`, and for keys that JSON makes one."""
    data = _encode(value, what)
    plain = _decode(data)
    if plain != value:  # there are tuples or such keys
        _check_keys(value, what)
    return data, plain


def _check_keys(value: Any, what: str) -> None:
    """TypeError when an entry would be lost, as one of {1: ..., "1": ...}."""
    if isinstance(value, dict):
        given: Json = {}
        for key in value:
            (text,) = _decode(_json({key: None}).encode())
            if given.setdefault(text, key) is not key:
                raise _unsayable(f"{what} has the keys {given[text]!r} and {key!r} in one dict, which are one key in "
                                 "JSON, so that an entry would be lost: make one of them another text")
    for member in value.values() if isinstance(value, dict) else value:
        if isinstance(member, (dict, list, tuple)):
            _check_keys(member, what)


def _fault_in(value: Any) -> tuple[str, Any]:
    """The innermost part of a value that JSON cannot say, and where it stands, such as `.scores[3]`."""
    place = ""
    while isinstance(value, (dict, list, tuple)):
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            try:
                _json(member).encode()
            except (TypeError, ValueError):
                place += f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"
                value = member
                break
        else:  # it is one of its keys
            break
    return place, value


def _encode_body(body: Any) -> bytes:
    """JSON text of a request's body.  TypeError names the argument that JSON cannot say."""
    try:
        return _to_json(body, "a request's body")[0]
    except TypeError:
        for key, value in body.items() if isinstance(body, dict) else ():
            _plain(value, f"{_snake(key)}=")
        raise


def _members(fields: Json) -> bytes:
    """The members of a JSON object, without its braces."""
    return _encode_body(fields)[1:-1]


def _decode(data: bytes) -> Any:
    """The value of JSON text that was encoded here; cheaper than json.loads, which looks for encodings and blanks."""
    return _decoder.raw_decode(data.decode())[0]


def _plain(value: Any, what: str) -> Any:
    """The value as JSON gives it back."""
    return _to_json(value, what)[1]


_quoted = functools.lru_cache(1024)(functools.partial(quote, safe=""))  # a run's id comes again and again


def _path(*parts: str, **query: Any) -> str:
    """A path whose parts are percent-encoded, `/` too, and a query without what is None."""
    asked = {_camel(key): value for key, value in query.items() if value is not None}
    return "/" + "/".join(map(_quoted, parts)) + ("?" + urlencode(asked) if asked else "")


def _body(given: Mapping[str, Any] | None = None, *without: str, **fields: Any) -> Json:
    """A request body of a method's arguments (its locals(), taken first of all) and further fields.

    camelCase keys; seconds (delay_s) become milliseconds (delayMs) and datetimes ISO text; None is left out.
    """
    body: Json = {}
    arguments = {**(given or {}), **fields}
    _check(**arguments)
    for key, value in arguments.items():
        if value is not None and key != "self" and key not in without:
            if key.endswith("_s"):
                key, value = key[:-2] + "_ms", _ms(value)
            body[_camel(key)] = _iso(value) if isinstance(value, datetime) else value
    return body


# What an argument of these names takes, on whichever method it stands, and how the TypeError calls it.
_NUMBER, _WHOLE, _TEXT = ((int, float), "a number"), ((int,), "a whole number"), ((str,), "a text")
_MAPPING, _CALLABLE, _MOMENT = ((Mapping,), "a mapping"), ((Callable,), "a function"), ((datetime,), "a datetime")
_TAKES: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("seconds", "quantity", "cost_usd"), _NUMBER),
    **dict.fromkeys(("retries", "max_attempts", "priority", "limit", "concurrency", "rate_per_minute", "input_tokens",
                     "output_tokens", "total_tokens", "if_version"), _WHOLE),
    **dict.fromkeys(("name", "prompt", "workflow_name", "queue", "dedupe_key", "recovery_webhook", "recovery_secret",
                     "label", "reason", "actor", "stream", "run_id", "from_step", "idempotency_key"), _TEXT),
    **dict.fromkeys(("metadata", "edge_metadata", "target"), _MAPPING),
    **dict.fromkeys(("on_lease_lost", "on_error", "stop"), _CALLABLE),
    "until": _MOMENT,
    "run_at": ((datetime, str), "a datetime or ISO-8601 text"),
    "channels": ((list, tuple), "a list of mappings"),
    "side_effects": ((str, Iterable), "a text or a list of texts"),
}


def _check(**arguments: Any) -> None:
    """TypeError for an argument that is not of the kind its name takes, ValueError for a time or a number of retries
    below zero; None is left out."""
    for name, value in arguments.items():
        takes = _TAKES.get(name) or (_NUMBER if name.endswith("_s") else None)
        if takes is None or value is None:
            continue
        if not isinstance(value, takes[0]) or isinstance(value, bool):
            raise TypeError(f"{name}= takes {takes[1]}, not {value!r}")
        if (name in ("seconds", "retries") or name.endswith("_s")) and not value >= 0:  # NaN is not, either
            raise ValueError(f"{name}= takes {takes[1]} of at least 0, not {value!r}")


@functools.cache
def _camel(name: str) -> str:
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)


@functools.cache
def _snake(name: str) -> str:
    return re.sub("[A-Z]", lambda match: "_" + match[0].lower(), name)


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


def _iso(moment: datetime | str | None) -> str | None:
    """A time as the protocol writes it.  A datetime without time zone is local time, as Python has it."""
    if not isinstance(moment, datetime):
        return moment
    return moment.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _moment(text: Any) -> datetime:
    """A time as the protocol writes it; ValueError for anything else."""
    return datetime.fromisoformat(str(text).replace("Z", "+00:00"))


def _backoff(bounds: tuple[float, float], tries: int) -> float:
    """Seconds to pause after `tries` failures: doubling from the first bound to the second, half of it random."""
    return min(bounds[0] * 2.0 ** min(tries - 1, 30), bounds[1]) * random.uniform(0.5, 1.0)


def _accepts(fn: Callable[..., Any], count: int) -> bool:
    """Whether fn can be called with `count` positional arguments; a builtin that does not tell takes none."""
    if isinstance(fn, types.FunctionType) and not (
            fn.__defaults__ or fn.__code__.co_kwonlyargcount or fn.__code__.co_flags & inspect.CO_VARARGS):
        return count == fn.__code__.co_argcount  # as most are; a signature takes as long as all the rest of a step
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return count == 0
    with contextlib.suppress(TypeError):
        signature.bind(*range(count))
        return True
    return False


def _fit(fn: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    """As many of the arguments as fn takes: workflow(run, input) and workflow(run) are both welcome."""
    return args[: next((count for count in range(len(args), 0, -1) if _accepts(fn, count)), 0)]


def _identity_of(fn: Callable[..., Any]) -> tuple[Any, ...] | None:
    """A function's code and what is bound to it: equal for a lambda that the same line makes anew for the same item,
    and for a method of an object that has not changed meanwhile, as far as that shows.  None where nobody can tell."""
    code, bound = _unbound(fn)
    if code is None or any(isinstance(value, Iterator) for value in bound):  # an iterator gives another item each time
        return None
    return (code, *map(_state_of, bound))


def _unbound(fn: Callable[..., Any]) -> tuple[types.CodeType | None, list[Any]]:
    """The code of a function, None of one that is not written in Python, and the values that are bound to it."""
    if isinstance(fn, functools.partial):
        code, bound = _unbound(fn.func)
        return code, [*fn.args, *fn.keywords.values(), *bound]
    if isinstance(fn, types.MethodType):
        code, bound = _unbound(fn.__func__)
        return code, [fn.__self__, *bound]
    if not isinstance(fn, types.FunctionType):
        return None, []
    bound = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # a name that has no value yet
            bound.append(cell.cell_contents)
    return fn.__code__, bound


def _state_of(value: Any) -> Any:
    """A text or number itself; of an object, which one it is and the texts and numbers that it holds."""
    plain = (str, bytes, bool, int, float)
    if type(value) in plain:
        return value
    held = {} if isinstance(value, (types.FunctionType, types.ModuleType, type)) else getattr(value, "__dict__", {})
    return id(value), tuple((key, each) for key, each in held.items() if type(each) in plain)


def _words_of(error: BaseException) -> str:
    """What an exception says; its own __str__ may fail."""
    try:
        return str(error)
    except Exception as failure:
        return f"<{type(error).__name__} cannot be shown: {type(failure).__name__}>"


def _error_json(error: BaseException) -> Json:
    """An exception as it is recorded.  What UTF-8 cannot say is replaced: a failure must always be recordable."""
    shown = traceback.TracebackException.from_exception(error)
    part: traceback.TracebackException | None = shown
    while part is not None:  # the frames of this file say nothing about the failure
        # As tuples, without columns: to mark those, CPython 3.11 parses the line, which is not safe in two threads.
        part.stack = traceback.StackSummary.from_list(
            [(f.filename, f.lineno or 0, f.name, f.line) for f in part.stack if f.filename != __file__])
        part = part.__cause__ or part.__context__
    stack = "".join(shown.format())[-STACK_CHARS:]
    parts = {"name": type(error).__name__, "message": _words_of(error)[:MESSAGE_CHARS], "stack": stack}
    return {key: text.encode("utf-8", "replace").decode() for key, text in parts.items()}


def _hide_frames(error: BaseException) -> None:
    """Take this file's frames, and those of the libraries under it, out of a traceback: it shows where a caller's code
    called and where the caller's function raised.  A defect of this file, which no `raise` announces, stays."""
    seen: set[int] = set()
    part: BaseException | None = error
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        frames, kept, ours = [], [], False
        trace = part.__traceback__
        while trace is not None:
            frames.append(trace)
            module = trace.tb_frame.f_globals.get("__name__", "")
            ours = trace.tb_frame.f_code.co_filename == __file__ or (
                ours and module.partition(".")[0] in ("asyncio", "concurrent", "contextlib"))
            if not ours:
                kept.append(trace)
            trace = trace.tb_next
        last = frames[-1] if frames else None
        raised = last is None or opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
        if not ours or (raised and not isinstance(part, AssertionError)) or not isinstance(part, Exception):
            shown: types.TracebackType | None = None
            for trace in reversed(kept):
                shown = types.TracebackType(shown, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
            part.__traceback__ = shown
        part = part.__cause__ or part.__context__


class _OwnFramesHidden:
    """Around what a user calls: an exception shows the user's frames alone."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            _hide_frames(error)
            if sys.version_info < (3, 11):  # it raises the exception again with the frames that it had
                raise error


_own_frames_hidden = _OwnFramesHidden()

_REFUSALS: dict[str, type[TidebaseError]] = {
    "lease_lost": LeaseLost,
    "run_cancelled": RunCancelled,
    "input_mismatch": StepInputMismatch,
    "manual_review": StepNeedsReview,
    "run_id_conflict": RunIdConflict,
    "body_too_large": BodyTooLarge,
    "step_failed": StepFailed,
}


def _refusal(status: int, body: Any, path: str, size: int = 0) -> TidebaseError:
    """The exception for an answer that is no success.  size: of the request's body, in bytes."""
    fields = body if isinstance(body, dict) else {}
    code, words = fields.get("code"), str(fields.get("error") or http.client.responses.get(status, "no success"))
    issues = fields.get("issues")
    if isinstance(issues, list):  # of a 400: what is wrong with which field
        words += ": " + "; ".join(f"{issue['path']}: {issue['message']}" for issue in issues)[:MESSAGE_CHARS]
    if status == 413:
        words = f"{size:,} bytes are more than the server takes, see its setting TIDEBASE_MAX_BODY"
        code = "body_too_large"
    elif status == 401:
        words += ": the client sends the key in api_key= or TIDEBASE_API_KEY, which must be the server's"
    elif status in (200, 405) or (status == 404 and code is None):  # a page; the server's own 404 has a code
        words = words if status != 200 else "the answer is no JSON"
        words += ("; the client's URL is likely wrong: it is the server's address, such as http://localhost:7373, and "
                  "not that of one of its pages; give it as url= or in TIDEBASE_URL")
    return _REFUSALS.get(str(code), TidebaseError)(f"{words} ({status}, {path})", status, body, code, path)


def _explain_refusal(step: _Step, outcome: Json | Exception) -> Json | Exception:
    """A refusal in words that name the step; an answer as it is."""
    run_id = step.run.run_id
    if isinstance(outcome, BodyTooLarge):
        sizes = f"its output has {step.output_bytes:,} bytes"
        sizes += f", its input {len(step.input):,}" * bool(step.input)
        message = (f"step {step.name!r} of run {run_id}: {sizes}, more than the server takes in one request, see "
                   "its setting TIDEBASE_MAX_BODY; or keep the data elsewhere and return where it is")
        return BodyTooLarge(message, 413, code="body_too_large")
    if isinstance(outcome, StepInputMismatch):
        return _mismatch(step, outcome.body)
    if isinstance(outcome, StepNeedsReview):
        recorded = outcome.body.get("step") or {} if isinstance(outcome.body, dict) else {}
        message = (f"step {step.name!r} ({recorded.get('id')}) of run {run_id} may have had its effect without leaving "
                   f"a record: see what happened outside, then decide with tide.runs.review_step({run_id!r}, "
                   f"{recorded.get('id')!r}, DECISION), where DECISION is 'retry', 'complete' (with its output=) or "
                   f"'fail'; `python tidebase.py explain {run_id}` on the server shows the run")
        return StepNeedsReview(message, outcome.status, outcome.body, outcome.code, outcome.path)
    return outcome


def _explain_other_outcome(step: _Step, outcome: Json | Exception) -> Json | Exception:
    """Likewise, of a step for whose record no call waits: that another outcome stands is an error."""
    if isinstance(outcome, dict) and ("output" in outcome["step"] or outcome["step"]["status"] != "completed"):
        words = (f"step {step.name!r} of run {step.run.run_id} is recorded with another outcome than it had here: the "
                 "next attempt goes on with the recorded one")
        return TidebaseError(words, 409, outcome, "other_outcome")
    return _explain_refusal(step, outcome)


def _log_refusal(step: _Step, outcome: Json | Exception) -> Json | Exception:
    """Log a refusal that nobody is left to be raised to."""
    if isinstance(outcome, Exception):
        logger.warning("step %r of run %s did not end, which could not be recorded: %s", step.name, step.run.run_id,
                       outcome, extra={"event": "end_refused", "run_id": step.run.run_id})
    return outcome


def _mismatch(step: _Step, answer: Json) -> StepInputMismatch:
    """answer: the server's, with the step as it is recorded."""
    recorded, run_id = answer.get("step") or {}, step.run.run_id
    before, now = _excerpts(_json(recorded.get("input")), step.input.decode() or "null")
    if before == now:  # only their hashes are known, or differ
        before, now = (f"{text} (hash {str(answer.get(key))[:12]}...)"
                       for text, key in ((before, "expectedInputHash"), (now, "actualInputHash")))
    message = (f"step {step.name!r} of run {run_id} is recorded with the input {before} and is now called with "
               f"{now}. Either give this call a name of its own, or fork the run before this step and run the "
               f"fork: tide.runs.fork({run_id!r}, from_step={step.name!r})")
    return StepInputMismatch(message, body=answer, code="input_mismatch")


def _excerpts(one: str, other: str) -> Iterator[str]:
    """Two texts, shortened where they are long to the part in which they begin to differ."""
    start = 0
    if max(len(one), len(other)) > EXCERPT_CHARS:
        pairs = enumerate(zip(one, other))
        differ = next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
        start = max(differ - EXCERPT_CHARS // 4, 0)
    for text in (one, other):
        yield "..." * (start > 0) + text[start : start + EXCERPT_CHARS] + "..." * (len(text) > start + EXCERPT_CHARS)


def _member(op: Op[Json], key: str) -> Op[Any]:
    """One member of an operation's answer."""
    return (yield from op)[key]


def _gate_json(gate: Json) -> Json:
    """A gate as `run.gates` answers it."""
    payload = gate["decisionPayload"]
    return {"gateId": gate["id"], "name": gate["name"], "status": gate["status"], "decision": gate["decision"],
            "actor": gate["actor"], "payload": {} if payload is None else payload, "gate": gate}


def _has_ended(run: Json) -> bool:
    return run["status"] in ("completed", "failed", "cancelled")


def _outcome(run: Json) -> Any:
    """What a run that ended returned, or the exception that tells how it ended."""
    if run["status"] == "completed":
        return run["result"]
    if run["status"] == "cancelled":
        words = f"run {run['id']} was cancelled: {run.get('cancelReason') or 'no reason given'}"
        return RunCancelled(words, body=run, code="run_cancelled")
    error = run["error"] if isinstance(run["error"], dict) else {"message": run["error"]}
    words = ": ".join(str(error[key]) for key in ("name", "message") if error.get(key))
    return RunFailed(f"run {run['id']} failed: {words or 'no error given'}", body=run, code="run_failed")


def _child_key(body: Json) -> tuple[Any, ...]:
    """What a child is called with, by which the same call is known again."""
    return body["workflowName"], _json(body.get("input"))


def _outcome_json(error: Exception) -> Json:
    """How a child ended, as the step that joins a fanout keeps it; _outcome makes the exception of it again."""
    run = getattr(error, "body", None)
    if not isinstance(run, dict) or not {"id", "status", "error"} <= set(run):  # it ran here
        run = {"id": None, "status": "failed", "error": _error_json(error)}
    return {key: run.get(key) for key in ("id", "status", "error", "failureClass", "cancelReason")}


def _events_in(data: bytes) -> tuple[list[Json], bytes]:
    """The complete events of a server-sent stream (WHATWG HTML, 9.2), and the bytes of one still incomplete."""
    *blocks, rest = data.replace(b"\r\n", b"\n").split(b"\n\n")
    events = []
    for block in blocks:
        lines = [line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:")]
        if lines:  # else a comment, the stream's heartbeat
            events.append(json.loads(b"\n".join(lines)))
    return events, rest


def _loads(data: bytes) -> Any:
    """A JSON body, or None when it is none (a proxy's page, say)."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        return None


def _aio_module() -> types.ModuleType:
    """`<this module>.aio`: everything public but Tidebase, so that `from tidebase.aio import AsyncTidebase` works."""
    module = types.ModuleType(f"{__name__}.aio", "The async client of Tidebase.")
    module.__dict__.update({name: globals()[name] for name in __all__ if name != "Tidebase"})
    sys.modules[module.__name__] = module
    return module


aio = _aio_module()

if __name__ == "__main__":
    sys.exit("This file is Tidebase's client. The commands, such as explain, are those of the server's tidebase.py.")
