"""Feeds one sink of one task with committed epochs, in order, exactly once by the sink's ledger.

Two feeds lead to the same place: epochs handed over in memory after their commit, and a replay of the changelog for
what a ledger lacks when the task starts. Both filter by epoch number, so that neither applies what the other did.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

from streamproc.commit.ledger import CatchUp, Fenced, Ledger, Rebuild, advanced, decide_claim
from streamproc.commit.record import CommitRecord
from streamproc.core import limits
from streamproc.core.clock import Clock
from streamproc.core.errors import LedgerMoved, SinkUnavailable
from streamproc.core.partitioner import partition_of
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.eventtime.windows import WindowState
from streamproc.operators.partials import encode_group_key
from streamproc.operators.tablerows import RowLayout, is_row
from streamproc.runtime.work import SinkUse, StateTable, Work
from streamproc.sinks.contract import Emit, SinkRows, SinkWriter, TableShape
from streamproc.sinks.feed import sink_rows
from streamproc.state import changelog
from streamproc.state.contract import Store
from streamproc.state.overlay import table_prefix, table_stop
from streamproc.transport.contract import Transport

if TYPE_CHECKING:
    from streamproc.runtime.epoch import Committed
    from streamproc.runtime.task import Task

__all__ = ["SinkFeed", "open_feeds"]

logger = logging.getLogger(__name__)

Rows = dict[bytes, bytes | None]
"""Changed rows by key; None: deleted by the user. Expired rows never get here: a sink keeps its own."""


_LEAST_STATE: Final[dict[Emit, WindowState]] = {
    "on_update": WindowState.OPEN,
    "on_close": WindowState.CLOSED,
    "final": WindowState.FINAL,
}
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
            feeds.append(SinkFeed(task.id, table, table.shape, use, writer, task.work, task.env.clock))
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
        self,
        task: TaskId,
        table: StateTable,
        shape: TableShape,
        use: SinkUse,
        writer: SinkWriter,
        work: Work,
        clock: Clock,
    ) -> None:
        self.task, self.table, self.shape, self.use = task, table, shape, use
        self.writer, self.work, self.clock = writer, work, clock
        self.failure: Exception | None = None
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
            try:
                await asyncio.wait([self._runner, drained], timeout=limits.SINK_CLOSE_S,
                                   return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
            finally:  # cancelled or not, nothing of it runs on
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
        decide = partial(decide_claim, found, log_id=record.log_id, incarnation=record.incarnation, epoch=record.epoch)
        decision = decide(expired=False)
        if isinstance(decision, CatchUp) and await self._expired(transport, decision.hint):
            decision = decide(expired=True)
        if isinstance(decision, Fenced):
            raise LedgerMoved(f"Sink {self.name}: task {self.task} was claimed by incarnation {decision.incarnation}.")
        await self.writer.apply(None, held=decision.held, moved=decision.claim)
        self._held = decision.claim
        if isinstance(decision, CatchUp):
            rows: Rows = {}
            async for key, value in self._replay(transport, decision.hint, decision.from_epoch):
                rows[key] = value
            await self._move(self._sink_rows(rows), record.epoch, record.changelogs.get(self.table.changelog, 0))
        elif isinstance(decision, Rebuild):
            logger.info("sink %s of task %s is rebuilt: %s", self.name, self.task, decision.reason)
            await self._rebuild(store)
            await self._move(None, record.epoch, record.changelogs.get(self.table.changelog, 0))

    async def _expired(self, transport: Transport, hint: Offset) -> bool:
        """Whether what lies behind the ledger is so old that tombstones may be gone from it."""
        oldest_ms = self.clock.now_ms()
        tp = TopicPartition(self.table.changelog, self.task.partition)
        ends = (await transport.offsets([tp]))[tp]
        async for batch in transport.read(tp, Offset(max(hint, ends.begin)), ends.stable):
            if len(batch):
                oldest_ms = int(batch.timestamps[0])
                break
        return self.clock.now_ms() - oldest_ms > limits.DELETE_RETENTION_MS

    async def _replay(
        self, transport: Transport, hint: Offset, from_epoch: int
    ) -> AsyncIterator[tuple[bytes, bytes | None]]:
        """Rows of ``from_epoch`` and later in log order; expired rows are none of a sink's business."""
        tp = TopicPartition(self.table.changelog, self.task.partition)
        ends = (await transport.offsets([tp]))[tp]
        async for batch in transport.read(tp, Offset(max(hint, ends.begin)), ends.stable):
            for row in changelog.read(batch):
                if row.epoch >= from_epoch and row.tombstone != "expire":
                    yield row.key, row.value

    async def _rebuild(self, store: Store) -> None:
        """No ledger, or none that can be trusted: upsert all live rows, then drop what is neither live nor past."""
        prefix = table_prefix(self.table.name)
        live: Rows = {key[len(prefix) :]: value for key, value in store.scan(prefix, table_stop(prefix))}
        rows = self._sink_rows(live)
        if rows is None:
            return
        assert self._held is not None
        await self.writer.apply(rows, held=self._held, moved=self._held)
        starts = rows.upserts["window_start"].to_physical()
        keys = rows.upserts.select(list(self.shape.keys)).rows()
        identity = {(*key, start) for key, start in zip(keys, starts, strict=True)}
        if identity:
            since_ms = min(start for *_, start in identity)
            await self.writer.prune(identity, since_ms=since_ms, mine=self._mine, held=self._held)

    def _mine(self, keys: tuple[object, ...]) -> bool:
        return partition_of(encode_group_key(keys, self.shape.keys), self.shape.partitions) == self.task.partition

    # ---- while the task runs

    async def _run(self, wake: asyncio.Event) -> None:
        try:
            await self._feed(wake)
        except Exception as failure:  # of any kind: a feed that dies unheard would hold its task for ever
            self.failure = failure
            wake.set()

    async def _feed(self, wake: asyncio.Event) -> None:
        pause = limits.RETRY_BACKOFF_S
        while True:
            while not self._queue:
                self._more.clear()
                await self._more.wait()
            epochs = list(self._queue)
            try:
                last = epochs[-1]
                hint = last.applied.get(self.table.changelog, 0)
                await self._move(self._sink_rows(_merge(epochs, self.table)), last.record.epoch, hint)
            except SinkUnavailable as down:
                self.problem = str(down)
                logger.warning(
                    "sink %s of task %s is down, %d epochs wait: %s", self.name, self.task, len(epochs), down
                )
                await self.clock.sleep(pause)
                pause = min(pause * 2, limits.RETRY_BACKOFF_S_MAX)
                self._held = await self._reread() or self._held
                continue
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

    async def _move(self, rows: SinkRows | None, epoch: int, hint: int) -> None:
        assert self._held is not None
        if epoch == self._held.epoch:
            return
        moved = advanced(self._held, epoch, hint)
        await self.writer.apply(rows, held=self._held, moved=moved)
        self._held = moved

    def _sink_rows(self, rows: Rows) -> SinkRows | None:
        """Rows that this sink is told of, chosen before their results are computed: what is only on its way to a result,
        a sum beyond its type say, is none of a sink's that waits for the last word."""
        least = _LEAST_STATE[self.use.emit]
        live = [
            (key, value)
            for key, value in rows.items()
            if value is not None and is_row(key) and RowLayout.stamp(value)[0] >= least
        ]
        if not live:
            return None
        frame = self.work.results(live)
        return sink_rows(frame.drop("__epoch"), self.use.emit)


def _merge(epochs: Iterable[Committed], table: StateTable) -> Rows:
    """Rows of several epochs, the last of each key."""
    rows: Rows = {}
    for done in epochs:
        for change in done.changes[table.name]:
            if change.tombstone != "expire":
                rows[change.key] = change.value
    return rows
