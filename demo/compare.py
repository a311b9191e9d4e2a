"""Hold what the job left behind against what the oracle expects; every function returns differences in words.

Nothing of streamproc is imported: Postgres and Redis are read with their own clients, Avro with fastavro.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

import fastavro

from demo.oracle import COLUMNS, KEYS, TOO_OLD, WINDOWS, DeadLetter, Flight, LateRecord, Row

__all__ = ["Side", "compare_dead", "compare_late", "compare_table", "encode_flight", "read_postgres", "read_redis"]

Side: TypeAlias = tuple[int, Mapping[str, bytes | None], bytes | None]
"""A record of a late or dead-letter topic: partition it lies in, headers, value."""

SCHEMAS: Final = Path(__file__).resolve().parent.parent / "schemas"
FLOATS: Final = ("mean_delay", "share_cancelled")
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
REDIS_SCAN_COUNT: Final = 1_000
REDIS_PIPELINE_MAX: Final = 500
CORRUPT_REASONS: Final = {
    "truncated": ("truncated", "short"),
    "wrong magic": ("magic",),
    "not avro": ("magic",),
    "unknown schema": ("schema",),
    "trailing bytes": ("trailing",),
    "garbage": ("union",),
    "long varint": ("varint",),
    "wide int": ("32 bits",),
}
"""What the reason of a corrupt record must speak of: one of these words."""


def compare_table(name: str, expected: Sequence[Row], got: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every cell of every row, and no row more, less or twice. Times may be aware datetimes or milliseconds; floats
    must be equal to the last bit, for exact sums leave no room."""
    wanted = {_identity(row): row for row in expected}
    found: dict[tuple[Any, ...], Row] = {}
    differences = []
    for raw in got:
        row = {column: _plain(value) for column, value in raw.items()}
        if absent := [column for column in (*KEYS, *COLUMNS) if column not in row]:
            differences.append(f"{name}: row {row} lacks {', '.join(absent)}")
            continue
        key = _identity(row)
        if key in found:
            differences.append(f"{name} {_spell(key)}: there twice")
        found[key] = row
    differences += [f"{name} {_spell(key)}: missing" for key in wanted if key not in found]
    differences += [f"{name} {_spell(key)}: not expected" for key in found if key not in wanted]
    for key, row in found.items():
        differences += [f"{name} {_spell(key)}: {text}" for text in _cells(wanted.get(key, row), row)]
    return differences


def _cells(want: Row, got: Row) -> list[str]:
    texts = [f"column {column} not expected" for column in got if column not in KEYS and column not in COLUMNS]
    for column in COLUMNS:
        a, b = want[column], got[column]
        if a != b or (a is None) != (b is None) or isinstance(b, bool):
            texts.append(f"{column} is {b!r}, expected {a!r}")
    return texts


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def _spell(key: tuple[Any, ...]) -> str:
    *names, start = key
    moment = f"{EPOCH + timedelta(milliseconds=start):%Y-%m-%dT%H:%MZ}" if isinstance(start, int) else repr(start)
    return " ".join([*map(str, names), moment])


def _plain(value: object) -> object:
    """Aware datetimes as milliseconds; a naive one is left, and so is a difference."""
    if isinstance(value, datetime) and value.tzinfo is not None:
        return (value - EPOCH) // timedelta(milliseconds=1)
    return value


def compare_late(table: str, expected: Sequence[LateRecord], got: Iterable[Side]) -> list[str]:
    """One table's late topic: each expected record once, with its own bytes, window and origin in the headers."""
    wanted = {(record.partition, record.offset): record for record in expected}
    return _compare_sides(f"late {table}", wanted, got, lambda record, side: _late(table, record, side))


def compare_dead(expected: Sequence[DeadLetter], got: Iterable[Side]) -> list[str]:
    """The dead-letter topic: each expected record once, with its own bytes, origin and a reason of the right kind."""
    wanted = {(record.partition, record.offset): record for record in expected}
    return _compare_sides("dead letter", wanted, got, _dead)


def _compare_sides(what: str, wanted: Mapping[tuple[int, int], Any], got: Iterable[Side], check: Any) -> list[str]:
    differences, seen = [], set()
    for side in got:
        # A record without an origin has a place that none was expected at.
        place = (_number(side, "sp-partition", -1), _number(side, "sp-offset", -1))
        spelt = f"{what} of partition {place[0]}, offset {place[1]}"
        if place in seen:
            differences.append(f"{spelt}: there twice")
        elif place not in wanted:
            differences.append(f"{spelt}: not expected, headers {dict(side[1])}")
        else:
            differences += [f"{spelt}: {text}" for text in check(wanted[place], side)]
        seen.add(place)
    missing = sorted(place for place in wanted if place not in seen)
    return differences + [f"{what} of partition {p}, offset {offset}: missing" for p, offset in missing]


def _late(table: str, record: LateRecord, side: Side) -> list[str]:
    texts = [] if side[2] == encode_flight(record.flight) else ["its value is not the flight's own bytes"]
    if record.window_start is None:
        reason = _text(side, "sp-reason")
        return texts + ([] if reason and TOO_OLD in reason else [f"reason is {reason!r}, expected {TOO_OLD!r}"])
    wanted = {
        "sp-table": table,
        "sp-window-start": str(record.window_start),
        "sp-window-end": str(record.window_start + WINDOWS[table]),
    }
    texts += [
        f"{header} is {_text(side, header)!r}, expected {want!r}"
        for header, want in wanted.items()
        if _text(side, header) != want
    ]
    by = _text(side, "sp-late-by-ms")
    return texts if by is not None and by.isdigit() else [*texts, f"sp-late-by-ms is {by!r}, expected a duration"]


def _dead(record: DeadLetter, side: Side) -> list[str]:
    reason = _text(side, "sp-reason") or ""
    kind, _, how = record.reason.partition(": ")
    if kind != "corrupt":
        fits = record.reason in reason
        value = encode_flight(record.flight) if record.flight else None
    else:
        fits = any(word in reason.lower() for word in CORRUPT_REASONS[how])
        value = record.value
    texts = [] if fits else [f"reason is {reason!r}, expected {record.reason!r}"]
    return texts + ([] if side[2] == value else ["its value is not the record's own bytes"])


def _text(side: Side, header: str) -> str | None:
    value = side[1].get(header)
    return None if value is None else value.decode("utf-8", "replace")


def _number(side: Side, header: str, otherwise: int) -> int:
    text = _text(side, header)
    return int(text) if text is not None and text.isdigit() else otherwise


def encode_flight(flight: Flight) -> bytes:
    """What a record of ``flight`` holds, to the byte."""
    schema, head = _schema()
    buffer = io.BytesIO(head)
    buffer.seek(len(head))
    fastavro.schemaless_writer(buffer, schema, flight.fields())
    return buffer.getvalue()


_SCHEMA: list[tuple[Any, bytes]] = []


def _schema() -> tuple[Any, bytes]:
    if not _SCHEMA:
        ids = json.loads((SCHEMAS / "ids.json").read_text())
        number = next(int(number) for number, name in ids.items() if name == "flight.avsc")
        parsed = fastavro.parse_schema(json.loads((SCHEMAS / "flight.avsc").read_text()))
        _SCHEMA.append((parsed, b"\0" + number.to_bytes(4, "big")))
    return _SCHEMA[0]


async def read_postgres(dsn: str, table: str, *, schema: str = "public") -> list[Row]:
    """Every row of the table, as it stands."""
    import asyncpg

    connection = await asyncpg.connect(dsn)
    try:
        return [dict(record) for record in await connection.fetch(f'SELECT * FROM "{schema}"."{table}"')]
    finally:
        await connection.close()


async def read_redis(url: str, table: str) -> list[Row]:
    """Every row of the table: hashes ``{table:partition}:carrier:origin:window_start``; an absent field is null."""
    from redis.asyncio import Redis

    rows: list[Row] = []
    client = Redis.from_url(url)
    try:
        keys = [key async for key in client.scan_iter(match=f"{{{table}:*}}:*:*:*", count=REDIS_SCAN_COUNT)]
        keys = sorted(set(keys))
        for at in range(0, len(keys), REDIS_PIPELINE_MAX):
            part = keys[at : at + REDIS_PIPELINE_MAX]
            pipeline = client.pipeline(transaction=False)
            for key in part:
                pipeline.hgetall(key)
            rows += [_redis_row(key, fields) for key, fields in zip(part, await pipeline.execute(), strict=True)]
    finally:
        await client.aclose()
    return rows


def _redis_row(key: bytes, fields: Mapping[bytes, bytes]) -> Row:
    _, carrier, origin, start = key.decode().rsplit(":", 3)
    row: Row = {"carrier": unquote(carrier), "origin": unquote(origin), "window_start": int(start)}
    row.update({column: None for column in COLUMNS})
    for name, text in fields.items():
        column = name.decode()
        row[column] = float(text) if column in FLOATS else int(text) if column in COLUMNS else text.decode()
    return row
