"""The first of the two steps: what one task gathers of one aggregate during an epoch, an entry a group, in arrays.

All of it is exact, so that neither the order of records nor where batches and epochs end can show in a result. Entry 0
belongs to nobody and stays empty: taking it ships an identity.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from streamproc.core.batch import I64
from streamproc.core.hash128 import U64, hash_series
from streamproc.operators.growth import grown
from streamproc.operators.kernels import (
    CARRY_EVERY,
    add_limbs,
    add_wide,
    carry_limbs,
    count_rows,
    insert_ids,
    keep_greatest,
    keep_least,
    limb_range,
    write_limbs,
)
from streamproc.operators.partials import Column, fixed_column, int64_column, texts_column
from streamproc.operators.plan import Agg

__all__ = ["Accumulator", "Distinct", "Entries", "Spans", "accumulator_of", "ordered_from", "span_column", "to_ordered"]

Spans = tuple[I64, I64]
_GROUPS_MIN = 64
_SIGN = np.int64(-(1 << 63))
_BELOW_SIGN = np.int64((1 << 63) - 1)


class Entries(Protocol):
    """One aggregate's entries. `room` is called before `add` whenever groups have been made."""

    def room(self, groups: int) -> None:
        """Entries 0 to ``groups`` are to exist."""

    def add(self, gids: I64, frame: pl.DataFrame) -> None:
        """Row i of ``frame`` goes to entry ``gids[i]``."""

    def row_bytes(self, gids: I64) -> I64:
        """Upper bound of what each of these entries takes on the wire."""

    def clear(self, groups: int) -> None:
        """Entries 0 to ``groups`` are empty again."""

    def size_bytes(self, groups: int) -> int: ...


class Accumulator(Entries, Protocol):
    """An accumulator of which an entry is one row."""

    def columns(self, gids: I64) -> list[Column]:
        """The entries ``gids`` in the wire's columns."""


def accumulator_of(agg: Agg, dtype: pl.DataType | None) -> Accumulator | Distinct:
    """The accumulator of a checked aggregate; ``dtype`` is its column's, None for `count()`."""
    if agg.column is None or dtype is None:
        return _RowCount()
    if agg.kind == "count":
        return _ValueCount(agg.column)
    if agg.kind == "count_distinct":
        return Distinct(agg.column)
    if agg.kind in ("sum", "mean"):
        return _FloatSum(agg.column) if dtype.is_float() else _WholeSum(agg.column, dtype == pl.UInt64)
    return (_TextExtreme if dtype == pl.String else _Extreme)(agg.column, agg.kind == "max")


class _RowCount:
    def __init__(self) -> None:
        self._counts = np.zeros(_GROUPS_MIN, np.int64)

    def room(self, groups: int) -> None:
        self._counts = grown(self._counts, groups + 1)

    def add(self, gids: I64, frame: pl.DataFrame) -> None:
        count_rows(gids, self._counts)

    def columns(self, gids: I64) -> list[Column]:
        return [int64_column(self._counts[gids])]

    def row_bytes(self, gids: I64) -> I64:
        return np.full(len(gids), 8)

    def clear(self, groups: int) -> None:
        self._counts[: groups + 1] = 0

    def size_bytes(self, groups: int) -> int:
        return 8 * groups


class _ValueCount(_RowCount):
    def __init__(self, column: str) -> None:
        super().__init__()
        self._column = column

    def add(self, gids: I64, frame: pl.DataFrame) -> None:
        # A column that only its hash is needed of is not in the frame.
        name = self._column if self._column in frame.columns else f"__hi:{self._column}"
        super().add(_valid(gids, frame.get_column(name))[0], frame)


class _WholeSum:
    """Count, and a sum in 128 bits: 2^64 values of any size fit."""

    def __init__(self, column: str, unsigned: bool) -> None:
        self._column, self._unsigned = column, unsigned
        self._counts, self._high = np.zeros(_GROUPS_MIN, np.int64), np.zeros(_GROUPS_MIN, np.int64)
        self._low = np.zeros(_GROUPS_MIN, np.uint64)

    def room(self, groups: int) -> None:
        self._counts, self._high = grown(self._counts, groups + 1), grown(self._high, groups + 1)
        self._low = grown(self._low, groups + 1)

    def add(self, gids: I64, frame: pl.DataFrame) -> None:
        gids, values = _valid(gids, frame.get_column(self._column))
        words = _array(values).view(np.int64) if self._unsigned else _array(values.cast(pl.Int64))
        count_rows(gids, self._counts)
        add_wide(gids, words, self._unsigned, self._high, self._low)

    def columns(self, gids: I64) -> list[Column]:
        low = self._low[gids].view(np.int64)
        return [int64_column(self._counts[gids]), int64_column(self._high[gids]), int64_column(low)]

    def row_bytes(self, gids: I64) -> I64:
        return np.full(len(gids), 24)

    def clear(self, groups: int) -> None:
        for array in (self._counts, self._high, self._low):
            array[: groups + 1] = 0

    def size_bytes(self, groups: int) -> int:
        return 24 * groups


class _FloatSum:
    """Count, flags of what has no digits, and an exact sum: words of 32 bits, those that some value has reached."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._counts, self._special = np.zeros(_GROUPS_MIN, np.int64), np.zeros(_GROUPS_MIN, np.int64)
        self._limbs = np.zeros((_GROUPS_MIN, 1), np.int64)
        self._base: int | None = None
        self._added = 0

    def room(self, groups: int) -> None:
        self._counts, self._special = grown(self._counts, groups + 1), grown(self._special, groups + 1)
        self._limbs = grown(self._limbs, groups + 1)

    def add(self, gids: I64, frame: pl.DataFrame) -> None:
        gids, values = _valid(gids, frame.get_column(self._column))
        bits = _array(values.cast(pl.Float64)).view(np.uint64)
        self._reach(*limb_range(bits))
        if self._added + len(bits) > CARRY_EVERY:
            carry_limbs(self._limbs)
            self._added = 0
        self._added += len(bits)
        count_rows(gids, self._counts)
        add_limbs(gids, bits, self._base or 0, self._limbs, self._special)

    def columns(self, gids: I64) -> list[Column]:
        words = np.zeros((len(gids), self._limbs.shape[1] + 1), np.uint32)
        write_limbs(self._limbs, gids, words)
        base = np.full(len(gids), self._base or 0)
        return [
            int64_column(self._counts[gids]),
            int64_column(self._special[gids]),
            int64_column(base),
            fixed_column(words.astype("<u4")),
        ]

    def row_bytes(self, gids: I64) -> I64:
        return np.full(len(gids), 28 + 4 * self._limbs.shape[1])

    def clear(self, groups: int) -> None:
        self._counts[: groups + 1] = 0
        self._special[: groups + 1] = 0
        self._limbs[: groups + 1] = 0
        self._added = 0

    def size_bytes(self, groups: int) -> int:
        return (16 + 8 * self._limbs.shape[1]) * groups

    def _reach(self, lowest: int, highest: int) -> None:
        """Have words ``lowest`` to ``highest``. The last takes less than 2^21 an addition, so it holds the carries too."""
        if highest < lowest:
            return
        width = self._limbs.shape[1]
        base = lowest if self._base is None else min(self._base, lowest)
        end = max(highest + 1, base if self._base is None else self._base + width)
        if base != self._base or end > base + width:
            wider = np.zeros((len(self._limbs), end - base), np.int64)
            if self._base is not None:
                wider[:, self._base - base : self._base - base + width] = self._limbs
            self._limbs, self._base = wider, base


class _Extreme:
    """Count, and the least or greatest value as an int64 that orders as the values do."""

    def __init__(self, column: str, greatest: bool) -> None:
        self._column, self._keep = column, keep_greatest if greatest else keep_least
        self._counts, self._best = np.zeros(_GROUPS_MIN, np.int64), np.zeros(_GROUPS_MIN, np.int64)

    def room(self, groups: int) -> None:
        self._counts, self._best = grown(self._counts, groups + 1), grown(self._best, groups + 1)

    def add(self, gids: I64, frame: pl.DataFrame) -> None:
        gids, values = _valid(gids, frame.get_column(self._column))
        self._keep(gids, to_ordered(values), self._counts, self._best)

    def columns(self, gids: I64) -> list[Column]:
        return [int64_column(self._counts[gids]), int64_column(self._best[gids])]

    def row_bytes(self, gids: I64) -> I64:
        return np.full(len(gids), 16)

    def clear(self, groups: int) -> None:
        self._counts[: groups + 1] = 0
        self._best[: groups + 1] = 0

    def size_bytes(self, groups: int) -> int:
        return 16 * groups


class _TextExtreme:
    def __init__(self, column: str, greatest: bool) -> None:
        self._column, self._greatest = column, greatest
        self._best: dict[int, str] = {}

    def room(self, groups: int) -> None:
        pass

    def add(self, gids: I64, frame: pl.DataFrame) -> None:
        gids, values = _valid(gids, frame.get_column(self._column))
        text = pl.col("text")
        found = (
            pl.DataFrame({"gid": gids, "text": values})
            .group_by("gid")
            .agg(text.max() if self._greatest else text.min())
        )
        for gid, value in found.iter_rows():
            held = self._best.get(gid)
            if held is None or (value > held if self._greatest else value < held):
                self._best[gid] = value

    def columns(self, gids: I64) -> list[Column]:
        found = [self._best.get(gid) for gid in gids.tolist()]
        seen = np.array([value is not None for value in found], np.int64)
        return [int64_column(seen), texts_column([(value or "").encode() for value in found])]

    def row_bytes(self, gids: I64) -> I64:
        return np.array([12 + 4 * len(self._best.get(gid, "")) for gid in gids.tolist()], np.int64)

    def clear(self, groups: int) -> None:
        self._best.clear()

    def size_bytes(self, groups: int) -> int:
        return sum(100 + len(value) for value in self._best.values())


class Distinct:
    """The 128-bit hashes of each group's values, every one once an epoch. Its wire column is made from spans, since one
    group's hashes may not fit one payload."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._slots = np.zeros(_GROUPS_MIN, np.int64)
        self._entries = np.zeros((_GROUPS_MIN, 3), np.uint64)
        self._used = 0

    def room(self, groups: int) -> None:
        pass

    def add(self, gids: I64, frame: pl.DataFrame) -> None:
        hi, lo, keep = _hashes(frame, self._column)
        if keep is not None:
            gids, hi, lo = gids[keep], hi[keep], lo[keep]
        self._make_room(self._used + len(gids))
        self._used = insert_ids(self._slots, self._entries, self._used, gids, hi, lo)

    def row_bytes(self, gids: I64) -> I64:
        return np.full(len(gids), 4)

    def sorted(self, groups: int) -> tuple[Spans, U64]:
        """(start, stop) of every group's hashes, 0 to ``groups``, and the hashes (rows of hi, lo) in that order."""
        entries = self._entries[1 : self._used + 1]
        owners = entries[:, 0].view(np.int64)
        stops = np.cumsum(np.bincount(owners, minlength=groups + 1), dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
        return (starts, stops), entries[np.argsort(owners, kind="stable"), 1:]

    def clear(self, groups: int) -> None:
        self._slots.fill(0)
        self._used = 0

    def size_bytes(self, groups: int) -> int:
        return 40 * self._used

    def _make_room(self, entries: int) -> None:
        if 2 * entries <= len(self._slots):
            return
        size = 1 << (2 * entries - 1).bit_length()
        old = self._entries[1 : self._used + 1]
        self._slots, self._entries = np.zeros(size, np.int64), np.zeros((size // 2 + 1, 3), np.uint64)
        columns = [np.ascontiguousarray(old[:, at]) for at in range(3)]
        insert_ids(self._slots, self._entries, 0, columns[0].view(np.int64), columns[1], columns[2])


def span_column(spans: Spans, hashes: U64) -> Column:
    """Each row's hashes, hi then lo, little-endian."""
    data = hashes.astype("<u8").tobytes()
    return texts_column([data[16 * a : 16 * b] for a, b in zip(spans[0].tolist(), spans[1].tolist(), strict=True)])


def to_ordered(values: pl.Series) -> I64:
    """Numbers, booleans, dates and times (no nulls) as int64 that compare as they do: floats by IEEE 754's total order
    with one NaN, above all; uint64 moved down by 2^63."""
    if values.dtype.is_float():
        floats = _array(values.cast(pl.Float64))
        bits = np.where(np.isnan(floats), np.nan, floats).view(np.int64)
        return np.where(bits < 0, bits ^ _BELOW_SIGN, bits)
    if values.dtype == pl.UInt64:
        return _array(values).view(np.int64) ^ _SIGN
    return _array(values.to_physical().cast(pl.Int64))


def ordered_from(value: int, dtype: pl.DataType) -> int | float | bool:
    """The inverse of `to_ordered` for one value; dates and times stay the integer that Polars keeps."""
    if dtype.is_float():
        bits = value if value >= 0 else value ^ ((1 << 63) - 1)
        return float(np.int64(bits).view(np.float64))
    if dtype == pl.UInt64:
        return value + (1 << 63)
    return bool(value) if dtype == pl.Boolean else value


def _hashes(frame: pl.DataFrame, column: str) -> tuple[U64, U64, NDArray[np.bool_] | None]:
    """Hashes of a column, the decoder's if it made them, and which rows have a value (None: all)."""
    name = f"__hi:{column}"
    source = frame.get_column(name if name in frame.columns else column)
    if source.name == name:
        hi, lo = _array(source.fill_null(0)), _array(frame.get_column(f"__lo:{column}").fill_null(0))
    else:
        hi, lo = hash_series(source)
    return hi, lo, source.is_not_null().to_numpy() if source.null_count() else None


def _valid(gids: I64, values: pl.Series) -> tuple[I64, pl.Series]:
    """Only the rows that have a value."""
    if not values.null_count():
        return gids, values
    return gids[values.is_not_null().to_numpy()], values.drop_nulls()


def _array(values: pl.Series) -> NDArray[Any]:
    """As one writable array: kernels are compiled for no other."""
    return values.to_numpy(writable=True)
