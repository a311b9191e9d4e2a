"""Side outputs: a record that cannot go on is kept whole, with the reason and its place in headers."""

from __future__ import annotations

from typing import Literal

from streamproc.avro.wire import Unframed, unframe
from streamproc.core.batch import RawBatch
from streamproc.operators.contract import SideRecord

__all__ = ["side_record"]


def side_record(
    kind: Literal["dead", "late"],
    batch: RawBatch,
    row: int,
    topic: str,
    reason: str,
    schema_id: int | None = None,
    more: tuple[tuple[str, bytes], ...] = (),
) -> SideRecord:
    """Record ``row`` of ``batch`` for ``topic``: its original bytes and headers, then ours as `SideRecord` says.

    ``schema_id`` None: taken from the value, if it has one.
    """
    value, offset = batch.value(row), int(batch.offsets[row])
    ours: list[tuple[str, bytes]] = [
        ("sp-reason", reason.encode()),
        ("sp-topic", batch.tp.topic.encode()),
        ("sp-partition", _text(batch.tp.partition)),
        ("sp-offset", _text(offset)),
    ]
    schema_id = _schema_id(value) if schema_id is None else schema_id
    if schema_id is not None:
        ours.append(("sp-schema-id", _text(schema_id)))
    ours.append(("sp-time-ms", _text(int(batch.timestamps[row]))))
    headers = (*batch.headers(row), *ours, *more)
    return SideRecord(kind, topic, batch.key(row), value, headers, batch.tp, offset)


def _schema_id(value: bytes | None) -> int | None:
    try:
        return unframe(value)[0]
    except Unframed:
        return None


def _text(number: int) -> bytes:
    return str(number).encode()
