"""Batches of records to columns: only the columns asked for, every record judged whole, a bad one costing itself only.

Records of one batch may come from several writer schemas, and be read by the compiled kernel or the plain decoder (see
`reading`). The verdict on a record is the same on both and does not depend on which columns are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import Final

import numpy as np
import polars as pl

from streamproc.avro.columns import (
    ColumnType,
    Mask,
    TextStrategy,
    column_type,
    columns_of,
    dtype_of,
    hash_column,
    hashable,
    series_of,
    storage_series,
)
from streamproc.avro.reading import BadRecord, Group, Reading
from streamproc.avro.registry import Registry
from streamproc.avro.schema import Schema
from streamproc.core.batch import RawBatch
from streamproc.core.errors import UserError
from streamproc.core.hash128 import Hashes, hash_series

__all__ = ["ROW", "BadRecord", "Decoded", "Decoder", "Use", "columns_of", "dtype_of", "hash_names"]

ROW: Final = "__row"
"""Column of the record's index in its batch, UInt32."""


class Use(Flag):
    """What a column is needed for: its values, or 128-bit hashes of them (keys that are only compared)."""

    VALUE = auto()
    HASH = auto()


@dataclass(frozen=True)
class Decoded:
    """The good records of a batch in their order, and the bad ones."""

    frame: pl.DataFrame
    bad: list[BadRecord]


def hash_names(column: str) -> tuple[str, str]:
    """Names of the two UInt64 columns that hold the hashes of ``column``."""
    return f"__hi:{column}", f"__lo:{column}"


class Decoder:
    """Decodes the batches of one topic; not shared between threads.

    ``columns`` are the top-level fields of ``reader`` wanted, with their use; a misspelt one is a `UserError`, as is
    one that cannot be a column or, for `Use.HASH`, not a key. Fields that the writer lacks have the reader's default.
    """

    def __init__(self, reader: Schema, registry: Registry, columns: Mapping[str, Use]) -> None:
        self._columns = dict(columns)
        self._types = {name: column_type(reader, name) for name in columns}
        for name, use in columns.items():
            if Use.HASH in use and not hashable(self._types[name]):
                fact = f"Column {name!r} of {reader.source} is {self._types[name].dtype} and cannot be a key."
                raise UserError(fact, remedy="Use a column of text, numbers, booleans, dates or times as the key.")
        self._reading = Reading(reader, registry, self._types)
        self._texts = {name: TextStrategy() for name in columns}

    @property
    def schema(self) -> dict[str, pl.DataType]:
        """Names and types of the columns of `Decoded.frame`."""
        found: dict[str, pl.DataType] = {ROW: pl.UInt32()}
        for name, use in self._columns.items():
            if Use.VALUE in use:
                found[name] = self._types[name].dtype
            if Use.HASH in use:
                found |= dict.fromkeys(hash_names(name), pl.UInt64())
        return found

    def decode(self, batch: RawBatch) -> Decoded:
        """Columns of the good records. Never raises for what is in a record."""
        groups, bad = self._reading.read(batch)
        frames = [pl.DataFrame(list(self._series(group))) for group in groups if len(group.rows)]
        if not frames:
            return Decoded(pl.DataFrame(schema=self.schema), bad)
        frame = frames[0] if len(frames) == 1 else pl.concat(frames).sort(ROW)
        return Decoded(frame, bad)

    def _series(self, group: Group) -> Iterable[pl.Series]:
        yield pl.Series(ROW, group.rows.astype(np.uint32))
        for name, use in self._columns.items():
            type_, column, series = self._types[name], group.columns.get(name), None
            if Use.VALUE in use:
                series = self._values(name, type_, group)
                yield series
            if Use.HASH in use and column is not None:
                hashes = hash_column(type_, group.buffer, column.raw, column.valid)
                yield from _hash_columns(name, hashes, column.valid)
            elif Use.HASH in use:
                series = self._values(name, type_, group) if series is None else series
                yield from _hash_columns(name, hash_series(series), series.is_not_null().to_numpy())

    def _values(self, name: str, type_: ColumnType, group: Group) -> pl.Series:
        column = group.columns.get(name)
        if column is not None:
            return series_of(name, type_, group.buffer, column.raw, column.valid, self._texts[name])
        if group.values is not None:
            return storage_series(name, type_, group.values[name])
        return storage_series(name, type_, [group.defaults[name]]).new_from_index(0, len(group.rows))


def _hash_columns(name: str, hashes: Hashes, valid: Mask) -> Iterable[pl.Series]:
    for column, words in zip(hash_names(name), hashes, strict=True):
        series = pl.Series(column, words)
        yield series if valid.all() else series.set(pl.Series(~valid), None)
