"""What a sink is told, and when, by a whole app."""

from __future__ import annotations

import asyncio
from pathlib import Path

import polars as pl

from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core.types import TopicPartition
from streamproc.operators.aggregates import sum as sum_of
from streamproc.operators.pipeline import event_time, tumbling
from streamproc.testing.fake_sink import FakeSink
from streamproc.transport.contract import OutRecord
from tests.apps import events_avsc, new_app, running, until, write

NOON_MS = 1_767_268_800_000
HOUR_MS = 3_600_000


def test_a_sum_that_overflows_on_its_way_is_nothing_to_a_sink_that_waits_for_the_last_word(tmp_path: Path) -> None:
    """Whether an epoch ends between the halves of a sum must not decide whether the worker stops."""
    app, target = new_app(tmp_path), FakeSink()
    encoder = Encoder(load_schema(events_avsc(tmp_path) / "event.avsc"), 1)
    source = app.topic("in", value_schema="event.avsc", partitions=1, event_time=event_time("at"))
    (
        app.pipeline(source)
        .with_columns(whole=pl.col("amount").cast(pl.Int64))
        .group_by("country")
        .window(tumbling("1h"))
        .agg(total=sum_of("whole"))
        .table("totals")
        .sink(target, emit="final")
    )

    def event(country: str, amount: float, at_ms: int) -> OutRecord:
        value = encoder.encode({"id": "x", "country": country, "amount": amount, "at": at_ms})
        return OutRecord(None, value, (), at_ms)

    half = float(1 << 62)

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, event("DE", half, NOON_MS)), (0, event("DE", half, NOON_MS))])
        async with running(app):
            await until(
                lambda: any(epoch > 1 for _, _, ledger in target.applied for epoch in [ledger.epoch]), "an epoch"
            )
            rest = [event("DE", -half, NOON_MS), event("IT", 1.0, NOON_MS + 3 * HOUR_MS)]
            await app.runtime.transport.send({TopicPartition("in", 0): rest})
            await until(lambda: target.rows["totals"], "the final row")
            assert [row["total"] for row in target.rows["totals"].values()] == [1 << 62]
            assert not app.crashed

    asyncio.run(scenario())
