"""What becomes of a record on the source side: dead letter, duplicate, late, filtered or counted. Real components."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import fastavro
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamproc.avro import recordbatch, wire
from streamproc.avro.columns import columns_of
from streamproc.avro.decode import Decoder, Use
from streamproc.avro.registry import UnknownSchema
from streamproc.avro.schema import Schema, parse_schema
from streamproc.core.batch import Headers, RawBatch
from streamproc.core.types import END_OF_TIME, NO_WATERMARK, Offset, TopicPartition
from streamproc.operators import aggregates as agg
from streamproc.operators.contract import Partial, SideRecord, WatermarkState
from streamproc.operators.partials import decode_partial
from streamproc.operators.pipeline import Declaration, Pipeline, compile, event_time, tumbling
from streamproc.operators.plan import SourcePlan
from streamproc.operators.source import Collected, Counters, SourceProgram, projection
from streamproc.operators.windowtable import WindowTable
from streamproc.state.contract import StoreMeta, Writes
from streamproc.state.memory import MemoryStore
from streamproc.state.overlay import Overlay

SCHEMA_ID = 3
SCHEMA = parse_schema(
    {
        "type": "record",
        "name": "Order",
        "fields": [
            {"name": "id", "type": ["null", "string"]},
            {"name": "country", "type": ["null", "string"]},
            {"name": "amount", "type": ["null", "long"]},
            {"name": "price", "type": ["null", "double"]},
            {"name": "at", "type": ["null", {"type": "long", "logicalType": "timestamp-millis"}]},
            {"name": "note", "type": ["null", "string"]},
        ],
    }
)
_AVRO = fastavro.parse_schema(
    {
        "type": "record",
        "name": "Order",
        "fields": [
            {"name": "id", "type": ["null", "string"]},
            {"name": "country", "type": ["null", "string"]},
            {"name": "amount", "type": ["null", "long"]},
            {"name": "price", "type": ["null", "double"]},
            {"name": "at", "type": ["null", "long"]},
            {"name": "note", "type": ["null", "string"]},
        ],
    }
)
TP = TopicPartition("orders", 1)
MINUTE, HOUR = 60_000, 3_600_000
START = 1_700_000_000_000 // HOUR * HOUR


class OneSchema:
    def schema_by_id(self, schema_id: int) -> Schema:
        if schema_id != SCHEMA_ID:
            raise UnknownSchema(schema_id)
        return SCHEMA

    def id_of(self, schema: Schema | str) -> int:
        return SCHEMA_ID


class Record(NamedTuple):
    value: bytes | None
    timestamp_ms: int | None = START + HOUR
    key: bytes | None = None
    headers: Headers = ()


def order(timestamp_ms: int | None = None, **fields: Any) -> Record:
    """An order of START by default; ``at`` counts from START."""
    values: dict[str, Any] = {"id": "a", "country": "DE", "amount": 1, "price": 1.0, "at": 0, "note": None} | fields
    if values["at"] is not None:
        values["at"] += START
    out = io.BytesIO()
    fastavro.schemaless_writer(out, _AVRO, values)
    stamp = (values["at"] or START) if timestamp_ms is None else timestamp_ms
    return Record(wire.frame(SCHEMA_ID, out.getvalue()), stamp, b"k", (("trace", b"t"),))


def batch_of(records: Sequence[Record], first: int = 0) -> RawBatch:
    data = recordbatch.build(records, base_offset=first, now_ms=START)
    return recordbatch.parse(TP, data, position=Offset(first))


def pipeline(declaration: Declaration, **options: Any) -> Pipeline:
    spec = event_time("at", **{"out_of_orderness": "1m", **options})
    return declaration.pipeline("orders", topic="orders", columns=columns_of(SCHEMA), event_time=spec, schema=SCHEMA)


def compiled(declaration: Declaration) -> SourcePlan:
    return compile(declaration, {"orders": 4}, "shop")[0]


@dataclass
class Run:
    """A program over memory stores, with what it handed out so far."""

    plan: SourcePlan
    side: list[SideRecord] = field(default_factory=list)
    partials: dict[str, list[Partial]] = field(default_factory=dict)
    counts: Counters = field(default_factory=Counters)
    epoch: int = 0

    def __post_init__(self) -> None:
        self.stores = {step.name: MemoryStore() for step in _dedupes(self.plan)}
        self.start(None)

    def start(self, state: WatermarkState | None) -> None:
        self.overlays = {name: Overlay(store, name) for name, store in self.stores.items()}
        decoder = Decoder(SCHEMA, OneSchema(), projection(self.plan))
        self.program = SourceProgram(self.plan, TP.partition, 4, decoder, self.overlays, state)

    def commit(self) -> Collected:
        self.epoch += 1
        collected = self.program.collect(self.epoch)
        for name, overlay in self.overlays.items():
            writes = Writes()
            overlay.writes(writes)
            self.stores[name].write(writes, StoreMeta("log", self.epoch, {}, 0))
            overlay.drop()
        self.side += collected.side
        self.counts.add(collected.counts)
        for table, partials in collected.partials.items():
            self.partials.setdefault(table, []).extend(partials)
        return collected

    def abort(self, state: WatermarkState | None) -> None:
        for overlay in self.overlays.values():
            overlay.drop()
        self.program.abort(state)

    def take(self, *records: Record, first: int = 0) -> Collected:
        self.program.process(batch_of(records, first))
        return self.commit()

    def rows(self, table: str) -> list[dict[str, Any]]:
        """What the table's owners would show, all destinations together."""
        plan = next(plan for node in _nodes(self.plan) for plan in node.tables if plan.name == table)
        overlay = Overlay(MemoryStore(), table)
        owner = WindowTable(plan, overlay)
        for partial in self.partials.get(table, []):
            for payload in partial.payloads:
                owner.apply(*decode_partial(payload), NO_WATERMARK)
        owner.collect(1)
        frame = owner.results(overlay.scan(b"", None)).sort("window_start", *plan.keys)
        starts = pl.col("window_start", "window_end").dt.epoch("ms") - START
        return frame.with_columns(starts).select(pl.exclude("^__.*$")).to_dicts()


def _nodes(plan: SourcePlan) -> Iterator[Any]:
    waiting = [plan.root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children


def _dedupes(plan: SourcePlan) -> list[Any]:
    return [node.step for node in _nodes(plan) if type(node.step).__name__ == "Dedupe"]


def reasons(collected: Collected) -> list[tuple[int, str]]:
    return [(record.offset, dict(record.headers)["sp-reason"].decode()) for record in collected.side]  # type: ignore[union-attr]


def totals(stream: Pipeline, **options: Any) -> None:
    """A table by country and five minutes."""
    windowed = stream.group_by("country").window(tumbling("5m"), **options)
    windowed.agg(orders=agg.count(), amount=agg.sum("amount")).table("totals")


def simple(**options: Any) -> Run:
    declaration = Declaration()
    totals(pipeline(declaration), **options)
    return Run(compiled(declaration))


# --- dead letters -----------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_decoded_is_a_dead_letter_with_its_origin() -> None:
    run = simple()
    bad = Record(wire.frame(99, b"x"), START + 5, b"key", (("trace", b"t"), ("none", None)))
    collected = run.take(order(), bad, Record(None), order(), first=7)
    assert reasons(collected) == [(8, "unknown schema id 99"), (9, "null value")]
    assert collected.side[0] == SideRecord(
        "dead",
        "shop-orders-dead-letters",
        b"key",
        wire.frame(99, b"x"),
        (
            ("trace", b"t"),
            ("none", None),
            ("sp-reason", b"unknown schema id 99"),
            ("sp-topic", b"orders"),
            ("sp-partition", b"1"),
            ("sp-offset", b"8"),
            ("sp-schema-id", b"99"),
            ("sp-time-ms", str(START + 5).encode()),
        ),
        TP,
        8,
    )
    assert run.rows("totals")[0]["orders"] == 2


def test_the_first_expectation_that_fails_is_the_reason_and_null_passes() -> None:
    declaration = Declaration()
    rules = {"amount sane": pl.col("amount").is_between(0, 100), "known": pl.col("country").is_not_null()}
    stream = pipeline(declaration).expect(rules).expect({"price": pl.col("price") >= 0})
    totals(stream)
    run = Run(compiled(declaration))
    collected = run.take(
        order(amount=None),
        order(amount=101, country=None),
        order(country=None),
        order(price=float("nan")),
        order(price=None),
        order(price=-1.0),
    )
    assert reasons(collected) == [(1, "amount sane"), (2, "known"), (3, "price"), (5, "price")]
    assert collected.counts.dead == {"amount sane": 1, "known": 1, "price": 2}


def test_an_overflow_or_a_failure_inside_an_expectation_fails_it() -> None:
    declaration = Declaration()
    rules = {"double": pl.col("amount") * 2 > -10, "number": pl.col("note").cast(pl.Int64) > 0}
    totals(pipeline(declaration).expect(rules))
    run = Run(compiled(declaration))
    collected = run.take(order(amount=1 << 62), order(note="x"), order(note="5"))
    assert reasons(collected) == [(0, "double"), (1, "number")]


@pytest.mark.parametrize(
    ("at", "stamp", "reason"),
    [
        (None, START, 'event time "at" is missing'),
        (HOUR + 1, START, 'event time "at" is more than 3600000 ms ahead of the record\'s timestamp'),
        (1 << 60, START, 'event time "at" is not within the years 1 to 9999'),
        (-(1 << 62), START, 'event time "at" is not within the years 1 to 9999'),
    ],
)
def test_a_record_without_usable_event_time_is_a_dead_letter_and_moves_no_watermark(
    at: int | None, stamp: int, reason: str
) -> None:
    run = simple()
    collected = run.take(order(at=at, timestamp_ms=stamp))
    assert reasons(collected) == [(0, reason)]
    assert run.program.watermark == NO_WATERMARK


def test_event_time_exactly_max_ahead_is_used() -> None:
    run = simple()
    assert run.take(order(at=HOUR, timestamp_ms=START)).side == []
    assert run.program.watermark == START + HOUR - MINUTE - 1


def test_event_time_may_be_a_float_of_milliseconds() -> None:
    declaration = Declaration()
    columns = columns_of(SCHEMA)
    spec = event_time("price", out_of_orderness="0s")
    stream = declaration.pipeline("orders", topic="orders", columns=columns, event_time=spec, schema=SCHEMA)
    totals(stream)
    run = Run(compiled(declaration))
    collected = run.take(
        order(price=float("nan")), order(price=float("inf")), order(price=None), order(price=START + 0.5)
    )
    what = 'event time "price" is'
    assert reasons(collected) == [(0, f"{what} not a number"), (1, f"{what} not a number"), (2, f"{what} missing")]
    assert run.program.watermark == START - 1


def test_a_record_that_fails_an_expectation_moves_no_watermark() -> None:
    declaration = Declaration()
    totals(pipeline(declaration).expect({"positive": pl.col("amount") > 0}))
    run = Run(compiled(declaration))
    run.take(order(at=HOUR, amount=0))
    assert run.program.watermark == NO_WATERMARK


def test_a_derived_column_that_overflows_or_cannot_be_computed_is_a_dead_letter() -> None:
    declaration = Declaration()
    derived = {"twice": pl.col("amount") * 2, "number": pl.col("note").cast(pl.Int64)}
    totals(pipeline(declaration).with_columns(**derived))
    run = Run(compiled(declaration))
    collected = run.take(order(), order(amount=1 << 62), order(note="seven"), order(note="7"), order(amount=None))
    assert reasons(collected) == [(1, 'integer overflow in column "twice"'), (2, 'column "number" cannot be computed')]
    assert run.rows("totals")[0]["orders"] == 3


def test_the_reasons_counted_are_bounded() -> None:
    run = simple()
    collected = run.take(*(Record(wire.frame(1000 + n, b"")) for n in range(150)))
    assert len(collected.side) == 150
    assert len(collected.counts.dead) == 101
    assert collected.counts.dead["other reasons"] == 50


# --- steps ------------------------------------------------------------------------------------------------------------


def test_filter_keeps_what_is_true_and_counts_the_rest() -> None:
    declaration = Declaration()
    totals(pipeline(declaration).filter(pl.col("amount") > 1))
    run = Run(compiled(declaration))
    collected = run.take(order(amount=1), order(amount=2), order(amount=None))
    assert collected.side == []
    assert run.rows("totals")[0]["orders"] == 1
    assert run.program.counters.filtered == 2


def test_dedupe_drops_the_second_and_sets_a_null_key_aside() -> None:
    declaration = Declaration()
    totals(pipeline(declaration).dedupe("id", "country", within="1h"))
    run = Run(compiled(declaration))
    collected = run.take(order(id="a"), order(id="a"), order(id="a", country="FR"), order(id=None), order(id="b"))
    assert reasons(collected) == [(3, 'null in dedupe key "id"')]
    assert collected.counts.duplicates == 1
    assert [(row["country"], row["orders"]) for row in run.rows("totals")] == [("DE", 2), ("FR", 1)]


def test_dedupe_may_let_nulls_pass_unchecked() -> None:
    declaration = Declaration()
    totals(pipeline(declaration).dedupe(["id"], within="1h", nulls="pass"))
    run = Run(compiled(declaration))
    assert run.take(order(id=None), order(id="a"), order(id=None), order(id="a")).side == []
    assert run.rows("totals")[0]["orders"] == 3


def test_dedupe_may_read_a_derived_column() -> None:
    declaration = Declaration()
    stream = pipeline(declaration).with_columns(upper=pl.col("id").str.to_uppercase())
    totals(stream.dedupe("upper", within="1h"))
    run = Run(compiled(declaration))
    assert run.take(order(id="a"), order(id="A")).counts.duplicates == 1


def test_a_record_too_old_to_dedupe_goes_once_to_each_late_topic_behind_it() -> None:
    declaration = Declaration()
    stream = pipeline(declaration).dedupe("id", within="8m")
    for name in ("one", "two", "three"):
        handle = stream.group_by("country").window(tumbling("5m")).agg(orders=agg.count()).table(name)
        if name == "three":
            handle.late.to("other")
    run = Run(compiled(declaration))
    collected = run.take(order(id="a", at=HOUR), order(id="b", at=0))
    assert [(side.topic, side.kind) for side in collected.side] == [("shop-orders-late", "late"), ("other", "late")]
    assert reasons(collected) == [(1, "too old to dedupe")] * 2
    assert collected.counts.late == {"orders-dedupe-id": 1}


def test_a_record_too_old_to_dedupe_on_its_way_to_a_topic_goes_to_the_pipelines_late_topic() -> None:
    declaration = Declaration()
    pipeline(declaration).dedupe("id", within="8m").to("out")
    run = Run(compiled(declaration))
    collected = run.take(order(id="a", at=HOUR), order(id="b", at=0), order(id="a", at=HOUR))
    assert [(side.topic, side.kind) for side in collected.side] == [("shop-orders-late", "late")]
    assert [len(part.timestamps) for part in collected.forwarded["out"]] == [1]


def test_what_goes_on_to_a_topic_is_forgotten_with_its_epoch() -> None:
    declaration = Declaration()
    pipeline(declaration).filter(pl.col("country") == "DE").to("out")
    run = Run(compiled(declaration))
    assert "out" not in run.take(order(country="IT")).forwarded
    run.program.process(batch_of([order()], 1))
    assert run.program.size_bytes > 0
    run.abort(None)
    assert run.program.size_bytes == 0
    assert not run.commit().forwarded


def test_a_late_record_says_for_which_window_and_how_late() -> None:
    run = simple(allowed_lateness="2m")
    last_in_time = order(
        at=7 * MINUTE
    )  # the watermark before the next is 6 minutes and 1 ms short of its second minute
    collected = run.take(last_in_time, order(at=0), order(at=9 * MINUTE), order(at=0), first=5)
    assert reasons(collected) == [(8, "late")]
    headers = dict(collected.side[0].headers)
    assert headers["sp-table"] == b"totals"
    assert headers["sp-window-start"] == str(START).encode()
    assert headers["sp-window-end"] == str(START + 5 * MINUTE).encode()
    # watermark 8 min - 1 ms; the window was open until 7 min - 1 ms
    assert headers["sp-late-by-ms"] == str(MINUTE).encode()
    assert collected.counts.late == {"totals": 1}
    assert sum(row["orders"] for row in run.rows("totals")) == 3


def test_the_record_that_moves_the_watermark_is_not_late_by_itself() -> None:
    run = simple()
    assert run.take(order(at=0), order(at=HOUR)).side == []


def test_a_fork_runs_shared_steps_once_and_counts_in_both_tables() -> None:
    declaration = Declaration()
    stream = pipeline(declaration).dedupe("id", within="1h")
    totals(stream.filter(pl.col("amount") > 5))
    by_id = stream.group_by("id").window(tumbling("1h"))
    by_id.agg(dearest=agg.max("price"), notes=agg.count_distinct("note"), noted=agg.count("note")).table("by_id")
    run = Run(compiled(declaration))
    run.take(order(id="a", amount=9, price=2.5, note="x"), order(id="a", amount=9), order(id="b", amount=1))
    assert run.program.counters.duplicates == 1
    assert run.program.counters.filtered == 1
    assert [row["orders"] for row in run.rows("totals")] == [1]
    found = [(row["id"], row["dearest"], row["notes"], row["noted"]) for row in run.rows("by_id")]
    assert found == [("a", 2.5, 1, 1), ("b", 1.0, 0, 0)]


def test_only_columns_that_are_needed_are_decoded_and_keys_are_only_hashed() -> None:
    declaration = Declaration()
    stream = pipeline(declaration).dedupe("id", "country", within="1h").with_columns(twice=pl.col("amount") * 2)
    windowed = stream.group_by("country").window(tumbling("5m"))
    windowed.agg(t=agg.sum("twice"), n=agg.count_distinct("note"), p=agg.count("price")).table("t")
    assert projection(compiled(declaration)) == {
        "at": Use.VALUE,
        "id": Use.HASH,
        "country": Use.VALUE | Use.HASH,
        "amount": Use.VALUE,
        "note": Use.HASH,
        "price": Use.VALUE,
    }


# --- epochs -----------------------------------------------------------------------------------------------------------


def test_the_end_of_a_bounded_source_goes_to_every_destination() -> None:
    run = simple()
    run.program.end()
    collected = run.commit()
    heads = [decode_partial(partial.payloads[-1])[0] for partial in collected.partials["totals"]]
    assert [partial.destination for partial in collected.partials["totals"]] == [0, 1, 2, 3]
    assert {(head.source, head.sources, head.watermark) for head in heads} == {(1, 4, END_OF_TIME)}


def test_idleness_is_told_by_tick_and_shipped() -> None:
    declaration = Declaration()
    totals(pipeline(declaration, idle_after="1s", idle="hold"))
    run = Run(compiled(declaration))
    run.take(order())
    assert not run.program.tick(0, True)
    assert run.program.tick(1000, True)
    assert run.program.snapshot() == WatermarkState(START - MINUTE - 1, True)
    assert len(run.commit().partials["totals"]) == 4


def test_an_abort_leaves_exactly_the_committed_state() -> None:
    declaration = Declaration()
    totals(pipeline(declaration).dedupe("id", within="1h"))
    run = Run(compiled(declaration))
    run.take(order(id="a"))
    state, before = run.program.snapshot(), run.program.counters
    run.program.process(batch_of([order(id="b", at=HOUR), order(id=None)]))
    assert run.program.size_bytes > 0
    run.abort(state)
    assert run.program.snapshot() == state
    assert run.program.counters == before
    collected = run.take(order(id="b"), order(id="a"))
    assert collected.counts.duplicates == 1
    assert collected.side == []
    assert run.rows("totals")[0]["orders"] == 2


def test_a_restart_goes_on_where_the_commit_was() -> None:
    declaration = Declaration()
    totals(pipeline(declaration).dedupe("id", within="1h"))
    run = Run(compiled(declaration))
    run.take(order(id="a", at=20 * MINUTE))
    run.start(run.program.snapshot())
    collected = run.take(order(id="a", at=20 * MINUTE), order(id="c", at=0))
    assert collected.counts.duplicates == 1
    assert reasons(collected) == [(1, "late")]


# --- the law ----------------------------------------------------------------------------------------------------------


def lawful() -> Run:
    declaration = Declaration()
    stream = (
        pipeline(declaration)
        .expect({"amount sane": pl.col("amount") < 90, "price": pl.col("price") >= 0})
        .dedupe("id", within="40m")
        .with_columns(number=pl.col("note").cast(pl.Int64), twice=pl.col("amount") * 2)
    )
    totals(stream.filter(pl.col("twice") > 20), allowed_lateness="5m")
    wide = stream.group_by("country").window(tumbling("15m"), allowed_lateness="1m")
    wide.agg(price=agg.sum("price"), mean=agg.mean("price"), low=agg.min("number"), ids=agg.count_distinct("id")).table(
        "wide"
    )
    return Run(compiled(declaration))


def some_records(dice: random.Random, count: int) -> list[Record]:
    records: list[Record] = []
    at = 0
    for _ in range(count):
        at += dice.randrange(0, 2 * MINUTE)
        fields: dict[str, Any] = {
            "id": dice.choice([None, "a", "b", "c", f"x{dice.randrange(200)}", f"x{dice.randrange(200)}"]),
            "country": dice.choice([None, "DE", "FR", "日本"]),
            "amount": dice.choice([None, 1, 50, 95, dice.randrange(90)]),
            "price": dice.choice([None, 0.1, 1e16, dice.random(), float("nan"), -1.0]),
            "note": dice.choice([None, "7", "-3", "seven"]),
            "at": None if dice.random() < 0.05 else at - dice.choice([0, 0, MINUTE, 10 * MINUTE, HOUR]),
        }
        record = order(**fields, timestamp_ms=START + at - (2 * HOUR if dice.random() < 0.03 else 0))
        if dice.random() < 0.05 and record.value is not None:
            record = record._replace(value=record.value[: dice.randrange(len(record.value))])
        records.append(record)
    return records


def outcome(run: Run) -> tuple[list[SideRecord], Any, Any, WatermarkState, Any]:
    return run.side, run.rows("totals"), run.rows("wide"), run.program.snapshot(), run.counts


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 150))
def test_results_do_not_depend_on_batch_or_epoch_boundaries_aborts_or_restarts(seed: int, count: int) -> None:
    dice = random.Random(seed)
    records = some_records(dice, count)
    whole = lawful()
    whole.take(*records)

    cut, position = lawful(), 0
    while position < count:
        state, reached = cut.program.snapshot(), position
        for _ in range(dice.randrange(1, 4)):
            stop = min(reached + dice.choice([1, 2, 7, 40]), count)
            if stop > reached:
                cut.program.process(batch_of(records[reached:stop], reached))
                reached = stop
        if dice.random() < 0.3:
            cut.abort(state)
            continue
        cut.commit()
        position = reached
        if dice.random() < 0.2:
            cut.start(cut.program.snapshot())
    assert outcome(cut) == outcome(whole)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 150))
def test_one_record_at_a_time_in_plain_python_gives_the_same(seed: int, count: int) -> None:
    records = some_records(random.Random(seed), count)
    run = lawful()
    collected = run.take(*records)
    model = Model()
    for offset, record in enumerate(records):
        model.take(offset, record)
    undecodable = {record.offset for record in collected.side if record.offset in model.undecodable}
    assert undecodable == model.undecodable
    found = [
        (*pair, dict(side.headers).get("sp-table"))
        for pair, side in zip(reasons(collected), collected.side, strict=True)
    ]
    assert [entry for entry in found if entry[0] not in model.undecodable] == model.side
    assert collected.counts.duplicates == model.duplicates
    assert {(row["window_start"], row["country"]): (row["orders"], row["amount"]) for row in run.rows("totals")} == {
        key: (len(rows), _sum([row["amount"] for row in rows])) for key, rows in model.totals.items()
    }
    assert {(row["window_start"], row["country"]): (row["low"], row["ids"]) for row in run.rows("wide")} == {
        key: (
            min((int(row["note"]) for row in rows if row["note"] is not None), default=None),
            len({row["id"] for row in rows}),
        )
        for key, rows in model.wide.items()
    }


def _sum(values: list[int | None]) -> int | None:
    there = [value for value in values if value is not None]
    return sum(there) if there else None


class Model:
    """The rules of `lawful`, as `semantics` states them, one record at a time."""

    def __init__(self) -> None:
        self.undecodable: set[int] = set()
        self.side: list[tuple[int, str, bytes | None]] = []
        self.duplicates = 0
        self.totals: dict[tuple[int, Any], list[Mapping[str, Any]]] = {}
        self.wide: dict[tuple[int, Any], list[Mapping[str, Any]]] = {}
        self._watermark = NO_WATERMARK
        self._remembered: dict[str, int] = {}

    def take(self, offset: int, record: Record) -> None:
        assert record.timestamp_ms is not None
        try:
            row = _decode(record.value)
        except (EOFError, IndexError, ValueError, wire.Unframed):
            self.undecodable.add(offset)
            return
        at = row["at"]
        if row["amount"] is not None and not row["amount"] < 90:
            return self._dead(offset, "amount sane")
        if row["price"] is not None and not row["price"] >= 0:
            return self._dead(offset, "price")
        if at is None:
            return self._dead(offset, 'event time "at" is missing')
        if at > record.timestamp_ms + HOUR:
            return self._dead(offset, 'event time "at" is more than 3600000 ms ahead of the record\'s timestamp')
        before, self._watermark = self._watermark, max(self._watermark, at - MINUTE - 1)
        if row["id"] is None:
            return self._dead(offset, 'null in dedupe key "id"')
        within, width = 40 * MINUTE, 5 * MINUTE
        bucket = at // width * width
        if bucket + width + within <= before:
            self.side.append((offset, "too old to dedupe", None))
            return None
        held = self._remembered.get(row["id"])
        if held is not None and held + width + within > before:
            self.duplicates += 1
            return None
        self._remembered[row["id"]] = bucket
        if row["note"] == "seven":
            return self._dead(offset, 'column "number" cannot be computed')
        if row["amount"] is not None and row["amount"] * 2 > 20:
            self._window(offset, row, before, "totals", self.totals, 5 * MINUTE, 5 * MINUTE)
        self._window(offset, row, before, "wide", self.wide, 15 * MINUTE, MINUTE)
        return None

    def _dead(self, offset: int, reason: str) -> None:
        self.side.append((offset, reason, None))

    def _window(self, offset: int, row: Any, before: int, name: str, into: Any, size: int, lateness: int) -> None:
        start = row["at"] // size * size
        if start + size - 1 + lateness <= before:
            self.side.append((offset, "late", name.encode()))
        else:
            into.setdefault((start - START, row["country"]), []).append(row)


def _decode(value: bytes | None) -> dict[str, Any]:
    schema_id, payload = wire.unframe(value)
    if schema_id != SCHEMA_ID:
        raise ValueError(schema_id)
    data = io.BytesIO(payload)
    row = fastavro.schemaless_reader(data, _AVRO, None)
    assert isinstance(row, dict)
    return row
