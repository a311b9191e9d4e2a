"""Columns of decoded records: their Polars types, and how the kernel's integers become series."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from streamproc.avro.kernel import intern_spans, pack_texts
from streamproc.avro.schema import Array, AvroType, Enum, Field, Fixed, MapOf, Primitive, Record, Schema, Union
from streamproc.core.batch import I64, U8
from streamproc.core.errors import UserError
from streamproc.core.hash128 import Hashes, hash_float64, hash_int64, hash_series, hash_spans

__all__ = [
    "ColumnType",
    "TextStrategy",
    "column_type",
    "columns_of",
    "dtype_of",
    "hash_column",
    "hashable",
    "is_flat",
    "read_bytes",
    "read_texts",
    "series_of",
    "storage_series",
]

Kind: TypeAlias = Literal["null", "int", "float", "bool", "text", "bytes", "enum", "other"]
Mask: TypeAlias = NDArray[np.bool_]

_DTYPES: Final[dict[str, pl.DataType]] = {
    "null": pl.Null(),
    "boolean": pl.Boolean(),
    "int": pl.Int64(),
    "long": pl.Int64(),
    "float": pl.Float64(),
    "double": pl.Float64(),
    "bytes": pl.Binary(),
    "fixed": pl.Binary(),
    "string": pl.String(),
    "enum": pl.String(),
}
_LOGICAL_DTYPES: Final[dict[str, pl.DataType]] = {
    "date": pl.Date(),
    "timestamp-millis": pl.Datetime("ms", "UTC"),
    "timestamp-micros": pl.Datetime("us", "UTC"),
    "local-timestamp-millis": pl.Datetime("ms"),
    "local-timestamp-micros": pl.Datetime("us"),
}
_KINDS: Final[dict[str, Kind]] = {
    "null": "null", "boolean": "bool", "int": "int", "long": "int", "float": "float", "double": "float",
    "bytes": "bytes", "fixed": "bytes", "string": "text", "enum": "enum",
}  # fmt: skip


@dataclass(frozen=True)
class ColumnType:
    """A top-level field as a column. ``kind`` "other": only the plain decoder makes it."""

    kind: Kind
    dtype: pl.DataType
    storage: pl.DataType
    """As decoded, before dates and times are made of integers."""
    logical: str | None = None
    symbols: tuple[str, ...] = ()
    """Of an enum, the reader's."""


def dtype_of(schema: Schema, column: str) -> pl.DataType:
    """The Polars type of a column; `UserError` if there is no such field, or if it cannot be a column."""
    return column_type(schema, column).dtype


def column_type(schema: Schema, column: str) -> ColumnType:
    """Like `dtype_of`, with how it is decoded."""
    field = schema.field(column)
    if field is None:
        near = difflib.get_close_matches(column, schema.names(), n=3) or schema.names()
        fact = f"There is no column {column!r} in the schema {schema.source}."
        raise UserError(fact, remedy=f"Did you mean {' or '.join(map(repr, near))}?")
    branches = [b for b in _branches(field.type) if b.kind != "null"]
    dtype, storage = _dtype(field.type, schema, field, final=True), _dtype(field.type, schema, field, final=False)
    if not branches:
        return ColumnType("null", dtype, storage)
    if not is_flat(field.type):
        return ColumnType("other", dtype, storage)
    first = branches[0]
    symbols = first.symbols if isinstance(first, Enum) else ()
    logical = first.logical if isinstance(first, Primitive) else None
    return ColumnType(_KINDS[first.kind], dtype, storage, logical, symbols)


def columns_of(schema: Schema) -> dict[str, pl.DataType]:
    """Every top-level field that can be a column, with its type."""
    found = {}
    for name in schema.names():
        try:
            found[name] = dtype_of(schema, name)
        except UserError:
            continue  # A union of several types, or a recursive one: `dtype_of` tells whoever asks for it.
    return found


def is_flat(type_: AvroType) -> bool:
    """Whether the kernel can make a column of it: one scalar type but decimal, perhaps nullable."""
    branches = [b for b in _branches(type_) if b.kind != "null"]
    kinds = {"other" if _is_nested(b) else _KINDS[b.kind] for b in branches}
    if "other" in kinds or len(kinds) > 1 or (kinds == {"enum"} and len(branches) > 1):
        return False
    return len({getattr(b, "logical", None) for b in branches}) <= 1


def _branches(type_: AvroType) -> Sequence[AvroType]:
    return type_.branches if isinstance(type_, Union) else (type_,)


def _is_nested(type_: AvroType) -> bool:
    return isinstance(type_, (Record, Array, MapOf)) or getattr(type_, "logical", None) == "decimal"


def _dtype(type_: AvroType, schema: Schema, field: Field, *, final: bool, inside: tuple[str, ...] = ()) -> pl.DataType:
    """The Polars type; with ``final`` false that of the storage values."""

    def of(part: AvroType) -> pl.DataType:
        return _dtype(part, schema, field, final=final, inside=inside)

    match type_:
        case Union():
            found = [of(branch) for branch in type_.branches if branch.kind != "null"]
            if any(dtype != found[0] for dtype in found):
                kinds = " and ".join(branch.kind for branch in type_.branches)
                raise _no_column(schema, field, f"a union of {kinds}", "a union of null and one type")
            return found[0] if found else pl.Null()
        case Record():
            if type_.name in inside:
                raise _no_column(schema, field, f"the recursive type {type_.name}", "a type of finite depth")
            inside = (*inside, type_.name)
            return pl.Struct([pl.Field(f.name, of(f.type)) for f in type_.fields])
        case Array():
            return pl.List(of(type_.items))
        case MapOf():
            return pl.List(pl.Struct([pl.Field("key", pl.String()), pl.Field("value", of(type_.values))]))
        case Primitive() | Fixed() if type_.logical == "decimal":
            return pl.Decimal(type_.precision, type_.scale)
        case Primitive() if final and type_.logical is not None:
            return _LOGICAL_DTYPES[type_.logical]
    return _DTYPES[type_.kind]


def _no_column(schema: Schema, field: Field, what: str, rather: str) -> UserError:
    fact = f"Field {field.name!r} of the schema {schema.source} holds {what}, which cannot be a column."
    return UserError(fact, remedy=f"Use {rather}, or read the topic with a per-record agent.")


class TextStrategy:
    """Whether to intern a text column: it pays while a batch repeats its values. Tried again now and then."""

    def __init__(self) -> None:
        self.rest = 0

    def try_interning(self) -> bool:
        self.rest -= 1
        return self.rest < 0

    def gave_up(self) -> None:
        self.rest = _BATCHES_WITHOUT_INTERNING


_BATCHES_WITHOUT_INTERNING: Final = 32
_DISTINCT_MIN: Final = 16
"""So many distinct texts may be interned in however small a batch."""


def series_of(name: str, type_: ColumnType, buffer: U8, raw: I64, valid: Mask, text: TextStrategy) -> pl.Series:
    """One column of kernel output (see `kernel.run`) as a series of its final type."""
    whole = bool(valid.all())
    match type_.kind:
        case "text":
            return _text_series(name, buffer, raw, valid, text, whole)
        case "bytes":
            return pl.Series(name, read_bytes(buffer, raw, valid), dtype=pl.Binary)
        case "enum":
            codes = pl.Series(name, raw).cast(pl.UInt32)
            return pl.Series(name, type_.symbols, dtype=pl.String).gather(_nulled(codes, valid, whole))
        case "null":
            return pl.Series(name, [None] * len(raw), dtype=pl.Null)
        case "float":
            series = pl.Series(name, raw.view(np.float64))
        case "bool":
            series = pl.Series(name, raw.astype(np.bool_))
        case _:
            series = pl.Series(name, raw)
    series = _nulled(series, valid, whole)
    return series if type_.dtype == series.dtype else series.cast(type_.dtype)


def _nulled(series: pl.Series, valid: Mask, whole: bool) -> pl.Series:
    return series if whole else series.set(pl.Series(~valid), None)


def _text_series(name: str, buffer: U8, raw: I64, valid: Mask, text: TextStrategy, whole: bool) -> pl.Series:
    if text.try_interning():
        interned = _intern(buffer, raw, valid)
        if interned is not None:
            distinct, codes = interned
            values = pl.Series(name, read_texts(buffer, distinct, np.ones(len(distinct), np.bool_)), dtype=pl.String)
            return values.gather(_nulled(pl.Series(name, codes), valid, whole))
        text.gave_up()
    return pl.Series(name, read_texts(buffer, raw, valid), dtype=pl.String)


def _intern(buffer: U8, raw: I64, valid: Mask) -> tuple[I64, NDArray[np.uint32]] | None:
    """Spans of the distinct texts and a code for every row, or None where most texts differ."""
    rows = len(raw)
    codes_max = max(_DISTINCT_MIN, rows // 2)
    slots = np.full(1 << (2 * codes_max).bit_length(), -1, np.int32)
    firsts, codes = np.empty(codes_max, np.int64), np.empty(rows, np.uint32)
    count = intern_spans(buffer, raw, valid, slots, firsts, codes, codes_max)
    return None if count < 0 else (firsts[:count], codes)


def read_texts(buffer: U8, raw: I64, valid: Mask) -> list[str | None]:
    """Texts as Python's; one pass and one split for all of them, unless one holds a zero character."""
    if not len(raw):
        return []
    packed = np.empty(int((raw[valid] & 0xFFFFFFFF).sum()) + len(raw), np.uint8)
    size = pack_texts(buffer, raw, valid, packed)
    if size < 0:
        return [None if b is None else b.decode() for b in read_bytes(buffer, raw, valid)]
    texts: list[str | None] = list(packed[: size - 1].tobytes().decode().split("\0"))
    if not valid.all():
        for row in np.flatnonzero(~valid).tolist():
            texts[row] = None
    return texts


def read_bytes(buffer: U8, raw: I64, valid: Mask) -> list[bytes | None]:
    """Spans as bytes."""
    starts = (raw >> 32).tolist()
    ends = ((raw >> 32) + (raw & 0xFFFFFFFF)).tolist()
    view = buffer.data
    return [bytes(view[s:e]) if v else None for s, e, v in zip(starts, ends, valid.tolist(), strict=True)]


def hash_column(type_: ColumnType, buffer: U8, raw: I64, valid: Mask) -> Hashes:
    """128-bit hashes of one column of kernel output, without making the column; null gives (0, 0)."""
    if type_.kind in ("text", "bytes"):
        return hash_spans(buffer, raw >> 32, np.where(valid, raw & 0xFFFFFFFF, -1))
    if type_.kind == "enum":
        high, low = hash_series(pl.Series(type_.symbols, dtype=pl.String))
        hi, lo = high[raw], low[raw]
    elif type_.kind == "float":
        hi, lo = hash_float64(raw.view(np.float64))
    else:
        hi, lo = hash_int64(raw)
    if not valid.all():
        hi[~valid] = lo[~valid] = 0
    return hi, lo


def hashable(type_: ColumnType) -> bool:
    """Whether values of this column can be keys."""
    return not (type_.dtype.is_nested() or type_.dtype.is_decimal() or type_.kind == "null")


def storage_series(name: str, type_: ColumnType, values: list[Any]) -> pl.Series:
    """A column of the plain decoder's storage values as a series of its final type."""
    series = pl.Series(name, values, dtype=type_.storage, strict=True)
    return series if type_.storage == type_.dtype else series.cast(type_.dtype)
