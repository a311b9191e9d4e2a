"""The embedded log itself: partitions, transactions, producer epochs. Synchronous and short; nothing here awaits.

    produce ──▶ OpenTransaction (memory; offsets are taken, readers are held back)
                  │ commit: one SQLite write: batches, markers, group offsets, next offsets
                  │ abort, fence, time-out: one SQLite write: markers, next offsets
                  ▼
                batches (file)

Only one process can have the file, so its death is the death of every producer. An open transaction therefore needs
no place in the file: after a kill it is gone, which is what a fence would have made of it. Aborted records never reach
the file either; they leave a gap of offsets and a marker, as compaction of a broker's log would.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from streamproc.avro.recordbatch import control_marker, parse, read_header, split_build
from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock
from streamproc.core.errors import LogLost, ProduceRefused, ProducerFenced, UserError
from streamproc.core.limits import TRANSACTION_TIMEOUT_MS
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord, PartitionOffsets
from streamproc.transport.embedded.file import LogFile
from streamproc.transport.embedded.topics import Partition, Topics

__all__ = ["Log", "ProducerState"]

_EPOCH_MAX: Final = (1 << 15) - 1
"""A record batch has 16 bits for the epoch; behind it a transactional id gets a new producer id, as Kafka's do."""
_BATCH_SQL: Final = "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_FETCH_SQL: Final = """SELECT last_offset, bytes FROM batches
    WHERE partition_id = ? AND last_offset >= ? AND last_offset < ? ORDER BY last_offset"""
Records = Mapping[TopicPartition, Sequence[OutRecord]]
GroupOffsets = dict[tuple[str, TopicPartition], int]
Touched = frozenset[TopicPartition]


class Built(NamedTuple):
    """A batch with its place, ready to be a row."""

    base_offset: int
    last_offset: int
    data: bytes


@dataclass
class OpenTransaction:
    """Everything between the first produce (or offset) and the end."""

    deadline_s: float
    batches: dict[Partition, list[Built]] = field(default_factory=dict)
    offsets: GroupOffsets = field(default_factory=dict)
    refused: ProduceRefused | None = None


@dataclass
class ProducerState:
    """What a transaction coordinator knows of one transactional id."""

    transactional_id: str
    producer_id: int
    epoch: int
    open: OpenTransaction | None = None


class Log:
    """All partitions of one file. `on_change` is called with the partitions whose readable end or begin moved."""

    def __init__(self, file: LogFile, clock: Clock, on_change: Callable[[Touched], None]) -> None:
        self._file, self._clock, self._on_change = file, clock, on_change
        self.topics = Topics(file)
        self._producers: dict[str, ProducerState] = {}
        self._producer_id_next = 0

    def load(self) -> None:
        """Read what the file holds, after it was opened."""
        self.topics.load()
        rows = self._file.read("SELECT transactional_id, producer_id, epoch FROM producers")
        self._producers = {name: ProducerState(name, producer_id, epoch) for name, producer_id, epoch in rows}
        self._producer_id_next = 1 + max((state.producer_id for state in self._producers.values()), default=0)

    # What is read

    def offsets(self, tp: TopicPartition) -> PartitionOffsets:
        partition = self.topics.partition(tp)
        return PartitionOffsets(Offset(partition.begin), Offset(partition.stable), Offset(partition.next))

    def group_offset(self, group: str, tp: TopicPartition) -> Offset | None:
        sql = "SELECT position FROM group_offsets WHERE name = ? AND topic = ? AND partition = ?"
        return next((Offset(position) for (position,) in self._file.read(sql, (group, *tp))), None)

    def fetch(self, tp: TopicPartition, position: int, bytes_max: int) -> RawBatch:
        """Committed records from ``position`` on, about ``bytes_max`` of them, at least one batch if there is one.

        Raises `LogLost` if the position is not in the log.
        """
        partition = self.topics.partition(tp)
        if not partition.begin <= position <= partition.next:
            raise LogLost(
                f"Position {position} of {tp.topic}[{tp.partition}] is out of range: the log holds "
                f"{partition.begin} to {partition.next}. Records were deleted before they were read; start anew "
                "with what is left by `streamproc reset MODULE`."
            )
        pieces: list[bytes] = []
        size, last, cut = 0, -1, False
        for last_offset, data in self._file.read(_FETCH_SQL, (partition.id, position, partition.stable)):
            if pieces and size + len(data) > bytes_max:
                cut = True
                break
            pieces.append(data)
            size, last = size + len(data), last_offset
        batch = parse(tp, b"".join(pieces), position=Offset(position))
        if not cut and batch.next_position > last:
            # Behind the last batch there may be offsets of aborted or compacted records.
            batch.next_position = Offset(max(position, partition.stable))
        return batch

    # What is written

    def send(self, records: Records) -> dict[TopicPartition, Offset]:
        built = self._build(records, None)
        now_ms = self._clock.now_ms()
        with self._file.write() as db:
            self._insert(db, built, -1, False, now_ms)
            _update_next(db, {partition: batches[-1].last_offset + 1 for partition, batches in built.items()})
        return self._advance(built)

    def fence(self, transactional_id: str) -> ProducerState:
        """The next epoch of the id; the previous owner's open transaction is aborted in the same write."""
        state = self._producers.get(transactional_id)
        producer_id, epoch = (state.producer_id, state.epoch + 1) if state else (self._producer_id_next, 0)
        if epoch > _EPOCH_MAX:
            producer_id, epoch = self._producer_id_next, 0
        opened = list(state.open.batches) if state and state.open else []
        with self._file.write() as db:
            if state:
                self._mark(db, opened, state, commit=False)
            db.execute("INSERT OR REPLACE INTO producers VALUES (?, ?, ?)", (transactional_id, producer_id, epoch))
        if state:
            self._close(state, opened)
            state.producer_id, state.epoch = producer_id, epoch
        else:
            state = self._producers[transactional_id] = ProducerState(transactional_id, producer_id, epoch)
        self._producer_id_next = max(self._producer_id_next, producer_id + 1)
        return state

    def produce(self, state: ProducerState, epoch: int, records: Records) -> dict[TopicPartition, Offset]:
        """Into the open transaction: offsets are taken now, the records wait in memory for the commit."""
        transaction = self._transaction(state, epoch)
        try:
            built = self._build(records, state)
        except ProduceRefused as refused:
            transaction.refused = refused
            raise
        for partition, batches in built.items():
            transaction.batches.setdefault(partition, []).extend(batches)
            partition.open.setdefault(state.producer_id, batches[0].base_offset)
        return self._advance(built)

    def add_offsets(
        self, state: ProducerState, epoch: int, group: str, offsets: Mapping[TopicPartition, Offset]
    ) -> None:
        self._transaction(state, epoch).offsets.update({(group, tp): offset for tp, offset in offsets.items()})

    def end(self, state: ProducerState, epoch: int, *, commit: bool) -> None:
        """Commit or abort in one write. If that write fails the transaction is as open as before."""
        self._check(state, epoch)
        transaction = state.open
        if transaction is None:
            return
        if commit and transaction.refused:
            raise transaction.refused
        partitions = list(transaction.batches)
        with self._file.write() as db:
            if commit:
                self._insert(db, transaction.batches, state.producer_id, True, self._clock.now_ms())
                rows = [(group, *tp, offset) for (group, tp), offset in transaction.offsets.items()]
                db.executemany("INSERT OR REPLACE INTO group_offsets VALUES (?, ?, ?, ?)", rows)
            self._mark(db, partitions, state, commit=commit)
        self._close(state, partitions)

    def expire(self) -> float | None:
        """Abort and fence what is open for too long; seconds until the next deadline, None if nothing is open."""
        now_s = self._clock.monotonic_s()
        for state in list(self._producers.values()):
            if state.open and state.open.deadline_s <= now_s:
                self.fence(state.transactional_id)
        deadlines = [state.open.deadline_s for state in self._producers.values() if state.open]
        return min(deadlines) - now_s if deadlines else None

    def delete_records(self, before: Mapping[TopicPartition, Offset]) -> None:
        moved: dict[Partition, Offset] = {}
        for tp, offset in before.items():
            partition = self.topics.partition(tp)
            if offset > partition.next:
                raise UserError(
                    f"{tp.topic}[{tp.partition}] cannot be deleted up to {offset}: it ends at {partition.next}.",
                    remedy="Give an offset within the log.",
                )
            if offset > partition.begin:
                moved[partition] = offset
        if not moved:
            return
        with self._file.write() as db:
            for partition, offset in moved.items():
                db.execute("DELETE FROM batches WHERE partition_id = ? AND last_offset < ?", (partition.id, offset))
                db.execute(
                    "UPDATE partitions SET begin = ?, next = ? WHERE id = ?", (offset, partition.next, partition.id)
                )
        for partition, offset in moved.items():
            partition.begin = offset
        self._on_change(frozenset(partition.tp for partition in moved))

    # Steps

    def _transaction(self, state: ProducerState, epoch: int) -> OpenTransaction:
        self._check(state, epoch)
        if state.open is None:
            state.open = OpenTransaction(self._clock.monotonic_s() + TRANSACTION_TIMEOUT_MS / 1000)
        return state.open

    def _check(self, state: ProducerState, epoch: int) -> None:
        if state.epoch != epoch:
            raise ProducerFenced(
                f"Epoch {epoch} of transactional id {state.transactional_id!r} is over, the current one is "
                f"{state.epoch}: the task has a new owner, or its transaction was open for more than "
                f"{TRANSACTION_TIMEOUT_MS} ms."
            )

    def _build(self, records: Records, state: ProducerState | None) -> dict[Partition, list[Built]]:
        """Batches at the next offsets of their partitions, checked as a broker would; nothing is changed yet."""
        built, now_ms = {}, self._clock.now_ms()
        for tp, rows in records.items():
            if not rows:
                continue
            partition = self.topics.find(tp)
            if partition is None:
                raise ProduceRefused(f"There is no {tp.topic}[{tp.partition}] to write to.", topic=tp.topic)
            if partition.compacted and any(row.key is None for row in rows):
                raise ProduceRefused(f"A record without a key cannot go to compacted {tp.topic!r}.", topic=tp.topic)
            batches = split_build(
                rows, base_offset=partition.next, now_ms=now_ms, transactional=state is not None,
                producer_id=state.producer_id if state else -1, producer_epoch=state.epoch if state else -1,
            )  # fmt: skip
            built[partition] = [self._checked(partition, data) for data in batches]
        return built

    def _checked(self, partition: Partition, data: bytes) -> Built:
        if len(data) > partition.message_bytes_max:
            raise ProduceRefused(
                f"A record batch of {len(data)} bytes is too large for {partition.tp.topic!r}, whose max.message.bytes "
                f"is {partition.message_bytes_max}: write smaller records or raise the setting.",
                topic=partition.tp.topic,
                too_large=True,
            )
        head = read_header(data)
        return Built(head.base_offset, head.last_offset, data)

    def _insert(
        self,
        db: sqlite3.Connection,
        built: Mapping[Partition, list[Built]],
        producer_id: int,
        transactional: bool,
        now_ms: int,
    ) -> None:
        db.executemany(_BATCH_SQL, _rows(built, producer_id, transactional, now_ms))

    def _mark(
        self, db: sqlite3.Connection, partitions: Sequence[Partition], state: ProducerState, *, commit: bool
    ) -> None:
        """A marker at the next offset of each partition of the transaction."""
        now_ms = self._clock.now_ms()
        for partition in partitions:
            at = partition.next
            data = control_marker(commit, state.producer_id, state.epoch, base_offset=at, now_ms=now_ms)
            db.execute(_BATCH_SQL, (partition.id, at, at, state.producer_id, 1, 1, now_ms, data))
        _update_next(db, {partition: partition.next + 1 for partition in partitions})

    def _close(self, state: ProducerState, partitions: Sequence[Partition]) -> None:
        """The file has the markers: let memory follow."""
        state.open = None
        for partition in partitions:
            partition.next += 1
            del partition.open[state.producer_id]
        self._on_change(frozenset(partition.tp for partition in partitions))

    def _advance(self, built: Mapping[Partition, list[Built]]) -> dict[TopicPartition, Offset]:
        for partition, batches in built.items():
            partition.next = batches[-1].last_offset + 1
        self._on_change(frozenset(partition.tp for partition in built))
        return {partition.tp: Offset(batches[-1].last_offset) for partition, batches in built.items()}


def _rows(
    built: Mapping[Partition, list[Built]], producer_id: int, transactional: bool, now_ms: int
) -> Iterator[tuple[Any, ...]]:
    for partition, batches in built.items():
        for base, last, data in batches:
            yield (partition.id, last, base, producer_id, int(transactional), 0, now_ms, data)


def _update_next(db: sqlite3.Connection, ends: Mapping[Partition, int]) -> None:
    db.executemany("UPDATE partitions SET next = ? WHERE id = ?", [(end, p.id) for p, end in ends.items()])
