"""A worker of the benchmark ``unavailability``: it counts how often each key came, in rows of some size.

    faust -A benchmarks.unavailability_job worker

It says in the file ``status.json`` of its folder which tasks it has and how warm its standbys are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import msgspec

import streamproc as sp

__all__ = ["PARTITIONS", "STATUS", "TABLE", "Held", "Settings", "Status", "Warm", "app"]

PARTITIONS: Final = 2
"""A task for each of two workers."""
TABLE: Final = "seen"
STATUS: Final = "status.json"
SAY_S: Final = 0.1
_PAD: Final = "x" * 80
"""Beside the count in each row: what a row of somebody's table may well hold."""
_VARIABLE: Final = "STREAMPROC_BENCHMARK"


class Settings(msgspec.Struct, frozen=True):
    """What one worker is run with."""

    broker: str = "embedded://data/benchmarks"
    folder: str = "data/benchmarks"
    app_id: str = "benchmark"
    topic: str = "records"
    commit_interval_s: float = 0.2
    standby_replicas: int = 0
    instance_id: str | None = None
    session_timeout_s: float = 10.0

    def environment(self) -> dict[str, str]:
        """For the worker's process."""
        return {_VARIABLE: msgspec.json.encode(self).decode()}


class Held(msgspec.Struct, frozen=True):
    """A task that runs here."""

    epoch: int
    position: int
    restored_from: int
    """Where the restore of its table began in the changelog."""
    restored: int
    """Rows that the restore read."""


class Warm(msgspec.Struct, frozen=True):
    """A standby here."""

    epoch: int
    behind: int


class Status(msgspec.Struct, frozen=True):
    """By partition."""

    tasks: dict[int, Held] = {}
    standbys: dict[int, Warm] = {}


def build(told: Settings) -> sp.App:
    """The app as ``told``."""
    app = sp.App(
        told.app_id, broker=told.broker, commit_interval=f"{round(told.commit_interval_s * 1000)}ms",
        datadir=Path(told.folder), topic_disable_leader=True, table_standby_replicas=told.standby_replicas,
        consumer_group_instance_id=told.instance_id, broker_session_timeout=told.session_timeout_s,
    )  # fmt: skip
    records = app.topic(told.topic, value_serializer="raw", partitions=PARTITIONS)
    seen = app.Table(TABLE, default=lambda: (0, _PAD))

    @app.agent(records, name="count")
    async def count(stream: Any) -> None:
        async for key in stream:
            seen[key] = (seen[key][0] + 1, _PAD)

    @app.task
    async def tell() -> None:
        while not app.should_stop:
            new = Path(told.folder) / "status.new"
            new.write_bytes(msgspec.json.encode(_status(app)))
            new.rename(new.with_name(STATUS))
            await app.clock.sleep(SAY_S)

    return app


def _status(app: sp.App) -> Status:
    tasks = {}
    for task in app.runtime.tasks.values():
        if task.record is not None and task.restored.is_set():
            restore = task.view.restore
            position = sum(at for of in task.record.positions.values() for at in of.values())
            begun, read = (int(restore.start), restore.records) if restore is not None else (0, 0)
            tasks[task.id.partition] = Held(task.record.epoch, position, begun, read)
    standbys = {
        task.partition: Warm(standby.epoch, standby.behind or 0)
        for task, standby in app.runtime.standbys.running.items()
        if standby.epoch is not None
    }
    return Status(tasks, standbys)


def settings() -> Settings:
    """What this process was told."""
    given = os.environ.get(_VARIABLE)
    return msgspec.json.decode(given, type=Settings) if given else Settings()


app = build(settings())
