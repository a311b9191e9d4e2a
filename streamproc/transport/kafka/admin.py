"""Topics, offsets and plain writes: the questions and orders that are outside of any transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from aiokafka.protocol.admin import (  # type: ignore[import-untyped,unused-ignore]
    CreateTopicsRequest,
    DeleteRecordsRequest,
    DeleteTopicsRequest,
    DescribeConfigsRequest,
    DescribeGroupsRequest,
)
from aiokafka.protocol.commit import OffsetFetchRequest  # type: ignore[import-untyped,unused-ignore]
from aiokafka.protocol.offset import OffsetRequest  # type: ignore[import-untyped,unused-ignore]

from streamproc.avro import recordbatch
from streamproc.core import limits
from streamproc.core.errors import BrokerUnavailable, LogLost, UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.transport.contract import OutRecord, PartitionOffsets, TopicSpec
from streamproc.transport.kafka.codes import ASK_COORDINATOR_AGAIN, ASK_LEADER_AGAIN, FORBIDDEN, Code, name_of
from streamproc.transport.kafka.produce import Writing
from streamproc.transport.kafka.wire import NoAnswer, Retry, Wire, by_topic

__all__ = ["Admin"]

log = logging.getLogger(__name__)
_TIMEOUT_MS: Final = round(limits.REQUEST_TIMEOUT_S * 500)
"""How long a broker may work on an order: half of what we wait for it."""
_EARLIEST, _LATEST = -2, -1
_UNCOMMITTED, _COMMITTED = 0, 1
_TOPIC_RESOURCE: Final = 2
_NO_OFFSET: Final = -1


class Admin:
    """One per transport. Each method asks again within `limits.RETRY_TOTAL_S`, then raises `BrokerUnavailable`."""

    def __init__(self, wire: Wire, replication_factor: int) -> None:
        self._wire, self._replication_factor = wire, replication_factor

    # Topics

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Make what is missing, wait until each partition has a leader, then check all for drift."""
        if not specs:
            return
        retry = Retry(self._wire.clock, "Creating topics")
        while missing := await self._missing(specs, retry):
            request = CreateTopicsRequest([self._order(spec) for spec in missing], _TIMEOUT_MS, False)
            try:
                answer = await self._wire.send(self._wire.controller(), request)
            except NoAnswer as error:
                await self._wire.refresh()
                await retry.again(str(error))
                continue
            whys = [why for topic, code, text in answer.topic_errors if (why := _creation(topic, code, text))]
            if whys:
                await self._wire.refresh()
                await retry.again(whys[0])
        await self._wire.leaders([TopicPartition(s.name, p) for s in specs for p in range(s.partitions)], retry)
        await self._check_settings([spec for spec in specs if spec.config], retry)

    async def partitions(self, topic: str) -> int | None:
        return (await self._counts([topic], Retry(self._wire.clock, "Reading metadata"))).get(topic)

    async def delete_topics(self, topics: Collection[str]) -> None:
        """A broker deletes behind its answer: asked again until the metadata knows none of them any more."""
        retry = Retry(self._wire.clock, "Deleting topics")
        while topics and (left := list(await self._counts(topics, retry))):
            try:
                answer = await self._wire.send(self._wire.controller(), DeleteTopicsRequest(left, _TIMEOUT_MS))
            except NoAnswer as error:
                why: str = str(error)
            else:
                whys = [_deletion(topic, code) for topic, code in answer.topic_error_codes]
                why = next((text for text in whys if text), "the metadata still lists them")
            await self._wire.refresh()
            await retry.again(why)

    async def _counts(self, topics: Collection[str], retry: Retry) -> dict[str, int]:
        """Partition counts of those that exist."""
        while True:
            answer = await self._wire.metadata(list(topics))
            why = "no broker answers"
            if answer is not None:
                codes = {topic: code for code, topic, _, _ in answer.topics}
                for topic, code in codes.items():
                    if code in FORBIDDEN:
                        raise _forbidden(f"Looking for topic {topic!r}", code)
                    if code == Code.INVALID_TOPIC_EXCEPTION:
                        raise UserError(
                            f"{topic!r} is not a topic name.",
                            remedy="Use up to 249 letters, digits, dots, dashes and underscores.",
                        )
                pending = [c for c in codes.values() if c not in (Code.NONE, Code.UNKNOWN_TOPIC_OR_PARTITION)]
                if not pending:
                    return {topic: len(parts) for code, topic, _, parts in answer.topics if code == Code.NONE}
                why = name_of(pending[0])
            else:
                await self._wire.refresh()
            await retry.again(why)

    async def _missing(self, specs: Sequence[TopicSpec], retry: Retry) -> list[TopicSpec]:
        counts = await self._counts([spec.name for spec in specs], retry)
        for spec in specs:
            found = counts.get(spec.name, spec.partitions)
            if found != spec.partitions:
                raise UserError(
                    f"Topic {spec.name!r} has {found} partitions, but {spec.partitions} are declared.",
                    remedy=f"Declare partitions={found}, or delete the topic if its records are not needed. "
                    "(More partitions move keys to other tasks, so nothing is changed behind your back.)",
                )
        return [spec for spec in specs if spec.name not in counts]

    def _order(self, spec: TopicSpec) -> tuple[Any, ...]:
        return spec.name, spec.partitions, self._replication_factor, [], list(spec.config.items())

    async def _check_settings(self, specs: Sequence[TopicSpec], retry: Retry) -> None:
        if not specs:
            return
        request = DescribeConfigsRequest([(_TOPIC_RESOURCE, spec.name, list(spec.config)) for spec in specs])
        while True:
            try:
                answer = await self._wire.send(self._wire.any_node(), request)
            except NoAnswer as error:
                await self._wire.refresh()
                await retry.again(str(error))
                continue
            code = next((row[0] for row in answer.resources if row[0]), Code.NONE)
            if code == Code.NONE:
                break
            if code in FORBIDDEN:
                raise _forbidden("Reading the settings of topics", code)
            await retry.again(name_of(code))
        actual = {name: {entry[0]: entry[1] for entry in entries} for _, _, _, name, entries in answer.resources}
        for spec in specs:
            for setting, wanted in spec.config.items():
                _check_setting(spec.name, setting, actual[spec.name].get(setting), wanted)

    # Offsets

    async def offsets(self, tps: Collection[TopicPartition]) -> dict[TopicPartition, PartitionOffsets]:
        # In this order, so that begin <= stable <= end also while records are written.
        begin = await self._list(tps, _EARLIEST, _UNCOMMITTED)
        stable = await self._list(tps, _LATEST, _COMMITTED)
        end = await self._list(tps, _LATEST, _UNCOMMITTED)
        return {tp: PartitionOffsets(Offset(begin[tp]), Offset(stable[tp]), Offset(end[tp])) for tp in tps}

    async def _list(self, tps: Collection[TopicPartition], timestamp: int, isolation: int) -> dict[TopicPartition, int]:
        def request(some: list[TopicPartition]) -> Any:
            return OffsetRequest(-1, isolation, by_topic((tp, (tp.partition, timestamp)) for tp in some))

        def rows(answer: Any) -> list[tuple[TopicPartition, int, int]]:
            return [(TopicPartition(t, p), code, offset) for t, parts in answer.topics for p, code, _, offset in parts]

        return await self._ask_leaders(tps, request, rows, "Reading offsets")

    async def group_offsets(self, group: str, tps: Collection[TopicPartition]) -> dict[TopicPartition, Offset]:
        if not tps:
            return {}
        retry = Retry(self._wire.clock, f"Reading the offsets of group {group!r}")
        request = OffsetFetchRequest(group, by_topic((tp, tp.partition) for tp in tps))
        while True:
            try:
                node = await self._wire.coordinator("group", group)
                answer = await self._wire.send(node, request)
            except NoAnswer as error:
                self._wire.forget_coordinator("group", group)
                await retry.again(str(error))
                continue
            rows = [(TopicPartition(t, p), offset, code) for t, parts in answer.topics for p, offset, _, code in parts]
            # A partition of a topic that does not exist has no offset either.
            codes = [answer.error_code, *(c for _, _, c in rows if c != Code.UNKNOWN_TOPIC_OR_PARTITION)]
            bad = next((code for code in codes if code), None)
            if bad is None:
                return {tp: Offset(offset) for tp, offset, code in rows if offset != _NO_OFFSET and not code}
            if bad in FORBIDDEN:
                raise _forbidden(f"Reading the offsets of group {group!r}", bad)
            if bad not in ASK_COORDINATOR_AGAIN:
                raise BrokerUnavailable(f"Reading the offsets of group {group!r}: {name_of(bad)}.")
            self._wire.forget_coordinator("group", group)
            await retry.again(name_of(bad))

    async def members(self, group: str) -> int:
        retry = Retry(self._wire.clock, f"Describing group {group!r}")
        while True:
            try:
                answer = await self._wire.send(
                    await self._wire.coordinator("group", group), DescribeGroupsRequest([group])
                )
            except NoAnswer as error:
                self._wire.forget_coordinator("group", group)
                await retry.again(str(error))
                continue
            code, members = answer.groups[0][0], answer.groups[0][5]
            if code in (Code.NONE, Code.GROUP_ID_NOT_FOUND):
                return len(members)
            if code in FORBIDDEN:
                raise _forbidden(f"Describing group {group!r}", code)
            self._wire.forget_coordinator("group", group)
            await retry.again(name_of(code))

    async def delete_records(self, before: Mapping[TopicPartition, Offset]) -> None:
        def request(some: list[TopicPartition]) -> Any:
            return DeleteRecordsRequest(by_topic((tp, (tp.partition, before[tp])) for tp in some), _TIMEOUT_MS)

        def rows(answer: Any) -> list[tuple[TopicPartition, int, int]]:
            topics = ((topic[0], topic[1]) for topic in answer.topics)
            return [(TopicPartition(name, p[0]), p[2], p[1]) for name, parts in topics for p in parts]

        await self._ask_leaders(before, request, rows, "Deleting records")

    async def _ask_leaders(
        self,
        tps: Collection[TopicPartition],
        request: Callable[[list[TopicPartition]], Any],
        rows: Callable[[Any], list[tuple[TopicPartition, int, int]]],
        what: str,
    ) -> dict[TopicPartition, int]:
        """``rows`` gives (partition, error code, value); those to be asked again are, until all have a value."""
        retry, found, left = Retry(self._wire.clock, what), dict[TopicPartition, int](), set(tps)
        while left:
            leaders = await self._wire.leaders(left, retry)
            answers = await asyncio.gather(
                *(self._wire.send(node, request(some)) for node, some in leaders.items()), return_exceptions=True
            )
            why = ""
            for answer in answers:
                if isinstance(answer, NoAnswer):
                    why = str(answer)
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    for tp, code, value in rows(answer):
                        if code == Code.NONE:
                            found[tp] = value
                            left.discard(tp)
                        elif code in ASK_LEADER_AGAIN:
                            why = f"{tp.topic}[{tp.partition}]: {name_of(code)}"
                        else:
                            raise _final(what, tp, code)
            if left:
                await self._wire.refresh()
                await retry.again(why or "an answer without these partitions")
        return found

    # Plain writes

    async def send(self, records: Mapping[TopicPartition, Sequence[OutRecord]]) -> dict[TopicPartition, Offset]:
        """At least once: a batch whose acknowledgement was lost is written again."""

        def build(some: Sequence[OutRecord], _sequence: int) -> list[bytes]:
            return recordbatch.split_build(some, now_ms=self._wire.clock.now_ms())

        return await Writing(self._wire, "sends", None, build).run(records, {})


def _creation(topic: str, code: int, text: str | None) -> str | None:
    """Why to ask again, None if the topic is there now. Raises `UserError` for what only the user can mend."""
    if code in (Code.NONE, Code.TOPIC_ALREADY_EXISTS):
        return None
    if code in (Code.NOT_CONTROLLER, Code.REQUEST_TIMED_OUT, Code.BROKER_NOT_AVAILABLE, Code.UNKNOWN_SERVER_ERROR):
        return f"{topic}: {name_of(code)}"
    remedy = "Correct the topic's name, partitions or settings."
    if code == Code.INVALID_REPLICATION_FACTOR:
        remedy = "Set the transport's replication_factor to at most the number of brokers."
    if code in FORBIDDEN:
        remedy = "Grant the application's Kafka user the right to create topics, or create the topic yourself."
    raise UserError(f"Topic {topic!r} cannot be created: {name_of(code)}: {text or 'no reason given'}.", remedy=remedy)


def _deletion(topic: str, code: int) -> str | None:
    """Why to ask again, None if the topic goes or is gone. Raises `UserError` for what only the user can mend."""
    if code in (Code.NONE, Code.UNKNOWN_TOPIC_OR_PARTITION):
        return None
    if code in FORBIDDEN:
        raise _forbidden(f"Deleting topic {topic!r}", code)
    if code == Code.TOPIC_DELETION_DISABLED:
        raise UserError(
            f"Topic {topic!r} cannot be deleted: {name_of(code)}.",
            remedy="Set delete.topic.enable=true on the brokers, or delete it by the means of who runs them.",
        )
    return f"{topic}: {name_of(code)}"


def _check_setting(topic: str, setting: str, actual: str | None, wanted: str) -> None:
    if actual is not None and (_plain(actual) == _plain(wanted) or _takes_more(setting, actual, wanted)):
        return
    raise UserError(
        f"Topic {topic!r} has {setting}={actual}, but {wanted} is needed.",
        remedy=f"Run `kafka-configs --alter --entity-type topics --entity-name {topic} "
        f"--add-config {setting}={wanted}`, or declare the value that it has.",
    )


def _takes_more(setting: str, actual: str, wanted: str) -> bool:
    """Somebody has raised the limit, as the error about a record too large for the topic says."""
    return setting == "max.message.bytes" and actual.isdecimal() and wanted.isdecimal() and int(actual) > int(wanted)


def _plain(value: str) -> str:
    """Lists (`cleanup.policy`) have no order."""
    return ",".join(sorted(part.strip() for part in value.split(",")))


def _forbidden(what: str, code: int) -> UserError:
    return UserError(f"{what}: {name_of(code)}.", remedy="Grant the application's Kafka user this right.")


def _final(what: str, tp: TopicPartition, code: int) -> Exception:
    where = f"{what} of {tp.topic}[{tp.partition}]"
    if code in FORBIDDEN:
        return _forbidden(where, code)
    if code == Code.OFFSET_OUT_OF_RANGE:
        return LogLost(f"{where}: the log ends before the offset asked for. It lost records that were committed.")
    if code == Code.POLICY_VIOLATION:
        return UserError(
            f"{where}: the topic is compacted only, so records cannot be trimmed.",
            remedy="Give it cleanup.policy=delete (or compact,delete).",
        )
    return BrokerUnavailable(f"{where}: {name_of(code)}. The broker's log says why.")
