"""What a peer's run left, against the oracle of our own benchmarks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from benchmarks import oracle
from benchmarks.orders import Orders
from benchmarks.peers.log import END_MS

__all__ = ["Window", "counts", "forwarded", "window", "windows"]

SUM_TOLERANCE: Final = 1e-9
"""Relative. The peers add doubles one by one; only our own sums must be equal to the last bit."""

Window = tuple[tuple[str, int], tuple[int, float]]
"""Country and start, orders and revenue."""


def window(value: bytes) -> Window:
    """A row of the output of ``pipeline``; every engine writes the same JSON."""
    row: dict[str, Any] = json.loads(value)
    return (row["country"], int(row["window_start"])), (int(row["count"]), float(row["sum"]))


def windows(input_: Orders, rows: Iterable[Window], *, updates: bool) -> list[str]:
    """``updates``: the last row of a window counts; else none may be there twice."""
    expected = oracle.revenue_by_country(input_.parquet)
    kept = [row for row in rows if row[0][1] < END_MS]  # the rest holds what closes windows
    found: Iterable[Window] = dict(kept).items() if updates else kept
    return oracle.differences("output", expected, (_rounded(row, expected) for row in found))


def _rounded(row: Window, expected: oracle.Rows) -> tuple[tuple[str, int], tuple[Any, ...]]:
    """The row as the oracle writes it, with its sum in place of one that is within the tolerance."""
    identity, (count, total) = row
    end, _, exact = expected.get(identity, (identity[1] + oracle.WINDOW_MS, 0, math.nan))
    return identity, (end, count, exact if math.isclose(total, exact, rel_tol=SUM_TOLERANCE) else total)


def counts(input_: Orders, rows: Iterable[tuple[int, int]]) -> list[str]:
    """User and count in the order of the topic: the last one counts."""
    expected = oracle.orders_per_user(input_.parquet)
    return oracle.differences("counts", expected, (((user,), (count,)) for user, count in dict(rows).items()))


def forwarded(input_: Orders, values: Iterable[bytes], head: int) -> list[str]:
    """Each completed order, byte for byte behind ``head`` bytes, as often as it was there; in any order."""
    expected = Counter(input_.record(place)[1][head:] for place in oracle.completed(input_.parquet))
    got = Counter(values)
    if got == expected:
        return []
    missing, extra = (expected - got).total(), (got - expected).total()
    return [f"output: {missing} orders are missing, {extra} should not be there"]
