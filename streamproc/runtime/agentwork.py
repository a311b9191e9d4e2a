"""Per-record agents of one task: handed records out of batches, cut off at a barrier, made anew after every abort.

An agent's instance iterates a plain list; a barrier shortens that list behind the record the agent is at, so handing a
record out costs no counter, no lock and no queue hop. A record that fails its agent is run alone, then set aside.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol

from streamproc.commit.record import CommitRecord, tp_name
from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.clock import Clock
from streamproc.core.errors import BarrierTimeout, RowRefused, StreamprocError, UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.operators.side import side_record
from streamproc.operators.source import Counters
from streamproc.runtime.work import AgentFailed, Work
from streamproc.transport.contract import OutRecord

__all__ = ["CURRENT", "AgentSpec", "AgentWork", "Instance", "OnFail", "RowReader", "TaskStream", "Trouble"]

CURRENT: ContextVar[Instance] = ContextVar("streamproc_agent")
"""The instance whose code runs: set once, in the instance's own context, because an instance belongs to one task."""


OnFail = Literal["dead_letter", "stop"]
"""What becomes of a record that has failed its agent as often as it may: set aside, or the worker stops in front of it."""


class RowReader(Protocol):
    """Values of one topic: `avro.rows.RowDecoder`, or plain bytes."""

    def rows(self, batch: RawBatch) -> tuple[list[Any], list[Any]]:
        """Good values in order, and what could not be decoded (``row``, ``reason``, ``schema_id``)."""


@dataclass(frozen=True)
class AgentSpec:
    """A declared agent: ``run`` is called once per task and never returns while the task lives."""

    name: str
    topics: tuple[str, ...]
    run: Callable[[TaskStream], Awaitable[None]]
    where: str
    on_fail: OnFail = "dead_letter"
    tries: int = limits.RECORD_FAILURES_MAX
    """How often a record is given to the agent before ``on_fail`` is done; at least 1."""


@dataclass
class Suspect:
    """A record that failed its agent."""

    offset: int
    failures: int
    reason: str


@dataclass
class Trouble:
    """What a task remembers of failing records over its restarts; forgotten with the worker, which only costs a retry."""

    suspects: dict[tuple[str, TopicPartition], Suspect] = field(default_factory=dict)
    careful: dict[tuple[str, TopicPartition], int] = field(default_factory=dict)
    """Records below this offset run one an epoch: one of them wrote what the broker refused."""

    def pause_s(self, agent: str) -> float:
        """Before ``agent`` is tried again: nothing after a first failure, then ever longer. What failed it, a service it
        calls say, may be back by then, and many tries are no spin."""
        failures = max((known.failures for (name, _), known in self.suspects.items() if name == agent), default=0)
        if failures < 2:
            return 0.0
        return min(limits.RETRY_BACKOFF_S * 2.0 ** min(failures - 2, 10), limits.RETRY_BACKOFF_S_MAX)


class Turn(NamedTuple):
    """The record that an epoch holds alone."""

    tp: TopicPartition
    offset: int
    """Its own: the committed position may lie before it, across a gap."""
    set_aside: bool
    """It was not run: the epoch holds its dead letter."""


@dataclass
class Pending:
    """A decoded batch as one instance goes through it."""

    batch: RawBatch
    rows: Sequence[int]
    """Row in the batch of each value."""
    values: list[Any]
    bad: list[Any]
    at: int = 0

    def offset(self, index: int) -> int:
        return int(self.batch.offsets[self.rows[index]])


class Instance:
    """One agent in one task."""

    def __init__(self, work: AgentWork, spec: AgentSpec, positions: dict[TopicPartition, int], first: bool) -> None:
        self.work, self.spec, self.positions = work, spec, positions
        self.overlays: Mapping[str, Any] = _Shut(f"Agent {spec.name} has no record in hand")
        """The tables while it has a record in hand. What it does at another time, in a task it left behind say, would fall
        into the gap between an epoch's freeze and its end, and be lost: it is refused."""
        self.idle = True
        """It has no record in hand."""
        self.chunk: list[Any] = []
        self.it: Any = iter(self.chunk)
        """What the agent iterates; its length hint tells how much of ``chunk`` is left, so nothing is counted."""
        self._speaks = first
        """Undecodable records are no agent's; the first agent of a topic sets them aside."""
        self._pending: deque[Pending] = deque()
        self._size = 16
        """How many records it is handed at once: it finds out, and a first handful must not be an epoch too large."""
        self.loaded = False
        """Records are handed out whose positions do not count yet."""
        self._began = 0.0
        self._wake = asyncio.Event()
        self.runner: asyncio.Task[None] | None = None

    # ---- where it stands

    def index(self) -> int:
        """Index, within the pending batch, of the record the agent is at."""
        left: int = self.it.__length_hint__()
        return self._pending[0].at + len(self.chunk) - left - 1

    def record(self) -> tuple[RawBatch, int]:
        """The batch and row of the record the agent is at; `IndexError` while it has none in hand."""
        if not self.loaded:
            raise IndexError
        pending = self._pending[0]
        return pending.batch, pending.rows[self.index()]

    @property
    def backlog(self) -> int:
        return len(self._pending)

    def cut(self) -> None:
        """End the agent's ``async for`` after the record it is at."""
        del self.chunk[len(self.chunk) - self.it.__length_hint__() :]

    def wake(self) -> None:
        self._wake.set()

    def give(self, pending: Pending) -> None:
        self._pending.append(pending)
        self._wake.set()

    def kill(self) -> None:
        """Nothing that its code still does, in a ``finally`` say, may touch the task."""
        self.overlays = _Shut(f"Agent {self.spec.name} was given up")
        if self.runner is not None:
            self.runner.cancel()

    # ---- called from the agent's own ``async for``

    async def next_chunk(self) -> None:
        self._finish()
        while not self._load():
            if not self.idle:
                self._rest()
            self.work.note_idle()
            self._wake.clear()
            await self._wake.wait()
        if self.idle:
            self.idle, self.overlays = False, self.work.overlays

    def _rest(self) -> None:
        self.idle, self.overlays = True, _Shut(f"Agent {self.spec.name} has no record in hand")

    def _finish(self) -> None:
        """The records handed out are done: their position counts from now on."""
        if not self.loaded:
            return
        self.loaded = False
        self.cut()  # an agent that left its ``async for`` and began another was not handed the rest
        pending = self._pending[0]
        pending.at += len(self.chunk)
        took = self.work.clock.monotonic_s() - self._began
        self._size = (
            min(self._size * 2, 16384) if took < 0.005 else max(self._size // 2, 1) if took > 0.02 else self._size
        )
        self.chunk = []
        self.it = iter(self.chunk)
        self._move(pending)
        self.work.chunk_done(self)

    def _move(self, pending: Pending) -> None:
        tp = pending.batch.tp
        done = pending.at >= len(pending.values)
        position = int(pending.batch.next_position) if done else pending.offset(pending.at)
        if self._speaks:
            while pending.bad and int(pending.batch.offsets[pending.bad[0].row]) < position:
                self.work.set_aside(pending.batch, pending.bad.pop(0))
        self.positions[tp] = position
        if done:
            self._pending.popleft()
            self.work.wake()

    def _load(self) -> bool:
        """Hand out the next chunk, if there is one and the task lets it."""
        if not self.work.may_hand_out(self) or not self._pending:
            return False
        pending = self._pending[0]
        if pending.at >= len(pending.values):
            self._move(pending)
            return self._load()
        size = self.work.chunk_size(self, pending, self._size)
        if size == 0:
            return False
        self.chunk = pending.values[pending.at : pending.at + size]
        self.it = iter(self.chunk)
        self.loaded = True
        self._began = self.work.clock.monotonic_s()
        return True

    def skip(self, pending: Pending, reason: str) -> None:
        """Pass over the record at hand: it is a dead letter."""
        batch, row = pending.batch, pending.rows[pending.at]
        self.work.write_dead_letter(batch, row, reason, None)
        pending.at += 1
        self._move(pending)


class TaskStream:
    """What an agent iterates: the records of its topics in this task."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._values()

    async def _values(self) -> AsyncIterator[Any]:
        instance, pause = self._instance, asyncio.sleep
        while True:
            await instance.next_chunk()
            for value in instance.it:
                yield value
            await pause(0)

    async def items(self) -> AsyncIterator[tuple[bytes | None, Any]]:
        """(key bytes, value) of each record."""
        async for value in self:
            batch, row = self._instance.record()
            yield batch.key(row), value

    async def take(self, max_: int, within: float = 0) -> AsyncIterator[list[Any]]:
        """Up to ``max_`` values at a time out of what has arrived; a batch never spans two partitions. ``within`` is
        accepted for Faust's sake: what has arrived is not held back."""
        instance = self._instance
        while True:
            await instance.next_chunk()
            # Taken off the iterator only when yielded: a barrier cuts off the rest.
            while values := list(islice(instance.it, max_)):
                yield values
            await asyncio.sleep(0)

    def __getattr__(self, name: str) -> Any:
        raise UserError(
            f"stream.{name} is not available to an agent of streamproc yet.",
            remedy="Use `async for value in stream`, `stream.items()` or `stream.take()`, or declare a pipeline.",
            where=self._instance.spec.where,
        )


class AgentWork(Work):
    """The agents of one task over their shared tables and outputs."""

    def __init__(self, specs: Sequence[AgentSpec], readers: Mapping[str, RowReader], dead_letters: Mapping[str, str],
                 clock: Clock, trouble: Trouble, partition: int) -> None:  # fmt: skip
        super().__init__()
        self.specs, self._readers, self._dead_letters = specs, readers, dead_letters
        self.clock, self._trouble, self.partition = clock, trouble, partition
        self.overlays: Mapping[str, Any] = {}
        self._instances: list[Instance] = []
        self._outputs: dict[TopicPartition, list[OutRecord]] = {}
        self._gate = True
        self._all_idle = asyncio.Event()
        self._solo: Instance | None = None
        """Has a record to run alone: nothing else is handed out until that one is through."""
        self._turn: Turn | None = None
        self._counters, self._uncommitted = Counters(), Counters()
        self._output_bytes = 0

    # ---- life

    def open(self, record: CommitRecord, overlays: Mapping[str, Any]) -> None:
        self._blame()
        self._kill()
        self.overlays, self._outputs, self._output_bytes = overlays, {}, 0
        self._committed = record.positions
        self._gate, self._solo, self._turn, self.wants_commit = True, None, None, False
        self._uncommitted = Counters()
        speakers: set[str] = set()
        for spec in self.specs:
            positions = {
                tp: record.positions[spec.name][tp_name(tp)]
                for topic in spec.topics
                if tp_name(tp := TopicPartition(topic, self.partition)) in record.positions[spec.name]
            }
            first = not speakers.intersection(spec.topics)
            speakers.update(spec.topics)
            self._instances.append(Instance(self, spec, positions, first))

    def _start(self, instance: Instance) -> None:
        async def run() -> None:
            CURRENT.set(instance)
            try:
                if pause_s := self._trouble.pause_s(instance.spec.name):
                    await self.clock.sleep(pause_s)
                await instance.spec.run(TaskStream(instance))
            except asyncio.CancelledError as cancelled:
                if instance not in self._instances:
                    raise
                # Not by us: it awaited something that was cancelled. A dead agent that nobody hears of is a hang.
                raise RuntimeError("the agent was cancelled from within").with_traceback(
                    cancelled.__traceback__
                ) from None
            raise UserError(
                f"Agent {instance.spec.name} returned.",
                remedy="An agent iterates its stream for ever: `async for value in stream: …`.",
                where=instance.spec.where,
            )

        def ended(runner: asyncio.Task[None]) -> None:
            if not runner.cancelled() and (failure := runner.exception()) is not None and instance in self._instances:
                self.failure = failure
                self._failed = instance
                self._all_idle.set()
                self.wake()

        instance.runner = asyncio.create_task(run(), name=f"agent {instance.spec.name} of partition {self.partition}")
        instance.runner.add_done_callback(ended)

    def _kill(self) -> None:
        instances, self._instances = self._instances, []
        for instance in instances:
            instance.kill()

    async def close(self) -> None:
        runners = [instance.runner for instance in self._instances if instance.runner is not None]
        self._kill()
        if runners:
            await asyncio.wait(runners, timeout=limits.AGENT_CANCEL_S)

    def _blame(self) -> None:
        """Note which record failed; an error that no record is to blame for stops the worker."""
        failure, self.failure = self.failure, None
        if failure is None:
            return
        ours = isinstance(failure, StreamprocError) and not isinstance(failure, RowRefused)
        if ours or not isinstance(failure, Exception):
            raise failure  # a broker that is down, a damaged store, a wrong setting: no record is to blame
        instance = self._failed
        try:
            batch, row = instance.record()
        except IndexError:
            raise UserError(
                f"Agent {instance.spec.name} failed outside of any record: {failure!r}.",
                remedy="Mend the code before or after its `async for`.",
                where=instance.spec.where,
            ) from failure
        self._suspect(instance.spec, batch.tp, int(batch.offsets[row]), _line_of(failure))

    def _suspect(self, spec: AgentSpec, tp: TopicPartition, offset: int, reason: str) -> None:
        """Note one more failure of a record; `UserError`, which stops the worker, if its agent is to stop at it now."""
        known = self._trouble.suspects.get((spec.name, tp))
        failures = known.failures + 1 if known is not None and known.offset == offset else 1
        self._trouble.suspects[spec.name, tp] = Suspect(offset, failures, reason)
        if spec.on_fail == "stop" and failures >= spec.tries:
            raise UserError(
                f"Agent {spec.name} failed {_times(failures)} on {tp.topic} partition {tp.partition}, offset {offset}: "
                f"{reason}.",
                remedy="Nothing of this record is committed: mend the agent and start again, it goes on here. With "
                'on_fail="dead_letter" the record would be set aside.',
                where=spec.where,
            )

    @property
    def problem(self) -> str | None:
        for (agent, tp), suspect in self._trouble.suspects.items():
            tries = next((spec.tries for spec in self.specs if spec.name == agent), limits.RECORD_FAILURES_MAX)
            return (
                f"agent {agent} failed {suspect.failures} of {tries} tries on {tp.topic} partition {tp.partition}, "
                f"offset {suspect.offset}: {suspect.reason}"
            )
        return None

    def refused(self, reason: str) -> bool:
        """The broker, or a table, refused the epoch: find the record by running them one an epoch, then treat it as failed."""
        if self._solo is not None and (turn := self._turn) is not None:
            if turn.set_aside:
                return False  # it was the dead letter that is refused
            self._suspect(self._solo.spec, turn.tp, turn.offset, reason)
            return True
        found = False
        for instance in self._instances:
            for tp, position in instance.positions.items():
                before = self._committed[instance.spec.name][tp_name(tp)]
                if position != before:
                    found = True
                    self._trouble.careful[instance.spec.name, tp] = position
        return found

    # ---- records in

    def resume_at(self) -> dict[TopicPartition, Offset]:
        least: dict[TopicPartition, Offset] = {}
        for instance in self._instances:
            for tp, position in instance.positions.items():
                least[tp] = Offset(min(position, least.get(tp, Offset(position))))
        return least

    def ready(self) -> bool:
        return all(instance.backlog < 2 for instance in self._instances)

    def process(self, batch: RawBatch) -> None:
        values, bad = self._readers[batch.tp.topic].rows(batch)
        broken = {record.row for record in bad}
        rows: Sequence[int] = [row for row in range(len(batch)) if row not in broken] if broken else range(len(batch))
        for instance in self._instances:
            position = instance.positions.get(batch.tp)
            if position is None or position >= batch.next_position:
                continue
            at = 0
            if len(batch) and batch.offsets[0] < position:
                at = sum(1 for row in rows if batch.offsets[row] < position)
            mine = [record for record in bad if batch.offsets[record.row] >= position]
            instance.give(Pending(batch, rows, values, mine, at))
        self._uncommitted.records += len(batch)

    # ---- asked by the instances

    def may_hand_out(self, instance: Instance) -> bool:
        return self._gate and instance in self._instances and self._solo in (None, instance) and not self.wants_commit

    def chunk_size(self, instance: Instance, pending: Pending, wanted: int) -> int:
        """How many records may be handed out now; 0 while a commit has to come first."""
        key = (instance.spec.name, pending.batch.tp)
        suspect, offset = self._trouble.suspects.get(key), pending.offset(pending.at)
        careful = self._trouble.careful.get(key, 0) > offset
        if not careful and (suspect is None or suspect.offset != offset):
            if suspect is not None and suspect.offset > offset:
                ahead = sum(1 for i in range(pending.at, min(pending.at + wanted, len(pending.values)))
                            if pending.offset(i) < suspect.offset)  # fmt: skip
                return max(ahead, 1)
            return wanted
        if self.dirty or not all(other.idle for other in self._instances if other is not instance):
            self._solo = instance
            self._ask_commit()
            return 0
        hopeless = suspect is not None and suspect.offset == offset and suspect.failures >= instance.spec.tries
        self._solo, self._turn = instance, Turn(pending.batch.tp, offset, hopeless)
        if hopeless and suspect is not None:
            instance.skip(pending, f"agent {instance.spec.name} failed {_times(suspect.failures)}: {suspect.reason}")
            self._ask_commit()
            return 0
        return 1

    def chunk_done(self, instance: Instance) -> None:
        if self._solo is instance or self.size_bytes > limits.EPOCH_BYTES_MAX:
            self._ask_commit()

    def _ask_commit(self) -> None:
        self.wants_commit = True
        self.wake()

    def note_idle(self) -> None:
        if all(instance.idle for instance in self._instances):
            self._all_idle.set()

    def send(self, tp: TopicPartition, record: OutRecord) -> None:
        """A record of this epoch's transaction."""
        self._outputs.setdefault(tp, []).append(record)
        self._output_bytes += len(record.value or b"") + len(record.key or b"") + 64

    def set_aside(self, batch: RawBatch, bad: Any) -> None:
        self.write_dead_letter(batch, bad.row, bad.reason, bad.schema_id)

    def write_dead_letter(self, batch: RawBatch, row: int, reason: str, schema_id: int | None) -> None:
        letter = side_record("dead", batch, row, self._dead_letters[batch.tp.topic], reason, schema_id)
        self.send(TopicPartition(letter.topic, self.partition), OutRecord(letter.key, letter.value, letter.headers))
        self._uncommitted.count_dead(reason)

    # ---- the epoch

    async def barrier(self) -> None:
        self._gate = False
        for instance in self._instances:
            instance.cut()
        self._all_idle.clear()
        self.note_idle()
        try:
            if self.failure is None:
                await asyncio.wait_for(self._all_idle.wait(), limits.BARRIER_TIMEOUT_S)
        except TimeoutError:
            slow = next((i for i in self._instances if not i.idle), None)
            if slow is None:  # in the very moment
                return
            line = "; ".join(
                f"{f.f_code.co_filename}:{f.f_lineno}" for f in (slow.runner.get_stack() if slow.runner else [])
            )
            raise BarrierTimeout(
                f"Agent {slow.spec.name} holds a record for more than {limits.BARRIER_TIMEOUT_S} s, at {line}: the epoch "
                "was given up. Make the call shorter or bound it with asyncio.timeout."
            ) from None
        if self.failure is not None:
            raise AgentFailed

    def release(self) -> None:
        self._gate, self.wants_commit = True, False
        if self._turn is not None:  # else it is its turn now, before the others are busy again
            self._solo = self._turn = None
        for instance in self._instances:
            if instance.runner is None:
                self._start(instance)
            instance.wake()

    def collect(self, epoch: int) -> None:
        """Everything is where it belongs already."""

    def outputs(self) -> dict[TopicPartition, list[OutRecord]]:
        return {tp: list(records) for tp, records in self._outputs.items()}

    def positions(self) -> dict[str, dict[str, int]]:
        return {i.spec.name: {tp_name(tp): int(at) for tp, at in i.positions.items()} for i in self._instances}

    def committed(self, record: CommitRecord) -> None:
        self._outputs, self._output_bytes = {}, 0
        self._committed = record.positions
        self._fold_counters()
        for key in list(self._trouble.suspects):
            if record.positions[key[0]][tp_name(key[1])] > self._trouble.suspects[key].offset:
                del self._trouble.suspects[key]

    def _fold_counters(self) -> None:
        self._counters.add(self._uncommitted)
        self._uncommitted = Counters()

    @property
    def dirty(self) -> bool:
        # Records in hand count: their positions are noted only when the chunk is through or cut off.
        return bool(self._outputs) or any(i.loaded for i in self._instances) or self.positions() != self._committed

    @property
    def size_bytes(self) -> int:
        held: int = sum(overlay.size_bytes for overlay in self.overlays.values())
        return self._output_bytes + held

    @property
    def counters(self) -> Counters:
        return self._counters


class _Shut(Mapping[str, Any]):
    """The tables of an instance that may not touch them."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getitem__(self, name: str) -> Any:
        raise RuntimeError(f"{self._why}: table {name} is not its to touch. Use tables within `async for` only.")

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def _times(failures: int) -> str:
    return "once" if failures == 1 else f"{failures} times"


def _line_of(failure: BaseException) -> str:
    """Type and place; never the message, which may hold a user's data."""
    frames = traceback.extract_tb(failure.__traceback__)
    own = [f for f in frames if "/streamproc/" not in f.filename] or frames
    return f"{type(failure).__name__} at {own[-1].filename}:{own[-1].lineno}" if own else type(failure).__name__
