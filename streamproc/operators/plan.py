"""What a user declared, as data: checked once, then compiled into the programs that tasks run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import polars as pl

from streamproc.eventtime.spec import EventTime, Tumbling

__all__ = ["Agg", "AggKind", "Dedupe", "Expect", "Filter", "Node", "SourcePlan", "Step", "TablePlan", "WithColumns"]

AggKind: TypeAlias = Literal["count", "sum", "min", "max", "mean", "count_distinct"]


@dataclass(frozen=True)
class Agg:
    """One aggregate of a table. ``column`` None only for `count()`, which counts rows; else nulls are skipped as in SQL."""

    kind: AggKind
    column: str | None = None


@dataclass(frozen=True)
class Expect:
    """Named rules; a record for which one is false or NaN becomes a dead letter with that name. Null passes."""

    rules: dict[str, pl.Expr]
    where: str


@dataclass(frozen=True)
class Dedupe:
    """The first record of a key passes; ``nulls`` says what a null in the key does: dead letter, or pass unchecked."""

    name: str
    columns: tuple[str, ...]
    within_ms: int
    nulls: Literal["dead_letter", "pass"]
    where: str


@dataclass(frozen=True)
class Filter:
    predicate: pl.Expr
    where: str


@dataclass(frozen=True)
class WithColumns:
    columns: dict[str, pl.Expr]
    where: str


Step: TypeAlias = Expect | Dedupe | Filter | WithColumns


@dataclass(frozen=True)
class TablePlan:
    """A windowed aggregation: what is shipped, merged, kept, closed and shown."""

    name: str
    keys: dict[str, pl.DataType]
    """Group keys in order with their types: text, integers, booleans, dates and times. Null is a key like any other."""
    window: Tumbling
    allowed_lateness_ms: int
    retain_ms: int
    """How long a final window stays queryable before it leaves the store."""
    aggs: dict[str, Agg]
    inputs: dict[str, pl.DataType]
    """Types of the columns that the aggregates read."""
    post: tuple[Filter | WithColumns, ...]
    """HAVING-like filters and derived columns over keys, window bounds and aggregates, at reading and sinking time."""
    partitions: int
    """Of the repartition topic and the changelog."""
    late_topic: str
    where: str


@dataclass
class Node:
    """A step and what follows it: a pipeline that forks runs its shared steps once."""

    step: Step | None
    children: list[Node] = field(default_factory=list)
    tables: list[TablePlan] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    """Topics that records go on to from here, as they came."""

    def nodes(self) -> Iterator[Node]:
        """This one and all behind it."""
        yield self
        for child in self.children:
            yield from child.nodes()

    def late_topics(self, own: str) -> list[str]:
        """Where late records of this node and all behind it go, each topic once: ``own`` is the pipeline's, for records that
        are too old for a dedupe step on their way to an output."""
        found: dict[str, None] = {}
        for node in self.nodes():
            found.update((table.late_topic, None) for table in node.tables)
            if node.outputs:
                found[own] = None
        return list(found)


@dataclass(frozen=True)
class SourcePlan:
    """Everything that reads one topic through one `app.pipeline(topic)`. It is one *agent* in the commit record."""

    name: str
    topic: str
    schema: Any
    """The reader's Avro schema, parsed (`streamproc.avro`)."""
    event_time: EventTime
    root: Node
    dead_letter_topic: str
    late_topic: str
    where: str
    columns: Mapping[str, pl.DataType] = field(default_factory=dict)
    """Types of the topic's columns, by the reader's schema."""
