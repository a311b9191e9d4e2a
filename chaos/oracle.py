"""What the job must leave behind, worked out in one go from what was sent. Nothing of streamproc is imported here.

The rules are those of the user's documentation, record by record and in plain Python: decode, expectation, event time
and watermark, dedupe, windows. Only a record's own partition decides whether it is late: the owner of a window knows
no more than the least watermark of all partitions, and it knows that one later.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, TypeAlias

from chaos.load import HOUR, MINUTE, OUT_OF_ORDERNESS_MS, Order, Payment, orders, payments

__all__ = ["TABLES", "Expected", "Row", "Rules", "Side", "expect"]

Row: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[str, int]
"""Country and start of the window."""
DEDUPE_MS: Final = HOUR
TOO_OLD: Final = "too old to dedupe"
BEGIN: Final = -(1 << 62)
ONE: Final = 1 << 60
"""Amounts are summed as integers of this fineness: a float of at least 0.01 times a power of two this high is whole."""


@dataclass(frozen=True)
class Rules:
    """Of one table."""

    size_ms: int
    lateness_ms: int
    retain_ms: int

    def is_final(self, start: int, watermark: int) -> bool:
        return start + self.size_ms - 1 + self.lateness_ms <= watermark

    def may_have_left(self, start: int, watermark: int) -> bool:
        """Whether its row may have left the state; sinks keep it."""
        return start + self.size_ms + self.retain_ms <= watermark


TABLES: Final = {
    "minutes": Rules(MINUTE, 2 * MINUTE, 20 * MINUTE),
    "tens": Rules(10 * MINUTE, 20 * MINUTE, 400 * 24 * HOUR),
}


@dataclass(frozen=True)
class Side:
    """A late record or dead letter. ``window_start`` None: too old to dedupe, or a dead letter."""

    record: Order | Payment
    reason: str
    window_start: int | None = None


Sides: TypeAlias = dict[tuple[int, int], Side]
"""By partition and offset of the record."""


@dataclass
class Expected:
    """Everything the job must leave behind."""

    tables: dict[str, dict[Key, Row]] = field(default_factory=dict)
    late: dict[str, Sides] = field(default_factory=lambda: {name: {} for name in TABLES})
    dead_orders: Sides = field(default_factory=dict)
    dead_payments: dict[tuple[int, int], list[Side]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    sums: Counter[str] = field(default_factory=Counter)
    watermark: int = -BEGIN
    """The least of all partitions."""

    def final(self, table: str) -> dict[Key, Row]:
        """The rows of windows that nothing can change any more."""
        rules = TABLES[table]
        return {key: row for key, row in self.tables[table].items() if rules.is_final(key[1], self.watermark)}


class _Cell:
    """A window of one country."""

    __slots__ = ("customers", "most", "orders", "total")

    def __init__(self) -> None:
        self.orders = self.total = 0
        self.most = -math.inf
        self.customers: set[str] = set()

    def add(self, order: Order) -> None:
        self.orders += 1
        self.total += int(order.amount * ONE)
        self.most = max(self.most, order.amount)
        self.customers.add(order.customer)

    def row(self, end: int) -> Row:
        # Python's division of two integers is the exact quotient, rounded once.
        return {
            "window_end": end,
            "orders": self.orders,
            "revenue": self.total / ONE,
            "most": self.most,
            "mean": self.total / (self.orders * ONE),
            "customers": len(self.customers),
        }


def expect(seed: int, orders_sent: Sequence[int], payments_sent: Sequence[int]) -> Expected:
    """``…_sent``: records in each partition."""
    found = Expected()
    cells: dict[str, dict[Key, _Cell]] = {name: {} for name in TABLES}
    for partition, sent in enumerate(orders_sent):
        watermark = _orders(found, cells, partition, islice(orders(seed, partition), sent))
        found.watermark = min(found.watermark, watermark)
    found.tables = {
        name: {key: cell.row(key[1] + TABLES[name].size_ms) for key, cell in table.items()}
        for name, table in cells.items()
    }
    for partition, sent in enumerate(payments_sent):
        for offset, payment in enumerate(islice(payments(seed, partition), sent)):
            _payment(found, (partition, offset), payment)
    return found


def _orders(found: Expected, cells: dict[str, dict[Key, _Cell]], partition: int, records: Any) -> int:
    """One partition in offset order; its watermark at the end."""
    watermark, width = BEGIN, DEDUPE_MS // 8
    remembered: dict[str, int] = {}
    for offset, order in enumerate(records):
        place = (partition, offset)
        if order.corrupt:
            found.dead_orders[place] = Side(order, "")
            continue
        if order.amount < 0:
            found.dead_orders[place] = Side(order, "amount is positive")
            continue
        before, watermark = watermark, max(watermark, order.at - OUT_OF_ORDERNESS_MS - 1)
        bucket_end = order.at // width * width + width
        if bucket_end + DEDUPE_MS <= before:
            for late in found.late.values():
                late[place] = Side(order, TOO_OLD)
            continue
        known = remembered.get(order.id)
        if known is not None and known + DEDUPE_MS > before:
            continue
        remembered[order.id] = bucket_end
        for name, rules in TABLES.items():
            start = order.at // rules.size_ms * rules.size_ms
            if rules.is_final(start, before):
                found.late[name][place] = Side(order, "", start)
                continue
            cell = cells[name].get((order.country, start))
            if cell is None:
                cell = cells[name][order.country, start] = _Cell()
            cell.add(order)
    return watermark


def _payment(found: Expected, place: tuple[int, int], payment: Payment) -> None:
    kind = payment.kind
    if kind == "corrupt":
        found.dead_payments[place] = [Side(payment, "")]
        return
    if kind.startswith("fails"):
        found.dead_payments[place] = [Side(payment, f"agent {kind.removeprefix('fails ')} failed")]
    if kind != "fails count":
        found.counts[payment.account] += 1
    if kind != "fails take":
        found.sums[payment.account] += payment.cents
