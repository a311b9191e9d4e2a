"""The embedded transport passes the suite of all transports, and keeps what only a file promises."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.register_assert_rewrite("contract.transport_kit", "contract.transport_suite")

from contract.transport_kit import read_values, rows_of  # noqa: E402
from contract.transport_suite import OpenTransport, TransportContract  # noqa: E402

from streamproc.core.clock import Clock, SystemClock  # noqa: E402
from streamproc.core.errors import BrokerUnavailable, ProduceRefused, ProducerFenced, UserError  # noqa: E402
from streamproc.core.limits import COMPACT_BYTES_MIN, TRANSACTION_TIMEOUT_MS  # noqa: E402
from streamproc.core.types import Offset, TopicPartition  # noqa: E402
from streamproc.transport.contract import OutRecord, TopicSpec  # noqa: E402
from streamproc.transport.embedded import EmbeddedTransport  # noqa: E402


class EmbeddedLog:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.transport = EmbeddedTransport(path, SystemClock(), synchronous="NORMAL")

    async def reopen(self) -> EmbeddedTransport:
        await self.transport.stop()
        self.transport = EmbeddedTransport(self._path, SystemClock(), synchronous="NORMAL")
        await self.transport.start()
        return self.transport


@pytest.fixture
def open_transport(tmp_path: Path) -> OpenTransport:
    @asynccontextmanager
    async def opened() -> AsyncIterator[EmbeddedLog]:
        log = EmbeddedLog(tmp_path / "log.sqlite")
        await log.transport.start()
        yield log
        await log.transport.stop()

    return opened


class TestEmbedded(TransportContract):
    """Every test of the contract."""


class ManualClock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def now_ms(self) -> int:
        return round(self.now_s * 1000)

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        woken = asyncio.Event()
        self._sleepers.append((self.now_s + seconds, woken))
        await woken.wait()

    async def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for due_s, woken in self._sleepers:
            if due_s <= self.now_s:
                woken.set()
        for _ in range(5):
            await asyncio.sleep(0)


@asynccontextmanager
async def embedded(path: Path, clock: Clock | None = None) -> AsyncIterator[EmbeddedTransport]:
    transport = EmbeddedTransport(path, clock or SystemClock(), synchronous="NORMAL")
    await transport.start()
    try:
        yield transport
    finally:
        await transport.stop()


def execute(path: Path, sql: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(sql)
        db.commit()


def run(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


ONE, TWO = TopicPartition("t", 0), TopicPartition("t", 1)
TOPIC = TopicSpec("t", 2)
CHILD = """
import asyncio, sys
from pathlib import Path
from streamproc.core.clock import SystemClock
from streamproc.core.types import TopicPartition
from streamproc.transport.contract import OutRecord, TopicSpec
from streamproc.transport.embedded import EmbeddedTransport

async def main():
    transport = EmbeddedTransport(Path(sys.argv[1]), SystemClock())
    await transport.start()
    await transport.create_topics([TopicSpec("t", 2)])
    one, two = TopicPartition("t", 0), TopicPartition("t", 1)
    producer = transport.producer("task")
    await producer.fence()
    for number in range(1_000_000):
        record = [OutRecord(b"k", b"%d" % number)]
        await producer.produce({one: record, two: record})
        await producer.send_offsets({one: number + 1}, "group")
        await producer.end(commit=True)
        await producer.produce({one: [OutRecord(b"k", b"aborted")]})
        await producer.end(commit=False)
        await producer.produce({two: [OutRecord(b"k", b"open")]})
        print(number, flush=True)
        await producer.fence()

asyncio.run(main())
"""


@pytest.mark.parametrize("enough", [1, 7, 40])
def test_after_a_kill_everything_is_as_of_the_last_commit(tmp_path: Path, enough: int) -> None:
    path = tmp_path / "log.sqlite"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    for line in child.stdout:
        if int(line) >= enough:
            break
    child.send_signal(signal.SIGKILL)
    printed = [int(line), *map(int, child.stdout.read().split())]
    child.wait()

    async def scenario() -> None:
        async with embedded(path) as transport:
            values = [await read_values(transport, tp) for tp in (ONE, TWO)]
            assert values[0] == values[1] == [str(number) for number in range(len(values[0]))]
            assert len(values[0]) > printed[-1]
            assert await transport.group_offsets("group", [ONE]) == {ONE: len(values[0])}
            assert all(offsets.stable == offsets.end for offsets in (await transport.offsets([ONE, TWO])).values())
            producer = transport.producer("task")
            await producer.fence()
            await producer.produce({ONE: [OutRecord(b"k", b"next")]})
            await producer.end(commit=True)
            assert (await read_values(transport, ONE))[-1] == "next"

    run(scenario)


def test_a_second_process_is_told_which_file_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "log.sqlite"

    async def scenario() -> None:
        async with embedded(path):
            command = [sys.executable, "-c", CHILD, str(path)]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
            assert done.returncode != 0
            assert "UserError" in done.stderr
            assert f"{path} is in use by another process" in done.stderr
            with pytest.raises(UserError, match="in use"):
                await EmbeddedTransport(path, SystemClock()).start()
        async with embedded(path):
            pass

    run(scenario)


def test_files_of_something_else_are_refused_and_left_alone(tmp_path: Path) -> None:
    text, other, newer, damaged = (tmp_path / name for name in ("text", "other", "newer", "damaged"))
    text.write_bytes(b"not a database, but longer than its header would be" * 99)
    execute(other, "CREATE TABLE mine (id)")

    async def scenario() -> None:
        for path in (newer, damaged):
            async with embedded(path) as transport:
                await transport.create_topics([TOPIC])
        execute(newer, "PRAGMA user_version=99")
        damaged.write_bytes(damaged.read_bytes()[:5_000])
        refusals = {text: "no SQLite file", other: "not an embedded log", newer: "99", damaged: "damaged"}
        for path, said in refusals.items():
            before = path.read_bytes()
            with pytest.raises(UserError, match=said) as refused:
                await EmbeddedTransport(path, SystemClock()).start()
            assert str(path) in str(refused.value)
            assert path.read_bytes() == before
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(UserError, match="cannot be opened"):
            await EmbeddedTransport(tmp_path / "file" / "log.sqlite", SystemClock()).start()

    run(scenario)


def test_a_folder_gets_a_file_of_its_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with embedded(tmp_path) as transport:
            assert transport.path == tmp_path / "log.sqlite"
        async with embedded(tmp_path / "new" / "deep.sqlite"):
            assert (tmp_path / "new" / "deep.sqlite").exists()

    run(scenario)


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "log.sqlite"
        async with embedded(path) as transport:
            await transport.create_topics([TOPIC])
            producer = transport.producer("task")
            await producer.fence()
            large = [OutRecord(None, os.urandom(300_000)) for _ in range(10)]
            await producer.produce({ONE: [OutRecord(b"k", b"small")], TWO: large})
            await producer.send_offsets({ONE: Offset(5)}, "group")
            with disk_of(2_000_000):
                with pytest.raises(BrokerUnavailable, match="Free space"):
                    await producer.end(commit=True)
                with pytest.raises(BrokerUnavailable):
                    await transport.send({TWO: large})
                assert await transport.group_offsets("group", [ONE]) == {}
                assert (await transport.offsets([ONE]))[ONE] == (0, 0, 1)
            await producer.end(commit=True)  # the transaction is as open as it was
            assert await read_values(transport, ONE) == ["small"]
            assert len(await read_values_raw(transport, TWO)) == 10

    run(scenario)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size``."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def read_values_raw(transport: EmbeddedTransport, tp: TopicPartition) -> list[bytes | None]:
    stop = (await transport.offsets([tp]))[tp].end
    return [batch.value(i) async for batch in transport.read(tp, Offset(0), stop) for i in range(len(batch))]


def test_a_transaction_open_for_too_long_is_aborted_and_its_producer_fenced(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with embedded(tmp_path / "log", clock) as transport:
            await transport.create_topics([TOPIC])
            slow, quick = transport.producer("slow"), transport.producer("quick")
            await slow.fence()
            await quick.fence()
            await slow.produce({ONE: [OutRecord(b"k", b"slow")]})
            await quick.produce({ONE: [OutRecord(b"k", b"quick")]})
            await quick.end(commit=True)
            fetcher = transport.fetcher()
            fetcher.resume(ONE, Offset(0))
            waiting = asyncio.ensure_future(fetcher.get())
            await clock.advance(TRANSACTION_TIMEOUT_MS / 1000 - 1)
            assert not waiting.done()
            await clock.advance(1)
            assert (await waiting).offsets.tolist() == [1]
            with pytest.raises(ProducerFenced, match="open for more than"):
                await slow.end(commit=True)

    run(scenario)


def test_the_clock_of_the_transport_stamps_records_without_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with embedded(tmp_path / "log", clock) as transport:
            await transport.create_topics([TOPIC])
            await transport.send({ONE: [OutRecord(b"k", b"v"), OutRecord(b"k", b"v", (), 5)]})
            [batch] = [batch async for batch in transport.read(ONE, Offset(0), Offset(2))]
            assert batch.timestamps.tolist() == [clock.now_ms(), 5]

    run(scenario)


COMPACTED = TopicSpec("t", 2, {"cleanup.policy": "compact", "delete.retention.ms": "60000"})


def test_compaction_keeps_the_last_record_of_each_key_at_its_offset(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with embedded(tmp_path / "log", clock) as transport:
            await transport.create_topics([COMPACTED])
            keyed = [OutRecord(b"k%d" % (i % 3), b"%d" % i, (("n", b"%d" % i),), i) for i in range(10)]
            await transport.send({ONE: keyed})
            await transport.send({ONE: [OutRecord(b"k0", None), OutRecord(b"old", b"x")]})
            producer = transport.producer("open")
            await producer.fence()
            await producer.produce({ONE: [OutRecord(b"k1", b"open")]})
            await transport.send({ONE: [OutRecord(b"k2", b"later")]})  # behind the last stable offset: not yet
            assert await transport.compact("t") == 8
            expected = [(7, b"k1", b"7"), (8, b"k2", b"8"), (10, b"k0", None), (11, b"old", b"x")]
            assert await shown(transport, 12) == expected
            assert (await transport.offsets([ONE]))[ONE] == (0, 12, 14)
            await producer.end(commit=True)
            assert await transport.compact("t") == 2
            tail = [(12, b"k1", b"open"), (13, b"k2", b"later")]
            assert await shown(transport, 15) == [*expected[2:], *tail]
            await clock.advance(61)
            assert await transport.compact("t") == 1
            assert await shown(transport, 15) == [expected[3], *tail]
        async with embedded(tmp_path / "log", clock) as transport:
            assert await shown(transport, 15) == [expected[3], *tail]
            assert (await transport.offsets([ONE]))[ONE] == (0, 15, 15)

    async def shown(transport: EmbeddedTransport, stop: int) -> list[tuple[int, bytes | None, bytes | None]]:
        batches = [batch async for batch in transport.read(ONE, Offset(0), Offset(stop))]
        return [row for batch in batches for row in rows_of(batch)]

    run(scenario)


def test_a_tail_that_was_compacted_away_ends_a_read_and_a_fetch(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with embedded(tmp_path / "log", clock) as transport:
            await transport.create_topics([COMPACTED])
            await transport.send({ONE: [OutRecord(b"a", b"1")]})
            await transport.send({ONE: [OutRecord(b"b", None), OutRecord(b"c", None)]})
            await clock.advance(120)
            assert await transport.compact("t") == 2
            assert await read_values(transport, ONE) == ["1"]
            fetcher = transport.fetcher()
            fetcher.resume(ONE, Offset(1))
            batch = await fetcher.get()
            assert (len(batch), batch.next_position) == (0, 3)
            assert fetcher.at_end(ONE)

    run(scenario)


def test_a_dirty_topic_is_compacted_at_start_and_only_then(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "log"
        async with embedded(path) as transport:
            await transport.create_topics([COMPACTED])
            for _ in range(4):
                await transport.send({ONE: [OutRecord(b"k", os.urandom(COMPACT_BYTES_MIN // 3))]})
            await transport.send({TWO: [OutRecord(b"k", b"1"), OutRecord(b"k", b"2")]})
        async with embedded(path) as transport:
            assert [len(await read_values_raw(transport, tp)) for tp in (ONE, TWO)] == [1, 2]

    run(scenario)


def test_a_record_without_a_key_is_refused_by_a_compacted_topic(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with embedded(tmp_path / "log") as transport:
            await transport.create_topics([COMPACTED])
            with pytest.raises(ProduceRefused, match="without a key"):
                await transport.send({ONE: [OutRecord(None, b"v")]})

    run(scenario)


def test_a_refused_epoch_cannot_be_committed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with embedded(tmp_path / "log") as transport:
            await transport.create_topics([TOPIC])
            producer = transport.producer("task")
            await producer.fence()
            await producer.produce({ONE: [OutRecord(b"k", b"v")]})
            with pytest.raises(ProduceRefused, match="no missing"):
                await producer.produce({TopicPartition("missing", 0): [OutRecord(b"k", b"v")]})
            with pytest.raises(ProduceRefused):
                await producer.end(commit=True)
            await producer.end(commit=False)
            assert await read_values(transport, ONE) == []

    run(scenario)


def test_a_topic_declared_twice_is_one_unless_the_declarations_differ(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with embedded(tmp_path / "log") as transport:
            with pytest.raises(UserError, match="declared twice"):
                await transport.create_topics([TOPIC, COMPACTED])
            assert await transport.partitions("t") is None
            await transport.create_topics([TOPIC, TopicSpec("t", 2)])
            assert await transport.partitions("t") == 2

    run(scenario)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (TopicSpec("no/slash", 1), "no topic name"),
        (TopicSpec("..", 1), "no topic name"),
        (TopicSpec("t", 0), "0 partitions"),
        (TopicSpec("t", 1, {"max.message.bytes": "many"}), "is no number"),
    ],
)
def test_a_topic_that_kafka_would_not_take_is_refused(tmp_path: Path, spec: TopicSpec, said: str) -> None:
    async def scenario() -> None:
        async with embedded(tmp_path / "log") as transport:
            with pytest.raises(UserError, match=said):
                await transport.create_topics([spec])
            assert await transport.partitions(spec.name) is None

    run(scenario)


def test_an_epoch_of_sixteen_bits_goes_over_into_a_new_producer_id(tmp_path: Path) -> None:
    async def scenario() -> None:
        path = tmp_path / "log"
        async with embedded(path) as transport:
            await transport.create_topics([TOPIC])
            await transport.producer("task").fence()
        execute(path, "UPDATE producers SET epoch = 32766")
        async with embedded(path) as transport:
            last = transport.producer("task")
            await last.fence()
            await last.produce({ONE: [OutRecord(b"k", b"open")]})
            new = transport.producer("task")
            await new.fence()
            await new.produce({ONE: [OutRecord(b"k", b"v")]})
            await new.end(commit=True)
            assert await read_values(transport, ONE) == ["v"]
            with pytest.raises(ProducerFenced):
                await last.end(commit=True)
            with pytest.raises(ProducerFenced):
                await transport.producer("never fenced").end(commit=True)

    run(scenario)


def test_use_before_start_and_after_stop_is_an_error_not_a_hang(tmp_path: Path) -> None:
    async def scenario() -> None:
        transport = EmbeddedTransport(tmp_path / "log", SystemClock())
        with pytest.raises(BrokerUnavailable, match="closed"):
            await transport.create_topics([TOPIC])
        await transport.start()
        await transport.create_topics([TOPIC])
        fetcher = transport.fetcher()
        fetcher.resume(ONE, Offset(0))
        waiting = asyncio.ensure_future(fetcher.get())
        await asyncio.sleep(0)
        await transport.stop()
        with pytest.raises(BrokerUnavailable, match="closed"):
            await waiting
        with pytest.raises(BrokerUnavailable, match="closed"):
            await transport.send({ONE: [OutRecord(b"k", b"v")]})

    run(scenario)


def test_a_waiting_reader_has_no_timer_and_wakes_with_the_write_to_its_partition(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with embedded(tmp_path / "log", ManualClock()) as transport:
            await transport.create_topics([TOPIC])
            fetcher = transport.fetcher()
            fetcher.resume(ONE, Offset(0))
            waiting = asyncio.ensure_future(fetcher.get())
            await asyncio.sleep(0.01)
            assert not waiting.done()
            assert len([task for task in asyncio.all_tasks() if "embedded" in task.get_name()]) == 0
            await transport.send({TWO: [OutRecord(b"k", b"v")]})
            await asyncio.sleep(0)
            assert not waiting.done()
            await transport.send({ONE: [OutRecord(b"k", b"v")]})
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert waiting.done()

    run(scenario)


@pytest.mark.parametrize("how", ["abort", "fence", "expire"])
def test_offsets_that_a_reader_has_passed_are_never_given_again(tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        clock = ManualClock()
        async with embedded(tmp_path / "log", clock) as transport:
            await transport.create_topics([TOPIC])
            producer = transport.producer("task")
            await producer.fence()
            await producer.produce({ONE: [OutRecord(b"k", b"gone"), OutRecord(b"k", b"gone")]})
            if how == "abort":
                await producer.end(commit=False)
            elif how == "fence":
                await transport.producer("task").fence()
            else:
                await asyncio.sleep(0)
                await clock.advance(TRANSACTION_TIMEOUT_MS / 1000)
            passed = (await transport.offsets([ONE]))[ONE]
            assert passed == (0, 3, 3)
        async with embedded(tmp_path / "log", clock) as transport:
            assert (await transport.offsets([ONE]))[ONE] == passed

    run(scenario)


class Model:
    """What the log must show, in the plainest words: per partition, what took each offset."""

    def __init__(self) -> None:
        self.slots: dict[TopicPartition, list[tuple[str, int]]] = {ONE: [], TWO: []}
        self.open: dict[int, list[tuple[TopicPartition, int]]] = {}

    def produce(self, producer: int, tp: TopicPartition, count: int, number: int) -> None:
        for i in range(count):
            self.open.setdefault(producer, []).append((tp, len(self.slots[tp])))
            self.slots[tp].append(("open", number + i))

    def end(self, producer: int, became: str) -> None:
        taken = self.open.pop(producer, [])
        for tp, offset in taken:
            self.slots[tp][offset] = (became, self.slots[tp][offset][1])
        for tp in {tp for tp, _ in taken}:
            self.slots[tp].append(("marker", -1))

    def crash(self) -> None:
        """Open transactions are gone; offsets that only they took may be given again."""
        for tp, slots in self.slots.items():
            self.slots[tp] = slots = [("gone", n) if kind == "open" else (kind, n) for kind, n in slots]
            while slots and slots[-1][0] == "gone":
                slots.pop()
        self.open.clear()

    def stable(self, tp: TopicPartition) -> int:
        return next((i for i, (kind, _) in enumerate(self.slots[tp]) if kind == "open"), len(self.slots[tp]))

    def shown(self, tp: TopicPartition, start: int) -> list[tuple[int, int]]:
        rows = enumerate(self.slots[tp][: self.stable(tp)])
        return [(offset, n) for offset, (kind, n) in rows if kind == "shown" and offset >= start]


acts = st.one_of(
    st.tuples(st.just("produce"), st.integers(0, 2), st.sampled_from([ONE, TWO]), st.integers(1, 3)),
    st.tuples(st.sampled_from(["commit", "abort", "fence"]), st.integers(0, 2), st.just(ONE), st.just(0)),
    st.tuples(st.just("send"), st.just(0), st.sampled_from([ONE, TWO]), st.integers(1, 3)),
    st.tuples(st.just("read"), st.just(0), st.sampled_from([ONE, TWO]), st.integers(0, 12)),
    st.tuples(st.just("reopen"), st.just(0), st.just(ONE), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(acts, max_size=30))
def test_any_order_of_transactions_and_reopenings_shows_what_the_model_shows(
    steps: list[tuple[str, int, TopicPartition, int]],
) -> None:
    async def scenario() -> None:
        with TemporaryDirectory() as folder:
            log, model, number = EmbeddedLog(Path(folder) / "log"), Model(), 0
            await log.transport.start()
            await log.transport.create_topics([TOPIC])
            producers = [log.transport.producer(f"task{i}") for i in range(3)]
            for fresh in producers:
                await fresh.fence()
            for act, who, tp, count in steps:
                records = {tp: [OutRecord(b"k", b"%d" % (number + i)) for i in range(count)]}
                if act == "produce":
                    await producers[who].produce(records)
                    model.produce(who, tp, count, number)
                elif act == "send":
                    await log.transport.send(records)
                    model.slots[tp] += [("shown", number + i) for i in range(count)]
                elif act in ("commit", "abort"):
                    await producers[who].end(commit=act == "commit")
                    model.end(who, "shown" if act == "commit" else "gone")
                elif act == "fence":
                    await producers[who].fence()
                    model.end(who, "gone")
                elif act == "reopen":
                    await log.reopen()
                    producers = [log.transport.producer(f"task{i}") for i in range(3)]
                    for fresh in producers:
                        await fresh.fence()
                    model.crash()
                for each in (ONE, TWO):
                    await check(log.transport, model, each, count if act == "read" else 0)
                number += count
            await log.transport.stop()

    async def check(transport: EmbeddedTransport, model: Model, tp: TopicPartition, start: int) -> None:
        stable, end = model.stable(tp), len(model.slots[tp])
        assert (await transport.offsets([tp]))[tp] == (0, stable, end)
        batches = [batch async for batch in transport.read(tp, Offset(min(start, end)), Offset(stable))]
        rows = [(offset, int(value or b"")) for batch in batches for offset, _, value in rows_of(batch)]
        assert rows == model.shown(tp, start)

    run(scenario)
