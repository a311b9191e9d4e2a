"""Which expressions are row-wise, and which of their values can be trusted."""

from __future__ import annotations

import datetime as dt
import operator
import random
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.core.errors import UserError
from streamproc.operators.expressions import RowExpr, check, evaluate, guarded

COLUMNS: dict[str, pl.DataType] = {
    "a": pl.Int64(),
    "b": pl.Int64(),
    "small": pl.Int32(),
    "f": pl.Float64(),
    "g": pl.Float64(),
    "s": pl.String(),
    "t": pl.Datetime("ms", "UTC"),
    "d": pl.Duration("us"),
    "day": pl.Date(),
    "yes": pl.Boolean(),
}
LOW, HIGH = -(1 << 63), (1 << 63) - 1
a, b, f, g, s, t, d = (pl.col(name) for name in "abfgstd")


def judge(expr: pl.Expr, **options: Any) -> RowExpr:
    return check(expr, COLUMNS, what="filter", where="job.py:7", **options)


def overflows(expr: pl.Expr, **values: list[Any]) -> list[bool]:
    frame = pl.DataFrame(values, schema={name: COLUMNS[name] for name in values})
    (value,) = evaluate(frame, [judge(expr)])
    return [False] * frame.height if value.overflow is None else value.overflow.tolist()


@pytest.mark.parametrize(
    "expr",
    [
        a.is_between(-120, 2880) & (s == "completed"),
        pl.when(a > 1).then(b).otherwise(None),
        s.str.to_uppercase().str.slice(0, 3),
        s.str.to_datetime("%Y-%m-%d %H:%M:%S", strict=False),
        t.dt.truncate("1h") + dt.timedelta(days=1),
        a.is_in([1, 2, 3]),
        f.fill_nan(0.0).fill_null(1.0).round(2),
        a.cast(pl.Float64) / pl.max_horizontal("b", pl.lit(1)),
        pl.concat_str("s", a.cast(pl.String), separator="-"),
        a.replace_strict({1: "one"}, default="many"),
        t > dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
        pl.lit(1),
    ],
    ids=str,
)
def test_accepts_what_looks_at_one_record(expr: pl.Expr) -> None:
    assert judge(expr).columns <= COLUMNS.keys()


@pytest.mark.parametrize(
    ("expr", "named"),
    [
        (a - a.mean(), "mean"),
        (a.cum_sum(), "cum_sum"),
        (a.shift(), "shift"),
        (a.diff(), "diff"),
        (a.sum().over("b"), "over"),
        (a.rank(), "rank"),
        (a.sort(), "sort"),
        (a.reverse(), "reverse"),
        (a.is_first_distinct(), "is_first_distinct"),
        (a.is_duplicated(), "is_duplicated"),
        (a.rolling_mean(3), "rolling_mean"),
        (a.fill_null(strategy="forward"), "fill_null_with_strategy"),
        (a.interpolate(), "interpolate"),
        (a.first(), "first"),
        (a.filter(b > 1), "filter"),
        (a.hash(), "hash"),
        (pl.len() > 1, "len"),
        (pl.int_range(pl.len()), "range"),
        (a.shuffle(), "shuffle is random"),
        (a.sample(1, with_replacement=True), "sample is random"),
        (a.map_elements(lambda x: x, return_dtype=pl.Int64), "Python function"),
        (a.map_batches(lambda x: x), "Python function"),
        (pl.all() > 1, "several columns"),
        (pl.col("^a.*$"), "several columns"),
        (s.str.to_date(), "guessed from the first value"),
        (s.cast(pl.Categorical), "cast to Categorical"),
        (a + pl.lit(pl.Series([1, 2])), "a Series"),
        (f < float("inf"), "NaN or infinity"),
        (a + (1 << 64), "does not fit 64 bits"),
        (a.alias("x").name.suffix("y"), "renames"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_by_name_what_looks_at_other_records_or_is_not_deterministic(expr: pl.Expr, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        judge(expr)
    assert str(error.value).startswith("job.py:7: ")
    assert error.value.remedy


def test_a_misspelt_column_is_named_with_its_nearest() -> None:
    with pytest.raises(UserError, match=r"no column 'smal'. Did you mean 'small'\?"):
        judge(pl.col("smal") > 1)


def test_a_type_error_is_found_on_an_empty_frame_and_names_the_columns() -> None:
    with pytest.raises(UserError, match=r"it reads a \(Int64\), s \(String\)"):
        judge(s + a)


def test_a_wrong_pattern_is_refused_before_the_first_record() -> None:
    with pytest.raises(UserError, match="regex parse error"):
        judge(s.str.contains("(unclosed"))


def test_a_result_may_not_raise_where_there_is_no_record_to_put_aside() -> None:
    with pytest.raises(UserError, match="strict=False"):
        judge(a.cast(pl.Int8), total=True)
    judge(a.cast(pl.Int8, strict=False), total=True)


def test_a_row_that_raises_costs_that_row_only() -> None:
    frame = pl.DataFrame({"s": ["1", "x", "3", None, "y"], "a": [1, 2, 3, 4, 5]})
    parsed, doubled = evaluate(frame, [judge(s.cast(pl.Int64)), judge(a * 2)])
    assert parsed.value.to_list() == [1, None, 3, None, None]
    assert parsed.failed is not None
    assert parsed.failed.tolist() == [False, True, False, False, True]
    assert doubled.value.to_list() == [2, 4, 6, 8, 10]
    assert doubled.failed is None


def test_a_literal_is_as_long_as_the_batch() -> None:
    (value,) = evaluate(pl.DataFrame({"a": [1, 2, 3]}), [judge(pl.lit(True))])
    assert value.value.to_list() == [True] * 3


def test_overflow_is_told_for_every_operation() -> None:
    assert overflows(a + b, a=[HIGH, HIGH, LOW], b=[1, 0, -1]) == [True, False, True]
    assert overflows(a - b, a=[LOW, 0], b=[1, LOW]) == [True, True]
    assert overflows(a * 3, a=[HIGH // 3, HIGH // 3 + 1, None]) == [False, True, False]
    assert overflows(a // b, a=[LOW, LOW, 5], b=[-1, 1, 0]) == [True, False, False]
    assert overflows(-a, a=[LOW, HIGH]) == [True, False]
    assert overflows(a.abs(), a=[LOW, -HIGH]) == [True, False]
    assert overflows(a**2, a=[3_037_000_499, 3_037_000_500, 1 << 32]) == [False, True, True]
    assert overflows(2**a, a=[30, 31, 62, 63, 64]) == [
        False,
        True,
        True,
        True,
        True,
    ]  # a small literal's base is 32 bits
    assert overflows(pl.sum_horizontal("a", "b"), a=[HIGH, HIGH], b=[1, None]) == [True, False]
    assert overflows(pl.col("small") * pl.col("small"), small=[46_340, 46_341]) == [False, True]
    assert overflows(s.str.len_chars() - 1, s=["", "a"]) == [True, False]
    assert overflows(a + HIGH, a=[0, 1]) == [False, True]


def test_overflow_of_times_is_told_across_units() -> None:
    far = pl.Series([0, HIGH], dtype=pl.Int64).cast(pl.Datetime("ms", "UTC"))
    frame = pl.DataFrame({"t": far, "d": [dt.timedelta(days=1)] * 2}, schema_overrides={"d": pl.Duration("us")})
    for expr in (t + d, t + dt.timedelta(milliseconds=1)):
        (value,) = evaluate(frame, [judge(expr)])
        assert value.overflow is not None
        assert value.overflow.tolist() == [False, True]


def test_overflow_in_a_branch_that_is_not_taken_does_no_harm() -> None:
    small = a.is_between(-1000, 1000)
    assert overflows(pl.when(small).then(a * a).otherwise(0), a=[5, HIGH]) == [False, False]
    assert overflows(small & (a * a > 4), a=[5, HIGH]) == [False, False]
    assert overflows(~small | (a * a > 4), a=[5, HIGH]) == [False, False]
    assert overflows(small | (a * a > 4), a=[5, HIGH]) == [False, True]


def test_floats_and_comparisons_have_no_overflow_guard() -> None:
    assert judge(f * 2 > 1).overflow is None
    assert judge(a > b).overflow is None


def test_nan_is_told_wherever_it_arises_unless_the_expression_asks_for_it() -> None:
    frame = pl.DataFrame({"f": [float("nan"), 0.0, 1.0, None], "g": [1.0, 0.0, 0.0, 1.0]})

    def nans(expr: pl.Expr) -> list[bool]:
        (value,) = evaluate(frame, [judge(expr)])
        return [False] * 4 if value.nan is None else value.nan.tolist()

    assert nans(f >= 0) == [True, False, False, False]
    assert nans(f.is_between(0, 9)) == [True, False, False, False]
    assert nans(f / g >= 0) == [True, True, False, False]
    assert nans(f.fill_nan(0) >= 0) == [False] * 4
    assert nans(f.is_nan() | (f > 0)) == [False] * 4
    assert nans(f.is_nan()) == [False] * 4
    assert nans(pl.when(g > 0).then(f / g >= 0).otherwise(True)) == [True, False, False, False]


def test_a_guarded_result_is_null_where_it_would_be_wrong() -> None:
    frame = pl.DataFrame({"a": [1, HIGH]})
    assert frame.select(guarded(judge(a * 2)))["a"].to_list() == [2, None]


# --- any integer expression: the guard says exactly what exact arithmetic says --------------------------------------

Exact = tuple[int | None, bool]
"""Value (None: null) and whether something on the way to it left 64 bits."""
Formula = tuple[pl.Expr, Callable[[int, int], Exact]]


def _binary(name: str, left: Formula, right: Formula) -> Formula:
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}[name]

    def exact(x: int, y: int) -> Exact:
        (p, p_bad), (q, q_bad) = left[1](x, y), right[1](x, y)
        if p_bad or q_bad or p is None or q is None or (name == "//" and q == 0):
            return None, p_bad or q_bad
        value = apply(p, q)
        return value, not LOW <= value <= HIGH

    return apply(left[0], right[0]), exact


def _choose(test: Formula, then: Formula, other: Formula) -> Formula:
    def exact(x: int, y: int) -> Exact:
        value, bad = test[1](x, y)
        chosen, wrong = (then if value is not None and value > 0 else other)[1](x, y)
        return chosen, bad or wrong

    return pl.when(test[0] > 0).then(then[0]).otherwise(other[0]), exact


def _literal(value: int) -> Formula:
    return pl.lit(value, dtype=pl.Int64), lambda x, y: (value, False)


numbers = st.one_of(st.integers(LOW, HIGH), st.integers(-100, 100), st.sampled_from([LOW, HIGH, 1 << 32, -(1 << 31)]))
leaves = st.one_of(
    st.just((a, lambda x, y: (x, False))), st.just((b, lambda x, y: (y, False))), st.builds(_literal, numbers)
)
formulas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(_binary, st.sampled_from(["+", "-", "*", "//"]), inner, inner),
        st.builds(_choose, inner, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(formulas, st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12))
def test_the_overflow_guard_is_exact(formula: Formula, rows: list[tuple[int, int]]) -> None:
    expr, exact = formula
    frame = pl.DataFrame(rows, schema={"a": pl.Int64, "b": pl.Int64}, orient="row")
    (value,) = evaluate(frame, [check(expr, COLUMNS, what="x", where=None, trial=False)])
    told = [False] * len(rows) if value.overflow is None else value.overflow.tolist()
    wanted = [exact(x, y) for x, y in rows]
    assert told == [bad for _, bad in wanted]
    for got, (right, bad) in zip(value.value.to_list(), wanted, strict=True):
        assert bad or got == right


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 40))
def test_values_and_guards_do_not_depend_on_batch_boundaries(seed: int, rows: int) -> None:
    dice = random.Random(seed)
    frame = pl.DataFrame(
        {
            "a": [dice.choice([None, LOW, HIGH, dice.randrange(100)]) for _ in range(rows)],
            "f": [dice.choice([None, float("nan"), 0.0, dice.random()]) for _ in range(rows)],
            "s": [dice.choice([None, "7", "x", ""]) for _ in range(rows)],
        },
        schema={name: COLUMNS[name] for name in "afs"},
    )
    checked = [judge(a * 2 + s.cast(pl.Int64)), judge(f / 2 >= 0), judge(s.str.to_integer(strict=False) > 3)]
    cut = dice.randrange(rows + 1)
    whole, parts = evaluate(frame, checked), [evaluate(part, checked) for part in (frame[:cut], frame[cut:])]
    for at, value in enumerate(whole):
        assert value.value.equals(pl.concat([part[at].value for part in parts]))
        for field in ("failed", "overflow", "nan"):
            masks = [getattr(part[at], field) for part in parts]
            sizes = (cut, rows - cut)
            joined = [
                x
                for mask, n in zip(masks, sizes, strict=True)
                for x in ([False] * n if mask is None else mask.tolist())
            ]
            one = getattr(value, field)
            assert joined == ([False] * rows if one is None else one.tolist())
