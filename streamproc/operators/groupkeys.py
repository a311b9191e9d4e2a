"""Group keys as bytes: a msgpack array of text, integers, booleans and nulls, dates and times as the integers Polars
keeps. These bytes say where a key lives (`core.partitioner`) and name its rows, so their form is final: every value in
its shortest spelling, integers that are not negative as unsigned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from streamproc.avro.recordbatch import Spans
from streamproc.core.batch import I64, U8
from streamproc.core.hash128 import compiled

__all__ = ["decode_group_key", "encode_group_key", "encode_group_keys", "group_key_columns", "physical_of"]

_NULL: Final = 0xC0
_FALSE: Final = 0xC2
_SMALL_COLUMNS: Final = 15
"""A msgpack array of so many tells them in its first byte."""

_encoder = msgspec.msgpack.Encoder()
_decode_key = msgspec.msgpack.Decoder(list[Any]).decode


def encode_group_key(values: Iterable[object], keys: Mapping[str, pl.DataType]) -> bytes:
    """The bytes of a group key, ``values`` in the order of ``keys``."""
    physical = [
        pl.Series([value], dtype=dtype, strict=False).to_physical().item() if dtype.is_temporal() else value
        for value, dtype in zip(values, keys.values(), strict=True)
    ]
    return _encoder.encode(physical)


def decode_group_key(data: bytes, keys: Mapping[str, pl.DataType]) -> tuple[Any, ...]:
    """The values that `encode_group_key` took."""
    return tuple(column.item() for column in group_key_columns([data], keys))


def encode_group_keys(frame: pl.DataFrame, rows: int) -> Spans:
    """`encode_group_key` of ``rows`` rows; the columns are the keys in order. (A frame without columns has no rows.)"""
    head = _encoder.encode([None] * frame.width)[: 1 if frame.width <= _SMALL_COLUMNS else 3]
    parts = [_Column(column.cast(physical_of(column.dtype))) for column in frame.get_columns()]
    lengths = np.full(rows, len(head), np.int64)
    for part in parts:
        lengths += part.sizes
    starts = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), np.uint8)
    for at, byte in enumerate(head):
        out[starts + at] = byte
    to = starts + len(head)
    for part in parts:
        part.write(out, to)
        to += part.sizes
    return Spans(out, starts, lengths)


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


class _Column:
    """One column of text, integers or booleans on its way into keys."""

    def __init__(self, column: pl.Series) -> None:
        self._dtype = column.dtype
        self._nulls = column.is_null().to_numpy(writable=True)
        self.sizes = np.ones(len(column), np.int64)
        """Bytes of each value."""
        if self._dtype == pl.String:
            self._lengths = column.str.len_bytes().cast(pl.Int64).fill_null(-1).to_numpy(writable=True)
            self._texts = bytearray(column.str.join("").item() or "", "utf-8")
            self._texts.append(0)  # numpy takes no view of nothing
            _text_sizes(self._lengths, self.sizes)
        elif self._dtype != pl.Boolean:
            filled = column.fill_null(0)
            self._unsigned = self._dtype == pl.UInt64
            self._values = filled.to_numpy(writable=True).view(np.int64) if self._unsigned else (
                filled.cast(pl.Int64).to_numpy(writable=True)
            )  # fmt: skip
            _integer_sizes(self._values, self._nulls, self._unsigned, self.sizes)
        else:
            self._flags = column.fill_null(False).to_numpy().astype(np.uint8)

    def write(self, out: U8, to: I64) -> None:
        """Each value at its place ``to``."""
        if self._dtype == pl.String:
            _write_texts(np.frombuffer(self._texts, np.uint8), self._lengths, out, to)
        elif self._dtype != pl.Boolean:
            _write_integers(self._values, self._nulls, self._unsigned, self.sizes, out, to)
        else:
            out[to] = np.where(self._nulls, _NULL, _FALSE + self._flags).astype(np.uint8)


@compiled
def _text_sizes(lengths: I64, sizes: I64) -> None:
    for i in range(len(lengths)):
        n = lengths[i]
        if n < 0:
            sizes[i] = 1
        else:
            sizes[i] = n + (1 if n < 32 else 2 if n < 256 else 3 if n < 65536 else 5)


@compiled
def _write_texts(texts: U8, lengths: I64, out: U8, to: I64) -> None:
    start = 0
    for i in range(len(lengths)):
        n, at = lengths[i], to[i]
        if n < 0:
            out[at] = 0xC0
            continue
        if n < 32:
            out[at] = 0xA0 | n
            at += 1
        else:
            width = 1 if n < 256 else 2 if n < 65536 else 4
            out[at] = 0xD9 if width == 1 else 0xDA if width == 2 else 0xDB
            at += 1
            for byte in range(width - 1, -1, -1):
                out[at] = (n >> (8 * byte)) & 0xFF
                at += 1
        for byte in range(n):
            out[at + byte] = texts[start + byte]
        start += n


@compiled
def _integer_sizes(values: I64, nulls: NDArray[np.bool_], unsigned: bool, sizes: I64) -> None:
    """1 for what fits its first byte, else 1 more than its bytes: 3, 5 and 9 with a negative sign as well as without."""
    for i in range(len(values)):
        value = values[i]
        if nulls[i]:
            sizes[i] = 1
        elif unsigned and value < 0:
            sizes[i] = 9
        elif value < 0:
            sizes[i] = (
                1 if value >= -32 else 2 if value >= -128 else 3 if value >= -32768 else 5 if value >= -(1 << 31) else 9
            )
        else:
            sizes[i] = 1 if value < 128 else 2 if value < 256 else 3 if value < 65536 else 5 if value < 1 << 32 else 9


@compiled
def _write_integers(values: I64, nulls: NDArray[np.bool_], unsigned: bool, sizes: I64, out: U8, to: I64) -> None:
    for i in range(len(values)):
        at, size, value = to[i], sizes[i], values[i]
        if nulls[i]:
            out[at] = 0xC0
        elif size == 1:
            out[at] = value & 0xFF
        else:
            step = 0 if size == 2 else 1 if size == 3 else 2 if size == 5 else 3
            out[at] = (0xCC if value >= 0 or unsigned else 0xD0) + step
            for byte in range(size - 1):
                out[at + 1 + byte] = (value >> (8 * (size - 2 - byte))) & 0xFF
