"""Records as Structs for per-record agents, and values back to records."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_avro_support import MemoryRegistry, batch_of, framed, record, schema_of, schemas_with_records

from streamproc.avro.rows import Encoder, RowDecoder
from streamproc.avro.schema import Schema, parse_schema
from streamproc.avro.warm import warm_up
from streamproc.avro.wire import frame
from streamproc.core.errors import UserError

MS = {"type": "long", "logicalType": "timestamp-millis"}
US = {"type": "long", "logicalType": "timestamp-micros"}
LOCAL = {"type": "long", "logicalType": "local-timestamp-micros"}
DATE = {"type": "int", "logicalType": "date"}
DECIMAL = {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2}
FIXED_DECIMAL = {"type": "fixed", "name": "F", "size": 3, "logicalType": "decimal", "precision": 5, "scale": 1}
EVENT = schema_of(
    ("id", "string"),
    ("amount", ["null", "double"]),
    ("at", MS),
    ("day", DATE),
    ("kind", {"type": "enum", "name": "K", "symbols": ["A", "B"]}),
    ("raw", "bytes"),
    ("ok", "boolean"),
)
NESTED = schema_of(
    ("who", record([("name", "string"), ("born", ["null", DATE])], "Person")),
    ("tags", {"type": "map", "values": {"type": "array", "items": "int"}}),
    ("either", ["string", "long"]),
    ("price", DECIMAL),
)


def as_plain(value: Any) -> Any:
    """Structs as dicts, all the way down."""
    if isinstance(value, msgspec.Struct):
        return {name: as_plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {k: as_plain(v) for k, v in value.items()}
    return [as_plain(v) for v in value] if isinstance(value, list) else value


@settings(deadline=None, max_examples=60)
@given(schemas_with_records())
def test_rows_are_the_values_that_were_written(case: tuple[Schema, list[dict[str, Any]]]) -> None:
    schema, records = case
    rows, bad = RowDecoder(schema, MemoryRegistry({1: schema})).rows(batch_of([framed(schema, r) for r in records]))
    assert bad == []
    assert [as_plain(row) for row in rows] == records


def test_flat_records_have_attributes_of_python_types() -> None:
    value = {
        "id": "a", "amount": None, "at": datetime(2024, 5, 6, 7, 8, 9, 123000, UTC), "day": date(2024, 5, 6),
        "kind": "B", "raw": b"\0\xff", "ok": True,
    }  # fmt: skip
    (row,), _ = RowDecoder(EVENT, MemoryRegistry({1: EVENT})).rows(batch_of([framed(EVENT, value)]))
    assert type(row).__name__ == "R"
    assert as_plain(row) == value
    assert row.at.tzinfo is UTC
    row.amount = 2.0


def test_nested_records_maps_unions_and_decimals() -> None:
    value = {
        "who": {"name": "Ada", "born": date(1815, 12, 10)}, "tags": {"x": [1, 2]}, "either": 5,
        "price": Decimal("12.50"),
    }  # fmt: skip
    (row,), _ = RowDecoder(NESTED, MemoryRegistry({1: NESTED})).rows(batch_of([framed(NESTED, value)]))
    assert row.who.name == "Ada"
    assert as_plain(row) == value


def test_bad_records_are_left_out_and_the_others_keep_their_order() -> None:
    old = schema_of(("a", "int"))
    reader = schema_of(("a", "long"))
    values = [framed(reader, {"a": 1}, 2), framed(old, {"a": 2}, 1), frame(1, b""), None, framed(reader, {"a": 5}, 2)]
    rows, bad = RowDecoder(reader, MemoryRegistry({1: old, 2: reader})).rows(batch_of(values))
    assert [row.a for row in rows] == [1, 2, 5]
    assert [(b.row, b.reason, b.schema_id) for b in bad] == [(2, "truncated, field a", 1), (3, "null value", None)]
    assert RowDecoder(reader, MemoryRegistry({})).rows(batch_of([])) == ([], [])


def test_missing_fields_take_defaults() -> None:
    reader = parse_schema(
        {
            "type": "record",
            "name": "R",
            "fields": [
                {"name": "a", "type": "int"},
                {"name": "at", "type": MS, "default": 1000},
                {"name": "n", "type": ["null", "string"], "default": None},
            ],
        }
    )
    writer = schema_of(("a", "int"))
    (row,), _ = RowDecoder(reader, MemoryRegistry({1: writer})).rows(batch_of([framed(writer, {"a": 1})]))
    assert as_plain(row) == {"a": 1, "at": datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), "n": None}


def test_a_default_that_no_attribute_can_hold_is_refused_at_the_start() -> None:
    schema = parse_schema(
        {"type": "record", "name": "R", "fields": [{"name": "at", "type": MS, "default": 1 << 60}]}, source="r.avsc"
    )
    with pytest.raises(UserError, match=r"default of the schema r\.avsc .* field at"):
        RowDecoder(schema, MemoryRegistry({}))


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIMES = st.datetimes(timezones=st.just(UTC))


@settings(deadline=None, max_examples=150)
@given(st.lists(TIMES, min_size=1, max_size=5), st.booleans())
def test_every_time_python_can_hold_is_exact(moments: list[datetime], near: bool) -> None:
    schema = schema_of(("ms", MS), ("us", US), ("local", LOCAL), ("day", DATE))
    if near:
        moments = [EPOCH + (moment - EPOCH) % timedelta(days=40_000) for moment in moments]
    values = [
        {
            "ms": moment.replace(microsecond=moment.microsecond // 1000 * 1000), "us": moment,
            "local": moment.replace(tzinfo=None), "day": moment.date(),
        }
        for moment in moments
    ]  # fmt: skip
    raw = [
        frame(1, b"".join(map(zigzag, (
            (v["ms"] - EPOCH) // timedelta(milliseconds=1), (v["us"] - EPOCH) // timedelta(microseconds=1),
            (v["us"] - EPOCH) // timedelta(microseconds=1), (v["day"] - EPOCH.date()).days,
        ))))
        for v in values
    ]  # fmt: skip
    rows, bad = RowDecoder(schema, MemoryRegistry({1: schema})).rows(batch_of(raw))
    assert bad == []
    assert [as_plain(row) for row in rows] == values


@settings(deadline=None, max_examples=150)
@given(st.lists(st.none() | TIMES.map(lambda moment: moment.replace(fold=0)), min_size=1, max_size=8))
@example([datetime.min.replace(tzinfo=UTC), None, datetime.max.replace(tzinfo=UTC)])
@example(
    [datetime(year, month, day, tzinfo=UTC) for year in (1900, 2000, 2023, 2024) for month, day in ((2, 28), (3, 1))]
)
@example([datetime(2024, 2, 29, 23, 59, 59, 999_999, UTC), EPOCH, EPOCH - timedelta(microseconds=1)])
def test_a_moment_is_what_python_would_have_made_of_it(moments: list[datetime | None]) -> None:
    schema = schema_of(("at", ["null", US]))
    raw = [
        frame(1, b"\0" if moment is None else b"\2" + zigzag((moment - EPOCH) // timedelta(microseconds=1)))
        for moment in moments
    ]
    rows, bad = RowDecoder(schema, MemoryRegistry({1: schema})).rows(batch_of(raw))
    assert bad == []
    assert [row.at for row in rows] == moments
    assert [repr(row.at) for row in rows] == list(map(repr, moments))
    assert pickle.loads(pickle.dumps([row.at for row in rows])) == moments


def zigzag(value: int) -> bytes:
    value, out = (value << 1) ^ (value >> 63), bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("nested", [False, True])
def test_a_time_beyond_pythons_years_is_a_bad_record(nested: bool) -> None:
    schema = schema_of(("at", MS), *([("l", {"type": "array", "items": "int"})] if nested else []))
    tail = b"\0" if nested else b""
    values = [frame(1, zigzag(v) + tail) for v in (0, 253_402_300_800_000, -62_135_596_800_001, 5, -(1 << 63))]
    rows, bad = RowDecoder(schema, MemoryRegistry({1: schema})).rows(batch_of(values))
    assert [row.at for row in rows] == [EPOCH, EPOCH + timedelta(milliseconds=5)]
    assert [b.row for b in bad] == [1, 2, 4]
    assert bad[0].reason == "timestamp-millis 253402300800000 is not in the years 1 to 9999, field at"


def test_fields_may_have_the_names_of_keywords() -> None:
    schema = schema_of(("from", "int"), ("class", "string"))
    (row,), _ = RowDecoder(schema, MemoryRegistry({1: schema})).rows(
        batch_of([framed(schema, {"from": 1, "class": "x"})])
    )
    assert getattr(row, "from") == 1


def test_a_schema_without_fields_has_rows() -> None:
    schema = schema_of()
    rows, bad = RowDecoder(schema, MemoryRegistry({1: schema})).rows(batch_of([frame(1, b""), frame(1, b"x")]))
    assert len(rows) == 1
    assert [b.reason for b in bad] == ["trailing bytes: 1"]


@dataclass
class Pair:
    a: int
    b: str


class PairStruct(msgspec.Struct):
    a: int
    b: str


PAIR = schema_of(("a", "int"), ("b", ["null", "string"]))


@pytest.mark.parametrize("value", [{"a": 1, "b": "x"}, Pair(1, "x"), PairStruct(1, "x")])
def test_encodes_mappings_structs_and_dataclasses(value: Any) -> None:
    assert Encoder(PAIR, 3).encode(value) == b"\0\0\0\0\x03\x02\x02\x02x"


def test_what_was_decoded_can_be_encoded() -> None:
    value = {"who": {"name": "Ada", "born": None}, "tags": {}, "either": "x", "price": Decimal("0.01")}
    encoder = Encoder(NESTED, 1)
    (row,), _ = RowDecoder(NESTED, MemoryRegistry({1: NESTED})).rows(batch_of([encoder.encode(value)]))
    assert encoder.encode(row) == encoder.encode(value)


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        ({"a": "x", "b": None}, "Field 'a' cannot hold 'x'"),
        ({"a": 1 << 40, "b": None}, "Field 'a' cannot hold 1099511627776"),
        ({"b": None}, "Field 'a' is missing"),
        ({"a": 1}, "Field 'b' is missing"),
        ({"a": True, "b": None}, "Field 'a' cannot hold True"),
        ({"a": 1, "b": 5}, "Field 'b' cannot hold 5"),
        ({"a": 1, "b": "\udc80"}, "Field 'b' cannot hold"),
        ({"a": 1, "b": None, "c": 5}, "no field 'c'"),
        ([1], r"\[1\] is not a record"),
    ],
)
def test_a_value_that_does_not_fit_names_its_field(value: Any, fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        Encoder(PAIR, 1).encode(value)


@settings(deadline=None, max_examples=80)
@given(schemas_with_records())
def test_writes_the_bytes_that_fastavro_writes(case: tuple[Schema, list[dict[str, Any]]]) -> None:
    schema, records = case
    encoder = Encoder(schema, 1)
    assert [encoder.encode(r) for r in records] == [framed(schema, r) for r in records]


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (DECIMAL, Decimal("9999.99")), (DECIMAL, Decimal("-9999.99")), (DECIMAL, Decimal("1E+3")),
        (DECIMAL, Decimal(0)), (DECIMAL, Decimal("1.0000000000000")), (FIXED_DECIMAL, Decimal("-7.5")),
        (MS, datetime(1969, 12, 31, 23, 59, 59, 999000, UTC)), (US, datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)),
        (DATE, date(1, 1, 1)), (LOCAL, datetime(2024, 1, 1, 0, 0, 0, 1)), (["double", "long"], 1 << 53),
        (["string", "long", "null"], None), (["int", "double"], 0.5), (["int", "long"], 1 << 40),
    ],
)  # fmt: skip
def test_logical_values_and_unions_come_back(type_: Any, value: Any) -> None:
    schema = schema_of(("f", type_))
    (row,), _ = RowDecoder(schema, MemoryRegistry({1: schema})).rows(
        batch_of([Encoder(schema, 1).encode({"f": value})])
    )
    assert row.f == value
    assert type(row.f) is type(value)


@pytest.mark.parametrize(
    ("type_", "value"),
    [
        (DECIMAL, Decimal("10000")), (DECIMAL, Decimal("0.001")), (DECIMAL, Decimal("NaN")),
        (DECIMAL, Decimal("1E+999999")), (FIXED_DECIMAL, Decimal("10000")),
        (DATE, datetime(2024, 1, 1)), (MS, "2024"), ("float", 1e300), ("double", 10**400), ("bytes", "x"),
        ({"type": "array", "items": "int"}, "x"), ({"type": "map", "values": "int"}, {1: 1}),
        (["int", "string"], b"x"), ({"type": "enum", "name": "E", "symbols": ["A"]}, "B"),
        ({"type": "fixed", "name": "F", "size": 2}, b"x"),
    ],
)  # fmt: skip
def test_what_the_type_does_not_take_is_refused(type_: Any, value: Any) -> None:
    with pytest.raises(UserError, match="Field 'f' cannot hold"):
        Encoder(schema_of(("f", type_)), 1).encode({"f": value})


def test_a_misfit_deep_inside_is_named_by_its_path() -> None:
    value = {"who": {"name": 5, "born": None}, "tags": {}, "either": "x", "price": Decimal(1)}
    with pytest.raises(UserError, match=r"Field 'who\.name' cannot hold 5"):
        Encoder(NESTED, 1).encode(value)


def test_recursive_values_and_defaults_are_written() -> None:
    schema = parse_schema(
        {
            "type": "record",
            "name": "Node",
            "fields": [
                {"name": "v", "type": "int", "default": 7},
                {"name": "next", "type": ["null", "Node"], "default": None},
            ],
        }
    )
    data = Encoder(schema, 1).encode({"next": {"v": 1, "next": {}}})
    (row,), _ = RowDecoder(schema, MemoryRegistry({1: schema})).rows(batch_of([data]))
    assert as_plain(row) == {"v": 7, "next": {"v": 1, "next": {"v": 7, "next": None}}}


def test_warm_up_may_be_called_twice() -> None:
    warm_up()
    warm_up()
