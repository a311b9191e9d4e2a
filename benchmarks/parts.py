"""What runs are made of: a folder, a log, the sinks' servers."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import msgspec

from benchmarks.marks import Settings
from benchmarks.orders import PARTITIONS, Orders
from streamproc.core.clock import SystemClock
from streamproc.core.types import TopicPartition
from streamproc.testing import kafka_server
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis
from streamproc.transport.contract import OutRecord, TopicSpec, Transport

__all__ = [
    "FULL_RECORDS", "TRANSPORTS", "Log", "Say", "kafka_version", "started_log", "started_sinks", "temporary_folder",
]  # fmt: skip

TRANSPORTS: Final = ("embedded", "kafka")
FULL_RECORDS: Final = 2_000_000
"""Of a run that is not told otherwise."""
SEND_RECORDS: Final = 20_000
Say = Callable[[str], None]
"""Is told what a run does at the moment, for a person who waits."""


@dataclass(frozen=True)
class Log:
    """A log that the worker is given by its URL, and that is written and read here while no worker holds it."""

    broker: str
    version: dict[str, str]

    def open(self) -> Transport:
        scheme, _, rest = self.broker.partition("://")
        # Imported here, so that neither needs the other's libraries.
        if scheme == "embedded":
            from streamproc.transport.embedded import EmbeddedTransport

            return EmbeddedTransport(Path(rest), SystemClock())
        from streamproc.transport.kafka import KafkaTransport

        return KafkaTransport(rest, SystemClock(), client_id="benchmarks")

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Transport]:
        """A transport of this process, stopped with the block. An embedded log is held by nobody else meanwhile."""
        transport = self.open()
        await transport.start()
        try:
            yield transport
        finally:
            await transport.stop()

    async def make_topic(self, topic: str, partitions: int = PARTITIONS, **config: str) -> None:
        """For orders: old event times are no reason for a broker to drop anything. ``config``: settings beside that one, with
        ``_`` for the dots in their names."""
        more = {name.replace("_", "."): value for name, value in config.items()}
        async with self.started() as transport:
            await transport.create_topics([TopicSpec(topic, partitions, {"retention.ms": "-1", **more})])

    async def produce(self, topic: str, input_: Orders, partitions: int = PARTITIONS) -> None:
        """Make ``topic`` and put every order into it."""
        await self.make_topic(topic, partitions)
        async with self.started() as transport:
            for part in input_.slices(SEND_RECORDS):
                await transport.send(
                    {
                        TopicPartition(topic, partition): [OutRecord(key, value) for key, value in records]
                        for partition, records in part.items()
                    }
                )


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder; passable, since Postgres may run as another user below it."""
    folder = Path(tempfile.mkdtemp(prefix="streamproc-benchmark-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started_log(kind: str, folder: Path) -> Iterator[Log]:
    """An empty log below ``folder``, or a Kafka that runs until the end of the block."""
    if kind == "embedded":
        (folder / "log").mkdir()
        yield Log(f"embedded://{folder / 'log'}", {"sqlite": sqlite3.sqlite_version})
        return
    with kafka_server.KafkaServer() as kafka:
        yield Log(f"kafka://{kafka.bootstrap}", {"kafka": kafka_version()})


@contextmanager
def started_sinks(told: Settings, folder: Path) -> Iterator[Settings]:
    """An empty Redis and an empty Postgres of the run's own."""
    redis, postgres = EmbeddedRedis(folder / "redis"), EmbeddedPostgres(folder / "postgres")
    try:
        redis.start()
        postgres.start()
        yield msgspec.structs.replace(told, redis=redis.url, postgres=postgres.dsn)
    finally:
        redis.stop()
        postgres.stop()


def kafka_version() -> str:
    """Of the broker that `started_log` starts."""
    if os.environ.get("KAFKA_BOOTSTRAP"):
        return "KAFKA_BOOTSTRAP"
    pom = ElementTree.parse(Path(kafka_server.__file__).parent / "kafka" / "pom.xml")
    space = "{http://maven.apache.org/POM/4.0.0}"
    found = [dependency.findtext(f"{space}version") for dependency in pom.iter(f"{space}dependency")]
    return found[0] or "unknown"
