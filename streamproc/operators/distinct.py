"""Exact distinct values of a table's rows: sets of 128-bit hashes, stored as chunks beside the rows.

A row holds only how many there are. Each epoch writes the new hashes of a row and column as chunks of their own, never
the set again; a set is read back from its chunks when it is needed and not in memory.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from streamproc.core.hash128 import U64
from streamproc.core.limits import DISTINCT_CACHE_BYTES_MAX, DISTINCT_CHUNK_BYTES_MAX
from streamproc.operators.contract import KeyedState
from streamproc.operators.kernels import insert_hashes

__all__ = ["DistinctSets"]

_SLOTS_MIN: Final = 16
_SET_BYTES: Final = 400
"""What a set takes besides its table: Python objects and its name."""
_PART_BYTES: Final = 2
_WINDOW_BYTES: Final = 8
"""A name begins with its window's prefix (`tablerows.window_prefix`)."""


class _HashSet:
    """Open addressing over rows of (hi, lo); at most half full."""

    __slots__ = ("_held", "table")

    def __init__(self) -> None:
        self.table = np.zeros((_SLOTS_MIN, 2), np.uint64)
        self._held = 0

    @property
    def size_bytes(self) -> int:
        return self.table.nbytes + _SET_BYTES

    def add(self, ids: U64) -> U64:
        """The ones that were not there yet."""
        if 2 * (self._held + len(ids)) > len(self.table):
            self._grow(self._held + len(ids))
        fresh = np.empty(len(ids), np.bool_)
        self._held += insert_hashes(self.table, ids, fresh)
        return ids[fresh]

    def _grow(self, held: int) -> None:
        old = self.table[self.table.any(axis=1)]
        self.table = np.zeros((1 << (2 * held - 1).bit_length(), 2), np.uint64)
        insert_hashes(self.table, old, np.empty(len(old), np.bool_))


class DistinctSets:
    """The sets of one table in one task. A set is named by its chunks' common prefix.

    Sets in memory are bounded by ``cache_bytes_max``: the one used longest ago goes first, and only the one in use may
    be larger than that alone.
    """

    def __init__(self, state: KeyedState, cache_bytes_max: int = DISTINCT_CACHE_BYTES_MAX) -> None:
        self._state = state
        self._bytes_max = cache_bytes_max
        self._sets: dict[bytes, _HashSet] = {}
        self._of_window: dict[bytes, set[bytes]] = {}
        """Window prefix -> the cached sets of that window, so that `forget` looks at no others."""
        self._pending_bytes = 0
        self._pending: dict[bytes, list[U64]] = {}
        self._bytes = 0
        self._written: dict[bytes, int] = {}
        self._epoch = 0

    @property
    def pending_bytes(self) -> int:
        """New hashes that no `flush` has written yet."""
        return self._pending_bytes

    @property
    def cached_bytes(self) -> int:
        return self._bytes

    def add(self, prefix: bytes, ids: bytes, *, empty: bool) -> int:
        """Add hashes (hi, lo, little-endian) to a set; return how many were new. ``empty``: the row says that there are
        none yet, so that nothing is looked for in the store."""
        held = _HashSet() if empty else self._take(prefix)
        fresh = held.add(np.frombuffer(ids, "<u8").astype(np.uint64).reshape(-1, 2))
        if len(fresh):
            self._pending.setdefault(prefix, []).append(fresh)
            self._pending_bytes += 16 * len(fresh)
        self._keep(prefix, held)
        return len(fresh)

    def flush(self, epoch: int) -> None:
        """Write what is new as chunks of ``epoch``."""
        if epoch != self._epoch:
            self._epoch, self._written = epoch, {}
        for prefix, pieces in self._pending.items():
            data = np.concatenate(pieces).astype("<u8").tobytes()
            for start in range(0, len(data), DISTINCT_CHUNK_BYTES_MAX):
                part = self._written.get(prefix, 0)
                self._written[prefix] = part + 1
                key = prefix + epoch.to_bytes(8, "big") + part.to_bytes(_PART_BYTES, "big")
                self._state.put(key, data[start : start + DISTINCT_CHUNK_BYTES_MAX])
        self._pending.clear()
        self._pending_bytes = 0

    def forget(self, window: bytes) -> None:
        """Nothing will be added to the sets of this window any more."""
        for prefix in self._of_window.pop(window, ()):
            if (held := self._sets.pop(prefix, None)) is not None:
                self._bytes -= held.size_bytes

    def abort(self) -> None:
        """Back to what the state holds."""
        self._sets.clear()
        self._of_window.clear()
        self._pending.clear()
        self._pending_bytes = 0
        self._written.clear()
        self._bytes = 0

    def _take(self, prefix: bytes) -> _HashSet:
        held = self._sets.pop(prefix, None)
        if held is not None:
            self._bytes -= held.size_bytes
            return held
        held = _HashSet()
        for _, chunk in self._state.scan(prefix, prefix + b"\xff" * 11):
            held.add(np.frombuffer(chunk, "<u8").astype(np.uint64).reshape(-1, 2))
        for ids in self._pending.get(prefix, ()):
            held.add(ids)
        return held

    def _keep(self, prefix: bytes, held: _HashSet) -> None:
        """The latest used comes last; the first go while there are too many bytes."""
        self._sets[prefix] = held
        self._of_window.setdefault(prefix[:_WINDOW_BYTES], set()).add(prefix)
        self._bytes += held.size_bytes
        while self._bytes > self._bytes_max and len(self._sets) > 1:
            oldest = next(iter(self._sets))
            self._bytes -= self._sets.pop(oldest).size_bytes
