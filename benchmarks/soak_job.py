"""The worker of the soak: orders at a steady rate, counted and summed per user in short windows, into Redis and Postgres.

    faust -A benchmarks.soak_job worker

It feeds itself, since an embedded log belongs to one process, and says in the file ``sent`` of its folder when it is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import streamproc as sp
from benchmarks.marks import SCHEMAS, JobApp, Settings, settings
from streamproc import sinks
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core.types import TopicPartition
from streamproc.transport.contract import OutRecord

__all__ = ["PARTITIONS", "RATE_PER_S", "SENT", "TABLE", "WINDOW_MS", "Order", "app", "order"]

PARTITIONS: Final = 2
RATE_PER_S: Final = 2_000
"""Orders of each partition, by the worker's clock and in event time."""
TICKS_PER_S: Final = 10
USERS: Final = 5_000
WINDOW_MS: Final = 10_000
TABLE: Final = "spending"
SENT: Final = "sent"
_FIRST_MS: Final = 1_700_000_000_000 // WINDOW_MS * WINDOW_MS


class Order(NamedTuple):
    """What the results are made of."""

    user_id: int
    event_time: int
    amount: int


def order(partition: int, number: int) -> Order:
    """The ``number``-th order of ``partition``, in every run."""
    user = (number * 7 + partition * 3) % USERS
    return Order(user, _FIRST_MS + number * 1000 // RATE_PER_S, 1 + number % 9)


def build(told: Settings) -> sp.App:
    """The app as ``told``; ``records`` is how many orders a partition gets, unless the machine is too slow for the rate."""
    app = JobApp(told)
    orders = app.orders(out_of_orderness="1s")
    spending = (
        app.pipeline(orders)
        .group_by("user_id")
        .window(sp.tumbling(f"{WINDOW_MS // 1000}s"), allowed_lateness="20s", retain="20s")
        .agg(orders=sp.count(), amount=sp.sum("amount"))
        .table(TABLE)
    )
    if told.redis:
        spending.sink(sinks.redis(told.redis), sinks.postgres(told.postgres), emit="on_update")
    if told.records:
        app.task(lambda: _feed(app, told))
    return app


async def _feed(app: sp.App, told: Settings) -> None:
    await app.runtime.ready.wait()
    began, sent = app.clock.monotonic_s(), 0
    for batch in _batches(told.records):
        if app.clock.monotonic_s() - began > told.records / RATE_PER_S:
            break
        await app.runtime.transport.send({TopicPartition(told.topic, p): records for p, records in batch.items()})
        sent += len(batch[0])
        await app.clock.sleep(max(0.0, began + sent / RATE_PER_S - app.clock.monotonic_s()))
    (Path(told.folder) / SENT).write_text(json.dumps({"orders": sent * PARTITIONS}))


def _batches(count: int) -> Iterator[dict[int, list[OutRecord]]]:
    """A tick's orders by partition."""
    encode = Encoder(load_schema(SCHEMAS / "order.avsc"), 1).encode
    step = RATE_PER_S // TICKS_PER_S

    def record(partition: int, number: int) -> OutRecord:
        user, at, amount = order(partition, number)
        value: dict[str, Any] = {
            "order_id": f"{partition}-{number}", "user_id": user, "country": "DE", "status": "completed",
            "amount": float(amount), "event_time": at, "sku": "", "note": "",
        }  # fmt: skip
        return OutRecord(str(user).encode(), encode(value))

    for first in range(0, count, step):
        numbers = range(first, min(first + step, count))
        yield {partition: [record(partition, number) for number in numbers] for partition in range(PARTITIONS)}


app = build(settings())
