"""The broker as the harness uses it: orders in, results out, and everything that a run made gone after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from aiokafka.admin import AIOKafkaAdminClient
from numpy.typing import NDArray

from benchmarks.oracle import WINDOW_MS
from benchmarks.orders import COUNTRIES, PARTITIONS, SPAN_MS, START_MS, STATUSES, Orders, encode
from benchmarks.peers.jobs.told import Told
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord, TopicSpec, Transport

__all__ = ["END_MS", "Output", "close_windows", "committed", "fill", "remove_topics", "topic_that_begins"]

SEND_RECORDS: Final = 20_000
END_MS: Final = START_MS + SPAN_MS
"""No order is later."""
CLOSER_EVERY_MS: Final = 60_000
"""From one closing record of a partition to the next time that some are sent."""

Records = list[tuple[bytes | None, bytes | None]]


async def fill(
    transport: Transport, told: Told, input_: Orders, *, plain: bool, more: Sequence[TopicSpec] = ()
) -> None:
    """Make the run's two topics and some ``more``, and put every order into the first; ``plain``: without its head."""
    own = [TopicSpec(name, told.partitions, {"retention.ms": "-1"}) for name in (told.source, told.output)]
    await transport.create_topics([*own, *more])
    head = len(told.head) if plain else 0
    for part in input_.slices(SEND_RECORDS):
        await transport.send(
            {
                TopicPartition(told.source, partition): [OutRecord(key, value[head:]) for key, value in records]
                for partition, records in part.items()
            }
        )


async def close_windows(transport: Transport, told: Told, *, plain: bool, nth: int) -> None:
    """An order of each country in every partition, later than any window that is still open.

    They are sent when the worker has nothing left to do: sent with the orders they would close windows early in each
    engine whose clock is the greatest time seen. The ``nth`` time they are later still.
    """
    many = len(COUNTRIES)
    at_ms = END_MS + WINDOW_MS + told.grace_ms + (nth + 1) * CLOSER_EVERY_MS
    for partition in range(told.partitions):
        block, sizes = encode(
            {
                "id": _ids(many, nth * PARTITIONS + partition),
                "user_id": np.zeros(many, np.int64),
                "country": np.arange(many),
                "status": np.full(many, STATUSES.index("completed")),
                "amount": np.zeros(many),
                "event_time": np.full(many, at_ms),
                "sku": np.zeros(many, np.int64),
            }
        )
        ends = np.cumsum(sizes).tolist()
        head = len(told.head) if plain else 0
        values = [block[begin + head : end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        await transport.send({TopicPartition(told.source, partition): [OutRecord(b"0", value) for value in values]})


def _ids(many: int, group: int) -> NDArray[np.generic]:
    """Order ids that differ within a group and between groups, and that no random order has."""
    ids = np.zeros((many, 16), np.uint8)
    ids[:, 0], ids[:, 1] = group, np.arange(many)
    return ids


async def committed(transport: Transport, told: Told) -> Mapping[TopicPartition, Offset]:
    """The group's positions in the source: as many records are behind each."""
    tps = [TopicPartition(told.source, number) for number in range(told.partitions)]
    return await transport.group_offsets(told.app_id, tps)


class Output:
    """Committed records of one topic, read on from where the last call ended."""

    def __init__(self, transport: Transport, topic: str, partitions: int) -> None:
        self._transport = transport
        self._at = {TopicPartition(topic, number): Offset(0) for number in range(partitions)}

    async def more(self) -> Records:
        """What has been committed since; by partition in order of offsets."""
        found: Records = []
        for tp, ends in (await self._transport.offsets(list(self._at))).items():
            if ends.stable <= self._at[tp]:
                continue
            async for batch in self._transport.read(tp, self._at[tp], ends.stable):
                found += [(batch.key(row), batch.value(row)) for row in range(len(batch))]
            self._at[tp] = ends.stable
        return found


async def topic_that_begins(bootstrap: str, name: str) -> str:
    """The one topic with a name that begins so."""
    return next(topic for topic in await _topics(bootstrap) if topic.startswith(name))


async def remove_topics(bootstrap: str, app_id: str) -> None:
    """All that have ``app_id`` in their name: those of the run, and those that its worker made."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.delete_topics([topic for topic in await admin.list_topics() if app_id in topic])
    finally:
        await admin.close()


async def _topics(bootstrap: str) -> list[str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        return sorted(await admin.list_topics())
    finally:
        await admin.close()
