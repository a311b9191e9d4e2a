"""What a run must have left, computed by Polars over the Parquet file, and where a result differs from it.

Nothing of streamproc is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import polars as pl

__all__ = [
    "Rows",
    "buyers_by_country",
    "completed",
    "differences",
    "differences_in_order",
    "orders_per_user",
    "revenue_by_country",
]

Rows: TypeAlias = Mapping[tuple[Any, ...], tuple[Any, ...]]
"""Identity of a row (keys, then the window's start in ms) -> its other values."""

WINDOW_MS: Final = 5 * 60_000
TOLD_MAX: Final = 5
"""So many differences of one place are spelt out."""


def revenue_by_country(parquet: Path) -> Rows:
    """(country, window start) -> (window end, orders, revenue): each order once, only completed ones.

    The sum of a window is the true sum of its doubles, rounded once: our own sums are exact, so they must be equal to
    the last bit.
    """
    start = pl.col("event_time") // WINDOW_MS * WINDOW_MS
    rows = (
        pl.scan_parquet(parquet)
        .unique("order_id")
        .filter(pl.col("status") == "completed")
        .group_by("country", start.alias("start"))
        .agg(pl.len().alias("orders"), pl.col("amount"))
        .collect()
    )
    return {
        (country, at): (at + WINDOW_MS, count, math.fsum(amounts)) for country, at, count, amounts in rows.iter_rows()
    }


def buyers_by_country(parquet: Path) -> Rows:
    """(country, window start) -> (window end, orders, buyers): each order once, only completed ones; buyers are different
    users."""
    start = pl.col("event_time") // WINDOW_MS * WINDOW_MS
    rows = (
        pl.scan_parquet(parquet)
        .unique("order_id")
        .filter(pl.col("status") == "completed")
        .group_by("country", start.alias("start"))
        .agg(pl.len().alias("orders"), pl.col("user_id").n_unique().alias("buyers"))
        .collect()
    )
    return {(country, at): (at + WINDOW_MS, orders, buyers) for country, at, orders, buyers in rows.iter_rows()}


def completed(parquet: Path) -> list[int]:
    """Which orders are completed, repeated ones too: their places in the order of production."""
    rows = pl.scan_parquet(parquet).with_row_index("place").filter(pl.col("status") == "completed").select("place")
    return rows.collect().to_series().to_list()


def orders_per_user(parquet: Path) -> Rows:
    """(user,) -> (orders,), repeated ones too: nobody knows them."""
    rows = pl.scan_parquet(parquet).group_by("user_id").len().collect()
    return {(user,): (count,) for user, count in rows.iter_rows()}


def differences(place: str, expected: Rows, got: Iterable[tuple[tuple[Any, ...], tuple[Any, ...]]]) -> list[str]:
    """In words, none if every row is there once with every cell equal and no other row is."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    told = []
    for identity, values in got:
        if identity in found:
            told.append(f"{place} {identity}: there twice")
        found[identity] = values
        if identity not in expected:
            told.append(f"{place} {identity}: not expected")
        elif expected[identity] != values:
            told.append(f"{place} {identity}: {values}, expected {expected[identity]}")
    told += [f"{place} {identity}: missing" for identity in expected if identity not in found]
    return [*told[:TOLD_MAX], f"{place}: {len(told)} differences in all"] if len(told) > TOLD_MAX else told


def differences_in_order(place: str, expected: Sequence[object], got: Sequence[object]) -> list[str]:
    """In words, none if both are equal, record by record."""
    if expected == got:
        return []
    told = [f"{place}: {len(got)} records, expected {len(expected)}"] if len(got) != len(expected) else []
    at = next((at for at, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    if at is not None:
        told.append(f"{place} record {at}: {got[at]!r}, expected {expected[at]!r}")
    return told
