"""What the tests of a transport are written with: a log to open, topics, producers, and waiting for what must come.

A broker has no virtual clock: waiting here is waiting for an event, bounded by `WAIT_S`.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import pytest

from streamproc.core.batch import RawBatch
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import Fetcher, GroupListener, OutRecord, TaskProducer, TopicSpec, Transport

WAIT_S = 60.0
QUIET_S = 0.5
"""How long nothing must come for a test to believe that nothing comes."""


class OpenLog(Protocol):
    """A log and the started transport on it."""

    @property
    def transport(self) -> Transport: ...

    async def reopen(self) -> Transport:
        """Stop ``transport``, start a new one on the same log, and return it (it is ``transport`` from now on)."""


OpenTransport = Callable[[], AbstractAsyncContextManager[OpenLog]]
"""Entering it gives a started transport (on a log that may be shared); leaving it stops the transport."""
Scenario = Callable[[OpenLog], Awaitable[None]]
Row = tuple[int, bytes | None, bytes | None]


def play(open_transport: OpenTransport, scenario: Scenario) -> None:
    async def within() -> None:
        async with open_transport() as log:
            await asyncio.wait_for(scenario(log), 2 * WAIT_S)

    asyncio.run(within())


def unique(stem: str) -> str:
    return f"{stem}-{uuid.uuid4().hex[:12]}"


async def new_topic(transport: Transport, partitions: int = 1, **config: str) -> str:
    name = unique("contract")
    spec = TopicSpec(name, partitions, {key.replace("_", "."): value for key, value in config.items()})
    await transport.create_topics([spec])
    return name


async def new_producer(transport: Transport, transactional_id: str | None = None) -> TaskProducer:
    producer = transport.producer(transactional_id or unique("txn"))
    await producer.fence()
    return producer


def some(*values: str) -> list[OutRecord]:
    return [OutRecord(f"k{value}".encode(), value.encode()) for value in values]


def rows_of(batch: RawBatch) -> list[Row]:
    return [(int(batch.offsets[i]), batch.key(i), batch.value(i)) for i in range(len(batch))]


async def read_rows(transport: Transport, tp: TopicPartition, start: int = 0) -> list[Row]:
    """Every committed record up to the log's end; waits for open transactions, so there must be none that stays."""
    stop = (await transport.offsets([tp]))[tp].end
    batches = [batch async for batch in transport.read(tp, Offset(start), stop)]
    return list(itertools.chain.from_iterable(map(rows_of, batches)))


async def read_values(transport: Transport, tp: TopicPartition, start: int = 0) -> list[str]:
    return [(value or b"").decode() for _, _, value in await read_rows(transport, tp, start)]


async def commit(
    producer: TaskProducer, records: dict[TopicPartition, list[OutRecord]]
) -> dict[TopicPartition, Offset]:
    last = await producer.produce(records)
    await producer.end(commit=True)
    return last


async def take(fetcher: Fetcher, count: int) -> list[tuple[TopicPartition, Row]]:
    """The next ``count`` records, in the order handed out."""
    taken: list[tuple[TopicPartition, Row]] = []
    while len(taken) < count:
        batch = await asyncio.wait_for(fetcher.get(), WAIT_S)
        taken += [(batch.tp, row) for row in rows_of(batch)]
    return taken


async def nothing_comes(fetcher: Fetcher) -> None:
    """Only empty batches, if any: they may move the position past markers."""

    async def drain() -> None:
        while True:
            assert rows_of(await fetcher.get()) == []

    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(drain(), QUIET_S)


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until it holds: the contract has no event for it."""
    async with asyncio.timeout(WAIT_S):
        while not await check():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def eventually(condition: Callable[[], bool]) -> None:
    async def check() -> bool:
        return condition()

    await until(check)


async def offsets_reach(transport: Transport, tp: TopicPartition, begin: int, stable: int, end: int) -> None:
    """A broker writes the markers of a transaction a moment after it answered its end."""

    async def check() -> bool:
        return (await transport.offsets([tp]))[tp] == (begin, stable, end)

    await until(check)


async def group_reaches(transport: Transport, group: str, expected: dict[TopicPartition, int]) -> None:
    """A coordinator applies a commit's offsets a moment after it was answered."""
    asked = [TopicPartition(tp.topic, p) for tp in expected for p in (0, 1)]

    async def check() -> bool:
        return await transport.group_offsets(group, asked) == expected

    await until(check)


class Member:
    """A member's listener that keeps what it was told: ("assigned" or "revoked", partitions, generation or -1)."""

    def __init__(self, *, failing: str | None = None, error: Exception | None = None) -> None:
        self.told: list[tuple[str, frozenset[TopicPartition], int]] = []
        self._failing, self._error = failing, error
        self.listener = GroupListener(self._revoked, self._assigned)

    def holds(self) -> frozenset[TopicPartition]:
        return self.told[-1][1] if self.told and self.told[-1][0] == "assigned" else frozenset()

    def heard(self, kind: str) -> bool:
        return any(told[0] == kind and told[1] for told in self.told)

    async def _revoked(self, tps: Collection[TopicPartition]) -> None:
        self._hear("revoked", tps, -1)

    async def _assigned(self, tps: Collection[TopicPartition], generation: int) -> None:
        self._hear("assigned", tps, generation)

    def _hear(self, kind: str, tps: Collection[TopicPartition], generation: int) -> None:
        self.told.append((kind, frozenset(tps), generation))
        if self._failing == kind and tps and self._error:
            raise self._error
