"""The owner of a windowed table: what streams through it is what one batch computation over the same records gives."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.core.errors import UserError
from streamproc.core.types import END_OF_TIME, NO_WATERMARK
from streamproc.eventtime.spec import EventTime, Tumbling
from streamproc.eventtime.watermark import MinWatermark, SourceClock
from streamproc.eventtime.windows import WindowState, assign, late_mask, window_ends
from streamproc.operators import accumulators, aggregates, windowtable
from streamproc.operators.accumulate import PartialAggregator
from streamproc.operators.groupkeys import encode_group_key
from streamproc.operators.partials import PartialRows, decode_partial
from streamproc.operators.plan import Agg, Filter, TablePlan, WithColumns
from streamproc.operators.rowcache import RowCache
from streamproc.operators.tablerows import EPOCH, STATE, VISIBLE, Row, RowLayout, TableRows, is_row
from streamproc.operators.windowtable import LateAggregate, WindowTable, result_shape

KEYS = {"s": pl.String(), "b": pl.Boolean()}
INPUTS = {"i": pl.Int64(), "f": pl.Float64(), "d": pl.Date(), "t": pl.String(), "u": pl.UInt64()}
AGGS = {
    "n": aggregates.count(),
    "n_f": aggregates.count("f"),
    "sum_i": aggregates.sum("i"),
    "mean_i": aggregates.mean("i"),
    "sum_f": aggregates.sum("f"),
    "mean_f": aggregates.mean("f"),
    "min_f": aggregates.min("f"),
    "max_f": aggregates.max("f"),
    "max_d": aggregates.max("d"),
    "min_t": aggregates.min("t"),
    "max_u": aggregates.max("u"),
    "distinct_t": aggregates.count_distinct("t"),
    "distinct_f": aggregates.count_distinct("f"),
}
WHOLES = {name: AGGS[name] for name in ("n", "n_f", "sum_i", "mean_i", "min_f", "max_d", "max_u")}
"""Those whose rows are all of one width."""
SCHEMA = {**KEYS, **INPUTS}


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """Compiling is no part of the time that one example may take."""
    windowtable.warm_up(State())


def plan(aggs: dict[str, Agg] = AGGS, **more: Any) -> TablePlan:
    chosen: dict[str, Any] = {
        "name": "t", "keys": KEYS, "window": Tumbling(10), "allowed_lateness_ms": 0, "retain_ms": 0, "aggs": aggs,
        "inputs": INPUTS, "post": (), "partitions": 1, "late_topic": "late", "where": "agents/my.py:7", **more,
    }  # fmt: skip
    return TablePlan(**chosen)


class State:
    """`KeyedState` over a dictionary, with commits and aborts."""

    def __init__(self) -> None:
        self.rows: dict[bytes, bytes] = {}
        self.expired: list[bytes] = []
        self._committed: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.rows.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        self.rows[key] = value

    def put_new(self, keys: list[bytes], values: list[bytes]) -> None:
        assert keys == sorted(set(keys))
        self.rows.update(zip(keys, values, strict=True))

    def delete(self, key: bytes) -> None:
        del self.rows[key]

    def expire(self, start: bytes, stop: bytes) -> None:
        self.expired += (gone := [key for key in self.rows if start <= key < stop])
        for key in gone:
            del self.rows[key]

    def scan(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted(row for row in self.rows.items() if row[0] >= start and (stop is None or row[0] < stop)))

    def commit(self) -> None:
        self._committed = dict(self.rows)

    def abort(self) -> None:
        self.rows = dict(self._committed)


class Owner:
    """A table, its state and the epochs of one upstream task after another."""

    def __init__(self, table: TablePlan, **more: Any) -> None:
        self.plan, self.state = table, State()
        self.table = WindowTable(table, self.state, **more)
        self.epoch = 0

    def payload(self, rows: list[dict[str, Any]], source: int = 0) -> list[bytes]:
        aggregator = PartialAggregator(self.plan)
        frame = pl.DataFrame(rows, schema={"at": pl.Int64, **self.plan.keys, **self.plan.inputs})
        aggregator.add(frame, assign(frame.get_column("at").to_numpy(), self.plan.window))
        return [payload for partial in aggregator.drain(source, 9, 1, 0, False) for payload in partial.payloads]

    def apply(self, rows: list[dict[str, Any]], watermark: int = NO_WATERMARK) -> list[LateAggregate]:
        return [
            late
            for payload in self.payload(rows)
            for late in self.table.apply(*decode_partial(payload), watermark)
        ]  # fmt: skip

    def commit(self, watermark: int = NO_WATERMARK) -> None:
        self.epoch += 1
        self.table.advance(watermark, self.epoch)
        self.table.collect(self.epoch)
        self.state.commit()

    def rows(self) -> list[dict[str, Any]]:
        return self.table.results(self.state.rows.items()).to_dicts()


def one(at: int, key: str | None = "k", **values: Any) -> dict[str, Any]:
    return {"at": at, "s": key, "b": None, **values}


# ---- the law: a stream is one batch computation

VALUES = st.fixed_dictionaries(
    {
        "at": st.integers(-25, 25),
        "s": st.sampled_from([None, "", "a", "b"]),
        "b": st.sampled_from([None, True, False]),
        "i": st.none() | st.integers(-(1 << 60), 1 << 60),
        "f": st.none() | st.floats() | st.sampled_from([0.1, 0.2, 1e16, -1e16, 5e-324, -0.0]),
        "d": st.none() | st.dates(date(1900, 1, 1), date(2100, 1, 1)),
        "t": st.none() | st.sampled_from(["", "x", "é", "z"]),
        "u": st.none() | st.integers(0, (1 << 64) - 1),
    }
)
RECORDS = st.lists(VALUES, max_size=25)
SOME_AGGS = st.sampled_from([AGGS, {name: agg for name, agg in AGGS.items() if name != "min_t"}])
"""Rows with a text are not kept in memory, others are."""


@given(RECORDS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_streaming_result_is_the_batch_result_however_it_is_cut_and_shuffled(
    records: list[dict[str, Any]], random_: random.Random
) -> None:
    owner = Owner(plan())
    for payloads in _epochs(owner, records, random_):
        for payload in payloads:
            owner.table.apply(*decode_partial(payload), NO_WATERMARK)
        if random_.random() < 0.5:
            owner.commit()
        if random_.random() < 0.2:
            owner.commit()
            owner.table = WindowTable(owner.plan, owner.state)
            owner.table.restore()
    owner.commit(END_OF_TIME)
    found = {(row["s"], row["b"], _ms(row["window_start"])): row for row in owner.rows()}
    expected = _oracle(records)
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert {name: repr(found[key][name]) for name in AGGS} == {name: repr(row[name]) for name in AGGS}
        assert _ms(found[key]["window_end"]) == key[2] + 10
        assert found[key][STATE] == WindowState.FINAL


@given(RECORDS, st.randoms(use_true_random=False), SOME_AGGS)
@settings(deadline=None, max_examples=60)
def test_stored_bytes_do_not_depend_on_where_batches_and_epochs_end(
    records: list[dict[str, Any]], random_: random.Random, aggs: dict[str, Agg]
) -> None:
    straight, cut = Owner(plan(aggs)), Owner(plan(aggs))
    straight.apply(records)
    straight.commit()
    for payloads in _epochs(cut, records, random_):
        for payload in payloads:
            cut.table.apply(*decode_partial(payload), NO_WATERMARK)
    cut.commit()
    assert {k: v for k, v in straight.state.rows.items() if is_row(k)} == {
        k: v for k, v in cut.state.rows.items() if is_row(k)
    }


@given(RECORDS, RECORDS, RECORDS, st.integers(-30, 60), SOME_AGGS)
@settings(deadline=None, max_examples=40)
def test_an_aborted_epoch_leaves_no_trace(
    before: list[dict[str, Any]],
    aborted: list[dict[str, Any]],
    after: list[dict[str, Any]],
    watermark: int,
    aggs: dict[str, Agg],
) -> None:
    straight, shaken = Owner(plan(aggs, retain_ms=5)), Owner(plan(aggs, retain_ms=5))
    for owner in (straight, shaken):
        owner.apply(before)
        owner.commit(-20)
    shaken.apply(aborted, -20)
    shaken.table.advance(watermark, 2)
    shaken.table.collect(2)
    shaken.table.expire(watermark, 1)
    shaken.state.abort()
    shaken.table.abort()
    assert shaken.table.size_bytes == 0
    assert shaken.table.windows == straight.table.windows
    for owner in (straight, shaken):
        owner.apply(after, -20)
        owner.commit(watermark)
    assert shaken.state.rows == straight.state.rows
    restored = WindowTable(shaken.plan, shaken.state)
    restored.restore()
    assert restored.windows == shaken.table.windows == straight.table.windows


def _epochs(owner: Owner, records: list[dict[str, Any]], random_: random.Random) -> Iterator[list[bytes]]:
    """The records cut over several sources, each with batches and epochs of its own, shipped in any order."""
    records = random_.sample(records, len(records))
    aggregators = [PartialAggregator(owner.plan) for _ in range(3)]
    while records:
        size, source = random_.randint(1, 6), random_.randrange(3)
        batch, records = records[:size], records[size:]
        frame = pl.DataFrame(batch, schema={"at": pl.Int64, **SCHEMA})
        aggregators[source].add(frame, assign(frame.get_column("at").to_numpy(), owner.plan.window))
        if random_.random() < 0.5 or not records:
            shipped = aggregators if not records else [aggregators[source]]
            for one_ in shipped:
                yield [payload for partial in one_.drain(source, 3, 1, 0, False) for payload in partial.payloads]


def _oracle(records: list[dict[str, Any]]) -> dict[tuple[Any, Any, int], dict[str, Any]]:
    groups: dict[tuple[Any, Any, int], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["s"], record["b"], record["at"] // 10 * 10].append(record)
    found = {}
    for key, rows in groups.items():
        ints, floats, days, texts, wide = (
            [row[name] for row in rows if row[name] is not None] for name in ("i", "f", "d", "t", "u")
        )
        ordered = sorted(floats, key=lambda v: (math.isnan(v), 0 if math.isnan(v) else v, math.copysign(1, v)))
        extremes = [math.nan if math.isnan(v) else v for v in (ordered[:1] + ordered[-1:])] or [None, None]
        found[key] = {
            "n": len(rows),
            "n_f": len(floats),
            "sum_i": sum(ints) if ints else None,
            "mean_i": float(Fraction(sum(ints), len(ints))) if ints else None,
            "sum_f": _exact(floats, 1),
            "mean_f": _exact(floats, len(floats)),
            "min_f": extremes[0],
            "max_f": extremes[1],
            "max_d": max(days, default=None),
            "min_t": min(texts, default=None),
            "max_u": max(wide, default=None),
            "distinct_t": len(set(texts)),
            "distinct_f": len({"nan" if math.isnan(v) else v for v in floats}),
        }
    return found


def _exact(values: list[float], count: int) -> float | None:
    if not values:
        return None
    special = [value for value in values if not math.isfinite(value)]
    if special:
        return sum(special)
    total = sum(map(Fraction, values), Fraction()) / count
    try:
        return float(total)
    except OverflowError:
        return math.inf if total > 0 else -math.inf


def _ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


@pytest.mark.parametrize("groups", [40, 3000])
def test_streaming_result_is_polars_result_over_many_records(groups: int) -> None:
    rng = np.random.default_rng(groups)
    size = 20_000
    frame = pl.DataFrame(
        {
            "at": np.sort(rng.integers(-500, 500, size)),
            "k": rng.integers(0, groups, size),
            "i": rng.integers(-1000, 1000, size),
            "f": rng.normal(size=size),
            "u": rng.integers(0, 50, size),
        }
    )
    aggs = {
        "n": Agg("count"), "i": Agg("sum", "i"), "f": Agg("sum", "f"), "least": Agg("min", "f"),
        "u": Agg("count_distinct", "u"),
    }  # fmt: skip
    inputs = {"i": pl.Int64(), "f": pl.Float64(), "u": pl.Int64()}
    table = plan(aggs, inputs=inputs, keys={"k": pl.Int64()}, window=Tumbling(100))
    owner, aggregator = Owner(table), PartialAggregator(table)
    for start in range(0, size, 3000):
        batch = frame[start : start + 3000]
        aggregator.add(batch, assign(batch.get_column("at").to_numpy(), table.window))
        for partial in aggregator.drain(0, 1, start, 0, False):
            for payload in partial.payloads:
                owner.table.apply(*decode_partial(payload), NO_WATERMARK)
        owner.commit()
    expected = (
        frame.group_by("k", window_start=(pl.col("at") // 100 * 100))
        .agg(n=pl.len(), i=pl.col("i").sum(), f=pl.col("f"), least=pl.col("f").min(), u=pl.col("u").n_unique())
        .with_columns(f=pl.col("f").map_elements(lambda values: math.fsum(values), return_dtype=pl.Float64))
        .sort("k", "window_start")
    )
    found = owner.table.results(owner.state.rows.items()).with_columns(pl.col("window_start").dt.epoch("ms"))
    assert found.select(expected.columns).sort("k", "window_start").rows() == expected.rows()


def test_float_sums_stay_exact_when_words_are_carried_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulators, "CARRY_EVERY", 3)
    rng = np.random.default_rng(5)
    values = rng.normal(size=400) * 10.0 ** rng.integers(-30, 30, 400)
    table = plan({"f": Agg("sum", "f")}, keys={}, inputs={"f": pl.Float64()})
    owner, aggregator = Owner(table), PartialAggregator(table)
    for start in range(0, 400, 2):
        aggregator.add(pl.DataFrame({"f": values[start : start + 2]}), np.zeros(2, np.int64))
    for partial in aggregator.drain(0, 1, 1, 0, False):
        owner.table.apply(*decode_partial(partial.payloads[0]), NO_WATERMARK)
    owner.commit()
    assert owner.rows()[0]["f"] == math.fsum(values)


# ---- late


def test_a_partial_of_a_final_window_is_late_and_never_makes_the_window_again() -> None:
    owner = Owner(plan({"n": Agg("count")}, allowed_lateness_ms=5))
    owner.apply([one(3)])
    owner.commit(13)
    assert owner.apply([one(4)], 13) == [], "within allowed lateness"
    owner.commit(14)
    before = owner.rows()
    (late,) = owner.apply([one(4), one(25)], 14)
    owner.commit(14)
    assert (late.window_start, late.window_end, late.late_by_ms) == (0, 10, 0)
    assert late.keys == encode_group_key(["k", None], KEYS)
    assert ("sp-late-by-ms", b"0") in late.headers()
    assert [row for row in owner.rows() if row["window_start"] == before[0]["window_start"]] == before
    assert before[0]["n"] == 2
    assert owner.table.expire(10**6, owner.epoch) == 1
    assert [late.window_start for late in owner.apply([one(3)], 10**6)] == [0], "purged is final too"


def test_a_late_aggregate_can_be_merged_by_the_owner_if_it_is_sent_back() -> None:
    owner = Owner(plan())
    rows = [one(1, f=0.5, t="x"), one(1, key="other"), one(2, f=0.25, t="y")]
    late = owner.apply(rows, 100)
    assert len(late) == 2
    for aggregate in late:
        owner.table.apply(*decode_partial(aggregate.payload), NO_WATERMARK)
    owner.commit()
    assert [(row["n"], row["sum_f"], row["distinct_t"]) for row in owner.rows()] == [(2, 0.75, 2), (1, None, 0)]


def test_a_partial_that_comes_late_as_a_whole_is_cut_once_not_once_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, cut = Owner(plan(WHOLES)), Counter[int]()
    (payload,) = owner.payload([one(at, t=str(at)) for at in range(0, 2000, 10)])
    spans = PartialRows.spans
    monkeypatch.setattr(PartialRows, "spans", lambda rows, at: (cut.update([len(rows)]), spans(rows, at))[1])
    header, rows = decode_partial(payload)
    late = owner.table.apply(header, rows, 3000)
    assert [one_.window_start for one_ in late] == list(range(0, 2000, 10))
    assert cut[200] < 10
    for one_ in late:
        single, alone = decode_partial(one_.payload)
        assert (single, len(alone)) == (header, 1)


@given(st.integers(-50, 50), st.integers(0, 30), st.integers(-60, 100))
def test_what_is_late_is_decided_by_the_definition(at: int, lateness: int, watermark: int) -> None:
    owner = Owner(plan({"n": Agg("count")}, allowed_lateness_ms=lateness))
    end = at // 10 * 10 + 10
    assert bool(owner.apply([one(at)], watermark)) == (end - 1 + lateness <= watermark)


@given(
    st.lists(st.lists(st.integers(-100, 200), max_size=15), min_size=1, max_size=3), st.randoms(use_true_random=False)
)
@settings(deadline=None, max_examples=50)
def test_sources_read_out_of_step_make_nothing_late_that_is_not_late_in_its_own_source(
    sources: list[list[int]], random_: random.Random
) -> None:
    table = plan({"n": Agg("count")}, keys={}, inputs={}, allowed_lateness_ms=7)
    owner, spec = Owner(table), EventTime("at", out_of_orderness_ms=20)
    task = MinWatermark(len(sources))
    clocks, aggregators = [SourceClock(spec) for _ in sources], [PartialAggregator(table) for _ in sources]
    on_time: Counter[int] = Counter()
    left = [list(times) for times in sources]
    while any(left):
        at = random_.choice([at for at, times in enumerate(left) if times])
        size = random_.randint(1, 6)
        times, left[at] = np.array(left[at][:size]), left[at][size:]
        starts = assign(times, table.window)
        late = late_mask(window_ends(starts, table.window), 7, clocks[at].observe(times))
        aggregators[at].add(pl.DataFrame({"at": times[~late]}), starts[~late])
        on_time.update(starts[~late].tolist())
        if not left[at]:
            clocks[at].end()
        for partial in aggregators[at].drain(at, len(sources), 1, clocks[at].watermark, False):
            for payload in partial.payloads:
                header, rows = decode_partial(payload)
                assert owner.table.apply(header, rows, task.watermark) == []
                task.update(header.source, header.watermark, header.idle)
        owner.commit(task.watermark)
    assert {_ms(row["window_start"]): row["n"] for row in owner.rows()} == on_time
    if all(sources):
        assert set(owner.table.windows.values()) <= {WindowState.FINAL}


# ---- closing, retention


def test_the_changed_rows_of_many_windows_that_close_at_once_are_looked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, looked_at = Owner(plan({"n": Agg("count")}, allowed_lateness_ms=1)), list[int]()
    owner.apply([one(10 * n, key) for n in range(300) for key in "ab"])
    owner.commit()
    owner.apply([one(10 * n, "b") for n in range(300)])
    window_starts = RowCache.window_starts
    monkeypatch.setattr(
        RowCache, "window_starts", lambda cache, ids: (looked_at.append(len(ids)), window_starts(cache, ids))[1]
    )
    owner.table.advance(2999, 2)
    assert looked_at == [300]
    owner.commit(2999)
    closed = WindowState.CLOSED
    assert Counter((row["s"], row["n"], row[STATE], row[EPOCH]) for row in owner.rows()) == {
        ("a", 1, WindowState.FINAL, 2): 299, ("b", 2, WindowState.FINAL, 2): 299, ("a", 1, closed, 2): 1,
        ("b", 2, closed, 2): 1,
    }  # fmt: skip


def test_windows_close_and_become_final_with_every_row_of_theirs() -> None:
    owner = Owner(plan({"n": Agg("count"), "u": Agg("count_distinct", "t")}, allowed_lateness_ms=5))
    owner.apply([one(1, "a", t="x"), one(1, "b", t="x"), one(11, "a")])
    owner.commit(8)
    assert {(row[STATE], row[EPOCH]) for row in owner.rows()} == {(WindowState.OPEN, 1)}
    owner.apply([one(2, "a")], 8)
    owner.commit(9)
    assert {(row["s"], row["n"], row[STATE], row[EPOCH]) for row in owner.rows()} == {
        ("a", 2, WindowState.CLOSED, 2), ("b", 1, WindowState.CLOSED, 2), ("a", 1, WindowState.OPEN, 1),
    }  # fmt: skip
    owner.apply([one(2, "c")], 9)
    owner.commit(9)
    states = {(row["s"], _ms(row["window_start"])): (row[STATE], row[EPOCH]) for row in owner.rows()}
    assert states == {
        ("a", 0): (WindowState.CLOSED, 2), ("b", 0): (WindowState.CLOSED, 2), ("c", 0): (WindowState.CLOSED, 3),
        ("a", 10): (WindowState.OPEN, 1),
    }  # fmt: skip
    owner.commit(14)
    assert owner.table.windows == {0: WindowState.FINAL, 10: WindowState.OPEN}
    assert {row[EPOCH] for row in owner.rows() if _ms(row["window_start"]) == 0} == {4}


def test_rows_leave_after_retention_and_only_when_every_sink_has_them() -> None:
    owner = Owner(plan(retain_ms=100))
    owner.apply([one(1, t="x"), one(11, t="y"), one(95)])
    owner.commit(50)
    assert owner.table.expire(108, owner.epoch) == 0
    assert owner.table.expire(109, owner.epoch - 1) == 0, "a sink is behind"
    assert owner.table.expire(109, owner.epoch) == 1
    assert {_ms(row["window_start"]) for row in owner.rows()} == {10, 90}
    assert len(owner.state.expired) == 2, "the row and its chunk"
    owner.commit(END_OF_TIME)
    assert owner.table.expire(END_OF_TIME, owner.epoch) == 0, "a bounded input's tables stay"
    owner.table.restore()
    assert owner.table.windows == {10: WindowState.FINAL, 90: WindowState.FINAL}


def test_a_window_that_became_final_in_this_epoch_does_not_leave_before_its_rows_are_written() -> None:
    owner = Owner(plan(retain_ms=5))
    owner.apply([one(1)])
    owner.commit()
    owner.apply([one(2), one(3, "new")])
    owner.table.advance(1000, 2)
    assert owner.table.expire(1000, 1) == 0
    owner.table.collect(2)
    assert owner.table.expire(1000, 1) == 0
    assert sorted((row["s"], row["n"], row[EPOCH]) for row in owner.rows()) == [("k", 2, 2), ("new", 1, 2)]
    assert owner.table.expire(1000, 2) == 1
    assert owner.rows() == []


def test_restore_finds_every_window_beside_large_ones() -> None:
    owner = Owner(plan({"n": Agg("count")}, keys={"i": pl.Int64()}, inputs={}))
    owner.apply([{"at": at, "i": i} for at in (1, 21, 41) for i in range(600 if at == 21 else 2)])
    owner.commit(10)
    restored = WindowTable(owner.plan, owner.state)
    restored.restore()
    assert restored.windows == owner.table.windows == {
        0: WindowState.FINAL, 20: WindowState.OPEN, 40: WindowState.OPEN,
    }  # fmt: skip


# ---- distinct values


def test_an_epoch_writes_only_what_is_new_of_a_set() -> None:
    owner = Owner(plan({"u": Agg("count_distinct", "t")}))
    owner.apply([one(1, t=text) for text in "abc"])
    owner.apply([one(1, t=text) for text in "bcd"])
    owner.commit()
    owner.apply([one(1, t=text) for text in "ade"])
    owner.commit()
    chunks = {key: value for key, value in sorted(owner.state.rows.items()) if not is_row(key)}
    assert [len(value) // 16 for value in chunks.values()] == [4, 1]
    assert [row["u"] for row in owner.rows()] == [5]


@pytest.mark.parametrize("bytes_max", [0, 400, 1 << 20])
def test_rows_of_the_last_epochs_are_read_from_the_state_only_if_they_were_too_many_to_keep(
    bytes_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windowtable, "TABLE_ROWS_CACHE_BYTES_MAX", bytes_max)
    owner, read = Owner(plan({"n": Agg("count")})), Counter[str]()
    get = owner.state.get
    monkeypatch.setattr(
        owner.state, "get", lambda key: (read.update([("new", "old")[key in owner.state.rows]]), get(key))[1]
    )
    for keys in ("ab", "abcdef", "a", "abcdef"):
        owner.apply([one(1, key) for key in keys])
        owner.commit()
        assert owner.table._cache.size_bytes <= bytes_max
    assert {row["s"]: row["n"] for row in owner.rows()} == {"a": 4, "b": 3, "c": 2, "d": 2, "e": 2, "f": 2}
    assert read == {0: {"new": 4, "old": 9}, 400: {"old": 6}, 1 << 20: {}}[bytes_max]


@pytest.mark.parametrize("names", [WHOLES, {**WHOLES, "f": Agg("sum", "f")}])
def test_rows_of_final_windows_leave_the_memory_and_the_others_are_not_read_again(
    names: dict[str, Agg], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, most = Owner(plan(names)), 0
    monkeypatch.setattr(owner.state, "get", lambda key: pytest.fail("A row was looked for in the state."))
    for at in range(0, 3000, 10):
        for _ in range(2):
            owner.apply(
                [one(at, str(n), f=0.1, i=n) for n in range(20)] + [one(100_000, str(n), i=1) for n in (at, at + 1)]
            )
            owner.commit(at)
        most = max(most, owner.table._cache.size_bytes)
    assert most < 3 * owner.table._cache.size_bytes
    assert len(owner.table._whole) == 2
    for row in owner.rows():
        ends = _ms(row["window_start"]) == 100_000
        assert (row["n"], row["sum_i"]) == ((2, 2) if ends else (2, 2 * int(row["s"])))


def test_texts_and_what_a_row_takes_in_memory_count_towards_the_epochs_bytes() -> None:
    owner = Owner(plan({"t": Agg("min", "t")}))
    owner.apply([one(1, str(n), t=str(n) * 1000) for n in range(100)])
    assert owner.table.size_bytes > 100 * (1900 + 64)
    owner.commit()
    assert owner.table.size_bytes == 0
    owner.apply([one(1, str(n), t="9") for n in range(100)])
    assert owner.table.size_bytes > 100 * (1900 + 64), "read from the state"
    owner.table.abort()
    assert owner.table.size_bytes == 0


def test_a_new_windows_rows_are_not_looked_for_in_the_state_and_an_old_ones_are() -> None:
    owner = Owner(plan({"n": Agg("count")}))
    owner.apply([one(1, "a")])
    owner.commit()
    owner.table.restore()
    owner.apply([one(1, "a"), one(1, "b"), one(11, "a")])
    owner.commit()
    assert sorted(row["n"] for row in owner.rows()) == [1, 1, 2]


def test_sets_that_do_not_fit_the_cache_are_read_back() -> None:
    owner = Owner(plan({"u": Agg("count_distinct", "i")}), cache_bytes_max=1)
    for start in range(0, 300, 100):
        owner.apply([one(1, key, i=i) for key in ("a", "b", "c") for i in range(start, start + 150)])
        owner.apply([one(1, key, i=i) for key in ("a", "b", "c") for i in range(start)])
        if start:
            owner.commit()
    assert {row["u"] for row in owner.rows()} == {350}
    assert owner.table.size_bytes == 0


# ---- reading


def test_results_have_fixed_types_also_without_rows() -> None:
    table = plan(post=(Filter(pl.col("n") > 1, "x"), WithColumns({"share": pl.col("n_f") / pl.col("n")}, "x")))
    keys, columns = result_shape(table)
    empty = TableRows(table).results([])
    owner = Owner(table)
    owner.apply([one(1), one(1, "z", f=1.0), one(2, "z")])
    owner.commit()
    filled = owner.table.results(owner.state.rows.items())
    assert empty.schema == filled.schema
    moment = pl.Datetime("ms", "UTC")
    assert dict(filled.schema) == {
        **keys, "window_start": moment, "window_end": moment, **columns,
        STATE: pl.UInt8(), EPOCH: pl.Int64(), VISIBLE: pl.Boolean(),
    }  # fmt: skip
    assert columns["share"] == pl.Float64()
    assert {row["s"]: (row[VISIBLE], row["share"]) for row in filled.to_dicts()} == {
        "k": (False, 0.0),
        "z": (True, 0.5),
    }


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (pl.Boolean(), [True, False]),
        (pl.UInt8(), [0, 255]),
        (pl.Int32(), [-(1 << 31), 5]),
        (pl.UInt64(), [0, (1 << 64) - 1]),
        (pl.Float32(), [-1.5, 2.25]),
        (pl.Time(), [time(1), time(2, 3)]),
        (pl.Datetime("us", "UTC"), [datetime(1960, 1, 1, tzinfo=UTC), datetime(2020, 1, 1, 0, 0, 0, 7, tzinfo=UTC)]),
        (pl.Duration("ms"), [timedelta(-1), timedelta(1)]),
        (pl.String(), ["", "ä"]),
    ],
)
def test_extremes_of_every_type_come_back_in_their_type(dtype: pl.DataType, values: list[Any]) -> None:
    aggs = {"least": Agg("min", "x"), "most": Agg("max", "x"), "u": Agg("count_distinct", "x")}
    owner = Owner(plan(aggs, keys={}, inputs={"x": dtype}))
    owner.apply([{"at": 1, "x": value} for value in (*values, None, *values)])
    owner.commit()
    found = owner.table.results(owner.state.rows.items())
    assert found["least"].dtype == found["most"].dtype == dtype
    assert found.select("least", "most", "u").rows() == [(min(values), max(values), 2)]


def test_booleans_and_small_integers_are_summed_as_int64() -> None:
    inputs = {"b": pl.Boolean(), "i": pl.UInt8(), "u": pl.UInt64()}
    owner = Owner(plan({name: Agg("sum", name) for name in inputs} | {"m": Agg("mean", "b")}, keys={}, inputs=inputs))
    owner.apply([{"at": 1, "b": True, "i": 255, "u": 1 << 62}] * 2 + [{"at": 1, "b": False, "i": None, "u": None}])
    owner.commit()
    with pytest.raises(UserError, match="u of"):
        owner.rows()
    owner = Owner(plan({name: Agg("sum", name) for name in inputs} | {"m": Agg("mean", "b")}, keys={}, inputs=inputs))
    owner.apply([{"at": 1, "b": True, "i": 255, "u": 1 << 61}] * 2 + [{"at": 1, "b": False, "i": None, "u": None}])
    owner.commit()
    (row,) = owner.rows()
    assert (row["b"], row["i"], row["u"], row["m"]) == (2, 510, 1 << 62, 2 / 3)


def test_row_is_found_by_its_window_and_key() -> None:
    owner = Owner(plan({"n": Agg("count")}, keys={"d": pl.Date()}, inputs={}))
    owner.apply([{"at": -5, "d": date(2020, 1, 2)}])
    owner.commit()
    key = owner.table.row_key(-10, [date(2020, 1, 2)])
    assert owner.table.results([(key, owner.state.rows[key])])["n"].to_list() == [1]
    assert owner.table.rows.split_key(key) == (-10, (date(2020, 1, 2),))
    assert owner.rows()[0]["window_start"] == datetime.fromtimestamp(-0.01, UTC)


def test_sum_beyond_int64_is_an_error_that_names_the_key_only_when_it_is_the_result() -> None:
    owner = Owner(plan({"total": Agg("sum", "i")}))
    top = (1 << 63) - 1
    owner.apply([one(1, "bad", i=top), one(1, "bad", i=top), one(1, "good", i=top), one(1, "good", i=top)])
    owner.apply([one(1, "good", i=-top)])
    owner.commit()
    with pytest.raises(
        UserError, match=r"'t': total of \('bad', None\) in the window from 0 ms is 18446744073709551614"
    ):
        owner.rows()
    owner.apply([one(2, "bad", i=-top)])
    owner.commit()
    assert {row["total"] for row in owner.rows()} == {top}


def test_row_layout_comes_back_and_is_fixed_for_ever() -> None:
    layout = RowLayout(plan({"n": Agg("count"), "f": Agg("mean", "f"), "m": Agg("max", "i"), "t": Agg("min", "t")}))
    row = Row(WindowState.CLOSED, 7, [3, (2, 0, 3 << 1073), -1, "é"])
    value = layout.encode(row)
    assert value.hex() == (
        "01" "01" "0000000000000007" "0000000000000003" "0000000000000002" "00" "0431" "0001"
        "01" "ffffffffffffffff" "01" "00000002" "03" "c3a9"
    )  # fmt: skip
    assert layout.decode(value) == row
    assert layout.stamp(layout.restamp(value, WindowState.FINAL, 9)) == (WindowState.FINAL, 9)


# ---- rows as columns against rows one by one

RECORDS = st.fixed_dictionaries(
    {
        "at": st.sampled_from([1, 2, 11]),
        "s": st.sampled_from(["a", "b", None, "a longer text than eight bytes", "a longer text than eight bytes!"]),
        "b": st.booleans(),
        "i": st.none() | st.integers(-(1 << 63), (1 << 63) - 1),
        "f": st.none() | st.floats(),
        "d": st.none() | st.dates(date(1, 1, 1), date(9999, 1, 1)),
        "t": st.none() | st.text(max_size=3),
        "u": st.none() | st.integers(0, (1 << 64) - 1),
    }
)


@settings(max_examples=40, deadline=None)
@given(epochs=st.lists(st.lists(RECORDS, max_size=8), min_size=1, max_size=3), names=st.sampled_from([WHOLES, AGGS]))
def test_rows_merged_as_columns_are_those_that_cells_merge_one_by_one(
    epochs: list[list[dict[str, Any]]], names: dict[str, Agg]
) -> None:
    table = plan({name: agg for name, agg in names.items() if agg.kind != "count_distinct"})
    owner, layout = Owner(table), RowLayout(table)
    wanted: dict[bytes, list[Any]] = {}
    for number, records in enumerate(epochs, 1):
        touched: set[bytes] = set()
        for payload in owner.payload(records):
            _, rows = decode_partial(payload)
            at = 2
            keys = [
                windowtable.window_prefix(s) + k for s, k in zip(rows.integers(0).tolist(), rows.blobs(1), strict=True)
            ]
            touched.update(keys)
            for cell_number, cell in enumerate(layout.cells):
                for key, theirs in zip(keys, cell.load(rows, at), strict=True):
                    values = wanted.setdefault(key, [cell.empty for cell in layout.cells])
                    values[cell_number] = cell.merge(values[cell_number], theirs)
                at += cell.width
            owner.table.apply(*decode_partial(payload), NO_WATERMARK)
        owner.commit()
        for key in touched:
            assert owner.state.rows[key] == layout.encode(Row(WindowState.OPEN, number, wanted[key]))
    assert {key: layout.decode(value).values for key, value in owner.state.rows.items()} == wanted
