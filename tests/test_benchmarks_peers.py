"""The peers are held to our own oracle, and what is told of them is what was measured."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import oracle
from benchmarks.orders import Orders, orders
from benchmarks.peers import check, measure, own, report
from benchmarks.peers.engines import ENGINES, JOBS, Faust, KafkaStreams
from benchmarks.peers.log import END_MS
from benchmarks.peers.process import Sample, last_busy
from streamproc.core.clock import SystemClock
from streamproc.testing.kafka_server import KafkaServer

RECORDS = 20_000
PEERS = Path(measure.__file__).parent


@pytest.fixture(scope="module")
def input_() -> Orders:
    return orders(RECORDS)


def right_windows(input_: Orders) -> list[check.Window]:
    rows = oracle.revenue_by_country(input_.parquet)
    return [((country, start), (count, total)) for (country, start), (_, count, total) in rows.items()]


def line(job: str, engine: str, speed: int, warm: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "job": job, "engine": engine, "records": RECORDS, "records_per_worker_cpu_s": speed,
        "records_per_worker_cpu_s_warm": warm, "wall_s": 1.0, "rss_mb": 100, "correct": True, "versions": {},
        "differs": "a <difference>", "date": "2026-01-01T00:00:00+00:00", "machine": "a machine", **more,
    }  # fmt: skip


def test_right_windows_are_right_and_those_that_close_the_others_do_not_count(input_: Orders) -> None:
    closing: check.Window = (("US", END_MS + 300_000), (1, 0.0))
    assert check.windows(input_, [*right_windows(input_), closing], updates=False) == []


def test_a_sum_may_be_off_by_rounding_and_by_nothing_else(input_: Orders) -> None:
    (identity, (count, total)), *rest = right_windows(input_)
    assert check.windows(input_, [(identity, (count, total * (1 + 1e-12))), *rest], updates=False) == []
    assert check.windows(input_, [(identity, (count, total * (1 + 1e-6))), *rest], updates=False)
    assert check.windows(input_, [(identity, (count + 1, total)), *rest], updates=False)
    assert check.windows(input_, rest, updates=False)


def test_a_window_that_is_written_twice_is_wrong_unless_updates_are_published(input_: Orders) -> None:
    rows = right_windows(input_)
    assert check.windows(input_, [rows[0], *rows], updates=False)
    assert check.windows(input_, [(rows[0][0], (1, 1.0)), *rows], updates=True) == []


def test_counts_are_compared_by_the_last_one_of_each_user(input_: Orders) -> None:
    rows = [(user, count) for (user,), (count,) in oracle.orders_per_user(input_.parquet).items()]
    assert check.counts(input_, [(rows[0][0], 0), *rows]) == []
    assert check.counts(input_, rows[1:])


def test_forwarded_orders_are_compared_byte_for_byte_and_as_often_as_they_come(input_: Orders) -> None:
    values = [input_.record(place)[1] for place in oracle.completed(input_.parquet)]
    assert check.forwarded(input_, reversed(values), 0) == []
    assert check.forwarded(input_, [value[5:] for value in values], 5) == []
    assert check.forwarded(input_, [*values, values[0]], 0) == ["output: 0 orders are missing, 1 should not be there"]
    assert check.forwarded(input_, values[1:], 0) == ["output: 1 orders are missing, 0 should not be there"]


def test_the_end_is_the_last_moment_at_which_the_process_was_busy() -> None:
    cpu = (0.0, 0.2, 0.4, 0.6, 0.6, 0.61, 0.61, 0.62)
    samples = [Sample(at / 4, used, 0) for at, used in enumerate(cpu)]
    assert last_busy(samples) == samples[4]
    assert last_busy(samples[:1]) == samples[0]


def test_every_requirement_of_a_peer_is_pinned_and_its_version_is_told() -> None:
    for path in PEERS.glob("requirements-*.txt"):
        assert all("==" in requirement for requirement in path.read_text().split())
    versions = {engine.name: engine.version() for engine in ENGINES if engine.name in ("faust", "quix")}
    assert versions == {"faust": "0.15.3", "quix": "3.28.1"}


def test_ours_is_compared_with_the_median_and_with_what_follows_the_warm_up() -> None:
    found = report.summaries(
        [line("count", own.NAME, 600), line("count", "flink", 100, 190), line("count", "flink", 200, 210),
         line("count", "faust", 10)],
    )  # fmt: skip
    cells = list(report.table(found).columns[-1].cells)
    assert cells == ["", "4.0× (3.0× warm)", "60.0×"]


def test_wrong_rounds_are_told_and_give_no_figure() -> None:
    wrong = {"correct": False, "wrong": ["output ('DE', 0): missing"], "round": 2}
    found = report.summaries(
        [line("count", own.NAME, 600), line("count", "faust", 10), line("count", "faust", 90, **wrong),
         line("count", "quix", 50, **wrong)]
    )  # fmt: skip
    table = report.table(found)
    assert list(table.columns[-2].cells) == ["yes", "1 of 2", "NO"]
    assert list(table.columns[-1].cells) == ["", "60.0×", ""], "of the right rounds alone"
    assert report.wrong(found) == [
        "WRONG: count on Faust, round 2: output ('DE', 0): missing",
        "WRONG: count on Quix Streams, round 2: output ('DE', 0): missing",
    ]


def test_every_engine_has_its_own_number_of_orders_and_faust_its_topics_before_it_starts(tmp_path: Path) -> None:
    assert all(set(engine.records) == set(JOBS) for engine in ENGINES)
    told = measure.told_of("pipeline", "faust", "localhost:9092", tmp_path)
    assert [topic.name.removeprefix(told.app_id) for topic in Faust().topics(told)] == [
        "-paid", "-seen-changelog", "-revenue-changelog",
    ]  # fmt: skip


def test_the_chart_is_well_formed_and_shows_every_run() -> None:
    found = report.summaries(
        [line("count", own.NAME, 600_000), line("count", "faust", 0, correct=False), line("forward", "quix", 7, 70)]
    )
    root = ElementTree.fromstring(report.chart(found))
    told = " ".join(root.itertext())
    assert "600,000" in told
    assert "NOT CORRECT" in told
    assert len([one for one in root.iter() if one.get("class") in ("ours", "peer")]) == 3


@pytest.mark.kafka
@pytest.mark.slow
def test_a_peer_runs_and_is_right(input_: Orders, tmp_path: Path) -> None:
    engine = KafkaStreams()
    if lacking := engine.lacks():
        pytest.skip(f"no {lacking} here")
    engine.prepare()
    with KafkaServer() as kafka:
        told = asyncio.run(
            measure.run(engine, "pipeline", input_, kafka.bootstrap, tmp_path, SystemClock(), lambda what: None)
        )
    assert told["correct"], told
    assert told["worker_cpu_s"] > 0
