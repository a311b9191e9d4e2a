"""Running an app in the test's own process, on the embedded transport."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from streamproc.app import App
from streamproc.core.batch import RawBatch
from streamproc.core.clock import SystemClock
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord, TopicSpec, Transport
from streamproc.transport.embedded import EmbeddedTransport

__all__ = ["events_avsc", "new_app", "read_all", "read_batches", "rows_of", "running", "until", "write"]

EVENT = {
    "type": "record",
    "name": "Event",
    "fields": [
        {"name": "id", "type": ["null", "string"]},
        {"name": "country", "type": "string"},
        {"name": "amount", "type": "double"},
        {"name": "at", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}]},
    ],
}


def events_avsc(folder: Path) -> Path:
    """A schema folder with `EVENT` as id 1."""
    schemas = folder / "schemas"
    schemas.mkdir(exist_ok=True)
    (schemas / "event.avsc").write_text(json.dumps(EVENT))
    (schemas / "ids.json").write_text('{"1": "event.avsc"}')
    return schemas


def new_app(folder: Path, name: str = "test", **options: Any) -> App:
    """An app with its log and its state under ``folder``, without a web server, committing every 50 ms."""
    settings: dict[str, Any] = {
        "broker": f"embedded://{folder}/log",
        "schemas": events_avsc(folder),
        "commit_interval": "50ms",
        "web_enabled": False,
        "datadir": folder / "state",
        "topic_disable_leader": True,
    }
    return App(name, **{**settings, **options})


@asynccontextmanager
async def running(app: App) -> AsyncIterator[App]:
    """The app, started; stopped (as by SIGTERM) on leaving."""
    await app.start()
    try:
        yield app
    finally:
        await app.stop()


async def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait for ``condition``; the failure says ``what`` was waited for."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s for: {what}")
        await asyncio.sleep(0.01)


@asynccontextmanager
async def log(folder: Path) -> AsyncIterator[Transport]:
    """The log of `new_app(folder)` while the app does not run."""
    transport = EmbeddedTransport(folder / "log", SystemClock())
    await transport.start()
    try:
        yield transport
    finally:
        await transport.stop()


async def write(
    folder: Path, topic: str, partitions: int, records: Sequence[tuple[int, OutRecord]], config: Any = None
) -> None:
    """Make ``topic`` and write (partition, record) pairs in order."""
    async with log(folder) as transport:
        await transport.create_topics([TopicSpec(topic, partitions, config or {})])
        for partition, record in records:
            await transport.send({TopicPartition(topic, partition): [record]})


async def read_all(transport: Transport, topic: str) -> list[tuple[int, bytes | None, bytes | None, dict[str, Any]]]:
    """Every committed record: (partition, key, value, headers), by partition in offset order."""
    found = []
    async for partition, batch in read_batches(transport, topic):
        found += [(partition, batch.key(row), batch.value(row), dict(batch.headers(row))) for row in range(len(batch))]
    return found


async def read_batches(transport: Transport, topic: str) -> AsyncIterator[tuple[int, RawBatch]]:
    """Every committed batch with its partition, by partition in offset order."""
    for partition in range(await transport.partitions(topic) or 0):
        tp = TopicPartition(topic, partition)
        ends = (await transport.offsets([tp]))[tp]
        async for batch in transport.read(tp, Offset(ends.begin), ends.stable):
            yield partition, batch


def rows_of(app: App, table: str) -> list[dict[str, Any]]:
    """The committed rows of a pipeline's table in this worker."""
    rows: list[dict[str, Any]] = []
    for task in app.runtime.tasks.values():
        if task.id.group == f"table-{table}" and task.work is not None:
            frame = task.work.results(task.overlay(table).scan(b"", None))
            rows += frame.filter("__visible").drop("__state", "__epoch", "__visible").to_dicts()
    return rows
