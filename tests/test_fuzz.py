"""The fuzzer: a sample of it is clean, and it sees a wrong value, a wrong verdict, a read outside and a dead process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_avro_support import schema_of

from fuzz.guard import guarded
from fuzz.mutate import mutated
from fuzz.plainset import Refused, read_plainly
from fuzz.records import Input, batch_of, decode_and_judge
from fuzz.schemas import Pair
from fuzz.seed import Result, run_seed
from fuzz.sets import draw_set, judge_set
from fuzz.workers import Crash, run_seeds
from streamproc.avro.decode import Use
from streamproc.avro.wire import frame
from streamproc.core.hash128 import hash_float64

ROOT = Path(__file__).parents[1]
SCHEMA = schema_of(("s", "string"), ("d", "double"))
PAIR = Pair("test", {1: SCHEMA}, SCHEMA)
NAN, OTHER_NAN = b"\0\0\0\0\0\0\xf8\x7f", b"\1\0\0\0\0\0\xf8\x7f"


def test_a_sample_of_mutated_records_is_read_as_the_plain_decoder_reads_them() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--records", "14000", "--seed", "1000001"], cwd=ROOT, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("records=14875 seeds=1000001..1000007 mutated=14000 refused=")
    assert last.endswith("wrong=0 crashed=0")
    assert " sets=280 " in last


def test_a_seed_does_the_same_again() -> None:
    assert run_seed(5) == run_seed(5)
    assert run_seed(5) != run_seed(12)


def test_a_mutated_record_is_never_what_it_was() -> None:
    rng = random.Random(1)
    for data in (b"", b"\0", b"some bytes"):
        assert all(mutated(rng, data, data) != data for _ in range(2_000))


@pytest.mark.parametrize(
    ("read", "given", "said"),
    [
        (b"\2a" + NAN, b"\2b" + NAN, "column s: kernel says 'a', the plain decoder 'b'"),
        (b"\2a" + NAN, b"\2a" + OTHER_NAN, "column d: kernel says 9221120237041090560"),
        (b"\2a" + NAN, b"\4a" + NAN[:-1], "kernel says good, the plain decoder ('truncated"),
        (b"\2\xff" + NAN, b"\2a" + NAN, "kernel says ('invalid UTF-8, field s', 1), the plain decoder good"),
        (b"\3", b"\1", "kernel says ('negative length -2"),
    ],
)
def test_a_record_that_is_read_as_something_else_is_told(read: bytes, given: bytes, said: str) -> None:
    good = frame(1, b"\2a" + NAN)
    batch = batch_of([good, frame(1, read), good], lambda data: np.frombuffer(bytearray(data), np.uint8))
    values = Input([good, frame(1, given), good], [False, True, False])
    columns = {"s": Use.VALUE | Use.HASH, "d": Use.VALUE}
    found = decode_and_judge(PAIR, columns, values, batch).wrong
    assert {row for row, _ in found} == {1}
    assert said in found[0][1]


def test_a_valid_record_that_both_decoders_refuse_is_told() -> None:
    values = Input([frame(1, b"\2a")], [False])
    batch = batch_of(values.values, lambda data: guarded(data + bytes(8), at_end=True))
    assert decode_and_judge(PAIR, {}, values, batch).wrong == [(0, "is valid and was refused: truncated, field d")]


def test_mutated_record_sets_come_out_both_ways() -> None:
    rng = random.Random(3)
    sets = [draw_set(rng) for _ in range(300)]
    judged = [judge_set(each) for each in sets]
    assert [wrong for _, wrong in judged if wrong is not None] == []
    assert 50 < sum(refused for refused, _ in judged) < 250


def test_a_set_with_a_wrong_checksum_is_refused_by_the_plain_reading_too() -> None:
    rng = random.Random(4)
    whole = next(s for s in (draw_set(rng) for _ in range(100)) if not judge_set(s)[0] and s.data[57:61] > bytes(4))
    with pytest.raises(Refused):
        read_plainly(whole.data[:17] + bytes(4) + whole.data[21:], 0)


@pytest.mark.parametrize(("at_end", "offset"), [(True, 3), (False, -1)])
def test_a_read_outside_of_guarded_memory_kills_the_process(at_end: bool, offset: int) -> None:
    code = (
        "import ctypes; from fuzz.guard import guarded\n"
        f"memory = guarded(b'abc', at_end={at_end})\n"
        "assert bytes(memory) == b'abc'\n"
        f"ctypes.string_at(memory.ctypes.data + {offset}, 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGSEGV


def die_at_three(seed: int) -> Result:
    if seed == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    return Result(seed)


def die_at_the_second_record(seed: int, tell: Callable[[str], None]) -> None:
    tell("the first record")
    tell("the second record")
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_process_that_dies_costs_its_seed_which_is_told_and_the_others_go_on() -> None:
    found = list(run_seeds([1, 2, 3, 4, 5], 2, die_at_three, die_at_the_second_record))
    assert sorted(each.seed for each in found) == [1, 2, 3, 4, 5]
    assert [each for each in found if isinstance(each, Crash)] == [
        Crash(3, -signal.SIGSEGV, "died at the second record")
    ]


def test_hashing_a_signalling_nan_is_silent_and_gives_the_hash_of_every_nan() -> None:
    """Fuzz seed 9 of its time: eight bytes from outside made numpy warn."""
    values = np.array([0x7FF0000000000001, 0x7FF8000000000000], np.uint64).view(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hi, lo = hash_float64(values)
    assert (hi[0], lo[0]) == (hi[1], lo[1])
