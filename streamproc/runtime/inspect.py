"""The runtime as it may be seen from outside: committed facts of this worker's tasks and tables, and nothing changed.

Everything is read on the worker's own loop, between two steps of its tasks, so a fact never shows half of an epoch. A
`HeldTable` must be used up before the next await: its task may close meanwhile.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from streamproc.commit.record import CommitRecord, tp_name
from streamproc.core.types import NO_WATERMARK, Offset, TopicPartition
from streamproc.eventtime.watermark import MinWatermark
from streamproc.operators.plan import TablePlan
from streamproc.operators.source import Counters
from streamproc.operators.tablerows import TableRows
from streamproc.runtime.ownerwork import OwnerWork
from streamproc.runtime.runtime import Runtime
from streamproc.runtime.task import Task
from streamproc.runtime.topology import Group
from streamproc.state.contract import Store
from streamproc.state.overlay import table_prefix, table_stop
from streamproc.state.restore import RestoreProgress

__all__ = ["HeldTable", "Inspector", "SinkFacts", "TableFacts", "TaskFacts"]


@dataclass(frozen=True)
class SinkFacts:
    """A sink of one task."""

    name: str
    table: str
    epochs_behind: int
    problem: str | None


@dataclass(frozen=True)
class TaskFacts:
    """One task of this worker, as of its last commit."""

    group: str
    partition: int
    phase: str
    lag: int | None
    """Committed records of its sources behind the last commit; None: the broker has not said yet."""
    watermark: int | None
    """None: per-record agents have none. `NO_WATERMARK` and `END_OF_TIME` as they are."""
    epoch: int | None
    incarnation: int | None
    commit_age_ms: int | None
    """Since the last commit; a task without anything new does not commit."""
    commits: int
    restarts: int
    problem: str | None
    counters: Counters
    """What became of the committed records since the task started here."""
    sinks: tuple[SinkFacts, ...]
    restore: RestoreProgress | None
    """Set while the task restores its state."""


@dataclass(frozen=True)
class TableFacts:
    """One table as it is declared, held by this worker or not."""

    name: str
    kind: Literal["windowed", "keyed"]
    """``keyed``: a per-record agent's `app.Table`."""
    group: str
    partitions: int
    sources: tuple[str, ...]
    """Topics whose partition *p* lies with the owner of the table's partition *p*."""
    sinks: tuple[str, ...]
    plan: TablePlan | None = None
    """Windowed tables only."""

    @cached_property
    def rows(self) -> TableRows:
        """How the rows of a windowed table are spelt."""
        assert self.plan is not None
        return TableRows(self.plan)


class HeldTable:
    """The committed rows of one partition of a table, in a started task of this worker. Keys are the table's own."""

    def __init__(self, task: Task, table: str, store: Store, record: CommitRecord, now_ms: int) -> None:
        self._task, self._store, self._prefix = task, store, table_prefix(table)
        self.partition, self.epoch = task.id.partition, record.epoch
        self.commit_age_ms = max(0, now_ms - (task.view.committed_ms or now_ms))

    def get(self, key: bytes) -> bytes | None:
        return self._store.get(self._prefix + key)

    def scan(self, start: bytes = b"", stop: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start <= key < stop in key order."""
        prefix = self._prefix
        end = table_stop(prefix) if stop is None else prefix + stop
        return ((key[len(prefix) :], value) for key, value in self._store.scan(prefix + start, end))

    def windows(self, count: int, until: int | None = None) -> list[int]:
        """Starts of the newest ``count`` windows that begin at or before ``until``, the newest first. One whose first
        rows are not committed yet is among them and has no rows."""
        work = self._task.work
        if not isinstance(work, OwnerWork):
            return []
        return heapq.nlargest(count, (start for start in work.table.windows if until is None or start <= until))


class Inspector:
    """Asked by the web view; never changes anything."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._tables: tuple[Mapping[str, Group], dict[str, TableFacts]] = ({}, {})

    @property
    def groups(self) -> Mapping[str, Group]:
        """By name; empty until the app has joined its group."""
        return self._runtime.groups

    @property
    def ready(self) -> bool:
        """Whether the first assignment's tasks have their state."""
        return self._runtime.ready.is_set()

    def now_ms(self) -> int:
        return self._runtime.clock.now_ms()

    # ---- tasks

    def tasks(self, ends: Mapping[TopicPartition, Offset]) -> list[TaskFacts]:
        """Every task of this worker; ``ends`` from `ends`, perhaps a second old."""
        return [self._task(task, ends) for task in sorted(self._runtime.tasks.values(), key=lambda task: task.id)]

    async def ends(self) -> dict[TopicPartition, Offset]:
        """Where the sources of this worker's tasks end for a reader of committed records. `BrokerUnavailable` after the
        transport's own limit."""
        tps = [tp for task in self._runtime.tasks.values() for tp in _sources(task)]
        return {tp: at.stable for tp, at in (await self._runtime.transport.offsets(tps)).items()} if tps else {}

    def _task(self, task: Task, ends: Mapping[TopicPartition, Offset]) -> TaskFacts:
        view, record, work = task.view, task.record, task.work
        age = None if view.committed_ms is None else max(0, self.now_ms() - view.committed_ms)
        restoring = view.restore is not None and view.restore.position < view.restore.target
        return TaskFacts(
            task.id.group, task.id.partition, task.phase.value, _lag(task, ends), _watermark(task),
            record.epoch if record is not None else None, record.incarnation if record is not None else None,
            age, view.commits, view.restarts, view.problem,
            work.counters if work is not None and task.restored.is_set() else Counters(),
            _sinks(task), view.restore if restoring else None,
        )  # fmt: skip

    # ---- tables

    @property
    def tables(self) -> dict[str, TableFacts]:
        """Every table that can be asked for, by name; dedupe's own state is none of them."""
        groups, found = self._tables
        if groups is not self._runtime.groups:
            groups = self._runtime.groups
            found = {table.name: table for group in groups.values() for table in _tables(group)}
            self._tables = groups, found
        return found

    def held(self, table: TableFacts) -> dict[int, HeldTable]:
        """The partitions of ``table`` whose tasks are started in this worker."""
        now_ms = self.now_ms()
        return {
            task.id.partition: HeldTable(task, table.name, task.store, task.record, now_ms)
            for task in self._runtime.tasks.values()
            if task.id.group == table.group and task.store is not None and task.record is not None
            and task.restored.is_set()
        }  # fmt: skip


def _tables(group: Group) -> Iterator[TableFacts]:
    plan = group.plan
    for table in plan.tables:
        sinks = tuple(use.sink.name for use in table.sinks)
        sources = tuple(plan.sources)
        if group.table is not None:
            yield TableFacts(table.name, "windowed", plan.name, plan.partitions, sources, sinks, group.table.plan)
        elif group.source is None:
            yield TableFacts(table.name, "keyed", plan.name, plan.partitions, sources, sinks)


def _sources(task: Task) -> list[TopicPartition]:
    return [TopicPartition(topic, task.id.partition) for topic in task.env.group.sources]


def _lag(task: Task, ends: Mapping[TopicPartition, Offset]) -> int | None:
    """A bounded source has nothing to catch up with beyond its end."""
    if task.record is None:
        return None
    total = 0
    for tp in _sources(task):
        position, end = task.committed_position(tp), ends.get(tp)
        if position is None or end is None:
            return None
        stop = task.record.ends.get(tp_name(tp), end)
        total += max(0, min(end, stop) - position)
    return total


def _watermark(task: Task) -> int | None:
    """As the commit record has it; the work's own may be ahead of it."""
    if task.record is None or not task.record.watermarks:
        return None
    (states,) = task.record.watermarks.values()
    if task.env.group.tables and isinstance(task.work, OwnerWork):
        heard = {int(source): state for source, state in states.items()}
        return MinWatermark(task.env.group.partitions, heard).watermark
    return max((state.watermark for state in states.values()), default=NO_WATERMARK)


def _sinks(task: Task) -> tuple[SinkFacts, ...]:
    feeds: Sequence[SinkFacts] = [
        SinkFacts(feed.name, feed.table.name, max(0, task.record.epoch - feed.applied_epoch), feed.problem)
        for feed in task.feeds
        if task.record is not None
    ]
    return tuple(feeds)
