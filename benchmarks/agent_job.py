"""Benchmark ``agent``: orders per user, counted record by record in a table on disk with its changelog.

faust -A benchmarks.agent_job worker
"""

from __future__ import annotations

from typing import Any, Final

from benchmarks.marks import MeasuredApp, Settings, all_committed, settings

__all__ = ["TABLE", "app", "build"]

TABLE: Final = "counts"


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, all_committed)
    orders = app.orders()
    counts = app.Table(TABLE, default=int)

    @app.agent(orders, name="count")
    async def count(stream: Any) -> None:
        async for order in stream:
            counts[order.user_id] += 1

    return app


app = build(settings())
