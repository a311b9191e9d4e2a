"""What a run must have left, computed by Polars over the Parquet file, and where a result differs from it.

Nothing of streamproc is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import polars as pl

__all__ = ["Rows", "differences", "orders_per_user", "revenue_by_country"]

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


def orders_per_user(parquet: Path) -> Rows:
    """(user,) -> (orders,), repeated ones too: the agent does not know them."""
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
