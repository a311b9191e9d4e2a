"""The compiled decoder: runs a `Program` over the records of a batch and reads no byte outside of the record it is in.

One compilation serves every schema. A record that is not what its schema says costs that record: its fault is written
down and the next one is read. Kernels never raise and trust only the spans they are given (`split` checks those).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streamproc.avro.faults import Fault
from streamproc.avro.program import Op
from streamproc.core.batch import I64, U8
from streamproc.core.hash128 import compiled, load_u64

__all__ = [
    "EMPTY",
    "NO_VALUE",
    "SHORT",
    "WRONG_MAGIC",
    "intern_spans",
    "pack_moments",
    "pack_texts",
    "run",
    "split",
    "valid_utf8",
]

NO_VALUE: Final = -(1 << 40)
"""What `split` writes instead of a schema id: a null value, and below it the other ways of having none."""
EMPTY: Final = NO_VALUE - 1
SHORT: Final = NO_VALUE - 2
WRONG_MAGIC: Final = NO_VALUE - 3

_END, _NULL, _BOOL, _INT, _LONG = int(Op.END), int(Op.NULL), int(Op.BOOL), int(Op.INT), int(Op.LONG)
_FLOAT, _DOUBLE, _BYTES, _FIXED, _ENUM = int(Op.FLOAT), int(Op.DOUBLE), int(Op.BYTES), int(Op.FIXED), int(Op.ENUM)
_UNION, _JUMP, _BLOCK, _NEXT = int(Op.UNION), int(Op.JUMP), int(Op.BLOCK), int(Op.NEXT)
_TRUNCATED, _LONG_VARINT, _INT_RANGE = int(Fault.TRUNCATED), int(Fault.LONG_VARINT), int(Fault.INT_RANGE)
_NEGATIVE, _BOOLEAN, _UTF8 = int(Fault.NEGATIVE_LENGTH), int(Fault.BOOLEAN), int(Fault.UTF8)
_UNION_INDEX, _ENUM_INDEX, _ENUM_SYMBOL = int(Fault.UNION_INDEX), int(Fault.ENUM_INDEX), int(Fault.ENUM_SYMBOL)
_BLOCK_SIZE, _ITEMS, _UNRESOLVED = int(Fault.BLOCK_SIZE), int(Fault.ITEMS), int(Fault.UNRESOLVED)
_TRAILING: Final = int(Fault.TRAILING)
_HIGH_BITS: Final = np.uint64(0x8080808080808080)
_PROBES_MAX: Final = 16
"""Slots looked at before a text is taken for new: texts made to collide cost no more than that."""


@compiled
def split(buffer: U8, starts: I64, lengths: I64, ids: I64) -> Any:
    """Schema ids of values in the wire format, into ``ids``; False if a span lies outside of ``buffer``."""
    size = len(buffer)
    for i in range(len(starts)):
        at, length = starts[i], lengths[i]
        if length < 0:
            ids[i] = NO_VALUE
            continue
        if at < 0 or length > size - at:
            return False
        if length == 0:
            ids[i] = EMPTY
        elif buffer[at] != 0:
            ids[i] = WRONG_MAGIC
        elif length < 5:
            ids[i] = SHORT
        else:
            word = np.int64(0)
            for k in range(1, 5):
                word = (word << 8) | np.int64(buffer[at + k])
            ids[i] = word - (np.int64(1) << 32) if word >> 31 else word
    return True


@compiled
def _varint(buffer: U8, at: int, end: int) -> Any:
    """``(value, next)``; next is -fault if there is none within ``end``."""
    if at >= end:
        return np.int64(0), np.int64(-_TRUNCATED)
    byte = np.uint64(buffer[at])
    at += 1
    value = byte & np.uint64(0x7F)
    shift = np.uint64(7)
    while byte >= np.uint64(0x80):
        if at >= end:
            return np.int64(0), np.int64(-_TRUNCATED)
        byte = np.uint64(buffer[at])
        at += 1
        if shift == np.uint64(63) and byte > np.uint64(1):
            return np.int64(0), np.int64(-_LONG_VARINT)
        value |= (byte & np.uint64(0x7F)) << shift
        shift += np.uint64(7)
    return np.int64(value >> np.uint64(1)) ^ -np.int64(value & np.uint64(1)), np.int64(at)


@compiled
def _sequence(buffer: U8, at: int, end: int) -> Any:
    """Length in bytes of the UTF-8 sequence of a byte >= 0x80 at ``at``, 0 if it is none (Unicode 15, table 3-7)."""
    first = buffer[at]
    low, high, more = 0x80, 0xBF, 0
    if 0xC2 <= first <= 0xDF:
        more = 1
    elif 0xE0 <= first <= 0xEF:
        more = 2
        low = 0xA0 if first == 0xE0 else 0x80
        high = 0x9F if first == 0xED else 0xBF
    elif 0xF0 <= first <= 0xF4:
        more = 3
        low = 0x90 if first == 0xF0 else 0x80
        high = 0x8F if first == 0xF4 else 0xBF
    if more == 0 or more >= end - at or not low <= buffer[at + 1] <= high:
        return 0
    for i in range(2, more + 1):
        if not 0x80 <= buffer[at + i] <= 0xBF:
            return 0
    return more + 1


@compiled
def valid_utf8(buffer: U8, at: int, end: int) -> Any:
    """Whether the bytes from ``at`` to ``end`` are UTF-8, as Python's strict decoder has it."""
    while at < end:
        if end - at >= 8 and load_u64(buffer, at) & _HIGH_BITS == np.uint64(0):
            at += 8
        elif buffer[at] < 0x80:
            at += 1
        else:
            size = _sequence(buffer, at, end)
            if size == 0:
                return False
            at += size
    return True


@compiled
def _float_bits(buffer: U8, at: int) -> Any:
    """The float32 at ``at`` as the bits of a float64."""
    word = np.uint32(0)
    for k in range(4):
        word |= np.uint32(buffer[at + k]) << np.uint32(8 * k)
    return np.float64(np.uint32(word).view(np.float32)).view(np.int64)


@compiled
def _converted(value: Any, conversion: int) -> Any:
    """An integer as it is, as the bits of a double, or as those of a float widened."""
    if conversion == 0:
        return value
    if conversion == 1:
        return np.float64(value).view(np.int64)
    return np.float64(np.float32(value)).view(np.int64)


@compiled
def run(
    ops: I64, table: I64, loops: int, buffer: U8, starts: I64, ends: I64, items_max: int, out: I64,
    valid: NDArray[np.bool_], rows: I64, faults: I64,
) -> Any:  # fmt: skip
    """Decode the Avro bytes of every span; one long loop, because every call out of it would cost each field.

    Returns how many were good.

    The k-th good record is span ``rows[k]`` and has its values in ``out[:, k]`` (integers; bits of float64; 0 or 1;
    reader symbol; start << 32 | length of bytes in ``buffer``) where ``valid[:, k]``. ``faults[i]`` of every span is
    (fault, instruction, value), fault 0 for a good one.
    """
    left = np.zeros(loops + 1, np.int64)
    block_ends = np.zeros(loops + 1, np.int64)
    good = 0
    for i in range(len(starts)):
        at, end = starts[i], ends[i]
        allowed = max(np.int64(items_max), end - at)
        pc, fault, value = np.int64(0), np.int64(0), np.int64(0)
        while True:
            op, column = ops[pc, 0], ops[pc, 1]
            a = ops[pc, 2]
            if op == _BYTES:
                value, at = _varint(buffer, at, end)
                if at < 0:
                    fault = -at
                    break
                if value < 0:
                    fault = np.int64(_NEGATIVE)
                    break
                if value > end - at:
                    fault = np.int64(_TRUNCATED)
                    break
                if a == 1 and not valid_utf8(buffer, at, at + value):
                    fault = np.int64(_UTF8)
                    break
                if column >= 0:
                    out[column, good] = (at << 32) | value
                    valid[column, good] = True
                at += value
            elif op in (_LONG, _INT):
                value, at = _varint(buffer, at, end)
                if at < 0:
                    fault = -at
                    break
                if op == _INT and (value < -(1 << 31) or value >= (1 << 31)):
                    fault = np.int64(_INT_RANGE)
                    break
                if column >= 0:
                    out[column, good] = _converted(value, a)
                    valid[column, good] = True
            elif op == _DOUBLE:
                if end - at < 8:
                    fault = np.int64(_TRUNCATED)
                    break
                if column >= 0:
                    out[column, good] = np.int64(load_u64(buffer, at))
                    valid[column, good] = True
                at += 8
            elif op == _UNION:
                value, at = _varint(buffer, at, end)
                if at < 0:
                    fault = -at
                    break
                if value < 0 or value >= a:
                    fault = np.int64(_UNION_INDEX)
                    break
                pc = table[ops[pc, 3] + value]
                continue
            elif op == _JUMP:
                pc = a
                continue
            elif op == _NULL:
                if column >= 0:
                    out[column, good] = 0
                    valid[column, good] = False
            elif op == _END:
                if at != end:
                    fault, value = np.int64(_TRAILING), end - at
                break
            elif op == _BOOL:
                if at >= end:
                    fault = np.int64(_TRUNCATED)
                    break
                if buffer[at] > 1:
                    fault, value = np.int64(_BOOLEAN), np.int64(buffer[at])
                    break
                if column >= 0:
                    out[column, good] = np.int64(buffer[at])
                    valid[column, good] = True
                at += 1
            elif op == _ENUM:
                value, at = _varint(buffer, at, end)
                if at < 0:
                    fault = -at
                    break
                if value < 0 or value >= a:
                    fault = np.int64(_ENUM_INDEX)
                    break
                if ops[pc, 3] >= 0:
                    symbol = table[ops[pc, 3] + value]
                    if symbol < 0:
                        fault = np.int64(_ENUM_SYMBOL)
                        break
                    if column >= 0:
                        out[column, good] = symbol
                        valid[column, good] = True
            elif op == _FLOAT:
                if end - at < 4:
                    fault = np.int64(_TRUNCATED)
                    break
                if column >= 0:
                    out[column, good] = _float_bits(buffer, at)
                    valid[column, good] = True
                at += 4
            elif op == _FIXED:
                if a > end - at:
                    fault = np.int64(_TRUNCATED)
                    break
                if column >= 0:
                    out[column, good] = (at << 32) | a
                    valid[column, good] = True
                at += a
            elif op == _BLOCK:
                value, at = _varint(buffer, at, end)
                if at < 0:
                    fault = -at
                    break
                if value == 0:
                    pc = ops[pc, 3]
                    continue
                block_ends[a] = -1
                if value < 0:
                    count = -value
                    value, at = _varint(buffer, at, end)
                    if at < 0:
                        fault = -at
                        break
                    if value < 0:
                        fault = np.int64(_NEGATIVE)
                        break
                    if value > end - at:
                        fault = np.int64(_TRUNCATED)
                        break
                    block_ends[a] = at + value
                    value = count
                # The count -2**63 has no positive twin and stays negative.
                if value < 0 or value > allowed:
                    fault = np.int64(_ITEMS)
                    break
                allowed -= value
                left[a] = value
            elif op == _NEXT:
                left[a] -= 1
                block = ops[pc, 3]
                if left[a] > 0:
                    pc = block + 1
                    continue
                if block_ends[a] >= 0 and at != block_ends[a]:
                    fault = np.int64(_BLOCK_SIZE)
                    break
                pc = block
                continue
            else:
                fault = np.int64(_UNRESOLVED)
                break
            pc += 1
        faults[i, 0] = fault
        if fault == 0:
            rows[good] = i
            good += 1
        else:
            faults[i, 1], faults[i, 2] = pc, value
    return good


@compiled
def _short_hash(buffer: U8, at: int, length: int) -> Any:
    """A quick hash that only spreads texts over slots; equality is by bytes."""
    word = np.uint64(length) * np.uint64(0x9E3779B97F4A7C15)
    end = at + length
    while end - at >= 8:
        word = (word ^ load_u64(buffer, at)) * np.uint64(0xFF51AFD7ED558CCD)
        word ^= word >> np.uint64(32)
        at += 8
    tail = np.uint64(0)
    while at < end:
        tail = (tail << np.uint64(8)) | np.uint64(buffer[at])
        at += 1
    word = (word ^ tail) * np.uint64(0xC4CEB9FE1A85EC53)
    return word ^ (word >> np.uint64(29))


@compiled
def _equal(buffer: U8, one: int, other: int, length: int) -> Any:
    done = 0
    while length - done >= 8:
        if load_u64(buffer, one + done) != load_u64(buffer, other + done):
            return False
        done += 8
    while done < length:
        if buffer[one + done] != buffer[other + done]:
            return False
        done += 1
    return True


@compiled
def intern_spans(
    buffer: U8, spans: I64, valid: NDArray[np.bool_], slots: NDArray[np.int32], firsts: I64,
    codes: NDArray[np.uint32], codes_max: int,
) -> Any:  # fmt: skip
    """Number the distinct texts: ``codes[i]`` for every valid span, ``firsts[code]`` a span that holds it.

    ``slots`` is -1 throughout, its size a power of two. Returns how many codes there are, -1 once they are more than
    ``codes_max`` (interning does not pay). A text may get two codes if its slots are crowded; codes stay right.
    """
    mask = np.uint64(len(slots) - 1)
    count = 0
    for i in range(len(spans)):
        if not valid[i]:
            codes[i] = 0
            continue
        start, length = spans[i] >> 32, spans[i] & 0xFFFFFFFF
        slot = _short_hash(buffer, start, length) & mask
        code = np.int64(-1)
        for _ in range(_PROBES_MAX):
            held = slots[slot]
            if held < 0:
                slots[slot] = count
                break
            if firsts[held] & 0xFFFFFFFF == length and _equal(buffer, firsts[held] >> 32, start, length):
                code = np.int64(held)
                break
            slot = (slot + np.uint64(1)) & mask
        if code < 0:
            if count >= codes_max:
                return -1
            code = np.int64(count)
            firsts[count] = spans[i]
            count += 1
        codes[i] = code
    return count


@compiled
def pack_texts(buffer: U8, spans: I64, valid: NDArray[np.bool_], packed: U8) -> Any:
    """Texts one behind the other with a zero byte behind each; returns the bytes written, -1 if a text holds a zero."""
    at = 0
    for i in range(len(spans)):
        if valid[i]:
            start = spans[i] >> 32
            for k in range(spans[i] & 0xFFFFFFFF):
                byte = buffer[start + k]
                if byte == 0:
                    return -1
                packed[at] = byte
                at += 1
        packed[at] = 0
        at += 1
    return at


@compiled
def pack_moments(times: I64, day: int, packed: U8) -> None:
    """Times since 1970, ``day`` of them in a day and within the years 1 to 9999, as the ten bytes that a datetime is
    made of (and pickled as): year, month, day, hour, minute, second, microsecond, big-endian.

    Dates by Howard Hinnant's `civil_from_days`: years begin in March, so that the leap day is a year's last.
    """
    microseconds = np.int64(86_400_000_000) // day
    for i in range(len(times)):
        days = times[i] // day
        rest = (times[i] - days * day) * microseconds
        days += 719_468
        era = days // 146_097
        of_era = days - era * 146_097
        year = (of_era - of_era // 1_460 + of_era // 36_524 - of_era // 146_096) // 365
        of_year = of_era - (365 * year + year // 4 - year // 100)
        march = (5 * of_year + 2) // 153
        month = march + 3 if march < 10 else march - 9
        year += era * 400 + (1 if month <= 2 else 0)
        seconds, fraction = rest // 1_000_000, rest % 1_000_000
        at = 10 * i
        packed[at], packed[at + 1] = year >> 8, year & 0xFF
        packed[at + 2], packed[at + 3] = month, of_year - (153 * march + 2) // 5 + 1
        packed[at + 4], packed[at + 5], packed[at + 6] = seconds // 3_600, seconds // 60 % 60, seconds % 60
        packed[at + 7], packed[at + 8], packed[at + 9] = fraction >> 16, fraction >> 8 & 0xFF, fraction & 0xFF
