"""What a run has left: rows, tables, topics, sinks; and where two outcomes differ."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import faust
import msgspec
import polars as pl

from streamproc.app import App
from streamproc.core.batch import RawBatch
from streamproc.core.types import Offset, TopicPartition
from streamproc.operators.pipeline import TableHandle
from streamproc.operators.tablerows import TableRows
from streamproc.runtime.topology import AGENTS, internal_topics
from streamproc.state.objects import ObjectOverlay
from streamproc.testing.simulation.application import Record
from streamproc.testing.simulation.cluster import Cluster

__all__ = [
    "ByPartition",
    "Outcome",
    "Row",
    "differences",
    "read_outcome",
    "read_rows",
    "read_sink",
    "read_table",
    "read_topic",
]

Row = dict[str, Any]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SHOWN = 3
"""Differences told of each table, topic or sink."""
_MS = timedelta(milliseconds=1)


class ByPartition(dict[int, Any]):
    """Values of a key that several tasks hold a row of their own for, by partition."""


@dataclass
class Outcome:
    """Everything committed, once nothing is left to do."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    """Of each pipeline's table, ordered by keys and window: group keys, ``window_start``, ``window_end``, aggregates.
    Without rows that were free to leave: those whose retention was over at the input's highest event time."""
    tables: dict[str, dict[Any, Any]] = field(default_factory=dict)
    """Of each `app.Table`."""
    topics: dict[str, list[Record]] = field(default_factory=dict)
    """Output, late and dead-letter topics, by partition in order; neither inputs nor what streamproc keeps for itself."""
    sinks: dict[str, dict[str, list[Row]]] = field(default_factory=dict)
    """By sink and table, as `rows`, with all that retention has taken from the table."""
    side_topics: frozenset[str] = frozenset()
    """Which of `topics` are late records and dead letters."""


async def read_outcome(cluster: Cluster, inputs: Collection[str], latest_ms: Mapping[str, int]) -> Outcome:
    """Of a cluster at rest. ``latest_ms``: the highest event time of each input."""
    app = _some_app(cluster)
    found = Outcome()
    for handle in app.declaration.tables:
        until_ms = _gone_until_ms(handle, latest_ms)
        rows = read_rows(cluster, handle.name)
        found.rows[handle.name] = [row for row in rows if (row["window_end"] - _EPOCH) // _MS > until_ms]
    for name in app.tables:
        found.tables[str(name)] = read_table(cluster, str(name))
    groups = list(app.runtime.groups.values())
    found.side_topics = frozenset(topic for group in groups for topic in group.side_topics)
    outputs = {topic for group in groups for topic in group.outputs}
    hidden = {spec.name for spec in internal_topics(groups)} - found.side_topics - outputs
    for topic in sorted(cluster.broker._log.topics):
        if topic not in hidden and topic not in inputs:
            found.topics[topic] = await read_topic(cluster, topic)
    found.sinks = {name: read_sink(cluster, name) for name in cluster.sinks}
    return found


def read_rows(cluster: Cluster, table: str, least_state: int = 0) -> list[Row]:
    """Committed rows of a pipeline's table, in order; ``least_state``: 0 open windows too, 1 closed ones, 2 final ones."""
    rows = [row for row in cluster.rows(table) if row.get("__state", 0) >= least_state]
    return _ordered([{name: value for name, value in row.items() if not name.startswith("__")} for row in rows])


def read_table(cluster: Cluster, name: str) -> dict[Any, Any]:
    """Committed rows of an `app.Table`."""
    held: defaultdict[Any, ByPartition] = defaultdict(ByPartition)
    for task in cluster.tasks():
        if task.id.group == AGENTS and task.store is not None:
            for key, value in ObjectOverlay(task.store, name).copy().items():
                held[key][task.id.partition] = value
    return {key: values if len(values) > 1 else next(iter(values.values())) for key, values in held.items()}


async def read_topic(cluster: Cluster, topic: str) -> list[Record]:
    """Committed records, by partition in offset order."""
    found = []
    decode = _Decoder(_some_app(cluster))
    for partition in range(cluster.broker.count(topic)):
        tp = TopicPartition(topic, partition)
        ends = (await cluster.broker.offsets([tp]))[tp]
        async for batch in cluster.broker.read(tp, Offset(ends.begin), ends.stable):
            found += [decode.record(batch, at) for at in range(len(batch))]
    return found


def read_sink(cluster: Cluster, name: str) -> dict[str, list[Row]]:
    """What a sink holds, by table."""
    found = {}
    for handle in _some_app(cluster).declaration.tables:
        if any(sink.name == name for sink, _ in handle.sinks):
            keys, columns = TableRows(handle.plan).shape()
            times = {"window_start": pl.Datetime("ms", "UTC"), "window_end": pl.Datetime("ms", "UTC"), **columns}
            rows = [
                {**dict(zip([*keys, "window_start"], identity, strict=True)), **row}
                for identity, row in cluster.sinks[name].rows[handle.name].items()
            ]
            found[handle.name] = _ordered([{n: _timed(v, times.get(n)) for n, v in row.items()} for row in rows])
    return found


def _some_app(cluster: Cluster) -> App:
    return next(worker.app for worker in cluster.alive if worker.app is not None)


def _gone_until_ms(handle: TableHandle, latest_ms: Mapping[str, int]) -> int:
    """Windows that ended then or before may have left the table."""
    source = handle.stream.source
    if (latest := latest_ms.get(source.topic)) is None:
        return -(1 << 62)
    return latest - source.event_time.out_of_orderness_ms - handle.plan.allowed_lateness_ms - handle.plan.retain_ms


def _timed(value: Any, dtype: pl.DataType | None) -> Any:
    if not isinstance(dtype, pl.Datetime) or value is None:
        return value
    time = _EPOCH + value * _MS
    return time if dtype.time_zone else time.replace(tzinfo=None)


def _ordered(rows: list[Row]) -> list[Row]:
    def place(row: Row) -> list[tuple[bool, str, Any]]:
        names = list(row)[: list(row).index("window_start") + 1]
        return [(row[name] is not None, "" if row[name] is None else row[name]) for name in names]  # type: ignore[misc]

    return sorted(rows, key=place)


class _Decoder:
    """Values as agents get them, with dicts for objects."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._readers: dict[str, Any] = {}

    def record(self, batch: RawBatch, at: int) -> Record:
        headers = dict(batch.headers(at))
        origin = headers.get("sp-topic")
        topic = batch.tp.topic if origin is None else origin.decode()
        return Record(
            self._value(topic, batch, at), _text(batch.key(at)), batch.tp.partition, int(batch.timestamps[at]), headers
        )

    def _value(self, topic: str, batch: RawBatch, at: int) -> Any:
        raw = batch.value(at)
        if raw is None:
            return None
        if topic not in self._readers:
            self._readers[topic] = self._app._reader(topic)
        good, _ = self._readers[topic].rows(batch.rows(at, at + 1))
        return _plain(good[0]) if good else raw


def _text(key: bytes | None) -> str | bytes | None:
    try:
        return None if key is None else key.decode()
    except UnicodeDecodeError:
        return key


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, faust.Record):
        return {name: _plain(part) for name, part in value.asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


# ---- where two differ


def differences(found: Outcome, expected: Outcome) -> list[str]:
    """The first ones of each table, topic and sink; empty: they are equal. Order counts per key in topics that agents
    write; late records, dead letters and records without a key are compared as a whole, by partition."""
    told: list[str] = []
    for name, rows in expected.rows.items():
        told += _in_rows(f"table {name}", found.rows.get(name, []), rows)
    for name, values in expected.tables.items():
        told += _in_mapping(f"app.Table {name}", found.tables.get(name, {}), values)
    for name in sorted({*expected.topics, *found.topics}):
        unordered = name in expected.side_topics
        there, wanted = (_by_key(of.topics.get(name, []), unordered) for of in (found, expected))
        told += _in_mapping(f"topic {name}, key", there, wanted)
    for sink, tables in expected.sinks.items():
        for name, rows in tables.items():
            told += _in_rows(f"sink {sink}, table {name}", found.sinks.get(sink, {}).get(name, []), rows)
    return told


def _in_rows(where: str, found: Sequence[Row], expected: Sequence[Row]) -> list[str]:
    return _in_mapping(where, _by_identity(found), _by_identity(expected))


def _by_identity(rows: Sequence[Row]) -> dict[Any, Any]:
    split = [(list(row.items()), list(row).index("window_start") + 1) for row in rows]
    return {tuple(_short(value) for _, value in row[:at]): dict(row[at:]) for row, at in split}


def _by_key(records: Sequence[Record], unordered: bool) -> dict[Any, Any]:
    found: defaultdict[Any, list[Any]] = defaultdict(list)
    counts: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    for record in records:
        if unordered or record.key is None:
            counts[f"{record.key} in partition {record.partition}"][repr(record.value)] += 1
        else:
            found[record.key].append(record.value)
    return {**found, **counts}


def _in_mapping(where: str, found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> list[str]:
    def differ() -> Iterator[str]:
        for key in {**expected, **found}:
            if key not in found:
                yield f"{where} {key}: missing, expected {_short(expected[key])}"
            elif key not in expected:
                yield f"{where} {key}: {_short(found[key])}, expected nothing"
            elif not _same(found[key], expected[key]):
                yield f"{where} {key}: {_contrast(found[key], expected[key])}"

    told = list(differ())
    more = [f"{where}: {len(told) - _SHOWN} more differ"] if len(told) > _SHOWN else []
    return [*islice(told, _SHOWN), *more]


def _same(one: Any, other: Any) -> bool:
    """Equal, with NaN equal to itself."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or (one != one and other != other)


def _contrast(found: Any, expected: Any) -> str:
    if isinstance(found, Counter) and isinstance(expected, Counter):
        return f"too many: {_short(found - expected)}; missing: {_short(expected - found)}"
    if isinstance(found, list) and isinstance(expected, list):
        at = next(
            (at for at, pair in enumerate(zip(found, expected, strict=False)) if not _same(*pair)),
            min(len(found), len(expected)),
        )
        there, wanted = (_short(of[at : at + _SHOWN]) for of in (found, expected))
        return f"{len(found)} records, expected {len(expected)}; from the {at + 1}. on {there}, expected {wanted}"
    return f"{_short(found)}, expected {_short(expected)}"


def _short(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Counter):
        return ", ".join(f"{count}x {text}" for text, count in islice(value.items(), _SHOWN)) or "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(part)}" for name, part in value.items()) + "}"
    return f"{value!s:.300}"
