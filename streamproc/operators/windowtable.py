"""The owner's side of a two-step aggregation: merge partials into the rows of windows, close them, let them go."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec
import numpy as np
import polars as pl

from streamproc.core.batch import I64, Headers
from streamproc.core.errors import invariant
from streamproc.core.limits import DISTINCT_CACHE_BYTES_MAX, TABLE_ROWS_CACHE_BYTES_MAX
from streamproc.core.types import NO_WATERMARK
from streamproc.eventtime.windows import WindowState, expires, is_late, state_at, window_end
from streamproc.operators.accumulate import PartialAggregator, example_plan, example_rows
from streamproc.operators.contract import KeyedState, PartialHeader
from streamproc.operators.distinct import DistinctSets
from streamproc.operators.partials import PartialRows, decode_partial, encode_partial
from streamproc.operators.plan import TablePlan
from streamproc.operators.rowcache import RowCache
from streamproc.operators.tablerows import (
    CHUNK,
    DistinctCell,
    TableRows,
    window_prefix,
    window_range,
    window_start_of,
)

__all__ = ["LateAggregate", "WindowTable", "result_shape", "warm_up"]


_SKIP_AFTER: Final = 500
"""Rows of one window after which `WindowTable.restore` seeks the next window; below it reading on is cheaper."""
_NO_ROWS: Final = np.zeros(0, np.int64)


class LateAggregate(NamedTuple):
    """A row of a partial that came when its window was final: it changes nothing and goes to the late output."""

    table: str
    window_start: int
    window_end: int
    keys: bytes
    """The group key, encoded."""
    late_by_ms: int
    """How far the watermark is past the last moment at which the row would have counted."""
    source: int
    epoch: int
    """The upstream task and its epoch."""
    payload: bytes
    """The row as a partial of its own, to be merged by the owner if it is sent back."""

    def headers(self) -> Headers:
        """The late output's headers, numbers as decimal text: see `contract.SideRecord`. ``sp-partition`` is the
        upstream task, ``sp-offset`` its epoch: an aggregate has no offset of its own."""
        named: dict[str, object] = {
            "sp-reason": "late aggregate",
            "sp-partition": self.source,
            "sp-offset": self.epoch,
            "sp-table": self.table,
            "sp-window-start": self.window_start,
            "sp-window-end": self.window_end,
            "sp-late-by-ms": self.late_by_ms,
        }
        return tuple((name, str(value).encode()) for name, value in named.items())


def result_shape(plan: TablePlan) -> tuple[dict[str, pl.DataType], dict[str, pl.DataType]]:
    """Group keys, and aggregates with derived columns, in order, with their types: `TableRows.shape` of ``plan``."""
    return TableRows(plan).shape()


class WindowTable:
    """One windowed table in the task that owns a partition of it.

    In an epoch: `apply` for every partial as it is read; then, once, before the state is frozen, `advance`, `expire` now
    and then, and last `collect`: until then changed rows are in memory only, decoded, so that each is put once an epoch.
    After an abort (the state is already back at its last commit) `abort`; `restore` once at the start.
    """

    def __init__(self, plan: TablePlan, state: KeyedState, *, cache_bytes_max: int = DISTINCT_CACHE_BYTES_MAX) -> None:
        self.rows = TableRows(plan)
        self._plan, self._state, self._layout = plan, state, self.rows.layout
        self._sets = DistinctSets(state, cache_bytes_max)
        self._cache = RowCache(self._layout)
        self._whole: set[int] = set()
        """Windows of which no row is in the state but those in the cache: what is not found there is new."""
        self._text_bytes = 0
        """At most so many are the texts among the epoch's rows."""
        self._live: dict[int, WindowState] = {}
        self._final: list[int] = []
        self._moved: set[int] = set()
        """Windows that became final in this epoch: their rows are not all written yet."""

    @property
    def size_bytes(self) -> int:
        """What the epoch has changed and `collect` has not yet written; counts towards the epoch's byte limit."""
        return self._cache.changed_bytes + self._text_bytes + self._sets.pending_bytes

    @property
    def windows(self) -> dict[int, WindowState]:
        """Every window that has rows, by its start."""
        return {**dict.fromkeys(self._final, WindowState.FINAL), **self._live}

    def apply(self, header: PartialHeader, rows: PartialRows, watermark: int) -> list[LateAggregate]:
        """Merge a partial; return the rows that came too late. ``watermark`` is the task's *before* this partial.

        A window that is final, purged or not, is never made or changed again: that would overwrite a right result.
        """
        starts = rows.integers(0)
        found = np.unique(starts).tolist()
        late = {start for start in found if self._is_late(start, watermark)}
        for start in found:
            if start not in late and start not in self._live:
                self._live[start] = WindowState.OPEN
                self._whole.add(start)
        if not late:
            self._merge(starts, rows)
            return []
        behind = np.isin(starts, list(late))
        self._merge(starts[~behind], rows.take(np.flatnonzero(~behind)))
        return [self._late(header, one, watermark) for one in rows.take(np.flatnonzero(behind)).singles()]

    def advance(self, watermark: int, epoch: int) -> None:
        """Windows that ``watermark`` has passed become closed or final; ``epoch`` has changed every row of theirs."""
        moving = {}
        for start, before in self._live.items():
            end = window_end(start, self._plan.window)
            state = state_at(end, self._plan.allowed_lateness_ms, watermark)
            if state > before:
                moving[start] = state
        changed = self._cache.changed_by_window() if moving else {}
        for start, state in moving.items():
            self._move(start, state, epoch, changed.get(start, _NO_ROWS))

    def collect(self, epoch: int) -> None:
        """Write the rows that ``epoch`` has changed and what is new of their distinct values. Last in an epoch."""
        ids = self._cache.changed()
        if len(ids):
            starts, inverse = np.unique(self._cache.window_starts(ids), return_inverse=True)
            states = [self._live.get(start, WindowState.FINAL) for start in starts.tolist()]
            values = self._cache.encode(ids, np.array(states, np.uint8)[inverse], epoch)
            self._state.put_new(self._cache.keys(ids), values)
        if not self._cache.keep(TABLE_ROWS_CACHE_BYTES_MAX, self._live):
            self._whole.clear()
        self._text_bytes = 0
        self._moved.clear()
        self._sets.flush(epoch)

    def expire(self, watermark: int, sinks_epoch: int) -> int:
        """Let go of final windows past their retention whose last change is in an epoch that every sink has applied
        (``sinks_epoch`` and before). Returns how many windows left. Sinks keep their rows."""
        kept: list[int] = []
        past = 0
        for start in self._final:
            end = window_end(start, self._plan.window)
            if not expires(end, self._plan.allowed_lateness_ms, self._plan.retain_ms, watermark):
                break
            past += 1
            if start in self._moved or self._final_epoch(start) > sinks_epoch:
                kept.append(start)
            else:
                self._state.expire(*window_range(start))
        self._final[:past] = kept
        return past - len(kept)

    def restore(self) -> None:
        """Learn from the state which windows there are. Large ones are skipped, not read."""
        self._cache.clear()
        self._whole.clear()
        self._text_bytes = 0
        self._live, self._final, self._moved = {}, [], set()
        at: bytes | None = b""
        while at is not None:
            at = self._learn(at)

    def abort(self) -> None:
        """Forget the epoch: the state is back at its last commit."""
        self._sets.abort()
        self.restore()

    def results(self, rows: Iterable[tuple[bytes, bytes]]) -> pl.DataFrame:
        """`TableRows.results`."""
        return self.rows.results(rows)

    def row_key(self, window_start: int, keys: Iterable[object]) -> bytes:
        """`TableRows.row_key`."""
        return self.rows.row_key(window_start, keys)

    def shape(self) -> tuple[dict[str, pl.DataType], dict[str, pl.DataType]]:
        """`TableRows.shape`."""
        return self.rows.shape()

    def _is_late(self, start: int, watermark: int) -> bool:
        end = window_end(start, self._plan.window)
        return is_late(end, self._plan.allowed_lateness_ms, watermark)

    def _merge(self, starts: I64, rows: PartialRows) -> None:
        """Rows of windows that are not final."""
        known = len(self._cache)
        ids = self._cache.number(starts, rows.spans(1))
        if self._layout.texts:
            self._text_bytes += sum(len(body) for _, body in rows.columns[2:])
        self._load(known)
        at = 2
        for number, cell in enumerate(self._layout.cells):
            if isinstance(cell, DistinctCell):
                self._merge_distinct(ids, rows, number, at)
            else:
                self._cache.columns[number].merge(ids, rows, at)
            at += cell.width
        invariant(at == len(rows.columns), f"A partial of table {self._plan.name!r} has {len(rows.columns)} columns.")

    def _load(self, known: int) -> None:
        """The cache's rows from ``known`` on are new there; the state may have them."""
        new = np.arange(known, len(self._cache))
        if not len(new):
            return
        elsewhere = [start not in self._whole for start in self._cache.window_starts(new).tolist()]
        new = new[np.array(elsewhere)]
        for row, key in zip(new.tolist(), self._cache.keys(new), strict=True):
            value = self._state.get(key)
            if value is not None:
                self._cache.load(row, value)
                self._text_bytes += len(value) if self._layout.texts else 0

    def _merge_distinct(self, ids: I64, rows: PartialRows, number: int, at: int) -> None:
        """The row counts how many of the hashes are new to it."""
        counts = self._cache.columns[number]
        keys = self._cache.keys(ids)
        for row, key, hashes in zip(ids.tolist(), keys, rows.blobs(at), strict=True):
            if hashes:
                held = counts.get(row)
                chunks = key[:8] + CHUNK + key[8:] + bytes([number])
                counts.put(row, held + self._sets.add(chunks, hashes, empty=held == 0))

    def _late(self, header: PartialHeader, one: PartialRows, watermark: int) -> LateAggregate:
        start, key = int(one.integers(0)[0]), one.blobs(1)[0]
        end = window_end(start, self._plan.window)
        alone = msgspec.structs.replace(header, part=0, parts=1)
        return LateAggregate(
            self._plan.name, start, end, key, watermark - (end - 1 + self._plan.allowed_lateness_ms), header.source,
            header.epoch, encode_partial(alone, 1, one.columns),
        )  # fmt: skip

    def _move(self, start: int, state: WindowState, epoch: int, changed: I64) -> None:
        """One window into its next state. The rows ``changed`` by the epoch get it when they are written."""
        prefix = window_prefix(start)
        written_later: set[bytes] | None = None
        for key, value in self._state.scan(prefix, prefix + CHUNK):
            if written_later is None:
                written_later = set(self._cache.keys(changed))
            if key not in written_later:
                self._state.put(key, self._layout.restamp(value, state, epoch))
        self._live[start] = state
        if state == WindowState.FINAL:
            del self._live[start]
            self._whole.discard(start)
            insort(self._final, start)
            self._moved.add(start)
            self._sets.forget(prefix)

    def _learn(self, at: bytes) -> bytes | None:
        """Take note of windows from key ``at`` on; return where to look next, None if that was all."""
        last, seen = None, 0
        for key, value in self._state.scan(at, None):
            start = window_start_of(key)
            if start != last:
                # All rows of a window are in one state: `advance` and `collect` keep them together.
                state, _ = self._layout.stamp(value)
                if state == WindowState.FINAL:
                    self._final.append(start)
                else:
                    self._live[start] = state
                last, seen = start, 0
            seen += 1
            if seen > _SKIP_AFTER:
                return window_range(start)[1]
        return None

    def _final_epoch(self, start: int) -> int:
        """Epoch of a final window's last change: that which made it final changed all its rows, none came after."""
        _, value = next(iter(self._state.scan(*window_range(start))))
        return self._layout.stamp(value)[1]


def warm_up(state: KeyedState) -> None:
    """Compile or load every kernel of an owner, on an empty ``state``; called at start, off the way of the first record."""
    plan = example_plan()
    aggregator, table = PartialAggregator(plan), WindowTable(plan, state)
    rows = example_rows()
    aggregator.add(rows, np.zeros(len(rows), np.int64))
    for partial in aggregator.drain(0, 1, 1, 0, False):
        for payload in partial.payloads:
            table.apply(*decode_partial(payload), NO_WATERMARK)
    table.collect(1)
