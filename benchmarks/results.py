"""What a run left, row by row: in the table's changelog, in Redis, in Postgres."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any, Final
from urllib.parse import unquote

import polars as pl

from benchmarks import agent_job, count_job, forward_job
from benchmarks.marks import Settings
from streamproc.core.types import Offset, TopicPartition
from streamproc.operators.tablerows import TableRows
from streamproc.state import changelog
from streamproc.state.packing import unpack_key, unpack_value
from streamproc.transport.contract import Transport

__all__ = [
    "agent_rows", "count_rows", "forwarded", "frames", "live_rows", "postgres_rows", "redis_rows", "window_rows",
]  # fmt: skip

Rows = list[tuple[tuple[Any, ...], tuple[Any, ...]]]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_REDIS_ROWS: Final = 1_000


async def window_rows(job: ModuleType, columns: Iterable[str], told: Settings, transport: Transport) -> Rows:
    """The job's table by country and window as its changelog has it, committed records only."""
    names = ("country", "window_start", "window_end", *columns)
    return [
        ((country, _ms(start)), (_ms(end), *values))
        for frame in await frames(job, told, transport)
        for country, start, end, *values in frame.select(names).iter_rows()
    ]


async def count_rows(told: Settings, transport: Transport) -> Rows:
    """Likewise of the table without windows."""
    found = await frames(count_job, told, transport)
    return [((user,), (orders,)) for frame in found for user, orders in frame.select("user_id", "orders").iter_rows()]


async def forwarded(told: Settings, transport: Transport, partition: int) -> list[tuple[bytes | None, bytes | None]]:
    """Keys and values of the output topic in their order, committed records only."""
    tp = TopicPartition(forward_job.output_topic(told), partition)
    ends = (await transport.offsets([tp]))[tp]
    return [
        (batch.key(row), batch.value(row))
        async for batch in transport.read(tp, Offset(ends.begin), ends.stable)
        for row in range(len(batch))
    ]


async def frames(job: ModuleType, told: Settings, transport: Transport) -> list[pl.DataFrame]:
    """Rows of the job's table by partition, as people see them."""
    groups = job.build(told).build_groups({told.topic: told.partitions})
    plan = next(group.table.plan for group in groups if group.table is not None)
    return [TableRows(plan).results(live.items()) for live in await live_rows(told, transport, job.TABLE)]


async def agent_rows(told: Settings, transport: Transport, table: str = agent_job.TABLE) -> Rows:
    """Likewise of an agent's table."""
    return [
        ((unpack_key(key),), (unpack_value(value),))
        for live in await live_rows(told, transport, table)
        for key, value in live.items()
    ]


async def live_rows(told: Settings, transport: Transport, table: str) -> list[dict[bytes, bytes]]:
    """A table as its changelog has it, by partition, committed records only."""
    found = []
    tps = [TopicPartition(f"{told.app_id}-{table}-changelog", number) for number in range(told.partitions)]
    for tp, ends in (await transport.offsets(tps)).items():
        live: dict[bytes, bytes] = {}
        async for batch in transport.read(tp, Offset(ends.begin), ends.stable):
            for row in changelog.read(batch):
                if row.value is None:
                    live.pop(row.key, None)
                else:
                    live[row.key] = row.value
        found.append(live)
    return found


async def postgres_rows(dsn: str, table: str, columns: Iterable[str]) -> Rows:
    """Every row of ``table``, by country and window, by a client of its own."""
    import asyncpg

    connection = await asyncpg.connect(dsn)
    try:
        query = f'SELECT country, window_start, window_end, {", ".join(columns)} FROM "{table}"'
        return [
            ((country, _ms(start)), (_ms(end), *values))
            for country, start, end, *values in await connection.fetch(query)
        ]
    finally:
        await connection.close()


async def redis_rows(url: str, table: str, columns: Mapping[str, type]) -> Rows:
    """Likewise, ``columns`` with what their text is read as: hashes ``{table:partition}:country:window start``."""
    from redis.asyncio import Redis

    rows: Rows = []
    client = Redis.from_url(url)
    try:
        async for key in client.scan_iter(match=f"{{{table}:*}}:*:*", count=_REDIS_ROWS):
            _, country, start = key.decode().rsplit(":", 2)
            fields = await client.hgetall(key)
            values = [kind(fields[name.encode()]) for name, kind in columns.items()]
            rows.append(((unquote(country), int(start)), (int(fields[b"window_end"]), *values)))
    finally:
        await client.aclose()
    return rows


def _ms(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(milliseconds=1)
