"""A rebalance does not hurt: what fits is committed, the rest is redone, a restore goes on, and nobody waits for it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamproc.app import App
from streamproc.core import limits
from streamproc.core.types import TaskId, TopicPartition
from streamproc.runtime.inspect import Inspector
from streamproc.transport.contract import OutRecord
from tests.apps import new_app, running, until, write
from tests.test_attack_runtime import rebalance, with_faults
from tests.web import client, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

HELD = 7
"""The value of the record that an agent holds on to."""


class Slow:
    """An app that counts values, and holds on to the record `HELD` until it is let go."""

    def __init__(self, folder: Path, partitions: int = 1, **options: Any) -> None:
        self.let_go, self.held = asyncio.Event(), asyncio.Event()
        self.app = new_app(folder, **{"commit_interval": "1h", **options})
        counts = self.app.Table("counts", default=int)

        @self.app.agent(self.app.topic("in", partitions=partitions), name="count")
        async def count(stream: Any) -> None:
            async for value in stream:
                if value == HELD:
                    self.held.set()
                    await self.let_go.wait()
                counts[value] += 1

    def position(self, partition: int = 0) -> int:
        """Committed."""
        task = self.app.runtime.tasks.get(TaskId("agents", partition))
        if task is None or task.record is None:
            return -1
        return task.record.positions["count"][f"in:{partition}"]

    def counts(self, keys: int) -> list[int]:
        return [self.app.runtime.committed("counts", key, 0) for key in range(keys)]


def value(number: int) -> OutRecord:
    return OutRecord(b"k", json.dumps(number).encode())


def test_a_revocation_commits_what_is_done_within_its_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, value(number)) for number in range(5)])
        slow = Slow(tmp_path)
        async with running(slow.app):
            await until(lambda: slow.app.runtime.tasks and _read(slow.app) == 5, "the records")
            assert slow.position() == 0, "nothing is committed yet"
            (task,) = slow.app.runtime.tasks.values()
            began = time.monotonic()
            await slow.app.runtime.close_tasks()
            assert time.monotonic() - began < limits.REVOKE_S / 2
            assert task.record is not None
            assert task.record.positions["count"]["in:0"] == 5
            assert slow.app.runtime.tasks == {}

    asyncio.run(scenario())


def test_what_does_not_fit_into_a_revocation_is_dropped_whole_and_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "REVOKE_S", 0.3)

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, value(number)) for number in range(HELD + 3)])
        slow = Slow(tmp_path)
        async with running(slow.app):
            await slow.held.wait()
            (task,) = slow.app.runtime.tasks.values()
            began = time.monotonic()
            await rebalance(slow.app)  # which opens the same store again
            assert time.monotonic() - began < 0.3 + limits.AGENT_CANCEL_S + 1
            assert "did not close in time" in caplog.text
            assert task.record is not None
            assert task.record.positions["count"]["in:0"] == 0, "no half of an epoch"
            slow.let_go.set()
            await until(lambda: _read(slow.app) == HELD + 3, "all of them, again")
            slow.app.runtime.commit_now()
            await until(lambda: slow.position() == HELD + 3, "the commit")
            assert slow.counts(HELD + 3) == [1] * (HELD + 3)

    asyncio.run(scenario())


def test_while_one_task_closes_slowly_everything_else_is_answered(tmp_path: Path) -> None:
    async def scenario() -> None:
        await write(tmp_path, "in", 2, [(1, value(number)) for number in (1, 2, HELD)])
        slow = Slow(tmp_path, 2, commit_interval="50ms", web_enabled=True, web_port=free_port())
        async with running(slow.app), client(slow.app) as asking:
            await slow.held.wait()
            await slow.app.runtime.transport.send({TopicPartition("in", 0): [value(3)]})
            await until(lambda: slow.position(0) == 1, "the other task")
            closing = asyncio.create_task(slow.app.runtime.close_tasks())
            tasks = dict(slow.app.runtime.tasks)
            await until(lambda: tasks[TaskId("agents", 0)].phase.value == "closed", "the quick one", 2)
            membership = slow.app.runtime._member()
            slowest = 0.0
            for _ in range(20):
                began = time.monotonic()
                slow.counts(4)
                assert await membership.confirm()
                assert (await asking.get("/api/tasks")).status == 200
                assert (await asking.get("/api/tables/counts/rows")).status in (200, 503)
                await slow.app.topic("elsewhere", partitions=1).send(value=b"from outside of agents")
                slowest = max(slowest, time.monotonic() - began)
                assert not closing.done()
            assert slowest < 2.0
            assert tasks[TaskId("agents", 1)].phase.value != "closed"
            slow.let_go.set()
            await asyncio.wait_for(closing, 5)
            assert tasks[TaskId("agents", 1)].record.positions["count"]["in:1"] == 3  # type: ignore[union-attr]

    asyncio.run(scenario())


def _read(app: App) -> int:
    """Records that the agents have done with, committed or not."""
    works = [task.work for task in app.runtime.tasks.values() if task.work is not None]
    return sum(at for work in works for of in work.positions().values() for at in of.values())


# ---- restore


ROWS, EPOCHS = 400, 8


def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch is read, and written, at a time."""
    monkeypatch.setattr("streamproc.core.limits.FETCH_PARTITION_BYTES_MAX", 1)
    monkeypatch.setattr(limits, "RESTORE_WRITE_BYTES_MAX", 1)


async def filled(folder: Path) -> None:
    """A changelog of several batches whose local store is lost."""
    await write(folder, "in", 1, [])
    slow = Slow(folder, commit_interval="20ms", datadir=folder / "gone")
    slow.let_go.set()
    async with running(slow.app):
        for epoch in range(EPOCHS):
            numbers = range(epoch * ROWS // EPOCHS, (epoch + 1) * ROWS // EPOCHS)
            await slow.app.runtime.transport.send({TopicPartition("in", 0): [value(number) for number in numbers]})
            await until(lambda: slow.position() == (epoch + 1) * ROWS // EPOCHS, "the epoch")  # noqa: B023


class Held:
    """Lets a restore read so many batches, then holds it."""

    def __init__(self, batches: int) -> None:
        self.left, self.stuck, self.go = batches, asyncio.Event(), asyncio.Event()

    async def __call__(self, call: str) -> None:
        if call == "read" and restoring(self.app):
            if self.left == 0:
                self.stuck.set()
                await self.go.wait()
            else:
                self.left -= 1

    app: App


def restoring(app: App) -> bool:
    return any(task.view.restore is not None and not task.view.restore.done for task in app.runtime.tasks.values())


def held_restore(folder: Path, batches: int, **options: Any) -> tuple[Slow, Held]:
    hook, slow = Held(batches), Slow(folder, **options)
    slow.let_go.set()
    hook.app = with_faults(slow.app, hook)
    return slow, hook


def test_a_restore_that_a_rebalance_breaks_off_leaves_at_once_and_goes_on_from_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_steps(monkeypatch)

    async def scenario() -> None:
        await filled(tmp_path)
        slow, hook = held_restore(tmp_path, 4)
        starting = asyncio.create_task(slow.app.start())  # it waits for the restore
        try:
            await hook.stuck.wait()
            began = time.monotonic()
            hook.left = -1
            await rebalance(slow.app)
            assert time.monotonic() - began < 1, "it waited for no restore"
            await until(lambda: slow.position() == ROWS, "the restore")
            (task,) = slow.app.runtime.tasks.values()
            assert task.view.restore is not None
            assert 0 < task.view.restore.start < task.view.restore.target
            assert task.view.restore.records < ROWS
            assert slow.counts(ROWS) == [1] * ROWS
        finally:
            hook.go.set()
            await starting
            await slow.app.stop()

    asyncio.run(scenario())


def test_a_restore_tells_how_far_and_how_fast_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small_steps(monkeypatch)
    monkeypatch.setattr(limits, "RESTORE_TELL_S", 0.0)
    caplog.set_level(logging.INFO, "streamproc.runtime.task")

    async def scenario() -> None:
        await filled(tmp_path)
        slow, hook = held_restore(tmp_path, EPOCHS // 2, web_enabled=True, web_port=free_port())
        starting = asyncio.create_task(slow.app.start())
        try:
            await hook.stuck.wait()
            (facts,) = Inspector(slow.app.runtime).tasks({})
            assert facts.phase == "starting"
            assert facts.restore is not None
            assert 0 < facts.restore.position < facts.restore.target
            assert 0 < facts.restore.records < ROWS
            async with client(slow.app) as asking:
                (shown,) = (await asking.get("/api/tasks")).json["tasks"]
            assert shown["restore"]["position"] == facts.restore.position
            assert shown["restore"]["target"] == facts.restore.target
            assert shown["restore"]["records_per_s"] > 0
            hook.go.set()
            await until(lambda: slow.position() == ROWS, "the restore")
            (facts,) = Inspector(slow.app.runtime).tasks({})
            assert facts.restore is None, "it is over"
        finally:
            hook.go.set()
            await starting
            await slow.app.stop()
        assert "task agents:0 restores test-counts-changelog: " in caplog.text
        assert "records/s" in caplog.text

    asyncio.run(scenario())


def test_a_restore_holds_no_more_than_a_step_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is written before the next is read, however long the changelog is."""
    small_steps(monkeypatch)
    rows: list[int] = []

    async def scenario() -> None:
        await filled(tmp_path)
        slow, _ = held_restore(tmp_path, -1)
        open_store: Callable[[Path], Any] = slow.app.open_store

        def watched(folder: Path) -> Any:
            store = open_store(folder)
            write_ = store.write

            def told(writes: Any, meta: Any) -> None:
                rows.append(len(writes.puts))
                write_(writes, meta)

            store.write = told
            return store

        slow.app.open_store = watched  # type: ignore[method-assign]
        async with running(slow.app):
            await until(lambda: slow.position() == ROWS, "the restore")
        assert sum(rows) >= ROWS
        assert max(rows) <= 2 * ROWS // EPOCHS

    asyncio.run(scenario())
