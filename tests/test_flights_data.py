"""The input of the jobs is what its description says: the flights with their faults, and the generated clicks."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, cast

import fastavro
import polars as pl
import pytest

from demo.data import CORRUPTIONS, SCHEMAS, Feed, flights, make_feed
from demo.feed import holds_feed, main, open_transport, write_feed
from streamproc.core.errors import UserError
from streamproc.core.partitioner import partition_of
from streamproc.core.types import Offset, TopicPartition
from streamproc.operators.plan import Dedupe, Expect
from streamproc.transport.contract import OutRecord, PartitionOffsets, TopicSpec, Transport

DAYS = 12
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


@cache
def feed() -> Feed:
    return make_feed(DAYS)


def schema() -> Any:
    return fastavro.parse_schema(json.loads((SCHEMAS / "flight.avsc").read_text()))


def decode(value: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", fastavro.schemaless_reader(io.BytesIO(value[5:]), schema(), None))


def entries(kind: str) -> list[dict[str, Any]]:
    return [entry for entry in feed().injections["list"] if entry["kind"] == kind]


def record(index: int) -> dict[str, Any]:
    return feed().rows.row(index, named=True)


def test_raw_file_has_every_flight_once_and_its_nulls_are_data() -> None:
    assert len(flights()) == 336_776
    assert flights().select("time_hour", "carrier", "flight").is_unique().all()
    assert flights()["dep_time"].null_count() == 8_255
    assert flights()["scheduled"].null_count() == 0


def test_event_time_is_the_scheduled_departure_in_utc() -> None:
    first = flights().row(0, named=True)
    # 05:15 in New York, in winter.
    assert first["sched_dep_time"] == 515
    assert datetime.fromtimestamp(first["scheduled"] / 1000, UTC) == datetime(2013, 1, 1, 10, 15, tzinfo=UTC)


def test_same_arguments_give_the_same_bytes() -> None:
    again = make_feed(DAYS)
    assert again.rows.equals(feed().rows)
    assert again.injections == feed().injections


def test_every_schema_has_an_id_and_every_id_a_schema() -> None:
    ids = json.loads((SCHEMAS / "ids.json").read_text())
    assert sorted(ids.values()) == sorted(path.name for path in SCHEMAS.glob("*.avsc"))
    for name in ids.values():
        fastavro.parse_schema(json.loads((SCHEMAS / name).read_text()))


def test_untouched_records_decode_to_the_raw_file() -> None:
    raw = flights(DAYS)
    touched = {entry["index"] for entry in feed().injections["list"]}
    order = feed().injections["order"]
    for index in range(0, len(order), 50):
        if index in touched:
            continue
        want = raw.row(by_predicate=pl.col("row") == order[index], named=True)
        got = decode(record(index)["value"])
        times = {name: round(got[name].timestamp() * 1000) for name in ("time_hour", "scheduled")}
        assert {**got, **times, "row": order[index]} == want


def test_records_lie_where_kafka_puts_their_origin_and_in_order_of_arrival() -> None:
    rows = feed().rows
    for key, partition in rows.select("key", "partition").unique().iter_rows():
        assert partition == partition_of(key, 4)
    assert rows["partition"].n_unique() == 3, "one partition stays empty: idleness is on the main path"
    assert rows["timestamp_ms"].is_sorted()
    for part in rows.partition_by("partition"):
        assert part["offset"].to_list() == list(range(len(part)))


def test_counts_of_injections_are_exact() -> None:
    raw = len(flights(DAYS))
    kinds = Counter(entry["kind"] for entry in feed().injections["list"])
    assert kinds == {"duplicate": round(raw * 0.02), "late": 100, "absurd": 50, "corrupt": 50}
    assert len(feed().rows) == raw + kinds["duplicate"] + kinds["absurd"] + kinds["corrupt"]


def test_duplicates_are_later_copies_some_thousands_of_records_behind() -> None:
    first: dict[int, int] = {}
    ignored = {entry["index"] for kind in ("absurd", "corrupt") for entry in entries(kind)}
    for index, row in enumerate(feed().injections["order"]):
        if index not in ignored:
            first.setdefault(row, index)
    behind = [entry["index"] - first[entry["row"]] for entry in entries("duplicate")]
    assert min(behind) > 0
    assert min(behind) < 50
    assert max(behind) > 2_000
    for entry in entries("duplicate"):
        assert record(entry["index"])["value"] == record(first[entry["row"]])["value"]


def test_disorder_alone_stays_within_out_of_orderness_and_reaches_its_edge() -> None:
    scheduled = dict(flights().select("row", "scheduled").iter_rows())
    added = {entry["index"] for entry in feed().injections["list"]}
    delays = [
        at - scheduled[row]
        for index, (row, at) in enumerate(
            zip(feed().injections["order"], feed().rows["timestamp_ms"].to_list(), strict=True)
        )
        if index not in added
    ]
    assert min(delays) == 0
    assert max(delays) == 30 * MINUTE
    assert 0.05 < sum(delay > 0 for delay in delays) / len(delays) < 0.15


def test_absurd_records_have_one_delay_out_of_range_and_are_not_refused_for_their_time() -> None:
    for entry in entries("absurd"):
        found = record(entry["index"])
        value = decode(found["value"])
        assert not -120 <= value[entry["column"]] <= 2_880
        assert value["scheduled"].timestamp() * 1000 < found["timestamp_ms"] + HOUR
    assert {entry["column"] for entry in entries("absurd")} == {"dep_delay", "arr_delay"}


def test_corrupt_records_come_in_every_kind_and_no_strict_reader_takes_one() -> None:
    assert {entry["how"] for entry in entries("corrupt")} == set(CORRUPTIONS)
    for entry in entries("corrupt"):
        value = record(entry["index"])["value"]
        assert value.hex() == entry["hex"]
        assert not _strictly_valid(value), entry


def _strictly_valid(value: bytes) -> bool:
    """Judged by round trip, for a writer does not write what only a lenient reader takes; and by the range of an
    int."""
    if value[:5] != b"\0\0\0\0\1":
        return False
    try:
        decoded = decode(value)
        out = io.BytesIO()
        fastavro.schemaless_writer(out, schema(), decoded)
    except (EOFError, ValueError, IndexError, KeyError, OverflowError):
        return False
    return out.getvalue() == value[5:] and abs(decoded["year"]) < 2**31


def test_a_feed_too_short_for_its_faults_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 10"):
        make_feed(3)


class MemoryLog:
    """As much of a transport as a feed needs."""

    def __init__(self) -> None:
        self.topics: dict[str, TopicSpec] = {}
        self.logs: dict[TopicPartition, list[OutRecord]] = {}
        self.calls: list[int] = []

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        self.topics.update({spec.name: spec for spec in specs})

    async def partitions(self, topic: str) -> int | None:
        return self.topics[topic].partitions if topic in self.topics else None

    async def offsets(self, tps: Sequence[TopicPartition]) -> dict[TopicPartition, PartitionOffsets]:
        ends = {tp: Offset(len(self.logs.get(tp, ()))) for tp in tps}
        return {tp: PartitionOffsets(Offset(0), end, end) for tp, end in ends.items()}

    async def send(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        self.calls.append(sum(map(len, records.values())))
        for tp, part in records.items():
            self.logs.setdefault(tp, []).extend(part)
        return {tp: Offset(len(self.logs[tp]) - 1) for tp in records}


def test_feed_is_written_in_order_to_its_own_offsets_and_kept_for_ever() -> None:
    log = MemoryLog()
    asyncio.run(write_feed(feed(), cast(Transport, log), quiet=True))
    assert log.topics["flights"].config == {"retention.ms": "-1"}
    assert max(log.calls) == 500
    for row in feed().rows.iter_rows(named=True):
        written = log.logs[TopicPartition("flights", row["partition"])][row["offset"]]
        assert written == OutRecord(row["key"], row["value"], (), row["timestamp_ms"])


def test_feeding_a_topic_that_is_not_empty_is_refused() -> None:
    log = MemoryLog()
    log.logs[TopicPartition("flights", 2)] = [OutRecord(None, b"x")]
    with pytest.raises(UserError, match="Partition 2 of topic flights ends at offset 1 where the feed expects 0"):
        asyncio.run(write_feed(feed(), cast(Transport, log), quiet=True))


def test_a_topic_that_holds_the_feed_is_told_from_one_that_does_not() -> None:
    log = MemoryLog()
    assert not asyncio.run(holds_feed(feed(), cast(Transport, log)))
    asyncio.run(write_feed(feed(), cast(Transport, log), quiet=True))
    assert asyncio.run(holds_feed(feed(), cast(Transport, log)))
    log.logs[TopicPartition("flights", 0)].pop()
    assert not asyncio.run(holds_feed(feed(), cast(Transport, log)))


def test_command_writes_an_embedded_log_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broker = f"embedded://{tmp_path / 'log'}"
    arguments = ["--broker", broker, "--days", str(DAYS), "--injections", str(tmp_path / "list.json")]
    main(arguments)
    assert f"{len(feed().rows):,} records are in flights." in capsys.readouterr().out
    assert json.loads((tmp_path / "list.json").read_text()) == feed().injections
    main([*arguments, "--once"])
    assert "holds the feed already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="where the feed expects 0"):
        main(arguments)


async def _read_back(broker: str) -> dict[TopicPartition, list[tuple[bytes | None, int]]]:
    transport = open_transport(broker)
    await transport.start()
    found: dict[TopicPartition, list[tuple[bytes | None, int]]] = {}
    try:
        tps = [TopicPartition("flights", number) for number in range(4)]
        for tp, offsets in (await transport.offsets(tps)).items():
            found[tp] = []
            async for batch in transport.read(tp, offsets.begin, offsets.end):
                found[tp] += [(batch.value(row), int(batch.timestamps[row])) for row in range(len(batch))]
    finally:
        await transport.stop()
    return found


def test_an_embedded_log_gives_the_feed_back(tmp_path: Path) -> None:
    broker = f"embedded://{tmp_path / 'log'}"
    main(["--broker", broker, "--days", str(DAYS)])
    found = asyncio.run(_read_back(broker))
    for tp, records in found.items():
        part = feed().rows.filter(pl.col("partition") == tp.partition)
        assert records == list(part.select("value", "timestamp_ms").iter_rows())


def test_a_broker_that_is_no_log_is_refused_with_the_remedy() -> None:
    with pytest.raises(SystemExit, match="kafka://HOST:PORT or embedded://PATH"):
        main(["--broker", "localhost:9092", "--days", str(DAYS)])


def test_the_job_has_the_rules_that_the_faults_are_placed_by() -> None:
    from agents.flights import app, flights
    from streamproc.operators.pipeline import compile

    (plan,) = compile(app.declaration, {"flights": 4}, "flights")
    rules = feed().injections["rules"]
    assert flights.event_time.bounded
    assert flights.event_time.out_of_orderness_ms == rules["out_of_orderness_ms"]
    tables = {table.name: table for table in (handle.plan for handle in app.declaration.tables)}
    assert tables["hourly"].allowed_lateness_ms == rules["hourly_lateness_ms"]
    assert tables["daily"].allowed_lateness_ms == rules["daily_lateness_ms"]
    expectations = plan.root.children[0]
    assert isinstance(expectations.step, Expect)
    assert set(expectations.step.rules) == {f"{entry['column']} sane" for entry in entries("absurd")}
    dedupe = expectations.children[0].step
    assert isinstance(dedupe, Dedupe)
    assert dedupe.columns == ("time_hour", "carrier", "flight")
    assert dedupe.within_ms == rules["dedupe_ms"]


class StandingClock:
    """It is always noon."""

    def now_ms(self) -> int:
        return 1_700_000_000_000

    def monotonic_s(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        return None


def test_clicks_come_at_the_rate_and_mostly_in_time_with_some_late_and_some_twice() -> None:
    from agents.user_events import KINDS, Clicks

    clicks = Clicks(random.Random(1), StandingClock(), rate=333)
    events = [event for _ in range(400) for event in clicks.take(0.25)]
    assert len(events) == 33_300, "fractions of an event are carried over"
    assert {event["kind"] for event in events} == set(KINDS)
    ages_ms = [StandingClock().now_ms() - event["at"].timestamp() * 1000 for event in events]
    assert sorted(ages_ms)[len(ages_ms) // 2] < 10_000
    assert 5 < sum(age > 15 * MINUTE for age in ages_ms) < 100, "later than watermark and window allow"
    again = len(events) - len({event["event_id"] for event in events})
    assert 200 < again < 500
    assert all((event["amount"] is not None) == (event["kind"] == "purchase") for event in events)


def test_clicks_fit_their_schema() -> None:
    from agents.user_events import Clicks

    parsed = fastavro.parse_schema(json.loads((SCHEMAS / "user_event.avsc").read_text()))
    for event in Clicks(random.Random(2), StandingClock(), rate=100).take(5):
        out = io.BytesIO()
        fastavro.schemaless_writer(out, parsed, event)
        out.seek(0)
        assert fastavro.schemaless_reader(out, parsed, None) == event
