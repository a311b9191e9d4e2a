"""Which group each row belongs to: exact, null-safe, over any key columns, for the length of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import polars as pl

from streamproc.core.batch import I64
from streamproc.operators.kernels import find_groups

__all__ = ["WINDOW", "GroupIndex"]

WINDOW: Final = "__window_start"
_SLOTS_MIN = 64


def _hash_rows(keyed: pl.DataFrame) -> pl.Series:
    return keyed.hash_rows()


class GroupIndex:
    """Numbers the distinct rows of (group keys, window start) from 1 in order of appearance; 0 is nobody.

    Rows are grouped by a 64-bit hash and then compared with the key their group was made for, so that the result is
    exact. Should two keys ever share a hash, the rest of the epoch goes through a dictionary.
    """

    def __init__(
        self, keys: Mapping[str, pl.DataType], hasher: Callable[[pl.DataFrame], pl.Series] = _hash_rows
    ) -> None:
        self._schema = {**keys, WINDOW: pl.Int64()}
        self._keys = list(keys)
        self._hasher = hasher
        self._slots = np.zeros(_SLOTS_MIN, np.int64)
        self._held = np.zeros(_SLOTS_MIN, np.uint64)
        self.clear()

    def __len__(self) -> int:
        """How many groups there are, the one that is nobody not counted."""
        return len(self._groups)

    @property
    def keys(self) -> pl.DataFrame:
        """Group keys; row i is group i + 1."""
        return pl.DataFrame([self._groups.get_column(name) for name in self._keys])

    @property
    def window_starts(self) -> I64:
        """Window starts; entry i is group i + 1."""
        return self._groups.get_column(WINDOW).to_numpy()

    @property
    def size_bytes(self) -> int:
        return int(self._groups.estimated_size()) + 24 * len(self)

    def of(self, frame: pl.DataFrame, window_start: I64) -> I64:
        """The group of each row; new groups are made as they come."""
        keyed = pl.DataFrame(
            [frame.get_column(name).cast(self._schema[name]) for name in self._keys] + [pl.Series(WINDOW, window_start)]
        )
        if self._exact is None and (gids := self._by_hash(keyed)) is not None:
            return gids
        return self._by_value(keyed)

    def clear(self) -> None:
        self._slots.fill(0)
        self._groups = pl.DataFrame(schema=self._schema)
        self._exact: dict[tuple[Any, ...], int] | None = None

    def _by_hash(self, keyed: pl.DataFrame) -> I64 | None:
        """None, and nothing new, if two keys turned out to share a hash."""
        hashes = self._hasher(keyed).to_numpy(writable=True)
        known, rows = len(self._groups) + 1, len(keyed)
        self._make_room(known + rows)
        gids, firsts = np.empty(rows, np.int64), np.empty(rows, np.int64)
        groups = find_groups(self._slots, self._held, hashes, known, gids, firsts)
        held = self._groups.vstack(keyed[firsts[: groups - known]]).rechunk() if groups > known else self._groups
        if groups - known < rows and not self._alike(held, gids, keyed):
            self._exact = {row: at + 1 for at, row in enumerate(self._groups.rows())}
            return None
        self._groups = held
        return gids

    def _alike(self, held: pl.DataFrame, gids: I64, keyed: pl.DataFrame) -> bool:
        """Whether each row of ``keyed`` is the key that its group in ``held`` was made for."""
        owners = pl.Series((gids - 1).astype(np.uint32))
        return all(
            held.get_column(name).gather(owners).eq_missing(keyed.get_column(name)).all() for name in self._schema
        )

    def _by_value(self, keyed: pl.DataFrame) -> I64:
        exact = self._exact or {}
        before = len(exact)
        gids = np.fromiter((exact.setdefault(row, len(exact) + 1) for row in keyed.rows()), np.int64, len(keyed))
        new = list(exact)[before:]
        self._groups = self._groups.vstack(pl.DataFrame(new, schema=self._schema, orient="row"))
        self._exact = exact
        return gids

    def _make_room(self, groups: int) -> None:
        if 2 * groups <= len(self._slots):
            return
        size = 1 << (2 * groups - 1).bit_length()
        known = len(self._groups)
        held = np.zeros(size // 2 + 1, np.uint64)
        held[: known + 1] = self._held[: known + 1]
        slots = np.zeros(size, np.int64)
        if known:
            again, firsts = np.empty(known, np.int64), np.empty(known, np.int64)
            find_groups(slots, np.zeros_like(held), held[1 : known + 1], 1, again, firsts)
        self._slots, self._held = slots, held
