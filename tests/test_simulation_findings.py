"""What simulated runs found, one test each, with the cause."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from streamproc.core import limits
from streamproc.core.errors import LogLost, ProducerFenced
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime.task import Phase
from streamproc.transport.contract import OutRecord, TopicSpec
from tests.apps import log, new_app, running, until
from tests.test_attack_runtime import FaultyTransport


def test_a_transaction_given_up_in_a_changelog_before_the_first_commit_does_not_stop_the_task(tmp_path: Path) -> None:
    """It leaves offsets and no record. Counted as records of a lost commit record they stopped the worker with `LogLost`,
    for good (simulation seed 12 of its time: a hanging transaction, then a crash before the first commit)."""

    async def scenario() -> None:
        async with log(tmp_path) as transport:
            await transport.create_topics([TopicSpec("test-counts-changelog", 1, COMPACTED)])
            producer = transport.producer("somebody")
            await producer.fence()
            await producer.produce({TopicPartition("test-counts-changelog", 0): [OutRecord(b"key", b"value")]})
            await producer.end(commit=False)
        app = new_app(tmp_path)
        counts = app.Table("counts", default=int)

        @app.agent(app.topic("words", partitions=1))
        async def count(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1

        async with running(app):
            await app.topic("words").send(value="a")
            await until(lambda: counts.committed("a") == 1, "the record")
            assert not app.crashed

    asyncio.run(scenario())


@pytest.mark.parametrize("still_a_member", [False, True])
def test_a_lost_log_stops_a_worker_only_if_the_log_is_still_its_own(tmp_path: Path, still_a_member: bool) -> None:
    """A zombie that wakes up asks for records that the new owner of its task has worked off and trimmed. It stopped with
    `LogLost` and told its user to reset the application (found by `simulate` on the app of docs/testing-your-agents.md)."""
    app, told = new_app(tmp_path), list[str]()

    async def confirm() -> bool:
        return still_a_member

    async def hook(call: str) -> None:
        if call == "get" and len(told) < 2 and app.runtime.ready.is_set():
            told.append(call)
            app.runtime._member().confirm = confirm  # type: ignore[method-assign]
            raise LogLost("Position 1 of words[0] is out of range.")

    async def scenario() -> None:
        make = app.make_transport
        app.make_transport = lambda: FaultyTransport(make(), hook)  # type: ignore[method-assign, assignment, return-value]
        counts = app.Table("counts", default=int)

        @app.agent(app.topic("words", partitions=1))
        async def count(stream: Any) -> None:
            async for word in stream:
                counts[word] += 1

        async with running(app):
            await app.topic("words").send(value="a")
            if still_a_member:
                await until(lambda: app.crashed, "the end")
                assert isinstance(app.crash_reason, LogLost)
            else:
                await until(lambda: counts.committed("a") == 1 and len(told) == 2, "the record and the second refusal")
                assert not app.crashed

    with contextlib.ExitStack() as until_then:
        if not still_a_member:
            until_then.callback(setattr, limits, "RETRY_BACKOFF_S_MAX", limits.RETRY_BACKOFF_S_MAX)
            limits.RETRY_BACKOFF_S_MAX = 0.05  # type: ignore[misc]
        asyncio.run(scenario())


def test_a_start_that_was_overtaken_does_not_take_the_next_owner_s_commits_for_a_mistake(tmp_path: Path) -> None:
    """It had read the commit record, stood still, and found the group's offsets further on: "somebody has set the group's
    offsets", and the worker stopped (seed 185 of its time: a pause in the middle of a start)."""
    app = new_app(tmp_path)
    words = app.topic("words", partitions=1)
    counts = app.Table("counts", default=int)

    @app.agent(words)
    async def count(stream: Any) -> None:
        async for word in stream:
            counts[word] += 1

    async def set_offset(transport: Any, at: int) -> None:
        producer = transport.producer("the next owner")
        await producer.fence()
        await producer.send_offsets({TopicPartition("words", 0): Offset(at)}, "test")
        await producer.end(commit=True)

    async def scenario() -> None:
        asked: list[int] = []
        async with running(app):
            await words.send(value="a")
            await until(lambda: counts.committed("a") == 1, "the record")
            membership, (task,) = app.runtime._member(), app.runtime.tasks.values()
            real = membership.confirm

            async def confirm() -> bool:
                asked.append(len(asked))
                if len(asked) != 2:
                    return await real()
                await set_offset(app.runtime.transport, 1)  # and there it is: nobody's mistake
                return False

            membership.confirm = confirm  # type: ignore[method-assign]
            await set_offset(app.runtime.transport, 7)
            restarts = task.view.restarts
            assert task.work is not None
            task.work.failure = ProducerFenced("the test wants a start")
            task._wake.set()
            await until(lambda: task.view.restarts > restarts + 1 and task.phase is Phase.RUNNING, "two more starts")
            assert not app.crashed

    limits_before = limits.GROUP_OFFSETS_WAIT_S
    limits.GROUP_OFFSETS_WAIT_S = 0.1  # type: ignore[misc]
    try:
        asyncio.run(scenario())
    finally:
        limits.GROUP_OFFSETS_WAIT_S = limits_before  # type: ignore[misc]


COMPACTED = {
    "cleanup.policy": "compact",
    "delete.retention.ms": str(7 * 24 * 3600 * 1000),
    "max.message.bytes": str(8 << 20),
}
