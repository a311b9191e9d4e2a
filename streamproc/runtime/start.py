"""Starting a task, as numbered in `docs/commit.md`: fence, commit record, store, restore, first commit, ledgers."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamproc.commit import record as commit_record
from streamproc.commit.record import CommitRecord
from streamproc.commit.start import Declared, Found, first_record, least_positions, require_fit
from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock
from streamproc.core.errors import ProducerFenced, TaskFailure, UserError
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.runtime.work import StateTable
from streamproc.state.contract import Store
from streamproc.state.fingerprint import require_same
from streamproc.state.overlay import table_prefix
from streamproc.state.restore import RestoreProgress, check_store, restore
from streamproc.transport.contract import Membership, PartitionOffsets, TaskProducer, Transport

__all__ = ["Fed", "GroupPlan", "Opened", "StartParts", "last_commit", "open_task", "require_same_code", "task_folder"]


@dataclass(frozen=True)
class Fed:
    """A table as the group that feeds it knows it."""

    group: str
    """The group that owns it."""
    commits_topic: str
    table: str
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True)
class GroupPlan:
    """A co-partition group: what all of its tasks have in common."""

    name: str
    app_id: str
    sources: dict[str, int]
    """Source topic -> partitions, all the same number."""
    agents: dict[str, tuple[str, ...]]
    """Agent (pipeline, table) -> the topics it reads."""
    tables: tuple[StateTable, ...]
    bounded: bool = False
    fed: tuple[Fed, ...] = ()
    """Tables of other groups that this one ships partial aggregates to."""
    shared: frozenset[str] = frozenset()
    """Source topics that other groups of the app read too."""

    @property
    def partitions(self) -> int:
        return max(self.sources.values())

    @property
    def commits_topic(self) -> str:
        return f"{self.app_id}-{self.name}-commits"

    def declared(self, task: TaskId) -> Declared:
        return Declared(
            task,
            self.app_id,
            self.sources,
            {table.name: dict(table.fingerprint) for table in self.tables},
            tuple(table.changelog for table in self.tables),
            self.agents,
        )


def task_folder(state: Path, task: TaskId) -> Path:
    """Where the task's store lies below the worker's ``state`` folder."""
    return state / f"{task.group}-{task.partition}"


@dataclass
class StartParts:
    """What a start works with."""

    task: TaskId
    group: GroupPlan
    consumer_group: str
    transport: Transport
    membership: Membership
    producer: TaskProducer
    clock: Clock
    open_store: Callable[[Path], Store]
    folder: Path
    progress: Callable[[RestoreProgress], None]


@dataclass
class Opened:
    """A fenced task with its state restored up to the log's end."""

    record: CommitRecord
    store: Store
    applied: dict[str, int]
    first: bool
    """The task never committed before."""


async def open_task(parts: StartParts) -> Opened:
    """Steps 1 to 4. Raises `TaskFailure` to start again, `WorkerFailure` when a person has to act."""
    partition = parts.task.partition
    # 1. Confirm the generation, then fence: the previous owner is excluded and its transaction settled.
    if not await parts.membership.confirm():
        raise ProducerFenced(f"Task {parts.task}: this worker is no longer in the group's generation; it rejoins.")
    await parts.producer.fence()

    # 2. Read the commit record and the ends of the changelogs, each up to its high watermark after the fence.
    commits = TopicPartition(parts.group.commits_topic, partition)
    changelogs = [TopicPartition(table.changelog, partition) for table in parts.group.tables]
    ends = await _settled(parts, [commits, *changelogs])
    record = await last_commit(parts.transport, parts.group.name, commits, ends[commits])
    found = Found(record, await _held(parts, changelogs, ends) if record is None else {})
    declared = parts.group.declared(parts.task)
    _require_code_of(found, declared)
    first = record is None
    if record is None:
        record = await _first(parts, declared)
    await _require_same_fed(parts)
    if not first:
        await _require_group_offsets(parts, record)

    # 3. Open the store; of another history, ahead of the log or too old it is wiped.
    store = parts.open_store(parts.folder)
    try:
        targets = {tp.topic: ends[tp].end for tp in changelogs}
        begins = {tp.topic: ends[tp].begin for tp in changelogs}
        verdict = check_store(store.meta(), log_id=record.log_id, epoch=record.epoch, begins=begins, ends=targets,
                              now_ms=parts.clock.now_ms())  # fmt: skip
        if verdict == "wipe":
            store.wipe()

        # 4. Restore from the stored position to the target; resumable, in batches.
        applied = await restore(
            store,
            {table.changelog: table_prefix(table.name) for table in parts.group.tables},
            _reader(parts, targets),
            targets,
            log_id=record.log_id,
            epoch=record.epoch,
            clock=parts.clock,
            progress=parts.progress,
        )
    except BaseException:
        store.close()
        raise
    return Opened(record, store, dict(applied), first)


async def _require_group_offsets(parts: StartParts, record: CommitRecord) -> None:
    """The group's offsets went with the commit record in one transaction, so a difference that does not pass was made
    from outside. An offset that is not there has expired and says nothing."""
    # Of a shared topic the group holds whichever reader's offset was sent last, which proves nothing.
    alone = parts.group.sources.keys() - parts.group.shared
    committed = {tp: at for tp, at in least_positions(record.positions).items() if tp.topic in alone}
    began = parts.clock.monotonic_s()
    while committed:
        found = await parts.transport.group_offsets(parts.consumer_group, list(committed))
        differing = [tp for tp, at in found.items() if at != committed[tp]]
        if not differing:
            return
        if parts.clock.monotonic_s() - began > limits.GROUP_OFFSETS_WAIT_S:
            tp = differing[0]
            raise UserError(
                f"The group {parts.consumer_group} stands at offset {found[tp]} of {tp.topic} partition {tp.partition}, but "
                f"task {parts.task} committed position {committed[tp]}: somebody has set the group's offsets.",
                remedy="State and position belong together: set the offset back, or give both up with "
                "`streamproc reset MODULE`.",
            )
        await parts.clock.sleep(limits.RETRY_BACKOFF_S)


async def _held(
    parts: StartParts, changelogs: Collection[TopicPartition], ends: Mapping[TopicPartition, PartitionOffsets]
) -> dict[str, int]:
    """Committed records of each changelog. Offsets alone prove nothing: a transaction that was given up leaves them too."""
    held: dict[str, int] = {}
    for tp in changelogs:
        async for batch in parts.transport.read(tp, ends[tp].begin, ends[tp].end):
            held[tp.topic] = held.get(tp.topic, 0) + len(batch)
    return held


def _require_code_of(found: Found, declared: Declared) -> None:
    """Code and log must fit: sources, topology, positions, and the plan of each table."""
    require_fit(found, declared)
    if found.record is not None:
        for name, form in declared.tables.items():
            require_same(found.record.fingerprints.get(name), form, declared.app_id)


async def require_same_code(transport: Transport, group: GroupPlan) -> None:
    """Refuse, before anything is joined or fenced, a log that other code has written: `UserError`. It looks at the last
    committed record of partition 0 only; what that does not tell, a task finds when it starts."""
    tp = TopicPartition(group.commits_topic, 0)
    ends = (await transport.offsets([tp]))[tp]
    record = await last_commit(transport, group.name, tp, ends._replace(end=ends.stable))
    if record is not None:
        _require_code_of(Found(record, {}), group.declared(TaskId(group.name, tp.partition)))


async def _require_same_fed(parts: StartParts) -> None:
    """Refuse here what the owner of a table would refuse: partial aggregates of other code, once committed behind the
    source's position, would be read by the right code when it comes back."""
    for fed in parts.group.fed:
        tp = TopicPartition(fed.commits_topic, parts.task.partition)
        ends = (await parts.transport.offsets([tp]))[tp]
        owner = await last_commit(parts.transport, fed.group, tp, ends._replace(end=ends.stable))
        if owner is not None:
            require_same(owner.fingerprints.get(fed.table), fed.fingerprint, parts.group.app_id)


def _reader(parts: StartParts, targets: dict[str, Offset]) -> Callable[[str, Offset], AsyncIterator[RawBatch]]:
    def read(topic: str, start: Offset) -> AsyncIterator[RawBatch]:
        return parts.transport.read(TopicPartition(topic, parts.task.partition), start, targets[topic])

    return read


async def _settled(parts: StartParts, tps: Collection[TopicPartition]) -> dict[TopicPartition, PartitionOffsets]:
    """Offsets once the last stable offset has reached the high watermark: the fence's abort marker takes a moment."""
    began = parts.clock.monotonic_s()
    first = await parts.transport.offsets(tps)
    now = first
    while any(now[tp].stable < first[tp].end for tp in tps):
        if parts.clock.monotonic_s() - began > limits.RETRY_TOTAL_S:
            stuck = next(tp for tp in tps if now[tp].stable < first[tp].end)
            raise TaskFailure(
                f"A transaction hangs in {stuck.topic} partition {stuck.partition} at offset {now[stuck].stable}, below "
                f"the restore's target {first[stuck].end}. Find and end it: kafka-transactions.sh --bootstrap-server "
                f"HOST:PORT find-hanging --topic {stuck.topic} --partition {stuck.partition}, then abort."
            )
        await parts.clock.sleep(limits.RETRY_BACKOFF_S)
        now = await parts.transport.offsets(tps)
    return {tp: PartitionOffsets(now[tp].begin, first[tp].end, first[tp].end) for tp in tps}


async def last_commit(
    transport: Transport, group: str, tp: TopicPartition, ends: PartitionOffsets
) -> CommitRecord | None:
    """The last commit record of ``group`` in ``tp``, its commits topic, searched from the end: it is rarely more than a
    few offsets back."""
    back = 64
    while ends.begin < ends.end:
        start = Offset(max(ends.begin, ends.end - back))
        last: bytes | None = None
        async for batch in transport.read(tp, start, ends.end):
            for row in range(len(batch)):
                if batch.key(row) == group.encode():
                    last = batch.value(row)
        if last is not None:
            return commit_record.decode(last, f"{tp.topic} partition {tp.partition}")
        if start == ends.begin:
            break
        back *= 16
    return None


async def _first(parts: StartParts, declared: Declared) -> CommitRecord:
    """A task's very first start: where its sources begin and, if they are bounded, end."""
    group, partition = parts.group, parts.task.partition
    sources = [TopicPartition(topic, partition) for topic in group.sources]
    offsets = await parts.transport.offsets(sources)
    at = {tp: o.begin for tp, o in offsets.items()}
    positions = {
        agent: {tp: int(at[tp]) for topic in topics if (tp := TopicPartition(topic, partition)) in at}
        for agent, topics in group.agents.items()
    }
    ends = {tp: int(offsets[tp].stable) for tp in sources} if group.bounded else {}
    return first_record(declared, log_id=str(uuid.uuid4()), positions=positions, ends=ends)
