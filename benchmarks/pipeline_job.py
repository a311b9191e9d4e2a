"""Benchmark ``pipeline``: decode, dedupe, filter, five-minute windows per country with count and sum, into RocksDB, its
changelog, Redis and Postgres.

    faust -A benchmarks.pipeline_job worker
"""

from __future__ import annotations

from typing import Final

import polars as pl

import streamproc as sp
from benchmarks.marks import SCHEMAS, MeasuredApp, Settings, settings
from streamproc import sinks

__all__ = ["TABLE", "app", "build", "declare"]

TABLE: Final = "revenue"


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, lambda app: app.runtime.finished())
    declare(app, told)
    return app


def declare(app: sp.App, told: Settings, *, bounded: bool = True) -> None:
    """The job itself, on ``app``. Bounded only so that a run has an end: at it every window closes, as it would by later
    orders."""
    orders = app.topic(
        told.topic,
        value_schema=str(SCHEMAS / "order.avsc"),
        partitions=told.partitions,
        config={"retention.ms": "-1"},
        event_time=sp.event_time("event_time", out_of_orderness="5s", bounded=bounded),
    )
    revenue = (
        app.pipeline(orders)
        .dedupe("order_id", within="24h")
        .filter(pl.col("status") == "completed")
        .group_by("country")
        .window(sp.tumbling("5m"), allowed_lateness="10s")
        .agg(orders=sp.count(), revenue=sp.sum("amount"))
        .table(TABLE)
    )
    if told.redis:
        revenue.sink(sinks.redis(told.redis), emit="on_update")
    if told.postgres:
        revenue.sink(sinks.postgres(told.postgres), emit="on_update")


app = build(settings())
