"""Values to records: Avro bytes in the wire format, for topics that agents write to."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

import fastavro
import msgspec
from fastavro.validation import ValidationError, validate

from streamproc.avro.schema import Schema
from streamproc.avro.wire import frame
from streamproc.core.errors import UserError

__all__ = ["Encoder"]


_MISFITS: Final = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError)
"""What fastavro is known to raise for a value that its schema does not take."""


class Encoder:
    """Encodes values of one schema. Called per record (3 µs for a small one); not for the pipeline path."""

    def __init__(self, schema: Schema, schema_id: int) -> None:
        self._schema, self._schema_id = schema, schema_id

    def encode(self, value: Any) -> bytes:
        """A mapping, a Struct or a dataclass, framed. `UserError` names the field that does not fit.

        Fields that the value lacks take the schema's default; ones that the schema lacks are a mistake, not dropped.
        """
        plain = _plain(value)
        self._refuse_unknown(plain)
        out = io.BytesIO()
        try:
            fastavro.schemaless_writer(out, self._schema.parsed, plain)
        except _MISFITS as error:
            raise self._misfit(plain, error) from error
        return frame(self._schema_id, out.getvalue())

    def _refuse_unknown(self, plain: Any) -> None:
        if not isinstance(plain, Mapping):
            fact = f"{type(plain).__name__} is not a value of the schema {self._schema.source}."
            raise UserError(fact, remedy="Send a mapping, a msgspec.Struct or a dataclass with the schema's fields.")
        unknown = [name for name in plain if self._schema.field(name) is None]
        if unknown:
            fact = f"The schema {self._schema.source} has no field {unknown[0]!r}."
            raise UserError(fact, remedy=f"It has {', '.join(self._schema.names())}.")

    def _misfit(self, plain: Mapping[str, Any], error: Exception) -> UserError:
        """Names the first field whose value the schema does not take."""
        for declared in self._schema.parsed["fields"]:
            name = declared["name"]
            if name not in plain and "default" in declared:
                continue
            if name not in plain and "null" not in declared["type"]:
                return self._says(f"Field {name!r} is missing")
            if not _fits(plain.get(name), declared["type"], self._schema):
                return self._says(f"Field {name!r} cannot hold {plain.get(name)!r}")
        return self._says(f"The value {plain!r} does not fit ({error})")

    def _says(self, fact: str) -> UserError:
        return UserError(f"{fact}, says the schema {self._schema.source}.", remedy="Mend the value or the schema.")


def _fits(value: Any, declared: Any, schema: Schema) -> bool:
    """fastavro's own verdict, with the schema's named types at hand; what it trips over does not fit either."""
    whole = {"type": "record", "name": "Probe", "fields": [{"name": "value", "type": declared}]}
    try:
        parsed = fastavro.parse_schema(whole, named_schemas=dict(schema.parsed["__named_schemas"]))
        if not validate({"value": value}, parsed, raise_errors=False):
            return False
        fastavro.schemaless_writer(io.BytesIO(), parsed, {"value": value})
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        OverflowError,
        ArithmeticError,
        ValidationError,
    ):
        return False
    return True


def _plain(value: Any) -> Any:
    """Structs and dataclasses as dicts, all the way down; other values as they are."""
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return value
