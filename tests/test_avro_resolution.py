"""Reader and writer schemas that differ: the specification's rules, on the kernel and on its plain twin."""

from __future__ import annotations

import io
import struct
from typing import Any

import fastavro
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_avro_support import INT, LONG, TEXT, MemoryRegistry, batch_of, framed, payload, record, schema_of

from streamproc.avro.decode import ROW, Decoder, Use
from streamproc.avro.reading import Reading
from streamproc.avro.resolve import Scalar, Unresolvable, resolve
from streamproc.avro.schema import Schema, parse_schema
from streamproc.avro.wire import frame


def both_ways(writer: Schema, reader: Schema, values: list[bytes], columns: list[str] | None = None) -> pl.DataFrame:
    """What the kernel and the plain decoder make of ``values``, which must be the same."""
    wanted = dict.fromkeys(reader.names() if columns is None else columns, Use.VALUE)
    registry = MemoryRegistry({1: writer})
    decoder, plain = Decoder(reader, registry, wanted), Decoder(reader, registry, wanted)
    plain._reading = Reading(reader, registry, plain._types)
    plain._reading._compile = False
    one, other = decoder.decode(batch_of(values)), plain.decode(batch_of(values))
    assert one.frame.equals(other.frame)
    assert one.bad == other.bad
    return one.frame.with_columns(bad=pl.lit(str([b.reason for b in one.bad])))


def test_a_union_branch_of_the_same_kind_comes_before_a_wider_one() -> None:
    tree = resolve(schema_of(("f", "long")), schema_of(("f", ["double", "null", "long"])))
    node = tree.steps[0].node
    assert isinstance(node, Scalar)
    assert node.target is not None
    assert node.target.kind == "long"


def reads(writer: Any, reader: Any, value: Any) -> Any:
    """One value of one field through resolution, or the reason it is bad."""
    write, read = schema_of(("f", writer)), schema_of(("f", reader))
    found = both_ways(write, read, [framed(write, {"f": value})])
    return found["f"][0] if len(found) else pytest.fail(found["bad"][0] if len(found["bad"]) else "bad record")


@pytest.mark.parametrize(
    ("writer", "reader", "value", "expected"),
    [
        ("int", "long", -7, -7),
        ("int", "float", 16_777_217, 16_777_216.0),
        ("int", "double", 16_777_217, 16_777_217.0),
        ("long", "float", (1 << 53) + 1, float(1 << 53)),
        ("long", "double", (1 << 53) + 1, float(1 << 53)),
        ("float", "double", 0.5, 0.5),
        ("string", "bytes", "ä", "ä".encode()),
        ("bytes", "string", "ä".encode(), "ä"),
        ("int", ["null", "long"], 3, 3),
        (["null", "int"], "long", 3, 3),
        (["null", "int"], ["long", "null"], None, None),
        (["int", "float"], "double", 3, 3.0),
        (["string", "bytes"], ["null", "string"], b"x", "x"),
        ("null", ["null", "string"], None, None),
        (["null", "int"], ["null", "float"], 5, 5.0),
    ],
)
def test_promotions_and_unions(writer: Any, reader: Any, value: Any, expected: Any) -> None:
    assert reads(writer, reader, value) == expected


@settings(deadline=None, max_examples=60)
@given(INT, LONG, TEXT, st.none() | LONG)
def test_promotions_agree_with_fastavro(i: int, j: int, text: str, maybe: int | None) -> None:
    writer = schema_of(("i", "int"), ("j", "long"), ("t", "string"), ("m", ["null", "long"]))
    reader = schema_of(("m", ["double", "null"]), ("t", "bytes"), ("j", "double"), ("i", "long"))
    value = {"i": i, "j": j, "t": text, "m": maybe}
    found = both_ways(writer, reader, [framed(writer, value)]).drop(ROW, "bad").row(0, named=True)
    read: Any = fastavro.schemaless_reader(io.BytesIO(payload(writer, value)), writer.parsed, reader.parsed)
    assert found == read


@pytest.mark.parametrize(
    ("writer", "reader", "fact"),
    [
        ("long", "int", "long cannot be read as int"),
        ("double", "float", "double cannot be read as float"),
        ("string", "long", "string cannot be read as long"),
        ("string", ["null", "long"], "string is none of the reader's"),
        (["null", "string"], "long", "null cannot be read as long; field f: string cannot be read as long"),
        ({"type": "array", "items": "string"}, {"type": "array", "items": "int"}, "string cannot be read as int"),
        ({"type": "fixed", "name": "F", "size": 2}, {"type": "fixed", "name": "F", "size": 3}, "the reader has 3"),
        ({"type": "fixed", "name": "F", "size": 2}, {"type": "fixed", "name": "G", "size": 2}, "without that alias"),
        (
            {"type": "long", "logicalType": "timestamp-millis"},
            {"type": "long", "logicalType": "timestamp-micros"},
            "timestamp-millis, the reader has timestamp-micros",
        ),
        (
            {"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 1},
            {"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 2},
            r"decimal\(4, 1\), the reader has decimal\(4, 2\)",
        ),
    ],
)
def test_schemas_that_do_not_resolve_say_why(writer: Any, reader: Any, fact: str) -> None:
    with pytest.raises(Unresolvable, match=fact):
        resolve(schema_of(("f", writer)), schema_of(("f", reader)))


def test_records_of_an_unresolvable_schema_are_bad_and_others_go_on() -> None:
    reader, other = schema_of(("f", "int")), schema_of(("f", "string"))
    batch = batch_of([framed(reader, {"f": 1}, 1), framed(other, {"f": "x"}, 2), framed(reader, {"f": 3}, 1)])
    decoded = Decoder(reader, MemoryRegistry({1: reader, 2: other}), {"f": Use.VALUE}).decode(batch)
    assert decoded.frame["f"].to_list() == [1, 3]
    (bad,) = decoded.bad
    assert bad == (1, "schema 2 does not resolve to the reader's: field f: string cannot be read as int", 2)


def test_only_records_that_use_an_unreadable_union_branch_are_bad() -> None:
    writer, reader = schema_of(("f", ["null", "string"])), schema_of(("f", "string"))
    found = both_ways(writer, reader, [framed(writer, {"f": None}), framed(writer, {"f": "x"})])
    assert found["f"].to_list() == ["x"]
    assert found["bad"][0] == "['does not resolve: field f: null cannot be read as string, field f']"


def test_enums_go_by_symbol_then_default() -> None:
    def enum(symbols: list[str], **more: str) -> dict[str, Any]:
        return {"type": "enum", "name": "E", "symbols": symbols, **more}

    writer = schema_of(("f", enum(["A", "B", "C"])))
    values = [framed(writer, {"f": s}) for s in "ABC"]
    strict = both_ways(writer, schema_of(("f", enum(["C", "A"]))), values)
    assert strict["f"].to_list() == ["A", "C"]
    assert strict["bad"][0] == "['enum symbol B unknown to the reader, field f']"
    lenient = both_ways(writer, schema_of(("f", enum(["C", "A", "X"], default="X"))), values)
    assert lenient["f"].to_list() == ["A", "X", "C"]


def test_missing_fields_take_defaults_and_extra_ones_are_skipped() -> None:
    writer = schema_of(("extra", {"type": "map", "values": {"type": "array", "items": "string"}}), ("a", "int"))
    reader = parse_schema(
        {
            "type": "record",
            "name": "R",
            "fields": [
                {"name": "text", "type": "string", "default": "none"},
                {"name": "a", "type": "int"},
                {"name": "b", "type": "bytes", "default": "\u00ff\u0001"},
                {"name": "day", "type": {"type": "int", "logicalType": "date"}, "default": 1},
                {"name": "maybe", "type": ["null", "long"], "default": None},
                {"name": "x", "type": "double", "default": 2},
                {"name": "l", "type": {"type": "map", "values": "int"}, "default": {"k": 1}},
                {"name": "e", "type": {"type": "enum", "name": "E", "symbols": ["P", "Q"]}, "default": "Q"},
                {
                    "name": "s",
                    "type": {"type": "record", "name": "S", "fields": [{"name": "q", "type": "long", "default": 5}]},
                    "default": {},
                },
            ],
        }
    )
    values = [framed(writer, {"extra": {"k": ["v", "w"]}, "a": n}) for n in (1, 2)]
    found = both_ways(writer, reader, values).drop(ROW, "bad")
    assert found.row(1) == (
        "none", 2, b"\xff\x01", pl.Series([1]).cast(pl.Date)[0], None, 2.0, [{"key": "k", "value": 1}], "Q", {"q": 5},
    )  # fmt: skip
    assert len(found) == 2
    hashed = Decoder(reader, MemoryRegistry({1: writer}), {"text": Use.HASH}).decode(batch_of(values)).frame
    assert hashed["__hi:text"].n_unique() == 1
    assert hashed["__hi:text"].null_count() == 0


def test_a_missing_field_without_default_does_not_resolve() -> None:
    with pytest.raises(Unresolvable, match="field b is not in the writer's schema and has no default"):
        resolve(schema_of(("a", "int")), schema_of(("a", "int"), ("b", "int")))


def test_aliases_of_fields_and_types() -> None:
    writer = schema_of(("old", "int"), ("e", {"type": "enum", "name": "OldE", "symbols": ["A"]}))
    reader = parse_schema(
        {
            "type": "record",
            "name": "New",
            "aliases": ["R"],
            "fields": [
                {"name": "e", "type": {"type": "enum", "name": "NewE", "aliases": ["OldE"], "symbols": ["A"]}},
                {"name": "new", "aliases": ["older", "old"], "type": "long"},
            ],
        }
    )
    found = both_ways(writer, reader, [framed(writer, {"old": 4, "e": "A"})])
    assert found.select("e", "new").row(0) == ("A", 4)
    with pytest.raises(Unresolvable, match="record R, the reader has Other without that alias"):
        resolve(writer, parse_schema(record([], "Other")))


def test_names_match_without_their_namespace() -> None:
    writer = parse_schema(record([("a", "int")], "one.R"))
    reader = parse_schema(record([("a", "int")], "two.R"))
    assert both_ways(writer, reader, [framed(writer, {"a": 1})])["a"].to_list() == [1]


def test_a_logical_type_that_only_the_reader_has_counts() -> None:
    stamp = {"type": "long", "logicalType": "timestamp-millis"}
    found = both_ways(schema_of(("t", "long")), schema_of(("t", stamp)), [frame(1, b"\xd0\x0f")])
    assert found["t"].dtype == pl.Datetime("ms", "UTC")
    assert found["t"].dt.epoch("ms").to_list() == [1000]


def test_a_reader_field_that_is_not_projected_is_judged_all_the_same() -> None:
    writer, reader = schema_of(("a", "bytes"), ("b", "int")), schema_of(("a", "string"), ("b", "int"))
    found = both_ways(writer, reader, [frame(1, b"\x02\xff\x02"), frame(1, b"\x02a\x02")], ["b"])
    assert found["b"].to_list() == [1]
    assert found["bad"][0] == "['invalid UTF-8, field a']"


def test_one_batch_of_several_writer_schemas_keeps_its_order() -> None:
    old, new = schema_of(("a", "int")), schema_of(("b", "string"), ("a", "long"))
    reader = parse_schema(
        {
            "type": "record",
            "name": "R",
            "fields": [{"name": "a", "type": "long"}, {"name": "b", "type": "string", "default": "?"}],
        }
    )
    values = [
        framed(new, {"b": "x", "a": 0}, 2), framed(old, {"a": 1}, 1), frame(2, b"\x02"),
        framed(new, {"b": "y", "a": 3}, 2), framed(old, {"a": 4}, 1), frame(9, b""), None,
    ]  # fmt: skip
    decoded = Decoder(reader, MemoryRegistry({1: old, 2: new}), {"a": Use.VALUE, "b": Use.VALUE | Use.HASH}).decode(
        batch_of(values)
    )
    assert decoded.frame.select(ROW, "a", "b").rows() == [(0, 0, "x"), (1, 1, "?"), (3, 3, "y"), (4, 4, "?")]
    assert [(b.row, b.schema_id) for b in decoded.bad] == [(2, 2), (5, 9), (6, None)]


def test_floats_keep_their_bits() -> None:
    schema = schema_of(("d", "double"), ("f", "float"))
    nan = struct.pack("<d", float("nan")) + struct.pack("<f", float("inf"))
    found = both_ways(schema, schema, [frame(1, nan), frame(1, struct.pack("<df", -0.0, 0.1))])
    assert str(found["d"].to_list()) == "[nan, -0.0]"
    assert found["f"].to_list() == [float("inf"), struct.unpack("<f", struct.pack("<f", 0.1))[0]]
