"""The outside computation is outside, agrees with a third one, and its comparison fails for one altered cell."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demo.compare import Side, compare_dead, compare_late, compare_table, encode_flight, read_postgres, read_redis
from demo.data import Feed, flights, make_feed
from demo.oracle import COLUMNS, KEYS, WINDOWS, Expected, Flight, Row, expect, read_flights
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis

ROOT = Path(__file__).resolve().parent.parent
DAYS = 12
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@cache
def feed() -> Feed:
    return make_feed(DAYS)


@cache
def raw() -> list[Flight]:
    return read_flights()


@cache
def expected() -> Expected:
    return expect(json.loads(json.dumps(feed().injections)), raw())


def as_written(table: str) -> list[Row]:
    """The expected rows as a sink's client returns them: aware datetimes."""
    bounds = ("window_start", "window_end")
    return [
        {**row, **{name: EPOCH + timedelta(milliseconds=row[name]) for name in bounds}}
        for row in expected().tables[table]
    ]


def late_topic(table: str) -> list[Side]:
    """Late records as the job has to write them."""
    sides: list[Side] = []
    for record in expected().late[table]:
        headers: dict[str, bytes | None] = {
            "sp-reason": b"too old to dedupe" if record.window_start is None else b"late",
            "sp-partition": str(record.partition).encode(),
            "sp-offset": str(record.offset).encode(),
        }
        if record.window_start is not None:
            headers["sp-table"] = table.encode()
            headers["sp-window-start"] = str(record.window_start).encode()
            headers["sp-window-end"] = str(record.window_start + WINDOWS[table]).encode()
            headers["sp-late-by-ms"] = b"1"
        sides.append((0, headers, fed(record.partition, record.offset)))
    return sides


def dead_letters() -> list[Side]:
    reasons = {
        "corrupt: truncated": "truncated",
        "corrupt: wrong magic": "wrong magic byte 7",
        "corrupt: not avro": "wrong magic byte 123",
        "corrupt: unknown schema": "unknown schema id 9999",
        "corrupt: trailing bytes": "trailing bytes: 3",
        "corrupt: garbage": "union index 5 of 2, field dep_time",
        "corrupt: long varint": "varint longer than 64 bits, field year",
        "corrupt: wide int": "int 4294967296 beyond 32 bits, field year",
    }
    return [
        (
            0,
            {
                "sp-reason": reasons.get(letter.reason, letter.reason).encode(),
                "sp-partition": str(letter.partition).encode(),
                "sp-offset": str(letter.offset).encode(),
            },
            fed(letter.partition, letter.offset),
        )
        for letter in expected().dead
    ]


@cache
def _bytes() -> dict[tuple[int, int], bytes]:
    rows = feed().rows.select("partition", "offset", "value")
    return {(partition, offset): value for partition, offset, value in rows.iter_rows()}


def fed(partition: int, offset: int) -> bytes:
    return _bytes()[partition, offset]


@pytest.mark.parametrize("module", ["demo.oracle", "demo.compare"])
def test_imports_nothing_of_streamproc_and_nothing_that_made_the_feed(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in sys.modules if m.split('.')[0] == 'streamproc' or m == 'demo.data'])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_what_was_injected_is_what_comes_out() -> None:
    listed = Counter(entry["kind"] for entry in feed().injections["list"])
    assert expected().duplicates == listed["duplicate"]
    assert len(expected().dead) == listed["absurd"] + listed["corrupt"]
    assert {table: len(late) for table, late in expected().late.items()} == {"hourly": 100, "daily": 40}
    for late in expected().late.values():
        assert sum(record.window_start is None for record in late) == 10


def test_moved_flights_are_late_for_what_they_were_moved_beyond_and_nothing_else_is_late() -> None:
    moved = {entry["row"]: entry["late_for"] for entry in feed().injections["list"] if entry["kind"] == "late"}
    identity = {raw()[row].identity: kind for row, kind in moved.items()}
    kinds = {table: Counter(identity[late.flight.identity] for late in expected().late[table]) for table in WINDOWS}
    assert kinds == {"hourly": {"hourly": 60, "daily": 30, "dedupe": 10}, "daily": {"daily": 30, "dedupe": 10}}


def test_every_flight_is_counted_once_or_late_once() -> None:
    for table, rows in expected().tables.items():
        assert sum(row["flights"] for row in rows) + len(expected().late[table]) == len(flights(DAYS))


@pytest.mark.parametrize("table", list(WINDOWS))
def test_tables_equal_one_query_over_the_raw_file_without_the_late_flights(table: str, tmp_path: Path) -> None:
    late = {late.flight.identity for late in expected().late[table]}
    kept = [key not in late for key in flights(DAYS).select("time_hour", "carrier", "flight").iter_rows()]
    path = tmp_path / "flights.parquet"
    flights(DAYS).filter(kept).write_parquet(path)
    size = WINDOWS[table]
    got = duckdb.sql(
        f"""select carrier, origin, scheduled // {size} * {size} as window_start, window_start + {size} as window_end,
            count(*) as flights, sum(dep_delay)::double / count(dep_delay) as mean_delay, max(dep_delay) as max_delay,
            count(distinct tailnum) as tails, count(*) filter (dep_time is null) as cancelled,
            count(*) filter (dep_time is null)::double / count(*) as share_cancelled
            from read_parquet('{path}') group by all"""
    )
    assert got is not None
    rows = [dict(zip(got.columns, row, strict=True)) for row in got.fetchall()]
    assert compare_table(table, expected().tables[table], rows) == []


def test_an_absurd_record_that_moved_the_watermark_would_show() -> None:
    """The bait bites: a job that takes absurd records' event times in ends with other late records."""
    # Marked as an absurd record whose delay is sane, a record goes on into event time.
    baited = json.loads(json.dumps(feed().injections))
    for entry in baited["list"]:
        if entry["kind"] == "absurd":
            entry["delay"] = 0
    late = {(late.partition, late.offset) for late in expect(baited, raw()).late["hourly"]}
    assert late - {(late.partition, late.offset) for late in expected().late["hourly"]}


@pytest.mark.parametrize("table", list(WINDOWS))
def test_equal_tables_have_no_differences_in_any_order_and_either_spelling_of_times(table: str) -> None:
    assert compare_table(table, expected().tables[table], reversed(as_written(table))) == []
    assert compare_table(table, expected().tables[table], expected().tables[table]) == []


def altered(value: object) -> list[object]:
    """Values that are not ``value``, among them the nearest."""
    if value is None:
        return [0, ""]
    if isinstance(value, datetime):
        return [value + timedelta(milliseconds=1), value.replace(tzinfo=None), None]
    if isinstance(value, float):
        return [value + max(abs(value), 1e-300) * 2**-52, value + 1, None]
    return [value + 1, None] if isinstance(value, int) else [f"{value} ", None]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_altering_any_single_cell_is_a_difference(data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(list(WINDOWS)))
    # A slice, so that an example costs little: cells of other rows play no part.
    at = data.draw(st.integers(0, len(expected().tables[table]) - 1))
    want = expected().tables[table][max(0, at - 20) : at + 1]
    rows = as_written(table)[max(0, at - 20) : at + 1]
    column = data.draw(st.sampled_from([*KEYS, *COLUMNS]))
    rows[-1][column] = data.draw(st.sampled_from(altered(rows[-1][column])))
    assert compare_table(table, want, rows) != []


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda rows: rows[1:], "missing"),
        (lambda rows: [*rows, {**rows[0], "carrier": "ZZ"}], "not expected"),
        (lambda rows: [*rows, rows[5]], "there twice"),
        (lambda rows: [{k: v for k, v in rows[0].items() if k != "tails"}, *rows[1:]], "lacks tails"),
        (lambda rows: [{**rows[0], "surprise": 1}, *rows[1:]], "column surprise not expected"),
    ],
)
def test_rows_missing_extra_twice_or_of_another_shape_are_differences(
    spoil: Callable[[list[Row]], list[Row]], says: str
) -> None:
    found = compare_table("hourly", expected().tables["hourly"], spoil(as_written("hourly")))
    assert any(says in text for text in found)


def test_a_difference_names_table_row_column_and_both_values() -> None:
    rows = as_written("daily")
    rows[0]["flights"] += 1
    want = rows[0]["flights"] - 1
    (text,) = compare_table("daily", expected().tables["daily"], rows)
    assert text == f"daily 9E EWR 2013-01-02T00:00Z: flights is {want + 1}, expected {want}"


SPOILT_SIDES: list[tuple[str, Callable[[list[Side]], list[Side]]]] = [
    ("missing", lambda sides: sides[1:]),
    ("there twice", lambda sides: [*sides, sides[3]]),
    ("not expected", lambda sides: [*sides, (0, {**sides[0][1], "sp-offset": b"99999999"}, sides[0][2])]),
    ("own bytes", lambda sides: [(0, sides[0][1], sides[1][2]), *sides[1:]]),
    ("own bytes", lambda sides: [(0, sides[0][1], None), *sides[1:]]),
    ("reason is", lambda sides: [(p, {**h, "sp-reason": b""}, v) for p, h, v in sides]),
    ("not expected", lambda sides: [(0, {}, sides[0][2]), *sides[1:]]),
]


@pytest.mark.parametrize(("says", "spoil"), SPOILT_SIDES)
def test_late_and_dead_letter_topics_are_held_to_every_record(
    says: str, spoil: Callable[[list[Side]], list[Side]]
) -> None:
    for table in WINDOWS:
        late = expected().late[table]
        assert compare_late(table, late, late_topic(table)) == []
        assert any(says in text for text in compare_late(table, late, spoil(late_topic(table))))
    assert compare_dead(expected().dead, dead_letters()) == []
    assert any(says in text for text in compare_dead(expected().dead, spoil(dead_letters())))


@pytest.mark.parametrize("header", ["sp-table", "sp-window-start", "sp-window-end", "sp-late-by-ms"])
def test_a_late_record_with_another_window_is_a_difference(header: str) -> None:
    sides = late_topic("hourly")
    at = next(at for at, late in enumerate(expected().late["hourly"]) if late.window_start is not None)
    sides[at] = (0, {**sides[at][1], header: b"-5"}, sides[at][2])
    (text,) = compare_late("hourly", expected().late["hourly"], sides)
    assert header in text


def test_the_oracle_knows_a_flight_s_own_bytes() -> None:
    touched = {entry["index"] for entry in feed().injections["list"]}
    order = feed().injections["order"]
    for index in range(0, len(order), 200):
        if index not in touched:
            assert encode_flight(raw()[order[index]]) == feed().rows["value"][index]


@pytest.mark.server
def test_rows_read_from_postgres_are_compared_cell_by_cell(emptied: tuple[EmbeddedPostgres, EmbeddedRedis]) -> None:
    import asyncpg

    dsn = emptied[0].dsn

    async def go() -> tuple[list[str], list[str]]:
        connection = await asyncpg.connect(dsn)
        await connection.execute(
            "create table daily (carrier text, origin text, window_start timestamptz, window_end timestamptz,"
            " flights bigint, mean_delay double precision, max_delay bigint, tails bigint, cancelled bigint,"
            " share_cancelled double precision)"
        )
        rows = as_written("daily")
        columns = list(rows[0])
        await connection.copy_records_to_table("daily", records=[tuple(row.values()) for row in rows], columns=columns)
        equal = compare_table("daily", expected().tables["daily"], await read_postgres(dsn, "daily"))
        await connection.execute("update daily set tails = tails + 1 where ctid = (select min(ctid) from daily)")
        spoilt = compare_table("daily", expected().tables["daily"], await read_postgres(dsn, "daily"))
        await connection.close()
        return equal, spoilt

    equal, spoilt = asyncio.run(go())
    assert equal == []
    assert len(spoilt) == 1


@pytest.mark.server
def test_rows_read_from_redis_are_compared_cell_by_cell(emptied: tuple[EmbeddedPostgres, EmbeddedRedis]) -> None:
    from redis.asyncio import Redis

    url = emptied[1].url

    async def go() -> tuple[list[str], list[str]]:
        client = Redis.from_url(url)
        for row in expected().tables["daily"]:
            key = f"{{daily:{len(row['carrier']) % 4}}}:{row['carrier']}:{row['origin']}:{row['window_start']}"
            await client.hset(key, mapping={name: repr(row[name]) for name in COLUMNS if row[name] is not None})
        await client.hset("{daily:0}:ledger", mapping={"epoch": 7})
        equal = compare_table("daily", expected().tables["daily"], await read_redis(url, "daily"))
        await client.hset(key, "flights", "999999")
        spoilt = compare_table("daily", expected().tables["daily"], await read_redis(url, "daily"))
        await client.aclose()
        return equal, spoilt

    equal, spoilt = asyncio.run(go())
    assert equal == []
    assert len(spoilt) == 1
