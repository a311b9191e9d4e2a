"""Write a feed into its topic, with a progress bar.

python -m demo.feed --broker embedded://data/flights --injections data/injections.json
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from demo.data import PARTITIONS, Feed, make_feed
from streamproc.core.clock import SystemClock
from streamproc.core.errors import StreamprocError, UserError
from streamproc.core.types import TopicPartition
from streamproc.transport.contract import OutRecord, TopicSpec, Transport

__all__ = ["holds_feed", "main", "open_transport", "write_feed"]

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


async def holds_feed(feed: Feed, transport: Transport, topic: str = "flights") -> bool:
    """Whether each partition of ``topic`` ends where ``feed`` ends it: it has been written there, whole."""
    if await transport.partitions(topic) != PARTITIONS:
        return False
    sizes = dict(feed.rows.group_by("partition").len().iter_rows())
    return all(end == sizes.get(tp.partition, 0) for tp, end in (await _ends(transport, topic)).items())


async def _require_empty(transport: Transport, topic: str) -> None:
    for tp, end in (await _ends(transport, topic)).items():
        if end > 0:
            raise _not_alone(topic, tp, end, 0)


async def _ends(transport: Transport, topic: str) -> dict[TopicPartition, int]:
    tps = [TopicPartition(topic, number) for number in range(PARTITIONS)]
    return {tp: offsets.end for tp, offsets in (await transport.offsets(tps)).items()}


def _not_alone(topic: str, tp: TopicPartition, found: int, expected: int) -> UserError:
    return UserError(
        f"Partition {tp.partition} of topic {topic} ends at offset {found} where the feed expects {expected}.",
        remedy="Delete the topic (or the embedded log's folder), and let only one feed write to it.",
    )


def open_transport(broker: str) -> Transport:
    """The log that a broker URL names, as an app's ``broker`` does; not started."""
    scheme, _, rest = broker.partition("://")
    # Imported here, so that neither needs the other's libraries.
    if scheme == "embedded" and rest:
        from streamproc.transport.embedded import EmbeddedTransport

        return EmbeddedTransport(Path(rest), SystemClock())
    if scheme == "kafka" and rest:
        from streamproc.transport.kafka import KafkaTransport

        return KafkaTransport(rest.split(","), SystemClock(), client_id="streamproc-feed")
    raise UserError(f"--broker {broker} is not a log.", remedy="Write kafka://HOST:PORT or embedded://PATH.")


async def _run(arguments: argparse.Namespace) -> str:
    feed = make_feed(arguments.days)
    transport = open_transport(arguments.broker)
    await transport.start()
    try:
        if arguments.once and await holds_feed(feed, transport, arguments.topic):
            outcome = f"{arguments.topic} holds the feed already."
        else:
            await write_feed(feed, transport, arguments.topic)
            outcome = f"{len(feed.rows):,} records are in {arguments.topic}."
    finally:
        await transport.stop()
    if arguments.injections is not None:
        feed.save_injections(arguments.injections)
    return outcome


def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 0: the topic holds the whole feed."""
    parser = argparse.ArgumentParser(prog="python -m demo.feed", description="Write the flights into their topic.")
    parser.add_argument("--broker", default="embedded://data/flights", help="kafka://HOST:PORT or embedded://PATH")
    parser.add_argument("--topic", default="flights")
    parser.add_argument("--days", type=int, help="only the first so many days, at least 10")
    parser.add_argument("--injections", type=Path, help="write what was injected to this file")
    parser.add_argument("--once", action="store_true", help="do nothing if the topic holds the feed already")
    try:
        print(asyncio.run(_run(parser.parse_args(argv))))
    except (StreamprocError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
