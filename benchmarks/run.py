"""One benchmark from its input to its line: log and sinks started, orders produced, worker measured, results compared."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal
from uuid import uuid4

import psutil

from benchmarks import oracle, results
from benchmarks.marks import TOPIC, Settings
from benchmarks.orders import PARTITIONS, Orders, orders
from benchmarks.worker import Measured, measure
from streamproc.core.clock import Clock, SystemClock
from streamproc.core.errors import UserError
from streamproc.core.types import TopicPartition
from streamproc.testing.kafka_server import KafkaServer
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis
from streamproc.transport.contract import OutRecord, TopicSpec, Transport

__all__ = ["COMMITS_MIN", "NAMES", "TRANSPORTS", "Log", "TooFewCommits", "open_log", "run"]

NAMES: Final = ("pipeline", "agent")
TRANSPORTS: Final = ("embedded", "kafka")
COMMITS_MIN: Final = 20
WARM_RECORDS: Final = 20_000
SEND_RECORDS: Final = 20_000
COMMIT_INTERVAL_S: Final = 0.25
"""Of a run of `FULL_RECORDS` and more; shorter ones commit more often, to commit as many times."""
FULL_RECORDS: Final = 2_000_000
COMMIT_INTERVAL_S_MIN: Final = 0.02
PACKAGES: Final = (
    "streamproc", "faust-streaming", "aiokafka", "polars", "numba", "numpy", "rocksdict", "fastavro", "asyncpg", "redis",
)  # fmt: skip


class TooFewCommits(UserError):
    """What does not commit is not exactly-once: such a run says nothing."""


@dataclass(frozen=True)
class Log:
    """A log that the worker is given by its URL and that is read from here while no worker holds it."""

    kind: str
    broker: str
    version: str

    @contextmanager
    def _opened(self) -> Iterator[None]:
        yield

    def open(self) -> Transport:
        if self.kind == "embedded":
            from streamproc.transport.embedded import EmbeddedTransport

            return EmbeddedTransport(Path(self.broker.removeprefix("embedded://")), SystemClock())
        from streamproc.transport.kafka import KafkaTransport

        return KafkaTransport(self.broker, SystemClock(), client_id="benchmarks")


@contextmanager
def open_log(kind: str, folder: Path) -> Iterator[Log]:
    """An empty log below ``folder``, or a Kafka that runs until the end of the block."""
    if kind == "embedded":
        import sqlite3

        path = folder / "log"
        path.mkdir()
        yield Log(kind, f"embedded://{path}", f"SQLite {sqlite3.sqlite_version}")
    else:
        with KafkaServer() as kafka:
            yield Log(kind, f"kafka://{kafka.bootstrap}", KAFKA_VERSION)
