"""Dedupe: the first record of a key passes, later ones are dropped while the key is remembered.

A key lies in the event-time bucket (``within / 8`` wide) of its first record, and is remembered as long as its bucket's
end + ``within`` is greater than the watermark before the record at hand. A record whose own bucket is past that is *too
old* to be judged, whatever its key. All of it is per record, so nothing depends on where batches or epochs end.

What a task remembers is in memory; what an epoch added goes to keyed state as one row of ids per bucket and part:

    key     bucket's start (int64 ms, big-endian, sign bit flipped) · epoch (uint64) · part (uint16)
    value   16 bytes an id: high word, low word, little-endian

so a bucket that is forgotten leaves by one range, and an epoch never rewrites an earlier one's rows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import numpy as np

from streamproc.core import limits
from streamproc.core.batch import I64, U8
from streamproc.core.errors import UserError, invariant
from streamproc.core.hash128 import U64
from streamproc.core.types import NO_WATERMARK
from streamproc.operators import dedupe_kernel as kernel
from streamproc.operators.contract import KeyedState
from streamproc.operators.dedupe_kernel import DUPLICATE, PASS, TOO_OLD
from streamproc.operators.plan import Dedupe

__all__ = ["BUCKETS", "DUPLICATE", "PASS", "TOO_OLD", "DedupeOperator"]

BUCKETS: Final = 8
"""Parts of ``within`` by which keys are forgotten together."""

_KEY = struct.Struct(">QQH")
_SIGN, _U64 = 1 << 63, (1 << 64) - 1
_SLOTS_MIN: Final = 1 << 12
_SLOT_BYTES: Final = 24
_FILL_MAX, _FILL_AIM = 0.6, 0.3
"""The table is made anew when more than the first of its slots are used, with at most the second of them remembered."""


class DedupeOperator:
    """One dedupe step of one task. Lives from the task's start to its end; called by one coroutine.

    After construction comes `restore`; then `admit` for each batch and `collect` once an epoch; `abort` when the epoch
    does not commit (after the keyed state has dropped it). An `admit` after a `collect` says that the epoch committed.
    """

    def __init__(self, plan: Dedupe, state: KeyedState, *, bytes_max: int = limits.DEDUPE_BYTES_MAX) -> None:
        """``bytes_max``: of the table in memory, which is never larger."""
        self.name, self.where, within_ms = plan.name, plan.where, plan.within_ms
        if within_ms <= 0:
            raise UserError(f"dedupe {self.name!r} has within={within_ms} ms.",
                            remedy="Give it a duration above zero.", where=self.where)  # fmt: skip
        self._within_ms, self._width_ms = within_ms, max(1, within_ms // BUCKETS)
        self._state, self._bytes_max = state, bytes_max
        self._table: I64
        self._used: int
        self._new: list[tuple[U64, U64, I64]]
        self._new_count: int
        self._stored: set[int]
        """Buckets that have rows in the keyed state."""
        self._watermark: int
        self._collected: bool
        self._dirty: bool
        """Memory or keyed state has something that the last commit has not."""
        self._forget_all()

    @property
    def remembered(self) -> int:
        """Ids in memory, those included that are past remembering and not yet swept out."""
        return self._used

    @property
    def size_bytes(self) -> int:
        """The open epoch's ids, which the next `collect` will put into the keyed state."""
        return 24 * self._new_count

    @property
    def table_bytes(self) -> int:
        return _SLOT_BYTES * len(self._table)

    def admit(self, hi: U64, lo: U64, times: I64, watermark_before: I64) -> U8:
        """A verdict per record (`PASS`, `DUPLICATE`, `TOO_OLD`), in order; who passes is remembered at once.

        ``hi``, ``lo``: the keys' hashes; ``times``: event times in ms; ``watermark_before``: the source's watermark
        before each record, which never goes back. Raises `UserError` when more ids than the limit allows are to be
        remembered.
        """
        if self._collected:  # that epoch was committed
            self._collected, self._dirty = False, False
        verdicts = np.empty(len(hi), np.uint8)
        if not len(hi):
            return verdicts
        invariant(watermark_before[0] >= self._watermark, f"The watermark before dedupe {self.name!r} went back.")
        buckets = kernel.buckets_of(times, self._width_ms)
        at = 0
        while True:
            limit = int(_FILL_MAX * len(self._table))
            at, self._used = kernel.admit(self._table, self._used, limit, hi, lo, buckets, watermark_before,
                                          self._width_ms, self._within_ms, at, verdicts)  # fmt: skip
            if at == len(hi):
                break
            self._make_room(int(watermark_before[at]))
        self._watermark = int(watermark_before[-1])
        passed = np.flatnonzero(verdicts == PASS)
        if len(passed):
            self._new.append((hi[passed], lo[passed], buckets[passed]))
            self._new_count += len(passed)
            self._dirty = True
        return verdicts

    def collect(self, epoch: int) -> None:
        """Put the epoch's ids into the keyed state and expire the rows of buckets that are past remembering."""
        oldest = kernel.oldest_of(self._watermark, self._width_ms, self._within_ms)
        for bucket, ids in self._new_ids(oldest):
            start = self._start_of(bucket)
            for part, lo in enumerate(range(0, len(ids), limits.DEDUPE_CHUNK_BYTES_MAX)):
                chunk = ids[lo : lo + limits.DEDUPE_CHUNK_BYTES_MAX]
                self._state.put(_KEY.pack(start + _SIGN, epoch, part), chunk)
            self._stored.add(bucket)
        past = {bucket for bucket in self._stored if bucket < oldest}
        if past:
            stop = _KEY.pack(self._start_of(oldest) + _SIGN, 0, 0)
            self._state.expire(b"", stop)
            self._stored -= past
            self._dirty = True
        self._new, self._new_count, self._collected = [], 0, True

    def restore(self) -> None:
        """Remember exactly what the keyed state holds."""
        self._forget_all()
        for key, value in self._state.scan(b"", None):
            start, _, _ = _KEY.unpack(key)
            bucket = max((start - _SIGN) // self._width_ms, kernel.EMPTY + 1)
            words = np.frombuffer(value, "<u8").reshape(-1, 2)
            while self._used + len(words) > _FILL_MAX * len(self._table):
                self._resize(2 * len(self._table), kernel.EMPTY)
            hi, lo = np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1])
            self._used = kernel.insert(self._table, self._used, hi, lo, bucket)
            self._stored.add(bucket)

    def abort(self) -> None:
        """Forget what was admitted since the last commit; the keyed state has dropped it already."""
        if self._dirty:
            self.restore()
        else:
            self._watermark, self._collected = NO_WATERMARK, False

    def _forget_all(self) -> None:
        self._table = kernel.empty_slots(_SLOTS_MIN)
        self._used = 0
        self._new, self._new_count = [], 0
        self._stored = set()
        self._watermark = NO_WATERMARK
        self._collected = self._dirty = False

    def _new_ids(self, oldest: int) -> Iterator[tuple[int, bytes]]:
        """The epoch's ids by bucket, in order, without those that are past remembering already."""
        if not self._new:
            return
        hi, lo, buckets = (np.concatenate(column) for column in zip(*self._new, strict=True))
        order = np.argsort(buckets, kind="stable")
        order = order[np.searchsorted(buckets, oldest, sorter=order) :]
        ids = np.column_stack((hi[order], lo[order])).astype("<u8")
        found, counts = np.unique(buckets[order], return_counts=True)
        stop = 0
        for bucket, count in zip(found.tolist(), counts.tolist(), strict=True):
            start, stop = stop, stop + count
            yield bucket, ids[start:stop].tobytes()

    def _start_of(self, bucket: int) -> int:
        return max(bucket * self._width_ms, -_SIGN)

    def _make_room(self, watermark: int) -> None:
        """The table is full: sweep out what is past remembering, and double it if that is not enough."""
        oldest = kernel.oldest_of(watermark, self._width_ms, self._within_ms)
        live, slots = kernel.count_live(self._table, oldest), _SLOTS_MIN
        while live > _FILL_AIM * slots:
            slots *= 2
        if slots * _SLOT_BYTES > self._bytes_max and live <= 0.9 * _FILL_MAX * (slots // 2):
            slots //= 2  # at the limit: sweep more often rather than give up
        if slots * _SLOT_BYTES > self._bytes_max:
            raise UserError(
                f"dedupe {self.name!r} has {live:,} ids to remember, which takes more than its limit of "
                f"{self._bytes_max:,} bytes (DEDUPE_BYTES_MAX) in one task.",
                remedy="Give it a shorter within=, or its topic more partitions.",
                where=self.where,
            )
        self._resize(slots, oldest)

    def _resize(self, slots: int, oldest: int) -> None:
        into = kernel.empty_slots(slots)
        self._used = kernel.rehash(self._table, into, oldest)
        self._table = into
