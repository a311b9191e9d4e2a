"""Per-record agents: their writes and sends are one with their positions, whatever their code does."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from streamproc.core import limits
from streamproc.core.errors import UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord
from tests.apps import log, new_app, read_all, running, until, write


def record(value: Any) -> OutRecord:
    return OutRecord(b"k", json.dumps(value).encode())


def table(app: Any, name: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for task in app.runtime.tasks.values():
        overlay = task.overlay(name)
        if overlay is not None:
            found.update(overlay.items())
    return found


def committed(app: Any, position: int) -> bool:
    """Partition 0 of the input is committed up to ``position``."""
    task = next(iter(app.runtime.tasks.values()), None)
    return bool(task and task.record and task.record.positions["count"].get("in:0", 0) >= position)


def test_sends_and_table_writes_of_an_epoch_are_committed_together_and_survive_a_restart(tmp_path: Path) -> None:
    def build() -> Any:
        app = new_app(tmp_path)
        source, out = app.topic("in", partitions=1), app.topic("out", partitions=1)
        counts = app.Table("counts", default=int)

        @app.agent(source, name="count")
        async def count(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1
                await out.send(key=word, value=counts[word])

        return app

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, record("ab"[i % 2])) for i in range(10)])
        async with running(app := build()):
            await until(lambda: committed(app, 10), "the first ten")
            assert table(app, "counts") == {"a": 5, "b": 5}
        await write(tmp_path, "in", 1, [(0, record("a"))])
        async with running(app := build()):
            await until(lambda: committed(app, 11), "one more")
            assert table(app, "counts") == {"a": 6, "b": 5}
            sent = [
                (key, json.loads(value or b"")) for _, key, value, _ in await read_all(app.runtime.transport, "out")
            ]
        assert sent == [(b"ab"[i % 2 : i % 2 + 1], i // 2 + 1) for i in range(10)] + [(b"a", 6)]

    asyncio.run(scenario())


def test_no_half_of_a_failed_record_stays_and_the_retry_counts_once(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    source, out = app.topic("in", partitions=1), app.topic("out", partitions=1)
    counts = app.Table("counts", default=int)
    tries: list[int] = []

    @app.agent(source, name="count")
    async def count(stream: Any) -> None:
        async for number in stream:
            counts["all"] += 1
            await out.send(key="k", value=number)
            if number == 7:
                tries.append(counts["all"])
                if len(tries) < 2:
                    raise RuntimeError("not this time")

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, record(i)) for i in range(20)])
        async with running(app):
            await until(lambda: committed(app, 20), "all twenty")
            assert table(app, "counts") == {"all": 20}
            sent = [json.loads(value or b"") for _, _, value, _ in await read_all(app.runtime.transport, "out")]
        assert sent == list(range(20))
        assert tries == [8, 8]

    asyncio.run(scenario())


def test_a_record_that_always_fails_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    source = app.topic("in", partitions=2)
    counts = app.Table("counts", default=int)
    tries: list[int] = []

    @app.agent(source, name="count")
    async def count(stream: Any) -> None:
        async for number in stream:
            counts[number % 2] += 1
            if number in (6, 13):
                tries.append(number)
                raise ValueError("secret 4711")

    async def scenario() -> None:
        await write(tmp_path, "in", 2, [(i % 2, record(i)) for i in range(20)])
        async with running(app):
            await until(lambda: sum(table(app, "counts").values()) == 18, "all but two")
            await until(lambda: committed(app, 10), "the positions")
            letters = await read_all(app.runtime.transport, "test-in-dead-letters")
        assert [(partition, value) for partition, _, value, _ in letters] == [(0, b"6"), (1, b"13")]
        assert [letter[3]["sp-offset"] for letter in letters] == [b"3", b"6"]
        reason = letters[0][3]["sp-reason"].decode()
        assert "count failed 3 times: ValueError at" in reason
        assert "4711" not in reason, "an exception's message may hold personal data"
        assert sorted(tries) == [6] * limits.RECORD_FAILURES_MAX + [13] * limits.RECORD_FAILURES_MAX

    asyncio.run(scenario())


def test_an_output_that_the_broker_refuses_costs_its_record_only(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    source, out = app.topic("in", partitions=1), app.topic("out", partitions=1)
    counts = app.Table("counts", default=int)
    noise = random.Random(1).randbytes(2_000_000).hex()

    @app.agent(source, name="count")
    async def count(stream: Any) -> None:
        async for number in stream:
            counts["all"] += 1
            await out.send(key="k", value=noise if number == 5 else "x")

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, record(i)) for i in range(12)])
        async with running(app):
            await until(lambda: committed(app, 12), "all twelve")
            assert table(app, "counts") == {"all": 11}
            assert len(await read_all(app.runtime.transport, "out")) == 11
            letters = await read_all(app.runtime.transport, "test-in-dead-letters")
        assert [value for _, _, value, _ in letters] == [b"5"]

    asyncio.run(scenario())


def test_a_commit_waits_for_the_record_in_hand_and_takes_nothing_after_it(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    source = app.topic("in", partitions=1)
    counts = app.Table("counts", default=int)

    @app.agent(source, name="count")
    async def count(stream: Any) -> None:
        async for _ in stream:
            before = counts["all"]
            await asyncio.sleep(0.03)
            counts["all"] = before + 1

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, record(i)) for i in range(30)])
        async with running(app):
            await until(lambda: committed(app, 30), "all thirty")
            assert next(iter(app.runtime.tasks.values())).view.commits > 5
            assert table(app, "counts") == {"all": 30}

    asyncio.run(scenario())


def test_values_that_are_not_json_are_dead_letters(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    source = app.topic("in", partitions=1)
    counts = app.Table("counts", default=int)

    @app.agent(source, name="count")
    async def count(stream: Any) -> None:
        async for _ in stream:
            counts["all"] += 1

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, record(1)), (0, OutRecord(None, b"{")), (0, record(2))])
        async with running(app):
            await until(lambda: committed(app, 3), "all three")
            assert table(app, "counts") == {"all": 2}
            assert [r[2] for r in await read_all(app.runtime.transport, "test-in-dead-letters")] == [b"{"]

    asyncio.run(scenario())


def test_a_table_is_not_written_outside_of_an_agent(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    counts = app.Table("counts", default=int)
    with pytest.raises(UserError, match=r"test_agents\.py:\d+: Table counts .*inside an agent"):
        counts["a"] += 1


def test_an_agent_that_returns_stops_the_worker_with_its_line(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    source = app.topic("in", partitions=1)

    @app.agent(source, name="count")
    async def count(stream: Any) -> None:
        return None

    async def scenario() -> None:
        async with log(tmp_path):
            pass
        await app.start()
        await until(lambda: app.crashed, "the crash")
        assert "Agent count returned" in str(app.crash_reason)
        assert "test_agents.py" in str(app.crash_reason)
        await app.stop()

    asyncio.run(scenario())


def test_what_faust_offers_and_we_do_not_yet_is_refused_by_name(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    with pytest.raises(UserError, match="windowed tables of the per-record API"):
        app.Table("w", default=int).tumbling(60)


def test_group_offsets_set_from_outside_stop_the_task_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "GROUP_OFFSETS_WAIT_S", 0.2)

    def build() -> Any:
        app = new_app(tmp_path)
        counts = app.Table("counts", default=int)

        @app.agent(app.topic("in", partitions=1), name="count")
        async def count(stream: Any) -> None:
            async for _ in stream:
                counts["all"] += 1

        return app

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, record(i)) for i in range(5)])
        async with running(app := build()):
            await until(lambda: committed(app, 5), "all five")
        async with log(tmp_path) as transport:
            outside = transport.producer("somebody")
            await outside.fence()
            await outside.send_offsets({TopicPartition("in", 0): Offset(2)}, "test")
            await outside.end(commit=True)
        await (app := build()).start()
        await until(lambda: app.crashed, "the refusal")
        assert "group test stands at offset 2 of in partition 0" in str(app.crash_reason)
        assert "streamproc reset" in str(app.crash_reason)
        await app.stop()

    asyncio.run(scenario())
