"""Dedupe: the compiled kernel equals its plain twin, whatever batches, epochs, restores and aborts lie between."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.core import limits
from streamproc.core.errors import InvariantBroken, UserError
from streamproc.core.types import NO_WATERMARK
from streamproc.operators.dedupe import DUPLICATE, PASS, TOO_OLD, DedupeOperator
from streamproc.operators.dedupe_kernel import admit_plain
from streamproc.operators.plan import Dedupe
from streamproc.state.contract import StoreMeta, Writes
from streamproc.state.memory import MemoryStore
from streamproc.state.overlay import Change, Overlay

WITHIN = 80
WIDTH = WITHIN // 8


@dataclass
class Records:
    ids: list[tuple[int, int]]
    times: list[int]
    watermarks: list[int]


def records_of(drawn: list[tuple[int, int]], out_of_orderness: int) -> Records:
    """(id, event time) -> with the watermark before each record, as a source computes it."""
    watermarks, top = [], None
    for _, at in drawn:
        watermarks.append(NO_WATERMARK if top is None else top - out_of_orderness - 1)
        top = at if top is None else max(top, at)
    # Few different low words: long probe chains through slots of other ids.
    return Records([(n * 7919, n % 3) for n, _ in drawn], [at for _, at in drawn], watermarks)


streams = st.builds(
    records_of,
    st.lists(st.tuples(st.integers(0, 25), st.integers(-150, 400)), max_size=120).map(
        # Mostly forward in time, with records far behind: all verdicts occur.
        lambda rows: [(n, at + 3 * i) for i, (n, at) in enumerate(rows)]
    ),
    st.integers(0, 150),
)


class Task:
    """The part of a task that dedupe sees: a store, an overlay, epochs that commit or abort."""

    def __init__(self, within_ms: int = WITHIN, bytes_max: int = limits.DEDUPE_BYTES_MAX) -> None:
        self.store, self.epoch, self.changes = MemoryStore(), 0, list[Change]()
        self.plan, self.bytes_max = Dedupe("orders", ("id",), within_ms, "pass", "agents/orders.py:7"), bytes_max
        self.restart()

    def restart(self) -> None:
        self.overlay = Overlay(self.store, "orders")
        self.operator = DedupeOperator(self.plan, self.overlay, bytes_max=self.bytes_max)
        self.operator.restore()

    def admit(self, records: Records, lo: int = 0, hi: int | None = None) -> list[int]:
        ids = np.array(records.ids[lo:hi], np.uint64).reshape(-1, 2)
        verdicts = self.operator.admit(
            np.ascontiguousarray(ids[:, 0]), np.ascontiguousarray(ids[:, 1]),
            np.array(records.times[lo:hi], np.int64), np.array(records.watermarks[lo:hi], np.int64),
        )  # fmt: skip
        return verdicts.tolist()

    def collect(self) -> None:
        self.operator.collect(self.epoch + 1)
        self.changes = self.overlay.changes()

    def commit(self) -> None:
        self.collect()
        self.epoch += 1
        writes = Writes()
        self.overlay.writes(writes)
        self.store.write(writes, StoreMeta("log", self.epoch, {}, 0))
        self.overlay.drop()

    def abort(self) -> None:
        self.overlay.drop()
        self.operator.abort()


def plainly(records: Records) -> list[int]:
    return admit_plain({}, records.ids, records.times, records.watermarks, WIDTH, WITHIN)


@settings(max_examples=300, deadline=None)
@given(streams)
def test_kernel_equals_its_plain_twin(records: Records) -> None:
    assert Task().admit(records) == plainly(records)


@settings(max_examples=200, deadline=None)
@given(streams, st.data())
def test_verdicts_do_not_depend_on_batches_commits_restarts_and_aborts(records: Records, data: st.DataObject) -> None:
    task, verdicts, size = Task(), list[int](), len(records.ids)
    done = committed = 0
    while done < size:
        done, lo = data.draw(st.integers(done + 1, size)), done
        verdicts[lo:] = task.admit(records, lo, done)
        match data.draw(st.sampled_from(["go on", "commit", "commit and restart", "abort", "collect and abort"])):
            case "commit":
                task.commit()
                committed = done
            case "commit and restart":
                task.commit()
                task.restart()
                committed = done
            case "abort" if committed < done:
                task.abort()
                done = committed if data.draw(st.booleans()) else done
                if done != committed:  # the aborted records are processed again, now in one batch
                    assert task.admit(records, committed, done) == verdicts[committed:done]
            case "collect and abort":
                task.collect()
                task.abort()
                done = committed
    assert verdicts[:size] == plainly(records)


@settings(max_examples=60, deadline=None)
@given(streams, streams)
def test_an_aborted_epoch_leaves_what_was_committed(first: Records, second: Records) -> None:
    task = Task()
    task.admit(first)
    task.commit()
    second.watermarks = [max([*first.watermarks, mark]) for mark in second.watermarks]
    before = list(task.store.scan(b"", None))
    once = task.admit(second)
    task.collect()
    task.abort()
    assert task.admit(second) == once
    assert list(task.store.scan(b"", None)) == before


def test_boundaries_of_bucket_and_memory() -> None:
    # Buckets are [0, 10), [10, 20), …; the key of time 5 is remembered while 10 + 80 > watermark.
    one, other = (1, 1), (2, 2)
    records = Records([one, one, one, other, one], [5, 89, 95, 9, 99], [NO_WATERMARK, 89, 90, 90, 90])
    assert Task().admit(records) == [PASS, DUPLICATE, PASS, TOO_OLD, DUPLICATE]


def test_a_key_lies_in_the_bucket_of_its_first_record() -> None:
    # The duplicate at time 85 does not keep the key of time 5 alive beyond watermark 89.
    records = Records([(1, 1)] * 3, [5, 85, 85], [NO_WATERMARK, 80, 90])
    assert Task().admit(records) == [PASS, DUPLICATE, PASS]


def test_extreme_times_do_not_overflow() -> None:
    low, high = -(1 << 63), (1 << 63) - 1
    records = Records([(1, 1), (1, 1), (2, 2), (3, 3)], [low, low, high, low], [low, low, low, high])
    assert Task().admit(records) == [PASS, DUPLICATE, PASS, TOO_OLD]


def test_zero_is_an_id_like_any_other() -> None:
    assert Task().admit(Records([(0, 0), (0, 0)], [1, 2], [0, 0])) == [PASS, DUPLICATE]


def test_high_and_low_words_above_63_bits_are_told_apart_and_restored() -> None:
    top = (1 << 64) - 1
    records = Records([(top, top), (top, top - 1), (top - 1, top), (top, top)], [1] * 4, [0] * 4)
    task = Task()
    assert task.admit(records) == [PASS, PASS, PASS, DUPLICATE]
    task.commit()
    task.restart()
    assert task.admit(records) == [DUPLICATE] * 4


def test_an_epoch_is_one_row_per_bucket_and_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DEDUPE_CHUNK_BYTES_MAX", 16 * 4)
    task = Task()
    task.admit(Records([(n, n) for n in range(7)], [3, 3, 3, 3, 3, 12, -1], [NO_WATERMARK] * 7))
    task.commit()
    sign = 1 << 63
    keys = [start.to_bytes(8, "big") + (1).to_bytes(8, "big") + part.to_bytes(2, "big")
            for start, part in [(sign - 10, 0), (sign, 0), (sign, 1), (sign + 10, 0)]]  # fmt: skip
    assert [change.key for change in task.changes] == keys
    assert [len(change.value or b"") for change in task.changes] == [16, 64, 16, 16]
    task.commit()
    assert task.changes == []  # nothing is written twice


def test_forgotten_buckets_leave_the_state_by_range() -> None:
    task = Task()
    task.admit(Records([(1, 1), (2, 2)], [5, 95], [NO_WATERMARK, 50]))
    task.commit()
    task.admit(Records([(3, 3)], [200], [90]))
    task.commit()
    assert [change.tombstone for change in task.changes] == ["expire", None]
    assert len(list(task.store.scan(b"", None))) == 2
    task.restart()
    assert task.operator.remembered == 2


def test_ids_past_remembering_at_the_epochs_end_are_not_written() -> None:
    task = Task()
    task.admit(Records([(1, 1), (2, 2)], [5, 500], [NO_WATERMARK, 400]))
    task.commit()
    assert [change.tombstone for change in task.changes] == [None]
    task.admit(Records([(3, 3), (3, 3)], [500, 2_000], [450, 1_999]))
    task.admit(Records([(4, 4)], [1_000], [3_000]))
    task.commit()
    assert [change.tombstone for change in task.changes] == ["expire"], "nothing that is left to write is an epoch too"


def test_growth_sweeps_out_what_is_forgotten() -> None:
    rng, task, size = np.random.default_rng(1), Task(), 20_000
    for epoch in range(12):
        ids = rng.integers(0, 1 << 63, (size, 2)).astype(np.uint64)
        times = np.arange(size, dtype=np.int64) // 50 + epoch * 400
        verdicts = task.operator.admit(ids[:, 0].copy(), ids[:, 1].copy(), times, times - 1)
        assert not verdicts.any()
        task.commit()
    assert task.operator.table_bytes <= 24 * (1 << 15), "90 ms of 50 ids each are remembered, not all that ever came"


def test_more_ids_than_the_limit_name_the_way_out() -> None:
    task = Task(bytes_max=24 * (1 << 13))
    ids = np.arange(10_000, dtype=np.uint64)
    times = np.zeros(10_000, np.int64)
    with pytest.raises(UserError, match=r"agents/orders\.py:7: dedupe 'orders' .*DEDUPE_BYTES_MAX.* shorter within="):
        task.operator.admit(ids, ids, times, times)
    fitting = Task(bytes_max=24 * (1 << 13))
    assert not fitting.operator.admit(ids[:4_000], ids[:4_000], times[:4_000], times[:4_000]).any()
    assert fitting.operator.table_bytes <= 24 * (1 << 13)


def test_a_watermark_that_goes_back_is_a_bug_and_is_told() -> None:
    task = Task()
    task.admit(Records([(1, 1)], [5], [4]))
    with pytest.raises(InvariantBroken, match="went back"):
        task.admit(Records([(2, 2)], [5], [3]))


def test_within_must_be_above_zero() -> None:
    with pytest.raises(UserError, match="above zero"):
        Task(within_ms=0)


def test_size_is_that_of_the_open_epoch() -> None:
    task = Task()
    task.admit(Records([(1, 1), (1, 1), (2, 2)], [1, 1, 1], [0, 0, 0]))
    assert task.operator.size_bytes == 2 * 24
    task.commit()
    assert task.operator.size_bytes == 0


def test_a_million_ids_are_admitted_in_well_under_a_microsecond_each() -> None:
    size = 1_000_000
    ids = np.random.default_rng(7).integers(0, 1 << 63, (size, 2)).astype(np.uint64)
    hi, lo = ids[:, 0].copy(), ids[:, 1].copy()
    times = np.arange(size, dtype=np.int64)
    task = Task(within_ms=10 * size)
    task.operator.admit(hi[:1], lo[:1], times[:1], times[:1] - 1)  # compiles, if that is still to be done
    task.abort()
    began = time.process_time()
    for at in range(0, size, 50_000):
        cut = slice(at, at + 50_000)
        assert not task.operator.admit(hi[cut], lo[cut], times[cut], times[cut] - 1).any()
    assert (time.process_time() - began) * 1e6 / size < 2, "a bound ten times what is measured"
