"""Faust's sticky assignor with spread standbys: a lost worker's tasks are warm where they go, whoever is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from faust.assignor.client_assignment import CopartitionedAssignment
from faust.assignor.copartitioned_assignor import CopartitionedAssignor
from hypothesis import given
from hypothesis import strategies as st

from streamproc.runtime.assignor import spread

Placement = dict[str, CopartitionedAssignment]


def assigned(members: Sequence[str], partitions: int, replicas: int, before: Placement | None = None) -> Placement:
    """What the leader of the group gives out; ``before``: what the members say that they had."""
    known = before or {}
    held = {
        member: CopartitionedAssignment(set(known[member].actives), set(known[member].standbys), {"in"})
        if member in known
        else CopartitionedAssignment(topics={"in"})
        for member in members
    }
    given_out = dict(CopartitionedAssignor({"in"}, held, partitions, replicas).get_assignment())
    spread({m: a.actives for m, a in given_out.items()}, {m: a.standbys for m, a in given_out.items()})
    return given_out


def owner_of(placement: Placement) -> dict[int, str]:
    return {partition: member for member, given in placement.items() for partition in given.actives}


@pytest.mark.parametrize(("workers", "partitions"), [(2, 4), (2, 12), (3, 6), (3, 12), (4, 12), (5, 20), (3, 4)])
def test_whoever_is_lost_its_tasks_go_to_their_standbys(workers: int, partitions: int) -> None:
    members = [f"worker-{number}" for number in range(workers)]
    before = assigned(members, partitions, 1)
    for lost in members:
        left = [member for member in members if member != lost]
        after = assigned(left, partitions, 1, before)
        owner = owner_of(after)
        assert sorted(owner) == list(range(partitions))
        for partition in before[lost].actives:
            assert partition in before[owner[partition]].standbys, f"{partition} of {lost} went where it is not warm"
        for member in left:
            assert before[member].actives <= after[member].actives, "nobody else's tasks have moved"


def test_a_settled_group_stays_as_it_is() -> None:
    members = [f"worker-{number}" for number in range(4)]
    before = assigned(members, 12, 1)
    after = assigned(members, 12, 1, before)
    assert {m: (a.actives, a.standbys) for m, a in after.items()} == {
        m: (a.actives, a.standbys) for m, a in before.items()
    }


@given(st.data())
def test_every_task_has_its_standbys_elsewhere_and_nobody_would_have_to_take_more_than_its_share(
    data: st.DataObject,
) -> None:
    members = [f"worker-{number}" for number in range(data.draw(st.integers(1, 6)))]
    partitions, replicas = data.draw(st.integers(1, 24)), data.draw(st.integers(0, 2))
    placement = assigned(members, partitions, replicas)
    for _ in range(data.draw(st.integers(0, 3))):  # members come and go
        members = data.draw(st.lists(st.sampled_from([f"worker-{n}" for n in range(6)]), min_size=1, unique=True))
        placement = assigned(members, partitions, replicas, placement)
    assert sorted(owner_of(placement)) == list(range(partitions))
    copies = [p for given_out in placement.values() for p in given_out.standbys]
    assert sorted(copies) == sorted(list(range(partitions)) * min(replicas, len(members) - 1))
    for owner, given_out in placement.items():
        assert not given_out.actives & given_out.standbys
        if replicas == 1:
            extra = {m: len(placement[m].standbys & given_out.actives) for m in members if m != owner}
            load = {m: len(placement[m].actives) + count for m, count in extra.items()}
            heaviest = max((load[m] for m in extra if extra[m]), default=0)
            assert heaviest - min(load.values(), default=heaviest) <= 1
