"""The owner's side of a two-step aggregation: merge partials into the rows of windows, close them, let them go."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec
import polars as pl

from streamproc.core.batch import Headers
from streamproc.core.errors import invariant
from streamproc.core.limits import DISTINCT_CACHE_BYTES_MAX, TABLE_ROWS_CACHE_BYTES_MAX
from streamproc.eventtime.windows import WindowState, expires, is_late, state_at, window_end
from streamproc.operators.contract import KeyedState, PartialHeader
from streamproc.operators.distinct import DistinctSets
from streamproc.operators.partials import PartialRows, encode_partial
from streamproc.operators.plan import TablePlan
from streamproc.operators.tablerows import (
    CHUNK,
    DistinctCell,
    Row,
    TableRows,
    window_prefix,
    window_range,
    window_start_of,
)

__all__ = ["LateAggregate", "WindowTable", "result_shape"]


_SKIP_AFTER: Final = 500
"""Rows of one window after which `WindowTable.restore` seeks the next window; below it reading on is cheaper."""


_ROW_BYTES: Final = 128
"""More than a decoded row takes beside its key and its values, and more than one value takes that is no text."""


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

    In an epoch: `apply` for every partial as it is read, `advance` when the watermark has moved, `expire` now and then,
    and once, last, before the state is frozen, `collect`: until then changed rows are in memory only, decoded, so that
    each is put once an epoch. After an abort (the state is already back at its last commit) `abort`; `restore` once at
    the start.
    """

    def __init__(self, plan: TablePlan, state: KeyedState, *, cache_bytes_max: int = DISTINCT_CACHE_BYTES_MAX) -> None:
        self.rows = TableRows(plan)
        self._plan, self._state, self._layout = plan, state, self.rows.layout
        self._sets = DistinctSets(state, cache_bytes_max)
        self._dirty: dict[bytes, Row] = {}
        self._dirty_bytes = 0
        self._clean: dict[bytes, Row] = {}
        """Rows of earlier epochs as the state has them, decoded: what changes in one epoch often does in the next."""
        self._clean_bytes = 0
        self._row_bytes = _ROW_BYTES * (1 + len(self._layout.cells))
        self._live: dict[int, WindowState] = {}
        self._final: list[int] = []
        self._moved: set[int] = set()
        """Windows that became final in this epoch: their rows are not all written yet."""

    @property
    def size_bytes(self) -> int:
        """What the epoch has changed and `collect` has not yet written; counts towards the epoch's byte limit."""
        return self._dirty_bytes + self._sets.pending_bytes

    @property
    def windows(self) -> dict[int, WindowState]:
        """Every window that has rows, by its start."""
        return {**dict.fromkeys(self._final, WindowState.FINAL), **self._live}

    def apply(self, header: PartialHeader, rows: PartialRows, watermark: int) -> list[LateAggregate]:
        """Merge a partial; return the rows that came too late. ``watermark`` is the task's *before* this partial.

        A window that is final, purged or not, is never made or changed again: that would overwrite a right result.
        """
        starts, keys = rows.integers(0).tolist(), rows.blobs(1)
        late = {start for start in set(starts) if self._is_late(start, watermark)}
        for start in set(starts) - late:
            self._live.setdefault(start, WindowState.OPEN)
        values = zip(*self._load(rows), strict=True) if self._layout.cells else iter([()] * len(rows))
        prefixes = {start: window_prefix(start) for start in set(starts) - late}
        for start, key, row in zip(starts, keys, values, strict=True):
            if start in prefixes:
                self._merge(prefixes[start], key, row)
        return [self._late(header, rows, at, watermark) for at, start in enumerate(starts) if start in late]

    def advance(self, watermark: int, epoch: int) -> None:
        """Windows that ``watermark`` has passed become closed or final; ``epoch`` has changed every row of theirs."""
        for start, before in list(self._live.items()):
            end = window_end(start, self._plan.window)
            state = state_at(end, self._plan.allowed_lateness_ms, watermark)
            if state > before:
                self._move(start, state, epoch)

    def collect(self, epoch: int) -> None:
        """Write the rows that ``epoch`` has changed and what is new of their distinct values. Last in an epoch."""
        states: dict[bytes, WindowState] = {}
        for key, row in self._dirty.items():
            prefix = key[:8]
            if prefix not in states:
                states[prefix] = self._live.get(window_start_of(key), WindowState.FINAL)
            row.state, row.epoch = states[prefix], epoch
            self._state.put(key, self._layout.encode(row))
        self._keep()
        self._dirty_bytes = 0
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
        self._dirty.clear()
        self._clean.clear()
        self._dirty_bytes = self._clean_bytes = 0
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

    def _load(self, rows: PartialRows) -> list[list[object]]:
        """Each aggregate's values, one a row."""
        loaded, at = [], 2
        for cell in self._layout.cells:
            loaded.append(cell.load(rows, at))
            at += cell.width
        invariant(at == len(rows.columns), f"A partial of table {self._plan.name!r} has {len(rows.columns)} columns.")
        return loaded

    def _merge(self, prefix: bytes, key: bytes, values: tuple[object, ...]) -> None:
        row = self._row(prefix + key)
        for at, cell in enumerate(self._layout.cells):
            theirs = values[at]
            if isinstance(cell, DistinctCell):
                ids = theirs
                if not isinstance(ids, bytes) or not ids:
                    continue
                chunks = prefix + CHUNK + key + bytes([at])
                theirs = self._sets.add(chunks, ids, empty=row.values[at] == 0)
            row.values[at] = cell.merge(row.values[at], theirs)

    def _row(self, key: bytes) -> Row:
        row = self._dirty.get(key)
        if row is not None:
            return row
        row = self._clean.pop(key, None)
        if row is not None:
            self._clean_bytes -= len(key) + self._row_bytes
            self._dirty_bytes += len(key) + self._row_bytes
        else:
            value = self._state.get(key)
            row = self._layout.fresh() if value is None else self._layout.decode(value)
            self._dirty_bytes += len(key) + (len(value) if value else 16 * len(row.values))
        self._dirty[key] = row
        return row

    def _keep(self) -> None:
        """The epoch's rows are what the state has now. All are let go when they are too many; so are rows with texts,
        whose size nobody knows."""
        held = sum(map(len, self._dirty)) + self._row_bytes * len(self._dirty)
        if self._clean_bytes + held > TABLE_ROWS_CACHE_BYTES_MAX:
            self._clean, self._clean_bytes = {}, 0
        if held <= TABLE_ROWS_CACHE_BYTES_MAX and not self._layout.texts:
            self._clean.update(self._dirty)
            self._clean_bytes += held
        self._dirty = {}

    def _late(self, header: PartialHeader, rows: PartialRows, at: int, watermark: int) -> LateAggregate:
        one = rows.one(at)
        start, key = int(one.integers(0)[0]), one.blobs(1)[0]
        end = window_end(start, self._plan.window)
        alone = msgspec.structs.replace(header, part=0, parts=1)
        return LateAggregate(
            self._plan.name, start, end, key, watermark - (end - 1 + self._plan.allowed_lateness_ms), header.source,
            header.epoch, encode_partial(alone, 1, one.columns),
        )  # fmt: skip

    def _move(self, start: int, state: WindowState, epoch: int) -> None:
        """One window into its next state. Rows that the epoch has changed get it when they are written."""
        prefix = window_prefix(start)
        for key, value in list(self._state.scan(prefix, prefix + CHUNK)):
            if key not in self._dirty:
                self._state.put(key, self._layout.restamp(value, state, epoch))
        self._live[start] = state
        if state == WindowState.FINAL:
            del self._live[start]
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
