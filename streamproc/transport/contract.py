"""What a transport is: an ordered log with transactions. Two implement it, `kafka` and `embedded`; one suite tests both.

A transport knows bytes, topics, offsets and transactions; it never decodes a value and never decides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, overload

from streamproc.avro.recordbatch import Columns, Spans, cut
from streamproc.core.batch import RawBatch, headers_of
from streamproc.core.types import Offset, TopicPartition

__all__ = [
    "Fetcher",
    "GroupListener",
    "Membership",
    "OutColumns",
    "OutRecord",
    "PartitionOffsets",
    "TaskProducer",
    "TopicSpec",
    "Transport",
]


class OutRecord(NamedTuple):
    """A record to be written. ``timestamp_ms`` None: the transport's clock at the moment of writing."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    timestamp_ms: int | None = None


class OutColumns(Sequence[OutRecord]):
    """Records to be written that are columns already, one part behind the other: their batches are built in one go. An
    `OutRecord` is made only of those that somebody asks for one by one."""

    def __init__(self, *parts: Columns) -> None:
        self.parts = parts
        self._count = sum(len(part.timestamps) for part in parts)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> OutRecord: ...
    @overload
    def __getitem__(self, at: slice) -> OutColumns: ...
    def __getitem__(self, at: int | slice) -> OutRecord | OutColumns:
        if isinstance(at, slice):
            lo, hi, _ = at.indices(len(self))
            return OutColumns(*cut(self.parts, lo, hi))
        at = range(len(self))[at]
        ((keys, values, headers, timestamps),) = cut(self.parts, at, at + 1)
        encoded = _bytes(headers)
        return OutRecord(_bytes(keys), _bytes(values), headers_of(encoded) if encoded else (), int(timestamps[0]))


def _bytes(spans: Spans) -> bytes | None:
    """Of one record."""
    start, length = int(spans.start[0]), int(spans.length[0])
    return None if length < 0 else spans.buffer[start : start + length].tobytes()


class PartitionOffsets(NamedTuple):
    """``begin`` is the first offset still there; ``stable`` ends what `read_committed` shows; ``end`` is the high watermark."""

    begin: Offset
    stable: Offset
    end: Offset


@dataclass(frozen=True)
class TopicSpec:
    """A topic to be made, or checked for drift if it is there. ``config`` in Kafka's own names."""

    name: str
    partitions: int
    config: Mapping[str, str] = field(default_factory=dict)


class Fetcher(Protocol):
    """Reads many partitions, `read_committed`, record sets whole; aborted ranges and control batches are already dropped."""

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        """Read (or go on reading) ``tp`` from ``position``. Whatever was fetched under an earlier call is never handed out."""

    def pause(self, tp: TopicPartition) -> None:
        """Hand out nothing more of ``tp``, not even what is on its way."""

    async def get(self) -> RawBatch:
        """The next batch of any resumed partition, waiting for one; never an empty one, except to move ``next_position``
        past markers. Fair between partitions. Raises `BrokerUnavailable` only after its named limit of retries,
        `LogLost` if a position is out of range (with topic, partition, position and what the log holds)."""

    def at_end(self, tp: TopicPartition) -> bool:
        """Whether the last fetch of ``tp`` said that its position had reached the end of the log (idleness rests on it)."""

    def lag(self, tp: TopicPartition) -> int | None:
        """Records between the position handed out and the end last seen, None before the first answer."""

    async def close(self) -> None: ...


class TaskProducer(Protocol):
    """The transactional producer of one task; a task failure throws it away. Not shared between coroutines.

    Each call is one awaited exchange that succeeds or raises. Retriable answers are asked again within
    `limits.RETRY_TOTAL_S`; then `BrokerUnavailable`.
    """

    async def fence(self) -> None:
        """InitProducerId: excludes the previous owner of the transactional id and settles its open transaction."""

    async def produce(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        """Write into the open transaction (opened by the first call); batches stay below `INTERNAL_BATCH_BYTES_MAX` unless
        one record is larger. Every acknowledgement is checked. Returns the offset of the *last* record per partition.
        Raises `ProduceRefused` (nothing may be committed any more) or `ProducerFenced`."""

    async def send_offsets(self, offsets: Mapping[TopicPartition, Offset], group: str) -> None:
        """Add the group's offsets to the open transaction. Raises `ProducerFenced`."""

    async def end(self, *, commit: bool) -> None:
        """EndTxn. With ``commit`` this is the commit. No answer within `REQUEST_TIMEOUT_S`: `UnknownOutcome`."""


Partitions = Collection[TopicPartition]


@dataclass(frozen=True)
class GroupListener:
    """Called by `Membership`; both are awaited before the rebalance goes on. What they raise reaches `Membership.failed`."""

    on_revoked: Callable[[Partitions], Awaitable[None]]
    on_assigned: Callable[[Partitions, int], Awaitable[None]]
    """The partitions now held, all of them, and the group's generation."""


class Membership(Protocol):
    """This worker's place in the consumer group. It moves partitions about and never reads a record."""

    async def start(self, topics: Collection[str], listener: GroupListener) -> None: ...

    def assignment(self) -> frozenset[TopicPartition]: ...

    def standbys(self) -> frozenset[TopicPartition]:
        """Partitions of other members whose tasks' state is to be kept warm here, as of the last assignment; never one of
        `assignment`. Asked inside ``on_assigned``, and only where `table_standby_replicas` is not 0."""

    async def confirm(self) -> bool:
        """A fresh heartbeat says that this member is still in the generation it was last given."""

    async def failed(self) -> BaseException:
        """Wait until the membership or a callback of the listener failed, and return that failure."""

    async def stop(self) -> None:
        """Leave the group; the listener's ``on_revoked`` runs first if partitions are held."""


class Transport(Protocol):
    """One per worker. All methods raise `BrokerUnavailable` after their named limit."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Make what is missing. A topic that is there with another partition count or another value of a setting in
        ``config``: `UserError` that names both values and the remedy."""

    async def partitions(self, topic: str) -> int | None:
        """Number of partitions, None if there is no such topic."""

    async def offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, PartitionOffsets]: ...

    async def group_offsets(self, group: str, tps: Collection[TopicPartition]) -> dict[TopicPartition, Offset]:
        """Committed offsets of the group; a partition without one is absent."""

    async def delete_topics(self, topics: Collection[str]) -> None:
        """Remove ``topics`` with all that is in them; one that is not there is passed over. On return `partitions` is None
        for each, so they can be made anew. `UserError` if the log does not allow it. For a person's orders only."""

    async def members(self, group: str) -> int:
        """How many members the consumer group has now, in all processes."""

    async def delete_records(self, before: Mapping[TopicPartition, Offset]) -> None:
        """Drop everything below the given offsets (trims repartition topics)."""

    def read(self, tp: TopicPartition, start: Offset, stop: Offset) -> AsyncIterator[RawBatch]:
        """Every committed record in [``start``, ``stop``), as batches; ends when the position has reached ``stop``, also
        when the tail is markers or compacted away. Starts at the log's begin if ``start`` lies before it."""

    def fetcher(self) -> Fetcher: ...

    def producer(self, transactional_id: str) -> TaskProducer: ...

    async def send(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        """Write outside any transaction, acknowledged by all replicas; returns the offset of the last record each."""

    def membership(self, group: str) -> Membership: ...
