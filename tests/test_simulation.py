"""The simulation itself: a seed replays, every await is a step, the kit sees deliberate breaks, and a sample of seeds."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulation.mutants import MUTANTS
from streamproc.core.errors import UserError
from streamproc.testing.simulation import steps

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "streamproc"
REPLAY = """
import json, logging
from simulation.seeds import prepare, run_one
prepare({mutant!r})
results = [run_one(seed) for seed in {seeds!r}]
print(json.dumps([[r.seed, r.failure, r.told, r.epochs, sorted(r.faults.items())] for r in results]))
"""


def run_seeds(*seeds: int, mutant: str | None = None) -> list[list[object]]:
    """[seed, failure, what happened, epochs, faults] of each, in a process of its own, as `make simulate` runs them."""
    done = subprocess.run(
        [sys.executable, "-c", REPLAY.format(mutant=mutant, seeds=seeds)], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "0", "POLARS_MAX_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[list[object]] = json.loads(done.stdout)
    return found


def test_a_seed_replays_to_the_last_step() -> None:
    first, second = run_seeds(8, 11), run_seeds(8, 11)
    assert first == second
    assert all(failure is None for _, failure, *_ in first)


def test_a_seed_does_not_depend_on_what_ran_before() -> None:
    assert run_seeds(3, 12)[1] == run_seeds(12)[0]


def test_every_await_of_the_code_under_test_is_a_step_or_left_out_with_a_reason() -> None:
    installed = steps.install()
    try:
        found = 0
        for part in steps.SCOPE:
            for path in (PACKAGE / part).rglob("*.py"):
                if str(path.relative_to(PACKAGE)) in steps.OUTSIDE:
                    continue
                found += sum(_awaits(node) for node in ast.walk(ast.parse(path.read_text())))
        assert found == len(installed.all_steps)
        left_out = set(installed.all_steps) - set(installed.steps)
        for name, reason in steps.UNREACHED.items():
            assert reason
            assert any(f" {name}" in step for step in left_out), f"{name} has no await any more"
        for name in steps.OUTSIDE:
            assert (PACKAGE / name).exists(), f"{name} is gone"
    finally:
        installed.uninstall()


def _awaits(node: ast.AST) -> int:
    if isinstance(node, ast.AsyncWith):
        return len(node.items)
    return isinstance(node, ast.Await | ast.AsyncFor)


def test_what_was_installed_is_taken_out_again() -> None:
    from streamproc.runtime.epoch import commit

    before = commit.__code__
    installed = steps.install()
    assert commit.__code__ is not before
    installed.uninstall()
    assert commit.__code__ is before


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_deliberate_break_still_fits_the_code(name: str) -> None:
    for file, change in MUTANTS[name].changes().items():
        source = (PACKAGE / file).read_text()
        assert change(source) != source
        ast.parse(change(source))


def test_a_break_that_no_longer_fits_says_so() -> None:
    with pytest.raises(UserError, match="no longer fits: its text is found 2 times"):
        steps.require_mutated("some", "a a", "a", "b")


def test_the_kit_sees_a_break_of_the_protocol() -> None:
    found = run_seeds(0, 1, mutant="store-before-commit")
    assert all("which the log has not committed" in str(failure) for _, failure, *_ in found)


@pytest.mark.timeout(420)
def test_two_hundred_seeds_equal_the_oracle() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simulation", "--seeds", "200", "--from", "100000"], cwd=ROOT, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("seeds=200 failed=0 steps_hit=")
