"""python -m benchmarks partitions --records 2000000 --transport kafka

What a record costs as partitions, and so tasks, epochs and transactions, become more: the job of ``pipeline`` with both
sinks, over 1, 4, 16 and 64 partitions, by one worker and by two. CPU time counts from the moment when every task runs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec
import numpy as np
import psutil  # type: ignore[import-untyped]

from benchmarks.compare import compare
from benchmarks.marks import TOPIC, Settings
from benchmarks.orders import Orders, orders
from benchmarks.partitions_job import GO, STATUS, GateStatus
from benchmarks.parts import FULL_RECORDS, Log, Say, started_log, started_sinks, temporary_folder
from benchmarks.reports import Line, facts, parser
from benchmarks.reports import main as report
from streamproc.core.clock import Clock, SystemClock
from streamproc.core.errors import UserError
from streamproc.core.partitioner import partition_of

__all__ = ["growth_pct", "main"]

COUNTS: Final = (1, 4, 16, 64)
WORKERS: Final = (1, 2)
COMMIT_INTERVAL_S: Final = 0.25
WARM_RECORDS: Final = 20_000
GROUPS: Final = 2
"""Of tasks: those that read orders, and those that own the table."""
WAIT_S_MAX: Final = 600.0
LOOK_S: Final = 0.02
STOP_S_MAX: Final = 30.0
GROWTH_FROM: Final = 4
GROWTH_TO: Final = 64
_ROOT: Final = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str]) -> int:
    """Exit code 1: a row is wrong."""
    made = parser("partitions", "Records per worker CPU-second by partitions and workers.")
    made.add_argument("--records", type=int, default=FULL_RECORDS, help="orders of each run (default %(default)s)")
    made.add_argument("--partitions", type=int, nargs="+", default=list(COUNTS), metavar="N")
    made.add_argument("--workers", type=int, nargs="+", default=list(WORKERS), metavar="N", help="kafka: 1 and 2")
    made.add_argument("--commit-interval", type=float, default=COMMIT_INTERVAL_S, metavar="S")
    return report(made.parse_args(argv), run)


def run(given: argparse.Namespace, say: Say) -> Line:
    """Blocks for minutes. A log in a file belongs to one process, so there is no second worker on it."""
    workers = given.workers if given.transport == "kafka" else [1]
    line, wrong, rates = Line(name="partitions", transport=given.transport, records=given.records), list[str](), {}
    for count in given.partitions:
        for number in workers:
            # A log of its own for each: what earlier ones have left in a broker makes the later dearer.
            with temporary_folder() as folder, started_log(given.transport, folder) as log:
                say(f"{count} partitions, {number} workers")
                _Case(log, folder, count, number, given.commit_interval).measure(WARM_RECORDS)
                case = _Case(log, folder, count, number, given.commit_interval)
                done = case.measure(given.records)
                rates[count, number] = line[case.name] = round(given.records / done.cpu_s)
                line[f"commits_{case.name}"] = done.commits
                wrong += [f"{case.name}: {difference}" for difference in done.wrong]
                of_run = facts(log, wrong)
    growths = {f"growth_pct_{number}w": growth_pct(rates, number) for number in workers}
    return {**line, **{name: pct for name, pct in growths.items() if pct is not None}, **of_run}


def growth_pct(rates: Mapping[tuple[int, int], int], workers: int) -> float | None:
    """By how much a record costs more at `GROWTH_TO` partitions than at `GROWTH_FROM`; None: not measured. ``rates``:
    (partitions, workers) -> records per CPU-second."""
    few, many = rates.get((GROWTH_FROM, workers)), rates.get((GROWTH_TO, workers))
    return None if few is None or many is None else round(100 * (few / many - 1), 1)


@dataclass(frozen=True)
class _Done:
    cpu_s: float
    commits: int
    wrong: list[str]


@dataclass
class _Case:
    log: Log
    folder: Path
    partitions: int
    workers: int
    commit_interval_s: float
    clock: Clock = field(default_factory=SystemClock)

    @property
    def name(self) -> str:
        return f"p{self.partitions}_w{self.workers}"

    def measure(self, records: int) -> _Done:
        """One run on topics, folders and sinks of its own."""
        number, input_ = uuid4().hex[:8], _spread(orders(records), self.partitions)
        home = self.folder / number
        home.mkdir(mode=0o755)
        told = Settings(self.log.broker, str(home), f"benchmark-partitions-{number}", f"{TOPIC}-{number}",
                        partitions=self.partitions, records=records, commit_interval_s=self.commit_interval_s)  # fmt: skip
        asyncio.run(self.log.produce(told.topic, input_, self.partitions))
        with started_sinks(told, home) as told:
            cpu_s, commits = self._run(told, home)
            wrong = asyncio.run(self._wrong(told, input_))
        return _Done(cpu_s, commits, wrong)

    def _run(self, told: Settings, home: Path) -> tuple[float, int]:
        """CPU seconds of all workers and epochs of all tasks."""
        with _started(told, home, self.workers) as running:
            watch = _Watch(running, self.clock)
            watch.until("every task", lambda told: sum(one.running for one in told) == GROUPS * self.partitions)
            cpu_s = watch.cpu_s()
            (home / GO).touch()
            watch.until("the end", lambda told: all(one.finished for one in told))
            cpu_s, told_last = watch.cpu_s() - cpu_s, watch.told()
        if any(one.restarts for one in told_last):
            why = [line for folder in running for line in folder.with_suffix(".log").read_text().splitlines()
                   if "starts anew" in line]  # fmt: skip
            raise UserError(f"A task of {self.name} started anew.",
                            remedy="Run it again with nothing beside it.\n" + "\n".join(why))  # fmt: skip
        return cpu_s, sum(one.epochs for one in told_last)

    async def _wrong(self, told: Settings, input_: Orders) -> list[str]:
        async with self.log.started() as transport:
            return await compare("pipeline", told, transport, input_)


def _spread(input_: Orders, partitions: int) -> Orders:
    """The same orders over another number of partitions, by their key as before."""
    known, codes = np.unique(input_.users, return_inverse=True)
    at_home = np.array([partition_of(b"%d" % user, partitions) for user in known.tolist()], np.uint8)
    return replace(input_, partitions=at_home[codes])


@contextmanager
def _started(told: Settings, home: Path, workers: int) -> Iterator[dict[Path, subprocess.Popen[bytes]]]:
    """Workers by their folders, each with its output beside it; ended with the block."""
    running: dict[Path, subprocess.Popen[bytes]] = {}
    command = [str(Path(sys.executable).with_name("faust")), "-A", "benchmarks.partitions_job", "worker", "-l", "warn",
               "--without-web"]  # fmt: skip
    try:
        for number in range(workers):
            folder = home / f"worker-{number}"
            folder.mkdir()
            own = msgspec.structs.replace(told, folder=str(folder))
            with folder.with_suffix(".log").open("wb") as out:
                running[folder] = subprocess.Popen(
                    command, cwd=_ROOT, env={**os.environ, **own.environment()}, stdout=out, stderr=out
                )
        yield running
    finally:
        for worker in running.values():
            worker.terminate()
        for worker in running.values():
            try:
                worker.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


@dataclass
class _Watch:
    """What the workers say, and what they have used."""

    running: Mapping[Path, subprocess.Popen[bytes]]
    clock: Clock

    def told(self) -> list[GateStatus]:
        files = [folder / STATUS for folder in self.running]
        return [
            msgspec.json.decode(file.read_bytes(), type=GateStatus) if file.exists() else GateStatus() for file in files
        ]

    def cpu_s(self) -> float:
        """User and system time of the workers so far."""
        times = [psutil.Process(worker.pid).cpu_times() for worker in self.running.values()]
        return float(sum(one.user + one.system + one.children_user + one.children_system for one in times))

    def until(self, what: str, condition: Callable[[list[GateStatus]], bool]) -> None:
        """Raises `UserError` with the end of the workers' output when one has gone or it takes `WAIT_S_MAX`."""
        end_s = self.clock.monotonic_s() + WAIT_S_MAX
        while not condition(self.told()):
            gone = any(worker.poll() is not None for worker in self.running.values())
            if gone or self.clock.monotonic_s() > end_s:
                words = "\n".join(folder.with_suffix(".log").read_text()[-3000:] for folder in self.running)
                raise UserError(f"Waited for {what} in vain.", remedy=f"The end of the workers' output:\n{words}")
            asyncio.run(self.clock.sleep(LOOK_S))
