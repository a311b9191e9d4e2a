"""The old owner of a task on a real Kafka, Redis and Postgres: whatever it still does is refused, and only its task is
touched.

What a producer does *after* it was fenced is in the transports' contract (`FencingContract`), and what a sink's writer
does with a ledger that has moved on in the sinks'. Here the requests are on their way while the new owner fences, the
ledgers are claimed as a start claims them, an answer to a commit gets lost, and a whole worker sleeps past its session.
"""

from __future__ import annotations

import asyncio
import json
import signal
import struct
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import pytest

from demo.data import make_feed
from demo.oracle import expect
from streamproc import sinks
from streamproc.app import App
from streamproc.commit.ledger import CatchUp, Ledger, UpToDate, decide_claim
from streamproc.core.clock import SystemClock
from streamproc.core.errors import LedgerMoved, ProducerFenced
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime.start import last_commit
from streamproc.runtime.task import Phase, Task
from streamproc.sinks.contract import Sink
from streamproc.testing.kafka_server import KafkaServer
from streamproc.testing.servers import EmbeddedPostgres, EmbeddedRedis
from streamproc.transport.contract import OutRecord, TaskProducer, TopicSpec
from streamproc.transport.kafka import KafkaTransport
from streamproc.transport.kafka.txn import lane_of
from tests.apps import new_app, running, until
from tests.main_job import Place, differences, feed_kafka, place

pytest.register_assert_rewrite("contract.sink_suite")
from contract.sink_suite import Identity, changed, opened, shape_of  # noqa: E402

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]


# --- a wire that holds and loses requests


class Api(IntEnum):
    """Requests of a transaction. The body of each begins with the transactional id."""

    PRODUCE = 0
    INIT_PRODUCER_ID = 22
    ADD_PARTITIONS = 24
    ADD_OFFSETS = 25
    END_TXN = 26
    TXN_OFFSET_COMMIT = 28


Act = Literal["hold", "lose the request", "lose the answer"]


@dataclass
class Trap:
    """What happens to the next ``api`` of ``transactional_id``. Losing cuts the connection: before the request reached
    the broker, or after the broker has answered."""

    act: Act
    api: Api
    transactional_id: str
    sprung: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    """A held request waits for it."""


class Proxy:
    """Stands before a broker on loopback, which it says is where it listens itself: all connections go through it.

    ``async with Proxy(kafka) as proxy: trap = proxy.trap("hold", Api.END_TXN, name)``.
    """

    def __init__(self, kafka: KafkaServer) -> None:
        self._host, port = kafka.bootstrap.rsplit(":", 1)
        self._broker_port = int(port)
        self._traps: list[Trap] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, self._host, 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def _port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def bootstrap(self) -> str:
        return f"{self._host}:{self._port}"

    def trap(self, act: Act, api: Api, transactional_id: str) -> Trap:
        self._traps.append(trap := Trap(act, api, transactional_id))
        return trap

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(connection := asyncio.create_task(self._connected(reader, writer)))
        connection.add_done_callback(self._connections.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, self._broker_port)
        losing: dict[int, Trap] = {}
        ways = [
            asyncio.create_task(self._requests(reader, up_writer, losing)),
            asyncio.create_task(self._answers(up_reader, writer, losing)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.close()
            up_writer.close()

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: dict[int, Trap]
    ) -> None:
        async for frame in _frames(reader):
            if (trap := self._sprung_by(frame)) is not None:
                if trap.act == "lose the answer":
                    losing[struct.unpack_from(">i", frame, 4)[0]] = trap
                else:
                    trap.sprung.set()
                if trap.act == "lose the request":
                    return
                if trap.act == "hold":
                    await trap.go.wait()
            await _send(writer, frame)

    async def _answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: dict[int, Trap]
    ) -> None:
        there, here = self._address(self._broker_port), self._address(self._port)
        async for frame in _frames(reader):
            if (trap := losing.get(struct.unpack_from(">i", frame)[0])) is not None:
                trap.sprung.set()
                return
            await _send(writer, frame.replace(there, here))

    def _address(self, port: int) -> bytes:
        """As answers spell where a broker is."""
        return struct.pack(f">h{len(self._host)}si", len(self._host), self._host.encode(), port)

    def _sprung_by(self, frame: bytes) -> Trap | None:
        for trap in self._traps:
            client = struct.unpack_from(">h", frame, 8)[0]
            name = trap.transactional_id.encode()
            begin = struct.pack(f">h{len(name)}s", len(name), name)
            if struct.unpack_from(">h", frame)[0] == trap.api and frame.startswith(begin, 10 + max(client, 0)):
                self._traps.remove(trap)
                return trap
        return None


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Requests or answers, whole, without their length, until the connection ends."""
    try:
        while True:
            yield await reader.readexactly(struct.unpack(">i", await reader.readexactly(4))[0])
    except (asyncio.IncompleteReadError, ConnectionError):
        return


async def _send(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(struct.pack(">i", len(frame)) + frame)
    await writer.drain()


@asynccontextmanager
async def connected(bootstrap: str) -> AsyncIterator[KafkaTransport]:
    transport = KafkaTransport(bootstrap, SystemClock())
    await transport.start()
    try:
        yield transport
    finally:
        await transport.stop()


def some(*values: str) -> list[OutRecord]:
    return [OutRecord(None, value.encode()) for value in values]


async def values_of(transport: KafkaTransport, topic: str, partitions: int = 1) -> list[bytes | None]:
    """Every committed value. Reads to the high watermark: the marker of a transaction follows the answer to its end."""
    found: list[bytes | None] = []
    for tp in (TopicPartition(topic, p) for p in range(partitions)):
        stop = (await transport.offsets([tp]))[tp].end
        async for batch in transport.read(tp, Offset(0), stop):
            found += [batch.value(row) for row in range(len(batch))]
    return found


# --- the old owner's transaction

GROUP = "fencing-group"
STEPS: dict[Api, Callable[[TaskProducer, TopicPartition], Awaitable[object]]] = {
    Api.PRODUCE: lambda old, tp: old.produce({tp: some("zombie")}),
    Api.TXN_OFFSET_COMMIT: lambda old, tp: old.send_offsets({tp: Offset(7)}, GROUP),
    Api.END_TXN: lambda old, tp: old.end(commit=True),
}


@pytest.mark.parametrize("api", STEPS, ids=lambda api: api.name.lower())
def test_a_request_on_its_way_while_the_new_owner_fences_is_refused(mortal: KafkaServer, api: Api) -> None:
    """The old owner has passed every check of its own, and its request arrives behind the fence."""

    async def scenario() -> None:
        async with Proxy(mortal) as proxy, connected(proxy.bootstrap) as its, connected(mortal.bootstrap) as ours:
            tp, name = TopicPartition(f"fencing-{uuid.uuid4().hex[:12]}", 0), f"txn-{uuid.uuid4().hex[:12]}"
            await ours.create_topics([TopicSpec(tp.topic, 1)])
            old = its.producer(name)
            await old.fence()
            await old.produce({tp: some("old")})
            trap = proxy.trap("hold", api, name)
            acting = asyncio.ensure_future(STEPS[api](old, tp))
            await until(trap.sprung.is_set, "the request to be on its way")

            new = ours.producer(name)
            await new.fence()
            trap.go.set()
            with pytest.raises(ProducerFenced):
                await acting
            with pytest.raises(ProducerFenced):
                await old.end(commit=True)

            assert await ours.group_offsets(GROUP, [tp]) == {}
            await new.produce({tp: some("new")})
            await new.end(commit=True)
            assert await values_of(ours, tp.topic) == [b"new"]

    asyncio.run(scenario())


# --- the old owner's ledgers


@pytest.mark.parametrize("system", ["redis", "postgres"])
def test_the_old_owner_writes_to_a_sink_until_the_new_one_claims_it_and_never_after(
    mortal: KafkaServer, redis: EmbeddedRedis, postgres: EmbeddedPostgres, system: str
) -> None:
    """Between fence and claim it may apply what Kafka had committed: right, and once. The claim ends that."""
    shape, name = shape_of(), f"txn-{uuid.uuid4().hex[:12]}"
    sink: Sink = sinks.redis(redis.url) if system == "redis" else sinks.postgres(postgres.dsn)

    def rows(orders: int) -> Any:
        kept: dict[Identity, Any] = {("DE", 0): (orders, float(orders))}
        return changed(shape, kept)

    async def scenario() -> None:
        async with connected(mortal.bootstrap) as ours, opened(sink, shape) as old, opened(sink, shape) as new:
            its, mine = ours.producer(name), ours.producer(name)
            await its.fence()
            first = Ledger("log", 1, 1, Offset(0))
            await old.apply(rows(1), held=None, moved=first)

            await mine.fence()
            second = Ledger("log", 1, 2, Offset(0))
            await old.apply(rows(2), held=first, moved=second)  # committed before the fence, not yet in the sink

            decision = decide_claim(await new.read(), log_id="log", incarnation=2, epoch=3, expired=False)
            assert isinstance(decision, UpToDate | CatchUp)
            await new.apply(None, held=decision.held, moved=decision.claim)
            for late in (rows(9), None):
                with pytest.raises(LedgerMoved):
                    await old.apply(late, held=second, moved=Ledger("log", 1, 3, Offset(0)))
            with pytest.raises(LedgerMoved):
                await old.prune([], since_ms=0, mine=lambda _: True, held=second)
            assert await old.read() == decision.claim

            third = Ledger("log", 2, 3, Offset(0))
            await new.apply(rows(3), held=decision.claim, moved=third)
            assert await old.read() == third

    asyncio.run(scenario())


# --- a commit without an answer

PARTITIONS = 3


def counting(broker: str, folder: Path, name: str) -> App:
    """How many records it has seen, in a table and record by record in ``{name}-results``."""
    app = new_app(folder, name, broker=f"kafka://{broker}", topic_partitions=PARTITIONS)
    orders = app.topic(f"{name}-orders", value_serializer="json")
    results = app.topic(f"{name}-results", value_serializer="json")
    counts = app.Table("counts", default=int, partitions=PARTITIONS)

    @app.agent(orders, name="count")
    async def count(stream: Any) -> None:
        async for order in stream:
            partition, number = order
            counts[partition] += 1
            await results.send(value=[partition, number, counts[partition]])

    return app


class Load:
    """One record after the other to each partition, until it is told to stop."""

    def __init__(self, transport: KafkaTransport, topic: str) -> None:
        self._transport, self._topic = transport, topic
        self.sent = 0
        """To each partition."""
        self.enough = False

    async def run(self) -> None:
        while not self.enough:
            one = {
                TopicPartition(self._topic, p): [OutRecord(None, json.dumps([p, self.sent]).encode())]
                for p in range(PARTITIONS)
            }
            await self._transport.send(one)
            self.sent += 1


def transactional_id(name: str, partition: int) -> str:
    return f"{name}:agents:{partition}"


def alone_on_its_connection(name: str) -> int:
    """A partition whose task shares its connection with no other: cutting it is a loss for that task only. (A task that
    does share it asks again, unless it waits for an answer to its own commit.)"""
    lanes = [lane_of(transactional_id(name, p)) for p in range(PARTITIONS)]
    return next(p for p, lane in enumerate(lanes) if lanes.count(lane) == 1)


@pytest.mark.parametrize(("lost", "committed"), [("lose the answer", True), ("lose the request", False)])
def test_a_commit_without_an_answer_restarts_its_task_and_no_other(
    tmp_path: Path, mortal: KafkaServer, lost: Act, committed: bool
) -> None:
    """The other tasks of the worker go on committing all the while that this one is kept from its fence."""
    name = f"unanswered-{committed}".lower()
    victim_of = alone_on_its_connection(name)
    txn, commits = transactional_id(name, victim_of), TopicPartition(f"{name}-agents-commits", victim_of)

    async def scenario() -> None:
        async with Proxy(mortal) as proxy, connected(mortal.bootstrap) as ours:
            await ours.create_topics([TopicSpec(f"{name}-{side}", PARTITIONS) for side in ("orders", "results")])
            load = Load(ours, f"{name}-orders")
            async with running(app := counting(proxy.bootstrap, tmp_path, name)), asyncio.TaskGroup() as group:
                group.create_task(load.run())
                try:
                    await stay_apart(app, proxy, ours)
                finally:
                    load.enough = True
                tasks = app.runtime.tasks.values()
                await until(lambda: [position(task) for task in tasks] == [load.sent] * PARTITIONS, "all of it")
                held = {p: n for task in tasks for p, n in task.overlay("counts").items()}
            results = [json.loads(value or b"") for value in await values_of(ours, f"{name}-results", PARTITIONS)]
            assert held == dict.fromkeys(range(PARTITIONS), load.sent)
            assert sorted(results) == [[p, n, n + 1] for p in range(PARTITIONS) for n in range(load.sent)]

    def position(task: Task) -> int | None:
        return task.committed_position(TopicPartition(f"{name}-orders", task.id.partition))

    async def stay_apart(app: App, proxy: Proxy, ours: KafkaTransport) -> None:
        def commits_of() -> dict[int, int]:
            return {task.id.partition: task.view.commits for task in app.runtime.tasks.values()}

        await until(lambda: len(commits_of()) == PARTITIONS and min(commits_of().values()) > 5, "every task to commit")
        tasks = {task.id.partition: task for task in app.runtime.tasks.values()}
        victim, others = tasks[victim_of], [task for p, task in tasks.items() if p != victim_of]
        incarnations = {p: task.record.incarnation for p, task in tasks.items() if task.record}
        fence = proxy.trap("hold", Api.INIT_PRODUCER_ID, txn)
        loss = proxy.trap(lost, Api.END_TXN, txn)
        await until(loss.sprung.is_set, "the commit to lose its answer")
        await until(fence.sprung.is_set, "the task to fence itself anew")
        assert "had no answer" in str(victim.view.problem)
        assert victim.phase is Phase.STARTING
        await on_the_broker(ours, victim)

        before = commits_of()
        await until(lambda: all(task.view.commits > before[task.id.partition] + 5 for task in others), "the others")
        assert victim.phase is Phase.STARTING
        assert commits_of()[victim_of] == before[victim_of]
        fence.go.set()
        await until(lambda: commits_of()[victim_of] > before[victim_of] + 5, "the task to commit again")
        assert {task.id.partition for task in app.runtime.tasks.values() if task.view.restarts} == {victim_of}
        assert victim.view.restarts == 1
        now = {p: task.record.incarnation for p, task in tasks.items() if task.record}
        assert now == incarnations | {victim_of: incarnations[victim_of] + 1}

    async def on_the_broker(ours: KafkaTransport, victim: Task) -> None:
        """The case is what its name says: the epoch is committed on the broker, or it is still open there."""
        assert victim.record is not None
        wanted = victim.record.epoch + committed
        async with asyncio.timeout(10):
            while True:  # the markers of a commit follow its answer
                ends = (await ours.offsets([commits]))[commits]
                record = await last_commit(ours, "agents", commits, ends._replace(end=ends.stable))
                if record is not None and record.epoch == wanted and (ends.stable < ends.end) is not committed:
                    return

    asyncio.run(scenario())


# --- a worker that sleeps past its session


def test_a_worker_stopped_beyond_its_session_wakes_and_changes_nothing(
    tmp_path: Path, kafka: KafkaServer, emptied: tuple[EmbeddedPostgres, EmbeddedRedis]
) -> None:
    """Its transaction, its commits and its ledgers belong to the other one by then; and neither fences for ever."""
    feed = make_feed(25)

    def alone(here: Place) -> bool:
        status = here.status("a")
        return len(status["tasks"]) == 12 and bool(status["finished"])

    with place(tmp_path, kafka, emptied) as here:
        asyncio.run(feed_kafka(here, feed))
        here.start("a")
        here.start("b")
        here.wait("both workers to be there", lambda: all((tmp_path / f"{n}.ready").exists() for n in "ab"), 60)
        (tmp_path / "go").touch()
        here.wait("b to read", lambda: here.status("b").get("read", 0) > 300, 60)
        here.workers["b"].send_signal(signal.SIGSTOP)
        try:
            here.wait("a to end the job alone", lambda: alone(here), 90)
        finally:
            here.workers["b"].send_signal(signal.SIGCONT)
        here.wait("b to be given tasks again", lambda: not alone(here) and here.done(tasks=12), 60)
        assert asyncio.run(differences(here, expect(feed.injections))) == []
        # It had work in hand when it was stopped, and went on with it before it heard that it has no task any more.
        assert "Another owner has fenced this task" in (tmp_path / "b.log").read_text()
