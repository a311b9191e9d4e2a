"""The group coordinator of a simulated broker, as Kafka's works: heartbeats, rounds, sessions that run out.

A member that is dead or paused is not heard of; it loses its place after the session time-out, or when it does not join
a round within the rebalance time-out. One that wakes up learns at its next heartbeat that it is no member any more.
Which numbers lie with whom is drawn anew in every round: a task may move anywhere at any time, and back.

    JOIN ─▶ round: every live member revokes, joins ─▶ generation + 1, shares ─▶ every member is assigned
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from streamproc.core import limits
from streamproc.core.types import TopicPartition
from streamproc.testing.simulation.loop import VirtualLoop
from streamproc.transport.contract import GroupListener

__all__ = ["SimulatedCoordinator", "SimulatedMembership"]

_CHECK_S = 0.25


class Round(NamedTuple):
    """What a member is told at the end of a round."""

    generation: int
    share: frozenset[TopicPartition]
    standbys: frozenset[TopicPartition]
    """Partitions of others whose state it is to keep warm."""


@dataclass(eq=False)
class _Member:
    """The coordinator's side of a member."""

    number: int
    topics: frozenset[str]
    heard_s: float
    joined: asyncio.Future[Round] | None = None
    """Set while it waits in a round."""
    generation: int = -1


@dataclass(eq=False)
class SimulatedCoordinator:
    """One consumer group."""

    loop: VirtualLoop
    dice: random.Random
    partitions: Callable[[str], int]
    members: dict[int, _Member] = field(default_factory=dict)
    generation: int = 0
    _number: int = 0
    _round_s: float | None = None
    """When the round under way began."""

    def enter(self, topics: Collection[str]) -> _Member:
        """A new member; it takes part from the next round on."""
        self._number += 1
        member = self.members[self._number] = _Member(self._number, frozenset(topics), self.loop.time())
        self.rebalance()
        return member

    def rebalance(self) -> None:
        """Begin a round, if there is none."""
        if self._round_s is None:
            self._round_s = self.loop.time()

    def heartbeat(self, member: _Member) -> str:
        """What the coordinator answers: ``ok``, ``rebalance`` (join the round) or ``unknown`` (no member any more)."""
        if self.members.get(member.number) is not member:
            return "unknown"
        member.heard_s = self.loop.time()
        return "ok" if self._round_s is None else "rebalance"

    def join(self, member: _Member) -> asyncio.Future[Round]:
        """Take part in the round; resolves when it is over."""
        self.rebalance()
        member.joined = self.loop.create_future()
        return member.joined

    def leave(self, member: _Member) -> None:
        if self.members.pop(member.number, None) is not None:
            self.rebalance()

    def current(self, member: _Member, generation: int) -> bool:
        """Whether the member is in its generation; Kafka says no to a heartbeat during a round."""
        return self.members.get(member.number) is member and generation == self.generation and self._round_s is None

    async def serve(self) -> None:
        """The coordinator's own life: sessions and rounds."""
        while True:
            await asyncio.sleep(_CHECK_S)
            now_s = self.loop.time()
            for member in list(self.members.values()):
                if member.joined is None and now_s - member.heard_s > limits.SESSION_TIMEOUT_S:
                    self.leave(member)
            if self._round_s is None:
                continue
            if now_s - self._round_s > limits.REBALANCE_TIMEOUT_S:
                for member in [member for member in self.members.values() if member.joined is None]:
                    self.leave(member)
            if self.members and all(member.joined is not None for member in self.members.values()):
                self._end_round()

    def _end_round(self) -> None:
        self.generation += 1
        self._round_s = None
        shares = self._shares()
        for member in self.members.values():
            joined, member.joined, member.heard_s = member.joined, None, self.loop.time()
            if joined is not None and not joined.done():
                joined.set_result(Round(self.generation, *map(frozenset, shares[member])))

    def _shares(self) -> dict[_Member, tuple[set[TopicPartition], set[TopicPartition]]]:
        """What each holds, and what it keeps warm: a partition of somebody else's, or none."""
        shares: dict[_Member, tuple[set[TopicPartition], set[TopicPartition]]] = {
            member: (set(), set()) for member in self.members.values()
        }
        topics = sorted({topic for member in shares for topic in member.topics})
        counts = {topic: self.partitions(topic) for topic in topics}
        for number in range(max(counts.values(), default=0)):
            able = [member for member in shares if all(topic in member.topics for topic in topics)]
            these = {TopicPartition(topic, number) for topic in topics if number < counts[topic]}
            owner, second = self.dice.choice(able), self.dice.choice(able)
            shares[owner][0].update(these)
            if second is not owner:
                shares[second][1].update(these)
        return shares


class SimulatedMembership:
    """`transport.contract.Membership`, the member's side; all of it runs in the member's own process."""

    def __init__(self, coordinator: SimulatedCoordinator, pause: Callable[[], Awaitable[None]]) -> None:
        self._coordinator, self._pause = coordinator, pause
        self._member: _Member | None = None
        self._topics: frozenset[str] = frozenset()
        self._listener: GroupListener | None = None
        self._held: frozenset[TopicPartition] = frozenset()
        self._standbys: frozenset[TopicPartition] = frozenset()
        self._generation = -1
        self._failure: asyncio.Future[BaseException] | None = None
        self._living: list[asyncio.Task[None]] = []
        self._calling = asyncio.Lock()

    async def start(self, topics: Collection[str], listener: GroupListener) -> None:
        self._listener, self._topics = listener, frozenset(topics)
        self._failure = asyncio.get_running_loop().create_future()
        self._member = self._coordinator.enter(topics)
        self._living = [asyncio.create_task(self._beat()), asyncio.create_task(self._take_part())]

    def assignment(self) -> frozenset[TopicPartition]:
        return self._held

    def standbys(self) -> frozenset[TopicPartition]:
        return self._standbys

    async def confirm(self) -> bool:
        await self._pause()
        return self._member is not None and self._coordinator.current(self._member, self._generation)

    async def failed(self) -> BaseException:
        assert self._failure is not None
        return await asyncio.shield(self._failure)

    async def stop(self) -> None:
        for living in self._living:
            living.cancel()
        if self._member is not None:
            await self._revoke()
            self._coordinator.leave(self._member)
            self._member = None

    async def _beat(self) -> None:
        """Heartbeats go on during a round and a slow revocation, as the client library's do."""
        while True:
            await asyncio.sleep(limits.HEARTBEAT_S * self._coordinator.dice.uniform(0.2, 1.0))
            if self._member is not None:
                self._coordinator.heartbeat(self._member)

    async def _take_part(self) -> None:
        while True:
            await asyncio.sleep(limits.HEARTBEAT_S * self._coordinator.dice.uniform(0.1, 1.0))
            assert self._member is not None
            if (answer := self._coordinator.heartbeat(self._member)) == "ok":
                continue
            await self._revoke()
            if answer == "unknown" or self._coordinator.heartbeat(self._member) == "unknown":
                self._member = self._coordinator.enter(self._topics)
            generation, share, standbys = await self._coordinator.join(self._member)
            await self._pause()
            async with self._calling:
                self._held, self._standbys, self._generation = share, standbys, generation
                assert self._listener is not None
                await self._call(self._listener.on_assigned(share, generation))

    async def _revoke(self) -> None:
        async with self._calling:
            held, self._held, self._generation = self._held, frozenset(), -1
            if held and self._listener is not None:
                await self._call(self._listener.on_revoked(held))

    async def _call(self, callback: Awaitable[None]) -> None:
        try:
            await callback
        except Exception as error:  # whatever a listener raises is what `failed` is for
            assert self._failure is not None
            if not self._failure.done():
                self._failure.set_result(error)
