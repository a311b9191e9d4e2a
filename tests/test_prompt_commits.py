"""When an epoch ends: a table's owner does not let a result wait for a second interval while there is time; under load it
does, so that its epochs are as large as the interval makes them, and larger where tasks are many. And what an epoch means to
the sinks is computed once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import streamproc as sp
from streamproc.app import App
from streamproc.commit.record import CommitRecord
from streamproc.core import limits
from streamproc.core.clock import SystemClock
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime import task as task_module
from streamproc.runtime.epoch import Committed, EpochParts, commit
from streamproc.runtime.ownerwork import OwnerWork
from streamproc.runtime.runtime import Runtime
from streamproc.runtime.task import Phase, Task
from streamproc.testing.fake_sink import FakeSink
from streamproc.transport.kafka.fetch import Pace
from streamproc.transport.kafka.txn import lane_of
from tests.apps import new_app, rows_of, running, until
from tests.workers import T0, event, record


class HandClock(SystemClock):
    """The machine's, and as far ahead of it as a test says."""

    ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s


def counting(app: App, *sinks: FakeSink, partitions: int = 1) -> None:
    events = app.topic("events", value_schema="event.avsc", partitions=partitions, event_time=sp.event_time("at"))
    table = app.pipeline(events).group_by("country").window(sp.tumbling("1h"), allowed_lateness="30d")
    table.agg(n=sp.count()).table("counts").sink(*sinks)


def task_of(app: App, group: str) -> Task | None:
    return next((task for task in app.runtime.tasks.values() if task.id.group.startswith(group)), None)


async def started(app: App) -> tuple[Task, Task]:
    """The task that reads and the one that owns the table, both at work."""
    found = lambda: [task for task in (task_of(app, "read-"), task_of(app, "table-")) if task is not None]  # noqa: E731
    await until(lambda: [task.phase for task in found()] == [Phase.RUNNING] * 2, "both tasks")
    reader, owner = found()
    return reader, owner


async def read_and_commit(app: App, reader: Task, folder: Path, country: str) -> None:
    """One event of ``country``, committed by the task that reads; only by it."""
    tp = TopicPartition("events", 0)
    before = reader.committed_position(tp) or 0
    await app.runtime.transport.send({tp: [record(event(folder, T0, country=country))]})

    def committed() -> bool:
        reader.commit_due()
        return (reader.committed_position(tp) or 0) > before

    await until(committed, "the record to be committed")


def test_a_result_waits_for_one_interval_and_not_for_two(tmp_path: Path) -> None:
    async def scenario() -> None:
        counting(app := new_app(tmp_path, commit_interval="1h"), FakeSink())
        async with running(app):
            reader, _ = await started(app)
            await read_and_commit(app, reader, tmp_path, "DE")
            await until(lambda: [row["n"] for row in rows_of(app, "counts")] == [1], "the result")

    asyncio.run(scenario())


def test_under_load_a_table_commits_at_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "_at_leisure", lambda self: False)

    async def scenario() -> None:
        counting(app := new_app(tmp_path, commit_interval="1h"), FakeSink())
        async with running(app):
            reader, owner = await started(app)
            for country in ("DE", "FR"):
                before = owner.work.size_bytes if owner.work is not None else 0
                await read_and_commit(app, reader, tmp_path, country)
                await until(lambda held=before: owner.work and owner.work.size_bytes > held, "the owner to merge it")
            assert rows_of(app, "counts") == []
            owner.commit_due()
            await until(lambda: len(rows_of(app, "counts")) == 2, "the results")

    asyncio.run(scenario())


def test_commits_ahead_of_the_interval_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EARLY_COMMITS_MAX", 3)

    async def scenario() -> None:
        counting(app := new_app(tmp_path, commit_interval="1h"), FakeSink())
        async with running(app):
            reader, owner = await started(app)
            before = owner.view.commits
            for at in range(5):
                await read_and_commit(app, reader, tmp_path, f"C{at}")
                await until(lambda at=at: len(rows_of(app, "counts")) > at or owner.work.size_bytes > 0, "its turn")
            assert owner.view.commits - before <= 3
            assert len(rows_of(app, "counts")) < 5
            owner.commit_due()
            await until(lambda: len(rows_of(app, "counts")) == 5, "the last result")

    asyncio.run(scenario())


@pytest.fixture
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task counts for so many that an epoch of one that is behind lasts 20 s."""
    monkeypatch.setattr(limits, "PACED_TASKS_MIN", 0)
    monkeypatch.setattr(limits, "PACE_S_PER_TASK", 10.0)


async def send(app: App, folder: Path, partition: int = 0, country: str = "DE") -> None:
    tp = TopicPartition("events", partition)
    await app.runtime.transport.send({tp: [record(event(folder, T0, country=country))]})


async def some_time() -> None:
    for _ in range(20):
        await asyncio.sleep(0.005)


def test_of_many_tasks_one_that_is_behind_lets_its_epoch_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many_tasks: None
) -> None:
    monkeypatch.setattr(Task, "_at_end", False)

    async def scenario() -> None:
        clock = HandClock()
        counting(app := new_app(tmp_path, commit_interval="1h", clock=clock))
        async with running(app):
            reader, _ = await started(app)
            before = reader.view.commits
            await send(app, tmp_path)
            await until(lambda: reader.work is not None and reader.work.dirty, "the record to be taken")
            clock.ahead_s = 19.0
            reader.commit_due()
            await some_time()
            assert reader.view.commits == before
            clock.ahead_s = 21.0
            reader.commit_due()
            await until(lambda: reader.view.commits > before, "the commit")

    asyncio.run(scenario())


def test_of_many_tasks_one_that_is_abreast_commits_at_the_interval(tmp_path: Path, many_tasks: None) -> None:
    async def scenario() -> None:
        counting(app := new_app(tmp_path, commit_interval="1h", clock=HandClock()))
        async with running(app):
            reader, _ = await started(app)
            before = reader.view.commits
            await send(app, tmp_path)
            await until(lambda: reader.work is not None and reader.work.dirty and reader.at_leisure, "the record")
            reader.commit_due()
            await until(lambda: reader.view.commits > before, "the commit")

    asyncio.run(scenario())


def test_an_interval_that_ends_during_a_commit_counts_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        counting(app := new_app(tmp_path, commit_interval="1h"))
        async with running(app):
            reader, _ = await started(app)

            async def overtaken(parts: EpochParts, last: CommitRecord) -> Committed:
                if parts.work is reader.work and not reader._inbox and last.epoch == epoch:
                    await send(app, tmp_path)
                    await until(lambda: reader._inbox, "the next record")
                    reader.commit_due()
                return await commit(parts, last)

            await send(app, tmp_path)
            await until(lambda: reader.work is not None and reader.work.dirty, "the first record")
            assert reader.record is not None
            epoch = reader.record.epoch
            monkeypatch.setattr(task_module, "commit", overtaken)
            reader.commit_due()
            await until(lambda: reader.committed_position(TopicPartition("events", 0)) == 2, "both commits")
            monkeypatch.undo()

    asyncio.run(scenario())


def test_an_owner_waits_for_the_last_of_an_interval_s_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        counting(app := new_app(tmp_path, commit_interval="1h"), partitions=2)
        async with running(app):
            tasks = lambda group: [task for task in app.runtime.tasks.values() if task.id.group.startswith(group)]  # noqa: E731
            await until(lambda: [task.phase for task in app.runtime.tasks.values()] == [Phase.RUNNING] * 4, "all tasks")
            readers, owners, go_on = tasks("read-"), tasks("table-"), asyncio.Event()

            async def held_up(parts: EpochParts, last: CommitRecord) -> Committed:
                if parts.work is readers[1].work:
                    await go_on.wait()
                return await commit(parts, last)

            # What the starts have told is through.
            await until(lambda: all(owner.view.commits > 1 and not owner.work.dirty for owner in owners), "the owners")
            await some_time()
            monkeypatch.setattr(task_module, "commit", held_up)
            before = sum(owner.view.commits for owner in owners)
            for partition in range(2):
                await send(app, tmp_path, partition)
            await until(lambda: all(reader.work is not None and reader.work.dirty for reader in readers), "the records")
            for reader in readers:
                reader.commit_due()
            await until(
                lambda: any(owner.work is not None and owner.work.dirty for owner in owners), "what the first has told"
            )
            await some_time()
            assert sum(owner.view.commits for owner in owners) == before
            go_on.set()
            await until(lambda: [row["n"] for row in rows_of(app, "counts")] == [2], "the result")
            monkeypatch.undo()

    asyncio.run(scenario())


def test_an_owner_that_asked_for_leisure_in_vain_commits_as_soon_as_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TICK_S", 3600.0)

    async def scenario() -> None:
        counting(app := new_app(tmp_path, commit_interval="1h"))
        async with running(app):
            reader, owner = await started(app)
            busy = [reader]
            monkeypatch.setattr(Task, "at_leisure", property(lambda task: task not in busy))
            await read_and_commit(app, reader, tmp_path, "DE")
            await until(lambda: owner.work is not None and owner.work.dirty, "the partial")
            await some_time()
            assert rows_of(app, "counts") == []
            busy.clear()
            await send(app, tmp_path)  # something to do, and to be done with
            await until(lambda: [row["n"] for row in rows_of(app, "counts")] == [1], "the result")

    asyncio.run(scenario())


def test_an_owner_waits_for_what_is_committed_to_it_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        counting(app := new_app(tmp_path, commit_interval="1h"))
        async with running(app):
            reader, owner = await started(app)
            tp = TopicPartition(next(iter(owner.env.group.sources)), 0)

            async def more(parts: EpochParts, last: CommitRecord) -> Committed:
                done = await commit(parts, last)
                return replace(done, written={**done.written, tp: Offset(100)}) if parts.work is reader.work else done

            monkeypatch.setattr(task_module, "commit", more)
            await read_and_commit(app, reader, tmp_path, "DE")
            await until(lambda: owner.work is not None and owner.work.dirty, "the partial")
            await some_time()
            assert rows_of(app, "counts") == []
            owner.env.told.clear()
            owner.look_again()
            await until(lambda: [row["n"] for row in rows_of(app, "counts")] == [1], "the result")
            monkeypatch.undo()

    asyncio.run(scenario())


def test_a_few_small_answers_of_a_broker_are_not_waited_for_and_a_trickle_is() -> None:
    pace = Pace()
    assert [pace.pause_s(100.0) for _ in range(limits.FETCH_BURST)] == [0.0] * limits.FETCH_BURST
    assert pace.pause_s(100.0) == pytest.approx(limits.FETCH_PAUSE_S)
    assert pace.pause_s(100.0 + limits.FETCH_PAUSE_S) == pytest.approx(limits.FETCH_PAUSE_S)
    assert pace.pause_s(200.0) == 0.0


def test_what_two_sinks_are_told_alike_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    results = OwnerWork.results

    def noted(self: OwnerWork, rows: Any) -> Any:
        frame = results(self, rows)
        computed.append(frame.height)
        return frame

    one, other = FakeSink(), FakeSink("other")

    async def scenario() -> None:
        counting(app := new_app(tmp_path, commit_interval="1h"), one, other)
        async with running(app):
            reader, _ = await started(app)
            monkeypatch.setattr(OwnerWork, "results", noted)
            await read_and_commit(app, reader, tmp_path, "DE")
            await until(lambda: one.rows.get("counts") and other.rows.get("counts"), "both sinks")

    asyncio.run(scenario())
    assert one.rows == other.rows
    assert computed == [1]


@pytest.mark.parametrize("group", ["shop:read-orders", "shop:table-revenue", "flights:agents"])
def test_neighbouring_partitions_have_connections_of_their_own(group: str) -> None:
    neighbours = range(limits.TRANSACTION_LANES)
    assert {lane_of(f"{group}:{partition}") for partition in neighbours} == set(neighbours)
