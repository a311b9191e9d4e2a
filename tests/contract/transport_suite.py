"""What every transport must do, whatever is behind it.

A binding is a test module of a few lines:

    pytest.register_assert_rewrite("contract.transport_suite")
    from contract.transport_suite import OpenLog, TransportContract

    @pytest.fixture
    def open_transport() -> OpenTransport: ...        # a factory, see `OpenTransport`

    class TestMine(TransportContract): ...

Topic names are unique per test, so that all tests may share one broker.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from contract.transport_kit import (
    WAIT_S,
    Member,
    OpenLog,
    OpenTransport,
    commit,
    eventually,
    group_reaches,
    new_producer,
    new_topic,
    nothing_comes,
    offsets_reach,
    play,
    read_rows,
    read_values,
    some,
    take,
    unique,
)
from streamproc.avro.recordbatch import Columns
from streamproc.core.batch import Headers
from streamproc.core.errors import LogLost, ProduceRefused, ProducerFenced, UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutColumns, OutRecord, TopicSpec

__all__ = ["OpenLog", "OpenTransport", "TransportContract"]


class TopicsContract:
    def test_a_missing_topic_has_no_partitions_and_a_made_one_has_its_count(
        self, open_transport: OpenTransport
    ) -> None:
        async def scenario(log: OpenLog) -> None:
            assert await log.transport.partitions(unique("missing")) is None
            topic = await new_topic(log.transport, partitions=3)
            assert await log.transport.partitions(topic) == 3

        play(open_transport, scenario)

    def test_making_a_topic_again_with_the_same_settings_is_no_error(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, cleanup_policy="compact")
            await log.transport.create_topics([TopicSpec(topic, 1, {"cleanup.policy": "compact"})])
            await log.transport.create_topics([TopicSpec(topic, 1)])

        play(open_transport, scenario)

    @pytest.mark.parametrize(
        ("spec", "named"),
        [((2, {}), ("1", "2")), ((1, {"cleanup.policy": "delete"}), ("cleanup.policy", "compact", "delete"))],
    )
    def test_a_topic_that_drifted_is_refused_with_both_values(
        self, open_transport: OpenTransport, spec: tuple[int, dict[str, str]], named: tuple[str, ...]
    ) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, cleanup_policy="compact")
            with pytest.raises(UserError) as refused:
                await log.transport.create_topics([TopicSpec(topic, *spec)])
            assert all(word in str(refused.value) for word in (topic, *named))

        play(open_transport, scenario)

    def test_topics_and_records_are_there_after_reopening(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, partitions=2)
            tp = TopicPartition(topic, 1)
            await log.transport.send({tp: some("a", "b")})
            transport = await log.reopen()
            assert await transport.partitions(topic) == 2
            assert await read_values(transport, tp) == ["a", "b"]

        play(open_transport, scenario)

    def test_a_deleted_topic_is_gone_with_its_records_and_can_be_made_anew(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            gone = await new_topic(log.transport, partitions=2, cleanup_policy="compact")
            stays = await new_topic(log.transport)
            await log.transport.send({TopicPartition(gone, 1): some("a"), TopicPartition(stays, 0): some("b")})
            await log.transport.delete_topics([gone, unique("missing")])
            assert await log.transport.partitions(gone) is None
            assert await read_values(log.transport, TopicPartition(stays, 0)) == ["b"]
            await log.transport.create_topics([TopicSpec(gone, 3)])
            assert await read_values(log.transport, TopicPartition(gone, 1)) == []
            await log.transport.send({TopicPartition(gone, 1): some("c")})
            transport = await log.reopen()
            assert await transport.partitions(gone) == 3
            assert await read_values(transport, TopicPartition(gone, 1)) == ["c"]

        play(open_transport, scenario)


class RecordsContract:
    def test_send_returns_the_last_offset_of_each_partition(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, partitions=2)
            one, two = TopicPartition(topic, 0), TopicPartition(topic, 1)
            assert await log.transport.send({one: some("a", "b", "c"), two: some("x")}) == {one: 2, two: 0}
            assert await log.transport.send({one: some("d")}) == {one: 3}
            assert await read_rows(log.transport, one, 1) == [(1, b"kb", b"b"), (2, b"kc", b"c"), (3, b"kd", b"d")]

        play(open_transport, scenario)

    def test_null_keys_and_values_headers_and_timestamps_round_trip(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            headers: Headers = (("reason", b"late"), ("nothing", None), ("empty", b""), ("reason", b"twice"))
            sent = [
                OutRecord(None, None, (), 1_000),
                OutRecord(b"", b"", headers, 1_700_000_000_123),
                OutRecord(b"k", None, (("näme", b"\x00\xff"),), 999),
                OutRecord(None, b"v"),
            ]
            await log.transport.send({tp: sent})
            [batch] = [batch async for batch in log.transport.read(tp, Offset(0), Offset(4))]
            assert [(batch.key(i), batch.value(i), batch.headers(i)) for i in range(4)] == [r[:3] for r in sent]
            assert batch.timestamps[:3].tolist() == [1_000, 1_700_000_000_123, 999]
            assert batch.timestamps[3] > 1_600_000_000_000

        play(open_transport, scenario)

    def test_columns_are_written_as_their_records_would_be_in_a_transaction(
        self, open_transport: OpenTransport
    ) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, partitions=2)
            source, target = TopicPartition(topic, 0), TopicPartition(topic, 1)
            sent = [OutRecord(b"k%d" % i, None if i % 5 == 0 else b"v" * i, (("n", b"%d" % i),), i) for i in range(50)]
            await log.transport.send({source: sent})
            [read] = [batch async for batch in log.transport.read(source, Offset(0), Offset(50))]
            producer = await new_producer(log.transport)
            made = OutColumns(Columns.of(read, np.arange(0, 50, 2)))
            assert await producer.produce({target: made}) == {target: 24}
            assert await producer.produce({target: made[:3]}) == {target: 27}
            await producer.end(commit=True)
            found = [batch async for batch in log.transport.read(target, Offset(0), Offset(29))]
            records = [
                OutRecord(batch.key(i), batch.value(i), batch.headers(i), int(batch.timestamps[i]))
                for batch in found
                for i in range(len(batch))
            ]
            assert records == [*sent[::2], *sent[::2][:3]]

        play(open_transport, scenario)

    def test_large_and_many_records_come_back_whole(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            values = [os.urandom(900_000), b"small", *(os.urandom(40_000) for _ in range(60)), os.urandom(900_000)]
            producer = await new_producer(log.transport)
            last = await commit(producer, {tp: [OutRecord(None, value) for value in values]})
            assert last == {tp: len(values) - 1}
            assert [value for _, _, value in await read_rows(log.transport, tp)] == values

        play(open_transport, scenario)

    def test_deleted_records_are_gone_and_the_rest_stays(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            await log.transport.send({tp: some("a", "b", "c")})
            await log.transport.delete_records({tp: Offset(2)})
            assert (await log.transport.offsets([tp]))[tp] == (2, 3, 3)
            assert await read_values(log.transport, tp, 0) == ["c"]
            await log.transport.delete_records({tp: Offset(3)})
            assert await read_values(log.transport, tp, 0) == []
            assert await log.transport.send({tp: some("d")}) == {tp: 3}

        play(open_transport, scenario)


class TransactionsContract:
    def test_a_commit_shows_all_partitions_and_an_abort_none(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, partitions=2)
            one, two = TopicPartition(topic, 0), TopicPartition(topic, 1)
            producer = await new_producer(log.transport)
            await producer.produce({one: some("lost"), two: some("lost")})
            await producer.end(commit=False)
            await producer.produce({one: some("a")})
            assert await producer.produce({one: some("b"), two: some("c", "d")}) == {one: 3, two: 3}
            await producer.end(commit=True)
            assert await read_rows(log.transport, one) == [(2, b"ka", b"a"), (3, b"kb", b"b")]
            assert await read_values(log.transport, two) == ["c", "d"]

        play(open_transport, scenario)

    def test_ending_without_a_transaction_does_nothing(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            producer = await new_producer(log.transport)
            await producer.end(commit=True)
            await producer.end(commit=False)
            await commit(producer, {tp: some("a")})
            await producer.end(commit=True)
            assert await read_values(log.transport, tp) == ["a"]

        play(open_transport, scenario)

    def test_interleaved_aborted_and_committed_producers_are_told_apart(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            # offset  0   1   2   3   4        5        6   7   8        9
            #         a1  b1  a2  b2  abort a  plain    a3  b3  commit b commit a
            tp = TopicPartition(await new_topic(log.transport), 0)
            a, b = await new_producer(log.transport), await new_producer(log.transport)
            for producer, value in ((a, "a1"), (b, "b1"), (a, "a2"), (b, "b2")):
                await producer.produce({tp: some(value)})
            await a.end(commit=False)
            await offsets_reach(log.transport, tp, 0, 1, 5)
            await log.transport.send({tp: some("plain")})
            await a.produce({tp: some("a3")})
            await b.produce({tp: some("b3")})
            await b.end(commit=True)
            await offsets_reach(log.transport, tp, 0, 6, 9)
            await a.end(commit=True)
            expected = ["b1", "b2", "plain", "a3", "b3"]
            assert await read_values(log.transport, tp) == expected
            for start, left in ((0, 5), (1, 5), (2, 4), (4, 3), (5, 3), (6, 2), (7, 1), (8, 0)):
                assert await read_values(log.transport, tp, start) == expected[5 - left :]

        play(open_transport, scenario)

    def test_an_abort_in_the_middle_of_a_record_set_hides_only_itself(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            producer = await new_producer(log.transport)
            for number, kept in enumerate((True, False, True, False, False, True)):
                await producer.produce({tp: some(f"{number}x", f"{number}y")})
                await producer.end(commit=kept)
            assert await read_values(log.transport, tp) == ["0x", "0y", "2x", "2y", "5x", "5y"]
            assert await read_rows(log.transport, tp, 7) == [
                (7, b"k2y", b"2y"),
                (15, b"k5x", b"5x"),
                (16, b"k5y", b"5y"),
            ]

        play(open_transport, scenario)

    def test_reading_ends_behind_a_tail_of_markers_and_aborted_records(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            producer = await new_producer(log.transport)
            await commit(producer, {tp: some("a")})
            for _ in range(3):
                await producer.produce({tp: some("lost")})
                await producer.end(commit=False)
            assert await read_values(log.transport, tp) == ["a"]
            await offsets_reach(log.transport, tp, 0, 8, 8)
            assert await read_values(log.transport, tp, 1) == []
            assert [batch async for batch in log.transport.read(tp, Offset(8), Offset(8))] == []
            fetcher = log.transport.fetcher()
            fetcher.resume(tp, Offset(0))
            position = 0
            while position < 8:
                position = (await asyncio.wait_for(fetcher.get(), WAIT_S)).next_position
            assert position == 8
            await fetcher.close()

        play(open_transport, scenario)

    def test_an_open_transaction_holds_the_last_stable_offset_back(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            await log.transport.send({tp: some("before")})
            slow, quick = await new_producer(log.transport), await new_producer(log.transport)
            await slow.produce({tp: some("slow")})
            await commit(quick, {tp: some("quick")})
            await log.transport.send({tp: some("plain")})
            await offsets_reach(log.transport, tp, 0, 1, 5)
            fetcher = log.transport.fetcher()
            fetcher.resume(tp, Offset(0))
            assert [row for _, row in await take(fetcher, 1)] == [(0, b"kbefore", b"before")]
            await nothing_comes(fetcher)
            await slow.end(commit=True)
            assert [row[2] for _, row in await take(fetcher, 3)] == [b"slow", b"quick", b"plain"]
            await fetcher.close()

        play(open_transport, scenario)

    def test_committed_records_survive_reopening_and_open_ones_do_not(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp, name = TopicPartition(await new_topic(log.transport), 0), unique("txn")
            producer = await new_producer(log.transport, name)
            await commit(producer, {tp: some("kept")})
            await producer.produce({tp: some("open")})
            transport = await log.reopen()
            successor = await new_producer(transport, name)
            await commit(successor, {tp: some("after")})
            assert await read_values(transport, tp) == ["kept", "after"]

        play(open_transport, scenario)

    def test_many_producers_commit_side_by_side_on_one_transport(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, partitions=4)

            async def work(number: int) -> None:
                producer = await new_producer(log.transport)
                for turn in range(5):
                    to = TopicPartition(topic, (number + turn) % 4)
                    await producer.produce({to: some(f"{number}.{turn}")})
                    await producer.end(commit=turn != 2)

            await asyncio.gather(*(work(number) for number in range(8)))
            seen = [value for p in range(4) for value in await read_values(log.transport, TopicPartition(topic, p))]
            assert sorted(seen) == sorted(f"{number}.{turn}" for number in range(8) for turn in (0, 1, 3, 4))

        play(open_transport, scenario)


class FencingContract:
    def test_a_fence_aborts_the_open_transaction_of_the_previous_owner(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp, name = TopicPartition(await new_topic(log.transport), 0), unique("txn")
            old = await new_producer(log.transport, name)
            await old.produce({tp: some("old")})
            new = await new_producer(log.transport, name)
            await commit(new, {tp: some("new")})
            assert await read_values(log.transport, tp) == ["new"]

        play(open_transport, scenario)

    @pytest.mark.parametrize("act", ["produce", "send_offsets", "commit", "abort"])
    def test_nothing_of_a_fenced_producer_gets_through(self, open_transport: OpenTransport, act: str) -> None:
        async def scenario(log: OpenLog) -> None:
            tp, name, group = TopicPartition(await new_topic(log.transport), 0), unique("txn"), unique("group")
            old = await new_producer(log.transport, name)
            await old.produce({tp: some("old")})
            new = await new_producer(log.transport, name)
            acts: dict[str, Callable[[], Awaitable[object]]] = {
                "produce": lambda: old.produce({tp: some("zombie")}),
                "send_offsets": lambda: old.send_offsets({tp: Offset(7)}, group),
                "commit": lambda: old.end(commit=True),
                "abort": lambda: old.end(commit=False),
            }
            with pytest.raises(ProducerFenced):
                await acts[act]()
            await commit(new, {tp: some("new")})
            assert await read_values(log.transport, tp) == ["new"]
            assert await log.transport.group_offsets(group, [tp]) == {}

        play(open_transport, scenario)

    def test_a_record_too_large_is_refused_before_the_commit(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            small, wide = await new_topic(log.transport, max_message_bytes="2000"), await new_topic(log.transport)
            refusing, taking, name = TopicPartition(small, 0), TopicPartition(wide, 0), unique("txn")
            producer = await new_producer(log.transport, name)
            await producer.produce({taking: some("same epoch")})
            with pytest.raises(ProduceRefused) as refused:
                await producer.produce({taking: some("too"), refusing: [OutRecord(None, os.urandom(5_000))]})
            assert (refused.value.topic, refused.value.too_large) == (small, True)
            await new_producer(log.transport, name)
            assert await read_values(log.transport, taking) == []
            assert await read_values(log.transport, refusing) == []
            with pytest.raises(ProduceRefused):
                await log.transport.send({refusing: [OutRecord(None, os.urandom(5_000))]})

        play(open_transport, scenario)


class OffsetsContract:
    def test_offsets_of_an_empty_partition_are_all_zero(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, partitions=2)
            tps = [TopicPartition(topic, 0), TopicPartition(topic, 1)]
            await log.transport.send({tps[1]: some("a")})
            assert await log.transport.offsets(tps) == {tps[0]: (0, 0, 0), tps[1]: (0, 1, 1)}

        play(open_transport, scenario)

    def test_group_offsets_move_with_the_commit_and_not_with_an_abort(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic, group = await new_topic(log.transport, partitions=2), unique("group")
            one, two = TopicPartition(topic, 0), TopicPartition(topic, 1)
            producer = await new_producer(log.transport)
            await producer.send_offsets({one: Offset(5)}, group)
            await producer.end(commit=False)
            assert await log.transport.group_offsets(group, [one, two]) == {}
            await producer.produce({one: some("a")})
            await producer.send_offsets({one: Offset(7)}, group)
            await producer.end(commit=True)
            await group_reaches(log.transport, group, {one: 7})
            await producer.send_offsets({one: Offset(9), two: Offset(1)}, group)
            await producer.end(commit=True)
            await group_reaches(log.transport, group, {one: 9, two: 1})
            await group_reaches(await log.reopen(), group, {one: 9, two: 1})

        play(open_transport, scenario)


class FetcherContract:
    def test_get_waits_for_a_record_and_returns_it(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            fetcher = log.transport.fetcher()
            fetcher.resume(tp, Offset(0))
            waiting = asyncio.ensure_future(take(fetcher, 1))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await log.transport.send({tp: some("a")})
            assert await waiting == [(tp, (0, b"ka", b"a"))]
            await fetcher.close()

        play(open_transport, scenario)

    def test_a_busy_partition_does_not_starve_a_quiet_one(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, partitions=3)
            busy, others = TopicPartition(topic, 0), [TopicPartition(topic, 1), TopicPartition(topic, 2)]
            await log.transport.send({busy: [OutRecord(None, os.urandom(100_000)) for _ in range(120)]})
            await log.transport.send({tp: some("quiet") for tp in others})
            fetcher = log.transport.fetcher()
            for tp in (busy, *others):
                fetcher.resume(tp, Offset(0))
            seen = [tp for tp, _ in await take(fetcher, 122)]
            assert sorted(seen) == sorted([busy] * 120 + others)
            assert all(seen.index(tp) < 80 for tp in others)
            await fetcher.close()

        play(open_transport, scenario)

    def test_a_resume_never_hands_out_what_an_earlier_one_fetched(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            await log.transport.send({tp: some(*"abcdef")})
            fetcher = log.transport.fetcher()
            fetcher.resume(tp, Offset(0))
            await asyncio.sleep(0.1)  # time for a fetch from 0 to be on its way, or here
            fetcher.pause(tp)
            await nothing_comes(fetcher)
            fetcher.resume(tp, Offset(4))
            assert [row[0] for _, row in await take(fetcher, 2)] == [4, 5]
            fetcher.resume(tp, Offset(0))
            fetcher.resume(tp, Offset(3))
            assert [row[0] for _, row in await take(fetcher, 3)] == [3, 4, 5]
            fetcher.pause(tp)
            await log.transport.send({tp: some("g")})
            await nothing_comes(fetcher)
            fetcher.resume(tp, Offset(6))
            assert [row[0] for _, row in await take(fetcher, 1)] == [6]
            await fetcher.close()

        play(open_transport, scenario)

    def test_end_and_lag_follow_what_was_handed_out(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, partitions=2)
            tp, empty = TopicPartition(topic, 0), TopicPartition(topic, 1)
            await log.transport.send({tp: some("a", "b", "c")})
            fetcher = log.transport.fetcher()
            assert fetcher.lag(tp) is None
            assert not fetcher.at_end(tp)
            fetcher.resume(tp, Offset(0))
            fetcher.resume(empty, Offset(0))
            await take(fetcher, 3)
            waiting = asyncio.ensure_future(take(fetcher, 1))
            await eventually(lambda: fetcher.at_end(tp) and fetcher.at_end(empty))
            assert (fetcher.lag(tp), fetcher.lag(empty)) == (0, 0)
            await log.transport.send({tp: some("d")})
            assert await waiting == [(tp, (3, b"kd", b"d"))]
            await fetcher.close()

        play(open_transport, scenario)

    @pytest.mark.parametrize("position", [0, 9])
    def test_a_position_outside_the_log_is_an_error_with_both_numbers(
        self, open_transport: OpenTransport, position: int
    ) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            await log.transport.send({tp: some("a", "b", "c")})
            await log.transport.delete_records({tp: Offset(2)})
            fetcher = log.transport.fetcher()
            fetcher.resume(tp, Offset(position))
            with pytest.raises(LogLost) as lost:
                await take(fetcher, 1)
            assert all(word in str(lost.value) for word in (tp.topic, str(position), "2", "3"))
            await fetcher.close()

        play(open_transport, scenario)

    def test_two_fetchers_read_the_same_partition_independently(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            tp = TopicPartition(await new_topic(log.transport), 0)
            await log.transport.send({tp: some("a", "b")})
            one, two = log.transport.fetcher(), log.transport.fetcher()
            one.resume(tp, Offset(0))
            two.resume(tp, Offset(1))
            assert [row[2] for _, row in await take(one, 2)] == [b"a", b"b"]
            assert [row[2] for _, row in await take(two, 1)] == [b"b"]
            await one.close()
            await two.close()

        play(open_transport, scenario)


class MembershipContract:
    def test_a_lone_member_holds_every_partition_and_confirms(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = await new_topic(log.transport, partitions=3)
            everything = frozenset(TopicPartition(topic, p) for p in range(3))
            group = unique("group")
            assert await log.transport.members(group) == 0
            member, membership = Member(), log.transport.membership(group)
            await membership.start([topic], member.listener)
            await eventually(lambda: member.holds() == everything)
            assert membership.assignment() == everything
            assert await membership.confirm()
            assert await log.transport.members(group) == 1
            await membership.stop()
            assert await log.transport.members(group) == 0
            assert member.told[-1][:2] == ("revoked", everything)
            assert membership.assignment() == frozenset()
            assert not await membership.confirm()

        play(open_transport, scenario)

    def test_two_members_share_partition_numbers_and_the_generation_rises(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topics = [await new_topic(log.transport, partitions=4), await new_topic(log.transport, partitions=4)]
            everything = frozenset(TopicPartition(topic, p) for topic in topics for p in range(4))
            group, one, two = unique("group"), Member(), Member()
            first, second = log.transport.membership(group), log.transport.membership(group)
            await first.start(topics, one.listener)
            await eventually(lambda: one.holds() == everything)
            generation = one.told[-1][2]
            await second.start(topics, two.listener)
            await eventually(lambda: len(one.holds()) == 4 and len(two.holds()) == 4)
            assert one.holds() | two.holds() == everything
            assert not {tp.partition for tp in one.holds()} & {tp.partition for tp in two.holds()}
            assert ("revoked", everything, -1) in one.told
            assert one.told[-1][2] == two.told[-1][2] > generation
            assert await first.confirm()
            assert await second.confirm()
            await second.stop()
            await eventually(lambda: one.holds() == everything)
            await first.stop()

        play(open_transport, scenario)

    @pytest.mark.parametrize("callback", ["assigned", "revoked"])
    def test_what_a_callback_raises_reaches_failed(self, open_transport: OpenTransport, callback: str) -> None:
        async def scenario(log: OpenLog) -> None:
            topic, group, error = await new_topic(log.transport), unique("group"), RuntimeError("from the listener")
            membership, other = log.transport.membership(group), log.transport.membership(group)
            member = Member(failing=callback, error=error)
            await membership.start([topic], member.listener)
            await eventually(lambda: member.heard("assigned"))
            await other.start([topic], Member().listener)
            assert await asyncio.wait_for(membership.failed(), WAIT_S) is error
            await other.stop()
            await membership.stop()

        play(open_transport, scenario)

    def test_an_unknown_topic_is_refused_by_name(self, open_transport: OpenTransport) -> None:
        async def scenario(log: OpenLog) -> None:
            topic = unique("missing")
            with pytest.raises(UserError, match=topic):
                await log.transport.membership(unique("group")).start([topic], Member().listener)

        play(open_transport, scenario)


class TransportContract(
    TopicsContract,
    RecordsContract,
    TransactionsContract,
    FencingContract,
    OffsetsContract,
    FetcherContract,
    MembershipContract,
):
    """All of it; a binding subclasses this as ``class Test…`` beside its ``open_transport`` fixture."""
