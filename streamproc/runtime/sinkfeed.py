"""Feeds one sink of one task with committed epochs, in order, exactly once by the sink's ledger.

Two feeds lead to the same place: epochs handed over in memory after their commit, and a replay of the changelog for
what a ledger lacks when the task starts. Both filter by epoch number, so that neither applies what the other did.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from streamproc.commit.ledger import CatchUp, Fenced, Ledger, Rebuild, advanced, decide_claim
from streamproc.commit.record import CommitRecord
from streamproc.core import limits
from streamproc.core.clock import Clock
from streamproc.core.errors import LedgerMoved, SinkUnavailable
from streamproc.core.partitioner import partition_of
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.eventtime.windows import WindowState
from streamproc.operators.groupkeys import encode_group_key
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


class _Waiting(NamedTuple):
    """A committed epoch that the sink has not taken yet."""

    done: Committed
    size_bytes: int
    """Of its rows."""


async def open_feeds(task: Task, wake: asyncio.Event, say: Say) -> list[SinkFeed]:
    """Claim every declared sink of the task's tables, wait for those that are down, catch them up, start them."""
    assert task.record is not None
    assert task.store is not None
    assert task.work is not None
    feeds: list[SinkFeed] = []
    for table in task.env.group.tables:
        results = _Results(table, task.work)
        for use in table.sinks:
            assert table.shape is not None
            writer = use.sink.writer(table.shape, task.env.group.app_id, task.id.partition)
            feeds.append(SinkFeed(task.id, table, table.shape, use, writer, results, task.env.clock))
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
        results: _Results,
        clock: Clock,
    ) -> None:
        self.task, self.table, self.shape, self.use = task, table, shape, use
        self.writer, self._results, self.clock = writer, results, clock
        self.failure: Exception | None = None
        self.problem: str | None = None
        """Why the sink is behind, in words; None while it is not."""
        self._held: Ledger | None = None
        self._queue: deque[_Waiting] = deque()
        self._queue_bytes = 0
        self._at_once = limits.SINK_QUEUE_EPOCHS_MAX
        """Epochs merged into one step: half as many after an outage, one more after each success. A sink too slow for all
        that waits would else be given the same, and fail at the same, for ever."""
        self._more = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def name(self) -> str:
        return self.use.sink.name

    @property
    def full(self) -> bool:
        """More waits than may: the task gives its work nothing new."""
        return len(self._queue) >= limits.SINK_QUEUE_EPOCHS_MAX or self._queue_bytes >= limits.SINK_QUEUE_BYTES_MAX

    @property
    def queued(self) -> tuple[int, int]:
        """Epochs that wait, and the bytes of their rows."""
        return len(self._queue), self._queue_bytes

    @property
    def delay(self) -> str:
        """What a full queue means, in words."""
        why = f"it is down: {self.problem}" if self.problem else "it is slower than its input"
        return f"{len(self._queue)} epochs wait for sink {self.name}, and the input with them: {why}"

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is under way."""
        return self._idle.is_set()

    @property
    def applied_epoch(self) -> int:
        return self._held.epoch if self._held is not None else 0

    def offer(self, done: Committed) -> None:
        waiting = _Waiting(done, _size_bytes(done, self.table))
        self._queue.append(waiting)
        self._queue_bytes += waiting.size_bytes
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
            await self._catch_up(record, transport, decision.hint, decision.from_epoch)
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

    async def _catch_up(self, record: CommitRecord, transport: Transport, hint: Offset, from_epoch: int) -> None:
        """Apply the changelog's epochs from ``from_epoch`` on, some whole ones at a time. The ledger goes along: a crash or an
        outage goes on from there, and shows no row as it was before."""
        rows, size_bytes, epoch = Rows(), 0, from_epoch
        async for row in self._replay(transport, hint, from_epoch):
            if row.epoch > epoch and size_bytes >= limits.SINK_CATCH_UP_BYTES_MAX:
                await self._move(self._sink_rows(rows), epoch, row.offset)
                rows, size_bytes = Rows(), 0
            rows[row.key], epoch = row.value, row.epoch
            size_bytes += len(row.key) + len(row.value or b"")
        await self._move(self._sink_rows(rows), record.epoch, record.changelogs.get(self.table.changelog, 0))

    async def _replay(
        self, transport: Transport, hint: Offset, from_epoch: int
    ) -> AsyncIterator[changelog.ChangelogRow]:
        """Rows of ``from_epoch`` and later in log order; expired rows are none of a sink's business."""
        tp = TopicPartition(self.table.changelog, self.task.partition)
        ends = (await transport.offsets([tp]))[tp]
        async for batch in transport.read(tp, Offset(max(hint, ends.begin)), ends.stable):
            for row in changelog.read(batch):
                if row.epoch >= from_epoch and row.tombstone != "expire":
                    yield row

    async def _rebuild(self, store: Store) -> None:
        """No ledger, or none that can be trusted: upsert all live rows, then drop what is neither live nor past.

        Only the rows' identities are all in memory at once."""
        assert self._held is not None
        identity: set[tuple[Any, ...]] = set()
        for live in _pages(store, table_prefix(self.table.name)):
            rows = self._sink_rows(live)
            if rows is None:
                continue
            await self.writer.apply(rows, held=self._held, moved=self._held)
            starts = rows.upserts["window_start"].to_physical()
            keys = rows.upserts.select(list(self.shape.keys)).rows()
            identity.update((*key, start) for key, start in zip(keys, starts, strict=True))
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
            epochs = [waiting.done for waiting in islice(self._queue, self._at_once)]
            try:
                last = epochs[-1]
                hint = last.applied.get(self.table.changelog, 0)
                await self._move(self._results.of(epochs, self.use.emit), last.record.epoch, hint)
            except SinkUnavailable as down:
                self.problem = str(down)
                logger.warning(
                    "sink %s of task %s is down, %d epochs wait: %s", self.name, self.task, len(self._queue), down
                )
                self._at_once = max(len(epochs) // 2, 1)
                await self.clock.sleep(pause)
                pause = min(pause * 2, limits.RETRY_BACKOFF_S_MAX)
                self._held = await self._reread() or self._held
            else:
                self.problem, pause = None, limits.RETRY_BACKOFF_S
                self._at_once = min(self._at_once + 1, limits.SINK_QUEUE_EPOCHS_MAX)
            self._drop_applied()
            wake.set()

    def _drop_applied(self) -> None:
        """By the ledger, not by what was tried: a step that had no answer may have been taken all the same."""
        while self._queue and self._queue[0].done.record.epoch <= self.applied_epoch:
            self._queue_bytes -= self._queue.popleft().size_bytes
        if not self._queue:
            self.problem = None
            self._idle.set()

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
        return self._results.of_rows(rows, self.use.emit)


class _Results:
    """What a table's sinks are told of committed epochs, computed once for all that are told the same."""

    def __init__(self, table: StateTable, work: Work) -> None:
        self.table, self.work = table, work
        self._last: dict[Emit, tuple[tuple[int, int], SinkRows | None]] = {}
        """First and last epoch of the last answer, a way of telling: sinks that keep pace ask for the same in turn."""

    def of(self, epochs: list[Committed], emit: Emit) -> SinkRows | None:
        """Rows of ``epochs``, the last of each key."""
        wanted = epochs[0].record.epoch, epochs[-1].record.epoch
        known = self._last.get(emit)
        if known is None or known[0] != wanted:
            known = self._last[emit] = wanted, self.of_rows(_merge(epochs, self.table), emit)
        return known[1]

    def of_rows(self, rows: Rows, emit: Emit) -> SinkRows | None:
        """Rows that a sink is told of, chosen before their results are computed: what is only on its way to a result, a sum
        beyond its type say, is none of a sink's that waits for the last word."""
        least = _LEAST_STATE[emit]
        live = [
            (key, value)
            for key, value in rows.items()
            if value is not None and is_row(key) and RowLayout.stamp(value)[0] >= least
        ]
        if not live:
            return None
        frame = self.work.results(live)
        return sink_rows(frame.drop("__epoch"), emit)


def _size_bytes(done: Committed, table: StateTable) -> int:
    return sum(len(change.key) + len(change.value or b"") for change in done.changes[table.name])


def _pages(store: Store, prefix: bytes) -> Iterator[Rows]:
    """The table's rows under their own keys, `SINK_CATCH_UP_BYTES_MAX` at a time."""
    rows, size_bytes = Rows(), 0
    for key, value in store.scan(prefix, table_stop(prefix)):
        rows[key[len(prefix) :]] = value
        size_bytes += len(key) + len(value)
        if size_bytes >= limits.SINK_CATCH_UP_BYTES_MAX:
            yield rows
            rows, size_bytes = Rows(), 0
    if rows:
        yield rows


def _merge(epochs: Iterable[Committed], table: StateTable) -> Rows:
    """Rows of several epochs, the last of each key."""
    rows: Rows = {}
    for done in epochs:
        for change in done.changes[table.name]:
            if change.tombstone != "expire":
                rows[change.key] = change.value
    return rows
