"""Watermarks: of one source partition, and of a task that hears of several. Pure: times come in, watermarks come out.

The rules are Flink's (`BoundedOutOfOrdernessWatermarks`, `WatermarksWithIdleness`, `StatusWatermarkValve`), but a
source's watermark is defined per record, so that nothing depends on where a batch ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
import numpy as np

from streamproc.core.batch import I64
from streamproc.core.errors import invariant
from streamproc.core.types import END_OF_TIME, NO_WATERMARK
from streamproc.eventtime.spec import EventTime

__all__ = ["TASK_ITSELF", "MinWatermark", "SourceClock", "WatermarkState"]

TASK_ITSELF: Final = -1
"""In `MinWatermark.states`, the entry that holds the task's own watermark: a woken source must not pull it back, not
even by way of a restart."""


class WatermarkState(msgspec.Struct):
    """One event-time clock, as the commit record keeps it."""

    watermark: int
    idle: bool = False


class SourceClock:
    """The event-time clock of one source partition: after record *i* the watermark is ``max(event_time[0..i]) -
    out_of_orderness - 1``, "no event at or before it is expected any more". It never goes back.

    Owned by one task; ``state`` is what its last commit record says, None before the first.
    """

    def __init__(self, spec: EventTime, state: WatermarkState | None = None) -> None:
        self._spec = spec
        self._behind_ms = spec.out_of_orderness_ms + 1
        self._watermark = NO_WATERMARK
        self.reset(state)

    @property
    def watermark(self) -> int:
        return self._watermark

    @property
    def idle(self) -> bool:
        return self._idle

    def observe(self, times: I64) -> I64:
        """Take event times in offset order; return the watermark before each of them (same length).

        A record wakes an idle source; an empty batch does not.
        """
        before = np.empty(len(times), np.int64)
        if not len(times):
            return before
        after = np.maximum(times, NO_WATERMARK + self._behind_ms) - self._behind_ms
        before[0] = self._watermark
        np.maximum(after[:-1], self._watermark, out=before[1:])
        np.maximum.accumulate(before, out=before)
        self._watermark = max(int(before[-1]), int(after[-1]))
        self._wake()
        return before

    def end(self) -> None:
        """A bounded source has reached its end: every window closes, and an ended source is never idle."""
        self._watermark = END_OF_TIME
        self._wake()

    def tick(self, monotonic_ms: int, at_end: bool, *, all_idle: bool = True) -> bool:
        """Let processing time pass; True if the watermark or the idle flag changed. Called a few times a second.

        ``monotonic_ms`` comes from the injected clock. ``at_end``: the last fetch said that the position is the end of
        the log, and the source is not paused; nothing else is idleness. Time without records counts from the first tick
        after the last record. With ``idle="advance"`` the watermark of an idle source moves on by the time gone since
        it became idle; who knows of other sources passes ``all_idle=False`` while any of them is awake.
        """
        if self._watermark == END_OF_TIME:
            return False
        before = (self._watermark, self._idle)
        if not at_end or self._spec.idle_after_ms is None:
            self._wake()
        else:
            self._rest(monotonic_ms, self._spec.idle_after_ms)
            self._advance(monotonic_ms, all_idle)
        return before != (self._watermark, self._idle)

    def state(self) -> WatermarkState:
        """For the commit record."""
        return WatermarkState(self._watermark, self._idle)

    def reset(self, state: WatermarkState | None) -> None:
        """Back to the last commit record after an abort; processing time starts anew."""
        self._watermark = NO_WATERMARK if state is None else state.watermark
        self._idle = False if state is None else state.idle
        self._quiet_since_ms: int | None = None
        self._advanced_at_ms: int | None = None

    def _wake(self) -> None:
        self._idle, self._quiet_since_ms, self._advanced_at_ms = False, None, None

    def _rest(self, now_ms: int, idle_after_ms: int) -> None:
        if self._quiet_since_ms is None:
            # A clock restored as idle stays so: the task was idle at its last commit and has read nothing since.
            self._quiet_since_ms = now_ms - idle_after_ms if self._idle else now_ms
        self._idle = now_ms - self._quiet_since_ms >= idle_after_ms

    def _advance(self, now_ms: int, all_idle: bool) -> None:
        if not (self._idle and all_idle and self._spec.idle == "advance"):
            self._advanced_at_ms = None
            return
        # A source that never had a record has no event time to move on from.
        if self._advanced_at_ms is not None and self._watermark != NO_WATERMARK:
            self._watermark = min(self._watermark + now_ms - self._advanced_at_ms, END_OF_TIME - 1)
        self._advanced_at_ms = now_ms


class MinWatermark:
    """The watermark of a task with several sources: the minimum over those that are not idle; a source not heard of
    counts as `NO_WATERMARK`. While all are idle it is the maximum: no source holds anything back any more. It never
    goes back. (Flink's `StatusWatermarkValve`.)

    ``sources`` is fixed in the commit record; ``states`` is what `states` gave at the last commit.
    """

    def __init__(self, sources: int, states: Mapping[int, WatermarkState] | None = None) -> None:
        self._sources = sources
        self._watermark = NO_WATERMARK
        self.reset(states or {})

    @property
    def watermark(self) -> int:
        return self._watermark

    @property
    def idle(self) -> bool:
        """Whether every source is idle."""
        return all(state.idle for state in self._states)

    def update(self, source: int, watermark: int, idle: bool) -> int:
        """Hear from ``source``; return the task's watermark. A source's own watermark never goes back either."""
        invariant(0 <= source < self._sources, f"Source {source} is not one of the {self._sources} of this task.")
        state = self._states[source]
        state.watermark, state.idle = max(state.watermark, watermark), idle
        self._watermark = max(self._watermark, self._lowest())
        return self._watermark

    def states(self) -> dict[int, WatermarkState]:
        """For the commit record: one entry a source heard of, and the task's own under `TASK_ITSELF`."""
        heard = {
            source: WatermarkState(state.watermark, state.idle)
            for source, state in enumerate(self._states)
            if state.idle or state.watermark != NO_WATERMARK
        }
        return {TASK_ITSELF: WatermarkState(self._watermark), **heard}

    def reset(self, states: Mapping[int, WatermarkState]) -> None:
        """Back to the last commit record after an abort."""
        self._states = [WatermarkState(NO_WATERMARK) for _ in range(self._sources)]
        for source, state in states.items():
            if source != TASK_ITSELF:
                invariant(0 <= source < self._sources, f"Source {source} is not one of {self._sources} of this task.")
                self._states[source] = WatermarkState(state.watermark, state.idle)
        own = states.get(TASK_ITSELF)
        self._watermark = max(self._lowest(), own.watermark if own else NO_WATERMARK)

    def _lowest(self) -> int:
        awake = [state.watermark for state in self._states if not state.idle]
        return min(awake) if awake else max((state.watermark for state in self._states), default=NO_WATERMARK)
