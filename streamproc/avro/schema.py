"""Avro schemas: read once, checked, and kept as a small tree of types that everything else in this package walks.

fastavro checks the schema and resolves names and files (`order.avsc` may name a type defined in `Address.avsc` beside
it); the tree is ours, because resolution and decoding follow the specification (Apache Avro 1.12), not a library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import fastavro
from fastavro.repository.base import SchemaRepositoryError
from fastavro.schema import SchemaParseException, UnknownType

from streamproc.core.errors import UserError

__all__ = [
    "MISSING",
    "PRIMITIVES",
    "Array",
    "AvroType",
    "Enum",
    "Field",
    "Fixed",
    "MapOf",
    "Primitive",
    "Record",
    "Schema",
    "Union",
    "load_schema",
    "parse_schema",
]

MISSING: Final = object()
"""Stands for "no default": None is a default like any other."""
PRIMITIVES: Final = ("null", "boolean", "int", "long", "float", "double", "bytes", "string")
_LOGICAL: Final = {
    "date": ("int",),
    "timestamp-millis": ("long",),
    "timestamp-micros": ("long",),
    "local-timestamp-millis": ("long",),
    "local-timestamp-micros": ("long",),
    "decimal": ("bytes", "fixed"),
}
"""Logical types that change a value; any other is ignored, as the specification asks."""


@dataclass(frozen=True, eq=False)
class Primitive:
    kind: str
    logical: str | None = None
    precision: int = 0
    scale: int = 0


@dataclass(frozen=True, eq=False)
class Fixed:
    name: str
    size: int
    aliases: tuple[str, ...] = ()
    logical: str | None = None
    precision: int = 0
    scale: int = 0
    kind: str = "fixed"


@dataclass(frozen=True, eq=False)
class Enum:
    name: str
    symbols: tuple[str, ...]
    default: str | None = None
    aliases: tuple[str, ...] = ()
    kind: str = "enum"


@dataclass(frozen=True, eq=False)
class Array:
    items: AvroType
    kind: str = "array"


@dataclass(frozen=True, eq=False)
class MapOf:
    values: AvroType
    kind: str = "map"


@dataclass(frozen=True, eq=False)
class Union:
    branches: tuple[AvroType, ...]
    kind: str = "union"


@dataclass(frozen=True, eq=False)
class Field:
    name: str
    type: AvroType
    default: Any = MISSING
    """As a decoded value (bytes, not the JSON text for them), or `MISSING`."""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Record:
    name: str
    """Full name. Of two names only the last part matters in resolution."""
    fields: list[Field] = field(default_factory=list)
    aliases: tuple[str, ...] = ()
    kind: str = "record"


AvroType: TypeAlias = Primitive | Fixed | Enum | Array | MapOf | Union | Record


@dataclass(frozen=True, eq=False)
class Schema:
    """The schema of a topic's values: a record, its source, and fastavro's parsed form (to compare schemas by)."""

    root: Record
    parsed: Any
    source: str
    """File or name, for messages."""

    def field(self, name: str) -> Field | None:
        return next((f for f in self.root.fields if f.name == name), None)

    def names(self) -> list[str]:
        return [f.name for f in self.root.fields]


def load_schema(path: str | Path) -> Schema:
    """The schema in an ``.avsc`` file; anything wrong with it is a `UserError` that names the file."""
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fact = f"Cannot read the schema {source}: {error}."
        raise UserError(fact, remedy="Check the path of the .avsc file.") from error
    try:
        declared = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}.", remedy="Mend the file; an .avsc file is JSON.") from error
    _check_records(declared, source)
    try:
        return _schema(fastavro.parse_schema(declared), source)
    except UnknownType:
        pass  # Perhaps a type in a file beside it.
    except _REFUSED as error:
        raise _refusal(source, error) from error
    try:
        return _schema(fastavro.schema.load_schema(source), source)
    except (*_REFUSED, SchemaRepositoryError) as error:
        raise _refusal(source, error) from error


def parse_schema(declared: Mapping[str, Any] | str, *, source: str = "schema") -> Schema:
    """A schema from JSON, as text or already parsed; ``source`` names it in the `UserError` if something is wrong."""
    try:
        loaded = json.loads(declared) if isinstance(declared, str) else json.loads(json.dumps(declared))
        _check_records(loaded, source)
        return _schema(fastavro.parse_schema(loaded), source)
    except _REFUSED as error:
        raise _refusal(source, error) from error


def _check_records(declared: Any, source: str) -> None:
    """fastavro takes a record without fields for an empty one."""
    if isinstance(declared, list):
        for part in declared:
            _check_records(part, source)
    elif isinstance(declared, dict):
        if declared.get("type") in ("record", "error") and not isinstance(declared.get("fields"), list):
            fact = f"{source} is not a valid Avro schema: the record {declared.get('name')!r} has no list of fields."
            raise UserError(fact, remedy='Give it "fields": [...].')
        for key in ("type", "items", "values", "fields"):
            _check_records(declared.get(key), source)


_REFUSED: Final = (SchemaParseException, UnknownType, KeyError, TypeError, ValueError, AttributeError, RecursionError)
"""What fastavro's parser is known to raise on a schema that is not one."""


def _refusal(source: str, error: BaseException) -> UserError:
    if isinstance(error, UnknownType):
        fact = f"{source} uses the type {error.name!r}, which is defined neither there nor in a file beside it."
        return UserError(fact, remedy=f"Define it, or add {error.name.rpartition('.')[2]}.avsc beside it.")
    detail = f"no {error.args[0]!r}" if isinstance(error, KeyError) and error.args else str(error)
    fact = f"{source} is not a valid Avro schema: {detail}."
    return UserError(fact, remedy="Mend the schema; see the Avro specification.")


def _schema(parsed: Any, source: str) -> Schema:
    root = _Reader(source).type(parsed, "")
    if not isinstance(root, Record):
        raise UserError(
            f"{source} is of type {root.kind}, but the values of a topic must be records.",
            remedy='Wrap it in a record: {"type": "record", "name": ..., "fields": [...]}.',
        )
    return Schema(root, parsed, source)


class _Reader:
    """Turns fastavro's parsed form (every name full, every named type defined before it is used) into our tree."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.named: dict[str, AvroType] = {}

    def type(self, declared: Any, path: str) -> AvroType:
        if isinstance(declared, str):
            return Primitive(declared) if declared in PRIMITIVES else self.named[declared]
        if isinstance(declared, list):
            return Union(tuple(self.type(branch, path) for branch in declared))
        kind = declared["type"]
        if isinstance(kind, (dict, list)):
            return self.type(kind, path)
        if kind == "record" or kind == "error":
            return self.record(declared, path)
        if kind == "array":
            return Array(self.type(declared["items"], path))
        if kind == "map":
            return MapOf(self.type(declared["values"], path))
        if kind == "enum":
            made: AvroType = self.enum(declared, path)
        elif kind == "fixed":
            made = Fixed(declared["name"], declared["size"], _aliases(declared), **self.logical(declared, path))
        elif kind in PRIMITIVES:
            return Primitive(kind, **self.logical(declared, path))
        else:
            return self.named[kind]
        self.named[declared["name"]] = made
        return made

    def enum(self, declared: Any, path: str) -> Enum:
        symbols, default = tuple(declared["symbols"]), declared.get("default")
        if default is not None and default not in symbols:
            raise self.wrong(path, f"the enum's default {default!r} is none of its symbols")
        return Enum(declared["name"], symbols, default, _aliases(declared))

    def record(self, declared: Any, path: str) -> Record:
        made = Record(declared["name"], [], _aliases(declared))
        self.named[made.name] = made
        for each in declared["fields"]:
            where = f"{path}.{each['name']}".lstrip(".")
            if any(f.name == each["name"] for f in made.fields):
                raise self.wrong(where, "there are two fields of this name")
            type_ = self.type(each["type"], where)
            default = self.default(each["default"], type_, where) if "default" in each else MISSING
            made.fields.append(Field(each["name"], type_, default, _aliases(each)))
        return made

    def logical(self, declared: Any, path: str) -> dict[str, Any]:
        logical = declared.get("logicalType")
        if declared["type"] not in _LOGICAL.get(logical, ()):
            return {}
        if logical != "decimal":
            return {"logical": logical}
        precision, scale = declared.get("precision", 0), declared.get("scale", 0)
        if not (isinstance(precision, int) and isinstance(scale, int) and 0 <= scale <= precision and precision > 0):
            raise self.wrong(path, f"decimal({precision}, {scale}) needs precision > 0 and 0 <= scale <= precision")
        if precision > _DECIMAL_PRECISION_MAX:
            raise self.wrong(path, f"decimal({precision}, {scale}) has more than {_DECIMAL_PRECISION_MAX} digits")
        return {"logical": logical, "precision": precision, "scale": scale}

    def default(self, value: Any, type_: AvroType, path: str) -> Any:
        """The JSON ``value`` as a decoded value; of a union the first branch that takes it (Avro 1.12)."""
        branches = type_.branches if isinstance(type_, Union) else (type_,)
        for branch in branches:
            made = self.fit(value, branch, path)
            if made is not MISSING:
                return made
        raise self.wrong(path, f"its default {value!r} is not of its type")

    def fit(self, value: Any, type_: AvroType, path: str) -> Any:
        match type_:
            case Union():
                return self.default(value, type_, path)
            case Record():
                return self.fit_record(value, type_, path)
            case Array():
                return [self.default(v, type_.items, path) for v in value] if isinstance(value, list) else MISSING
            case MapOf():
                whole = isinstance(value, dict)
                return {k: self.default(v, type_.values, path) for k, v in value.items()} if whole else MISSING
            case Enum():
                return value if isinstance(value, str) and value in type_.symbols else MISSING
            case Fixed():
                data = _latin(value)
                return data if isinstance(data, bytes) and len(data) == type_.size else MISSING
        return _fit_primitive(value, type_.kind)

    def fit_record(self, value: Any, type_: Record, path: str) -> Any:
        if not isinstance(value, dict):
            return MISSING
        made = {}
        for each in type_.fields:
            if each.name in value:
                made[each.name] = self.default(value[each.name], each.type, f"{path}.{each.name}")
            elif each.default is not MISSING:
                made[each.name] = each.default
            else:
                return MISSING
        return made

    def wrong(self, path: str, fact: str) -> UserError:
        return UserError(f"{self.source}, field {path or '(root)'}: {fact}.", remedy="Mend the schema.")


_DECIMAL_PRECISION_MAX: Final = 38
"""What Polars's 128-bit decimals hold."""
_INTEGER_BITS: Final = {"int": 31, "long": 63}


def _fit_primitive(value: Any, kind: str) -> Any:
    """``value`` as a value of the primitive ``kind``, or `MISSING`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in _INTEGER_BITS:
        bound = 1 << _INTEGER_BITS[kind]
        return value if number and isinstance(value, int) and -bound <= value < bound else MISSING
    if kind in ("float", "double"):
        return float(value) if number else MISSING
    if kind == "bytes":
        return _latin(value)
    fits = {"null": value is None, "boolean": isinstance(value, bool), "string": isinstance(value, str)}
    return value if fits[kind] else MISSING


def _latin(value: Any) -> Any:
    """Bytes as a schema's JSON writes them: code points 0 to 255 are the bytes."""
    if isinstance(value, str) and all(ord(c) < 256 for c in value):
        return value.encode("latin-1")
    return MISSING


def _aliases(declared: Any) -> tuple[str, ...]:
    return tuple(declared.get("aliases", ()))
