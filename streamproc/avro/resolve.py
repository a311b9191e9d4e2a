"""Writer schema against reader schema: one tree that says how to read each byte and where it goes.

The rules are those of the specification (Apache Avro 1.12, "Schema Resolution"). Both decoders, the compiled one and
its plain twin, execute this tree, so they cannot differ in what resolves to what. Where the specification is silent
about logical types we refuse rather than reinterpret: timestamp-millis never becomes timestamp-micros.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from streamproc.avro.schema import (
    MISSING,
    Array,
    AvroType,
    Enum,
    Field,
    Fixed,
    MapOf,
    Primitive,
    Record,
    Schema,
    Union,
)

__all__ = [
    "Branches",
    "Entries",
    "EnumNode",
    "Fields",
    "FixedNode",
    "Items",
    "Node",
    "Refused",
    "Scalar",
    "Step",
    "Unresolvable",
    "resolve",
]


class Unresolvable(ValueError):
    """No record of this writer schema can be read with this reader schema."""


@dataclass(eq=False)
class Scalar:
    """A primitive, read as ``kind``; ``target`` is the reader's type (None: skip it), which may be a wider one."""

    path: str
    kind: str
    target: Primitive | None


@dataclass(eq=False)
class FixedNode:
    path: str
    size: int
    target: Fixed | None


@dataclass(eq=False)
class EnumNode:
    """``mapping[i]``: the reader's symbol for the writer's symbol i, -1 if it has none. Unused when skipped."""

    path: str
    symbols: tuple[str, ...]
    target: Enum | None
    mapping: tuple[int, ...] = ()


@dataclass(eq=False)
class Items:
    path: str
    items: Node


@dataclass(eq=False)
class Entries:
    path: str
    key: Scalar
    values: Node


@dataclass(eq=False)
class Branches:
    path: str
    branches: list[Node]


@dataclass(eq=False)
class Refused:
    """A branch of the writer's union that the reader cannot take: an error only for records that use it."""

    path: str
    reason: str


@dataclass(eq=False)
class Step:
    """One field in the writer's order; ``name`` is the reader's field it fills, None to skip it."""

    node: Node
    name: str | None


@dataclass(eq=False)
class Fields:
    path: str
    target: Record | None
    steps: list[Step] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    """Reader fields that the writer does not have."""
    recursive: bool = False


Node: TypeAlias = Scalar | FixedNode | EnumNode | Items | Entries | Branches | Refused | Fields

_PROMOTIONS: Final = {
    "int": ("long", "float", "double"),
    "long": ("float", "double"),
    "float": ("double",),
    "string": ("bytes",),
    "bytes": ("string",),
}


def resolve(writer: Schema, reader: Schema) -> Fields:
    """How to read a record written with ``writer`` as one of ``reader``; raises `Unresolvable`."""
    node = _Resolver().record(writer.root, reader.root, "")
    assert isinstance(node, Fields)
    return node


class _Resolver:
    def __init__(self) -> None:
        self.open: dict[tuple[int, int], Fields] = {}

    def node(self, writer: AvroType, reader: AvroType | None, path: str) -> Node:
        if isinstance(writer, Union):
            return self.union(writer, reader, path)
        if isinstance(reader, Union):
            return self.into_union(writer, reader, path)
        match writer:
            case Primitive():
                return _scalar(writer, reader, path)
            case Fixed():
                return _fixed(writer, reader, path)
            case Enum():
                return _enum(writer, reader, path)
            case Array():
                items = _same(writer, reader, Array, path)
                return Items(path, self.node(writer.items, items and items.items, path))
            case MapOf():
                values = _same(writer, reader, MapOf, path)
                key = Scalar(path, "string", None)
                return Entries(path, key, self.node(writer.values, values and values.values, path))
        return self.record(writer, reader, path)

    def union(self, writer: Union, reader: AvroType | None, path: str) -> Node:
        branches: list[Node] = []
        for branch in writer.branches:
            try:
                branches.append(self.node(branch, reader, path))
            except Unresolvable as error:
                branches.append(Refused(path, str(error)))
        if branches and all(isinstance(branch, Refused) for branch in branches):
            raise Unresolvable("; ".join(b.reason for b in branches if isinstance(b, Refused)))
        return Branches(path, branches)

    def into_union(self, writer: AvroType, reader: Union, path: str) -> Node:
        """The first branch of the reader that the writer's type resolves to, one of the same kind before a wider one.

        The specification has just the first; then a long written as ``["double", "long"]`` would be read as a double by
        its own schema. Apache's Java implementation prefers the same kind too.
        """
        for branch in sorted(reader.branches, key=lambda branch: branch.kind != writer.kind):
            try:
                return self.node(writer, branch, path)
            except Unresolvable:
                continue
        raise Unresolvable(f"{_place(path)}{writer.kind} is none of the reader's {[b.kind for b in reader.branches]}")

    def record(self, writer: Record, reader: AvroType | None, path: str) -> Node:
        target = _same(writer, reader, Record, path)
        if target is not None:
            _names_match(writer, target, path)
        key = (id(writer), id(target))
        if key in self.open:
            self.open[key].recursive = True
            return self.open[key]
        made = self.open[key] = Fields(path, target)
        try:
            self.fill(made, writer, target)
        finally:
            del self.open[key]
        return made

    def fill(self, made: Fields, writer: Record, reader: Record | None) -> None:
        takers = _takers(writer, reader) if reader else {}
        for each in writer.fields:
            taker = takers.get(each.name)
            where = f"{made.path}.{each.name}".lstrip(".")
            node = self.node(each.type, taker.type if taker else None, where)
            made.steps.append(Step(node, taker.name if taker else None))
        taken = {taker.name for taker in takers.values()}
        for missing in (f for f in (reader.fields if reader else ()) if f.name not in taken):
            if missing.default is MISSING:
                where = f"{made.path}.{missing.name}".lstrip(".")
                raise Unresolvable(f"field {where} is not in the writer's schema and has no default")
            made.defaults[missing.name] = missing.default


def _takers(writer: Record, reader: Record) -> dict[str, Field]:
    """Writer field name -> the reader's field that takes it, by name and then by alias."""
    written = {f.name for f in writer.fields}
    takers: dict[str, Field] = {}
    for each in reader.fields:
        found = next((name for name in (each.name, *each.aliases) if name in written and name not in takers), None)
        if found is not None:
            takers[found] = each
    return takers


def _scalar(writer: Primitive, reader: AvroType | None, path: str) -> Node:
    if reader is None:
        return Scalar(path, writer.kind, None)
    if not isinstance(reader, Primitive) or (
        reader.kind != writer.kind and reader.kind not in _PROMOTIONS.get(writer.kind, ())
    ):
        raise _mismatch(writer, reader, path)
    _logical_match(writer, reader, path)
    return Scalar(path, writer.kind, reader)


def _fixed(writer: Fixed, reader: AvroType | None, path: str) -> Node:
    target = _same(writer, reader, Fixed, path)
    if target is not None:
        _names_match(writer, target, path)
        if target.size != writer.size:
            raise Unresolvable(f"{_place(path)}fixed of {writer.size} bytes, the reader has {target.size}")
        _logical_match(writer, target, path)
    return FixedNode(path, writer.size, target)


def _enum(writer: Enum, reader: AvroType | None, path: str) -> Node:
    target = _same(writer, reader, Enum, path)
    if target is None:
        return EnumNode(path, writer.symbols, None)
    _names_match(writer, target, path)
    places = {symbol: i for i, symbol in enumerate(target.symbols)}
    other = -1 if target.default is None else places[target.default]
    return EnumNode(path, writer.symbols, target, tuple(places.get(s, other) for s in writer.symbols))


def _same(writer: AvroType, reader: AvroType | None, kind: Any, path: str) -> Any:
    if reader is not None and not isinstance(reader, kind):
        raise _mismatch(writer, reader, path)
    return reader


def _names_match(writer: Record | Enum | Fixed, reader: Record | Enum | Fixed, path: str) -> None:
    name = writer.name.rpartition(".")[2]
    if name not in {n.rpartition(".")[2] for n in (reader.name, *reader.aliases)}:
        fact = f"{_place(path)}{writer.kind} {writer.name}, the reader has {reader.name} without that alias"
        raise Unresolvable(fact)


def _logical_match(writer: Primitive | Fixed, reader: Primitive | Fixed, path: str) -> None:
    """Two logical types that mean different numbers never meet; local and UTC timestamps of one unit may."""
    if writer.logical is None or reader.logical is None:
        return
    unit = [side.logical.removeprefix("local-") for side in (writer, reader) if side.logical]
    if unit[0] != unit[1] or (writer.precision, writer.scale) != (reader.precision, reader.scale):
        raise Unresolvable(f"{_place(path)}{_logical(writer)}, the reader has {_logical(reader)}")


def _logical(side: Primitive | Fixed) -> str:
    return f"decimal({side.precision}, {side.scale})" if side.logical == "decimal" else str(side.logical)


def _mismatch(writer: AvroType, reader: AvroType, path: str) -> Unresolvable:
    return Unresolvable(f"{_place(path)}{writer.kind} cannot be read as {reader.kind}")


def _place(path: str) -> str:
    return f"field {path}: " if path else ""
