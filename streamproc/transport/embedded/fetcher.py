"""Reading the embedded log: partitions in turn, woken by the write itself."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Callable, Generator

from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.errors import BrokerUnavailable
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.embedded.log import Log

__all__ = ["EmbeddedFetcher", "Readers"]


@types.coroutine
def _give_way() -> Generator[None, None, None]:
    """Let every other ready coroutine run once: data that is always there must not starve the loop."""
    yield


class Readers:
    """Who is to be woken when partitions change."""

    def __init__(self) -> None:
        self._callbacks: dict[Callable[[frozenset[TopicPartition]], None], None] = {}
        """In the order in which they came: a simulated run must not depend on addresses."""

    def add(self, callback: Callable[[frozenset[TopicPartition]], None]) -> None:
        self._callbacks[callback] = None

    def remove(self, callback: Callable[[frozenset[TopicPartition]], None]) -> None:
        self._callbacks.pop(callback, None)

    def changed(self, touched: frozenset[TopicPartition]) -> None:
        for callback in tuple(self._callbacks):
            callback(touched)


class EmbeddedFetcher:
    """`transport.contract.Fetcher`. Nothing is fetched ahead: the file is as near as a buffer would be."""

    def __init__(self, log: Log, readers: Readers) -> None:
        self._log, self._readers = log, readers
        self._positions: dict[TopicPartition, int] = {}
        """Resumed partitions; the first was not asked for longest."""
        self._reached: dict[TopicPartition, int] = {}
        """Position behind what was handed out, of all that were asked for since their last resume."""
        self._wake, self._closed = asyncio.Event(), False
        readers.add(self._changed)

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        self._positions[tp] = position
        self._reached.pop(tp, None)
        self._wake.set()

    def pause(self, tp: TopicPartition) -> None:
        self._positions.pop(tp, None)

    async def get(self) -> RawBatch:
        await _give_way()
        while not self._closed:
            self._wake.clear()
            batch = self._next()
            if batch is not None:
                return batch
            await self._wake.wait()
        raise BrokerUnavailable("The fetcher of the embedded log was closed while records were waited for.")

    def at_end(self, tp: TopicPartition) -> bool:
        return self.lag(tp) == 0

    def lag(self, tp: TopicPartition) -> int | None:
        reached = self._reached.get(tp)
        return None if reached is None else max(0, self._log.offsets(tp).end - reached)

    async def close(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        """`close` for a transport that stops: whoever waits in `get` is told."""
        self._closed = True
        self._positions.clear()
        self._readers.remove(self._changed)
        self._wake.set()

    def _changed(self, touched: frozenset[TopicPartition]) -> None:
        if not touched.isdisjoint(self._positions):
            self._wake.set()

    def _next(self) -> RawBatch | None:
        for tp, position in tuple(self._positions.items()):
            begin, stable, end = self._log.offsets(tp)
            if begin <= position <= end and position >= stable:
                self._reached[tp] = position
                continue
            batch = self._log.fetch(tp, position, limits.FETCH_PARTITION_BYTES_MAX)
            del self._positions[tp]  # to the back
            self._positions[tp] = self._reached[tp] = batch.next_position
            return batch
        return None


async def read_between(
    log: Log, readers: Readers, tp: TopicPartition, start: Offset, stop: Offset
) -> AsyncIterator[RawBatch]:
    """`transport.contract.Transport.read`: waits where an open transaction holds it back."""
    changed = asyncio.Event()

    def wake(touched: frozenset[TopicPartition]) -> None:
        if tp in touched:
            changed.set()

    readers.add(wake)
    try:
        position = Offset(max(start, log.offsets(tp).begin))
        while position < stop:
            changed.clear()
            batch = _before(log.fetch(tp, position, limits.FETCH_PARTITION_BYTES_MAX), stop)
            if batch.next_position == position:
                await changed.wait()
                continue
            position = batch.next_position
            if len(batch):
                yield batch
            await _give_way()
    finally:
        readers.remove(wake)


def _before(batch: RawBatch, stop: Offset) -> RawBatch:
    """Without the records at or behind ``stop``."""
    if batch.next_position <= stop:
        return batch
    kept = batch.rows(0, int(batch.offsets.searchsorted(stop)))
    kept.next_position = stop
    return kept
