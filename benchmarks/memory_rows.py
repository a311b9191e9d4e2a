"""What the benchmarks ``memory`` and ``restore`` must have left: millions of rows, so they are compared as frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from benchmarks import results
from benchmarks.marks import Settings
from benchmarks.memory_job import TABLE, WINDOW_MS, build
from streamproc.operators.plan import TablePlan
from streamproc.operators.tablerows import TableRows
from streamproc.transport.contract import Transport

__all__ = ["TABLE", "live_rows", "wrong_rows"]

_NAMES = ("order_id", "start", "orders", "amount")


async def live_rows(told: Settings, transport: Transport) -> list[dict[bytes, bytes]]:
    """The table as its changelog has it, by partition, committed records only."""
    return await results.live_rows(told, transport, TABLE)


def wrong_rows(told: Settings, live: Sequence[Mapping[bytes, bytes]], parquet: Path) -> list[str]:
    """What differs from Polars' own computation over the input, in words; none: every cell of every row is right."""
    groups = build(told).build_groups({told.topic: told.partitions})
    plan = next(group.table.plan for group in groups if group.table is not None)
    got = pl.concat([_results(plan, rows) for rows in live if rows])
    start = (pl.col("event_time") // WINDOW_MS * WINDOW_MS).alias("start")
    # An order that comes twice is the same both times, so its exact sum, rounded once, is a product.
    expected = (
        pl.scan_parquet(parquet)
        .group_by("order_id", start)
        .agg(pl.len().cast(pl.Int64).alias("orders"), (pl.len() * pl.col("amount").first()).alias("amount"))
        .select(_NAMES)
        .collect()
    )
    if got.height == expected.height and got.sort(_NAMES[:2]).equals(expected.sort(_NAMES[:2])):
        return []
    missing = expected.join(got, on=_NAMES, how="anti").height
    others = got.join(expected, on=_NAMES, how="anti").height
    return [f"changelog: {missing} of {expected.height} rows are missing, {others} are not as expected"]


def _results(plan: TablePlan, rows: Mapping[bytes, bytes]) -> pl.DataFrame:
    start = pl.col("window_start").dt.epoch("ms").alias("start")
    return TableRows(plan).results(rows.items()).select("order_id", start, pl.col("orders").cast(pl.Int64), "amount")
