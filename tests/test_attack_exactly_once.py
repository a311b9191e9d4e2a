"""Findings of an attack on what rebalances, standbys and catching up promise; each was broken once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamproc.commit.ledger import Ledger
from streamproc.core import limits
from streamproc.core.clock import SystemClock
from streamproc.core.errors import SinkUnavailable
from streamproc.core.types import TopicPartition
from streamproc.runtime.task import Phase
from streamproc.sinks.contract import SinkRows
from streamproc.testing.fake_sink import FakeSink, FakeWriter
from streamproc.testing.kafka_server import KafkaServer
from streamproc.transport.contract import TopicSpec
from streamproc.transport.kafka import KafkaTransport
from tests.apps import new_app, rows_of, running, until
from tests.contract.transport_kit import Member
from tests.test_overload import owner, summing
from tests.workers import T0, event, record

PARTITIONS = 4
SESSION_S = 30.0
"""Longer than a test waits: nothing here is mended by a session that runs out."""


# ---- static members that come back with other code


class Deployed:
    """One life of worker ``instance``, whose code reads ``topics``."""

    def __init__(self, kafka: KafkaServer, folder: Path, group: str, instance: str) -> None:
        self.transport = KafkaTransport(
            kafka.bootstrap, SystemClock(), client_id=f"process-{uuid.uuid4().hex[:6]}", instance_id=instance,
            assignor=new_app(folder, group, broker=f"kafka://{kafka.bootstrap}").assignor,
            session_timeout_s=SESSION_S, heartbeat_interval_s=0.5,
        )  # fmt: skip
        self.member, self.membership = Member(), self.transport.membership(group)

    async def join(self, topics: Collection[str]) -> None:
        await self.transport.start()
        await self.membership.start(topics, self.member.listener)

    async def leave(self) -> None:
        await self.membership.stop()
        await self.transport.stop()


class Deployment:
    """Two static workers of one group."""

    def __init__(self, kafka: KafkaServer, folder: Path) -> None:
        self.kafka, self.folder = kafka, folder
        self.group = f"group-{uuid.uuid4().hex}"
        self.workers: dict[str, Deployed] = {}

    async def roll_out(self, topics: Collection[str]) -> None:
        """Restart the workers one by one with code that reads ``topics``, each within its session."""
        for instance in ("a", "b"):
            if instance in self.workers:
                await self.workers.pop(instance).leave()
            self.workers[instance] = worker = Deployed(self.kafka, self.folder, self.group, instance)
            await worker.join(topics)
            await until(worker.member.holds, f"partitions of {instance}", 20)

    def shares(self, topic: str) -> list[int]:
        """How many partitions of ``topic`` each worker holds."""
        return sorted(sum(tp.topic == topic for tp in w.member.holds()) for w in self.workers.values())


@asynccontextmanager
async def deployed(kafka: KafkaServer, folder: Path, *topics: str) -> AsyncIterator[Deployment]:
    transport = KafkaTransport(kafka.bootstrap, SystemClock())
    await transport.start()
    await transport.create_topics([TopicSpec(topic, PARTITIONS) for topic in topics])
    await transport.stop()
    deployment = Deployment(kafka, folder)
    try:
        yield deployment
    finally:
        for worker in deployment.workers.values():
            await worker.leave()


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_static_workers_that_come_back_with_one_more_topic_to_read_share_it(kafka: KafkaServer, tmp_path: Path) -> None:
    old, new = (f"{name}-{uuid.uuid4().hex}" for name in ("old", "new"))

    async def scenario() -> None:
        async with deployed(kafka, tmp_path, old, new) as deployment:
            await deployment.roll_out([old])
            await until(lambda: deployment.shares(old) == [2, 2], "the group")
            await deployment.roll_out([old, new])
            await until(lambda: deployment.shares(old) == deployment.shares(new) == [2, 2], "both topics", 20)

    asyncio.run(scenario())


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_static_workers_that_come_back_with_one_topic_less_to_read_go_on(kafka: KafkaServer, tmp_path: Path) -> None:
    old, left = (f"{name}-{uuid.uuid4().hex}" for name in ("old", "left"))

    async def scenario() -> None:
        async with deployed(kafka, tmp_path, old, left) as deployment:
            await deployment.roll_out([old, left])
            await until(lambda: deployment.shares(old) == deployment.shares(left) == [2, 2], "the group")
            await deployment.roll_out([old])
            await until(lambda: deployment.shares(old) == [2, 2] and deployment.shares(left) == [0, 0], "the group", 20)
            assert all([await worker.membership.confirm() for worker in deployment.workers.values()])

    asyncio.run(scenario())


# ---- a sink that is caught up in pieces

COUNTRIES = [f"C{number}" for number in range(20)]
EPOCHS = 8


class Watched(FakeSink):
    """After each step it notes which counts its rows show: one, as every country has one record in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[set[Any]] = []
        self.fails_at: int | None = None
        """Steps with rows until it falls; it is up again at once."""

    def writer(self, shape: Any, app_id: str, partition: int) -> WatchedWriter:
        return WatchedWriter(self, shape, app_id, partition)


class WatchedWriter(FakeWriter):
    async def apply(self, rows: SinkRows | None, *, held: Ledger | None, moved: Ledger) -> None:
        sink = self._sink
        assert isinstance(sink, Watched)
        if rows is not None and sink.fails_at is not None:
            sink.fails_at -= 1
            if sink.fails_at == 0:
                sink.fails_at = None
                raise SinkUnavailable("fake has fallen.")
        await super().apply(rows, held=held, moved=moved)
        sink.shown.append({row["n"] for row in sink.rows["sums"].values()})


async def fall_behind(folder: Path, sink: FakeSink) -> None:
    """One epoch in the sink, then `EPOCHS` that it does not take before the worker is gone."""
    summing(app := new_app(folder), sink)
    async with running(app):
        await until(lambda: (task := owner(app)) and task.phase is Phase.RUNNING, "the owner")
        for epoch in range(1, EPOCHS + 1):
            sink.down = epoch > 1
            records = [record(event(folder, T0, country=country)) for country in COUNTRIES]
            await app.runtime.transport.send({TopicPartition("events", 0): records})
            await until(lambda: {row["n"] for row in rows_of(app, "sums")} == {epoch}, "the epoch")  # noqa: B023
            await until(lambda: sink.down or len(sink.rows["sums"]) == len(COUNTRIES), "the sink")


def test_a_sink_caught_up_in_pieces_shows_whole_epochs_and_goes_on_where_it_fell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SINK_CLOSE_S", 0.05)
    monkeypatch.setattr(limits, "SINK_CATCH_UP_BYTES_MAX", 300)

    async def scenario() -> None:
        sink = Watched()
        await fall_behind(tmp_path, sink)
        sink.down, sink.fails_at, sink.shown = False, 4, []
        summing(app := new_app(tmp_path), sink)
        async with running(app):
            await until(lambda: (task := owner(app)) and task.phase is Phase.RUNNING, "the catching up")
            assert sink.shown[-1] == {EPOCHS}
            assert all(len(counts) == 1 for counts in sink.shown), "half an epoch is seen"
            counts = [count for counts in sink.shown for count in counts]
            assert counts == sorted(counts), "a row went back to what it was"
            assert len(set(counts)) > 4, "it was in pieces"

    asyncio.run(scenario())
