"""What a user sees when something is wrong: bad records, bad plans, bad settings, a log or state that does not fit.

Here on the embedded transport; with real servers in `test_bad_input_servers` and `test_bad_input_kafka`. Workers as
processes of their own come from `workers`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import streamproc as sp
from streamproc.app import App
from streamproc.core.batch import RawBatch
from streamproc.core.clock import SystemClock
from streamproc.core.types import Offset, TopicPartition
from streamproc.state.rocksdb import RocksDBStore
from streamproc.transport.contract import Fetcher, TopicSpec
from streamproc.transport.embedded import EmbeddedTransport
from tests.apps import events_avsc, log, new_app, read_all, rows_of, running, until, write
from tests.workers import (
    HEAD,
    HOUR,
    PLAN,
    T0,
    TOPIC,
    event,
    last_words,
    record,
    refusal,
    start_worker,
    stop_worker,
    wait_for,
)


def counting(app: App, **event_time: Any) -> None:
    """Table ``sums``: events and their amounts by country and hour."""
    settings: dict[str, Any] = {"out_of_orderness": "1s", "bounded": True} | event_time
    events = app.topic("events", value_schema="event.avsc", event_time=sp.event_time("at", **settings))
    windowed = app.pipeline(events).group_by("country").window(sp.tumbling("1h"))
    windowed.agg(n=sp.count(), amount=sp.sum("amount")).table("sums")


def total(app: App, table: str = "sums") -> int:
    return sum(row["n"] for row in rows_of(app, table))


async def run_to_end(app: App) -> list[dict[str, Any]]:
    """The rows of ``sums`` once the bounded input is at its end."""
    async with running(app):
        await until(lambda: app.crashed or app.runtime.finished(), "the input's end")
        return rows_of(app, "sums")


# --- records


def test_broken_records_among_good_ones_are_dead_letters_with_their_reasons(tmp_path: Path) -> None:
    good = event(tmp_path)
    broken: list[tuple[bytes | None, str]] = [
        (good[:-3], "truncated, field at"),
        (b"\x07" + good[1:], "wrong magic byte 7"),
        (b"\x00\x00\x00\x27\x0f" + good[5:], "unknown schema id 9999"),
        (good + b"xyz", "trailing bytes: 3"),
        (good[:5] + b"\x0a" + good[6:], "union index 5 of 2, field id"),
        (b"", "no value"),
        (None, "no value"),
    ]
    values = [good, *(value for value, _ in broken), good]

    async def scenario() -> None:
        await write(tmp_path, "events", 2, [(p, record(value)) for value in values for p in (0, 1)])
        counting(app := new_app(tmp_path))
        async with running(app):
            await until(app.runtime.finished, "the input's end")
            assert total(app) == 4
            tasks = [task for task in app.runtime.tasks.values() if task.id.group == "read-events"]
            for task in tasks:
                assert task.committed_position(TopicPartition("events", task.id.partition)) == len(values)
            letters = await read_all(app.runtime.transport, "test-events-dead-letters")
        assert [(p, value) for p, _, value, _ in letters] == [(p, value) for p in (0, 1) for value, _ in broken]
        for at, (_, _, value, headers) in enumerate(letters):
            assert headers["sp-offset"] == str(at % len(broken) + 1).encode()
            assert headers["sp-topic"] == b"events"
            expected = broken[at % len(broken)][1]
            assert expected in headers["sp-reason"].decode() or value in (b"", None), headers

    asyncio.run(scenario())


def test_unusable_event_times_are_dead_letters_and_move_no_watermark(tmp_path: Path) -> None:
    unusable: list[tuple[int | None, str]] = [
        (None, "is missing"),
        ((1 << 63) - 1, "years 1 to 9999"),
        (-(1 << 63), "years 1 to 9999"),
        (9_214_646_400_000_000_000, "years 1 to 9999"),  # year 292 million
        (T0 + 2 * HOUR, "ahead of the record's timestamp"),
    ]

    async def scenario() -> None:
        values = [T0, *(at for at, _ in unusable), T0 + 60_000]
        await write(tmp_path, "events", 1, [(0, record(event(tmp_path, at))) for at in values])
        counting(app := new_app(tmp_path), bounded=False)
        async with running(app):
            await until(lambda: total(app) == 2, "both good records")
            (reader,) = (task for task in app.runtime.tasks.values() if task.id.group == "read-events")
            assert reader.work is not None
            assert reader.record is not None
            assert reader.record.watermarks["events"]["events:0"].watermark == T0 + 60_000 - 1_000 - 1
            letters = await read_all(app.runtime.transport, "test-events-dead-letters")
        assert len(letters) == len(unusable)
        for (_, _, _, headers), (_, reason) in zip(letters, unusable, strict=True):
            assert reason in headers["sp-reason"].decode()

    asyncio.run(scenario())


def test_times_of_1970_and_before_are_old_not_broken(tmp_path: Path) -> None:
    async def scenario() -> None:
        values = [-HOUR, 0, T0, 0, -1]
        await write(tmp_path, "events", 1, [(0, record(event(tmp_path, at))) for at in values])
        app = new_app(tmp_path)
        counting(app)
        async with running(app):
            await until(app.runtime.finished, "the input's end")
            assert sorted(row["n"] for row in rows_of(app, "sums")) == [1, 1, 1]
            late = await read_all(app.runtime.transport, "test-events-late")
            assert [headers["sp-offset"] for *_, headers in late] == [b"3", b"4"]
            assert await read_all(app.runtime.transport, "test-events-dead-letters") == []

    asyncio.run(scenario())


@pytest.mark.parametrize(("nulls", "counted", "dead"), [("dead_letter", 2, 2), ("pass", 4, 0)])
def test_a_null_in_the_dedupe_key(tmp_path: Path, nulls: Any, counted: int, dead: int) -> None:
    async def scenario() -> None:
        ids = ["a", None, "a", "b", None]
        await write(tmp_path, "events", 1, [(0, record(event(tmp_path, id=id))) for id in ids])
        app = new_app(tmp_path)
        events = app.topic("events", value_schema="event.avsc", event_time=sp.event_time("at", bounded=True))
        stream = app.pipeline(events).dedupe("id", within="1h", nulls=nulls)
        stream.group_by("country").window(sp.tumbling("1h")).agg(n=sp.count()).table("sums")
        async with running(app):
            await until(app.runtime.finished, "the input's end")
            assert total(app) == counted
            letters = await read_all(app.runtime.transport, "test-events-dead-letters")
        assert [headers["sp-reason"] for *_, headers in letters] == [b'null in dedupe key "id"'] * dead

    asyncio.run(scenario())


# --- outputs that the broker refuses


def test_a_broken_record_as_large_as_its_topic_takes_is_kept_whole(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(1_048_588 - 200)

    async def scenario() -> None:
        good = [(0, record(event(tmp_path))) for _ in range(3)]
        await write(tmp_path, "events", 1, [*good, (0, record(b"\x07" + noise)), *good])
        counting(app := new_app(tmp_path))
        async with running(app):
            await until(app.runtime.finished, "the input's end")
            assert total(app) == 6
            letters = await read_all(app.runtime.transport, "test-events-dead-letters")
        assert [value for _, _, value, _ in letters] == [b"\x07" + noise]

    asyncio.run(scenario())


def test_a_late_topic_that_takes_no_large_records_stops_the_worker_and_says_what_to_raise(tmp_path: Path) -> None:
    async def scenario() -> None:
        large = event(tmp_path, T0 - 9 * HOUR, country=random.Random(1).randbytes(20_000).hex())
        rows = [(0, record(event(tmp_path))), (0, record(large)), (0, record(event(tmp_path)))]
        await write(tmp_path, "events", 1, rows)
        async with log(tmp_path) as transport:
            await transport.create_topics([TopicSpec("late", 1, {"max.message.bytes": "10000"})])
        counting(app := new_app(tmp_path))
        app.declaration.tables[0].late.to("late")
        told = await refusal(app)
        assert "refused what task read-events:0 writes to late" in told
        assert "Raise max.message.bytes of that topic" in told
        async with log(tmp_path) as transport:
            assert await read_all(transport, "test-sums-changelog") == [], "no half of the epoch"

    asyncio.run(scenario())


# --- a backlog read out of step


class InTurn:
    """A fetcher that reads partition 0 to its end before it looks at partition 1."""

    def __init__(self, inner: Fetcher, first: TopicPartition, end: int) -> None:
        self._inner, self._first, self._end = inner, first, end
        self._held: dict[TopicPartition, Offset] = {}
        self._done = False

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        if self._done or tp.topic != self._first.topic or tp.partition == 0:
            self._inner.resume(tp, position)
        else:
            self._held[tp] = position

    async def get(self) -> RawBatch:
        batch = await self._inner.get()
        if batch.tp == self._first and batch.next_position >= self._end:
            self._done = True
            for tp, position in self._held.items():
                self._inner.resume(tp, position)
            self._held.clear()
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class OutOfStep(EmbeddedTransport):
    end: int

    def fetcher(self) -> Any:
        return InTurn(super().fetcher(), TopicPartition("events", 0), self.end)


@pytest.mark.parametrize("in_turn", [True, False])
def test_a_backlog_read_one_partition_after_the_other_makes_nothing_late(tmp_path: Path, in_turn: bool) -> None:
    rows = 2_000

    class Backlog(App):
        def make_transport(self) -> Any:
            transport = OutOfStep(tmp_path / "log", SystemClock())
            transport.end = rows
            return transport if in_turn else super().make_transport()

    async def scenario() -> None:
        now = T0 + rows * 60_000
        async with log(tmp_path) as transport:
            await transport.create_topics([TopicSpec("events", 2)])
            for p in (0, 1):
                values = [event(tmp_path, T0 + i * 60_000, country=f"{i % 7}") for i in range(rows)]
                await transport.send({TopicPartition("events", p): [record(value, now) for value in values]})
        app = Backlog(
            "test", broker=f"embedded://{tmp_path}/log", schemas=tmp_path / "schemas", commit_interval="20ms",
            web_enabled=False, datadir=tmp_path / "state", topic_disable_leader=True,
        )  # fmt: skip
        counting(app)
        async with running(app):
            await until(app.runtime.finished, "the input's end")
            found = {
                (row["country"], int(row["window_start"].timestamp() * 1000)): row["n"] for row in rows_of(app, "sums")
            }
            assert await read_all(app.runtime.transport, "test-events-late") == []
        expected = collections.Counter(
            (f"{i % 7}", (T0 + i * 60_000) // HOUR * HOUR) for i in range(rows) for _ in "01"
        )
        assert found == expected

    asyncio.run(scenario())


# --- topics, code and state that do not fit each other


def test_agents_over_topics_with_different_partition_counts_are_refused(tmp_path: Path) -> None:
    app = new_app(tmp_path)
    one, two = app.topic("one", partitions=2), app.topic("two", partitions=3)

    @app.agent(one)
    async def first(stream: Any) -> None:
        async for _ in stream:
            pass

    @app.agent(two)
    async def second(stream: Any) -> None:
        async for _ in stream:
            pass

    told = asyncio.run(refusal(app))
    assert "different partition counts: {'one': 2, 'two': 3}" in told
    assert "give the topics the same count, or use several apps" in told
    assert "test_bad_input.py:" in told


@pytest.mark.parametrize("topic", ["test-sums-repartition", "test-sums-changelog", "test-read-events-commits"])
def test_an_internal_topic_with_another_partition_count_is_refused(tmp_path: Path, topic: str) -> None:
    async def scenario() -> None:
        await write(tmp_path, "events", 2, [])
        async with log(tmp_path) as transport:
            await transport.create_topics([TopicSpec(topic, 5)])
        counting(app := new_app(tmp_path))
        told = await refusal(app)
        assert topic in told
        assert "5" in told
        assert "2" in told

    asyncio.run(scenario())


def test_changed_code_refuses_the_old_rows_and_names_the_way_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        await write(tmp_path, "events", 1, [(0, record(event(tmp_path))) for _ in range(3)])
        counting(first := new_app(tmp_path), bounded=False)
        async with running(first):
            await until(lambda: total(first) == 3, "the first three")
        await write(tmp_path, "events", 1, [(0, record(event(tmp_path))) for _ in range(4)])
        changed = new_app(tmp_path)
        events = changed.topic("events", value_schema="event.avsc", event_time=sp.event_time("at"))
        windowed = changed.pipeline(events).group_by("country").window(sp.tumbling("1h"))
        windowed.agg(n=sp.count(), amount=sp.max("amount")).table("sums")
        told = await refusal(changed)
        assert "Table 'sums' was built by other code" in told
        assert "streamproc reset" in told
        counting(undone := new_app(tmp_path), bounded=False)
        async with running(undone):
            await until(lambda: total(undone) == 7, "all seven: the refused start has taken nothing")

    asyncio.run(scenario())


def test_state_of_another_history_is_thrown_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        await write(tmp_path, "events", 1, [(0, record(event(tmp_path))) for _ in range(3)])
        counting(first := new_app(tmp_path))
        assert [row["n"] for row in await run_to_end(first)] == [3]

    async def another() -> None:
        await write(tmp_path, "events", 1, [(0, record(event(tmp_path, country="FR"))) for _ in range(2)])
        counting(second := new_app(tmp_path))
        assert [(row["country"], row["n"]) for row in await run_to_end(second)] == [("FR", 2)]

    asyncio.run(scenario())
    for file in tmp_path.glob("log*"):
        file.unlink()
    asyncio.run(another())


def _remount(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def test_a_state_folder_that_two_apps_share_costs_a_restore_and_no_wrong_row(tmp_path: Path) -> None:
    async def scenario() -> None:
        await write(tmp_path, "events", 1, [(0, record(event(tmp_path))) for _ in range(3)])
        for name in ("one", "two", "one"):
            counting(app := new_app(tmp_path, name))
            assert [row["n"] for row in await run_to_end(app)] == [3]

    asyncio.run(scenario())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_is_shown_and_all_is_right_once_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    async def scenario() -> None:
        rows = [event(tmp_path, T0, country=f"{i:0200}") for i in range(30_000)]
        async with log(tmp_path) as transport:
            await transport.create_topics([TopicSpec("events", 1)])
            await transport.send({TopicPartition("events", 0): [record(value) for value in rows]})
        counting(app := new_app(tmp_path, datadir=small_disk))
        async with running(app):

            def problems() -> list[str]:
                return [task.view.problem or "" for task in app.runtime.tasks.values()]

            await until(lambda: any("No space left" in problem for problem in problems()), "the full disk to show")
            await asyncio.to_thread(_remount, small_disk, "256m")
            await until(app.runtime.finished, "the input's end")
            assert total(app) == len(rows)
            assert not any(problems())

    asyncio.run(scenario())


# --- worker processes

MISTAKES = {
    "misspelt column": (HEAD + TOPIC + PLAN.replace("country", "contry"), ["job.py:", "'contry'", "Did you mean 'country'?"]),
    "not row-wise": (
        HEAD + TOPIC + PLAN.replace(".group_by", '.filter(pl.col("amount").cum_sum() > 1).group_by'),
        ["job.py:", "filter is not row-wise: cum_sum"],
    ),
    "topic missing": (
        HEAD + TOPIC.replace("partitions=2, ", "") + PLAN,
        ["Topic events does not exist.", 'app.topic("events", partitions=4', "kafka-topics.sh --create --topic events"],
    ),
    "schema file missing": (
        HEAD + TOPIC.replace("event.avsc", "evnt.avsc"),
        ["job.py:", "schemas/evnt.avsc", "Check the path"],
    ),
    "schema folder missing": (HEAD.replace('"schemas"', '"schemes"') + TOPIC + PLAN, ["job.py:", "schemes/event.avsc"]),
    "setting": (HEAD.replace('"50ms"', '"fast"'), ["commit_interval='fast' is not a duration", '"90s"']),
    "broker scheme": (HEAD.replace("embedded://log", "kafak://me:geheim@localhost") + TOPIC + PLAN, ["kafak://localhost", "kafka://HOST:PORT"]),
    "broker port": (
        HEAD.replace("embedded://log", "kafka://me:geheim@localhost:port") + TOPIC + PLAN,
        ["job.py:", "The broker's URL is none", "kafka://HOST:PORT"],
    ),
    "not an aggregate": (HEAD + TOPIC + PLAN.replace("sp.count()", "3"), ["job.py:", "n=3 is not an aggregate"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_users_file_ends_the_worker_with_its_line_and_remedy(tmp_path: Path, mistake: str) -> None:
    code, facts = MISTAKES[mistake]
    told = last_words(tmp_path, code)
    for fact in facts:
        assert fact in told
    assert "geheim" not in told


def test_a_broker_that_is_down_at_start_ends_the_worker_within_its_limit(tmp_path: Path) -> None:
    code = "from streamproc.core import limits\nlimits.RETRY_TOTAL_S = 3.0\n" + HEAD + TOPIC + PLAN
    began = time.monotonic()
    told = last_words(tmp_path, code, 60.0, BROKER="kafka://127.0.0.1:1")
    assert 3 < time.monotonic() - began < 3 + 20
    assert "No Kafka broker answers at 127.0.0.1:1" in told
    assert "Start it, or correct the app's broker setting." in told


@pytest.mark.parametrize(
    ("ids", "fact"),
    [("{", "ids.json"), (None, "has no ids.json"), ('{"1": "gone.avsc"}', "id 1 names gone.avsc, which is not in the folder")],
)  # fmt: skip
def test_a_broken_schema_folder_ends_the_worker(tmp_path: Path, ids: str | None, fact: str) -> None:
    folder = events_avsc(tmp_path)
    (folder / "ids.json").unlink() if ids is None else (folder / "ids.json").write_text(ids)
    assert fact in last_words(tmp_path, HEAD + TOPIC + PLAN)


def test_a_mistake_that_is_not_ours_keeps_its_traceback(tmp_path: Path) -> None:
    worker = start_worker(tmp_path, HEAD + "1 / 0\n")
    assert worker.wait(30) == 1
    assert "ZeroDivisionError" in (tmp_path / "out").read_text()


def test_a_log_or_state_folder_of_another_process_ends_the_worker(tmp_path: Path) -> None:
    async def holds_log() -> str:
        async with log(tmp_path):
            return await asyncio.to_thread(last_words, tmp_path, HEAD + TOPIC + PLAN)

    assert "in use by another process" in asyncio.run(holds_log())
    folder = tmp_path / "state" / "v1" / "tables" / "tasks"
    folder.mkdir(parents=True)
    store = RocksDBStore(folder / "table-sums-0")
    try:
        told = last_words(tmp_path, HEAD + TOPIC + PLAN)
    finally:
        store.close()
    assert "table-sums-0" in told
    assert "another" in told


COUNT = """
counts = app.Table("counts", default=int)
copies = app.topic("copies", partitions=2)

@app.agent(events, name="count")
async def count(stream):
    async for event in stream:
        if not pathlib.Path("first").exists():
            pathlib.Path("first.new").write_text(repr(time.time()))
            pathlib.Path("first.new").rename("first")
        counts[event.country] += 1
        time.sleep(0.0005)
        await copies.send(key=event.id, value=event.id)
"""


async def write_events(folder: Path, count: int, first: int = 0) -> None:
    async with log(folder) as transport:
        await transport.create_topics([TopicSpec("events", 2)])
        for p in (0, 1):
            values = [event(folder, T0 + i, id=f"{p}-{i}", country="ABC"[i % 3]) for i in range(first, first + count)]
            await transport.send({TopicPartition("events", p): [record(value) for value in values]})


async def counted(folder: Path) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """What a run of `COUNT` and `PLAN` over ``folder`` leaves: agent's table, pipeline's table, the sent ids."""
    namespace: dict[str, Any] = {"__name__": "job"}
    with contextlib.chdir(folder):
        exec((folder / "job.py").read_text().replace("time.sleep(0.0005)", "pass"), namespace)
        app: App = namespace["app"]
        app.conf.web_enabled = False
        async with running(app):
            tp = [TopicPartition("events", p) for p in (0, 1)]
            ends = await app.runtime.transport.offsets(tp)

            def done() -> bool:
                tasks = [task for task in app.runtime.tasks.values() if not task.id.group.startswith("table-")]
                at = [task.committed_position(tp[task.id.partition]) for task in tasks]
                return len(at) == 4 and all(p == ends[tp[t.id.partition]].end for p, t in zip(at, tasks, strict=True))

            await until(done, "the agent's and the pipeline's end")
            rows = sum(ends[one].end for one in tp)
            await until(lambda: total(app) == rows, "the pipeline's table")
            by_agent: dict[str, int] = {}
            for task in app.runtime.tasks.values():
                for country, n in task.overlay("counts").items() if task.id.group == "agents" else ():
                    by_agent[country] = by_agent.get(country, 0) + n
            sent = [
                str((value or b"").decode()).strip('"')
                for *_, value, _ in await read_all(app.runtime.transport, "copies")
            ]
            return by_agent, {row["country"]: row["n"] for row in rows_of(app, "sums")}, sent


def right(count: int) -> tuple[dict[str, int], list[str]]:
    """The plain computation over `write_events(count)`."""
    by_country = collections.Counter("ABC"[i % 3] for i in range(count) for _ in "01")
    return dict(by_country), sorted(f"{p}-{i}" for p in (0, 1) for i in range(count))


@pytest.mark.parametrize("seed", [1])
def test_killed_three_times_at_random_moments_equals_the_plain_computation(tmp_path: Path, seed: int) -> None:
    rows, dice = 4_000, random.Random(seed)
    asyncio.run(write_events(tmp_path, rows))
    for _ in range(3):
        (tmp_path / "first").unlink(missing_ok=True)
        worker = start_worker(tmp_path, HEAD + TOPIC + PLAN + COUNT)
        wait_for(tmp_path / "first", worker)
        time.sleep(dice.uniform(0.0, 0.6))
        worker.kill()
        assert worker.wait(10) == -signal.SIGKILL, (tmp_path / "out").read_text()
    by_agent, by_pipeline, sent = asyncio.run(counted(tmp_path))
    countries, ids = right(rows)
    assert by_agent == countries
    assert by_pipeline == countries
    assert sorted(sent) == ids


def test_sigterm_commits_what_is_done_and_leaves_within_seconds(tmp_path: Path) -> None:
    rows = 4_000
    asyncio.run(write_events(tmp_path, rows))
    began = time.time()
    worker = start_worker(tmp_path, HEAD + TOPIC + PLAN + COUNT)
    wait_for(tmp_path / "first", worker)
    print(f"start to first record: {float((tmp_path / 'first').read_text()) - began:.2f} s")
    time.sleep(0.4)
    asked = time.monotonic()
    assert stop_worker(worker) == 0, (tmp_path / "out").read_text()
    assert time.monotonic() - asked < 5
    assert "Traceback" not in (tmp_path / "out").read_text()

    async def committed() -> int:
        async with log(tmp_path) as transport:
            return len(await read_all(transport, "copies"))

    assert 0 < asyncio.run(committed()) < 2 * rows
    by_agent, by_pipeline, sent = asyncio.run(counted(tmp_path))
    countries, ids = right(rows)
    assert (by_agent, by_pipeline, sorted(sent)) == (countries, countries, ids)


def test_from_start_to_the_first_record_takes_two_seconds_with_warm_caches(tmp_path: Path) -> None:
    asyncio.run(write_events(tmp_path, 10))
    took = []
    for _ in range(2):  # the first warms the caches
        (tmp_path / "first").unlink(missing_ok=True)
        asyncio.run(write_events(tmp_path, 1, first=10))
        began = time.time()
        worker = start_worker(tmp_path, HEAD + TOPIC + PLAN + COUNT)
        wait_for(tmp_path / "first", worker)
        took.append(float((tmp_path / "first").read_text()) - began)
        stop_worker(worker)
    print(f"start to first record: {took[-1]:.2f} s (warm)")
    assert took[-1] < 5
