"""The aggregates a user may declare, and what they mean: `count`, `sum`, `min`, `max`, `mean`, `count_distinct`.

Nulls are skipped as in SQL: an aggregate that saw no value is null (counts are 0). All are exact and do not depend on
the order of the records:

- sums of integers are kept in 128 bits; a *result* beyond int64 is an error that names the key, never a wrong number;
- sums of floats are exact and rounded once, when read; a sum that is zero is 0.0;
- a mean is the exact sum divided by the count, rounded once;
- min and max order floats as Postgres does: NaN above every number (and -0.0 below 0.0); text by its UTF-8 bytes;
- distinct values are told apart by 128-bit hashes; -0.0 is 0.0, NaN is one value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import polars as pl

from streamproc.core.errors import UserError
from streamproc.operators.plan import Agg, TablePlan

__all__ = ["check_plan", "count", "count_distinct", "max", "mean", "min", "result_columns", "result_dtype", "sum"]

_AGGREGATES_MAX: Final = 255
"""A chunk of distinct hashes names its aggregate in one byte."""
_REMEDIES = {
    "sum": "Sum a number or a boolean, or cast the column in .with_columns() first.",
    "mean": "Take the mean of a number or a boolean, or cast the column in .with_columns() first.",
    "min": "Use a number, boolean, text, date or time, or cast the column in .with_columns() first.",
    "max": "Use a number, boolean, text, date or time, or cast the column in .with_columns() first.",
    "count_distinct": "Count distinct numbers, booleans, texts, bytes, dates or times.",
}


def count(column: str | None = None) -> Agg:
    """How many rows; with ``column``, how many values that are not null. Int64."""
    return Agg("count", column)


def sum(column: str) -> Agg:
    """Exact sum: Int64 of integers and booleans, Float64 of floats."""
    return Agg("sum", column)


def min(column: str) -> Agg:
    """Least value, of the column's own type."""
    return Agg("min", column)


def max(column: str) -> Agg:
    """Greatest value, of the column's own type."""
    return Agg("max", column)


def mean(column: str) -> Agg:
    """Exact sum divided by the count of values, correctly rounded. Float64."""
    return Agg("mean", column)


def count_distinct(column: str) -> Agg:
    """How many different values. Int64. Its state grows by 16 bytes for each value of a key and window."""
    return Agg("count_distinct", column)


def result_dtype(agg: Agg, inputs: Mapping[str, pl.DataType], *, where: str | None = None) -> pl.DataType:
    """Type of the result; `UserError` naming column, type and remedy when ``agg`` cannot be taken of its column."""
    if agg.kind == "count" and agg.column is None:
        return pl.Int64()
    name = agg.column
    if name is None or name not in inputs:
        raise UserError(
            f"{agg.kind}({name!r}) reads a column that is not there.",
            remedy=f"The columns here are: {', '.join(inputs) or 'none'}.",
            where=where,
        )
    dtype = inputs[name]
    if not _takes(agg, dtype):
        raise UserError(f"{agg.kind}({name!r}): the column is {dtype}.", remedy=_REMEDIES[agg.kind], where=where)
    if agg.kind in ("min", "max"):
        return dtype
    return pl.Float64() if agg.kind == "mean" or (agg.kind == "sum" and dtype.is_float()) else pl.Int64()


def result_columns(plan: TablePlan) -> dict[str, pl.DataType]:
    """Names and types of the aggregates in order, before the plan's ``post`` steps."""
    return {name: result_dtype(agg, plan.inputs, where=plan.where) for name, agg in plan.aggs.items()}


def check_plan(plan: TablePlan) -> None:
    """`UserError` when there are too many aggregates, or one or a group key is of a type that cannot be one. Called once,
    before any record."""
    if len(plan.aggs) > _AGGREGATES_MAX:
        raise UserError(
            f"Table {plan.name!r} has {len(plan.aggs)} aggregates.",
            remedy=f"At most {_AGGREGATES_MAX} fit a row: split the table.",
            where=plan.where,
        )
    result_columns(plan)
    for name, dtype in plan.keys.items():
        if not (_is_whole(dtype) or dtype == pl.Boolean or dtype == pl.String or _is_moment(dtype)):
            raise UserError(
                f"group_by({name!r}): the column is {dtype}.",
                remedy="Group by text, integers, booleans, dates or times, or cast it in .with_columns() first.",
                where=plan.where,
            )


def _takes(agg: Agg, dtype: pl.DataType) -> bool:
    number = _is_whole(dtype) or dtype in (pl.Float32, pl.Float64) or dtype == pl.Boolean
    if agg.kind in ("sum", "mean"):
        return number
    if agg.kind == "count":
        return True
    orderable = number or _is_moment(dtype) or dtype == pl.String
    return orderable or (agg.kind == "count_distinct" and (dtype == pl.Binary or isinstance(dtype, pl.Enum)))


def _is_whole(dtype: pl.DataType) -> bool:
    """An integer of at most 64 bits."""
    return dtype.is_integer() and dtype not in (pl.Int128, pl.UInt128)


def _is_moment(dtype: pl.DataType) -> bool:
    return dtype in (pl.Date, pl.Time) or isinstance(dtype, (pl.Datetime, pl.Duration))
