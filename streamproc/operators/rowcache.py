"""Rows of a table in its owner's memory, decoded, as columns: what changes in one epoch often does in the next.

    number ──▶ ids of keys, new ones among them ──▶ the table loads those from the state, merges into ``columns``
    changed ─▶ the epoch's rows, keys in order, encoded ──▶ the state
    keep ────▶ committed rows stay while their windows can change, within a bound of bytes

A key's bytes are compared, never its hash alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamproc.avro.recordbatch import Spans
from streamproc.core.batch import I64, U8
from streamproc.core.hash128 import U64, compiled, hash_bytes
from streamproc.eventtime.windows import WindowState
from streamproc.operators.bytecolumns import byte_order, cut, gather
from streamproc.operators.cellcolumns import CellColumn
from streamproc.operators.growth import grown
from streamproc.operators.tablerows import VERSION, Row, RowLayout

__all__ = ["RowCache"]

_ROWS_MIN = 64
_PREFIX_BYTES = 8
_ROW_BYTES = 64
"""Of a row beside its key and its values: places in arrays, at most half full."""
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)


class RowCache:
    """Rows numbered from 0 in the order in which their keys came."""

    def __init__(self, layout: RowLayout) -> None:
        self._layout = layout
        self.clear()
        dtypes = [column.dtypes for column in self.columns]
        self._packed = None if None in dtypes else np.dtype(
            [("version", "u1"), ("state", "u1"), ("epoch", ">u8")]
            + [(f"{cell}.{at}", kind) for cell, kinds in enumerate(dtypes) for at, kind in enumerate(kinds or ())]
        )  # fmt: skip
        """How rows are stored, where all are of one width."""
        self._row_bytes = _ROW_BYTES + sum(column.row_bytes for column in self.columns)

    def clear(self) -> None:
        """Forget all rows."""
        self._swept = _ROWS_MIN
        """How many rows the last sweep left, or fewer than are worth one."""
        self.columns: list[CellColumn] = [cell.column() for cell in self._layout.cells]
        self.changed_bytes = 0
        """What the rows that the open epoch has changed take in memory, but for their texts."""
        self._rows = 0
        self._slots = np.zeros(2 * _ROWS_MIN, np.int64)
        self._hashes = np.zeros(_ROWS_MIN, np.uint64)
        self._heap, self._heap_used = np.zeros(_ROWS_MIN, np.uint8), 0
        self._start, self._length = np.zeros(_ROWS_MIN, np.int64), np.zeros(_ROWS_MIN, np.int64)
        self._changed = np.zeros(_ROWS_MIN, np.bool_)

    def __len__(self) -> int:
        return self._rows

    @property
    def size_bytes(self) -> int:
        return self._heap_used + self._row_bytes * self._rows

    def number(self, starts: I64, keys: Spans) -> I64:
        """The row of each (window start, group key); rows from the former length on are new and empty. All of them are
        about to change."""
        self._make_room(self._rows + len(starts), self._heap_used + _PREFIX_BYTES * len(starts) + len(keys.buffer))
        ids = np.empty(len(starts), np.int64)
        self._rows, self._heap_used, rows, key_bytes = _number(
            self._slots, self._hashes, self._heap, self._start, self._length, self._rows, self._heap_used, starts,
            keys.buffer, keys.start, keys.length, self._changed, ids,
        )  # fmt: skip
        self.changed_bytes += key_bytes + self._row_bytes * rows
        for column in self.columns:
            column.room(self._rows)
        return ids

    def keys(self, ids: I64) -> list[bytes]:
        """Keys as the state knows them."""
        return cut(self._keys(ids))

    def load(self, row: int, value: bytes) -> None:
        """A new row is there already: this is what the state has."""
        for column, cell in zip(self.columns, self._layout.decode(value).values, strict=True):
            column.put(row, cell)

    def changed(self) -> I64:
        """The rows that the open epoch has changed, in the order of their keys."""
        ids = np.flatnonzero(self._changed[: self._rows])
        ordered: I64 = ids[byte_order(self._keys(ids))]
        return ordered

    def changed_by_window(self) -> dict[int, I64]:
        """The same rows by their windows' starts, in any order. One pass: an epoch of a backlog has thousands of windows."""
        ids = np.flatnonzero(self._changed[: self._rows])
        starts = self.window_starts(ids)
        order = np.argsort(starts, kind="stable")
        found, firsts = np.unique(starts[order], return_index=True)
        return dict(zip(found.tolist(), np.split(ids[order], firsts[1:]), strict=False))

    def window_starts(self, ids: I64) -> I64:
        """Of each row."""
        heads = self._heap[self._start[ids][:, None] + np.arange(_PREFIX_BYTES)]
        starts: I64 = (heads.view(">u8").ravel().astype(np.uint64) ^ np.uint64(1 << 63)).view(np.int64)
        return starts

    def encode(self, ids: I64, states: NDArray[np.uint8], epoch: int) -> list[bytes]:
        """The rows as they are stored, changed last by ``epoch``; ``states`` are `WindowState`s."""
        if self._packed is None:
            rows = zip(ids.tolist(), states.tolist(), strict=True)
            return [self._layout.encode(Row(WindowState(state), epoch, self._values(row))) for row, state in rows]
        packed = np.empty(len(ids), self._packed)
        packed["version"], packed["state"], packed["epoch"] = VERSION, states, epoch
        for cell, column in enumerate(self.columns):
            for at, field in enumerate(column.fields(ids)):
                packed[f"{cell}.{at}"] = field
        values: list[bytes] = packed.view(f"V{self._packed.itemsize}").tolist()
        return values

    def keep(self, bytes_max: int, windows: Collection[int]) -> bool:
        """The epoch's rows are what the state has now. Those of other ``windows`` are let go when the rows have become
        twice as many as the last time, or too many. All are, and False is returned, if they are still too many; so are
        rows with texts, whose size nobody knows."""
        self._changed[: self._rows] = False
        self.changed_bytes = 0
        if self._rows > 2 * self._swept or self.size_bytes > bytes_max:
            self._sweep(windows)
        kept = self.size_bytes <= bytes_max and not self._layout.texts
        if not kept:
            self.clear()
        return kept

    def _sweep(self, windows: Collection[int]) -> None:
        """Let go of the rows of other windows; no row is changed."""
        ids = np.arange(self._rows)
        ids = ids[np.isin(self.window_starts(ids), np.fromiter(windows, np.int64, len(windows)))]
        if len(ids) < self._rows:
            starts, keys, columns = self.window_starts(ids), self._keys(ids), self.columns
            for column in columns:
                column.select(ids)
            self.clear()
            self.number(starts, Spans(keys.buffer, keys.start + _PREFIX_BYTES, keys.length - _PREFIX_BYTES))
            self.columns, self.changed_bytes = columns, 0
            self._changed[: self._rows] = False
        self._swept = max(self._rows, _ROWS_MIN)

    def _values(self, row: int) -> list[Any]:
        return [column.get(row) for column in self.columns]

    def _keys(self, ids: I64) -> Spans:
        return gather(Spans(self._heap, self._start, self._length), ids)

    def _make_room(self, rows: int, heap: int) -> None:
        self._heap = grown(self._heap, heap)
        if rows > len(self._hashes):
            size = 1 << (rows - 1).bit_length()
            self._hashes, self._changed = grown(self._hashes, size), grown(self._changed, size)
            self._start, self._length = grown(self._start, size), grown(self._length, size)
            self._slots = np.zeros(2 * size, np.int64)
            _place(self._slots, self._hashes, self._rows)


@compiled
def _place(slots: I64, hashes: U64, rows: int) -> None:
    """Put rows 0 to ``rows`` - 1 into empty ``slots``."""
    mask = np.uint64(len(slots) - 1)
    for row in range(rows):
        at = hashes[row] & mask
        while slots[at] != 0:
            at = (at + _ONE) & mask
        slots[at] = row + 1


@compiled
def _number(
    slots: I64, hashes: U64, heap: U8, start: I64, length: I64, rows: int, used: int, window_starts: I64, keys: U8,
    key_start: I64, key_length: I64, changed: NDArray[np.bool_], ids: I64,
) -> Any:  # fmt: skip
    """Find (window start, key) pairs among ``rows`` rows, whose keys lie in ``heap``, and make rows of new ones; marks all
    as ``changed``. ``slots`` is a power of two, twice as long as rows can become, 0 = free, else row + 1.

    Returns how many rows and how many bytes of ``heap`` there are now, and of those that were not changed before how many
    they are and the bytes of their keys.
    """
    mask = np.uint64(len(slots) - 1)
    fresh, fresh_bytes = 0, 0
    for i in range(len(ids)):
        from_, n = key_start[i], key_length[i]
        prefix = np.uint64(window_starts[i]) ^ (_ONE << np.uint64(63))
        _, low = hash_bytes(keys, from_, n)
        wanted = low ^ _mixed(prefix)
        at = wanted & mask
        row = -1
        while slots[at] != 0:
            held = slots[at] - 1
            if hashes[held] == wanted and _same(heap, start[held], length[held], prefix, keys, from_, n):
                row = held
                break
            at = (at + _ONE) & mask
        if row < 0:
            row = rows
            rows += 1
            slots[at], hashes[row] = row + 1, wanted
            start[row], length[row] = used, 8 + n
            for byte in range(8):
                heap[used + byte] = np.uint8((prefix >> np.uint64(8 * (7 - byte))) & np.uint64(0xFF))
            for byte in range(n):
                heap[used + 8 + byte] = keys[from_ + byte]
            used += 8 + n
        if not changed[row]:
            changed[row] = True
            fresh += 1
            fresh_bytes += length[row]
        ids[i] = row
    return rows, used, fresh, fresh_bytes


@compiled
def _mixed(prefix: Any) -> Any:
    """A window start's part of a row's hash. Starts are multiples of the window's size, whose low bits, which choose the
    slot, may all be 0: they are taken from above."""
    spread = prefix * _SPREAD
    return spread ^ (spread >> np.uint64(32))


@compiled
def _same(heap: U8, start: int, length: int, prefix: Any, keys: U8, from_: int, n: int) -> bool:
    """Whether the key at ``start`` is ``prefix``, big-endian, and the ``n`` bytes at ``from_`` of ``keys``."""
    same = length == 8 + n
    at = 0
    while same and at < length:
        if at < 8:
            same = heap[start + at] == np.uint8((prefix >> np.uint64(8 * (7 - at))) & np.uint64(0xFF))
        else:
            same = heap[start + at] == keys[from_ + at - 8]
        at += 1
    return same
