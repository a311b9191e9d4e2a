"""Attacks on the runtime: a schedule, a crash or an input that once broke a promise of the commit, one test each."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import streamproc as sp
from streamproc.app import App
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import load_schema
from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.errors import BrokerUnavailable, SinkUnavailable, UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime.task import Task
from streamproc.sinks.contract import SinkRows, TableShape
from streamproc.testing.fake_sink import FakeSink, FakeWriter
from streamproc.transport.contract import Fetcher, Membership, OutRecord, PartitionOffsets, TaskProducer, TopicSpec
from tests.apps import events_avsc, log, new_app, read_all, rows_of, running, until, write

T0 = 1_700_000_000_000 // 3_600_000 * 3_600_000
Hook = Callable[[str], Awaitable[None]]
"""Called with the name of a transport's call, and again with ``after `` before it when the call has succeeded. What it
raises the caller gets."""


class FaultyTransport:
    """A transport that lets a hook fail, delay or cancel any call of the tasks."""

    def __init__(self, inner: Any, hook: Hook) -> None:
        self._inner, self._hook = inner, hook

    async def start(self) -> None:
        await self._inner.start()

    async def stop(self) -> None:
        await self._inner.stop()

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        await self._inner.create_topics(specs)

    async def partitions(self, topic: str) -> int | None:
        count: int | None = await self._inner.partitions(topic)
        return count

    async def offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, PartitionOffsets]:
        await self._hook("offsets")
        found: dict[TopicPartition, PartitionOffsets] = await self._inner.offsets(tps)
        return found

    async def group_offsets(self, group: str, tps: Collection[TopicPartition]) -> dict[TopicPartition, Offset]:
        found: dict[TopicPartition, Offset] = await self._inner.group_offsets(group, tps)
        return found

    async def delete_records(self, before: Mapping[TopicPartition, Offset]) -> None:
        await self._inner.delete_records(before)

    async def read(self, tp: TopicPartition, start: Offset, stop: Offset) -> AsyncIterator[RawBatch]:
        async for batch in self._inner.read(tp, start, stop):
            await self._hook("read")
            yield batch

    def fetcher(self) -> Fetcher:
        fetcher: Fetcher = FaultyFetcher(self._inner.fetcher(), self._hook)
        return fetcher

    def producer(self, transactional_id: str) -> TaskProducer:
        return FaultyProducer(self._inner.producer(transactional_id), self._hook)

    async def send(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        sent: dict[TopicPartition, Offset] = await self._inner.send(records)
        return sent

    def membership(self, group: str) -> Membership:
        membership: Membership = self._inner.membership(group)
        return membership


class FaultyFetcher:
    def __init__(self, inner: Fetcher, hook: Hook) -> None:
        self._inner, self._hook = inner, hook
        self.resume, self.pause, self.close = inner.resume, inner.pause, inner.close
        self.at_end, self.lag = inner.at_end, inner.lag

    async def get(self) -> RawBatch:
        await self._hook("get")
        return await self._inner.get()


class FaultyProducer:
    """Also holds the task to its promise that a producer is thrown away once a call of it has failed."""

    def __init__(self, inner: TaskProducer, hook: Hook) -> None:
        self._inner, self._listener, self._failed = inner, hook, False

    async def _hook(self, call: str) -> None:
        assert not self._failed, "A producer was used again after a call of it had failed."
        try:
            await self._listener(call)
        except BaseException:
            self._failed = True
            raise

    async def fence(self) -> None:
        await self._hook("fence")
        await self._inner.fence()
        await self._hook("after fence")

    async def produce(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        await self._hook("produce")
        offsets = await self._inner.produce(records)
        await self._hook("after produce")
        return offsets

    async def send_offsets(self, offsets: Mapping[TopicPartition, Offset], group: str) -> None:
        await self._hook("send_offsets")
        await self._inner.send_offsets(offsets, group)

    async def end(self, *, commit: bool) -> None:
        await self._hook("end")
        await self._inner.end(commit=commit)
        await self._hook("after end")


def with_faults(app: App, hook: Hook) -> App:
    """``app`` over a faulty transport."""
    make = app.make_transport

    def faulty() -> Any:
        return FaultyTransport(make(), hook)

    app.make_transport = faulty  # type: ignore[method-assign]
    return app


def number(value: Any) -> OutRecord:
    return OutRecord(b"k", json.dumps(value).encode())


def counting(folder: Path, body: Callable[[Any, Any], Awaitable[None]], **options: Any) -> App:
    """An app whose agent ``count`` over topic ``in`` runs ``body(stream, table)``; a broken stop is no reason to hang."""
    app = new_app(folder, **options)
    counts = app.Table("counts", default=int)

    @app.agent(app.topic("in", partitions=1), name="count")
    async def count(stream: Any) -> None:
        await body(stream, counts)

    return app


def position(app: App, agent: str = "count", topic: str = "in") -> int:
    for task in app.runtime.tasks.values():
        if task.record is not None and agent in task.record.positions:
            return task.record.positions[agent][f"{topic}:0"]
    return 0


def committed(app: App, key: Any = "all", table: str = "counts") -> Any:
    return app.runtime.committed(table, key, 0)


async def refusal(app: App) -> str:
    """Why the app stopped itself."""
    await app.start()
    try:
        await until(lambda: app.crashed, "the crash", 15)
        return str(app.crash_reason)
    finally:
        await app.stop()


# ---- per-record agents


def test_an_agent_that_is_cancelled_from_within_costs_its_record_not_its_task(tmp_path: Path) -> None:
    async def body(stream: Any, counts: Any) -> None:
        async for value in stream:
            counts["all"] += 1
            if value == 5:
                given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                given_up.cancel()
                await given_up

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(10)])
        async with running(app := counting(tmp_path, body)):
            await until(lambda: position(app) == 10, "all ten", 5)
            assert committed(app) == 9
            letters = await read_all(app.runtime.transport, "test-in-dead-letters")
        assert [value for _, _, value, _ in letters] == [b"5"]

    asyncio.run(scenario())


def test_a_commit_cuts_off_what_take_has_not_yielded_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BARRIER_TIMEOUT_S", 0.3)

    async def body(stream: Any, counts: Any) -> None:
        async for values in stream.take(2):
            await asyncio.sleep(0.01)
            counts["all"] += len(values)

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(200)])
        async with running(app := counting(tmp_path, body)):
            await until(lambda: position(app) == 200, "all", 10)
            (task,) = app.runtime.tasks.values()
            assert (committed(app), task.view.restarts) == (200, 0)

    asyncio.run(scenario())


def test_an_agent_that_leaves_its_loop_and_begins_another_misses_nothing(tmp_path: Path) -> None:
    async def body(stream: Any, counts: Any) -> None:
        while True:
            async for value in stream:
                counts[value] += 1
                break

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(20)])
        async with running(app := counting(tmp_path, body)):
            await until(lambda: position(app) == 20, "all")
            assert [committed(app, i) for i in range(20)] == [1] * 20

    asyncio.run(scenario())


def test_a_failure_before_the_first_record_blames_no_record_and_stops_the_worker(tmp_path: Path) -> None:
    async def body(stream: Any, counts: Any) -> None:
        await asyncio.sleep(0.3)  # records wait by now
        raise ValueError

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(20)])
        assert "failed outside of any record" in await refusal(counting(tmp_path, body))

    asyncio.run(scenario())


def test_a_write_between_freeze_and_end_of_an_epoch_is_refused_never_lost(tmp_path: Path) -> None:
    """A task that the agent leaves behind writes while a commit waits for the broker."""
    taken: list[str] = []
    refused: list[str] = []

    async def body(stream: Any, counts: Any) -> None:
        async def stray() -> None:
            while True:
                await asyncio.sleep(0.001)
                try:
                    counts["stray"] += 1
                    taken.append("x")
                except RuntimeError as why:
                    refused.append(str(why))

        left = asyncio.create_task(stray())
        async for _ in stream:
            await asyncio.sleep(0.01)
        left.cancel()

    async def slow(call: str) -> None:
        if call == "end":
            await asyncio.sleep(0.02)

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(30)])
        async with running(app := with_faults(counting(tmp_path, body), slow)):
            await until(lambda: position(app) == 30, "all")
            assert committed(app, "stray") == len(taken)
        assert "no record in hand" in refused[0]

    asyncio.run(scenario())


def test_a_failed_record_gets_its_turn_though_another_agent_is_always_busy(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    counts = app.Table("counts", default=int)

    @app.agent(app.topic("busy", partitions=1), name="busy")
    async def busy(stream: Any) -> None:
        async for _ in stream:
            await asyncio.sleep(0.002)
            counts["busy"] += 1

    @app.agent(app.topic("in", partitions=1), name="count")
    async def count(stream: Any) -> None:
        async for value in stream:
            if value == 1:
                raise ValueError
            counts["all"] += 1

    async def scenario() -> None:
        await write(tmp_path, "busy", 1, [(0, number(i)) for i in range(1000)])
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(3)])
        async with running(app):
            await until(lambda: position(app) == 3, "the failed record", 20)
            assert position(app, "busy", "busy") < 1000, "while the other still worked"
            await until(lambda: position(app, "busy", "busy") == 1000, "the busy one", 20)
            assert (committed(app), committed(app, "busy")) == (2, 1000)

    asyncio.run(scenario())


def test_a_broker_that_is_down_is_no_record_s_fault(tmp_path: Path) -> None:
    tries: list[int] = []

    async def body(stream: Any, counts: Any) -> None:
        async for value in stream:
            if value == 3 and len(tries) < 5:
                tries.append(value)
                raise BrokerUnavailable("as `send` to a topic whose leader is gone raises it")
            counts["all"] += 1

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(6)])
        async with running(app := counting(tmp_path, body)):
            await until(lambda: position(app) == 6, "all")
            assert committed(app) == 6
            assert await read_all(app.runtime.transport, "test-in-dead-letters") == []

    asyncio.run(scenario())


def test_a_row_that_no_table_can_hold_costs_its_record_not_the_worker(tmp_path: Path) -> None:
    async def body(stream: Any, counts: Any) -> None:
        async for value in stream:
            counts[value["key"]] = value["row"]

    rows: list[Any] = [
        {"key": "a", "row": 1}, {"key": "\ud800", "row": 1}, {"key": "b", "row": 1 << 70}, {"key": "c", "row": "x" * 600_000},
        {"key": "d", "row": 1},
    ]  # fmt: skip

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(row)) for row in rows])
        async with running(app := counting(tmp_path, body)):
            await until(lambda: app.crashed or position(app) == 5, "all five")
            assert not app.crashed, app.crash_reason
            assert [committed(app, key) for key in "abcd"] == [1, 0, 0, 1]
            letters = await read_all(app.runtime.transport, "test-in-dead-letters")
        assert [int(headers["sp-offset"]) for _, _, _, headers in letters] == [1, 2, 3]
        assert all(b"ud800" not in headers["sp-reason"] for _, _, _, headers in letters)

    asyncio.run(scenario())


def test_a_refused_record_behind_a_gap_is_set_aside_too(tmp_path: Path) -> None:
    """Its offset is not the committed position: an aborted transaction lies between."""

    async def body(stream: Any, counts: Any) -> None:
        async for value in stream:
            counts[value] = "x" * (600_000 if value == 2 else 1)

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(0)), (0, number(1))])
        async with running(app := counting(tmp_path, body)):
            await until(lambda: position(app) == 2, "the first two")
            producer = app.runtime.transport.producer("upstream")
            await producer.fence()
            for i, commit in [(9, False), (2, True), (3, True)]:
                await producer.produce({TopicPartition("in", 0): [number(i)]})
                await producer.end(commit=commit)
            await until(lambda: app.crashed or position(app) == 8, "all, and their markers", 10)
            assert not app.crashed, app.crash_reason
            letters = await read_all(app.runtime.transport, "test-in-dead-letters")
        assert [value for _, _, value, _ in letters] == [b"2"]

    asyncio.run(scenario())


def test_outages_before_it_do_not_count_as_barrier_timeouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BARRIER_TIMEOUT_S", 0.2)
    outages, slow = [1, 2, 3, 4], [1]

    async def body(stream: Any, counts: Any) -> None:
        async for value in stream:
            if value == 2 and slow:
                slow.pop()
                await asyncio.sleep(0.6)
            counts["all"] += 1

    async def hook(call: str) -> None:
        if call == "end" and outages:
            raise BrokerUnavailable(f"outage {outages.pop()}")

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(6)])
        async with running(app := with_faults(counting(tmp_path, body), hook)):
            await until(lambda: app.crashed or position(app) == 6, "all")
            assert not app.crashed
            assert committed(app) == 6

    asyncio.run(scenario())


def test_an_agent_that_is_renamed_or_reads_another_topic_is_refused_with_the_way_out(tmp_path: Path) -> None:
    def build(names: dict[str, list[str]]) -> App:
        app = new_app(tmp_path)
        topics = {name: app.topic(name, partitions=1) for name in ("a", "b")}
        for name, reads in names.items():

            async def body(stream: Any) -> None:
                async for _ in stream:
                    pass

            app.agent(topics[reads[0]] if len(reads) == 1 else app.topic(*reads), name=name)(body)
        return app

    async def scenario() -> None:
        async with running(app := build({"one": ["a"], "two": ["b"]})):
            await until(lambda: any(task.record for task in app.runtime.tasks.values()), "the first commit")
        renamed = await refusal(build({"one": ["a"], "three": ["b"]}))
        assert "Agent three has no position in b" in renamed
        assert "two of ['b:0']" in renamed
        more = await refusal(build({"one": ["a", "b"], "two": ["b"]}))
        assert "Agent one has no position in b" in more
        assert "reset" in more

    asyncio.run(scenario())


# ---- tasks, and the worker around them


def test_a_task_that_is_cancelled_from_within_stops_the_worker_rather_than_leave_its_partition(tmp_path: Path) -> None:
    async def body(stream: Any, counts: Any) -> None:
        async for _ in stream:
            counts["all"] += 1

    async def hook(call: str) -> None:
        if call == "end" and position(app) == 0 and any(task.work and task.work.dirty for task in tasks()):
            raise asyncio.CancelledError

    def tasks() -> Collection[Any]:
        return app.runtime.tasks.values()

    app = with_faults(counting(tmp_path, body), hook)

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(6)])
        assert "cancelled from within" in await refusal(app)

    asyncio.run(scenario())


def test_an_owner_that_wakes_after_its_task_was_taken_over_commits_nothing(tmp_path: Path) -> None:
    async def body(stream: Any, counts: Any) -> None:
        async for _ in stream:
            counts["all"] += 1

    awake, stuck = asyncio.Event(), asyncio.Event()
    awake.set()

    async def hook(call: str) -> None:
        if call == "end" and not awake.is_set() and not stuck.is_set():
            stuck.set()
            await awake.wait()

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(6)])
        async with running(app := with_faults(counting(tmp_path, body, store="memory://"), hook)):
            await until(lambda: position(app) == 6, "all")
            (old,) = app.runtime.tasks.values()
            awake.clear()
            await app.runtime.transport.send({TopicPartition("in", 0): [number(6)]})
            await stuck.wait()
            new = Task(old.id, old.env)
            run = asyncio.create_task(new.run())
            await until(lambda: new.phase.value == "running", "the new owner")
            assert new.record is not None
            taken_over = new.record
            assert taken_over.positions["count"]["in:0"] == 6
            new.close()
            await run
            awake.set()
            await until(lambda: position(app) == 7, "the record, done again")
            assert old.record is not None
            assert old.record.incarnation > taken_over.incarnation
            assert (committed(app), old.view.restarts) == (7, 1)

    asyncio.run(scenario())


def test_a_pump_that_dies_stops_the_worker(tmp_path: Path) -> None:
    async def body(stream: Any, counts: Any) -> None:
        async for _ in stream:
            counts["all"] += 1

    async def hook(call: str) -> None:
        if call == "get":
            raise KeyError("a bug in the fetcher")

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(1))])
        assert "a bug in the fetcher" in await refusal(with_faults(counting(tmp_path, body), hook))

    asyncio.run(scenario())


def test_a_late_end_of_one_closing_does_not_forget_the_tasks_of_the_next_start(tmp_path: Path) -> None:
    async def body(stream: Any, counts: Any) -> None:
        async for _ in stream:
            counts["all"] += 1

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(6)])
        async with running(app := counting(tmp_path, body)):
            await until(lambda: position(app) == 6, "all")
            first = asyncio.create_task(rebalance(app))
            second = asyncio.create_task(app.runtime.close_tasks())
            await asyncio.gather(first, second)
            await until(lambda: len(app.runtime.tasks) == 1, "the task", 2)
            await app.runtime.transport.send({TopicPartition("in", 0): [number(9)]})
            await until(lambda: position(app) == 7, "one more", 5)

    asyncio.run(scenario())


# ---- sinks


class RefusingSink(FakeSink):
    """Fails with ``failure`` while there is one, in `apply` or, after an outage there, in `open`."""

    failure: Exception | None = None
    outage_first = False

    def writer(self, shape: TableShape, app_id: str, partition: int) -> FakeWriter:
        return RefusingWriter(self, shape, app_id, partition)


class RefusingWriter(FakeWriter):
    _sink: RefusingSink

    async def apply(self, rows: SinkRows | None, **ledgers: Any) -> None:
        if self._sink.failure is not None:
            raise SinkUnavailable("for a moment") if self._sink.outage_first else self._sink.failure
        await super().apply(rows, **ledgers)

    async def open(self) -> None:
        if self._sink.failure is not None:
            raise self._sink.failure
        await super().open()


def event(folder: Path, at: int, country: str = "DE") -> OutRecord:
    encoder = Encoder(load_schema(events_avsc(folder) / "event.avsc"), 1)
    return OutRecord(None, encoder.encode({"id": None, "country": country, "amount": 1.0, "at": at}), (), at)


def summing(folder: Path, sink: FakeSink | None = None, partitions: int = 1, **time: Any) -> App:
    """Table ``sums``: events by country and hour."""
    app = new_app(folder)
    topic = app.topic("events", value_schema="event.avsc", partitions=partitions,
                      event_time=sp.event_time("at", out_of_orderness="1s", **time))  # fmt: skip
    table = app.pipeline(topic).group_by("country").window(sp.tumbling("1h")).agg(n=sp.count()).table("sums")
    if sink is not None:
        table.sink(sink, emit="on_update")
    return app


def total(app: App) -> int:
    return sum(row["n"] for row in rows_of(app, "sums"))


async def add(app: App, record: OutRecord, partition: int = 0) -> None:
    await app.runtime.transport.send({TopicPartition("events", partition): [record]})


async def rebalance(app: App) -> None:
    """What a rebalance does that leaves every partition where it was."""
    await app.runtime.close_tasks()
    app.runtime._start_tasks(app.runtime.assignment())


@pytest.mark.parametrize("outage_first", [False, True])
@pytest.mark.parametrize(
    "failure", [UserError("Postgres refuses: value too long (22001).", remedy="Filter it."), KeyError("a bug")]
)
def test_a_sink_that_refuses_what_it_is_given_stops_the_worker_rather_than_hold_its_task_for_ever(
    tmp_path: Path, failure: Exception, outage_first: bool
) -> None:
    sink = RefusingSink()
    sink.outage_first = outage_first

    async def scenario() -> None:
        await write(tmp_path, "events", 1, [(0, event(tmp_path, T0))])
        app = summing(tmp_path, sink)
        await app.start()
        try:
            await until(lambda: sink.rows["sums"], "the first row")
            sink.failure = failure
            await add(app, event(tmp_path, T0 + 1))
            await until(lambda: app.crashed, "the crash", 5)
            assert app.crash_reason is failure
        finally:
            await app.stop()

    asyncio.run(scenario())


def test_a_closing_that_is_cut_short_leaves_no_lock_and_no_feed_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REVOKE_S", 0.3)  # shorter than the wait for a sink that is down
    sink = FakeSink()

    def feeds() -> int:
        return sum(task.get_name().startswith("sink ") for task in asyncio.all_tasks())

    async def scenario() -> None:
        await write(tmp_path, "events", 1, [(0, event(tmp_path, T0))])
        async with running(app := summing(tmp_path, sink)):
            await until(lambda: sink.rows["sums"], "the first row")
            sink.down = True
            await add(app, event(tmp_path, T0 + 1))
            await until(lambda: total(app) == 2, "the second")
            await asyncio.sleep(0.1)
            await rebalance(app)
            assert feeds() == 0
            sink.down = False
            await until(lambda: app.crashed or [row["n"] for row in sink.rows["sums"].values()] == [2], "the sink")
            assert not app.crashed
            assert feeds() == 1

    asyncio.run(scenario())


def test_a_task_that_waits_for_a_sink_at_its_start_closes_at_once(tmp_path: Path) -> None:
    sink = FakeSink()
    sink.down = True

    async def scenario() -> None:
        await write(tmp_path, "events", 1, [(0, event(tmp_path, T0))])
        async with running(app := summing(tmp_path, sink)):
            await until(lambda: any(task.phase.value == "claiming" for task in app.runtime.tasks.values()), "the wait")
            began = time.monotonic()
            await rebalance(app)
            assert time.monotonic() - began < 2
            sink.down = False
            await until(lambda: sink.rows["sums"], "the row")

    asyncio.run(scenario())


def test_a_pipeline_and_an_agent_at_different_positions_of_one_topic_both_start_again(tmp_path: Path) -> None:
    """Both send the group's offsets of that topic; what the group holds is the position of one of them."""

    def build() -> App:
        app = summing(tmp_path)
        counts = app.Table("counts", default=int)

        @app.agent(app.topic("events", value_schema="event.avsc", partitions=1), name="count")
        async def count(stream: Any) -> None:
            async for _ in stream:
                await asyncio.sleep(0.2)
                counts["all"] += 1

        return app

    async def scenario() -> None:
        await write(tmp_path, "events", 1, [(0, event(tmp_path, T0 + i)) for i in range(100)])
        async with running(app := build()):
            await until(lambda: total(app) == 100 and 0 < position(app, topic="events") < 90, "a difference")
        async with running(app := build()):
            began = time.monotonic()
            tasks = app.runtime.tasks.values
            await until(lambda: app.crashed or [t.phase.value for t in tasks()] == ["running"] * 3, "the start", 10)
            assert not app.crashed, app.crash_reason
            assert time.monotonic() - began < limits.GROUP_OFFSETS_WAIT_S, "nor do they wait for each other"
            assert position(app, topic="events") < 90

    asyncio.run(scenario())


# ---- event time


def test_a_restart_is_not_idleness(tmp_path: Path) -> None:
    """What was written to an idle source while the app was down is in nobody's past."""

    def clock(app: App) -> Any:
        (task,) = (task for task in app.runtime.tasks.values() if task.id.group == "read-events")
        return task.record.watermarks["events"]["events:0"] if task.record and task.record.watermarks else None

    async def scenario() -> None:
        await write(tmp_path, "events", 1, [(0, event(tmp_path, T0))])
        async with running(app := summing(tmp_path, idle_after="100ms", idle="hold")):
            await until(lambda: (state := clock(app)) is not None and state.idle, "idleness")
        async with hold_fetches(app := summing(tmp_path, idle_after="100ms", idle="hold")) as go, running(app):
            await until(lambda: clock(app) is not None and position(app, "events", "events") == 1, "the start")
            await until(lambda: app.runtime.tasks and all(t.record for t in app.runtime.tasks.values()), "records")
            assert not clock(app).idle
            go.set()
            await until(lambda: clock(app).idle, "idleness, once the end was seen")

    asyncio.run(scenario())


@asynccontextmanager
async def hold_fetches(app: App) -> AsyncIterator[asyncio.Event]:
    """No fetch is answered before the event is set."""
    go = asyncio.Event()

    async def hook(call: str) -> None:
        if call == "get":
            await go.wait()

    with_faults(app, hook)
    yield go
    go.set()


def test_the_log_is_readable_after_every_attack(tmp_path: Path) -> None:
    """The kit itself: a transport with a hook that does nothing behaves like the one below it."""

    async def nothing(call: str) -> None: ...

    async def scenario() -> None:
        await write(tmp_path, "events", 1, [(0, event(tmp_path, T0)), (0, event(tmp_path, T0 + 1))])
        async with running(app := with_faults(summing(tmp_path, bounded=True), nothing)):
            await until(app.runtime.finished, "the end")
            assert total(app) == 2
        async with log(tmp_path) as transport:
            assert await transport.partitions("test-sums-changelog") == 1

    asyncio.run(scenario())
