"""What travels through a repartition topic: partial aggregates as bytes. Format 1 is final.

A payload is::

    u16 length, PartialHeader as msgpack | u32 rows | u16 columns | columns…        (little-endian)
    column: u8 kind | u32 length of its body | body
    body:   INT64  8 bytes a row
            BYTES  u32 length of each row's value, then the values
            FIXED  the same number of bytes for every row

Column 0 holds window starts, column 1 group keys (`groupkeys`), then each aggregate's in the plan's order
(`accumulators`). The same group may stand in several rows of one epoch: rows are merged, never replaced.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from streamproc.avro.recordbatch import Spans
from streamproc.core.batch import I64
from streamproc.core.errors import invariant
from streamproc.operators.bytecolumns import cut, gather
from streamproc.operators.contract import PartialHeader

__all__ = [
    "BYTES",
    "FIXED",
    "FORMAT",
    "INT64",
    "Column",
    "PartialRows",
    "decode_partial",
    "encode_partial",
    "fixed_column",
    "int64_column",
    "spans_column",
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


def spans_column(values: Spans, rows: I64) -> Column:
    """The ``rows`` of a column of byte strings (no nulls)."""
    gathered = gather(values, rows)
    return Column(BYTES, gathered.length.astype("<u4").tobytes() + gathered.buffer.tobytes())


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
        return np.frombuffer(body, "<i8").astype(np.int64)  # of its own: kernels are compiled for arrays they may write

    def spans(self, at: int) -> Spans:
        """A column of bytes as places in one buffer."""
        kind, body = self.columns[at]
        if kind == FIXED:
            width = len(body) // self.rows if self.rows else 0
            lengths = np.full(self.rows, width, np.int64)
            return Spans(np.frombuffer(bytearray(body), np.uint8), np.arange(self.rows) * width, lengths)
        invariant(kind == BYTES and len(body) >= 4 * self.rows, f"Column {at} of a partial does not hold bytes.")
        lengths = np.frombuffer(body, "<u4", self.rows).astype(np.int64)
        starts = 4 * self.rows + np.cumsum(lengths) - lengths
        invariant(4 * self.rows + int(lengths.sum()) == len(body), f"Column {at} of a partial is cut short.")
        return Spans(np.frombuffer(bytearray(body), np.uint8), starts, lengths)

    def blobs(self, at: int) -> list[bytes]:
        """`spans` cut out."""
        return cut(self.spans(at))

    def take(self, rows: I64) -> PartialRows:
        """Only these rows."""
        columns = []
        for at, (kind, _) in enumerate(self.columns):
            if kind == INT64:
                columns.append(int64_column(self.integers(at)[rows]))
            else:
                column = spans_column(self.spans(at), rows)
                columns.append(Column(FIXED, column.body[4 * len(rows) :]) if kind == FIXED else column)
        return PartialRows(len(rows), columns)

    def singles(self) -> list[PartialRows]:
        """Each row alone; every column is cut once."""
        columns = []
        for at, (kind, body) in enumerate(self.columns):
            if kind == INT64:
                columns.append([Column(kind, body[start : start + 8]) for start in range(0, len(body), 8)])
            elif kind == FIXED:
                columns.append([Column(kind, value) for value in self.blobs(at)])
            else:
                columns.append([texts_column([value]) for value in self.blobs(at)])
        return [PartialRows(1, list(row)) for row in zip(*columns, strict=True)]


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
