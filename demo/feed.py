"""Write a feed into its topic, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from demo.data import PARTITIONS, Feed
from streamproc.core.errors import UserError
from streamproc.core.types import TopicPartition
from streamproc.transport.contract import OutRecord, TopicSpec, Transport

__all__ = ["write_feed"]

SEND_RECORDS: Final = 500
"""Records of one call to the transport."""
TOPIC_CONFIG: Final = {"retention.ms": "-1"}
"""Records of 2013 would fall to any retention by time."""

Slice = dict[TopicPartition, list[OutRecord]]


async def write_feed(
    feed: Feed, transport: Transport, topic: str = "flights", *, console: Console | None = None, quiet: bool = False
) -> None:
    """Make ``topic`` if it is missing and write all of ``feed`` in its order, each record to its own partition and
    offset.

    The topic must be empty, for the injection list speaks of offsets: `UserError` if it is not, or if somebody else
    writes to it meanwhile. ``quiet`` shows no progress.
    """
    await transport.create_topics([TopicSpec(topic, PARTITIONS, TOPIC_CONFIG)])
    await _require_empty(transport, topic)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet) as progress:
        bar = progress.add_task(f"feeding {topic}", total=len(feed.rows))
        ends = {TopicPartition(topic, number): 0 for number in range(PARTITIONS)}
        for part in _slices(feed, topic):
            last = await transport.send(part)
            for tp, records in part.items():
                ends[tp] += len(records)
                if last[tp] != ends[tp] - 1:
                    raise _not_alone(topic, tp, last[tp] + 1, ends[tp])
            progress.advance(bar, sum(len(records) for records in part.values()))


def _slices(feed: Feed, topic: str) -> Iterator[Slice]:
    """Consecutive records of the feed, by partition."""
    for rows in feed.rows.iter_slices(SEND_RECORDS):
        part: Slice = {}
        columns = (rows[name].to_list() for name in ("partition", "key", "value", "timestamp_ms"))
        for partition, key, value, timestamp_ms in zip(*columns, strict=True):
            part.setdefault(TopicPartition(topic, partition), []).append(OutRecord(key, value, (), timestamp_ms))
        yield part


async def _require_empty(transport: Transport, topic: str) -> None:
    tps = [TopicPartition(topic, number) for number in range(PARTITIONS)]
    for tp, offsets in (await transport.offsets(tps)).items():
        if offsets.end > 0:
            raise _not_alone(topic, tp, offsets.end, 0)


def _not_alone(topic: str, tp: TopicPartition, found: int, expected: int) -> UserError:
    return UserError(
        f"Partition {tp.partition} of topic {topic} ends at offset {found} where the feed expects {expected}.",
        remedy="Delete the topic (or the embedded log's folder), and let only one feed write to it.",
    )
