"""`Driver`: an application under a test's hand, in virtual time: for unit tests of windows, timers and restarts."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from streamproc.app import App
from streamproc.core.durations import Duration, milliseconds
from streamproc.core.errors import UserError
from streamproc.runtime.ownerwork import OwnerWork
from streamproc.runtime.sourcework import SourceWork
from streamproc.runtime.task import Phase, Task
from streamproc.sinks.contract import Emit
from streamproc.testing.simulation.application import Build, Record, Writer, apart, declared_topics, makers_of
from streamproc.testing.simulation.cluster import Cluster, Worker, scratch
from streamproc.testing.simulation.kit import raise_what_ended
from streamproc.testing.simulation.loop import virtual_loop
from streamproc.testing.simulation.outcome import Row, read_rows, read_sink, read_table, read_topic
from streamproc.testing.simulation.watch import Broken

__all__ = ["Driver"]

T = TypeVar("T")
LOOK_S = 0.05
QUIET_S = 0.5
"""How long nothing may have been left to do: longer than two of the runtime's ticks."""
REST_S = 400.0
_STATES: Final[dict[Emit, int]] = {"on_update": 0, "on_close": 1, "final": 2}


class Driver:
    """``app``: ``"module:attribute"`` or a function that makes the app; called for every start of a worker.

    A context manager of plain methods, for tests that are no coroutines. `send` only writes. Whatever looks at results
    (`rows`, `table`, `topic`, `sink`) first lets the app come to rest: all that was sent is processed, committed and in the
    sinks. That takes processing time, a commit interval or two; `advance` lets more of it pass. Event time is the records'.

    No fault is drawn: what fails is what the test fails. A worker that ends by itself raises its reason (`UserError`, …) in
    the next call. A source that is declared bounded is read as one that goes on.
    """

    def __init__(self, app: str | Build, *, workers: int = 1) -> None:
        self._app, self._count = app, workers
        self._open = ExitStack()
        self._rested = False

    def __enter__(self) -> Driver:
        with ExitStack() as opening:
            opening.enter_context(apart("Driver()"))
            make = opening.enter_context(makers_of(self._app))
            folder = Path(opening.enter_context(scratch()))
            app = make()
            self._writer = Writer(app)
            # All is read: a commit of the owners, and time for what is on its way.
            self._read_s = 2 * app.commit_interval_s + 1.0 if _never_rests(app) else math.inf
            self._loop = virtual_loop(0)
            self._cluster = Cluster(lambda: _going_on(make()), self._loop, random.Random(0), folder)
            opening.callback(self._close)
            self._loop.run(self._begin(app))
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        broken = self._cluster.watch.broken
        self._open.close()
        if kind is None and broken:
            raise Broken("; ".join(broken[:3]))

    def _close(self) -> None:
        """Leave nothing that would be collected after `apart` has ended."""
        self._loop.run(self._cluster.close())
        self._cluster.workers.clear()
        del self._cluster, self._loop, self._writer

    # ---- what happens

    def send(self, topic: str, value: Any = None, *, key: Any = None, partition: int | None = None,
             timestamp_ms: int | None = None) -> None:  # fmt: skip
        """Write one record; see `Record` for what the arguments mean."""
        partition, out = self._writer.encode(topic, Record(value, key, partition, timestamp_ms))
        self._do(self._cluster.send(topic, partition, out))

    def advance(self, duration: Duration) -> None:
        """Let processing time pass: idleness, timers, commit intervals, session time-outs."""
        self._do(asyncio.sleep(milliseconds(duration, setting="advance") / 1000))

    def crash(self, worker: int = 0, *, lose_disk: bool = False) -> None:
        """Kill a worker as by SIGKILL, and start one in its place with what it had on disk, or an empty one. It gets the
        tasks once the session of the dead one has run out, about ten seconds of processing time later."""
        dead = self._worker(worker)
        self._cluster.kill(dead)
        self._do(self._start(None if lose_disk else dead))

    def restart(self, worker: int = 0) -> None:
        """Stop a worker as by SIGTERM, and start it again."""
        self._do(self._restart(self._worker(worker)))

    def rebalance(self) -> None:
        """Take all tasks away and share them out again, perhaps otherwise."""
        self._cluster.coordinator.rebalance()
        self._do(asyncio.sleep(0))

    # ---- what has come of it

    def rows(self, table: str, emit: Emit = "on_update") -> list[Row]:
        """A pipeline's table, by keys and window: group keys, ``window_start``, ``window_end``, aggregates. ``emit``: only
        rows that a sink with it would have been told of: ``"on_close"``: their window is closed; ``"final"``: for good."""
        self._require(emit, list(_STATES), "emit")
        self._require(table, [handle.name for handle in self._some_app().declaration.tables], "table of a pipeline")
        self._rest()
        return read_rows(self._cluster, table, _STATES[emit])

    def table(self, name: str) -> dict[Any, Any]:
        """An `app.Table`."""
        self._require(name, [str(table) for table in self._some_app().tables], "app.Table")
        self._rest()
        return read_table(self._cluster, name)

    def topic(self, name: str) -> list[Record]:
        """The committed records of any topic, by partition in order."""
        self._rest()
        self._require(name, list(self._cluster.broker._log.topics), "topic")
        return self._do(read_topic(self._cluster, name), changes=False)

    def sink(self, name: str) -> dict[str, list[Row]]:
        """What a sink holds: table -> rows, as `rows` gives them. ``name`` is the sink's own: ``FakeSink("results")`` is
        ``results``, one of Redis or Postgres its URL without a password."""
        handles = self._some_app().declaration.tables
        self._require(name, list(dict.fromkeys(sink.name for handle in handles for sink, _ in handle.sinks)), "sink")
        self._rest()
        return read_sink(self._cluster, name)

    @property
    def now_ms(self) -> int:
        """Processing time."""
        return self._cluster.clock.now_ms()

    # ---- inside

    async def _begin(self, app: App) -> None:
        await self._cluster.open()
        await self._cluster.broker.create_topics(declared_topics(app))
        for _ in range(self._count):
            self._cluster.start()
        await self._built()

    async def _start(self, dead: Worker | None) -> None:
        self._cluster.start(dead.remains if dead is not None else None)
        await self._built()

    async def _restart(self, worker: Worker) -> None:
        self._cluster.start(await self._cluster.stop(worker))
        await self._built()

    async def _built(self) -> None:
        """Every worker has its app; raises what went wrong in making it."""
        for worker in self._cluster.alive:
            while worker.running and worker.app is None:  # noqa: ASYNC110  # a tick or two, in virtual time
                await asyncio.sleep(0)
        raise_what_ended(self._cluster.workers)

    def _worker(self, number: int) -> Worker:
        raise_what_ended(self._cluster.workers)
        alive = self._cluster.alive
        if not 0 <= number < len(alive):
            raise UserError(f"There is no worker {number}.", remedy=f"{len(alive)} run, counted from 0.")
        return alive[number]

    def _some_app(self) -> App:
        raise_what_ended(self._cluster.workers)
        return next(worker.app for worker in self._cluster.alive if worker.app is not None)

    def _do(self, what: Coroutine[Any, Any, T], *, changes: bool = True) -> T:
        result = self._loop.run(what)
        raise_what_ended(self._cluster.workers)
        self._rested = self._rested and not changes
        return result

    def _rest(self) -> None:
        if not self._rested:
            self._do(self._come_to_rest())
            self._rested = True

    async def _come_to_rest(self) -> None:
        end_s = self._loop.time() + REST_S
        quiet_s = read_s = 0.0
        while quiet_s < QUIET_S and read_s < self._read_s:
            raise_what_ended(self._cluster.workers)
            why = self._cluster.restless()
            quiet_s = 0.0 if why else quiet_s + LOOK_S
            read_s = 0.0 if why and self._unread() else read_s + LOOK_S
            if self._loop.time() > end_s:
                raise AssertionError(f"The app has not come to rest within {REST_S:g} s: {why}.")
            await asyncio.sleep(LOOK_S)

    def _unread(self) -> bool:
        """Whether a task that reads topics of the app's own has something in hand or to commit but its clock."""
        tasks = [task for task in self._cluster.tasks() if not isinstance(task.work, OwnerWork)]
        return not tasks or any(_has_unread(task) for task in tasks)

    @staticmethod
    def _require(name: str, known: list[str], kind: str) -> None:
        if name not in known:
            raise UserError(f"There is no {kind} {name!r}.", remedy=f"There are {', '.join(known) or 'none'}.")


def _has_unread(task: Task) -> bool:
    work = task.work
    if task.phase is not Phase.RUNNING or work is None or task._inbox or work.failure is not None:
        return True
    clock_only = isinstance(work, SourceWork) and not work._records
    return (work.dirty and not clock_only) or any(task.env.fetcher.lag(tp) != 0 for tp in work.resume_at())


def _never_rests(app: App) -> bool:
    """While its sources are idle their watermarks go on with processing time, and are committed."""
    times = [source.event_time for source in app.declaration.sources]
    return any(time.idle_after_ms is not None and time.idle == "advance" for time in times)


def _going_on(app: App) -> App:
    for source in app.declaration.sources:
        object.__setattr__(source, "event_time", replace(source.event_time, bounded=False))  # frozen for users
    return app
