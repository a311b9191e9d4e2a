"""The compiled decoder, its plain twin and fastavro agree on valid bytes; the first two on every other."""

from __future__ import annotations

import io
import random
import struct
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import fastavro
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_avro_support import (
    MemoryRegistry,
    batch_of,
    framed,
    payload,
    schema_of,
    schemas_with_records,
)

from streamproc.avro import reading
from streamproc.avro.columns import column_type, columns_of
from streamproc.avro.decode import ROW, BadRecord, Decoder, Use, dtype_of
from streamproc.avro.kernel import valid_utf8
from streamproc.avro.program import NotCompilable, compile_program
from streamproc.avro.reading import Reading
from streamproc.avro.registry import Registry
from streamproc.avro.resolve import resolve
from streamproc.avro.schema import Array, AvroType, MapOf, Record, Schema, parse_schema
from streamproc.avro.wire import frame
from streamproc.core import limits
from streamproc.core.errors import UserError
from streamproc.core.hash128 import hash_series

FAST = settings(deadline=None, max_examples=80)


def plain_decoder(schema: Schema, registry: Registry, columns: dict[str, Use]) -> Decoder:
    """A decoder that never uses the kernel."""
    decoder = Decoder(schema, registry, columns)
    decoder._reading = Reading(schema, registry, decoder._types)
    decoder._reading._compile = False
    return decoder


def everything(schema: Schema) -> dict[str, Use]:
    return dict.fromkeys(columns_of(schema), Use.VALUE)


def flat(schema: Schema) -> dict[str, Use]:
    return {name: Use.VALUE for name in columns_of(schema) if column_type(schema, name).kind != "other"}


def as_column(value: Any, type_: AvroType) -> Any:
    """fastavro's value as a Polars row shows it: maps are lists of key and value."""
    match type_:
        case MapOf():
            return [{"key": k, "value": as_column(v, type_.values)} for k, v in value.items()]
        case Array():
            return [as_column(v, type_.items) for v in value]
        case Record():
            return {f.name: as_column(value[f.name], f.type) for f in type_.fields}
    return value


@FAST
@given(schemas_with_records())
def test_kernel_twin_and_fastavro_agree_on_valid_records(case: tuple[Schema, list[dict[str, Any]]]) -> None:
    schema, records = case
    batch = batch_of([framed(schema, r) for r in records])
    registry, columns = MemoryRegistry({1: schema}), flat(schema)
    compiled = Decoder(schema, registry, columns).decode(batch)
    plain = plain_decoder(schema, registry, columns).decode(batch)
    assert compiled.bad == plain.bad == []
    assert compiled.frame.equals(plain.frame)
    assert compiled.frame.schema == plain.frame.schema
    read = [fastavro.schemaless_reader(io.BytesIO(payload(schema, r)), schema.parsed, None) for r in records]
    assert compiled.frame.rows(named=True) == [
        {ROW: i} | {name: r[name] for name in columns}  # type: ignore[index, call-overload]
        for i, r in enumerate(read)
    ]


@FAST
@given(schemas_with_records())
def test_nested_columns_hold_what_fastavro_reads(case: tuple[Schema, list[dict[str, Any]]]) -> None:
    schema, records = case
    columns = everything(schema)
    decoded = Decoder(schema, MemoryRegistry({1: schema}), columns).decode(
        batch_of([framed(schema, r) for r in records])
    )
    read = [fastavro.schemaless_reader(io.BytesIO(payload(schema, r)), schema.parsed, None) for r in records]
    for name in columns:
        expected = [as_column(r[name], schema.field(name).type) for r in read]  # type: ignore[union-attr, index, call-overload]
        assert decoded.frame[name].to_list() == expected


def mutated(data: bytes, seed: int) -> bytes:
    """Cut, flipped, overwritten, extended: what a hostile or broken producer might send."""
    rng = random.Random(seed)
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0:
                del out[at:]
            case 1 if at < len(out):
                out[at] = rng.choice([0, 1, 2, 3, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            case 2:
                out[at:at] = rng.choice([b"\xff" * 9 + b"\x01", b"\xff" * 10, b"\x80" * 11, b"\xed\xa0\x80", b"\x01"])
            case 3 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 4:
                del out[at : at + rng.randint(1, 4)]
    return bytes(out)


@settings(deadline=None, max_examples=150)
@given(schemas_with_records(), st.integers(0, 1 << 30))
def test_kernel_and_twin_give_one_verdict_on_hostile_bytes(
    case: tuple[Schema, list[dict[str, Any]]], seed: int
) -> None:
    schema, records = case
    values = [frame(1, mutated(payload(schema, r), seed + i)) for i, r in enumerate(records * 5)]
    registry, columns = MemoryRegistry({1: schema}), flat(schema)
    compiled = Decoder(schema, registry, columns).decode(batch_of(values))
    plain = plain_decoder(schema, registry, columns).decode(batch_of(values))
    assert compiled.bad == plain.bad
    assert compiled.frame.equals(plain.frame)
    projected = Decoder(schema, registry, {}).decode(batch_of(values))
    assert projected.bad == compiled.bad, "the verdict must not depend on the columns asked for"


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=20) | st.text(max_size=12).map(str.encode))
def test_utf8_is_judged_as_python_does(data: bytes) -> None:
    try:
        data.decode()
        good = True
    except UnicodeDecodeError:
        good = False
    assert valid_utf8(np.frombuffer(bytearray(data + b"\x80" * 8), np.uint8), 0, len(data)) == good


def test_every_two_and_three_byte_start_is_judged_as_python_does() -> None:
    for first in range(0xC0, 0x100):
        for second in (0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0):
            for tail in (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80", b"\x80\xc0"):
                data = bytes([first, second]) + tail
                good = data.decode(errors="replace").find("\ufffd") < 0
                assert valid_utf8(np.frombuffer(bytearray(data), np.uint8), 0, len(data)) == good, data


ORDER = schema_of(
    ("id", "string"),
    ("n", "int"),
    ("note", ["null", "string"]),
    ("ok", "boolean"),
    ("kind", {"type": "enum", "name": "K", "symbols": ["A", "B"]}),
    ("tags", {"type": "array", "items": "null"}),
    ("map", {"type": "map", "values": "long"}),
)
GOOD = {"id": "x", "n": 1, "note": None, "ok": True, "kind": "B", "tags": [], "map": {}}
HEAD = b"\x02x"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated, field id"),
        (b"\x04x", "truncated, field id"),
        (b"\x01", "negative length -1, field id"),
        (b"\xff" * 9 + b"\x01", f"negative length {-(1 << 63)}, field id"),
        (b"\xff" * 9 + b"\x02", "varint longer than 64 bits, field id"),
        (b"\x80" * 10 + b"\x00", "varint longer than 64 bits, field id"),
        (b"\x02\xff", "invalid UTF-8, field id"),
        (HEAD + b"\x80\x80\x80\x80\x10", "int 2147483648 beyond 32 bits, field n"),
        (HEAD + b"\x02\x0a", "union index 5 of 2, field note"),
        (HEAD + b"\x02\x01", "union index -1 of 2, field note"),
        (HEAD + b"\x02\x00\x07", "boolean byte 7, field ok"),
        (HEAD + b"\x02\x00\x01\x04", "enum index 2 of 2, field kind"),
        (HEAD + b"\x02\x00\x01\x01", "enum index -1 of 2, field kind"),
        (HEAD + b"\x02\x00\x01\x00" + b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01", "too many items"),
        (HEAD + b"\x02\x00\x01\x00" + b"\xff" * 9 + b"\x01" + b"\x00", "too many items"),
        (HEAD + b"\x02\x00\x01\x00\x01\x02", "truncated, field tags"),
        (HEAD + b"\x02\x00\x01\x00\x01\x01", "negative length -1, field tags"),
        (HEAD + b"\x02\x00\x01\x00\x01\x02\x00\x00\x00", "block of another size than it says, field tags"),
        (HEAD + b"\x02\x00\x01\x00\x00\x02\x02\xc0\x02\x00", "invalid UTF-8, field map"),
        (HEAD + b"\x02\x00\x01\x00\x00\x00!", "trailing bytes: 1"),
    ],
)
def test_malformed_bytes_are_named_and_cost_only_their_record(data: bytes, reason: str) -> None:
    batch = batch_of([framed(ORDER, GOOD), frame(1, data), framed(ORDER, GOOD)])
    for make in (Decoder, plain_decoder):
        decoded = make(ORDER, MemoryRegistry({1: ORDER}), flat(ORDER)).decode(batch)
        (bad,) = decoded.bad
        assert (bad.row, bad.schema_id) == (1, 1)
        assert bad.reason.startswith(reason)
        assert decoded.frame[ROW].to_list() == [0, 2]


def test_values_outside_the_wire_format_say_why() -> None:
    good = framed(ORDER, GOOD)
    values = [
        None,
        b"",
        b"\x07abcde",
        b"\x00\x00",
        good,
        b"\x00" + struct.pack(">i", 99),
        b"\x00\xff\xff\xff\xff",
        good,
    ]
    decoded = Decoder(ORDER, MemoryRegistry({1: ORDER}), {"id": Use.VALUE}).decode(batch_of(values))
    assert decoded.bad == [
        BadRecord(0, "null value", None),
        BadRecord(1, "no value", None),
        BadRecord(2, "wrong magic byte 7", None),
        BadRecord(3, "truncated header of 2 bytes", None),
        BadRecord(5, "unknown schema id 99", 99),
        BadRecord(6, "unknown schema id -1", -1),
    ]
    assert decoded.frame.to_dict(as_series=False) == {ROW: [4, 7], "id": ["x", "x"]}


def test_an_empty_batch_and_one_of_bad_records_have_the_columns_too() -> None:
    decoder = Decoder(ORDER, MemoryRegistry({1: ORDER}), {"id": Use.VALUE | Use.HASH, "n": Use.HASH})
    for batch in (batch_of([]), batch_of([None])):
        assert decoder.decode(batch).frame.schema == decoder.schema
    assert decoder.decode(batch_of([framed(ORDER, GOOD)])).frame.schema == decoder.schema


def test_items_of_no_size_are_bounded_and_real_ones_are_not() -> None:
    schema = schema_of(("a", {"type": "array", "items": "null"}), ("b", {"type": "array", "items": "int"}))
    most = limits.AVRO_ITEMS_MAX
    for nulls, ints, good in ((most, 0, True), (most + 1, 0, False), (0, 2 * most, True), (most, 1, False)):
        batch = batch_of([framed(schema, {"a": [None] * nulls, "b": [1] * ints})])
        for make in (Decoder, plain_decoder):
            decoded = make(schema, MemoryRegistry({1: schema}), {}).decode(batch)
            assert (decoded.bad == []) is good


def test_recursive_types_are_read_and_their_depth_is_bounded() -> None:
    node = {
        "type": "record",
        "name": "Node",
        "fields": [{"name": "v", "type": "int"}, {"name": "next", "type": ["null", "Node"]}],
    }
    schema = parse_schema(node)
    with pytest.raises(NotCompilable):
        compile_program(resolve(schema, schema), {})
    deep = b"\x02\x02" * 500 + b"\x02\x00"
    values = [framed(schema, {"v": 1, "next": {"v": 2, "next": None}}), frame(1, deep)]
    decoded = Decoder(schema, MemoryRegistry({1: schema}), {"v": Use.VALUE}).decode(batch_of(values))
    assert decoded.frame["v"].to_list() == [1]
    assert [b.reason.split(",")[0] for b in decoded.bad] == [f"nested deeper than {limits.AVRO_DEPTH_MAX}"]
    with pytest.raises(UserError, match="recursive type"):
        dtype_of(schema, "next")


def test_logical_types_become_dates_times_and_decimals() -> None:
    schema = schema_of(
        ("d", {"type": "int", "logicalType": "date"}),
        ("ms", {"type": "long", "logicalType": "timestamp-millis"}),
        ("us", ["null", {"type": "long", "logicalType": "timestamp-micros"}]),
        ("lms", {"type": "long", "logicalType": "local-timestamp-millis"}),
        ("dec", {"type": "bytes", "logicalType": "decimal", "precision": 5, "scale": 2}),
        ("odd", {"type": "string", "logicalType": "no-such-thing"}),
    )
    moment = datetime(2024, 2, 29, 12, 30, 1, 5000, UTC)
    value = {
        "d": date(1969, 12, 30), "ms": moment, "us": moment, "lms": moment.replace(tzinfo=None),
        "dec": Decimal("-123.45"), "odd": "x",
    }  # fmt: skip
    frame_ = (
        Decoder(schema, MemoryRegistry({1: schema}), everything(schema)).decode(batch_of([framed(schema, value)])).frame
    )
    assert frame_.drop(ROW).row(0, named=True) == value
    assert frame_.schema["ms"] == pl.Datetime("ms", "UTC") == dtype_of(schema, "ms")
    assert frame_.schema["us"] == pl.Datetime("us", "UTC")
    assert frame_.schema["lms"] == pl.Datetime("ms")
    assert frame_.schema["dec"] == pl.Decimal(5, 2)


def test_a_decimal_beyond_its_precision_is_bad_whether_asked_for_or_not() -> None:
    schema = schema_of(("dec", {"type": "bytes", "logicalType": "decimal", "precision": 3, "scale": 0}))
    values = [frame(1, b"\x04\x03\xe7"), frame(1, b"\x04\x03\xe8"), frame(1, b"\x00")]
    for columns in ({}, {"dec": Use.VALUE}):
        decoded = Decoder(schema, MemoryRegistry({1: schema}), columns).decode(batch_of(values))
        assert [b.reason for b in decoded.bad] == ["decimal of more than 3 digits, field dec"]
        assert decoded.frame[ROW].to_list() == [0, 2]


@FAST
@given(
    st.lists(st.none() | st.text(max_size=10) | st.sampled_from(["a", "bb", "same\0zero"]), max_size=60), st.booleans()
)
def test_texts_come_out_alike_interned_or_not(texts: list[str | None], crowded: bool) -> None:
    schema = schema_of(("t", ["null", "string"]))
    decoder = Decoder(schema, MemoryRegistry({1: schema}), {"t": Use.VALUE | Use.HASH})
    if crowded:
        decoder._texts["t"].gave_up()
    frame_ = decoder.decode(batch_of([framed(schema, {"t": t}) for t in texts])).frame
    assert frame_["t"].to_list() == texts


@FAST
@given(schemas_with_records())
def test_hashes_equal_those_of_the_values(case: tuple[Schema, list[dict[str, Any]]]) -> None:
    schema, records = case
    columns = {
        name: Use.VALUE | Use.HASH for name in flat(schema) if column_type(schema, name).kind not in ("null", "other")
    }
    registry, batch = MemoryRegistry({1: schema}), batch_of([framed(schema, r) for r in records])
    for make in (Decoder, plain_decoder):
        frame_ = make(schema, registry, columns).decode(batch).frame
        for name in columns:
            nulls = frame_[name].is_null().to_list()
            for side, words in zip(("__hi:", "__lo:"), hash_series(frame_[name]), strict=True):
                expected = [None if null else w for null, w in zip(nulls, words.tolist(), strict=True)]
                assert frame_[side + name].to_list() == expected
    only = Decoder(schema, registry, dict.fromkeys(columns, Use.HASH)).decode(batch).frame
    assert only.equals(frame_.select(only.columns)) if columns else len(only) == len(records)


def test_dates_and_times_hash_as_their_integer_in_the_decoder_too() -> None:
    schema = schema_of(
        ("d", {"type": "int", "logicalType": "date"}), ("t", {"type": "long", "logicalType": "timestamp-millis"})
    )
    columns = dict.fromkeys(("d", "t"), Use.VALUE | Use.HASH)
    value = {"d": date(2020, 2, 3), "t": datetime(2020, 2, 3, tzinfo=UTC)}
    frame_ = Decoder(schema, MemoryRegistry({1: schema}), columns).decode(batch_of([framed(schema, value)])).frame
    for name in columns:
        hi, lo = hash_series(frame_[name])
        assert (frame_[f"__hi:{name}"][0], frame_[f"__lo:{name}"][0]) == (hi[0], lo[0])


def test_misspelt_and_impossible_columns_are_refused_by_name() -> None:
    schema = schema_of(("country", "string"), ("u", ["string", "long"]), ("l", {"type": "array", "items": "int"}))
    registry = MemoryRegistry({1: schema})
    with pytest.raises(UserError, match=r"no column 'contry'.*'country'"):
        Decoder(schema, registry, {"contry": Use.VALUE})
    with pytest.raises(UserError, match="union of string and long"):
        dtype_of(schema, "u")
    with pytest.raises(UserError, match="cannot be a key"):
        Decoder(schema, registry, {"l": Use.HASH})
    assert dtype_of(schema, "l") == pl.List(pl.Int64())
    assert set(columns_of(schema)) == {"country", "l"}
    value = {"country": "de", "u": "x", "l": [1]}
    decoded = Decoder(schema, registry, {"country": Use.VALUE}).decode(batch_of([framed(schema, value)]))
    assert decoded.frame["country"].to_list() == ["de"]


def test_unknown_ids_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading.limits, "AVRO_SCHEMAS_MAX", 3)
    decoder = Decoder(ORDER, MemoryRegistry({1: ORDER}), {})
    decoded = decoder.decode(batch_of([frame(i, b"") for i in range(10, 20)] + [framed(ORDER, GOOD)]))
    assert len(decoded.bad) == 10
    assert len(decoder._reading._ways) == 3
