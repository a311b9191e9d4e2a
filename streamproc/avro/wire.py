"""Confluent's wire format: a zero byte, the writer schema's id as a big-endian int32, the Avro value."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["HEADER_BYTES", "MAGIC", "Unframed", "frame", "unframe"]

MAGIC: Final = 0
HEADER_BYTES: Final = 5
_HEADER: Final = struct.Struct(">bi")


class Unframed(ValueError):
    """These bytes are not in the wire format; the message is the dead letter's reason."""


def frame(schema_id: int, payload: bytes) -> bytes:
    """``payload`` behind the header of ``schema_id``."""
    return _HEADER.pack(MAGIC, schema_id) + payload


def unframe(value: bytes | None) -> tuple[int, bytes]:
    """The schema id and the Avro bytes of a record's value; raises `Unframed` with the reason."""
    if value is None:
        raise Unframed("null value")
    if not value:
        raise Unframed("no value")
    if value[0] != MAGIC:
        raise Unframed(f"wrong magic byte {value[0]}")
    if len(value) < HEADER_BYTES:
        raise Unframed(f"truncated header of {len(value)} bytes")
    return int.from_bytes(value[1:HEADER_BYTES], "big", signed=True), value[HEADER_BYTES:]
