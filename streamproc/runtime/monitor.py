"""Faust's sensors, fed once a batch or a commit with counts: called once a record they would cost more than the agent.

`app.monitor` counts as it does in Faust: messages as they are fetched, events and table keys as they are committed.
Every sensor of the app is told of commits; sends outside of agents, rebalances and web requests are told by Faust itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from faust.sensors.base import Sensor
from faust.sensors.monitor import Monitor, TableState
from faust.types import TP

from streamproc.commit.record import tp_of
from streamproc.core.batch import RawBatch
from streamproc.runtime.epoch import Committed
from streamproc.state.overlay import Changes

__all__ = ["CommitWatch", "SensorFeed"]

logger = logging.getLogger(__name__)

PER_RECORD = ("on_message_in", "on_message_out", "on_stream_event_in", "on_stream_event_out", "on_table_get",
              "on_table_set", "on_table_del")  # fmt: skip
"""Hooks of Faust that are not called."""


class CommitWatch(Protocol):
    """Told of a task's commits; what it raises would fail the task."""

    def begins(self) -> Any:
        """A commit begins; the result is handed back when it is done, and dropped if it fails."""

    def committed(self, task: str, done: Committed, records: int, begun: Any) -> None:
        """``records`` of the task's input are done since its start here."""


class SensorFeed:
    """The sensors of one app. All methods are called from the worker's loop."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._done: dict[str, int] = {}

    def warn(self) -> None:
        """Name the sensors that wait for what never comes; once, at start."""
        for sensor in self._app.sensors:
            if waiting := [hook for hook in PER_RECORD if _is_own(sensor, hook)]:
                logger.warning(
                    "%s overrides %s: streamproc hands records on in batches and calls no sensor once a record. Use "
                    "on_commit_completed, on_tp_commit or the counts of app.monitor.",
                    type(sensor).__name__, ", ".join(waiting),
                )  # fmt: skip

    def fetched(self, batch: RawBatch) -> None:
        """A batch has come in for a task."""
        monitor: Monitor = self._app.monitor
        count = len(batch)
        if count:
            monitor.messages_received_total += count
            monitor.messages_received_by_topic[batch.tp.topic] += count
            monitor.tp_read_offsets[TP(*batch.tp)] = int(batch.offsets[-1])

    def begins(self) -> Any:
        return self._app.sensors.on_commit_initiated(self._app.consumer)

    def committed(self, task: str, done: Committed, records: int, begun: Any) -> None:
        monitor: Monitor = self._app.monitor
        before = self._done.get(task, 0)
        new = records - before if records >= before else records  # a task that started anew counts anew
        self._done[task] = records
        monitor.events_total += new
        monitor.events_by_task[task] += new
        for name, rows in done.changes.items():
            if rows and (table := self._app.tables.get(name)) is not None:
                _count_keys(monitor, table, rows)
        for topic, sent in done.sent.items():
            monitor.messages_sent += sent
            monitor.messages_sent_by_topic[topic] += sent
        for sensor in self._app.sensors:
            if isinstance(sensor, Monitor):
                sensor.on_tp_commit(_positions(done.record.positions))
        self._app.sensors.on_commit_completed(self._app.consumer, begun)


def _count_keys(monitor: Monitor, table: Any, rows: Changes) -> None:
    state = monitor.tables.get(table.name)
    if state is None:
        state = monitor.tables[table.name] = TableState(table)
    state.keys_deleted += len(rows.gone)
    state.keys_updated += len(rows) - len(rows.gone)


def _positions(positions: Mapping[str, Mapping[str, int]]) -> dict[TP, int]:
    return {TP(*tp_of(name)): at for of in positions.values() for name, at in of.items()}


def _is_own(sensor: Any, hook: str) -> bool:
    found: Callable[..., Any] | None = getattr(type(sensor), hook, None)
    return found not in (None, getattr(Sensor, hook), getattr(Monitor, hook))
