"""Sends the load at a steady rate through whatever happens to the broker, each record exactly once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from chaos.load import ORDERS, PARTITIONS, PAYMENTS, encode_order, encode_payment, orders, payments
from streamproc.core.clock import Clock
from streamproc.core.errors import BrokerUnavailable

__all__ = ["Feed"]

TICK_S: Final = 0.05
MADE_UP_S_MAX: Final = 0.5
"""After a pause no more than this is made up for: it is a steady load, not a flood."""
UNANSWERED_MAX: Final = 20_000
"""Records on their way to a broker that may be down."""
LAG_MAX: Final = 30_000
"""Records that no worker has committed yet; beyond it the load waits, so that the end can be reached in time."""
OUTAGE_S: Final = 120.0
"""How long the broker may be away before a record is given up, and the run with it."""
ORDERS_SHARE: Final = 2 / 3


class Feed:
    """``sent`` counts records per topic and partition; what they hold is known from their place (`chaos.load`)."""

    def __init__(self, broker: str, seed: int, rate: int, clock: Clock, lag: Callable[[], int]) -> None:
        self._broker, self._rate, self._clock, self._lag = broker, rate, clock, lag
        self.sent = {ORDERS: [0] * PARTITIONS, PAYMENTS: [0] * PARTITIONS}
        self._values: dict[str, list[Iterator[bytes]]] = {
            ORDERS: [map(encode_order, orders(seed, p)) for p in range(PARTITIONS)],
            PAYMENTS: [map(encode_payment, payments(seed, p)) for p in range(PARTITIONS)],
        }
        self._unanswered: deque[asyncio.Future[object]] = deque()

    @property
    def records(self) -> int:
        return sum(map(sum, self.sent.values()))

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``; on return all that was sent is in the log, or `BrokerUnavailable`."""
        try:
            await self._run(stop)
        except KafkaError as error:
            raise BrokerUnavailable(f"The load could not be written: {error!r}") from error

    async def _run(self, stop: asyncio.Event) -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._broker,
            enable_idempotence=True,
            linger_ms=10,
            request_timeout_ms=round(OUTAGE_S * 1000),
        )
        await producer.start()
        try:
            owed = dict.fromkeys(self.sent, 0.0)
            share = {ORDERS: ORDERS_SHARE, PAYMENTS: 1 - ORDERS_SHARE}
            last_s = self._clock.monotonic_s()
            while not stop.is_set():
                await self._clock.sleep(TICK_S)
                gone_s, last_s = self._clock.monotonic_s() - last_s, self._clock.monotonic_s()
                if self._lag() > LAG_MAX:
                    continue
                for topic in self.sent:
                    owed[topic] += self._rate * share[topic] * min(gone_s, MADE_UP_S_MAX) / PARTITIONS
                    owed[topic] -= await self._send(producer, topic, int(owed[topic]))
                await self._answers(UNANSWERED_MAX)
            await self._answers(0)
        finally:
            await producer.stop()

    async def _send(self, producer: AIOKafkaProducer, topic: str, count: int) -> int:
        """The next ``count`` records of every partition: all partitions go on at one pace."""
        for partition, values in enumerate(self._values[topic]):
            for _ in range(count):
                self._unanswered.append(await producer.send(topic, next(values), partition=partition))
            self.sent[topic][partition] += count
        return count

    async def _answers(self, left: int) -> None:
        """Look at the answers that are there, and wait until no more than ``left`` are missing."""
        while self._unanswered and (self._unanswered[0].done() or len(self._unanswered) > left):
            await self._unanswered.popleft()
