"""From what the app declares to the groups its tasks belong to, and the internal topics they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamproc.avro.decode import Decoder
from streamproc.avro.registry import Registry
from streamproc.core import limits
from streamproc.core.clock import Clock
from streamproc.core.errors import UserError
from streamproc.operators.pipeline import Declaration, TableHandle
from streamproc.operators.plan import Dedupe, Node, SourcePlan
from streamproc.operators.source import projection
from streamproc.operators.tablerows import TableRows
from streamproc.runtime.agentwork import AgentSpec, AgentWork, RowReader, Trouble
from streamproc.runtime.ownerwork import OwnerWork
from streamproc.runtime.sourcework import SourceWork
from streamproc.runtime.start import Fed, GroupPlan
from streamproc.runtime.work import SinkUse, StateTable, Work
from streamproc.sinks.contract import TableShape
from streamproc.state.fingerprint import ObjectTable, fingerprint_of
from streamproc.state.objects import ObjectOverlay
from streamproc.state.overlay import Overlay, require_distinct_prefixes
from streamproc.transport.contract import TopicSpec

__all__ = [
    "AgentTable",
    "Group",
    "agent_group",
    "internal_topics",
    "pipeline_groups",
    "repartition_topic",
    "with_shared_topics",
]

AGENTS = "agents"
COMPACTED = {
    "cleanup.policy": "compact",
    "delete.retention.ms": str(limits.DELETE_RETENTION_MS),
    "max.message.bytes": str(limits.INTERNAL_MESSAGE_BYTES_MAX),
}
KEPT = {"retention.ms": "-1", "max.message.bytes": str(limits.INTERNAL_MESSAGE_BYTES_MAX)}
"""Trimmed by us (repartition) or by a person (dead letters, late records), never by the age of a record."""


@dataclass(frozen=True)
class Group:
    """A co-partition group and how the work of one of its tasks is made."""

    plan: GroupPlan
    make_work: Callable[[int], Work]
    side_topics: tuple[str, ...] = ()
    """Dead letters and late records; as many partitions as the group."""
    outputs: tuple[str, ...] = ()
    """The user's topics that records go on to; as many partitions as the group."""
    source: SourcePlan | None = None
    table: TableHandle | None = None


@dataclass(frozen=True)
class AgentTable:
    """An `app.Table` as the agents' group sees it."""

    name: str
    default: Callable[[], Any] | None


def changelog_topic(app_id: str, table: str) -> str:
    return f"{app_id}-{table}-changelog"


def repartition_topic(app_id: str, table: str) -> str:
    return f"{app_id}-{table}-repartition"


def pipeline_groups(
    plans: Iterable[SourcePlan],
    declaration: Declaration,
    registry: Registry,
    app_id: str,
    partitions: Mapping[str, int],
) -> list[Group]:
    """Per pipeline a group that reads its topic; per table a group that owns it."""
    require_distinct_prefixes(handle.name for handle in declaration.tables)
    groups: list[Group] = []
    handles = {handle.name: handle for handle in declaration.tables}
    for plan in plans:
        count = partitions[plan.topic]
        owners = [_owner_group(handles[name], app_id, count) for name in _tables(plan.root)]
        groups += [_source_group(plan, registry, app_id, count, owners), *owners]
    return groups


def _source_group(plan: SourcePlan, registry: Registry, app_id: str, count: int, owners: Sequence[Group]) -> Group:
    tables = tuple(
        StateTable(step.name, changelog_topic(app_id, step.name), _overlay(step.name), fingerprint_of(step))
        for step in _dedupes(plan.root)
    )
    late = {table.late_topic for node in plan.root.nodes() for table in node.tables}
    for node in plan.root.nodes():
        if isinstance(node.step, Dedupe):
            late |= set(node.late_topics(plan.late_topic))
    outputs = dict.fromkeys(topic for node in plan.root.nodes() for topic in node.outputs)
    fed = [
        Fed(owner.plan.name, owner.plan.commits_topic, table.name, table.fingerprint)
        for owner in owners
        for table in owner.plan.tables
    ]

    def make_work(partition: int) -> Work:
        decoder = Decoder(plan.schema, registry, projection(plan))
        return SourceWork(plan, decoder, partition, count, lambda table: repartition_topic(app_id, table))

    group = GroupPlan(f"read-{plan.name}", app_id, {plan.topic: count}, {plan.name: (plan.topic,)}, tables,
                      plan.event_time.bounded, fed=tuple(fed))  # fmt: skip
    return Group(group, make_work, (plan.dead_letter_topic, *sorted(late)), tuple(outputs), source=plan)


def _owner_group(handle: TableHandle, app_id: str, count: int) -> Group:
    plan = handle.plan
    topic = repartition_topic(app_id, plan.name)
    keys, columns = TableRows(plan).shape()
    shape = TableShape(plan.name, keys, columns, count)
    sinks = tuple(SinkUse(sink, emit) for sink, emit in handle.sinks)
    table = StateTable(plan.name, changelog_topic(app_id, plan.name), _overlay(plan.name), fingerprint_of(plan), shape,
                       sinks)  # fmt: skip
    group = GroupPlan(f"table-{plan.name}", app_id, {topic: count}, {plan.name: (topic,)}, (table,))
    return Group(group, lambda partition: OwnerWork(plan, topic, partition, count), table=handle)


def agent_group(specs: Sequence[AgentSpec], tables: Sequence[AgentTable], readers: Mapping[str, RowReader], app_id: str,
                partitions: Mapping[str, int], clock: Clock) -> Group:  # fmt: skip
    """All per-record agents share one group: any of them may write any `app.Table`, so their topics are co-partitioned."""
    topics = sorted({topic for spec in specs for topic in spec.topics})
    counts = {topic: partitions[topic] for topic in topics}
    if len(set(counts.values())) > 1:
        raise UserError(
            f"The topics of the agents have different partition counts: {counts}.",
            remedy="Agents share their tables by partition number: give the topics the same count, or use several apps.",
            where=specs[0].where,
        )
    require_distinct_prefixes(table.name for table in tables)
    share = limits.TABLE_KEPT_BYTES_MAX // max(1, len(tables) * max(counts.values(), default=1))
    state = tuple(
        StateTable(
            table.name,
            changelog_topic(app_id, table.name),
            _object_overlay(table, share),
            fingerprint_of(ObjectTable(table.name, next(iter(counts.values())))),
        )
        for table in tables
    )
    dead = {topic: f"{app_id}-{topic}-dead-letters" for topic in topics}
    trouble: dict[int, Trouble] = {}

    def make_work(partition: int) -> Work:
        return AgentWork(specs, readers, dead, clock, trouble.setdefault(partition, Trouble()), partition)

    plan = GroupPlan(AGENTS, app_id, counts, {spec.name: spec.topics for spec in specs}, state)
    return Group(plan, make_work, tuple(dead.values()))


def with_shared_topics(groups: Sequence[Group]) -> list[Group]:
    """``groups``, each knowing which of its topics others read too."""
    readers = Counter(topic for group in groups for topic in group.plan.sources)
    shared = frozenset(topic for topic, count in readers.items() if count > 1)
    return [replace(group, plan=replace(group.plan, shared=shared & group.plan.sources.keys())) for group in groups]


def internal_topics(groups: Iterable[Group]) -> list[TopicSpec]:
    """Everything the groups need beside their sources."""
    specs: dict[str, TopicSpec] = {}
    for group in groups:
        count = group.plan.partitions
        specs[group.plan.commits_topic] = TopicSpec(group.plan.commits_topic, count, COMPACTED)
        for table in group.plan.tables:
            specs[table.changelog] = TopicSpec(table.changelog, count, COMPACTED)
        for topic in group.side_topics:
            ours = topic.startswith(f"{group.plan.app_id}-")
            specs[topic] = TopicSpec(topic, count, KEPT if ours else {})
        for topic in group.outputs:
            specs[topic] = TopicSpec(topic, count)
        if group.table is not None:
            for topic in group.plan.sources:
                specs[topic] = TopicSpec(topic, count, {**KEPT, "cleanup.policy": "delete"})
    return list(specs.values())


def _overlay(name: str) -> Callable[[Any], Any]:
    return lambda store: Overlay(store, name)


def _object_overlay(table: AgentTable, kept_bytes_max: int) -> Callable[[Any], Any]:
    return lambda store: ObjectOverlay(store, table.name, table.default, kept_bytes_max=kept_bytes_max)


def _tables(root: Node) -> list[str]:
    return [table.name for node in root.nodes() for table in node.tables]


def _dedupes(root: Node) -> list[Dedupe]:
    return [node.step for node in root.nodes() if isinstance(node.step, Dedupe)]
