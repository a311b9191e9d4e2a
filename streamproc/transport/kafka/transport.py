"""Kafka as a transport: the parts in this package behind the one interface that the runtime knows."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord, PartitionOffsets, TopicSpec
from streamproc.transport.kafka.admin import Admin
from streamproc.transport.kafka.fetch import KafkaFetcher
from streamproc.transport.kafka.group import KafkaMembership
from streamproc.transport.kafka.quiet import quieten
from streamproc.transport.kafka.txn import KafkaTaskProducer
from streamproc.transport.kafka.wire import Wire

__all__ = ["KafkaTransport"]


class KafkaTransport:
    """`Transport` over an Apache Kafka cluster (2.5 or later; tested on 4.1).

    ``bootstrap``: ``"kafka://a:9092,b:9092"``, with or without the scheme, or a list; `UserError` if it is none.
    ``security``: keyword arguments of aiokafka's clients (``security_protocol``, ``ssl_context``, ``sasl_*``).
    ``assignor``: a partition assignor in aiokafka's sense, for example Faust's copartitioned one; by default partition
    numbers go to members in ranges, the same for all topics. ``replication_factor`` of topics made here; -1 is the
    broker's default. The three times are those of the group protocol. ``instance_id`` makes this member of its groups a
    static one (`group.instance.id`); no other process may have the same.
    """

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        clock: Clock,
        *,
        client_id: str = "streamproc",
        assignor: Any = None,
        instance_id: str | None = None,
        security: Mapping[str, Any] | None = None,
        replication_factor: int = -1,
        session_timeout_s: float = limits.SESSION_TIMEOUT_S,
        heartbeat_interval_s: float = limits.HEARTBEAT_S,
        rebalance_timeout_s: float = limits.REBALANCE_TIMEOUT_S,
    ) -> None:
        self._clock = clock
        self._wire = Wire(bootstrap, clock, client_id=client_id, security=security or {})
        self._admin = Admin(self._wire, replication_factor)
        self._assignor, self._instance_id = assignor, instance_id
        self._timeouts = {
            "session_timeout_s": session_timeout_s,
            "heartbeat_interval_s": heartbeat_interval_s,
            "rebalance_timeout_s": rebalance_timeout_s,
        }
        self._numbers = itertools.count()
        self._fetchers: list[KafkaFetcher] = []
        self._memberships: list[KafkaMembership] = []

    async def start(self) -> None:
        """Raises `BrokerUnavailable` naming the address when no broker answers within `limits.RETRY_TOTAL_S`."""
        quieten(self._clock)
        await self._wire.start()

    async def stop(self) -> None:
        """Leaves groups that were not left, ends fetches, closes all connections."""
        for membership in self._memberships:
            await membership.stop()
        for fetcher in self._fetchers:
            await fetcher.close()
        self._memberships.clear()
        self._fetchers.clear()
        await self._wire.stop()

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        await self._admin.create_topics(specs)

    async def partitions(self, topic: str) -> int | None:
        return await self._admin.partitions(topic)

    async def offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, PartitionOffsets]:
        return await self._admin.offsets(tps)

    async def group_offsets(self, group: str, tps: Collection[TopicPartition]) -> dict[TopicPartition, Offset]:
        return await self._admin.group_offsets(group, tps)

    async def delete_topics(self, topics: Collection[str]) -> None:
        await self._admin.delete_topics(topics)

    async def members(self, group: str) -> int:
        return await self._admin.members(group)

    async def delete_records(self, before: Mapping[TopicPartition, Offset]) -> None:
        await self._admin.delete_records(before)

    async def read(self, tp: TopicPartition, start: Offset, stop: Offset) -> AsyncIterator[RawBatch]:
        position = max(start, (await self._admin.offsets([tp]))[tp].begin)
        if position >= stop:
            return
        lane = ("reads", next(self._numbers) % limits.READ_LANES)
        fetcher = KafkaFetcher(self._wire, lane, bytes_max=limits.READ_BUFFER_BYTES_MAX)
        try:
            fetcher.resume(tp, position)
            while position < stop:
                batch = await fetcher.get()
                position = batch.next_position
                if position > stop:
                    batch = batch.rows(0, int(np.searchsorted(batch.offsets, stop)))
                if len(batch):
                    yield batch
        finally:
            await fetcher.close()

    def fetcher(self) -> KafkaFetcher:
        fetcher = KafkaFetcher(self._wire, ("fetch", next(self._numbers)))
        self._fetchers.append(fetcher)
        return fetcher

    def producer(self, transactional_id: str) -> KafkaTaskProducer:
        return KafkaTaskProducer(self._wire, transactional_id)

    async def send(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        """At least once: a batch whose acknowledgement was lost is written again."""
        return await self._admin.send(records)

    def membership(self, group: str) -> KafkaMembership:
        membership = KafkaMembership(
            self._wire, group, assignor=self._assignor, instance_id=self._instance_id,
            partitions=self._admin.partitions, **self._timeouts,
        )  # fmt: skip
        self._memberships.append(membership)
        return membership
