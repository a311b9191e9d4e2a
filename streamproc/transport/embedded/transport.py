"""`transport.contract.Transport` over the embedded log. All calls end within their own turn of the event loop, so a
simulation that orders the coroutines orders the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path

from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock
from streamproc.core.errors import BrokerUnavailable, ProducerFenced
from streamproc.core.limits import RETRY_BACKOFF_S_MAX
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord, PartitionOffsets, TopicSpec
from streamproc.transport.embedded.compaction import compact, compact_dirtiest
from streamproc.transport.embedded.fetcher import EmbeddedFetcher, Readers, read_between
from streamproc.transport.embedded.file import LogFile, Synchronous
from streamproc.transport.embedded.group import EmbeddedMembership, Group
from streamproc.transport.embedded.log import Log, ProducerState

__all__ = ["EmbeddedTransport"]

_FILE_NAME = "log.sqlite"


class EmbeddedTransport:
    """A log for one process in the SQLite file ``path`` (or in ``log.sqlite`` of the folder ``path``).

    After kill -9 the file holds what was committed, sent or created before, whole; ``synchronous`` "FULL" promises that
    for a power cut too. A disk that is full or fails raises `BrokerUnavailable`, with nothing of the call written.
    ``standby_replicas``: how many other members of a group keep a partition's state warm.
    """

    def __init__(
        self, path: Path, clock: Clock, *, synchronous: Synchronous = "FULL", standby_replicas: int = 0
    ) -> None:
        path = Path(path)
        self._clock = clock
        self._readers = Readers()
        self._file = LogFile(path / _FILE_NAME if path.is_dir() else path, synchronous)
        self._log = Log(self._file, clock, self._readers.changed)
        self._standby_replicas = standby_replicas
        self._groups: dict[str, Group] = {}
        self._fetchers: list[EmbeddedFetcher] = []
        self._expiring: asyncio.Task[None] | None = None

    @property
    def path(self) -> Path:
        return self._file.path

    async def start(self) -> None:
        """Raises `UserError` if the file is another process's, damaged or of something else."""
        self._file.open()
        self._log.load()
        compact_dirtiest(self._file, self._log.topics, self._clock)

    async def stop(self) -> None:
        if self._expiring:
            self._expiring.cancel()
            self._expiring = None
        for fetcher in self._fetchers:
            fetcher.abandon()
        self._fetchers.clear()
        self._file.close()

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        self._log.topics.create(specs)

    async def partitions(self, topic: str) -> int | None:
        return self._log.topics.count(topic)

    async def offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, PartitionOffsets]:
        return {tp: self._log.offsets(tp) for tp in tps}

    async def group_offsets(self, group: str, tps: Collection[TopicPartition]) -> dict[TopicPartition, Offset]:
        found = {tp: self._log.group_offset(group, tp) for tp in tps}
        return {tp: offset for tp, offset in found.items() if offset is not None}

    async def delete_topics(self, topics: Collection[str]) -> None:
        self._log.topics.delete(topics)

    async def members(self, group: str) -> int:
        return len(self._groups[group].members) if group in self._groups else 0

    async def delete_records(self, before: Mapping[TopicPartition, Offset]) -> None:
        self._log.delete_records(before)

    async def compact(self, topic: str) -> int:
        """Compact every partition of a topic with ``cleanup.policy=compact`` now; returns how many records went."""
        self._log.topics.require([topic])
        now_ms = self._clock.now_ms()
        partitions = [partition for partition in self._log.topics.partitions(topic) if partition.compacted]
        return sum(compact(self._file, partition, now_ms) for partition in partitions)

    def read(self, tp: TopicPartition, start: Offset, stop: Offset) -> AsyncIterator[RawBatch]:
        return read_between(self._log, self._readers, tp, start, stop)

    def fetcher(self) -> EmbeddedFetcher:
        self._fetchers.append(EmbeddedFetcher(self._log, self._readers))
        return self._fetchers[-1]

    def producer(self, transactional_id: str) -> EmbeddedProducer:
        return EmbeddedProducer(self._log, transactional_id, self._watch_deadlines)

    async def send(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        return self._log.send(records)

    def membership(self, group: str) -> EmbeddedMembership:
        if group not in self._groups:
            self._groups[group] = Group(self._log.topics, self._standby_replicas)
        return EmbeddedMembership(self._groups[group])

    def _watch_deadlines(self) -> None:
        if self._expiring is None or self._expiring.done():
            self._expiring = asyncio.get_running_loop().create_task(self._expire(), name="embedded deadlines")

    async def _expire(self) -> None:
        """Runs while transactions are open, asleep until the earliest deadline."""
        while True:
            try:
                left_s = self._log.expire()
            except BrokerUnavailable:
                left_s = RETRY_BACKOFF_S_MAX  # the disk is full; readers stay held back until it is not
            if left_s is None:
                return
            await self._clock.sleep(left_s)


class EmbeddedProducer:
    """`transport.contract.TaskProducer`: a transactional id and the epoch it was fenced with."""

    def __init__(self, log: Log, transactional_id: str, opened: Callable[[], None]) -> None:
        self._log, self._id, self._opened = log, transactional_id, opened
        self._state: ProducerState | None = None
        self._epoch = -1

    async def fence(self) -> None:
        self._state = self._log.fence(self._id)
        self._epoch = self._state.epoch

    async def produce(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        last = self._log.produce(self._fenced(), self._epoch, records)
        self._opened()
        return last

    async def send_offsets(self, offsets: Mapping[TopicPartition, Offset], group: str) -> None:
        self._log.add_offsets(self._fenced(), self._epoch, group, offsets)
        self._opened()

    async def end(self, *, commit: bool) -> None:
        self._log.end(self._fenced(), self._epoch, commit=commit)

    def _fenced(self) -> ProducerState:
        if self._state is None:
            raise ProducerFenced(f"The producer {self._id!r} has not been fenced yet: call fence() first.")
        return self._state
