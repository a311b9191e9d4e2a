"""A store in memory: the same contract as RocksDB, nothing on disk. For tests, simulations and throw-away runs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from streamproc.core.errors import invariant
from streamproc.state.contract import StoreMeta, Writes

__all__ = ["MemoryStore"]


class MemoryStore:
    """Rows in a dict, their keys in a sorted list. `close` keeps them: a simulated crash opens the same object again.

    A real crash of the process loses everything, which is within the contract: whole or absent.
    """

    def __init__(self) -> None:
        self._rows: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []
        self._meta: StoreMeta | None = None
        self._bytes = 0

    def meta(self) -> StoreMeta | None:
        return self._meta

    def get(self, key: bytes) -> bytes | None:
        return self._rows.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return list(map(self._rows.get, keys))

    def scan(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        keys, rows = self._keys, self._rows
        for at in range(*self._span(start, stop)):
            yield keys[at], rows[keys[at]]

    def write(self, writes: Writes, meta: StoreMeta) -> None:
        puts = dict(writes.puts)
        for run in writes.runs:
            puts.update(zip(run.keys, run.values, strict=True))
        invariant(all(puts) and b"\x00" not in puts, "A row's key has no table prefix.")
        for start, stop in writes.ranges:
            lo, hi = self._span(start, stop)
            self._forget(self._keys[lo:hi])
            del self._keys[lo:hi]
        gone = writes.deletes & self._rows.keys()
        if gone:
            self._forget(gone)
            self._keys = [key for key in self._keys if key not in gone]
        new = sorted(key for key in puts if key not in self._rows)
        for key, value in puts.items():
            old = self._rows.get(key)
            self._bytes += len(value) - len(old) if old is not None else len(key) + len(value)
            self._rows[key] = value
        self._keys += new
        self._keys.sort()  # two sorted runs: a merge, not a sort
        self._meta = meta
        invariant(len(self._keys) == len(self._rows), "The memory store's key index does not match its rows.")

    def wipe(self) -> None:
        self._rows, self._keys, self._meta, self._bytes = {}, [], None, 0

    def size_bytes(self) -> int:
        return self._bytes

    def close(self) -> None:
        """Nothing to release."""

    def _span(self, start: bytes, stop: bytes | None) -> tuple[int, int]:
        lo = bisect_left(self._keys, start)
        return lo, max(lo, len(self._keys) if stop is None else bisect_left(self._keys, stop))

    def _forget(self, keys: Sequence[bytes] | set[bytes]) -> None:
        for key in keys:
            self._bytes -= len(key) + len(self._rows.pop(key))
