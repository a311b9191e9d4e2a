"""What a user sees when something is wrong with a real Kafka: a missing or grown topic, outputs that it refuses, a broker
that dies and comes back."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

import streamproc as sp
from streamproc.app import App
from streamproc.core.clock import SystemClock
from streamproc.core.types import TopicPartition
from streamproc.runtime.task import Task
from streamproc.testing.kafka_server import KafkaServer
from streamproc.transport.contract import OutRecord, TopicSpec
from streamproc.transport.kafka import KafkaTransport
from tests.apps import new_app, read_all, rows_of, running, until
from tests.workers import (
    HEAD,
    HOUR,
    PLAN,
    T0,
    TOPIC,
    event,
    last_words,
    record,
    refusal,
    start_worker,
    stop_worker,
)

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]


@asynccontextmanager
async def wire(kafka: KafkaServer) -> AsyncIterator[KafkaTransport]:
    transport = KafkaTransport(kafka.bootstrap, SystemClock())
    await transport.start()
    try:
        yield transport
    finally:
        await transport.stop()


async def put(kafka: KafkaServer, topic: str, partitions: Sequence[Sequence[OutRecord]], **config: str) -> None:
    """Make ``topic`` and write its records, a list for each partition."""
    async with wire(kafka) as transport:
        await transport.create_topics([TopicSpec(topic, len(partitions), config)])
        for p, records in enumerate(partitions):
            for at in range(0, len(records), 2_000):
                await transport.send({TopicPartition(topic, p): records[at : at + 2_000]})


def kafka_app(kafka: KafkaServer, folder: Path, name: str) -> App:
    return new_app(folder, name, broker=f"kafka://{kafka.bootstrap}")


def counting(app: App, topic: str, **event_time: Any) -> None:
    settings = {"bounded": True} | event_time
    events = app.topic(topic, value_schema="event.avsc", event_time=sp.event_time("at", **settings))
    app.pipeline(events).group_by("country").window(sp.tumbling("1h")).agg(n=sp.count()).table("sums")


def test_a_missing_topic_ends_the_worker_within_seconds_with_the_way_to_make_it(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    code = (HEAD + TOPIC.replace("partitions=2, ", "") + PLAN).replace('"events"', '"nowhere"')
    told = last_words(tmp_path, code, 20.0, BROKER=f"kafka://{kafka.bootstrap}")
    assert "Topic nowhere does not exist." in told
    assert "kafka-topics.sh --create --topic nowhere" in told


def test_a_source_that_gained_partitions_between_two_runs_is_refused(tmp_path: Path, kafka: KafkaServer) -> None:
    async def scenario() -> None:
        await put(kafka, "grown", [[record(event(tmp_path))], [record(event(tmp_path))]])
        counting(first := kafka_app(kafka, tmp_path, "grows"), "grown", bounded=False)
        async with running(first):
            await until(lambda: sum(row["n"] for row in rows_of(first, "sums")) == 2, "both records")
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
        await admin.start()
        await admin.create_partitions({"grown": NewPartitions(3)})
        await admin.close()

        counts: list[int | None] = [2]

        async def look() -> None:
            async with wire(kafka) as transport:
                counts.append(await transport.partitions("grown"))

        while counts[-1] != 3:  # the broker's own view follows a moment later
            await look()
        counting(second := kafka_app(kafka, tmp_path, "grows"), "grown", bounded=False)
        told = await refusal(second)
        assert "grown had 2 partitions when grows first started and has 3 now" in told
        assert "streamproc reset" in told

    asyncio.run(scenario())


def test_a_broken_record_as_large_as_its_topic_takes_is_kept_whole(tmp_path: Path, kafka: KafkaServer) -> None:
    broken = b"\x07" + random.Random(1).randbytes(1_048_588 - 200)

    async def scenario() -> None:
        good = record(event(tmp_path))
        await put(kafka, "large", [[good, good]])
        await put(kafka, "large", [[record(broken)]])
        await put(kafka, "large", [[good]])
        counting(app := kafka_app(kafka, tmp_path, "largest"), "large")
        async with running(app):
            await until(app.runtime.finished, "the input's end")
            assert [row["n"] for row in rows_of(app, "sums")] == [3]
            letters = await read_all(app.runtime.transport, "largest-large-dead-letters")
        assert [value for _, _, value, _ in letters] == [broken]

    asyncio.run(scenario())


def test_an_output_that_the_broker_refuses_in_mid_epoch_costs_its_record_only(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    noise = random.Random(1).randbytes(50_000).hex()

    async def scenario() -> None:
        await put(kafka, "words", [[OutRecord(b"k", json.dumps(i).encode()) for i in range(40)]])
        await put(kafka, "narrow", [[]], **{"max.message.bytes": "20000"})
        app = kafka_app(kafka, tmp_path, "refused")
        words, narrow = app.topic("words"), app.topic("narrow")
        counts = app.Table("counts", default=int)

        @app.agent(words, name="count")
        async def count(stream: Any) -> None:
            async for number in stream:
                counts["all"] += 1
                await narrow.send(key="k", value=noise if number == 17 else number)

        def committed(task: Task) -> int | None:
            return task.committed_position(TopicPartition("words", 0))

        async with running(app):
            await until(lambda: [committed(task) for task in app.runtime.tasks.values()] == [40], "all forty")
            (task,) = app.runtime.tasks.values()
            assert dict(task.overlay("counts").items()) == {"all": 39}
            sent = [json.loads(value or b"") for _, _, value, _ in await read_all(app.runtime.transport, "narrow")]
            letters = await read_all(app.runtime.transport, "refused-words-dead-letters")
        assert sent == [i for i in range(40) if i != 17]
        assert [value for _, _, value, _ in letters] == [b"17"]
        assert b"17" in [headers["sp-offset"] for *_, headers in letters]

    asyncio.run(scenario())


COUNT = """
counts = app.Table("counts", default=int)
copies = app.topic("lost-copies", partitions=2)

@app.agent(events, name="count")
async def count(stream):
    async for event in stream:
        counts[event.country] += 1
        time.sleep(0.0003)
        pathlib.Path("first").touch()
        await copies.send(key=event.id, value=event.id)
"""


def test_a_broker_killed_under_load_and_back_again_loses_and_doubles_nothing(
    tmp_path: Path, kafka: KafkaServer
) -> None:
    rows = 4_000
    expected = sorted(f"{p}-{i}" for p in (0, 1) for i in range(rows))
    by_country = dict(collections.Counter("ABC"[i % 3] for i in range(rows) for _ in "01"))

    async def fill() -> None:
        parts = [
            [record(event(tmp_path, T0 + i, id=f"{p}-{i}", country="ABC"[i % 3]), T0 + HOUR) for i in range(rows)]
            for p in (0, 1)
        ]
        await put(kafka, "lost", parts)

    async def sent() -> list[str]:
        async with wire(kafka) as transport:
            return sorted(json.loads(value or b"") for *_, value, _ in await read_all(transport, "lost-copies"))

    asyncio.run(fill())
    code = (HEAD + TOPIC + PLAN + COUNT).replace('"events"', '"lost"').replace('"bad"', '"outage"')
    worker = start_worker(tmp_path, code, BROKER=f"kafka://{kafka.bootstrap}")
    out = tmp_path / "out"
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "first").exists():
            assert worker.poll() is None, out.read_text()
            assert time.monotonic() < end, out.read_text()
            time.sleep(0.05)
        for pause in (1.0, 4.0):
            kafka.kill()
            time.sleep(pause)
            kafka.start()
            time.sleep(0.5)
        end = time.monotonic() + 90
        while len(found := asyncio.run(sent())) < len(expected):
            assert worker.poll() is None, out.read_text()[-5000:]
            assert time.monotonic() < end, (len(found), out.read_text()[-5000:])
            time.sleep(1.0)
        assert found == expected
        assert "cannot be reached; trying again" in out.read_text()
        assert stop_worker(worker) == 0, out.read_text()[-5000:]
    finally:
        worker.kill()
    assert "Traceback" not in out.read_text()
    assert asyncio.run(sent()) == expected

    async def tables() -> tuple[dict[str, int], dict[str, int]]:
        app = kafka_app(kafka, tmp_path, "outage")
        events = app.topic("lost", value_schema="event.avsc", event_time=sp.event_time("at"))
        windowed = app.pipeline(events).group_by("country").window(sp.tumbling("1h"), allowed_lateness="1d")
        windowed.agg(n=sp.count()).table("sums")
        app.Table("counts", default=int)

        @app.agent(events, name="count")
        async def count(stream: Any) -> None:
            async for _ in stream:
                pass

        async with running(app):
            await until(lambda: sum(row["n"] for row in rows_of(app, "sums")) >= 2 * rows, "the restored tables")
            by_agent: collections.Counter[str] = collections.Counter()
            for task in app.runtime.tasks.values():
                if task.id.group == "agents":
                    by_agent.update(dict(task.overlay("counts").items()))
            return dict(by_agent), {row["country"]: row["n"] for row in rows_of(app, "sums")}

    assert asyncio.run(tables()) == (by_country, by_country)
