"""What happens to a cluster: crashes, rebalances, outages, old backups, full disks and people who set things by hand.

Everything is drawn from the cluster's dice. What may end a worker (an operator's mistake) is announced with the error it
must end with; a worker that ends by itself for any other reason breaks a promise.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec

from streamproc.core.errors import LogLost, UserError, WorkerFailure
from streamproc.core.types import Offset, TopicPartition
from streamproc.testing.simulation.cluster import Cluster, Worker
from streamproc.testing.simulation.disk import Disk
from streamproc.testing.simulation.loop import Life
from streamproc.transport.contract import OutRecord

__all__ = ["Nemesis"]

WORKERS_MAX = 3
STALLS = (
    "runtime/sinkfeed.py SinkFeed._claim: await self.writer.read()",
    "runtime/sinkfeed.py SinkFeed.claim: await self.writer.open()",
    "runtime/sinkfeed.py SinkFeed._claim: await self.writer.read(), after",
    "runtime/sinkfeed.py SinkFeed._move",
    "runtime/start.py open_task",
    "runtime/start.py open_task: await parts.producer.fence()",
    "runtime/epoch.py commit",
    "runtime/epoch.py commit: await parts.producer.end",
    "state/restore.py",
)
"""Where a worker may stand still: steps that begin so."""
DAY_MS = 24 * 3_600_000
Act = Callable[[], Awaitable[None]]


class Nemesis:
    """``targets``: steps that a worker is to die at, once each. ``meddled``: a source topic, of a pipeline of the
    same name, that people set the offsets of, add partitions to and make anew; None: nobody does."""

    def __init__(self, cluster: Cluster, targets: Sequence[str] = (), *, meddled: str | None = None) -> None:
        self._source = meddled or ""
        self.cluster, self.dice = cluster, cluster.dice
        cluster.targets.update(targets)
        self.feeding = asyncio.Event()
        """Cleared while the source topics must not be written."""
        self.feeding.set()
        self._disks: list[Disk] = []
        """Of workers that are gone, the latest last."""
        self._old: Disk | None = None
        self._hands_off = False
        """No worker is started while an operator is at it."""
        self._keeper: asyncio.Task[None] | None = None
        self._seen: set[Worker] = set()
        self._compactions = 0
        self._backed_up_at = -1
        cluster.on_start = self._aim_at_some

    async def torment(self, feeding: asyncio.Future[None] | None = None) -> None:
        """All of it: a few acts, and with ``feeding`` so many more that there is work to be spoilt until that is done."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name="keeper")
        acts: list[tuple[Act, float]] = [
            (self._storm, 8), (self._kill, 3), (self._kill_soon, 5), (self._restart, 5), (self._join, 2),
            (self._rebalance, 3), (self._pause, 4), (self._stall, 6), (self._sinks_fall, 4), (self._back_up_sinks, 2),
            (self._roll_back_sinks, 2), (self._compact, 3), (self._lose_disk, 2), (self._keep_disk, 2),
            (self._old_disk, 2), (self._disk_full, 2), (self._refuse, 2), (self._clock_back, 1),
            (self._days_pass, 0.5), (self._hang_transaction, 1), (self._lose_ledgers, 1),
        ]  # fmt: skip
        if self._source:
            acts += [(act, 0.4) for act in (self._set_offsets, self._grow_source, self._remake_source,
                                            self._lose_commits, self._put_sink_ahead)]  # fmt: skip
        least = self.dice.randrange(5, 12)
        while least > 0 or (feeding is not None and not feeding.done()):
            least -= 1
            await asyncio.sleep(self.dice.choice((0.05, 2.0, 5.0)) * self.dice.random())
            act = self.dice.choices([act for act, _ in acts], [weight for _, weight in acts])[0]
            self.cluster.say(f"-- {getattr(act, '__name__', '')[1:]}")
            await act()

    async def make_peace(self) -> None:
        """No more faults; zombies wake up, somebody runs."""
        cluster = self.cluster
        cluster.say("-- peace")
        cluster.targets.clear()
        cluster.disarm()
        cluster.weather.calm()
        for sink in cluster.sinks.values():
            sink.down = False
        for worker in cluster.workers:
            cluster.loop.go_on(worker.process)
        await asyncio.sleep(0.5)
        if self._keeper is not None:
            self._keeper.cancel()
        if self._sinks_need_the_log():  # a task sees it when it next writes, and now there is nothing more to write
            for worker in cluster.alive:
                cluster.kill(worker)
        self._account()
        if not cluster.alive:
            cluster.start(self._take_disk())

    # ---- keeping workers running

    async def _keep(self) -> None:
        """Start again what ended, after a while, as a supervisor does."""
        while True:
            await asyncio.sleep(0.2)
            self._account()
            self._aim()
            if not self._hands_off and len(self.cluster.alive) < 2 and self.dice.random() < 0.1:
                self.cluster.start(self._take_disk())

    def _account(self) -> None:
        for worker in self.cluster.workers:
            if worker.running or worker in self._seen:
                continue
            self._seen.add(worker)
            self._disks.append(worker.remains or worker.disk)
            self._judge(worker)

    def _judge(self, worker: Worker) -> None:
        failure = worker.reason
        if failure is None and not worker.process.dead and worker.life is not None:
            failure = worker.life.exception()
        self.cluster.watch.require(failure is None, f"{worker.name} ended by itself: {failure!r}")

    def _aim(self) -> None:
        """Sooner or later each is to die at a target."""
        for worker in self.cluster.alive:
            if self.dice.random() < 0.05:
                self.cluster.arm(worker)

    def _aim_at_some(self, worker: Worker) -> None:
        """Not at each that starts: who always dies while it starts never has anything to lose."""
        if self.dice.random() < 0.4:
            self.cluster.arm(worker)

    def _take_disk(self) -> Disk | None:
        return self._disks.pop() if self._disks else None

    def _one(self) -> Worker | None:
        alive = self.cluster.alive
        return self.dice.choice(alive) if alive else None

    # ---- crashes and rebalances

    async def _kill(self) -> None:
        if (worker := self._one()) is not None:
            self.cluster.kill(worker)

    async def _kill_soon(self) -> None:
        if (worker := self._one()) is not None:
            self.cluster.doom(worker, self.dice.randrange(1, 300))

    async def _restart(self) -> None:
        if (worker := self._one()) is not None:
            self._seen.add(worker)
            disk = await self.cluster.stop(worker)
            self._judge(worker)
            await asyncio.sleep(self.dice.uniform(0, 2))
            self.cluster.start(disk)

    async def _join(self) -> None:
        if len(self.cluster.alive) < WORKERS_MAX:
            self.cluster.start(self._take_disk())

    async def _rebalance(self) -> None:
        self.cluster.coordinator.rebalance()

    async def _pause(self) -> None:
        """A zombie, if its session ends meanwhile."""
        worker = self._one()
        if worker is None or len(self.cluster.alive) < 2 or worker.process.life is not Life.ALIVE:
            return
        self.cluster.loop.pause(worker.process)
        self.cluster.paused.append(worker)

        async def wake() -> None:
            await asyncio.sleep(self.dice.uniform(1, 20))
            self.cluster.say(f"{worker.name} wakes up")
            self.cluster.paused.remove(worker)
            self.cluster.loop.go_on(worker.process)

        self.cluster.spawn(wake())

    async def _stall(self) -> None:
        """A worker stands still in the middle of a start, a claim or a commit, mostly one that has just been given tasks."""
        worker = self._one()
        if worker is None or len(self.cluster.alive) < 2:
            return
        self.cluster.stall(worker, self.dice.choice(STALLS), self.dice.uniform(4, 15))
        if self.dice.random() < 0.7:
            self.cluster.coordinator.rebalance()

    # ---- the outside

    async def _storm(self) -> None:
        """Calls fail, answers are lost, everything is slow, for a while. Often it is the sinks' alone: while the broker
        fails too, they are told little."""
        weather = self.cluster.weather
        weather.broker = self.dice.choice((0.0, 0.0, 0.05, 0.15))
        weather.sink = self.dice.choice((0.0, 0.2, 0.4))
        weather.slow = self.dice.choice((0.0, 0.0, 0.1))

        async def end() -> None:
            await asyncio.sleep(self.dice.uniform(1, 8))
            weather.broker = weather.sink = weather.slow = 0.0

        self.cluster.spawn(end())

    async def _sinks_fall(self) -> None:
        sinks = [sink for sink in self.cluster.sinks.values() if self.dice.random() < 0.7]
        for sink in sinks:
            sink.down = True

        async def mend() -> None:
            await asyncio.sleep(self.dice.uniform(0.5, 8))
            for sink in sinks:
                sink.down = False

        self.cluster.spawn(mend())

    async def _back_up_sinks(self) -> None:
        self._backed_up_at = self._compactions
        for sink in self.cluster.sinks.values():
            sink.back_up()

    async def _roll_back_sinks(self) -> None:
        """To a backup that the changelog can still make up for: rows that left by retention are only there until it is
        compacted."""
        if self._backed_up_at != self._compactions:
            return
        for sink in self.cluster.sinks.values():
            if self.dice.random() < 0.7 and sink.roll_back():
                self.cluster.weather.note("sink rolled back")

    async def _lose_ledgers(self) -> None:
        """What sinks know of their tasks is gone, with a row in them that nobody wrote: they are rebuilt. Their rows go
        as well, as long as none has left the state by retention, for nothing could bring that back."""
        for worker in self.cluster.alive:
            self.cluster.kill(worker)
        watch = self.cluster.watch
        for sink in self.cluster.sinks.values():
            if self.dice.random() < 0.7 and not watch.is_behind(sink.name, sink.ledgers):
                sink.stain(watch.holds_rows)
                sink.ledgers.clear()
                if not watch.rows_expired and self.dice.random() < 0.5:
                    sink.rows.clear()
                self.cluster.weather.note("sink lost its ledgers")

    async def _compact(self) -> None:
        if self._sinks_need_the_log():
            return
        self._compactions += 1
        for topic in self.cluster.broker.compacted():
            gone = await self.cluster.broker.compact_some(topic, self.dice.choice((0.3, 0.7, 1.0)))
            if gone:
                self.cluster.weather.note("compaction removed records")

    def _sinks_need_the_log(self) -> bool:
        """A sink that was rolled back has not caught up again: what has left the state by then is in the log alone."""
        return any(self.cluster.watch.is_behind(sink.name, sink.ledgers) for sink in self.cluster.sinks.values())

    async def _hang_transaction(self) -> None:
        """Somebody's transaction stays open in a changelog until it times out."""
        topics = [topic for topic in self.cluster.broker.compacted() if topic.endswith("-changelog")]
        if topics:
            tp = TopicPartition(self.dice.choice(topics), 0)
            producer = self.cluster.broker.producer("somebody else")
            await producer.fence()
            await producer.produce({tp: [OutRecord(b"\x00nobody", b"")]})
            if (worker := self._one()) is not None:
                self.cluster.kill(worker)

    async def _refuse(self) -> None:
        self.cluster.weather.refuse = 1

    async def _clock_back(self) -> None:
        if (worker := self._one()) is not None:
            worker.clock.skew_ms -= self.dice.randrange(3_600_000)

    # ---- disks

    async def _lose_disk(self) -> None:
        if (worker := self._one()) is not None:
            self.cluster.kill(worker, "and its disk is lost")
            self._seen.add(worker)
            self.cluster.start()

    async def _keep_disk(self) -> None:
        if (worker := self._one()) is not None:
            self._old = self.cluster.copy_disk(worker.disk)

    async def _old_disk(self) -> None:
        if self._old is not None:
            if (worker := self._one()) is not None:
                self.cluster.kill(worker)
            old, self._old = self._old, None
            self.cluster.say("an old copy of a disk is brought back")
            self.cluster.start(old)

    async def _disk_full(self) -> None:
        self.cluster.weather.disk_full = self.dice.randrange(1, 4)

    # ---- time, and people

    async def _days_pass(self) -> None:
        """Nobody ran for longer than tombstones are kept, and the log was compacted; some disk is older still."""
        if self._sinks_need_the_log():
            return
        if (worker := self._one()) is not None and self.dice.random() < 0.7:
            old = self.cluster.copy_disk(worker.disk)
            await asyncio.sleep(self.dice.uniform(1, 10))
            self._disks.append(old)
        async with self._operator():
            if self._sinks_need_the_log():
                return
            self.cluster.clock.skew_ms += 8 * DAY_MS
            self._compactions += 1
            for topic in self.cluster.broker.compacted():
                await self.cluster.broker.compact(topic)
            self.dice.shuffle(self._disks)

    async def _set_offsets(self) -> None:
        async with self._operator():
            if (at := self._read_up_to()) == 0:
                return
            tp = TopicPartition(self._source, 0)
            await self._set_group_offset(tp, at - 1)
            await self._must_refuse(UserError, "somebody has set the group's offsets")
            await self._set_group_offset(tp, at)

    async def _set_group_offset(self, tp: TopicPartition, at: int) -> None:
        producer = self.cluster.broker.producer("operator")
        await producer.fence()
        await producer.send_offsets({tp: Offset(at)}, self.cluster.group)
        await producer.end(commit=True)

    async def _grow_source(self) -> None:
        async with self._operator():
            count = self.cluster.broker.count(self._source)
            self.cluster.broker.set_partitions(self._source, count + 1)
            await self._must_refuse(UserError, "partitions")
            self.cluster.broker.set_partitions(self._source, count)

    async def _remake_source(self) -> None:
        """Deleted and made again, empty; then somebody brings the records back."""
        async with self._operator():
            if self._read_up_to() == 0:
                return
            backup = await self.cluster.back_up(self._source)
            await self.cluster.remake(self._source, {})
            await self._must_refuse(LogLost, self._source)
            await self.cluster.remake(self._source, backup)

    async def _lose_commits(self) -> None:
        """A commits topic is made anew, empty; then somebody brings its records back."""
        async with self._operator():
            # A task without any row of its own begins anew: there is nothing to see that it once was.
            watch, count = self.cluster.watch, self.cluster.broker.count(self._source)
            groups = [
                group
                for group, partition in watch.records
                if partition == 0
                and all(watch.holds_rows(group.removeprefix("table-"), number) for number in range(count))
            ]
            if not groups:
                return
            topic = f"{self.cluster.group}-{self.dice.choice(groups)}-commits"
            backup = await self.cluster.back_up(topic)
            await self.cluster.remake(topic, {})
            await self._must_refuse(LogLost, "has no commit record")
            await self.cluster.remake(topic, backup)

    async def _put_sink_ahead(self) -> None:
        """A sink knows of an epoch that the log does not have: the log was rolled back, or is another one."""
        async with self._operator():
            sink = self.dice.choice([*self.cluster.sinks.values(), None])
            if sink is None or not (owners := [owner for owner, at in sink.ledgers.items() if at.epoch > 0]):
                return
            owner = self.dice.choice(owners)
            ledger = sink.ledgers[owner]
            another = self.dice.random() < 0.5
            wrong = {"log_id": "another"} if another else {"epoch": ledger.epoch + 1_000}
            sink.ledgers[owner] = msgspec.structs.replace(ledger, **wrong)
            await self._must_refuse(LogLost, "another" if another else "log has lost")
            sink.ledgers[owner] = ledger

    def _read_up_to(self) -> int:
        """The committed position in partition 0 of the source."""
        record = self.cluster.watch.records.get((f"read-{self._source}", 0))
        return record.positions[self._source][f"{self._source}:0"] if record is not None else 0

    @contextlib.asynccontextmanager
    async def _operator(self) -> AsyncIterator[None]:
        """Nobody runs and nobody writes meanwhile."""
        self._hands_off = True
        self.feeding.clear()
        self.cluster.disarm()
        for worker in self.cluster.alive:
            self.cluster.kill(worker)
        self._account()
        await asyncio.sleep(16)  # open transactions time out
        try:
            yield
        finally:
            self._hands_off = False
            self.feeding.set()

    async def _start_and_wait(self) -> Worker:
        """Until the worker has ended."""
        worker = self.cluster.start(self._take_disk())
        self._seen.add(worker)
        for _ in range(600):
            if not worker.running:
                return worker
            await asyncio.sleep(0.2)
        self.cluster.watch.require(False, f"{worker.name} was to refuse to run, and goes on")
        await self.cluster.stop(worker)
        return worker

    async def _must_refuse(self, kind: type[WorkerFailure], words: str) -> None:
        """A worker that starts now stops with an error of this kind that has these words in it."""
        cluster = self.cluster
        before = cluster.weather.broker, cluster.weather.sink, cluster.weather.slow
        sinks = {sink: sink.down for sink in cluster.sinks.values()}
        cluster.weather.calm()
        for sink in sinks:
            sink.down = False
        worker = await self._start_and_wait()
        while worker.process.dead and worker.reason is None:  # it died at a step, which tells nothing
            self._disks.append(worker.remains or worker.disk)
            worker = await self._start_and_wait()
        fits = isinstance(worker.reason, kind) and words in str(worker.reason)
        cluster.watch.require(fits, f"{worker.name} was to stop with {kind.__name__} “…{words}…”: {worker.reason!r}")
        cluster.weather.note(f"refused to start: {kind.__name__}")
        self._disks.append(worker.remains or worker.disk)
        cluster.weather.broker, cluster.weather.sink, cluster.weather.slow = before
        for sink, down in sinks.items():
            sink.down = down
