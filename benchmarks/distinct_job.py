"""Benchmark ``distinct``: orders and different buyers by country in windows of five minutes, to both sinks.

faust -A benchmarks.distinct_job worker
"""

from __future__ import annotations

from typing import Final

import polars as pl

import streamproc as sp
from benchmarks.marks import SCHEMAS, MeasuredApp, Settings, settings
from streamproc import sinks

__all__ = ["TABLE", "app", "build"]

TABLE: Final = "buyers"


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, lambda app: app.runtime.finished())
    orders = app.topic(
        told.topic,
        value_schema=str(SCHEMAS / "order.avsc"),
        partitions=told.partitions,
        config={"retention.ms": "-1"},
        # Bounded only so that the run has an end: at it every window closes, as it would by later orders.
        event_time=sp.event_time("event_time", out_of_orderness="5s", bounded=True),
    )
    buyers = (
        app.pipeline(orders)
        .dedupe("order_id", within="24h")
        .filter(pl.col("status") == "completed")
        .group_by("country")
        .window(sp.tumbling("5m"), allowed_lateness="10s")
        .agg(orders=sp.count(), buyers=sp.count_distinct("user_id"))
        .table(TABLE)
    )
    if told.redis:
        buyers.sink(sinks.redis(told.redis), emit="on_update")
    if told.postgres:
        buyers.sink(sinks.postgres(told.postgres), emit="on_update")
    return app


app = build(settings())
