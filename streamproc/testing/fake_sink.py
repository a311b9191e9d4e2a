"""A sink in memory, for tests of pipelines and of what a task does when a sink fails. It passes the sinks' contract
suite.

Like Redis it writes in slices and moves its ledger in the last one, so a failure in between shows rows of an epoch that
the ledger does not know yet. Nothing awaits in the middle of a slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection

import polars as pl

from streamproc.commit.ledger import Ledger
from streamproc.core import limits
from streamproc.core.errors import LedgerMoved, SinkUnavailable, invariant
from streamproc.sinks.contract import SinkRows, TableShape
from streamproc.sinks.feed import check_rows

__all__ = ["FakeSink", "FakeWriter", "Identity", "Row"]

Identity = tuple[object, ...]
"""Group keys, then ``window_start`` in ms."""
Row = dict[str, object]
"""``window_end`` and the aggregates as Python values; times in ms; a null is None."""


class FakeSink:
    """Hand it to a pipeline like any sink, then look at `rows`, `ledgers` and `applied`."""

    def __init__(self, name: str = "fake") -> None:
        self._name = name
        self.rows: defaultdict[str, dict[Identity, Row]] = defaultdict(dict)
        """Per table."""
        self.ledgers: dict[tuple[str, str, int], Ledger] = {}
        """By application, table and partition."""
        self.applied: list[tuple[str, int, Ledger]] = []
        """Each time a ledger moved, in order: table, partition, the ledger moved to."""
        self.down = False
        """While true every call raises `SinkUnavailable`."""
        self._slices_left: int | None = None
        self._fell = False
        """`fail_after` has struck."""

    @property
    def name(self) -> str:
        return self._name

    def writer(self, shape: TableShape, app_id: str, partition: int) -> FakeWriter:
        return FakeWriter(self, shape, app_id, partition)

    def fail_after(self, slices: int) -> None:
        """Go down once this many more slices have been written (`limits.REDIS_SLICE_ROWS_MAX` rows each); set ``down``
        to false to mend."""
        self._slices_left = slices

    def mend(self) -> None:
        """Undo `fail_after`, struck or not."""
        if self._slices_left is None and self._fell:
            self.down = False
        self._slices_left, self._fell = None, False

    def reach(self) -> None:
        """Raise `SinkUnavailable` while down."""
        if self.down:
            raise SinkUnavailable(f"{self._name} is down.")

    def count_slice(self) -> None:
        """One more slice is about to be written; see `fail_after`."""
        if self._slices_left is not None:
            if self._slices_left == 0:
                self.down, self._slices_left, self._fell = True, None, True
            else:
                self._slices_left -= 1
        self.reach()


class FakeWriter:
    """See `contract.SinkWriter`."""

    def __init__(self, sink: FakeSink, shape: TableShape, app_id: str, partition: int) -> None:
        self._sink, self._shape, self._owner = sink, shape, (app_id, shape.table, partition)
        self._open = False

    async def open(self) -> None:
        self._sink.reach()
        self._open = True

    async def close(self) -> None:
        self._open = False

    async def read(self) -> Ledger | None:
        self._reach()
        return self._sink.ledgers.get(self._owner)

    async def apply(self, rows: SinkRows | None, *, held: Ledger | None, moved: Ledger) -> None:
        self._reach()
        self._compare(held)
        if rows is not None:
            check_rows(rows, self._shape)
            self._write(self._rows(rows.upserts), [] if rows.deletes.is_empty() else _identities(rows.deletes))
        self._sink.count_slice()
        self._sink.ledgers[self._owner] = moved
        self._sink.applied.append((*self._owner[1:], moved))

    async def prune(
        self,
        live: Collection[tuple[object, ...]],
        *,
        since_ms: int,
        mine: Callable[[tuple[object, ...]], bool],
        held: Ledger,
    ) -> int:
        self._reach()
        self._compare(held)
        keep = set(live)
        doomed = [
            row
            for row in self._table
            if isinstance(row[-1], int) and row[-1] >= since_ms and row not in keep and mine(row[:-1])
        ]
        self._write({}, doomed)
        return len(doomed)

    async def forget(self) -> bool:
        self._reach()
        return self._sink.ledgers.pop(self._owner, None) is not None

    @property
    def _table(self) -> dict[Identity, Row]:
        return self._sink.rows[self._shape.table]

    def _reach(self) -> None:
        invariant(self._open, f"The writer to {self._sink.name} was used before open() or after close().")
        self._sink.reach()

    def _compare(self, held: Ledger | None) -> None:
        found = self._sink.ledgers.get(self._owner)
        if not (found is None if held is None else held.same(found)):
            raise LedgerMoved(f"The ledger of {self._owner} in {self._sink.name} is {found}, not {held}.")

    def _write(self, upserts: dict[Identity, Row], deletes: list[Identity]) -> None:
        step = limits.REDIS_SLICE_ROWS_MAX
        written = list(upserts.items())
        for lo in range(0, len(written), step):
            self._sink.count_slice()
            self._table.update(written[lo : lo + step])
        for lo in range(0, len(deletes), step):
            self._sink.count_slice()
            for row in deletes[lo : lo + step]:
                self._table.pop(row, None)

    def _rows(self, frame: pl.DataFrame) -> dict[Identity, Row]:
        if frame.is_empty():
            return {}
        values = _in_ms(frame.select("window_end", *self._shape.columns)).rows(named=True)
        return dict(zip(_identities(frame.select(self._shape.identity)), values, strict=True))


def _in_ms(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.selectors.datetime().dt.epoch("ms"))


def _identities(frame: pl.DataFrame) -> list[Identity]:
    return list(frame.with_columns(pl.col("window_start").dt.epoch("ms")).iter_rows())
