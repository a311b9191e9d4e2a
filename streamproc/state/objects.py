"""The epoch's uncommitted writes to a table of Python objects: what a per-record agent's `app.Table` stands on.

`ObjectOverlay` is a dict of what the epoch wrote, so ``table[key] += 1`` on a key of this epoch is two operations of
C's dict and nothing of ours. What it does not hold is read from the store by ``__missing__`` and kept beside, so that
one key reads as one object within the epoch:

    table[key] ──▶ written (the dict) ──▶ read before (same object) ──▶ deleted: missing ──▶ kept ──▶ store ──▶ default

Values changed in place (``table[key].append(x)``) are found at the commit by comparing what was read with what it has
become, so they are kept without being assigned back. What was taken out of the table before an earlier commit is the
caller's own copy: changing it later changes nothing in the table. Committed values stay in memory over the epochs, as
many as a bound allows (`state/kept.py`): most reads never come to the store.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from itertools import islice
from typing import Any, Final, NamedTuple

from streamproc.core import limits
from streamproc.state.contract import Store, Writes
from streamproc.state.kept import NOTHING, ROW_BYTES, KeptValues, Packed
from streamproc.state.overlay import Changes, merged, table_prefix, table_stop
from streamproc.state.packing import pack_key, pack_keys, pack_value, pack_values, unpack_key, unpack_value

__all__ = ["ObjectOverlay"]

_WEIGHED: Final = 8
"""Of the rows written since `size_bytes` was last asked, how many are weighed for all of them."""
_UNTRACKED: Final = frozenset({int, float, str, bytes, bool, type(None)})
"""Values of these types cannot change in place."""


class _Read(NamedTuple):
    """A value that could be changed in place, handed out this epoch: the object, what it was then, and whether it is
    committed or the table's default."""

    value: Any
    packed: bytes
    stored: bool

    def changed(self, table: str, key: Any) -> bool:
        return pack_value(self.value, table, key) != self.packed


class ObjectOverlay(dict[Any, Any]):
    """One table of one task within one epoch, as a dict over the committed rows.

    A missing key gives ``default()`` if there is one (the row is made when it is assigned or changed in place), else
    `KeyError`. Keys: text, bytes, numbers, booleans, None and tuples of them; equal keys are one row (``1``, ``1.0``
    and ``True``) and come back as the plainest of them (``1``). Values: these and lists, dicts, tuples and sets of
    them. Anything else is a `UserError` that names table, key and type, at the latest from `changes`. Iteration is in
    the order of packed keys, whatever the order of writing, and ``len`` reads all rows.
    """

    __slots__ = (
        "_changes", "_default", "_deleted", "_fresh", "_kept", "_prefix", "_read", "_store", "_value_bytes", "_weighed",
        "table",
    )  # fmt: skip

    def __init__(
        self,
        store: Store,
        table: str,
        default: Callable[[], Any] | None = None,
        *,
        kept_bytes_max: int = limits.TABLE_KEPT_BYTES_MAX,
    ) -> None:
        super().__init__()
        self.table = table
        self._store, self._prefix, self._default = store, table_prefix(table), default
        self._kept = KeptValues(kept_bytes_max)
        self._read: dict[Any, _Read] = {}
        self._deleted: set[Any] = set()
        self._changes = Changes([], [])
        self._fresh: tuple[list[Any], list[Any]] = [], []
        """Keys and values of the last `changes`, as they are kept."""
        self._weighed = self._value_bytes = 0

    # ---- the epoch's end

    @property
    def size_bytes(self) -> int:
        """A rough measure of the epoch: rows held, and their values by a sample of those that came since the last call."""
        written = super().__len__()
        if (new := written - self._weighed) > 0:
            sample = [
                _weight(super(ObjectOverlay, self).__getitem__(key))
                for key in islice(super().__reversed__(), min(new, _WEIGHED))
            ]
            self._value_bytes += new * sum(sample) // len(sample)
        self._weighed = written
        return ROW_BYTES * (written + len(self._read) + len(self._deleted)) + self._value_bytes

    def changes(self) -> Changes:
        """One change per changed key, packed and in that order. The agents stand still from here to `drop`."""
        keys, gone = self._changed(), self._gone()
        ascending = not gone and _sort(keys)
        values = list(map(super().__getitem__, keys))  # what was changed in place comes by way of `__missing__`
        rows, packed = pack_keys(keys, self.table), pack_values(values, self.table, keys)
        self._fresh = keys, _to_keep(values, packed)
        if ascending:
            self._changes = Changes(rows, packed)
            return self._changes
        by_row: dict[bytes, bytes | None] = {**dict.fromkeys(gone), **dict(zip(rows, packed, strict=True))}
        rows = sorted(by_row)
        self._changes = Changes(rows, list(map(by_row.__getitem__, rows)), dict.fromkeys(gone, "delete"))
        return self._changes

    def writes(self, into: Writes) -> None:
        """Add exactly what the last `changes` returned, so that store and changelog cannot differ. The log has the epoch:
        its values are the committed ones from now on."""
        prefix, changes = self._prefix, self._changes
        into.deletes.update(prefix + row for row in changes.gone)
        into.runs.append(changes.run(prefix))
        keys, values = self._fresh
        self._kept.add(keys, values, sum(map(len, filter(None, changes.values))))
        self._fresh = [], []

    def drop(self) -> None:
        """Forget the epoch: committed (the store has it) or aborted (nobody has)."""
        super().clear()
        self._read, self._deleted, self._changes, self._fresh = {}, set(), Changes([], []), ([], [])
        self._weighed = self._value_bytes = 0

    # ---- reading and writing one row

    def __missing__(self, key: Any) -> Any:
        value = self._kept.young.get(key, NOTHING)
        if type(value) in _UNTRACKED:  # most reads; what the epoch deleted is not kept any more
            return value
        read = self._read.get(key)
        if read is not None:
            return read.value
        value = self._committed(key)
        if value is not NOTHING:
            return value
        if self._default is None:
            raise KeyError(key)
        value = self._default()
        if type(value) not in _UNTRACKED:
            self._read[key] = _Read(value, pack_value(value, self.table, key), False)
        return value

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        super().pop(key, None)
        self._read.pop(key, None)
        self._kept.forget(key)  # so that `__missing__` does not find it; if the epoch is dropped the store has it
        self._deleted.add(key)

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        read = self._read.get(key)
        if read is not None:
            return read.stored or read.changed(self.table, key)
        return self._committed(key) is not NOTHING

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dict: ``default`` is the argument, not the table's."""
        value = super().get(key, NOTHING)
        if value is NOTHING and key in self:
            value = self[key]
        return default if value is NOTHING else value

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, default: Any = NOTHING) -> Any:
        if key not in self:
            if default is NOTHING:
                raise KeyError(key)
            return default
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[Any, Any]:
        """The last row in the order of iteration."""
        for key in reversed(list(self)):
            return key, self.pop(key)
        raise KeyError("popitem(): table is empty")

    def clear(self) -> None:
        """Delete every row."""
        for key in list(self):
            del self[key]

    # ---- reading many rows

    def __iter__(self) -> Iterator[Any]:
        return (unpack_key(row) for row, _ in self._rows())

    def __reversed__(self) -> Iterator[Any]:
        return iter([*self][::-1])

    def __len__(self) -> int:
        return sum(1 for _ in self._rows())

    def __bool__(self) -> bool:
        return next(self._rows(), None) is not None

    def keys(self) -> KeysView[Any]:  # type: ignore[override]
        return KeysView(self)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return _Values(self)

    def items(self) -> ItemsView[Any, Any]:  # type: ignore[override]
        return _Items(self)

    def copy(self) -> dict[Any, Any]:
        """A plain dict of every row."""
        return dict(_Items(self))

    def __eq__(self, other: object) -> bool:
        return bool(self.copy() == (other.copy() if isinstance(other, ObjectOverlay) else other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __or__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**self.copy(), **other}

    def __ror__(self, other: Mapping[Any, Any]) -> dict[Any, Any]:
        return {**other, **self.copy()}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of table {self.table}: {super().__len__()} rows written in this epoch>"

    def walk(self) -> Iterator[tuple[Any, Any]]:
        """Every row as ``(key, value)``, the view as of now; a value read here is the one that ``table[key]`` gives."""
        for row, packed in self._rows():
            key = unpack_key(row)
            if super().__contains__(key) or key in self._read:
                yield key, self[key]
            elif key not in self._deleted:  # since the walk began
                value = unpack_value(packed)
                if type(value) not in _UNTRACKED:
                    self._read[key] = _Read(value, packed, True)
                yield key, value

    def _rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Every row in the order of packed keys; the value is the store's, of no use if the epoch changed the row."""
        own: dict[bytes, bytes | None] = {pack_key(key, self.table): None for key in self._deleted}
        own.update(dict.fromkeys(pack_keys(self._changed(), self.table), b""))
        prefix = self._prefix
        stored = ((row[len(prefix) :], value) for row, value in self._store.scan(prefix, table_stop(prefix)))
        return merged(stored, [(row, own[row]) for row in sorted(own)])

    def _changed(self) -> list[Any]:
        """Keys that the epoch wrote, and those of values that it read and then changed in place."""
        keys = list(super().keys())
        if self._read:
            keys += [
                key
                for key, read in self._read.items()
                if not super(ObjectOverlay, self).__contains__(key) and read.changed(self.table, key)
            ]
        return keys

    def _gone(self) -> list[bytes]:
        """Packed keys that were deleted and are in the store."""
        rows = [pack_key(key, self.table) for key in self._deleted if not super(ObjectOverlay, self).__contains__(key)]
        stored = self._store.get_many([self._prefix + row for row in rows])
        return [row for row, value in zip(rows, stored, strict=True) if value is not None]

    def _committed(self, key: Any) -> Any:
        """The committed value of a key that was neither written nor read before in this epoch, as an object of the epoch's
        own if it can be changed in place; `NOTHING` if there is none, or the epoch deleted it."""
        if key in self._deleted:
            return NOTHING
        value = self._kept.find(key)
        if value is NOTHING:
            value = self._from_store(pack_key(key, self.table), key)
        if type(value) is Packed:
            self._value_bytes += len(value)
            self._read[key] = _Read(unpack_value(value), value, True)
            return self._read[key].value
        return value

    def _from_store(self, row: bytes, key: Any) -> Any:
        """As it is kept from now on; `NOTHING`: the store has no such row."""
        if self._kept.whole is None:
            self._kept.whole = next(self._store.scan(self._prefix, table_stop(self._prefix)), None) is None
        packed = None if self._kept.whole else self._store.get(self._prefix + row)
        if packed is None:
            return NOTHING
        value = unpack_value(packed)
        if type(value) not in _UNTRACKED:
            value = Packed(packed)
        self._kept.add((key,), (value,), len(packed))
        return value


def _to_keep(values: list[Any], packed: list[bytes]) -> list[Any]:
    """What becomes of an epoch's values once they are committed."""
    if _UNTRACKED.issuperset(map(type, values)):
        return values
    return [value if type(value) in _UNTRACKED else Packed(data) for value, data in zip(values, packed, strict=True)]


def _sort(keys: list[Any]) -> bool:
    """Put keys into the order of their bytes if that is cheap, and say so. From 0 on, MessagePack's numbers are in order."""
    if {*map(type, keys)} != {int}:
        return False
    keys.sort()
    return bool(keys[0] >= 0)


def _weight(value: Any, depth: int = 0) -> int:
    """Bytes of text in ``value``, and 8 for anything else; what is nested too deep is refused when it is packed."""
    if isinstance(value, str | bytes):
        return len(value)
    if depth > 8 or not isinstance(value, list | tuple | set | frozenset | dict):
        return 8
    if isinstance(value, dict):
        return sum(_weight(key, depth + 1) + _weight(held, depth + 1) for key, held in value.items())
    return sum(_weight(item, depth + 1) for item in value)


class _Items(ItemsView[Any, Any]):
    _mapping: ObjectOverlay

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self._mapping.walk()


class _Values(ValuesView[Any]):
    _mapping: ObjectOverlay

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self._mapping.walk())
