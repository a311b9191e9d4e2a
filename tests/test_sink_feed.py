"""Which changed rows a sink is told of, by its `emit`, the window's state and the table's filters."""

from __future__ import annotations

import polars as pl
import pytest

from streamproc.core.errors import InvariantBroken
from streamproc.sinks.contract import Emit, TableShape
from streamproc.sinks.feed import STATE, VISIBLE, latest, sink_rows

SHAPE = TableShape("t", {"k": pl.String()}, {"n": pl.Int64()}, 1)
OPEN, CLOSED, FINAL = 0, 1, 2


def changed(*rows: tuple[str | None, int, int, bool | None]) -> pl.DataFrame:
    """Rows of (key, n, state, visible), all of one window."""
    frame = pl.DataFrame(
        rows, schema={"k": pl.String, "n": pl.Int64, STATE: pl.UInt8, VISIBLE: pl.Boolean}, orient="row"
    )
    start, end = (pl.lit(ms).cast(pl.Datetime("ms", "UTC")) for ms in (0, 3_600_000))
    return frame.with_columns(window_start=start, window_end=end).select(*SHAPE.names, STATE, VISIBLE)


def told(frame: pl.DataFrame, emit: Emit) -> tuple[list[str], list[str]] | None:
    rows = sink_rows(frame, emit)
    if rows is None:
        return None
    assert rows.upserts.columns == SHAPE.names
    assert rows.deletes.columns == SHAPE.identity
    return rows.upserts["k"].to_list(), rows.deletes["k"].to_list()


EVERY = changed(
    ("open", 1, OPEN, True), ("closed", 1, CLOSED, True), ("final", 1, FINAL, True),
    ("open-hidden", 1, OPEN, False), ("closed-hidden", 1, CLOSED, False), ("final-hidden", 1, FINAL, None),
)  # fmt: skip


@pytest.mark.parametrize(
    ("emit", "upserts", "deletes"),
    [
        ("on_update", ["open", "closed", "final"], ["open-hidden", "closed-hidden", "final-hidden"]),
        ("on_close", ["closed", "final"], ["closed-hidden", "final-hidden"]),
        ("final", ["final"], ["final-hidden"]),
    ],
)
def test_emit_holds_back_rows_by_the_state_of_their_window(emit: Emit, upserts: list[str], deletes: list[str]) -> None:
    assert told(EVERY, emit) == (upserts, deletes)


def test_nothing_to_tell_is_none() -> None:
    assert told(EVERY.clear(), "on_update") is None
    assert told(changed(("open", 1, OPEN, True)), "on_close") is None
    assert told(changed(("closed", 1, CLOSED, True)), "final") is None


def test_a_row_that_the_filters_no_longer_pass_is_taken_out() -> None:
    assert told(changed(("k", 9, OPEN, True)), "on_update") == (["k"], [])
    assert told(changed(("k", 3, OPEN, False)), "on_update") == ([], ["k"])


def test_a_replay_tells_each_row_as_it_was_last() -> None:
    frames = [
        changed(("a", 1, OPEN, True), ("b", 1, OPEN, True), (None, 1, OPEN, True)),
        changed(("b", 2, OPEN, False)),
        changed(("a", 3, CLOSED, True), (None, 3, OPEN, True)),
    ]
    rows = sink_rows(latest(frames, SHAPE), "on_update")
    assert rows is not None
    assert dict(rows.upserts.select("k", "n").iter_rows()) == {"a": 3, None: 3}
    assert rows.deletes["k"].to_list() == ["b"]


def test_an_expiry_is_handed_on() -> None:
    rows = sink_rows(EVERY, "on_update", expire_at_ms=7)
    assert rows is not None
    assert rows.expire_at_ms == 7


def test_rows_without_a_window_are_a_bug() -> None:
    with pytest.raises(InvariantBroken, match="no window_start"):
        sink_rows(EVERY.drop("window_start"), "on_update")
