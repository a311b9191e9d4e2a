"""Compiled loops of the two-step aggregation. Each does one thing to plain arrays; the plain-Python twin of each is the
reference in the tests.

Group 0 is the identity of every accumulator: it is never added to, so that "nothing" can be taken from the same arrays.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streamproc.core.batch import I64, U8
from streamproc.core.hash128 import U64, compiled

__all__ = [
    "CARRY_EVERY",
    "INFINITE",
    "NAN",
    "NEGATIVE_INFINITE",
    "U32",
    "add_limbs",
    "add_wide",
    "carry_limbs",
    "count_rows",
    "find_groups",
    "insert_hashes",
    "insert_ids",
    "keep_greatest",
    "keep_least",
    "limb_range",
    "partitions_of",
    "write_limbs",
]

U32 = NDArray[np.uint32]

NAN: Final = 1
INFINITE: Final = 2
NEGATIVE_INFINITE: Final = 4
"""Flags of what a float sum met that has no digits."""
CARRY_EVERY: Final = 1 << 30
"""Additions after which limbs are carried: each adds less than 2^33 to a 64-bit word."""

_LOW32, _HIDDEN, _FRACTION = np.uint64(0xFFFFFFFF), np.uint64(1 << 52), np.uint64((1 << 52) - 1)
_U0, _U1, _U31, _U32, _EXPONENT = np.uint64(0), np.uint64(1), np.uint64(31), np.uint64(32), np.uint64(0x7FF)
_U52, _U63, _SPREAD = np.uint64(52), np.uint64(63), np.uint64(0x9E3779B97F4A7C15)


@compiled
def find_groups(slots: I64, held: U64, hashes: U64, groups: int, gids: I64, firsts: I64) -> int:
    """Number rows by hash: ``gids[i]`` is the group of row i, the same for equal hashes, counted on from ``groups``.

    ``slots`` (a power of two, 0 = free, at least twice as long as groups can become) and ``held`` (hash of each group)
    last over the epoch; ``firsts`` gets the first row of each new group. Returns how many groups there are now.
    Equal hashes are not equal keys: the caller compares the keys themselves.
    """
    mask = np.uint64(len(slots) - 1)
    before = groups
    for i in range(len(hashes)):
        wanted = hashes[i]
        at = ((wanted * _SPREAD) >> _U32) & mask
        while slots[at] != 0 and held[slots[at]] != wanted:
            at = (at + _U1) & mask
        if slots[at] == 0:
            slots[at] = groups
            held[groups] = wanted
            firsts[groups - before] = i
            groups += 1
        gids[i] = slots[at]
    return groups


@compiled
def count_rows(gids: I64, counts: I64) -> None:
    for i in range(len(gids)):
        counts[gids[i]] += 1


@compiled
def add_wide(gids: I64, values: I64, unsigned: bool, high: I64, low: U64) -> None:
    """Add 64-bit integers to 128-bit sums in two's complement; ``unsigned``: the bits are those of uint64."""
    for i in range(len(gids)):
        gid = gids[i]
        word = np.uint64(values[i])
        total = low[gid] + word
        carry = np.int64(1) if total < word else np.int64(0)
        low[gid] = total
        high[gid] += carry - (np.int64(1) if values[i] < 0 and not unsigned else np.int64(0))


@compiled
def limb_range(bits: U64) -> Any:
    """Lowest and highest 32-bit limb (of 2^-1074 units) that the finite floats in ``bits`` reach; (66, -1) if none."""
    lowest, highest = 66, -1
    for i in range(len(bits)):
        exponent = np.int64((bits[i] >> _U52) & _EXPONENT)
        if exponent != 0x7FF and bits[i] << _U1 != _U0:
            limb = max(int(exponent) - 1, 0) >> 5
            lowest, highest = min(lowest, limb), max(highest, limb + 2)
    return lowest, highest


@compiled
def add_limbs(gids: I64, bits: U64, base: int, limbs: NDArray[np.int64], special: I64) -> None:
    """Add float64s (as bits) exactly to sums of signed 64-bit words that each stand for 32 bits: word j of a row counts
    2^(32 * (base + j) - 1074). Nothing is rounded, so the order of adding cannot matter (a superaccumulator)."""
    for i in range(len(gids)):
        gid, word = gids[i], bits[i]
        exponent = np.int64((word >> _U52) & _EXPONENT)
        fraction = word & _FRACTION
        negative = word >> _U63 != _U0
        if exponent == 0x7FF:
            special[gid] |= NAN if fraction != _U0 else NEGATIVE_INFINITE if negative else INFINITE
            continue
        if exponent != 0:
            fraction |= _HIDDEN
        elif fraction == _U0:
            continue
        place = max(int(exponent) - 1, 0)
        shift = np.uint64(place) & _U31
        at = (place >> 5) - base
        below, above = (fraction & _LOW32) << shift, (fraction >> _U32) << shift
        first = np.int64(below & _LOW32)
        second = np.int64(below >> _U32) + np.int64(above & _LOW32)
        third = np.int64(above >> _U32)
        if negative:
            first, second, third = -first, -second, -third
        limbs[gid, at] += first
        limbs[gid, at + 1] += second
        limbs[gid, at + 2] += third


@compiled
def carry_limbs(limbs: NDArray[np.int64]) -> None:
    """Carry in place: every word but the last into [0, 2^32), the last takes the sign."""
    for row in range(limbs.shape[0]):
        carry = np.int64(0)
        for j in range(limbs.shape[1] - 1):
            total = limbs[row, j] + carry
            limbs[row, j] = total & 0xFFFFFFFF
            carry = total >> 32
        limbs[row, limbs.shape[1] - 1] += carry


@compiled
def write_limbs(limbs: NDArray[np.int64], gids: I64, out: U32) -> None:
    """Rows ``gids`` as two's complement, least word first; ``out`` has one word more than a row of limbs."""
    last = limbs.shape[1] - 1
    for i in range(len(gids)):
        carry = np.int64(0)
        for j in range(last):
            total = limbs[gids[i], j] + carry
            out[i, j] = np.uint32(total & 0xFFFFFFFF)
            carry = total >> 32
        top = np.uint64(limbs[gids[i], last] + carry)
        out[i, last] = np.uint32(top & _LOW32)
        out[i, last + 1] = np.uint32(top >> _U32)


@compiled
def keep_least(gids: I64, values: I64, counts: I64, best: I64) -> None:
    for i in range(len(gids)):
        gid = gids[i]
        if counts[gid] == 0 or values[i] < best[gid]:
            best[gid] = values[i]
        counts[gid] += 1


@compiled
def keep_greatest(gids: I64, values: I64, counts: I64, best: I64) -> None:
    for i in range(len(gids)):
        gid = gids[i]
        if counts[gid] == 0 or values[i] > best[gid]:
            best[gid] = values[i]
        counts[gid] += 1


@compiled
def insert_ids(slots: I64, entries: U64, used: int, gids: I64, hi: U64, lo: U64) -> int:
    """Put (group, 128-bit hash) triples into an exact set; returns how many it holds.

    ``entries`` (rows of group, hi, lo) begins at row 1 and has room for all; ``slots`` is a power of two, 0 = free, at
    least twice as long as the set can become.
    """
    mask = np.uint64(len(slots) - 1)
    for i in range(len(gids)):
        gid = np.uint64(gids[i])
        at = (lo[i] ^ (gid * _SPREAD)) & mask
        while True:
            row = slots[at]
            if row == 0:
                used += 1
                slots[at] = used
                entries[used, 0], entries[used, 1], entries[used, 2] = gid, hi[i], lo[i]
                break
            if entries[row, 2] == lo[i] and entries[row, 1] == hi[i] and entries[row, 0] == gid:
                break
            at = (at + _U1) & mask
    return used


@compiled
def insert_hashes(table: U64, ids: U64, fresh: NDArray[np.bool_]) -> int:
    """Put 128-bit hashes (rows of hi, lo) into an exact set; ``fresh`` tells which were new; returns how many.

    ``table`` is a power of two of rows with free ones left for all; (0, 0) marks a free row, so that one hash counts as
    (0, 1): as likely to matter as any other collision of 128 bits.
    """
    mask = np.uint64(table.shape[0] - 1)
    added = 0
    for i in range(ids.shape[0]):
        hi, lo = ids[i, 0], ids[i, 1]
        if hi == _U0 and lo == _U0:
            lo = _U1
        at = lo & mask
        while (table[at, 0] != hi or table[at, 1] != lo) and (table[at, 0] != _U0 or table[at, 1] != _U0):
            at = (at + _U1) & mask
        fresh[i] = table[at, 0] == _U0 and table[at, 1] == _U0
        if fresh[i]:
            table[at, 0], table[at, 1] = hi, lo
            added += 1
    return added


@compiled
def partitions_of(buffer: U8, ends: I64, partitions: int, out: I64) -> None:
    """`core.partitioner.partition_of` of keys that lie one behind the other in ``buffer`` and end at ``ends``."""
    start = 0
    for i in range(len(ends)):
        length = ends[i] - start
        h = np.uint32(0x9747B28C) ^ np.uint32(length)
        whole = start + (length & ~3)
        for at in range(start, whole, 4):
            k = np.uint32(buffer[at]) | (np.uint32(buffer[at + 1]) << np.uint32(8))
            k |= (np.uint32(buffer[at + 2]) << np.uint32(16)) | (np.uint32(buffer[at + 3]) << np.uint32(24))
            k = np.uint32(k * np.uint32(0x5BD1E995))
            k = np.uint32((k ^ (k >> np.uint32(24))) * np.uint32(0x5BD1E995))
            h = np.uint32(h * np.uint32(0x5BD1E995)) ^ k
        for at in range(ends[i] - 1, whole - 1, -1):
            h ^= np.uint32(buffer[at]) << np.uint32(8 * (at - whole))
        if whole < ends[i]:
            h = np.uint32(h * np.uint32(0x5BD1E995))
        h = np.uint32((h ^ (h >> np.uint32(13))) * np.uint32(0x5BD1E995))
        h ^= h >> np.uint32(15)
        out[i] = np.int64(h & np.uint32(0x7FFFFFFF)) % partitions
        start = ends[i]
