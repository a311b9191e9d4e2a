"""``make simulate SEEDS=1000 FROM=0``: that many simulated runs, each with faults of its own. Replays one with SEEDS=1."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simulation.mutants import MUTANTS
from simulation.run import Result
from simulation.seeds import points, prepare, run_seeds

__all__ = ["main"]

TOLD_EVERY = 250
ALL_STEPS_FROM = 2_000
"""Runs of at least so many seeds fail if a step was never died at."""
SAME_EVERYWHERE = {"PYTHONHASHSEED": "0", "POLARS_MAX_THREADS": "1"}
"""What a seed's course depends on, or would be slowed by, beside the seed."""


def main(arguments: list[str] | None = None) -> int:
    if any(os.environ.get(name) != value for name, value in SAME_EVERYWHERE.items()):
        _again()
    options = _options(arguments)
    prepare(options.mutant)
    console = Console(stderr=True)
    every = points()
    seeds = range(options.from_, options.from_ + options.seeds)
    failed: list[Result] = []
    died: set[str] = set()
    faults: dict[str, int] = {}
    epochs, seen, began = 0, 0, time.perf_counter()
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[bad]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("seeds", total=len(seeds), bad="")
        for result in run_seeds(seeds, options.jobs, options.mutant):
            died |= result.died
            epochs += result.epochs
            for what, count in result.faults.items():
                faults[what] = faults.get(what, 0) + count
            if result.failure is not None:
                failed.append(result)
                _tell(console, result, options)
                if options.stop_at_first:
                    break
            seen += 1
            if not console.is_terminal and seen % TOLD_EVERY == 0:  # where no bar is drawn
                print(f"{seen} of {len(seeds)} seeds, {len(failed)} failed, {len(died)} steps hit", file=sys.stderr)
            progress.update(bar, advance=1, bad=f"{len(failed)} failed" if failed else "")
    missed = [step for step in every if step not in died]
    if options.verbose or (missed and len(seeds) >= ALL_STEPS_FROM):
        print(
            f"{sum(faults.values())} faults: " + ", ".join(f"{what} {count}" for what, count in sorted(faults.items()))
        )
        for step in missed:
            print(f"nobody died at: {step}")
    print(f"{epochs} epochs in {time.perf_counter() - began:.0f} s")
    print(f"seeds={len(seeds)} failed={len(failed)} steps_hit={len(every) - len(missed)}/{len(every)}")
    return 1 if failed or (missed and len(seeds) >= ALL_STEPS_FROM) else 0


def _tell(console: Console, result: Result, options: argparse.Namespace) -> None:
    console.print(f"seed {result.seed} failed: {result.failure}", markup=False, highlight=False, soft_wrap=True)
    if options.verbose:
        for line in result.told:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    mutant = f"MUTANT={options.mutant} " if options.mutant else ""
    console.print(
        f"replay: make simulate SEEDS=1 FROM={result.seed} {mutant}ARGS=--verbose", markup=False, soft_wrap=True
    )


def _again() -> NoReturn:
    command = [sys.executable, "-m", "simulation", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, **SAME_EVERYWHERE})


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000)
    parser.add_argument("--from", type=int, default=0, dest="from_")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one a core")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="with this break of the protocol")
    parser.add_argument("--stop-at-first", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="what happened in failing runs, and steps not reached")
    options = parser.parse_args(arguments)
    options.jobs = min(options.jobs or os.cpu_count() or 1, max(options.seeds, 1))
    return options


if __name__ == "__main__":
    sys.exit(main())
