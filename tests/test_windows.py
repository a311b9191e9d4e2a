"""Tumbling windows: arithmetic on both sides of 1970, and what a watermark does to a window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamproc.core.types import END_OF_TIME, NO_WATERMARK
from streamproc.eventtime.spec import Tumbling
from streamproc.eventtime.windows import (
    WindowState,
    assign,
    closes,
    expires,
    expiry_ms,
    is_late,
    late_mask,
    state_at,
    window_end,
    window_ends,
)

MS = st.integers(-(1 << 63), (1 << 63) - 1)
WATERMARKS = MS | st.sampled_from([NO_WATERMARK, END_OF_TIME]) | st.integers(-100, 100)
WINDOWS = st.builds(Tumbling, st.integers(1, 10**11), st.integers(-(10**11), 10**11))


@given(st.lists(MS | st.integers(-100, 100), min_size=1), WINDOWS)
def test_every_time_lies_in_the_window_it_is_assigned(times: list[int], window: Tumbling) -> None:
    starts = assign(np.array(times, np.int64), window)
    lowest = NO_WATERMARK + window.size_ms
    for time, start, end in zip(times, starts.tolist(), window_ends(starts, window).tolist(), strict=True):
        assert (start - window.offset_ms) % window.size_ms == 0
        assert end == window_end(start, window)
        assert time < end or end == END_OF_TIME
        assert start <= time or time < lowest, "only at the beginning of int64 a window is cut"


@pytest.mark.parametrize(("time", "start"), [(0, 0), (4, 0), (5, 5), (-1, -5), (-5, -5), (-6, -10)])
def test_windows_before_1970_are_aligned_like_those_after(time: int, start: int) -> None:
    assert assign(np.array([time]), Tumbling(5)).tolist() == [start]


def test_offset_moves_the_windows() -> None:
    assert assign(np.array([0, 2, 3, 12, -8]), Tumbling(10, 3)).tolist() == [-7, -7, 3, 3, -17]


def test_window_goes_open_closed_final() -> None:
    states = [state_at(10, 5, watermark) for watermark in (NO_WATERMARK, 8, 9, 13, 14, END_OF_TIME)]
    assert states == [
        WindowState.OPEN,
        WindowState.OPEN,
        WindowState.CLOSED,
        WindowState.CLOSED,
        WindowState.FINAL,
        WindowState.FINAL,
    ]


def test_without_lateness_a_window_is_final_when_it_closes() -> None:
    assert [state_at(10, 0, watermark) for watermark in (8, 9)] == [WindowState.OPEN, WindowState.FINAL]


@given(MS, st.integers(0, 10**12), st.lists(WATERMARKS, min_size=1))
@example(-(1 << 63), 0, [0])
def test_late_by_column_is_late_by_record(end: int, lateness: int, watermarks: list[int]) -> None:
    found = late_mask(np.full(len(watermarks), end), lateness, np.array(watermarks, np.int64))
    assert found.tolist() == [is_late(end, lateness, watermark) for watermark in watermarks]


@given(MS, st.integers(0, 10**12), WATERMARKS, WATERMARKS)
def test_a_higher_watermark_never_reopens_a_window(end: int, lateness: int, one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert state_at(end, lateness, low) <= state_at(end, lateness, high)
    assert not closes(end, low) or closes(end, high)


def test_nothing_is_late_before_anything_is_known_and_all_is_at_the_end_of_time() -> None:
    assert not is_late(NO_WATERMARK, 0, NO_WATERMARK)
    assert is_late(END_OF_TIME, 10**12, END_OF_TIME)


def test_rows_leave_after_lateness_and_retention_but_not_because_a_bounded_input_ended() -> None:
    assert expiry_ms(10, 5, 100) == 114
    assert [expires(10, 5, 100, watermark) for watermark in (NO_WATERMARK, 113, 114, END_OF_TIME)] == [
        False,
        False,
        True,
        False,
    ]
