"""Random bytes that are valid records of a schema, written straight from its types: no value is made first."""

from __future__ import annotations

import random
import struct
from typing import Final

from streamproc.avro.schema import Array, AvroType, Enum, Fixed, MapOf, Record, Union

__all__ = ["valid_record", "varint"]

ITEMS_MAX: Final = 3
_LETTERS: Final = "abcXYZ019 \0\x7fäß€漢𝄞\U0010ffff"
_WORDS: Final = ("", "a", "EWR", "completed", "DE", "12345678", "a text of more than sixteen bytes", "ähm")
_NUMBERS: Final = (0, 1, -1, 63, 64, -64, -65, 1 << 31, (1 << 31) - 1, -(1 << 31), (1 << 63) - 1, -(1 << 63))
_FLOATS: Final = (0.0, -0.0, 1.5, float("inf"), float("-inf"), float("nan"), 5e-324, 1e300)


def varint(value: int) -> bytes:
    """Zigzag, as Avro and Kafka write their integers; of any size."""
    rest, out = (value << 1) ^ (value >> 63), bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def valid_record(rng: random.Random, type_: AvroType) -> bytes:
    """The Avro bytes of a random value of ``type_``; arrays and maps in blocks with and without their size."""
    match type_:
        case Record():
            return b"".join(valid_record(rng, field.type) for field in type_.fields)
        case Union():
            index = rng.randrange(len(type_.branches))
            return varint(index) + valid_record(rng, type_.branches[index])
        case Array():
            return _blocks(rng, type_.items, keyed=False)
        case MapOf():
            return _blocks(rng, type_.values, keyed=True)
        case Enum():
            return varint(rng.randrange(len(type_.symbols)))
        case Fixed():
            return rng.randbytes(type_.size)
    return _primitive(rng, type_.kind)


def _primitive(rng: random.Random, kind: str) -> bytes:
    match kind:
        case "null":
            return b""
        case "boolean":
            return rng.choice((b"\0", b"\1"))
        case "int" | "long":
            return varint(_number(rng, 32 if kind == "int" else 64))
        case "float":
            return rng.randbytes(4) if rng.random() < 0.5 else struct.pack("<f", rng.uniform(-1e9, 1e9))
        case "double":
            return struct.pack("<d", rng.choice(_FLOATS)) if rng.random() < 0.5 else rng.randbytes(8)
        case "string":
            text = _text(rng)
            return varint(len(text)) + text
    data = rng.randbytes(rng.choice((0, 1, 7, 8, 9, 16, 31)))
    return varint(len(data)) + data


def _number(rng: random.Random, bits: int) -> int:
    if rng.random() < 0.5:
        return rng.randrange(-200, 4_000)
    number = rng.choice(_NUMBERS) if rng.random() < 0.5 else rng.getrandbits(bits) - (1 << (bits - 1))
    return min(max(number, -(1 << (bits - 1))), (1 << (bits - 1)) - 1)


def _text(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return rng.choice(_WORDS).encode()
    return "".join(rng.choices(_LETTERS, k=rng.randrange(20))).encode()


def _blocks(rng: random.Random, item: AvroType, *, keyed: bool) -> bytes:
    out = b""
    for _ in range(rng.randint(0, 2)):
        count = rng.randint(1, ITEMS_MAX)
        body = b"".join((_primitive(rng, "string") if keyed else b"") + valid_record(rng, item) for _ in range(count))
        sized = rng.random() < 0.4
        out += (varint(-count) + varint(len(body)) if sized else varint(count)) + body
    return out + b"\0"
