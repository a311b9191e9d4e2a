"""What a sink is: a view of a table's changelog in an outside system that keeps its own ledger.

A sink never sees an epoch before Kafka has committed it. It moves its ledger in the same atomic step as the rows, by
compare-and-set; who holds another ledger than the one found writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol

import polars as pl

from streamproc.commit.ledger import Ledger

__all__ = ["Emit", "Ledger", "Sink", "SinkRows", "SinkWriter", "TableShape"]

Emit = Literal["on_update", "on_close", "final"]


@dataclass(frozen=True)
class TableShape:
    """What rows look like, everywhere the same: group keys, ``window_start``, ``window_end``, then aggregates."""

    table: str
    keys: dict[str, pl.DataType]
    """Group keys in order. Text, integers, booleans; a null key is a value of its own."""
    columns: dict[str, pl.DataType]
    """Aggregates and derived columns in order."""
    partitions: int

    @property
    def identity(self) -> list[str]:
        """Columns that identify a row."""
        return [*self.keys, "window_start"]

    @property
    def names(self) -> list[str]:
        """All columns of a row in order."""
        return [*self.identity, "window_end", *self.columns]


@dataclass(frozen=True)
class SinkRows:
    """What one epoch (or several) changed. No row is in both frames."""

    upserts: pl.DataFrame
    """keys, window_start, window_end (`pl.Datetime("ms", "UTC")`), aggregates."""
    deletes: pl.DataFrame
    """keys and window_start of rows that are to go."""
    expire_at_ms: int | None = None
    """Redis only: event time at which these rows may leave by themselves; None: never."""


class SinkWriter(Protocol):
    """One sink of one task. Every call is bounded by `SINK_TIMEOUT_S` and raises `SinkUnavailable` when it is down."""

    async def open(self) -> None:
        """Connect, make or check the target. A target that cannot hold the table: `UserError` with the remedy."""

    async def read(self) -> Ledger | None: ...

    async def apply(self, rows: SinkRows | None, *, held: Ledger | None, moved: Ledger) -> None:
        """Write ``rows`` and move the ledger from ``held`` to ``moved``, all or nothing as far as a reader of the ledger
        can tell: rows are absolute, so a part of them seen early is right and is written again. Raises `LedgerMoved`
        without having written anything if the ledger found is not ``held``. ``rows`` None moves the ledger only."""

    async def prune(self, live: Collection[tuple[object, ...]], *, since_ms: int, mine: Callable[[tuple[object, ...]], bool],
                    held: Ledger) -> int:  # fmt: skip
        """Delete this partition's rows (those whose group key ``mine`` accepts) with ``window_start`` >= ``since_ms`` that
        are not in ``live`` (identity tuples: keys, then window_start in ms). Returns how many. Used by a rebuild only."""

    async def forget(self) -> bool:
        """Delete this task's ledger, so that the next claim finds none and rebuilds; rows stay. True if there was one.
        For `streamproc reset` only, while nobody runs the task."""

    async def close(self) -> None: ...


class Sink(Protocol):
    """What the user declares: `redis(url)` or `postgres(url)`; opened once per task."""

    @property
    def name(self) -> str:
        """Names the sink in ledgers, logs and metrics: system and target, never a password."""

    def writer(self, shape: TableShape, app_id: str, partition: int) -> SinkWriter: ...
