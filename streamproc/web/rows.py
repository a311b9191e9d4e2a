"""Committed rows of the partitions that this worker holds: pages of rows, windows with sums, one row.

A page is in one order over all partitions and workers: windows from the newest, keys by their bytes. Whoever cannot look
at everything says up to which *place* in that order its answer is complete, and the answers are cut there when they are
put together; the cut is where the next page begins.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Final, NamedTuple, TypeVar

import polars as pl

from streamproc.core import limits
from streamproc.eventtime.windows import WindowState
from streamproc.operators.partials import group_key_columns
from streamproc.operators.tablerows import CHUNK, EPOCH, STATE, VISIBLE, window_prefix
from streamproc.runtime.inspect import HeldTable, Inspector, TableFacts
from streamproc.state.packing import unpack_key, unpack_value
from streamproc.web.answers import Refused, encode, plain
from streamproc.web.query import matches

__all__ = [
    "Page",
    "Place",
    "cut_off",
    "object_page",
    "one_object",
    "one_row",
    "read_place",
    "window_page",
    "window_sums",
]


T = TypeVar("T")
_SLICE_WINDOWS: Final = 50
"""Windows looked into between two breaths, however few rows they have."""


class Place(NamedTuple):
    """Of a row in the order of a list: (-window start, key bytes); of an `app.Table`'s row (0, key bytes)."""

    window: int
    key: bytes

    def __str__(self) -> str:
        return f"{self.window}.{self.key.hex()}"


def read_place(text: str | None) -> Place | None:
    if text is None:
        return None
    window, dot, key = text.partition(".")
    try:
        if dot:
            return Place(int(window), bytes.fromhex(key))
    except ValueError:
        pass
    raise Refused(400, f"after={text!r} is not a place in a list.", "Take it from `next` of the answer before.")


@dataclass
class Page:
    """Rows in order, each with its place; ``complete_to``: the last place looked at, None: everything was."""

    rows: list[tuple[Place, dict[str, Any]]] = field(default_factory=list)
    complete_to: Place | None = None


class _Found(NamedTuple):
    place: Place
    key: bytes
    value: bytes
    partition: int


# ---- windowed tables


def window_page(table: TableFacts, held: Sequence[HeldTable], *, after: Place | None, limit: int, words: list[str],
                window_start: int | None) -> Page:  # fmt: skip
    """Up to ``limit`` rows behind ``after`` whose keys hold all ``words``."""
    found: list[_Found] = []
    cuts: list[Place] = []
    for part in held:
        mine, cut = _take(_windowed(table, part, after, words, window_start), limit,
                          limits.WEB_SCAN_ROWS_MAX // len(held))  # fmt: skip
        found += mine
        cuts += [cut] if cut is not None else []
    found.sort()
    found, complete_to = cut_off(found, [row.place for row in found], cuts, limit)
    return Page(_shown(table, found), complete_to)


def _take(rows: Iterator[_Found | Place], limit: int, budget: int) -> tuple[list[_Found], Place | None]:
    """Rows until ``limit`` of them or ``budget`` looked at; the last place looked at if that was not all."""
    taken: list[_Found] = []
    for looked, row in enumerate(rows, 1):
        if isinstance(row, _Found):
            taken.append(row)
        if len(taken) >= limit or looked >= budget:
            return taken, row.place if isinstance(row, _Found) else row
    return taken, None


def cut_off(rows: list[T], places: Sequence[Place], cuts: Sequence[Place], limit: int) -> tuple[list[T], Place | None]:
    """Of sorted ``rows`` those that are sure to be in the right order, at most ``limit``, and up to where they reach."""
    complete_to = min(cuts, default=None)
    if complete_to is not None:
        rows = rows[: bisect_right(places, complete_to)]
    if len(rows) > limit:
        rows, complete_to = rows[:limit], places[limit - 1]
    return rows, complete_to


def _windowed(table: TableFacts, part: HeldTable, after: Place | None, words: list[str],
              only: int | None) -> Iterator[_Found | Place]:  # fmt: skip
    """Rows in order; of those that do not match, the place."""
    assert table.plan is not None
    newest = -after.window if after is not None else None
    starts = part.windows(limits.WEB_SCAN_ROWS_MAX, newest) if only is None else [only]
    for start in starts:
        prefix = window_prefix(start)
        begin = prefix
        if after is not None and -start <= after.window:
            if -start < after.window:
                continue
            begin = prefix + after.key + b"\x00"
        scan = part.scan(begin, prefix + CHUNK)
        while rows := list(islice(scan, limits.WEB_SLICE_ROWS)):
            good = _matching(table, [key[8:] for key, _ in rows], words)
            for (key, value), match in zip(rows, good, strict=True):
                place = Place(-start, key[8:])
                yield _Found(place, key, value, part.partition) if match else place


def _matching(table: TableFacts, keys: Sequence[bytes], words: list[str]) -> list[bool]:
    if not words:
        return [True] * len(keys)
    assert table.plan is not None
    names = [name.casefold() for name in table.plan.keys]
    columns = [column.to_list() for column in group_key_columns(keys, table.plan.keys)]
    return [matches(words, names, [column[at] for column in columns]) for at in range(len(keys))]


def _shown(table: TableFacts, found: Sequence[_Found]) -> list[tuple[Place, dict[str, Any]]]:
    """Rows as users know them; those that a filter after the aggregation hides are left out."""
    shown = []
    frame = table.rows.results((row.key, row.value) for row in found)
    for row, values in zip(found, frame.iter_rows(named=True), strict=True):
        state, epoch, visible = values.pop(STATE), values.pop(EPOCH), values.pop(VISIBLE)
        if visible:
            entry = {"row": plain(values), "window": WindowState(state).name.lower(), "changed_in_epoch": epoch,
                     "partition": row.partition}  # fmt: skip
            shown.append((row.place, entry))
    return shown


def one_row(table: TableFacts, part: HeldTable, key: bytes) -> dict[str, Any]:
    """The answer of a point query: with the epoch it is of and how long ago that was committed."""
    answer: dict[str, Any] = {"row": None, "epoch": part.epoch, "commit_age_ms": part.commit_age_ms,
                              "partition": part.partition, "window": None}  # fmt: skip
    value = part.get(key)
    if value is not None:
        for _, entry in _shown(table, [_Found(Place(0, b""), key, value, part.partition)]):
            answer |= entry
    return answer


# ---- windows and their sums


async def window_sums(inspector: Inspector, table: TableFacts, *, column: str | None, words: list[str],
                      limit: int) -> tuple[list[dict[str, Any]], int | None]:  # fmt: skip
    """The newest ``limit`` windows held here: start, end, state, rows, and of ``column`` how many are not null, their
    sum, least and greatest. And the oldest window looked at, None if there is nothing older.

    Rows are decoded slice by slice with a breath in between, so two windows may be of different epochs.
    """
    newest = sorted({at for part in inspector.held(table).values() for at in part.windows(limit + 1)}, reverse=True)
    starts, told, done, left = newest[:limit], [], 0, limits.WEB_SCAN_ROWS_MAX
    while done < len(starts):
        rows, whole = _slice(list(inspector.held(table).values()), starts[done:], left)
        if not whole:
            break  # a window of more rows than one answer may look at: it and all before it are left out
        done, left = done + whole, left - len(rows)
        good = _matching(table, [key[8:] for key, _ in rows], words)
        frame = table.rows.results(row for row, match in zip(rows, good, strict=True) if match)
        told += _sums(frame.filter(pl.col(VISIBLE)), column)
        await asyncio.sleep(0)
    if done == len(newest):
        return told, None
    return told, starts[done - 1] if done else newest[0] + 1


def _slice(parts: Sequence[HeldTable], starts: Sequence[int], most: int) -> tuple[list[tuple[bytes, bytes]], int]:
    """Rows of the first of ``starts``, at least `WEB_SLICE_ROWS` if there are as many, and how many windows they are."""
    rows: list[tuple[bytes, bytes]] = []
    for count, start in enumerate(starts[:_SLICE_WINDOWS]):
        prefix = window_prefix(start)
        scans = chain.from_iterable(part.scan(prefix, prefix + CHUNK) for part in parts)
        window = list(islice(scans, most - len(rows) + 1))
        if len(rows) + len(window) > most:
            return rows, count
        rows += window
        if len(rows) >= limits.WEB_SLICE_ROWS:
            return rows, count + 1
    return rows, min(len(starts), _SLICE_WINDOWS)


def _sums(frame: pl.DataFrame, column: str | None) -> list[dict[str, Any]]:
    value = (pl.col(column) if column is not None else pl.lit(None)).cast(pl.Float64)
    value = pl.when(value.is_finite()).then(value)
    found = frame.group_by("window_start", "window_end").agg(
        state=pl.col(STATE).min(), rows=pl.len(), n=value.count(), sum=value.sum(), min=value.min(), max=value.max()
    )
    return [
        {**plain(row), "state": WindowState(row["state"]).name.lower()}
        for row in found.sort("window_start", descending=True).iter_rows(named=True)
    ]


# ---- tables of per-record agents


def object_page(held: Sequence[HeldTable], *, after: Place | None, limit: int, words: list[str]) -> Page:
    """As `window_page`, of an `app.Table`, in the order of packed keys."""
    found: list[_Found] = []
    cuts: list[Place] = []
    for part in held:
        mine, cut = _take(_objects(part, after, words), limit, limits.WEB_SCAN_ROWS_MAX // len(held))
        found += mine
        cuts += [cut] if cut is not None else []
    found.sort()
    found, complete_to = cut_off(found, [row.place for row in found], cuts, limit)
    rows = [(row.place, {"row": _object(row.key, row.value), "partition": row.partition}) for row in found]
    return Page(rows, complete_to)


def _objects(part: HeldTable, after: Place | None, words: list[str]) -> Iterator[_Found | Place]:
    for key, value in part.scan(after.key + b"\x00" if after is not None else b""):
        place = Place(0, key)
        match = not words or matches(words, ["key"], [encode(plain(unpack_key(key))).decode().casefold()])
        yield _Found(place, key, value, part.partition) if match else place


def _object(key: bytes, value: bytes, *, whole: bool = False) -> dict[str, Any]:
    shown = plain(unpack_value(value))
    if not whole and len(value) > limits.WEB_VALUE_CHARS_MAX:
        shown = f"{len(value)} bytes; ask for this key to see them"
    return {"key": plain(unpack_key(key)), "value": shown}


def one_object(part: HeldTable, key: bytes) -> dict[str, Any]:
    value = part.get(key)
    return {"row": None if value is None else _object(key, value, whole=True), "epoch": part.epoch,
            "commit_age_ms": part.commit_age_ms, "partition": part.partition}  # fmt: skip
