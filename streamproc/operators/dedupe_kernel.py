"""Remembering 128-bit ids: one open-addressing table, compiled, and the plain twin that says what it must answer.

A slot is three words: high, low, and the *bucket* in which the id was first seen (event time divided by the bucket's
width, rounded down). Forgetting is lazy: a slot whose bucket is older than the oldest one remembered counts as free for
another id and as absent for its own, and `rehash` leaves such slots behind. So one probe answers for all buckets at
once (a table per bucket needs one each), and time going on costs nothing until the table is full.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any, Final

import numpy as np

from streamproc.core.batch import I64, U8
from streamproc.core.hash128 import U64, compiled

__all__ = [
    "DUPLICATE",
    "EMPTY",
    "PASS",
    "TOO_OLD",
    "admit",
    "admit_plain",
    "buckets_of",
    "count_live",
    "empty_slots",
    "insert",
    "oldest_of",
    "rehash",
]

PASS: Final = 0
DUPLICATE: Final = 1
TOO_OLD: Final = 2
EMPTY: Final = -(1 << 63)
"""Bucket of a slot that was never used; no event time lies in it."""
_FIRST = EMPTY + 1


def empty_slots(slots: int) -> I64:
    """A table of a power of two slots."""
    table = np.zeros((slots, 3), np.int64)
    table[:, 2] = EMPTY
    return table


@compiled
def buckets_of(times: I64, width_ms: int) -> I64:
    """Bucket of each event time."""
    found = np.empty(len(times), np.int64)
    for i in range(len(times)):
        found[i] = max(times[i] // width_ms, _FIRST)
    return found


@compiled
def oldest_of(watermark: int, width_ms: int, within_ms: int) -> int:
    """The oldest bucket remembered at a watermark: the least b with ``(b + 1) * width + within > watermark``, computed
    without an overflow."""
    if watermark < EMPTY + within_ms:
        return _FIRST
    return max((watermark - within_ms) // width_ms, _FIRST)


@compiled
def admit(table: I64, used: int, limit: int, hi: U64, lo: U64, buckets: I64, watermarks: I64, width_ms: int,
          within_ms: int, at: int, verdicts: U8) -> tuple[int, int]:  # fmt: skip
    """Judge records from ``at`` on, in order, until the end or until ``limit`` slots are used.

    Fills ``verdicts``; returns where it stopped and how many slots are used then. The caller makes room and goes on.
    """
    mask = len(table) - 1
    seen: Any = np.int64(EMPTY)
    oldest: Any = np.int64(_FIRST)
    slot: Any
    free: Any
    for i in range(at, len(hi)):
        if watermarks[i] != seen:  # the division is dear, and a watermark often stays for many records
            seen = watermarks[i]
            oldest = oldest_of(seen, width_ms, within_ms)
        if buckets[i] < oldest:
            verdicts[i] = TOO_OLD
            continue
        h, l = np.int64(hi[i]), np.int64(lo[i])  # noqa: E741
        slot = l & mask
        free = -1
        verdict = PASS
        while True:
            bucket = table[slot, 2]
            if bucket == EMPTY:
                break
            same = table[slot, 1] == l and table[slot, 0] == h
            if bucket >= oldest:
                if same:
                    verdict = DUPLICATE
                    break
            elif same:  # forgotten; the id may have no second slot behind this one
                free = slot
                break
            elif free < 0:
                free = slot
            slot = (slot + 1) & mask
        if verdict == PASS:
            if free < 0:
                if used >= limit:
                    return i, used
                used += 1
                free = slot
            table[free, 0], table[free, 1], table[free, 2] = h, l, buckets[i]
        verdicts[i] = verdict
    return len(hi), used


@compiled
def insert(table: I64, used: int, hi: U64, lo: U64, bucket: int) -> int:
    """Remember ids of one bucket, as a restore does, the youngest bucket winning; returns how many slots are used.

    There must be room for all of them.
    """
    mask = len(table) - 1
    slot: Any
    for i in range(len(hi)):
        h, l = np.int64(hi[i]), np.int64(lo[i])  # noqa: E741
        slot = l & mask
        while table[slot, 2] != EMPTY and (table[slot, 1] != l or table[slot, 0] != h):
            slot = (slot + 1) & mask
        if table[slot, 2] == EMPTY:
            used += 1
        table[slot, 0], table[slot, 1], table[slot, 2] = h, l, max(table[slot, 2], bucket)
    return used


@compiled
def count_live(table: I64, oldest: int) -> int:
    """Slots whose bucket is ``oldest`` or younger."""
    live = 0
    for slot in range(len(table)):
        if table[slot, 2] >= oldest and table[slot, 2] != EMPTY:
            live += 1
    return live


@compiled
def rehash(table: I64, into: I64, oldest: int) -> int:
    """Move what is still remembered into an empty table with room for it; returns how many slots are used."""
    mask = len(into) - 1
    used = 0
    slot: Any
    for old in range(len(table)):
        bucket = table[old, 2]
        if bucket == EMPTY or bucket < oldest:
            continue
        slot = table[old, 1] & mask
        while into[slot, 2] != EMPTY:
            slot = (slot + 1) & mask
        into[slot, 0], into[slot, 1], into[slot, 2] = table[old, 0], table[old, 1], bucket
        used += 1
    return used


def admit_plain(remembered: MutableMapping[tuple[int, int], int], ids: Iterable[tuple[int, int]], times: Iterable[int],
                watermarks: Iterable[int], width_ms: int, within_ms: int) -> list[int]:  # fmt: skip
    """The plain twin of `admit`: ``remembered`` (id -> bucket of its first record) is all its state."""
    verdicts = []
    for key, time, watermark in zip(ids, times, watermarks, strict=True):
        first, own = remembered.get(key), time // width_ms
        if (own + 1) * width_ms + within_ms <= watermark:
            verdicts.append(TOO_OLD)
        elif first is not None and (first + 1) * width_ms + within_ms > watermark:
            verdicts.append(DUPLICATE)
        else:
            remembered[key] = own
            verdicts.append(PASS)
    return verdicts
