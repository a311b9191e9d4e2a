"""What must hold at every step of a simulated run, whatever fails.

The watch sees every transaction the broker commits, every write of a store and every step of a sink, and keeps the first
promise that was broken with the step and the moment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from streamproc.commit import record as commit_record
from streamproc.commit.ledger import Ledger
from streamproc.commit.record import CommitRecord
from streamproc.core.types import TopicPartition
from streamproc.operators.tablerows import is_row
from streamproc.state.contract import StoreMeta
from streamproc.testing.simulation.loop import Process
from streamproc.transport.contract import OutRecord

__all__ = ["Broken", "Watch"]


class Broken(AssertionError):
    """A promise of `docs/commit.md` or `docs/semantics.md` does not hold."""


class Watch:
    """One for a run; `broken` is what it found, in order."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self.broken: list[str] = []
        self.records: dict[tuple[str, int], CommitRecord] = {}
        """Last commit record by group and partition."""
        self.epochs = 0
        """Transactions committed."""
        self.over = False
        """The run has ended: what is thrown away now may say what it likes."""
        self._owners: dict[tuple[str, int], str] = {}
        """Which process committed a task last."""
        self._incarnations: dict[tuple[str, str, int], int] = {}
        """Of each process and task, that of its last start."""
        self._changed: defaultdict[TopicPartition, dict[bytes, int]] = defaultdict(dict)
        """The epoch of each row's last change."""
        self._sunk: defaultdict[tuple[str, int], dict[str, int]] = defaultdict(dict)
        """The furthest epoch each sink of a task was ever moved to."""
        self._expired: defaultdict[TopicPartition, dict[bytes, int]] = defaultdict(dict)
        """Rows that left by retention, with the epoch they left in."""

    def require(self, condition: object, what: str) -> None:
        if not condition and not self.over:
            self.broken.append(f"at {self._now_s():.3f} s: {what}")

    @property
    def rows_expired(self) -> bool:
        """Whether a row has left a table by retention."""
        return any(self._expired.values())

    def holds_rows(self, table: str, partition: int) -> bool:
        """Whether a pipeline's table has rows that have not left it."""
        return any(
            _owner_of(tp) == (f"table-{table}", partition)
            and any(is_row(key) for key in keys.keys() - self._expired[tp].keys())
            for tp, keys in list(self._changed.items())
        )

    def is_behind(self, sink: str, ledgers: Mapping[tuple[str, str, int], Ledger]) -> bool:
        """Whether ``sink`` stands further back than it once did: somebody has rolled it back."""
        at = {(f"table-{table}", partition): ledger.epoch for (_, table, partition), ledger in ledgers.items()}
        return any(at.get(task, -1) < sinks.get(sink, -1) for task, sinks in self._sunk.items())

    def require_alive(self, process: Process, what: str) -> None:
        self.require(not process.dead, f"dead worker {process.name} called {what}")

    # ---- the log

    def committed(self, process: Process, records: Sequence[tuple[TopicPartition, OutRecord]]) -> None:
        """A transaction has become true."""
        self.epochs += 1
        commits = [(tp, record) for tp, record in records if tp.topic.endswith("-commits")]
        self.require(len(commits) == 1, f"{process.name} committed a transaction with {len(commits)} commit records")
        for tp, record in commits:
            assert record.value is not None
            assert record.key is not None
            self._follow(process, (record.key.decode(), tp.partition), commit_record.decode(record.value, str(tp)))
        for tp, record in records:
            if tp.topic.endswith("-changelog"):
                self._row(tp, record)

    def _follow(self, process: Process, task: tuple[str, int], now: CommitRecord) -> None:
        before, self.records[task] = self.records.get(task), now
        owner, self._owners[task] = self._owners.get(task), process.name
        self._incarnations[process.name, *task] = now.incarnation
        where = f"{task[0]}:{task[1]}"
        self.require(owner in (None, process.name) or before is None or now.incarnation == before.incarnation + 1,
                     f"{where} was committed by {process.name} under the incarnation of {owner}")  # fmt: skip
        if before is None:
            self.require(now.epoch == 1, f"{where} begins with epoch {now.epoch}")
            return
        self.require(now.log_id == before.log_id, f"{where} has begun another history")
        self.require(now.epoch == before.epoch + 1, f"{where} went from epoch {before.epoch} to {now.epoch}")
        self.require(now.incarnation in (before.incarnation, before.incarnation + 1),
                     f"{where} went from incarnation {before.incarnation} to {now.incarnation}")  # fmt: skip
        for agent, at in before.positions.items():
            for name, position in at.items():
                after = now.positions.get(agent, {}).get(name, -1)
                self.require(after >= position, f"{where}: {agent} went back in {name} from {position} to {after}")
        for agent, clocks in before.watermarks.items():
            for name, clock in clocks.items():
                after_ms = now.watermarks.get(agent, {}).get(name, clock).watermark
                self.require(after_ms >= clock.watermark, f"{where}: the watermark of {agent} for {name} went back")

    def _row(self, tp: TopicPartition, record: OutRecord) -> None:
        epoch = int.from_bytes(dict(record.headers).get("e") or b"", "big")
        expired = self._expired[tp]
        assert record.key is not None
        if record.value is None and dict(record.headers).get("x") == b"expire":
            expired[record.key] = epoch
            changed = self._changed[tp].get(record.key, 0)
            behind = {sink: at for sink, at in self._sunk[_owner_of(tp)].items() if at < changed}
            self.require(not behind, f"{tp}: a row of epoch {changed} left before its sinks had it: {behind}")
        elif record.value is not None:
            self.require(record.key not in expired, f"{tp}: a purged row was made again in epoch {epoch}")
            self._changed[tp][record.key] = epoch

    # ---- stores and sinks

    def stored(self, process: Process, task: tuple[str, int], meta: StoreMeta) -> None:
        """A store is about to take a batch of writes."""
        self.require_alive(process, "a store's write")
        record = self.records.get(task)
        # Epoch 0 is a start that has not committed: one that stood still is of a history that never began.
        fits = meta.epoch == 0 or (record is not None and record.log_id == meta.log_id and meta.epoch <= record.epoch)
        self.require(fits,
                     f"the store of {task} took epoch {meta.epoch}, which the log has not committed")  # fmt: skip

    def sunk(self, process: Process, sink: str, task: tuple[str, int], found: Ledger | None, held: Ledger | None,
             moved: Ledger) -> None:  # fmt: skip
        """A sink is about to be moved from the ledger ``found`` in it, if that is the one its writer holds."""
        self.require_alive(process, "a sink")
        record = self.records.get(task)
        where = f"the sink {sink} of {task[0]}:{task[1]}"
        self.require(record is not None and record.log_id == moved.log_id and moved.epoch <= record.epoch,
                     f"{where} took epoch {moved.epoch}, which the log has not committed")  # fmt: skip
        own = self._incarnations.get((process.name, *task))
        self.require(moved.incarnation == own, f"{where} was written under incarnation {moved.incarnation}, not {own}")
        if found is not None and found.same(held):
            self.require(moved.incarnation >= found.incarnation, f"{where} was taken back by an older incarnation")
        if found is not None and moved.incarnation >= found.incarnation:
            self._sunk[task][sink] = max(moved.epoch, self._sunk[task].get(sink, 0))


def _owner_of(changelog: TopicPartition) -> tuple[str, int]:
    """The task that owns a pipeline's table: its group is named after it, its changelog ``{app}-{table}-changelog``."""
    table = changelog.topic.removesuffix("-changelog").partition("-")[2]
    return f"table-{table}", changelog.partition
