"""What a store is: ordered bytes of one task, written once an epoch. `memory` and `rocksdb` pass one suite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

__all__ = ["Run", "Store", "StoreMeta", "Writes"]


class StoreMeta(msgspec.Struct, frozen=True):
    """What a store knows of its own history; written in the same atomic step as the rows."""

    log_id: str
    """Uuid of the state's history; another one means the store belongs to another log."""
    epoch: int
    """The last epoch whose rows are in the store."""
    applied: dict[str, int]
    """Changelog topic -> position behind the last record applied."""
    timestamp_ms: int
    """Broker timestamp of what was applied last: a store older than half of `delete.retention.ms` is wiped."""


class Run(NamedTuple):
    """Rows to be put, as columns; keys ascend, none comes twice."""

    keys: Sequence[bytes]
    values: Sequence[bytes]


@dataclass
class Writes:
    """One atomic step: first the ranges, then the deletes, then the puts (sorted by the store), then the runs."""

    puts: dict[bytes, bytes] = field(default_factory=dict)
    deletes: set[bytes] = field(default_factory=set)
    ranges: list[tuple[bytes, bytes]] = field(default_factory=list)
    """[start, stop) of keys to drop."""
    runs: list[Run] = field(default_factory=list)
    """Puts of whole tables that are sorted already."""


class Store(Protocol):
    """The local engine under a task's tables. Keys of one table share a four-byte prefix. Single-threaded."""

    def meta(self) -> StoreMeta | None:
        """None: nothing was ever written, or it was wiped."""

    def get(self, key: bytes) -> bytes | None: ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]: ...

    def scan(self, start: bytes, stop: bytes | None) -> Iterator[tuple[bytes, bytes]]:
        """Rows with start <= key < stop in key order (``stop`` None: to the end). The store may not be written meanwhile."""

    def write(self, writes: Writes, meta: StoreMeta) -> None:
        """Atomic and, after a crash of the process, whole or absent. A full disk raises `OSError` and leaves the old."""

    def wipe(self) -> None:
        """Drop everything, the meta too."""

    def size_bytes(self) -> int: ...

    def close(self) -> None:
        """Idempotent. Releases every lock, also after a failed call."""
