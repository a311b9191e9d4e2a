"""Sends orders at a steady rate and waits for each one's row in a table's changelog, committed records only."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np

from benchmarks.marks import SCHEMAS
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core.clock import Clock
from streamproc.core.errors import UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.state import changelog
from streamproc.transport.contract import Fetcher, OutRecord, Transport

__all__ = ["Found", "Probe", "order_id"]

_Encode: TypeAlias = Callable[[Any], bytes]

TICK_S: Final = 0.01
"""Between two sends: as many orders as the rate wants."""
SETTLE_S: Final = 15.0
"""After the first result, before what counts: connections are made and code is warm, also the broker's."""
WAIT_S_MAX: Final = 60.0
"""For the topic to appear, for the first result, for the last."""
_ID: Final = re.compile(rb"order-\d{12}")
"""Keys of both kinds of table hold the id as it is."""


def order_id(number: int) -> str:
    """Of the ``number``-th order, from 0."""
    return f"order-{number:012d}"


class Found(msgspec.Struct, frozen=True):
    """Milliseconds from just before an order is sent until its committed row has been read."""

    sent: int
    counted: int
    """Of them, those sent after the first seconds."""
    p50_ms: float
    p99_ms: float
    max_ms: float
    lost: int

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


@dataclass
class Probe:
    """One use: `run`. Sends and reads on one event loop by one clock; the rows' own stamps are not looked at."""

    transport: Transport
    clock: Clock
    topic: str
    partitions: int
    changelog: str
    rate_per_s: int
    seconds: float
    sent_s: dict[bytes, float] = field(default_factory=dict)
    seen_s: dict[bytes, float] = field(default_factory=dict)

    async def run(self) -> Found:
        """Load for the seconds asked, then wait for what is under way. Raises `UserError` when no result ever comes."""
        fetcher = await self._fetcher()
        reader = asyncio.create_task(self._read(fetcher))
        try:
            counts_from_s = await self._send(reader)
            await self._until(lambda: len(self.seen_s) == len(self.sent_s))
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader
            await fetcher.close()
        return self._found(counts_from_s)

    async def _fetcher(self) -> Fetcher:
        end_s = self.clock.monotonic_s() + WAIT_S_MAX
        while await self.transport.partitions(self.changelog) is None:
            if self.clock.monotonic_s() > end_s:
                raise UserError(f"{self.changelog} was not made in {WAIT_S_MAX:.0f} s.", remedy="See the worker's log.")
            await self.clock.sleep(TICK_S)
        fetcher = self.transport.fetcher()
        for number in range(self.partitions):
            fetcher.resume(TopicPartition(self.changelog, number), Offset(0))
        return fetcher

    async def _read(self, fetcher: Fetcher) -> None:
        while True:
            batch = await fetcher.get()
            now_s = self.clock.monotonic_s()
            for row in changelog.read(batch):
                if (found := _ID.search(row.key)) is not None:
                    self.seen_s.setdefault(found[0], now_s)

    async def _send(self, reader: asyncio.Task[None]) -> float:
        """Returns the time from which on orders count."""
        encode = Encoder(load_schema(SCHEMAS / "order.avsc"), 1).encode
        began_s, first_s, number = self.clock.monotonic_s(), None, 0
        while not reader.done():
            now_s = self.clock.monotonic_s()
            first_s = now_s if first_s is None and self.seen_s else first_s
            if first_s is not None and now_s > first_s + SETTLE_S + self.seconds:
                return first_s + SETTLE_S
            if first_s is None and now_s > began_s + WAIT_S_MAX:
                break
            behind = round((now_s - began_s) * self.rate_per_s) - number
            if behind > 0:
                await self._send_some(encode, range(number, number + behind))
                number += behind
            await self.clock.sleep(TICK_S)
        if reader.done():
            reader.result()
        raise UserError(f"No order came through in {WAIT_S_MAX:.0f} s.", remedy="See the worker's log.")

    async def _send_some(self, encode: _Encode, numbers: range) -> None:
        records: dict[TopicPartition, list[OutRecord]] = {}
        for number in numbers:
            id_ = order_id(number)
            value = encode({
                "order_id": id_, "user_id": number, "country": "DE", "status": "completed", "amount": 1.0,
                "event_time": self.clock.now_ms(), "sku": "SKU-000001", "note": "web/checkout-v2/session",
            })  # fmt: skip
            tp = TopicPartition(self.topic, number % self.partitions)
            records.setdefault(tp, []).append(OutRecord(id_.encode(), value))
            self.sent_s[id_.encode()] = self.clock.monotonic_s()
        await self.transport.send(records)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Or for as long as it may take: what is not there then is lost."""
        end_s = self.clock.monotonic_s() + WAIT_S_MAX
        while not condition() and self.clock.monotonic_s() < end_s:
            await self.clock.sleep(TICK_S)

    def _found(self, counts_from_s: float) -> Found:
        took_ms = [
            1000 * (self.seen_s[id_] - sent_s)
            for id_, sent_s in self.sent_s.items()
            if sent_s >= counts_from_s and id_ in self.seen_s
        ]
        p50, p99, most = (round(float(at), 1) for at in np.percentile(took_ms, [50, 99, 100]))
        return Found(len(self.sent_s), len(took_ms), p50, p99, most, len(self.sent_s) - len(self.seen_s))
