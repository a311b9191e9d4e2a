"""Who gets which partitions: Faust's copartitioned, sticky assignor. It gives a lost task to one of its standbys, as far as
that worker has room; here the standbys are placed so that it has.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from typing import Any

from faust.assignor.client_assignment import ClientMetadata
from faust.assignor.partition_assignor import PartitionAssignor

__all__ = ["Assignor", "spread"]

logger = logging.getLogger(__name__)


class Assignor(PartitionAssignor):
    """Faust's, with spread standbys, for static members that may come back under another address."""

    def _global_table_standby_assignments(self, assignments: Any, partitions_by_topic: Any) -> Any:
        """The last step in which the group's leader may change an assignment before it is sent."""
        for topics in _placed_alike(assignments):
            members = [member for member, given in assignments.items() if topics[0] in given.actives]
            actives = {member: set(assignments[member].actives[topics[0]]) for member in members}
            standbys = {member: set(assignments[member].standbys[topics[0]]) for member in members}
            spread(actives, standbys)
            for member in members:
                assignments[member].standbys.update((topic, sorted(standbys[member])) for topic in topics)
        return super()._global_table_standby_assignments(assignments, partitions_by_topic)

    def topics_of(self, assignment: Any) -> Set[str]:
        """Topics that the leader shared with this member when it made ``assignment``, whether or not any of it fell to it."""
        return frozenset(ClientMetadata.loads(self._decompress(assignment.user_data)).assignment.actives)

    def on_assignment(self, assignment: Any) -> None:
        """A static member gets its last assignment again, made for the address that it had. Faust asserts that they agree;
        other workers ask at the old address until the next rebalance."""
        told = ClientMetadata.loads(self._decompress(assignment.user_data))
        before, now = told.url, str(self._url)
        if before != now:
            logger.warning(
                "this worker was %s before and is %s now; others learn it at the next rebalance", before, now
            )
            for distribution in (told.changelog_distribution, told.external_topic_distribution):
                if before in distribution:
                    distribution[now] = distribution.pop(before)
            told.url = now
            assignment = type(assignment)(assignment.version, assignment.assignment, self._compress(told.dumps()))
        super().on_assignment(assignment)


def spread(actives: Mapping[str, Set[int]], standbys: Mapping[str, set[int]]) -> None:
    """Move standbys, in place, until no member that is lost would leave one of the others with more to do than its share:
    Faust would hand the rest to members that have nothing of it.

    By member; pure but for that, and the same for the same placement, so that a settled group stays as it is.
    """
    for owner in sorted(actives):
        others = sorted(member for member in actives if member != owner)
        copies = {member: standbys[member] & actives[owner] for member in others}
        while len(others) > 1:
            load = {member: len(actives[member]) + len(copies[member]) for member in others}
            most = max((member for member in others if copies[member]), key=lambda m: load[m], default=others[0])
            least = min(others, key=lambda m: (load[m], len(standbys[m])))
            movable = copies[most] - standbys[least]
            if load[most] - load[least] < 2 or not movable:
                break
            partition = min(movable)
            for of in (copies, standbys):
                of[most].discard(partition)
                of[least].add(partition)


def _placed_alike(assignments: Any) -> list[list[str]]:
    """Topics by the partitions that each member has of them: co-partitioned ones are together."""
    found: dict[Any, list[str]] = {}
    for topic in sorted({topic for given in assignments.values() for topic in given.actives}):
        placement = tuple(
            (member, tuple(sorted(given.actives[topic])), tuple(sorted(given.standbys[topic])))
            for member, given in sorted(assignments.items())
            if topic in given.actives
        )
        found.setdefault(placement, []).append(topic)
    return list(found.values())
