"""`make chaos`: a minute of it on real servers, and that its comparison sees what it is there to see."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from itertools import islice
from pathlib import Path

import pytest

from chaos import compare
from chaos.compare import Record, Tally
from chaos.load import ACCOUNTS, PARTITIONS, encode_order, orders, payments
from chaos.oracle import BEGIN, TABLES, Expected, Row, Rules, Side, expect

ROOT = Path(__file__).parents[1]
SENT = [6_000] * PARTITIONS
LAST_LINE = re.compile(
    r"records=(?P<records>\d+) kills=(?P<kills>\d+) pauses=(?P<pauses>\d+) restarts=\d+ lost=0 duplicated=0 wrong=0"
)


@pytest.mark.kafka
@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.skipif("KAFKA_BOOTSTRAP" in os.environ, reason="somebody else's broker is not for killing")
def test_a_minute_of_kills_leaves_what_the_oracle_expects() -> None:
    command = [sys.executable, "-m", "chaos", "--seconds", "60", "--seed", "1"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = running.communicate(timeout=400)
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGTERM)  # it takes its servers and workers with it
            running.wait(60)
    last = LAST_LINE.fullmatch(said.splitlines()[-1])
    assert last is not None, said
    assert running.returncode == 0, said
    assert int(last["records"]) > 10_000, said
    assert int(last["kills"]) >= 2, said
    assert int(last["pauses"]) >= 1, said


@pytest.fixture(scope="module")
def expected() -> Expected:
    return expect(1, SENT, SENT)


def test_the_load_holds_every_kind_of_record_and_is_the_same_again(expected: Expected) -> None:
    assert list(islice(orders(1, 2), 500)) == list(islice(orders(1, 2), 500))
    assert list(islice(orders(1, 2), 500)) != list(islice(orders(2, 2), 500))
    kinds = Counter(payment.kind for p in range(PARTITIONS) for payment in islice(payments(1, p), SENT[p]))
    assert set(kinds) == {"good", "flaky", "fails count", "fails take", "corrupt"}
    for sides in expected.late.values():
        assert {side.reason for side in sides.values()} == {"", "too old to dedupe"}
    assert {side.reason for side in expected.dead_orders.values()} == {"", "amount is positive"}
    assert len(expected.counts) == PARTITIONS * ACCOUNTS


def test_each_order_is_counted_late_dead_or_a_duplicate(expected: Expected) -> None:
    for table in TABLES:
        counted = sum(row["orders"] for row in expected.tables[table].values())
        set_aside = len(expected.late[table]) + len(expected.dead_orders)
        assert 0.02 < 1 - (counted + set_aside) / sum(SENT) < 0.04  # three in a hundred are sent twice


def found_rows(expected: Expected) -> list[Row]:
    return [
        {"country": country, "window_start": start, **row}
        for (country, start), row in expected.tables["minutes"].items()
    ]


def less(row: Row) -> None:
    row["orders"] -= 1


def more(row: Row) -> None:
    row["orders"] += 2


def other(row: Row) -> None:
    row["revenue"] += 1e-9


@pytest.mark.parametrize(("alter", "counts"), [(less, (1, 0, 0)), (more, (0, 2, 0)), (other, (0, 0, 1))])
def test_one_altered_cell_of_a_row_is_seen(
    expected: Expected, alter: Callable[[Row], None], counts: tuple[int, int, int]
) -> None:
    rows, tally = found_rows(expected), Tally()
    compare._rows(tally, "minutes", expected.tables["minutes"], rows)
    assert tally.clean
    alter(rows[17])
    compare._rows(tally, "minutes", expected.tables["minutes"], rows)
    assert (tally.lost, tally.duplicated, tally.wrong) == counts
    assert len(tally.differences) == 1


def test_a_row_that_is_missing_twice_there_or_unknown_is_seen(expected: Expected) -> None:
    rows, tally = found_rows(expected), Tally()
    gone, again = rows.pop(3), rows[5]
    rows += [dict(again), {**again, "country": "nowhere"}]
    compare._rows(tally, "minutes", expected.tables["minutes"], rows)
    assert (tally.lost, tally.duplicated, tally.wrong) == (gone["orders"], again["orders"], 1)


def test_a_row_may_be_missing_only_when_it_was_kept_long_enough() -> None:
    rules = Rules(size_ms=60_000, lateness_ms=0, retain_ms=120_000)
    assert not rules.may_have_left(0, 179_999)
    assert rules.may_have_left(0, 180_000)


def late_records(expected: Expected) -> list[Record]:
    return [
        Record(None, encode_order(side.record), headers(place, side))  # type: ignore[arg-type]
        for place, side in expected.late["tens"].items()
    ]


def headers(place: tuple[int, int], side: Side) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {
        "sp-partition": str(place[0]).encode(),
        "sp-offset": str(place[1]).encode(),
        "sp-reason": f"late: {side.reason}".encode(),
    }
    if side.window_start is not None:
        found["sp-window-start"] = str(side.window_start).encode()
    return found


def test_a_side_record_that_is_missing_twice_there_or_altered_is_seen(expected: Expected) -> None:
    wanted = {place: [side] for place, side in expected.late["tens"].items()}
    records, tally = late_records(expected), Tally()
    compare._sides(tally, "late", wanted, records)
    assert tally.clean
    assert len(records) > 10
    compare._sides(tally, "late", wanted, [*records[1:], records[4], records[4]])
    assert (tally.lost, tally.duplicated, tally.wrong) == (1, 2, 0)
    compare._sides(tally, "late", wanted, [*records[:-1], records[-1]._replace(value=b"other")])
    assert tally.wrong == 1


@pytest.mark.parametrize(
    ("numbers", "counts"),
    [
        ([1, 2, 3], (0, 0)),
        ([1, 2, 2, 3], (0, 1)),
        ([1, 3], (1, 0)),
        ([1, 2], (1, 0)),
        ([1, 3, 2], (1, 1)),
        ([], (3, 0)),
    ],
)
def test_a_gap_or_a_repetition_in_what_an_agent_sent_is_seen(numbers: list[int], counts: tuple[int, int]) -> None:
    async def sent() -> AsyncIterator[Record]:
        for number in numbers:
            yield Record(b"0-1", str(number).encode(), {})

    tally = Tally()
    asyncio.run(compare._numbered(tally, {"0-1": 3}, sent()))
    assert (tally.lost, tally.duplicated) == counts


def test_only_its_own_partition_decides_what_is_late() -> None:
    alone = expect(1, [3_000, 0, 0, 0], [0] * PARTITIONS)
    among_others = expect(1, [3_000] * PARTITIONS, [0] * PARTITIONS)
    for table in TABLES:
        assert alone.late[table].items() <= among_others.late[table].items()
    assert alone.watermark == BEGIN
