"""Our own fetch loop: whole record sets of many partitions, one request in flight per broker.

        resume ─▶ wanted ─▶ on its way ─▶ buffered ─▶ handed out by get()
                    ▲           │ error: blocked for a back-off, metadata asked again
                    └───────────┘
A `_Reading` is one `resume`: what was fetched for it is handed out only while it is still the partition's current one,
so an answer of an earlier generation can neither give a record nor move a position.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Final

from aiokafka.protocol.fetch import FetchRequest  # type: ignore[import-untyped,unused-ignore]
from aiokafka.protocol.offset import OffsetRequest  # type: ignore[import-untyped,unused-ignore]

from streamproc.avro import recordbatch
from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.errors import BrokerUnavailable, LogLost, StreamprocError, UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.kafka.codes import FORBIDDEN, Code, name_of
from streamproc.transport.kafka.wire import NoAnswer, Wire, by_topic

__all__ = ["KafkaFetcher", "Pace"]

log = logging.getLogger(__name__)
_READ_COMMITTED: Final = 1
_EARLIEST, _LATEST = -2, -1


class _Reading:
    """One `resume` of one partition."""

    def __init__(self, tp: TopicPartition, position: Offset) -> None:
        self.tp = tp
        self.position = position
        """Where the next request asks from."""
        self.handed = position
        """Where `get` has got to."""
        self.end: int | None = None
        """High watermark of the last answer."""
        self.stable = 0
        self.batches: deque[RawBatch] = deque()
        self.bytes = 0
        self.active = True
        self.blocked = False
        self.failures = 0
        self.failing_since: float | None = None
        self.why = ""
        self.error: StreamprocError | None = None
        """For `get` to raise, unless the partition is paused or resumed before."""


class Pace:
    """A trickle comes in fewer and larger pieces, but a few small answers behind a quiet time are never waited for: a token
    bucket that gains one every `limits.FETCH_PAUSE_S`."""

    def __init__(self) -> None:
        self._tokens, self._at_s = float(limits.FETCH_BURST), 0.0

    def pause_s(self, now_s: float) -> float:
        """Takes a token; how long it is until there is one."""
        gained = (now_s - self._at_s) / limits.FETCH_PAUSE_S
        self._tokens, self._at_s = min(self._tokens + gained, limits.FETCH_BURST) - 1, now_s
        return max(0.0, -self._tokens * limits.FETCH_PAUSE_S)


class KafkaFetcher:
    """`Fetcher` over Kafka.

    A broker that is down is tried for ever, with back-off and a line in the log for each new reason; `get` raises
    `BrokerUnavailable` for every `limits.FETCH_OUTAGE_S` in which a resumed partition had no answer, and may then
    simply be called again. `at_end` is false from the first failed fetch to the next answer.

    Bounds: `limits.FETCH_PARTITION_BYTES_MAX` a partition and request, `limits.FETCH_ANSWER_BYTES_MAX` a request, and
    nothing more is asked for beyond `limits.FETCH_BUFFER_BYTES_MAX` buffered (counted
    decompressed, so one round of answers may pass it).
    """

    def __init__(self, wire: Wire, lane: Hashable, *, bytes_max: int = limits.FETCH_BUFFER_BYTES_MAX) -> None:
        self._wire, self._clock, self._lane, self._bytes_max = wire, wire.clock, lane, bytes_max
        self._readings: dict[TopicPartition, _Reading] = {}
        """In the order in which the next request asks: who got data goes to the end."""
        self._ready: deque[_Reading] = deque()
        self._buffered = self._asked_bytes = 0
        self._busy: set[int] = set()
        self._paces: dict[int, Pace] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed, self._arrived = asyncio.Event(), asyncio.Event()
        self._failed: deque[_Reading] = deque()
        self._bugs: deque[BaseException] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._closed = False

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        self._drop(tp)
        self._readings[tp] = _Reading(tp, position)
        self._changed.set()
        if self._pump is None and not self._closed:
            self._pump = asyncio.create_task(self._run(), name="fetch")
            self._pump.add_done_callback(self._ended)

    def pause(self, tp: TopicPartition) -> None:
        self._drop(tp)

    async def get(self) -> RawBatch:
        while True:
            self._raise_first()
            batch = self._next()
            if batch is not None:
                return batch
            self._arrived.clear()
            await self._arrived.wait()

    def at_end(self, tp: TopicPartition) -> bool:
        reading = self._readings.get(tp)
        if reading is None or reading.end is None:
            return False
        return reading.active and not reading.failures and reading.handed >= reading.end

    def lag(self, tp: TopicPartition) -> int | None:
        reading = self._readings.get(tp)
        return None if reading is None or reading.end is None else max(0, reading.end - reading.handed)

    async def close(self) -> None:
        self._closed = True
        tasks = [*self._tasks, *([self._pump] if self._pump else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for tp in self._readings:
            self._drop(tp)

    def _raise_first(self) -> None:
        if self._bugs:
            raise self._bugs.popleft()
        while self._failed:
            reading = self._failed.popleft()
            error, reading.error = reading.error, None
            if error is not None and self._readings.get(reading.tp) is reading:
                raise error

    # Handing out

    def _next(self) -> RawBatch | None:
        """Round robin over the partitions that have something."""
        while self._ready:
            reading = self._ready.popleft()
            if not reading.batches:
                continue
            batch = reading.batches.popleft()
            size = batch.buffer.nbytes
            reading.bytes -= size
            self._buffered -= size
            reading.handed = batch.next_position
            if reading.batches:
                self._ready.append(reading)
            self._changed.set()
            return batch
        return None

    def _drop(self, tp: TopicPartition) -> None:
        reading = self._readings.get(tp)
        if reading is None:
            return
        reading.active, reading.error = False, None
        reading.batches.clear()
        self._buffered -= reading.bytes
        reading.bytes = 0
        self._changed.set()

    # Asking

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            for node, readings in self._wanted().items():
                if node is None:
                    self._spawn(self._find_leaders(self._block(readings)))
                elif node not in self._busy:
                    self._busy.add(node)
                    self._spawn(self._fetch(node, readings))
            await self._changed.wait()

    def _wanted(self) -> dict[int | None, list[_Reading]]:
        by_node: dict[int | None, list[_Reading]] = {}
        if self._buffered + self._asked_bytes >= self._bytes_max:
            return by_node
        share = self._share()
        for reading in self._readings.values():
            if reading.active and not reading.blocked and reading.bytes < share:
                by_node.setdefault(self._wire.leader(reading.tp), []).append(reading)
        return by_node

    def _share(self) -> int:
        active = sum(reading.active for reading in self._readings.values())
        return max(limits.FETCH_PARTITION_BYTES_MAX, self._bytes_max // max(1, active))

    async def _fetch(self, node: int, readings: list[_Reading]) -> None:
        room = self._bytes_max - self._buffered - self._asked_bytes
        asked_bytes = min(room, limits.FETCH_ANSWER_BYTES_MAX, len(readings) * limits.FETCH_PARTITION_BYTES_MAX)
        self._asked_bytes += asked_bytes
        try:
            topics = by_topic((r.tp, (r.tp.partition, r.position, limits.FETCH_PARTITION_BYTES_MAX)) for r in readings)
            request = FetchRequest(self._wait(readings), 1, asked_bytes, _READ_COMMITTED, topics)
            asked_from = {reading: reading.position for reading in readings}
            answer = await self._wire.send(node, request, self._lane)
            read_bytes = await self._read(answer, {reading.tp: reading for reading in readings}, asked_from)
            if read_bytes < limits.FETCH_SMALL_BYTES:
                await self._clock.sleep(self._paces.setdefault(node, Pace()).pause_s(self._clock.monotonic_s()))
        except NoAnswer as error:
            self._back_off(readings, str(error))
        finally:
            # Also when cancelled: the loop goes by these.
            self._asked_bytes -= asked_bytes
            self._busy.discard(node)
            self._changed.set()

    def _wait(self, asked: list[_Reading]) -> int:
        """Short when somebody was left out for a full buffer: it may drain long before the others get a record."""
        active = sum(reading.active and not reading.blocked for reading in self._readings.values())
        return limits.FETCH_WAIT_MS_MAX if len(asked) >= active else limits.FETCH_WAIT_MS_FULL

    async def _read(
        self, answer: Any, asked: dict[TopicPartition, _Reading], asked_from: dict[_Reading, Offset]
    ) -> int:
        """Returns the bytes of record sets that came."""
        silent, read_bytes = set(asked), 0
        nothing = not any(
            code or rest[-1] for _, partitions in answer.topics or () for _, code, _, _, *rest in partitions
        )
        for topic, partitions in answer.topics or ():
            for partition, code, end, stable, *rest in partitions:
                tp = TopicPartition(topic, partition)
                silent.discard(tp)
                reading = asked[tp]
                records = rest[-1] or b""
                read_bytes += len(records)
                if not self._current(reading) or reading.position != asked_from[reading]:
                    continue
                if code:
                    await self._refused(reading, code)
                    continue
                self._answered(reading, end, stable)
                aborted = (rest[0] if answer.API_VERSION < 5 else rest[1]) or ()
                self._take(reading, records, aborted, nothing=nothing)
        if silent:
            # A throttled answer leaves partitions out; asking at once again would only make it worse.
            self._back_off([asked[tp] for tp in silent], "left out of the broker's answer")
        return read_bytes

    def _answered(self, reading: _Reading, end: int, stable: int) -> None:
        if reading.failures:
            log.info("fetch of %s[%d]: answered again", *reading.tp)
        reading.end, reading.stable = end, stable
        reading.failures, reading.failing_since, reading.why = 0, None, ""

    def _take(self, reading: _Reading, records: bytes, aborted: Sequence[tuple[int, int]], *, nothing: bool) -> None:
        """``nothing``: the whole answer holds no record. A broker that has any sends one batch whatever the size limit,
        so there is none up to the last stable offset."""
        position = reading.position
        if records:
            try:
                batch = recordbatch.parse(reading.tp, records, position=position, aborted=aborted)
            except StreamprocError as error:
                self._fail(reading, error)
                return
        elif nothing and reading.stable > position:
            # Everything up to the last stable offset was compacted away or deleted.
            batch = recordbatch.parse(reading.tp, b"", position=Offset(reading.stable), aborted=())
        else:
            return
        if batch.next_position <= position:
            return
        reading.position = batch.next_position
        reading.batches.append(batch)
        reading.bytes += batch.buffer.nbytes
        self._buffered += batch.buffer.nbytes
        if reading not in self._ready:
            self._ready.append(reading)
        self._readings[reading.tp] = self._readings.pop(reading.tp)
        self._arrived.set()

    # Failing

    async def _refused(self, reading: _Reading, code: int) -> None:
        if code == Code.OFFSET_OUT_OF_RANGE:
            await self._lost(reading)
        elif code in FORBIDDEN:
            fact = f"Reading {reading.tp.topic}[{reading.tp.partition}]: {name_of(code)}."
            self._fail(reading, UserError(fact, remedy="Grant the application's Kafka user this right."))
        else:
            self._back_off([reading], name_of(code))

    async def _lost(self, reading: _Reading) -> None:
        """Say what the log does hold; a broker that cannot tell just now is asked again by the next fetch."""
        tp, leader = reading.tp, self._wire.leader(reading.tp)
        found = []
        for timestamp in (_EARLIEST, _LATEST):
            request = OffsetRequest(-1, 0, [(tp.topic, [(tp.partition, timestamp)])])
            try:
                answer = await self._wire.send(leader if leader is not None else -1, request, self._lane)
            except NoAnswer as error:
                self._back_off([reading], str(error))
                return
            [(_, [(_, code, _, offset)])] = answer.topics
            if code:
                self._back_off([reading], name_of(code))
                return
            found.append(offset)
        begin, end = found
        if not self._current(reading):
            return
        if begin <= reading.position <= end:  # a leader that was behind for a moment
            self._back_off([reading], name_of(Code.OFFSET_OUT_OF_RANGE))
            return
        gap = begin - reading.position if reading.position < begin else reading.position - end
        self._fail(
            reading,
            LogLost(
                f"{tp.topic}[{tp.partition}] is to be read from offset {reading.position}, but the log holds "
                f"{begin} to {end}: {gap} offsets are missing. Raise the topic's retention, or, to start anew with what "
                "is left, run `streamproc reset MODULE`."
            ),
        )

    def _fail(self, reading: _Reading, error: StreamprocError) -> None:
        """Nothing more is read of it."""
        if self._current(reading):
            self._drop(reading.tp)
            self._tell(reading, error)

    def _tell(self, reading: _Reading, error: StreamprocError) -> None:
        reading.error = error
        self._failed.append(reading)
        self._arrived.set()

    def _back_off(self, readings: Iterable[_Reading], why: str) -> None:
        """Leave these out for a while, each for as long as it has earned, and ask who leads them now."""
        for reading in self._block(readings):
            if reading.failing_since is None:
                reading.failing_since = self._clock.monotonic_s()
            if why != reading.why:
                log.warning("fetch of %s[%d] from %d: %s; trying again", *reading.tp, reading.position, why)
                reading.why = why
            self._complain(reading)
            pause = min(limits.RETRY_BACKOFF_S * 2 ** min(reading.failures, 16), limits.RETRY_BACKOFF_S_MAX)
            reading.failures += 1
            self._spawn(self._unblock_later(reading, pause))

    def _block(self, readings: Iterable[_Reading]) -> list[_Reading]:
        blocked = [reading for reading in readings if self._current(reading) and not reading.blocked]
        for reading in blocked:
            reading.blocked = True
        return blocked

    def _unblock(self, readings: Iterable[_Reading]) -> None:
        for reading in readings:
            reading.blocked = False
        self._changed.set()

    async def _unblock_later(self, reading: _Reading, pause_s: float) -> None:
        try:
            await self._clock.sleep(pause_s)
            await self._wire.refresh()
        finally:
            self._unblock([reading])

    async def _find_leaders(self, readings: list[_Reading]) -> None:
        """A topic's first reading is no failure; no leader after a fresh answer is."""
        try:
            await self._wire.refresh()
        finally:
            self._unblock(readings)
        self._back_off([r for r in readings if self._wire.leader(r.tp) is None], "no leader is known")

    def _complain(self, reading: _Reading) -> None:
        now, since = self._clock.monotonic_s(), reading.failing_since
        if since is None or now - since < limits.FETCH_OUTAGE_S:
            return
        reading.failing_since = now
        self._tell(
            reading,
            BrokerUnavailable(
                f"{reading.tp.topic}[{reading.tp.partition}] had no answer for {limits.FETCH_OUTAGE_S:g} s "
                f"({reading.why}). The fetch goes on trying; look at the broker's log."
            ),
        )

    def _current(self, reading: _Reading) -> bool:
        return reading.active and self._readings.get(reading.tp) is reading

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A bug in a task of ours must reach `get`, not the event loop's log."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._bugs.append(error)
            self._arrived.set()
