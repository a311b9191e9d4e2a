"""What a table keeps of its committed values over the epochs: what was used last, within a bound."""

from __future__ import annotations

from streamproc.state.kept import NOTHING, ROW_BYTES, KeptValues, Packed


def test_what_is_used_stays_and_what_is_not_leaves() -> None:
    kept = KeptValues(8 * ROW_BYTES)
    for n in range(100):
        kept.add((n,), (n,), 0)
        assert kept.find(0) == 0
    assert kept.find(98) == 98
    assert kept.find(50) is NOTHING


def test_large_values_count_with_their_bytes() -> None:
    kept = KeptValues(10_000)
    for n in range(100):
        kept.add((n,), (Packed(bytes(1_000)),), 1_000)
    assert sum(kept.find(n) is not NOTHING for n in range(100)) < 10
    kept.add(("huge",), (Packed(bytes(20_000)),), 20_000)
    assert kept.find("huge") is NOTHING


def test_a_value_that_is_found_again_counts_once_more() -> None:
    kept = KeptValues(10_000)
    for n in range(1_000):
        kept.add((n,), ("x" * 1_000,), 1_000)
        kept.find(n - 4)
    held = sum(len(kept.find(n)) for n in range(1_000) if kept.find(n) is not NOTHING)
    assert held <= 10_000


def test_none_and_what_is_false_are_values() -> None:
    kept = KeptValues(1_000)
    kept.add(("a", "b"), (None, 0), 0)
    assert (kept.find("a"), kept.find("b"), kept.find("c")) == (None, 0, NOTHING)
    kept.forget("a")
    assert kept.find("a") is NOTHING


def test_all_is_there_until_something_leaves() -> None:
    kept = KeptValues(6 * ROW_BYTES)
    kept.whole = True
    kept.add(range(3), range(3), 0)
    assert kept.whole
    kept.add((3,), (3,), 0)
    assert (kept.whole, kept.find(0)) == (True, 0), "moved to the old ones"
    kept.add(range(10, 15), range(10, 15), 0)
    assert not kept.whole
    gone = KeptValues(1_000)
    gone.whole = True
    gone.forget("a")
    assert not gone.whole, "if its deletion is dropped, only the store has it"
