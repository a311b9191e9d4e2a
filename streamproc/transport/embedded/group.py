"""Consumer groups within one process: members of a group share its partition numbers by range.

With standbys, the members behind the owner, in the order in which they joined, keep its state warm.

    join ─▶ (waiting) ─▶ assigned ─▶ revoked ─▶ assigned … ─▶ left
A round of a rebalance: every member's `on_revoked`, then the generation rises, then every member's `on_assigned`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection

from streamproc.core.errors import invariant
from streamproc.core.types import TopicPartition
from streamproc.transport.contract import GroupListener
from streamproc.transport.embedded.topics import Topics

__all__ = ["EmbeddedMembership", "Group"]


class Group:
    """The coordinator's side: members in the order they joined, and one round of a rebalance at a time."""

    def __init__(self, topics: Topics, standby_replicas: int = 0) -> None:
        self.topics, self._standby_replicas = topics, standby_replicas
        self.generation = 0
        self.members: list[EmbeddedMembership] = []
        self.round = asyncio.Lock()
        self._stale = False
        self._running: asyncio.Task[None] | None = None

    def rebalance(self) -> None:
        """In a task of its own: a join or a leave answers before the others have been told."""
        self._stale = True
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().create_task(self._rebalance(), name="embedded rebalance")

    async def _rebalance(self) -> None:
        while self._stale:
            self._stale = False
            async with self.round:
                members = list(self.members)
                await asyncio.gather(*(member.revoke() for member in members))
                self.generation += 1
                shares = self._shares(members)
                warm = self._standbys(members, shares)
                await asyncio.gather(
                    *(member.assign(shares[member], warm[member], self.generation) for member in members)
                )

    def _shares(self, members: list[EmbeddedMembership]) -> dict[EmbeddedMembership, frozenset[TopicPartition]]:
        """One number of all topics with the same subscribers lies with one member: such topics are co-partitioned."""
        subscribers: dict[tuple[EmbeddedMembership, ...], set[str]] = {}
        for topic in sorted({topic for member in members for topic in member.topics}):
            subscribers.setdefault(tuple(member for member in members if topic in member.topics), set()).add(topic)
        shares: dict[EmbeddedMembership, set[TopicPartition]] = {member: set() for member in members}
        for sharing, topics in subscribers.items():
            counts = {topic: self.topics.count(topic) or 0 for topic in topics}
            numbers = max(counts.values())
            for number in range(numbers):
                owner = sharing[number * len(sharing) // numbers]
                shares[owner] |= {TopicPartition(topic, number) for topic in topics if number < counts[topic]}
        return {member: frozenset(share) for member, share in shares.items()}

    def _standbys(
        self, members: list[EmbeddedMembership], shares: dict[EmbeddedMembership, frozenset[TopicPartition]]
    ) -> dict[EmbeddedMembership, frozenset[TopicPartition]]:
        warm: dict[EmbeddedMembership, frozenset[TopicPartition]] = {member: frozenset() for member in members}
        for at, owner in enumerate(members):
            for behind in range(1, min(self._standby_replicas, len(members) - 1) + 1):
                member = members[(at + behind) % len(members)]
                warm[member] |= {tp for tp in shares[owner] if tp.topic in member.topics}
        return warm


class EmbeddedMembership:
    """`transport.contract.Membership`. A member whose callback failed stays in the group until it is stopped."""

    def __init__(self, group: Group) -> None:
        self.topics: frozenset[str] = frozenset()
        self._group = group
        self._listener: GroupListener | None = None
        self._held: frozenset[TopicPartition] = frozenset()
        self._standbys: frozenset[TopicPartition] = frozenset()
        self._generation = -1
        self._failure: BaseException | None = None
        self._has_failed = asyncio.Event()

    async def start(self, topics: Collection[str], listener: GroupListener) -> None:
        invariant(self._listener is None, "A group membership was started twice.")
        self._group.topics.require(topics)
        self.topics, self._listener = frozenset(topics), listener
        self._group.members.append(self)
        self._group.rebalance()

    def assignment(self) -> frozenset[TopicPartition]:
        return self._held

    def standbys(self) -> frozenset[TopicPartition]:
        return self._standbys

    async def confirm(self) -> bool:
        return self in self._group.members and self._generation == self._group.generation

    async def failed(self) -> BaseException:
        await self._has_failed.wait()
        invariant(self._failure is not None, "A group membership failed without an error.")
        return self._failure  # type: ignore[return-value]

    async def stop(self) -> None:
        if self not in self._group.members:
            return
        async with self._group.round:
            await self.revoke()
            self._group.members.remove(self)
        self._group.rebalance()

    async def revoke(self) -> None:
        """Called by the group within a round."""
        if self._held and self._listener:
            await self._call(self._listener.on_revoked(self._held))
        self._held = frozenset()

    async def assign(
        self, share: frozenset[TopicPartition], standbys: frozenset[TopicPartition], generation: int
    ) -> None:
        """Called by the group within a round."""
        self._held, self._standbys, self._generation = share, standbys, generation
        if self._listener:
            await self._call(self._listener.on_assigned(share, generation))

    async def _call(self, callback: Awaitable[None]) -> None:
        try:
            await callback
        except Exception as error:
            # Whatever it is, it belongs to the member's owner, who waits in `failed`; the group goes on.
            self._failure = self._failure or error
            self._has_failed.set()
