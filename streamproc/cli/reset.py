"""`streamproc reset`: give up an application's state, or that of one table.

All of it: commit records (tables' first), repartition topics, the application's own side topics, changelogs, then the
local stores of this machine, then the ledgers in the sinks. In this order, because wherever it is broken off the
application refuses to start (a changelog without a commit record; a sink of another log) instead of counting twice, and
another `reset` ends it. Stores on other machines belong to another log then, and are wiped when a task opens them.

One table: its changelog is deleted, and each task's commit record is written anew, with the table's new plan and a new
log id, at the end of the table's repartition topic. Positions of sources and watermarks stay: it begins empty and fills
with what comes from now on.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import click

from streamproc.app import App
from streamproc.cli.apps import APP, declared_groups, load_app, opened
from streamproc.commit.record import encode, tp_name
from streamproc.commit.start import least_positions, next_record
from streamproc.core.errors import UserError
from streamproc.core.partitioner import partition_of
from streamproc.core.types import TopicPartition
from streamproc.operators.groupkeys import encode_group_key
from streamproc.runtime.start import last_commit
from streamproc.runtime.topology import Group, internal_topics
from streamproc.runtime.work import SinkUse, StateTable
from streamproc.sinks.contract import TableShape
from streamproc.transport.contract import OutRecord, Transport

__all__ = ["reset"]

EVER_MS: Final = -62_135_596_800_000
"""Year 1: no window that a sink can hold starts before."""


@dataclass(frozen=True)
class Loss:
    """What is to go."""

    groups: list[Group]
    """Whose tasks are fenced."""
    topics: list[str]
    """In the order they are deleted."""
    rewritten: tuple[Group, StateTable] | None
    """The one table whose group keeps its commit records, in a new form."""
    folders: list[Path]
    tables: list[StateTable]
    """Those whose ledgers go."""
    kept: list[str]
    """Side topics that the user named: they are the user's."""


@click.command()
@APP
@click.option("--table", help="Only this table's rows (or a dedupe step's memory).")
@click.option("--sink-rows", is_flag=True, help="Also delete the rows that the sinks hold.")
@click.option("--datadir", type=click.Path(file_okay=False), help="Folder of the local state, as given to the worker.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def reset(application: str, table: str | None, sink_rows: bool, datadir: str | None, yes: bool) -> None:
    """Give up the state of an application. No worker of it may run."""
    asyncio.run(_reset(load_app(application, datadir=datadir), table, sink_rows, yes))


async def _reset(app: App, table: str | None, sink_rows: bool, yes: bool) -> None:
    async with opened(app) as transport:
        if running := await transport.members(app.conf.id):
            raise UserError(f"{running} workers of {app.conf.id} are running.", remedy="Stop them, then reset.")
        groups = await declared_groups(app, transport)
        loss = _all(app, groups) if table is None else _one(app, groups, table)
        loss.topics[:] = [topic for topic in loss.topics if await transport.partitions(topic) is not None]
        _tell(app, loss, sink_rows)
        if not yes:
            click.confirm("Give this up?", abort=True)
        await _fence(app, transport, loss.groups)
        for topic in loss.topics:
            await transport.delete_topics([topic])
        if loss.rewritten is not None:
            await _rewrite(transport, *loss.rewritten)
        for folder in loss.folders:
            shutil.rmtree(folder, ignore_errors=True)
        for state in loss.tables:
            for use in state.sinks:
                await _forget(app, state, use, sink_rows)
    click.echo("Done.")


def _all(app: App, groups: Sequence[Group]) -> Loss:
    specs = [spec.name for spec in internal_topics(groups)]
    outputs = {name for group in groups for name in group.outputs}
    kept = [name for name in specs if name in outputs or not name.startswith(f"{app.conf.id}-")]
    with_tables_first = sorted(groups, key=lambda group: (group.table is None, not group.plan.tables))
    commits = [group.plan.commits_topic for group in with_tables_first]
    changelogs = [table.changelog for group in groups for table in group.plan.tables]
    others = [name for name in specs if name not in {*commits, *changelogs, *kept}]
    tables = [table for group in groups for table in group.plan.tables if table.sinks]
    return Loss(list(groups), [*commits, *others, *changelogs], None, [app.state_folder], tables, kept)


def _one(app: App, groups: Sequence[Group], name: str) -> Loss:
    for group in groups:
        for table in group.plan.tables:
            if table.name == name:
                plan = group.plan
                folders = [app.state_folder / f"{plan.name}-{number}" for number in range(plan.partitions)]
                return Loss([group], [table.changelog], (group, table), folders, [table] if table.sinks else [], [])
    names = sorted(table.name for group in groups for table in group.plan.tables)
    raise UserError(f"{app.conf.id} has no table {name!r}.", remedy=f"It has {', '.join(names) or 'none'}.")


def _tell(app: App, loss: Loss, sink_rows: bool) -> None:
    what = f"table {loss.rewritten[1].name}" if loss.rewritten else "everything it has computed"
    click.echo(f"Application {app.conf.id}: {what} is given up.")
    for topic in loss.topics:
        click.echo(f"  topic deleted: {topic}")
    for folder in loss.folders:
        if folder.exists():
            click.echo(f"  local state deleted: {folder}")
    for table in loss.tables:
        for use in table.sinks:
            rows = "its rows deleted" if sink_rows else "its rows stay until they are written again"
            click.echo(f"  ledger deleted: table {table.name} in {use.sink.name}; {rows}")
    for topic in loss.kept:
        click.echo(f"  stays, and will get its records again: {topic}")
    if loss.rewritten:
        click.echo("The table begins empty, with the records from now on; the sources are not read again.")
    else:
        click.echo("The next start reads the sources from the first record that is still in them.")


async def _fence(app: App, transport: Transport, groups: Sequence[Group]) -> None:
    """A transaction that a dead worker left open is settled before what it wrote to is deleted."""
    for group in groups:
        if await transport.partitions(group.plan.commits_topic) is None:
            continue
        for number in range(group.plan.partitions):
            await transport.producer(f"{app.conf.id}:{group.plan.name}:{number}").fence()


async def _rewrite(transport: Transport, group: Group, table: StateTable) -> None:
    """The tasks' commit records without the table's past. A new log id makes every store of the group a stranger."""
    plan = group.plan
    for number in range(plan.partitions):
        commits = TopicPartition(plan.commits_topic, number)
        if await transport.partitions(commits.topic) is None:
            return
        ends = (await transport.offsets([commits]))[commits]
        record = await last_commit(transport, plan.name, commits, ends)
        if record is None:
            continue
        positions = record.positions
        if group.table is not None:  # partials that were made by the old plan are not for the new one
            sources = [TopicPartition(topic, number) for topic in plan.sources]
            offsets = await transport.offsets(sources)
            positions = {**positions, table.name: {tp_name(tp): int(at.stable) for tp, at in offsets.items()}}
        renewed = next_record(
            record,
            log_id=str(uuid.uuid4()),
            positions=positions,
            changelogs={**record.changelogs, table.changelog: 0},
            fingerprints={**record.fingerprints, table.name: dict(table.fingerprint)},
        )
        # In the task's own transaction, and with the group's offsets: a start compares them with the record.
        producer = transport.producer(f"{plan.app_id}:{plan.name}:{number}")
        await producer.fence()
        await producer.produce({commits: [OutRecord(plan.name.encode(), encode(renewed))]})
        await producer.send_offsets(least_positions(positions), plan.app_id)
        await producer.end(commit=True)


async def _forget(app: App, table: StateTable, use: SinkUse, rows: bool) -> None:
    """Delete the ledgers of all tasks, and with ``rows`` before that what they hold."""
    shape = table.shape
    assert shape is not None
    for number in range(shape.partitions):
        writer = use.sink.writer(shape, app.conf.id, number)
        try:
            await writer.open()
            if rows and (held := await writer.read()) is not None:
                await writer.prune((), since_ms=EVER_MS, mine=partial(_is_in, shape, number), held=held)
            await writer.forget()
        finally:
            await writer.close()


def _is_in(shape: TableShape, number: int, keys: tuple[object, ...]) -> bool:
    return partition_of(encode_group_key(keys, shape.keys), shape.partitions) == number
