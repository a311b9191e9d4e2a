"""The input of every benchmark: orders of a web shop, out of a seed, as Avro bytes and as Parquet.

100,000 users (few of them buy much), 30 countries, 80 / 10 / 10 % completed, cancelled, pending; 2 % of the orders come
again within 3,000 records; event time runs over two hours and is up to 5 s out of order. A record holds about 130 bytes.

The bytes and the table come from the same columns, but nothing of streamproc has a part in either: the oracle reads the
Parquet file, the worker the bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from streamproc.core.partitioner import partition_of

__all__ = ["COUNTRIES", "PARTITIONS", "SCHEMA_ID", "Orders", "encode", "make", "orders"]

PARTITIONS: Final = 4
SCHEMA_ID: Final = 1
"""Of ``order.avsc`` in ``schemas/ids.json``."""
SEED: Final = 7
START_MS: Final = 1_767_261_600_000
"""2026-01-01 10:00 UTC: a replay, whatever the day."""
SPAN_MS: Final = 2 * 3_600_000
DISORDER_MS: Final = 5_000
USERS: Final = 100_000
REPEATED: Final = 0.02
REPEATED_WITHIN: Final = 3_000
COUNTRIES: Final = (
    "US", "DE", "FR", "GB", "IN", "BR", "JP", "CN", "CA", "AU", "ES", "IT", "NL", "SE", "PL",
    "MX", "KR", "TR", "ID", "AR", "ZA", "NG", "EG", "CH", "AT", "BE", "DK", "NO", "FI", "PT",
)  # fmt: skip
STATUSES: Final = ("completed", "cancelled", "pending")
FORMAT: Final = 1
"""Goes up when the same seed would give other data, so that nothing old is found in the cache."""
_BLOCK_RECORDS: Final = 100_000
_NOTE: Final = (b"web/checkout-v2/session ", b" ok")

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Orders:
    """The whole input, in the order in which it was produced."""

    values: bytes
    """Every record's value, one behind the other."""
    ends: I64
    """Where each value ends."""
    users: I64
    """Each record's key: the user's number as decimal text."""
    partitions: U8
    parquet: Path
    """order_id, user_id, country, status, amount, event_time (ms): what the oracle reads."""

    def __len__(self) -> int:
        return len(self.users)

    def record(self, place: int) -> tuple[bytes, bytes]:
        """Key and value of the record at ``place``, from 0."""
        begin = int(self.ends[place - 1]) if place else 0
        return b"%d" % self.users[place], self.values[begin : int(self.ends[place])]

    def slices(self, records: int) -> Iterator[dict[int, list[tuple[bytes, bytes]]]]:
        """Keys and values by partition, about ``records`` at a time, in order."""
        for at in range(0, len(self), records):
            part: dict[int, list[tuple[bytes, bytes]]] = {}
            rows = slice(at, at + records)
            begin = int(self.ends[at - 1]) if at else 0
            columns = (self.users[rows].tolist(), self.partitions[rows].tolist(), self.ends[rows].tolist())
            for user, partition, end in zip(*columns, strict=True):
                part.setdefault(partition, []).append((b"%d" % user, self.values[begin:end]))
                begin = end
            yield part


def orders(records: int, seed: int = SEED) -> Orders:
    """The input of so many records: made once, then read from a folder in the system's temporary one."""
    folder = Path(tempfile.gettempdir()) / f"streamproc-benchmarks-{os.getuid()}" / f"orders-{FORMAT}-{seed}-{records}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when it is whole: half of it would count as all of it.
        partial = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        make(records, seed, partial)
        try:
            partial.rename(folder)
        except OSError:  # another run was faster with the same data
            shutil.rmtree(partial)
    with np.load(folder / "spans.npz") as spans:
        values = (folder / "values.bin").read_bytes()
        return Orders(values, spans["ends"], spans["users"], spans["partitions"], folder / "orders.parquet")


def make(records: int, seed: int, folder: Path) -> None:
    """Write the files that `orders` reads. 2 million records take some 10 s and 300 MB."""
    columns = _columns(records, np.random.default_rng(seed))
    lengths = []
    with (folder / "values.bin").open("wb") as file:
        for at in range(0, records, _BLOCK_RECORDS):
            block, sizes = encode({name: column[at : at + _BLOCK_RECORDS] for name, column in columns.items()})
            file.write(block)
            lengths.append(sizes)
    users = columns["user_id"]
    known, codes = np.unique(users, return_inverse=True)
    at_home = np.array([partition_of(b"%d" % user, PARTITIONS) for user in known.tolist()], np.uint8)
    np.savez(folder / "spans.npz", ends=np.cumsum(np.concatenate(lengths)), users=users, partitions=at_home[codes])
    _table(columns).write_parquet(folder / "orders.parquet")


def _columns(n: int, random: np.random.Generator) -> dict[str, NDArray[np.generic]]:
    """Every field as numbers; a repeated order is a copy of one up to `REPEATED_WITHIN` records before it."""
    shares = 1 / np.arange(1, len(COUNTRIES) + 1)
    index = np.arange(n)
    late = np.where(random.random(n) < 0.3, random.integers(0, DISORDER_MS, n), 0)
    again = (random.random(n) < REPEATED) & (index > 0)
    source = index.copy()
    source[again] = np.maximum(0, np.flatnonzero(again) - random.integers(1, REPEATED_WITHIN, int(again.sum())))
    while not np.array_equal(source[source], source):
        source = source[source]  # a copy of a copy is the same order
    columns: dict[str, NDArray[np.generic]] = {
        "id": random.integers(0, 256, (n, 16), dtype=np.uint8),
        "user_id": (random.random(n) ** 2 * USERS).astype(np.int64),
        "country": random.choice(len(COUNTRIES), n, p=shares / shares.sum()),
        "status": random.choice(len(STATUSES), n, p=[0.8, 0.1, 0.1]),
        "amount": np.round(random.gamma(2.0, 30.0, n) + 1, 2),
        "event_time": np.maximum(START_MS + (index * (SPAN_MS / n)).astype(np.int64) - late, START_MS),
        "sku": random.integers(0, 5_000, n),
    }
    return {name: column[source] for name, column in columns.items()}


def _table(columns: dict[str, NDArray[np.generic]]) -> pl.DataFrame:
    ids = _hex_ids(columns["id"]).tobytes().decode()
    return pl.DataFrame(
        {
            "order_id": [ids[at : at + 36] for at in range(0, len(ids), 36)],
            "user_id": columns["user_id"],
            "country": pl.Series(COUNTRIES).gather(columns["country"]),
            "status": pl.Series(STATUSES).gather(columns["status"]),
            "amount": columns["amount"],
            "event_time": columns["event_time"],
        }
    )


def encode(columns: dict[str, NDArray[np.generic]]) -> tuple[bytes, I64]:
    """Records in Confluent's wire format, one behind the other, and their lengths.

    Every field has its own columns of a matrix as wide as the longest record, and a mask says which of them count.
    """
    n = len(columns["user_id"])
    hexes = _hex_ids(columns["id"])
    parts: list[tuple[U8, NDArray[np.bool_]]] = [
        _same(n, b"\0" + SCHEMA_ID.to_bytes(4, "big")),
        _same(n, bytes([36 * 2])), _whole(hexes),
        _varint(columns["user_id"].astype(np.int64)),
        _text(columns["country"], COUNTRIES),
        _text(columns["status"], STATUSES),
        _whole(columns["amount"].astype("<f8").view(np.uint8).reshape(n, 8)),
        _varint(columns["event_time"].astype(np.int64)),
        _same(n, bytes([10 * 2]) + b"SKU-"), _digits(columns["sku"].astype(np.int64), 6),
        _same(n, bytes([47 * 2]) + _NOTE[0]), _whole(_plain_hex(hexes)[:, :20]), _same(n, _NOTE[1]),
    ]  # fmt: skip
    matrix = np.concatenate([part for part, _ in parts], axis=1)
    mask = np.concatenate([kept for _, kept in parts], axis=1)
    return matrix[mask].tobytes(), mask.sum(axis=1)


def _hex_ids(ids: NDArray[np.generic]) -> U8:
    """16 bytes a row as the 36 characters of a UUID."""
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    raw = ids.view(np.uint8)
    plain = np.empty((len(raw), 32), np.uint8)
    plain[:, ::2], plain[:, 1::2] = digits[raw >> 4], digits[raw & 15]
    text = np.full((len(raw), 36), ord("-"), np.uint8)
    for at, (lo, hi) in zip((0, 9, 14, 19, 24), ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)), strict=True):
        text[:, at : at + hi - lo] = plain[:, lo:hi]
    return text


def _plain_hex(ids: U8) -> U8:
    return ids[:, [at for at in range(36) if at not in (8, 13, 18, 23)]]


def _whole(matrix: U8) -> tuple[U8, NDArray[np.bool_]]:
    return matrix, np.ones(matrix.shape, np.bool_)


def _same(n: int, data: bytes) -> tuple[U8, NDArray[np.bool_]]:
    return _whole(np.tile(np.frombuffer(data, np.uint8), (n, 1)))


def _text(codes: NDArray[np.generic], names: tuple[str, ...]) -> tuple[U8, NDArray[np.bool_]]:
    """Length and letters of ``names[code]``; every name is below 64 letters, so its length is one byte."""
    width = 1 + max(map(len, names))
    rows = np.zeros((len(names), width), np.uint8)
    kept = np.zeros((len(names), width), np.bool_)
    for row, name in enumerate(names):
        data = bytes([2 * len(name)]) + name.encode()
        rows[row, : len(data)], kept[row, : len(data)] = np.frombuffer(data, np.uint8), True
    return rows[codes], kept[codes]


def _digits(numbers: I64, width: int) -> tuple[U8, NDArray[np.bool_]]:
    powers = 10 ** np.arange(width - 1, -1, -1)
    return _whole((numbers[:, None] // powers % 10 + ord("0")).astype(np.uint8))


def _varint(numbers: I64) -> tuple[U8, NDArray[np.bool_]]:
    """Avro's zigzag varint of numbers that are not negative."""
    zigzag = 2 * numbers
    width = max(1, -(-int(zigzag.max(initial=0)).bit_length() // 7))
    shifted = zigzag[:, None] >> (7 * np.arange(width))
    kept = shifted > 0
    kept[:, 0] = True
    more = np.concatenate([kept[:, 1:], np.zeros((len(numbers), 1), np.bool_)], axis=1)
    return ((shifted & 0x7F) | (more << 7)).astype(np.uint8), kept
