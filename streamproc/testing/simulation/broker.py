"""The simulated broker: the embedded transport itself, reached by every process over a line that can fail.

A fault on a line is what a network does: a request that never arrives, an answer that is lost, late or asked for twice.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock
from streamproc.core.errors import BrokerUnavailable, ProduceRefused, ProducerFenced, UnknownOutcome
from streamproc.core.types import Offset, TopicPartition
from streamproc.testing.simulation.coordinator import SimulatedCoordinator, SimulatedMembership
from streamproc.testing.simulation.loop import Process
from streamproc.transport.contract import OutRecord, PartitionOffsets, TopicSpec
from streamproc.transport.embedded import EmbeddedTransport
from streamproc.transport.embedded.compaction import compact
from streamproc.transport.embedded.fetcher import EmbeddedFetcher
from streamproc.transport.embedded.transport import EmbeddedProducer

if TYPE_CHECKING:
    from streamproc.testing.simulation.watch import Watch

__all__ = ["Line", "SimulatedBroker", "Weather"]


_NOBODY = -7
"""A producer id that no producer has."""


@dataclass
class Weather:
    """How bad things are now: chances of one call, and what is out of order. All zero: a calm day."""

    dice: random.Random
    broker: float = 0.0
    """A call of the broker fails, before it arrived or after it was done."""
    sink: float = 0.0
    slow: float = 0.0
    """A call takes up to three seconds instead of milliseconds."""
    refuse: int = 0
    """So many further transactions are refused a batch."""
    disk_full: int = 0
    """So many further writes of a store find the disk full."""
    counts: dict[str, int] = field(default_factory=dict)
    """Faults that struck, by kind."""

    def strikes(self, chance: float, what: str) -> bool:
        if chance <= 0 or self.dice.random() >= chance:
            return False
        self.note(what)
        return True

    def note(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def calm(self) -> None:
        self.broker = self.sink = self.slow = 0.0
        self.refuse = self.disk_full = 0

    async def pass_time(self) -> None:
        """What any call over a network takes."""
        if self.strikes(self.slow, "slow call"):
            await asyncio.sleep(self.dice.uniform(0.05, 3.0))
        elif self.dice.random() < 0.3:
            await asyncio.sleep(self.dice.uniform(0.0, 0.01))
        else:
            await asyncio.sleep(0)

    def refuse_disk(self) -> None:
        """Called before a store is written."""
        if self.disk_full > 0:
            self.disk_full -= 1
            self.note("disk full")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class SimulatedBroker(EmbeddedTransport):
    """Outlives every worker; its own timers run outside of all of them."""

    def __init__(self, path: Path, clock: Clock) -> None:
        super().__init__(path, clock, synchronous="NORMAL")
        self._own_context = contextvars.copy_context()

    def _watch_deadlines(self) -> None:
        self._own_context.run(super()._watch_deadlines)

    def count(self, topic: str) -> int:
        return self._log.topics.count(topic) or 0

    def spec(self, topic: str) -> TopicSpec:
        """As it was made."""
        partitions = self._log.topics.partitions(topic)
        return TopicSpec(topic, len(partitions), dict(partitions[0].config))

    def compacted(self) -> list[str]:
        """Topics that a broker compacts."""
        return sorted(
            topic for topic in self._log.topics if any(p.compacted for p in self._log.topics.partitions(topic))
        )

    async def compact_some(self, topic: str, share: float) -> int:
        """Compact the older ``share`` of each partition: a broker never does it all at once. Returns how many records went."""
        gone = 0
        for partition in self._log.topics.partitions(topic):
            until = partition.begin + int((partition.stable - partition.begin) * share)
            partition.open[_NOBODY] = until  # nothing behind an open transaction is compacted
            try:
                gone += compact(self._file, partition, self._clock.now_ms())
            finally:
                del partition.open[_NOBODY]
        return gone

    def set_partitions(self, topic: str, count: int) -> None:
        """More or fewer partitions of a topic, as an operator's hand does it; nobody may be writing."""
        has = self.count(topic)
        with self._file.write() as db:
            db.execute("UPDATE topics SET partitions = ? WHERE name = ?", (count, topic))
            for number in range(has, count):
                db.execute("INSERT INTO partitions VALUES (NULL, ?, ?, 0, 0, 0)", (topic, number))
            db.execute("DELETE FROM partitions WHERE topic = ? AND partition >= ?", (topic, count))
        self._log.topics.load()


class Line:
    """`transport.contract.Transport` of one process. It does not survive its process."""

    pause_s: Callable[[Collection[str]], float] = staticmethod(lambda topics: 0.0)
    """How long to wait before each batch of ``topics``."""

    def __init__(self, broker: SimulatedBroker, coordinator: SimulatedCoordinator, process: Process, weather: Weather,
                 watch: Watch) -> None:  # fmt: skip
        self.broker, self.coordinator, self.process, self.weather, self.watch = (
            broker, coordinator, process, weather, watch)  # fmt: skip
        self._fetchers: list[LineFetcher] = []

    async def start(self) -> None:
        self.watch.require_alive(self.process, "start")

    async def stop(self) -> None:
        for fetcher in self._fetchers:
            await fetcher.close()

    async def arrives(self, call: str) -> None:
        """On the way to the broker."""
        self.watch.require_alive(self.process, call)
        await self.weather.pass_time()
        if self.weather.strikes(self.weather.broker / 2, f"lost request: {call}"):
            raise BrokerUnavailable(f"The simulation lost the request of {call}.")

    async def returns(self, call: str) -> None:
        """On the way back: it is done, but who asked does not hear of it."""
        await self.weather.pass_time()
        if self.weather.strikes(self.weather.broker / 2, f"lost answer: {call}"):
            raise BrokerUnavailable(f"The simulation lost the answer of {call}.")

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        self.watch.require_alive(self.process, "create_topics")
        await self.broker.create_topics(specs)

    async def partitions(self, topic: str) -> int | None:
        return await self.broker.partitions(topic)

    async def offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, PartitionOffsets]:
        await self.arrives("offsets")
        return await self.broker.offsets(tps)

    async def group_offsets(self, group: str, tps: Collection[TopicPartition]) -> dict[TopicPartition, Offset]:
        await self.arrives("group_offsets")
        return await self.broker.group_offsets(group, tps)

    async def delete_topics(self, topics: Collection[str]) -> None:
        await self.broker.delete_topics(topics)

    async def members(self, group: str) -> int:
        return len(self.coordinator.members)

    async def delete_records(self, before: Mapping[TopicPartition, Offset]) -> None:
        await self.arrives("delete_records")
        await self.broker.delete_records(before)
        await self.returns("delete_records")

    async def read(self, tp: TopicPartition, start: Offset, stop: Offset) -> AsyncIterator[RawBatch]:
        await self.arrives("read")
        async for batch in self.broker.read(tp, start, stop):
            await self.arrives("read")
            for piece in _pieces(batch, self.weather.dice):
                yield piece

    def fetcher(self) -> LineFetcher:
        self._fetchers.append(LineFetcher(self, self.broker.fetcher()))
        return self._fetchers[-1]

    def producer(self, transactional_id: str) -> LineProducer:
        return LineProducer(self, self.broker.producer(transactional_id))

    async def send(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        await self.arrives("send")
        return await self.broker.send(records)

    def membership(self, group: str) -> SimulatedMembership:
        return SimulatedMembership(self.coordinator, self.weather.pass_time)


class LineFetcher:
    """Cuts batches into small ones, so that a short log has many epochs."""

    def __init__(self, line: Line, inner: EmbeddedFetcher) -> None:
        self._line, self._inner = line, inner
        self._pieces: deque[RawBatch] = deque()
        self._topics: set[str] = set()

    def at_end(self, tp: TopicPartition) -> bool:
        return self.lag(tp) == 0

    def lag(self, tp: TopicPartition) -> int | None:
        lag = self._inner.lag(tp)
        return None if lag is None else lag + sum(len(piece) for piece in self._pieces if piece.tp == tp)

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        self._forget(tp)
        self._topics.add(tp.topic)
        self._inner.resume(tp, position)

    def pause(self, tp: TopicPartition) -> None:
        self._forget(tp)
        self._inner.pause(tp)

    async def get(self) -> RawBatch:
        if (pause_s := self._line.pause_s(self._topics)) > 0:
            await asyncio.sleep(pause_s)
        await self._line.arrives("fetch")
        while not self._pieces:
            batch = await self._inner.get()
            self._pieces.extend(_pieces(batch, self._line.weather.dice))
        return self._pieces.popleft()

    async def close(self) -> None:
        await self._inner.close()

    def _forget(self, tp: TopicPartition) -> None:
        self._pieces = deque(piece for piece in self._pieces if piece.tp != tp)


def _pieces(batch: RawBatch, dice: random.Random) -> list[RawBatch]:
    size = dice.choice((3, 10, 40))
    if len(batch) <= size:
        return [batch]
    return [batch.rows(lo, min(lo + size, len(batch))) for lo in range(0, len(batch), size)]


class LineProducer:
    """Notes each transaction that the broker took, and holds the task to throwing a producer away that has failed."""

    def __init__(self, line: Line, inner: EmbeddedProducer) -> None:
        self._line, self._inner, self._failed = line, inner, False
        self._records: list[tuple[TopicPartition, OutRecord]] = []

    async def fence(self) -> None:
        await self._call("fence", self._inner.fence, again=self._inner.fence)

    async def produce(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        weather = self._line.weather
        if weather.refuse > 0:
            weather.refuse -= 1
            weather.note("refused batch")
            self._failed = True
            topic = next((tp.topic for tp in records if tp.topic.endswith("-changelog")), next(iter(records)).topic)
            raise ProduceRefused("The simulation refused a batch.", topic=topic)
        written: dict[TopicPartition, Offset] = {}

        async def write() -> None:
            written.update(await self._inner.produce(records))
            self._records += [(tp, record) for tp, rows in records.items() for record in rows]

        await self._call("produce", write)
        return written

    async def send_offsets(self, offsets: Mapping[TopicPartition, Offset], group: str) -> None:
        async def send() -> None:
            await self._inner.send_offsets(offsets, group)

        await self._call("send_offsets", send, again=send)

    async def end(self, *, commit: bool) -> None:
        async def end() -> None:
            await self._inner.end(commit=commit)
            records, self._records = self._records, []
            if commit:
                self._line.watch.committed(self._line.process, records)

        await self._call("end", end)

    async def _call(self, name: str, what: Callable[[], Any], again: Callable[[], Any] | None = None) -> None:
        """``again``: what may arrive twice, as a request does whose first answer was late."""
        assert not self._failed, "A producer was used again after a call of it had failed."
        weather = self._line.weather
        self._failed = True
        await self._line.arrives(name)
        if name != "fence" and weather.strikes(weather.broker / 4, f"fenced: {name}"):
            raise ProducerFenced("The simulation let the transaction time out.")
        if name == "end" and weather.strikes(weather.broker, "EndTxn lost"):
            raise UnknownOutcome("The simulation lost EndTxn on its way.")
        try:
            await what()
        except ProducerFenced:
            weather.note(f"an old owner was fenced: {name}")
            raise
        if again is not None and weather.strikes(weather.broker, f"asked twice: {name}"):
            await again()
        if name == "end" and weather.strikes(weather.broker, "EndTxn's answer lost"):
            raise UnknownOutcome("The simulation lost the answer to EndTxn.")
        await self._line.returns(name)
        self._failed = False
