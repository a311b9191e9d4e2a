"""Python keys and values as bytes (MessagePack), type for type: what is read back equals what was written.

MessagePack has one kind of array and no sets, so inside *values* tuples, sets and frozensets are extensions (codes 1,
2, 3, each an array). *Keys* have no lists, so there an array is a tuple. Format 1 is final.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from msgspec.msgpack import Ext

from streamproc.core.errors import RowRefused

__all__ = ["pack_key", "pack_keys", "pack_value", "pack_values", "unpack_key", "unpack_value"]

_TUPLE, _SET, _FROZENSET = 1, 2, 3
_PLAIN: Final[frozenset[type]] = frozenset({str, bytes, int, float, bool, type(None)})
_PLAIN_KEYS: Final[frozenset[type]] = frozenset({str, bytes, int, type(None)})
"""Of these types equal keys have equal bytes as they are."""
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
_encode = msgspec.msgpack.Encoder().encode


class _Refused(Exception):
    """Cannot be packed: what it is, and what to do instead."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def pack_key(key: Any, table: str) -> bytes:
    """Equal keys give equal bytes. `RowRefused` for what a key cannot be."""
    if type(key) in _PLAIN_KEYS:
        try:
            return _encode(key)
        except (OverflowError, UnicodeEncodeError):
            pass  # told below, with the table's name
    return _packed(_key, key, table, "the key", key)


def unpack_key(packed: bytes) -> Any:
    return _tuples(msgspec.msgpack.decode(packed))


def pack_value(value: Any, table: str, key: Any) -> bytes:
    """Equal objects of equal types give equal bytes, but for dicts' order. `RowRefused` for what no value can be."""
    if type(value) in _PLAIN:
        try:
            return _encode(value)
        except (OverflowError, UnicodeEncodeError):
            pass  # told below, with the table's name
    return _packed(_value, value, table, "the value of key", key)


def pack_keys(keys: Sequence[Any], table: str) -> list[bytes]:
    """Many times `pack_key`."""
    return _packed_plainly(keys, _PLAIN_KEYS) or [pack_key(key, table) for key in keys]


def pack_values(values: Sequence[Any], table: str, keys: Sequence[Any]) -> list[bytes]:
    """Many times `pack_value`."""
    plain = _packed_plainly(values, _PLAIN)
    return plain or [pack_value(value, table, key) for value, key in zip(values, keys, strict=True)]


def _packed_plainly(things: Sequence[Any], plain: frozenset[type]) -> list[bytes] | None:
    """None if one of them needs more than its bytes, or cannot be packed: who it is is found one by one."""
    if not plain.issuperset(map(type, things)):
        return None
    try:
        return list(map(_encode, things))
    except (OverflowError, UnicodeEncodeError):
        return None


def unpack_value(packed: bytes) -> Any:
    return _decode_value(packed)


def _packed(form: Callable[[Any], Any], thing: Any, table: str, name: str, key: Any) -> bytes:
    try:
        return _encode(form(thing))
    except _Refused as refused:
        what, remedy = refused.what, refused.remedy
    except UnicodeEncodeError:
        what, remedy = "text with lone surrogates", "Store the bytes instead."
    except RecursionError:
        what, remedy = "an object nested too deeply, or one that contains itself", "Store a flatter object."
    raise RowRefused(f"Table {table}: {name} {key!r:.80} holds {what}, which cannot be stored.", remedy=remedy)


def _key(key: Any) -> Any:
    kind = type(key)
    if kind is str or kind is bytes or key is None:
        return key
    if kind is bool:
        return int(key)  # equal to the int, so the same row
    if kind is int:
        return _sized(key)
    if kind is tuple:
        return [_key(part) for part in key]
    if isinstance(key, float):
        if key != key:
            raise _Refused("a NaN", "NaN is not even equal to itself; use None.")
        whole = key.is_integer() and _INT_MIN <= key <= _INT_MAX
        return int(key) if whole else float(key)
    raise _Refused(
        f"an object of type {_type_name(key)}",
        "Use text, bytes, numbers, None or tuples of them as keys, for example str(key).",
    )


def _value(value: Any) -> Any:
    kind = type(value)
    if kind is int:
        return _sized(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [_value(part) for part in value]
    if kind is dict:
        return {_inner_key(key): _value(part) for key, part in value.items()}
    if kind is tuple:
        return Ext(_TUPLE, _encode([_value(part) for part in value]))
    if kind is set or kind is frozenset:
        return Ext(_SET if kind is set else _FROZENSET, _encode_set(value))
    if isinstance(value, float):
        return float(value)  # numpy's float64 is one
    raise _Refused(
        f"an object of type {_type_name(value)}",
        "Store text, bytes, numbers, booleans, None, or lists, dicts, tuples and sets of them.",
    )


def _inner_key(key: Any) -> Any:
    """A key of a dict inside a value keeps its type."""
    kind = type(key)
    if kind is tuple:
        return tuple(_inner_key(part) for part in key)
    if kind in _PLAIN:
        return _sized(key) if kind is int else key
    raise _Refused(f"a dict with a key of type {_type_name(key)}", "Use text, bytes, numbers, None or tuples of them.")


def _encode_set(members: set[Any] | frozenset[Any]) -> bytes:
    """Members in the order of their bytes: a set has none of its own, and equal sets must give equal bytes."""
    packed = sorted(_encode(_value(member)) for member in members)
    return _encode([msgspec.Raw(member) for member in packed])


def _sized(number: int) -> int:
    if _INT_MIN <= number <= _INT_MAX:
        return number
    raise _Refused("an integer beyond 64 bits", "Store it as text: str(number).")


def _type_name(thing: Any) -> str:
    kind = type(thing)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _extension(code: int, data: memoryview) -> Any:
    members = _decode_value(data)
    return tuple(members) if code == _TUPLE else set(members) if code == _SET else frozenset(members)


_decode_value = msgspec.msgpack.Decoder(ext_hook=_extension).decode


def _tuples(key: Any) -> Any:
    return tuple(map(_tuples, key)) if type(key) is list else key
