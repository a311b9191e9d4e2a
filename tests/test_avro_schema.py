"""Schemas, the folder of schemas and the wire format: what is wrong is said with its place and its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamproc.avro.registry import DirectoryRegistry, UnknownSchema
from streamproc.avro.schema import MISSING, Record, load_schema, parse_schema
from streamproc.avro.wire import Unframed, frame, unframe
from streamproc.core.errors import UserError

ORDER = {"type": "record", "name": "Order", "fields": [{"name": "id", "type": "string"}]}


def folder_of(tmp_path: Path, ids: Any, **files: Any) -> Path:
    for name, schema in files.items():
        (tmp_path / f"{name}.avsc").write_text(json.dumps(schema))
    if ids is not None:
        (tmp_path / "ids.json").write_text(ids if isinstance(ids, str) else json.dumps(ids))
    return tmp_path


def field(type_: Any, **more: Any) -> dict[str, Any]:
    return {"type": "record", "name": "R", "fields": [{"name": "f", "type": type_, **more}]}


def test_reads_a_schema_with_types_in_files_beside_it(tmp_path: Path) -> None:
    order = {"type": "record", "name": "Order", "fields": [{"name": "to", "type": "Address"}]}
    address = {"type": "record", "name": "Address", "fields": [{"name": "city", "type": "string"}]}
    folder = folder_of(tmp_path, None, Order=order, Address=address)
    inner = load_schema(folder / "Order.avsc").root.fields[0].type
    assert isinstance(inner, Record)
    assert [f.name for f in inner.fields] == ["city"]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("{", "is not JSON"),
        ('"string"', "is of type string, but the values of a topic must be records"),
        ('{"type": "record", "name": "R"}', "is not a valid Avro schema: the record 'R' has no list of fields"),
        ('{"type": "record", "name": "R", "fields": [{"name": "f", "type": "Nope"}]}', "uses the type 'Nope'"),
    ],
)
def test_a_file_that_is_no_schema_is_named(tmp_path: Path, text: str, fact: str) -> None:
    path = tmp_path / "bad.avsc"
    path.write_text(text)
    with pytest.raises(UserError, match=fact) as caught:
        load_schema(path)
    assert "bad.avsc" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.avsc"):
        load_schema(tmp_path / "none.avsc")


@pytest.mark.parametrize(
    ("type_", "more"),
    [
        ("int", {"default": "x"}),
        ("int", {"default": 1 << 31}),
        ("boolean", {"default": 1}),
        (["null", "int"], {"default": "x"}),
        ("bytes", {"default": "\u0100"}),
        ({"type": "array", "items": "int"}, {"default": ["x"]}),
        ({"type": "bytes", "logicalType": "decimal", "precision": 50}, {}),
    ],
)
def test_a_wrong_default_or_decimal_is_named_by_field(type_: Any, more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"(R\.)?f"):
        parse_schema(field(type_, **more), source="r.avsc")


def test_defaults_are_decoded_values() -> None:
    assert parse_schema(field("bytes", default="\u00ff")).root.fields[0].default == b"\xff"
    assert parse_schema(field("double", default=1)).root.fields[0].default == 1.0
    assert parse_schema(field(["int", "null"], default=None)).root.fields[0].default is None
    assert parse_schema(field("int")).root.fields[0].default is MISSING


def test_a_folder_answers_by_id_and_by_schema(tmp_path: Path) -> None:
    newer = {**ORDER, "fields": [*ORDER["fields"], {"name": "n", "type": "int"}]}  # type: ignore[misc]
    registry = DirectoryRegistry(
        folder_of(tmp_path, {"1": "order.avsc", "7": "order2.avsc"}, order=ORDER, order2=newer)
    )
    assert registry.schema_by_id(7).names() == ["id", "n"]
    assert registry.ids() == {1: "order.avsc", 7: "order2.avsc"}
    assert registry.id_of("order.avsc") == 1
    assert registry.id_of(load_schema(tmp_path / "order2.avsc")) == 7
    assert registry.id_of(parse_schema(ORDER)) == 1
    with pytest.raises(UnknownSchema, match="unknown schema id 2"):
        registry.schema_by_id(2)
    with pytest.raises(UserError, match=r'no id in .*"8": "other.avsc"'):
        registry.id_of("other.avsc")


@pytest.mark.parametrize(
    ("ids", "fact"),
    [
        (None, "has no ids.json"),
        ("{", "Cannot read"),
        ([1], "is not a JSON object"),
        ({"one": "order.avsc"}, "'one' is not a schema id"),
        ({"-1": "order.avsc"}, "'-1' is not a schema id"),
        ({"4294967296": "order.avsc"}, "is not a schema id"),
        ('{"1": "order.avsc", "1": "order.avsc"}', "has the id 1 twice"),
        ('{"1": "order.avsc", "01": "order.avsc"}', "has the id 1 twice"),
        ({"1": "gone.avsc"}, r"names gone\.avsc, which is not in the folder"),
        ({"1": "../order.avsc"}, r"id 1 names '\.\./order\.avsc'"),
        ({"1": 5}, "id 1 names 5"),
        ({"1": "broken.avsc"}, r"broken\.avsc is not a valid Avro schema"),
    ],
)
def test_a_wrong_folder_stops_the_start(tmp_path: Path, ids: Any, fact: str) -> None:
    folder = folder_of(tmp_path, ids, order=ORDER, broken={"type": "record", "name": "R"})
    with pytest.raises(UserError, match=fact):
        DirectoryRegistry(folder)


def test_wire_format_there_and_back() -> None:
    assert frame(258, b"xy") == b"\x00\x00\x00\x01\x02xy"
    assert unframe(frame(258, b"xy")) == (258, b"xy")
    assert unframe(b"\x00\xff\xff\xff\xff") == (-1, b"")
    for value, reason in (
        (None, "null value"),
        (b"", "no value"),
        (b"\x05abcd", "wrong magic byte 5"),
        (b"\0a", "truncated"),
    ):
        with pytest.raises(Unframed, match=reason):
            unframe(value)
