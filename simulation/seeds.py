"""Many seeds, in several processes."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import random
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from simulation.mutants import MUTANTS
from simulation.run import Result, run_seed
from streamproc.core import limits
from streamproc.testing.simulation.loop import bury, unless_abandoned
from streamproc.testing.simulation.steps import install

__all__ = ["points", "prepare", "run_one", "run_seeds"]

TARGETS = 10
"""Steps that a seed's workers are to die at."""
RARE = (
    ("Runtime._pump: await self._moved_away()", "Runtime._moved_away", "RETRY_BACKOFF_S_MAX) #2"),
    ("Runtime._pump: await self.app.crash", "Runtime.close_tasks: await asyncio.wait(late)"),
    ("SinkFeed._expired", "SinkFeed._replay", "SinkFeed._catch_up"),
    ("SinkFeed._rebuild", "SinkFeed._reread", "SinkFeed._feed: await self._reread()"),
    ("Standbys.keep", "Standby._catch_up: await self._restore", "start.py _held: async for",
     "Task._serve: await self._commit()", "Runtime.on_stop: await fetcher.close()", "Runtime.subscribe: await self.app.crash"),
)  # fmt: skip
"""Steps that few runs come by. Of each row one is a target of each seed: who dies at one does not come to the next."""
CHUNK = 5
COLLECT_EVERY = 5
"""Seeds between two collections of what dead workers left."""
SMALL = {
    "REDIS_SLICE_ROWS_MAX": 4,
    "SINK_CATCH_UP_BYTES_MAX": 400,
    "RESTORE_WRITE_BYTES_MAX": 800,
    "TRIM_INTERVAL_S": 2.0,
    "SESSION_TIMEOUT_S": 3.0,
    "BARRIER_TIMEOUT_S": 2.0,
    "REVOKE_S": 3.0,
    "SINK_QUEUE_EPOCHS_MAX": 4,
    "RETRY_BACKOFF_S_MAX": 0.5,
}
"""Bounds made so small that a short run meets them."""
_points: list[str] = []


def prepare(mutant: str | None = None) -> None:
    """Once in each process: put the steps in, with the break ``mutant`` if one is named."""
    global _points
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore", RuntimeWarning)  # what a dead worker never awaited
    sys.unraisablehook = unless_abandoned
    for name, value in SMALL.items():
        setattr(limits, name, value)
    _points = install(MUTANTS[mutant].changes() if mutant else None).points
    gc.collect()
    gc.freeze()


def points() -> list[str]:
    """Where a worker can die: before and behind each await."""
    return _points


def run_one(seed: int) -> Result:
    """Everything about it follows from the seed and the code."""
    every = points()
    targets = [every[(seed * TARGETS + at) % len(every)] for at in range(TARGETS)]
    dice = random.Random(f"rare {seed}")
    targets += [dice.choice([point for point in every if any(name in point for name in row)]) for row in RARE]
    gc.disable()  # a collection in mid-run would depend on what ran before
    try:
        return run_seed(seed, targets)
    finally:
        if seed % COLLECT_EVERY == 0:
            bury()


def run_seeds(seeds: range, jobs: int, mutant: str | None) -> Iterator[Result]:
    """In the order in which they end. `prepare` must have been called."""
    if jobs == 1:
        yield from map(run_one, seeds)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would inherit threads that do not run in it
    chunks = [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]
    with ProcessPoolExecutor(jobs, context, prepare, (mutant,)) as pool:
        running = [pool.submit(_run_some, chunk) for chunk in chunks]
        try:
            for done in as_completed(running):
                yield from done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run_some(seeds: range) -> list[Result]:
    return [run_one(seed) for seed in seeds]
