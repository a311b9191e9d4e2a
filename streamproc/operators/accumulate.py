"""The task's side of a two-step aggregation: group an epoch's records, gather partials of them, ship them to owners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import polars as pl

from streamproc.avro.recordbatch import Spans as KeySpans
from streamproc.core.batch import I64
from streamproc.core.hash128 import U64
from streamproc.core.limits import INTERNAL_BATCH_BYTES_MAX
from streamproc.eventtime.spec import Tumbling
from streamproc.operators.accumulators import Accumulator, Distinct, Spans, accumulator_of, span_column
from streamproc.operators.aggregates import check_plan
from streamproc.operators.contract import Partial, PartialHeader
from streamproc.operators.groupkeys import encode_group_keys
from streamproc.operators.groups import GroupIndex
from streamproc.operators.kernels import partitions_of
from streamproc.operators.partials import FORMAT, Column, encode_partial, int64_column, spans_column
from streamproc.operators.plan import Agg, TablePlan

__all__ = ["PartialAggregator", "example_plan", "example_rows"]

_ROWS_BYTES_MAX: Final = INTERNAL_BATCH_BYTES_MAX - 8 * 1024
"""Rows of one payload: what its head, its columns' heads and the record batch take is left free."""
_PIECE_IDS_MAX: Final = INTERNAL_BATCH_BYTES_MAX // 2 // 16
"""Hashes of one row of a payload, over all its columns; a group with more becomes several rows."""
_EXAMPLE_ROWS: Final = 200


class _Rows(NamedTuple):
    """What goes to one destination, a row each: whose key, whose values (0: none, the row carries on a group's hashes),
    which hashes of each distinct column, and how much it is."""

    owners: I64
    values: I64
    spans: list[Spans]
    sizes: I64

    def part(self, start: int, stop: int) -> _Rows:
        cut = slice(start, stop)
        return _Rows(self.owners[cut], self.values[cut], [(a[cut], b[cut]) for a, b in self.spans], self.sizes[cut])


class PartialAggregator:
    """Partial aggregates of one table in one task, an epoch at a time.

    `add` is called for every batch that reached the table, `drain` once at the end of an epoch: it hands out everything
    and begins anew. An epoch that does not commit ends with `drop`.
    """

    def __init__(self, plan: TablePlan) -> None:
        check_plan(plan)
        self._plan = plan
        self._groups = GroupIndex(plan.keys)
        self._accumulators = [accumulator_of(agg, plan.inputs.get(agg.column or "")) for agg in plan.aggs.values()]
        self._shipped: tuple[int, bool] | None = None

    @property
    def size_bytes(self) -> int:
        """What is gathered and not yet shipped."""
        groups = len(self._groups)
        return self._groups.size_bytes + sum(one.size_bytes(groups) for one in self._accumulators) if groups else 0

    def add(self, frame: pl.DataFrame, window_start: I64) -> None:
        """Gather records: ``frame`` holds the group keys and the aggregates' columns (or ``__hi:NAME`` and
        ``__lo:NAME`` for one that is only counted or counted distinct); ``window_start`` has each row's window."""
        if not len(frame):
            return
        gids = self._groups.of(frame, window_start)
        for accumulator in self._accumulators:
            accumulator.room(len(self._groups))
            accumulator.add(gids, frame)

    def drain(self, source: int, sources: int, epoch: int, watermark: int, idle: bool) -> list[Partial]:
        """What this epoch ships, from the task ``source`` of ``sources``: a `Partial` for every destination that has
        rows, and for all destinations if watermark or idle flag changed since the last drain (or none is known)."""
        changed = (watermark, idle) != self._shipped
        self._shipped = (watermark, idle)
        head = PartialHeader(FORMAT, self._plan.name, source, sources, epoch, 0, 1, watermark, idle)
        shipped = list(self._ship(head, changed)) if changed or len(self._groups) else []
        self._clear()
        return shipped

    def drop(self) -> None:
        """Forget the epoch. What was shipped last is not known to have arrived, so the next drain tells everybody."""
        self._shipped = None
        self._clear()

    def _clear(self) -> None:
        for accumulator in self._accumulators:
            accumulator.clear(len(self._groups))
        self._groups.clear()

    def _ship(self, head: PartialHeader, changed: bool) -> Iterator[Partial]:
        keys = encode_group_keys(self._groups.keys, len(self._groups))
        homes = np.empty(len(self._groups), np.int64)
        partitions_of(keys.buffer, keys.start + keys.length, self._plan.partitions, homes)
        hashes = [one.sorted(len(self._groups)) for one in self._distinct]
        nothing: list[bytes] = []  # the payloads of all that get no row are the same
        for destination in range(self._plan.partitions):
            gids = np.flatnonzero(homes == destination) + 1
            if nothing and not len(gids):
                yield Partial(destination, nothing)
            elif len(gids) or changed:
                rows = self._rows(gids, [spans for spans, _ in hashes], keys.length)
                parts = self._parts(rows)
                payloads = [
                    self._payload(head, at, len(parts), part, keys, [ids for _, ids in hashes])
                    for at, part in enumerate(parts)
                ]
                if not len(gids):
                    nothing = payloads
                yield Partial(destination, payloads)

    @property
    def _distinct(self) -> list[Distinct]:
        return [one for one in self._accumulators if isinstance(one, Distinct)]

    def _rows(self, gids: I64, spans: list[Spans], key_lengths: I64) -> _Rows:
        """Rows of the groups ``gids``; a group with more hashes than one row may carry gets further rows."""
        limit = _PIECE_IDS_MAX // max(len(spans), 1)
        pieces = np.ones(len(gids), np.int64)
        for starts, stops in spans:
            np.maximum(pieces, -(-(stops[gids] - starts[gids]) // limit), out=pieces)
        owners = np.repeat(gids, pieces)
        piece = np.arange(len(owners)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        cut = [
            (np.minimum(a[owners] + piece * limit, b[owners]), np.minimum(a[owners] + (piece + 1) * limit, b[owners]))
            for a, b in spans
        ]
        values = np.where(piece == 0, owners, 0)
        sizes = 12 + key_lengths[owners - 1]
        for one in self._accumulators:
            sizes += one.row_bytes(values)
        for a, b in cut:
            sizes += 16 * (b - a)
        return _Rows(owners, values, cut, sizes)

    def _parts(self, rows: _Rows) -> list[_Rows]:
        """Cut so that each payload stays below the limit, unless one row alone is larger; at least one part."""
        ends = np.cumsum(rows.sizes)
        parts: list[_Rows] = []
        start = 0
        while start < len(ends) or not parts:
            room = _ROWS_BYTES_MAX + (int(ends[start - 1]) if start else 0)
            stop = max(int(np.searchsorted(ends, room, "right")), start + 1)
            parts.append(rows.part(start, stop))
            start = stop
        return parts

    def _payload(
        self, head: PartialHeader, part: int, parts: int, rows: _Rows, keys: KeySpans, ids: list[U64]
    ) -> bytes:
        columns: list[Column] = [
            int64_column(self._groups.window_starts[rows.owners - 1]),
            spans_column(keys, rows.owners - 1),
        ]
        spans = zip(rows.spans, ids, strict=True)
        for accumulator in self._accumulators:
            columns += _columns(accumulator, rows.values, spans)
        header = PartialHeader(
            head.format, head.table, head.source, head.sources, head.epoch, part, parts, head.watermark, head.idle
        )
        return encode_partial(header, len(rows.owners), columns)


def _columns(one: Accumulator | Distinct, values: I64, spans: Iterator[tuple[Spans, U64]]) -> list[Column]:
    if not isinstance(one, Distinct):
        return one.columns(values)
    (starts, stops), hashes = next(spans)
    first, last = (int(starts.min()), int(stops.max())) if len(starts) else (0, 0)
    return [span_column((starts - first, stops - first), hashes[first:last])]


def example_plan() -> TablePlan:
    """A table with an aggregate of every kind that is compiled, to warm up with."""
    inputs: dict[str, pl.DataType] = {"i": pl.Int64(), "f": pl.Float64()}
    kinds: list[Agg] = [Agg("count"), Agg("count_distinct", "i")]
    kinds += [Agg("sum", "i"), Agg("sum", "f"), Agg("min", "i"), Agg("max", "f")]
    aggs = {str(n): agg for n, agg in enumerate(kinds)}
    keys: dict[str, pl.DataType] = {"i": pl.Int64(), "t": pl.String()}
    return TablePlan("warm-up", keys, Tumbling(1), 0, 0, aggs, inputs, (), 1, "", "")


def example_rows() -> pl.DataFrame:
    """Records of it, so many groups that what is kept of them grows."""
    numbers = range(_EXAMPLE_ROWS)
    return pl.DataFrame(
        {"i": numbers, "f": map(float, numbers), "t": map(str, numbers)}, schema_overrides={"i": pl.Int64}
    )
