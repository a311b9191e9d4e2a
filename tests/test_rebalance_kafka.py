"""Rebalances on a real Kafka: static members come back unnoticed, and a lost task goes to where it is warm."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamproc.app import App
from streamproc.core import limits
from streamproc.core.clock import SystemClock
from streamproc.core.errors import FencedInstanceId
from streamproc.core.types import TopicPartition
from streamproc.testing.kafka_server import KafkaServer
from streamproc.transport.contract import GroupListener, OutRecord, TopicSpec
from streamproc.transport.kafka import KafkaTransport
from tests.apps import new_app, until
from tests.contract.transport_kit import Member

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

SESSION_S = 6.0
"""The least that a broker allows by default."""


# ---- static members


class Static:
    """A member of ``group`` with an instance id, in a process of its own as far as the broker can tell."""

    def __init__(self, kafka: KafkaServer, group: str, instance: str | None) -> None:
        self.transport = KafkaTransport(
            kafka.bootstrap, SystemClock(), client_id=f"process-{uuid.uuid4().hex[:6]}", instance_id=instance,
            session_timeout_s=SESSION_S, heartbeat_interval_s=0.5,
        )  # fmt: skip
        self.member, self.group = Member(), group
        self.membership = self.transport.membership(group)

    async def join(self, topic: str) -> None:
        await self.transport.start()
        await self.membership.start([topic], self.member.listener)

    async def leave(self) -> None:
        """As on SIGTERM."""
        await self.membership.stop()
        await self.transport.stop()

    def die(self) -> None:
        """As on SIGKILL: nothing of it is heard again."""
        coordinator = self.membership._consumer._coordinator
        coordinator._heartbeat_task.cancel()
        coordinator._coordination_task.cancel()


@asynccontextmanager
async def group_of(kafka: KafkaServer, *instances: str | None) -> AsyncIterator[tuple[str, list[Static]]]:
    """A topic of four partitions, and a group of members that share it."""
    topic, group = f"topic-{uuid.uuid4().hex}", f"group-{uuid.uuid4().hex}"
    members = [Static(kafka, group, instance) for instance in instances]
    for at, static in enumerate(members):
        if at == 0:
            await static.transport.start()
            await static.transport.create_topics([TopicSpec(topic, 4)])
        await static.join(topic)
    await until(lambda: all(len(one.member.holds()) == 4 // len(members) for one in members), "the group")
    try:
        yield topic, members
    finally:
        for static in members:
            await static.leave()


@pytest.mark.parametrize("ending", ["SIGTERM", "SIGKILL"])
def test_a_static_member_that_comes_back_finds_its_partitions_and_nobody_else_hears_of_it(
    kafka: KafkaServer, ending: str
) -> None:
    async def scenario() -> None:
        async with group_of(kafka, "a", "b") as (topic, members):
            first, other = members
            held, generation = first.member.holds(), first.member.told[-1][2]
            told = len(other.member.told)
            if ending == "SIGTERM":
                await first.leave()
            else:
                first.die()
            assert await other.transport.members(first.group) == 2, "it has not left"
            again = members[0] = Static(kafka, first.group, "a")
            began = time.monotonic()
            await again.join(topic)
            await until(lambda: again.member.holds() == held, "its partitions")
            assert time.monotonic() - began < SESSION_S - 1, "it waited for no session"
            assert again.member.told[-1][2] == generation
            assert await again.membership.confirm()
            assert await other.membership.confirm()
            if ending == "SIGKILL":
                assert not await first.membership.confirm()
            await asyncio.sleep(1.5)  # several heartbeats
            assert len(other.member.told) == told

    asyncio.run(scenario())


def test_a_static_member_that_does_not_come_back_loses_its_partitions_with_its_session(kafka: KafkaServer) -> None:
    async def scenario() -> None:
        async with group_of(kafka, "a", "b") as (_, members):
            first, other = members
            began = time.monotonic()
            await first.leave()
            await until(lambda: len(other.member.holds()) == 4, "all of them", 3 * SESSION_S)
            assert time.monotonic() - began > SESSION_S / 2
            assert await other.transport.members(first.group) == 1

    asyncio.run(scenario())


def test_a_member_without_an_instance_id_leaves_at_once(kafka: KafkaServer) -> None:
    async def scenario() -> None:
        async with group_of(kafka, None, None) as (_, members):
            first, other = members
            began = time.monotonic()
            await first.leave()
            await until(lambda: len(other.member.holds()) == 4, "all of them")
            assert time.monotonic() - began < SESSION_S - 1

    asyncio.run(scenario())


def test_of_two_members_with_one_instance_id_the_older_is_fenced_and_says_why(kafka: KafkaServer) -> None:
    async def scenario() -> None:
        async with group_of(kafka, "a", "b") as (topic, members):
            older, held = members[0], members[0].member.holds()
            newer = Static(kafka, older.group, "a")
            members.append(newer)
            await newer.join(topic)
            failure = await asyncio.wait_for(older.membership.failed(), 10)
            assert isinstance(failure, FencedInstanceId)
            assert "as instance 'a'" in str(failure)
            assert "consumer_group_instance_id" in str(failure)
            assert not await older.membership.confirm()
            await until(lambda: newer.member.holds() == held, "the newer one")
            await asyncio.sleep(3)  # the older one does not take its place back
            assert await newer.membership.confirm()

    asyncio.run(scenario())


def test_a_static_member_whose_session_ran_out_while_it_stood_still_joins_again(kafka: KafkaServer) -> None:
    async def scenario() -> None:
        async with group_of(kafka, "a", "b") as (_, members):
            first, other = members
            coordinator = first.membership._consumer._coordinator
            beat, stuck = coordinator._send_req, asyncio.Event()

            async def held_up(request: Any) -> Any:
                await stuck.wait()
                return await beat(request)

            coordinator._send_req = held_up
            await until(lambda: len(other.member.holds()) == 4, "the session's end", 3 * SESSION_S)
            stuck.set()
            await until(lambda: len(first.member.holds()) == len(other.member.holds()) == 2, "both again")
            assert await first.membership.confirm()

    asyncio.run(scenario())


def test_a_slow_revocation_holds_up_neither_questions_nor_the_others(kafka: KafkaServer) -> None:
    async def scenario() -> None:
        async with group_of(kafka, None) as (topic, members):
            (first,) = members
            go, revoking = asyncio.Event(), asyncio.Event()
            revoked = first.member.listener.on_revoked

            async def slow(tps: Any) -> None:
                revoking.set()
                await go.wait()
                await revoked(tps)

            first.membership._listener = GroupListener(slow, first.member.listener.on_assigned)
            newcomer = Static(kafka, first.group, None)
            members.append(newcomer)
            await newcomer.join(topic)
            await asyncio.wait_for(revoking.wait(), 20)
            for membership in (first.membership, newcomer.membership):
                assert not await asyncio.wait_for(membership.confirm(), 2)
                assert membership.assignment() == membership.standbys() == frozenset()
            assert await asyncio.wait_for(first.transport.members(first.group), 5) == 2
            go.set()
            await until(lambda: len(first.member.holds()) == len(newcomer.member.holds()) == 2, "both")

    asyncio.run(scenario())


# ---- standbys


KEYS = 42
PARTITIONS = 6
"""A divisor of `KEYS`: a key is counted in one task."""


class Crew:
    """Workers in this process, each with its own state, that count values per key."""

    def __init__(self, kafka: KafkaServer, folder: Path) -> None:
        self.kafka, self.folder = kafka, folder
        self.name = f"crew-{uuid.uuid4().hex[:8]}"
        self.topic = f"{self.name}-in"
        self.apps: dict[str, App] = {}

    async def start(self, name: str, **options: Any) -> App:
        app = new_app(
            self.folder, self.name, broker=f"kafka://{self.kafka.bootstrap}", datadir=self.folder / name,
            broker_session_timeout=SESSION_S, broker_heartbeat_interval=0.5, table_standby_replicas=1,
            web_port=7000 + len(name), **options,
        )  # fmt: skip
        counts = app.Table("counts", default=int)

        @app.agent(app.topic(self.topic, partitions=PARTITIONS), name="count")
        async def count(stream: Any) -> None:
            async for value in stream:
                counts[value % KEYS] += 1

        await app.start()
        self.apps[name] = app
        return app

    async def stop(self, name: str) -> None:
        await self.apps.pop(name).stop()

    async def send(self, app: App, numbers: range) -> None:
        by_partition: dict[TopicPartition, list[OutRecord]] = {}
        for value in numbers:
            tp = TopicPartition(self.topic, value % PARTITIONS)
            by_partition.setdefault(tp, []).append(OutRecord(b"k", json.dumps(value).encode()))
        await app.runtime.transport.send(by_partition)

    def owners(self) -> dict[int, str]:
        return {task.partition: name for name, app in self.apps.items() for task in app.runtime.tasks}

    def warm(self) -> dict[int, str]:
        """Where each partition's standby has what its task committed last."""
        tasks = [task for app in self.apps.values() for task in app.runtime.tasks.values()]
        epochs = {task.id: task.record.epoch for task in tasks if task.record is not None}
        return {
            task.partition: name
            for name, app in self.apps.items()
            for task, standby in app.runtime.standbys.running.items()
            if standby.epoch == epochs.get(task)
        }

    def done(self) -> int:
        records = [task.record for app in self.apps.values() for task in app.runtime.tasks.values() if task.record]
        return sum(at for record in records for of in record.positions.values() for at in of.values())

    def counted(self) -> dict[int, int]:
        return {key: max(app.runtime.committed("counts", key, 0) for app in self.apps.values()) for key in range(KEYS)}

    async def settled(self, records: int, what: str) -> None:
        def is_so() -> bool:
            return self.done() == records and self.all_held() and len(self.warm()) == PARTITIONS

        await until(is_so, what, 60)

    def all_held(self) -> bool:
        return len(self.owners()) == PARTITIONS


def test_a_lost_worker_s_tasks_go_to_their_standbys_which_restore_only_the_tail(
    kafka: KafkaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STANDBY_POLL_S", 0.1)

    async def scenario() -> None:
        crew = Crew(kafka, tmp_path)
        try:
            first = await crew.start("one")
            await crew.start("two-")
            await crew.start("three")
            await until(lambda: sorted(Counter(crew.owners().values()).values()) == [2, 2, 2], "two tasks each", 60)
            await crew.send(first, range(2_000))
            await crew.settled(2_000, "all warm")
            owners, warm = crew.owners(), crew.warm()
            assert all(owners[partition] != warm[partition] for partition in owners)
            lost = owners[0]
            await crew.stop(lost)
            await until(lambda: crew.all_held() and crew.done() == 2_000, "the tasks, moved", 60)
            moved = {partition: name for partition, name in crew.owners().items() if owners[partition] == lost}
            assert moved == {partition: warm[partition] for partition in moved}
            for partition, name in moved.items():
                (task,) = [t for t in crew.apps[name].runtime.tasks.values() if t.id.partition == partition]
                assert task.view.restore is not None
                assert task.view.restore.start > 0
            await crew.send(next(iter(crew.apps.values())), range(2_000, 2_400))
            await until(lambda: crew.done() == 2_400, "more", 60)
            assert crew.counted() == Counter(value % KEYS for value in range(2_400))
        finally:
            for name in list(crew.apps):
                await crew.stop(name)

    asyncio.run(scenario())


def test_a_static_worker_that_restarts_keeps_its_tasks_and_the_others_run_on(
    kafka: KafkaServer, tmp_path: Path
) -> None:
    async def scenario() -> None:
        crew = Crew(kafka, tmp_path)
        try:
            first = await crew.start("one", consumer_group_instance_id="worker-1")
            await crew.start("two-", consumer_group_instance_id="worker-2")
            await until(lambda: sorted(Counter(crew.owners().values()).values()) == [3, 3], "three tasks each", 60)
            await crew.send(first, range(1_000))
            await crew.settled(1_000, "all")
            owners, other = crew.owners(), crew.apps["two-"]
            tasks = dict(other.runtime.tasks)

            def epochs() -> int:
                return sum(task.record.epoch for task in tasks.values() if task.record)

            await crew.stop("one")
            before = epochs()
            await crew.send(other, range(1_000, 1_400))
            await until(lambda: epochs() > before, "the other goes on while one is away")
            # Under another address: a container has a name of its own each time.
            await crew.start("one", consumer_group_instance_id="worker-1", web_host="elsewhere")
            await until(lambda: crew.done() == 1_400, "all", 60)
            assert crew.owners() == owners
            assert other.runtime.tasks == tasks, "they have not been started anew"
            assert crew.counted() == Counter(value % KEYS for value in range(1_400))
        finally:
            for name in list(crew.apps):
                await crew.stop(name)

    asyncio.run(scenario())
