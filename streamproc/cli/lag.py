"""`streamproc lag`: how far each task has committed, out of the commit records, which a restart reads too."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

import click

from streamproc.app import App
from streamproc.cli.apps import APP, declared_groups, load_app, opened
from streamproc.cli.text import print_columns
from streamproc.commit.record import CommitRecord, tp_name
from streamproc.core.errors import UserError
from streamproc.core.types import Offset, TaskId, TopicPartition
from streamproc.runtime.start import last_commit
from streamproc.runtime.topology import Group
from streamproc.transport.contract import PartitionOffsets, Transport

__all__ = ["lag"]


LAG_COUNTED_MAX: Final = 10_000
"""Beyond this many offsets the distance is told as it is."""


class Standing(NamedTuple):
    """One agent, pipeline or table in one source partition."""

    task: TaskId
    agent: str
    source: TopicPartition
    position: int | None
    """None: the task never committed."""
    end: int
    behind: int
    epoch: int


@click.command()
@APP
def lag(application: str) -> None:
    """Show committed positions, ends and lag of every task. An embedded log can be read only while no worker runs."""
    app = load_app(application)
    standings = asyncio.run(_read(app))
    rows = []
    for at in standings:
        position = "none" if at.position is None else f"{at.position:,}"
        source = f"{at.source.topic}[{at.source.partition}]"
        rows.append((str(at.task), at.agent, source, position, f"{at.end:,}", f"{at.behind:,}", f"{at.epoch:,}"))
    print_columns(("TASK", "READS FOR", "SOURCE", "POSITION", "END", "LAG", "EPOCH"), rows)
    click.echo(f"lag in all: {sum(at.behind for at in standings):,}")


async def _read(app: App) -> list[Standing]:
    async with opened(app) as transport:
        groups = await declared_groups(app, transport)
        return [at for group in groups for number in range(group.plan.partitions)
                for at in await _of_task(transport, group, number)]  # fmt: skip


async def _of_task(transport: Transport, group: Group, number: int) -> Sequence[Standing]:
    plan = group.plan
    record = await _record(transport, group, number)
    found = []
    for agent, topics in plan.agents.items():
        for topic in topics:
            tp = TopicPartition(topic, number)
            ends = await _ends(transport, tp, internal=group.table is not None)
            position = record.positions.get(agent, {}).get(tp_name(tp)) if record is not None else None
            # Bounded input ends where it ended at the first start, whatever came after.
            end = record.ends.get(tp_name(tp), ends.stable) if record is not None else ends.stable
            behind = await _behind(transport, tp, max(position or 0, ends.begin), end)
            found.append(
                Standing(TaskId(plan.name, number), agent, tp, position, end, behind, record.epoch if record else 0)
            )
    return found


async def _behind(transport: Transport, tp: TopicPartition, position: int, end: int) -> int:
    """Records from ``position`` to ``end``. Of a short distance they are counted: the end of a transaction takes an
    offset of its own, and who has read everything would seem to lag."""
    distance = max(0, end - position)
    if not 0 < distance <= LAG_COUNTED_MAX:
        return distance
    return sum([len(batch) async for batch in transport.read(tp, Offset(position), Offset(end))])


async def _record(transport: Transport, group: Group, number: int) -> CommitRecord | None:
    tp = TopicPartition(group.plan.commits_topic, number)
    if await transport.partitions(tp.topic) is None:
        return None
    ends = (await transport.offsets([tp]))[tp]
    return await last_commit(transport, group.plan.name, tp, PartitionOffsets(ends.begin, ends.stable, ends.stable))


async def _ends(transport: Transport, tp: TopicPartition, *, internal: bool) -> PartitionOffsets:
    if await transport.partitions(tp.topic) is None:
        if internal:  # made at the first start
            return PartitionOffsets(Offset(0), Offset(0), Offset(0))
        raise UserError(f"Topic {tp.topic} does not exist.", remedy="Create it: `streamproc topics MODULE --create`.")
    return (await transport.offsets([tp]))[tp]
