"""What is sent: a pure function of seed and partition, so that nothing sent has to be kept. Nothing of streamproc is
imported here.

Event time moves on evenly with a record's place in its partition. A record out of order stays within
`OUT_OF_ORDERNESS_MS`, a late one is minutes or hours behind its own partition's watermark.
"""

from __future__ import annotations

import io
import json
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import fastavro

__all__ = [
    "ORDERS",
    "OUT_OF_ORDERNESS_MS",
    "PARTITIONS",
    "PAYMENTS",
    "Order",
    "Payment",
    "encode_order",
    "encode_payment",
    "orders",
    "payments",
]

SCHEMAS: Final = Path(__file__).resolve().parent / "schemas"
ORDERS, PAYMENTS = "orders", "payments"
PARTITIONS: Final = 4
MINUTE: Final = 60_000
HOUR: Final = 60 * MINUTE
T0: Final = 1_700_000_000_000 // (24 * HOUR) * (24 * HOUR) + 6 * HOUR
STEP_MS: Final = 120
"""Event time from one order of a partition to the next: at 500 a second and partition a minute passes each second."""
OUT_OF_ORDERNESS_MS: Final = MINUTE
RECENT_ORDERS: Final = 2_000
"""A duplicate is of one of the last so many orders of its partition: 4 minutes of event time."""
COUNTRIES: Final = tuple(f"{a}{b}" for a in "ABCDEF" for b in "KLMNO")
CUSTOMERS: Final = 400
ACCOUNTS: Final = 50
"""Of each partition; no account is in two."""


class Order(NamedTuple):
    """One record of the pipeline's topic. ``corrupt``: its bytes break off."""

    id: str
    country: str
    customer: str
    amount: float
    at: int
    corrupt: bool


class Payment(NamedTuple):
    """One record of the agents' topic. ``kind``: ``good``, ``flaky`` (fails once in each worker), ``fails count`` and
    ``fails take`` (fails that agent always), ``corrupt``."""

    account: str
    number: int
    cents: int
    kind: str


def orders(seed: int, partition: int) -> Iterator[Order]:
    """The orders of one partition in offset order, without end."""
    rng = random.Random(f"orders {seed} {partition}")
    recent: deque[Order] = deque(maxlen=RECENT_ORDERS)
    at, number = T0, 0
    while True:
        dice = rng.random()
        number, at = number + 1, at + STEP_MS
        if dice < 0.03 and recent:
            yield recent[int(rng.random() * len(recent))]
            continue
        order = Order(
            f"{partition}-{number}",
            COUNTRIES[int(rng.random() * len(COUNTRIES))],
            f"c{int(rng.random() * CUSTOMERS)}",
            round(rng.random() * 1_000, 2),
            at - _behind(dice, rng),
            0.999 <= dice < 0.9995,
        )
        if dice >= 0.9995:
            order = order._replace(amount=-order.amount)
        elif not order.corrupt:
            recent.append(order)
        yield order


def _behind(dice: float, rng: random.Random) -> int:
    """How far an order's time lies behind its place: in most not at all, in some within what is allowed for."""
    if dice < 0.10:
        return int(rng.random() * OUT_OF_ORDERNESS_MS)
    if dice < 0.115:
        return 3 * MINUTE + int(rng.random() * 12 * MINUTE)  # late for its minute, and for its ten minutes perhaps
    if dice < 0.12:
        return 15 * MINUTE + int(rng.random() * 4 * HOUR)  # late for all, and some too old to tell duplicates by
    return 0


def payments(seed: int, partition: int) -> Iterator[Payment]:
    """The payments of one partition in offset order, without end."""
    rng = random.Random(f"payments {seed} {partition}")
    number = 0
    while True:
        dice = rng.random()
        kind = "good"
        if dice < 0.0004:
            kind = "flaky"
        elif dice < 0.0006:
            kind = "fails count"
        elif dice < 0.0008:
            kind = "fails take"
        elif dice < 0.0012:
            kind = "corrupt"
        yield Payment(f"{partition}-{int(rng.random() * ACCOUNTS)}", number, int(rng.random() * 10_000), kind)
        number += 1


def encode_order(order: Order) -> bytes:
    """The record's value, to the byte."""
    fields = {
        "id": order.id,
        "country": order.country,
        "customer": order.customer,
        "amount": order.amount,
        "at": order.at,
    }
    whole = _encode(_ORDER, b"\0\0\0\0\x01", fields)
    return whole[:-3] if order.corrupt else whole


def encode_payment(payment: Payment) -> bytes:
    """The record's value, to the byte."""
    whole = _encode(_PAYMENT, b"\0\0\0\0\x02", payment._asdict())
    return whole[:-3] if payment.kind == "corrupt" else whole


def _encode(schema: Any, head: bytes, fields: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    buffer.write(head)
    fastavro.schemaless_writer(buffer, schema, fields)
    return buffer.getvalue()


def _schema(name: str) -> Any:
    return fastavro.parse_schema(json.loads((SCHEMAS / name).read_text()))


_ORDER: Final = _schema("order.avsc")
_PAYMENT: Final = _schema("payment.avsc")
