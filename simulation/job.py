"""The application under simulation: a pipeline with dedupe, two windowed tables and sinks, and three per-record agents."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import streamproc as sp
from streamproc.app import App
from streamproc.testing.fake_sink import FakeSink

__all__ = ["HOUR_MS", "OUT_OF_ORDER_MS", "PARTITIONS", "TABLES", "build"]

HOUR_MS = 3_600_000
PARTITIONS = 2
OUT_OF_ORDER_MS = 10 * 60_000
TABLES: dict[str, tuple[int, int]] = {"hourly": (HOUR_MS, 30 * 60_000), "daily": (24 * HOUR_MS, 0)}
"""Window and allowed lateness."""
HANGS_S = 20.0
"""Longer than a barrier waits."""
SCHEMAS = Path(__file__).parent / "schemas"


def build(failed: set[Any], *, idle: bool = False, standbys: int = 0) -> App:
    """``failed``: what the agents remember outside of the application, of records that fail or hang once. ``idle``: a
    partition without records holds nobody back, so that what is late is a matter of timing."""
    event_time = sp.event_time("at", out_of_orderness="10m", idle="hold")
    if idle:
        event_time = sp.event_time("at", out_of_orderness="10m", idle="hold", idle_after="1500ms")
    app = App("sim", schemas=SCHEMAS, commit_interval="200ms", table_standby_replicas=standbys)
    events = app.topic("events", value_schema="event.avsc", partitions=PARTITIONS, event_time=event_time)
    stream = app.pipeline(events).dedupe("id", within="7d").group_by("country")
    hourly = (
        stream.window(sp.tumbling("1h"), allowed_lateness="30m", retain="2h")
        .agg(n=sp.count(), amount=sp.sum("amount"), kinds=sp.count_distinct("amount"))
        .table("hourly")
    )
    daily = (
        stream.window(sp.tumbling("24h"), retain="400d")
        .agg(n=sp.count(), amount=sp.sum("amount"), kinds=sp.count_distinct("amount"))
        .table("daily")
    )
    hourly.late.to(app.topic("late-hourly"))
    daily.late.to("late-daily")
    hourly.sink(FakeSink("redis"), FakeSink("postgres"), emit="on_update")
    daily.sink(FakeSink("redis"), emit="final")

    words = app.topic("words", partitions=PARTITIONS)
    counts, out = app.Table("counts", default=int), app.topic("out", partitions=PARTITIONS)

    @app.agent(words, name="words")
    async def count(stream: Any) -> None:
        try:
            async for word in stream:
                counts[word["key"]] += 1
                await out.send(key=word["key"], value=counts[word["key"]])
                if word["n"] % 3 == 0:
                    await asyncio.sleep(0.01)
                this = (word["key"], word["n"])
                if word["kind"] == "stuck" and this not in failed:
                    failed.add(this)
                    await asyncio.sleep(HANGS_S)
                if word["kind"] == "bad" or (word["kind"] == "flaky" and this not in failed):
                    failed.add(this)
                    raise ValueError
        finally:
            with contextlib.suppress(RuntimeError):  # a given-up agent reaches nothing
                counts["finally"] += 1
                await out.send(key="finally", value=1)

    numbers = app.Table("numbers", default=int)

    @app.agent(words, name="slow")
    async def add(stream: Any) -> None:
        async for taken in stream.take(3):
            if taken[0]["n"] % 7 == 0:
                await asyncio.sleep(0.05)
            for word in taken:
                numbers[word["key"]] += word["n"]

    echo = app.topic("echo", partitions=PARTITIONS)

    async def say(word: Any) -> None:
        await echo.send(key=word["key"], value=word["n"])

    @app.agent(words, name="echo", sink=[say])
    async def repeat(stream: Any) -> Any:
        async for _, word in stream.items():
            yield word

    return app
