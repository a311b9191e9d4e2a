"""Records that a pipeline sends on to a topic: as they came, in order, once; and tables without windows beside them."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from streamproc.app import App
from streamproc.avro import recordbatch
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core.batch import RawBatch
from streamproc.core.errors import UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.operators import aggregates as agg
from streamproc.operators.forward import Forward
from streamproc.operators.pipeline import event_time
from streamproc.testing.fake_sink import FakeSink
from streamproc.transport.contract import OutColumns, OutRecord
from tests.apps import events_avsc, new_app, read_batches, rows_of, running, until, write

NOON_MS = 1_767_268_800_000
TP = TopicPartition("in", 0)


def some_records(count: int) -> list[OutRecord]:
    dice = random.Random(count)
    return [
        OutRecord(
            None if dice.random() < 0.2 else dice.randbytes(dice.randrange(9)),
            None if dice.random() < 0.2 else dice.randbytes(dice.randrange(40)),
            () if dice.random() < 0.5 else (("n", dice.randbytes(3)), ("nothing", None)),
            NOON_MS + dice.randrange(-1_000, 1_000),
        )
        for _ in range(count)
    ]


def split_build(records: OutColumns, bytes_max: int) -> list[bytes]:
    return recordbatch.split_build(records, now_ms=0, bytes_max=bytes_max)


def records_of(batch: RawBatch) -> list[OutRecord]:
    rows = range(len(batch))
    return [OutRecord(batch.key(at), batch.value(at), batch.headers(at), int(batch.timestamps[at])) for at in rows]


def batch_of(records: list[OutRecord], first: int = 0) -> RawBatch:
    data = recordbatch.build(records, base_offset=first, now_ms=0)
    return recordbatch.parse(TP, data, position=Offset(first))


def taken(forward: Forward) -> list[OutRecord]:
    return list(OutColumns(*forward.take()))


def test_columns_of_records_are_built_into_the_batch_that_the_records_make() -> None:
    records = some_records(300)
    batch = batch_of(records)
    rows = [row for row in range(300) if row % 3]
    wanted = [records[row] for row in rows]
    forward = Forward()
    forward.add(batch, pl.Series(rows, dtype=pl.UInt32).to_numpy())
    made = OutColumns(*forward.take())
    assert list(made) == wanted
    assert (len(made), made[-1], list(made[5:9])) == (len(wanted), wanted[-1], wanted[5:9])
    for bytes_max in (100, 5_000, 1 << 20):
        read = [recordbatch.parse(TP, data, position=Offset(0)) for data in split_build(made, bytes_max)]
        assert [record for batch in read for record in records_of(batch)] == wanted
        assert len(read) > 1 or bytes_max > 5_000


def test_what_goes_on_is_in_offset_order_however_batches_were_cut() -> None:
    records = some_records(60)
    dice = random.Random(1)
    evens, thirds = range(0, 60, 2), range(0, 60, 3)
    whole = Forward()
    whole.add(batch_of(records), pl.Series(evens).to_numpy())
    whole.add(batch_of(records), pl.Series(thirds).to_numpy())
    expected = [records[row] for row in sorted([*evens, *thirds])]
    assert taken(whole) == expected
    for _ in range(20):
        cuts = [0, *sorted(dice.sample(range(1, 60), 5)), 60]
        forward = Forward()
        for lo, hi in pairwise(cuts):
            batch = batch_of(records[lo:hi], lo)
            for rows in (evens, thirds):
                forward.add(batch, pl.Series([row - lo for row in rows if lo <= row < hi], dtype=pl.Int64).to_numpy())
        assert taken(forward) == expected


def test_the_epoch_is_counted_in_bytes_handed_out_once_and_forgotten_when_dropped() -> None:
    forward, batch = Forward(), batch_of(some_records(10))
    forward.add(batch.rows(0, 4), pl.Series([1, 2]).to_numpy())
    forward.add(batch.rows(4, 10), pl.Series([0]).to_numpy())
    assert forward.size_bytes == batch.buffer.nbytes, "the batch was cut, its buffer is one"
    assert len(taken(forward)) == 3
    assert (forward.size_bytes, forward.take()) == (0, [])
    forward.add(batch, pl.Series([1]).to_numpy())
    forward.drop()
    assert (forward.size_bytes, forward.take()) == (0, [])


# --- a whole app ------------------------------------------------------------------------------------------------------


class Events:
    """Events as Avro, one a minute, three of four in DE; every eighth comes twice."""

    def __init__(self, folder: Path, count: int) -> None:
        encode = Encoder(load_schema(events_avsc(folder) / "event.avsc"), 1).encode
        self.records: list[tuple[int, OutRecord]] = []
        for number in range(count):
            at = NOON_MS + number * 60_000
            country = "IT" if number % 4 == 3 else "DE"
            value = encode({"id": f"e{number}", "country": country, "amount": float(number), "at": at})
            record = OutRecord(b"k%d" % number, value, (("trace", b"%d" % number),), at + 5)
            self.records += [(number % 2, record)] * (2 if number % 8 == 0 else 1)

    def of(self, partition: int) -> list[OutRecord]:
        return [record for number, record in self.records if number == partition]


async def until_all_is_committed(app: App) -> None:
    await until(lambda: len(app.runtime.tasks) == 2, "tasks")
    ends = await app.runtime.transport.offsets([TopicPartition("in", 0), TopicPartition("in", 1)])

    def committed() -> bool:
        tasks = {TopicPartition("in", task.id.partition): task for task in app.runtime.tasks.values()}
        return all(task.committed_position(tp) == ends[tp].end for tp, task in tasks.items())

    await until(committed, "all committed")


async def found_in(app: App, topic: str) -> dict[int, list[OutRecord]]:
    found: dict[int, list[OutRecord]] = {}
    async for partition, batch in read_batches(app.runtime.transport, topic):
        found.setdefault(partition, []).extend(records_of(batch))
    return found


def test_filtered_records_arrive_in_their_partition_as_they_came_and_once_after_a_restart(tmp_path: Path) -> None:
    events = Events(tmp_path, 200)
    half = len(events.records) // 2

    def app() -> App:
        app = new_app(tmp_path)
        source = app.topic("in", value_schema="event.avsc", partitions=2, event_time=event_time("at"))
        unique = app.pipeline(source).dedupe("id", within="1d")
        unique.filter(pl.col("country") == "DE").to(app.topic("german", value_schema="event.avsc", partitions=2))
        unique.with_columns(large=pl.col("amount") > 150).filter(pl.col("large")).to("large")
        return app

    def wanted(country: bytes) -> dict[int, list[OutRecord]]:
        return {
            partition: [r for r in dict.fromkeys(events.of(partition)) if r.value is not None and country in r.value]
            for partition in (0, 1)
        }

    async def scenario() -> None:
        await write(tmp_path, "in", 2, events.records[:half])
        for rest in (events.records[half:], []):
            async with running(app()) as one:
                for partition, record in rest:
                    await one.runtime.transport.send({TopicPartition("in", partition): [record]})
                await until_all_is_committed(one)
                if not rest:
                    assert await found_in(one, "german") == wanted(b"DE")
                    large = await found_in(one, "large")
                    assert sum(map(len, large.values())) == 49
                assert not one.crashed

    asyncio.run(scenario())


def test_a_table_without_windows_has_one_row_a_key_that_never_closes(tmp_path: Path) -> None:
    app, target = new_app(tmp_path), FakeSink()
    events = Events(tmp_path, 100)
    source = app.topic("in", value_schema="event.avsc", partitions=2, event_time=event_time("at"))
    table = app.pipeline(source).group_by("country").agg(events=agg.count(), total=agg.sum("amount")).table("totals")
    table.sink(target)

    async def scenario() -> None:
        await write(tmp_path, "in", 2, events.records)
        async with running(app):
            await until(
                lambda: sum(row["events"] for row in target.rows["totals"].values()) == len(events.records), "the sink"
            )
            rows = {row["country"]: row for row in rows_of(app, "totals")}
            assert {country: row["events"] for country, row in rows.items()} == {"DE": 88, "IT": 25}
            assert rows["IT"]["window_start"] == datetime(1, 1, 1, tzinfo=UTC)
            assert rows["IT"]["window_end"] == datetime(9999, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)
            # Three thousand years later and one year before: neither is late.
            encode = Encoder(load_schema(events_avsc(tmp_path) / "event.avsc"), 1).encode
            for year in (5000, 2025):
                at = round(datetime(year, 1, 1, tzinfo=UTC).timestamp() * 1000)
                value = encode({"id": "x", "country": "IT", "amount": 1.0, "at": at})
                await app.runtime.transport.send({TopicPartition("in", 1): [OutRecord(b"k", value, (), at)]})
            await until(lambda: {row["events"] for row in rows_of(app, "totals")} == {88, 27}, "both")
            assert not app.crashed

    asyncio.run(scenario())


def test_a_topic_declared_with_another_schema_cannot_be_an_output(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    (tmp_path / "schemas" / "other.avsc").write_text('{"type": "record", "name": "Other", "fields": []}')
    source = app.topic("in", value_schema="event.avsc", event_time=event_time("at"))
    with pytest.raises(UserError, match=r"'out' is declared with .*other\.avsc.*with .*event\.avsc"):
        app.pipeline(source).to(app.topic("out", value_schema="other.avsc"))
