"""One aggregate of many rows of a table, numbered from 0: what `tablerows.Cell` does to one value, done to columns of them.

The cells are the reference. Aggregates of fixed width are arrays merged by compiled loops; the others are lists of the
cells' own values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from streamproc.core.batch import I64
from streamproc.core.hash128 import U64, compiled
from streamproc.operators.growth import grown
from streamproc.operators.partials import PartialRows

__all__ = ["CellColumn", "Counts", "Extremes", "Listed", "Wholes"]

_ROWS_MIN = 64
_MASK = (1 << 64) - 1


class CellColumn(ABC):
    """Rows 0 to n - 1 of one aggregate; those that `room` makes are empty."""

    dtypes: ClassVar[tuple[str, ...] | None] = None
    """How its fixed fields lie in a row (`Cell.fixed`) as numpy spells them; None: its rows have tails, or are to be packed
    one by one."""
    row_bytes: ClassVar[int]
    """What a row takes in memory, about."""

    @abstractmethod
    def room(self, rows: int) -> None:
        """Rows 0 to ``rows`` - 1 are to exist."""

    @abstractmethod
    def select(self, ids: I64) -> None:
        """Row i is what row ``ids[i]`` was; there are no others."""

    @abstractmethod
    def merge(self, ids: I64, rows: PartialRows, at: int) -> None:
        """Row i of a partial, whose columns for this aggregate begin ``at``, goes to row ``ids[i]``."""

    @abstractmethod
    def put(self, row: int, value: Any) -> None:
        """The value that the cell has unpacked."""

    @abstractmethod
    def get(self, row: int) -> Any:
        """The value that the cell can pack."""

    def fields(self, ids: I64) -> list[NDArray[Any]]:
        """One array for each of ``dtypes``."""
        raise NotImplementedError


class _PlainMerging(Protocol):
    @property
    def empty(self) -> Any: ...

    def load(self, rows: PartialRows, at: int) -> list[Any]: ...

    def merge(self, mine: Any, theirs: Any) -> Any: ...


class Counts(CellColumn):
    """A count."""

    dtypes = (">i8",)
    row_bytes = 8

    def __init__(self) -> None:
        self._counts = np.zeros(_ROWS_MIN, np.int64)

    def room(self, rows: int) -> None:
        self._counts = grown(self._counts, rows)

    def select(self, ids: I64) -> None:
        self._counts = self._counts[ids]

    def merge(self, ids: I64, rows: PartialRows, at: int) -> None:
        _add(ids, rows.integers(at), self._counts)

    def put(self, row: int, value: int) -> None:
        self._counts[row] = value

    def get(self, row: int) -> int:
        return int(self._counts[row])

    def fields(self, ids: I64) -> list[NDArray[Any]]:
        return [self._counts[ids]]


class Wholes(CellColumn):
    """Count and exact sum of integers, in 128 bits."""

    dtypes = (">i8", ">i8", ">u8")
    row_bytes = 24

    def __init__(self) -> None:
        self._counts, self._high = np.zeros(_ROWS_MIN, np.int64), np.zeros(_ROWS_MIN, np.int64)
        self._low = np.zeros(_ROWS_MIN, np.uint64)

    def room(self, rows: int) -> None:
        self._counts, self._high = grown(self._counts, rows), grown(self._high, rows)
        self._low = grown(self._low, rows)

    def select(self, ids: I64) -> None:
        self._counts, self._high, self._low = self._counts[ids], self._high[ids], self._low[ids]

    def merge(self, ids: I64, rows: PartialRows, at: int) -> None:
        _add(ids, rows.integers(at), self._counts)
        _add_wide(ids, rows.integers(at + 1), rows.integers(at + 2).view(np.uint64), self._high, self._low)

    def put(self, row: int, value: tuple[int, int]) -> None:
        self._counts[row], total = value
        self._high[row], self._low[row] = total >> 64, total & _MASK

    def get(self, row: int) -> tuple[int, int]:
        return int(self._counts[row]), (int(self._high[row]) << 64) + int(self._low[row])

    def fields(self, ids: I64) -> list[NDArray[Any]]:
        return [self._counts[ids], self._high[ids], self._low[ids]]


class Extremes(CellColumn):
    """The least or the greatest value as an int64 that orders as the values do, and whether there is one."""

    dtypes = ("u1", ">i8")
    row_bytes = 9

    def __init__(self, greatest: bool) -> None:
        self._greatest = greatest
        self._seen, self._best = np.zeros(_ROWS_MIN, np.uint8), np.zeros(_ROWS_MIN, np.int64)

    def room(self, rows: int) -> None:
        self._seen, self._best = grown(self._seen, rows), grown(self._best, rows)

    def select(self, ids: I64) -> None:
        self._seen, self._best = self._seen[ids], self._best[ids]

    def merge(self, ids: I64, rows: PartialRows, at: int) -> None:
        _keep_better(ids, rows.integers(at), rows.integers(at + 1), self._greatest, self._seen, self._best)

    def put(self, row: int, value: int | None) -> None:
        self._seen[row], self._best[row] = value is not None, value or 0

    def get(self, row: int) -> int | None:
        return int(self._best[row]) if self._seen[row] else None

    def fields(self, ids: I64) -> list[NDArray[Any]]:
        return [self._seen[ids], self._best[ids]]


class Listed(CellColumn):
    """Values of a cell as they are."""

    row_bytes = 320
    """An exact sum of floats near 1, as an integer of some 1,100 bits in a tuple; texts come on top."""

    def __init__(self, cell: _PlainMerging) -> None:
        self._cell = cell
        self._values: list[Any] = []

    def room(self, rows: int) -> None:
        self._values += [self._cell.empty] * (rows - len(self._values))

    def select(self, ids: I64) -> None:
        self._values = [self._values[row] for row in ids.tolist()]

    def merge(self, ids: I64, rows: PartialRows, at: int) -> None:
        values, merge = self._values, self._cell.merge
        for row, theirs in zip(ids.tolist(), self._cell.load(rows, at), strict=True):
            values[row] = merge(values[row], theirs)

    def put(self, row: int, value: Any) -> None:
        self._values[row] = value

    def get(self, row: int) -> Any:
        return self._values[row]


@compiled
def _add(ids: I64, values: I64, into: I64) -> None:
    for i in range(len(ids)):
        into[ids[i]] += values[i]


@compiled
def _add_wide(ids: I64, highs: I64, lows: U64, high: I64, low: U64) -> None:
    """Add 128-bit integers in two's complement."""
    for i in range(len(ids)):
        row = ids[i]
        total = low[row] + lows[i]
        high[row] += highs[i] + (np.int64(1) if total < lows[i] else np.int64(0))
        low[row] = total


@compiled
def _keep_better(ids: I64, counts: I64, values: I64, greatest: bool, seen: NDArray[np.uint8], best: I64) -> None:
    """A value counts where its count is not 0."""
    for i in range(len(ids)):
        row = ids[i]
        if counts[i] == 0:
            continue
        if seen[row] == 0 or (values[i] > best[row] if greatest else values[i] < best[row]):
            best[row] = values[i]
        seen[row] = 1
