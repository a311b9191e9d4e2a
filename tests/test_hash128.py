"""One value, one hash: compiled and plain, from bytes, lists and Polars columns alike."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.core.hash128 import (
    Hashes,
    combine,
    combine_python,
    hash_bytes_python,
    hash_float64,
    hash_int64,
    hash_series,
    hash_spans,
    hash_texts,
    hash_value_python,
)

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def pairs(hashes: Hashes) -> list[tuple[int, int]]:
    return list(zip(hashes[0].tolist(), hashes[1].tolist(), strict=True))


def test_agrees_with_published_murmur3_vectors() -> None:
    assert hash_bytes_python(b"") == (0, 0)
    # x64 128 of Guava's and Wikipedia's favourite sentence, seed 0.
    fox = b"The quick brown fox jumps over the lazy dog"
    assert hash_bytes_python(fox) == (0xE34BBC7BBC071B6C, 0x7A433CA9C49A9347)
    assert hash_bytes_python(b"hello") == (0xCBD8A7B341BD9B02, 0x5B1E906A48AE1D19)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=70), min_size=1, max_size=8))
def test_compiled_bytes_hash_equals_plain_twin(values: list[bytes]) -> None:
    buffer = np.frombuffer(b"".join(values) + b"!", np.uint8)[:-1]
    lengths = np.array([len(v) for v in values], np.int64)
    starts = np.cumsum(lengths) - lengths
    assert pairs(hash_spans(buffer, starts, lengths)) == [hash_bytes_python(v) for v in values]


@settings(deadline=None)
@given(st.lists(INT64), st.lists(st.floats()), st.lists(st.none() | st.text(max_size=20)))
def test_column_helpers_equal_plain_twin(ints: list[int], floats: list[float], texts: list[str | None]) -> None:
    assert pairs(hash_int64(np.array(ints, np.int64))) == [hash_value_python(v) for v in ints]
    assert pairs(hash_float64(np.array(floats, np.float64))) == [hash_value_python(v) for v in floats]
    assert pairs(hash_texts(texts)) == [hash_value_python(v) for v in texts]
    assert pairs(hash_series(pl.Series(ints, dtype=pl.Int64))) == [hash_value_python(v) for v in ints]
    assert pairs(hash_series(pl.Series(floats, dtype=pl.Float64))) == [hash_value_python(v) for v in floats]


@settings(deadline=None)
@given(st.lists(st.tuples(INT64, st.text(max_size=9), st.booleans()), min_size=1, max_size=20))
def test_combined_hash_equals_plain_twin(rows: list[tuple[int, str, bool]]) -> None:
    columns = [hash_series(pl.Series([row[i] for row in rows])) for i in range(3)]
    plain = [combine_python([hash_value_python(v) for v in row]) for row in rows]
    assert pairs(combine(columns)) == plain


def test_combined_hash_depends_on_the_order_of_the_columns() -> None:
    a, b = hash_texts(["a"]), hash_texts(["b"])
    assert pairs(combine([a, b])) != pairs(combine([b, a]))


def test_nulls_hash_to_zero_in_every_type() -> None:
    for series in (
        pl.Series([None, 1]),
        pl.Series([None, "a"]),
        pl.Series([None, 1.5]),
        pl.Series([None, True]),
        pl.Series([None, b"x"]),
        pl.Series([None, date(2020, 1, 1)]),
    ):
        first, second = pairs(hash_series(series))
        assert first == (0, 0)
        assert second != (0, 0)


def test_times_hash_as_their_integer_and_booleans_as_zero_and_one() -> None:
    moment = datetime(2020, 1, 1, tzinfo=UTC)
    series = pl.Series([moment], dtype=pl.Datetime("ms", "UTC"))
    assert pairs(hash_series(series)) == [hash_value_python(1_577_836_800_000)]
    assert pairs(hash_series(pl.Series([date(1970, 1, 3)]))) == [hash_value_python(2)]
    assert pairs(hash_series(pl.Series([True, False]))) == [hash_value_python(1), hash_value_python(0)]


def test_narrow_integers_and_floats_hash_as_wide_ones() -> None:
    assert pairs(hash_series(pl.Series([-3], dtype=pl.Int8))) == [hash_value_python(-3)]
    assert pairs(hash_series(pl.Series([1 << 63], dtype=pl.UInt64))) == [hash_value_python(1 << 63)]
    assert pairs(hash_series(pl.Series([0.5], dtype=pl.Float32))) == [hash_value_python(0.5)]


def test_negative_zero_and_nan_payloads_are_one_value() -> None:
    odd_nan = np.array([0x7FF8000000000001], np.uint64).view(np.float64)[0]
    values = np.array([0.0, -0.0, math.nan, odd_nan])
    zero, minus_zero, nan, other_nan = pairs(hash_float64(values))
    assert zero == minus_zero
    assert nan == other_nan == hash_value_python(math.nan)
