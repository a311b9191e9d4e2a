"""Rows in an owner's memory: found by their whole key, whatever its hash, its length and its window."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.avro.recordbatch import spans
from streamproc.core.hash128 import hash_bytes_python
from streamproc.core.types import NO_WATERMARK
from streamproc.operators.accumulate import example_plan
from streamproc.operators.rowcache import RowCache
from streamproc.operators.tablerows import RowLayout, window_prefix

MASK = (1 << 64) - 1
SPREAD = 0x9E3779B97F4A7C15


def cache() -> RowCache:
    return RowCache(RowLayout(example_plan()))


def numbered(rows: RowCache, pairs: list[tuple[int, bytes]]) -> list[int]:
    ids = rows.number(np.array([start for start, _ in pairs], np.int64), spans([key for _, key in pairs]))
    return list(ids.tolist())


STARTS = st.sampled_from([NO_WATERMARK, -1, 0, 1, 256, (1 << 63) - 2]) | st.integers(-(1 << 63), (1 << 63) - 2)
PAIRS = st.tuples(
    STARTS, st.sampled_from([b"", b"\0", b"\0\0", b"a", b"a\0", b"ab", b"x" * 70_000]) | st.binary(max_size=20)
)


@given(st.lists(st.lists(PAIRS, max_size=30), max_size=4), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_rows_are_numbered_as_by_a_dictionary_and_ordered_as_their_keys_are(
    batches: list[list[tuple[int, bytes]]], random_: object
) -> None:
    rows, twin = cache(), dict[bytes, int]()
    for pairs in batches:
        keys = [window_prefix(start) + key for start, key in pairs]
        assert numbered(rows, pairs) == [twin.setdefault(key, len(twin)) for key in keys]
        changed = rows.changed()
        assert rows.keys(changed) == sorted(set(keys))
        assert rows.window_starts(np.arange(len(twin))).tolist() == [
            int.from_bytes(key[:8], "big") + NO_WATERMARK for key in twin
        ]
        by_window = {start: set(rows.keys(ids)) for start, ids in rows.changed_by_window().items()}
        assert by_window == {start: {key for key in keys if key[:8] == window_prefix(start)} for start, _ in pairs}
        assert rows.keep(1 << 30, {start for all_ in batches for start, _ in all_})
        assert (len(rows), rows.changed_bytes, len(rows.changed())) == (len(twin), 0, 0)


def test_two_keys_of_one_hash_are_two_rows() -> None:
    """The window start of the second is chosen so that both have the same 64 bits."""
    first, second = (0, b"a"), b"b"
    mixed = _mixed(1 << 63) ^ hash_bytes_python(b"a")[1] ^ hash_bytes_python(second)[1]
    prefix = (mixed ^ (mixed >> 32)) * pow(SPREAD, -1, 1 << 64) & MASK
    start = (prefix ^ (1 << 63)) - ((prefix ^ (1 << 63)) >> 63 << 64)
    rows = cache()
    assert numbered(rows, [first, (start, second), first, (start, second)]) == [0, 1, 0, 1]
    assert rows._hashes[0] == rows._hashes[1]


def _mixed(prefix: int) -> int:
    spread = prefix * SPREAD & MASK
    return spread ^ (spread >> 32)


def test_windows_a_power_of_two_apart_do_not_crowd_in_few_slots() -> None:
    rows = cache()
    numbered(rows, [(n << 20, b"\x90") for n in range(4_096)])
    mask = len(rows._slots) - 1
    assert len({int(hash_) & mask for hash_ in rows._hashes[:4_096]}) > 2_000


def test_rows_of_other_windows_are_let_go_when_there_are_twice_as_many() -> None:
    rows = cache()
    numbered(rows, [(0, b"%d" % n) for n in range(1_000)])
    assert rows.keep(1 << 30, [0])
    numbered(rows, [(10, b"%d" % n) for n in range(500)])
    assert rows.keep(1 << 30, [10])
    assert len(rows) == 1_500
    for n in range(2_000):
        numbered(rows, [(20, b"%d" % n)])
        assert rows.keep(1 << 30, [10, 20])
    assert 2_500 <= len(rows) < 5_000
    kept = rows.keys(np.arange(len(rows)))
    assert window_prefix(0) + b"0" not in kept
    assert numbered(rows, [(10, b"7"), (20, b"7")]) == [kept.index(window_prefix(at) + b"7") for at in (10, 20)]
    assert not rows.keep(0, [20])
    assert len(rows) == 0
