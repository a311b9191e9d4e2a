"""Loads (and the first time compiles) every kernel of this package, so that the first record does not wait for it."""

from __future__ import annotations

import numpy as np

from streamproc.avro.decode import Decoder, Use
from streamproc.avro.registry import UnknownSchema
from streamproc.avro.rows import RowDecoder
from streamproc.avro.schema import Schema, parse_schema
from streamproc.avro.wire import frame
from streamproc.core.batch import BUFFER_SLACK, RawBatch
from streamproc.core.hash128 import combine, hash_int64, hash_texts
from streamproc.core.types import Offset, TopicPartition

__all__ = ["warm_up"]

_SCHEMA = {
    "type": "record",
    "name": "Warm",
    "fields": [
        {"name": "text", "type": "string"},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
    ],
}


class _One:
    """A registry of one schema."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def schema_by_id(self, schema_id: int) -> Schema:
        if schema_id:
            raise UnknownSchema(schema_id)
        return self._schema

    def id_of(self, schema: Schema | str) -> int:
        return 0


def warm_up() -> None:
    """Blocks for some seconds when nothing is cached, else for some tenths; may run in a thread. Idempotent."""
    schema = parse_schema(_SCHEMA, source="warm-up")
    value = np.frombuffer(bytearray(frame(0, b"\x02a\x00") + bytes(BUFFER_SLACK)), np.uint8)
    one, none = np.zeros(1, np.int64), np.full(1, -1, np.int64)
    length = np.full(1, len(value) - BUFFER_SLACK, np.int64)
    batch = RawBatch(
        TopicPartition("warm-up", 0), value, one, one, one, none, one, length, length, length, Offset(1)
    )  # fmt: skip
    Decoder(schema, _One(schema), {"text": Use.VALUE | Use.HASH}).decode(batch)
    RowDecoder(schema, _One(schema)).rows(batch)
    combine([hash_texts(["a"]), hash_int64(one)])
