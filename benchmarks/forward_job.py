"""Benchmark ``forward``: completed orders go on to another topic.

faust -A benchmarks.forward_job worker
"""

from __future__ import annotations

import polars as pl

from benchmarks.marks import MeasuredApp, Settings, finished, settings

__all__ = ["app", "build", "output_topic"]


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, finished)
    orders = app.orders(bounded=True)
    app.pipeline(orders).filter(pl.col("status") == "completed").to(output_topic(told))
    return app


def output_topic(told: Settings) -> str:
    """Where the completed orders are."""
    return f"completed-{told.app_id}"


app = build(settings())
