"""What operators exchange with the task around them. Operators are pure: batch and keyed state in, rows out, no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import msgspec

from streamproc.core.batch import Headers
from streamproc.core.types import TopicPartition
from streamproc.eventtime.watermark import WatermarkState

__all__ = ["KeyedState", "Partial", "PartialHeader", "SideRecord", "WatermarkState"]


class KeyedState(Protocol):
    """One table of one task, bytes to bytes, ordered by key: the epoch's writes over the committed rows."""

    def get(self, key: bytes) -> bytes | None: ...

    def put(self, key: bytes, value: bytes) -> None: ...

    def put_new(self, keys: list[bytes], values: list[bytes]) -> None:
        """Many times `put`: keys in ascending order that the epoch has not changed before."""

    def delete(self, key: bytes) -> None:
        """A deletion in its own right: sinks see it."""

    def expire(self, start: bytes, stop: bytes) -> None:
        """Rows with start <= key < stop leave by retention: sinks keep theirs."""

    def scan(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start <= key < stop as they are now: what is put while it goes on is not seen by it."""


class SideRecord(NamedTuple):
    """A dead letter or a late record: the original bytes, and why in headers."""

    kind: Literal["dead", "late"]
    topic: str
    """Where it is to be written."""
    key: bytes | None
    value: bytes | None
    headers: Headers
    """The original ones, then ours: ``sp-reason``, ``sp-topic``, ``sp-partition``, ``sp-offset``, ``sp-schema-id`` (if
    known), ``sp-time-ms``; late ones also ``sp-table``, ``sp-window-start``, ``sp-window-end``, ``sp-late-by-ms``."""
    source: TopicPartition
    offset: int


class PartialHeader(msgspec.Struct, frozen=True, array_like=True):
    """Head of a record in a repartition topic; format 1 is final."""

    format: int
    table: str
    source: int
    """Partition of the upstream task."""
    sources: int
    """How many upstream tasks there are."""
    epoch: int
    """The upstream task's epoch."""
    part: int
    parts: int
    """Numbered parts of one epoch for one destination; the watermark counts with the last."""
    watermark: int
    idle: bool


@dataclass
class Partial:
    """What one epoch of an upstream task ships to one destination partition: a head and columnar bytes."""

    destination: int
    payloads: list[bytes] = field(default_factory=list)
