"""The transactional producer of one task, request by request, over the one client that all tasks of a worker share.

InitProducerId (fence) → AddPartitionsToTxn, Produce (write) → AddOffsetsToTxn, TxnOffsetCommit (offsets) → EndTxn.
Each is one awaited exchange that succeeds or raises, so that a refused batch is seen before EndTxn and an unanswered
EndTxn is seen at all. Source: the Kafka protocol guide and KIP-98.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from aiokafka.protocol.transaction import (  # type: ignore[import-untyped,unused-ignore]
    AddOffsetsToTxnRequest,
    AddPartitionsToTxnRequest,
    EndTxnRequest,
    InitProducerIdRequest,
    TxnOffsetCommitRequest,
)

from streamproc.avro import recordbatch
from streamproc.core import limits
from streamproc.core.errors import (
    BrokerUnavailable,
    ProduceRefused,
    StreamprocError,
    UnknownOutcome,
    UserError,
    invariant,
)
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord
from streamproc.transport.kafka.codes import ASK_COORDINATOR_AGAIN, Code, name_of
from streamproc.transport.kafka.produce import SEQUENCES, Writing, refusal
from streamproc.transport.kafka.wire import Coordinator, NoAnswer, Retry, Wire, by_topic

__all__ = ["KafkaTaskProducer", "lane_of"]

_MOVED = {Code.NOT_COORDINATOR, Code.COORDINATOR_NOT_AVAILABLE}
_NOT_FENCED_YET = -1


class KafkaTaskProducer:
    """`TaskProducer` over Kafka.

    After any failure only `fence`, or `end(commit=False)`, may follow: every other call raises that failure again, so
    that no half of an epoch can commit. A `ProduceRefused` whose transaction was then aborted leaves it usable.
    """

    def __init__(self, wire: Wire, transactional_id: str) -> None:
        self._wire, self._id = wire, transactional_id
        self._lane = ("transactions", lane_of(transactional_id))
        self._producer_id = self._epoch = _NOT_FENCED_YET
        self._sequences: dict[TopicPartition, int] = {}
        self._joined: set[TopicPartition] = set()
        self._groups: set[str] = set()
        self._failed: BaseException | None = None
        self._exact = True
        """Whether ``_sequences`` are what the brokers hold."""

    async def fence(self) -> None:
        request = InitProducerIdRequest(self._id, limits.TRANSACTION_TIMEOUT_MS)
        answer = await self._ask("transaction", self._id, request, "InitProducerId", lambda got: [got.error_code])
        self._producer_id, self._epoch = answer.producer_id, answer.producer_epoch
        self._sequences, self._failed, self._exact = {}, None, True
        self._joined.clear()
        self._groups.clear()

    async def produce(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        records = {tp: some for tp, some in records.items() if some}
        with self._step():
            await self._join(records)
            writing = Writing(self._wire, self._lane, self._id, self._build)
            try:
                return await writing.run(records, self._sequences)
            finally:
                self._exact = not writing.unsure
                for tp, count in writing.written.items():
                    self._sequences[tp] = (self._sequences.get(tp, 0) + count) % SEQUENCES

    async def send_offsets(self, offsets: Mapping[TopicPartition, Offset], group: str) -> None:
        if not offsets:
            return
        with self._step():
            await self._ask(
                "transaction",
                self._id,
                AddOffsetsToTxnRequest(self._id, self._producer_id, self._epoch, group),
                f"AddOffsetsToTxn for group {group!r}",
                lambda got: [got.error_code],
            )
            self._groups.add(group)
            entries = by_topic((tp, (tp.partition, offset, "")) for tp, offset in offsets.items())
            await self._ask(
                "group",
                group,
                TxnOffsetCommitRequest(self._id, group, self._producer_id, self._epoch, entries),
                f"TxnOffsetCommit for group {group!r}",
                _partition_codes,
            )

    async def end(self, *, commit: bool) -> None:
        if self._failed is not None and commit:
            raise self._failed
        if not self._joined and not self._groups:
            return
        try:
            await self._end(commit)
        except BaseException as error:  # also a cancelled EndTxn has an unknown outcome
            self._failed = self._remembered(error)
            raise
        self._joined.clear()
        self._groups.clear()
        if isinstance(self._failed, ProduceRefused) and self._exact:
            self._failed = None

    async def _join(self, tps: Iterable[TopicPartition]) -> None:
        """Partitions enter the transaction before the first record goes to them."""
        new = [tp for tp in tps if tp not in self._joined]
        if not new:
            return
        await self._wire.leaders(new, Retry(self._wire.clock, "Looking for leaders"))
        entries = by_topic((tp, tp.partition) for tp in new)
        request = AddPartitionsToTxnRequest(self._id, self._producer_id, self._epoch, entries)
        await self._ask("transaction", self._id, request, f"AddPartitionsToTxn {new[0].topic}", _partition_codes)
        self._joined.update(new)

    def _build(self, records: Sequence[OutRecord], sequence: int) -> list[bytes]:
        return recordbatch.split_build(
            records,
            producer_id=self._producer_id,
            producer_epoch=self._epoch,
            base_sequence=sequence,
            transactional=True,
            now_ms=self._wire.clock.now_ms(),
        )

    async def _end(self, commit: bool) -> None:
        request = EndTxnRequest(self._id, self._producer_id, self._epoch, commit)
        what = f"EndTxn({'commit' if commit else 'abort'}) of {self._id!r}"
        retry = Retry(self._wire.clock, what)
        while True:
            try:
                node = await self._wire.coordinator("transaction", self._id)
                code = (await self._wire.send(node, request, self._lane)).error_code
            except NoAnswer as error:
                self._wire.forget_coordinator("transaction", self._id)
                if error.sent:
                    raise UnknownOutcome(f"{what} had no answer ({error}). The next fence settles it.") from error
                why = str(error)
            else:
                if code == Code.NONE:
                    return
                if code not in ASK_COORDINATOR_AGAIN:
                    raise refusal(code, what, self._id)
                why = name_of(code)
                if code in _MOVED:
                    self._wire.forget_coordinator("transaction", self._id)
            try:
                await retry.again(why, soon=why == Code.CONCURRENT_TRANSACTIONS.name)
            except BrokerUnavailable as error:
                raise UnknownOutcome(f"{error} The next fence settles it.") from error

    async def _ask(
        self, kind: Coordinator, key: str, request: Any, what: str, codes_of: Callable[[Any], list[int]]
    ) -> Any:
        """One exchange with a coordinator, found again as often as it moves, within `limits.RETRY_TOTAL_S`."""
        retry = Retry(self._wire.clock, f"{what} of {self._id!r}")
        while True:
            try:
                node = await self._wire.coordinator(kind, key)
                answer = await self._wire.send(node, request, self._lane)
            except NoAnswer as error:
                self._wire.forget_coordinator(kind, key)
                await retry.again(str(error))
                continue
            codes = [code for code in codes_of(answer) if code != Code.NONE]
            if not codes:
                return answer
            final = next((code for code in codes if code not in ASK_COORDINATOR_AGAIN), None)
            if final is not None:
                raise self._refusal(final, what)
            if not _MOVED.isdisjoint(codes):
                self._wire.forget_coordinator(kind, key)
            soon = Code.CONCURRENT_TRANSACTIONS in codes
            await retry.again(name_of(codes[0]), soon=soon)

    def _refusal(self, code: int, what: str) -> Exception:
        if code == Code.INVALID_TRANSACTION_TIMEOUT:
            return UserError(
                f"The broker does not allow transactions of {limits.TRANSACTION_TIMEOUT_MS} ms.",
                remedy="Raise its transaction.max.timeout.ms to at least that (Kafka's default is 900000).",
            )
        return refusal(code, f"{what} of {self._id!r}", what)

    @contextmanager
    def _step(self) -> Iterator[None]:
        invariant(self._producer_id != _NOT_FENCED_YET, f"The producer of {self._id!r} was used before its fence.")
        if self._failed is not None:
            raise self._failed
        try:
            yield
        except BaseException as error:  # cancelled half-way: nobody knows what the broker has
            self._failed = self._remembered(error)
            raise

    def _remembered(self, error: BaseException) -> BaseException:
        if isinstance(error, StreamprocError):
            return error
        how = "was cancelled" if isinstance(error, asyncio.CancelledError) else f"failed with {error!r}"
        return UnknownOutcome(f"An exchange of {self._id!r} {how} half-way. The next fence settles it.")


def lane_of(transactional_id: str) -> int:
    """The connection, of `limits.TRANSACTION_LANES`, that a task's transactions go over: always the same, and another for
    neighbouring partitions (the low bits of a CRC alone give four of them only two)."""
    spread = zlib.crc32(transactional_id.encode())
    return (spread ^ spread >> 8 ^ spread >> 16 ^ spread >> 24) % limits.TRANSACTION_LANES


def _partition_codes(answer: Any) -> list[int]:
    return [code for _, partitions in answer.errors for _, code in partitions]
