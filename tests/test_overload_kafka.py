"""Overload on a real Kafka: a broker that is slow or stands still, and messages larger than a topic takes."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

import streamproc as sp
from streamproc.app import App
from streamproc.core import limits
from streamproc.core.errors import ProduceRefused
from streamproc.core.types import TopicPartition
from streamproc.runtime.inspect import Inspector
from streamproc.testing.kafka_server import KafkaServer
from streamproc.transport.contract import OutRecord
from tests.apps import read_all, running, until
from tests.test_bad_input_kafka import kafka_app, put, wire
from tests.test_overload import CPU_SHARE_MAX, number
from tests.workers import HOUR, T0, event, record, refusal

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def kafka() -> Iterator[KafkaServer]:
    with KafkaServer() as server:
        yield server


def copying(app: App, topic: str, copies: str) -> None:
    """Agent ``copy`` counts in a table and sends on, 20 KB a record."""
    counts, out = app.Table("counts", default=int), app.topic(copies, partitions=1)
    noise = random.Random(1).randbytes(10_000).hex()

    @app.agent(app.topic(topic, partitions=1), name="copy")
    async def copy(stream: Any) -> None:
        async for value in stream:
            counts["all"] += 1
            await out.send(key="k", value=f"{value} {noise}")


def at(app: App, topic: str) -> int:
    tasks = list(app.runtime.tasks.values())
    return int(tasks[0].committed_position(TopicPartition(topic, 0)) or 0) if tasks else 0


async def copied(kafka: KafkaServer, copies: str) -> list[int]:
    async with wire(kafka) as transport:
        return [int(json.loads(value or b"").split()[0]) for *_, value, _ in await read_all(transport, copies)]


def test_a_slow_broker_makes_epochs_wait_in_bounded_memory_and_nothing_is_lost(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    """It runs a fifth of the time, while 40 MB are on their way through it."""
    rows = 2_000

    async def slow() -> None:
        while True:
            kafka.pause()
            await asyncio.sleep(0.4)
            kafka.go_on()
            await asyncio.sleep(0.1)

    async def scenario() -> None:
        await put(kafka, "slow", [[number(i) for i in range(rows)]])
        copying(app := kafka_app(kafka, tmp_path, "slowly"), "slow", "slow-copies")
        async with running(app):
            await until(lambda: at(app, "slow") > 0, "the first commit")
            before, most = psutil.Process().memory_info().rss, 0
            slowing = asyncio.ensure_future(slow())
            try:
                for _ in range(100):
                    most = max(most, psutil.Process().memory_info().rss)
                    await asyncio.sleep(0.1)
            finally:
                slowing.cancel()
                await asyncio.gather(slowing, return_exceptions=True)
                kafka.go_on()
            await until(lambda: at(app, "slow") == rows, "all of them", 90)
            assert app.runtime.committed("counts", "all") == rows
            assert (most - before) / 1e6 < 6 * limits.EPOCH_BYTES_MAX / 1e6
            await until(lambda: not any(task.view.problem for task in app.runtime.tasks.values()), "no problem")
        assert await copied(kafka, "slow-copies") == list(range(rows))

    asyncio.run(scenario())


def test_a_broker_that_stands_still_is_waited_for_in_sight_without_spin_or_loss(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    rows = 600

    async def scenario() -> None:
        await put(kafka, "still", [[number(i) for i in range(rows)]])
        copying(app := kafka_app(kafka, tmp_path, "standstill"), "still", "still-copies")
        async with running(app):
            await until(lambda: at(app, "still") == rows, "the first part")
            async with wire(kafka) as transport:
                await transport.send({TopicPartition("still", 0): [number(i) for i in range(rows, 2 * rows)]})
            await until(
                lambda: at(app, "still") > rows or any(t.work and t.work.dirty for t in app.runtime.tasks.values()),
                "more",
            )
            kafka.pause()
            try:

                def problems() -> list[str]:
                    return [facts.problem for facts in Inspector(app.runtime).tasks({}) if facts.problem]

                began, cpu = time.monotonic(), time.process_time()
                await until(problems, "the outage to show", 60)
                share = (time.process_time() - cpu) / (time.monotonic() - began)
                print(f"the outage showed after {time.monotonic() - began:.1f} s: {problems()}; CPU share {share:.2f}")
                assert share < CPU_SHARE_MAX
                cpu = time.process_time()
                await asyncio.sleep(4.0)
                assert (time.process_time() - cpu) / 4.0 < CPU_SHARE_MAX
            finally:
                kafka.go_on()
            await until(lambda: at(app, "still") == 2 * rows, "all of them", 90)
            await until(lambda: not problems(), "the problem to be over")
            assert app.runtime.committed("counts", "all") == 2 * rows
        assert await copied(kafka, "still-copies") == list(range(2 * rows))

    asyncio.run(scenario())


def test_a_late_topic_that_takes_no_large_records_stops_the_worker_and_says_what_to_raise(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    async def scenario() -> None:
        large = event(tmp_path, T0 - 9 * HOUR, country=random.Random(1).randbytes(20_000).hex())
        await put(kafka, "tardy", [[record(event(tmp_path)), record(large), record(event(tmp_path))]])
        await put(kafka, "tardy-late", [[]], **{"max.message.bytes": "10000"})
        app = kafka_app(kafka, tmp_path, "tardily")
        events = app.topic("tardy", value_schema="event.avsc", event_time=sp.event_time("at", bounded=True))
        app.pipeline(events).group_by("country").window(sp.tumbling("1h")).agg(n=sp.count()).table("sums")
        app.declaration.tables[0].late.to("tardy-late")
        told = await refusal(app)
        assert "refused what task read-tardy:0 writes to tardy-late" in told
        assert "Raise max.message.bytes of that topic" in told
        async with wire(kafka) as transport:
            assert await read_all(transport, "tardily-sums-changelog") == [], "no half of the epoch"

    asyncio.run(scenario())


def test_a_poison_record_too_large_for_the_dead_letters_stops_the_worker_in_front_of_it(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    async def scenario() -> None:
        large = json.dumps(random.Random(1).randbytes(limits.INTERNAL_MESSAGE_BYTES_MAX * 5 // 8).hex()).encode()
        rows = [number(1), OutRecord(b"k", large), number(2)]
        await put(kafka, "huge", [rows], **{"max.message.bytes": str(4 * limits.INTERNAL_MESSAGE_BYTES_MAX)})

        def build() -> App:
            app = kafka_app(kafka, tmp_path, "hugely")
            counts = app.Table("counts", default=int)

            @app.agent(app.topic("huge"), name="count")
            async def count(stream: Any) -> None:
                async for value in stream:
                    counts["all"] += 1
                    if isinstance(value, str):
                        raise ValueError

            return app

        await (app := build()).start()
        await until(lambda: app.crashed, "the stop", 60)
        assert "writes to hugely-huge-dead-letters" in str(app.crash_reason)
        assert "Raise max.message.bytes of that topic" in str(app.crash_reason)
        await app.stop()
        async with wire(kafka) as transport:
            ends = await transport.group_offsets("hugely", [TopicPartition("huge", 0)])
            assert ends[TopicPartition("huge", 0)] == 1, "neither skipped nor lost"

        # What the message says helps: the limit is raised, and the record is set aside.
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
        await admin.start()
        raised = {"max.message.bytes": str(4 * limits.INTERNAL_MESSAGE_BYTES_MAX), "retention.ms": "-1"}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, "hugely-huge-dead-letters", raised)])
        await admin.close()
        async with running(app := build()):
            await until(lambda: app.crashed or at(app, "huge") == 3, "the end", 60)
            assert not app.crashed, app.crash_reason
            assert app.runtime.committed("counts", "all") == 2
            (letter,) = await read_all(app.runtime.transport, "hugely-huge-dead-letters")
            assert letter[2] == large

    asyncio.run(scenario())


def test_a_send_outside_of_an_agent_that_is_too_large_is_refused_to_its_caller_only(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    async def scenario() -> None:
        await put(kafka, "small", [[]], **{"max.message.bytes": "10000"})
        app = kafka_app(kafka, tmp_path, "outside")
        small, counts = app.topic("small"), app.Table("counts", default=int)

        @app.agent(small, name="count")
        async def count(stream: Any) -> None:
            async for _ in stream:
                counts["all"] += 1

        async with running(app):
            with pytest.raises(ProduceRefused, match="small"):
                await small.send(key="k", value=random.Random(1).randbytes(20_000).hex())
            await small.send(key="k", value="x")
            await until(lambda: app.runtime.committed("counts", "all") == 1, "the small one")
            assert not app.crashed

    asyncio.run(scenario())
