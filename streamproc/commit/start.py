"""What a starting task may do with what it found. Facts in, decision out; no I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from streamproc.commit.record import CommitRecord, tp_name, tp_of
from streamproc.core.errors import LogLost, UserError, invariant
from streamproc.core.types import NO_WATERMARK, Offset, TaskId, TopicPartition

__all__ = ["Declared", "Found", "first_record", "least_positions", "next_record", "require_fit", "topology_hash"]


@dataclass(frozen=True)
class Declared:
    """What the application says of a task today."""

    task: TaskId
    app_id: str
    sources: Mapping[str, int]
    """Source topic -> partitions."""
    tables: Mapping[str, dict[str, object]]
    """Table -> canonical form of its plan."""
    changelogs: tuple[str, ...]
    agents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Agent (pipeline, table) -> the topics it reads."""


@dataclass(frozen=True)
class Found:
    """What the log holds, read after the fence."""

    record: CommitRecord | None
    changelog_records: Mapping[str, int]
    """Changelog topic -> how many committed records its partition holds; asked for only where there is no record."""


def topology_hash(declared: Declared) -> str:
    """Changes when the group's topics, partition counts or table names do."""
    facts = [declared.task.group, sorted(declared.sources.items()), sorted(declared.tables)]
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=12).hexdigest()


def require_fit(found: Found, declared: Declared) -> None:
    """Refuse to go on with a log that does not belong to this code. Raises `UserError` or `LogLost`."""
    reset = "streamproc reset MODULE"
    record = found.record
    if record is None:
        held = [name for name, count in found.changelog_records.items() if count]
        if held:
            raise LogLost(
                f"Task {declared.task} has no commit record, but its changelog {held[0]} holds records: what they belong "
                f"to is not known. Bring the commits topic back, or start anew with `{reset}`."
            )
        return
    for topic, count in record.sources.items():
        now = declared.sources.get(topic)
        if now is not None and now != count:
            raise UserError(
                f"Topic {topic} had {count} partitions when the application first started and has {now} now.",
                remedy=f"Keys have moved, so the state no longer fits: start under a new id, or `{reset}`.",
            )
    if record.topology != topology_hash(declared):
        raise UserError(
            f"Task {declared.task} was committed by another topology (topics then: {sorted(record.sources)}, tables "
            f"then: {sorted(record.fingerprints)}; now: {sorted(declared.sources)}, {sorted(declared.tables)}).",
            remedy=f"Deploy the code that fits, start under a new id, or `{reset}`.",
        )
    _require_positions(record, declared, reset)


def _require_positions(record: CommitRecord, declared: Declared, reset: str) -> None:
    """An agent without a position in a topic would not read it, or read it anew: neither is what its author meant."""
    for agent, topics in declared.agents.items():
        for topic in topics:
            if tp_name(TopicPartition(topic, declared.task.partition)) not in record.positions.get(agent, {}):
                then = ", ".join(f"{name} of {sorted(at)}" for name, at in record.positions.items())
                raise UserError(
                    f"Agent {agent} has no position in {topic}: task {declared.task} was committed by other code (agents "
                    f"then: {then}).",
                    remedy="Give it the name and topics it had, `@app.agent(topic, name=…)`, start under a new id, or "
                    f"`{reset}`.",
                )


def least_positions(positions: Mapping[str, Mapping[str, int]]) -> dict[TopicPartition, Offset]:
    """Per source partition the least of its agents' positions: what the group's offsets are."""
    least: dict[TopicPartition, Offset] = {}
    for of in positions.values():
        for name, position in of.items():
            tp = tp_of(name)
            least[tp] = Offset(min(position, least.get(tp, Offset(position))))
    return least


def first_record(declared: Declared, *, log_id: str, positions: Mapping[str, Mapping[TopicPartition, int]],
                 ends: Mapping[TopicPartition, int]) -> CommitRecord:  # fmt: skip
    """The record of a task that never committed: epoch 0, incarnation 0; it is not written as it is."""
    return CommitRecord(
        log_id=log_id,
        incarnation=0,
        epoch=0,
        positions={agent: {tp_name(tp): at for tp, at in of.items()} for agent, of in positions.items()},
        watermarks={},
        sources=dict(declared.sources),
        ends={tp_name(tp): at for tp, at in ends.items()},
        timers_ms=NO_WATERMARK,
        changelogs=dict.fromkeys(declared.changelogs, 0),
        topology=topology_hash(declared),
        fingerprints={name: dict(form) for name, form in declared.tables.items()},
    )


def next_record(last: CommitRecord, **changes: object) -> CommitRecord:
    """The record of the next epoch: ``last`` but for ``changes``. Neither a position nor a watermark ever goes back."""
    record: CommitRecord = msgspec.structs.replace(last, epoch=last.epoch + 1, **changes)
    for agent, at in last.positions.items():
        for name, position in at.items():
            now = record.positions.get(agent, {}).get(name)
            invariant(now is None or now >= position,
                      f"Position of {agent} in {tp_of(name)} would go back from {position} to {now}.")  # fmt: skip
    for agent, clocks in last.watermarks.items():
        for name, clock in clocks.items():
            after = record.watermarks.get(agent, {}).get(name)
            invariant(after is None or after.watermark >= clock.watermark,
                      f"The watermark of {agent} for {name} would go back from {clock.watermark}.")  # fmt: skip
    return record
