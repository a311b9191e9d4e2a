"""Committed rows of the partitions that this worker holds: pages of rows, windows with sums, one row.

A page is in one order over all partitions and workers: windows from the newest, keys by their bytes. Whoever cannot look
at everything says up to which *place* in that order its answer is complete, and the answers are cut there when they are
put together; the cut is where the next page begins.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final, NamedTuple, TypeVar

import polars as pl

from streamproc.core import limits
from streamproc.eventtime.windows import WindowState
from streamproc.operators.groupkeys import group_key_columns
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
_SLICE_WINDOWS: Final = 25
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

    rows: list[tuple[Place, dict[str, Any]]]
    complete_to: Place | None


class _Found(NamedTuple):
    place: Place
    key: bytes
    value: bytes
    partition: int


class _Look(NamedTuple):
    """What was found between two breaths: every row looked at, which of them fit, and where to go on (None: nowhere)."""

    rows: list[_Found]
    fits: list[bool]
    next: Place | None


async def _page(
    look: Callable[[Place | None, int], _Look], after: Place | None, limit: int
) -> tuple[list[_Found], Place | None]:
    """Look again and again, with a breath in between, until ``limit`` rows fit or as many were looked at as may be."""
    found: list[_Found] = []
    left = limits.WEB_SCAN_ROWS_MAX
    while True:
        rows, fits, after = look(after, min(left, limits.WEB_SLICE_ROWS))
        for row, fit in zip(rows, fits, strict=True):
            found += [row] if fit else []
            if len(found) == limit and row is not rows[-1]:
                return found, row.place
        left -= len(rows)
        if after is None or left <= 0 or len(found) >= limit:
            return found, after
        await asyncio.sleep(0)


def _first(
    parts: Sequence[HeldTable], window: int, start: bytes, stop: bytes | None, cut: int, most: int
) -> list[_Found]:
    """The first ``most`` rows of all partitions in [``start``, ``stop``); the first ``cut`` bytes of a key are no part of
    its place."""
    return sorted(
        _Found(Place(window, key[cut:]), key, value, part.partition)
        for part in parts
        for key, value in islice(part.scan(start, stop), most)
    )[:most]


# ---- windowed tables


async def window_page(inspector: Inspector, table: TableFacts, *, after: Place | None, limit: int, words: list[str],
                      window_start: int | None) -> Page:  # fmt: skip
    """Up to ``limit`` rows behind ``after`` whose keys hold all ``words``. Rows of different windows may be of different
    epochs."""

    def look(place: Place | None, most: int) -> _Look:
        parts = list(inspector.held(table).values())
        if window_start is None:
            starts = _newest(parts, _SLICE_WINDOWS + 1, None if place is None else -place.window)
        else:
            starts = [window_start] if place is None or -window_start >= place.window else []
        return _look_into(table, parts, starts, place, words, most)

    found, complete_to = await _page(look, after, limit)
    return Page(await _shown(table, found), complete_to)


def _newest(parts: Sequence[HeldTable], count: int, until: int | None) -> list[int]:
    """Starts of the newest windows of all partitions."""
    return sorted({start for part in parts for start in part.windows(count, until)}, reverse=True)[:count]


def _look_into(table: TableFacts, parts: Sequence[HeldTable], starts: Sequence[int], after: Place | None, words: list[str],
               most: int) -> _Look:  # fmt: skip
    """Into the windows of ``starts`` from the newest; the last is only there to tell that there is one more."""
    rows: list[_Found] = []
    for start in starts[:_SLICE_WINDOWS]:
        prefix = window_prefix(start)
        begin = prefix + after.key + b"\x00" if after is not None and -start == after.window else prefix
        rows += _first(parts, -start, begin, prefix + CHUNK, len(prefix), most - len(rows))
        if len(rows) >= most:
            return _Look(rows, _matching(table, [row.place.key for row in rows], words), rows[-1].place)
    more = len(starts) > _SLICE_WINDOWS
    # Behind every key of the last window that was looked into: no group key begins with 0xFF.
    last = Place(-starts[_SLICE_WINDOWS - 1], CHUNK) if more else None
    return _Look(rows, _matching(table, [row.place.key for row in rows], words), last)


def cut_off(rows: list[T], places: Sequence[Place], cuts: Sequence[Place], limit: int) -> tuple[list[T], Place | None]:
    """Of sorted ``rows`` from several workers those that are sure to be in the right order, at most ``limit``, and up to
    where they reach. ``cuts``: up to where each of them had looked."""
    complete_to = min(cuts, default=None)
    if complete_to is not None:
        rows = rows[: bisect_right(places, complete_to)]
    if len(rows) > limit:
        rows, complete_to = rows[:limit], places[limit - 1]
    return rows, complete_to


def _matching(table: TableFacts, keys: Sequence[bytes], words: list[str]) -> list[bool]:
    if not words:
        return [True] * len(keys)
    assert table.plan is not None
    names = [name.casefold() for name in table.plan.keys]
    columns = [column.to_list() for column in group_key_columns(keys, table.plan.keys)]
    return [matches(words, names, [column[at] for column in columns]) for at in range(len(keys))]


async def _shown(table: TableFacts, found: Sequence[_Found]) -> list[tuple[Place, dict[str, Any]]]:
    """`_decoded`, with a breath now and then."""
    shown = []
    for at in range(0, len(found), limits.WEB_SLICE_ROWS):
        shown += _decoded(table, found[at : at + limits.WEB_SLICE_ROWS])
        await asyncio.sleep(0)
    return shown


def _decoded(table: TableFacts, found: Sequence[_Found]) -> list[tuple[Place, dict[str, Any]]]:
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
        for _, entry in _decoded(table, [_Found(Place(0, b""), key, value, part.partition)]):
            answer |= entry
    return answer


# ---- windows and their sums


async def window_sums(inspector: Inspector, table: TableFacts, *, column: str | None, words: list[str],
                      limit: int) -> tuple[list[dict[str, Any]], int | None]:  # fmt: skip
    """The newest ``limit`` windows held here: start, end, state, rows, and of ``column`` how many are not null, their
    sum, least and greatest. And the oldest window looked at, None if there is nothing older.

    Rows are decoded slice by slice with a breath in between, so two windows may be of different epochs.
    """
    newest = _newest(list(inspector.held(table).values()), limit + 1, None)
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


async def object_page(
    inspector: Inspector, table: TableFacts, *, after: Place | None, limit: int, words: list[str]
) -> Page:
    """As `window_page`, of an `app.Table`, in the order of packed keys."""

    def look(place: Place | None, most: int) -> _Look:
        start = b"" if place is None else place.key + b"\x00"
        rows = _first(list(inspector.held(table).values()), 0, start, None, 0, most)
        fits = [not words or matches(words, ["key"], [_spelt_key(row.key)]) for row in rows]
        return _Look(rows, fits, rows[-1].place if len(rows) == most else None)

    found, complete_to = await _page(look, after, limit)
    return Page(
        [(row.place, {"row": _object(row.key, row.value), "partition": row.partition}) for row in found], complete_to
    )


def _spelt_key(key: bytes) -> str:
    return encode(plain(unpack_key(key))).decode()


def _object(key: bytes, value: bytes, *, whole: bool = False) -> dict[str, Any]:
    shown = plain(unpack_value(value))
    if not whole and len(value) > limits.WEB_VALUE_CHARS_MAX:
        shown = f"{len(value)} bytes; ask for this key to see them"
    return {"key": plain(unpack_key(key)), "value": shown}


def one_object(part: HeldTable, key: bytes) -> dict[str, Any]:
    value = part.get(key)
    return {"row": None if value is None else _object(key, value, whole=True), "epoch": part.epoch,
            "commit_age_ms": part.commit_age_ms, "partition": part.partition}  # fmt: skip
