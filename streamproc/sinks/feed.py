"""From changed rows of a table to what a sink is handed: which rows it is to see, and which it is to lose. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import polars as pl

from streamproc.core.errors import invariant
from streamproc.sinks.contract import Emit, SinkRows, TableShape

__all__ = ["STATE", "VISIBLE", "check_rows", "latest", "sink_rows"]

STATE: Final = "__state"
"""Column: 0 the window is open, 1 closed but refinable, 2 final."""
VISIBLE: Final = "__visible"
"""Column: whether the row passes the table's HAVING filters; null is false, as in SQL."""

_FIRST_STATE: Final[dict[Emit, int]] = {"on_update": 0, "on_close": 1, "final": 2}


def sink_rows(frame: pl.DataFrame, emit: Emit, *, expire_at_ms: int | None = None) -> SinkRows | None:
    """What a sink with ``emit`` is to be told of ``frame``; None if nothing (its ledger moves all the same).

    ``frame`` has the shape's columns (keys, ``window_start``, ``window_end``, aggregates) plus `STATE` and `VISIBLE`,
    one row per key and window. A window's state only ever grows, so a row that ``emit`` holds back was never told
    before; a row told earlier that the filters no longer pass becomes a delete, which is harmless if it was never told.
    """
    invariant("window_start" in frame.columns, f"Changed rows have no window_start: {frame.columns}.")
    told = frame.filter(pl.col(STATE) >= _FIRST_STATE[emit]) if emit != "on_update" else frame
    if told.is_empty():
        return None
    visible = told[VISIBLE]
    rows = pl.DataFrame([column for column in told.get_columns() if column.name not in (STATE, VISIBLE)])
    identity = pl.DataFrame(told.get_columns()[: frame.columns.index("window_start") + 1])
    if visible.all(ignore_nulls=False):
        return SinkRows(rows, identity.clear(), expire_at_ms)
    visible = visible.fill_null(False)
    return SinkRows(rows.filter(visible), identity.filter(~visible), expire_at_ms)


def latest(frames: Sequence[pl.DataFrame], shape: TableShape) -> pl.DataFrame:
    """Changed rows of several epochs, oldest first, as one frame that holds each row as it was last: a replay
    coalesces."""
    joined = pl.concat(frames)
    return joined.unique(shape.identity, keep="last", maintain_order=True)


def check_rows(rows: SinkRows, shape: TableShape) -> None:
    """Hold what a writer is given against the shape it was opened with, before anything is sent."""
    invariant(
        rows.upserts.is_empty() or rows.upserts.columns == shape.names,
        f"Table {shape.table} has columns {shape.names}, but its sink was given {rows.upserts.columns}.",
    )
    invariant(
        rows.deletes.is_empty() or rows.deletes.columns == shape.identity,
        f"Rows of table {shape.table} are identified by {shape.identity}, but a delete gives {rows.deletes.columns}.",
    )
