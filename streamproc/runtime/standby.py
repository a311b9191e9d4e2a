"""Standbys: warm copies of tasks that other workers own. A standby is a restore that never ends.

It reads the task's changelogs as far as they are committed into the same folder, in the same format and with the same
checks as a task's start, so that the task, once it is moved here, opens that folder and restores only the tail. It fences
nothing, writes nothing to the log and knows no sink. Whatever goes wrong costs warmth and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from streamproc.commit.record import CommitRecord
from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock
from streamproc.core.errors import LogLost, Retryable, TaskFailure, UserError
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.runtime.start import GroupPlan, last_commit
from streamproc.state.contract import Store, StoreMeta
from streamproc.state.overlay import table_prefix
from streamproc.state.restore import RestoreProgress, restore, why_wipe
from streamproc.transport.contract import PartitionOffsets, Transport

__all__ = ["Standby", "StandbyEnvironment", "Standbys"]

logger = logging.getLogger(__name__)
Ends = Mapping[TopicPartition, PartitionOffsets]


@dataclass(frozen=True)
class StandbyEnvironment:
    """What all standbys of a worker share."""

    transport: Transport
    clock: Clock
    open_store: Callable[[Path], Store]
    folder: Callable[[TaskId], Path]
    """The task's own: no task may run in it at the same time."""
    turns: asyncio.Semaphore
    """Held while one reads."""


class Standby:
    """The warm copy of one task. `run` is its whole life and ends by being cancelled."""

    def __init__(self, task: TaskId, group: GroupPlan, env: StandbyEnvironment) -> None:
        self.id, self._group, self._env = task, group, env
        self.progress: RestoreProgress | None = None
        """Of the changelog read last."""
        self.behind: int | None = None
        """Offsets of its changelogs not applied when it last looked; None: it could not look yet, or nothing is committed."""
        self.epoch: int | None = None
        """The last that it has caught up with; later ones may have changed nothing."""
        self.problem: str | None = None
        """Why it does not come forward, in words."""
        self._changelogs = [TopicPartition(table.changelog, task.partition) for table in group.tables]
        self._prefixes = {table.changelog: table_prefix(table.name) for table in group.tables}
        self._store: Store | None = None
        self._failures = 0
        self._warm = False

    async def run(self) -> None:
        """Raises only what is a bug of ours. Once it has returned, or raised, the folder is free."""
        try:
            while True:
                pause_s = await self._round()
                await self._env.clock.sleep(pause_s)
        finally:
            self._close()

    async def _round(self) -> float:
        """Catch up once; returns the pause until the next look, in seconds."""
        try:
            async with self._env.turns:
                await self._catch_up()
        except (Retryable, TaskFailure, UserError, LogLost, OSError) as failure:
            # A row ahead of the commit record (`LogLost`) passes with the next look: its record's marker was under way.
            self._close()
            self._failures += 1
            self.problem = str(failure)
            if self._failures == limits.STANDBY_FAILURES_QUIET:
                logger.warning("standby of %s does not come forward: %s", self.id, failure)
            return min(limits.STANDBY_POLL_S * 2.0 ** min(self._failures - 1, 10), limits.STANDBY_RETRY_S_MAX)
        self._failures, self.problem = 0, None
        return limits.STANDBY_POLL_S

    async def _catch_up(self) -> None:
        ends = await self._env.transport.offsets(self._changelogs)
        if self._store is not None and not self._is_behind(self._store.meta(), ends):
            return
        # After the changelogs' ends: the record that is found is then no older than their rows.
        commits = TopicPartition(self._group.commits_topic, self.id.partition)
        at = (await self._env.transport.offsets([commits]))[commits]
        record = await last_commit(self._env.transport, self._group.name, commits, at._replace(end=at.stable))
        if record is None:
            return  # no task has committed yet
        if self._store is None:
            self._store = self._env.open_store(self._env.folder(self.id))
        meta = self._store.meta()
        if meta is not None and meta.log_id == record.log_id and meta.epoch > record.epoch and at.stable < at.end:
            return  # the store was a task's own until now, and the marker of its last commit is under way
        await self._restore(self._store, meta, record, ends)

    def _is_behind(self, meta: StoreMeta | None, ends: Ends) -> bool:
        """Whether there is anything to read, or the store's time is to be brought up to date."""
        applied = {} if meta is None else meta.applied
        self.behind = sum(max(0, at.stable - applied.get(tp.topic, 0)) for tp, at in ends.items())
        age_ms = None if meta is None else self._env.clock.now_ms() - meta.timestamp_ms
        return self.behind > 0 or age_ms is None or age_ms > limits.STANDBY_FRESH_MS

    async def _restore(self, store: Store, meta: StoreMeta | None, record: CommitRecord, ends: Ends) -> None:
        begins = {tp.topic: at.begin for tp, at in ends.items()}
        # Not the stable end: what a task applied here is committed before its marker makes it stable.
        why = why_wipe(
            meta, log_id=record.log_id, epoch=record.epoch, begins=begins,
            ends={tp.topic: at.end for tp, at in ends.items()}, now_ms=self._env.clock.now_ms(),
        )  # fmt: skip
        if why is not None:
            logger.info("standby of %s begins at the start of its changelogs: %s", self.id, why)
            store.wipe()
            meta, self._warm = None, False
        applied = {} if meta is None else meta.applied
        targets = {tp.topic: Offset(max(at.stable, applied.get(tp.topic, 0))) for tp, at in ends.items()}
        await restore(
            store, self._prefixes, self._reader(targets), targets, log_id=record.log_id, epoch=record.epoch,
            clock=self._env.clock, progress=self._tell,
        )  # fmt: skip
        self.behind, self.epoch = 0, record.epoch
        if not self._warm:
            self._warm = True
            logger.info("standby of %s is warm", self.id)

    def _reader(self, targets: Mapping[str, Offset]) -> Callable[[str, Offset], AsyncIterator[RawBatch]]:
        async def read(topic: str, start: Offset) -> AsyncIterator[RawBatch]:
            batches = self._env.transport.read(TopicPartition(topic, self.id.partition), start, targets[topic])
            async with aclosing(
                cast(Any, batches)
            ):  # a standby is mostly cancelled here, and the connection is to be freed
                async for batch in batches:
                    yield batch
                    await self._env.clock.sleep(batch.buffer.nbytes / limits.STANDBY_BYTES_PER_S_MAX)

        return read

    def _tell(self, progress: RestoreProgress) -> None:
        self.progress = progress

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()


class Standbys:
    """All standbys of one worker. ``failed`` is told of what none may raise."""

    def __init__(self, failed: Callable[[BaseException], Any]) -> None:
        self.running: dict[TaskId, Standby] = {}
        self._failed = failed
        self._runs: dict[TaskId, asyncio.Task[None]] = {}

    async def keep(self, wanted: Collection[TaskId]) -> None:
        """Stop all but ``wanted``. On return the stores of the others are closed, so that a task may open them."""
        leaving = [self._runs.pop(task) for task in self._runs.keys() - set(wanted)]
        self.running = {task: standby for task, standby in self.running.items() if task in self._runs}
        for run in leaving:
            run.cancel()
        if leaving:
            await asyncio.wait(leaving)

    def start(self, standby: Standby) -> None:
        """Unless there is one already."""
        if standby.id in self._runs:
            return
        self.running[standby.id] = standby
        self._runs[standby.id] = run = asyncio.create_task(standby.run(), name=f"standby {standby.id}")
        run.add_done_callback(self._ended)

    def _ended(self, run: asyncio.Task[None]) -> None:
        if not run.cancelled() and (failure := run.exception()) is not None:
            self._failed(failure)
