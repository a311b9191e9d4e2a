"""What a user says of event time: plain data, durations in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["EventTime", "Tumbling"]


@dataclass(frozen=True)
class EventTime:
    """Where a topic's event time is and how far it can be trusted; shared by all who read the topic."""

    column: str
    out_of_orderness_ms: int = 0
    idle_after_ms: int | None = None
    """Processing time without records at the end of the log after which the source holds nobody back; None: never."""
    idle: Literal["advance", "hold"] = "advance"
    max_ahead_ms: int = 3_600_000
    """An event time later than the record's own timestamp by more than this is a dead letter."""
    bounded: bool = False
    """The input ends where each partition ended when the application first started."""


@dataclass(frozen=True)
class Tumbling:
    """Windows [start, start + size) with start ≡ offset (mod size)."""

    size_ms: int
    offset_ms: int = 0
