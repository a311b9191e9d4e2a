"""What the Kafka transport makes of a broker's answers, one by one, without a broker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.protocol.produce import ProduceRequest_v7

from streamproc.avro import recordbatch
from streamproc.core import limits
from streamproc.core.clock import SystemClock
from streamproc.core.errors import (
    BrokerUnavailable,
    LogLost,
    ProduceRefused,
    ProducerFenced,
    StreamprocError,
    UnknownOutcome,
)
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord
from streamproc.transport.kafka.codes import FENCED, Code
from streamproc.transport.kafka.fetch import KafkaFetcher
from streamproc.transport.kafka.produce import SEQUENCES
from streamproc.transport.kafka.txn import KafkaTaskProducer
from streamproc.transport.kafka.wire import NoAnswer, Wire

ONE, TWO = TopicPartition("one", 0), TopicPartition("two", 0)
LOST, UNREACHABLE = NoAnswer("lost", sent=True), NoAnswer("refused", sent=False)
RECORDS = [OutRecord(b"k", b"v"), OutRecord(b"k", b"w")]


class Hurried(SystemClock):
    """Its sleeps are over at once, and its time passes by nothing else."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        await asyncio.sleep(0)


class Script(Wire):
    """Answers from a script per request class, then `usual` ones; keeps what was sent, in order."""

    def __init__(self, **answers: list[Any]) -> None:
        super().__init__("host:9092", Hurried(), client_id="test", security={})
        self.answers, self.sent, self.refreshed, self.lookups = answers, list[tuple[str, Any]](), 0, 0

    async def send(self, node: int, request: Any, lane: Hashable = None) -> Any:
        await asyncio.sleep(0)
        name = type(request).__name__.removesuffix("Request")
        self.sent.append((name, request))
        script = self.answers.get(name)
        answer = script.pop(0) if script else usual(name, request)
        answer = answer() if callable(answer) else answer
        answer = await answer if isinstance(answer, Awaitable) else answer
        if isinstance(answer, NoAnswer):
            raise answer
        return answer

    def leader(self, tp: TopicPartition) -> int | None:
        return 1 if tp.topic == "one" else 2

    async def refresh(self) -> bool:
        self.refreshed += 1
        return True

    async def coordinator(self, kind: Any, key: str) -> int:
        if (kind, key) not in self._coordinators:
            self.lookups += 1
            self._coordinators[kind, key] = 1
        return 1

    def names(self) -> list[str]:
        return [name for name, _ in self.sent]


def usual(name: str, request: Any) -> Any:
    if name == "InitProducerId":
        return SimpleNamespace(error_code=0, producer_id=7, producer_epoch=1)
    if name == "Produce":
        topics = request.build(ProduceRequest_v7).topics
        return SimpleNamespace(topics=[(t, [(p, 0, 10, -1, 0) for p, _ in parts]) for t, parts in topics])
    return code(0) if name in ("AddOffsetsToTxn", "EndTxn") else partitions(0)


def code(error: int) -> Any:
    return SimpleNamespace(error_code=error)


def partitions(error: int) -> Any:
    return SimpleNamespace(errors=[("one", [(0, error)])])


def produced(error: int, offset: int = 10, topic: str = "one") -> Any:
    return SimpleNamespace(topics=[(topic, [(0, error, offset, -1, 0)])])


def batches_of(wire: Script) -> list[bytes]:
    return [
        data
        for name, request in wire.sent
        if name == "Produce"
        for _, parts in request.build(ProduceRequest_v7).topics
        for _, data in parts
    ]


async def silence() -> Any:
    await asyncio.Event().wait()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - one turn of the loop at a time, no time passes
        await asyncio.sleep(0)


def with_producer(wire: Script, scenario: Callable[[KafkaTaskProducer], Awaitable[None]]) -> None:
    async def within() -> None:
        producer = KafkaTaskProducer(wire, "app:group:0")
        await producer.fence()
        await asyncio.wait_for(scenario(producer), 10)

    asyncio.run(within())


class TestProducer:
    @pytest.mark.parametrize(
        "answer", [produced(Code.NOT_LEADER_OR_FOLLOWER), produced(Code.KAFKA_STORAGE_ERROR), LOST]
    )
    def test_a_batch_without_a_verdict_is_sent_again_byte_for_byte(self, answer: Any) -> None:
        wire = Script(Produce=[answer])

        async def scenario(producer: KafkaTaskProducer) -> None:
            assert await producer.produce({ONE: RECORDS}) == {ONE: 11}
            first, again = batches_of(wire)
            assert first == again
            assert wire.refreshed == 1
            await producer.produce({ONE: RECORDS})
            assert recordbatch.read_header(batches_of(wire)[-1]).base_sequence == 2

        with_producer(wire, scenario)

    def test_an_acknowledgement_without_an_offset_forbids_the_commit(self) -> None:
        wire = Script(Produce=[produced(0, offset=-1)])

        async def scenario(producer: KafkaTaskProducer) -> None:
            with pytest.raises(ProduceRefused, match="without an offset"):
                await producer.produce({ONE: RECORDS})
            with pytest.raises(ProduceRefused):
                await producer.end(commit=True)
            assert "EndTxn" not in wire.names()

        with_producer(wire, scenario)

    def test_a_refusal_beside_a_lost_answer_leaves_the_producer_unusable_until_its_fence(self) -> None:
        """The broker may hold a batch under the sequence that the next epoch would use: it would drop that epoch."""
        wire = Script(Produce=[LOST, produced(Code.INVALID_RECORD, -1, "two")])

        async def scenario(producer: KafkaTaskProducer) -> None:
            with pytest.raises(ProduceRefused):
                await producer.produce({ONE: RECORDS, TWO: RECORDS})
            await producer.end(commit=False)
            with pytest.raises(ProduceRefused):
                await producer.produce({ONE: RECORDS})
            await producer.fence()
            await producer.produce({ONE: RECORDS})

        with_producer(wire, scenario)

    def test_a_coordinator_that_moved_is_looked_up_again(self) -> None:
        moved = [partitions(Code.NOT_COORDINATOR), partitions(Code.COORDINATOR_LOAD_IN_PROGRESS), LOST]
        wire = Script(AddPartitionsToTxn=moved, TxnOffsetCommit=[partitions(Code.NOT_COORDINATOR)])

        async def scenario(producer: KafkaTaskProducer) -> None:
            await producer.produce({ONE: RECORDS})
            assert wire.names().count("AddPartitionsToTxn") == 4
            await producer.send_offsets({ONE: Offset(5)}, "group")
            await producer.end(commit=True)
            assert wire.names()[-4:] == ["AddOffsetsToTxn", "TxnOffsetCommit", "TxnOffsetCommit", "EndTxn"]
            assert wire.lookups == 3 + 2

        with_producer(wire, scenario)

    @pytest.mark.parametrize("fenced", sorted(FENCED))
    @pytest.mark.parametrize("step", ["AddPartitionsToTxn", "Produce", "AddOffsetsToTxn", "TxnOffsetCommit", "EndTxn"])
    def test_a_fence_is_told_in_every_step(self, step: str, fenced: Code) -> None:
        answers = {"Produce": produced(fenced, -1), "AddOffsetsToTxn": code(fenced), "EndTxn": code(fenced)}
        wire = Script(**{step: [answers.get(step, partitions(fenced))]})

        async def scenario(producer: KafkaTaskProducer) -> None:
            async def epoch() -> None:
                await producer.produce({ONE: RECORDS})
                await producer.send_offsets({ONE: Offset(5)}, "group")
                await producer.end(commit=True)

            with pytest.raises(ProducerFenced):
                await epoch()
            if step != "EndTxn":
                assert "EndTxn" not in wire.names()

        with_producer(wire, scenario)

    def test_the_batch_of_a_retry_that_never_ends_is_given_up_within_the_limit(self) -> None:
        wire = Script(Produce=[produced(Code.NOT_LEADER_OR_FOLLOWER)] * 1000)

        async def scenario(producer: KafkaTaskProducer) -> None:
            with pytest.raises(BrokerUnavailable, match="NOT_LEADER_OR_FOLLOWER"):
                await producer.produce({ONE: RECORDS})
            spent = wire.clock.monotonic_s()
            assert limits.RETRY_TOTAL_S <= spent <= limits.RETRY_TOTAL_S + limits.RETRY_BACKOFF_S_MAX
            with pytest.raises(BrokerUnavailable):
                await producer.end(commit=True)
            assert "EndTxn" not in wire.names()

        with_producer(wire, scenario)

    @pytest.mark.parametrize(
        ("answers", "outcome", "asked"),
        [
            ([UNREACHABLE, code(Code.NOT_COORDINATOR), code(Code.CONCURRENT_TRANSACTIONS)], None, 4),
            ([LOST], UnknownOutcome, 1),
            ([code(Code.NOT_COORDINATOR), LOST], UnknownOutcome, 2),
            ([code(Code.COORDINATOR_LOAD_IN_PROGRESS)] * 1000, UnknownOutcome, None),
            ([UNREACHABLE] * 1000, UnknownOutcome, None),
        ],
    )
    def test_a_commit_is_asked_again_only_while_no_answer_is_missing(
        self, answers: list[Any], outcome: type[StreamprocError] | None, asked: int | None
    ) -> None:
        wire = Script(EndTxn=answers)

        async def scenario(producer: KafkaTaskProducer) -> None:
            await producer.produce({ONE: RECORDS})
            if outcome is None:
                await producer.end(commit=True)
            else:
                with pytest.raises(outcome):
                    await producer.end(commit=True)
                with pytest.raises(outcome):
                    await producer.produce({ONE: RECORDS})
            assert asked in (None, wire.names().count("EndTxn"))

        with_producer(wire, scenario)

    def test_a_cancelled_step_leaves_nothing_to_commit(self) -> None:
        async def scenario(producer: KafkaTaskProducer) -> None:
            step = asyncio.create_task(producer.produce({ONE: RECORDS}))
            await until(lambda: "Produce" in wire.names())
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            with pytest.raises(UnknownOutcome, match="cancelled"):
                await producer.end(commit=True)

        wire = Script(Produce=[silence])
        with_producer(wire, scenario)

    def test_sequences_begin_again_at_the_end_of_their_31_bits(self) -> None:
        wire = Script()

        async def scenario(producer: KafkaTaskProducer) -> None:
            producer._sequences[ONE] = SEQUENCES - 1
            await producer.produce({ONE: RECORDS})
            await producer.produce({ONE: RECORDS})
            heads = [recordbatch.read_header(data) for data in batches_of(wire)]
            assert [(head.base_sequence, head.records) for head in heads] == [(SEQUENCES - 1, 1), (0, 1), (1, 2)]

        with_producer(wire, scenario)


def fetched(tp: TopicPartition, records: bytes, *, end: int, stable: int | None = None, error: int = 0) -> Any:
    row = (tp.partition, error, end, end if stable is None else stable, 0, None, -1, records)
    return SimpleNamespace(API_VERSION=11, topics=[(tp.topic, [row])])


def record_set(base: int, *values: bytes) -> bytes:
    return recordbatch.build([OutRecord(None, value) for value in values], base_offset=base, now_ms=1)


def listed(offset: int) -> Any:
    return SimpleNamespace(topics=[("one", [(0, 0, -1, offset)])])


def with_fetcher(wire: Script, scenario: Callable[[KafkaFetcher], Awaitable[None]]) -> None:
    async def within() -> None:
        fetcher = KafkaFetcher(wire, "fetch")
        try:
            await asyncio.wait_for(scenario(fetcher), 10)
        finally:
            await fetcher.close()

    asyncio.run(within())


class TestFetcher:
    def test_an_answer_to_an_earlier_resume_moves_nothing(self) -> None:
        async def scenario(fetcher: KafkaFetcher) -> None:
            late = asyncio.get_running_loop().create_future()
            wire.answers["Fetch"] = [late, fetched(ONE, record_set(7, b"new"), end=8), silence]
            fetcher.resume(ONE, Offset(0))
            await until(lambda: bool(wire.sent))
            fetcher.pause(ONE)
            fetcher.resume(ONE, Offset(7))
            late.set_result(fetched(ONE, record_set(0, b"old"), end=1))
            batch = await fetcher.get()
            assert (batch.offsets.tolist(), batch.next_position, fetcher.lag(ONE)) == ([7], 8, 0)

        wire = Script()
        with_fetcher(wire, scenario)

    def test_an_empty_answer_below_the_stable_offset_means_a_tail_compacted_away(self) -> None:
        wire = Script(Fetch=[fetched(ONE, b"", end=9, stable=9), silence])

        async def scenario(fetcher: KafkaFetcher) -> None:
            fetcher.resume(ONE, Offset(4))
            batch = await fetcher.get()
            assert (len(batch), batch.next_position) == (0, 9)
            assert fetcher.at_end(ONE)

        with_fetcher(wire, scenario)

    def test_an_open_transaction_at_the_tail_is_not_the_end(self) -> None:
        wire = Script(Fetch=[fetched(ONE, b"", end=9, stable=4), silence])

        async def scenario(fetcher: KafkaFetcher) -> None:
            fetcher.resume(ONE, Offset(4))
            waiting = asyncio.create_task(fetcher.get())
            await until(lambda: fetcher.lag(ONE) is not None)
            assert (fetcher.lag(ONE), fetcher.at_end(ONE)) == (5, False)
            waiting.cancel()

        with_fetcher(wire, scenario)

    def test_an_outage_is_told_again_and_again_and_ends_by_itself(self) -> None:
        down = [UNREACHABLE, fetched(ONE, b"", end=-1, error=Code.NOT_LEADER_OR_FOLLOWER)] * 14
        wire = Script(Fetch=[*down, fetched(ONE, record_set(0, b"back"), end=1), silence])

        async def scenario(fetcher: KafkaFetcher) -> None:
            fetcher.resume(ONE, Offset(0))
            with pytest.raises(BrokerUnavailable, match=r"one\[0\]"):
                await fetcher.get()
            assert wire.clock.monotonic_s() >= limits.FETCH_OUTAGE_S
            assert not fetcher.at_end(ONE)
            assert (await fetcher.get()).value(0) == b"back"
            assert wire.refreshed >= len(down)

        with_fetcher(wire, scenario)

    def test_a_partition_left_out_of_a_throttled_answer_is_asked_again_later(self) -> None:
        throttled = SimpleNamespace(API_VERSION=11, topics=[])
        wire = Script(Fetch=[throttled, fetched(ONE, record_set(0, b"a"), end=1), silence])

        async def scenario(fetcher: KafkaFetcher) -> None:
            fetcher.resume(ONE, Offset(0))
            assert (await fetcher.get()).value(0) == b"a"
            assert wire.clock.monotonic_s() > 0

        with_fetcher(wire, scenario)

    def test_a_lost_log_is_not_told_of_a_partition_that_was_resumed_elsewhere(self) -> None:
        outside = fetched(ONE, b"", end=-1, error=Code.OFFSET_OUT_OF_RANGE)
        wire = Script(
            Fetch=[outside, outside, fetched(ONE, record_set(3, b"a"), end=4), silence],
            Offset=[listed(3), listed(4)] * 2,
        )

        async def scenario(fetcher: KafkaFetcher) -> None:
            fetcher.resume(ONE, Offset(0))
            with pytest.raises(LogLost, match="from offset 0, but the log holds 3 to 4: 3 offsets are missing"):
                await fetcher.get()
            fetcher.resume(ONE, Offset(1))
            await until(lambda: wire.names().count("Offset") == 4)
            for _ in range(5):
                await asyncio.sleep(0)
            fetcher.resume(ONE, Offset(3))
            assert (await fetcher.get()).offsets.tolist() == [3]

        with_fetcher(wire, scenario)

    def test_nothing_more_is_asked_for_while_the_buffer_is_full(self) -> None:
        async def scenario() -> None:
            size = 300
            answers = [fetched(ONE, record_set(i, bytes([i]) * size), end=1000) for i in range(100)]
            wire = Script(Fetch=[*answers, silence])
            fetcher = KafkaFetcher(wire, "fetch", bytes_max=limits.FETCH_PARTITION_BYTES_MAX)
            fetcher._buffered = limits.FETCH_PARTITION_BYTES_MAX - 5 * size  # as if others held the rest
            fetcher.resume(ONE, Offset(0))
            for _ in range(500):
                await asyncio.sleep(0)
            asked = len(wire.sent)
            assert 1 <= asked <= 25
            got = [(await fetcher.get()).offsets.tolist() for _ in range(100)]
            assert got == [[i] for i in range(100)]
            await fetcher.close()

        asyncio.run(scenario())
