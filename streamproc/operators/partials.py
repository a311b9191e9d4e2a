"""What travels through a repartition topic: group keys and partial aggregates as bytes. Format 1 is final.

A payload is::

    u16 length, PartialHeader as msgpack | u32 rows | u16 columns | columns…        (little-endian)
    column: u8 kind | u32 length of its body | body
    body:   INT64  8 bytes a row
            BYTES  u32 length of each row's value, then the values
            FIXED  the same number of bytes for every row

Column 0 holds window starts, column 1 group keys, then each aggregate's in the plan's order (`accumulators`). The same
group may stand in several rows of one epoch: rows are merged, never replaced.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import polars as pl

from streamproc.core.batch import I64
from streamproc.core.errors import invariant
from streamproc.operators.contract import PartialHeader

__all__ = [
    "BYTES",
    "FIXED",
    "FORMAT",
    "INT64",
    "Column",
    "PartialRows",
    "decode_group_key",
    "decode_partial",
    "encode_group_key",
    "encode_group_keys",
    "encode_partial",
    "fixed_column",
    "group_key_columns",
    "int64_column",
    "physical_of",
    "texts_column",
]

FORMAT: Final = 1
INT64: Final = 0
BYTES: Final = 1
FIXED: Final = 2

_HEAD = struct.Struct("<H")
_SIZES = struct.Struct("<IH")
_COLUMN = struct.Struct("<BI")
_encoder = msgspec.msgpack.Encoder()
_decode_header = msgspec.msgpack.Decoder(PartialHeader).decode
_decode_key = msgspec.msgpack.Decoder(list[Any]).decode


def encode_group_key(values: Iterable[object], keys: Mapping[str, pl.DataType]) -> bytes:
    """The bytes of a group key, ``values`` in the order of ``keys``: a msgpack array of text, integers, booleans and
    nulls, dates and times as the integers Polars keeps. Where it lives is `partition_of` of these bytes."""
    physical = [
        pl.Series([value], dtype=dtype, strict=False).to_physical().item() if dtype.is_temporal() else value
        for value, dtype in zip(values, keys.values(), strict=True)
    ]
    return _encoder.encode(physical)


def decode_group_key(data: bytes, keys: Mapping[str, pl.DataType]) -> tuple[Any, ...]:
    """The values that `encode_group_key` took."""
    return tuple(column.item() for column in group_key_columns([data], keys))


def encode_group_keys(frame: pl.DataFrame, rows: int) -> list[bytes]:
    """`encode_group_key` of ``rows`` rows; the columns are the keys in order. (A frame without columns has no rows.)"""
    if not frame.width:
        return [_encoder.encode([])] * rows
    physical = [column.cast(physical_of(column.dtype)).to_list() for column in frame.get_columns()]
    return [_encoder.encode(row) for row in zip(*physical, strict=True)]


def group_key_columns(data: Sequence[bytes], keys: Mapping[str, pl.DataType]) -> list[pl.Series]:
    """Encoded keys as columns of their types, also when there are none."""
    rows = [_decode_key(key) for key in data]
    columns = []
    for at, (name, dtype) in enumerate(keys.items()):
        columns.append(pl.Series(name, [row[at] for row in rows], dtype=physical_of(dtype)).cast(dtype))
    return columns


@lru_cache(maxsize=256)
def physical_of(dtype: pl.DataType) -> pl.DataType:
    """What Polars keeps values of ``dtype`` as."""
    return pl.Series(dtype=dtype).to_physical().dtype


class Column(NamedTuple):
    """One column of a payload, encoded."""

    kind: int
    body: bytes


def int64_column(values: I64) -> Column:
    return Column(INT64, values.astype("<i8").tobytes())


def fixed_column(values: np.ndarray[Any, Any]) -> Column:
    """Rows of equal width, as the array's own bytes."""
    return Column(FIXED, values.tobytes())


def texts_column(values: Sequence[bytes]) -> Column:
    lengths = np.fromiter(map(len, values), "<u4", len(values))
    return Column(BYTES, lengths.tobytes() + b"".join(values))


def encode_partial(header: PartialHeader, rows: int, columns: Sequence[Column]) -> bytes:
    head = _encoder.encode(header)
    pieces = [_HEAD.pack(len(head)), head, _SIZES.pack(rows, len(columns))]
    for kind, body in columns:
        pieces += (_COLUMN.pack(kind, len(body)), body)
    return b"".join(pieces)


@dataclass(frozen=True)
class PartialRows:
    """The rows of one payload, read column by column."""

    rows: int
    columns: list[Column]

    def __len__(self) -> int:
        return self.rows

    def integers(self, at: int) -> I64:
        kind, body = self.columns[at]
        invariant(kind == INT64 and len(body) == 8 * self.rows, f"Column {at} of a partial is not int64.")
        return np.frombuffer(body, "<i8")

    def blobs(self, at: int) -> list[bytes]:
        kind, body = self.columns[at]
        if kind == FIXED:
            width = len(body) // self.rows if self.rows else 0
            return [body[start : start + width] for start in range(0, self.rows * width, width)] if width else []
        invariant(kind == BYTES and len(body) >= 4 * self.rows, f"Column {at} of a partial does not hold bytes.")
        ends = (4 * self.rows + np.cumsum(np.frombuffer(body, "<u4", self.rows), dtype=np.int64)).tolist()
        invariant(not ends or ends[-1] == len(body), f"Column {at} of a partial is cut short.")
        starts = [4 * self.rows, *ends[:-1]]
        return [body[start:end] for start, end in zip(starts, ends, strict=False)]

    def one(self, row: int) -> PartialRows:
        """Row ``row`` alone."""
        columns = []
        for at, (kind, _) in enumerate(self.columns):
            if kind == INT64:
                columns.append(int64_column(self.integers(at)[row : row + 1]))
            else:
                value = self.blobs(at)[row]
                columns.append(Column(FIXED, value) if kind == FIXED else texts_column([value]))
        return PartialRows(1, columns)


def decode_partial(payload: bytes) -> tuple[PartialHeader, PartialRows]:
    """Head and rows of a record from a repartition topic; bytes of another format break an invariant."""
    (length,) = _HEAD.unpack_from(payload)
    header = _decode_header(payload[_HEAD.size : _HEAD.size + length])
    invariant(header.format == FORMAT, f"A partial of table {header.table!r} has format {header.format}, not {FORMAT}.")
    at = _HEAD.size + length
    rows, count = _SIZES.unpack_from(payload, at)
    at += _SIZES.size
    columns = []
    for _ in range(count):
        kind, size = _COLUMN.unpack_from(payload, at)
        at += _COLUMN.size
        columns.append(Column(kind, payload[at : at + size]))
        at += size
    invariant(at == len(payload), f"A partial of table {header.table!r} has {len(payload)} bytes, not {at}.")
    return header, PartialRows(rows, columns)
