"""A job that never ends: signups and purchases in a click stream that it generates itself, so that the web view lives.

    faust -A agents.user_events worker

Settings of the environment: ``STREAMPROC_RATE`` (events a second and worker, default 200; 0: generate none),
``STREAMPROC_BROKER`` (default: a log in the folder data/user_events, no server).
"""

from __future__ import annotations

import logging
import os
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

import streamproc as sp
from streamproc.core.clock import Clock, SystemClock
from streamproc.core.errors import Retryable
from streamproc.core.partitioner import partition_of
from streamproc.core.types import TopicPartition
from streamproc.transport.contract import OutRecord

SCHEMAS = Path(__file__).resolve().parent.parent / "schemas"
TICK_S = 0.25
USERS = 5_000
logger = logging.getLogger(__name__)

KINDS = {"view": 80, "purchase": 15, "signup": 5}


class Clicks:
    """What visitors do, out of ``rng`` and ``clock``: most events are seconds old, one in a thousand is later than the
    watermark allows, one in a hundred comes twice."""

    def __init__(self, rng: random.Random, clock: Clock, rate: float) -> None:
        self.rng, self.clock, self.rate = rng, clock, rate
        self._owed = 0.0
        self._last: dict[str, Any] | None = None

    def take(self, seconds: float) -> list[dict[str, Any]]:
        """The events of the last ``seconds``; fractions of an event are carried over to the next call."""
        self._owed += self.rate * seconds
        count, self._owed = int(self._owed), self._owed % 1
        return [self._event() for _ in range(count)]

    def _event(self) -> dict[str, Any]:
        rng = self.rng
        if self._last is not None and rng.random() < 0.01:
            return self._last
        kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        age_ms = rng.randint(16 * 60_000, 30 * 60_000) if rng.random() < 0.001 else int(rng.expovariate(1 / 4_000))
        self._last = {
            "event_id": f"{rng.getrandbits(96):024x}",
            "kind": kind,
            "user_id": min(int(rng.paretovariate(0.6)), USERS),
            "at": datetime.fromtimestamp((self.clock.now_ms() - age_ms) / 1000, UTC),
            "amount": round(rng.lognormvariate(3, 0.8), 2) if kind == "purchase" else None,
        }
        return self._last


app = sp.App(
    "user_events", broker=os.environ.get("STREAMPROC_BROKER", "embedded://data/user_events"), schemas=str(SCHEMAS)
)

events = app.topic(
    "user_events",
    value_schema=str(SCHEMAS / "user_event.avsc"),
    partitions=4,
    event_time=sp.event_time("at", out_of_orderness="10m", idle_after="30s"),
)

activity = (
    app.pipeline(events)
    .expect({"amount sane": pl.col("amount").is_between(0, 100_000)}, on_fail="dead_letter")
    .dedupe("event_id", within="1h")
    .filter(pl.col("kind").is_in(["purchase", "signup"]))
    .group_by("kind")
    .window(sp.tumbling("5m"), allowed_lateness="0s", retain="1d")
    .agg(events=sp.count(), users=sp.count_distinct("user_id"))
    .table("activity")
)

clicks = Clicks(random.Random(), SystemClock(), float(os.environ.get("STREAMPROC_RATE", "200")))


@app.timer(interval=TICK_S)
async def visitors() -> None:
    """Write what happened since the last tick, in one call: ``events.send`` would wait for the disk once an event."""
    count = await app.runtime.partition_count("user_events")
    now_ms = clicks.clock.now_ms()
    records: dict[TopicPartition, list[OutRecord]] = {}
    for event in clicks.take(TICK_S):
        # Keyed by user, so that a repeated event meets its first copy.
        key = str(event["user_id"]).encode()
        tp = TopicPartition("user_events", partition_of(key, count))
        records.setdefault(tp, []).append(OutRecord(key, events.encode(event), (), now_ms))
    try:
        await app.runtime.transport.send(records)
    except Retryable as away:
        # Visitors do not wait for a broker: what they did meanwhile is lost, and the next tick tries again.
        logger.warning("%d events were not written: %s", sum(map(len, records.values())), away)


if __name__ == "__main__":
    app.main()
