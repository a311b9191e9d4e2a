"""A task's life: started behind its fence, working, committing, and started anew whenever an epoch could not commit.

        ┌────────────── TaskFailure, Retryable: back off ──────────────┐
        ▼                                                              │
NEW ─▶ STARTING ─▶ CLAIMING ─▶ RUNNING ◀─▶ HELD (a sink's queue is full)
        │             │           │         │
        └─────────────┴───────────┴─────────┴──▶ CLOSED (revoked, stopped, or a WorkerFailure)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from streamproc.commit.record import CommitRecord, tp_name
from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock
from streamproc.core.errors import (
    BarrierTimeout,
    LogLost,
    ProduceRefused,
    Retryable,
    RowRefused,
    TaskFailure,
    UserError,
    invariant,
)
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.runtime.epoch import Committed, EpochParts, commit
from streamproc.runtime.monitor import CommitWatch
from streamproc.runtime.sinkfeed import SinkFeed, open_feeds
from streamproc.runtime.start import GroupPlan, Opened, StartParts, open_task, task_folder
from streamproc.runtime.work import AgentFailed, Work
from streamproc.state.contract import Store
from streamproc.state.restore import RestoreProgress
from streamproc.transport.contract import Fetcher, Membership, Transport

__all__ = ["Phase", "Task", "TaskEnvironment"]

logger = logging.getLogger(__name__)


class Phase(Enum):
    """Where a task is in its life."""

    NEW = "new"
    STARTING = "starting"
    CLAIMING = "claiming"
    RUNNING = "running"
    HELD = "held"
    CLOSED = "closed"


ALLOWED: dict[Phase, frozenset[Phase]] = {
    Phase.NEW: frozenset({Phase.STARTING, Phase.CLOSED}),
    Phase.STARTING: frozenset({Phase.STARTING, Phase.CLAIMING, Phase.CLOSED}),
    Phase.CLAIMING: frozenset({Phase.RUNNING, Phase.STARTING, Phase.CLOSED}),
    Phase.RUNNING: frozenset({Phase.HELD, Phase.STARTING, Phase.CLOSED}),
    Phase.HELD: frozenset({Phase.RUNNING, Phase.STARTING, Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}


@dataclass(frozen=True)
class TaskEnvironment:
    """What all tasks of a group share in one worker."""

    group: GroupPlan
    transport: Transport
    membership: Callable[[], Membership]
    fetcher: Fetcher
    clock: Clock
    open_store: Callable[[Path], Store]
    folder: Path
    make_work: Callable[[int], Work]
    consumer_group: str
    watch: CommitWatch
    at_leisure: Callable[[], bool]
    """Whether no task of the worker has more input than it is at, or is about to tell others what it has done."""
    epoch_s: Callable[[], float]
    """How long an epoch lasts at least while input waits: with many tasks their commits would else be all that a worker
    does."""
    told: dict[TopicPartition, Offset]
    """The last offset that tasks of this worker have committed to what owners read; not of other workers' tasks."""
    caught_up: Callable[[], None]
    """To be called when a task has nothing to do for now, or has committed what others may wait for."""


@dataclass
class TaskView:
    """What the web view and the log show of a task; committed facts only, but for ``problem``."""

    restore: RestoreProgress | None = None
    committed_ms: int | None = None
    commits: int = 0
    restarts: int = 0
    problem: str | None = None
    """Why the task does not run, or does not come forward, in words; None while it does."""


class Task:
    """One task in one worker. `run` is its whole life; everything else is called from the worker's same loop."""

    def __init__(self, task: TaskId, env: TaskEnvironment) -> None:
        self.id, self.env, self.view = task, env, TaskView()
        self.phase = Phase.NEW
        self.record: CommitRecord | None = None
        self.work: Work | None = None
        self.store: Store | None = None
        self.feeds: list[SinkFeed] = []
        self._parts: EpochParts | None = None
        self._inbox: deque[RawBatch] = deque()
        self._inbox_bytes = 0
        self._paused: dict[TopicPartition, Offset] = {}
        self._wake = asyncio.Event()
        self._due = self._committing = self._closing = False
        self._began_s: float | None = None
        """When the open epoch took its first batch."""
        self._early = 0
        """Commits since the last interval's end that did not wait for the next."""
        self._failures = 0
        self._told_s = 0.0
        self._alike = 0
        """How many of the last failures in a row were of one kind."""
        self._failed: type[BaseException] | None = None
        self.restored = asyncio.Event()
        """Set once the first start has its state; a task that cannot start sets it too, so that nobody waits for it."""

    # ---- called by the runtime

    def overlay(self, table: str) -> Any:
        """The overlay of one of its tables while the task is started, else None."""
        return self._parts.overlays.get(table) if self._parts is not None else None

    def committed_position(self, tp: TopicPartition) -> Offset | None:
        """The least committed position of ``tp`` over the agents that read it."""
        name = tp_name(tp)
        at = [of[name] for of in self.record.positions.values() if name in of] if self.record is not None else []
        return Offset(min(at)) if at else None

    def finished(self) -> bool:
        """Its input is at its end, and everything is committed and in its sinks."""
        work = self.work
        return (
            self.phase is Phase.RUNNING
            and work is not None
            and not self._inbox
            and work.finished
            and not work.dirty
            and all(feed.idle for feed in self.feeds)
        )

    def offer(self, batch: RawBatch) -> None:
        """A batch from the fetcher. Over its byte limit the source is paused until the task has caught up."""
        if self.phase not in (Phase.RUNNING, Phase.HELD):
            return
        self._inbox.append(batch)
        self._inbox_bytes += batch.buffer.nbytes
        if self._inbox_bytes > limits.TASK_INBOX_BYTES_MAX:
            self._paused[batch.tp] = batch.next_position
            self.env.fetcher.pause(batch.tp)
        self._wake.set()

    def commit_due(self) -> None:
        """The commit interval is over."""
        self._due, self._early = True, 0
        self._wake.set()

    def tick(self, monotonic_ms: int) -> None:
        """Processing time has gone on."""
        if self.phase is Phase.RUNNING and self.work is not None and not self._inbox:
            self.work.tick(monotonic_ms, self.env.fetcher.at_end)
            self.look_again()

    def look_again(self) -> None:
        """There may be time now for a commit ahead of the interval."""
        if self.phase is Phase.RUNNING and self.work is not None and self.work.prompt and self.work.dirty:
            self._wake.set()

    @property
    def at_leisure(self) -> bool:
        """Whether nothing waits for it behind the batch that came last, and no other task is about to get what it commits.
        What a `prompt` work reads ends in the markers of transactions, so that its end is seen late; load shows at the
        sources before it."""
        work = self.work
        if work is None or self.phase not in (Phase.RUNNING, Phase.HELD):
            return True
        return len(self._inbox) <= 1 and (work.prompt or (self._at_end and not self._commits_now))

    @property
    def _at_end(self) -> bool:
        assert self.work is not None
        return all(map(self.env.fetcher.at_end, self.work.resume_at()))

    @property
    def _commits_now(self) -> bool:
        assert self.work is not None
        return self.work.dirty and (self._due or self._committing)

    def close(self) -> bool:
        """Commit what is done and end; `run` returns when it is over. False: it has not started yet, so that there is
        nothing to commit and `run` may be cancelled at once."""
        self._closing = True
        self._wake.set()
        self.restored.set()
        return self.phase in (Phase.RUNNING, Phase.HELD)

    @property
    def closing(self) -> bool:
        return self._closing

    async def run(self) -> None:
        """Raises `WorkerFailure` only; task failures and outages start the task anew, with back-off."""
        try:
            while not self._closing:
                try:
                    await self._start()
                    await self._serve()
                except (TaskFailure, Retryable, RowRefused, OSError) as failure:
                    self._failures += 1
                    self._alike = self._alike + 1 if self._failed is type(failure) else 1
                    self._failed = type(failure)
                    self.view.restarts += 1
                    self.view.problem = str(failure)
                    self._give_up_if_hopeless(failure)
                    logger.warning("task %s starts anew: %s", self.id, failure)
                    await self._release()
                    self._set(Phase.STARTING)
                    await self._back_off()
        finally:
            await self._release()
            self._set(Phase.CLOSED)
            self.restored.set()

    # ---- its life

    async def _start(self) -> None:
        self._set(Phase.STARTING)
        env = self.env
        producer = env.transport.producer(f"{env.group.app_id}:{env.group.name}:{self.id.partition}")
        parts = StartParts(
            self.id, env.group, env.consumer_group, env.transport, env.membership(), producer, env.clock, env.open_store,
            task_folder(env.folder, self.id), self._restoring,
        )  # fmt: skip
        try:
            opened = await open_task(parts)
        except (UserError, LogLost) as failure:
            # Who stood still in mid-start may take what the next owner has committed meanwhile for somebody's mistake.
            if await env.membership().confirm():
                raise
            raise TaskFailure(f"Task {self.id} was moved while it started: {failure}") from failure
        self.store, self.record = opened.store, opened.record
        overlays = {table.name: table.overlay(opened.store) for table in env.group.tables}
        self.work = env.make_work(self.id.partition)
        self._parts = EpochParts(
            self.id, env.consumer_group, TopicPartition(env.group.commits_topic, self.id.partition), self.work,
            env.group.tables, overlays, opened.store, producer, env.clock, opened.applied,
        )  # fmt: skip
        self._open_work()
        await self._first_commit(opened)
        self._set(Phase.CLAIMING)
        self.restored.set()
        # 5. Claim the sinks' ledgers with the new incarnation and catch them up.
        self.feeds = await open_feeds(self, self._wake, self._say)
        # 6. Seek each source to the commit record's positions, check the generation again, resume.
        if not await env.membership().confirm():
            raise TaskFailure(f"Task {self.id} was moved while it started.")
        self.view.problem = None
        self._set(Phase.RUNNING)
        self._resume()

    async def _first_commit(self, opened: Opened) -> None:
        """Each start commits its incarnation before it claims anything: two starts never share one."""
        assert self._parts is not None
        done = await commit(self._parts, opened.record, starting=True)
        self._note(done)

    def _open_work(self) -> None:
        assert self.work is not None
        assert self._parts is not None
        assert self.record is not None
        self.work.open(self.record, self._parts.overlays)
        self.work.wake = self._wake.set

    def _resume(self) -> None:
        """Fetch from the work's positions; batches fetched before are forgotten."""
        assert self.work is not None
        self._inbox.clear()
        self._paused.clear()
        self._inbox_bytes = 0
        for tp, position in self.work.resume_at().items():
            self.env.fetcher.resume(tp, position)

    async def _serve(self) -> None:
        work = self.work
        assert work is not None
        while True:
            if self._closing:
                with contextlib.suppress(AgentFailed):
                    await self._commit()
                return
            if work.failure is not None:
                self._abort()
            if (problem := next((feed.failure for feed in self.feeds if feed.failure), None)) is not None:
                raise problem
            held = any(feed.full for feed in self.feeds)
            self._set(Phase.HELD if held else Phase.RUNNING)
            self.view.problem = next((feed.delay for feed in self.feeds if feed.full), work.problem)
            due = self._take_due() or self._due_early(held)
            if work.wants_commit or work.size_bytes > limits.EPOCH_BYTES_MAX or (due and work.dirty):
                try:
                    await self._commit()
                except AgentFailed:
                    continue
            if not held and self._inbox and work.ready():
                self._process(self._inbox.popleft())
                await asyncio.sleep(0)
                continue
            if not work.prompt:
                self.env.caught_up()
            await self._wake.wait()
            self._wake.clear()

    def _take_due(self) -> bool:
        """Whether the interval is over, once; one that ends during a commit counts after it. A task that is behind lets its
        epoch grow: what it would tell is late by what waits before it anyway."""
        due, self._due = self._due, False
        return due and (self._epoch_is_long() or self._is_abreast())

    def _epoch_is_long(self) -> bool:
        least_s = self.env.epoch_s()
        return not least_s or self._began_s is None or self.env.clock.monotonic_s() >= self._began_s + least_s

    def _is_abreast(self) -> bool:
        """Nothing waits for it; a `prompt` work cannot know, and goes by the worker."""
        assert self.work is not None
        return self.env.at_leisure() if self.work.prompt else len(self._inbox) <= 1 and self._at_end

    def _due_early(self, held: bool) -> bool:
        """Epochs are short while there is time for it, and at least as long as the interval under load."""
        work = self.work
        assert work is not None
        if not work.prompt or held or self._inbox or not work.dirty or self._early >= limits.EARLY_COMMITS_MAX:
            return False
        if not self.env.at_leisure() or self._more_is_told:
            return False
        self._early += 1
        return True

    @property
    def _more_is_told(self) -> bool:
        """What is committed already is on its way, and goes into the same epoch."""
        assert self.work is not None
        return any(position <= self.env.told.get(tp, -1) for tp, position in self.work.resume_at().items())

    def _process(self, batch: RawBatch) -> None:
        assert self.work is not None
        self._inbox_bytes -= batch.buffer.nbytes
        if self._began_s is None:
            self._began_s = self.env.clock.monotonic_s()
        self.work.process(batch)
        if batch.tp not in self.work.resume_at():
            self.env.fetcher.pause(batch.tp)  # a bounded input has ended here, whatever is written behind it
        if self._paused and self._inbox_bytes <= limits.TASK_INBOX_BYTES_MAX // 2:
            for tp, position in self._paused.items():
                self.env.fetcher.resume(tp, position)
            self._paused.clear()

    async def _commit(self) -> None:
        assert self._parts is not None
        assert self.record is not None
        work = self._parts.work
        if not work.dirty:
            work.wants_commit = False
            work.release()
            return
        work.expire(min((feed.applied_epoch for feed in self.feeds), default=self.record.epoch))
        begun, self._committing = self.env.watch.begins(), True
        try:
            done = await commit(self._parts, self.record)
        finally:
            self._committing = False
        self._began_s = None
        self._note(done)
        self.env.watch.committed(str(self.id), done, work.counters.records, begun)
        if not work.prompt:
            self.env.told.update(done.written)
            self.env.caught_up()
        self._failures, self._failed = 0, None

    def _note(self, done: Committed) -> None:
        self.record = done.record
        self.view.committed_ms = self.env.clock.now_ms()
        self.view.commits += 1
        for feed in self.feeds:
            feed.offer(done)

    def _abort(self) -> None:
        """An agent failed: forget the epoch and go on from the last commit. Nothing of it was sent yet."""
        assert self.work is not None
        assert self._parts is not None
        for overlay in self._parts.overlays.values():
            overlay.drop()
        self._open_work()
        self.work.release()
        self._resume()

    async def _release(self) -> None:
        """Give up what this start holds; whatever was not committed is forgotten."""
        for topic in self.env.group.sources:
            self.env.fetcher.pause(TopicPartition(topic, self.id.partition))
        feeds, work, store = self.feeds, self.work, self.store
        self.feeds, self.store, self.work, self._parts = [], None, None, None
        self._inbox.clear()
        self._inbox_bytes = 0
        # A revocation that takes too long cancels any of these awaits: the store's lock must not outlive the task.
        try:
            if work is not None:
                await work.close()
        finally:
            if store is not None:
                store.close()
            await asyncio.gather(*(feed.close() for feed in feeds))

    def _give_up_if_hopeless(self, failure: BaseException) -> None:
        if not isinstance(failure, ProduceRefused | RowRefused | BarrierTimeout):
            return
        if not isinstance(failure, BarrierTimeout) and self.work is not None and self.work.refused(_reason(failure)):
            return  # it will find the record that is to blame and set it aside
        if isinstance(failure, RowRefused):
            raise failure
        if isinstance(failure, ProduceRefused) and self._alike >= limits.REFUSED_EPOCHS_MAX:
            raise UserError(
                f"The broker refused what task {self.id} writes to {failure.topic} {self._alike} times: {failure}",
                remedy="Raise max.message.bytes of that topic (and the broker's), or write less in one record.",
            ) from failure
        if isinstance(failure, BarrierTimeout) and self._alike >= limits.BARRIER_TIMEOUTS_MAX:
            raise UserError(str(failure), remedy=f"It happened {self._alike} times; the worker stops.") from failure

    async def _back_off(self) -> None:
        pause = min(limits.RETRY_BACKOFF_S * 2 ** min(self._failures, 10), limits.TASK_RESTART_S_MAX)
        if not self._closing:
            await self.env.clock.sleep(pause)

    def _say(self, problem: str | None) -> None:
        self.view.problem = problem

    def _restoring(self, progress: RestoreProgress) -> None:
        before, self.view.restore = self.view.restore, progress
        if before is None or before.topic != progress.topic:
            self._told_s = 0.0
        if progress.seconds - self._told_s >= limits.RESTORE_TELL_S:
            self._told_s = progress.seconds
            share = (progress.position - progress.start) / max(progress.target - progress.start, 1)
            logger.info("task %s restores %s: %.0f%%, %.0f records/s", self.id, progress.topic, share * 100,
                        progress.records_per_s)  # fmt: skip

    def _set(self, phase: Phase) -> None:
        if phase is not self.phase:
            invariant(phase in ALLOWED[self.phase], f"Task {self.id} went from {self.phase} to {phase}.")
            self.phase = phase


def _reason(refused: ProduceRefused | RowRefused) -> str:
    """For a dead letter: never the row itself, which may hold a user's data."""
    return (
        str(refused) if isinstance(refused, ProduceRefused) else f"it wrote a row that no table holds. {refused.remedy}"
    )
