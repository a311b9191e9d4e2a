"""The jobs on Quix Streams.

PEER_BENCHMARK=… python -m benchmarks.peers.jobs.quix_job
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from quixstreams import Application  # type: ignore[import-not-found]
from quixstreams.dataframe.windows import Count, Sum  # type: ignore[import-not-found]
from quixstreams.models.serializers.avro import AvroDeserializer, AvroSerializer  # type: ignore[import-not-found]

from benchmarks.peers.jobs.told import say_first, schema, told

TOLD: Final = told()


class In(AvroDeserializer):  # type: ignore[misc]
    """Quix takes the head off only with a schema registry."""

    def __call__(self, value: bytes, ctx: Any) -> Any:
        return super().__call__(value[5:], ctx)


class Out(AvroSerializer):  # type: ignore[misc]
    def __call__(self, value: Any, ctx: Any) -> bytes:
        encoded: bytes = super().__call__(value, ctx)
        return TOLD.head + encoded


app = Application(
    broker_address=TOLD.bootstrap,
    consumer_group=TOLD.app_id,
    auto_offset_reset="earliest",
    commit_interval=TOLD.commit_ms / 1000,
    state_dir=f"{TOLD.folder}/state",
    processing_guarantee="exactly-once",
    loglevel="WARNING",
)
orders = app.topic(
    TOLD.source, key_deserializer="str", value_deserializer=In(schema()),
    timestamp_extractor=lambda value, headers, timestamp, kind: value["event_time"],
)  # fmt: skip
_begun = False


def begin() -> None:
    global _begun
    _begun = True
    say_first()


def pipeline(stream: Any) -> None:
    remembered = timedelta(milliseconds=TOLD.remembered_ms)

    def is_new(order: Any, state: Any) -> bool:
        if not _begun:
            begin()
        if state.exists(order["order_id"]):
            return False
        state.set(order["order_id"], 1, ttl=remembered)
        return True

    stream = stream.filter(is_new, stateful=True).filter(lambda order: order["status"] == "completed")
    stream = stream.apply(lambda order: {"country": order["country"], "amount": order["amount"]}).group_by("country")
    windows = stream.tumbling_window(TOLD.window_ms, grace_ms=TOLD.grace_ms).agg(count=Count(), sum=Sum("amount"))
    windows.final(closing_strategy="partition").apply(
        lambda row, key, timestamp, headers: {
            "country": key if isinstance(key, str) else key.decode(),
            "window_start": row["start"],
            "count": row["count"],
            "sum": row["sum"],
        },
        metadata=True,
    ).to_topic(app.topic(TOLD.output, value_serializer="json", key_serializer="str"))


def count(stream: Any) -> None:
    def add(order: Any, state: Any) -> None:
        if not _begun:
            begin()
        state.set("n", state.get("n", 0) + 1)

    stream.update(add, stateful=True)


def forward(stream: Any) -> None:
    def is_paid(order: Any) -> bool:
        if not _begun:
            begin()
        return bool(order["status"] == "completed")

    stream.filter(is_paid).to_topic(app.topic(TOLD.output, value_serializer=Out(schema()), key_serializer="str"))


{"pipeline": pipeline, "count": count, "forward": forward}[TOLD.job](app.dataframe(orders))
app.run()
