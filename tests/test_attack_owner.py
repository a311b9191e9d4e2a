"""A table's owner over a real overlay and store, with epochs that abort, restarts in mid-way, late partials, expiry and
memory that is too small: what is in the store is one batch computation over what was on time."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.core.types import NO_WATERMARK
from streamproc.eventtime.spec import FOREVER, Tumbling
from streamproc.eventtime.windows import WindowState, assign, expires, is_late, state_at, window_end
from streamproc.operators import windowtable
from streamproc.operators.accumulate import PartialAggregator
from streamproc.operators.partials import decode_partial
from streamproc.operators.plan import Agg, TablePlan
from streamproc.operators.windowtable import WindowTable
from streamproc.runtime.warm import warm_up
from streamproc.state.contract import StoreMeta, Writes
from streamproc.state.memory import MemoryStore
from streamproc.state.overlay import Overlay

LATENESS, RETAIN = 7, 30
FIXED = {"n": Agg("count"), "sum": Agg("sum", "i"), "most": Agg("max", "i"), "u": Agg("count_distinct", "i")}
TABLES = [FIXED, {**FIXED, "f": Agg("sum", "f")}, {**FIXED, "t": Agg("min", "t")}]
WINDOWS = [Tumbling(10), FOREVER]
KEYS = {"s": pl.String()}
INPUTS = {"i": pl.Int64(), "f": pl.Float64(), "t": pl.String()}


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """Compiling is no part of the time that one example may take."""
    warm_up(pipelines=True)


RECORD = st.fixed_dictionaries(
    {
        "at": st.integers(0, 60),
        "s": st.sampled_from([None, "", "\0", "\0\0", "a", "ab", "a\0", "x" * 80, "\ud7ff", "\U0010ffff"]),
        "i": st.none() | st.sampled_from([-(1 << 63), (1 << 63) - 1, 0, 1]),
        "f": st.none() | st.sampled_from([0.1, -0.0, 1e300, -1e300, 5e-324]),
        "t": st.none() | st.sampled_from(["", "b", "ä"]),
    }
)
EPOCHS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.lists(RECORD, max_size=6), st.integers(0, 12)), max_size=3),
        st.sampled_from(["commit", "commit", "abort before", "abort", "restart before", "restart"]),
        st.integers(0, 3),
    ),
    max_size=8,
)
"""Partials, each with how far the watermark goes on behind it; how the epoch ends; how far the sinks are behind."""


class Task:
    """What `OwnerWork` and a commit do to a table."""

    def __init__(self, plan: TablePlan) -> None:
        self.plan, self.store = plan, MemoryStore()
        self.overlay = Overlay(self.store, plan.name)
        self.epoch, self.committed = 0, NO_WATERMARK
        self.start()

    def start(self) -> None:
        self.overlay.drop()
        self.table, self.watermark = WindowTable(self.plan, self.overlay), self.committed
        self.table.restore()

    def read(self, records: list[dict[str, Any]]) -> None:
        aggregator = PartialAggregator(self.plan)
        frame = pl.DataFrame(records, schema={"at": pl.Int64(), **KEYS, **INPUTS})
        aggregator.add(frame, assign(frame.get_column("at").to_numpy(), self.plan.window))
        for partial in aggregator.drain(0, 1, 1, 0, False):
            for payload in partial.payloads:
                self.table.apply(*decode_partial(payload), self.watermark)

    def collect(self, sinks_epoch: int) -> None:
        self.table.advance(self.watermark, self.epoch + 1)
        self.table.expire(self.watermark, sinks_epoch)
        self.table.collect(self.epoch + 1)

    def commit(self) -> None:
        changes, writes = self.overlay.changes(), Writes()
        assert changes.keys == sorted(set(changes.keys))
        self.overlay.writes(writes)
        self.epoch, self.committed = self.epoch + 1, self.watermark
        self.store.write(writes, StoreMeta("log", self.epoch, {}, 0))
        self.overlay.drop()

    def rows(self) -> list[dict[str, Any]]:
        return self.table.results(self.overlay.scan(b"", None)).to_dicts()


@given(EPOCHS, st.sampled_from(TABLES), st.sampled_from(WINDOWS), st.sampled_from([0, 600, 1 << 20]))
@settings(deadline=None, max_examples=150)
def test_aborts_restarts_lateness_expiry_and_little_memory_do_not_show_in_a_table(
    epochs: list[Any], aggs: dict[str, Agg], window: Tumbling, cache_bytes_max: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windowtable, "TABLE_ROWS_CACHE_BYTES_MAX", cache_bytes_max)
        task = Task(TablePlan("t", KEYS, window, LATENESS, RETAIN, aggs, INPUTS, (), 1, "late", "agents/my.py:7"))
        counted: list[dict[str, Any]] = []
        for partials, end, behind in epochs:
            if end != "commit":
                _read(task, partials)
                if not end.endswith("before"):
                    task.collect(task.epoch - behind)
                task.start() if end.startswith("restart") else _abort(task)
            counted += _read(task, partials)
            task.collect(task.epoch - behind)
            task.commit()
            _check(task, counted)
        task.watermark = max(task.watermark, 0) + 1_000
        task.collect(task.epoch)
        task.commit()
        task.collect(task.epoch)
        task.commit()
        _check(task, counted)
        assert window == FOREVER or not task.rows()


def _abort(task: Task) -> None:
    task.overlay.drop()
    task.table.abort()
    task.watermark = task.committed


def _read(task: Task, partials: list[tuple[list[dict[str, Any]], int]]) -> list[dict[str, Any]]:
    """The records that were on time, by definition."""
    counted = []
    for records, further in partials:
        task.read(records)
        counted += [record for record in records if not is_late(_end(task, record), LATENESS, task.watermark)]
        task.watermark = max(task.watermark, 0) + further
    return counted


def _end(task: Task, record: dict[str, Any]) -> int:
    start = assign(pl.Series([record["at"]]).to_numpy(), task.plan.window).item()
    return window_end(start, task.plan.window)


def _check(task: Task, counted: list[dict[str, Any]]) -> None:
    groups: dict[tuple[int, str | None], list[dict[str, Any]]] = defaultdict(list)
    for record in counted:
        groups[_end(task, record), record["s"]].append(record)
    found = {}
    for key, value in task.overlay.scan(b"", None):
        if key[8:9] != windowtable.CHUNK:
            row = task.table.rows.layout.decode(value)
            start, (name,) = task.table.rows.split_key(key)
            found[window_end(start, task.plan.window), name] = (row.state, row.values)
    layout = task.table.rows.layout
    for (end, name), records in groups.items():
        if (end, name) not in found:
            assert expires(end, LATENESS, RETAIN, task.watermark)
            continue
        state, values = found.pop((end, name))
        assert state == state_at(end, LATENESS, task.watermark)
        for cell, agg, value in zip(layout.cells, task.plan.aggs.values(), values, strict=True):
            held = [record[agg.column] for record in records if agg.column and record[agg.column] is not None]
            wanted = _expected(agg, held, len(records))
            assert (value if agg.kind in ("max", "min") else cell.result(value)) == wanted
    assert not found
    windows = {window_end(start, task.plan.window): state for start, state in task.table.windows.items()}
    assert all(windows[end] == state_at(end, LATENESS, task.watermark) for end in windows)
    assert WindowState.OPEN in windows.values() or not any(end - 1 > task.watermark for end, _ in groups)


def _expected(agg: Agg, held: list[Any], rows: int) -> Any:
    match agg.kind:
        case "count":
            return rows
        case "count_distinct":
            return len(set(held))
        case "sum" if agg.column == "f":
            return _float_sum(held)
        case "sum":
            return sum(held) if held else None
        case kind:
            return (max if kind == "max" else min)(held, default=None)


def _float_sum(held: list[float]) -> float | None:
    return float(sum(map(Fraction, held), Fraction())) if held else None
