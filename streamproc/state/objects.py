"""The epoch's uncommitted writes to a table of Python objects: what a per-record agent's `app.Table` stands on.

`ObjectOverlay` is a dict of what the epoch wrote, so ``table[key] += 1`` on a key of this epoch is two operations of
C's dict and nothing of ours. What it does not hold is read from the store by ``__missing__`` and kept beside, so that
one key reads as one object within the epoch:

    table[key] ──▶ written (the dict) ──▶ deleted: missing ──▶ read before (same object) ──▶ store ──▶ default

Values changed in place (``table[key].append(x)``) are found at the commit by comparing what was read with what it has
become, so they are kept without being assigned back. What was taken out of the table before an earlier commit is the
caller's own copy: changing it later changes nothing in the table.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from itertools import islice
from typing import Any, Final, NamedTuple

from streamproc.state.contract import Store, Writes
from streamproc.state.overlay import Change, merged, table_prefix, table_stop
from streamproc.state.packing import pack_key, pack_value, unpack_key, unpack_value

__all__ = ["ObjectOverlay"]

ROW_BYTES: Final = 200
"""Taken for a row in `size_bytes`, beside what its value weighs."""
_WEIGHED: Final = 8
"""Of the rows written since `size_bytes` was last asked, how many are weighed for all of them."""
_UNTRACKED: Final = frozenset({int, float, str, bytes, bool, type(None)})
"""Values of these types cannot change in place."""
_NOTHING: Final = object()


class _Read(NamedTuple):
    """A value handed out this epoch: the object, what it was then, and whether the store has the row."""

    value: Any
    row: bytes
    """The key, packed."""
    packed: bytes
    stored: bool

    def changed(self, table: str, key: Any) -> bool:
        return type(self.value) not in _UNTRACKED and pack_value(self.value, table, key) != self.packed


class ObjectOverlay(dict[Any, Any]):
    """One table of one task within one epoch, as a dict over the committed rows.

    A missing key gives ``default()`` if there is one (the row is made when it is assigned or changed in place), else
    `KeyError`. Keys: text, bytes, numbers, booleans, None and tuples of them; equal keys are one row (``1``, ``1.0``
    and ``True``) and come back as the plainest of them (``1``). Values: these and lists, dicts, tuples and sets of
    them. Anything else is a `UserError` that names table, key and type, at the latest from `changes`. Iteration is in
    the order of packed keys, whatever the order of writing, and ``len`` reads all rows.
    """

    __slots__ = ("_default", "_deleted", "_packed", "_prefix", "_read", "_store", "_value_bytes", "_weighed", "table")

    def __init__(self, store: Store, table: str, default: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.table = table
        self._store, self._prefix, self._default = store, table_prefix(table), default
        self._read: dict[Any, _Read] = {}
        self._deleted: set[Any] = set()
        self._packed: list[Change] = []
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

    def changes(self) -> list[Change]:
        """One change per changed key, packed and in that order. The agents stand still from here to `drop`."""
        packed: dict[bytes, Change] = {}
        for key, value in self._changed():
            row = self._row(key)
            packed[row] = Change(row, pack_value(value, self.table, key))
        for key in self._deleted:
            row = pack_key(key, self.table)
            if row not in packed and self._store.get(self._prefix + row) is not None:
                packed[row] = Change(row, None, "delete")
        self._packed = [packed[row] for row in sorted(packed)]
        return self._packed

    def writes(self, into: Writes) -> None:
        """Add exactly what the last `changes` returned, so that store and changelog cannot differ."""
        for key, value, _ in self._packed:
            if value is None:
                into.deletes.add(self._prefix + key)
            else:
                into.puts[self._prefix + key] = value

    def drop(self) -> None:
        """Forget the epoch: committed (the store has it) or aborted (nobody has)."""
        super().clear()
        self._read, self._deleted, self._packed = {}, set(), []
        self._weighed = self._value_bytes = 0

    # ---- reading and writing one row

    def __missing__(self, key: Any) -> Any:
        found = self._stored(key)
        if found is not None:
            return found.value
        if self._default is None:
            raise KeyError(key)
        value = self._default()
        if type(value) not in _UNTRACKED:
            row = pack_key(key, self.table)
            self._read[key] = _Read(value, row, pack_value(value, self.table, key), False)
        return value

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        super().pop(key, None)
        self._read.pop(key, None)
        self._deleted.add(key)

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        found = self._stored(key)
        return found is not None and (found.stored or found.changed(self.table, key))

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dict: ``default`` is the argument, not the table's."""
        if key not in self:
            return default
        return self[key]

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, default: Any = _NOTHING) -> Any:
        if key not in self:
            if default is _NOTHING:
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
                    self._read[key] = _Read(value, row, packed, True)
                yield key, value

    def _rows(self) -> Iterator[tuple[bytes, bytes]]:
        """Every row in the order of packed keys; the value is the store's, of no use if the epoch changed the row."""
        own: dict[bytes, bytes | None] = {pack_key(key, self.table): None for key in self._deleted}
        own.update((pack_key(key, self.table), b"") for key, _ in self._changed())
        prefix = self._prefix
        stored = ((row[len(prefix) :], value) for row, value in self._store.scan(prefix, table_stop(prefix)))
        return merged(stored, [(row, own[row]) for row in sorted(own)])

    def _changed(self) -> Iterator[tuple[Any, Any]]:
        """What the epoch wrote, and what it read and then changed in place."""
        yield from super().items()
        for key, read in self._read.items():
            if not super().__contains__(key) and read.changed(self.table, key):
                yield key, read.value

    def _stored(self, key: Any) -> _Read | None:
        """The value of a key that was not written: read before in this epoch, or now from the store."""
        found = self._read.get(key)
        if found is None and key not in self._deleted:
            row = pack_key(key, self.table)
            packed = self._store.get(self._prefix + row)
            if packed is not None:
                found = self._read[key] = _Read(unpack_value(packed), row, packed, True)
                self._value_bytes += len(packed)
        return found

    def _row(self, key: Any) -> bytes:
        """The key, packed; what was read is packed already."""
        read = self._read.get(key)
        return pack_key(key, self.table) if read is None else read.row


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
