"""Rows of a windowed table as they stand in the store, in the changelog and before people's eyes.

Keys (one table of one task)::

    window start, 8 bytes big-endian, sign bit flipped | group key                    a row
    window start | 0xFF | group key | aggregate u8 | epoch u64 | part u16             a chunk of distinct hashes

A group key is a msgpack array: it never begins with 0xFF and tells its own end, so rows and chunks are told apart by
their ninth byte, all rows of a window come before its chunks, and dropping a window is one range.

Values of rows, big-endian, version 1::

    version u8 | window state u8 | epoch of the last change u64 | each aggregate's fixed fields | their tails

The row is enough to go on merging: it holds accumulators, not results.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import polars as pl

from streamproc.core.errors import UserError, invariant
from streamproc.core.types import END_OF_TIME, NO_WATERMARK
from streamproc.eventtime.windows import WindowState, window_end
from streamproc.operators.accumulators import ordered_from
from streamproc.operators.aggregates import check_plan, result_columns
from streamproc.operators.cellcolumns import CellColumn, Counts, Extremes, Listed, Wholes
from streamproc.operators.expressions import select
from streamproc.operators.groupkeys import decode_group_key, encode_group_key, group_key_columns, physical_of
from streamproc.operators.kernels import INFINITE, NAN, NEGATIVE_INFINITE
from streamproc.operators.partials import PartialRows
from streamproc.operators.plan import Agg, Filter, TablePlan

__all__ = [
    "CHUNK",
    "EPOCH",
    "STATE",
    "VERSION",
    "VISIBLE",
    "Cell",
    "DistinctCell",
    "Row",
    "RowLayout",
    "TableRows",
    "is_row",
    "window_prefix",
    "window_range",
    "window_start_of",
]

VERSION: Final = 1
CHUNK: Final = b"\xff"
STATE: Final = "__state"
EPOCH: Final = "__epoch"
VISIBLE: Final = "__visible"
_MOMENT = pl.Datetime("ms", "UTC")
_HEAD = struct.Struct(">BBQ")
_STATES: Final = tuple(WindowState)
"""By their number: an enum's own look-up costs more than the rest of a row's head."""
_UNIT: Final = 1 << 1074
"""Float sums count in the least float64 there is, 2^-1074."""


def window_prefix(window_start: int) -> bytes:
    """First bytes of all keys of a window; they sort as the windows do."""
    return (window_start - NO_WATERMARK).to_bytes(8, "big")


def window_range(window_start: int) -> tuple[bytes, bytes]:
    """[start, stop) of all keys of a window, rows and chunks. (No window begins at the last moment there is.)"""
    return window_prefix(window_start), window_prefix(window_start + 1)


def window_start_of(key: bytes) -> int:
    return int.from_bytes(key[:8], "big") + NO_WATERMARK


def is_row(key: bytes) -> bool:
    """Whether ``key`` is of a row, not of a chunk of hashes."""
    return key[8:9] != CHUNK


class Cell:
    """How one aggregate is merged, stored and read. The value in between is plain Python; this one is a count."""

    width: ClassVar[int] = 1
    """How many columns it has on the wire."""
    fixed: ClassVar[str] = "q"
    """Its fixed fields in the row, as `struct` spells them."""
    empty: ClassVar[Any] = 0
    """What nothing has been merged into."""

    def load(self, rows: PartialRows, at: int) -> list[Any]:
        """A value for each row of a partial, from its columns ``at`` on."""
        counts: list[Any] = rows.integers(at).tolist()
        return counts

    def merge(self, mine: Any, theirs: Any) -> Any:
        return mine + theirs

    def pack(self, value: Any) -> tuple[tuple[Any, ...], bytes]:
        """Fixed fields and tail."""
        return (value,), b""

    def unpack(self, fields: Iterator[Any], tail: _Tail) -> Any:
        return next(fields)

    def result(self, value: Any) -> Any:
        """What a user sees (dates and times as integers)."""
        return value

    def column(self) -> CellColumn:
        """Many of it, merged at once."""
        return Counts()


class _Whole(Cell):
    """Count and exact sum of integers."""

    width, fixed, empty = 3, "q16s", (0, 0)

    def __init__(self, mean: bool) -> None:
        self._mean = mean

    def load(self, rows: PartialRows, at: int) -> list[Any]:
        counts, highs, lows = (rows.integers(at + i).tolist() for i in range(3))
        return [(n, (high << 64) + (low % (1 << 64))) for n, high, low in zip(counts, highs, lows, strict=True)]

    def merge(self, mine: Any, theirs: Any) -> Any:
        return mine[0] + theirs[0], mine[1] + theirs[1]

    def pack(self, value: Any) -> tuple[tuple[Any, ...], bytes]:
        return (value[0], value[1].to_bytes(16, "big", signed=True)), b""

    def unpack(self, fields: Iterator[Any], tail: _Tail) -> Any:
        return next(fields), int.from_bytes(next(fields), "big", signed=True)

    def result(self, value: Any) -> Any:
        count, total = value
        if not count:
            return None
        return total / count if self._mean else total

    def column(self) -> CellColumn:
        return Wholes()


class _Float(Cell):
    """Count, flags, and the exact sum in units of 2^-1074."""

    width, fixed, empty = 4, "qBHH", (0, 0, 0)

    def __init__(self, mean: bool) -> None:
        self._mean = mean

    def load(self, rows: PartialRows, at: int) -> list[Any]:
        counts, special, bases = (rows.integers(at + i).tolist() for i in range(3))
        totals = [int.from_bytes(words, "little", signed=True) for words in rows.blobs(at + 3)]
        return [(n, s, t << 32 * b) for n, s, b, t in zip(counts, special, bases, totals, strict=True)]

    def merge(self, mine: Any, theirs: Any) -> Any:
        return mine[0] + theirs[0], mine[1] | theirs[1], mine[2] + theirs[2]

    def pack(self, value: Any) -> tuple[tuple[Any, ...], bytes]:
        count, special, total = value
        # Without its trailing zeros a sum has one spelling, however it came about.
        shift = (total & -total).bit_length() - 1 if total else 0
        digits = total >> shift
        tail = digits.to_bytes(digits.bit_length() // 8 + 1, "big", signed=True)
        return (count, special, shift, len(tail)), tail

    def unpack(self, fields: Iterator[Any], tail: _Tail) -> Any:
        count, special, shift, length = next(fields), next(fields), next(fields), next(fields)
        return count, special, int.from_bytes(tail.take(length), "big", signed=True) << shift

    def result(self, value: Any) -> Any:
        count, special, total = value
        if not count:
            return None
        if special:
            if special & NAN or special == INFINITE | NEGATIVE_INFINITE:
                return float("nan")
            return float("inf") if special == INFINITE else float("-inf")
        try:
            # Division of integers rounds correctly, once.
            return float(total / (_UNIT * count if self._mean else _UNIT))
        except OverflowError:
            return float("inf") if total > 0 else float("-inf")

    def column(self) -> CellColumn:
        return Listed(self)


class _Extreme(Cell):
    width, fixed, empty = 2, "Bq", None

    def __init__(self, dtype: pl.DataType, greatest: bool) -> None:
        self._dtype, self._greatest, self._better = dtype, greatest, max if greatest else min

    def load(self, rows: PartialRows, at: int) -> list[Any]:
        counts, best = rows.integers(at).tolist(), rows.integers(at + 1).tolist()
        return [value if n else None for n, value in zip(counts, best, strict=True)]

    def merge(self, mine: Any, theirs: Any) -> Any:
        if mine is None or theirs is None:
            return theirs if mine is None else mine
        return self._better(mine, theirs)

    def pack(self, value: Any) -> tuple[tuple[Any, ...], bytes]:
        return (value is not None, value or 0), b""

    def unpack(self, fields: Iterator[Any], tail: _Tail) -> Any:
        seen, value = next(fields), next(fields)
        return value if seen else None

    def result(self, value: Any) -> Any:
        return None if value is None else ordered_from(value, self._dtype)

    def column(self) -> CellColumn:
        return Extremes(self._greatest)


class _TextExtreme(_Extreme):
    fixed = "BI"

    def load(self, rows: PartialRows, at: int) -> list[Any]:
        seen = rows.integers(at).tolist()
        return [text.decode() if n else None for n, text in zip(seen, rows.blobs(at + 1), strict=True)]

    def pack(self, value: Any) -> tuple[tuple[Any, ...], bytes]:
        tail = (value or "").encode()
        return (value is not None, len(tail)), tail

    def unpack(self, fields: Iterator[Any], tail: _Tail) -> Any:
        seen, text = next(fields), tail.take(next(fields)).decode()
        return text if seen else None

    def result(self, value: Any) -> Any:
        return value

    def column(self) -> CellColumn:
        return Listed(self)


class DistinctCell(Cell):
    """The row holds how many; a partial brings hashes, and `windowtable` says how many of them are new."""

    def load(self, rows: PartialRows, at: int) -> list[Any]:
        return rows.blobs(at)


def cell_of(agg: Agg, dtype: pl.DataType | None) -> Cell:
    if agg.kind == "count_distinct":
        return DistinctCell()
    if agg.kind == "count" or dtype is None:
        return Cell()
    if agg.kind in ("sum", "mean"):
        return (_Float if dtype.is_float() else _Whole)(agg.kind == "mean")
    return (_TextExtreme if dtype == pl.String else _Extreme)(dtype, agg.kind == "max")


class _Tail:
    """What is left of a row's variable bytes."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at

    def take(self, length: int) -> bytes:
        start = self._at
        self._at += length
        return self._data[start : self._at]


@dataclass(slots=True)
class Row:
    """One row, decoded: accumulators in the plan's order."""

    state: WindowState
    epoch: int
    values: list[Any]


class RowLayout:
    """Rows of one plan to bytes and back."""

    def __init__(self, plan: TablePlan) -> None:
        self.cells = [cell_of(agg, plan.inputs.get(agg.column or "")) for agg in plan.aggs.values()]
        self._struct = struct.Struct(_HEAD.format + "".join(cell.fixed for cell in self.cells))
        self.texts = any(isinstance(cell, _TextExtreme) for cell in self.cells)
        """Whether a row may hold a text."""

    def encode(self, row: Row) -> bytes:
        fields: list[Any] = [VERSION, row.state, row.epoch]
        tails = []
        for cell, value in zip(self.cells, row.values, strict=True):
            fixed, tail = cell.pack(value)
            fields += fixed
            tails.append(tail)
        return self._struct.pack(*fields) + b"".join(tails)

    def decode(self, value: bytes) -> Row:
        fields = iter(self._struct.unpack_from(value))
        version, state, epoch = next(fields), next(fields), next(fields)
        if version != VERSION:
            invariant(False, f"A row has version {version}, not {VERSION}.")
        tail = _Tail(value, self._struct.size)
        return Row(_STATES[state], epoch, [cell.unpack(fields, tail) for cell in self.cells])

    @staticmethod
    def restamp(value: bytes, state: WindowState, epoch: int) -> bytes:
        """The same row in another state, changed by ``epoch``."""
        return _HEAD.pack(VERSION, state, epoch) + value[_HEAD.size :]

    @staticmethod
    def stamp(value: bytes) -> tuple[WindowState, int]:
        """State and epoch of a row."""
        _, state, epoch = _HEAD.unpack_from(value)
        return _STATES[state], epoch


class TableRows:
    """Rows as results: what sinks write and people see. Needs the plan only, no state; for all who read the table."""

    def __init__(self, plan: TablePlan) -> None:
        check_plan(plan)
        self.plan, self.layout = plan, RowLayout(plan)
        self._aggregates = result_columns(plan)
        self._columns = self._derived()

    def shape(self) -> tuple[dict[str, pl.DataType], dict[str, pl.DataType]]:
        """Group keys, and aggregates with derived columns, in order, with their types."""
        return dict(self.plan.keys), dict(self._columns)

    def row_key(self, window_start: int, keys: Iterable[object]) -> bytes:
        """Key of the row of this window and these group key values."""
        return window_prefix(window_start) + encode_group_key(keys, self.plan.keys)

    def split_key(self, key: bytes) -> tuple[int, tuple[Any, ...]]:
        """Window start and group key values of a row's key."""
        return window_start_of(key), decode_group_key(key[8:], self.plan.keys)

    def results(self, rows: Iterable[tuple[bytes, bytes]]) -> pl.DataFrame:
        """Rows as users know them: keys, ``window_start``, ``window_end``, aggregates and derived columns, then `STATE`
        (a `WindowState`), `EPOCH` of the last change and `VISIBLE` (false: a filter after the aggregation hides it).

        Chunks of hashes are skipped. Types are the same without rows. An integer sum beyond int64 is a `UserError` that
        names its key.
        """
        keys, decoded = [], []
        for key, value in rows:
            if is_row(key):
                keys.append(key)
                decoded.append(self.layout.decode(value))
        return self._post(self._frame(keys, decoded))

    def _frame(self, keys: list[bytes], rows: list[Row]) -> pl.DataFrame:
        starts = [window_start_of(key) for key in keys]
        ends = [window_end(start, self.plan.window) for start in starts]
        columns = group_key_columns([key[8:] for key in keys], self.plan.keys)
        columns.append(pl.Series("window_start", starts, dtype=pl.Int64).cast(_MOMENT))
        columns.append(pl.Series("window_end", ends, dtype=pl.Int64).cast(_MOMENT))
        for at, (name, dtype) in enumerate(self._aggregates.items()):
            cell = self.layout.cells[at]
            values = [cell.result(row.values[at]) for row in rows]
            if isinstance(cell, _Whole) and dtype == pl.Int64:
                self._check_sums(name, keys, values)
            columns.append(pl.Series(name, values, dtype=physical_of(dtype)).cast(dtype))
        columns.append(pl.Series(STATE, [int(row.state) for row in rows], dtype=pl.UInt8))
        columns.append(pl.Series(EPOCH, [row.epoch for row in rows], dtype=pl.Int64))
        return pl.DataFrame(columns)

    def _check_sums(self, name: str, keys: list[bytes], totals: list[int | None]) -> None:
        for key, total in zip(keys, totals, strict=True):
            if total is not None and not NO_WATERMARK <= total <= END_OF_TIME:
                start, values = self.split_key(key)
                raise UserError(
                    f"Table {self.plan.name!r}: {name} of {values!r} in the window from {start} ms is {total}, more "
                    "than an int64 holds.",
                    remedy="Sum the column as Float64: cast it in .with_columns() before the aggregation.",
                    where=self.plan.where,
                )

    def _post(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The plan's steps after the aggregation; a filter hides, it does not drop: a row may come back."""
        visible = pl.Series(VISIBLE, np.ones(len(frame), np.bool_))
        for step in self.plan.post:
            if isinstance(step, Filter):
                (kept,) = select(frame, [step.predicate])
                visible = visible & kept.fill_null(False)
            else:
                values = select(frame, list(step.columns.values()))
                frame = frame.with_columns(value.alias(name) for name, value in zip(step.columns, values, strict=True))
        shown = [column for column in frame.get_columns() if column.name not in (STATE, EPOCH)]
        return pl.DataFrame([*shown, frame.get_column(STATE), frame.get_column(EPOCH), visible.rename(VISIBLE)])

    def _derived(self) -> dict[str, pl.DataType]:
        schema = self._post(self._frame([], [])).schema
        hidden = {*self.plan.keys, "window_start", "window_end", STATE, EPOCH, VISIBLE}
        return {name: dtype for name, dtype in schema.items() if name not in hidden}
