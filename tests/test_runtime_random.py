"""Random faults, cancellations, rebalances and restarts of a whole app: what is left equals one batch computation.

A failure names its seed in the test's name; ``RANDOM_SEEDS=7 pytest tests/test_runtime_random.py`` runs that one. It
decides the data and the dice; the event loop's own timing does not replay exactly.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import random
import shutil
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import pytest

import streamproc as sp
from streamproc.app import App
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.errors import BrokerUnavailable, ProducerFenced, SinkUnavailable, UnknownOutcome
from streamproc.core.types import Offset, TopicPartition
from streamproc.sinks.contract import SinkRows, TableShape
from streamproc.testing.fake_sink import FakeSink, FakeWriter
from streamproc.transport.contract import Fetcher, OutRecord, TopicSpec
from tests.apps import events_avsc, log, new_app, read_all, rows_of, running, until
from tests.test_attack_runtime import FaultyTransport, rebalance

SEEDS = [int(seed) for seed in os.environ.get("RANDOM_SEEDS", "1,2").split(",")]
HOUR = 3_600_000
T0 = 1_700_000_000_000 // (24 * HOUR) * 24 * HOUR
PARTITIONS = 3
"""The last one is empty."""
OUT_OF_ORDER = 10 * 60_000
TABLES = {"hourly": (HOUR, 30 * 60_000), "daily": (24 * HOUR, 0)}
"""Window and allowed lateness."""


class Chaos:
    """The dice. ``on`` False: nothing happens any more."""

    def __init__(self, seed: int) -> None:
        self.rng, self.on = random.Random(seed), True
        self.hits: defaultdict[str, int] = defaultdict(int)

    def strikes(self, chance: float) -> bool:
        return self.on and self.rng.random() < chance

    async def hook(self, call: str) -> None:
        """Of a transport's calls."""
        for _ in range(self.rng.randrange(3) if self.on else 0):
            await asyncio.sleep(0)
        if self.strikes(0.1):
            await asyncio.sleep(0.002)
        if not self.strikes(0.1 if call.endswith("end") else 0.05):
            return
        self.hits[call] += 1
        failures: list[type[Exception]] = [BrokerUnavailable]
        if call in ("after fence", "produce", "after produce", "send_offsets", "end"):
            failures.append(ProducerFenced)
        if call in ("end", "after end"):
            failures.append(UnknownOutcome)
        raise self.rng.choice(failures)(f"chaos in {call}")


class ChaosTransport(FaultyTransport):
    def __init__(self, inner: Any, chaos: Chaos) -> None:
        super().__init__(inner, chaos.hook)
        self._chaos = chaos

    def fetcher(self) -> Fetcher:
        return SmallBatches(self._inner.fetcher(), self._chaos)


class SmallBatches:
    """Cuts batches into small ones, so that there are many epochs in a short log."""

    def __init__(self, inner: Fetcher, chaos: Chaos) -> None:
        self._inner, self._chaos = inner, chaos
        self._pieces: deque[RawBatch] = deque()
        self.at_end, self.lag, self.close = inner.at_end, inner.lag, inner.close

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        self._forget(tp)
        self._inner.resume(tp, position)

    def pause(self, tp: TopicPartition) -> None:
        self._forget(tp)
        self._inner.pause(tp)

    async def get(self) -> RawBatch:
        await self._chaos.hook("get")
        if not self._pieces:
            batch, size = await self._inner.get(), self._chaos.rng.randrange(5, 40)
            cuts = range(0, max(len(batch), 1), size)
            self._pieces.extend(batch.rows(lo, min(lo + size, len(batch))) for lo in cuts)
        return self._pieces.popleft()

    def _forget(self, tp: TopicPartition) -> None:
        self._pieces = deque(piece for piece in self._pieces if piece.tp != tp)


class ChaosSink(FakeSink):
    def __init__(self, chaos: Chaos) -> None:
        super().__init__()
        self.chaos = chaos
        self._kept: tuple[Any, Any] | None = None

    def writer(self, shape: TableShape, app_id: str, partition: int) -> FakeWriter:
        return ChaosWriter(self, shape, app_id, partition)

    def keep_or_roll_back(self) -> None:
        """A backup is taken, or the last one brought back."""
        if self._kept is None:
            self._kept = copy.deepcopy((self.rows, self.ledgers))
        else:
            (self.rows, self.ledgers), self._kept = self._kept, None


class ChaosWriter(FakeWriter):
    _sink: ChaosSink

    async def apply(self, rows: SinkRows | None, **ledgers: Any) -> None:
        await self._dice("sink before")
        await super().apply(rows, **ledgers)
        await self._dice("sink after")

    async def _dice(self, when: str) -> None:
        if self._sink.chaos.strikes(0.2):
            await asyncio.sleep(0.002)
        if self._sink.chaos.strikes(0.1):
            self._sink.chaos.hits[when] += 1
            raise SinkUnavailable(f"chaos {when}")


class Data:
    """What is in the topics, and what must come of it."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.events = [*(self._events(rng, partition) for partition in range(PARTITIONS - 1)), []]
        self.words = [*(self._words(rng, partition) for partition in range(PARTITIONS - 1)), []]

    @staticmethod
    def _events(rng: random.Random, partition: int) -> list[dict[str, Any]]:
        """Twelve hours of events, a tenth twice, a tenth out of order, some of them beyond all lateness."""
        found: list[dict[str, Any]] = []
        for at in range(200):
            time = T0 + 16 * HOUR + at * 12 * HOUR // 200
            if rng.random() < 0.1:
                time -= rng.choice([5 * 60_000, 20 * 60_000, 2 * HOUR])
            found.append({"id": f"{partition}-{at}", "country": rng.choice(["DE", "FR", "IT", "US"]),
                          "amount": float(rng.randrange(100)), "at": time})  # fmt: skip
            if rng.random() < 0.1:
                found.append(dict(rng.choice(found)))
        return found

    @staticmethod
    def _words(rng: random.Random, partition: int) -> list[dict[str, Any]]:
        kinds = ["good"] * 60 + ["flaky"] * 2 + ["bad"]
        return [{"key": f"{partition}{rng.choice('abcde')}", "n": at, "kind": rng.choice(kinds)} for at in range(120)]

    async def write(self, folder: Path) -> None:
        encoder = Encoder(load_schema(events_avsc(folder) / "event.avsc"), 1)
        async with log(folder) as transport:
            await transport.create_topics([TopicSpec("events", PARTITIONS), TopicSpec("words", PARTITIONS)])
            for partition in range(PARTITIONS):
                events = [OutRecord(None, encoder.encode(e), (), e["at"]) for e in self.events[partition]]
                words = [OutRecord(w["key"].encode(), json.dumps(w).encode()) for w in self.words[partition]]
                await transport.send({TopicPartition("events", partition): events})
                await transport.send({TopicPartition("words", partition): words})

    def tables(self) -> tuple[dict[str, dict[Any, Any]], dict[str, list[Any]]]:
        """Rows and late records of every table, in one go over the events."""
        groups: dict[str, dict[Any, list[Any]]] = {name: defaultdict(list) for name in TABLES}
        late: dict[str, list[Any]] = {name: [] for name in TABLES}
        for partition, events in enumerate(self.events):
            watermark, seen = -(1 << 60), set()
            for offset, event in enumerate(events):
                before, watermark = watermark, max(watermark, event["at"] - OUT_OF_ORDER - 1)
                if event["id"] in seen:
                    continue
                seen.add(event["id"])
                for name, (size, lateness) in TABLES.items():
                    start = event["at"] // size * size
                    if start + size - 1 + lateness <= before:
                        late[name].append((partition, offset))
                    else:
                        groups[name][event["country"], start].append(event)
        rows = {
            name: {
                key: (len(of), sum(e["amount"] for e in of), len({e["amount"] for e in of}))
                for key, of in table.items()
            }
            for name, table in groups.items()
        }
        return rows, late

    def counts(self) -> dict[str, int]:
        found: defaultdict[str, int] = defaultdict(int)
        for words in self.words:
            for word in words:
                found[word["key"]] += word["kind"] != "bad"
        return {key: count for key, count in found.items() if count}

    def numbers(self) -> dict[str, int]:
        found: defaultdict[str, int] = defaultdict(int)
        for words in self.words:
            for word in words:
                found[word["key"]] += word["n"]
        return found

    def bad(self) -> list[tuple[int, int]]:
        return [(p, w["n"]) for p, words in enumerate(self.words) for w in words if w["kind"] == "bad"]


def build(folder: Path, chaos: Chaos, sink: FakeSink, failed: set[Any]) -> App:
    app = new_app(folder, commit_interval="10ms")
    make = app.make_transport
    app.make_transport = lambda: ChaosTransport(make(), chaos)  # type: ignore[method-assign, assignment, return-value]
    events = app.topic("events", value_schema="event.avsc", partitions=PARTITIONS,
                       event_time=sp.event_time("at", out_of_orderness="10m", bounded=True))  # fmt: skip
    stream = app.pipeline(events).dedupe("id", within="7d").group_by("country")
    for name, (size, lateness) in TABLES.items():
        windowed = stream.window(sp.tumbling(f"{size // HOUR}h"), allowed_lateness=f"{lateness}ms", retain="400d")
        table = windowed.agg(n=sp.count(), amount=sp.sum("amount"), kinds=sp.count_distinct("amount")).table(name)
        table.late.to(f"late-{name}")
        table.sink(sink, emit="on_update")
    counts, out = app.Table("counts", default=int), app.topic("out", partitions=PARTITIONS)

    @app.agent(app.topic("words", partitions=PARTITIONS), name="words")
    async def words(stream: Any) -> None:
        try:
            async for word in stream:
                counts[word["key"]] += 1
                await out.send(key=word["key"], value=counts[word["key"]])
                if chaos.strikes(0.1):
                    await asyncio.sleep(0)
                this = (word["key"], word["n"])
                if word["kind"] == "bad" or (word["kind"] == "flaky" and this not in failed):
                    failed.add(this)
                    raise ValueError
        finally:
            with contextlib.suppress(RuntimeError):  # a given-up agent reaches nothing
                counts["finally"] += 1
                await out.send(key="finally", value=1)

    numbers = app.Table("numbers", default=int)

    @app.agent(app.topic("words", partitions=PARTITIONS), name="slow")
    async def slow(stream: Any) -> None:
        async for words in stream.take(3):
            if chaos.strikes(0.3):
                await asyncio.sleep(0.002)
            for word in words:
                numbers[word["key"]] += word["n"]

    return app


async def torment(app: App, chaos: Chaos, sink: ChaosSink) -> None:
    """A few rebalances at random moments, most of them too short for anybody to close in peace."""
    for _ in range(5):
        await asyncio.sleep(chaos.rng.uniform(0.0, 0.25))
        limits.REVOKE_S = chaos.rng.choice([0.0, 0.001, 0.01, 1.0])  # type: ignore[misc]
        sink.down = chaos.strikes(0.3)
        if chaos.strikes(0.3):
            sink.keep_or_roll_back()
        await rebalance(app)
        assert not app.crashed, app.crash_reason


def through(app: App, data: Data) -> bool:
    """Pipelines at their end and in their sinks, agents behind the last record."""
    if app.crashed:
        return True
    tasks = list(app.runtime.tasks.values())
    ends = {f"words:{p}": len(words) for p, words in enumerate(data.words)}
    agents = [task for task in tasks if task.id.group == "agents"]
    at = [
        {tp: pos for task in agents if task.record for tp, pos in task.record.positions[name].items()}
        for name in ("words", "slow")
    ]
    return bool(tasks) and at == [ends, ends] and all(task.finished() for task in tasks if task not in agents)


@pytest.mark.parametrize("seed", SEEDS)
def test_after_any_faults_everything_equals_one_batch_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for name, value in {"RETRY_BACKOFF_S": 0.002, "RETRY_BACKOFF_S_MAX": 0.01, "TASK_RESTART_S_MAX": 0.02,
                        "SINK_CLOSE_S": 0.05, "REVOKE_S": 1.0}.items():  # fmt: skip
        monkeypatch.setattr(limits, name, value)
    chaos, data, failed = Chaos(seed), Data(seed), set[Any]()
    sink = ChaosSink(chaos)

    async def scenario() -> None:
        await data.write(tmp_path)
        for _ in range(2):
            async with running(app := build(tmp_path, chaos, sink, failed)):
                await torment(app, chaos, sink)
            if chaos.rng.random() < 0.5:
                shutil.rmtree(tmp_path / "state", ignore_errors=True)
        chaos.on = sink.down = False
        limits.REVOKE_S = 5.0  # type: ignore[misc]
        async with running(app := build(tmp_path, chaos, sink, failed)):
            await until(lambda: through(app, data), "the end", 30)
            assert not app.crashed, app.crash_reason
            await compare(app, data, sink)

    asyncio.run(scenario())
    assert sum(chaos.hits.values()) > 10, "too few faults to show anything"


async def compare(app: App, data: Data, sink: FakeSink) -> None:
    rows, late = data.tables()
    transport = app.runtime.transport
    for name in TABLES:
        found = {
            (row["country"], int(row["window_start"].timestamp() * 1000)): (row["n"], row["amount"], row["kinds"])
            for row in rows_of(app, name)
        }
        assert found == rows[name]
        sunk = {key: (row["n"], row["amount"], row["kinds"]) for key, row in sink.rows[name].items()}
        assert sunk == rows[name]
        letters = await read_all(transport, f"late-{name}")
        assert [(p, int(headers["sp-offset"])) for p, _, _, headers in letters] == late[name]
    counts = data.counts()
    assert {key: app.runtime.committed("counts", key) for key in counts} == counts
    numbers = data.numbers()
    assert {key: app.runtime.committed("numbers", key) for key in numbers} == numbers
    assert app.runtime.committed("counts", "finally") is None
    sent: defaultdict[str, list[int]] = defaultdict(list)
    for _, key, value, _ in await read_all(transport, "out"):
        sent[(key or b"").decode()].append(json.loads(value or b""))
    assert sent == {key: list(range(1, count + 1)) for key, count in counts.items()}
    dead = await read_all(transport, "test-words-dead-letters")
    assert [(partition, json.loads(value or b"")["n"]) for partition, _, value, _ in dead] == data.bad()
