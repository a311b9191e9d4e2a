"""Benchmark ``pipeline``: decode, dedupe, filter, five-minute windows per country with count and sum, into RocksDB, its
changelog, Redis and Postgres.

    faust -A benchmarks.pipeline_job worker
"""

from __future__ import annotations

from typing import Final

import polars as pl

import streamproc as sp
from benchmarks.marks import JobApp, MeasuredApp, Settings, finished, settings
from streamproc import sinks
from streamproc.operators.plan import Agg

__all__ = ["TABLE", "app", "build", "declare", "declare_windows"]

TABLE: Final = "revenue"


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, finished)
    declare(app)
    return app


def declare(app: JobApp, *, bounded: bool = True) -> None:
    """The job itself, on ``app``."""
    declare_windows(app, TABLE, bounded=bounded, orders=sp.count(), revenue=sp.sum("amount"))


def declare_windows(app: JobApp, table: str, *, bounded: bool = True, **aggregates: Agg) -> None:
    """Windows with whatever ``aggregates``, in ``table`` and in the sinks that the app is told."""
    windows = (
        app.pipeline(app.orders(bounded=bounded))
        .dedupe("order_id", within="24h")
        .filter(pl.col("status") == "completed")
        .group_by("country")
        .window(sp.tumbling("5m"), allowed_lateness="10s")
        .agg(**aggregates)
        .table(table)
    )
    if app.told.redis:
        windows.sink(sinks.redis(app.told.redis), emit="on_update")
    if app.told.postgres:
        windows.sink(sinks.postgres(app.told.postgres), emit="on_update")


app = build(settings())
