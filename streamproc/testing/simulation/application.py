"""A user's application in a simulated run: made anew for every worker, fed as it declares, and apart from everything else
that runs in the process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl

from streamproc.app import App
from streamproc.avro.columns import dtype_of
from streamproc.cli.apps import load_app
from streamproc.core.errors import UserError
from streamproc.core.partitioner import partition_of
from streamproc.runtime.surface import Topic, header_pairs
from streamproc.testing.simulation.loop import bury, unless_abandoned
from streamproc.transport.contract import OutRecord, TopicSpec

__all__ = ["Build", "Record", "Writer", "apart", "declared_topics", "makers_of", "read_bounded"]

Build = Callable[[], App]
PARTITIONS = 2
"""Of a topic whose declaration leaves the number open."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TIMESTAMP_MS_MAX = 1 << 52


@dataclass(frozen=True)
class Record:
    """A record as it is sent, and as it is found in a topic.

    Sent: ``value`` is encoded by the topic's schema or serializer, bytes go as they are; ``key`` may be text, bytes or a
    number. ``partition`` None: by the key as in production, without a key in turn. ``timestamp_ms`` None: the record's
    event time if the topic has one, else the simulated clock.

    Found: ``key`` is text where it is UTF-8. ``value`` is decoded as an agent would get it, with dicts for objects; a dead
    letter's or late record's by the topic it came from; bytes where that cannot be.
    """

    value: Any = None
    key: Any = None
    partition: int | None = None
    timestamp_ms: int | None = None
    headers: Mapping[str, bytes | str | None] = field(default_factory=dict)


# ---- making it


@contextlib.contextmanager
def makers_of(app: str | Build) -> Iterator[Build]:
    """What makes the app anew at each call. A name is ``module:attribute``; the module, and what it imports of its own
    top-level package, is executed again each time, and what was imported before is back on leaving."""
    if isinstance(app, str):
        module = app.partition(":")[0]
        package = module.partition(".")[0]
        with _own_modules(module if package == "streamproc" else package) as forget:

            def load() -> App:
                forget()
                return load_app(app)

            yield _each_a_new_one(load, app)
    elif callable(app) and not isinstance(app, App):
        yield _each_a_new_one(app, getattr(app, "__name__", "the factory"))
    else:
        raise UserError(
            f"A simulation was given {app!r}.",
            remedy='Workers are started many times, each with an app of its own: give its name, "module:attribute", or a '
            "function that makes it.",
        )  # fmt: skip


@contextlib.contextmanager
def _own_modules(package: str) -> Iterator[Callable[[], None]]:
    def loaded() -> dict[str, types.ModuleType]:
        return {name: found for name, found in sys.modules.items() if f"{name}.".startswith(f"{package}.")}

    def forget() -> None:
        for name in loaded():
            del sys.modules[name]

    before = loaded()
    try:
        yield forget
    finally:
        forget()
        sys.modules.update(before)


def _each_a_new_one(build: Build, name: str) -> Build:
    made: weakref.WeakSet[App] = weakref.WeakSet()

    def make() -> App:
        app = build()
        if not isinstance(app, App):
            raise UserError(f"{name} gave {app!r}.", remedy="It is to make a streamproc.App at each call.")
        if app in made:
            raise UserError(
                f"{name} gave the same app twice: a worker that starts must not find what another has left.",
                remedy="Let the function make the app, its topics and agents at each call; if it was named, declare it in "
                "the named module's own package.",
            )  # fmt: skip
        made.add(app)
        return app

    return make


def read_bounded(app: App, topics: Collection[str]) -> None:
    """Have pipelines read ``topics`` as inputs that end where they end when the app first starts, and no source be idle:
    so the outcome depends on the input alone, and every window closes."""
    for source in app.declaration.sources:
        times = replace(source.event_time, bounded=source.topic in topics, idle_after_ms=None)
        object.__setattr__(source, "event_time", times)  # frozen for users


# ---- feeding it


def declared_topics(app: App) -> list[TopicSpec]:
    """Topics that a broker holds before the app first starts, with `PARTITIONS` where it leaves the number open."""
    return [
        TopicSpec(spec.name, spec.partitions or PARTITIONS, spec.config)
        for spec in app.declared_topics()
        if spec.partitions or not app._declared[spec.name].internal
    ]


class Writer:
    """Encodes records as the app's own `topic.send` would. ``app`` is one that no worker runs."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.partitions = {spec.name: spec.partitions for spec in declared_topics(app)}
        self.latest_ms: dict[str, int] = {}
        """The highest event time encoded so far, by topic."""
        self._turn = 0

    def encode(self, name: str, record: Record) -> tuple[int, OutRecord]:
        """Its partition and its bytes. `UserError`: no such topic, or a value that its schema does not take."""
        if name not in self.partitions:
            raise UserError(
                f"The app declares no topic {name!r} to send to.",
                remedy=f"It has {', '.join(sorted(self.partitions))}.",
            )
        topic = self._app._declared[name]
        value = record.value if isinstance(record.value, bytes) else topic.encode(record.value)
        key = topic.prepare_key(record.key, None)[0]
        time_ms = self._event_time_ms(topic, record.value)
        if time_ms is not None:
            self.latest_ms[name] = max(self.latest_ms.get(name, time_ms), time_ms)
        stamp_ms = time_ms if record.timestamp_ms is None else record.timestamp_ms
        return self._partition(name, record, key), OutRecord(key, value, header_pairs(record.headers), stamp_ms)

    def _partition(self, name: str, record: Record, key: bytes | None) -> int:
        count = self.partitions[name]
        if record.partition is not None:
            if not 0 <= record.partition < count:
                raise UserError(
                    f"{name} has no partition {record.partition}.", remedy=f"It has {count}, counted from 0."
                )
            return record.partition
        if key is not None:
            return partition_of(key, count)
        self._turn += 1
        return (self._turn - 1) % count

    def _event_time_ms(self, topic: Topic, value: Any) -> int | None:
        if topic.event_time is None or isinstance(value, bytes):
            return None
        column = topic.event_time.column
        time = value.get(column) if isinstance(value, Mapping) else getattr(value, column, None)
        if isinstance(time, datetime):
            time = (time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH
            found = time // timedelta(milliseconds=1)
        elif isinstance(time, date):
            found = (time - _EPOCH.date()) // timedelta(milliseconds=1)
        elif isinstance(time, int):
            dtype = dtype_of(topic.value_schema, column) if topic.value_schema is not None else None
            found = time // 1000 if isinstance(dtype, pl.Datetime) and dtype.time_unit == "us" else time
        else:
            return None
        return found if 0 <= found < _TIMESTAMP_MS_MAX else None


# ---- apart from the rest of the process


@contextlib.contextmanager
def apart(what: str) -> Iterator[None]:
    """Nothing of a run is logged or warned of outside, and nothing that it abandoned is left behind. ``what`` names the
    caller for the `UserError` of one that is inside a running event loop."""
    if asyncio._get_running_loop() is not None:
        raise UserError(
            f"{what} was called inside a running event loop, and it runs one of its own.",
            remedy="Call it from a plain function: `def test_…()`, not `async def`.",
        )
    disabled, hook, collecting = logging.root.manager.disable, sys.unraisablehook, gc.isenabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what a dead worker never awaited
        logging.disable(logging.CRITICAL)
        sys.unraisablehook = unless_abandoned
        gc.disable()  # a collection in mid-run would depend on what ran before
        try:
            yield
        finally:
            bury()
            if collecting:
                gc.enable()
            sys.unraisablehook = hook
            logging.disable(disabled)
