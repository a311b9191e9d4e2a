"""What a run left, row by row: in the table's changelog, in Redis, in Postgres."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import unquote

from benchmarks import agent_job, pipeline_job
from benchmarks.marks import Settings
from benchmarks.orders import PARTITIONS
from streamproc.core.types import Offset, TopicPartition
from streamproc.operators.tablerows import TableRows
from streamproc.state import changelog
from streamproc.state.packing import unpack_key, unpack_value
from streamproc.transport.contract import Transport

__all__ = ["agent_rows", "pipeline_rows", "postgres_rows", "redis_rows"]

Rows = list[tuple[tuple[Any, ...], tuple[Any, ...]]]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_REDIS_ROWS: Final = 1_000


async def pipeline_rows(told: Settings, transport: Transport) -> Rows:
    """The table as its changelog has it, committed records only."""
    groups = pipeline_job.build(told).build_groups({told.topic: PARTITIONS})
    plan = next(group.table.plan for group in groups if group.table is not None)
    rows: Rows = []
    for live in await _changelog(told, transport, pipeline_job.TABLE):
        frame = TableRows(plan).results(live.items())
        names = ("country", "window_start", "window_end", "orders", "revenue")
        rows += [
            ((country, _ms(start)), (_ms(end), *values))
            for country, start, end, *values in frame.select(names).iter_rows()
        ]
    return rows


async def agent_rows(told: Settings, transport: Transport) -> Rows:
    """Likewise."""
    return [
        ((unpack_key(key),), (unpack_value(value),))
        for live in await _changelog(told, transport, agent_job.TABLE)
        for key, value in live.items()
    ]


async def _changelog(told: Settings, transport: Transport, table: str) -> list[dict[bytes, bytes]]:
    """Live rows by partition."""
    found = []
    tps = [TopicPartition(f"{told.app_id}-{table}-changelog", number) for number in range(PARTITIONS)]
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


async def postgres_rows(dsn: str) -> Rows:
    """Every row of the table, by a client of its own."""
    import asyncpg

    connection = await asyncpg.connect(dsn)
    try:
        query = f'SELECT country, window_start, window_end, orders, revenue FROM "{pipeline_job.TABLE}"'
        return [
            ((country, _ms(start)), (_ms(end), *values))
            for country, start, end, *values in await connection.fetch(query)
        ]
    finally:
        await connection.close()


async def redis_rows(url: str) -> Rows:
    """Likewise: hashes ``{table:partition}:country:window start``."""
    from redis.asyncio import Redis

    rows: Rows = []
    client = Redis.from_url(url)
    try:
        async for key in client.scan_iter(match=f"{{{pipeline_job.TABLE}:*}}:*:*", count=_REDIS_ROWS):
            _, country, start = key.decode().rsplit(":", 2)
            fields = await client.hgetall(key)
            values = (int(fields[b"window_end"]), int(fields[b"orders"]), float(fields[b"revenue"]))
            rows.append(((unquote(country), int(start)), values))
    finally:
        await client.aclose()
    return rows


def _ms(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(milliseconds=1)
