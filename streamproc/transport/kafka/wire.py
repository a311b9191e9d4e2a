"""One connection pool to a Kafka cluster: addresses, leaders, coordinators, requests, back-off.

Everything above it speaks in requests and error codes. A request that had no answer raises `NoAnswer`, and says whether
the broker may have acted on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from aiokafka.client import AIOKafkaClient, CoordinationType  # type: ignore[import-untyped,unused-ignore]
from aiokafka.errors import KafkaError  # type: ignore[import-untyped,unused-ignore]
from aiokafka.protocol.metadata import MetadataRequest  # type: ignore[import-untyped,unused-ignore]
from aiokafka.structs import TopicPartition as TheirTopicPartition  # type: ignore[import-untyped,unused-ignore]

from streamproc.core import limits
from streamproc.core.clock import Clock
from streamproc.core.errors import BrokerUnavailable, UserError
from streamproc.core.types import TopicPartition
from streamproc.transport.kafka.codes import name_of

__all__ = ["Coordinator", "NoAnswer", "Retry", "Wire", "addresses", "by_topic", "kafka_tp"]

log = logging.getLogger(__name__)
Coordinator = Literal["group", "transaction"]
_TYPES: Final = {"group": CoordinationType.GROUP, "transaction": CoordinationType.TRANSACTION}
_DEFAULT: Final = 0
"""aiokafka's own default connection, which it also asks for metadata and coordinators."""


class NoAnswer(Exception):
    """Internal: a request was not answered. ``sent`` False: it never left, so the broker did not act on it."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


def addresses(bootstrap: str | Sequence[str]) -> list[str]:
    """``"kafka://a:9092,b:9092"``, ``"a:9092"`` or a list of them as ``host:port``; `UserError` for anything else."""
    found: list[str] = []
    for text in [bootstrap] if isinstance(bootstrap, str) else bootstrap:
        found += [part.strip().removeprefix("kafka://").rstrip("/") for part in text.replace(";", ",").split(",")]
    for address in found:
        host, colon, port = address.rpartition(":")
        if not colon:
            host, port = address, "9092"
        if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(
                f"{bootstrap!r} is not the address of a Kafka broker: {address!r} is not host:port.",
                remedy='Write for example broker="kafka://localhost:9092", several with commas between.',
            )
    return [address if ":" in address else f"{address}:9092" for address in found]


def kafka_tp(tp: TopicPartition) -> Any:
    """aiokafka insists on its own tuple."""
    return TheirTopicPartition(tp.topic, tp.partition)


def by_topic(tps: Iterable[tuple[TopicPartition, Any]]) -> list[tuple[str, list[Any]]]:
    """Requests list partitions under their topic; the order of topics and partitions is kept."""
    topics: dict[str, list[Any]] = {}
    for tp, entry in tps:
        topics.setdefault(tp.topic, []).append(entry)
    return list(topics.items())


class Retry:
    """Back-off within one named limit: ``await again(why)`` pauses, or raises `BrokerUnavailable` when time is over."""

    def __init__(self, clock: Clock, what: str, total_s: float | None = None) -> None:
        self._clock, self._what, self._total_s = clock, what, limits.RETRY_TOTAL_S if total_s is None else total_s
        self._until = clock.monotonic_s() + self._total_s
        self._pause, self._soon = limits.RETRY_BACKOFF_S, limits.MARKER_WAIT_S

    async def again(self, why: str, *, soon: bool = False) -> None:
        """``soon``: the answer is a matter of milliseconds (markers on their way), so the pause starts small."""
        if self._clock.monotonic_s() >= self._until:
            raise BrokerUnavailable(
                f"{self._what} did not succeed within {self._total_s:g} s; the last answer was: {why}. "
                "It is tried again; if this stays, look at the broker's log."
            )
        if soon:
            await self._clock.sleep(self._soon)
            self._soon = min(self._soon * 1.5, limits.RETRY_BACKOFF_S)
            return
        log.info("%s: %s; again in %.2f s", self._what, why, self._pause)
        await self._clock.sleep(self._pause)
        self._pause = min(self._pause * 2, limits.RETRY_BACKOFF_S_MAX)


class Wire:
    """Over ONE aiokafka client. ``lane`` names a connection of its own: a broker serves a connection's requests in
    order, so a fetch that waits for records would hold up whatever is behind it."""

    def __init__(
        self, bootstrap: str | Sequence[str], clock: Clock, *, client_id: str, security: Mapping[str, Any]
    ) -> None:
        self.addresses = addresses(bootstrap)
        self.client_id, self.security, self.clock = client_id, dict(security), clock
        self._client: Any = None
        self._topics: set[str] = set()
        self._coordinators: dict[tuple[Coordinator, str], int] = {}
        self._refreshing: asyncio.Future[bool] | None = None

    async def start(self) -> None:
        """Raises `BrokerUnavailable` that names the address when no broker answers within `limits.RETRY_TOTAL_S`."""
        client = AIOKafkaClient(
            bootstrap_servers=self.addresses,
            client_id=self.client_id,
            request_timeout_ms=round(limits.REQUEST_TIMEOUT_S * 1000),
            **self.security,
        )
        retry = Retry(self.clock, f"Connecting to Kafka at {', '.join(self.addresses)}")
        while True:
            try:
                async with asyncio.timeout(limits.REQUEST_TIMEOUT_S):
                    await client.bootstrap()
                if client.cluster.brokers():
                    break
                why = "it knows of no broker yet"
            except (KafkaError, OSError) as error:  # TimeoutError is an OSError
                why = str(error) or type(error).__name__
            try:
                await retry.again(why)
            except BrokerUnavailable as error:
                await client.close()
                raise BrokerUnavailable(
                    f"No Kafka broker answers at {', '.join(self.addresses)}: {why}. "
                    "Start it, or correct the app's broker setting."
                ) from error
        self._client = client

    async def stop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def send(self, node: int, request: Any, lane: Hashable = _DEFAULT) -> Any:
        """One request, one answer, within `limits.REQUEST_TIMEOUT_S`. Raises `NoAnswer`."""
        client = self._running()
        if not await client.ready(node, group=lane):
            raise NoAnswer(f"broker {node} cannot be reached", sent=False)
        try:
            return await client.send(node, request, group=lane)
        except KafkaError as error:
            raise NoAnswer(f"broker {node}: {error or type(error).__name__}", sent=True) from error
        except KeyError as error:
            # aiokafka closes a timed-out connection by looking it up again; a request beside ours may have replaced it.
            raise NoAnswer(f"broker {node}: the connection was replaced while it timed out", sent=True) from error

    def any_node(self) -> int:
        node = self._running().get_random_node()
        if node is None:
            raise BrokerUnavailable(f"No broker is known behind {', '.join(self.addresses)}. Is it still starting?")
        return int(node)

    def controller(self) -> int:
        controller = self._running().cluster.controller
        return self.any_node() if controller is None else int(controller.nodeId)

    def leader(self, tp: TopicPartition) -> int | None:
        """As the last metadata had it; None if unknown or without one. The first question about a topic tracks it."""
        self._topics.add(tp.topic)
        leader = self._running().cluster.leader_for_partition(kafka_tp(tp))
        return None if leader is None or leader < 0 else int(leader)

    async def leaders(self, tps: Collection[TopicPartition], retry: Retry) -> dict[int, list[TopicPartition]]:
        """The partitions under the brokers that lead them. `UserError` for a topic or partition that does not exist."""
        while True:
            found: dict[int, list[TopicPartition]] = {}
            unknown = []
            for tp in tps:
                leader = self.leader(tp)
                if leader is None:
                    unknown.append(tp)
                else:
                    found.setdefault(leader, []).append(tp)
            if not unknown:
                return found
            await self.refresh()
            missing = [tp for tp in unknown if self.leader(tp) is None]
            if missing:
                try:
                    await retry.again(f"{missing[0].topic}[{missing[0].partition}] has no leader")
                except BrokerUnavailable:
                    await self._refuse_missing(missing[0])
                    raise

    async def refresh(self) -> bool:
        """Ask for the tracked topics' leaders again; False if nobody answers. Concurrent callers share one question."""
        if self._refreshing is None:
            self._refreshing = asyncio.ensure_future(self._refresh())
            self._refreshing.add_done_callback(self._refreshed)
        return await asyncio.shield(self._refreshing)

    def _refreshed(self, _done: asyncio.Future[bool]) -> None:
        self._refreshing = None

    async def _refresh(self) -> bool:
        client, answer = self._running(), await self.metadata(sorted(self._topics))
        if answer is None:
            # Every broker that we knew may have moved: ask again where we first asked.
            try:
                async with asyncio.timeout(limits.REQUEST_TIMEOUT_S):
                    await client.bootstrap()
            except (KafkaError, OSError):
                return False
            answer = await self.metadata(sorted(self._topics))
        if answer is None:
            return False
        client.cluster.update_metadata(answer)
        return True

    async def metadata(self, topics: list[str]) -> Any:
        """The answer of the first broker that gives one, else None. Never makes a topic."""
        client = self._running()
        request = MetadataRequest(topics, allow_auto_topic_creation=False)
        for broker in client.cluster.brokers():
            try:
                answer = await self.send(broker.nodeId, request)
            except NoAnswer as error:
                log.info("metadata: %s", error)
                continue
            if answer.brokers:
                return answer
        return None

    async def coordinator(self, kind: Coordinator, key: str) -> int:
        """Cached until `forget_coordinator`. Raises `NoAnswer` when it cannot be told now."""
        node = self._coordinators.get((kind, key))
        if node is None:
            try:
                node = int(await self._running().coordinator_lookup(_TYPES[kind], key))
            except (KafkaError, KeyError) as error:
                await self.refresh()
                raise NoAnswer(f"no {kind} coordinator for {key!r} yet: {error}", sent=False) from error
            self._coordinators[kind, key] = node
        return node

    def forget_coordinator(self, kind: Coordinator, key: str) -> None:
        self._coordinators.pop((kind, key), None)

    async def _refuse_missing(self, tp: TopicPartition) -> None:
        answer = await self.metadata([tp.topic])
        if answer is None:
            return
        for code, topic, _internal, partitions in answer.topics:
            if topic == tp.topic and tp.partition not in {entry[1] for entry in partitions}:
                self._topics.discard(topic)
                raise UserError(
                    f"Topic {tp.topic!r} has no partition {tp.partition} on {', '.join(self.addresses)} "
                    f"({name_of(code)}).",
                    remedy="Create it (`streamproc topics MODULE --create`), or correct its name.",
                )

    def _running(self) -> Any:
        if self._client is None:
            raise BrokerUnavailable("The Kafka transport is not started, or was stopped. Start it first.")
        return self._client
