"""Records of a table's changelog, the durable record of its rows. Format 1 is final.

    key      the row's key within its table
    value    the row; null: a tombstone
    headers  "e": the epoch's number, 8 bytes big-endian
             "x": only on a tombstone: b"delete" (sinks follow it) or b"expire" (the row left by retention)

One record per changed key and epoch. State is kept in small rows (sub-keys), so a record is never split.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamproc.avro.recordbatch import Columns, Spans, spans
from streamproc.core import limits
from streamproc.core.batch import I64, U8, Headers, RawBatch
from streamproc.core.errors import RowRefused, UserError
from streamproc.core.hash128 import U64
from streamproc.core.types import EpochNumber, Offset
from streamproc.state.overlay import Change, Changes, Tombstone

__all__ = ["KINDS", "ChangelogRow", "ChangelogRows", "Record", "columns", "read", "read_columns", "record"]

_TOMBSTONES: Final[dict[Tombstone, bytes]] = {"delete": b"delete", "expire": b"expire"}
KINDS: Final[tuple[Tombstone | None, ...]] = (None, *_TOMBSTONES)
"""How a row left, by its number in `ChangelogRows`."""
# Headers as they lie in a record batch: count, then name length, name, value length, value; lengths are zigzag varints.
_ROW_HEAD: Final = b"\x02\x02e\x10"
_TOMB_HEAD: Final = b"\x04\x02e\x10"
_TOMB_MIDDLE: Final = b"\x02x\x0c"
_ROW_BYTES: Final = len(_ROW_HEAD) + 8
_TOMB_BYTES: Final = len(_TOMB_HEAD) + 8 + len(_TOMB_MIDDLE) + 6


class Record(NamedTuple):
    """What is written, with the fields of a transport's ``OutRecord``: ``OutRecord(*record)``."""

    key: bytes
    value: bytes | None
    headers: Headers
    timestamp_ms: None = None
    """The transport's clock at the moment of writing."""


class ChangelogRow(NamedTuple):
    """One record read back. ``value`` None goes with a ``tombstone``, and only then."""

    key: bytes
    value: bytes | None
    epoch: EpochNumber
    tombstone: Tombstone | None
    offset: Offset


class ChangelogRows(NamedTuple):
    """The records of a batch read back, as columns in the order of the log."""

    keys: list[bytes]
    values: list[bytes | None]
    epochs: U64
    kinds: I64
    """How a row left, as a place in `KINDS`; 0: it did not, and has a value."""


def record(change: Change, epoch: int, *, table: str | None = None) -> Record:
    """The record of one change; above `CHANGELOG_RECORD_BYTES_MAX` a `RowRefused` that names ``table`` and key."""
    key, value, tombstone = change
    if value is None:
        return Record(key, None, _headers(epoch, tombstone or "delete"))
    if len(key) + len(value) > limits.CHANGELOG_RECORD_BYTES_MAX:
        raise RowRefused(
            f"A row of table {table or '(unnamed)'} is too large for its changelog: key {key[:80]!r} holds "
            f"{len(value):,} bytes, more than {limits.CHANGELOG_RECORD_BYTES_MAX:,}.",
            remedy="Spread what it holds over several keys, or keep less of it.",
        )
    return Record(key, value, _headers(epoch, None))


def columns(changes: Changes, epoch: int, timestamp_ms: int, *, table: str | None = None) -> Columns:
    """The records of all ``changes`` (at least one), as `record` makes each, written at ``timestamp_ms``."""
    keys, values = spans(changes.keys), spans(changes.values)
    large = np.flatnonzero(keys.length + np.maximum(values.length, 0) > limits.CHANGELOG_RECORD_BYTES_MAX)
    for row in large.tolist():
        record(changes[row], epoch, table=table)  # a value raises; a key alone is a tombstone's
    return Columns(keys, values, _header_column(changes, epoch), np.full(len(changes), timestamp_ms, np.int64))


def _header_column(changes: Changes, epoch: int) -> Spans:
    """One of three byte strings for every row."""
    number = epoch.to_bytes(8, "big")
    tombs = {how: _TOMB_HEAD + number + _TOMB_MIDDLE + name for how, name in _TOMBSTONES.items()}
    kinds = spans([_ROW_HEAD + number, *tombs.values()])
    which = np.zeros(len(changes), np.int64)
    if changes.gone:
        places: dict[Tombstone | None, int] = {None: 0, **{how: place for place, how in enumerate(tombs, 1)}}
        which[:] = [places[changes.gone.get(key)] for key in changes.keys]
    return Spans(kinds.buffer, kinds.start[which], kinds.length[which])


@lru_cache(maxsize=64)  # one tuple for all rows of an epoch
def _headers(epoch: int, tombstone: Tombstone | None) -> Headers:
    head = ("e", epoch.to_bytes(8, "big"))
    return (head,) if tombstone is None else (head, ("x", _TOMBSTONES[tombstone]))


def read(batch: RawBatch) -> Iterator[ChangelogRow]:
    """The rows of a fetched batch in order. A record that is none of ours: `UserError` that names topic and offset."""
    keys, values, epochs, kinds = read_columns(batch)
    tombstones = map(KINDS.__getitem__, kinds.tolist())
    return map(ChangelogRow, keys, values, epochs.tolist(), tombstones, batch.offsets.tolist())


def read_columns(batch: RawBatch) -> ChangelogRows:
    """As `read`, without an object per record: for restores, which read nothing else by the million."""
    nameless = np.flatnonzero(batch.key_len < 0)
    if len(nameless):
        raise _foreign(batch, int(nameless[0]), "it has no key")
    epochs, kinds = _headers_read(batch)
    for row in np.flatnonzero(kinds < 0).tolist():
        epochs[row], kinds[row] = _by_headers(batch, row)
    data = batch.buffer.tobytes()  # once: slicing bytes is several times cheaper than slicing an array
    values: list[bytes | None] = [*_cut(data, batch.value_start, batch.value_len)]
    for row in np.flatnonzero(kinds).tolist():
        values[row] = None
    return ChangelogRows([*_cut(data, batch.key_start, batch.key_len)], values, epochs, kinds)


def _cut(data: bytes, start: I64, length: I64) -> Iterator[bytes]:
    ends = start + np.maximum(length, 0)
    return map(data.__getitem__, map(slice, start.tolist(), ends.tolist()))


def _headers_read(batch: RawBatch) -> tuple[U64, I64]:
    """Epoch and kind of each record whose headers lie as we write them; -1 is the kind of all others.

    The words read lie within the headers: who reads a batch has held their parts against their end.
    """
    fours, eights = _words(batch.buffer, ">u4"), _words(batch.buffer, ">u8")
    size, null = batch.headers_end - batch.headers_start, batch.value_len < 0
    kinds, at = np.full(len(batch), -1), batch.headers_start
    kinds[~null & (size == _ROW_BYTES) & (fours[at] == _word(_ROW_HEAD))] = 0
    tombs = np.flatnonzero(null & (size == _TOMB_BYTES) & (fours[at] == _word(_TOMB_HEAD)))
    middle, how = fours[at[tombs] + 11] & 0xFFFFFF, eights[at[tombs] + 13]
    for kind, name in enumerate(_TOMBSTONES.values(), 1):
        ends = _TOMB_MIDDLE + name
        kinds[tombs[(middle == _word(ends[:3])) & (how == _word(ends[1:]))]] = kind
    epochs = eights[np.where(kinds < 0, 0, at + len(_ROW_HEAD))]
    return epochs.astype(np.uint64), kinds


def _words(buffer: U8, word: str) -> NDArray[Any]:
    """The big-endian word that begins at each byte, as far as the buffer's slack lets one begin."""
    size = np.dtype(word).itemsize
    return np.ndarray((len(buffer) - size + 1,), word, buffer, strides=(1,))


def _word(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _by_headers(batch: RawBatch, row: int) -> tuple[int, int]:
    """Epoch and kind of a record whose headers do not lie as we write them: a copy by another tool may order or add some."""
    headers = dict(batch.headers(row))
    epoch = headers.get("e")
    if epoch is None or len(epoch) != 8:
        raise _foreign(batch, row, "it carries no epoch")
    if batch.value_len[row] >= 0:
        return _word(epoch), 0
    how = headers.get("x") or b""
    if how not in _TOMBSTONES.values():
        raise _foreign(batch, row, "it is a tombstone that says neither delete nor expire")
    return _word(epoch), 1 + list(_TOMBSTONES.values()).index(how)


def _foreign(batch: RawBatch, row: int, why: str) -> UserError:
    tp = batch.tp
    return UserError(
        f"Changelog {tp.topic} partition {tp.partition} holds a record at offset {int(batch.offsets[row])} that "
        f"streamproc did not write: {why}.",
        remedy="Find who else writes to the topic and stop it; then give up the state with `streamproc reset MODULE`.",
    )
