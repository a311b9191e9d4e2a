"""Benchmark ``forward``: completed orders go on to another topic.

faust -A benchmarks.forward_job worker
"""

from __future__ import annotations

import polars as pl

import streamproc as sp
from benchmarks.marks import SCHEMAS, MeasuredApp, Settings, settings

__all__ = ["app", "build", "output_topic"]


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, lambda app: app.runtime.finished())
    orders = app.topic(
        told.topic,
        value_schema=str(SCHEMAS / "order.avsc"),
        partitions=told.partitions,
        config={"retention.ms": "-1"},
        # Bounded only so that the run has an end.
        event_time=sp.event_time("event_time", out_of_orderness="5s", bounded=True),
    )
    app.pipeline(orders).filter(pl.col("status") == "completed").to(output_topic(told))
    return app


def output_topic(told: Settings) -> str:
    """Where the completed orders are."""
    return f"completed-{told.app_id}"


app = build(settings())
