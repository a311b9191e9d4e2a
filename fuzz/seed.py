"""What one seed does: a batch of mutated values and some mutated record sets. All of it follows from the seed and the code."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fuzz.records import Input, batch_of, decode_and_judge, draw_columns, draw_place, draw_values
from fuzz.schemas import Pair, draw_pair
from fuzz.sets import draw_set, judge_set

__all__ = ["SETS_PER_SEED", "Result", "run_seed", "run_seed_one_by_one"]

SETS_PER_SEED: Final = 40
WRONG_TOLD_MAX: Final = 3


@dataclass
class Result:
    seed: int
    records: int = 0
    mutated: int = 0
    refused: int = 0
    sets: int = 0
    sets_refused: int = 0
    wrong: int = 0
    told: list[str] = field(default_factory=list)
    """The first wrong ones, as a person reads them."""

    def add(self, what: str, data: bytes | None) -> None:
        self.wrong += 1
        if len(self.told) < WRONG_TOLD_MAX:
            self.told.append(f"seed {self.seed}, {what}\n  hex: {'null' if data is None else data.hex()}")


def run_seed(seed: int) -> Result:
    """Never raises: what the code under test raises is a wrong one too."""
    result = Result(seed)
    pair, given, judge = _case(seed, random.Random(f"records {seed}"))
    result.records, result.mutated = len(given.values), sum(given.mutated)
    judge(given, result)
    dice = random.Random(f"sets {seed}")
    for _ in range(SETS_PER_SEED):
        drawn = draw_set(dice)
        result.sets += 1
        try:
            refused, wrong = judge_set(drawn)
        except Exception:  # Whatever it is, the seed and the bytes are to be told.
            refused, wrong = False, f"raised {traceback.format_exc()}"
        result.sets_refused += refused
        if wrong is not None:
            result.add(f"a record set from position {drawn.position} {wrong}", drawn.data)
    if result.told:
        result.told.append(f"  {pair.name}: {pair.told()}")
    return result


def run_seed_one_by_one(seed: int, tell: Callable[[str], None]) -> None:
    """The same, each value a batch of its own and told before it is read: the last one told is the one that crashes."""
    pair, given, judge = _case(seed, random.Random(f"records {seed}"))
    for row, value in enumerate(given.values):
        tell(f"seed {seed}, {pair.name}, record {row}, hex: {'null' if value is None else value.hex()}")
        judge(Input([value], [given.mutated[row]]), Result(seed))
    dice = random.Random(f"sets {seed}")
    for _ in range(SETS_PER_SEED):
        drawn = draw_set(dice)
        tell(f"seed {seed}, a record set from position {drawn.position}, hex: {drawn.data.hex()}")
        judge_set(drawn)
    tell("no record or set on its own")


def _case(seed: int, rng: random.Random) -> tuple[Pair, Input, Callable[[Input, Result], None]]:
    pair = draw_pair(seed, rng)
    given, columns, place = draw_values(rng, pair), draw_columns(rng, pair), draw_place(rng)

    def judge(some: Input, result: Result) -> None:
        try:
            verdict = decode_and_judge(pair, columns, some, batch_of(some.values, place))
        except Exception:
            result.add(f"{pair.name}, the whole batch raised {traceback.format_exc()}", b"")
            return
        result.refused += verdict.refused
        for row, what in verdict.wrong:
            value = some.values[row] if row >= 0 else b""
            result.add(f"{pair.name}, record {row} {what}", value)

    return pair, given, judge
