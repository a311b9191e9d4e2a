"""Dead letters and late records: the last of each topic, by what our own headers say of them.

Never the payload, the key or the headers of the user: personal data must not reach a page only because it was malformed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from streamproc.core import limits
from streamproc.core.batch import RawBatch
from streamproc.core.types import Offset, TopicPartition
from streamproc.runtime.inspect import Inspector
from streamproc.runtime.topology import Group
from streamproc.transport.contract import PartitionOffsets, Transport

__all__ = ["Side"]

_TEXTS: Final = {"sp-reason": "reason", "sp-topic": "topic", "sp-table": "table"}
_NUMBERS: Final = {
    "sp-partition": "partition", "sp-offset": "offset", "sp-schema-id": "schema_id", "sp-time-ms": "time",
    "sp-window-start": "window_start", "sp-window-end": "window_end", "sp-late-by-ms": "late_by_ms",
}  # fmt: skip
_LOOK_BACK: Final = 2 * limits.WEB_SIDE_RECORDS
"""Offsets, of which every other may be the marker of a transaction."""


class Side:
    """Read from the log, so any worker can tell of all partitions."""

    def __init__(self, inspector: Inspector, transport: Transport) -> None:
        self._inspector, self._transport = inspector, transport

    async def read(self) -> dict[str, Any]:
        """Every side topic with its last records, the newest first. `BrokerUnavailable` if the log cannot be read."""
        topics: dict[str, dict[str, Any]] = {}
        for group in self._inspector.groups.values():
            for name in group.side_topics:
                if name not in topics:
                    topics[name] = {"topic": name, **_meaning(group, name), **await self._topic(name)}
        return {"topics": list(topics.values())}

    async def _topic(self, topic: str) -> dict[str, Any]:
        count = await self._transport.partitions(topic) or 0
        ends = await self._transport.offsets([TopicPartition(topic, number) for number in range(count)])
        records: list[dict[str, Any]] = []
        left, cut = limits.WEB_SIDE_BYTES_MAX, False
        for tp, at in ends.items():
            found, read = await self._last(tp, at, left)
            records += found
            left -= read
            cut = cut or left <= 0
        records.sort(key=lambda record: (record["written"], record["at"]), reverse=True)
        size = sum(at.stable - at.begin for at in ends.values())
        return {"records": records[: limits.WEB_SIDE_RECORDS], "offsets": size, "cut": cut}

    async def _last(self, tp: TopicPartition, at: PartitionOffsets, most: int) -> tuple[list[dict[str, Any]], int]:
        """The last records of a partition, and how many bytes that took; not more than one batch beyond ``most``."""
        start = Offset(max(at.begin, at.stable - _LOOK_BACK))
        found: list[dict[str, Any]] = []
        read = 0
        if start >= at.stable or most <= 0:
            return found, read
        async for batch in self._transport.read(tp, start, at.stable):
            found += (_record(batch, row) for row in range(len(batch)))
            read += batch.buffer.nbytes
            if read > most:
                break
        return found, read


def _meaning(group: Group, topic: str) -> dict[str, Any]:
    source = group.source
    if source is None or topic == source.dead_letter_topic:
        return {"kind": "dead letters", "of": source.topic if source is not None else ", ".join(group.plan.sources)}
    return {"kind": "late records", "of": source.topic}


def _record(batch: RawBatch, row: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "at": [batch.tp.partition, int(batch.offsets[row])],
        "written": int(batch.timestamps[row]),
        "key_bytes": _size(int(batch.key_len[row])),
        "value_bytes": _size(int(batch.value_len[row])),
    }
    # The user's headers stand before ours, so of two with one name ours is the last.
    return told | _ours(batch.headers(row))


def _ours(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, value in headers:
        if value is None:
            continue
        if name in _TEXTS:
            told[_TEXTS[name]] = value[: limits.WEB_TEXT_MAX].decode("utf-8", "replace")
        elif name in _NUMBERS and value.lstrip(b"-").isdigit() and len(value) < 20:
            told[_NUMBERS[name]] = int(value)
    return told


def _size(length: int) -> int | None:
    return None if length < 0 else length
