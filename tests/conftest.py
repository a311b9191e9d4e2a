"""What a machine lacks is skipped with one loud line at the end; under ``CI=true`` it is an error."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from streamproc.runtime.warm import warm_up
from streamproc.testing.kafka_server import KafkaServer
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis

settings.register_profile("here", deadline=None)  # two processes and their servers share the machine
settings.load_profile("here")

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def _kafka() -> str | None:
    if os.environ.get("KAFKA_BOOTSTRAP"):
        return None
    missing = [tool for tool in ("java", "mvn") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found" if missing else None


def _browser() -> str | None:
    return None if any(shutil.which(name) for name in CHROMIUM) else "Chromium not found"


SLOW_FILES = {
    "test_attack_runtime.py",
    "test_bad_input.py",
    "test_cli.py",
    "test_demo.py",
    "test_docs.py",
    "test_faust_keeps_working.py",
    "test_flights_data.py",
    "test_law.py",
    "test_oracle.py",
    "test_totals.py",
    "test_web_api.py",
    "test_web_security.py",
    "test_web_workers.py",
}
"""Whole apps, worker processes or the full year of flights: not part of test-fast."""
NEEDS: dict[str, Callable[[], str | None]] = {"kafka": _kafka, "browser": _browser}
_lacking: dict[str, tuple[str, int]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """With ``-n``: compile once, before there are several processes that would."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        warm_up(pipelines=True)


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.path.name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    for marker, reason in ((marker, find()) for marker, find in NEEDS.items()):
        if reason is None:
            continue
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked:
            _lacking[marker] = (reason, len(marked))
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_deselected(items: Iterable[pytest.Item]) -> None:
    """Tests that were not asked for are not missed."""
    for marker in list(_lacking):
        reason, count = _lacking[marker]
        gone = sum(1 for item in items if item.get_closest_marker(marker))
        if count - gone > 0:
            _lacking[marker] = (reason, count - gone)
        else:
            del _lacking[marker]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """With ``-n`` each process collects all tests, and only the one that speaks here can say what none of them ran."""
    _lacking.update(getattr(node, "workeroutput", {}).get("lacking", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, (reason, count) in _lacking.items():
        terminalreporter.write_line(f"NOT RUN: {count} {marker} tests, because {reason}.", red=True, bold=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["lacking"] = _lacking
    if _lacking and os.environ.get("CI") == "true":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# --- servers, started once, when the first test asks for one; a test that kills one leaves it running or not


@pytest.fixture(scope="session")
def _kafka_server() -> Iterator[KafkaServer]:
    with KafkaServer() as server:
        yield server


@pytest.fixture
def kafka(_kafka_server: KafkaServer) -> KafkaServer:
    """The broker that all tests share: topics, groups and transactional ids are to have names of their own."""
    _kafka_server.start()
    return _kafka_server


@pytest.fixture
def mortal(kafka: KafkaServer) -> KafkaServer:
    """The same, for a test that kills or pauses it, or that stands between it and its clients."""
    if os.environ.get("KAFKA_BOOTSTRAP"):
        pytest.skip("KAFKA_BOOTSTRAP is set: somebody else's broker is left alone")
    return kafka


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    # Not in pytest's own folder: each pytest run closes that to other users, and Postgres, if started by root, is one.
    with tempfile.TemporaryDirectory(prefix="streamproc-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def _postgres_server(server_folder: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(server_folder / "postgres").start()
    yield server
    server.stop()


@pytest.fixture
def postgres(_postgres_server: EmbeddedPostgres) -> EmbeddedPostgres:
    """Shared: tables and applications are to have names of their own."""
    return _postgres_server.start()


@pytest.fixture(scope="session")
def _redis_server(server_folder: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(server_folder / "redis").start()
    yield server
    server.stop()


@pytest.fixture
def redis(_redis_server: EmbeddedRedis) -> EmbeddedRedis:
    """Shared: tables are to have names of their own."""
    return _redis_server.start()


@pytest.fixture
def emptied(postgres: EmbeddedPostgres, redis: EmbeddedRedis) -> tuple[EmbeddedPostgres, EmbeddedRedis]:
    """Both, with nothing in them: for jobs whose tables have names that others use too."""
    import asyncpg
    from redis.asyncio import Redis

    async def clear() -> None:
        connection = await asyncpg.connect(postgres.dsn)
        await connection.execute("DROP SCHEMA IF EXISTS public, backup CASCADE; CREATE SCHEMA public")
        await connection.close()
        client = Redis.from_url(redis.url)
        await client.flushall()
        await client.aclose()

    asyncio.run(clear())
    return postgres, redis
