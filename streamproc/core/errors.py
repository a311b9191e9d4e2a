"""What can go wrong, by consequence.

    StreamprocError
    ├── Retryable           the same call may succeed later: back off and repeat
    │   ├── BrokerUnavailable
    │   └── SinkUnavailable
    ├── TaskFailure         drop the epoch's overlay; this task starts again from its fence, others go on
    │   ├── ProducerFenced      somebody else owns the task, or its transaction timed out
    │   ├── UnknownOutcome      EndTxn had no answer: the fence of the next start settles it
    │   ├── ProduceRefused      the broker refused a batch, so nothing of the epoch may commit
    │   ├── BarrierTimeout      an agent holds a record longer than a commit may wait
    │   ├── LedgerMoved         a sink's ledger is not where this task left it
    │   └── RestoreNeeded       the local store does not fit the log
    └── WorkerFailure       nothing this worker can mend: it stops and says what to do
        ├── UserError           a wrong setting, plan, schema or column: fact, place in the user's file, remedy
        │   └── RowRefused          a row that no table can hold; if an agent wrote it, its record is set aside instead
        ├── LogLost             the log is behind what was committed or applied: data was lost outside of us
        ├── FencedInstanceId    another worker has joined the group under this worker's instance id
        └── InvariantBroken     a bug of ours

A message states the fact with its value, then the remedy. `UserError` carries the place in the user's file.
"""

from __future__ import annotations

__all__ = [
    "BarrierTimeout",
    "BrokerUnavailable",
    "FencedInstanceId",
    "InvariantBroken",
    "LedgerMoved",
    "LogLost",
    "ProduceRefused",
    "ProducerFenced",
    "RestoreNeeded",
    "Retryable",
    "RowRefused",
    "SinkUnavailable",
    "StreamprocError",
    "TaskFailure",
    "UnknownOutcome",
    "UserError",
    "WorkerFailure",
    "invariant",
]


class StreamprocError(Exception):
    """Root of everything streamproc raises on purpose."""


class Retryable(StreamprocError):
    """The same call may succeed later; the caller backs off within its named limit."""


class BrokerUnavailable(Retryable):
    """The broker, a leader or a coordinator does not answer, or says to ask again."""


class SinkUnavailable(Retryable):
    """Redis or Postgres does not answer; the task's back-pressure holds until it does."""


class TaskFailure(StreamprocError):
    """This task drops its epoch and starts again from its fence. Other tasks go on."""


class ProducerFenced(TaskFailure):
    """The transactional id has a newer owner, or the transaction timed out."""


class UnknownOutcome(TaskFailure):
    """EndTxn was sent and not answered: committed or not, only the next fence can tell."""


class ProduceRefused(TaskFailure):
    """The broker refused a batch of the epoch (too large, not authorised, …): the epoch must not commit.

    ``topic`` names where; ``too_large`` says that the broker found the records too large for it.
    """

    def __init__(self, message: str, *, topic: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.topic, self.too_large = topic, too_large


class BarrierTimeout(TaskFailure):
    """An agent did not finish its record within `BARRIER_TIMEOUT_S`; the message names its line."""


class LedgerMoved(TaskFailure):
    """A sink's ledger is not what this task holds: a newer owner claimed it, or the sink was rolled back."""


class RestoreNeeded(TaskFailure):
    """The local store is of another history, or ahead of the log: wipe it and restore from the start."""


class WorkerFailure(StreamprocError):
    """The worker stops with this message."""


class UserError(WorkerFailure):
    """Something the user wrote cannot work: ``fact``; ``where`` (file:line, if known); ``remedy``."""

    def __init__(self, fact: str, *, remedy: str, where: str | None = None) -> None:
        super().__init__(f"{where + ': ' if where else ''}{fact} {remedy}")
        self.fact, self.remedy, self.where = fact, remedy, where


class RowRefused(UserError):
    """A table's key or value that cannot be stored. What an agent writes may come from a record, and one record must not
    stop a worker: the agents' task finds it and sets it aside."""


class LogLost(WorkerFailure):
    """The log holds less than what was committed or applied to a sink. Stopping is the only safe act."""


class FencedInstanceId(WorkerFailure):
    """Another worker has joined the group under this one's instance id: of two, the later one stays."""


class InvariantBroken(WorkerFailure):
    """A promise of ours does not hold: a bug, never the user's mistake."""


def invariant(condition: object, message: str) -> None:
    """Stay on in production: raise `InvariantBroken` when ``condition`` is false."""
    if not condition:
        raise InvariantBroken(f"{message} This is a bug in streamproc; please report it with the log.")
