"""What the Avro tests share: batches from values, a registry in memory, and random schemas with values for them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import fastavro
import numpy as np
from hypothesis import strategies as st

from streamproc.avro.registry import UnknownSchema
from streamproc.avro.schema import Schema, parse_schema
from streamproc.avro.wire import frame
from streamproc.core.batch import RawBatch
from streamproc.core.types import Offset, TopicPartition


class MemoryRegistry:
    """Schemas by id, as a test gives them."""

    def __init__(self, schemas: dict[int, Schema]) -> None:
        self.schemas = schemas

    def schema_by_id(self, schema_id: int) -> Schema:
        if schema_id not in self.schemas:
            raise UnknownSchema(schema_id)
        return self.schemas[schema_id]

    def id_of(self, schema: Schema | str) -> int:
        return next(i for i, known in self.schemas.items() if known is schema)


def batch_of(values: Sequence[bytes | None]) -> RawBatch:
    """Record values side by side without a byte of slack behind them, foreign bytes in front."""
    lengths = np.array([-1 if v is None else len(v) for v in values], np.int64)
    sizes = np.maximum(lengths, 0)
    starts = np.cumsum(sizes) - sizes + 3
    buffer = np.frombuffer(bytearray(b"\xff\xff\xff" + b"".join(v or b"" for v in values)), np.uint8)
    none = np.full(len(values), -1, np.int64)
    offsets = np.arange(len(values))
    return RawBatch(
        TopicPartition("t", 0), buffer, offsets, offsets, none, none, starts, lengths, none, none, Offset(len(values))
    )


def record(fields: Sequence[tuple[str, Any]], name: str = "R") -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": [{"name": n, "type": t} for n, t in fields]}


def schema_of(*fields: tuple[str, Any]) -> Schema:
    return parse_schema(record(fields))


def payload(schema: Schema, value: dict[str, Any]) -> bytes:
    """Avro bytes by fastavro."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema.parsed, value)
    return out.getvalue()


def framed(schema: Schema, value: dict[str, Any], schema_id: int = 1) -> bytes:
    return frame(schema_id, payload(schema, value))


INT = st.integers(-(1 << 31), (1 << 31) - 1)
LONG = st.integers(-(1 << 63), (1 << 63) - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["a", "b", "ähm", "12345678"])
SCALARS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    ("int", INT),
    ("long", LONG),
    ("float", st.floats(width=32, allow_nan=False)),
    ("double", st.floats(allow_nan=False)),
    ("boolean", st.booleans()),
    ("string", TEXT),
    ("bytes", st.binary(max_size=9)),
    ("null", st.none()),
]


@st.composite
def types_with_values(draw: st.DrawFn, depth: int = 2) -> tuple[Any, st.SearchStrategy[Any]]:
    """An Avro type and a strategy for its values."""
    kind = draw(
        st.sampled_from(["scalar"] * 4 + ["nullable", "enum", "fixed"] + ["array", "map", "record"] * (depth > 0))
    )
    name = f"N{draw(st.uuids()).hex}"
    if kind == "scalar":
        return draw(st.sampled_from(SCALARS))
    if kind == "nullable":
        type_, values = draw(st.sampled_from(SCALARS[:-1]))
        branches = draw(st.permutations(["null", type_]))
        return branches, st.none() | values
    if kind == "enum":
        symbols = ["A", "B", "C"][: draw(st.integers(1, 3))]
        return {"type": "enum", "name": name, "symbols": symbols}, st.sampled_from(symbols)
    if kind == "fixed":
        size = draw(st.integers(0, 9))
        return {"type": "fixed", "name": name, "size": size}, st.binary(min_size=size, max_size=size)
    if kind == "record":
        members = draw(st.lists(types_with_values(depth - 1), max_size=3))
        fields = [(f"m{i}", type_) for i, (type_, _) in enumerate(members)]
        return record(fields, name), st.fixed_dictionaries({f"m{i}": v for i, (_, v) in enumerate(members)})
    inner, values = draw(types_with_values(depth - 1))
    if kind == "array":
        return {"type": "array", "items": inner}, st.lists(values, max_size=3)
    return {"type": "map", "values": inner}, st.dictionaries(TEXT, values, max_size=3)


@st.composite
def schemas_with_records(draw: st.DrawFn) -> tuple[Schema, list[dict[str, Any]]]:
    """A record schema of up to six fields, and records of it."""
    members = draw(st.lists(types_with_values(), min_size=1, max_size=6))
    schema = schema_of(*[(f"f{i}", type_) for i, (type_, _) in enumerate(members)])
    values = st.fixed_dictionaries({f"f{i}": v for i, (_, v) in enumerate(members)})
    return schema, draw(st.lists(values, min_size=1, max_size=6))
