"""What a task runs between its commits: a pipeline's source side, a table's owner side, or per-record agents.

The task around it owns the log, the store and the sinks; the work owns positions, watermarks and what an epoch leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import polars as pl

from streamproc.commit.record import CommitRecord
from streamproc.core.batch import RawBatch
from streamproc.core.types import Offset, TopicPartition
from streamproc.operators.contract import WatermarkState
from streamproc.operators.source import Counters
from streamproc.sinks.contract import Emit, Sink, TableShape
from streamproc.state.contract import Store, Writes
from streamproc.state.overlay import Changes
from streamproc.transport.contract import OutRecord

__all__ = ["AgentFailed", "EpochOverlay", "SinkUse", "StateTable", "Work"]


class AgentFailed(Exception):
    """An agent failed while a commit waited for it: the task aborts the epoch, it does not start anew."""


class EpochOverlay(Protocol):
    """An epoch's uncommitted writes to one table; `state.overlay.Overlay` and `state.objects.ObjectOverlay` are such."""

    def changes(self) -> Changes: ...

    def writes(self, into: Writes) -> None: ...

    def drop(self) -> None: ...

    @property
    def size_bytes(self) -> int: ...


@dataclass(frozen=True)
class SinkUse:
    """A sink as declared on a table."""

    sink: Sink
    emit: Emit


@dataclass(frozen=True)
class StateTable:
    """One table as a task's group declares it."""

    name: str
    changelog: str
    overlay: Callable[[Store], EpochOverlay]
    fingerprint: Mapping[str, Any]
    """Canonical form of what defines its rows."""
    shape: TableShape | None = None
    """None for internal state (dedupe) and for tables of per-record agents."""
    sinks: tuple[SinkUse, ...] = ()


class Work(ABC):
    """One instance per start of a task. Never used by two coroutines at once, but for what an agent's own code does."""

    failure: BaseException | None = None
    """Set by an agent that failed; the task looks at it whenever it is woken."""
    wants_commit: bool = False
    """A commit is asked for now, not at the next interval."""
    prompt: bool = False
    """What it has taken has waited for a commit already: while the worker is at leisure it is committed at once, so that a
    result waits for one interval and not for two."""

    @property
    def problem(self) -> str | None:
        """What it is stuck at, in words; None while it goes on."""
        return None

    def __init__(self) -> None:
        self.wake: Callable[[], None] = lambda: None
        """Wakes the task's loop; set by the task."""

    @abstractmethod
    def open(self, record: CommitRecord, overlays: Mapping[str, Any]) -> None:
        """Begin at ``record`` with the committed rows under ``overlays`` (table name -> overlay). Called after a restore
        and again after each abort: whatever was uncommitted is forgotten."""

    @abstractmethod
    def resume_at(self) -> dict[TopicPartition, Offset]:
        """Where each source is read from: the least position of the agents that read it. An ended source is absent."""

    @property
    def finished(self) -> bool:
        """Whether the input has ended and nothing more can come of it."""
        return False

    def refused(self, reason: str) -> bool:
        """The broker refused what the epoch wrote; called before the task starts anew. True: the work will find out which
        record is to blame and set it aside."""
        return False

    def ready(self) -> bool:
        """Whether another batch may be given."""
        return True

    @abstractmethod
    def process(self, batch: RawBatch) -> None:
        """Take a batch. A pipeline is done with it on return; agents go on with it."""

    async def barrier(self) -> None:  # noqa: B027
        """Return when nothing that was handed out is unfinished, and hand out nothing until `release`."""

    def release(self) -> None:  # noqa: B027
        """Hand out again."""

    @abstractmethod
    def collect(self, epoch: int) -> None:
        """Between barrier and release: put what the epoch leaves into overlays and `outputs`."""

    @abstractmethod
    def outputs(self) -> Mapping[TopicPartition, Sequence[OutRecord]]:
        """Records of the collected epoch but for changelogs: repartition, side outputs, the agents' sends."""

    @abstractmethod
    def positions(self) -> dict[str, dict[str, int]]: ...

    def watermarks(self) -> dict[str, dict[str, WatermarkState]]:
        return {}

    @abstractmethod
    def committed(self, record: CommitRecord) -> None:
        """The collected epoch is in the log and in the store."""

    @property
    @abstractmethod
    def dirty(self) -> bool:
        """Whether a commit would tell anything new."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Uncommitted state and outputs held in memory."""

    def tick(self, monotonic_ms: int, at_end: Callable[[TopicPartition], bool]) -> None:  # noqa: B027
        """Processing time has gone on: idleness is decided here."""

    def expire(self, sinks_epoch: int) -> None:  # noqa: B027
        """Every sink has applied epochs up to ``sinks_epoch``: rows past retention may leave."""

    def results(self, rows: Iterable[tuple[bytes, bytes]]) -> pl.DataFrame:
        """Rows of the owned table as they are shown and sunk (`WindowTable.results`)."""
        raise NotImplementedError

    @property
    def counters(self) -> Counters:
        return Counters()

    async def close(self) -> None:  # noqa: B027
        """Give up whatever runs; nothing of the open epoch is kept."""
