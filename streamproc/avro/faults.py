"""What can be wrong with the bytes of one record, as the codes the kernel writes and the reasons people read."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Fault", "Malformed", "describe"]


class Fault(IntEnum):
    """Codes of the compiled decoder; its plain twin raises `Malformed` with the same reasons."""

    NONE = 0
    TRUNCATED = 1
    LONG_VARINT = 2
    INT_RANGE = 3
    NEGATIVE_LENGTH = 4
    BOOLEAN = 5
    UNION_INDEX = 6
    ENUM_INDEX = 7
    ENUM_SYMBOL = 8
    UTF8 = 9
    BLOCK_SIZE = 10
    ITEMS = 11
    UNRESOLVED = 12
    TRAILING = 13
    DEPTH = 14
    DECIMAL = 15
    TIME = 16


_TEXTS = {
    Fault.TRUNCATED: "truncated",
    Fault.LONG_VARINT: "varint longer than 64 bits",
    Fault.INT_RANGE: "int {value} beyond 32 bits",
    Fault.NEGATIVE_LENGTH: "negative length {value}",
    Fault.BOOLEAN: "boolean byte {value}",
    Fault.UNION_INDEX: "union index {value} of {detail}",
    Fault.ENUM_INDEX: "enum index {value} of {detail}",
    Fault.ENUM_SYMBOL: "enum symbol {detail} unknown to the reader",
    Fault.UTF8: "invalid UTF-8",
    Fault.BLOCK_SIZE: "block of another size than it says",
    Fault.ITEMS: "too many items in arrays and maps",
    Fault.UNRESOLVED: "does not resolve: {detail}",
    Fault.TRAILING: "trailing bytes: {value}",
    Fault.DEPTH: "nested deeper than {detail}",
    Fault.DECIMAL: "decimal of more than {detail} digits",
    Fault.TIME: "{detail} {value} is not in the years 1 to 9999",
}


class Malformed(ValueError):
    """The bytes of a record are not what its writer schema says; the message is the dead letter's reason."""


def describe(fault: Fault, path: str, value: int = 0, detail: object = "") -> str:
    """The reason of a dead letter. ``path`` is the field that was being read, "" behind the last one."""
    text = _TEXTS[fault].format(value=value, detail=detail)
    return f"{text}, field {path}" if path else text
