"""python -m benchmarks restore --records 2000000 --transport kafka

How fast a task gets its state back, and how soon a worker that has it does its first work. A worker fills a table with a
row for every order; then each task's store is restored from its changelog into an empty folder, by the function that a
task's start calls; then the worker is started again on its own warm folder, with new orders waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec

from benchmarks.marks import TOPIC, Settings
from benchmarks.memory_job import FIRST, TABLE, build
from benchmarks.memory_rows import live_rows, wrong_rows
from benchmarks.orders import PARTITIONS, Orders, orders
from benchmarks.parts import FULL_RECORDS, Log, Say, started_log, temporary_folder
from benchmarks.reports import Line, facts, parser
from benchmarks.reports import main as report
from benchmarks.worker import measure
from streamproc.commit.record import CommitRecord
from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock, SystemClock
from streamproc.core.errors import UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime.start import GroupPlan, last_commit
from streamproc.state.overlay import table_prefix, table_stop
from streamproc.state.restore import RestoreProgress, restore
from streamproc.state.rocksdb import RocksDBStore
from streamproc.transport.contract import Transport

__all__ = ["Restored", "main"]

LATER_RECORDS: Final = 1_000
"""What waits for the second start."""
COMMIT_INTERVAL_S: Final = 0.25
COMMIT_INTERVAL_START_S: Final = 0.02
"""Of the second start: its first commit must not be what is waited for."""


@dataclass(frozen=True)
class Restored:
    """What the restore of all tasks of a table took."""

    records: int
    cpu_s: float
    wall_s: float
    bytes: int
    wrong: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Exit code 1: a restored row, or one of the second start, is wrong."""
    made = parser("restore", "Changelog records restored per CPU-second, and start to first record.")
    made.add_argument(
        "--records", type=int, default=FULL_RECORDS, help="orders, nearly as many rows (default %(default)s)"
    )
    return report(made.parse_args(argv), run)


def run(given: argparse.Namespace, say: Say) -> Line:
    """Blocks for minutes."""
    clock, input_ = SystemClock(), orders(given.records + LATER_RECORDS)
    with temporary_folder() as folder, started_log(given.transport, folder) as log:
        number = uuid4().hex[:8]
        told = Settings(log.broker, str(folder / "state"), f"benchmark-restore-{number}", f"{TOPIC}-{number}",
                        records=given.records, commit_interval_s=COMMIT_INTERVAL_S)  # fmt: skip
        say(f"filling a table from {given.records:,} orders")
        asyncio.run(log.produce(told.topic, _part(input_, 0, given.records)))
        measure("memory_job", told, clock)
        say("restoring it into empty folders")
        found = asyncio.run(_restore(log, told, folder / "restored", clock))
        say("starting the worker on its own folder")
        asyncio.run(log.produce(told.topic, _part(input_, given.records, len(input_))))
        again = msgspec.structs.replace(told, records=len(input_), commit_interval_s=COMMIT_INTERVAL_START_S)
        start_s = _start_s(again, clock)
        say("comparing the rows")
        wrong = [*found.wrong, *asyncio.run(_wrong(log, again, input_.parquet))]
        return {
            "name": "restore",
            "transport": given.transport,
            "records": found.records,
            "restore_cpu_s": round(found.cpu_s, 3),
            "records_per_restore_cpu_s": round(found.records / found.cpu_s),
            "restore_wall_s": round(found.wall_s, 3),
            "changelog_mb": round(found.bytes / 1e6, 1),
            "start_to_first_commit_s": round(start_s, 3),
            **facts(log, wrong),
        }


def _part(whole: Orders, begin: int, end: int) -> Orders:
    at = int(whole.ends[begin - 1]) if begin else 0
    rows = slice(begin, end)
    values = whole.values[at : int(whole.ends[end - 1])]
    return replace(
        whole, values=values, ends=whole.ends[rows] - at, users=whole.users[rows], partitions=whole.partitions[rows]
    )


def _start_s(told: Settings, clock: Clock) -> float:
    """From the start of the process to the first commit with orders: a commit interval more than to the first record."""
    note = Path(told.folder) / FIRST
    note.unlink()
    began_ms = clock.now_ms()
    measure("memory_job", told, clock)
    return (int(note.read_text()) - began_ms) / 1000


async def _wrong(log: Log, told: Settings, parquet: Path) -> list[str]:
    async with log.started() as transport:
        return wrong_rows(told, await live_rows(told, transport), parquet)


async def _restore(log: Log, told: Settings, folder: Path, clock: Clock) -> Restored:
    """One task after the other, as the only work of this process; then every row against the changelog."""
    groups = build(told).build_groups({told.topic: told.partitions})
    group = next(group.plan for group in groups if group.table is not None)
    async with log.started() as transport:
        starts = [await _commit(transport, group, partition) for partition in range(PARTITIONS)]
        cpu_s, wall_s, records, size = time.process_time(), clock.monotonic_s(), 0, 0
        for partition, last in enumerate(starts):
            done = await _restore_task(transport, group, partition, last, folder / str(partition), clock)
            records, size = records + done[0], size + done[1]
        cpu_s, wall_s = time.process_time() - cpu_s, clock.monotonic_s() - wall_s
        live = await live_rows(told, transport)
    wrong = [f"restored task {partition} differs from its changelog"
             for partition, rows in enumerate(live) if _held(folder / str(partition)) != rows]  # fmt: skip
    return Restored(records, cpu_s, wall_s, size, tuple(wrong))


async def _commit(transport: Transport, group: GroupPlan, partition: int) -> CommitRecord:
    tp = TopicPartition(group.commits_topic, partition)
    found = await last_commit(transport, group.name, tp, (await transport.offsets([tp]))[tp])
    if found is None:
        raise UserError(f"{tp} holds no commit record.", remedy="The worker that filled the table did not commit.")
    return found


async def _restore_task(
    transport: Transport, group: GroupPlan, partition: int, last: CommitRecord, folder: Path, clock: Clock
) -> tuple[int, int]:
    """Records and bytes read."""
    (table,) = [table for table in group.tables if table.name == TABLE]
    tp = TopicPartition(table.changelog, partition)
    target = (await transport.offsets([tp]))[tp].end
    told: list[RestoreProgress] = []
    size = 0

    async def read(topic: str, start: Offset) -> AsyncIterator[RawBatch]:
        nonlocal size
        async for batch in transport.read(TopicPartition(topic, partition), start, target):
            size += batch.buffer.nbytes
            yield batch

    store = RocksDBStore(folder)
    try:
        await restore(store, {table.changelog: table_prefix(TABLE)}, read, {table.changelog: target},
                      log_id=last.log_id, epoch=last.epoch, clock=clock, progress=told.append)  # fmt: skip
    finally:
        store.close()
    return told[-1].records, size


def _held(folder: Path) -> Mapping[bytes, bytes]:
    store, prefix = RocksDBStore(folder), table_prefix(TABLE)
    try:
        return {key.removeprefix(prefix): value for key, value in store.scan(prefix, table_stop(prefix))}
    finally:
        store.close()
