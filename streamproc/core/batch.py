"""Records of one topic partition as columns of spans into one buffer: what a transport hands up, before any decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamproc.core.types import Offset, TopicPartition

__all__ = ["BUFFER_SLACK", "I64", "U8", "Headers", "RawBatch", "headers_of"]

I64: TypeAlias = NDArray[np.int64]
U8: TypeAlias = NDArray[np.uint8]
Headers: TypeAlias = tuple[tuple[str, bytes | None], ...]

BUFFER_SLACK = 8
"""Bytes past the last record that a kernel may load (never use) as part of an eight-byte word."""


@dataclass(slots=True)
class RawBatch:
    """Consecutive readable records of one topic partition, still bytes.

    Control records, aborted ranges and offsets below the fetch position are already gone. All arrays have one entry a
    record; spans are byte positions in ``buffer`` (which has `BUFFER_SLACK` bytes behind its last record), a length of
    -1 is a null key or value.
    """

    tp: TopicPartition
    buffer: U8
    offsets: I64
    timestamps: I64
    """The Kafka records' own timestamps, ms."""
    key_start: I64
    key_len: I64
    value_start: I64
    value_len: I64
    headers_start: I64
    """Where the record's header count (a varint) begins; the headers end where the record ends."""
    headers_end: I64
    next_position: Offset
    """Where reading goes on: past control batches and aborted ranges behind the last record."""

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, row: int) -> bytes | None:
        return self._span(int(self.key_start[row]), int(self.key_len[row]))

    def value(self, row: int) -> bytes | None:
        return self._span(int(self.value_start[row]), int(self.value_len[row]))

    def headers(self, row: int) -> Headers:
        """Decoded on demand: few records are ever asked for theirs."""
        return headers_of(self.buffer[int(self.headers_start[row]) : int(self.headers_end[row])].tobytes())

    def rows(self, lo: int, hi: int) -> RawBatch:
        """Records ``lo`` to ``hi`` (exclusive) of this batch, sharing its buffer."""
        last = hi >= len(self)
        cut = slice(lo, hi)
        return RawBatch(
            self.tp, self.buffer, self.offsets[cut], self.timestamps[cut], self.key_start[cut], self.key_len[cut],
            self.value_start[cut], self.value_len[cut], self.headers_start[cut], self.headers_end[cut],
            self.next_position if last else Offset(int(self.offsets[hi])),
        )  # fmt: skip

    def _span(self, start: int, length: int) -> bytes | None:
        return None if length < 0 else self.buffer[start : start + length].tobytes()


def headers_of(data: bytes) -> Headers:
    """The headers of one record, out of their bytes: a count, then names and values."""
    count, at = _varint(data, 0)
    found: list[tuple[str, bytes | None]] = []
    for _ in range(count):
        size, at = _varint(data, at)
        name = data[at : at + size].decode("utf-8", "replace")
        size, at = _varint(data, at + size)
        found.append((name, data[at : at + size] if size >= 0 else None))
        at += max(size, 0)
    return tuple(found)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    shift = result = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (result >> 1) ^ -(result & 1), at
        shift += 7
