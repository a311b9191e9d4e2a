"""Topics of the embedded log: their settings, drift checks, and where each partition stands."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from streamproc.core.errors import UserError
from streamproc.core.types import TopicPartition
from streamproc.transport.contract import TopicSpec
from streamproc.transport.embedded.file import LogFile

__all__ = ["Partition", "Topics"]

DEFAULTS: Final = {
    "cleanup.policy": "delete",
    "delete.retention.ms": "86400000",
    "max.message.bytes": "1048588",
    "retention.bytes": "-1",
    "retention.ms": "604800000",
}
"""Kafka's own, of the settings that this log or a drift check looks at."""
_NAME: Final = re.compile(r"(?!\.{1,2}$)[a-zA-Z0-9._-]{1,249}")


@dataclass(eq=False)
class Partition:
    """One partition; ``next`` counts offsets taken by open transactions, which the file learns of at the next write."""

    id: int
    tp: TopicPartition
    begin: int
    next: int
    cleaned: int
    """Below it the partition was compacted before."""
    config: Mapping[str, str]
    open: dict[int, int] = field(default_factory=dict)
    """First offset of each producer id's open transaction."""

    @property
    def stable(self) -> int:
        """The last stable offset: nothing from here on is shown."""
        return min(self.open.values(), default=self.next)

    @property
    def compacted(self) -> bool:
        return "compact" in self.setting("cleanup.policy")

    @property
    def message_bytes_max(self) -> int:
        return int(self.setting("max.message.bytes"))

    def setting(self, name: str) -> str:
        return self.config.get(name, DEFAULTS[name])


class Topics:
    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._configs: dict[str, dict[str, str]] = {}
        self._partitions: dict[TopicPartition, Partition] = {}
        self._counts: dict[str, int] = {}

    def load(self) -> None:
        topics = list(self._file.read("SELECT name, partitions, config FROM topics"))
        self._configs = {name: json.loads(config) for name, _, config in topics}
        self._counts = {name: partitions for name, partitions, _ in topics}
        rows = self._file.read("SELECT id, topic, partition, begin, next, cleaned FROM partitions")
        self._partitions = {}
        for at, topic, number, begin, following, cleaned in rows:
            tp = TopicPartition(topic, number)
            self._partitions[tp] = Partition(at, tp, begin, following, cleaned, self._configs[topic])

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def count(self, topic: str) -> int | None:
        return self._counts.get(topic)

    def find(self, tp: TopicPartition) -> Partition | None:
        return self._partitions.get(tp)

    def partition(self, tp: TopicPartition) -> Partition:
        """Raises `UserError` if there is no such partition."""
        found = self._partitions.get(tp)
        if found is None:
            raise UserError(
                f"The embedded log {self._file.path} has no {tp.topic}[{tp.partition}].",
                remedy="Declare the topic in the app, or make it with `streamproc topics MODULE --create`.",
            )
        return found

    def partitions(self, topic: str) -> list[Partition]:
        return [self.partition(TopicPartition(topic, number)) for number in range(self._counts.get(topic, 0))]

    def require(self, topics: Collection[str]) -> None:
        if missing := sorted(set(topics) - set(self._counts)):
            raise UserError(
                f"The embedded log {self._file.path} has no topic {', '.join(map(repr, missing))}.",
                remedy="Declare the topic in the app, or make it with `streamproc topics MODULE --create`.",
            )

    def create(self, specs: Sequence[TopicSpec]) -> None:
        """Make the missing ones, all or none; check the others for drift."""
        missing: list[TopicSpec] = []
        for spec in specs:
            _check_spec(spec)
            if spec.name in self._counts:
                self._check_drift(spec)
            elif spec not in missing:
                missing.append(spec)
        _check_once(missing)
        if not missing:
            return
        with self._file.write() as db:
            for spec in missing:
                row = (spec.name, spec.partitions, json.dumps(dict(spec.config)))
                db.execute("INSERT INTO topics VALUES (?, ?, ?)", row)
                numbers = [(spec.name, number) for number in range(spec.partitions)]
                db.executemany("INSERT INTO partitions VALUES (NULL, ?, ?, 0, 0, 0)", numbers)
        # Open transactions live in the partitions in memory, so these are added to and never read again.
        rows = self._file.read("SELECT id, topic, partition FROM partitions")
        for spec in missing:
            self._configs[spec.name], self._counts[spec.name] = dict(spec.config), spec.partitions
        for at, topic, number in rows:
            tp = TopicPartition(topic, number)
            if tp not in self._partitions:
                self._partitions[tp] = Partition(at, tp, 0, 0, 0, self._configs[topic])

    def delete(self, topics: Collection[str]) -> None:
        """Remove them with their records and the groups' offsets, all or none."""
        doomed = [topic for topic in topics if topic in self._counts]
        for topic in doomed:
            if any(partition.open for partition in self.partitions(topic)):
                raise UserError(f"Topic {topic!r} is being written.", remedy="Stop the application that writes it.")
        with self._file.write() as db:
            for topic in doomed:
                ids = [(partition.id,) for partition in self.partitions(topic)]
                db.executemany("DELETE FROM batches WHERE partition_id = ?", ids)
                for table, column in (("partitions", "topic"), ("group_offsets", "topic"), ("topics", "name")):
                    db.execute(f"DELETE FROM {table} WHERE {column} = ?", (topic,))
        for topic in doomed:
            for number in range(self._counts.pop(topic)):
                del self._partitions[TopicPartition(topic, number)]
            del self._configs[topic]

    def _check_drift(self, spec: TopicSpec) -> None:
        has = self._counts[spec.name]
        if has != spec.partitions:
            raise UserError(
                f"Topic {spec.name!r} has {has} partitions, the app wants {spec.partitions}.",
                remedy=f"Declare it with partitions={has}, or give the app a new topic name.",
            )
        for name, wanted in spec.config.items():
            found = self._configs[spec.name].get(name, DEFAULTS.get(name, "not set"))
            if found != wanted:
                raise UserError(
                    f"Topic {spec.name!r} has {name}={found}, the app wants {wanted}.",
                    remedy="Declare it as it is, or give the app a new topic name.",
                )


def _check_once(specs: Sequence[TopicSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise UserError(
                f"Topic {spec.name!r} is declared twice, with different partitions or settings.",
                remedy="Declare it once.",
            )
        seen.add(spec.name)


def _check_spec(spec: TopicSpec) -> None:
    if not _NAME.fullmatch(spec.name):
        raise UserError(
            f"{spec.name!r} is no topic name.",
            remedy="Use 1 to 249 letters, digits, '.', '_' and '-', as Kafka does.",
        )
    if spec.partitions < 1:
        raise UserError(f"Topic {spec.name!r} cannot have {spec.partitions} partitions.", remedy="Give it one or more.")
    for name in ("max.message.bytes", "delete.retention.ms"):
        if not spec.config.get(name, "0").isdecimal():
            raise UserError(
                f"Topic {spec.name!r}: {name}={spec.config[name]!r} is no number.", remedy="Give a whole number."
            )
