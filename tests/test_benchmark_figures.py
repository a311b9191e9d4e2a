"""Figures of the benchmarks that are not about records a second: how they are made of what was seen."""

from __future__ import annotations

import io
import json

import fastavro
import polars as pl
import pytest

from benchmarks.marks import SCHEMAS
from benchmarks.memory import growth
from benchmarks.memory_load_job import Pool
from benchmarks.orders import SPAN_MS, orders
from benchmarks.partitions import growth_pct
from benchmarks.partitions_job import _GatedFetcher
from benchmarks.profile import THREADS_STEP, costs_us
from benchmarks.profile_steps import OTHER, by_step, step_of
from streamproc.core.types import Offset, TopicPartition


def test_memory_is_compared_from_the_end_of_the_warm_up_to_the_end_of_the_load() -> None:
    looks = [(float(at), 100.0 if at < 40 else 200.0 if at < 90 else 210.0) for at in range(101)]
    looks.append((105.0, 999.0))  # behind the load
    assert growth(looks, 100.0) == (200.0, 210.0, pytest.approx(5.0))


def test_growth_over_partitions_is_of_the_cost_of_a_record() -> None:
    rates = {(4, 1): 1000, (64, 1): 500, (64, 2): 500}
    assert growth_pct(rates, 1) == 100.0
    assert growth_pct(rates, 2) is None


def test_a_round_of_the_load_is_the_same_orders_later_and_under_other_ids() -> None:
    first = orders(2_000)
    pool, table = Pool(first), pl.read_parquet(first.parquet)
    schema = fastavro.parse_schema(json.loads((SCHEMAS / "order.avsc").read_text()))
    for round_ in (0, 3, 2):
        pool.turn(round_)
        begin = 0
        for end, row in zip(first.ends.tolist(), table.head(300).iter_rows(named=True), strict=False):
            order = fastavro.schemaless_reader(io.BytesIO(pool.orders.values[begin + 5 : end]), schema, None)
            begin = end
            assert order["order_id"] == f"{round_:08x}{row['order_id'][8:]}"
            assert round(order["event_time"].timestamp() * 1000) == row["event_time"] + round_ * SPAN_MS
            assert (order["user_id"], order["amount"]) == (row["user_id"], row["amount"])


def test_a_look_counts_for_the_innermost_step_in_its_stack() -> None:
    outer = "SourceProgram.process\0/x/streamproc/operators/source.py\x001"
    filtering = "_FilterStep.run\0/x/streamproc/operators/source.py\x002"
    library = "collect\0/y/polars/lazyframe.py\x003"
    assert step_of([outer]) == "source program, the rest"
    assert step_of([outer, filtering, library]) == "filter, derive"
    assert step_of([library]) == OTHER
    assert by_step([([outer], 1.0), ([outer, filtering], 0.5), ([filtering], 0.25)]) == {
        "filter, derive": 0.75,
        "source program, the rest": 1.0,
    }


def test_shares_of_the_steps_and_of_other_threads_add_up_to_the_cost_of_a_record() -> None:
    costs = costs_us(2.0, {"a": 3.0, "b": 1.0}, {"main_s": 4.5, "all_s": 5.0})
    assert costs == {"a": pytest.approx(1.35), "b": pytest.approx(0.45), THREADS_STEP: pytest.approx(0.2)}
    assert sum(costs.values()) == pytest.approx(2.0)


class _Fetcher:
    def __init__(self) -> None:
        self.resumed: list[TopicPartition] = []
        self.get = self.at_end = self.lag = self.close = None

    def resume(self, tp: TopicPartition, position: Offset) -> None:
        self.resumed.append(tp)

    def pause(self, tp: TopicPartition) -> None:
        pass


def test_the_gate_holds_back_orders_and_nothing_else_until_it_is_open() -> None:
    below = _Fetcher()
    gate = _GatedFetcher(below, "orders")  # type: ignore[arg-type]
    a, b, other = TopicPartition("orders", 0), TopicPartition("orders", 1), TopicPartition("shipped", 0)
    for tp in (a, b, other):
        gate.resume(tp, Offset(0))
    gate.pause(b)
    assert below.resumed == [other]
    gate.open()
    assert below.resumed == [other, a]
    gate.resume(b, Offset(0))
    assert below.resumed == [other, a, b]
