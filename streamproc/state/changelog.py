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
from typing import Final, NamedTuple, cast

import numpy as np

from streamproc.avro.recordbatch import Columns, Spans, spans
from streamproc.core import limits
from streamproc.core.batch import Headers, RawBatch
from streamproc.core.errors import RowRefused, UserError
from streamproc.core.types import EpochNumber, Offset
from streamproc.state.overlay import Change, Changes, Tombstone

__all__ = ["ChangelogRow", "Record", "columns", "read", "record"]

_TOMBSTONES: Final[dict[Tombstone, bytes]] = {"delete": b"delete", "expire": b"expire"}
_KINDS: Final = {b"delete": "delete", b"expire": "expire"}
# Headers as they lie in a record batch: count, then name length, name, value length, value; lengths are zigzag varints.
_ROW_HEAD: Final = b"\x02\x02e\x10"
_TOMB_HEAD: Final = b"\x04\x02e\x10"
_TOMB_MIDDLE: Final = b"\x02x\x0c"


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
    data = batch.buffer.tobytes()  # once: slicing bytes is several times cheaper than slicing an array
    columns = (batch.key_start, batch.key_len, batch.value_start, batch.value_len, batch.headers_start, batch.offsets)
    for row, (key_at, key_len, at, length, head, offset) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        if key_len < 0:
            raise _foreign(batch, row, "it has no key")
        key = data[key_at : key_at + key_len]
        start = data[head : head + 4]
        if length >= 0 and start == _ROW_HEAD:
            epoch = int.from_bytes(data[head + 4 : head + 12], "big")
            yield ChangelogRow(key, data[at : at + length], EpochNumber(epoch), None, Offset(offset))
        elif length < 0 and start == _TOMB_HEAD and data[head + 12 : head + 15] == _TOMB_MIDDLE:
            epoch = int.from_bytes(data[head + 4 : head + 12], "big")
            how = _kind(batch, row, data[head + 15 : head + 21])
            yield ChangelogRow(key, None, EpochNumber(epoch), how, Offset(offset))
        else:
            yield _by_headers(batch, row, key, data[at : at + length] if length >= 0 else None)


def _by_headers(batch: RawBatch, row: int, key: bytes, value: bytes | None) -> ChangelogRow:
    """A record whose headers do not lie as we write them: a copy by another tool may order or add some."""
    headers = dict(batch.headers(row))
    epoch = headers.get("e")
    if epoch is None or len(epoch) != 8:
        raise _foreign(batch, row, "it carries no epoch")
    how = _kind(batch, row, headers.get("x")) if value is None else None
    number = EpochNumber(int.from_bytes(epoch, "big"))
    return ChangelogRow(key, value, number, how, Offset(int(batch.offsets[row])))


def _kind(batch: RawBatch, row: int, header: bytes | None) -> Tombstone:
    kind = _KINDS.get(header or b"")
    if kind is None:
        raise _foreign(batch, row, "it is a tombstone that says neither delete nor expire")
    return cast(Tombstone, kind)


def _foreign(batch: RawBatch, row: int, why: str) -> UserError:
    tp = batch.tp
    return UserError(
        f"Changelog {tp.topic} partition {tp.partition} holds a record at offset {int(batch.offsets[row])} that "
        f"streamproc did not write: {why}.",
        remedy="Find who else writes to the topic and stop it; then give up the state with `streamproc reset MODULE`.",
    )
