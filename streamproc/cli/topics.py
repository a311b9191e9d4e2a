"""`streamproc topics`: what an application reads and writes, and whether it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import click

from streamproc.app import App
from streamproc.cli.apps import APP, declared_groups, load_app, opened
from streamproc.cli.text import print_columns
from streamproc.core.errors import UserError
from streamproc.runtime.topology import Group, internal_topics
from streamproc.transport.contract import TopicSpec, Transport

__all__ = ["topics"]


class Listed(NamedTuple):
    kind: str
    spec: TopicSpec
    """Partitions 0: the code leaves the number open and the topic does not exist."""
    found: str
    """``yes``, ``missing``, ``created``, or how it differs from what is declared."""


@click.command()
@APP
@click.option("--create", is_flag=True, help="Make what is missing.")
@click.option("--partitions", type=click.IntRange(1), help="For a missing topic whose number the code leaves open.")
def topics(application: str, create: bool, partitions: int | None) -> None:
    """List the topics of an application: its own, internal ones, dead letters and late records."""
    app = load_app(application)
    listed = asyncio.run(_list(app, create, partitions))
    _show(listed)
    if create and (open_ones := [topic.spec.name for topic in listed if not topic.spec.partitions]):
        raise UserError(
            f"Topic {open_ones[0]} does not exist, and the code does not say how many partitions it has.",
            remedy="Say so: --create --partitions N.",
        )


async def _list(app: App, create: bool, partitions: int | None) -> list[Listed]:
    async with opened(app) as transport:
        declared = [await _with_count(transport, spec, partitions) for spec in app.declared_topics()]
        kinds = [("declared", spec) for spec in declared]
        if all(spec.partitions for spec in declared):
            groups = await declared_groups(app, transport, {spec.name: spec.partitions for spec in declared})
            names = {spec.name for spec in declared}
            kinds += [(_kind(spec.name, groups), spec) for spec in internal_topics(groups) if spec.name not in names]
        return [Listed(kind, spec, await _found(transport, spec, create)) for kind, spec in kinds]


async def _with_count(transport: Transport, spec: TopicSpec, partitions: int | None) -> TopicSpec:
    count = spec.partitions or await transport.partitions(spec.name) or partitions or 0
    return TopicSpec(spec.name, count, spec.config)


def _kind(topic: str, groups: Sequence[Group]) -> str:
    for group in groups:
        if topic == group.plan.commits_topic:
            return "commits"
        if any(topic == table.changelog for table in group.plan.tables):
            return "changelog"
        if topic in group.side_topics:
            return "side output"
        if topic in group.outputs:
            return "output"
    return "repartition"


async def _found(transport: Transport, spec: TopicSpec, create: bool) -> str:
    exists = await transport.partitions(spec.name) is not None
    if not spec.partitions or (not exists and not create):
        return "missing"
    try:
        await transport.create_topics([spec])  # of one that exists, this is the check
    except UserError as drift:
        if not exists:
            raise
        return drift.fact
    return "yes" if exists else "created"


def _show(listed: Sequence[Listed]) -> None:
    rows = [
        (
            spec.name,
            kind,
            str(spec.partitions or "?"),
            found,
            ",".join(f"{name}={value}" for name, value in spec.config.items()),
        )
        for kind, spec, found in listed
    ]
    print_columns(("TOPIC", "WHAT", "PARTITIONS", "THERE", "SETTINGS"), rows)
