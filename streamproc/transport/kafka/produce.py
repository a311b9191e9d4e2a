"""Record batches to the leaders of their partitions, every acknowledgement checked; inside transactions and outside."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiokafka.protocol.produce import ProduceRequest  # type: ignore[import-untyped,unused-ignore]

from streamproc.avro import recordbatch
from streamproc.core import limits
from streamproc.core.errors import ProduceRefused, ProducerFenced, UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord
from streamproc.transport.kafka.codes import ASK_LEADER_AGAIN, FENCED, FORBIDDEN, TOO_LARGE, Code, name_of
from streamproc.transport.kafka.wire import NoAnswer, Retry, Wire, by_topic

__all__ = ["SEQUENCES", "Build", "Writing", "refusal"]

log = logging.getLogger(__name__)
Build = Callable[[Sequence[OutRecord], int], list[bytes]]
"""Records and the first one's sequence to record batches, as `recordbatch.split_build`."""
SEQUENCES: Final = 1 << 31
"""Sequence numbers are 31 bits wide and begin again at 0."""
_MARKERS_ON_THEIR_WAY: Final = frozenset({Code.CONCURRENT_TRANSACTIONS.name, Code.NOT_ENOUGH_REPLICAS.name})
"""What a leader says that cannot verify the transaction yet (KIP-890 words it as 'not enough replicas')."""
_PERHAPS_APPENDED: Final = frozenset({Code.REQUEST_TIMED_OUT, Code.NOT_ENOUGH_REPLICAS_AFTER_APPEND})
_ACKS_ALL: Final = -1
_REPLICATION_MS: Final = round(limits.REQUEST_TIMEOUT_S * 500)
"""How long a broker waits for its replicas: half of what we wait for the broker."""


def refusal(code: int, what: str, topic: str) -> Exception:
    """What a final error code means for the task."""
    if code in FENCED:
        return ProducerFenced(
            f"{what}: {name_of(code)}. Another owner has fenced this task, or its transaction or id timed out; "
            "the task starts again from its fence."
        )
    if code in FORBIDDEN:
        return UserError(f"{what}: {name_of(code)}.", remedy="Grant the application's Kafka user this right.")
    remedy = (
        "Write smaller records, or raise the topic's max.message.bytes."
        if code in TOO_LARGE
        else "Nothing of this epoch is committed; the broker's log says why."
    )
    return ProduceRefused(f"{what}: {name_of(code)}. {remedy}", topic=topic, too_large=code in TOO_LARGE)


@dataclass
class _Batch:
    """Bytes are kept for a retry: the same bytes with the same sequence are taken once."""

    records: Sequence[OutRecord]
    sequence: int
    data: bytes


@dataclass
class Writing:
    """One call's batches on their way. Each request carries one batch of a partition (the broker takes no more), one
    request per leader at a time, leaders in parallel.

    After `run`, and also after it raised, ``written`` says how many records of each partition were acknowledged, and
    ``unsure`` names those whose last batch may or may not be in the log: only a fence makes their producer usable
    again, since the broker would take other records under the same sequence for a repetition.
    """

    wire: Wire
    lane: Hashable
    transactional_id: str | None
    build: Build
    written: dict[TopicPartition, int] = field(default_factory=dict)
    last: dict[TopicPartition, Offset] = field(default_factory=dict)
    unsure: set[TopicPartition] = field(default_factory=set)
    _queues: dict[TopicPartition, deque[_Batch]] = field(default_factory=dict)

    async def run(
        self, records: Mapping[TopicPartition, Sequence[OutRecord]], sequences: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, Offset]:
        """Offsets of the last records. Raises as `TaskProducer.produce` does."""
        for tp, some in records.items():
            if some:
                self._queues[tp] = deque(self._batches(some, sequences.get(tp, 0)))
        retry = self._retry()
        while self._queues:
            leaders = await self.wire.leaders(list(self._queues), retry)
            answers = await asyncio.gather(
                *(self._exchange(node, tps) for node, tps in leaders.items()), return_exceptions=True
            )
            if failed := next((answer for answer in answers if isinstance(answer, BaseException)), None):
                raise failed
            whys = [answer for answer in answers if isinstance(answer, str)]
            if not whys:
                retry = self._retry()
                continue
            soon = all(why in _MARKERS_ON_THEIR_WAY for why in whys)
            if not soon:
                await self.wire.refresh()
            await retry.again(whys[0], soon=soon)
        return self.last

    def _retry(self) -> Retry:
        """Anew after each round that was taken: the limit is on standing still, not on the size of an epoch."""
        return Retry(self.wire.clock, "Writing records")

    async def _exchange(self, node: int, tps: list[TopicPartition]) -> str | None:
        """One request; None if all of it was taken, else why some must be sent again."""
        sending: list[tuple[TopicPartition, tuple[int, bytes]]] = []
        size = 0
        for tp in tps:
            data = self._queues[tp][0].data
            if sending and size + len(data) > limits.PRODUCE_REQUEST_BYTES_MAX:
                continue
            size += len(data)
            sending.append((tp, (tp.partition, data)))
        request = ProduceRequest(self.transactional_id, _ACKS_ALL, _REPLICATION_MS, by_topic(sending))
        try:
            answer = await self.wire.send(node, request, self.lane)
        except NoAnswer as error:
            if error.sent:
                self.unsure.update(tp for tp, _ in sending)
            return str(error)
        return self._read(answer, {tp for tp, _ in sending})

    def _read(self, answer: Any, sent: set[TopicPartition]) -> str | None:
        """Book every acknowledgement before anything is raised: sequences must be exact after a refusal."""
        again: str | None = None
        refused: Exception | None = None
        for topic, partitions in answer.topics:
            for partition, code, offset, *_ in partitions:
                tp = TopicPartition(topic, partition)
                sent.discard(tp)
                if code == Code.NONE and offset >= 0:
                    self._taken(tp, offset)
                elif code in TOO_LARGE and self._halve(tp):
                    continue
                elif code in ASK_LEADER_AGAIN:
                    again = name_of(code)
                    if code in _PERHAPS_APPENDED:
                        self.unsure.add(tp)
                elif code == Code.NONE:
                    refused = ProduceRefused(
                        f"{topic}[{partition}] acknowledged a batch without an offset. Nothing of it is committed.",
                        topic=topic,
                    )
                else:
                    refused = refusal(code, f"{topic}[{partition}] refused a batch", topic)
        if refused is not None:
            raise refused
        return f"no answer for {sent}" if sent else again

    def _taken(self, tp: TopicPartition, base: int) -> None:
        queue = self._queues[tp]
        count = len(queue.popleft().records)
        self.unsure.discard(tp)
        self.written[tp] = self.written.get(tp, 0) + count
        self.last[tp] = Offset(base + count - 1)
        if not queue:
            del self._queues[tp]

    def _halve(self, tp: TopicPartition) -> bool:
        """The batch may be too large for a topic that would take each of its records. False for a single record."""
        queue = self._queues[tp]
        records, sequence = queue[0].records, queue[0].sequence
        if len(records) == 1 or tp in self.unsure:
            return False
        half = len(records) // 2
        queue.popleft()
        parts = (
            *self._batches(records[:half], sequence),
            *self._batches(records[half:], (sequence + half) % SEQUENCES),
        )
        queue.extendleft(reversed(parts))
        return True

    def _batches(self, records: Sequence[OutRecord], sequence: int) -> Iterator[_Batch]:
        at = 0
        while at < len(records):
            # No batch may cross the end of the sequence numbers.
            some = records[at : at + SEQUENCES - sequence]
            for data in self.build(some, sequence):
                count = recordbatch.read_header(data).records
                # A producer's batches all begin at offset 0: the broker assigns the real ones. (No checksum covers it.)
                yield _Batch(records[at : at + count], sequence, bytes(8) + memoryview(data)[8:])
                at, sequence = at + count, (sequence + count) % SEQUENCES
