"""Watermarks of a source and of a task: the laws of semantics, against definitions spelt out record by record."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.core.errors import InvariantBroken
from streamproc.core.types import END_OF_TIME, NO_WATERMARK
from streamproc.eventtime.spec import EventTime
from streamproc.eventtime.watermark import TASK_ITSELF, MinWatermark, SourceClock, WatermarkState

TIMES = st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-50, 50), max_size=30)


def clock(**spec: object) -> SourceClock:
    return SourceClock(EventTime("at", **spec))  # type: ignore[arg-type]


def observe(source: SourceClock, *times: int) -> list[int]:
    return source.observe(np.array(times, np.int64)).tolist()


@given(TIMES, st.integers(0, 20), st.integers(1, 5))
def test_watermark_before_each_record_is_the_definition_however_batches_are_cut(
    times: list[int], behind: int, size: int
) -> None:
    source = clock(out_of_orderness_ms=behind)
    found: list[int] = []
    for start in range(0, len(times), size):
        found += observe(source, *times[start : start + size])
    expected = [max([NO_WATERMARK, *(t - behind - 1 for t in times[:i])]) for i in range(len(times) + 1)]
    assert [*found, source.watermark] == expected


def test_watermark_never_goes_back_not_even_after_the_end() -> None:
    source = clock()
    observe(source, 100)
    assert observe(source, 50, 60) == [99, 99]
    source.end()
    assert observe(source, 5) == [END_OF_TIME]
    assert source.watermark == END_OF_TIME


def test_source_is_idle_only_after_its_time_at_the_end_of_the_log() -> None:
    source = clock(idle_after_ms=100, idle="hold")
    observe(source, 1000)
    assert not source.tick(0, True)
    assert not source.tick(99, True)
    assert source.tick(100, True)
    assert source.idle
    assert not source.tick(900, True)
    assert source.watermark == 999


def test_time_not_at_the_end_is_not_idleness() -> None:
    source = clock(idle_after_ms=100)
    source.tick(0, True)
    source.tick(90, False)
    source.tick(120, True)
    assert not source.tick(200, True)
    assert source.tick(220, True)


def test_source_without_idle_after_is_never_idle() -> None:
    source = clock()
    assert not any(source.tick(now, True) for now in range(0, 10**9, 10**8))


def test_a_record_wakes_an_idle_source_and_an_empty_batch_does_not() -> None:
    source = clock(idle_after_ms=10, idle="hold")
    observe(source, 7)
    source.tick(0, True)
    source.tick(10, True)
    observe(source)
    assert source.idle
    observe(source, 5)
    assert not source.idle
    assert not source.tick(15, True), "time without records begins anew"


def test_watermark_of_idle_source_advances_by_the_time_gone_since() -> None:
    source = clock(idle_after_ms=10)
    observe(source, 1000)
    source.tick(0, True)
    source.tick(10, True)
    assert source.watermark == 999
    assert source.tick(35, True)
    assert source.watermark == 1024
    source.tick(60, True, all_idle=False)
    source.tick(70, True)
    source.tick(75, True)
    assert source.watermark == 1029, "only while all sources are idle"
    observe(source, 1)
    assert source.watermark == 1029, "a woken source pulls nothing back"


def test_source_that_never_had_a_record_has_nothing_to_advance() -> None:
    source = clock(idle_after_ms=0)
    source.tick(0, True)
    source.tick(500, True)
    assert source.idle
    assert source.watermark == NO_WATERMARK


def test_state_restores_the_clock_and_a_restart_is_not_a_wake_up() -> None:
    source = clock(idle_after_ms=10, idle="hold")
    observe(source, 1000)
    source.tick(0, True)
    source.tick(10, True)
    again = SourceClock(EventTime("at", idle_after_ms=10, idle="hold"), source.state())
    assert (again.watermark, again.idle) == (999, True)
    assert not again.tick(5000, True)
    assert again.idle
    observe(again, 2000)
    again.reset(source.state())
    assert again.state() == source.state()


def test_task_takes_the_minimum_and_waits_for_sources_not_heard_of() -> None:
    task = MinWatermark(3)
    assert task.update(0, 100, False) == NO_WATERMARK
    assert task.update(1, 50, False) == NO_WATERMARK
    assert task.update(2, 70, False) == 50
    assert task.update(1, 90, False) == 70


def test_idle_source_holds_nobody_back_and_a_woken_one_pulls_nothing_back() -> None:
    task = MinWatermark(2)
    task.update(0, 100, False)
    assert task.update(1, 10, True) == 100
    assert task.update(1, 20, False) == 100
    assert task.update(0, 200, False) == 100
    assert task.update(1, 150, False) == 150


def test_when_all_are_idle_the_highest_counts() -> None:
    task = MinWatermark(2)
    task.update(0, 100, False)
    task.update(1, 300, False)
    assert task.update(0, 100, True) == 300
    assert task.update(1, 300, True) == 300
    assert task.idle


def test_all_sources_ended_is_the_end_of_time() -> None:
    task = MinWatermark(2)
    task.update(0, END_OF_TIME, False)
    assert task.watermark == NO_WATERMARK
    assert task.update(1, END_OF_TIME, False) == END_OF_TIME


def test_unknown_source_breaks_an_invariant() -> None:
    with pytest.raises(InvariantBroken):
        MinWatermark(2).update(2, 1, False)


UPDATES = st.lists(st.tuples(st.integers(0, 2), st.integers(-5, 40), st.booleans()), max_size=25)


@given(UPDATES, st.integers(0, 25))
def test_task_watermark_is_monotone_and_survives_restarts(updates: list[tuple[int, int, bool]], cut: int) -> None:
    straight, restarted = MinWatermark(3), MinWatermark(3)
    highest = NO_WATERMARK
    for at, update in enumerate(updates):
        if at == cut:
            restarted = MinWatermark(3, restarted.states())
        now = straight.update(*update)
        assert now >= highest
        assert restarted.update(*update) == now
        highest = now
    assert restarted.states() == straight.states()


@given(UPDATES, UPDATES)
def test_reset_leaves_exactly_the_committed_watermarks(
    committed: list[tuple[int, int, bool]], aborted: list[tuple[int, int, bool]]
) -> None:
    task = MinWatermark(3)
    for update in committed:
        task.update(*update)
    states, watermark = task.states(), task.watermark
    for update in aborted:
        task.update(*update)
    task.reset(states)
    assert (task.states(), task.watermark) == (states, watermark)
    assert states[TASK_ITSELF] == WatermarkState(watermark)
