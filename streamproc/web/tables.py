"""Questions about tables, put together from all workers that hold their partitions."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any
from urllib.parse import quote

from streamproc.core import limits
from streamproc.eventtime.spec import FOREVER
from streamproc.runtime.inspect import HeldTable, Inspector, TableFacts
from streamproc.web.answers import Question, Refused, nearest
from streamproc.web.graph import span
from streamproc.web.query import object_key, row_place, tokens
from streamproc.web.rows import cut_off, object_page, one_object, one_row, read_place, window_page, window_sums
from streamproc.web.workers import Told, Workers

__all__ = ["Tables"]

COMBINED = {"count": "sum", "sum": "sum", "min": "min", "max": "max"}
"""How an aggregate of several keys is shown as one number; what is not here cannot be had from results."""


class Tables:
    """Each answer is made of what this worker holds; unless ``local``, also of what the others say.

    ``missing_partitions`` of an answer are those that no worker holds or that could not be asked: they start, restore
    or are being moved.
    """

    def __init__(self, inspector: Inspector, workers: Workers) -> None:
        self._inspector, self._workers = inspector, workers

    def declared(self) -> list[dict[str, Any]]:
        """Every table as declared."""
        return [_declared(table) for table in self._inspector.tables.values()]

    # ---- rows

    async def rows(self, name: str, question: Question, *, local: bool) -> dict[str, Any]:
        """``limit``, ``after``, ``q``; of windowed tables also ``window_start``. ``next`` is the ``after`` of the next
        page, null: that was all."""
        table = self._table(name)
        limit = question.count("limit", limits.WEB_ROWS, limits.WEB_ROWS_MAX)
        after, q, only = question.text("after"), question.text("q"), None
        if table.kind == "windowed":
            only = question.time("window_start")
        question.done()
        place = read_place(after)
        if table.kind == "windowed":
            page = await window_page(
                self._inspector, table, after=place, limit=limit, words=tokens(q), window_start=only
            )
        else:
            page = await object_page(self._inspector, table, after=place, limit=limit, words=tokens(q))
        held = list(self._inspector.held(table).values())
        mine = {"rows": [{"place": str(at), **row} for at, row in page.rows],
                "next": None if page.complete_to is None else str(page.complete_to)}  # fmt: skip
        asked = {"limit": str(limit), "after": after, "q": q, "window_start": only}
        told = [] if local else await self._others(table, "rows", asked)
        answers = [mine, *(one.answer for one in told if one.answer is not None)]
        rows = sorted((row for answer in answers for row in answer["rows"]), key=_place_of)
        cuts = [cut for answer in answers if (cut := read_place(answer["next"])) is not None]
        rows, complete_to = cut_off(rows, [_place_of(row) for row in rows], cuts, limit)
        return {"table": name, "rows": rows, "next": None if complete_to is None else str(complete_to),
                **self._about(table, held, told)}  # fmt: skip

    # ---- windows

    async def windows(self, name: str, question: Question, *, local: bool) -> dict[str, Any]:
        """The newest ``limit`` windows, oldest last, with the sum, least and greatest of ``column`` over the keys that
        ``q`` leaves. ``combined`` says which of these stands for all keys; null: none does (a mean, a distinct count
        and derived columns do not add up; look at one key)."""
        table = self._table(name)
        if table.kind != "windowed" or table.plan is None:
            raise Refused(
                404, f"{name} is a table of per-record agents: it has no windows.", f"Ask for /api/tables/{name}/rows."
            )
        limit = question.count("limit", 60, limits.WEB_WINDOWS_MAX)
        column, q = question.text("column"), question.text("q")
        question.done()
        numeric = _numeric(table)
        if column is None:
            column = next(iter(numeric), None)
        elif column not in numeric:
            raise Refused(
                400, f"{column!r} is not a numeric column of {name}.", nearest(column, numeric), parameter="column"
            )
        words = tokens(q)
        mine, reached = await window_sums(self._inspector, table, column=column, words=words, limit=limit)
        asked = {"limit": str(limit), "column": column, "q": q}
        told = [] if local else await self._others(table, "windows", asked)
        answers = [{"windows": mine, "reached": reached}, *(one.answer for one in told if one.answer is not None)]
        since = max((answer["reached"] for answer in answers if answer["reached"] is not None), default=None)
        windows = _merged(window for answer in answers for window in answer["windows"])
        windows = [window for window in windows if since is None or window["window_start"] >= since]
        agg = table.plan.aggs.get(column or "")
        return {"table": name, "column": column, "combined": COMBINED.get(agg.kind) if agg is not None else None,
                "windows": windows[:limit], "reached": since,
                **self._about(table, self._inspector.held(table).values(), told)}  # fmt: skip

    # ---- one row

    async def row(self, name: str, question: Question, parameters: dict[str, str], *, hop: bool) -> dict[str, Any]:
        """The row that the parameters name, from the worker that owns it."""
        table = self._table(name)
        if table.kind == "keyed":
            return await self._object(table, object_key(table, question), parameters, hop)
        place = row_place(table, question)
        held = self._inspector.held(table)
        if place.partition in held:
            return one_row(table, held[place.partition], place.key)
        owner = self._workers.owner(table.sources, place.partition)
        if hop or owner is None or owner == self._workers.own:
            raise Refused(503, f"Partition {place.partition} of {name} is not ready: its task starts, restores or moves.",
                          "Ask again in a moment.", partition=place.partition)  # fmt: skip
        answer: dict[str, Any] = await self._workers.ask(owner, _path(table, "row"), parameters)
        return {**answer, "worker": owner}

    async def _object(self, table: TableFacts, key: bytes, parameters: dict[str, str], hop: bool) -> dict[str, Any]:
        """A row of an `app.Table` lies where its agent read the record that wrote it, which no key tells: every
        partition is asked. ``others``: further partitions that have a row of this key."""
        held = self._inspector.held(table).values()
        found = [one_object(part, key) for part in held]
        told = [] if hop else await self._others(table, "row", parameters)
        for one in told:
            if one.answer is not None:
                found += [{**row, "worker": one.worker} for row in one.answer["found"]]
        if hop:
            return {"found": found, "partitions": [part.partition for part in held]}
        having = sorted((row for row in found if row["row"] is not None), key=lambda row: int(row["partition"]))
        about = self._about(table, held, told)
        if not having and about["missing_partitions"]:
            raise Refused(503, f"Partitions {about['missing_partitions']} of {table.name} are not ready.",
                          "Ask again in a moment.", **about)  # fmt: skip
        first = having[0] if having else {"row": None, "epoch": None, "commit_age_ms": None, "partition": None}
        return {**first, "others": having[1:], **about}

    # ---- the other workers

    async def _others(self, table: TableFacts, what: str, asked: dict[str, Any]) -> list[Told]:
        parameters = {name: str(value) for name, value in asked.items() if value is not None}
        return await self._workers.ask_others(_path(table, what), parameters)

    def _about(self, table: TableFacts, held: Iterable[HeldTable], told: Iterable[Told]) -> dict[str, Any]:
        partitions = {part.partition for part in held}
        for one in told:
            partitions.update(one.answer["partitions"] if one.answer is not None else ())
        return {"partitions": sorted(partitions),
                "missing_partitions": sorted(set(range(table.partitions)) - partitions),
                "problems": [one.problem for one in told if one.problem is not None]}  # fmt: skip

    def _table(self, name: str) -> TableFacts:
        tables = self._inspector.tables
        if name not in tables:
            if not self._inspector.groups:
                raise Refused(503, "The worker has not joined its group yet.", "Ask again in a moment.")
            raise Refused(404, f"There is no table {name!r}.", nearest(name, tables), tables=sorted(tables),
                          nearest=get_close_matches(name, tables, n=3, cutoff=0.5))  # fmt: skip
        return tables[name]


def _declared(table: TableFacts) -> dict[str, Any]:
    told: dict[str, Any] = {"name": table.name, "kind": table.kind, "group": table.group,
                            "partitions": table.partitions, "sinks": list(table.sinks)}  # fmt: skip
    if table.plan is not None:
        plan, (keys, columns) = table.plan, table.rows.shape()
        told |= {
            "keys": {name: str(dtype) for name, dtype in keys.items()},
            "columns": {name: str(dtype) for name, dtype in columns.items()},
            "numeric": _numeric(table),
            "window": "none" if plan.window == FOREVER else f"tumbling {span(plan.window.size_ms)}",
            "window_ms": plan.window.size_ms,
            "allowed_lateness": span(plan.allowed_lateness_ms), "retain": span(plan.retain_ms),
        }  # fmt: skip
    return told


def _numeric(table: TableFacts) -> list[str]:
    return [name for name, dtype in table.rows.shape()[1].items() if dtype.is_numeric()]


def _path(table: TableFacts, what: str) -> str:
    return f"/api/tables/{quote(table.name, safe='')}/{what}"


def _place_of(row: dict[str, Any]) -> Any:
    return read_place(row["place"])


_STATES = ("open", "closed", "final")


def _merged(windows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a window, newest first: a window is as open as the partition that is furthest behind has it."""
    found: dict[int, dict[str, Any]] = {}
    for window in windows:
        other = found.setdefault(window["window_start"], window)
        if other is window:
            continue
        found[window["window_start"]] = {
            **other,
            "state": min(other["state"], window["state"], key=_STATES.index),
            "rows": other["rows"] + window["rows"], "n": other["n"] + window["n"], "sum": other["sum"] + window["sum"],
            "min": _least(min, other["min"], window["min"]), "max": _least(max, other["max"], window["max"]),
        }  # fmt: skip
    return sorted(found.values(), key=lambda window: -window["window_start"])


def _least(choose: Any, one: Any, two: Any) -> Any:
    return two if one is None else one if two is None else choose(one, two)
