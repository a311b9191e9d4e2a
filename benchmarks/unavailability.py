"""python -m benchmarks unavailability --transport kafka

How long a task stands still when its worker goes: from the last commit of the old owner to the first commit of the new one
that holds records. Two workers share a table on a Kafka that the benchmark starts; one is ended in different ways, with and
without a standby and under a static membership. At the end every row must be right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import uuid4

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.parts import Log, started_log, temporary_folder
from benchmarks.reports import machine
from benchmarks.unavailability_job import PARTITIONS, STATUS, TABLE, Settings, Status
from streamproc.commit import record as commit_record
from streamproc.commit.record import CommitRecord
from streamproc.core.clock import Clock, SystemClock
from streamproc.core.errors import StreamprocError, UserError
from streamproc.core.types import Offset, TopicPartition
from streamproc.state import changelog
from streamproc.state.packing import unpack_key, unpack_value
from streamproc.transport.contract import OutRecord, TopicSpec, Transport

__all__ = ["CASES", "Case", "gap_s", "main"]

RECORDS: Final = 2_000_000
SEND_RECORDS: Final = 20_000
TRICKLE_S: Final = 0.02
"""Between two records of a partition while a worker is away: there is always something to commit."""
STEADY_S: Final = 3.0
"""Of commits as usual before the worker is ended."""
STATIC_SESSION_S: Final = 30.0
"""Longer than a restart takes."""
WAIT_S_MAX: Final = 600.0
LOOK_S: Final = 0.05
WIDTH: Final = 110
VICTIM: Final = 0
"""The partition whose owner is ended and whose commits are looked at."""
_ROOT: Final = Path(__file__).resolve().parent.parent
_PACKAGES: Final = ("streamproc", "faust-streaming", "aiokafka", "rocksdict")


class Case(NamedTuple):
    """How the worker ends, and what was done against it."""

    name: str
    ending: signal.Signals
    standby_replicas: int = 0
    static: bool = False
    """The worker has an instance id, and is started again as soon as it is gone."""


CASES: Final = (
    Case("SIGTERM", signal.SIGTERM),
    Case("SIGTERM, standby", signal.SIGTERM, standby_replicas=1),
    Case("SIGKILL", signal.SIGKILL),
    Case("SIGKILL, standby", signal.SIGKILL, standby_replicas=1),
    Case("SIGTERM, restarted as static member", signal.SIGTERM, static=True),
    Case("SIGKILL, restarted as static member", signal.SIGKILL, static=True),
)


class Commit(NamedTuple):
    """A commit record and when it was written, by the worker's clock."""

    at_ms: int
    incarnation: int
    position: int


def gap_s(commits: Sequence[Commit], incarnation: int) -> float | None:
    """From the last commit of ``incarnation`` to the first later one that holds records; None: there is none yet."""
    old = [commit for commit in commits if commit.incarnation == incarnation]
    if not old:
        return None
    later = (c for c in commits if c.incarnation > incarnation and c.position > old[-1].position)
    first = next(later, None)
    return None if first is None else (first.at_ms - old[-1].at_ms) / 1000


def main(argv: Sequence[str]) -> int:
    """Exit code 1: a row was wrong at the end, or a case did not come to its end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks unavailability", description=__doc__.splitlines()[2])
    parser.add_argument("--records", type=int, default=RECORDS, help="rows of the table (default %(default)s)")
    parser.add_argument("--transport", choices=["kafka"], default="kafka", help="two workers need a broker")
    parser.add_argument("--json", action="store_true", help="one JSON line a case on stdout, nothing else there")
    given = parser.parse_args(argv)
    errors = Console(stderr=True, highlight=False)
    say: Callable[[str], None] = lambda what: errors.print(what, markup=False)  # noqa: E731
    try:
        with temporary_folder() as folder, started_log(given.transport, folder) as log:
            lines, wrong = asyncio.run(_Run(log, folder, given.records, say).run())
    except StreamprocError as failure:
        errors.print(str(failure), style="red", markup=False, soft_wrap=True)
        return 1
    for line in lines:
        print(json.dumps(line), flush=True)
    if not given.json:
        Console(width=None if sys.stdout.isatty() else WIDTH).print(_table(lines))
    for difference in wrong:
        errors.print(f"wrong: {difference}", style="red", markup=False)
    return 1 if wrong else 0


@dataclass
class _Run:
    log: Log
    folder: Path
    records: int
    say: Callable[[str], None]
    clock: Clock = field(default_factory=SystemClock)
    sent: Counter[int] = field(default_factory=Counter)
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    told: Settings = field(default_factory=Settings)

    async def run(self) -> tuple[list[dict[str, Any]], list[str]]:
        number = uuid4().hex[:8]
        self.told = Settings(self.log.broker, app_id=f"unavailability-{number}", topic=f"records-{number}")
        async with self.log.started() as transport:
            try:
                lines = await self._cases(transport)
                wrong = await self._wrong(transport)
            finally:
                self._end()
        return [{**line, "correct": not wrong} for line in lines], wrong

    async def _cases(self, transport: Transport) -> list[dict[str, Any]]:
        self.say(f"producing {self.records:,} records")
        await transport.create_topics([TopicSpec(self.told.topic, PARTITIONS, {"retention.ms": "-1"})])
        for begin in range(0, self.records, SEND_RECORDS):
            await self._send(transport, range(begin, min(begin + SEND_RECORDS, self.records)))
        trickle = asyncio.create_task(self._trickle(transport))
        try:
            lines = [await self._case(transport, case) for case in CASES]
        finally:
            trickle.cancel()
            with suppress(asyncio.CancelledError):
                await trickle
        await self._until("the last record", lambda: self._committed() == sum(self.sent.values()))
        return lines

    async def _case(self, transport: Transport, case: Case) -> dict[str, Any]:
        """Two workers with empty disks; one of them is ended once both run and, if there are any, the standbys are warm."""
        self._end()
        for name in ("a", "b"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            self._start(name, case)
        self.say(f"{case.name}: restoring on two empty disks")
        await self._until("two workers with their state", lambda: self._settled(case))
        await self.clock.sleep(STEADY_S)
        (lost,) = [name for name in self.workers if VICTIM in self._status(name).tasks]
        incarnation, since = await self._last(transport)
        worker = self.workers.pop(lost)
        if not case.standby_replicas:
            self._forget(next(name for name in self.workers if name != lost))
        worker.send_signal(case.ending)
        worker.wait()
        if case.static:
            self._start(lost, case)
        else:
            lost = next(iter(self.workers))
        self.say(f"{case.name}: waiting for the task")
        away_s = None
        while away_s is None:
            await self.clock.sleep(LOOK_S)
            away_s = gap_s(await self._commits(transport, since), incarnation)
        await self._until("the new owner's word", lambda: VICTIM in self._status(lost).tasks)
        held = self._status(lost).tasks[VICTIM]
        return self._line(case, away_s, held.restored)

    def _forget(self, name: str) -> None:
        """What a worker has of the task from the time when it was alone."""
        for folder in (self.folder / name).glob(f"**/tasks/agents-{VICTIM}"):
            shutil.rmtree(folder)

    def _settled(self, case: Case) -> bool:
        """A task on each worker that has caught up, and each is warm on the other."""
        told = [self._status(name) for name in self.workers]
        held = {partition: task for status in told for partition, task in status.tasks.items()}
        warm = {partition: standby for status in told for partition, standby in status.standbys.items()}
        behind = sum(self.sent.values()) - sum(task.position for task in held.values())
        return (
            all(len(status.tasks) == 1 for status in told)
            and len(held) == PARTITIONS
            and behind < 1_000
            and (
                not case.standby_replicas or (len(warm) == PARTITIONS and all(w.behind < 1_000 for w in warm.values()))
            )
        )

    def _committed(self) -> int:
        held = {p: task for name in self.workers for p, task in self._status(name).tasks.items()}
        return sum(task.position for task in held.values())

    # ---- records

    async def _send(self, transport: Transport, keys: Sequence[int]) -> None:
        """Key k lies in partition k modulo `PARTITIONS`."""
        found: dict[TopicPartition, list[OutRecord]] = {}
        for key in keys:
            found.setdefault(TopicPartition(self.told.topic, key % PARTITIONS), []).append(
                OutRecord(None, b"%012d" % key)
            )
        await transport.send(found)
        self.sent.update(keys)

    async def _trickle(self, transport: Transport) -> None:
        key = 0
        while True:
            await self._send(transport, [(key + partition) % self.records for partition in range(PARTITIONS)])
            key += PARTITIONS
            await self.clock.sleep(TRICKLE_S)

    # ---- what the log says

    async def _last(self, transport: Transport) -> tuple[int, Offset]:
        """Incarnation of the task's owner, and where its last commits begin."""
        tp = self._commits_tp()
        end = (await transport.offsets([tp]))[tp].stable
        since = Offset(max(0, end - 64))
        return (await self._commits(transport, since))[-1].incarnation, since

    async def _commits(self, transport: Transport, since: Offset) -> list[Commit]:
        tp, found = self._commits_tp(), list[Commit]()
        end = (await transport.offsets([tp]))[tp].stable
        async for batch in transport.read(tp, since, end):
            for row, at_ms in enumerate(batch.timestamps.tolist()):
                record: CommitRecord = commit_record.decode(batch.value(row) or b"", tp.topic)
                found.append(Commit(int(at_ms), record.incarnation, sum(record.positions["count"].values())))
        return found

    def _commits_tp(self) -> TopicPartition:
        return TopicPartition(f"{self.told.app_id}-agents-commits", VICTIM)

    async def _wrong(self, transport: Transport) -> list[str]:
        """Every row of the table, as its changelog has it, against what was sent."""
        self.say("comparing the rows")
        live: dict[bytes, bytes] = {}
        for partition in range(PARTITIONS):
            tp = TopicPartition(f"{self.told.app_id}-{TABLE}-changelog", partition)
            ends = (await transport.offsets([tp]))[tp]
            async for batch in transport.read(tp, ends.begin, ends.stable):
                live.update((row.key, row.value) for row in changelog.read(batch) if row.value is not None)
        found = {int(unpack_key(key)): unpack_value(value)[0] for key, value in live.items()}
        differing = [key for key in found.keys() | self.sent.keys() if found.get(key) != self.sent.get(key)]
        return [f"key {key} came {self.sent.get(key)} times, counted: {found.get(key)}" for key in differing[:10]]

    # ---- workers

    def _start(self, name: str, case: Case) -> None:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / STATUS).unlink(missing_ok=True)
        told = msgspec.structs.replace(
            self.told, folder=str(folder), standby_replicas=case.standby_replicas,
            instance_id=f"worker-{name}" if case.static else None,
            session_timeout_s=STATIC_SESSION_S if case.static else self.told.session_timeout_s,
        )  # fmt: skip
        command = [str(Path(sys.executable).with_name("faust")), "-A", "benchmarks.unavailability_job", "worker",
                   "-l", "warn", "--without-web"]  # fmt: skip
        with (self.folder / f"{name}.log").open("ab") as out:
            self.workers[name] = subprocess.Popen(
                command, cwd=_ROOT, env={**os.environ, **told.environment()}, stdout=out, stderr=out
            )

    def _end(self) -> None:
        for worker in self.workers.values():
            worker.terminate()
        for worker in self.workers.values():
            worker.wait()
        self.workers.clear()

    def _status(self, name: str) -> Status:
        path = self.folder / name / STATUS
        return msgspec.json.decode(path.read_bytes(), type=Status) if path.exists() else Status()

    async def _until(self, what: str, condition: Callable[[], bool]) -> None:
        end_s = self.clock.monotonic_s() + WAIT_S_MAX
        while not condition():
            gone = [name for name, worker in self.workers.items() if worker.poll() is not None]
            if gone or self.clock.monotonic_s() > end_s:
                words = "\n".join((self.folder / f"{name}.log").read_text()[-3000:] for name in gone or self.workers)
                raise UserError(f"Waited for {what} in vain.", remedy=f"The end of the workers' logs:\n{words}")
            await self.clock.sleep(LOOK_S)

    def _line(self, case: Case, away_s: float, restored: int) -> dict[str, Any]:
        return {
            "name": "unavailability",
            "transport": "kafka",
            "case": case.name,
            "unavailable_s": round(away_s, 2),
            "rows_restored": restored,
            "rows_per_task": self.records // PARTITIONS,
            "standby_replicas": case.standby_replicas,
            "static": case.static,
            "session_timeout_s": STATIC_SESSION_S if case.static else self.told.session_timeout_s,
            "commit_interval_s": self.told.commit_interval_s,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES},
                         **self.log.version},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
        }  # fmt: skip


def _table(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table("a task's worker ends by", "unavailable s", "rows restored", "of", "correct", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(line["case"], f"{line['unavailable_s']:.2f}", f"{line['rows_restored']:,}",
                      f"{line['rows_per_task']:,}", "yes" if line["correct"] else "NO")  # fmt: skip
    return table
