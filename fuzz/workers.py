"""Seeds in several processes, any of which may die: the seed it was at is known, looked into, and the rest goes on."""

from __future__ import annotations

import faulthandler
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Final

from fuzz.seed import Result, run_seed, run_seed_one_by_one

__all__ = ["Crash", "run_seeds"]

HANG_S: Final = 120.0
"""If no process ends a seed (a tenth of a second's work, or a compilation) in this time, they hang and are killed."""
_CONTEXT: Final = multiprocessing.get_context("spawn")  # a forked child would inherit threads that do not run in it

Work = Callable[[int], Result]
Slowly = Callable[[int, Callable[[str], None]], None]


@dataclass(frozen=True)
class Crash:
    """The process that ran ``seed`` ended with ``exit_code`` (negative: the signal); ``what`` it read last."""

    seed: int
    exit_code: int | None
    what: str


@dataclass
class _Worker:
    process: SpawnProcess
    link: Connection
    seed: int

    def end(self) -> int | None:
        self.process.kill()
        self.process.join()
        self.link.close()
        return self.process.exitcode


def run_seeds(
    seeds: range | list[int], jobs: int, work: Work = run_seed, slowly: Slowly = run_seed_one_by_one
) -> Iterator[Result | Crash]:
    """In the order in which they end; processes start with the environment as it is now."""
    left = iter(seeds)
    workers = [_start(work, seed) for _, seed in zip(range(jobs), left, strict=False)]
    try:
        while workers:
            ready = wait([worker.link for worker in workers], HANG_S)
            for worker in [worker for worker in workers if worker.link in ready or not ready]:
                yield _outcome(worker, slowly)
                workers.remove(worker)
                if (seed := next(left, None)) is None:
                    worker.end()
                elif worker.process.exitcode is None and not worker.link.closed:
                    worker.seed = seed
                    worker.link.send(seed)
                    workers.append(worker)
                else:
                    workers.append(_start(work, seed))
    finally:
        for worker in workers:
            worker.end()


def _start(work: Work, seed: int) -> _Worker:
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(there, work), daemon=True)
    process.start()
    there.close()
    here.send(seed)
    return _Worker(process, here, seed)


def _serve(link: Connection, work: Work) -> None:
    """A worker: a seed in, its result out, until it is killed."""
    faulthandler.enable()
    warnings.simplefilter("error")  # hostile values must not fill anybody's log either
    while True:
        link.send(work(link.recv()))


def _outcome(worker: _Worker, slowly: Slowly) -> Result | Crash:
    try:
        if worker.link.poll():
            result: Result = worker.link.recv()
            return result
    except (EOFError, ConnectionError):
        worker.process.join(HANG_S)  # the pipe closes a moment before the process has ended
    exit_code = worker.process.exitcode
    hung = exit_code is None
    worker.end()
    last = _last_told(slowly, worker.seed)
    return Crash(worker.seed, exit_code, f"{'hangs' if hung else 'died'} at {last}")


def _last_told(slowly: Slowly, seed: int) -> str:
    """What a process of its own was at when it died or hung, going through the seed one by one."""
    here, there = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=slowly, args=(seed, there.send), daemon=True)
    process.start()
    there.close()
    last = "its start"
    try:
        while here.poll(HANG_S):
            last = here.recv()
    except (EOFError, ConnectionError):
        pass
    finally:
        process.kill()
        process.join()
    return last
