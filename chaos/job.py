"""The job under fire: a pipeline with repartition, dedupe, late records and sinks, and per-record agents beside it.

``CHAOS_BROKER``, ``CHAOS_REDIS`` and ``CHAOS_POSTGRES`` say where its servers are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import polars as pl

import streamproc as sp
from chaos.load import ORDERS, PARTITIONS, PAYMENTS
from streamproc import sinks
from streamproc.operators.pipeline import TableHandle

__all__ = ["app", "minutes", "tens"]

SCHEMAS: Final = Path(__file__).resolve().parent / "schemas"
TAKEN_MAX: Final = 20

app = sp.App(
    "chaos",
    broker=os.environ.get("CHAOS_BROKER", "kafka://127.0.0.1:9092"),
    schemas=str(SCHEMAS),
    commit_interval="400ms",
    web_enabled=False,
    broker_session_timeout=6.0,
    broker_heartbeat_interval=1.0,
)

# ---- columns

# No `idle_after`: a source that is held up by a fault must never count as ended, or lateness would depend on the fault.
orders = app.topic(
    ORDERS,
    value_schema=str(SCHEMAS / "order.avsc"),
    partitions=PARTITIONS,
    event_time=sp.event_time("at", out_of_orderness="1m"),
)
stream = (
    app.pipeline(orders)
    .expect({"amount is positive": pl.col("amount") >= 0}, on_fail="dead_letter")
    .dedupe("id", within="1h")
    .group_by("country")
)


def figures(name: str, size: str, allowed_lateness: str, retain: str) -> TableHandle:
    table = (
        stream.window(sp.tumbling(size), allowed_lateness=allowed_lateness, retain=retain)
        .agg(
            orders=sp.count(),
            revenue=sp.sum("amount"),
            most=sp.max("amount"),
            mean=sp.mean("amount"),
            customers=sp.count_distinct("customer"),
        )
        .table(name)
    )
    table.late.to(f"late-{name}")
    return table


minutes = figures("minutes", "1m", "2m", "20m")
tens = figures("tens", "10m", "20m", "400d")
if redis_url := os.environ.get("CHAOS_REDIS"):
    for table in (minutes, tens):
        table.sink(sinks.redis(redis_url), emit="on_update")
if postgres_dsn := os.environ.get("CHAOS_POSTGRES"):
    minutes.sink(sinks.postgres(postgres_dsn), emit="final")
    tens.sink(sinks.postgres(postgres_dsn), emit="on_update")

# ---- records

payments = app.topic(PAYMENTS, value_schema=str(SCHEMAS / "payment.avsc"), partitions=PARTITIONS)
numbered = app.topic("numbered", partitions=PARTITIONS)
counts = app.Table("counts", default=int)
sums = app.Table("sums", default=int)
_failed_here: set[tuple[str, int]] = set()


@app.agent(payments, name="count")
async def count(stream: Any) -> None:
    """Numbers the payments of each account; a record fails behind what it has written and sent."""
    async for payment in stream:
        counts[payment.account] += 1
        await numbered.send(key=payment.account, value=counts[payment.account])
        fails_once(payment)
        if payment.kind == "fails count":
            raise ValueError(payment.kind)


@app.agent(payments, name="take")
async def take(stream: Any) -> None:
    """Adds up the payments of each account, several at a time."""
    async for some in stream.take(TAKEN_MAX):
        for payment in some:
            sums[payment.account] += payment.cents
            if payment.kind == "fails take":
                raise ValueError(payment.kind)


def fails_once(payment: Any) -> None:
    """A flaky record fails the first time that this process sees it."""
    place = (payment.account, payment.number)
    if payment.kind == "flaky" and place not in _failed_here:
        _failed_here.add(place)
        raise ValueError(payment.kind)
