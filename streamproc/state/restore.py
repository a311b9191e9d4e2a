"""Bringing a store up to the end of its changelogs: by position, in bounded steps, resumable.

    open ──▶ check_store ──▶ resume ─────────────▶ restore from the stored positions
                       └──▶ wipe (store.wipe()) ─▶ restore from the start

A store may go on from where it was only if no tombstone that it lacks can have been compacted away meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

import numpy as np

from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock
from streamproc.core.errors import LogLost, invariant
from streamproc.core.types import Offset
from streamproc.state import changelog
from streamproc.state.contract import Store, StoreMeta, Writes

__all__ = ["RestoreProgress", "check_store", "restore", "why_wipe"]

Rows: TypeAlias = dict[bytes, bytes | None]
"""What changelogs said last of each key of the store; None: it is gone."""
Read: TypeAlias = Callable[[str, Offset], AsyncIterator[RawBatch]]


@dataclass(frozen=True)
class RestoreProgress:
    """How far the restore of one changelog is; told once before it begins and after each step."""

    topic: str
    start: Offset
    position: Offset
    target: Offset
    records: int
    """Records applied so far; fewer than offsets gone by, for the log is compacted."""
    seconds: float

    @property
    def records_per_s(self) -> float:
        return self.records / self.seconds if self.seconds > 0 else 0.0

    @property
    def done(self) -> bool:
        return self.position >= self.target


def check_store(
    meta: StoreMeta | None, *, log_id: str, epoch: int, begins: Mapping[str, int], ends: Mapping[str, int], now_ms: int
) -> Literal["resume", "wipe"]:
    """Whether a store with ``meta`` may go on under the commit record's ``log_id`` and ``epoch``; see `why_wipe`.

    ``begins`` and ``ends``: changelog topic -> first offset there and high watermark after the fence. Pure.
    """
    return (
        "resume"
        if why_wipe(meta, log_id=log_id, epoch=epoch, begins=begins, ends=ends, now_ms=now_ms) is None
        else "wipe"
    )


def why_wipe(
    meta: StoreMeta | None, *, log_id: str, epoch: int, begins: Mapping[str, int], ends: Mapping[str, int], now_ms: int
) -> str | None:
    """The reason to restore from the start, in words for the log; None: there is none."""
    if meta is None:
        return "the store is new"
    if meta.log_id != log_id:
        return f"the store is of another history ({meta.log_id}, the log is {log_id})"
    if meta.epoch > epoch:
        return f"the store holds epoch {meta.epoch}, ahead of the commit record's {epoch}"
    for topic, position in meta.applied.items():
        if topic not in ends:
            return f"the store holds rows of {topic}, which is no changelog of this task any more"
        if not begins[topic] <= position <= ends[topic]:
            return f"the store stands at {position} of {topic}, outside the log's {begins[topic]} to {ends[topic]}"
    age_ms = now_ms - meta.timestamp_ms
    if age_ms > limits.DELETE_RETENTION_MS // 2:
        return f"the store is {age_ms / 3_600_000:.0f} hours old: tombstones that it lacks may be gone from the log"
    return None


async def restore(
    store: Store,
    tables: Mapping[str, bytes],
    read: Read,
    targets: Mapping[str, Offset],
    *,
    log_id: str,
    epoch: int,
    clock: Clock,
    progress: Callable[[RestoreProgress], None],
) -> dict[str, int]:
    """Apply every changelog (topic -> its table's prefix) from the store's position to its target.

    Called after `check_store` (and `Store.wipe`, if it said so), with ``targets`` read just before. ``read(topic,
    start)`` ends by itself when its position has reached the target, also if the log's tail is markers or compacted
    away. ``epoch`` is the commit record's: at the end the store says that it holds it. Raises `LogLost` for a row of a
    later epoch. Each step writes rows, positions and meta at once: a crash goes on from the last step. Returns the
    position of each topic.
    """
    run = _Run(store, log_id, epoch, clock, progress, as_of_ms=clock.now_ms())
    meta = store.meta()
    invariant(meta is None or meta.log_id == log_id, "A store of another history was to be restored.")
    run.begin(meta, tables, targets)
    for topic, prefix in tables.items():
        await run.topic(topic, prefix, read, targets[topic])
    run.finish()
    return dict(run.applied)


@dataclass
class _Run:
    store: Store
    log_id: str
    epoch: int
    clock: Clock
    progress: Callable[[RestoreProgress], None]
    as_of_ms: int
    """When the targets were read: who has applied everything up to them is as fresh as that moment."""
    applied: dict[str, int] = field(default_factory=dict)
    seen_epoch: int = 0
    fresh_ms: dict[str, int] = field(default_factory=dict)
    """Per topic, the time from which on every tombstone behind the position was written; the least goes to the meta."""

    def begin(self, meta: StoreMeta | None, tables: Mapping[str, bytes], targets: Mapping[str, Offset]) -> None:
        invariant(tables.keys() <= targets.keys(), "A changelog has no target to be restored to.")
        self.applied = {topic: meta.applied.get(topic, 0) if meta else 0 for topic in tables}
        # A topic of which nothing is applied yet has no row that a lost tombstone could have removed.
        self.fresh_ms = {
            topic: meta.timestamp_ms if meta and self.applied[topic] else self.as_of_ms for topic in tables
        }
        self.seen_epoch = meta.epoch if meta else 0

    async def topic(self, topic: str, prefix: bytes, read: Read, target: Offset) -> None:
        start, began, records = Offset(self.applied[topic]), self.clock.monotonic_s(), 0

        def tell(position: int) -> None:
            seconds = self.clock.monotonic_s() - began
            self.progress(RestoreProgress(topic, start, Offset(position), target, records, seconds))

        tell(start)
        if start >= target:
            self.fresh_ms[topic] = max(self.fresh_ms[topic], self.as_of_ms)
            return
        rows, held, first = Rows(), 0, start == 0
        async for batch in read(topic, start):
            held += self._apply(batch, prefix, rows)
            records += len(batch)
            self.applied[topic] = int(batch.next_position)
            if len(batch):
                last_ms = int(batch.timestamps[-1])
                self.fresh_ms[topic] = last_ms if first else max(self.fresh_ms[topic], last_ms)
                first = False
            if held >= limits.RESTORE_WRITE_BYTES_MAX:
                self._write(rows)
                rows, held = Rows(), 0
                tell(self.applied[topic])
        self.applied[topic] = max(self.applied[topic], target)
        self.fresh_ms[topic] = max(self.fresh_ms[topic], self.as_of_ms)
        self._write(rows)
        tell(target)

    def finish(self) -> None:
        self.seen_epoch = self.epoch
        self._write({})

    def _apply(self, batch: RawBatch, prefix: bytes, rows: Rows) -> int:
        """Add a batch's rows, the later over the earlier; returns about how many bytes they hold."""
        if not len(batch):
            return 0
        keys, values, epochs, _ = changelog.read_columns(batch)
        latest = max(self.seen_epoch, int(epochs.max()))
        if latest > self.epoch:
            raise LogLost(
                f"Changelog {batch.tp.topic} partition {batch.tp.partition} holds epoch {latest}, ahead of the commit "
                f"record's {self.epoch}: the commits topic has lost records. Restore it, or start anew with "
                "`streamproc reset MODULE`."
            )
        self.seen_epoch = latest
        rows.update(zip(map(prefix.__add__, keys), values, strict=True))
        return int(batch.key_len.sum() + np.maximum(batch.value_len, 0).sum()) + len(prefix) * len(batch)

    def _write(self, rows: Rows) -> None:
        """One step of the store; ``rows`` are used up."""
        gone = {key for key, value in rows.items() if value is None}
        for key in gone:
            del rows[key]
        writes = Writes(cast(dict[bytes, bytes], rows), gone)
        fresh_ms = min(self.fresh_ms.values(), default=self.as_of_ms)
        applied = {topic: position for topic, position in self.applied.items() if position}
        self.store.write(writes, StoreMeta(self.log_id, self.seen_epoch, applied, fresh_ms))
