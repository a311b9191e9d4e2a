"""What was lost outside of the log comes back from it: local state, a sink's rows, a sink's ledger."""

from __future__ import annotations

import asyncio
import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from demo.compare import compare_table, read_postgres, read_redis
from demo.data import Feed, make_feed
from demo.feed import write_feed
from demo.oracle import Expected, expect
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis
from tests.apps import log, rows_of, running, until

pytestmark = [pytest.mark.server]

TABLES = ("hourly", "daily")


@pytest.fixture(scope="module")
def job() -> tuple[Feed, Expected]:
    feed = make_feed(12)
    return feed, expect(feed.injections)


@pytest.fixture
def servers(emptied: tuple[EmbeddedPostgres, EmbeddedRedis]) -> tuple[EmbeddedPostgres, EmbeddedRedis]:
    return emptied


def flights(folder: Path, servers: tuple[EmbeddedPostgres, EmbeddedRedis], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The main job's app, fresh, as a new worker would have it."""
    postgres, redis = servers
    monkeypatch.setenv("STREAMPROC_BROKER", f"embedded://{folder}/log")
    monkeypatch.setenv("STREAMPROC_POSTGRES", postgres.dsn)
    monkeypatch.setenv("STREAMPROC_REDIS", redis.url)
    app = importlib.reload(importlib.import_module("agents.flights")).app
    app.conf.web_enabled = False
    app.conf.datadir = folder / "state"
    app.commit_interval_s = 0.1
    return app


async def differences(app: Any, servers: tuple[EmbeddedPostgres, EmbeddedRedis], expected: Expected) -> list[str]:
    postgres, redis = servers
    found = []
    for name in TABLES:
        want = expected.tables[name]
        found += [f"state: {text}" for text in compare_table(name, want, rows_of(app, name))]
        found += [f"postgres: {text}" for text in compare_table(name, want, await read_postgres(postgres.dsn, name))]
        found += [f"redis: {text}" for text in compare_table(name, want, await read_redis(redis.url, name))]
    return found


async def run_until_done(app: Any, servers: Any, expected: Expected) -> None:
    async with running(app):
        await until(app.runtime.finished, "the job to be done")
        assert await differences(app, servers, expected) == []


def test_local_state_that_was_wiped_is_restored_from_the_changelog(
    tmp_path: Path, job: Any, servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, expected = job

    async def scenario() -> None:
        async with log(tmp_path) as transport:
            await write_feed(feed, transport, quiet=True)
        await run_until_done(flights(tmp_path, servers, monkeypatch), servers, expected)
        shutil.rmtree(tmp_path / "state")
        await run_until_done(flights(tmp_path, servers, monkeypatch), servers, expected)

    asyncio.run(scenario())


def test_an_emptied_sink_is_filled_from_the_state(
    tmp_path: Path, job: Any, servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, expected = job

    async def empty_both() -> None:
        import asyncpg
        from redis.asyncio import Redis

        postgres, redis = servers
        connection = await asyncpg.connect(postgres.dsn)
        await connection.execute("drop table hourly, daily, streamproc_ledger")
        await connection.close()
        client = Redis.from_url(redis.url)
        await client.flushall()
        await client.aclose()

    async def scenario() -> None:
        async with log(tmp_path) as transport:
            await write_feed(feed, transport, quiet=True)
        await run_until_done(flights(tmp_path, servers, monkeypatch), servers, expected)
        await empty_both()
        await run_until_done(flights(tmp_path, servers, monkeypatch), servers, expected)

    asyncio.run(scenario())


def test_a_sink_rolled_back_to_an_older_copy_is_caught_up_from_the_changelog(
    tmp_path: Path, job: Any, servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup of Postgres made in the middle of the run comes back while no worker runs."""
    feed, expected = job

    async def copy(source: str, target: str) -> None:
        import asyncpg

        connection = await asyncpg.connect(servers[0].dsn)
        await connection.execute(f"create schema {target}")
        async with connection.transaction(isolation="repeatable_read"):
            for table in (*TABLES, "streamproc_ledger"):
                await connection.execute(f"create table {target}.{table} as table {source}.{table}")
        await connection.close()

    async def bring_back() -> None:
        import asyncpg

        connection = await asyncpg.connect(servers[0].dsn)
        for table in (*TABLES, "streamproc_ledger"):
            await connection.execute(f"truncate public.{table}")
            await connection.execute(f"insert into public.{table} select * from backup.{table}")
        await connection.close()

    async def scenario() -> None:
        async with log(tmp_path) as transport:
            await write_feed(feed, transport, quiet=True)
        app = flights(tmp_path, servers, monkeypatch)
        async with running(app):
            await until(lambda: app.runtime.counts().get("flights", 0) > 1_000, "the run to be under way")
            owners = [task for task in app.runtime.tasks.values() if task.id.group.startswith("table-")]
            await until(lambda: all(task.feeds for task in owners), "the sinks to be claimed")
            await asyncio.sleep(0.3)
            await copy("public", "backup")
            await until(app.runtime.finished, "the job to be done")
        await bring_back()
        await run_until_done(flights(tmp_path, servers, monkeypatch), servers, expected)

    asyncio.run(scenario())
