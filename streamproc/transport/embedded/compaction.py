"""Compaction of the embedded log: the last record of each key stays, at its offset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from streamproc.avro.recordbatch import parse, rewrite
from streamproc.core.batch import I64, RawBatch
from streamproc.core.clock import Clock
from streamproc.core.limits import COMPACT_AT_START_S, COMPACT_BYTES_MIN
from streamproc.core.types import Offset
from streamproc.transport.embedded.file import LogFile
from streamproc.transport.embedded.topics import Partition, Topics

__all__ = ["compact", "compact_dirtiest"]

_IDS_SQL: Final = "SELECT rowid FROM batches WHERE partition_id = ? AND last_offset < ? ORDER BY last_offset"
_ROW_SQL: Final = "SELECT last_offset, control, written_ms, bytes FROM batches WHERE rowid = ?"
_SIZE_SQL: Final = """SELECT total(length(bytes) * (last_offset >= ?)), total(length(bytes))
    FROM batches WHERE partition_id = ?"""


def compact(file: LogFile, partition: Partition, now_ms: int) -> int:
    """Compact what lies below the last stable offset, in one atomic write; returns how many records went.

    Markers go as well: a gap of offsets says the same to a reader. A tombstone goes once its batch was *written*
    `delete.retention.ms` ago; its own timestamp may be an event's, of any age.
    """
    stable = partition.stable
    ids = [rowid for (rowid,) in file.read(_IDS_SQL, (partition.id, stable))]
    last = _last_offsets(file, partition, ids)
    horizon_ms = now_ms - int(partition.setting("delete.retention.ms"))
    dropped = 0
    with file.write() as db:
        for rowid, last_offset, written_ms, batch in _batches(file, partition, ids):
            kept = _kept(batch, last, tombstones=written_ms > horizon_ms) if batch else np.empty(0, np.int64)
            dropped += len(batch) - len(kept) if batch else 0
            if not len(kept):
                db.execute("DELETE FROM batches WHERE rowid = ?", (rowid,))
            elif batch and len(kept) < len(batch):
                data = rewrite(batch, kept, last_offset)
                base = int(batch.offsets[kept[0]])
                db.execute("UPDATE batches SET bytes = ?, base_offset = ? WHERE rowid = ?", (data, base, rowid))
        db.execute("UPDATE partitions SET cleaned = ?, next = ? WHERE id = ?", (stable, partition.next, partition.id))
    partition.cleaned = stable
    return dropped


def compact_dirtiest(file: LogFile, topics: Topics, clock: Clock) -> None:
    """At start: compact where more than half was never compacted, for a bounded time."""
    give_up_s = clock.monotonic_s() + COMPACT_AT_START_S
    for topic in topics:
        for partition in topics.partitions(topic):
            if clock.monotonic_s() >= give_up_s:
                return
            if partition.compacted and partition.cleaned < partition.stable:
                dirty, total = next(file.read(_SIZE_SQL, (partition.cleaned, partition.id)))
                if dirty >= COMPACT_BYTES_MIN and dirty > total / 2:
                    compact(file, partition, clock.now_ms())


def _batches(file: LogFile, partition: Partition, ids: list[int]) -> Iterator[tuple[int, int, int, RawBatch | None]]:
    """Row id, last offset, time of writing and records (None: a marker), one in memory at a time."""
    for rowid in ids:
        last_offset, control, written_ms, data = next(file.read(_ROW_SQL, (rowid,)))
        batch = None if control else parse(partition.tp, data, position=Offset(partition.begin))
        yield rowid, last_offset, written_ms, batch


def _last_offsets(file: LogFile, partition: Partition, ids: list[int]) -> dict[bytes | None, int]:
    last: dict[bytes | None, int] = {}
    for _, _, _, batch in _batches(file, partition, ids):
        if batch:
            last.update((batch.key(row), int(batch.offsets[row])) for row in range(len(batch)))
    return last


def _kept(batch: RawBatch, last: dict[bytes | None, int], *, tombstones: bool) -> I64:
    rows = (
        row
        for row in range(len(batch))
        if last[batch.key(row)] == batch.offsets[row] and (tombstones or batch.value_len[row] >= 0)
    )
    return np.fromiter(rows, np.int64)
