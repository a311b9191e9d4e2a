"""``make simulate-mutants``: each deliberate break of the protocol must be caught within so many seeds."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.progress import Progress

from simulation.mutants import MUTANTS, Mutant

__all__ = ["main"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation.hunt", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("names", nargs="*", help="default: all")
    options = parser.parse_args()
    chosen = [MUTANTS[name] for name in options.names] if options.names else list(MUTANTS.values())
    caught = 0
    with Progress(console=Console(stderr=True), transient=True) as progress, ThreadPoolExecutor(options.jobs) as pool:
        bar = progress.add_task("mutants", total=len(chosen))
        for mutant, (found, said) in zip(chosen, pool.map(lambda one: hunt(one, options.seeds), chosen), strict=True):
            caught += found
            progress.update(bar, advance=1)
            print(f"{'caught  ' if found else 'SURVIVED'} {mutant.name}: {mutant.rule}\n         {said}", flush=True)
    print(f"mutants={len(chosen)} caught={caught}")
    return 0 if caught == len(chosen) else 1


def hunt(mutant: Mutant, seeds: int) -> tuple[bool, str]:
    """Whether a seed failed, and what was said of it. A mutant that cannot be applied raises."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "simulation", "--seeds", str(seeds), "--jobs", "1", "--stop-at-first",
               "--mutant", mutant.name]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "\nseeds=" not in done.stdout:
        raise RuntimeError(f"{mutant.name} did not run: {done.stderr[-2000:]}")
    failures = [line for line in done.stderr.splitlines() if line.startswith("seed ")]
    said = failures[0][:300] if failures else f"{seeds} seeds saw nothing"
    return bool(failures), f"{said} ({time.perf_counter() - began:.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
