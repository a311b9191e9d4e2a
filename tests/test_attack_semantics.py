"""Attacks on what a result means: an input, a cut or a declaration that once gave a wrong number, one test each."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import polars as pl
import pytest

from streamproc.avro.columns import columns_of
from streamproc.avro.decode import Decoder, Use, hash_names
from streamproc.avro.encode import Encoder
from streamproc.avro.schema import Schema, parse_schema
from streamproc.core import limits
from streamproc.core.errors import UserError
from streamproc.core.hash128 import hash_series
from streamproc.core.types import NO_WATERMARK
from streamproc.operators import aggregates as agg
from streamproc.operators.expressions import check, evaluate
from streamproc.operators.partials import decode_partial
from streamproc.operators.pipeline import Declaration, Pipeline, event_time, tumbling
from streamproc.operators.windowtable import WindowTable
from streamproc.state.memory import MemoryStore
from streamproc.state.overlay import Overlay
from tests.test_source_program import HOUR, START, Record, Run, batch_of, compiled, order, pipeline, reasons

COLUMNS: dict[str, pl.DataType] = {
    "n": pl.Int64(),
    "x": pl.Float64(),
    "y": pl.Float64(),
    "text": pl.String(),
    "raw": pl.Binary(),
    "price": pl.Decimal(10, 2),
    "many": pl.List(pl.Int64()),
    "took": pl.Duration("ms"),
}
n, x, y, text, raw, price, many, took = (pl.col(name) for name in COLUMNS)
HIGH = (1 << 63) - 1
YEAR_1, YEAR_9999_END = -62_135_596_800_000, 253_402_300_799_999


def value_of(expr: pl.Expr, **values: list[Any]) -> tuple[list[Any], list[bool]]:
    """The values of an accepted expression, and which rows are set aside."""
    frame = pl.DataFrame(values, schema={name: COLUMNS[name] for name in values}, strict=False)
    (value,) = evaluate(frame, [check(expr, COLUMNS, what="filter", where=None)])
    aside = np.zeros(frame.height, np.bool_)
    for mask in (value.failed, value.overflow):
        aside |= False if mask is None else mask
    return value.value.to_list(), aside.tolist()


# --- expressions ------------------------------------------------------------------------------------------------------


def test_decimals_keep_their_fractions_and_are_no_overflow() -> None:
    """The exact sum was computed in whole numbers, so that any fraction passed for an overflow."""
    fractions = [Decimal("1.50"), Decimal("2.25"), None]
    assert value_of(price * 2, price=fractions) == ([Decimal("3.00"), Decimal("4.50"), None], [False] * 3)
    assert value_of(price + price > 3, price=fractions) == ([False, True, None], [False] * 3)


def test_bytes_are_joined_not_set_aside() -> None:
    assert value_of(raw + raw, raw=[b"a", b"", None]) == ([b"aa", b"", None], [False] * 3)


@pytest.mark.parametrize("expr", [many + 1, many + many, many * many, many / 2, (many - 1).list.get(0)], ids=str)
def test_arithmetic_on_lists_is_refused_before_the_first_record(expr: pl.Expr) -> None:
    """It wraps inside the list; the guard failed on every record instead."""
    with pytest.raises(UserError, match="arithmetic on List"):
        check(expr, COLUMNS, what="filter", where=None)


def test_a_sum_of_a_list_that_overflows_is_set_aside() -> None:
    lists = [[1, None, 2], [HIGH, 1], [HIGH, 1, -5], [], None]
    values, aside = value_of(many.list.sum(), many=lists)
    assert aside == [False, True, False, False, False]
    assert [values[at] for at in (0, 2, 3, 4)] == [3, HIGH - 4, 0, None]


def test_a_mean_across_columns_that_overflows_is_set_aside() -> None:
    values, aside = value_of(pl.mean_horizontal(n, n + 0), n=[HIGH, 3, None])
    assert aside == [True, False, False]
    assert values[1:] == [3.0, None]


def test_parts_of_a_duration_that_overflow_are_set_aside() -> None:
    durations = [timedelta(seconds=-1), timedelta(days=200_000_000), None]
    assert value_of(took.dt.total_nanoseconds(), took=durations)[1] == [False, True, False]
    assert value_of(took.dt.total_microseconds(), took=durations)[1] == [False, True, False]
    assert value_of(took.dt.total_milliseconds(), took=durations)[1] == [False] * 3


@pytest.mark.parametrize("dtype", [pl.Date, pl.Datetime, pl.Time], ids=str)
def test_a_cast_from_text_to_a_time_is_refused_before_the_first_record(dtype: Any) -> None:
    """Polars takes it in a plan, then fails on every value: the whole topic became dead letters."""
    with pytest.raises(UserError, match="Give the format"):
        check(text.cast(dtype, strict=False).is_not_null(), COLUMNS, what="filter", where=None)


def test_a_record_alone_in_its_batch_has_the_value_it_has_in_company() -> None:
    """Polars takes a column of one row for a constant: 1.1 ** 3.0 was computed in another way, and rounded otherwise."""
    rng = np.random.default_rng(1)
    bases, exponents = rng.random(300) * 100, rng.choice([2.0, 3.0, 0.5, -1.0, 5.0], 300)
    frame = pl.DataFrame({"x": bases, "y": exponents})
    checked = check(x**y, COLUMNS, what="filter", where=None)
    (whole,) = evaluate(frame, [checked])
    alone = [evaluate(frame[row : row + 1], [checked])[0].value[0] for row in range(frame.height)]
    assert whole.value.to_list() == alone


def test_a_row_read_alone_has_the_derived_value_it_has_among_others() -> None:
    declaration = Declaration()
    windowed = pipeline(declaration).group_by("country").window(tumbling("5m"))
    rows = windowed.agg(p=agg.sum("price"), q=agg.mean("price")).with_columns(power=pl.col("p") ** pl.col("q"))
    rows.table("totals")
    run = Run(compiled(declaration))
    for at in range(60):
        run.take(order(id=str(at), country=f"c{at}", price=2 + at * 0.31), order(id="x", country=f"c{at}", price=1.07))
    overlay = Overlay(MemoryStore(), "totals")
    owner = WindowTable(run.plan.root.tables[0], overlay)
    for partial in run.partials["totals"]:
        for payload in partial.payloads:
            owner.apply(*decode_partial(payload), NO_WATERMARK)
    owner.collect(1)
    stored = list(overlay.scan(b"", None))
    whole = owner.results(stored)["power"].to_list()
    assert [owner.results([row])["power"][0] for row in stored] == whole


# --- event time and windows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "offset", "at", "fits"),
    [
        ("1d", "0s", YEAR_1, True),
        ("1d", "0s", YEAR_1 - 1, False),
        ("7d", "0s", YEAR_1, False),  # the week of the first of January of the year 1 begins in the year 0
        ("1h", "30m", YEAR_1 + 29 * 60_000, False),
        ("1h", "30m", YEAR_1 + 30 * 60_000, True),
        ("1h", "0s", YEAR_9999_END, False),  # its window ends in the year 10000
        ("1h", "0s", YEAR_9999_END - HOUR, True),
    ],
)
def test_a_window_that_no_sink_can_hold_is_a_dead_letter(size: str, offset: str, at: int, fits: bool) -> None:
    declaration = Declaration()
    windowed = pipeline(declaration).group_by("country").window(tumbling(size, offset=offset))
    windowed.agg(orders=agg.count()).table("totals")
    run = Run(compiled(declaration))
    collected = run.take(order(at=at - START, timestamp_ms=max(at, START)))
    assert [why.endswith("is not within the years 1 to 9999") for _, why in reasons(collected)] == [True] * (not fits)
    assert (run.program.watermark == NO_WATERMARK) is (not fits)
    if fits:
        (row,) = run.rows("totals")
        assert row["orders"] == 1


@pytest.mark.parametrize(("lateness", "ahead", "late"), [("0s", 5, True), ("0s", 5 - 1, False), ("3m", 8, True)])
def test_a_record_is_late_from_the_very_millisecond_on(lateness: str, ahead: int, late: bool) -> None:
    """Window [0, 5m), out of order by 1m: the watermark reaches end - 1 + lateness with the record at end + lateness +
    1m, not a millisecond before."""
    declaration = Declaration()
    windowed = pipeline(declaration).group_by("country").window(tumbling("5m"), allowed_lateness=lateness)
    windowed.agg(orders=agg.count()).table("totals")
    last = (ahead + 1) * 60_000
    for by, expected in [(0, late), (-1, False)]:
        collected = Run(compiled(declaration)).take(order(at=last + by), order(at=5 * 60_000 - 1))
        assert (collected.counts.late == {"totals": 1}) is expected


# --- rows that cannot be kept -----------------------------------------------------------------------------------------


def texts(declaration: Declaration) -> Pipeline:
    stream = pipeline(declaration)
    stream.group_by("country").window(tumbling("5m")).agg(last=agg.max("note")).table("totals")
    return stream


def test_text_that_no_row_can_hold_costs_its_record_not_the_worker() -> None:
    """It stopped the worker when the epoch committed, and again at every start."""
    declaration = Declaration()
    texts(declaration)
    run = Run(compiled(declaration))
    most = limits.TABLE_TEXT_BYTES_MAX // 2
    collected = run.take(
        order(country="x" * most, note="y" * most),
        order(country="x" * (most + 1)),
        order(note="ñ" * (most // 2 + 1)),
        order(country=None, note=None),
    )
    assert reasons(collected) == [(1, '"country" is too long for table "totals"'),
                                  (2, '"note" is too long for table "totals"')]  # fmt: skip
    assert [row["last"] for row in run.rows("totals")] == [None, "y" * most]


ENDLESS = "99999999999999d"


@pytest.mark.parametrize(
    ("setting", "declare"),
    [
        ("within", lambda stream: stream.dedupe("id", within=ENDLESS)),
        ("size", lambda stream: tumbling(ENDLESS)),
        ("allowed_lateness", lambda stream: stream.group_by("id").window(tumbling("1h"), allowed_lateness=ENDLESS)),
        ("retain", lambda stream: stream.group_by("id").window(tumbling("1h"), retain=ENDLESS)),
        ("out_of_orderness", lambda stream: event_time("at", out_of_orderness=ENDLESS)),
        ("idle_after", lambda stream: event_time("at", idle_after=ENDLESS)),
        ("max_ahead", lambda stream: event_time("at", max_ahead=ENDLESS)),
    ],
)
def test_a_duration_that_event_time_cannot_bear_is_refused_where_it_is_written(
    setting: str, declare: Callable[[Pipeline], object]
) -> None:
    """It overflowed int64 on the first record, or on the first commit."""
    stream = pipeline(Declaration())
    with pytest.raises(UserError, match=f"attack_semantics.py.*{setting}=.*10,000 years"):
        declare(stream)


@pytest.mark.parametrize("name", ["*", "^x$", "^.*$"])
def test_a_column_is_not_named_by_a_pattern(name: str) -> None:
    """Whoever selected it by name selected others too."""
    with pytest.raises(UserError, match="pattern"):
        pipeline(Declaration()).with_columns(**{name: pl.col("amount")})
    with pytest.raises(UserError, match="pattern"):
        pipeline(Declaration()).group_by("country").window(tumbling("5m")).agg(**{name: agg.count()})


def test_more_aggregates_than_a_row_can_number_are_refused_before_the_first_record() -> None:
    declaration = Declaration()
    many_aggs = {f"d{at}": agg.count_distinct("amount") for at in range(256)}
    pipeline(declaration).group_by("country").window(tumbling("5m")).agg(**many_aggs).table("totals")
    with pytest.raises(UserError, match="256 aggregates"):
        compiled(declaration)


# --- one value, one hash, however it was read -------------------------------------------------------------------------

_LOGICAL = {"type": "long", "logicalType": "timestamp-micros"}
_FIELDS = {
    "s": "string", "b": "bytes", "i": "int", "l": "long", "f": "float", "d": "double", "o": "boolean",
    "e": {"type": "enum", "name": "E", "symbols": ["A", "B"]}, "t": _LOGICAL,
    "day": {"type": "int", "logicalType": "date"},
}  # fmt: skip
KEYS = parse_schema(
    {"type": "record", "name": "K", "fields": [{"name": k, "type": ["null", t]} for k, t in _FIELDS.items()]}
)


class Keys:
    def schema_by_id(self, schema_id: int) -> Schema:
        return KEYS

    def id_of(self, schema: Schema | str) -> int:
        return 1


def test_a_decoded_hash_is_the_hash_of_the_decoded_value() -> None:
    """Else a dedupe or a distinct count would change with what else a pipeline reads."""
    encoder = Encoder(KEYS, 1)
    rows: list[dict[str, Any]] = [
        dict(s="ñ\0", b=b"\0\xff", i=-1, l=1 << 62, f=-0.0, d=float("nan"), o=True, e="B", t=-1, day=-5),
        dict(s="", b=b"", i=0, l=-(1 << 63), f=0.0, d=-0.0, o=False, e="A", t=0, day=0),
        dict.fromkeys(_FIELDS),
    ]
    batch = batch_of([Record(encoder.encode(row)) for row in rows])
    types = columns_of(KEYS)
    decoded = Decoder(KEYS, Keys(), dict.fromkeys(types, Use.VALUE | Use.HASH)).decode(batch)
    assert decoded.bad == []
    for name in types:
        hi, lo = hash_series(decoded.frame[name])
        for column, words in zip(hash_names(name), (hi, lo), strict=True):
            assert decoded.frame[column].fill_null(0).to_list() == words.tolist(), name
