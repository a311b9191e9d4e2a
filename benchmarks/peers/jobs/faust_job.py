"""The jobs on Faust.

PEER_BENCHMARK=… faust -A benchmarks.peers.jobs.faust_job worker
"""

from __future__ import annotations

import io
from typing import Any, Final

import fastavro
import faust
from faust.serializers import codecs

from benchmarks.peers.jobs.told import say_first, schema, told

TOLD: Final = told()
AVRO: Final = fastavro.parse_schema(schema())
FOR_EVER_S: Final = 10 * 365 * 86_400


class Avro(codecs.Codec):
    """Confluent's wire format of an order."""

    def _loads(self, s: bytes) -> Any:
        return fastavro.schemaless_reader(io.BytesIO(s[5:]), AVRO, None)

    def _dumps(self, s: Any) -> bytes:
        out = io.BytesIO()
        out.write(TOLD.head)
        fastavro.schemaless_writer(out, AVRO, s)
        return out.getvalue()


codecs.register("orders_avro", Avro())


class Order(faust.Record, serializer="orders_avro"):
    order_id: str
    user_id: int
    country: str
    status: str
    amount: float
    event_time: int
    sku: str
    note: str


class Paid(faust.Record, serializer="json"):
    country: str
    amount: float
    event_time: int


app = faust.App(
    TOLD.app_id,
    broker=f"kafka://{TOLD.bootstrap}",
    store="rocksdb://",
    topic_partitions=TOLD.partitions,
    topic_replication_factor=1,
    processing_guarantee="exactly_once",
    broker_commit_interval=TOLD.commit_ms / 1000,
    web_enabled=False,
)
orders = app.topic(TOLD.source, key_type=str, key_serializer="raw", value_type=Order, value_serializer="orders_avro")


def pipeline() -> None:
    """Each change of a window is published: `on_window_close` rests on the wall clock, and a replay is all in the past."""
    seen = app.Table("seen", default=bool, partitions=TOLD.partitions)
    paid = app.topic(
        TOLD.paid, key_type=str, key_serializer="raw", value_type=Paid, partitions=TOLD.partitions, internal=True
    )
    out = app.topic(TOLD.output, key_type=str, key_serializer="raw", value_serializer="json")
    table = app.Table("revenue", default=list, partitions=TOLD.partitions)
    windows: Any = table.tumbling(TOLD.window_ms / 1000, expires=FOR_EVER_S)
    revenue = windows.relative_to(lambda event: event.value.event_time / 1000)

    @app.agent(orders)
    async def dedupe(stream: Any) -> None:
        first = True
        async for order in stream:
            if first:
                first = False
                say_first()
            if order.order_id in seen:
                continue
            seen[order.order_id] = True
            if order.status == "completed":
                await paid.send(key=order.country, value=Paid(order.country, order.amount, order.event_time))

    @app.agent(paid)
    async def aggregate(stream: Any) -> None:
        async for order in stream:
            window = revenue[order.country]
            count, total = window.value() or (0, 0.0)
            count, total = count + 1, total + order.amount
            revenue[order.country] = [count, total]
            start = order.event_time // TOLD.window_ms * TOLD.window_ms
            row = {"country": order.country, "window_start": start, "count": count, "sum": total}
            await out.send(key=f"{order.country}|{start}", value=row)


def count() -> None:
    counts = app.Table("counts", default=int, partitions=TOLD.partitions)

    @app.agent(orders)
    async def count_users(stream: Any) -> None:
        first = True
        async for user, _ in stream.items():
            if first:
                first = False
                say_first()
            counts[user] += 1


def forward() -> None:
    out = app.topic(TOLD.output, key_type=str, key_serializer="raw", value_serializer="orders_avro")

    @app.agent(orders)
    async def pass_on(stream: Any) -> None:
        first = True
        async for user, order in stream.items():
            if first:
                first = False
                say_first()
            if order.status == "completed":
                await out.send(key=user, value=order)


{"pipeline": pipeline, "count": count, "forward": forward}[TOLD.job]()
