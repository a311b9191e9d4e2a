"""Columns of byte strings (`Spans`) gathered, cut and put in order without an object per row where none is needed."""

from __future__ import annotations

from typing import Final

import numpy as np

from streamproc.avro.recordbatch import Spans
from streamproc.core.batch import I64, U8
from streamproc.core.hash128 import U64, compiled

__all__ = ["byte_order", "cut", "gather"]

_WORDS_MAX: Final = 8
"""Words of eight bytes that a column is put in order by; each takes an array as long as the column. Longer byte strings,
one among many is enough, are compared as objects."""


def gather(column: Spans, rows: I64) -> Spans:
    """The byte strings of ``rows`` (no nulls), one behind the other."""
    starts, lengths = column.start[rows], column.length[rows]
    out = np.empty(int(lengths.sum()), np.uint8)
    if len(out):
        _copy_spans(column.buffer, starts, lengths, out)
    return Spans(out, np.cumsum(lengths) - lengths, lengths)


def cut(column: Spans) -> list[bytes]:
    """Each byte string (no nulls) as an object of its own."""
    data = column.buffer.tobytes()
    ends = (column.start + column.length).tolist()
    return [data[start:end] for start, end in zip(column.start.tolist(), ends, strict=True)]


def byte_order(column: Spans) -> I64:
    """The places of the byte strings in ascending order, as Python sorts ``bytes``."""
    rows = len(column.start)
    words = -(-int(column.length.max()) // 8) if rows else 0
    if words > _WORDS_MAX:
        values = cut(column)
        return np.array(sorted(range(rows), key=values.__getitem__), np.int64)
    # Behind equal bytes the shorter one is less: missing bytes count as 0, and the length decides last.
    keys: list[U64 | I64] = [column.length]
    for word in range(words - 1, -1, -1):
        found = np.empty(rows, np.uint64)
        _read_words(column.buffer, column.start, column.length, 8 * word, found)
        keys.append(found)
    telling = [key for key in keys if (key != key[0]).any()] if rows else []
    order: I64 = np.lexsort(telling) if telling else np.arange(rows)
    return order


@compiled
def _copy_spans(buffer: U8, starts: I64, lengths: I64, out: U8) -> None:
    to = 0
    for i in range(len(starts)):
        start = starts[i]
        for at in range(lengths[i]):
            out[to + at] = buffer[start + at]
        to += lengths[i]


@compiled
def _read_words(buffer: U8, starts: I64, lengths: I64, skip: int, out: U64) -> None:
    """Eight bytes of each byte string from ``skip`` on as a big-endian number; bytes that are not there are 0."""
    for i in range(len(starts)):
        word = np.uint64(0)
        for at in range(skip, min(skip + 8, lengths[i])):
            word |= np.uint64(buffer[starts[i] + at]) << np.uint64(8 * (7 - (at - skip)))
        out[i] = word
