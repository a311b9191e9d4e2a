"""``make fuzz RECORDS=10000000 SEED=1``: that many mutated records and some record sets; no crash, no wrong value.

Seeds count up from SEED, each a batch of `records.MUTATED_PER_BATCH` mutated records and some record sets. A failure
tells the bytes, and the seed that does it again by itself: ``make fuzz SEED=17 RECORDS=1``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fuzz.records import MUTATED_PER_BATCH
from fuzz.seed import Result
from fuzz.workers import Crash, run_seeds

__all__ = ["main"]

CHECKED_EVERY: Final = 8
"""Seeds that divide by it run under numba's own bounds checks."""
CHECKED: Final = {
    "NUMBA_BOUNDSCHECK": "1",
    # Kernels with checks must not be taken for those without, which lie beside their sources.
    "NUMBA_CACHE_DIR": str(Path(__file__).resolve().parent.parent / ".run" / "fuzz" / "numba"),
}
ONE_THREAD: Final = {"POLARS_MAX_THREADS": "1"}
TOLD_EVERY: Final = 250
WRONG_SHOWN: Final = 20
CRASHES_MAX: Final = 5
"""Each is looked into for seconds; after so many the rest of the seeds is not run."""


@dataclass
class Tally:
    """What the seeds did, added up."""

    seeds: range
    records: int = 0
    mutated: int = 0
    refused: int = 0
    sets: int = 0
    sets_refused: int = 0
    wrong: int = 0
    crashed: int = 0

    def add(self, outcome: Result | Crash) -> list[str]:
        """Lines for a person, if anything is wrong."""
        replay = f"  replay: make fuzz SEED={outcome.seed} RECORDS=1"
        if isinstance(outcome, Crash):
            self.crashed += 1
            return [f"seed {outcome.seed} (exit code {outcome.exit_code}) {outcome.what}", replay]
        for name in ("records", "mutated", "refused", "sets", "sets_refused", "wrong"):
            setattr(self, name, getattr(self, name) + getattr(outcome, name))
        return [*outcome.told, replay] if outcome.wrong else []

    def last_line(self) -> str:
        return (
            f"records={self.records} seeds={self.seeds[0]}..{self.seeds[-1]} mutated={self.mutated} "
            f"refused={self.refused} sets={self.sets} sets_refused={self.sets_refused} "
            f"wrong={self.wrong} crashed={self.crashed}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    seeds = range(options.seed, options.seed + max(-(-options.records // MUTATED_PER_BATCH), 1))
    console, tally = Console(stderr=True), Tally(seeds)
    columns = (
        TextColumn("fuzzing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("seeds"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[bad]}"),
    )
    shown = 0
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("seeds", total=len(seeds), bad="")
        for done, outcome in enumerate(_outcomes(seeds, options.jobs), start=1):
            lines = tally.add(outcome)
            if lines and shown < WRONG_SHOWN:
                shown += 1
                for line in lines:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
            if not console.is_terminal and done % TOLD_EVERY == 0:  # where no bar is drawn
                print(f"{done} of {len(seeds)} seeds: {tally.last_line()}", file=sys.stderr, flush=True)
            bad = tally.wrong + tally.crashed
            progress.update(bar, advance=1, bad=f"{bad} wrong or crashed" if bad else "")
            if tally.crashed == CRASHES_MAX:
                console.print(f"{CRASHES_MAX} crashes are enough: {len(seeds) - done} seeds were not run")
                break
    print(tally.last_line())
    return 1 if tally.wrong or tally.crashed else 0


def _outcomes(seeds: range, jobs: int) -> Iterator[Result | Crash]:
    """The checked seeds behind the others, because their kernels may have to be compiled first."""
    os.environ.update(ONE_THREAD)
    yield from run_seeds([seed for seed in seeds if seed % CHECKED_EVERY], jobs)
    os.environ.update(CHECKED)
    yield from run_seeds([seed for seed in seeds if seed % CHECKED_EVERY == 0], jobs)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--records", type=int, default=10_000_000, help="mutated records; rounded up to whole batches")
    parser.add_argument("--seed", type=int, default=1, help="the first; every batch has its own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; one a core by default")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
