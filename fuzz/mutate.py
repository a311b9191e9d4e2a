"""What a hostile or broken producer might make of good bytes: cut, flipped, overwritten, extended, spliced, lied about."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from fuzz.valid import varint

__all__ = ["mutated"]

EDITS: Final = (1, 1, 1, 2, 3)
"""How many; mostly one, so that many mutated records are still valid, with other values."""
_BYTES: Final = (0, 1, 2, 3, 4, 0x3F, 0x7F, 0x80, 0x81, 0xC0, 0xC2, 0xE0, 0xED, 0xF4, 0xFE, 0xFF)
_PIECES: Final = (
    b"\xff" * 9 + b"\x01", b"\xff" * 9 + b"\x02", b"\xff" * 10, b"\x80" * 11, b"\x80\x00", b"\xfe" + b"\xff" * 8 + b"\x01",
    b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xc0\x80", b"\x01", b"\x00", b"\x80",
    *(varint(n) for n in (-1, 1 << 31, -(1 << 31) - 1, (1 << 31) - 1, (1 << 32) + 1, (1 << 62), 65_536, 65_537, -65_537)),
)  # fmt: skip

_Edit = Callable[[random.Random, bytearray, bytes], None]


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """``data`` after one to three edits, never as it was; ``other`` lends pieces."""
    while True:
        out = bytearray(data)
        for _ in range(EDITS[int(rng.random() * len(EDITS))]):
            _EDITS[int(rng.random() * len(_EDITS))](rng, out, other)
        if out != data:
            return bytes(out)


def _place(rng: random.Random, out: bytearray) -> int:
    return int(rng.random() * (len(out) + 1))


def _cut(rng: random.Random, out: bytearray, other: bytes) -> None:
    del out[_place(rng, out) :]


def _shorten(rng: random.Random, out: bytearray, other: bytes) -> None:
    del out[-1 - int(rng.random() * 8) :]


def _overwrite(rng: random.Random, out: bytearray, other: bytes) -> None:
    at = _place(rng, out)
    out[at : at + 1] = bytes((_BYTES[int(rng.random() * len(_BYTES))],))


def _randomise(rng: random.Random, out: bytearray, other: bytes) -> None:
    at = _place(rng, out)
    out[at : at + 1] = bytes((int(rng.random() * 256),))


def _flip(rng: random.Random, out: bytearray, other: bytes) -> None:
    if out:
        out[int(rng.random() * len(out))] ^= 1 << int(rng.random() * 8)


def _insert(rng: random.Random, out: bytearray, other: bytes) -> None:
    at = _place(rng, out)
    out[at:at] = _PIECES[int(rng.random() * len(_PIECES))]


def _drop(rng: random.Random, out: bytearray, other: bytes) -> None:
    at = _place(rng, out)
    del out[at : at + 1 + int(rng.random() * 4)]


def _splice(rng: random.Random, out: bytearray, other: bytes) -> None:
    """A piece of the other record at any place: valid parts where they do not belong."""
    at, start = _place(rng, out), int(rng.random() * (len(other) + 1))
    out[at : at + int(rng.random() * 4)] = other[start : start + int(rng.random() * 24)]


def _lie(rng: random.Random, out: bytearray, other: bytes) -> None:
    """A number that is nearly what is left of the record: what a length is held against."""
    at = _place(rng, out)
    number = len(out) - at - 4 + int(rng.random() * 8)
    out[at : at + 1] = varint(-number if rng.random() < 0.2 else number)


_EDITS: Final[tuple[_Edit, ...]] = (
    _cut, _shorten, _overwrite, _overwrite, _randomise, _flip, _flip, _insert, _drop, _splice, _lie, _lie,
)  # fmt: skip
