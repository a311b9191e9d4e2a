"""Feeds one sink of one task with committed epochs, in order, exactly once by the sink's ledger.

Two feeds lead to the same place: epochs handed over in memory after their commit, and a replay of the changelog for
what a ledger lacks when the task starts. Both filter by epoch number, so that neither applies what the other did.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from streamproc.commit.ledger import CatchUp, Fenced, Rebuild, UpToDate, decide_claim
from streamproc.commit.record import CommitRecord
from streamproc.core import limits
from streamproc.core.clock import Clock
from streamproc.core.errors import LedgerMoved, LogLost, SinkUnavailable, StreamprocError, TaskFailure
from streamproc.core.partitioner import partition_of
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.operators.accumulate import encode_group_key
from streamproc.runtime.work import SinkUse, StateTable, Work
from streamproc.sinks.contract import Ledger, SinkRows, SinkWriter
from streamproc.sinks.feed import sink_rows
from streamproc.state import changelog
from streamproc.state.contract import Store
from streamproc.state.overlay import table_prefix
from streamproc.transport.contract import Transport

if TYPE_CHECKING:
    from streamproc.runtime.epoch import Committed
    from streamproc.runtime.task import Task

__all__ = ["SinkFeed", "open_feeds"]

logger = logging.getLogger(__name__)

Rows = dict[bytes, bytes | None]
"""Changed rows by key; None: deleted by the user. Expired rows never get here: a sink keeps its own."""


Say = Callable[[str | None], None]
"""Shows a person what is being waited for; None: no longer."""


async def open_feeds(task: Task, wake: asyncio.Event, say: Say) -> list[SinkFeed]:
    """Claim every declared sink of the task's tables, wait for those that are down, catch them up, start them."""
    assert task.record is not None
    assert task.store is not None
    assert task.work is not None
    feeds: list[SinkFeed] = []
    for table in task.env.group.tables:
        for use in table.sinks:
            assert table.shape is not None
            writer = use.sink.writer(table.shape, task.env.group.app_id, task.id.partition)
            feeds.append(SinkFeed(task.id, table, use, writer, task.work, task.env.clock))
    try:
        for feed in feeds:
            await feed.claim(task.record, task.store, task.env.transport, say)
    except BaseException:
        for feed in feeds:
            await feed.writer.close()
        raise
    for feed in feeds:
        feed.start(wake)
    return feeds


class SinkFeed:
    """See the module. `offer` and the properties are called from the task; the rest runs beside it."""

    def __init__(
        self, task: TaskId, table: StateTable, use: SinkUse, writer: SinkWriter, work: Work, clock: Clock
    ) -> None:
        self.task, self.table, self.use, self.writer, self.work, self.clock = task, table, use, writer, work, clock
        self.failure: StreamprocError | None = None
        self.problem: str | None = None
        """Why the sink is behind, in words; None while it is not."""
        self._held: Ledger | None = None
        self._queue: deque[Committed] = deque()
        self._more = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def name(self) -> str:
        return self.use.sink.name

    @property
    def full(self) -> bool:
        return len(self._queue) >= limits.SINK_QUEUE_EPOCHS_MAX

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is under way."""
        return self._idle.is_set()

    @property
    def applied_epoch(self) -> int:
        return self._held.epoch if self._held is not None else 0

    def offer(self, done: Committed) -> None:
        self._queue.append(done)
        self._idle.clear()
        self._more.set()

    def start(self, wake: asyncio.Event) -> None:
        self._runner = asyncio.create_task(self._run(wake), name=f"sink {self.name} {self.task}")

    async def close(self) -> None:
        """Let what is committed go out if that is quick; the next owner makes up for the rest."""
        if self._runner is not None:
            drained = asyncio.ensure_future(self._idle.wait())
            await asyncio.wait([self._runner, drained], timeout=limits.SINK_CLOSE_S,
                               return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
            drained.cancel()
            self._runner.cancel()
            await asyncio.wait([self._runner, drained])
        await self.writer.close()

    # ---- step 5 of a start

    async def claim(self, record: CommitRecord, store: Store, transport: Transport, say: Say) -> None:
        """Claim the ledger for this incarnation and bring the sink up to the commit record. Waits while it is down."""
        pause = limits.RETRY_BACKOFF_S
        while True:
            try:
                await self.writer.open()
                await self._claim(record, store, transport)
                say(None)
                return
            except SinkUnavailable as down:
                say(f"sink {self.name} is down: {down}")
                logger.warning("task %s waits for sink %s: %s", self.task, self.name, down)
                await self.clock.sleep(pause)
                pause = min(pause * 2, limits.RETRY_BACKOFF_S_MAX)

    async def _claim(self, record: CommitRecord, store: Store, transport: Transport) -> None:
        found = await self.writer.read()
        decision = decide_claim(found, log_id=record.log_id, incarnation=record.incarnation, epoch=record.epoch)
        topic = TopicPartition(self.table.changelog, self.task.partition)
        hint = record.changelogs.get(self.table.changelog, 0)
        if isinstance(decision, Fenced):
            raise LedgerMoved(f"Sink {self.name}: task {self.task} was claimed by a newer incarnation, {found}.")
        claimed = Ledger(record.log_id, record.incarnation, found.epoch if found else 0, found.hint if found else 0)
        if isinstance(decision, Rebuild):
            claimed = msgspec.structs.replace(claimed, epoch=0, hint=0)
        await self.writer.apply(None, held=found, moved=claimed)
        self._held = claimed
        moved = Ledger(record.log_id, record.incarnation, record.epoch, hint)
        if isinstance(decision, UpToDate):
            await self._apply(None, moved)
        elif isinstance(decision, CatchUp):
            rows: Rows = {}
            async for key, value in self._replay(transport, topic, Offset(decision.hint), decision.epoch):
                rows[key] = value
            await self._apply(self._sink_rows(rows), moved)
        else:
            await self._rebuild(store, moved)

    async def _replay(
        self, transport: Transport, tp: TopicPartition, hint: Offset, above: int
    ) -> AsyncIterator[tuple[bytes, bytes | None]]:
        """Rows of epochs above ``above`` in log order; expired rows are none of a sink's business."""
        ends = (await transport.offsets([tp]))[tp]
        async for batch in transport.read(tp, Offset(max(hint, ends.begin)), ends.stable):
            for row in changelog.read(batch):
                if row.epoch > above and row.tombstone != "expire":
                    yield row.key, row.value

    async def _rebuild(self, store: Store, moved: Ledger) -> None:
        """No ledger, or none that can be trusted: upsert all live rows, then drop what is neither live nor past."""
        prefix = table_prefix(self.table.name)
        live = {key[len(prefix) :]: value for key, value in store.scan(prefix, _after(prefix))}
        rows = self._sink_rows(live)
        assert self.table.shape is not None
        shape = self.table.shape
        await self._apply(rows, moved)
        frame = self.work.results(iter(live.items()))
        starts = frame["window_start"].to_physical()
        identity = {(*row[:-1], start) for row, start in zip(frame.select(shape.identity).rows(), starts, strict=True)}
        since = starts.min()
        if since is not None:
            assert isinstance(since, int)
            await self.writer.prune(identity, since_ms=since, mine=self._mine, held=moved)

    def _mine(self, keys: tuple[object, ...]) -> bool:
        assert self.table.shape is not None
        return partition_of(encode_group_key(keys), self.table.shape.partitions) == self.task.partition

    # ---- while the task runs

    async def _run(self, wake: asyncio.Event) -> None:
        pause = limits.RETRY_BACKOFF_S
        while True:
            while not self._queue:
                self._more.clear()
                await self._more.wait()
            epochs = list(self._queue)
            try:
                await self._apply(self._sink_rows(_merge(epochs, self.table)), self._ledger_after(epochs[-1]))
            except SinkUnavailable as down:
                self.problem = str(down)
                logger.warning("sink %s of task %s is down, %d epochs wait: %s", self.name, self.task, len(epochs), down)
                await self.clock.sleep(pause)
                pause = min(pause * 2, limits.RETRY_BACKOFF_S_MAX)
                self._held = await self._reread() or self._held
                continue
            except (TaskFailure, LogLost) as failure:
                self.failure = failure
                wake.set()
                return
            self.problem, pause = None, limits.RETRY_BACKOFF_S
            for _ in epochs:
                self._queue.popleft()
            if not self._queue:
                self._idle.set()
            wake.set()

    async def _reread(self) -> Ledger | None:
        """After an outage it is not known whether the last step was taken: ours found moved on means that it was."""
        try:
            await self.writer.open()
            found = await self.writer.read()
        except SinkUnavailable:
            return None
        held = self._held
        ours = found is not None and held is not None and (found.log_id, found.incarnation) == (
            held.log_id, held.incarnation)  # fmt: skip
        return found if ours and found is not None and held is not None and found.epoch >= held.epoch else None

    async def _apply(self, rows: SinkRows | None, moved: Ledger) -> None:
        if self._held is not None and moved.epoch <= self._held.epoch and rows is None:
            return
        await self.writer.apply(rows, held=self._held, moved=moved)
        self._held = moved

    def _ledger_after(self, done: Committed) -> Ledger:
        record = done.record
        return Ledger(record.log_id, record.incarnation, record.epoch, done.applied.get(self.table.changelog, 0))

    def _sink_rows(self, rows: Rows) -> SinkRows | None:
        live = [(key, value) for key, value in rows.items() if value is not None]
        if not live:
            return None
        return sink_rows(self.work.results(live), self.use.emit)


def _merge(epochs: Iterable[Committed], table: StateTable) -> Rows:
    """Rows of several epochs, the last of each key."""
    rows: Rows = {}
    for done in epochs:
        for change in done.changes[table.name]:
            if change.tombstone != "expire":
                rows[change.key] = change.value
    return rows


def _after(prefix: bytes) -> bytes | None:
    """The first key behind every key that begins with ``prefix``; None if there is none."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else None
