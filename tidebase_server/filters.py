"""Filters: the runs that a list, a count or a bulk action selects, and the index that serves each filter.

`Found` turns a query string into SQL. One index serves a query. The conditions that this index does not serve are
checked run by run, for a bounded number of runs, so that a request stays quick however many runs there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, LiteralString, NamedTuple

from psycopg.sql import SQL, Composable, Literal

from .answers import invalid
from .bodies import MAX_FILTERS
from .request import choice_of, core, time_of, whole_of

SEARCHED = 20_000     # most runs that one request checks for conditions that no index serves
COUNTED = 10_000      # most runs that are counted; beyond it an answer says "at least so many"
ENDED = ("completed", "failed", "cancelled")
STATUSES = ("pending", "queued", "running", "waiting", "completed", "failed", "cancelled")
NOT_ONLY_TEXT = re.compile(r"-?(0|[1-9][0-9]{,99})(\.[0-9]{1,99})?|true|false|null")
FILTERS = ("status", "workflow", "queue", "failureClass", "since", "until", "text", "errors", "parent")
CURSOR = re.compile(r"(-?\d{1,15})_([A-Za-z0-9_.:-]{1,128})", re.ASCII)
# The order, the comparison that leads to the next page, and its column.
SORTS: dict[str, tuple[LiteralString, LiteralString, LiteralString]] = {
    "newest": ("created_at desc, id desc", "<", "created_at"),
    "oldest": ("created_at, id", ">", "created_at"),
    "ended": ("completed_at desc, id desc", "<", "completed_at"),
}


class Condition(NamedTuple):
    """A condition of SQL, with %s for each value."""

    text: Composable
    values: tuple[Any, ...] = ()


def condition(text: LiteralString, *values: Any) -> Condition:
    """The condition of this text."""
    return Condition(SQL(text), values)


class Found:
    """The runs that match a query string.

    The query has one or more branches. A branch reads one index in order (`served`) and checks the remaining
    conditions (`rest`) run by run, for at most SEARCHED runs.
    """

    def __init__(self, asked: Mapping[str, str], sort: str = "newest", statuses: Sequence[str] | None = None) -> None:
        """
        :param asked: the filters, by name; other names are ignored.
        :param statuses: the result is restricted to these statuses as well.
        :raises Refusal: 400, when a filter's value is not valid.
        """
        self.sort = sort
        self.order, self.beyond, self.column = SORTS[sort]
        named = self._statuses(asked.get("status"))
        self.served: list[Condition] = []   # conditions that the index serves, in every branch
        self.by_status = False              # whether that index begins with the status
        self.rest: list[Condition] = []     # conditions that are checked run by run
        self._read(asked)
        if self.text:
            named = named or ["failed", "cancelled", "queued"]  # those that may have an error
        if asked.get("errors") == "true":
            named = [status for status in named or STATUSES if status in ("failed", "queued")]
            self.rest.append(condition("r.error is not null"))
        if statuses is not None:
            named = [status for status in named or STATUSES if status in statuses]
        self.branches = self._branches(named)

    @staticmethod
    def _statuses(text: str | None) -> list[str] | None:
        if text is None:
            return None
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in STATUSES:
                raise invalid("status", f"must be of {', '.join(STATUSES)}, joined by commas")
        return names

    def _read(self, asked: Mapping[str, str]) -> None:
        metadata = self._metadata(asked)
        by_index: list[Condition] = []  # the index of the first serves the query, unless there is a metadata filter
        if parent := asked.get("parent"):
            by_index.append(condition(
                "r.id = any (array(select child_run_id from tidebase.run_edges where parent_run_id = %s))", parent))
        if failure := asked.get("failureClass"):
            by_index.append(condition("r.failure_class = %s", failure))
        self.by_status = not by_index and not metadata and self.sort != "ended" and any(map(asked.get, (
            "workflow", "queue")))
        if workflow := asked.get("workflow"):
            by_index.append(condition("r.workflow_name = %s", workflow))
        if queue := asked.get("queue"):
            by_index.append(condition("r.queue = %s", queue))
        if asked.get("errors") not in (None, "true", "false"):
            raise invalid("errors", "must be true or false")
        self.text = asked.get("text")
        if self.text:
            self._search(self.text)
        since, until = time_of("since", asked.get("since")), time_of("until", asked.get("until"))
        times = [condition(text, at) for text, at in (("r.created_at >= %s", since), ("r.created_at < %s", until))
                 if at is not None]
        if self.sort == "ended":  # the order is that of another index
            self.served.append(condition("r.completed_at is not null"))
            self.rest += [*by_index, *metadata, *times]
        else:
            self.served += [*metadata, *times]
            if metadata:  # the planner chooses: it has statistics on how rare a value is
                self.served += by_index
            else:
                self.served += by_index[:1]
                self.rest += by_index[1:]

    def _search(self, text: str) -> None:
        """Search for a whole id; for the beginning of an id that Tidebase made, which contains a time; or in errors."""
        if start := re.fullmatch(r"run_([0-9a-f]{8,31})", text):
            first, last = int(start[1][:12].ljust(12, "0"), 16), int(start[1][:12].ljust(12, "f"), 16)
            slack = 600_000  # ms between the making of an id, by a client, and its run's
            self.served.append(condition(
                "r.created_at between to_timestamp(%s::bigint / 1000.0) and to_timestamp(%s::bigint / 1000.0)",
                first - slack, last + slack))
            self.rest.append(condition("starts_with(r.id, %s)", text))
            self.text = None
        elif re.fullmatch(r"[A-Za-z0-9_.:-]{1,128}", text) and exists(text):
            self.served.append(condition("r.id = %s", text))
            self.text = None
        else:
            words = re.sub(r"([\\%_])", r"\\\1", text)
            self.rest.append(condition("r.error::text ilike %s", f"%{words}%"))

    @staticmethod
    def _metadata(asked: Mapping[str, str]) -> list[Condition]:
        named = {name.removeprefix("metadata."): text for name, text in asked.items() if name.startswith("metadata.")}
        if not named:
            return []
        if len(named) > MAX_FILTERS:
            raise invalid("metadata", f"at most {MAX_FILTERS} filters")
        conditions = [condition("r.metadata <> '{}'")]  # so that runs_metadata_idx serves it
        # A query string has no types: 5 matches both "5" and 5. All values that can only be text are one condition.
        plain = {}
        for key, text in named.items():
            if NOT_ONLY_TEXT.fullmatch(text):
                conditions.append(condition("(r.metadata @> %s::jsonb or r.metadata @> %s::jsonb)",
                                            json.dumps({key: text}), f"{{{json.dumps(key)}: {text}}}"))
            else:
                plain[key] = text
        if plain:
            conditions.append(condition("r.metadata @> %s::jsonb", json.dumps(plain)))
        return conditions

    def _branches(self, statuses: list[str] | None) -> list[tuple[list[Condition], list[Condition]]]:
        """The conditions of each branch: those that its index serves, and the rest.

        Most runs are completed. Only the indexes of a workflow and of a queue contain them by status: without such a
        filter, the branch of completed runs reads the index of the other filters and checks the status.
        """
        if self.by_status:
            statuses = list(STATUSES) if statuses is None else statuses
        elif statuses is None:
            return [(self.served, self.rest)]
        elif self.sort == "ended" or len(statuses) == len(STATUSES):
            return [(self.served, [*self.rest, condition("r.status = any (%s)", statuses)])]
        branches = []
        for status in statuses:
            # A literal, not a parameter: the planner can prove that the partial index of this status is enough.
            of_it = Condition(SQL("r.status = {}").format(Literal(status)))
            if status == "completed" and not self.by_status:
                branches.append((self.served, [*self.rest, of_it]))
            else:
                branches.append(([of_it, *self.served], self.rest))
        return branches

    def _scan(self, served: list[Condition], limit: int, after: tuple[int, str] | None) -> tuple[Composable, list[Any]]:
        """The query of a branch's next runs, in order, without its remaining conditions."""
        conditions = [*served] or [condition("true")]
        if after:
            conditions.append(Condition(SQL("(r.{}, r.id) {} (to_timestamp(%s::bigint / 1000.0), %s)").format(
                SQL(self.column), SQL(self.beyond)), after))
        text = SQL("select r.* from tidebase.runs r where {} order by {} limit {}").format(
            SQL(" and ").join(c.text for c in conditions), SQL(self.order), Literal(limit))
        return text, [value for c in conditions for value in c.values]

    def page(self, limit: int, after: tuple[int, str] | None, then: LiteralString = "ids",
             values: Sequence[Any] = ()) -> tuple[Any, list[str], str | None]:
        """The next page of runs.

        :param then: an SQL expression that may use `ids`, the page's ids in order; it runs in the same statement.
        :returns: the expression's value, the ids, and the cursor of the next page, None when there is none. When the
                  search stopped before the page was full, the cursor is the last run that was checked.
        """
        branches, parameters = list[Composable](), list[Any]()
        for served, rest in self.branches:
            scan, scanned = self._scan(served, SEARCHED if rest else limit, after)
            branches.append(SQL("(select r.id, r.{} as at from ({}) r where {} order by {} limit {})").format(
                SQL(self.column), scan, SQL(" and ").join([SQL("true"), *(c.text for c in rest)]), SQL(self.order),
                Literal(limit)))
            parameters += [*scanned, *(value for c in rest for value in c.values)]
        if not branches:
            branches.append(SQL("(select null::text as id, null::timestamptz as at where false)"))
        direction = SQL("desc" if "desc" in self.order else "asc")
        query = SQL(
            "with page as (select id, at from ({branches}) every order by at {way}, id {way} limit {limit}), listed as"
            " (select array(select id from page order by at {way}, id {way}) as ids,"
            " array(select (extract(epoch from at) * 1000)::bigint from page order by at {way}, id {way}) as ats)"
            " select {then}, ids, ats from listed"
        ).format(branches=SQL(" union all ").join(branches), way=direction, limit=Literal(limit), then=SQL(then))
        [(value, ids, ats)] = core().database.select(query, [*parameters, *values])
        if len(ids) == limit:
            return value, ids, f"{ats[-1]}_{ids[-1]}"
        reached = [end for served, rest in self.branches if rest for end in self._end_of_search(served, after)]
        if not reached:
            return value, ids, None
        # One branch stopped here. Runs of other branches beyond this point belong to the next page: runs that this
        # branch has not reached yet may come before them.
        end = min(reached) if self.beyond == ">" else max(reached)
        kept = [n for n, at in enumerate(ats) if not ((at, ids[n]) > end if self.beyond == ">" else (at, ids[n]) < end)]
        if len(kept) < len(ids):
            return self.page(len(kept), after, then, values) if kept else ("[]", [], f"{end[0]}_{end[1]}")
        return value, ids, f"{end[0]}_{end[1]}"

    def _end_of_search(self, served: list[Condition], after: tuple[int, str] | None) -> list[tuple[int, str]]:
        """The last run that a branch checked, as a list of one; empty when the branch has no more runs."""
        scan, parameters = self._scan(served, SEARCHED, after)
        rows = core().database.select(SQL(
            "select (extract(epoch from {}) * 1000)::bigint, id from ({}) r offset {}").format(
                SQL(self.column), scan, Literal(SEARCHED - 1)), parameters)
        return [(at, run_id) for at, run_id in rows]

    def count(self) -> tuple[int, bool]:
        """The number of matching runs, and whether there may be more than that."""
        total, more = 0, False
        for served, rest in self.branches:
            scan, parameters = self._scan(served, (SEARCHED if rest else COUNTED) + 1, None)
            query = SQL("select count(*) filter (where {}), count(*) from ({}) r").format(
                SQL(" and ").join([SQL("true"), *(c.text for c in rest)]), scan)
            values = [value for c in rest for value in c.values]
            [(fits, seen)] = core().database.select(query, [*values, *parameters])
            total += min(fits, COUNTED)
            more = more or fits > COUNTED or seen > (SEARCHED if rest else COUNTED)
        return total, more


def exists(run_id: str) -> bool:
    """Whether there is a run of this id."""
    return bool(core().database.select("select 1 from tidebase.runs where id = %s", (run_id,)))


def cursor_from(name: str, text: str | None) -> tuple[int, str] | None:
    """A nextCursor of a query string: time in ms, and id.  :raises Refusal: 400, when it is none."""
    if not text:
        return None
    cursor = CURSOR.fullmatch(text)
    if not cursor:
        raise invalid(name, "must be a nextCursor")
    return int(cursor[1]), cursor[2]


def list_runs(asked: dict[str, str], known: dict[str, str] | None = None) -> tuple[str, list[str], str | None]:
    """The JSON of a page of runs, their ids, and the cursor of the next page.

    :param known: versions by id; a run whose version is still the same is left out of the JSON.
    """
    sort = choice_of("sort", asked.get("sort"), tuple(SORTS), "newest")
    light = choice_of("view", asked.get("view"), ("light", "full"), "full") == "light"
    limit = whole_of("limit", asked.get("limit", "100"), 1000, 1)
    runs, ids, cursor = Found(asked, sort).page(
        limit, cursor_from("before", asked.get("before")), "tidebase._list_runs(ids, %s, %s, %s)",
        [light, core().recent_claims.queues(), json.dumps(known or {})])
    return runs, ids, cursor


LIST_PARAMETERS = ("sort", "view", "limit", "before")
