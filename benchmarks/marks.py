"""The worker's side of a measurement: it says where it is, and stands still until that has been written down.

    worker                                        who measures
    about to fetch the first order: "first"  ──▶  reads the process's CPU time
    waits                                    ◀──  an empty line
    the last row is committed and visible: "last" ──▶  reads it again
    waits                                    ◀──  an empty line

Nothing runs in the worker between a mark and its answer, so it does not matter how soon the measuring process is served.
Without `STREAMPROC_BENCHMARK` in the environment nobody measures, and a job runs as any other.
"""

from __future__ import annotations

import cProfile
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

import streamproc as sp
from benchmarks.orders import PARTITIONS
from benchmarks.profile_sampler import SESSION, Sampler
from benchmarks.wrapped import WrappedFetcher, WrappedTransport
from streamproc.core import limits
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime.surface import Topic
from streamproc.transport.contract import Fetcher, Transport

__all__ = [
    "MARK", "SCHEMAS", "TOPIC", "JobApp", "MeasuredApp", "Settings", "all_committed", "finished", "settings", "settled",
]  # fmt: skip

MARK: Final = "@@benchmark "
"""Begins a line of the worker's output that is meant for the measuring process; JSON follows."""
TOPIC: Final = "orders"
SCHEMAS: Final = Path(__file__).resolve().parent / "schemas"
_VARIABLE: Final = "STREAMPROC_BENCHMARK"
_POLL_S: Final = 0.02
S = TypeVar("S", bound="Settings")


class Settings(msgspec.Struct, frozen=True):
    """What a job is run with."""

    broker: str = "embedded://data/benchmarks"
    folder: str = "data/benchmarks"
    """Where the worker keeps its state."""
    app_id: str = "benchmark"
    topic: str = TOPIC
    partitions: int = PARTITIONS
    records: int = 0
    """In the topic before the worker starts; 0: nobody measures."""
    commit_interval_s: float = 1.0
    fetch_bytes_max: int = limits.FETCH_PARTITION_BYTES_MAX
    """Of a partition at a time; a task commits between two batches at the earliest."""
    redis: str = ""
    postgres: str = ""
    profile: str = ""
    """A file for cProfile's figures of what runs between the marks, or for a `Sampler`'s; the run's own figures are then worth
    nothing."""

    def environment(self) -> dict[str, str]:
        """For the worker's process."""
        return {_VARIABLE: msgspec.json.encode(self).decode()}


def settings(kind: type[S] = Settings) -> S:  # type: ignore[assignment]  # the default of S
    """What this process was told; ``kind`` is a job's own kind of `Settings`."""
    given = os.environ.get(_VARIABLE)
    return msgspec.json.decode(given, type=kind) if given else kind()


class JobApp(sp.App):
    """An app with the settings that a job is told."""

    def __init__(self, told: Settings) -> None:
        super().__init__(
            told.app_id,
            broker=told.broker,
            schemas=str(SCHEMAS),
            commit_interval=f"{round(told.commit_interval_s * 1000)}ms",
            datadir=Path(told.folder),
            topic_disable_leader=True,
        )
        limits.FETCH_PARTITION_BYTES_MAX = told.fetch_bytes_max  # type: ignore[misc]  # of this process alone
        self.told = told

    def orders(self, *, out_of_orderness: str = "5s", **event_time: Any) -> Topic:
        """The input of every job. ``event_time``: what `sp.event_time` takes beside. ``bounded`` is only that a run has an
        end: at it every window closes, as it would by later orders."""
        return self.topic(
            self.told.topic,
            value_schema=str(SCHEMAS / "order.avsc"),
            partitions=self.told.partitions,
            config={"retention.ms": "-1"},
            event_time=sp.event_time("event_time", out_of_orderness=out_of_orderness, **event_time),
        )


class MeasuredApp(JobApp):
    """An app that marks its first fetch of an order and the moment when `done` says that nothing is left to do."""

    def __init__(self, told: Settings, done: Callable[[MeasuredApp], bool | Awaitable[bool]]) -> None:
        super().__init__(told)
        self._done, self._began = done, False
        self._profile = _profile(told.profile)
        if told.records:
            self.task(self._watch)

    def make_transport(self) -> Transport:
        transport = super().make_transport()
        if not self.told.records:
            return transport
        return WrappedTransport(transport, lambda fetcher: _MarkedFetcher(fetcher, self.told.topic, self._begin))

    def _begin(self) -> None:
        if self._began:
            return
        self._began = True
        _say({"mark": "first"})
        if self._profile is not None:
            self._profile.enable()

    async def _watch(self) -> None:
        while not await self._is_done():
            await self.clock.sleep(_POLL_S)
        if self._profile is not None:
            self._profile.disable()
            self._profile.dump_stats(self.told.profile)
        tasks = self.runtime.tasks
        # A task's first commit only tells its incarnation.
        epochs = {str(name): task.view.commits - 1 for name, task in tasks.items()}
        restarts = sum(task.view.restarts for task in tasks.values())
        _say({"mark": "last", "epochs": epochs, "restarts": restarts})

    async def _is_done(self) -> bool:
        done = self._done(self)
        return done if isinstance(done, bool) else await done


def finished(app: MeasuredApp) -> bool:
    """Every task is at the end of its bounded input."""
    return app.runtime.finished()


def all_committed(app: MeasuredApp) -> bool:
    """Every order that was in the topic is behind a committed position."""
    at = 0
    for task in app.runtime.tasks.values():
        at += task.committed_position(TopicPartition(app.told.topic, task.id.partition)) or 0
    return bool(app.told.records) and at >= app.told.records


async def settled(app: MeasuredApp) -> bool:
    """The orders are committed, and so is all that tasks have shipped to one another: the end of a run whose input has
    none."""
    if not all_committed(app):
        return False
    works = [task.work for task in app.runtime.tasks.values() if task.work is not None]
    ends = await app.runtime.transport.offsets([tp for work in works for tp in work.resume_at()])
    return all(
        not work.dirty and all(at >= ends[tp].stable for tp, at in work.resume_at().items() if tp in ends)
        for work in works
    )


def _profile(file: str) -> cProfile.Profile | Sampler | None:
    """What makes ``file``, by how its name ends."""
    if file.endswith(SESSION):
        return Sampler()
    return cProfile.Profile() if file else None


class _MarkedFetcher(WrappedFetcher):
    """Tells each resume of a partition of ``topic``, before it."""

    def __init__(self, fetcher: Fetcher, topic: str, tell: Callable[[], None]) -> None:
        super().__init__(fetcher)
        self._topic, self._tell = topic, tell

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        if tp.topic == self._topic:
            self._tell()
        super().resume(tp, position)


def _say(what: dict[str, Any]) -> None:
    """Print a mark and stand still until it is answered."""
    print(MARK + json.dumps(what), flush=True)
    sys.stdin.readline()
