"""Benchmark ``distinct``: orders and different buyers by country in windows of five minutes, to both sinks.

faust -A benchmarks.distinct_job worker
"""

from __future__ import annotations

from typing import Final

import streamproc as sp
from benchmarks.marks import MeasuredApp, Settings, finished, settings
from benchmarks.pipeline_job import declare_windows

__all__ = ["TABLE", "app", "build"]

TABLE: Final = "buyers"


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, finished)
    declare_windows(app, TABLE, orders=sp.count(), buyers=sp.count_distinct("user_id"))
    return app


app = build(settings())
