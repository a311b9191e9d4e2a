"""The few types every layer shares. A record is one Kafka message; an offset is not an int one may add anything to."""

from __future__ import annotations

from typing import Final, NamedTuple, NewType

__all__ = [
    "END_OF_TIME",
    "NO_WATERMARK",
    "EpochNumber",
    "EventTimeMs",
    "Incarnation",
    "Offset",
    "TaskId",
    "TopicPartition",
]

Offset = NewType("Offset", int)
"""Place of a record in one topic partition. A *position* is the offset that is read next."""
EpochNumber = NewType("EpochNumber", int)
"""Counts the commits of one task's history; 0 is 'never committed'."""
Incarnation = NewType("Incarnation", int)
"""Counts the starts of a task; in a ledger the higher fences the lower."""
EventTimeMs = NewType("EventTimeMs", int)
"""Milliseconds since the epoch, UTC. Event time and processing time alike are plain int64 milliseconds."""

NO_WATERMARK: Final = -(1 << 63)
"""Watermark of a source that has not been heard of: nothing is known, every window is open."""
END_OF_TIME: Final = (1 << 63) - 1
"""Watermark of a bounded source at its end: every window closes."""


class TopicPartition(NamedTuple):
    """One partition of one topic. Equal to, and hashes as, Faust's and aiokafka's own tuples of the same two values."""

    topic: str
    partition: int


class TaskId(NamedTuple):
    """One partition number of one co-partition group: the unit of assignment, commit and failure."""

    group: str
    partition: int

    def __str__(self) -> str:
        return f"{self.group}:{self.partition}"
