"""Aggregates: what may be declared, each kernel against its plain-Python twin, and what a partial carries."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from datetime import UTC, date, datetime, time
from fractions import Fraction
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.avro.recordbatch import spans
from streamproc.core import limits
from streamproc.core.errors import InvariantBroken, UserError
from streamproc.core.hash128 import hash_value_python
from streamproc.core.partitioner import partition_of
from streamproc.core.types import NO_WATERMARK
from streamproc.eventtime.spec import Tumbling
from streamproc.operators import aggregates, kernels
from streamproc.operators.accumulate import PartialAggregator
from streamproc.operators.accumulators import ordered_from, to_ordered
from streamproc.operators.aggregates import check_plan, result_columns, result_dtype
from streamproc.operators.bytecolumns import byte_order, cut, gather
from streamproc.operators.contract import Partial, PartialHeader
from streamproc.operators.groupkeys import decode_group_key, encode_group_key, encode_group_keys
from streamproc.operators.groups import GroupIndex
from streamproc.operators.partials import PartialRows, decode_partial, encode_partial
from streamproc.operators.plan import Agg, TablePlan
from streamproc.runtime.warm import warm_up

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
FLOATS = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.1, -0.1, 1e308, -1e308, 5e-324, -0.0])
GIDS = st.integers(1, 4)


def table(aggs: dict[str, Agg], inputs: dict[str, Any], keys: dict[str, Any] | None = None, **more: Any) -> TablePlan:
    settings_ = {"partitions": 3, **more}
    return TablePlan(
        "t", keys or {}, Tumbling(10), 0, 0, aggs, inputs, (), settings_["partitions"], "late", "agents/my.py:7"
    )


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """Compiling is no part of the time that one example may take."""
    warm_up(pipelines=True)


# ---- what may be declared


def test_results_have_the_types_of_the_documentation() -> None:
    inputs = {"i": pl.Int32(), "f": pl.Float32(), "b": pl.Boolean(), "s": pl.String(), "d": pl.Date()}
    plan = table(
        {
            "n": aggregates.count(),
            "m": aggregates.count("s"),
            "si": aggregates.sum("i"),
            "sb": aggregates.sum("b"),
            "sf": aggregates.sum("f"),
            "mi": aggregates.mean("i"),
            "least": aggregates.min("d"),
            "most": aggregates.max("s"),
            "u": aggregates.count_distinct("s"),
        },
        inputs,
    )
    assert list(result_columns(plan).values()) == [
        pl.Int64(), pl.Int64(), pl.Int64(), pl.Int64(), pl.Float64(), pl.Float64(), pl.Date(), pl.String(), pl.Int64(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("agg", "dtype"),
    [
        (aggregates.sum("x"), pl.String()),
        (aggregates.sum("x"), pl.Date()),
        (aggregates.mean("x"), pl.Datetime("ms")),
        (aggregates.min("x"), pl.List(pl.Int64())),
        (aggregates.max("x"), pl.Binary()),
        (aggregates.sum("x"), pl.Int128()),
        (aggregates.count_distinct("x"), pl.Struct({"a": pl.Int64()})),
    ],
)
def test_impossible_aggregate_names_column_type_place_and_remedy(agg: Agg, dtype: pl.DataType) -> None:
    with pytest.raises(UserError) as error:
        check_plan(table({"a": agg}, {"x": dtype}))
    assert "'x'" in str(error.value)
    assert str(dtype) in str(error.value)
    assert "agents/my.py:7" in str(error.value)
    assert error.value.remedy


def test_aggregate_of_a_column_that_is_not_there_lists_the_columns() -> None:
    with pytest.raises(UserError, match="The columns here are: x"):
        result_dtype(aggregates.sum("y"), {"x": pl.Int64()})


def test_floats_cannot_be_group_keys() -> None:
    with pytest.raises(UserError, match="group_by"):
        check_plan(table({"n": aggregates.count()}, {}, {"k": pl.Float64()}))


# ---- kernels and their twins


@given(st.lists(st.binary(max_size=13)), st.integers(1, 9))
def test_partitions_of_is_partition_of(keys: list[bytes], partitions: int) -> None:
    out = np.empty(len(keys), np.int64)
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    kernels.partitions_of(np.frombuffer(b"".join(keys), np.uint8), ends, partitions, out)
    assert out.tolist() == [partition_of(key, partitions) for key in keys]


@given(st.lists(st.tuples(GIDS, INT64)), st.booleans())
def test_add_wide_sums_as_python_integers_do(rows: list[tuple[int, int]], unsigned: bool) -> None:
    high, low = np.zeros(5, np.int64), np.zeros(5, np.uint64)
    gids, values = _columns(rows)
    kernels.add_wide(gids, values, unsigned, high, low)
    expected: Counter[int] = Counter()
    for gid, value in rows:
        expected[gid] += value % (1 << 64) if unsigned else value
    assert [(int(high[gid]) << 64) + int(low[gid]) for gid in range(5)] == [expected[gid] for gid in range(5)]


@given(st.lists(st.tuples(GIDS, FLOATS)))
def test_limbs_hold_the_exact_sum(rows: list[tuple[int, float]]) -> None:
    limbs, special = np.zeros((5, 67), np.int64), np.zeros(5, np.int64)
    bits = np.array([value for _, value in rows], np.float64).view(np.uint64)
    kernels.add_limbs(np.array([gid for gid, _ in rows], np.int64), bits, 0, limbs, special)
    exact = [sum(int(word) << (32 * j) for j, word in enumerate(row)) for row in limbs]
    for _ in range(2):
        words = np.zeros((5, 68), np.uint32)
        kernels.write_limbs(limbs, np.arange(5), words)
        assert [int.from_bytes(row.tobytes(), "little", signed=True) for row in words] == exact
        kernels.carry_limbs(limbs)
    expected = [
        sum((Fraction(value) for group, value in rows if group == gid and math.isfinite(value)), Fraction())
        for gid in range(5)
    ]
    assert [Fraction(total, 1 << 1074) for total in exact] == expected
    assert ((limbs[:, :-1] >= 0) & (limbs[:, :-1] < 1 << 32)).all()
    for gid, value in rows:
        if not math.isfinite(value):
            flag = kernels.NAN if math.isnan(value) else kernels.INFINITE if value > 0 else kernels.NEGATIVE_INFINITE
            assert special[gid] & flag


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_limb_range_covers_every_word_that_is_touched(values: list[float]) -> None:
    bits = np.array(values).view(np.uint64)
    lowest, highest = kernels.limb_range(bits)
    limbs = np.zeros((1, 67), np.int64)
    kernels.add_limbs(np.zeros(len(values), np.int64), bits, 0, limbs, np.zeros(1, np.int64))
    touched = np.flatnonzero(limbs[0]).tolist()
    assert all(lowest <= word <= highest for word in touched)


@given(st.lists(st.tuples(GIDS, INT64)), st.booleans())
def test_extremes_are_those_of_python(rows: list[tuple[int, int]], greatest: bool) -> None:
    counts, best = np.zeros(5, np.int64), np.zeros(5, np.int64)
    (kernels.keep_greatest if greatest else kernels.keep_least)(*_columns(rows), counts, best)
    for gid in range(5):
        values = [value for group, value in rows if group == gid]
        assert counts[gid] == len(values)
        assert best[gid] == (max if greatest else min)(values, default=0)


@given(st.lists(st.lists(st.tuples(GIDS, st.integers(0, 3), st.integers(0, 3)), max_size=12), max_size=3))
def test_insert_ids_is_a_set(batches: list[list[tuple[int, int, int]]]) -> None:
    slots, entries, used = np.zeros(128, np.int64), np.zeros((65, 3), np.uint64), 0
    for rows in batches:
        gids, hi, lo = (np.array([row[at] for row in rows], np.int64) for at in range(3))
        used = kernels.insert_ids(slots, entries, used, gids, hi.astype(np.uint64), lo.astype(np.uint64))
    held = [tuple(row) for row in entries[1 : used + 1].tolist()]
    assert held == list(dict.fromkeys(row for rows in batches for row in rows))


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(2, 6)), max_size=12), max_size=3))
def test_insert_hashes_tells_what_is_new(batches: list[list[tuple[int, int]]]) -> None:
    slots, seen = np.zeros((64, 2), np.uint64), set()
    for rows in batches:
        fresh = np.empty(len(rows), np.bool_)
        added = kernels.insert_hashes(slots, np.array(rows, np.uint64).reshape(-1, 2), fresh)
        expected = []
        for row in rows:
            expected.append(row not in seen)
            seen.add(row)
        assert fresh.tolist() == expected
        assert added == sum(expected)


def test_the_hash_that_is_zero_counts_once() -> None:
    slots, fresh = np.zeros((8, 2), np.uint64), np.empty(2, np.bool_)
    assert kernels.insert_hashes(slots, np.zeros((2, 2), np.uint64), fresh) == 1
    assert fresh.tolist() == [True, False]


@given(st.lists(FLOATS, min_size=1))
def test_floats_order_by_total_order_with_one_nan_above_all(values: list[float]) -> None:
    ordered = to_ordered(pl.Series(values, dtype=pl.Float64)).tolist()
    back = [ordered_from(value, pl.Float64()) for value in ordered]
    assert [str(value) for value in back] == [str(abs(v)) if math.isnan(v) else str(v) for v in values]
    by_definition = sorted(values, key=lambda v: (math.isnan(v), 0.0 if math.isnan(v) else v, math.copysign(1, v)))
    assert [str(ordered_from(value, pl.Float64())) for value in sorted(ordered)] == [
        "nan" if math.isnan(v) else str(v) for v in by_definition
    ]


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1))
def test_uint64_orders_and_comes_back(values: list[int]) -> None:
    ordered = to_ordered(pl.Series(values, dtype=pl.UInt64)).tolist()
    assert [ordered_from(value, pl.UInt64()) for value in sorted(ordered)] == sorted(values)


# ---- groups

KEYED = st.lists(
    st.tuples(st.sampled_from([None, "", "a", "b", "ä"]), st.sampled_from([None, 0, 1]), st.integers(0, 2))
)


@pytest.mark.parametrize("hashes", ["polars", "all collide", "some collide"])
@given(batches=st.lists(KEYED, max_size=4))
@settings(max_examples=40)
def test_groups_are_exact_and_null_safe_whatever_the_hash_does(
    hashes: str, batches: list[list[tuple[str | None, int | None, int]]]
) -> None:
    def hasher(keyed: pl.DataFrame) -> pl.Series:
        if hashes == "polars":
            return keyed.hash_rows()
        few = keyed.get_column("i").fill_null(7).cast(pl.UInt64)
        return few if hashes == "some collide" else few * 0

    index = GroupIndex({"s": pl.String(), "i": pl.Int64()}, hasher)
    twin: dict[tuple[str | None, int | None, int], int] = {}
    for rows in batches:
        frame = pl.DataFrame(
            {"s": [row[0] for row in rows], "i": [row[1] for row in rows]}, schema={"s": pl.String, "i": pl.Int64}
        )
        gids = index.of(frame, np.array([row[2] for row in rows], np.int64))
        assert gids.tolist() == [twin.setdefault(row, len(twin) + 1) for row in rows]
    assert [(*key, start) for key, start in zip(index.keys.rows(), index.window_starts.tolist(), strict=True)] == [
        *twin
    ]
    index.clear()
    assert len(index) == 0


def test_group_index_keeps_its_numbers_when_it_grows() -> None:
    index = GroupIndex({"i": pl.Int64()})
    for start in range(0, 3000, 500):
        values = np.arange(start, start + 500)
        assert index.of(pl.DataFrame({"i": values}), np.zeros(500, np.int64)).tolist() == (values + 1).tolist()
    assert index.of(pl.DataFrame({"i": [0, 2999]}), np.zeros(2, np.int64)).tolist() == [1, 3000]


# ---- group keys as bytes

KEYS = {
    "s": pl.String(),
    "i": pl.Int64(),
    "b": pl.Boolean(),
    "d": pl.Date(),
    "t": pl.Datetime("us", "UTC"),
    "h": pl.Time(),
}


@given(
    st.tuples(
        st.none() | st.text(),
        st.none() | INT64,
        st.none() | st.booleans(),
        st.none() | st.dates(),
        st.none() | st.datetimes(timezones=st.just(UTC)),
        st.none() | st.times(),
    )
)
def test_group_keys_come_back(values: tuple[Any, ...]) -> None:
    assert decode_group_key(encode_group_key(values, KEYS), KEYS) == values


def test_group_key_bytes_are_fixed_for_ever() -> None:
    values = ("a", -1, None, date(1970, 1, 2), datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), time(0, 0, 1))
    assert encode_group_key(values, KEYS).hex() == "96a161ffc001ce000f4240ce3b9aca00"


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.none() | st.text(max_size=40) | st.sampled_from(["x" * n for n in (31, 32, 255, 256, 65535, 65536)]),
            st.none()
            | INT64
            | st.sampled_from([s * (1 << n) + d for n in range(63) for d in (-1, 0, 1) for s in (-1, 1)]),
            st.none() | st.integers(0, (1 << 64) - 1),
            st.none() | st.booleans(),
            st.none() | st.dates(),
        ),
        max_size=8,
    ),
    width=st.integers(1, 5),
)
def test_group_keys_of_many_rows_are_those_of_each(rows: list[tuple[Any, ...]], width: int) -> None:
    keys = dict(zip("tiubd", (pl.String(), pl.Int64(), pl.UInt64(), pl.Boolean(), pl.Date()), strict=True))
    keys = dict(list(keys.items())[:width])
    frame = pl.DataFrame([row[:width] for row in rows], schema=keys, orient="row")
    assert cut(encode_group_keys(frame, len(rows))) == [encode_group_key(row[:width], keys) for row in rows]


def test_a_table_without_group_keys_has_one_key_and_one_with_many_has_a_longer_head() -> None:
    assert cut(encode_group_keys(pl.DataFrame(), 2)) == [encode_group_key([], {})] * 2
    many = {str(n): pl.Int64() for n in range(20)}
    frame = pl.DataFrame({name: [n] for n, name in enumerate(many)})
    assert cut(encode_group_keys(frame, 1)) == [encode_group_key(range(20), many)]


@given(st.lists(st.binary(max_size=20) | st.sampled_from([b"", b"\0", b"\0\0", b"a" * 8, b"a" * 8 + b"\0", b"a" * 9])))
def test_byte_strings_are_ordered_gathered_and_cut_as_bytes_are(values: list[bytes]) -> None:
    column = spans(values)
    order = byte_order(column)
    assert [values[at] for at in order.tolist()] == sorted(values)
    assert cut(gather(column, order)) == sorted(values)


def test_one_long_byte_string_among_many_takes_no_array_for_each_of_its_words() -> None:
    values = [b"%d" % number for number in range(2_000)] + [b"1" * 100_000]
    tracemalloc.start()
    order = byte_order(spans(values))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [values[at] for at in order.tolist()] == sorted(values)
    assert peak < 5_000_000


# ---- partials


def test_partials_go_to_the_partition_of_their_key_and_carry_the_watermark_to_all() -> None:
    plan = table({"n": aggregates.count()}, {}, {"k": pl.String()})
    aggregator = PartialAggregator(plan)
    words = [f"k{i}" for i in range(20)] + [None]
    aggregator.add(pl.DataFrame({"k": words}), np.zeros(21, np.int64))
    partials = aggregator.drain(1, 4, 9, 77, False)
    assert [partial.destination for partial in partials] == [0, 1, 2]
    seen = []
    for partial in partials:
        (header, rows) = decode_partial(partial.payloads[0])
        assert header == PartialHeader(1, "t", 1, 4, 9, 0, 1, 77, False)
        for key in rows.blobs(1):
            assert partition_of(key, 3) == partial.destination
            seen += decode_group_key(key, plan.keys)
    assert sorted(seen, key=str) == sorted(words, key=str)


def test_drain_ships_only_what_is_new() -> None:
    plan = table({"n": aggregates.count()}, {}, {"k": pl.String()})
    aggregator = PartialAggregator(plan)
    assert len(aggregator.drain(0, 1, 1, NO_WATERMARK, False)) == 3, "nothing is known of what was shipped"
    assert aggregator.drain(0, 1, 2, NO_WATERMARK, False) == []
    aggregator.add(pl.DataFrame({"k": ["a"]}), np.zeros(1, np.int64))
    assert aggregator.size_bytes > 0
    home = partition_of(encode_group_key(["a"], plan.keys), 3)
    assert [partial.destination for partial in aggregator.drain(0, 1, 3, NO_WATERMARK, False)] == [home]
    assert aggregator.size_bytes == 0
    assert len(aggregator.drain(0, 1, 4, NO_WATERMARK, True)) == 3
    aggregator.add(pl.DataFrame({"k": ["a"]}), np.zeros(1, np.int64))
    aggregator.drop()
    partials = aggregator.drain(0, 1, 4, NO_WATERMARK, True)
    assert [len(decode_partial(partial.payloads[0])[1]) for partial in partials] == [0, 0, 0]


def test_large_epochs_are_split_and_no_part_is_beyond_the_limit() -> None:
    plan = table(
        {"n": aggregates.count(), "u": aggregates.count_distinct("u"), "v": aggregates.count_distinct("v")},
        {"u": pl.Int64(), "v": pl.Int64()},
        {"k": pl.Int64()},
        partitions=1,
    )
    aggregator = PartialAggregator(plan)
    size = 60_000
    keys = np.where(np.arange(size) < 50_000, 0, np.arange(size))
    aggregator.add(pl.DataFrame({"k": keys, "u": np.arange(size), "v": np.arange(size) % 7}), np.zeros(size, np.int64))
    (partial,) = aggregator.drain(0, 1, 1, 5, False)
    assert all(len(payload) <= limits.INTERNAL_BATCH_BYTES_MAX for payload in partial.payloads)
    decoded = [decode_partial(payload) for payload in partial.payloads]
    assert [header.part for header, _ in decoded] == list(range(len(decoded)))
    assert {header.parts for header, _ in decoded} == {len(decoded)}
    assert len(decoded) > 2
    assert sum(int(rows.integers(2).sum()) for _, rows in decoded) == size, "a row that was split counts once"
    hashes = {blob[at : at + 16] for _, rows in decoded for blob in rows.blobs(3) for at in range(0, len(blob), 16)}
    assert len(hashes) == size


def test_distinct_uses_the_decoders_hashes_when_it_has_them() -> None:
    plan = table({"u": aggregates.count_distinct("u"), "n": aggregates.count("u")}, {"u": pl.String()}, partitions=1)
    by_value, by_hash = PartialAggregator(plan), PartialAggregator(plan)
    words = ["a", None, "b", "a"]
    pairs = [(None, None) if word is None else hash_value_python(word) for word in words]
    hashed = {"__hi:u": [hi for hi, _ in pairs], "__lo:u": [lo for _, lo in pairs]}
    by_value.add(pl.DataFrame({"u": words}), np.zeros(4, np.int64))
    by_hash.add(pl.DataFrame(hashed, schema=dict.fromkeys(hashed, pl.UInt64)), np.zeros(4, np.int64))
    drained: list[list[Partial]] = [one.drain(0, 1, 1, 0, False) for one in (by_value, by_hash)]
    assert drained[0] == drained[1]


def test_a_partial_that_is_cut_short_or_of_another_format_is_refused() -> None:
    payload = encode_partial(PartialHeader(1, "t", 0, 1, 1, 0, 1, 0, False), 0, [])
    assert decode_partial(payload)[1] == PartialRows(0, [])
    with pytest.raises(InvariantBroken):
        decode_partial(payload + b"x")
    with pytest.raises(InvariantBroken):
        decode_partial(encode_partial(PartialHeader(2, "t", 0, 1, 1, 0, 1, 0, False), 0, []))


def _columns(rows: list[tuple[int, int]]) -> tuple[Any, Any]:
    return np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows], np.int64)
