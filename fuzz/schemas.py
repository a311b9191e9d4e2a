"""Pairs of writer and reader schemas that the fuzzer decodes with: real ones, one of every type, and drawn ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamproc.avro.registry import UnknownSchema
from streamproc.avro.resolve import Fields, Unresolvable, resolve
from streamproc.avro.schema import PRIMITIVES, Schema, load_schema, parse_schema

__all__ = ["PAIRS", "Pair", "draw_pair"]

ROOT: Final = Path(__file__).resolve().parent.parent
FIELDS_MAX: Final = 8
DEPTH_MAX: Final = 3

Declared = Any
"""A type as the JSON of a schema says it."""


@dataclass(frozen=True)
class Pair:
    """One reader and the writers its batches come from, by id; a `Registry` of those."""

    name: str
    writers: dict[int, Schema]
    reader: Schema

    def schema_by_id(self, schema_id: int) -> Schema:
        if schema_id not in self.writers:
            raise UnknownSchema(schema_id)
        return self.writers[schema_id]

    def id_of(self, schema: Schema | str) -> int:
        return next(i for i, known in self.writers.items() if known is schema)

    def trees(self) -> dict[int, Fields]:
        """How the plain twin reads the records of each writer."""
        return {schema_id: resolve(writer, self.reader) for schema_id, writer in self.writers.items()}

    def told(self) -> str:
        """What a person needs to see of it beside a failing record."""
        writers = {schema_id: _plain(writer.parsed) for schema_id, writer in self.writers.items()}
        return f"reader {json.dumps(_plain(self.reader.parsed))}, writers {json.dumps(writers)}"


def _plain(parsed: Declared) -> Declared:
    """Without what fastavro adds."""
    return {key: value for key, value in parsed.items() if not key.startswith("__")}


def _record(name: str, **types: Declared) -> Declared:
    return {"type": "record", "name": name, "fields": [{"name": n, "type": t} for n, t in types.items()]}


_EVERYTHING: Final = _record(
    "Everything",
    b=["null", "boolean"], i="int", li=["long", "null"], f="float", d=["null", "double"], s="string",
    ns=["null", "string"], raw="bytes", nothing="null",
    e={"type": "enum", "name": "E", "symbols": ["A", "B", "C"]},
    x={"type": "fixed", "name": "X", "size": 9}, x0={"type": "fixed", "name": "X0", "size": 0},
    day={"type": "int", "logicalType": "date"}, ms={"type": "long", "logicalType": "timestamp-millis"},
    us=["null", {"type": "long", "logicalType": "local-timestamp-micros"}],
    ints={"type": "array", "items": "int"}, nulls={"type": "array", "items": "null"},
    texts={"type": "map", "values": ["null", "string"]},
    deep={"type": "array", "items": {"type": "map", "values": {"type": "array", "items": "double"}}},
    inner=_record("Inner", n="long", list={"type": "array", "items": _record("Item", t="string", e="E")}),
    many=["null", "int", "string", "X", {"type": "map", "values": "Inner"}], last="string",
)  # fmt: skip
_LATER: Final = {
    "type": "record",
    "name": "Everything",
    "fields": [
        {"name": "last", "type": ["null", "string"]},
        {"name": "text", "type": "bytes", "aliases": ["s"]},
        {"name": "i", "type": "double"},
        {"name": "li", "type": ["float", "null"]},
        {"name": "f", "type": ["null", "double"]},
        {"name": "raw", "type": "string"},
        {"name": "e", "type": {"type": "enum", "name": "E", "symbols": ["C", "D", "A"]}},
        {"name": "many", "type": ["string", "null", "int"]},
        {"name": "d", "type": "double"},
        {"name": "added", "type": ["null", "string"], "default": None},
        {"name": "seven", "type": "long", "default": 7},
        {"name": "word", "type": "string", "default": "wörd"},
    ],
}
"""Another reader of what `_EVERYTHING` wrote: order, names, wider types, defaults, fewer symbols and branches."""


def _of_file(name: str, path: str) -> Callable[[random.Random], Pair]:
    schema = load_schema(ROOT / path)
    return lambda rng: Pair(name, {1: schema}, schema)


def _of_everything(rng: random.Random) -> Pair:
    schema = parse_schema(_EVERYTHING)
    return Pair("everything", {1: schema}, schema)


def _of_a_later_reader(rng: random.Random) -> Pair:
    later = parse_schema(_LATER)
    return Pair("later", {1: parse_schema(_EVERYTHING), 2: later}, later)


def _drawn(rng: random.Random) -> Pair:
    schema = parse_schema(_Draw(rng).record(DEPTH_MAX, "Drawn"))
    return Pair("drawn", {1: schema}, schema)


def _drawn_and_evolved(rng: random.Random) -> Pair:
    while True:
        declared = _Draw(rng).record(DEPTH_MAX, "Drawn")
        writer, reader = parse_schema(declared), parse_schema(_Evolve(rng).record(declared))
        try:
            resolve(writer, reader)
        except Unresolvable:
            continue
        return Pair("evolved", {1: writer, 2: reader}, reader)


PAIRS: Final[Sequence[Callable[[random.Random], Pair]]] = (
    _of_file("order", "benchmarks/schemas/order.avsc"),
    _of_everything,
    _drawn,
    _of_file("flight", "schemas/flight.avsc"),
    _of_a_later_reader,
    _drawn_and_evolved,
    _drawn,
)


def draw_pair(seed: int, rng: random.Random) -> Pair:
    """The pair of a seed: they take turns, so that seven in a row see each kind."""
    return PAIRS[seed % len(PAIRS)](rng)


class _Draw:
    """Random schemas; every named type has a name of its own."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.names = rng, 0

    def record(self, depth: int, name: str) -> Declared:
        count = self.rng.randint(0 if depth < DEPTH_MAX else 1, FIELDS_MAX if depth == DEPTH_MAX else 3)
        return _record(name, **{f"f{i}": self.type(depth - 1) for i in range(count)})

    def type(self, depth: int) -> Declared:
        if self.rng.random() < 0.3:
            return self.union(depth)
        return self.of_kind(self.rng.choice(self.kinds(depth)), depth)

    def kinds(self, depth: int) -> list[str]:
        return [*PRIMITIVES, "enum", "fixed", *(("array", "map", "record") * 2 if depth > 0 else ())]

    def union(self, depth: int) -> Declared:
        if self.rng.random() < 0.6:
            kind = self.rng.choice([*PRIMITIVES[1:], "enum", "fixed"])
            return self.rng.sample(["null", self.of_kind(kind, depth)], 2)
        kinds = self.rng.sample(sorted(set(self.kinds(depth))), self.rng.randint(1, 4))
        return [self.of_kind(kind, depth) for kind in kinds]

    def of_kind(self, kind: str, depth: int) -> Declared:
        self.names += 1
        name = f"N{self.names}"
        match kind:
            case "enum":
                symbols = [f"S{i}" for i in range(self.rng.choice([1, 2, 3, 70]))]
                return {"type": "enum", "name": name, "symbols": symbols}
            case "fixed":
                return {"type": "fixed", "name": name, "size": self.rng.choice([0, 1, 7, 8, 16, 17])}
            case "array":
                return {"type": "array", "items": self.type(depth - 1)}
            case "map":
                return {"type": "map", "values": self.type(depth - 1)}
            case "record":
                return self.record(depth - 1, name)
            case "long" if self.rng.random() < 0.3:
                return {"type": "long", "logicalType": self.rng.choice(["timestamp-millis", "timestamp-micros"])}
            case "int" if self.rng.random() < 0.2:
                return {"type": "int", "logicalType": "date"}
        return kind


_WIDER: Final = {
    "int": ["long", "float", "double"],
    "long": ["float", "double"],
    "float": ["double"],
    "string": ["bytes"],
    "bytes": ["string"],
}
_ADDED: Final[Sequence[tuple[Declared, Any]]] = (
    ("long", 5),
    (["null", "double"], None),
    ("string", "added"),
    ({"type": "array", "items": "int"}, []),
)


class _Evolve:
    """A reader's schema made of a writer's: fields gone, new, renamed and moved, types widened, symbols gone."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def record(self, declared: Declared) -> Declared:
        fields = []
        for each in declared["fields"]:
            if self.rng.random() < 0.15:
                continue
            name = {"name": each["name"]}
            if self.rng.random() < 0.1:
                name = {"name": f"new_{each['name']}", "aliases": [each["name"]]}
            fields.append({**name, "type": self.type(each["type"])})
        for i in range(self.rng.randint(0, 2)):
            type_, default = self.rng.choice(_ADDED)
            fields.append({"name": f"added{i}", "type": type_, "default": default})
        self.rng.shuffle(fields)
        return {**declared, "fields": fields}

    def type(self, declared: Declared) -> Declared:
        if isinstance(declared, list):
            return [self.branch(b) for b in self.rng.sample(declared, self.rng.randint(1, len(declared)))]
        made = self.branch(declared)
        if isinstance(declared, str) and self.rng.random() < 0.3:
            made = self.rng.choice(_WIDER.get(declared, [declared]))
        return ["null", made] if made != "null" and self.rng.random() < 0.15 else made

    def branch(self, declared: Declared) -> Declared:
        match declared:
            case {"type": "record"}:
                return self.record(declared)
            case {"type": "array", "items": items}:
                return {"type": "array", "items": self.type(items)}
            case {"type": "map", "values": values}:
                return {"type": "map", "values": self.type(values)}
            case {"type": "enum", "symbols": symbols}:
                kept = self.rng.sample(symbols, self.rng.randint(1, len(symbols)))
                default = {"default": kept[0]} if self.rng.random() < 0.5 else {}
                return {**declared, "symbols": kept, **default}
        return declared
