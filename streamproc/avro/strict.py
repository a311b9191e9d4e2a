"""The plain decoder: the compiled one's twin, and the way of schemas that the kernel cannot take.

It reads any schema, judges bytes by the specification, and is bounded: items of arrays and maps by
`limits.AVRO_ITEMS_MAX` (or the record's own size), nesting by `limits.AVRO_DEPTH_MAX`.
"""

from __future__ import annotations

import struct
from decimal import Decimal
from typing import Any, Final

import numpy as np

from streamproc.avro.faults import Fault, Malformed, describe
from streamproc.avro.resolve import Branches, Entries, EnumNode, Fields, FixedNode, Items, Node, Refused, Scalar
from streamproc.avro.schema import Array, AvroType, Enum, Fixed, MapOf, Primitive, Record, Union
from streamproc.core import limits

__all__ = ["Shape", "decode_record", "items_allowed", "shaped"]


class Shape:
    """What the values of a decoded record look like. This one: storage values, which columns are built from.

    Times stay integers, records are dicts and maps lists of key and value. `rows` has another.
    """

    def number(self, value: int, target: Primitive, path: str) -> Any:
        """An int or long; ``target.logical`` may make a date or time of it."""
        return value

    def entries(self, pairs: list[tuple[str, Any]]) -> Any:
        return [{"key": key, "value": value} for key, value in pairs]

    def record(self, target: Record, values: dict[str, Any]) -> Any:
        return values


def items_allowed(size: int) -> int:
    """Items that a record of ``size`` bytes may hold in all its arrays and maps: those of no size are bounded too."""
    return max(limits.AVRO_ITEMS_MAX, size)


def decode_record(tree: Fields, data: bytes, shape: Shape) -> Any:
    """The record in ``data``, all of it; raises `Malformed`."""
    cursor = _Cursor(data, shape)
    value = cursor.read(tree, 0)
    if cursor.at != len(data):
        raise Malformed(describe(Fault.TRAILING, "", len(data) - cursor.at))
    return value


class _Cursor:
    def __init__(self, data: bytes, shape: Shape) -> None:
        self.data, self.at, self.shape = data, 0, shape
        self.items_left = items_allowed(len(data))

    def read(self, node: Node, depth: int) -> Any:
        if depth > limits.AVRO_DEPTH_MAX:
            raise Malformed(describe(Fault.DEPTH, node.path, 0, limits.AVRO_DEPTH_MAX))
        match node:
            case Scalar():
                return self.scalar(node)
            case Fields():
                return self.fields(node, depth)
            case Branches():
                index = self.index(Fault.UNION_INDEX, len(node.branches), node.path)
                return self.read(node.branches[index], depth)
            case Items():
                found: list[Any] = []
                self.blocks(node.path, lambda: found.append(self.read(node.items, depth + 1)))
                return found
            case Entries():
                pairs: list[tuple[str, Any]] = []
                self.blocks(node.path, lambda: pairs.append((self.scalar(node.key), self.read(node.values, depth + 1))))
                return self.shape.entries(pairs)
            case EnumNode():
                return self.enum(node)
            case FixedNode():
                data = self.take(node.size, node.path)
                return _decimal(data, node.target, node.path)
            case Refused():
                raise Malformed(describe(Fault.UNRESOLVED, node.path, 0, node.reason))

    def scalar(self, node: Scalar) -> Any:
        target, path = node.target, node.path
        match node.kind:
            case "null":
                return None
            case "boolean":
                byte = self.take(1, path)[0]
                if byte > 1:
                    raise Malformed(describe(Fault.BOOLEAN, path, byte))
                return byte == 1
            case "int" | "long":
                return self.integer(node)
            case "float":
                return struct.unpack("<f", self.take(4, path))[0]
            case "double":
                return struct.unpack("<d", self.take(8, path))[0]
        data = self.take(self.length(path), path)
        text = _text(data, path) if node.kind == "string" or (target and target.kind == "string") else ""
        if target is None or target.kind == "string":
            return text
        return _decimal(data, target, path)

    def integer(self, node: Scalar) -> Any:
        value = self.varint(node.path)
        if node.kind == "int" and not -(1 << 31) <= value < 1 << 31:
            raise Malformed(describe(Fault.INT_RANGE, node.path, value))
        if node.target is None:
            return value
        if node.target.kind == "double":
            return float(value)
        if node.target.kind == "float":
            return float(np.float32(np.int64(value)))
        return self.shape.number(value, node.target, node.path)

    def enum(self, node: EnumNode) -> str | None:
        index = self.index(Fault.ENUM_INDEX, len(node.symbols), node.path)
        if node.target is None:
            return None
        if node.mapping[index] < 0:
            raise Malformed(describe(Fault.ENUM_SYMBOL, node.path, 0, node.symbols[index]))
        return node.target.symbols[node.mapping[index]]

    def fields(self, node: Fields, depth: int) -> Any:
        values: dict[str, Any] = {}
        for step in node.steps:
            value = self.read(step.node, depth + 1)
            if step.name is not None:
                values[step.name] = value
        if node.target is None:
            return None
        for name, value in node.defaults.items():
            field = next(f for f in node.target.fields if f.name == name)
            values[name] = shaped(self.shape, field.type, value, name)
        return self.shape.record(node.target, values)

    def blocks(self, path: str, read_item: Any) -> None:
        while count := self.varint(path):
            block_end = None
            if count < 0:
                count, size = -count, self.length(path)
                if size > len(self.data) - self.at:
                    raise Malformed(describe(Fault.TRUNCATED, path))
                block_end = self.at + size
            if count > self.items_left:
                raise Malformed(describe(Fault.ITEMS, path))
            self.items_left -= count
            for _ in range(count):
                read_item()
            if block_end is not None and self.at != block_end:
                raise Malformed(describe(Fault.BLOCK_SIZE, path))

    def index(self, fault: Fault, count: int, path: str) -> int:
        index = self.varint(path)
        if not 0 <= index < count:
            raise Malformed(describe(fault, path, index, count))
        return index

    def length(self, path: str) -> int:
        length = self.varint(path)
        if length < 0:
            raise Malformed(describe(Fault.NEGATIVE_LENGTH, path, length))
        return length

    def take(self, size: int, path: str) -> bytes:
        if size > len(self.data) - self.at:
            raise Malformed(describe(Fault.TRUNCATED, path))
        self.at += size
        return self.data[self.at - size : self.at]

    def varint(self, path: str) -> int:
        value = shift = 0
        while True:
            if self.at >= len(self.data):
                raise Malformed(describe(Fault.TRUNCATED, path))
            byte = self.data[self.at]
            self.at += 1
            if shift == 63 and byte > 1:
                raise Malformed(describe(Fault.LONG_VARINT, path))
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return (value >> 1) ^ -(value & 1)
            shift += 7


def shaped(shape: Shape, type_: AvroType, value: Any, path: str) -> Any:
    """A default of the reader's schema (`Field.default`) as ``shape`` shows decoded values."""
    match type_:
        case Union():
            branch = next(b for b in type_.branches if _is_of(value, b))
            return shaped(shape, branch, value, path)
        case Record():
            members = {f.name: shaped(shape, f.type, value[f.name], path) for f in type_.fields}
            return shape.record(type_, members)
        case Array():
            return [shaped(shape, type_.items, v, path) for v in value]
        case MapOf():
            return shape.entries([(k, shaped(shape, type_.values, v, path)) for k, v in value.items()])
        case Fixed():
            return _decimal(value, type_, path)
        case Primitive() if type_.kind in ("int", "long"):
            return shape.number(value, type_, path)
        case Primitive() if type_.kind == "bytes":
            return _decimal(value, type_, path)
    return value


_VALUES: Final[dict[str, type | tuple[type, ...]]] = {
    "null": type(None),
    "boolean": bool,
    "int": int,
    "long": int,
    "float": float,
    "double": float,
    "bytes": bytes,
    "fixed": bytes,
    "string": str,
    "enum": str,
    "array": list,
    "map": dict,
    "record": dict,
}


def _is_of(value: Any, type_: AvroType) -> bool:
    """Whether a default belongs to this branch of a union."""
    if isinstance(value, bool) and type_.kind != "boolean":
        return False
    if isinstance(type_, Enum) and value not in type_.symbols:
        return False
    if isinstance(type_, Record):
        return isinstance(value, dict) and value.keys() == {f.name for f in type_.fields}
    return isinstance(value, _VALUES[type_.kind])


def _decimal(data: bytes, target: Primitive | Fixed | None, path: str) -> Any:
    """``data``, or the decimal that its big-endian two's complement is."""
    if target is None or target.logical != "decimal":
        return data
    unscaled = int.from_bytes(data, "big", signed=True)
    if abs(unscaled) >= 10**target.precision:
        raise Malformed(describe(Fault.DECIMAL, path, 0, target.precision))
    return Decimal(f"{unscaled}E-{target.scale}")


def _text(data: bytes, path: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Malformed(describe(Fault.UTF8, path)) from None
