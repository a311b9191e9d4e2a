"""Windows in event time: which window a record belongs to, when it closes, until when it may still change, and when
its rows leave. Pure functions over int64 milliseconds that do not overflow at either end of time.

A window ``[start, end)`` is closed by a watermark that has reached ``end - 1``, final by one that has reached
``end - 1 + lateness``, and leaves the store at ``end - 1 + lateness + retain``.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from streamproc.core.batch import I64
from streamproc.core.types import END_OF_TIME, NO_WATERMARK
from streamproc.eventtime.spec import Tumbling

__all__ = [
    "WindowState",
    "assign",
    "closes",
    "expires",
    "expiry_ms",
    "is_late",
    "late_mask",
    "state_at",
    "window_end",
    "window_ends",
]


class WindowState(IntEnum):
    """OPEN ──▶ CLOSED ──▶ FINAL, never back; with a lateness of 0 straight to FINAL. The numbers are stored in rows."""

    OPEN = 0
    CLOSED = 1
    """The watermark has passed its end; records within allowed lateness still refine it."""
    FINAL = 2
    """Nothing can change it any more."""


def assign(times: I64, window: Tumbling) -> I64:
    """Start of the one tumbling window that holds each event time; right for times before 1970 too.

    The earliest window is cut where int64 begins: times before its start (292 million years BC) belong to it.
    """
    lowest = NO_WATERMARK + (window.offset_ms - NO_WATERMARK) % window.size_ms
    held = np.maximum(times, lowest)
    into = np.mod(np.mod(held, window.size_ms) - window.offset_ms % window.size_ms, window.size_ms)
    starts: I64 = held - into
    return starts


def window_end(start: int, window: Tumbling) -> int:
    """End (exclusive) of the window that begins at ``start``."""
    return min(start + window.size_ms, END_OF_TIME)


def window_ends(starts: I64, window: Tumbling) -> I64:
    """`window_end` of many."""
    ends: I64 = np.minimum(starts, END_OF_TIME - window.size_ms) + window.size_ms
    return ends


def closes(end: int, watermark: int) -> bool:
    """Whether ``watermark`` has reached the last moment of the window that ends at ``end``."""
    return watermark != NO_WATERMARK and watermark >= end - 1


def is_late(end: int, lateness_ms: int, watermark: int) -> bool:
    """Whether a record of the window that ends at ``end`` is late: behind even allowed lateness, by the watermark
    *before* it. The same moment makes the window final."""
    return watermark == END_OF_TIME or closes(end + lateness_ms, watermark)


def late_mask(ends: I64, lateness_ms: int, watermarks: I64) -> NDArray[np.bool_]:
    """`is_late` of many: ``watermarks`` holds the one before each record."""
    reached = np.maximum(watermarks, NO_WATERMARK + lateness_ms) - lateness_ms
    last = np.maximum(ends, NO_WATERMARK + 1) - 1  # the least int64 has no predecessor
    late: NDArray[np.bool_] = (watermarks == END_OF_TIME) | ((reached >= last) & (watermarks != NO_WATERMARK))
    return late


def state_at(end: int, lateness_ms: int, watermark: int) -> WindowState:
    """State of the window that ends at ``end`` once the task's watermark is ``watermark``."""
    if is_late(end, lateness_ms, watermark):
        return WindowState.FINAL
    return WindowState.CLOSED if closes(end, watermark) else WindowState.OPEN


def expiry_ms(end: int, lateness_ms: int, retain_ms: int) -> int:
    """Event time at which the window's rows may leave the store; no wider than int64."""
    return min(end - 1 + lateness_ms + retain_ms, END_OF_TIME)


def expires(end: int, lateness_ms: int, retain_ms: int, watermark: int) -> bool:
    """Whether the watermark has reached the window's expiry. `END_OF_TIME` is no time: where a bounded input has ended
    its tables stay as they are, for people to read."""
    return watermark not in (END_OF_TIME, NO_WATERMARK) and watermark >= expiry_ms(end, lateness_ms, retain_ms)
