"""A broker, sinks and some workers of one application in one process and in virtual time, to be mistreated.

Every worker runs the application's real code: its Faust services, runtime, commit, state and sink feeds. Only what is
outside of a worker is simulated: the network, the coordinator, the disk's failures, Redis and Postgres, the time.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import tempfile
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamproc.app import App
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.runtime.agentwork import AgentWork
from streamproc.runtime.task import Phase, Task
from streamproc.state import changelog
from streamproc.state.overlay import table_prefix, table_stop
from streamproc.testing.simulation.broker import Line, SimulatedBroker, Weather
from streamproc.testing.simulation.coordinator import SimulatedCoordinator
from streamproc.testing.simulation.disk import Disk
from streamproc.testing.simulation.loop import Life, Process, VirtualClock, VirtualLoop, current_process
from streamproc.testing.simulation.sink import SimulatedSink
from streamproc.testing.simulation.watch import Watch
from streamproc.transport.contract import OutRecord, PartitionOffsets, TopicSpec

__all__ = ["Cluster", "Worker"]

EPOCH_MS = 1_700_000_000_000
"""The simulated wall clock at the loop's zero."""
SETTLE_S = 1.5
"""How long everything must have been at rest to count as settled: longer than ticks and watermark intervals."""


@dataclass(eq=False)
class Worker:
    """One life of a worker process."""

    name: str
    process: Process
    disk: Disk
    clock: VirtualClock
    app: App | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    reason: BaseException | None = None
    """Why it stopped by itself."""
    life: asyncio.Task[None] | None = None
    remains: Disk | None = None
    """Its files as they were when it died."""

    @property
    def running(self) -> bool:
        return not self.process.dead and self.life is not None and not self.life.done()


class Cluster:
    """``build`` makes the application; it is called for every start of a worker. All randomness comes from ``dice``."""

    def __init__(self, build: Callable[[], App], loop: VirtualLoop, dice: random.Random, folder: Path,
                 *, rocksdb: bool = False) -> None:  # fmt: skip
        self._build, self.loop, self.dice, self.folder, self._rocksdb = build, loop, dice, folder, rocksdb
        self.watch = Watch(lambda: loop.time() - 1_000)
        self.weather = Weather(dice)
        self.clock = VirtualClock(loop, EPOCH_MS)
        self.broker = SimulatedBroker(folder / "log", self.clock)
        self.coordinator = SimulatedCoordinator(loop, dice, self.broker.count)
        self.sinks: dict[str, SimulatedSink] = {}
        self.group = ""
        """The consumer group: the application's id."""
        self.on_start: Callable[[Worker], None] = lambda worker: None
        """Told of each worker before anything of it runs."""
        self.pause_s: Callable[[Collection[str]], float] = lambda topics: 0.0
        """How long a worker waits before each batch of these topics, for an input that is there as a whole."""
        self.workers: list[Worker] = []
        """All there ever were."""
        self.reached: set[str] = set()
        self.died: set[str] = set()
        """Steps that were come by, and steps that a worker died at."""
        self.told: list[str] = []
        """What happened, for a person who looks at a failing run."""
        self.paused: list[Worker] = []
        self._spawned: list[asyncio.Task[None]] = []
        self._context = contextvars.copy_context()
        self._stalls: dict[Process, tuple[str, float]] = {}
        self.targets: set[str] = set()
        """Steps at which the next armed worker that comes by dies."""
        self._armed: set[Process] = set()
        self._doomed: dict[Process, int] = {}
        self._lives = 0
        self._serving: asyncio.Task[None] | None = None

    @property
    def alive(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.running]

    def say(self, what: str) -> None:
        self.told.append(f"{self.loop.time() - 1_000:9.3f} s  {what}")

    # ---- life

    async def open(self) -> None:
        await self.broker.start()
        self._serving = asyncio.create_task(self.coordinator.serve(), name="coordinator")

    async def close(self) -> None:
        """Nothing is stopped in peace: the run is over."""
        self.watch.over = True
        for worker in self.alive:
            self.loop.kill(worker.process)
        for worker in self.workers:
            worker.disk.let_go()
        for task in (self._serving, *self._spawned):
            if task is not None:
                task.cancel()
        await self.broker.stop()

    def start(self, disk: Disk | None = None) -> Worker:
        """A worker, on ``disk`` or an empty one."""
        self._lives += 1
        name = f"w{self._lives}"
        process = Process(name)
        disk = disk or self.new_disk()
        disk.process = process
        worker = Worker(name, process, disk, VirtualClock(self.loop, EPOCH_MS))
        worker.clock.skew_ms = self.clock.skew_ms
        self.workers.append(worker)
        self.say(f"{name} starts")
        self.on_start(worker)
        worker.life = self.loop.start(process, self._live(worker))
        return worker

    def new_disk(self) -> Disk:
        self._lives += 1
        return Disk(self.folder / f"disk{self._lives}", self.weather, self.watch, rocksdb=self._rocksdb)

    async def stop(self, worker: Worker) -> Disk:
        """SIGTERM, waited for."""
        self.say(f"{worker.name} is stopped")
        self.loop.go_on(worker.process)
        worker.stopping.set()
        while worker.running:  # noqa: ASYNC110  # it may also die, which no event of its own can tell
            await asyncio.sleep(0.1)
        return worker.remains or worker.disk

    def kill(self, worker: Worker, where: str = "") -> None:
        """SIGKILL: its coroutines are abandoned, its files are what they are at this moment."""
        self.say(f"{worker.name} is killed {where}")
        worker.remains = self.copy_disk(worker.disk)
        self.loop.kill(worker.process)
        worker.disk.let_go()

    def arm(self, worker: Worker) -> None:
        """It dies when it comes by one of `targets`."""
        self._armed.add(worker.process)

    def doom(self, worker: Worker, steps: int) -> None:
        """It dies at the ``steps``-th step from now."""
        self._doomed[worker.process] = steps

    def disarm(self) -> None:
        self._armed.clear()
        self._doomed.clear()
        self._stalls.clear()

    def copy_disk(self, disk: Disk) -> Disk:
        """As it is now."""
        self._lives += 1
        return disk.copy(self.folder / f"disk{self._lives}")

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Something of the harness's that goes on beside everything."""
        self._spawned.append(asyncio.create_task(coroutine))

    def at_step(self, step: str) -> asyncio.Future[None] | None:
        """`steps.Listener`."""
        process = current_process()
        if process is None or process.dead:
            return None
        self.reached.add(step)
        if self._stalls and step.startswith(self._stalls.get(process, ("never", 0))[0]):
            self._stall(process)
        left = self._doomed.get(process, 0)
        if left > 1:
            self._doomed[process] = left - 1
        if left != 1 and not (process in self._armed and step in self.targets):
            return None
        self.targets.discard(step)
        worker = next(worker for worker in self.workers if worker.process is process)
        self.died.add(step)
        self.kill(worker, f"at {step}")
        return self.loop.create_future()  # for ever

    def stall(self, worker: Worker, where: str, seconds: float) -> None:
        """It stands still for ``seconds`` when it comes by a step that begins with ``where``."""
        self._stalls[worker.process] = (where, seconds)

    def _stall(self, process: Process) -> None:
        where, seconds = self._stalls.pop(process)
        if process.life is not Life.ALIVE:
            return
        self.say(f"{process.name} stands still for {seconds:.1f} s at {where}")
        self.weather.note("stood still at a step")
        self.loop.pause(process)
        self.loop.call_later(seconds, self._stalled, process, context=self._context)

    def _stalled(self, process: Process) -> None:
        self.say(f"{process.name} goes on")
        self.loop.go_on(process)

    async def _live(self, worker: Worker) -> None:
        app = worker.app = self._build()
        self._adapt(app, worker)
        starting, told = asyncio.ensure_future(app.start()), asyncio.ensure_future(worker.stopping.wait())
        await asyncio.wait([starting, told], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
        await told
        await app.stop()
        starting.cancel()
        self.say(f"{worker.name} has stopped" + (f": {worker.reason}" if worker.reason else ""))
        self.loop.kill(worker.process)  # its process ends: what it has left running does not go on

    def _adapt(self, app: App, worker: Worker) -> None:
        """Put the simulated outside in the place of the real one."""
        self.group = app.conf.id

        async def crash(reason: BaseException) -> None:
            if worker.reason is None:
                worker.reason = reason
                worker.stopping.set()

        line = Line(self.broker, self.coordinator, worker.process, self.weather, self.watch)
        line.pause_s = self.pause_s
        app.clock = worker.clock
        app.conf.web_enabled = False
        app.conf.topic_disable_leader = True
        app.conf.datadir = worker.disk.folder
        app.make_transport = lambda: line  # type: ignore[method-assign]
        app.open_store = worker.disk.open  # type: ignore[method-assign]
        app.crash = crash  # type: ignore[method-assign]
        for handle in app.declaration.tables:
            handle.sinks[:] = [(self.sink(sink.name), emit) for sink, emit in handle.sinks]

    def sink(self, name: str) -> SimulatedSink:
        if name not in self.sinks:
            self.sinks[name] = SimulatedSink(name, self.weather, self.watch)
        return self.sinks[name]

    # ---- topics

    async def create(self, topic: str, partitions: int) -> None:
        await self.broker.create_topics([TopicSpec(topic, partitions)])

    async def send(self, topic: str, partition: int, *records: OutRecord) -> None:
        await self.broker.send({TopicPartition(topic, partition): records})

    async def back_up(self, topic: str) -> dict[int, list[OutRecord]]:
        """All records of a topic that no transaction wrote."""
        found: dict[int, list[OutRecord]] = {}
        for partition in range(self.broker.count(topic)):
            tp = TopicPartition(topic, partition)
            ends = (await self.broker.offsets([tp]))[tp]
            async for batch in self.broker.read(tp, Offset(ends.begin), ends.stable):
                found.setdefault(partition, []).extend(
                    OutRecord(batch.key(at), batch.value(at), tuple(batch.headers(at)), int(batch.timestamps[at]))
                    for at in range(len(batch))
                )
        return found

    async def remake(self, topic: str, records: Mapping[int, Sequence[OutRecord]]) -> None:
        """Delete a topic and make it again, as it was declared, with ``records``."""
        spec = self.broker.spec(topic)
        await self.broker.delete_topics([topic])
        await self.broker.create_topics([spec])
        for partition, rows in records.items():
            await self.send(topic, partition, *rows)

    async def records(self, topic: str) -> list[tuple[int, bytes | None, bytes | None, dict[str, Any]]]:
        """Every committed record: (partition, key, value, headers), by partition in offset order."""
        found = []
        for partition in range(self.broker.count(topic)):
            tp = TopicPartition(topic, partition)
            ends = (await self.broker.offsets([tp]))[tp]
            async for batch in self.broker.read(tp, Offset(ends.begin), ends.stable):
                found += [
                    (partition, batch.key(at), batch.value(at), dict(batch.headers(at))) for at in range(len(batch))
                ]
        return found

    # ---- results

    def tasks(self) -> Iterator[Task]:
        """Tasks of the workers that run."""
        for worker in self.alive:
            if worker.app is not None:
                yield from worker.app.runtime.tasks.values()

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Committed rows of a pipeline's table, in all workers."""
        found: list[dict[str, Any]] = []
        for task in self.tasks():
            if task.id.group == f"table-{table}" and task.work is not None:
                frame = task.work.results(task.overlay(table).scan(b"", None))
                found += frame.filter("__visible").drop("__epoch", "__visible").to_dicts()
        return found

    def values(self, table: str, keys: Sequence[Any]) -> dict[Any, Any]:
        """Committed values of an `app.Table`, of those keys that have one."""
        found = {}
        for worker in self.alive:
            if worker.app is not None:
                for key in keys:
                    value = worker.app.runtime.committed(table, key)
                    if value is not None:
                        found[key] = value
        return found

    def restless(self) -> str | None:
        """Why the cluster is not at rest; None: it is."""
        running = {worker.app.runtime for worker in self.alive if worker.app is not None}
        if not running:
            return "no worker runs"
        expected = {
            TaskId(name, partition)
            for runtime in running
            for name, group in runtime.groups.items()
            for partition in range(group.plan.partitions)
        }
        tasks = list(self.tasks())
        held = [task.id for task in tasks if task.phase is not Phase.CLOSED]
        if sorted(held) != sorted(expected) or not expected:
            return f"tasks are held by nobody or by two: {sorted(set(expected) ^ set(held))}, {len(held)}"
        return next((why for task in tasks if (why := _busy(task)) is not None), None)

    async def settle(self, seconds: float = 400.0) -> None:
        """Wait until nothing is left to be done. Raises `AssertionError` that says what was."""
        end_s, quiet_s = self.loop.time() + seconds, None
        while True:
            why = self.restless()
            now_s = self.loop.time()
            quiet_s = None if why else quiet_s or now_s
            if quiet_s is not None and now_s - quiet_s >= SETTLE_S:
                return
            if now_s > end_s:
                raise AssertionError(f"after {seconds:g} s without faults: {why}")
            await asyncio.sleep(0.1)

    async def _ended(self, tp: TopicPartition) -> PartitionOffsets:
        """Offsets once no transaction is open: behind somebody's that hangs there may be committed records."""
        while True:
            ends = (await self.broker.offsets([tp]))[tp]
            if ends.stable == ends.end:
                return ends
            await asyncio.sleep(0.5)

    async def check_changelogs(self) -> None:
        """Each store holds what its changelogs say, no more and no less: what a start from nothing would restore."""
        logged: dict[TopicPartition, dict[bytes, bytes]] = {}
        epochs = -1
        while epochs != self.watch.epochs:  # reading may take a while, in which a task may move and let go of rows
            epochs = self.watch.epochs
            for task in list(self.tasks()):
                for table in task.env.group.tables:
                    tp = TopicPartition(table.changelog, task.id.partition)
                    logged[tp] = await self._logged(tp)
            await self.settle()
        for task in self.tasks():
            for table in task.env.group.tables:
                assert task.store is not None
                prefix = table_prefix(table.name)
                stored = {key[len(prefix) :]: value for key, value in task.store.scan(prefix, table_stop(prefix))}
                fits = stored == logged[TopicPartition(table.changelog, task.id.partition)]
                self.watch.require(fits, f"{task.id}: the store of {table.name} is not what its changelog says")

    async def _logged(self, tp: TopicPartition) -> dict[bytes, bytes]:
        """The last value of each key of a changelog."""
        rows: dict[bytes, bytes] = {}
        ends = await self._ended(tp)
        async for batch in self.broker.read(tp, Offset(ends.begin), ends.stable):
            for row in changelog.read(batch):
                if row.value is None:
                    rows.pop(row.key, None)
                else:
                    rows[row.key] = row.value
        return rows


def _busy(task: Task) -> str | None:
    work = task.work
    if task.phase is not Phase.RUNNING or work is None:
        return f"{task.id} is {task.phase.value}: {task.view.problem}"
    if task._inbox or work.dirty or work.failure is not None:
        return f"{task.id} has work"
    if isinstance(work, AgentWork) and any(instance.backlog for instance in work._instances):
        return f"{task.id} has records in hand"
    if behind := [tp for tp in work.resume_at() if task.env.fetcher.lag(tp) != 0]:
        return f"{task.id} is behind in {behind[0].topic}:{behind[0].partition}"
    if waiting := [feed.name for feed in task.feeds if not feed.idle]:
        return f"{task.id} feeds {waiting[0]}"
    return None


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for a run, in memory where the machine has such."""
    shm = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix="streamproc-", dir=shm if shm.is_dir() else None, ignore_cleanup_errors=True
    )
