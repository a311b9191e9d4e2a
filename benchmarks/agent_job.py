"""Benchmark ``agent``: orders per user, counted record by record in a table on disk with its changelog.

faust -A benchmarks.agent_job worker
"""

from __future__ import annotations

from typing import Any, Final

from benchmarks.marks import SCHEMAS, MeasuredApp, Settings, settings
from benchmarks.orders import PARTITIONS
from streamproc.core.types import TopicPartition

__all__ = ["TABLE", "app", "build"]

TABLE: Final = "counts"


def build(told: Settings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, _all_committed)
    orders = app.topic(told.topic, value_schema=str(SCHEMAS / "order.avsc"), partitions=PARTITIONS)
    counts = app.Table(TABLE, default=int)

    @app.agent(orders, name="count")
    async def count(stream: Any) -> None:
        async for order in stream:
            counts[order.user_id] += 1

    return app


def _all_committed(app: MeasuredApp) -> bool:
    """Every order that was in the topic is behind a committed position."""
    at = 0
    for task in app.runtime.tasks.values():
        at += task.committed_position(TopicPartition(app.told.topic, task.id.partition)) or 0
    return bool(app.told.records) and at >= app.told.records


app = build(settings())
