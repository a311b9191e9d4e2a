"""This worker's place in a consumer group, held by an AIOKafkaConsumer that never reads a record.

Its partitions are paused inside the assigned callback before anything else; what it may have fetched until then is
never asked for. aiokafka logs and swallows what a rebalance callback raises and keeps what its background task raised
for the next poll, and we never poll: both are kept here and given out by `failed`.

A *static* member (`group.instance.id`) never says that it leaves: it comes back under its id within the session time-out
and finds its partitions as they were, and nobody else has heard of it. If it now reads other topics than those that
they were shared by, it leaves after all and joins anew: the group would not share on its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener  # type: ignore[import-untyped,unused-ignore]
from aiokafka.coordinator.assignors.range import (  # type: ignore[import-untyped,unused-ignore]
    RangePartitionAssignor,
)
from aiokafka.coordinator.protocol import ConsumerProtocol  # type: ignore[import-untyped,unused-ignore]
from aiokafka.errors import KafkaError  # type: ignore[import-untyped,unused-ignore]
from aiokafka.protocol.group import HeartbeatRequest, SyncGroupRequest  # type: ignore[import-untyped,unused-ignore]

from streamproc.core import limits
from streamproc.core.errors import BrokerUnavailable, FencedInstanceId, UserError
from streamproc.core.types import TopicPartition
from streamproc.transport.contract import GroupListener
from streamproc.transport.kafka.codes import ASK_COORDINATOR_AGAIN, Code, name_of
from streamproc.transport.kafka.heartbeat import StaticHeartbeat, StaticLeave
from streamproc.transport.kafka.wire import NoAnswer, Retry, Wire

__all__ = ["KafkaMembership"]

log = logging.getLogger(__name__)
_NEVER_MS: Final = 10**12
"""Thirty years. A consumer that is never polled would leave the group after `max_poll_interval_ms`; how long a
rebalance may take is said to the broker separately (`rebalance_timeout_ms`)."""
_FETCH_BYTES: Final = 1
"""The consumer may fetch between the assignment and our callback's pause: let it be next to nothing."""
_NO_GENERATION: Final = -1


class KafkaMembership:
    """`Membership` over Kafka's classic group protocol.

    `start` returns when the group is being joined; the listener hears of the assignment later, and `failed` of a join
    that cannot succeed. The listener is never called twice at once, so `stop` must not be called from within it.
    """

    def __init__(
        self,
        wire: Wire,
        group: str,
        *,
        assignor: Any = None,
        instance_id: str | None = None,
        session_timeout_s: float = limits.SESSION_TIMEOUT_S,
        heartbeat_interval_s: float = limits.HEARTBEAT_S,
        rebalance_timeout_s: float = limits.REBALANCE_TIMEOUT_S,
        partitions: Callable[[str], Coroutine[Any, Any, int | None]],
    ) -> None:
        self._wire, self._group, self._partitions = wire, group, partitions
        # The range assignor gives a member the same partition numbers of all topics, as co-partitioning needs.
        self._assignor = RangePartitionAssignor if assignor is None else assignor
        self._timeouts = {
            "session_timeout_ms": round(session_timeout_s * 1000),
            "heartbeat_interval_ms": round(heartbeat_interval_s * 1000),
            "rebalance_timeout_ms": round(rebalance_timeout_s * 1000),
        }
        self._instance_id = instance_id
        self._topics: frozenset[str] = frozenset()
        self._first = True
        """No assignment has come yet: a static member's first may be of its last life."""
        self._consumer: Any = None
        self._listener: GroupListener | None = None
        self._held: frozenset[TopicPartition] = frozenset()
        self._standbys: frozenset[TopicPartition] = frozenset()
        self._generation = _NO_GENERATION
        self._stopping = False
        self._calling = asyncio.Lock()
        self._failure: asyncio.Future[BaseException] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, topics: Collection[str], listener: GroupListener) -> None:
        for topic in topics:
            if await self._partitions(topic) is None:
                raise UserError(
                    f"Topic {topic!r} does not exist, so group {self._group!r} cannot read it.",
                    remedy="Create it (`streamproc topics MODULE --create`), or correct its name.",
                )
        self._listener, self._topics = listener, frozenset(topics)
        self._failure = asyncio.get_running_loop().create_future()
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=self._wire.addresses,
            client_id=self._wire.client_id,
            group_id=self._group,
            group_instance_id=self._instance_id,
            enable_auto_commit=False,
            auto_offset_reset="none",
            max_poll_interval_ms=_NEVER_MS,
            fetch_max_bytes=_FETCH_BYTES,
            max_partition_fetch_bytes=_FETCH_BYTES,
            partition_assignment_strategy=(self._assignor,),
            request_timeout_ms=round(limits.REQUEST_TIMEOUT_S * 1000),
            **self._timeouts,
            **self._wire.security,
        )
        try:
            await self._consumer.start()
        except (KafkaError, OSError) as error:
            await self._consumer.stop()
            raise BrokerUnavailable(
                f"Group {self._group!r} cannot be joined at {', '.join(self._wire.addresses)}: {error}. "
                "Start the broker, or correct the app's broker setting."
            ) from error
        if self._instance_id is not None:
            self._speak_as(self._instance_id, self._consumer._coordinator)
        self._consumer.subscribe(list(topics), listener=_Callbacks(self))
        self._watcher = asyncio.create_task(self._watch(), name=f"membership {self._group}")

    def assignment(self) -> frozenset[TopicPartition]:
        return self._held

    def standbys(self) -> frozenset[TopicPartition]:
        return self._standbys

    async def confirm(self) -> bool:
        coordinator = None if self._consumer is None else self._consumer._coordinator
        if coordinator is None or self._stopping or self._generation == _NO_GENERATION:
            return False
        retry = Retry(self._wire.clock, f"Heartbeat of group {self._group!r}")
        while coordinator.generation == self._generation:
            request = HeartbeatRequest(self._group, self._generation, coordinator.member_id)
            try:
                node = await self._wire.coordinator("group", self._group)
                code = (await self._wire.send(node, request, "group")).error_code
            except NoAnswer as error:
                self._wire.forget_coordinator("group", self._group)
                await retry.again(str(error))
                continue
            if code not in ASK_COORDINATOR_AGAIN:
                # A rebalance may have come between the answer and here.
                return bool(code == Code.NONE and coordinator.generation == self._generation)
            self._wire.forget_coordinator("group", self._group)
            await retry.again(name_of(code))
        return False

    async def failed(self) -> BaseException:
        if self._failure is None:
            raise BrokerUnavailable(f"The membership in group {self._group!r} was not started. Start it first.")
        return await asyncio.shield(self._failure)

    async def stop(self) -> None:
        if self._consumer is None or self._stopping:
            return
        self._stopping = True
        if self._watcher is not None:
            self._watcher.cancel()
        # aiokafka leaves without telling its listener.
        await self._revoke()
        try:
            async with asyncio.timeout(2 * limits.REQUEST_TIMEOUT_S):
                await self._consumer.stop()
        except TimeoutError:
            log.warning("group %s was not left: no broker answers; the session time-out will do it", self._group)

    async def _watch(self) -> None:
        """What aiokafka's own tasks raised is handed to whoever polls; nobody does, so it is asked for here."""
        while True:
            await self._wire.clock.sleep(limits.MEMBERSHIP_CHECK_S)
            try:
                self._consumer._coordinator.check_errors()
            except KafkaError as error:
                self._fail(
                    BrokerUnavailable(
                        f"The membership in group {self._group!r} failed: {error}. The worker must join again."
                    )
                )
                return

    def _speak_as(self, instance_id: str, coordinator: Any) -> None:
        """Look at every answer to aiokafka's group requests, give its heartbeats the instance id, and do not let it take a
        first assignment that was made for other topics."""
        send = coordinator._send_req

        async def sent(request: Any) -> Any:
            if isinstance(request, HeartbeatRequest):
                request = StaticHeartbeat(self._group, coordinator.generation, coordinator.member_id, instance_id)
            answer = await send(request)
            if self._first and isinstance(request, SyncGroupRequest) and answer.error_code == Code.NONE:
                self._first = False
                if not self._fits(answer.member_assignment):
                    log.info("static member %s reads other topics than before: it joins anew", instance_id)
                    left = await send(StaticLeave(self._group, coordinator.member_id, instance_id))
                    self._first = left.error_code != Code.NONE  # the coordinator has moved: once more
                    fenced = any(code == Code.FENCED_INSTANCE_ID for *_, code in left.members)
                    answer.error_code = Code.FENCED_INSTANCE_ID if fenced else Code.UNKNOWN_MEMBER_ID
            if answer.error_code == Code.FENCED_INSTANCE_ID:
                self._fail(
                    FencedInstanceId(
                        f"Another worker has joined group {self._group!r} as instance {instance_id!r}, so this one stops. "
                        "Give each worker an instance id of its own (consumer_group_instance_id)."
                    )
                )
            return answer

        coordinator._send_req = sent

    def _fits(self, assignment: bytes) -> bool:
        """Whether partitions were shared by the topics that this member reads: aiokafka dies of one that it does not read,
        and nobody would read one that was not shared. Of the latter only our own assignor tells."""
        given = ConsumerProtocol.ASSIGNMENT.decode(assignment)
        told = getattr(self._assignor, "topics_of", None)
        shared = self._topics if told is None else told(given)
        return self._topics <= shared and all(topic in self._topics for topic, _ in given.assignment)

    async def _revoke(self) -> None:
        async with self._calling:
            held, self._held, self._generation = self._held, frozenset(), _NO_GENERATION
            if self._listener is not None and held:
                await self._call(self._listener.on_revoked(held))

    async def _assign(self, assigned: Collection[Any]) -> None:
        self._consumer.pause(*assigned)
        async with self._calling:
            if self._stopping or self._listener is None:
                return
            self._held = frozenset(TopicPartition(tp.topic, tp.partition) for tp in assigned)
            self._standbys = self._assigned_standbys()
            self._generation = self._consumer._coordinator.generation
            await self._call(self._listener.on_assigned(self._held, self._generation))

    def _assigned_standbys(self) -> frozenset[TopicPartition]:
        """As the assignor was told with the assignment; aiokafka's own assignors know none."""
        told = getattr(self._assignor, "assigned_standbys", None)
        found = frozenset() if told is None else frozenset(TopicPartition(tp.topic, tp.partition) for tp in told())
        return found - self._held

    async def _call(self, callback: Any) -> None:
        try:
            await callback
        except Exception as error:  # whatever a listener raises is what `failed` is for; aiokafka would swallow it
            log.exception("a rebalance callback of group %s failed", self._group)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_result(error)


class _Callbacks(ConsumerRebalanceListener):  # type: ignore[misc,unused-ignore]
    """aiokafka's listener: everything in it lands in `_call`, so nothing is swallowed."""

    def __init__(self, membership: KafkaMembership) -> None:
        self._membership = membership

    async def on_partitions_revoked(self, _revoked: Collection[Any]) -> None:
        await self._membership._revoke()

    async def on_partitions_assigned(self, assigned: Collection[Any]) -> None:
        try:
            await self._membership._assign(assigned)
        except (KafkaError, TypeError) as error:  # from aiokafka's own pause
            self._membership._fail(error)
