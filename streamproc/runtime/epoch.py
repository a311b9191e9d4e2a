"""One epoch, as numbered in `docs/commit.md`: barrier, freeze, produce, EndTxn, WriteBatch, hand on.

There is one way through it and no other. If it raises before step 4 nothing of the epoch happened; if it raises in
step 4 only the next fence can tell; after step 4 the epoch is true, and whatever is missing is made up from the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streamproc.commit import record as commit_record
from streamproc.commit.record import CommitRecord
from streamproc.commit.start import least_positions, next_record
from streamproc.core.clock import Clock
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.runtime.work import EpochOverlay, StateTable, Work
from streamproc.state import changelog
from streamproc.state.contract import Store, StoreMeta, Writes
from streamproc.state.overlay import Changes
from streamproc.transport.contract import OutColumns, OutRecord, TaskProducer

__all__ = ["Committed", "EpochParts", "commit"]


@dataclass
class EpochParts:
    """What a commit works with; made at a task's start, thrown away with it."""

    task: TaskId
    group: str
    """The consumer group: its offsets are sent for lag tools."""
    commits: TopicPartition
    """Where the commit record goes."""
    work: Work
    tables: tuple[StateTable, ...]
    overlays: Mapping[str, EpochOverlay]
    store: Store
    producer: TaskProducer
    clock: Clock
    applied: dict[str, int]
    """Changelog topic -> position behind the last record that the store holds."""


@dataclass(frozen=True)
class Committed:
    """An epoch that is true: what its sinks are told."""

    record: CommitRecord
    changes: Mapping[str, Changes]
    applied: Mapping[str, int] = field(default_factory=dict)
    """Changelog topic -> position behind this epoch's records."""
    sent: Mapping[str, int] = field(default_factory=dict)
    """Topic -> records written to it."""
    written: Mapping[TopicPartition, Offset] = field(default_factory=dict)
    """The last offset of what was written to each partition."""


async def commit(parts: EpochParts, last: CommitRecord, *, starting: bool = False) -> Committed:
    """Commit what the work did since ``last``. With ``starting`` the incarnation goes up: the first act of a new owner."""
    work = parts.work
    # 1. Barrier: hand out nothing more and wait for what is handed out.
    await work.barrier()

    # 2. Freeze: outputs, one changelog record per changed key, the commit record.
    work.collect(last.epoch + 1)
    positions = work.positions()
    record = next_record(
        last,
        incarnation=last.incarnation + 1 if starting else last.incarnation,
        positions=positions,
        watermarks=work.watermarks(),
        changelogs=dict(parts.applied),
    )
    changes = {name: overlay.changes() for name, overlay in parts.overlays.items()}
    records = _records(parts, record, changes)

    # 3. Produce all of it and the group's offsets; every answer is checked, any failure leaves without EndTxn(commit).
    offsets = await parts.producer.produce(records)
    await parts.producer.send_offsets(least_positions(positions), parts.group)

    # 4. EndTxn. This is the commit.
    await parts.producer.end(commit=True)

    # 5. One WriteBatch: the frozen rows, the epoch, the positions, the time.
    applied = dict(parts.applied)
    for table in parts.tables:
        if (at := offsets.get(TopicPartition(table.changelog, parts.task.partition))) is not None:
            applied[table.changelog] = at + 1
    writes = Writes()
    for overlay in parts.overlays.values():
        overlay.writes(writes)
    parts.store.write(writes, StoreMeta(record.log_id, record.epoch, applied, parts.clock.now_ms()))
    parts.applied = applied

    # 6. Drop the overlay, resume the agents; the caller hands the epoch to the sinks.
    for overlay in parts.overlays.values():
        overlay.drop()
    work.committed(record)
    work.release()
    return Committed(record, changes, applied, _counts(records), offsets)


def _records(
    parts: EpochParts, record: CommitRecord, changes: Mapping[str, Changes]
) -> dict[TopicPartition, Sequence[OutRecord]]:
    records = dict(parts.work.outputs())
    for table in parts.tables:
        if rows := changes[table.name]:
            target = TopicPartition(table.changelog, parts.task.partition)
            columns = changelog.columns(rows, record.epoch, parts.clock.now_ms(), table=table.name)
            records[target] = OutColumns(columns)
    records[parts.commits] = [OutRecord(parts.task.group.encode(), commit_record.encode(record))]
    return records


def _counts(records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tp, rows in records.items():
        counts[tp.topic] = counts.get(tp.topic, 0) + len(rows)
    return counts
