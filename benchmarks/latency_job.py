"""Benchmark ``latency``: every order is a row of its own, so that each can be waited for.

    faust -A benchmarks.latency_job worker

By an agent, whose commit is the result, or by a pipeline, whose result takes a second commit: that of the table's owner.
An embedded log belongs to one process, so there the worker sends and waits itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import streamproc as sp
from benchmarks.latency_probe import Probe
from benchmarks.marks import MeasuredApp, Settings, settings
from streamproc.core.clock import Clock
from streamproc.transport.contract import Transport

__all__ = ["FOUND", "TABLE", "LatencySettings", "Way", "app", "build", "probe"]

Way: TypeAlias = Literal["agent", "pipeline"]
TABLE: Final = "seen"
FOUND: Final = "found"
"""A file in the worker's folder: what the probe has found, once all is over."""


class LatencySettings(Settings, frozen=True):
    """Settings, the way orders go, and the load."""

    way: Way = "agent"
    seconds: float = 0.0
    rate_per_s: int = 1_000


def build(told: LatencySettings) -> MeasuredApp:
    """The app as ``told``."""
    app = MeasuredApp(told, lambda app: (Path(told.folder) / FOUND).exists())
    orders = app.orders()
    if told.way == "agent":
        _agent(app, orders)
    else:
        app.pipeline(orders).group_by("order_id").window(sp.tumbling("1d")).agg(orders=sp.count()).table(TABLE)
    if told.seconds and told.broker.startswith("embedded"):
        app.task(lambda: _probe_here(app, told))
    return app


def _agent(app: MeasuredApp, orders: Any) -> None:
    seen = app.Table(TABLE, default=int)

    @app.agent(orders, name="count")
    async def count(stream: Any) -> None:
        async for order in stream:
            seen[order.order_id] += 1


def probe(told: LatencySettings, transport: Transport, clock: Clock) -> Probe:
    """Who sends and waits."""
    return Probe(transport, clock, told.topic, told.partitions, f"{told.app_id}-{TABLE}-changelog", told.rate_per_s,
                 told.seconds)  # fmt: skip


async def _probe_here(app: MeasuredApp, told: LatencySettings) -> None:
    await app.runtime.ready.wait()
    (Path(told.folder) / FOUND).write_bytes((await probe(told, app.runtime.transport, app.clock).run()).encode())


app = build(settings(LatencySettings))
