"""The commit record: the one record of each epoch's transaction that says where a task stands. Format 1 is final.

Written to the compacted topic ``{app}-{group}-commits``, partition = the task's, key = the group's name. Restore reads
positions from it and from nowhere else; the group's offsets are sent for lag tools only.
"""

from __future__ import annotations

from typing import Any

import msgspec

from streamproc.core.errors import LogLost, UserError
from streamproc.core.types import TopicPartition
from streamproc.operators.contract import WatermarkState

__all__ = ["FORMAT", "CommitRecord", "decode", "encode", "tp_name", "tp_of"]

FORMAT = 1


class CommitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a task stands after an epoch. Topic partitions are spelt ``topic:partition`` (a topic has no colon)."""

    format: int = FORMAT
    log_id: str
    """Uuid of the state's history: made at the task's very first start, never changed."""
    incarnation: int
    """+1 at each start of the task."""
    epoch: int
    """+1 at each commit."""
    positions: dict[str, dict[str, int]]
    """Agent (or pipeline, or table) -> source partition -> the offset it reads next."""
    watermarks: dict[str, dict[str, WatermarkState]]
    """Agent -> source partition, or number of the upstream task -> event-time clock."""
    sources: dict[str, int]
    """Source topic -> how many partitions it had when the application first started."""
    ends: dict[str, int]
    """Bounded inputs: source partition -> where it ended when the application first started."""
    timers_ms: int
    """High mark of the event-time timers that have run (none yet: `NO_WATERMARK`)."""
    changelogs: dict[str, int]
    """Changelog topic -> position behind the last record of the epochs before this one: where a sink's replay of this and
    later epochs may start."""
    topology: str
    """Hash of the group's topics, partition counts and tables."""
    fingerprints: dict[str, dict[str, Any]]
    """Table -> its plan's canonical form: incompatible code refuses to start and can say what changed."""


def encode(record: CommitRecord) -> bytes:
    """JSON: small, once an epoch, and readable by a person in trouble."""
    return msgspec.json.encode(record, order="sorted")


def decode(data: bytes, where: str) -> CommitRecord:
    """Raises `UserError` for a format of a newer streamproc, `LogLost` for bytes that are no commit record."""
    try:
        form = msgspec.json.decode(data, type=_Format).format
        if form == FORMAT:
            return msgspec.json.decode(data, type=CommitRecord)
    except msgspec.DecodeError as bad:
        raise LogLost(f"The commit record in {where} cannot be read: {bad}. Restore the topic from a backup, or start "
                      "the application under a new id.") from bad  # fmt: skip
    raise UserError(
        f"The commit record in {where} has format {form}; this streamproc knows {FORMAT}.",
        remedy="Start the version of streamproc that wrote it, or a newer one.",
    )


class _Format(msgspec.Struct):
    format: int


def tp_name(tp: TopicPartition) -> str:
    return f"{tp.topic}:{tp.partition}"


def tp_of(name: str) -> TopicPartition:
    topic, _, partition = name.rpartition(":")
    return TopicPartition(topic, int(partition))
