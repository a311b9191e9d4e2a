"""The law: what a pipeline leaves is a function of its records, not of batches, epochs, restarts or partitions' pace.

A whole app runs over random records (disorder, duplicates, nulls, two writer schemas, broken ones, late ones), cut into
random batches, committed at random and stopped in between. DuckDB computes the tables from the records that a plain
loop over the rules of `docs/semantics.md` lets through. ``LAW_SEEDS=7 pytest tests/test_law.py`` runs that seed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import duckdb
import polars as pl
import pytest

import streamproc as sp
from streamproc.app import App
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core.batch import RawBatch
from streamproc.core.types import Offset, TopicPartition
from streamproc.testing.fake_sink import FakeSink
from streamproc.transport.contract import Fetcher, OutRecord
from tests.apps import new_app, read_all, rows_of, running, until, write
from tests.test_attack_runtime import FaultyTransport

SEEDS = [int(seed) for seed in os.environ.get("LAW_SEEDS", "1,2").split(",")]
MINUTE, HOUR = 60_000, 3_600_000
T0 = 1_700_000_000_000 // (24 * HOUR) * 24 * HOUR
OUT_OF_ORDER, WITHIN, MAX_AHEAD = 5 * MINUTE, 100 * MINUTE + 3, HOUR
TABLES: Final = {"hourly": (HOUR, 0, 30 * MINUTE), "shifted": (7 * HOUR, 90 * MINUTE, 0)}
"""Size, offset and allowed lateness."""
HIGH = (1 << 63) - 1
_V1 = [
    {"name": "id", "type": ["null", "string"]},
    {"name": "key", "type": ["null", "string"]},
    {"name": "n", "type": ["null", "long"]},
    {"name": "x", "type": ["null", "double"]},
    {"name": "at", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}]},
]
_V2 = [{"name": "weight", "type": "int", "default": 7}, *_V1]


@dataclass
class Event:
    """A record as written, and where it came to lie."""

    values: dict[str, Any]
    record: OutRecord
    offset: int = -1


@dataclass
class Expected:
    """What the rules say of all records."""

    passed: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in TABLES})
    late: list[tuple[int, int, str]] = field(default_factory=list)
    dead: list[tuple[int, int, str]] = field(default_factory=list)


def schemas(folder: Path) -> Path:
    home = folder / "law"
    home.mkdir(exist_ok=True)
    for name, fields in {"v1": _V1, "v2": _V2}.items():
        (home / f"{name}.avsc").write_text(json.dumps({"type": "record", "name": "Law", "fields": fields}))
    (home / "ids.json").write_text('{"1": "v1.avsc", "2": "v2.avsc"}')
    return home


def events(rng: random.Random, folder: Path, partition: int) -> list[Event]:
    """Half a day of one partition."""
    home = schemas(folder)
    encoders = [Encoder(load_schema(home / f"v{version}.avsc"), version) for version in (1, 2)]
    found: list[Event] = []
    for at in range(120):
        time = T0 + at * 12 * HOUR // 120
        stamp = time
        if rng.random() < 0.15:
            time -= rng.choice([MINUTE, 5 * MINUTE + 1, 40 * MINUTE, 2 * HOUR, 9 * HOUR])
        if rng.random() < 0.1:  # the moments at which windows and buckets begin and end
            time = time // HOUR * HOUR - rng.choice([0, 1])
        values: dict[str, Any] = {
            "id": rng.choice([f"{partition}-{at}"] * 30 + [None]),
            "key": rng.choice(["a", "b", "", "ñ\0", None]),
            "n": rng.choice([None, 0, -3, 5, 1 << 40, *([HIGH] if rng.random() < 0.2 else [])]),
            "x": rng.choice([None, 0.25, -1.5, 1e6, 250.75, *([float("nan"), 1e9] if rng.random() < 0.2 else [])]),
            "at": rng.choice([time] * 40 + [None, stamp + MAX_AHEAD + 1, 1 << 60]),
        }
        if (again := rng.choice(found).values if found else {}) and rng.random() < 0.1:
            values = {**again, "n": 99}
        version = rng.randrange(2)
        values["weight"] = rng.randrange(5) if version else 7
        value = encoders[version].encode({k: v for k, v in values.items() if version or k != "weight"})
        if rng.random() < 0.03:
            values, value = {}, rng.choice([b"junk", value[:-1], value + b"\0"])
        found.append(Event(values, OutRecord(b"k", value, (("trace", b"\xff"),), stamp)))
    return found


def fault(values: dict[str, Any], stamp: int) -> str | None:
    """Why a record becomes a dead letter before it has an event time."""
    if not values:
        return "broken"
    if values["x"] is not None and not values["x"] <= 1e8:
        return "x sane"
    if values["at"] is None:
        return 'event time "at" is missing'
    if values["at"] > T0 + (1 << 50):
        return 'event time "at" is not within the years 1 to 9999'
    if values["at"] > stamp + MAX_AHEAD:
        return f'event time "at" is more than {MAX_AHEAD} ms ahead of the record\'s timestamp'
    return None


def judge(partition: int, log: list[Event], expected: Expected) -> None:
    """One partition by the rules, record by record."""
    watermark, seen, width = -(1 << 63), dict[str, int](), WITHIN // 8
    for event in log:
        v, place = event.values, (partition, event.offset)
        if why := fault(v, event.record.timestamp_ms or 0):
            expected.dead.append((*place, why))
            continue
        before, watermark = watermark, max(watermark, v["at"] - OUT_OF_ORDER - 1)
        if v["id"] is None:
            expected.dead.append((*place, 'null in dedupe key "id"'))
            continue
        bucket = v["at"] // width
        if (bucket + 1) * width + WITHIN <= before:
            expected.late.append((*place, "too old to dedupe"))
            continue
        first = seen.get(v["id"])
        if first is not None and (first + 1) * width + WITHIN > before:
            continue
        seen[v["id"]] = bucket
        if v["key"] == "b" and v["n"] == -3:
            continue
        twice = None if v["n"] is None else 2 * v["n"] + v["weight"]
        if twice is not None and twice > HIGH:
            expected.dead.append((*place, 'integer overflow in column "twice"'))
            continue
        for name, (size, offset, lateness) in TABLES.items():
            start = (v["at"] - offset) // size * size + offset
            if start + size - 1 + lateness <= before:
                expected.late.append((*place, name))
            else:
                expected.passed[name].append({**v, "twice": twice, "begins": start})


def computed(rows: list[dict[str, Any]]) -> dict[Any, Any]:
    """A table by DuckDB: (key, window start) -> its columns."""
    columns = ("key", "n", "x", "twice", "begins", "weight")
    connection = duckdb.connect()
    connection.execute("create table passed (key text, n bigint, x double, twice bigint, begins bigint, weight bigint)")
    values = [[row[name] for name in columns] for row in rows]
    if values:
        connection.executemany(f"insert into passed values ({', '.join('?' * len(columns))})", values)
    found = connection.execute(
        """select key, begins, count(*), sum(twice), avg(x), min(x), max(n), count(distinct n), sum(x), count(x),
                  min(key), sum(weight), sum(x) / count(*)
           from passed group by key, begins having sum(weight) > 3"""
    ).fetchall()
    return {(key, start): tuple(rest) for key, start, *rest in found}


NAMES = ("rows", "twice", "mean", "least", "most", "kinds", "total", "values", "first", "weight", "share")


def build(folder: Path, rng: random.Random, sink: FakeSink, partitions: int) -> App:
    app = new_app(folder, schemas=schemas(folder), commit_interval=f"{rng.choice([3, 10, 40])}ms")
    make = app.make_transport
    app.make_transport = lambda: CutTransport(make(), rng)  # type: ignore[method-assign, assignment, return-value]
    spec = sp.event_time("at", out_of_orderness=f"{OUT_OF_ORDER}ms", idle="hold", bounded=True)
    topic = app.topic("events", value_schema="v2.avsc", partitions=partitions, event_time=spec)
    stream = (
        app.pipeline(topic)
        .expect({"x sane": pl.col("x") <= 1e8})
        .dedupe("id", within=f"{WITHIN}ms")
        .filter((pl.col("key").ne_missing("b")) | (pl.col("n").ne_missing(-3)))
        .with_columns(twice=pl.col("n") * 2 + pl.col("weight"))
        .group_by("key")
    )
    for name, (size, offset, lateness) in TABLES.items():
        window = sp.tumbling(f"{size}ms", offset=f"{offset}ms")
        table = (
            stream.window(window, allowed_lateness=f"{lateness}ms", retain="400d")
            .agg(rows=sp.count(), twice=sp.sum("twice"), mean=sp.mean("x"), least=sp.min("x"), most=sp.max("n"),
                 kinds=sp.count_distinct("n"), total=sp.sum("x"), values=sp.count("x"), first=sp.min("key"),
                 weight=sp.sum("weight"))
            .with_columns(share=pl.col("total") / pl.col("rows"))
            .filter(pl.col("weight") > 3)
            .table(name)
        )  # fmt: skip
        table.late.to("lates")
        table.sink(sink, emit="final" if name == "hourly" else "on_close")
    return app


class CutTransport(FaultyTransport):
    def __init__(self, inner: Any, rng: random.Random) -> None:
        async def no_fault(call: str) -> None:
            """Nothing fails here."""

        super().__init__(inner, no_fault)
        self._rng = rng

    def fetcher(self) -> Fetcher:
        return CutFetcher(self._inner.fetcher(), self._rng)


class CutFetcher:
    """Cuts what is fetched into batches of one to thirty records, and lets a commit fall between any two."""

    def __init__(self, inner: Fetcher, rng: random.Random) -> None:
        self._inner, self._rng = inner, rng
        self._pieces: deque[RawBatch] = deque()
        self.at_end, self.lag, self.close = inner.at_end, inner.lag, inner.close

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        self._forget(tp)
        self._inner.resume(tp, position)

    def pause(self, tp: TopicPartition) -> None:
        self._forget(tp)
        self._inner.pause(tp)

    async def get(self) -> RawBatch:
        await asyncio.sleep(self._rng.choice([0, 0, 0.004]))
        if not self._pieces:
            batch = await self._inner.get()
            self._pieces.extend(self._cut(batch))
        return self._pieces.popleft()

    def _cut(self, batch: RawBatch) -> Iterator[RawBatch]:
        at = 0
        while at < len(batch) or not at:
            size = self._rng.choice([1, 2, 5, 30])
            yield batch.rows(at, min(at + size, len(batch)))
            at += size

    def _forget(self, tp: TopicPartition) -> None:
        self._pieces = deque(piece for piece in self._pieces if piece.tp != tp)


def ended(app: App) -> bool:
    tasks = list(app.runtime.tasks.values())
    return bool(tasks) and all(task.finished() for task in tasks)


@pytest.mark.parametrize("partitions", [1, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_results_are_a_function_of_the_records_in_offset_order(tmp_path: Path, seed: int, partitions: int) -> None:
    rng, sink, expected = random.Random(100 * seed + partitions), FakeSink(), Expected()
    logs = [events(rng, tmp_path, partition) if partition < 3 else [] for partition in range(partitions)]
    for partition, log in enumerate(logs):
        for offset, event in enumerate(log):
            event.offset = offset
        judge(partition, log, expected)
    assert expected.late, "nothing is late"
    assert len({why for *_, why in expected.dead}) > 3, "too little is wrong"

    async def scenario() -> None:
        records = [(partition, event.record) for partition, log in enumerate(logs) for event in log]
        await write(tmp_path, "events", partitions, records)
        for _ in range(2):
            async with running(app := build(tmp_path, rng, sink, partitions)):
                await asyncio.sleep(rng.uniform(0.05, 0.4))
                assert not app.crashed, app.crash_reason
        async with running(app := build(tmp_path, rng, sink, partitions)):
            await until(lambda: app.crashed or ended(app), "the end", 15)
            assert not app.crashed, app.crash_reason
            await compare(app, sink, expected)

    asyncio.run(scenario())


async def compare(app: App, sink: FakeSink, expected: Expected) -> None:
    for name in TABLES:
        wanted = computed(expected.passed[name])
        shown = {
            (row["key"], int(row["window_start"].timestamp() * 1000)): tuple(row[column] for column in NAMES)
            for row in rows_of(app, name)
        }
        assert shown == wanted
        sunk = {key: tuple(row[column] for column in NAMES) for key, row in sink.rows[name].items()}
        assert sunk == wanted
    late = [(p, int(h["sp-offset"]), h) for p, _, _, h in await read_all(app.runtime.transport, "lates")]
    found = [(p, at, h.get("sp-table", h["sp-reason"]).decode()) for p, at, h in late]
    assert found == sorted(expected.late, key=lambda one: one[:2])
    letters = await read_all(app.runtime.transport, "test-events-dead-letters")
    assert all(headers["trace"] == b"\xff" for *_, headers in letters)
    dead = [(p, int(h["sp-offset"]), h["sp-reason"].decode()) for p, _, _, h in letters]
    broken = {one[:2] for one in expected.dead if one[2] == "broken"}
    assert [(p, at, "broken" if (p, at) in broken else why) for p, at, why in dead] == expected.dead
