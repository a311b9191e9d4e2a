"""What a simulated run found about the start of a task, one test each."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from streamproc.core.types import TopicPartition
from streamproc.transport.contract import OutRecord, TopicSpec
from tests.apps import log, new_app, running, until


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


COMPACTED = {
    "cleanup.policy": "compact",
    "delete.retention.ms": str(7 * 24 * 3600 * 1000),
    "max.message.bytes": str(8 << 20),
}
