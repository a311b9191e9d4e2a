"""Benchmark ``count``: orders per user, without windows, in a table on disk with its changelog.

faust -A benchmarks.count_job worker
"""

from __future__ import annotations

from typing import Final

import streamproc as sp
from benchmarks.marks import MeasuredApp, Settings, settings, settled

__all__ = ["TABLE", "app", "build"]

TABLE: Final = "orders_per_user"


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, settled)
    orders = app.orders(idle="hold")
    app.pipeline(orders).group_by("user_id").agg(orders=sp.count()).table(TABLE)
    return app


app = build(settings())
