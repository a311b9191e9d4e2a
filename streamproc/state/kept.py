"""Committed values that a table of objects keeps in memory, so that an epoch does not ask the store for them again.

    young ── full: half of the bound ──▶ old ── the next time: forgotten
      ▲                                   │
      └───────────── read again ──────────┘

Two generations are nearly a list by last use, and cost a dict's operation. Nothing uncommitted is ever in it: the overlay
is the only writer of its rows, and adds an epoch's values only once the log has the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

__all__ = ["NOTHING", "ROW_BYTES", "KeptValues", "Packed"]

NOTHING: Final = object()
"""No value: not even None."""
ROW_BYTES: Final = 200
"""Taken for a row in memory, beside what its value weighs: key, value and their place in a dict."""


class Packed(bytes):
    """A value that could be changed in place is kept as its bytes: every epoch makes an object of its own."""

    __slots__ = ()


class KeptValues:
    """Values by key, of about ``bytes_max`` at most; a value is itself, or `Packed`. 0 keeps nothing beyond one epoch."""

    __slots__ = ("_bytes_max", "_old", "_weight", "whole", "young")

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.young: dict[Any, Any] = {}
        """What was added or found last; for the overlay's fastest read, which knows what to do when it is not there."""
        self._old: dict[Any, Any] = {}
        self.whole: bool | None = None
        """Every committed row is here: what is not found is not there. None until the overlay has looked at the store."""
        self._weight = 0
        """Bytes that values were added with; one that replaces another counts too, so the bound comes early, not late."""

    def find(self, key: Any) -> Any:
        """The value, or `NOTHING`."""
        found = self.young.get(key, NOTHING)
        if found is NOTHING and self._old:
            found = self._old.pop(key, NOTHING)
            if found is not NOTHING:
                self.add((key,), (found,), len(found) if isinstance(found, str | bytes) else 0)
        return found

    def add(self, keys: Iterable[Any], values: Iterable[Any], weight: int) -> None:
        """``weight``: bytes of the values together."""
        self.young.update(zip(keys, values, strict=True))
        self._weight += weight
        held = ROW_BYTES * len(self.young) + self._weight
        if held > self._bytes_max // 2:
            self.whole = self.whole and not self._old and held <= self._bytes_max
            self._old = self.young if held <= self._bytes_max else {}
            self.young, self._weight = {}, 0

    def forget(self, key: Any) -> None:
        """It is about to be deleted; if that does not come to a commit, the store still has it."""
        self.whole = False
        self.young.pop(key, None)
        self._old.pop(key, None)
