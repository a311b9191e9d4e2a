"""Records as objects for per-record agents: a Struct class per record schema, filled from decoded columns.

Attributes are the schema's fields; timestamps are aware datetimes in UTC (naive ones for local timestamps), enums are
text, decimals `Decimal`, nested records Structs, arrays lists and maps dicts.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, tzinfo
from itertools import repeat
from typing import Any, Final, cast

import msgspec
import numpy as np

from streamproc.avro.columns import ColumnType, Mask, column_type, is_flat, read_bytes, read_texts
from streamproc.avro.encode import Encoder
from streamproc.avro.faults import Fault, Malformed, describe
from streamproc.avro.kernel import pack_moments
from streamproc.avro.reading import BadRecord, Group, RawColumn, Reading
from streamproc.avro.registry import Registry
from streamproc.avro.schema import MISSING, Field, Primitive, Record, Schema
from streamproc.avro.strict import Shape, shaped
from streamproc.core.batch import I64, U8, RawBatch
from streamproc.core.errors import UserError

__all__ = ["Encoder", "RowDecoder", "struct_class"]

_EPOCH_DAY: Final = date(1970, 1, 1).toordinal()
_DAYS: Final = (date.min.toordinal() - _EPOCH_DAY, date.max.toordinal() - _EPOCH_DAY)
_DAY_MS: Final = 86_400_000
_again = cast(Callable[[bytes, tzinfo], datetime], datetime)
"""A datetime of its ten bytes, as a pickled one is made again: a quarter of what any other way costs."""


_UNITS: Final = {
    "date": ("D", 1),
    "timestamp-millis": ("ms", _DAY_MS),
    "timestamp-micros": ("us", _DAY_MS * 1000),
    "local-timestamp-millis": ("ms", _DAY_MS),
    "local-timestamp-micros": ("us", _DAY_MS * 1000),
}
"""numpy's name of a time's unit, and how many make a day."""


def struct_class(record: Record) -> type[msgspec.Struct]:
    """The Struct class of a record schema: its fields in order, positional, all required."""
    flat = all(is_flat(f.type) for f in record.fields)
    name = record.name.rpartition(".")[2]
    # Instances without containers cannot be in a reference cycle: the garbage collector need not look at them.
    return msgspec.defstruct(name, [(f.name, Any) for f in record.fields], gc=not flat)


class RowDecoder:
    """Decodes the batches of one topic to Structs; not shared between threads.

    A record whose time Python cannot hold (years 1 to 9999) is a bad record here, unlike in a column.
    """

    def __init__(self, reader: Schema, registry: Registry) -> None:
        self._shape = _Structs()
        self._make = self._shape.class_of(reader.root)
        self._defaults = {f.name: self._default(f, reader) for f in reader.root.fields if f.default is not MISSING}
        self._types: dict[str, ColumnType] = {}
        if all(is_flat(field.type) for field in reader.root.fields):
            self._types = {name: column_type(reader, name) for name in reader.names()}
        self._reading = Reading(reader, registry, self._types or None, self._shape)

    def _default(self, field: Field, reader: Schema) -> Any:
        try:
            return shaped(self._shape, field.type, field.default, field.name)
        except Malformed as error:
            fact = f"A default of the schema {reader.source} cannot be used: {error}."
            raise UserError(fact, remedy="Mend the schema's default.") from error

    def rows(self, batch: RawBatch) -> tuple[list[Any], list[BadRecord]]:
        """The values of the good records in order, and the bad records. Never raises for what is in a record."""
        groups, bad = self._reading.read(batch)
        numbered: list[tuple[list[int], list[Any]]] = []
        for group in groups:
            numbered.append((group.rows.tolist(), self._values(group, bad)))
        if len(numbered) == 1:
            return numbered[0][1], sorted(bad)
        pairs = sorted((pair for rows, values in numbered for pair in zip(rows, values, strict=True)), key=_row)
        return [value for _, value in pairs], sorted(bad)

    def _values(self, group: Group, bad: list[BadRecord]) -> list[Any]:
        if group.records is not None:
            return group.records
        _drop_unspeakable_times(group, self._types, bad)
        columns = [self._members(name, type_, group) for name, type_ in self._types.items()]
        return list(map(self._make, *columns))

    def _members(self, name: str, type_: ColumnType, group: Group) -> list[Any]:
        column = group.columns.get(name)
        if column is None:
            return [self._defaults[name]] * len(group.rows)
        return _members_of(type_, group.buffer, column.raw, column.valid)


def _row(pair: tuple[int, Any]) -> int:
    return pair[0]


class _Structs(Shape):
    """Decoded records as Structs, times as datetimes, maps as dicts."""

    def __init__(self) -> None:
        self._classes: dict[int, type[msgspec.Struct]] = {}

    def class_of(self, record: Record) -> type[msgspec.Struct]:
        made = self._classes.get(id(record))
        if made is None:
            made = self._classes[id(record)] = struct_class(record)
        return made

    def number(self, value: int, target: Primitive, path: str) -> Any:
        if target.logical is None:
            return value
        raw = np.array([value], np.int64)
        if _outside(raw, target.logical)[0]:
            raise Malformed(describe(Fault.TIME, path, value, target.logical))
        return _times(raw, target.logical)[0]

    def entries(self, pairs: list[tuple[str, Any]]) -> Any:
        return dict(pairs)

    def record(self, target: Record, values: dict[str, Any]) -> Any:
        return self.class_of(target)(*[values[f.name] for f in target.fields])


def _members_of(type_: ColumnType, buffer: U8, raw: I64, valid: Mask) -> list[Any]:
    """One column from the kernel as Python values."""
    match type_.kind:
        case "text":
            return read_texts(buffer, raw, valid)
        case "bytes":
            return read_bytes(buffer, raw, valid)
        case "enum":
            members: list[Any] = [type_.symbols[i] for i in raw.tolist()]
        case "float":
            members = raw.view(np.float64).tolist()
        case "bool":
            members = raw.astype(np.bool_).tolist()
        case _:
            members = _times(raw, type_.logical) if type_.logical else raw.tolist()
    if not valid.all():
        for row in np.flatnonzero(~valid).tolist():
            members[row] = None
    return members


def _times(raw: I64, logical: str) -> list[Any]:
    """Dates and times of integers that are not `_outside`."""
    unit, day = _UNITS[logical]
    if logical.startswith("timestamp"):
        packed = np.empty(10 * len(raw), np.uint8)
        pack_moments(np.ascontiguousarray(raw), day, packed)
        return list(map(_again, packed.view("V10").tolist(), repeat(UTC)))
    times: list[Any] = raw.astype(f"datetime64[{unit}]").tolist()
    return times


def _outside(raw: I64, logical: str) -> Mask:
    """Which times Python cannot hold."""
    days = raw // _UNITS[logical][1]
    return (days < _DAYS[0]) | (days > _DAYS[1])


def _drop_unspeakable_times(group: Group, types: dict[str, ColumnType], bad: list[BadRecord]) -> None:
    """Move records with a time outside of Python's years from the group to ``bad``."""
    for name, type_ in types.items():
        column = group.columns.get(name)
        if type_.logical is None or column is None:
            continue
        outside = _outside(column.raw, type_.logical) & column.valid
        if outside.any():
            for i in np.flatnonzero(outside).tolist():
                reason = describe(Fault.TIME, name, int(column.raw[i]), type_.logical)
                bad.append(BadRecord(int(group.rows[i]), reason, group.schema_id))
            _keep(group, ~outside)


def _keep(group: Group, which: Any) -> None:
    group.rows = group.rows[which]
    for name, (raw, valid) in group.columns.items():
        group.columns[name] = RawColumn(raw[which], valid[which])
