"""The Kafka transport against a real broker: every transport's contract, and what only a broker can do to it."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from streamproc.core import limits
from streamproc.core.clock import SystemClock
from streamproc.core.errors import BrokerUnavailable, ProduceRefused, ProducerFenced, UnknownOutcome, UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.testing.kafka_server import KafkaServer
from streamproc.transport.contract import GroupListener, OutRecord, TopicSpec, Transport
from streamproc.transport.kafka import KafkaTransport

pytest.register_assert_rewrite("contract.transport_kit", "contract.transport_suite")
from contract.transport_suite import OpenTransport, TransportContract  # noqa: E402

WAIT_S = 60.0


class Log:
    """A started transport on the broker that all tests share."""

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self.transport: Transport = self._new()

    def _new(self) -> KafkaTransport:
        return KafkaTransport(
            self._bootstrap,
            SystemClock(),
            client_id="contract",
            session_timeout_s=6.0,
            heartbeat_interval_s=0.2,
        )

    async def reopen(self) -> Transport:
        await self.transport.stop()
        self.transport = self._new()
        await self.transport.start()
        return self.transport


@pytest.fixture
def open_transport(kafka: KafkaServer) -> OpenTransport:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Log]:
        log = Log(kafka.bootstrap)
        await log.transport.start()
        try:
            yield log
        finally:
            await log.transport.stop()

    return opened


@pytest.mark.kafka
class TestKafka(TransportContract):
    pass


@asynccontextmanager
async def connected(server: KafkaServer) -> AsyncIterator[KafkaTransport]:
    transport = KafkaTransport(server.bootstrap, SystemClock(), session_timeout_s=6.0, heartbeat_interval_s=0.2)
    await transport.start()
    try:
        yield transport
    finally:
        await transport.stop()


async def topic_of(transport: KafkaTransport, partitions: int = 1, **config: str) -> str:
    name = f"kafka-{uuid.uuid4().hex[:12]}"
    spec = TopicSpec(name, partitions, {key.replace("_", "."): value for key, value in config.items()})
    await transport.create_topics([spec])
    return name


def rows(*values: str) -> list[OutRecord]:
    return [OutRecord(value.encode(), value.encode()) for value in values]


async def values_in(transport: KafkaTransport, tp: TopicPartition, start: int = 0) -> list[str]:
    stop = (await transport.offsets([tp]))[tp].end
    batches = [batch async for batch in transport.read(tp, Offset(start), stop)]
    return [(batch.value(i) or b"").decode() for batch in batches for i in range(len(batch))]


async def first_offset(transport: KafkaTransport, tp: TopicPartition) -> int:
    async for batch in transport.read(tp, Offset(0), (await transport.offsets([tp]))[tp].end):
        return int(batch.offsets[0])
    return 0


@pytest.mark.kafka
class TestSizes:
    def test_a_record_larger_than_the_fetch_size_comes_whole_beside_a_busy_partition(self, kafka: KafkaServer) -> None:
        async def scenario() -> None:
            async with connected(kafka) as transport:
                topic = await topic_of(transport, 2, max_message_bytes="8000000")
                large, busy = TopicPartition(topic, 0), TopicPartition(topic, 1)
                value = os.urandom(3_000_000)
                await transport.send({large: [OutRecord(None, value)]})
                await transport.send({busy: [OutRecord(None, os.urandom(100_000)) for _ in range(40)]})
                fetcher = transport.fetcher()
                fetcher.resume(busy, Offset(0))
                fetcher.resume(large, Offset(0))
                while True:
                    batch = await asyncio.wait_for(fetcher.get(), WAIT_S)
                    if batch.tp == large:
                        assert batch.value(0) == value
                        return

        asyncio.run(scenario())

    def test_a_batch_too_large_for_the_topic_is_halved_until_its_records_fit(self, kafka: KafkaServer) -> None:
        async def scenario() -> None:
            async with connected(kafka) as transport:
                tp = TopicPartition(await topic_of(transport, max_message_bytes="2000"), 0)
                values = [os.urandom(900) for _ in range(9)]
                producer = transport.producer(f"txn-{tp.topic}")
                await producer.fence()
                for _ in range(2):
                    await producer.produce({tp: [OutRecord(None, value) for value in values]})
                await producer.end(commit=True)
                stop = (await transport.offsets([tp]))[tp].end
                batches = [batch async for batch in transport.read(tp, Offset(0), stop)]
                assert [batch.value(i) for batch in batches for i in range(len(batch))] == values * 2

        asyncio.run(scenario())

    def test_a_producer_goes_on_after_a_refused_and_aborted_epoch(self, kafka: KafkaServer) -> None:
        async def scenario() -> None:
            async with connected(kafka) as transport:
                small = TopicPartition(await topic_of(transport, max_message_bytes="2000"), 0)
                producer = transport.producer(f"txn-{small.topic}")
                await producer.fence()
                await producer.produce({small: rows("lost")})
                with pytest.raises(ProduceRefused):
                    await producer.produce({small: [OutRecord(None, os.urandom(5_000))]})
                with pytest.raises(ProduceRefused):
                    await producer.end(commit=True)
                await producer.end(commit=False)
                await producer.produce({small: rows("kept")})
                await producer.end(commit=True)
                assert await values_in(transport, small) == ["kept"]

        asyncio.run(scenario())

    def test_reading_ends_where_the_tail_was_compacted_away(self, kafka: KafkaServer) -> None:
        async def scenario() -> None:
            async with connected(kafka) as transport:
                config = {"cleanup_policy": "compact", "segment_ms": "1", "min_cleanable_dirty_ratio": "0.001"}
                config |= {"delete_retention_ms": "0"}
                tp = TopicPartition(await topic_of(transport, 1, **config), 0)
                for i in range(20):
                    await transport.send({tp: [OutRecord(b"same", str(i).encode())]})
                async with asyncio.timeout(WAIT_S):
                    while await first_offset(transport, tp) <= 5:
                        await transport.send({tp: [OutRecord(b"same", b"again")]})
                        await asyncio.sleep(0.1)
                # Offsets 0 to 5 are gone: a position in the hole reads on behind it, and a stop in it is reached.
                # The broker goes on compacting: what is read a moment later may be less, but nothing else.
                in_hole, later = await values_in(transport, tp, 3), await values_in(transport, tp)
                assert later
                assert set(later) <= set(in_hole)
                assert [batch async for batch in transport.read(tp, Offset(2), Offset(5))] == []

        asyncio.run(scenario())


@pytest.mark.kafka
class TestTopics:
    def test_a_partition_that_does_not_exist_is_a_user_error_by_name(self, kafka: KafkaServer) -> None:
        async def scenario() -> None:
            hurried = KafkaTransport(kafka.bootstrap, Hurried())
            await hurried.start()
            with pytest.raises(UserError, match=r"no-such-topic.*partition 3"):
                await hurried.send({TopicPartition("no-such-topic", 3): rows("x")})
            await hurried.stop()

        asyncio.run(scenario())

    def test_an_impossible_setting_is_a_user_error_with_the_brokers_words(self, kafka: KafkaServer) -> None:
        async def scenario() -> None:
            async with connected(kafka) as transport:
                with pytest.raises(UserError, match=r"INVALID_CONFIG.*cleanup\.policy"):
                    await topic_of(transport, cleanup_policy="nonsense")

        asyncio.run(scenario())


class Hurried(SystemClock):
    """Its sleeps are over at once, and its hours pass meanwhile."""

    def __init__(self) -> None:
        self._slept_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self._slept_s

    async def sleep(self, seconds: float) -> None:
        self._slept_s += seconds
        await asyncio.sleep(0)


class TestAddress:
    @pytest.mark.parametrize(
        "text", ["", "kafka://", "http://host/path:1", "host:port", "host:0", "host:70000", "a:1,"]
    )
    def test_what_is_no_address_is_a_user_error(self, text: str) -> None:
        with pytest.raises(UserError, match=r"host:port"):
            KafkaTransport(text, SystemClock())

    def test_a_broker_that_is_not_there_is_named_within_the_limit(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{unused.getsockname()[1]}"

        async def scenario() -> None:
            with pytest.raises(BrokerUnavailable, match=rf"{address}.*broker setting"):
                await KafkaTransport(f"kafka://{address}", Hurried()).start()

        asyncio.run(scenario())


@pytest.fixture(scope="module")
def mortal() -> Iterator[KafkaServer]:
    """A broker of our own to kill: one with few topics is back within the limits that are tested."""
    if os.environ.get("KAFKA_BOOTSTRAP"):
        pytest.skip("KAFKA_BOOTSTRAP is set: somebody else's broker is not killed")
    with KafkaServer() as server:
        yield server


@pytest.mark.kafka
class TestOutages:
    def test_a_restart_of_the_broker_costs_time_and_no_record(
        self, mortal: KafkaServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Leader and coordinator are away while epochs are written and read: each committed comes once, in order."""
        monkeypatch.setattr(limits, "RETRY_TOTAL_S", 60.0)  # the start of a broker on a busy machine

        async def scenario() -> None:
            async with connected(mortal) as transport:
                tp = TopicPartition(await topic_of(transport), 0)
                fetcher, producer = transport.fetcher(), transport.producer(f"txn-{tp.topic}")
                await producer.fence()
                fetcher.resume(tp, Offset(0))
                restarting = asyncio.create_task(asyncio.to_thread(mortal.restart))
                sent: list[str] = []
                while not restarting.done() or len(sent) < 20:
                    await producer.produce({tp: rows(f"{len(sent)}")})
                    await producer.send_offsets({tp: Offset(len(sent))}, f"group-{tp.topic}")
                    try:
                        await producer.end(commit=True)
                    except UnknownOutcome:
                        await producer.fence()
                        known = await values_in(transport, tp)
                        assert known in (sent, [*sent, f"{len(sent)}"])
                        sent = known
                        continue
                    sent.append(f"{len(sent)}")
                await restarting
                seen: list[str] = []
                while len(seen) < len(sent):
                    batch = await asyncio.wait_for(fetcher.get(), WAIT_S)
                    seen += [(batch.value(i) or b"").decode() for i in range(len(batch))]
                assert seen == sent

        asyncio.run(scenario())

    def test_a_source_is_not_at_its_end_while_the_broker_is_away(self, mortal: KafkaServer) -> None:
        async def scenario() -> None:
            async with connected(mortal) as transport:
                tp = TopicPartition(await topic_of(transport), 0)
                fetcher = transport.fetcher()
                fetcher.resume(tp, Offset(0))
                waiting = asyncio.create_task(fetcher.get())
                await until(lambda: fetcher.at_end(tp))
                await asyncio.to_thread(mortal.kill)
                await until(lambda: not fetcher.at_end(tp))
                assert fetcher.lag(tp) == 0
                await asyncio.to_thread(mortal.start)
                await until(lambda: fetcher.at_end(tp))
                await transport.send({tp: rows("back")})
                assert (await asyncio.wait_for(waiting, WAIT_S)).value(0) == b"back"

        asyncio.run(scenario())

    def test_a_broker_killed_within_a_transaction_leaves_all_of_it_or_nothing(self, mortal: KafkaServer) -> None:
        async def scenario() -> None:
            async with connected(mortal) as transport:
                topic = await topic_of(transport, 2)
                one, two = TopicPartition(topic, 0), TopicPartition(topic, 1)
                producer = transport.producer(f"txn-{topic}")
                await producer.fence()
                await producer.produce({one: rows("a", "b"), two: rows("c")})
                await asyncio.to_thread(mortal.kill)
                ending = asyncio.create_task(producer.end(commit=True))
                await asyncio.to_thread(mortal.start)
                with suppress(UnknownOutcome, ProducerFenced):
                    await ending
                    assert await values_in(transport, two) == ["c"]
                await until_fenced(transport, f"txn-{topic}")
                found = await values_in(transport, one), await values_in(transport, two)
                assert found in ((["a", "b"], ["c"]), ([], []))

        asyncio.run(scenario())

    def test_an_unanswered_commit_is_unknown_and_the_fence_settles_it(self, mortal: KafkaServer) -> None:
        """SIGSTOP: the request is taken by the socket and nobody answers until our own time-out."""

        async def scenario() -> None:
            async with connected(mortal) as transport:
                tp = TopicPartition(await topic_of(transport), 0)
                producer = transport.producer(f"txn-{tp.topic}")
                await producer.fence()
                await producer.produce({tp: rows("perhaps")})
                mortal.pause()
                try:
                    with pytest.raises(UnknownOutcome):
                        await producer.end(commit=True)
                finally:
                    mortal.go_on()
                with pytest.raises(UnknownOutcome):  # unusable until its fence
                    await producer.produce({tp: rows("never")})
                await until_fenced(transport, f"txn-{tp.topic}")
                settled = await values_in(transport, tp)
                assert settled in (["perhaps"], [])
                assert await values_in(transport, tp) == settled

        asyncio.run(scenario())

    def test_a_member_outlives_its_broker_and_stops_without_one(self, mortal: KafkaServer) -> None:
        async def scenario() -> None:
            told: list[str] = []

            async def revoked(_tps: object) -> None:
                told.append("revoked")

            async def assigned(_tps: object, _generation: int) -> None:
                told.append("assigned")

            async with connected(mortal) as transport:
                membership = transport.membership(f"group-{uuid.uuid4().hex}")
                await membership.start([await topic_of(transport)], GroupListener(revoked, assigned))
                await until(lambda: told == ["assigned"])
                await asyncio.to_thread(mortal.kill)
                await asyncio.to_thread(mortal.start)
                async with asyncio.timeout(WAIT_S):
                    while not await membership.confirm():  # noqa: ASYNC110 - a broker sends no event
                        await asyncio.sleep(0.1)
                await asyncio.to_thread(mortal.kill)
                await membership.stop()
                assert told[-1] == "revoked"
                await asyncio.to_thread(mortal.start)

        asyncio.run(scenario())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - a broker sends no event
            await asyncio.sleep(0.01)


async def until_fenced(transport: KafkaTransport, transactional_id: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await transport.producer(transactional_id).fence()
            except BrokerUnavailable:
                continue
