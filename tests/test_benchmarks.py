"""The benchmarks measure what they say, and a wrong result, a failed worker or too few commits is never a good figure."""

from __future__ import annotations

import io
import json
from pathlib import Path

import duckdb
import fastavro
import numpy as np
import polars as pl
import pytest

from benchmarks import __main__ as command
from benchmarks import oracle
from benchmarks.marks import SCHEMAS, Settings
from benchmarks.orders import PARTITIONS, Orders, make, orders
from benchmarks.run import COMMITS_MIN, TooFewCommits, commit_interval_s, require_commits, run
from benchmarks.worker import Measured, measure
from streamproc.core.clock import SystemClock
from streamproc.core.errors import UserError
from streamproc.core.partitioner import partition_of
from streamproc.testing.kafka_server import KafkaServer

RECORDS = 20_000


@pytest.fixture(scope="module")
def input_() -> Orders:
    return orders(RECORDS)


def measured(**epochs: int) -> Measured:
    return Measured(wall_s=1.0, cpu_s=1.0, rss_mb=1.0, epochs=epochs, restarts=0)


def test_orders_on_the_log_are_those_of_the_table_in_its_order(input_: Orders) -> None:
    schema = fastavro.parse_schema(json.loads((SCHEMAS / "order.avsc").read_text()))
    table = pl.read_parquet(input_.parquet)
    begin = 0
    for row, end in zip(table.head(500).iter_rows(named=True), input_.ends.tolist(), strict=False):
        value = input_.values[begin:end]
        begin = end
        assert value[:5] == b"\0\0\0\0\1"
        body = io.BytesIO(value[5:])
        order = fastavro.schemaless_reader(body, schema, None)
        assert not body.read(), "nothing behind the record"
        order["event_time"] = round(order["event_time"].timestamp() * 1000)
        assert {name: order[name] for name in row} == row
        assert len(order["sku"]) == 10
        assert len(order["note"]) == 47
    assert input_.ends[-1] == len(input_.values)


def test_every_order_lies_where_its_key_lives_in_the_order_of_production(input_: Orders) -> None:
    by_partition: dict[int, list[bytes]] = {}
    for part in input_.slices(777):
        for partition, records in part.items():
            assert all(partition_of(key, PARTITIONS) == partition for key, _ in records[:20])
            by_partition.setdefault(partition, []).extend(value for _, value in records)
    begins = np.concatenate([[0], input_.ends[:-1]])
    mine = np.flatnonzero(input_.partitions == 2)[:50]
    assert by_partition[2][:50] == [input_.values[begins[at] : input_.ends[at]] for at in mine]
    assert sum(map(len, by_partition.values())) == RECORDS


def test_two_percent_of_the_orders_come_again_and_time_is_five_seconds_out_of_order(input_: Orders) -> None:
    table = pl.read_parquet(input_.parquet)
    assert 0.015 < 1 - table["order_id"].n_unique() / RECORDS < 0.025
    assert table.unique().height == table["order_id"].n_unique(), "a repeated order is the same in every column"
    first = table.filter(pl.col("order_id").is_first_distinct())["event_time"]
    assert 4_000 < (first.cum_max() - first).max() <= 5_000


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        make(1_000, seed, tmp_path / folder)
    a, b, c = ((tmp_path / folder / "values.bin").read_bytes() for folder in "abc")
    assert a == b != c


def test_the_oracle_agrees_with_sql(input_: Orders) -> None:
    query = f"""
        select country, event_time // 300000 * 300000 as start, count(*), sum(amount)
        from (select distinct * from '{input_.parquet}') where status = 'completed' group by all"""
    expected = oracle.revenue_by_country(input_.parquet)
    rows = duckdb.sql(query).fetchall()
    assert len(rows) == len(expected)
    for country, start, count, revenue in rows:
        end, orders_, exact = expected[country, start]
        assert (end, orders_) == (start + 300_000, count)
        assert exact == pytest.approx(revenue, rel=1e-12)
    users = duckdb.sql(f"select user_id, count(*) from '{input_.parquet}' group by 1").fetchall()
    assert oracle.orders_per_user(input_.parquet) == {(user,): (count,) for user, count in users}
    buyers = query.replace("count(*), sum(amount)", "count(*), count(distinct user_id)")
    assert oracle.buyers_by_country(input_.parquet) == {
        (country, start): (start + 300_000, count, users)
        for country, start, count, users in duckdb.sql(buyers).fetchall()
    }


def test_forwarded_orders_are_the_completed_ones_byte_for_byte(input_: Orders) -> None:
    places = oracle.completed(input_.parquet)
    assert (
        len(places)
        == duckdb.sql(f"select * from '{input_.parquet}' where status = 'completed'").count("*").fetchall()[0][0]
    )
    in_order = {record for part in input_.slices(RECORDS) for records in part.values() for record in records}
    some = [input_.record(place) for place in places[:500]]
    assert set(some) <= in_order
    assert all(b"\x12completed" in value for _, value in some)
    assert input_.record(0)[1] == input_.values[: input_.ends[0]]
    assert not oracle.differences_in_order("out", some, list(some))
    altered = [*some[:7], (b"k", b"v"), *some[8:]]
    (told,) = oracle.differences_in_order("out", some, altered)
    assert told.startswith("out record 7: (b'k', b'v'), expected ")
    assert oracle.differences_in_order("out", some, some[:-1]) == ["out: 499 records, expected 500"]


def test_one_altered_missing_foreign_or_repeated_row_is_a_difference() -> None:
    expected = {("DE", 0): (300_000, 2, 0.3), ("FR", 0): (300_000, 1, 5.0)}
    rows = list(expected.items())
    assert not oracle.differences("Redis", expected, rows)
    last_bit = (("DE", 0), (300_000, 2, 0.1 + 0.2))
    assert oracle.differences("Redis", expected, [last_bit, rows[1]]) == [
        "Redis ('DE', 0): (300000, 2, 0.30000000000000004), expected (300000, 2, 0.3)"
    ]
    assert oracle.differences("Redis", expected, rows[:1]) == ["Redis ('FR', 0): missing"]
    assert oracle.differences("Redis", expected, [*rows, (("IT", 0), (1,))]) == ["Redis ('IT', 0): not expected"]
    assert oracle.differences("Redis", expected, [*rows, rows[0]]) == ["Redis ('DE', 0): there twice"]


def test_a_run_with_fewer_than_twenty_commits_of_orders_is_refused() -> None:
    enough = {"read-orders:0": COMMITS_MIN - 5, "read-orders:1": 5}
    assert require_commits("pipeline", measured(**enough)) == COMMITS_MIN
    with pytest.raises(TooFewCommits, match=r"committed 19 times in 1\.00 s, fewer than 20: the run is refused"):
        require_commits("pipeline", measured(**enough | {"read-orders:1": 4}, **{"table-revenue:0": 100}))


def test_a_shorter_run_commits_more_often_and_a_longer_one_no_less() -> None:
    assert [commit_interval_s(records) for records in (1_000, 400_000, 2_000_000, 9_000_000)] == [
        0.02,
        0.05,
        0.25,
        0.25,
    ]
    assert [commit_interval_s(records, "forward") for records in (200_000, 2_000_000, 8_000_000, 80_000_000)] == [
        0.02,
        0.08,
        0.32,
        1.0,
    ]


def test_a_worker_that_ends_before_its_marks_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    told = Settings(broker="smoke://signals", folder=str(tmp_path), records=1)
    with pytest.raises(UserError, match=r"(?s)ended with code 1 before its mark 'first'.*smoke"):
        measure("agent_job", told, SystemClock())


def test_the_command_exits_with_1_when_a_run_is_wrong_and_tells_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {
        "name": "agent",
        "transport": "embedded",
        "records": 1,
        "correct": False,
        "wrong": ["changelog (1,): missing"],
    }
    monkeypatch.setattr(command, "run", lambda *_, **__: line)
    assert command.main(["agent", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == line
    assert "changelog (1,): missing" in err


def test_the_command_exits_with_1_when_a_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        require_commits("agent", measured(agents=3))

    monkeypatch.setattr(command, "run", refused)
    assert command.main(["agent", "--json"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "the run is refused" in err


def test_the_command_shows_a_run_beside_the_last_one_and_keeps_it_when_asked_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = {
        "name": "agent", "transport": "embedded", "records": 2_000_000, "records_per_worker_cpu_s": 100_001,
        "worker_cpu_s": 20.0, "wall_s": 22.5, "rss_mb": 400, "commits": 80, "correct": True,
        "date": "2026-02-03T04:05:06+00:00",
    }  # fmt: skip
    monkeypatch.setattr(command, "run", lambda *_, **__: line)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.jsonl")
    assert command.main(["agent"]) == 0
    assert not (tmp_path / "results.jsonl").exists()
    assert command.main(["agent", "--append"]) == 0
    capsys.readouterr()
    line = {**line, "records_per_worker_cpu_s": 200_002}
    assert command.main(["agent", "--append"]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines() if "2,000,000" in row]
    assert rows == [
        ["agent", "on", "embedded", "2,000,000", "200,002", "20.0", "22.5", "400", "80", "yes"],
        ["on", "2026-02-03", "2,000,000", "100,001", "20.0", "22.5", "400", "80", "yes"],
    ]
    kept = [json.loads(row) for row in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["records_per_worker_cpu_s"] for row in kept] == [100_001, 200_002]


@pytest.mark.server
@pytest.mark.parametrize(
    ("name", "records"),
    [("pipeline", 250_000), ("distinct", 250_000), ("count", 100_000), ("forward", 300_000), ("agent", 80_000)],
)
def test_a_benchmark_on_the_embedded_log_is_measured_and_correct(name: str, records: int) -> None:
    line = run(name, records, "embedded", clock=SystemClock(), interval_s=0.02)
    assert line["correct"], line
    assert line["task_restarts"] == 0
    assert line["commits"] >= COMMITS_MIN
    assert line["records_per_worker_cpu_s"] == pytest.approx(records / line["worker_cpu_s"], rel=0.01)
    assert line["worker_cpu_s"] < line["wall_s"] * 4
    assert line["rss_mb"] > 50


@pytest.mark.kafka
@pytest.mark.server
def test_a_benchmark_on_a_real_kafka_is_measured_and_correct(
    kafka: KafkaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP", kafka.bootstrap)
    line = run("agent", 100_000, "kafka", clock=SystemClock(), interval_s=0.02)
    assert line["correct"], line
    assert line["versions"]["kafka"]
