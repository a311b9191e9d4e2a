"""What a task does with the ledger it finds in a sink: facts in, a decision out, no I/O.

    read ──▶ decide_claim ──▶ Fenced      a newer owner is there: close the task
                         ├──▶ LogLost     (raised) the log is behind the sink: stop the worker
                         ├──▶ UpToDate    claim
                         ├──▶ CatchUp     claim, then replay the changelog's later epochs
                         └──▶ Rebuild     claim as unfinished, upsert live rows, prune, then move to the committed epoch

The same path is taken at the start of a task and when an `apply` raised `LedgerMoved`: read again, decide again. That
covers a lost answer too: the ledger is then where the unanswered call moved it, and the decision goes on from there.

Epochs are compared, offsets never: the feed from memory and the feed from the log cannot agree on one (markers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec

from streamproc.core.errors import LogLost, invariant
from streamproc.core.types import EpochNumber, Incarnation, Offset

__all__ = ["REBUILDING", "CatchUp", "Decision", "Fenced", "Ledger", "Rebuild", "UpToDate", "advanced", "decide_claim"]

REBUILDING: Final = EpochNumber(-1)
"""Epoch of a ledger whose rebuild has begun and not ended: whoever finds it begins the rebuild again."""


class Ledger(msgspec.Struct, frozen=True):
    """How far a sink is with one task."""

    log_id: str
    incarnation: int
    epoch: int
    """The last epoch applied; 0: none; `REBUILDING`: unknown."""
    hint: int
    """Changelog position from which a replay of later epochs may start. A hint only: never compared."""

    def same(self, other: Ledger | None) -> bool:
        """Equal in what is compared: everything but the hint."""
        return other is not None and (self.log_id, self.incarnation, self.epoch) == (
            other.log_id,
            other.incarnation,
            other.epoch,
        )


@dataclass(frozen=True)
class UpToDate:
    """The sink holds every committed epoch."""

    held: Ledger
    """The ledger as found: what the claim compares with."""
    claim: Ledger
    """What the claim moves it to, before anything else is written; equal to ``held`` if it is already ours."""


@dataclass(frozen=True)
class CatchUp:
    """The sink lacks the epochs from ``from_epoch`` on; the changelog still has all of them, tombstones included."""

    held: Ledger
    claim: Ledger
    from_epoch: EpochNumber
    """The first epoch to apply; rows of earlier ones are skipped."""
    hint: Offset
    """Where a reader of the changelog may start."""


@dataclass(frozen=True)
class Rebuild:
    """Nothing in the sink can be continued: upsert all live rows, prune the others, then move to the committed
    epoch."""

    held: Ledger | None
    claim: Ledger
    """Its epoch is `REBUILDING`, so that a rebuild that dies half-way is begun again."""
    reason: str


@dataclass(frozen=True)
class Fenced:
    """A newer incarnation has claimed the ledger. This task writes nothing more and closes."""

    incarnation: Incarnation


Decision: TypeAlias = UpToDate | CatchUp | Rebuild | Fenced


def decide_claim(found: Ledger | None, *, log_id: str, incarnation: int, epoch: int, expired: bool) -> Decision:
    """What to do with the ledger ``found`` in a sink.

    ``log_id`` and ``epoch`` (the last one committed, 0: none) are the commit record's, ``incarnation`` is this start's.
    ``expired``: what lies between the ledger and the log's end may lack tombstones, because it is older than
    `limits.DELETE_RETENTION_MS`. It matters only if there is something to replay. Raises `LogLost` when the sink has
    seen epochs that the log does not have. Nothing is claimed yet: the caller applies no rows with ``held`` and
    ``claim`` first, and decides again if that raises `LedgerMoved`.
    """
    unfinished = Ledger(log_id, incarnation, REBUILDING, 0)
    if found is None:
        return Rebuild(None, unfinished, "the sink has no ledger of this task")
    if found.log_id != log_id:
        return _other_log(found, unfinished)
    if found.incarnation > incarnation:
        return Fenced(Incarnation(found.incarnation))
    if found.epoch > epoch:
        raise LogLost(
            f"The sink has applied epoch {found.epoch} of this task, but its commit record stands at epoch {epoch}: "
            "the log has lost committed epochs. Restore it, or start anew with `streamproc reset MODULE`."
        )
    if found.epoch == REBUILDING:
        return Rebuild(found, unfinished, "the last rebuild of the sink did not end")
    claim = Ledger(log_id, incarnation, found.epoch, found.hint)
    if found.epoch == epoch:
        return UpToDate(found, claim)
    if expired:
        return Rebuild(
            found, unfinished, f"the sink stands at epoch {found.epoch}, behind what the changelog still proves"
        )
    return CatchUp(found, claim, EpochNumber(found.epoch + 1), Offset(found.hint))


def advanced(held: Ledger, epoch: int, hint: int) -> Ledger:
    """The ledger after ``epoch``. A feed never goes back, nor applies an epoch twice under one claim."""
    invariant(
        epoch > held.epoch and epoch >= 0,
        f"A sink's feed went from epoch {held.epoch} to {epoch}, which is not forward.",
    )
    return Ledger(held.log_id, held.incarnation, epoch, hint)


def _other_log(found: Ledger, unfinished: Ledger) -> Rebuild:
    """Another history. Only a ledger under which no row was ever written may be taken over."""
    if found.epoch == 0:
        return Rebuild(found, unfinished, "the sink was claimed, and never written, by another history of this task")
    raise LogLost(
        f"The sink holds rows of log {found.log_id} (epoch {found.epoch}), but this task's log is {unfinished.log_id}: "
        "the log was lost or made anew, or another application writes to this target. Point the sink at an empty target, "
        "or start anew with `streamproc reset MODULE`."
    )
