"""What a task does with the ledger it finds in a sink: one table of facts and decisions."""

from __future__ import annotations

import pytest

from streamproc.commit.ledger import (
    REBUILDING,
    CatchUp,
    Decision,
    Fenced,
    Ledger,
    Rebuild,
    UpToDate,
    advanced,
    decide_claim,
)
from streamproc.core.errors import InvariantBroken, LogLost
from streamproc.core.types import EpochNumber, Incarnation, Offset


def decide(found: Ledger | None, *, epoch: int = 9, expired: bool = False) -> Decision:
    """The task: log "A", incarnation 5."""
    return decide_claim(found, log_id="A", incarnation=5, epoch=epoch, expired=expired)


DECISIONS = {
    # name: (found, committed epoch, expired, decision, from_epoch, epoch of the claim)
    "an empty sink is rebuilt": (None, 9, False, Rebuild, None, REBUILDING),
    "an empty sink of a new task is rebuilt from nothing": (None, 0, False, Rebuild, None, REBUILDING),
    "the previous owner's ledger at the committed epoch": (Ledger("A", 4, 9, 70), 9, False, UpToDate, None, 9),
    "our own claim, found again after a lost answer": (Ledger("A", 5, 9, 70), 9, False, UpToDate, None, 9),
    "a claim before the first epoch": (Ledger("A", 4, 0, 0), 0, False, UpToDate, None, 0),
    "up to date however old": (Ledger("A", 4, 9, 70), 9, True, UpToDate, None, 9),
    "behind: the changelog is replayed": (Ledger("A", 4, 6, 70), 9, False, CatchUp, 7, 6),
    "our own half-way apply, answered or not": (Ledger("A", 5, 8, 70), 9, False, CatchUp, 9, 8),
    "rolled back to an earlier owner's state": (Ledger("A", 2, 3, 10), 9, False, CatchUp, 4, 3),
    "behind and too old: tombstones may be gone": (Ledger("A", 4, 6, 70), 9, True, Rebuild, None, REBUILDING),
    "a rebuild that did not end": (Ledger("A", 4, REBUILDING, 0), 9, False, Rebuild, None, REBUILDING),
    "another log that never wrote": (Ledger("B", 7, 0, 0), 9, False, Rebuild, None, REBUILDING),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_decides(name: str) -> None:
    found, epoch, expired, kind, from_epoch, claimed = DECISIONS[name]
    decision = decide(found, epoch=epoch, expired=expired)
    assert type(decision) is kind
    assert isinstance(decision, UpToDate | CatchUp | Rebuild)
    assert decision.held == found
    assert (decision.claim.log_id, decision.claim.incarnation, decision.claim.epoch) == ("A", 5, claimed)
    if isinstance(decision, CatchUp):
        assert found is not None
        assert (decision.from_epoch, decision.hint) == (from_epoch, found.hint)
        assert decision.claim.hint == found.hint


def test_a_newer_incarnation_fences_whatever_its_epoch() -> None:
    for epoch in (REBUILDING, 0, 8, 9, 10):
        assert decide(Ledger("A", 6, epoch, 0)) == Fenced(Incarnation(6))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (Ledger("A", 4, 10, 0), "applied epoch 10 .* stands at epoch 9"),
        (Ledger("A", 5, 10, 0), "applied epoch 10"),
        (Ledger("B", 1, 3, 0), "rows of log B"),
        (Ledger("B", 9, 3, 0), "rows of log B"),
        (Ledger("B", 1, REBUILDING, 0), "rows of log B"),
    ],
)
def test_a_sink_ahead_of_the_log_stops_the_worker_loudly(found: Ledger, says: str) -> None:
    with pytest.raises(LogLost, match=says):
        decide(found)


def test_claiming_a_claim_changes_nothing() -> None:
    first = decide(Ledger("A", 4, 6, 70))
    assert isinstance(first, CatchUp)
    second = decide(first.claim)
    assert isinstance(second, CatchUp)
    assert second.held == second.claim == first.claim


def test_an_epoch_is_never_applied_twice_under_one_claim() -> None:
    held = Ledger("A", 5, 8, 70)
    assert advanced(held, EpochNumber(9), Offset(80)) == Ledger("A", 5, 9, 80)
    assert advanced(Ledger("A", 5, REBUILDING, 0), EpochNumber(0), Offset(0)) == Ledger("A", 5, 0, 0)
    for epoch in (8, 7, REBUILDING):
        with pytest.raises(InvariantBroken):
            advanced(held, EpochNumber(epoch), Offset(80))


def test_the_hint_is_not_compared() -> None:
    assert Ledger("A", 5, 8, 70).same(Ledger("A", 5, 8, 99))
    assert not Ledger("A", 5, 8, 70).same(Ledger("A", 5, 7, 70))
    assert not Ledger("A", 5, 8, 70).same(None)
