"""128-bit hashes of values: murmur3 x64 128 with seed 0 (Austin Appleby, public domain), compiled and in plain Python.

A value has one hash wherever it comes from: text and bytes hash their bytes (text as UTF-8); integers, booleans, dates
and times their 64-bit integer, little-endian; floats the bits of the float64, with -0.0 as 0.0 and every NaN as one.
Hashes are stored (dedupe ids, distinct counts), so this function may never change.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import polars as pl
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from streamproc.core.batch import I64, U8
from streamproc.core.errors import invariant

__all__ = [
    "U64",
    "Hashes",
    "combine",
    "combine_python",
    "compiled",
    "hash_bytes",
    "hash_bytes_python",
    "hash_float64",
    "hash_int64",
    "hash_pair",
    "hash_series",
    "hash_spans",
    "hash_texts",
    "hash_value_python",
    "load_u64",
]

U64: TypeAlias = NDArray[np.uint64]
Hashes: TypeAlias = tuple[U64, U64]
"""The high and the low words of a column of hashes (murmur3's h1 and h2)."""
F = TypeVar("F", bound=Callable[..., Any])

_MASK = 0xFFFFFFFFFFFFFFFF
_C1, _C2 = 0x87C37B91114253D5, 0x4CF5AD432745937F
_M1, _M2 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
_A1, _A2 = 0x52DCE729, 0x38495AB5
_C1U, _C2U, _M1U, _M2U = np.uint64(_C1), np.uint64(_C2), np.uint64(_M1), np.uint64(_M2)
_A1U, _A2U, _FIVE = np.uint64(_A1), np.uint64(_A2), np.uint64(5)
_ZERO, _NAN_BITS = np.uint64(0), 0x7FF8000000000000


def compiled(function: F) -> F:
    """``function`` compiled by numba, cached on disk, typed as it was written. It releases the GIL."""
    return cast(F, njit(cache=True, nogil=True)(function))


def _load_u64(_typing: Any, buffer: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(64).as_pointer())
        word = builder.load(place)
        word.align = 1
        return word

    return types.uint64(buffer, at), generate


load_u64 = cast(Callable[[Any, Any], Any], intrinsic(_load_u64))
"""The eight bytes of a uint8 array from an index, little-endian, unaligned, *unchecked*. Only for compiled code."""


@compiled
def _rotate(x: Any, r: int) -> Any:
    return (x << np.uint64(r)) | (x >> np.uint64(64 - r))


@compiled
def _final(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(33))) * _M1U
    x = (x ^ (x >> np.uint64(33))) * _M2U
    return x ^ (x >> np.uint64(33))


@compiled
def _block(h1: Any, h2: Any, k1: Any, k2: Any) -> Any:
    h1 ^= _rotate(k1 * _C1U, 31) * _C2U
    h1 = (_rotate(h1, 27) + h2) * _FIVE + _A1U
    h2 ^= _rotate(k2 * _C2U, 33) * _C1U
    h2 = (_rotate(h2, 31) + h1) * _FIVE + _A2U
    return h1, h2


@compiled
def _finish(h1: Any, h2: Any, length: int) -> Any:
    h1 ^= np.uint64(length)
    h2 ^= np.uint64(length)
    h1 += h2
    h2 += h1
    h1, h2 = _final(h1), _final(h2)
    h1 += h2
    return h1, h1 + h2


@compiled
def _tail_word(buffer: U8, at: int, length: int) -> Any:
    """Up to eight bytes as a little-endian word; reads nothing behind them."""
    word = _ZERO
    for i in range(length):
        word |= np.uint64(buffer[at + i]) << np.uint64(8 * i)
    return word


@compiled
def hash_bytes(buffer: U8, start: int, length: int) -> Any:
    """``(hi, lo)`` of ``buffer[start : start + length]``; for compiled code (numba uint64). Reads nothing outside."""
    h1, h2 = _ZERO, _ZERO
    at, whole = start, start + (length & ~15)
    while at < whole:
        h1, h2 = _block(h1, h2, load_u64(buffer, at), load_u64(buffer, at + 8))
        at += 16
    rest = length & 15
    if rest >= 8:
        h2 ^= _rotate(_tail_word(buffer, at + 8, rest - 8) * _C2U, 33) * _C1U
        h1 ^= _rotate(load_u64(buffer, at) * _C1U, 31) * _C2U
    elif rest > 0:
        h1 ^= _rotate(_tail_word(buffer, at, rest) * _C1U, 31) * _C2U
    return _finish(h1, h2, length)


@compiled
def hash_pair(hi: Any, lo: Any, next_hi: Any, next_lo: Any) -> Any:
    """The hash of two hashes in order: murmur3 of their 32 little-endian bytes. For compiled code (numba uint64)."""
    h1, h2 = _block(_ZERO, _ZERO, hi, lo)
    h1, h2 = _block(h1, h2, next_hi, next_lo)
    return _finish(h1, h2, 32)


@compiled
def _hash_words(words: U64, hi: U64, lo: U64) -> None:
    for i in range(len(words)):
        hi[i], lo[i] = _finish(_rotate(words[i] * _C1U, 31) * _C2U, _ZERO, 8)


@compiled
def _hash_spans(buffer: U8, starts: I64, lengths: I64, hi: U64, lo: U64) -> None:
    for i in range(len(starts)):
        if lengths[i] < 0:
            hi[i], lo[i] = _ZERO, _ZERO
        else:
            hi[i], lo[i] = hash_bytes(buffer, starts[i], lengths[i])


@compiled
def _combine(hi: U64, lo: U64, next_hi: U64, next_lo: U64) -> None:
    for i in range(len(hi)):
        hi[i], lo[i] = hash_pair(hi[i], lo[i], next_hi[i], next_lo[i])


def hash_spans(buffer: U8, starts: I64, lengths: I64) -> Hashes:
    """Hashes of spans of ``buffer``; a length of -1 (null) gives (0, 0). The caller vouches for the spans."""
    hi, lo = _pair(len(starts))
    _hash_spans(buffer, starts, lengths, hi, lo)
    return hi, lo


def hash_int64(values: I64) -> Hashes:
    """Hashes of the integers' eight little-endian bytes."""
    hi, lo = _pair(len(values))
    _hash_words(np.ascontiguousarray(values, np.int64).view(np.uint64), hi, lo)
    return hi, lo


def hash_float64(values: NDArray[np.float64]) -> Hashes:
    """Hashes of the floats' bits, -0.0 as 0.0 and every NaN as one."""
    # NaNs first: adding to a signalling one, which any eight bytes may be, would warn.
    same = np.where(np.isnan(values), np.nan, np.asarray(values, np.float64)) + 0.0
    return hash_int64(same.view(np.int64))


def hash_texts(values: Sequence[str | None]) -> Hashes:
    """Hashes of texts as UTF-8; None gives (0, 0)."""
    return hash_series(pl.Series(values, dtype=pl.String))


def hash_series(series: pl.Series) -> Hashes:
    """Hashes of a column of text, bytes, integers, booleans, floats, dates or times; null gives (0, 0).

    Another type breaks an invariant: the plan check keeps them from being keys.
    """
    dtype = series.dtype
    if isinstance(dtype, (pl.Categorical, pl.Enum)):
        series, dtype = series.cast(pl.String), pl.String()
    if dtype == pl.String or dtype == pl.Binary:
        return _hash_bytes_series(series.cast(pl.Binary))
    if dtype.is_float():
        hi, lo = hash_float64(series.cast(pl.Float64).fill_null(0.0).to_numpy())
    else:
        invariant(dtype.is_integer() or dtype.is_temporal() or dtype == pl.Boolean, f"A {dtype} column has no hash.")
        whole = series if dtype == pl.UInt64 else series.to_physical().cast(pl.Int64)
        hi, lo = hash_int64(whole.fill_null(0).to_numpy().view(np.int64))
    if series.null_count():
        nulls = series.is_null().to_numpy()
        hi[nulls] = lo[nulls] = 0
    return hi, lo


def combine(columns: Sequence[Hashes]) -> Hashes:
    """One hash per row over several columns, in order; of one column it is that column's own hash."""
    invariant(columns, "A key needs at least one column.")
    hi, lo = columns[0]
    if len(columns) > 1:
        hi, lo = hi.copy(), lo.copy()
    for next_hi, next_lo in columns[1:]:
        _combine(hi, lo, next_hi, next_lo)
    return hi, lo


def _hash_bytes_series(series: pl.Series) -> Hashes:
    lengths = series.bin.size().cast(pl.Int64)
    sizes = lengths.fill_null(0).to_numpy()
    # A bytearray, because numba compiles once more for arrays that cannot be written.
    joined = bytearray().join(value for value in series.to_list() if value)
    starts = np.cumsum(sizes) - sizes
    return hash_spans(np.frombuffer(joined, np.uint8), starts.astype(np.int64), lengths.fill_null(-1).to_numpy())


def _pair(rows: int) -> Hashes:
    return np.empty(rows, np.uint64), np.empty(rows, np.uint64)


def hash_bytes_python(data: bytes) -> tuple[int, int]:
    """The plain twin of `hash_bytes`."""
    h1 = h2 = 0
    whole = len(data) & ~15
    for k1, k2 in struct.iter_unpack("<QQ", data[:whole]):
        h1, h2 = _block_python(h1, h2, k1, k2)
    tail = data[whole:]
    h2 ^= _scramble(int.from_bytes(tail[8:], "little"), _C2, 33, _C1)
    h1 ^= _scramble(int.from_bytes(tail[:8], "little"), _C1, 31, _C2)
    return _finish_python(h1, h2, len(data))


def combine_python(parts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The plain twin of `combine`, for one row."""
    hash_ = parts[0]
    for part in parts[1:]:
        hash_ = hash_bytes_python(struct.pack("<QQQQ", *hash_, *part))
    return hash_


def hash_value_python(value: str | bytes | int | float | bool | None) -> tuple[int, int]:
    """The plain twin of `hash_series`, for one value (dates and times as their integer)."""
    if value is None:
        return 0, 0
    if isinstance(value, str):
        return hash_bytes_python(value.encode())
    if isinstance(value, bytes):
        return hash_bytes_python(value)
    if isinstance(value, float):
        same = struct.pack("<Q", _NAN_BITS) if value != value else struct.pack("<d", value + 0.0)
        return hash_bytes_python(same)
    return hash_bytes_python(struct.pack("<Q", int(value) & _MASK))


def _rotate_python(x: int, r: int) -> int:
    return ((x << r) | (x >> (64 - r))) & _MASK


def _scramble(k: int, first: int, r: int, second: int) -> int:
    return (_rotate_python((k * first) & _MASK, r) * second) & _MASK


def _block_python(h1: int, h2: int, k1: int, k2: int) -> tuple[int, int]:
    h1 ^= _scramble(k1, _C1, 31, _C2)
    h1 = ((_rotate_python(h1, 27) + h2) * 5 + _A1) & _MASK
    h2 ^= _scramble(k2, _C2, 33, _C1)
    h2 = ((_rotate_python(h2, 31) + h1) * 5 + _A2) & _MASK
    return h1, h2


def _final_python(x: int) -> int:
    x = ((x ^ (x >> 33)) * _M1) & _MASK
    x = ((x ^ (x >> 33)) * _M2) & _MASK
    return x ^ (x >> 33)


def _finish_python(h1: int, h2: int, length: int) -> tuple[int, int]:
    h1, h2 = h1 ^ length, h2 ^ length
    h1 = (h1 + h2) & _MASK
    h2 = (h2 + h1) & _MASK
    h1, h2 = _final_python(h1), _final_python(h2)
    h1 = (h1 + h2) & _MASK
    return h1, (h2 + h1) & _MASK
