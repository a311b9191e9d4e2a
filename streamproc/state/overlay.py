"""The epoch's uncommitted writes to one table, bytes to bytes: what operators see as keyed state.

    get, scan ──▶ puts ──▶ gone ──▶ store        (a row is looked for in this order)

Nothing reaches the store except through `writes`, after the commit. `drop` forgets an epoch that does not commit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Literal, NamedTuple, TypeAlias, cast, overload

import google_crc32c

from streamproc.core.errors import UserError, invariant
from streamproc.state.contract import Run, Store, Writes

__all__ = [
    "Change",
    "Changes",
    "Overlay",
    "Tombstone",
    "merged",
    "require_distinct_prefixes",
    "table_prefix",
    "table_stop",
]

Tombstone: TypeAlias = Literal["delete", "expire"]


class Change(NamedTuple):
    """What an epoch did to one key of a table. ``value`` None goes with a ``tombstone``, and only then."""

    key: bytes
    """Within the table: without the store's prefix."""
    value: bytes | None
    tombstone: Tombstone | None = None
    """``delete``: a deletion in its own right, sinks follow. ``expire``: it left by retention, sinks keep theirs."""


class Changes(Sequence[Change]):
    """What an epoch did to a table, as columns in the order of the keys. A `Change` is made only of those that somebody
    looks at one by one. Not changed any more: sinks look at it after the epoch."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, keys: list[bytes], values: Sequence[bytes | None], gone: Mapping[bytes, Tombstone] | None = None
    ) -> None:
        self.keys, self.values = keys, values
        self.gone: Mapping[bytes, Tombstone] = gone or {}
        """The keys whose value is None, and how they left."""

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, at: int) -> Change: ...
    @overload
    def __getitem__(self, at: slice) -> list[Change]: ...
    def __getitem__(self, at: int | slice) -> Change | list[Change]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return Change(self.keys[at], self.values[at], self.gone.get(self.keys[at]))

    def __iter__(self) -> Iterator[Change]:
        return map(Change, self.keys, self.values, map(self.gone.get, self.keys) if self.gone else repeat(None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Changes({list(self)!r})"

    def run(self, prefix: bytes) -> Run:
        """The rows that are there now, as a store takes them."""
        keys = [prefix + key for key in self.keys]
        if not self.gone:
            return Run(keys, cast(Sequence[bytes], self.values))
        held = [(key, value) for key, value in zip(keys, self.values, strict=True) if value is not None]
        return Run([key for key, _ in held], [value for _, value in held])


def table_prefix(name: str) -> bytes:
    """The four bytes that every key of the table begins with in its task's store: crc32c of the name, big-endian."""
    checksum: int = google_crc32c.value(name.encode())
    return checksum.to_bytes(4, "big")


def table_stop(prefix: bytes) -> bytes | None:
    """The first key behind the table's rows; None: there is none."""
    after = int.from_bytes(prefix, "big") + 1
    return after.to_bytes(4, "big") if after < 1 << 32 else None


def require_distinct_prefixes(names: Iterable[str]) -> None:
    """Called once with all tables of a task; two of one prefix would write over each other: `UserError`."""
    seen: dict[bytes, str] = {}
    for name in names:
        other = seen.setdefault(table_prefix(name), name)
        if other != name:
            raise UserError(f"Tables {other!r} and {name!r} have the same prefix in the store.", remedy="Rename one.")


class Overlay:
    """One table of one task within one epoch. Implements `operators.contract.KeyedState`. Single-threaded.

    Keys and values are plain ``bytes``. A scan shows the rows as they were when it was called, also while rows are put;
    it must be used up before the epoch is committed or dropped.
    """

    def __init__(self, store: Store, table: str) -> None:
        self.table = table
        self.prefix = table_prefix(table)
        self._store = store
        self._puts: dict[bytes, bytes] = {}
        self._gone: dict[bytes, Tombstone] = {}
        self._ranges: list[tuple[bytes, bytes]] = []
        self._sorted: list[bytes] = []
        self._fresh: list[bytes] = []
        self._run = Run([], [])
        """The last rows of the epoch, put all at once: they lie as they came until one of them is asked for."""
        self._bytes = 0

    @property
    def size_bytes(self) -> int:
        """Keys and values of the epoch, in bytes."""
        return self._bytes

    def get(self, key: bytes) -> bytes | None:
        self._fold()
        value = self._puts.get(key)
        if value is not None or key in self._gone:
            return value
        return self._store.get(self.prefix + key)

    def put(self, key: bytes, value: bytes) -> None:
        self._fold()
        old = self._puts.get(key)
        if old is not None:
            self._bytes += len(value) - len(old)
        else:
            if self._gone.pop(key, None) is None:
                self._fresh.append(key)
                self._bytes += len(key)
            self._bytes += len(value)
        self._puts[key] = value

    def put_new(self, keys: list[bytes], values: list[bytes]) -> None:
        self._fold()
        self._run = Run(keys, values)
        self._bytes += sum(map(len, keys)) + sum(map(len, values))

    def delete(self, key: bytes) -> None:
        if key not in self._gone:  # an expired row is not there to be deleted
            self._remove(key, "delete")

    def expire(self, start: bytes, stop: bytes) -> None:
        if start >= stop:
            return
        for key in [key for key, _ in self.scan(start, stop)]:
            self._remove(key, "expire")
        self._ranges.append((start, stop))

    def scan(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        self._fold()
        prefix = self.prefix
        keys = self._index()
        lo = bisect_left(keys, start)
        hi = len(keys) if stop is None else bisect_left(keys, stop, lo)
        own = [(key, self._puts.get(key)) for key in keys[lo:hi]]  # copied now: the view must not see later puts
        stored = self._store.scan(prefix + start, table_stop(prefix) if stop is None else prefix + stop)
        return merged(((key[4:], value) for key, value in stored), own)

    def changes(self) -> Changes:
        """One change per changed key, in key order. A key that came and was deleted within the epoch is none."""
        if not self._index():
            return Changes(list(self._run.keys), self._run.values)
        self._fold()
        puts, gone, keys = self._puts, self._gone, list(self._index())
        if gone:
            deleted = [key for key, how in gone.items() if how == "delete"]
            stored = self._store.get_many([self.prefix + key for key in deleted])
            never = {key for key, value in zip(deleted, stored, strict=True) if value is None}
            keys = [key for key in keys if key not in never]
            gone = {key: how for key, how in gone.items() if key not in never}
        return Changes(keys, list(map(puts.get, keys)), gone)

    def writes(self, into: Writes) -> None:
        """Add the epoch to the task's one atomic write. The overlay is not changed: `drop` follows."""
        prefix, puts = self.prefix, self._puts
        into.ranges.extend((prefix + start, prefix + stop) for start, stop in self._ranges)
        # Expired rows go by their range. A deleted one that never was in the store costs nothing but its key.
        into.deletes.update(prefix + key for key, how in self._gone.items() if how == "delete")
        keys = [key for key in self._index() if key in puts]
        into.runs.append(Run([prefix + key for key in keys], [puts[key] for key in keys]))
        into.runs.append(Run([prefix + key for key in self._run.keys], self._run.values))

    def drop(self) -> None:
        """Forget the epoch: committed (the store has it) or aborted (nobody has)."""
        self._puts, self._gone, self._ranges, self._sorted, self._fresh, self._bytes = {}, {}, [], [], [], 0
        self._run = Run([], [])

    def _fold(self) -> None:
        """Rows put all at once become rows like any other."""
        keys, values = self._run
        if keys:
            self._run = Run([], [])
            wanted = len(self._puts) + len(keys)
            self._puts.update(zip(keys, values, strict=True))
            fresh = len(self._puts) == wanted and self._gone.keys().isdisjoint(keys)
            invariant(fresh, f"Rows of table {self.table!r} that the epoch had changed were put as new ones.")
            self._fresh += keys

    def _remove(self, key: bytes, how: Tombstone) -> None:
        self._fold()
        old = self._puts.pop(key, None)
        if old is not None:
            self._bytes -= len(old)
        else:
            self._fresh.append(key)
            self._bytes += len(key)
        self._gone[key] = how

    def _index(self) -> list[bytes]:
        """All changed keys in order; a key once changed stays changed until `drop`."""
        if self._fresh:
            self._sorted += sorted(self._fresh)
            self._sorted.sort()  # two sorted runs: a merge, not a sort
            self._fresh = []
        return self._sorted


def merged(
    stored: Iterator[tuple[bytes, bytes]], own: Iterable[tuple[bytes, bytes | None]]
) -> Iterator[tuple[bytes, bytes]]:
    """Both in key order; an own row hides the stored one of its key, an own None removes it."""
    row = next(stored, None)
    for key, value in own:
        while row is not None and row[0] < key:
            yield row
            row = next(stored, None)
        if row is not None and row[0] == key:
            row = next(stored, None)
        if value is not None:
            yield key, value
    while row is not None:
        yield row
        row = next(stored, None)
