"""Hold what the job left behind against the oracle. What is there is read with clients of its own (aiokafka, asyncpg,
redis-py); only the layout of a changelog's rows is streamproc's to know.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, TypeAlias

import asyncpg
import msgspec
import polars as pl
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as Place
from redis.asyncio import Redis

from chaos.load import ORDERS, PARTITIONS, PAYMENTS, Order, encode_order, encode_payment
from chaos.oracle import TABLES, Expected, Key, Row, Side

__all__ = ["Servers", "Tally", "compare"]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
SCAN_COUNT: Final = 1_000
PIPELINE_MAX: Final = 500
POLL_MS: Final = 500
READ_S: Final = 30.0
"""One answer of the broker."""
DIFFERENCES_MAX: Final = 1_000
"""Differences kept in words; all are counted."""
FLOATS: Final = ("revenue", "most", "mean")


@dataclass(frozen=True)
class Servers:
    """Where things are."""

    broker: str
    redis: str
    postgres: str


@dataclass
class Tally:
    """What differs. A row that counts too few has lost the difference, one that counts too many has it twice."""

    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    differences: list[str] = field(default_factory=list)
    compared: Counter[str] = field(default_factory=Counter)
    """Rows and records found, by where."""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.wrong)

    def fewer(self, count: int, text: str) -> None:
        self.lost += count
        self._keep(f"lost: {text}")

    def more(self, count: int, text: str) -> None:
        self.duplicated += count
        self._keep(f"duplicated: {text}")

    def other(self, text: str) -> None:
        self.wrong += 1
        self._keep(f"wrong: {text}")

    def _keep(self, text: str) -> None:
        if len(self.differences) < DIFFERENCES_MAX:
            self.differences.append(text)


class Record(NamedTuple):
    """Of a topic."""

    key: bytes | None
    value: bytes | None
    headers: Mapping[str, bytes | None]


Rows: TypeAlias = Mapping[Key, Row]


async def compare(servers: Servers, expected: Expected) -> Tally:
    """Everything the job wrote, everywhere."""
    tally = Tally()
    for table in TABLES:
        rows = expected.tables[table]
        _rows(tally, f"{table}, changelog", rows, await _changelog(servers.broker, table), _leavers(expected, table))
        _rows(tally, f"{table}, Redis", rows, await _redis(servers.redis, table))
        told = expected.final(table) if table == "minutes" else rows
        _rows(tally, f"{table}, Postgres", told, await _postgres(servers.postgres, table))
        late = {place: [side] for place, side in expected.late[table].items()}
        _sides(tally, f"late-{table}", late, [r async for r in _records(servers.broker, f"late-{table}")])
    dead = {place: [side] for place, side in expected.dead_orders.items()}
    for topic, sides in ((ORDERS, dead), (PAYMENTS, expected.dead_payments)):
        name = f"chaos-{topic}-dead-letters"
        _sides(tally, name, sides, [r async for r in _records(servers.broker, name)])
    for name, numbers in (("counts", expected.counts), ("sums", expected.sums)):
        _numbers(tally, f"{name}, changelog", numbers, await _last_values(servers.broker, f"chaos-{name}-changelog"))
    await _numbered(tally, expected.counts, _records(servers.broker, "numbered"))
    return tally


# ---- holding one against the other


def _leavers(expected: Expected, table: str) -> set[Key]:
    rules = TABLES[table]
    return {key for key in expected.tables[table] if rules.may_have_left(key[1], expected.watermark)}


def _rows(tally: Tally, where: str, wanted: Rows, found: Sequence[Row], leavers: set[Key] | None = None) -> None:
    """Every cell of every row; floats to the last bit. ``leavers`` need not be there any more."""
    tally.compared[where] = len(found)
    seen: set[Key] = set()
    for got in found:
        key = (got["country"], got["window_start"])
        spelt = f"{where}: {key[0]} {EPOCH + timedelta(milliseconds=key[1]):%d %H:%M}"
        if key in seen:
            tally.more(got["orders"], f"{spelt} is there twice")
        elif (want := wanted.get(key)) is None:
            tally.other(f"{spelt} is not expected: {got}")
        else:
            _cells(tally, spelt, want, got)
        seen.add(key)
    for key in wanted.keys() - seen - (leavers or set()):
        tally.fewer(wanted[key]["orders"], f"{where}: {key} is missing")


def _cells(tally: Tally, spelt: str, want: Row, got: Row) -> None:
    differing = {name: (got.get(name), value) for name, value in want.items() if got.get(name) != value}
    if not differing:
        return
    text = f"{spelt}: " + ", ".join(f"{name} is {a!r}, expected {b!r}" for name, (a, b) in differing.items())
    missing = want["orders"] - got["orders"]
    if missing > 0:
        tally.fewer(missing, text)
    elif missing < 0:
        tally.more(-missing, text)
    else:
        tally.other(text)


def _sides(tally: Tally, where: str, wanted: Mapping[tuple[int, int], Sequence[Side]], found: Sequence[Record]) -> None:
    """Late records and dead letters: each once, with its own bytes, its reason and its origin."""
    tally.compared[where] = len(found)
    open_sides = {place: list(sides) for place, sides in wanted.items()}
    for record in found:
        place = (_number(record, "sp-partition"), _number(record, "sp-offset"))
        spelt = f"{where}: partition {place[0]}, offset {place[1]}"
        left = open_sides.get(place)
        if left is None:
            tally.other(f"{spelt} is not expected: {dict(record.headers)}")
        elif not left:
            tally.more(1, f"{spelt} is there twice")
        elif text := _unlike(left.pop(), record):
            tally.other(f"{spelt}: {text}")
    for place, left in open_sides.items():
        if left:
            tally.fewer(len(left), f"{where}: partition {place[0]}, offset {place[1]} is missing: {left[0]}")


def _unlike(side: Side, record: Record) -> str:
    origin = side.record
    value = encode_order(origin) if isinstance(origin, Order) else encode_payment(origin)
    reason = (record.headers.get("sp-reason") or b"").decode()
    if record.value != value:
        return "its value is not the record's own bytes"
    if side.reason not in reason:
        return f"its reason is {reason!r}, expected {side.reason!r}"
    if side.window_start is not None and _number(record, "sp-window-start") != side.window_start:
        return f"its window is {_number(record, 'sp-window-start')}, expected {side.window_start}"
    return ""


def _number(record: Record, header: str) -> int:
    text = record.headers.get(header) or b""
    return int(text) if text.isdigit() else -1


def _numbers(tally: Tally, where: str, wanted: Mapping[str, int], found: Mapping[bytes, bytes | None]) -> None:
    """A key that differs counts once: a sum does not say of how many records."""
    got = {str(msgspec.msgpack.decode(key)): msgspec.msgpack.decode(v) for key, v in found.items() if v is not None}
    tally.compared[where] = len(got)
    for key in got.keys() - wanted.keys():
        tally.other(f"{where}: {key} is not expected: {got[key]!r}")
    for key, value in wanted.items():
        text = f"{where}: {key} is {got.get(key)!r}, expected {value}"
        if got.get(key, 0) < value:
            tally.fewer(1, text)
        elif got[key] > value:
            tally.more(1, text)


async def _numbered(tally: Tally, counts: Mapping[str, int], found: AsyncIterator[Record]) -> None:
    """Each account's payments are numbered 1, 2, 3, … in this order."""
    last: dict[str, int] = {}
    async for record in found:
        tally.compared["numbered"] += 1
        account, number = (record.key or b"").decode(), int(record.value or b"0")
        before = last.get(account, 0)
        last[account] = max(before, number)
        if number <= before:
            tally.more(1, f"numbered: {account} has {number} behind {before}")
        elif number > before + 1:
            tally.fewer(number - before - 1, f"numbered: {account} has {number} behind {before}")
    for account, count in counts.items():
        if last.get(account, 0) < count:
            tally.fewer(
                count - last.get(account, 0), f"numbered: {account} ends at {last.get(account, 0)}, not {count}"
            )
    for account in last.keys() - counts.keys():
        tally.other(f"numbered: {account} is not expected")


# ---- reading what is there


async def _changelog(broker: str, table: str) -> list[Row]:
    from chaos.job import app, minutes, tens
    from streamproc.operators.tablerows import TableRows

    last = await _last_values(broker, f"chaos-{table}-changelog")
    app.build_groups({ORDERS: PARTITIONS, PAYMENTS: PARTITIONS})
    plan = {handle.name: handle.plan for handle in (minutes, tens)}[table]
    frame = TableRows(plan).results([(key, value) for key, value in last.items() if value is not None])
    return frame.with_columns(pl.col(pl.Datetime).dt.epoch("ms")).to_dicts()


async def _last_values(broker: str, topic: str) -> dict[bytes, bytes | None]:
    """The last committed value of each key."""
    return {record.key or b"": record.value async for record in _records(broker, topic)}


async def _records(broker: str, topic: str) -> AsyncIterator[Record]:
    """Every committed record, each partition's in offset order."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=broker, isolation_level="read_committed", enable_auto_commit=False, auto_offset_reset="none"
    )
    await consumer.start()
    try:
        places = [Place(topic, partition) for partition in range(PARTITIONS)]
        consumer.assign(places)
        begins = await consumer.beginning_offsets(places)
        ends = await consumer.end_offsets(places)
        for place in places:
            consumer.seek(place, begins[place])
        # Markers and aborted records move the position without a record: a topic is read when all positions are there.
        while [place for place, end in ends.items() if await consumer.position(place) < end]:
            async with asyncio.timeout(READ_S):
                found = await consumer.getmany(timeout_ms=POLL_MS)
            for r in (r for records in found.values() for r in records):
                yield Record(r.key, r.value, dict(r.headers))
    finally:
        await consumer.stop()


async def _postgres(dsn: str, table: str) -> list[Row]:
    connection = await asyncpg.connect(dsn)
    try:
        return [_plain(dict(row)) for row in await connection.fetch(f'SELECT * FROM "{table}"')]
    finally:
        await connection.close()


def _plain(row: Row) -> Row:
    """Times as milliseconds."""
    return {
        name: (value - EPOCH) // timedelta(milliseconds=1) if isinstance(value, datetime) else value
        for name, value in row.items()
    }


async def _redis(url: str, table: str) -> list[Row]:
    client = Redis.from_url(url)
    try:
        keys = sorted({key async for key in client.scan_iter(match=f"{{{table}:*}}:*:*", count=SCAN_COUNT)})
        rows: list[Row] = []
        for part in _parts(keys):
            pipeline = client.pipeline(transaction=False)
            for key in part:
                pipeline.hgetall(key)
            rows += [_redis_row(key, fields) for key, fields in zip(part, await pipeline.execute(), strict=True)]
        return rows
    finally:
        await client.aclose()


def _parts(keys: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for at in range(0, len(keys), PIPELINE_MAX):
        yield keys[at : at + PIPELINE_MAX]


def _redis_row(key: bytes, fields: Mapping[bytes, bytes]) -> Row:
    _, country, start = key.decode().rsplit(":", 2)
    row: Row = {"country": country, "window_start": int(start)}
    return row | {name.decode(): json.loads(text) for name, text in fields.items()}
