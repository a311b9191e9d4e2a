"""A standby keeps a warm store of a task it does not own: it writes nothing, is never ahead, and costs the owner nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamproc.app import App
from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.clock import SystemClock
from streamproc.core.errors import BrokerUnavailable, InvariantBroken
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.runtime.standby import Standby, StandbyEnvironment, Standbys
from streamproc.runtime.start import GroupPlan
from streamproc.state.contract import Store, StoreMeta, Writes
from streamproc.state.memory import MemoryStore
from streamproc.state.rocksdb import RocksDBStore
from streamproc.transport.contract import OutRecord, PartitionOffsets, TopicSpec, Transport
from streamproc.transport.embedded import EmbeddedTransport
from tests.apps import new_app, running, until

pytestmark = pytest.mark.slow

KEYS = 50


# ---- two workers on one log


class Shared:
    """A started transport that several apps use; none of them starts or stops it."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


@asynccontextmanager
async def shared_log(folder: Path) -> AsyncIterator[Shared]:
    transport = EmbeddedTransport(folder / "log", SystemClock(), standby_replicas=1)
    await transport.start()
    try:
        yield Shared(transport)
    finally:
        await transport.stop()


def worker(folder: Path, name: str, transport: Any, **options: Any) -> App:
    """It counts values in table ``counts``; its state is below ``folder/name``."""
    app = new_app(folder, datadir=folder / name, **{"table_standby_replicas": 1, **options})
    app.make_transport = lambda: transport  # type: ignore[method-assign]
    counts = app.Table("counts", default=int)

    @app.agent(app.topic("in", partitions=2), name="count")
    async def count(stream: Any) -> None:
        async for value in stream:
            counts[value % KEYS] += 1

    return app


def values(numbers: Collection[int], partitions: int = 2) -> dict[TopicPartition, list[OutRecord]]:
    """Value v lies in partition v % 2."""
    found: dict[TopicPartition, list[OutRecord]] = {TopicPartition("in", p): [] for p in range(partitions)}
    for value in numbers:
        found[TopicPartition("in", value % partitions)].append(OutRecord(b"k", json.dumps(value).encode()))
    return {tp: records for tp, records in found.items() if records}


def done(*apps: App) -> int:
    """Records committed, told by who holds their partitions."""
    records = [task.record for app in apps for task in app.runtime.tasks.values() if task.record is not None]
    return sum(at for record in records for of in record.positions.values() for at in of.values())


def counted(*apps: App) -> dict[int, int]:
    found = {key: max(app.runtime.committed("counts", key, 0) for app in apps) for key in range(KEYS)}
    return {key: count for key, count in found.items() if count}


def warm(app: App, owner: App) -> bool:
    """All standbys of ``app`` have what ``owner``, whose tasks they are, committed last."""
    standbys = app.runtime.standbys.running.values()
    epochs = {task.id: task.record.epoch for task in owner.runtime.tasks.values() if task.record is not None}
    return bool(standbys) and all(standby.epoch == epochs.get(standby.id) for standby in standbys)


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STANDBY_POLL_S", 0.02)


def test_each_task_is_warm_on_the_other_worker_and_a_moved_task_restores_only_its_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)

    async def scenario() -> None:
        async with shared_log(tmp_path) as transport:
            one, two = worker(tmp_path, "one", transport), worker(tmp_path, "two", transport)
            await one.start()
            async with running(two):
                await until(lambda: len(one.runtime.tasks) == len(two.runtime.tasks) == 1, "one task each")
                assert one.runtime.standbys.running.keys() == two.runtime.tasks.keys()
                assert two.runtime.standbys.running.keys() == one.runtime.tasks.keys()
                (moved,) = one.runtime.tasks
                await transport.send(values(range(3_000)))
                await until(lambda: done(one, two) == 3_000, "all of it")
                await until(lambda: warm(two, one), "the standby")
                await one.stop()
                await until(lambda: moved in two.runtime.tasks and done(two) == 3_000, "the task on the other worker")
                restored = two.runtime.tasks[moved].view.restore
                assert restored is not None
                assert restored.start > 0, "it went on from what the standby had"
                assert two.runtime.standbys.running == {}, "nobody is left to keep warm for"
                assert counted(two) == Counter(value % KEYS for value in range(3_000))

    asyncio.run(scenario())


def test_a_task_that_is_given_away_leaves_a_store_that_goes_on_as_a_standby(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    wiped: list[str] = []
    wipe = RocksDBStore.wipe

    def told(store: RocksDBStore) -> None:
        wiped.append(str(store.path.relative_to(tmp_path)))
        wipe(store)

    monkeypatch.setattr(RocksDBStore, "wipe", told)

    async def scenario() -> None:
        async with shared_log(tmp_path) as transport:
            one, two = worker(tmp_path, "one", transport), worker(tmp_path, "two", transport)
            async with running(one):
                await until(lambda: len(one.runtime.tasks) == 2, "both tasks")
                await transport.send(values(range(500)))
                await until(lambda: done(one) == 500, "all")
                wiped.clear()
                async with running(two):
                    await until(lambda: len(two.runtime.tasks) == 1, "the task on the other worker")
                    await transport.send(values(range(500, 600)))
                    await until(lambda: done(one, two) == 600 and warm(one, two), "some more")
                await until(lambda: done(one) == 600, "the task, back")
                assert counted(one) == Counter(value % KEYS for value in range(600))
        assert not [path for path in wiped if path.startswith("one")]

    asyncio.run(scenario())


def test_without_the_setting_there_is_no_standby(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with shared_log(tmp_path) as transport:
            one, two = (worker(tmp_path, name, transport, table_standby_replicas=0) for name in ("one", "two"))
            async with running(one), running(two):
                await until(lambda: len(one.runtime.tasks) == len(two.runtime.tasks) == 1, "one task each")
                assert one.runtime.standbys.running == two.runtime.standbys.running == {}

    asyncio.run(scenario())
    assert new_app(tmp_path).conf.table_standby_replicas == 0


@pytest.mark.parametrize("seed", range(3))
def test_tasks_that_move_to_and_fro_between_standbys_count_every_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    quick(monkeypatch)
    dice = random.Random(seed)

    async def scenario() -> None:
        sent = 0
        async with shared_log(tmp_path) as transport:
            apps: dict[str, App] = {}
            for step in range(8):
                name = dice.choice(("one", "two")) if len(apps) == 2 else ("two" if "one" in apps else "one")
                if len(apps) == 2:
                    await apps.pop(name).stop()
                else:
                    apps[name] = worker(tmp_path, name, transport)
                    await apps[name].start()
                count = dice.randrange(1, 400)
                await transport.send(values(range(sent, sent + count)))
                sent += count
                if step == 7 or dice.random() < 0.7:
                    await until(lambda: done(*apps.values()) == sent, f"step {step}")  # noqa: B023 - waited for here
            assert counted(*apps.values()) == Counter(value % KEYS for value in range(sent))
            for app in apps.values():
                assert not app.crashed
                assert all(standby.problem is None for standby in app.runtime.standbys.running.values())
                await app.stop()

    asyncio.run(scenario())


# ---- one standby on the log of an app that has stopped


class ReadOnly:
    """All of a transport that a standby has; with ``hidden``, the last offsets of a topic are not stable yet."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.hidden: dict[str, int] = {}
        self.failure: Exception | None = None
        self.reading = self.reading_max = 0

    async def offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, PartitionOffsets]:
        if self.failure is not None:
            raise self.failure
        found = await self._inner.offsets(tps)
        return {tp: at._replace(stable=Offset(at.stable - self.hidden.get(tp.topic, 0))) for tp, at in found.items()}

    async def read(self, tp: TopicPartition, start: Offset, stop: Offset) -> AsyncIterator[RawBatch]:
        self.reading += 1
        self.reading_max = max(self.reading, self.reading_max)
        try:
            async for batch in self._inner.read(tp, start, stop):
                await asyncio.sleep(0)
                yield batch
        finally:
            self.reading -= 1


class MovedClock:
    """Time goes on by what is slept, so that a sleep takes none."""

    def __init__(self) -> None:
        self.time_s = SystemClock().now_ms() / 1000
        self.slept: list[float] = []

    def now_ms(self) -> int:
        return round(self.time_s * 1000)

    def monotonic_s(self) -> float:
        return self.time_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time_s += seconds
        await asyncio.sleep(0)


class Bench:
    """A standby of task 0 over the log below ``folder``, which an app has filled, and the store it keeps."""

    def __init__(self, folder: Path, plan: GroupPlan, transport: Transport) -> None:
        self.log, self.transport, self.clock = transport, ReadOnly(transport), MovedClock()
        self.plan, self.folder = plan, folder / "standby"
        self.store: Store = MemoryStore()
        self.turns = asyncio.Semaphore(limits.STANDBY_READS_MAX)

    def standby(self, open_store: Callable[[Path], Store] | None = None, partition: int = 0) -> Standby:
        env = StandbyEnvironment(
            self.transport, self.clock, open_store or (lambda folder: self.store), lambda task: self.folder, self.turns  # type: ignore[arg-type]
        )  # fmt: skip
        return Standby(TaskId("agents", partition), self.plan, env)

    async def run_until(self, condition: Callable[[Standby], object], standby: Standby | None = None) -> Standby:
        """Run a standby until ``condition``, then stop it as the runtime does."""
        standby = standby or self.standby()
        run = asyncio.create_task(standby.run())
        await until(lambda: run.done() or condition(standby), "the standby", 5)
        run.cancel()
        await asyncio.wait([run])
        if not run.cancelled() and (failure := run.exception()) is not None:
            raise failure
        return standby

    def rows(self) -> dict[bytes, bytes]:
        return dict(self.store.scan(b"", None))

    async def commits(self) -> int:
        """The epoch of the last commit record."""
        return int(json.loads([row async for row in self._values()][-1])["epoch"])

    async def _values(self) -> AsyncIterator[bytes]:
        tp = TopicPartition(self.plan.commits_topic, 0)
        ends = (await self.log.offsets([tp]))[tp]
        async for batch in self.log.read(tp, ends.begin, ends.stable):
            for row in range(len(batch)):
                yield batch.value(row) or b""


def on_a_log(folder: Path, scenario: Callable[[Bench], Any], numbers: int = 2_000, epochs: int = 4) -> None:
    """Run ``scenario`` on a log that holds ``numbers`` counted values in several epochs."""

    async def play() -> None:
        plan: GroupPlan | None = None
        async with shared_log(folder) as transport:
            async with running(app := worker(folder, "owner", transport)):
                await until(lambda: len(app.runtime.tasks) == 2, "its tasks")
                for step in range(epochs):
                    await transport.send(values(range(step * numbers // epochs, (step + 1) * numbers // epochs)))
                    await until(lambda: done(app) == (step + 1) * numbers // epochs, "all")  # noqa: B023
                plan = app.runtime.groups["agents"].plan
            await scenario(Bench(folder, plan, transport))

    asyncio.run(play())


def test_a_standby_holds_what_the_owner_holds(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        standby = await bench.run_until(lambda standby: standby.behind == 0)
        assert standby.progress is not None
        assert standby.progress.done
        meta = bench.store.meta()
        assert meta is not None
        assert len(bench.rows()) == KEYS // 2
        assert meta.epoch == await bench.commits()
        (topic,) = meta.applied
        ends = await bench.log.offsets([TopicPartition(topic, 0)])
        assert meta.applied == {topic: ends[TopicPartition(topic, 0)].stable}

    on_a_log(tmp_path, scenario)


@pytest.mark.parametrize(
    "foreign",
    [
        lambda meta: StoreMeta("another", meta.epoch, meta.applied, meta.timestamp_ms),
        lambda meta: StoreMeta(meta.log_id, meta.epoch + 1, meta.applied, meta.timestamp_ms),
        lambda meta: StoreMeta(meta.log_id, meta.epoch, meta.applied, meta.timestamp_ms - limits.DELETE_RETENTION_MS),
        lambda meta: StoreMeta(meta.log_id, meta.epoch, dict.fromkeys(meta.applied, 10**6), meta.timestamp_ms),
    ],
    ids=["of another history", "ahead of the commit record", "too old", "outside of the log"],
)
def test_a_store_that_a_task_would_wipe_a_standby_wipes(
    tmp_path: Path, foreign: Callable[[StoreMeta], StoreMeta]
) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.run_until(lambda standby: standby.behind == 0)
        meta, rows = bench.store.meta(), bench.rows()
        assert meta is not None
        bench.store.write(Writes(puts={b"stray": b"row"}), foreign(meta))
        await bench.run_until(lambda standby: standby.behind == 0 and bench.rows() == rows)
        assert bench.store.meta() == meta or bench.store.meta().applied == meta.applied  # type: ignore[union-attr]

    on_a_log(tmp_path, scenario)


def test_a_commit_whose_marker_is_under_way_neither_wipes_the_store_nor_is_run_ahead_of(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        commits = bench.plan.commits_topic
        await bench.run_until(lambda standby: standby.behind == 0)
        full, rows = bench.store.meta(), bench.rows()
        assert full is not None
        bench.transport.hidden = {commits: 2}  # the last record, and its marker
        # A store that was the owner's until now is an epoch ahead of what can be read.
        old = StoreMeta(full.log_id, full.epoch, full.applied, full.timestamp_ms - 2 * limits.STANDBY_FRESH_MS)
        bench.store.write(Writes(), old)
        standby = await bench.run_until(lambda _: len(bench.clock.slept) > 20)
        assert bench.store.meta() == old, "it waits"
        assert bench.rows() == rows
        # And a new one does not take rows of an epoch whose commit record it cannot see.
        bench.store = MemoryStore()
        standby = await bench.run_until(lambda standby: standby.problem)
        assert standby.problem is not None
        assert "ahead of the commit" in standby.problem
        seen = bench.store.meta()
        assert seen is None or seen.epoch < full.epoch
        bench.transport.hidden = {}
        standby = await bench.run_until(lambda standby: standby.behind == 0)
        assert standby.problem is None
        assert bench.rows() == rows

    on_a_log(tmp_path, scenario)


def test_nothing_committed_is_nothing_to_keep_warm(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        specs = [TopicSpec(name.replace("test-", "new-"), 1) for name in
                 (bench.plan.commits_topic, *(table.changelog for table in bench.plan.tables))]  # fmt: skip
        await bench.log.create_topics(specs)
        bench.plan = GroupPlan("agents", "new", {"in": 1}, {}, bench.plan.tables)
        opened: list[Path] = []

        def open_store(folder: Path) -> Store:
            opened.append(folder)
            return bench.store

        await bench.run_until(lambda _: len(bench.clock.slept) > 3, bench.standby(open_store))
        assert opened == []

    on_a_log(tmp_path, scenario, numbers=10, epochs=1)


def test_reading_is_paced_and_an_idle_standby_only_keeps_its_store_young(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STANDBY_BYTES_PER_S_MAX", 1_000)

    async def scenario(bench: Bench) -> None:
        began_s = bench.clock.time_s
        standby = await bench.run_until(lambda standby: standby.behind == 0)
        assert standby.progress is not None
        assert bench.clock.time_s - began_s > 5, "some kilobytes at a kilobyte a second"
        written: list[int] = []
        write, store = bench.store.write, bench.store

        def told(writes: Writes, meta: StoreMeta) -> None:
            assert not writes.puts
            written.append(meta.timestamp_ms)
            write(writes, meta)

        store.write = told  # type: ignore[method-assign]
        bench.clock.slept.clear()
        await bench.run_until(lambda _: len(bench.clock.slept) > 300)
        assert set(bench.clock.slept) == {limits.STANDBY_POLL_S}
        assert abs(len(written) - len(bench.clock.slept) / 61) <= 1, "once a minute"

    on_a_log(tmp_path, scenario)


def test_only_so_many_standbys_of_a_worker_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(bench: Bench) -> None:
        standbys = [bench.standby(lambda folder: MemoryStore(), partition % 2) for partition in range(8)]
        runs = [asyncio.create_task(standby.run()) for standby in standbys]
        await until(lambda: all(standby.behind == 0 for standby in standbys), "all of them")
        for run in runs:
            run.cancel()
        await asyncio.wait(runs)
        assert bench.transport.reading_max == limits.STANDBY_READS_MAX
        assert bench.transport.reading == 0

    on_a_log(tmp_path, scenario)


def test_a_standby_stopped_anywhere_frees_its_folder_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RESTORE_WRITE_BYTES_MAX", 200)

    async def scenario(bench: Bench) -> None:
        for turns in range(1, 60, 4):
            run = asyncio.create_task(bench.standby(RocksDBStore).run())
            for _ in range(turns):
                await asyncio.sleep(0)
            run.cancel()
            await asyncio.wait([run])
            store = RocksDBStore(bench.folder)  # `UserError` if somebody held it
            meta = store.meta()
            assert meta is None or meta.epoch <= await bench.commits()
            store.close()
        await bench.run_until(lambda standby: standby.behind == 0, bench.standby(RocksDBStore))
        bench.store = RocksDBStore(bench.folder)
        assert len(bench.rows()) == KEYS // 2
        bench.store.close()
        assert bench.transport.reading == 0

    on_a_log(tmp_path, scenario)


def test_what_goes_wrong_is_told_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FullDisk(MemoryStore):
        def write(self, writes: Writes, meta: StoreMeta) -> None:
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(writes, meta)

    full = [True]

    async def scenario(bench: Bench) -> None:
        bench.store = FullDisk()
        standby = bench.standby()
        run = asyncio.create_task(standby.run())
        await until(lambda: "does not come forward" in caplog.text, "the log")
        assert "No space left" in (standby.problem or "")
        full.clear()
        await until(lambda: standby.behind == 0 and standby.problem is None, "the end")
        bench.transport.failure = BrokerUnavailable("the broker is down")
        await until(lambda: standby.problem, "the outage")
        bench.transport.failure = None
        await until(lambda: standby.problem is None, "the broker")
        run.cancel()
        await asyncio.wait([run])
        assert max(bench.clock.slept) <= limits.STANDBY_RETRY_S_MAX

    on_a_log(tmp_path, scenario)


def test_a_bug_in_a_standby_is_not_kept_quiet(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        heard: list[BaseException] = []
        standbys = Standbys(heard.append)
        bench.transport.failure = InvariantBroken("a bug.")
        standbys.start(bench.standby())
        await until(lambda: heard, "the bug")
        await standbys.keep(())
        assert standbys.running == {}
        assert isinstance(heard[0], InvariantBroken)

    on_a_log(tmp_path, scenario, numbers=10, epochs=1)


def test_what_is_kept_goes_on_and_what_is_not_is_closed(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        closed: list[str] = []

        class Closing(MemoryStore):
            def close(self) -> None:
                closed.append("closed")

        standbys = Standbys(lambda failure: None)
        first, second = bench.standby(lambda _: Closing(), 0), bench.standby(lambda _: Closing(), 1)
        standbys.start(first)
        standbys.start(second)
        await until(lambda: first.behind == second.behind == 0, "both")
        await standbys.keep({first.id})
        assert closed == ["closed"]
        assert standbys.running == {first.id: first}
        standbys.start(bench.standby(lambda _: Closing(), 0))
        assert standbys.running == {first.id: first}, "there is one already"
        await standbys.keep(())
        assert len(closed) == 2

    on_a_log(tmp_path, scenario, numbers=10, epochs=1)
