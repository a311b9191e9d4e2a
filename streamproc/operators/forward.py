"""Records that go on to a topic as they came: noted batch by batch, made columns at the end of the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from streamproc.avro.recordbatch import Columns, Spans
from streamproc.core.batch import I64, RawBatch

__all__ = ["Forward"]

_Part: TypeAlias = tuple[RawBatch, I64]
"""A batch, and which of its records."""


class Forward:
    """What one task sends to one topic. `add` is called for every batch, `take` at the end of an epoch; an epoch that
    does not commit ends with `drop`.

    No byte is copied here, but for records that came by several branches: a batch of which any record goes on is held
    whole until it is written, and counted so.
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self.size_bytes = 0

    def add(self, batch: RawBatch, rows: I64) -> None:
        """The given ``rows`` (ascending) of ``batch`` go on; none at all is right too."""
        if not len(rows):
            return
        if not self._parts or self._parts[-1][0].buffer is not batch.buffer:
            self.size_bytes += batch.buffer.nbytes
        self._parts.append((batch, rows))

    def take(self) -> list[Columns]:
        """Everything since the last call, in offset order (a record that came by two branches is there twice): how the
        epoch was cut into batches must not show. One part for each batch where that is the order already."""
        parts = self._parts
        self.drop()
        if all(one.offsets[rows[-1]] <= other.offsets[more[0]] for (one, rows), (other, more) in pairwise(parts)):
            return [Columns.of(batch, rows) for batch, rows in parts]
        offsets = np.concatenate([batch.offsets[rows] for batch, rows in parts])
        return [_joined(parts).part(np.argsort(offsets, kind="stable"))]

    def drop(self) -> None:
        """Forget the open epoch."""
        self._parts, self.size_bytes = [], 0


def _joined(parts: Sequence[_Part]) -> Columns:
    """The records of all ``parts`` behind each other, in one buffer that holds each batch's once."""
    starts: dict[int, int] = {}
    buffers = []
    size = 0
    for batch, _ in parts:
        if id(batch.buffer) not in starts:
            starts[id(batch.buffer)] = size
            buffers.append(batch.buffer)
            size += len(batch.buffer)
    buffer = buffers[0] if len(buffers) == 1 else np.concatenate(buffers)
    found = [Columns.of(batch, rows) for batch, rows in parts]
    moved = [starts[id(batch.buffer)] for batch, _ in parts]

    def column(spans: Sequence[Spans]) -> Spans:
        start = np.concatenate([one.start + by for one, by in zip(spans, moved, strict=True)])
        return Spans(buffer, start, np.concatenate([one.length for one in spans]))

    return Columns(
        column([columns.keys for columns in found]), column([columns.values for columns in found]),
        column([columns.headers for columns in found]), np.concatenate([columns.timestamps for columns in found]),
    )  # fmt: skip
