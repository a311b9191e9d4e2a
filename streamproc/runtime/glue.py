"""Faust's transport seam: consumer, producer and conductor that lead to our runtime instead of to Faust's fetcher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from faust.transport import base
from faust.types import TP, RecordMetadata
from faust.types.transports import ConsumerT
from mode import Service

from streamproc.core.partitioner import partition_of
from streamproc.core.types import TopicPartition
from streamproc.runtime.surface import header_pairs, topic_config
from streamproc.transport.contract import OutRecord, TopicSpec

if TYPE_CHECKING:
    from streamproc.runtime.runtime import Runtime

__all__ = ["FaustTransport"]


class Producer(base.Producer):
    """What Faust itself writes (replies, the leader topic, sends outside of agents), over our transport."""

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = self.app.runtime  # type: ignore[attr-defined]
        return runtime

    async def on_start(self) -> None:
        await self.runtime.open_transport()
        await super().on_start()

    async def on_stop(self) -> None:
        await super().on_stop()
        await self.runtime.close_transport()

    async def send(self, topic: str, key: bytes | None, value: bytes | None, partition: int | None,
                   timestamp: float | None, headers: Any, *, transactional_id: str | None = None) -> Any:  # fmt: skip
        done = self.loop.create_future()
        done.set_result(await self.send_and_wait(topic, key, value, partition, timestamp, headers))
        return done

    async def send_and_wait(self, topic: str, key: bytes | None, value: bytes | None, partition: int | None,
                            timestamp: float | None, headers: Any, *, transactional_id: str | None = None,
                            ) -> RecordMetadata:  # fmt: skip
        count = await self.runtime.partition_count(topic)
        if partition is None:
            partition = partition_of(key, count) if key is not None else self.runtime.next_partition(topic) % count
        tp = TopicPartition(topic, partition)
        at_ms = None if timestamp is None else round(timestamp * 1000)
        offsets = await self.runtime.transport.send({tp: [OutRecord(key, value, header_pairs(headers), at_ms)]})
        return RecordMetadata(topic, partition, TP(topic, partition), offsets[tp])

    async def create_topic(self, topic: str, partitions: int, replication: int, *, config: Mapping[str, Any] | None = None,
                           timeout: Any = 0, retention: Any = None, compacting: bool | None = None,
                           deleting: bool | None = None, ensure_created: bool = False) -> None:  # fmt: skip
        settings = topic_config(config, retention, compacting, deleting)
        await self.runtime.transport.create_topics([TopicSpec(topic, partitions, settings)])

    def key_partition(self, topic: str, key: bytes) -> TP:
        return TP(topic, partition_of(key, self.runtime.known_partitions(topic)))

    async def flush(self) -> None:
        await self.buffer.flush()

    def supports_headers(self) -> bool:
        return True


class Consumer(Service, ConsumerT):
    """Faust's view of what the runtime does: the partitions it holds and the callbacks of a rebalance, and no records."""

    transactions: Any = None
    in_transaction = False
    commit_interval = 0.0
    scheduler: Any = None

    def __init__(self, transport: Any, callback: Any, on_partitions_revoked: Any, on_partitions_assigned: Any, *,
                 commit_interval: float | None = None, loop: Any = None, **kwargs: Any) -> None:  # fmt: skip
        self.transport, self.app, self.callback = transport, transport.app, callback
        self.call_revoked, self.call_assigned = on_partitions_revoked, on_partitions_assigned
        self.randomly_assigned_topics: set[str] = set()
        self._unacked_messages: set[Any] = set()
        super().__init__(loop=loop, **kwargs)

    @property
    def runtime(self) -> Runtime:
        runtime: Runtime = self.app.runtime
        return runtime

    async def subscribe(self, topics: Iterable[str]) -> None:
        await self.runtime.subscribe(set(topics))

    def assignment(self) -> set[TP]:
        return {TP(*tp) for tp in self.runtime.assignment()}

    async def wait_empty(self) -> None:
        await self.runtime.close_tasks()

    async def commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        self.runtime.commit_now()
        return True

    async def on_task_error(self, exc: BaseException) -> None:
        """The task of the failing agent deals with it."""

    async def create_topic(self, *args: Any, **kwargs: Any) -> None:
        await self.app.producer.create_topic(*args, **kwargs)

    def topic_partitions(self, topic: str) -> int | None:
        return self.runtime.known_partitions(topic)

    def key_partition(self, topic: str, key: bytes | None, partition: int | None = None) -> int | None:
        if partition is not None or key is None:
            return partition
        return partition_of(key, self.runtime.known_partitions(topic))

    async def earliest_offsets(self, *partitions: TP) -> dict[TP, int]:
        found = await self.runtime.transport.offsets([TopicPartition(*tp) for tp in partitions])
        return {TP(*tp): int(at.begin) for tp, at in found.items()}

    async def highwaters(self, *partitions: TP) -> dict[TP, int]:
        found = await self.runtime.transport.offsets([TopicPartition(*tp) for tp in partitions])
        return {TP(*tp): int(at.end) for tp, at in found.items()}

    @property
    def unacked(self) -> set[Any]:
        return self._unacked_messages

    # What Faust's own fetcher and acknowledgements would need; nothing of it runs here.
    async def getmany(self, timeout: float) -> Any: ...
    async def perform_seek(self) -> None: ...
    async def seek(self, partition: TP, offset: int) -> None: ...
    async def seek_wait(self, partitions: Mapping[TP, int]) -> None: ...
    async def position(self, tp: TP) -> int | None: ...
    def track_message(self, message: Any) -> None: ...
    def ack(self, message: Any) -> bool:
        return True

    def highwater(self, tp: TP) -> int:
        return 0

    def stop_flow(self) -> None: ...
    def resume_flow(self) -> None: ...
    def pause_partitions(self, tps: Iterable[TP]) -> None: ...
    def resume_partitions(self, tps: Iterable[TP]) -> None: ...
    def close(self) -> None: ...
    def verify_recovery_event_path(self, now: float, tp: TP) -> None: ...
    def on_buffer_full(self, tp: TP) -> None: ...
    def on_buffer_drop(self, tp: TP) -> None: ...


class FaustTransport(base.Transport):
    """Found by `App.transport`; an entry point would replace Faust's own for every app installed."""

    Producer = Producer
    Consumer = Consumer
    driver_version = "streamproc"
    default_port = 9092
