"""Values to records: Avro bytes in the wire format, for topics that agents write to.

A schema becomes a tree of small writers once. They are as strict as the decoders: what they write, those read; fastavro
would write an int beyond 32 bits or a truthy boolean.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, TypeAlias

import msgspec

from streamproc.avro.schema import MISSING, Array, AvroType, Enum, Fixed, MapOf, Primitive, Record, Schema, Union
from streamproc.avro.wire import frame
from streamproc.core.errors import UserError

__all__ = ["Encoder"]

Write: TypeAlias = Callable[[bytearray, Any], None]
"""Appends a value, or raises `_Misfit`."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY: Final = date(1970, 1, 1).toordinal()
_FLOAT, _DOUBLE = struct.Struct("<f"), struct.Struct("<d")


class Encoder:
    """Encodes values of one schema. Called per record, some microseconds each; not for the pipeline path."""

    def __init__(self, schema: Schema, schema_id: int) -> None:
        self._schema, self._schema_id = schema, schema_id
        self._write = _Writers().of(schema.root)

    def encode(self, value: Any) -> bytes:
        """A mapping, a Struct or a dataclass, framed. `UserError` names the field that does not fit.

        Fields that the value lacks take the schema's default; ones that the schema lacks are a mistake, not dropped.
        A naive datetime is UTC, as with local timestamps; a decimal must be exact at the schema's scale.
        """
        out = bytearray()
        try:
            self._write(out, value)
        except _Misfit as misfit:
            fact = f"{misfit.fact()}, says the schema {self._schema.source}."
            raise UserError(fact, remedy="Mend the value or the schema.") from misfit.__cause__
        return frame(self._schema_id, bytes(out))


class _Misfit(ValueError):
    """A value that its type does not take; records on the way out put their field in front of ``path``."""

    def __init__(self, value: Any, says: str | None = None) -> None:
        super().__init__()
        self.path: list[str] = []
        self.value, self.says = value, says

    def fact(self) -> str:
        name = ".".join(self.path)
        if self.says is not None:
            return self.says.format(field=name)
        return f"Field {name!r} cannot hold {self.value!r}" if name else f"{self.value!r} is not a record"


class _Writers:
    """Makes the writer of a type; named types once, so that they may be recursive."""

    def __init__(self) -> None:
        self._records: dict[int, Write] = {}

    def of(self, type_: AvroType) -> Write:
        match type_:
            case Union():
                return self.union(type_)
            case Record():
                return self.record(type_)
            case Array():
                return _array(self.of(type_.items))
            case MapOf():
                return _map(self.of(type_.values))
            case Enum():
                return _enum(type_)
            case Fixed():
                return _fixed(type_)
        return _primitive(type_)

    def record(self, type_: Record) -> Write:
        if id(type_) in self._records:
            return lambda out, value: self._records[id(type_)](out, value)
        self._records[id(type_)] = lambda out, value: write(out, value)
        members = [(f.name, self.of(f.type), f.default) for f in type_.fields]
        names = {f.name for f in type_.fields}

        def write(out: bytearray, value: Any) -> None:
            found = _members(value)
            for name, write_member, default in members:
                member = found.get(name, default)
                try:
                    if member is MISSING:
                        raise _Misfit(value, "Field {field!r} is missing and has no default")
                    write_member(out, member)
                except _Misfit as misfit:
                    misfit.path.insert(0, name)
                    raise
            if len(found) > len(names) or not found.keys() <= names:
                unknown = min(map(str, found.keys() - names))
                raise _Misfit(value, f"There is no field {unknown!r}, but {', '.join(names) or 'none'}")

        self._records[id(type_)] = write
        return write

    def union(self, type_: Union) -> Write:
        """The first branch that takes the value; integers are tried before floats, which take integers too."""
        order = sorted(enumerate(type_.branches), key=lambda branch: branch[1].kind in ("float", "double"))
        branches = [(index, self.of(branch)) for index, branch in order if branch.kind != "null"]
        null = next((index for index, branch in order if branch.kind == "null"), None)

        def write(out: bytearray, value: Any) -> None:
            if value is None and null is not None:
                _varint(out, null)
                return
            start = len(out)
            for index, write_branch in branches:
                _varint(out, index)
                try:
                    write_branch(out, value)
                except _Misfit as misfit:
                    if len(branches) == 1:
                        raise misfit
                    del out[start:]
                else:
                    return
            raise _Misfit(value)

        return write


def _members(value: Any) -> Mapping[str, Any]:
    """The fields of a mapping, Struct or dataclass."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, msgspec.Struct):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    raise _Misfit(value)


def _varint(out: bytearray, value: int) -> None:
    word = (value << 1) ^ (value >> 63)
    while word > 0x7F:
        out.append(word & 0x7F | 0x80)
        word >>= 7
    out.append(word)


def _sized(out: bytearray, data: bytes | bytearray) -> None:
    _varint(out, len(data))
    out += data


def _array(write_item: Write) -> Write:
    def write(out: bytearray, value: Any) -> None:
        if not isinstance(value, (list, tuple)):
            raise _Misfit(value)
        if value:
            _varint(out, len(value))
            for item in value:
                write_item(out, item)
        out.append(0)

    return write


def _map(write_value: Write) -> Write:
    def write(out: bytearray, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise _Misfit(value)
        if value:
            _varint(out, len(value))
            for key, member in value.items():
                _string(out, key)
                write_value(out, member)
        out.append(0)

    return write


def _enum(type_: Enum) -> Write:
    places = {symbol: i for i, symbol in enumerate(type_.symbols)}

    def write(out: bytearray, value: Any) -> None:
        if not isinstance(value, str) or value not in places:
            raise _Misfit(value)
        _varint(out, places[value])

    return write


def _fixed(type_: Fixed) -> Write:
    def write(out: bytearray, value: Any) -> None:
        if isinstance(value, Decimal) and type_.logical == "decimal":
            value = _unscaled(value, type_, type_.size)
        if not isinstance(value, bytes) or len(value) != type_.size:
            raise _Misfit(value)
        out += value

    return write


def _primitive(type_: Primitive) -> Write:
    if type_.logical == "decimal":
        return _decimal(type_)
    if type_.kind in ("int", "long"):
        return _integer(32 if type_.kind == "int" else 64, _LOGICAL.get(type_.logical or ""))
    return {
        "null": _null, "boolean": _boolean, "float": _float, "double": _double, "bytes": _bytes, "string": _string,
    }[type_.kind]  # fmt: skip


def _null(out: bytearray, value: Any) -> None:
    if value is not None:
        raise _Misfit(value)


def _boolean(out: bytearray, value: Any) -> None:
    if not isinstance(value, bool):
        raise _Misfit(value)
    out.append(value)


def _integer(bits: int, convert: Callable[[Any], int | None] | None) -> Write:
    bound = 1 << (bits - 1)

    def write(out: bytearray, value: Any) -> None:
        number = value
        if convert is not None and not isinstance(value, int):
            number = convert(value)
        if not isinstance(number, int) or isinstance(number, bool) or not -bound <= number < bound:
            raise _Misfit(value)
        _varint(out, number)

    return write


def _timestamp(unit: timedelta) -> Callable[[Any], int | None]:
    """Whole units since the epoch, rounded down."""

    def convert(value: Any) -> int | None:
        if not isinstance(value, datetime):
            return None
        return ((value if value.tzinfo else value.replace(tzinfo=UTC)) - _EPOCH) // unit

    return convert


def _local(unit: timedelta) -> Callable[[Any], int | None]:
    """The clock's reading, whatever its zone."""

    def convert(value: Any) -> int | None:
        return (value.replace(tzinfo=UTC) - _EPOCH) // unit if isinstance(value, datetime) else None

    return convert


def _day(value: Any) -> int | None:
    whole = isinstance(value, date) and not isinstance(value, datetime)
    return value.toordinal() - _EPOCH_DAY if whole else None


_MILLI, _MICRO = timedelta(milliseconds=1), timedelta(microseconds=1)
_LOGICAL: Final[dict[str, Callable[[Any], int | None]]] = {
    "date": _day,
    "timestamp-millis": _timestamp(_MILLI),
    "timestamp-micros": _timestamp(_MICRO),
    "local-timestamp-millis": _local(_MILLI),
    "local-timestamp-micros": _local(_MICRO),
}


def _number(value: Any) -> float:
    """Floats, and integers as the nearest one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Misfit(value)
    try:
        return float(value)
    except OverflowError as error:
        raise _Misfit(value) from error


def _float(out: bytearray, value: Any) -> None:
    try:
        out += _FLOAT.pack(_number(value))
    except OverflowError as error:
        raise _Misfit(value) from error


def _double(out: bytearray, value: Any) -> None:
    out += _DOUBLE.pack(_number(value))


def _bytes(out: bytearray, value: Any) -> None:
    if not isinstance(value, (bytes, bytearray)):
        raise _Misfit(value)
    _sized(out, value)


def _string(out: bytearray, value: Any) -> None:
    if not isinstance(value, str):
        raise _Misfit(value)
    try:
        _sized(out, value.encode())
    except UnicodeEncodeError as error:
        raise _Misfit(value) from error


def _decimal(type_: Primitive) -> Write:
    def write(out: bytearray, value: Any) -> None:
        if isinstance(value, Decimal):
            value = _unscaled(value, type_, None)
        _bytes(out, value)

    return write


_SHIFT_MAX: Final = 100
"""Powers of ten between a decimal and its scale: beyond it nothing fits, and 10**999999 is not worth finding out."""


def _unscaled(value: Decimal, type_: Primitive | Fixed, size: int | None) -> bytes:
    """Big-endian two's complement of ``value`` at the type's scale, in ``size`` bytes or as few as it needs."""
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        raise _Misfit(value)
    shift = exponent + type_.scale
    if abs(shift) > _SHIFT_MAX:
        raise _Misfit(value)
    whole: int = int("".join(map(str, digits)))
    rest = 0
    if shift >= 0:
        whole *= 10**shift
    else:
        whole, rest = divmod(whole, 10**-shift)
    if rest or whole >= 10**type_.precision:
        raise _Misfit(value)
    number: int = -whole if sign else whole
    try:
        return number.to_bytes(size or number.bit_length() // 8 + 1, "big", signed=True)
    except OverflowError as error:
        raise _Misfit(value) from error
