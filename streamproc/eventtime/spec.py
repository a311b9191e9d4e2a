"""What a user says of event time: plain data, durations in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["EARLIEST_MS", "FOREVER", "LATEST_MS", "EventTime", "Tumbling"]

EARLIEST_MS: Final = -62_135_596_800_000
LATEST_MS: Final = 253_402_300_799_999
"""Years 1 to 9999: what every sink can hold."""


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


FOREVER: Final = Tumbling(LATEST_MS - EARLIEST_MS, EARLIEST_MS % (LATEST_MS - EARLIEST_MS))
"""The one window that holds every event time there may be: of a table without windows."""
